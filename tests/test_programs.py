"""Programs by one command, from an installed wheel as from the clone: flags at once, recipes by name, processes."""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import python_forks
import yaml
from faulty_server import Fault, FaultyServer
from helpers_data import make_lines, make_video, name_of, to_log
from helpers_training import TINY, assert_same_weights, write_workspace

import vjepa_ac_hf
from vjepa_ac_hf.programs import command
from vjepa_ac_hf.training.arguments import parse_arguments
from vjepa_ac_hf.training.recipes import find_recipe

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "datasets", "numpy", "accelerate", "torchcodec", "tqdm", "httpx2", "gymnasium"}
# All programs in one process, with --help and with a mistake: their exit statuses, what they say, what is imported.
ASK = """
import contextlib, io, json, runpy, sys
sys.modules.update(dict.fromkeys(EXTRAS))  # to import one of these is an error
from vjepa_ac_hf.programs import command
found = {}
for name, (file, _) in [*command.PROGRAMS.items(), ("demo", ("examples/demo.py", ""))][: None if sys.argv[1:] else -1]:
    for flag in ("--help", "--no_such_flag"):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                if sys.argv[1:] == ["as scripts"] and name != "convert":
                    arguments, sys.argv = sys.argv, [file, flag]
                    runpy.run_path(str(command.ROOT / file), run_name="__main__")
                else:
                    arguments, sys.argv = sys.argv, ["vjepa-ac", name, flag]
                    command.main()
            except SystemExit as end:
                status = end.code
            finally:
                sys.argv = arguments
        found[f"{name} {flag}"] = [status, said.getvalue()]
import vjepa_ac_hf
imported = [name for name, module in sys.modules.items() if module is not None]
print(json.dumps({"said": found, "imported": imported, "from": vjepa_ac_hf.__file__}))
"""
# Packages of the extras, as they are imported.
_TABLE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
_NAMES = {re.split(r"[\[>]", package)[0].replace("-", "_") for extra in _TABLE.values() for package in extra}
ASK = ASK.replace("EXTRAS", repr(sorted(_NAMES - {"vjepa_ac_hf"})))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree, built from a copy: a build leaves files behind in the tree that it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
    for name in ("src", "examples", "dataset_scripts", "model_cards"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree")
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", str(folder / "tree"), *flags, "--wheel-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel):
    """The wheel alone in a folder, and a function that runs Python or a command there, away from the clone."""
    folder = wheel.parent / "site"
    flags = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, str(wheel)], check=True)

    def run(*arguments, cwd, check=True, **variables):
        environment = {**os.environ, "PYTHONPATH": str(folder), "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
        if arguments[0] == "-c":
            options = {"cwd": cwd, "env": environment | variables}
            done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)
        else:
            done = python_forks.run([folder / "bin" / "vjepa-ac", *arguments], cwd=cwd, env=environment | variables)
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done

    run.folder = folder
    return run


def test_the_wheel_has_every_file(wheel):
    """A package that pyproject.toml does not list would be missing, in silence."""
    assert wheel.name.startswith(f"vjepa_ac_hf-{vjepa_ac_hf.__version__}-")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(file.relative_to(ROOT / "src")) for file in (ROOT / "src").rglob("*.py")}
    expected |= {str(file.relative_to(ROOT / "src")) for file in (ROOT / "src").rglob("goal_manifests/*.json")}
    for folder, pattern in (("examples", "**/*"), ("dataset_scripts", "*.py"), ("model_cards", "*.md")):
        files = (file for file in (ROOT / folder).glob(pattern) if file.is_file() and file.suffix != ".pyc")
        expected |= {f"vjepa_ac_hf/programs/{file.relative_to(ROOT)}" for file in files}
    expected |= {f"vjepa_ac_hf/app/page.{kind}" for kind in ("css", "html", "js")}
    assert {name for name in names if ".dist-info/" not in name} == expected | {"vjepa_ac_hf/py.typed"}
    assert len([name for name in expected if name.endswith(".yaml")]) == 10


def check_answers(answers):
    assert not HEAVY & set(answers["imported"])
    assert {asked.split()[0] for asked in answers["said"]} - {"demo"} == command.PROGRAMS.keys()
    for asked, (status, said) in answers["said"].items():
        assert said.startswith("usage: "), asked
        assert (status, "error: " in said) == ((0, False) if asked.endswith("--help") else (2, True)), asked


