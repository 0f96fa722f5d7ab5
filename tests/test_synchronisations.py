"""How often a step makes the host wait for the device, counted on the CPU; limits of waiting for other processes.

What a GPU would have to catch up for: reading a number (`item`, `tolist`, truth of a tensor: `_local_scalar_dense`),
and a tensor made of the host's memory (`torch.tensor(..., device=...)`: `lift_fresh` and a copy that is not pinned).
"""

import json
import traceback
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
from helpers_training import command, load_program, metrics, write_workspace
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vjepa_ac_hf import VJEPA2ACProcessor
from vjepa_ac_hf.loading.clips import load_clips
from vjepa_ac_hf.training import distributed, loop
from vjepa_ac_hf.training.distributed import group_timeout
from vjepa_ac_hf.training.interruptions import BatchWatch

# Not of the device: AdamW's counters of steps and random states lie on the CPU, labels of clips are made there.
ON_THE_HOST = ("torch/optim/", "in get_random_state", "in set_random_state", 'labels(batch["clips"])')


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("synchronisations"))


class _Functions(TorchFunctionMode):
    """`tolist` reads memory without an operation that a dispatch mode could see."""

    def __init__(self, found):
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") == "tolist":
            note(self.found, "tolist")
        return function(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "lift_fresh", "lift_fresh_copy"):
            note(self.found, function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def note(found, name):
    stack = traceback.format_stack()[:-2]
    if not any(place in line for line in stack for place in ON_THE_HOST):
        found.append((name, [line for line in stack if "/torch/" not in line][-1].strip().splitlines()[0]))


@contextmanager
def counted():
    found = []
    with _Functions(found), _Operations(found):
        yield found


def count_steps(monkeypatch, accumulation):
    """What makes the host wait within each optimizer step of a run, as lists that fill while it runs."""
    step, counts = loop.train_step, []

    def counting(run, batches):
        ready = iter([next(batches) for _ in range(accumulation)])
        with counted() as found:
            result = step(run, ready)
        counts.append(found)
        return result

    monkeypatch.setattr(loop, "train_step", counting)
    return counts


def test_the_counter_counts():
    with counted() as found:
        values = torch.zeros(3)
        values.tolist(), values[0].item(), float(values[1]), bool(values[2] > 0)
        torch.tensor([1.0, 2.0]) + torch.as_tensor(3.0)
        values.mean() * 2  # none of these
        values[:2].fill_(4.0)
    assert [name for name, _ in found] == ["tolist", *3 * ["_local_scalar_dense"], *2 * ["lift_fresh"]]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_waits_for_the_device_once(workspace, train_here, tmp_path, monkeypatch, accumulation):
    """However many batches it accumulates; the batches are at hand, as copies that were made ahead."""
    counts = count_steps(monkeypatch, accumulation)
    flags = ("--max_steps=5", "--per_device_batch_size=1", f"--gradient_accumulation_steps={accumulation}")
    flags += ("--ema_decay=0.9",)
    train_here(command(workspace, tmp_path, *flags, "--log_every=5", "--eval_every=0", "--checkpoint_every=9"))
    assert len(counts) == 5 and all([name for name, _ in found] == ["tolist"] for found in counts), counts


HEADS = {
    "inverse_dynamics": (),
    "action_anticipation": ("--use_past_actions", "--use_states"),
    "video_classification": ("--labels=labels.json",),
    "frame_decoding": (),
}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("task", HEADS)
def test_a_heads_step_waits_for_the_device_once(workspace, tmp_path, monkeypatch, task, accumulation):
    """Checks of labels, weights of keys and places of columns included; 38 columns, so that no kind is missing."""
    clips = load_clips(str(workspace / "clips"), "train")
    names = {*clips["recording_id"], *load_clips(str(workspace / "clips"), "validation")["recording_id"]}
    labels = {name: f"class {number % 3}" for number, name in enumerate(sorted(names))}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    counts = count_steps(monkeypatch, accumulation)
    flags = ["--max_steps=3", "--per_device_batch_size=1", f"--gradient_accumulation_steps={accumulation}"]
    flags += ["--log_every=3", "--eval_every=0", "--checkpoint_every=9", "--num_workers=0", "--cache_features=none"]
    flags += ["--head_hidden_size=16", "--head_num_hidden_layers=1", "--head_num_attention_heads=2"]
    flags += ["--action_space=vpt-38", f"--task={task}", "--encoder=random", "--model_config=tiny.json", *HEADS[task]]
    flags += ["--dataset", str(workspace / "clips"), "--output_dir", str(tmp_path / "out")]
    (tmp_path / "tiny.json").write_bytes((workspace / "tiny.json").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("sys.argv", ["train_head.py", *flags])
    assert load_program("examples/train_head.py").main() == 0
    assert len(counts) == 3 and all([name for name, _ in found] == ["tolist"] for found in counts), counts


def test_between_two_steps_nothing_waits(workspace, train_here, tmp_path, monkeypatch):
    """From the end of a step to the beginning of the next one, where none is logged."""
    step, mode, counts = loop.train_step, [], []

    def between(run, batches):
        if mode:
            counts.append(mode.pop())
            stack.pop().__exit__(None, None, None)
        result = step(run, batches)
        stack.append(counted())
        mode.append(stack[-1].__enter__())
        return result

    stack = []
    monkeypatch.setattr(loop, "train_step", between)
    train_here(command(workspace, tmp_path, "--max_steps=4", "--ema_decay=0.9", "--log_every=4", "--eval_every=0"))
    stack.pop().__exit__(None, None, None)
    assert counts == [[], [], []]


def test_pixels_are_normalised_without_copies_of_constants():
    """The statistics are numbers of kernels; the bits are those of float32 tensors of them."""
    processor = VJEPA2ACProcessor(resolution=16)
    frames = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with counted() as found:
        pixels = processor.normalize_pixels(frames)
    assert found == []
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (processor.pixel_mean, processor.pixel_std))
    assert torch.equal(pixels, (frames.float() - mean) / std)
    channels_last = frames.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    assert torch.equal(processor.normalize_pixels(channels_last), pixels)


def test_accumulation_is_no_waiting_for_data(workspace, train_here, tmp_path, monkeypatch):
    """A slow model is not a slow loader: only `next` of the loader counts."""
    now = [0.0]
    monkeypatch.setattr(loop, "time", type("Clock", (), {"perf_counter": staticmethod(lambda: now[0])}))
    monkeypatch.setattr("vjepa_ac_hf.training.health.time", loop.time)
    start, backward = BatchWatch.__next__, distributed.Accelerator.backward

    def slow_batch(self):
        now[0] += 1
        return start(self)

    def slow_backward(self, loss):
        now[0] += 3
        return backward(self, loss)

    monkeypatch.setattr(BatchWatch, "__next__", slow_batch)
    monkeypatch.setattr(distributed.Accelerator, "backward", slow_backward)
    flags = ("--per_device_batch_size=1", "--gradient_accumulation_steps=2", "--max_steps=4", "--log_every=2")
    train_here(command(workspace, tmp_path, *flags, "--eval_every=0", "--checkpoint_every=1"))
    assert [row["data_wait_share"] for row in metrics(tmp_path)] == [0.25, 0.25]


def test_processes_wait_longer_for_each_other_than_a_loader_for_its_data(workspace, tmp_path, monkeypatch):
    """A loader that hangs raises after `fail_seconds`, and ends its process after twice that (`BatchWatch`)."""
    assert group_timeout(1800) == timedelta(hours=1, minutes=10)
    handed = {}

    class Accelerator:
        num_processes, is_fsdp2 = 1, False

        def __init__(self, **options):
            handed.update(options)

    monkeypatch.setattr(distributed, "Accelerator", Accelerator)
    from vjepa_ac_hf.training.arguments import parse_arguments

    for seconds in (1.0, 1800.0, 40000.0):
        arguments = parse_arguments("", command(workspace, tmp_path, f"--loader_timeout={seconds}")[1:])
        distributed.build_accelerator(arguments)
        (found,) = [h.to_kwargs()["timeout"] for h in handed["kwargs_handlers"] if hasattr(h, "timeout")]
        assert found.total_seconds() >= 2 * seconds + 600
