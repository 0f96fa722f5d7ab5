"""Build a Parquet data set of clips from VPT recordings (docs/data.md, "Building a data set").

    python dataset_scripts/build_vpt_tubelets.py --shards "SHARDS/*.tar" --output DIR [--num_proc N]
    python dataset_scripts/build_vpt_tubelets.py --shards "SHARDS/*.tar" --output DIR --dry_run
    python dataset_scripts/build_vpt_tubelets.py --shards "SHARDS/*.tar" --output DIR --executor slurm --partition P
    python dataset_scripts/build_vpt_tubelets.py --output DIR --finish [--push_to_hub ORG/NAME]

Writes DIR/data/{train,validation}-*.parquet (one file per shard and split), DIR/action_stats.json, DIR/report.json and
the card DIR/README.md; `load_dataset("DIR")` then needs none of this package's code. A run that was stopped goes on
where it was: finished shards have a marker in DIR/.build. Exit status 0 only if the data set is complete and has clips
(with --no_wait: if the jobs are submitted; with --dry_run: if the plan can be made).
"""

import argparse
import json
import logging
import signal
import sys
from dataclasses import fields
from pathlib import Path

from vjepa_ac_hf.configuration_encoder_vjepa2_ac import parse_resolution
from vjepa_ac_hf.console import Parser

# What the package offers, without importing it (tests/test_programs.py holds both equal).
REPAIRS = (
    "null_mouse",
    "null_keyboard",
    "null_gui",
    "unknown_buttons",
    "stuck_attack",
    "no_hotbar",
    "hotbar_injected",
    "mouse_scaled",
    "frames_timed",
)

