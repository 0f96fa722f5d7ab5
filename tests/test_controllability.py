"""Controllability: figures against loops, a world whose rollouts err as planted, real heads through evaluate.py."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_clips import write_clips
from helpers_training import evaluation_program
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hub_push import small_parts
from test_modeling import tiny_model
from transformers import AutoModel

from vjepa_ac_hf import (
    ACTION_COLUMNS,
    ActionStatistics,
    VJEPA2ACForActionAnticipation,
    VJEPA2ACForInverseDynamics,
    VJEPA2ACProcessor,
)
from vjepa_ac_hf.evaluation import (
    ControllabilityMetric,
    ControllabilityTally,
    controllability_figures,
    evaluate_controllability,
    load_inverse_dynamics,
)
from vjepa_ac_hf.evaluation.clips import ClipRecords
from vjepa_ac_hf.evaluation.controllability import headline_figures
from vjepa_ac_hf.evaluation.controllability_figures import KINDS, camera_bins
from vjepa_ac_hf.evaluation.runs import flatten
from vjepa_ac_hf.loading.clips import decode_clip, load_clips

PLACE = {column: i for i, column in enumerate(ACTION_COLUMNS)}
KEYS = ACTION_COLUMNS[4:]
GROUPS = {
    "forward_back": ["key.w", "key.s"],
    "left_right": ["key.a", "key.d"],
    "jump": ["key.space"],
    "sneak_sprint": ["key.left.shift", "key.left.control"],
    "attack": ["mouse.left"],
    "use": ["mouse.right"],
    "drop": ["key.q"],
    "slots": ["key.1", "key.2", "key.3", "key.4", "key.5", "key.6", "key.7", "key.8", "key.9"],
    "slot_held": [f"hotbar.{i}" for i in range(9)],
}


# --- the same figures in plain loops --------------------------------------------------------------------------------


def f1_of(pairs):
    """(told, pressed) pairs -> F1, precision, recall; None where nothing is pressed."""
    if not any(pressed for _, pressed in pairs):
        return None
    right = sum(1 for told, pressed in pairs if told and pressed)
    wrong = sum(1 for told, pressed in pairs if told and not pressed)
    missed = sum(1 for told, pressed in pairs if pressed and not told)
    precision = right / (right + wrong) if right + wrong else None
    return {"f1": right / (right + (wrong + missed) / 2), "precision": precision, "recall": right / (right + missed)}


def brute(told, given_, before, columns):
    """Figures of rows (lists of numbers by column name), without the code under test."""

    def pairs(names, onsets):
        found = []
        for row in range(len(told)):
            for name in names:
                i = columns.index(name)
                if name.startswith("hotbar."):
                    slots = [columns.index(f"hotbar.{n}") for n in range(9)]
                    if not any(given_[row][s] for s in slots):
                        continue
                    if onsets and not any(before[row][s] == 1 for s in slots):
                        continue
                if onsets and before[row][i] != 0:
                    continue
                found.append((told[row][i] == 1, given_[row][i] == 1))
        return found

    keys = [c for c in columns if c in KEYS]
    figures = {}
    figures["keys"] = {c: (f1_of(pairs([c], False)), f1_of(pairs([c], True))) for c in keys}
    groups = {name: [c for c in of if c in columns] for name, of in GROUPS.items()}
    figures["groups"] = {g: (f1_of(pairs(of, False)), f1_of(pairs(of, True))) for g, of in groups.items()}
    for name, at in (("macro_f1", 0), ("macro_onset_f1", 1)):
        some = [f[at]["f1"] for f in figures["keys"].values() if f[at] is not None]
        figures[name] = sum(some) / len(some) if some else None
    figures["camera"] = {}
    for c in columns:
        if c in ACTION_COLUMNS[:4]:
            i = columns.index(c)
            errors = [told[r][i] - given_[r][i] for r in range(len(told))]
            if c == "yaw_delta":
                errors = [(e + 180) % 360 - 180 for e in errors]
            mean = sum(row[i] for row in given_) / len(given_)
            spread = sum((row[i] - mean) ** 2 for row in given_)
            r2 = 1 - sum(e * e for e in errors) / spread if spread > 1e-9 else None
            figures["camera"][c] = {"mae": sum(map(abs, errors)) / len(errors), "r2": r2}
    return figures


def check(found, expected):
    for part in ("keys", "groups"):
        assert found[part].keys() == expected[part].keys()
        for name, (pressed, onset) in expected[part].items():
            own = found[part][name]
            assert (own is None) == (pressed is None), name
            if pressed is None:
                continue
            assert {k: own[k] for k in pressed} == pytest.approx(pressed), name
            assert (own["onset"] is None) == (onset is None), name
            if onset is not None:
                assert {k: own["onset"][k] for k in onset} == pytest.approx(onset), name
    for name in ("macro_f1", "macro_onset_f1"):
        assert found[name]["mean"] == pytest.approx(expected[name])
    for column, values in expected["camera"].items():
        for name, value in values.items():
            own = found["camera"][column][name]["mean"]
            assert own is None if value is None else own == pytest.approx(value, rel=1e-6, abs=1e-9), (column, name)


def random_actions(rng, shape):
    """Raw actions `(*shape, 38)`: turns, keys that are sometimes down, a slot that is sometimes not known."""
    actions = np.zeros((*shape, 38))
    actions[..., :4] = rng.normal(0, 20, (*shape, 4)).round(2)
    actions[..., 2] = rng.uniform(-180, 179, shape).round(2)  # errors go around the circle
    actions[..., 4:28] = rng.random((*shape, 24)) < 0.35
    slot = rng.integers(-1, 9, shape)
    for n in range(9):
        actions[..., PLACE[f"hotbar.{n}"]] = slot == n
    actions[..., PLACE["key.q"]] = 0
    return actions


def rows_of(told, given_, before, kind="imagined", horizon=1, units=3):
    players = [f"p{i % units}" for i in range(len(told))]
    rows = {"session_id": players, "player_id": players, "horizon": [horizon] * len(told)}
    return {**rows, "kind": [kind] * len(told), "told": told, "given": given_, "before": before}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.sampled_from([ACTION_COLUMNS, ACTION_COLUMNS[:13]]))
def test_figures_are_those_of_loops(seed, count, columns):
    rng = np.random.default_rng(seed)
    told, pressed, before = (random_actions(rng, (count,))[:, : len(columns)] for _ in range(3))
    before[rng.random(count) < 0.2] = np.nan
    found = controllability_figures(rows_of(told, pressed, before), list(columns), 8, draws=0)
    (at,) = found["horizons"]
    assert at["horizon"] == 1 and at["clips"] == count
    check(at["kinds"]["imagined"], brute(told.tolist(), pressed.tolist(), before.tolist(), list(columns)))
    assert all(at["kinds"][kind] is None and kind in at["reasons"] for kind in KINDS if kind != "imagined")


def test_batches_and_their_order_do_not_matter():
    rng = np.random.default_rng(0)
    told, pressed, before = (random_actions(rng, (30,)) for _ in range(3))
    whole = controllability_figures(rows_of(told, pressed, before), ACTION_COLUMNS, 8, seed=3)
    players = [f"p{i % 3}" for i in range(30)]
    tally = ControllabilityTally(ACTION_COLUMNS, players, players, ticks_per_action=8)
    for part in np.array_split(rng.permutation(30), 4):
        tally.add(part, 1, "imagined", told[part], pressed[part], before[part])
    kinds, expected = tally.figures(seed=3)[0]["kinds"]["imagined"], whole["horizons"][0]["kinds"]["imagined"]
    assert json.dumps(kinds["keys"]) == json.dumps(expected["keys"])
    assert kinds["camera"]["yaw_delta"]["r2"]["mean"] == pytest.approx(expected["camera"]["yaw_delta"]["r2"]["mean"])


def test_mineworlds_figures():
    """Exclusive classes; macro means over the classes that occur, the none among them, a rate of nothing being 0."""
    rng = np.random.default_rng(1)
    told, pressed = random_actions(rng, (60,)), random_actions(rng, (60,))
    found = controllability_figures(rows_of(told, pressed, pressed), ACTION_COLUMNS, 8, draws=0)
    found = found["horizons"][0]["kinds"]["imagined"]["mineworld"]

    def classes(actions, first, second):
        return [{(1, 0): 1, (0, 1): 2}.get((int(a[PLACE[first]]), int(a[PLACE[second]])), 0) for a in actions]

    pairs = {"forward_back": ("key.w", "key.s"), "left_right": ("key.a", "key.d")}
    pairs["sneak_sprint"] = ("key.left.shift", "key.left.control")
    single = {"use": "mouse.right", "attack": "mouse.left", "jump": "key.space"}
    labels = {task: (classes(pressed, *of), classes(told, *of)) for task, of in pairs.items()}
    labels |= {task: (pressed[:, PLACE[key]], told[:, PLACE[key]]) for task, key in single.items()}
    assert found["tasks"]["drop"] is None  # never pressed
    assert found["tasks"].keys() == {*labels, "drop"}

    def macro(true, said):
        """F1, precision and recall as scikit-learn's with average="macro", zero_division=0."""
        rates = []
        for label in {*true, *said}:
            right = sum(t == s == label for t, s in zip(true, said, strict=True))
            told, present = list(said).count(label), list(true).count(label)
            precision, recall = right / told if told else 0.0, right / present if present else 0.0
            rates.append((2 * right / (told + present), precision, recall))
        return dict(zip(("f1", "precision", "recall"), np.mean(rates, axis=0), strict=True))

    expected = {task: macro(*both) for task, both in labels.items()}
    for task in labels:
        assert found["tasks"][task] == pytest.approx(expected[task]), task
    for name in ("f1", "precision", "recall"):
        assert found[name] == pytest.approx(np.mean([rates[name] for rates in expected.values()]))

    def bin_of(degrees):
        x = max(-10.0, min(10.0, degrees / 8)) / 10
        return round((math.copysign(math.log(1 + 10 * abs(x)) / math.log(11), x) * 10 + 10) / 2)

    gaps = [abs(bin_of(told[r, c]) - bin_of(pressed[r, c])) for r in range(60) for c in (2, 3)]
    assert found["camera_bins"] == pytest.approx(np.mean(gaps))
    assert camera_bins(np.array([-50.0, 0, 10, 50])).tolist() == [0, 5, 10, 10]


