"""Several runs of one recipe: figures over them against hand-made numbers, and real runs that are killed in between."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers_training import ROOT, load_program, write_workspace

from vjepa_ac_hf.evaluation.runs import aggregate, as_text, flatten, read_run, table, write_runs

# In place of `vjepa-ac NAME`: notes its start, then writes figures, fails, waits, or leaves another recipe's settings.
FAKE = """
import json, os, pathlib, signal, sys, time
name, what, folder, seed = sys.argv[1:5]
folder = pathlib.Path(folder)
folder.mkdir(parents=True, exist_ok=True)
with open(folder.parent / "starts.txt", "a") as file:
    file.write(name + "\\n")
def stopped(*_):
    (folder / "stopped").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stopped)
if what == "fail" and (name, seed) == ("train", "1") and not (folder / "failed").exists():
    (folder / "failed").touch()
    sys.exit(3)
if what == "wait" and not (folder / "stopped").exists():
    (folder / "waiting").touch()
    time.sleep(60)
record = {"error": int(seed) + 0.5, "clips": 7, "split": "other" if what == "differ" and seed == "1" else "validation"}
(folder / "metrics.json").write_text(json.dumps({**record, "ci95": {"error": [0.0, 9.0]}}))
"""


def write(folder: Path, **files) -> Path:
    for name, content in files.items():
        path = folder / name / ("metrics.json" if name != "model" else "training_args.json")
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    return folder


def test_every_kind_of_interval_finds_its_figure():
    content = {
        "clips": 684,
        "horizons": [
            {"horizon": 2, "error": 0.25, "pairs": 3, "mse": {"error": 0.5}, "ci95": {"error": [0.1, 0.4], "x": None}},
            {"horizon": 4, "error": 0.75, "win_rate": None, "ci95": None},
        ],
        "agents": {"planner": {"success_rate": 1.0, "success_rate_ci95": [0.8, 1.0], "steps": 3.5}},
        "psnr": {"mean": 20.5, "ci95": [19.0, 21.0]},
        "within": {"grid": [2.5, 10.0], "within_one_cell": 0.3, "ci95": [0.2, 0.4], "chance": 0.04},
        "settings": {"tolerance_degrees": 5.0},
        "flag": True,
    }
    assert list(flatten(content)) == [
        ("horizons.horizon 2.error", 0.25, (0.1, 0.4)),
        ("horizons.horizon 2.mse.error", 0.5, None),
        ("horizons.horizon 4.error", 0.75, None),
        ("agents.planner.success_rate", 1.0, (0.8, 1.0)),
        ("agents.planner.steps", 3.5, None),
        ("psnr.mean", 20.5, (19.0, 21.0)),
        ("within.within_one_cell", 0.3, (0.2, 0.4)),
        ("within.chance", 0.04, None),
    ]


def test_figures_over_runs_are_mean_spread_and_intervals(tmp_path):
    """By hand: 1, 2 and 6 have the mean 3 and the variance (4 + 1 + 9) / 2."""
    runs = {}
    for name, value in (("seed-0", 1.0), ("seed-1", 2.0), ("seed-7", 6.0)):
        report = {
            "ratio": value,
            "split": "validation",
            "weights_sha256": f"w-{name}",
            "model": f"{tmp_path / name}/model",
        }
        report |= {"decoder": f"{tmp_path / name}/decoder", "ci95": {"ratio": [value - 0.5, value + 0.25]}}
        arguments = {"seed": int(name[5:]), "learning_rate": 1e-3}
        runs[name] = read_run(write(tmp_path / name, report=report, model={"arguments": arguments}))
    summary = aggregate(runs)
    assert summary["runs"] == 3 and summary["weights_sha256"]["seed-7"] == {"report": "w-seed-7"}
    figure = summary["figures"].pop("report: ratio")
    assert summary["figures"] == {}
    assert figure["mean"] == 3.0 and figure["std"] == pytest.approx(7**0.5)
    assert (figure["min"], figure["max"], figure["runs"]) == (1.0, 6.0, 3)
    assert figure["values"] == {"seed-0": 1.0, "seed-1": 2.0, "seed-7": 6.0}
    assert figure["ci95"]["seed-1"] == (1.5, 2.25)
    summary["figures"]["report: ratio"] = figure
    shown = as_text(table(summary)).splitlines()
    assert shown[1].split("  ")[:1] == ["report: ratio"]
    assert all(text in shown[1] for text in ("3  ", "2.65", "1 to 6", "2 (1.5 to 2.25)"))
    write_runs(tmp_path, summary, {"1: train": "--seed {seed}"})
    assert json.loads((tmp_path / "runs.json").read_text())["figures"]["report: ratio"]["std"] == figure["std"]
    assert "Figures of 3 runs" in (tmp_path / "report.html").read_text()


def test_one_run_is_called_one_run(tmp_path):
    run = read_run(write(tmp_path / "seed-0", report={"ratio": 0.5, "ci95": {"ratio": [0.4, 0.6]}}))
    summary = aggregate({"seed-0": run})
    assert summary["figures"]["report: ratio"]["std"] is None
    assert table(summary)[1][2] == "one run"
    write_runs(tmp_path, summary, {})
    assert "one run: how much runs differ is not known" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"arguments": {"seed": 1, "learning_rate": 0.5}}}, "learning_rate: 0.1 in seed-0, 0.5 in seed-1"),
        ({"report": {"ratio": 0.5, "dataset": "b"}}, "report/metrics.json, dataset: 'a' in seed-0, 'b' in seed-1"),
        ({"report": {"ratio": 0.5, "dataset": "a", "settings": {"hold": 2}}}, "hold: None in seed-0, 2 in seed-1"),
    ],
)
def test_runs_of_other_recipes_have_no_mean(tmp_path, change, message):
    files = {"model": {"arguments": {"seed": 0, "learning_rate": 0.1}}, "report": {"ratio": 0.5, "dataset": "a"}}
    first = read_run(write(tmp_path / "seed-0", **files))
    with pytest.raises(ValueError, match="seed-1 is no run of the recipe of seed-0") as error:
        aggregate({"seed-0": first, "seed-1": read_run(write(tmp_path / "seed-1", **files | change))})
    assert message in str(error.value)


def test_one_table_is_of_one_set_of_clips(tmp_path):
    """Another rule, or other clips by the same rule: both values are named; landscapes have settings of their own."""

    def run(name, rule, digest, cells=9):
        clips = {"rule": rule, "clips": 63, "digest": digest}
        folder = write(tmp_path / name, report={"ratio": 0.5, "clip_set": clips, "clips": 63})
        land = {"summary": {"clips": 63, "within_one_cell": 0.25, "ci95": [0.125, 0.5], "chance": 0.0625}}
        land |= {"clip_set": clips, "settings": {"cells": cells, "goal": "frame", "min_change": 5.5}}
        land["landscapes"] = [{"clip": "a@0", "energies": [[0.5, 0.25]], "distance": 1.5}]
        (folder / "landscape").mkdir()
        (folder / "landscape" / "landscapes.json").write_text(json.dumps(land))
        return read_run(folder)

    runs = {"seed-0": run("seed-0", "clips-v1", "ab" * 32), "seed-1": run("seed-1", "clips-v1", "ab" * 32)}
    summary = aggregate(runs)
    landscape = summary["figures"]["landscape: summary.within_one_cell"]
    assert landscape["mean"] == 0.25 and landscape["ci95"]["seed-1"] == (0.125, 0.5)
    assert summary["figures"].keys() == {
        "report: ratio",
        "landscape: summary.within_one_cell",
        "landscape: summary.chance",
    }
    expected = {"rule": "clips-v1", "clips": 63, "digest": "ab" * 32}
    assert summary["clip_sets"] == {"landscape": expected, "report": expected}
    write_runs(tmp_path, summary, {})
    assert f"report: 63 clips by clips-v1, {'ab' * 32}" in (tmp_path / "report.html").read_text()
    for changed, message in (
        ({"rule": None}, "report/metrics.json, clip_set.rule: 'clips-v1' in seed-0, None in seed-2"),
        ({"digest": "cd" * 32}, f"clip_set.digest: '{'ab' * 32}' in seed-0, '{'cd' * 32}' in seed-2"),
        ({"cells": 21}, "landscape/landscapes.json, cells: 9 in seed-0, 21 in seed-2"),
    ):
        other = run(f"{len(message)}", **{"rule": "clips-v1", "digest": "ab" * 32, **changed})
        with pytest.raises(ValueError, match="seed-2 is no run of the recipe of seed-0") as error:
            aggregate({"seed-0": runs["seed-0"], "seed-2": other})
        assert message in str(error.value)


def test_models_of_the_runs_themselves_are_no_other_recipe(tmp_path):
    """As plan_vizdoom.py and train_rl.py tell what they read: names in the run's folder, and checksums."""
    runs = {}
    for name in ("seed-0", "seed-1"):
        plan = {"distance": f"{tmp_path / name}/head", "ensemble": [f"{tmp_path / name}/model", "org/world"]}
        plan |= {"distance_weights": f"d-{name}", "ensemble_weights": [f"e-{name}", "w"], "weights": f"w-{name}"}
        learnt = {"encoder": f"e-{name}", "predictor": f"p-{name}", "pooling": "mean"}
        files = {"plan": {"rate": 0.5, "settings": plan}, "rl": {"rate": 0.5, "settings": learnt}}
        runs[name] = read_run(write(tmp_path / name, **files, model={"arguments": {"encoder": "org/encoder"}}))
    assert aggregate(runs)["runs"] == 2
    other = {**runs["seed-1"], "settings": {**runs["seed-1"]["settings"], "model/training_args.json, encoder": "x"}}
    with pytest.raises(ValueError, match="encoder: 'org/encoder' in seed-0, 'x' in seed-1"):
        aggregate({"seed-0": runs["seed-0"], "seed-1": other})


