"""What is built: options of clips, and which recordings and clips are left out (docs/data.md, "Selection")."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from ..configuration_encoder_vjepa2_ac import Resolution, as_resolution, frame_shape
from ..processing_vjepa2_ac import RESIZE_MODES
from ..recordings.clips import ClipSpec, frame_ticks
from ..recordings.log import Recording, check_repairs
from ..recordings.shards import Shard
from ..recordings.slots import check_hotbar_injection
from ..recordings.splits import stable_share

# What leaves out clips of a recording, in the order in which it is asked, and the options for whole recordings. Clips
# that lack a frame or have unsure ticks are always left out, the others as options say.
CLIP_SELECTIONS = (
    "missing_frames",
    "unsure",
    "max_gui_fraction",
    "min_action_fraction",
    "clip_fraction",
    "max_clips_per_session",
)
RECORDING_SELECTIONS = ("exclude", "session_fraction", "max_clips_per_session")


@dataclass(frozen=True)
class BuildOptions:
    """What clips are cut from a recording and how their frames are made.

    Args:
        clip: tick arithmetic.
        resolution: side of the frames in pixels, or (height, width), even (4:2:0 colour).
        resize_mode: `crop` or `squash`, as `resize_frames` takes it.
        draw_cursor: paint the mouse cursor into frames with a GUI open.
        skip_repairs: repairs (`REPAIRS`) that are not done.
        hotbar_injection: the tick of the number key that stands for a change of slot, "cause" or "vpt".
        max_gui_fraction: leave out clips with a GUI open in a larger share of their ticks; None keeps all.
        min_action_fraction: leave out clips with any input in a smaller share of the ticks that their actions cover;
            None keeps all.
        clip_fraction: share of clips to keep, chosen by `clip_share`; None keeps all.

    Raises:
        ValueError: values out of range; the message has them.
    """

    clip: ClipSpec = field(default_factory=ClipSpec)
    resolution: Resolution = 256
    resize_mode: str = "crop"
    draw_cursor: bool = False
    skip_repairs: tuple[str, ...] = ()
    hotbar_injection: str = "cause"
    max_gui_fraction: float | None = None
    min_action_fraction: float | None = None
    clip_fraction: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "resolution", as_resolution(self.resolution))
        if any(side % 2 for side in frame_shape(self.resolution)):
            raise ValueError(f"resolution must be a positive even number of pixels, found {self.resolution}")
        if self.resize_mode not in RESIZE_MODES:
            raise ValueError(f"resize_mode must be one of {RESIZE_MODES}, found {self.resize_mode!r}")
        check_repairs(self.skip_repairs)
        check_hotbar_injection(self.hotbar_injection)
        for name in ("max_gui_fraction", "min_action_fraction"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} must be in [0, 1], found {share}")
        _check_share("clip_fraction", self.clip_fraction)


@dataclass(frozen=True)
class Selection:
    """Which recordings are built, decided from their names alone, before any of them is read.

    Args:
        exclude: recording ids to leave out, such as those that `check_alignment.py` has flagged.
        session_fraction: share of sessions to keep, by a stable hash of their names; None keeps all.
        max_clips_per_session: clips to keep of one session at most, divided among its recordings; None keeps all.

    Raises:
        ValueError: values out of range; the message has them.
    """

    exclude: tuple[str, ...] = ()
    session_fraction: float | None = None
    max_clips_per_session: int | None = None

    def __post_init__(self) -> None:
        _check_share("session_fraction", self.session_fraction)
        if self.max_clips_per_session is not None and self.max_clips_per_session < 1:
            raise ValueError(f"max_clips_per_session must be at least 1, found {self.max_clips_per_session}")


def options_from(values: Mapping[str, Any]) -> BuildOptions:
    """`BuildOptions` from a flat mapping such as a builder's configuration; other keys are left alone."""
    chosen = {option.name: values[option.name] for option in fields(BuildOptions) if option.name != "clip"}
    check_repairs(chosen["skip_repairs"])
    chosen["skip_repairs"] = tuple(sorted(set(chosen["skip_repairs"])))
    return BuildOptions(clip=ClipSpec(**{spec.name: values[spec.name] for spec in fields(ClipSpec)}), **chosen)


