"""Checkpoints of a training run: predictor, optimizer, schedule, random states and position, without a pickle.

A checkpoint is a folder `step-00000100` of safetensors and JSON. It is written under a temporary name, flushed to the
disk and renamed when complete; `files.json` in it holds the size and checksum of every other file, so that what a disk
loses afterwards is noticed. The frozen encoder is not in it. Tensors are whole, however the run shards them.

A folder that is not to be continued from is renamed, never removed: `damaged-step-...`, `superseded-step-...`.
(docs/training.md, "Interruptions and resume")
"""

import contextlib
import json
import logging
import os
import random
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..records import flush, write_json
from .averages import WeightAverage
from .distributed import full_tensor, shard_like

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8})")
FILES = ("predictor.safetensors", "optimizer.safetensors", "random.safetensors", "trainer_state.json")
AVERAGE = "average.safetensors"  # of a run with --ema_decay: what is the model


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """Complete checkpoints of a folder by step, ascending."""
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.glob("step-*") if path.is_dir())
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint to continue from: "auto" the newest that is whole or None, "never" None, else that path.

    With "auto", damaged checkpoints are set aside, each with a warning, and the one before is taken.

    Raises:
        ValueError: a path that is no checkpoint or is damaged (the file is named); checkpoints of which none is whole;
            a checkpoint of version 0.1.0.
    """
    if resume == "never":
        return None
    if resume != "auto":
        chosen = Path(resume)
        if not (chosen / "trainer_state.json").is_file():
            raise ValueError(f"--resume {resume}: no checkpoint there (trainer_state.json is missing)")
        if (damage := find_damage(chosen)) is not None:
            raise ValueError(f"--resume {resume}: this checkpoint is damaged: {damage}")
        return chosen
    found = checkpoint_steps(folder)
    for path in reversed(found.values()):
        damage = find_damage(path)
        if damage is None:
            return path
        _set_aside(path, "damaged", damage)
    if found:
        raise ValueError(f"{folder}: all checkpoints are damaged; --resume never starts anew")
    return None


def set_aside_newer(folder: Path, chosen: Path | None, resume: str) -> None:
    """Set aside the checkpoints of `folder` that are newer than `chosen` (None: all): the run would otherwise continue
    from them later."""
    step = -1 if chosen is None else read_state(chosen)["step"]
    reason = "--resume never starts anew" if resume == "never" else f"the run continues from {chosen}"
    for other, path in checkpoint_steps(folder).items():
        if other > step or (other == step and chosen is not None and path.resolve() != chosen.resolve()):
            _set_aside(path, "superseded", reason)


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, with names and values; None: nothing.

    Raises:
        ValueError: a checkpoint of version 0.1.0.
    """
    if not (path / "files.json").exists() and (path / "trainer_state.json").is_file():
        with contextlib.suppress(json.JSONDecodeError):
            if "loader" not in read_state(path):
                raise ValueError(
                    f"{path}: written by version 0.1.0, without the place in the data and the random states that a "
                    "continuation needs; --resume never starts anew, and sets it aside"
                )
    try:
        expected = json.loads((path / "files.json").read_text())
        if set(expected) - {AVERAGE} != set(FILES):
            return f"files.json lists {sorted(expected)}, expected {sorted(FILES)}"
        for name, entry in expected.items():
            found = _checksum(path / name)
            if found != entry:
                return f"{name}: found {found}, expected {entry}"
    except (OSError, json.JSONDecodeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def write_checksums(path: Path) -> None:
    """`files.json` of a checkpoint, as its files are now."""
    files = sorted(file for file in path.iterdir() if file.name != "files.json")
    write_json(path / "files.json", {file.name: _checksum(file) for file in files})


def save_checkpoint(
    folder: Path,
    step: int,
    predictor: nn.Module,
    optimizer: torch.optim.Optimizer,
    random_state: dict[str, Tensor],
    state: dict[str, Any],
    accelerator: Accelerator,
    average: WeightAverage | None = None,
) -> Path:
    """Write `folder/step-<step>`, sharded or not; all processes must call it, the main one writes.

    `step` counts finished optimizer steps; `random_state` is this process's (`get_random_state`); `state` is JSON:
    schedule, arguments, place in the data.
    """
    parts = {"predictor.safetensors": predictor.state_dict()}
    if average is not None:
        parts[AVERAGE] = {**predictor.state_dict(), **average.tensors}  # buffers as they are
    states = ((name, optimizer.state.get(parameter, {})) for name, parameter in predictor.named_parameters())
    moments = {f"{name}:{key}": torch.as_tensor(value) for name, state in states for key, value in state.items()}
    parts["optimizer.safetensors"] = moments
    files = {file: {k: _on_main(v, accelerator) for k, v in part.items()} for file, part in parts.items()}
    device = accelerator.device
    files["random.safetensors"] = {k: gather(v[None].to(device)).cpu() for k, v in random_state.items()}
    final = folder / f"step-{step:08d}"
    if accelerator.is_main_process:
        temporary = folder / f".{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for file, tensors in files.items():
            save_file(tensors, temporary / file)
        write_json(temporary / "trainer_state.json", {"step": step, **state})
        write_checksums(temporary)
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        if final.exists():
            _set_aside(final, ".replaced", "written anew")
        os.replace(temporary, final)
        flush(folder)
    accelerator.wait_for_everyone()
    return final


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's step and what was saved as its `state`."""
    return json.loads((path / "trainer_state.json").read_text())


def load_checkpoint(
    path: Path,
    predictor: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    average: WeightAverage | None = None,
) -> None:
    """Put a checkpoint's tensors back, after the model and optimizer were prepared, whatever shards them.

    Raises:
        ValueError: parameters, shapes, or number of processes differ.
    """
    saved = load_file(path / "predictor.safetensors")
    own = predictor.state_dict()
    differing = [
        n for n in own.keys() | saved.keys() if n not in own or n not in saved or own[n].shape != saved[n].shape
    ]
    if differing:
        raise ValueError(f"{path}: the predictor has other parameters: {sorted(differing)[:3]} of {len(differing)}")
    _copy(saved, own)
    if average is not None:
        _copy(load_file(path / AVERAGE), average.tensors)
    _load_optimizer_tensors(predictor, optimizer, load_file(path / "optimizer.safetensors"), path)
    states = load_file(path / "random.safetensors")
    if len(states["torch"]) != accelerator.num_processes:
        raise ValueError(f"{path}: random states of {len(states['torch'])} processes, {accelerator.num_processes} now")
    set_random_state({k: v[accelerator.process_index] for k, v in states.items()}, accelerator.device)


def get_random_state(device: torch.device) -> dict[str, Tensor]:
    """State of this process's random generators (Python, NumPy, torch, the device), as tensors."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor(float("nan") if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    gauss = states["python_gauss"].item()
    random.setstate((3, tuple(states["python"].tolist()), None if np.isnan(gauss) else gauss))
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, states["numpy_gauss"].item()))
    # Copies: torch reads a state from the start of its memory, even if the tensor is a later row of a larger one.
    torch.set_rng_state(states["torch"].clone())
    if device.type == "cuda" and "device" in states:
        torch.cuda.set_rng_state(states["device"].clone(), device)


def prune_checkpoints(folder: Path, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and that of step `best`, and what an interrupted writer left."""
    steps = checkpoint_steps(folder)
    for step in sorted(steps)[: max(len(steps) - keep, 0)]:
        if step != best:
            # Renamed first: a removal that is cut off leaves nothing that looks like a checkpoint.
            doomed = folder / f".step-{step:08d}.old"
            os.replace(steps[step], doomed)
            shutil.rmtree(doomed)
    for path in (*folder.glob(".step-*.tmp"), *folder.glob(".step-*.old"), *folder.glob(".replaced-step-*")):
        shutil.rmtree(path)


def _set_aside(path: Path, prefix: str, reason: str) -> None:
    number, target = 1, path.with_name(f"{prefix}-{path.name}")
    while target.exists():
        number, target = number + 1, path.with_name(f"{prefix}-{path.name}.{number}")
    os.replace(path, target)
    if not prefix.startswith("."):
        logger.warning("%s is not continued from (%s); it is now %s", path, reason, target.name)


def _checksum(path: Path) -> dict[str, int]:
    checksum, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"bytes": size, "crc32": checksum}


def _on_main(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """A tensor in full on the CPU of the main process; elsewhere an empty one."""
    whole = full_tensor(tensor.detach())
    return whole.contiguous().cpu() if accelerator.is_main_process else torch.empty(0)


@torch.no_grad()
def _copy(whole: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(shard_like(whole[name], tensor))


def _load_optimizer_tensors(
    predictor: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], path: Path
) -> None:
    parameters = dict(predictor.named_parameters())
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(":")
        if name not in parameters:
            raise ValueError(f"{path}: optimizer state for {name!r}, which the predictor does not have")
        # AdamW keeps its step counter on the CPU, its moments beside the parameter.
        optimizer.state[parameters[name]][key] = tensor if key == "step" else shard_like(tensor, parameters[name])
    missing = [n for n, p in parameters.items() if p not in optimizer.state]
    if missing and tensors:
        raise ValueError(f"{path}: no optimizer state for {missing[:3]} and {max(len(missing) - 3, 0)} others")
