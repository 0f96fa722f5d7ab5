"""Program: one attempt to create, check or fill a model repository of the Hub, in a process of its own (push.py).

The Hub's client waits without limit, inside native code too, and works in the interpreter that calls it; a process can
be given up. It is run by path, imports nothing of this package (which would take seconds), takes a request as one line
of JSON on its standard input, and ends when that is closed, so that it never outlives its caller. The last line of
its standard output is the result as JSON: `{"ok": true, ...}` or `{"ok": false, "reason", "permanent", "retry_after"}`.

It is the only uploader of a repository's folder (push.py says what is in it): whoever holds the lock there pushes the
newest snapshot, and removes what is pushed or older than the newest. The kernel frees the lock of a killed process.
"""

import fcntl
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import hf_raise_for_status, parse_ratelimit_headers

# Only what a model's repository is meant to have: whatever else a run leaves stays at home, and whatever else a
# repository has stays there.
MODEL_FILES = (
    "README.md",
    "config.json",
    "evaluation/*.json",
    "evaluation/*.png",
    "metrics.jsonl",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "*processor_config.json",
    "training_args.json",
    "*_vjepa2_ac.py",
)
# Refusals that pass: time-out, conflict with another commit, too early, too many requests.
_PASSING_STATUS = {408, 409, 412, 425, 429}
# The client obeys Retry-After by sleeping; longer waits are handed to the caller, who may have a newer model by then.
_LONGEST_RETRY_AFTER = 30.0
# An unfinished snapshot (`.*.tmp`) of a program that was killed: making one takes seconds.
_ABANDONED_AFTER = 3600.0


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a response asks to wait: `Retry-After` (a number or a date), or the rate limit's window."""
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    if value:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return None
        # A date without a zone ("-0000") is in UTC.
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        return max((date - datetime.now(UTC)).total_seconds(), 0.0)
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None


def use_time_outs(timeout: float) -> None:
    """Requests of the Hub's client fail after so many seconds without a byte; long waits fail at once."""

    def fail_on_long_waits(response: httpx2.Response) -> None:
        if response.status_code in (429, 503) and (retry_after(response.headers) or 0) > _LONGEST_RETRY_AFTER:
            response.read()
            hf_raise_for_status(response)

    hooks = {**get_session().event_hooks, "response": [fail_on_long_waits]}
    limits = httpx2.Timeout(timeout, connect=min(timeout, 10.0))
    set_client_factory(lambda: httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=limits))


def prepare(repo_id: str, private: bool) -> dict[str, Any]:
    """Create the repository where there is none, and check that the token may write to it."""
    api = HfApi()
    # Without --hub_private the organisation's default decides.
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    api.auth_check(repo_id, write=True)
    return {}


@dataclass(frozen=True, order=True)
class Snapshot:
    """A folder `<made>-<added>-step-<step>` with everything that a model's commit is made of; nothing in it changes."""

    made: int  # when the weights were, in nanoseconds: what is made later is newer, whatever its step
    added: int  # when the snapshot was: a model gets another one with a new card
    step: int  # optimizer steps done
    path: Path  # of the folder

    @property
    def final(self) -> bool:
        """Whether it is a run's last model; of a checkpoint, encoder and predictor lie apart."""
        return not (self.path / "predictor.safetensors").exists()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def look(folder: Path) -> tuple[Snapshot | None, list[Snapshot]]:
    """The snapshot in a repository's folder that is to be on the Hub and is not yet: the newest, if it is newer than
    what is up. And all others: older ones, and those of steps that the run which began last (`begun.json`) has yet to
    do."""
    begun, pushed = read_json(folder / "begun.json"), read_json(folder / "pushed.json")
    matches = ((re.fullmatch(r"(\d+)-(\d+)-step-(\d+)", path.name), path) for path in folder.glob("*-step-*"))
    found = sorted(Snapshot(int(match[1]), int(match[2]), int(match[3]), path) for match, path in matches if match)
    for snapshot in reversed(found):
        undone = bool(begun) and snapshot.made < begun["made"] and snapshot.step > begun["step"]
        if not undone and (snapshot.made, snapshot.added) > (pushed.get("made", 0), pushed.get("added", 0)):
            return snapshot, [other for other in found if other != snapshot]
    return None, found


