"""What programs leave behind: files that appear whole, the versions and weights that numbers depend on."""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

PACKAGES = ("vjepa-ac-hf", "torch", "transformers", "datasets", "accelerate", "evaluate", "torchcodec", "numpy")


def write_file(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: who finds the file finds all of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = error.filename or str(path)  # of a full disk there is none
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_file` for JSON; a value that is not a number of JSON (NaN) is an error."""
    write_file(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def flush(path: Path) -> None:
    """Bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_files(source: Path, folder: Path, last: str | None = None) -> None:
    """Move the files of `source` to `folder`, `last` after all others; each appears whole, and is on the disk."""
    for path in sorted(source.iterdir(), key=lambda path: (path.name == last, path.name)):
        flush(path)
        os.replace(path, folder / path.name)
    source.rmdir()
    flush(folder)


def claim_folder(
    folder: Path, settings: Mapping[str, Any], *, file: str = "settings.json", defaults: Mapping[str, Any] | None = None
) -> None:
    """Make a folder for results of these settings, and write them there.

    Args:
        folder: may be there already, with the same settings.
        settings: whatever the results depend on, for JSON.
        file: name of the settings' file.
        defaults: values of settings that files of before do not name.

    Raises:
        ValueError: the folder holds results of other settings; the message has both values of each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file
    if path.is_file():
        known = {**(defaults or {}), **json.loads(path.read_text())}
        differing = [f"{k}: found {known.get(k)}, expected {v}" for k, v in settings.items() if known.get(k) != v]
        if differing:
            raise ValueError(f"{path}: made with other arguments ({'; '.join(differing)}); choose another --output")
    write_json(path, settings)


def command_line() -> str:
    """What started this program, as one would type it again."""
    program, *flags = sys.argv
    return " ".join([program if program.startswith("vjepa-ac ") else f"python {program}", shlex.join(flags)])


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


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


def json_checksum(value: Any) -> str:
    """CRC-32 of a value of JSON, whatever the order of its keys."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def weights_checksum(module: "nn.Module") -> str:
    """CRC-32 of all parameters and buffers of a module that is not sharded."""
    import torch  # who only writes files does not wait for it

    checksum = 0
    for name, tensor in module.state_dict().items():
        content = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
        checksum = zlib.crc32(content, zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"


def tensors_of(path: Path) -> "Iterator[tuple[str, Tensor]]":
    """Names and tensors of a safetensors file, one in memory at a time."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            yield name, file.get_tensor(name)


def tensor_digests(tensors: "Iterable[tuple[str, Tensor]]") -> dict[str, str]:
    """SHA-256 of each tensor's type, shape and values, by name."""
    import torch

    digests = {}
    for name, tensor in tensors:
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
        digests[name] = digest.hexdigest()
    return digests


def weights_digest(digests: Mapping[str, str]) -> str:
    """What names a model's weights wherever they lie: SHA-256 of the lines "name digest" in order of the names.

    Unlike the digest of a file it is the same in memory, on the disk, in one file or in several.
    """
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()
