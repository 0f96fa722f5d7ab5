"""Python programs in processes of their own, without the seconds that importing torch and its like takes each time.

A process that has imported what the package imports from others, and nothing of the package, forks one for every
program. It has the program's arguments, folder, environment and import path, runs it as `__main__`, ends as the
interpreter does, and can be killed. What is about an interpreter's start and end, or its memory, needs a real one.
"""

import ast
import atexit
import gc
import json
import os
import runpy
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What others' packages read while they are imported: a server for each of its values.
AT_IMPORT = ("HF_", "TRANSFORMERS_", "OMP_", "MKL_", "ATEN_", "CUDA_", "TORCH")
_home = tempfile.TemporaryDirectory()
_servers: dict[frozenset, subprocess.Popen] = {}


class Program:
    """`python ARGUMENTS` as `start` has begun it: one at a time."""

    def __init__(self, server: subprocess.Popen, arguments: list[str], folder: tempfile.TemporaryDirectory):
        self._server, self._arguments, self._folder = server, arguments, folder
        self.pid, self.returncode = int(server.stdout.readline()), None

    def poll(self) -> int | None:
        """The exit status, negative for the signal that ended it; None while it runs."""
        if self.returncode is None and select.select([self._server.stdout], [], [], 0)[0]:
            self.returncode = int(self._server.stdout.readline())
        return self.returncode

    def wait(self) -> subprocess.CompletedProcess:
        if self.returncode is None:
            self.returncode = int(self._server.stdout.readline())
        out, err = ((Path(self._folder.name) / name).read_text() for name in ("out", "err"))
        self._folder.cleanup()
        return subprocess.CompletedProcess([sys.executable, *self._arguments], self.returncode, out, err)


def start(arguments: Sequence[Any], *, cwd: Any = None, env: Mapping[str, str] | None = None) -> Program:
    """Begin `python ARGUMENTS`: a file, `-c` and code, or `-m` and a module, and what follows.

    It is offline and has an empty cache of the Hub's, unless `env` says otherwise.
    """
    alone = {"HF_HUB_OFFLINE": "1", "HF_HOME": _home.name}
    environment = alone | dict(os.environ if env is None else env)
    at_import = {k: v for k, v in environment.items() if k.startswith(AT_IMPORT)}
    key = frozenset(at_import.items())
    if key not in _servers:
        own = {k: v for k, v in os.environ.items() if not k.startswith(AT_IMPORT)} | at_import
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        _servers[key] = subprocess.Popen([sys.executable, __file__], env=own, **pipes)
        atexit.register(_close, _servers[key])
    folder = tempfile.TemporaryDirectory()
    request = [[str(argument) for argument in arguments], str(cwd or os.getcwd()), environment, folder.name]
    _servers[key].stdin.write(json.dumps(request).encode() + b"\n")
    return Program(_servers[key], request[0], folder)


def _close(server: subprocess.Popen) -> None:
    server.stdin.close()
    server.wait()


def run(arguments: Sequence[Any], *, cwd: Any = None, env: Mapping[str, str] | None = None) -> Any:
    """As `start`; its output, as text, and its status, as `subprocess.run` has them."""
    return start(arguments, cwd=cwd, env=env).wait()


def _import_others() -> None:
    """What the package's files import from other packages when they are imported themselves."""
    for file in sorted((ROOT / "src" / "vjepa_ac_hf").rglob("*.py")):
        for node in ast.parse(file.read_text()).body:
            ours = "vjepa_ac_hf" in ast.unparse(node)
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0) and not ours:
                try:
                    exec(compile(ast.Module([node], []), str(file), "exec"), {})
                except ImportError:  # of an extra that is not installed
                    continue


def _serve() -> None:
    own, answers = sys.path[1:], os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an import says
    _import_others()
    gc.freeze()  # the programs' own collections need not look through all of that
    for line in sys.stdin:
        arguments, cwd, environment, folder = json.loads(line)
        child = os.fork()
        if child == 0:
            for number, name in ((0, os.devnull), (1, f"{folder}/out"), (2, f"{folder}/err")):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), number)
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(environment)
            time.tzset()
            first = "" if arguments[0] in ("-c", "-m") else str(Path(arguments[0]).resolve().parent)
            given = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
            sys.path[:] = [first, *given, *own]
            _end(_status_of(arguments))
        answers.write(f"{child}\n")
        answers.flush()
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        answers.flush()


def _status_of(arguments: list[str]) -> int:
    """What a program's process ends with, once it has run."""
    try:
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            program = sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(arguments[1], "<string>", "exec"), program.__dict__)
        elif arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:  # noqa: BLE001 (whatever it is, the interpreter hands it to the hook)
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _end(status: int) -> None:
    """As an interpreter ends, but for the second that it takes to destroy all that was imported."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
