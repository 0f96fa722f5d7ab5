"""Planning against plain loops, exhaustive search and analytic optima; model and costs are tiny."""

import ast
import importlib.util
import itertools
import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_clips import write_clips
from helpers_models import responsive_model
from helpers_training import load_program
from hypothesis import given, settings
from hypothesis import strategies as st

from vjepa_ac_hf import (
    ACTION_COLUMNS,
    ACTION_SPACES,
    VJEPA2ACForInverseDynamics,
    VJEPA2ACModel,
    VJEPA2ACProcessor,
)
from vjepa_ac_hf.planning import (
    CEM,
    ICEM,
    MPPI,
    Controller,
    Distribution,
    GoalCost,
    GradientRefinement,
    Imagination,
    InverseDynamicsProposals,
    Landscape,
    SearchSpace,
    encode_context,
    encode_goal,
    energy_landscape,
    integrate_view,
    landscape,
    minimize,
    plan,
    planner,
    summarize_landscapes,
    to_minerl_action,
    to_vpt_lines,
    vary_columns,
)
from vjepa_ac_hf.planning.actions import colored_noise
from vjepa_ac_hf.planning.planner import next_slot
from vjepa_ac_hf.planning.search import refine
from vjepa_ac_hf.recordings.clips import ClipSpec, aggregate_actions, clip_states
from vjepa_ac_hf.recordings.log import parse_recording

ROOT = Path(__file__).resolve().parents[1]
STEPS, TOKENS, WIDTH = 6, 4, 24
STATISTICS = {
    "columns": list(ACTION_COLUMNS[:4]),
    "count": 10,
    "mean": [1.0, -2.0, 0.3, 0.5],
    "std": [80.0, 40.0, 12.0, 6.0],
}
AT = {name: index for index, name in enumerate(ACTION_COLUMNS)}
MOVE = ["mouse_dx", "mouse_dy", "yaw_delta", "pitch_delta"]


def make_processor(action_space="vpt-38", **kwargs) -> VJEPA2ACProcessor:
    defaults = dict(resolution=32, frames_per_clip=2 * STEPS, action_statistics=STATISTICS, action_space=action_space)
    return VJEPA2ACProcessor(**{**defaults, **kwargs})


def make_model(action_space="vpt-38", **kwargs) -> VJEPA2ACModel:
    return responsive_model(make_processor(action_space).action_space, STEPS, WIDTH, **kwargs)


@pytest.fixture(scope="module")
def model() -> VJEPA2ACModel:
    return make_model()


@pytest.fixture(scope="module")
def processor() -> VJEPA2ACProcessor:
    return make_processor()


