"""A process that has imported the training program and forks a run for every line of its standard input.

A line is JSON: the command line (with the program's name) and a file for the output. It answers with the run's process
id and, when that has ended, its exit status (negative: the signal that ended it). Runs in processes of their own can be
killed for real; forked, they start within milliseconds.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class TrainForks:
    """The other side of the pipe: `start(arguments, log)`, then `wait()`."""

    def __init__(self) -> None:
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.server = subprocess.Popen([sys.executable, __file__], text=True, env=environment, cwd=ROOT, **pipes)

    def start(self, arguments: list[str], log: Path) -> int:
        self.server.stdin.write(json.dumps([arguments, str(log)]) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self) -> int:
        return int(self.server.stdout.readline())

    def run(self, arguments: list[str], log: Path) -> int:
        self.start(arguments, log)
        return self.wait()

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=60)


def _run(program, arguments: list[str], log: str) -> None:
    os.setpgid(0, 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = arguments
    program.main()
    sys.exit(0)


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    specification = importlib.util.spec_from_file_location("train_program", ROOT / "examples" / "train.py")
    program = importlib.util.module_from_spec(specification)
    sys.modules["train_program"] = program
    specification.loader.exec_module(program)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        arguments, log = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(program, arguments, log)
        answers.write(f"{child}\n")
        answers.flush()
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
