"""Labels of clips, for classification: from a file, a column or the log, as class numbers (docs/applications.md)."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..actions_vjepa2_ac import ACTION_COLUMNS

HOTBAR = [ACTION_COLUMNS.index(f"hotbar.{i}") for i in range(9)]


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
        return self.hot(clips) if self.several else torch.tensor([self._ids[c][0] for c in clips])

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
