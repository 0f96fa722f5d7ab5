"""Models on the Hub while training goes on: what is to be pushed lies on disk, processes of their own push it.

`OUT/.hub/` holds `pending.json` (the model that is to be on the Hub and is not yet), `pushed.json` (the one that is),
`step-00000100/` (its predictor and card; a hard link to the checkpoint's), `base/` (what all steps share) and
`upload.log`. A final model is pushed from OUT itself. Nothing here makes a training step wait, or fail:
docs/training.md, "On the Hub".
"""

import argparse
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from ..records import write_file, write_json
from .cards import RunDescription

logger = logging.getLogger(__name__)

HUB_FOLDER = ".hub"
STRATEGIES = ("every_checkpoint", "end", "later")
# One upload, whatever it does: the transfer of large files (hf_xet) has time-outs of its own making.
ATTEMPT_LIMIT = 7200.0
_UPLOAD_PROGRAM = Path(__file__).with_name("upload.py")


@dataclass(frozen=True)
class Push:
    """A model that is to be on the Hub.

    Attributes:
        repo_id: ORG/NAME.
        step: optimizer steps it was trained for.
        final: it lies in the output folder; otherwise in `.hub/step-<step>`.
        private: how the repository is made where there is none.
        error: why the last attempt failed.
    """

    repo_id: str
    step: int
    final: bool
    private: bool = False
    error: str | None = None

    def folder(self, output_dir: Path) -> Path:
        return output_dir if self.final else output_dir / HUB_FOLDER / f"step-{self.step:08d}"


def read_pending(output_dir: Path) -> Push | None:
    """What `output_dir` still has to push, None where all is up."""
    path = output_dir / HUB_FOLDER / "pending.json"
    return Push(**json.loads(path.read_text())) if path.is_file() else None


def save_final_model(
    folder: Path, model: VJEPA2ACModel, processor: VJEPA2ACProcessor, run: RunDescription, step: int, metrics: dict
) -> None:
    """Write model, processor, code, card (README.md) and training_args.json; each file appears whole."""
    temporary = folder / ".final.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    write_json(temporary / "training_args.json", run.training_args(step))
    run.card(step, metrics).save(temporary / "README.md")
    for path in sorted(temporary.iterdir()):
        os.replace(path, folder / path.name)
    temporary.rmdir()


