"""Which recordings lie in tar shards and folders, reading them, writing shards (docs/data.md, "Shards").

Listing reads tar headers only and notes where every member lies; reading then takes one recording at a time from
there, so that memory holds one recording whatever the order of the members. Nothing is ever extracted to disk.
"""

import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from gzip import BadGzipFile
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import Self

from datasets import DownloadConfig
from datasets.utils.file_utils import is_local_path, xopen

from .recording import recorder_version_of, recording_id_of, session_id_of

VIDEO_SUFFIX, LOG_SUFFIX = ".mp4", ".jsonl"
MANIFEST_NAME = "manifest.jsonl"  # what a download leaves beside its recordings: named like a log, and none
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_READ_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error, LZMAError)


@dataclass(frozen=True)
class Member:
    """Where a file's bytes lie: `size` bytes from `offset` of a tar (decompressed), or the whole file at `path`."""

    path: str
    offset: int | None = None
    size: int | None = None


@dataclass(frozen=True)
class RecordingEntry:
    """A recording found in a shard: a video and its log; `max_clips` is how many clips may be cut from it."""

    recording_id: str
    recorder_version: str | None
    video: Member
    log: Member
    max_clips: int | None = None

    @property
    def session_id(self) -> str:
        return session_id_of(self.recording_id)


@dataclass(frozen=True)
class Rejection:
    """What was not built and why; `recording` is None where a whole shard, or its rest, cannot be read."""

    recording: str | None
    shard: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without names, lines and values, to count by."""
        reason = re.sub(rf"^{re.escape(self.recording or '')}(\.mp4|\.jsonl)?: (line \d+: )?", "", self.reason)
        return reason.split(":")[0].split(" - at ")[0]


@dataclass
class Shard:
    """One tar, or one recording of a folder, as listed: what can be built and what cannot.

    Attributes:
        name: file name of the tar, or name of the folder, for reports.
        source: path or URL of the tar, or of one file of the recording, as the user knows it.
        entries: recordings to build, in order.
        rejected: recordings, or parts of the shard, that cannot be built.
        other_files: number of files that belong to no recording.
    """

    name: str
    source: str
    entries: list[RecordingEntry] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    other_files: int = 0


@dataclass(frozen=True)
class RecordingPair:
    """A recording as read: the log's bytes, and the video's bytes or local path."""

    entry: RecordingEntry
    shard: str
    log: bytes
    video: bytes | str


class _StrictTarInfo(tarfile.TarInfo):
    """Makes damage inside an archive an error: tarfile takes a broken or missing header for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # two blocks of zeros: the proper end
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged or missing header ({error})") from error


def list_shards(
    names: Sequence[str],
    paths: Sequence[str] | None = None,
    *,
    download_config: DownloadConfig | None = None,
    listed_tars: Mapping[str, Shard] | None = None,
) -> list[Shard]:
    """List the recordings of tar shards and of loose `.mp4`/`.jsonl` files, in the order given.

    Args:
        names: paths or URLs as the user knows them; recordings are named after these.
        paths: where the files really are (downloads lose their names); None: at `names`.
        download_config: access to remote files.
        listed_tars: tars of `names` that `list_tar` has listed before.

    Returns:
        One `Shard` per tar and per loose recording. Unreadable shards, recordings without `.mp4` or `.jsonl` and
        second copies of a recording (the first one is kept) are in `rejected`; other files are counted.
    """
    shards: list[Shard] = []
    loose: dict[str, tuple[Shard, list[tuple[str, Member]]]] = {}
    for name, path in zip(names, paths or names, strict=True):
        if name.endswith(TAR_SUFFIXES):
            known = listed_tars.get(name) if listed_tars else None
            shards.append(known or list_tar(name, path, download_config))
        elif name.endswith((VIDEO_SUFFIX, LOG_SUFFIX)):
            stem = os.path.splitext(name)[0]
            if stem not in loose:
                loose[stem] = (Shard(PurePosixPath(name).parent.name or ".", name), [])
                shards.append(loose[stem][0])
            loose[stem][1].append((name, Member(path)))
        else:
            shards.append(Shard(PurePosixPath(name).name, name, other_files=1))
    for shard, members in loose.values():
        _pair_members(shard, members)
    _reject_doubled(shards)
    return shards


def list_tar(source: str, path: str, download_config: DownloadConfig | None = None) -> Shard:
    """List one tar; a recording that other shards have too is not known here."""
    shard = Shard(PurePosixPath(source).name, source)
    members: list[tuple[str, Member]] = []
    try:
        with _open_tar(path, download_config) as archive:
            for info in archive:
                if info.isreg() and not info.sparse:
                    members.append((info.name, Member(path, info.offset_data, info.size)))
                elif not info.isdir():
                    shard.other_files += 1
    except _READ_ERRORS as error:
        lost = f"everything after {members[-1][0]} (member {len(members)})" if members else "all of it"
        shard.rejected.append(Rejection(None, shard.name, f"unreadable tar: {_cause(error, path)}; {lost} is lost"))
    _pair_members(shard, members)
    return shard


