"""Train an action-conditioned world model on a built data set of VPT tubelets.

    accelerate launch examples/train.py --dataset DIR_OR_REPO --output_dir OUT --mixed_precision bf16

The encoder is frozen; only the predictor is trained, with teacher forcing and rollout losses (docs/model.md). Leaves in
OUT: config.json, model.safetensors, processor_config.json, README.md and the model's code (load the folder with
AutoModel and AutoProcessor), metrics.jsonl, run.json (what the run depends on; a recipe that makes it again),
run_status.json and checkpoints/step-00001000. Exit status 0 only when all steps are done; 75 after SIGTERM or SIGUSR1
with a checkpoint: start the same command again (docs/training.md); 3 when all steps are done and the model is in OUT,
but --push_to_hub did not bring it to the Hub: examples/push.py does.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# This folder holds evaluate.py, which must not hide the library of that name.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

from vjepa_ac_hf.training.arguments import parse_arguments

RECIPES = Path(__file__).resolve().parent / "configs"

if __name__ == "__main__":
    # --help and mistakes are answered before the imports below, which take seconds
    parse_arguments(__doc__, recipes=RECIPES)

import torch
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import VJEPA2Config

from vjepa_ac_hf import ACTION_COLUMNS, VJEPA2ACConfig, VJEPA2ACModel, VJEPA2ACProcessor
from vjepa_ac_hf.configuration_encoder_vjepa2_ac import parse_resolution
from vjepa_ac_hf.evaluation.clips import spread
from vjepa_ac_hf.hub.cards import RunDescription
from vjepa_ac_hf.hub.push import HubPusher, prepare_repository, save_final_model
from vjepa_ac_hf.loading.clips import (
    check_clips,
    check_players,
    clip_frame_rate,
    load_action_statistics,
    load_clips,
    split_files,
)
from vjepa_ac_hf.loading.feature_cache import cache_features
from vjepa_ac_hf.loading.loader import ClipLoader
from vjepa_ac_hf.records import versions, weights_checksum
from vjepa_ac_hf.training.checkpoints import (
    find_checkpoint,
    get_random_state,
    load_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
    write_best,
)
from vjepa_ac_hf.training.distributed import (
    build_accelerator,
    end_processes,
    from_all,
    from_main,
    prepare,
    whole_model,
    whole_parameters,
)
from vjepa_ac_hf.training.dry_run import dry_run
from vjepa_ac_hf.training.health import Health
from vjepa_ac_hf.training.interruptions import EXIT_INTERRUPTED, BatchWatch, StopSignals
from vjepa_ac_hf.training.optimization import build_optimizer, build_scheduler, continue_schedule
from vjepa_ac_hf.training.pictures import check_pictures, log_pictures
from vjepa_ac_hf.training.preflight import check_arguments, check_batch, startup_summary
from vjepa_ac_hf.training.presets import (
    DEFAULT_ENCODERS,
    build_config,
    check_encoder,
    check_initial_predictor,
    init_predictor,
)
from vjepa_ac_hf.training.run_log import MetricsLog, check_same_run, jsonable, write_status
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
    size = None if arguments.frame_size is None else parse_resolution(arguments.frame_size)
    default = DEFAULT_ENCODERS.get(arguments.model_config, "random")
    encoder = arguments.encoder or default
    # A dry run needs no network: a preset holds the sizes of its own encoder.
    known = encoder == "random" or (arguments.dry_run and encoder == default)
    if not known:
        check_encoder(encoder)
    config = build_config(
        arguments.model_config,
        encoder_config=None if known else VJEPA2Config.from_pretrained(encoder),
        frame_size=size,
        action_space=space,
        auto_steps=arguments.auto_steps,
        loss_type=arguments.loss_type,
    )
    if arguments.init_predictor is not None:
        check_initial_predictor(config, arguments.init_predictor)
    return config, encoder


def build_processor(arguments: argparse.Namespace, config: VJEPA2ACConfig) -> VJEPA2ACProcessor:
    return VJEPA2ACProcessor(
        resolution=config.resolution,
        resize_mode=arguments.resize_mode,
        frames_per_clip=config.frames_per_clip,
        tubelet_size=config.encoder_config.tubelet_size,
        action_space=config.action_space,
        action_statistics=load_action_statistics(arguments.dataset, arguments.action_stats).to_dict(),
    )


def load_splits(arguments: argparse.Namespace, processor: VJEPA2ACProcessor):
    """Training clips and, where the data set has them, validation clips spread over the split; both checked."""
    train = load_clips(arguments.dataset, "train", streaming=arguments.streaming)
    # Planning and labelling take from the processor how long an action lasts.
    processor.fps = clip_frame_rate(train, f"{arguments.dataset}, split train")
    check_clips(train, processor, f"{arguments.dataset}, split train")
    if not arguments.eval_every:
        return train, None
    if "validation" not in split_files(arguments.dataset):
        logger.warning("%s has no validation split: nothing is validated during training", arguments.dataset)
        return train, None
    validation = load_clips(arguments.dataset, "validation", streaming=arguments.streaming)
    check_players(arguments.dataset, {"train": train, "validation": validation})
    check_clips(validation, processor, f"{arguments.dataset}, split validation")
    if min(len(validation), arguments.eval_clips) < 2:
        raise ValueError(
            f"{arguments.dataset}, split validation: clips are compared, so 2 are needed, found {len(validation)} with "
            f"--eval_clips {arguments.eval_clips}; --eval_every 0 trains without validation"
        )
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


@dataclass
class Run:
    """A run between two of its steps."""

    arguments: argparse.Namespace
    accelerator: Accelerator
    model: VJEPA2ACModel
    wrapped: torch.nn.Module  # the model as a step calls it: under DDP, FSDP2, compilation
    optimizer: AcceleratedOptimizer
    scheduler: LambdaLR
    stop: StopSignals
    identity: dict  # what must not differ when the run is continued
    loader: ClipLoader | None = None
    validation: ValidationSet | None = None
    log: MetricsLog | None = None  # in the main process
    health: Health | None = None
    pusher: HubPusher | None = None  # in the main process
    step: int = 0  # finished optimizer steps
    saved: int | None = None  # step of the newest checkpoint
    best: dict | None = None  # step and validation loss of the best checkpoint

    @property
    def checkpoints(self) -> Path:
        return self.arguments.output_dir / "checkpoints"


def start_run(arguments, accelerator, model, processor, splits, stop) -> Run:
    """Everything a step needs, with what the checkpoint holds that the run continues from."""
    # Before anything is sharded, and before features are cached for long: what may be refused.
    identity = jsonable({**vars(arguments), "num_processes": accelerator.num_processes})
    identity |= {"model": json.loads(model.config.to_json_string()), "encoder_weights": weights_checksum(model.encoder)}
    identity |= {"action_statistics": processor.action_statistics}
    identity["model"].pop("transformers_version", None)
    optimizer = build_optimizer(model.predictor, arguments.learning_rate, arguments.weight_decay)
    scheduler = build_scheduler(
        *(optimizer, arguments.max_steps, arguments.warmup_steps, arguments.decay_steps),
        arguments.start_learning_rate,
        arguments.final_learning_rate,
    )
    folder = arguments.output_dir / "checkpoints"
    checkpoint = find_checkpoint(folder, arguments.resume) if accelerator.is_main_process else None
    checkpoint = from_main(checkpoint)
    state = None if checkpoint is None else read_state(checkpoint)
    if state is not None:
        check_same_run(state["arguments"], identity, checkpoint)

    config = {**identity, "model": model.config.to_dict(), "versions": versions()}
    start_trackers(accelerator, arguments.output_dir, config, 0 if state is None else state["step"])
    wrapped, optimizer = prepare(accelerator, model, optimizer)
    run = Run(arguments, accelerator, model, wrapped, optimizer, scheduler, stop, identity)
    run.loader, run.validation = build_loaders(arguments, accelerator, model, processor, *splits)
    if state is not None:
        run.loader.load_state_dict(state["loader"])
        load_checkpoint(checkpoint, model.predictor, optimizer.optimizer, accelerator)
        continue_schedule(scheduler, state["schedule"])
        run.step, run.best = state["step"], state["best"]
        run.saved = run.step if checkpoint.parent.resolve() == run.checkpoints.resolve() else None
        accelerator.print(f"continuing from {checkpoint}")
    run.health = Health(model, arguments, accelerator)
    write_run_record(arguments, accelerator)
    if accelerator.is_main_process:
        run.log = MetricsLog(arguments.output_dir / "metrics.jsonl", run.step)
        write_status(arguments.output_dir, "running", run.step)
    return run


def train_step(run: Run, batches) -> tuple[torch.Tensor, float, bool]:
    """One optimizer step.

    Returns:
        (loss, teacher forcing, rollout), means over all processes; the gradient norm; whether any process is to stop.

    Raises:
        FloatingPointError: a loss or gradient that is not finite, in all processes; no parameter has been changed.
    """
    accelerator, accumulation = run.accelerator, run.arguments.gradient_accumulation_steps
    sums, clips = torch.zeros(4, device=accelerator.device), []
    for _ in range(accumulation):
        batch = next(batches)
        clips += batch.pop("clips")
        with accelerator.accumulate(run.wrapped):
            with accelerator.autocast():
                output = run.wrapped(**batch)
            accelerator.backward(output.loss)
        run.health.observe(output)
        sums[:3] += torch.stack([output.loss, output.teacher_forcing_loss, output.rollout_loss]).detach()
    sums[3] = run.stop.requested  # travels with the losses, so that all processes stop after the same step
    *losses, stopping = accelerator.reduce(sums / accumulation, reduction="mean").tolist()
    gradient_norm = float(accelerator.clip_grad_norm_(run.model.parameters(), run.arguments.max_grad_norm))
    if not all(map(math.isfinite, (*losses, gradient_norm))):
        run.optimizer.zero_grad()
        raise FloatingPointError(
            f"loss {losses[0]} with gradient norm {gradient_norm} in step {run.step + 1}: training stopped before the "
            f"parameters were changed. Clips of this process in the step: {', '.join(clips)}"
        )
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.scheduler.step()
    run.step += 1
    return torch.tensor(losses), gradient_norm, stopping > 0


def log_step(run: Run, metrics: dict, evaluate: bool) -> bool:
    """Write the metrics of a step, with those of a validation if it is due. Returns whether it was the best so far."""
    improved = False
    if evaluate:
        with whole_parameters(run.model):
            metrics |= validate(run.model, run.validation, run.accelerator)
        loss = metrics.get("validation_loss")
        improved = loss is not None and math.isfinite(loss) and (run.best is None or loss < run.best["validation_loss"])
        if improved:
            run.best = {"step": run.step, "validation_loss": loss}
    log_metrics(run.accelerator, metrics)
    if run.log is not None:
        run.log.write(metrics)
    if evaluate and run.arguments.log_pictures:
        with whole_parameters(run.model):
            log_pictures(run.model, run.validation, run.accelerator, run.arguments.output_dir, run.step)
    return improved


def position(run: Run) -> dict:
    """Where the data and this process's random generators stand."""
    return {"loader": run.loader.state_dict(), "random": get_random_state(run.accelerator.device)}


