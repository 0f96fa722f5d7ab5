"""The data-set builder: rows against the oracle in every mode, splits by player, every kind of bad input."""

import io
import json
import shutil
import tarfile

import datasets
import numpy as np
import pytest
import torch.nn.functional as F
from datasets import load_dataset, load_dataset_builder
from helpers_data import (
    DATA,
    LUANTI,
    make_lines,
    make_video,
    name_of,
    oracle_actions,
    oracle_states,
    shard_of,
    to_log,
    write_recording,
    write_shard,
)
from torchcodec.decoders import VideoDecoder

import vjepa_ac_hf  # noqa: F401  (registers the builder)
from vjepa_ac_hf.recordings.splits import stable_share

SMALL = {"resolution": 32}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two shards, five recordings of four players; s0 has a segment in both shards."""
    folder = tmp_path_factory.mktemp("shards")
    plan = [[("s0", 0), ("s1", 0)], [("s0", 1), ("s2", 0), ("s3", 0)]]
    lines = {}
    for index, recordings in enumerate(plan):
        names = [name_of(*recording) for recording in recordings]
        for offset, name in enumerate(names):
            lines[name] = write_recording(folder / "files", name, 130, seed=10 * index + offset)
        shard_of(folder / "files", folder / f"shard-{index:06d}.tar", names)
    return folder, lines


@pytest.fixture
def cache(tmp_path, monkeypatch):
    return str(tmp_path / "cache")


def load(cache, **options):
    return load_dataset("vpt_tubelets", cache_dir=cache, **{**SMALL, **options})


def frames_of(row):
    return row["video"].get_frames_at(list(range(len(row["video"])))).data.numpy()


def assert_same_rows(rows, expected):
    rows, expected = list(rows), list(expected)
    assert len(rows) == len(expected) > 0
    for row, other in zip(rows, expected, strict=True):
        for column in ("recording_id", "session_id", "player_id", "start_tick"):
            assert row[column] == other[column]
        for column in ("actions", "states"):
            np.testing.assert_array_equal(np.asarray(row[column]), np.asarray(other[column]))
        np.testing.assert_array_equal(frames_of(row), frames_of(other))


def check_against_oracle(row, lines, folder):
    start = row["start_tick"]
    np.testing.assert_allclose(np.asarray(row["actions"]), oracle_actions(lines, start), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(row["states"]), oracle_states(lines, start))
    source = VideoDecoder(str(folder / f"{row['recording_id']}.mp4"))
    frames = frames_of(row)
    assert frames.shape == (16, 3, 32, 32)
    for index, frame in enumerate(frames):
        # Neighbouring frames differ by 3 shades: the right tick must be the nearest.
        ticks = [tick for tick in range(start + 4 * index - 2, start + 4 * index + 3) if tick >= 0]
        near = source.get_frames_at(ticks).data.double()
        near = F.interpolate(near, size=(32, 56), mode="bilinear", antialias=True)[..., 12:44].numpy()
        errors = np.abs(near - frame).mean(axis=(1, 2, 3))
        assert ticks[errors.argmin()] == start + 4 * index and errors.min() < 8


def test_rows_equal_the_oracle(shards, cache):
    folder, lines = shards
    data = load(cache, data_files=str(folder / "*.tar"), validation_players=["silly-s0"])
    assert {split: len(rows) for split, rows in data.items()} == {"train": 6, "validation": 4}
    assert data["train"].features["actions"] == datasets.Array2D((7, 38), "float32")
    assert data["train"].features["states"] == datasets.Array2D((8, 2), "float32")
    assert data["train"].features["start_tick"].dtype == "int32"
    for split in data:
        for row in data[split]:
            assert row["start_tick"] in (0, 64)
            check_against_oracle(row, lines[row["recording_id"]], folder / "files")


def test_every_mode_gives_the_same_rows(shards, cache):
    folder, _ = shards
    options = {"data_files": str(folder / "*.tar"), "validation_players": ["silly-s3"]}
    data = load(cache, **options)
    streamed = load(cache, streaming=True, **options)
    parallel = load(cache + "2", num_proc=2, **options)
    assert set(data) == set(streamed) == set(parallel) == {"train", "validation"}
    assert data["train"].column_names == streamed["train"].column_names
    for split in data:
        assert_same_rows(streamed[split], data[split])
        assert_same_rows(parallel[split], data[split])


def test_folder_gives_the_same_rows_as_shards(shards, cache):
    folder, _ = shards
    names = sorted(path.stem for path in (folder / "files").glob("*.mp4"))
    tar = shard_of(folder / "files", folder / "all.tar_", names).rename(folder / "sorted_all.tar")
    expected = load(cache, data_files=str(tar), validation_fraction=0, split="train")
    tar.unlink()
    assert_same_rows(load(cache, data_dir=str(folder / "files"), validation_fraction=0, split="train"), expected)


def test_real_recording(cache):
    data = load(cache, data_dir=str(DATA), split="train")
    lines = [json.loads(line) for line in (DATA / f"{LUANTI}.jsonl").read_text().splitlines()]
    assert data["start_tick"][:] == [0, 64, 128]
    for row in data:
        np.testing.assert_allclose(row["actions"], oracle_actions(lines, row["start_tick"]), rtol=0, atol=1e-4)


def test_options_shape_the_rows(shards, cache):
    folder, lines = shards
    options = {"fps": 10, "frames_per_clip": 6, "tubelet_size": 3, "clip_stride": 50, "resize_mode": "squash"}
    data = load(cache, data_files=str(folder / "shard-000000.tar"), split="train", validation_fraction=0, **options)
    assert data["start_tick"][:] == [0, 50, 100] * 2
    for row in data:
        expected = oracle_actions(lines[row["recording_id"]], row["start_tick"], tubelets=2, ticks=6)
        np.testing.assert_allclose(row["actions"], expected, rtol=0, atol=1e-4)
        assert frames_of(row).shape == (6, 3, 32, 32) and row["video"].metadata.average_fps == 10


def test_gui_selection_and_cursor(shards, cache):
    folder, lines = shards
    options = {"data_files": str(folder / "shard-000000.tar"), "split": "train", "validation_fraction": 0}
    everything = load(cache, **options)
    shares = {
        start: sum(line["isGuiOpen"] for line in lines[name_of("s0")][start : start + 61]) / 61 for start in (0, 64)
    }
    limit = sum(shares.values()) / 2
    few = load(cache, max_gui_fraction=limit, **options)
    assert (
        few["start_tick"][:]
        == [start for start in (0, 64) if shares[start] <= limit] * 2
        != everything["start_tick"][:]
    )
    drawn = load(cache, draw_cursor=True, **options)
    before, after = frames_of(everything[0]).astype(int), frames_of(drawn[0]).astype(int)
    change = np.abs(after - before).max(axis=(1, 2, 3))
    gui = [lines[name_of("s0")][4 * j]["isGuiOpen"] for j in range(16)]
    assert change[gui].min() > 60 and change[: gui.index(True)].max() < 40


# ------------------------------------------------------------------------------------------------------ splits


def test_hash_never_changes():
    """Against `printf NAME | sha256sum`: what a data set of last year has for validation, one of today has."""
    assert stable_share("silly-s0") == pytest.approx(0xA8ACA35B8219E78A / 2**64, abs=1e-15)
    assert stable_share("cheeky-cornflower-setter") == pytest.approx(0xB79B88C337120010 / 2**64, abs=1e-15)


def test_no_player_is_in_both_splits_and_every_row_says_whose_it_is(shards, cache):
    folder, _ = shards
    shares = sorted(stable_share(f"silly-s{index}") for index in range(4))
    data = load(cache, data_files=str(folder / "*.tar"), validation_fraction=(shares[1] + shares[2]) / 2)
    assert len(set(data["train"]["player_id"])) == len(set(data["validation"]["player_id"])) == 2
    assert not set(data["train"]["player_id"]) & set(data["validation"]["player_id"])
    for row in [row for split in data.values() for row in split.remove_columns("video")]:
        player = "-".join(row["recording_id"].split("-")[:2])
        assert (row["player_id"], row["session_id"]) == (player, f"{player}-20220101")


def test_default_share_that_leaves_no_validation_is_one_split(shards, cache, caplog):
    folder, _ = shards
    data = load(cache, data_files=str(folder / "shard-000000.tar"))
    assert set(data) == {"train"} and not caplog.records  # nobody has asked for another


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1e-9}, "leaves the validation split empty: none of 2 players"),
        ({"validation_fraction": 0.9999999}, "the train split is empty: all 2 players are for validation"),
        ({"validation_fraction": 1.5}, r"validation_fraction must be in \[0, 1\), found 1.5"),
        ({"validation_players": []}, "validation_players leaves the validation split empty: no name given"),
        ({"validation_sessions": []}, "validation_sessions leaves the validation split empty: no name given"),
        (
            {"validation_players": ["silly-s7"]},
            r"not to be built: \['silly-s7'\]; the nearest of 2 players: \['silly-s",
        ),
        (
            {"validation_sessions": ["silly-s0-20220102"]},
            r"not to be built: \['silly-s0-20220102'\]; the nearest of 2 sessions: \['silly-s0-20220101'\]",
        ),
        ({"validation_players": ["silly-s0", "silly-s1"]}, "the train split is empty"),
        ({"validation_players": ["silly-s0"], "validation_fraction": 0.5}, "give one of .*, found .*0.5.*silly-s0"),
        ({"validation_players": ["silly-s0"], "validation_sessions": ["a"]}, "give one of"),
        ({"split_by": "clip"}, r"split_by must be one of \('player', 'session'\), found 'clip'"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_empty_or_unknown_splits_are_errors(shards, cache, options, message, streaming):
    with pytest.raises(ValueError, match=message):
        load(cache, data_files=str(shards[0] / "shard-000000.tar"), streaming=streaming, **options)


def test_given_splits_are_kept_and_must_not_share_a_player(shards, cache):
    folder, _ = shards
    first, second = (str(folder / f"shard-00000{index}.tar") for index in range(2))
    with pytest.raises(ValueError, match="player 'silly-s0' is in the splits 'train' and 'test'"):
        load(cache, data_files={"train": first, "test": second})
    files = {split: [str(folder / f"files/{name_of(player)}.*")] for split, player in (("train", "s1"), ("test", "s2"))}
    data = load(cache, data_files=files)
    assert {split: set(rows["player_id"]) for split, rows in data.items()} == {
        "train": {"silly-s1"},
        "test": {"silly-s2"},
    }
    with pytest.raises(ValueError, match="data_files names the splits"):
        load(cache, data_files=files, validation_fraction=0.5)


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 6}, "found 20 / 6"),
        ({"resolution": 33}, "positive even number of pixels, found 33"),
        ({"resize_mode": "pad"}, "found 'pad'"),
        ({"max_gui_fraction": 2}, r"must be in \[0, 1\], found 2"),
    ],
)
def test_options_are_checked_before_any_file_is_read(shards, cache, options, message):
    with pytest.raises(ValueError, match=message):
        load_dataset_builder("vpt_tubelets", data_files=str(shards[0] / "*.tar"), cache_dir=cache, **options)


def bad_recordings():
    good_log, good_video = to_log(make_lines(100)), make_video(100)
    lines = make_lines(100)
    lines[40]["yaw"] = float("nan")
    no_yaw = make_lines(100)
    del no_yaw[40]["yaw"]
    return {
        "missing-log": (None, good_video, "missing .jsonl"),
        "missing-video": (good_log, None, "missing .mp4"),
        "empty-video": (good_log, b"", "empty video file: expected an mp4 video, found 0 bytes"),
        "truncated-video": (good_log, good_video[: len(good_video) // 2], "truncated-video.mp4: cannot open the video"),
        "empty-log": (b"", good_video, "found an empty log"),
        "broken-line": (good_log[:-50], good_video, "broken-line.jsonl: line 100: broken JSON"),
        "nan-yaw": (to_log(lines), good_video, "nan-yaw.jsonl: line 41: field 'yaw': expected a finite number"),
        "no-yaw": (to_log(no_yaw), good_video, "no-yaw.jsonl: line 41: Object missing required field `yaw`"),
        "lengths": (to_log(make_lines(94)), good_video, "lengths differ: 100 frames, 94 log lines"),
        "rate": (good_log, make_video(100, fps=30), "frame rate: expected 20 FPS, found 30"),
        "short": (to_log(make_lines(60)), make_video(60), "one clip needs 61 ticks, found 60"),
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_recordings_are_rejected_with_reasons_and_healthy_ones_built(tmp_path, cache, caplog, streaming):
    healthy = [
        (f"6.8/fine{suffix}", data) for suffix, data in ((".mp4", make_video(100)), (".jsonl", to_log(make_lines(99))))
    ]
    members = [*healthy, *healthy, ("notes.txt", b"-")]
    for name, (log, video, _) in bad_recordings().items():
        members += [
            (f"{name}{suffix}", data) for suffix, data in ((".jsonl", log), (".mp4", video)) if data is not None
        ]
    shard = write_shard(tmp_path / "bad.tar", members)
    data = load(cache, data_files=str(shard), split="train", streaming=streaming)
    assert [row["recording_id"] for row in data] == ["fine"]
    for name, (_, _, reason) in bad_recordings().items():
        assert any(name in message and reason in message for message in caplog.messages), (name, caplog.messages)
    assert "rejected fine (bad.tar): doubled: .jsonl and .mp4 found again" in caplog.text
    assert "1 of 10 recordings accepted, 1 clips, 9 rejected" in caplog.text  # pairs; the rest was found on listing


def test_order_of_members_does_not_matter(shards, cache):
    folder, _ = shards
    names = [name_of("s0"), name_of("s1")]
    files = [f"{name}{suffix}" for suffix in (".jsonl", ".mp4") for name in names]
    for suffix, mode in ((".tar", "w"), (".tar.gz", "w:gz")):
        with tarfile.open(folder / f"mixed{suffix}", mode) as archive:
            for file in files:
                archive.add(folder / "files" / file, arcname=file)
    expected = list(load(cache, data_files=str(folder / "shard-000000.tar"), split="train"))
    for suffix in (".tar", ".tar.gz"):
        path = folder / f"mixed{suffix}"
        assert_same_rows(load(cache, data_files=str(path), split="train", streaming=True), expected)
        path.unlink()


def test_recording_in_two_shards_is_built_once(shards, cache, caplog, tmp_path):
    folder, _ = shards
    copies = [str(shutil.copy(folder / "shard-000000.tar", tmp_path / f"{copy}.tar")) for copy in "ab"]
    data = load(cache, data_files=copies, split="train")
    assert len(data) == 4 and len(set(zip(data["recording_id"], data["start_tick"], strict=True))) == 4
    assert f"rejected {name_of('s0')} (b.tar): doubled: already found in a.tar" in caplog.text


@pytest.mark.parametrize("damage", ["header", "payload", "end", "garbage"])
def test_damaged_tar_is_reported_and_what_is_before_it_built(shards, cache, caplog, tmp_path, damage):
    folder, _ = shards
    data = bytearray((folder / "shard-000000.tar").read_bytes())
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as archive:
        third = archive.getmembers()[2]
        end = archive.getmembers()[3].offset_data
    if damage == "header":
        data[third.offset : third.offset + 512] = b"\xff" * 512
    elif damage == "payload":
        del data[third.offset_data + 100 :]
    elif damage == "end":
        del data[end - 512 :]
    broken = tmp_path / "broken.tar"
    broken.write_bytes(b"no tar" * 200 if damage == "garbage" else data)
    files = [str(folder / "shard-000001.tar"), str(broken)]
    rows = load(cache, data_files=files, split="train")
    assert "silly-s1" not in rows["player_id"] and len(rows) == (6 if damage == "garbage" else 8)
    lost = "all of it is lost" if damage == "garbage" else "is lost"
    assert any("rejected - (broken.tar): unreadable tar: " in m and lost in m for m in caplog.messages), caplog.messages


def test_empty_tar_has_a_builder_and_loading_it_is_an_error(tmp_path, cache):
    shard = write_shard(tmp_path / "empty.tar", [])
    builder = load_dataset_builder("vpt_tubelets", data_files=str(shard), cache_dir=cache)
    assert list(builder.info.features) == [
        "video",
        "actions",
        "states",
        "recording_id",
        "session_id",
        "player_id",
        "start_tick",
    ]
    with pytest.raises(ValueError, match="no recording .* to build in 1 files.*give data_files=.*or data_dir="):
        load(cache, data_files=str(shard))


def test_stream_whose_recordings_are_all_rejected_ends_as_a_table_does(cache, tmp_path):
    files = tmp_path / "files"
    write_recording(files, name_of("good"), 70)
    write_recording(files, name_of("short"), 30)
    streams = load(cache, data_dir=str(files), validation_players=["silly-short"], streaming=True)
    assert len(list(streams["train"])) == 1
    with pytest.raises(ValueError, match="no clip could be built for the split 'validation': all of its recordings"):
        list(streams["validation"])
    given = {"train": str(files / "*good*"), "test": str(files / "*short*")}
    assert (
        list(load(cache, data_files=given, split="test", streaming=True)) == []
    )  # left out of a table, with a warning


def test_split_whose_recordings_are_all_rejected(cache, tmp_path):
    files = tmp_path / "files"
    write_recording(files, name_of("good"), 70)
    write_recording(files, name_of("short"), 30)
    with pytest.raises(ValueError, match="no clip could be built for the split 'validation'"):
        load(cache, data_dir=str(files), validation_players=["silly-short"])
    with pytest.raises(ValueError, match="no clip could be built for the split 'train'"):
        load(cache, data_dir=str(files), validation_players=["silly-good"])
