"""Train an action-conditioned world model on a built data set of VPT tubelets.

    accelerate launch examples/train.py --dataset DIR_OR_REPO --output_dir OUT --mixed_precision bf16

The encoder is frozen; only the predictor is trained, with teacher forcing and rollout losses (docs/model.md). Leaves in
OUT: config.json, model.safetensors, processor_config.json, README.md and the model's code (load the folder with
AutoModel and AutoProcessor), metrics.jsonl, and checkpoints/step-00001000. Exit status 0 only when all steps are done.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

# This folder holds evaluate.py, which must not hide the library of that name.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

import torch
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed
from datasets import get_dataset_split_names
from tqdm.auto import tqdm
from transformers import VJEPA2Config

from vjepa_ac_hf import ACTION_COLUMNS, VJEPA2ACConfig, VJEPA2ACModel, VJEPA2ACProcessor
from vjepa_ac_hf.data.loader import ClipLoader
from vjepa_ac_hf.data.loading import (
    check_clips,
    load_action_statistics,
    load_clips,
)
from vjepa_ac_hf.evaluation.clips import spread
from vjepa_ac_hf.records import versions
from vjepa_ac_hf.training.arguments import parse_arguments
from vjepa_ac_hf.training.checkpoints import (
    find_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
)
from vjepa_ac_hf.training.dry_run import dry_run
from vjepa_ac_hf.training.feature_cache import cache_features
from vjepa_ac_hf.training.health import SPEED, Health
from vjepa_ac_hf.training.hub import model_card, prepare_repository, push_folder, save_final_model
from vjepa_ac_hf.training.optimization import build_optimizer, build_scheduler
from vjepa_ac_hf.training.pictures import check_pictures, log_pictures
from vjepa_ac_hf.training.preflight import check_arguments, check_batch, startup_summary
from vjepa_ac_hf.training.presets import DEFAULT_ENCODERS, build_config
from vjepa_ac_hf.training.run_log import MetricsLog, check_same_run, jsonable
from vjepa_ac_hf.training.run_record import write_run_record
from vjepa_ac_hf.training.trackers import check_trackers, closing_trackers, log_metrics, start_trackers
from vjepa_ac_hf.training.validation import ValidationSet, validate

logger = get_logger(__name__)  # of the main process alone
MODEL_CARD = Path(__file__).resolve().parents[1] / "model_cards" / "model_card.md"


def build_configuration(arguments: argparse.Namespace) -> tuple[VJEPA2ACConfig, str]:
    """The model's configuration, and where its encoder comes from ("random": random weights)."""
    space = arguments.action_space
    if space is not None and ("," in space or space in ACTION_COLUMNS):
        space = space.split(",")
    default = DEFAULT_ENCODERS.get(arguments.model_config, "random")
    encoder = arguments.encoder or default
    # A dry run needs no network: a preset holds the sizes of its own encoder.
    known = encoder == "random" or (arguments.dry_run and encoder == default)
    config = build_config(
        arguments.model_config,
        encoder_config=None if known else VJEPA2Config.from_pretrained(encoder),
        action_space=space,
        auto_steps=arguments.auto_steps,
        loss_type=arguments.loss_type,
    )
    return config, encoder


def build_processor(arguments: argparse.Namespace, config: VJEPA2ACConfig) -> VJEPA2ACProcessor:
    return VJEPA2ACProcessor(
        resolution=config.encoder_config.crop_size,
        resize_mode=arguments.resize_mode,
        frames_per_clip=config.frames_per_clip,
        tubelet_size=config.encoder_config.tubelet_size,
        action_space=config.action_space,
        action_statistics=load_action_statistics(arguments.dataset, arguments.action_stats).to_dict(),
    )


def load_splits(arguments: argparse.Namespace, processor: VJEPA2ACProcessor):
    """Training clips and, where the data set has them, validation clips spread over the split; both checked."""
    train = load_clips(arguments.dataset, "train", streaming=arguments.streaming)
    check_clips(train, processor, f"{arguments.dataset}, split train")
    if not arguments.eval_every:
        return train, None
    if "validation" not in get_dataset_split_names(arguments.dataset):
        logger.warning("%s has no validation split: nothing is validated during training", arguments.dataset)
        return train, None
    validation = load_clips(arguments.dataset, "validation")
    check_clips(validation, processor, f"{arguments.dataset}, split validation")
    # As examples/evaluate.py --max_clips chooses them, so that both programs give the same figures.
    return train, validation.select(spread(len(validation), arguments.eval_clips))