def test_intervals_are_those_of_resampled_players():
    """Every draw of players is a data set of its own, judged by the loops; percentiles of those."""
    rng = np.random.default_rng(2)
    told, pressed, before = (random_actions(rng, (40,)) for _ in range(3))
    players = np.array([f"p{i % 11:02d}" for i in range(40)])
    rows = rows_of(told, pressed, before) | {"player_id": players.tolist()}
    found = controllability_figures(rows, ACTION_COLUMNS, 8, draws=60, seed=5)
    assert found["interval_unit"] == "player"
    kinds = found["horizons"][0]["kinds"]["imagined"]
    names = np.unique(players)
    picks = torch.randint(len(names), (60, len(names)), generator=torch.Generator().manual_seed(5)).numpy()
    drawn = []
    for pick in picks:
        at = np.concatenate([np.flatnonzero(players == names[p]) for p in pick])
        of = brute(told[at].tolist(), pressed[at].tolist(), before[at].tolist(), list(ACTION_COLUMNS))
        drawn.append((of["macro_f1"], of["groups"]["left_right"][1]["f1"], of["camera"]["yaw_delta"]["r2"]))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    intervals = (
        kinds["macro_f1"]["ci95"],
        kinds["groups"]["left_right"]["onset"]["ci95"],
        kinds["camera"]["yaw_delta"]["r2"]["ci95"],
    )
    for i, interval in enumerate(intervals):
        assert interval == pytest.approx([low[i], high[i]]), i
    # Over several runs (evaluation/runs.py) each figure keeps the interval that is its own.
    own = {name: interval for name, _, interval in flatten({"kinds": kinds})}
    assert own["kinds.groups.left_right.onset.f1"] == pytest.approx(intervals[1])
    assert own["kinds.groups.left_right.onset.precision"] is None


