"""Two more questions to a model: which of its actions' columns it uses, and whether its predictions are specific.

Definitions: docs/evaluation.md, sections "Sensitivity" and "Retrieval". Letters: B batch, C context steps, H horizons,
N frame tokens a step, D encoder width, A action columns, G clips of a retrieval group.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..actions_vjepa2_ac import ACTION_COLUMNS, CONTINUOUS_COLUMNS
from ..modeling_vjepa2_ac import VJEPA2ACModel
from .figures import BOOTSTRAP_DRAWS, mean_intervals
from .rollouts import StateIntegrator, distances, roll_out

COLUMN_GROUPS: dict[str, tuple[str, ...]] = {
    "mouse": CONTINUOUS_COLUMNS,
    "keys": tuple(c for c in ACTION_COLUMNS if c.startswith(("key.", "mouse."))),
    "hotbar": tuple(c for c in ACTION_COLUMNS if c.startswith("hotbar.")),
    "gui": ("gui_open",),
}
SENSITIVITY_COLUMNS = ("differs", "change", "exchanged_error", "error", "persistence")
RETRIEVAL_COLUMNS = ("hit", "persistence_hit", "candidates")
RETRIEVAL_GROUP = 8


# --- sensitivity --------------------------------------------------------------------------------------------------


def column_groups(action_space: Sequence[str]) -> dict[str, list[int]]:
    """Places of each group's columns in an action space; groups without any are left out."""
    groups = {name: [i for i, c in enumerate(action_space) if c in columns] for name, columns in COLUMN_GROUPS.items()}
    return {name: places for name, places in groups.items() if places}


def exchange_columns(actions: Tensor, others: Tensor, places: Sequence[int], context_steps: int) -> Tensor:
    """`actions` `(B, steps, A)` with the columns `places` of `others` from action C - 1 on, which leads out of the
    context."""
    exchanged = actions.clone()
    exchanged[:, context_steps - 1 :, places] = others[:, context_steps - 1 :, places]
    return exchanged


def sensitivity_errors(
    model: VJEPA2ACModel,
    features: Tensor,
    prediction: Tensor,
    actions: Tensor,
    others: Tensor,
    states: Tensor,
    places: Sequence[int],
    *,
    context_steps: int,
    integrate_states: StateIntegrator | None,
) -> dict[str, Tensor]:
    """What exchanging some columns of the future actions does to a rollout, clip by clip.

    Args:
        model: a `VJEPA2ACModel`.
        features: `(B, C + H or more, N, D)`.
        prediction: `(B, H, N, D)` from the true actions, of `batch_errors`.
        actions: `(B, C - 1 + H, A)`, the true actions, normalised.
        others: `(B, C - 1 + H, A)`, the partners' actions.
        states: `(B, C - 1 + H or more, S)`, normalised.
        places: the columns to exchange.
        context_steps: C.
        integrate_states: as in `roll_out`.

    Returns:
        `(B, H)` each: `differs` (1 where any of these columns differs in any action up to the horizon, else 0),
        `change` (mean absolute difference of the two predictions), `exchanged_error` (of the new one to the target).
    """
    exchanged = exchange_columns(actions, others, places, context_steps)
    other = roll_out(
        model, features, exchanged, states, context_steps=context_steps, integrate_states=integrate_states
    ).float()
    target = features[:, context_steps : context_steps + other.shape[1]].to(other.device).float()
    differs = (exchanged != actions)[:, context_steps - 1 :].any(dim=2).long().cummax(dim=1).values
    return {
        "differs": differs.float().cpu(),
        "change": distances(other, prediction)[0].cpu(),
        "exchanged_error": distances(other, target)[0].cpu(),
    }


def aggregate_sensitivity(rows: Mapping[str, Sequence | np.ndarray]) -> dict[str, dict[str, Any]]:
    """Figures of every group, over all clips and horizons whose columns differ (docs/evaluation.md, "Sensitivity").

    Args:
        rows: columns `group` and `SENSITIVITY_COLUMNS` of equal length: one row a clip, horizon and group.

    Returns:
        By group: `sensitivity` (change over persistence), `exchanged_over_error`, both ratios of means, and `pairs`,
        how many rows differ. Without such a row, or where a denominator is 0 or a value not finite, a ratio is None.
    """
    columns = _check_columns(rows, ("group", *SENSITIVITY_COLUMNS))
    figures = {}
    for group in dict.fromkeys(columns["group"].tolist()):
        at = (columns["group"] == group) & (columns["differs"] > 0)
        change, exchanged, error, persistence = (columns[name][at].sum() for name in SENSITIVITY_COLUMNS[1:])
        figures[group] = {
            "sensitivity": _ratio(change, persistence),
            "exchanged_over_error": _ratio(exchanged, error),
            "pairs": int(at.sum()),
        }
    return figures


# --- retrieval ----------------------------------------------------------------------------------------------------


