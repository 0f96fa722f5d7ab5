"""A video as the clips that a head reads: overlapping windows, decoded front to back, in bounded memory."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..configuration_encoder_vjepa2_ac import Resolution
from ..processing_vjepa2_ac import resize_frames
from ..recordings.clips import ClipSpec
from ..recordings.video import VideoReader

FRAMES_AT_ONCE = 16  # frames in full size that are held together


@dataclass(frozen=True)
class Window:
    """Consecutive tubelets of a video.

    Args:
        start: the first tubelet.
        tubelets: how many.
        told: of its actions, how many the window before tells.
    """

    start: int
    tubelets: int
    told: int

    @property
    def actions(self) -> range:
        """The video's actions that this window tells."""
        return range(self.start + self.told, self.start + self.tubelets - 1)


def count_tubelets(num_frames: int, spec: ClipSpec) -> int:
    """Tubelets of a video whose frames are all there; tubelet k starts at frame `k * spec.ticks_per_tubelet`."""
    last = spec.stride * (spec.tubelet_size - 1)  # frames from a tubelet's first to its last
    return max((num_frames - 1 - last) // spec.ticks_per_tubelet + 1, 0)


def plan_windows(num_tubelets: int, length: int) -> list[Window]:
    """Windows of `length` tubelets that tell every action of a video once.

    The last tubelet of a window is the first of the next. The last window ends with the video: it is moved back to be
    whole, and the actions that the one before tells are not taken from it. A video that is shorter is one window.
    """
    if num_tubelets < 2:
        return []
    if num_tubelets <= length:
        return [Window(0, num_tubelets, 0)]
    starts = list(range(0, num_tubelets - length + 1, length - 1))
    windows = [Window(start, length, 0) for start in starts]
    left = num_tubelets - (starts[-1] + length)
    return windows + ([Window(num_tubelets - length, length, length - 1 - left)] if left else [])


def read_windows(
    reader: VideoReader,
    windows: Sequence[Window],
    spec: ClipSpec,
    resolution: Resolution,
    resize_mode: str,
    batch_size: int,
) -> Iterator[tuple[list[Window], Tensor]]:
    """Frames of windows, some at a time.

    Every frame is decoded and resized once; one window's small frames are held beside the batch.

    Args:
        reader: the video.
        windows: in the order of their starts.
        spec: the clips' arithmetic.
        resolution: side of the small frames in pixels, or (height, width).
        resize_mode: see `resize_frames`.
        batch_size: windows a batch.

    Yields:
        Windows of one length, and their frames, uint8 `(windows, frames, 3, height, width)`.
    """
    ticks = {window: _ticks(window, spec) for window in windows}
    waiting = deque(sorted({tick for of_window in ticks.values() for tick in of_window}))
    held: dict[int, Tensor] = {}
    for _, same in groupby(windows, key=lambda window: window.tubelets):
        batch: list[Window] = []
        clips: list[Tensor] = []
        whole = list(same)
        for window in whole:
            first, last = ticks[window][0], ticks[window][-1]
            held = {tick: frame for tick, frame in held.items() if tick >= first}
            while waiting and waiting[0] <= last:
                chunk = [waiting.popleft() for _ in range(FRAMES_AT_ONCE) if waiting and waiting[0] <= last]
                held.update(zip(chunk, resize_frames(reader.frames(chunk), resolution, resize_mode), strict=True))
            batch.append(window)
            clips.append(torch.stack([held[tick] for tick in ticks[window]]))
            if len(batch) == batch_size or window == whole[-1]:
                frames = torch.stack(clips)
                clips.clear()
                yield batch, frames
                batch = []


def _ticks(window: Window, spec: ClipSpec) -> list[int]:
    first = window.start * spec.ticks_per_tubelet
    return [first + spec.stride * frame for frame in range(window.tubelets * spec.tubelet_size)]
