"""How well a model predicts features, and whether it uses its actions (docs/evaluation.md).

`rollouts` measures clips, `figures` turns their errors into figures with intervals, `probes` asks which columns of the
actions matter and whether predictions are specific, `metrics` offers all of it as metrics of the library `evaluate`,
`clips` reads a data set, `decoding` draws frames from features and `frame_figures` measures them, `pictures`, `plots`,
`films` and `report` show the result, `controllability` has an inverse dynamics head read what was imagined. Open
`rollouts.py` first.
"""

from typing import TYPE_CHECKING, Any

from .controllability import evaluate_controllability, load_inverse_dynamics
from .controllability_figures import ControllabilityTally, controllability_figures
from .figures import aggregate_rows, table_rows
from .probes import aggregate_retrieval, aggregate_sensitivity
from .rollouts import RolloutTable, derangements, evaluate_features, roll_out, state_integrator

if TYPE_CHECKING:
    from .metrics import ActionSensitivityMetric, ControllabilityMetric, LatentPredictionMetric, RetrievalMetric

_METRICS = ("ActionSensitivityMetric", "ControllabilityMetric", "LatentPredictionMetric", "RetrievalMetric")

__all__ = [
    "ActionSensitivityMetric",
    "ControllabilityMetric",
    "ControllabilityTally",
    "LatentPredictionMetric",
    "RetrievalMetric",
    "RolloutTable",
    "aggregate_retrieval",
    "aggregate_rows",
    "aggregate_sensitivity",
    "controllability_figures",
    "derangements",
    "evaluate_controllability",
    "evaluate_features",
    "load_inverse_dynamics",
    "roll_out",
    "state_integrator",
    "table_rows",
]


def __getattr__(name: str) -> Any:
    # The library `evaluate` is slow to import, and a script of that name may hide it: only who asks for it pays.
    if name in _METRICS:
        from . import metrics

        return getattr(metrics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