def make_frames(count: int, seed: int = 0, size: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def make_actions(steps: int, seed: int = 0) -> torch.Tensor:
    """Raw actions that a player could have made: one slot, mouse and view agree."""
    rng = np.random.default_rng(seed)
    actions = np.zeros((steps, 38))
    actions[:, 2:4] = rng.normal(0, 5, (steps, 2))
    actions[:, 0:2] = actions[:, 2:4] / 0.15
    actions[:, AT["key.w"]] = rng.random(steps) < 0.5
    actions[:, AT["hotbar.4"]] = 1
    return torch.from_numpy(actions)


def make_context(model, processor, steps: int = 3, **kwargs):
    defaults = dict(
        frames=make_frames(2 * steps),
        states=torch.tensor([[170.0 + 7 * i, 80.0 + 2 * i] for i in range(steps)]),
        actions=make_actions(steps - 1),
    )
    return encode_context(model, processor, **{**defaults, **kwargs})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- what is searched: whole actions ----------------------------------------------------------------------------


def completed_by_hand(space: SearchSpace, decision: list[list[float]], pitch: float, slot: int) -> np.ndarray:
    """One candidate, step by step, from the definitions in docs/planning.md (mouse and view coupled)."""
    rows = []
    for values in decision:
        row = dict.fromkeys(ACTION_COLUMNS, 0.0)
        row.update({c: v for c, v in space.fixed.items() if c not in MOVE and c not in map("key.{}".format, range(10))})
        named = dict(zip(space.continuous + space.keys, values[:-1], strict=True))
        row.update({name: value for name, value in named.items() if name not in MOVE})
        degrees = {}
        for mouse, view in (("mouse_dx", "yaw_delta"), ("mouse_dy", "pitch_delta")):
            degrees[view] = named[view] if view in named else 0.15 * named.get(mouse, 0.0)
        if row["gui_open"]:
            row["mouse_dx"], row["mouse_dy"] = degrees["yaw_delta"] / 0.15, degrees["pitch_delta"] / 0.15
        else:
            row["mouse_dx"] = degrees["yaw_delta"] / 0.15
            row["yaw_delta"] = (degrees["yaw_delta"] + 180) % 360 - 180
            row["pitch_delta"] = min(90 - pitch, max(-90 - pitch, degrees["pitch_delta"]))
            row["mouse_dy"] = row["pitch_delta"] / 0.15
            pitch += row["pitch_delta"]
        row[f"hotbar.{slot}"] = 1.0
        if values[-1]:
            row[f"key.{int(values[-1])}"] = 1.0
            slot = int(values[-1]) - 1
        rows.append([row[c] for c in ACTION_COLUMNS])
    return np.array(rows)


SPACES = [
    "vpt-13",
    "vpt-36",
    "vpt-38",
    ["mouse_dx", "mouse_dy", "key.w", "key.3"],
    ["pitch_delta", "gui_open", "hotbar.2"],
    ["key.w"],
]


@given(
    columns=st.sampled_from(SPACES),
    yaw=st.tuples(st.floats(-170, 170), st.floats(0, 9)),
    look=st.tuples(st.floats(-60, 60), st.floats(0, 60)),
    pitch=st.floats(-90, 90),
    slot=st.integers(0, 8),
    spread=st.floats(0.1, 50),
    free_gui=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_sampled_actions_keep_bounds_and_follow_from_the_decisions(
    columns, yaw, look, pitch, slot, spread, free_gui, seed
):
    known = ACTION_SPACES.get(columns, columns) if isinstance(columns, str) else columns
    bounds = {}
    if "yaw_delta" in known or "mouse_dx" in known:
        bounds["yaw_delta"] = (yaw[0], yaw[0] + yaw[1])
    if "pitch_delta" in known or "mouse_dy" in known:
        bounds["pitch_delta"] = (look[0], look[0] + look[1])
    free = ["gui_open"] if free_gui and "gui_open" in known else []
    space = SearchSpace(columns, bounds=bounds, free=free)
    start = space.initial(4)
    wide = Distribution(start.mean, start.std * spread, start.press, start.number)
    decisions = space.sample(wide, 20, seeded(seed))
    assert decisions.shape == (20, 4, space.width)
    variables = len(space.continuous)
    assert (decisions[..., :variables] >= space.low).all() and (decisions[..., :variables] <= space.high).all()
    assert set(decisions[..., variables:-1].unique().tolist()) <= {0.0, 1.0}
    assert set(decisions[..., -1].unique().tolist()) <= set(map(float, space.numbers))

    actions = space.complete(decisions, pitch=pitch, slot=slot)
    for candidate, decision in zip(actions, decisions, strict=True):
        expected = completed_by_hand(space, decision.tolist(), pitch, slot)
        np.testing.assert_allclose(candidate.numpy(), expected, rtol=0, atol=1e-9)
    assert (actions[..., AT["hotbar.0"] : AT["hotbar.8"] + 1].sum(dim=-1) == 1).all()
    assert (actions[..., AT["key.1"] : AT["key.9"] + 1].sum(dim=-1) <= 1).all()
    assert (actions[..., 2] >= -180).all() and (actions[..., 2] < 180).all()
    reached = pitch + actions[..., 3].cumsum(dim=-1)
    assert (reached.abs() <= 90 + 1e-9).all()
    if not free and "yaw_delta" in bounds:
        low, high = bounds["yaw_delta"]
        assert (actions[..., 2] >= low - 1e-9).all() and (actions[..., 2] <= high + 1e-9).all()
    if not free and "pitch_delta" in bounds:  # but for what the clamp at +-90 cuts off
        low, high = bounds["pitch_delta"]
        inside = (actions[..., 3] >= low - 1e-9) & (actions[..., 3] <= high + 1e-9)
        assert (inside | (reached.abs() > 90 - 1e-9)).all()


def test_a_slot_that_is_not_known_is_none_until_a_number_key():
    space = SearchSpace(["key.2", "key.5"])
    decisions = torch.zeros(1, 4, space.width, dtype=torch.float64)
    decisions[0, 1, -1] = 5
    actions = space.complete(decisions, pitch=0, slot=None)[0]
    slots = actions[:, AT["hotbar.0"] : AT["hotbar.8"] + 1]
    assert [row.nonzero().flatten().tolist() for row in slots] == [[], [], [4], [4]]

    unknown = torch.zeros(2, 38)
    assert next_slot(unknown[:0]) == 0 and next_slot(unknown) is None
    unknown[1, AT["key.3"]] = 1
    assert next_slot(unknown) == 2 and next_slot(unknown[:1]) is None
    unknown[0, AT["hotbar.6"]] = 1
    assert next_slot(unknown[:1]) == 6


def test_what_is_free_and_what_is_not():
    space = SearchSpace("vpt-38", statistics=STATISTICS)
    assert space.continuous == ["yaw_delta", "pitch_delta"]
    fixed = ["key.q", "key.e", "key.escape", "key.right.shift"]
    assert [c for c in ACTION_COLUMNS[13:28] if c not in space.keys] == fixed
    assert space.numbers == list(range(10)) and "gui_open" not in space.keys
    torch.testing.assert_close(space.low, torch.tensor([0.3 - 36, 0.5 - 18], dtype=torch.float64))
    torch.testing.assert_close(space.high, torch.tensor([0.3 + 36, 0.5 + 18], dtype=torch.float64))
    space = SearchSpace("vpt-38", statistics=STATISTICS, free=["key.e", "gui_open"], fixed={"key.w": 1, "key.3": 0})
    assert "key.e" in space.keys and "gui_open" in space.keys and "key.w" not in space.keys
    assert space.numbers == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert (space.complete(space.mode(space.initial(2))[None], pitch=0, slot=0)[..., AT["key.w"]] == 1).all()
    chosen = Distribution(
        torch.tensor([[90.0, -1.0]], dtype=torch.float64),
        torch.ones(1, 2, dtype=torch.float64),
        torch.linspace(0, 1, len(space.keys), dtype=torch.float64)[None],
        torch.nn.functional.one_hot(torch.tensor([5]), 10).double() * 0.4 + 0.06,
    )
    pressed = [float(i > (len(space.keys) - 1) / 2) for i in range(len(space.keys))]
    assert space.mode(chosen).tolist() == [[float(space.high[0]), -1.0, *pressed, 5.0]]
    assert SearchSpace(["key.1", "hotbar.6"]).numbers == [0, 1, 7]
    assert SearchSpace(["key.1", "key.2"], fixed={"key.2": 1}).numbers == [2]


def test_bounds_of_mouse_and_view_hold_both():
    bounds = {"mouse_dx": (-100, 40), "yaw_delta": (-3, 60), "pitch_delta": (0, 0)}
    space = SearchSpace("vpt-13", bounds=bounds)
    np.testing.assert_allclose(space.low, [-3, 0])
    np.testing.assert_allclose(space.high, [6, 0])
    space = SearchSpace(["mouse_dx", "mouse_dy"], bounds={"yaw_delta": (-3, 6), "mouse_dy": (1, 2)})
    assert space.continuous == ["mouse_dx", "mouse_dy"]
    np.testing.assert_allclose(space.low, [-20, 1])
    np.testing.assert_allclose(space.high, [40, 2])
    turned = SearchSpace(["mouse_dx"], fixed={"mouse_dx": 1300})  # 195 degrees to the right: 165 to the left
    action = turned.complete(turned.mode(turned.initial(1))[None], pitch=0, slot=0)[0, 0]
    assert action[:3].tolist() == pytest.approx([1300, 0, -165])


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(bounds={"yaw_delta": (5, 2)}), "'yaw_delta' needs finite low <= high.*low 5 and high 2"),
        (dict(bounds={"yaw_delta": (5, math.inf)}), "low 5 and high inf"),
        (dict(bounds={"yaw_delta": (-200, 2)}), r"within \[-180, 180\).*low -200 and high 2"),
        (dict(bounds={"yaw_delta": (0, 180)}), "low 0 and high 180"),
        (
            dict(bounds={"yaw_delta": (5, 9), "mouse_dx": (0, 10)}),
            r"do not overlap: \[5, 9\] of 'yaw_delta' and \[0, 1.5\]",
        ),
        (
            dict(bounds={"pitch_delta": (5, 9)}, fixed={"pitch_delta": 4}),
            r"do not overlap: \[5, 9\].*and \[4, 4\]",
        ),
        (dict(bounds={"key.3": (0, 1)}), "bounds: column 'key.3' is not one of"),
        (dict(bounds={"yaw_dleta": (0, 1)}), "unknown action column 'yaw_dleta'; did you mean 'yaw_delta'"),
        (dict(fixed={"key.w": 1}), "fixed: the action space lacks 'key.w', it has"),
        (dict(fixed={"key.3": 0.5}), "column 'key.3' must be 0 or 1, found 0.5"),
        (dict(fixed={"mouse_dx": math.nan}), "column 'mouse_dx' must be a finite number, found nan"),
        (dict(fixed={"key.3": 1, "key.4": 1}), r"at most one number key can be 1, found \['key.3', 'key.4'\]"),
        (dict(fixed={"hotbar.2": 1}), "slot 'hotbar.2' follows from the number keys; name 'key.3'"),
        (dict(fixed={"key.3": 1}, free=["key.3"]), "'key.3' cannot be both free and fixed to 1"),
        (dict(press_probability=1.0), "press_probability must be between 0 and 1, found 1.0"),
        (dict(statistics=None), "'yaw_delta' has no bounds, and there are no action statistics"),
    ],
)
def test_bad_search_spaces(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SearchSpace("vpt-13", **{"statistics": STATISTICS, **kwargs})


def test_view_is_integrated_as_by_the_processor_and_by_a_loop(processor):
    generator = seeded(3)
    actions = torch.zeros(5, 4, 38, dtype=torch.float64)
    actions[..., 2:4] = 200 * torch.rand(5, 4, 2, generator=generator) - 100
    states = integrate_view(torch.tensor([3000.0, 70.0]), actions)
    for candidate, found in zip(actions.tolist(), states.tolist(), strict=True):
        yaw, pitch = (3000.0 + 180) % 360 - 180, 70.0
        expected = [[yaw, pitch]]
        for action in candidate:
            yaw = (yaw + action[2] + 180) % 360 - 180
            pitch = min(90.0, max(-90.0, pitch + action[3]))
            expected.append([yaw, pitch])
        np.testing.assert_allclose(found, expected, atol=1e-9)
    known = processor.normalize_states(torch.tensor([[3000.0, 70.0]])).expand(5, -1)
    by_processor = processor.integrate_states(known, processor.normalize_actions(actions))
    torch.testing.assert_close(processor.normalize_states(states), by_processor, rtol=1e-5, atol=1e-5)


# --- methods ----------------------------------------------------------------------------------------------------


def fit_by_hand(decisions, weights, variables):
    mean = sum(w * d for w, d in zip(weights, decisions, strict=True))
    variance = sum(w * (d - mean) ** 2 for w, d in zip(weights, decisions, strict=True))
    return mean[:, :variables], np.sqrt(variance[:, :variables]), mean[:, variables:-1]


def test_fit_and_weights_by_hand():
    space = SearchSpace("vpt-38", statistics=STATISTICS)
    decisions = space.sample(space.initial(3), 6, seeded())
    costs = torch.tensor([3.0, 1.0, 2.0, 1.0, 5.0, 9.0], dtype=torch.float64)
    weights = CEM(candidates=6, elites=3).weigh(costs)
    np.testing.assert_allclose(weights, [0, 1 / 3, 1 / 3, 1 / 3, 0, 0])
    soft = MPPI(temperature=0.5).weigh(costs)
    spread = np.std(costs.numpy())
    expected = np.exp(-(costs.numpy() - 1) / spread / 0.5)
    np.testing.assert_allclose(soft, expected / expected.sum(), rtol=1e-12)
    np.testing.assert_allclose(MPPI().weigh(torch.ones(4, dtype=torch.float64)), [0.25] * 4)
    for w in (weights, soft):
        fitted = space.fit(decisions, w)
        mean, std, press = fit_by_hand(decisions.numpy(), w.tolist(), 2)
        np.testing.assert_allclose(fitted.mean, mean, atol=1e-12)
        np.testing.assert_allclose(fitted.std, std, atol=1e-12)
        np.testing.assert_allclose(fitted.press, press, atol=1e-12)
        counted = [[sum(w[m] for m in range(6) if decisions[m, h, -1] == n) for n in range(10)] for h in range(3)]
        np.testing.assert_allclose(fitted.number, np.array(counted, dtype=float), atol=1e-12)


DISCRETE = [
    CEM(iterations=12, candidates=64, elites=8),
    ICEM(iterations=12, candidates=64, elites=8, candidates_decay=1.05),
    MPPI(iterations=12, returns="best"),
]


@pytest.mark.parametrize("method", DISCRETE)
def test_discrete_minimum_is_the_exhaustive_one(method):
    """3 steps, 2 keys and 3 choices of number key: 12 ** 3 sequences, of which the cost has one minimum."""
    space = SearchSpace(["key.w", "mouse.left", "key.1", "key.2", "hotbar.0", "hotbar.1"])
    assert space.numbers == [0, 1, 2]
    steps = [[w, a, n] for w in (0.0, 1.0) for a in (0.0, 1.0) for n in (0.0, 1.0, 2.0)]
    everything = torch.tensor(list(itertools.product(steps, repeat=3)), dtype=torch.float64)
    wanted = torch.randn(3, 38, generator=seeded(5), dtype=torch.float64)

    def evaluate(decisions):
        actions = space.complete(decisions, pitch=0, slot=4)
        # Coupled over time through the slot, and between keys.
        return (actions * wanted).sum(dim=(1, 2)) + 2 * (actions[:, :, AT["key.w"]].sum(1) - 2).abs()

    costs = evaluate(everything)
    for seed in range(3):
        found = minimize(evaluate, space, space.initial(3), method=method, generator=seeded(seed))
        assert found.cost == pytest.approx(float(costs.min()))
        assert torch.equal(found.decisions, everything[costs.argmin()])


@pytest.mark.parametrize("returns", ["best", "mean"])
@pytest.mark.parametrize("make", [CEM, ICEM, MPPI])
def test_quadratic_minimum_is_the_analytic_one(make, returns):
    space = SearchSpace(["yaw_delta", "pitch_delta"], bounds={"yaw_delta": (-30, 30), "pitch_delta": (-10, 10)})
    # A positive definite form that couples steps; its minimum lies inside the bounds but for one value.
    mix = torch.randn(4, 4, generator=seeded(1), dtype=torch.float64)
    form = mix @ mix.T + 2 * torch.eye(4, dtype=torch.float64)
    optimum = torch.tensor([12.0, -4.0, -7.0, 3.0], dtype=torch.float64)

    def evaluate(decisions):
        apart = decisions[..., :2].flatten(1) - optimum
        return torch.einsum("mi,ij,mj->m", apart, form, apart)

    method = make(iterations=25, candidates=128, returns=returns)
    found = minimize(evaluate, space, space.initial(2), method=method, generator=seeded())
    np.testing.assert_allclose(found.decisions[:, :2].flatten(), optimum, atol=0.5)
    assert found.cost == pytest.approx(float(evaluate(found.decisions[None])[0]))
    # Outside of the bounds: the nearest corner of what is allowed, for a form without mixed terms.
    far = minimize(
        lambda d: (d[:, 0, 0] - 100) ** 2 + (d[:, 0, 1] + 100) ** 2,
        space,
        space.initial(1),
        method=method,
        generator=seeded(),
    )
    np.testing.assert_allclose(far.decisions[0, :2], [30, -10], atol=0.05)


def test_candidates_hold_the_mean_and_the_best_and_costs_never_rise():
    space = SearchSpace("vpt-38", statistics=STATISTICS)
    target = space.sample(space.initial(2), 1, seeded(9))[0]
    seen, start = [], space.initial(2)

    def evaluate(decisions):
        seen.append(decisions)
        return (decisions - target).abs().sum(dim=(1, 2))

    found = minimize(evaluate, space, start, method=CEM(iterations=5, candidates=16, elites=4), generator=seeded())
    assert [len(d) for d in seen] == [16] * 5  # the mean and the best are among the candidates, not beside them
    assert torch.equal(seen[0][0], space.mode(start))
    lowest = math.inf
    for number, decisions in enumerate(seen):
        costs = (decisions - target).abs().sum(dim=(1, 2))
        if number:
            assert torch.equal(decisions[1], best)  # noqa: F821
        if costs.min() < lowest:
            lowest, best = float(costs.min()), decisions[costs.argmin()]
        assert found.costs[number] == pytest.approx(
            {"best": lowest, "current_mean": float(costs[0]), "candidates": float(costs.mean())}
        )
    assert found.cost == lowest and torch.equal(found.decisions, best)


@pytest.mark.parametrize(("horizon", "exponent"), [(5, 2.0), (6, 1.0), (2, 3.0), (32, 2.0)])
def test_coloured_noise_has_the_power_and_the_variance_that_it_should(horizon, exponent):
    white = torch.randn(40_000, horizon, 1, generator=seeded(), dtype=torch.float64)
    noise = colored_noise(white, exponent)[..., 0]
    frequencies = [min(k, horizon - k) / horizon or 1 / horizon for k in range(horizon)]
    power = np.array([f**-exponent for f in frequencies])
    # Covariances of a stationary process are the cosine sums of its power; variance 1.
    expected = [
        sum(p * math.cos(2 * math.pi * k * apart / horizon) for k, p in enumerate(power)) / power.sum()
        for apart in range(horizon)
    ]
    covariance = (noise.T @ noise / len(noise)).numpy()
    for one, other in itertools.product(range(horizon), repeat=2):
        assert covariance[one, other] == pytest.approx(expected[abs(one - other)], abs=0.03)
    assert expected[0] == 1 and abs(float(noise.mean())) < 0.03
    assert colored_noise(white, 0.0) is white and colored_noise(white[:, :1], exponent).equal(white[:, :1])


def test_coloured_plans_are_smooth_and_within_their_bounds():
    space = SearchSpace(["yaw_delta", "key.w"], bounds={"yaw_delta": (-30, 30)})
    start = space.initial(12)
    white, red = (space.sample(start, 400, seeded(), noise_exponent=e) for e in (0.0, 2.0))
    assert torch.equal(white, space.sample(start, 400, seeded()))
    assert torch.equal(white[..., 1:], red[..., 1:])  # keys are drawn as before
    assert red[..., 0].abs().max() <= 30
    jumps, spread = (lambda d: float(d[..., 0].diff(dim=1).abs().mean())), (lambda d: float(d[..., 0].std()))
    assert jumps(red) < 0.6 * jumps(white) and spread(red) == pytest.approx(spread(white), rel=0.05)


def test_elites_stay_and_candidates_get_fewer():
    space = SearchSpace("vpt-38", statistics=STATISTICS)
    target, seen = space.sample(space.initial(3), 1, seeded(9))[0], []

    def evaluate(decisions):
        seen.append(decisions)
        return (decisions - target).abs().sum(dim=(1, 2))

    method = ICEM(iterations=5, candidates=40, elites=10, keep_elites=0.3, candidates_decay=1.25)
    proposals = space.sample(space.initial(3), 4, seeded(3))
    found = minimize(evaluate, space, space.initial(3), method=method, generator=seeded(), proposals=proposals)
    assert [len(d) for d in seen] == [40, 32, 26, 20, 20]  # twice the elites at least
    assert torch.equal(seen[0][0], space.mode(space.initial(3))) and torch.equal(seen[0][1:5], proposals)
    for before, after in itertools.pairwise(seen):
        costs = (before - target).abs().sum(dim=(1, 2))
        assert torch.equal(after[1:4], before[costs.argsort(stable=True)[:3]])
    assert torch.equal(found.ranked[0], found.decisions) and len(found.ranked) == 20
    ranked = (found.ranked - target).abs().sum(dim=(1, 2))
    assert (ranked.diff() >= 0).all() and float(ranked[0]) == found.cost
    with pytest.raises(ValueError, match="ICEM: 40 candidates leave room for 38 proposals, found 39"):
        minimize(
            evaluate,
            space,
            space.initial(3),
            method=method,
            generator=seeded(),
            proposals=space.sample(space.initial(3), 39, seeded()),
        )


# --- gradients --------------------------------------------------------------------------------------------------


def test_gradients_find_the_minimum_of_a_quadratic():
    """Coupled over steps; one variable is fixed, one optimum lies beyond its bound."""
    bounds = {"yaw_delta": (-30, 30), "pitch_delta": (2, 2)}
    space = SearchSpace(["yaw_delta", "pitch_delta", "key.w"], bounds=bounds)
    mix = torch.randn(3, 3, generator=seeded(1), dtype=torch.float64)
    form = mix @ mix.T + 2 * torch.eye(3, dtype=torch.float64)
    optimum = torch.tensor([12.0, -7.0, 3.0], dtype=torch.float64)

    def evaluate(decisions):
        apart = decisions[..., 0] - optimum
        pressed = decisions[..., 2].sum(dim=1)
        return torch.einsum("mi,ij,mj->m", apart, form, apart) + pressed

    def gradients(decisions):
        apart = decisions[..., 0] - optimum
        slope = torch.zeros_like(decisions)
        slope[..., 0] = 2 * apart @ form
        slope[..., 2] = 1.0  # of a key, which is not moved
        return evaluate(decisions), slope

    method = CEM(iterations=1, candidates=12, elites=4)
    start = minimize(evaluate, space, space.initial(3), method=method, generator=seeded())
    found = refine(start, evaluate, gradients, space, GradientRefinement(steps=200, starts=1))
    np.testing.assert_allclose(found.decisions[:, 0], optimum, atol=1e-3)
    assert (found.decisions[:, 1] == 2).all() and torch.equal(found.decisions[:, 2:], start.decisions[:, 2:])
    assert found.cost == pytest.approx(float(evaluate(found.decisions[None])[0])) and found.cost < start.cost
    assert len(found.costs) == 201 and found.costs[0] == start.costs[0] and found.costs[-1]["best"] == found.cost
    several = refine(start, evaluate, gradients, space, GradientRefinement(steps=200, starts=3))
    pressed = {tuple(keys.tolist()) for keys in start.ranked[:3, :, 2]}
    assert several.cost <= found.cost + 1e-6 and tuple(several.decisions[:, 2].tolist()) in pressed
    lows = [record["best"] for record in found.costs]
    assert lows == sorted(lows, reverse=True)

    def far(decisions):
        return (decisions[..., 0] - 100).square().sum(dim=1)

    def slopes(decisions):
        slope = torch.zeros_like(decisions)
        slope[..., 0] = 2 * (decisions[..., 0] - 100)
        return far(decisions), slope

    start = minimize(far, space, space.initial(3), method=method, generator=seeded())
    found = refine(start, far, slopes, space, GradientRefinement(steps=40, step_size=0.5))
    assert (found.decisions[:, 0] == 30).all()
    # Uphill: nothing is better than where it began, and that is kept.
    back = refine(found, far, lambda d: (far(d), -slopes(d)[1]), space, GradientRefinement(steps=3, starts=1))
    assert back.cost == found.cost and torch.equal(back.decisions, found.decisions)


@pytest.mark.parametrize("columns", ["vpt-38", ["mouse_dx", "mouse_dy", "key.w"], ["yaw_delta", "mouse_dy"]])
def test_whole_actions_are_differentiable(columns):
    """Against finite differences, in float64; away from where pitch stops."""
    space = SearchSpace(columns, statistics=STATISTICS)
    decisions = space.sample(space.initial(3), 2, seeded()) * 0.5
    fixed, variables = decisions[..., len(space.continuous) :].round(), len(space.continuous)

    def actions(values):
        return space.complete(torch.cat([values, fixed], dim=-1), pitch=5.0, slot=3)

    values = decisions[..., :variables].clone().requires_grad_()
    assert torch.autograd.gradcheck(actions, (values,))


@pytest.mark.parametrize("columns", ["vpt-38", ["mouse_dx", "mouse_dy", "key.w"]])
def test_gradients_through_the_rollout_are_finite_differences(columns):
    model, processor = make_model(columns), make_processor(columns)
    context = make_context(model, processor, states=torch.tensor([[3.0, 1.0], [170.0, 4.0], [178.0, -7.0]]))
    space = SearchSpace(columns, statistics=STATISTICS)
    complete = partial(space.complete, pitch=-7.0, slot=context.slot)
    decisions = space.sample(space.initial(3), 3, seeded(2))
    goal = torch.randn(TOKENS, WIDTH, generator=seeded(1))
    cost = lambda f, a: (f[:, -1] - goal).square().mean(dim=(1, 2)) + 1e-4 * a[..., 2].square().sum(1)  # noqa: E731
    whole = Imagination(model, processor, context)
    costs, slopes = whole.costs_and_gradients(decisions, complete, cost)
    torch.testing.assert_close(costs, whole.costs(complete(decisions), cost), rtol=1e-5, atol=1e-6)
    assert slopes.shape == decisions.shape and slopes.dtype == torch.float64 and not slopes.requires_grad
    std = space.initial(1).std[0]
    checked = 0
    for m, h, v in itertools.product(range(3), range(3), range(len(space.continuous))):
        step = 0.02 * float(std[v])
        ends = []
        for sign in (1, -1):
            moved = decisions[m].clone()
            moved[h, v] += sign * step
            ends.append(float(whole.costs(complete(moved[None]), cost)[0]))
        expected = (ends[0] - ends[1]) / (2 * step) * float(std[v])
        assert float(slopes[m, h, v] * std[v]) == pytest.approx(expected, rel=0.05, abs=2e-3)
        checked += abs(expected) > 0.02
    assert checked >= 6  # the cost does depend on what is varied
    parts = Imagination(model, processor, context, max_batch_tokens=TOKENS + 2)
    torch.testing.assert_close(parts.costs_and_gradients(decisions, complete, cost)[1], slopes, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="the cost function has no gradient"):
        whole.costs_and_gradients(decisions, complete, lambda f, a: f.detach().mean(dim=(1, 2, 3)))
    with pytest.raises(ValueError, match="the cost's gradient has .* values that are not finite"):
        whole.costs_and_gradients(decisions, complete, lambda f, a: (f - f).sum(dim=(1, 2, 3)).sqrt())


def test_noise_and_probabilities_do_not_collapse():
    space = SearchSpace("vpt-38", statistics=STATISTICS)
    stds: list[torch.Tensor] = []
    presses: list[torch.Tensor] = []

    class Watched(SearchSpace):
        def sample(self, distribution, count, generator):
            stds.append(distribution.std)
            presses.append(distribution.press)
            numbers.append(distribution.number)
            return super().sample(distribution, count, generator)

    numbers: list[torch.Tensor] = []
    space = Watched("vpt-38", statistics=STATISTICS, fixed={"key.9": 0})
    start = space.initial(1)
    cost = lambda d: d.abs().sum(dim=(1, 2))  # noqa: E731
    method = CEM(iterations=30, candidates=32, elites=2, minimum_std=0.1, minimum_probability=0.05)
    minimize(cost, space, start, method=method, generator=seeded())
    assert (stds[-1] >= 0.1 * start.std).all() and (stds[-1] < 0.5 * start.std).all()
    assert ((presses[-1] >= 0.05) & (presses[-1] <= 0.95)).all()
    torch.testing.assert_close(numbers[-1].sum(-1), torch.ones(1, dtype=torch.float64))
    assert (numbers[-1][:, :9] >= 0.05 / 9 - 1e-12).all() and (numbers[-1][:, 9] == 0).all()
    stds.clear()
    minimize(cost, space, start, method=MPPI(iterations=3, candidates=8, noise_decay=0.5), generator=seeded())
    torch.testing.assert_close(stds[2], start.std / 4)


def test_warm_start_is_the_rest_of_the_plan():
    space = SearchSpace("vpt-38", statistics=STATISTICS)
    earlier = space.sample(space.initial(4), 1, seeded(2))[0]
    start = space.warm_start(earlier, 1, 4)
    mode = space.mode(start)
    assert torch.equal(mode[:3], earlier[1:])
    assert torch.equal(mode[3], space.mode(space.initial(4))[3])
    assert torch.equal(space.mode(space.warm_start(earlier, 9, 2)), space.mode(space.initial(2)))
    assert ((start.press > 0) & (start.press < 1)).all() and (start.number > 0).all()
    with pytest.raises(ValueError, match=rf"needs decisions \(steps, {space.width}\).*found \(4, 3\)"):
        space.warm_start(earlier[:, :3], 1, 4)
    with pytest.raises(ValueError, match="shift must be at least 0, found -1"):
        space.warm_start(earlier, -1, 4)
    other = SearchSpace("vpt-38", statistics=STATISTICS, fixed={"key.2": 0, "key.3": 1})
    with pytest.raises(ValueError, match=r"presses the number keys \[.*\], this space has \[3\]"):
        other.warm_start(earlier, 0, 4)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CEM(iterations=0), "CEM: iterations must be a whole number of at least 1, found 0"),
        (lambda: CEM(candidates=2, elites=1), "candidates must be a whole number of at least 3, found 2"),
        (lambda: MPPI(candidates=2), "candidates must be a whole number of at least 3, found 2"),
        (lambda: CEM(candidates=8, elites=9), "elites must be at most the 8 candidates, found 9"),
        (lambda: CEM(candidates=8, elites=8, keep_elites=0.9), "at most 6 elites can be kept, found 7 "),
        (lambda: ICEM(candidates=8, elites=9), "ICEM: elites must be at most the 8 candidates, found 9"),
        (lambda: ICEM(candidates_decay=0.5), "candidates_decay must be a finite number of at least 1, found 0.5"),
        (lambda: MPPI(noise_exponent=-1.0), "noise_exponent must be a finite number of at least 0, found -1.0"),
        (lambda: CEM(keep_elites=1.0), "keep_elites must be at least 0 and below 1, found 1.0"),
        (lambda: GradientRefinement(steps=0), "GradientRefinement: steps must be a whole number of at least 1"),
        (lambda: GradientRefinement(step_size=0.0), "step_size must be above 0 and finite, found 0.0"),
        (lambda: CEM(elites=0), "elites must be a whole number of at least 1, found 0"),
        (lambda: CEM(elites=2.5), "elites must be a whole number of at least 1, found 2.5"),
        (lambda: CEM(smoothing=1.0), "smoothing must be at least 0 and below 1, found 1.0"),
        (lambda: CEM(minimum_probability=0.5), "minimum_probability must be at least 0 and below 0.5, found 0.5"),
        (lambda: CEM(returns="elite"), r"returns must be one of \('best', 'mean'\), found 'elite'"),
        (lambda: MPPI(temperature=0), "MPPI: temperature must be above 0 and at most inf, found 0"),
        (lambda: MPPI(noise_decay=1.5), "noise_decay must be above 0 and at most 1, found 1.5"),
        (lambda: MPPI(iterations=True + 0.5), "MPPI: iterations must be a whole number"),
    ],
)
def test_bad_methods(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- imagination and costs --------------------------------------------------------------------------------------


def imagined_by_hand(model, processor, context, actions):
    """One candidate, the whole prefix again at every step, states added up in a loop."""
    known = torch.cat([context.actions, actions])
    states = context.states.tolist()
    for action in actions.tolist():
        yaw, pitch = states[-1]
        states.append([yaw + action[2], min(90.0, max(-90.0, pitch + action[3]))])
    columns = [AT[c] for c in processor.action_space]
    a = known[:, columns].clone()
    for i, name in enumerate(processor.action_space):
        if name in MOVE:
            at = MOVE.index(name)
            a[:, i] = (a[:, i] - STATISTICS["mean"][at]) / STATISTICS["std"][at]
    s = torch.tensor([[((yaw + 180) % 360 - 180) / 180, pitch / 90] for yaw, pitch in states])
    features, first = context.features[None], len(context.features)
    for _ in range(len(actions)):
        steps = features.shape[1]
        with torch.no_grad():
            predicted = model.predict(features, a[None, :steps].float(), s[None, :steps].float())
        features = torch.cat([features, predicted[:, -1:]], dim=1)
    return features[0, first:]


@pytest.mark.parametrize("space, steps", [("vpt-38", 3), ("vpt-13", 1), (["mouse_dx", "key.w"], 2), (["key.w"], 2)])
def test_rollouts_equal_a_plain_loop_in_parts_and_at_once(space, steps):
    """Also for spaces without yaw_delta: the view goes by the mouse, or stands still."""
    model, processor = make_model(space), make_processor(space)
    context = make_context(model, processor, steps)
    search = SearchSpace(space, statistics=STATISTICS)
    pitch = float(context.states[-1, 1])
    decisions = search.sample(search.initial(3), 7, seeded())
    actions = search.complete(decisions, pitch=pitch, slot=context.slot)
    whole = Imagination(model, processor, context)
    rolled = whole.rollout(actions)
    for candidate, found in zip(actions, rolled, strict=True):
        expected = imagined_by_hand(model, processor, context, candidate)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (rolled - rolled[:1]).abs().max() > 1e-3  # the candidates differ
    sizes = []

    def cost(features, raw):
        sizes.append(len(features))
        assert raw.shape == (len(features), 3, 38)
        return (features**2).mean(dim=(1, 2, 3)) + raw[:, 0, 2]

    at_once = whole.costs(actions, cost)
    parts = Imagination(model, processor, context, max_batch_tokens=3 * (TOKENS + 2) + 1).costs(actions, cost)
    assert sizes == [7, 3, 3, 1]
    torch.testing.assert_close(parts, at_once, rtol=1e-5, atol=1e-5)
    assert at_once.dtype == torch.float64
    with pytest.raises(ValueError, match="max_batch_tokens must be at least 6, a step of one candidate, found 5"):
        Imagination(model, processor, context, max_batch_tokens=5)


def test_goal_cost_by_hand():
    features = torch.randn(3, 4, 2, 5, generator=seeded())
    goals = torch.randn(4, 2, 5, generator=seeded(1))
    for goal, steps, discount in [
        (goals[0], None, 1.0),
        (goals[0], "mean", 0.5),
        (goals, None, 0.9),
        (goals, "last", 1.0),
    ]:
        found = GoalCost(goal, steps=steps, discount=discount)(features, torch.zeros(3, 4, 38))
        for m in range(3):
            distances = []
            for h in range(4):
                target = goal if goal.ndim == 2 else goal[h]
                distances.append(sum(abs(float(x)) for x in (features[m, h] - target).flatten()) / 10)
            mean = steps == "mean" or (steps is None and goal.ndim == 3)
            weights = [discount**h if mean else float(h == 3) for h in range(4)]
            expected = sum(w * d for w, d in zip(weights, distances, strict=True)) / sum(weights)
            assert float(found[m]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "goal, kwargs, message",
    [
        (torch.zeros(5), {}, r"\(tokens, width\) or \(steps, tokens, width\), found torch.float32 \(5,\)"),
        (torch.zeros(2, 5, dtype=torch.int64), {}, "found torch.int64"),
        (torch.full((2, 5), math.nan), {}, "the goal has 10 values that are not finite"),
        (torch.zeros(2, 5), dict(steps="first"), "steps must be 'last' or 'mean', found 'first'"),
        (torch.zeros(2, 5), dict(discount=0.0), "discount must be above 0 and finite, found 0.0"),
    ],
)
def test_bad_goals(goal, kwargs, message):
    with pytest.raises(ValueError, match=message):
        GoalCost(goal, **kwargs)


def test_goals_are_encoded_as_tubelets(model, processor):
    frames = make_frames(6, size=32)

    def encode(*chosen):
        return model.encode(processor(videos=[torch.stack(chosen)])["pixel_values_videos"])[0]

    torch.testing.assert_close(encode_goal(model, processor, frames[0]), encode(frames[0], frames[0])[0])
    turned = frames[0].permute(1, 2, 0).numpy()
    torch.testing.assert_close(encode_goal(model, processor, turned), encode(frames[0], frames[0])[0])
    torch.testing.assert_close(encode_goal(model, processor, frames[:2]), encode(frames[0], frames[1])[0])
    torch.testing.assert_close(encode_goal(model, processor, frames), encode(*frames))
    small = make_frames(1, size=16)[0]  # enlarged, as the processor enlarges a clip's
    torch.testing.assert_close(encode_goal(model, processor, small), encode(small, small)[0])
    features = torch.randn(TOKENS, WIDTH)
    assert encode_goal(model, processor, features) is features
    for goal, message in [
        (torch.zeros(TOKENS + 1, WIDTH), rf"goal features must be \({TOKENS}, {WIDTH}\).*found \(5, {WIDTH}\)"),
        (frames[:3], "goal frames must be a multiple of tubelet_size 2 frames, found 3"),
        (torch.zeros(4, 4, dtype=torch.uint8), r"goal frames must be uint8 .*found \(4, 4\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            encode_goal(model, processor, goal)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(states=None), r"a context of 3 steps needs 3 states \(yaw, pitch\), found none"),
        (dict(states=torch.zeros(2, 2)), r"needs states \(3, 2\), found \(2, 2\)"),
        (dict(states=torch.tensor([[0, 0], [0, 0], [0, 91.0]])), r"pitch must be within \[-90, 90\] degrees, found 91"),
        (dict(states=torch.full((3, 2), math.nan)), "the context's states have 6 values that are not finite"),
        (dict(actions=None), r"needs raw actions \(2, 38\), found \(0, 38\)"),
        (dict(actions=torch.zeros(2, 13)), r"needs raw actions \(2, 38\), found \(2, 13\)"),
        (dict(frames=None), "give either frames or features"),
        (dict(frames=None, features=torch.zeros(3, 5, WIDTH)), rf"must be \(steps, 4, {WIDTH}\), found \(3, 5"),
        (dict(frames=make_frames(5)), "context frames must be a multiple of tubelet_size 2 frames, found 5"),
        (dict(slot=9), "slot must be a whole number from 0 to 8, found 9"),
    ],
)
def test_bad_contexts(model, processor, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_context(model, processor, **kwargs)


def test_slot_follows_from_the_last_action(model, processor):
    actions = make_actions(2)
    assert make_context(model, processor, actions=actions).slot == 4
    actions[-1, AT["key.3"]] = 1
    assert make_context(model, processor, actions=actions).slot == 2
    assert make_context(model, processor, actions=actions, slot=np.int64(7)).slot == 7
    assert make_context(model, processor, steps=1, actions=None).slot == 0


# --- plans ------------------------------------------------------------------------------------------------------

SMALL = CEM(iterations=3, candidates=12, elites=4)


def test_plan_is_what_it_says(model, processor):
    context, goal = make_context(model, processor), make_frames(1, seed=7)[0]
    found = plan(model, processor, context, goal, horizon=3, generator=seeded(), method=SMALL)
    again = plan(model, processor, context, goal, horizon=3, generator=seeded(), method=SMALL)
    other = plan(model, processor, context, goal, horizon=3, generator=seeded(1), method=SMALL)
    assert torch.equal(found.actions, again.actions) and found.costs == again.costs
    assert not torch.equal(found.actions, other.actions)
    expected = imagined_by_hand(model, processor, context, found.actions)
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-4)
    distance = float((expected[-1] - encode_goal(model, processor, goal)).abs().mean())
    assert found.cost == pytest.approx(distance, rel=1e-4)
    assert len(found.costs) == 3 and found.costs[-1]["best"] == found.cost
    assert found.costs[-1]["best"] < found.costs[0]["current_mean"]
    torch.testing.assert_close(found.states, integrate_view(context.states[-1], found.actions))
    assert found.states.shape == (4, 2) and (found.states[:, 1] <= 90).all()
    assert found.ticks_per_step == 8 and len(found.to_minerl()) == len(found.to_vpt()) == 24
    assert found.to_vpt()[0]["hotbar"] == context.slot == 4
    parts = plan(model, processor, context, goal, horizon=3, generator=seeded(), method=SMALL, max_batch_tokens=31)
    torch.testing.assert_close(parts.actions, found.actions)


def test_plan_minimises_any_cost(model, processor):
    context = make_context(model, processor, slot=0)

    def cost(features, actions):
        slot = (actions[:, 1, AT["hotbar.6"]] != 1).float()
        return (actions[:, 0, 2] - 10).abs() + slot + actions[:, :, AT["key.w"]].sum(dim=1)

    method = CEM(iterations=15, candidates=64, elites=8)
    found = plan(model, processor, context, cost, horizon=2, generator=seeded(), method=method)
    assert float(found.actions[0, 2]) == pytest.approx(10, abs=0.3)
    assert float(found.actions[0, 0]) == pytest.approx(10 / 0.15, abs=2)
    assert found.actions[0, AT["key.7"]] == 1 and found.actions[1, AT["hotbar.6"]] == 1
    assert found.actions[:, AT["key.w"]].sum() == 0 and found.actions[:, AT["gui_open"]].sum() == 0


def test_a_plan_stops_where_the_view_does(model, processor):
    context = make_context(model, processor)  # pitch 80, 82 and, now, 84 degrees
    found = plan(
        model, processor, context, lambda f, a: -a[:, :, 3].sum(dim=1), horizon=3, generator=seeded(), method=SMALL
    )
    assert float(found.actions[:, 3].sum()) == pytest.approx(6, abs=1e-9)
    torch.testing.assert_close(found.states[:, 1].diff(), found.actions[:, 3])
    assert float(found.states[-1, 1]) == 90


def test_warm_start_is_never_worse_than_the_rest_of_the_plan(model, processor):
    context, goal = make_context(model, processor), make_frames(1, seed=7)[0]
    options = dict(horizon=3, method=SMALL)
    first = plan(model, processor, context, goal, generator=seeded(), **options)
    second = plan(model, processor, context, goal, generator=seeded(4), warm_start=first, shift=0, **options)
    assert second.costs[0]["current_mean"] == pytest.approx(first.cost, rel=1e-5)
    assert second.cost <= first.cost * (1 + 1e-6)


def test_gradients_make_plans_better_and_leave_keys_alone(model, processor):
    context, goal = make_context(model, processor, states=torch.zeros(3, 2)), make_frames(1, seed=7)[0]
    options = dict(horizon=3, method=CEM(iterations=2, candidates=12, elites=4))
    rough = plan(model, processor, context, goal, generator=seeded(), **options)
    with torch.no_grad():  # as users call it
        fine, again = (
            plan(
                model, processor, context, goal, generator=seeded(), refinement=GradientRefinement(steps=12), **options
            )
            for _ in range(2)
        )
    assert fine.cost < 0.97 * rough.cost and torch.equal(fine.actions, again.actions)
    assert len(fine.costs) == 14 and fine.costs[:2] == rough.costs
    expected = imagined_by_hand(model, processor, context, fine.actions)
    distance = float((expected[-1] - encode_goal(model, processor, goal)).abs().mean())
    assert fine.cost == pytest.approx(distance, rel=1e-4)
    torch.testing.assert_close(fine.actions[:, 0] * 0.15, fine.actions[:, 2])
    assert all(p.grad is None for p in model.parameters())
    controller = Controller(
        *(model, processor, goal), horizon=3, generator=seeded(), method=SMALL, refinement=GradientRefinement(steps=2)
    )
    controller.act(make_frames(1), (0, 0))
    assert len(controller.plan.costs) == 5


def test_plans_begin_with_what_was_kept_and_what_is_proposed(model, processor, monkeypatch):
    context, goal = make_context(model, processor), make_frames(1, seed=7)[0]
    space = SearchSpace("vpt-38", statistics=STATISTICS)
    method = ICEM(iterations=2, candidates=16, elites=8, keep_elites=0.5)
    options = dict(horizon=3, method=method, space=space)
    first = plan(model, processor, context, goal, generator=seeded(), **options)
    assert first.elites.shape == (4, 3, space.width) and torch.equal(first.elites[0], first.decisions)
    begun = []

    def watched(evaluate, space, initial, **kwargs):
        begun.append((initial, kwargs["proposals"]))
        return minimize(evaluate, space, initial, **kwargs)

    monkeypatch.setattr(planner, "minimize", watched)
    plan(model, processor, context, goal, generator=seeded(4), warm_start=first, shift=1, **options)
    initial, kept = begun.pop()
    assert torch.equal(space.mode(initial)[:2], first.decisions[1:])
    assert torch.equal(kept[:, :2], first.elites[1:, 1:])
    assert torch.equal(kept[:, 2], space.mode(space.initial(3))[2].expand(3, -1))

    known = space.sample(space.initial(3), 2, seeded(8))
    seen = []

    def propose(*arguments):
        seen.append(arguments)
        return known

    options |= dict(warm_start=first, shift=0, proposals=propose)
    found = plan(model, processor, context, goal, generator=seeded(4), **options)
    initial, candidates = begun.pop()
    assert torch.equal(space.mode(initial), known[0]) and torch.equal(candidates[0], known[1])
    assert torch.equal(candidates[1], first.decisions) and len(candidates) == 5
    assert found.cost <= first.cost * (1 + 1e-6)  # the rest of the earlier plan stays a candidate
    assert seen[0][0] is context and seen[0][2:] == (space, 3)
    torch.testing.assert_close(seen[0][1], encode_goal(model, processor, goal))
    plan(model, processor, context, goal, generator=seeded(4), proposal_mean=False, **options)
    initial, candidates = begun.pop()
    assert torch.equal(space.mode(initial), first.decisions) and torch.equal(candidates[:2], known)
    with pytest.raises(ValueError, match="proposals need a goal's features, found the cost <function"):
        plan(model, processor, context, lambda f, a: a[:, 0, 0], generator=seeded(), **options)
    known = known[:, :2]
    with pytest.raises(ValueError, match=rf"decisions \(P, 3, {space.width}\), found \(2, 2, {space.width}\)"):
        plan(model, processor, context, goal, generator=seeded(), **options)


SMALL_HEAD = {"head_hidden_size": 16, "head_num_hidden_layers": 1, "head_num_attention_heads": 2}


def make_head(model, columns, **kwargs) -> VJEPA2ACForInverseDynamics:
    options = {"action_space": columns, "action_statistics": STATISTICS, **SMALL_HEAD, **kwargs}
    head = VJEPA2ACForInverseDynamics.from_world_model(model, **options).eval()
    with torch.no_grad():  # turns and keys that differ
        for parameter in head.head.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=seeded(3)))
    return head


