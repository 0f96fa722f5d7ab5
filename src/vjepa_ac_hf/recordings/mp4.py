"""What an mp4 file claims, checked before FFmpeg believes it (docs/data.md, "What is rejected").

FFmpeg goes by content, not by name: a playlist called `.mp4` makes it open the files and addresses that are listed
there. And it makes tables as long as a header says, out of a file of a few hundred bytes. So the file must be an mp4
file from its first byte, whole, with all of its data in itself, and with tables of sensible lengths. Whether the video
can be decoded is for the decoder to find out. The same tables say when each picture is shown, without decoding any.
"""

import os
import re
import struct
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

# Five minutes of video have 6,000 samples, as many per table, and an index of some 100 kB.
MOST_SAMPLES = 2**20  # entries of all tables of one kind: tracks and fragments add up
LARGEST_INDEX = 64 * 2**20  # bytes of everything but pictures and sound
MOST_BOXES = 2**17  # at the top level; a fragment has two
MOST_EDITS = 64  # entries of edit lists: FFmpeg's index grows with their number times that of samples

_LARGEST_FILE_TYPE = 4096
# How files of other kinds begin, from where and by what, that a renamed video may be. None of them is a text: FFmpeg
# must not be recommended for what may be a playlist.
_OTHER_KINDS = {
    "an AVI": (8, b"AVI "),
    "a Matroska or WebM": (0, b"\x1a\x45\xdf\xa3"),
    "a Windows Media": (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),
    "a Flash video": (0, b"FLV\x01"),
    "an Ogg": (0, b"OggS"),
    "an MPEG program stream": (0, b"\x00\x00\x01\xba"),
}
# Box types are searched for wherever they occur, because FFmpeg accepts them in places where they do not belong.
_CHECKED_BOXES = re.compile(rb"stsz|stz2|stts|ctts|trun|elst|cmov|dref")


def check_mp4(file: BinaryIO) -> bytes:
    """Check that a file is an mp4 file that FFmpeg can be given.

    Args:
        file: opened for reading, at any place; where it is afterwards is not defined.

    Returns:
        What is in its index, the moov box, for `sample_times`; empty where it has none.

    Raises:
        ValueError: another format, a truncated file, data kept in other files, or lengths beyond the limits of this
            module; the message says what was found and expected.

    Source: ISO/IEC 14496-12 (boxes and tables).
    """
    counts: Counter[str] = Counter()
    index = b""
    for kind, content in _index_boxes(file):
        for match in _CHECKED_BOXES.finditer(content):
            _check_box(match[0].decode(), content, match.end(), counts)
        if kind == b"ftyp" and len(content) > _LARGEST_FILE_TYPE:
            raise ValueError(f"ftyp box: expected at most {_LARGEST_FILE_TYPE} bytes, found {len(content)}")
        if kind == b"moov" and not index:  # FFmpeg reads the first
            index = content[16 if content[:4] == b"\0\0\0\1" else 8 :]
    return index


