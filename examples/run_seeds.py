"""Run one recipe for several seeds, and tell every figure as mean, spread between runs and interval within a run.

    python examples/run_seeds.py --output RUNS --seeds 0 1 2 \\
        -- train --config tiny-vizdoom --dataset DIR --seed {seed} --output_dir {run}/model \\
        -- evaluate --model {run}/model --dataset DIR --output {run}/report

Every program after a `--` is one of `vjepa-ac`, with its own flags; {seed} stands for the seed, {run} for its folder
RUNS/seed-K. Leaves RUNS/runs.json and report.html with the figures in all {run}/*/metrics.json and summary.json. The
same command goes on after it was stopped: what is finished is not run again (docs/training.md, "Several seeds"). Exit
status 75 after SIGTERM or Ctrl-C.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

# This folder holds evaluate.py, which must not hide the library of that name.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

from vjepa_ac_hf.console import Parser, made
from vjepa_ac_hf.programs.command import PROGRAMS

INTERRUPTED = 75
LAUNCHER = [sys.executable, "-c", "from vjepa_ac_hf.programs.command import main; main()"]  # the command vjepa-ac


def parse_arguments() -> argparse.Namespace:
    """The flags, and `programs`: name and flags of each, with {seed} and {run} as they are."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --output RUNS [--seeds K ...] [--parallel N] -- PROGRAM [flags] [-- PROGRAM [flags]] ...",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (default: 0 1 2)")
    parser.add_argument(
        "--parallel", type=int, default=1, help="runs at the same time; each writes RUNS/seed-K/log.txt"
    )
    own, *programs = split(sys.argv[1:])
    arguments = parser.parse_args(own)
    if not programs:
        parser.error("no program: give `-- train ... -- evaluate ...`")
    if arguments.parallel < 1 or len(set(arguments.seeds)) < len(arguments.seeds):
        parser.error(f"--parallel must be at least 1 (found {arguments.parallel}), --seeds different numbers")
    for program in programs:
        if not program or program[0] not in PROGRAMS:
            parser.error(f"-- {shlex.join(program)}: no program; there are {', '.join(PROGRAMS)}")
        if not any("{run}" in word for word in program):
            parser.error(f"-- {program[0]}: all runs would write to one place; its flags need {{run}}")
    if not any("{seed}" in word for program in programs for word in program):
        parser.error("all runs would be the same: flags need {seed}, as in `train --seed {seed}`")
    arguments.programs = programs
    return arguments


def split(words: list[str]) -> list[list[str]]:
    """Words between the `--`."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below

import fcntl
import json
import threading
from concurrent.futures import ThreadPoolExecutor

from vjepa_ac_hf.evaluation.runs import aggregate, as_text, count, read_run, table, write_runs
from vjepa_ac_hf.records import claim_folder, write_json


class Runs:
    """The runs of one recipe, side by side or one after the other.

    Args:
        arguments: of this program.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.programs = {f"{n}: {p[0]}": shlex.join(p[1:]) for n, p in enumerate(arguments.programs, 1)}
        self.stopping = False
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def stop(self, *_: object) -> None:
        """Ask what runs to leave a checkpoint and end; nothing more is started."""
        self.stopping = True
        for process in list(self._running):
            process.terminate()

    def run(self, seed: int) -> None:
        """All programs of a seed that are not finished yet.

        Raises:
            RuntimeError: a program failed; the message has its status.
        """
        if self.stopping:
            return
        folder = self.arguments.output / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # held by a program whose own parent was killed
                print(f"seed {seed}: waiting for what an earlier start has left running", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            path = folder / "finished.json"
            finished = json.loads(path.read_text()) if path.is_file() else []
            for (name, flags), words in zip(self.programs.items(), self.arguments.programs, strict=True):
                if [name, flags] in finished:
                    print(f"seed {seed}, {name}: finished before", flush=True)
                    continue
                if self.stopping:
                    return
                code = self.start(seed, folder, words, lock.fileno())
                if self.stopping and code:
                    return
                if code:
                    self.stop()
                    raise RuntimeError(
                        f"seed {seed}, {name} failed with exit status {code}; start again to go on there"
                    )
                finished.append([name, flags])
                write_json(path, finished)

    def start(self, seed: int, folder: Path, words: list[str], lock: int) -> int:
        """Run a program, and return its exit status; it holds the seed's lock as long as it lives."""
        words = [word.replace("{seed}", str(seed)).replace("{run}", str(folder)) for word in words]
        print(f"\n== seed {seed}\n$ vjepa-ac {shlex.join(words)}", flush=True)
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // self.arguments.parallel, 1)))
        with (folder / "log.txt").open("a") as log, self._lock:
            process = subprocess.Popen(
                [*LAUNCHER, *words],
                env=environment,
                stdout=log if self.arguments.parallel > 1 else None,
                stderr=subprocess.STDOUT if self.arguments.parallel > 1 else None,
                start_new_session=True,  # Ctrl-C reaches it once, from `stop`
                pass_fds=(lock,),
            )
            self._running.add(process)
        if self.stopping:
            process.terminate()
        code = process.wait()
        self._running.discard(process)
        return code


def main() -> int:
    arguments = parse_arguments()
    runs = Runs(arguments)
    output = arguments.output = arguments.output.resolve()
    # Programs may be added at the end later, never changed.
    claim_folder(output, runs.programs, file="programs.json", defaults=runs.programs)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, runs.stop)
    with ThreadPoolExecutor(arguments.parallel) as pool:
        work = [pool.submit(runs.run, seed) for seed in arguments.seeds]
    errors = [error for job in work if (error := job.exception()) is not None]
    if errors:
        raise errors[0]
    if runs.stopping:
        print("stopped: start the same command again", flush=True)
        return INTERRUPTED
    summary = aggregate({f"seed-{seed}": read_run(output / f"seed-{seed}") for seed in arguments.seeds})
    write_runs(output, summary, runs.programs)
    print(as_text(table(summary)))
    print(made(f"figures of {count(summary['runs'])}", output / "report.html"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
