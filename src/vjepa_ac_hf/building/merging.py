"""From finished tasks to a data set: statistics, report, card (docs/data.md, "Building a data set")."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import datasets
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData, HfApi

from ..actions_vjepa2_ac import ActionStatistics
from ..configuration_encoder_vjepa2_ac import frame_shape
from ..inspection.summary import ActionHistograms, summary_markdown
from ..recordings.splits import split_facts
from ..records import write_file, write_json
from .rows import BuildReport, clip_features
from .selection import BuildOptions
from .tasks import BUILD_FOLDER, BuildError, Plan, check_plan, read_marker, temporary_files

# A message with a thousand names is not read.
_NAMES_SHOWN = 10


def merge(plan: Plan, output: Path) -> BuildReport:
    """Make a data set of a build whose tasks are all finished; may be repeated, and stopped anywhere.

    Writes `report.json`, `action_stats.json` and, last, the card README.md; removes Parquet files and markers of other
    plans and what stopped processes have left.

    Raises:
        BuildError: tasks are missing (with their names and number), the folder is built by another plan by now, or a
            split that was asked for has no clip.
    """
    markers = [read_marker(task, output) for task in plan.tasks]
    check_finished([task.name for task, marker in zip(plan.tasks, markers, strict=True) if marker is None], plan)
    check_plan(output, plan.key)
    finished = [marker for marker in markers if marker is not None]
    report = BuildReport.from_dict(plan.listing)
    statistics, histograms = ActionStatistics(), ActionHistograms()
    for marker in finished:
        report.merge(BuildReport.from_dict(marker["report"]))
        histograms.merge(ActionHistograms.from_dict(marker["histograms"]))
        if marker["statistics"] is not None:
            statistics.merge(ActionStatistics.from_dict(marker["statistics"]))
    splits = merge_splits(finished)
    remove_stale(plan, finished, output)
    options = {**asdict(plan.options), **asdict(plan.selection)}
    counts = {
        split: {name: value if isinstance(value, int) else len(value) for name, value in part.items()}
        for split, part in splits.items()
    }
    written = {
        **{**report.to_dict(), "splits": splits, "split": split_facts(plan.split, counts)},
        **{"options": options, "actions": histograms.to_dict()},
    }
    write_json(output / "report.json", written)
    if "train" not in splits:
        raise BuildError(f"the train split has no clip: {report.summary()}")
    if plan.split.asks_for_validation and "validation" not in splits:
        raise BuildError(f"the validation split that was asked for has no clip: {report.summary()}")
    write_json(output / "action_stats.json", statistics.to_dict())
    write_card(output, written, plan.options)
    return report


def check_finished(missing: Sequence[str], plan: Plan, reasons: dict[str, str] | None = None) -> None:
    """Refuse a build with missing tasks.

    Args:
        missing: names of the shards that are not built.
        plan: of the build.
        reasons: why, by name, where that is known.

    Raises:
        BuildError: with number, names and reasons.
    """
    if not missing:
        return
    known = reasons or {}
    names = sorted(missing, key=lambda name: name not in known)[:_NAMES_SHOWN]
    shown = [f"{name} ({known[name]})" if name in known else name for name in names]
    more = f" and {len(missing) - len(shown)} more" if len(missing) > len(shown) else ""
    raise BuildError(
        f"{len(missing)} of {len(plan.tasks)} shards are not built: {', '.join(shown)}{more}; what is finished stays, "
        "the same command goes on with the rest"
    )


def merge_splits(markers: Sequence[dict]) -> dict[str, dict]:
    """Clips, recordings, players, sessions and bytes of each split that has clips, train first."""
    merged: dict[str, dict] = {}
    for split in ("train", "validation"):
        parts = [marker["splits"][split] for marker in markers if split in marker["splits"]]
        clips = sum(part["clips"] for part in parts)
        if clips:
            merged[split] = {
                "clips": clips,
                "recordings": sum(part["recordings"] for part in parts),
                **{name: sorted({unit for part in parts for unit in part[name]}) for name in ("players", "sessions")},
                "bytes": sum(part["bytes"] for part in parts),
            }
    return merged


def remove_stale(plan: Plan, markers: Sequence[dict], output: Path) -> None:
    """Parquet files of earlier runs with other shards or options would be loaded as well: remove them."""
    current = {
        task.file_name(split)
        for task, marker in zip(plan.tasks, markers, strict=True)
        for split, part in marker["splits"].items()
        if part["clips"]
    }
    for file in (output / "data").glob("*.parquet"):
        if file.name not in current:
            file.unlink(missing_ok=True)
    valid = {task.marker_name for task in plan.tasks}
    for file in (output / BUILD_FOLDER).glob("task-*.json"):
        if file.name not in valid:
            file.unlink(missing_ok=True)
    for file in temporary_files(output):
        file.unlink(missing_ok=True)


def write_card(output: Path, report: dict, options: BuildOptions) -> None:
    """DIR/README.md: what `load_dataset` needs to know, and what a reader does, with the numbers of report.json."""
    splits = report["splits"]
    info = datasets.DatasetInfo(
        features=clip_features(options.clip),
        splits=datasets.SplitDict(
            {split: datasets.SplitInfo(split, num_examples=part["clips"]) for split, part in splits.items()}
        ),
    )
    # The recordings' licence is not in them: who publishes a data set has to name it.
    data = DatasetCardData(license="unknown", tags=["world-model", "action-conditioned", "video", "vpt"])
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    data["configs"] = [{"config_name": "default", "data_files": files}]
    card = DatasetCard(f"---\n{data}\n---\n\n{_card_text(report, options)}")
    write_file(output / "README.md", str(card).encode())


def _card_text(report: dict, options: BuildOptions) -> str:
    clip, split_by = options.clip, report["split"]["split_by"]
    height, width = frame_shape(options.resolution)
    crop = "centre crop of the frame scaled to cover it" if options.resize_mode == "crop" else "whole frame, squashed"
    injected = {"cause": "caused", "vpt": "shows (as OpenAI's loader has it)"}[options.hotbar_injection]
    return f"""# VPT tubelets

