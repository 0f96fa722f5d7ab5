"""Frames are timed, not counted: every clip's frames are its ticks', or the recording is left out with the reason.

Frames show their number in 12 black or white squares, so that what is built can be read from the pictures.
"""

import itertools
import json

import numpy as np
import pytest
import torch
from corpus import box, encoded, timed, uint32
from datasets import Video, load_dataset
from helpers_data import DATA, make_lines, make_video, name_of, to_log
from hypothesis import given, settings
from hypothesis import strategies as st
from test_build_scripts import run
from torchcodec.decoders import VideoDecoder
from torchcodec.encoders import VideoEncoder

import vjepa_ac_hf  # noqa: F401  (registers the builder)
from vjepa_ac_hf.building.rows import BuildReport, iter_clips
from vjepa_ac_hf.building.selection import BuildOptions
from vjepa_ac_hf.recordings.alignment import AlignmentOptions, check_recording, decode_shifts
from vjepa_ac_hf.recordings.clips import ClipSpec
from vjepa_ac_hf.recordings.shards import list_shards, read_pairs
from vjepa_ac_hf.recordings.timing import frames_of_ticks
from vjepa_ac_hf.recordings.video import VideoError, VideoReader

NAME = name_of("s0")
UNIT = 512  # units of the container's time a tick, at 20 FPS, as FFmpeg writes them


def numbered(numbers, fps: float = 20, **options) -> bytes:
    """A video, 192 x 96, whose frames show these numbers: 12 squares of 16 pixels, lowest bit first, rows 40 to 55."""
    bits = (torch.as_tensor(numbers)[:, None] >> torch.arange(12)) & 1
    frames = torch.full((len(bits), 3, 96, 192), 90, dtype=torch.uint8)
    frames[:, :, 40:56] = 255 * bits.repeat_interleave(16, 1)[:, None, None].to(torch.uint8)
    options = {"threads": "1", "bf": "0"} | options
    video = VideoEncoder(frames, frame_rate=fps).to_tensor(
        "mp4", codec="libx264", preset="ultrafast", extra_options=options
    )
    return video.numpy().tobytes()


def numbers_in(clip: bytes) -> list[int]:
    """What the frames of a clip show, squashed to 96 x 96."""
    frames = VideoDecoder(clip)[:].double().mean(dim=1)[:, 42:54].mean(dim=1)
    return (((frames.unflatten(-1, (12, 8)).mean(dim=-1) > 127).long()) << torch.arange(12)).sum(dim=-1).tolist()


def at_ticks(ticks, last_duration: int = 1) -> bytes:
    """Frames that show the ticks' numbers, at the ticks' times."""
    steps = np.diff([*ticks, ticks[-1] + last_duration]).tolist()
    return timed(numbered(ticks), [(len(list(same)), step * UNIT) for step, same in itertools.groupby(steps)])


def write(folder, num_lines: int, video: bytes, name: str = NAME):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_bytes(to_log(make_lines(num_lines)))
    (folder / f"{name}.mp4").write_bytes(video)
    return folder


def build(folder, spec: ClipSpec | None = None, **options):
    report = BuildReport()
    options = BuildOptions(spec or ClipSpec(clip_stride=8), resolution=96, resize_mode="squash", **options)
    shards = list_shards([str(path) for path in sorted(folder.iterdir())])
    return [row for shard in shards for row in iter_clips(read_pairs(shard), options, report)], report


def shown(row) -> list[int]:
    return numbers_in(row["video"]["bytes"])


def ticks_of(row) -> list[int]:
    return [row["start_tick"] + 4 * frame for frame in range(16)]


# ------------------------------------------------------------------------------------------- forty missing frames


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """1,200 lines and 1,160 frames: those of ticks 600 to 639 are missing, as the time stamps say."""
    video = (DATA / "uneven-frames.mp4").read_bytes()
    return write(tmp_path_factory.mktemp("uneven"), 1200, video)


def check_uneven(rows) -> None:
    assert [row["start_tick"] for row in rows] == [64 * k for k in range(18) if k != 9], "tick 576 to 636 lacks frames"
    for row in rows:
        assert shown(row) == ticks_of(row)


