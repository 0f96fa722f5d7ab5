"""Evaluate a model on a split: metrics.json, report.html and the figures beside it (docs/evaluation.md).

python examples/evaluate.py --model out --dataset data/tubelets --output report
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

# As a script's own folder comes first on Python's path, `import evaluate` would find this file, not the library.
sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]

from vjepa_ac_hf.console import Parser, add_clip_rule, folder_or_repo


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", required=True, type=folder_or_repo, help="folder or Hub repository of model and processor"
    )
    parser.add_argument(
        "--dataset", required=True, type=folder_or_repo, help="folder or Hub repository of a tubelet data set"
    )
    parser.add_argument(
        "--decoder",
        type=folder_or_repo,
        help="folder or repository of a frame decoder: its frames in place of nearest real ones, PSNR, SSIM",
    )
    parser.add_argument(
        "--inverse_dynamics",
        type=folder_or_repo,
        help="folder or repository of an inverse dynamics head over the same encoder and action space: can the actions "
        "be read from what is imagined?",
    )
    parser.add_argument("--output", required=True, type=Path, help="folder for metrics.json and report.html")
    parser.add_argument("--split", default="validation", help="split of the data set")
    parser.add_argument("--context_steps", type=int, default=2, help="true steps that a rollout starts from")
    parser.add_argument("--horizon", type=int, help="steps to predict (default: all after the context)")
    parser.add_argument("--batch_size", type=int, default=8, help="clips in a batch")
    parser.add_argument("--shuffles", type=int, default=8, help="other clips whose actions each clip is given")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffles and of the bootstrap")
    parser.add_argument("--max_clips", type=int, help="evaluate this many clips, evenly spaced (default: all)")
    add_clip_rule(parser, "the clips (of --max_clips the rule's first)")
    parser.add_argument("--num_pictures", type=int, default=4, help="clips to show in the report")
    parser.add_argument("--device", help="where to compute (default: cuda where there is one)")
    args = parser.parse_args()
    for name, least in (("batch_size", 1), ("max_clips", 2), ("num_pictures", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, found {value}")
    return args


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor
from transformers.utils import cached_file

import vjepa_ac_hf  # noqa: F401 (registers the model with AutoModel and AutoProcessor)
from vjepa_ac_hf.evaluation import (
    aggregate_retrieval,
    aggregate_rows,
    evaluate_features,
    state_integrator,
    table_rows,
)
from vjepa_ac_hf.evaluation import clips as clip_data
from vjepa_ac_hf.evaluation.controllability import evaluate_controllability, load_inverse_dynamics
from vjepa_ac_hf.evaluation.decoding import evaluate_frames, load_decoder, mirror_actions
from vjepa_ac_hf.evaluation.figures import unit_counts
from vjepa_ac_hf.evaluation.pictures import picture_clips, turning_clips
from vjepa_ac_hf.evaluation.probes import RETRIEVAL_GROUP, Retrieval, retrieval_groups
from vjepa_ac_hf.evaluation.report import write_metrics, write_report
from vjepa_ac_hf.evaluation.rollouts import check_protocol
from vjepa_ac_hf.loading.clip_rules import describe_clips
from vjepa_ac_hf.loading.clips import check_geometry, decode_clip, load_clips
from vjepa_ac_hf.pages import new_figure
from vjepa_ac_hf.records import command_line, tensor_digests, versions, weights_digest


def load(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Model, processor and clips, checked against each other."""
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModel.from_pretrained(args.model).to(args.device).eval()
    clip_data.check_model_and_processor(model, processor)
    check_geometry(args.dataset, processor)
    dataset = load_clips(args.dataset, args.split, streaming=True)  # read in order, twice: no copy is worth it
    clip_data.check_columns(dataset)
    rows = clip_data.choose_rows(dataset, args.max_clips, args.clip_rule)
    return model, processor, dataset.select(rows)


def identify(name: str, model: Any) -> dict[str, Any]:
    """Digest of the weights that are evaluated, and the step that they are of, where the model's folder says it."""
    weights = weights_digest(tensor_digests(model.state_dict().items()))
    record = cached_file(name, "training_args.json", _raise_exceptions_for_missing_entries=False)
    training = {} if record is None else json.loads(Path(record).read_text())
    return {"step": training["step"] if training.get("weights_sha256") == weights else None, "weights_sha256": weights}


def make_pictures(
    args: argparse.Namespace,
    model: Any,
    processor: Any,
    dataset: Any,
    records: Any,
    inputs: Any,
    table: Any,
    integrate_states: Any,
    decoder: Any,
) -> tuple[list[Any], str]:
    """Pictures of clips that turn, each with the actions of its first partner as the other ones, and how they were
    chosen."""
    first, horizon = args.context_steps - 1, table.error.shape[1]
    shown, chosen = turning_clips(records.yaw_deltas[:, first : first + horizon], args.num_pictures)
    if not shown:
        return [], ""
    rows, names = dataset.select(shown), [records.names[i] for i in shown]
    videos = [decode_clip(row["video"], n, processor.frames_per_clip) for row, n in zip(rows, names, strict=True)]
    pictures = picture_clips(
        model,
        torch.cat(list(clip_data.encoded_batches(model, processor, rows, names, args.batch_size))),
        processor.prepare_frames(videos),
        shown=shown,
        others=table.partners[shown, 0].tolist(),
        names=records.names,
        actions=inputs["actions"],
        raw_actions=records.actions,
        states=inputs["states"],
        context_steps=args.context_steps,
        horizon=horizon,
        integrate_states=integrate_states,
        decoder=decoder,
        mirrored=processor.normalize_actions(mirror_actions(records.actions)),
    )
    return pictures, chosen


