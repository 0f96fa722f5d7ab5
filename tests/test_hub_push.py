"""Keeping a model on the Hub while training goes on: what fails, what waits, what is on disk, what is pushed later.

The server is a local one, the client the unmodified `huggingface_hub` in the processes that push.py starts. The
server's record says what happened, in which order and when.
"""

import contextlib
import copy
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import psutil
import pytest
import torch
from helpers_training import load_program, write_workspace
from hub_server import Fault, HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file, save_file
from test_modeling import tiny_model
from test_push import environment, train_command
from transformers import VJEPA2Model

from vjepa_ac_hf import ACTION_COLUMNS, ActionStatistics, VJEPA2ACModel, VJEPA2ACProcessor
from vjepa_ac_hf.console import report
from vjepa_ac_hf.hub.cards import RunDescription
from vjepa_ac_hf.hub.push import HubPusher, prepare_repository, repository_folder, save_final_model
from vjepa_ac_hf.hub.upload import Snapshot, look, read_json, retry_after
from vjepa_ac_hf.records import tensor_digests, tensors_of, weights_digest
from vjepa_ac_hf.training.run_log import write_status

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "model_cards" / "model_card.md"
KEY = ("model", "org/world")


@pytest.fixture
def server(tmp_path, monkeypatch):
    with HubServer() as hub:
        for name, value in environment(hub, tmp_path).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        hub.repositories[KEY] = {}
        yield hub