@pytest.mark.parametrize("streaming", [False, True])
def test_uneven_frames_loaded(uneven, tmp_path, streaming):
    files = [str(path) for path in sorted(uneven.iterdir())]
    options = {"resolution": 96, "resize_mode": "squash", "validation_fraction": 0, "cache_dir": str(tmp_path)}
    rows = load_dataset("vpt_tubelets", data_files=files, split="train", streaming=streaming, **options)
    check_uneven(list(rows.cast_column("video", Video(decode=False))))


def test_uneven_frames_built(uneven, tmp_path):
    code, _, err = run(
        *("build_vpt_tubelets.py", "--shards", str(uneven / "*"), "--output", tmp_path / "built"),
        *("--resolution", 96, "--resize_mode", "squash", "--validation_fraction", 0),
    )
    assert code == 0, err
    rows = load_dataset(str(tmp_path / "built"), split="train", cache_dir=str(tmp_path / "cache"))
    check_uneven(list(rows.cast_column("video", Video(decode=False))))
    report = json.loads((tmp_path / "built" / "report.json").read_text())
    assert report["repairs"]["frames_timed"] == 40 and report["skipped_clips"]["missing_frames"] == 1


def test_uneven_frames_are_rejected_where_the_repair_is_off(uneven):
    rows, report = build(uneven, skip_repairs=("frames_timed",))
    assert rows == []
    assert "40 of 1200 ticks have no frame, and the repair 'frames_timed' is switched off" in report.rejected[0].reason


def test_without_its_time_stamps_the_same_video_is_rejected(tmp_path):
    video = (DATA / "uneven-frames.mp4").read_bytes()
    rows, report = build(write(tmp_path, 1200, timed(video, [(1160, 512)])))
    assert rows == [] and "lengths differ: 1160 frames, 1200 log lines" in report.rejected[0].reason


# ---------------------------------------------------------------------------------------------- what is normal


@pytest.mark.parametrize("extra", [0, 1])
def test_one_frame_more_than_lines_is_normal(tmp_path, extra):
    """The recorder writes the last frame twice."""
    numbers = [*range(130), 129][: 130 + extra]
    rows, report = build(write(tmp_path, 130, numbered(numbers)))
    assert [shown(row) for row in rows] == [ticks_of(row) for row in rows] and len(rows) == 9
    (entry,) = report.per_recording
    assert entry.ticks == 130 and "frames_timed" not in entry.repairs and entry.skipped_clips == {}


@pytest.mark.parametrize(("lines", "frames"), [(1, 2), (1, 1), (12, 13), (34, 35), (60, 61), (60, 60)])
def test_short_segments_are_too_short_not_damaged(tmp_path, lines, frames):
    rows, report = build(write(tmp_path, lines, numbered(range(frames))))
    assert rows == [] and report.rejected[0].kind == "too short"
    assert report.rejected[0].reason == f"{NAME}: too short: one clip needs 61 ticks, found {lines}"


@pytest.mark.parametrize("extra", [-40, -4, -1, 2, 4, 40])
def test_other_numbers_of_evenly_spaced_frames_are_rejected_with_both(tmp_path, extra):
    rows, report = build(write(tmp_path, 130, numbered(range(130 + extra))))
    assert rows == [] and report.rejected[0].kind == "lengths differ"
    assert f"{130 + extra} frames, 130 log lines" in report.rejected[0].reason


# --------------------------------------------------------------------------------------- other gaps, other times


@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_frames_of_any_gaps_show_their_ticks(tmp_path_factory, data):
    lines = data.draw(st.integers(61, 140), label="lines")
    first = data.draw(st.lists(st.integers(1, lines - 2), max_size=3), label="gaps start at")
    missing = {tick for start in first for tick in range(start, start + data.draw(st.integers(1, 9)))}
    ticks = [tick for tick in range(lines) if tick not in missing or tick == lines - 1]
    extra = [lines] if data.draw(st.booleans(), label="last frame twice") else []
    rows, report = build(write(tmp_path_factory.mktemp("gaps"), lines, at_ticks(ticks + extra)))
    expected = [s for s in range(0, lines - 60, 8) if all(s + 4 * j in ticks for j in range(16))]
    assert [row["start_tick"] for row in rows] == expected
    assert all(shown(row) == ticks_of(row) for row in rows)
    assert report.repairs["frames_timed"] == lines - len(ticks) and not report.rejected
    assert report.skipped_clips["missing_frames"] == len(range(0, lines - 60, 8)) - len(expected)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), fps=st.sampled_from([20, 30, 60, 23.976]), offset=st.sampled_from([0, 0.01, 0.4, 2.0, 100.0]))
