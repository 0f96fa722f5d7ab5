"""Loading, training and planning where only a GPU takes a branch: the same test on both devices, oracles on the CPU.

Which branch each test covers: docs/training.md, "On a GPU".
"""

import json
import shutil
import socket
import sys

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("torchcodec")

from accelerate.state import AcceleratorState
from conftest import ON_A_GPU, SLOW_ON_THE_CPU
from helpers_training import command, load_program, losses, metrics, write_workspace
from safetensors.torch import load_file
from test_planning import SMALL, STATISTICS, imagined_by_hand, make_context, make_frames, make_model, seeded
from test_planning import make_processor as planning_processor
from torch.nn.parallel import DistributedDataParallel

from vjepa_ac_hf.loading.cached_clips import CachedClips
from vjepa_ac_hf.loading.clips import load_clips
from vjepa_ac_hf.loading.loader import copy_ahead
from vjepa_ac_hf.loading.quantization import quantize_features, restore_features
from vjepa_ac_hf.planning import Imagination, SearchSpace, encode_goal, plan

FLOAT32, BFLOAT16 = 1e-3, 2e-2  # relative tolerances of losses after steps on another device, and in bf16 or int8


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("gpu"))


@pytest.fixture
def train_on(train_program, workspace, monkeypatch):
    """Run examples/train.py on a device in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)

    def run(device, output, *flags):
        monkeypatch.setenv("ACCELERATE_USE_CPU", str(device == "cpu").lower())
        monkeypatch.setattr(sys, "argv", command(workspace, output, *flags))
        train_program.main()
        AcceleratorState._reset_state(reset_partial_state=True)
        return output

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def on_the_cpu(workspace, train_program):
    """A run in float32 on the CPU, with features stored as they are."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        flags = (f"--cache_features={workspace / 'cpu_cache'}", "--cache_dtype=float32")
        patch.setattr(sys, "argv", command(workspace, workspace / "cpu", *flags))
        train_program.main()
    AcceleratorState._reset_state(reset_partial_state=True)
    return workspace / "cpu"


# ---------------------------------------------------------------------------------------------------- loading


def test_batches_copied_ahead_are_whole_when_they_are_used(device):
    """On a GPU a slow kernel stands before every use, and memory of batches that are let go is taken at once."""
    numbers = 2**20

    def batches():
        for value in range(12):
            batch = torch.full((numbers,), float(value))
            yield {"values": batch.pin_memory() if device == "cuda" else batch, "clips": [str(value)]}

    sums, names = [], []
    for batch in copy_ahead(batches(), torch.device(device)):
        assert batch["values"].device.type == device
        if device == "cuda":
            torch.cuda._sleep(20_000_000)  # about 10 ms, in which the next copy is under way
        sums.append(batch["values"].double().sum())
        names += batch.pop("clips")
        del batch
    assert [s.item() / numbers for s in sums] == list(range(12)) and names == [str(n) for n in range(12)]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_A_GPU)], indirect=True)
def test_copies_run_beside_what_computes(device):
    """The next batch has arrived while the kernel that uses the last one still runs."""
    source = [{"values": torch.ones(2**20).pin_memory()} for _ in range(3)]  # now: pinning may wait for the device
    batches = copy_ahead(source, torch.device(device))
    next(batches)
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # about a second, on the stream that computes
    busy.record()
    second = next(batches)["values"]  # hands over the second, after the third's copy was queued on the other stream
    assert not busy.query(), "handing a batch over waits for the device"
    assert second.sum().item() == 2**20


def test_int8_features_are_restored_on_the_device(device):
    features = torch.randn(3, 8, 4, 48, generator=torch.Generator().manual_seed(0))
    stored = quantize_features(features)
    found = restore_features(*(t.to(device) for t in stored))
    assert found.device.type == device and torch.equal(found.cpu(), restore_features(*stored))
    made_there = [t.cpu() for t in quantize_features(features.to(device))]
    torch.testing.assert_close(made_there[1], stored[1], rtol=1e-6, atol=0)
    assert (made_there[0].int() - stored[0].int()).abs().max() <= 1  # a quotient may round to the neighbour


def test_cached_features_are_made_on_the_device(device, workspace, on_the_cpu, train_on):
    cache = workspace / f"cache_{device}"
    flags = (f"--cache_features={cache}", "--cache_dtype=float32")
    output = train_on(device, workspace / f"cached_{device}", *flags)
    assert losses(output) == pytest.approx(losses(on_the_cpu), rel=FLOAT32)
    for path in sorted((workspace / "cpu_cache").rglob("features-*.safetensors")):
        found = load_file(cache / path.relative_to(workspace / "cpu_cache"))["features"]
        torch.testing.assert_close(found, load_file(path)["features"], rtol=1e-3, atol=1e-3)
    clips = load_clips(str(workspace / "clips"), "train")
    (folder,) = cache.glob("train-*")
    assert len(CachedClips(clips, folder)) == len(clips)


# ---------------------------------------------------------------------------------------------------- training


