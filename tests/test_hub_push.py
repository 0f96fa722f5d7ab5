"""Keeping a model on the Hub while training goes on: what fails, what waits, what is on disk, what is pushed later.

The server is a local one, the client the unmodified `huggingface_hub` in the processes that push.py starts. The
server's record says what happened, in which order and when.
"""

import json
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

from vjepa_ac_hf import ACTION_COLUMNS, ActionStatistics, VJEPA2ACModel, VJEPA2ACProcessor
from vjepa_ac_hf.hub.cards import RunDescription
from vjepa_ac_hf.hub.push import HubPusher, Push, prepare_repository, read_pending, save_final_model
from vjepa_ac_hf.hub.upload import retry_after

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
    save_final_model(folder, model, processor, run, step, {"step": step, "loss": 0.5})
    return folder


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
    rows = [{"step": step, "loss": 1.0 / step} for step in (5, 10, 15)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 20, "lo')
    saved, tensors = checkpoint(tmp_path, 10, parts[0])
    with new_pusher(tmp_path, parts) as pusher:
        pusher.begin(0)
        pusher.submit(10, saved, {"step": 10, "loss": 0.1, "validation_error": 0.25, "clips_per_second": 77.0})
        (saved / "predictor.safetensors").unlink()  # as old checkpoints are
        wait_for(lambda: read_pending(tmp_path) is None)
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
    assert not list((tmp_path / ".hub").glob("step-*")) and not list((tmp_path / ".hub").glob("*.tmp"))
    pushed = json.loads((tmp_path / ".hub" / "pushed.json").read_text())
    assert (pushed["repo_id"], pushed["step"], pushed["final"]) == ("org/world", 10, False)


def test_a_newer_checkpoint_replaces_one_that_waits(server, parts, tmp_path):
    server.faults = [Fault("PUT /objects", times=1, hang=600)]
    with new_pusher(tmp_path, parts, timeout=600) as pusher:
        pusher.begin(0)
        pusher.submit(1, checkpoint(tmp_path, 1, parts[0])[0], {})
        wait_for(lambda: server.asked("PUT /objects"))
        for step in (2, 3):
            pusher.submit(step, checkpoint(tmp_path, step, parts[0])[0], {})
        waiting = {p.name for p in (tmp_path / ".hub").glob("step-*")}
        assert waiting == {"step-00000001", "step-00000003"}
        assert read_pending(tmp_path) == Push("org/world", 3, False)
        server.closing.set()  # what hangs goes on
        wait_for(lambda: read_pending(tmp_path) is None)
    assert [summary for _, summary, _ in server.commits] == ["Step 1", "Step 3"]
    assert json.loads((tmp_path / ".hub" / "pushed.json").read_text())["step"] == 3


def test_the_final_model_replaces_an_upload_that_hangs(server, parts, tmp_path):
    server.faults = [Fault("PUT /objects", times=1, hang=600)]
    final_model(tmp_path, parts)
    with new_pusher(tmp_path, parts, timeout=600) as pusher:
        pusher.begin(0)
        pusher.submit(1, checkpoint(tmp_path, 1, parts[0])[0], {})
        wait_for(lambda: server.asked("PUT /objects"))
        assert pusher.finish(40, wait=60)
    assert [summary for _, summary, _ in server.commits] == ["Trained model, step 40"]
    assert on_hub(server, "model.safetensors") == (tmp_path / "model.safetensors").read_bytes()
    assert {p.name for p in (tmp_path / ".hub").iterdir()} == {"pushed.json", "upload.log"}


@pytest.mark.slow
def test_what_an_earlier_run_left_is_pushed_unless_it_is_undone(server, parts, tmp_path, caplog):
    later = new_pusher(tmp_path, parts, strategy="later")
    later.begin(0)
    later.submit(10, checkpoint(tmp_path, 10, parts[0])[0], {})
    assert not server.requests and read_pending(tmp_path).step == 10
    with new_pusher(tmp_path, parts) as pusher:
        pusher.begin(12)
        wait_for(lambda: read_pending(tmp_path) is None)
    assert [summary for _, summary, _ in server.commits] == ["Step 10"]
    later.submit(20, checkpoint(tmp_path, 20, parts[0])[0], {})
    with new_pusher(tmp_path, parts) as pusher:
        pusher.begin(12)  # the run goes on from a checkpoint before the one that waits
    assert read_pending(tmp_path) is None and not list((tmp_path / ".hub").glob("step-*"))
    assert "step 20 of an earlier run is not pushed" in caplog.text and len(server.commits) == 1


def test_a_full_disk_costs_a_push_and_not_the_training(server, parts, tmp_path, caplog):
    with new_pusher(tmp_path, parts) as pusher:
        pusher.begin(0)
        pusher.submit(10, tmp_path / "nowhere", {})
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
        assert pusher.finish(40, wait=120)
    assert all(fault.times == 0 for fault in server.faults)
    assert len(server.commits) == 1, "a commit whose answer is lost is not made twice"
    for name, content in server.repositories[KEY].items():
        assert content == (tmp_path / name).read_bytes(), name
    if faults is EARLY_FAULTS:
        first, second = server.asked("preupload")[:2]
        assert second.time - first.time >= 1
    else:
        assert "HTTP 500 as the test asks" in caplog.text and "tried again in" in caplog.text


@pytest.mark.slow
def test_the_hubs_retry_after_is_kept_whatever_is_submitted(server, parts, tmp_path):
    server.faults = [Fault("/commit/", times=1, status=500, headers={"Retry-After": "2"})]
    with new_pusher(tmp_path, parts) as pusher:
        pusher.begin(0)
        pusher.submit(1, checkpoint(tmp_path, 1, parts[0])[0], {})
        wait_for(lambda: "error" in (tmp_path / ".hub" / "pending.json").read_text() and read_pending(tmp_path).error)
        assert "HTTP 500" in read_pending(tmp_path).error
        pusher.submit(2, checkpoint(tmp_path, 2, parts[0])[0], {})
        wait_for(lambda: read_pending(tmp_path) is None)
    first, second = server.asked("/commit/")
    assert second.time - first.time >= 2 and [summary for _, summary, _ in server.commits] == ["Step 2"]


def test_a_long_retry_after_is_not_slept_through_at_the_end(server, parts, tmp_path, caplog):
    server.faults = [Fault("preupload", status=429, headers={"Retry-After": "3600"})]
    final_model(tmp_path, parts)
    with new_pusher(tmp_path) as pusher:
        pusher.begin(40)
        assert not pusher.finish(40, wait=300)
    assert len(server.asked("preupload")) == 1
    assert "HTTP 429" in read_pending(tmp_path).error
    seconds = float(caplog.text.split("tried again in ")[1].split()[0])
    assert 3599 <= seconds <= 3601


def test_a_refusal_is_tried_again_with_the_next_model_only(server, parts, tmp_path, caplog):
    server.faults = [Fault("preupload", status=403)]
    with new_pusher(tmp_path, parts) as pusher:
        pusher.begin(0)
        for step in (1, 2):
            pusher.submit(step, checkpoint(tmp_path, step, parts[0])[0], {})
            wait_for(lambda step=step: len(server.asked("preupload")) == step and read_pending(tmp_path).error)
        time.sleep(0.5)  # ten times the wait before a second attempt
        assert len(server.asked("preupload")) == 2
        final_model(tmp_path, parts)
        assert not pusher.finish(40, wait=300)
    assert len(server.asked("preupload")) == 3 and not server.commits
    assert "org/world: step 1 is not pushed (attempt 1): HTTP 403" in caplog.text
    pending = read_pending(tmp_path)
    assert (pending.step, pending.final) == (40, True) and "HTTP 403" in pending.error


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
            assert not pusher.finish(40, wait=wait)
        pending = read_pending(tmp_path)
        if pending.error is not None:
            break
    assert (pending.step, pending.final) == (40, True) and "Connection refused" in pending.error
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with new_pusher(tmp_path) as pusher:
        pusher.start()
        assert pusher.push(pending, wait=60)
    assert on_hub(server, "model.safetensors") == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_an_upload_that_takes_too_long_is_given_up(server, parts, tmp_path, caplog):
    server.faults = [Fault("preupload", times=1, hang=600)]
    final_model(tmp_path, parts)
    with new_pusher(tmp_path, timeout=600, attempt_limit=3) as pusher:
        pusher.begin(40)
        assert pusher.finish(40, wait=120)
    assert "not done after 3 s" in caplog.text and len(server.commits) == 1


def test_what_is_up_is_not_sent_again(server, parts, tmp_path):
    final_model(tmp_path, parts)
    for _ in range(2):
        with new_pusher(tmp_path) as pusher:
            pusher.start()
            assert pusher.push(Push("org/world", 40, True), wait=60)
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
    "horizons": [
        {"horizon": 1, "error": 0.2, "persistence": 0.25, "shuffled_actions": 0.3, "win_rate": 0.75},
        {"horizon": 2, "error": 0.4, "persistence": 0.0, "shuffled_actions": 0.4, "win_rate_large_turns": None},
    ],
}


