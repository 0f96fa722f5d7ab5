"""From recordings to data-set rows: splits by session, checks, clips, report (docs/data.md, "Splits", "Report")."""

import difflib
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import datasets
import numpy as np

from ..actions_vjepa2_ac import ACTION_COLUMNS
from ..processing_vjepa2_ac import RESIZE_MODES, resize_frames
from .clips import ClipSpec, aggregate_actions, clip_starts, clip_states, frame_ticks
from .recording import REPAIRS, Recording, RecordingError, parse_recording
from .shards import RecordingPair, Rejection, Shard
from .video import VideoError, VideoReader, draw_cursor, encode_clip

logger = logging.getLogger(__name__)

DEFAULT_VALIDATION_FRACTION = 0.05

# Frames and lines, or frame rates, that differ by a larger share do not belong together.
_TOLERANCE = 0.05


@dataclass(frozen=True)
class BuildOptions:
    """What clips are cut from a recording and how their frames are made.

    Args:
        clip: tick arithmetic.
        resolution: side of the square frames, even (4:2:0 colour).
        resize_mode: `crop` or `squash`, as `resize_frames` takes it.
        draw_cursor: paint the mouse cursor into frames with a GUI open.
        max_gui_fraction: leave out clips with a GUI open in a larger share of their ticks; None keeps all.

    Raises:
        ValueError: values out of range; the message has them.
    """

    clip: ClipSpec = field(default_factory=ClipSpec)
    resolution: int = 256
    resize_mode: str = "crop"
    draw_cursor: bool = False
    max_gui_fraction: float | None = None

    def __post_init__(self) -> None:
        if self.resolution < 2 or self.resolution % 2:
            raise ValueError(f"resolution must be a positive even number of pixels, found {self.resolution}")
        if self.resize_mode not in RESIZE_MODES:
            raise ValueError(f"resize_mode must be one of {RESIZE_MODES}, found {self.resize_mode!r}")
        if self.max_gui_fraction is not None and not 0 <= self.max_gui_fraction <= 1:
            raise ValueError(f"max_gui_fraction must be in [0, 1], found {self.max_gui_fraction}")


@dataclass
class BuildReport:
    """What became of the recordings; parts merge to the report of the whole.

    Attributes:
        recordings: recordings found: accepted ones and rejected ones (second copies and lone halves included).
        accepted: recordings that passed all checks.
        clips: rows built.
        rejected: what was left out, with its reason.
        repairs: ticks touched in accepted recordings, by repair.
        skipped_clips: clips left out by a selection option, by its name.
        other_files: files that belong to no recording.
    """

    recordings: int = 0
    accepted: int = 0
    clips: int = 0
    rejected: list[Rejection] = field(default_factory=list)
    repairs: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REPAIRS, 0))
    skipped_clips: dict[str, int] = field(default_factory=lambda: {"max_gui_fraction": 0})
    other_files: int = 0

    def reject(self, rejection: Rejection) -> None:
        self.recordings += rejection.recording is not None
        self.rejected.append(rejection)
        logger.warning("rejected %s (%s): %s", rejection.recording or "-", rejection.shard, rejection.reason)

    def merge(self, other: "BuildReport") -> "BuildReport":
        self.recordings += other.recordings
        self.accepted += other.accepted
        self.clips += other.clips
        self.other_files += other.other_files
        self.rejected.extend(other.rejected)
        for mine, theirs in ((self.repairs, other.repairs), (self.skipped_clips, other.skipped_clips)):
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count
        return self

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "BuildReport":
        return cls(**{**values, "rejected": [Rejection(**rejection) for rejection in values["rejected"]]})

    def summary(self) -> str:
        """One line: accepted and rejected recordings, and how often each kind of reason."""
        kinds = Counter(rejection.kind for rejection in self.rejected)
        reasons = "".join(f"; {count} x {kind}" for kind, count in kinds.most_common())
        return (
            f"{self.accepted} of {self.recordings} recordings accepted, {self.clips} clips, "
            f"{len(self.rejected)} rejected{reasons}"
        )


def listing_report(shards: Iterable[Shard]) -> BuildReport:
    """The report of what listing alone has found wrong."""
    report = BuildReport()
    for shard in shards:
        report.other_files += shard.other_files
        for rejection in shard.rejected:
            report.reject(rejection)
    return report


def clip_features(spec: ClipSpec) -> datasets.Features:
    """Columns of the data set (docs/data.md, "Columns")."""
    actions = datasets.Array2D((spec.num_tubelets - 1, len(ACTION_COLUMNS)), "float32")
    return datasets.Features(
        {
            "video": datasets.Video(),
            "actions": actions,
            "states": datasets.Array2D((spec.num_tubelets, 2), "float32"),
            "recording_id": datasets.Value("string"),
            "session_id": datasets.Value("string"),
            "start_tick": datasets.Value("int32"),
        }
    )


def session_share(session_id: str) -> float:
    """Place of a session in [0, 1): the first 8 bytes of its name's SHA-256 over 2**64. Stable for ever."""
    return int.from_bytes(hashlib.sha256(session_id.encode()).digest()[:8], "big") / 2**64


