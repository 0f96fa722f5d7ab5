"""Two processes on a CPU (gloo), by the real launchers: DDP, FSDP2, compiled; and the configuration files."""

import argparse
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from helpers_training import (
    ROOT,
    assert_same_weights,
    command,
    losses,
    metrics,
    predictor_weights,
    run,
    write_workspace,
)
from hub_server import HubServer
from safetensors.torch import load, load_file
from transformers import AutoModel

from vjepa_ac_hf import VJEPA2ACModel
from vjepa_ac_hf.modeling_vjepa2_ac import VJEPA2ACLayer
from vjepa_ac_hf.training import distributed
from vjepa_ac_hf.training.checkpoints import checkpoint_steps
from vjepa_ac_hf.training.presets import build_config

CONFIGS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "VJEPA2ACLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    return write_workspace(folder, validation=5)  # no multiple of two processes' batches


@pytest.fixture(scope="module")
def one_process(workspace):
    output = workspace / "one"
    run(command(workspace, output))
    return output


@pytest.fixture(scope="module")
def sharded(workspace):
    output = workspace / "sharded"
    run(command(workspace, output, "--per_device_batch_size=2"), processes=2, **FSDP2)
    return output


def assert_close_runs(output, reference, rel=1e-4):
    assert losses(output) == pytest.approx(losses(reference), rel=rel)
    for name in ("gradient_norm", "validation_loss", "validation_error"):
        values = [[row[name] for row in metrics(o) if name in row] for o in (output, reference)]
        assert values[0] and values[0] == pytest.approx(values[1], rel=10 * rel), name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configurations_are_as_accelerate_reads_them(path):
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert config.mixed_precision == "bf16" and config.num_machines == 1 and not config.use_cpu
    processes, kind = {"one_gpu": (1, "NO"), "ddp_8_gpus": (8, "MULTI_GPU"), "fsdp2_8_gpus": (8, "FSDP")}[path.stem]
    assert (config.num_processes, str(config.distributed_type).split(".")[-1]) == (processes, kind)
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == VJEPA2ACLayer.__name__


def test_every_parameter_takes_part_in_every_step():
    """So DDP need not search for unused ones; with one rollout step as with two."""
    model = VJEPA2ACModel(build_config("tiny", action_space="vpt-13"))
    inputs = {"features": torch.randn(1, 8, 16, 128), "actions": torch.randn(1, 7, 13), "states": torch.randn(1, 8, 2)}
    for auto_steps in (1, 2):
        model.zero_grad()
        model(**inputs, auto_steps=auto_steps).loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == {
            n for n, p in model.named_parameters() if n.startswith("predictor.")
        }


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_the_predictor_alone_is_communicated(workspace, tmp_path, fsdp):
    checks = [str(ROOT / "tests" / "distributed_checks.py"), str(workspace / "tiny.json"), str(tmp_path)]
    run(checks, processes=2, **FSDP2 if fsdp else {})
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["fsdp"] == fsdp and found["ddp"] != fsdp and found["ddp_left"] == 0
        assert found["encoder_unchanged"] and found["error"] < 1e-5 and found["class"] == "VJEPA2ACModel"
        assert all(name.startswith("predictor.") for name in found["trained"])
        assert found["sharded"] == (found["trained"] if fsdp else [])
        if fsdp:
            assert found["whole"] and found["finite"] and found["sharded_again"]
        else:
            assert found["own_gradients_differ"] and found["find_unused_parameters"] is False


@pytest.mark.slow
def test_fsdp2_equals_one_process_and_continues_under_ddp(workspace, one_process, sharded):
    """Checkpoints hold the whole predictor and its moments: a sharded run goes on without sharding."""
    assert_close_runs(sharded, one_process)
    saved = load_file(sharded / "checkpoints" / "step-00000004" / "predictor.safetensors")
    expected = load_file(one_process / "checkpoints" / "step-00000004" / "predictor.safetensors")
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in expected.items()}
    model = AutoModel.from_pretrained(sharded)
    assert type(model) is VJEPA2ACModel
    for name, tensor in predictor_weights(one_process).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    for name in ("encoder.embeddings.patch_embeddings.proj.weight",):
        torch.testing.assert_close(
            model.state_dict()[name], load_file(one_process / "model.safetensors")[name], rtol=0, atol=0
        )
    output = workspace / "as_ddp"
    shutil.copytree(sharded, output)
    shutil.rmtree(output / "checkpoints" / "step-00000008")
    result = run(command(workspace, output, "--per_device_batch_size=2"), processes=2)
    assert "step-00000004" in result.stdout
    assert_close_runs(output, sharded)


