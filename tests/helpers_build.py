"""Builds in forked children, which a test may kill, and what they leave behind."""

import os
import runpy
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet  # noqa: F401
import torchcodec.decoders  # noqa: F401
from helpers_data import name_of, shard_of, write_recording
from tqdm import tqdm

from vjepa_ac_hf.console import report

SCRIPT = Path(__file__).parent.parent / "dataset_scripts" / "build_vpt_tubelets.py"
# Imported here with all it needs, so that a fork begins to build at once.
_main = runpy.run_path(str(SCRIPT))["main"]


def make_shards(folder: Path, shards: int, recordings: int, ticks: int) -> Path:
    """Tars of `recordings` each: sessions s0, s1, ... of two recordings, one after the other, one of them rejected."""
    (folder / "shards").mkdir(parents=True)
    for shard in range(shards):
        numbers = range(shard * recordings, (shard + 1) * recordings)
        names = [name_of(f"s{number // 2}", number % 2) for number in numbers]
        for number, name in zip(numbers, names, strict=True):
            write_recording(folder / "in", name, 50 if number == 2 else ticks, number)
        shard_of(folder / "in", folder / "shards" / f"shard-{shard:06d}.tar", names)
    return folder / "shards"


def fork_build(arguments: list, prepare: Callable[[], None] = lambda: None, log: str | Path = os.devnull) -> int:
    """Id of a forked process that runs the build program and exits with its status: no import to wait for."""
    process = os.fork()
    if process:
        return process
    code = 99
    # tqdm's own lock is shared with forked processes: one that is killed while it holds it would stop all others.
    tqdm.set_lock(threading.RLock())
    try:
        sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
        sys.argv = ["build_vpt_tubelets.py", *map(str, arguments)]
        prepare()
        code = _main()
    except SystemExit as stop:
        code = stop.code
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        code = report(error)  # as the interpreter does for an uncaught one
    finally:
        os._exit(code)


def status_of(process: int, seconds: float = 60) -> int:
    """Exit status of a child, -N where signal N has killed it."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        assert time.monotonic() < deadline, f"process {process} still runs"
        time.sleep(0.001)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_same_files(found: Path, expected: dict[str, bytes]) -> None:
    files = contents(found)
    assert sorted(files) == sorted(expected)
    assert [name for name in files if files[name] != expected[name]] == []
