"""Pseudo-labels: an oracle that reads the time from the pictures, the builder on what is written, kills, bad input."""

import gc
import itertools
import json
import math
import os
import runpy
import shutil
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from helpers_build import assert_same_files, contents, status_of
from helpers_data import make_lines, make_video, name_of, oracle_actions, to_log
from hypothesis import given, settings
from hypothesis import strategies as st
from test_heads import STATISTICS, head
from test_modeling import tiny_model
from torchcodec.encoders import VideoEncoder
from tqdm import tqdm

from vjepa_ac_hf import ACTION_COLUMNS, VJEPA2ACForInverseDynamics, VJEPA2ACProcessor
from vjepa_ac_hf.building.rows import BuildReport, iter_clips, listing_report
from vjepa_ac_hf.building.selection import BuildOptions
from vjepa_ac_hf.console import report
from vjepa_ac_hf.labelling import LabelError, LabelFiles, Labeller, find_videos, label_files, label_video, videos
from vjepa_ac_hf.labelling.files import write_lines
from vjepa_ac_hf.labelling.windows import count_tubelets, plan_windows, read_windows
from vjepa_ac_hf.modeling_heads_vjepa2_ac import VJEPA2ACActionHeadOutput
from vjepa_ac_hf.planning import VPTLog
from vjepa_ac_hf.recordings.clips import ClipSpec, aggregate_actions
from vjepa_ac_hf.recordings.log import parse_recording
from vjepa_ac_hf.recordings.shards import list_shards, read_pairs
from vjepa_ac_hf.recordings.video import VideoReader

PROGRAM = runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "label_videos.py"))
AT = {name: i for i, name in enumerate(ACTION_COLUMNS)}
SLOTS = slice(AT["hotbar.0"], AT["hotbar.8"] + 1)
RESOLUTION = 32


def clock_video(path: Path, num_frames: int, fps: float = 20) -> Path:
    """A wide video whose middle shows the frame's number, as 16 black and white squares."""
    bits = (torch.arange(num_frames)[:, None] >> torch.arange(16)) & 1
    squares = bits.view(-1, 4, 4).repeat_interleave(16, 1).repeat_interleave(16, 2)
    frames = torch.nn.functional.pad(255 * squares, (16, 16), value=90)[:, None].expand(-1, 3, -1, -1)
    video = VideoEncoder(frames.to(torch.uint8).contiguous(), frame_rate=fps)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(video.to_tensor("mp4", codec="libx264", crf=12, preset="ultrafast").numpy().tobytes())
    return path


def read_clock(frames: torch.Tensor) -> np.ndarray:
    """Numbers of frames uint8 `(..., 3, 32, 32)`."""
    squares = frames.double().mean(dim=-3).unflatten(-1, (4, 8)).unflatten(-3, (4, 8)).mean(dim=(-3, -1))
    return ((squares > 127).flatten(-2).long() << torch.arange(16)).sum(dim=-1).numpy()


def make_labeller(space="vpt-38", pos_weight=None, **options) -> Labeller:
    model = head(VJEPA2ACForInverseDynamics, space, action_statistics=STATISTICS, pos_weight=pos_weight)
    processor = VJEPA2ACProcessor(resolution=RESOLUTION, action_space=space, action_statistics=STATISTICS)
    return Labeller(model, processor, **options)


def oracle(labeller: Labeller, true_of, doubtful=(), logit: float = 9.0) -> list[int]:
    """Have the head tell what is true, at the times that it sees; nearly a guess at the `doubtful` ticks."""
    processor, config, seen = labeller.processor, labeller.model.config, []
    columns = config.action_space
    kinds = [config.continuous_columns, config.binary_columns, config.slot_columns]

    def forward(pixel_values_videos):
        pixels = pixel_values_videos * torch.tensor(processor.pixel_std).view(3, 1, 1)
        times = read_clock(255 * (pixels + torch.tensor(processor.pixel_mean).view(3, 1, 1)))
        assert (times[:, 1::2] == times[:, ::2] + 4).all() and (np.diff(times[:, ::2]) == 8).all()
        starts = times[:, :-2:2]
        seen.extend(starts.flatten().tolist())
        true = processor.normalize_actions(np.array([[true_of(t) for t in row] for row in starts]))
        sure = torch.from_numpy(np.where(np.isin(starts, list(doubtful)), 0.1, logit))[..., None].float()
        parts = [true[..., [columns.index(c) for c in kind]] if kind else None for kind in kinds]
        logits = [None if part is None else (2 * part - 1) * sure for part in parts[1:]]
        return VJEPA2ACActionHeadOutput(continuous=parts[0], binary_logits=logits[0], slot_logits=logits[1])

    labeller.model.forward = forward
    return seen


