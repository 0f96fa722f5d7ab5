"""The energy over two action columns, all else being as recorded (docs/planning.md, "Energy landscapes")."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..actions_vjepa2_ac import ACTION_COLUMNS, CONTINUOUS_COLUMNS
from ..evaluation.figures import mean_intervals, unit_counts
from ..pages import new_figure
from .actions import COLUMN, MOUSE_OF_VIEW, SLOTS, VIEW_OF_MOUSE, SearchSpace, vary_columns
from .planner import Cost, Imagination
from .search import CEM, MPPI, minimize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BOOTSTRAP_DRAWS = 1000


@dataclass(frozen=True)
class Landscape:
    """Energies over a grid of two columns.

    Args:
        columns: names of the two columns.
        values: those of each axis, raw units, evenly spaced.
        energies: float64 `(len(values[0]), len(values[1]))`.
        true: the recorded action's values of both columns.
        true_energy: energy of the recorded action, as it is.
        plan_cost: cost of what a planner found over the same two columns, if one searched.
    """

    columns: tuple[str, str]
    values: tuple[np.ndarray, np.ndarray]
    energies: np.ndarray
    true: tuple[float, float]
    true_energy: float
    plan_cost: float | None = None

    @property
    def minimum(self) -> tuple[float, float]:
        """Values of both columns where the energy is lowest (the first such cell)."""
        row, column = divmod(int(self.energies.argmin()), len(self.values[1]))
        return float(self.values[0][row]), float(self.values[1][column])

    def distances(self) -> np.ndarray:
        """Distance of every cell to the recorded action, in cells: the larger of both axes'.

        On the axis of a key or button a cell is half a unit: within one cell is equal.
        """
        apart = [
            np.abs(values - true) / (0.5 if column not in CONTINUOUS_COLUMNS else values[1] - values[0])
            for column, values, true in zip(self.columns, self.values, self.true, strict=True)
        ]
        return np.maximum(apart[0][:, None], apart[1][None])

    @property
    def distance(self) -> float:
        """Distance in cells of the minimum to the recorded action."""
        return float(self.distances().flat[int(self.energies.argmin())])

    @property
    def covers_true(self) -> bool:
        """Whether the recorded action lies within the grid, and so could be found."""
        return all(v[0] <= t <= v[-1] for v, t in zip(self.values, self.true, strict=True))

    @property
    def rank(self) -> float:
        """Share of cells whose energy is above the recorded action's; ties count half."""
        return self.rank_of(self.true_energy)

    def rank_of(self, energy: float) -> float:
        """Share of cells whose energy is above this one; ties count half."""
        return float((self.energies > energy).mean() + 0.5 * (self.energies == energy).mean())

    def nearest_energy(self, action: tuple[float, float]) -> float:
        """Energy of the cell nearest to these values of both columns."""
        row, column = (int(np.abs(v - a).argmin()) for v, a in zip(self.values, action, strict=True))
        return float(self.energies[row, column])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "columns": list(self.columns),
            "values": [v.tolist() for v in self.values],
            "energies": self.energies.tolist(),
            "true_action": list(self.true),
            "true_energy": self.true_energy,
            "argmin": list(self.minimum),
            "distance_cells": self.distance,
            "plan_cost": self.plan_cost,
            "rank": self.rank,
            "covers_true_action": self.covers_true,
        }


def check_columns(columns: Sequence[str], action_space: Sequence[str]) -> None:
    """Raise a ValueError where a landscape cannot be over these two columns."""
    if len(columns) != 2 or columns[0] == columns[1]:
        raise ValueError(f"a landscape needs two different columns, found {list(columns)}")
    partners = {**VIEW_OF_MOUSE, **MOUSE_OF_VIEW}
    for column in columns:
        if column not in COLUMN:
            raise ValueError(f"unknown action column {column!r}: known are {list(ACTION_COLUMNS)}")
        if column not in action_space:
            raise ValueError(f"the action space lacks {column!r}, it has {list(action_space)}")
    if partners.get(columns[0]) == columns[1]:
        raise ValueError(
            f"columns {columns[0]!r} and {columns[1]!r} move together: with one of them, choose another axis"
        )
    if all(column in SLOTS for column in columns):
        raise ValueError(f"only one slot is selected at a time: {columns[0]!r} and {columns[1]!r} cannot both vary")


