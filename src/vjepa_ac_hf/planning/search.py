"""Ways to search for decisions of low cost: CEM, iCEM, MPPI, and gradients (docs/planning.md, "Methods").

The first three draw candidates from a distribution, weigh them by their costs and fit the distribution to the weighted
ones. Among the candidates of every iteration are the distribution's mean and the best of all so far. `refine` goes on
from what they found, along the cost's gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from .actions import Distribution, SearchSpace

RETURNS = ("best", "mean")


def _check_at_least(method: Any, **least: float) -> None:
    for name, lowest in least.items():
        value = getattr(method, name)
        whole = {f.name: f.type for f in fields(method)}[name] is int
        if (whole and not isinstance(value, int)) or not math.isfinite(value) or value < lowest:
            kind = "a whole number of" if whole else "a finite number of"
            raise ValueError(f"{type(method).__name__}: {name} must be {kind} at least {lowest}, found {value}")


def _check_share(method: Any, *names: str) -> None:
    for name in names:
        value = getattr(method, name)
        most = 0.5 if name == "minimum_probability" else 1
        if not 0 <= value < most:
            raise ValueError(f"{type(method).__name__}: {name} must be at least 0 and below {most}, found {value}")


def _check_returns(method: Any) -> None:
    if method.returns not in RETURNS:
        raise ValueError(f"{type(method).__name__}: returns must be one of {RETURNS}, found {method.returns!r}")


@dataclass(frozen=True)
class CEM:
    """Cross-entropy method: the distribution is fitted to the candidates of lowest cost, the elites.

    Args:
        iterations: of drawing and fitting.
        candidates: evaluated in each iteration, the current mean and the best so far included.
        elites: candidates that the distribution is fitted to.
        smoothing: share of the old distribution that is kept.
        minimum_std: lowest standard deviation, as a share of the initial one.
        minimum_probability: lowest probability of pressing, and of not pressing, a key.
        noise_exponent: of `colored_noise` over the steps; 0: white.
        keep_elites: share of the elites that are candidates of the next iteration too.
        candidates_decay: the number of candidates is divided by this after every iteration, down to twice the elites.
        returns: "best" of all candidates, or the final "mean".

    Source: Rubinstein and Kroese, The Cross-Entropy Method, 2004; V-JEPA 2-AC, arXiv 2506.09985, section 3.2.

    Raises:
        ValueError: a value out of range.
    """

    iterations: int = 8
    candidates: int = 128
    elites: int = 16
    smoothing: float = 0.1
    minimum_std: float = 0.02
    minimum_probability: float = 0.02
    noise_exponent: float = 0.0
    keep_elites: float = 0.0
    candidates_decay: float = 1.0
    returns: str = "best"

    def __post_init__(self) -> None:
        _check_at_least(self, iterations=1, candidates=3, elites=1, noise_exponent=0, candidates_decay=1)
        _check_share(self, "smoothing", "minimum_std", "minimum_probability", "keep_elites")
        _check_returns(self)
        name = type(self).__name__
        if self.elites > self.candidates:
            raise ValueError(f"{name}: elites must be at most the {self.candidates} candidates, found {self.elites}")
        if self.kept + 2 > self.candidates:
            raise ValueError(
                f"{name}: with {self.candidates} candidates at most {self.candidates - 2} elites can be kept, found "
                f"{self.kept} (keep_elites {self.keep_elites} of {self.elites})"
            )

    @property
    def kept(self) -> int:
        """How many candidates of an iteration are among those of the next."""
        return max(1, round(self.keep_elites * self.elites))

    def population(self, iteration: int) -> int:
        """Candidates of an iteration."""
        least = min(self.candidates, max(2 * self.elites, self.kept + 2))
        return max(least, round(self.candidates / self.candidates_decay**iteration))

    def weigh(self, costs: Tensor) -> Tensor:
        """Weights `(M,)` of candidates: equal among the elites, 0 elsewhere."""
        chosen = costs.argsort(stable=True)[: self.elites]
        return torch.zeros_like(costs).index_fill_(0, chosen, 1 / self.elites)

    def next_std(self, fitted: Tensor, old: Tensor, initial: Tensor) -> Tensor:
        return torch.maximum(torch.lerp(fitted, old, self.smoothing), self.minimum_std * initial)


@dataclass(frozen=True)
class ICEM(CEM):
    """Improved cross-entropy method: `CEM` whose noise is coloured, whose elites stay, and whose candidates get fewer.

    A plan that goes on from an earlier one (`warm_start`) begins with its elites, too.

    Source: Pinneri et al., Sample-efficient Cross-Entropy Method for Real-time Planning, CoRL 2020, arXiv 2008.06389.
    """

    noise_exponent: float = 2.0
    keep_elites: float = 0.3
    candidates_decay: float = 1.25


@dataclass(frozen=True)
class MPPI:
    """Model predictive path integral control: all candidates count, by exp(-cost / temperature).

    Costs are normalised before they are weighed: minus the lowest, over the candidates' standard deviation. The
    temperature is therefore in standard deviations, whatever the cost's scale.

    Args:
        iterations: of drawing and averaging.
        candidates: evaluated in each iteration, the current mean and the best so far included.
        temperature: lower is greedier.
        noise_decay: factor on the noise (standard deviations) after each iteration.
        smoothing: share of the old distribution that is kept.
        minimum_probability: lowest probability of pressing, and of not pressing, a key.
        noise_exponent: of `colored_noise` over the steps; 0: white.
        returns: "best" of all candidates, or the final "mean".

    Source: Williams et al., Information Theoretic MPC, ICRA 2017.

    Raises:
        ValueError: a value out of range.
    """

    iterations: int = 8
    candidates: int = 128
    temperature: float = 0.2
    noise_decay: float = 0.8
    smoothing: float = 0.0
    minimum_probability: float = 0.02
    noise_exponent: float = 0.0
    returns: str = "mean"
    kept: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _check_at_least(self, iterations=1, candidates=3, noise_exponent=0)
        _check_share(self, "smoothing", "minimum_probability")
        _check_returns(self)
        for name, most in (("temperature", math.inf), ("noise_decay", 1)):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 < value <= most):
                raise ValueError(f"MPPI: {name} must be above 0 and at most {most:g}, found {value}")

    def population(self, iteration: int) -> int:
        """Candidates of an iteration."""
        return self.candidates

    def weigh(self, costs: Tensor) -> Tensor:
        """Weights `(M,)` of candidates, which sum to 1; equal where all costs are."""
        spread = costs.std(correction=0)
        above = (costs - costs.min()) / torch.where(spread > 0, spread, torch.ones_like(spread))
        return torch.softmax(-above / self.temperature, dim=0)

    def next_std(self, fitted: Tensor, old: Tensor, initial: Tensor) -> Tensor:
        return self.noise_decay * old


@dataclass(frozen=True)
class GradientRefinement:
    """Steps down the cost's gradient, through the rollout, from the best that a search has found.

    Continuous variables alone are moved, by Adam (arXiv 1412.6980), and kept within their bounds; of all that is met,
    the lowest cost counts. Grasp the valley by sampling, its floor by gradient.

    Args:
        steps: of Adam.
        step_size: of the first step, in standard deviations of the space's `initial` distribution; it falls to 0.
        starts: how many of the last iteration's candidates, the best first, are moved.

    Raises:
        ValueError: a value out of range.
    """

    steps: int = 8
    step_size: float = 0.1
    starts: int = 4

    def __post_init__(self) -> None:
        _check_at_least(self, steps=1, starts=1)
        if not 0 < self.step_size < math.inf:
            raise ValueError(f"GradientRefinement: step_size must be above 0 and finite, found {self.step_size}")


@dataclass(frozen=True)
class SearchResult:
    """What a search has found.

    Args:
        decisions: `(H, width)`.
        cost: theirs.
        costs: a record of every iteration (`Plan.costs`).
        ranked: `(M, H, width)`, the last iteration's candidates, the best first.
    """

    decisions: Tensor
    cost: float
    costs: list[dict[str, float]]
    ranked: Tensor


def minimize(
    evaluate: Callable[[Tensor], Tensor],
    space: SearchSpace,
    initial: Distribution,
    *,
    method: CEM | MPPI,
    generator: torch.Generator,
    proposals: Tensor | None = None,
) -> SearchResult:
    """Decisions of low cost.

    Args:
        evaluate: costs `(M,)`, float64 on the CPU, of decisions `(M, H, width)`.
        space: what decisions may be.
        initial: where to begin: `space.initial(horizon)` or `space.warm_start(...)`.
        method: how to search.
        generator: of all random numbers; the same state gives the same result. Its device is where they are drawn.
        proposals: `(P, H, width)`, candidates of the first iteration, beside the mean of `initial`.

    Raises:
        ValueError: no generator, so many proposals that nothing would be drawn.
    """
    if not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator, found {type(generator).__name__}")
    distribution, history = initial, []
    kept = space.mode(initial)[None][:0] if proposals is None else proposals
    if len(kept) + 2 > method.candidates:
        raise ValueError(
            f"{type(method).__name__}: {method.candidates} candidates leave room for {method.candidates - 2} "
            f"proposals, found {len(kept)}"
        )
    best, lowest = None, math.inf
    noise: dict[str, float] = {"noise_exponent": method.noise_exponent} if method.noise_exponent else {}
    for iteration in range(method.iterations):
        count = max(method.population(iteration) - 1 - len(kept), 1)
        drawn = space.sample(distribution, count, generator, **noise)
        decisions = torch.cat([space.mode(distribution)[None], kept, drawn])
        costs = evaluate(decisions)
        at = int(costs.argmin())
        if best is None or float(costs[at]) < lowest:
            best, lowest, best_at = decisions[at], float(costs[at]), at
        else:
            best_at = 1  # where the best so far is among the candidates
        order = costs.argsort(stable=True)
        ranked = decisions[torch.cat([torch.tensor([best_at]), order[order != best_at]])]
        kept = ranked[: method.kept]
        history.append({"best": lowest, "current_mean": float(costs[0]), "candidates": float(costs.mean())})
        distribution = _refit(method, space, distribution, initial, space.fit(decisions, method.weigh(costs)))
    assert best is not None
    if method.returns == "best":
        return SearchResult(best, lowest, history, ranked)
    mean = space.mode(distribution)
    return SearchResult(mean, float(evaluate(mean[None])[0]), history, ranked)


def refine(
    found: SearchResult,
    evaluate: Callable[[Tensor], Tensor],
    gradients: Callable[[Tensor], tuple[Tensor, Tensor]],
    space: SearchSpace,
    refinement: GradientRefinement,
) -> SearchResult:
    """What `GradientRefinement` makes of a search's result: never worse.

    Args:
        found: of `minimize`.
        evaluate: as there.
        gradients: costs `(M,)` and their gradients `(M, H, width)`, float64 on the CPU, of decisions `(M, H, width)`.
        space: what decisions may be.
        refinement: how to.

    Returns:
        With one record more for each step, over its starts; `ranked` as it was.
    """
    others = [other for other in found.ranked if not torch.equal(other, found.decisions)]
    starts = torch.stack([found.decisions, *others[: refinement.starts - 1]])
    variables, std = len(space.continuous), space.initial(starts.shape[1]).std
    unit = torch.where(std > 0, std, torch.ones_like(std))  # what is fixed has no width, and is held by its bounds
    position = starts[..., :variables] / unit
    adam = torch.optim.Adam([position], lr=refinement.step_size)
    best, lowest, history = found.decisions, found.cost, list(found.costs)
    for step in range(refinement.steps + 1):
        decisions = torch.cat([position * unit, starts[..., variables:]], dim=-1)
        last = step == refinement.steps
        costs, slopes = (evaluate(decisions), None) if last else gradients(decisions)
        at = int(costs.argmin())
        if float(costs[at]) < lowest:
            best, lowest = decisions[at].clone(), float(costs[at])
        if step:
            history.append({"best": lowest, "current_mean": float(costs[0]), "candidates": float(costs.mean())})
        if slopes is not None:
            position.grad = slopes[..., :variables] * unit
            adam.param_groups[0]["lr"] = refinement.step_size * (1 - step / refinement.steps)
            adam.step()
            position.copy_((position * unit).clamp(space.low, space.high) / unit)
    return SearchResult(best, lowest, history, found.ranked)


def _refit(
    method: CEM | MPPI, space: SearchSpace, old: Distribution, initial: Distribution, fitted: Distribution
) -> Distribution:
    """The next distribution: fitted, smoothed with the old one, and kept from collapsing."""
    least = method.minimum_probability
    allowed = torch.zeros_like(fitted.number)
    allowed[:, space.numbers] = 1 / len(space.numbers)
    return Distribution(
        torch.lerp(fitted.mean, old.mean, method.smoothing),
        method.next_std(fitted.std, old.std, initial.std),
        torch.lerp(fitted.press, old.press, method.smoothing).clamp(least, 1 - least),
        torch.lerp(torch.lerp(fitted.number, old.number, method.smoothing), allowed, least),
    )
