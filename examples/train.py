"""Train an action-conditioned world model on a built data set of VPT tubelets.

    accelerate launch examples/train.py --dataset DIR_OR_REPO --output_dir OUT --mixed_precision bf16

The encoder is frozen; only the predictor is trained, with teacher forcing and rollout losses (docs/model.md). Leaves in
OUT: config.json, model.safetensors, processor_config.json, README.md and the model's code (load the folder with
AutoModel and AutoProcessor), metrics.jsonl, run.json (what the run depends on; a recipe that makes it again),
run_status.json and checkpoints/step-00001000. Exit status 0 only when all steps are done; 75 after SIGTERM, SIGUSR1 or
Ctrl-C with a checkpoint: start the same command again (docs/training.md); 3 when all steps are done and the model is in
OUT, but --push_to_hub did not bring it to the Hub: examples/push.py does.
"""

import argparse
import contextlib
import sys
from pathlib import Path

# This folder holds evaluate.py, which must not hide the library of that name.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

from vjepa_ac_hf.training.arguments import parse_arguments

RECIPES = Path(__file__).resolve().parent / "configs"

if __name__ == "__main__":
    # --help and mistakes are answered before the imports below, which take seconds
    parse_arguments(__doc__, recipes=RECIPES)

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import VJEPA2Config

from vjepa_ac_hf import ACTION_COLUMNS, VJEPA2ACConfig, VJEPA2ACModel, VJEPA2ACProcessor
from vjepa_ac_hf.configuration_encoder_vjepa2_ac import parse_resolution
from vjepa_ac_hf.evaluation.clips import spread
from vjepa_ac_hf.evaluation.decoding import load_decoder
from vjepa_ac_hf.hub.cards import RunDescription
from vjepa_ac_hf.hub.push import HubPusher, prepare_repository, save_final_model, save_last_weights
from vjepa_ac_hf.loading.clip_rules import choose_clips
from vjepa_ac_hf.loading.clips import (
    MAKE_VALIDATION,
    check_clips,
    check_geometry,
    check_players,
    clip_frame_rate,
    clip_geometry,
    load_action_statistics,
    load_clips,
    split_files,
)
from vjepa_ac_hf.loading.feature_cache import cache_features
from vjepa_ac_hf.loading.loader import ClipLoader
from vjepa_ac_hf.training.averages import WeightAverage
from vjepa_ac_hf.training.distributed import (
    build_accelerator,
    end_processes,
    prepare,
    whole_model,
    whole_parameters,
)
from vjepa_ac_hf.training.dry_run import dry_run
from vjepa_ac_hf.training.health import Health
from vjepa_ac_hf.training.interruptions import StopSignals, kill_workers
from vjepa_ac_hf.training.loop import Run, begin, find_start, train
from vjepa_ac_hf.training.optimization import build_optimizer, build_scheduler
from vjepa_ac_hf.training.pictures import check_pictures, log_pictures
from vjepa_ac_hf.training.preflight import check_arguments, check_batch, run_identity, startup_summary
from vjepa_ac_hf.training.presets import (
    DEFAULT_ENCODERS,
    build_config,
    check_encoder,
    check_initial_predictor,
    init_predictor,
)
from vjepa_ac_hf.training.run_log import write_status
from vjepa_ac_hf.training.trackers import check_trackers, closing_trackers
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
        **clip_geometry(arguments.dataset, arguments.resize_mode),
        frames_per_clip=config.frames_per_clip,
        tubelet_size=config.encoder_config.tubelet_size,
        action_space=config.action_space,
        action_statistics=load_action_statistics(arguments.dataset, arguments.action_stats).to_dict(),
    )


def load_splits(arguments: argparse.Namespace, processor: VJEPA2ACProcessor):
    """Training clips and, where the data set has them, validation clips spread over the split; both checked."""
    train = load_clips(arguments.dataset, "train", streaming=arguments.streaming)
    check_geometry(arguments.dataset, processor)
    # Planning and labelling take from the processor how long an action lasts.
    processor.fps = clip_frame_rate(train, f"{arguments.dataset}, split train")
    check_clips(train, processor, f"{arguments.dataset}, split train")
    if not arguments.eval_every:
        return train, None
    if "validation" not in split_files(arguments.dataset):
        text = "%s has no validation split: nothing is validated during training; to have one, %s"
        logger.warning(text, arguments.dataset, MAKE_VALIDATION)
        return train, None
    validation = load_clips(arguments.dataset, "validation", streaming=arguments.streaming)
    check_players(arguments.dataset, {"train": train, "validation": validation})
    check_clips(validation, processor, f"{arguments.dataset}, split validation")
    if min(len(validation), arguments.eval_clips) < 2:
        raise ValueError(
            f"{arguments.dataset}, split validation: clips are compared, so 2 are needed, found {len(validation)} with "
            f"--eval_clips {arguments.eval_clips}; --eval_every 0 trains without validation"
        )
    if arguments.clip_rule is not None:
        return train, validation.select(choose_clips(validation, arguments.clip_rule)[: arguments.eval_clips])
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
            **{"verify": arguments.verify_cache, "shared": True},
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


