"""The record of a run: `metrics.jsonl`, and how far it is."""

import json
import os
from pathlib import Path
from typing import Any

from ..records import write_file, write_json


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
