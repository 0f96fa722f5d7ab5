"""Whether an agent's random choices tell what its environment has drawn."""

from collections.abc import Callable, Sequence

import numpy as np
from gymnasium.utils.seeding import np_random

SEEDS = range(200)


def goal_draws(seed: int) -> list[float]:
    """Place, heading, side and first turn, in the order in which the game and its goals draw them."""
    generator, _ = np_random(seed)
    place, heading = generator.integers(1, 2**31), generator.uniform(-180, 180)
    side, steps = generator.choice([-1, 1]), generator.integers(1, 4)
    return [float(x) for x in (place, heading, side, steps, side * generator.uniform(10, 30))]


def largest_correlation(choices: Callable[[int], Sequence[float]]) -> float:
    """Of any of an agent's choices with anything that the goal was drawn from, over episodes."""
    chosen, drawn = (np.array([of(seed) for seed in SEEDS]) for of in (choices, goal_draws))
    together = np.abs(np.corrcoef(chosen.T, drawn.T)[: chosen.shape[1], chosen.shape[1] :])
    return float(together.max())  # some 0.25 where both are independent: 40 pairs, 200 episodes
