"""The predictor's speed and memory against the straightforward implementation, side by side in one run.

    python benchmarks/predictor.py --output predictor.json                      # the sizes of docs/LOG.md
    python benchmarks/predictor.py --device cuda --dtype bfloat16 --depth 24 --batch 8 --attention flex_attention

The baseline (`straightforward.py`) has the same weights, inputs and precision. Measurements of both are interleaved, so
that a busy moment of the machine meets both; times are medians, ratios are medians of the ratios of neighbours. FLOP/s
counts what the mathematics needs (matrix products and the attended half of a clip), not what an implementation spends;
its share is of the best matrix product of the predictor's own sizes, measured in the same run. Peak memory: on CUDA the
allocator's; on a CPU that of the process above its size before, each implementation in a process of its own.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from straightforward import StraightforwardPredictor
from tqdm import tqdm
from transformers import VJEPA2Config

from vjepa_ac_hf import VJEPA2ACConfig, VJEPA2ACModel
from vjepa_ac_hf.records import versions, write_json

NAMES = ("ours", "baseline")
PARTS = ("training", "candidates", "steps")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16: autocast in training")
    add("--attention", default="sdpa", help="attn_implementation of ours (default: %(default)s)")
    add("--compile", action="store_true", help="torch.compile both")
    add("--threads", type=int, default=2, help="of a CPU (default: %(default)s)")
    add("--width", type=int, default=1024, help="of encoder and predictor (default: %(default)s)")
    add("--heads", type=int, default=16, help="default: %(default)s")
    add("--tokens", type=int, default=256, help="a step, a square (default: %(default)s)")
    add("--steps", type=int, default=8, help="of a clip (default: %(default)s)")
    add("--depth", type=int, default=4, help="layers in training (default: %(default)s)")
    add("--batch", type=int, default=1, help="default: %(default)s")
    add("--auto_steps", type=int, nargs="+", default=[2, 7])
    add("--rollout_depth", type=int, default=2, help="layers in the rollout of candidates (default: %(default)s)")
    add("--candidates", type=int, default=16, help="default: %(default)s")
    add("--horizon", type=int, default=4, help="default: %(default)s")
    add("--repeats", type=int, default=5, help="default: %(default)s")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--output", type=Path, help="JSON file of the results")
    add("--only", nargs=2, metavar=("NAME", "AUTO_STEPS"), help=argparse.SUPPRESS)  # one step, for its peak memory
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------- what is run


def build(arguments: argparse.Namespace, depth: int) -> tuple[VJEPA2ACModel, StraightforwardPredictor]:
    torch.manual_seed(0)
    encoder = VJEPA2Config(
        hidden_size=arguments.width,
        num_hidden_layers=1,
        num_attention_heads=arguments.heads,
        crop_size=16 * round(arguments.tokens**0.5),
    )
    config = VJEPA2ACConfig(
        encoder_config=encoder,
        pred_hidden_size=arguments.width,
        pred_num_attention_heads=arguments.heads,
        pred_num_hidden_layers=depth,
        frames_per_clip=2 * arguments.steps,
        auto_steps=1,
    )
    model = VJEPA2ACModel(config).to(arguments.device)
    model.set_attn_implementation(arguments.attention)
    baseline = StraightforwardPredictor(config).to(arguments.device)
    baseline.load_state_dict(model.predictor.state_dict())
    return model, baseline


def training_steps(arguments: argparse.Namespace, auto_steps: int) -> dict[str, Callable[[], float]]:
    """Forward, both losses and backward of each implementation on the same clip; they return the loss."""
    model, baseline = build(arguments, arguments.depth)
    shape = (arguments.batch, arguments.steps, arguments.tokens, arguments.width)
    features = torch.randn(shape, device=arguments.device)
    actions = torch.randn(arguments.batch, arguments.steps - 1, model.config.action_dim, device=arguments.device)
    states = torch.randn(arguments.batch, arguments.steps, 2, device=arguments.device)
    forward = torch.compile(model) if arguments.compile else model
    losses = torch.compile(baseline.losses) if arguments.compile else baseline.losses

    def step(module: torch.nn.Module, call: Callable[[], torch.Tensor]) -> float:
        module.zero_grad(set_to_none=True)
        with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
            loss = call()
        loss.backward()
        return loss.item()

    inputs = {"features": features, "actions": actions, "states": states}
    return {
        "ours": lambda: step(model, lambda: forward(**inputs, auto_steps=auto_steps).loss),
        "baseline": lambda: step(baseline, lambda: sum(losses(**inputs, auto_steps=auto_steps))),
    }


def candidate_rollouts(arguments: argparse.Namespace) -> dict[str, Callable[[], torch.Tensor]]:
    """The last imagined features of candidates over one context of steps - 1."""
    model, baseline = build(arguments, arguments.rollout_depth)
    dtype = getattr(torch, arguments.dtype)
    model, baseline = model.to(dtype), baseline.to(dtype)
    context, count, horizon = arguments.steps - 1, arguments.candidates, arguments.horizon
    options = {"device": arguments.device, "dtype": dtype}
    features = torch.randn(1, context, arguments.tokens, arguments.width, **options)
    actions = torch.randn(1, count, context - 1 + horizon, model.config.action_dim, **options)
    states = torch.randn(1, count, context - 1 + horizon, 2, **options)
    actions[:, :, : context - 1] = actions[:, :1, : context - 1]
    states[:, :, :context] = states[:, :1, :context]
    repeated = features.expand(count, -1, -1, -1)

    @torch.no_grad()
    def ours() -> torch.Tensor:
        return model.rollout(features, actions, states)[0, :, -1]

    @torch.no_grad()
    def straightforward() -> torch.Tensor:
        return baseline.rollout(repeated, actions[0], states[0])[:, -1]

    return {"ours": ours, "baseline": straightforward}


def rollout_steps(arguments: argparse.Namespace, contexts: list[int]) -> dict[int, Callable]:
    """One rollout step over cached keys and values of each length of context."""
    model, _ = build(arguments, arguments.rollout_depth)
    calls = {}
    for context in contexts:
        shape = (1, context, arguments.tokens, arguments.width)
        actions = torch.randn(1, context + 1, model.config.action_dim, device=arguments.device)
        states = torch.randn(1, context + 1, 2, device=arguments.device)
        features = torch.randn(shape, device=arguments.device)
        with torch.no_grad():
            _, past = model.predictor(features, actions[:, :context], states[:, :context])
        last = (features[:, -1:], actions[:, context:], states[:, context:])

        @torch.no_grad()
        def step(last=last, past=past, context=context):
            return model.predictor(*last, past, context)

        calls[context] = step
    return calls


# ---------------------------------------------------------------------------------------------------- measuring


def seconds(call: Callable, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(calls: dict, arguments: argparse.Namespace, label: str) -> dict:
    """Seconds of every call, `repeats` of each, taken in turn; each has run once before."""
    times: dict = {name: [] for name in calls}
    for _ in tqdm(range(arguments.repeats), desc=label):
        for name, call in calls.items():
            times[name].append(seconds(call, arguments.device))
    return times


def matmul_peak(arguments: argparse.Namespace) -> float:
    """FLOP/s of the best of a few large matrix products of the predictor's width."""
    dtype = getattr(torch, arguments.dtype)
    best = 0.0
    for rows in (2048, 8192):
        a = torch.randn(rows, arguments.width, device=arguments.device, dtype=dtype)
        b = torch.randn(arguments.width, 4 * arguments.width, device=arguments.device, dtype=dtype)
        torch.mm(a, b)
        fastest = min(seconds(lambda a=a, b=b: torch.mm(a, b), arguments.device) for _ in range(10))
        best = max(best, 2 * rows * 4 * arguments.width**2 / fastest)
    return best


