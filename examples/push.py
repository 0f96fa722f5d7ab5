"""Push what a training run has left to the Hub: the final model, or of a run that goes on its newest checkpoint.

    python examples/push.py --output_dir OUT [--hub_model_id ORG/NAME] [--evaluation REPORT_DIR]

OUT is the folder of `examples/train.py`, with or without --push_to_hub (docs/training.md, "On the Hub"). With
--evaluation, the folder that `examples/evaluate.py` wrote, its figures go on the model card and into
OUT/evaluation/metrics.json. May be repeated, and run beside the training: what is up already is not sent again. Exit
status 0 only when all is up.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

from vjepa_ac_hf.console import Parser

# This folder holds evaluate.py, which must not hide the library of that name.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of a training run")
    parser.add_argument("--hub_model_id", help="ORG/NAME (default: that of the run)")
    parser.add_argument("--hub_private", action="store_true", help="create the repository as private")
    parser.add_argument("--hub_squash", action="store_true", help="make the repository's history one commit")
    parser.add_argument("--evaluation", type=Path, help="folder with metrics.json of examples/evaluate.py")
    parser.add_argument("--runs", type=Path, help="runs.json of examples/run_seeds.py; goes with --evaluation")
    parser.add_argument(
        "--hub_timeout", type=float, default=60.0, help="seconds of silence after which a request fails"
    )
    parser.add_argument("--hub_wait", type=float, default=1800.0, help="seconds after which to give up")
    arguments = parser.parse_args()
    if arguments.runs is not None and arguments.evaluation is None:
        parser.error("--runs goes with --evaluation")
    return arguments


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

from vjepa_ac_hf.evaluation.runs import folder_of
from vjepa_ac_hf.hub.cards import PICTURE, RunDescription
from vjepa_ac_hf.hub.push import HUB_FOLDER, HubPusher, prepare_repository, repository_folder
from vjepa_ac_hf.hub.upload import look, read_json
from vjepa_ac_hf.records import write_file, write_json

MODEL_CARD = Path(__file__).resolve().parents[1] / "model_cards" / "model_card.md"


def find_model(arguments: argparse.Namespace) -> tuple[dict, bool]:
    """training_args.json of the newest model, and whether that is the final one, not a checkpoint's.

    Raises:
        ValueError: there is none.
    """
    output = arguments.output_dir
    final, status = read_json(output / "training_args.json"), read_json(output / "run_status.json")
    weights = output / "model.safetensors"
    if not weights.is_file() or (
        status.get("status") != "finished" and status.get("step", final["step"]) < final["step"]
    ):
        final = {}  # of a run before the one that goes on
    named = arguments.hub_model_id
    folders = [repository_folder(output, named)] if named else sorted((output / HUB_FOLDER).glob("*--*"))
    waiting = max((s for s in (look(folder)[0] for folder in folders) if s is not None), default=None)
    pushed = [read_json(folder / "pushed.json").get("made", 0) for folder in folders]
    if final and final.get("made", weights.stat().st_mtime_ns) >= max([waiting.made if waiting else 0, *pushed]):
        return final, True
    if waiting is not None:
        return read_json(waiting.path / "training_args.json"), False
    if not any(pushed):
        raise ValueError(f"{output}: neither a final model nor a checkpoint that waits for {named or 'a repository'}")
    return {}, False


def take_evaluation(arguments: argparse.Namespace, run: RunDescription) -> None:
    """Put the report's figures into OUT/evaluation/metrics.json, and beside it those over runs, and the report's first
    picture if a decoder drew it.

    Raises:
        ValueError: no report there, or one of other weights; runs that these weights are none of, or of other clips.
    """
    source = arguments.evaluation / "metrics.json"
    if not source.is_file():
        raise ValueError(f"{source} is missing: --evaluation is a folder of examples/evaluate.py")
    evaluation = json.loads(source.read_text())
    found, expected = ((of.get("step"), of.get("weights_sha256")) for of in (evaluation, run.training))
    if found[1] != expected[1]:
        raise ValueError(
            f"{source} is of other weights: step {found[0]}, weights_sha256 {found[1]}; the model in "
            f"{arguments.output_dir} is of step {expected[0]}, weights_sha256 {expected[1]}"
        )
    (arguments.output_dir / "evaluation").mkdir(exist_ok=True)
    write_json(arguments.output_dir / "evaluation" / "metrics.json", evaluation)
    if arguments.runs is not None:
        runs = json.loads(arguments.runs.read_text())
        folder = folder_of(runs, expected[1])
        if folder is None:
            raise ValueError(f"{arguments.runs}: weights_sha256 {runs['weights_sha256']}, expected {expected[1]} there")
        of, ours = runs.get("clip_sets", {}).get(folder), evaluation.get("clip_set")
        if of != ours:
            raise ValueError(f"{arguments.runs}: of the clips {of}, but {source} of {ours}: a card is of one set")
        public = {k: v for k, v in runs.items() if k != "programs"}  # which names folders
        write_json(arguments.output_dir / "evaluation" / "runs.json", public)
    drawn, picture = arguments.evaluation / PICTURE, arguments.output_dir / "evaluation" / PICTURE
    if "frames" in evaluation and drawn.is_file():
        write_file(picture, drawn.read_bytes())
    else:
        picture.unlink(missing_ok=True)


def push(arguments: argparse.Namespace) -> str:
    """Push the newest model of the folder. Returns what is up.

    Raises:
        ValueError: no model there, no repository is named, an evaluation of other weights, or the Hub refuses.
        TimeoutError: it is not up in time.
    """
    output = arguments.output_dir
    training, is_final = find_model(arguments)
    if arguments.evaluation is not None and not is_final:
        raise ValueError("--evaluation goes with a final model; this run has gone on, or has only checkpoints")
    if not training:
        return "nothing waits: all is up"
    repo_id = arguments.hub_model_id or training["arguments"].get("hub_model_id")
    if not repo_id:
        raise ValueError(f"{output}: training named no repository; give --hub_model_id ORG/NAME")
    pusher = HubPusher(output, repo_id, squash=arguments.hub_squash, timeout=arguments.hub_timeout)
    run = RunDescription.of_folder(MODEL_CARD, output, repo_id) if is_final else None
    if run is not None and arguments.evaluation is not None:
        take_evaluation(arguments, run)
    private = arguments.hub_private or training["arguments"].get("hub_private", False)
    prepare_repository(repo_id, private, arguments.hub_timeout)
    print(
        f"pushing {'the final model' if is_final else 'a checkpoint'} of step {training['step']} to {repo_id}",
        flush=True,
    )
    with pusher:
        pusher.begin()
        if run is not None:
            write_file(output / "README.md", pusher.add_final(run))
        if not pusher.wait(arguments.hub_wait):
            raise TimeoutError(f"NOT on {repo_id}: it stays in {output}, the same command tries again")
    return f"pushed to {repo_id}: all is up"


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    print(push(parse_arguments()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
