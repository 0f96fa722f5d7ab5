"""Validation during training against loops in numpy, against examples/evaluate.py, and over two real processes."""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers_clips import FEATURES, clip_row, write_clips
from helpers_training import load_program
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import VJEPA2Config

from vjepa_ac_hf import ACTION_SPACES, VJEPA2ACConfig, VJEPA2ACModel, VJEPA2ACProcessor
from vjepa_ac_hf.evaluation import ActionSensitivityMetric, RetrievalMetric, clips, probes
from vjepa_ac_hf.loading.clips import load_clips
from vjepa_ac_hf.training import distributed, validation
from vjepa_ac_hf.training.validation import ValidationSet, validate

ROOT = Path(__file__).resolve().parents[1]
CLIPS = 19  # two retrieval groups, of 10 and 9; odd, so that no batch size divides it
CONTEXT, HORIZON = 2, 6


def make_processor(folder: Path, action_space="vpt-38") -> VJEPA2ACProcessor:
    statistics = json.loads((folder / "action_stats.json").read_text())
    return VJEPA2ACProcessor(resolution=32, action_space=action_space, action_statistics=statistics)


def make_model(action_space="vpt-38") -> VJEPA2ACModel:
    torch.manual_seed(0)
    encoder = VJEPA2Config(crop_size=32, patch_size=16, hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    encoder.initializer_range = 0.3  # actions must move predictions by more than rounding does
    columns = list(ACTION_SPACES[action_space]) if isinstance(action_space, str) else action_space
    sizes = {"pred_hidden_size": 24, "pred_num_hidden_layers": 2, "pred_num_attention_heads": 2}
    config = VJEPA2ACConfig(encoder_config=encoder, action_space=columns, initializer_range=0.3, **sizes)
    return VJEPA2ACModel(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Clips whose hotbar slots differ from clip to clip, their keys in one action or not at all; none has a GUI."""
    folder = write_clips(tmp_path_factory.mktemp("validation") / "clips", train=3, validation=0)
    rng = np.random.default_rng(1)
    rows = [clip_row(rng, 1 + i // 3, i % 3) for i in range(CLIPS)]
    for i, row in enumerate(rows):
        row["actions"][:, 4:28] = 0
        row["actions"][i % 7, 4:28] = (rng.random(24) < 0.2) * (i % 3 > 0)
        row["actions"][:, 28 + i % 2] = 1
    datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(folder / "data/validation-00000-of-00001.parquet")
    return folder


def validation_set(folder: Path, accelerator=None, **options) -> ValidationSet:
    source = load_clips(str(folder), "validation")
    processor = make_processor(folder)
    return ValidationSet(
        source, source, processor, accelerator or Accelerator(cpu=True), **{"batch_size": 4, **options}
    )


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def figures(folder, accelerator):
    return validate(make_model(), validation_set(folder, accelerator), accelerator)


# --- against loops written down from docs/evaluation.md -----------------------------------------------------------


def rollout_by_hand(model, processor, features, raw, states):
    """`(H, N, D)` of one clip without a cache; the states follow from the actions given."""
    yaw, pitch = states[CONTEXT - 1]
    known = [tuple(s) for s in states[:CONTEXT]]
    for action in raw[CONTEXT - 1 :]:
        yaw, pitch = yaw + action[2], min(max(pitch + action[3], -90), 90)
        known.append((yaw, pitch))
    actions, states = processor.normalize_actions(raw)[None], processor.normalize_states(np.array(known))[None]
    prefix = list(features[:CONTEXT])
    for _ in range(HORIZON):
        steps = len(prefix)
        prefix.append(model.predict(torch.stack(prefix)[None], actions[:, :steps], states[:, :steps])[0, -1])
    return torch.stack(prefix[CONTEXT:]).double().numpy()


@pytest.fixture(scope="module")
@torch.no_grad()
def by_hand(folder):
    """Every figure of `validate`, clip by clip, from the definitions."""
    model, processor = make_model().eval(), make_processor(folder)
    source = load_clips(str(folder), "validation")
    rows = [source[i] for i in range(CLIPS)]
    raw = [np.array(r["actions"], np.float64) for r in rows]
    states = [np.array(r["states"], np.float64) for r in rows]
    features = torch.cat(list(clips.encoded_batches(model, processor, source, [""] * CLIPS, 5)))
    target = features[:, CONTEXT:].double().numpy()
    partner = clips_partners()
    own = [rollout_by_hand(model, processor, features[i], raw[i], states[i]) for i in range(CLIPS)]
    error = np.array([[np.abs(own[i][h] - target[i, h]).mean() for h in range(HORIZON)] for i in range(CLIPS)])
    latest = features[:, CONTEXT - 1].double().numpy()
    still = np.array([[np.abs(latest[i] - target[i, h]).mean() for h in range(HORIZON)] for i in range(CLIPS)])
    found = {}

    def with_columns(i, columns):
        mixed = raw[i].copy()
        mixed[CONTEXT - 1 :, columns] = raw[partner[i]][CONTEXT - 1 :, columns]
        return mixed, rollout_by_hand(model, processor, features[i], mixed, states[i])

    shuffled = np.zeros_like(error)
    for i in range(CLIPS):
        other = with_columns(i, list(range(38)))[1]
        shuffled[i] = [np.abs(other[h] - target[i, h]).mean() for h in range(HORIZON)]
    for h in range(HORIZON):
        found[f"validation_error_h{h + 1}"] = error[:, h].mean()
        found[f"validation_persistence_h{h + 1}"] = still[:, h].mean()
        found[f"validation_persistence_ratio_h{h + 1}"] = error[:, h].mean() / still[:, h].mean()
        found[f"validation_shuffled_ratio_h{h + 1}"] = shuffled[:, h].mean() / error[:, h].mean()
        found[f"validation_win_rate_h{h + 1}"] = np.mean([error[i, h] < shuffled[i, h] for i in range(CLIPS)])

    groups = {"mouse": range(4), "keys": range(4, 28), "hotbar": range(28, 37), "gui": [37]}
    for name, columns in groups.items():
        change = grown = moved = base = pairs = 0
        for i in range(CLIPS):
            mixed, other = with_columns(i, list(columns))
            for h in range(HORIZON):
                if (mixed[CONTEXT - 1 : CONTEXT + h] == raw[i][CONTEXT - 1 : CONTEXT + h]).all():
                    continue
                pairs += 1
                change += np.abs(other[h] - own[i][h]).mean()
                grown += np.abs(other[h] - target[i, h]).mean()
                moved += still[i, h]
                base += error[i, h]
        found[f"validation_sensitivity_{name}"] = change / moved if pairs else None
        found[f"validation_shuffled_ratio_{name}"] = grown / base if pairs else None
        found[f"validation_sensitivity_{name}_pairs"] = pairs

    hits, still_hits, chances = [], [], []
    for group in (range(10), range(10, 19)):
        for i in group:
            for guess, hit in ((own[i][0], hits), (latest[i], still_hits)):
                hit.append(min(group, key=lambda j: np.abs(guess - target[j, 0]).mean()) == i)
            chances.append(1 / len(group))
    found["validation_retrieval_top1"] = np.mean(hits)
    found["validation_retrieval_persistence_top1"] = np.mean(still_hits)
    found["validation_retrieval_chance"] = np.mean(chances)

    losses, absolute, changes = [], [], []
    for i in range(CLIPS):
        inputs = processor.normalize_actions(raw[i])[None], processor.normalize_states(states[i])[None]
        output = model(features=features[i : i + 1], actions=inputs[0], states=inputs[1])
        losses.append([output.loss.item(), output.teacher_forcing_loss.item(), output.rollout_loss.item()])
        absolute.append((output.predicted_features[0] - features[i, 1:]).abs().mean().item())
        changes.append((features[i, 1:] - features[i, :-1]).abs().mean().item())
    for name, values in zip(("loss", "teacher_forcing_loss", "rollout_loss"), np.mean(losses, axis=0), strict=True):
        found[f"validation_{name}"] = values
    found |= {"validation_error": np.mean(absolute), "validation_persistence": np.mean(changes)}
    found["validation_error_over_persistence"] = np.mean(absolute) / np.mean(changes)
    return found | {"validation_clips": CLIPS}


def clips_partners() -> list[int]:
    """The first permutation of torch.randperm with seed 0 without a fixed point: what `--seed 0` draws first."""
    generator = torch.Generator().manual_seed(0)
    while True:
        drawn = torch.randperm(CLIPS, generator=generator).tolist()
        if all(i != j for i, j in enumerate(drawn)):
            return drawn


def test_every_figure_equals_plain_loops(figures, by_hand):
    assert figures["validation_null_reason"] == (
        "no clip's gui columns differ from its partner's (validation_sensitivity_gui, validation_shuffled_ratio_gui)"
    )
    # 19 clips, three a player, each of one day: too few players to resample them.
    counts = {"validation_sessions": 7, "validation_players": 7, "validation_interval_unit": "session"}
    assert {name: figures[name] for name in counts} == counts
    found = {k: v for k, v in figures.items() if k not in {"validation_null_reason", *counts}}
    assert found.keys() == by_hand.keys()
    for name, expected in by_hand.items():
        assert found[name] == (None if expected is None else pytest.approx(expected, rel=2e-5)), name
    pairs = {g: figures[f"validation_sensitivity_{g}_pairs"] for g in ("keys", "hotbar", "mouse")}
    assert min(pairs.values()) > 0 and max(pairs["keys"], pairs["hotbar"]) < pairs["mouse"] == CLIPS * HORIZON
    assert figures["validation_retrieval_top1"] not in (0, 1)
    json.dumps(figures, allow_nan=False)


def assert_same(found: dict, expected: dict, rel: float) -> None:
    """Equal names, and equal figures: counts and shares of clips exactly, errors up to rounding."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        errors = isinstance(value, float) and "retrieval" not in name and "win_rate" not in name
        assert found[name] == (pytest.approx(value, rel=rel) if errors else value), name


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_batches_do_not_matter(folder, accelerator, figures, batch_size):
    found = validate(make_model(), validation_set(folder, accelerator, batch_size=batch_size), accelerator)
    assert_same(found, figures, 1e-5)


def test_training_is_not_disturbed(folder, accelerator):
    """Random generators and the model's mode are left alone; a second validation is the first one again."""
    model, clips = make_model(), validation_set(folder, accelerator)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = validate(model.train(), clips, accelerator)
    assert model.training and not model.encoder.training
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert all(p.grad is None for p in model.parameters())
    assert validate(model.eval(), clips, accelerator) == first and not model.training


def test_agrees_with_the_evaluation_program_to_the_digit(folder, accelerator, tmp_path, monkeypatch):
    """The clips of `--eval_clips 10` are those of `--max_clips 10`, and so are all figures by horizon."""
    model, processor = make_model(), make_processor(folder)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    program = {name: load_program(f"examples/{name}.py") for name in ("train", "evaluate")}
    arguments = argparse.Namespace(dataset=str(folder), streaming=False, eval_every=1, eval_clips=10, clip_rule=None)
    _, source = program["train"].load_splits(arguments, processor)
    clips = ValidationSet(source, source, processor, accelerator, batch_size=4)
    found = validate(model, clips, accelerator)
    paths = [f"--{k}={v}" for k, v in {"model": tmp_path / "model", "dataset": folder, "output": tmp_path}.items()]
    flags = ["--batch_size=4", "--max_clips=10", "--shuffles=1", "--num_pictures=0", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *paths, *flags])
    program["evaluate"].main()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    retrieval, expected = metrics["retrieval"], metrics["horizons"]
    assert clips.horizons == expected
    for name in ("top1", "persistence_top1", "chance"):
        assert found[f"validation_retrieval_{name}"] == retrieval[name]
    assert (retrieval["clips"], retrieval["group"]) == (10, 8) and len(retrieval["ci95"]["top1"]) == 2
    for h in expected:
        assert found[f"validation_error_h{h['horizon']}"] == h["error"]
        assert found[f"validation_persistence_ratio_h{h['horizon']}"] == h["error_over_persistence"]
        assert found[f"validation_shuffled_ratio_h{h['horizon']}"] == h["shuffled_over_error"]


# --- several processes --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_equal_one(folder, figures, tmp_path, sharded):
    """Two real processes (gloo), of 10 and 9 clips and so of 2 batches and 1; the metrics of `evaluate` likewise."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    environment |= {"ACCELERATE_USE_FSDP": str(sharded).lower(), "FSDP_VERSION": "2"}
    result = subprocess.run(
        [*launcher, __file__, str(folder), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("validation figures without a value") == 1
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["figures"] == ranks[1]["figures"]
    assert_same(ranks[0]["figures"], figures, 1e-5)
    assert ranks[1]["metrics"] == [None, None]
    sensitivity, retrieval = ranks[0]["metrics"]
    rows = metric_rows()
    assert sensitivity["groups"] == probes.aggregate_sensitivity(rows[0])
    assert retrieval == probes.aggregate_retrieval(rows[1])


def metric_rows() -> tuple[dict, dict]:
    rng = np.random.default_rng(5)
    sensitivity = {"group": ["mouse", "keys"] * 15, **{n: rng.random(30).tolist() for n in probes.SENSITIVITY_COLUMNS}}
    sensitivity["differs"] = [float(v > 0.4) for v in sensitivity["differs"]]
    return sensitivity, {"hit": [1.0, 0.0, 0.5, 1.0], "persistence_hit": [0.0, 0.0, 0.0, 1.0], "candidates": [4.0] * 4}


def one_of_two_processes(folder: Path, output: Path) -> None:
    """Validates as training does: with a model that DDP or FSDP2 has prepared."""
    options = {
        "mixed_precision": "no",
        "gradient_accumulation_steps": 1,
        "report_to": "",
        "compile": False,
        "loader_timeout": 9,
    }
    accelerator = distributed.build_accelerator(argparse.Namespace(**options, output_dir=output))
    assert accelerator.is_fsdp2 == (os.environ["ACCELERATE_USE_FSDP"] == "true") and accelerator.num_processes == 2
    rank, model = accelerator.process_index, make_model()
    distributed.prepare(accelerator, model, torch.optim.SGD(model.predictor.parameters(), 0.1), model.encoder)
    clips = validation_set(folder, accelerator, batch_size=9)
    with distributed.whole_parameters(model):
        found = validate(model, clips, accelerator)
    results = []
    for metric, rows in zip((ActionSensitivityMetric, RetrievalMetric), metric_rows(), strict=True):
        metric = metric(num_process=2, process_id=rank, experiment_id="two", cache_dir=str(output / "cache"))
        metric.add_batch(**{name: values[rank::2] for name, values in rows.items()})
        results.append(metric.compute())
    (output / f"{rank}.json").write_text(json.dumps({"figures": found, "metrics": results}))
    accelerator.end_training()


@pytest.mark.parametrize("processes", [2, 3])
@torch.no_grad()
def test_every_clip_is_of_one_process(folder, accelerator, processes):
    """The parts that processes measure add up to what one process measures; the third has no clips at all."""
    whole = validation._measure(make_model().eval(), validation_set(folder, accelerator), accelerator)
    parts = []
    for rank in range(processes):
        place = SimpleNamespace(
            process_index=rank, num_processes=processes, device=torch.device("cpu"), is_main_process=False
        )
        place.autocast, place.reduce = accelerator.autocast, lambda tensor, reduction: tensor
        clips = validation_set(folder, place, batch_size=9)
        assert clips.partners.equal(validation_set(folder, accelerator).partners)
        parts.append(validation._measure(make_model().eval(), clips, place))
    for name, values in whole.items():
        if not name.endswith("loss"):  # a mean over a batch, and batches differ
            torch.testing.assert_close(sum(part[name] for part in parts), values, rtol=1e-4, atol=1e-6, msg=name)
    assert sum(part["seen"] for part in parts).tolist() == [1] * CLIPS


@given(count=st.integers(1, 300), size=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_groups_hold_every_clip_once(count, size):
    groups = probes.retrieval_groups(count, size)
    assert [row for group in groups for row in group] == list(range(count))
    sizes = {len(group) for group in groups}
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= min(size, count) and max(sizes) < 2 * size


# --- what has no figure -------------------------------------------------------------------------------------------


def test_values_that_are_not_finite_give_nulls_with_a_reason(folder, accelerator, caplog):
    """Step 5 of clip 3 is broken: it is the target of horizon 4, which no rollout from two steps looks at."""
    source = load_clips(str(folder), "validation")
    features = torch.randn(CLIPS, 8, 4, 24, generator=torch.Generator().manual_seed(0))
    features[3, 5, 0, 0] = torch.nan
    cached = [{**row, "features": features[i]} for i, row in enumerate(source.remove_columns("video"))]
    clips = ValidationSet(cached, source, make_processor(folder), accelerator, batch_size=4)
    found = validate(make_model(), clips, accelerator)
    gone = {name for name, value in found.items() if value is None and "gui" not in name}
    names = {"loss", "teacher_forcing_loss", "error", "persistence", "error_over_persistence"}
    by_horizon = {"error", "persistence", "persistence_ratio", "shuffled_ratio", "win_rate"}
    assert gone >= {f"validation_{n}" for n in names} | {f"validation_{n}_h4" for n in by_horizon}
    assert all(found[f"validation_{n}_h{h}"] is not None for n in by_horizon for h in (1, 3, 5))
    assert found["validation_rollout_loss"] is not None and found["validation_retrieval_top1"] is not None
    json.dumps(found, allow_nan=False)
    reason = found["validation_null_reason"]
    assert "values of 1 of 19 clips are not finite, first of clip 3 (recording toy-0002" in reason
    assert all(name in reason for name in gone)
    validate(make_model(), clips, accelerator)
    assert caplog.text.count("not finite") == 1


def test_groups_without_columns_are_left_out():
    assert probes.column_groups(ACTION_SPACES["vpt-13"]) == {"mouse": [0, 1, 2, 3], "keys": list(range(4, 13))}
    placed = [i for places in probes.column_groups(ACTION_SPACES["vpt-38"]).values() for i in places]
    assert placed == list(range(38))


def test_one_clip_is_refused(folder, accelerator):
    arguments = argparse.Namespace(dataset=str(folder), streaming=False, eval_every=1, eval_clips=1, clip_rule=None)
    with pytest.raises(ValueError, match="2 are needed, found 19 with --eval_clips 1; --eval_every 0"):
        load_program("examples/train.py").load_splits(arguments, make_processor(folder))
    source = load_clips(str(folder), "validation").select([0])
    with pytest.raises(ValueError, match="needs at least 2 clips, found 1"):
        ValidationSet(source, source, make_processor(folder), accelerator, batch_size=1)


def test_ties_and_broken_distances_of_retrieval():
    targets = torch.tensor([0.0, 1.0, 1.0, 5.0]).reshape(4, 1, 1)
    predictions = torch.tensor([0.4, 1.1, 0.9, 0.0]).reshape(4, 1, 1)
    assert probes.retrieval_hits(predictions, targets).tolist() == [1.0, 0.5, 0.5, 0.0]
    targets[3] = torch.nan
    assert probes.retrieval_hits(predictions, targets).isnan().all()


def test_rows_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"rows lack the columns \['hit'\]"):
        probes.aggregate_retrieval({"persistence_hit": [1.0], "candidates": [1]})
    with pytest.raises(ValueError, match="same length, at least 1, found .*'hit': 2"):
        probes.aggregate_retrieval({"hit": [1.0, 0.0], "persistence_hit": [1.0], "candidates": [1]})


if __name__ == "__main__":
    one_of_two_processes(*map(Path, sys.argv[1:]))


def test_intervals_of_retrieval_are_over_players():
    """Twelve players of four clips each, a quarter of whom is always found: quantiles of a binomial share."""
    rng = np.random.default_rng(0)
    players = np.repeat([f"player {i}" for i in range(12)], 4)
    rows = {
        "hit": np.repeat(np.arange(12) % 4 == 0, 4).astype(float),
        "persistence_hit": np.full(48, 0.5),
        "candidates": np.full(48, 8.0),
        "player_id": players,
        "session_id": [f"day {i}" for i in range(48)],
    }
    found = probes.aggregate_retrieval(rows)
    expected = np.percentile(rng.binomial(12, 0.25, 100_000) / 12, [2.5, 97.5])
    assert found["top1"] == 0.25 and found["ci95"]["top1"] == pytest.approx(expected, abs=1e-9)
    assert found["ci95"]["persistence_top1"] == [0.5, 0.5]
    over_clips = probes.aggregate_retrieval({**rows, "player_id": ["one"] * 48})["ci95"]["top1"]
    assert over_clips[1] - over_clips[0] < 0.6 * (expected[1] - expected[0])
    assert probes.aggregate_retrieval({**rows, "hit": [np.nan] * 48})["ci95"] == {
        "top1": None,
        "persistence_top1": None,
    }
    few = {name: values[:4] for name, values in rows.items()}
    assert probes.aggregate_retrieval({**few, "session_id": ["a"] * 4})["ci95"]["top1"] is None
