"""Which recordings lie in tar shards and folders, reading them, writing shards (docs/data.md, "Shards").

Listing reads tar headers only and notes where every member lies; reading then takes one recording at a time from
there, so that memory holds one recording whatever the order of the members. Nothing is ever extracted to disk. What a
header claims is believed only within the limits below.
"""

import errno
import glob
import gzip
import io
import os
import re
import stat
import tarfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from gzip import BadGzipFile
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Self

from datasets import DownloadConfig
from datasets.utils.file_utils import is_local_path, xopen

from .log import LARGEST_LOG
from .names import player_id_of, recorder_version_of, session_id_of, version_order

VIDEO_SUFFIX, LOG_SUFFIX = ".mp4", ".jsonl"
MANIFEST_NAME = "manifest.jsonl"  # what a download leaves beside its recordings: named like a log, and none
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
# By suffix: what is said where a recording lacks its half.
MISSING = {
    VIDEO_SUFFIX: "missing .mp4",
    LOG_SUFFIX: "missing .jsonl: a trained inverse dynamics head can write it (examples/label_videos.py)",
}
_READ_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error)
# What a network file system or a machine out of resources answers, whatever the file.
_PASSING_ERRORS = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN),
    *(errno.EAGAIN, errno.EINTR, errno.ENOMEM, errno.EMFILE, errno.ENFILE),
}

# Limits far beyond what recordings need, so that a damaged or hostile shard costs bounded time and memory.
LARGEST_VIDEO = 2 * 2**30  # bytes of one .mp4: a video in a tar is held in memory while it is cut into clips
LARGEST_TAR_HEADER = 64 * 2**10  # bytes of one member's headers, long names and extended (pax) headers included
MOST_ZEROS = 2 * 2**20  # bytes of zeros between two archives in one file, or at its end
MOST_FILES = 2**18  # .mp4 and .jsonl files in one shard
MOST_EXPANSION = 100  # times the size of a compressed tar that it may have decompressed; logs alone reach about 20
LONGEST_NAME = 200  # bytes of a recording's name in UTF-8: with the clip's tick it is a file name of at most 255
_EXPANSION_ALWAYS = 64 * 2**20  # bytes that any compressed tar may have decompressed
_LONG_NUMBER = re.compile(rb"\d{256}")
_NOT_IN_NAMES = '<>:"|?*\\'


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

    @property
    def player_id(self) -> str:
        return player_id_of(self.recording_id)


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


@dataclass(frozen=True)
class _FoundFile:
    """A `.mp4` or `.jsonl` file as it was found; `fault` says why it cannot be used."""

    name: str
    member: Member
    fault: str | None = None

    @property
    def stem(self) -> str:
        # Names that look alike are alike: macOS writes an accent as a character of its own.
        return unicodedata.normalize("NFC", os.path.splitext(self.name)[0])

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.name)[1]


class _HeaderReader:
    """What tarfile reads headers from: a file that gives no more than headers can need."""

    def __init__(self, file: BinaryIO, compressed_size: int | None):
        self._file = file
        self._largest = 2**62
        if compressed_size is not None:
            self._largest = max(MOST_EXPANSION * compressed_size, _EXPANSION_ALWAYS)
        self._left = LARGEST_TAR_HEADER
        self.num_zeros = 0

    def next_member(self) -> None:
        self._left = LARGEST_TAR_HEADER

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, position: int) -> int:
        self._check_place(position)
        return self._file.seek(position)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self._left:
            raise tarfile.ReadError(f"headers of a member: expected at most {LARGEST_TAR_HEADER} bytes, found more")
        self._check_place(self.tell() + size)
        self._left -= size
        data = self._file.read(size)
        # tarfile looks for numbers with a regular expression that takes quadratic time on long ones (CVE-2024-6232).
        if size > tarfile.BLOCKSIZE and _LONG_NUMBER.search(data):
            raise tarfile.ReadError("headers of a member: found a number of more than 255 digits")
        return data

    def _check_place(self, position: int) -> None:
        if 0 <= position <= self._largest:
            return
        if self._largest == 2**62 or position < 0:
            raise tarfile.ReadError(f"member at byte {position}: there is no such place")
        raise tarfile.ReadError(f"expands too much: expected at most {self._largest} bytes decompressed, found more")