# ---------------------------------------------------------------------------------------------------- arguments


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--shards", nargs="+", help="globs of .tar shards, or folders with recordings or shards")
    add("--output", type=Path, required=True, help="folder of the data set, new or of an earlier run")
    add("--dry_run", action="store_true", help="print the plan and an estimate, write them to DIR/plan.json, and stop")
    add("--dry_run_sample", type=int, default=3, help="recordings built for the estimate (default: %(default)s)")
    add("--finish", action="store_true", help="only merge a build whose tasks are finished")
    add("--push_to_hub", metavar="ORG/NAME", help="upload the finished data set to this repository")
    add_executor_arguments(parser)
    add_clip_arguments(parser)
    arguments = parser.parse_args()
    for name in ("num_proc", "cpus_per_task", "mem_per_cpu_gb"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, found {getattr(arguments, name)}")
    if arguments.dry_run_sample < 0:
        parser.error(f"--dry_run_sample must not be negative, found {arguments.dry_run_sample}")
    if arguments.finish == bool(arguments.shards):
        parser.error("give --shards to build, or --finish to merge what is built")
    if arguments.executor == "slurm" and not arguments.finish and not arguments.partition:
        parser.error("--executor slurm needs --partition")
    if arguments.no_wait and (arguments.executor != "slurm" or arguments.push_to_hub):
        parser.error("--no_wait goes with --executor slurm and without --push_to_hub: push later, with --finish")
    return arguments


def add_executor_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("where tasks run, one a shard").add_argument
    add("--executor", choices=["local", "slurm", "ray"], default="local", help="default: %(default)s")
    add("--num_proc", type=int, default=1, help="local: processes, one shard each at a time (default: %(default)s)")
    add("--max_concurrent", type=int, default=-1, help="slurm, ray: tasks at once (default: no limit)")
    add("--cpus_per_task", type=int, default=1, help="slurm, ray: cores; one is kept busy (default: %(default)s)")
    add("--mem_per_cpu_gb", type=int, default=4, help="slurm, ray: memory per core (default: %(default)s)")
    add("--log_folder", type=Path, help="slurm, ray: scripts and logs of jobs (default: below DIR/.build)")
    add("--partition", help="slurm: partition")
    add("--time", default="24:00:00", help="slurm, ray: limit of a task, [D-]H:M:S (default: %(default)s)")
    add("--qos", help="slurm: quality of service")
    add("--slurm_setup", nargs="+", default=[], metavar="COMMAND", help="slurm: shell commands before a job begins")
    add("--slurm_args", nargs="+", default=[], metavar="NAME=VALUE", help="slurm: further options of sbatch")
    add("--max_array", type=int, default=1001, help="slurm: the cluster's MaxArraySize (default: %(default)s)")
    add("--no_wait", action="store_true", help="slurm: submit and leave")
    add("--ray_address", help="ray: a running cluster, such as auto (default: this machine)")


def add_clip_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("clips").add_argument
    add("--native_fps", type=float, default=20, help="default: %(default)s")
    add("--fps", type=float, default=5, help="frames per second of clips (default: %(default)s)")
    add("--frames_per_clip", type=int, default=16, help="default: %(default)s")
    add("--tubelet_size", type=int, default=2, help="frames (default: %(default)s)")
    add("--clip_stride", type=int, help="ticks between clip starts (default: no frame in two clips)")
    help_text = "side of the frames in pixels, or HEIGHT,WIDTH (default: %(default)s)"
    add("--resolution", type=parse_resolution, default=256, help=help_text)
    add("--resize_mode", choices=("crop", "squash"), default="crop", help="default: %(default)s")
    add("--draw_cursor", action="store_true", help="paint the cursor into frames with a GUI open")
    add("--skip_repairs", nargs="+", default=[], metavar="NAME", help=f"not to be done, of: {', '.join(REPAIRS)}")
    add("--hotbar_injection", choices=("cause", "vpt"), default="cause", help="default: %(default)s")
    add("--exclude", type=Path, metavar="FILE", help="recording ids to leave out, one a line (# begins a comment)")
    add("--session_fraction", type=float, help="share of sessions to keep, by a stable hash")
    add("--max_clips_per_session", type=int, help="clips of one session to keep at most")
    add("--max_gui_fraction", type=float, help="leave out clips with a GUI open for a larger share of ticks")
    add("--min_action_fraction", type=float, help="leave out clips with input in a smaller share of ticks")
    add("--clip_fraction", type=float, help="share of clips to keep, by a stable hash")
    add("--split_by", choices=("player", "session"), default="player", help="what is in one split as a whole")
    add("--validation_fraction", type=float, help="share of players (default: 0.05 where no split is empty)")
    add("--validation_players", nargs="+", metavar="PLAYER", help="their names, instead of a share")
    add("--validation_sessions", nargs="+", metavar="SESSION", help="likewise")


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vjepa_ac_hf.building.local import run_local
from vjepa_ac_hf.building.merging import check_finished, merge, push_dataset
from vjepa_ac_hf.building.plan import check_output, describe_plan, make_plan
from vjepa_ac_hf.building.selection import options_from, selection_from
from vjepa_ac_hf.building.tasks import Plan, Task, read_plan, remove_dead_temporaries, unfinished, write_plan
from vjepa_ac_hf.recordings.names import recording_id_of
from vjepa_ac_hf.recordings.shards import find_files
from vjepa_ac_hf.recordings.splits import split_options_from
from vjepa_ac_hf.records import write_json


def read_exclude(file: Path | None) -> list[str]:
    """Recording ids of a list, one a line; what follows a # is a comment."""
    if file is None:
        return []
    lines = (line.split("#")[0].strip() for line in file.read_text().splitlines())
    return [recording_id_of(line) for line in lines if line]


def cluster_settings(arguments: argparse.Namespace):
    """The flags of `add_executor_arguments` as cluster.py takes them."""
    from vjepa_ac_hf.building.cluster import ClusterSettings

    values = {field.name: getattr(arguments, field.name, None) for field in fields(ClusterSettings)}
    wrong = [option for option in arguments.slurm_args if "=" not in option]
    if wrong:
        raise ValueError(f"--slurm_args must be NAME=VALUE, found {wrong[0]!r}")
    values["sbatch_args"] = dict(option.lstrip("-").split("=", 1) for option in arguments.slurm_args)
    values["setup"] = arguments.slurm_setup
    return ClusterSettings(**values)


# ---------------------------------------------------------------------------------------------------- steps


def plan_build(arguments: argparse.Namespace) -> Plan:
    options = options_from(vars(arguments))
    selection = selection_from({**vars(arguments), "exclude": read_exclude(arguments.exclude)})
    split = split_options_from(vars(arguments))
    files = find_files(arguments.shards, arguments.output)
    check_output(arguments.output)
    return make_plan(files, arguments.output, options, selection, split)


def dry_run(plan: Plan, arguments: argparse.Namespace) -> None:
    processes = arguments.num_proc if arguments.executor == "local" else arguments.max_concurrent
    if processes < 0:
        processes = len(plan.tasks)
    facts = describe_plan(plan, arguments.output, sample=arguments.dry_run_sample, num_processes=processes)
    write_json(arguments.output / "plan.json", facts)
    tasks, estimate = facts["tasks"], facts["estimate"]
    print(f"{tasks['total']} tasks, {tasks['finished']} finished; {facts['recordings']} recordings to build in all")
    for split, part in facts["splits"].items():
        counts = ", ".join(f"{count} {name}" for name, count in part.items())
        print(f"  {split}: {counts}")
    print_share(facts["split"])
    print(f"  rejected before reading: {facts['rejected'] or 'none'}; left out: {facts['skipped_recordings']}")
    if estimate is not None:
        errors = estimate["relative_standard_error"]
        print(f"from {len(estimate['recordings'])} recordings, {estimate['rejected_in_sample']} of them rejected:")
        print(f"  {estimate['clips']:,} clips{plus_minus(errors['clips'])}, {estimate['hours_of_play']:,.1f} h of play")
        print(f"  {estimate['output_bytes'] / 1e9:,.2f} GB of Parquet{plus_minus(errors['output_bytes'])}")
        print(
            f"  to do: {estimate['processor_hours_to_do']:,.2f} processor hours{plus_minus(errors['hours_to_do'])}, "
            f"{estimate['hours_to_do']:,.2f} h with {estimate['processes']} processes"
        )
        if estimate["bytes_to_write"] > facts["free_bytes"]:
            needed, free = estimate["bytes_to_write"] / 1e9, facts["free_bytes"] / 1e9
            print(f"warning: {needed:,.2f} GB to write, {free:,.2f} GB free at {arguments.output}", file=sys.stderr)
    print(f"written to {arguments.output / 'plan.json'}; nothing is built")


def print_share(split: dict) -> None:
    """What share of clips, recordings, players ... validation has, and whether it is far from the one asked for."""
    shares = ", ".join(f"{share:.1%} of {name}" for name, share in split["reached"].items() if name != "bytes")
    wanted = "named" if split["wanted"] is None else f"{split['wanted']:.1%} wanted"
    print(f"validation, by {split['split_by']} ({wanted}): {shares}")
    if split["warning"]:
        print(f"warning: {split['warning']}", file=sys.stderr)


def plus_minus(relative_error: float | None) -> str:
    return "" if relative_error is None else f" (± {relative_error:.0%})"


def run_tasks(plan: Plan, waiting: list[Task], arguments: argparse.Namespace) -> None:
    """Build what is not finished; returns when nothing runs any more.

    Raises:
        ValueError: tasks that are not built, by name.
    """
    output = arguments.output
    if arguments.executor == "local":
        remove_dead_temporaries(output)
        total = sum(task.num_recordings for task in plan.tasks)
        begun = total - sum(task.num_recordings for task in waiting)
        with tqdm(total=total, initial=begun, desc="building", unit="recording") as bar, logging_redirect_tqdm():
            failures = run_local(waiting, output, plan.key, arguments.num_proc, bar)
        check_finished([task.name for task in unfinished(plan.tasks, output)], plan, failures)
        return
    from vjepa_ac_hf.building import cluster

    if arguments.executor == "ray":
        cluster.run_ray(plan, waiting, output, cluster_settings(arguments))
        return
    jobs = cluster.queued_jobs(cluster.job_name(plan, output))
    if jobs is None:
        raise ValueError("squeue does not answer: whether this build is in the queue already is not known")
    if jobs:
        print(f"already in the queue: {' '.join(jobs)}")
    else:
        logs = cluster.submit_slurm(plan, waiting, output, cluster_settings(arguments))
        print(f"submitted {len(waiting)} tasks as {cluster.job_name(plan, output)}; scripts and logs: {logs}")
    if not arguments.no_wait:
        cluster.wait_for_slurm(plan, waiting, output)


# ---------------------------------------------------------------------------------------------------- main


def build(arguments: argparse.Namespace) -> int:
    output = arguments.output
    if arguments.finish:
        plan = read_plan(output)
    else:
        if arguments.executor == "slurm":
            from vjepa_ac_hf.building.cluster import check_slurm

            check_slurm()
        plan = plan_build(arguments)
        if arguments.dry_run:
            dry_run(plan, arguments)
            return 0
        write_plan(plan, output)
    waiting = unfinished(plan.tasks, output)
    num_finished = len(plan.tasks) - len(waiting)
    if waiting and not arguments.finish:
        run_tasks(plan, waiting, arguments)
        if arguments.no_wait:
            print(f"not finished yet: {output} is complete when it has a README.md")
            return 0

    report = merge(plan, output)
    print_share(json.loads((output / "report.json").read_text())["split"])
    before = f"; {num_finished} of {len(plan.tasks)} shards were finished before" if num_finished else ""
    print(f"{report.summary()}{before}; {output}")
    if arguments.push_to_hub:
        push_dataset(output, arguments.push_to_hub)
        print(f"pushed to {arguments.push_to_hub}")
    return 0


def stop(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    arguments = parse_arguments()
    torch.set_num_threads(1)  # a process keeps one core busy; --num_proc is how many
    before = signal.signal(signal.SIGTERM, stop)  # so that workers end and temporary files go
    try:
        return build(arguments)
    except KeyboardInterrupt:
        print("interrupted: what is finished stays, the same command goes on with the rest", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
