"""Downloading recordings: transfer, check, manifest, report (docs/data.md, "Downloading")."""

import asyncio
import fcntl
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import httpx2
import msgspec

from ..recordings.log import RecordingError, parse_recording
from ..recordings.shards import LOG_SUFFIX, MANIFEST_NAME, VIDEO_SUFFIX, Rejection
from ..recordings.video import VideoError, VideoReader
from .index import OPTIONS_SUFFIX, RemoteRecording
from .transfer import (
    FetchedFile,
    OutOfSpaceError,
    Transfer,
    TransferError,
    TransferOptions,
    discard_part,
    file_digest,
    finish_part,
    part_of,
)

logger = logging.getLogger(__name__)

REPORT_NAME = "download_report.json"
REJECTED_SUFFIX = ".rejected"

# So many recordings failing with none between them that does not: it is the network or the server, not the files.
MAX_FAILURES_IN_A_ROW = 20

_SUFFIXES = (LOG_SUFFIX, VIDEO_SUFFIX, OPTIONS_SUFFIX)


@dataclass(frozen=True)
class DownloadOptions:
    """How recordings are downloaded.

    Args:
        num_workers: recordings at a time, one request each.
        with_options: get `-options.json` where there is one.
        retry_rejected: download again what an earlier run rejected.
        transfer: retries and time-outs.

    Raises:
        ValueError: values out of range; the message has them.
    """

    num_workers: int = 8
    with_options: bool = True
    retry_rejected: bool = False
    transfer: TransferOptions = field(default_factory=TransferOptions)

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, found {self.num_workers}")


class DownloadError(RuntimeError):
    """A run that cannot go on; the message says why. What is finished stays, a rerun continues."""


class ManifestEntry(msgspec.Struct, frozen=True):
    """One line of `manifest.jsonl`; of several with the same `relpath` the last one counts.

    Attributes:
        relpath: as in the index, without suffix.
        status: `downloaded` (there and verified), `missing` (the server has no video or no log), `failed` (retries used
            up, or refused) or `rejected` (all there, but not a recording that can be used).
        reason: of any status but `downloaded`.
        url: of the video.
        recorder_version: such as "6.8", None where the relpath has none.
        ticks: lines of the log; frames: frames of the video; None where it did not come to that.
        files: by suffix, size in bytes and entity tag; None for an options file that does not exist.
    """

    relpath: str
    status: Literal["downloaded", "missing", "failed", "rejected"]
    reason: str | None
    url: str | None
    recorder_version: str | None
    ticks: int | None
    frames: int | None
    files: dict[str, FetchedFile | None]