def test_flags_are_answered_before_anything_heavy_is_imported(installed, tmp_path):
    answers = json.loads(installed("-c", ASK, cwd=tmp_path).stdout)
    assert Path(answers["from"]).is_relative_to(installed.folder)
    check_answers(answers)
    for name in command.PROGRAMS:
        assert answers["said"][f"{name} --help"][1].startswith(f"usage: vjepa-ac {name} ")


def test_so_they_are_by_the_scripts_of_the_clone(tmp_path):
    done = subprocess.run([sys.executable, "-c", ASK, "as scripts"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    check_answers(answers)
    assert answers["said"]["train --help"][1].startswith("usage: train.py ")


def test_every_program_has_a_name_and_says_what_it_does(capsys, monkeypatch):
    scripts = {str(file.relative_to(ROOT)) for f in ("examples", "dataset_scripts") for file in (ROOT / f).glob("*.py")}
    named = {file for file, _ in command.PROGRAMS.values() if not Path(file).is_absolute()}
    assert named == scripts - {"examples/demo.py"}
    for flags, status in ((["--help"], 0), ([], 2), (["trian"], 2), (["--version"], 0), (["--names"], 0)):
        monkeypatch.setattr(sys, "argv", ["vjepa-ac", *flags])
        with pytest.raises(SystemExit) as end:
            command.main()
        assert end.value.code == status
        said = capsys.readouterr()
        if flags == ["--help"]:
            assert all(re.search(rf"^  {name} +{re.escape(text)}$", said.out, re.M) for name, (_, text) in programs())
        if flags == ["--names"]:
            assert said.out.split() == list(command.PROGRAMS)
        if flags == ["trian"]:
            assert "'trian'" in said.err and "'train'" in said.err
        if flags == ["--version"]:
            assert said.out.split() == ["vjepa-ac-hf", vjepa_ac_hf.__version__]


def programs():
    return command.PROGRAMS.items()


# ------------------------------------------------------------------------------------------------ what flags offer


class Parsed(Exception):
    """Carries a program's parser out of it."""


def parser_of(name, monkeypatch):
    def stop(self, *_, **__):
        raise Parsed(self)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        patch.setattr(sys, "argv", [name])
        with pytest.raises(Parsed) as caught:
            command.run(command.ROOT / command.PROGRAMS[name][0])
    return caught.value.args[0]


def flags_of(parser):
    return {action.dest: action for action in parser._actions}


def test_choices_and_defaults_are_the_packages(monkeypatch):
    """Programs write them out, since to import them would take seconds."""
    from vjepa_ac_hf.building.selection import BuildOptions
    from vjepa_ac_hf.downloading.recordings import DownloadOptions
    from vjepa_ac_hf.downloading.transfer import TransferOptions
    from vjepa_ac_hf.envs.doom import RESOLUTIONS
    from vjepa_ac_hf.labelling import KEY_DECISIONS
    from vjepa_ac_hf.loading.feature_cache import CACHE_DTYPES
    from vjepa_ac_hf.planning.planner import MAX_BATCH_TOKENS
    from vjepa_ac_hf.processing_vjepa2_ac import RESIZE_MODES
    from vjepa_ac_hf.recordings.alignment import AlignmentOptions
    from vjepa_ac_hf.recordings.clips import ClipSpec
    from vjepa_ac_hf.recordings.log import REPAIRS
    from vjepa_ac_hf.recordings.slots import HOTBAR_INJECTIONS
    from vjepa_ac_hf.training.estimates import HARDWARE
    from vjepa_ac_hf.training.heads import TASKS

    actions = {name: flags_of(parser_of(name, monkeypatch)) for name in command.PROGRAMS}
    choices = {
        **{(name, "resolution"): RESOLUTIONS for name in ("record", "plan", "train-rl")},
        **{(name, "resize_mode"): RESIZE_MODES for name in ("build", "train", "train-head")},
        **{(name, "cache_dtype"): CACHE_DTYPES for name in ("train", "train-head")},
        ("train-head", "task"): sorted(TASKS),
        ("build", "hotbar_injection"): HOTBAR_INJECTIONS,
        ("label", "keys"): KEY_DECISIONS,
    }
    if importlib.util.find_spec("stable_baselines3") is not None:
        from vjepa_ac_hf.envs.sb3 import GOAL_POOLINGS

        choices["train-rl", "pooling"] = GOAL_POOLINGS
    for (name, flag), expected in choices.items():
        assert tuple(actions[name][flag].choices) == tuple(expected), (name, flag)
    assert f"of: {', '.join(REPAIRS)}" in actions["build"]["skip_repairs"].help
    assert f"one of {', '.join(HARDWARE)}" in actions["train"]["hardware"].help
    clip, build, download, transfer = ClipSpec(), BuildOptions(), DownloadOptions(), TransferOptions()
    defaults = {
        **{("build", n): getattr(clip, n) for n in ("native_fps", "fps", "frames_per_clip", "tubelet_size")},
        **{("build", n): getattr(build, n) for n in ("resolution", "resize_mode", "hotbar_injection")},
        **{
            ("check-alignment", n): getattr(AlignmentOptions(), n)
            for n in ("max_lag", "max_ticks", "num_windows", "flag_over")
        },
        ("download", "num_workers"): download.num_workers,
        ("download", "max_retries"): transfer.max_retries,
        ("download", "timeout"): transfer.read_timeout,
        ("landscape", "max_batch_tokens"): MAX_BATCH_TOKENS,
    }
    for (name, flag), expected in defaults.items():
        assert actions[name][flag].default == expected, (name, flag)


@pytest.mark.parametrize("name", command.PROGRAMS)
def test_help_shows_every_default(name, monkeypatch):
    parser = parser_of(name, monkeypatch)
    page = parser.format_help()
    entries = dict(re.findall(r"^  (?:-\w, )?--(?:no-)?(\w+)(.*?)(?=^  -|^\S|\Z)", page, re.MULTILINE | re.DOTALL))
    checked = 0
    for flag, action in flags_of(parser).items():
        # What is off unless it is given has no default to tell; -1 is told in words ("no limit").
        if isinstance(action, argparse._StoreTrueAction) or action.default in (None, "", [], argparse.SUPPRESS, -1):
            continue
        text, default = " ".join(entries[flag].split()), action.default
        assert "default" in text, flag
        if isinstance(default, int | float) and not isinstance(default, bool):
            assert default in map(float, re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", text)), (flag, text)
        else:
            assert all(str(value) in text for value in (default if isinstance(default, list) else [default])), flag
        checked += 1
    assert checked >= {"pack": 1, "push": 2, "train": 30, "train-head": 20}.get(name, 0)


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples" / "configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_recipes_are_found_by_name(recipe):
    flags = ["--dataset", "d", "--output_dir", "o", "--config"]
    named = parse_arguments("", [*flags, recipe.stem], recipes=recipe.parent)
    given = parse_arguments("", [*flags, str(recipe)], recipes=recipe.parent)
    assert {**vars(named), "config": None} == {**vars(given), "config": None}
    assert named.max_steps == yaml.safe_load(recipe.read_text())["max_steps"]


def test_a_file_goes_before_a_recipe_and_an_unknown_name_is_refused(tmp_path, monkeypatch):
    recipes = ROOT / "examples" / "configs"
    monkeypatch.chdir(tmp_path)
    assert find_recipe(Path("vitl16-vpt13.yaml"), recipes) == recipes / "vitl16-vpt13.yaml"
    Path("vitl16-vpt13").write_text("max_steps: 1")
    assert find_recipe(Path("vitl16-vpt13"), recipes) == Path("vitl16-vpt13")
    with pytest.raises(ValueError, match=r"--config vitl16: no such file, and none of the recipes .*vitl16-vpt13-l1"):
        find_recipe(Path("vitl16"), recipes)
    assert find_recipe(Path("other/vitl16-vpt13"), recipes) == Path("other/vitl16-vpt13")  # and `load_recipe` refuses


# ------------------------------------------------------------------------------------------------ several processes


def launched(monkeypatch, *flags):
    """The command and the environment that `vjepa-ac` becomes."""
    became = []

    def become(path, command, environment):
        became.extend((command, environment))
        raise SystemExit

    monkeypatch.setattr(os, "execve", become)
    monkeypatch.setattr(sys, "argv", ["vjepa-ac", *flags])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setenv("WORLD_SIZE", "1")  # so that what is set on the way is set back
        patch.delenv("WORLD_SIZE")
        command.main()
    return became


def test_flags_of_the_launcher_are_told_from_the_programs(monkeypatch):
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    program = str(ROOT / "examples" / "train.py")
    flags = ["--dataset", "d", "--output_dir", "o", "--global_batch_size=64"]
    started, environment = launched(monkeypatch, "train", "--num_processes", "8", *flags)
    plain = ["--mixed_precision=no", "--dynamo_backend=no", "--num_machines=1"]
    assert started == [*accelerate, "--num_processes=8", *plain, "--multi_gpu", program, *flags]
    assert "WORLD_SIZE" not in environment
    started, _ = launched(monkeypatch, "train", *flags, "--config_file", "fsdp2_8_gpus")
    config = ROOT / "examples" / "accelerate" / "fsdp2_8_gpus.yaml"
    assert started == [*accelerate, f"--config_file={config}", program, *flags]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes", "0"], "--num_processes must be at least 1, found 0"),
        (["--num_processes", "two"], "invalid int value: 'two'"),
        (["--config_file", "ddp"], "--config_file ddp: no such file, and none of ddp_8_gpus, fsdp2_8_gpus, one_gpu"),
        (["--machine_rank", "1"], "--machine_rank goes with --num_processes or --config_file"),
        (["--num_processes", "8", "--max_stps", "2"], "unrecognized arguments: --max_stps 2"),
        # 8 clips x 3 processes: the check knows how many there will be.
        (["--num_processes", "3", "--dataset=d", "--output_dir=o", "--global_batch_size=32"], "8 x 3 processes"),
    ],
)
def test_mistakes_are_told_before_processes_start(monkeypatch, capsys, flags, message):
    assert launched(monkeypatch, "train", *flags) == []
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_as_one(installed, tmp_path):
    """The command and accelerate's own launcher with the packaged module, on the CPU (gloo)."""
    write_workspace(tmp_path, train=6, validation=0)
    flags = ["--dataset=clips", "--model_config=tiny.json", "--max_steps=2", "--eval_every=0", "--num_workers=0"]
    installed("train", *flags, "--output_dir=one", "--per_device_batch_size=2", cwd=tmp_path, OMP_NUM_THREADS="1")
    two = [*flags, "--output_dir=two", "--per_device_batch_size=1"]
    installed("train", "--num_processes=2", "--main_process_port=0", *two, cwd=tmp_path, OMP_NUM_THREADS="1")
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["processes"] == 2
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    ]
    assert len(losses[0]) and losses[0] == pytest.approx(losses[1], rel=1e-4)
    code = "import runpy; runpy.run_module('accelerate.commands.launch', run_name='__main__')"
    launcher = ["--num_processes=2", "--multi_gpu", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    launcher += ["--main_process_port=0", "-m", "vjepa_ac_hf.programs.examples.train"]
    three = [*flags, "--output_dir=three", "--per_device_batch_size=1"]
    installed("-c", code, *launcher, *three, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert_same_weights(tmp_path / "two", tmp_path / "three")


# ------------------------------------------------------------------------------------------------ from end to end


def test_from_download_to_evaluation_without_the_clone(installed, tmp_path):
    """In an empty folder: the server hangs up once, recordings arrive, become shards, clips, a model, figures."""
    stems = [f"data/7.6/{name_of(f's{i}')}" for i in range(3)]
    files = {f"{stem}.jsonl": to_log(make_lines(200, seed)) for seed, stem in enumerate(stems)}
    files |= {f"{stem}.mp4": make_video(200, seed=seed) for seed, stem in enumerate(stems)}
    with FaultyServer(files) as server:
        server.faults[f"{stems[0]}.mp4"] = [Fault(drop_after=1000)]
        (tmp_path / "index.json").write_text(json.dumps({"basedir": server.url + "/", "relpaths": stems}))
        installed("download", "--index=index.json", "--output=recordings", "--timeout=5", cwd=tmp_path)
    installed("pack", "--input=recordings", "--output=shards", cwd=tmp_path)
    build = [
        "--output=clips",
        "--resolution=32",
        "--clip_stride=32",
        "--validation_players",
        "silly-s2",
        "--num_proc=2",
    ]
    installed("build", "--shards", "shards/*.tar", *build, cwd=tmp_path)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    train = ["--model_config=tiny.json", "--max_steps=2", "--per_device_batch_size=2", "--num_workers=0"]
    installed("train", "--dataset=clips", "--output_dir=model", "--eval_every=0", *train, cwd=tmp_path)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "vjepa" in card and (tmp_path / "model" / "modeling_vjepa2_ac.py").is_file()
    flags = ["--shuffles=1", "--num_pictures=0", "--device=cpu"]
    done = installed("evaluate", "--model=model", "--dataset=clips", "--output=report", *flags, cwd=tmp_path)
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["clips"] == 5  # of 64 ticks, begun every 32 of 200
    assert [row["horizon"] for row in metrics["horizons"]] == [1, 2, 3, 4, 5, 6]
    assert metrics["command"].startswith("vjepa-ac evaluate --model=model --dataset=clips")
    assert "report.html" in done.stdout and str(ROOT) not in done.stdout + done.stderr
