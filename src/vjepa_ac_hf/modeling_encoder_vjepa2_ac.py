"""The encoders of V-JEPA 2 and 2.1 (arXiv 2506.09985, 2603.14482) on transformers' V-JEPA 2 classes, at any grid.

What V-JEPA 2.1 changes stands in fields of the configuration (`EncoderFields`); without them this is transformers'
encoder, with the positions of the grid at hand in place of a square one of the configuration. Letters as in
`modeling_vjepa2_ac.py`. Shipped to the Hub with the model: imports the standard library, torch, transformers and its
siblings only.
"""

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import VJEPA2Config
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.vjepa2.modeling_vjepa2 import (
    VJEPA2MLP,
    VJEPA2DropPath,
    VJEPA2Embeddings,
    VJEPA2Encoder,
    VJEPA2Layer,
    VJEPA2PatchEmbeddings3D,
    VJEPA2PreTrainedModel,
    VJEPA2RopeAttention,
)

from .configuration_encoder_vjepa2_ac import EncoderFields

LAST_PLACE = 15.0  # of the grid of 16 x 16 that `interpolate_rope` scales every grid to


@dataclass
class VJEPA21EncoderOutput(BaseModelOutput):
    """What `VJEPA21Encoder` returns.

    Args:
        last_hidden_state: `(B, L, D)`, of the last layer, normed.
        hierarchical_hidden_state: `(B, L, levels * D)` where asked for: the tapped layers, each with its own norm,
            from shallow to deep; the last D are `last_hidden_state`.
    """

    hierarchical_hidden_state: Tensor | None = None


class VJEPA21Embeddings(VJEPA2Embeddings):
    """Pixels -> tokens, in the order of time, rows, columns; one frame has patches of its own where there are such."""

    def __init__(self, config: VJEPA2Config, hidden_size: int):
        super().__init__(config, hidden_size)
        fields = EncoderFields.of(config)
        self.patch_embeddings_img: nn.Module | None = None
        if fields.use_image_patch_embedder:
            single = copy.copy(config)
            single.tubelet_size = 1
            self.patch_embeddings_img = VJEPA2PatchEmbeddings3D(single, hidden_size)
        self.img_mod_embed = self.video_mod_embed = None
        if fields.use_modality_embeddings:
            self.img_mod_embed = nn.Parameter(config.initializer_range * torch.randn(1, 1, hidden_size))
            self.video_mod_embed = nn.Parameter(config.initializer_range * torch.randn(1, 1, hidden_size))

    def forward(self, pixel_values_videos: Tensor) -> Tensor:
        """`(B, frames, 3, Y, X)` -> `(B, L, D)`."""
        is_image = self.patch_embeddings_img is not None and pixel_values_videos.shape[1] == 1
        if is_image:
            pixels = pixel_values_videos.transpose(1, 2).to(self.patch_embeddings.proj.weight.dtype)
            tokens = self.patch_embeddings_img(pixels)  # type: ignore[misc]
        else:
            tokens = super().forward(pixel_values_videos)
        modality = self.img_mod_embed if is_image else self.video_mod_embed
        return tokens if modality is None else tokens + modality


class VJEPA21RopeAttention(VJEPA2RopeAttention):
    """Attention of transformers' V-JEPA 2 over tokens whose places are given: `position_mask` is `(3, ...)`."""

    def __init__(self, config: VJEPA2Config):
        super().__init__(config, config.hidden_size, config.num_attention_heads)
        self.interleave = EncoderFields.of(config).use_rope_interleave

    def get_position_ids(self, x: Tensor, masks: Tensor | None = None) -> tuple[Tensor, ...]:
        assert masks is not None
        return masks.unbind(0)

    def apply_rotary_embeddings(self, qk: Tensor, pos_ids: tuple[Tensor, ...]) -> Tensor:
        if not self.interleave:
            return super().apply_rotary_embeddings(qk, pos_ids)
        rest = self.attention_head_size - self.d_dim - self.h_dim - self.w_dim
        *axes, unrotated = qk.split([self.d_dim, self.h_dim, self.w_dim, rest], dim=-1)
        return torch.cat([*map(rotate_interleaved, axes, pos_ids), unrotated], dim=-1)


def rotate_interleaved(x: Tensor, places: Tensor) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), ... of the last dimension, pair j of n by `place * 10000 ** (-j / n)`.

    Angles are computed in float32 whatever the type of `x`.
    """
    pairs = x.shape[-1] // 2
    frequencies = 10000.0 ** -(torch.arange(pairs, dtype=torch.float32, device=x.device) / pairs)
    angles = places.float().unsqueeze(-1) * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


class VJEPA21Layer(VJEPA2Layer):
    """transformers' V-JEPA 2 block around `VJEPA21RopeAttention`."""

    def __init__(self, config: VJEPA2Config, drop_path_rate: float):
        super(VJEPA2Layer, self).__init__()  # not VJEPA2Layer's, whose attention would be made and thrown away
        width = config.hidden_size
        self.config = config
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = VJEPA21RopeAttention(config)
        self.drop_path = VJEPA2DropPath(drop_path_rate) if config.drop_path_rate > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = VJEPA2MLP(config, hidden_size=width, mlp_ratio=config.mlp_ratio)


