"""What a run says about itself: health figures, `run.json`, the summary at the start, mistakes found before it."""

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_training import ROOT, TINY, metrics, write_workspace
from safetensors.torch import load_file

from vjepa_ac_hf import VJEPA2ACConfig, VJEPA2ACModel, VJEPA2ACOutput
from vjepa_ac_hf.records import git_revision
from vjepa_ac_hf.training.estimates import HARDWARE
from vjepa_ac_hf.training.health import SPEED, Health, feature_std
from vjepa_ac_hf.training.preflight import check_arguments


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("health"))


def flags(workspace: Path, output: Path, *more: str) -> list[str]:
    values = {"max_steps": 6, "per_device_batch_size": 4, "log_every": 2, "checkpoint_every": 4, "eval_every": 3}
    values |= {"num_workers": 0, "learning_rate": 1e-3, "dataset": workspace / "clips", "output_dir": output}
    settings = [f"--{k}={v}" for k, v in values.items()]
    return ["examples/train.py", *settings, f"--model_config={workspace / 'tiny.json'}", *more]


@pytest.fixture(scope="module")
def finished(workspace, train_program):
    """Output folder of a run and what it showed."""
    output, shown = workspace / "finished", io.StringIO()
    command = flags(workspace, output, "--hardware_tflops=0.5")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_TOKEN", "secret")
        patch.setattr(sys, "argv", command)
        patch.setattr(sys, "orig_argv", ["python", *command])
        train_program.main()
    return output, shown.getvalue()


# ------------------------------------------------------------------------------------------------- health


def test_every_row_has_all_figures(finished):
    output, _ = finished
    found = metrics(output)
    assert [row["step"] for row in found] == [2, 3, 4, 6]
    names = SPEED | {"parameter_norm", "gradient_norm", "encoder_feature_std", "predictor_feature_std"}
    for row in found:
        assert names <= row.keys() and all(math.isfinite(row[name]) for name in names)
        assert 0 <= row["data_wait_share"] <= 1 and 0.01 < row["encoder_feature_std"] < 1.5
        assert row["mfu"] == pytest.approx(row["model_tflops_per_second"] / 0.5)
        # 4 clips: 7 steps of teacher forcing and one more of the rollout, of 2 x 2 frame tokens and 2 others.
        assert row["tokens_per_second"] == pytest.approx(row["clips_per_second"] * 8 * 6)
        assert 1e8 < row["peak_memory_bytes"] < 1e11
    last = load_file(output / "checkpoints" / "step-00000004" / "predictor.safetensors")
    norm = np.sqrt(sum(float((tensor.double() ** 2).sum()) for tensor in last.values()))
    assert found[2]["parameter_norm"] == pytest.approx(norm, rel=1e-6)


def test_features_that_collapse_are_seen():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 5, 7, generator=generator)
    by_hand = np.mean(
        [np.std([features[b, t, n, d] for b in range(2) for t in range(3) for n in range(5)]) for d in range(7)]
    )
    assert feature_std(features).item() == pytest.approx(by_hand, rel=1e-5)
    assert feature_std(features[:1, :1, :1].expand(2, 3, 5, 7)).item() == pytest.approx(0, abs=1e-6)
    assert feature_std(features.bfloat16()).dtype == torch.float32


def health(tmp_path: Path, **values) -> Health:
    from accelerate import Accelerator

    arguments = argparse.Namespace(
        **{
            "per_device_batch_size": 2,
            "gradient_accumulation_steps": 3,
            "mixed_precision": "no",
            "cache_features": None,
        },
        **{"hardware": None, "hardware_tflops": None, "log_every": 4, "eval_every": 6, "max_steps": 11},
    )
    vars(arguments).update(values)
    return Health(VJEPA2ACModel(VJEPA2ACConfig(**TINY, action_space="vpt-13")), arguments, Accelerator(cpu=True))


def test_only_logged_steps_are_observed(tmp_path):
    observer = health(tmp_path)
    features = torch.randn(1, 8, 4, 48)
    output = VJEPA2ACOutput(target_features=features, predicted_features=2 * features)
    seen = []
    for step in range(1, 12):
        observer.begin(step)
        observer.observe(output)
        row = observer.row(1, 1.0)
        if "encoder_feature_std" in row:
            seen.append(step)
            assert row["predictor_feature_std"] == pytest.approx(2 * row["encoder_feature_std"])
    assert seen == [4, 6, 8, 11]