def test_what_is_never_pressed_is_null_with_a_reason():
    pressed, told = np.zeros((6, 38)), np.zeros((6, 38))
    pressed[:, PLACE["key.w"]] = told[:, PLACE["key.w"]] = told[:, PLACE["key.s"]] = 1
    found = controllability_figures(rows_of(told, pressed, pressed), ACTION_COLUMNS, 8)["horizons"][0]
    kinds, reasons = found["kinds"]["imagined"], found["reasons"]
    assert kinds["keys"]["key.s"] is None and reasons["key.s"] == "never pressed in 6 actions"
    assert kinds["keys"]["key.w"]["f1"] == 1 and kinds["keys"]["key.w"]["onset"] is None
    assert reasons["key.w onset"] == "never pressed where it was known to be up before (0 actions)"
    assert kinds["groups"]["jump"] is None and "none of its columns is pressed in 6" in reasons["jump"]
    assert kinds["groups"]["forward_back"]["precision"] == 0.5  # its back is told and never pressed
    assert kinds["camera"]["yaw_delta"]["r2"]["mean"] is None and reasons["yaw_delta r2"] == "the same in all 6 actions"
    assert kinds["macro_onset_f1"]["mean"] is None
    json.dumps(found, allow_nan=False)
    found = controllability_figures(rows_of(told[:, 4:13], pressed[:, 4:13], pressed[:, 4:13]), ACTION_COLUMNS[4:13], 8)
    reasons = found["horizons"][0]["reasons"]
    assert reasons["yaw_delta"] == "the action space lacks it" and "has none of ['key.w'" in reasons["forward_back"]


