"""The records of a run: what it depends on (`run.json`), how far it is (`run_status.json`), and its `metrics.jsonl`."""

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..records import git_revision, versions, write_file, write_json

# Variables that change what is computed or how; others may hold secrets.
_VARIABLES = ("ACCELERATE_", "CUBLAS_", "CUDA_", "NCCL_", "OMP_", "MKL_", "PYTORCH_", "TORCH_", "NVIDIA_TF32_OVERRIDE")


def jsonable(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}


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
                if json.loads(line)["step"] <= step:
                    rows.append(line + "\n")
            except json.JSONDecodeError as error:
                if number < len(lines):  # else it was cut off when the run was killed, and its step is done again
                    raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        write_file(path, "".join(rows).encode())

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def flush(self) -> None:
        """Bring all rows to the disk, before a checkpoint that counts on them."""
        with self.path.open("a") as file:
            os.fsync(file.fileno())


def write_run_record(arguments: argparse.Namespace, accelerator: Accelerator) -> None:
    """Write `run.json` with this start first and earlier ones of the same run under "earlier".

    All processes must call it; the main one writes.
    """
    device = accelerator.device
    name = f"{device.type} ({platform.processor() or platform.machine()})"
    devices = gather_object([torch.cuda.get_device_name(device) if device.type == "cuda" else name])
    record: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.orig_argv,
        "working_directory": str(Path.cwd()),
        "arguments": jsonable(vars(arguments)),
        "processes": accelerator.num_processes,
        "devices": devices,
        "versions": {**versions(), "cuda": torch.version.cuda},
        "git": git_revision(Path(__file__).resolve().parents[1]),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
        "platform": platform.platform(),
        "torch_threads": torch.get_num_threads(),
    }
    if accelerator.is_main_process:
        path = arguments.output_dir / "run.json"
        before = json.loads(path.read_text()) if path.is_file() else {}
        earlier = before.pop("earlier", [])
        earlier = [before, *earlier] if before else []
        write_json(path, {**record, "earlier": earlier})
