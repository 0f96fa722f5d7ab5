"""Lag of log and video from the pictures: known shifts in real videos, a brute-force oracle, the program's files."""

import io
import itertools
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import python_forks
import torch
from helpers_data import DATA, LUANTI, name_of, to_log, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st
from torchcodec.encoders import VideoEncoder

from vjepa_ac_hf.console import report
from vjepa_ac_hf.recordings import alignment
from vjepa_ac_hf.recordings.alignment import (
    PICTURE_HEIGHT,
    PICTURE_WIDTH,
    AlignmentOptions,
    LagEstimate,
    assess,
    check_recording,
    decode_shifts,
    estimate_lag,
    judge,
    lag_correlations,
    picture_shifts,
    sample_windows,
    yaw_changes,
)
from vjepa_ac_hf.recordings.log import parse_recording
from vjepa_ac_hf.recordings.shards import Member, RecordingEntry, RecordingPair, list_shards, read_pairs
from vjepa_ac_hf.recordings.video import VideoReader

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "dataset_scripts" / "check_alignment.py"
FULL = Path(os.environ.get("VJEPA_AC_LUANTI", ROOT.parent / "shared" / "data" / "luanti-vpt"))

TICKS = 480
HEIGHT, WIDTH = 120, 208
PIXELS_PER_DEGREE = 2.5
GUI = range(200, 216)


# ------------------------------------------------------------------------------------------- synthetic recordings


def smooth(noise: np.ndarray, width: int) -> np.ndarray:
    """Box blur along both axes, the right edge joined to the left."""
    for axis in (0, 1):
        noise = sum(np.roll(noise, step, axis) for step in range(width)) / width
    return noise


def make_panorama(seed: int) -> np.ndarray:
    """360 degrees of random texture, blobs of several sizes: float (rows, 360 degrees)."""
    rng = np.random.default_rng(seed)
    shape = (HEIGHT + 80, int(360 * PIXELS_PER_DEGREE))
    picture = sum(smooth(rng.normal(size=shape), width) * width for width in (2, 5, 12))
    return np.clip(110 + 35 * picture, 0, 255)


