"""Features in 8 bits: integers, and a scale for each token and group of channels (docs/model.md, "Feature cache")."""

import math

import torch
from torch import Tensor

CHANNELS_PER_SCALE = 64
_LARGEST = 127


def channels_per_scale(width: int) -> int:
    """How many neighbouring channels share a scale: 64, or the largest power of 2 below it that divides the width."""
    return math.gcd(width, CHANNELS_PER_SCALE)


def quantize_features(features: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit quantisation; a scale is the largest magnitude of its group divided by 127.

    No value is off by more than half its group's scale.

    Args:
        features: `(..., D)`, finite.

    Returns:
        Integers `(..., D)` int8 in [-127, 127], and scales `(..., D / channels_per_scale(D))` float32.
    """
    groups = features.float().unflatten(-1, (-1, channels_per_scale(features.shape[-1])))
    scales = groups.abs().amax(dim=-1) / _LARGEST
    steps = groups / torch.where(scales > 0, scales, 1.0)[..., None]
    return steps.round().clamp(-_LARGEST, _LARGEST).flatten(-2).to(torch.int8), scales


def restore_features(features: Tensor, feature_scales: Tensor | None = None) -> Tensor:
    """Stored features as float32 `(..., D)`, on their device: floating-point ones, or integers with their scales."""
    if feature_scales is None:
        return features.float()
    return (features.unflatten(-1, (feature_scales.shape[-1], -1)) * feature_scales[..., None]).flatten(-2)
