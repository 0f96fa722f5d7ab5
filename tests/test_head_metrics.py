"""Figures of the heads against brute force, in one process and in several."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vjepa_ac_hf.evaluation.head_figures import (
    anticipation_figures,
    average_precision,
    camera_figures,
    keys_figures,
    label_figures,
    wrap_difference,
)
from vjepa_ac_hf.evaluation.head_metrics import AnticipationMetric, CameraMetric, KeyMetric, LabelMetric


def brute_average_precision(scores, references):
    """Precision and recall at every distinct score, lowered one by one."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        told = [r for s, r in zip(scores, references, strict=True) if s >= threshold]
        recall = sum(told) / sum(references)
        total += (recall - before) * sum(told) / len(told)
        before = recall
    return total


def brute_key(scores, references):
    counts = {"tp": 0, "fp": 0, "fn": 0, "tn": 0}
    for s, r in zip(scores, references, strict=True):
        counts[("t" if (s > 0) == bool(r) else "f") + ("p" if s > 0 else "n")] += 1
    precision = counts["tp"] / (counts["tp"] + counts["fp"])
    recall = counts["tp"] / (counts["tp"] + counts["fn"])
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "accuracy": (counts["tp"] + counts["tn"]) / len(scores),
        "average_precision": brute_average_precision(scores, references),
    }


def brute_regression(predictions, references, circular):
    errors, deviations, mean = [], [], sum(references) / len(references)
    for p, r in zip(predictions, references, strict=True):
        pair = [p - r, mean - r]
        if circular:  # the shortest way round
            pair = [min(range(-3, 4), key=lambda k, d=d: abs(d + 360 * k)) * 360 + d for d in pair]
        errors.append(pair[0])
        deviations.append(pair[1])
    return {
        "r2": 1 - sum(e * e for e in errors) / sum(d * d for d in deviations),
        "mae": sum(map(abs, errors)) / len(errors),
        "mae_of_mean": sum(map(abs, deviations)) / len(errors),
    }


def example_rows(count=60, seed=0):
    rng = np.random.default_rng(seed)
    references = (rng.random((count, 3)) < [0.5, 0.3, 0.9]).astype(float)
    scores = np.round(rng.normal(0, 1, (count, 3)) + references - 0.5, 1)  # rounded: with ties
    return scores, references


def test_keys():
    scores, references = example_rows()
    metric = KeyMetric()
    for start in range(0, 60, 25):
        metric.add_batch(predictions=scores[start : start + 25], references=references[start : start + 25])
    found = metric.compute(columns=["key.w", "key.e", "mouse.left"])
    expected = [brute_key(scores[:, i], references[:, i]) for i in range(3)]
    for column, figures in zip(found["columns"].values(), expected, strict=True):
        assert {k: column[k] for k in figures} == pytest.approx(figures)
    assert found["columns"]["key.e"]["majority_accuracy"] == pytest.approx(1 - references[:, 1].mean())
    assert found["columns"]["key.e"]["pressed"] == references[:, 1].sum() > 0
    assert found["macro_f1"] == pytest.approx(np.mean([f["f1"] for f in expected]))
    assert found["mean_average_precision"] == pytest.approx(np.mean([f["average_precision"] for f in expected]))


def test_metrics_equal_the_functions():
    """Rows that come batch by batch give what the functions give of all, to the last bit."""
    scores, references = example_rows()
    columns, rows = ["key.w", "yaw_delta", "mouse.left"], {"predictions": scores, "references": references}
    one = {"predictions": scores, "references": np.eye(3)[scores.argmax(axis=1)[::-1]]}
    ahead = {**rows, "repeated": references[::-1], "horizon": np.arange(60) % 2 + 1}
    for metric, function, of, options in (
        (KeyMetric, keys_figures, rows, {"columns": columns, "threshold": 0.5, "even_odds": [0.1, 0.2, -0.3]}),
        (CameraMetric, camera_figures, rows, {"columns": columns}),
        (LabelMetric, label_figures, one, {"classes": columns}),
        (AnticipationMetric, anticipation_figures, ahead, {"columns": columns, "continuous": ["yaw_delta"]}),
    ):
        filled = metric()
        for part in (slice(25), slice(25, None)):
            filled.add_batch(**{name: values[part] for name, values in of.items()})
        assert filled.compute(**options) == function(**of, **options)


