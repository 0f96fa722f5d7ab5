"""Training through the real command line, on a data set of moving pictures and a tiny model."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers_clips import write_clips
from helpers_training import TINY, assert_same_weights, command, losses, metrics, run, write_workspace
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, VJEPA2Config, VJEPA2Model

from vjepa_ac_hf import VJEPA2ACProcessor
from vjepa_ac_hf.loading.clips import check_geometry
from vjepa_ac_hf.training.checkpoints import checkpoint_steps, write_checksums
from vjepa_ac_hf.training.optimization import build_optimizer, build_scheduler
from vjepa_ac_hf.training.presets import PRESETS, build_config


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def reference(workspace):
    output = workspace / "reference"
    run(command(workspace, output))
    return output


def test_leaves_a_model_that_loads_and_has_learnt(workspace, reference):
    rows = metrics(reference)
    assert [row["step"] for row in rows] == list(range(1, 9))
    required = {"loss", "teacher_forcing_loss", "rollout_loss", "learning_rate", "clips_per_second", "gradient_norm"}
    assert all(required <= row.keys() for row in rows)
    for row in rows:
        assert row["loss"] == pytest.approx(row["teacher_forcing_loss"] + row["rollout_loss"], rel=1e-6)
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert {"validation_loss", "validation_error", "validation_persistence"} <= rows[3].keys() & rows[7].keys()
    model = AutoModel.from_pretrained(reference)
    processor = AutoProcessor.from_pretrained(reference)
    assert processor.action_statistics == json.loads((workspace / "clips" / "action_stats.json").read_text())
    assert processor.resolution == model.config.encoder_config.crop_size == 32
    assert processor.action_space == model.config.action_space
    final = load_file(reference / "checkpoints" / "step-00000008" / "predictor.safetensors")
    for name, tensor in model.predictor.state_dict().items():
        torch.testing.assert_close(tensor, final[name], rtol=0, atol=0)
    card = (reference / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: transformers" in card and "vpt" in card
    assert {p.name for p in reference.iterdir()} >= {"config.json", "modeling_vjepa2_ac.py", "processor_config.json"}
    assert not [p for p in reference.rglob("*") if p.suffix in (".pkl", ".bin", ".pt", ".pth", ".tmp")]


def test_the_encoder_is_never_changed(workspace, reference):
    torch.manual_seed(0)
    from accelerate.utils import set_seed

    from vjepa_ac_hf import VJEPA2ACModel

    set_seed(0)
    fresh = VJEPA2ACModel(build_config(str(workspace / "tiny.json"), action_space="vpt-13"))
    trained = load_file(reference / "model.safetensors")
    for name, tensor in fresh.encoder.state_dict().items():
        torch.testing.assert_close(trained[f"encoder.{name}"], tensor, rtol=0, atol=0)


def test_a_pretrained_encoder_is_used_and_kept(workspace, train_here):
    """`--encoder` decides the encoder's sizes too, whatever the configuration file says."""
    torch.manual_seed(4)
    pretrained = VJEPA2Model(VJEPA2Config(**TINY["encoder_config"] | {"hidden_size": 32, "patch_size": 8}))
    pretrained.save_pretrained(workspace / "encoder")
    output = workspace / "with_encoder"
    train_here(
        command(workspace, output, f"--encoder={workspace / 'encoder'}", "--max_steps=2", "--action_space=vpt-38")
    )
    trained = load_file(output / "model.safetensors")
    for name, tensor in pretrained.encoder.state_dict().items():
        torch.testing.assert_close(trained[f"encoder.{name}"], tensor, rtol=0, atol=0)
    config = AutoModel.from_pretrained(output).config
    assert (config.grid_size, config.action_dim, config.encoder_config.hidden_size) == (4, 38, 32)


@pytest.mark.slow
def test_two_processes_equal_one(workspace, reference):
    """Same global batch, so the same clips in every step; float32 sums are taken in another order, hence 1e-4."""
    output = workspace / "two"
    run(command(workspace, output, "--per_device_batch_size=2"), processes=2)
    assert losses(output) == pytest.approx(losses(reference), rel=1e-4)
    pairs = zip(metrics(output), metrics(reference), strict=True)
    validated = [(a["validation_loss"], b["validation_loss"]) for a, b in pairs if "validation_loss" in a]
    assert len(validated) == 2 and all(a == pytest.approx(b, rel=1e-4) for a, b in validated)


