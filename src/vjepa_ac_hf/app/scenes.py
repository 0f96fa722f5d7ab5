"""Scenes: clips of a data set, and videos that a visitor drops."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..actions_vjepa2_ac import ACTION_COLUMNS
from ..evaluation.clips import check_columns, spread
from ..loading.clips import check_clips, check_geometry, clip_name, decode_clip, load_clips
from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from ..recordings.clips import ClipSpec, aggregate_actions, clip_states, frame_ticks
from ..recordings.log import parse_recording
from ..recordings.video import VideoReader, check_frame_rate
from .story import Scene

LONGEST_VIDEO = 3600.0  # seconds of a dropped video: opening one reads through all of its frames
LARGEST_LOG = 64 * 2**20


class Scenes:
    """The clips that a page offers, evenly spaced over a split.

    Args:
        model: a `VJEPA2ACModel`.
        processor: its processor.
        dataset: folder or Hub repository of a built data set.
        split: its split.
        count: how many clips to offer at most.

    Attributes:
        names: what they are called, with their turn.

    Raises:
        ValueError: a data set that is not one for this model.
    """

    def __init__(self, model: VJEPA2ACModel, processor: VJEPA2ACProcessor, dataset: str, *, split: str, count: int):
        self.model, self.processor = model, processor
        check_geometry(dataset, processor)
        clips = load_clips(dataset, split, streaming=True)
        check_columns(clips)
        rows = clips.select(spread(len(clips), count))
        check_clips(rows, processor, dataset)
        self._rows: list[dict[str, Any]] = list(rows)
        yaw = ACTION_COLUMNS.index("yaw_delta")
        self.names = []
        for row in self._rows:
            turn = float(np.asarray(row["actions"], dtype=np.float64)[:, yaw].sum())
            self.names.append(
                f"{row['recording_id']}, {row['start_tick'] / processor.native_fps:g} s, turns {turn:+.0f}°"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def load(self, number: int) -> Scene:
        """A scene of the offered clips.

        Raises:
            ValueError: there is no such clip, or its video cannot be decoded.
        """
        if number not in range(len(self)):
            raise ValueError(f"clips are numbered 0 to {len(self) - 1}, found {number}")
        row = self._rows[number]
        frames = decode_clip(row["video"], clip_name(row), self.processor.frames_per_clip)
        actions, states = (torch.from_numpy(np.asarray(row[c], dtype=np.float64)) for c in ("actions", "states"))
        return make_scene(self.model, self.processor, self.names[number], "", frames, actions, states)


@torch.no_grad()
def make_scene(
    model: VJEPA2ACModel,
    processor: VJEPA2ACProcessor,
    name: str,
    note: str,
    frames: torch.Tensor,
    actions: torch.Tensor | None,
    states: torch.Tensor,
) -> Scene:
    """Frames, resized and encoded; the rest as `Scene` has it."""
    prepared = processor.prepare_frames([frames])
    features = model.encode(processor.normalize_pixels(prepared).to(model.device))[0]
    return Scene(name, note, prepared[0], features, actions, states)


def open_video(
    model: VJEPA2ACModel, processor: VJEPA2ACProcessor, video: Path, log: bytes | None, name: str, second: float
) -> Scene:
    """A scene of a video: one clip of the model's length, that begins at a second.

    Without a log, a video may have any rate: the frames shown at the clip's times are taken. With one, it must be a
    recording: a frame a tick.

    Args:
        model: a `VJEPA2ACModel`.
        processor: its processor.
        video: an mp4 file.
        log: of a VPT recording, or None.
        name: what messages call it.
        second: of the video.

    Raises:
        ValueError: a file that cannot be used, a second beyond its end; the message says what is wrong.
    """
    spec = ClipSpec(processor.native_fps, processor.fps, processor.frames_per_clip, processor.tubelet_size)
    reader = VideoReader(video, name)
    length = reader.num_frames / reader.frame_rate
    if length > LONGEST_VIDEO:
        raise ValueError(f"{name}: too long: a video may last {LONGEST_VIDEO:g} s, found {length:.0f} s; cut it")
    needed = (spec.frames_per_clip - 1) / spec.fps
    if not 0 <= second <= length - needed:
        last = f"from 0 to {length - needed:.1f}" if length > needed else f"of a video longer than {needed:g} s"
        raise ValueError(
            f"{name}: a clip lasts {needed:g} s: it can begin at a second {last}, found {second:g} of {length:.1f}"
        )
    if log is None:
        indices: Sequence[int] = [
            min(round((second + frame / spec.fps) * reader.frame_rate), reader.num_frames - 1)
            for frame in range(spec.frames_per_clip)
        ]
        note = "no log: the view is taken to begin straight ahead, and nothing to be pressed in the context"
        actions, states = None, torch.zeros(spec.num_tubelets, 2, dtype=torch.float64)
    else:
        check_frame_rate(reader, spec.native_fps)
        recording = parse_recording(log, name)
        start = np.array([round(second * spec.native_fps)])
        place = reader.frames_of_ticks(recording.num_ticks, spec.native_fps)
        actions = torch.from_numpy(aggregate_actions(recording, start, spec)[0].astype(np.float64))
        states = torch.from_numpy(clip_states(recording, start, spec)[0].astype(np.float64))
        indices = [int(place[tick]) for tick in frame_ticks(int(start[0]), spec)]
        if min(indices) < 0:
            raise ValueError(f"{name}: the video has no frame for a tick of this clip; choose another second")
        note = ""
    return make_scene(model, processor, name, note, reader.frames(indices), actions, states)