def make_angles(ticks: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Yaw and pitch of a view that turns at rates drawn every few ticks, and rests now and then; degrees."""
    rng = np.random.default_rng(seed)
    yaw_rate, pitch_rate = np.zeros(ticks), np.zeros(ticks)
    tick = 0
    while tick < ticks:
        length = int(rng.integers(2, 9))
        if rng.random() < 0.7:
            yaw_rate[tick : tick + length] = rng.normal(0, 3)
            pitch_rate[tick : tick + length] = rng.normal(0, 0.5)
        tick += length
    return np.cumsum(yaw_rate), np.clip(np.cumsum(pitch_rate), -12, 12)


def view(panorama: np.ndarray, yaw: float, pitch: float) -> np.ndarray:
    """What is seen: the panorama's part around yaw, to a fraction of a pixel, with hotbar, hand and crosshair."""
    offset = yaw * PIXELS_PER_DEGREE
    whole, part = int(np.floor(offset)), offset - np.floor(offset)
    columns = np.arange(whole, whole + WIDTH + 1) % panorama.shape[1]
    top = 40 + round(pitch * PIXELS_PER_DEGREE)
    wide = panorama[top : top + HEIGHT, columns]
    picture = (1 - part) * wide[:, :-1] + part * wide[:, 1:]
    picture[-14:, 50:-50] = 200
    picture[-45:, -40:] = 140
    picture[HEIGHT // 2 - 1 : HEIGHT // 2 + 1, WIDTH // 2 - 4 : WIDTH // 2 + 4] = 255
    return picture


def render(yaw: np.ndarray, pitch: np.ndarray, seed: int) -> np.ndarray:
    panorama = make_panorama(seed)
    frames = np.stack([view(panorama, *angles) for angles in zip(yaw, pitch, strict=True)])
    if len(frames) > GUI.stop:
        frames[GUI.start : GUI.stop] = 90
        frames[GUI.start : GUI.stop, 20:90, 40:150] = 180
    return frames


def encode(frames: np.ndarray) -> bytes:
    pictures = torch.from_numpy(frames).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous()
    encoder = VideoEncoder(pictures, frame_rate=20)
    return (
        encoder.to_tensor("mp4", codec="libx264", pixel_format="yuv420p", crf=26, preset="ultrafast").numpy().tobytes()
    )


def lines_of(yaw: np.ndarray, pitch: np.ndarray, seed: int = 0) -> list[dict]:
    """Log lines; the yaw jumps by whole turns now and then, and by anything while the GUI is open."""
    rng = np.random.default_rng(seed)
    jumps = 360.0 * np.cumsum(rng.integers(-1, 2, size=len(yaw)) * (rng.random(len(yaw)) < 0.05))
    lines = []
    for tick in range(len(yaw)):
        gui = tick in GUI
        angle = float(rng.uniform(-180, 180)) if gui else float(yaw[tick] + jumps[tick])
        lines.append(
            {
                "mouse": {"x": 640.0, "y": 360.0, "dx": 0.0, "dy": 0.0, "buttons": [], "newButtons": []},
                "keyboard": {"keys": []},
                "isGuiOpen": gui,
                "hotbar": 0,
                "yaw": angle,
                "pitch": float(pitch[tick]),
            }
        )
    return lines


def shifted(items, lag: int):
    """Items of which line t is what line t + lag was, the ends repeated: the video is then `lag` frames late."""
    indices = np.clip(np.arange(len(items)) + lag, 0, len(items) - 1)
    return [items[index] for index in indices]


def pair_of(lines: list[dict] | bytes, video: bytes | str) -> RecordingPair:
    entry = RecordingEntry(name_of("0123456789ab"), "6.8", Member("a.mp4"), Member("a.jsonl"))
    return RecordingPair(entry, "shard-000000.tar", lines if isinstance(lines, bytes) else to_log(lines), video)


@pytest.fixture(scope="module")
def play():
    """Yaw, pitch, frames, video and log of a recording in step."""
    yaw, pitch = make_angles(TICKS, seed=1)
    frames = render(yaw, pitch, seed=1)
    return {"yaw": yaw, "pitch": pitch, "frames": frames, "video": encode(frames), "lines": lines_of(yaw, pitch)}


# ---------------------------------------------------------------------------------------------------- correlation


def oracle_correlation(shift: list[float], turn: list[float], lag: int) -> float:
    """Pearson's correlation by loops, over the v for which both are known."""
    both = []
    for v in range(len(shift)):
        t = v - lag
        if 0 <= t < len(turn) and not np.isnan(shift[v]) and not np.isnan(turn[t]):
            both.append((shift[v], turn[t]))
    if len(both) < 2:
        return np.nan
    mean_x = sum(x for x, _ in both) / len(both)
    mean_y = sum(y for _, y in both) / len(both)
    xx = sum((x - mean_x) ** 2 for x, _ in both)
    yy = sum((y - mean_y) ** 2 for _, y in both)
    if xx < 1e-9 or yy < 1e-9:
        return np.nan
    return sum((x - mean_x) * (y - mean_y) for x, y in both) / (xx * yy) ** 0.5


values = st.one_of(st.just(float("nan")), st.integers(-40, 40).map(lambda x: x / 4))


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(values, values), max_size=25), st.integers(1, 6))
def test_correlations_equal_loops(rows, max_lag):
    shift, turn = (np.array([row[side] for row in rows], dtype=np.float64) for side in (0, 1))
    found = lag_correlations(shift, turn, max_lag)
    expected = [oracle_correlation(list(shift), list(turn), lag) for lag in range(-max_lag, max_lag + 1)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_missing_pairs_are_left_out_not_zero():
    turn = np.random.default_rng(0).normal(size=300) + 5
    shift = np.roll(turn, 2)
    shift[::3] = np.nan
    turn[::7] = np.nan
    assert lag_correlations(shift, turn, 4)[4 + 2] == pytest.approx(1)


@pytest.mark.parametrize("lag", range(-10, 11))
def test_estimate_of_noisy_series(lag):
    rng = np.random.default_rng(lag + 50)
    turn = np.convolve(rng.normal(size=1000), np.ones(4), mode="same")
    shift = np.full(1000, np.nan)
    for v in range(1000):
        if 0 <= v - lag < 1000:
            shift[v] = 1.5 * turn[v - lag] + rng.normal()
    estimate = estimate_lag(shift, turn)
    assert estimate.lag == estimate.best_lag == lag and estimate.interval == (lag, lag)
    assert estimate.correlation == pytest.approx(oracle_correlation(list(shift), list(turn), lag))
    assert estimate.margin == pytest.approx(
        estimate.correlation - max(abs(c) for i, c in enumerate(estimate.correlations) if i != lag + 10)
    )
    assert estimate.degrees_per_width == pytest.approx(PICTURE_WIDTH / 1.5, rel=0.05)


def test_unrelated_series_are_undecided():
    """Of 100 pairs of smooth series that have nothing to do with each other, none gets a lag."""
    decided = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        turn, shift = (np.convolve(rng.normal(size=400), np.ones(6), mode="same") for _ in range(2))
        decided += estimate_lag(shift, turn).lag is not None
    assert decided == 0


def test_estimate_says_why_it_is_undecided():
    rng = np.random.default_rng(0)
    turn = rng.normal(size=400)
    few = np.full(400, np.nan)
    few[100:140] = turn[100:140]
    assert estimate_lag(few, turn).reason == "too few usable frame pairs: 40, at least 60 are needed"
    still = np.where(np.arange(400) < 10, turn, 0)
    assert "too little turning:" in estimate_lag(still, still).reason
    assert "the picture or the log never turns" in estimate_lag(np.zeros(400), turn).reason
    slow = 3 * np.sin(np.arange(400) / 15)  # neighbouring lags can hardly be told apart
    estimate = estimate_lag(slow + rng.normal(size=400), slow)
    assert estimate.lag is None and "of resamples agree" in estimate.reason and estimate.correlation > 0.5
    with pytest.raises(ValueError, match=r"found \(3,\) and \(4,\)"):
        estimate_lag(np.zeros(3), np.zeros(4))


# ------------------------------------------------------------------------------------------------------- pictures


def small(panorama: np.ndarray, across: float, down: float = 0) -> np.ndarray:
    """The part of a panorama at (down, across), picture size, by bilinear interpolation."""
    rows = 30 + down + np.arange(PICTURE_HEIGHT)
    columns = 100 + across + np.arange(PICTURE_WIDTH)
    row, column = np.floor(rows).astype(int)[:, None], np.floor(columns).astype(int)[None]
    a, b = (rows - np.floor(rows))[:, None], (columns - np.floor(columns))[None]
    corner = [[panorama[row + i, column + j] for j in (0, 1)] for i in (0, 1)]
    return (1 - a) * ((1 - b) * corner[0][0] + b * corner[0][1]) + a * ((1 - b) * corner[1][0] + b * corner[1][1])


def test_shifts_of_known_motion():
    rng = np.random.default_rng(0)
    steps = np.concatenate([rng.uniform(-3, 3, 30), rng.uniform(-16, 16, 30)])
    places = np.cumsum(steps) - np.cumsum(steps).min()
    heights = rng.uniform(-3, 3, 60)
    frames = np.stack([small(make_panorama(0), *place) for place in zip(places, heights, strict=True)])
    frames[:, 68:] = 255  # a HUD
    shift, cause = picture_shifts(torch.from_numpy(frames).round().to(torch.uint8))
    assert (cause == "").mean() > 0.9
    error = (shift - np.diff(places))[cause == ""]
    assert np.abs(error).max() < 1 and np.sqrt((error**2).mean()) < 0.25


def test_pictures_without_a_shift():
    rng = np.random.default_rng(0)
    picture = small(make_panorama(0), 0)
    noise = rng.uniform(0, 255, (2, PICTURE_HEIGHT, PICTURE_WIDTH))
    dark = np.full((2, PICTURE_HEIGHT, PICTURE_WIDTH), 4.0)
    dark[:, 70:] = rng.uniform(0, 255, (2, 20, PICTURE_WIDTH))  # the HUD is still there
    frames = np.concatenate([[picture, picture], noise, dark])
    shift, cause = picture_shifts(torch.from_numpy(frames).round().to(torch.uint8))
    assert list(cause) == ["static", "disagreeing", "disagreeing", "dark", "dark"]
    assert np.isnan(shift).all()


# ----------------------------------------------------------------------------------------------------- recordings


@pytest.mark.parametrize("lag", range(-3, 4))
def test_lag_of_shifted_logs(play, lag):
    result = check_recording(pair_of(shifted(play["lines"], lag), play["video"]))
    assert result.verdict == ("shifted" if lag else "aligned"), result
    assert result.estimate.lag == lag and result.estimate.correlation > 0.9
    assert {estimate.lag for _, _, estimate in result.windows} <= {lag, None}
    expected = WIDTH / PIXELS_PER_DEGREE
    assert result.estimate.degrees_per_width == pytest.approx(expected, rel=0.08)
    assert result.recorder_version == "6.8" and result.lines == result.frames == TICKS


def test_repair_by_dropping_frames(play):
    """`lag: 3` is repaired by dropping the first 3 frames of the video."""
    lines = shifted(play["lines"], 3)[:-3]
    assert check_recording(pair_of(lines, encode(play["frames"][:-3]))).estimate.lag == 3
    assert check_recording(pair_of(lines, encode(play["frames"][3:]))).verdict == "aligned"


def test_flag_over(play):
    pair = pair_of(shifted(play["lines"], 2), play["video"])
    result = check_recording(pair, AlignmentOptions(flag_over=2, max_ticks=240))
    assert result.verdict == "aligned" and result.estimate.lag == 2
    read = [(start, end) for start, end, _ in result.windows]
    assert read == [(0, 60), (140, 200), (279, 339), (419, 479)]


def test_lag_beyond_the_range_is_not_aligned(play):
    result = check_recording(pair_of(shifted(play["lines"], 9), play["video"]), AlignmentOptions(max_lag=4))
    assert result.verdict in ("undecided", "shifted")


def test_yaw_changes_are_circular_and_without_gui():
    lines = lines_of(np.zeros(8), np.zeros(8))
    for line, yaw, gui in zip(
        lines, (178, 179.5, -179, 541, 545, 545, 550, 590), (0, 0, 0, 0, 0, 1, 0, 0), strict=True
    ):
        line.update(yaw=float(yaw), isGuiOpen=bool(gui))
    changes = yaw_changes(parse_recording(to_log(lines), "a.jsonl"))
    nan = np.nan
    np.testing.assert_allclose(changes, [1.5, 1.5, 0, 4, nan, nan, nan])  # the last turns 40 degrees in a tick


@pytest.mark.parametrize("lag", [-10, 3])
def test_gui_frames_are_left_out_at_any_lag(lag):
    """Whatever the picture does while the GUI is shown, it has no part in the correlation."""
    yaw, pitch = make_angles(TICKS, seed=3)
    recording = parse_recording(to_log(shifted(lines_of(yaw, pitch), lag)), "a.jsonl")
    shift = np.diff(yaw)
    shift[GUI.start - 1 : GUI.stop] = 1000 * (-1.0) ** np.arange(len(GUI) + 1)
    shift[np.abs(np.diff(yaw)) > 20] = np.nan
    found = assess(recording, shift, np.full(TICKS - 1, ""), [(0, TICKS - 1)], AlignmentOptions())
    assert found["estimate"].lag == lag and found["estimate"].correlation == pytest.approx(1)
    shift[GUI.start - 1 : GUI.stop] = np.nan
    again = assess(recording, shift, np.full(TICKS - 1, ""), [(0, TICKS - 1)], AlignmentOptions())
    assert again["estimate"].correlations == found["estimate"].correlations  # at wrong lags, too
    assert found["excluded"]["gui"] == len(GUI) + 1 + 2 * 10


@pytest.mark.parametrize("lag", [0, -2])
def test_mirrored(play, lag):
    lines = [{**line, "yaw": -line["yaw"]} for line in shifted(play["lines"], lag)]
    result = check_recording(pair_of(lines, play["video"]))
    assert result.verdict == "mirrored" and result.estimate.lag == lag and result.estimate.degrees_per_width < 0
    assert "moves against the log" in result.reason


def test_drift(play):
    """Five frames dropped in the middle, and the last one repeated: what follows comes five frames early."""
    frames = np.concatenate([np.delete(play["frames"], slice(240, 245), axis=0), play["frames"][-1:].repeat(5, axis=0)])
    result = check_recording(pair_of(play["lines"], encode(frames)))
    assert result.verdict == "drifting", result
    assert [estimate.lag for _, _, estimate in result.windows] == [0, 0, -5, -5]
    assert result.reason.startswith("lags of the windows from start to end: 0, 0, -5, -5")
    assert (result.lines, result.frames) == (TICKS, TICKS)


def test_nothing_to_see_is_undecided(play):
    frames = play["frames"]
    log_of_another = lines_of(*make_angles(TICKS, seed=9))
    gui_only = [{**line, "isGuiOpen": True} for line in play["lines"]]
    dark = frames * 0.015
    for lines, video, cause, reason in (
        (play["lines"], encode(np.repeat(frames[:1], TICKS, axis=0)), "static", "too few usable frame pairs"),
        (play["lines"], encode(dark), "dark", "too few usable frame pairs"),
        (gui_only, play["video"], "gui", "too few usable frame pairs: 0"),
        (log_of_another, play["video"], None, "no clear peak"),
        (lines_of(np.zeros(TICKS), play["pitch"]), play["video"], None, "too little turning"),
    ):
        result = check_recording(pair_of(lines, video))
        assert result.verdict == "undecided" and result.reason.startswith(reason), result
        if cause:
            assert result.excluded[cause] > 400, result


def test_rejected_with_the_reason(play):
    for lines, video, reason in (
        (play["lines"], play["video"][:3000], r"0000.mp4: "),
        (play["lines"], b"#EXTM3U\n/etc/hostname\n" * 20, r"0000.mp4: cannot open the video"),
        (play["lines"], b"", r"empty video file"),
        (play["lines"][:400], play["video"], r"lengths differ: 480 frames, 400 log lines"),
        (b'{"yaw": 1}\n', play["video"], r"0000.jsonl: line 1: .*missing required field"),
    ):
        result = check_recording(pair_of(lines, video))
        assert result.verdict == "rejected" and result.estimate is None
        assert re.search(reason, result.reason), result.reason


def test_short_voxel_recording():
    """Ten seconds of a real game; the same with the log shifted."""
    log, video = (DATA / f"{LUANTI}{suffix}" for suffix in (".jsonl", ".mp4"))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for lag in (0, 3, -3):
        result = check_recording(pair_of(shifted(lines, lag), str(video)))
        assert result.verdict == ("shifted" if lag else "aligned"), result
        assert result.estimate.lag == lag


@pytest.fixture(scope="module")
def voxel_pairs():
    """The eight full recordings, where there are any."""
    shards = list_shards(sorted(map(str, FULL.glob("*.*"))))
    pairs = [pair for shard in shards for pair in read_pairs(shard)]
    if not pairs:
        pytest.skip(f"no recordings at {FULL} (VJEPA_AC_LUANTI names another folder)")
    return pairs


@pytest.mark.slow
def test_full_voxel_recordings(voxel_pairs):
    for pair in voxel_pairs:
        lines = [json.loads(line) for line in pair.log.splitlines()]
        for lag in (0, 3):
            result = check_recording(replace(pair, log=to_log(shifted(lines, lag))))
            assert result.estimate.lag == lag and result.verdict == ("shifted" if lag else "aligned"), result


@pytest.mark.slow
def test_voxel_recordings_at_all_lags(voxel_pairs):
    """Lags -5 to 5, whole and in excerpts of 300 ticks; logs of other recordings. Prints the table of docs/LOG.md."""
    options, counts = AlignmentOptions(), Counter()
    videos, logs = {}, {}
    for pair in voxel_pairs:
        name = pair.entry.recording_id
        video = VideoReader(pair.video, name)
        videos[name] = decode_shifts(video, [(0, video.num_frames - 1)], np.arange(video.num_frames))
        logs[name] = [json.loads(line) for line in pair.log.splitlines()]
    for name, (shift, cause) in videos.items():
        for other, lines in logs.items():
            n = min(len(shift), len(lines) - 1)
            for lag in range(-5, 6) if other == name else (0,):
                recording = parse_recording(to_log(shifted(lines, lag)), other)
                for length, step in ((n, n), (300, 150)):
                    for start in range(0, n - length + 1, step):
                        windows = [(start, start + length)] if length == 300 else sample_windows(n, options)
                        inside = (np.arange(n) >= start) & (np.arange(n) < start + length)
                        found = assess(recording, np.where(inside, shift[:n], np.nan), cause[:n], windows, options)
                        verdict = found["verdict"]
                        right = verdict == ("shifted" if lag else "aligned") and found["estimate"].lag == lag
                        kind = (
                            "undecided" if verdict == "undecided" else "right" if right and other == name else "wrong"
                        )
                        which = "other log" if other != name else f"lag {lag:2}"
                        counts["whole" if length == n else "300 ticks", which, kind] += 1
    for length, which in sorted({key[:2] for key in counts}):
        print(length, which, {kind: counts[length, which, kind] for kind in ("right", "undecided", "wrong")})
    assert sum(count for (_, _, kind), count in counts.items() if kind == "wrong") == 0
    for lag in range(-5, 6):
        assert counts["whole", f"lag {lag:2}", "right"] == len(videos)


@pytest.mark.slow
def test_vizdoom_recordings(tmp_path):
    pytest.importorskip("vizdoom")
    command = [
        sys.executable,
        str(ROOT / "dataset_scripts" / "record_vizdoom.py"),
        "--output",
        str(tmp_path / "shards"),
    ]
    subprocess.run([*command, "--recordings", "2", "--ticks", "400", "--resolution", "160x120"], check=True)
    for shard in list_shards([str(tmp_path / "shards" / "shard-000000.tar")]):
        for pair in read_pairs(shard):
            lines = [json.loads(line) for line in pair.log.splitlines()]
            for lag in (0, 3, -3):
                result = check_recording(replace(pair, log=to_log(shifted(lines, lag))))
                assert result.estimate.lag == lag, result


# -------------------------------------------------------------------------------------------- windows and verdicts


@given(st.integers(1, 8000), st.integers(1, 8), st.integers(480, 3000))
def test_windows_cover_start_middle_and_end(num_pairs, num_windows, max_ticks):
    windows = sample_windows(num_pairs, AlignmentOptions(num_windows=num_windows, max_ticks=max_ticks))
    assert windows[0][0] == 0 and (len(windows) == 1 or windows[-1][1] == num_pairs)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(windows))
    read = sum(end - start for start, end in windows)
    assert min(num_pairs, max_ticks) - len(windows) < read <= min(num_pairs, max_ticks)