def build(folder: Path, **spec) -> tuple[list[dict], BuildReport]:
    """Clips of the recordings in a folder, by the builder."""
    shards = list_shards([str(p) for p in sorted(folder.iterdir())])
    report = listing_report(shards)
    options = BuildOptions(ClipSpec(**spec), resolution=RESOLUTION)
    rows = [row for shard in shards for row in iter_clips(read_pairs(shard), options, report)]
    return rows, report


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------- from pictures to clips


@pytest.mark.parametrize("batch_size", [1, 4])
def test_labels_of_an_oracle_build_to_the_recordings_own_clips(tmp_path, batch_size):
    """490 ticks: 61 tubelets, the last window moved back. Real faults in the true log: null inputs, wheel, GUI, ..."""
    name, lines = name_of("s0"), make_lines(490, seed=3)
    for tick in [*range(152, 177), *range(288, 313)]:  # a doubtful slot stays as it was
        lines[tick]["hotbar"] = lines[152 if tick < 200 else 288]["hotbar"]
    video = clock_video(tmp_path / "true" / f"{name}.mp4", 490)
    (tmp_path / "true" / f"{name}.jsonl").write_bytes(to_log(lines))
    shutil.copytree(tmp_path / "true", tmp_path / "told", ignore=shutil.ignore_patterns("*.jsonl"))

    doubtful = {8 * 20, 8 * 37}
    labeller = make_labeller(min_confidence=0.9, name="oracle")
    seen = oracle(labeller, lambda t: oracle_actions(lines, t, tubelets=2)[0], doubtful)
    files = LabelFiles(tmp_path / "told" / video.name, tmp_path / "told")
    calls = []
    found = label_video(labeller, files, batch_size=batch_size, progress=lambda *done: calls.append(done))
    assert found["status"] == "done" and found["actions"] == 60 and found["ticks"] == 490
    assert calls[0] == (0, 60) and calls[-1] == (60, 60)
    # Every action once, but for the overlap of the last window; nothing is told of the last tubelet's ticks.
    assert sorted(set(seen)) == list(range(0, 480, 8)) and len(seen) == 9 * 7
    assert found["unsure_ticks"] == 2 * 8 + 10

    written = read_log(files.log)
    assert [line["unsure"] for line in written] == [t // 8 * 8 in doubtful or t >= 480 for t in range(490)]
    assert all(line["mouse"]["dx"] % 1 == 0 and line["mouse"]["dy"] % 1 == 0 for line in written)
    assert (written[0]["yaw"], written[0]["pitch"], written[0]["hotbar"]) == (0, 0, lines[0]["hotbar"])
    for line in written[480:]:
        assert (line["mouse"]["dx"], line["mouse"]["buttons"], line["keyboard"]["keys"]) == (0, [], [])
        assert line["confidence"] is None and line["yaw"] == written[480]["yaw"]
    assert written[0]["labels"]["settings"]["min_confidence"] == 0.9 and "labels" not in written[1]

    true, _ = build(tmp_path / "true", clip_stride=8)
    told, report = build(tmp_path / "told", clip_stride=8)
    starts = [s for s in range(0, 490 - 60, 8) if not any(s <= d < s + 56 for d in doubtful)]
    assert [row["start_tick"] for row in told] == starts and report.skipped_clips["unsure"] == len(true) - len(told) > 0
    assert not report.rejected and report.other_files == 1  # the confidences
    by_start = {row["start_tick"]: row for row in true}
    for row in told:
        expected = by_start[row["start_tick"]]
        assert row["video"]["bytes"] == expected["video"]["bytes"]
        np.testing.assert_array_equal(
            row["actions"][:, [0, 1, *range(4, 38)]], expected["actions"][:, [0, 1, *range(4, 38)]]
        )
        np.testing.assert_allclose(row["actions"][:, 2:4], expected["actions"][:, 2:4], atol=2e-4)
        turned = np.diff(expected["states"], axis=0) - np.diff(row["states"], axis=0)
        np.testing.assert_allclose((turned[:, 0] + 180) % 360 - 180, 0, atol=1e-2)  # states are relative to the start
        np.testing.assert_allclose(turned[:, 1], 0, atol=1e-3)

    table = pyarrow.parquet.read_table(files.confidence).to_pylist()
    assert [row["tick"] for row in table] == list(range(0, 480, 8))
    assert {row["tick"] for row in table if row["unsure"]} == doubtful
    assert table[0]["key.w"] == pytest.approx(1 / (1 + math.exp(-9))) and set(table[0]) - {
        "tick",
        "confidence",
        "unsure",
    } == set(ACTION_COLUMNS[4:28]) | {"hotbar", "gui_open"}
    assert label_video(labeller, files)["status"] == "skipped"


def test_memory_does_not_grow_with_the_video(tmp_path):
    """All pictures that are alive whenever the head is asked, in a video and in one three times as long."""

    def alive(length: int) -> tuple[int, int]:
        files = LabelFiles(clock_video(tmp_path / f"{length}.mp4", length), tmp_path)
        labeller, most, reads = make_labeller("vpt-13"), 0, []
        told = labeller.tell

        def tell(frames):
            nonlocal most
            pictures = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.dtype == torch.uint8]
            storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in pictures if p.ndim > 2}
            most = max(most, sum(storages.values()))
            return told(frames)

        def frames(reader, indices, real=VideoReader.frames):
            reads.append(len(indices))
            return real(reader, indices)

        labeller.tell = tell
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(VideoReader, "frames", frames)
            label_video(labeller, files, batch_size=2)
        assert sum(reads) == 2 * count_tubelets(length, labeller.spec)  # every frame decoded once
        return most, max(reads)

    gc.collect()
    (short, at_once), (long, at_once_long) = alive(240), alive(720)
    small = 3 * RESOLUTION**2
    assert at_once == at_once_long == 16
    assert 2 * 16 * small <= short == long <= 5 * 16 * small  # the batch, its parts, what the next window needs