def test_ticks_of_frames_against_a_plain_loop(data, fps, offset):
    num_ticks = data.draw(st.integers(2, 200))
    kept = [
        0,
        *sorted(data.draw(st.sets(st.integers(1, num_ticks - 1)))),
        *([num_ticks] if data.draw(st.booleans()) else []),
    ]
    jitter = np.array([data.draw(st.floats(-0.1, 0.1)) for _ in kept])
    times = offset + (np.array(kept) + jitter) / fps
    expected = [-1] * num_ticks
    for frame, tick in enumerate(kept):
        if tick < num_ticks:
            expected[tick] = frame
    if kept[-1] < num_ticks - 1:
        with pytest.raises(ValueError, match=rf"{len(kept)} frames, {num_ticks} log lines"):
            frames_of_ticks(times, num_ticks, fps)
        return
    if kept[-1] < num_ticks and 0.5 < times[0] * fps < 1.5:
        with pytest.raises(ValueError, match="one tick late"):  # as many frames as lines: the first may be missing
            frames_of_ticks(times, num_ticks, fps)
        return
    assert frames_of_ticks(times, num_ticks, fps).tolist() == expected


@pytest.mark.parametrize(
    ("times", "num_ticks", "reason"),
    [
        ([0, 1, 2, 2, 3], 4, "frames 2 and 3 both belong to tick 2"),
        ([0, 1, 2, 3.4, 4.4, 5, 6, 7], 8, "frame 3 is shown 3.40 ticks after the first"),
        ([0, 1, 2, 3, 9, 10], 10, None),
        ([0, 1, 2, 3, 9, 10], 6, "6 frames, 6 log lines .* the last one belongs to tick 10"),
        ([0, 1, 2, 3, 9, 10], 12, "6 frames, 12 log lines .* the last one belongs to tick 10"),
        ([1, 2, 3, 4], 4, "one tick late"),  # the first frame may be missing, of five
        ([1, 2, 3, 4, 5], 4, None),  # five of five
        ([2, 3, 4, 5], 4, None),
        ([7, 8, 9, 10], 4, None),
        ([40 + tick for tick in range(60)], 100, "lengths differ: 60 frames, 100 log lines"),
    ],
)
def test_times_that_are_refused(times, num_ticks, reason):
    times = np.array(times) / 20
    if reason is None:
        assert len(frames_of_ticks(times, num_ticks, 20)) == num_ticks
        return
    with pytest.raises(ValueError, match=reason):
        frames_of_ticks(times, num_ticks, 20)


def test_two_frames_are_even_at_any_rate():
    """But not at that of ticks: the second of two lines has no frame, the last frame is there."""
    assert frames_of_ticks(np.array([0, 2]) / 20, 2, 20).tolist() == [0, -1]


# ------------------------------------------------------------------------------------------- containers


def test_sixty_frames_a_second(tmp_path):
    spec = ClipSpec(native_fps=60, fps=15, clip_stride=8)
    rows, _ = build(write(tmp_path, 130, numbered([*range(130), 129], fps=60)), spec)
    assert [shown(row) for row in rows] == [ticks_of(row) for row in rows] and len(rows) == 9
    _, report = build(tmp_path)
    assert "frame rate: expected 20 FPS, found 60" in report.rejected[0].reason


