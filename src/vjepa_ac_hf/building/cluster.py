"""A build's tasks on a cluster, by datatrove's Slurm and Ray executors (docs/data.md, "Clusters").

datatrove starts processes and keeps their logs; what is finished is known from the tasks' own markers, not from
datatrove's, which only know numbers that mean other shards after a change of options.
"""

import getpass
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import torch
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from tqdm import tqdm

from .merging import merge
from .tasks import BUILD_FOLDER, Plan, Task, build_task, read_marker, read_plan, read_task

logger = logging.getLogger(__name__)

# How often the queue and the markers are looked at.
POLL_SECONDS = 15.0
_TIME = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")


@dataclass(frozen=True)
class ClusterSettings:
    """Resources of a task and of the jobs.

    Attributes:
        cpus_per_task: cores; one is kept busy.
        mem_per_cpu_gb: memory per core.
        max_concurrent: tasks at the same time at most; -1: no limit.
        log_folder: for the scripts and logs of jobs; None: below DIR/.build.
        partition, qos: as sbatch takes them.
        time: limit of a task, [days-]hours:minutes:seconds.
        setup: shell commands before a job begins; empty: the running Python's folder comes first in PATH.
        sbatch_args: further options of sbatch, by name.
        max_array: tasks of one job array at most (`MaxArraySize` of the cluster).
        ray_address: of a running Ray cluster, as `ray.init` takes it.

    Raises:
        ValueError: a time of another form.
    """

    cpus_per_task: int = 1
    mem_per_cpu_gb: int = 4
    max_concurrent: int = -1
    log_folder: Path | None = None
    partition: str | None = None
    time: str = "24:00:00"
    qos: str | None = None
    setup: Sequence[str] = ()
    sbatch_args: dict[str, str] = field(default_factory=dict)
    max_array: int = 1001
    ray_address: str | None = None

    def __post_init__(self) -> None:
        if not _TIME.fullmatch(self.time):
            raise ValueError(f"--time must be [days-]hours:minutes:seconds, found {self.time!r}")

    @property
    def seconds(self) -> int:
        match = _TIME.fullmatch(self.time)
        assert match is not None
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


class BuildTasks(PipelineStep):
    """Builds the task of its rank, unless that is finished.

    Args:
        output: folder of the data set, at the same path on all machines.
        plan_key: of the plan that lies there.
        indices: of the tasks, by rank.
    """

    name = "build clips"
    type = "VPT"

    def __init__(self, output: str, plan_key: str, indices: list[int]) -> None:
        super().__init__()
        self.output, self.plan_key, self.indices = output, plan_key, indices

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator:
        torch.set_num_threads(1)  # a forked worker's thread pool would wait for ever, and a task has one core
        output = Path(self.output)
        task = read_task(output, self.plan_key, self.indices[rank])
        if read_marker(task, output) is None:
            build_task(task, output, self.plan_key, self._count)
        return iter(())

    def _count(self, recordings: int, clips: int) -> None:
        self.stat_update("recordings", value=recordings, unit="task")
        self.stat_update("clips", value=clips, unit="task")


class FinishBuild(PipelineStep):
    """Merges a build whose tasks are finished; refuses, by name and count, where some are not."""

    name = "finish data set"
    type = "VPT"

    def __init__(self, output: str) -> None:
        super().__init__()
        self.output = output

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator:
        logger.warning(merge(read_plan(Path(self.output)), Path(self.output)).summary())
        return iter(())