def read_imagined(
    args: argparse.Namespace,
    model: Any,
    head: Any,
    processor: Any,
    dataset: Any,
    records: Any,
    table: Any,
    integrate_states: Any,
) -> dict[str, Any]:
    """Figures of what an inverse dynamics head reads of rollouts; the other clip of each is its first partner."""
    batches = clip_data.encoded_batches(model, processor, dataset, records.names, args.batch_size)
    controllability = evaluate_controllability(
        *(model, head, processor),
        tqdm(batches, total=-(-len(dataset) // args.batch_size), desc="reading actions", unit="batch"),
        records,
        partners=table.partners[:, 0],
        context_steps=args.context_steps,
        horizon=table.error.shape[1],
        integrate_states=integrate_states,
        seed=args.seed,
    )
    return {"inverse_dynamics": args.inverse_dynamics, "controllability": controllability}


def print_table(horizons: list[dict[str, Any]]) -> None:
    names = ("error", "error_over_persistence", "shuffled_over_error", "win_rate", "win_rate_large_turns")
    print("horizon  " + "  ".join(names))
    for figures in horizons:
        values = ["-" if figures[n] is None else f"{figures[n]:.4f}" for n in names]
        print(f"{figures['horizon']:>7}  " + "  ".join(v.rjust(len(n)) for v, n in zip(values, names, strict=True)))


def main() -> None:
    # --- arguments, model, data: everything that can be wrong is found out here -------------------------------
    args = parse_arguments()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    new_figure(1, 1)  # matplotlib is optional: its absence should not end a run after the work is done
    model, processor, dataset = load(args)
    decoder = None if args.decoder is None else load_decoder(args.decoder, model)
    head = None if args.inverse_dynamics is None else load_inverse_dynamics(args.inverse_dynamics, model, processor)
    steps = processor.frames_per_clip // processor.tubelet_size
    check_protocol(steps, args.context_steps, args.horizon, args.shuffles, len(dataset))
    records = clip_data.read_records(dataset, processor)
    inputs = processor(actions=records.actions, states=records.states)
    integrate_states = state_integrator(processor)
    args.output.mkdir(parents=True, exist_ok=True)

    # --- errors of every clip at every horizon ----------------------------------------------------------------
    batches = clip_data.encoded_batches(model, processor, dataset, records.names, args.batch_size)
    retrieval = Retrieval(retrieval_groups(len(dataset), RETRIEVAL_GROUP), args.context_steps)
    table = evaluate_features(
        model,
        tqdm(batches, total=-(-len(dataset) // args.batch_size), desc="evaluating", unit="batch"),
        inputs["actions"],
        inputs["states"],
        sessions=records.sessions,
        players=records.players,
        integrate_states=integrate_states,
        yaw_deltas=records.yaw_deltas,
        context_steps=args.context_steps,
        horizon=args.horizon,
        shuffles=args.shuffles,
        seed=args.seed,
        watch=retrieval.add,
    )
    units = {"session_id": records.sessions, "player_id": records.players}

    # --- figures and report -----------------------------------------------------------------------------------
    metrics = {
        "clips": len(dataset),
        "clip_set": describe_clips(dataset, args.clip_rule),
        **unit_counts(records.sessions, records.players),
        "loss_type": model.config.loss_type,
        "encoding": model.config.encoding,
        "command": command_line(),
        "versions": versions(),
        "context_steps": args.context_steps,
        "seconds_per_step": processor.tubelet_size / processor.fps,
        "future_states": table.future_states,
        "shuffles": args.shuffles,
        "seed": args.seed,
        "model": args.model,
        **identify(args.model, model),
        "dataset": args.dataset,
        "split": args.split,
        "horizons": aggregate_rows(table_rows(table), seed=args.seed),
        "retrieval": {"group": RETRIEVAL_GROUP, **aggregate_retrieval({**retrieval.rows, **units}, seed=args.seed)},
    }
    if decoder is not None:
        metrics["decoder"] = args.decoder
        metrics["frames"] = evaluate_frames(
            *(model, decoder, processor, dataset, records),
            partners=table.partners[:, 0],
            context_steps=args.context_steps,
            horizon=table.error.shape[1],
            integrate_states=integrate_states,
            batch_size=args.batch_size,
            seed=args.seed,
            progress=lambda starts: tqdm(starts, desc="decoding", unit="batch"),
        )
    if head is not None:
        metrics |= read_imagined(args, model, head, processor, dataset, records, table, integrate_states)
    for stale in args.output.glob("clip-*"):  # pictures here are always of the figures here
        stale.unlink()
    write_metrics(args.output / "metrics.json", metrics)
    shown = make_pictures(args, model, processor, dataset, records, inputs, table, integrate_states, decoder)
    report = write_report(args.output, metrics, table, *shown)
    print_table(metrics["horizons"])
    print(f"report: {report}")


if __name__ == "__main__":
    main()
