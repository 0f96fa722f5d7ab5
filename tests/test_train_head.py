"""examples/train_head.py in this process, on moving pictures with a tiny model; labels, groups and weights by hand."""

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_clips import write_clips
from helpers_training import TINY, load_program
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_heads import head
from transformers import AutoModel, AutoModelForVideoClassification, AutoProcessor

from vjepa_ac_hf import (
    ACTION_COLUMNS,
    VJEPA2ACForFrameDecoding,
    VJEPA2ACForInverseDynamics,
    VJEPA2ACForTemporalDistance,
    VJEPA2ACModel,
    VJEPA2ACProcessor,
)
from vjepa_ac_hf.configuration_heads_vjepa2_ac import VJEPA2ACActionAnticipationConfig, VJEPA2ACInverseDynamicsConfig
from vjepa_ac_hf.evaluation.head_report import facts
from vjepa_ac_hf.loading.clips import decode_clip, load_clips
from vjepa_ac_hf.loading.labels import ClipLabels, clips_with_label, read_labels
from vjepa_ac_hf.training import loop
from vjepa_ac_hf.training.checkpoints import checkpoint_steps
from vjepa_ac_hf.training.heads import (
    action_figures,
    best_f1_threshold,
    fit_pos_weight,
    head_parameter_groups,
    headline,
)
from vjepa_ac_hf.training.health import SPEED
from vjepa_ac_hf.training.interruptions import EXIT_INTERRUPTED
from vjepa_ac_hf.training.presets import build_config

ROOT = Path(__file__).resolve().parents[1]
SPACE = "mouse_dx,yaw_delta,key.w"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    write_clips(folder / "clips", train=24, validation=6)
    sizes = TINY | {"encoder_config": TINY["encoder_config"] | {"patch_size": 8}}
    (folder / "tiny.json").write_text(json.dumps(sizes))
    torch.manual_seed(0)
    VJEPA2ACModel(build_config(str(folder / "tiny.json"), action_space=SPACE.split(","))).save_pretrained(
        folder / "world"
    )
    return folder


@pytest.fixture(scope="module")
def program():
    return load_program("examples/train_head.py")


