"""`--dry_run`: everything checked, one step on tensors without data, and what a run will take (docs/training.md)."""

import argparse
import copy
from typing import Any

import torch

from ..configuration_encoder_vjepa2_ac import EncoderFields
from ..configuration_vjepa2_ac import VJEPA2ACConfig
from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..records import versions, write_json
from .arguments import number_of_processes
from .estimates import HARDWARE, as_dict, encoder_tokens, peak_tflops, predictor_tokens, step_flops, training_hours
from .optimization import check_schedule
from .preflight import run_memory


def dry_run(arguments: argparse.Namespace, config: VJEPA2ACConfig, clips: int | None = None) -> str:
    """One training step on the meta device (shapes alone: no data, no memory, no weights), then the estimates.

    The step has two layers of predictor and encoder (of this as many as it taps), since all layers are alike; what is
    counted has them all. `clips` are those of the training split, where the data set was given.

    Returns:
        What to show; the same as JSON is in `--dry_run_json`.
    """
    check_schedule(arguments.max_steps, arguments.warmup_steps, arguments.decay_steps)
    _one_step(arguments, config)
    with torch.device("meta"):
        model = VJEPA2ACModel(config)
    results = estimate(arguments, config, model, clips)
    if arguments.dry_run_json is not None:
        write_json(arguments.dry_run_json, results)
    return as_text(arguments, results)


def _one_step(arguments: argparse.Namespace, config: VJEPA2ACConfig) -> None:
    batch, config = arguments.per_device_batch_size, copy.deepcopy(config)
    assert config.action_dim is not None
    config.pred_num_hidden_layers = min(config.pred_num_hidden_layers, 2)
    encoder = config.encoder_config
    taps = EncoderFields.of(encoder).hierarchical_layers
    encoder.num_hidden_layers = min(encoder.num_hidden_layers, 2 if taps is None else len(taps))
    if taps is not None:
        encoder.hierarchical_layers = list(range(len(taps)))
    with torch.device("meta"):
        model = VJEPA2ACModel(config)
        inputs = {
            "actions": torch.empty(batch, config.num_steps - 1, config.action_dim),
            "states": torch.empty(batch, config.num_steps, config.state_dim),
        }
        if arguments.cache_features:
            inputs["features"] = torch.empty(batch, config.num_steps, config.num_tokens, config.feature_size)
        else:
            inputs["pixel_values_videos"] = torch.empty(batch, config.frames_per_clip, 3, *config.frame_shape)
    model.train()
    model(**inputs).loss.backward()
    missing = [name for name, p in model.predictor.named_parameters() if p.grad is None]
    assert not missing, f"no gradient for {missing}"


def estimate(
    arguments: argparse.Namespace, config: VJEPA2ACConfig, model: VJEPA2ACModel, clips: int | None = None
) -> dict[str, Any]:
    """Sizes (exact) and estimates of a run, JSON."""
    cached, bf16 = arguments.cache_features is not None, arguments.mixed_precision == "bf16"
    processes, batch = number_of_processes(arguments), arguments.per_device_batch_size
    frozen, trainable = (sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.predictor))
    memory = {
        str(checkpointed).lower(): as_dict(run_memory(arguments, config, frozen, trainable, checkpointed))
        for checkpointed in (False, True)
    }
    flops = step_flops(config, batch, cached_features=cached, gradient_checkpointing=arguments.gradient_checkpointing)
    passes = arguments.gradient_accumulation_steps * processes
    results = {
        "parameters": {"trainable": trainable, "frozen": frozen},
        "processes": processes,
        "clips_per_step": arguments.global_batch_size,
        "tokens_per_step": {
            "predictor": passes * predictor_tokens(config, batch),
            "encoder": 0 if cached else passes * encoder_tokens(config, batch),
        },
        "flops_per_step": {name: passes * value for name, value in as_dict(flops).items()},
        "steps": arguments.max_steps,
        "epochs": None if clips is None else arguments.max_steps * arguments.global_batch_size / clips,
        "clips": clips,
        "memory_bytes_by_gradient_checkpointing": memory,
        "hours": None,
        "versions": versions(),
    }
    tflops = peak_tflops(arguments.hardware, arguments.hardware_tflops, bf16)
    if tflops is not None:
        hours = training_hours(passes * flops.computed, arguments.max_steps, processes, tflops, arguments.mfu)
        results["hours"] = {"estimate": hours, "tflops_of_a_device": tflops, "devices": processes, "mfu": arguments.mfu}
    return results


def as_text(arguments: argparse.Namespace, results: dict[str, Any]) -> str:
    """The estimates for people."""
    parameters, tokens, flops = results["parameters"], results["tokens_per_step"], results["flops_per_step"]
    devices, clips = results["processes"], results["clips"]
    lines = [
        "dry run: a step on shapes alone went through; no weights, features or gradients were made",
        f"parameters      {parameters['trainable']:,} trained (predictor), {parameters['frozen']:,} frozen (encoder)",
        f"step            {results['clips_per_step']} clips = {devices} processes x "
        f"{arguments.per_device_batch_size} x {arguments.gradient_accumulation_steps} accumulated; "
        f"{tokens['predictor']:,} predictor tokens, {tokens['encoder']:,} encoder tokens",
        f"run             {results['steps']:,} steps"
        + ("" if clips is None else f" = {results['epochs']:.2f} epochs of {clips:,} clips"),
        f"operations      {flops['computed']:.4g} FLOP a step: encoder {flops['encoder']:.3g}, predictor forward "
        f"{flops['predictor_forward']:.3g}, backward {flops['predictor_backward']:.3g}"
        + (f", recomputed {flops['recomputed']:.3g}" if flops["recomputed"] else ""),
    ]
    hours, memories = results["hours"], results["memory_bytes_by_gradient_checkpointing"]
    chosen = str(arguments.gradient_checkpointing).lower()
    for checkpointed, memory in memories.items():
        parts = ", ".join(f"{name} {memory[name] / 1e9:.2f}" for name in memory if name != "total")
        label = "with" if checkpointed == "true" else "without"
        lines.append(
            f"memory          {memory['total'] / 1e9:.1f} GB a device {label} gradient checkpointing, estimate "
            f"({parts}){'   <- this run' if checkpointed == chosen else ''}"
        )
    if hours is None:
        lines.append("hours           not estimated: give --hardware h100x8, or --hardware_tflops and --devices")
        return "\n".join(lines)
    lines.append(
        f"hours           {hours['estimate']:.1f}, estimate: {hours['devices']} devices at {hours['mfu']:.0%} of "
        f"{hours['tflops_of_a_device']:g} TFLOP/s; loading, validation and checkpoints not counted"
    )
    name, total = (arguments.hardware or "").lower().partition("x")[0], memories[chosen]["total"]
    if name and total > HARDWARE[name].memory:
        lines.append(
            f"warning         {total / 1e9:.1f} GB do not fit in the {HARDWARE[name].memory / 1e9:.0f} GB of this "
            f"device ({name}): lower --per_device_batch_size or use --gradient_checkpointing"
        )
    return "\n".join(lines)
