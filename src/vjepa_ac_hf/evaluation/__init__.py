"""How well a model predicts features, and whether it uses its actions (docs/evaluation.md).

`rollouts` measures clips, `figures` turns their errors into figures with intervals, `metrics` offers the same as a
metric of the library `evaluate`, `clips` reads a data set, `pictures`, `plots` and `report` show the result.
"""

from typing import TYPE_CHECKING, Any

from .figures import aggregate_rows, table_rows
from .rollouts import RolloutTable, derangements, evaluate_features, roll_out, state_integrator

if TYPE_CHECKING:
    from .metrics import LatentPredictionMetric

__all__ = [
    "LatentPredictionMetric",
    "RolloutTable",
    "aggregate_rows",
    "derangements",
    "evaluate_features",
    "roll_out",
    "state_integrator",
    "table_rows",
]


def __getattr__(name: str) -> Any:
    # The library `evaluate` is slow to import, and a script of that name may hide it: only who asks for it pays.
    if name == "LatentPredictionMetric":
        from .metrics import LatentPredictionMetric

        return LatentPredictionMetric
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
