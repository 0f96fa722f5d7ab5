"""The ViZDoom recorder through its command line: log and picture belong together, and the play is repeatable."""

import hashlib
import itertools
import json
import os
import subprocess
import tarfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import python_forks
import torch
from torchcodec.decoders import VideoDecoder

pytest.importorskip("vizdoom")
pytest.importorskip("gymnasium")

ROOT = Path(__file__).resolve().parents[1]
TICKS = 120


def record(output: Path, *flags: str) -> subprocess.CompletedProcess:
    program = str(ROOT / "dataset_scripts" / "record_vizdoom.py")
    arguments = ["--output", str(output), "--ticks", str(TICKS), "--resolution", "160x120", *flags]
    # The logs' `milli` is of local time.
    return python_forks.run([program, *arguments], cwd=ROOT, env={**os.environ, "TZ": "UTC"})


def read(shard: Path) -> dict[str, tuple[bytes, list[dict]]]:
    with tarfile.open(shard) as archive:
        names = archive.getnames()
        files = {name: archive.extractfile(name).read() for name in names}
    assert [Path(n).suffix for n in names] == [".mp4", ".jsonl"] * (len(names) // 2)
    return {
        name.removesuffix(".mp4"): (files[name], [json.loads(x) for x in files[name[:-4] + ".jsonl"].splitlines()])
        for name in names[::2]
    }


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    output = tmp_path_factory.mktemp("vizdoom") / "shards"
    result = record(output, "--recordings", "2", "--recordings_per_shard", "2", "--seed", "5")
    assert result.returncode == 0, result.stderr
    return output


def test_log_and_engine_agree(recorded):
    recordings = read(recorded / "shard-000000.tar")
    assert len(recordings) == 2
    for video, lines in recordings.values():
        assert len(lines) == TICKS == len(VideoDecoder(video))
        dx, dy = (np.array([line["mouse"][k] for line in lines]) for k in ("dx", "dy"))
        yaw, pitch = (np.array([line[k] for line in lines]) for k in ("yaw", "pitch"))
        np.testing.assert_allclose(np.diff(yaw), 0.15 * dx[:-1], atol=0.02)
        np.testing.assert_allclose(np.diff(pitch), 0.15 * dy[:-1], atol=0.02)
        assert np.abs(pitch).max() < 30 and np.ptp(yaw) > 20
        places = np.array([[line["xpos"], line["zpos"]] for line in lines])
        steps = np.linalg.norm(np.diff(places, axis=0), axis=1)
        assert steps.max() < 60 and 4 < np.percentile(steps, 80) < 25
        assert {line["hotbar"] for line in lines} <= set(range(9))
        pressed = [set(line["keyboard"]["keys"]) for line in lines]
        for before, now, line in zip(pressed, pressed[1:], lines[1:], strict=False):
            assert set(line["keyboard"]["newKeys"]) == now - before


def test_logs_are_those_of_version_0_1(recorded):
    """Logs of ViZDoom 1.3.0 as the first version of the program wrote them: same arguments, same logs."""
    if version("vizdoom") != "1.3.0":
        pytest.skip("another engine may play differently")
    with tarfile.open(recorded / "shard-000000.tar") as archive:
        logs = [m for m in archive if m.name.endswith(".jsonl")]
        digests = {m.name: hashlib.sha256(archive.extractfile(m).read()).hexdigest() for m in logs}
    assert digests == {
        "vizdoom-ivory-koala-8c59e4a872d0-a43cb21135c1-20260101-000000.jsonl": (
            "11e845529dd13f053cb776b5de19fbc24a2f0b0a9c288a1514cbeb359a40347c"
        ),
        "vizdoom-eager-koala-fcb5f028633b-8e8d7bba1412-20260101-000500.jsonl": (
            "9be893b32f5415cacb8bb320e86996a5794030134927a1016c1e0503d949ed27"
        ),
    }


def horizontal_shift(first: np.ndarray, second: np.ndarray) -> int:
    """Columns by which the picture moved to the left, from its column profiles."""
    shifts = range(-30, 31)
    width = first.shape[-1]
    best = [
        np.abs(first[:, max(s, 0) : width + min(s, 0)] - second[:, max(-s, 0) : width - max(s, 0)]).mean()
        for s in shifts
    ]
    return shifts[int(np.argmin(best))]


def test_picture_turns_with_the_mouse_in_the_same_tick(recorded):
    """The input of line t moves the picture from frame t to t+1: shift and dx correlate best without a lag."""
    correlations = []
    for video, lines in read(recorded / "shard-000000.tar").values():
        frames = VideoDecoder(video).get_frames_in_range(0, TICKS).data.float().mean(1)
        strips = torch.nn.functional.avg_pool2d(frames[:, None], (10, 1))[:, 0].numpy()
        moved = np.array([horizontal_shift(a, b) for a, b in itertools.pairwise(strips)], dtype=float)
        dx = np.array([line["mouse"]["dx"] for line in lines])[:-1]
        lags = {
            lag: np.corrcoef(dx[4 + lag : -4 + lag or None][: len(moved) - 8], moved[4:-4])[0, 1]
            for lag in range(-4, 4)
        }
        correlations.append(lags)
    mean = {lag: np.mean([c[lag] for c in correlations]) for lag in correlations[0]}
    assert max(mean, key=mean.get) == 0 and mean[0] > 0.5, mean


@pytest.mark.slow
def test_same_seed_gives_the_same_recordings(recorded, tmp_path):
    assert record(tmp_path / "a", "--recordings=2", "--recordings_per_shard=1", "--seed=5").returncode == 0
    again = read(tmp_path / "a" / "shard-000000.tar") | read(tmp_path / "a" / "shard-000001.tar")
    first = read(recorded / "shard-000000.tar")
    assert again.keys() == first.keys()
    for name, (video, lines) in first.items():
        assert again[name][1] == lines
        assert again[name][0] == video


def test_rerun_keeps_and_other_arguments_are_refused(recorded):
    shard = recorded / "shard-000000.tar"
    before = shard.stat().st_mtime_ns
    result = record(recorded, "--recordings", "2", "--recordings_per_shard", "2", "--seed", "5")
    assert result.returncode == 0 and "1 were there already" in result.stdout
    assert shard.stat().st_mtime_ns == before
    result = record(recorded, "--recordings", "2", "--recordings_per_shard", "2", "--seed", "6")
    assert result.returncode != 0 and "seed: found 5, expected 6" in result.stderr


@pytest.mark.slow
def test_pauses_and_the_weapon(recorded, tmp_path):
    flags = ("--recordings=1", "--seed=5", "--pauses=0.8", "--weapon")
    result = record(tmp_path / "a", *flags)
    assert result.returncode == 0, result.stderr
    (video, lines), (plain, plain_lines) = (
        next(iter(read(folder / "shard-000000.tar").values())) for folder in (tmp_path / "a", recorded)
    )
    still = [line["mouse"]["dx"] == line["mouse"]["dy"] == 0 for line in lines]
    assert np.mean(still) > 0.5 > np.mean([line["mouse"]["dx"] == 0 for line in plain_lines])
    assert max(len(list(group)) for value, group in itertools.groupby(still) if value) >= 8
    # The same start, seen with and without the weapon, which is at the bottom of the picture.
    apart = (VideoDecoder(video)[0].float() - VideoDecoder(plain)[0].float()).abs().mean(0)
    assert apart[len(apart) // 2 :].mean() > 5 * apart[: len(apart) // 2].mean() and apart.max() > 60
    refused = record(tmp_path / "a", *flags[:2], "--weapon")
    assert refused.returncode != 0 and "pauses: found 0.8, expected 0.0" in refused.stderr
