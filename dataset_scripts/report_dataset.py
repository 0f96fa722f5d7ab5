"""Report what a built data set holds (docs/data.md, "Data-set report").

    python dataset_scripts/report_dataset.py --dataset DIR_OR_REPO --output DIR

Reads report.json and the columns of actions and names of every Parquet file, a piece at a time and no video; writes
DIR/report.html with its figures as PNG, DIR/summary.md and DIR/summary.json: hours, sessions, clips, histograms of
every action column, share of open GUIs, repairs, rejections by reason. Where report.json and the files contradict each
other, the report says so, and so does the exit status: 0 only if they agree.
"""

import argparse
import sys
from dataclasses import dataclass, field
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
    add("--output", type=Path, required=True, help="folder of the report")
    return parser.parse_args()


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

from tqdm import tqdm

from vjepa_ac_hf.inspection.columns import ClipFiles, action_array
from vjepa_ac_hf.inspection.summary import ActionHistograms, dataset_summary, write_dataset_report

COLUMNS = ("actions", "recording_id", "session_id", "player_id")


@dataclass
class SplitContents:
    """What the files of one split hold."""

    clips: int = 0
    recordings: set[str] = field(default_factory=set)
    players: set[str] = field(default_factory=set)
    sessions: set[str] = field(default_factory=set)
    histograms: ActionHistograms = field(default_factory=ActionHistograms)


def read_contents(clips: ClipFiles) -> dict[str, SplitContents]:
    """Contents of every split, from the files themselves."""
    contents: dict[str, SplitContents] = {}
    files = [(split, file) for split, names in clips.files.items() for file in names]
    for split, file in tqdm(files, desc="files", unit="file"):
        part = contents.setdefault(split, SplitContents())
        for first, batch in clips.iter_file(split, file, COLUMNS):
            name = f"{file}, row {first} and after"
            try:
                part.histograms.update(action_array(batch, name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            part.clips += batch.num_rows
            part.recordings.update(batch.column("recording_id").to_pylist())
            part.players.update(batch.column("player_id").to_pylist())
            part.sessions.update(batch.column("session_id").to_pylist())
    return contents


def minimal_report(contents: dict[str, SplitContents]) -> dict[str, Any]:
    """What the files tell where there is no report.json."""
    accepted = sum(len(part.recordings) for part in contents.values())
    return {
        "recordings": accepted,
        "accepted": accepted,
        "clips": sum(part.clips for part in contents.values()),
        "rejected": [],
        "repairs": {},
        "splits": split_entries(contents),
    }


def split_entries(contents: dict[str, SplitContents]) -> dict[str, dict]:
    return {
        split: {
            **{"clips": part.clips, "recordings": len(part.recordings)},
            **{"players": sorted(part.players), "sessions": sorted(part.sessions)},
        }
        for split, part in contents.items()
    }


def find_contradictions(report: dict[str, Any], contents: dict[str, SplitContents]) -> list[str]:
    """Sentences about numbers that report.json and the files give differently, and about players in two splits."""
    found = []
    told = report["splits"]
    for split in sorted(contents.keys() | told.keys()):
        if split not in contents or split not in told:
            found.append(f"Split {split}: only {'the files have' if split in contents else 'report.json has'} it.")
            continue
        part = contents[split]
        if part.clips != told[split]["clips"]:
            found.append(
                f"Split {split}: report.json counts {told[split]['clips']} clips, the files hold {part.clips}."
            )
        # Not the other way round: a player whose recordings were all rejected has no clips.
        for unit in ("players", "sessions"):
            strangers = sorted(getattr(part, unit) - set(told[split].get(unit, ())))
            if strangers:
                found.append(
                    f"Split {split}: {len(strangers)} {unit} of the files are not in report.json; the first is "
                    f"{strangers[0]}."
                )
    histograms = ActionHistograms()
    for part in contents.values():
        histograms.merge(part.histograms)
    if report.get("actions") is not None and ActionHistograms.from_dict(report["actions"]) != histograms:
        found.append("The action histograms of report.json are not those of the files.")
    unit = "sessions" if report.get("split", {}).get("split_by") == "session" else "players"
    names = sorted(contents)
    for index, split in enumerate(names):
        for other in names[index + 1 :]:
            both = sorted(getattr(contents[split], unit) & getattr(contents[other], unit))
            if both:
                found.append(
                    f"{len(both)} {unit} are in both {split} and {other}, which is leakage; the first is {both[0]}."
                )
    return found


def make_report(arguments: argparse.Namespace) -> int:
    clips = ClipFiles(arguments.dataset)
    report = clips.read_json("report.json")
    arguments.output.mkdir(parents=True, exist_ok=True)
    contents = read_contents(clips)
    empty = [split for split, part in contents.items() if not part.clips]
    if empty:
        raise ValueError(f"{arguments.dataset}: split {empty[0]!r} holds no clips: 0 rows in {clips.files[empty[0]]}")
    notes, contradictions = [], []
    if report is None:
        report = minimal_report(contents)
        notes.append("There is no report.json: recordings without clips, rejections and repairs are not known.")
    else:
        contradictions = find_contradictions(report, contents)
    histograms = ActionHistograms()
    for part in contents.values():
        histograms.merge(part.histograms)
    num_bytes = {split: clips.num_bytes(split) for split in contents}
    counted = {**report, "clips": sum(part.clips for part in contents.values()), "splits": split_entries(contents)}
    summary = dataset_summary(counted, histograms, num_bytes=num_bytes)
    page = write_dataset_report(arguments.output, arguments.dataset, summary, [*contradictions, *notes])
    counts = ", ".join(f"{summary[name]} {name}" for name in ("clips", "players", "sessions"))
    print(f"{counts}, {histograms.count} actions; {page}")
    for sentence in contradictions:
        print(f"error: {sentence}", file=sys.stderr)
    return 1 if contradictions else 0


def main() -> int:
    return make_report(parse_arguments())


if __name__ == "__main__":
    sys.exit(main())
