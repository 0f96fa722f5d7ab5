"""Training of heads: labels of clips, statistics of actions, parameter groups, figures on validation clips."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
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
from ..modeling_heads_decoding_vjepa2_ac import VJEPA2ACForFrameDecoding, VJEPA2ACFrameDecodingHead
from ..modeling_heads_distance_vjepa2_ac import VJEPA2ACForTemporalDistance
from ..modeling_heads_vjepa2_ac import (
    VJEPA2ACForActionAnticipation,
    VJEPA2ACForInverseDynamics,
    VJEPA2ACForVideoClassification,
    binary_pos_weight,
)
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from .checkpoints import flush
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
HOTBAR = [ACTION_COLUMNS.index(f"hotbar.{i}") for i in range(9)]


def head_parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, encoder_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Groups for an optimizer: head and, where it is trained, world model; no weight decay on biases, norms, scales.

    Args:
        model: a head model (`head`, `vjepa2_ac`).
        learning_rate: of the head.
        weight_decay: of parameters with more than one dimension.
        encoder_learning_rate: of the world model under it; None: a tenth of the head's.
    """
    rates = {"head": learning_rate, "vjepa2_ac": learning_rate / 10}
    if encoder_learning_rate is not None:
        rates["vjepa2_ac"] = encoder_learning_rate
    groups: list[dict[str, Any]] = []
    for name, rate in rates.items():
        own = [group for group in decay_groups(getattr(model, name), weight_decay) if group["params"]]
        groups += [{**group, "lr": rate, "name": name} for group in own]
    return groups


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
        accelerator: processes and device.
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


class ClipLabels:
    """Labels of clips by the names that batches give them, as tensors for `VJEPA2ACForVideoClassification`.

    Args:
        names: class names of each clip, by "recording_id@start_tick".
        classes: all class names, in order; None: those that occur, sorted.
        several: whether clips can have several labels; None: if any clip has another number than one.

    Raises:
        ValueError: a label that is not among the classes.
    """

    def __init__(self, names: dict[str, list[str]], classes: Sequence[str] | None = None, several: bool | None = None):
        self.classes = sorted({c for labels in names.values() for c in labels}) if classes is None else list(classes)
        self.several = any(len(labels) != 1 for labels in names.values()) if several is None else several
        for clip, labels in names.items():
            unknown = [c for c in labels if c not in self.classes]
            if unknown:
                raise ValueError(f"clip {clip} has the label {unknown[0]!r}, the label map has only {self.classes}")
            if not self.several and len(labels) != 1:
                raise ValueError(f"clip {clip} has {len(labels)} labels {labels}, expected one")
        self._ids = {clip: [self.classes.index(c) for c in labels] for clip, labels in names.items()}

    def __call__(self, clips: Sequence[str]) -> Tensor:
        """`(B,)` int64, or for several labels `(B, classes)`, 0 and 1."""
        if not self.several:
            return torch.tensor([self._ids[c][0] for c in clips])
        return self.hot(clips)

    def digest(self) -> str:
        """Of all clips' labels: a head that is continued must have been trained on the same."""
        return hashlib.sha256(json.dumps(self._ids, sort_keys=True).encode()).hexdigest()

    def hot(self, clips: Sequence[str]) -> Tensor:
        """`(B, classes)`, 0 and 1."""
        labels = torch.zeros(len(clips), len(self.classes))
        for row, clip in zip(labels, clips, strict=True):
            row[self._ids[clip]] = 1
        return labels


def _first_slots(clips: Dataset) -> Iterator[np.ndarray]:
    """The hotbar columns `(9,)` of each clip's first action; all 0 where the log does not tell the slot."""
    return (np.asarray(row["actions"])[0, HOTBAR] for row in clips.select_columns(["actions"]))


def clips_with_label(clips: Dataset, source: str | None) -> Dataset:
    """The clips that can be used with labels from `source`: with "hotbar", those whose slot is known at their start
    (recorders before 6.11 log none); else all.

    Raises:
        ValueError: "hotbar", and no clip has a slot.
    """
    if source != "hotbar":
        return clips
    chosen = [row for row, slot in enumerate(_first_slots(clips)) if slot.any()]
    if not chosen:
        raise ValueError(f"--labels hotbar: {len(clips)} of {len(clips)} clips have no label: their logs tell no slot")
    return clips.select(chosen)


def read_labels(clips: Dataset, source: str) -> dict[str, list[str]]:
    """Class names of every clip of a split, by "recording_id@start_tick".

    Args:
        clips: a split (`load_clips`).
        source: a JSON file, `{recording_id or "recording_id@start_tick": label or list of labels}` (a clip's own entry
            goes first); or a column of the data set; or "hotbar", the slot held at the clip's start.

    Raises:
        ValueError: no such column or file, or clips without a label (their number, and the first).
    """
    keys = [f"{r}@{t}" for r, t in zip(clips["recording_id"], clips["start_tick"], strict=True)]
    columns = clips.column_names
    values: list[Any]
    if Path(source).suffix == ".json":
        if not Path(source).is_file():
            raise ValueError(f"--labels {source}: no such file")
        table = json.loads(Path(source).read_text())
        if not isinstance(table, dict):
            raise ValueError(f"{source}: expected an object of labels by recording, found {type(table).__name__}")
        values = [table.get(k, table.get(k.rsplit("@", 1)[0])) for k in keys]
    elif source in columns:
        values = list(clips[source])
    elif source == "hotbar":
        values = [f"slot {int(slot.argmax())}" if slot.any() else None for slot in _first_slots(clips)]
    else:
        raise ValueError(f"--labels {source}: neither a .json file nor 'hotbar' nor one of the columns {columns}")
    missing = [k for k, v in zip(keys, values, strict=True) if v is None or v != v]
    if missing:
        raise ValueError(f"--labels {source}: {len(missing)} of {len(keys)} clips have no label, {missing[0]} first")
    return {k: [str(x) for x in v] if isinstance(v, list) else [str(v)] for k, v in zip(keys, values, strict=True)}


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
    for path in sorted(temporary.iterdir()):
        flush(path)
        os.replace(path, folder / path.name)
    temporary.rmdir()


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

    Args:
        model: a head model, not wrapped.
        batches: of this process; every clip once over all processes.
        processor: gives raw units.
        accelerator: processes, device and precision.
        labels: for classification.
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
    for logits, columns in (
        (output.binary_logits, config.binary_columns),
        (output.slot_logits, config.slot_columns),
    ):
        if logits is not None:
            logits = logits.double().cpu()
            if columns == config.binary_columns and config.key_thresholds is not None:
                logits = logits - logits.new_tensor(config.key_thresholds)
            told[..., [config.action_space.index(c) for c in columns]] = logits
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
                accuracies = {"model": float((slots == true).mean()), "repeat_last": float((last == true).mean())}
                horizon["slot"] |= accuracies
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
