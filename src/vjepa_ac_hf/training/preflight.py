"""What can be known to go wrong before the first step, and what a run is told about itself when it starts."""

import argparse
import json
import logging
import os
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import flatten_dict

from ..configuration_vjepa2_ac import VJEPA2ACConfig
from ..loading.loader import clips_identity
from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from ..records import weights_checksum
from .checkpoints import checkpoint_steps
from .estimates import Memory, step_memory
from .optimization import check_schedule
from .presets import PRESETS

# Arguments that decide what a step computes, under the names that checkpoints have had from 0.2.0 on.
ARGUMENTS = (
    *("task", "seed", "per_device_batch_size", "gradient_accumulation_steps", "mixed_precision"),
    *("learning_rate", "start_learning_rate", "final_learning_rate", "encoder_learning_rate"),
    *("weight_decay", "max_grad_norm", "ema_decay", "cache_dtype", "streaming"),
)
# Fields of every configuration that say nothing of the model; saving and pushing a model fill some of them in.
_GENERAL = frozenset({"architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path"})

logger = logging.getLogger(__name__)

LARGE_PREDICTOR = 10  # times its encoder; V-JEPA 2-AC's has as many parameters as a ViT-L, a third of its own encoder's


def check_arguments(arguments: argparse.Namespace, device: torch.device) -> None:
    """Refuse what cannot end well: the schedule, the precision on this device, the output folder, also where the model
    is read from it.

    Raises:
        ValueError: naming the flag, what was found and what was expected.
    """
    check_schedule(arguments.max_steps, arguments.warmup_steps, arguments.decay_steps)
    if arguments.mixed_precision == "bf16" and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise ValueError(
                f"--mixed_precision bf16: {torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, "
                "bfloat16 needs 8.0 (Ampere) or newer: use --mixed_precision no"
            )
    _check_inputs(arguments)
    _check_output(arguments.output_dir)


def _check_inputs(arguments: argparse.Namespace) -> None:
    """What a run leaves has the names of what it reads: config.json, model.safetensors, README.md."""
    for name in ("model", "encoder", "model_config", "init_predictor", "dataset"):
        value = getattr(arguments, name, None)
        if value is None or value in PRESETS or value == "random":
            continue
        source = Path(value)
        folder = source.parent if source.name == "config.json" else source
        if folder.exists() and folder.resolve() == arguments.output_dir.resolve():
            raise ValueError(
                f"--output_dir {arguments.output_dir}: is the folder of --{name} {value}, which would be overwritten: "
                "choose another folder"
            )


def _check_output(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"--output_dir {folder}: {existing} is a file, expected a folder or nothing")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {folder}: cannot be written to ({error.strerror}: {existing})") from error
    is_run = (folder / "metrics.jsonl").is_file() or checkpoint_steps(folder / "checkpoints")
    if (folder / "model.safetensors").is_file() and not is_run:
        raise ValueError(
            f"--output_dir {folder}: holds a model (model.safetensors) but no run (metrics.jsonl, checkpoints), which "
            "would be overwritten: choose another folder"
        )


def check_batch(arguments: argparse.Namespace, clips: int) -> None:
    """Raise a ValueError where a step takes more clips than there are."""
    if arguments.global_batch_size > clips:
        raise ValueError(
            f"{arguments.dataset}, split train: has {clips} clips, a step takes {arguments.global_batch_size} "
            f"(--per_device_batch_size {arguments.per_device_batch_size} x --gradient_accumulation_steps "
            f"{arguments.gradient_accumulation_steps} x processes): lower them"
        )


# ------------------------------------------------------------------------------------------------- continued runs
# Contents count, never paths: a copy of the data set or of the encoder is the same one. The ends of the schedule are
# free, and all that changes how fast or how visibly steps are done.


def run_identity(
    arguments: argparse.Namespace,
    num_processes: int,
    model: PreTrainedModel,
    processor: VJEPA2ACProcessor,
    clips: Any,
    frozen: dict[str, nn.Module],
    **more: Any,
) -> dict[str, Any]:
    """JSON of what must be equal; the same in all processes.

    Args:
        arguments: the program's; those of `ARGUMENTS` that it has.
        num_processes: it is part of the order of clips.
        model, processor: their configuration, action statistics and the frames' geometry.
        clips: the training clips, not their cached features.
        frozen: by name, parts of the model whose weights a step reads from elsewhere than a checkpoint.
        more: of this program alone.
    """
    identity = {name: getattr(arguments, name) for name in ARGUMENTS if hasattr(arguments, name)}
    identity |= {"num_processes": num_processes, "model": json.loads(model.config.to_json_string())}
    identity |= {"action_statistics": processor.action_statistics, "resize_mode": processor.resize_mode}
    identity |= {f"{name}_weights": weights_checksum(part) for name, part in frozen.items()}
    return {**identity, "clips": clips_identity(clips), **more}


