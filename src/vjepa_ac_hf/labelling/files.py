"""What labelling reads and leaves: videos, logs, confidences, and the part file from which a killed run goes on.

NAME.mp4                  the video
NAME.jsonl                the log: a line a tick; the first one says what wrote it, under "labels"
NAME.confidence.parquet   a row an action
.NAME.labels.part         while it is labelled: a line saying what for, then a line for every batch of windows
"""

import fcntl
import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HEADER = "labels"  # field of a log's first line


class LabelError(ValueError):
    """Labels that cannot be written: whose they are, what is in the way, and both values."""


@dataclass(frozen=True)
class LabelFiles:
    """A video and the files that its labels go to.

    Args:
        video: the video.
        folder: where the labels go.
    """

    video: Path
    folder: Path

    @property
    def name(self) -> str:
        return self.video.stem

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.jsonl"

    @property
    def confidence(self) -> Path:
        return self.folder / f"{self.name}.confidence.parquet"

    @property
    def part(self) -> Path:
        return self.folder / f".{self.name}.labels.part"

    def complete(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The header of labels that are there already, or None.

        Raises:
            LabelError: a log that labelling has not written, labels of another video.
            SettingsError: labels, whole or in part, of other settings.
        """
        for path in (self.log, self.part):
            if not path.exists():
                continue
            header = read_header(path)
            if header is None:
                if path == self.part:
                    continue  # killed before its first line was written
                raise LabelError(
                    f"{path}: expected no log, or one that labelling has written (with {HEADER!r} in its first line), "
                    "found another: it is left as it is; choose another --output"
                )
            _check_settings(path, header["settings"], settings)
            size = self.video.stat().st_size
            if header["video_bytes"] != size:
                raise LabelError(
                    f"{path}: labels of another video: {self.video.name} had {header['video_bytes']} bytes, now "
                    f"{size}; remove the labels to make them anew"
                )
            if path == self.log:
                return header
        return None


class SettingsError(LabelError):
    """Labels of other settings: one folder should not hold both."""


def _check_settings(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    differing = [k for k in expected if found.get(k) != expected[k]]
    if differing:
        both = "; ".join(f"{k}: found {found.get(k)}, expected {expected[k]}" for k in differing)
        raise SettingsError(f"{path}: labels of other settings ({both}); choose another --output or remove them")


def find_videos(names: Sequence[str]) -> list[Path]:
    """Videos by name, folder (all `.mp4` files below it) or pattern (`**` goes through folders), each once.

    Raises:
        LabelError: a name that finds no `.mp4` file.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            matches = sorted(p for p in path.rglob("*.mp4") if not p.name.startswith("."))
        else:
            matches = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(name, recursive=True))
        videos = [p for p in matches if p.suffix == ".mp4" and p.is_file()]
        if not videos:
            raise LabelError(f"--videos {name}: expected a .mp4 file, or a folder or pattern of some, found none")
        found.update(dict.fromkeys(videos))
    unique = {video.resolve(): video for video in reversed(found)}
    return [video for video in found if unique[video.resolve()] == video]


def label_files(videos: Sequence[Path], output: Path | None) -> list[LabelFiles]:
    """Where each video's labels go: beside it, or into `output`.

    Raises:
        LabelError: two videos whose labels would have one name.
    """
    files = [LabelFiles(video, video.parent if output is None else output) for video in videos]
    taken: dict[Path, Path] = {}
    for file in files:
        other = taken.setdefault(file.log, file.video)
        if other != file.video:
            raise LabelError(f"{file.log}: two videos of this name: {other} and {file.video}; label them apart")
    return files


def read_header(path: Path) -> dict[str, Any] | None:
    """What wrote a log or part file, from its first line; None where that does not say so."""
    with open(path, "rb") as file:
        line = file.readline(2**20)
    try:
        value = json.loads(line)
    except ValueError:
        return None
    header = value.get(HEADER) if isinstance(value, dict) else None
    return header if isinstance(header, dict) and isinstance(header.get("settings"), dict) else None


class Part:
    """What has been told of a video so far, on the disk: records of `first`, `actions`, `confidence`, `slots`.

    Args:
        file: open for reading and appending.
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.steps = 0

    def begin(self, header: dict[str, Any]) -> None:
        """Keep the whole lines that are there, or write the first one."""
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            if number:
                record = json.loads(line)
                self.steps = record["first"] + len(record["actions"])
        self._file.truncate(whole)
        if not whole:
            self._write({HEADER: header})

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; it is on the disk when this returns."""
        self._write(record)
        self.steps = record["first"] + len(record["actions"])

    def records(self) -> Iterator[dict[str, Any]]:
        """All records in order, one at a time."""
        self._file.seek(0)
        next(self._file)
        yield from map(json.loads, self._file)

    def _write(self, value: Any) -> None:
        self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(value, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def open_part(files: LabelFiles) -> Iterator[Part]:
    """The part file of a video, for this process alone.

    Raises:
        LabelError: another process labels this video.
    """
    with open(files.part, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LabelError(f"{files.part}: another process labels this video now") from error
        yield Part(file)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Have a file written under another name, then renamed: who finds it finds all of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """A JSON object a line, as they come."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)

    write_whole(path, write)
