"""How programs speak: their flags, what a user can mend in one `error:` line, and at the end what they have made.

Imports Python's own library alone, so that flags are answered at once.
"""

import argparse
import dis
import errno
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

_PACKAGE = Path(__file__).resolve().parent
_FULL = ("os error 28", "Errno 28", "No space left")  # what libraries without an errno say
_IN_A_WORKER = re.compile(r"Caught (\w+) in (?:DataLoader worker|pin memory)")
_given: dict[str, Any] = {}  # flags of the program that runs


class Parser(argparse.ArgumentParser):
    """Flags of a program, `--traceback` among them; once they are parsed, errors are told by `report`.

    Flags are never abbreviated, and help shows their defaults. Mistakes in them exit with status 2; of several
    processes the first one tells them.
    """

    def __init__(self, **options: Any):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"allow_abbrev": False, "formatter_class": formatter, **options})
        self.add_argument("--traceback", action="store_true", help="show where in the code an error comes from")

    def format_help(self) -> str:
        for action in self._actions:
            # What is off unless it is given needs no default.
            is_off = action.const is True or action.default in (None, "", [], argparse.SUPPRESS)
            if not (is_off or action.required or "default" in (action.help or "")):
                action.help = f"{action.help} (default: %(default)s)" if action.help else "default: %(default)s"
        return super().format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        _given.clear()
        _given.update(vars(found))
        del found.traceback  # of no consequence for what a program makes
        sys.excepthook = _hook
        return found, rest

    def error(self, message: str) -> Any:
        if int(os.environ.get("RANK", 0)) == 0:
            super().error(message)
        sys.exit(2)


CLIP_RULES = ("clips-v1",)  # those of loading/clip_rules.py, which takes longer to import


def add_clip_rule(flags: Any, what: str) -> None:
    """The flag `--clip_rule` of programs that measure on clips of a data set (docs/evaluation.md, "The same clips")."""
    flags.add_argument("--clip_rule", choices=CLIP_RULES, help=f"choose {what} by their ids alone, as others will")


class NoSuchFolder(argparse.ArgumentTypeError, ValueError):
    """A name that can only be a folder's, and there is none."""


def folder_or_repo(name: str) -> str:
    """For flags that take a folder or a repository of the Hub: the name, if it is a folder's or may be a repository's.

    Raises:
        NoSuchFolder: there is no such folder, and the Hub has no such names: absolute, beginning or ending with `.`,
            `..` or a slash, of more than two parts, or in a folder that exists here.
    """
    path = Path(name).expanduser()
    parts = name.split("/")
    local = path.is_absolute() or not {"", ".", "..", "~"}.isdisjoint(parts) or len(parts) > 2
    if path.exists() or not (local or (len(parts) == 2 and Path(parts[0]).is_dir())):
        return name
    above = next(parent for parent in path.absolute().parents if parent.is_dir())
    held = sorted(entry.name for entry in above.iterdir() if not entry.name.startswith("."))
    shown = ", ".join(held[:5]) + (f" and {len(held) - 5} more" if len(held) > 5 else "") if held else "nothing"
    raise NoSuchFolder(f"{name}: no such folder ({above} holds {shown}), and no name of a repository, ORG/NAME")


def report(error: BaseException) -> int:
    """Tell an uncaught error on stderr: one `error:` line where a user can mend it, else the traceback.

    A user can mend what the program or this package raises on purpose, what the operating system or the Hub refuses,
    files that `from_pretrained` cannot load, packages that are not installed, and too little memory of a GPU; in a
    loader's worker or a pool's process too.

    Returns:
        The exit status, 1.
    """
    if _given.get("traceback") or not _mendable(error):
        traceback.print_exception(error)
    if _mendable(error):
        text = _message(error) or type(error).__name__
        if _is_full(error) and not _is_raised_here(error):
            text = _out_of_space(error)
        if type(error).__name__ == "OutOfMemoryError":
            text = f"the GPU's memory is too small ({text}); use smaller batches"
        sys.stderr.write(f"error: {' '.join(text.split())}\n")
    return 1


