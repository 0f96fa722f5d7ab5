"""A learned distance in steps as a plan's cost (docs/planning.md, "A learned distance")."""

from torch import Tensor

from ..evaluation.clips import check_head_fits
from ..modeling_heads_distance_vjepa2_ac import VJEPA2ACForTemporalDistance
from ..modeling_vjepa2_ac import VJEPA2ACModel
from .planner import GoalCost


class DistanceCost(GoalCost):
    """Steps between what is imagined last and a goal, as a head tells them, in place of the difference of features.

    Args:
        head: over features of the world model's encoder, trained; on its device.
        model: the world model.
        goal: `(N, D)`, of `encode_goal`.

    Raises:
        ValueError: another model than such a head, one that was never trained, or over another encoder.
    """

    def __init__(self, head: VJEPA2ACForTemporalDistance, model: VJEPA2ACModel, goal: Tensor):
        if not isinstance(head, VJEPA2ACForTemporalDistance):
            raise ValueError(
                f"a distance is told by VJEPA2ACForTemporalDistance (train_head.py --task temporal_distance), found "
                f"{type(head).__name__}"
            )
        if not head.config.training_clips:
            raise ValueError(
                f"the distance head was not trained: its config.training_clips is {head.config.training_clips!r}, "
                "expected the number of clips that it has learnt from"
            )
        check_head_fits(head, model)
        super().__init__(goal, steps="last")
        if goal.ndim != 2:
            raise ValueError(f"a distance is to one goal (tokens, width), found {tuple(goal.shape)}")
        self.head = head

    @property
    def scale(self) -> float:
        return float(self.head.config.num_steps)

    def __call__(self, features: Tensor, actions: Tensor) -> Tensor:
        """Costs `(M,)`, steps, of features `(M, H, N, D)`; actions are not used."""
        last = features[:, -1]
        return self.head.distance(last, self.goal.to(last).expand_as(last))