@contextmanager
def lock(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Only one uploader at a time: whether this one is, which it is if it waits. `lock` names the one for people."""
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                yield False
                return
            file.seek(0)
            sys.stderr.write(f"waiting for another uploader: {file.read()}\n")
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            file.truncate(0)
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat()}
            file.write(json.dumps(holder) + "\n")
            file.flush()
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # in forked processes that have the file too


def remove_outdated(folder: Path) -> Snapshot | None:
    """Under the lock: remove all but the snapshot that waits, and what killed programs left. Returns that one."""
    snapshot, outdated = look(folder)
    kept = snapshot.path.name if snapshot else None
    abandoned = [p for p in folder.glob(".*.tmp") if time.time() - p.stat().st_mtime > _ABANDONED_AFTER]
    assembled = [path for path in (folder / "work").glob("*") if path.name != kept]
    for path in (*(other.path for other in outdated), *abandoned, *assembled):
        shutil.rmtree(path, ignore_errors=True)
    return snapshot


def push(folder: str, repo_id: str, squash: bool) -> dict[str, Any]:
    """Bring the snapshot that waits in a repository's folder to the Hub; `step` is None where none waits.

    One commit replaces what the repository has of a model, so that `main` never holds parts of two. It goes on top of
    what is there (`parent_commit`), whoever pushed that.
    """
    path = Path(folder)
    with lock(path):
        snapshot = remove_outdated(path)
        if snapshot is None:
            return {"step": None}
        files, known = model_files(snapshot, path / "work" / snapshot.path.name), read_json(path / "pushed.json")
        api = HfApi()
        head = api.model_info(repo_id)
        stale = [file.rfilename for file in head.siblings or () if is_model_file(file.rfilename)]
        operations: list[Any] = [CommitOperationAdd(name, file) for name, file in files.items()]
        operations += [CommitOperationDelete(name) for name in stale if name not in files]
        message = f"{'Trained model, step' if snapshot.final else 'Step'} {snapshot.step}"
        commit = api.create_commit(repo_id, operations, commit_message=message, parent_commit=head.sha)
        record = {"repo_id": repo_id, "step": snapshot.step, "made": snapshot.made, "added": snapshot.added}
        record |= {"final": snapshot.final, "commit": commit.oid, "url": commit.commit_url}
        write_record(path, record)
        foreign = known.get("commit") not in (None, head.sha) and commit.oid != head.sha
        if squash and known and not foreign:
            api.super_squash_history(repo_id, commit_message=message)
            record["commit"] = api.model_info(repo_id).sha
            write_record(path, record)
        remove_outdated(path)
        return {**record, "on_top_of": head.sha if foreign else None}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    temporary = folder / ".pushed.json.tmp"
    temporary.write_text(json.dumps({**record, "time": datetime.now(UTC).isoformat()}, indent=2) + "\n")
    os.replace(temporary, folder / "pushed.json")


def is_model_file(name: str) -> bool:
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in MODEL_FILES)


def model_files(snapshot: Snapshot, work: Path) -> dict[str, Path]:
    """The files of a model by their names in the repository; encoder and predictor are joined in the folder `work`."""
    found = {file.relative_to(snapshot.path).as_posix(): file for file in sorted(snapshot.path.rglob("*"))}
    files = {name: file for name, file in found.items() if is_model_file(name) and file.is_file()}
    if not snapshot.final:
        files["model.safetensors"] = work / "model.safetensors"
        if not files["model.safetensors"].exists():
            from safetensors.torch import load_file, save_file  # here: PyTorch takes seconds, and is not always needed

            tensors = load_file(snapshot.path / "encoder.safetensors")
            predictor = load_file(snapshot.path / "predictor.safetensors")
            tensors |= {f"predictor.{name}": tensor for name, tensor in predictor.items()}
            work.mkdir(parents=True, exist_ok=True)
            save_file(tensors, work / "unfinished", metadata={"format": "pt"})
            os.replace(work / "unfinished", files["model.safetensors"])
    return files


def failed(reason: str, permanent: bool = False, retry_after: float | None = None) -> dict[str, Any]:
    """The result of an attempt that failed: why, whether it is in vain to try again, seconds that the Hub asks for."""
    return {"ok": False, "reason": reason, "permanent": permanent, "retry_after": retry_after}


def failure(error: Exception) -> dict[str, Any]:
    """`failed`, of what an attempt raised."""
    is_permanent = isinstance(error, (LocalTokenNotFoundError, HFValidationError, OfflineModeIsEnabled))
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(cause, HfHubHTTPError) and response is not None:
            status = response.status_code
            text = response.headers.get("X-Error-Message") or response.reason_phrase
            reason = f"HTTP {status} {text} for {response.request.method} {response.request.url}"
            is_permanent = 400 <= status < 500 and status not in _PASSING_STATUS
            return failed(reason, is_permanent, retry_after(response.headers))
        if isinstance(cause, httpx2.RequestError):
            target = f" for {cause.request.method} {cause.request.url}" if getattr(cause, "_request", None) else ""
            return failed(f"{type(cause).__name__} {cause}{target}".replace("  ", " "), is_permanent)
        cause = cause.__cause__
    return failed(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}", is_permanent)


def main() -> int:
    os.nice(10)  # the loader's workers go first
    request = json.loads(sys.stdin.readline())

    def end_with_caller() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=end_with_caller, daemon=True).start()
    use_time_outs(request.pop("timeout"))
    action = prepare if request.pop("action") == "prepare" else push
    try:
        if get_token() is None:
            raise LocalTokenNotFoundError("no access token: set HF_TOKEN or run `hf auth login`")
        result = {"ok": True, **action(**request)}
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        result = failure(error)
    sys.stderr.write(f"{datetime.now(UTC).isoformat()} {json.dumps(result)}\n")
    sys.stdout.write("\n" + json.dumps(result) + "\n")
    sys.stdout.flush()
    # Not sys.exit: its clean-up would wait for the thread that reads standard input.
    os._exit(0 if result["ok"] else 1)


if __name__ == "__main__":
    main()
