"""Training of heads: weights of keys, parameter groups, fitted parts, figures on validation clips."""

import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from huggingface_hub import ModelCard
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..actions_vjepa2_ac import ACTION_COLUMNS
from ..evaluation import head_figures
from ..evaluation.clips import spread
from ..evaluation.decoding import evaluate_decoder
from ..loading.labels import ClipLabels
from ..modeling_heads_decoding_vjepa2_ac import VJEPA2ACForFrameDecoding, VJEPA2ACFrameDecodingHead
from ..modeling_heads_distance_vjepa2_ac import VJEPA2ACForTemporalDistance
from ..modeling_heads_vjepa2_ac import (
    VJEPA2ACForActionAnticipation,
    VJEPA2ACForInverseDynamics,
    VJEPA2ACForVideoClassification,
    binary_pos_weight,
)
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from ..records import move_files
from .optimization import decay_groups
from .validation import evaluating

TASKS: dict[str, Any] = {
    "inverse_dynamics": VJEPA2ACForInverseDynamics,
    "action_anticipation": VJEPA2ACForActionAnticipation,
    "video_classification": VJEPA2ACForVideoClassification,
    "frame_decoding": VJEPA2ACForFrameDecoding,
    "temporal_distance": VJEPA2ACForTemporalDistance,
}
CLIPS_FOR_WEIGHTS = 100_000
CLIPS_FOR_FIT = 512
RIDGE = 1e-6  # of the features' variance, which is 1 where they are normalised: some directions hardly vary