class Manifest:
    """`manifest.jsonl` of a folder, locked while open: lines are only ever added, so that a crash costs one at most.

    Raises:
        DownloadError: another process downloads to the same folder.
        ValueError: a line that is not a manifest entry; only the last one may be torn, it is dropped.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / MANIFEST_NAME
        self.entries: dict[str, ManifestEntry] = {}

    def __enter__(self) -> Self:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._read()
        except (DownloadError, OSError, ValueError):
            os.close(self._file)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def append(self, entry: ManifestEntry) -> None:
        line = msgspec.json.encode(entry) + b"\n"
        written = os.write(self._file, line)
        if written != len(line):
            raise OSError(f"{self.path}: disk full: wrote {written} of {len(line)} bytes of a line")
        self.entries[entry.relpath] = entry

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadError(f"{self.path}: another process downloads to this folder") from None
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s: cannot be locked (%s): start no second download to this folder", self.path, error)

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            logger.warning("%s: the last line is torn and dropped: %r", self.path, content[whole:][:80])
            os.ftruncate(self._file, whole)
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                entry = msgspec.json.decode(line, type=ManifestEntry)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{self.path}: line {number}: {error}; move the file away to have all files checked again"
                ) from error
            self.entries[entry.relpath] = entry


@dataclass
class DownloadReport:
    """What became of the selected recordings, filled on the way.

    Attributes:
        selected: recordings asked for.
        downloaded: finished in this run; already_there: in an earlier one.
        missing, failed, rejected: as in `ManifestEntry.status`; rejected in an earlier run included.
        bytes_transferred: of bodies, those of failed tries included.
        retries: tries after the first.
        recordings: `relpath`, `status` and `reason` of those that are not there.
    """

    selected: int = 0
    downloaded: int = 0
    already_there: int = 0
    missing: int = 0
    failed: int = 0
    rejected: int = 0
    bytes_transferred: int = 0
    retries: int = 0
    recordings: list[dict[str, str]] = field(default_factory=list)

    def add(self, entry: ManifestEntry) -> None:
        setattr(self, entry.status, getattr(self, entry.status) + 1)
        if entry.reason is not None:
            self.recordings.append({"relpath": entry.relpath, "status": entry.status, "reason": entry.reason})

    @property
    def not_attempted(self) -> int:
        done = self.downloaded + self.already_there + self.missing + self.failed + self.rejected
        return self.selected - done

    @property
    def reasons(self) -> dict[str, dict[str, int]]:
        """How often each kind of reason, by status."""
        counts: dict[str, Counter[str]] = {}
        for recording in self.recordings:
            kind = Rejection(recording["relpath"], "", recording["reason"]).kind
            counts.setdefault(recording["status"], Counter())[kind] += 1
        return {status: dict(sorted(kinds.items())) for status, kinds in sorted(counts.items())}

    def is_complete(self, *, allow_missing: bool = False, allow_rejected: bool = False) -> bool:
        """Whether everything selected is there and verified, but for what is allowed not to be."""
        allowed = (self.missing if allow_missing else 0) + (self.rejected if allow_rejected else 0)
        return self.downloaded + self.already_there + allowed == self.selected

    def to_dict(self) -> dict:
        values = {name: value for name, value in vars(self).items() if name != "recordings"}
        recordings = sorted(self.recordings, key=lambda recording: recording["relpath"])
        return {**values, "not_attempted": self.not_attempted, "reasons": self.reasons, "recordings": recordings}

    def summary(self) -> str:
        """One line: what is there, what is not, and how often each kind of reason."""
        counts = ", ".join(
            f"{getattr(self, name)} {name.replace('_', ' ')}"
            for name in ("downloaded", "already_there", "missing", "failed", "rejected", "not_attempted")
        )
        kinds = "".join(
            f"; {count} x {kind} ({status})" for status, kinds in self.reasons.items() for kind, count in kinds.items()
        )
        return f"{self.selected} recordings: {counts}; {self.bytes_transferred} bytes, {self.retries} retries{kinds}"


def check_log(path: Path, relpath: str) -> int:
    """Parse a log; returns its number of lines.

    Raises:
        RecordingError: as `parse_recording`.
    """
    return parse_recording(path.read_bytes(), relpath + LOG_SUFFIX).num_ticks


def check_video(path: Path, relpath: str, ticks: int) -> int:
    """Open a video, whose packets are all read for it; returns its number of frames.

    Raises:
        VideoError: as `VideoReader`; frames that cannot be told to belong to the log's ticks.
    """
    reader = VideoReader(path, relpath + VIDEO_SUFFIX)
    reader.frames_of_ticks(ticks, reader.frame_rate)
    return reader.num_frames


async def download_recordings(
    recordings: Sequence[RemoteRecording],
    output: Path,
    report: DownloadReport,
    *,
    options: DownloadOptions | None = None,
    headers: dict[str, str] | None = None,
    on_bytes: Callable[[int], object] = lambda count: None,
    on_recording: Callable[[], object] = lambda: None,
) -> None:
    """Download and verify recordings into a folder, continuing what earlier runs have left there.

    Cancelling it (as `asyncio` cancels a task) stops at once and leaves nothing but whole recordings and partial files.

    Args:
        recordings: what to get, each relpath once.
        output: folder; files go to their relpath below it, `manifest.jsonl` beside them.
        report: filled on the way.
        options: how.
        headers: sent with every request.
        on_bytes: called with the number of bytes of every piece received.
        on_recording: called after every recording.

    Raises:
        DownloadError: another process uses the folder; recording after recording fails.
        OSError: the folder cannot be written, the disk is full.
        ValueError: a manifest that cannot be read.
    """
    options = options or DownloadOptions()
    output.mkdir(parents=True, exist_ok=True)
    timeouts, user_agent = options.transfer, f"vjepa-ac-hf/{version('vjepa-ac-hf')}"
    with (
        Manifest(output) as manifest,
        ThreadPoolExecutor(min(options.num_workers, os.cpu_count() or 1)) as executor,
    ):
        report.selected = len(recordings)
        client = httpx2.AsyncClient(
            # Sizes are compared: the bytes on the wire must be the file's.
            headers={**(headers or {}), "User-Agent": user_agent, "Accept-Encoding": "identity"},
            timeout=httpx2.Timeout(timeouts.read_timeout, connect=timeouts.connect_timeout, pool=None),
            limits=httpx2.Limits(max_connections=options.num_workers),
            follow_redirects=True,
        )
        async with client:
            transfer = Transfer(client, options.transfer, on_bytes)
            run = _Run(output, manifest, transfer, executor, options, report, on_recording)
            try:
                await run.download(recordings)
            finally:
                report.bytes_transferred, report.retries = transfer.num_bytes, transfer.num_retries


@dataclass
class _Run:
    output: Path
    manifest: Manifest
    transfer: Transfer
    executor: ThreadPoolExecutor
    options: DownloadOptions
    report: DownloadReport
    on_recording: Callable[[], object]
    failures_in_a_row: int = 0

    async def download(self, recordings: Sequence[RemoteRecording]) -> None:
        waiting = list(self._unfinished(recordings))
        self._check_space(waiting)
        queue = iter(waiting)
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(self.options.num_workers, len(waiting))):
                    workers.create_task(self._work(queue))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    def _unfinished(self, recordings: Iterable[RemoteRecording]) -> Iterator[RemoteRecording]:
        for recording in recordings:
            entry = self.manifest.entries.get(recording.relpath)
            if entry is not None and entry.status == "downloaded" and self._is_there(recording, entry):
                self.report.already_there += 1
            elif entry is not None and entry.status == "rejected" and not self.options.retry_rejected:
                self.report.add(entry)
            else:
                yield recording
                continue
            self.on_recording()

    def _is_there(self, recording: RemoteRecording, entry: ManifestEntry) -> bool:
        """Whether the files on disk are those of the manifest, and those of the index where it knows sizes."""
        for suffix in self._suffixes(recording):
            if suffix not in entry.files:
                return False
            known = entry.files[suffix]
            if known is None:
                continue
            path, remote = self._path(recording, suffix), recording.files.get(suffix)
            if not path.exists() or path.stat().st_size != known.size:
                return False
            if remote is not None and remote.size not in (None, known.size):
                return False
        return True

    def _suffixes(self, recording: RemoteRecording) -> tuple[str, ...]:
        with_options = self.options.with_options and OPTIONS_SUFFIX in recording.files
        return _SUFFIXES if with_options else _SUFFIXES[:2]

    def _path(self, recording: RemoteRecording, suffix: str) -> Path:
        return self.output / (recording.relpath + suffix)

    def _check_space(self, recordings: Sequence[RemoteRecording]) -> None:
        """Where the index has sizes, a disk that is too small is found before any transfer."""
        needed = 0
        for recording in recordings:
            for suffix in self._suffixes(recording):
                file, path = recording.files.get(suffix), self._path(recording, suffix)
                on_disk = max((there.stat().st_size for there in (path, part_of(path)) if there.exists()), default=0)
                needed += max(0, (file.size or 0) - on_disk) if file else 0
        free = shutil.disk_usage(self.output).free
        if needed > free:
            raise OutOfSpaceError(f"{self.output}: {needed} more bytes are needed, {free} are free")

    async def _work(self, queue: Iterator[RemoteRecording]) -> None:
        for recording in queue:
            entry = await self._download(recording)
            self.manifest.append(entry)
            self.report.add(entry)
            self.on_recording()
            if entry.status != "downloaded":
                logger.warning("%s %s: %s", entry.status, entry.relpath, entry.reason)
            self.failures_in_a_row = self.failures_in_a_row + 1 if entry.status == "failed" else 0
            if self.failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                raise DownloadError(
                    f"{self.failures_in_a_row} recordings failed in a row, the last one: {entry.reason}"
                )

    async def _download(self, recording: RemoteRecording) -> ManifestEntry:
        """Get, check and name one recording's files; the log first: it is small, and often enough to reject."""
        relpath, in_thread = recording.relpath, asyncio.get_running_loop().run_in_executor
        files: dict[str, FetchedFile | None] = {}
        ticks = frames = reason = None
        status: Literal["downloaded", "missing", "failed", "rejected"] = "downloaded"
        try:
            log, files[LOG_SUFFIX] = await self._obtain(recording, LOG_SUFFIX)
            ticks = await in_thread(self.executor, check_log, log, relpath)
            video, files[VIDEO_SUFFIX] = await self._obtain(recording, VIDEO_SUFFIX)
            frames = await in_thread(self.executor, check_video, video, relpath, ticks)
            if OPTIONS_SUFFIX in self._suffixes(recording):
                files[OPTIONS_SUFFIX] = await self._obtain_options(recording)
        except TransferError as error:
            status, reason = "missing" if error.missing else "failed", str(error)
        except (RecordingError, VideoError) as error:
            status, reason = "rejected", str(error)
        if status in ("downloaded", "rejected"):
            self._name_files(recording, "" if status == "downloaded" else REJECTED_SUFFIX)
        video_file = recording.files.get(VIDEO_SUFFIX)
        url = video_file.url if video_file else None
        return ManifestEntry(relpath, status, reason, url, recording.recorder_version, ticks, frames, files)

    async def _obtain_options(self, recording: RemoteRecording) -> FetchedFile | None:
        try:
            return (await self._obtain(recording, OPTIONS_SUFFIX))[1]
        except TransferError as error:
            if error.missing:
                return None
            raise

    async def _obtain(self, recording: RemoteRecording, suffix: str) -> tuple[Path, FetchedFile]:
        """Where a file's bytes are, and what the server says of it: on disk already, or transferred."""
        path, file = self._path(recording, suffix), recording.files.get(suffix)
        if file is None:
            raise TransferError(f"not in the data set: {recording.relpath}{suffix}", missing=True)
        if path.exists():
            entry = self.manifest.entries.get(recording.relpath)
            known = entry.files.get(suffix) if entry is not None else None
            if file.size is not None and (known is None or known.size != file.size):
                known = FetchedFile(file.size)
            elif known is None:
                known = await self.transfer.describe(file)
            if path.stat().st_size == known.size and (
                file.sha256 is None or await asyncio.to_thread(file_digest, path, "sha256") == file.sha256
            ):
                return path, known
            logger.warning("%s: %d bytes, expected %s: set aside", path, path.stat().st_size, known.size)
            path.replace(path.with_name(path.name + REJECTED_SUFFIX))
        return part_of(path), await self.transfer.fetch(file, path)

    def _name_files(self, recording: RemoteRecording, suffix: str) -> None:
        """Give complete files their final names, or those of rejected ones; leave nothing of earlier tries."""
        for kind in _SUFFIXES:
            path = self._path(recording, kind)
            target, rejected = path.with_name(path.name + suffix), path.with_name(path.name + REJECTED_SUFFIX)
            if part_of(path).exists():
                finish_part(path, target)
            elif suffix and path.exists():
                path.replace(target)
            discard_part(path)
            if not suffix:
                rejected.unlink(missing_ok=True)