class _StrictTarInfo(tarfile.TarInfo):
    """Makes damage inside an archive an error: tarfile takes a broken or missing header for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        reader = archive.fileobj
        assert isinstance(reader, _HeaderReader)
        try:
            info = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            # A block of zeros: the proper end, unless another archive follows (`cat a.tar b.tar`).
            reader.num_zeros += tarfile.BLOCKSIZE
            if reader.num_zeros > MOST_ZEROS:
                raise tarfile.ReadError(f"expected at most {MOST_ZEROS} bytes of zeros, found more") from None
            reader.next_member()
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            if reader.num_zeros:
                raise
            raise tarfile.ReadError(f"damaged or missing header ({error})") from error
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged or missing header ({error})") from error
        except (ValueError, OverflowError, RecursionError) as error:
            # tarfile converts numbers and text of extended headers without checking them, and follows chains of them.
            raise tarfile.ReadError(f"damaged header ({type(error).__name__}: {error})") from error
        if info.size < 0 or archive.offset < info.offset_data:
            raise tarfile.ReadError(f"damaged header (size: expected 0 or more, found {info.size})")
        reader.num_zeros = 0
        reader.next_member()
        return info


def find_files(patterns: Iterable[str], output: Path) -> list[str]:
    """Absolute paths of the files of globs and folders, sorted within each, each once.

    Raises:
        ValueError: a pattern that matches no recording or shard, or one that lies in the output folder.
    """
    files: dict[str, None] = {}
    for pattern in patterns:
        found: list[str] = []
        for path in sorted(glob.glob(os.path.abspath(pattern), recursive=True)):
            inside = sorted(map(str, Path(path).rglob("*"))) if os.path.isdir(path) else [path]
            found += [file for file in inside if file.endswith((*TAR_SUFFIXES, VIDEO_SUFFIX, LOG_SUFFIX))]
        if not found:
            raise ValueError(f"--shards {pattern}: no .tar, .mp4 or .jsonl file found")
        files.update(dict.fromkeys(found))
    folder = os.path.join(os.path.abspath(output), "")
    own = [file for file in files if file.startswith(folder)]
    if own:
        raise ValueError(f"--output {output} holds what is to be built from, such as {own[0]}: give it another folder")
    return list(files)


def list_shards(
    names: Sequence[str],
    paths: Sequence[str] | None = None,
    *,
    download_config: DownloadConfig | None = None,
    listed_tars: Mapping[str, Shard] | None = None,
) -> list[Shard]:
    """List the recordings of tar shards and of loose `.mp4`/`.jsonl` files, in the order given.

    Nothing that a shard holds makes this fail: what is wrong is in `rejected`.

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
    loose: dict[str, tuple[Shard, list[_FoundFile]]] = {}
    for name, path in zip(names, paths or names, strict=True):
        if not _is_text(name):  # nothing that records what was built could name it
            reason = "unusable path: expected UTF-8"
            shards.append(Shard(_printable(PurePosixPath(name).name), _printable(name)))
            shards[-1].rejected.append(Rejection(None, shards[-1].name, f"{reason}, found {_printable(name)}"))
        elif name.endswith(TAR_SUFFIXES):
            known = listed_tars.get(name) if listed_tars else None
            shards.append(known or list_tar(name, path, download_config))
        elif name.endswith((VIDEO_SUFFIX, LOG_SUFFIX)):
            found = _FoundFile(name, Member(path))
            if found.stem not in loose:
                loose[found.stem] = (Shard(PurePosixPath(name).parent.name or ".", name), [])
                shards.append(loose[found.stem][0])
            loose[found.stem][1].append(found)
        else:
            shards.append(Shard(PurePosixPath(name).name, name, other_files=1))
    for shard, files in loose.values():
        _pair_files(shard, files)
    _reject_doubled(shards)
    return shards