def test_inverse_dynamics_proposes_what_the_head_tells(model, processor):
    columns = ["mouse_dx", "pitch_delta", "key.w", "key.1", "key.2", "hotbar.0", "hotbar.1"]
    head = make_head(model, columns)
    keys = {c: 0.0 for c in ACTION_COLUMNS if c.startswith(("key.", "mouse.l", "mouse.r", "mouse.m"))}
    for free in ("key.w", "key.1", "key.2"):
        keys.pop(free)
    bounds = {"yaw_delta": (-20, 20), "pitch_delta": (-3, 3)}
    space = SearchSpace("vpt-38", bounds=bounds, fixed=keys)
    assert space.continuous == ["yaw_delta", "pitch_delta"] and space.keys == ["key.w"] and space.numbers == [0, 1, 2]
    context = make_context(model, processor)
    goals = torch.randn(3, TOKENS, WIDTH, generator=seeded(1))

    def by_hand(here, there):
        with torch.no_grad():
            output = head(features=torch.stack([here, there])[None])
        turns = output.continuous[0, 0].double().tolist()
        # The head's columns in its order; mouse in pixels of 0.15 degrees.
        yaw = (turns[0] * 80.0 + 1.0) * 0.15
        pitch = turns[1] * 6.0 + 0.5
        w, one, two = (float(x) > 0 for x in output.binary_logits[0, 0, :3])
        return yaw, pitch, float(w), 1.0 if one else 2.0 if two else 0.0

    def clamp(value, most):
        return max(-most, min(most, value))

    proposals, met = InverseDynamicsProposals(head, model), set()
    for goal in goals:
        yaw, pitch, *pressed = by_hand(context.features[-1], goal)
        met.add(tuple(pressed))
        (one,) = proposals(context, goal, space, 1)
        assert one[0].tolist() == pytest.approx([clamp(yaw, 20), clamp(pitch, 3), *pressed], rel=1e-5)
        evenly, at_once = proposals(context, goal, space, 3)
        share = [clamp(yaw / 3, 20), clamp(pitch / 3, 3), *pressed]
        for step in range(3):
            assert evenly[step].tolist() == pytest.approx(share, rel=1e-5)
            expected = one[0].tolist() if step == 0 else [0.0] * 4
            assert at_once[step].tolist() == pytest.approx(expected, rel=1e-5)
    (chain,) = proposals(context, goals, space, 3)
    for step, (here, there) in enumerate(itertools.pairwise([context.features[-1], *goals])):
        yaw, pitch, *pressed = by_hand(here, there)
        met.add(tuple(pressed))
        assert chain[step].tolist() == pytest.approx([clamp(yaw, 20), clamp(pitch, 3), *pressed], rel=1e-5)
    assert len(met) > 1
    found = plan(
        *(model, processor, context, goals[0]), horizon=1, generator=seeded(), space=space, method=SMALL,
        proposals=proposals,
    )  # fmt: skip
    alone = space.complete(
        proposals(context, goals[0], space, 1), pitch=float(context.states[-1, 1]), slot=context.slot
    )
    cost = Imagination(model, processor, context).costs(alone, GoalCost(goals[0]))
    assert found.costs[0]["current_mean"] == pytest.approx(float(cost[0]), rel=1e-5)