@pytest.mark.slow
def test_fsdp2_continued_equals_undisturbed(workspace, sharded):
    output = workspace / "sharded_again"
    shutil.copytree(sharded, output)
    shutil.rmtree(output / "checkpoints" / "step-00000008")
    run(command(workspace, output, "--per_device_batch_size=2"), processes=2, **FSDP2)
    assert losses(output) == losses(sharded)
    assert_same_weights(output, sharded)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(workspace, tmp_path):
    """Rank 1 signals itself in its third step; both leave after the same one, with one checkpoint of both."""
    script = tmp_path / "signalled.py"
    script.write_text(
        "import os, signal, sys, runpy\n"
        "from accelerate import Accelerator\n"
        "original, count = Accelerator.backward, 0\n"
        "def backward(self, *a, **k):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == 3 and self.process_index == 1:\n"
        "        os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    return original(self, *a, **k)\n"
        "Accelerator.backward = backward\n"
        f"sys.argv[0] = {str(ROOT / 'examples' / 'train.py')!r}\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print('STATUS', os.environ['RANK'], end.code, flush=True)\n"
    )
    arguments = command(workspace, tmp_path / "out", "--per_device_batch_size=2", "--checkpoint_every=100")
    result = run([str(script), *arguments[1:]], processes=2)
    assert "STATUS 0 75" in result.stdout and "STATUS 1 75" in result.stdout, result.stderr
    assert list(checkpoint_steps(tmp_path / "out" / "checkpoints")) == [3]
    states = load_file(tmp_path / "out" / "checkpoints" / "step-00000003" / "random.safetensors")
    assert len(states["torch"]) == 2


@pytest.mark.slow
def test_compiled_equals_eager(workspace, one_process):
    output = workspace / "compiled"
    run(command(workspace, output, "--compile"))
    assert_close_runs(output, one_process)
    assert set(predictor_weights(output)) == set(predictor_weights(one_process))


def launcher_environment(path: Path) -> dict[str, str]:
    """What `accelerate launch --config_file path --num_processes=2` sets for the processes that it starts."""
    flags = ["--config_file", str(path), "--num_processes=2", "examples/train.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(flags))
    environment = prepare_multi_gpu_env(arguments)
    return {k: v for k, v in environment.items() if k.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configurations_launch(workspace, one_process, path):
    """As the launcher starts them, but on a CPU and in float32 (the files say bf16).

    `accelerate launch --cpu` starts one process, whatever the file says: for several, its environment and torchrun.
    """
    output, flags = workspace / path.stem, ["--max_steps=4", "--mixed_precision=no"]
    if path.stem == "one_gpu":
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(path), "--cpu"]
        run([*launcher, *command(workspace, output, *flags)])
    else:
        flags.append("--per_device_batch_size=2")
        run(command(workspace, output, *flags), processes=2, **launcher_environment(path))
    record = json.loads((output / "run.json").read_text())
    assert record["processes"] == (1 if path.stem == "one_gpu" else 2)
    assert record["environment"].get("ACCELERATE_USE_FSDP") == ("true" if path.stem == "fsdp2_8_gpus" else None)
    assert losses(output) == pytest.approx(losses(one_process)[:4], rel=1e-4)


@pytest.mark.slow
def test_fsdp2_with_gradient_checkpointing(workspace, sharded):
    output = workspace / "checkpointed"
    flags = ["--per_device_batch_size=2", "--gradient_checkpointing"]
    run(command(workspace, output, *flags), processes=2, **FSDP2)
    assert_close_runs(output, sharded)


@pytest.mark.slow
def test_fsdp2_continues_what_ddp_left(workspace):
    plain, output = workspace / "plain", workspace / "as_fsdp2"
    run(command(workspace, plain, "--per_device_batch_size=2"), processes=2)
    shutil.copytree(plain, output)
    shutil.rmtree(output / "checkpoints" / "step-00000008")
    result = run(command(workspace, output, "--per_device_batch_size=2"), processes=2, **FSDP2)
    assert "continuing from" in result.stdout and "step-00000004" in result.stdout
    assert_close_runs(output, plain)


@pytest.mark.slow
def test_fsdp2_pushes_whole_models(workspace, tmp_path):
    """Checkpoints and the final model; the server has what the run left."""
    output = tmp_path / "pushed"
    with HubServer() as server:
        flags = ["--per_device_batch_size=2", "--max_steps=4", "--checkpoint_every=2", "--push_to_hub"]
        variables = {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_test", "HF_HOME": str(tmp_path / "hf")}
        variables |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        arguments = command(workspace, output, *flags, "--hub_model_id=org/world")
        result = run(arguments, processes=2, **FSDP2, **variables)
        assert result.stdout.count("pushed to org/world: all is up") == 1
        files = server.repositories[("model", "org/world")]
        assert server.commits[-1][1] == "Trained model, step 4"
        assert files["model.safetensors"] == (output / "model.safetensors").read_bytes()
        assert load(files["model.safetensors"]).keys() == VJEPA2ACModel.from_pretrained(output).state_dict().keys()


@pytest.mark.slow
def test_a_learning_rate_of_zero_changes_nothing(workspace):
    output = workspace / "zero"
    run(command(workspace, output, "--learning_rate=0", "--checkpoint_every=1", "--max_steps=3"))
    first, *_, last = checkpoint_steps(output / "checkpoints").values()
    weights = load_file(last / "predictor.safetensors")
    assert weights
    for name, tensor in load_file(first / "predictor.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0, msg=name)


def test_processes_that_accelerate_does_not_join_are_refused(tmp_path, monkeypatch):
    """torchrun on a machine without a GPU: each would train alone and write into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(distributed, "Accelerator", lambda **options: SimpleNamespace(num_processes=1))
    arguments = argparse.Namespace(
        mixed_precision="no", gradient_accumulation_steps=1, report_to="", output_dir=tmp_path, compile=False
    )
    arguments.loader_timeout = 60.0
    with pytest.raises(ValueError, match="2 processes were launched.*Accelerate runs 1.*ACCELERATE_USE_CPU=true"):
        distributed.build_accelerator(arguments)