def build_loaders(arguments, accelerator, model, processor, train, validation):
    """Endless training batches of this process, and the clips to validate on."""
    source = validation
    size, workers = arguments.per_device_batch_size, arguments.num_workers
    rank, world_size = accelerator.process_index, accelerator.num_processes
    if arguments.cache_features:
        options = {
            "dtype": arguments.cache_dtype,
            "batch_size": size,
            "num_workers": workers,
            "prefetch_factor": arguments.prefetch_factor,
            "announce": accelerator.print,
        }
        if validation is not None:  # first: it is small, and what is wrong with it is known before the long build
            folder = arguments.cache_features / f"validation-{len(validation)}"
            validation = cache_features(model, validation, processor, folder, accelerator, **options)
        train = cache_features(model, train, processor, arguments.cache_features / "train", accelerator, **options)
    batches = ClipLoader(
        *(train, processor, size),
        seed=arguments.seed,
        rank=rank,
        world_size=world_size,
        window=arguments.shuffle_buffer,
        num_workers=workers,
        prefetch_factor=arguments.prefetch_factor,
        device=accelerator.device,
    )
    if validation is not None:
        validation = ValidationSet(
            *(validation, source, processor, accelerator),
            batch_size=size,
            num_workers=workers,
            prefetch_factor=arguments.prefetch_factor,
        )
    return batches, validation


def train_step(arguments, accelerator, model, optimizer, batches, health) -> tuple[torch.Tensor, float]:
    """One optimizer step. Returns (loss, teacher forcing, rollout), means over all processes, and the gradient norm.

    Raises:
        FloatingPointError: a loss or gradient that is not finite; no parameter has been changed by it.
    """
    losses, clips = torch.zeros(3, device=accelerator.device), []
    for _ in range(arguments.gradient_accumulation_steps):
        batch = next(batches)
        clips += batch.pop("clips")
        with accelerator.accumulate(model):
            output = model(**batch)
            accelerator.backward(output.loss)
        health.observe(output)
        losses += torch.stack([output.loss, output.teacher_forcing_loss, output.rollout_loss]).detach()
    losses = accelerator.reduce(losses / arguments.gradient_accumulation_steps, reduction="mean")
    gradient_norm = float(accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm))
    if not (torch.isfinite(losses).all() and math.isfinite(gradient_norm)):
        raise FloatingPointError(
            f"loss {losses[0].item()} with gradient norm {gradient_norm}: training stopped before the parameters were "
            f"changed. Clips of this process in the step: {', '.join(clips)}"
        )
    optimizer.step()
    optimizer.zero_grad()
    return losses, gradient_norm


def train(arguments, accelerator, model, processor, splits) -> dict:
    """Optimise until `max_steps`, writing metrics and checkpoints. Returns the last logged metrics."""
    folder = arguments.output_dir / "checkpoints"
    given = jsonable({**vars(arguments), "num_processes": accelerator.num_processes})
    optimizer = build_optimizer(model.predictor, arguments.learning_rate, arguments.weight_decay)
    scheduler = build_scheduler(
        *(optimizer, arguments.max_steps, arguments.warmup_steps, arguments.decay_steps),
        arguments.start_learning_rate,
        arguments.final_learning_rate,
    )
    step, loader_state, checkpoint = 0, None, find_checkpoint(folder, arguments.resume)
    if checkpoint is not None:
        state = read_state(checkpoint)
        check_same_run(state["arguments"], given, checkpoint)
        load_checkpoint(checkpoint, model.predictor, optimizer)
        step, loader_state = state["step"], state.get("loader", {})
        scheduler.load_state_dict(state["schedule"])
        accelerator.print(f"continuing from {checkpoint}")

    config = {**given, "model": model.config.to_dict(), "versions": versions()}
    start_trackers(accelerator, arguments.output_dir, config, step)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    loader, validation = build_loaders(arguments, accelerator, model, processor, *splits)
    if loader_state is not None:
        loader.load_state_dict(loader_state)
    write_run_record(arguments, accelerator)
    log = MetricsLog(arguments.output_dir / "metrics.jsonl", step) if accelerator.is_main_process else None
    health = Health(model, arguments, accelerator)
    batches, metrics, started, logged = health.timed(iter(loader)), {}, time.perf_counter(), step
    clips_per_step = arguments.per_device_batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
    progress = tqdm(total=arguments.max_steps, initial=step, unit="step", disable=not accelerator.is_main_process)
    model.train()
    while step < arguments.max_steps:
        learning_rate = scheduler.get_last_lr()[0]
        health.begin(step + 1)
        losses, gradient_norm = train_step(arguments, accelerator, wrapped, optimizer, batches, health)
        scheduler.step()
        step += 1
        progress.update()
        last = step == arguments.max_steps
        evaluate = validation is not None and (last or step % arguments.eval_every == 0)
        if last or evaluate or step % arguments.log_every == 0:
            elapsed = time.perf_counter() - started
            names = ("loss", "teacher_forcing_loss", "rollout_loss")
            metrics = {"step": step, **dict(zip(names, losses.tolist(), strict=True))}
            metrics |= {"learning_rate": learning_rate, "gradient_norm": gradient_norm}
            metrics["clips_per_second"] = clips_per_step * (step - logged) / elapsed
            metrics |= health.row(step - logged, elapsed)
            if evaluate:
                metrics |= validate(model, validation, accelerator)
            log_metrics(accelerator, metrics)
            progress.set_postfix(loss=f"{metrics['loss']:.4f}", clips_s=f"{metrics['clips_per_second']:.1f}")
            if log is not None:
                log.write(metrics)
            if evaluate and arguments.log_pictures:
                log_pictures(model, validation, accelerator, arguments.output_dir, step)
            started, logged = time.perf_counter(), step
        if accelerator.is_main_process and (last or step % arguments.checkpoint_every == 0):
            state = {"arguments": given, "schedule": scheduler.state_dict(), "loader": loader.state_dict()}
            save_checkpoint(folder, step, model.predictor, optimizer.optimizer, state)
            prune_checkpoints(folder, arguments.keep_checkpoints)
    progress.close()
    return metrics or MetricsLog.last(arguments.output_dir / "metrics.jsonl")


