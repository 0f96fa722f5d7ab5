"""A decoder from features to frames: it shows what a world model believes, and teaches it nothing.

Letters in the names of tensors as in `modeling_heads_vjepa2_ac.py`; P tubelets of all clips, R x C tokens of a frame, u
frames of a tubelet, p pixels along an edge of a patch. What is decided and why: docs/applications.md, "Frames". Shipped
to the Hub with the models: imports the standard library, torch, transformers and its siblings only.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_heads_vjepa2_ac import VJEPA2ACFrameDecodingConfig
from .modeling_heads_vjepa2_ac import VJEPA2ACHeadLayer, VJEPA2ACHeadPreTrainedModel, check_values
from .modeling_vjepa2_ac import returns_output


@dataclass
class VJEPA2ACFrameDecodingOutput(ModelOutput):
    """What `VJEPA2ACForFrameDecoding` returns.

    Args:
        loss: `()`, mean absolute error of the frames before they are cut off at 0 and 1, float32; with labels only.
        frames: `(B, T * tubelet_size, 3, Y, X)`, float32 in [0, 1].
    """

    loss: Tensor | None = None
    frames: Tensor | None = None


def _starting_at_zero(module: nn.Module) -> nn.Module:
    module.starts_at_zero = True  # type: ignore[assignment]
    return module


class VJEPA2ACSeams(nn.Module):
    """What two small convolutions add to frames that were made patch by patch: nothing at first."""

    def __init__(self, channels: int, width: int = 16):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = _starting_at_zero(nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, frames_PcYX: Tensor) -> Tensor:
        return frames_PcYX + self.conv2(F.gelu(self.conv1(frames_PcYX)))


class VJEPA2ACFrameDecodingHead(nn.Module):
    """Tokens of a tubelet -> its frames: a patch of pixels a token, by a linear map and by what transformer layers add
    to it (nothing at first), seams smoothed.

    The linear map can be fitted at once, by least squares (`train_head.py` does). Each tubelet is decoded alone, as it
    was encoded: nothing of the frames before can stand in for what the features of this step do not say.
    """

    def __init__(self, config: VJEPA2ACFrameDecodingConfig):
        super().__init__()
        width, heads, encoder = config.head_hidden_size, config.head_num_attention_heads, config.encoder_config
        self.grid, self.frames, self.patch = config.grid, encoder.tubelet_size, encoder.patch_size
        self.embed = nn.Linear(config.feature_size, width)
        self.embed_place = nn.Embedding(config.num_tokens, width)
        self.layers = nn.ModuleList([VJEPA2ACHeadLayer(width, heads) for _ in range(config.head_num_hidden_layers)])
        self.norm = nn.LayerNorm(width)
        pixels = self.frames * 3 * self.patch**2
        self.out = _starting_at_zero(nn.Linear(width, pixels))
        self.linear = nn.Linear(config.feature_size, pixels)
        self.seams = VJEPA2ACSeams(3 * self.frames)

    def forward(self, features_BTND: Tensor) -> Tensor:
        """`(B, T, N, D)` -> `(B, T * u, 3, Y, X)`, float32, not yet within [0, 1]."""
        features_PND = features_BTND.flatten(0, 1)
        x_PNW = self.embed(features_PND)
        x_PNW = x_PNW + self.embed_place(torch.arange(x_PNW.shape[1], device=x_PNW.device))
        for layer in self.layers:
            x_PNW = layer(x_PNW)
        x_PNW = self.norm(x_PNW)
        with torch.autocast(x_PNW.device.type, enabled=False):  # bfloat16 has steps of 1/256 between 0.5 and 1
            x_PNW, features_PND = (t.to(self.norm.weight.dtype) for t in (x_PNW, features_PND))
            frames_PcYX = self._arrange(self.linear(features_PND) + self.out(x_PNW))
            frames_PcYX = 0.5 + self.seams(frames_PcYX).float() / 4  # pixels' usual mean and deviation
        return frames_PcYX.unflatten(1, (self.frames, 3)).unflatten(0, features_BTND.shape[:2]).flatten(1, 2)

    def _arrange(self, pixels_PNc: Tensor) -> Tensor:
        """Patches `(P, N, u * 3 * p * p)` at their places: `(P, u * 3, R * p, C * p)`."""
        pixels = pixels_PNc.unflatten(2, (self.frames * 3, self.patch, self.patch)).unflatten(1, self.grid)
        return pixels.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def linear_targets(self, frames_BFcYX: Tensor) -> Tensor:
        """What the linear map would have to say for frames `(B, T * u, 3, Y, X)` in [0, 1]: `(B, T, N, u * 3 * p * p)`,
        the way back of `forward` without what is added."""
        pixels = 4 * (frames_BFcYX - 0.5).unflatten(1, (-1, self.frames)).flatten(2, 3)
        pixels = pixels.unflatten(4, (self.grid[1], self.patch)).unflatten(3, (self.grid[0], self.patch))
        return pixels.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 6).flatten(2, 3)


class VJEPA2ACForFrameDecoding(VJEPA2ACHeadPreTrainedModel):
    """What do features look like? Features of the encoder, or imagined ones, -> frames.

    The world model is never trained through it: features are cut off from their gradients.
    """

    config_class = VJEPA2ACFrameDecodingConfig
    _no_split_modules = [*VJEPA2ACHeadPreTrainedModel._no_split_modules, "VJEPA2ACFrameDecodingHead"]

    def _make_head(self, config: VJEPA2ACFrameDecodingConfig) -> nn.Module:
        return VJEPA2ACFrameDecodingHead(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear | nn.Conv2d) and getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight)

    @returns_output
    def forward(
        self,
        pixel_values_videos: Tensor | None = None,
        features: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> VJEPA2ACFrameDecodingOutput:
        """
        Args:
            pixel_values_videos: `(B, frames, 3, Y, X)`, normalised pixels; or
            features: `(B, T, N, D)` of `VJEPA2ACModel.encode`, `predict` or `rollout`, instead.
            labels: `(B, T * tubelet_size, 3, Y, X)`, the frames: uint8, or floating point in [0, 1] (not normalised).

        Raises:
            ValueError: shapes or values that do not fit.
        """
        features = self.read_features(pixel_values_videos, features, min_steps=1)
        frames = self.head(features.detach())
        # Before they are cut off at 0 and 1, where gradients would end.
        loss = None if labels is None else F.l1_loss(frames, self._check_frames(labels, frames))
        return VJEPA2ACFrameDecodingOutput(loss, frames.clamp(0, 1))

    @staticmethod
    def _check_frames(labels: Tensor, frames: Tensor) -> Tensor:
        """Labels as float32 in [0, 1] where the frames are."""
        if labels.shape != frames.shape:
            raise ValueError(
                f"labels must be {tuple(frames.shape)} (batch, frames, 3, height, width), found {tuple(labels.shape)}"
            )
        if labels.dtype == torch.uint8:
            return labels.to(frames.device).float() / 255
        if not labels.is_floating_point():
            raise ValueError(f"labels must be frames of type uint8 or floating point, found {labels.dtype}")
        labels = labels.to(frames.device).float()
        message = "labels must be frames in [0, 1], not normalised pixels"
        ends = labels.aminmax()
        fine = (ends.min >= 0) & (ends.max <= 1)
        check_values(fine, message, lambda: f"{message}, found {float(ends.min):g} to {float(ends.max):g}")
        return labels


VJEPA2ACForFrameDecoding.register_for_auto_class("AutoModel")

__all__ = ["VJEPA2ACForFrameDecoding", "VJEPA2ACFrameDecodingOutput"]