def list_tar(source: str, path: str, download_config: DownloadConfig | None = None) -> Shard:
    """List one tar; a recording that other shards have too is not known here."""
    shard = Shard(PurePosixPath(source).name, source)
    files: list[_FoundFile] = []
    last, num_members = "", 0
    try:
        with _open_file(path, download_config) as (file, compressed_size):
            reader = _HeaderReader(file, compressed_size)
            archive = tarfile.TarFile(fileobj=reader, tarinfo=_StrictTarInfo, ignore_zeros=True)  # type: ignore[arg-type]
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it keeps all that it has seen
                if info.isdir():
                    continue
                last, num_members = info.name, num_members + 1
                if info.name.endswith((VIDEO_SUFFIX, LOG_SUFFIX)):
                    if len(files) == MOST_FILES:
                        raise tarfile.ReadError(f"expected at most {MOST_FILES} .mp4 and .jsonl files, found more")
                    files.append(_FoundFile(info.name, Member(path, info.offset_data, info.size), _type_fault(info)))
                else:
                    shard.other_files += 1
    except _READ_ERRORS as error:
        lost = f"everything after {_printable(last)} (file {num_members})" if num_members else "all of it"
        shard.rejected.append(Rejection(None, shard.name, f"unreadable tar: {_cause(error, path)}; {lost} is lost"))
    _pair_files(shard, files)
    return shard


@contextmanager
def _open_file(path: str, download_config: DownloadConfig | None) -> Iterator[tuple[BinaryIO, int | None]]:
    """A file, decompressed where it is gzipped, and its compressed size in that case."""
    _check_regular(path)
    with xopen(path, "rb", download_config=download_config) as file:
        is_gzipped = file.read(2) == b"\x1f\x8b"
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if is_gzipped:
            with gzip.GzipFile(fileobj=file) as decompressed:
                yield decompressed, size  # type: ignore[misc]
        else:
            yield file, None


def is_recording_file(name: str) -> bool:
    """Whether a name is that of a recording's video or log: not hidden, not a download's manifest."""
    path = PurePosixPath(name)
    return path.suffix in (VIDEO_SUFFIX, LOG_SUFFIX) and not path.name.startswith(".") and path.name != MANIFEST_NAME


def _check_regular(path: str) -> None:
    """Opening a named pipe waits for ever, and a device may have no end."""
    if is_local_path(path) and not stat.S_ISREG(mode := os.stat(path).st_mode):
        raise OSError(f"expected a regular file, found {stat.filemode(mode)!r}")


def _type_fault(info: tarfile.TarInfo) -> str | None:
    if info.sparse is not None:
        return "a sparse file"
    if info.isreg():
        return None
    kinds = {
        tarfile.SYMTYPE: "a symbolic link",
        tarfile.LNKTYPE: "a hard link",
        tarfile.CHRTYPE: "a device",
        tarfile.BLKTYPE: "a device",
        tarfile.FIFOTYPE: "a named pipe",
    }
    return kinds.get(info.type, f"of unknown type {info.type!r}")


def _is_text(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _printable(name: str) -> str:
    """A name for a report: nothing that breaks a line, a terminal or an encoding, and not too long."""
    text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in name)
    return text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}..."


def _fault(found: _FoundFile) -> str | None:
    """Why a file cannot be half of a recording."""
    file = PurePosixPath(found.name).name
    recording = PurePosixPath(found.stem).name
    if not recording.isprintable() or set(recording) & set(_NOT_IN_NAMES):
        return f"unusable name: expected printable characters without {_NOT_IN_NAMES}, found {_printable(file)}"
    if len(recording.encode()) > LONGEST_NAME:
        return f"name too long: expected at most {LONGEST_NAME} bytes, found {len(recording.encode())}"
    if found.fault:
        return f"unusable {found.suffix}: expected a regular file, found {found.fault}"
    largest = LARGEST_VIDEO if found.suffix == VIDEO_SUFFIX else LARGEST_LOG
    if found.member.size is not None and found.member.size > largest:
        return f"{found.suffix} too large: expected at most {largest} bytes, found {found.member.size}"
    return None


def _pair_files(shard: Shard, files: Iterable[_FoundFile]) -> None:
    """Fill a shard's entries, in the order in which recordings become complete, and its rejections."""
    halves: dict[str, dict[str, Member]] = {}
    copies: dict[str, Counter[str]] = {}
    faults: dict[str, str] = {}
    for found in files:
        stem, suffix = found.stem, found.suffix
        if not is_recording_file(found.name):
            shard.other_files += 1
            continue
        half = halves.setdefault(stem, {})
        if suffix in half:
            copies.setdefault(stem, Counter())[suffix] += 1
            continue
        half[suffix] = found.member
        if fault := _fault(found):
            faults.setdefault(stem, fault)
        if len(half) == 2 and stem not in faults:
            recording, version = PurePosixPath(stem).name, recorder_version_of(stem)
            shard.entries.append(RecordingEntry(recording, version, half[VIDEO_SUFFIX], half[LOG_SUFFIX]))

    def reject(stem: str, reason: str, times: int = 1) -> None:
        shard.rejected.extend([Rejection(_printable(PurePosixPath(stem).name), shard.name, reason)] * times)

    for stem, surplus in copies.items():
        reason = f"doubled: {' and '.join(sorted(surplus))} found again in the same shard, the first is used"
        reject(stem, reason, max(surplus.values()))
    for stem, half in halves.items():
        if stem in faults:
            reject(stem, faults[stem])
            continue
        for missing in {VIDEO_SUFFIX, LOG_SUFFIX} - half.keys():
            reject(stem, MISSING[missing])


