"""The whole job on a laptop, with no network: record play, build clips, train a small world model, a decoder that
shows what it imagines and a head that reads actions from it, evaluate them.

    python examples/demo.py --output demo

Every step is one of the project's programs, shown as it is run; real recordings go through the same ones (README.md,
"Real data and weights"). A second run continues where the first one stopped.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from vjepa_ac_hf.console import Parser
from vjepa_ac_hf.inspection.fingerprints import fingerprints

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for everything the demo makes")
    parser.add_argument("--recordings", type=int, default=64, help="ViZDoom recordings (sessions)")
    parser.add_argument("--ticks", type=int, default=1200, help="ticks a recording")
    parser.add_argument("--max_steps", type=int, default=2500, help="training steps")
    parser.add_argument("--decoder_steps", type=int, default=600, help="training steps of the frame decoder")
    parser.add_argument("--head_steps", type=int, default=800, help="training steps of the inverse dynamics head")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seeds", type=int, default=1, help="models to train on the same play, of as many seeds from --seed on"
    )
    parser.add_argument(
        "--encoder",
        default="random",
        help="'random' (default), or real weights such as facebook/vjepa2-vitl-fpc64-256 (256 pixels, wants a GPU)",
    )
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds must be at least 1, found {arguments.seeds}")
    return arguments


def run(title: str, program: str, *flags: object, launcher: tuple[str, ...] = ()) -> None:
    """Show and run one of the project's programs; the demo stops where it fails."""
    command = [*(launcher or (sys.executable,)), program, *(str(f) for f in flags)]
    print(f"\n== {title}\n$ {shlex.join([Path(command[0]).name, *command[1:]])}", flush=True)
    started = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        sys.exit(f"{program} failed with exit status {code}; run the demo again to continue from there")
    print(f"({time.perf_counter() - started:.0f} s)", flush=True)


