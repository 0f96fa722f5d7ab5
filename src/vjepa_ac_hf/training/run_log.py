"""The record of a run: `metrics.jsonl`, what started it, and whether a continued run is still the same."""

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..configuration_vjepa2_ac import VJEPA2ACConfig
from ..records import write_file, write_json

# Arguments that may differ between a run and its continuation: they do not change what is computed in a step, but for
# the ends of the schedule, which move with its length.
FREE_ARGUMENTS = frozenset(
    {
        "output_dir",
        "cache_features",
        "num_workers",
        "prefetch_factor",
        "max_steps",
        "warmup_steps",
        "decay_steps",
        "checkpoint_every",
        "keep_checkpoints",
        "resume",
        "log_every",
        "eval_every",
        "eval_clips",
        "report_to",
        "log_pictures",
        "push_to_hub",
        "hub_model_id",
        "hub_private",
        "hub_squash",
        "hub_strategy",
        "hub_timeout",
        "hub_wait",
        "gradient_checkpointing",
        "config",
        "dry_run",
        "dry_run_json",
        "hardware",
        "hardware_tflops",
        "devices",
        "mfu",
        "compile",
        "loader_warning",
        "loader_timeout",
        # Of checkpoints from before saving left the configuration as it was.
        "model.architectures",
        "model.auto_map.AutoConfig",
        "model.auto_map.AutoModel",
        "model.dtype",
    }
)


def jsonable(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}


def check_same_run(saved: dict[str, Any], current: dict[str, Any], checkpoint: Path) -> None:
    """Refuse to continue a run with other arguments; a field that the model had not yet then counts as its default.

    Raises:
        ValueError: the fields that differ, with both values.
    """
    saved, current = _flat(saved), _flat(current)
    added = {f"model.{f.name}": f.default for f in fields(VJEPA2ACConfig)}
    saved |= {k: added[k] for k in added.keys() & current.keys() - saved.keys()}
    differing = sorted(
        k for k in saved.keys() | current.keys() if k not in FREE_ARGUMENTS and saved.get(k) != current.get(k)
    )
    if differing:
        details = "; ".join(f"{k}: {saved.get(k)!r} then, {current.get(k)!r} now" for k in differing)
        raise ValueError(
            f"{checkpoint} was made with other arguments ({details}). Start with the same ones, with another "
            "--output_dir, or with --resume never"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields under names with dots, as JSON gives them back."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def write_status(folder: Path, status: str, step: int) -> None:
    """`run_status.json`: "running", "interrupted" (start the same command again) or "finished", and the last step.

    Launchers turn every exit status but 0 into 1; scripts can read this file instead.
    """
    write_json(folder / "run_status.json", {"status": status, "step": step})


class MetricsLog:
    """`metrics.jsonl`: an object a logged step, flushed as it is written.

    Continuing at a step drops what was logged after it, so that no step stands there twice.

    Raises:
        ValueError: a line that is no object of a step, other than one that was cut off at the end.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        rows = []
        lines = path.read_text().splitlines() if path.is_file() and step > 0 else []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):
                    break  # cut off when the run was killed; its step is done again
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if row["step"] <= step:
                rows.append(line + "\n")
        write_file(path, "".join(rows).encode())

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def flush(self) -> None:
        """Bring all rows to the disk, before a checkpoint that counts on them."""
        with self.path.open("a") as file:
            os.fsync(file.fileno())
