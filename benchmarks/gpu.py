"""What a GPU makes of this package, in one command of at most nine minutes: a JSON file and a table.

    python benchmarks/gpu.py --output gpu.json
    python benchmarks/gpu.py --output gpu.json --device cpu --tiny      # the same code on a CPU, for tests

Parts, each in a process of its own that is stopped at its time limit; what it has measured until then counts, and the
file is written after every part. Weights are random. The model is ViT-L/16 at 256 pixels with the predictor of V-JEPA
2-AC ("vitl16"), training steps are those of pixels with AdamW under bf16 autocast, rollouts have bf16 weights.

- peak: the best of a few large matrix products in bf16, which shares are of;
- training: a step against `straightforward.py` with the same encoder, weights, inputs, optimizer and precision;
- rollout: steps a second of one stream over a context's keys and values;
- candidates: of `model.rollout` and a distance to a goal, by how many tokens go through the predictor at once;
- memory: the allocator's peak in a training step against the dry run's estimate, with and without checkpointing;
- planner: candidates a second of whole plans (`planning.plan`), 800 of horizon 1 and 64 of horizon 8;
- loader: clips a second from Parquet to the device, normalised there;
- graphs: as rollout, captured as a CUDA graph, compiled, and compiled with graphs (mode "reduce-overhead");
- flex, compiled: as training, with FlexAttention, and with torch.compile.

Beside every figure stands how far its numbers are from those of the part's plain way. planner and loader need the
package's dependencies `datasets` and `torchcodec`; without them they are left out and listed so, as is what a device
cannot do.
"""

import argparse
import gc
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from straightforward import StraightforwardPredictor
from torch import Tensor

from vjepa_ac_hf import ACTION_COLUMNS, ActionStatistics, VJEPA2ACModel, VJEPA2ACProcessor
from vjepa_ac_hf.records import PACKAGES, write_json
from vjepa_ac_hf.training.estimates import step_flops, step_memory
from vjepa_ac_hf.training.health import peak_memory
from vjepa_ac_hf.training.optimization import build_optimizer
from vjepa_ac_hf.training.presets import build_config

CONTEXT, SEARCHES = 2, ((800, 1), (64, 8))  # steps known; candidates and horizon
NEEDS = {"planner": ("datasets",), "loader": ("datasets", "torchcodec")}
ENDING = 15  # seconds that the last measurement of a part may take before its process is stopped


@dataclass
class Bench:
    """A part at work: where it runs, until when, and the rows that it has measured."""

    device: str
    tiny: bool
    deadline: float  # of time.monotonic()
    keep: Callable[[list[dict]], None]  # called with all rows after each
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, what: str, value: float | None, unit: str, **details: Any) -> None:
        """A row: a figure and its unit, or None and, as `left_out`, why there is none."""
        self.rows.append({"what": what, "value": value, "unit": unit, **details})
        self.keep(self.rows)

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)

    def model(self, steps: int = 8, dtype: torch.dtype = torch.float32) -> VJEPA2ACModel:
        torch.manual_seed(0)
        preset = "tiny-32px" if self.tiny else "vitl16"
        config = build_config(preset, action_space="vpt-13", frames_per_clip=2 * steps, auto_steps=2)
        with torch.device(self.device):  # initialised there: on one CPU core it takes longer than what is measured
            return VJEPA2ACModel(config).to(dtype)

    @property
    def batches(self) -> tuple[int, ...]:
        """Clips of a training step: the first that fits is measured."""
        return (2,) if self.tiny else (16, 8, 4, 2, 1)

    def seconds(self, calls: dict[str, Callable], most: int = 20, together: int = 1) -> dict[str, list[float]]:
        """Seconds of every call, taken in turn after two that do not count; at least one round, up to the deadline.

        Args:
            calls: by name.
            most: rounds.
            together: calls that are timed as one, for those shorter than the wait for the device.
        """
        for call in (*calls.values(), *calls.values()):
            call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(2 if self.tiny else most):
            if number and time.monotonic() > self.deadline:
                break
            for name, call in calls.items():
                self.wait()
                started = time.perf_counter()
                for _ in range(together):
                    call()
                self.wait()
                times[name].append((time.perf_counter() - started) / together)
        return times

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def compile(self, call: Callable, mode: str = "default") -> Callable:
        """By inductor on a GPU; on a CPU, where nothing is measured, without code generation."""
        if self.device == "cpu":
            return torch.compile(call, dynamic=False, backend="aot_eager")
        return torch.compile(call, dynamic=False, mode=mode)


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    found, expected = found.detach().float(), expected.detach().float()
    return ((found - expected).abs().max() / expected.abs().max()).item()


