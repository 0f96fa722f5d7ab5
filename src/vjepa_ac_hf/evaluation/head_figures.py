"""Figures of the heads (docs/applications.md, "Figures"): rows of predictions and references -> numbers.

A figure without data is None.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..actions_vjepa2_ac import wrap_degrees


def wrap_difference(predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Differences of angles in degrees, in [-180, 180)."""
    return wrap_degrees(predictions - references)


def average_precision(scores: np.ndarray, references: np.ndarray) -> float | None:
    """Area under precision over recall, as a sum over the distinct scores: sum of (R_n - R_{n-1}) P_n.

    Args:
        scores: `(rows,)`, higher: more likely.
        references: `(rows,)`, 0 or 1.

    Returns:
        None without a positive row.
    """
    positives = references.sum()
    if not positives:
        return None
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], references[order].cumsum()
    last_of_tie = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    precision, recall = hits[last_of_tie] / (last_of_tie + 1), hits[last_of_tie] / positives
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def key_figures(
    scores: np.ndarray, references: np.ndarray, threshold: float = 0.0, even_odds: float = 0.0
) -> dict[str, Any]:
    """Precision, recall, F1 and average precision of one key.

    Args:
        scores: `(rows,)`, logits; above `threshold` the key is told to be pressed.
        references: `(rows,)`, 0 or 1.
        threshold: of the scores.
        even_odds: the score of a key that is as likely pressed as not: log(`pos_weight`) where the loss had weights.

    Returns:
        `f1`, `precision`, `recall`, `accuracy` at the threshold, `accuracy_at_even_odds`, `average_precision`, `share`
        (pressed rows), `majority_accuracy` (of always telling the more frequent one) and `pressed` (rows). Precision is
        None where nothing is told, recall and F1 where nothing is pressed.
    """
    told, pressed = scores > threshold, references > 0.5
    hits = int((told & pressed).sum())
    share = float(pressed.mean())
    return {
        "f1": 2 * hits / int(told.sum() + pressed.sum()) if pressed.any() else None,
        "precision": hits / int(told.sum()) if told.any() else None,
        "recall": hits / int(pressed.sum()) if pressed.any() else None,
        "accuracy": float((told == pressed).mean()),
        "accuracy_at_even_odds": float(((scores > even_odds) == pressed).mean()),
        "majority_accuracy": max(share, 1 - share),
        "average_precision": average_precision(scores, pressed.astype(np.float64)),
        "share": share,
        "pressed": int(pressed.sum()),
    }