def sample_times(index: bytes) -> np.ndarray | None:
    """When the pictures of a video are shown, as the tables of its index say, edit lists left aside.

    Args:
        index: of a file that has passed `check_mp4`, which returns it.

    Returns:
        float64 (n,), seconds from the first of them, increasing: whatever the order in which pictures are stored (as
        with B-frames). None where tables do not say: fragmented files, several video tracks or none.

    Raises:
        ValueError: times of decoding that go backwards.

    Source: ISO/IEC 14496-12 (stts: differences between times of decoding; ctts: from there to those of showing).
    """
    tracks = [
        track for kind, track in _boxes(index) if kind == b"trak" and _part(track, b"mdia", b"hdlr")[8:12] == b"vide"
    ]
    if len(tracks) != 1 or _part(index, b"mvex"):
        return None
    header = _part(tracks[0], b"mdia", b"mdhd")
    start = 20 if header[:1] == b"\1" else 12  # version 1 has dates of 8 bytes
    time_scale = int.from_bytes(header[start : start + 4], "big")
    durations = _run_lengths(_part(tracks[0], b"mdia", b"minf", b"stbl", b"stts"))
    if not time_scale or not len(durations):
        return None
    if (durations < 0).any():
        sample = int((durations < 0).argmax())
        raise ValueError(
            f"time stamps go backwards: picture {sample + 1} is to be decoded {-durations[sample] / time_scale:g} s "
            f"before picture {sample}"
        )
    offsets = _run_lengths(_part(tracks[0], b"mdia", b"minf", b"stbl", b"ctts"))[: len(durations)]
    shown = np.cumsum(durations) - durations
    shown[: len(offsets)] += offsets
    shown.sort()
    return (shown - shown[0]) / time_scale


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of the boxes that fill a box; ends where they do not."""
    start = 0
    while start + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, start)
        if not 8 <= size <= len(content) - start:
            return
        yield kind, content[start + 8 : start + size]
        start += size


def _part(content: bytes, *path: bytes) -> bytes:
    """Content of the first box at a path of types; empty where there is none."""
    for kind in path:
        content = next((inner for found, inner in _boxes(content) if found == kind), b"")
    return content


def _run_lengths(table: bytes) -> np.ndarray:
    """int64 (n,): the values of an stts or ctts table, a run of length and value after the other."""
    count = int.from_bytes(table[4:8], "big")
    runs = table[8 : 8 + 8 * count]
    lengths, values = np.frombuffer(runs[: len(runs) // 8 * 8], dtype=">u4").reshape(-1, 2).T
    return np.repeat(values.astype(np.uint32).view(np.int32).astype(np.int64), lengths)


def _index_boxes(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Type and bytes (header included) of every box of the top level but those with pictures and sound."""
    file_size = file.seek(0, os.SEEK_END)
    start = num_boxes = index_size = 0
    while start < file_size:
        file.seek(start)
        header = file.read(16)
        size, kind = struct.unpack(">I4s", header[:8]) if len(header) >= 8 else (0, b"")
        # A file that begins with two zero bytes is no playlist for any of FFmpeg's formats.
        if start == 0 and (kind != b"ftyp" or not 8 <= size < 2**16):
            raise ValueError(_no_mp4(header))
        if size == 1 and len(header) == 16:
            size = struct.unpack(">Q", header[8:])[0]
        elif size == 0 and len(header) >= 8:
            size = file_size - start  # the last box
        if size < 8 or start + size > file_size:
            raise ValueError(
                f"damaged or truncated: box {kind!r} of {size} bytes at byte {start} of {file_size}: expected 8 to "
                f"{file_size - start}"
            )
        num_boxes += 1
        index_size += 0 if kind == b"mdat" else size
        if num_boxes > MOST_BOXES or index_size > LARGEST_INDEX:
            raise ValueError(f"index too large: expected at most {MOST_BOXES} boxes, {LARGEST_INDEX} bytes, found more")
        if kind != b"mdat":
            file.seek(start)
            yield kind, file.read(size)
        start += size


def _no_mp4(header: bytes) -> str:
    """What to say of a file that begins with `header`, and what to do where it is a known kind of video."""
    text = f"expected an mp4 file, which begins with an ftyp box, found {header[:8]!r}"
    for kind, (place, sign) in _OTHER_KINDS.items():
        if header[place : place + len(sign)] == sign:
            return f"{text}, {kind} file: make it one: ffmpeg -i FILE -c:v libx264 -an OUT.mp4"
    return text


def _check_box(kind: str, content: bytes, start: int, counts: Counter[str]) -> None:
    """Count what a box claims; `start` is where its content begins, with 4 bytes of version and flags."""
    if kind == "cmov":
        raise ValueError("expected an index that is not compressed, found a cmov box")
    if kind == "dref":
        _check_references(content, start)
        return
    numbers = content[start + 4 : start + 12]
    first, second = struct.unpack(">II", numbers.ljust(8, b"\0"))
    if kind in ("stts", "ctts"):
        counts[kind] += first  # runs, and the samples in each
        runs = content[start + 8 : start + 8 + 8 * min(first, MOST_SAMPLES)]
        counts[kind] += sum(length for length, _ in struct.iter_unpack(">II", runs[: len(runs) // 8 * 8]))
    else:
        counts[kind] += second if kind in ("stsz", "stz2") else first
    largest = MOST_EDITS if kind == "elst" else 2 * MOST_SAMPLES if kind in ("stts", "ctts") else MOST_SAMPLES
    if counts[kind] > largest:
        raise ValueError(f"{kind} table too long: expected at most {largest} entries, found {counts[kind]}")
    samples = max(counts["stsz"] + counts["stz2"], counts["trun"])
    if samples * counts["elst"] > 4 * MOST_SAMPLES:
        raise ValueError(
            f"edit lists: expected entries times samples of at most {4 * MOST_SAMPLES}, found {counts['elst']} times "
            f"{samples}"
        )


def _check_references(content: bytes, start: int) -> None:
    """Entries of a dref box: size, type, and a flag that says the data are in the file itself."""
    (number,) = struct.unpack(">I", content[start + 4 : start + 8].ljust(4, b"\0"))
    place = start + 8
    for _ in range(min(number, 64)):
        size, kind, flags = struct.unpack(">I4sI", content[place : place + 12].ljust(12, b"\0"))
        if kind in (b"url ", b"urn ", b"alis", b"rsrc") and not flags & 1:
            raise ValueError(f"expected a video that is all in one file, found a reference to another ({kind!r})")
        place += max(size, 8)