def test_heads_that_do_not_fit(model, processor):
    context, goal = make_context(model, processor), torch.zeros(TOKENS, WIDTH)
    space = SearchSpace("vpt-38", statistics=STATISTICS)
    with pytest.raises(ValueError, match=r"the head tells no \['pitch_delta', .*it tells \['yaw_delta'\]"):
        InverseDynamicsProposals(make_head(model, ["yaw_delta"]), model)(context, goal, space, 1)
    other = make_model()
    with torch.no_grad():
        other.encoder.layernorm.bias.add_(1.0)
    with pytest.raises(ValueError, match=r"another encoder, checksum (\w{8}), the model's (?!\1)\w{8}"):
        InverseDynamicsProposals(make_head(other, ["yaw_delta"]), model)
    InverseDynamicsProposals(make_head(make_model(), ["yaw_delta"]), model)  # the same weights, another copy
    with pytest.raises(ValueError, match="the head's normalize_features is False, the model's True"):
        InverseDynamicsProposals(make_head(make_model(normalize_features=False), ["yaw_delta"]), model)
    with pytest.raises(ValueError, match="the head's config.action_statistics is None"):
        InverseDynamicsProposals(make_head(model, ["yaw_delta"], action_statistics=None), model)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(horizon=0), "horizon must be a whole number from 1 to 3 for a context of 3 steps.*found 0"),
        (dict(horizon=4), "from 1 to 3 for a context of 3 steps and a model of 6 steps, found 4"),
        (dict(generator=None), "generator must be a torch.Generator, found NoneType"),
        (dict(goal=torch.zeros(9, WIDTH)), rf"goal features must be \(4, {WIDTH}\).*found \(9, {WIDTH}\)"),
        (dict(goal=torch.zeros(2, TOKENS, WIDTH)), "a goal for every step must have 3 steps, found 2"),
        (
            dict(goal=GoalCost(torch.zeros(TOKENS + 5, WIDTH))),
            rf"the goal's features must be \({TOKENS}, {WIDTH}\) as the model's are, found \({TOKENS + 5}, {WIDTH}\)",
        ),
        (
            dict(goal=lambda f, a: f.mean(dim=(1, 2))),
            rf"return floating-point numbers \(12,\), found torch.float32 \(12, {WIDTH}\)",
        ),
        (dict(goal=lambda f, a: 3.0), "found float"),
        (dict(goal=lambda f, a: torch.ones(len(f), dtype=torch.int64)), "found torch.int64"),
        (
            dict(goal=lambda f, a: a[:, 0, 0], goal_steps="nonsense"),
            "goal_steps, discount and goal_as_pictures are for goals: .* takes none, found 'nonsense', 1.0 and False",
        ),
        (dict(goal=GoalCost(torch.zeros(TOKENS, WIDTH)), discount=0.5), "takes none, found None, 0.5 and False"),
        (dict(goal=lambda f, a: a[:, 0, 0] / 0), "finite costs, found .* for candidate"),
        (dict(space=SearchSpace("vpt-13", statistics=STATISTICS)), "search space's action space is .*processor's is"),
        (dict(processor=make_processor("vpt-36")), "the model's action_dim is 38, but the processor's .* is 36"),
        (dict(processor=make_processor(list(ACTION_COLUMNS[::-1]))), "the model's action_space is"),
        (dict(processor=make_processor(fps=6)), "20 ticks a second are not a multiple of the processor's fps 6"),
        (dict(model=make_model(state_dim=3)), "states of 2 columns .*state_dim is 3"),
    ],
)
def test_bad_plans(model, processor, change, message):
    arguments = dict(
        model=model,
        processor=processor,
        context=make_context(model, processor),
        goal=make_frames(1)[0],
        horizon=3,
        generator=seeded(),
        method=SMALL,
    )
    with pytest.raises(ValueError, match=message):
        plan(**{**arguments, **change})


