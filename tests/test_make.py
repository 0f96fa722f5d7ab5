"""Set-up by make: it says what it does, and two at once in one clone install once."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Instead of Python: notes what it is asked to do, and takes a while to install.
FAKE = """#!/bin/sh
case "$*" in
    *"-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo "venv" >>calls ;;
    *"pip install"*torch) echo "torch begins" >>calls; sleep 0.5; echo "torch ends" >>calls ;;
    *"pip install"*) echo "packages" >>calls ;;
    *pytest*) echo "pytest" >>calls ;;
esac
"""

pytestmark = pytest.mark.skipif(not all(map(shutil.which, ("make", "flock"))), reason="needs make and flock")


@pytest.fixture
def clone(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (1_700_000_000, 1_700_000_000))
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "set_up.sh", tmp_path / ".ci")
    (tmp_path / ".ci" / "system_packages.sh").write_text("")
    (tmp_path / "python").write_text(FAKE)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def make(clone, *arguments):
    command = ["make", "PYTHON=./python", *arguments]
    # As a user's shell calls it, whoever runs the tests (`make test` does).
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.Popen(command, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=own)


def test_two_at_once_install_once_and_say_what_comes(clone):
    first = make(clone, "test")
    while not (clone / "calls").exists() or "torch begins" not in (clone / "calls").read_text():
        assert first.poll() is None
        time.sleep(0.01)
    second = make(clone, "test")
    said = [process.communicate()[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    calls = (clone / "calls").read_text().splitlines()
    assert calls == ["venv", "torch begins", "torch ends", "packages", "pytest", "pytest"]
    for text in said:
        lines = text.splitlines()
        assert lines[0].startswith("== set-up") and "Then the tests: 6 minutes on 2 cores." in lines[1]
    assert "3/4 torch" in said[0] and "waiting" in said[1] and "3/4" not in said[1]
    assert make(clone, "test").communicate()[0].startswith("== the tests: 6 minutes")


def test_what_was_interrupted_is_begun_again(clone):
    (clone / "python").write_text(FAKE.replace('echo "torch ends"', "exit 1; echo"))
    process = make(clone, "setup")
    said = process.communicate()[0]
    assert process.returncode and "4/4" not in said and not (clone / ".venv" / ".installed").exists()
    (clone / "python").write_text(FAKE)
    assert make(clone, "setup").wait() == 0
    assert (clone / "calls").read_text().splitlines()[-2:] == ["torch ends", "packages"]
    assert make(clone, "-q", "setup").wait() == 0