Clips of first-person play with keyboard and mouse, cut from recordings in the layout of OpenAI's VPT contractor data
(arXiv 2206.11795): {clip.frames_per_clip} frames at {clip.fps:g} FPS in {clip.num_tubelets} tubelets of \
{clip.tubelet_size} frames. Load with `load_dataset`; no other code is needed. Splits are by {split_by}: no {split_by}
is in both.

## Columns

- `video`: {clip.frames_per_clip} frames, {width}x{height}, H.264 ({crop}).
- `actions`: float32 ({clip.num_tubelets - 1}, 38), raw units. Row k covers every tick of the log from the start of
  tubelet k to that of tubelet k + 1: mouse movement summed (pixels), yaw and pitch change (degrees, yaw circular),
  keys and buttons pressed in any tick, hotbar slot (one-hot; all 0 where the log does not tell it) and open GUI at the
  first tick. A change of slot counts as its number key in the tick that {injected} it.
- `states`: float32 ({clip.num_tubelets}, 2), yaw and pitch in degrees at the start of every tubelet, as logged.
- `recording_id`, `session_id` (player and day), `player_id`, `start_tick`: where the clip comes from.

`action_stats.json` has mean and standard deviation of the continuous action columns on the train split, `report.json`
the numbers below and the names of recordings.

## Data

{summary_markdown(report)}
## Limits

What players did and saw: no instructions, no sound, no rewards. Actions are what was pressed, not what came of it.
Within a clip, frames between those at {clip.fps:g} FPS are missing, while actions cover every tick. Recordings that do
not fit their log are left out, and known faults of the recorder are repaired as counted above; the rest is as it was
recorded. Play of few players in one game: a model learns their habits too.

## Licence and citation

A data set has the licence of the recordings that it was built from (OpenAI's contractor data: MIT): put its name in
`license` at the top of this file when you publish it. Cite the source of the recordings, such as

```bibtex
@article{{baker2022vpt,
  title={{Video PreTraining (VPT): Learning to Act by Watching Unlabeled Online Videos}},
  author={{Baker, Bowen and others}},
  journal={{arXiv preprint arXiv:2206.11795}},
  year={{2022}}
}}
```
"""


def push_dataset(output: Path, repo_id: str) -> None:
    """Upload a finished data set to a data-set repository of the Hub, which is made where there is none."""
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", exist_ok=True)
    api.upload_folder(
        repo_id=repo_id,
        folder_path=output,
        repo_type="dataset",
        ignore_patterns=[f"{BUILD_FOLDER}/*", ".*.tmp", "plan.json"],
        delete_patterns="data/*.parquet",
        commit_message="Build of VPT tubelets",
    )