def check_same_run(
    saved: dict[str, Any],
    current: dict[str, Any],
    checkpoint: Path,
    config_class: type[PreTrainedConfig] | None = None,
) -> None:
    """Refuse to continue a run that was another one.

    What a checkpoint of an earlier version does not name is not compared; a field that the model's configuration did
    not have then counts as its default (`config_class`). `saved` is `run_identity` as the checkpoint has it, or all
    arguments (before there was a list), `current` that of this start.

    Raises:
        ValueError: the fields that differ, with both values.
    """
    saved = {"ema_decay": 0.0, **saved}  # before there was an average
    if isinstance(saved.get("head"), dict):  # heads of before: these names were the arguments' too
        saved = {**saved, "model": saved["head"], "encoder_weights": saved["encoder"]}
    then = _flat({name: value for name, value in saved.items() if name in current})
    now = _flat({name: value for name, value in current.items() if name in saved})
    added = {} if config_class is None else {f"model.{f.name}": f.default for f in fields(config_class)}
    then |= {name: added[name] for name in added.keys() & now.keys() - then.keys()}
    differing = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
    if differing:
        details = "; ".join(f"{k}: {then.get(k)!r} then, {now.get(k)!r} now" for k in differing)
        raise ValueError(
            f"{checkpoint} was made with other arguments ({details}). Start with the same ones, with another "
            "--output_dir, or with --resume never"
        )


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Nested fields under names with dots, as JSON gives them back."""
    return {name: value for name, value in flatten_dict(values).items() if _GENERAL.isdisjoint(name.split("."))}


# ------------------------------------------------------------------------------------------------------- summary


def _described(clips: Any) -> str:
    if clips is None:
        return "none"
    if not isinstance(clips, Dataset):
        return f"{len(clips):,} clips (stream)"
    players, sessions = (len(clips.unique(f"{unit}_id")) for unit in ("player", "session"))
    return f"{len(clips):,} clips, {sessions:,} sessions of {players:,} players"


def run_memory(
    arguments: argparse.Namespace, config: VJEPA2ACConfig, frozen: int, trained: int, checkpointed: bool
) -> Memory:
    """Estimate of what a run takes of each device, of its numbers of parameters."""
    return step_memory(
        *(config, frozen, trained, arguments.per_device_batch_size),
        bf16=arguments.mixed_precision == "bf16",
        gradient_checkpointing=checkpointed,
        cached_features=arguments.cache_features is not None,
        averaged=arguments.ema_decay > 0,
        device="cuda" if arguments.dry_run or torch.cuda.is_available() else "cpu",
    )


def startup_summary(
    arguments: argparse.Namespace, model: VJEPA2ACModel, encoder: str, splits: tuple, processes: int
) -> str:
    """Data, length, sizes and estimated memory of a run, for people.

    `encoder` says where the model's comes from, `splits` are the training clips, and the validation clips used or None.
    """
    config, sizes = model.config, model.config.encoder_config
    assert isinstance(config, VJEPA2ACConfig)
    train, validation = splits
    trained, frozen = (sum(p.numel() for p in part.parameters()) for part in (model.predictor, model.encoder))
    if trained > LARGE_PREDICTOR * frozen:
        logger.warning(
            "the predictor has %s parameters, %.0f times as many as its encoder (%s): pred_hidden_size and "
            "pred_num_hidden_layers of --model_config make it smaller",
            *(f"{trained:,}", trained / frozen, f"{frozen:,}"),
        )
    memory = run_memory(arguments, config, frozen, trained, arguments.gradient_checkpointing)
    epochs = arguments.max_steps * arguments.global_batch_size / len(train)
    average = f"; the model is their average over training, decay {arguments.ema_decay}" if arguments.ema_decay else ""
    lines = [
        f"data            train {_described(train)}; validation {_described(validation)}",
        f"run             {arguments.max_steps:,} steps = {epochs:.2f} epochs; warm-up {arguments.warmup_steps:,}, "
        f"decay {arguments.decay_steps:,}",
        f"step            {arguments.global_batch_size} clips = {processes} process{'es' * (processes > 1)} x "
        f"{arguments.per_device_batch_size} x {arguments.gradient_accumulation_steps} accumulated",
        f"predictor       {trained:,} parameters, trained: {config.pred_num_hidden_layers} layers of width "
        f"{config.pred_hidden_size}{average}",
        f"encoder         {frozen:,} parameters, frozen: {sizes.num_hidden_layers} layers of width "
        f"{sizes.hidden_size} ({encoder})",
        f"memory          {memory.total / 1e9:.1f} GB a device, estimate",
        f"output          {os.path.abspath(arguments.output_dir)}",
    ]
    return "\n".join(lines)