def test_errors_of_rows():
    rows = rows_of(np.zeros((2, 38)), np.zeros((2, 38)), np.zeros((2, 38)))
    with pytest.raises(ValueError, match=r"rows lack the columns \['before'\]"):
        controllability_figures({k: v for k, v in rows.items() if k != "before"}, ACTION_COLUMNS, 8)
    with pytest.raises(ValueError, match=r"kind must be one of .*found 'dreamt'"):
        controllability_figures(rows | {"kind": ["dreamt"] * 2}, ACTION_COLUMNS, 8)
    with pytest.raises(ValueError, match=r"told must be \(rows, columns\) \(2, 13\), found \(2, 38\)"):
        controllability_figures(rows, ACTION_COLUMNS[:13], 8)
    with pytest.raises(ValueError, match=r"told \(imagined, horizon 1\) hold values that are not finite"):
        controllability_figures(rows | {"told": np.full((2, 38), np.nan)}, ACTION_COLUMNS, 8)


def test_metric_equals_the_function(tmp_path):
    rng = np.random.default_rng(4)
    rows: dict = {}
    for horizon in (1, 2):
        for kind in KINDS:
            part = rows_of(*(random_actions(rng, (9,)).tolist() for _ in range(3)), kind=kind, horizon=horizon)
            rows = {name: rows.get(name, []) + values for name, values in part.items()}
    metric = ControllabilityMetric(cache_dir=str(tmp_path))
    for at in (slice(0, 50), slice(50, None)):
        metric.add_batch(**{name: values[at] for name, values in rows.items()})
    found = metric.compute(columns=list(ACTION_COLUMNS), ticks_per_action=8, bootstrap_seed=2)
    assert found == controllability_figures(rows, list(ACTION_COLUMNS), 8, seed=2)


# --- a world whose features say everything, and rollouts that err as planted -----------------------------------------


class World:
    """Features are the sum of the actions so far: `(B, T, 1, 38)`; `err` is what the rollout makes of its actions."""

    device = torch.device("cpu")

    def __init__(self, err=lambda actions: actions):
        self.err = err

    def rollout(self, features, actions, states):
        # Within the context everything is as it was.
        assert torch.equal(features.diff(dim=1)[:, :, 0], actions[:, : features.shape[1] - 1])
        taken = self.err(actions)[:, features.shape[1] - 1 :]
        return features[:, -1:] + taken.cumsum(dim=1)[:, :, None]

    @staticmethod
    def features(actions):
        return torch.cat([torch.zeros_like(actions[:, :1]), actions.cumsum(dim=1)], dim=1)[:, :, None]


