"""Train a head over a frozen world model: inverse dynamics, anticipation, classification, frames, distance in steps.

    accelerate launch examples/train_head.py --task inverse_dynamics --dataset DIR_OR_REPO --model REPO_OR_DIR \\
        --output_dir OUT

Features are encoded once and kept (--cache_features, default: a folder `features` beside OUT, for all heads there).
Leaves in OUT: the head (config.json, model.safetensors, processor_config.json, README.md and the code: load the folder
with AutoModel, classification with AutoModelForVideoClassification), metrics.jsonl (training), metrics.json and
report.html (validation clips, next to baselines), run.json, run_status.json and checkpoints/step-00000500.
Exit status 0 only when all steps are done; 75
after SIGTERM, SIGUSR1 or Ctrl-C with a checkpoint: start the same command again. What the heads compute:
docs/applications.md.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

# This folder holds evaluate.py, which must not hide the library of that name.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

from vjepa_ac_hf.console import Parser, add_clip_rule, folder_or_repo
from vjepa_ac_hf.training.arguments import add_loop_flags, check_limits, fill_in_batch, number_of_processes

# ---------------------------------------------------------------------------------------------------- arguments


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--task",
        required=True,
        choices=(
            "action_anticipation",
            "frame_decoding",
            "inverse_dynamics",
            "temporal_distance",
            "video_classification",
        ),
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset", required=True, type=folder_or_repo, help="built data set: a folder or a Hub repository"
    )
    data.add_argument("--action_space", default="vpt-36", help="vpt-13, vpt-36, vpt-38, or columns by commas")
    data.add_argument("--action_stats", default="auto", help="auto (the data set's), compute, or a JSON file")
    data.add_argument("--resize_mode", choices=("crop", "squash"), help="default: as the data set was built")
    data.add_argument("--labels", help="classification: JSON file {recording: label}, a column, or 'hotbar' (docs)")
    data.add_argument("--max_train_clips", type=int, help="use this many, spread over the split (default: all)")
    add_clip_rule(data, "the validation clips (default: all)")
    data.add_argument("--num_workers", type=int, default=2, help="loader processes per training process")
    data.add_argument("--prefetch_factor", type=int, default=2, help="batches each of them makes ahead")
    data.add_argument(
        "--cache_features",
        default="auto",
        help="folder of caches (auto: features beside OUT, for all heads there), or none: encode every time",
    )
    data.add_argument("--cache_dtype", choices=("bfloat16", "int8", "float32"), default="bfloat16")
    data.add_argument(
        "--verify_cache", action="store_true", help="compare all videos with the cache, not only sizes and times"
    )

    model = parser.add_argument_group("model")
    model.add_argument("--model", type=folder_or_repo, help="world model: repository or folder")
    model.add_argument(
        "--encoder", type=folder_or_repo, help="instead: a pretrained V-JEPA 2, or 'random' for an untrained one"
    )
    model.add_argument("--model_config", default="vitl16", help="with --encoder random: preset or JSON file")
    model.add_argument("--frame_size", help="with --encoder: pixels, or HEIGHT,WIDTH; default: the encoder's")
    model.add_argument("--features_from", choices=("encoder", "predictor"), default="encoder")
    model.add_argument("--train_encoder", action="store_true", help="train the world model too (without a cache)")
    model.add_argument("--head_hidden_size", type=int, help="default: 128; of frame_decoding 256")
    model.add_argument("--head_num_hidden_layers", type=int, default=2)
    model.add_argument("--head_num_attention_heads", type=int, default=4)
    model.add_argument("--anticipation_steps", type=int, default=2, help="anticipation: actions told at every step")
    model.add_argument("--use_past_actions", action="store_true", help="anticipation: tell the head past actions")
    model.add_argument("--use_states", action="store_true", help="anticipation: tell the head yaw and pitch")

    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--max_steps", type=int, default=5000, help="optimizer steps")
    optimisation.add_argument("--per_device_batch_size", type=int, default=32, help="clips a process and pass")
    optimisation.add_argument("--gradient_accumulation_steps", type=int, default=1, help="passes an optimizer step")
    optimisation.add_argument("--learning_rate", type=float, default=1e-3)
    optimisation.add_argument("--encoder_learning_rate", type=float, help="default: a tenth of the head's")
    optimisation.add_argument("--weight_decay", type=float, default=0.05)
    optimisation.add_argument("--max_grad_norm", type=float, default=1.0)
    optimisation.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    optimisation.add_argument(
        "--pos_weight",
        choices=("balanced", "none"),
        default="balanced",
        help="weights of pressed keys in the loss: (unpressed / pressed), or none: logits are those of probabilities",
    )
    optimisation.add_argument(
        "--key_thresholds",
        choices=("f1", "none"),
        default="f1",
        help="a key is told above the logit that has the highest F1 on training clips, or (none) above 0",
    )
    optimisation.add_argument("--seed", type=int, default=0)

    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", type=Path, required=True)
    add_loop_flags(run, checkpoint_every=500, keep_checkpoints=2, log_every=50, eval_every=500)
    return check_arguments(parser, parser.parse_args())


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> argparse.Namespace:
    check_limits(parser, arguments)
    if (arguments.model is None) == (arguments.encoder is None):
        parser.error("give either --model, or --encoder ('random' for an untrained one)")
    if (arguments.task == "video_classification") != (arguments.labels is not None):
        parser.error(f"--labels belongs to video_classification and is needed there; --task is {arguments.task}")
    if arguments.task == "frame_decoding" and (arguments.train_encoder or arguments.features_from != "encoder"):
        parser.error("--task frame_decoding shows what a frozen encoder says: no --train_encoder, no --features_from")
    if arguments.train_encoder and arguments.cache_features == "auto":
        arguments.cache_features = "none"
    if arguments.train_encoder and arguments.cache_features != "none":
        parser.error(f"--train_encoder changes the features: no --cache_features {arguments.cache_features}")
    if arguments.cache_features == "auto":
        arguments.cache_features = str(arguments.output_dir.parent / "features")
    arguments.warmup_steps, arguments.decay_steps = arguments.max_steps // 20, arguments.max_steps // 2
    arguments.compile, arguments.global_batch_size = False, None
    fill_in_batch(arguments, number_of_processes(arguments))
    return arguments


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

import torch
from accelerate.utils import set_seed
from huggingface_hub import ModelCard, ModelCardData
from torch.utils.data import DataLoader, Subset
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import VJEPA2Config
from transformers.utils import cached_file

from vjepa_ac_hf import ACTION_COLUMNS, VJEPA2ACConfig, VJEPA2ACModel, VJEPA2ACProcessor
from vjepa_ac_hf.configuration_encoder_vjepa2_ac import parse_resolution
from vjepa_ac_hf.evaluation.clips import spread
from vjepa_ac_hf.evaluation.frame_figures import require_torchmetrics
from vjepa_ac_hf.evaluation.head_report import write_head_report
from vjepa_ac_hf.loading.clip_rules import choose_clips, describe_clips
from vjepa_ac_hf.loading.clips import (
    ClipCollator,
    check_clips,
    check_geometry,
    check_players,
    clip_frame_rate,
    clip_geometry,
    load_action_statistics,
    load_clips,
)
from vjepa_ac_hf.loading.feature_cache import cache_features
from vjepa_ac_hf.loading.labels import ClipLabels, clips_with_label, read_labels
from vjepa_ac_hf.loading.loader import ClipLoader, clips_identity, worker_options
from vjepa_ac_hf.records import command_line, versions, write_json
from vjepa_ac_hf.training.distributed import build_accelerator, end_processes, prepare
from vjepa_ac_hf.training.heads import (
    CLIPS_FOR_FIT,
    TASKS,
    evaluate_head,
    fit_key_thresholds,
    fit_linear,
    fit_pos_weight,
    head_inputs,
    head_parameter_groups,
    headline,
    save_head,
)
from vjepa_ac_hf.training.health import Health
from vjepa_ac_hf.training.interruptions import StopSignals, kill_workers
from vjepa_ac_hf.training.loop import Run, begin, find_start, train
from vjepa_ac_hf.training.optimization import build_scheduler
from vjepa_ac_hf.training.preflight import check_arguments as check_run
from vjepa_ac_hf.training.preflight import check_batch, run_identity
from vjepa_ac_hf.training.presets import build_config
from vjepa_ac_hf.training.run_log import write_status
from vjepa_ac_hf.training.trackers import closing_trackers

CLIPS_FOR_THRESHOLDS = 1024

# ------------------------------------------------------------------------------------------------ data and model


def load_world_model(arguments: argparse.Namespace) -> VJEPA2ACModel:
    if arguments.model is not None:
        return VJEPA2ACModel.from_pretrained(arguments.model)
    size = None if arguments.frame_size is None else parse_resolution(arguments.frame_size)
    if arguments.encoder == "random":
        return VJEPA2ACModel(build_config(arguments.model_config, frame_size=size))
    config = VJEPA2ACConfig(encoder_config=VJEPA2Config.from_pretrained(arguments.encoder), frame_size=size)
    return VJEPA2ACModel.from_pretrained_encoder(arguments.encoder, config)


def build_processor(arguments: argparse.Namespace, world: VJEPA2ACModel) -> VJEPA2ACProcessor:
    """Frames as the world model's own processor makes them, where it has one; actions of this data set."""
    space, config = arguments.action_space, world.config
    file = arguments.model and cached_file(
        arguments.model, "processor_config.json", _raise_exceptions_for_missing_entries=False
    )
    if file:
        own = VJEPA2ACProcessor.from_pretrained(arguments.model)
        pixels = {k: getattr(own, k) for k in ("pixel_mean", "pixel_std", "fps", "native_fps", "resize_mode")}
        check_geometry(arguments.dataset, own)
        if arguments.resize_mode not in (None, own.resize_mode):
            raise ValueError(
                f"{file}: the world model's resize_mode is {own.resize_mode!r}, --resize_mode is "
                f"{arguments.resize_mode!r}"
            )
    else:
        clips = load_clips(arguments.dataset, "train", streaming=True)
        pixels = {"fps": clip_frame_rate(clips, f"{arguments.dataset}, split train")}
        pixels |= clip_geometry(arguments.dataset, arguments.resize_mode)
    return VJEPA2ACProcessor(
        **pixels,
        resolution=config.resolution,
        frames_per_clip=config.frames_per_clip,
        tubelet_size=config.encoder_config.tubelet_size,
        action_space=space.split(",") if "," in space or space in ACTION_COLUMNS else space,
        action_statistics=load_action_statistics(arguments.dataset, arguments.action_stats).to_dict(),
    )