class VJEPA21Encoder(VJEPA2Encoder):
    """Encoder of V-JEPA 2 or 2.1, as the configuration's fields say, over frames of any number of patches."""

    def __init__(self, config: VJEPA2Config):
        super(VJEPA2Encoder, self).__init__()  # not VJEPA2Encoder's, whose layers would be made and thrown away
        self.config = config
        self.fields = EncoderFields.of(config)
        self.embeddings = VJEPA21Embeddings(config, config.hidden_size)
        depth, taps = config.num_hidden_layers, self.fields.hierarchical_layers
        rates = [config.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.layer = nn.ModuleList([VJEPA21Layer(config, rate) for rate in rates])
        norms = [nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in taps or (depth - 1,)]
        if taps is None:
            self.layernorm = norms[0]
        else:
            self.norms_block = nn.ModuleList(norms)
        self.gradient_checkpointing = False

    def forward(  # type: ignore[override]
        self,
        pixel_values_videos: Tensor,
        position_mask: Tensor | None = None,
        output_hierarchical: bool = False,
        **kwargs: Any,
    ) -> VJEPA21EncoderOutput:
        """
        Args:
            pixel_values_videos: `(B, frames, 3, Y, X)`, normalised pixels. A trailing frame that fills no tubelet and
                pixels at the right and bottom that fill no patch are dropped.
            position_mask: `(B, K)`, numbers of the tokens to keep, which keep their places; None: all.
            output_hierarchical: whether to return the tapped layers as well.

        Raises:
            ValueError: tapped layers asked of an encoder without.
        """
        taps = self.fields.hierarchical_layers
        if output_hierarchical and taps is None:
            raise ValueError("hierarchical features need an encoder with hierarchical_layers, which V-JEPA 2 has not")
        x_BLD = self.embeddings(pixel_values_videos)
        places = self._places(pixel_values_videos, x_BLD.shape[1])
        if position_mask is not None:
            x_BLD = x_BLD.gather(1, position_mask.long().unsqueeze(-1).expand(-1, -1, x_BLD.shape[-1]))
            places = places[:, position_mask.long()].unsqueeze(2)  # (3, B, heads, K)
        levels: list[Tensor] = []
        for number, layer in enumerate(self.layer):
            x_BLD = layer(x_BLD, places, **kwargs)[0]
            if output_hierarchical and taps is not None and number in taps:
                levels.append(self.norms_block[len(levels)](x_BLD))
        if levels:
            levels = [level.to(levels[-1].device) for level in levels]  # layers may lie on several devices
            return VJEPA21EncoderOutput(levels[-1], hierarchical_hidden_state=torch.cat(levels, dim=-1))
        return VJEPA21EncoderOutput((self.layernorm if taps is None else self.norms_block[-1])(x_BLD))

    def _places(self, pixel_values_videos: Tensor, tokens: int) -> Tensor:
        """`(3, L)`: time, row and column of every token."""
        patch_size: Any = self.config.patch_size
        rows, columns = (side // patch_size for side in pixel_values_videos.shape[-2:])
        numbers = torch.arange(tokens, device=pixel_values_videos.device)
        time, within = numbers // (rows * columns), numbers % (rows * columns)
        row, column = within // columns, within % columns
        if not self.fields.interpolate_rope:
            return torch.stack([time, row, column])
        if min(rows, columns) < 2:
            raise ValueError(f"interpolate_rope needs at least 2 x 2 patches, found {rows} x {columns}")
        row, column = row.float() * LAST_PLACE / (rows - 1), column.float() * LAST_PLACE / (columns - 1)
        return torch.stack([time.float(), row, column])


class VJEPA21EncoderModel(VJEPA2PreTrainedModel):
    """An encoder alone, as repositories of transformers' V-JEPA 2 hold it; a predictor there is left out."""

    _no_split_modules = ["VJEPA21Layer"]
    _keys_to_ignore_on_load_unexpected = [r"^(predictor|pooler|classifier)\."]

    def __init__(self, config: VJEPA2Config):
        super().__init__(config)
        self.encoder = VJEPA21Encoder(config)
        self.post_init()

    @classmethod
    def load(cls, name_or_path: str | os.PathLike, **options: Any) -> "VJEPA21EncoderModel":
        """As `from_pretrained`, but weights that the configuration does not describe are refused.

        Raises:
            ValueError: weights of V-JEPA 2.1 with a configuration of V-JEPA 2, the reverse, or any other mismatch.
        """
        loaded: Any = cls.from_pretrained(name_or_path, output_loading_info=True, **options)
        model, report = loaded
        missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
        if missing or unexpected:
            described = "2.1" if EncoderFields.of(model.config).is_v21 else "2"
            raise ValueError(
                f"{name_or_path}: config.json describes an encoder of V-JEPA {described}, the weights are another's: "
                f"{len(missing)} are missing ({', '.join(missing[:3])}), {len(unexpected)} are not of it "
                f"({', '.join(unexpected[:3])})"
            )
        return model