def model_flops(arguments: argparse.Namespace, auto_steps: int) -> int:
    """Forward and backward (three times forward) of teacher forcing and of auto_steps - 1 cached single steps."""
    per_step, width = arguments.tokens + 2, arguments.width
    forward = 0
    for step in [*range(arguments.steps - 1), *range(1, auto_steps)]:
        linear = 2 * per_step * 12 * width**2  # qkv, proj and an MLP of four times the width
        attention = 4 * per_step * per_step * (step + 1) * width
        forward += arguments.depth * (linear + attention) + 2 * 2 * arguments.tokens * width**2  # embedding and head
    return 3 * arguments.batch * forward


def peak_memory(arguments: argparse.Namespace, name: str, auto_steps: int) -> int:
    """Bytes of a training step above what weights, gradients and inputs already hold."""
    if arguments.device != "cpu":
        call = training_steps(arguments, auto_steps)[name]
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name, str(auto_steps)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def only(arguments: argparse.Namespace) -> None:
    """In a process of its own: one training step of one implementation; prints its peak memory in bytes.

    Linux alone tells it: the largest resident size is that of this program, and can be set back to the present one
    (`ru_maxrss` would be that of the process that started this one, if larger).
    """
    name, auto_steps = arguments.only
    call = training_steps(arguments, int(auto_steps))[name]
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call()
    print(resident("VmHWM") - before)