def selection_from(values: Mapping[str, Any]) -> Selection:
    """`Selection` from a flat mapping such as a builder's configuration; other keys are left alone.

    Raises:
        ValueError: `exclude` is one string in place of a list of recording ids, or a value out of range.
    """
    chosen = {option.name: values[option.name] for option in fields(Selection)}
    if isinstance(chosen["exclude"], str):
        raise ValueError(f"exclude must be a list of recording ids, found {chosen['exclude']!r}")
    return Selection(**{**chosen, "exclude": tuple(sorted(set(chosen["exclude"])))})


def _check_share(name: str, share: float | None) -> None:
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"{name} must be in (0, 1], found {share}")


def clip_share(recording_id: str, start: int) -> float:
    """Place of a clip in [0, 1), as `stable_share` of `<recording>@<tick>`: does not depend on other clips."""
    return stable_share(f"{recording_id}@{start}")


def select_recordings(shards: Sequence[Shard], selection: Selection) -> tuple[list[Shard], dict[str, int]]:
    """The shards with the recordings that are to be built, and how many each option has left out.

    The clips that a session may have are divided evenly among its recordings (in the order of their names, the first
    ones taking what is left over), because no recording is read to know how many it has: it is a limit, not a target.
    """
    excluded, skipped = set(selection.exclude), dict.fromkeys(RECORDING_SELECTIONS, 0)
    sessions: dict[str, list[str]] = {}
    for shard in shards:
        for entry in shard.entries:
            share = stable_share(f"selected {entry.session_id}")  # independent of the share that chooses validation
            if entry.recording_id in excluded:
                skipped["exclude"] += 1
            elif selection.session_fraction is not None and share >= selection.session_fraction:
                skipped["session_fraction"] += 1
            else:
                sessions.setdefault(entry.session_id, []).append(entry.recording_id)
    limits: dict[str, int | None] = {}
    for recordings in sessions.values():
        for place, recording in enumerate(sorted(recordings)):
            limit = _share_of(selection.max_clips_per_session, place, len(recordings))
            if limit == 0:
                skipped["max_clips_per_session"] += 1
            else:
                limits[recording] = limit
    selected = []
    for shard in shards:
        kept = [entry for entry in shard.entries if entry.recording_id in limits]
        entries = [replace(entry, max_clips=limits[entry.recording_id]) for entry in kept]
        selected.append(replace(shard, entries=entries))
    return selected, skipped


def _share_of(limit: int | None, place: int, parts: int) -> int | None:
    return None if limit is None else limit // parts + (place < limit % parts)


def select_clips(
    recording: Recording,
    name: str,
    starts: np.ndarray,
    options: BuildOptions,
    max_clips: int | None,
    *,
    has_frame: np.ndarray,
) -> tuple[np.ndarray, dict[str, int]]:
    """Starts of the clips to keep, in order of time, and how many each of `CLIP_SELECTIONS` has left out.

    Args:
        recording: a parsed recording.
        name: its id.
        starts: (clips,) first ticks of all clips.
        options: what to leave out.
        max_clips: how many to keep at most; None keeps all.
        has_frame: bool (ticks,), whether the video shows a tick.
    """
    span = np.arange(options.clip.span)
    acted = np.arange(options.clip.ticks_per_tubelet * (options.clip.num_tubelets - 1))
    skipped = dict.fromkeys(CLIP_SELECTIONS, 0)

    def keep(option: str, wanted: np.ndarray) -> None:
        nonlocal starts
        skipped[option] = int((~wanted).sum())
        starts = starts[wanted]

    keep("missing_frames", has_frame[starts[:, None] + np.array(frame_ticks(0, options.clip))].all(axis=1))
    keep("unsure", np.logical_not(recording.unsure[starts[:, None] + acted].any(axis=1)))
    if options.max_gui_fraction is not None:
        keep("max_gui_fraction", recording.gui_open[starts[:, None] + span].mean(axis=1) <= options.max_gui_fraction)
    if options.min_action_fraction is not None:
        share = recording.has_input[starts[:, None] + acted].mean(axis=1)
        keep("min_action_fraction", share >= options.min_action_fraction)
    if options.clip_fraction is not None or max_clips is not None:
        shares = np.array([clip_share(name, start) for start in starts])
        if options.clip_fraction is not None:
            keep("clip_fraction", shares < options.clip_fraction)
            shares = shares[shares < options.clip_fraction]
        if max_clips is not None:
            keep("max_clips_per_session", shares.argsort().argsort() < max_clips)
    return starts, skipped
