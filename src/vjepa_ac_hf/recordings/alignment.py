"""Are log and video in step? Estimated from the pictures alone (docs/data.md, "Alignment check").

When the view turns, the picture moves sideways: its shift from frame v to v + 1 must follow the yaw change that the log
has for the same tick. The lag at which it follows best tells whether line t of the log belongs to frame t, to a whole
tick: the game draws frames between two ticks, so that up to one tick is jitter.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from ..actions_vjepa2_ac import wrap_degrees
from .log import Recording, RecordingError, parse_recording
from .shards import RecordingPair
from .video import VideoError, VideoReader

VERDICTS = ("aligned", "shifted", "drifting", "mirrored", "undecided", "rejected")
FLAGGED_VERDICTS = ("shifted", "drifting", "mirrored")

# Pictures are compared at this size, whatever the video's: a degree is about 1.1 pixels at Minecraft's default field of
# view, and decoding costs more than everything else. Shifts are in pixels of this size.
PICTURE_HEIGHT, PICTURE_WIDTH = 90, 160
# (top, bottom, left, right) of the tiles, overlapping by a third. Below row 68 lie hotbar and status; the tile that
# would hold the player's hand is left out.
_TILE_HEIGHT, _TILE_WIDTH = 26, 68
TILES: tuple[tuple[int, int, int, int], ...] = tuple(
    (top, top + _TILE_HEIGHT, left, left + _TILE_WIDTH)
    for top in (4, 22, 41)
    for left in (0, 46, 92)
    if not (top == 41 and left == 92)
)
_BOTTOM = 67
# Standard deviation of grey values over the picture below which there is nothing to see (darkness, loading screens),
# and mean change of grey values below which the picture is the same, but for the coder's noise.
DARK_CONTRAST, STATIC_CHANGE = 3.0, 0.3
# Tiles see one turn: where their shifts spread (median absolute deviation) more than this, in pixels plus a share of
# the shift (at the edges perspective makes it larger), it is no turn, or no match.
_LARGEST_SPREAD, _RELATIVE_SPREAD = 1.5, 0.1
# Degrees a tick beyond which too little of the picture is in both frames.
LARGEST_TURN = 20.0

# Turning goes on for some ticks: the bootstrap resamples blocks of one second.
BLOCK_TICKS = 20
NUM_RESAMPLES = 1000
# What a lag must have to count: see docs/LOG.md for how often the verdict is then wrong.
MIN_PAIRS, MIN_TURNING_PAIRS, TURNING_DEGREES = 60, 20, 0.5
MIN_SUPPORT, MIN_CORRELATION = 0.95, 0.3
# Pictures compared at once; frames decoded at once, which lie in memory in full size.
_FRAMES_AT_ONCE, _FRAMES_DECODED = 64, 16


@dataclass(frozen=True)
class AlignmentOptions:
    """What is looked at, and what counts as out of step.

    Args:
        max_lag: lags from -max_lag to max_lag are tried, in ticks.
        max_ticks: frame pairs read per recording, in windows spread evenly over it.
        num_windows: windows; each is also judged on its own, to find a lag that changes.
        flag_over: lags up to this many ticks, and differences of lags between windows, count as in step.

    Raises:
        ValueError: values out of range; the message has them.
    """

    max_lag: int = 10
    max_ticks: int = 1600
    num_windows: int = 4
    flag_over: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_lag", 1), ("num_windows", 1), ("flag_over", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, found {getattr(self, name)}")
        if self.max_ticks < self.num_windows * MIN_PAIRS:
            raise ValueError(
                f"max_ticks must be at least {MIN_PAIRS} for each of {self.num_windows} windows, found {self.max_ticks}"
            )
        if self.flag_over >= self.max_lag:
            raise ValueError(f"flag_over must be below max_lag={self.max_lag}, found {self.flag_over}")


@dataclass(frozen=True)
class LagEstimate:
    """The lag of a recording or of one window of it.

    Attributes:
        lag: ticks; the video shows at frame t + lag what line t of the log says. None where undecided.
        reason: why it is undecided, with numbers; empty where it is not.
        best_lag: where the correlation is largest in absolute value, decided or not; None without any correlation.
        correlation: at `best_lag`; negative where the picture moves against the log.
        correlations: at lags -max_lag .. max_lag; None where it is not defined.
        margin: |correlation| at `best_lag` less the next largest.
        support: share of bootstrap resamples with the same best lag and sign.
        interval: 95 % of the resamples' best lags lie in it, ends included.
        degrees_per_width: degrees of yaw for a shift by the picture's width, by least squares at `best_lag`; about the
            horizontal field of view, negative where mirrored.
        pairs: frame pairs used at `best_lag`.
        turning_pairs: those of them in which the log turns by `TURNING_DEGREES` or more.
    """

    lag: int | None
    reason: str
    best_lag: int | None = None
    correlation: float | None = None
    correlations: tuple[float | None, ...] = ()
    margin: float | None = None
    support: float | None = None
    interval: tuple[int, int] | None = None
    degrees_per_width: float | None = None
    pairs: int = 0
    turning_pairs: int = 0


@dataclass(frozen=True)
class AlignmentResult:
    """What was found about one recording.

    Attributes:
        recording, shard, recorder_version: which.
        verdict: one of `VERDICTS`.
        reason: what it rests on; for `rejected`, what is wrong with the files.
        estimate: over all windows; None where rejected.
        windows: `(first frame, frame after the last, estimate)` of each.
        excluded: frame pairs looked at and left out, by cause (the first that holds): `gui` open in the log within
            max_lag ticks, `dark`, `static`, `disagreeing` tiles; and `fast_turns`, ticks of the log with more than
            `LARGEST_TURN` degrees.
        lines, frames: of the log and of the video.
        seconds: time taken.
    """

    recording: str | None
    shard: str
    recorder_version: str | None
    verdict: str
    reason: str
    estimate: LagEstimate | None = None
    windows: tuple[tuple[int, int, LagEstimate], ...] = ()
    excluded: dict[str, int] = field(default_factory=dict)
    lines: int | None = None
    frames: int | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the estimate's fields stand beside the recording's."""
        values = asdict(self)
        estimate = values.pop("estimate") or {}
        reason = estimate.pop("reason", None)
        windows = [{"start": start, "end": end, **window} for start, end, window in values.pop("windows")]
        return {**values, **estimate, "undecided_reason": reason or None, "windows": windows}