def accelerate_launch() -> tuple[str, ...]:
    """One process; on a CPU `accelerate launch` would leave it one thread."""
    program = str(Path(sys.executable).with_name("accelerate"))
    options = {"num_processes": 1, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    options["num_cpu_threads_per_process"] = os.cpu_count()
    return (program, "launch", *(f"--{name}={value}" for name, value in options.items()))


def main() -> None:
    arguments = parse_arguments()
    out = arguments.output.resolve()
    out.mkdir(parents=True, exist_ok=True)
    real = arguments.encoder != "random"
    size = 256 if real else 64
    run(
        *("1/6 record first-person play", "dataset_scripts/record_vizdoom.py", "--output", out / "shards"),
        *("--recordings", arguments.recordings, "--ticks", arguments.ticks, "--seed", arguments.seed),
        *("--resolution", "640x360" if real else "256x144", "--recordings_per_shard", 4, "--num_proc", 2),
        *("--pauses", 0.5),
    )
    run(
        *("2/6 build clips", "dataset_scripts/build_vpt_tubelets.py", "--shards", out / "shards" / "*.tar"),
        *("--output", out / "clips", "--resolution", size, "--resize_mode", "squash"),
        *("--clip_stride", 64 if real else 20, "--validation_fraction", 0.2, "--num_proc", 2),
    )
    training = training_flags(arguments, out, out, arguments.seed)
    run("3/6 train the predictor", "examples/train.py", *training, launcher=accelerate_launch())
    run(
        *("4/6 train a decoder", "examples/train_head.py", "--task", "frame_decoding", "--model", out / "model"),
        *("--dataset", out / "clips", "--output_dir", out / "decoder", "--cache_features", out / "features"),
        *("--max_steps", arguments.decoder_steps, "--per_device_batch_size", 8, "--head_hidden_size", 128),
        *("--eval_every", 0, "--num_workers", 0, "--seed", arguments.seed),
        launcher=accelerate_launch(),
    )
    run(
        *("5/6 train a head that reads actions", "examples/train_head.py", "--task", "inverse_dynamics"),
        *("--model", out / "model", "--action_space", "vpt-38", "--dataset", out / "clips"),
        *("--output_dir", out / "inverse_dynamics", "--cache_features", out / "features"),
        *("--max_steps", arguments.head_steps, "--eval_every", 0, "--num_workers", 0, "--seed", arguments.seed),
        launcher=accelerate_launch(),
    )
    run(
        *("6/6 evaluate", "examples/evaluate.py", "--model", out / "model", "--dataset", out / "clips"),
        *("--decoder", out / "decoder", "--inverse_dynamics", out / "inverse_dynamics", "--output", out / "report"),
    )
    if arguments.seeds > 1:
        train_other_seeds(arguments, out)
    print("\nFingerprints, by which machines are compared (docs/training.md):")
    for stage, value in fingerprints(out).items():
        print(f"  {stage:30} {value}")
    show_result(out / "report")
    if arguments.seeds > 1:
        show_runs(out / "runs")


def training_flags(arguments: argparse.Namespace, out: Path, folder: Path | str, seed: int | str) -> tuple[object, ...]:
    """Flags of `examples/train.py` for the model of a seed in a folder."""
    return (
        *("--config", "examples/configs/tiny-vizdoom.yaml", "--dataset", out / "clips"),
        *("--output_dir", f"{folder}/model", "--cache_features", f"{folder}/features"),
        *("--encoder", arguments.encoder, "--seed", seed, "--max_steps", arguments.max_steps),
        *("--warmup_steps", arguments.max_steps // 20, "--decay_steps", arguments.max_steps // 4),
    )


def train_other_seeds(arguments: argparse.Namespace, out: Path) -> None:
    """The same for further seeds, and figures over all; the first one's model is there already."""
    first = arguments.seed
    run_folder = out / "runs" / f"seed-{first}"
    run_folder.mkdir(parents=True, exist_ok=True)
    for name in ("model", "features"):
        if not (run_folder / name).is_symlink():
            (run_folder / name).symlink_to(Path("../..", name))
    run(
        *("and of other seeds", "examples/run_seeds.py", "--output", out / "runs"),
        *("--seeds", *range(first, first + arguments.seeds)),
        *("--", "train", *training_flags(arguments, out, "{run}", "{seed}")),
        *("--", "evaluate", "--model", "{run}/model", "--dataset", out / "clips", "--output", "{run}/report"),
    )


def show_runs(runs: Path) -> None:
    """Mean and spread of the key ratios at one step."""
    summary = json.loads((runs / "runs.json").read_text())
    print(f"\nOver {summary['runs']} runs (mean, standard deviation, least to largest):")
    for name in ("error_over_persistence", "shuffled_over_error", "win_rate_large_turns"):
        of = summary["figures"][f"report: horizons.horizon 1.{name}"]
        print(f"  {name:23} {of['mean']:.4f} ± {of['std']:.4f} ({of['min']:.4f} to {of['max']:.4f})")
    print(f"Report: {runs / 'report.html'}")


def show_result(report: Path) -> None:
    """The key ratios at one step, and where the report is."""
    metrics = json.loads((report / "metrics.json").read_text())
    first = metrics["horizons"][0]
    intervals = first["ci95"] or {}

    def interval(name: str, scale: float = 1.0, offset: float = 0.0) -> str:
        low_high = intervals.get(name)
        if low_high is None:
            return ""
        low, high = sorted(scale * (value - offset) for value in low_high)
        return f"  (95 %: {low:.1f} to {high:.1f})"

    print("\nOne step ahead, on sessions the model has not seen:")
    below = 100 * (1 - first["error_over_persistence"])
    print(f"  error below persistence       {below:5.1f} %" + interval("error_over_persistence", -100, 1))
    worse = 100 * (first["shuffled_over_error"] - 1)
    print(f"  worse with shuffled actions   {worse:5.1f} %" + interval("shuffled_over_error", 100, 1))
    if first["win_rate_large_turns"] is not None:
        wins = 100 * first["win_rate_large_turns"]
        print(f"  true action wins, large turns {wins:5.1f} %" + interval("win_rate_large_turns", 100) + "  chance: 50")
    if metrics["frames"]["psnr_large_turns"]:
        gain = metrics["frames"]["psnr_large_turns"][0]["over"]["last frame"]["prediction"]
        bounds = "  (95 %: {:+.1f} to {:+.1f})".format(*gain["ci95"]) if gain["ci95"] else ""
        print(f"  imagined frames over a copy   {gain['mean']:+5.1f} dB{bounds}  (PSNR where the view turns)")
    print(f"Report, with films of what it imagines: {report / 'report.html'}")
    folder = "" if report.parent == ROOT / "demo" else f" DEMO_DIR={report.parent}"
    print(f"Play in what the model imagines: make play{folder}")


if __name__ == "__main__":
    main()
