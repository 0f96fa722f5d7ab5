"""`OUT/run.json`: everything that a run depends on, so that it can be made again (docs/training.md, "Quick start").

(`OUT/config.json` is the model's.)
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..records import versions, write_json
from .run_log import jsonable

# Variables that change what is computed or how; others may hold secrets.
_VARIABLES = ("ACCELERATE_", "CUBLAS_", "CUDA_", "NCCL_", "OMP_", "MKL_", "PYTORCH_", "TORCH_", "NVIDIA_TF32_OVERRIDE")


def git_revision(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that the code in `folder` is tracked in, and whether it has been changed; else None."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # a repository around an installed package is another one
        changed = git("status", "--porcelain", "--untracked-files=no", ":/").splitlines()
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()})"


def write_run_record(arguments: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """Write `run.json` with this start first and earlier ones of the same run under "earlier".

    All processes must call it; the main one writes.
    """
    devices = gather_object([_device_name(accelerator.device)])
    record: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.orig_argv if hasattr(sys, "orig_argv") else sys.argv,
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
        earlier: list[dict[str, Any]] = []
        if path.is_file():
            before = json.loads(path.read_text())
            earlier = [{k: v for k, v in before.items() if k != "earlier"}, *before.get("earlier", [])]
        write_json(path, {**record, "earlier": earlier})
    return record
