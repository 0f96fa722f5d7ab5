"""Clips, actions and states in raw units -> the model's tensors (docs/data.md, "Normalisation" and "Geometry").

Shipped to the Hub with the model: imports the standard library, numpy, torch, transformers and its siblings only. It
does not need torchvision.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from .actions_vjepa2_ac import (
    ACTION_COLUMNS,
    CONTINUOUS_COLUMNS,
    ActionStatistics,
    resolve_action_space,
    wrap_degrees,
)
from .configuration_encoder_vjepa2_ac import Resolution, as_resolution, frame_shape

logger = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESIZE_MODES = ("crop", "squash")
YAW_SCALE, PITCH_SCALE = 180.0, 90.0


def add_view_changes(view: Tensor, changes: Tensor) -> Tensor:
    """Where view changes lead, one after the other: yaw wraps at +-180 degrees, pitch stops at +-90.

    Args:
        view: `(..., 2)`, yaw and pitch in degrees.
        changes: `(..., M, 2)`, likewise, the first one from `view`.

    Returns:
        `(..., M, 2)`, degrees: the view after each change.
    """
    found = []
    for change in changes.unbind(dim=-2):
        yaw, pitch = (view + change).unbind(dim=-1)
        view = torch.stack([wrap_degrees(yaw), pitch.clamp(-PITCH_SCALE, PITCH_SCALE)], dim=-1)
        found.append(view)
    return torch.stack(found, dim=-2) if found else changes


def resize_frames(frames: Tensor, resolution: Resolution, mode: str = "crop") -> Tensor:
    """Scale frames to one size with antialiasing.

    Args:
        frames: `(frames, 3, Y, X)`, uint8.
        resolution: side of the result in pixels, or (height, width).
        mode: "crop" scales the frame until it covers the result and cuts the centre: for a square, the shortest edge
            becomes its side (nothing of Minecraft's hotbar is lost); "squash" scales the whole frame.

    Returns:
        `(frames, 3, height, width)` of the result, uint8.

    Raises:
        ValueError: another type, shape or mode.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3:
        raise ValueError(f"expected uint8 frames (frames, 3, Y, X), found {frames.dtype} {tuple(frames.shape)}")
    if mode not in RESIZE_MODES:
        raise ValueError(f"resize_mode must be one of {RESIZE_MODES}, found {mode!r}")
    height, width = frames.shape[-2:]
    size = wanted = frame_shape(as_resolution(resolution))
    if (height, width) == wanted:
        return frames
    if mode == "crop":
        # The side that needs the larger scale decides: compared as products of whole numbers, so that none is lost.
        decides = 0 if wanted[0] * width >= wanted[1] * height else 1
        scaled, by = wanted[decides], (height, width)[decides]
        size = (int(scaled * height / by), int(scaled * width / by))
    if size != (height, width):
        frames = F.interpolate(frames, size=size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (round((side - kept) / 2) for side, kept in zip(size, wanted, strict=True))
    return frames[..., top : top + wanted[0], left : left + wanted[1]].contiguous()


class VJEPA2ACProcessor(ProcessorMixin):
    """Prepares clips for `VJEPA2ACModel`; everything a number needs to be understood is in its saved configuration.

    Args:
        resolution: side of the model's frames in pixels, or (height, width).
        resize_mode: "crop" or "squash" (see `resize_frames`).
        fps: frames a second of a clip.
        frames_per_clip: frames of a clip.
        tubelet_size: frames of a step.
        action_space: a name of `ACTION_SPACES` or an ordered list of columns.
        action_statistics: `ActionStatistics.to_dict()` of the training split; None: fit or set them before use.
        pixel_mean: RGB mean after division by 255 (ImageNet's).
        pixel_std: RGB standard deviation, likewise.
        native_fps: frames (ticks) a second of the recordings that clips are cut from.
    """

    def __init__(
        self,
        resolution: int | Sequence[int] = 256,
        resize_mode: str = "crop",
        fps: int = 5,
        frames_per_clip: int = 16,
        tubelet_size: int = 2,
        action_space: str | Sequence[str] = "vpt-13",
        action_statistics: dict | None = None,
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
        native_fps: float = 20,
    ):
        super().__init__()
        if resize_mode not in RESIZE_MODES:
            raise ValueError(f"resize_mode must be one of {RESIZE_MODES}, found {resize_mode!r}")
        if frames_per_clip % tubelet_size:
            raise ValueError(f"frames_per_clip {frames_per_clip} is not a multiple of tubelet_size {tubelet_size}")
        self.resolution = as_resolution(resolution)
        self.resize_mode = resize_mode
        self.fps = fps
        self.native_fps = native_fps
        self.frames_per_clip = frames_per_clip
        self.tubelet_size = tubelet_size
        self.action_space = resolve_action_space(action_space)
        self.pixel_mean = list(pixel_mean)
        self.pixel_std = list(pixel_std)
        self.action_statistics: dict | None = None
        if action_statistics is not None:
            self.set_action_statistics(action_statistics)

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Height and width of the model's frames in pixels."""
        return frame_shape(self.resolution)

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values_videos", "actions", "states"]

    @staticmethod
    def validate_init_kwargs(processor_config: dict, valid_kwargs: Sequence[str]) -> tuple[dict, dict]:
        """As in transformers, but unknown keys of a saved configuration are refused by name."""
        unused, valid = ProcessorMixin.validate_init_kwargs(processor_config, valid_kwargs)
        unknown = sorted(k for k in unused if not k.startswith("_") and k != "trust_remote_code")
        if unknown:
            raise ValueError(f"processor_config.json: unknown keys {unknown}; known are {sorted(valid_kwargs)}")
        return unused, valid

    def set_action_statistics(self, statistics: ActionStatistics | dict) -> None:
        """Use these statistics from now on; they are saved with the processor, as JSON."""
        if isinstance(statistics, dict):
            statistics = ActionStatistics.from_dict(statistics)
        constant = [
            c for c, s in zip(CONTINUOUS_COLUMNS, statistics.std, strict=True) if s == 0 and c in self.action_space
        ]
        if constant:
            logger.warning("action columns %s never change in the training data: they are only centred", constant)
        self.action_statistics = statistics.to_dict()

    def __call__(
        self,
        videos: Any = None,
        actions: Any = None,
        states: Any = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """
        Args:
            videos: a clip or a list of clips: uint8 tensors `(frames, 3, Y, X)`, uint8 arrays `(frames, Y, X, 3)` or
                `(frames, 3, Y, X)`, or torchcodec `VideoDecoder`s (all of their frames).
            actions: `(B, T-1, 38)`, all columns, or `(B, T-1, A)`, those of the action space; raw units.
            states: `(B, T, 2)`, yaw and pitch in degrees.
            return_tensors: only "pt".

        Returns:
            `pixel_values_videos` `(B, frames, 3, height, width)`, `actions` `(B, T-1, A)` and `states`
            `(B, T, 2)`, float32, each where it was given.
        """
        if return_tensors not in ("pt", None):
            raise ValueError(f"return_tensors must be 'pt', found {return_tensors!r}")
        data: dict[str, Tensor] = {}
        if videos is not None:
            data["pixel_values_videos"] = self.normalize_pixels(self.prepare_frames(videos))
        if actions is not None:
            data["actions"] = self.normalize_actions(actions)
        if states is not None:
            data["states"] = self.normalize_states(states)
        return BatchFeature(data)

    def prepare_frames(self, videos: Any) -> Tensor:
        """Clips as one uint8 tensor `(B, frames, 3, height, width)`."""
        if not isinstance(videos, (list, tuple)):
            videos = [videos] if getattr(videos, "ndim", 4) == 4 else list(videos)
        clips = [self.resize(v) for v in videos]
        lengths = sorted({len(c) for c in clips})
        if len(lengths) != 1 or lengths[0] % self.tubelet_size or lengths[0] == 0:
            raise ValueError(
                f"clips must have the same number of frames, a multiple of tubelet_size {self.tubelet_size}; "
                f"found {lengths}"
            )
        return torch.stack(clips)

    def resize(self, video: Any) -> Tensor:
        """One clip, as `__call__` takes it, of any number of frames, as uint8 `(frames, 3, height, width)`."""
        return resize_frames(self._as_frames(video), self.resolution, self.resize_mode)

    @staticmethod
    def _as_frames(video: Any) -> Tensor:
        if hasattr(video, "get_frames_in_range"):
            video = video.get_frames_in_range(0, len(video)).data
        frames = torch.as_tensor(video)
        if frames.ndim == 4 and frames.shape[1] != 3 and frames.shape[-1] == 3:
            frames = frames.permute(0, 3, 1, 2)
        if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8:
            raise ValueError(
                f"a clip must be uint8 frames (frames, 3, height, width), found {frames.dtype} {tuple(frames.shape)}"
            )
        return frames

    def normalize_pixels(self, frames: Tensor) -> Tensor:
        """uint8 `(..., 3, Y, X)` -> float32, divided by 255 and standardised."""
        # On a CPU this is half of a loader's work. In place: fresh memory costs more than the arithmetic. Constants of
        # a whole frame in the frames' own layout (decoders give interleaved channels): no inner loop of three.
        frame = torch.empty_like(frames[(0,) * (frames.ndim - 3)], dtype=torch.float32)
        # They come as numbers with the kernels: a GPU would have to catch up before it copied them from host memory.
        mean, std = torch.empty_like(frame), torch.empty_like(frame)
        for constant, values in ((mean, self.pixel_mean), (std, self.pixel_std)):
            for channel, value in enumerate((np.array(values, np.float32) * np.float32(255)).tolist()):
                constant[channel].fill_(value)
        return frames.to(torch.float32, copy=True).sub_(mean).div_(std)

    def normalize_actions(self, actions: Any) -> Tensor:
        """Raw actions `(..., 38)` or `(..., A)` -> the action space's columns `(..., A)`, continuous ones standardised.

        Raises:
            ValueError: another number of columns, values that are not finite, or no statistics.
        """
        values = torch.as_tensor(np.asarray(actions) if not isinstance(actions, Tensor) else actions).double()
        columns = values.shape[-1] if values.ndim else 0
        if columns == len(ACTION_COLUMNS):
            values = values[..., [ACTION_COLUMNS.index(c) for c in self.action_space]]
        elif columns != len(self.action_space):
            raise ValueError(
                f"actions must have all {len(ACTION_COLUMNS)} columns or the {len(self.action_space)} of the action "
                f"space, found {columns}"
            )
        if not torch.isfinite(values).all():
            raise ValueError("actions hold values that are not finite")
        mean, std = self._column_statistics(values.device)
        return ((values - mean) / std).float()

    def denormalize_actions(self, actions: Tensor) -> Tensor:
        """The action space's columns in raw units (pixels, degrees), float64; inverse of `normalize_actions`."""
        if actions.shape[-1] != len(self.action_space):
            raise ValueError(f"actions must have {len(self.action_space)} columns, found {actions.shape[-1]}")
        mean, std = self._column_statistics(actions.device)
        return actions.double() * std + mean

    def _column_statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation by column of the action space: (0, 1) for binary and for constant columns."""
        mean = torch.zeros(len(self.action_space), dtype=torch.float64, device=device)
        std = torch.ones_like(mean)
        for i, column in enumerate(self.action_space):
            if column not in CONTINUOUS_COLUMNS:
                continue
            if self.action_statistics is None:
                raise ValueError(
                    f"action statistics are missing: column {column!r} cannot be normalised. Set them with "
                    "processor.set_action_statistics(...), for instance from a data set's action_stats.json"
                )
            at = CONTINUOUS_COLUMNS.index(column)
            mean[i] = self.action_statistics["mean"][at]
            std[i] = self.action_statistics["std"][at] or 1.0
        return mean, std

    def normalize_states(self, states: Any) -> Tensor:
        """Degrees `(..., 2)` -> (yaw wrapped to [-180, 180) / 180, pitch / 90), float32."""
        values = torch.as_tensor(np.asarray(states) if not isinstance(states, Tensor) else states).double()
        if values.ndim == 0 or values.shape[-1] != 2:
            raise ValueError(f"states must have 2 columns (yaw, pitch), found shape {tuple(values.shape)}")
        if not torch.isfinite(values).all():
            raise ValueError("states hold values that are not finite")
        return torch.stack([wrap_degrees(values[..., 0]) / YAW_SCALE, values[..., 1] / PITCH_SCALE], dim=-1).float()

    def denormalize_states(self, states: Tensor) -> Tensor:
        """Degrees `(..., 2)`, float64; inverse of `normalize_states` up to whole turns of yaw."""
        return states.double() * torch.tensor([YAW_SCALE, PITCH_SCALE], dtype=torch.float64, device=states.device)

    def integrate_states(self, states: Tensor, actions: Tensor) -> Tensor:
        """States of an imagined future: the last known one plus the actions' yaw and pitch changes.

        Args:
            states: `(B, S, 2)` known states of steps 0..S-1, normalised; or `(B, 2)`, the state of step 0.
            actions: `(B, M, A)`, normalised; action t leads from step t to t+1.

        Returns:
            `(B, M + 1, 2)`, normalised: the known states, then those of steps S..M; yaw wrapped, pitch clamped to
            [-90, 90] degrees.
        """
        known = states[:, None] if states.ndim == 2 else states
        if known.ndim != 3 or known.shape[-1] != 2 or actions.ndim != 3 or len(known) != len(actions):
            raise ValueError(
                f"states must be (batch, steps, 2) and actions (batch, steps, columns), found "
                f"{tuple(states.shape)} and {tuple(actions.shape)}"
            )
        missing = [c for c in ("yaw_delta", "pitch_delta") if c not in self.action_space]
        if missing:
            raise ValueError(f"states cannot be integrated: the action space lacks {missing}")
        raw = self.denormalize_actions(actions)
        at = [self.action_space.index(c) for c in ("yaw_delta", "pitch_delta")]
        future = add_view_changes(self.denormalize_states(known[:, -1]), raw[:, known.shape[1] - 1 :, at])
        scale = torch.tensor([YAW_SCALE, PITCH_SCALE], dtype=torch.float64, device=known.device)
        return torch.cat([known, (future / scale).to(known.dtype)], dim=1)


VJEPA2ACProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["VJEPA2ACProcessor", "add_view_changes", "resize_frames", "wrap_degrees"]
