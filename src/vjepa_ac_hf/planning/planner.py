"""Plans: actions whose imagined future has a low cost (docs/planning.md).

Letters: C context steps, H steps of the horizon, M candidates, N frame tokens a step, D encoder width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..actions_vjepa2_ac import ACTION_COLUMNS
from ..evaluation.clips import check_model_and_processor, check_same_steps
from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..processing_vjepa2_ac import PITCH_SCALE, VJEPA2ACProcessor
from .actions import COLUMN, NUM_SLOTS, NUMBER_KEYS, SLOTS, Distribution, SearchSpace, integrate_view
from .environments import to_minerl_action, to_vpt_lines
from .search import CEM, MPPI, GradientRefinement, minimize, refine

Cost = Callable[[Tensor, Tensor], Tensor]  # features (M, H, N, D), raw actions (M, H, 38) -> costs (M,)
Proposals = Callable[["Context", Tensor, SearchSpace, int], Tensor]  # ..., goal's features, ... -> (P, H, width)
NATIVE_FPS = 20  # Minecraft's ticks a second
MAX_BATCH_TOKENS = 2**14


@dataclass(frozen=True)
class Context:
    """What is known when planning begins: C steps, of which the last is now. `encode_context` makes and checks it.

    Args:
        features: `(C, N, D)`, on the model's device.
        states: `(C, 2)`, yaw and pitch in degrees.
        actions: `(C - 1, 38)`, raw; action t led from step t to t+1.
        slot: hotbar slot 0..8 now; None where it is not known.
    """

    features: Tensor
    states: Tensor
    actions: Tensor
    slot: int | None


@dataclass(frozen=True)
class Plan:
    """Actions to take and what the model expects of them.

    Args:
        actions: `(H, 38)`, raw units, columns `ACTION_COLUMNS`, float64.
        states: `(H + 1, 2)`, degrees: now, then after each action.
        features: `(H, N, D)`: what the model expects to see after each action.
        cost: of these actions.
        costs: an object an iteration: `best` so far, `current_mean` (the distribution's mean, drawn from in this
            iteration), `candidates` (mean over all candidates); then one a step of a refinement, with the first start
            for the mean, and its starts for the candidates.
        decisions: `(H, width)`, what was searched: for `warm_start`.
        elites: `(E, H, width)`, the best candidates of the last iteration, as many as the method keeps: likewise.
        ticks_per_step: game ticks that an action lasts.
    """

    actions: Tensor
    states: Tensor
    features: Tensor
    cost: float
    costs: list[dict[str, float]]
    decisions: Tensor
    elites: Tensor
    ticks_per_step: int

    def to_minerl(self) -> list[dict[str, Any]]:
        """MineRL's action of every tick (`to_minerl_action`)."""
        return to_minerl_action(self.actions, ticks_per_step=self.ticks_per_step)

    def to_vpt(self) -> list[dict[str, Any]]:
        """A line of a VPT log for every tick (`to_vpt_lines`)."""
        return to_vpt_lines(self.actions, self.states[0], ticks_per_step=self.ticks_per_step)


