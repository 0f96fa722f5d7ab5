"""Push what a training run has left to the Hub: the final model, or of a run that goes on its newest checkpoint.

    python examples/push.py --output_dir OUT [--hub_model_id ORG/NAME] [--evaluation REPORT_DIR]

OUT is the folder of `examples/train.py`, with or without --push_to_hub (docs/training.md, "On the Hub"). With
--evaluation, the folder that `examples/evaluate.py` wrote, its figures go on the model card and into
OUT/evaluation/metrics.json. May be repeated: what is up already is not sent again. Exit status 0 only when all is up.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

# This folder holds evaluate.py, which must not hide the library of that name.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of a training run")
    parser.add_argument("--hub_model_id", help="ORG/NAME (default: that of the run)")
    parser.add_argument("--hub_private", action="store_true", help="create the repository as private")
    parser.add_argument("--evaluation", type=Path, help="folder with metrics.json of examples/evaluate.py")
    parser.add_argument(
        "--hub_timeout", type=float, default=60.0, help="seconds of silence after which a request fails"
    )
    parser.add_argument("--hub_wait", type=float, default=1800.0, help="seconds after which to give up")
    return parser.parse_args()


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

from vjepa_ac_hf.hub.cards import RunDescription
from vjepa_ac_hf.hub.push import HUB_FOLDER, HubPusher, Push, prepare_repository, read_pending
from vjepa_ac_hf.records import write_file, write_json
from vjepa_ac_hf.training.run_log import MetricsLog

MODEL_CARD = Path(__file__).resolve().parents[1] / "model_cards" / "model_card.md"


def find_push(arguments: argparse.Namespace) -> Push:
    """The newest model of the folder: the final one, if no checkpoint after it waits.

    Raises:
        ValueError: no model there, or no repository is named.
    """
    output, pending = arguments.output_dir, read_pending(arguments.output_dir)
    final = None
    if (output / "training_args.json").is_file() and (output / "model.safetensors").is_file():
        training = json.loads((output / "training_args.json").read_text())
        final = Push(training["arguments"].get("hub_model_id") or "", training["step"], True)
    found = max((p for p in (final, pending) if p is not None), key=lambda p: (p.step, p.final), default=None)
    if found is None:
        pushed = output / HUB_FOLDER / "pushed.json"
        known = f" ({pushed.read_text().strip()})" if pushed.is_file() else ""
        raise ValueError(f"{output}: neither a final model nor a checkpoint that waits to be pushed{known}")
    repo_id = arguments.hub_model_id or (pending.repo_id if pending else found.repo_id)
    if not repo_id:
        raise ValueError(f"{output}: training named no repository; give --hub_model_id ORG/NAME")
    private = arguments.hub_private or (pending is not None and pending.private)
    return Push(repo_id, found.step, found.final, private)


def write_card(push: Push, arguments: argparse.Namespace) -> None:
    """The card anew, for this repository, with the evaluation's figures (those of before, if there is no new one)."""
    folder = arguments.output_dir
    stored = folder / "evaluation" / "metrics.json"
    if arguments.evaluation is not None:
        source = arguments.evaluation / "metrics.json"
        if not source.is_file():
            raise ValueError(f"{source} is missing: --evaluation is a folder of examples/evaluate.py")
        stored.parent.mkdir(exist_ok=True)
        evaluation = json.loads(source.read_text())
        check_evaluated_model(evaluation, arguments, push.repo_id)
        write_json(stored, evaluation)
    evaluation = json.loads(stored.read_text()) if stored.is_file() else None
    run = RunDescription.of_folder(MODEL_CARD, folder, push.repo_id)
    card = run.card(push.step, MetricsLog.last(folder / "metrics.jsonl"), evaluation)
    write_file(folder / "README.md", str(card).encode())


def check_evaluated_model(evaluation: dict, arguments: argparse.Namespace, repo_id: str) -> None:
    """Warn of figures that may be another model's: nothing in them says of which weights they are."""
    model = evaluation.get("model")
    if model not in (None, repo_id) and Path(model).resolve() != arguments.output_dir.resolve():
        logging.warning("%s evaluates the model %s, not %s", arguments.evaluation, model, arguments.output_dir)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    arguments = parse_arguments()
    try:
        push = find_push(arguments)
        if push.final:
            write_card(push, arguments)
        elif arguments.evaluation is not None:
            raise ValueError("--evaluation goes with a final model; this run has only a checkpoint to push")
        prepare_repository(push.repo_id, push.private, arguments.hub_timeout)
        kind = "the final model" if push.final else "the model"
        print(f"pushing {kind} of step {push.step} in {arguments.output_dir} to {push.repo_id}", flush=True)
        with HubPusher(arguments.output_dir, push.repo_id, timeout=arguments.hub_timeout) as pusher:
            pusher.start()
            done = pusher.push(push, arguments.hub_wait)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not done:
        print(
            f"NOT on {push.repo_id}: it stays in {arguments.output_dir}, the same command tries again", file=sys.stderr
        )
        return 1
    print(f"pushed to {push.repo_id}: all is up")
    return 0


if __name__ == "__main__":
    sys.exit(main())