@SLOW_ON_THE_CPU
@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        ((), FLOAT32),
        (("--gradient_checkpointing",), FLOAT32),
        (("--num_workers=1", "--streaming"), None),
        (("--mixed_precision=bf16",), BFLOAT16),
        (("--cache_features={}", "--cache_dtype=int8"), BFLOAT16),
    ],
    ids=str,
)
def test_losses_of_a_run_are_those_of_the_cpu(device, flags, tolerance, workspace, on_the_cpu, train_on, tmp_path):
    flags = [flag.format(tmp_path / "cache") for flag in flags]
    output = train_on(device, tmp_path / "out", *flags)
    expected = losses(on_the_cpu)
    if tolerance is None:  # a stream has an order of its own
        expected, tolerance = losses(train_on("cpu", tmp_path / "cpu", "--streaming")), FLOAT32
    assert losses(output) == pytest.approx(expected, rel=tolerance)
    row, reference = metrics(output)[-1], metrics(on_the_cpu)[-1]
    assert row["validation_loss"] == pytest.approx(reference["validation_loss"], rel=max(tolerance, BFLOAT16))
    record = json.loads((output / "run.json").read_text())
    assert record["devices"][0].startswith("cpu" if device == "cpu" else torch.cuda.get_device_name())


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_A_GPU)], indirect=True)  # CPU: test_distributed.py
def test_losses_of_a_compiled_run_are_those_of_the_cpu(device, on_the_cpu, train_on, tmp_path):
    output = train_on(device, tmp_path / "out", "--compile")
    assert losses(output) == pytest.approx(losses(on_the_cpu), rel=FLOAT32)


@SLOW_ON_THE_CPU
def test_a_run_continues_on_the_device(device, on_the_cpu, train_on, tmp_path):
    output = train_on(device, tmp_path / "out")
    whole = losses(output)
    shutil.rmtree(output / "checkpoints" / "step-00000008")
    train_on(device, output)
    assert losses(output) == pytest.approx(whole, rel=1e-5)
    assert whole == pytest.approx(losses(on_the_cpu), rel=FLOAT32)


def test_one_process_of_ddp(device, on_the_cpu, train_on, tmp_path, monkeypatch):
    """By NCCL on a GPU, by Gloo on a CPU: what `torchrun --nproc_per_node=1` sets, in this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    for name, value in {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    backends, forward = [], DistributedDataParallel.forward

    def counted(self, *args, **kwargs):
        backends.append(torch.distributed.get_backend())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(DistributedDataParallel, "forward", counted)
    output = train_on(device, tmp_path / "out", "--eval_every=0")
    assert backends == ["nccl" if device == "cuda" else "gloo"] * 8
    assert losses(output) == pytest.approx(losses(on_the_cpu), rel=FLOAT32)


# ---------------------------------------------------------------------------------------------------- figures, plans


@SLOW_ON_THE_CPU
def test_figures_of_an_evaluation_are_those_of_the_cpu(device, workspace, on_the_cpu, tmp_path, monkeypatch):
    program, found = load_program("examples/evaluate.py"), {}
    for name in {"cpu", device}:
        flags = ["--model", str(on_the_cpu), "--dataset", str(workspace / "clips"), "--output", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags, "--device", name])
        program.main()
        found[name] = json.loads((tmp_path / name / "metrics.json").read_text())["horizons"]
    assert found["cpu"]
    for ours, theirs in zip(found[device], found["cpu"], strict=True):
        assert ours["error"] == pytest.approx(theirs["error"], rel=FLOAT32)


def test_costs_and_plans_on_the_device_are_those_of_the_cpu(device):
    model, processor = make_model("vpt-13"), planning_processor("vpt-13")
    context, goal = make_context(model, processor), make_frames(1, seed=7)[0]
    target = encode_goal(model, processor, goal)
    expected = plan(model, processor, context, goal, horizon=3, generator=seeded(), method=SMALL)
    search = SearchSpace("vpt-13", statistics=STATISTICS)
    decisions = search.sample(search.initial(3), 5, seeded())
    actions = search.complete(decisions, pitch=float(context.states[-1, 1]), slot=context.slot)
    by_hand = [imagined_by_hand(model, processor, context, a)[-1] for a in actions]
    distances = torch.stack([(f - target).abs().mean() for f in by_hand]).double()

    model = make_model("vpt-13").to(device)
    context = make_context(model, processor)
    assert context.features.device.type == device
    costs = Imagination(model, processor, context).costs(
        actions, lambda features, raw: (features[:, -1] - target.to(device)).abs().mean(dim=(1, 2)) + 0 * raw[:, 0, 0]
    )
    torch.testing.assert_close(costs, distances, rtol=1e-4, atol=1e-5)
    found = plan(model, processor, context, goal, horizon=3, generator=seeded(), method=SMALL)
    assert found.cost == pytest.approx(expected.cost, rel=FLOAT32)
    assert found.features.device.type == device
    half = plan(
        *(model.to(torch.bfloat16), processor, context, goal),
        horizon=3,
        generator=seeded(),
        method=SMALL,
    )
    assert half.cost == pytest.approx(expected.cost, rel=0.1)