def load_splits(arguments: argparse.Namespace, processor: VJEPA2ACProcessor):
    """The clips of train and validation, and how many are left out for want of a label."""
    splits = {split: load_clips(arguments.dataset, split) for split in ("train", "validation")}
    check_players(arguments.dataset, splits)
    for split, clips in splits.items():
        check_clips(clips, processor, f"{arguments.dataset}, split {split}")
    train = splits["train"].select(spread(len(splits["train"]), arguments.max_train_clips))
    validation = splits["validation"]
    if arguments.clip_rule is not None:
        validation = validation.select(choose_clips(validation, arguments.clip_rule))
    chosen = (train, validation)
    labelled = [clips_with_label(clips, arguments.labels) for clips in chosen]
    return labelled, sum(map(len, chosen)) - sum(map(len, labelled))


def build_head(arguments: argparse.Namespace, world, processor, train, validation):
    """A new head over the world model and, for classification, the labels of all clips."""
    fields = {k: v for k, v in vars(arguments).items() if k.startswith("head_") and v is not None}
    fields |= {"features_from": arguments.features_from, "freeze_encoder": not arguments.train_encoder}
    if arguments.task == "video_classification":
        known = ClipLabels(read_labels(train, arguments.labels))
        names = read_labels(train, arguments.labels) | read_labels(validation, arguments.labels)
        labels = ClipLabels(names, known.classes, known.several)
        kind = "multi" if labels.several else "single"
        fields |= {"id2label": dict(enumerate(labels.classes)), "problem_type": f"{kind}_label_classification"}
        return TASKS[arguments.task].from_world_model(world, **fields), labels
    if arguments.task == "frame_decoding":
        require_torchmetrics()
    if arguments.task in ("frame_decoding", "temporal_distance"):
        return TASKS[arguments.task].from_world_model(world, **fields), None
    fields |= {"action_space": processor.action_space, "action_statistics": processor.action_statistics}
    if arguments.task == "action_anticipation":
        fields |= {k: getattr(arguments, k) for k in ("anticipation_steps", "use_past_actions", "use_states")}
    head = TASKS[arguments.task].from_world_model(world, **fields)
    if arguments.pos_weight == "balanced":
        head.config.pos_weight = fit_pos_weight(train, head.config.binary_columns)
    return head, None