def test_models_of_whole_clips_cannot_encode_a_step(processor):
    with pytest.raises(ValueError, match="the model's encoding is 'clip', not 'tubelet'"):
        make_context(make_model(encoding="clip"), processor)


# --- to the game ------------------------------------------------------------------------------------------------


def lines_from_minerl(ticks, state, slots):
    """A VPT log of MineRL's actions: the inverse of the names, by another hand."""
    keys = dict(forward="w", back="s", left="a", right="d", jump="space", sneak="left.shift", sprint="left.control")
    keys |= dict(drop="q", inventory="e", swapHands="f", ESC="escape") | {f"hotbar.{i}": str(i) for i in range(1, 10)}
    (yaw, pitch), lines = state, []
    for tick, slot in zip(ticks, slots, strict=True):
        down = ["key.keyboard." + key for name, key in keys.items() if tick[name]]
        buttons = [i for i, name in enumerate(("attack", "use", "pickItem")) if tick[name]]
        dy, dx = (float(x) / 0.15 for x in tick["camera"])
        lines.append(
            {
                "mouse": {"dx": dx, "dy": dy, "buttons": buttons, "newButtons": []},
                "keyboard": {"keys": down},
                "isGuiOpen": False,
                "hotbar": slot,
                "yaw": yaw,
                "pitch": pitch,
            }
        )
        yaw, pitch = yaw + float(tick["camera"][1]), pitch + float(tick["camera"][0])
    return lines