def _reject_doubled(shards: list[Shard]) -> None:
    """Keep one of each recording: of several recorder versions the newest, of equal ones the first."""
    used: dict[str, tuple[Shard, RecordingEntry]] = {}
    for shard in shards:
        for entry in shard.entries:
            known = used.get(entry.recording_id)
            if not known or version_order(entry.recorder_version) > version_order(known[1].recorder_version):
                used[entry.recording_id] = (shard, entry)
    for shard in shards:
        kept = []
        for entry in shard.entries:
            other, chosen = used[entry.recording_id]
            if entry is chosen:
                kept.append(entry)
                continue
            found = f"already found in {other.name}"
            if entry.recorder_version != chosen.recorder_version:
                found = f"found under recorder version {chosen.recorder_version} too, in {other.name}"
            shard.rejected.append(Rejection(entry.recording_id, shard.name, f"doubled: {found}, that copy is used"))
        shard.entries = kept


def read_pairs(shard: Shard, *, download_config: DownloadConfig | None = None) -> Iterator[RecordingPair | Rejection]:
    """Read a listed shard's recordings one after another; what cannot be read comes as a `Rejection`."""
    with ExitStack() as open_files:
        tar: BinaryIO | None = None
        for entry in shard.entries:
            halves: dict[Member, bytes | str] = {}
            try:
                if tar is None and entry.video.offset is not None:
                    tar, _ = open_files.enter_context(_open_file(entry.video.path, download_config))
                # A compressed tar can only go back by starting over: what lies first is read first.
                for member in sorted((entry.video, entry.log), key=lambda member: member.offset or 0):
                    if tar is not None:
                        halves[member] = _read_member(tar, member)
                    elif member is entry.video and is_local_path(member.path):
                        _check_regular(member.path)
                        halves[member] = member.path
                    else:
                        largest = LARGEST_VIDEO if member is entry.video else LARGEST_LOG
                        halves[member] = _read_file(member.path, largest, download_config)
            except _READ_ERRORS as error:
                where = "from the shard" if entry.video.offset is not None else "from its file"
                reason = f"cannot be read {where}: {_cause(error, entry.video.path)}"
                yield Rejection(entry.recording_id, shard.name, reason)
                continue
            log = halves[entry.log]
            assert isinstance(log, bytes)
            yield RecordingPair(entry, shard.name, log, halves[entry.video])


def _read_member(tar: BinaryIO, member: Member) -> bytes:
    assert member.offset is not None and member.size is not None
    tar.seek(member.offset)
    data = _read_up_to(tar, member.size)
    if len(data) != member.size:
        raise EOFError(f"expected {member.size} bytes, found {len(data)}: the shard is truncated")
    return data


def _read_file(path: str, largest: int, download_config: DownloadConfig | None) -> bytes:
    _check_regular(path)
    with xopen(path, "rb", download_config=download_config) as file:
        data = _read_up_to(file, largest + 1)
    if len(data) > largest:
        raise EOFError(f"{PurePosixPath(path).suffix} too large: expected at most {largest} bytes, found more")
    return data


def _read_up_to(file: BinaryIO, size: int) -> bytes:
    # Piece by piece: a size that is only claimed is not allocated.
    data = io.BytesIO()
    while piece := file.read(min(size - data.tell(), 2**20)):
        data.write(piece)
    return data.getvalue()


def _cause(error: Exception, path: str) -> str:
    """One line for a report. A network or machine that fails is no fault of the shard: such errors are raised again."""
    if isinstance(error, OSError) and not isinstance(error, BadGzipFile):
        if not is_local_path(path):
            raise error
        if error.errno in _PASSING_ERRORS:
            raise OSError(error.errno, error.strerror, path) from error
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
