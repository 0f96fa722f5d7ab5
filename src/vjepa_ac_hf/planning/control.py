"""Receding-horizon control: plan, act, look, plan again (docs/planning.md, "Control")."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..actions_vjepa2_ac import ACTION_COLUMNS
from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from .actions import SearchSpace
from .planner import (
    MAX_BATCH_TOKENS,
    Context,
    Plan,
    Proposals,
    check_doubt,
    check_horizon,
    check_planning,
    check_same_steps,
    encode_context,
    encode_frames,
    make_cost,
    next_slot,
    plan,
)
from .search import CEM, MPPI, GradientRefinement


class Controller:
    """Acts towards a goal: call `act` with what is seen at the beginning of every step.

    Each tubelet is encoded when its last frame is there, and kept; the newest step, of which only the first frame can
    be known when its action is chosen, is encoded for now with that frame repeated.

    Args:
        model: a `VJEPA2ACModel`.
        processor: its processor.
        goal: as `plan` takes it; encoded once.
        horizon: steps to plan.
        generator: of all random numbers.
        context_steps: steps to remember at most; None: as many as horizon and the model's clips leave room for.
        replan_every: steps of a plan that are taken before the next one, at most the horizon.
        space: as `plan` takes it.
        method: as `plan` takes it.
        goal_steps: as `plan` takes it.
        goal_as_pictures: as `plan` takes it.
        discount: as `plan` takes it.
        refinement: as `plan` takes it.
        proposals: as `plan` takes it.
        proposal_mean: as `plan` takes it.
        others: more models with their processors: each sees, encodes and imagines for itself, and all judge together
            (`JointCost`). The goal must then be frames: features are of one encoder.
        doubt: `JointCost`'s.
        max_batch_tokens: as `plan` takes it.

    Attributes:
        plan: the latest plan; None before the first `act`.

    Raises:
        ValueError: whatever does not fit together, before anything is encoded but the goal.
    """

    def __init__(
        self,
        model: VJEPA2ACModel,
        processor: VJEPA2ACProcessor,
        goal: Any,
        *,
        horizon: int,
        generator: torch.Generator,
        context_steps: int | None = None,
        replan_every: int = 1,
        space: SearchSpace | None = None,
        method: CEM | MPPI | None = None,
        goal_steps: str | None = None,
        goal_as_pictures: bool = False,
        discount: float = 1.0,
        refinement: GradientRefinement | None = None,
        proposals: Proposals | None = None,
        proposal_mean: bool = True,
        others: Sequence[tuple[VJEPA2ACModel, VJEPA2ACProcessor]] = (),
        doubt: float = 0.0,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ):
        check_planning(model, processor, space)
        check_horizon(model, 1, horizon)
        context_steps = model.config.num_steps - horizon if context_steps is None else context_steps
        if not isinstance(context_steps, int) or context_steps < 1:
            raise ValueError(f"context_steps must be a whole number of at least 1, found {context_steps}")
        check_horizon(model, context_steps, horizon)
        if not isinstance(replan_every, int) or not 1 <= replan_every <= horizon:
            raise ValueError(
                f"replan_every must be a whole number from 1 to the horizon {horizon}, found {replan_every}"
            )
        self.model, self.processor = model, processor
        self._cost = make_cost(
            model, processor, goal, horizon, steps=goal_steps, discount=discount, as_pictures=goal_as_pictures
        )
        self._others = self._make_others(others, goal, horizon, context_steps)
        self.context_steps, self.replan_every = context_steps, replan_every
        self._options: dict[str, Any] = dict(
            horizon=horizon,
            generator=generator,
            space=space,
            method=method,
            refinement=refinement,
            proposals=proposals,
            proposal_mean=proposal_mean,
            doubt=check_doubt(doubt),
            max_batch_tokens=max_batch_tokens,
        )
        self.reset()

    def _make_others(
        self, others: Sequence[tuple[VJEPA2ACModel, VJEPA2ACProcessor]], goal: Any, horizon: int, context_steps: int
    ) -> list["Controller"]:
        """Controllers that look, and plan nothing."""
        if others and ((callable(goal) and not isinstance(goal, Tensor)) or torch.as_tensor(goal).is_floating_point()):
            raise ValueError(
                "several models need a goal of frames, which each encodes itself, found features or a cost"
            )
        made = []
        for model, processor in others:
            check_same_steps(self.processor, processor)
            options: dict[str, Any] = dict(horizon=horizon, context_steps=context_steps, generator=torch.Generator())
            made.append(Controller(model, processor, goal, **options))
        return made

    def reset(self) -> None:
        """Forget everything seen and planned: a new episode begins."""
        for other in self._others:
            other.reset()
        self.plan: Plan | None = None
        self._since = 0  # steps of the plan that are done
        self._context: Context | None = None
        self._now: Tensor | None = None  # the newest step's first frame
        self._action: Tensor | None = None  # what was returned last

    def act(self, frames: Any, state: Any, *, slot: int | None = None, executed: Any = None) -> Tensor:
        """The action for the step that begins now.

        Args:
            frames: uint8 `(F, 3, Y, X)` or `(F, Y, X, 3)`, at the clip's frame rate, since the last call: at the first
                call the frame now, F = 1; later F = tubelet_size, those during the step that is done and the one now.
            state: `(2,)`, yaw and pitch now, degrees.
            slot: hotbar slot now; None: as the number keys pressed so far leave it, 0 at first; not known where
                `executed` tells none.
            executed: `(38,)`, the raw action that was really taken since the last call; None: the one returned.

        Returns:
            `(38,)`, raw units: see `to_minerl_action`. What is expected of it is in `plan`.

        Raises:
            ValueError: another number of frames, states or columns.
        """
        done = self._action if executed is None else executed
        seen = (torch.as_tensor(frames), torch.as_tensor(state).double().cpu(), slot)
        self._look(*seen, executed)
        for other in self._others:
            other._look(*seen, done)
        assert self._context is not None
        if self.plan is None or self._since >= self.replan_every:
            self.plan = self._replan()
            self._since = 0
        self._action = self.plan.actions[self._since].clone()
        self._since += 1
        return self._action.clone()

    def _replan(self) -> Plan:
        assert self._context is not None
        known = (self.model, self.processor, self._context, self._cost)
        others: list[Any] = [(o.model, o.processor, o._context, o._cost) for o in self._others]
        return plan(*known, others=others, warm_start=self.plan, shift=self._since, **self._options)

    def _look(self, frames: Tensor, state: Tensor, slot: int | None, executed: Any) -> None:
        """Add what was seen to the context; nothing changes where it is refused."""
        size = self.processor.tubelet_size
        expected = 1 if self._context is None else size
        if frames.ndim != 4 or len(frames) != expected:
            which = "the one now" if self._context is None else "those since the last call"
            raise ValueError(
                f"frames must be uint8 ({expected}, 3, height, width), {which}, found {tuple(frames.shape)}"
            )
        if tuple(state.shape) != (2,):
            raise ValueError(f"state must be (yaw, pitch), shape (2,), found {tuple(state.shape)}")
        now = frames[-1:]
        if self._context is None:
            if executed is not None:
                raise ValueError("nothing was executed before the first call, found an action")
            features = encode_frames(self.model, self.processor, now.expand(size, -1, -1, -1), "frames")
            states, actions = state[None], torch.zeros(0, len(ACTION_COLUMNS), dtype=torch.float64)
        else:
            done = self._action if executed is None else torch.as_tensor(executed).double().cpu()
            assert self._now is not None and done is not None
            if tuple(done.shape) != (len(ACTION_COLUMNS),):
                raise ValueError(f"executed must be raw, ({len(ACTION_COLUMNS)},), found {tuple(done.shape)}")
            if frames.shape[1:] != self._now.shape[1:]:
                raise ValueError(f"frames were {tuple(self._now.shape[1:])} before, found {tuple(frames.shape[1:])}")
            seen = torch.cat([self._now, frames[:-1], now.expand(size, -1, -1, -1)])
            known = self._context
            newest = encode_frames(self.model, self.processor, seen, "frames")
            keep = slice(-self.context_steps, None)
            features = torch.cat([known.features[:-1], newest])[keep]
            states = torch.cat([known.states, state[None]])[keep]
            actions = torch.cat([known.actions, done[None]])[len(known.actions) + 2 - len(features) :]
            if slot is None:
                slot = next_slot(torch.cat([known.actions, done[None]]))
        self._context = encode_context(
            self.model, self.processor, features=features, states=states, actions=actions, slot=slot
        )
        self._now = now