def energy_landscape(
    imagination: Imagination,
    actions: Tensor,
    cost: Cost,
    *,
    columns: Sequence[str] = ("yaw_delta", "pitch_delta"),
    values: tuple[np.ndarray, np.ndarray],
) -> Landscape:
    """Energy of the recorded actions with two columns of the first imagined one replaced by every pair of values, and
    what follows from them (`vary_columns`): every cell is an action that a player could have taken.

    Args:
        imagination: model and context.
        actions: `(H, 38)`, raw, those recorded after the context.
        cost: for instance `GoalCost` of the features that followed.
        columns: two of the action space's.
        values: of each, evenly spaced, at least two.

    Raises:
        ValueError: columns that cannot be varied together, values or actions of another shape.
    """
    check_columns(columns, imagination.processor.action_space)
    for column, points in zip(columns, values, strict=True):
        steps = np.diff(points)
        if (
            len(points) < 2
            or not np.isfinite(points).all()
            or not (steps > 0).all()
            or not np.allclose(steps, steps[0])
        ):
            raise ValueError(f"values of {column!r} must be at least 2, rising in even steps, found {list(points)}")
    if actions.ndim != 2 or actions.shape[1] != len(ACTION_COLUMNS) or len(actions) == 0:
        raise ValueError(f"actions must be raw, (steps, {len(ACTION_COLUMNS)}), found {tuple(actions.shape)}")
    actions = actions.double()
    pairs = torch.cartesian_prod(*(torch.as_tensor(points, dtype=torch.float64) for points in values))
    chosen = {column: pairs[:, axis] for axis, column in enumerate(columns)}
    candidates = vary_columns(actions, chosen, pitch=float(imagination.context.states[-1, 1]))
    energies = imagination.costs(torch.cat([actions[None], candidates]), cost)
    return Landscape(
        columns=(columns[0], columns[1]),
        values=(np.asarray(values[0], dtype=np.float64), np.asarray(values[1], dtype=np.float64)),
        energies=energies[1:].reshape(len(values[0]), len(values[1])).numpy(),
        true=(float(actions[0, COLUMN[columns[0]]]), float(actions[0, COLUMN[columns[1]]])),
        true_energy=float(energies[0]),
    )


def search_landscape(
    imagination: Imagination,
    actions: Tensor,
    cost: Cost,
    *,
    columns: Sequence[str],
    values: tuple[np.ndarray, np.ndarray],
    method: CEM | MPPI,
    generator: torch.Generator,
) -> float:
    """The lowest cost that a search finds where `energy_landscape` has its grid: two continuous columns of the first
    imagined step within the grid's range, all else as recorded.

    Raises:
        ValueError: columns that are not continuous, or cannot be varied together.
    """
    check_columns(columns, imagination.processor.action_space)
    ranges = {column: (float(v[0]), float(v[-1])) for column, v in zip(columns, values, strict=True)}
    if set(columns) - set(CONTINUOUS_COLUMNS):
        raise ValueError(f"a search needs two of {CONTINUOUS_COLUMNS}, found {list(columns)}")
    space, pitch = SearchSpace(list(columns), bounds=ranges), float(imagination.context.states[-1, 1])

    def costs(decisions: Tensor) -> Tensor:
        chosen = {column: decisions[:, 0, at] for at, column in enumerate(space.continuous)}
        return imagination.costs(vary_columns(actions, chosen, pitch=pitch), cost)

    return minimize(costs, space, space.initial(1), method=method, generator=generator).cost


