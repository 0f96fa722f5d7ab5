"""Ways to a goal frame within what the model imagines: steady turns all around, and a search that begins with them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..actions_vjepa2_ac import wrap_degrees
from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..planning.actions import COLUMN, SearchSpace
from ..planning.planner import Context, GoalCost, Plan, encode_context, plan
from ..planning.search import ICEM
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from .story import Story, feature_error

HORIZON = 6  # steps to look ahead, as far as the model's clips leave room for them
ITERATIONS = 3
CANDIDATES = 96  # at most, of an iteration
PRICE = 0.1  # share of the distance at the start that a turn of 90 degrees costs
VIEW = [COLUMN["yaw_delta"], COLUMN["pitch_delta"]]
STEADY = (None, "key.w")  # what is held during steady turns


class Arrival(GoalCost):
    """Lowest distance to the goal at any imagined step, and a price on how far the view has turned by then.

    What is imagined far away is blurred, and so less far from any goal than it should be: the price evens that out.

    Args:
        goal: `(N, D)`.
        price: of a degree, of yaw and of pitch.
        begun: `(2,)`, yaw and pitch from which turns are counted.
        now: `(2,)`, those before the first action.
    """

    def __init__(self, goal: Tensor, price: float, begun: Tensor, now: Tensor):
        super().__init__(goal)
        self.price, self.turned = price, now - begun

    def of_turn(self, changes: Tensor) -> Tensor:
        """The price of view changes `(..., 2)` since `now`."""
        turned = self.turned.to(changes) + changes
        return self.price * (wrap_degrees(turned[..., 0]).abs() + turned[..., 1].abs())

    def by_step(self, features: Tensor, actions: Tensor) -> Tensor:
        """Costs `(M, H)` of arriving at each step, of features `(M, H, N, D)` and raw actions `(M, H, 38)`."""
        distances = (features.float() - self.goal.to(features.device).float()).abs().mean(dim=(2, 3))
        return distances + self.of_turn(actions[..., VIEW].cumsum(dim=1)).to(distances)

    def __call__(self, features: Tensor, actions: Tensor) -> Tensor:
        return self.by_step(features, actions).amin(dim=1)


@dataclass
class Way:
    """A goal that is looked for, and the latest plan.

    Args:
        goal: number of the clip's step.
        begun: `(2,)`, yaw and pitch where it began.
        start: distance to the goal there.
        steps: taken so far.
        plan: the latest; None before the first.
        left: steps of the plan until it arrives, of which the first is next.
        expected: distance to the goal that the plan expects where it arrives.
    """

    goal: int
    begun: Tensor
    start: float
    steps: int = 0
    plan: Plan | None = None
    left: int = 0
    expected: float = 0.0


def steady(space: SearchSpace, horizon: int, count: int) -> Tensor:
    """Decisions `(P, horizon, width)`, P at most `count`: the same turn at every step, from bound to bound."""
    turning = next((c for c in ("yaw_delta", "mouse_dx") if c in space.continuous), None)
    held = [key for key in STEADY if key is None or key in space.keys]
    turns = max(count // len(held), 1) if turning else 1
    still = space.mode(space.initial(horizon))
    still[:, : len(space.continuous)] = torch.zeros_like(space.low).clamp(space.low, space.high)
    decisions = still.repeat(turns, len(held), 1, 1)
    for number, key in enumerate(held):
        if key is not None:
            decisions[:, number, :, len(space.continuous) + space.keys.index(key)] = 1
    if turning:
        at = space.continuous.index(turning)
        rates = torch.linspace(float(space.low[at]), float(space.high[at]), turns, dtype=torch.float64)
        decisions[..., at] = rates[:, None, None]
    return decisions.flatten(0, 1)


def look_ahead(
    model: VJEPA2ACModel, processor: VJEPA2ACProcessor, story: Story, way: Way, space: SearchSpace, candidates: int
) -> bool:
    """Find the next step of a way; False where nothing that is found comes closer than the view now.

    Args:
        model: a `VJEPA2ACModel`.
        processor: its processor.
        story: from whose latest step on to look.
        way: whose plan is the earlier one, if any, and becomes what is found.
        space: what may be done.
        candidates: of each of `ITERATIONS` iterations; each is imagined for `horizon_of(story)` steps.
    """
    horizon = horizon_of(story)
    known = range(max(story.window.start, story.now + 1 - (model.config.num_steps - horizon)), story.now + 1)
    context = encode_context(
        model,
        processor,
        features=torch.stack([story.features(step) for step in known]),
        states=torch.stack([story.state(step) for step in known]),
        actions=torch.stack([story.action(step) for step in known[:-1]]) if len(known) > 1 else None,
        slot=story.slot,
    )
    wanted = story.scene.features[way.goal]
    cost = Arrival(wanted, PRICE * way.start / 90, way.begun, story.state(story.now))

    def proposals(context: Context, goal: Tensor, space: SearchSpace, horizon: int) -> Tensor:
        return steady(space, horizon, candidates // 2)

    found = plan(
        model,
        processor,
        context,
        cost,
        horizon=horizon,
        generator=torch.Generator().manual_seed(len(story.steps)),
        space=space,
        method=ICEM(iterations=ITERATIONS, candidates=candidates, elites=max(candidates // 8, 2)),
        warm_start=way.plan if way.left > 1 else None,
        proposals=proposals,
        proposal_mean=False,
    )
    left = 1 + int(cost.by_step(found.features[None], found.actions[None])[0].argmin())
    expected, now = feature_error(found.features[left - 1], wanted), feature_error(story.features(story.now), wanted)
    if expected >= now or found.cost >= now + float(cost.of_turn(torch.zeros(2))):
        return False
    way.plan, way.left, way.expected = found, left, expected
    return True


def horizon_of(story: Story) -> int:
    """Steps to look ahead: what is left of the story's window, but not few of them."""
    steps = story.model.config.num_steps
    return min(HORIZON, max(steps - len(story.window), steps // 2))