@given(tubelets=st.integers(0, 70), length=st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_windows_tell_every_action_once(tubelets, length):
    windows = plan_windows(tubelets, length)
    assert [a for w in windows for a in w.actions] == list(range(tubelets - 1))
    assert all(w.tubelets == min(length, tubelets) and w.start + w.tubelets <= tubelets for w in windows)
    assert all(w.told == 0 for w in windows[:-1])


@pytest.mark.parametrize(("frames", "expected"), [(0, 0), (4, 0), (5, 1), (12, 1), (13, 2), (1200, 150), (1196, 149)])
def test_tubelets_are_counted_by_their_last_frames(frames, expected):
    spec = ClipSpec()
    assert count_tubelets(frames, spec) == expected
    assert expected == sum(8 * k + 4 < frames for k in range(frames))


@given(
    num_frames=st.integers(13, 150),
    length=st.integers(2, 5),
    tubelet_size=st.integers(1, 3),
    stride=st.sampled_from([2, 4, 5]),
    batch_size=st.integers(1, 4),
)
@settings(max_examples=25, deadline=None)
def test_windows_hold_the_frames_of_their_tubelets(clock, num_frames, length, tubelet_size, stride, batch_size):
    spec = ClipSpec(fps=20 / stride, frames_per_clip=length * tubelet_size, tubelet_size=tubelet_size)
    windows = plan_windows(count_tubelets(num_frames, spec), length)
    found = list(read_windows(VideoReader(clock, "clock"), windows, spec, RESOLUTION, "crop", batch_size))
    assert [w for batch, _ in found for w in batch] == windows
    for batch, frames in found:
        assert len(batch) <= batch_size
        for window, times in zip(batch, read_clock(frames), strict=True):
            first = window.start * tubelet_size * stride
            assert times.tolist() == [first + stride * j for j in range(window.tubelets * tubelet_size)]
            assert times[-1] < num_frames


@pytest.fixture(scope="module")
def clock(tmp_path_factory):
    return clock_video(tmp_path_factory.mktemp("clock") / "clock.mp4", 150)


# ------------------------------------------------------------------------------------------- what the head tells


def logits_of(labeller: Labeller, binary=None, slot=None, continuous=None):
    output = VJEPA2ACActionHeadOutput(
        **{
            name: None if values is None else torch.tensor(values)[None]
            for name, values in (("binary_logits", binary), ("slot_logits", slot), ("continuous", continuous))
        }
    )
    labeller.model.forward = lambda pixel_values_videos: output
    told = labeller.tell(torch.zeros(1, 4, 3, RESOLUTION, RESOLUTION, dtype=torch.uint8))
    return [values[0] for values in told]


def test_confidences_take_the_weight_of_pressed_keys_back():
    """A key that is pressed with probability p in truth gets the logit log(w p / (1 - p)) from a weighted loss."""
    weights, p = [20.0, 0.5, 4.0], [0.2, 0.4, 0.9]
    logits = [[math.log(w * q / (1 - q)) for w, q in zip(weights, p, strict=True)]]
    space = ["key.w", "key.a", "mouse.left"]
    actions, confidence, _ = logits_of(make_labeller(space, pos_weight=weights), logits)
    assert [actions[0, AT[c]] for c in space] == [0, 0, 1]
    np.testing.assert_allclose(confidence, [[0.8, 0.6, 0.9]], rtol=1e-6)
    # The head's own answers: key.w is likelier than its rate, though not likelier than not.
    actions, confidence, _ = logits_of(make_labeller(space, pos_weight=weights, keys="balanced"), logits)
    assert [actions[0, AT[c]] for c in space] == [1, 0, 1]
    np.testing.assert_allclose(confidence, [[0.2, 0.6, 0.9]], rtol=1e-6)


def test_slots_and_movement_are_told_in_raw_units():
    space = ["yaw_delta", *reversed([f"hotbar.{i}" for i in range(9)]), "mouse_dy"]
    labeller = make_labeller(space)
    scores = [0.0] * 9
    scores[2] = math.log(16)  # hotbar.6: 16 of 24
    actions, confidence, slots = logits_of(labeller, None, [scores], [[13.0, 2.0]])
    assert labeller.columns == ["hotbar"] and confidence.shape == (1, 0) and not actions[0, SLOTS].any()
    np.testing.assert_allclose(slots, [[1 / 24] * 6 + [2 / 3] + [1 / 24] * 2], rtol=1e-6)
    assert actions[0, AT["yaw_delta"]] == pytest.approx(13 * 15 + 3 - 360)  # within half a turn
    assert actions[0, AT["mouse_dx"]] == pytest.approx((13 * 15 + 3) / 0.15)
    assert actions[0, AT["mouse_dy"]] == pytest.approx(2 * 30 - 2)
    assert actions[0, AT["pitch_delta"]] == pytest.approx(58 * 0.15)
    gui = make_labeller(["mouse_dx", "gui_open"])
    actions, *_ = logits_of(gui, [[3.0], [-3.0]], None, [[1.0], [1.0]])
    assert actions[:, AT["yaw_delta"]] == pytest.approx([0, 101 * 0.15]) and actions[0, AT["mouse_dx"]] == 101
    with pytest.raises(FloatingPointError, match="not finite"):
        logits_of(gui, [[3.0], [-3.0]], None, [[1.0], [math.nan]])


def test_a_slot_changes_where_another_is_likelier_than_not():
    likelier, balanced = make_labeller(), make_labeller(keys="balanced")
    for probabilities, before, expected in (
        ([0.1, 0.2, 0.3, 0.4], None, (3, 3)),
        ([0.1, 0.2, 0.3, 0.4], 0, (0, 3)),
        ([0.1, 0.1, 0.6, 0.2], 0, (2, 2)),
        ([0.5, 0.5, 0.0, 0.0], 1, (1, 0)),
    ):
        assert (likelier.choose_slot(probabilities, before), balanced.choose_slot(probabilities, before)) == expected


def test_only_the_columns_that_count_make_an_action_unsure(tmp_path):
    """At one tick everything is a guess: another slot is the likeliest, but not likelier than not."""

    def true_of(tick):
        action = np.zeros(38)
        action[SLOTS.start + (4 if tick == 40 else 2)] = 1
        return action

    video = clock_video(tmp_path / "a.mp4", 117)
    for counted, unsure in ((None, [40]), (["key.w"], []), (["key.w", "hotbar"], [40])):
        files = LabelFiles(video, tmp_path / str(counted))
        labeller = make_labeller("vpt-36", min_confidence=0.5, confidence_columns=counted)
        oracle(labeller, true_of, doubtful=[40])
        label_video(labeller, files)
        lines = read_log(files.log)
        assert [t for t in range(0, 112, 8) if lines[t]["unsure"]] == unsure
        assert {line["hotbar"] for line in lines} == {2} and not any(line["keyboard"]["keys"] for line in lines)
        row = pyarrow.parquet.read_table(files.confidence).to_pylist()[5]
        assert row["hotbar"] == pytest.approx(math.exp(-0.1) / (8 * math.exp(-0.1) + math.exp(0.1)))
        assert row["confidence"] == pytest.approx(row["key.w"] if counted == ["key.w"] else row["hotbar"])


def test_without_hotbar_columns_the_slot_follows_the_number_keys(tmp_path):
    pressed = {16: "key.4", 40: "key.2", 48: "key.2"}

    def true_of(tick):
        action = np.zeros(38)
        if tick in pressed:
            action[AT[pressed[tick]]] = 1
        return action

    files = LabelFiles(clock_video(tmp_path / "a.mp4", 80), tmp_path)
    labeller = make_labeller("vpt-13")
    oracle(labeller, true_of)
    label_video(labeller, files)
    slots = [line["hotbar"] for line in read_log(files.log)]
    assert slots == [None] * 17 + [3] * 24 + [1] * 39, "not known before the first key"
    (row,), _ = build(tmp_path)
    number_keys = row["actions"][:, AT["key.1"] : AT["key.9"] + 1]
    assert {(k * 8, f"key.{i + 1}") for k, i in np.argwhere(number_keys).tolist()} == set(pressed.items())


# --------------------------------------------------------------------------------------------------- lines of a log


@given(
    totals=st.lists(st.tuples(st.floats(-900, 900), st.floats(-3, 3)), min_size=1, max_size=30),
    parts=st.integers(1, 7),
    ticks=st.integers(1, 9),
    pitch=st.floats(-40, 40),
)
@settings(max_examples=60, deadline=None)
def test_whole_counts_carry_their_rounding(totals, parts, ticks, pitch):
    actions = np.zeros((len(totals), 38))
    actions[:, [AT["mouse_dx"], AT["mouse_dy"]]] = totals
    actions[:, AT["pitch_delta"]], actions[:, AT["yaw_delta"]], actions[:, SLOTS.start] = pitch, 170.0, 1
    log = VPTLog((0, 0), ticks_per_step=ticks, whole_mouse=True, clamp_pitch=False)
    lines = [line for i in range(0, len(actions), parts) for line in log.add(actions[i : i + parts])]
    assert len(lines) == ticks * (len(actions) - 1)
    lines += log.finish() + log.idle(ticks + 1)
    assert [line["tick"] for line in lines] == list(range(ticks * (len(actions) + 1) + 1))
    for axis, name in enumerate(("dx", "dy")):
        counts = np.array([line["mouse"][name] for line in lines])
        assert (counts % 1 == 0).all()
        told = np.array(totals)[:, axis]
        by_step = counts.reshape(-1)[: ticks * len(told)].reshape(-1, ticks)
        assert (np.ptp(by_step, axis=1) <= 1).all()  # spread evenly
        assert np.abs(by_step.sum(axis=1).cumsum() - told.cumsum()).max() <= 0.5 + 1e-6
    # Unclamped and unwrapped: what is read back is what was told, however far it goes.
    recording = parse_recording(to_log(lines), "x")
    spec = ClipSpec(native_fps=ticks, fps=ticks, frames_per_clip=2, tubelet_size=1)
    at = np.arange(0, ticks * len(actions), ticks)
    if ticks == 1:
        found = aggregate_actions(recording, at, spec)[:, 0]
        np.testing.assert_allclose(found[:, AT["yaw_delta"]], 170, atol=1e-3)
    np.testing.assert_allclose(np.diff(recording.pitch[np.append(at, ticks * len(actions))]), pitch, atol=1e-6)


@given(seed=st.integers(0, 10_000), parts=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_slots_and_number_keys_are_read_back_as_told(seed, parts):
    """Any slots and keys; where a slot changes without its key, the builder adds that key, a step before."""
    rng = np.random.default_rng(seed)
    slots, keys = rng.integers(0, 3, 12), rng.random((12, 9)) < 0.25
    actions = np.zeros((12, 38))
    actions[np.arange(12), SLOTS.start + slots] = 1
    actions[:, AT["key.1"] : AT["key.9"] + 1] = keys
    log = VPTLog((0, 0))
    lines = [line for i in range(0, 12, parts) for line in log.add(actions[i : i + parts])] + log.finish()
    spec = ClipSpec(frames_per_clip=4)
    found = aggregate_actions(parse_recording(to_log(lines + log.idle(8)), "x"), np.arange(0, 88, 8), spec)[:, 0]
    expected = actions[:11].copy()
    for step in range(1, 12):
        key = slots[step]  # key.1 selects slot 0
        if slots[step] != slots[step - 1] and not keys[step - 1, key]:
            expected[step - 1, AT["key.1"] + key] = 1
    np.testing.assert_array_equal(found, expected)


# ------------------------------------------------------------------------------------------------------- program


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny random head with its processor."""
    folder, labeller = tmp_path_factory.mktemp("head"), make_labeller("vpt-36")
    labeller.model.save_pretrained(folder)
    labeller.processor.save_pretrained(folder)
    return folder


def run(saved: Path, *arguments, prepare=lambda: None) -> int:
    """Exit status of the program in a process of its own (forked: nothing to import)."""
    process = os.fork()
    if process:
        return status_of(process)
    code = 99
    tqdm.set_lock(threading.RLock())
    try:
        sys.stdout = sys.stderr = open(saved / "output.txt", "w", buffering=1)  # noqa: SIM115
        sys.argv = ["label_videos.py", "--model", str(saved), *map(str, arguments)]
        prepare()
        code = PROGRAM["main"]()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        code = report(error)  # as the interpreter does for an uncaught one
    finally:
        os._exit(code)


def make_plays(folder: Path) -> Path:
    for number, length in enumerate((200, 330)):
        clock_video(folder / "deep" / f"{name_of(f's{number}')}.mp4", length)
    return folder


def median_confidence(saved: Path, video: Path, folder: Path) -> float:
    """Of a video's actions, to four digits more than labels have, so that none is equal to it."""
    files = LabelFiles(video, folder)
    label_video(Labeller.from_pretrained(saved), files)
    return round(float(np.median(pyarrow.parquet.read_table(files.confidence)["confidence"])), 4) + 0.00005


def test_program_labels_skips_and_says_what_it_did(saved, tmp_path):
    plays = make_plays(tmp_path / "plays")
    name = name_of("s0")
    (plays / "short.mp4").write_bytes(make_video(12))
    (plays / "fast.mp4").write_bytes(make_video(90, fps=30))
    (plays / "broken.mp4").write_bytes((plays / "deep" / f"{name}.mp4").read_bytes()[:2000])
    clock_video(plays / "real.mp4", 60)
    (plays / "real.jsonl").write_bytes(to_log(make_lines(60)))
    before = contents(plays)
    half = median_confidence(saved, plays / "deep" / f"{name}.mp4", tmp_path)
    flags = ["--videos", plays, "--report", tmp_path / "report.json", "--min_confidence", half]
    assert run(saved, *flags) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    entries = {Path(e["video"]).stem: e for e in report["videos"]}
    assert (report["done"], report["skipped"], report["failed"]) == (2, 0, 4)
    for stem, reason in (
        ("short", "too short: two tubelets (one action) need 13 frames, found 12"),
        ("fast", "frame rate: expected 20 FPS, found 30"),
        ("broken", "broken.mp4"),
        ("real", "expected no log, or one that labelling has written"),
    ):
        assert entries[stem]["status"] == "failed" and reason in entries[stem]["reason"], entries[stem]
        assert reason in (saved / "output.txt").read_text()
    assert {k: v for k, v in contents(plays).items() if k in before} == before
    assert sorted(contents(plays)) == sorted(
        [*before, *(f"deep/{name_of(s)}{e}" for s in ("s0", "s1") for e in (".jsonl", ".confidence.parquet"))]
    )
    lines = [line for s in ("s0", "s1") for line in read_log(plays / "deep" / f"{name_of(s)}.jsonl")]
    unsure = sum(line["unsure"] for line in lines)
    assert len(lines) == report["ticks"] == 530 and 18 < unsure == report["unsure_ticks"] < 530
    assert all(line["unsure"] == (line["confidence"] is None or line["confidence"] < half) for line in lines)
    assert report["unsure_share"] == pytest.approx(unsure / 530)
    assert report["without_confidence"] == ["mouse_dx", "mouse_dy", "yaw_delta", "pitch_delta"]
    assert "hotbar" in report["with_confidence"]

    labelled = contents(plays)
    for path in plays.glob("*"):
        path.unlink() if path.is_file() else None
    assert run(saved, "--videos", plays, "--min_confidence", half) == 0
    (plays / "deep" / "label_report.json").unlink()  # in the nearest folder above all videos
    assert run(saved, *flags, "--batch_size", 3) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["skipped"] == 2 and report["unsure_ticks"] == unsure
    for flag, message in (
        (["--min_confidence", 0.7], f"min_confidence: found {half}, expected 0.7"),
        (["--native_fps", 10], "native_fps: found 20.0, expected 10.0"),
        (["--keys", "balanced"], "keys: found likelier, expected balanced"),
    ):
        assert run(saved, *flags, *flag) == 1, (saved / "output.txt").read_text()
        assert message in (saved / "output.txt").read_text()
    assert {k: labelled[k] for k in contents(plays)} == contents(plays)
    clock_video(plays / "deep" / f"{name}.mp4", 205)
    assert run(saved, *flags) == 1
    assert "labels of another video" in (saved / "output.txt").read_text()


def kill_at(point: int, counter: Path):
    """Has a process end by SIGKILL before its call number `point` of those that make files lasting or visible."""

    def prepare():
        calls = itertools.count()

        def counted(real):
            def call(*arguments, **options):
                if next(calls) == point:
                    counter.write_text("killed")
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return call

        os.fsync, os.replace, os.unlink = counted(os.fsync), counted(os.replace), counted(os.unlink)

    return prepare


def run_and_kill(saved: Path, flags: list, output: Path, point: int, expected: dict[str, bytes]) -> bool:
    """Whether the program came to its end; whatever happened, no file under its name is another than expected."""
    status = run(saved, *flags, output, prepare=kill_at(point, output.with_suffix(".killed")))
    for path in output.glob("[!.]*"):
        assert path.name == "label_report.json" or path.read_bytes() == expected[path.name]
    assert status in (0, -signal.SIGKILL) and (status == 0) != output.with_suffix(".killed").exists()
    output.with_suffix(".killed").unlink(missing_ok=True)
    return status == 0


@pytest.fixture(scope="module")
def whole(saved, tmp_path_factory):
    """The program's arguments but for the output, and what a run leaves that is not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    flags = ["--videos", make_plays(folder / "plays"), "--batch_size", 2, "--output"]
    assert run(saved, *flags, folder / "out") == 0
    expected = contents(folder / "out")
    del expected["label_report.json"]
    assert len(expected) == 4
    return flags, expected


def test_labels_do_not_depend_on_kills(saved, whole, tmp_path):
    """One run after another is killed, each a little later than the last, until one comes to its end."""
    flags, expected = whole
    output, resumed, runs = tmp_path / "out", [], 0
    while not run_and_kill(saved, flags, output, runs, expected):
        resumed += [path.read_bytes().count(b"first") for path in sorted(output.glob(".*.labels.part"))]
        runs += 1
    assert runs > 4 and len(set(resumed)) > 2
    report = json.loads((output / "label_report.json").read_text())
    assert report["skipped"] + report["done"] == 2
    for path in output.glob("*label_report*"):
        path.unlink()
    assert_same_files(output, expected)


@pytest.mark.slow
def test_labels_do_not_depend_on_a_kill_anywhere(saved, whole, tmp_path):
    flags, expected = whole
    told = []
    for point in itertools.count():
        output = tmp_path / str(point)
        if run_and_kill(saved, flags, output, point, expected):
            break
        assert run(saved, *flags, output) == 0
        report = json.loads((output / "label_report.json").read_text())
        told.append(sum(e["resumed_actions"] for e in report["videos"] if e["status"] == "done"))
        for path in output.glob("*label_report*"):
            path.unlink()
        assert_same_files(output, expected)
    assert point > 12 and set(told) == {0, 14, 24, 28, 40}  # 24 and 40 actions, 14 a batch


def test_a_log_that_is_not_whole_has_another_name(tmp_path):
    def lines():
        yield {"tick": 0}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lines(tmp_path / "a.jsonl", lines())
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]


def test_a_torn_line_and_another_process(saved, whole, tmp_path):
    flags, expected = whole
    labeller = Labeller.from_pretrained(saved)
    files = LabelFiles(flags[1] / "deep" / f"{name_of('s1')}.mp4", tmp_path)
    real, calls = labeller.tell, itertools.count()

    def tell(frames):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(frames)

    labeller.tell = tell
    with pytest.raises(KeyboardInterrupt):
        label_video(labeller, files, batch_size=2)
    part = files.part.read_bytes()
    assert part.count(b"\n") == 3
    files.part.write_bytes(part[:-30])
    with videos.open_part(files), pytest.raises(LabelError, match="another process labels this video now"):
        label_video(labeller, files)
    found = label_video(labeller, files, batch_size=2)
    assert found["resumed_actions"] == 14
    assert json.loads(files.log.read_text().splitlines()[0])["labels"]["settings"] == labeller.settings
    assert files.log.read_bytes() == expected[files.log.name].replace(str(saved).encode(), labeller.name.encode())
    assert not files.part.exists()
    # A part of other settings, likewise.
    files.log.rename(files.part)
    with pytest.raises(LabelError, match=r"min_confidence: found 0.0, expected 0.5"):
        label_video(Labeller.from_pretrained(saved, min_confidence=0.5), files)


# ------------------------------------------------------------------------------------------------------ bad input


def test_heads_that_cannot_label_are_refused(saved, tmp_path):
    model = head(VJEPA2ACForInverseDynamics, action_statistics=STATISTICS)
    for change, message in (
        ({"resolution": 64}, "resolution of the head is 32, of its processor 64"),
        ({"frames_per_clip": 8}, "frames_per_clip of the head is 16, of its processor 8"),
        ({"tubelet_size": 4}, "tubelet_size of the head is 2, of its processor 4"),
        ({"action_space": "vpt-13"}, "action_space of the head is .*'gui_open'], of its processor .*'key.9']"),
        ({"action_statistics": STATISTICS | {"count": 10}}, "action_statistics of the head is .*'count': 9"),
        ({"fps": 7}, "native_fps / fps must be a whole number, found 20.0 / 7"),
    ):
        values = {"resolution": 32, "action_space": "vpt-38", "action_statistics": STATISTICS, **change}
        with pytest.raises(ValueError, match=message):
            Labeller(model, VJEPA2ACProcessor(**values))
    with pytest.raises(ValueError, match="action_statistics is None: the columns"):
        Labeller(head(VJEPA2ACForInverseDynamics, "vpt-13"), VJEPA2ACProcessor(resolution=32))
    with pytest.raises(ValueError, match=r"all nine hotbar columns or none, .* \['hotbar.3'\]"):
        make_labeller(["key.w", "hotbar.3"])
    with pytest.raises(ValueError, match=r"confidence_columns: \['yaw_delta', 'key'\] have no confidence, .*'key.w'"):
        make_labeller(confidence_columns=["yaw_delta", "key", "hotbar"])
    with pytest.raises(ValueError, match="min_confidence is 0.5, but no column has a confidence .*'yaw_delta'"):
        make_labeller(["yaw_delta"], min_confidence=0.5)
    with pytest.raises(ValueError, match=r"min_confidence must be in \[0, 1\], found 1.5"):
        make_labeller(min_confidence=1.5)
    with pytest.raises(ValueError, match="keys must be one of .*found 'all'"):
        make_labeller(keys="all")
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"trained inverse dynamics head .*found vjepa2_ac$"):
        Labeller.from_pretrained(tmp_path)


def test_videos_that_cannot_be_labelled_are_refused(tmp_path, monkeypatch):
    with pytest.raises(LabelError, match="--videos .*nothing.*: expected a .mp4 file.* found none"):
        find_videos([str(tmp_path / "nothing" / "*.mp4")])
    for folder in ("a", "b"):
        clock_video(tmp_path / folder / "x.mp4", 30)
    found = find_videos([str(tmp_path), str(tmp_path / "a" / "x.mp4"), str(tmp_path / "**" / "*.mp4")])
    assert found == [tmp_path / "a" / "x.mp4", tmp_path / "b" / "x.mp4"]
    assert [f.log for f in label_files(found, None)] == [tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.jsonl"]
    with pytest.raises(LabelError, match="two videos of this name: .*a/x.mp4 and .*b/x.mp4"):
        label_files(found, tmp_path)
    files, labeller = LabelFiles(found[0], tmp_path / "6.8"), make_labeller()
    with pytest.raises(LabelError, match=r"'6.8' the builder multiplies mouse movement in GUIs by 2.0"):
        label_video(labeller, files)
    label_video(make_labeller("vpt-36"), files)  # never with a GUI open
    monkeypatch.setattr(videos, "MOST_TICKS", 29)
    with pytest.raises(LabelError, match="too long: .* at most 29 ticks, found 30 frames"):
        label_video(labeller, LabelFiles(found[0], tmp_path))
    assert not list(tmp_path.glob(".*"))