def save(run: Run, at: dict) -> None:
    """A checkpoint of `run.step`, with the data and random generators as they are `at` that step (`position`)."""
    if run.log is not None:
        run.log.flush()
    state = {"arguments": run.identity, "schedule": run.scheduler.state_dict(), "loader": at["loader"]}
    state |= {"best": run.best, "versions": versions()}
    tensors = run.model.predictor, run.optimizer.optimizer, at["random"]
    saved = save_checkpoint(run.checkpoints, run.step, *tensors, state, run.accelerator)
    run.saved = run.step
    if run.accelerator.is_main_process:
        if run.pusher is not None and run.step < run.arguments.max_steps:
            run.pusher.submit(run.step, saved)
        if run.best is not None:
            write_best(run.checkpoints, run.best)
        prune_checkpoints(run.checkpoints, run.arguments.keep_checkpoints, run.best and run.best["step"])


def train(run: Run) -> None:
    """Optimise until `max_steps`, writing metrics and checkpoints.

    Raises:
        SystemExit: status `EXIT_INTERRUPTED`, after a signal and with a checkpoint.
    """
    arguments, accelerator = run.arguments, run.accelerator
    watch = BatchWatch(iter(run.loader), arguments.loader_warning, arguments.loader_timeout)
    batches = run.health.timed(watch)
    clips_per_step = arguments.per_device_batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
    started, logged, stopping = time.perf_counter(), run.step, False
    progress = tqdm(total=arguments.max_steps, initial=run.step, unit="step", disable=not accelerator.is_main_process)
    run.model.train()
    while run.step < arguments.max_steps and not stopping:
        learning_rate, before = run.scheduler.get_last_lr()[0], position(run)
        run.health.begin(run.step + 1)
        try:
            losses, gradient_norm, stopping = train_step(run, batches)
        except FloatingPointError:
            if run.step != run.saved:
                save(run, before)
            raise
        progress.update()
        last, improved = run.step == arguments.max_steps, False
        evaluate = run.validation is not None and (last or run.step % arguments.eval_every == 0)
        if last or evaluate or run.step % arguments.log_every == 0:
            names = ("loss", "teacher_forcing_loss", "rollout_loss")
            metrics = {"step": run.step, **dict(zip(names, losses.tolist(), strict=True))}
            metrics |= {"learning_rate": learning_rate, "gradient_norm": gradient_norm}
            elapsed = time.perf_counter() - started
            metrics["clips_per_second"] = clips_per_step * (run.step - logged) / elapsed
            metrics |= run.health.row(run.step - logged, elapsed)
            progress.set_postfix(loss=f"{metrics['loss']:.4f}", clips_s=f"{metrics['clips_per_second']:.1f}")
            improved = log_step(run, metrics, evaluate)
            started, logged = time.perf_counter(), run.step
        if evaluate:  # it takes a while
            stopping = any(from_all(run.stop.requested))
        if last or improved or stopping or run.step % arguments.checkpoint_every == 0:
            save(run, position(run))
    progress.close()
    watch.close()
    if run.step < arguments.max_steps:
        if accelerator.is_main_process:
            write_status(arguments.output_dir, "interrupted", run.step)
        accelerator.print(f"stopped after step {run.step} with a checkpoint: start the same command again")
        raise SystemExit(EXIT_INTERRUPTED)