@pytest.fixture
def train_head(program, workspace, monkeypatch):
    """Run the program here; flags override the defaults below, `None` leaves a flag out."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def main(task: str, output: Path, **flags) -> dict:
        values = {"task": task, "dataset": workspace / "clips", "output_dir": output, "model": workspace / "world"}
        values |= {"max_steps": 4, "per_device_batch_size": 4, "num_workers": 0, "log_every": 1, "eval_every": 4}
        values |= {"checkpoint_every": 2, "head_hidden_size": 16, "head_num_hidden_layers": 1, "action_space": SPACE}
        values |= {"head_num_attention_heads": 2, "cache_features": workspace / "features", "cache_dtype": "float32"}
        values |= flags
        arguments = [f"--{k}" if v is True else f"--{k}={v}" for k, v in values.items() if v is not None]
        monkeypatch.setattr(sys, "argv", ["train_head.py", *arguments])
        program.main()
        return json.loads((output / "metrics.json").read_text())

    return main


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_inverse_dynamics_from_command_to_loaded_model(train_head, workspace, tmp_path):
    metrics = train_head("inverse_dynamics", tmp_path, max_steps=40, learning_rate=5e-3, eval_every=20)
    assert metrics["clips"] == 6 and metrics["training_clips"] == 24
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == list(range(1, 41))
    assert np.mean([row["loss"] for row in logged[-5:]]) < 0.7 * np.mean([row["loss"] for row in logged[:5]])
    assert logged[-1]["validation_r2_yaw_delta"] == metrics["camera"]["yaw_delta"]["r2"]

    # The figures again, from the saved folder and the data set alone.
    model, processor = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    pressed = np.array(load_clips(str(workspace / "clips"), "train")["actions"])[..., ACTION_COLUMNS.index("key.w")]
    assert model.config.pos_weight == pytest.approx([(1 - pressed.mean()) / pressed.mean()])
    assert type(model) is VJEPA2ACForInverseDynamics and model.config.action_statistics == processor.action_statistics
    clips = load_clips(str(workspace / "clips"), "validation")
    world = VJEPA2ACModel.from_pretrained(workspace / "world")
    told, true = [], []
    for row in clips:
        pixels = processor(videos=decode_clip(row["video"], "clip", 16))["pixel_values_videos"]
        with torch.no_grad():
            assert torch.equal(model.vjepa2_ac.encode(pixels), world.encode(pixels))
            told.append(model.decode_actions(model(pixel_values_videos=pixels))["yaw_delta"][0].numpy())
        true.append(np.array(row["actions"])[:, ACTION_COLUMNS.index("yaw_delta")])
    errors = (np.concatenate(told) - np.concatenate(true) + 180) % 360 - 180
    assert metrics["camera"]["yaw_delta"]["mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-3)
    deviations = np.concatenate(true) - np.mean(true)
    assert metrics["camera"]["yaw_delta"]["r2"] == pytest.approx(
        1 - (errors**2).sum() / (deviations**2).sum(), rel=1e-2
    )
    assert "key.w" in metrics["keys"]["columns"]
    page = (tmp_path / "report.html").read_text()
    assert "yaw_delta" in page and f"{metrics['camera']['yaw_delta']['mae']:.3f}" in page and "data:image/png" in page
    assert (tmp_path / "README.md").read_text().startswith("---\n") and (tmp_path / "figures.png").stat().st_size > 1000


def test_a_continued_run_equals_one_that_was_not_interrupted(train_head, tmp_path):
    train_head("action_anticipation", tmp_path / "whole", use_past_actions=True, use_states=True)
    # The first two steps must run at the rates of the whole run.
    train_head("action_anticipation", tmp_path / "parts", use_past_actions=True, use_states=True)
    for path in (tmp_path / "parts" / "checkpoints").glob("step-00000004"):
        path.rename(tmp_path / "gone")
    (tmp_path / "parts" / "model.safetensors").unlink()
    train_head("action_anticipation", tmp_path / "parts", use_past_actions=True, use_states=True)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert [r["loss"] for r in rows(tmp_path / "whole")] == [r["loss"] for r in rows(tmp_path / "parts")]
    with pytest.raises(ValueError, match="learning_rate: 0.001 then, 0.5 now"):
        train_head("action_anticipation", tmp_path / "parts", learning_rate=0.5, use_past_actions=True, use_states=True)


def checkpoint_states(output: Path) -> dict[int, dict]:
    found = checkpoint_steps(output / "checkpoints")
    return {step: json.loads((path / "trainer_state.json").read_text()) for step, path in found.items()}


def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on(train_head, tmp_path, monkeypatch):
    """Ctrl-C in the third of six steps; the bits are those of a run that nothing happened to."""
    flags = {"max_steps": 6, "checkpoint_every": 100, "eval_every": 3}
    train_head("inverse_dynamics", tmp_path / "whole", **flags)
    step = loop.train_step

    def interrupted(run, batches):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(run, batches)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(loop, "train_step", interrupted)
        train_head("inverse_dynamics", tmp_path / "parts", **flags)
    assert end.value.code == EXIT_INTERRUPTED and list(checkpoint_states(tmp_path / "parts")) == [3]
    status = tmp_path / "parts" / "run_status.json"
    assert json.loads(status.read_text()) == {"status": "interrupted", "step": 3}
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    train_head("inverse_dynamics", tmp_path / "parts", **flags)
    assert json.loads(status.read_text()) == {"status": "finished", "step": 6}
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    shown = [[{k: v for k, v in r.items() if k not in SPEED} for r in rows(tmp_path / n)] for n in ("whole", "parts")]
    assert shown[0] == shown[1]


def test_a_fixed_number_of_clips_is_validated_and_all_of_them_once_at_the_end(
    train_head, program, tmp_path, monkeypatch, capsys
):
    evaluate, seen = program.evaluate_head, []

    def counting(model, batches, *arguments):
        names = []

        def watched():
            for batch in batches:
                names.extend(batch["clips"])
                yield batch

        figures = evaluate(model, watched(), *arguments)
        seen.append(names)
        return figures | {"loss": [3.0, 1.0, 2.0, 0.5][len(seen) - 1]}

    monkeypatch.setattr(program, "evaluate_head", counting)
    flags = {"max_steps": 6, "eval_every": 2, "eval_clips": 3, "checkpoint_every": 6, "keep_checkpoints": 1}
    metrics = train_head("inverse_dynamics", tmp_path, **flags)
    assert [len(names) for names in seen] == [3, 3, 3, 6] and seen[0] == seen[1] == seen[2]
    assert set(seen[0]) < set(seen[3]) and metrics["clips"] == 6
    best = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert (best["step"], best["validation_loss"]) == (4, 1.0)
    assert sorted(checkpoint_states(tmp_path)) == [4, 6]  # the newest one, and the best
    said = capsys.readouterr().out
    assert "5 steps to go, about " in said  # the first row is of step 1
    assert "evaluating all 6 validation clips" in said and "6 validation clips: loss 0.5" in said
    assert f"the head is in {tmp_path}, its figures in {tmp_path / 'report.html'}" in said


def test_accumulation_equals_a_larger_batch(train_head, tmp_path):
    train_head("inverse_dynamics", tmp_path / "whole", max_steps=3)
    train_head(
        *("inverse_dynamics", tmp_path / "parts"),
        **{"max_steps": 3, "per_device_batch_size": 1, "gradient_accumulation_steps": 4},
    )
    found = [[row["loss"] for row in rows(tmp_path / name)] for name in ("whole", "parts")]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert [r["clips_per_second"] > 0 and 0 <= r["data_wait_share"] <= 1 for r in rows(tmp_path / "parts")] == [
        True
    ] * 3


def test_the_world_model_is_never_overwritten(train_head, workspace, tmp_path, monkeypatch):
    world = tmp_path / "world"
    shutil.copytree(workspace / "world", world)
    (tmp_path / "link").symlink_to(world)
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.read_bytes() for path in world.iterdir()}
    for model, output in ((world, world), (world, tmp_path / "link"), ("world", world), (tmp_path / "link", "world")):
        with pytest.raises(ValueError, match="is the folder of --model .*, which would be overwritten"):
            train_head("inverse_dynamics", Path(output), model=model)
    assert {path.name: path.read_bytes() for path in world.iterdir()} == before
    shutil.copytree(world, tmp_path / "another")
    with pytest.raises(ValueError, match="holds a model .* but no run"):
        train_head("inverse_dynamics", tmp_path / "another")


def test_a_head_goes_on_over_the_same_weights_alone(train_head, workspace, tmp_path):
    """Of the predictor too, where it makes the features; wherever they lie."""
    flags = {"features_from": "predictor", "max_steps": 2}
    train_head("inverse_dynamics", tmp_path / "head", **flags)
    shutil.copytree(workspace / "world", tmp_path / "copy")
    train_head("inverse_dynamics", tmp_path / "head", **flags | {"model": tmp_path / "copy", "max_steps": 3})
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    weights["predictor.head.bias"] += 1
    save_file(weights, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    for more, field in (({"model": tmp_path / "copy"}, "predictor_weights"), ({"head_hidden_size": 8}, "model.head_h")):
        with pytest.raises(ValueError, match=rf"was made with other arguments \({field}.* then, .* now"):
            train_head("inverse_dynamics", tmp_path / "head", **flags | {"max_steps": 4} | more)


@pytest.mark.slow
def test_two_processes_with_half_the_batch_equal_one(train_head, workspace, tmp_path):
    train_head("inverse_dynamics", tmp_path / "one", per_device_batch_size=8, max_steps=3)
    arguments = [a.replace(str(tmp_path / "one"), str(tmp_path / "two")) for a in sys.argv[1:]]
    arguments = [a.replace("batch_size=8", "batch_size=4") for a in arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    program = [*launcher, str(ROOT / "examples" / "train_head.py"), *arguments]
    result = subprocess.run(program, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    figures = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert figures[1]["clips"] == figures[0]["clips"] == 6
    assert figures[1]["camera"]["yaw_delta"] == pytest.approx(figures[0]["camera"]["yaw_delta"], rel=1e-2)


def test_anticipation_is_measured_against_the_last_action(train_head, workspace, tmp_path):
    metrics = train_head("action_anticipation", tmp_path, max_steps=1, pos_weight="none")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.get("pos_weight") is None
    assert [len(one) for one in config["key_thresholds"]] == [1, 1]  # two actions ahead, key.w
    actions = np.array(load_clips(str(workspace / "clips"), "validation")["actions"])
    yaw = actions[..., ACTION_COLUMNS.index("yaw_delta")]
    for horizon, figures in zip((1, 2), metrics["horizons"], strict=True):
        # step t = 1 .. 6 knows action t-1 and tells action t + horizon - 1
        pairs = [(yaw[:, t - 1], yaw[:, t + horizon - 1]) for t in range(1, 8) if t + horizon - 1 < 7]
        assert figures["rows"] == 6 * len(pairs) == 6 * (7 - horizon)
        errors = [np.abs((a - b + 180) % 360 - 180) for a, b in pairs]
        assert figures["columns"]["yaw_delta"]["repeat_last"]["mae"] == pytest.approx(np.mean(errors), rel=1e-4)


@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=1, max_size=12))
def test_no_other_threshold_has_a_higher_f1(rows):
    scores, pressed = np.array([s for s, _ in rows], float), np.array([p for _, p in rows], float)

    def f1(threshold: float) -> float:
        told = scores > threshold
        return 2 * (told * pressed).sum() / max(told.sum() + pressed.sum(), 1)

    found = best_f1_threshold(scores, pressed)
    if pressed.any():
        assert f1(found) == max(f1(t) for t in np.arange(-5, 5, 0.5)) and found % 1 in (0, 0.5)
    else:
        assert found == 0


def test_thresholds_are_those_of_training_clips(train_head, workspace, tmp_path):
    metrics = train_head("inverse_dynamics", tmp_path, max_steps=3)
    plain = train_head("inverse_dynamics", tmp_path / "plain", max_steps=3, key_thresholds="none")
    model, processor = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    found = {}
    for split in ("train", "validation"):
        clips = load_clips(str(workspace / "clips"), split)
        logits = []
        for row in clips:
            pixels = processor(videos=[decode_clip(row["video"], "clip", 16)])["pixel_values_videos"]
            with torch.no_grad():
                logits.append(model(pixel_values_videos=pixels).binary_logits[0, :, 0].double().numpy())
        pressed = np.array(clips["actions"])[..., ACTION_COLUMNS.index("key.w")].flatten()
        found[split] = (np.concatenate(logits), pressed)
    (threshold,) = model.config.key_thresholds
    assert threshold == pytest.approx(best_f1_threshold(*found["train"]), abs=1e-4)
    scores, pressed = found["validation"]
    told = scores > threshold
    f1 = 2 * (told * pressed).sum() / (told.sum() + pressed.sum())
    assert metrics["keys"]["columns"]["key.w"]["f1"] == pytest.approx(f1)
    assert plain["keys"]["columns"]["key.w"]["recall"] == ((scores > 0) * pressed).sum() / pressed.sum()
    for name in ("average_precision", "accuracy_at_even_odds"):
        assert plain["keys"]["columns"]["key.w"][name] == pytest.approx(metrics["keys"]["columns"]["key.w"][name])


def test_classification_from_command_to_loaded_model(train_head, workspace, tmp_path):
    recordings = {r for s in ("train", "validation") for r in load_clips(str(workspace / "clips"), s)["recording_id"]}
    labels = {r: ("cave", "forest")[int(r.split("-")[1]) % 2] for r in recordings}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    metrics = train_head("video_classification", tmp_path / "out", labels=tmp_path / "labels.json")
    model = AutoModelForVideoClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "cave", 1: "forest"} and model.config.label2id == {"cave": 0, "forest": 1}
    assert metrics["majority_accuracy"] == 0.5 == metrics["chance"] and set(metrics["classes"]) == {"cave", "forest"}
    assert 0 <= metrics["accuracy"] <= 1

    validation = next(r for r in load_clips(str(workspace / "clips"), "validation")["recording_id"])
    (tmp_path / "labels.json").write_text(json.dumps(labels | {validation: "moon"}))
    with pytest.raises(ValueError, match=r"label 'moon', the label map has only \['cave', 'forest'\]"):
        train_head("video_classification", tmp_path / "out2", labels=tmp_path / "labels.json")
    (tmp_path / "labels.json").write_text(json.dumps({k: v for k, v in labels.items() if k != validation}))
    with pytest.raises(ValueError, match=f"3 of 6 clips have no label, {validation}@0 first"):
        train_head("video_classification", tmp_path / "out2", labels=tmp_path / "labels.json")
    assert not (tmp_path / "out2").exists()


def test_a_distance_from_command_to_loaded_model(train_head, workspace, tmp_path):
    metrics = train_head("temporal_distance", tmp_path, max_steps=15, learning_rate=5e-3, eval_every=15)
    logged = rows(tmp_path)
    assert np.mean([row["loss"] for row in logged[-5:]]) < 0.7 * logged[0]["loss"]
    figures = metrics["distance"]
    assert logged[-1]["validation_rank_correlation"] == figures["rank_correlation"]

    # The figures again, from the saved folder and the data set alone, a pair at a time.
    model, processor = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    assert type(model) is VJEPA2ACForTemporalDistance and model.config.training_clips == 24
    told, plain, true = [], [], []
    for row in load_clips(str(workspace / "clips"), "validation"):
        pixels = processor(videos=decode_clip(row["video"], "clip", 16))["pixel_values_videos"]
        with torch.no_grad():
            views = model.vjepa2_ac.encode(pixels)[0]
            for i, j in itertools.combinations(range(len(views)), 2):
                told.append(float(model.distance(views[i : i + 1], views[j : j + 1])))
                plain.append(float((views[i] - views[j]).abs().mean()))
                true.append(j - i)
    assert figures["pairs"] == len(true) == 6 * 28
    assert figures["mae"] == pytest.approx(np.abs(np.array(told) - true).mean(), rel=1e-3)
    ranks = [np.array([(np.sum(np.array(v) < x) + np.sum(np.array(v) <= x)) / 2 for x in v]) for v in (plain, true)]
    assert figures["rank_correlation_features"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-3)
    assert "rank" in (tmp_path / "report.html").read_text()


def test_a_decoder_from_command_to_loaded_model(train_head, workspace, tmp_path):
    metrics = train_head("frame_decoding", tmp_path, max_steps=2)
    model, processor = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    assert type(model) is VJEPA2ACForFrameDecoding and metrics["clips"] == 6
    # The figures again, from the saved folder and the data set alone, frame by frame.
    clips = load_clips(str(workspace / "clips"), "validation")
    true = torch.stack([decode_clip(row["video"], "clip", 16) for row in clips])
    pixels = processor(videos=list(true))["pixel_values_videos"]
    true = true.numpy() / 255
    with torch.no_grad():
        told = model.head(model.vjepa2_ac.encode(pixels)).numpy()
    assert metrics["loss"] == pytest.approx(np.abs(told - true).mean(), rel=1e-4)
    told = told.clip(0, 1)
    mean, found = true.mean(axis=(0, 1)), {"all": [], "large_turns": []}
    for clip, row in enumerate(clips):
        for step in range(1, 8):
            guesses = {"decoded": told[clip, 2 * step : 2 * step + 2], "mean frame": mean}
            guesses["last frame"] = true[clip, 2 * step - 1]
            errors = {
                k: ((g - true[clip, 2 * step : 2 * step + 2]) ** 2).mean(axis=(1, 2, 3)) for k, g in guesses.items()
            }
            decibels = {k: (10 * np.log10(1 / np.maximum(e, 1 / (12 * 255**2)))).mean() for k, e in errors.items()}
            found["all"].append(decibels)
            if abs(row["actions"][step - 1][ACTION_COLUMNS.index("yaw_delta")]) > 10:
                found["large_turns"].append(decibels)
    assert 0 < len(found["large_turns"]) < len(found["all"]) == 42
    for part, tubelets in found.items():
        assert metrics["frames"][part]["rows"] == len(tubelets)
        for kind in ("decoded", "mean frame", "last frame"):
            expected = np.mean([t[kind] for t in tubelets])
            assert metrics["frames"][part][kind]["psnr"] == pytest.approx(expected, rel=1e-4)
            assert -1 <= metrics["frames"][part][kind]["ssim"] <= 1
    logged = rows(tmp_path)[-1]
    assert logged["validation_psnr_decoded"] == metrics["frames"]["all"]["decoded"]["psnr"]
    assert "validation_ssim_last_frame_large_turns" in logged
    page = (tmp_path / "report.html").read_text()
    assert f"{metrics['frames']['all']['mean frame']['psnr']:.3f}" in page and "PSNR (dB)" in page
    world = load_file(workspace / "world" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if name.startswith("vjepa2_ac."):
            assert torch.equal(tensor, world[name.removeprefix("vjepa2_ac.")]), name


def test_a_decoder_without_torchmetrics_is_refused_before_anything_is_encoded(train_head, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torchmetrics" else found(name, *a)
    )
    with pytest.raises(ImportError, match=r"torchmetrics: pip install 'vjepa-ac-hf\[heads\]'"):
        train_head("frame_decoding", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_decoder_learns_the_same_with_and_without_a_cache(train_head, tmp_path):
    """Float32 features of batches of the same size, and the same frames: the same losses."""
    cached = train_head("frame_decoding", tmp_path / "cached", max_steps=3)
    plain = train_head("frame_decoding", tmp_path / "plain", max_steps=3, cache_features="none")
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("cached", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(set(losses[0])) == 3
    assert cached["loss"] == pytest.approx(plain["loss"], rel=1e-4)


def test_the_encoder_can_be_trained_and_the_predictor_be_read(train_head, workspace, tmp_path):
    def encoder(folder):
        return {k.removeprefix("vjepa2_ac."): v for k, v in load_file(folder / "model.safetensors").items()}

    train_head("inverse_dynamics", tmp_path / "a", train_encoder=True, cache_features=None, max_steps=2)
    train_head("inverse_dynamics", tmp_path / "b", features_from="predictor", max_steps=2)
    before = load_file(workspace / "world" / "model.safetensors")
    name = next(n for n in before if n.startswith("encoder.") and n.endswith("query.weight"))
    assert not torch.equal(before[name], encoder(tmp_path / "a")[name])
    assert torch.equal(before[name], encoder(tmp_path / "b")[name])
    assert "predictor.head.weight" in encoder(tmp_path / "b") and "predictor.head.weight" not in encoder(tmp_path / "a")


def test_mistakes_are_found_before_anything_is_computed(train_head, workspace, tmp_path, capsys):
    for flags, message in [
        ({"model": None}, "give either --model, or --encoder"),
        ({"labels": "x.json"}, "--labels belongs to video_classification"),
        ({"train_encoder": True}, "no --cache_features"),
        ({"max_steps": 0}, "--max_steps must be at least 1, found 0"),
    ]:
        with pytest.raises(SystemExit) as exit_:
            train_head("inverse_dynamics", tmp_path / "out", **flags)
        assert exit_.value.code == 2 and message in capsys.readouterr().err
    for flags in ({"train_encoder": True, "cache_features": None}, {"features_from": "predictor"}):
        with pytest.raises(SystemExit):
            train_head("frame_decoding", tmp_path / "out", **flags)
        assert "frame_decoding shows what a frozen encoder says" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"unknown action column 'key.ww'; did you mean 'key.w'"):
        train_head("inverse_dynamics", tmp_path / "out", action_space="yaw_delta,key.ww")
    with pytest.raises(ValueError, match="action_dim 3, the head's action space has 13 columns"):
        train_head("inverse_dynamics", tmp_path / "out", action_space="vpt-13", features_from="predictor")
    VJEPA2ACProcessor(resolution=32, resize_mode="squash").save_pretrained(workspace / "squashed")
    for path in (workspace / "world").iterdir():
        shutil.copy(path, workspace / "squashed")
    with pytest.raises(ValueError, match="resize_mode is 'squash', --resize_mode is 'crop'"):
        train_head("inverse_dynamics", tmp_path / "out", model=workspace / "squashed", resize_mode="crop")
    VJEPA2ACProcessor(resolution=32, fps=10).save_pretrained(workspace / "squashed")
    with pytest.raises(ValueError, match="split train, .*the processor's fps is 10, the video has 5 frames a second"):
        train_head("inverse_dynamics", tmp_path / "out", model=workspace / "squashed")
    with pytest.raises(ValueError, match="neither a .json file nor 'hotbar' nor one of the columns"):
        train_head("video_classification", tmp_path / "out", labels="scenario")
    assert not (tmp_path / "out").exists()


def test_without_another_processor_the_frame_rate_is_the_data_sets(program, workspace, tmp_path):
    write_clips(tmp_path / "clips", train=1, validation=0, fps=10)
    world = VJEPA2ACModel.from_pretrained(workspace / "world")
    for model in (None, str(workspace / "world")):
        arguments = argparse.Namespace(
            dataset=str(tmp_path / "clips"), model=model, action_space=SPACE, action_stats="auto", resize_mode="crop"
        )
        assert program.build_processor(arguments, world).fps == 10


def test_heads_of_several_tasks_share_a_cache(train_head, workspace, tmp_path, monkeypatch):
    """Untrained encoders of a seed are the same whatever the head and its actions are; so is the cache beside them."""
    world = {"model": None, "encoder": "random", "model_config": workspace / "tiny.json", "cache_features": None}
    train_head("inverse_dynamics", tmp_path / "a", max_steps=1, **world)
    caches = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.safetensors")}
    assert len(caches) == 2
    monkeypatch.setattr(VJEPA2ACModel, "encode", None)
    train_head("action_anticipation", tmp_path / "b", action_space="yaw_delta,key.w", max_steps=1, **world)
    train_head("inverse_dynamics", tmp_path / "c", head_hidden_size=32, max_steps=1, verify_cache=True, **world)
    found = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.safetensors")}
    assert found == caches


def test_a_data_set_says_how_its_frames_were_made(train_head, workspace, tmp_path, capsys):
    write_clips(tmp_path / "clips", train=6, validation=3)
    options = {"resize_mode": "squash", "resolution": 32, "clip": {"native_fps": 40}}
    (tmp_path / "clips" / "report.json").write_text(json.dumps({"options": options}))
    world = {"model": None, "encoder": "random", "model_config": workspace / "tiny.json", "dataset": tmp_path / "clips"}
    train_head("inverse_dynamics", tmp_path / "a", max_steps=1, cache_features="none", **world)
    processor = AutoProcessor.from_pretrained(tmp_path / "a")
    assert (processor.resize_mode, processor.native_fps) == ("squash", 40)
    with pytest.raises(ValueError, match=r"was built with resize_mode 'squash' .*, --resize_mode is 'crop'"):
        train_head("inverse_dynamics", tmp_path / "b", resize_mode="crop", **world)
    shutil.copytree(workspace / "world", tmp_path / "world")
    VJEPA2ACProcessor(resolution=32).save_pretrained(tmp_path / "world")
    with pytest.raises(ValueError, match=r"was built with resize_mode 'squash' .*, the model's processor has 'crop'"):
        train_head("inverse_dynamics", tmp_path / "b", model=tmp_path / "world", dataset=tmp_path / "clips")
    VJEPA2ACProcessor(resolution=32, resize_mode="squash", native_fps=40).save_pretrained(tmp_path / "world")
    train_head("inverse_dynamics", tmp_path / "d", model=tmp_path / "world", dataset=tmp_path / "clips", max_steps=1)
    assert AutoProcessor.from_pretrained(tmp_path / "d").native_fps == 40


def test_labels_come_from_columns_files_and_the_hotbar(workspace, tmp_path):
    clips = load_clips(str(workspace / "clips"), "validation")
    assert set(map(tuple, read_labels(clips, "session_id").values())) == {(s,) for s in clips["session_id"]}
    with pytest.raises(ValueError, match="6 of 6 clips have no label"):
        read_labels(clips, "hotbar")
    actions = np.array(clips["actions"])
    actions[:, 0, 28 + 3], actions[2:, 0, 28 + 3], actions[2:, 0, 28 + 7] = 1, 0, 1
    held = clips.remove_columns("actions").add_column("actions", actions.tolist())
    assert [v[0] for v in read_labels(held, "hotbar").values()] == ["slot 3"] * 2 + ["slot 7"] * 4
    names = [f"{r}@{t}" for r, t in zip(clips["recording_id"], clips["start_tick"], strict=True)]
    (tmp_path / "l.json").write_text(json.dumps({r: ["a", "b"] for r in clips["recording_id"]} | {names[1]: []}))
    labels = ClipLabels(read_labels(clips, str(tmp_path / "l.json")))
    assert labels.several and labels(names[:3]).tolist() == [[1, 1], [0, 0], [1, 1]]
    with pytest.raises(ValueError, match="2 labels .* expected one"):
        ClipLabels({"x@0": ["a", "b"]}, several=False)


def test_clips_without_a_slot_are_left_out_of_labels_from_the_hotbar(workspace):
    clips = load_clips(str(workspace / "clips"), "validation")
    actions = np.zeros_like(np.array(clips["actions"]))
    actions[[1, 4], 0, 28 + 2] = 1
    actions[5, 1:, 28] = 1  # known later, not at the start
    held = clips.remove_columns("actions").add_column("actions", actions.tolist())
    chosen = clips_with_label(held, "hotbar")
    assert chosen["start_tick"] == [held["start_tick"][i] for i in (1, 4)]
    assert set(map(tuple, read_labels(chosen, "hotbar").values())) == {("slot 2",)}
    assert clips_with_label(held, "session_id") is held
    with pytest.raises(ValueError, match="--labels hotbar: 2 of 2 clips have no label: their logs tell no slot"):
        clips_with_label(held.select([0, 5]), "hotbar")


@pytest.mark.parametrize("horizons", [False, True])
def test_figures_of_the_slot_leave_out_rows_without_one_and_count_them(horizons):
    kind = VJEPA2ACActionAnticipationConfig if horizons else VJEPA2ACInverseDynamicsConfig
    config = kind(action_space="vpt-38")
    slots = [config.action_space.index(f"hotbar.{i}") for i in range(9)]
    rng = np.random.default_rng(0)
    told, true, last = rng.normal(size=(6, 38)), np.zeros((6, 38)), np.zeros((6, 38))
    cases = [(3, 3, 3), (3, 5, 5), (0, None, 0), (1, None, 1), (2, 2, 4), (7, 7, None)]
    for row, (likeliest, held, before) in enumerate(cases):
        told[row, slots[likeliest]] = 9
        for values, slot in ((true, held), (last, before)):
            if slot is not None:
                values[row, slots[slot]] = 1
    rows = {"told": told, "true": true} | ({"last": last, "horizon": np.ones(6, int)} if horizons else {})
    figures = action_figures(rows, config)
    if horizons:  # compared with the last action: rows in which that has none are left out too
        assert figures["horizons"][0]["slot"] == {"rows": 3, "without_slot": 3, "model": 2 / 3, "repeat_last": 2 / 3}
    else:
        slot = figures["slot"]
        assert (slot["clips"], slot["without_slot"], slot["accuracy"]) == (4, 2, 0.75)
    rows["true"] = np.zeros((6, 38))
    figures = action_figures(rows, config)
    found = figures["horizons"][0]["slot"] if horizons else figures["slot"]
    assert found == {"rows" if horizons else "clips": 0, "without_slot": 6}
    # The report's sentences and the training log's numbers are made without any slot.
    assert "validation_accuracy" not in headline({"loss": 1.0, **figures})
    assert not any("slot" in sentence for sentence in facts(figures))


def test_weights_of_keys_are_those_of_the_training_split(workspace):
    clips = load_clips(str(workspace / "clips"), "train")
    share = np.array(clips["actions"])[..., ACTION_COLUMNS.index("key.w")].mean()
    assert fit_pos_weight(clips, ["key.w", "key.q"]) == pytest.approx([(1 - share) / share, 20.0])


def test_parameter_groups():
    for freeze in (True, False):
        model = head(VJEPA2ACForInverseDynamics, freeze_encoder=freeze)
        groups = head_parameter_groups(model, 1e-3, 0.05, encoder_learning_rate=1e-5)
        listed = [p for g in groups for p in g["params"]]
        assert {id(p) for p in listed} == {id(p) for p in model.parameters() if p.requires_grad}
        assert len(listed) == len({id(p) for p in listed})
        inside = {id(p) for p in model.vjepa2_ac.parameters()}
        for group in groups:
            for p in group["params"]:
                assert group["lr"] == (1e-5 if id(p) in inside else 1e-3)
                assert group["weight_decay"] == (0.05 if p.ndim > 1 else 0.0)
        assert ({g["name"] for g in groups} == {"head"}) is freeze