def small_parts() -> tuple[VJEPA2ACModel, VJEPA2ACProcessor, RunDescription]:
    torch.manual_seed(3)
    model = tiny_model()
    statistics = ActionStatistics()
    statistics.update(torch.randn(4, 7, len(ACTION_COLUMNS)).numpy())
    processor = VJEPA2ACProcessor(resolution=32, action_statistics=statistics.to_dict())
    arguments = {"dataset": "org/clips", "output_dir": "out", "hub_model_id": "org/world", "max_steps": 40}
    arguments |= {"per_device_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    arguments |= {"weight_decay": 0.04, "mixed_precision": "no", "seed": 0}
    run = RunDescription.of_run(TEMPLATE, Namespace(**arguments), model, processor, "random", num_processes=3)
    return model, processor, run


@pytest.fixture(scope="module")
def parts():
    return small_parts()


def final_model(folder: Path, parts, step: int = 40) -> Path:
    folder.mkdir(exist_ok=True)
    model, processor, run = parts
    save_final_model(folder, model, processor, run, step)
    return folder


def waiting(folder: Path) -> Snapshot | None:
    """What a run still has to push."""
    return look(repository_folder(folder, "org/world"))[0]


def snapshots(folder: Path) -> list[int]:
    found = repository_folder(folder, "org/world").glob("[0-9]*-step-*")  # not what a killed program left unfinished
    return sorted(int(p.name.split("-")[-1]) for p in found)


def push_final(pusher: HubPusher, run: RunDescription, wait: float) -> bool:
    pusher.run = run
    return pusher.finish(wait)


def checkpoint(folder: Path, step: int, model: VJEPA2ACModel) -> tuple[Path, dict]:
    """A checkpoint's predictor, changed so that it is no other step's, and the model's tensors with it."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    predictor = {k: v.detach() + step for k, v in model.predictor.state_dict().items()}
    save_file(predictor, path / "predictor.safetensors")
    return path, {**model.state_dict(), **{f"predictor.{k}": v for k, v in predictor.items()}}


def new_pusher(folder: Path, parts=None, **options) -> HubPusher:
    pusher = HubPusher(folder, "org/world", **{"timeout": 20, "first_wait": 0.05, **options})
    if parts is not None:
        pusher.prepare(*parts)
    return pusher


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this never came"
        time.sleep(0.02)


def on_hub(server: HubServer, name: str) -> bytes:
    return server.repositories[KEY][name]


# ---------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_becomes_a_whole_model_on_the_hub(server, parts, tmp_path):
    rows = [{"step": step, "loss": 1.0 / step, "clips_per_second": 77.0} for step in (5, 10, 15)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 20, "lo')
    saved, tensors = checkpoint(tmp_path, 10, parts[0])
    with new_pusher(tmp_path, parts) as pusher:
        pusher.begin(0)
        pusher.submit(10, saved)
        (saved / "predictor.safetensors").unlink()  # as old checkpoints are
        wait_for(lambda: waiting(tmp_path) is None)
    found = load(on_hub(server, "model.safetensors"))
    assert found.keys() == tensors.keys()
    assert all(found[name].equal(tensor) for name, tensor in tensors.items())
    final = final_model(tmp_path / "final", parts)
    assert {p.name for p in final.iterdir()} | {"metrics.jsonl"} == server.repositories[KEY].keys()
    for name in ("config.json", "processor_config.json", "modeling_vjepa2_ac.py"):
        assert on_hub(server, name) == (final / name).read_bytes(), name
    assert [json.loads(line)["step"] for line in on_hub(server, "metrics.jsonl").splitlines()] == [5, 10]
    assert json.loads(on_hub(server, "training_args.json"))["step"] == 10
    card = on_hub(server, "README.md").decode()
    assert "Training is not finished**: this is step 10 of 40" in card and "- loss: 0.1" in card
    assert "10 steps of 24 clips" in card and "77" not in card and "validation_error" not in card
    assert [(name, summary) for name, summary, _ in server.commits] == [("org/world", "Step 10")]
    folder = repository_folder(tmp_path, "org/world")
    assert {p.name for p in folder.iterdir()} == {"begun.json", "pushed.json", "upload.log", "lock", "work"}
    assert not list((folder / "work").iterdir())
    pushed = json.loads((folder / "pushed.json").read_text())
    assert (pushed["repo_id"], pushed["step"], pushed["final"]) == ("org/world", 10, False)


def test_a_newer_checkpoint_replaces_one_that_waits(server, parts, tmp_path):
    server.faults = [Fault("PUT /objects", times=1, hang=600)]
    with new_pusher(tmp_path, parts, timeout=600) as pusher:
        pusher.begin(0)
        pusher.submit(1, checkpoint(tmp_path, 1, parts[0])[0])
        wait_for(lambda: server.asked("PUT /objects"))
        for step in (2, 3):
            pusher.submit(step, checkpoint(tmp_path, step, parts[0])[0])
        assert waiting(tmp_path).step == 3 and not waiting(tmp_path).final
        server.closing.set()  # what hangs goes on
        wait_for(lambda: waiting(tmp_path) is None)
    assert [summary for _, summary, _ in server.commits] == ["Step 1", "Step 3"]
    assert json.loads((repository_folder(tmp_path, "org/world") / "pushed.json").read_text())["step"] == 3
    assert snapshots(tmp_path) == []


def test_the_final_model_replaces_an_upload_that_hangs(server, parts, tmp_path):
    server.faults = [Fault("PUT /objects", times=1, hang=600)]
    with new_pusher(tmp_path, parts, timeout=600) as pusher:
        pusher.begin(0)
        pusher.submit(1, checkpoint(tmp_path, 1, parts[0])[0])
        wait_for(lambda: server.asked("PUT /objects"))
        final_model(tmp_path, parts)
        assert push_final(pusher, parts[2], wait=60)
    assert [summary for _, summary, _ in server.commits] == ["Trained model, step 40"]
    assert on_hub(server, "model.safetensors") == (tmp_path / "model.safetensors").read_bytes()
    assert {p.name for p in (tmp_path / ".hub").iterdir()} == {"org--world"} and snapshots(tmp_path) == []


@pytest.mark.slow
def test_what_an_earlier_run_left_is_pushed_unless_it_is_undone(server, parts, tmp_path, caplog):
    later = new_pusher(tmp_path, parts, strategy="later")
    later.begin(0)
    later.submit(10, checkpoint(tmp_path, 10, parts[0])[0])
    assert not server.requests and waiting(tmp_path).step == 10
    with new_pusher(tmp_path, parts) as pusher:
        pusher.begin(12)
        wait_for(lambda: waiting(tmp_path) is None)
    assert [summary for _, summary, _ in server.commits] == ["Step 10"]
    later.submit(20, checkpoint(tmp_path, 20, parts[0])[0])
    with new_pusher(tmp_path, parts) as pusher:
        pusher.begin(12)  # the run goes on from a checkpoint before the one that waits
        assert waiting(tmp_path) is None
        pusher.submit(15, checkpoint(tmp_path, 15, parts[0])[0])
        wait_for(lambda: waiting(tmp_path) is None)
    assert [summary for _, summary, _ in server.commits] == ["Step 10", "Step 15"] and snapshots(tmp_path) == []


def test_a_full_disk_costs_a_push_and_not_the_training(server, parts, tmp_path, caplog):
    with new_pusher(tmp_path, parts) as pusher:
        pusher.begin(0)
        pusher.submit(10, tmp_path / "nowhere")
    assert "step 10 is not pushed, it cannot be prepared" in caplog.text and not server.requests


# ---------------------------------------------------------------------------------------------------- faults


EARLY_FAULTS = [
    Fault("preupload", times=1, status=429, headers={"Retry-After": "1"}),
    Fault("objects/batch", times=1, status=503),
    Fault("PUT /objects/.*/2", times=1, hang=600),
    Fault("objects/complete", times=1, status=500),
]
LATE_FAULTS = [
    Fault("PUT /objects/.*/1", times=1, drop_after=20_000),
    Fault("/commit/", times=1, status=500),
    Fault("/commit/", times=1, lose_answer=True),
]


@pytest.mark.parametrize("faults", [LATE_FAULTS, pytest.param(EARLY_FAULTS, marks=pytest.mark.slow)])
def test_one_push_survives_every_fault(server, parts, tmp_path, caplog, faults):
    """Each request goes wrong once, in another way; in the end there is one commit, and every byte is right."""
    server.part_size = 100_000
    server.faults = [replace(fault) for fault in faults]
    final_model(tmp_path, parts)
    with new_pusher(tmp_path, timeout=1.5) as pusher:
        pusher.begin(40)
        assert push_final(pusher, parts[2], wait=120)
    assert all(fault.times == 0 for fault in server.faults)
    assert len(server.commits) == 1, "a commit whose answer is lost is not made twice"
    for name, content in server.repositories[KEY].items():
        kept = (tmp_path / name).read_bytes()
        if name == "training_args.json":  # here with the time, which the same weights have another one of
            kept, content = json.loads(kept), json.loads(content)
            assert kept.pop("made")
        assert content == kept, name
    if faults is EARLY_FAULTS:
        first, second = server.asked("preupload")[:2]
        assert second.time - first.time >= 1
    else:
        assert "HTTP 500 as the test asks" in caplog.text and "tried again in" in caplog.text


@pytest.mark.slow
def test_the_hubs_retry_after_is_kept_whatever_is_submitted(server, parts, tmp_path, caplog):
    server.faults = [Fault("/commit/", times=1, status=500, headers={"Retry-After": "2"})]
    with new_pusher(tmp_path, parts) as pusher:
        pusher.begin(0)
        pusher.submit(1, checkpoint(tmp_path, 1, parts[0])[0])
        wait_for(lambda: "HTTP 500" in caplog.text)
        pusher.submit(2, checkpoint(tmp_path, 2, parts[0])[0])
        wait_for(lambda: waiting(tmp_path) is None)
    first, second = server.asked("/commit/")
    assert second.time - first.time >= 2 and [summary for _, summary, _ in server.commits] == ["Step 2"]


def test_a_long_retry_after_is_not_slept_through_at_the_end(server, parts, tmp_path, caplog):
    server.faults = [Fault("preupload", status=429, headers={"Retry-After": "3600"})]
    final_model(tmp_path, parts)
    with new_pusher(tmp_path) as pusher:
        pusher.begin(40)
        assert not push_final(pusher, parts[2], wait=300)
    assert len(server.asked("preupload")) == 1
    assert "HTTP 429" in caplog.text and waiting(tmp_path).final
    seconds = float(caplog.text.split("tried again in ")[1].split()[0])
    assert 3599 <= seconds <= 3601


def test_a_refusal_is_tried_again_with_the_next_model_only(server, parts, tmp_path, caplog):
    server.faults = [Fault("preupload", status=403)]
    with new_pusher(tmp_path, parts) as pusher:
        pusher.begin(0)
        for step in (1, 2):
            pusher.submit(step, checkpoint(tmp_path, step, parts[0])[0])
            wait_for(lambda step=step: f"step {step} is not pushed" in caplog.text)
            assert len(server.asked("preupload")) == step
        time.sleep(0.5)  # ten times the wait before a second attempt
        assert len(server.asked("preupload")) == 2
        final_model(tmp_path, parts)
        assert not push_final(pusher, parts[2], wait=300)
    assert len(server.asked("preupload")) == 3 and not server.commits
    assert "org/world: step 1 is not pushed (attempt 1): HTTP 403" in caplog.text
    assert waiting(tmp_path).step == 40 and waiting(tmp_path).final
    assert "org/world: step 40 is not pushed (attempt 3): HTTP 403" in caplog.text


def closed_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_hub_that_is_down(server, parts, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HF_ENDPOINT", closed_port())
    final_model(tmp_path, parts)
    for wait in (2, 30):  # a busy machine takes longer to start the process that pushes
        with new_pusher(tmp_path, attempt_limit=max(5, wait)) as pusher:
            pusher.begin(40)
            assert not push_final(pusher, parts[2], wait=wait)
        if "Connection refused" in caplog.text:
            break
    assert waiting(tmp_path).step == 40 and "Connection refused" in caplog.text
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with new_pusher(tmp_path) as pusher:
        pusher.begin()
        assert pusher.wait(60)
    assert on_hub(server, "model.safetensors") == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_an_upload_that_takes_too_long_is_given_up(server, parts, tmp_path, caplog):
    server.faults = [Fault("preupload", times=1, hang=600)]
    final_model(tmp_path, parts)
    with new_pusher(tmp_path, timeout=600, attempt_limit=3) as pusher:
        pusher.begin(40)
        assert push_final(pusher, parts[2], wait=120)
    assert "not done after 3 s" in caplog.text and len(server.commits) == 1


def test_what_is_up_is_not_sent_again(server, parts, tmp_path):
    final_model(tmp_path, parts)
    for _ in range(2):
        with new_pusher(tmp_path) as pusher:
            pusher.begin()
            assert push_final(pusher, parts[2], wait=60)
    assert len(server.commits) == 1 and len(server.asked("PUT /objects")) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "120"}, 120),
        ({"Retry-After": format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)}, 3600),
        ({"Retry-After": format_datetime(datetime.now(UTC) - timedelta(hours=1), usegmt=True)}, 0),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": '"api";r=3;t=55'}, None),
        ({"Retry-After": "soon"}, None),
        ({}, None),
    ],
)
def test_how_long_the_hub_asks_to_wait(headers, seconds):
    assert retry_after(headers) == (None if seconds is None else pytest.approx(seconds, abs=600 if seconds else 0))


# ---------------------------------------------------------------------------------------------------- several programs


def commit_is_of_one_step(summary: str, files: dict[str, bytes]) -> int:
    """Every file of a commit is of the step that its title names; returns it."""
    step, training = int(summary.split()[-1]), json.loads(files["training_args.json"])
    assert training["step"] == step and digest_of(load(files["model.safetensors"])) == training["weights_sha256"]
    rows = [json.loads(line)["step"] for line in files.get("metrics.jsonl", b"").splitlines()]
    assert rows == sorted(set(rows)) and max(rows, default=0) <= step
    card = files["README.md"].decode()
    assert training["weights_sha256"] in card and f"{step} steps of" in card
    if "evaluation/metrics.json" in files:
        assert json.loads(files["evaluation/metrics.json"])["weights_sha256"] == training["weights_sha256"]
    return step


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    """The digest of a model's weights as docs/training.md defines it, by NumPy and hashlib alone."""
    lines = ""
    for name in sorted(tensors):
        array = tensors[name].numpy()
        shape = "(" + ", ".join(map(str, array.shape)) + ("," if array.ndim == 1 else "") + ")"
        lines += f"{name} {hashlib.sha256(f'torch.{array.dtype} {shape} '.encode() + array.tobytes()).hexdigest()}\n"
    return hashlib.sha256(lines.encode()).hexdigest()


def test_a_commit_has_the_files_of_its_step_alone(server, parts, tmp_path, caplog):
    """Files of another model or evaluation go in the same commit; what is no model's file stays."""
    old = ("evaluation/metrics.json", "evaluation/more.json", "model-00001-of-00002.safetensors", "old_vjepa2_ac.py")
    server.repositories[KEY] |= dict.fromkeys((*old, "notes.md", ".gitattributes", "media/config.json"), b"old")
    with new_pusher(tmp_path, parts) as pusher:
        pusher.begin(0)
        pusher.submit(10, checkpoint(tmp_path, 10, parts[0])[0])
        wait_for(lambda: waiting(tmp_path) is None)
    final = final_model(tmp_path / "final", parts)
    model = {p.name for p in final.iterdir() if p.is_file()}
    assert server.repositories[KEY].keys() == model | {"notes.md", ".gitattributes", "media/config.json"}
    assert [commit_is_of_one_step(summary, files) for _, summary, files in server.commits] == [10]
    assert "on top of" not in caplog.text


def test_a_commit_of_others_is_built_upon_and_named(server, parts, tmp_path, caplog):
    """Theirs comes between two pushes, then between this one's reading of the head and its commit (`parent_commit`)."""
    with new_pusher(tmp_path, parts, squash=True) as pusher:
        pusher.begin(0)
        pusher.submit(1, checkpoint(tmp_path, 1, parts[0])[0])
        wait_for(lambda: waiting(tmp_path) is None)
        server.repositories[KEY] |= {"notes.md": b"theirs", "evaluation/metrics.json": b"{}"}
        theirs = server.commit_of(server.repositories[KEY])
        pusher.submit(2, checkpoint(tmp_path, 2, parts[0])[0])
        wait_for(lambda: f"step 2 went on top of commit {theirs}, which was not pushed from" in caplog.text)
        assert server.squashed == [], "the commit of others would be lost"
        server.faults = [Fault("preupload", times=1, hang=600)]
        pusher.submit(3, checkpoint(tmp_path, 3, parts[0])[0])
        wait_for(lambda: server.faults[0].times == 0)
        server.repositories[KEY]["more.md"] = b"theirs too"
        server.closing.set()
        wait_for(lambda: waiting(tmp_path) is None)
    assert "step 3 is not pushed (attempt 1): HTTP 412 A commit has happened since" in caplog.text
    assert [commit_is_of_one_step(summary, files) for _, summary, files in server.commits] == [1, 2, 3]
    assert on_hub(server, "notes.md") == b"theirs" and on_hub(server, "more.md") == b"theirs too"
    assert "evaluation/metrics.json" not in server.repositories[KEY]


def test_a_history_is_squashed_on_request(server, parts, tmp_path, caplog):
    server.repositories[KEY]["notes.md"] = b"theirs, from before"
    for squash in (True, True, True, False):
        with new_pusher(tmp_path, parts, squash=squash) as pusher:
            pusher.begin(10)
            step = len(server.commits) + 1
            pusher.submit(step, checkpoint(tmp_path, step, parts[0])[0])
            wait_for(lambda: waiting(tmp_path) is None)
            pusher.wait(10)
    assert server.squashed == [("org/world", "Step 2"), ("org/world", "Step 3")] and "on top of" not in caplog.text


def test_the_end_waits_for_a_history_that_is_being_squashed(server, parts, tmp_path):
    with new_pusher(tmp_path, parts, squash=True) as pusher:
        pusher.begin(0)
        pusher.submit(1, checkpoint(tmp_path, 1, parts[0])[0])
        wait_for(lambda: waiting(tmp_path) is None)
        server.faults = [Fault("super-squash", times=1, hang=3)]
        pusher.submit(2, checkpoint(tmp_path, 2, parts[0])[0])
        wait_for(lambda: server.asked("super-squash"))
        assert waiting(tmp_path) is None and pusher.wait(60)
    assert server.squashed == [("org/world", "Step 2")]


def test_one_uploader_at_a_time(server, parts, tmp_path):
    """A second one waits for the first, and then finds nothing to do; both are told that all is up."""
    server.faults = [Fault("PUT /objects", times=1, hang=600)]
    with new_pusher(tmp_path, parts, timeout=600) as first, new_pusher(tmp_path, timeout=600) as second:
        first.begin(0)
        first.submit(1, checkpoint(tmp_path, 1, parts[0])[0])
        wait_for(lambda: server.asked("PUT /objects"))
        second.begin()
        log = repository_folder(tmp_path, "org/world") / "upload.log"
        wait_for(lambda: "waiting for another uploader" in log.read_text())
        holder = json.loads(log.read_text().split("waiting for another uploader: ")[1].splitlines()[0])
        assert "hub/upload.py" in " ".join(psutil.Process(holder["pid"]).cmdline())
        server.closing.set()
        assert second.wait(60) and first.wait(60)
    assert [summary for _, summary, _ in server.commits] == ["Step 1"]
    assert len(server.asked("PUT /objects")) == 1 and snapshots(tmp_path) == []


def test_the_lock_of_a_killed_uploader_is_taken_over(server, parts, tmp_path, caplog):
    server.faults = [Fault("PUT /objects", times=1, hang=600)]
    lock = repository_folder(tmp_path, "org/world") / "lock"
    with new_pusher(tmp_path, parts, timeout=600) as pusher:
        pusher.begin(0)
        pusher.submit(1, checkpoint(tmp_path, 1, parts[0])[0])
        wait_for(lambda: server.asked("PUT /objects"))
        killed = json.loads(lock.read_text())["pid"]
        psutil.Process(killed).kill()
        wait_for(lambda: waiting(tmp_path) is None)
    assert json.loads(lock.read_text())["pid"] != killed and "the upload's process ended with status -9" in caplog.text
    assert [commit_is_of_one_step(summary, files) for _, summary, files in server.commits] == [1]


def test_snapshots_are_added_whole_and_only_the_newest_is_kept(parts, tmp_path, monkeypatch):
    """Whatever the clock does: time goes backwards here."""
    pusher = new_pusher(tmp_path, parts, strategy="later")
    pusher.begin(0)
    for step in (1, 2, 3):
        monkeypatch.setattr(time, "time_ns", lambda step=step: 1000 - step)
        pusher.submit(step, checkpoint(tmp_path, step, parts[0])[0])
        assert snapshots(tmp_path) == [step] and waiting(tmp_path).step == step
    monkeypatch.setattr(shutil, "copyfile", None)
    monkeypatch.setattr(os, "link", None)
    with pytest.raises(TypeError):  # it dies between two files
        pusher.submit(4, checkpoint(tmp_path, 4, parts[0])[0])
    assert snapshots(tmp_path) == [3] and waiting(tmp_path).step == 3


def test_a_run_started_anew_does_not_push_the_old_ones_later_steps(server, parts, tmp_path, monkeypatch, capsys):
    """Neither a snapshot that waits nor the final model in the folder, by training or by push.py."""
    old = new_pusher(tmp_path, parts, strategy="later")
    old.begin(0)
    old.submit(30, checkpoint(tmp_path, 30, parts[0])[0])
    final_model(tmp_path, parts)
    old.add_final(parts[2])
    write_status(tmp_path, "running", 0)  # as `--resume never` does
    with new_pusher(tmp_path, parts) as pusher:
        pusher.begin(0)
        assert run_push(monkeypatch, "--output_dir", tmp_path) == 1
        assert "neither a final model nor a checkpoint that waits" in capsys.readouterr().err
        pusher.submit(5, checkpoint(tmp_path, 5, parts[0])[0])
        wait_for(lambda: waiting(tmp_path) is None)
    assert run_push(monkeypatch, "--output_dir", tmp_path) == 0 and "all is up" in capsys.readouterr().out
    assert [summary for _, summary, _ in server.commits] == ["Step 5"] and snapshots(tmp_path) == []


def test_a_final_model_of_which_some_files_are_replaced_is_not_pushed(server, parts, tmp_path, monkeypatch, capsys):
    final_model(tmp_path, parts, step=20)
    move, other = os.replace, (copy.deepcopy(parts[0]), *parts[1:])
    with torch.no_grad():
        next(other[0].parameters()).add_(1)

    def killed_before_the_last_file(source, target):
        if Path(target).name == "training_args.json":
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(os, "replace", killed_before_the_last_file)
    with pytest.raises(KeyboardInterrupt):
        final_model(tmp_path, other, step=40)
    monkeypatch.setattr(os, "replace", move)
    assert run_push(monkeypatch, "--output_dir", tmp_path) == 1 and not server.commits
    said = capsys.readouterr().err
    assert re.search(r"digest \w{64}, training_args.json \(step 20\) says \w{64}: training was killed", said)
    final_model(tmp_path, other, step=40)
    assert run_push(monkeypatch, "--output_dir", tmp_path) == 0
    assert [commit_is_of_one_step(summary, files) for _, summary, files in server.commits] == [40]


def test_saving_for_the_hub_changes_neither_model_nor_processor(parts, tmp_path):
    model, processor, run = parts
    before = model.config.to_dict(), processor.to_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    new_pusher(tmp_path, parts)
    save_final_model(tmp_path, model, processor, run, 1)
    assert (model.config.to_dict(), processor.to_dict()) == before[:2] and model.config.architectures is None
    assert all(tensor.equal(before[2][name]) for name, tensor in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------- before training


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        ("org/theirs", "org/theirs: the Hub refuses it: HTTP 403.*token with write access"),
        ("a/b/c", "a/b/c: the Hub refuses it: .*ORG/NAME"),
    ],
)
def test_what_may_not_be_written_is_named_before_training(server, repo_id, message):
    server.read_only.add("org/theirs")
    server.repositories[("model", "org/theirs")] = {}
    with pytest.raises(ValueError, match=message):
        prepare_repository(repo_id, private=False)


