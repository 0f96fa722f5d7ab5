"""Two ways to search for decisions of low cost: CEM and MPPI (docs/planning.md, "Methods").

Both draw candidates from a distribution, weigh them by their costs and fit the distribution to the weighted ones. Among
the candidates of every iteration are the distribution's mean and the best of all so far.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

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
    returns: str = "best"

    def __post_init__(self) -> None:
        _check_at_least(self, iterations=1, candidates=3, elites=1)
        _check_share(self, "smoothing", "minimum_std", "minimum_probability")
        _check_returns(self)
        if self.elites > self.candidates:
            raise ValueError(f"CEM: elites must be at most the {self.candidates} candidates, found {self.elites}")

    def weigh(self, costs: Tensor) -> Tensor:
        """Weights `(M,)` of candidates: equal among the elites, 0 elsewhere."""
        chosen = costs.argsort(stable=True)[: self.elites]
        return torch.zeros_like(costs).index_fill_(0, chosen, 1 / self.elites)

    def next_std(self, fitted: Tensor, old: Tensor, initial: Tensor) -> Tensor:
        return torch.maximum(torch.lerp(fitted, old, self.smoothing), self.minimum_std * initial)


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
    returns: str = "mean"

    def __post_init__(self) -> None:
        _check_at_least(self, iterations=1, candidates=3)
        _check_share(self, "smoothing", "minimum_probability")
        _check_returns(self)
        for name, most in (("temperature", math.inf), ("noise_decay", 1)):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 < value <= most):
                raise ValueError(f"MPPI: {name} must be above 0 and at most {most:g}, found {value}")

    def weigh(self, costs: Tensor) -> Tensor:
        """Weights `(M,)` of candidates, which sum to 1; equal where all costs are."""
        spread = costs.std(correction=0)
        above = (costs - costs.min()) / torch.where(spread > 0, spread, torch.ones_like(spread))
        return torch.softmax(-above / self.temperature, dim=0)

    def next_std(self, fitted: Tensor, old: Tensor, initial: Tensor) -> Tensor:
        return self.noise_decay * old


@dataclass(frozen=True)
class SearchResult:
    """Decisions `(H, width)`, their cost, and a record of every iteration (`Plan.costs`)."""

    decisions: Tensor
    cost: float
    costs: list[dict[str, float]]


def minimize(
    evaluate: Callable[[Tensor], Tensor],
    space: SearchSpace,
    initial: Distribution,
    *,
    method: CEM | MPPI,
    generator: torch.Generator,
) -> SearchResult:
    """Decisions of low cost.

    Args:
        evaluate: costs `(M,)`, float64 on the CPU, of decisions `(M, H, width)`.
        space: what decisions may be.
        initial: where to begin: `space.initial(horizon)` or `space.warm_start(...)`.
        method: how to search.
        generator: of all random numbers; the same state gives the same result. Its device is where they are drawn.
    """
    if not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator, found {type(generator).__name__}")
    distribution, history = initial, []
    best, lowest = None, math.inf
    for _ in range(method.iterations):
        kept = [space.mode(distribution)] + ([] if best is None else [best])
        drawn = space.sample(distribution, method.candidates - len(kept), generator)
        decisions = torch.cat([torch.stack(kept), drawn])
        costs = evaluate(decisions)
        at = int(costs.argmin())
        if best is None or float(costs[at]) < lowest:
            best, lowest = decisions[at], float(costs[at])
        history.append({"best": lowest, "current_mean": float(costs[0]), "candidates": float(costs.mean())})
        distribution = _refit(method, space, distribution, initial, space.fit(decisions, method.weigh(costs)))
    assert best is not None
    if method.returns == "best":
        return SearchResult(best, lowest, history)
    mean = space.mode(distribution)
    return SearchResult(mean, float(evaluate(mean[None])[0]), history)


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
