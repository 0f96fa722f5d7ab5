"""What a recording's name says: player, session, recorder version (docs/data.md, "Recordings")."""

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

# The alias may contain dashes and digits; id, date and time do not.
_NAME = re.compile(r"(?P<player>.+)-[^-]+-(?P<date>[0-9]{8})-[0-9]{6}")


def recording_id_of(name: str) -> str:
    """`6.8/<name>.mp4` -> `<name>`: file name without folders and without `.mp4`, `.jsonl`."""
    return PurePosixPath(name).name.removesuffix(".mp4").removesuffix(".jsonl")


def player_id_of(name: str) -> str:
    """Player of a recording: `<alias>-<id>-<date>-<time>` -> `<alias>`; a name of another form is its own player.

    The id says nothing: recorders draw it anew at every death, and the same one first after every launch.
    """
    match = _NAME.fullmatch(recording_id_of(name))
    return match["player"] if match else recording_id_of(name)


def session_id_of(name: str) -> str:
    """Session of a recording: `<alias>-<id>-<date>-<time>` -> `<alias>-<date>`, what a player began on one day.

    A name of another form is its own session.
    """
    match = _NAME.fullmatch(recording_id_of(name))
    return f"{match['player']}-{match['date']}" if match else recording_id_of(name)


def recorder_version_of(path: str) -> str | None:
    """Recorder version of a recording's path: its last folder such as `6.8`, or None where there is none."""
    versions = [part for part in PurePosixPath(path).parts[:-1] if re.fullmatch(r"[0-9]+\.[0-9]+", part)]
    return versions[-1] if versions else None


def version_order(version: str | None) -> tuple[int, ...]:
    """What recorder versions are compared by: 6.13 is newer than 6.9, and no version older than any."""
    return tuple(map(int, version.split("."))) if version else ()


def missing_columns(where: str, missing: Sequence[str], found: Iterable[str]) -> ValueError:
    """The error of clips that lack columns: what is to be done where they were built by the names of before."""
    text = f"{where}: columns {list(missing)} are missing, found {sorted(found)}"
    if "player_id" in missing:
        text += (
            "; data sets of before 0.2 have no player_id, and players in both of their splits: build it again from its "
            "recordings"
        )
    return ValueError(text)