class Reader:
    """The perfect head: the difference of two steps is the action."""

    config = SimpleNamespace(action_space=list(ACTION_COLUMNS))

    def __call__(self, features):
        return features.diff(dim=1)[:, :, 0]

    def decode_actions(self, told):
        return {column: told[..., i] for i, column in enumerate(ACTION_COLUMNS)}


class RawProcessor:
    """Actions as they are."""

    action_space = list(ACTION_COLUMNS)
    fps, native_fps, tubelet_size = 5, 20, 2

    def __call__(self, actions, states):
        return {"actions": actions, "states": states}


CLIPS, STEPS = 24, 8


def play(seed=0):
    """Whole numbers, so that sums and differences of float32 are exact; every slot known."""
    actions = random_actions(np.random.default_rng(seed), (CLIPS, STEPS - 1))
    actions[..., :4] = actions[..., :4].round()
    actions[..., 28:37] = np.eye(9)[np.random.default_rng(seed + 1).integers(0, 9, (CLIPS, STEPS - 1))]
    return torch.from_numpy(actions).float()


def evaluate_world(err=lambda actions: actions, context_steps=2, batch=5, actions=None, partners=None):
    actions = play() if actions is None else actions
    names = [f"s{i // 4}" for i in range(CLIPS)]
    records = ClipRecords(names, names, names, actions, torch.zeros(CLIPS, STEPS, 2))
    return evaluate_controllability(
        *(World(err), Reader(), RawProcessor(), World.features(actions).split(batch), records),
        partners=np.roll(np.arange(CLIPS), 1) if partners is None else partners,
        **dict(context_steps=context_steps, horizon=STEPS - context_steps, integrate_states=None, draws=50),
    )


def reference(actions, told, context_steps=2, given_=None, before=None):
    """By horizon, the loops' figures of told actions `(clips, H, 38)`."""
    first = context_steps - 1
    given_ = actions[:, first:] if given_ is None else given_
    before = actions[:, first - 1 : -1] if before is None else before
    each = zip(*(np.moveaxis(v.numpy(), 1, 0) for v in (told, given_, before)), strict=True)
    return [brute(t.tolist(), g.tolist(), b.tolist(), list(ACTION_COLUMNS)) for t, g, b in each]


def test_perfect_rollouts_are_read_perfectly_and_floors_lie_below():
    found, actions = evaluate_world(), play()
    assert found["ticks_per_action"] == 8 and [at["horizon"] for at in found["horizons"]] == [1, 2, 3, 4, 5, 6]
    partners = np.roll(np.arange(CLIPS), 1)
    other = actions[partners, 1:]
    expected = {
        "imagined": reference(actions, actions[:, 1:]),
        "true_features": reference(actions, actions[:, 1:]),
        "persistence": reference(actions, torch.zeros_like(other)),
        "other_actions": reference(actions, other),
        "repeat_last": reference(actions, actions[:, :1].expand_as(other)),
        "other_actions_obeyed": reference(
            *(actions, other), given_=other, before=torch.cat([actions[:, :1], other[:, :-1]], dim=1)
        ),
    }
    for h, at in enumerate(found["horizons"]):
        assert at["clips"] == CLIPS
        for kind, figures in at["kinds"].items():
            check(figures, expected[kind][h])
        means = {kind: figures["macro_f1"]["mean"] for kind, figures in at["kinds"].items()}
        assert means["imagined"] == means["true_features"] == means["other_actions_obeyed"] == 1
        assert means["persistence"] == 0 < means["other_actions"] < 0.6
        assert at["kinds"]["persistence"]["camera"]["yaw_delta"]["r2"]["mean"] <= 0
        assert "key.q" in at["reasons"] and not [name for name in at["reasons"] if "obeyed" in name]
    first = found["horizons"][0]["kinds"]["repeat_last"]
    assert first["macro_onset_f1"]["mean"] == 0 and first["macro_f1"]["mean"] > 0.2


