"""Label videos: logs from the actions that an inverse dynamics head tells (docs/applications.md, "Labelling").

    python examples/label_videos.py --model HEAD --videos "plays/**/*.mp4" [--output DIR] [--min_confidence 0.6]

For every NAME.mp4 (20 frames a second, any size) NAME.jsonl appears beside it, or in --output: a VPT log, from which
the builder cuts clips as from any other. NAME.confidence.parquet has a row an action. What is below --min_confidence,
and the end of the video, is marked unsure, and the builder makes no clips of it. Complete labels are skipped, and a
run that was killed goes on in the middle of its video. The report, label_report.json in --output or else in the folder
that all videos are below, lists what was done, skipped and failed. Exit status 0 only when no video has failed.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from vjepa_ac_hf.console import Parser, folder_or_repo


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--model", required=True, type=folder_or_repo, help="trained inverse dynamics head: folder or Hub repository"
    )
    parser.add_argument("--videos", nargs="+", required=True, help="files, folders (with those below), patterns")
    parser.add_argument("--output", type=Path, help="folder for labels and report (default: beside each video)")
    parser.add_argument(
        "--report", type=Path, help="JSON file (default: label_report.json in --output, or above all videos)"
    )
    parser.add_argument(
        "--min_confidence", type=float, default=0.0, help="mark ticks unsure below this, 0 to 1 (default 0: none)"
    )
    parser.add_argument(
        "--confidence_columns",
        nargs="+",
        metavar="COLUMN",
        help="whose confidences count: keys, buttons, gui_open, hotbar (default: all)",
    )
    parser.add_argument(
        "--keys",
        choices=("likelier", "balanced"),
        default="likelier",
        help="pressed where likelier than not, or (balanced) than the key's own rate (default likelier)",
    )
    parser.add_argument("--native_fps", type=float, help="frames a second of the videos (default: of those trained on)")
    parser.add_argument("--batch_size", type=int, default=8, help="clips at once (default 8)")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        parser.error(f"--batch_size must be at least 1, found {arguments.batch_size}")
    return arguments


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

import torch
from tqdm.auto import tqdm

from vjepa_ac_hf.labelling import (
    LabelError,
    LabelFiles,
    Labeller,
    find_videos,
    label_files,
    label_video,
)
from vjepa_ac_hf.labelling.files import SettingsError
from vjepa_ac_hf.recordings.video import VideoError
from vjepa_ac_hf.records import command_line, versions, write_json


def refuse_other_settings(files: list[LabelFiles], settings: dict[str, Any]) -> None:
    """Before any video is labelled: no folder gets labels of two kinds."""
    for file in files:
        try:
            file.complete(settings)
        except SettingsError:
            raise
        except LabelError:
            continue  # of this video alone, and reported with it


def label_one(labeller: Labeller, file: LabelFiles, batch_size: int) -> dict[str, Any]:
    """A video's entry in the report."""
    entry = {"video": str(file.video), "labels": str(file.log)}
    with tqdm(unit="action", desc=file.name, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            return entry | label_video(labeller, file, batch_size=batch_size, progress=progress)
        except (VideoError, LabelError) as error:
            tqdm.write(f"failed: {error}", file=sys.stderr)
            return entry | {"status": "failed", "reason": str(error)}


def report(arguments: argparse.Namespace, labeller: Labeller, entries: list[dict[str, Any]]) -> dict[str, Any]:
    counts = {status: sum(e["status"] == status for e in entries) for status in ("done", "skipped", "failed")}
    ticks, unsure = (sum(e.get(k, 0) for e in entries) for k in ("ticks", "unsure_ticks"))
    return {
        **counts,
        "ticks": ticks,
        "unsure_ticks": unsure,
        "unsure_share": unsure / ticks if ticks else None,
        "with_confidence": labeller.columns,
        "without_confidence": labeller.model.config.continuous_columns,
        "model": labeller.name,
        "settings": labeller.settings,
        "videos": entries,
        "command": command_line(),
        "versions": versions(),
    }


def main() -> int:
    arguments = parse_arguments()
    entries: list[dict[str, Any]] = []
    files = label_files(find_videos(arguments.videos), arguments.output)
    labeller = Labeller.from_pretrained(
        arguments.model,
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=arguments.dtype,
        native_fps=arguments.native_fps,
        min_confidence=arguments.min_confidence,
        confidence_columns=arguments.confidence_columns,
        keys=arguments.keys,
    )
    refuse_other_settings(files, labeller.settings)
    if arguments.report is None:
        above = os.path.commonpath([file.video.resolve().parent for file in files])
        arguments.report = (arguments.output or Path(above)) / "label_report.json"
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    try:
        for file in tqdm(files, unit="video"):
            entries.append(label_one(labeller, file, arguments.batch_size))
    finally:
        found = report(arguments, labeller, entries)
        write_json(arguments.report, found)
    share = "" if found["unsure_share"] is None else f", {found['unsure_share']:.1%} of the ticks unsure"
    print(f"{found['done']} done, {found['skipped']} skipped, {found['failed']} failed{share}; {arguments.report}")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