def test_verdicts():
    def at(lag, correlation=0.8):
        return LagEstimate(lag, "" if lag is not None else "weak", correlation=correlation, support=1.0)

    unknown, options = at(None), AlignmentOptions()
    for whole, windows, verdict in (
        (at(0), [at(0), unknown], "aligned"),
        (at(0), [unknown, unknown], "aligned"),
        (unknown, [at(0), at(0)], "undecided"),
        (unknown, [at(0), at(1)], "drifting"),
        (at(0), [unknown, at(1)], "drifting"),
        (at(-1), [at(-1)], "shifted"),
        (at(0, -0.8), [at(0, -0.8)], "mirrored"),
    ):
        assert judge(whole, windows, options)[0] == verdict
    assert judge(at(0), [at(0), at(1)], AlignmentOptions(flag_over=1))[0] == "aligned"
    assert "may lie beyond" in judge(at(10), [], options)[1]


def test_options_out_of_range():
    for values, message in (
        ({"max_lag": 0}, "max_lag must be at least 1, found 0"),
        ({"flag_over": 10}, "flag_over must be below max_lag=10, found 10"),
        ({"max_ticks": 100}, "at least 60 for each of 4 windows, found 100"),
    ):
        with pytest.raises(ValueError, match=message):
            AlignmentOptions(**values)