@pytest.fixture
def seeds(tmp_path, monkeypatch):
    """The program with a fake in place of `vjepa-ac`; takes what the fake does, and flags."""
    program = load_program("examples/run_seeds.py")
    monkeypatch.setattr(program, "LAUNCHER", [sys.executable, "-c", FAKE])

    def run(what, *flags, programs=("train", "evaluate")):
        words = [word for name in programs for word in ("--", name, what, f"{{run}}/{name}", "{seed}")]
        monkeypatch.setattr(sys, "argv", ["run_seeds.py", f"--output={tmp_path / 'runs'}", *flags, *words])
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return program.main()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    run.folder = tmp_path / "runs"
    return run


def starts(folder, seed):
    return (folder / f"seed-{seed}" / "starts.txt").read_text().split()


@pytest.mark.parametrize("parallel", [1, 2])
def test_finished_programs_are_not_run_again(seeds, capfd, parallel):
    assert seeds("work", "--seeds", "0", "1", f"--parallel={parallel}") == 0
    summary = json.loads((seeds.folder / "runs.json").read_text())
    assert summary["figures"]["evaluate: error"]["values"] == {"seed-0": 0.5, "seed-1": 1.5}
    assert "figures of 2 runs: " in capfd.readouterr().out
    assert seeds("work", "--seeds", "0", "1", "2") == 0  # one more seed, and then one more program
    assert json.loads((seeds.folder / "runs.json").read_text())["figures"]["train: error"]["mean"] == 1.5
    assert seeds("work", "--seeds", "0", "1", "2", programs=("train", "evaluate", "plan")) == 0
    assert [starts(seeds.folder, seed) for seed in (0, 1, 2)] == 3 * [["train", "evaluate", "plan"]]
    with pytest.raises(ValueError, match=r"1: train: found work .*\{run\}/train.*, expected other"):
        seeds("other", "--seeds", "0")


