"""Action columns, action spaces and action statistics (docs/data.md, sections "Actions" and "Normalisation").

Shipped to the Hub with the model: imports the standard library and numpy only.
"""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# What a pixel of mouse movement turns the view by while no GUI is open (docs/data.md, "Actions").
DEGREES_PER_PIXEL = 0.15

CONTINUOUS_COLUMNS: tuple[str, ...] = ("mouse_dx", "mouse_dy", "yaw_delta", "pitch_delta")

ACTION_COLUMNS: tuple[str, ...] = (
    *CONTINUOUS_COLUMNS,
    *(f"key.{i}" for i in range(1, 10)),
    *("key.w", "key.a", "key.s", "key.d", "key.space"),
    *("key.q", "key.f", "key.e", "key.escape"),
    *("key.left.shift", "key.right.shift", "key.left.control"),
    *("mouse.left", "mouse.right", "mouse.middle"),
    *(f"hotbar.{i}" for i in range(9)),
    "gui_open",
)

ACTION_SPACES: dict[str, tuple[str, ...]] = {
    "vpt-13": ACTION_COLUMNS[:13],
    "vpt-36": tuple(c for c in ACTION_COLUMNS if c not in ("key.right.shift", "gui_open")),
    "vpt-38": ACTION_COLUMNS,
}


def wrap_degrees(degrees: Any) -> Any:
    """Angles modulo whole turns, in [-180, 180), without rounding.

    Args:
        degrees: a tensor, float32 or float64, whose type is kept; or numbers or an array, whose result is float64.
    """
    rest = degrees.fmod(360.0) if hasattr(degrees, "fmod") else np.fmod(degrees, 360.0, dtype=np.float64)
    # Exact, where (degrees + 180) % 360 - 180 rounds: what is left of a turn, and that less half of it, are floats.
    return rest - 360.0 * (rest >= 180.0) + 360.0 * (rest < -180.0)


def resolve_action_space(space: str | Sequence[str]) -> list[str]:
    """Column names of an action space.

    Args:
        space: a name of `ACTION_SPACES` or an ordered list of column names of `ACTION_COLUMNS`.

    Raises:
        ValueError: an unknown name or column (the nearest known one is named), a column listed twice, an empty list.
    """
    if isinstance(space, str):
        if space not in ACTION_SPACES:
            raise ValueError(f"unknown action space {space!r}: known are {sorted(ACTION_SPACES)}, or a list of columns")
        return list(ACTION_SPACES[space])
    columns = list(space)
    if not columns:
        raise ValueError("an action space needs at least one column, found none")
    for column in columns:
        if column not in ACTION_COLUMNS:
            near = difflib.get_close_matches(str(column), ACTION_COLUMNS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known columns are {list(ACTION_COLUMNS)}"
            raise ValueError(f"unknown action column {column!r}{hint}")
    twice = sorted({c for c in columns if columns.count(c) > 1})
    if twice:
        raise ValueError(f"action columns listed more than once: {twice}")
    return columns


class ActionStatistics:
    """Mean and standard deviation of the continuous action columns: streaming, mergeable, float64, kept as JSON.

    Chan, Golub and LeVeque's parallel update of count, mean and sum of squared deviations, so that statistics of
    parts merge to those of the whole. The standard deviation is the population's (divides by the count).
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = np.zeros(len(CONTINUOUS_COLUMNS))
        self._m2 = np.zeros(len(CONTINUOUS_COLUMNS))

    @property
    def mean(self) -> list[float]:
        return self._mean.tolist()

    @property
    def std(self) -> list[float]:
        return np.sqrt(self._m2 / max(self.count, 1)).tolist()

    def update(self, actions: np.ndarray) -> "ActionStatistics":
        """Add raw actions of shape (..., 38), all columns of `ACTION_COLUMNS` in order."""
        actions = np.asarray(actions, dtype=np.float64)
        if actions.ndim == 0 or actions.shape[-1] != len(ACTION_COLUMNS):
            raise ValueError(f"statistics need all {len(ACTION_COLUMNS)} action columns, found shape {actions.shape}")
        rows = actions.reshape(-1, len(ACTION_COLUMNS))[:, : len(CONTINUOUS_COLUMNS)]
        if not np.isfinite(rows).all():
            raise ValueError("actions hold values that are not finite")
        if len(rows):
            part = ActionStatistics()
            part.count = len(rows)
            part._mean = rows.mean(axis=0)
            part._m2 = ((rows - part._mean) ** 2).sum(axis=0)
            self.merge(part)
        return self

    def merge(self, other: "ActionStatistics") -> "ActionStatistics":
        """Add the statistics of other data; the result equals that of all data seen at once."""
        total = self.count + other.count
        if total:
            delta = other._mean - self._mean
            self._mean = self._mean + delta * (other.count / total)
            self._m2 = self._m2 + other._m2 + delta**2 * (self.count * other.count / total)
            self.count = total
        return self

    def to_dict(self) -> dict:
        return {
            "columns": list(CONTINUOUS_COLUMNS),
            "count": self.count,
            "mean": self.mean,
            "std": self.std,
        }

    @classmethod
    def from_dict(cls, values: dict) -> "ActionStatistics":
        """Read what `to_dict` gave.

        Raises:
            ValueError: a field is missing, other columns, lengths that differ, values that are not finite.
        """
        missing = [k for k in ("columns", "count", "mean", "std") if k not in values]
        if missing:
            raise ValueError(f"action statistics lack the fields {missing}: found {sorted(values)}")
        if list(values["columns"]) != list(CONTINUOUS_COLUMNS):
            raise ValueError(
                f"action statistics are for columns {list(values['columns'])}, expected {list(CONTINUOUS_COLUMNS)}"
            )
        for field in ("mean", "std"):
            numbers = values[field]
            if len(numbers) != len(CONTINUOUS_COLUMNS) or not all(math.isfinite(x) for x in numbers):
                raise ValueError(
                    f"action statistics: {field} must be {len(CONTINUOUS_COLUMNS)} finite numbers, found {numbers}"
                )
        if int(values["count"]) < 1 or min(values["std"]) < 0:
            raise ValueError(
                f"action statistics need a positive count and std of at least 0, found count {values['count']} "
                f"and std {values['std']}"
            )
        statistics = cls()
        statistics.count = int(values["count"])
        statistics._mean = np.asarray(values["mean"], dtype=np.float64)
        statistics._m2 = np.asarray(values["std"], dtype=np.float64) ** 2 * statistics.count
        return statistics
