"""Features of a frozen encoder inside a Stable-Baselines3 policy (docs/environments.md, "Stable-Baselines3")."""

import functools
from pathlib import Path

import gymnasium
import torch
from torch import Tensor, nn

from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..processing_vjepa2_ac import VJEPA2ACProcessor, resize_frames

try:
    from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
except ImportError as error:
    raise ImportError("vjepa_ac_hf.envs.sb3 needs Stable-Baselines3: pip install 'vjepa-ac-hf[rl]'") from error

POOLINGS = ("mean", "attentive")


@functools.lru_cache(maxsize=2)
def _load(model: str) -> tuple[VJEPA2ACModel, VJEPA2ACProcessor]:
    """Encoder and processor; policies and target networks of a process share one copy."""
    loaded = VJEPA2ACModel.from_pretrained(model).eval().requires_grad_(False)
    loaded.predictor = nn.Identity()  # not needed, and the larger part
    return loaded, VJEPA2ACProcessor.from_pretrained(model)


class AttentivePooling(nn.Module):
    """Cross-attention of one learnt query to all tokens, as V-JEPA's probes have it (arXiv 2404.08471, section 4).

    Args:
        width: D of the tokens.
        heads: of the attention; divides the width.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        """`(B, D)`."""
        normed = self.norm(tokens_BLD)
        return self.attention(self.query.expand(len(normed), -1, -1), normed, normed, need_weights=False)[0][:, 0]


class VJEPA2ACFeaturesExtractor(BaseFeaturesExtractor):
    """From stacked frames to pooled features, for `policy_kwargs={"features_extractor_class": ...}`.

    The encoder is no part of the policy: not in its parameters, optimizer or saved files, which hold the name of the
    model only; a process has one copy of it. Where the encoder is larger than a toy, `VJEPA2ACVectorFeatureWrapper`
    is cheaper: it encodes a frame once, this extractor in every epoch over the rollout anew.

    Args:
        observation_space: Box of frames, oldest first: `(3 F, Y, X)` or `(Y, X, 3 F)` (images to Stable-Baselines3,
            `VecFrameStack`), or `(F, Y, X, 3)` (Gymnasium's `FrameStackObservation`).
        model: folder or Hub repository of a `VJEPA2ACModel` and its processor.
        spacing: environment steps between the frames that are used: the newest, the one `spacing` before, ...
        pooling: "mean" over each step's tokens, `(T * D,)`; or "attentive" over all, `(D,)`, which is trained.
        num_heads: of the attentive pooling; None: the encoder's.
        normalize_images: as the policy's: images then come as 0 .. 1, else as 0 .. 255.

    Raises:
        ValueError: another space, a number of frames that makes no whole tubelets, a model that is no name.
    """

    def __init__(
        self,
        observation_space: gymnasium.Space,
        model: str | Path,
        *,
        spacing: int = 1,
        pooling: str = "mean",
        num_heads: int | None = None,
        normalize_images: bool = True,
    ):
        if not isinstance(model, (str, Path)):
            raise ValueError(f"model must be a folder or repository, which is what gets saved, found {type(model)}")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {POOLINGS}, found {pooling!r}")
        loaded, processor = _load(str(model))
        encoder = loaded.config.encoder_config
        size, width = encoder.tubelet_size, encoder.hidden_size
        layout, stacked = _layout(observation_space)
        used = len(range(0, stacked, spacing)) if spacing > 0 else 0
        if spacing < 1 or (stacked - 1) % spacing or used % size:
            raise ValueError(
                f"{stacked} frames with spacing {spacing} make no whole tubelets of {size}: T tubelets need "
                f"(T * {size} - 1) * spacing + 1 frames"
            )
        super().__init__(observation_space, width * (used // size if pooling == "mean" else 1))
        self.spacing, self.layout = spacing, layout
        self.scale = 255.0 if is_image_space(observation_space) and normalize_images else 1.0
        self.pool = None
        if pooling == "attentive":
            self.pool = AttentivePooling(width, num_heads or encoder.num_attention_heads)
        # In a tuple, so that torch does not take it for a part of the policy.
        self._frozen = (loaded, processor)

    def forward(self, observations: Tensor) -> Tensor:
        """`(B, features_dim)`, float32."""
        model, processor = self._frozen
        frames_BFCYX = self._as_frames(observations)[:, :: self.spacing]
        resized = resize_frames(frames_BFCYX.flatten(0, 1), processor.resolution, processor.resize_mode)
        if model.device != observations.device:
            nn.Module.to(model, observations.device)
        pixels = processor.normalize_pixels(resized.unflatten(0, frames_BFCYX.shape[:2]))
        features_BTND = model.encode(pixels).float()
        if self.pool is None:
            return features_BTND.mean(dim=2).flatten(1)
        return self.pool(features_BTND.flatten(1, 2))

    def _as_frames(self, observations: Tensor) -> Tensor:
        """uint8 `(B, F, 3, Y, X)`; Stable-Baselines3 has made float of them, which is undone exactly."""
        frames = (observations * self.scale).round().to(torch.uint8)
        if self.layout == "stack":
            return frames.movedim(-1, -3)
        return (frames if self.layout == "first" else frames.movedim(-1, -3)).unflatten(1, (-1, 3))


def _layout(space: gymnasium.Space) -> tuple[str, int]:
    """Where the channels are ("first", "last", or "stack" of frames) and how many frames there are."""
    shape = tuple(getattr(space, "shape", None) or ())
    if isinstance(space, gymnasium.spaces.Box) and space.dtype == "uint8":
        if len(shape) == 4 and shape[-1] == 3:
            return "stack", shape[0]
        if len(shape) == 3:
            # Stable-Baselines3's own rule: the smallest axis is the channels'.
            first = is_image_space_channels_first(space)
            channels = shape[0] if first else shape[-1]
            if channels % 3 == 0:
                return ("first" if first else "last"), channels // 3
    raise ValueError(f"observations must be uint8 (3 F, Y, X), (Y, X, 3 F) or (F, Y, X, 3), found {space}")