def resident(field: str) -> int:
    """Bytes: the resident size of this process now (VmRSS) or at its largest (VmHWM)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[field].split()[0])


# ---------------------------------------------------------------------------------------------------- results


def training_row(arguments: argparse.Namespace, auto_steps: int, peak: float) -> dict:
    calls = training_steps(arguments, auto_steps)
    losses = {name: call() for name, call in calls.items()}
    times = interleaved(calls, arguments, f"training, auto_steps {auto_steps}")
    median = {name: statistics.median(times[name]) for name in NAMES}
    flops = model_flops(arguments, auto_steps)
    tokens = arguments.batch * (arguments.steps - 1 + auto_steps - 1) * (arguments.tokens + 2)
    return {
        "what": f"training step, auto_steps {auto_steps}",
        "seconds": median,
        "ratio": statistics.median(b / o for o, b in zip(times["ours"], times["baseline"], strict=True)),
        "tokens_per_second": tokens / median["ours"],
        "flops_per_second": {name: flops / median[name] for name in NAMES},
        "share_of_matmul_peak": {name: flops / median[name] / peak for name in NAMES},
        "peak_memory": {name: peak_memory(arguments, name, auto_steps) for name in NAMES},
        "losses": losses,
    }


def candidates_row(arguments: argparse.Namespace) -> dict:
    calls = candidate_rollouts(arguments)
    found, expected = (calls[name]().float() for name in NAMES)
    times = interleaved(calls, arguments, "candidates")
    return {
        "what": f"{arguments.candidates} candidates, context {arguments.steps - 1}, horizon {arguments.horizon}",
        "seconds": {name: statistics.median(times[name]) for name in NAMES},
        "ratio": statistics.median(b / o for o, b in zip(times["ours"], times["baseline"], strict=True)),
        "largest_difference": (found - expected).abs().max().item(),
    }


def print_table(results: dict) -> None:
    print("\n| | ours, s | baseline, s | ratio | tokens/s | GFLOP/s | of matmul peak | peak memory, ours / baseline |")
    print("|---|---|---|---|---|---|---|---|")
    for row in results["rows"]:
        cells = [
            row["what"],
            f"{row['seconds']['ours']:.3f}",
            f"{row['seconds']['baseline']:.3f}",
            f"{row['ratio']:.2f}",
        ]
        if "tokens_per_second" in row:
            memory = " / ".join(f"{row['peak_memory'][name] / 2**20:.0f} MiB" for name in NAMES)
            cells += [
                f"{row['tokens_per_second']:.0f}",
                f"{row['flops_per_second']['ours'] / 1e9:.0f}",
                f"{row['share_of_matmul_peak']['ours']:.0%}",
                memory,
            ]
        else:
            cells += [""] * 4
        print("| " + " | ".join(cells) + " |")
    if results["rollout_step_seconds"]:
        print("\n| context, steps | one rollout step, s |\n|---|---|")
    for context, value in results["rollout_step_seconds"].items():
        print(f"| {context} | {value:.3f} |")


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.only:
        only(arguments)
        return
    results: dict = {
        "rows": [],
        "rollout_step_seconds": {},
        "matmul_flops_per_second": matmul_peak(arguments),
        "arguments": {k: v for k, v in vars(arguments).items() if k not in ("output", "only")},
        "machine": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if arguments.device != "cpu" else None,
        "versions": versions(),
    }

    def keep() -> None:  # after every part: a run of many minutes that is stopped has not been for nothing
        if arguments.output:
            write_json(arguments.output, results)

    for auto_steps in arguments.auto_steps if "training" in arguments.parts else ():
        results["rows"].append(training_row(arguments, auto_steps, results["matmul_flops_per_second"]))
        keep()
    if "candidates" in arguments.parts:
        results["rows"].append(candidates_row(arguments))
        keep()
    if "steps" in arguments.parts:
        single_steps = rollout_steps(arguments, [1, 2, 4, 8, 16])
        for call in single_steps.values():
            call()
        steps = interleaved(single_steps, arguments, "one step")
        results["rollout_step_seconds"] = {context: statistics.median(times) for context, times in steps.items()}
        keep()
    print_table(results)


if __name__ == "__main__":
    main()