def test_sixty_frames_a_second_timed_in_milliseconds(tmp_path):
    """A container that counts milliseconds rounds 16.67 to 16 or 17: still the ticks' grid, gaps included."""
    ticks = [*range(40), *range(49, 131)]
    moments = [round(1000 * tick / 60) for tick in ticks] + [round(1000 * 131 / 60)]
    video = timed(numbered(ticks, fps=60), [(1, step) for step in np.diff(moments).tolist()])
    place = video.index(b"mdhd") + 16
    video = video[:place] + uint32(1000) + video[place + 4 :]
    rows, report = build(write(tmp_path, 130, video), ClipSpec(native_fps=60, fps=15, clip_stride=8))
    assert report.repairs["frames_timed"] == 9 and len(rows) > 0
    assert [shown(row) for row in rows] == [ticks_of(row) for row in rows]


@pytest.mark.parametrize("bf", ["1", "3"])
@pytest.mark.parametrize("keep_edits", [True, False])
def test_frames_stored_out_of_order(tmp_path, bf, keep_edits):
    """B-frames are decoded in another order than shown; without an edit list the first is shown some ticks late."""
    video = numbered([*range(130), 129], bf=bf, preset="veryfast")
    assert b"ctts" in video
    if not keep_edits:
        video = video.replace(b"edts", b"free")
    rows, report = build(write(tmp_path, 130, video))
    assert [shown(row) for row in rows] == [ticks_of(row) for row in rows] and len(rows) == 9, report.rejected
    assert VideoReader(video, "x")._start == (0 if keep_edits else {"1": 0.05, "3": 0.1}[bf])


def test_gap_among_frames_stored_out_of_order(tmp_path):
    """Times of decoding and of showing both leave out the ticks that are missing."""
    video = numbered(range(120), bf="3", preset="veryfast")
    reader = VideoReader(video, "x")
    assert reader._times.tolist() == [tick / 20 for tick in range(120)]
    start = video.index(b"ctts") + 8
    (count,) = np.frombuffer(video[start : start + 4], dtype=">u4")
    runs = np.frombuffer(video[start + 4 : start + 4 + 8 * count], dtype=">u4").reshape(-1, 2)
    offsets = np.repeat(runs[:, 1].astype(int), runs[:, 0])
    decoded = np.arange(120) * UNIT
    order = (decoded + offsets) // UNIT - 2  # the tick that each stored picture shows
    assert sorted(order) == list(range(120)) and order.tolist() != list(range(120))
    late = np.where(order >= 60, 10, 0)  # what is shown from tick 60 on is shown ten ticks later
    first = int((order >= 60).argmax())
    durations = [(first - 1, UNIT), (1, 11 * UNIT), (120 - first, UNIT)]
    moved = np.where(np.arange(120) >= first, 10, 0)
    changed = offsets + (late - moved) * UNIT
    moov_edits = uint32(0, 1, 6500, 2 * UNIT, 65536)
    video = timed(video.replace(b"ctts", b"free"), durations, [(1, int(offset)) for offset in changed], moov_edits)
    frames = VideoReader(video, "x").frames_of_ticks(130, 20)
    assert frames.tolist() == [*range(60), *[-1] * 10, *range(60, 120)]


@pytest.mark.parametrize("delay", [0, 10, 500, 12345])
def test_start_offset(tmp_path, delay):
    """An empty edit, in thousandths of a second, shows the whole video later."""
    late = uint32(0, 2, delay, 2**32 - 1, 65536, 6550, 0, 65536)
    video = timed(numbered([*range(130), 129]), [(131, UNIT)], edits=late)
    rows, report = build(write(tmp_path, 130, video))
    assert [shown(row) for row in rows] == [ticks_of(row) for row in rows] and len(rows) == 9, report.rejected


def test_first_frame_that_may_be_missing_is_rejected(tmp_path):
    """Recorders write 131 frames; of these, the first is missing, as the start at one tick tells."""
    late = uint32(0, 2, 50, 2**32 - 1, 65536, 6500, 0, 65536)
    video = timed(numbered(range(1, 131)), [(130, UNIT)], edits=late)
    rows, report = build(write(tmp_path, 130, video))
    assert rows == [] and "the first frame is shown at 0.05 s, one tick late" in report.rejected[0].reason


def test_edit_list_that_cuts_out_frames_is_rejected(tmp_path):
    cut = uint32(0, 2, 3000, 0, 65536, 2500, 80 * UNIT, 65536)
    rows, report = build(write(tmp_path, 130, timed(numbered(range(130), g="1"), [(130, UNIT)], edits=cut)))
    assert rows == [] and "log lines" in report.rejected[0].reason


