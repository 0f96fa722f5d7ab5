"""The command line of the training program."""

import argparse
from pathlib import Path

from .feature_cache import CACHE_DTYPES


def parse_arguments(description: str) -> argparse.Namespace:
    """The command line of `examples/train.py`, checked as far as that needs no files; mistakes exit with status 2."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    data = parser.add_argument_group("data")
    data.add_argument("--dataset", required=True, help="built data set: a folder or a Hub repository")
    data.add_argument("--streaming", action="store_true", help="read the training split as a stream")
    data.add_argument(
        "--shuffle_buffer", type=int, default=1000, help="clips among which a stream is mixed (default: %(default)s)"
    )
    data.add_argument("--num_workers", type=int, default=2, help="loader processes per training process")
    data.add_argument("--prefetch_factor", type=int, default=2, help="batches each of them makes ahead")
    data.add_argument("--action_space", default=None, help="vpt-13 (default), vpt-36, vpt-38, or columns by commas")
    data.add_argument("--action_stats", default="auto", help="auto (the data set's), compute, or a JSON file")
    data.add_argument(
        "--resize_mode",
        choices=("crop", "squash"),
        default="crop",
        help="how the data set was built (default: %(default)s)",
    )
    data.add_argument(
        "--cache_features", type=Path, help="folder: encode every clip once and train from there (docs/model.md)"
    )
    data.add_argument(
        "--cache_dtype",
        choices=CACHE_DTYPES,
        help="how they are stored; float32 trains exactly as without a cache (default: bfloat16)",
    )

    model = parser.add_argument_group("model")
    model.add_argument("--model_config", default="vitl16", help="tiny, vitl16, or a JSON file (default: %(default)s)")
    model.add_argument(
        "--encoder", help="pretrained V-JEPA 2: repository or folder; 'random' for none; default by config"
    )
    model.add_argument("--auto_steps", type=int, help="steps of the rollout loss (default: the configuration's)")
    model.add_argument("--loss_type", choices=("mse", "l1"), help="default: the configuration's")
    model.add_argument("--gradient_checkpointing", action="store_true", help="less memory, more computing")

    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--max_steps", type=int, default=10_000, help="optimizer steps")
    optimisation.add_argument("--per_device_batch_size", type=int, default=8, help="clips a process and forward pass")
    optimisation.add_argument("--gradient_accumulation_steps", type=int, default=1)
    optimisation.add_argument("--learning_rate", type=float, default=4.25e-4)
    optimisation.add_argument("--weight_decay", type=float, default=0.04)
    optimisation.add_argument("--warmup_steps", type=int, help="default: 5 %% of max_steps")
    optimisation.add_argument(
        "--decay_steps", type=int, help="linear decay to zero at the end; default: 5 %% of max_steps"
    )
    optimisation.add_argument("--max_grad_norm", type=float, default=1.0)
    optimisation.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    optimisation.add_argument("--seed", type=int, default=0)

    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", type=Path, required=True)
    run.add_argument("--checkpoint_every", type=int, default=1000, help="steps; the last step is always kept")
    run.add_argument("--keep_checkpoints", type=int, default=3, help="newest checkpoints to keep")
    run.add_argument(
        "--resume", default="auto", help="auto (newest complete checkpoint), never, or a checkpoint's path"
    )
    run.add_argument("--log_every", type=int, default=10, help="steps")
    run.add_argument("--eval_every", type=int, default=1000, help="steps between validations (0: never)")
    run.add_argument("--eval_clips", type=int, default=512, help="validation clips used, spread over the split")
    run.add_argument("--report_to", default="", help="by commas: tensorboard, trackio, wandb")
    run.add_argument("--push_to_hub", action="store_true", help="upload the final model")
    run.add_argument("--hub_model_id", help="ORG/NAME")
    run.add_argument("--hub_private", action="store_true", help="create the repository as private")

    arguments = parser.parse_args()
    positive = ("max_steps", "per_device_batch_size", "gradient_accumulation_steps", "log_every", "checkpoint_every")
    for name in (*positive, "keep_checkpoints", "shuffle_buffer", "prefetch_factor"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, found {getattr(arguments, name)}")
    if arguments.push_to_hub and not arguments.hub_model_id:
        parser.error("--push_to_hub needs --hub_model_id ORG/NAME")
    if arguments.streaming and arguments.cache_features:
        parser.error("--cache_features needs random access: leave out --streaming")
    if arguments.cache_dtype is None:  # without a cache, features are trained on as they are computed
        arguments.cache_dtype = "bfloat16" if arguments.cache_features else "float32"
    if arguments.cache_dtype != "float32" and not arguments.cache_features:
        parser.error(f"--cache_dtype {arguments.cache_dtype} needs --cache_features DIR")
    for name in ("warmup_steps", "decay_steps"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, arguments.max_steps // 20)
    return arguments