def made(what: str, where: str | Path, figures: Mapping[str, Any] | None = None) -> str:
    """The last line of a program: what it has made, where, and key figures (those that are None are left out)."""
    shown = {k: f"{v:.4g}" if isinstance(v, float) else f"{v}" for k, v in (figures or {}).items() if v is not None}
    text = ", ".join(f"{name} {value}" for name, value in shown.items())
    return f"{what}: {where}" + (f" ({text})" if text else "")


def _hook(kind: type[BaseException], error: BaseException, place: TracebackType | None) -> None:
    """`sys.excepthook` of programs; Python exits with status 1 (130 after Ctrl-C) whatever it does."""
    if isinstance(error, KeyboardInterrupt) and not _given.get("traceback"):
        sys.stderr.write("interrupted\n")
    elif isinstance(error, Exception):
        report(error)
    else:
        sys.__excepthook__(kind, error, place)


def _mendable(error: BaseException) -> bool:
    if isinstance(error, ImportError):
        return not (error.name or "").startswith("vjepa_ac_hf")
    if isinstance(error, OSError) or type(error).__name__ == "OutOfMemoryError" or _is_full(error):
        return True
    if isinstance(error, ValueError) or type(error).__name__ == "SafetensorError":
        names = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
        return "from_pretrained" in names or _is_raised_here(error)
    wrong_use = isinstance(error, AssertionError | AttributeError | LookupError | NotImplementedError | TypeError)
    return not wrong_use and _is_raised_here(error)


def _is_raised_here(error: BaseException) -> bool:
    """Whether a `raise` of this package or of the program made it, not a call or an operation that went wrong."""
    if (there := _remote_traceback(error)) is not None:
        frames = re.findall(r'^ *File "(.+)", line \d+, in .+\n +(.+)$', there, re.MULTILINE)
        return bool(frames) and _is_ours(frames[-1][0]) and frames[-1][1].startswith("raise ")
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return False
    code = place.tb_frame.f_code
    return _is_ours(code.co_filename) and code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _is_ours(name: str) -> bool:
    file = Path(name).resolve()
    return _PACKAGE in file.parents or file.parent.name in ("examples", "dataset_scripts")


def _remote_traceback(error: BaseException) -> str | None:
    """The traceback in another process, as text: that of a PyTorch loader is the message (torch/_utils.py,
    `ExceptionWrapper`), that of a pool the cause (concurrent/futures/process.py, multiprocessing/pool.py)."""
    if _IN_A_WORKER.match(str(error)):
        return str(error)
    is_pool = type(error.__cause__).__name__ in ("_RemoteTraceback", "RemoteTraceback")
    return str(error.__cause__) if is_pool else None


def _message(error: BaseException) -> str:
    """What an error says, without the traceback that a loader's worker puts before it."""
    text = str(error)
    if worker := _IN_A_WORKER.match(text):
        text = re.split(rf"^(?:\w+\.)*{worker[1]}: ", text, flags=re.MULTILINE)[-1]
    return text


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(sign in str(error) for sign in _FULL)


def _out_of_space(error: BaseException) -> str:
    """The path and its disk's space; of an error without a path, the folders that the program was given."""
    name = getattr(error, "filename", None)
    given = [value for value in _given.values() if isinstance(value, Path)]
    spaces = []
    for path in [Path(os.fsdecode(name))] if name is not None else [*given, Path(tempfile.gettempdir())]:
        usage = shutil.disk_usage(next(folder for folder in (path, *path.absolute().parents) if folder.is_dir()))
        spaces.append(f"{path}: {usage.free / 1e9:.2f} of {usage.total / 1e9:.2f} GB free")
    text = "; ".join(spaces)
    return f"no space left on the disk, or within the quota ({text}): make room, and start the same command again"
