"""The command line of the training program: flags, recipes, and what follows from both."""

import argparse
import os
from pathlib import Path

from ..console import Parser, add_clip_rule, folder_or_repo
from .recipes import find_recipe, load_recipe

# What the package offers, without importing it (tests/test_programs.py holds both equal): mistakes in flags are told
# before torch is there.
_CACHE_DTYPES = ("bfloat16", "int8", "float32")
_HARDWARE = ("a100", "h100", "h200")
# Limits of what is given, by flag: at least 1, at least 0, above 0.
_AT_LEAST_1 = (
    *("max_steps", "per_device_batch_size", "gradient_accumulation_steps", "global_batch_size", "devices"),
    *("log_every", "checkpoint_every", "keep_checkpoints", "shuffle_buffer", "prefetch_factor", "eval_clips"),
)
_AT_LEAST_0 = (
    *("num_workers", "eval_every", "weight_decay", "hub_wait"),
    *("learning_rate", "start_learning_rate", "final_learning_rate"),
)
_ABOVE_0 = ("max_grad_norm", "mfu", "loader_warning", "loader_timeout", "hub_timeout")


def build_parser(description: str) -> argparse.ArgumentParser:
    """All flags of `examples/train.py`, in groups."""
    parser = Parser(
        usage="%(prog)s [--config RECIPE] --dataset DIR_OR_REPO --output_dir OUT [flags]; --help lists them",
        description=description,
    )
    recipe = "recipe: a YAML file of flags, or the name of one in examples/configs; flags override it"
    parser.add_argument("--config", type=Path, help=recipe)
    for add_flags in (_add_data, _add_model, _add_optimisation, _add_run, _add_estimates):
        add_flags(parser)
    return parser


def _switch(group: argparse._ArgumentGroup, name: str, help: str, default: bool | None = False) -> None:
    group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=help)


