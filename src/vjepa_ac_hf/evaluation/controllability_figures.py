"""Told actions against given ones -> F1 of keys and groups, onsets, camera, by horizon (docs/evaluation.md,
"Controllability").

Letters: R rows (a clip at a horizon), A action columns, K keys (columns that are pressed or not), U players or
sessions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..actions_vjepa2_ac import CONTINUOUS_COLUMNS
from .figures import BOOTSTRAP_DRAWS, interval_unit, resample_weights
from .head_figures import wrap_difference

# What is read, and (the last one) against which actions; docs/evaluation.md has a line on each.
KINDS = ("imagined", "true_features", "persistence", "other_actions", "repeat_last", "other_actions_obeyed")
GROUPS: dict[str, tuple[str, ...]] = {
    "forward_back": ("key.w", "key.s"),
    "left_right": ("key.a", "key.d"),
    "jump": ("key.space",),
    "sneak_sprint": ("key.left.shift", "key.left.control"),
    "attack": ("mouse.left",),
    "use": ("mouse.right",),
    "drop": ("key.q",),
    "slots": tuple(f"key.{i}" for i in range(1, 10)),
    "slot_held": tuple(f"hotbar.{i}" for i in range(9)),
}
# MineWorld's classes (arXiv 2504.08388; microsoft/mineworld, metrics/IDM/inverse_dynamics_model.py): of a pair none or
# both, the first alone, the second alone.
MINEWORLD_TASKS = ("forward_back", "left_right", "sneak_sprint", "use", "attack", "jump", "drop")
VIEW_COLUMNS = ("yaw_delta", "pitch_delta")
_RATES = ("f1", "precision", "recall")
_ROW_COLUMNS = ("session_id", "player_id", "horizon", "kind", "told", "given", "before")


def camera_bins(degrees: np.ndarray) -> np.ndarray:
    """VPT's 11 camera bins of a tick's turn: mu-law with mu 10, up to 10 degrees, bins of 2 (arXiv 2206.11795;
    openai/Video-Pre-Training, lib/actions.py)."""
    share = np.clip(degrees / 10, -1, 1)
    return np.round((np.sign(share) * np.log1p(10 * np.abs(share)) / np.log(11) * 10 + 10) / 2)


class ControllabilityTally:
    """Counts of told against given actions by player or session, horizon and kind; added batch by batch.

    Args:
        columns: the action space (A names).
        sessions: `(clips,)`, session ids of all clips.
        players: `(clips,)`, their player ids.
        ticks_per_action: ticks that an action covers.
    """

    def __init__(
        self, columns: Sequence[str], sessions: Sequence[str], players: Sequence[str], *, ticks_per_action: float
    ):
        self.columns, self.ticks_per_action = list(columns), ticks_per_action
        self.interval_unit = interval_unit(players)
        names = np.asarray(players if self.interval_unit == "player" else sessions, dtype=np.str_)
        self.units, self._unit_of = np.unique(names, return_inverse=True)
        self._sums: dict[tuple[int, str], dict[str, np.ndarray]] = {}
        self.camera = [c for c in self.columns if c in CONTINUOUS_COLUMNS]
        self.keys = [c for c in self.columns if c not in CONTINUOUS_COLUMNS]
        slots = [i for i, c in enumerate(self.keys) if c in GROUPS["slot_held"]]
        self._slots = slots if len(slots) == len(GROUPS["slot_held"]) else []
        self.groups = {name: [self.keys.index(c) for c in of if c in self.keys] for name, of in GROUPS.items()}
        self.tasks = [task for task in MINEWORLD_TASKS if len(self.groups[task]) == len(GROUPS[task])]

    def add(
        self, clips: Sequence[int] | np.ndarray, horizon: int, kind: str, told: Any, given: Any, before: Any
    ) -> None:
        """Count actions of some clips at a horizon.

        Args:
            clips: `(R,)`, numbers of the clips.
            horizon: from 1.
            kind: of `KINDS`.
            told: `(R, A)`, raw units, keys 0 or 1.
            given: `(R, A)`, the actions to compare with.
            before: `(R, A)`, those given one step before; NaN where they are not known.

        Raises:
            ValueError: an unknown kind, other shapes, told or given actions that are not finite.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, found {kind!r}")
        told, given, before = (np.asarray(values, dtype=np.float64) for values in (told, given, before))
        shape = (len(clips), len(self.columns))
        for name, values in (("told", told), ("given", given), ("before", before)):
            if values.shape != shape:
                raise ValueError(f"{name} must be (rows, columns) {shape}, found {values.shape}")
            if name != "before" and not np.isfinite(values).all():
                raise ValueError(f"{name} ({kind}, horizon {horizon}) hold values that are not finite")
        units = self._unit_of[np.asarray(clips, dtype=np.int64)]
        sums = self._sums.setdefault((horizon, kind), {})
        for name, values in self._counts(told, given, before).items():
            by_unit = sums.setdefault(name, np.zeros((len(self.units), *values.shape[1:])))
            np.add.at(by_unit, units, values)

    def _counts(self, told: np.ndarray, given: np.ndarray, before: np.ndarray) -> dict[str, np.ndarray]:
        """What every row adds; the first axis is R.

        `keys` and `onsets` `(R, K, 3)`: right, told, pressed; `up` `(R, K)`; `rows` `(R,)`: 1; `camera`
        `(R, columns, 5)`: absolute and squared error, value, its square, 1; `tasks` `(R, tasks, 3, 3)`: given by told
        class; `bins` `(R, 2)`: differences of camera bins, and how many.
        """
        at = [self.columns.index(c) for c in self.keys]
        said, pressed, was = told[:, at] > 0.5, given[:, at] > 0.5, before[:, at]
        known, up = np.ones_like(pressed), was < 0.5  # NaN is not
        if self._slots:  # a log that does not tell the slot tells nothing about it
            known[:, self._slots] = pressed[:, self._slots].any(axis=1, keepdims=True)
            up[:, self._slots] &= (was[:, self._slots] > 0.5).any(axis=1, keepdims=True)
        up &= known
        counted = np.stack([said & pressed, said, pressed], axis=-1)
        counts: dict[str, np.ndarray] = {
            "keys": counted & known[..., None],
            "onsets": counted & up[..., None],
            "up": up,
        }
        counts["rows"] = np.ones(len(told))

        at = [self.columns.index(c) for c in self.camera]
        errors, values = told[:, at] - given[:, at], given[:, at]
        for i, column in enumerate(self.camera):
            if column == "yaw_delta":
                errors[:, i] = wrap_difference(told[:, at[i]], given[:, at[i]])
        counts["camera"] = np.stack([np.abs(errors), errors**2, values, values**2, np.ones_like(values)], axis=-1)
        views = [self.columns.index(c) for c in VIEW_COLUMNS if c in self.columns]
        gaps = np.abs(np.subtract(*(camera_bins(v[:, views] / self.ticks_per_action) for v in (told, given))))
        counts["bins"] = np.stack([gaps.sum(axis=1), np.full(len(gaps), float(len(views)))], axis=-1)

        tasks = counts["tasks"] = np.zeros((len(told), len(self.tasks), 3, 3))
        for i, task in enumerate(self.tasks):
            classes = [_exclusive_class(v[:, self.groups[task]]) for v in (pressed, said)]
            tasks[np.arange(len(told)), i, classes[0], classes[1]] = 1
        return counts

    def figures(self, *, draws: int = BOOTSTRAP_DRAWS, seed: int = 0) -> list[dict[str, Any]]:
        """Figures of every horizon, in order, as `metrics.json` has them.

        Args:
            draws: bootstrap draws of players or sessions; 0 for no intervals.
            seed: of the bootstrap.
        """
        weights = None
        if draws and len(self.units) > 1:
            weights = resample_weights(len(self.units), draws, torch.Generator().manual_seed(seed))
        found = []
        for horizon in sorted({h for h, _ in self._sums}):
            reasons: dict[str, str] = {}
            kinds: dict[str, Any] = {}
            for kind in KINDS:
                sums = self._sums.get((horizon, kind))
                if sums is None:
                    kinds[kind], reasons[kind] = None, "no action before the imagined ones is known (context_steps 1)"
                    continue
                kinds[kind] = self._of_kind(sums, weights)
                # All but the last kind are compared with the same actions; of that one, what differs.
                why = self._reasons(sums)
                if kind == KINDS[-1]:
                    why = {f"{kind}: {name}": text for name, text in why.items() if reasons.get(name) != text}
                reasons |= why
            clips = max(int(s["rows"].sum()) for (h, _), s in self._sums.items() if h == horizon)
            found.append({"horizon": horizon, "clips": clips, "kinds": kinds, "reasons": reasons})
        return found

    def _of_kind(self, sums: Mapping[str, np.ndarray], weights: np.ndarray | None) -> dict[str, Any]:
        result: dict[str, Any] = {
            name: _with_interval(lambda c: _nanmean(_rates(c)["f1"]), sums[counts], weights)
            for name, counts in (("macro_f1", "keys"), ("macro_onset_f1", "onsets"))
        }
        parts = {"keys": [[i] for i in range(len(self.keys))], "groups": list(self.groups.values())}
        for part, names in (("keys", self.keys), ("groups", list(GROUPS))):
            result[part] = {}
            for name, members in zip(names, parts[part], strict=True):
                pooled, onsets = (sums[what][:, members].sum(axis=1) for what in ("keys", "onsets"))
                figures = _key_figures(pooled, weights)
                result[part][name] = None if figures is None else {**figures, "onset": _key_figures(onsets, weights)}
        result["camera"] = {
            column: {
                "mae": _with_interval(lambda c: c[..., 0] / c[..., 4], sums["camera"][:, i], weights),
                "r2": _with_interval(_r2, sums["camera"][:, i], weights),
            }
            for i, column in enumerate(self.camera)
        }
        result["mineworld"] = self._mineworld(sums)
        return result

    def _mineworld(self, sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Macro precision, recall and F1 of the tasks, as scikit-learn's with zero_division 0, and their means."""
        by_task: dict[str, Any] = {}
        for i, task in enumerate(self.tasks):
            table = sums["tasks"][:, i].sum(axis=0)
            given, told, right = table.sum(axis=1), table.sum(axis=0), table.diagonal()
            occur = given + told > 0
            if not given[1:].any():
                by_task[task] = None
                continue
            precision, recall = (
                np.divide(right, of, out=np.zeros(3), where=of > 0)[occur].mean() for of in (told, given)
            )
            f1 = (2 * right[occur] / (given + told)[occur]).mean()
            by_task[task] = {"f1": float(f1), "precision": float(precision), "recall": float(recall)}
        some = [figures for figures in by_task.values() if figures is not None]
        means = {name: float(np.mean([f[name] for f in some])) if some else None for name in _RATES}
        gap, count = sums["bins"].sum(axis=0)
        return {**means, "camera_bins": float(gap / count) if count else None, "tasks": by_task}

    def _reasons(self, sums: Mapping[str, np.ndarray]) -> dict[str, str]:
        """Why figures are null, by name."""
        pressed, begun = (sums[name][..., 2].sum(axis=0) for name in ("keys", "onsets"))
        up, rows = sums["up"].sum(axis=0), int(sums["rows"].sum())
        reasons = {}
        for i, column in enumerate(self.keys):
            if not pressed[i]:
                reasons[column] = f"never pressed in {rows} actions"
            elif not begun[i]:
                reasons[f"{column} onset"] = f"never pressed where it was known to be up before ({int(up[i])} actions)"
        for name, members in self.groups.items():
            if not members:
                reasons[name] = f"the action space has none of {list(GROUPS[name])}"
            elif not pressed[members].any():
                reasons[name] = f"none of its columns is pressed in {rows} actions"
            elif not begun[members].any():
                reasons[f"{name} onset"] = "none of its columns is pressed where it was known to be up before"
        for task in set(MINEWORLD_TASKS) - set(self.tasks):
            reasons[f"mineworld {task}"] = f"the action space lacks one of {list(GROUPS[task])}"
        lacking = [c for c in VIEW_COLUMNS if c not in self.columns]
        reasons |= dict.fromkeys(lacking, "the action space lacks it")
        for i, column in enumerate(self.camera):
            if np.isnan(_r2(sums["camera"][:, i].sum(axis=0))):
                reasons[f"{column} r2"] = f"the same in all {rows} actions"
        return reasons


def controllability_figures(
    rows: Mapping[str, Any],
    columns: Sequence[str],
    ticks_per_action: float,
    *,
    draws: int = BOOTSTRAP_DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """The figures of `ControllabilityTally` from rows, in any order.

    Args:
        rows: columns of equal length, one row a clip, horizon and kind: `session_id`, `player_id`, `horizon`, `kind`
            (of `KINDS`), `told`, `given` and `before` (lists of A numbers, as `ControllabilityTally.add` takes them).
        columns: the action space.
        ticks_per_action: ticks that an action covers.
        draws: bootstrap draws; 0 for no intervals.
        seed: of the bootstrap.

    Returns:
        `{"interval_unit", "horizons"}`.
    """
    missing = [name for name in _ROW_COLUMNS if name not in rows]
    if missing:
        raise ValueError(f"rows lack the columns {missing}: found {sorted(rows)}")
    lengths = {name: len(rows[name]) for name in _ROW_COLUMNS}
    if len(set(lengths.values())) != 1 or not lengths["told"]:
        raise ValueError(f"the columns of rows must have the same length, at least 1, found {lengths}")
    tally = ControllabilityTally(columns, rows["session_id"], rows["player_id"], ticks_per_action=ticks_per_action)
    horizon, kind = np.asarray(rows["horizon"]), np.asarray(rows["kind"], dtype=np.str_)
    told, given, before = (np.asarray(rows[name], dtype=np.float64) for name in ("told", "given", "before"))
    for h, k in sorted({(int(h), str(k)) for h, k in zip(horizon, kind, strict=True)}):
        at = np.flatnonzero((horizon == h) & (kind == k))
        tally.add(at, h, k, told[at], given[at], before[at])
    return {"interval_unit": tally.interval_unit, "horizons": tally.figures(draws=draws, seed=seed)}


def _exclusive_class(pressed: np.ndarray) -> np.ndarray:
    """`(R, 1 or 2)` -> class: 0 none or both, 1 the first, 2 the second."""
    if pressed.shape[1] == 1:
        return pressed[:, 0].astype(np.int64)
    return np.where(pressed[:, 0] != pressed[:, 1], np.where(pressed[:, 0], 1, 2), 0)


def _rates(counts: np.ndarray) -> dict[str, np.ndarray]:
    """F1, precision, recall of `(..., 3)` counts of right, told, pressed; NaN without data."""
    right, told, pressed = np.moveaxis(counts, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        f1 = np.where(pressed > 0, 2 * right / (told + pressed), np.nan)
        return {"f1": f1, "precision": right / told, "recall": right / pressed}


def _key_figures(counts: np.ndarray, weights: np.ndarray | None) -> dict[str, Any] | None:
    """Of `(U, 3)` counts, the interval behind the F1 that it is of; None where nothing is pressed."""
    totals = counts.sum(axis=0)
    if not totals[2]:
        return None
    rates = {name: _number(value) for name, value in _rates(totals).items()}
    interval = _with_interval(lambda c: _rates(c)["f1"], counts, weights)["ci95"]
    return {"f1": rates.pop("f1"), "ci95": interval, **rates, "pressed": int(totals[2]), "told": int(totals[1])}


def _with_interval(figure: Any, counts: np.ndarray, weights: np.ndarray | None) -> dict[str, Any]:
    """`mean` of a figure of `(U, ...)` counts, and `ci95` where at least two players or sessions have any."""
    interval = None
    if weights is not None and np.count_nonzero(counts.reshape(len(counts), -1).any(axis=1)) > 1:
        drawn = figure(np.tensordot(weights, counts, axes=1))
        drawn = drawn[np.isfinite(drawn)]
        interval = [float(v) for v in np.percentile(drawn, [2.5, 97.5])] if len(drawn) else None
    return {"mean": _number(figure(counts.sum(axis=0))), "ci95": interval}


def _r2(sums: np.ndarray) -> Any:
    """Of `(..., 5)` sums; NaN where the given values are all the same (but for rounding)."""
    squared, value, square, count = (sums[..., i] for i in range(1, 5))
    with np.errstate(divide="ignore", invalid="ignore"):
        deviations = square - value**2 / count
        return np.where(deviations > 1e-12 * square, 1 - squared / deviations, np.nan)


def _nanmean(values: np.ndarray) -> Any:
    """Over the last axis; NaN where all are."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis=-1) / known.sum(axis=-1)


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