def test_accuracy_at_even_odds_undoes_a_weight_of_the_loss():
    """A head that knows the probabilities, trained with weights w, has logits log(w p / (1 - p))."""
    rng = np.random.default_rng(3)
    weights, chances = np.array([20.0, 3.0, 0.2]), rng.random((4000, 3)) ** 3
    references = (rng.random((4000, 3)) < chances).astype(float)
    logits = np.log(weights * chances / (1 - chances))
    metric = KeyMetric()
    metric.add_batch(predictions=logits, references=references)
    found = metric.compute(columns=["a", "b", "c"], even_odds=np.log(weights))["columns"].values()
    for i, figures in enumerate(found):
        assert figures["accuracy_at_even_odds"] == ((chances[:, i] > 0.5) == references[:, i]).mean()
        # The best that can be done, above the majority's share and above the threshold of 0.
        assert figures["accuracy_at_even_odds"] > max(figures["accuracy"], figures["majority_accuracy"])


def test_keys_that_are_never_pressed_have_no_figures():
    metric = KeyMetric()
    metric.add_batch(predictions=[[1.0, -1.0], [-1.0, -1.0]], references=[[1.0, 0.0], [1.0, 0.0]])
    found = metric.compute(columns=["key.w", "key.q"])
    quiet = found["columns"]["key.q"]
    assert quiet["f1"] is quiet["recall"] is quiet["precision"] is quiet["average_precision"] is None
    assert found["macro_f1"] == pytest.approx(2 * 1 * 0.5 / 1.5) and found["mean_average_precision"] == 1.0
    assert average_precision(np.array([0.0, 0.0]), np.array([1.0, 0.0])) == 0.5  # a tie is no order


def test_camera():
    rng = np.random.default_rng(1)
    references = np.stack([rng.uniform(-180, 180, 40), rng.normal(0, 5, 40)], axis=1)
    predictions = references + rng.normal(0, 20, (40, 2))
    predictions[0], references[0] = [179.0, 170.0], [-179.0, -170.0]
    metric = CameraMetric()
    metric.add_batch(predictions=predictions, references=references)
    found = metric.compute(columns=["yaw_delta", "pitch_delta"])
    for i, column in enumerate(found):
        expected = brute_regression(predictions[:, i].tolist(), references[:, i].tolist(), circular=i == 0)
        assert found[column] == pytest.approx(expected)
    assert wrap_difference(np.array([179.0]), np.array([-179.0])) == pytest.approx(-2.0)
    metric.add_batch(predictions=[[1.0]], references=[[2.0]])
    with pytest.raises(ValueError, match=r"rows of 2 columns .*found \(1, 1\)"):
        metric.compute(columns=["yaw_delta", "pitch_delta"])
    metric = CameraMetric()
    metric.add_batch(predictions=[[float("nan")]], references=[[2.0]])
    with pytest.raises(ValueError, match="predictions hold values that are not finite"):
        metric.compute(columns=["pitch_delta"])


