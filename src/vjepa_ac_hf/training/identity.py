"""What must be equal where a run is continued, and the check of it (docs/training.md, "Interruptions and resume").

Contents count, never paths: a copy of the data set or of the encoder is the same one. The ends of the schedule are
free, and all that changes how fast or how visibly steps are done.
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..loading.loader import clips_identity
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from ..records import weights_checksum

# Arguments that decide what a step computes, under the names that checkpoints have had from 0.2.0 on.
ARGUMENTS = (
    *("task", "seed", "per_device_batch_size", "gradient_accumulation_steps", "mixed_precision"),
    *("learning_rate", "start_learning_rate", "final_learning_rate", "encoder_learning_rate"),
    *("weight_decay", "max_grad_norm", "cache_dtype", "streaming"),
)
# Fields of every configuration that say nothing of the model; saving and pushing a model fill some of them in.
_GENERAL = frozenset({"architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path"})


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
        model: its configuration.
        processor: its action statistics and the frames' geometry.
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
    not have then counts as its default.

    Args:
        saved: `run_identity` as the checkpoint has it, or all arguments (before there was a list).
        current: of this start.
        checkpoint: named in the error.
        config_class: of the model, for defaults.

    Raises:
        ValueError: the fields that differ, with both values.
    """
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


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields under names with dots, as JSON gives them back."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name in _GENERAL:
            continue
        nested = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat
