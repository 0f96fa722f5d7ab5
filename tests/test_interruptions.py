"""Runs that are killed, stopped, starved of data or given broken checkpoints, and continued: same losses, same weights.

Nearly all runs are processes of their own (train_forks.py), and the signals are real.
"""

import contextlib
import errno
import json
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_training import assert_same_weights, command, metrics, write_workspace
from train_forks import TrainForks

from vjepa_ac_hf.training import checkpoints, loop
from vjepa_ac_hf.training.checkpoints import checkpoint_steps, get_random_state, set_random_state
from vjepa_ac_hf.training.health import SPEED
from vjepa_ac_hf.training.interruptions import EXIT_INTERRUPTED, SAME_CTRL_C, BatchWatch, LoaderTimeout, StopSignals

# Nine steps over 24 clips, four a step: the run ends in its second epoch.
FLAGS = ("--max_steps=9", "--checkpoint_every=3", "--eval_every=4", "--eval_clips=4", "--gradient_accumulation_steps=1")
FLAGS += ("--ema_decay=0.9",)  # checkpoints hold an average too


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("interruptions"))


@pytest.fixture(scope="module")
def forks():
    server = TrainForks()
    yield server
    server.close()


@pytest.fixture(scope="module")
def undisturbed(workspace, forks):
    """Output folder of a run that nothing happened to, and the seconds that it took."""
    output = workspace / "undisturbed"
    forks.start(command(workspace, output, *FLAGS), workspace / "log")
    begin = time.monotonic()
    assert forks.wait() == 0, (workspace / "log").read_text()
    return output, time.monotonic() - begin


def without_times(output):
    return [{k: v for k, v in row.items() if k not in SPEED} for row in metrics(output)]


def assert_same_run(output, reference):
    assert without_times(output) == without_times(reference)
    assert_same_weights(output, reference)
    assert_same_weights(output / "raw", reference / "raw")
    assert json.loads((output / "run_status.json").read_text()) == {"status": "finished", "step": 9}


def assert_continues(workspace, forks, output, reference):
    """The same command, started again, ends as the undisturbed run did."""
    assert forks.run(command(workspace, output, *FLAGS), workspace / "log") == 0, (workspace / "log").read_text()
    assert_same_run(output, reference)
    return (workspace / "log").read_text()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def rows(output):
    path = output / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def killed_anywhere(workspace, forks, undisturbed, tmp_path, moments):
    """Kills at shares of the run's nine rows, and of the time between two: it may be faster than the undisturbed."""
    reference, seconds = undisturbed
    found = []
    for number, share in enumerate(moments):
        output = tmp_path / f"killed-{number}"
        pid = forks.start(command(workspace, output, *FLAGS), workspace / "log")
        step, part = divmod(share * 9, 1)
        wait_for(lambda output=output, step=step: rows(output) >= step)
        time.sleep(part * min(seconds / 9, 0.5))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if forks.wait() == -signal.SIGKILL:
            found.append((rows(output), sorted(checkpoint_steps(output / "checkpoints"))))
        assert_continues(workspace, forks, output, reference)
    return found


def test_killed_at_random_moments(workspace, forks, undisturbed, tmp_path):
    """Two kills; many more below."""
    assert killed_anywhere(workspace, forks, undisturbed, tmp_path, [0.55, 0.8])


@pytest.mark.slow
def test_killed_at_12_random_moments(workspace, forks, undisturbed, tmp_path):
    drawn = random.Random(12)
    found = killed_anywhere(workspace, forks, undisturbed, tmp_path, [(i + drawn.random()) / 12 for i in range(12)])
    assert len(found) >= 8 and len({tuple(steps) for _, steps in found}) >= 3, found


class Killed(BaseException):
    """Ends a run as abruptly as an exception can."""


def kill_before(monkeypatch, call):
    """Raise before the call-th rename or flush to the disk of a checkpoint or of the run's files."""
    count = 0

    def counting(original):
        def wrapper(*arguments, **keywords):
            nonlocal count
            count += 1
            if count == call:
                raise Killed
            return original(*arguments, **keywords)

        return wrapper

    monkeypatch.setattr(os, "replace", counting(os.replace))
    monkeypatch.setattr(os, "fsync", counting(os.fsync))
    return lambda: count


def killed_before_call(workspace, train_here, undisturbed, output, call):
    with pytest.MonkeyPatch.context() as patch:
        kill_before(patch, call)
        try:
            train_here(command(workspace, output, *FLAGS))
            return False
        except Killed:
            pass
    train_here(command(workspace, output, *FLAGS))
    assert_same_run(output, undisturbed[0])
    return True


def test_killed_before_a_rename_or_flush(workspace, train_here, undisturbed, tmp_path):
    for call in (9, 22, 33):
        assert killed_before_call(workspace, train_here, undisturbed, tmp_path / str(call), call)


@pytest.mark.slow
def test_killed_before_every_rename_and_flush(workspace, train_here, undisturbed, tmp_path):
    call = 1
    while killed_before_call(workspace, train_here, undisturbed, tmp_path / str(call), call):
        call += 1
    assert call > 40


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_stops_with_a_checkpoint(workspace, forks, undisturbed, tmp_path, name):
    output = tmp_path / "stopped"
    pid = forks.start(command(workspace, output, *FLAGS, "--checkpoint_every=100"), workspace / "log")
    wait_for(lambda: rows(output) >= 2)
    os.kill(pid, signal.Signals[name])
    logged = rows(output)
    assert forks.wait() == EXIT_INTERRUPTED, (workspace / "log").read_text()
    newest = max(checkpoint_steps(output / "checkpoints"))
    assert newest == rows(output) <= logged + 2  # the step under way, and one more if it was about to end
    assert json.loads((output / "run_status.json").read_text()) == {"status": "interrupted", "step": newest}
    text = assert_continues(workspace, forks, output, undisturbed[0])
    assert f"continuing from {output}/checkpoints/step-{newest:08d}" in text