def test_a_failure_is_named_and_continued_from(seeds):
    with pytest.raises(RuntimeError, match="seed 1, 1: train failed with exit status 3"):
        seeds("fail")
    assert not (seeds.folder / "runs.json").exists() and not (seeds.folder / "seed-2").exists()
    assert seeds("fail") == 0
    assert [starts(seeds.folder, seed) for seed in (0, 1)] == [["train", "evaluate"], ["train", "train", "evaluate"]]


def test_runs_that_turn_out_to_be_of_other_recipes_are_refused(seeds):
    with pytest.raises(ValueError, match="split: 'validation' in seed-0, 'other' in seed-1"):
        seeds("differ")
    assert not (seeds.folder / "runs.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_handed_on_once_and_the_same_command_goes_on(seeds, number):
    def interrupt():
        deadline = time.monotonic() + 60
        while not list(seeds.folder.glob("seed-*/train/waiting")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    import threading

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert seeds("wait", "--seeds", "0", "1") == 75
    thread.join()
    assert (seeds.folder / "seed-0" / "train" / "stopped").exists() and not (seeds.folder / "seed-1").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no program"),
        (["--", "trian", "{run}", "{seed}"], "trian"),
        (["--", "train", "--output_dir", "{run}/model"], "need {seed}"),
        (["--", "train", "--seed", "{seed}"], "need {run}"),
        (["--seeds", "1", "1", "--", "train", "--output_dir", "{run}/a", "{seed}"], "different"),
    ],
)
def test_mistakes_are_told(monkeypatch, capsys, words, message):
    program = load_program("examples/run_seeds.py")
    monkeypatch.setattr(sys, "argv", ["run_seeds.py", "--output=out", *words])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_the_demo_trains_other_seeds_as_the_first_one(monkeypatch, tmp_path):
    demo, seeds = load_program("examples/demo.py"), load_program("examples/run_seeds.py")
    commands = {}

    def run(title, program, *flags, launcher=()):
        commands[program] = [str(flag) for flag in flags]
        (tmp_path / "model").mkdir(exist_ok=True)  # by which the link is seen to lead there

    monkeypatch.setattr(demo, "run", run)
    for name in ("show_result", "show_runs"):
        monkeypatch.setattr(demo, name, lambda folder: None)
    for _ in range(2):  # a second time finds the first one's link
        monkeypatch.setattr(sys, "argv", ["demo.py", f"--output={tmp_path}", "--seeds=3", "--seed=5"])
        demo.main()
    assert (tmp_path / "runs" / "seed-5" / "model").samefile(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["run_seeds.py", *commands["examples/run_seeds.py"]])
    found = seeds.parse_arguments()
    assert (found.seeds, found.output) == ([5, 6, 7], tmp_path / "runs")
    (train, *flags), (evaluate, *evaluation) = (
        [word.replace("{run}", str(tmp_path)).replace("{seed}", "5") for word in program] for program in found.programs
    )
    assert (train, flags) == ("train", commands["examples/train.py"])
    assert evaluate == "evaluate" and set(evaluation) <= set(commands["examples/evaluate.py"])
    assert json.loads((tmp_path / "fingerprints.json").read_text()) == {}


