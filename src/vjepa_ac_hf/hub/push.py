"""Models on the Hub while training goes on: training adds snapshots, processes of their own push the newest.

`OUT/.hub/ORG--NAME/` is a repository's folder: `<made>-<added>-step-<step>/` are snapshots of models that are to be
there, complete from the moment that they have their name, and never changed (large files are hard links);
`pushed.json` is what is up, `begun.json` where the run began last, `upload.log` what uploads said. Any number of
programs may add; only upload.py pushes and removes, one process at a time. `OUT/.hub/base/` is what all steps of a run
share. Nothing here makes a training step wait, or fail: docs/training.md, "On the Hub".
"""

import argparse
import copy
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from ..records import flush, move_files, tensor_digests, tensors_of, weights_digest, write_json
from ..training.checkpoints import AVERAGE
from .cards import RunDescription
from .upload import Snapshot, failed, is_model_file, lock, look, read_json, remove_outdated

logger = logging.getLogger(__name__)

HUB_FOLDER = ".hub"
# One upload, whatever it does: the transfer of large files (hf_xet) has time-outs of its own making.
ATTEMPT_LIMIT = 7200.0
LONGEST_WAIT = 600.0  # between attempts
POLL = 0.5  # seconds between two looks at what waits
_UPLOAD_PROGRAM = Path(__file__).with_name("upload.py")


def repository_folder(output_dir: Path, repo_id: str) -> Path:
    return output_dir / HUB_FOLDER / repo_id.replace("/", "--")


def time_of_now(output_dir: Path) -> int:
    """Nanoseconds, later than all that a run's snapshots and records have, whatever its clocks do."""
    known = [time.time_ns()]
    for path in (output_dir / HUB_FOLDER).glob("*--*/*"):
        if path.name in ("pushed.json", "begun.json"):
            known += [read_json(path)["made"] + 1, read_json(path).get("added", 0) + 1]
        elif "-step-" in path.name and path.name[0].isdigit():
            known.append(int(path.name.split("-")[1]) + 1)
    return max(known)


def save_model(
    folder: Path, model: VJEPA2ACModel, processor: VJEPA2ACProcessor, tensors: dict[str, Tensor] | None = None
) -> None:
    """Write model, code and processor as the Hub has them: without where they are from. Neither is changed."""
    saved = copy.copy(model)  # its tensors, but a configuration of its own: saving adds to it
    saved.config = copy.deepcopy(model.config)
    saved.config._name_or_path = saved.config.encoder_config._name_or_path = ""
    saved.save_pretrained(folder, state_dict=tensors)
    copy.deepcopy(processor).save_pretrained(folder)


def save_final_model(
    folder: Path, model: VJEPA2ACModel, processor: VJEPA2ACProcessor, run: RunDescription, step: int
) -> None:
    """Write model, processor, code, card (README.md) and training_args.json; each file appears whole.

    The last one, training_args.json, has the digest of the weights, by which a folder is known in which a killed
    process has replaced some files only (`RunDescription.of_folder`).
    """
    temporary = folder / ".final.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    save_model(temporary, model, processor)
    weights = weights_digest(tensor_digests(model.state_dict().items()))
    texts = run.texts(folder, step, weights)
    (temporary / "README.md").write_bytes(texts["README.md"])
    training = json.loads(texts["training_args.json"]) | {"made": time_of_now(folder)}
    (temporary / "training_args.json").write_text(json.dumps(training, indent=2) + "\n")
    move_files(temporary, folder, last="training_args.json")


def save_last_weights(folder: Path, model: VJEPA2ACModel | None, processor: VJEPA2ACProcessor) -> None:
    """Write the model with the weights of the last step, `folder/raw`, beside that with their average.

    None: there is no average, and what another run has left there goes, as its model does.
    """
    raw, temporary = folder / "raw", folder / ".raw.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    if model is not None:
        save_model(temporary, model, processor)
    if model is not None or (raw / "model.safetensors").is_file():
        shutil.rmtree(raw, ignore_errors=True)
    if model is not None:
        os.replace(temporary, raw)