def aggregate(lines, steps, spec):
    idle = {**lines[-1], "mouse": None, "keyboard": {"keys": []}}
    log = "\n".join(json.dumps(line) for line in [*lines, *[idle] * spec.ticks_per_tubelet])
    recording = parse_recording(log.encode(), "x-y-20260101-000000")
    starts = np.array([0])
    return aggregate_actions(recording, starts, spec)[0, :steps], clip_states(recording, starts, spec)[0]


@given(seed=st.integers(0, 10_000), pitch=st.floats(-90, 90), slot=st.integers(0, 8), steps=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_ticks_aggregate_to_the_same_actions(seed, pitch, slot, steps):
    free = ["key.q", "key.e", "key.escape", "key.right.shift"]
    space = SearchSpace("vpt-38", statistics=STATISTICS, free=free)
    # A step more, in which nothing is pressed: the last view is only known from the tick after it.
    decisions = space.sample(space.initial(steps + 1), 1, seeded(seed))
    decisions[:, -1] = 0
    actions = space.complete(decisions, pitch=pitch, slot=slot)[0]
    state = torch.tensor([170.0, pitch], dtype=torch.float64)
    spec = ClipSpec(frames_per_clip=2 * (steps + 1))
    lines = to_vpt_lines(actions, state)
    assert len(lines) == 8 * (steps + 1)
    found, states = aggregate(lines, steps, spec)
    np.testing.assert_allclose(found, actions[:steps].numpy(), rtol=1e-5, atol=2e-5)
    wrapped = np.stack([(states[:, 0] + 180) % 360 - 180, states[:, 1]], axis=1)
    # All of yaw's turns are the same direction: near +-180 they may differ by one.
    apart = (wrapped - integrate_view(state, actions[:steps]).numpy() + 180) % 360 - 180
    np.testing.assert_allclose(apart, 0, atol=2e-4)

    ticks = to_minerl_action(actions)
    found, _ = aggregate(lines_from_minerl(ticks, state.tolist(), [line["hotbar"] for line in lines]), steps, spec)
    expected = actions[:steps].numpy().copy()
    expected[:, AT["key.right.shift"]] = 0  # MineRL has no name for it
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


def test_ticks_in_detail():
    action = torch.zeros(2, 38)
    action[0, [AT["key.w"], AT["key.3"], AT["mouse.left"], AT["hotbar.1"]]] = 1
    action[1, [AT["key.w"], AT["mouse.left"], AT["mouse.right"], AT["hotbar.2"]]] = 1
    action[0, 2], action[0, 3], action[0, 0] = 10.0, -1.0, 10 / 0.15
    ticks = to_minerl_action(action, ticks_per_step=3)
    assert len(ticks) == 6 and len(to_minerl_action(action[0])) == 8
    np.testing.assert_allclose([t["camera"][1] for t in ticks], [3.333, 3.333, 3.334, 0, 0, 0], atol=1e-9)
    np.testing.assert_allclose([t["camera"][0] for t in ticks], [-0.333, -0.333, -0.334, 0, 0, 0], atol=1e-9)
    assert [t["forward"] for t in ticks] == [1] * 6 and [t["hotbar.3"] for t in ticks] == [1, 0, 0, 0, 0, 0]
    assert [t["use"] for t in ticks] == [0, 0, 0, 1, 1, 1] and len(ticks[0]) == 24
    jump = action.clone()
    jump[1, [AT["hotbar.2"], AT["hotbar.5"]]] = torch.tensor([0.0, 1.0])  # key 3 is pressed, but slot 6 follows
    assert [line["hotbar"] for line in to_vpt_lines(jump, (0, 0), ticks_per_step=3)] == [1, 1, 1, 5, 5, 5]
    lines = to_vpt_lines(action, (5.0, 0.0), ticks_per_step=3)
    assert [line["hotbar"] for line in lines] == [1, 2, 2, 2, 2, 2]
    assert [line["mouse"]["newButtons"] for line in lines] == [[], [], [], [1], [], []]
    assert [line["keyboard"]["newKeys"] for line in lines][:2] == [["key.keyboard.w", "key.keyboard.3"], []]
    assert lines[3]["yaw"] == pytest.approx(15) and lines[3]["pitch"] == pytest.approx(-1)
    gui = torch.zeros(38)
    gui[[AT["gui_open"], AT["mouse_dx"]]] = torch.tensor([1.0, 80.0])
    assert to_minerl_action(gui)[0]["camera"].tolist() == pytest.approx([0, 80 * 0.15 / 8])
    assert to_vpt_lines(gui, (0, 0))[0]["isGuiOpen"] is True and to_vpt_lines(gui, (0, 0))[-1]["yaw"] == 0
    for bad, ticks_per_step, message in [
        (torch.zeros(13), 8, r"actions must be raw, \(38,\) or \(steps, 38\), found \(1, 13\)"),
        (torch.full((38,), math.nan), 8, "actions hold 38 values that are not finite"),
        (torch.zeros(38), 0, "ticks_per_step must be a whole number of at least 1, found 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            to_minerl_action(bad, ticks_per_step=ticks_per_step)


# --- control ----------------------------------------------------------------------------------------------------


def test_controller_plans_from_what_was_seen(model, processor, monkeypatch):
    """Six steps against contexts made from all frames anew, the model encoding two tubelets a step."""
    frames, encoded = make_frames(11, seed=3), []
    encode = VJEPA2ACModel.encode
    monkeypatch.setattr(VJEPA2ACModel, "encode", lambda self, p: (encoded.append(p.shape[1]), encode(self, p))[1])
    goal = make_frames(1, seed=7)[0]
    controller = Controller(
        model,
        processor,
        goal,
        horizon=2,
        generator=seeded(),
        context_steps=3,
        replan_every=2,
        method=SMALL,
    )
    seen_states, done, warm = [], [], []
    planned = planner.plan

    def watched(*args, **kwargs):
        warm.append((kwargs["warm_start"], kwargs["shift"], args[2]))
        return planned(*args, **kwargs)

    monkeypatch.setattr("vjepa_ac_hf.planning.control.plan", watched)
    assert encoded == [2]
    for step in range(6):
        new = frames[:1] if step == 0 else frames[2 * step - 1 : 2 * step + 1]
        state = torch.tensor([5.0 * step, -3.0 * step])
        executed = make_actions(1, seed=step)[0] if step == 3 else None
        before = controller.plan
        action = controller.act(new, state, executed=executed)
        if executed is not None:
            done[-1] = executed
        seen_states.append(state)
        if step % 2 == 0:
            _, shift, context = warm[-1]
            assert warm[-1][0] is before and shift == (2 if step else 0) and len(warm) == step // 2 + 1
            keep = min(3, step + 1)
            now = frames[2 * step]
            video = torch.cat([frames[: 2 * step], torch.stack([now, now])])
            pixels = processor(videos=[video])["pixel_values_videos"]
            torch.testing.assert_close(context.features, encode(model, pixels)[0, -keep:], rtol=1e-4, atol=1e-4)
            assert torch.equal(context.states, torch.stack(seen_states)[-keep:].double())
            assert torch.equal(context.actions, torch.stack([*done, action])[-keep:-1].double())
            assert torch.equal(action, controller.plan.actions[0])
        else:
            assert controller.plan is before and torch.equal(action, before.actions[1])
        done.append(action)
    assert encoded == [2, 2] + [4] * 5
    controller.reset()
    assert controller.plan is None
    controller.act(frames[:1], (0, 0), slot=6)
    assert controller.plan.actions[0, AT["hotbar.6"]] == 1


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(horizon=6), "horizon must be a whole number from 1 to 5 for a context of 1 steps.*found 6"),
        (dict(context_steps=5), "from 1 to 1 for a context of 5 steps and a model of 6 steps, found 2"),
        (dict(context_steps=0), "context_steps must be a whole number of at least 1, found 0"),
        (dict(goal_steps="first"), "steps must be 'last' or 'mean', found 'first'"),
        (dict(goal=make_frames(6)), "a goal for every step must have 2 steps, found 3"),
        (dict(replan_every=3), "replan_every must be a whole number from 1 to the horizon 2, found 3"),
        (dict(space=SearchSpace("vpt-13", statistics=STATISTICS)), "search space's action space is"),
    ],
)
def test_bad_controllers(model, processor, kwargs, message):
    with pytest.raises(ValueError, match=message):
        Controller(model, processor, **{"goal": make_frames(1)[0], "horizon": 2, "generator": seeded(), **kwargs})


