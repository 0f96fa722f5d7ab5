"""Program: one attempt to create, check or fill a model repository of the Hub, in a process of its own (push.py).

The Hub's client waits without limit, inside native code too, and works in the interpreter that calls it; a process can
be given up. It is run by path, imports nothing of this package (which would take seconds), takes a request as one line
of JSON on its standard input, and ends when that is closed, so that it never outlives the training. The last line of
its standard output is the result as JSON: `{"ok": true, ...}` or `{"ok": false, "reason", "permanent", "retry_after"}`.
"""

import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, get_session, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import hf_raise_for_status

# Only what a model's repository is meant to have: whatever else a run leaves stays at home.
MODEL_FILES = (
    "README.md",
    "config.json",
    "evaluation/*.json",
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


class MissingTokenError(Exception):
    """There is no access token to write with."""


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
    match = re.search(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("RateLimit", ""))
    return float(match[1]) if match else None


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


def push(repo_id: str, folder: str, message: str, snapshot: dict[str, Any] | None) -> dict[str, Any]:
    """One commit with all files of a model, so that `main` never holds parts of two."""
    path = Path(folder)
    if snapshot is not None:
        assemble(path, **snapshot)
    files = sorted({file for pattern in MODEL_FILES for file in path.glob(pattern) if file.is_file()})
    operations = [CommitOperationAdd(file.relative_to(path).as_posix(), file) for file in files]
    commit = HfApi().create_commit(repo_id, operations, commit_message=message)
    size = sum(file.stat().st_size for file in files)
    return {"commit": commit.oid, "url": commit.commit_url, "files": len(files), "bytes": size}


def assemble(folder: Path, base: str, metrics: str, step: int) -> None:
    """Make a model folder of a checkpoint's predictor and what does not change in a run (encoder, code, processor).

    Args:
        folder: holds `predictor.safetensors` and the files that differ from step to step.
        base: folder of the rest; its model.safetensors holds the encoder alone.
        metrics: the run's metrics.jsonl, of which rows up to `step` are taken.
        step: of the checkpoint.
    """
    for file in Path(base).iterdir():
        if file.name != "model.safetensors" and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    if Path(metrics).is_file():
        rows = [line for line in Path(metrics).read_text().splitlines(keepends=True) if line.endswith("\n")]
        (folder / "metrics.jsonl").write_text("".join(row for row in rows if json.loads(row)["step"] <= step))
    if not (folder / "model.safetensors").exists():
        from safetensors.torch import load_file, save_file  # here: PyTorch takes seconds, and is not always needed

        tensors = load_file(Path(base) / "model.safetensors")
        predictor = load_file(folder / "predictor.safetensors")
        tensors |= {f"predictor.{name}": tensor for name, tensor in predictor.items()}
        temporary = folder / ".model.safetensors.tmp"
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.replace(temporary, folder / "model.safetensors")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def failure(error: Exception) -> dict[str, Any]:
    """What went wrong, whether trying again can help, and how long the Hub asks to wait."""
    wait, permanent = None, isinstance(error, (MissingTokenError, HFValidationError, OfflineModeIsEnabled))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {' '.join(lines)[:500]}"
    for cause in causes(error):
        response = getattr(cause, "response", None)
        if isinstance(cause, HfHubHTTPError) and response is not None:
            status = response.status_code
            text = response.headers.get("X-Error-Message") or response.reason_phrase
            reason = f"HTTP {status} {text} for {response.request.method} {response.request.url}"
            permanent = 400 <= status < 500 and status not in _PASSING_STATUS
            wait = retry_after(response.headers)
            break
        if isinstance(cause, httpx2.RequestError):
            target = f" for {cause.request.method} {cause.request.url}" if getattr(cause, "_request", None) else ""
            reason = f"{type(cause).__name__} {cause}{target}".replace("  ", " ")
            break
    return {"ok": False, "reason": reason, "permanent": permanent, "retry_after": wait}


def attempt(request: dict[str, Any]) -> dict[str, Any]:
    use_time_outs(request.pop("timeout"))
    action = prepare if request.pop("action") == "prepare" else push
    try:
        if get_token() is None:
            raise MissingTokenError("no access token: set HF_TOKEN or run `hf auth login`")
        return {"ok": True, **action(**request)}
    except (MissingTokenError, httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        return failure(error)


def main() -> int:
    os.nice(10)  # the loader's workers go first
    request = json.loads(sys.stdin.readline())

    def end_with_caller() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=end_with_caller, daemon=True).start()
    result = attempt(request)
    sys.stdout.write("\n" + json.dumps(result) + "\n")
    sys.stdout.flush()
    # Not sys.exit: its clean-up would wait for the thread that reads standard input.
    os._exit(0 if result["ok"] else 1)


if __name__ == "__main__":
    main()