def start_run(arguments, accelerator, model, processor, splits, stop, identity, start, decoder=None) -> Run:
    """Everything a step needs, with what the checkpoint holds that the run continues from."""
    optimizer = build_optimizer(model.predictor, arguments.learning_rate, arguments.weight_decay)
    scheduler = build_scheduler(
        *(optimizer, arguments.max_steps, arguments.warmup_steps, arguments.decay_steps),
        arguments.start_learning_rate,
        arguments.final_learning_rate,
    )
    wrapped, optimizer = prepare(accelerator, model, optimizer, frozen=model.encoder)
    loader, validation = build_loaders(arguments, accelerator, model, processor, *splits)
    run = Run(
        *(arguments, accelerator, model, model.predictor, wrapped, optimizer, scheduler, stop, identity, loader),
        health=Health(model, arguments, accelerator),
        average=WeightAverage(model.predictor, arguments.ema_decay) if arguments.ema_decay else None,
        losses=("loss", "teacher_forcing_loss", "rollout_loss"),
    )

    def run_validation() -> dict:
        with whole_parameters(model):
            return validate(model, validation, accelerator)

    def picture(step: int) -> None:
        with whole_parameters(model):
            log_pictures(model, validation, accelerator, arguments.output_dir, step, decoder)

    if validation is not None:
        run.validate, run.picture = run_validation, picture if arguments.log_pictures else None
        run.validation_set = validation.identity
    begin(run, start)
    return run


def finish_push(arguments, pusher, wait: float) -> int:
    """Wait so many seconds for the final model to be on the Hub and say whether it is. Returns the exit status."""
    print(f"pushing it to {arguments.hub_model_id}", flush=True)
    if pusher.finish(wait):
        print(f"pushed to {arguments.hub_model_id}: all is up")
        return 0
    later = f"python examples/push.py --output_dir {arguments.output_dir}"
    if arguments.hub_strategy == "later":
        print(f"nothing was pushed, as --hub_strategy later asks; push with: {later}")
        return 0
    print(f"NOT on {arguments.hub_model_id}; the model is whole in {arguments.output_dir}, push it with: {later}")
    return 3


def last_words(arguments: argparse.Namespace, metrics: dict) -> str:
    """What the run has made, and its key figures."""
    named = ("loss", "validation_loss", "validation_error_over_persistence")
    figures = ", ".join(f"{name} {metrics[name]:.4f}" for name in named if metrics.get(name) is not None)
    return f"{arguments.max_steps:,} steps done ({figures}); the model is in {arguments.output_dir}"


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
            kill_workers()


def run_program(arguments: argparse.Namespace, stop: StopSignals) -> int:
    accelerator = build_accelerator(arguments)
    # Whatever can fail fails here, before anything is downloaded or computed.
    check_arguments(arguments, accelerator.device)
    arguments.log_pictures = check_pictures(arguments.log_pictures, arguments.report_to)
    config, encoder = build_configuration(arguments)
    processor = build_processor(arguments, config)
    arguments.resize_mode = processor.resize_mode  # the data set's, for the records of the run
    splits = load_splits(arguments, processor)
    check_batch(arguments, len(splits[0]))
    if accelerator.is_main_process:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        if arguments.push_to_hub and arguments.hub_strategy != "later":
            prepare_repository(arguments.hub_model_id, arguments.hub_private, arguments.hub_timeout)

    set_seed(arguments.seed)
    model = VJEPA2ACModel(config) if encoder == "random" else VJEPA2ACModel.from_pretrained_encoder(encoder, config)
    identity = run_identity(
        *(arguments, accelerator.num_processes, model, processor, splits[0]), frozen={"encoder": model.encoder}
    )
    start = find_start(arguments, identity, accelerator, type(config))
    if arguments.init_predictor is not None:
        init_predictor(model, arguments.init_predictor)
    if arguments.gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.to(accelerator.device)
    has_decoder = arguments.decoder is not None and arguments.log_pictures
    decoder = load_decoder(arguments.decoder, model) if has_decoder else None
    accelerator.print(startup_summary(arguments, model, encoder, splits, accelerator.num_processes))
    description, pusher = None, None
    if accelerator.is_main_process:  # of a model that is not sharded yet
        description = RunDescription.of_run(MODEL_CARD, arguments, model, processor, encoder, accelerator.num_processes)
        pusher = HubPusher.of_run(arguments, model, processor, description) if arguments.push_to_hub else None
    with pusher or contextlib.nullcontext():
        with closing_trackers(accelerator):
            run = start_run(arguments, accelerator, model, processor, splits, stop, identity, start, decoder)
            if pusher is not None:
                pusher.begin(run.step)
                run.publish = pusher.submit
            with stop.deferred():
                train(run)
                last = None if run.average is None else whole_model(model)
                if accelerator.is_main_process:
                    save_last_weights(arguments.output_dir, last, processor)
                if run.average is not None:
                    run.average.exchange()
                model = whole_model(model)
                if description is not None:
                    save_final_model(arguments.output_dir, model, processor, description, run.step)
                    write_status(arguments.output_dir, "finished", run.step)
        run.average = None
        run.wrapped = run.model = run.trained = model
        end_processes(accelerator)  # the other processes need not wait for the Hub
        if accelerator.is_main_process:
            print(last_words(arguments, run.metrics), flush=True)
        return 0 if pusher is None else finish_push(arguments, pusher, 0 if stop.requested else arguments.hub_wait)


if __name__ == "__main__":
    sys.exit(main())