# ---------------------------------------------------------------------------------------------------- training


def peak(bench: Bench) -> None:
    for edge in (64, 128) if bench.tiny else (4096, 8192, 16384):
        a, b = bench.random(edge, edge, dtype=torch.bfloat16), bench.random(edge, edge, dtype=torch.bfloat16)
        times = bench.seconds({"mm": lambda a=a, b=b: torch.mm(a, b)}, together=5)["mm"]
        bench.add(f"matrix product, bf16, {edge} x {edge} x {edge}", 2 * edge**3 / min(times) / 1e12, "TFLOP/s")


def training_inputs(bench: Bench, model: VJEPA2ACModel, batch: int) -> dict[str, Tensor]:
    config, edge = model.config, model.config.encoder_config.crop_size
    return {
        "pixel_values_videos": bench.random(batch, config.frames_per_clip, 3, edge, edge),
        "actions": bench.random(batch, config.num_steps - 1, config.action_dim),
        "states": bench.random(batch, config.num_steps, config.state_dim),
    }


def training_step(bench: Bench, module: torch.nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Forward, backward and AdamW of the parameters of `module`, under bf16 autocast; returns the loss."""
    optimizer = build_optimizer(module, 1e-5, 0.04)

    def step() -> Tensor:
        with torch.autocast(bench.device, torch.bfloat16):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def training(bench: Bench, variant: str = "baseline") -> None:
    """Ours by SDPA, in turn with the straightforward implementation, FlexAttention or ours compiled."""
    if variant == "flex" and bench.device == "cpu":
        return bench.add("training step, flex", None, "clips/s", left_out="FlexAttention has no gradients on a CPU")
    for batch in bench.batches:
        try:
            return compare_steps(bench, batch, variant)
        except torch.OutOfMemoryError as error:
            reason = f"out of memory: {error}".splitlines()[0]
        bench.add(f"training step, ours and {variant}, batch {batch}", None, "clips/s", left_out=reason)
        torch.cuda.empty_cache()


def compare_steps(bench: Bench, batch: int, variant: str) -> None:
    model = bench.model().train()
    inputs = training_inputs(bench, model, batch)
    calls = {"ours": training_step(bench, model.predictor, lambda: model(**inputs).loss)}
    if variant == "baseline":
        other = StraightforwardPredictor(model.config).to(bench.device)
        other.load_state_dict(model.predictor.state_dict())

        def loss_of() -> Tensor:
            features = model.encode(inputs["pixel_values_videos"])
            return sum(other.losses(features, inputs["actions"], inputs["states"], model.config.auto_steps))

        calls[variant] = training_step(bench, other, loss_of)
    else:
        second = bench.model().train()
        if variant == "flex":
            second.set_attn_implementation("flex_attention")
        forward = bench.compile(second) if variant == "compiled" else second
        calls[variant] = training_step(bench, second.predictor, lambda: forward(**inputs).loss)
    losses = {name: call().item() for name, call in calls.items()}  # of the same weights
    times = bench.seconds(calls)
    flops = step_flops(model.config, batch).model
    for name in calls:
        took = statistics.median(times[name])
        bench.add(
            *(f"training step, {name}, batch {batch}", batch / took, "clips/s"),
            seconds=times[name],
            tflops_per_second=flops / took / 1e12,
            ratio=statistics.median(b / a for a, b in zip(times["ours"], times[name], strict=True)),
            difference=abs(losses[name] / losses["ours"] - 1),
        )


def memory(bench: Bench) -> None:
    """Peaks of training steps; the largest batch that fits."""
    for checkpointed in (False, True):
        for batch in bench.batches:
            what = f"memory, {'with' if checkpointed else 'without'} checkpointing, batch {batch}"
            try:
                measured, estimated = step_peak(bench, batch, checkpointed)
            except torch.OutOfMemoryError as error:
                bench.add(what, None, "of the estimate", left_out=f"out of memory: {error}".splitlines()[0])
                continue
            bench.add(what, measured / estimated, "of the estimate", measured=measured, estimated=estimated)
            break


def step_peak(bench: Bench, batch: int, checkpointed: bool) -> tuple[int, float]:
    """Bytes: the peak of two training steps (on a CPU that of the process), and the dry run's estimate."""
    gc.collect()  # of the step before
    model = bench.model().train()
    if checkpointed:
        model.activation_checkpointing_enable()
    inputs = training_inputs(bench, model, batch)
    step = training_step(bench, model.predictor, lambda: model(**inputs).loss)
    if bench.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.predictor)]
    options = {"bf16": True, "gradient_checkpointing": checkpointed, "device": bench.device}
    return peak_memory(torch.device(bench.device)), step_memory(model.config, *sizes, batch, **options).total


