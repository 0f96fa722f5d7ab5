"""From files to the plan of a build, and what it will take (docs/data.md, "Building a data set")."""

import hashlib
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
from tqdm import tqdm

from ..recordings.shards import (
    TAR_SUFFIXES,
    Member,
    RecordingEntry,
    Shard,
    list_shards,
    list_tar,
    read_pairs,
)
from ..recordings.splits import SplitOptions, split_facts, validation_recordings
from ..records import write_file
from .code import code_hash
from .rows import BuildReport, iter_clips, listing_report
from .selection import BuildOptions, Selection, select_recordings
from .tasks import BUILD_FOLDER, Plan, Stamp, Task, read_marker, stamp_of
from .vpt_tubelets import split_shards

logger = logging.getLogger(__name__)

# Loose recordings of a folder are built in groups of this many, each like a shard.
RECORDINGS_PER_TASK = 32
# Listing waits for the file system, not for the processor.
_LISTING_THREADS = 16


class _Listing(msgspec.Struct):
    """Cache file of one listed tar: valid for this very file and code."""

    path: str
    stamp: Stamp
    code: str
    shard: Shard


# Made once, before any thread asks: msgspec crashes where several threads are the first to need a type.
_DECODER = msgspec.json.Decoder(_Listing)


def check_output(output: Path) -> None:
    """Refuse a folder that something else has filled: files in it would be removed or uploaded with the data set.

    Raises:
        ValueError: with the first file found.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file, expected a folder")
    if not output.is_dir() or (output / BUILD_FOLDER).is_dir():
        return
    if found := sorted(file.name for file in output.iterdir()):
        raise ValueError(
            f"--output {output} holds {found[0]!r} ({len(found)} entries) and no {BUILD_FOLDER} folder: it was not "
            "built by this program; give an empty or a new folder"
        )


def list_files(files: Sequence[str], output: Path) -> tuple[list[Shard], dict[str, Stamp]]:
    """List shards and loose recordings as `list_shards` does, tars that have not changed from the cache in `output`.

    Returns:
        The shards, and size and modification time of every file.
    """
    cache = output / BUILD_FOLDER / "listing"
    cache.mkdir(parents=True, exist_ok=True)
    code = code_hash()
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        stamps = dict(zip(files, pool.map(stamp_of, files), strict=True))
        tars = [file for file in files if file.endswith(TAR_SUFFIXES)]
        listed = pool.map(partial(_list_cached, stamps=stamps, cache=cache, code=code), tars)
        shards = dict(zip(tars, tqdm(listed, total=len(tars), desc="listing", unit="shard"), strict=True))
    return list_shards(files, listed_tars=shards), stamps


def _list_cached(path: str, stamps: dict[str, Stamp], cache: Path, code: str) -> Shard:
    file = cache / f"{hashlib.sha256(path.encode()).hexdigest()[:32]}.json"
    try:
        known = _DECODER.decode(file.read_bytes())
        if (known.path, known.stamp, known.code) == (path, stamps[path], code):
            return known.shard
    except (FileNotFoundError, msgspec.DecodeError):
        pass  # listed for the first time, or a cache that is no good: listing again is always right
    shard = list_tar(path, path)
    # What could not be read may be a fault of the moment.
    if all(rejection.recording is not None for rejection in shard.rejected):
        write_file(file, msgspec.json.encode(_Listing(path, stamps[path], code, shard)))
    return shard


def make_plan(
    files: Sequence[str],
    output: Path,
    options: BuildOptions,
    selection: Selection,
    split: SplitOptions,
) -> Plan:
    """List the files and divide what is to be built into tasks; reads no recording.

    Raises:
        ValueError: nothing to build, or splits that cannot be made (`validation_recordings`).
    """
    shards, stamps = list_files(files, output)
    report = listing_report(shards)
    shards, skipped = select_recordings(shards, selection)
    report.skip(skipped)
    # As a process that reads the plan sees them: 20 frames per second and 20.0 are one.
    options = msgspec.json.decode(msgspec.json.encode(options), type=BuildOptions)
    selection = msgspec.json.decode(msgspec.json.encode(selection), type=Selection)
    recordings = [entry.recording_id for shard in shards for entry in shard.entries]
    validation = validation_recordings(recordings, split)
    if not validation and split.validation_fraction is None and not split.asks_for_validation:
        logger.warning(
            "no validation split: %g of %d %ss leaves one split empty, so all are for training; give "
            "--validation_fraction or --validation_players for another choice, 0 for this one",
            *(split.wanted_share, len({split.unit_of(recording) for recording in recordings}), split.split_by),
        )
    tasks = plan_tasks(shards, stamps, validation, options)
    if not tasks:
        raise ValueError(f"no recording to build: {report.summary()}")
    return Plan(tasks, report.to_dict(), options, selection, split)


def plan_tasks(
    shards: Sequence[Shard], stamps: dict[str, Stamp], validation: set[str], options: BuildOptions
) -> list[Task]:
    """One task per tar; loose recordings in groups of `RECORDINGS_PER_TASK`."""
    filled = [shard for shard in shards if shard.entries]
    groups = [[shard] for shard in filled if shard.source.endswith(TAR_SUFFIXES)]
    loose = [shard for shard in filled if not shard.source.endswith(TAR_SUFFIXES)]
    groups += [loose[start : start + RECORDINGS_PER_TASK] for start in range(0, len(loose), RECORDINGS_PER_TASK)]
    tasks = []
    for index, group in enumerate(groups):
        paths = {member.path: None for shard in group for entry in shard.entries for member in (entry.video, entry.log)}
        files = {path: stamps[path] for path in paths}
        name = group[0].name if len(group) == 1 else f"{group[0].entries[0].recording_id} and {len(group) - 1} others"
        tasks.append(Task(index, name, split_shards(group, validation), files, options))
    return tasks


# ---------------------------------------------------------------------------------------------------- dry run


def member_bytes(task: Task, member: Member) -> int:
    return task.files[member.path][0] if member.size is None else member.size


@dataclass
class _SampleReport:
    """One recording of the sample: bytes of its log, and what building it has given."""

    log_bytes: int
    clips: int
    ticks: int
    clip_bytes: int
    seconds: float


def describe_plan(plan: Plan, output: Path, *, sample: int, num_processes: int) -> dict:
    """What a build would do, as JSON (docs/data.md, "Before a long build").

    Args:
        plan: of the build.
        output: its folder, to know what is finished.
        sample: recordings to really build, in memory, for the estimate; 0: no estimate.
        num_processes: processes that the time is divided by.
    """
    finished = {task.index for task in plan.tasks if read_marker(task, output) is not None}
    entries = [
        (task, split, shard, entry)
        for task in plan.tasks
        for split, shards in task.shards.items()
        for shard in shards
        for entry in shard.entries
    ]
    splits: dict[str, dict[str, int]] = {}
    for split in dict.fromkeys(split for _, split, _, _ in entries):
        own = [entry for _, other, _, entry in entries if other == split]
        players, sessions = {entry.player_id for entry in own}, {entry.session_id for entry in own}
        splits[split] = {"players": len(players), "sessions": len(sessions), "recordings": len(own)}
    report = BuildReport.from_dict(plan.listing)
    log_bytes = sum(member_bytes(task, entry.log) for task, _, _, entry in entries)
    todo_bytes = sum(member_bytes(task, entry.log) for task, _, _, entry in entries if task.index not in finished)
    estimate = None
    if sample:
        chosen = [entries[place] for place in _spread(len(entries), sample)]
        built = [
            _build_sample(task, shard, entry) for task, _, shard, entry in tqdm(chosen, desc="sample", unit="recording")
        ]
        estimate = {"recordings": [entry.recording_id for _, _, _, entry in chosen]}
        estimate |= _estimate(built, plan.options, log_bytes, todo_bytes, num_processes)
    return {
        "output": str(output),
        "tasks": {"total": len(plan.tasks), "finished": len(finished)},
        "recordings": len(entries),
        "players": len({entry.player_id for *_, entry in entries}),
        "sessions": len({entry.session_id for *_, entry in entries}),
        "splits": splits,
        "split": split_facts(plan.split, splits, "recordings"),
        "bytes": {"videos": sum(member_bytes(task, entry.video) for task, _, _, entry in entries), "logs": log_bytes},
        "rejected": dict(Counter(rejection.kind for rejection in report.rejected).most_common()),
        "skipped_recordings": report.skipped_recordings,
        "other_files": report.other_files,
        "estimate": estimate,
        "free_bytes": shutil.disk_usage(output).free,
    }


def _spread(count: int, sample: int) -> list[int]:
    """Places of `sample` of `count` things, evenly spread."""
    sample = min(sample, count)
    return [(2 * place + 1) * count // (2 * sample) for place in range(sample)]


def _build_sample(task: Task, shard: Shard, entry: RecordingEntry) -> _SampleReport:
    report, begin = BuildReport(), time.perf_counter()
    alone = replace(shard, entries=[entry])
    clip_bytes = sum(
        len(row["video"]["bytes"]) + row["actions"].nbytes + row["states"].nbytes
        for row in iter_clips(read_pairs(alone), task.options, report)
    )
    ticks = sum(recording.ticks for recording in report.per_recording)
    seconds = time.perf_counter() - begin
    return _SampleReport(member_bytes(task, entry.log), report.clips, ticks, clip_bytes, seconds)


def _estimate(
    sample: Sequence[_SampleReport], options: BuildOptions, log_bytes: int, todo_bytes: int, num_processes: int
) -> dict:
    """Totals in proportion to the bytes of logs (a line a tick, each about as long), with relative standard errors.

    Ratio estimator and its standard error: Cochran, Sampling Techniques, section 2.11.
    """

    def ratio(value_of: Callable[[_SampleReport], float]) -> tuple[float, float | None]:
        sampled, count = max(sum(part.log_bytes for part in sample), 1), len(sample)
        rate = sum(map(value_of, sample)) / sampled
        if count < 2 or not rate:
            return rate, None
        spread = sum((value_of(part) - rate * part.log_bytes) ** 2 for part in sample)
        return rate, (count / (count - 1) * spread) ** 0.5 / sampled / rate

    clips, clips_error = ratio(lambda part: part.clips)
    ticks, _ = ratio(lambda part: part.ticks)
    size, size_error = ratio(lambda part: part.clip_bytes)
    seconds, seconds_error = ratio(lambda part: part.seconds)
    return {
        "rejected_in_sample": sum(part.ticks == 0 for part in sample),
        "clips": round(clips * log_bytes),
        "hours_of_play": ticks * log_bytes / options.clip.native_fps / 3600,
        "output_bytes": round(size * log_bytes),
        "bytes_to_write": round(size * todo_bytes),
        "processor_hours_to_do": seconds * todo_bytes / 3600,
        "hours_to_do": seconds * todo_bytes / 3600 / num_processes,
        "processes": num_processes,
        "relative_standard_error": {"clips": clips_error, "output_bytes": size_error, "hours_to_do": seconds_error},
    }
