"""Build a Parquet data set of clips from VPT recordings (docs/data.md, "Building a data set").

    python dataset_scripts/build_vpt_tubelets.py --shards "SHARDS/*.tar" --output DIR [--num_proc N]

Writes DIR/data/{train,validation}-*.parquet (one file per shard and split), DIR/action_stats.json, DIR/report.json and
the card DIR/README.md; `load_dataset("DIR")` then needs none of this package's code. A run that was stopped goes on
where it was: finished shards have a marker in DIR/.build. Exit status 0 only if at least one clip was built.
"""

import argparse
import glob
import hashlib
import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
from datasets.arrow_writer import ParquetWriter
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from tqdm import tqdm

from vjepa_ac_hf import ActionStatistics
from vjepa_ac_hf.data.building import BuildReport, clip_features, iter_clips, listing_report
from vjepa_ac_hf.data.clips import ClipSpec
from vjepa_ac_hf.data.recording import REPAIRS, recording_id_of
from vjepa_ac_hf.data.selection import BuildOptions, options_from, select_recordings, selection_from
from vjepa_ac_hf.data.shards import LOG_SUFFIX, TAR_SUFFIXES, VIDEO_SUFFIX, Shard, list_shards, read_pairs
from vjepa_ac_hf.data.splits import validation_set
from vjepa_ac_hf.data.vpt_tubelets import code_hash, split_shards
from vjepa_ac_hf.processing_vjepa2_ac import RESIZE_MODES
from vjepa_ac_hf.records import write_file, write_json

# Loose recordings of a folder are built in groups of this many, each like a shard.
_RECORDINGS_PER_TASK = 32


