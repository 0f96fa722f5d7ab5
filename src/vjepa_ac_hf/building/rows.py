"""From recordings to data-set rows: checks, clips, and the report of what became of them (docs/data.md, "Report")."""

import logging
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

import datasets
import numpy as np
import torch

from ..actions_vjepa2_ac import ACTION_COLUMNS
from ..processing_vjepa2_ac import resize_frames
from ..recordings.clips import ClipSpec, aggregate_actions, clip_starts, clip_states, frame_ticks
from ..recordings.log import REPAIRS, Recording, RecordingError, parse_recording
from ..recordings.observed import OBSERVED
from ..recordings.shards import RecordingPair, Rejection, Shard
from ..recordings.video import VideoError, VideoReader, check_frame_rate, draw_cursor, encode_clip
from .selection import CLIP_SELECTIONS, RECORDING_SELECTIONS, BuildOptions, select_clips

logger = logging.getLogger(__name__)

# Frames in full size that are held at once.
_FRAMES_AT_ONCE = 16


@dataclass
class RecordingReport:
    """What became of one accepted recording.

    Attributes:
        recording, session, player, shard: where it comes from.
        split: the split its clips are in; None where splits are made elsewhere.
        ticks: lines of the log.
        gui_ticks: those with a GUI open.
        clips: rows built.
        repairs: ticks touched, by repair; those that touched none are left out.
        skipped_clips: clips left out, by the option; those that left out none are left out.
        observed: what is doubtful and left as it is, by name; what does not occur is left out.
    """

    recording: str
    session: str
    player: str
    shard: str
    split: str | None
    ticks: int
    gui_ticks: int
    clips: int
    repairs: dict[str, int]
    skipped_clips: dict[str, int]
    observed: dict[str, int] = field(default_factory=dict)


@dataclass
class BuildReport:
    """What became of the recordings; parts merge to the report of the whole.

    Attributes:
        recordings: recordings found: accepted, rejected (second copies and lone halves included) and skipped ones.
        accepted: recordings that passed all checks.
        clips: rows built.
        rejected: what was left out, with its reason.
        repairs: ticks touched in accepted recordings, by repair.
        observed: what accepted recordings hold that is doubtful and left as it is, by name (`OBSERVED`).
        other_keys: ticks of accepted recordings with each key that has no column.
        skipped_clips: clips left out by a selection option, by its name, or for `unsure` ticks.
        skipped_recordings: recordings left out, unread, by a selection option, by its name.
        other_files: files that belong to no recording.
        per_recording: an entry for every accepted recording.
    """

    recordings: int = 0
    accepted: int = 0
    clips: int = 0
    rejected: list[Rejection] = field(default_factory=list)
    repairs: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REPAIRS, 0))
    observed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OBSERVED, 0))
    other_keys: dict[str, int] = field(default_factory=dict)
    skipped_clips: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLIP_SELECTIONS, 0))
    skipped_recordings: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RECORDING_SELECTIONS, 0))
    other_files: int = 0
    per_recording: list[RecordingReport] = field(default_factory=list)

    def accept(self, recording: RecordingReport, other_keys: dict[str, int]) -> None:
        self.recordings += 1
        self.accepted += 1
        self.clips += recording.clips
        self.per_recording.append(recording)
        for name in ("repairs", "skipped_clips", "observed"):
            _add_counts(getattr(self, name), getattr(recording, name))
        _add_counts(self.other_keys, other_keys)

    def skip(self, recordings: dict[str, int]) -> None:
        self.recordings += sum(recordings.values())
        _add_counts(self.skipped_recordings, recordings)

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
        self.per_recording.extend(other.per_recording)
        for name in ("repairs", "observed", "other_keys", "skipped_clips", "skipped_recordings"):
            _add_counts(getattr(self, name), getattr(other, name))
        return self

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "BuildReport":
        lists = {
            "rejected": [Rejection(**rejection) for rejection in values["rejected"]],
            "per_recording": [RecordingReport(**recording) for recording in values["per_recording"]],
        }
        return cls(**{**values, **lists})

    def summary(self) -> str:
        """One line: accepted and rejected recordings, and how often each kind of reason."""
        kinds = Counter(rejection.kind for rejection in self.rejected)
        reasons = "".join(f"; {count} x {kind}" for kind, count in kinds.most_common())
        return (
            f"{self.accepted} of {self.recordings} recordings accepted, {self.clips} clips, "
            f"{len(self.rejected)} rejected{reasons}"
        )


def _add_counts(total: dict[str, int], part: dict[str, int]) -> None:
    for name, count in part.items():
        total[name] = total.get(name, 0) + count


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
            "player_id": datasets.Value("string"),
            "start_tick": datasets.Value("int32"),
        }
    )