def test_a_signal_during_validation_stops_after_it(workspace, train_here, undisturbed, tmp_path, monkeypatch):
    validate = train_here.program.validate

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        return validate(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(train_here.program, "validate", signalled)
        train_here(command(workspace, tmp_path, *FLAGS))
    assert end.value.code == EXIT_INTERRUPTED and rows(tmp_path) == 4
    assert 4 in checkpoint_steps(tmp_path / "checkpoints") and "validation_loss" in metrics(tmp_path)[-1]
    train_here(command(workspace, tmp_path, *FLAGS))
    assert_same_run(tmp_path, undisturbed[0])


def test_a_signal_while_features_are_cached_keeps_them(workspace, train_here, tmp_path, monkeypatch):
    cache_features = train_here.program.cache_features
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def signalled(*arguments, **keywords):
        cached = cache_features(*arguments, **keywords)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        return cached

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(train_here.program, "cache_features", signalled)
        train_here(command(workspace, tmp_path / "out", *FLAGS, f"--cache_features={tmp_path / 'cache'}"))
    assert end.value.code == EXIT_INTERRUPTED and not rows(tmp_path / "out")
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_the_process_at_once(number):
    """Status 143, and 130 for Ctrl-C; but the launcher's copy of the same Ctrl-C is no second one."""
    pid = os.fork()
    if pid == 0:
        with StopSignals() as stop, stop.deferred():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.requested
            if number == signal.SIGINT:
                os.kill(os.getpid(), number)
                stop._since -= SAME_CTRL_C
            os.kill(os.getpid(), number)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -number


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped", "listing"])
def test_damaged_checkpoints_are_set_aside_with_a_warning(workspace, forks, undisturbed, tmp_path, damage):
    output = tmp_path / "damaged"
    shutil.copytree(undisturbed[0], output)
    newest = output / "checkpoints" / "step-00000009"
    path = newest / {"listing": "files.json", "flipped": "predictor.safetensors"}.get(damage, "optimizer.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[: -5 if damage == "truncated" else None])
    if damage == "missing":
        path.unlink()
    if damage == "listing":
        path.write_text('{"predictor.safetensors": {}}')
    with pytest.raises(ValueError, match=rf"--resume .*step-00000009: this checkpoint is damaged: .*{path.name[:5]}"):
        checkpoints.find_checkpoint(output / "checkpoints", str(newest))
    text = assert_continues(workspace, forks, output, undisturbed[0])
    assert "step-00000009 is not continued from" in text and path.name in text
    assert "continuing from" in text and "step-00000008" in text
    assert (output / "checkpoints" / "damaged-step-00000009").is_dir()


def test_no_whole_checkpoint_is_an_error(undisturbed, tmp_path):
    shutil.copytree(undisturbed[0] / "checkpoints", tmp_path / "checkpoints")
    for path in (tmp_path / "checkpoints").glob("step-*"):
        (path / "random.safetensors").unlink()
    with pytest.raises(ValueError, match="all checkpoints are damaged; --resume never starts anew"):
        checkpoints.find_checkpoint(tmp_path / "checkpoints", "auto")


def test_what_is_not_continued_from_is_never_taken_later(undisturbed, tmp_path):
    """A new run in the folder, or one from an older checkpoint, must not go on from the old run's newer ones."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(undisturbed[0] / "checkpoints", folder)
    steps = sorted(checkpoint_steps(folder))
    first = folder / f"step-{steps[0]:08d}"
    assert checkpoints.find_checkpoint(folder, str(first)) == first
    assert sorted(checkpoint_steps(folder)) == steps  # nothing is touched before it is known that the run may go on
    checkpoints.set_aside_newer(folder, first, str(first))
    assert sorted(checkpoint_steps(folder)) == steps[:1]
    assert checkpoints.find_checkpoint(folder, "never") is None
    checkpoints.set_aside_newer(folder, None, "never")
    assert not checkpoint_steps(folder) and len(list(folder.glob("superseded-*"))) == len(steps)


@pytest.mark.parametrize("content", ["{'", ""])
def test_damaged_metrics_are_an_error(workspace, train_here, undisturbed, tmp_path, content):
    shutil.copytree(undisturbed[0], tmp_path / "out")
    path = tmp_path / "out" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = content
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl, line 4: not JSON"):
        train_here(command(workspace, tmp_path / "out", *FLAGS))


def test_a_loss_that_is_not_finite_leaves_a_checkpoint_from_before_it(
    workspace, train_here, undisturbed, tmp_path, monkeypatch
):
    steps = 0
    train_step = loop.train_step

    def poisoned(run, batches):
        nonlocal steps
        steps += 1
        with monkeypatch.context() as patch:
            if steps == 6:
                distance = type(run.model)._distance  # the gradients of all parameters are not finite either
                patch.setattr(type(run.model), "_distance", lambda *a, **k: math.nan * distance(*a, **k))
                torch.rand(3)  # what a forward pass may draw is drawn again after the run is continued
            return train_step(run, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", poisoned)
        with pytest.raises(FloatingPointError, match=r"loss nan.* in step 6: .*Clips of this process.*toy-"):
            train_here(command(workspace, tmp_path, *FLAGS))
    state = json.loads((tmp_path / "checkpoints" / "step-00000005" / "trainer_state.json").read_text())
    assert state["step"] == state["loader"]["next_batch"] == 5
    train_here(command(workspace, tmp_path, *FLAGS))
    assert_same_run(tmp_path, undisturbed[0])


def test_the_best_checkpoint_is_kept(workspace, train_here, tmp_path, monkeypatch):
    """Ties go to the earlier step; losses that are not finite, or None, never win."""
    losses = iter([3.0, math.nan, 1.0, None, 1.0, 2.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(train_here.program, "validate", lambda *_: {"validation_loss": next(losses)})
    flags = ("--max_steps=9", "--eval_every=1", "--checkpoint_every=2", "--keep_checkpoints=2")
    train_here(command(workspace, tmp_path, *flags))
    assert sorted(checkpoint_steps(tmp_path / "checkpoints")) == [3, 8, 9]
    best = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert best == {"step": 3, "validation_loss": 1.0, "checkpoint": "step-00000003"}
    monkeypatch.setattr(train_here.program, "validate", lambda *_: {"validation_loss": 1.5})
    train_here(command(workspace, tmp_path, *flags, "--max_steps=11", "--warmup_steps=0", "--decay_steps=0"))
    assert sorted(checkpoint_steps(tmp_path / "checkpoints")) == [3, 10, 11]  # known after the continuation too


def test_a_full_disk_leaves_the_checkpoint_before(workspace, train_here, undisturbed, tmp_path, monkeypatch):
    save_file = checkpoints.save_file

    def full(tensors, path):
        if "step-00000006" in str(path) and "optimizer" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save_file(tensors, path)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device.*optimizer"):
        patch.setattr(checkpoints, "save_file", full)
        train_here(command(workspace, tmp_path, *FLAGS))
    assert max(checkpoint_steps(tmp_path / "checkpoints")) == 4
    train_here(command(workspace, tmp_path, *FLAGS))
    assert_same_run(tmp_path, undisturbed[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["arguments"]["model"].update(pred_num_hidden_layers=7), "model.pred_num_hidden_layers: 7 then, 2"),
        (lambda s: s["arguments"]["action_statistics"]["mean"].__setitem__(2, 0.5), "action_statistics.mean: "),
        (lambda s: s["arguments"].update(encoder_weights="00000000"), "encoder_weights: '00000000' then, "),
        (lambda s: s["arguments"].update(num_processes=4), "num_processes: 4 then, 1 now"),
        (lambda s: s["arguments"].update(seed=1), "seed: 1 then, 0 now"),
    ],
)
def test_another_configuration_is_refused(workspace, train_here, undisturbed, tmp_path, change, message):
    output = tmp_path / "changed"
    shutil.copytree(undisturbed[0], output)
    newest = output / "checkpoints" / "step-00000009"
    state = json.loads((newest / "trainer_state.json").read_text())
    change(state)
    (newest / "trainer_state.json").write_text(json.dumps(state))
    checkpoints.write_checksums(newest)
    with pytest.raises(ValueError, match="was made with other arguments") as error:
        train_here(command(workspace, output, *FLAGS))
    assert message in str(error.value)
    assert without_times(output) == without_times(undisturbed[0])


def test_random_states_come_back():
    random.gauss(0, 1)
    np.random.standard_normal()  # both keep a second number of the pair for the next call
    states = get_random_state(torch.device("cpu"))
    drawn = [(random.gauss(0, 1), np.random.standard_normal(), torch.rand(2).tolist(), random.random())]
    np.random.standard_normal()
    gathered = {k: torch.stack([torch.zeros_like(v), v]) for k, v in states.items()}  # as a checkpoint holds them
    set_random_state({k: v[1] for k, v in gathered.items()}, torch.device("cpu"))
    assert [(random.gauss(0, 1), np.random.standard_normal(), torch.rand(2).tolist(), random.random())] == drawn


def batches_after(delays):
    for number, delay in enumerate(delays):
        threading.Event().wait(delay)
        yield {"number": number}


def test_a_stalled_loader_is_reported_and_then_an_error(caplog):
    watch = BatchWatch(batches_after([0, 0.5, 0, 120]), warn_seconds=0.1, fail_seconds=1)
    with caplog.at_level(logging.WARNING):
        assert next(watch)["number"] == 0 and not caplog.records
        assert next(watch)["number"] == 1
    assert 1 <= len(caplog.records) <= 5 and "waiting for data: no batch for" in caplog.text
    assert next(watch)["number"] == 2
    begin = time.monotonic()
    with pytest.raises(LoaderTimeout, match="no batch came in 1 seconds.*--loader_timeout"):
        next(watch)
    assert time.monotonic() - begin > 0.9
    watch.close()
    assert signal.getsignal(signal.SIGALRM) is not watch._stop_waiting


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_worker_that_hangs_ends_the_run(workspace, forks, tmp_path):
    flags = ("--num_workers=1", "--max_steps=100000", "--eval_every=0", "--loader_warning=1", "--loader_timeout=45")
    pid = forks.start(command(workspace, tmp_path, *flags), workspace / "log")
    wait_for(lambda: rows(tmp_path) >= 3, seconds=45)
    server = next(c for c in children(pid) if children(c))
    workers = children(server)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    assert forks.wait() == 1
    text = (workspace / "log").read_text()
    assert "waiting for data: no batch for" in text and "no batch came in 45 seconds" in text
    wait_for(lambda: not any(os.path.exists(f"/proc/{w}") for w in workers))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
@pytest.mark.parametrize("streaming", [(), ("--streaming", "--shuffle_buffer=8")])
def test_a_signal_to_the_whole_group_does_not_take_the_workers_away(
    workspace, forks, undisturbed, tmp_path, name, streaming
):
    """Schedulers signal all processes of a job, loader workers too; data continue in the middle of an epoch."""
    flags = (*FLAGS, "--num_workers=2", *streaming)
    reference = tmp_path / "reference"
    assert forks.run(command(workspace, reference, *flags), workspace / "log") == 0
    output = tmp_path / "stopped"
    pid = forks.start(command(workspace, output, *flags), workspace / "log")
    wait_for(lambda: rows(output) >= 2)
    os.killpg(pid, signal.Signals[name])
    assert forks.wait() == EXIT_INTERRUPTED, (workspace / "log").read_text()
    assert forks.run(command(workspace, output, *flags), workspace / "log") == 0
    assert_same_run(output, reference)
    if not streaming:
        assert_same_run(output, undisturbed[0])  # and workers change nothing


def test_workers_leave_signals_to_the_process_that_they_work_for():
    """In a process that has started nothing yet; what the server blocks, all that it forks blocks too."""
    program = (
        "from multiprocessing import forkserver\n"
        "from vjepa_ac_hf.loading.loader import worker_options\n"
        "worker_options(1)\n"
        "print(open(f'/proc/{forkserver._forkserver._forkserver_pid}/status').read())\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    blocked = int(next(line for line in said.splitlines() if line.startswith("SigBlk:")).split()[1], 16)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        assert blocked >> (number - 1) & 1, number.name