def call_upload(
    request: dict[str, Any], log: Path | None, limit: float = ATTEMPT_LIMIT, stop: threading.Event | None = None
) -> dict[str, Any]:
    """Run upload.py once and return its result; a process that dies, or takes longer than `limit`, is a failure."""
    # Nothing of the launcher's settings is for it, and it needs no accelerator.
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    started, aborted = time.monotonic(), None
    try:
        with log.open("w+") if log else tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [sys.executable, "-P", str(_UPLOAD_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
                start_new_session=True,  # Ctrl-C is for the training
            )
            with process:
                # Its input stays open: it ends when this process does, however that happens.
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                while process.poll() is None and aborted is None:
                    if stop is not None and stop.is_set():
                        aborted = "given up for a newer model, or at the end"
                    elif time.monotonic() - started > limit:
                        aborted = f"not done after {limit:.0f} s"
                    time.sleep(0.1)
                process.kill()
                lines = process.stdout.read().splitlines()
            errors.seek(0)
            said = errors.read().strip().splitlines()
    except OSError as error:
        return {"ok": False, "reason": f"the upload's process: {error}", "permanent": False, "retry_after": None}
    if aborted or not lines or not lines[-1].startswith("{"):
        ended = f"the upload's process ended with status {process.returncode}: {said[-1][:300] if said else 'no word'}"
        return {"ok": False, "reason": aborted or ended, "permanent": False, "retry_after": None}
    return json.loads(lines[-1])


def prepare_repository(repo_id: str, private: bool, timeout: float = 60.0, tries: int = 3) -> None:
    """Create the repository if it is not there, and check that it can be written to: to be done before training.

    Raises:
        ValueError: no token, no write access, a name that the Hub refuses, or no Hub to be reached; says which.
    """
    request = {"action": "prepare", "repo_id": repo_id, "private": private, "timeout": timeout}
    for attempt in range(1, tries + 1):
        result = call_upload(request, None, limit=4 * timeout)
        if result["ok"]:
            return
        if result["permanent"]:
            raise ValueError(
                f"--push_to_hub {repo_id}: the Hub refuses it: {result['reason']}. Needed are a token with write "
                "access (HF_TOKEN, or `hf auth login`) and the repository's full name, ORG/NAME"
            )
        if attempt < tries:
            time.sleep(min(result["retry_after"] or attempt, 30.0))
    raise ValueError(
        f"--push_to_hub {repo_id}: the Hub does not answer: {result['reason']}. Where machines have no network, "
        "--hub_strategy later prepares everything for examples/push.py"
    )


class HubPusher:
    """Keeps the newest model of a run on the Hub, from a thread that waits for processes that upload.

    A model that is submitted replaces one that waits. What fails is tried again after 5 s, 10 s, ... up to 10 minutes
    (times 0.5 to 1.5, and never before the Hub's Retry-After); what the Hub refuses, with the next model and at the
    end. With the strategy "end" only the final model is pushed; with "later" models are prepared, for examples/push.py.

    Args:
        output_dir: of the run.
        repo_id: ORG/NAME.
        private: how the repository is made where there is none.
        strategy: "every_checkpoint", "end" or "later".
        timeout: seconds without a byte after which a request fails.
        first_wait, longest_wait: of the waits between attempts, seconds.
        attempt_limit: seconds after which one upload is given up.
    """

    def __init__(
        self,
        output_dir: Path,
        repo_id: str,
        *,
        private: bool = False,
        strategy: str = "every_checkpoint",
        timeout: float = 60.0,
        first_wait: float = 5.0,
        longest_wait: float = 600.0,
        attempt_limit: float = ATTEMPT_LIMIT,
    ):
        self.output_dir, self.repo_id, self.private, self.strategy = output_dir, repo_id, private, strategy
        self.timeout, self.first_wait, self.longest_wait = timeout, first_wait, longest_wait
        self.attempt_limit = attempt_limit
        self.folder = output_dir / HUB_FOLDER
        self._changed = threading.Condition()
        self._pending: Push | None = None
        self._running: Push | None = None
        self._not_before = 0.0
        self._asked_to_wait = False
        self._refused = False
        self._closing = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        # Python's own generator decides what training does.
        self._random = random.SystemRandom()

    # ------------------------------------------------------------------------------------------------ training

    @classmethod
    def of_run(
        cls, arguments: argparse.Namespace, model: VJEPA2ACModel, processor: VJEPA2ACProcessor, run: RunDescription
    ) -> "HubPusher":
        """As the command line of `examples/train.py` asks for it, prepared."""
        pusher = cls(
            *(arguments.output_dir, arguments.hub_model_id),
            private=arguments.hub_private,
            strategy=arguments.hub_strategy,
            timeout=arguments.hub_timeout,
        )
        pusher.prepare(model, processor, run)
        return pusher

    def prepare(self, model: VJEPA2ACModel, processor: VJEPA2ACProcessor, run: RunDescription) -> None:
        """Write what the models of all steps share. Called before the predictor is wrapped or moved into shards."""
        self.run = run
        if self.strategy == "end":
            return
        base, temporary = self.folder / "base", self.folder / ".base.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        # The encoder is frozen: with the checkpoint's predictor it is the model.
        encoder = {k: v for k, v in model.state_dict().items() if not k.startswith("predictor.")}
        model.save_pretrained(temporary, state_dict=encoder)
        processor.save_pretrained(temporary)
        shutil.rmtree(base, ignore_errors=True)
        os.replace(temporary, base)

    def begin(self, step: int) -> None:
        """Start pushing; a model that an earlier run left is pushed first, unless it is of a step that is to come."""
        pending = read_pending(self.output_dir)
        if pending is not None and pending.step > step:
            logger.warning("%s: step %d of an earlier run is not pushed any more", pending.repo_id, pending.step)
            (self.folder / "pending.json").unlink()
            pending = None
        self._remove_snapshots({pending} if pending else set())
        self.start()
        if pending is not None:
            self._enqueue(Push(self.repo_id, pending.step, pending.final, self.private))

    def start(self) -> None:
        """Start the thread, without what an earlier run left (`begin`)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.strategy != "later":
            self._thread = threading.Thread(target=self._work, name="hub", daemon=True)
            self._thread.start()

    def submit(self, step: int, checkpoint: Path, metrics: dict[str, Any]) -> None:
        """Have a checkpoint pushed; returns at once. A disk that fails costs this push, not the training."""
        if self.strategy == "end":
            return
        push = Push(self.repo_id, step, False, self.private)
        folder = push.folder(self.output_dir)
        temporary = folder.with_name(f".{folder.name}.tmp")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            link_or_copy(checkpoint / "predictor.safetensors", temporary / "predictor.safetensors")
            write_json(temporary / "training_args.json", self.run.training_args(step))
            write_file(temporary / "README.md", str(self.run.card(step, metrics)).encode())
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
            self._enqueue(push)
        except OSError as error:
            logger.warning("%s: step %d is not pushed, it cannot be prepared: %s", self.repo_id, step, error)

    def finish(self, step: int, wait: float) -> bool:
        """Push the final model, which lies in the output folder by now, and wait for it.

        Args:
            step: of the model.
            wait: seconds after which it is left to examples/push.py.

        Returns:
            True if all is up. False, with the reason on the log, if not: the Hub refuses, or `wait` is over.
        """
        done = self.push(Push(self.repo_id, step, True, self.private), wait)
        if done:
            shutil.rmtree(self.folder / "base", ignore_errors=True)  # a run that goes on writes it anew
        return done

    def push(self, push: Push, wait: float) -> bool:
        """Push this model, as often as it takes, and wait for it; False as for `finish`."""
        if self.strategy == "later":
            self._enqueue(push)
            return False
        deadline = time.monotonic() + wait
        with self._changed:
            if self._running is not None:
                self._stop.set()  # an older model: this one has all of it
            # At the end everything is tried again, unless the Hub has named a time.
            self._not_before = self._not_before if self._asked_to_wait else 0.0
        self._enqueue(push)
        with self._changed:
            while self._pending is not None and not self._refused:
                left = deadline - time.monotonic()
                if left <= 0 or (self._asked_to_wait and self._not_before > deadline):
                    break
                self._changed.wait(min(left, 1.0))
            done = self._pending is None
        self.close()
        return done

    def close(self) -> None:
        """Stop pushing; what is not up stays on disk, for the next run or examples/push.py."""
        with self._changed:
            self._closing = True
            self._stop.set()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def __enter__(self) -> "HubPusher":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------ the queue

    def _enqueue(self, push: Push) -> None:
        with self._changed:
            write_json(self.folder / "pending.json", asdict(push))
            self._pending, self._refused = push, False
            self._remove_snapshots({push} | ({self._running} if self._running else set()))
            self._changed.notify_all()

    def _remove_snapshots(self, keep: set[Push]) -> None:
        kept = {push.folder(self.output_dir) for push in keep}
        for folder in (*self.folder.glob("step-*"), *self.folder.glob(".step-*.tmp")):
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _work(self) -> None:
        failures = 0
        while (push := self._next()) is not None:
            started = time.monotonic()
            result = call_upload(self._request(push), self.folder / "upload.log", self.attempt_limit, self._stop)
            with self._changed:
                self._running = None
                self._asked_to_wait = False
                if result["ok"]:
                    failures = 0
                    self._record_pushed(push, result, time.monotonic() - started)
                elif not self._stop.is_set():
                    failures += 1
                    self._record_failure(push, result, failures)
                if not self._closing:
                    self._stop.clear()
                self._changed.notify_all()

    def _next(self) -> Push | None:
        """Wait for something to push, and for the time to do so; None at the end."""
        with self._changed:
            while not self._closing:
                left = self._not_before - time.monotonic()
                if self._pending is not None and not self._refused:
                    if left <= 0:
                        self._running = self._pending
                        return self._pending
                    self._changed.wait(left)
                else:
                    self._changed.wait()
            return None

    def _request(self, push: Push) -> dict[str, Any]:
        snapshot = None
        if not push.final:
            metrics = str(self.output_dir / "metrics.jsonl")
            snapshot = {"base": str(self.folder / "base"), "metrics": metrics, "step": push.step}
        message = f"Trained model, step {push.step}" if push.final else f"Step {push.step}"
        folder = str(push.folder(self.output_dir))
        request = {"action": "push", "repo_id": push.repo_id, "folder": folder, "message": message}
        return {**request, "snapshot": snapshot, "timeout": self.timeout}

    def _record_pushed(self, push: Push, result: dict[str, Any], seconds: float) -> None:
        pushed = {"repo_id": push.repo_id, "step": push.step, "final": push.final, "commit": result["commit"]}
        try:
            write_json(
                self.folder / "pushed.json", {**pushed, "url": result["url"], "time": datetime.now(UTC).isoformat()}
            )
            if self._pending == push:
                (self.folder / "pending.json").unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s: step %d is pushed, which cannot be recorded: %s", push.repo_id, push.step, error)
        if self._pending == push:
            self._pending = None
        self._remove_snapshots({self._pending} if self._pending else set())
        logger.info("%s: step %d is up after %.1f s: %s", push.repo_id, push.step, seconds, result["url"])

    def _record_failure(self, push: Push, result: dict[str, Any], failures: int) -> None:
        self._refused = result["permanent"] and self._pending == push
        wait = min(self.first_wait * 2 ** min(failures - 1, 20), self.longest_wait) * self._random.uniform(0.5, 1.5)
        self._asked_to_wait = result["retry_after"] is not None
        wait = max(wait, result["retry_after"] or 0.0)
        self._not_before = time.monotonic() + (0.0 if result["permanent"] else wait)
        again = "with the next model and at the end" if result["permanent"] else f"in {wait:.0f} s"
        logger.warning(
            "%s: step %d is not pushed (attempt %d): %s; tried again %s",
            *(push.repo_id, push.step, failures, result["reason"], again),
        )
        if self._pending == push:
            try:
                write_json(self.folder / "pending.json", {**asdict(push), "error": result["reason"]})
            except OSError as error:
                logger.warning("%s: %s", self.folder / "pending.json", error)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, which costs nothing and outlives the source's removal; a copy where there are none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
