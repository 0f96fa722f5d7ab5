"""What an inverse dynamics head tells of clips, as whole raw actions with confidences."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from ..actions_vjepa2_ac import ACTION_COLUMNS, CONTINUOUS_COLUMNS, DEGREES_PER_PIXEL, wrap_degrees
from ..configuration_heads_vjepa2_ac import HOTBAR_COLUMNS, VJEPA2ACInverseDynamicsConfig
from ..modeling_heads_vjepa2_ac import VJEPA2ACActionHeadOutput, VJEPA2ACForInverseDynamics
from ..planning.actions import COLUMN, VIEW_OF_MOUSE
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from ..recordings.clips import ClipSpec
from ..records import weights_checksum

KEY_DECISIONS = ("likelier", "balanced")
SLOT = "hotbar"  # the confidence of the nine hotbar columns together


class Labeller:
    """An inverse dynamics head with its processor: frames -> raw actions and confidences.

    Args:
        model: the head; its configuration holds the action statistics.
        processor: the head's own.
        native_fps: frames (ticks) a second of the videos; None: the processor's, of the recordings trained on.
        min_confidence: actions of a lower confidence are marked unsure; 0 marks none.
        confidence_columns: whose confidences count for that; None: those of all in `columns`.
        keys: "likelier": a key is pressed where that is likelier than not, after the shift of `pos_weight` is taken
            back, and the slot changes where the new one is; "balanced": where the key's logit is above its threshold,
            and to the likeliest slot, as `decode_actions` and the metrics have it.
        name: what messages and labels call the model.

    Raises:
        ValueError: a processor of another geometry, action space or statistics than the head's; a head without
            statistics; an action space with some hotbar columns but not all; values out of range.

    Attributes:
        columns: what has a confidence: keys, buttons and `gui_open` one by one, and last `hotbar`, the slot.
    """

    def __init__(
        self,
        model: VJEPA2ACForInverseDynamics,
        processor: VJEPA2ACProcessor,
        *,
        native_fps: float | None = None,
        min_confidence: float = 0.0,
        confidence_columns: Sequence[str] | None = None,
        keys: str = "likelier",
        name: str = "model",
    ):
        config: Any = model.config
        _check_pair(name, config, processor)
        if keys not in KEY_DECISIONS:
            raise ValueError(f"keys must be one of {KEY_DECISIONS}, found {keys!r}")
        if not 0 <= min_confidence <= 1:
            raise ValueError(f"min_confidence must be in [0, 1], found {min_confidence}")
        self.columns: list[str] = [*config.binary_columns, *([SLOT] if config.slot_columns else [])]
        counted = self.columns if confidence_columns is None else list(confidence_columns)
        unknown = [c for c in counted if c not in self.columns]
        if unknown:
            raise ValueError(
                f"confidence_columns: {unknown} have no confidence, those of {name} that have one are {self.columns}"
            )
        if min_confidence and not counted:
            raise ValueError(
                f"min_confidence is {min_confidence}, but no column has a confidence that counts: {name} tells "
                f"{config.action_space}, confidence_columns are {counted}"
            )
        self.model, self.processor, self.name = model.eval(), processor, name
        self.min_confidence, self.keys = min_confidence, keys
        self.counted = [self.columns.index(c) for c in counted]
        native_fps = float(processor.native_fps if native_fps is None else native_fps)
        self.spec = ClipSpec(
            native_fps=native_fps,
            fps=processor.fps,
            frames_per_clip=config.frames_per_clip,
            tubelet_size=processor.tubelet_size,
        )
        self.settings: dict[str, Any] = {
            "weights": weights_checksum(model),
            "action_space": config.action_space,
            "native_fps": native_fps,
            "fps": processor.fps,
            "tubelet_size": processor.tubelet_size,
            "frames_per_clip": config.frames_per_clip,
            "resolution": processor.resolution,
            "resize_mode": processor.resize_mode,
            "dtype": str(model.dtype).removeprefix("torch."),
            "keys": keys,
            "min_confidence": min_confidence,
            "confidence_columns": counted,
        }

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str = "cpu", dtype: str = "float32", **options: Any) -> Any:
        """The head and the processor of a folder or repository.

        Raises:
            ValueError: a model of another kind, such as a world model, whose head would be new and untrained.
        """
        kind = AutoConfig.from_pretrained(name).model_type
        if kind != VJEPA2ACInverseDynamicsConfig.model_type:
            raise ValueError(
                f"{name}: expected a trained inverse dynamics head ({VJEPA2ACInverseDynamicsConfig.model_type}), found "
                f"{kind}"
            )
        model = VJEPA2ACForInverseDynamics.from_pretrained(name, dtype=getattr(torch, dtype)).to(device)
        return cls(model, VJEPA2ACProcessor.from_pretrained(name), name=str(name), **options)

    @torch.no_grad()
    def tell(self, frames: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The actions between tubelets.

        Args:
            frames: uint8 `(B, frames, 3, height, width)`.

        Returns:
            actions: float64 `(B, T-1, 38)`, raw, without the slot (`choose_slot`). A mouse or view column that the
                action space lacks follows from the other; other columns that it lacks are 0.
            confidence: float32 `(B, T-1, columns)`, `self.columns` but the slot: probability of the answer told.
            slots: float32 `(B, T-1, 9)`, probability of each slot; `(B, T-1, 0)` where the action space has none.
        """
        pixels = self.processor.normalize_pixels(frames.to(self.model.device)).to(self.model.dtype)
        output = self.model(pixel_values_videos=pixels)
        pressed, confidence, slots = self._keys(output)
        decoded = self.model.decode_actions(output)
        actions = np.zeros((*confidence.shape[:2], len(ACTION_COLUMNS)))
        for column, values in decoded.items():
            if column in CONTINUOUS_COLUMNS:
                actions[..., COLUMN[column]] = values.cpu()
        actions[..., [COLUMN[c] for c in self.model.config.binary_columns]] = pressed
        self._complete(actions)
        if not all(np.isfinite(values).all() for values in (actions, confidence, slots)):
            raise FloatingPointError(
                f"{self.name}: the head tells values that are not finite (dtype {self.model.dtype})"
            )
        return actions, confidence, slots

    def choose_slot(self, probabilities: Sequence[float], before: int | None) -> int:
        """The slot of an action, from the probabilities of all and the slot of the action before."""
        likeliest = int(np.argmax(probabilities))
        # A slot that the pictures do not show is guessed anew at every step: each change would be a key press.
        stays = self.keys == "likelier" and before is not None and probabilities[likeliest] <= 0.5
        return before if stays and before is not None else likeliest

    def _keys(self, output: VJEPA2ACActionHeadOutput) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which binary columns are told to be 1, the probability of what is told, and that of each slot."""
        config = self.model.config
        some = next(p for p in (output.continuous, output.binary_logits, output.slot_logits) if p is not None)
        pressed = confidence = slots = np.zeros((*some.shape[:2], 0), np.float32)
        if output.binary_logits is not None:
            logits = output.binary_logits.double()
            # Cross-entropy with weight w on pressed keys is least at logit(p) + log(w), not at logit(p).
            weight = config.pos_weight or [1.0] * logits.shape[-1]
            unshifted = logits - logits.new_tensor(weight).log()
            thresholds = logits.new_tensor(config.key_thresholds or [0.0] * logits.shape[-1])
            told = unshifted > 0 if self.keys == "likelier" else logits > thresholds
            pressed = told.cpu().float().numpy()
            confidence = torch.where(told, unshifted, -unshifted).sigmoid().float().cpu().numpy()
        if output.slot_logits is not None:
            at = [config.slot_columns.index(c) for c in HOTBAR_COLUMNS]
            slots = output.slot_logits.double().softmax(dim=-1)[..., at].float().cpu().numpy()
        return pressed, confidence, slots

    def _complete(self, actions: np.ndarray) -> None:
        """Fill mouse or view columns that the action space lacks; yaw within half a turn. In place."""
        space = self.model.config.action_space
        world = actions[..., COLUMN["gui_open"]] == 0
        for mouse, view in VIEW_OF_MOUSE.items():
            pixels, degrees = actions[..., COLUMN[mouse]], actions[..., COLUMN[view]]
            if view not in space and mouse in space:
                degrees[:] = np.where(world, pixels * DEGREES_PER_PIXEL, 0.0)
            elif mouse not in space and view in space:
                pixels[:] = degrees / DEGREES_PER_PIXEL
        yaw = actions[..., COLUMN["yaw_delta"]]
        yaw[:] = wrap_degrees(yaw)


def _check_pair(name: str, config: VJEPA2ACInverseDynamicsConfig, processor: VJEPA2ACProcessor) -> None:
    encoder = config.encoder_config
    for field, of_head, of_processor in (
        ("resolution", config.resolution, processor.resolution),
        ("tubelet_size", encoder.tubelet_size, processor.tubelet_size),
        ("frames_per_clip", config.frames_per_clip, processor.frames_per_clip),
        ("action_space", config.action_space, processor.action_space),
        ("action_statistics", config.action_statistics, processor.action_statistics),
    ):
        if of_head != of_processor:
            raise ValueError(f"{name}: {field} of the head is {of_head}, of its processor {of_processor}")
    if config.continuous_columns and config.action_statistics is None:
        raise ValueError(
            f"{name}: action_statistics is None: the columns {config.continuous_columns} have no raw units; save "
            "the head with those that it was trained with"
        )
    slots = [c for c in config.binary_columns if c in HOTBAR_COLUMNS]
    if slots:
        raise ValueError(f"{name}: a log needs all nine hotbar columns or none, the action space has {slots}")
