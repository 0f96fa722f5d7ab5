"""Clips of a data set, checked against model and processor before anything expensive, and encoded batch by batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..actions_vjepa2_ac import ACTION_COLUMNS
from ..loading.clip_rules import choose_clips
from ..loading.clips import COLUMNS, clip_name, decode_clip
from ..modeling_heads_vjepa2_ac import VJEPA2ACHeadPreTrainedModel
from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from ..records import weights_checksum


@dataclass(frozen=True)
class ClipRecords:
    """What a split holds beside the videos, in raw units.

    Args:
        names: `(clips,)`, row, recording and start tick, for messages and captions.
        sessions: `(clips,)`, session ids.
        players: `(clips,)`, player ids.
        actions: `(clips, T-1, 38)`, float32, all of `ACTION_COLUMNS`.
        states: `(clips, T, 2)`, float32, yaw and pitch in degrees.
    """

    names: list[str]
    sessions: list[str]
    players: list[str]
    actions: Tensor
    states: Tensor

    @property
    def yaw_deltas(self) -> Tensor:
        """`(clips, T-1)`, yaw change of each action in degrees."""
        return self.actions[..., ACTION_COLUMNS.index("yaw_delta")]


def check_model_and_processor(model: VJEPA2ACModel, processor: VJEPA2ACProcessor) -> None:
    """Raise a ValueError where the processor's tensors are not the ones that the model was made for."""
    config, encoder = model.config, model.config.encoder_config
    size = "encoder_config.crop_size" if config.frame_size is None else "frame_size"
    pairs: list[tuple[str, Any, str, Any]] = [
        ("action_dim", config.action_dim, "number of columns of action_space", len(processor.action_space)),
        ("frames_per_clip", config.frames_per_clip, "frames_per_clip", processor.frames_per_clip),
        ("encoder_config.tubelet_size", encoder.tubelet_size, "tubelet_size", processor.tubelet_size),
        (size, config.resolution, "resolution", processor.resolution),
    ]
    if config.action_space is not None:
        pairs.insert(1, ("action_space", config.action_space, "action_space", processor.action_space))
    for ours, expected, theirs, found in pairs:
        if expected != found:
            raise ValueError(f"the model's {ours} is {expected}, but the processor's {theirs} is {found}")


def check_same_steps(ours: VJEPA2ACProcessor, other: VJEPA2ACProcessor) -> None:
    """Raise a ValueError where steps or actions of two models are not the same."""
    for name in ("action_space", "native_fps", "fps", "tubelet_size"):
        one, two = getattr(ours, name), getattr(other, name)
        if one != two:
            raise ValueError(f"models that work together need one {name}: the first has {one}, another {two}")


def check_head_fits(
    head: VJEPA2ACHeadPreTrainedModel | VJEPA2ACModel, model: VJEPA2ACModel, what: str = "the head"
) -> None:
    """Raise a ValueError, with both values, where a head or another world model (`what`) is over other features."""
    own = head.vjepa2_ac.encoder if isinstance(head, VJEPA2ACHeadPreTrainedModel) else head.encoder
    for field in ("grid", "feature_size", "encoding", "normalize_features", "frame_shape"):
        found, expected = getattr(head.config, field), getattr(model.config, field)
        if found != expected:
            raise ValueError(f"{what}'s {field} is {found}, the model's {expected}")
    if own is not model.encoder:
        found, expected = (weights_checksum(encoder) for encoder in (own, model.encoder))
        if found != expected:
            raise ValueError(f"{what} was trained on another encoder, checksum {found}, the model's {expected}")


def check_columns(dataset: Any) -> None:
    """Raise a ValueError where a data set lacks columns or has fewer than two clips."""
    missing = [c for c in COLUMNS if c not in dataset.column_names]
    if missing:
        raise ValueError(f"the data set lacks the columns {missing}: found {dataset.column_names}")
    if len(dataset) < 2:
        raise ValueError(f"an evaluation needs at least 2 clips, found {len(dataset)}")


def spread(count: int, wanted: int | None) -> list[int]:
    """`wanted` of `count` row numbers, evenly spaced (neighbouring rows mostly share a session); None: all."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return [int(i) for i in np.linspace(0, count - 1, wanted).round()]


def choose_rows(dataset: Any, wanted: int | None, rule: str | None) -> list[int]:
    """Row numbers to evaluate: a rule's first `wanted` (`choose_clips`), in its order; without a rule `spread`."""
    return spread(len(dataset), wanted) if rule is None else choose_clips(dataset, rule, wanted)


def read_records(dataset: Any, processor: VJEPA2ACProcessor) -> ClipRecords:
    """Actions, states, sessions and players of a whole split, with the first clip's video checked too.

    Args:
        dataset: rows with `COLUMNS`, the column `video` cast to `datasets.Video(decode=False)`.
        processor: its `frames_per_clip` and `tubelet_size` give the number of steps T.

    Raises:
        ValueError: clips of another length, which the message names; a first clip of another frame rate.
    """
    check_columns(dataset)
    steps = processor.frames_per_clip // processor.tubelet_size
    shapes = {"actions": (steps - 1, len(ACTION_COLUMNS)), "states": (steps, 2)}
    light = [column for column in COLUMNS if column != "video"]
    names, sessions, players = [], [], []
    values: dict[str, list[Tensor]] = {"actions": [], "states": []}
    for row, example in enumerate(dataset.select_columns(light)):
        names.append(f"clip {row} ({clip_name(example)})")
        sessions.append(str(example["session_id"]))
        players.append(str(example["player_id"]))
        for column, shape in shapes.items():
            array = np.asarray(example[column], dtype=np.float32)
            if array.shape != shape:
                raise ValueError(
                    f"{names[-1]}: {column} must be {shape} for the processor's frames_per_clip "
                    f"{processor.frames_per_clip} and tubelet_size {processor.tubelet_size}, found {array.shape}"
                )
            values[column].append(torch.from_numpy(array))
    decode_clip(dataset[0]["video"], names[0], processor.frames_per_clip, processor.fps)
    return ClipRecords(names, sessions, players, torch.stack(values["actions"]), torch.stack(values["states"]))


def encoded_batches(
    model: VJEPA2ACModel, processor: VJEPA2ACProcessor, dataset: Any, names: list[str], batch_size: int
) -> Iterator[Tensor]:
    """Features `(B, T, N, D)` of a split's clips in order, on the model's device; each clip is encoded once.

    Args:
        model: a `VJEPA2ACModel`.
        processor: its processor.
        dataset: rows with a column `video`, cast to `datasets.Video(decode=False)`.
        names: what messages call the clips.
        batch_size: clips in a batch.
    """
    for start in range(0, len(dataset), batch_size):
        videos = dataset[start : start + batch_size]["video"]
        frames = [decode_clip(v, names[start + i], processor.frames_per_clip) for i, v in enumerate(videos)]
        yield model.encode(processor(videos=frames)["pixel_values_videos"].to(model.device))
