"""Checkpoints of a training run: predictor, optimizer, schedule, random state and position, without a pickle.

A checkpoint is a folder `step-00000100` of safetensors and JSON. It is written under a temporary name and renamed when
complete, so a folder that carries the final name is whole. The frozen encoder is not in it.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

_NAME = re.compile(r"step-(\d{8})")


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """Complete checkpoints of a folder by step, ascending."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint to continue from: "auto" the newest complete one or None, "never" None, else that path.

    Raises:
        ValueError: a path that is no checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        steps = checkpoint_steps(folder)
        return steps[max(steps)] if steps else None
    path = Path(resume)
    if not (path / "trainer_state.json").is_file():
        raise ValueError(f"--resume {resume}: no checkpoint there (trainer_state.json is missing)")
    return path


def save_checkpoint(
    folder: Path, step: int, predictor: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write `folder/step-<step>`; `state` is JSON (schedule, arguments, position)."""
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(
        {k: v.detach().contiguous().cpu() for k, v in predictor.state_dict().items()},
        temporary / "predictor.safetensors",
    )
    save_file(_optimizer_tensors(predictor, optimizer), temporary / "optimizer.safetensors")
    save_file({"torch": torch.get_rng_state()}, temporary / "random.safetensors")
    (temporary / "trainer_state.json").write_text(json.dumps({"step": step, **state}, indent=2))
    for path in temporary.iterdir():
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    _flush(folder)
    return final


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's step and what was saved as its `state`."""
    return json.loads((path / "trainer_state.json").read_text())


def load_checkpoint(path: Path, predictor: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors back.

    Raises:
        RuntimeError: the predictor of the checkpoint has other parameters or shapes.
        ValueError: the optimizer's state does not cover the predictor's parameters.
    """
    predictor.load_state_dict(load_file(path / "predictor.safetensors"), strict=True)
    _load_optimizer_tensors(predictor, optimizer, load_file(path / "optimizer.safetensors"), path)
    torch.set_rng_state(load_file(path / "random.safetensors")["torch"])


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what an interrupted writer left."""
    steps = checkpoint_steps(folder)
    for step in sorted(steps)[: max(len(steps) - keep, 0)]:
        shutil.rmtree(steps[step])
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path)


def _optimizer_tensors(predictor: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in predictor.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}:{key}"] = torch.as_tensor(value).detach().contiguous().cpu()
    return tensors


def _load_optimizer_tensors(
    predictor: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], path: Path
) -> None:
    parameters = dict(predictor.named_parameters())
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(":")
        if name not in parameters:
            raise ValueError(f"{path}: optimizer state for {name!r}, which the predictor does not have")
        # AdamW keeps its step counter on the CPU, its moments beside the parameter.
        device = tensor.device if key == "step" else parameters[name].device
        optimizer.state[parameters[name]][key] = tensor.to(device)
    missing = [n for n, p in parameters.items() if p not in optimizer.state]
    if missing and tensors:
        raise ValueError(f"{path}: no optimizer state for {missing[:3]} and {max(len(missing) - 3, 0)} others")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
