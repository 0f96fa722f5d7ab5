"""Trackers of a run through Accelerate: TensorBoard, Trackio, Weights & Biases.

A continued run goes on in the same run of the tracker: `trackers.json` in the output folder holds its name.
"""

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from transformers.utils.generic import flatten_dict

from ..records import write_json

TRACKERS = ("tensorboard", "trackio", "wandb")
PROJECT = "vjepa-ac"


def check_trackers(names: str) -> list[str]:
    """The trackers of a list by commas. (Accelerate leaves out in silence what is not installed.)

    Raises:
        ValueError: a tracker that is unknown, named twice, or not installed.
    """
    found = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in found if name not in TRACKERS]
    if unknown or len(set(found)) < len(found):
        problem = f"unknown: {', '.join(unknown)}" if unknown else "one is named twice"
        raise ValueError(f"--report_to takes names among {', '.join(TRACKERS)}, each once, found {names!r} ({problem})")
    available = {str(tracker) for tracker in get_available_trackers()}
    missing = [name for name in found if name not in available]
    if missing:
        raise ValueError(
            f"--report_to {names}: {', '.join(missing)} not installed; pip install 'vjepa-ac-hf[trackers]', or "
            f"pip install {' '.join(missing)}"
        )
    return found


def flatten_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one with names like "model/encoder_config/hidden_size".

    Trackers take numbers, strings and truth values (and None): lists become JSON, all else its `str`.
    """
    flat = {k: v for k, v in flatten_dict(dict(config), delimiter="/").items() if v != {}}
    flat |= {k: json.dumps(v, default=str) for k, v in flat.items() if isinstance(v, list | tuple)}
    return {k: v if isinstance(v, bool | int | float | str | None) else str(v) for k, v in flat.items()}


def start_trackers(accelerator: Accelerator, output_dir: Path, config: Mapping[str, Any], step: int) -> None:
    """Start the accelerator's trackers, in the run that this output folder had if it goes on from `step` > 0.

    TensorBoard hides what was logged after `step` before; Weights & Biases and Trackio keep what they have (Weights &
    Biases ignores steps that it has seen, Trackio shows the repeated steps beside the first ones).
    """
    if not accelerator.log_with:
        return
    run = _run_name(output_dir, step) if accelerator.is_main_process else ""
    options = {
        "tensorboard": {"purge_step": step + 1},
        "trackio": {"name": run, "resume": "allow"},
        "wandb": {"id": run, "name": run, "resume": "allow", "dir": str(output_dir)},
    }
    accelerator.init_trackers(PROJECT, config=flatten_config(config), init_kwargs=options)


def _run_name(output_dir: Path, step: int) -> str:
    path = output_dir / "trackers.json"
    if step > 0 and path.is_file():
        return json.loads(path.read_text())["run"]
    run = f"{output_dir.resolve().name}-{secrets.token_hex(4)}"
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(path, {"run": run})
    return run


@contextmanager
def closing_trackers(accelerator: Accelerator) -> Iterator[None]:
    """Finish the trackers on the way out, after a failure too: what they hold back is written, and a run that failed is
    not left as running."""
    failed = True
    try:
        yield
        failed = False
    finally:
        trackers, accelerator.trackers = accelerator.trackers, []
        for tracker in trackers:
            if failed and tracker.name == "wandb" and accelerator.is_main_process:
                tracker.tracker.finish(exit_code=1)
            else:
                tracker.finish()


def log_images(accelerator: Accelerator, images: Mapping[str, np.ndarray], step: int) -> None:
    """Images `(Y, X, 3)`, uint8, by name, to the trackers."""
    if not accelerator.is_main_process:
        return
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            batches = {name: image[None] for name, image in images.items()}
            tracker.log_images(batches, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [image] for name, image in images.items()}, step=step)
        elif tracker.name == "trackio":
            import trackio  # Accelerate's tracker has no images; installed, or the tracker had not started

            tracker.log({name: trackio.Image(image) for name, image in images.items()}, step=step)