def test_known_shares_of_presses_are_found_again():
    """Half the attacks of the rollout are dropped, and jumps are told in every action: figures by hand."""
    actions = play()
    actions[..., PLACE["mouse.left"]] = 0
    actions[:, 1::2, PLACE["mouse.left"]] = 1  # pressed at horizons 1, 3, 5; up in between
    actions[..., PLACE["key.space"]] = 0
    actions[: CLIPS // 4, :, PLACE["key.space"]] = 1  # held all the time by a quarter

    def err(taken):
        changed = taken.clone()
        changed[1::2, :, PLACE["mouse.left"]] = 0
        changed[..., PLACE["key.space"]] = 1
        return changed

    found = evaluate_world(err, batch=CLIPS, actions=actions)["horizons"]
    attack, jump = (found[2]["kinds"]["imagined"]["groups"][name] for name in ("attack", "jump"))
    assert (attack["precision"], attack["recall"], attack["f1"]) == (1, 0.5, pytest.approx(2 / 3))
    assert attack["onset"]["f1"] == attack["f1"] and attack["onset"]["pressed"] == attack["pressed"] == CLIPS
    assert found[1]["kinds"]["imagined"]["groups"]["attack"] is None
    assert (jump["precision"], jump["recall"], jump["f1"]) == (0.25, 1, pytest.approx(0.4))
    assert jump["onset"] is None
    repeated = found[2]["kinds"]["repeat_last"]["groups"]
    assert repeated["jump"]["f1"] == 1 and repeated["attack"]["f1"] == 0


def shifted(actions):
    return torch.cat([actions[:, :1], actions[:, :-1]], dim=1)


def exchanged(actions):
    """Forward for left."""
    changed = actions.clone()
    w, a = PLACE["key.w"], PLACE["key.a"]
    changed[..., [w, a]] = actions[..., [a, w]]
    return changed


@pytest.mark.parametrize("err", [shifted, exchanged, torch.zeros_like], ids=["late", "wrong group", "persistence"])
def test_planted_faults_are_told(err):
    actions = play()
    found = evaluate_world(err)["horizons"]
    expected = reference(actions, err(actions)[:, 1:])
    for at, wanted in zip(found, expected, strict=True):
        kinds = at["kinds"]
        check(kinds["imagined"], wanted)
        assert kinds["true_features"]["macro_f1"]["mean"] == 1
        if err is exchanged:
            f1 = {name: figures and figures["f1"] for name, figures in kinds["imagined"]["keys"].items()}
            assert f1["key.w"] < 0.8 and f1["key.a"] < 0.8
            assert {v for k, v in f1.items() if k not in ("key.w", "key.a")} == {1.0, None}
            assert kinds["imagined"]["camera"]["yaw_delta"]["mae"]["mean"] == 0
        if err is torch.zeros_like:
            assert kinds["imagined"] == kinds["persistence"]
        if err is shifted:
            assert kinds["imagined"]["macro_f1"]["mean"] < 0.6
            assert kinds["imagined"]["camera"]["pitch_delta"]["r2"]["mean"] < 0
    if err is shifted:  # at horizon 1 a late rollout is the last action repeated, which finds no onsets
        assert found[0]["kinds"]["imagined"] == found[0]["kinds"]["repeat_last"]
        assert found[0]["kinds"]["imagined"]["macro_onset_f1"]["mean"] == 0


def test_a_rollout_that_ignores_its_actions_obeys_no_others():
    """It continues as its own clip did: as good as perfect by its own actions, and told by the other clip's."""
    actions, partners = play(), np.roll(np.arange(CLIPS), 1)
    truth = actions.clone()
    found = evaluate_world(lambda taken: truth[:, : taken.shape[1]], batch=CLIPS)["horizons"]
    for at in found:
        means = {kind: figures["macro_f1"]["mean"] for kind, figures in at["kinds"].items()}
        assert means["imagined"] == means["other_actions"] == 1 > 0.6 > means["other_actions_obeyed"]
    assert not torch.equal(actions, actions[partners])


def test_one_step_of_context_knows_no_action_before():
    found = evaluate_world(context_steps=1)["horizons"]
    first, second = found[:2]
    assert first["kinds"]["repeat_last"] is None and "context_steps 1" in first["reasons"]["repeat_last"]
    assert first["kinds"]["imagined"]["keys"]["key.w"]["onset"] is None
    assert first["kinds"]["imagined"]["macro_onset_f1"] == {"mean": None, "ci95": None}
    assert second["kinds"]["imagined"]["keys"]["key.w"]["onset"]["f1"] == 1


def test_features_of_too_few_or_many_clips():
    actions = play()
    names = [str(i) for i in range(CLIPS)]
    records = ClipRecords(names, names, names, actions, torch.zeros(CLIPS, STEPS, 2))
    how = dict(partners=np.arange(CLIPS)[::-1], context_steps=2, horizon=2, integrate_states=None)
    for features in (World.features(actions)[:-1], torch.cat([World.features(actions)] * 2)):
        with pytest.raises(ValueError, match=rf"records are those of {CLIPS} clips, but features of \d+"):
            evaluate_controllability(World(), Reader(), RawProcessor(), features.split(7), records, **how)


# --- heads of this package, through the program ----------------------------------------------------------------------

SMALL = {"head_hidden_size": 32, "head_num_hidden_layers": 1, "head_num_attention_heads": 2}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("controllability")
    write_clips(folder / "clips", train=0, validation=6)
    world = tiny_model(action_space="vpt-13", action_dim=None)
    statistics = ActionStatistics().update(np.random.default_rng(0).normal(0, 8, (50, 38))).to_dict()
    processor = VJEPA2ACProcessor(resolution=32, action_statistics=statistics)
    torch.manual_seed(2)
    head = VJEPA2ACForInverseDynamics.from_world_model(world, action_statistics=statistics, **SMALL)
    head.config.key_thresholds = [0.05 * i - 0.2 for i in range(9)]
    for saved, name in ((world, "world"), (head, "head"), (processor, "world"), (processor, "head")):
        saved.save_pretrained(folder / name)
    return folder


@pytest.fixture
def evaluate(monkeypatch, workspace):
    return evaluation_program(monkeypatch, workspace, 0)


def test_program_reads_what_loops_over_clips_read(evaluate, workspace, tmp_path):
    metrics = evaluate(tmp_path, "--inverse_dynamics", workspace / "head")
    world, head = (AutoModel.from_pretrained(workspace / name).eval() for name in ("world", "head"))
    processor = VJEPA2ACProcessor.from_pretrained(workspace / "world")
    columns = processor.action_space
    rows = list(load_clips(str(workspace / "clips"), "validation"))
    told: dict[str, list] = {"imagined": [], "true_features": [], "persistence": []}
    for row in rows:
        frames = decode_clip(row["video"], "clip", 16)
        with torch.no_grad():
            features = world.encode(processor(videos=frames)["pixel_values_videos"])
            inputs = processor(actions=np.array(row["actions"])[None], states=np.array(row["states"])[None, :2])
            states = processor.integrate_states(inputs["states"], inputs["actions"])
            imagined = world.rollout(features[:, :2], inputs["actions"], states)
            fed = {
                "imagined": torch.cat([features[:, 1:2], imagined], dim=1),
                "true_features": features[:, 1:],
                "persistence": features[:, 1:2].repeat(1, 7, 1, 1),
            }
            for kind, steps in fed.items():
                pairs = [head.decode_actions(head(features=steps[:, i : i + 2])) for i in range(6)]
                told[kind].append([[float(pair[c][0, 0]) for c in columns] for pair in pairs])
    raw = np.array([row["actions"] for row in rows])[..., [PLACE[c] for c in columns]]
    for h, at in enumerate(metrics["controllability"]["horizons"]):
        assert at["clips"] == 6
        for kind, values in told.items():
            expected = brute([v[h] for v in values], raw[:, h + 1].tolist(), raw[:, h].tolist(), list(columns))
            for column, wanted in expected["camera"].items():
                found = at["kinds"][kind]["camera"][column]
                assert found["mae"]["mean"] == pytest.approx(wanted["mae"], rel=1e-3)
        assert at["reasons"]["key.1"] == "never pressed in 6 actions"
        assert at["kinds"]["other_actions"]["camera"]["yaw_delta"] != at["kinds"]["imagined"]["camera"]["yaw_delta"]
    assert metrics["inverse_dynamics"] == str(workspace / "head")
    assert metrics["controllability"]["ticks_per_action"] == 8
    page = (tmp_path / "report.html").read_text()
    yaw = next(r for r in headline_figures(metrics["controllability"]) if r["figure"] == "yaw error")
    assert "<h2>Controllability</h2>" in page and f"{yaw['imagined']['mean']:.3f}<small>" in page


def test_without_a_head_nothing_is_read(evaluate, tmp_path):
    metrics = evaluate(tmp_path)
    assert "controllability" not in metrics and "inverse_dynamics" not in metrics
    assert "Controllability" not in (tmp_path / "report.html").read_text()


def test_heads_that_do_not_fit_are_refused(workspace, tmp_path):
    world = AutoModel.from_pretrained(workspace / "world")
    processor = VJEPA2ACProcessor.from_pretrained(workspace / "world")
    statistics = processor.action_statistics

    def save(name, model, kind=VJEPA2ACForInverseDynamics, **fields):
        kind.from_world_model(model, **{"action_statistics": statistics, **fields}, **SMALL).save_pretrained(
            tmp_path / name
        )
        return str(tmp_path / name)

    other = tiny_model(action_space="vpt-13", action_dim=None)
    for parameter in other.encoder.parameters():
        parameter.data += 0.01
    anticipation = save("anticipation", world, VJEPA2ACForActionAnticipation)
    for name, message in (
        (save("encoder", other), r"trained on another encoder, checksum \w{8}, the model's \w{8}"),
        (save("space", world, action_space="vpt-36"), r"head's action_space is \['mouse_dx.*, the model's \['mouse_dx"),
        (save("predictor", world, features_from="predictor"), "features_from is 'predictor', expected 'encoder'"),
        (save("statistics", world, action_statistics=None), "action_statistics is None"),
        (save("grid", tiny_model(frame_size=[32, 48], action_space="vpt-13", action_dim=None)), r"grid is \(2, 3\)"),
        (anticipation, r"expected .*\(vjepa2_ac_inverse_dynamics\), found vjepa2_ac_action_anticipation"),
        (str(workspace / "world"), r"expected .*\(vjepa2_ac_inverse_dynamics\), found vjepa2_ac$"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_inverse_dynamics(name, world, processor)
        assert str(error.value).startswith(name)
    head = load_inverse_dynamics(str(workspace / "head"), world, processor)
    assert head.vjepa2_ac.encoder is world.encoder and not head.training


def test_figures_are_on_the_card_of_the_very_weights(evaluate, workspace, tmp_path):
    """The table of an evaluation of these weights, and the head's name without its folder; none of other weights."""
    parts = small_parts()
    metrics = evaluate(tmp_path / "evaluation", "--inverse_dynamics", workspace / "head")
    texts = parts[2].texts(tmp_path, 40, metrics["weights_sha256"])
    rows = {(r["horizon"], r["figure"]): r for r in headline_figures(metrics["controllability"])}
    cells = []
    for horizon in (1, 6):
        for figure, label in (("yaw error", "yaw error (degrees)"), ("onsets, macro F1", "onsets, macro F1")):
            kinds = ("imagined", "true_features", "persistence", "other_actions")
            means = [rows[horizon, figure][kind]["mean"] for kind in kinds]
            cells.append(
                f"| {horizon} | {label} | " + " | ".join("-" if m is None else f"{m:.3f}" for m in means) + " |\n"
            )
    card = texts["README.md"].decode()
    assert all(line in card for line in cells) and "| 2 | yaw" not in card and "| 6 | pitch R2 |" in card
    assert "|---:|---|---:|---:|---:|---:|\n| 1 | keys, macro F1 |" in card and "\n\n## Limits\n" in card
    assert json.loads(texts["evaluation/metrics.json"])["inverse_dynamics"] == "head"
    assert str(workspace) not in "".join(text.decode() for text in texts.values())
    assert "Controllability" not in parts[2].texts(tmp_path, 40, "0" * 64)["README.md"].decode()
