"""Show clips of a built data set with their actions, on one page (docs/data.md, "Looking at clips").

    python dataset_scripts/preview_clips.py --dataset DIR_OR_REPO [--shards "SHARDS/*.tar"] --output DIR

Writes DIR/clips.html (all in one file, works offline), one PNG a clip, DIR/clips.json and DIR/index.html, which leads
to it, to report_dataset.py's page in the same folder, and to labels. By default clips are chosen
from all splits for what happens in them (largest turns, GUIs, clicks, nothing at all ...), spread over sessions; the
page says of each why. With --shards, the raw recordings the data set was built from, the mouse path and the keys are
drawn tick by tick, and the actions are compared with the raw log: exit status 1 if any clip differs. With --labels too,
a folder of label_videos.py, DIR/labels.html has what was told of the same recordings beside what was logged.
"""

import argparse
import difflib
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vjepa_ac_hf.console import Parser, folder_or_repo


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add(
        "--dataset",
        required=True,
        type=folder_or_repo,
        metavar="DIR_OR_REPO",
        help="folder or Hub repository of a built data set",
    )
    add("--output", type=Path, required=True, help="folder of the page")
    add("--split", help="take clips of this split only")
    add("--num_clips", type=int, default=12, help="default: %(default)s")
    add("--seed", type=int, default=0, help="of the choice (default: %(default)s)")
    add("--recording", metavar="NAME", help="take clips of this recording only")
    add("--start_tick", type=int, metavar="T", help="the one clip of --recording that starts at this tick")
    add("--shards", nargs="+", metavar="GLOB", help="the raw recordings: .tar shards or folders, for ticks and checks")
    add("--labels", type=Path, metavar="DIR", help="logs that label_videos.py told of these recordings; needs --shards")
    add("--max_files", type=int, help="look for clips in this many Parquet files, drawn by --seed (default: all)")
    arguments = parser.parse_args()
    if arguments.start_tick is not None and arguments.recording is None:
        parser.error(f"--start_tick {arguments.start_tick} needs --recording: every recording has such a tick")
    if arguments.labels is not None and not arguments.shards:
        parser.error(f"--labels {arguments.labels} needs --shards: the logs that they are compared with")
    for name in ("num_clips", "max_files"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, found {value}")
    return arguments


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

import numpy as np
from tqdm import tqdm

from vjepa_ac_hf.inspection.columns import ClipFiles, RowPlace, action_array
from vjepa_ac_hf.inspection.events import Candidate, Choice, ClipChooser
from vjepa_ac_hf.inspection.labels import LabelledRecording, read_confidence, write_labels
from vjepa_ac_hf.inspection.preview import PreviewClip, compare_with_log, cut_log, write_preview
from vjepa_ac_hf.loading.clips import COLUMNS, clip_name, decode_clip
from vjepa_ac_hf.recordings.clips import ClipSpec
from vjepa_ac_hf.recordings.log import Recording, parse_recording
from vjepa_ac_hf.recordings.shards import Rejection, Shard, find_files, list_shards, read_pairs

SCANNED = ("actions", "recording_id", "session_id", "start_tick")


# ------------------------------------------------------------------------------------------------------ choice


def choose_clips(clips: ClipFiles, arguments: argparse.Namespace) -> tuple[list[Choice], int]:
    """The clips to show, and how many were looked at."""
    files = [(split, file) for split, names in clips.files.items() for file in names]
    if arguments.max_files is not None and arguments.max_files < len(files):
        files = sorted(random.Random(arguments.seed).sample(files, arguments.max_files))
    chooser = ClipChooser(arguments.num_clips, arguments.seed)
    recordings: set[str] = set()
    ticks: dict[int, Candidate] = {}
    for split, file in tqdm(files, desc="looking for clips", unit="file"):
        for first, batch in clips.iter_file(split, file, SCANNED):
            names, sessions, starts = (batch.column(name).to_pylist() for name in SCANNED[1:])
            kept = range(len(names))
            if arguments.recording is not None:
                recordings.update(names)
                kept = [index for index in kept if names[index] == arguments.recording]
            if not kept:
                continue
            places = [RowPlace(split, file, first + index) for index in kept]
            ticks.update(
                (starts[index], Candidate(0, names[index], starts[index], sessions[index], place))
                for index, place in zip(kept, places, strict=True)
                if arguments.recording is not None
            )
            actions = action_array(batch, f"{file}, row {first} and after")[list(kept)]
            chooser.update(*(actions, *([part[i] for i in kept] for part in (names, sessions, starts)), places))
    where = f"{arguments.dataset}, {f'split {arguments.split}' if arguments.split else 'all splits'}"
    if arguments.recording is not None and not ticks:
        near = (
            difflib.get_close_matches(arguments.recording, sorted(recordings), n=3, cutoff=0.3)
            or sorted(recordings)[:3]
        )
        raise ValueError(
            f"{where}: no clip of recording {arguments.recording!r}; of {len(recordings)} recordings the nearest are "
            f"{near}"
        )
    if not chooser.num_seen:
        raise ValueError(f"{where}: holds no clips, 0 rows in {len(files)} files")
    if arguments.start_tick is not None:
        if arguments.start_tick not in ticks:
            near = sorted(ticks, key=lambda tick: (abs(tick - arguments.start_tick), tick))[:5]
            raise ValueError(
                f"{where}: recording {arguments.recording!r} has no clip that starts at tick "
                f"{arguments.start_tick}; of {len(ticks)} clips the nearest start at {sorted(near)}"
            )
        return [Choice(ticks[arguments.start_tick], ["asked for by recording and tick"])], chooser.num_seen
    chosen = chooser.choose()
    if arguments.recording is not None:
        chosen.sort(key=lambda choice: choice.candidate.start_tick)
    return chosen, chooser.num_seen


# ------------------------------------------------------------------------------------------------------- clips


def clip_spec(report: dict[str, Any] | None, steps: int) -> ClipSpec:
    """The data set's arithmetic of ticks; data sets that did not record it have the defaults."""
    if report is not None and report.get("options"):
        return ClipSpec(**report["options"]["clip"])
    default = ClipSpec()
    return ClipSpec(frames_per_clip=steps * default.tubelet_size)


def read_recordings(files: Sequence[str], names: set[str], options: dict[str, Any]) -> dict[str, Recording]:
    """The raw logs of recordings, by name, read with the options of the build.

    Raises:
        ValueError: a recording that no shard has or that cannot be read.
    """
    recordings: dict[str, Recording] = {}
    shards = list_shards(files)
    wanted = [Shard(s.name, s.source, [e for e in s.entries if e.recording_id in names]) for s in shards]
    for shard in tqdm([shard for shard in wanted if shard.entries], desc="raw logs", unit="shard"):
        for pair in read_pairs(shard):
            if isinstance(pair, Rejection):
                raise ValueError(f"{pair.shard}: {pair.recording}: {pair.reason}")
            name = pair.entry.recording_id
            recordings[name] = parse_recording(
                pair.log,
                f"{name}.jsonl",
                recorder_version=pair.entry.recorder_version,
                skip_repairs=options.get("skip_repairs", ()),
                # Data sets built before there was a choice have the key where OpenAI's loader puts it.
                hotbar_injection=options.get("hotbar_injection", "vpt" if options else "cause"),
            )
    missing = sorted(names - recordings.keys())
    if missing:
        count = sum(len(shard.entries) for shard in shards)
        raise ValueError(f"--shards: {len(missing)} of {len(names)} recordings are not among {count} there: {missing}")
    return recordings


def read_labels(folder: Path, recordings: dict[str, Recording], spec: ClipSpec) -> list[LabelledRecording]:
    """What was told of the recordings that are shown, as far as it lies in the folder.

    Raises:
        ValueError: nothing is there of any of them, or a log that is not one of label_videos.py.
    """
    found = []
    for name, logged in sorted(recordings.items()):
        path = folder / f"{name}.jsonl"
        if path.is_file():
            log = path.read_bytes()
            confidence, told = read_confidence(log, str(path)), parse_recording(log, path.name)
            found.append(LabelledRecording(name, logged, told, confidence, spec.native_fps, spec.ticks_per_tubelet))
    if not found:
        raise ValueError(
            f"--labels {folder}: holds none of the logs {[f'{name}.jsonl' for name in sorted(recordings)]} "
            f"(label_videos.py --output {folder})"
        )
    return found


def load_clip(
    clips: ClipFiles, choice: Choice, report: dict[str, Any] | None, recording: Recording | None
) -> PreviewClip:
    candidate = choice.candidate
    row = clips.read_row(candidate.place, COLUMNS)
    name = f"{clips.name}, {clip_name(row)}"
    actions, states = (np.array(row[column], dtype=np.float32) for column in ("actions", "states"))
    spec = clip_spec(report, len(states))
    start = candidate.start_tick
    try:
        return PreviewClip(
            recording_id=candidate.recording_id,
            session_id=candidate.session_id,
            split=candidate.place.split,
            start_tick=start,
            spec=spec,
            frames=decode_clip(row["video"], name, spec.frames_per_clip),
            actions=actions,
            states=states,
            reasons=choice.reasons,
            log=None if recording is None else cut_log(recording, start, spec),
            differences=[] if recording is None else compare_with_log(actions, recording, start, spec),
        )
    except ValueError as error:
        raise ValueError(f"{clips.name}: {error}") from error


def show_clips(arguments: argparse.Namespace) -> int:
    clips = ClipFiles(arguments.dataset, None if arguments.split is None else [arguments.split])
    raw_files = find_files(arguments.shards, arguments.output) if arguments.shards else []
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = clips.read_json("report.json")
    choices, num_seen = choose_clips(clips, arguments)
    recordings: dict[str, Recording] = {}
    if raw_files:
        names = {choice.candidate.recording_id for choice in choices}
        recordings = read_recordings(raw_files, names, (report or {}).get("options") or {})
    shown = [
        load_clip(clips, choice, report, recordings.get(choice.candidate.recording_id))
        for choice in tqdm(choices, desc="reading", unit="clip")
    ]
    facts = {
        "dataset": arguments.dataset,
        "split": arguments.split or "all",
        "clips looked at": num_seen,
        "seed": arguments.seed,
        "shards": " ".join(arguments.shards) if arguments.shards else None,
        "clip options": "as recorded in report.json" if (report or {}).get("options") else "not recorded: the defaults",
    }
    if arguments.labels is not None:
        labels = read_labels(arguments.labels, recordings, shown[0].spec)
        print(
            f"{len(labels)} of {len(recordings)} recordings with labels: "
            f"{write_labels(arguments.output, arguments.dataset, labels)}"
        )
    write_preview(arguments.output, facts, shown)
    print(f"{len(shown)} of {num_seen} clips: {arguments.output / 'index.html'}")
    different = [clip for clip in shown if clip.differences]
    for clip in different:
        print(
            f"error: {clip.recording_id}, tick {clip.start_tick}: actions differ from the raw log in "
            f"{', '.join(clip.differences)}",
            file=sys.stderr,
        )
    return 1 if different else 0


def main() -> int:
    return show_clips(parse_arguments())


if __name__ == "__main__":
    sys.exit(main())