def test_a_hub_that_cannot_be_reached_is_named_before_training(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", closed_port())
    with pytest.raises(ValueError, match="org/world: the Hub does not answer: ConnectError.*--hub_strategy later"):
        prepare_repository("org/world", private=False, timeout=2, tries=1)


# ---------------------------------------------------------------------------------------------------- cards

EVALUATION = {
    "clips": 60,
    "sessions": 12,
    "loss_type": "l1",
    "dataset": "org/clips",
    "split": "validation",
    "clip_set": {"rule": "clips-v1", "clips": 60, "digest": "ab" * 32},
    "retrieval": {"group": 8, "top1": 0.625, "persistence_top1": 0.5, "chance": 0.125, "clips": 60},
    "horizons": [
        {"horizon": 1, "error": 0.2, "error_over_persistence": 0.8, "shuffled_over_error": 1.5, "win_rate": 0.75},
        {"horizon": 2, "error": 0.4, "error_over_persistence": None, "shuffled_over_error": 1.0, "win_rate": 0.5},
    ],
}


def test_figures_of_an_evaluation_are_on_the_card(parts, tmp_path):
    rows = [{"step": 40, "loss": 0.5, "validation_error_h1": 9.0}]
    parts[2].card(40, "d1ge57", rows, EVALUATION).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert figures == {
        "mean absolute difference, horizon 1": 0.2,
        "error over persistence, horizon 1": 0.8,
        "error with shuffled actions over error, horizon 1": 1.5,
        "mean absolute difference, horizon 2": 0.4,
        "error with shuffled actions over error, horizon 2": 1.0,
        "retrieval top-1": 0.625,
    }
    assert all(r.metric_args["clip_rule"] == "clips-v1" for r in card.data.eval_results)
    assert {r.metric_args["clip_digest"] for r in card.data.eval_results} == {"ab" * 32}
    assert {result.dataset_type for result in card.data.eval_results} == {"org/clips"}
    assert card.data.license == "apache-2.0" and card.data.datasets == ["org/clips"]
    assert "| 1 | 0.2000 | 0.8000 | 1.5000 |\n| 2 | 0.4000 | - | 1.0000 |\n" in card.text
    for section in ("Use", "Model", "Training", "Evaluation", "Limits", "Licence and citation"):
        assert f"\n## {section}\n" in card.text
    assert "Training is not finished" not in card.text and "60 clips of 12 sessions" in card.text


def test_without_an_evaluation_the_card_has_trainings_validation(parts):
    metrics = {"loss": 1.0, "validation_clips": 24, "validation_error": 0.125, "validation_null_reason": "because"}
    for name, values in {"error": (0.5, 0.6), "persistence_ratio": (0.75, None), "win_rate": (0.625, 0.5)}.items():
        metrics |= {f"validation_{name}_h{h}": value for h, value in zip((1, 2), values, strict=True)}
    metrics |= {"validation_sensitivity_mouse": 0.25, "validation_sensitivity_mouse_pairs": 9}
    metrics |= {
        "validation_sensitivity_keys": None,
        "validation_retrieval_top1": 0.5,
        "validation_retrieval_chance": 0.1,
    }
    card = parts[2].card(20, "d1ge57", [{"step": 10, "loss": 2.0}, {"step": 20, **metrics}])
    assert "\n- sensitivity to actions, mouse: 0.2500\n- retrieval top-1: 0.5000\n" in card.text
    assert "pairs" not in card.text and "keys" not in card.text.split("## Evaluation")[1] and "chance" not in card.text
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert figures == {
        "mean absolute difference, horizon 1": 0.5,
        "error over persistence, horizon 1": 0.75,
        "mean absolute difference, horizon 2": 0.6,
        "sensitivity to actions, mouse": 0.25,
        "retrieval top-1": 0.5,
    }
    assert "| 1 | 0.5000 | 0.7500 | - |\n| 2 | 0.6000 | - | - |\n" in card.text
    assert "24 clips of `org/clips`" in card.text and "by the validation of training" in card.text
    assert (
        "\n- loss: 1\n" in card.text
        and "validation_error" not in card.text
        and "because" not in card.text.split("##")[0]
    )


def test_a_card_claims_no_figures_where_there_are_none(parts):
    card = parts[2].card(40, "d1ge57", [{"step": 40, "loss": 1.0}])
    assert "Not evaluated yet" in card.text and card.data.eval_results is None
    with pytest.raises(ValueError, match="the evaluation has no horizons"):
        parts[2].card(40, "d1ge57", [], {"clips": 3})


def test_a_card_has_no_figures_of_another_step(parts):
    """A validation before is named; rows of steps after are none of its business; every figure names its weights."""
    before = {"step": 10, "loss": 3.0, "validation_loss": 1.0, "validation_error_h1": 0.5}
    card = parts[2].card(20, "d1ge57", [before, {"step": 15, "loss": 2.0}])
    assert "The last validation of this training was at step 10" in card.text and "not evaluated" in card.text
    assert card.data.eval_results is None and "0.5000" not in card.text
    assert "Figures logged at step 15:" in card.text and "\n- loss: 2\n" in card.text
    card = parts[2].card(10, "d1ge57", [before])
    assert [r.metric_args for r in card.data.eval_results] == [{"horizon": 1, "step": 10, "weights_sha256": "d1ge57"}]
    assert "All are of these weights, step 10." in card.text and "`d1ge57`" in card.text


def test_an_evaluation_of_other_weights_is_refused_and_an_old_one_left_out(
    server, parts, tmp_path, monkeypatch, capsys
):
    out, report = tmp_path / "out", tmp_path / "report"
    (final_model(out, parts) / "evaluation").mkdir()
    report.mkdir()
    old = json.dumps(EVALUATION | {"step": 20, "weights_sha256": "0" * 64})
    for path in (out / "evaluation", report):
        (path / "metrics.json").write_text(old)
    assert run_push(monkeypatch, "--output_dir", out, "--evaluation", report) == 1
    weights = digest_of({k: v.detach() for k, v in parts[0].state_dict().items()})
    said = capsys.readouterr().err
    assert f"is of other weights: step 20, weights_sha256 {'0' * 64}; the model in {out} is of step 40, w" in said
    assert f"weights_sha256 {weights}\n" in said and not server.commits
    assert run_push(monkeypatch, "--output_dir", out) == 0
    assert "evaluation/metrics.json" not in server.repositories[KEY]
    assert "Not evaluated yet" in on_hub(server, "README.md").decode()
    (report / "metrics.json").write_text(json.dumps(EVALUATION | {"step": 40, "weights_sha256": weights}))
    assert run_push(monkeypatch, "--output_dir", out, "--evaluation", report) == 0
    assert on_hub(server, "README.md") == (out / "README.md").read_bytes() and b"0.8000" in on_hub(server, "README.md")
    assert [commit_is_of_one_step(summary, files) for _, summary, files in server.commits] == [40, 40]
    assert json.loads(on_hub(server, "evaluation/metrics.json"))["step"] == 40
    # A picture goes with it where a decoder drew it, and goes where it did not.
    (report / "clip-0.png").write_bytes(b"drawn")
    for figures, shown in (({"frames": {}}, True), ({}, False)):
        (report / "metrics.json").write_text(json.dumps(EVALUATION | figures | {"step": 40, "weights_sha256": weights}))
        assert run_push(monkeypatch, "--output_dir", out, "--evaluation", report) == 0
        assert (b"](evaluation/clip-0.png)" in on_hub(server, "README.md")) == shown
        assert server.repositories[KEY].get("evaluation/clip-0.png") == (b"drawn" if shown else None)


def test_figures_over_runs_are_on_the_card_of_one_of_them(server, parts, tmp_path, monkeypatch, capsys):
    out, report = tmp_path / "out", tmp_path / "report"
    final_model(out, parts)
    report.mkdir()
    weights = digest_of({k: v.detach() for k, v in parts[0].state_dict().items()})
    (report / "metrics.json").write_text(json.dumps(EVALUATION | {"step": 40, "weights_sha256": weights}))
    assert run_push(monkeypatch, "--output_dir", out, "--evaluation", report) == 0
    assert b"These are figures of one run: how much runs differ is not known." in on_hub(server, "README.md")
    of = {"runs": 2, "mean": 0.25, "std": 0.03125, "min": 0.2, "max": 0.3}
    runs = {
        "runs": 2,
        "programs": {"1: train": "--dataset /home/me/clips"},
        "weights_sha256": {"seed-0": {"report": "x"}},
    }
    runs["figures"] = {"report: horizons.horizon 2.error": of, "raw: horizons.horizon 1.error": of | {"mean": 0.5}}
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    flags = ("--output_dir", out, "--evaluation", report, "--runs", tmp_path / "runs.json")
    assert run_push(monkeypatch, *flags) == 1 and f"expected {weights} there" in capsys.readouterr().err
    runs["weights_sha256"]["seed-1"] = {"raw": "y", "report": weights}
    runs["clip_sets"] = {"report": EVALUATION["clip_set"] | {"digest": "cd" * 32}, "raw": EVALUATION["clip_set"]}
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    assert run_push(monkeypatch, *flags) == 1
    said = capsys.readouterr().err
    assert f"runs.json: of the clips {runs['clip_sets']['report']}, but" in said
    assert f"metrics.json of {EVALUATION['clip_set']}" in said
    runs["clip_sets"]["report"] = EVALUATION["clip_set"]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    assert run_push(monkeypatch, *flags) == 0
    card = on_hub(server, "README.md").decode()
    assert "(clips by clips-v1, set abababababababab)" in card and "\n- retrieval top-1: 0.6250\n" in card
    assert "Over 2 runs of this recipe" in card and "\n| 2 | 0.2500 ± 0.0312 (0.2000 to 0.3000) | - | - |\n" in card
    assert "0.5000 ±" not in card and "one run" not in card
    pushed = json.loads(on_hub(server, "evaluation/runs.json"))
    assert pushed["figures"] == runs["figures"] and "programs" not in pushed


# ---------------------------------------------------------------------------------------------------- programs


def run_push(monkeypatch, *flags) -> int:
    monkeypatch.setattr(sys, "argv", ["examples/push.py", *map(str, flags)])
    program = load_program("examples/push.py")
    try:
        return program.main()
    except (OSError, RuntimeError, ValueError) as error:
        return report(error)  # as the interpreter does for an uncaught one


@pytest.fixture
def tiny_run(tmp_path):
    write_workspace(tmp_path, train=4, validation=0)
    return lambda *flags: train_command(str(tmp_path / "clips"), tmp_path / "out", tmp_path / "tiny.json", *flags)


def test_training_goes_on_while_the_hub_hangs_and_the_push_is_made_up_for(
    server, tiny_run, tmp_path, monkeypatch, capsys
):
    """The server answers no upload until it closes: a step that waited for it would never have been done."""
    server.faults = [Fault("preupload", hang=600)]
    submit, out = HubPusher.submit, tmp_path / "out"

    def submit_and_see(self, step, *arguments):
        submit(self, step, *arguments)
        wait_for(lambda: server.asked("preupload"))  # the steps after the first are done with an upload that hangs

    monkeypatch.setattr(HubPusher, "submit", submit_and_see)
    monkeypatch.setattr(sys, "argv", list(map(str, tiny_run("--max_steps=4", "--hub_wait=0.5", "--hub_timeout=600"))))
    assert load_program("examples/train.py").main() == 3
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert all(request.status == 0 for request in server.asked("preupload"))
    assert not server.commits and waiting(out).step == 4 and waiting(out).final
    said = capsys.readouterr().out
    assert "NOT on org/world" in said and f"examples/push.py --output_dir {out}" in said
    server.faults.clear()
    report = tmp_path / "report"
    report.mkdir()
    of = {"step": 4, "weights_sha256": weights_digest(tensor_digests(tensors_of(out / "model.safetensors")))}
    (report / "metrics.json").write_text(json.dumps(EVALUATION | of | {"model": str(out)}))
    assert run_push(monkeypatch, "--output_dir", out, "--evaluation", report) == 0
    assert waiting(out) is None and server.commits[-1][1] == "Trained model, step 4"
    assert {k for k in server.repositories[KEY] if "/" in k} == {"evaluation/metrics.json"}
    assert b"error over persistence, horizon 1" in on_hub(server, "README.md")
    assert load(on_hub(server, "model.safetensors")).keys() == load_file(out / "model.safetensors").keys()


def start(monkeypatch, name: str, *arguments) -> int | None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return load_program(f"examples/{name}.py").main()


def test_nothing_of_the_machine_reaches_the_hub(server, tmp_path, monkeypatch):
    """No byte of any commit names a folder, the user, the host or the token: training, its end, and an evaluation."""
    home = tmp_path / "home" / "jane-doe-4711"
    write_workspace(home, train=4, validation=4)
    monkeypatch.setenv("HF_TOKEN", "hf_aTokenThatNobodyShouldSee")
    monkeypatch.setenv("USER", "jane-doe-4711")
    monkeypatch.chdir(home)
    model = tiny_model()
    VJEPA2Model(model.config.encoder_config).save_pretrained(home / "weights" / "encoder-of-jane")
    flags = ("--eval_every=2", "--max_steps=3", f"--encoder={home}/weights/encoder-of-jane", "--action_stats=compute")
    out, report = home / "runs" / "out", home / "report"
    command = train_command(f"{home}/clips", out, home / "tiny.json", *flags)
    assert start(monkeypatch, "train", *command[1:]) == 0
    start(monkeypatch, "evaluate", "--model", out, "--dataset", "../jane-doe-4711/clips", "--output", report)
    assert start(monkeypatch, "push", "--output_dir", out, "--evaluation", report) == 0
    steps = [commit_is_of_one_step(summary, files) for _, summary, files in server.commits]
    assert steps[-2:] == [3, 3] and steps == sorted(steps) and "evaluation/metrics.json" in server.commits[-1][2]
    hidden = (str(tmp_path), "jane-doe-4711", "hf_aTokenThatNobodyShouldSee", str(ROOT), str(Path.home()))
    hidden = re.compile("|".join(map(re.escape, hidden)).encode())
    short = re.compile(rb"\.\./|\b" + re.escape(socket.gethostname().encode()) + rb"\b")  # or by chance, in weights
    for _, summary, files in server.commits:
        assert not hidden.search(summary.encode())
        for name, content in files.items():
            assert not hidden.search(content), name
            assert not short.search(content) or name.endswith((".py", ".safetensors")), name
    training = json.loads(on_hub(server, "training_args.json"))
    assert training["arguments"]["dataset"] == "clips" and training["encoder"] == "encoder-of-jane"
    assert training["arguments"]["learning_rate"] == 4.25e-4 and "output_dir" not in training["arguments"]
    card = ModelCard(on_hub(server, "README.md").decode())
    assert card.data.datasets is None and card.data.base_model is None and card.data.eval_results
    evaluation = json.loads(on_hub(server, "evaluation/metrics.json"))
    assert (evaluation["model"], evaluation["dataset"], evaluation["step"]) == ("org/world", "clips", 3)


def test_a_run_goes_on_with_pushes_that_it_began_without(server, tiny_run, tmp_path, monkeypatch):
    alone = [flag for flag in tiny_run("--max_steps=2") if flag not in ("--push_to_hub", "--hub_model_id=org/world")]
    assert start(monkeypatch, "train", *alone[1:]) == 0
    assert start(monkeypatch, "train", *tiny_run("--max_steps=4")[1:]) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4] and server.commits[-1][1] == "Trained model, step 4"
    assert [commit_is_of_one_step(summary, files) for _, summary, files in server.commits][-1] == 4