def test_figures_of_an_evaluation_are_on_the_card(parts, tmp_path):
    parts[2].card(40, {"loss": 0.5, "validation_error": 9.0}, EVALUATION).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert figures == {
        "mean absolute difference, horizon 1": 0.2,
        "error over persistence, horizon 1": 0.8,
        "error with shuffled actions over error, horizon 1": 1.5,
        "mean absolute difference, horizon 2": 0.4,
        "error with shuffled actions over error, horizon 2": 1.0,
    }
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
    card = parts[2].card(20, metrics)
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
    card = parts[2].card(40, {"loss": 1.0})
    assert "Not evaluated yet" in card.text and card.data.eval_results is None
    with pytest.raises(ValueError, match="the evaluation has no horizons"):
        parts[2].card(40, {}, {"clips": 3})


# ---------------------------------------------------------------------------------------------------- programs


def run_push(monkeypatch, *flags) -> int:
    monkeypatch.setattr(sys, "argv", ["examples/push.py", *map(str, flags)])
    return load_program("examples/push.py").main()


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
    assert not server.commits and read_pending(out) == Push("org/world", 4, True)
    said = capsys.readouterr().out
    assert "NOT on org/world" in said and f"examples/push.py --output_dir {out}" in said
    server.faults.clear()
    report = tmp_path / "report"
    report.mkdir()
    (report / "metrics.json").write_text(json.dumps(EVALUATION | {"model": str(out)}))
    assert run_push(monkeypatch, "--output_dir", out, "--evaluation", report) == 0
    assert read_pending(out) is None and server.commits[-1][1] == "Trained model, step 4"
    assert {k for k in server.repositories[KEY] if "/" in k} == {"evaluation/metrics.json"}
    assert b"error over persistence, horizon 1" in on_hub(server, "README.md")
    assert load(on_hub(server, "model.safetensors")).keys() == load_file(out / "model.safetensors").keys()


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
    assert read_pending(out) == Push("org/world", 3, True)
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
    step = read_pending(tmp_path / "out").step
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