# -------------------------------------------------------------------------------------------------- pictures


def picture_shifts(frames: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """How far the picture moves to the left from each frame to the next.

    Phase correlation of the grey values' gradients in `TILES`; the shift is the median over tiles, which share a turn
    of the view but not the motion of single things, nor the expansion of the picture in walking.

    Args:
        frames: uint8 (N, H, W), grey, H and W being `PICTURE_HEIGHT` and `PICTURE_WIDTH`.

    Returns:
        shift: float64 (N - 1,), pixels, positive where the view turns right; NaN where it cannot be told.
        cause: str (N - 1,), why it cannot: "dark", "static", "disagreeing", or "".

    Raises:
        ValueError: frames of another size.

    Source: phase correlation, Kuglin and Hines 1975; docs/data.md, "Alignment check".
    """
    if frames.shape[1:] != (PICTURE_HEIGHT, PICTURE_WIDTH):
        raise ValueError(f"frames must be (N, {PICTURE_HEIGHT}, {PICTURE_WIDTH}), found {tuple(frames.shape)}")
    grey = frames.float()
    down, across = torch.zeros_like(grey), torch.zeros_like(grey)
    down[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    across[:, :, 1:-1] = grey[:, :, 2:] - grey[:, :, :-2]
    gradient = torch.complex(across, down)
    tiles = torch.stack([gradient[:, top:bottom, left:right] for top, bottom, left, right in TILES], dim=1)
    shifts = _phase_correlation(tiles).numpy()
    shift = np.median(shifts, axis=1)
    spread = np.median(np.abs(shifts - shift[:, None]), axis=1)

    seen = grey[:, :_BOTTOM]
    contrast = seen.std(dim=(1, 2)).numpy()
    change = (seen[1:] - seen[:-1]).abs().mean(dim=(1, 2)).numpy()
    cause = np.full(len(shift), "", dtype="<U11")
    cause[spread > _LARGEST_SPREAD + _RELATIVE_SPREAD * np.abs(shift)] = "disagreeing"
    cause[change < STATIC_CHANGE] = "static"
    cause[np.minimum(contrast[:-1], contrast[1:]) < DARK_CONTRAST] = "dark"
    return np.where(cause == "", shift, np.nan), cause


def _phase_correlation(tiles: torch.Tensor) -> torch.Tensor:
    """Motion to the left, in pixels, of tiles complex (N, K, h, w) from each to the next: (N - 1, K)."""
    height, width = tiles.shape[-2:]
    window = torch.hann_window(height)[:, None] * torch.hann_window(width)
    spectrum = torch.fft.fft2((tiles - tiles.mean(dim=(-2, -1), keepdim=True)) * window)
    cross = spectrum[:-1].conj() * spectrum[1:]
    size = cross.abs()
    cross = cross / (size + 1e-3 * size.mean(dim=(-2, -1), keepdim=True) + 1e-9)
    # Frequencies near the sampling limit hold the coder's noise; the bell also gives the peak a width to interpolate.
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)
    surface = torch.fft.ifft2(cross * torch.exp(-9.67 * (rows**2 + columns**2))).real
    row, column = torch.div(peak := surface.flatten(-2).argmax(-1), width, rounding_mode="floor"), peak % width
    n, k = torch.meshgrid(torch.arange(len(surface)), torch.arange(surface.shape[1]), indexing="ij")
    before, top, after = (surface[n, k, row, (column + step) % width] for step in (-1, 0, 1))
    fraction = 0.5 * (before - after) / (before - 2 * top + after).clamp(max=-1e-9)
    return -((column + width // 2) % width - width // 2 + fraction.clamp(-0.5, 0.5))


def grey_pictures(video: VideoReader, frames: Sequence[int]) -> torch.Tensor:
    """Frames as uint8 (n, `PICTURE_HEIGHT`, `PICTURE_WIDTH`).

    The green channel, which is most of the brightness, by means over areas.

    Raises:
        VideoError: a frame that does not exist or cannot be decoded.
    """
    pictures = []
    for first in range(0, len(frames), _FRAMES_DECODED):
        green = video.frames(frames[first : first + _FRAMES_DECODED])[:, 1:2]
        small = torch.nn.functional.interpolate(green.float(), (PICTURE_HEIGHT, PICTURE_WIDTH), mode="area")
        pictures.append(small[:, 0].round().to(torch.uint8))
    return torch.cat(pictures)


# ------------------------------------------------------------------------------------------------------- lag


def lag_correlations(shift: np.ndarray, yaw_change: np.ndarray, max_lag: int) -> np.ndarray:
    """Correlation of shift at v with yaw change at v - lag over the v where both are known.

    Args:
        shift: float (n,), of the picture from frame v to v + 1; NaN where not known.
        yaw_change: float (n,), of the log from line t to t + 1; NaN where not known.
        max_lag: ticks.

    Returns:
        float64 (2 * max_lag + 1,), lags -max_lag .. max_lag; NaN where fewer than two pairs are known or one side does
        not vary.
    """
    return _correlations(_moments(shift, yaw_change, max_lag, block=max(len(shift), 1)).sum(axis=-1))


def _moments(shift: np.ndarray, yaw_change: np.ndarray, max_lag: int, block: int) -> np.ndarray:
    """Sums of 1, x, y, xx, yy, xy over the known pairs of each block: float64 (6, lags, blocks)."""
    n = len(shift)
    turns = np.full((2 * max_lag + 1, n), np.nan)
    for row, lag in enumerate(range(-max_lag, max_lag + 1)):
        if abs(lag) < n:
            turns[row, max(lag, 0) : n + min(lag, 0)] = yaw_change[max(-lag, 0) : n - max(lag, 0)]
    known = np.isfinite(turns) & np.isfinite(shift)
    x = np.where(known, shift, 0.0)
    y = np.where(known, turns, 0.0)
    terms = np.stack([known.astype(np.float64), x, y, x * x, y * y, x * y])
    terms = np.pad(terms, ((0, 0), (0, 0), (0, -n % block)))
    return terms.reshape(*terms.shape[:2], -1, block).sum(axis=-1)


def _correlations(sums: np.ndarray) -> np.ndarray:
    """Pearson's correlation from the sums of `_moments`, (6, ...) -> (...)."""
    count, x, y, xx, yy, xy = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        variance_x, variance_y = xx - x * x / count, yy - y * y / count
        correlation = (xy - x * y / count) / np.sqrt(variance_x * variance_y)
    varies = (count >= 2) & (variance_x > 1e-9 * (1 + xx)) & (variance_y > 1e-9 * (1 + yy))
    return np.where(varies, np.clip(correlation, -1, 1), np.nan)


def estimate_lag(shift: np.ndarray, yaw_change: np.ndarray, max_lag: int = 10) -> LagEstimate:
    """The lag at which the picture's shift follows the log's yaw change, and how sure it is.

    The best lag is that of the largest absolute correlation. It is decided if the correlation reaches
    `MIN_CORRELATION` and if, of `NUM_RESAMPLES` bootstrap resamples of whole blocks of `BLOCK_TICKS` ticks (turning
    goes on for some ticks: single ticks are not independent), a share of `MIN_SUPPORT` has the same best lag and sign.

    Args:
        shift: float (n,), pixels, of the picture from frame v to v + 1 (`picture_shifts`); NaN where not known.
        yaw_change: float (n,), degrees, of the log from line t to t + 1; NaN where not known.
        max_lag: lags from -max_lag to max_lag are tried, in ticks.

    Raises:
        ValueError: arrays of different lengths.

    Source: block bootstrap, Kuensch 1989 (Annals of Statistics 17:1217); docs/data.md, "Alignment check".
    """
    if shift.shape != yaw_change.shape or shift.ndim != 1:
        raise ValueError(f"shift and yaw_change must be (n,) alike, found {shift.shape} and {yaw_change.shape}")
    moments = _moments(shift, yaw_change, max_lag, BLOCK_TICKS)
    moments = moments[:, :, moments[0].any(axis=0)]
    totals = moments.sum(axis=-1)
    turning = _turning_pairs(shift, yaw_change, max_lag)
    correlations = _correlations(totals)
    if np.isnan(correlations).all():
        reason = _too_little(int(totals[0].max()), int(turning.max())) or "the picture or the log never turns"
        return LagEstimate(None, reason, pairs=int(totals[0].max()), turning_pairs=int(turning.max()))

    heights = _heights(correlations)
    best = int(heights.argmax())
    correlation = float(correlations[best])
    rng = np.random.default_rng(0)
    blocks = moments.shape[-1]
    draws = rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=NUM_RESAMPLES)
    resampled = _correlations(moments @ draws.T.astype(np.float64))  # (lags, resamples)
    resampled_best = _heights(resampled).argmax(axis=0)
    same_sign = np.sign(resampled[resampled_best, np.arange(NUM_RESAMPLES)]) == np.sign(correlation)
    support = float(((resampled_best == best) & same_sign).mean())
    low, high = np.quantile(resampled_best - max_lag, [0.025, 0.975], method="closest_observation")
    pairs, turning_pairs = int(totals[0, best]), int(turning[best])
    return LagEstimate(
        lag=best - max_lag if not (reason := _doubt(pairs, turning_pairs, correlation, support)) else None,
        reason=reason,
        best_lag=best - max_lag,
        correlation=correlation,
        correlations=tuple(None if np.isnan(value) else float(value) for value in correlations),
        margin=float(heights[best] - np.delete(heights, best).max()),
        support=support,
        interval=(int(low), int(high)),
        degrees_per_width=_degrees_per_width(totals[:, best]),
        pairs=pairs,
        turning_pairs=turning_pairs,
    )


def _heights(correlations: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(correlations), 0.0, np.abs(correlations))


def _turning_pairs(shift: np.ndarray, yaw_change: np.ndarray, max_lag: int) -> np.ndarray:
    """Known pairs of each lag in which the log turns: (lags,)."""
    turns = np.where(np.abs(yaw_change) >= TURNING_DEGREES, yaw_change, np.nan)
    return _moments(shift, turns, max_lag, block=max(len(shift), 1))[0].sum(axis=-1)


def _degrees_per_width(sums: np.ndarray) -> float | None:
    count, x, y, _, yy, xy = sums
    # The error is in the shift: it is regressed on the yaw change, not the other way round.
    slope = (xy - x * y / count) / (yy - y * y / count)
    return float(PICTURE_WIDTH / slope) if abs(slope) > 1e-6 else None


def _too_little(pairs: int, turning_pairs: int) -> str:
    if pairs < MIN_PAIRS:
        return f"too few usable frame pairs: {pairs}, at least {MIN_PAIRS} are needed"
    if turning_pairs < MIN_TURNING_PAIRS:
        return f"too little turning: {turning_pairs} usable pairs turn, at least {MIN_TURNING_PAIRS} are needed"
    return ""


def _doubt(pairs: int, turning_pairs: int, correlation: float, support: float) -> str:
    """Why an estimate does not count, with numbers; empty where it does."""
    if reason := _too_little(pairs, turning_pairs):
        return reason
    if abs(correlation) < MIN_CORRELATION:
        return f"no clear peak: largest correlation {correlation:.2f}, at least {MIN_CORRELATION} is needed"
    if support < MIN_SUPPORT:
        return f"no clear peak: {support:.1%} of resamples agree on the lag, {MIN_SUPPORT:.1%} are needed"
    return ""


# ------------------------------------------------------------------------------------------------- recordings


def check_recording(pair: RecordingPair, options: AlignmentOptions | None = None) -> AlignmentResult:
    """Decode a bounded part of a recording at low resolution and judge whether log and video are in step.

    What cannot be read has the verdict `rejected` and its reason; nothing is raised for it.
    """
    began = time.monotonic()
    entry = pair.entry
    try:
        found = _check(pair, options or AlignmentOptions())
    except (RecordingError, VideoError) as error:
        found = {"verdict": "rejected", "reason": str(error)}
    return AlignmentResult(
        recording=entry.recording_id,
        shard=pair.shard,
        recorder_version=entry.recorder_version,
        seconds=round(time.monotonic() - began, 3),
        **found,
    )


def _check(pair: RecordingPair, options: AlignmentOptions) -> dict[str, Any]:
    name = pair.entry.recording_id
    recording = parse_recording(pair.log, f"{name}.jsonl", recorder_version=pair.entry.recorder_version)
    video = VideoReader(pair.video, f"{name}.mp4")
    lines = recording.num_ticks
    frames_of_ticks = video.frames_of_ticks(lines, video.frame_rate)
    if lines < 2:
        raise RecordingError(f"{name}: too short: expected at least 2 log lines, found {lines}")
    windows = sample_windows(lines - 1, options)
    shift, cause = decode_shifts(video, windows, frames_of_ticks)
    return {**assess(recording, shift, cause, windows, options), "lines": lines, "frames": video.num_frames}


def decode_shifts(
    video: VideoReader, windows: Sequence[tuple[int, int]], frames_of_ticks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`picture_shifts` from each tick in `windows` to the next: shift float64 and cause str, both (ticks - 1,).

    Ticks outside are "unread"; where one of both has no frame, the cause is "missing".

    Args:
        video: the recording's.
        windows: (first, after last) pair of ticks of each.
        frames_of_ticks: int64 (ticks,), see `VideoReader.frames_of_ticks`.

    Raises:
        VideoError: a frame that cannot be decoded.
    """
    num_pairs, frames = len(frames_of_ticks) - 1, np.maximum.accumulate(frames_of_ticks)
    missing = (frames_of_ticks[:-1] < 0) | (frames_of_ticks[1:] < 0)
    shift, cause = np.full(num_pairs, np.nan), np.full(num_pairs, "unread", dtype="<U11")
    for start, end in windows:
        for first in range(start, end, _FRAMES_AT_ONCE):
            last = min(first + _FRAMES_AT_ONCE, end)
            shift[first:last], cause[first:last] = picture_shifts(
                grey_pictures(video, frames[first : last + 1].tolist())
            )
    cause[missing & (cause != "unread")] = "missing"
    return np.where(missing, np.nan, shift), cause


def assess(
    recording: Recording,
    shift: np.ndarray,
    cause: np.ndarray,
    windows: Sequence[tuple[int, int]],
    options: AlignmentOptions,
) -> dict[str, Any]:
    """Verdict, reason, estimate, windows and excluded pairs (`AlignmentResult`) from what `decode_shifts` returns."""
    num_pairs = len(shift)
    yaw_change = yaw_changes(recording)[:num_pairs]
    # Which frames show the GUI is known from the log alone, whose lag is not known: any lag looked at is allowed for.
    near_gui = _near(recording.gui_open, options.max_lag)[:num_pairs]
    cause = np.where(near_gui & ~np.isin(cause, ("unread", "missing")), "gui", cause)
    shift = np.where(near_gui, np.nan, shift)
    whole = estimate_lag(shift, yaw_change, options.max_lag)
    parts = []
    for start, end in windows:
        inside = np.full(num_pairs, np.nan)
        inside[start:end] = shift[start:end]
        parts.append((start, end, estimate_lag(inside, yaw_change, options.max_lag)))
    verdict, reason = judge(whole, [part for _, _, part in parts], options)
    excluded = {name: int((cause == name).sum()) for name in ("gui", "missing", "dark", "static", "disagreeing")}
    excluded["fast_turns"] = int(_fast_turns(recording).sum())
    return {
        "verdict": verdict,
        "reason": reason,
        "estimate": whole,
        "windows": tuple(parts),
        "excluded": excluded,
    }


def sample_windows(num_pairs: int, options: AlignmentOptions) -> list[tuple[int, int]]:
    """(first, after last) frame pair of each window: all of a short recording, else spread evenly from start to end."""
    count = min(options.num_windows, max(num_pairs // MIN_PAIRS, 1))
    length = min(num_pairs, options.max_ticks) // count
    starts = np.linspace(0, num_pairs - length, count).round().astype(int).tolist()
    return [(start, start + length) for start in starts]


def yaw_changes(recording: Recording) -> np.ndarray:
    """float64 (n - 1,): circular yaw change in degrees from line t to t + 1; NaN with a GUI open and in fast turns."""
    change = wrap_degrees(np.diff(recording.yaw))
    gui = recording.gui_open[:-1] | recording.gui_open[1:]
    return np.where(gui | _fast_turns(recording), np.nan, change)


def _fast_turns(recording: Recording) -> np.ndarray:
    return np.abs(wrap_degrees(np.diff(recording.yaw))) > LARGEST_TURN


def _near(flags: np.ndarray, distance: int) -> np.ndarray:
    """bool (n - 1,): pairs (v, v + 1) with a flag within `distance` ticks."""
    near = np.convolve(flags, np.ones(2 * distance + 1), mode="full")[distance : distance + len(flags)] > 0
    return near[:-1] | near[1:]


def judge(whole: LagEstimate, windows: Sequence[LagEstimate], options: AlignmentOptions) -> tuple[str, str]:
    """Verdict and reason from the estimate over all windows and that of each."""
    lags = {window.lag for window in windows if window.lag is not None}
    if whole.lag is not None:
        lags.add(whole.lag)
    if lags and max(lags) - min(lags) > options.flag_over:
        shown = ", ".join("?" if window.lag is None else str(window.lag) for window in windows)
        return "drifting", f"lags of the windows from start to end: {shown} (?: undecided)"
    if whole.lag is None:
        return "undecided", whole.reason
    assert whole.correlation is not None and whole.support is not None
    numbers = f"lag {whole.lag}, correlation {whole.correlation:.2f}, {whole.support:.1%} of resamples agree"
    if whole.correlation < 0:
        return "mirrored", f"the picture moves against the log's yaw: {numbers}"
    if abs(whole.lag) > options.flag_over:
        if abs(whole.lag) == options.max_lag:
            numbers += f"; the largest lag tried is {options.max_lag}, the true one may lie beyond"
        return "shifted", numbers
    return "aligned", numbers