def test_what_is_done_to_an_action_leaves_the_plan_alone(model, processor):
    controller = Controller(model, processor, make_frames(1)[0], horizon=2, generator=seeded(), method=SMALL)
    action = controller.act(make_frames(1), (0, 0))
    known = action.clone()
    action[:] = 7.0
    assert torch.equal(controller.plan.actions[0], known)
    controller.act(make_frames(2), (0, 0))
    assert torch.equal(controller._context.actions[0], known)  # what was returned counts as done


def test_bad_observations_change_nothing(model, processor):
    controller = Controller(model, processor, make_frames(1)[0], horizon=1, generator=seeded(), method=SMALL)
    with pytest.raises(ValueError, match=r"frames must be uint8 \(1, 3, .*the one now, found \(2, 3, 40, 40\)"):
        controller.act(make_frames(2), (0, 0))
    with pytest.raises(ValueError, match="nothing was executed before the first call"):
        controller.act(make_frames(1), (0, 0), executed=torch.zeros(38))
    controller.act(make_frames(1), (0, 0))
    for frames, state, kwargs, message in [
        (make_frames(1), (0, 0), {}, r"\(2, 3, height, width\), those since the last call, found \(1, 3, 40, 40\)"),
        (make_frames(2), (0, 0, 0), {}, r"state must be \(yaw, pitch\), shape \(2,\), found \(3,\)"),
        (make_frames(2, size=50), (0, 0), {}, r"frames were \(3, 40, 40\) before, found \(3, 50, 50\)"),
        (make_frames(2), (0, 0), dict(executed=torch.zeros(13)), r"executed must be raw, \(38,\), found \(13,\)"),
        (make_frames(2), (0, 95), {}, "pitch must be within"),
        (make_frames(2), (0, 0), dict(slot=11), "slot must be a whole number from 0 to 8, found 11"),
    ]:
        with pytest.raises(ValueError, match=message):
            controller.act(frames, state, **kwargs)
    assert len(controller._context.features) == 1
    controller.act(make_frames(2), (0, 0))
    assert len(controller._context.features) == 2


# --- landscapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [("yaw_delta", "pitch_delta"), ("mouse_dy", "key.w"), ("hotbar.2", "yaw_delta")])
def test_landscape_equals_a_plain_loop(model, processor, columns):
    context, actions = make_context(model, processor), make_actions(2, seed=4)
    goal = torch.randn(TOKENS, WIDTH, generator=seeded())
    axes = {"yaw_delta": [-8.0, 0, 8, 16], "pitch_delta": [-4.0, 3, 10], "mouse_dy": [-20.0, 20, 60]}
    values = tuple(np.array(axes.get(c, [0.0, 1.0])) for c in columns)
    imagination = Imagination(model, processor, context, max_batch_tokens=30)
    land = energy_landscape(imagination, actions, GoalCost(goal), columns=columns, values=values)
    for i, j in itertools.product(range(len(values[0])), range(len(values[1]))):
        changed = actions.clone()
        for column, value in ((columns[0], values[0][i]), (columns[1], values[1][j])):
            if column == "yaw_delta":
                changed[0, 2], changed[0, 0] = value, value / 0.15
            elif column in ("pitch_delta", "mouse_dy"):
                degrees = value if column == "pitch_delta" else 0.15 * value
                degrees = min(degrees, 90 - float(context.states[-1, 1]))  # the context looks down by 84
                changed[0, 3], changed[0, 1] = degrees, degrees / 0.15
            elif column == "hotbar.2" and value:
                changed[:, AT["hotbar.4"]], changed[:, AT["hotbar.2"]] = 0, 1  # no key selects another one later
            else:
                changed[0, AT[column]] = value
        expected = imagined_by_hand(model, processor, context, changed)[-1]
        assert land.energies[i, j] == pytest.approx(float((expected - goal).abs().mean()), rel=1e-4)
    assert land.energies.std() > 1e-4
    true = imagined_by_hand(model, processor, context, actions)[-1]
    assert land.true_energy == pytest.approx(float((true - goal).abs().mean()), rel=1e-4)
    assert land.true == tuple(float(actions[0, AT[c]]) for c in columns)


def assert_possible(cell: torch.Tensor, pitch: float) -> None:
    """One slot, which number keys select; a view that stands still in a GUI, and else follows the mouse."""
    for mouse, view in (("mouse_dx", "yaw_delta"), ("mouse_dy", "pitch_delta")):
        turned, moved = float(cell[0, AT[view]]), 0.15 * float(cell[0, AT[mouse]])
        if cell[0, AT["gui_open"]]:
            assert turned == 0
        else:
            assert abs((turned - moved + 180) % 360 - 180) < 1e-9
        assert -180 <= turned < 180 and (view == "yaw_delta" or abs(pitch + turned) <= 90)
    slots = [[s for s in range(9) if step[AT[f"hotbar.{s}"]]] for step in cell]
    keys = [[k for k in range(9) if step[AT[f"key.{k + 1}"]]] for step in cell]
    assert all(len(held) == 1 for held in slots)
    for before, pressed, now in zip(slots, keys, slots[1:], strict=False):
        assert now[0] in pressed if pressed else now == before


KINDS = [*MOVE, "key.w", "key.e", "key.2", "key.5", "hotbar.1", "hotbar.4", "gui_open"]


@pytest.mark.parametrize("gui", [0, 1])
def test_every_cell_of_a_landscape_is_a_possible_action(gui):
    recorded = make_actions(4, seed=2)
    recorded[0, AT["gui_open"]] = gui
    recorded[0, 2:4] *= 1 - gui
    recorded[0, [AT["key.2"], AT["key.6"]]] = recorded[1, AT["key.8"]] = 1
    recorded[:, AT["hotbar.4"]] = 0
    recorded[range(4), [AT[f"hotbar.{slot}"] for slot in (4, 1, 7, 7)]] = 1  # 6, then 2, then 8
    assert_possible(recorded, 75.0)
    for columns in itertools.combinations(KINDS, 2):
        if all(c.startswith("hotbar") for c in columns) or columns in (tuple(MOVE[::2]), tuple(MOVE[1::2])):
            continue  # refused by name
        axes = [torch.tensor([-400.0, 0.0, 900.0] if c in MOVE else [0.0, 1.0]).double() for c in columns]
        pairs = torch.cartesian_prod(*axes)
        cells = vary_columns(recorded, dict(zip(columns, pairs.T, strict=True)), pitch=75.0)
        for pair, cell in zip(pairs.tolist(), cells, strict=True):
            assert_possible(cell, 75.0)
            chosen = dict(zip(columns, pair, strict=True))
            assert all(cell[0, AT[c]] == value for c, value in chosen.items() if c not in MOVE), chosen
            if not set(columns) & set(MOVE) and all(recorded[0, AT[c]] == value for c, value in chosen.items()):
                assert torch.equal(cell, recorded)
            assert torch.equal(cell[1:, :4], recorded[1:, :4])


def make_landscape(row: int, column: int, true=(1.0, 4.0)) -> Landscape:
    energies = np.ones((4, 3))
    energies[row, column] = 0
    return Landscape(("yaw_delta", "pitch_delta"), (np.arange(4.0), np.array([0.0, 4, 8])), energies, true, 0.5)


