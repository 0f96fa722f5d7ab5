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
FINE = 3  # headings of the belief for one that is imagined
FOUND = 0.5  # of the usual distance: a view as near shows where the goal is
LATER = 0.8  # what a heading that is passed a step later counts


def expected_distance(apart: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a view's distance to the goal, in parts of the usual one, by degrees apart.

    Fitted to percentiles of distances that were measured in the game (docs/planning.md, "Headings").
    """
    near = torch.exp(-apart / 6.0)
    return 1.0 - 0.9 * near, 0.19 - 0.1 * near


def passing_turn(belief: Tensor, headings: Tensor, now: float, largest_turn: float, spacing: float) -> float:
    """The first of two turns that pass, as soon as can be, the headings at which the goal is believed to be.

    Args:
        belief: `(K,)`, sums to 1.
        headings: `(K,)`, degrees.
        now: the heading.
        largest_turn: of a step.
        spacing: of the turns that are tried, which are its multiples. With T of them, `T * T * K` numbers are held.

    Returns:
        Degrees, within `largest_turn` to either side.
    """
    most = int(largest_turn / spacing + 1e-9)
    turns = torch.arange(-most, most + 1)  # in spacings; views, of which a turn has one in its middle, in halves of one
    views = now + torch.arange(-4 * most, 4 * most + 1, dtype=torch.float64) * spacing / 2
    apart = wrap_degrees(headings - views[:, None]).abs()  # (V, K)
    mean, deviation = expected_distance(apart)
    missed = 1 - torch.special.ndtr((FOUND - mean) / deviation)  # the goal is there, and the view does not tell
    first = 4 * most + 2 * turns
    once = belief * missed[first - turns] * missed[first]  # (T, K)
    twice = once[:, None] * missed[first[:, None] + turns] * missed[first[:, None] + 2 * turns]  # (T, T, K)
    passed = 1 - once.sum(-1)[:, None] + LATER * (once.sum(-1)[:, None] - twice.sum(-1))
    # What two turns have not passed can be passed as many steps later as it is away from where they end.
    later = LATER ** (2 + apart[first[:, None] + 2 * turns] / largest_turn)
    value = passed + (twice * later).sum(-1)
    return float(turns[int(value.max(dim=1).values.argmax())]) * spacing


class HeadingController(Controller):
    """Turns until a goal is seen: for goals that differ from the view now in yaw alone, however far away.

    A search over the next step's turn stands still in the first valley of the cost, which is some 10 degrees wide, and
    most valleys are wrong ones. Two things tell them apart. What is seen can be compared with the goal as it is:
    encoded alike, the same view has distance 0, and any view that is not within some 10 degrees of the goal nearly the
    same, large distance. And the whole circle can be imagined: as few equal turns as lead to a heading.

    Both make a belief over the headings at which the goal may be. Of every view so far (those in the middle of steps
    too), a normal density of its distance, whose mean and deviation depend on how far the goal would be from it
    (`expected_distance`). Of every heading, its imagined distance, as imagined from the nearest heading so far, and how
    far it is from the first view: `exp(-sharpness * distance - nearness * degrees / 90)`. A step is the first of two
    turns that pass as much of that belief as two can, what is passed later counting less: a search as in the theory of
    search (Koopman, 1956), by views that may miss what they pass. A view below `arrived`: go there and stay.

    All distances are parts of the usual one: the median of those that are at least three quarters of the largest.
    Nothing is random.

    Args:
        model: a `VJEPA2ACModel`.
        processor: its processor, whose action space has `yaw_delta`.
        goal: one view, as `plan` takes it.
        largest_turn: degrees a step.
        context_steps: steps to remember at most; None: as many as the model's clips leave room for.
        spacing: degrees between headings that are imagined.
        arrived: see above.
        sharpness: see above; 0 to imagine nothing.
        nearness: see above; 0 for goals that are as likely behind as in front.
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
        sharpness: float = 12.0,
        nearness: float = 2.0,
        others: Sequence[tuple[VJEPA2ACModel, VJEPA2ACProcessor]] = (),
        doubt: float = 0.0,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ):
        if not 0 < largest_turn < 180 or not 0 < spacing <= largest_turn:
            raise ValueError(
                f"largest_turn must be within (0, 180) and spacing within (0, largest_turn], found {largest_turn} and "
                f"{spacing}"
            )
        if not 0 <= arrived < 1 or not 0 <= sharpness < float("inf") or not 0 <= nearness < float("inf"):
            raise ValueError(
                "0 <= arrived < 1 and finite sharpness and nearness, at least 0, are needed, found "
                f"{arrived}, {sharpness} and {nearness}"
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
        self.largest_turn, self.spacing, self.arrived = largest_turn, spacing, arrived
        self.sharpness, self.nearness, self.max_batch_tokens = sharpness, nearness, max_batch_tokens

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
        if lowest < self.arrived * usual:
            turn, cost = float(wrap_degrees(best - now)), lowest
        else:
            headings, belief = self._believe(joint, now, usual)
            turn = passing_turn(belief, headings, now, self.largest_turn, self.spacing / FINE)
            nearest = min(self._imagined, key=lambda heading: abs(wrap_degrees(heading - now - turn)))
            cost = self._imagined[nearest][0]
        return self._make_plan(members[0][0], turn, cost)

    def _believe(self, joint: JointCost, now: float, usual: float) -> tuple[Tensor, Tensor]:
        """Headings `(K,)` of the circle, and how likely the goal is at each `(K,)`, which sums to 1."""
        start = self.seen[0][0]
        count = round(360 / self.spacing)
        imagined = [start + i * self.spacing for i in range(count)]
        away = {heading: abs(float(wrap_degrees(heading - now))) for heading in imagined}
        again = [h for h in imagined if away[h] <= FAR or h not in self._imagined]
        costs = self._imagine(joint, [float(wrap_degrees(h - now)) for h in again])
        for heading, cost in zip(again, costs, strict=True):
            if heading not in self._imagined or away[heading] <= self._imagined[heading][1]:
                self._imagined[heading] = (cost, away[heading])
        costs_K = torch.tensor([self._imagined[h][0] for h in imagined], dtype=torch.float64) / usual
        between = torch.arange(FINE, dtype=torch.float64) / FINE
        costs_K = (costs_K[:, None] * (1 - between) + costs_K.roll(-1)[:, None] * between).flatten()
        headings = start + torch.arange(count * FINE, dtype=torch.float64) * self.spacing / FINE
        log = -self.sharpness * costs_K - self.nearness * wrap_degrees(headings - start).abs() / 90
        for heading, distance in self.seen:
            mean, deviation = expected_distance(wrap_degrees(headings - heading).abs())
            log = log - ((distance / usual - mean) / deviation).square() / 2 - deviation.log()
        return headings, torch.softmax(log, dim=0)

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