class GoalCost:
    """Mean absolute difference of imagined features to a goal's: V-JEPA 2-AC's energy (arXiv 2506.09985, section 3.2).

    Args:
        goal: `(N, D)`, or `(H, N, D)`, a goal for every step.
        steps: "last": only the last imagined step counts; "mean": all of them, weighted by `discount ** h`. None:
            "mean" for a goal of every step, "last" for one goal.
        discount: above 0; 1 weighs all steps alike, below 1 the early ones more.

    Raises:
        ValueError: another rank, values that are not finite, an option out of range.
    """

    def __init__(self, goal: Tensor, *, steps: str | None = None, discount: float = 1.0):
        if goal.ndim not in (2, 3) or not goal.is_floating_point():
            raise ValueError(
                f"a goal must be features (tokens, width) or (steps, tokens, width), found {goal.dtype} "
                f"{tuple(goal.shape)}"
            )
        if not torch.isfinite(goal).all():
            raise ValueError(f"the goal has {int((~torch.isfinite(goal)).sum())} values that are not finite")
        steps = ("mean" if goal.ndim == 3 else "last") if steps is None else steps
        if steps not in ("last", "mean"):
            raise ValueError(f"steps must be 'last' or 'mean', found {steps!r}")
        if not 0 < discount < float("inf"):
            raise ValueError(f"discount must be above 0 and finite, found {discount}")
        self.goal, self.steps, self.discount = goal, steps, discount

    @property
    def scale(self) -> float:
        """How far the goal's tokens are from their mean: mean absolute deviation, at least 1e-6."""
        goal = self.goal.double()
        return max(float((goal - goal.mean(dim=-2, keepdim=True)).abs().mean()), 1e-6)

    def __call__(self, features: Tensor, actions: Tensor) -> Tensor:
        """Costs `(M,)` of features `(M, H, N, D)`, float32; actions are not used."""
        horizon = features.shape[1]
        goal = self.goal.to(features.device)
        if self.goal.ndim == 3 and len(goal) != horizon:
            raise ValueError(f"a goal for every step must have {horizon} steps, found {len(goal)}")
        if tuple(goal.shape[-2:]) != tuple(features.shape[-2:]):
            raise ValueError(
                f"the goal's features must be {tuple(features.shape[-2:])} as the model's are, found "
                f"{tuple(goal.shape[-2:])}"
            )
        if self.steps == "last":
            return (features[:, -1].float() - (goal[-1] if goal.ndim == 3 else goal).float()).abs().mean(dim=(1, 2))
        distances = (features.float() - goal.float()).abs().mean(dim=(2, 3))
        weights = self.discount ** torch.arange(horizon, device=features.device, dtype=torch.float32)
        return distances @ (weights / weights.sum())


def make_cost(
    model: VJEPA2ACModel,
    processor: VJEPA2ACProcessor,
    goal: Any,
    horizon: int,
    *,
    steps: str | None,
    discount: float,
    as_pictures: bool,
) -> Cost:
    """The `GoalCost` of a goal, as `plan` takes it; a cost is returned as it is.

    Raises:
        ValueError: a goal that does not fit to the model or the horizon, `GoalCost`'s options beside another cost.
    """
    if callable(goal) and not isinstance(goal, Tensor):
        if steps is not None or discount != 1.0 or as_pictures:
            raise ValueError(
                "goal_steps, discount and goal_as_pictures are for goals: a cost function takes none, found "
                f"{steps!r}, {discount} and {as_pictures}"
            )
        return goal
    cost = GoalCost(encode_goal(model, processor, goal, as_pictures=as_pictures), steps=steps, discount=discount)
    if cost.goal.ndim == 3 and len(cost.goal) != horizon:
        raise ValueError(f"a goal for every step must have {horizon} steps, found {len(cost.goal)}")
    return cost


