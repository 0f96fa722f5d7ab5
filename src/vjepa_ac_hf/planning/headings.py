"""Finding a view by turning: look where the model expects it, remember where it was not (docs/planning.md, "Headings").

Angles are degrees; a heading is a yaw, and differences of headings are circular.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..actions_vjepa2_ac import wrap_degrees
from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from .actions import SearchSpace, integrate_view
from .control import Controller
from .planner import MAX_BATCH_TOKENS, GoalCost, Imagination, JointCost, Plan, encode_frames, ticks_per_step

FAR = 90.0  # degrees that are imagined again at every step; the rest of the circle at the first one
BESIDE = 10.0  # degrees, about the width of a valley
TRIED = 5  # views beside each other after which a valley without arrival is a wrong one


class HeadingController(Controller):
    """Turns until a goal is seen: for goals that differ from the view now in yaw alone, however far away.

    A search over the next step's turn stands still in the first valley of the cost, which is some 10 degrees wide, and
    most valleys are wrong ones. Two things tell them apart. What is seen can be compared with the goal as it is:
    encoded alike, the same view has distance 0, and any view that is not within some 10 degrees of the goal nearly the
    same, large distance. And the whole circle can be imagined: as few equal turns as lead to a heading.

    At every step, with the distances of all views seen (those in the middle of steps too):

    - one of them is below `arrived` times the usual distance: stay there.
    - one is below `near` times: the headings within 10 degrees of it are imagined, a fine grid; go to the lowest. Five
      views there of which none has arrived: it is a wrong valley.
    - else go to the heading of the lowest imagined distance, each as imagined from the nearest heading so far, less
      those that views of a large distance rule out: within `apart` degrees of one whose distance is usual, and less in
      proportion down to `arrived`. What is imagined further away is blurred, and so less far from any goal, and takes
      longer to reach: `price` is added.

    The usual distance is the median of all that are at least three quarters of the largest. Nothing is random.

    Args:
        model: a `VJEPA2ACModel`.
        processor: its processor, whose action space has `yaw_delta`.
        goal: one view, as `plan` takes it.
        largest_turn: degrees a step.
        context_steps: steps to remember at most; None: as many as the model's clips leave room for.
        spacing: degrees between headings that are imagined.
        arrived: see above.
        near: see above.
        apart: see above.
        price: share of the usual distance that is added for every 90 degrees of a turn.
        others: as `Controller` takes them.
        doubt: likewise, of what is imagined and what is seen.
        max_batch_tokens: see `Imagination`.

    Attributes:
        plan: the latest plan; its `decisions` are of a search space of the yaw alone.
        seen: heading and distance to the goal of every view so far.

    Raises:
        ValueError: whatever does not fit together.
    """

    def __init__(
        self,
        model: VJEPA2ACModel,
        processor: VJEPA2ACProcessor,
        goal: Any,
        *,
        largest_turn: float = 45.0,
        context_steps: int | None = None,
        spacing: float = 7.5,
        arrived: float = 0.35,
        near: float = 0.75,
        apart: float = 10.0,
        price: float = 0.1,
        others: Sequence[tuple[VJEPA2ACModel, VJEPA2ACProcessor]] = (),
        doubt: float = 0.0,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ):
        if not 0 < largest_turn < 180 or not 0 < spacing <= largest_turn:
            raise ValueError(
                f"largest_turn must be within (0, 180) and spacing within (0, largest_turn], found {largest_turn} and "
                f"{spacing}"
            )
        if not 0 <= arrived <= near < 1 or not apart >= 0 or not price >= 0:
            raise ValueError(
                "0 <= arrived <= near < 1, apart >= 0 and price >= 0 are needed, found "
                f"{arrived}, {near}, {apart} and {price}"
            )
        keys = [c for c in processor.action_space if c.startswith(("key.", "mouse.l", "mouse.r", "mouse.m"))]
        turns = {"yaw_delta": (-largest_turn, largest_turn)}
        space = SearchSpace(
            processor.action_space, bounds=turns, fixed={**dict.fromkeys(keys, 0.0), "pitch_delta": 0.0}
        )
        self._most = math.ceil(180 / largest_turn)
        super().__init__(
            *(model, processor, goal),
            horizon=self._most,
            generator=torch.Generator(),
            context_steps=context_steps,
            space=space,
            others=others,
            doubt=doubt,
            max_batch_tokens=max_batch_tokens,
        )
        if not isinstance(self._cost, GoalCost) or self._cost.goal.ndim != 2:
            raise ValueError("HeadingController needs one view as its goal, found a cost, or a goal for every step")
        self.largest_turn, self.spacing, self.arrived, self.near = largest_turn, spacing, arrived, near
        self.apart, self.price, self.max_batch_tokens = apart, price, max_batch_tokens

    def reset(self) -> None:
        super().reset()
        self.seen: list[tuple[float, float]] = []
        # Of every heading of the circle: the distance imagined from the nearest heading so far, and how near that was.
        self._imagined: dict[float, tuple[float, float]] = {}

    def _look(self, frames: Tensor, state: Tensor, slot: int | None, executed: Any) -> None:
        before = float(state[0]) if self._context is None else float(self._context.states[-1, 0])
        super()._look(frames, state, slot, executed)
        self._passed, self._before = frames[:-1], before

    def _remember(self, joint: JointCost) -> None:
        """Distances of what was seen since the last step and now, each as a view that stands still, as the goal is."""
        assert self._context is not None
        now, size, passed = float(self._context.states[-1, 0]), self.processor.tubelet_size, self._passed
        views = []
        for controller in (self, *self._others):
            assert controller._context is not None
            still = [controller._context.features[-1:]]
            if len(passed):
                repeated = passed.repeat_interleave(size, dim=0)
                still.insert(0, encode_frames(controller.model, controller.processor, repeated, "frames"))
            views.append(torch.cat(still))
        turn = float(wrap_degrees(now - self._before))
        headings = [self._before + turn * (i + 1) / size for i in range(len(passed))]
        self.seen += zip([*headings, now], joint.distances(views).tolist(), strict=True)

    @property
    def usual(self) -> float:
        """Distance to the goal of views that are not near it."""
        most = max(d for _, d in self.seen)
        large = sorted(d for _, d in self.seen if d >= 0.75 * most)
        return large[len(large) // 2]

    def _replan(self) -> Plan:
        assert self._context is not None
        members: list[tuple[Imagination, Any]] = []
        for c in (self, *self._others):
            assert c._context is not None
            imagination = Imagination(c.model, c.processor, c._context, max_batch_tokens=self.max_batch_tokens)
            members.append((imagination, c._cost))
        joint = JointCost(members, self._options["doubt"])
        self._remember(joint)
        now, usual = float(self._context.states[-1, 0]), self.usual
        best, lowest = min(self.seen, key=lambda view: view[1])
        tried = sum(abs(wrap_degrees(heading - best)) <= BESIDE for heading, _ in self.seen)
        if lowest < self.arrived * usual or (lowest < self.near * usual and tried < TRIED):
            turn, cost = self._approach(joint, now, float(wrap_degrees(best - now)), lowest, usual)
        else:
            turn, cost = self._search(joint, now, usual)
        return self._make_plan(members[0][0], turn, cost)

    def _approach(self, joint: JointCost, now: float, turn: float, lowest: float, usual: float) -> tuple[float, float]:
        """Turn to a view that is near the goal, or to a heading beside it that is expected to be nearer."""
        if lowest < self.arrived * usual:
            return turn, lowest
        fine = [turn + step for step in (-10.0, -7.5, -5.0, -3.0, 3.0, 5.0, 7.5, 10.0)]
        costs = self._imagine(joint, fine)
        known = [(turn, lowest), *zip(fine, costs, strict=True)]
        # Who was at a heading knows better than any imagination.
        free = [
            (t, c) for t, c in known if t == turn or all(abs(wrap_degrees(now + t - h)) > 2.0 for h, _ in self.seen)
        ]
        return min(free, key=lambda candidate: candidate[1])

    def _search(self, joint: JointCost, now: float, usual: float) -> tuple[float, float]:
        """Turn to where the goal is expected."""
        start = self.seen[0][0]
        headings = [start + i * self.spacing for i in range(round(360 / self.spacing))]
        turns = {h: float(wrap_degrees(h - now)) for h in headings}
        imagined = [h for h in headings if abs(turns[h]) <= FAR or h not in self._imagined]
        costs = self._imagine(joint, [turns[h] for h in imagined])
        for heading, cost in zip(imagined, costs, strict=True):
            away = abs(turns[heading])
            if heading not in self._imagined or away <= self._imagined[heading][1]:
                cost += self.price * usual * away / 90
                self._imagined[heading] = (cost, away)
        ruled_out = [
            (seen, self.apart * min((d / usual - self.arrived) / (1 - self.arrived), 1.0)) for seen, d in self.seen
        ]
        left = [h for h in headings if all(abs(wrap_degrees(h - seen)) > apart for seen, apart in ruled_out)]
        heading = min(left or headings, key=lambda h: self._imagined[h][0])
        return turns[heading], self._imagined[heading][0]

    def _steps(self, turn: float) -> int:
        return max(1, math.ceil(abs(turn) / self.largest_turn - 1e-9))

    def _decisions(self, turn: float) -> Tensor:
        """`(1, steps, width)`: as few equal turns as can be."""
        space, steps = self._options["space"], self._steps(turn)
        decisions = space.mode(space.initial(steps))[None]
        decisions[:, :, space.continuous.index("yaw_delta")] = turn / steps
        return decisions

    def _complete(self, decisions: Tensor) -> Tensor:
        assert self._context is not None
        pitch, slot = float(self._context.states[-1, 1]), self._context.slot
        return self._options["space"].complete(decisions, pitch=pitch, slot=slot)

    def _imagine(self, joint: JointCost, turns: list[float]) -> list[float]:
        """Expected distances to the goal at the end of each turn."""
        costs = [0.0] * len(turns)
        for steps in range(1, self._most + 1):
            chosen = [i for i, turn in enumerate(turns) if self._steps(turn) == steps]
            if chosen:
                actions = self._complete(torch.cat([self._decisions(turns[i]) for i in chosen]))
                for i, cost in zip(chosen, joint.costs(actions).tolist(), strict=True):
                    costs[i] = cost
        return costs

    def _make_plan(self, imagination: Imagination, turn: float, cost: float) -> Plan:
        assert self._context is not None
        decisions = self._decisions(turn)
        actions = self._complete(decisions)
        return Plan(
            actions=actions[0],
            states=integrate_view(self._context.states[-1], actions[0]),
            features=imagination.rollout(actions)[0],
            cost=cost,
            costs=[{"best": cost, "current_mean": cost, "candidates": cost}],
            decisions=decisions[0],
            elites=decisions,
            ticks_per_step=ticks_per_step(self.processor),
        )
