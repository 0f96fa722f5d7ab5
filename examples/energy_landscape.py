"""Energy over two action columns, clip by clip: is it lowest at the action that was taken? (docs/planning.md)

python examples/energy_landscape.py --model out --dataset data/tubelets --output landscapes
"""

import argparse
import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from vjepa_ac_hf.console import Parser, add_clip_rule, folder_or_repo


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", required=True, type=folder_or_repo, help="folder or Hub repository of model and processor"
    )
    parser.add_argument(
        "--dataset", required=True, type=folder_or_repo, help="folder or Hub repository of a tubelet data set"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder for landscapes.json and landscapes.png")
    parser.add_argument("--split", default="validation", help="split of the data set")
    parser.add_argument("--clips", type=int, nargs="+", help="rows of the split (default: --max_clips, evenly spaced)")
    add_clip_rule(parser, "the clips (of --max_clips the rule's first)")
    parser.add_argument("--recordings", nargs="+", help="only clips of these recordings")
    parser.add_argument("--max_clips", type=int, default=64, help="at most this many clips")
    parser.add_argument("--columns", nargs=2, default=["yaw_delta", "pitch_delta"], help="two action columns")
    parser.add_argument(
        "--min_change",
        type=float,
        default=0.0,
        help="only clips whose action is at least this large in the first column",
    )
    parser.add_argument("--cells", type=int, default=21, help="cells of the grid along a continuous column")
    for axis in ("first", "second"):
        parser.add_argument(
            f"--{axis}_range",
            type=float,
            nargs=2,
            metavar=("LOW", "HIGH"),
            help=f"of the {axis} column, raw units (default: mean +- 2 standard deviations of the training data)",
        )
    parser.add_argument("--context_steps", type=int, default=2, help="true steps before the action that is varied")
    parser.add_argument(
        "--horizon", type=int, default=1, help="steps to imagine; the goal is the last one's true features"
    )
    parser.add_argument(
        "--goal",
        choices=("tubelet", "frame"),
        default="tubelet",
        help="the last imagined step's true features, or those of its first frame repeated (what a plan makes of a "
        "picture)",
    )
    parser.add_argument("--plan", action="store_true", help="search both columns too: the cost that a plan reaches")
    parser.add_argument("--num_pictures", type=int, default=6, help="landscapes to draw")
    parser.add_argument("--max_batch_tokens", type=int, default=16384, help="tokens at once: bounds memory")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--device", help="where to compute (default: cuda where there is one)")
    args = parser.parse_args()
    for name, least in (("max_clips", 1), ("cells", 2), ("num_pictures", 0), ("context_steps", 1), ("horizon", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, found {getattr(args, name)}")
    if args.clips is not None and args.clip_rule is not None:
        parser.error(f"--clips names rows and --clip_rule {args.clip_rule} chooses them: give one of both")
    return args


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

import vjepa_ac_hf  # noqa: F401 (registers the model with AutoModel and AutoProcessor)
from vjepa_ac_hf.actions_vjepa2_ac import ACTION_COLUMNS, CONTINUOUS_COLUMNS
from vjepa_ac_hf.evaluation import clips as clip_data
from vjepa_ac_hf.loading.clip_rules import choose_clips, describe_clips
from vjepa_ac_hf.loading.clips import check_geometry, clip_name, decode_clip, load_clips
from vjepa_ac_hf.pages import new_figure
from vjepa_ac_hf.planning import (
    CEM,
    GoalCost,
    Imagination,
    encode_context,
    energy_landscape,
    landscape_figure,
    summarize_landscapes,
)
from vjepa_ac_hf.planning.landscape import check_columns, search_landscape
from vjepa_ac_hf.planning.planner import check_horizon, check_planning, encode_goal
from vjepa_ac_hf.records import command_line, versions, write_file, write_json

RECORDED = ("split", "context_steps", "horizon", "columns", "min_change", "recordings", "goal", "plan", "seed")


def choose_rows(args: argparse.Namespace, dataset: Any) -> list[int]:
    """Rows of the split, as the arguments have them.

    Raises:
        ValueError: rows or recordings that the split lacks, or no row that is left.
    """
    rows = list(range(len(dataset))) if args.clips is None else args.clips
    if args.clip_rule is not None:
        rows = choose_clips(dataset, args.clip_rule)
    wrong = [row for row in rows if not 0 <= row < len(dataset)]
    if wrong:
        raise ValueError(f"--clips: the split {args.split!r} has rows 0 to {len(dataset) - 1}, found {wrong[0]}")
    if args.recordings is not None:
        names = dataset["recording_id"]
        unknown = sorted(set(args.recordings) - set(names))
        if unknown:
            raise ValueError(f"--recordings: the split {args.split!r} has no recording {unknown[0]!r}")
        rows = [row for row in rows if names[row] in args.recordings]
        if not rows:
            raise ValueError(f"--clips {args.clips}: none is of the recordings {args.recordings}")
    if args.min_change > 0:
        actions, column = dataset["actions"], ACTION_COLUMNS.index(args.columns[0])
        changes = {row: abs(actions[row][args.context_steps - 1][column]) for row in rows}
        rows = [row for row in rows if changes[row] >= args.min_change]
        if not rows:
            raise ValueError(
                f"--min_change {args.min_change}: {args.columns[0]} changes by at most {max(changes.values())}"
            )
    if args.clip_rule is not None:
        return rows[: args.max_clips]
    return [rows[i] for i in clip_data.spread(len(rows), args.max_clips)]


def grid_values(column: str, given: list[float] | None, cells: int, processor: Any) -> np.ndarray:
    """The grid along one column: 0 and 1 for what is pressed, else evenly spaced."""
    if column not in CONTINUOUS_COLUMNS:
        if given is not None:
            raise ValueError(f"column {column!r} is 0 or 1 and takes no range, found {given}")
        return np.array([0.0, 1.0])
    if given is None:
        if processor.action_statistics is None:
            raise ValueError(
                f"column {column!r} needs a range: the processor has no action statistics to take one from"
            )
        at = CONTINUOUS_COLUMNS.index(column)
        mean, std = (processor.action_statistics[name][at] for name in ("mean", "std"))
        given = [mean - 2 * std, mean + 2 * std]
    if not given[0] < given[1]:
        raise ValueError(
            f"the range of {column!r} must rise, found {given[0]} to {given[1]} (give --first_range, --second_range)"
        )
    return np.linspace(*given, cells)


def main() -> None:
    # --- arguments, model, data: everything that can be wrong is found out here -------------------------------
    args = parse_arguments()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    new_figure(1, 1)  # matplotlib is optional: its absence should not end a run after the work is done
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModel.from_pretrained(args.model).to(args.device).eval()
    check_planning(model, processor)
    check_geometry(args.dataset, processor)
    check_horizon(model, args.context_steps, args.horizon)
    check_columns(args.columns, processor.action_space)
    if args.plan and set(args.columns) - set(CONTINUOUS_COLUMNS):
        raise ValueError(f"--plan needs two columns of {CONTINUOUS_COLUMNS}, found {args.columns}")
    ranges = (args.first_range, args.second_range)
    values = [grid_values(c, r, args.cells, processor) for c, r in zip(args.columns, ranges, strict=True)]
    dataset = load_clips(args.dataset, args.split)
    clip_data.check_columns(dataset)
    rows = choose_rows(args, dataset)
    dataset = dataset.select(rows)
    args.output.mkdir(parents=True, exist_ok=True)

    # --- one landscape a clip ---------------------------------------------------------------------------------
    names = [f"clip {row} ({clip_name(example)})" for row, example in zip(rows, dataset, strict=True)]
    context, stop = args.context_steps, args.context_steps + args.horizon
    landscapes, sessions, players = [], [], []
    method, generator = CEM(), torch.Generator().manual_seed(args.seed)
    for name, example in zip(names, tqdm(dataset, desc="landscapes", unit="clip"), strict=True):
        frames = decode_clip(example["video"], name, processor.frames_per_clip, processor.fps)
        features = model.encode(processor(videos=[frames])["pixel_values_videos"].to(model.device))[0]
        goal = features[stop - 1]
        if args.goal == "frame":
            goal = encode_goal(model, processor, frames[(stop - 1) * processor.tubelet_size])
        actions = torch.tensor(example["actions"])
        known = encode_context(
            model,
            processor,
            features=features[:context],
            states=example["states"][:context],
            actions=actions[: context - 1],
        )
        imagination = Imagination(model, processor, known, max_batch_tokens=args.max_batch_tokens)
        what = (imagination, actions[context - 1 : stop - 1], GoalCost(goal))
        plane = {"columns": args.columns, "values": (values[0], values[1])}
        landscape = energy_landscape(*what, **plane)
        if args.plan:
            cost = search_landscape(*what, **plane, method=method, generator=generator)
            landscape = replace(landscape, plan_cost=cost)
        landscapes.append(landscape)
        sessions.append(example["session_id"])
        players.append(example["player_id"])

    # --- files ------------------------------------------------------------------------------------------------
    summary = summarize_landscapes(landscapes, sessions, players, seed=args.seed)
    if args.num_pictures:
        shown = clip_data.spread(len(rows), args.num_pictures)
        picture = io.BytesIO()
        landscape_figure([landscapes[i] for i in shown], [names[i] for i in shown]).savefig(picture, format="png")
        write_file(args.output / "landscapes.png", picture.getvalue())
    record = {
        "summary": summary,
        "clip_set": describe_clips(dataset, args.clip_rule),
        "command": command_line(),
        "versions": versions(),
        "model": args.model,
        "dataset": args.dataset,
        "settings": {**{name: getattr(args, name) for name in RECORDED}, "values": [v.tolist() for v in values]},
        "landscapes": [{"clip": name, **land.to_dict()} for name, land in zip(names, landscapes, strict=True)],
    }
    write_json(args.output / "landscapes.json", record)
    for name, value in summary.items():
        print(f"{name}: {value}")
    print(f"landscapes: {args.output / 'landscapes.json'}")


if __name__ == "__main__":
    main()