def test_accumulation_equals_a_larger_batch(workspace, reference, train_here):
    output = workspace / "accumulated"
    train_here(command(workspace, output, "--per_device_batch_size=1", "--gradient_accumulation_steps=4"))
    assert losses(output) == pytest.approx(losses(reference), rel=1e-4)


@pytest.mark.slow
def test_killed_and_resumed_equals_undisturbed(workspace, reference):
    """SIGKILL after the first checkpoint; the continued run gives bit-identical losses and weights."""
    output = workspace / "killed"
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, *command(workspace, output)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 120
    while not (output / "checkpoints" / "step-00000004").is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # What a kill in the middle of writing leaves: neither is taken for a checkpoint.
    (output / "checkpoints" / ".step-00000099.tmp").mkdir()
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    for late in (s for s in checkpoint_steps(output / "checkpoints") if s > 4):
        shutil.rmtree(output / "checkpoints" / f"step-{late:08d}")
    result = run(command(workspace, output, "--resume=auto"))
    assert "continuing from" in result.stdout and "step-00000004" in result.stdout
    assert losses(output) == losses(reference)
    assert_same_weights(output, reference)


def test_cached_features_equal_encoding(workspace, reference, train_here):
    output, cache = workspace / "cached", workspace / "cache"
    train_here(command(workspace, output, f"--cache_features={cache}", "--cache_dtype=float32"))
    assert losses(output) == pytest.approx(losses(reference), rel=1e-5)
    (chunk,) = cache.glob("train-*/features-00000.safetensors")
    written = chunk.stat().st_mtime_ns
    train_here(command(workspace, workspace / "cached2", f"--cache_features={cache}", "--cache_dtype=float32"))
    assert chunk.stat().st_mtime_ns == written
    # Another encoder's features lie beside them, under another name.
    train_here(
        command(workspace, workspace / "cached3", f"--cache_features={cache}", "--cache_dtype=float32", "--seed=1")
    )
    assert len(list(cache.glob("train-*/features-00000.safetensors"))) == 2
    assert chunk.stat().st_mtime_ns == written


