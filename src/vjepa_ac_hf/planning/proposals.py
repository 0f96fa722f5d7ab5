"""Plans that an inverse dynamics head proposes: the actions that would lead from here to a goal (docs/planning.md)."""

import torch
from torch import Tensor

from ..actions_vjepa2_ac import CONTINUOUS_COLUMNS, DEGREES_PER_PIXEL
from ..evaluation.clips import check_head_fits
from ..modeling_heads_vjepa2_ac import VJEPA2ACForInverseDynamics
from ..modeling_vjepa2_ac import VJEPA2ACModel
from .actions import MOUSE_OF_VIEW, NUMBER_KEYS, VIEW_OF_MOUSE, SearchSpace
from .planner import Context


class InverseDynamicsProposals:
    """For `plan`: what the head takes for the action between the view now and the goal.

    For one goal several steps away two plans are proposed: an equal share of the turn at every step, and all of it at
    the first one; for a goal of every step, one: the action between each and the next. What is beyond the bounds is cut
    off there. The head has seen views a step apart: what it tells of others is a guess to begin with.

    Args:
        head: over features of the world model's encoder; on its device.
        model: the world model.

    Raises:
        ValueError: a head over another encoder, without action statistics.
    """

    def __init__(self, head: VJEPA2ACForInverseDynamics, model: VJEPA2ACModel):
        check_head_fits(head, model)
        its = head.config
        if its.action_statistics is None and set(its.action_space) & set(CONTINUOUS_COLUMNS):
            raise ValueError("the head's config.action_statistics is None: its turns have no degrees")
        self.head = head

    @torch.no_grad()
    def __call__(self, context: Context, goal: Tensor, space: SearchSpace, horizon: int) -> Tensor:
        """Decisions `(P, horizon, width)` towards a goal `(N, D)` or `(horizon, N, D)`.

        Raises:
            ValueError: the head does not tell what the space searches.
        """
        goals = goal if goal.ndim == 3 else goal[None]
        views = torch.cat([context.features[-1:], goals.to(context.features)])
        told = self._decide(torch.stack([views[:-1], views[1:]], dim=1), space)
        if goal.ndim == 3 or horizon == 1:
            return self._within(told, space)[None]
        variables = len(space.continuous)
        evenly, at_once = told.repeat(horizon, 1), space.mode(space.initial(horizon))
        evenly[:, :variables] /= horizon
        at_once[0] = told[0]
        # Standing still, as far as the bounds have it.
        at_once[1:, :variables] = 0
        return torch.stack([self._within(evenly, space), self._within(at_once, space)])

    def _decide(self, pairs: Tensor, space: SearchSpace) -> Tensor:
        """Decisions `(P, width)`, one a pair of views `(P, 2, N, D)`."""
        columns = self.head.config.action_space
        free = [c for c, width in zip(space.continuous, space.high - space.low, strict=True) if width > 0]
        searched: dict[str, tuple] = {c: (c, VIEW_OF_MOUSE.get(c), MOUSE_OF_VIEW.get(c)) for c in free}
        numbers = [n for n in space.numbers if n and len(space.numbers) > 1]
        searched |= {c: (c,) for c in (*space.keys, *(NUMBER_KEYS[n - 1] for n in numbers))}
        missing = [column for column, known in searched.items() if not set(known) & set(columns)]
        if missing:
            raise ValueError(f"the head tells no {missing}, which the plan searches; it tells {columns}: fix them")
        told = {c: v[:, 0].double().cpu() for c, v in self.head.decode_actions(self.head(features=pairs)).items()}
        decisions = torch.zeros(len(pairs), space.width, dtype=torch.float64)
        for at, column in enumerate(space.continuous):
            if column not in free:
                decisions[:, at] = space.low[at]
            elif column in told:
                decisions[:, at] = told[column]
            elif column in MOUSE_OF_VIEW:
                decisions[:, at] = told[MOUSE_OF_VIEW[column]] * DEGREES_PER_PIXEL
            else:
                decisions[:, at] = told[VIEW_OF_MOUSE[column]] / DEGREES_PER_PIXEL
        for at, column in enumerate(space.keys, len(space.continuous)):
            decisions[:, at] = told[column]
        decisions[:, -1] = space.numbers[0]
        for number in reversed(numbers):  # of several keys the first one
            decisions[told[NUMBER_KEYS[number - 1]] > 0, -1] = number
        return decisions

    @staticmethod
    def _within(decisions: Tensor, space: SearchSpace) -> Tensor:
        variables = len(space.continuous)
        return torch.cat([decisions[:, :variables].clamp(space.low, space.high), decisions[:, variables:]], dim=1)