def retrieval_groups(clips: int, size: int) -> list[range]:
    """Clips 0 .. `clips` - 1 in groups of neighbours, of `size` or (so that all have at least that many) a few more.

    Fewer clips than `size` are one group. Groups depend on these two numbers alone.
    """
    count = max(clips // size, 1)
    smallest, larger = divmod(clips, count)
    starts = [i * smallest + min(i, larger) for i in range(count + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def retrieval_hits(predictions: Tensor, targets: Tensor) -> Tensor:
    """`(G,)`: 1 where a prediction is nearer to its own target than to any other of the group, else 0.

    Nearest by mean absolute difference, as the errors; where m targets are equally near, its own among them, 1 / m.
    NaN where a distance is not finite.

    Args:
        predictions: `(G, N, D)`.
        targets: `(G, N, D)`, in the same order.
    """
    hits = []
    for own, prediction in enumerate(predictions):  # one by one: G x G differences at once would take G times as much
        distance = (prediction - targets).abs().mean(dim=(1, 2))
        nearest = distance == distance.min()
        hit = nearest[own] / nearest.sum()
        hits.append(torch.where(torch.isfinite(distance).all(), hit, torch.nan))
    return torch.stack(hits)


class Retrieval:
    """Retrieval of clips that come batch by batch, in order. Held are one step of the clips of a group and a batch.

    Args:
        groups: of `retrieval_groups`, all of them or one process's.
        context_steps: C.

    Attributes:
        rows: columns `RETRIEVAL_COLUMNS` of the groups that are complete, for `aggregate_retrieval`.
    """

    def __init__(self, groups: Sequence[range], context_steps: int):
        self.rows: dict[str, list[float]] = {name: [] for name in RETRIEVAL_COLUMNS}
        self._sizes, self._at = [len(group) for group in groups], context_steps
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, features: Tensor, predictions: Tensor) -> None:
        """The next clips: `(B, C + 1 or more, N, D)` and what a rollout from the context gave, `(B, H, N, D)`."""
        steps = predictions[:, 0], features[:, self._at], features[:, self._at - 1]
        # Copies: the other steps need not stay in memory.
        self._waiting += zip(*(step.to(predictions.device).float().clone() for step in steps), strict=True)
        while self._sizes and len(self._waiting) >= self._sizes[0]:
            size = self._sizes.pop(0)
            found, targets, latest = (torch.stack(step) for step in zip(*self._waiting[:size], strict=True))
            del self._waiting[:size]
            self.rows["hit"] += retrieval_hits(found, targets).tolist()
            self.rows["persistence_hit"] += retrieval_hits(latest, targets).tolist()
            self.rows["candidates"] += [size] * size


def aggregate_retrieval(
    rows: Mapping[str, Sequence | np.ndarray], *, draws: int = BOOTSTRAP_DRAWS, seed: int = 0
) -> dict[str, Any]:
    """Top-1 retrieval accuracy (docs/evaluation.md, "Retrieval").

    Args:
        rows: columns `RETRIEVAL_COLUMNS` of equal length, one row a clip; for intervals `session_id` and `player_id`.
        draws: bootstrap draws of players or sessions; 0 for no intervals.
        seed: of the bootstrap.

    Returns:
        `top1`, `persistence_top1` (both None where a value is not finite), `chance` (mean of one over the number of
        candidates), `clips` and, of rows with sessions and players, `ci95` of the first two.
    """
    columns = _check_columns(rows, RETRIEVAL_COLUMNS)
    count = len(columns["hit"])
    figures = {
        "top1": _ratio(columns["hit"].sum(), count),
        "persistence_top1": _ratio(columns["persistence_hit"].sum(), count),
        "chance": float((1 / columns["candidates"]).mean()),
        "clips": count,
    }
    if "player_id" not in rows:
        return figures
    hits = np.stack([columns["hit"], columns["persistence_hit"]], axis=1)
    units = ([str(name) for name in rows[f"{unit}_id"]] for unit in ("session", "player"))
    found = mean_intervals(hits, *units, draws=draws, seed=seed) if np.isfinite(hits).all() else [None, None]
    return figures | {"ci95": dict(zip(("top1", "persistence_top1"), found, strict=True))}


def _check_columns(rows: Mapping[str, Sequence | np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    missing = [name for name in names if name not in rows]
    if missing:
        raise ValueError(f"rows lack the columns {missing}: found {sorted(rows)}")
    columns = {name: np.asarray(rows[name], dtype=np.str_ if name == "group" else np.float64) for name in names}
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) != 1 or not lengths[names[-1]]:
        raise ValueError(f"the columns of rows must have the same length, at least 1, found {lengths}")
    return columns


def _ratio(numerator: float, denominator: float) -> float | None:
    if not denominator or not np.isfinite([numerator, denominator]).all():
        return None
    return float(numerator / denominator)
