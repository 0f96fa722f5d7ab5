"""Train a head over a frozen world model: inverse dynamics, action anticipation or video classification.

    accelerate launch examples/train_head.py --task inverse_dynamics --dataset DIR_OR_REPO --model REPO_OR_DIR \\
        --output_dir OUT

Features are encoded once and kept (--cache_features, default OUT/features). Leaves in OUT: the head (config.json,
model.safetensors, processor_config.json, README.md and the code: load the folder with AutoModel, classification with
AutoModelForVideoClassification), metrics.jsonl (training), metrics.json and report.html (validation clips, next to
baselines), and checkpoints/step-00000500, from which the same command goes on. Exit status 0 only when all steps are
done. What the heads compute: docs/applications.md.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

# This folder holds evaluate.py, which must not hide the library of that name.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

# ---------------------------------------------------------------------------------------------------- arguments


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument(
        "--task", required=True, choices=("action_anticipation", "inverse_dynamics", "video_classification")
    )
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", required=True, help="built data set: a folder or a Hub repository")
    data.add_argument("--action_space", default="vpt-36", help="vpt-13, vpt-36, vpt-38, or columns by commas")
    data.add_argument("--action_stats", default="auto", help="auto (the data set's), compute, or a JSON file")
    data.add_argument("--resize_mode", choices=("crop", "squash"), default="crop", help="how the data set was built")
    data.add_argument("--labels", help="classification: JSON file {recording: label}, a column, or 'hotbar' (docs)")
    data.add_argument("--max_train_clips", type=int, help="use this many, spread over the split (default: all)")
    data.add_argument("--eval_clips", type=int, help="validation clips, spread over the split (default: all)")
    data.add_argument("--num_workers", type=int, default=2, help="loader processes per training process")
    data.add_argument(
        "--cache_features", default="auto", help="folder (auto: OUT/features), or none: encode every time"
    )
    data.add_argument("--cache_dtype", choices=("bfloat16", "int8", "float32"), default="bfloat16")

    model = parser.add_argument_group("model")
    model.add_argument("--model", help="world model: repository or folder")
    model.add_argument("--encoder", help="instead: a pretrained V-JEPA 2, or 'random' for an untrained one")
    model.add_argument("--model_config", default="vitl16", help="with --encoder random: preset or JSON file")
    model.add_argument("--frame_size", help="with --encoder: pixels, or HEIGHT,WIDTH; default: the encoder's")
    model.add_argument("--features_from", choices=("encoder", "predictor"), default="encoder")
    model.add_argument("--train_encoder", action="store_true", help="train the world model too (without a cache)")
    model.add_argument("--head_hidden_size", type=int, default=128)
    model.add_argument("--head_num_hidden_layers", type=int, default=2)
    model.add_argument("--head_num_attention_heads", type=int, default=4)
    model.add_argument("--anticipation_steps", type=int, default=2, help="anticipation: actions told at every step")
    model.add_argument("--use_past_actions", action="store_true", help="anticipation: tell the head past actions")
    model.add_argument("--use_states", action="store_true", help="anticipation: tell the head yaw and pitch")

    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--max_steps", type=int, default=5000, help="optimizer steps")
    optimisation.add_argument("--per_device_batch_size", type=int, default=32, help="clips a process and step")
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
    run.add_argument("--checkpoint_every", type=int, default=500, help="steps; the last step is always kept")
    run.add_argument("--keep_checkpoints", type=int, default=2)
    run.add_argument("--resume", default="auto", help="auto, never, or a checkpoint's path")
    run.add_argument("--log_every", type=int, default=50)
    run.add_argument("--eval_every", type=int, default=500, help="steps between validations; the last is always one")
    return check_arguments(parser, parser.parse_args())


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> argparse.Namespace:
    for name in (
        "max_steps",
        "per_device_batch_size",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "eval_every",
    ):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, found {getattr(arguments, name)}")
    if (arguments.model is None) == (arguments.encoder is None):
        parser.error("give either --model, or --encoder ('random' for an untrained one)")
    if (arguments.task == "video_classification") != (arguments.labels is not None):
        parser.error(f"--labels belongs to video_classification and is needed there; --task is {arguments.task}")
    if arguments.train_encoder and arguments.cache_features == "auto":
        arguments.cache_features = "none"
    if arguments.train_encoder and arguments.cache_features != "none":
        parser.error(f"--train_encoder changes the features: no --cache_features {arguments.cache_features}")
    if arguments.cache_features == "auto":
        arguments.cache_features = str(arguments.output_dir / "features")
    return arguments


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub import ModelCard, ModelCardData
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import VJEPA2Config
from transformers.utils import cached_file

from vjepa_ac_hf import ACTION_COLUMNS, VJEPA2ACConfig, VJEPA2ACModel, VJEPA2ACProcessor
from vjepa_ac_hf.configuration_encoder_vjepa2_ac import parse_resolution
from vjepa_ac_hf.evaluation.clips import spread
from vjepa_ac_hf.evaluation.head_report import write_head_report
from vjepa_ac_hf.loading.clips import (
    ClipCollator,
    check_clips,
    check_players,
    clip_frame_rate,
    load_action_statistics,
    load_clips,
)
from vjepa_ac_hf.loading.feature_cache import cache_features
from vjepa_ac_hf.loading.loader import ClipLoader
from vjepa_ac_hf.records import command_line, versions, weights_checksum, write_json
from vjepa_ac_hf.training.checkpoints import (
    find_checkpoint,
    get_random_state,
    load_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
)
from vjepa_ac_hf.training.distributed import end_processes, from_main
from vjepa_ac_hf.training.heads import (
    TASKS,
    ClipLabels,
    clips_with_label,
    evaluate_head,
    fit_key_thresholds,
    fit_pos_weight,
    head_inputs,
    head_parameter_groups,
    headline,
    read_labels,
    save_head,
)
from vjepa_ac_hf.training.optimization import build_scheduler, continue_schedule
from vjepa_ac_hf.training.presets import build_config
from vjepa_ac_hf.training.run_log import MetricsLog, check_same_run, jsonable

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
        pixels = {"pixel_mean": own.pixel_mean, "pixel_std": own.pixel_std, "fps": own.fps}
        if own.resize_mode != arguments.resize_mode:
            raise ValueError(
                f"{file}: the world model's resize_mode is {own.resize_mode!r}, --resize_mode is "
                f"{arguments.resize_mode!r}"
            )
    else:
        clips = load_clips(arguments.dataset, "train", streaming=True)
        pixels = {"fps": clip_frame_rate(clips, f"{arguments.dataset}, split train")}
    return VJEPA2ACProcessor(
        **pixels,
        resolution=config.resolution,
        resize_mode=arguments.resize_mode,
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
    wanted = (arguments.max_train_clips, arguments.eval_clips)
    chosen = [clips.select(spread(len(clips), number)) for clips, number in zip(splits.values(), wanted, strict=True)]
    labelled = [clips_with_label(clips, arguments.labels) for clips in chosen]
    return labelled, sum(map(len, chosen)) - sum(map(len, labelled))


def build_head(arguments: argparse.Namespace, world, processor, train, validation):
    """A new head over the world model and, for classification, the labels of all clips."""
    fields = {k: getattr(arguments, k) for k in vars(arguments) if k.startswith("head_")}
    fields |= {"features_from": arguments.features_from, "freeze_encoder": not arguments.train_encoder}
    if arguments.task == "video_classification":
        known = ClipLabels(read_labels(train, arguments.labels))
        names = read_labels(train, arguments.labels) | read_labels(validation, arguments.labels)
        labels = ClipLabels(names, known.classes, known.several)
        kind = "multi" if labels.several else "single"
        fields |= {"id2label": dict(enumerate(labels.classes)), "problem_type": f"{kind}_label_classification"}
        return TASKS[arguments.task].from_world_model(world, **fields), labels
    fields |= {"action_space": processor.action_space, "action_statistics": processor.action_statistics}
    if arguments.task == "action_anticipation":
        fields |= {k: getattr(arguments, k) for k in ("anticipation_steps", "use_past_actions", "use_states")}
    head = TASKS[arguments.task].from_world_model(world, **fields)
    if arguments.pos_weight == "balanced":
        head.config.pos_weight = fit_pos_weight(train, head.config.binary_columns)
    return head, None


def build_loaders(arguments, accelerator, model, processor, train, validation):
    """Endless training batches of this process, and its share of the validation batches."""
    size, workers = arguments.per_device_batch_size, arguments.num_workers
    if arguments.cache_features != "none":
        options = {"dtype": arguments.cache_dtype, "batch_size": size, "num_workers": workers}
        options |= {"announce": accelerator.print}
        folder = Path(arguments.cache_features)
        world = model.vjepa2_ac
        validation = cache_features(
            world, validation, processor, folder / f"validation-{len(validation)}", accelerator, **options
        )
        train = cache_features(world, train, processor, folder / f"train-{len(train)}", accelerator, **options)
    rank, processes = accelerator.process_index, accelerator.num_processes
    loader = ClipLoader(
        *(train, processor, size),
        seed=arguments.seed,
        rank=rank,
        world_size=processes,
        num_workers=workers,
        device=accelerator.device,
    )

    def share(clips, rows: list[int]) -> DataLoader:
        collator = ClipCollator(processor)
        return DataLoader(Subset(clips, rows[rank::processes]), size, collate_fn=collator, generator=torch.Generator())

    # Thresholds of keys are fitted to clips that were trained on: as many as give every process one.
    fitting = spread(len(train), max(CLIPS_FOR_THRESHOLDS, processes))
    return loader, share(validation, list(range(len(validation)))), share(train, fitting)


# ---------------------------------------------------------------------------------------------------------- loop


def train_step(arguments, accelerator, model, wrapped, optimizer, batch, labels) -> float:
    """One optimizer step; the loss, mean over all processes."""
    with accelerator.autocast():
        loss = wrapped(**head_inputs(model, batch, labels)).loss
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], arguments.max_grad_norm)
    mean = float(accelerator.reduce(loss.detach(), reduction="mean"))
    if not math.isfinite(mean) or not math.isfinite(float(norm)):
        raise FloatingPointError(f"loss {mean}, gradient norm {float(norm)}; clips: {', '.join(batch['clips'])}")
    optimizer.step()
    optimizer.zero_grad()
    return mean


def train(arguments, accelerator, model, processor, splits, labels) -> dict:
    """Optimise until `max_steps`, with metrics and checkpoints. Returns the figures of the last validation."""
    folder = arguments.output_dir / "checkpoints"
    identity = jsonable({**vars(arguments), "num_processes": accelerator.num_processes})
    identity |= {
        "head": json.loads(model.config.to_json_string()),
        "encoder": weights_checksum(model.vjepa2_ac.encoder),
    }
    trained = model.head if model.config.freeze_encoder else model
    groups = head_parameter_groups(
        model, arguments.learning_rate, arguments.weight_decay, arguments.encoder_learning_rate
    )
    optimizer = torch.optim.AdamW(groups)
    warmup, decay = arguments.max_steps // 20, arguments.max_steps // 2
    scheduler = build_scheduler(optimizer, arguments.max_steps, warmup, decay)
    checkpoint = from_main(find_checkpoint(folder, arguments.resume) if accelerator.is_main_process else None)
    state = None if checkpoint is None else read_state(checkpoint)
    if state is not None:
        check_same_run(state["arguments"], identity, checkpoint)
    loader, validation, fitting = build_loaders(arguments, accelerator, model, processor, *splits)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    step = 0
    if state is not None:
        load_checkpoint(checkpoint, trained, optimizer.optimizer, accelerator)
        continue_schedule(scheduler, state["schedule"])
        loader.load_state_dict(state["loader"])
        step = state["step"]
        accelerator.print(f"continuing from {checkpoint}")
    log = MetricsLog(arguments.output_dir / "metrics.jsonl", step) if accelerator.is_main_process else None

    batches, figures, started, logged, losses = iter(loader), None, time.perf_counter(), step, []
    progress = tqdm(total=arguments.max_steps, initial=step, unit="step", disable=not accelerator.is_main_process)
    model.train()
    while step < arguments.max_steps:
        rate = scheduler.get_last_lr()[0]
        losses.append(train_step(arguments, accelerator, model, wrapped, optimizer, next(batches), labels))
        scheduler.step()
        step += 1
        progress.update()
        last = step == arguments.max_steps
        evaluate = last or step % arguments.eval_every == 0
        if evaluate or step % arguments.log_every == 0:
            clips = (step - logged) * arguments.per_device_batch_size * accelerator.num_processes
            row = {"step": step, "loss": sum(losses) / len(losses), "learning_rate": rate}
            row |= {"clips_per_second": clips / (time.perf_counter() - started)}
            if evaluate:
                figures = evaluate_head(model, validation, processor, accelerator, labels)
                row |= headline(figures)
            progress.set_postfix(loss=f"{row['loss']:.4f}")
            if log is not None:
                log.write(row)
            started, logged, losses = time.perf_counter(), step, []
        if last or step % arguments.checkpoint_every == 0:
            state = {"arguments": identity, "schedule": scheduler.state_dict(), "loader": loader.state_dict()}
            random = get_random_state(accelerator.device)
            save_checkpoint(folder, step, trained, optimizer.optimizer, random, state, accelerator)
            if accelerator.is_main_process:
                prune_checkpoints(folder, arguments.keep_checkpoints, None)
    progress.close()
    if arguments.key_thresholds == "f1" and labels is None:
        model.config.key_thresholds = fit_key_thresholds(model, fitting, processor, accelerator)
        figures = None
    return figures or evaluate_head(model, validation, processor, accelerator, labels)


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


def main() -> None:
    arguments = parse_arguments()
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    # Whatever can fail fails here, before anything is encoded.
    set_seed(arguments.seed)
    world = load_world_model(arguments)
    processor = build_processor(arguments, world)
    splits, without_label = load_splits(arguments, processor)
    if without_label:
        accelerator.print(f"--labels {arguments.labels}: {without_label} clips have no label and are left out")
    model, labels = build_head(arguments, world, processor, *splits)
    model.to(accelerator.device)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.print(
        f"{type(model).__name__}: {sum(p.numel() for p in model.head.parameters()):,} parameters over "
        f"{sum(p.numel() for p in model.vjepa2_ac.parameters()):,}; {len(splits[0]):,} training clips"
    )
    with logging_redirect_tqdm():
        figures = train(arguments, accelerator, model, processor, splits, labels)
    if accelerator.is_main_process:
        counts = {unit + "s": len(splits[1].unique(f"{unit}_id")) for unit in ("session", "player")}
        counts |= {"clips_without_label": without_label} if labels is not None else {}
        save_all(arguments, model, processor, {**counts, **figures}, len(splits[0]))
    end_processes(accelerator)


if __name__ == "__main__":
    main()