def test_distances_and_summary_by_hand():
    land = make_landscape(3, 0)
    assert land.minimum == (3.0, 0.0) and land.distance == 2.0 and land.rank == pytest.approx(11 / 12)
    np.testing.assert_allclose(land.distances()[:, 1], [1, 0, 1, 2])
    pressed = Landscape(("key.w", "yaw_delta"), (np.array([0.0, 1]), np.arange(3.0)), np.eye(2, 3), (1.0, 1.5), 0.0)
    np.testing.assert_allclose(pressed.distances(), [[2, 2, 2], [1.5, 0.5, 0.5]])
    lands = [make_landscape(3, 0), make_landscape(1, 2), make_landscape(0, 0), make_landscape(0, 0, true=(9.0, 0.0))]
    summary = summarize_landscapes(lands, ["a", "a", "b", "c"], list("xxyz"))
    assert summary["clips"] == 4 and summary["outside_grid"] == 1 and summary["sessions"] == 2
    assert summary["players"] == 2 and summary["interval_unit"] == "session"
    assert summary["within_one_cell"] == pytest.approx(2 / 3) and summary["chance"] == pytest.approx(9 / 12)
    assert summary["best_constant"] == 1.0 and summary["median_distance_cells"] == 1.0
    assert summary["ci95"] == [0.5, 1.0]  # session a: 1 of 2, session b: 1 of 1
    assert summary["rank"] == pytest.approx(11 / 12) and summary["correlation"]["yaw_delta"] is None
    # All other actions are (1, 4), which is not the cell of energy 0: 11 cells are tied with it.
    assert summary["rank_other_actions"] == pytest.approx(5.5 / 12)
    lands = [make_landscape(row, 0, true=(value, 4.0)) for row, value in ((0, 0.0), (1, 3.0), (3, 2.0))]
    summary = summarize_landscapes(lands, ["a"] * 3, ["x"] * 3)
    assert summary["correlation"]["yaw_delta"] == pytest.approx(np.corrcoef([0, 1, 3], [0, 3, 2])[0, 1])
    assert summary["ci95"] is None
    hit = [make_landscape(row, 1, true=(row + 0.2, 5.0)) for row in (0, 2, 2)]  # 2 of the 6 pairs share their cell
    expected = (2 * 11.5 + 4 * 5.5) / 12 / 6
    assert summarize_landscapes(hit, ["a"] * 3, ["x"] * 3)["rank_other_actions"] == pytest.approx(expected)
    empty = summarize_landscapes([make_landscape(0, 0, true=(9.0, 0.0))], ["a"], ["x"])
    assert empty["outside_grid"] == 1 and empty["within_one_cell"] is None
    assert list(empty) == list(summary)


@pytest.mark.parametrize(
    "columns, values, message",
    [
        (("yaw_delta", "yaw_delta"), None, "two different columns, found"),
        (("yaw_delta", "key.z"), None, "unknown action column 'key.z'"),
        (("yaw_delta", "key.w"), None, "the action space lacks 'key.w'"),
        (("yaw_delta", "mouse_dx"), None, "'yaw_delta' and 'mouse_dx' move together"),
        (("yaw_delta", "key.1"), ([0.0], [0.0, 1.0]), "values of 'yaw_delta' must be at least 2, rising in even steps"),
        (("yaw_delta", "key.1"), ([0.0, 1.0, 3.0], [0.0, 1.0]), "rising in even steps"),
    ],
)
def test_bad_landscapes(columns, values, message):
    model, processor = make_model("vpt-13"), make_processor("vpt-13")
    imagination = Imagination(model, processor, make_context(model, processor))
    axes = ([0.0, 1.0], [0.0, 1.0]) if values is None else values
    with pytest.raises(ValueError, match=message):
        energy_landscape(
            imagination,
            make_actions(1),
            GoalCost(torch.zeros(TOKENS, WIDTH)),
            columns=columns,
            values=tuple(np.array(v) for v in axes),
        )


def test_two_slots_cannot_both_vary():
    with pytest.raises(ValueError, match="'hotbar.1' and 'hotbar.2' cannot both vary"):
        landscape.check_columns(("hotbar.1", "hotbar.2"), ACTION_COLUMNS)


def test_search_of_a_landscape_finds_the_lowest_point_of_a_fine_grid(model, processor):
    imagination, actions = Imagination(model, processor, make_context(model, processor)), make_actions(2)
    # A cost whose lowest point is known, and lies outside of the range on the second axis.
    columns, values = ("yaw_delta", "pitch_delta"), (np.linspace(-20, 20, 5), np.linspace(-4, 4, 5))
    method, generator = CEM(iterations=12, candidates=64), torch.Generator().manual_seed(0)
    seen = []

    def cost(features, candidates):
        seen.append(candidates)
        return (candidates[:, 0, AT["yaw_delta"]] - 7.5).abs() + (candidates[:, 0, AT["pitch_delta"]] - 9).abs()

    plane = {"columns": columns, "values": values, "method": method, "generator": generator}
    assert landscape.search_landscape(imagination, actions, cost, **plane) == pytest.approx(5.0, abs=0.2)
    tried, others = torch.cat(seen), [i for c, i in AT.items() if c not in (*columns, "mouse_dx", "mouse_dy")]
    assert torch.equal(tried[:, 0, others], actions[0, others].float().expand(len(tried), -1))
    assert torch.equal(tried[:, 1], actions[1].float().expand(len(tried), -1))
    torch.testing.assert_close(tried[:, 0, AT["mouse_dx"]], tried[:, 0, AT["yaw_delta"]] / 0.15, rtol=1e-4, atol=1e-3)
    assert tried[:, 0, AT["yaw_delta"]].abs().max() <= 20 and tried[:, 0, AT["pitch_delta"]].abs().max() <= 4
    with pytest.raises(ValueError, match="a search needs two of .*, found \\['yaw_delta', 'key.w'\\]"):
        landscape.search_landscape(imagination, actions, cost, **{**plane, "columns": ["yaw_delta", "key.w"]})


@pytest.fixture
def program(monkeypatch):
    module = load_program("examples/energy_landscape.py")

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["energy_landscape.py", *map(str, arguments)])
        module.main()

    run.module = module
    return run


def test_landscape_program(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    data = write_clips(tmp_path / "clips", train=3, validation=6)
    statistics = json.loads((data / "action_stats.json").read_text())
    make_model(frames_per_clip=16).save_pretrained(tmp_path / "model")
    VJEPA2ACProcessor(resolution=32, action_space="vpt-38", action_statistics=statistics).save_pretrained(
        tmp_path / "model"
    )
    common = ("--model", tmp_path / "model", "--dataset", data, "--output", tmp_path / "out")
    columns = ("--columns", "yaw_delta", "key.w", "--first_range", -30, 30, "--cells", 5)
    program(*common, *columns, "--clips", 4, 1, "--num_pictures", 1)
    record = json.loads((tmp_path / "out" / "landscapes.json").read_text())
    assert [re.match(r"clip (\d)", land["clip"])[1] for land in record["landscapes"]] == ["4", "1"]
    assert record["landscapes"][0]["values"] == [[-30, -15, 0, 15, 30], [0, 1]]
    assert np.array(record["landscapes"][0]["energies"]).shape == (5, 2)
    assert record["summary"]["clips"] == 2 and "within_one_cell: " in capsys.readouterr().out
    assert (tmp_path / "out" / "landscapes.png").read_bytes()[:4] == b"\x89PNG"
    plane = ("--first_range", -30, 30, "--second_range", -5, 5, "--cells", 3, "--num_pictures", 0)
    found = {}
    for goal in ("tubelet", "frame"):
        program(*common, *plane, "--plan", "--goal", goal)
        found[goal] = json.loads((tmp_path / "out" / "landscapes.json").read_text())
    assert found["frame"]["settings"]["goal"] == "frame"
    assert found["frame"]["settings"]["values"] == [[-30, 0, 30], [-5, 0, 5]]
    for here, there in zip(found["frame"]["landscapes"], found["tubelet"]["landscapes"], strict=True):
        # Both frames of these clips' tubelets are the same: that one is shown twice changes nothing.
        np.testing.assert_allclose(here["energies"], there["energies"], rtol=0.05)
        # CEM starts at the middle of the grid and keeps the best.
        assert here["plan_cost"] <= here["energies"][1][1] + 1e-6
    decode = program.module.decode_clip
    monkeypatch.setattr(
        program.module,
        "decode_clip",
        lambda *a: decode(*a) * torch.tensor([1, 0] * 8).to(torch.uint8)[:, None, None, None],
    )
    ends = {}
    for goal in ("tubelet", "frame"):
        program(*common, *plane, "--goal", goal)
        ends[goal] = json.loads((tmp_path / "out" / "landscapes.json").read_text())["landscapes"]
    monkeypatch.setattr(program.module, "decode_clip", decode)
    assert all(a["true_energy"] != b["true_energy"] for a, b in zip(ends["frame"], ends["tubelet"], strict=True))
    turns = [abs(land["true_action"][0]) for land in found["frame"]["landscapes"]]
    least = sorted(turns)[-2]
    program(*common, *plane, "--min_change", least)
    turned = [land["clip"] for land in json.loads((tmp_path / "out" / "landscapes.json").read_text())["landscapes"]]
    names = [land["clip"] for land in found["frame"]["landscapes"]]
    assert turned == [name for name, turn in zip(names, turns, strict=True) if turn >= least] and len(turned) < 6
    for arguments, message in [
        ((*columns, "--clips", 6), "has rows 0 to 5, found 6"),
        ((*columns, "--plan"), "--plan needs two columns of .*found \\['yaw_delta', 'key.w'\\]"),
        ((*plane, "--min_change", 500), "--min_change 500.0: yaw_delta changes by at most"),
        ((*columns, "--recordings", "nobody"), "has no recording 'nobody'"),
        (("--columns", "yaw_delta", "key.w", "--second_range", 0, 1), "'key.w' is 0 or 1 and takes no range"),
        (("--first_range", 3, 3), "range of 'yaw_delta' must rise, found 3.0 to 3.0"),
        (("--context_steps", 8), "horizon must be a whole number from 1 to 0"),
        ((), "range of 'pitch_delta' must rise, found 0.0 to 0.0"),  # constant in this data set
    ]:
        with pytest.raises(ValueError, match=message):
            program(*common, *arguments)


def test_the_package_does_not_import_planning():
    source = ROOT / "src"
    for file in sorted((source / "vjepa_ac_hf").rglob("*.py")):
        package = ".".join(file.relative_to(source).parent.parts)
        if package in (
            "vjepa_ac_hf.planning",
            "vjepa_ac_hf.labelling",
            "vjepa_ac_hf.app",
        ):  # which write logs, and plan
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            found = []
            if isinstance(node, ast.Import):
                found = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                found = [module, *(f"{module}.{name.name}" for name in node.names)]
            assert not any(name.startswith("vjepa_ac_hf.planning") for name in found), f"{file}: {found}"


@pytest.mark.parametrize("fps, ticks", [(5, 8), (2.5, 16), (20, 2), (10.0, 4)])
def test_a_step_lasts_as_many_ticks_as_its_rate_says(fps, ticks):
    assert planner.ticks_per_step(SimpleNamespace(native_fps=20, fps=fps, tubelet_size=2)) == ticks