def test_anticipation_is_compared_with_the_last_action():
    rng = np.random.default_rng(2)
    true = np.stack([rng.normal(0, 9, 50), (rng.random(50) < 0.4)], axis=1).astype(float)
    last = np.stack([true[:, 0] + rng.normal(0, 9, 50), (rng.random(50) < 0.4)], axis=1).astype(float)
    told = np.stack([true[:, 0] * 0.5, true[:, 1] + rng.normal(0, 1, 50) - 0.5], axis=1)
    horizon = rng.integers(1, 3, 50)
    metric = AnticipationMetric()
    metric.add_batch(predictions=told, references=true, repeated=last, horizon=horizon)
    found = metric.compute(columns=["yaw_delta", "key.w"], continuous=["yaw_delta"])["horizons"]
    assert [h["horizon"] for h in found] == [1, 2] and sum(h["rows"] for h in found) == 50
    for figures in found:
        at = horizon == figures["horizon"]
        for name, values in (("model", told), ("repeat_last", last)):
            yaw, key = (figures["columns"][c][name] for c in ("yaw_delta", "key.w"))
            assert yaw == pytest.approx(brute_regression(values[at, 0].tolist(), true[at, 0].tolist(), True))
            expected = brute_key(values[at, 1] - (0.5 if name == "repeat_last" else 0), true[at, 1])
            assert {k: key[k] for k in expected} == pytest.approx(expected)
            assert figures["macro_f1"][name] == pytest.approx(expected["f1"])  # one key: its own
    both = metric.__class__()
    both.add_batch(
        predictions=told[:, [1, 1, 1]] * [1, -1, 1],
        references=true[:, [1, 1, 1]] * [1, 1, 0],
        repeated=last[:, [1, 1, 1]],
        horizon=horizon * 0 + 1,
    )
    (one,) = both.compute(columns=["key.w", "key.s", "key.q"], continuous=[])["horizons"]  # key.q: never pressed
    expected = [brute_key(told[:, 1] * sign, true[:, 1])["f1"] for sign in (1, -1)]
    assert one["macro_f1"]["model"] == pytest.approx(np.mean(expected))


def test_labels():
    rng = np.random.default_rng(3)
    true = rng.integers(0, 3, 40)
    scores = np.round(rng.normal(0, 1, (40, 4)) + np.eye(4)[true], 1)
    metric = LabelMetric()
    metric.add_batch(predictions=scores, references=np.eye(4)[true])
    found = metric.compute(classes=list("abcd"))
    right = [max(range(4), key=lambda c: row[c]) == t for row, t in zip(scores.tolist(), true, strict=True)]
    assert found["accuracy"] == pytest.approx(np.mean(right))
    by_class = [np.mean([r for r, t in zip(right, true, strict=True) if t == c]) for c in range(3)]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(by_class))
    assert found["majority_accuracy"] == pytest.approx(max((true == c).mean() for c in range(3)))
    expected = np.mean([brute_average_precision(scores[:, c], true == c) for c in range(3)])
    assert found["mean_average_precision"] == pytest.approx(expected) and found["chance"] == 0.25
    metric = LabelMetric()
    metric.add_batch(predictions=[[1.0, 1.0], [1.0, -1.0]], references=[[1.0, 1.0], [1.0, 1.0]])
    assert "accuracy" not in (several := metric.compute(classes=["a", "b"])) and several["exact_match"] == 0.5


WORKER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_head_metrics import KeyMetric, example_rows
scores, references = example_rows()
metric = KeyMetric(num_process=2, process_id=1, experiment_id="two", cache_dir=sys.argv[1], timeout=300)
metric.add_batch(predictions=scores[1::2], references=references[1::2])
assert metric.compute(columns=["a", "b", "c"]) is None
"""


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tmp_path):
    arguments = [sys.executable, "-c", WORKER, str(tmp_path), str(Path(__file__).parent)]
    scores, references = example_rows()
    other = subprocess.Popen(arguments)  # first: they wait for each other
    metric = KeyMetric(num_process=2, process_id=0, experiment_id="two", cache_dir=str(tmp_path), timeout=300)
    metric.add_batch(predictions=scores[::2], references=references[::2])
    both = metric.compute(columns=["a", "b", "c"])
    assert other.wait(timeout=120) == 0
    metric = KeyMetric()
    metric.add_batch(predictions=scores, references=references)
    whole = metric.compute(columns=["a", "b", "c"])
    assert both["columns"]["b"]["pressed"] == whole["columns"]["b"]["pressed"]
    for name in ("macro_f1", "mean_average_precision"):
        assert both[name] == pytest.approx(whole[name])
