"""benchmarks/gpu.py on a CPU at tiny size: every part runs, and what it compares is the same work."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers_training import ROOT, load_program

COMPILED = ("graphs", "compiled")  # take a quarter of a minute on a CPU
FLAGS = ("--device", "cpu", "--tiny")
# What a machine without these packages sees.
WITHOUT_PACKAGES = """
import os, runpy, sys
from importlib.machinery import PathFinder

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        hidden = name.split(".")[0] in ("datasets", "torchcodec")
        return None if hidden else PathFinder.find_spec(name, path, target)

    find_distributions, invalidate_caches = PathFinder.find_distributions, PathFinder.invalidate_caches

sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield load_program("benchmarks/gpu.py")


def run_here(benchmark, monkeypatch, output, *flags):
    """The command with its parts in this process; before each, the file must hold all that came before."""
    before: list[str] = []

    def run_part(arguments, name, seconds):
        if before:
            assert list(json.loads(output.read_text())["seconds"]) == before
        before.append(name)
        rows: list[dict] = []
        keep = lambda found: rows.__setitem__(slice(None), json.loads(json.dumps(found, allow_nan=False)))  # noqa: E731
        benchmark.PARTS[name][1](benchmark.Bench("cpu", True, time.monotonic() + seconds, keep))
        return rows, None

    monkeypatch.setattr(benchmark, "run_part", run_part)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(output), *FLAGS, *flags])
    benchmark.main()
    return json.loads(output.read_text())


def check(results, parts):
    assert list(results["seconds"]) == list(parts) and not results["left_out"]
    for part in parts:
        rows = [row for row in results["rows"] if row["part"] == part]
        assert rows, part
        for row in rows:
            assert row["value"] > 0 if "left_out" not in row else row["value"] is None
            # Ours and what it is measured against do the same; bf16 with another order of sums differs a little.
            assert row.get("difference", 0) < 0.05, row
    peak = results["matmul_tflops_per_second"]
    for row in results["rows"]:
        if "tflops_per_second" in row and peak:
            assert row["share_of_peak"] == pytest.approx(row["tflops_per_second"] / peak)


@pytest.mark.usefixtures("attention_in_bf16")
def test_every_part_runs_and_compares_the_same_work(benchmark, tmp_path, monkeypatch, capsys):
    parts = [name for name in benchmark.PARTS if name not in COMPILED]
    results = run_here(benchmark, monkeypatch, tmp_path / "out.json", "--parts", *parts)
    check(results, parts)
    shown = capsys.readouterr().out
    assert "| training | training step, baseline, batch 2 |" in shown
    assert "| flex | training step, flex | FlexAttention has no gradients on a CPU |" in shown
    named = {row["what"] for row in results["rows"]}
    assert {"plans of 4 candidates, horizon 1", "plans of 4 candidates, horizon 8"} <= named
    memory = [row for row in results["rows"] if row["part"] == "memory"]
    assert [row["estimated"] for row in memory] == sorted((row["estimated"] for row in memory), reverse=True)
    assert all(row["value"] == pytest.approx(row["measured"] / row["estimated"]) for row in memory)


@pytest.mark.slow
def test_compiled_parts_run_and_give_the_same(benchmark, tmp_path, monkeypatch):
    check(run_here(benchmark, monkeypatch, tmp_path / "out.json", "--parts", *COMPILED), COMPILED)


@pytest.mark.usefixtures("attention_in_bf16")
def test_what_a_training_step_takes_is_in_its_figure(benchmark):
    """Clips a second, their ratio and operations, from times that are known."""
    rows: list[dict] = []
    bench = benchmark.Bench("cpu", True, time.monotonic() + 60, lambda found: rows.__setitem__(slice(None), found))
    bench.seconds = lambda calls, **_: {name: [0.5] if name == "ours" else [2.0] for name in calls}
    benchmark.compare_steps(bench, 2, "baseline")
    ours, baseline = rows
    assert (ours["value"], baseline["value"]) == (4, 1) and (ours["ratio"], baseline["ratio"]) == (1, 4)
    assert ours["tflops_per_second"] == 4 * baseline["tflops_per_second"] > 0
    assert baseline["difference"] < 1e-2  # the first loss, of equal weights


def test_a_batch_that_does_not_fit_is_followed_by_a_smaller_one(benchmark, monkeypatch):
    rows: list[dict] = []
    bench = benchmark.Bench("cpu", False, time.monotonic() + 60, lambda found: rows.__setitem__(slice(None), found))

    def compare(bench, batch, variant):
        if batch > 4:
            raise torch.OutOfMemoryError(f"no room for {batch}")
        bench.add(f"batch {batch}", 1.0, "clips/s")

    monkeypatch.setattr(benchmark, "compare_steps", compare)
    benchmark.training(bench)
    assert [row.get("left_out") for row in rows] == [*(f"out of memory: no room for {n}" for n in (16, 8)), None]
    assert rows[-1]["what"] == "batch 4"


def test_a_part_that_takes_too_long_is_stopped_and_one_without_time_is_not_begun(
    benchmark, tmp_path, monkeypatch, capsys
):
    arguments = SimpleNamespace(device="cpu", tiny=True)
    assert benchmark.run_part(arguments, "peak", 0.5) == ([], "stopped after 0 s")
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    monkeypatch.setattr(benchmark, "PACKAGES", ("torch", "no-such-package"))
    output = tmp_path / "out.json"
    flags = ["--output", str(output), *FLAGS, "--parts", "planner", "loader", "peak", "--minutes", "0.1"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    benchmark.main()
    expected = {"planner": "needs datasets", "loader": "needs datasets, torchcodec", "peak": "no time was left"}
    results = json.loads(output.read_text())
    assert results["left_out"] == expected
    assert results["versions"]["torch"] == torch.__version__ and results["versions"]["no-such-package"] is None
    assert "loader: needs datasets, torchcodec" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_runs_without_datasets_and_torchcodec(tmp_path):
    """Its parts run in processes of their own; the model's need torch, transformers and accelerate alone."""
    program, output = str(ROOT / "benchmarks" / "gpu.py"), tmp_path / "out.json"
    command = [sys.executable, "-c", WITHOUT_PACKAGES, program, "--output", str(output), *FLAGS]
    subprocess.run([*command, "--parts", "rollout", "planner", "loader"], check=True, cwd=tmp_path)
    results = json.loads(output.read_text())
    assert results["left_out"] == {"planner": "needs datasets", "loader": "needs datasets, torchcodec"}
    assert [row["part"] for row in results["rows"]] == ["rollout"] * 3
    for part in ("training", "candidates", "memory"):
        rows = tmp_path / f"{part}.json"
        alone = [*command, "--only", part, "--until", str(time.monotonic() + 60)]
        alone[alone.index(str(output))] = str(rows)
        subprocess.run(alone, check=True, cwd=tmp_path)
        assert all(row["value"] > 0 for row in json.loads(rows.read_text()))


@pytest.mark.slow
def test_a_part_that_fails_says_why(benchmark):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: nothing fails")
    rows, reason = benchmark.run_part(SimpleNamespace(device="cuda", tiny=True), "peak", 120)
    assert rows == [] and reason.startswith("exit status 2: ") and "PyTorch finds no CUDA device here" in reason