@contextmanager
def watch_tasks(tasks: Sequence[Task], output: Path) -> Iterator[None]:
    """A progress bar of recordings, by the markers that tasks leave, while something else waits for them."""
    waiting, stop = list(tasks), threading.Event()

    def watch(bar: tqdm) -> None:
        while True:
            last_look = stop.wait(POLL_SECONDS)
            for task in [task for task in waiting if (output / BUILD_FOLDER / task.marker_name).exists()]:
                if read_marker(task, output) is not None:
                    waiting.remove(task)
                    bar.update(task.num_recordings)
            if last_look:
                return

    with tqdm(total=sum(task.num_recordings for task in tasks), desc="building", unit="recording") as bar:
        thread = threading.Thread(target=watch, args=(bar,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


# ---------------------------------------------------------------------------------------------------- Slurm


class _SlurmExecutor(SlurmPipelineExecutor):
    """Without the extra job that sums up datatrove's statistics: after a failed task it would wait for ever."""

    def launch_merge_stats(self) -> None:
        pass


def check_slurm() -> None:
    """Refuse to submit where that cannot work.

    Raises:
        ValueError: Slurm's commands are missing, or this is a task of a job array (datatrove would take it for one of
            its own).
    """
    missing = [command for command in ("sbatch", "squeue") if shutil.which(command) is None]
    if missing:
        raise ValueError(f"--executor slurm needs Slurm's commands on PATH, not found: {', '.join(missing)}")
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise ValueError("--executor slurm submits jobs itself: start it outside of a job array")


def job_name(plan: Plan, output: Path) -> str:
    """Name of the jobs of a build, the same in every run of it."""
    return f"vpt-{hashlib.sha256(f'{plan.key} {output.resolve()}'.encode()).hexdigest()[:10]}"


def queued_jobs(name: str) -> list[str] | None:
    """Ids of the jobs of a build that wait or run; None where Slurm does not answer."""
    command = ["squeue", f"--user={getpass.getuser()}", f"--name={name},{name}-finish", "--noheader", "--format=%i"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        logger.warning("squeue failed, asking again later: %s", answer.stderr.strip())
        return None
    return answer.stdout.split()


def submit_slurm(plan: Plan, tasks: Sequence[Task], output: Path, settings: ClusterSettings) -> Path:
    """Submit an array of jobs, one task each, and a job after them that finishes the data set.

    The last job runs even where tasks have failed, and then says in its log which.

    Returns:
        The folder with scripts and logs: build/ and finish/.
    """
    assert settings.partition is not None
    name, output = job_name(plan, output), output.resolve()
    logs = (settings.log_folder or output / BUILD_FOLDER / "slurm").resolve()
    logs = logs / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    setup = settings.setup or [f'export PATH="{Path(sys.executable).parent}:$PATH"']
    common = {
        "time": settings.time,
        "partition": settings.partition,
        "qos": settings.qos,
        "mem_per_cpu_gb": settings.mem_per_cpu_gb,
        "env_command": "\n".join(setup),
        "sbatch_args": settings.sbatch_args,
        "max_array_size": settings.max_array,
        "skip_completed": False,
    }
    build = _SlurmExecutor(
        [BuildTasks(str(output), plan.key, [task.index for task in tasks])],
        tasks=len(tasks),
        workers=settings.max_concurrent,
        cpus_per_task=settings.cpus_per_task,
        job_name=name,
        logging_dir=str(logs / "build"),
        **common,
    )
    finish = _SlurmExecutor(
        [FinishBuild(str(output))],
        tasks=1,
        job_name=f"{name}-finish",
        logging_dir=str(logs / "finish"),
        depends=build,
        run_on_dependency_fail=True,
        **common,
    )
    finish.run()
    return logs


def wait_for_slurm(plan: Plan, tasks: Sequence[Task], output: Path) -> None:
    """Wait, with a progress bar, until no job of the build is left in the queue."""
    with watch_tasks(tasks, output):
        while queued_jobs(job_name(plan, output)) != []:
            time.sleep(POLL_SECONDS)


# ------------------------------------------------------------------------------------------------------ Ray


def run_ray(plan: Plan, tasks: Sequence[Task], output: Path, settings: ClusterSettings) -> None:
    """Build tasks on a Ray cluster, or on this machine where none is given, and wait for them.

    Tasks that fail are in the logs below `settings.log_folder`; what is missing then shows in the markers.

    Raises:
        ImportError: Ray is not installed.
    """
    import ray
    from datatrove.executor.ray import RayPipelineExecutor

    output = output.resolve()
    logs = (settings.log_folder or output / BUILD_FOLDER / "ray").resolve() / f"{datetime.now():%Y%m%d-%H%M%S}"
    ray.init(address=settings.ray_address, log_to_driver=False)
    executor = RayPipelineExecutor(
        [BuildTasks(str(output), plan.key, [task.index for task in tasks])],
        tasks=len(tasks),
        workers=settings.max_concurrent,
        cpus_per_task=settings.cpus_per_task,
        mem_per_cpu_gb=settings.mem_per_cpu_gb,
        logging_dir=str(logs),
        skip_completed=False,
        time=settings.seconds,  # its workers' pool waits for ever for one that the kernel has killed
    )
    try:
        with watch_tasks(tasks, output):
            executor.run()
    finally:
        ray.shutdown()
