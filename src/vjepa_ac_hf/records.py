"""What programs leave behind: files that appear whole, the versions and weights that numbers depend on."""

import json
import os
import platform
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

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


def weights_checksum(module: "nn.Module") -> str:
    """CRC-32 of all parameters and buffers of a module that is not sharded."""
    import torch  # who only writes files does not wait for it

    checksum = 0
    for name, tensor in module.state_dict().items():
        content = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
        checksum = zlib.crc32(content, zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"
