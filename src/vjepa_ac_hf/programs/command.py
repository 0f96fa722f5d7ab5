"""`vjepa-ac NAME [flags]`: every program of the project under one name.

    vjepa-ac train --config vitl16-vpt13 --dataset DIR --output_dir OUT
    vjepa-ac train --num_processes 8 --config vitl16-vpt13 --dataset DIR --output_dir OUT

is `python examples/train.py` and, in eight processes, `accelerate launch --num_processes 8 examples/train.py`. With
bash, `complete -o default -W "$(vjepa-ac --names)" vjepa-ac` completes names.
"""

import argparse
import ast
import os
import sys
from pathlib import Path
from types import ModuleType

import vjepa_ac_hf

HERE = Path(__file__).resolve().parent
# A wheel has the programs beside this file (pyproject.toml), a clone at its root.
ROOT = HERE if (HERE / "examples").is_dir() else HERE.parents[2]
PROGRAMS = {
    "download": ("dataset_scripts/download_vpt.py", "download VPT recordings"),
    "pack": ("dataset_scripts/pack_shards.py", "pack recordings into tar shards"),
    "build": ("dataset_scripts/build_vpt_tubelets.py", "build a data set of clips from recordings"),
    "check-recordings": (
        "dataset_scripts/check_recordings.py",
        "count what recordings hold: repairs, rejects",
    ),
    "check-alignment": ("dataset_scripts/check_alignment.py", "tell whether log and video of recordings are in step"),
    "preview": ("dataset_scripts/preview_clips.py", "show clips with their actions on a page"),
    "report": ("dataset_scripts/report_dataset.py", "report what a data set holds"),
    "record": ("dataset_scripts/record_vizdoom.py", "record play in ViZDoom"),
    "train": ("examples/train.py", "train a world model"),
    "evaluate": ("examples/evaluate.py", "evaluate a world model"),
    "seeds": ("examples/run_seeds.py", "train and evaluate one recipe for several seeds"),
    "train-head": ("examples/train_head.py", "train a head: inverse dynamics, anticipation, classification"),
    "label": ("examples/label_videos.py", "write logs for videos without one"),
    "plan": ("examples/plan_vizdoom.py", "plan towards views in ViZDoom"),
    "landscape": ("examples/energy_landscape.py", "draw the energy over two action columns"),
    "explore": ("examples/explore.py", "play in what a world model imagines, in a browser"),
    "train-rl": ("examples/train_rl.py", "train agents in ViZDoom on features"),
    "push": ("examples/push.py", "push what a training run has left to the Hub"),
    "push-space": ("examples/push_space.py", "put the page of explore on the Hub, as a Space"),
    "convert": (str(HERE.parent / "convert_vjepa2_ac_to_hf.py"), "convert official V-JEPA 2 checkpoints"),
}
IN_PROCESSES = ("train", "train-head")
# Flags of `accelerate launch` that these may be given; the rest is the program's.
LAUNCHER = ("num_processes", "config_file", "num_machines", "machine_rank", "main_process_ip", "main_process_port")


def main() -> None:
    table = "\n".join(f"  {name:16} {text}" for name, (_, text) in PROGRAMS.items())
    parser = argparse.ArgumentParser(
        prog="vjepa-ac",
        usage="%(prog)s PROGRAM [flags]; %(prog)s PROGRAM --help lists its flags",
        description="Action-conditioned V-JEPA 2 world models from VPT recordings.\n\nprograms:\n" + table,
        epilog="train and train-head run in several processes with --num_processes N (docs/training.md).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("program", choices=PROGRAMS, metavar="PROGRAM", help="one of the above")
    parser.add_argument("--version", action="version", version=f"vjepa-ac-hf {vjepa_ac_hf.__version__}")
    parser.add_argument("--names", action="version", version=" ".join(PROGRAMS), help="show the programs' names alone")
    name, arguments = parser.parse_args(sys.argv[1:2]).program, sys.argv[2:]
    file = ROOT / PROGRAMS[name][0]
    launcher: dict[str, str] = {}
    if name in IN_PROCESSES:
        launcher, arguments = split_launcher_flags(name, arguments)
    sys.argv = [f"vjepa-ac {name}", *arguments]
    if launcher:
        launch(file, launcher, arguments)
    run(file)


def run(file: Path, until_parsed: bool = False) -> None:
    """Run a program as `python file` would; or only until it has parsed its flags, which all do before they import."""
    tree = ast.parse(file.read_bytes(), str(file))
    if until_parsed:
        guard = next(i for i, node in enumerate(tree.body) if isinstance(node, ast.If))
        del tree.body[guard + 1 :]
    program = ModuleType("__main__")
    program.__file__ = str(file)
    program.__package__ = "vjepa_ac_hf" if file.parent == HERE.parent else None
    before, sys.modules["__main__"] = sys.modules["__main__"], program
    try:
        exec(compile(tree, str(file), "exec"), program.__dict__)
    finally:
        sys.modules["__main__"] = before


def split_launcher_flags(name: str, arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Flags for `accelerate launch`, and those for the program. A configuration may be one of `examples/accelerate`."""
    parser = argparse.ArgumentParser(prog=f"vjepa-ac {name}", add_help=False, allow_abbrev=False)
    for flag in LAUNCHER:
        parser.add_argument(f"--{flag}", type=str if flag in ("config_file", "main_process_ip") else int)
    found, rest = parser.parse_known_args(arguments)
    flags = {flag: str(value) for flag, value in vars(found).items() if value is not None}
    if flags and not {"num_processes", "config_file"} & flags.keys():
        parser.error(f"--{next(iter(flags))} goes with --num_processes or --config_file")
    if found.num_processes is not None and found.num_processes < 1:
        parser.error(f"--num_processes must be at least 1, found {found.num_processes}")
    if found.config_file is not None and not Path(found.config_file).is_file():
        known = {file.stem: str(file) for file in sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))}
        if found.config_file not in known:
            parser.error(f"--config_file {found.config_file}: no such file, and none of {', '.join(known)}")
        flags["config_file"] = known[found.config_file]
    return flags, rest


def launch(file: Path, launcher: dict[str, str], arguments: list[str]) -> None:
    """Become `accelerate launch`; the flags are parsed once here, so that not every process says what is wrong."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += [f"--{flag}={value}" for flag, value in launcher.items()]
    if "config_file" not in launcher:
        command += ["--mixed_precision=no", "--dynamo_backend=no"]
        command += [] if "num_machines" in launcher else ["--num_machines=1"]
        # Else accelerate, where it sees less than two GPUs, would start one process whatever is asked for.
        command += ["--multi_gpu"] if launcher["num_processes"] != "1" else []
    environment = dict(os.environ)
    if "num_processes" in launcher:
        os.environ["WORLD_SIZE"] = launcher["num_processes"]  # so many share the global batch
    run(file, until_parsed=True)
    os.execve(sys.executable, [*command, str(file), *arguments], environment)