# ---------------------------------------------------------------------------------------------------- rollouts


def one_step(bench: Bench, model: VJEPA2ACModel, context: int, call: Callable | None = None) -> Callable[[], Tensor]:
    """The next step's features `(1, 1, N, D)`, over the keys and values of `context` steps."""
    config, dtype = model.config, torch.bfloat16
    torch.manual_seed(1)
    features = bench.random(1, context + 1, config.grid_size**2, config.encoder_config.hidden_size, dtype=dtype)
    actions = bench.random(1, context + 1, config.action_dim, dtype=dtype)
    states = bench.random(1, context + 1, config.state_dim, dtype=dtype)
    with torch.no_grad():
        _, past = model.predictor(features[:, :-1], actions[:, :-1], states[:, :-1])
    last = (features[:, -1:], actions[:, -1:], states[:, -1:])

    @torch.no_grad()
    def step() -> Tensor:
        return (model.predictor if call is None else call)(*last, past, context)[0]

    return step


def rollout(bench: Bench) -> None:
    model = bench.model(dtype=torch.bfloat16).eval()
    for context in (1, 4, 7):
        add_steps(bench, f"rollout step, eager, context {context}", one_step(bench, model, context))


def add_steps(bench: Bench, what: str, call: Callable, expected: Tensor | None = None) -> None:
    times = bench.seconds({"step": call}, together=1 if bench.tiny else 20)["step"]
    details = {} if expected is None else {"difference": relative(call(), expected)}
    bench.add(what, 1 / statistics.median(times), "steps/s", seconds=times, **details)


def graphs(bench: Bench) -> None:
    model = bench.model(dtype=torch.bfloat16).eval()
    eager = one_step(bench, model, 4)
    expected = eager().clone()
    what = "rollout step, CUDA graph of eager, context 4"
    if bench.device == "cpu":
        bench.add(what, None, "steps/s", left_out="a CPU has no CUDA graphs")
    else:
        add_steps(bench, what, captured(eager), expected)
    add_steps(bench, "rollout step, compiled, context 4", compiled_step(bench, model, "default"), expected)
    what = "rollout step, compiled with graphs, context 4"
    add_steps(bench, what, compiled_step(bench, model, "reduce-overhead"), expected)


def compiled_step(bench: Bench, model: VJEPA2ACModel, mode: str) -> Callable[[], Tensor]:
    torch.compiler.reset()
    step = one_step(bench, model, 4, bench.compile(model.predictor, mode))

    def call() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # the last call's output may be overwritten
        return step()

    return call


def captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Replays what `call` does on the device (https://docs.pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs")."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@torch.no_grad()
def candidates(bench: Bench) -> None:
    for count, horizon in SEARCHES:
        count = 4 if bench.tiny else count
        model = bench.model(CONTEXT + horizon, torch.bfloat16).eval()
        config, steps = model.config, CONTEXT - 1 + horizon
        options = {"dtype": torch.bfloat16}
        features = bench.random(1, CONTEXT, config.grid_size**2, config.encoder_config.hidden_size, **options)
        goal = bench.random(*features.shape[2:])
        actions = bench.random(1, count, steps, config.action_dim, **options)
        states = bench.random(1, count, steps, config.state_dim, **options)
        actions[:, :, : CONTEXT - 1], states[:, :, :CONTEXT] = actions[:, :1, : CONTEXT - 1], states[:, :1, :CONTEXT]
        alone = [model.rollout(features, actions[:, m], states[:, m])[:, -1] for m in range(2)]
        for limit in (2**14, 2**16, None):

            def imagined(limit=limit, inputs=(features, actions, states), model=model) -> Tensor:
                return model.rollout(*inputs, max_batch_tokens=limit)[0, :, -1]

            def costs(imagined=imagined, goal=goal) -> Tensor:
                return (imagined().float() - goal).abs().mean(dim=(1, 2))

            what = f"{count} candidates, horizon {horizon}, {limit or 'all'} tokens at once"
            try:
                times = bench.seconds({"costs": costs}, most=10)["costs"]
            except torch.OutOfMemoryError as error:
                bench.add(what, None, "candidates/s", left_out=f"out of memory: {error}".splitlines()[0])
                continue
            difference = relative(imagined()[:2], torch.cat(alone))
            took = statistics.median(times)
            bench.add(what, count / took, "candidates/s", seconds=times, difference=difference)


def statistics_of_actions() -> dict[str, Any]:
    return ActionStatistics().update(np.random.default_rng(0).normal(size=(50, len(ACTION_COLUMNS)))).to_dict()


def planner(bench: Bench) -> None:
    from vjepa_ac_hf.planning import CEM, encode_context, plan

    for count, horizon in SEARCHES:
        count, elites = (4, 2) if bench.tiny else (count, 16)
        model = bench.model(CONTEXT + horizon, torch.bfloat16).eval()
        config = model.config
        processor = VJEPA2ACProcessor(
            resolution=config.encoder_config.crop_size,
            frames_per_clip=config.frames_per_clip,
            action_statistics=statistics_of_actions(),
        )
        shape = (config.grid_size**2, config.encoder_config.hidden_size)
        known = {"states": torch.zeros(CONTEXT, 2), "actions": torch.zeros(CONTEXT - 1, len(ACTION_COLUMNS))}
        features = bench.random(CONTEXT, *shape, dtype=torch.bfloat16)
        context, goal = encode_context(model, processor, features=features, **known), bench.random(*shape)
        method = CEM(iterations=2, candidates=count, elites=elites)

        def search(parts=(model, processor, context, goal), horizon=horizon, method=method) -> Any:
            return plan(*parts, horizon=horizon, method=method, generator=torch.Generator().manual_seed(0))

        times = bench.seconds({"plan": search}, most=5)["plan"]
        rate = method.iterations * count / statistics.median(times)
        bench.add(f"plans of {count} candidates, horizon {horizon}", rate, "candidates/s", seconds=times)


# ---------------------------------------------------------------------------------------------------- loading


def write_clips(folder: Path, clips: int, edge: int) -> None:
    """A built data set (docs/data.md) of clips in which a random picture moves."""
    from datasets import Array2D, Dataset, Features, Value, Video
    from torchcodec.encoders import VideoEncoder

    types = {"video": Video(), "actions": Array2D((7, len(ACTION_COLUMNS)), "float32")}
    types |= {"states": Array2D((8, 2), "float32"), "start_tick": Value("int32")}
    types |= dict.fromkeys(("recording_id", "session_id", "player_id"), Value("string"))
    rows = []
    for number in range(clips):
        picture = torch.nn.functional.interpolate(torch.rand(1, 3, edge // 8, edge // 4), scale_factor=8)[0]
        frames = torch.stack([picture[..., 2 * n : 2 * n + edge] for n in range(16)])
        video = VideoEncoder((frames * 255).to(torch.uint8), frame_rate=5).to_tensor("mp4", crf=18)
        names = {"recording_id": f"{number}", "session_id": f"{number}", "player_id": f"{number}"}
        rows.append({"video": {"bytes": video.numpy().tobytes(), "path": None}, **names, "start_tick": 0})
        rows[-1] |= {"actions": np.zeros((7, len(ACTION_COLUMNS)), np.float32), "states": np.zeros((8, 2), np.float32)}
    (folder / "data").mkdir()
    Dataset.from_list(rows, features=Features(types)).to_parquet(folder / "data" / "train-00000-of-00001.parquet")


def loader(bench: Bench) -> None:
    from vjepa_ac_hf.loading import ClipLoader, load_clips

    edge, clips, batch = (32, 4, 2) if bench.tiny else (256, 64, 16)
    workers = 0 if bench.tiny else max(1, (os.cpu_count() or 2) - 1)
    processor = VJEPA2ACProcessor(resolution=edge, action_statistics=statistics_of_actions())
    with tempfile.TemporaryDirectory() as folder:
        write_clips(Path(folder), clips, edge)
        batches: Iterator[dict] = iter(
            ClipLoader(
                load_clips(folder, "train", streaming=True), processor, batch, num_workers=workers, device=bench.device
            )
        )
        together = 2 if bench.tiny else 8
        times = bench.seconds({"batches": lambda: [None for _ in islice(batches, together)]}, most=8)["batches"]
        what = f"loader to {bench.device}, {workers} workers, batch {batch}"
        bench.add(what, batch * together / statistics.median(times), "clips/s", seconds=times)


# ---------------------------------------------------------------------------------------------------- the command


# In order of importance: the last ones get what time is left. Seconds each may take at most.
PARTS: dict[str, tuple[int, Callable[[Bench], None]]] = {
    "peak": (40, peak),
    "training": (120, training),
    "rollout": (60, rollout),
    "candidates": (90, candidates),
    "memory": (80, memory),
    "planner": (90, planner),
    "loader": (90, loader),
    "graphs": (150, graphs),
    "flex": (150, lambda bench: training(bench, "flex")),
    "compiled": (200, lambda bench: training(bench, "compiled")),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="JSON file, written after every part")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="default: %(default)s")
    add("--tiny", action="store_true", help="a model of small sizes, to see that everything runs")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--minutes", type=float, default=9, help="for all parts together (default: %(default)s)")
    add("--only", choices=PARTS, help=argparse.SUPPRESS)  # in a process of its own: one part, its rows to --output
    add("--until", type=float, help=argparse.SUPPRESS)  # of time.monotonic(), which processes of a machine share
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here; --device cpu --tiny runs the same code")
    return arguments


def only(arguments: argparse.Namespace) -> None:
    """A part in this process: its rows so far go to `--output` after each."""

    def keep(rows: list[dict]) -> None:
        write_json(arguments.output, rows)

    PARTS[arguments.only][1](Bench(arguments.device, arguments.tiny, arguments.until, keep))


def run_part(arguments: argparse.Namespace, name: str, seconds: float) -> tuple[list[dict], str | None]:
    """Rows of a part that ran in a process of its own, and why there are no more, if so."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--only", name, "--output", str(rows), "--device", arguments.device]
        command += [f"--until={time.monotonic() + seconds - ENDING}", *(["--tiny"] if arguments.tiny else [])]
        reason = None
        with (Path(folder) / "errors").open("w+") as errors:
            # A session of its own: compilers and loaders have children, which are to end with it.
            process = subprocess.Popen(command, stderr=errors, start_new_session=True)
            try:
                if status := process.wait(timeout=seconds):
                    errors.seek(0)
                    lines = errors.read().strip().splitlines()
                    reason = f"exit status {status}: {' | '.join(lines[-3:])}"
            except subprocess.TimeoutExpired:
                reason = f"stopped after {seconds:.0f} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return (json.loads(rows.read_text()) if rows.is_file() else []), reason


def known_versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def print_table(results: dict[str, Any]) -> None:
    print("\n| part | what | figure | of the matmul peak | time / ours | difference |\n|---|---|---|---|---|---|")
    for row in results["rows"]:
        figure = row.get("left_out") if row["value"] is None else f"{row['value']:,.4g} {row['unit']}"
        share, ratio, difference = (row.get(name) for name in ("share_of_peak", "ratio", "difference"))
        cells = [row["part"], row["what"], figure, "" if share is None else f"{share:.0%}"]
        cells += ["" if ratio is None else f"{ratio:.2f}", "" if difference is None else f"{difference:.1e}"]
        print("| " + " | ".join(cells) + " |")
    for name, reason in results["left_out"].items():
        print(f"{name}: {reason}")


def main() -> None:
    arguments = parse_arguments()
    if arguments.only:
        only(arguments)
        return
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * arguments.minutes
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine(),
        "tiny": arguments.tiny,
        "cores": os.cpu_count(),
        "versions": known_versions(),
        "matmul_tflops_per_second": None,
        "rows": [],
        "left_out": {},  # parts, or what is missing of them, and why
        "seconds": {},  # that each part took
    }
    for name in arguments.parts:
        started, missing = time.monotonic(), [n for n in NEEDS.get(name, ()) if find_spec(n) is None]
        seconds = min(PARTS[name][0], ends - started)
        if missing or seconds < 2 * ENDING:
            reason = f"needs {', '.join(missing)}" if missing else "no time was left"
            rows: list[dict] = []
        else:
            print(f"{name}: at most {seconds:.0f} s", flush=True)
            rows, reason = run_part(arguments, name, seconds)
        if reason:
            results["left_out"][name] = reason
        if name == "peak":
            results["matmul_tflops_per_second"] = max((row["value"] for row in rows), default=None)
        for row in rows:
            results["rows"].append({"part": name, **row})
            if "tflops_per_second" in row and results["matmul_tflops_per_second"]:
                share = row["tflops_per_second"] / results["matmul_tflops_per_second"]
                results["rows"][-1]["share_of_peak"] = share
        results["seconds"][name] = time.monotonic() - started
        write_json(arguments.output, results)
    print_table(results)


if __name__ == "__main__":
    main()