@pytest.mark.parametrize("strategy", ["every_checkpoint", "end"])
def test_killed_around_its_last_push_makes_no_second_commit(server, tiny_run, tmp_path, monkeypatch, strategy):
    """Killed after all was done, or when the Hub had made the commit and nobody here knew yet: it has these bytes."""
    out, unaware, commit = tmp_path / "out", tmp_path / "unaware", server.commit

    def commit_and_keep(*arguments):
        answer = commit(*arguments)
        shutil.rmtree(unaware, ignore_errors=True)
        shutil.copytree(out, unaware)
        return answer

    monkeypatch.setattr(server, "commit", commit_and_keep)
    command = tiny_run(f"--hub_strategy={strategy}")[1:]
    assert start(monkeypatch, "train", *command) == 0
    made = [commit_is_of_one_step(summary, files) for _, summary, files in server.commits]
    assert made[-1] == 2 and (strategy == "every_checkpoint" or made == [2])
    assert waiting(unaware).final and waiting(out) is None
    for killed in ("after all was done", "when the commit was made"):
        if killed == "when the commit was made":
            shutil.rmtree(out)
            unaware.rename(out)
        assert start(monkeypatch, "train", *command) == 0
        assert len(server.commits) == len(made), killed
        assert waiting(out) is None and snapshots(out) == []
        record = read_json(repository_folder(out, "org/world") / "pushed.json")
        assert record["final"] and record["commit"] == server.commit_of(server.repositories[KEY])


