"""The figures of the heads (`head_figures`) as metrics of the library `evaluate`.

Rows are added batch by batch, by any number of processes; nothing is downloaded.
"""

from typing import Any

from datasets import Features, Value
from datasets import Sequence as ListOf

from .head_figures import anticipation_figures, camera_figures, keys_figures, label_figures
from .metrics import evaluate  # the library, checked not to be a script of that name

_CITATION = "Baker et al., Video PreTraining, arXiv 2206.11795; Assran et al., V-JEPA 2, arXiv 2506.09985"


class _RowsMetric(evaluate.Metric):
    """A metric over rows of numbers."""

    description, inputs = "", ""
    extra: dict[str, Any] = {}

    def _info(self) -> evaluate.MetricInfo:
        numbers = ListOf(Value("float64"))
        return evaluate.MetricInfo(
            description=self.description,
            citation=_CITATION,
            inputs_description=self.inputs,
            features=Features({"predictions": numbers, "references": numbers, **self.extra}),
        )


class KeyMetric(_RowsMetric):
    """`keys_figures` as a metric: its arguments are rows, added batch by batch, and those of `compute`."""

    description = "Precision, recall, F1 and average precision of keys."
    inputs = "predictions (list of float): logits. references (list of float): 0 or 1. columns (list of str)."

    def _compute(self, **rows: Any) -> dict[str, Any]:
        return keys_figures(**rows)


class CameraMetric(_RowsMetric):
    """`camera_figures` as a metric: its arguments are rows, added batch by batch, and those of `compute`."""

    description = "R2 and mean absolute error of mouse and camera columns."
    inputs = "predictions, references (list of float): pixels or degrees. columns (list of str): their names."

    def _compute(self, **rows: Any) -> dict[str, Any]:
        return camera_figures(**rows)


class AnticipationMetric(_RowsMetric):
    """`anticipation_figures` as a metric: its arguments are rows, added batch by batch, and those of `compute`."""

    description = "Anticipated actions against repeating the last action, by horizon."
    inputs = "horizon (int). predictions, references, repeated (list of float). columns, continuous (list of str)."
    extra = {"repeated": ListOf(Value("float64")), "horizon": Value("int64")}

    def _compute(self, **rows: Any) -> dict[str, Any]:
        return anticipation_figures(**rows)


class LabelMetric(_RowsMetric):
    """`label_figures` as a metric: its arguments are rows, added batch by batch, and those of `compute`."""

    description = "Accuracy and mean average precision of clip labels."
    inputs = "predictions (list of float): logits. references (list of float): 0 or 1. classes (list of str)."

    def _compute(self, **rows: Any) -> dict[str, Any]:
        return label_figures(**rows)