@pytest.mark.slow
def test_real_runs_are_killed_and_continued(tmp_path):
    """Killed with SIGKILL in the training of the second seed, which its own child survives."""
    write_workspace(tmp_path)
    train = f"train --dataset {tmp_path}/clips --model_config {tmp_path}/tiny.json --output_dir {{run}}/model"
    train += " --seed {seed} --max_steps 30 --per_device_batch_size 4 --checkpoint_every 2 --eval_every 0"
    train += " --num_workers 0 --ema_decay 0.9"
    evaluate = f"evaluate --dataset {tmp_path}/clips --num_pictures 0 --shuffles 2"
    programs = [train, f"{evaluate} --model {{run}}/model --output {{run}}/report"]
    programs += [f"{evaluate} --model {{run}}/model/raw --output {{run}}/report-raw"]
    words = [word for program in programs for word in ("--", *program.split())]
    command = [sys.executable, str(ROOT / "examples" / "run_seeds.py"), "--seeds", "3", "4"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen([*command, f"--output={tmp_path / 'runs'}", *words], env=environment)
    checkpoints = tmp_path / "runs" / "seed-4" / "model" / "checkpoints"
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("step-*")) and time.monotonic() < deadline:
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "runs" / "runs.json").exists()
    first = (tmp_path / "runs" / "seed-3" / "model" / "model.safetensors").stat().st_mtime_ns
    done = subprocess.run(
        [*command, f"--output={tmp_path / 'runs'}", *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "seed 3, 1: train: finished before" in done.stdout
    assert first == (tmp_path / "runs" / "seed-3" / "model" / "model.safetensors").stat().st_mtime_ns
    summary = json.loads((tmp_path / "runs" / "runs.json").read_text())
    for folder in ("report", "report-raw"):
        values = []
        for seed in (3, 4):
            found = json.loads((tmp_path / "runs" / f"seed-{seed}" / folder / "metrics.json").read_text())
            values.append(found["horizons"][0]["error_over_persistence"])
        figure = summary["figures"][f"{folder}: horizons.horizon 1.error_over_persistence"]
        assert figure["mean"] == pytest.approx(sum(values) / 2) and values[0] != values[1]
        assert figure["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    logged = [json.loads(line)["step"] for line in (checkpoints.parent / "metrics.jsonl").read_text().splitlines()]
    assert logged == [10, 20, 30]
