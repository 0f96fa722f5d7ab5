"""What a run computes, against a plain training loop: schedule, accumulation, clipping, AdamW, what is logged."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import set_seed
from helpers_training import assert_same_weights, command, metrics, predictor_weights, write_workspace
from safetensors.torch import load_file

from vjepa_ac_hf import VJEPA2ACModel, VJEPA2ACProcessor
from vjepa_ac_hf.loading.clips import load_clips
from vjepa_ac_hf.loading.loader import ClipLoader
from vjepa_ac_hf.training import loop
from vjepa_ac_hf.training.checkpoints import checkpoint_steps
from vjepa_ac_hf.training.optimization import build_scheduler, continue_schedule
from vjepa_ac_hf.training.presets import build_config
from vjepa_ac_hf.training.run_log import MetricsLog

STEPS, BATCH, ACCUMULATION, WARMUP, DECAY = 6, 2, 2, 2, 3
PEAK, START, FINAL, WEIGHT_DECAY, CLIP = 2e-3, 5e-4, 2e-4, 0.5, 0.05
FLAGS = (
    *(f"--max_steps={STEPS}", f"--per_device_batch_size={BATCH}", f"--gradient_accumulation_steps={ACCUMULATION}"),
    *(
        f"--warmup_steps={WARMUP}",
        f"--decay_steps={DECAY}",
        f"--learning_rate={PEAK}",
        f"--weight_decay={WEIGHT_DECAY}",
    ),
    *(f"--start_learning_rate={START}", f"--final_learning_rate={FINAL}", "--eval_every=3", "--checkpoint_every=1"),
    f"--max_grad_norm={CLIP}",
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("train_step"))


def rate(step: int) -> float:
    """docs/training.md, "Schedules"."""
    if step < WARMUP:
        return START + (PEAK - START) * (step + 1) / WARMUP
    if step > STEPS - DECAY:
        return FINAL + (PEAK - FINAL) * (STEPS - step) / DECAY
    return PEAK


class AdamW:
    """Decoupled weight decay (arXiv 1711.05101, algorithm 2), betas 0.9 and 0.999, on matrices alone."""

    def __init__(self, parameters):
        self.moments = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
        self.step = 0

    def update(self, gradients, learning_rate):
        self.step += 1
        for (parameter, first, second), gradient in zip(self.moments, gradients, strict=True):
            if parameter.ndim > 1:
                parameter *= 1 - learning_rate * WEIGHT_DECAY
            first.mul_(0.9).add_(gradient, alpha=0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            scale = (second / (1 - 0.999**self.step)).sqrt() + 1e-8
            parameter -= learning_rate * (first / (1 - 0.9**self.step)) / scale


def plain_loop(workspace):
    """Rows of losses, rate and gradient norm, and the predictor, by a loop without Accelerate."""
    set_seed(0)
    model = VJEPA2ACModel(build_config(str(workspace / "tiny.json"), action_space="vpt-13")).train()
    statistics = json.loads((workspace / "clips" / "action_stats.json").read_text())
    processor = VJEPA2ACProcessor(resolution=32, action_space=model.config.action_space, action_statistics=statistics)
    batches = iter(ClipLoader(load_clips(str(workspace / "clips"), "train"), processor, BATCH, seed=0))
    parameters = list(model.predictor.parameters())
    optimizer, rows = AdamW(parameters), []
    for step in range(STEPS):
        gradients, losses = [torch.zeros_like(p) for p in parameters], []
        for _ in range(ACCUMULATION):
            batch = next(batches)
            output = model(**{k: v for k, v in batch.items() if k != "clips"})
            for total, gradient in zip(gradients, torch.autograd.grad(output.loss, parameters), strict=True):
                total += gradient / ACCUMULATION
            losses.append([output.loss.item(), output.teacher_forcing_loss.item(), output.rollout_loss.item()])
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
        with torch.no_grad():
            optimizer.update([g * min(1, CLIP / norm) for g in gradients], rate(step))
        means = [sum(column) / ACCUMULATION for column in zip(*losses, strict=True)]
        rows.append([*means, rate(step), norm])
    return rows, model.predictor.state_dict()


@pytest.fixture(scope="module")
def whole(workspace, train_program):
    """Output folder of a run with all its checkpoints; gradients are clipped in every step."""
    output = workspace / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(sys, "argv", command(workspace, output, *FLAGS, "--keep_checkpoints=9"))
        train_program.main()
    return output


def test_a_run_is_a_plain_training_loop(workspace, whole):
    expected, weights = plain_loop(workspace)
    assert min(row[-1] for row in expected) > 2 * CLIP
    names = ("loss", "teacher_forcing_loss", "rollout_loss", "learning_rate", "gradient_norm")
    found = metrics(whole)
    for row, values in zip(found, expected, strict=True):
        assert [row[name] for name in names] == pytest.approx(values, rel=2e-4)
    for name, tensor in predictor_weights(whole).items():
        torch.testing.assert_close(tensor, weights[name.removeprefix("predictor.")], rtol=2e-3, atol=1e-4, msg=name)
    # What is saved is of the step whose number it bears, and validated with the weights of that step.
    assert [row["step"] for row in found if "validation_loss" in row] == [3, 6]
    steps = checkpoint_steps(whole / "checkpoints")
    assert list(steps) == list(range(1, STEPS + 1))
    for step, path in steps.items():
        state = json.loads((path / "trainer_state.json").read_text())
        assert state["step"] == step and state["schedule"]["last_epoch"] == step
        assert state["loader"]["next_batch"] == step * ACCUMULATION
        moments = load_file(path / "optimizer.safetensors")
        assert {int(v) for k, v in moments.items() if k.endswith(":step")} == {step}


@pytest.mark.parametrize("step", [1, 5])
def test_continuing_restores_moments_schedule_and_best(workspace, whole, train_here, tmp_path, step):
    """From the middle of warm-up and of decay, of an epoch, with accumulation: the same bits."""
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    for late in range(step + 1, STEPS + 1):
        shutil.rmtree(stopped / "checkpoints" / f"step-{late:08d}")
    train_here(command(workspace, stopped, *FLAGS))
    names = ("step", "loss", "learning_rate", "gradient_norm")
    rows = [[[row[name] for name in names] for row in metrics(folder)] for folder in (whole, stopped)]
    assert rows[0] == rows[1] and len(rows[0]) == STEPS
    assert_same_weights(stopped, whole)
    best = [json.loads((folder / "checkpoints" / "best.json").read_text()) for folder in (whole, stopped)]
    assert best[0] == best[1]


def test_speed_is_that_of_all_steps_since_the_row_before_and_of_nothing_else(
    workspace, train_here, tmp_path, monkeypatch
):
    """Rows of 3, 1 and 2 steps, each step half a second of this clock; validations and checkpoints take minutes."""
    now, step, save = [0.0], loop.train_step, loop.save

    def after(seconds, function):
        def timed(*arguments):
            now[0] += seconds
            return function(*arguments)

        return timed

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(loop, "train_step", after(0.5, step))
    monkeypatch.setattr(loop, "save", after(300, save))
    monkeypatch.setattr(train_here.program, "validate", after(60, lambda *_: {"validation_loss": 1 / now[0]}))
    train_here(command(workspace, tmp_path, *FLAGS, "--log_every=4", "--eval_every=3"))
    assert now[0] == 6 * 0.5 + 6 * 300 + 2 * 60
    assert [(r["step"], r["clips_per_second"]) for r in metrics(tmp_path)] == [(3, 8.0), (4, 8.0), (6, 8.0)]


def test_rows_up_to_the_step_stay(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in (2, 4, 5)))
    log = MetricsLog(path, 4)
    assert [row["step"] for row in metrics(tmp_path)] == [2, 4]
    log.write({"step": 6, "loss": 1.0})
    assert metrics(tmp_path)[-1] == {"step": 6, "loss": 1.0}
    MetricsLog(path, 0)
    assert path.read_text() == ""


@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_a_continued_schedule_is_that_of_the_new_length(step):
    def make(steps):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=PEAK)
        return build_scheduler(optimizer, steps, WARMUP, DECAY, START, FINAL)

    first, second, undisturbed = make(7), make(12), make(12)
    for _ in range(step):
        first.optimizer.step()
        first.step()
        undisturbed.optimizer.step()
        undisturbed.step()
    continue_schedule(second, first.state_dict())
    for _ in range(12 - step):
        rates = {s.get_last_lr()[0] for s in (second, undisturbed)}
        assert rates == {s.optimizer.param_groups[0]["lr"] for s in (second, undisturbed)} and len(rates) == 1
        for scheduler in (second, undisturbed):
            scheduler.optimizer.step()
            scheduler.step()