def test_streaming_validates_and_copies_nothing(workspace, train_here, monkeypatch, tmp_path):
    """As the full-size recipes run: Parquet is read where it lies, in validation too."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    output = workspace / "streamed_here"
    train_here(command(workspace, output, "--streaming", "--shuffle_buffer=8", "--max_steps=2", "--eval_every=1"))
    assert len(losses(output)) == 2 and all(row["validation_loss"] > 0 for row in metrics(output))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_streaming_trains_in_bfloat16(workspace):
    output = workspace / "streamed"
    run(command(workspace, output, "--streaming", "--shuffle_buffer=8", "--num_workers=1", "--mixed_precision=bf16"))
    assert len(losses(output)) == 8 and losses(output)[-1] < 0.9 * losses(output)[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_config=tiny"], "clips are 32 x 32 pixels, smaller than the model's 64"),
        (["--model_config=nowhere.json"], "neither one of.*nor a file"),
        (["--action_space=vpt-39"], "unknown action space 'vpt-39'"),
        (["--action_space=yaw_delta,key.ww"], "unknown action column 'key.ww'; did you mean 'key.w'"),
        (["--action_stats=nowhere.json"], "nowhere.json: action statistics are missing"),
        (["--auto_steps=8"], "auto_steps 8 is more than the 7"),
        (["--warmup_steps=9"], "warmup_steps 9.*max_steps 8"),
        (["--resume=nowhere"], "--resume nowhere: no checkpoint there"),
    ],
)
def test_mistakes_are_named_before_any_training(workspace, train_here, flags, message):
    output = workspace / "mistake"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_here(command(workspace, output, *flags))
    assert not (output / "metrics.jsonl").exists() or not losses(output)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--push_to_hub"], "--push_to_hub needs --hub_model_id"),
        (["--streaming", "--cache_features=x"], "--cache_features needs random access"),
        (["--max_steps=0"], "--max_steps must be at least 1, found 0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(workspace, train_here, capsys, flags, message):
    with pytest.raises(SystemExit):
        train_here(command(workspace, workspace / "flags", *flags))
    assert message in capsys.readouterr().err


def test_other_arguments_are_refused_on_resume(workspace, reference, train_here):
    output = workspace / "changed"
    shutil.copytree(reference, output)
    with pytest.raises(ValueError, match="learning_rate: 0.001 then, 0.002 now") as error:
        train_here(command(workspace, output, "--learning_rate=2e-3", "--max_steps=10"))
    assert "max_steps" not in str(error.value)


def test_another_data_set_is_refused_on_resume(workspace, train_here, reference):
    """Checkpoints hold where the loader stands and of which clips; a data set that was built anew is not the same."""
    output = workspace / "rebuilt"
    shutil.copytree(reference, output)
    path = output / "checkpoints" / "step-00000008" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert state["loader"]["next_batch"] == 8 and state["loader"]["num_clips"] == 24
    state["loader"]["clips"] = "another build"
    path.write_text(json.dumps(state))
    write_checksums(path.parent)
    with pytest.raises(ValueError, match="clips: 'another build' in the state, '.*' here"):
        train_here(command(workspace, output, "--max_steps=10"))
    assert len(losses(output)) == 8


def test_a_loss_that_is_not_finite_stops_the_run(workspace, train_here):
    output = workspace / "infinite"
    flags = ["--learning_rate=1e30", "--warmup_steps=0", "--max_grad_norm=1e30", "--checkpoint_every=1"]
    with pytest.raises(FloatingPointError, match="training stopped before the parameters were changed.*toy-"):
        train_here(command(workspace, output, *flags))
    assert not (output / "model.safetensors").exists()
    newest = max(checkpoint_steps(output / "checkpoints").items())[1]
    assert all(t.isfinite().all() for t in load_file(newest / "predictor.safetensors").values())


def test_missing_statistics_are_named(workspace, train_here):
    shutil.copytree(workspace / "clips", workspace / "bare")
    (workspace / "bare" / "action_stats.json").unlink()
    result = run(command(workspace, workspace / "bare_out", dataset="bare"), check=False)
    assert result.returncode != 0 and "bare/action_stats.json: action statistics are missing" in result.stderr
    train_here(command(workspace, workspace / "bare_out", "--action_stats=compute", "--max_steps=1", dataset="bare"))
    computed = AutoProcessor.from_pretrained(workspace / "bare_out").action_statistics
    stored = json.loads((workspace / "clips" / "action_stats.json").read_text())
    assert computed["count"] == stored["count"] and computed["std"] == pytest.approx(stored["std"], rel=1e-6)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_saved_frame_rate_is_the_data_sets(train_program, tmp_path, streaming):
    """Planning and labelling take from it how many ticks an action lasts."""
    write_clips(tmp_path, train=2, validation=0, fps=10)
    arguments = argparse.Namespace(dataset=str(tmp_path), streaming=streaming, eval_every=0)
    processor = VJEPA2ACProcessor(resolution=32)
    train, _ = train_program.load_splits(arguments, processor)
    processor.save_pretrained(tmp_path / "saved")
    assert len(train) == 2 and AutoProcessor.from_pretrained(tmp_path / "saved").fps == 10


def test_schedule_and_parameter_groups():
    predictor = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    optimizer = build_optimizer(predictor, 1.0, 0.1)
    scheduler = build_scheduler(optimizer, max_steps=10, warmup_steps=4, decay_steps=5)
    rates = []
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(predictor[0].weight)}


def test_presets_build():
    assert [build_config(n).grid_size for n in ("tiny", "tiny-32px", "tiny-fine")] == [4, 4, 8]
    assert build_config("vitl16", action_space="vpt-38").action_dim == 38
    v21 = {"vitb16-v21", "vitl16-v21", "vitg16-v21", "vitG16-v21"}
    assert set(PRESETS) == {"tiny", "tiny-32px", "tiny-fine", "vitl16", "vitg16"} | v21


def test_a_data_set_says_how_its_frames_were_made(workspace, tmp_path, train_here):
    """Built with squash and trained without a flag, the saved processor cropped raw frames."""
    shutil.copytree(workspace / "clips", tmp_path / "clips")
    options = {"resize_mode": "squash", "resolution": 32, "clip": {"native_fps": 40}}
    (tmp_path / "clips" / "report.json").write_text(json.dumps({"options": options}))
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    train_here(command(tmp_path, tmp_path / "out", "--max_steps=1", "--eval_every=0"))
    processor = VJEPA2ACProcessor.from_pretrained(tmp_path / "out")
    assert (processor.resize_mode, processor.native_fps, processor.fps) == ("squash", 40, 5)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["arguments"]["resize_mode"] == "squash"
    with pytest.raises(ValueError, match=r"built with resize_mode 'squash' \(report.json\), --resize_mode is 'crop'"):
        train_here(command(tmp_path, tmp_path / "other", "--max_steps=1", "--resize_mode=crop"))
    processor.resize_mode = "crop"
    with pytest.raises(ValueError, match=r"resize_mode 'squash' \(report.json\), the model's processor has 'crop'"):
        check_geometry(str(tmp_path / "clips"), processor)