def store_features(arguments, accelerator, model, processor, train, validation):
    """The clips with what the encoder makes of them in place of their videos (of a decoder's, beside), unless it is
    trained."""
    if arguments.cache_features == "none":
        return train, validation
    options = {"dtype": arguments.cache_dtype, "batch_size": arguments.per_device_batch_size}
    options |= {"num_workers": arguments.num_workers, "prefetch_factor": arguments.prefetch_factor}
    options |= {"announce": accelerator.print, "verify": arguments.verify_cache, "shared": True}
    options["videos"] = arguments.task == "frame_decoding"
    return [
        cache_features(
            *(model.vjepa2_ac, clips, processor, Path(arguments.cache_features) / f"{split}-{len(clips)}"),
            accelerator,
            **options,
        )
        for clips, split in ((train, "train"), (validation, "validation"))
    ]


def share(arguments, accelerator, processor, clips, wanted: int | None) -> DataLoader:
    """Batches of this process out of `wanted` clips, spread evenly; at least one for each process, if there are."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    rows = spread(len(clips), None if wanted is None else max(wanted, processes))[rank::processes]
    options = worker_options(arguments.num_workers, arguments.prefetch_factor)
    collator = ClipCollator(processor, frames=arguments.task == "frame_decoding")
    generator = torch.Generator()  # not that of the model
    size = arguments.per_device_batch_size
    return DataLoader(Subset(clips, rows), size, collate_fn=collator, generator=generator, **options)


# ---------------------------------------------------------------------------------------------------------- loop


def start_run(arguments, accelerator, model, processor, splits, labels, stop, identity, start) -> Run:
    """Everything a step needs, with what the checkpoint holds that the run continues from."""
    groups = head_parameter_groups(
        model, arguments.learning_rate, arguments.weight_decay, arguments.encoder_learning_rate
    )
    optimizer = torch.optim.AdamW(groups)
    scheduler = build_scheduler(optimizer, arguments.max_steps, arguments.warmup_steps, arguments.decay_steps)
    frozen, trained = (None, model) if arguments.train_encoder else (model.vjepa2_ac, model.head)
    wrapped, optimizer = prepare(accelerator, model, optimizer, frozen)
    clips, validation = splits
    loader = ClipLoader(
        *(clips, processor, arguments.per_device_batch_size),
        seed=arguments.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=arguments.num_workers,
        prefetch_factor=arguments.prefetch_factor,
        device=accelerator.device,
        frames=arguments.task == "frame_decoding",
    )
    run = Run(
        *(arguments, accelerator, model, trained, wrapped, optimizer, scheduler, stop, identity, loader),
        health=Health(model, arguments, accelerator, trained),
        inputs=partial(head_inputs, model, labels=labels),
    )
    if arguments.eval_every:
        batches = share(arguments, accelerator, processor, validation, arguments.eval_clips)
        run.validate = lambda: headline(evaluate_head(model, batches, processor, accelerator, labels))
        run.validation_set = f"{clips_identity(validation)}, {arguments.eval_clips} of them"
    begin(run, start)
    return run


def final_figures(arguments, accelerator, model, processor, splits, labels) -> dict:
    """Thresholds of keys, fitted to clips that were trained on, and the figures of all validation clips with them."""
    batches = partial(share, arguments, accelerator, processor)
    if arguments.key_thresholds == "f1" and "key_thresholds" in model.config.own_fields():
        accelerator.print("fitting the keys' thresholds to training clips")
        fitting = batches(splits[0], CLIPS_FOR_THRESHOLDS)
        model.config.key_thresholds = fit_key_thresholds(model, fitting, processor, accelerator)
    if "training_clips" in model.config.own_fields():
        model.config.training_clips = len(splits[0])
    accelerator.print(f"evaluating all {len(splits[1]):,} validation clips")
    return evaluate_head(model, batches(splits[1], None), processor, accelerator, labels)


def save_all(arguments, model, processor, figures, clips) -> None:
    """Figures, report, and the head with its card."""
    record = {"task": arguments.task, "dataset": arguments.dataset, "training_clips": clips, **figures}
    record |= {"world_model": arguments.model or arguments.encoder, "features_from": arguments.features_from}
    record |= {"command": command_line(), "versions": versions()}
    write_json(arguments.output_dir / "metrics.json", record)
    write_head_report(arguments.output_dir, record)
    data = ModelCardData(library_name="transformers", license="apache-2.0", tags=["vjepa2", "vpt", "vjepa-ac-hf"])
    shown = json.dumps(headline(figures), indent=2)
    card = ModelCard(
        f"---\n{data}\n---\n\n# {type(model).__name__}\n\nA head over the {arguments.features_from}'s features of "
        f"{arguments.model or arguments.encoder}, trained on {clips:,} clips of {arguments.dataset} with "
        f"`examples/train_head.py` of vjepa-ac-hf. On its validation split:\n\n```json\n{shown}\n```\n"
    )
    save_head(arguments.output_dir, model, processor, card)


def main() -> int:
    arguments = parse_arguments()
    with StopSignals() as stop, logging_redirect_tqdm():
        try:
            return run_program(arguments, stop)
        finally:
            kill_workers()


def run_program(arguments: argparse.Namespace, stop: StopSignals) -> int:
    accelerator = build_accelerator(arguments)
    # Whatever can fail fails here, before anything is encoded.
    check_run(arguments, accelerator.device)
    if accelerator.is_fsdp2:
        raise ValueError("heads are small, and trained whole in every process: leave out FSDP (DDP does it)")
    set_seed(arguments.seed)
    world = load_world_model(arguments)
    processor = build_processor(arguments, world)
    arguments.resize_mode = processor.resize_mode  # the data set's, for the records of the run
    splits, without_label = load_splits(arguments, processor)
    if without_label:
        accelerator.print(f"--labels {arguments.labels}: {without_label} clips have no label and are left out")
    check_batch(arguments, len(splits[0]))
    model, labels = build_head(arguments, world, processor, *splits)
    frozen = {"encoder": model.vjepa2_ac.encoder}
    if arguments.features_from == "predictor":
        frozen["predictor"] = model.vjepa2_ac.predictor
    told = None if labels is None else labels.digest()
    identity = run_identity(arguments, accelerator.num_processes, model, processor, splits[0], frozen, labels_told=told)
    start = find_start(arguments, identity, accelerator, type(model.config))
    model.to(accelerator.device)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.print(
        f"{type(model).__name__}: {sum(p.numel() for p in model.head.parameters()):,} parameters over "
        f"{sum(p.numel() for p in model.vjepa2_ac.parameters()):,}; {len(splits[0]):,} training clips"
    )
    sources, splits = splits, store_features(arguments, accelerator, model, processor, *splits)
    if arguments.task == "frame_decoding" and start is None:
        accelerator.print("fitting the decoder's linear map to training clips")
        fit_linear(model, share(arguments, accelerator, processor, splits[0], CLIPS_FOR_FIT), accelerator)
    with closing_trackers(accelerator):
        run = start_run(arguments, accelerator, model, processor, splits, labels, stop, identity, start)
        with stop.deferred():
            train(run)
    figures = final_figures(arguments, accelerator, model, processor, splits, labels)
    if accelerator.is_main_process:
        counts = {unit + "s": len(sources[1].unique(f"{unit}_id")) for unit in ("session", "player")}
        counts |= {"clips_without_label": without_label} if labels is not None else {}
        counts["clip_set"] = describe_clips(sources[1], arguments.clip_rule)
        with stop.deferred():
            save_all(arguments, model, processor, {**counts, **figures}, len(sources[0]))
            write_status(arguments.output_dir, "finished", run.step)
        shown = ", ".join(f"{name.removeprefix('validation_')} {v:.4f}" for name, v in headline(figures).items())
        print(f"{figures['clips']:,} validation clips: {shown}")
        print(f"the head is in {arguments.output_dir}, its figures in {arguments.output_dir / 'report.html'}")
    run.wrapped = model
    end_processes(accelerator)
    return 0


if __name__ == "__main__":
    sys.exit(main())