# -------------------------------------------------------------------------------------------------------- program


def run(*arguments):
    """The program's `main` in this process: importing the package takes longer than the work."""
    out, err = io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", [PROGRAM.name, *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            code = runpy.run_path(str(PROGRAM))["main"]()
        except SystemExit as stop:
            code = stop.code
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            code = report(error)  # as the interpreter does for an uncaught one
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def shards(play, tmp_path_factory):
    """Two tars: recordings at lags 0, 3, 0, -2, one mirrored, one broken; one more without a log."""
    folder = tmp_path_factory.mktemp("alignment")
    lines, video = play["lines"][:240], encode(play["frames"][:240])
    logs = [lines, shifted(lines, 3), lines, shifted(lines, -2), [{**line, "yaw": -line["yaw"]} for line in lines]]
    files = []
    for segment, log in enumerate(logs):
        name = f"6.{segment % 2}/{name_of('aaaaaaaaaaaa', segment)}"
        files += [(f"{name}.mp4", video), (f"{name}.jsonl", to_log(log))]
    files += [(f"{name_of('bbbbbbbbbbbb')}.mp4", b"no video"), (f"{name_of('bbbbbbbbbbbb')}.jsonl", to_log(lines))]
    files += [(f"{name_of('cccccccccccc')}.mp4", video)]
    write_shard(folder / "shard-000000.tar", files[:6])
    write_shard(folder / "shard-000001.tar", files[6:])
    return folder


