"""What programs leave behind: files that appear whole, and the versions that numbers depend on."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("vjepa-ac-hf", "torch", "transformers", "datasets", "accelerate", "evaluate", "torchcodec", "numpy")


def write_file(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: who finds the file finds all of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """`write_file` for JSON; a value that is not a number of JSON (NaN) is an error."""
    write_file(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
