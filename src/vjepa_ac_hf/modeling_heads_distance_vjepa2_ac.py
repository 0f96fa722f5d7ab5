"""How many steps lie between two views? A learned distance, for goals that features alone do not lead to.

Letters in the names of tensors as in `modeling_heads_vjepa2_ac.py`. What is learnt from what: docs/applications.md,
"Distance in steps". Shipped to the Hub with the models: imports the standard library, torch, transformers and its
siblings only.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .configuration_heads_vjepa2_ac import VJEPA2ACTemporalDistanceConfig
from .modeling_heads_vjepa2_ac import VJEPA2ACHeadPreTrainedModel, VJEPA2ACMotionEncoder
from .modeling_vjepa2_ac import returns_output


@dataclass
class VJEPA2ACTemporalDistanceOutput(ModelOutput):
    """What `VJEPA2ACForTemporalDistance` returns.

    Args:
        loss: `()`, Huber loss in steps, float32; where asked for.
        distances: `(B, T, T)`, steps between every two of a clip's, as told; symmetric.
    """

    loss: Tensor | None = None
    distances: Tensor | None = None


class VJEPA2ACTemporalDistanceHead(nn.Module):
    """Motion between two views -> a number of steps between 0 and `longest`."""

    def __init__(self, config: VJEPA2ACTemporalDistanceConfig):
        super().__init__()
        self.longest = config.num_steps
        self.motion = VJEPA2ACMotionEncoder(config)
        self.fc1 = nn.Linear(self.motion.output_size, config.head_hidden_size)
        self.fc2 = nn.Linear(config.head_hidden_size, 1)

    def forward(self, before_PND: Tensor, after_PND: Tensor) -> Tensor:
        """`(P, N, D)` twice -> `(P,)`, float32."""
        motion_PM = self.motion(before_PND, after_PND)
        return self.longest * torch.sigmoid(self.fc2(F.gelu(self.fc1(motion_PM)))[:, 0].float())


class VJEPA2ACForTemporalDistance(VJEPA2ACHeadPreTrainedModel):
    """Steps between two views, learnt from pairs of one recording (as in Hartikainen et al., arXiv 1907.08225).

    Trained on all pairs of a clip's steps, and on pairs of a step and one of another clip of the batch, which count as
    `num_steps` apart: further than any two of a clip. The order of two views does not matter.
    """

    config_class = VJEPA2ACTemporalDistanceConfig
    _no_split_modules = [*VJEPA2ACHeadPreTrainedModel._no_split_modules, "VJEPA2ACTemporalDistanceHead"]

    def _make_head(self, config: VJEPA2ACTemporalDistanceConfig) -> nn.Module:
        return VJEPA2ACTemporalDistanceHead(config)

    def distance(self, one: Tensor, other: Tensor) -> Tensor:
        """Steps `(P,)` between views `(P, N, D)`: the mean of both orders."""
        dtype = next(self.head.parameters()).dtype
        one, other = one.to(dtype), other.to(dtype)
        return (self.head(one, other) + self.head(other, one)) / 2

    @returns_output
    def forward(
        self,
        pixel_values_videos: Tensor | None = None,
        features: Tensor | None = None,
        return_loss: bool = False,
    ) -> VJEPA2ACTemporalDistanceOutput:
        """
        Args:
            pixel_values_videos: `(B, frames, 3, Y, X)`, normalised pixels, at least two tubelets; or
            features: `(B, T, N, D)` of `VJEPA2ACModel.encode`, instead.
            return_loss: whether to compute the loss.
        """
        features_BTND = self.read_features(pixel_values_videos, features, min_steps=2)
        batch, steps = features_BTND.shape[:2]
        first, second = torch.triu_indices(steps, steps, device=features_BTND.device)
        told_BP = self.distance(
            features_BTND[:, first].flatten(0, 1), features_BTND[:, second].flatten(0, 1)
        ).unflatten(0, (batch, -1))
        distances = told_BP.new_zeros(batch, steps, steps)
        distances[:, first, second] = distances[:, second, first] = told_BP
        if not return_loss:
            return VJEPA2ACTemporalDistanceOutput(None, distances)
        losses = [
            F.smooth_l1_loss(told_BP, (second - first).to(told_BP).expand_as(told_BP), reduction="none").flatten()
        ]
        if batch > 1:
            apart = self.distance(features_BTND.flatten(0, 1), features_BTND.roll(1, dims=0).flatten(0, 1))
            longest = torch.full_like(apart, self.config.num_steps)
            losses.append(F.smooth_l1_loss(apart, longest, reduction="none"))
        return VJEPA2ACTemporalDistanceOutput(torch.cat(losses).mean(), distances)


VJEPA2ACForTemporalDistance.register_for_auto_class("AutoModel")

__all__ = ["VJEPA2ACForTemporalDistance", "VJEPA2ACTemporalDistanceOutput"]