@dataclass(frozen=True)
class Task:
    """What one process builds: shards of each split, into one Parquet file per split."""

    index: int
    num_tasks: int
    name: str
    shards: dict[str, list[Shard]]
    options: BuildOptions

    @property
    def key(self) -> str:
        """Changes with everything that the result depends on: code, options, place, members with sizes, splits."""
        content = json.dumps([code_hash(), asdict(self)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def marker_name(self) -> str:
        return f"task-{self.index:05d}-of-{self.num_tasks:05d}.json"

    def file_name(self, split: str) -> str:
        return f"{split}-{self.index:05d}-of-{self.num_tasks:05d}.parquet"


# ---------------------------------------------------------------------------------------------------- arguments


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shards", nargs="+", required=True, help="globs of .tar shards, or folders with recordings or shards")
    add("--output", type=Path, required=True, help="folder of the data set")
    add("--num_proc", type=int, default=1, help="processes, one shard each at a time (default: %(default)s)")
    add("--executor", choices=["local"], default="local", help="where the processes run")
    add("--push_to_hub", metavar="ORG/NAME", help="upload the finished data set to this repository")
    clip, build = ClipSpec(), BuildOptions()
    add("--native_fps", type=float, default=clip.native_fps, help="default: %(default)s")
    add("--fps", type=float, default=clip.fps, help="frames per second of clips (default: %(default)s)")
    add("--frames_per_clip", type=int, default=clip.frames_per_clip, help="default: %(default)s")
    add("--tubelet_size", type=int, default=clip.tubelet_size, help="frames (default: %(default)s)")
    add("--clip_stride", type=int, help="ticks between clip starts (default: no frame in two clips)")
    add("--resolution", type=int, default=build.resolution, help="pixels (default: %(default)s)")
    add("--resize_mode", choices=RESIZE_MODES, default=build.resize_mode, help="default: %(default)s")
    add("--draw_cursor", action="store_true", help="paint the cursor into frames with a GUI open")
    add("--skip_repairs", nargs="+", default=[], metavar="NAME", help=f"not to be done, of: {', '.join(REPAIRS)}")
    add("--exclude", type=Path, metavar="FILE", help="recording ids to leave out, one a line (# begins a comment)")
    add("--session_fraction", type=float, help="share of sessions to keep, by a stable hash")
    add("--max_clips_per_session", type=int, help="clips of one session to keep at most")
    add("--max_gui_fraction", type=float, help="leave out clips with a GUI open for a larger share of ticks")
    add("--min_action_fraction", type=float, help="leave out clips with input in a smaller share of ticks")
    add("--clip_fraction", type=float, help="share of clips to keep, by a stable hash")
    add("--validation_fraction", type=float, help="share of sessions (default: 0.05 where no split is empty)")
    add("--validation_sessions", nargs="+", metavar="SESSION", help="their names, instead of a share")
    arguments = parser.parse_args()
    if arguments.num_proc < 1:
        parser.error(f"--num_proc must be at least 1, found {arguments.num_proc}")
    return arguments


def read_exclude(file: Path | None) -> list[str]:
    """Recording ids of a list, one a line; what follows a # is a comment."""
    if file is None:
        return []
    lines = (line.split("#")[0].strip() for line in file.read_text().splitlines())
    return [recording_id_of(line) for line in lines if line]


def find_files(patterns: list[str]) -> list[str]:
    """Files of globs and folders, sorted within each, each once.

    Raises:
        ValueError: a pattern that matches no recording or shard.
    """
    files: dict[str, None] = {}
    for pattern in patterns:
        found: list[str] = []
        for path in sorted(glob.glob(pattern, recursive=True)):
            inside = sorted(map(str, Path(path).rglob("*"))) if os.path.isdir(path) else [path]
            found += [file for file in inside if file.endswith((*TAR_SUFFIXES, VIDEO_SUFFIX, LOG_SUFFIX))]
        if not found:
            raise ValueError(f"--shards {pattern}: no .tar, .mp4 or .jsonl file found")
        files.update(dict.fromkeys(found))
    return list(files)


# ---------------------------------------------------------------------------------------------------- building


def plan_tasks(shards: list[Shard], validation: set[str], options: BuildOptions) -> list[Task]:
    """One task per tar; loose recordings in groups."""
    groups: list[list[Shard]] = []
    loose: list[Shard] = []
    for shard in shards:
        if not shard.entries:
            continue
        if shard.source.endswith(TAR_SUFFIXES):
            groups.append([shard])
        else:
            loose.append(shard)
    groups += [loose[start : start + _RECORDINGS_PER_TASK] for start in range(0, len(loose), _RECORDINGS_PER_TASK)]
    return [
        Task(index, len(groups), group[0].name, split_shards(group, validation), options)
        for index, group in enumerate(groups)
    ]


def build_task(task: Task, output: Path) -> dict:
    """Build one task's Parquet files and, last, its marker; returns the marker."""
    report, statistics = BuildReport(), ActionStatistics()
    splits: dict[str, dict] = {}
    for split, shards in task.shards.items():
        temporary = output / ".build" / (task.file_name(split) + ".tmp")
        part = BuildReport()
        with ParquetWriter(features=clip_features(task.options.clip), path=str(temporary)) as writer:
            features = clip_features(task.options.clip)
            for shard in shards:
                for row in iter_clips(read_pairs(shard), task.options, part, split):
                    writer.write(features.encode_example(row))
                    if split == "train":
                        statistics.update(row["actions"])
            writer.finalize()
        if part.clips:
            os.replace(temporary, output / "data" / task.file_name(split))
        else:
            temporary.unlink()
        sessions = sorted({entry.session_id for shard in shards for entry in shard.entries})
        splits[split] = {"clips": part.clips, "recordings": part.accepted, "sessions": sessions}
        report.merge(part)
    marker = {
        "key": task.key,
        "splits": splits,
        "report": report.to_dict(),
        "statistics": statistics.to_dict() if statistics.count else None,
    }
    write_json(output / ".build" / task.marker_name, marker)
    return marker


def read_marker(task: Task, output: Path) -> dict | None:
    """The marker of a finished task, unless anything the result depends on has changed or a file is gone."""
    marker_file = output / ".build" / task.marker_name
    if not marker_file.exists():
        return None
    marker = json.loads(marker_file.read_text())
    files = [output / "data" / task.file_name(split) for split, part in marker["splits"].items() if part["clips"]]
    return marker if marker["key"] == task.key and all(file.exists() for file in files) else None


def run_tasks(tasks: list[Task], output: Path, num_proc: int) -> tuple[list[dict], int]:
    """Markers of all tasks in their order, built in `num_proc` processes, and how many were finished before."""
    markers = {task.index: marker for task in tasks if (marker := read_marker(task, output)) is not None}
    num_finished = len(markers)
    waiting = [task for task in tasks if task.index not in markers]
    with tqdm(total=len(tasks), initial=num_finished, desc="shards", unit="shard") as progress:
        for index, marker in build_tasks(waiting, output, num_proc):
            markers[index] = marker
            progress.update()
            progress.set_postfix(clips=sum(marker["report"]["clips"] for marker in markers.values()))
    return [markers[index] for index in sorted(markers)], num_finished


def build_tasks(tasks: list[Task], output: Path, num_proc: int) -> Iterator[tuple[int, dict]]:
    """Index and marker of each task as it is finished, in this process or in several."""
    if min(num_proc, len(tasks)) < 2:
        for task in tasks:
            yield task.index, build_task(task, output)
        return
    # Not fork: torch's threads do not survive it. One thread each: there is a process for every core asked for.
    executor = ProcessPoolExecutor(
        min(num_proc, len(tasks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    try:
        futures = {executor.submit(build_task, task, output): task.index for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        # After an error or an interrupt: what has not begun need not.
        executor.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------- results


def merge_splits(markers: list[dict]) -> dict[str, dict]:
    """Clips, recordings and sessions of each split that has clips, train first."""
    merged: dict[str, dict] = {}
    for split in ("train", "validation"):
        parts = [marker["splits"][split] for marker in markers if split in marker["splits"]]
        clips = sum(part["clips"] for part in parts)
        if clips:
            sessions = sorted({session for part in parts for session in part["sessions"]})
            recordings = sum(part["recordings"] for part in parts)
            merged[split] = {"clips": clips, "recordings": recordings, "sessions": sessions}
    return merged


def write_card(output: Path, splits: dict[str, dict], report: BuildReport, options: BuildOptions) -> None:
    """DIR/README.md: what `load_dataset` needs to know, and what a reader does."""
    info = datasets.DatasetInfo(
        features=clip_features(options.clip),
        splits=datasets.SplitDict(
            {split: datasets.SplitInfo(split, num_examples=part["clips"]) for split, part in splits.items()}
        ),
    )
    data = DatasetCardData(tags=["world-model", "action-conditioned", "video", "vpt"])
    datasets.info.DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    data["configs"] = [{"config_name": "default", "data_files": files}]
    card = DatasetCard(f"---\n{data}\n---\n\n{card_text(splits, report, options)}")
    write_file(output / "README.md", str(card).encode())


def card_text(splits: dict[str, dict], report: BuildReport, options: BuildOptions) -> str:
    clip = options.clip
    split_rows = "\n".join(
        f"| {split} | {len(part['sessions'])} | {part['recordings']} | {part['clips']} |"
        for split, part in splits.items()
    )
    kinds: dict[str, int] = {}
    for rejection in report.rejected:
        kinds[rejection.kind] = kinds.get(rejection.kind, 0) + 1
    rejected = "\n".join(f"- {count} x {kind}" for kind, count in sorted(kinds.items())) or "- none"
    repairs = "\n".join(f"- `{name}`: {count}" for name, count in report.repairs.items())
    left_out = [(count, option, "clips") for option, count in report.skipped_clips.items()]
    left_out += [(count, option, "recordings") for option, count in report.skipped_recordings.items()]
    skipped = "\n".join(f"- {count} {what} by `{option}`" for count, option, what in left_out if count) or "- none"
    crop = "centre crop of the shortest edge" if options.resize_mode == "crop" else "whole frame, squashed"
    return f"""# VPT tubelets

Clips of first-person play with keyboard and mouse, cut from recordings in the layout of OpenAI's VPT contractor data
(arXiv 2206.11795): {clip.frames_per_clip} frames at {clip.fps:g} FPS in {clip.num_tubelets} tubelets of \
{clip.tubelet_size} frames. Load with `load_dataset`; no other code is needed.

| split | sessions | recordings | clips |
|---|---|---|---|
{split_rows}

Splits are by session: no session is in both.

## Columns

- `video`: {clip.frames_per_clip} frames, {options.resolution}x{options.resolution}, H.264 ({crop}).
- `actions`: float32 ({clip.num_tubelets - 1}, 38), raw units. Row k covers every tick of the log from the start of
  tubelet k to that of tubelet k + 1: mouse movement summed (pixels), yaw and pitch change (degrees, yaw circular),
  keys and buttons pressed in any tick, hotbar slot (one-hot) and open GUI at the first tick.
- `states`: float32 ({clip.num_tubelets}, 2), yaw and pitch in degrees at the start of every tubelet, as logged.
- `recording_id`, `session_id`, `start_tick`: where the clip comes from.

`action_stats.json` has mean and standard deviation of the continuous action columns on the train split.

## Recordings

{report.accepted} of {report.recordings} recordings were used. Rejected, by reason (`report.json` has names):

{rejected}

Ticks repaired in the log, by repair:

{repairs}

Clips and recordings left out by options:

{skipped}
"""


def remove_stale(output: Path, tasks: list[Task], splits_of: list[dict]) -> None:
    """Parquet files and markers of earlier runs with other shards or options would be loaded as well: remove them."""
    current = {
        task.file_name(split)
        for task, marker in zip(tasks, splits_of, strict=True)
        for split, part in marker["splits"].items()
        if part["clips"]
    }
    for file in (output / "data").glob("*.parquet"):
        if file.name not in current:
            file.unlink()
    for file in (output / ".build").glob("*"):
        if not file.name.endswith(f"-of-{len(tasks):05d}.json"):
            file.unlink()


def push(output: Path, repo_id: str) -> None:
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", exist_ok=True)
    api.upload_folder(
        repo_id=repo_id,
        folder_path=output,
        repo_type="dataset",
        ignore_patterns=[".build/*", ".*.tmp"],
        delete_patterns="data/*.parquet",
        commit_message="Build of VPT tubelets",
    )


# ---------------------------------------------------------------------------------------------------- main


def build(arguments: argparse.Namespace) -> int:
    options, output = options_from(vars(arguments)), arguments.output
    selection = selection_from({**vars(arguments), "exclude": read_exclude(arguments.exclude)})
    shards = list_shards(find_files(arguments.shards))
    report = listing_report(shards)
    shards, skipped = select_recordings(shards, selection)
    report.skip(skipped)
    sessions = [entry.session_id for shard in shards for entry in shard.entries]
    validation = validation_set(sessions, arguments.validation_fraction, arguments.validation_sessions)
    tasks = plan_tasks(shards, validation, options)
    if not tasks:
        raise ValueError(f"no recording to build: {report.summary()}")

    for folder in (output / "data", output / ".build"):
        folder.mkdir(parents=True, exist_ok=True)
    markers, num_finished = run_tasks(tasks, output, arguments.num_proc)
    for marker in markers:
        report.merge(BuildReport.from_dict(marker["report"]))
    splits = merge_splits(markers)
    remove_stale(output, tasks, markers)
    write_json(
        output / "report.json",
        {**report.to_dict(), "splits": splits, "options": {**asdict(options), **asdict(selection)}},
    )
    if "train" not in splits:
        raise ValueError(f"the train split has no clip: {report.summary()}")
    asked = arguments.validation_sessions is not None or bool(arguments.validation_fraction)
    if asked and "validation" not in splits:
        raise ValueError(f"the validation split that was asked for has no clip: {report.summary()}")

    statistics = ActionStatistics()
    for marker in markers:
        if marker["statistics"] is not None:
            statistics.merge(ActionStatistics.from_dict(marker["statistics"]))
    write_json(output / "action_stats.json", statistics.to_dict())
    write_card(output, splits, report, options)
    print(f"{report.summary()}; {num_finished} of {len(tasks)} shards were finished before; {output}")
    if arguments.push_to_hub:
        push(output, arguments.push_to_hub)
        print(f"pushed to {arguments.push_to_hub}")
    return 0


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    arguments = parse_arguments()
    try:
        return build(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
