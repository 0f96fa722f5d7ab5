"""Tasks of a build: what one process makes of one shard, on any machine (docs/data.md, "Building a data set").

A task ends with its marker in DIR/.build, written last and renamed into place: what has a marker is finished, anything
else is built again, to the same bytes. So tasks may be killed, repeated and even run twice at once. The plan of all
tasks lies in DIR/.build/plan.ndjson, where the processes of a cluster find theirs.
"""

import ctypes
import hashlib
import json
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path

import msgspec
from datasets.arrow_writer import ParquetWriter

from ..actions_vjepa2_ac import ActionStatistics
from ..inspection import summary
from ..inspection.summary import ActionHistograms
from ..recordings.shards import Shard, read_pairs
from ..recordings.splits import SplitOptions
from ..records import write_file, write_json
from .code import code_hash
from .rows import BuildReport, clip_features, iter_clips
from .selection import BuildOptions, Selection

logger = logging.getLogger(__name__)

BUILD_FOLDER = ".build"
_PLAN_FILE = "plan.ndjson"
# Files that only a finished data set has.
RESULT_FILES = ("README.md", "report.json", "action_stats.json")

Stamp = tuple[int, int]
# Called with the recordings and clips that are new since the last call.
Progress = Callable[[int, int], None]


class BuildError(ValueError):
    """A data set that cannot be finished; the message says what is missing and why."""


