"""Which frame of a video shows which tick of a log: told by time stamps (docs/data.md, "Frames and ticks")."""

import numpy as np

# How far from its tick, in ticks, a frame may be shown, and by what share a rate of evenly spaced frames may be off.
GRID_TOLERANCE = 0.25
RATE_TOLERANCE = 0.05


def frames_of_ticks(times: np.ndarray, num_ticks: int, fps: float) -> np.ndarray:
    """The frame that shows each tick, from when frames are shown.

    Recorders write N + 1 frames for N lines, the last one twice; N frames are as good. Where such frames are evenly
    spaced at about `fps`, frame t shows tick t. Otherwise a frame that is shown t seconds after the first one shows
    tick `round(t * fps)`, and the last frame must show the last tick or the one after: only then do gaps in the times
    account for the frames that are missing.

    Args:
        times: float64 (n,), seconds, increasing; n at least 1.
        num_ticks: lines of the log.
        fps: ticks a second.

    Returns:
        int64 (num_ticks,), numbers of frames, -1 for a tick without one.

    Raises:
        ValueError: times that are not near the grid of ticks, two frames for one tick, or numbers of frames and lines
            that differ in a way that times do not account for.
    """
    lengths = f"{len(times)} frames, {num_ticks} log lines (N lines have N or N + 1 frames)"
    ticks = even_ticks(times, fps)
    if ticks is None or len(times) - num_ticks not in (0, 1):
        ticks = _grid_ticks(times, fps, lengths)
    last = int(ticks[-1])
    if last - num_ticks not in (-1, 0):
        raise ValueError(
            f"lengths differ: {lengths}, and the time stamps do not tell which frames are missing or too many: the "
            f"last one belongs to tick {last}"
        )
    if last < num_ticks and round(times[0] * fps) == 1:
        raise ValueError(
            f"time stamps: the first frame is shown at {times[0]:g} s, one tick late, and {lengths}: whether it "
            "belongs to the first or to the second line is not known"
        )
    frames = np.full(num_ticks, -1, dtype=np.int64)
    frames[ticks[ticks < num_ticks]] = np.flatnonzero(ticks < num_ticks)
    return frames


def even_ticks(times: np.ndarray, fps: float) -> np.ndarray | None:
    """0, 1, ..., n - 1, int64 (n,), where frames are evenly spaced at a rate near `fps`, else None."""
    ticks = np.arange(len(times))
    if len(times) > 1:
        rate = (len(times) - 1) / max(times[-1] - times[0], 1e-9)
        if abs(rate - fps) > RATE_TOLERANCE * fps or np.abs((times - times[0]) * rate - ticks).max() > GRID_TOLERANCE:
            return None
    return ticks


def frame_rate(times: np.ndarray) -> float | None:
    """Frames a second where none is missing: longer gaps do not count. None for one frame, or all at one time."""
    steps = np.diff(times)
    steps = steps[steps < 1.5 * np.median(steps)] if len(steps) else steps
    return round(float(1 / steps.mean()), 6) if len(steps) and steps.mean() > 0 else None


def _grid_ticks(times: np.ndarray, fps: float, lengths: str) -> np.ndarray:
    """The tick that each frame belongs to, int64 (n,), increasing from 0."""
    exact = (times - times[0]) * fps
    ticks = np.rint(exact)
    distance = np.abs(exact - ticks)
    if distance.max() > GRID_TOLERANCE:
        frame = int((distance > GRID_TOLERANCE).argmax())
        raise ValueError(
            f"time stamps: {lengths}, unevenly spaced, and frame {frame} is shown {exact[frame]:.2f} ticks after the "
            f"first: expected at most {GRID_TOLERANCE:g} from a whole number, at {fps:g} ticks a second"
        )
    if (np.diff(ticks) < 1).any():
        frame = int((np.diff(ticks) < 1).argmax())
        raise ValueError(
            f"time stamps: {lengths}, and frames {frame} and {frame + 1} both belong to tick {int(ticks[frame])}"
        )
    return ticks.astype(np.int64)