def ticks_per_step(processor: VJEPA2ACProcessor) -> int:
    """Game ticks that an action of the model lasts.

    Raises:
        ValueError: 20 ticks a second that are not a multiple of the processor's frame rate, or recordings with others.
    """
    if processor.native_fps != NATIVE_FPS:
        raise ValueError(
            f"the game has {NATIVE_FPS} ticks a second, the recordings that the model was trained on have "
            f"{processor.native_fps:g} (the processor's native_fps)"
        )
    if NATIVE_FPS % processor.fps:
        raise ValueError(f"{NATIVE_FPS} ticks a second are not a multiple of the processor's fps {processor.fps}")
    return processor.tubelet_size * int(NATIVE_FPS // processor.fps)


def check_planning(model: VJEPA2ACModel, processor: VJEPA2ACProcessor, space: SearchSpace | None = None) -> None:
    """Raise a ValueError where model, processor and search space do not belong together, or cannot plan."""
    check_model_and_processor(model, processor)
    if model.config.state_dim != 2:
        raise ValueError(
            f"planning needs states of 2 columns (yaw, pitch), the model's state_dim is {model.config.state_dim}"
        )
    if space is not None and space.columns != processor.action_space:
        raise ValueError(
            f"the search space's action space is {space.columns}, but the processor's is {processor.action_space}"
        )
    ticks_per_step(processor)


def check_doubt(doubt: float) -> float:
    if not 0 <= doubt < float("inf"):
        raise ValueError(f"doubt must be a finite number, at least 0, found {doubt}")
    return doubt


def encode_frames(
    model: VJEPA2ACModel, processor: VJEPA2ACProcessor, frames: Any, name: str, *, as_pictures: bool = False
) -> Tensor:
    """Features `(steps, N, D)` of uint8 frames, tubelet by tubelet, or with `as_pictures` frame by frame.

    Raises:
        ValueError: frames of another type or shape, a model that encodes whole clips.
    """
    if model.config.encoding != "tubelet":
        raise ValueError(
            f"{name}: single steps cannot be encoded, the model's encoding is {model.config.encoding!r}, not 'tubelet'"
        )
    shape = tuple(getattr(frames, "shape", ()))
    if len(shape) != 4 or 3 not in (shape[1], shape[-1]):
        raise ValueError(f"{name} must be uint8 (frames, 3, height, width), found {shape}")
    per_step = 1 if as_pictures else processor.tubelet_size
    if len(frames) == 0 or len(frames) % per_step:
        raise ValueError(f"{name} must be a multiple of tubelet_size {per_step} frames, found {len(frames)}")
    pixels = processor.normalize_pixels(processor.resize(frames)[None].to(model.device))
    return (model.encode(pixels, as_pictures=True) if as_pictures else model.encode(pixels))[0]


def encode_context(
    model: VJEPA2ACModel,
    processor: VJEPA2ACProcessor,
    *,
    frames: Any = None,
    features: Tensor | None = None,
    states: Any = None,
    actions: Any = None,
    slot: int | None = None,
) -> Context:
    """A context from what was seen, at the clip's frame rate.

    Args:
        model: a `VJEPA2ACModel`.
        processor: its processor.
        frames: uint8 `(C * tubelet_size, 3, Y, X)` or `(C * tubelet_size, Y, X, 3)`; or
        features: `(C, N, D)` of `model.encode`, instead.
        states: `(C, 2)`, yaw and pitch in degrees at each step.
        actions: `(C - 1, 38)`, raw; not needed for C = 1.
        slot: hotbar slot 0..8 now; None: as the last action leaves it, 0 without any action. Where the last action
            tells no slot (recorders before 6.11 log none) it is not known: imagined actions then hold none either,
            until a number key is pressed.

    Raises:
        ValueError: missing or contradicting parts; the message has what was expected and found.
    """
    check_planning(model, processor)
    if (frames is None) == (features is None):
        raise ValueError("give either frames or features of the context, and not both")
    if features is None:
        features = encode_frames(model, processor, frames, "context frames")
    tokens, width = model.config.num_tokens, model.config.feature_size
    if features.ndim != 3 or tuple(features.shape[1:]) != (tokens, width) or len(features) == 0:
        raise ValueError(f"context features must be (steps, {tokens}, {width}), found {tuple(features.shape)}")
    steps = len(features)
    if states is None:
        raise ValueError(f"a context of {steps} steps needs {steps} states (yaw, pitch), found none")
    states = torch.as_tensor(states).double().cpu()
    if tuple(states.shape) != (steps, 2):
        raise ValueError(f"a context of {steps} steps needs states ({steps}, 2), found {tuple(states.shape)}")
    actions = torch.zeros(0, len(ACTION_COLUMNS)) if actions is None else torch.as_tensor(actions)
    actions = actions.double().cpu()
    if tuple(actions.shape) != (steps - 1, len(ACTION_COLUMNS)):
        raise ValueError(
            f"a context of {steps} steps needs raw actions ({steps - 1}, {len(ACTION_COLUMNS)}), found "
            f"{tuple(actions.shape)}"
        )
    for name, values in (("features", features), ("states", states), ("actions", actions)):
        if not torch.isfinite(values).all():
            raise ValueError(
                f"the context's {name} have {int((~torch.isfinite(values)).sum())} values that are not finite"
            )
    if states[:, 1].abs().max() > PITCH_SCALE:
        raise ValueError(f"pitch must be within [-90, 90] degrees, found {float(states[:, 1].abs().max()):g}")
    slot = next_slot(actions) if slot is None else slot
    if slot is not None and slot not in range(NUM_SLOTS):
        raise ValueError(f"slot must be a whole number from 0 to {NUM_SLOTS - 1}, found {slot!r}")
    return Context(features.to(model.device), states, actions, None if slot is None else int(slot))


def next_slot(actions: Tensor) -> int | None:
    """Hotbar slot after raw actions `(steps, 38)`: of the last number key, else as it was; 0 without any action, None
    where the last one does not tell."""
    if len(actions) == 0:
        return 0
    keys = actions[-1, [COLUMN[name] for name in NUMBER_KEYS]].nonzero().flatten().tolist()
    slots = actions[-1, [COLUMN[name] for name in SLOTS]].nonzero().flatten().tolist()
    return (keys or slots or [None])[-1]


def encode_goal(model: VJEPA2ACModel, processor: VJEPA2ACProcessor, goal: Any, *, as_pictures: bool = False) -> Tensor:
    """A goal's features, `(N, D)`, or `(G, N, D)` for a goal of every step.

    Args:
        model: a `VJEPA2ACModel`.
        processor: its processor.
        goal: features `(N, D)` or `(G, N, D)` of `model.encode`; or uint8 frames: one, `(3, Y, X)` or `(Y, X, 3)`,
            which is repeated to a tubelet, or `(G * tubelet_size, 3, Y, X)`.
        as_pictures: every frame, or the one, goes by the image path of a V-JEPA 2.1 encoder instead: `(G, 3, Y, X)`.
            Its features differ from a tubelet's, which are what a predictor predicts (docs/model.md, "A picture").

    Raises:
        ValueError: another geometry than the model's; the message has both; pictures for an encoder without.
    """
    goal = torch.as_tensor(goal)
    if as_pictures and goal.is_floating_point():
        raise ValueError(f"as_pictures needs a goal of frames, found features {tuple(goal.shape)}")
    if not goal.is_floating_point():
        repeats = 1 if as_pictures else processor.tubelet_size
        frames = goal[None].expand(repeats, -1, -1, -1) if goal.ndim == 3 else goal
        features = encode_frames(model, processor, frames, "goal frames", as_pictures=as_pictures)
        return features[0] if len(features) == 1 else features
    expected = (model.config.num_tokens, model.config.feature_size)
    if goal.ndim not in (2, 3) or tuple(goal.shape[-2:]) != expected:
        raise ValueError(
            f"goal features must be {expected} or (steps, {expected[0]}, {expected[1]}) as the model's are, found "
            f"{tuple(goal.shape)}"
        )
    return goal.to(model.device)


class Imagination:
    """Rollouts of candidate actions from one context, and their costs, in bounded memory.

    Args:
        model: a `VJEPA2ACModel`.
        processor: its processor.
        context: of `encode_context`.
        max_batch_tokens: as `VJEPA2ACModel.rollout` has it. Candidates beyond that go in parts; the context is run once
            for each part, and imagined features are kept for one part only.

    Raises:
        ValueError: too few tokens for one candidate.
    """

    def __init__(
        self,
        model: VJEPA2ACModel,
        processor: VJEPA2ACProcessor,
        context: Context,
        *,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ):
        self.model, self.processor, self.context = model, processor, context
        self.candidates_at_once = model.candidates_at_once(max_batch_tokens)

    @torch.no_grad()
    def rollout(self, actions: Tensor) -> Tensor:
        """Imagined features `(M, H, N, D)` of raw actions `(M, H, 38)`, all M at once."""
        return self._rollout(actions)

    def _rollout(self, actions: Tensor) -> Tensor:
        known, device = self.context, self.model.device
        candidates, steps = len(actions), len(known.features)
        whole = torch.cat([known.actions.expand(candidates, -1, -1), actions.double().cpu()], dim=1)
        future = integrate_view(known.states[-1], whole[:, steps - 1 :])
        states = torch.cat([known.states.expand(candidates, -1, -1), future[:, 1:]], dim=1)
        return self.model.rollout(
            known.features[None],
            self.processor.normalize_actions(whole).to(device)[None],
            self.processor.normalize_states(states).to(device)[None],
        )[0]

    @torch.no_grad()
    def costs(self, actions: Tensor, cost: Cost) -> Tensor:
        """Costs `(M,)`, float64 on the CPU, of raw actions `(M, H, 38)`.

        Args:
            actions: the candidates.
            cost: called with the features `(m, H, N, D)` and raw actions `(m, H, 38)`, on the model's device, of m
                candidates at a time: it must not compare candidates.

        Raises:
            ValueError: costs of another shape or type, or that are not finite.
        """
        found = []
        for part in actions.split(self.candidates_at_once):
            # float32 for the cost: not every device has float64.
            costs = cost(self.rollout(part), part.float().to(self.model.device))
            found.append(check_costs(costs, len(part)))
        return torch.cat(found)

    def costs_and_gradients(
        self, decisions: Tensor, complete: Callable[[Tensor], Tensor], cost: Cost
    ) -> tuple[Tensor, Tensor]:
        """Costs `(M,)` and their gradients, as decisions are, float64 on the CPU, through the rollout.

        What the gradient needs is held for all steps and layers: parts are as much smaller, at least one candidate.

        Args:
            decisions: `(M, ...)`.
            complete: raw actions `(m, H, 38)` of decisions `(m, ...)`, differentiable.
            cost: as for `costs`, and differentiable.

        Raises:
            ValueError: costs that `costs` refuses, or without a gradient; gradients that are not finite.
        """
        held = decisions.shape[1] * self.model.config.pred_num_hidden_layers
        found, slopes = [], []
        for part in decisions.split(max(self.candidates_at_once // held, 1)):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                actions = complete(part)
                costs = cost(self._rollout(actions), actions.float().to(self.model.device))
                found.append(check_costs(costs, len(part)))
                if not costs.requires_grad:
                    raise ValueError("the cost function has no gradient: gradient refinement needs one")
                slopes.append(torch.autograd.grad(costs.sum(), part)[0])
            if not torch.isfinite(slopes[-1]).all():
                wrong = int((~torch.isfinite(slopes[-1])).sum())
                raise ValueError(f"the cost's gradient has {wrong} values that are not finite")
        return torch.cat(found), torch.cat(slopes)


class JointCost:
    """What several models expect of the same actions, as one cost: their mean, and their disagreement as doubt.

    Models may have encoders of their own, whose distances are of other sizes: of several, each one's cost is divided by
    its `scale`, the mean absolute deviation of the goal's tokens from their mean. One alone keeps its cost as it is.

    Args:
        members: what each model imagines, and the cost of it.
        doubt: how much of the standard deviation over the members is added to their mean.
    """

    def __init__(self, members: Sequence[tuple[Imagination, Cost]], doubt: float = 0.0):
        self.members, self.doubt = list(members), doubt
        alone = len(self.members) == 1
        self.scales = [1.0 if alone or not isinstance(cost, GoalCost) else cost.scale for _, cost in self.members]

    def _join(self, costs_KM: Tensor) -> tuple[Tensor, Tensor]:
        """Joint costs `(M,)`, and their derivatives by each member's `(K, M)`."""
        mean, std = costs_KM.mean(dim=0), costs_KM.std(dim=0, correction=0)
        slope = (costs_KM - mean) / torch.where(std > 0, std, torch.ones_like(std))
        return mean + self.doubt * std, (1 + self.doubt * slope) / len(costs_KM)

    def costs(self, actions: Tensor) -> Tensor:
        """Costs `(M,)`, float64 on the CPU, of raw actions `(M, H, 38)`."""
        found = [m.costs(actions, cost) / scale for (m, cost), scale in zip(self.members, self.scales, strict=True)]
        return self._join(torch.stack(found))[0]

    def distances(self, features: Sequence[Tensor]) -> Tensor:
        """Costs `(M,)` of views `(M, N, D)` that each member has encoded itself."""
        found = [
            check_costs(cost(f[:, None], f.new_zeros(len(f), 1, len(ACTION_COLUMNS))), len(f)) / scale
            for (_, cost), scale, f in zip(self.members, self.scales, features, strict=True)
        ]
        return self._join(torch.stack(found))[0]

    def costs_and_gradients(self, decisions: Tensor, complete: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """As `Imagination.costs_and_gradients`."""
        found = [m.costs_and_gradients(decisions, complete, cost) for m, cost in self.members]
        costs = torch.stack([c / scale for (c, _), scale in zip(found, self.scales, strict=True)])
        slopes = torch.stack([g / scale for (_, g), scale in zip(found, self.scales, strict=True)])
        joint, weights = self._join(costs)
        return joint, (weights[..., None, None] * slopes).sum(dim=0)


def check_costs(costs: Any, candidates: int) -> Tensor:
    """Costs `(candidates,)` as float64 on the CPU; anything else is a ValueError."""
    if not isinstance(costs, Tensor) or tuple(costs.shape) != (candidates,) or not costs.is_floating_point():
        found = f"{costs.dtype} {tuple(costs.shape)}" if isinstance(costs, Tensor) else type(costs).__name__
        raise ValueError(f"the cost function must return floating-point numbers ({candidates},), found {found}")
    costs = costs.detach().cpu().double()
    wrong = (~torch.isfinite(costs)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"the cost function must return finite costs, found {float(costs[wrong[0]])} for candidate {wrong[0]} "
            f"({len(wrong)} of {candidates} are not finite)"
        )
    return costs


def check_proposals(proposals: Proposals, context: Context, cost: Cost, space: SearchSpace, horizon: int) -> Tensor:
    """Decisions `(P, horizon, width)` that are proposed for a goal; anything else is a ValueError."""
    if not isinstance(cost, GoalCost):
        raise ValueError(f"proposals need a goal's features, found the cost {cost!r}")
    found = proposals(context, cost.goal, space, horizon)
    if found.ndim != 3 or tuple(found.shape[1:]) != (horizon, space.width) or len(found) == 0:
        raise ValueError(f"proposals must be decisions (P, {horizon}, {space.width}), found {tuple(found.shape)}")
    return found.double().cpu()


def check_horizon(model: VJEPA2ACModel, context_steps: int, horizon: int) -> None:
    """Raise a ValueError where context and horizon are longer than the clips that the model was trained on."""
    longest = model.config.num_steps - context_steps
    if not isinstance(horizon, int) or not 1 <= horizon <= longest:
        raise ValueError(
            f"horizon must be a whole number from 1 to {longest} for a context of {context_steps} steps and a model of "
            f"{model.config.num_steps} steps, found {horizon}"
        )


def _begin(
    space: SearchSpace,
    horizon: int,
    method: CEM | MPPI,
    earlier: Plan | None,
    shift: int,
    proposed: Tensor | None,
    as_mean: bool,
) -> tuple[Distribution, Tensor]:
    """Where a search begins: its distribution, and candidates `(P, H, width)` beside that one's mean."""
    initial, first = space.initial(horizon), torch.zeros(0, horizon, space.width, dtype=torch.float64)
    if earlier is not None:
        initial = space.warm_start(earlier.decisions, shift, horizon)
        first = space.shift(earlier.elites[1 : method.kept], shift, horizon)
    if proposed is None:
        return initial, first
    if not as_mean:
        return initial, torch.cat([proposed, first])
    around = space.warm_start(proposed[0], 0, horizon)
    return around, torch.cat([proposed[1:], space.mode(initial)[None], first])


def _members(
    judges: "Sequence[tuple[VJEPA2ACModel, VJEPA2ACProcessor, Context, Any]]",
    space: SearchSpace,
    horizon: int,
    max_batch_tokens: int,
    chosen: dict[str, Any],
) -> list[tuple[Imagination, Cost]]:
    """What each judge imagines, and its cost (`make_cost`'s options are `chosen`); checked against space and steps."""
    members = []
    for model, processor, context, goal in judges:
        check_same_steps(judges[0][1], processor)
        check_planning(model, processor, space)
        check_horizon(model, len(context.features), horizon)
        cost = make_cost(model, processor, goal, horizon, **chosen)
        members.append((Imagination(model, processor, context, max_batch_tokens=max_batch_tokens), cost))
    return members


def plan(
    model: VJEPA2ACModel,
    processor: VJEPA2ACProcessor,
    context: Context,
    goal: Any,
    *,
    horizon: int,
    generator: torch.Generator,
    space: SearchSpace | None = None,
    method: CEM | MPPI | None = None,
    goal_steps: str | None = None,
    goal_as_pictures: bool = False,
    discount: float = 1.0,
    warm_start: Plan | None = None,
    shift: int = 1,
    refinement: GradientRefinement | None = None,
    proposals: Proposals | None = None,
    proposal_mean: bool = True,
    others: "Sequence[tuple[VJEPA2ACModel, VJEPA2ACProcessor, Context, Any]]" = (),
    doubt: float = 0.0,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> Plan:
    """Actions whose imagined future has a low cost.

    Args:
        model: a `VJEPA2ACModel`.
        processor: its processor.
        context: of `encode_context`.
        goal: what `encode_goal` takes, or a cost: a function of features `(m, H, N, D)` and raw actions `(m, H, 38)`
            that returns `(m,)`, for m candidates at a time.
        horizon: steps H to plan; with the context at most the steps of the model's clips.
        generator: of all random numbers: the same seed gives the same plan.
        space: what is searched; None: all of the processor's action space, with default bounds.
        method: `CEM()` (the default), `ICEM()` or `MPPI()`.
        goal_steps: `GoalCost`'s `steps`.
        goal_as_pictures: `encode_goal`'s `as_pictures`.
        discount: `GoalCost`'s.
        warm_start: an earlier plan to start from, of the same search space.
        shift: how many of its steps are done.
        refinement: steps down the gradient of what the method has found.
        proposals: a function of context, the goal's features, space and horizon that returns decisions
            `(P, H, width)`, such as `InverseDynamicsProposals`: candidates of the first iteration.
        proposal_mean: the search begins around the first of them, in place of the bounds' middle or the earlier plan
            (which stays a candidate).
        others: more models that judge, with their processors, contexts and goals, each of its own encoder: `JointCost`.
        doubt: `JointCost`'s.
        max_batch_tokens: see `Imagination`.

    Raises:
        ValueError: whatever does not fit together; the message has both values. Before any rollout, but for a cost.
    """
    if space is None:
        space = SearchSpace(processor.action_space, statistics=processor.action_statistics)
    chosen: dict[str, Any] = {"steps": goal_steps, "discount": discount, "as_pictures": goal_as_pictures}
    judges = [(model, processor, context, goal), *others]
    joint = JointCost(_members(judges, space, horizon, max_batch_tokens, chosen), check_doubt(doubt))
    imagination, cost = joint.members[0]
    method = CEM() if method is None else method
    complete = partial(space.complete, pitch=float(context.states[-1, 1]), slot=context.slot)

    def evaluate(decisions: Tensor) -> Tensor:
        return joint.costs(complete(decisions))

    proposed = None if proposals is None else check_proposals(proposals, context, cost, space, horizon)
    initial, first = _begin(space, horizon, method, warm_start, shift, proposed, proposal_mean)
    result = minimize(evaluate, space, initial, method=method, generator=generator, proposals=first)
    if refinement is not None:
        gradients = partial(joint.costs_and_gradients, complete=complete)
        result = refine(result, evaluate, gradients, space, refinement)
    actions = complete(result.decisions[None])
    return Plan(
        actions=actions[0],
        states=integrate_view(context.states[-1], actions[0]),
        features=imagination.rollout(actions)[0],
        cost=result.cost,
        costs=result.costs,
        decisions=result.decisions,
        elites=result.ranked[: method.kept],
        ticks_per_step=ticks_per_step(processor),
    )
