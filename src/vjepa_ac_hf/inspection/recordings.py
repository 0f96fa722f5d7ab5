"""What recordings as downloaded hold: every repair, reason and oddity counted (docs/data.md, "Checking recordings").

Nothing is built and no picture decoded: a log is read as the builder reads it, and of the video its tables.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..recordings.log import GUI_MOUSE_SCALE, REPAIRS, Recording, RecordingError, parse_recording
from ..recordings.observed import OBSERVED
from ..recordings.shards import LOG_SUFFIX, RecordingPair, Rejection
from ..recordings.video import VideoError, VideoReader

OPTIONS_SUFFIX = "-options.json"
# What the recorder writes into options, and what of it the meaning of a log depends on.
_OPTIONS = ("windowWidth", "windowHeight", "guiScale")
_LARGEST_OPTIONS = 2**20
_LEAST_TICKS = 20  # that a median is taken of
_UNKNOWN_VERSION = "unknown"


def inspect_recording(pair: RecordingPair, *, with_video: bool = True) -> dict[str, Any]:
    """What one recording holds, as JSON.

    Returns:
        `recording`, `shard`, `recorder_version`, `reason` (why it cannot be used, else null); of those that can be used
        `ticks`, `repairs`, `observed`, `other_keys`, `degrees_per_pixel` and `cursor_per_pixel` (`measure_mouse`),
        `options` (those beside the log that are of interest; null without a file), and with the video `frames`,
        `frame_rate`.
    """
    entry = pair.entry
    facts: dict[str, Any] = {
        "recording": entry.recording_id,
        "shard": pair.shard,
        "recorder_version": entry.recorder_version,
        "reason": None,
    }
    try:
        recording = parse_recording(pair.log, entry.recording_id + LOG_SUFFIX, recorder_version=entry.recorder_version)
        video = VideoReader(pair.video, f"{entry.recording_id}.mp4") if with_video else None
    except (RecordingError, VideoError) as error:
        return facts | {"reason": str(error)}
    degrees, cursor = measure_mouse(recording)
    facts |= {
        "ticks": recording.num_ticks,
        "repairs": {name: count for name, count in recording.repairs.items() if count},
        "observed": {name: count for name, count in recording.observed.items() if count},
        "other_keys": recording.other_keys,
        "degrees_per_pixel": degrees,
        "cursor_per_pixel": cursor,
        "options": read_options(entry.log.path) if entry.log.offset is None else None,
    }
    return facts if video is None else facts | {"frames": video.num_frames, "frame_rate": video.frame_rate}


def measure_mouse(recording: Recording) -> tuple[float | None, float | None]:
    """What a pixel of `mouse_dx` does: medians over ticks, None of fewer than 20.

    Returns:
        Degrees of yaw from a tick to the next with no GUI open (0.15 is expected), and pixels of the cursor with one
        open, after the repair `mouse_scaled` (the same for all versions and players, if its table is right and they
        have the same GUI scale).
    """
    moved = np.abs(recording.mouse_dx[:-1]) >= 1
    turn = (np.diff(recording.yaw) + 180) % 360 - 180
    found = []
    for change, during in ((turn, ~recording.gui_open), (np.diff(recording.cursor_x), recording.gui_open)):
        used = moved & during[:-1] & during[1:] & np.isfinite(change)
        ratios = change[used] / recording.mouse_dx[:-1][used]
        found.append(round(float(np.median(ratios)), 5) if len(ratios) >= _LEAST_TICKS else None)
    return found[0], found[1]


def read_options(log: str) -> dict[str, Any] | None:
    """Window size and GUI scale of the options beside a log; None where there is no such file.

    A file that cannot be read counts as one without these fields.
    """
    path = Path(log.removesuffix(LOG_SUFFIX) + OPTIONS_SUFFIX)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes()[: _LARGEST_OPTIONS + 1])
    except (ValueError, RecursionError):
        values = None
    values = values if isinstance(values, dict) else {}
    return {name: values[name] if isinstance(values.get(name), int | float) else None for name in _OPTIONS}


def summarize(facts: Sequence[Mapping[str, Any]], rejected: Iterable[Rejection] = ()) -> dict[str, Any]:
    """Counts over recordings: of all, and of each recorder version.

    Args:
        facts: of `inspect_recording`.
        rejected: what listing has found wrong (doubled recordings, lone halves, damaged shards).

    Returns:
        `all` and `versions` (by name), each with `recordings`, `usable`, `ticks`; `rejected` by kind of reason;
        `repairs` and `observed`, each `{"number": ticks or occurrences, "recordings": how many have any}`; `other_keys`
        (ticks by key); `extra_frames` (recordings by frames less lines: 1 is what the recorder writes), `frame_rates`,
        `degrees_per_pixel`, `cursor_per_pixel` (`[lowest, median, highest]`, null without any), `windows` and
        `gui_scales` (recordings by the options beside them).
    """
    every = [*facts, *({"recording": r.recording, "shard": r.shard, "reason": r.reason} for r in rejected)]
    versions = sorted({fact["recorder_version"] or _UNKNOWN_VERSION for fact in facts}, key=_version_order)
    of = {v: [fact for fact in facts if (fact["recorder_version"] or _UNKNOWN_VERSION) == v] for v in versions}
    return {"all": _count(every), "versions": {version: _count(chosen) for version, chosen in of.items()}}


def _version_order(version: str) -> list[int]:
    return [int(part) if part.isdigit() else -1 for part in version.split(".")]


def _count(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    usable = [fact for fact in facts if fact["reason"] is None]
    kinds = Counter(Rejection(f["recording"], f["shard"], f["reason"]).kind for f in facts if f["reason"] is not None)
    keys: Counter[str] = Counter()
    for fact in usable:
        keys.update(fact["other_keys"])
    options = [fact["options"] for fact in usable if fact["options"] is not None]
    with_video = [fact for fact in usable if "frames" in fact]
    return {
        "recordings": len(facts),
        "usable": len(usable),
        "ticks": sum(fact["ticks"] for fact in usable),
        "rejected": dict(kinds.most_common()),
        "repairs": _totals([fact["repairs"] for fact in usable], REPAIRS),
        "observed": _totals([fact["observed"] for fact in usable], OBSERVED),
        "other_keys": dict(sorted(keys.items(), key=lambda item: (-item[1], item[0]))),
        "extra_frames": _tally(fact["frames"] - fact["ticks"] for fact in with_video),
        "frame_rates": _tally(round(fact["frame_rate"], 2) for fact in with_video),
        "degrees_per_pixel": _spread(fact["degrees_per_pixel"] for fact in usable),
        "cursor_per_pixel": _spread(fact["cursor_per_pixel"] for fact in usable),
        "windows": _tally(f"{option['windowWidth']}x{option['windowHeight']}" for option in options),
        "gui_scales": _tally(option["guiScale"] for option in options),
    }


def _totals(parts: Sequence[Mapping[str, int]], names: Sequence[str]) -> dict[str, dict[str, int]]:
    return {
        name: {"number": sum(part.get(name, 0) for part in parts), "recordings": sum(name in part for part in parts)}
        for name in names
    }


def _tally(values: Iterable[Any]) -> dict[str, int]:
    return {str(value): count for value, count in Counter(values).most_common()}


def _spread(values: Iterable[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return [min(known), float(np.median(known)), max(known)] if known else None


def describe(summary: Mapping[str, Any]) -> str:
    """The counts as text: a part for all recordings, then a line for each version."""
    found = summary["all"]
    lines = [f"{found['usable']} of {found['recordings']} recordings can be used, {found['ticks']} ticks"]
    lines += [f"  rejected {count:>7}  {kind}" for kind, count in found["rejected"].items()]
    for title in ("repairs", "observed"):
        present = {name: count for name, count in found[title].items() if count["number"]}
        lines.append(f"{title}: " + ("" if present else "none"))
        lines += [f"  {name:<28}{c['number']:>9} in {c['recordings']} recordings" for name, c in present.items()]
    for title, name in (
        ("keys without a column, ticks", "other_keys"),
        ("frames less lines, recordings (1 is what the recorder writes)", "extra_frames"),
        ("frames a second, recordings", "frame_rates"),
        ("window, recordings", "windows"),
        ("GUI scale, recordings", "gui_scales"),
    ):
        shown = ", ".join(f"{value}: {count}" for value, count in list(found[name].items())[:12])
        lines.append(f"{title}: {shown or 'none known'}")
    lines.append("by recorder version: recordings, usable, without a slot; a pixel's degrees, cursor pixels in GUIs")
    for version, part in summary["versions"].items():
        scale = f" (logged x{GUI_MOUSE_SCALE[version]:g})" if version in GUI_MOUSE_SCALE else ""
        medians = (part["degrees_per_pixel"], part["cursor_per_pixel"])
        mouse = ", ".join("-" if spread is None else f"{spread[1]:g}" for spread in medians)
        without = part["repairs"]["no_hotbar"]["recordings"]
        lines.append(f"  {version:<8}{part['recordings']:>7}{part['usable']:>7}{without:>7}   {mouse}{scale}")
    return "\n".join(lines)
