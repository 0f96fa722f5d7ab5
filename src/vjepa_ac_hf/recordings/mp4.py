"""What an mp4 file claims, checked before FFmpeg believes it (docs/data.md, "What is rejected").

FFmpeg goes by content, not by name: a playlist called `.mp4` makes it open the files and addresses that are listed
there. And it makes tables as long as a header says, out of a file of a few hundred bytes. So the file must be an mp4
file from its first byte, whole, with all of its data in itself, and with tables of sensible lengths. Whether the video
can be decoded is for the decoder to find out.
"""

import os
import re
import struct
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

# Five minutes of video have 6,000 samples, as many per table, and an index of some 100 kB.
MOST_SAMPLES = 2**20  # entries of all tables of one kind: tracks and fragments add up
LARGEST_INDEX = 64 * 2**20  # bytes of everything but pictures and sound
MOST_BOXES = 2**17  # at the top level; a fragment has two
MOST_EDITS = 64  # entries of edit lists: FFmpeg's index grows with their number times that of samples

_LARGEST_FILE_TYPE = 4096
# Box types are searched for wherever they occur, because FFmpeg accepts them in places where they do not belong.
_CHECKED_BOXES = re.compile(rb"stsz|stz2|stts|ctts|trun|elst|cmov|dref")


def check_mp4(file: BinaryIO) -> None:
    """Check that a file is an mp4 file that FFmpeg can be given.

    Args:
        file: opened for reading, at any place; where it is afterwards is not defined.

    Raises:
        ValueError: another format, a truncated file, data kept in other files, or lengths beyond the limits of this
            module; the message says what was found and expected.

    Source: ISO/IEC 14496-12 (boxes and tables).
    """
    counts: Counter[str] = Counter()
    for kind, content in _index_boxes(file):
        for match in _CHECKED_BOXES.finditer(content):
            _check_box(match[0].decode(), content, match.end(), counts)
        if kind == b"ftyp" and len(content) > _LARGEST_FILE_TYPE:
            raise ValueError(f"ftyp box: expected at most {_LARGEST_FILE_TYPE} bytes, found {len(content)}")


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
            raise ValueError(f"expected an mp4 file, which begins with an ftyp box, found {header[:8]!r}")
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