def test_a_signal_while_the_final_model_is_saved_waits_for_it(server, tiny_run, tmp_path, monkeypatch):
    """And the Hub is not waited for then: the model is left to push.py."""
    server.faults = [Fault("preupload", hang=600)]
    out, train = tmp_path / "out", load_program("examples/train.py")
    save = train.save_final_model

    def save_with_a_signal(*arguments):
        signal.raise_signal(signal.SIGTERM)
        save(*arguments)

    monkeypatch.setattr(train, "save_final_model", save_with_a_signal)
    monkeypatch.setattr(sys, "argv", list(map(str, tiny_run("--hub_wait=600"))))
    assert train.main() == 3
    assert json.loads((out / "run_status.json").read_text()) == {"status": "finished", "step": 2}
    assert waiting(out).step == 2 and waiting(out).final and VJEPA2ACModel.from_pretrained(out)


def test_without_a_token_it_fails_before_training(server, tiny_run, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(sys, "argv", list(map(str, tiny_run())))
    with pytest.raises(ValueError, match="--push_to_hub org/world: the Hub refuses it: .*no access token"):
        load_program("examples/train.py").main()
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_run_without_network_is_pushed_from_elsewhere(server, tiny_run, tmp_path, monkeypatch, capsys):
    """`--hub_strategy later` asks the Hub nothing; every checkpoint can be pushed meanwhile."""
    out, submit = tmp_path / "out", HubPusher.submit

    def submit_and_push(self, step, *arguments):
        submit(self, step, *arguments)
        if step == 1:
            assert not server.requests
            assert run_push(monkeypatch, "--output_dir", out) == 0

    monkeypatch.setattr(HubPusher, "submit", submit_and_push)
    monkeypatch.setattr(sys, "argv", list(map(str, tiny_run("--max_steps=3", "--hub_strategy=later"))))
    assert load_program("examples/train.py").main() == 0
    assert "nothing was pushed, as --hub_strategy later asks" in capsys.readouterr().out
    assert [summary for _, summary, _ in server.commits] == ["Step 1"]
    assert waiting(out).step == 3 and waiting(out).final
    assert run_push(monkeypatch, "--output_dir", out) == 0
    assert [summary for _, summary, _ in server.commits] == ["Step 1", "Trained model, step 3"]


def test_push_names_what_is_missing(server, parts, tmp_path, monkeypatch, capsys):
    assert run_push(monkeypatch, "--output_dir", tmp_path) == 1
    assert "neither a final model nor a checkpoint" in capsys.readouterr().err
    final_model(tmp_path, parts)
    assert run_push(monkeypatch, "--output_dir", tmp_path, "--evaluation", tmp_path / "report") == 1
    assert "report/metrics.json is missing" in capsys.readouterr().err
    server.read_only.add("org/world")
    assert run_push(monkeypatch, "--output_dir", tmp_path) == 1
    assert "org/world: the Hub refuses it: HTTP 403" in capsys.readouterr().err and not server.commits
    assert run_push(monkeypatch, "--output_dir", tmp_path, "--hub_model_id", "org/other") == 0
    card = server.repositories[("model", "org/other")]["README.md"].decode()
    assert 'from_pretrained("org/other", trust_remote_code=True)' in card


@pytest.mark.slow
def test_killed_while_uploading_is_pushed_later(server, tiny_run, tmp_path, monkeypatch):
    server.faults = [Fault("PUT /objects", times=1, hang=600)]
    command = [sys.executable, *map(str, tiny_run("--max_steps=100000", "--hub_timeout=600"))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: server.asked("PUT /objects") or process.poll() is not None)
        uploads = [c for c in psutil.Process(process.pid).children() if "hub/upload.py" in " ".join(c.cmdline())]
        assert len(uploads) == 1
        process.send_signal(signal.SIGKILL)
    assert psutil.wait_procs(uploads, timeout=10)[1] == [], "an upload must not outlive its run"
    step = waiting(tmp_path / "out").step
    server.faults.clear()
    server.closing.set()
    assert run_push(monkeypatch, "--output_dir", tmp_path / "out") == 0
    assert server.commits[-1][1] == f"Step {step}" and len(server.commits) == 1
    folder = tmp_path / "read"
    folder.mkdir()
    for name, content in server.repositories[KEY].items():
        (folder / name).write_bytes(content)
    model = VJEPA2ACModel.from_pretrained(folder)
    assert model.config.action_dim == 13 and json.loads((folder / "training_args.json").read_text())["step"] == step


@pytest.mark.slow
def test_the_hub_does_not_change_what_is_learnt(server, tiny_run, tmp_path, monkeypatch):
    """Losses and weights are those of a run without the Hub, bit for bit, with pushes that fail and succeed."""
    server.faults = [Fault("/commit/", times=1, status=500)]
    command = list(map(str, tiny_run("--max_steps=4")))
    monkeypatch.setattr(sys, "argv", command)
    train = load_program("examples/train.py")
    assert train.main() == 0
    out, alone = tmp_path / "out", tmp_path / "alone"
    monkeypatch.setattr(
        *(sys, "argv"),
        [a.replace(str(out), str(alone)) for a in command if a not in ("--push_to_hub", "--hub_model_id=org/world")],
    )
    assert train.main() == 0
    assert (out / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    with_hub, without = ([json.loads(r)["loss"] for r in (f / "metrics.jsonl").open()] for f in (out, alone))
    assert with_hub == without and not (alone / ".hub").exists()


TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def in_two_processes(folder, out, *flags):
    flags = ("--max_steps=6", "--checkpoint_every=1", *flags)
    command = train_command(str(folder / "clips"), out, folder / "tiny.json", *flags)
    return [*TWO_PROCESSES, *map(str, command)]


@pytest.fixture(scope="module")
def undisturbed_by_two(tmp_path_factory):
    """The folder of clips, and weights of a run of two processes without the Hub."""
    folder = tmp_path_factory.mktemp("two")
    write_workspace(folder, train=8, validation=0)
    hub = ("--push_to_hub", "--hub_model_id=org/world")
    command = [flag for flag in in_two_processes(folder, folder / "out") if flag not in hub]
    on_the_cpu = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=on_the_cpu)
    return folder, load_file(folder / "out" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("strategy", ["every_checkpoint", "end", "later"])
def test_two_processes_go_on_after_a_kill_with_pushes(
    server, undisturbed_by_two, tmp_path, monkeypatch, strategy, seed
):
    """What rank 0 prepares for the Hub changes nothing that the ranks compare when the run is continued."""
    folder, expected = undisturbed_by_two
    out, draw = tmp_path / "out", random.Random(seed)
    command = in_two_processes(folder, out, f"--hub_strategy={strategy}")
    reached = out / "checkpoints" / f"step-{draw.randint(1, 4):08d}"
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: reached.exists() or process.poll() is not None, 240)
        time.sleep(draw.random())
        family = psutil.Process(process.pid).children(recursive=True)
        for member in (*family, process):
            member.kill()
    psutil.wait_procs(family, timeout=20)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "continuing from" in done.stdout, done.stderr[-3000:]
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()] == [1, 2, 3, 4, 5, 6]
    for name, tensor in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    if strategy == "later":
        assert not server.commits
        assert run_push(monkeypatch, "--output_dir", out) == 0
    steps = [commit_is_of_one_step(summary, files) for _, summary, files in server.commits]
    assert steps == sorted(steps) and steps[-1] == 6 and snapshots(out) == []
    assert strategy == "every_checkpoint" or steps == [6]  # once, also where the kill came after the end
    assert on_hub(server, "model.safetensors") == (out / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_training_and_push_py_killed_at_any_moment_lose_and_mix_nothing(server, tiny_run, tmp_path, seed):
    """push.py in a loop beside a training that pushes; each, or an uploader, is killed at moments of the seed."""
    draw, out = random.Random(seed), tmp_path / "out"
    train = [sys.executable, *map(str, tiny_run("--max_steps=8", "--hub_wait=300", "--keep_checkpoints=1"))]
    push = [sys.executable, "examples/push.py", "--output_dir", str(out), "--hub_model_id", "org/world"]
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    kills = [(draw.choice(("train", "push", "upload")), draw.randint(1, 14)) for _ in range(3)]
    running = {"train": subprocess.Popen(train, **quiet), "push": subprocess.Popen(push, **quiet)}
    deadline, seen = time.monotonic() + 400, 0
    try:
        while running["train"].poll() != 0:
            assert time.monotonic() < deadline, f"not done; kills left: {kills}"
            if kills and len(server.log) - seen >= kills[0][1]:  # so many requests after the one before
                victim, seen = kills.pop(0)[0], len(server.log)
                for process in uploads(running.values()) if victim == "upload" else [running[victim]]:
                    process.kill()
            for name, command in (("train", train), ("push", push)):
                if running[name].poll() is not None and (name == "push" or running[name].returncode != 0):
                    running[name] = subprocess.Popen(command, **quiet)
            time.sleep(0.02)
        running["push"].wait(timeout=120)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    assert subprocess.run(push, **quiet).returncode == 0
    steps = [commit_is_of_one_step(summary, files) for _, summary, files in server.commits]
    assert steps == sorted(steps) and server.commits[-1][1] == "Trained model, step 8"
    assert server.repositories[KEY].keys() == server.commits[-1][2].keys() and snapshots(out) == []
    assert on_hub(server, "model.safetensors") == (out / "model.safetensors").read_bytes()


def uploads(processes) -> list[psutil.Process]:
    """The uploaders that these programs have started; what ends meanwhile is none."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [c for c in psutil.Process(process.pid).children() if "hub/upload.py" in " ".join(c.cmdline())]
    return found
