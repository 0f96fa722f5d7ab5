"""Which clips figures are of, by a rule that looks at their ids alone (docs/evaluation.md, "The same clips")."""

import hashlib
from typing import Any

# How many clips of a session a rule takes at most. What a rule chooses never changes: another choice is another name.
RULES = {"clips-v1": 16}
_ID_COLUMNS = ("recording_id", "start_tick", "session_id")


def choose_clips(clips: Any, rule: str, limit: int | None = None) -> list[int]:
    """Rows of the clips that a rule chooses, in its order, whatever the order of rows, files and shards.

    A clip's id is "recording_id@start_tick". Of every session the clips with the smallest SHA-256 of their ids are
    taken, as many as `RULES` says, and all of these are put in the order of those hashes; `limit` takes the first.

    Args:
        clips: a `datasets.Dataset`, `ParquetClips` or `ClipRows`.
        rule: of `RULES`.
        limit: how many; None: all that the rule takes.

    Raises:
        ValueError: an unknown rule; clips without ids, or two of one; fewer clips than `limit`, with both numbers.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r} for clips: known are {sorted(RULES)}")
    ids, sessions = _read_ids(clips)
    row_of: dict[str, int] = {}
    for row, clip in enumerate(ids):
        if row_of.setdefault(clip, row) != row:
            raise ValueError(f"rows {row_of[clip]} and {row} are both clip {clip}: {rule} needs ids that differ")
    taken: dict[str, int] = {}
    chosen = []
    for row in sorted(row_of.values(), key=lambda row: hashlib.sha256(ids[row].encode()).digest()):
        taken[sessions[row]] = taken.get(sessions[row], 0) + 1
        if taken[sessions[row]] <= RULES[rule]:
            chosen.append(row)
    if limit is not None and limit > len(chosen):
        raise ValueError(
            f"{rule} chooses {len(chosen)} of {len(ids)} clips (at most {RULES[rule]} of each of {len(taken)} "
            f"sessions), {limit} are asked for"
        )
    return chosen[:limit]


def describe_clips(clips: Any, rule: str | None) -> dict[str, Any]:
    """What results say of the clips that they are of: only those of one digest are of the same clips.

    Returns:
        `rule` (None: no rule chose them), `clips` (how many), `digest`: SHA-256 of the sorted ids, a line each.
    """
    ids, _ = _read_ids(clips)
    return {"rule": rule, "clips": len(ids), "digest": hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()}


def _read_ids(clips: Any) -> tuple[list[str], list[str]]:
    """Ids and sessions of all clips; no other column is read."""
    missing = [column for column in _ID_COLUMNS if column not in clips.column_names]
    if missing:
        raise ValueError(f"clips are named by the columns {_ID_COLUMNS}, but {missing} are missing")
    ids, sessions = [], []
    for row, example in enumerate(clips.select(range(len(clips))).select_columns(list(_ID_COLUMNS))):
        values = [example[column] for column in _ID_COLUMNS]
        if None in values:
            raise ValueError(f"row {row} has no {_ID_COLUMNS[values.index(None)]}: clips are named by {_ID_COLUMNS}")
        ids.append(f"{values[0]}@{values[1]}")
        sessions.append(str(values[2]))
    return ids, sessions