@dataclass(frozen=True)
class Task:
    """What one process builds: recordings of each split, into one Parquet file per split.

    Attributes:
        index: place among all tasks; names the files. How many there are is no part of a task: shards that come later,
            in the order of names, leave those before them finished.
        name: shard that it builds, for messages.
        shards: recordings to build, by split.
        files: size in bytes and modification time in ns of every file that is read, when it was planned.
        options: how clips are made.
    """

    index: int
    name: str
    shards: dict[str, list[Shard]]
    files: dict[str, Stamp]
    options: BuildOptions

    @cached_property
    def key(self) -> str:
        """Changes with everything that the result depends on: code, options, files, members with sizes, splits."""
        return hashlib.sha256(_code_hash().encode() + msgspec.json.encode(self)).hexdigest()

    @property
    def num_recordings(self) -> int:
        return sum(len(shard.entries) for shards in self.shards.values() for shard in shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of the files that it reads: about proportional to its time."""
        return sum(size for size, _ in self.files.values())

    @property
    def marker_name(self) -> str:
        return f"task-{self.index:05d}.json"

    def file_name(self, split: str) -> str:
        return f"{split}-{self.index:05d}.parquet"


@dataclass(frozen=True)
class Plan:
    """All tasks of a build, and what merging them needs to know.

    Attributes:
        tasks: in the order of the rows.
        listing: `BuildReport.to_dict()` of what was found wrong, or left out, before reading any recording.
        options, selection: as asked for.
        split: how recordings were split.
    """

    tasks: list[Task]
    listing: dict
    options: BuildOptions
    selection: Selection
    split: SplitOptions

    @cached_property
    def key(self) -> str:
        head = [self.listing, asdict(self.options), asdict(self.selection), asdict(self.split)]
        content = json.dumps([*head, [task.key for task in self.tasks]], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


@lru_cache(maxsize=1)
def _code_hash() -> str:
    own = Path(__file__).read_bytes() + Path(summary.__file__).read_bytes()
    return code_hash() + hashlib.sha256(own).hexdigest()


def stamp_of(path: str) -> Stamp:
    """Size in bytes and modification time in ns; (-1, -1) for a file that cannot be reached."""
    try:
        status = os.stat(path)
    except OSError:
        return (-1, -1)
    return (status.st_size, status.st_mtime_ns)


# ---------------------------------------------------------------------------------------------------- plan file


class _PlanHead(msgspec.Struct):
    key: str
    listing: dict
    options: BuildOptions
    selection: Selection
    split: SplitOptions


class _PlanLine(msgspec.Struct):
    key: str
    task: Task


def write_plan(plan: Plan, output: Path) -> None:
    """Make this plan the one that processes build by: line 1 its key, line 2 what is common, then a line a task.

    Results of another plan are removed: a folder with a card holds what the card says.
    """
    for folder in (output / "data", output / BUILD_FOLDER):
        folder.mkdir(parents=True, exist_ok=True)
    if current_plan_key(output) == plan.key:
        return
    for name in RESULT_FILES:
        (output / name).unlink(missing_ok=True)
    head = _PlanHead(plan.key, plan.listing, plan.options, plan.selection, plan.split)
    lines = [plan.key, head, *(_PlanLine(task.key, task) for task in plan.tasks)]
    write_file(output / BUILD_FOLDER / _PLAN_FILE, b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def current_plan_key(output: Path) -> str | None:
    """Key of the plan that `output` is built by, None where there is none."""
    try:
        with (output / BUILD_FOLDER / _PLAN_FILE).open("rb") as file:
            return msgspec.json.decode(file.readline(), type=str)
    except FileNotFoundError:
        return None


def read_plan(output: Path) -> Plan:
    """The plan of a folder, as `write_plan` has written it.

    Raises:
        BuildError: there is none, or other code has made it.
    """
    if current_plan_key(output) is None:
        raise BuildError(f"{output} holds no build: expected {BUILD_FOLDER}/{_PLAN_FILE}")
    with (output / BUILD_FOLDER / _PLAN_FILE).open("rb") as file:
        key = msgspec.json.decode(file.readline(), type=str)
        try:
            head = msgspec.json.decode(file.readline(), type=_PlanHead)
        except msgspec.ValidationError as error:
            raise BuildError(
                f"{output} was planned by another version of this package ({error}): start the build again"
            ) from error
        tasks = [_decode_task(line) for line in file]
    plan = Plan(tasks, head.listing, head.options, head.selection, head.split)
    assert plan.key == key, f"{output}: the plan has the key {plan.key}, expected {key}"
    return plan


def read_task(output: Path, plan_key: str, index: int) -> Task:
    """One task of the plan `plan_key`.

    Raises:
        BuildError: the folder is built by another plan by now, or other code has made it.
    """
    check_plan(output, plan_key)
    with (output / BUILD_FOLDER / _PLAN_FILE).open("rb") as file:
        return _decode_task(next(islice(file, index + 2, None)))


def _decode_task(line: bytes) -> Task:
    try:
        planned = msgspec.json.decode(line, type=_PlanLine)
    except msgspec.ValidationError as error:
        raise BuildError(f"a task was planned by another version of this package ({error}): start again") from error
    if planned.key != planned.task.key:
        raise BuildError(
            f"{planned.task.name} was planned by other code than that installed here ({planned.key[:12]}, found "
            f"{planned.task.key[:12]}): start the build again with one version on all machines"
        )
    return planned.task


def check_plan(output: Path, plan_key: str) -> None:
    """Refuse to go on where the folder is built by another plan by now.

    Raises:
        BuildError: with both keys.
    """
    current = current_plan_key(output)
    if current != plan_key:
        raise BuildError(
            f"{output} is built with other shards or options by now: its plan is {str(current)[:12]}, this process "
            f"was started for {plan_key[:12]}"
        )


# ---------------------------------------------------------------------------------------------------- building


def build_task(task: Task, output: Path, plan_key: str, progress: Progress = lambda recordings, clips: None) -> dict:
    """Build one task's Parquet files and, last, its marker.

    Returns:
        The marker: `key`, `splits` (`clips`, `recordings`, `players`, `sessions`, `bytes` of each), `report`,
        `statistics` of the train split, `histograms` of all splits.

    Raises:
        BuildError: a file is another one than was planned, or the folder is built by another plan by now.
        OSError: the output cannot be written.
    """
    for path, stamp in task.files.items():
        if stamp_of(path) != stamp:
            raise BuildError(
                f"{path} has changed since the build was planned: expected size and modification time {stamp}, found "
                f"{stamp_of(path)}; start the build again"
            )
    report, statistics, histograms = BuildReport(), ActionStatistics(), ActionHistograms()
    splits: dict[str, dict] = {}
    # A name of its own for every process: the same task may be running elsewhere.
    suffix = f".{socket.gethostname()}-{os.getpid()}.tmp"
    temporaries = {split: output / BUILD_FOLDER / (task.file_name(split) + suffix) for split in task.shards}
    try:
        for split, temporary in temporaries.items():
            part = _build_split(task, split, temporary, statistics, histograms, progress)
            entries = [entry for shard in task.shards[split] for entry in shard.entries]
            splits[split] = {
                "clips": part.clips,
                "recordings": part.accepted,
                "players": sorted({entry.player_id for entry in entries}),
                "sessions": sorted({entry.session_id for entry in entries}),
                "bytes": temporary.stat().st_size if part.clips else 0,
            }
            report.merge(part)
        check_plan(output, plan_key)
        for split, temporary in temporaries.items():
            if splits[split]["clips"]:
                os.replace(temporary, output / "data" / task.file_name(split))
    except FileNotFoundError:
        # Who merges removes all temporary files: another process has then finished this task.
        if (finished := read_marker(task, output)) is not None:
            return finished
        raise
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
    marker = {
        "key": task.key,
        "splits": splits,
        "report": report.to_dict(),
        "statistics": statistics.to_dict() if statistics.count else None,
        "histograms": histograms.to_dict(),
    }
    write_json(output / BUILD_FOLDER / task.marker_name, marker)
    return marker


def _build_split(
    task: Task,
    split: str,
    temporary: Path,
    statistics: ActionStatistics,
    histograms: ActionHistograms,
    progress: Progress,
) -> BuildReport:
    part, features = BuildReport(), clip_features(task.options.clip)
    reported = (0, 0)

    def report_progress() -> None:
        nonlocal reported
        progress(part.recordings - reported[0], part.clips - reported[1])
        reported = (part.recordings, part.clips)

    with ParquetWriter(features=features, path=str(temporary)) as writer:
        for shard in task.shards[split]:
            for row in iter_clips(read_pairs(shard), task.options, part, split):
                writer.write(features.encode_example(row))
                histograms.update(row["actions"])
                if split == "train":
                    statistics.update(row["actions"])
                if part.recordings != reported[0]:
                    report_progress()
                    _return_freed_memory()
        writer.finalize()
    report_progress()
    # A full disk may show only here, and what is renamed must outlive a power cut.
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    return part


def _return_freed_memory() -> None:
    """Give the system what encoding has freed: glibc keeps it in pieces, and the process would grow without end."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


# ---------------------------------------------------------------------------------------------------- markers


def read_marker(task: Task, output: Path) -> dict | None:
    """The marker of a finished task, unless anything the result depends on has changed or a file is not whole."""
    marker_file = output / BUILD_FOLDER / task.marker_name
    try:
        marker = json.loads(marker_file.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s is damaged (%s): %s is built again", marker_file, error, task.name)
        return None
    if marker.get("key") != task.key:
        return None
    for split, part in marker["splits"].items():
        file = output / "data" / task.file_name(split)
        if part["clips"] and stamp_of(str(file))[0] != part["bytes"]:
            logger.warning("%s is gone or not whole: %s is built again", file, task.name)
            return None
    return marker


def unfinished(tasks: Iterable[Task], output: Path) -> list[Task]:
    """Tasks without a valid marker, those that read most first: so that no process is left with a long one at last."""
    waiting = [task for task in tasks if read_marker(task, output) is None]
    return sorted(waiting, key=lambda task: -task.num_bytes)


def temporary_files(output: Path) -> Iterator[Path]:
    """Files that processes which were killed, or are still at work, have not renamed yet."""
    for folder in (output / BUILD_FOLDER, output / BUILD_FOLDER / "listing"):
        yield from folder.glob("*.tmp")
    for name in RESULT_FILES:
        yield from output.glob(f".{name}.*.tmp")


def remove_dead_temporaries(output: Path) -> None:
    """Remove what processes of this machine that are no more have left: it may be gigabytes."""
    host = f".{socket.gethostname()}-"
    for file in temporary_files(output):
        name, _, process = file.name.removesuffix(".tmp").rpartition("-")
        if f"{name}-".endswith(host) and process.isdecimal() and not _is_alive(int(process)):
            file.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
