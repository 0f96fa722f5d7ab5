"""One file over HTTP: resumed, retried, checked against what the server says (docs/data.md, "Downloading")."""

import asyncio
import base64
import binascii
import hashlib
import logging
import random
import re
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar

import httpx2
import msgspec

from ..records import write_json
from .index import RemoteFile

logger = logging.getLogger(__name__)

PART_SUFFIX = ".part"
_STATE_SUFFIX = ".part.json"

# A server that asks for more patience than this is not waited for: the file fails and a rerun tries again.
_LONGEST_RETRY_AFTER = 3600.0
# Bodies of error pages up to this size are read, so that the connection can be used again.
_SMALL_BODY = 64 * 1024

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class TransferOptions:
    """How patient a download is.

    Args:
        max_retries: tries without progress after which a file fails, the first one not counted.
        connect_timeout, read_timeout: seconds until a connection must stand, and between two pieces of a body.
        first_wait: seconds before the first retry, doubled for each further one, times a random 0.5 to 1.
        longest_wait: seconds; bound of that wait. A longer `Retry-After` of the server is kept to, by all files.

    Raises:
        ValueError: values out of range; the message has them.
    """

    max_retries: int = 8
    connect_timeout: float = 15.0
    read_timeout: float = 60.0
    first_wait: float = 1.0
    longest_wait: float = 60.0

    def __post_init__(self) -> None:
        if self.max_retries < 0:
            raise ValueError(f"max_retries must be at least 0, found {self.max_retries}")
        for name in ("connect_timeout", "read_timeout", "first_wait", "longest_wait"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)} seconds")


class FetchedFile(msgspec.Struct, frozen=True):
    """A file as the server describes it: bytes (None: it does not tell) and entity tag."""

    size: int | None
    etag: str | None = None


class TransferError(Exception):
    """A file that cannot be had; `missing` where the server says that there is none."""

    def __init__(self, reason: str, *, missing: bool = False) -> None:
        super().__init__(reason)
        self.missing = missing


class OutOfSpaceError(OSError):
    """The disk has less room than a file needs; the message has the folder and both sizes."""