def head_parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, encoder_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Groups for an optimizer: head and, where it is trained, the world model under it (by default at a tenth of the
    head's learning rate); no weight decay on biases, norms and scales, which have one dimension at most."""
    if encoder_learning_rate is None:
        encoder_learning_rate = learning_rate / 10
    return [
        {**group, "lr": rate, "name": name}
        for name, rate in (("head", learning_rate), ("vjepa2_ac", encoder_learning_rate))
        for group in decay_groups(getattr(model, name), weight_decay)
        if group["params"]
    ]


def fit_pos_weight(clips: Dataset, columns: Sequence[str]) -> list[float]:
    """`binary_pos_weight` of a training split, of at most `CLIPS_FOR_WEIGHTS` clips spread over it."""
    chosen = clips.select_columns(["actions"]).select(spread(len(clips), CLIPS_FOR_WEIGHTS))
    at = [ACTION_COLUMNS.index(c) for c in columns]
    parts = [torch.as_tensor(np.asarray(b["actions"]))[..., at] for b in chosen.with_format("numpy").iter(4096)]
    return binary_pos_weight(torch.cat(parts)) if columns else []


@torch.no_grad()
def fit_linear(model: VJEPA2ACForFrameDecoding, batches: Iterable[dict[str, Any]], accelerator: Accelerator) -> None:
    """Set the head's linear map to the least-squares solution over the clips of all processes (ridge regression).

    Steps of an optimizer get there slowly: a random encoder's features vary a thousand times as much in some directions
    as in others (docs/LOG.md).

    Args:
        model: on the accelerator's device, not wrapped.
        batches: of this process, with `frames` beside pixels or features (`ClipCollator(frames=True)`).
    """
    head, device = model.head, accelerator.device
    assert isinstance(head, VJEPA2ACFrameDecodingHead)
    exact = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    size = head.linear.in_features + 1
    products = torch.zeros(size, size + head.linear.out_features, dtype=torch.float64, device=exact)
    for batch in batches:
        inputs = {k: batch[k].to(device) for k in ("pixel_values_videos", "features") if k in batch}
        features = model.read_features(inputs.get("pixel_values_videos"), inputs.get("features"), min_steps=1)
        targets = head.linear_targets(batch["frames"].to(device).float() / 255)
        known, wanted = (t.flatten(0, 2).to(exact).double() for t in (features, targets))
        known = torch.cat([known, known.new_ones(len(known), 1)], dim=1)
        products += known.T @ torch.cat([known, wanted], dim=1)
    total: Tensor = accelerator.reduce(products, reduction="sum").to(exact)
    square, right = total[:, :size], total[:, size:]
    ridge = RIDGE * square[-1, -1] * torch.eye(size, dtype=square.dtype, device=exact)  # its last is the count of rows
    solution = torch.linalg.solve(square + ridge, right)
    head.linear.weight.copy_(solution[:-1].T)
    head.linear.bias.copy_(solution[-1])


def head_inputs(model: Any, batch: dict[str, Any], labels: ClipLabels | None) -> dict[str, Any]:
    """A loader's batch as arguments of a head's `forward`."""
    inputs: dict[str, Any] = {k: batch[k] for k in ("pixel_values_videos", "features") if k in batch}
    if isinstance(model, VJEPA2ACForFrameDecoding):
        return inputs | {"labels": batch["frames"]}
    if isinstance(model, VJEPA2ACForTemporalDistance):
        return inputs | {"return_loss": True}
    if isinstance(model, VJEPA2ACForVideoClassification):
        assert labels is not None
        told, device = labels(batch["clips"]), batch["states"].device
        # From pinned memory the device takes them when it gets there.
        told = told.pin_memory() if device.type == "cuda" else told
        return inputs | {"labels": told.to(device, non_blocking=True)}
    if isinstance(model, VJEPA2ACForActionAnticipation):
        inputs |= {"actions": batch["actions"], "states": batch["states"]}
    return inputs | {"labels": batch["actions"]}


def save_head(folder: Path, model: Any, processor: VJEPA2ACProcessor, card: ModelCard) -> None:
    """Write head, processor, code and card (README.md); each file appears whole."""
    temporary = folder / ".final.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    card.save(temporary / "README.md")
    move_files(temporary, folder)


@torch.no_grad()
def fit_key_thresholds(
    model: Any, batches: Iterable[dict[str, Any]], processor: VJEPA2ACProcessor, accelerator: Accelerator
) -> list | None:
    """The logits above which telling a key gives its highest F1 on these (training) clips, as the configuration's
    `key_thresholds`; the same on all processes. 0 for keys that are never pressed; None without keys.

    A threshold lies half way between two scores; of equal F1 the lowest counts.
    """
    config = model.config
    if not config.binary_columns:
        return None
    config.key_thresholds = None
    rows = _gather_rows(model, batches, processor, accelerator)[0]
    at = [config.action_space.index(c) for c in config.binary_columns]

    def fit(chosen: np.ndarray) -> list[float]:
        return [best_f1_threshold(rows["told"][chosen, i], rows["true"][chosen, i]) for i in at]

    if "horizon" not in rows:
        return fit(np.ones(len(rows["told"]), dtype=bool))
    return [fit(rows["horizon"] == h) for h in range(1, config.anticipation_steps + 1)]


def best_f1_threshold(scores: np.ndarray, pressed: np.ndarray) -> float:
    """The score above which telling a key gives the highest F1; 0 where it is never pressed, or there are no rows."""
    if not pressed.any():
        return 0.0
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], pressed[order].cumsum()
    f1 = 2 * hits / (np.arange(1, len(scores) + 1) + pressed.sum())
    last_of_tie = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    best = last_of_tie[len(last_of_tie) - 1 - int(np.argmax(f1[last_of_tie][::-1]))]
    # Below all scores there is nothing to be half way to.
    return float((scores[best] + scores[best + 1]) / 2 if best + 1 < len(scores) else scores[best] - 1.0)


@torch.no_grad()
def evaluate_head(
    model: Any,
    batches: Iterable[dict[str, Any]],
    processor: VJEPA2ACProcessor,
    accelerator: Accelerator,
    labels: ClipLabels | None = None,
) -> dict[str, Any]:
    """Loss and figures over the clips of all processes, on each of them (docs/applications.md, "Figures").

    `model` is not wrapped; `batches` are this process's, every clip once over all processes; `labels` are for
    classification.
    """
    if isinstance(model, VJEPA2ACForFrameDecoding):
        return evaluate_decoder(model, batches, processor, accelerator)
    rows, loss, clips = _gather_rows(model, batches, processor, accelerator, labels)
    figures = {"clips": clips, "loss": loss}
    if isinstance(model, VJEPA2ACForTemporalDistance):
        return figures | {"distance": head_figures.distance_figures(rows["told"], rows["plain"], rows["true"])}
    if labels is not None:
        return figures | head_figures.label_figures(rows["told"], rows["true"], labels.classes)
    return figures | action_figures(rows, model.config)