def regression_figures(predictions: np.ndarray, references: np.ndarray, circular: bool = False) -> dict[str, Any]:
    """R2 and mean absolute error of one column in raw units.

    Args:
        predictions: `(rows,)`.
        references: `(rows,)`.
        circular: differences are those of angles in degrees.

    Returns:
        `r2` (1 - squared errors over squared deviations from the references' mean; None without any deviation), `mae`,
        and `mae_of_mean`, of always telling the references' mean.
    """

    def differences(told: np.ndarray) -> np.ndarray:
        return wrap_difference(told, references) if circular else told - references

    errors, deviations = differences(predictions), differences(np.full_like(references, references.mean()))
    total = float((deviations**2).sum())
    return {
        "r2": 1 - float((errors**2).sum()) / total if total > 0 else None,
        "mae": float(np.abs(errors).mean()),
        "mae_of_mean": float(np.abs(deviations).mean()),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _check_rows(columns: Sequence[str], rows: Mapping[str, np.ndarray]) -> None:
    for name, values in rows.items():
        if values.ndim != 2 or values.shape[1] != len(columns):
            raise ValueError(f"{name} must be rows of {len(columns)} columns {list(columns)}, found {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} hold values that are not finite")


def keys_figures(
    predictions: Any,
    references: Any,
    columns: Sequence[str],
    threshold: float = 0.0,
    even_odds: Sequence[float] | None = None,
) -> dict:
    """`key_figures` of every key.

    Rows: `predictions` logits and `references` 0 or 1, a number a column. `even_odds` is one of each column
    (None: 0). Gives `columns` (figures by name), and `macro_f1` and `mean_average_precision`, means over the keys that
    are ever pressed.
    """
    scores, pressed = np.asarray(predictions, float), np.asarray(references, float)
    _check_rows(columns, {"predictions": scores, "references": pressed})
    even = [0.0] * len(columns) if even_odds is None else even_odds
    figures = {
        c: key_figures(scores[:, i], pressed[:, i], threshold, odds)
        for i, (c, odds) in enumerate(zip(columns, even, strict=True))
    }
    return {
        "columns": figures,
        "macro_f1": _mean([f["f1"] for f in figures.values()]),
        "mean_average_precision": _mean([f["average_precision"] for f in figures.values()]),
    }


def camera_figures(predictions: Any, references: Any, columns: Sequence[str]) -> dict[str, Any]:
    """`regression_figures` of mouse and camera columns, in raw units; `yaw_delta` is an angle on a circle.

    Rows: `predictions` and `references`, a number a column. Gives figures by column name.
    """
    told, true = np.asarray(predictions, float), np.asarray(references, float)
    _check_rows(columns, {"predictions": told, "references": true})
    return {c: regression_figures(told[:, i], true[:, i], c == "yaw_delta") for i, c in enumerate(columns)}


def anticipation_figures(
    predictions: Any,
    references: Any,
    repeated: Any,
    horizon: Any,
    columns: Sequence[str],
    continuous: Sequence[str],
) -> dict[str, Any]:
    """Anticipated actions next to repeating the last one, by horizon and column.

    Rows: `horizon` (1: the action under way), `predictions` (raw units; logits of keys), `references` and `repeated`
    (raw units, the last action that was over; rows without one are left out, so that both are judged by the same rows).
    Gives `horizons`: a list of `horizon`, `rows`, by column `model` and `repeat_last`, with the figures of
    `regression_figures` or `key_figures`, and `macro_f1` of both, the mean over the keys that are ever pressed.
    """
    told, true, last = (np.asarray(v, float) for v in (predictions, references, repeated))
    _check_rows(columns, {"predictions": told, "references": true, "repeated": last})
    horizons = []
    for h in np.unique(horizon):
        at, figures = np.asarray(horizon) == h, {}
        for i, column in enumerate(columns):
            if column in continuous:
                own, other = (regression_figures(v[at, i], true[at, i], column == "yaw_delta") for v in (told, last))
            else:
                own = key_figures(told[at, i], true[at, i])
                other = key_figures(last[at, i] - 0.5, true[at, i])
            figures[column] = {"model": own, "repeat_last": other}
        macro = {
            who: _mean([f[who]["f1"] for column, f in figures.items() if column not in continuous])
            for who in ("model", "repeat_last")
        }
        horizons.append({"horizon": int(h), "rows": int(at.sum()), "columns": figures, "macro_f1": macro})
    return {"horizons": horizons}


def label_figures(predictions: Any, references: Any, classes: Sequence[str]) -> dict[str, Any]:
    """Classes of clips.

    Rows: `predictions` logits and `references` 0 or 1, a number a class. Gives `mean_average_precision` (over the
    classes that occur), `classes` (`key_figures` by name), `exact_match` (all labels of a clip right, told by logits
    above 0), and, where every clip has exactly one label, `accuracy` (of the greatest logit), `majority_accuracy` (of
    always telling the most frequent class), `balanced_accuracy` (mean recall of the classes that occur) and `chance`
    (1 / classes).
    """
    scores, labels = np.asarray(predictions, float), np.asarray(references, float)
    _check_rows(classes, {"predictions": scores, "references": labels})
    figures = {c: key_figures(scores[:, i], labels[:, i]) for i, c in enumerate(classes)}
    result: dict[str, Any] = {
        "clips": len(scores),
        "mean_average_precision": _mean([f["average_precision"] for f in figures.values()]),
        "exact_match": float(((scores > 0) == (labels > 0.5)).all(axis=1).mean()),
        "classes": figures,
    }
    if (labels.sum(axis=1) == 1).all():
        told, true = scores.argmax(axis=1), labels.argmax(axis=1)
        right = told == true
        result |= {
            "accuracy": float(right.mean()),
            "majority_accuracy": float(np.bincount(true).max() / len(true)),
            "balanced_accuracy": float(np.mean([right[true == i].mean() for i in np.unique(true)])),
            "chance": 1 / len(classes),
        }
    return result


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Spearman's: the correlation of the ranks, ties having the mean of theirs; None where one of both is constant."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[inverse]

    first, second = (r - r.mean() for r in map(ranks, (one, other)))
    size = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum() / size) if size else None


def distance_figures(told: np.ndarray, features: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    """Steps between two views of one clip, as told, next to the plain difference of their features.

    Args:
        told: `(rows,)`, steps.
        features: `(rows,)`, mean absolute difference of the features.
        true: `(rows,)`, steps.

    Returns:
        `pairs`, `rank_correlation` (of told and true), `rank_correlation_features`, `mae` and `mae_of_mean` (of always
        telling the mean), in steps, and `by_steps`: of every true number `pairs`, `told`, `told_std`, `features`.
    """
    by_steps = {}
    for steps in np.unique(true):
        at = true == steps
        means = {"pairs": int(at.sum()), "told": float(told[at].mean()), "told_std": float(told[at].std())}
        by_steps[f"{steps:g}"] = {**means, "features": float(features[at].mean())}
    return {
        "pairs": len(true),
        "rank_correlation": rank_correlation(told, true),
        "rank_correlation_features": rank_correlation(features, true),
        "mae": float(np.abs(told - true).mean()),
        "mae_of_mean": float(np.abs(true - true.mean()).mean()),
        "by_steps": by_steps,
    }