class _TryAgain(Exception):
    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class _PartState(msgspec.Struct):
    """What the server said about a partial file, kept beside it: needed to go on with it in another process."""

    etag: str | None = None
    last_modified: str | None = None
    size: int | None = None
    md5: str | None = None

    @property
    def validator(self) -> str | None:
        """For If-Range, which takes no weak tags (RFC 9110, section 13.1.5); without one, a file starts anew."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified

    @classmethod
    def of(cls, response: httpx2.Response, size: int | None) -> "_PartState":
        headers = response.headers
        # Azure sends the whole blob's MD5 under this name when it answers a range, under the other one otherwise.
        md5 = headers.get("x-ms-blob-content-md5")
        if md5 is None and response.status_code == httpx2.codes.OK:
            md5 = headers.get("Content-MD5")
        return cls(headers.get("ETag"), headers.get("Last-Modified"), size, md5)


# Made once, before any thread asks: msgspec crashes where several threads are the first to need a type.
_DECODER = msgspec.json.Decoder(_PartState)


class Transfer:
    """Fetches files with one client.

    Attributes:
        num_bytes: body bytes received.
        num_retries: tries after the first.
    """

    def __init__(
        self,
        client: httpx2.AsyncClient,
        options: TransferOptions,
        on_bytes: Callable[[int], object] = lambda count: None,
    ) -> None:
        self._client, self._options, self._on_bytes = client, options, on_bytes
        self._welcome_at = 0.0
        self.num_bytes = self.num_retries = 0

    async def fetch(self, file: RemoteFile, path: Path) -> FetchedFile:
        """Bring the partial file of `path` (`part_of`) to its full length, going on with what is there.

        Raises:
            TransferError: the server has no such file, refuses it, or the retries are used up.
            OSError: it cannot be written; the disk is full.
        """
        part = part_of(path)
        part.parent.mkdir(parents=True, exist_ok=True)

        async def attempt() -> FetchedFile:
            await self._get(file, path)
            await self._check_sums(file, path)
            state = _read_state(path)
            assert state is not None
            return FetchedFile(part.stat().st_size, state.etag)

        return await self._retrying(attempt, file.url, lambda: _size_of(part) or 0)

    async def describe(self, file: RemoteFile) -> FetchedFile:
        """Size and entity tag without the body.

        Raises:
            TransferError: as `fetch`.
        """

        async def attempt() -> FetchedFile:
            response = await self._client.head(file.url)
            if response.status_code in (httpx2.codes.METHOD_NOT_ALLOWED, httpx2.codes.NOT_IMPLEMENTED):
                return FetchedFile(None)
            await self._check_status(response, file)
            return FetchedFile(_content_length(response), response.headers.get("ETag"))

        return await self._retrying(attempt, file.url, lambda: 0)

    async def _retrying(
        self, attempt: Callable[[], Awaitable[_Result]], url: str, progress: Callable[[], int]
    ) -> _Result:
        num_failures, furthest = 0, progress()
        while True:
            while (pause := self._welcome_at - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            asked: float | None = None
            try:
                return await attempt()
            except _TryAgain as error:
                reason, asked = str(error), error.retry_after
            except httpx2.TransportError as error:
                reason = type(error).__name__
            except httpx2.RequestError as error:
                raise TransferError(f"{type(error).__name__}: {url}: {error}") from error
            # A connection that drops every now and then but gets on is no failure; one that never gets further is.
            if (reached := progress()) > furthest:
                num_failures, furthest = 0, reached
            num_failures += 1
            if num_failures > self._options.max_retries:
                raise TransferError(f"{reason}: {url}, after {num_failures} tries")
            if asked is not None and asked > _LONGEST_RETRY_AFTER:
                raise TransferError(f"{reason}: {url}: the server asks to wait {asked:.0f} seconds")
            wait = min(self._options.first_wait * 2 ** (num_failures - 1), self._options.longest_wait)
            wait *= random.uniform(0.5, 1)
            if asked is not None:
                # It is the server that is busy, not this file: nothing else is asked for meanwhile.
                wait = max(wait, asked)
                self._welcome_at = max(self._welcome_at, time.monotonic() + asked)
            logger.info("%s: %s: trying again in %.1f s", url, reason, wait)
            self.num_retries += 1
            await asyncio.sleep(wait)

    async def _get(self, file: RemoteFile, path: Path) -> None:
        part, state = part_of(path), _read_state(path)
        offset = _size_of(part) or 0
        if state is not None and state.size is not None and _size_of(part) == state.size:
            return
        headers = {}
        if state is not None and state.validator and offset:
            headers = {"Range": f"bytes={offset}-", "If-Range": state.validator}
        async with self._client.stream("GET", file.url, headers=headers) as response:
            if response.status_code == httpx2.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                discard_part(path)
            await self._check_status(response, file)
            if response.status_code == httpx2.codes.PARTIAL_CONTENT:
                new_state = _PartState.of(response, _check_range(response, offset if headers else 0, state, path))
            else:
                new_state, offset = _PartState.of(response, _content_length(response)), 0
            if new_state.size is None:
                new_state.size = file.size
            if file.size not in (None, new_state.size):
                raise TransferError(f"size differs: {file.url}: index {file.size} bytes, server {new_state.size} bytes")
            _check_space(part, (new_state.size or 0) - offset)
            if not offset:
                # The old bytes go before the new state comes: never a state beside bytes of another file.
                part.unlink(missing_ok=True)
                write_json(_state_of(path), msgspec.to_builtins(new_state))
            with part.open("ab") as out:
                async for chunk in response.aiter_raw():
                    out.write(chunk)
                    self.num_bytes += len(chunk)
                    self._on_bytes(len(chunk))
        size = part.stat().st_size
        if new_state.size not in (None, size):
            if size > new_state.size:
                discard_part(path)
            raise _TryAgain(f"wrong length ({size} of {new_state.size} bytes)")
        if (_read_state(path) or new_state).size != size:
            new_state.size = size
            write_json(_state_of(path), msgspec.to_builtins(new_state))

    async def _check_status(self, response: httpx2.Response, file: RemoteFile) -> None:
        status = response.status_code
        if status in (httpx2.codes.OK, httpx2.codes.PARTIAL_CONTENT):
            coding = response.headers.get("Content-Encoding", "identity")
            if coding != "identity":
                raise TransferError(f"Content-Encoding {coding!r}: {file.url}: asked for none, sizes cannot be checked")
            return
        length = _content_length(response)
        if length is not None and length <= _SMALL_BODY:
            await response.aread()
        if status in (httpx2.codes.NOT_FOUND, httpx2.codes.GONE):
            raise TransferError(f"HTTP {status}: {file.url}", missing=True)
        retried = (
            httpx2.codes.REQUEST_TIMEOUT,
            httpx2.codes.REQUESTED_RANGE_NOT_SATISFIABLE,
            httpx2.codes.TOO_MANY_REQUESTS,
        )
        if status in retried or status >= 500:
            raise _TryAgain(f"HTTP {status}", _retry_after(response))
        raise TransferError(f"HTTP {status}: {file.url}")

    async def _check_sums(self, file: RemoteFile, path: Path) -> None:
        state = _read_state(path)
        sums = {"sha256": file.sha256, "md5": _md5_hex(state.md5 if state else None)}
        for name, expected in sums.items():
            if expected is not None:
                found = await asyncio.to_thread(file_digest, part_of(path), name)
                if found != expected:
                    discard_part(path)
                    raise _TryAgain(f"{name} differs ({found}, expected {expected})")


# ---------------------------------------------------------------------------------------------------- partial files


def part_of(path: Path) -> Path:
    """Where a file's bytes are kept until all of them are there."""
    return path.with_name(path.name + PART_SUFFIX)