def test_time_stamps_that_go_backwards(tmp_path):
    video = numbered(range(130))
    for runs in ([(30, UNIT), (1, 2**32 - 3 * UNIT), (99, UNIT)], [(129, UNIT), (1, 2**32 - 1)]):
        rows, report = build(write(tmp_path, 130, timed(video, runs)))
        assert rows == [] and "time stamps go backwards: picture" in report.rejected[0].reason
    # Frames that are shown in another order than they are stored in, which these cannot be.
    for offsets in ([(32, 0), (1, UNIT), (1, -UNIT), (96, 0)], [(32, 0), (1, -5 * UNIT), (97, 0)]):
        rows, report = build(write(tmp_path, 130, timed(video, [(130, UNIT)], offsets)))
        assert rows == [] and "time stamps" in report.rejected[0].reason


@pytest.mark.parametrize("ticks", [range(131), [*range(60), *range(64, 131)]])
def test_fragmented_files(tmp_path, ticks):
    """Their times are in every fragment, not in the index: taken for even, and compared with those decoded."""
    video = numbered(list(ticks), movflags="frag_keyframe+empty_moov", g="10")
    assert b"moof" in video and VideoReader(video, "x")._times is None
    rows, report = build(write(tmp_path, 130, video))
    if len(ticks) == 131:
        assert [shown(row) for row in rows] == [ticks_of(row) for row in rows] and len(rows) == 9
    else:
        assert rows == [] and "127 frames, 130 log lines" in report.rejected[0].reason


def test_fragmented_file_with_a_gap_is_rejected_when_decoded(tmp_path):
    video = numbered(list(range(131)), movflags="frag_keyframe+empty_moov", g="10")
    for number, piece in enumerate(pieces := video.split(b"tfdt")):  # a fragment's first time, in version 1's 8 bytes
        if number > 4:
            pieces[number] = piece[:4] + (int.from_bytes(piece[4:12], "big") + 4 * UNIT).to_bytes(8, "big") + piece[12:]
    video = b"tfdt".join(pieces)
    rows, report = build(write(tmp_path, 130, video))
    assert rows == [] and "time stamps: frame" in report.rejected[0].reason


def test_two_video_tracks_leave_times_to_the_decoder():
    assert VideoReader(encoded(), "x")._times is not None
    one = encoded()
    moov = one.index(b"moov") - 4
    track = one.index(b"trak") - 4
    size = int.from_bytes(one[track : track + 4], "big")
    two = one[:moov] + box(b"moov", one[moov + 8 : track + size], one[track : track + size], one[track + size :])
    assert VideoReader(two, "x")._times is None


# ------------------------------------------------------------------------------------- alignment, labelling


def test_alignment_compares_the_frames_of_ticks(uneven):
    (shard,) = list_shards([str(path) for path in sorted(uneven.iterdir())])
    (pair,) = read_pairs(shard)
    result = check_recording(pair, AlignmentOptions(max_ticks=240))
    assert result.verdict == "undecided" and (result.lines, result.frames) == (1200, 1160)
    reader = VideoReader(pair.video, "x")
    shift, cause = decode_shifts(reader, [(590, 650)], reader.frames_of_ticks(1200, 20))
    assert np.flatnonzero(cause == "missing").tolist() == list(range(599, 640))
    assert np.isnan(shift[599:640]).all()


def test_videos_without_a_log_must_be_even():
    with pytest.raises(VideoError, match="found 1160 frames in 1200 ticks; encode the video again at a constant 20"):
        VideoReader(DATA / "uneven-frames.mp4", "x").check_even(20)
    late = timed(numbered(range(70)), [(70, UNIT)], edits=uint32(0, 2, 50, 2**32 - 1, 65536, 3500, 0, 65536))
    with pytest.raises(VideoError, match=r"the first frame is shown at 0.05 s, one tick late: .*, beginning at 0"):
        VideoReader(late, "x").check_even(20)
    VideoReader(make_video(70), "x").check_even(20)
    VideoReader(numbered(range(70), bf="3", preset="veryfast"), "x").check_even(20)