def finish_push(arguments, pusher, wait: float) -> int:
    """Wait so many seconds for the final model to be on the Hub and say whether it is. Returns the exit status."""
    print(f"the model is in {arguments.output_dir}; pushing it to {arguments.hub_model_id}", flush=True)
    if pusher.finish(wait):
        print(f"pushed to {arguments.hub_model_id}: all is up")
        return 0
    later = f"python examples/push.py --output_dir {arguments.output_dir}"
    if arguments.hub_strategy == "later":
        print(f"nothing was pushed, as --hub_strategy later asks; push with: {later}")
        return 0
    print(f"NOT on {arguments.hub_model_id}; the model is whole in {arguments.output_dir}, push it with: {later}")
    return 3


def show_dry_run(arguments: argparse.Namespace) -> None:
    """What the run would take; with a data set it is opened and checked as for the run."""
    check_trackers(arguments.report_to)
    state, clips = PartialState(), None
    config, _ = build_configuration(arguments)
    if arguments.dataset is not None:
        clips = len(load_splits(arguments, build_processor(arguments, config))[0])
        check_batch(arguments, clips)
    state.print(dry_run(arguments, config, clips))


def main() -> int:
    arguments = parse_arguments(__doc__, recipes=RECIPES)
    if arguments.dry_run:
        show_dry_run(arguments)
        return 0
    with StopSignals() as stop, logging_redirect_tqdm():
        try:
            return run_program(arguments, stop)
        finally:
            # Loader workers that hang, or leave signals to this process, would be waited for at exit.
            for child in multiprocessing.active_children():
                child.kill()