def discard_part(path: Path) -> None:
    part_of(path).unlink(missing_ok=True)
    _state_of(path).unlink(missing_ok=True)


def finish_part(path: Path, target: Path) -> None:
    """Give a partial file its final name, or another one."""
    part_of(path).replace(target)
    _state_of(path).unlink(missing_ok=True)


def file_digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, algorithm).hexdigest()


def _state_of(path: Path) -> Path:
    return path.with_name(path.name + _STATE_SUFFIX)


def _read_state(path: Path) -> _PartState | None:
    state_file = _state_of(path)
    if not state_file.exists():
        return None
    try:
        return _DECODER.decode(state_file.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        logger.warning("%s: %s: starting anew", state_file, error)
        return None


def _size_of(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


# ---------------------------------------------------------------------------------------------------- headers


def _content_length(response: httpx2.Response) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _check_range(response: httpx2.Response, offset: int, state: _PartState | None, path: Path) -> int:
    """Size of the whole file, if a 206 answer goes on exactly where the partial file ends, with the same file."""
    text = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", text)
    etag = response.headers.get("ETag")
    # Some servers answer a range whatever If-Range says: the tag tells that the file is another one.
    same = state is None or (etag == state.etag and match is not None and state.size in (None, int(match[3])))
    if match is None or int(match[1]) != offset or not same:
        discard_part(path)
        raise _TryAgain(f"partial file does not fit (Content-Range {text!r} for bytes {offset}-, ETag {etag})")
    return int(match[3])


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds of a Retry-After header, which has seconds or a date (RFC 9110, section 10.2.3)."""
    text = response.headers.get("Retry-After")
    if text is None:
        return None
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _md5_hex(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        return base64.b64decode(text, validate=True).hex()
    except binascii.Error:
        return None


def _check_space(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise OutOfSpaceError(f"{part.parent}: disk full: {part.name} needs {needed} more bytes, {free} are free")
