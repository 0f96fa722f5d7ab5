"""Per-clip errors -> figures for every horizon, with bootstrap intervals (docs/evaluation.md, "Figures")."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .rollouts import RolloutTable

logger = logging.getLogger(__name__)

LARGE_TURN_DEGREES = 10.0
BOOTSTRAP_DRAWS = 1000

# A row is a clip at a horizon. Wins are counts of pairs (a tie is half a win); everything is summable over clips.
MEAN_COLUMNS = (
    "error",
    "persistence",
    "shuffled_actions",
    "error_mse",
    "persistence_mse",
    "shuffled_actions_mse",
)
VALUE_COLUMNS = (
    *MEAN_COLUMNS,
    "wins",
    "pairs",
    "wins_large_turns",
    "pairs_large_turns",
)
ROW_COLUMNS = ("session_id", "player_id", "horizon", *VALUE_COLUMNS)
# With fewer players in a split, sessions are resampled instead: intervals from few units come out too narrow.
FEW_PLAYERS = 10

# Figures that get an interval.
INTERVAL_FIGURES = (
    "error",
    "persistence",
    "shuffled_actions",
    "error_over_persistence",
    "shuffled_over_error",
    "win_rate",
    "win_rate_large_turns",
)


def table_rows(table: RolloutTable) -> dict[str, np.ndarray]:
    """One row a clip and horizon, as columns `ROW_COLUMNS` of equal length, for `aggregate_rows` or the metric.

    Shuffles are averaged or counted, so that rows of several processes can be put one after another.
    """
    clips, horizons = table.error.shape
    wins = (table.error[:, None] < table.shuffled) + 0.5 * (table.error[:, None] == table.shuffled)
    large = table.turn_gaps > LARGE_TURN_DEGREES  # False where the turns are not known
    columns = {
        "error": table.error,
        "persistence": table.persistence,
        "shuffled_actions": table.shuffled.mean(axis=1),
        "error_mse": table.error_mse,
        "persistence_mse": table.persistence_mse,
        "shuffled_actions_mse": table.shuffled_mse.mean(axis=1),
        "wins": wins.sum(axis=1),
        "pairs": np.full((clips, horizons), table.shuffled.shape[1], dtype=np.float64),
        "wins_large_turns": (wins * large).sum(axis=1),
        "pairs_large_turns": large.sum(axis=1).astype(np.float64),
    }
    return {
        "session_id": np.repeat(np.asarray(table.sessions, dtype=np.str_), horizons),
        "player_id": np.repeat(np.asarray(table.players, dtype=np.str_), horizons),
        "horizon": np.tile(np.arange(1, horizons + 1), clips),
        **{name: values.reshape(-1) for name, values in columns.items()},
    }


def aggregate_rows(
    rows: Mapping[str, Sequence | np.ndarray], *, draws: int = BOOTSTRAP_DRAWS, seed: int = 0
) -> list[dict[str, Any]]:
    """Figures of every horizon, in order, as `metrics.json` has them (docs/evaluation.md, "Figures").

    Args:
        rows: columns `ROW_COLUMNS` of equal length, in any order of rows.
        draws: bootstrap draws of players or sessions (`interval_unit`); 0 for no intervals.
        seed: of the bootstrap.

    Returns:
        One dictionary a horizon. A figure without data (no pairs with large turns, a ratio to 0) is None; so is
        `ci95` with fewer than two of them, and an interval that fewer than two contribute to.
    """
    columns = _check_rows(rows)
    unit = interval_unit(columns["player_id"])
    units, unit_of = np.unique(columns[f"{unit}_id"], return_inverse=True)
    weights = None
    if draws and len(units) < 2:
        logger.warning(
            "the figures are without intervals (ci95 is null): a bootstrap over %ss needs at least 2, found %d",
            *(unit, len(units)),
        )
    elif draws:
        weights = resample_weights(len(units), draws, torch.Generator().manual_seed(seed))
    figures = []
    for horizon in np.unique(columns["horizon"]):
        at = columns["horizon"] == horizon
        # The means are over clips, so their count is summed like the rest.
        values = {"clips": np.ones(int(at.sum())), **{name: columns[name][at] for name in VALUE_COLUMNS}}
        sums = {name: np.bincount(unit_of[at], v, minlength=len(units)) for name, v in values.items()}
        totals = _figures({name: v.sum() for name, v in sums.items()})
        mse = {name: totals.pop(f"{name}_mse") for name in ("error", "persistence", "shuffled_actions")}
        figures.append(
            {
                "horizon": int(horizon),
                **{name: _number(value) for name, value in totals.items()},
                "pairs": int(sums["pairs"].sum()),
                "pairs_large_turns": int(sums["pairs_large_turns"].sum()),
                "mse": {name: _number(value) for name, value in mse.items()},
                "ci95": None if weights is None else _intervals(sums, weights),
            }
        )
    return figures


def interval_unit(players: Iterable[str]) -> str:
    """What intervals resample: `player` where there are ten (`FEW_PLAYERS`) or more, else `session`."""
    return "player" if len(set(players)) >= FEW_PLAYERS else "session"


def unit_counts(sessions: Iterable[str], players: Iterable[str]) -> dict[str, Any]:
    """`sessions` and `players`, how many there are, and `interval_unit`, what intervals resample."""
    sessions, players = set(sessions), set(players)
    return {"sessions": len(sessions), "players": len(players), "interval_unit": interval_unit(players)}


def resample_weights(units: int, draws: int, generator: torch.Generator) -> np.ndarray:
    """`(draws, units)`: how often each unit is in each resample with replacement."""
    picks = torch.randint(units, (draws, units), generator=generator)
    return (
        torch.zeros(draws, units, dtype=torch.float64)
        .scatter_add_(1, picks, torch.ones(draws, units, dtype=torch.float64))
        .numpy()
    )


def mean_intervals(
    values: np.ndarray,
    sessions: Sequence[str],
    players: Sequence[str],
    *,
    draws: int = BOOTSTRAP_DRAWS,
    seed: int = 0,
) -> list[list[float] | None]:
    """95 % intervals of the means of `values` `(clips, columns)`, over resampled players or sessions (`interval_unit`).

    None where there are fewer than two of them, or no draws.
    """
    units, unit_of = np.unique(players if interval_unit(players) == "player" else sessions, return_inverse=True)
    if len(units) < 2 or not draws:
        return [None] * values.shape[1]
    weights = resample_weights(len(units), draws, torch.Generator().manual_seed(seed))
    counts = weights @ np.bincount(unit_of)
    drawn = (weights @ np.bincount(unit_of, column) / counts for column in values.T)
    return [[float(end) for end in np.percentile(means, [2.5, 97.5])] for means in drawn]


def _check_rows(rows: Mapping[str, Sequence | np.ndarray]) -> dict[str, np.ndarray]:
    missing = [c for c in ROW_COLUMNS if c not in rows]
    if missing:
        raise ValueError(f"rows lack the columns {missing}: found {sorted(rows)}")
    types = {"session_id": np.str_, "player_id": np.str_, "horizon": np.int64}
    columns: dict[str, np.ndarray] = {
        name: np.asarray(rows[name], dtype=types.get(name, np.float64)) for name in ROW_COLUMNS
    }
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) != 1 or not lengths["error"]:
        raise ValueError(f"the columns of rows must have the same length, at least 1, found {lengths}")
    return columns


def _figures(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Figures from sums over clips; every value may have a leading axis of draws. NaN or infinite without data."""
    with np.errstate(divide="ignore", invalid="ignore"):
        means = {name: np.divide(sums[name], sums["clips"]) for name in MEAN_COLUMNS}
        return {
            **means,
            "error_over_persistence": np.divide(sums["error"], sums["persistence"]),
            "shuffled_over_error": np.divide(sums["shuffled_actions"], sums["error"]),
            "win_rate": np.divide(sums["wins"], sums["pairs"]),
            "win_rate_large_turns": np.divide(sums["wins_large_turns"], sums["pairs_large_turns"]),
        }


def _intervals(sums: Mapping[str, np.ndarray], weights: np.ndarray) -> dict[str, list[float] | None]:
    """Percentiles 2.5 and 97.5 over resampled players or sessions, for each of `INTERVAL_FIGURES`."""
    drawn = _figures({name: weights @ by_unit for name, by_unit in sums.items()})
    intervals: dict[str, list[float] | None] = {}
    for name in INTERVAL_FIGURES:
        # A single unit with such pairs would give an interval of no width, which claims certainty.
        contributing = sums["pairs_large_turns" if name == "win_rate_large_turns" else "clips"]
        values = drawn[name][np.isfinite(drawn[name])]
        if np.count_nonzero(contributing) < 2 or not len(values):
            intervals[name] = None
        else:
            low, high = np.percentile(values, [2.5, 97.5])
            intervals[name] = [float(low), float(high)]
    return intervals


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def wilson(successes: int, count: int) -> list[float]:
    """Wilson's score interval of a success rate, at 95 %: (low, high)."""
    z, rate = 1.96, successes / count
    middle = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return [max(middle - half, 0.0), min(middle + half, 1.0)]