def test_waiting_for_data_is_counted(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("vjepa_ac_hf.training.health.time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def slow():
        for i in range(3):
            clock[0] += 0.05
            yield {"number": i}

    observer = health(tmp_path)
    numbers = []
    for batch in observer.timed(slow()):
        numbers.append(batch["number"])
        clock[0] += 0.02  # computing
    assert numbers == [0, 1, 2]
    assert observer.row(3, 0.30)["data_wait_share"] == pytest.approx(0.5)
    assert observer.row(3, 0.30)["data_wait_share"] == 0


def test_utilisation_is_of_all_devices(tmp_path):
    observer = health(tmp_path, hardware="h100x8", mixed_precision="bf16")
    row = observer.row(10, 2.0)
    assert row["mfu"] == pytest.approx(row["model_tflops_per_second"] / HARDWARE["h100"].bf16_tflops)
    plain = health(tmp_path).row(5, 1.0)
    assert "mfu" not in plain and plain["model_tflops_per_second"] == pytest.approx(row["model_tflops_per_second"])


# ------------------------------------------------------------------------------------------------- run.json


def test_the_record_makes_the_run_again(workspace, finished, train_here):
    """Arguments, versions, revision and command are there, and a run from them alone gives the same losses."""
    output, _ = finished
    record = json.loads((output / "run.json").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0:
        assert record["git"]["revision"] == head.stdout.strip()
    assert record["command"][1:3] == ["examples/train.py", "--max_steps=6"] and record["processes"] == 1
    assert record["versions"]["torch"] == torch.__version__ and len(record["devices"]) == 1
    assert record["arguments"]["warmup_steps"] == 0 and record["arguments"]["global_batch_size"] == 4
    assert record["environment"]["OMP_NUM_THREADS"] == "1" and record["earlier"] == []
    assert "secret" not in (output / "run.json").read_text()

    again = workspace / "again"
    train_here(["train.py", f"--config={output / 'run.json'}", f"--output_dir={again}"])
    assert [row["loss"] for row in metrics(again)] == pytest.approx([row["loss"] for row in metrics(output)], rel=1e-6)


def test_a_continued_run_keeps_the_record_of_its_starts(workspace, train_here):
    output = workspace / "twice"
    train_here(flags(workspace, output, "--max_steps=4"))
    train_here(flags(workspace, output))
    record = json.loads((output / "run.json").read_text())
    assert record["arguments"]["max_steps"] == 6 and "earlier" not in record["earlier"][0]
    assert [start["arguments"]["max_steps"] for start in record["earlier"]] == [4]


def test_a_refused_continuation_is_not_recorded(workspace, finished, train_here, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(ValueError, match="learning_rate: 0.001 then, 0.5 now"):
        train_here(flags(workspace, tmp_path / "run", "--learning_rate=0.5"))
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_another_number_of_processes_is_refused_for_a_recorded_run(finished, train_here, monkeypatch, capsys):
    """The record holds batch, accumulation and global batch: on two processes they contradict each other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        train_here(["train.py", f"--config={finished[0] / 'run.json'}"])
    assert "x 2 processes is 8" in capsys.readouterr().err


def test_the_revision_of_a_changed_checkout(tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert git_revision(package) is None
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "of something else")
    assert git_revision(package) is None  # a repository, but not of this file
    git("add", "package")
    git("commit", "-q", "-m", "first")
    assert git_revision(package) == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    (package / "__init__.py").write_text("changed = True\n")
    assert git_revision(package)["dirty"] is True


# ------------------------------------------------------------------------------------------------- start


def test_the_start_tells_what_will_be_done(finished):
    _, shown = finished
    assert "train 24 clips, 8 sessions of 8 players; validation 6 clips, 2 sessions of 2 players" in shown
    assert "6 steps = 1.00 epochs; warm-up 0, decay 0" in shown
    assert "4 clips = 1 process x 4 x 1 accumulated" in shown
    assert (
        "layers of width 48 (random)" in shown
        and "GB a device, estimate" in shown
        and shown.count("parameters, trained") == 1
    )


@pytest.mark.slow
def test_of_two_processes_one_speaks_for_both(workspace):
    output = workspace / "two"
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, *flags(workspace, output, "--per_device_batch_size=2")]
    more = ["--max_steps=2", "--global_batch_size=8", "--eval_every=0", "--hardware_tflops=0.5"]
    result = subprocess.run([*command, *more], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("8 clips = 2 processes x 2 x 2 accumulated") == 1
    record = json.loads((output / "run.json").read_text())
    assert record["processes"] == len(record["devices"]) == 2
    row = metrics(output)[-1]
    assert row["tokens_per_second"] == pytest.approx(row["clips_per_second"] * 8 * 6)
    assert row["mfu"] == pytest.approx(row["model_tflops_per_second"] / (2 * 0.5))
    # A mistake is told once too.
    refused = subprocess.run(
        [*command, "--global_batch_size=7"], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert refused.returncode != 0 and refused.stderr.count("--global_batch_size 7 is no multiple of") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--per_device_batch_size=25"], "split train: has 24 clips, a step takes 25"),
        (["--warmup_steps=5", "--decay_steps=2"], "warmup_steps 5 and decay_steps 2 do not fit in max_steps 6"),
        (
            ["--action_space=vpt-38", "--model_config={finished}"],
            "--action_space has 38 columns, the model of .* has 13",
        ),
    ],
)
def test_mistakes_are_named_before_anything_is_written(workspace, finished, train_here, more, message):
    output = workspace / "mistakes"
    more = [flag.format(finished=finished[0]) for flag in more]
    with pytest.raises(ValueError, match=message):
        train_here(flags(workspace, output, *more))
    assert not output.exists()


def test_an_output_that_is_a_file_is_refused(workspace, train_here, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--output_dir .*file/run: .*file is a file, expected a folder or nothing"):
        train_here(flags(workspace, tmp_path / "file" / "run"))


def test_an_output_that_holds_another_model_is_refused(workspace, finished, train_here, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match="holds a model .model.safetensors. but no run"):
        train_here(flags(workspace, tmp_path))
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


def test_an_output_without_write_access_is_refused(workspace, train_here, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root, who may run the tests, can write everywhere
    with pytest.raises(ValueError, match=r"--output_dir .*run: cannot be written to \(Permission denied: "):
        train_here(flags(workspace, tmp_path / "run"))


def test_bfloat16_on_a_device_without_it_is_refused(tmp_path, monkeypatch):
    arguments = argparse.Namespace(
        mixed_precision="bf16", max_steps=1, warmup_steps=0, decay_steps=0, output_dir=tmp_path
    )
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match="Tesla T4 has compute capability 7.5, bfloat16 needs 8.0"):
        check_arguments(arguments, torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    check_arguments(arguments, torch.device("cuda"))
    check_arguments(arguments, torch.device("cpu"))