def _gather_rows(
    model: Any,
    batches: Iterable[dict[str, Any]],
    processor: VJEPA2ACProcessor,
    accelerator: Accelerator,
    labels: ClipLabels | None = None,
) -> tuple[dict[str, np.ndarray], float, int]:
    """Rows of all processes, mean loss and number of clips."""
    parts: list[dict[str, Any]] = []
    quiet = not accelerator.is_main_process
    with evaluating(model):
        for batch in tqdm(batches, desc="evaluating", unit="batch", leave=False, disable=quiet):
            batch = {k: v.to(accelerator.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            with accelerator.autocast():
                output = model(**head_inputs(model, batch, labels))
            if isinstance(model, VJEPA2ACForTemporalDistance):
                rows = _distance_rows(model, output, batch)
            elif labels is None:
                rows = _action_rows(model, output, batch, processor)
            else:
                told, true = output.logits.double().cpu(), labels.hot(batch["clips"]).double()
                rows = {"told": told.numpy(), "true": true.numpy()}
            parts.append({"loss": float(output.loss), "clips": len(batch["clips"]), **rows})
    parts = gather_object(parts)
    clips = sum(p["clips"] for p in parts)
    rows = {k: np.concatenate([p[k] for p in parts]) for k in parts[0] if k not in ("loss", "clips")}
    return rows, sum(p["loss"] * p["clips"] for p in parts) / clips, clips


def _distance_rows(model: Any, output: Any, batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """Rows of two steps of a clip each: steps told, mean absolute difference of features, true steps."""
    features = model.read_features(batch.get("pixel_values_videos"), batch.get("features"), min_steps=2).float()
    first, second = torch.triu_indices(features.shape[1], features.shape[1], offset=1)
    plain = (features[:, first] - features[:, second]).abs().mean(dim=(2, 3))
    true = (second - first).expand(len(features), -1)
    parts = {"told": output.distances[:, first, second], "plain": plain, "true": true}
    return {name: part.double().cpu().numpy().reshape(-1) for name, part in parts.items()}


def _action_rows(model: Any, output: Any, batch: dict[str, Any], processor: VJEPA2ACProcessor) -> dict[str, np.ndarray]:
    """Rows of one action each: told and true in raw units (told keys and slots as logits, those of keys less their
    threshold), horizon, last action."""
    config = model.config
    told = processor.denormalize_actions(model.normalized_actions(output)).cpu()
    keys = (output.binary_logits, config.binary_columns, config.key_thresholds)
    for logits, columns, thresholds in (keys, (output.slot_logits, config.slot_columns, None)):
        if logits is not None:
            less = torch.tensor(thresholds or 0.0, dtype=torch.float64)
            told[..., [config.action_space.index(c) for c in columns]] = logits.double().cpu() - less
    true = processor.denormalize_actions(batch["actions"]).cpu()
    if not isinstance(model, VJEPA2ACForActionAnticipation):
        return {"told": told.flatten(0, 1).numpy(), "true": true.flatten(0, 1).numpy()}
    targets, valid = model.targets(true)
    valid = valid.clone()
    valid[0] = False  # no action is over yet: nothing to repeat
    last = torch.cat([true[:, :1], true], dim=1)[:, :, None].expand_as(targets)
    horizon = torch.arange(1, valid.shape[1] + 1).expand_as(valid).expand(len(true), -1, -1)
    mask = valid.expand(len(true), -1, -1)
    rows = {"told": told[mask], "true": targets[mask], "last": last[mask], "horizon": horizon[mask]}
    return {k: v.numpy() for k, v in rows.items()}


def action_figures(rows: dict[str, np.ndarray], config: Any) -> dict[str, Any]:
    """`camera`, `keys` and `slot` of rows of actions; by horizon, next to the last action, where rows have one.

    Rows whose true action tells no slot (by horizon: or whose last one does not) are left out of `slot` and counted
    there, `without_slot`.
    """
    space = config.action_space
    kinds = {"camera": config.continuous_columns, "keys": config.binary_columns, "slot": config.slot_columns}
    at = {kind: [space.index(c) for c in columns] for kind, columns in kinds.items() if columns}
    if "horizon" in rows:
        columns = config.continuous_columns + config.binary_columns
        chosen = [space.index(c) for c in columns]
        told = {"predictions": rows["told"][:, chosen], "references": rows["true"][:, chosen]}
        told |= {"repeated": rows["last"][:, chosen], "horizon": rows["horizon"]}
        figures = head_figures.anticipation_figures(**told, columns=columns, continuous=config.continuous_columns)
        for horizon in figures["horizons"] if "slot" in at else ():
            here = rows["horizon"] == horizon["horizon"]
            parts = {k: rows[k][here][:, at["slot"]] for k in ("true", "last", "told")}
            known = parts["true"].any(axis=1) & parts["last"].any(axis=1)
            horizon["slot"] = {"rows": int(known.sum()), "without_slot": int((~known).sum())}
            if known.any():
                true, last, slots = (values[known].argmax(axis=1) for values in parts.values())
                horizon["slot"]["model"] = float((slots == true).mean())
                horizon["slot"]["repeat_last"] = float((last == true).mean())
        return figures
    figures = {}
    pairs = {kind: (rows["told"][:, chosen], rows["true"][:, chosen]) for kind, chosen in at.items()}
    if "camera" in at:
        figures["camera"] = head_figures.camera_figures(*pairs["camera"], kinds["camera"])
    if "keys" in at:
        columns = kinds["keys"]
        weights = config.pos_weight or [1.0] * len(columns)
        thresholds = config.key_thresholds or [0.0] * len(columns)
        even_odds = [math.log(w) - t for w, t in zip(weights, thresholds, strict=True)]
        figures["keys"] = head_figures.keys_figures(*pairs["keys"], columns, even_odds=even_odds)
    if "slot" in at:
        slots, true = pairs["slot"]
        known = true.any(axis=1)
        figures["slot"] = {"clips": 0, "without_slot": int((~known).sum())}
        if known.any():
            figures["slot"] |= head_figures.label_figures(slots[known], true[known], kinds["slot"])
    return figures


def headline(figures: dict[str, Any]) -> dict[str, float]:
    """The few numbers of an evaluation that a training log shows, by name; figures without data are left out."""
    found: dict[str, Any] = {"validation_loss": figures["loss"]}
    for column, values in figures.get("camera", {}).items():
        found[f"validation_r2_{column}"] = values["r2"]
    for name in ("macro_f1", "mean_average_precision"):
        found[f"validation_{name}"] = figures.get("keys", figures).get(name)
    found["validation_accuracy"] = figures.get("slot", figures).get("accuracy")
    if "distance" in figures:
        for name in ("rank_correlation", "rank_correlation_features", "mae"):
            found[f"validation_{name}"] = figures["distance"][name]
    for horizon in figures.get("horizons", []):
        found[f"validation_macro_f1_{horizon['horizon']}"] = horizon["macro_f1"]["model"]
        for column, values in horizon["columns"].items():
            name = "r2" if "r2" in values["model"] else "average_precision"
            found[f"validation_{name}_{column}_{horizon['horizon']}"] = values["model"][name]
    for part, kinds in figures.get("frames", {}).items():
        for kind, values in (kinds or {}).items():
            if kind != "rows":
                suffix = f"{kind.replace(' ', '_')}{'' if part == 'all' else f'_{part}'}"
                found |= {f"validation_{name}_{suffix}": value for name, value in values.items()}
    return {k: v for k, v in found.items() if v is not None}
