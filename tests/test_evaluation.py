"""Evaluation against plain loops, hand-computed figures, models whose figures are known, and the script end to end."""

import base64
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from helpers_models import responsive_model
from helpers_training import load_program
from hypothesis import given, settings
from hypothesis import strategies as st

from vjepa_ac_hf import ACTION_COLUMNS, VJEPA2ACModel, VJEPA2ACProcessor, records
from vjepa_ac_hf.evaluation import (
    LatentPredictionMetric,
    RolloutTable,
    aggregate_rows,
    clips,
    derangements,
    evaluate_features,
    figures,
    films,
    pictures,
    plots,
    report,
    state_integrator,
    table_rows,
)

ROOT = Path(__file__).resolve().parents[1]
STEPS, TOKENS, WIDTH = 5, 4, 24
STATISTICS = {
    "columns": list(ACTION_COLUMNS[:4]),
    "count": 10,
    "mean": [1.0, -2.0, 3.0, 0.5],
    "std": [20.0, 15.0, 40.0, 12.0],
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads only slow models of this size down, and badly where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_processor(**kwargs) -> VJEPA2ACProcessor:
    defaults = dict(resolution=32, frames_per_clip=2 * STEPS, action_statistics=STATISTICS)
    return VJEPA2ACProcessor(**{**defaults, **kwargs})


def make_model(action_space: str | list[str] = "vpt-13", **kwargs) -> VJEPA2ACModel:
    return responsive_model(make_processor(action_space=action_space).action_space, STEPS, WIDTH, **kwargs)


def make_data(num_clips: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """Random features, raw actions (all 38 columns), states in degrees, sessions of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.layer_norm(
        torch.randn(num_clips, STEPS, TOKENS, WIDTH, generator=generator), (WIDTH,)
    )
    actions = torch.zeros(num_clips, STEPS - 1, len(ACTION_COLUMNS))
    actions[..., :4] = 40 * torch.randn(num_clips, STEPS - 1, 4, generator=generator)
    actions[..., 4:] = (torch.rand(num_clips, STEPS - 1, 34, generator=generator) < 0.3).float()
    states = torch.stack(
        [
            3000 * torch.randn(num_clips, STEPS, generator=generator),
            180 * torch.rand(num_clips, STEPS, generator=generator) - 90,
        ],
        dim=-1,
    )
    return features, actions, states, [f"session-{i % 3 if i % 4 else 0}" for i in range(num_clips)]


def evaluate_data(model, processor, data, **kwargs) -> RolloutTable:
    features, actions, states, sessions = data
    inputs = processor(actions=actions, states=states)
    defaults = dict(
        sessions=sessions,
        players=["one"] * len(sessions),
        integrate_states=state_integrator(processor),
        yaw_deltas=actions[..., ACTION_COLUMNS.index("yaw_delta")],
    )
    return evaluate_features(model, features, inputs["actions"], inputs["states"], **{**defaults, **kwargs})


# --- the table of errors ----------------------------------------------------------------------------------------


def integrated_by_hand(states, actions, context):
    """Normalised states of one clip: known up to the context, then raw yaw and pitch changes added one by one."""
    yaw, pitch = states[context - 1].tolist()
    known = [(((y + 180) % 360 - 180) / 180, p / 90) for y, p in states[:context].tolist()]
    for action in actions[context - 1 :].tolist():
        yaw = (yaw + action[2] + 180) % 360 - 180
        pitch = min(max(pitch + action[3], -90), 90)
        known.append((yaw / 180, pitch / 90))
    return torch.tensor(known, dtype=torch.float32)


def rollout_by_hand(model, processor, features, raw_actions, states, context):
    """Predictions of one clip without a cache: `model.predict` runs over the whole prefix for every new step."""
    actions = processor.normalize_actions(raw_actions)
    prefix = [features[t] for t in range(context)]
    imagined = []
    while len(imagined) < len(raw_actions) - context + 1:
        steps = len(prefix)
        prediction = model.predict(torch.stack(prefix)[None], actions[None, :steps], states[None, :steps])[0, -1]
        imagined.append(prediction)
        prefix.append(prediction)
    return imagined


@torch.no_grad()
@pytest.mark.parametrize(("context", "horizon"), [(1, None), (2, None), (3, 1), (2, 2)])
def test_table_equals_plain_loops(context, horizon):
    model, processor, data = make_model(), make_processor(), make_data(5)
    features, raw, states, _ = data
    table = evaluate_data(
        model, processor, data, context_steps=context, horizon=horizon, shuffles=2, seed=3, batch_size=2
    )
    horizon = STEPS - context if horizon is None else horizon
    assert table.error.shape == (5, horizon) and table.shuffled.shape == (5, 2, horizon)
    assert table.future_states == "integrated"

    def distances(imagined, clip):
        absolute, square = [], []
        for h in range(horizon):
            difference = (imagined[h] - features[clip, context + h]).double().numpy()
            values = [difference[n, d] for n in range(TOKENS) for d in range(WIDTH)]
            absolute.append(sum(abs(v) for v in values) / len(values))
            square.append(sum(v * v for v in values) / len(values))
        return absolute, square

    for clip in range(5):
        last = context - 1 + horizon
        own = raw[clip, :last]
        repeated = [features[clip, context - 1]] * horizon
        expected = {"persistence": distances(repeated, clip)}
        choices = {("error", None): own}
        for s, other in enumerate(table.partners[clip]):
            choices["shuffled", s] = torch.cat([own[: context - 1], raw[other, context - 1 : last]])
        for key, choice in choices.items():
            known = integrated_by_hand(states[clip], choice, context)
            expected[key] = distances(rollout_by_hand(model, processor, features[clip], choice, known, context), clip)
        found = {
            "persistence": (table.persistence[clip], table.persistence_mse[clip]),
            ("error", None): (table.error[clip], table.error_mse[clip]),
            **{("shuffled", s): (table.shuffled[clip, s], table.shuffled_mse[clip, s]) for s in range(2)},
        }
        for key, both in found.items():
            np.testing.assert_allclose(both, expected[key], rtol=1e-4, atol=1e-6, err_msg=f"clip {clip}: {key}")


def test_batches_seeds_and_iterables():
    model, processor, data = make_model(), make_processor(), make_data(6)
    whole = evaluate_data(model, processor, data, shuffles=3, batch_size=6)
    parts = evaluate_data(model, processor, (iter(data[0].split(4)), *data[1:]), shuffles=3)
    np.testing.assert_array_equal(whole.partners, parts.partners)
    np.testing.assert_allclose(whole.shuffled, parts.shuffled, rtol=1e-5)
    other = evaluate_data(model, processor, data, shuffles=3, seed=1)
    assert (other.partners != whole.partners).any()
    np.testing.assert_allclose(other.error, whole.error, rtol=1e-5)


def test_mode_of_the_model_is_kept():
    model = make_model().train()
    evaluate_data(model, make_processor(), make_data(2), shuffles=1)
    assert model.training
    with pytest.raises(ValueError, match="features"):
        evaluate_data(model, make_processor(), (make_data(2)[0][:, 1:], *make_data(2)[1:]), shuffles=1)
    assert model.training


def test_recorded_future_states_are_not_used_where_turns_are_known(caplog):
    data = make_data(4)
    changed = (*data[:2], data[2].clone(), data[3])
    changed[2][:, 2:] += 57.0
    model, processor = make_model(), make_processor()
    before, after = (evaluate_data(model, processor, d, shuffles=2) for d in (data, changed))
    np.testing.assert_array_equal(before.error, after.error)
    np.testing.assert_array_equal(before.shuffled, after.shuffled)

    assert not caplog.records
    space = [c for c in ACTION_COLUMNS[:13] if c not in ("yaw_delta", "pitch_delta")]
    model, processor = make_model(space), make_processor(action_space=space)
    before, after = (evaluate_data(model, processor, d, shuffles=2) for d in (data, changed))
    assert before.future_states == "recorded" and "['yaw_delta', 'pitch_delta']" in caplog.text
    assert (before.error != after.error).any()  # the leak that the warning is about


@given(num_clips=st.integers(2, 40), count=st.integers(1, 9), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_shuffles_are_permutations_without_fixed_points(num_clips, count, seed):
    found = derangements(num_clips, count, torch.Generator().manual_seed(seed))
    assert found.shape == (count, num_clips)
    for permutation in found.tolist():
        assert sorted(permutation) == list(range(num_clips))
        assert all(other != clip for clip, other in enumerate(permutation))


def test_every_derangement_is_found():
    found = derangements(4, 400, torch.Generator().manual_seed(0)).tolist()
    counts = {tuple(p): found.count(p) for p in found}
    assert len(counts) == 9 and min(counts.values()) > 20  # 9 derangements of 4; 44 expected of each


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(context_steps=0), "context_steps must be between 1 and 4 .* found 0"),
        (dict(context_steps=5), "context_steps must be between 1 and 4 .* found 5"),
        (dict(horizon=4), "horizon must be between 1 and 3 .* found 4"),
        (dict(shuffles=0), "shuffles must be at least 1, found 0"),
        (dict(sessions=["a"]), "actions are those of 3 clips, but sessions of 1"),
    ],
)
def test_errors_of_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_data(make_model(), make_processor(), make_data(3), **arguments)


def test_errors_of_features():
    model, processor, data = make_model(), make_processor(), make_data(3)
    with pytest.raises(ValueError, match="at least 2 clips, found 1"):
        evaluate_data(model, processor, tuple(d[:1] for d in data))
    with pytest.raises(ValueError, match="actions are those of 3 clips, but features of 2"):
        evaluate_data(model, processor, (data[0][:2], *data[1:]))
    broken = data[0].clone()
    broken[1, 3] = float("nan")
    with pytest.raises(ValueError, match="of clip 1 at horizon 2 is not finite"):
        evaluate_data(model, processor, (broken, *data[1:]), batch_size=1)


# --- models whose figures are known -------------------------------------------------------------------------------


def test_model_that_ignores_actions_is_at_chance_exactly():
    model = make_model()
    with torch.no_grad():
        model.predictor.action_embed.weight.zero_()
        model.predictor.state_embed.weight.zero_()
    table = evaluate_data(model, make_processor(), make_data(7), shuffles=4, batch_size=3)
    for h in aggregate_rows(table_rows(table)):
        assert h["win_rate"] == 0.5 and h["win_rate_large_turns"] == 0.5
        assert h["shuffled_actions"] == pytest.approx(h["error"], abs=1e-12)
        assert h["ci95"]["win_rate"] == [0.5, 0.5]


class ActionSum(torch.nn.Module):
    """A model that is right: each step's features are the last ones plus the action's first column."""

    device = torch.device("cpu")

    def rollout(self, features, actions, states):
        context = features.shape[1]
        change = actions[:, context - 1 :, 0].cumsum(dim=1)
        return features[:, -1:] + change[:, :, None, None]


def test_model_that_knows_what_actions_do_wins_every_pair():
    _, raw, states, sessions = make_data(6)
    processor = make_processor()
    actions = processor.normalize_actions(raw)
    positions = torch.cat([torch.zeros(6, 1), actions[..., 0].cumsum(dim=1)], dim=1)
    features = torch.randn(6, 1, TOKENS, WIDTH) + positions[:, :, None, None]
    table = evaluate_data(ActionSum(), processor, (features, raw, states, sessions), shuffles=3)
    assert (table.error < 1e-5).all()
    moved = (positions[:, 2:] - positions[:, 1:2]).abs()
    np.testing.assert_allclose(table.persistence, moved.numpy(), rtol=1e-4, atol=1e-5)
    for h in aggregate_rows(table_rows(table)):
        assert h["win_rate"] == 1.0 and h["ci95"]["win_rate"] == [1.0, 1.0]
        assert h["error_over_persistence"] < 1e-4 and h["shuffled_over_error"] > 1e3


# --- figures ------------------------------------------------------------------------------------------------------


def make_table(error, persistence, shuffled, sessions, turn_gaps=None, players=None) -> RolloutTable:
    """A table of the given errors, of one player; mean squares are ten times as large, to tell them apart."""
    error, persistence, shuffled = (np.asarray(a, dtype=np.float64) for a in (error, persistence, shuffled))
    gaps = np.full(shuffled.shape, np.nan) if turn_gaps is None else np.asarray(turn_gaps, dtype=np.float64)
    partners = np.zeros(shuffled.shape[:2], dtype=np.int64)
    return RolloutTable(
        sessions=sessions,
        players=players or ["one"] * len(sessions),
        context_steps=2,
        future_states="integrated",
        partners=partners,
        error=error,
        persistence=persistence,
        shuffled=shuffled,
        error_mse=10 * error,
        persistence_mse=10 * persistence,
        shuffled_mse=10 * shuffled,
        turn_gaps=gaps,
    )


def test_figures_by_hand():
    table = make_table(
        error=[[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]],
        persistence=[[2.0, 5.0], [2.0, 5.0], [8.0, 5.0]],
        # clip 0 wins and ties at horizon 1, clip 1 loses twice, clip 2 wins twice; at horizon 2 all lose
        shuffled=[[[1.5, 3.0], [1.0, 3.0]], [[1.0, 4.0], [0.5, 4.0]], [[4.0, 5.0], [7.0, 5.0]]],
        sessions=["a", "a", "b"],
        # more than 10 degrees: at horizon 1 the tie of clip 0, the first loss of clip 1, the first win of clip 2
        turn_gaps=[[[10.0, 0.0], [10.1, 0.0]], [[90.0, 0.0], [3.0, 0.0]], [[180.0, 0.0], [0.0, 0.0]]],
    )
    first, second = aggregate_rows(table_rows(table))
    expected = {
        "horizon": 1,
        "error": 2.0,
        "persistence": 4.0,
        "shuffled_actions": 2.5,
        "error_over_persistence": 0.5,
        "shuffled_over_error": 1.25,
        "win_rate": 3.5 / 6,
        "win_rate_large_turns": 1.5 / 3,
        "pairs": 6,
        "pairs_large_turns": 3,
    }
    assert {k: first[k] for k in expected} == pytest.approx(expected)
    assert first["mse"] == pytest.approx({"error": 20.0, "persistence": 40.0, "shuffled_actions": 25.0})
    assert second["win_rate"] == 0.0 and second["error"] == pytest.approx(5.0)
    assert second["win_rate_large_turns"] is None and second["pairs_large_turns"] == 0
    assert second["ci95"]["win_rate_large_turns"] is None
    assert second["ci95"]["win_rate"] == [0.0, 0.0]
    # Two sessions: a resample is all a, all b, or both; a quarter of the draws each for the ends.
    assert first["ci95"]["error"] == pytest.approx([1.5, 3.0])
    assert first["ci95"]["error_over_persistence"] == pytest.approx([3 / 8, 3 / 4])
    assert first["ci95"]["win_rate"] == pytest.approx([1.5 / 4, 1.0])
    assert first["ci95"]["win_rate_large_turns"] == pytest.approx([0.25, 1.0])


def test_ties_count_half():
    table = make_table(error=[[1.0]], persistence=[[1.0]], shuffled=[[[1.0], [1.0], [2.0], [0.0]]], sessions=["a"])
    assert table_rows(table)["wins"].tolist() == [2.0]  # 0.5 + 0.5 + 1 + 0


def test_large_turns_are_circular_and_summed_since_the_context():
    yaw = torch.tensor([[99.0, 170.0, 0.0], [-50.0, -170.0, 0.0], [7.0, -175.0, -3.0], [7.0, 170.0, 175.0]])
    partners = torch.tensor([[1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]])
    from vjepa_ac_hf.evaluation.rollouts import _turn_gaps

    gaps = _turn_gaps(yaw, partners, context_steps=2, horizon=2)
    # Turns since the context, by horizon: 170 170 | -170 -170 | -175 -178 | 170 345: the first action is the context's.
    assert gaps[0].tolist() == [[20.0, 20.0], [15.0, 12.0], [0.0, 175.0]]
    assert gaps[2, 2].tolist() == [5.0, 8.0]  # clip 2 and clip 1
    assert np.isnan(_turn_gaps(None, partners, 2, 2)).all()
    table = make_table(np.ones((4, 2)), np.ones((4, 2)), 2 * np.ones((4, 3, 2)), ["a", "a", "b", "b"], gaps)
    rows = table_rows(table)
    assert rows["pairs_large_turns"].reshape(4, 2)[0].tolist() == [2.0, 3.0]
    assert aggregate_rows(table_rows(make_table([[1.0]], [[1.0]], [[[1.0]]], ["a"])))[0]["pairs_large_turns"] == 0


def random_table(num_clips=30, num_sessions=6, seed=0) -> RolloutTable:
    random = np.random.default_rng(seed)
    sessions = [f"s{i}" for i in random.integers(num_sessions, size=num_clips)]
    error = random.uniform(0.5, 1.5, (num_clips, 2))
    return make_table(
        error,
        random.uniform(0.5, 2, (num_clips, 2)),
        random.uniform(0.5, 2, (num_clips, 4, 2)),
        sessions,
        random.uniform(0, 40, (num_clips, 4, 2)),
    )


def test_intervals_equal_resampling_whole_sessions():
    """Against the definition: put the clips of drawn sessions together and compute the figures anew, draw by draw."""
    table = random_table()
    rows = table_rows(table)
    names = sorted(set(table.sessions))
    weights = figures.resample_weights(len(names), 60, torch.Generator().manual_seed(5))
    assert weights.shape == (60, len(names)) and (weights.sum(axis=1) == len(names)).all()
    drawn = {name: [] for name in figures.INTERVAL_FIGURES}
    for weight in weights.astype(int):
        picked = [i for name, times in zip(names, weight, strict=True) for _ in range(times)
                  for i in np.flatnonzero((rows["session_id"] == name) & (rows["horizon"] == 2))]  # fmt: skip
        values = aggregate_rows({name: column[picked] for name, column in rows.items()}, draws=1)[0]
        for name in drawn:
            drawn[name].append(values[name])
    found = aggregate_rows(rows, draws=60, seed=5)[1]
    for name, values in drawn.items():
        assert found["ci95"][name] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist()), name
        low, high = found["ci95"][name]
        assert low < found[name] < high


def test_bootstrap_by_seed_and_order_of_rows():
    rows = table_rows(random_table())
    again = {name: column.copy() for name, column in rows.items()}
    assert aggregate_rows(rows, seed=1) == aggregate_rows(again, seed=1)
    assert aggregate_rows(rows, seed=1)[0]["ci95"] != aggregate_rows(rows, seed=2)[0]["ci95"]
    order = np.random.default_rng(0).permutation(len(rows["error"]))
    shuffled = aggregate_rows({name: column[order] for name, column in rows.items()}, seed=1)
    assert json.dumps(rounded(shuffled)) == json.dumps(rounded(aggregate_rows(rows, seed=1)))


def rounded(value):
    """Sums in another order differ in the last bits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(value, 9) if isinstance(value, float) else value


def test_one_session_has_no_intervals(caplog):
    rows = table_rows(random_table(num_sessions=1))
    assert all(h["ci95"] is None for h in aggregate_rows(rows))
    assert "ci95 is null" in caplog.text


@pytest.mark.parametrize(("players", "unit"), [(9, "session"), (10, "player")])
def test_intervals_resample_players_from_ten_on(players, unit):
    """Against plain loops over drawn units: every player has two sessions, and players differ, sessions do not."""
    random = np.random.default_rng(1)
    of = [f"p{i % players}" for i in range(4 * players)]
    days = [f"{player}-{i // (2 * players)}" for i, player in enumerate(of)]
    error = np.array([[1.0 + int(player[1:])] for player in of]) + random.uniform(0, 0.1, (len(of), 1))
    table = make_table(error, error + 1, np.stack([error + 1] * 2, axis=1), days, players=of)
    assert figures.unit_counts(days, of) == {"sessions": 2 * players, "players": players, "interval_unit": unit}
    (found,) = aggregate_rows(table_rows(table), draws=200, seed=3)
    named = of if unit == "player" else days
    units = sorted(set(named))
    drawn = torch.randint(len(units), (200, len(units)), generator=torch.Generator().manual_seed(3)).tolist()
    means = []
    for draw in drawn:
        clips = [error[i, 0] for unit in draw for i, name in enumerate(named) if name == units[unit]]
        means.append(sum(clips) / len(clips))
    assert found["ci95"]["error"] == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist())


def test_constant_errors_have_intervals_of_no_width():
    shape = (8, 3)
    table = make_table(np.full(shape, 0.3), np.full(shape, 0.6), np.full((8, 2, 3), 0.45), list("aabbccdd"))
    for h in aggregate_rows(table_rows(table)):
        for name in ("error", "persistence", "shuffled_actions", "error_over_persistence", "win_rate"):
            assert h["ci95"][name] == pytest.approx([h[name]] * 2, abs=1e-12)
        assert h["error_over_persistence"] == pytest.approx(0.5) and h["win_rate"] == 1.0


def test_figures_without_data_are_null():
    """Nothing moves: persistence has no error. And only one session has large turns: no interval for them."""
    gaps = np.zeros((4, 1, 1))
    gaps[:2] = 50
    table = make_table(np.ones((4, 1)), np.zeros((4, 1)), 2 * np.ones((4, 1, 1)), list("aabb"), gaps)
    only = aggregate_rows(table_rows(table))[0]
    assert only["error_over_persistence"] is None and only["ci95"]["error_over_persistence"] is None
    assert only["win_rate_large_turns"] == 1.0 and only["ci95"]["win_rate_large_turns"] is None
    assert only["ci95"]["win_rate"] == [1.0, 1.0]
    json.dumps(only, allow_nan=False)


def test_errors_of_rows():
    rows = table_rows(random_table())
    with pytest.raises(ValueError, match=r"lack the columns \['wins'\]"):
        aggregate_rows({k: v for k, v in rows.items() if k != "wins"})
    with pytest.raises(ValueError, match="same length"):
        aggregate_rows({**rows, "error": rows["error"][:-1]})


# --- the metric of the library evaluate ---------------------------------------------------------------------------


def test_metric_equals_the_function(tmp_path):
    rows = table_rows(random_table())
    metric = LatentPredictionMetric(cache_dir=str(tmp_path))
    middle = len(rows["error"]) // 2
    for part in (slice(middle), slice(middle, None)):
        metric.add_batch(**{name: column[part] for name, column in rows.items()})
    result = metric.compute(bootstrap_seed=4, draws=50)
    counts = {"clips": 30, "sessions": 6, "players": 1, "interval_unit": "session"}
    assert result == {**counts, "horizons": aggregate_rows(rows, seed=4, draws=50)}


_SECOND_PROCESS = """
import json, sys
from vjepa_ac_hf.evaluation import LatentPredictionMetric
rows = json.load(open(sys.argv[2]))
metric = LatentPredictionMetric(cache_dir=sys.argv[1], num_process=2, process_id=1, experiment_id="two")
metric.add_batch(**rows)
assert metric.compute() is None
"""


@pytest.mark.slow
def test_metric_over_two_processes(tmp_path):
    rows = table_rows(random_table())
    middle = len(rows["error"]) // 2
    (tmp_path / "rows.json").write_text(json.dumps({k: v[middle:].tolist() for k, v in rows.items()}))
    command = [sys.executable, "-c", _SECOND_PROCESS, str(tmp_path / "cache"), str(tmp_path / "rows.json")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as other:
        metric = LatentPredictionMetric(
            cache_dir=str(tmp_path / "cache"), num_process=2, process_id=0, experiment_id="two"
        )
        metric.add_batch(**{name: column[:middle] for name, column in rows.items()})
        result = metric.compute(draws=50)
        _, messages = other.communicate(timeout=60)
    assert other.returncode == 0, messages
    assert rounded(result["horizons"]) == rounded(aggregate_rows(rows, draws=50))


@pytest.mark.slow
def test_a_script_that_hides_the_library_evaluate(tmp_path):
    """Importing the metric says what is wrong, without running the script that stands in the way."""
    (tmp_path / "evaluate.py").write_text("raise SystemExit('the script was run')\n")
    code = "import vjepa_ac_hf.evaluation.metrics"
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert re.search(r"ImportError: .*finds the file .*evaluate\.py", run.stderr), run.stderr


# --- report -------------------------------------------------------------------------------------------------------


def make_metrics(table, **kwargs):
    return {
        "clips": len(table.error),
        "clip_set": {"rule": "clips-v1", "clips": len(table.error), "digest": "ab" * 32},
        "retrieval": {
            **{"group": 8, "top1": 0.625, "persistence_top1": 0.25, "chance": 0.125},
            "ci95": {"top1": [0.5, 0.75], "persistence_top1": None},
        },
        **figures.unit_counts(table.sessions, table.players),
        "loss_type": "mse",
        "encoding": "tubelet",
        "command": "python evaluate.py --model 'a & b'",
        "versions": records.versions(),
        "context_steps": 2,
        "seconds_per_step": 0.4,
        "future_states": "integrated",
        "shuffles": 4,
        "seed": 0,
        "model": "<script>alert(1)</script>",
        "dataset": "org/data",
        "split": "validation",
        "horizons": aggregate_rows(table_rows(table), draws=50),
        **kwargs,
    }


def make_pictures(num_shown=2, mirrored=None):
    model, processor, data = make_model(), make_processor(), make_data(4)
    features, raw, states, _ = data
    inputs = processor(actions=raw, states=states)
    return pictures.picture_clips(
        model,
        features[:num_shown],
        some_frames(num_shown),
        shown=range(num_shown),
        others=[3] * num_shown,
        names=[f"clip <{i}>" for i in range(4)],
        actions=inputs["actions"],
        raw_actions=raw,
        states=inputs["states"],
        context_steps=2,
        horizon=2,
        integrate_states=processor.integrate_states,
        mirrored=None if mirrored is None else mirrored(inputs["actions"]),
    )


def some_frames(clips):
    generator = torch.Generator().manual_seed(9)
    return torch.randint(256, (clips, 2 * STEPS, 3, 32, 32), dtype=torch.uint8, generator=generator)


def test_report_holds_its_pictures(tmp_path):
    table = random_table()
    path = report.write_report(tmp_path, make_metrics(table), table, make_pictures(), "Two <clips>.")
    page = path.read_text()
    assert path.name == "report.html"
    embedded = [base64.b64decode(m) for m in re.findall(r'src="data:image/(?:png|webp);base64,([^"]+)"', page)]
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix in (".png", ".webp")}
    clip_files = {f"clip-{i}{end}" for i in range(2) for end in (".png", "-colours.png", ".webp")}
    assert set(files) == {"curves.png", "pairs.png", *clip_files}
    assert set(embedded) == set(files.values()) and len(embedded) == len(files)
    assert {p.name for p in tmp_path.iterdir()} == {*files, "report.html"}  # no temporary files
    assert "Two &lt;clips&gt;." in page and "nearest real frames" in page and "drawn by the decoder" not in page
    assert (
        "<script" not in page and "&lt;script&gt;alert(1)" in page and "clip &lt;1&gt;" in page and "clip <" not in page
    )
    assert "a &amp; b" in page and not re.search(r'(src|href)="(?!data:)', page)
    first = aggregate_rows(table_rows(table), draws=50)[0]
    assert f"{first['win_rate']:.4f}" in page and f"{first['ci95']['win_rate'][0]:.4f}" in page
    assert f"chosen by clips-v1, set {'ab' * 32}" in page
    assert "in 0.625 (95 % interval 0.500 to 0.750) of the cases" in page and "in 0.250, chance in 0.125." in page


def test_histogram_counts_every_pair_of_horizon_1():
    table = make_table([[1.0, 7.0], [2.0, 7.0]], [[0.0] * 2] * 2, [[[1.5, 9.0], [0.0, 9.0]]] * 2, ["a", "b"])
    assert report.first_differences(table).tolist() == [0.5, -1.0, -0.5, -2.0]
    bars = plots.histogram_figure(report.first_differences(table)).axes[0].patches
    left = [b.get_height() for b in bars if b.get_x() + b.get_width() / 2 < 0]
    assert sum(left) == 3 and sum(b.get_height() for b in bars) == 4


def test_curves_show_figures_and_intervals():
    horizons = aggregate_rows(table_rows(random_table()), draws=50)
    horizons[1]["win_rate_large_turns"] = None
    errors, rates = plots.curves_figure(horizons, 0.4).axes
    drawn = {line.get_label(): line.get_ydata() for line in (*errors.lines, *rates.lines)}
    drawn = {label: list(values) for label, values in drawn.items()}
    assert drawn["prediction"] == [h["error"] for h in horizons]
    assert drawn["prediction, other clips' actions"] == [h["shuffled_actions"] for h in horizons]
    assert drawn["all pairs"] == [h["win_rate"] for h in horizons]
    assert drawn[plots.LABELS["win_rate_large_turns"]] == [horizons[0]["win_rate_large_turns"]]
    assert drawn["chance"] == [0.5, 0.5] and "0.4 s" in rates.get_xlabel()
    band = errors.collections[0].get_paths()[0].vertices[:, 1]
    for low, high in (h["ci95"]["error"] for h in horizons):
        assert np.isclose(band, low).any() and np.isclose(band, high).any()


def test_report_without_clips_or_intervals(tmp_path):
    table = make_table([[1.0], [1.0]], [[0.0], [0.0]], [[[1.0]], [[1.0]]], ["a", "a"])
    metrics = make_metrics(table, future_states="recorded", encoding="clip")
    page = report.write_report(tmp_path, metrics, table, []).read_text()
    assert "<h2>Clips</h2>" not in page and "–" in page
    assert "one session" in page and "too mild" in page and "do not measure prediction" in page


def horizon_figures(ratio, rate, ratio_interval=None, rate_interval=None, horizon=1):
    intervals = {"error_over_persistence": ratio_interval, "win_rate": rate_interval}
    intervals |= {"shuffled_over_error": None, "win_rate_large_turns": None}
    return {
        "horizon": horizon,
        "error_over_persistence": ratio,
        "win_rate": rate,
        "win_rate_large_turns": None,
        "shuffled_over_error": 1.1,
        "ci95": None if ratio_interval is None else intervals,
    }


@pytest.mark.parametrize(
    ("figures_by_horizon", "answers"),
    [
        ([(0.8, 0.9, [0.7, 0.9], [0.8, 0.95])], ["Yes, at every horizon.", "Yes, at every horizon."]),
        ([(0.8, 0.6, [0.7, 1.1], [0.45, 0.7])], ["No difference can be told at any"] * 2),
        ([(1.2, 0.4, [1.1, 1.3], [0.3, 0.45])], ["No: at every horizon it does worse."] * 2),
        ([(1.2, 0.5)], ["No: at every horizon it does worse.", "No difference can be told at any"]),
        (
            [(0.8, 0.9, [0.7, 0.9], [0.8, 0.95]), (1.2, 0.5, [1.1, 1.3], [0.4, 0.6])],
            [
                "In part: better at horizon 1 and worse at horizon 2.",
                "In part: better at horizon 1; no difference can be told elsewhere.",
            ],
        ),
    ],
)
def test_verdict(figures_by_horizon, answers):
    horizons = [horizon_figures(*f, horizon=i + 1) for i, f in enumerate(figures_by_horizon)]
    sentences = report.verdict({"horizons": horizons})
    assert len(sentences) == 2
    for sentence, answer in zip(sentences, answers, strict=True):
        assert answer in sentence


def test_pictures_show_the_right_steps():
    shown = make_pictures()[0]
    other = "prediction, other clip's actions"
    assert {name: tuple(m.shape) for name, m in shown.colours.items()} == {
        "true features": (4, 2, 2, 3),
        **dict.fromkeys(("prediction", other, "persistence"), (2, 2, 2, 3)),
    }
    assert {name: tuple(m.shape) for name, m in shown.rows.items()} == dict.fromkeys(
        ("prediction", other, "persistence"), (2, 32, 32, 3)
    )
    frames = some_frames(2)[0, :8].permute(0, 2, 3, 1)
    assert torch.equal(shown.frames, some_frames(2)[0, :8:2])
    for step in range(2):
        torch.testing.assert_close(shown.colours["persistence"][step], shown.colours["true features"][1])
        assert torch.equal(shown.rows["persistence"][step], frames[2] / 255)
    assert not torch.equal(shown.colours["prediction"], shown.colours[other])
    assert list(shown.film) == ["real", "prediction", other]
    assert torch.equal(shown.film["real"], frames)
    for name in ("prediction", other):
        assert torch.equal(shown.film[name][:4], frames[:4])  # the context is real everywhere
        assert torch.equal(shown.film[name][4::2] / 255, shown.rows[name])
    raw = make_data(4)[1]
    yaw = ACTION_COLUMNS.index("yaw_delta")
    assert shown.captions[0] == "" and "other" not in shown.captions[1]
    assert f"yaw {raw[0, 1, yaw]:+.1f}°" in shown.captions[2] and f"other: {raw[3, 1, yaw]:+.1f}°" in shown.captions[2]
    mirrored = make_pictures(mirrored=lambda actions: -actions)[0]
    assert list(mirrored.film) == ["real", "prediction", "prediction, mirrored actions"]
    assert list(mirrored.rows) == ["prediction", other, "prediction, mirrored actions", "persistence"]


def test_clips_that_turn_are_shown():
    """Turns are summed since the context, on a circle: 350 degrees are 10 the other way."""
    yaw = torch.tensor([[0.0, 0, 0], [6, 6, -12], [9, -9, 9], [350, 0, 0], [-11, 0, 0], [180, 180, 0], [4, 4, 4]])
    rows, sentence = pictures.turning_clips(yaw, 3)
    assert rows == [1, 5, 6] and "4 of 7" in sentence and "10 degrees" in sentence
    assert pictures.turning_clips(yaw, 9)[0] == [1, 4, 5, 6]
    assert pictures.turning_clips(yaw, 0)[0] == []
    rows, sentence = pictures.turning_clips(yaw[[0, 2]], 4)
    assert rows == [0, 1] and "none turns" in sentence


def read_film(content):
    """Frames of an animated WebP, `(frames, height, width, 3)`, one for every 200 ms: those that repeat are merged."""
    image = PIL.Image.open(io.BytesIO(content))
    assert image.format == "WEBP" and image.info["loop"] == 0
    frames = []
    for number in range(image.n_frames):
        image.seek(number)
        image.load()
        assert image.info["duration"] % 200 == 0
        frames += [np.asarray(image.convert("RGB"))] * (image.info["duration"] // 200)
    return np.stack(frames)


def test_the_film_in_the_page_is_what_was_real_beside_what_was_imagined(tmp_path):
    table, shown = random_table(), make_pictures()
    page = report.write_report(tmp_path, make_metrics(table), table, shown).read_text()
    found = re.findall(r'src="data:image/webp;base64,([^"]+)" alt="film of clip &lt;(\d)&gt;', page)
    assert [number for _, number in found] == ["0", "1"]
    for clip, (content, _) in zip(shown, found, strict=True):
        film = read_film(base64.b64decode(content))
        assert film.shape == (8, 33, 3 * 32 + 2, 3)
        for at, name in enumerate(clip.film):
            assert np.array_equal(film[:, :32, 33 * at : 33 * at + 32], clip.film[name].numpy()), name
        for number, frame in enumerate(film):
            assert (frame[32] == ((0, 114, 178) if number < 4 else (230, 159, 0))).all()
        assert (film[:, :32, [32, 65]] == 255).all()


def test_films_of_large_frames_are_made_smaller():
    """A gradient stays one: 256 x 512 pixels become 192 x 384, within what WebP loses."""
    panel = torch.linspace(0, 255, 512)[None, None, :, None].expand(3, 256, 512, 3).byte().clone()
    panel[1] = 255 - panel[1]
    film = read_film(films.film_webp({"a": panel, "b": panel.flip(0)}, 1, 5)).astype(float)
    assert film.shape == (3, 198, 2 * 384 + 6, 3)
    expected = np.linspace(0, 255, 384)[None, :, None]
    for frame, wanted in ((0, expected), (1, 255 - expected)):
        assert np.abs(film[frame, :192, :384] - wanted).mean() < 3


def test_nearest_steps_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(3, 4, 2, 5, generator=generator)
    wanted = [[7, 2, 0], [11, 4, 7]]
    features = torch.stack([real.flatten(0, 1)[places] for places in wanted])
    assert pictures.nearest_steps(features + 0.01, real).tolist() == wanted
    features = torch.randn(2, 3, 2, 5, generator=generator)
    for clip, places in enumerate(pictures.nearest_steps(features, real).tolist()):
        for step, place in enumerate(places):
            errors = [float(((features[clip, step] - real[c, t]) ** 2).mean()) for c in range(3) for t in range(4)]
            assert place == int(np.argmin(errors))


def test_the_nearest_frame_of_what_was_predicted_exactly_is_the_true_one(monkeypatch):
    """A model that repeats a step of another clip: that step's frames are shown."""
    frames, features = some_frames(2), make_data(2)[0]
    monkeypatch.setattr(pictures, "roll_out", lambda *arguments, **options: features[[1, 1]][:, [0, 3]])
    shown = pictures.picture_clips(
        *(make_model(), features, frames),
        **dict(shown=[0, 1], others=[1, 0], names=["a", "b"], actions=torch.zeros(2, STEPS - 1, 13)),
        **dict(raw_actions=torch.zeros(2, STEPS - 1, 38), states=torch.zeros(2, STEPS, 2)),
        **dict(context_steps=2, horizon=2, integrate_states=None),
    )
    for clip in shown:
        assert torch.equal((255 * clip.rows["prediction"]).round(), frames[1, [0, 6]].permute(0, 2, 3, 1).float())
        assert torch.equal(clip.film["prediction"][4:], frames[1, [0, 1, 6, 7]].permute(0, 2, 3, 1))


def test_action_captions():
    action = torch.zeros(len(ACTION_COLUMNS))
    for column, value in {"yaw_delta": -12.34, "pitch_delta": 5, "key.w": 1, "mouse.left": 1, "mouse_dx": 9}.items():
        action[ACTION_COLUMNS.index(column)] = value
    assert pictures.describe_action(action) == "yaw -12.3°\npitch +5.0°\nw button left"
    assert pictures.describe_action(torch.zeros(38)).endswith("no keys")


def test_feature_colours():
    """Components by variance, tokens in rows of the grid, the same colours for the same features whatever the order."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    scores = torch.randn(500, 8, generator=generator) * torch.tensor([9.0, 5.0, 3.0, 0.1, 0.1, 0.1, 0.1, 0.1])
    rows = (scores @ basis.T)[:, None]
    colours = pictures.FeatureColours(rows)
    correlation = torch.corrcoef(torch.cat([scores[:, :3].T, ((rows[:, 0] - colours.mean) @ colours.components).T]))
    assert (correlation[:3, 3:].abs().diagonal() > 0.98).all()
    for component in colours.components.T:
        assert component.abs().max() == component.max()  # a sign that does not depend on the solver
    found = colours(rows[:4].reshape(1, 4, 8))
    assert found.shape == (1, 2, 2, 3) and found.min() >= 0 and found.max() <= 1
    torch.testing.assert_close(found[0, 1, 0], colours(rows[2:3])[0, 0, 0])
    again = pictures.FeatureColours(rows.flip(0))
    torch.testing.assert_close(again(rows[:4]), colours(rows[:4]), atol=1e-5, rtol=0)
    share = (colours(rows) == 0).float().mean(dim=(0, 1, 2))
    torch.testing.assert_close(share, torch.full((3,), 0.02), atol=0.005, rtol=0)
    assert torch.isfinite(pictures.FeatureColours(torch.ones(5, 4, 8))(torch.ones(5, 4, 8))).all()


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'vjepa-ac-hf[report]'")):
        plots.new_figure(1, 1)


# --- clips and the script -----------------------------------------------------------------------------------------


def make_dataset(num_clips: int = 6, num_frames: int = 2 * STEPS, **columns) -> datasets.Dataset:
    from torchcodec.encoders import VideoEncoder

    _, actions, states, sessions = make_data(num_clips)
    videos = []
    for i in range(num_clips):
        frames = torch.randint(256, (num_frames, 3, 4, 4), generator=torch.Generator().manual_seed(i))
        frames = frames.to(torch.uint8).repeat_interleave(10, dim=2).repeat_interleave(12, dim=3)  # 40 x 48 pixels
        mp4 = VideoEncoder(frames, frame_rate=5).to_tensor("mp4", codec="libx264", pixel_format="yuv420p")
        videos.append({"bytes": mp4.numpy().tobytes(), "path": None})
    data = {
        "video": videos,
        "actions": actions.tolist(),
        "states": states.tolist(),
        "recording_id": [f"recording-{s}" for s in sessions],
        "session_id": sessions,
        "player_id": [f"player of {s}" for s in sessions],
        "start_tick": list(range(num_clips)),
    }
    features = datasets.Features(
        {
            "video": datasets.Video(),
            "actions": datasets.List(datasets.List(datasets.Value("float32"))),
            "states": datasets.List(datasets.List(datasets.Value("float32"))),
            "recording_id": datasets.Value("string"),
            "session_id": datasets.Value("string"),
            "player_id": datasets.Value("string"),
            "start_tick": datasets.Value("int32"),
        }
    )
    return datasets.Dataset.from_dict({**data, **columns}, features=features)


def undecoded(dataset: datasets.Dataset) -> datasets.Dataset:
    return dataset.cast_column("video", datasets.Video(decode=False))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model with its processor, and a data set, as the programs leave them."""
    folder = tmp_path_factory.mktemp("evaluation")
    make_model().save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    (folder / "data" / "data").mkdir(parents=True)
    make_dataset().to_parquet(folder / "data" / "data" / "validation-00000-of-00001.parquet")
    return folder


def test_encoded_batches_are_the_clips_features():
    model, processor, dataset = make_model(), make_processor(), undecoded(make_dataset(3))
    records = clips.read_records(dataset, processor)
    batches = list(clips.encoded_batches(model, processor, dataset, records.names, 2))
    assert [len(b) for b in batches] == [2, 1]
    for row, features in enumerate(torch.cat(batches)):
        frames = clips.decode_clip(dataset[row]["video"], "clip", 2 * STEPS)
        alone = model.encode(processor(videos=[frames])["pixel_values_videos"])[0]
        torch.testing.assert_close(features, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(records.actions, make_data(3)[1])
    torch.testing.assert_close(records.yaw_deltas, make_data(3)[1][..., 2])
    last_broken = [{"video": dataset[0]["video"]}] * 2 + [{"video": {"bytes": b"broken", "path": None}}]
    last_broken = datasets.Dataset.from_list(last_broken, features=dataset.select_columns("video").features)
    with pytest.raises(ValueError, match="^clip 2 .*cannot be decoded"):
        list(clips.encoded_batches(model, processor, last_broken, records.names, 2))
    assert records.names[2] == f"clip 2 (recording recording-{records.sessions[2]}, tick 2)"


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (dict(action_space="vpt-36"), "model's action_dim is 13, .* is 36"),
        (dict(action_space=list(reversed(ACTION_COLUMNS[:13]))), "model's action_space is .* processor's action_space"),
        (dict(frames_per_clip=8), "model's frames_per_clip is 10, .* is 8"),
        (dict(resolution=48), "model's encoder_config.crop_size is 32, .*resolution is 48"),
        (dict(tubelet_size=1), "model's encoder_config.tubelet_size is 2, .* is 1"),
    ],
)
def test_errors_of_processor(processor, message):
    clips.check_model_and_processor(make_model(), make_processor())
    with pytest.raises(ValueError, match=message):
        clips.check_model_and_processor(make_model(), make_processor(**processor))


def test_errors_of_datasets():
    processor, dataset = make_processor(), undecoded(make_dataset(3))
    with pytest.raises(ValueError, match=r"lacks the columns \['states'\]"):
        clips.read_records(dataset.remove_columns("states"), processor)
    with pytest.raises(ValueError, match="at least 2 clips, found 1"):
        clips.read_records(dataset.select([0]), processor)
    with pytest.raises(ValueError, match=r"clip 0 .*recording-.*actions must be \(3, 38\) .* 8 .*found \(4, 38\)"):
        clips.read_records(dataset, make_processor(frames_per_clip=8))
    states = make_data(3)[2].tolist()
    states[1] = states[1][:-1]
    with pytest.raises(ValueError, match=r"clip 1 .*states must be \(5, 2\) .*found \(4, 2\)"):
        clips.read_records(undecoded(make_dataset(3, states=states)), processor)
    with pytest.raises(ValueError, match="clip 0 .*frames_per_clip is 10, the video has 12 frames"):
        clips.read_records(undecoded(make_dataset(3, num_frames=12)), processor)
    with pytest.raises(ValueError, match="clip 0 .*processor's fps is 10, the video has 5 frames a second"):
        clips.read_records(dataset, make_processor(fps=10))
    with pytest.raises(ValueError, match="some clip: the video cannot be decoded"):
        clips.decode_clip({"bytes": b"not a video", "path": None}, "some clip", 10)


def test_spread():
    assert clips.spread(5, None) == [0, 1, 2, 3, 4] == clips.spread(5, 9)
    assert clips.spread(101, 5) == [0, 25, 50, 75, 100] and clips.spread(5, 0) == []


def run_script(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "examples" / "evaluate.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "examples", timeout=300)


@pytest.mark.slow
def test_script(folders, tmp_path):
    """From the saved model and the Parquet files to the report; the figures equal those computed here."""
    output = tmp_path / "report"
    run = run_script(
        *("--model", folders / "model", "--dataset", folders / "data", "--output", output),
        *("--batch_size", 4, "--shuffles", 3, "--num_pictures", 2, "--seed", 5, "--device", "cpu"),
    )
    assert run.returncode == 0, run.stderr
    assert f"report: {output / 'report.html'}" in run.stdout and "win_rate" in run.stdout
    assert {p.name for p in output.iterdir()} == {
        *("metrics.json", "report.html", "curves.png", "pairs.png"),
        *(f"clip-{i}{end}" for i in range(2) for end in (".png", "-colours.png", ".webp")),
    }
    metrics = json.loads((output / "metrics.json").read_text())
    named = {
        "clips": 6,
        "sessions": 3,
        "players": 3,
        "interval_unit": "session",
        "loss_type": "mse",
        "context_steps": 2,
        "seconds_per_step": 0.4,
        "future_states": "integrated",
    }
    named |= {"shuffles": 3, "seed": 5, "split": "validation", "encoding": "tubelet", "model": str(folders / "model")}
    assert {k: metrics[k] for k in named} == named
    assert metrics["versions"]["torch"] == torch.__version__ and "--shuffles 3" in metrics["command"]

    documented = re.findall(r"`(\w+)`", (ROOT / "docs" / "evaluation.md").read_text().split("## metrics.json")[1])
    assert {*metrics, *metrics["horizons"][0]} <= set(documented)

    # The very file: x264 does not encode the same frames to the same bytes on every run.
    dataset = datasets.Dataset.from_parquet(str(next(folders.glob("data/data/*.parquet"))), cache_dir=str(tmp_path))
    processor, dataset = make_processor(), undecoded(dataset)
    records = clips.read_records(dataset, processor)
    features = torch.cat(list(clips.encoded_batches(make_model(), processor, dataset, records.names, 4)))
    data = (features, records.actions, records.states, records.sessions)
    table = evaluate_data(make_model(), processor, data, shuffles=3, seed=5, batch_size=4)
    expected = aggregate_rows(table_rows(table), seed=5)
    assert [h["horizon"] for h in metrics["horizons"]] == [1, 2, 3]
    for found, wanted in zip(metrics["horizons"], expected, strict=True):
        assert found.keys() == wanted.keys()
        for name in (
            "error",
            "persistence",
            "shuffled_actions",
            "win_rate",
            "win_rate_large_turns",
            "pairs_large_turns",
        ):
            assert found[name] == pytest.approx(wanted[name], rel=1e-4), name


@pytest.mark.slow
def test_script_refuses_what_does_not_fit(folders, tmp_path):
    """Another action space ends the program with both numbers, before anything is written."""
    make_model().save_pretrained(tmp_path / "model")
    make_processor(action_space="vpt-36").save_pretrained(tmp_path / "model")
    run = run_script("--model", tmp_path / "model", "--dataset", folders / "data", "--output", tmp_path / "report")
    assert run.returncode == 1
    assert "\nerror: the model's action_dim is 13, but the processor's number of columns" in run.stderr
    assert not (tmp_path / "report").exists()


@pytest.fixture
def script(monkeypatch):
    """examples/evaluate.py as a module, whose main() runs with the arguments given."""
    # As for `python examples/evaluate.py`, with other spellings of the same folder.
    folder = ROOT / "examples"
    monkeypatch.setattr(sys, "path", [str(folder), f"{folder}/../examples", *sys.path])
    module = load_program("examples/evaluate.py")

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        module.main()

    return main


@pytest.mark.usefixtures("script")
def test_script_does_not_hide_the_library_evaluate():
    assert all(Path(entry).resolve() != ROOT / "examples" for entry in sys.path)
    assert Path(importlib.util.find_spec("evaluate").origin).parent.name == "evaluate"


def test_script_errors(folders, tmp_path, script, capsys):
    common = ("--dataset", folders / "data", "--output", tmp_path / "report", "--device", "cpu")
    make_model(frames_per_clip=8).save_pretrained(tmp_path / "short")
    make_processor(frames_per_clip=8).save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match=r"clip 0 .*actions must be \(3, 38\).*found \(4, 38\)"):
        script("--model", tmp_path / "short", *common)
    with pytest.raises(ValueError, match="context_steps must be between 1 and 4"):
        script("--model", folders / "model", "--context_steps", 5, *common)
    with pytest.raises(ValueError, match="no split 'train', found"):
        script("--model", folders / "model", "--split", "train", *common)
    with pytest.raises(SystemExit):
        script("--model", folders / "model", "--max_clips", 1, *common)
    assert "--max_clips must be at least 2, found 1" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_script_with_fewer_clips_and_one_horizon(folders, tmp_path, script):
    script(
        *("--model", folders / "model", "--dataset", folders / "data", "--output", tmp_path, "--device", "cpu"),
        *("--max_clips", 3, "--horizon", 1, "--context_steps", 1, "--num_pictures", 0),
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["clips"] == 3 and [h["horizon"] for h in metrics["horizons"]] == [1]
    weights = records.tensor_digests(records.tensors_of(folders / "model" / "model.safetensors"))
    assert metrics["step"] is None and metrics["weights_sha256"] == records.weights_digest(weights)


def test_script_tells_the_step_of_the_very_weights(folders, tmp_path, script):
    """training_args.json says it, of the weights whose digest it has; beside others it says nothing."""
    model = shutil.copytree(folders / "model", tmp_path / "model")
    weights = records.weights_digest(records.tensor_digests(records.tensors_of(model / "model.safetensors")))
    for saved, step in ((weights, 70), ("0" * 64, None)):
        (model / "training_args.json").write_text(json.dumps({"step": 70, "weights_sha256": saved}))
        script(
            *("--model", model, "--dataset", folders / "data", "--output", tmp_path, "--device", "cpu"),
            *("--max_clips", 3, "--horizon", 1, "--context_steps", 1, "--num_pictures", 0),
        )
        metrics = json.loads((tmp_path / "metrics.json").read_text())
        assert (metrics["step"], metrics["weights_sha256"]) == (step, weights)
    assert not list(tmp_path.glob("clip-*.png"))