def save_and_push(arguments, accelerator, model, processor, encoder, metrics) -> None:
    """The final model with its card in the output folder, and on the Hub if asked for."""
    arguments_text = json.dumps(jsonable(vars(arguments)), indent=2)
    card = model_card(
        MODEL_CARD,
        model,
        arguments.dataset,
        processor=processor,
        model_name=(arguments.hub_model_id or str(arguments.output_dir)).rstrip("/").split("/")[-1],
        repo_id=arguments.hub_model_id or arguments.output_dir,
        encoder="random weights" if encoder == "random" else encoder,
        steps=arguments.max_steps,
        clips_per_step=arguments.per_device_batch_size
        * arguments.gradient_accumulation_steps
        * accelerator.num_processes,
        final_metrics={k: v for k, v in metrics.items() if k != "step" and k not in SPEED},
        arguments=arguments_text,
        versions=", ".join(f"{k} {v}" for k, v in versions().items()),
    )
    save_final_model(arguments.output_dir, model, processor, card)
    if arguments.push_to_hub:
        push_folder(arguments.output_dir, arguments.hub_model_id)
        print(f"pushed to {arguments.hub_model_id}")


def show_dry_run(arguments: argparse.Namespace) -> None:
    """What the run would take; with a data set it is opened and checked as for the run."""
    state, clips = PartialState(), None
    config, _ = build_configuration(arguments)
    if arguments.dataset is not None:
        clips = len(load_splits(arguments, build_processor(arguments, config))[0])
        check_batch(arguments, clips)
    state.print(dry_run(arguments, config, clips))


def main() -> None:
    arguments = parse_arguments(__doc__)
    if arguments.dry_run:
        show_dry_run(arguments)
        return
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        log_with=check_trackers(arguments.report_to) or None,
        project_config=ProjectConfiguration(arguments.output_dir, logging_dir=arguments.output_dir / "tensorboard"),
    )
    # Whatever can fail fails here, before anything is downloaded or computed.
    check_arguments(arguments, accelerator.device)
    arguments.log_pictures = check_pictures(arguments.log_pictures, arguments.report_to)
    config, encoder = build_configuration(arguments)
    processor = build_processor(arguments, config)
    splits = load_splits(arguments, processor)
    check_batch(arguments, len(splits[0]))
    if accelerator.is_main_process:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        if arguments.push_to_hub:
            prepare_repository(arguments.hub_model_id, arguments.hub_private)

    set_seed(arguments.seed)
    model = VJEPA2ACModel(config) if encoder == "random" else VJEPA2ACModel.from_pretrained_encoder(encoder, config)
    if arguments.gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.to(accelerator.device)
    accelerator.print(startup_summary(arguments, model, encoder, splits, accelerator.num_processes))
    with closing_trackers(accelerator):
        metrics = train(arguments, accelerator, model, processor, splits)
        if accelerator.is_main_process:
            save_and_push(arguments, accelerator, model, processor, encoder, metrics)
    accelerator.end_training()


if __name__ == "__main__":
    main()