def read(output: Path) -> dict:
    return json.loads((output / "alignment.json").read_text())


def test_program(shards, tmp_path):
    output = tmp_path / "out"
    code, out, _ = run("--shards", shards, "--output", output)
    assert code == 0 and "6 recordings checked (0 before), 3 flagged" in out
    found = read(output)
    verdicts = [(result["verdict"], result.get("lag")) for result in found["recordings"]]
    assert verdicts == [
        *[("aligned", 0), ("shifted", 3), ("aligned", 0), ("shifted", -2), ("mirrored", 0)],
        *[("rejected", None), ("rejected", None)],
    ]
    assert found["verdicts"] == {
        **{"aligned": 2, "shifted": 2, "drifting": 0, "mirrored": 1, "undecided": 0, "rejected": 2}
    }
    assert [result["recorder_version"] for result in found["recordings"][:2]] == ["6.0", "6.1"]
    assert found["recordings"][-1]["reason"].startswith("missing .jsonl: ")
    assert len(found["recordings"][0]["correlations"]) == 21 and len(found["recordings"][0]["windows"]) == 3
    flagged = [name_of("aaaaaaaaaaaa", segment) for segment in (1, 3, 4)]
    assert (output / "flagged.txt").read_text().split() == flagged
    page = (output / "alignment.html").read_text()
    assert (output / "alignment.png").read_bytes().startswith(b"\x89PNG") and all(name in page for name in flagged)

    # Again: nothing is decoded; the status tells what was flagged. Other options: everything anew.
    with patch.object(alignment, "check_recording", side_effect=AssertionError("checked again")):
        code, out, _ = run("--shards", shards, "--output", output, "--fail_on_flagged")
    assert code == 2 and "(6 before)" in out and read(output) == found
    code, out, _ = run("--shards", shards, "--output", output, "--limit", 2, "--flag_over", 3, "--fail_on_flagged")
    assert code == 0 and "2 recordings checked (0 before), 0 flagged" in out


