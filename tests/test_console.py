"""What programs say: one `error:` line for a mistake, tracebacks for faults, local names that never reach the Hub."""

import argparse
import errno
import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import python_forks
import torch
from helpers_training import TINY

from vjepa_ac_hf.console import NoSuchFolder, Parser, folder_or_repo, made, report
from vjepa_ac_hf.programs.command import PROGRAMS, ROOT
from vjepa_ac_hf.records import write_file

NEEDS = {"record": "vizdoom", "plan": "vizdoom", "train-rl": "stable_baselines3"}
# A mistake with each program, in a folder with `empty`, `video.mp4` and `full` (a shard, but no record of it), and what
# the line says.
MISTAKES = {
    "download": ("--index=nowhere.json --output=out", "No such file or directory: 'nowhere.json'"),
    "pack": ("--input=empty --output=out", "--input empty: no pair of .mp4 and .jsonl below it, 0 unpaired files"),
    "build": ("--shards empty/*.tar --output=out", "empty/*.tar"),
    "check-alignment": ("--shards empty/*.tar --output=out", "empty/*.tar"),
    "check-recordings": ("--shards empty/*.tar", "empty/*.tar"),
    "preview": ("--dataset=empty --output=out", "empty"),
    "report": ("--dataset=empty --output=out", "empty"),
    "record": ("--output=full", "holds shards but no recording.json; choose another --output"),
    "train": ("--dataset=empty --output_dir=out --model_config=tiny.json --encoder=random", "empty"),
    "evaluate": ("--model=empty --dataset=empty --output=out", "empty"),
    "train-head": ("--task=inverse_dynamics --model=empty --dataset=empty --output_dir=out", "empty"),
    "label": ("--model=empty --videos video.mp4", "empty"),
    "plan": ("--model=empty --output=out", "empty"),
    "landscape": ("--model=empty --dataset=empty --output=out", "empty"),
    "train-rl": ("--model=empty --output=out", "empty"),
    "push": ("--output_dir=empty", "empty: neither a final model nor a checkpoint that waits for a repository"),
    "seeds": ("--output=video.mp4 -- train --seed={seed} --output_dir={run}", "video.mp4"),
    "explore": ("--model=empty --dataset=empty", "empty"),
    "push-space": ("--model=empty --dataset=empty --output=full", "full"),
    "convert": ("--checkpoint=none.pt --output=out", "No such file or directory: 'none.pt'"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # programs set it
    for name in ("empty", "full"):
        Path(name).mkdir()
    Path("full/shard-000000.tar").touch()
    Path("video.mp4").touch()
    Path("tiny.json").write_text(json.dumps(TINY))
    return tmp_path


def run(name: str, flags: list[str], monkeypatch) -> int:
    """A program as the interpreter runs it, without the seconds that importing torch takes."""
    monkeypatch.setattr(sys, "argv", [f"vjepa-ac {name}", *flags])
    try:
        if name == "convert":
            sys.modules.pop("vjepa_ac_hf.convert_vjepa2_ac_to_hf", None)
            runpy.run_module("vjepa_ac_hf.convert_vjepa2_ac_to_hf", run_name="__main__")
        else:
            runpy.run_path(str(ROOT / PROGRAMS[name][0]), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except Exception:  # noqa: BLE001 (whatever it is, the interpreter hands it to the hook)
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def test_every_program_has_its_mistake():
    assert MISTAKES.keys() == PROGRAMS.keys()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_mistake_is_told_in_one_line(name, folder, monkeypatch, capsys):
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    flags, message = MISTAKES[name]
    assert run(name, flags.split(), monkeypatch) == 1
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0], said
    assert "Traceback" not in said


def test_a_traceback_is_shown_on_request_and_the_status_is_1(folder):
    command = [ROOT / "dataset_scripts" / "pack_shards.py", "--input=empty", "--output=out"]
    for more, shown in (([], False), (["--traceback"], True)):
        done = python_forks.run([*command, *more])
        assert done.returncode == 1 and ("Traceback" in done.stderr) == shown, done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: --input empty: no pair")


def raised(call) -> Exception:
    try:
        call()
    except Exception as error:  # noqa: BLE001 (handed on)
        return error
    raise AssertionError("nothing was raised")


def refuse():
    raise ValueError("of this test, which is no program")


@pytest.mark.parametrize(
    "fault",
    [
        lambda: write_file(Path("x"), None),  # a TypeError in this package
        lambda: write_file(7, b""),  # an AttributeError
        lambda: made("x", "y", 7),
        refuse,  # a ValueError, raised on purpose, but not by us
        lambda: int("seven"),
        lambda: torch.zeros(2) @ torch.zeros(3),  # a RuntimeError of torch
    ],
)
def test_faults_of_ours_keep_their_traceback(fault, capsys):
    error = raised(fault)
    assert report(error) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "error: " not in said


def test_a_value_error_of_an_operation_in_our_code_is_a_fault(capsys):
    """Where this package says `raise` a user can mend something; where `int()` fails in it, we have made a mistake."""
    from vjepa_ac_hf.recordings.names import missing_columns  # any function of ours that others' values come into

    error = raised(lambda: exec(compile("int('x')", missing_columns.__code__.co_filename, "exec")))
    report(error)
    assert "Traceback" in capsys.readouterr().err
    report(raised(lambda: exec(compile("raise ValueError('y')", missing_columns.__code__.co_filename, "exec"))))
    assert capsys.readouterr().err == "error: y\n"


# In a process of its own, which may fork: who has threads may not.
IN_WORKERS = """
import errno, gc, multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor

from torch.utils.data import DataLoader
from vjepa_ac_hf import console
from vjepa_ac_hf.loading.clips import decode_clip

def undecodable(_):
    decode_clip({"bytes": b"no video", "path": None}, "recording r, tick 8", 16)

def missing(_):
    raise FileNotFoundError(errno.ENOENT, "No such file or directory", "clip.mp4")

def word(_):
    int("seven")

def loader(fault):
    list(DataLoader([0], num_workers=1, collate_fn=fault, multiprocessing_context="fork"))

def executor(fault):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        list(pool.map(fault, [0]))

def pool(fault):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.map(fault, [0])

console.Parser().parse_args(sys.argv[1:])
for worker in (loader, executor, pool):
    for fault in (undecodable, missing, word):
        try:
            worker(fault)
        except Exception as error:
            sys.stderr.write(f"== {worker.__name__} {fault.__name__}\\n")
            console.report(error)
        gc.collect()  # a loader that a forked process would come to destroy complains
"""


@pytest.mark.parametrize("flags", [(), ("--traceback",)])
def test_mistakes_that_workers_find_are_told_in_one_line(flags):
    """They come from another process, as text; what is a mistake there is one here, and a fault a fault."""
    done = python_forks.run(["-c", IN_WORKERS, *flags], env=os.environ | {"OMP_NUM_THREADS": "1"})
    said = dict(part.split("\n", 1) for part in done.stderr.split("== ")[1:])
    lines = {
        "undecodable": "error: recording r, tick 8: the video cannot be decoded: ",
        "missing": "error: [Errno 2] No such file or directory: 'clip.mp4'\n",
    }
    assert said.keys() == {f"{w} {f}" for w in ("loader", "executor", "pool") for f in (*lines, "word")}
    for name, text in said.items():
        line = lines.get(name.split()[1])
        if line is None:
            assert "Traceback" in text and "in word" in text and "error: " not in text, text
        else:
            assert text.splitlines(keepends=True)[-1].startswith(line) and text.count("error: ") == 1, text
            assert ("Traceback" in text) == bool(flags) and (flags or text.count("\n") == 1), text
            assert not flags or f"in {name.split()[1]}\n" in text


def test_missing_packages_and_long_messages_are_one_line(capsys):
    report(raised(lambda: __import__("no_such_package")))
    report(OSError("one\n  two\n"))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["error: No module named 'no_such_package'", "error: one two"]


def test_a_full_disk_names_the_path_and_the_space(tmp_path, monkeypatch, capsys):
    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")  # without a name, as a write has it

    monkeypatch.setattr(Path, "write_bytes", full)
    report(raised(lambda: write_file(tmp_path / "metrics.json", b"{}")))
    monkeypatch.undo()
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert f"({tmp_path / 'metrics.json'}: " in said and " GB free)" in said
    # A library that knows no path: the folders that the program was given.
    parser = Parser()
    parser.add_argument("--output", type=Path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    parser.parse_args(["--output", str(tmp_path / "new" / "out")])
    report(RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"))
    said = capsys.readouterr().err
    assert f"{tmp_path / 'new' / 'out'}: " in said and "GB free" in said and said.count("\n") == 1


# ------------------------------------------------------------------------------------------------- names of folders


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "../model", "a/b/c", "empty/model", "model/", "~/none"])
def test_names_of_folders_are_refused(folder, name):
    with pytest.raises(NoSuchFolder, match="no such folder"):
        folder_or_repo(name)


@pytest.mark.parametrize("name", ["facebook/vjepa2-vitl-fpc64-256", "random", "empty", "./empty", "empty/"])
def test_folders_and_names_of_repositories_are_taken(folder, name):
    assert folder_or_repo(name) == name


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        *((name, "dataset") for name in ("preview", "report", "train", "evaluate", "train-head", "landscape")),
        *((name, "model") for name in ("evaluate", "train-head", "label", "plan", "landscape", "train-rl")),
        *((name, "encoder") for name in ("train", "train-head")),
    ],
)
def test_no_program_looks_for_a_folder_on_the_hub(name, flag, folder, monkeypatch, capsys):
    assert run(name, [f"--{flag}=empty/none"], monkeypatch) == 2
    said = capsys.readouterr().err
    assert f"argument --{flag}: empty/none: no such folder ({folder / 'empty'} holds nothing)" in said


def test_what_was_made_is_told_in_one_line():
    assert made("model", Path("out"), {"loss": 0.123456, "step": 8, "validation_loss": None}) == (
        "model: out (loss 0.1235, step 8)"
    )
    assert made("report", "r.html") == "report: r.html"


def test_the_flag_leaves_no_trace_in_the_arguments(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert Parser().parse_args(["--traceback"]) == argparse.Namespace()
    assert os.environ.get("RANK", "0") == "0"
    with pytest.raises(SystemExit) as end:
        Parser().parse_args(["--trace"])  # not abbreviated
    assert end.value.code == 2