def iter_clips(
    pairs: Iterable[RecordingPair | Rejection], options: BuildOptions, report: BuildReport, split: str | None = None
) -> Iterator[dict]:
    """Rows of recordings, recording by recording, clips in order of time.

    A recording's clips are yielded once all of them have been made, so that a rejected one leaves no row behind.

    Args:
        pairs: recordings, as `read_pairs` gives them.
        options: what to cut and how.
        report: filled on the way.
        split: what the report calls the split.

    Yields:
        dict: columns of `clip_features`, the video as `{"path", "bytes"}`.
    """
    for pair in pairs:
        if isinstance(pair, Rejection):
            report.reject(pair)
            continue
        try:
            recording, rows, skipped = _recording_clips(pair, options)
        except (RecordingError, VideoError) as error:
            report.reject(Rejection(pair.entry.recording_id, pair.shard, str(error)))
            continue
        report.accept(
            RecordingReport(
                recording=pair.entry.recording_id,
                session=pair.entry.session_id,
                player=pair.entry.player_id,
                shard=pair.shard,
                split=split,
                ticks=recording.num_ticks,
                gui_ticks=int(recording.gui_open.sum()),
                clips=len(rows),
                repairs={name: count for name, count in recording.repairs.items() if count},
                skipped_clips={name: count for name, count in skipped.items() if count},
                observed={name: count for name, count in recording.observed.items() if count},
            ),
            recording.other_keys,
        )
        yield from rows


def _recording_clips(pair: RecordingPair, options: BuildOptions) -> tuple[Recording, list[dict], dict[str, int]]:
    """A recording's log, rows, and how many clips each selection option has left out."""
    name, spec = pair.entry.recording_id, options.clip
    recording = parse_recording(
        pair.log,
        f"{name}.jsonl",
        recorder_version=pair.entry.recorder_version,
        skip_repairs=options.skip_repairs,
        hotbar_injection=options.hotbar_injection,
    )
    reader = VideoReader(pair.video, f"{name}.mp4")
    frames_of_ticks = _match_video(recording, reader, options)
    starts = clip_starts(recording.num_ticks, spec)
    if not len(starts):
        raise RecordingError(f"{name}: too short: one clip needs {spec.span} ticks, found {recording.num_ticks}")
    starts, skipped = select_clips(
        recording, name, starts, options, pair.entry.max_clips, has_frame=frames_of_ticks >= 0
    )
    over_pause = recording.after_pause[starts[:, None] + np.arange(1, spec.span)].any(axis=1)
    recording.observed["clips_over_pause"] = int(over_pause.sum())
    actions = aggregate_actions(recording, starts, spec)
    states = clip_states(recording, starts, spec)
    rows = [
        {
            "video": {"path": f"{name}-{start:06d}.mp4", "bytes": encode_clip(frames, spec.fps)},
            "actions": actions[index],
            "states": states[index],
            "recording_id": name,
            "session_id": pair.entry.session_id,
            "player_id": pair.entry.player_id,
            "start_tick": int(start),
        }
        for index, (start, frames) in enumerate(
            zip(starts, _clip_frames(reader, recording, starts, frames_of_ticks, options), strict=True)
        )
    ]
    return recording, rows, skipped


def _match_video(recording: Recording, reader: VideoReader, options: BuildOptions) -> np.ndarray:
    """The frame of each tick, int64 (ticks,), -1 for ticks without one, which are counted as a repair."""
    check_frame_rate(reader, options.clip.native_fps)
    frames = reader.frames_of_ticks(recording.num_ticks, options.clip.native_fps)
    missing = recording.repairs["frames_timed"] = int((frames < 0).sum())
    if missing and "frames_timed" in options.skip_repairs:
        raise VideoError(
            f"{reader.name}: {missing} of {recording.num_ticks} ticks have no frame, and the repair 'frames_timed' is "
            "switched off"
        )
    return frames


def _clip_frames(
    reader: VideoReader, recording: Recording, starts: np.ndarray, frames_of_ticks: np.ndarray, options: BuildOptions
) -> Iterator[torch.Tensor]:
    """Frames uint8 (frames_per_clip, 3, height, width) of each clip, in one pass over the video.

    Ticks that several clips need, or that lie between those of an overlapping clip, are decoded and resized once and
    held until the last of these clips has been cut: at most one clip's span of small frames.
    """
    ticks = [frame_ticks(start, options.clip) for start in starts]
    waiting = deque(sorted({tick for clip in ticks for tick in clip}))
    held: dict[int, torch.Tensor] = {}
    for clip in ticks:
        while waiting and waiting[0] <= clip[-1]:
            chunk: list[int] = []
            while waiting and waiting[0] <= clip[-1] and len(chunk) < _FRAMES_AT_ONCE:
                chunk.append(waiting.popleft())
            frames = reader.frames(frames_of_ticks[chunk].tolist())
            held.update(zip(chunk, _resized_frames(frames, recording, chunk, options), strict=True))
        yield torch.stack([held[tick] for tick in clip])
        held = {tick: frame for tick, frame in held.items() if tick > clip[0]}


def _resized_frames(
    frames: torch.Tensor, recording: Recording, ticks: list[int], options: BuildOptions
) -> torch.Tensor:
    if options.draw_cursor:
        for frame, tick in zip(frames, ticks, strict=True):
            x, y = recording.cursor_x[tick], recording.cursor_y[tick]
            if recording.gui_open[tick] and math.isfinite(x) and math.isfinite(y):
                draw_cursor(frame, x, y)
    return resize_frames(frames, options.resolution, options.resize_mode)