def run_program(arguments: argparse.Namespace, stop: StopSignals) -> int:
    accelerator = build_accelerator(arguments)
    # Whatever can fail fails here, before anything is downloaded or computed.
    check_arguments(arguments, accelerator.device)
    arguments.log_pictures = check_pictures(arguments.log_pictures, arguments.report_to)
    config, encoder = build_configuration(arguments)
    processor = build_processor(arguments, config)
    splits = load_splits(arguments, processor)
    check_batch(arguments, len(splits[0]))
    if accelerator.is_main_process:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        if arguments.push_to_hub and arguments.hub_strategy != "later":
            prepare_repository(arguments.hub_model_id, arguments.hub_private, arguments.hub_timeout)

    set_seed(arguments.seed)
    model = VJEPA2ACModel(config) if encoder == "random" else VJEPA2ACModel.from_pretrained_encoder(encoder, config)
    if arguments.init_predictor is not None:
        init_predictor(model, arguments.init_predictor)
    if arguments.gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.to(accelerator.device)
    accelerator.print(startup_summary(arguments, model, encoder, splits, accelerator.num_processes))
    description, pusher = None, None
    if accelerator.is_main_process:  # of a model that is not sharded yet
        description = RunDescription.of_run(MODEL_CARD, arguments, model, processor, encoder, accelerator.num_processes)
        pusher = HubPusher.of_run(arguments, model, processor, description) if arguments.push_to_hub else None
    with pusher or contextlib.nullcontext():
        with closing_trackers(accelerator):
            run = start_run(arguments, accelerator, model, processor, splits, stop)
            if pusher is not None:
                pusher.begin(run.step)
                run.pusher = pusher
            with stop.deferred():
                train(run)
                model = whole_model(model)
                if description is not None:
                    save_final_model(arguments.output_dir, model, processor, description, run.step)
                    write_status(arguments.output_dir, "finished", run.step)
        run.wrapped = model
        end_processes(accelerator)  # the other processes need not wait for the Hub
        return 0 if pusher is None else finish_push(arguments, pusher, 0 if stop.requested else arguments.hub_wait)


if __name__ == "__main__":
    sys.exit(main())