@pytest.mark.slow
def test_processes_find_the_same(shards, tmp_path):
    """`--num_proc 2` writes what one process does, but for the time taken."""
    found = []
    for num_proc in ("1", "2"):
        command = [sys.executable, PROGRAM, "--shards", shards, "--output", tmp_path / num_proc, "--num_proc", num_proc]
        assert subprocess.run(command).returncode == 0
        results = read(tmp_path / num_proc)["recordings"]
        found.append([{**result, "seconds": 0} for result in results])
    assert found[0] == found[1]


def test_killed_run_goes_on(shards, tmp_path):
    """After SIGKILL, with half a line written, the rest is checked and what was finished is not."""
    output = tmp_path / "out"
    process = python_forks.start([PROGRAM, "--shards", shards, "--output", output])
    journal = output / "progress.ndjson"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL
    finished = journal.read_bytes().count(b"\n")
    assert 1 <= finished < 6 and not (output / "alignment.json").exists()
    journal.write_bytes(journal.read_bytes() + b'{"key": "abc')
    code, out, _ = run("--shards", shards, "--output", output)
    assert code == 0 and f"6 recordings checked ({finished} before), 3 flagged" in out
    assert journal.read_bytes().count(b"\n") == 6
    assert read(output)["verdicts"]["shifted"] == 2


def test_program_refuses(shards, tmp_path):
    code, _, err = run("--shards", tmp_path / "none", "--output", tmp_path / "out")
    assert code == 1 and "none: no .tar, .mp4 or .jsonl file found" in err
    code, _, err = run("--shards", shards, "--output", tmp_path / "out", "--max_lag", 0)
    assert code == 1 and "max_lag must be at least 1, found 0" in err
    code, _, err = run("--shards", shards, "--output", tmp_path / "out", "--num_proc", 0)
    assert code == 2 and "--num_proc must be at least 1, found 0" in err
    assert not (tmp_path / "out").exists()