def summarize_landscapes(
    landscapes: Sequence[Landscape], sessions: Sequence[str], players: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """How often the minimum is within one cell of the recorded action, and how often it would be without a model.

    Args:
        landscapes: of several clips, over the same grid.
        sessions: the session of each.
        players: the player of each.
        seed: of the bootstrap over players (sessions where there are fewer than ten).

    Returns:
        `clips`; `outside_grid`, those whose recorded action the grid does not cover, which the rest leaves out;
        `sessions`, `players` and `interval_unit`, how many there are of the rest and what its interval resamples;
        `within_one_cell`, share of clips, with `ci95` (None with fewer than two units); `chance`, the share that a
        random cell would reach; `best_constant`, that of the one cell which suits these clips best;
        `median_distance_cells`; `rank`, the mean of `Landscape.rank`; `rank_other_actions`, the same for the actions
        recorded in the other clips (None with one clip); and `correlation`, by column, of minimum and recorded action
        over clips (None where one of them is constant). None where no clip is left.
    """
    inside = [land.covers_true for land in landscapes]
    covered = [land for land, kept in zip(landscapes, inside, strict=True) if kept]
    sessions, players = (
        [name for name, kept in zip(names, inside, strict=True) if kept] for names in (sessions, players)
    )
    figures: dict[str, Any] = {"clips": len(landscapes), "outside_grid": len(landscapes) - len(covered)}
    figures |= unit_counts(sessions, players)
    if not covered:
        missing = [
            *("within_one_cell", "ci95", "chance", "best_constant", "median_distance_cells"),
            *("rank", "rank_other_actions", "correlation"),
        ]
        return {**figures, **dict.fromkeys(missing)}
    near = np.stack([land.distances() <= 1 for land in covered])
    hits = np.array([land.distance <= 1 for land in covered], dtype=np.float64)
    others = [a.rank_of(a.nearest_energy(b.true)) for a in covered for b in covered if a is not b]
    return {
        **figures,
        "within_one_cell": float(hits.mean()),
        "ci95": mean_intervals(hits[:, None], sessions, players, seed=seed)[0],
        "chance": float(near.mean()),
        "best_constant": float(near.mean(axis=0).max()),
        "median_distance_cells": float(np.median([land.distance for land in covered])),
        "rank": float(np.mean([land.rank for land in covered])),
        "rank_other_actions": float(np.mean(others)) if others else None,
        "correlation": {
            column: _correlation([land.minimum[axis] for land in covered], [land.true[axis] for land in covered])
            for axis, column in enumerate(covered[0].columns)
        },
    }


def _correlation(found: list[float], true: list[float]) -> float | None:
    if np.std(found) == 0 or np.std(true) == 0:
        return None
    return float(np.corrcoef(found, true)[0, 1])


def landscape_figure(landscapes: Sequence[Landscape], titles: Sequence[str]) -> "Figure":
    """Colour maps of energies with the recorded action (ring) and the minimum (cross); three in a row.

    Raises:
        ImportError: matplotlib is not installed.
    """
    across = min(3, len(landscapes))
    down = -(-len(landscapes) // across)
    figure = new_figure(4.2 * across, 3.6 * down)
    grid = figure.subplots(down, across, squeeze=False).flatten()
    for axes in grid[len(landscapes) :]:
        axes.set_axis_off()
    for axes, land, title in zip(grid, landscapes, titles, strict=False):
        image = axes.pcolormesh(*land.values, land.energies.T, shading="nearest", cmap="viridis", rasterized=True)
        axes.plot(*land.true, "o", markersize=10, fillstyle="none", color="white", markeredgewidth=2, label="recorded")
        axes.plot(*land.minimum, "x", markersize=8, color="#D55E00", markeredgewidth=2.5, label="lowest energy")
        axes.set(xlabel=land.columns[0], ylabel=land.columns[1])
        text = textwrap.fill(title, 44, break_on_hyphens=False)
        axes.set_title(f"{text}\n{land.distance:.1f} cells apart", fontsize=7)
        figure.colorbar(image, ax=axes, label="energy")
    grid[0].legend(fontsize=7, loc="upper right", facecolor="#555555", labelcolor="white")
    return figure
