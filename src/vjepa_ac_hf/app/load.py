"""From names of a model, a data set and a decoder to an `Explorer`, checked against each other."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor
from transformers.utils import cached_file

from ..evaluation.clips import check_model_and_processor
from ..evaluation.decoding import load_decoder
from .explorer import Explorer, Limits
from .page import uploads_folder
from .scenes import Scenes
from .story import horizon_errors


def load_explorer(
    model: str,
    dataset: str,
    *,
    decoder: str | None = None,
    evaluation: Path | None = None,
    split: str = "validation",
    clips: int = 48,
    device: str | None = None,
    limits: Limits | None = None,
) -> Explorer:
    """Everything that a page needs.

    Args:
        model: folder or Hub repository of a world model with its processor.
        dataset: folder or Hub repository of a built data set.
        decoder: likewise, of a frame decoder over the same encoder; None: the nearest real frames are shown.
        evaluation: folder with a `metrics.json` of `evaluate.py`; None: `evaluation/metrics.json` of the model, where
            it has one.
        split: whose clips are offered.
        clips: how many at most.
        device: None: "cuda" where there is one.
        limits: of what visitors use together.

    Raises:
        ValueError: parts that do not belong together; the message names both.
    """
    if clips < 1:
        raise ValueError(f"at least 1 clip must be offered, found {clips}")
    processor = AutoProcessor.from_pretrained(model)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    world = AutoModel.from_pretrained(model).to(device).eval()
    check_model_and_processor(world, processor)
    drawer = None if decoder is None else load_decoder(decoder, world)
    errors = list(horizon_errors(read_evaluation(model, evaluation)))
    limits = limits or Limits()
    uploads = uploads_folder() if limits.upload_bytes else None
    scenes = Scenes(world, processor, dataset, split=split, count=clips)
    return Explorer(world, processor, scenes, decoder=drawer, errors=errors, limits=limits, uploads=uploads)


def read_evaluation(model: str, evaluation: Path | None) -> dict[str, Any]:
    """The figures of a model; empty where there are none.

    Raises:
        FileNotFoundError: the folder has no `metrics.json`.
        ValueError: figures of other weights.
    """
    found: str | Path | None = None if evaluation is None else evaluation / "metrics.json"
    missing: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    if found is None:
        found = cached_file(model, "evaluation/metrics.json", **missing)
    if found is None:
        return {}
    metrics = json.loads(Path(found).read_text())
    record = cached_file(model, "training_args.json", **missing)
    expected = json.loads(Path(record).read_text()).get("weights_sha256") if record is not None else None
    if expected is not None and metrics.get("weights_sha256") not in (None, expected):
        raise ValueError(
            f"{found} is of other weights: weights_sha256 {metrics['weights_sha256']}, the model's in {model} is "
            f"{expected}"
        )
    return metrics