def validation_set(
    sessions: Iterable[str],
    validation_fraction: float | None = None,
    validation_sessions: Sequence[str] | None = None,
) -> set[str]:
    """Which sessions are for validation.

    Args:
        sessions: all sessions there are.
        validation_fraction: share of sessions in [0, 1), chosen by `session_share`. None: 0.05, and where that leaves
            a split without sessions, none is for validation (a warning says so).
        validation_sessions: their names, instead of a share.

    Raises:
        ValueError: both options at once, a fraction out of range, an unknown session, a split asked for that comes
            out empty, or none left for training. The message has names and counts.
    """
    known = sorted(set(sessions))
    if validation_sessions is not None:
        if validation_fraction is not None:
            raise ValueError(
                f"give validation_fraction or validation_sessions, found both: {validation_fraction} and "
                f"{list(validation_sessions)}"
            )
        chosen = _named_sessions(known, validation_sessions)
    else:
        fraction = DEFAULT_VALIDATION_FRACTION if validation_fraction is None else validation_fraction
        if not 0 <= fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), found {fraction}")
        chosen = {session for session in known if session_share(session) < fraction}
        if validation_fraction is None and (not chosen or len(chosen) == len(known)):
            logger.warning(
                "a share of %g of %d sessions leaves a split empty: all are for training, none for validation; "
                "name some with validation_sessions",
                fraction,
                len(known),
            )
            return set()
        if fraction > 0 and not chosen:
            raise ValueError(
                f"validation_fraction={fraction} leaves the validation split empty: none of {len(known)} sessions "
                f"falls below it, the lowest share is {min(map(session_share, known), default=math.nan):.3f}; raise "
                "it or name sessions with validation_sessions"
            )
    if known and len(chosen) == len(known):
        raise ValueError(f"the train split is empty: all {len(known)} sessions are for validation: {known}")
    return chosen


def _named_sessions(known: list[str], names: Sequence[str]) -> set[str]:
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError(f"validation_sessions leaves the validation split empty: no name given, {len(known)} known")
    unknown = [name for name in names if name not in known]
    if unknown:
        near = [match for name in unknown for match in difflib.get_close_matches(name, known, n=1)]
        hint = f"did you mean {near}?" if near else f"there are {known[:10]}{' ...' if len(known) > 10 else ''}"
        raise ValueError(
            f"validation_sessions names sessions that no shard has: {unknown}; of {len(known)} sessions {hint}"
        )
    return set(names)


def iter_clips(
    pairs: Iterable[RecordingPair | Rejection], options: BuildOptions, report: BuildReport
) -> Iterator[dict]:
    """Rows of recordings, recording by recording, clips in order of time.

    A recording's clips are yielded once all of them have been made, so that a rejected one leaves no row behind.

    Args:
        pairs: recordings, as `read_pairs` gives them.
        options: what to cut and how.
        report: filled on the way.

    Yields:
        dict: columns of `clip_features`, the video as `{"path", "bytes"}`.
    """
    for pair in pairs:
        if isinstance(pair, Rejection):
            report.reject(pair)
            continue
        try:
            recording, rows, num_skipped = _recording_clips(pair, options)
        except (RecordingError, VideoError) as error:
            report.reject(Rejection(pair.entry.recording_id, pair.shard, str(error)))
            continue
        report.recordings += 1
        report.accepted += 1
        report.clips += len(rows)
        report.skipped_clips["max_gui_fraction"] += num_skipped
        for repair, count in recording.repairs.items():
            report.repairs[repair] += count
        yield from rows


def _recording_clips(pair: RecordingPair, options: BuildOptions) -> tuple[Recording, list[dict], int]:
    name, spec = pair.entry.recording_id, options.clip
    recording = parse_recording(pair.log, f"{name}.jsonl", recorder_version=pair.entry.recorder_version)
    reader = VideoReader(pair.video, f"{name}.mp4")
    recording = _match_video(recording, reader, spec)
    starts = clip_starts(recording.num_ticks, spec)
    if not len(starts):
        raise RecordingError(f"{name}: too short: one clip needs {spec.span} ticks, found {recording.num_ticks}")
    num_clips = len(starts)
    if options.max_gui_fraction is not None:
        gui_share = recording.gui_open[starts[:, None] + np.arange(spec.span)].mean(axis=1)
        starts = starts[gui_share <= options.max_gui_fraction]
    actions = aggregate_actions(recording, starts, spec)
    states = clip_states(recording, starts, spec)
    rows = [
        {
            "video": {
                "path": f"{name}-{start:06d}.mp4",
                "bytes": _clip_video(reader, recording, int(start), options),
            },
            "actions": actions[index],
            "states": states[index],
            "recording_id": name,
            "session_id": pair.entry.session_id,
            "start_tick": int(start),
        }
        for index, start in enumerate(starts)
    ]
    return recording, rows, num_clips - len(starts)


def _match_video(recording: Recording, reader: VideoReader, spec: ClipSpec) -> Recording:
    """Check that log and video belong together; cut the log to the shorter of both."""
    if abs(reader.frame_rate - spec.native_fps) > _TOLERANCE * spec.native_fps:
        raise VideoError(f"{reader.name}: frame rate: expected {spec.native_fps:g} FPS, found {reader.frame_rate:g}")
    lines, frames = recording.num_ticks, reader.num_frames
    if abs(lines - frames) > _TOLERANCE * max(lines, frames):
        raise VideoError(
            f"{reader.name}: lengths differ by more than {_TOLERANCE:.0%}: {frames} frames, {lines} log lines"
        )
    return recording.trim(frames) if lines != frames else recording


def _clip_video(reader: VideoReader, recording: Recording, start: int, options: BuildOptions) -> bytes:
    ticks = frame_ticks(start, options.clip)
    frames = reader.frames(ticks)
    if options.draw_cursor:
        for frame, tick in zip(frames, ticks, strict=True):
            x, y = recording.cursor_x[tick], recording.cursor_y[tick]
            if recording.gui_open[tick] and math.isfinite(x) and math.isfinite(y):
                draw_cursor(frame, x, y)
    return encode_clip(resize_frames(frames, options.resolution, options.resize_mode), options.clip.fps)