@contextmanager
def _open_tar(path: str, download_config: DownloadConfig | None) -> Iterator[tarfile.TarFile]:
    with (
        xopen(path, "rb", download_config=download_config) as file,
        tarfile.open(fileobj=file, mode="r:*", tarinfo=_StrictTarInfo) as archive,
    ):
        yield archive


def is_recording_file(name: str) -> bool:
    """Whether a name is that of a recording's video or log: not hidden, not a download's manifest."""
    path = PurePosixPath(name)
    return path.suffix in (VIDEO_SUFFIX, LOG_SUFFIX) and not path.name.startswith(".") and path.name != MANIFEST_NAME


def _pair_members(shard: Shard, members: Iterable[tuple[str, Member]]) -> None:
    """Fill a shard's entries, in the order in which recordings become complete, and its rejections."""
    halves: dict[str, dict[str, Member]] = {}
    copies: dict[str, Counter[str]] = {}
    for name, member in members:
        stem, suffix = os.path.splitext(name)
        if not is_recording_file(name):
            shard.other_files += 1
            continue
        half = halves.setdefault(stem, {})
        if suffix in half:
            copies.setdefault(stem, Counter())[suffix] += 1
            continue
        half[suffix] = member
        if len(half) == 2:
            version = recorder_version_of(name)
            shard.entries.append(RecordingEntry(recording_id_of(name), version, half[VIDEO_SUFFIX], half[LOG_SUFFIX]))
    for stem, surplus in copies.items():
        reason = f"doubled: {' and '.join(sorted(surplus))} found again in the same shard, the first is used"
        copy = Rejection(recording_id_of(stem), shard.name, reason)
        shard.rejected.extend([copy] * max(surplus.values()))
    for stem, half in halves.items():
        for missing in {VIDEO_SUFFIX, LOG_SUFFIX} - half.keys():
            shard.rejected.append(Rejection(recording_id_of(stem), shard.name, f"missing {missing}"))


def _reject_doubled(shards: list[Shard]) -> None:
    first_shard: dict[str, str] = {}
    for shard in shards:
        kept = []
        for entry in shard.entries:
            if entry.recording_id in first_shard:
                reason = f"doubled: already found in {first_shard[entry.recording_id]}, that copy is used"
                shard.rejected.append(Rejection(entry.recording_id, shard.name, reason))
            else:
                first_shard[entry.recording_id] = shard.name
                kept.append(entry)
        shard.entries = kept


def read_pairs(shard: Shard, *, download_config: DownloadConfig | None = None) -> Iterator[RecordingPair | Rejection]:
    """Read a listed shard's recordings one after another; what cannot be read comes as a `Rejection`."""
    with ExitStack() as open_files:
        archive: tarfile.TarFile | None = None
        for entry in shard.entries:
            halves: dict[Member, bytes | str] = {}
            try:
                if archive is None and entry.video.offset is not None:
                    archive = open_files.enter_context(_open_tar(entry.video.path, download_config))
                # A compressed tar can only go back by starting over: what lies first is read first.
                for member in sorted((entry.video, entry.log), key=lambda member: member.offset or 0):
                    if archive is not None:
                        halves[member] = _read_member(archive, member)
                    elif member is entry.video and is_local_path(member.path):
                        halves[member] = member.path
                    else:
                        with xopen(member.path, "rb", download_config=download_config) as file:
                            halves[member] = file.read()
            except _READ_ERRORS as error:
                reason = f"cannot be read from the shard: {_cause(error, entry.video.path)}"
                yield Rejection(entry.recording_id, shard.name, reason)
                continue
            log = halves[entry.log]
            assert isinstance(log, bytes)
            yield RecordingPair(entry, shard.name, log, halves[entry.video])


def _read_member(archive: tarfile.TarFile, member: Member) -> bytes:
    assert archive.fileobj is not None and member.offset is not None and member.size is not None
    archive.fileobj.seek(member.offset)
    data = archive.fileobj.read(member.size)
    if len(data) != member.size:
        raise EOFError(f"expected {member.size} bytes, found {len(data)}: the shard is truncated")
    return data


def _cause(error: Exception, path: str) -> str:
    """One line for a report. A network that fails is no fault of the shard: such errors are raised again."""
    if isinstance(error, OSError) and not isinstance(error, BadGzipFile) and not is_local_path(path):
        raise error
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def write_tar(path: Path, members: Iterable[tuple[str, Path]]) -> None:
    """Write a tar of `(name in the tar, file)`, under a temporary name first; the same files give the same bytes."""
    temporary = path.with_name(f".{path.name}.tmp")
    with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, file in members:
            info = tarfile.TarInfo(name)  # its defaults: owner 0, time 0, mode 0644
            info.size = file.stat().st_size
            with file.open("rb") as content:
                archive.addfile(info, content)
    os.replace(temporary, path)