def _add_data(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--dataset", type=folder_or_repo, help="built data set: a folder or a Hub repository (needed)")
    _switch(data, "streaming", "read the Parquet files where they lie, copying nothing")
    add("--shuffle_buffer", type=int, default=1000, help="clips among which a stream is mixed")
    add("--num_workers", type=int, default=2, help="loader processes per training process")
    add("--prefetch_factor", type=int, default=2, help="batches each of them makes ahead")
    spaces = "vpt-13, vpt-36, vpt-38, or columns by commas; default: that of --model_config, else vpt-13"
    add("--action_space", help=spaces)
    add("--action_stats", default="auto", help="auto (the data set's), compute, or a JSON file")
    add("--resize_mode", choices=("crop", "squash"), help="default: as the data set was built")
    add("--cache_features", type=Path, help="folder: encode every clip once and train from there (docs/model.md)")
    _switch(data, "verify_cache", "compare all videos with the cache at the start, not only files' sizes and times")
    stored = "how they are stored; float32 trains exactly as without a cache; default: bfloat16"
    add("--cache_dtype", choices=_CACHE_DTYPES, help=stored)


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--model_config", default="vitl16", help="tiny, vitl16, vitb16-v21, ..., or a JSON file or saved model")
    encoder = "pretrained V-JEPA 2 or 2.1: repository or folder, or 'random'; default: by --model_config"
    add("--encoder", type=folder_or_repo, help=encoder)
    frames = "side of the frames in pixels, or HEIGHT,WIDTH; default: --model_config's, else the encoder's"
    add("--frame_size", help=frames)
    initial = "folder of a saved model: its blocks and frame projections to start from"
    add("--init_predictor", type=Path, help=initial)
    add("--auto_steps", type=int, help="steps of the rollout loss; default: the configuration's")
    add("--loss_type", choices=("mse", "l1"), help="default: the configuration's")
    _switch(model, "gradient_checkpointing", "less memory, more computing")
    _switch(model, "compile", "torch.compile: faster steps after some minutes")


def _add_optimisation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimisation").add_argument
    add("--max_steps", type=int, default=10_000, help="optimizer steps")
    add("--per_device_batch_size", type=int, default=8, help="clips a process and forward pass")
    passes = "default: what --global_batch_size leaves to do, else 1"
    add("--gradient_accumulation_steps", type=int, help=passes)
    clips = "clips an optimizer step, of all processes; default: per_device_batch_size x accumulation x processes"
    add("--global_batch_size", type=int, help=clips)
    add("--learning_rate", type=float, default=4.25e-4, help="between warm-up and decay")
    add("--start_learning_rate", type=float, default=0.0, help="where the linear warm-up starts")
    add("--final_learning_rate", type=float, default=0.0, help="where the linear decay ends")
    add("--warmup_steps", type=int, help="default: 5 %% of max_steps")
    add("--decay_steps", type=int, help="at the end; default: 5 %% of max_steps")
    add("--weight_decay", type=float, default=0.04, help="on matrices, not on biases and norms")
    add("--max_grad_norm", type=float, default=1.0, help="longer gradients are scaled down to it")
    average = "the model is an average of the weights over training, of this decay (docs/training.md); 0: the last ones"
    add("--ema_decay", type=float, default=0.0, help=average)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    precision = "bf16: autocast; `accelerate launch` sets the default (default: %(default)s)"
    add("--mixed_precision", choices=("no", "bf16"), default=launched, help=precision)
    add("--seed", type=int, default=0, help="of weights and of the order of clips")


def add_loop_flags(
    run: argparse._ArgumentGroup, *, checkpoint_every: int, keep_checkpoints: int, log_every: int, eval_every: int
) -> None:
    """Flags of `training/loop.py`, for all programs that train."""
    add, kept = run.add_argument, "newest checkpoints to keep; the best stays too"
    add("--checkpoint_every", type=int, default=checkpoint_every, help="steps; the last step is always kept")
    add("--keep_checkpoints", type=int, default=keep_checkpoints, help=kept)
    add("--resume", default="auto", help="auto (newest complete checkpoint), never, or a checkpoint's path")
    add("--loader_warning", type=float, default=60.0, help="seconds without a batch before each warning")
    add("--loader_timeout", type=float, default=1800.0, help="seconds without a batch before an error")
    add("--log_every", type=int, default=log_every, help="steps between rows of metrics.jsonl")
    add("--eval_every", type=int, default=eval_every, help="steps between validations (0: never)")
    add("--eval_clips", type=int, default=512, help="validation clips used then, spread over the split")
    add("--report_to", default="", help="by commas: tensorboard, trackio, wandb")


def _add_run(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run")
    add = run.add_argument
    add("--output_dir", type=Path, help="folder of this run (needed)")
    add_loop_flags(run, checkpoint_every=1000, keep_checkpoints=3, log_every=10, eval_every=1000)
    add_clip_rule(run, "the validation clips (the rule's first --eval_clips)")
    drawn = "pictures of every validation, in OUTPUT_DIR/pictures and the trackers (default: with --report_to)"
    _switch(run, "log_pictures", drawn, default=None)
    add("--decoder", help="frame decoder for those pictures: a folder or a Hub repository")
    _switch(run, "push_to_hub", "keep the model on the Hub (docs/training.md)")
    add("--hub_model_id", help="ORG/NAME")
    _switch(run, "hub_private", "create the repository as private")
    _switch(run, "hub_squash", "make the repository's history one commit after each push (docs/training.md)")
    strategies, later = ("every_checkpoint", "end", "later"), "never contact the Hub, only prepare for examples/push.py"
    add("--hub_strategy", choices=strategies, default="every_checkpoint", help=f"later: {later}")
    silence = "seconds of silence after which a request to the Hub fails"
    add("--hub_timeout", type=float, default=60.0, help=silence)
    add("--hub_wait", type=float, default=1800.0, help="seconds to wait at the end for the final model to be up")


def _add_estimates(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("estimates", "nothing here changes what is trained").add_argument
    dry = "check everything, run one step without data or memory, print estimates"
    add("--dry_run", action="store_true", help=dry)
    add("--dry_run_json", type=Path, help="file: the estimates of --dry_run as JSON")
    devices = f"one of {', '.join(_HARDWARE)}, with --dry_run also a number, as in h100x8"
    add("--hardware", help=f"for hours and utilisation: {devices}")
    add("--hardware_tflops", type=float, help="peak of one device, instead of --hardware's")
    add("--devices", type=int, help="number of devices; default: --hardware's, else the processes")
    add("--mfu", type=float, default=0.4, help="share of the peak that hours are estimated with")


def parse_arguments(
    description: str, command_line: list[str] | None = None, recipes: Path | None = None
) -> argparse.Namespace:
    """The command line of `examples/train.py`, checked as far as that needs no files but the recipe's.

    Mistakes exit with status 2. What follows from other flags is filled in: warm-up and decay, accumulation, the
    global batch. `recipes` is the folder of those that `--config` may name without folder and suffix.
    """
    parser = build_parser(description)
    given = parser.parse_known_args(command_line)[0]
    if given.config is not None:
        try:
            recipe = load_recipe(find_recipe(given.config, recipes), parser)
            if given.cache_features and not given.streaming:
                recipe["streaming"] = False  # another way of reading, which the command line has chosen
            parser.set_defaults(**recipe)
        except ValueError as error:
            parser.error(str(error))
    arguments = parser.parse_args(command_line)
    for name in ("dataset", "output_dir"):
        if getattr(arguments, name) is None and not arguments.dry_run:
            parser.error(f"--{name} is needed (it may stand in --config)")
    _check_values(parser, arguments)
    for name in ("warmup_steps", "decay_steps"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, arguments.max_steps // 20)
    try:
        fill_in_batch(arguments, number_of_processes(arguments))
    except ValueError as error:
        parser.error(str(error))
    return arguments


def number_of_processes(arguments: argparse.Namespace) -> int:
    """Those that the launcher has started; for a dry run `--devices`, or those of `--hardware`, as in `h100x8`."""
    dry_run = getattr(arguments, "dry_run", False)
    if dry_run and arguments.devices:
        return arguments.devices
    if dry_run and arguments.hardware and (count := arguments.hardware.rpartition("x")[2]).isdigit():
        return int(count)
    return int(os.environ.get("WORLD_SIZE", 1))


def check_limits(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exit with status 2 where a number is too small; for all programs that train."""
    for name, value in vars(arguments).items():
        if name in _AT_LEAST_1 and value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, found {value}")
        if name in _AT_LEAST_0 and not value >= 0:
            parser.error(f"--{name} must be at least 0, found {value}")
        if name in _ABOVE_0 and not value > 0:
            parser.error(f"--{name} must be above 0, found {value}")


def _check_values(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.mixed_precision not in ("no", "bf16"):  # choices are not checked in defaults
        parser.error(f"mixed_precision of accelerate launch is {arguments.mixed_precision!r}, expected 'no' or 'bf16'")
    check_limits(parser, arguments)
    for name in ("start_learning_rate", "final_learning_rate"):
        rate, peak = getattr(arguments, name), arguments.learning_rate
        if rate > peak:
            parser.error(f"--{name} {rate} must be at most --learning_rate {peak}")
    if not 0 <= arguments.ema_decay < 1:
        parser.error(f"--ema_decay must be at least 0 and below 1, found {arguments.ema_decay}")
    if arguments.mfu > 1:
        parser.error(f"--mfu is a share of the peak, at most 1, found {arguments.mfu}")
    if arguments.hardware and arguments.hardware.lower().partition("x")[0] not in _HARDWARE:
        parser.error(
            f"--hardware {arguments.hardware}: expected one of {', '.join(_HARDWARE)} with or without a number "
            "(h100x8); for another device give --hardware_tflops and --devices"
        )
    if arguments.push_to_hub and not arguments.hub_model_id:
        parser.error("--push_to_hub needs --hub_model_id ORG/NAME")
    if arguments.streaming and arguments.cache_features:
        parser.error("--cache_features needs random access: leave out --streaming")
    if arguments.cache_dtype is None:  # without a cache, features are trained on as they are computed
        arguments.cache_dtype = "bfloat16" if arguments.cache_features else "float32"
    if arguments.cache_dtype != "float32" and not arguments.cache_features:
        parser.error(f"--cache_dtype {arguments.cache_dtype} needs --cache_features DIR")


def fill_in_batch(arguments: argparse.Namespace, processes: int) -> None:
    """Accumulation from the global batch, or the other way round.

    Raises:
        ValueError: a global batch that is no whole number of passes, or another than the accumulation given.
    """
    per_pass = arguments.per_device_batch_size * processes
    wanted, accumulation = arguments.global_batch_size, arguments.gradient_accumulation_steps
    if accumulation is None:
        if wanted is not None and wanted % per_pass:
            raise ValueError(
                f"--global_batch_size {wanted} is no multiple of --per_device_batch_size "
                f"{arguments.per_device_batch_size} x {processes} processes: choose a batch per device that divides it"
            )
        accumulation = 1 if wanted is None else wanted // per_pass
    if wanted is not None and wanted != accumulation * per_pass:
        raise ValueError(
            f"--global_batch_size {wanted}, but --per_device_batch_size {arguments.per_device_batch_size} x "
            f"--gradient_accumulation_steps {accumulation} x {processes} processes is {accumulation * per_pass}"
        )
    arguments.gradient_accumulation_steps = accumulation
    arguments.global_batch_size = accumulation * per_pass
