"""Rejections say what to do about them, and what they say works (docs/errors.md has the list)."""

import argparse
import shlex
import shutil
import subprocess

import pytest
from accelerate import PartialState
from corpus import encoded
from helpers_clips import write_clips
from helpers_data import make_lines, make_video, name_of, to_log
from helpers_training import load_program

from vjepa_ac_hf import VJEPA2ACProcessor
from vjepa_ac_hf.building.rows import BuildReport, iter_clips
from vjepa_ac_hf.building.selection import BuildOptions, options_from
from vjepa_ac_hf.building.vpt_tubelets import VPTTubeletsConfig
from vjepa_ac_hf.loading.clips import load_action_statistics, load_clips
from vjepa_ac_hf.recordings.shards import list_shards, read_pairs
from vjepa_ac_hf.recordings.video import VideoError, VideoReader, check_frame_rate

NAME = name_of("walnut")


def build(folder, files, options=None):
    """Clips and the reasons of rejections, of recordings that lie loose in a folder."""
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    report, clips, listed = BuildReport(), [], list_shards(sorted(map(str, folder.glob("*"))))
    for shard in listed:
        clips += iter_clips(read_pairs(shard), options or BuildOptions(resolution=32), report)
    return clips, [r.reason for r in (*report.rejected, *(r for shard in listed for r in shard.rejected))]


def follow(message, source, target):
    """Run the ffmpeg line of a message on a file."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs the program ffmpeg")
    line = message[message.index("ffmpeg -i FILE") :].replace("FILE", str(source)).replace("OUT.mp4", str(target))
    subprocess.run([*shlex.split(line), "-loglevel", "error", "-y"], check=True, stdin=subprocess.DEVNULL)
    return VideoReader(target, target.name)


def test_another_frame_rate(tmp_path):
    files = {f"{NAME}.mp4": make_video(100, fps=30), f"{NAME}.jsonl": to_log(make_lines(100))}
    clips, [reason] = build(tmp_path / "in", files)
    assert clips == []
    assert reason == (
        f"{NAME}.mp4: frame rate: expected 20 FPS, found 30: where all recordings are so, and a log line belongs to "
        "each frame, give --native_fps 30; else encode the video again: ffmpeg -i FILE -vf fps=20 OUT.mp4"
    )
    options = options_from(vars(VPTTubeletsConfig(native_fps=30, resolution=32)))
    clips, reasons = build(tmp_path / "in", files, options)
    assert len(clips) == 1 and reasons == []  # frames at every 6th tick: 91 of the 100


def test_another_frame_rate_encoded_again(tmp_path):
    (tmp_path / "fast.mp4").write_bytes(make_video(60, fps=30))
    with pytest.raises(VideoError) as caught:
        check_frame_rate(VideoReader(tmp_path / "fast.mp4", "fast.mp4"), 20)
    reader = follow(str(caught.value), tmp_path / "fast.mp4", tmp_path / "slow.mp4")
    check_frame_rate(reader, 20)
    assert reader.num_frames == 40  # two seconds, as before (`-r 20` would make 42)


def test_a_renamed_video_of_another_kind(tmp_path):
    (tmp_path / "renamed.mp4").write_bytes(encoded(format="avi"))
    with pytest.raises(VideoError, match=r"found b'RIFF.*', an AVI file: make it one: ffmpeg -i FILE") as caught:
        VideoReader(tmp_path / "renamed.mp4", "renamed.mp4")
    reader = follow(str(caught.value), tmp_path / "renamed.mp4", tmp_path / "made.mp4")
    assert reader.num_frames == 70 and reader.frame_rate == pytest.approx(20)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("a Matroska or WebM", None),  # a real one
        ("a Windows Media", bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")),
        ("a Flash video", b"FLV\x01\x05\0\0\0\x09" + bytes(20)),
        ("an Ogg", b"OggS" + bytes(40)),
        ("an MPEG program stream", bytes.fromhex("000001ba") + bytes(40)),
        (None, b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1/x\n"),
        (None, b"ffconcat version 1.0\nfile 'x'\n"),
        (None, b"\x89PNG\r\n\x1a\n" + bytes(100)),
    ],
)
def test_ffmpeg_is_named_for_known_kinds_of_video_alone(kind, data):
    """What may be a playlist would have ffmpeg open other files and addresses."""
    with pytest.raises(VideoError, match="expected an mp4 file") as caught:
        VideoReader(encoded(format="mkv") if data is None else data, "x.mp4")
    assert ("ffmpeg" in str(caught.value), f", {kind} file: " in str(caught.value)) == (kind is not None,) * 2


def test_a_missing_log(tmp_path):
    clips, [reason] = build(tmp_path / "in", {f"{NAME}.mp4": make_video(70)})
    assert clips == []
    assert reason == "missing .jsonl: a trained inverse dynamics head can write it (examples/label_videos.py)"


def test_no_validation_split(tmp_path, caplog):
    dataset = str(write_clips(tmp_path / "clips", train=3, validation=0))
    mending = "build the data set again with --validation_players NAME ..., or with --validation_fraction SHARE"
    with pytest.raises(ValueError) as caught:
        load_clips(dataset, "validation")
    assert str(caught.value) == f"{dataset}: no split 'validation', found ['train']: {mending}"
    with pytest.raises(ValueError, match=r"no split 'test', found \['train'\]$"):
        load_clips(dataset, "test")
    arguments = argparse.Namespace(dataset=dataset, streaming=True, eval_every=1)
    PartialState(cpu=True)  # its loggers want it
    statistics = load_action_statistics(dataset, "auto").to_dict()
    processor = VJEPA2ACProcessor(resolution=32, action_statistics=statistics)
    _, validation = load_program("examples/train.py").load_splits(arguments, processor)
    assert validation is None and f"nothing is validated during training; to have one, {mending}" in caplog.text
