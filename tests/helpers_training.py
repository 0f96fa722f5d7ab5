"""Runs of examples/train.py at tiny size: the model's sizes, the command line, and what a run leaves."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import python_forks
import torch
from helpers_clips import write_clips
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "encoder_config": {
        "crop_size": 32,
        "patch_size": 16,
        "hidden_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "pred_hidden_size": 48,
    "pred_num_hidden_layers": 2,
    "pred_num_attention_heads": 2,
}


def write_workspace(folder: Path, train: int = 24, validation: int = 6) -> Path:
    """`folder` with a data set in clips/ and a model's sizes in tiny.json, as `command` takes them."""
    write_clips(folder / "clips", train=train, validation=validation)
    (folder / "tiny.json").write_text(json.dumps(TINY))
    return folder


def command(workspace: Path, output: Path, *flags: str, dataset: str = "clips") -> list[str]:
    values = {"max_steps": 8, "per_device_batch_size": 4, "log_every": 1, "checkpoint_every": 4, "eval_every": 4}
    values |= {"num_workers": 0, "learning_rate": 1e-3}
    arguments = [f"--{k}={v}" for k, v in values.items()]
    return [
        *(str(ROOT / "examples" / "train.py"), "--dataset", str(workspace / dataset), "--output_dir", str(output)),
        *("--model_config", str(workspace / "tiny.json"), *arguments, *flags),
    ]


def run(arguments: list[str], processes: int = 1, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
    """A Python program in processes of its own on the CPU, with these environment variables."""
    defaults = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | defaults | variables
    if processes == 1:
        result = python_forks.run(arguments, env=environment, cwd=ROOT)
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        result = subprocess.run([*launcher, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def load_program(path: str = "examples/train.py") -> ModuleType:
    """A program of the repository as a module: a run without the seconds that a process takes to start."""
    name = f"{Path(path).stem}_program"
    specification = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses are looked up there
    specification.loader.exec_module(module)
    return module


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in metrics(output)]


def predictor_weights(output: Path) -> dict:
    return {k: v for k, v in load_file(output / "model.safetensors").items() if k.startswith("predictor.")}


def assert_same_weights(first: Path, second: Path) -> None:
    weights = predictor_weights(second)
    for name, tensor in predictor_weights(first).items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0, msg=name)


def evaluation_program(monkeypatch, workspace: Path, pictures: int):
    """`examples/evaluate.py` on `world` and `clips` of a folder: (output, *flags) -> what its metrics.json has."""
    program = load_program("examples/evaluate.py")

    def main(output: Path, *flags: object) -> dict:
        arguments = ["--model", workspace / "world", "--dataset", workspace / "clips", "--output", output, *flags]
        arguments += ["--num_pictures", pictures, "--shuffles", 2, "--device", "cpu", "--batch_size", 4]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        program.main()
        return json.loads((output / "metrics.json").read_text())

    return main
