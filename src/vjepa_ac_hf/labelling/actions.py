"""What an inverse dynamics head tells of clips, as whole raw actions with confidences."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from ..actions_vjepa2_ac import ACTION_COLUMNS, CONTINUOUS_COLUMNS
from ..configuration_heads_vjepa2_ac import HOTBAR_COLUMNS, VJEPA2ACInverseDynamicsConfig
from ..data.clips import ClipSpec
from ..data.events import DEGREES_PER_PIXEL
from ..modeling_heads_vjepa2_ac import VJEPA2ACActionHeadOutput, VJEPA2ACForInverseDynamics
from ..planning.actions import COLUMN, VIEW_OF_MOUSE
from ..processing_vjepa2_ac import VJEPA2ACProcessor, wrap_degrees
from ..training.run_log import weights_checksum

KEY_DECISIONS = ("likelier", "balanced")
SLOT = "hotbar"  # the confidence of the nine hotbar columns together


class Labeller:
    """An inverse dynamics head with its processor: frames -> raw actions and confidences.

    Args:
        model: the head; its configuration holds the action statistics.
        processor: the head's own.
        native_fps: frames (ticks) a second of the videos.
        min_confidence: actions of a lower confidence are marked unsure; 0 marks none.
        keys: "likelier": a key is pressed where that is likelier than not, after the shift of `pos_weight` is taken
            back; "balanced": where its logit is above 0, as `decode_actions` and the metrics have it.
        name: what messages and labels call the model.

    Raises:
        ValueError: a processor of another geometry, action space or statistics than the head's; a head without
            statistics; an action space with some hotbar columns but not all; values out of range.
    """

    def __init__(
        self,
        model: VJEPA2ACForInverseDynamics,
        processor: VJEPA2ACProcessor,
        *,
        native_fps: float = 20.0,
        min_confidence: float = 0.0,
        keys: str = "likelier",
        name: str = "model",
    ):
        config: Any = model.config
        _check_pair(name, config, processor)
        if keys not in KEY_DECISIONS:
            raise ValueError(f"keys must be one of {KEY_DECISIONS}, found {keys!r}")
        if not 0 <= min_confidence <= 1:
            raise ValueError(f"min_confidence must be in [0, 1], found {min_confidence}")
        # What has a confidence: keys, buttons, gui_open one by one, the slot; continuous columns have none.
        self.columns: list[str] = [*config.binary_columns, *([SLOT] if config.slot_columns else [])]
        if min_confidence and not self.columns:
            raise ValueError(
                f"min_confidence is {min_confidence}, but {name} tells {config.action_space} only: there is no "
                "confidence of a continuous column"
            )
        self.model, self.processor, self.name = model.eval(), processor, name
        self.min_confidence, self.keys = min_confidence, keys
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
    def tell(self, frames: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The actions between tubelets.

        Args:
            frames: uint8 `(B, frames, 3, resolution, resolution)`.

        Returns:
            actions: float64 `(B, T-1, 38)`, raw. A mouse or view column that the action space lacks follows from the
                other; other columns that it lacks are 0, hotbar columns too.
            confidence: float32 `(B, T-1, columns)`, `self.columns`: probability of the answer that was told.
        """
        pixels = self.processor.normalize_pixels(frames.to(self.model.device)).to(self.model.dtype)
        output = self.model(pixel_values_videos=pixels)
        pressed, confidence = self._keys(output)
        decoded = self.model.decode_actions(output)
        actions = np.zeros((*confidence.shape[:2], len(ACTION_COLUMNS)))
        for column, values in decoded.items():
            if column in CONTINUOUS_COLUMNS:
                actions[..., COLUMN[column]] = values.cpu()
            elif column == SLOT:
                actions[..., COLUMN["hotbar.0"] :][..., : len(HOTBAR_COLUMNS)] = np.eye(len(HOTBAR_COLUMNS))[
                    values.cpu()
                ]
        actions[..., [COLUMN[c] for c in self.model.config.binary_columns]] = pressed
        self._complete(actions)
        if not np.isfinite(actions).all() or not np.isfinite(confidence).all():
            raise FloatingPointError(
                f"{self.name}: the head tells values that are not finite (dtype {self.model.dtype})"
            )
        return actions, confidence

    def _keys(self, output: VJEPA2ACActionHeadOutput) -> tuple[np.ndarray, np.ndarray]:
        """Which binary columns are told to be 1, and the probability of what is told, slot included."""
        some = next(p for p in (output.continuous, output.binary_logits, output.slot_logits) if p is not None)
        pressed, confidence = np.zeros((*some.shape[:2], 0)), []
        if output.binary_logits is not None:
            logits = output.binary_logits.double()
            # Cross-entropy with weight w on pressed keys is least at logit(p) + log(w), not at logit(p).
            weight = self.model.config.pos_weight or [1.0] * logits.shape[-1]
            unshifted = logits - logits.new_tensor(weight).log()
            told = (unshifted if self.keys == "likelier" else logits) > 0
            pressed = told.cpu().double().numpy()
            confidence.append(torch.where(told, unshifted, -unshifted).sigmoid())
        if output.slot_logits is not None:
            confidence.append(output.slot_logits.double().softmax(dim=-1).amax(dim=-1, keepdim=True))
        if not confidence:
            return pressed, np.zeros((*some.shape[:2], 0), np.float32)
        return pressed, torch.cat(confidence, dim=-1).float().cpu().numpy()

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
        yaw[:] = wrap_degrees(torch.from_numpy(yaw.copy())).numpy()


def _check_pair(name: str, config: VJEPA2ACInverseDynamicsConfig, processor: VJEPA2ACProcessor) -> None:
    encoder = config.encoder_config
    for field, of_head, of_processor in (
        ("resolution", encoder.crop_size, processor.resolution),
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
