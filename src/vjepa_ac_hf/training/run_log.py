"""The record of a run: `metrics.jsonl`, what started it, and whether a continued run is still the same."""

import json
from pathlib import Path
from typing import Any

from ..records import write_file

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
        "gradient_checkpointing",
        "config",
        "dry_run",
        "dry_run_json",
        "hardware",
        "hardware_tflops",
        "devices",
        "mfu",
    }
)


def jsonable(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}


def check_same_run(saved: dict[str, Any], current: dict[str, Any], checkpoint: Path) -> None:
    """Refuse to continue a run with other arguments.

    Raises:
        ValueError: the fields that differ, with both values.
    """
    differing = sorted(
        k for k in saved.keys() | current.keys() if k not in FREE_ARGUMENTS and saved.get(k) != current.get(k)
    )
    if differing:
        details = "; ".join(f"{k}: {saved.get(k)!r} then, {current.get(k)!r} now" for k in differing)
        raise ValueError(
            f"{checkpoint} was made with other arguments ({details}). Start with the same ones, with another "
            "--output_dir, or with --resume never"
        )


class MetricsLog:
    """`metrics.jsonl`: an object a logged step, flushed as it is written.

    Continuing at a step drops what was logged after it, so that no step stands there twice.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        rows = []
        if path.is_file() and step > 0:
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    break  # a line cut off when the run was killed; the steps after it are done again
                if row["step"] <= step:
                    rows.append(line + "\n")
        write_file(path, "".join(rows).encode())

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    @staticmethod
    def last(path: Path) -> dict[str, Any]:
        """The last logged object, empty where nothing was logged."""
        lines = path.read_text().splitlines() if path.is_file() else []
        return json.loads(lines[-1]) if lines else {}