def add_snapshot(
    folder: Path, made: int, added: int, step: int, links: Mapping[str, Path], texts: Mapping[str, bytes]
) -> None:
    """Add a snapshot (`upload.Snapshot`) to a repository's folder: complete and on the disk, or not there.

    `links` are files that are never changed in place, by their names in the snapshot (copied where there are no hard
    links), `texts` contents of the others.
    """
    snapshot = f"{made}-{added}-step-{step:08d}"
    temporary = folder / f".{snapshot}.{os.getpid()}.tmp"
    try:
        for name in (*links, *texts):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        for name, source in links.items():
            try:
                os.link(source, temporary / name)  # costs nothing, and outlives the source's removal
            except OSError:
                shutil.copyfile(source, temporary / name)
        for name, content in texts.items():
            (temporary / name).write_bytes(content)
        for path in (*temporary.rglob("*"), temporary):
            flush(path)
        os.replace(temporary, folder / snapshot)
        flush(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def call_upload(
    request: dict[str, Any], log: Path | None, limit: float = ATTEMPT_LIMIT, stop: threading.Event | None = None
) -> dict[str, Any]:
    """Run upload.py once and return its result; a process that dies, or takes longer than `limit`, is a failure."""
    # Nothing of the launcher's settings is for it, and it needs no accelerator.
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command, started, given_up = [sys.executable, "-P", str(_UPLOAD_PROGRAM)], time.monotonic(), None
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    try:
        with log.open("a+") if log else tempfile.TemporaryFile("a+") as errors:
            before = errors.tell()
            # In a session of its own: Ctrl-C is for the training.
            with subprocess.Popen(command, stderr=errors, start_new_session=True, **pipes) as process:
                # Its input stays open: it ends when this process does, however that happens.
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                while process.poll() is None and given_up is None:
                    if stop is not None and stop.is_set():
                        given_up = "given up for a newer model, or at the end"
                    elif time.monotonic() - started > limit:
                        given_up = f"not done after {limit:.0f} s"
                    time.sleep(0.1)
                process.kill()
                lines = process.stdout.read().splitlines()
            errors.seek(before)
            said = errors.read().strip().splitlines()
    except OSError as error:
        return failed(f"the upload's process: {error}")
    if given_up is not None:
        return failed(given_up)
    if lines and lines[-1].startswith("{"):
        return json.loads(lines[-1])
    last_words = said[-1][:300] if said else "no word"
    return failed(f"the upload's process ended with status {process.returncode}: {last_words}")


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

    What fails is tried again after 5 s, 10 s, ... up to 10 minutes (times 0.5 to 1.5, and never before the Hub's
    Retry-After); what the Hub refuses, with the next model and at the end. With the strategy "end" only the final model
    is pushed; with "later" models are prepared, for examples/push.py.
    """

    def __init__(
        self,
        output_dir: Path,
        repo_id: str,
        *,
        strategy: str = "every_checkpoint",
        squash: bool = False,
        timeout: float = 60.0,  # seconds without a byte after which a request fails
        first_wait: float = 5.0,  # seconds between the first attempts
        attempt_limit: float = ATTEMPT_LIMIT,  # seconds after which one upload is given up
    ):
        self.output_dir, self.repo_id, self.strategy = output_dir, repo_id, strategy
        self.first_wait, self.attempt_limit = first_wait, attempt_limit
        self.folder, self.base = repository_folder(output_dir, repo_id), output_dir / HUB_FOLDER / "base"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._request: dict[str, Any] = {"action": "push", "folder": str(self.folder), "repo_id": repo_id}
        self._request |= {"squash": squash, "timeout": timeout}
        self._not_before = 0.0
        self._running = self._asked_to_wait = False  # an upload; the Hub, until `_not_before`
        self._refused: Snapshot | None = None
        self._stop, self._closing = threading.Event(), threading.Event()  # this upload; all
        self._thread: threading.Thread | None = None
        # Python's own generator decides what training does.
        self._random = random.SystemRandom()

    # ------------------------------------------------------------------------------------------------ training

    @classmethod
    def of_run(
        cls, arguments: argparse.Namespace, model: VJEPA2ACModel, processor: VJEPA2ACProcessor, run: RunDescription
    ) -> "HubPusher":
        """As the command line of `examples/train.py` asks for it, prepared."""
        options = {"strategy": arguments.hub_strategy, "squash": arguments.hub_squash}
        pusher = cls(arguments.output_dir, run.repo_id, timeout=arguments.hub_timeout, **options)
        pusher.prepare(model, processor, run)
        return pusher

    def prepare(self, model: VJEPA2ACModel, processor: VJEPA2ACProcessor, run: RunDescription) -> None:
        """Write what the models of all steps share. Called before the predictor is wrapped or moved into shards."""
        self.run = run
        if self.strategy == "end":
            return
        temporary = self.base.with_name(".base.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        # The encoder is frozen: with the checkpoint's predictor it is the model.
        encoder = {k: v for k, v in model.state_dict().items() if not k.startswith("predictor.")}
        self._encoder = tensor_digests(encoder.items())
        save_model(temporary, model, processor, encoder)  # which empties the dictionary
        os.replace(temporary / "model.safetensors", temporary / "encoder.safetensors")
        shutil.rmtree(self.base, ignore_errors=True)
        os.replace(temporary, self.base)

    def begin(self, step: int | None = None) -> None:
        """Start the thread that has what waits pushed, but for steps that a run at `step` has yet to do."""
        if step is not None:
            write_json(self.folder / "begun.json", {"made": time_of_now(self.output_dir), "step": step})
        if self.strategy != "later":
            self._thread = threading.Thread(target=self._work, name="hub", daemon=True)
            self._thread.start()

    def submit(self, step: int, checkpoint: Path) -> None:
        """Have a checkpoint pushed. A disk that fails costs this push, not the training."""
        if self.strategy == "end":
            return
        average, made = checkpoint / AVERAGE, time_of_now(self.output_dir)
        predictor = average if average.exists() else checkpoint / "predictor.safetensors"
        try:
            digests = tensor_digests((f"predictor.{name}", tensor) for name, tensor in tensors_of(predictor))
            texts = self.run.texts(self.output_dir, step, weights_digest(self._encoder | digests))
            links = {path.name: path for path in self.base.iterdir()}
            self._add(made, made, step, {**links, "predictor.safetensors": predictor}, texts)
        except (OSError, SafetensorError) as error:
            logger.warning("%s: step %d is not pushed, it cannot be prepared: %s", self.repo_id, step, error)

    def add_final(self, run: RunDescription) -> bytes:
        """Have the final model in the output folder pushed. Returns its card, as it is due now."""
        training = read_json(self.output_dir / "training_args.json") | run.training
        step, weights, made = (training[name] for name in ("step", "weights_sha256", "made"))
        texts = run.texts(self.output_dir, step, weights)
        files = [path for path in self.output_dir.iterdir() if path.is_file() and is_model_file(path.name)]
        links = {path.name: path for path in files if path.name not in texts}
        self._add(made, time_of_now(self.output_dir), step, links, texts)
        return texts["README.md"]

    def finish(self, wait: float) -> bool:
        """Push the final model, which lies in the output folder by now, and wait so many seconds for it.

        Returns whether all is up; if not, the reason is on the log (the Hub refuses it, or the time is over).
        """
        try:
            self.add_final(self.run)
        except OSError as error:
            logger.warning("%s: the final model is not pushed, it cannot be prepared: %s", self.repo_id, error)
            return False
        if self._running:
            self._stop.set()  # an older model: this one has all of it
        done = self.wait(wait)
        if done:
            shutil.rmtree(self.base, ignore_errors=True)  # a run that goes on writes it anew
        return done

    def wait(self, seconds: float) -> bool:
        """Wait until all is up, as often as that takes, and stop; False as for `finish`."""
        deadline = time.monotonic() + seconds
        if not self._asked_to_wait:
            self._not_before = 0.0  # at the end everything is tried again, unless the Hub has named a time
        while self._thread is not None and time.monotonic() < deadline:
            snapshot = look(self.folder)[0]
            if snapshot is None and not self._running:
                break
            if snapshot is not None and snapshot == self._refused:
                break
            if self._asked_to_wait and self._not_before > deadline:
                break
            time.sleep(POLL)
        self.close()
        return look(self.folder)[0] is None

    def close(self) -> None:
        """Stop pushing; what is not up stays on disk, for the next run or examples/push.py."""
        self._closing.set()
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def __enter__(self) -> "HubPusher":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------ the thread

    def _add(self, *snapshot: Any) -> None:
        add_snapshot(self.folder, *snapshot)
        if self.strategy == "later":  # nobody else removes what it replaces
            with lock(self.folder, wait=False) as alone:
                if alone:
                    remove_outdated(self.folder)

    def _work(self) -> None:
        failures = 0
        while not self._closing.wait(POLL):
            snapshot, started = look(self.folder)[0], time.monotonic()
            if snapshot is None or snapshot == self._refused or started < self._not_before:
                continue
            self._running = True
            result = call_upload(dict(self._request), self.folder / "upload.log", self.attempt_limit, self._stop)
            if result["ok"]:
                failures, self._asked_to_wait = 0, False
                self._report(result, time.monotonic() - started)
            elif not self._stop.is_set():
                failures += 1
                self._refused = snapshot if result["permanent"] else None
                self._put_off(snapshot, result, failures)
            self._running = False
            if not self._closing.is_set():
                self._stop.clear()

    def _report(self, result: dict[str, Any], seconds: float) -> None:
        if result["step"] is None:  # another program was faster
            return
        logger.info("%s: step %d is up after %.1f s: %s", self.repo_id, result["step"], seconds, result["url"])
        if result["on_top_of"] is not None:
            logger.warning(
                "%s: step %d went on top of commit %s, which was not pushed from %s: it stays in the history",
                *(self.repo_id, result["step"], result["on_top_of"], self.output_dir),
            )

    def _put_off(self, snapshot: Snapshot, result: dict[str, Any], failures: int) -> None:
        wait = min(self.first_wait * 2 ** min(failures - 1, 20), LONGEST_WAIT) * self._random.uniform(0.5, 1.5)
        self._asked_to_wait = result["retry_after"] is not None
        wait = max(wait, result["retry_after"] or 0.0)
        self._not_before = time.monotonic() + (0.0 if result["permanent"] else wait)
        again = "with the next model and at the end" if result["permanent"] else f"in {wait:.0f} s"
        logger.warning(
            "%s: step %d is not pushed (attempt %d): %s; tried again %s",
            *(self.repo_id, snapshot.step, failures, result["reason"], again),
        )
