"""Training input: which clips come when, by brute force; streams from disk and over HTTP; workers; exact resume."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers_clips import write_clips
from hub_server import HubServer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vjepa_ac_hf import VJEPA2ACProcessor
from vjepa_ac_hf.loading.cached_clips import CachedClips
from vjepa_ac_hf.loading.clips import (
    COLUMNS,
    ClipCollator,
    check_clips,
    clip_frame_rate,
    clip_name,
    load_action_statistics,
    load_clips,
)
from vjepa_ac_hf.loading.loader import ClipLoader
from vjepa_ac_hf.loading.order import ClipOrder
from vjepa_ac_hf.loading.streaming import GroupReader, ParquetClips

TENSORS = ("pixel_values_videos", "actions", "states")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """26 clips of 9 sessions in two Parquet files, row groups of 3 and a rest."""
    folder = write_clips(tmp_path_factory.mktemp("loading") / "clips", train=26, validation=0)
    whole = folder / "data" / "train-00000-of-00001.parquet"
    table = pq.read_table(whole)
    whole.unlink()
    pq.write_table(table[:14], folder / "data" / "train-00000-of-00002.parquet", row_group_size=3)
    pq.write_table(table[14:], folder / "data" / "train-00001-of-00002.parquet", row_group_size=3)
    return folder


@pytest.fixture(scope="module")
def processor(dataset) -> VJEPA2ACProcessor:
    return VJEPA2ACProcessor(resolution=32, action_statistics=load_action_statistics(str(dataset)).to_dict())


def clips_of(dataset: Path, kind: str):
    return load_clips(str(dataset), "train", streaming=kind == "stream")


# ------------------------------------------------------------------------------------------------------ order

sizes_of_groups = st.lists(st.integers(0, 12), min_size=1, max_size=30).filter(sum)


@settings(max_examples=150, deadline=None)
@given(
    sizes_of_groups,
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 5),
    st.one_of(st.none(), st.integers(1, 200)),
)
def test_every_clip_comes_once_an_epoch_over_all_processes(sizes, batch_size, world_size, seed, window):
    """The batches of all processes, laid in a row, are permutations of the clips, one after the other."""
    num_clips = sum(sizes)
    ranks = [
        ClipOrder(np.array(sizes), batch_size, seed=seed, rank=r, world_size=world_size, window=window)
        for r in range(world_size)
    ]
    num_batches = 3 * num_clips // (batch_size * world_size) + 2
    drawn = [order.batch(m) for m in range(num_batches) for order in ranks]
    epochs, clips = (np.concatenate(part) for part in zip(*drawn, strict=True))
    for epoch in range(3):
        assert sorted(clips[epoch * num_clips : (epoch + 1) * num_clips]) == list(range(num_clips))
        assert set(epochs[epoch * num_clips : (epoch + 1) * num_clips]) == {epoch}
    # What one process still has to come in an epoch, from any of its batches on.
    for rank, order in enumerate(ranks):
        first = (7 * seed) % num_batches
        mine = [pair for m in range(first, num_batches) for pair in zip(*order.batch(m), strict=True)]
        for epoch in (0, 1):
            assert order.rest_of_epoch(epoch, first).tolist() == [clip for e, clip in mine if e == epoch], rank


@pytest.mark.parametrize("window", [None, 40])
def test_order_is_a_function_of_its_arguments_alone(window):
    groups = np.full(30, 7)
    order = ClipOrder(groups, 4, seed=3, window=window)
    batches = [order.batch(m)[1].tolist() for m in range(120)]
    backwards = [ClipOrder(groups, 4, seed=3, window=window).batch(m)[1].tolist() for m in (119, 52, 53, 0)]
    assert backwards == [batches[m] for m in (119, 52, 53, 0)]
    other = ClipOrder(groups, 4, seed=4, window=window)
    assert other.batch(0)[1].tolist() != batches[0]
    flat = np.concatenate(batches)
    assert (flat[:210] != flat[210:420]).mean() > 0.9  # epochs differ
    if window is None:  # any division of the same batch among processes holds the same clips
        halves = [ClipOrder(210, 2, seed=3, rank=r, world_size=2).batch(5)[1].tolist() for r in (0, 1)]
        assert halves[0] + halves[1] == batches[5]


@pytest.mark.parametrize("world_size", [1, 3])
def test_streams_read_row_groups_once_and_hold_a_window(world_size):
    """Brute force over one epoch: who touches which row group from when to when."""
    sizes = np.random.default_rng(0).integers(5, 12, 400)
    group_of = np.repeat(np.arange(400), sizes)
    window, reads, most_held = 150, 0, 0
    for rank in range(world_size):
        order = ClipOrder(sizes, 8, seed=1, rank=rank, world_size=world_size, window=window)
        touched = group_of[order.rest_of_epoch(0, 0)]
        reads += len(set(touched))
        first = {g: i for i, g in reversed(list(enumerate(touched)))}
        last = {g: i for i, g in enumerate(touched)}
        held = [sizes[[g for g in first if first[g] <= i <= last[g]]].sum() for i in range(0, len(touched), 10)]
        most_held = max(most_held, max(held))
    assert 400 <= reads <= 400 + world_size - 1
    assert most_held <= window + 2 * 12


def test_streams_mix_sessions():
    """Sessions in a batch of 32, against drawing from all clips; what order of files or of row groups gives fails."""
    # 40 files of 4 sessions (recordings one after the other), 60 clips a session, in row groups of 10.
    sizes = np.full(40 * 4 * 6, 10)
    session_of = np.repeat(np.arange(160), 60)

    def sessions(window: int | None) -> np.ndarray:
        order = ClipOrder(sizes, 32, seed=0, window=window)
        return np.array([len(set(session_of[order.batch(m)[1]])) for m in range(300)])

    ideal = sessions(None).mean()
    assert ideal == pytest.approx(160 * (1 - (1 - 1 / 160) ** 32), rel=0.02)
    in_file_order = np.mean([len(set(session_of[32 * m : 32 * m + 32])) for m in range(300)])
    assert in_file_order < 0.1 * ideal and sessions(1).mean() < 0.2 * ideal
    mixed = sessions(1000)
    assert mixed.mean() > 0.85 * ideal  # 32 draws from about 100 row groups meet 28 of them
    assert mixed.min() > 0.65 * ideal
    assert min(mixed[:10].mean(), mixed[-10:].mean()) > 0.75 * ideal  # 300 batches are an epoch: at its ends as well


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_sizes": 0}, "holds no clips"),
        ({"batch_size": 0}, "found batch_size 0"),
        ({"window": 0}, "window 0"),
        ({"seed": -1}, "seed -1"),
        ({"rank": 2, "world_size": 2}, "rank 2, world_size 2"),
    ],
)
def test_orders_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClipOrder(**{"group_sizes": 5, "batch_size": 2, "seed": 0, **arguments})


# ------------------------------------------------------------------------------------------------------ streams


def test_stream_rows_equal_random_access(dataset):
    stream, table = clips_of(dataset, "stream"), clips_of(dataset, "table")
    assert len(stream) == len(table) == 26 and stream.group_sizes.tolist() == [3, 3, 3, 3, 2, 3, 3, 3, 3]
    for ours, theirs in zip(stream, table, strict=True):
        assert ours["video"]["bytes"] == theirs["video"]["bytes"] and clip_name(ours) == clip_name(theirs)
        assert ours["actions"].dtype == np.float32 and ours["actions"].tolist() == theirs["actions"]
        assert ours["states"].tolist() == theirs["states"] and ours["session_id"] == theirs["session_id"]


def test_rows_read_where_they_lie_equal_random_access(dataset):
    """Any rows, in any of the ways in which they are asked for."""
    stream, table = clips_of(dataset, "stream"), clips_of(dataset, "table")
    chosen = [25, 0, 7, 7, 13, 14, 2]
    rows, expected = stream.select(chosen), table.select(chosen)
    assert rows.column_names == list(COLUMNS) and len(rows) == 7
    assert rows.features["actions"] == expected.features["actions"]
    assert [clip_name(row) for row in rows] == [clip_name(row) for row in expected]
    assert [row["video"]["bytes"] for row in rows] == [row["video"]["bytes"] for row in expected]
    assert clip_name(rows[-1]) == clip_name(expected[-1])
    assert [clip_name(row) for row in rows.__getitems__([3, 0, 3])] == [clip_name(expected[i]) for i in (3, 0, 3)]
    for index in (slice(1, 5), slice(None), [4, 0]):
        assert rows[index]["start_tick"] == expected[index]["start_tick"]
        assert [a.tolist() for a in rows[index]["actions"]] == expected[index]["actions"]
    light = rows.select([6, 1]).select_columns(["states", "recording_id"])
    assert light.column_names == ["states", "recording_id"] and set(light[0]) == {"states", "recording_id"}
    assert [row["recording_id"] for row in light] == [expected[i]["recording_id"] for i in (6, 1)]
    with pytest.raises(IndexError):
        rows[7]


def test_rows_in_order_read_every_row_group_once(dataset, monkeypatch):
    stream, read = clips_of(dataset, "stream"), []
    whole = ParquetClips.read_group
    monkeypatch.setattr(
        ParquetClips, "read_group", lambda clips, g, columns: read.append(g) or whole(clips, g, columns)
    )
    rows = stream.select(range(26))
    for start in range(0, 26, 2):  # batches that end within row groups
        assert len(rows[start : start + 2]["start_tick"]) == 2 and len(rows._groups) <= 2
    assert sorted(read) == list(range(9))


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    return tmp_path / "datasets-cache"


def test_streams_write_nothing(processor, tmp_path, datasets_cache):
    """Training and validation clips, read whole."""
    write_clips(tmp_path / "clips", train=9, validation=6)
    train = load_clips(str(tmp_path / "clips"), "train", streaming=True)
    validation = load_clips(str(tmp_path / "clips"), "validation", streaming=True).select([5, 1, 3])
    names = [name for batch in islice(iter(ClipLoader(train, processor, 3)), 3) for name in batch["clips"]]
    assert len(set(names)) == 9 and len(list(validation)) == 3
    assert [path for path in datasets_cache.rglob("*") if path.is_file()] == []


def test_a_copy_is_of_one_split_and_announced_before_it_is_made(tmp_path, datasets_cache, caplog):
    folder = write_clips(tmp_path / "clips", train=9, validation=6)
    file = next((folder / "data").glob("validation-*"))
    assert len(load_clips(str(folder), "validation")) == 6
    (message,) = [message for message in caplog.messages if "copying" in message]
    assert message.startswith(f"{folder}, split validation: copying {file.stat().st_size / 1e9:.3g} GB (1 files) from ")
    assert f"from {folder / 'data'} to {datasets_cache}" in message
    assert [path.name for path in datasets_cache.rglob("*.arrow")] == ["clips-validation.arrow"]
    caplog.clear()
    assert len(load_clips(str(folder), "validation")) == 6 and "copying" not in caplog.text  # the copy is there
    assert len(load_clips(str(folder), "train")) == 9 and "split train: copying" in caplog.text


class Files(BaseHTTPRequestHandler):
    """Serves a folder by ranges and notes them: `server.ranges` has (file, first byte, length)."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        content = (self.server.folder / self.path.lstrip("/")).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        first, last = (int(asked[1]), min(int(asked[2]), len(content) - 1)) if asked else (0, len(content) - 1)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1 if asked else len(content)))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if body:
            self.server.ranges.append((self.path, first, last - first + 1))
            self.wfile.write(content[first : last + 1])


@pytest.fixture
def http_files(dataset):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.folder, server.ranges = dataset / "data", []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def group_bytes(files: list[Path]) -> dict[tuple[str, int], int]:
    """Where every row group begins, and its length, from the footers."""
    places = {}
    for file in files:
        footer = pq.read_metadata(file)
        for g in range(footer.num_row_groups):
            columns = [footer.row_group(g).column(c) for c in range(footer.row_group(g).num_columns)]
            starts = [c.dictionary_page_offset or c.data_page_offset for c in columns]
            end = max(s + c.total_compressed_size for s, c in zip(starts, columns, strict=True))
            places[f"/{file.name}", min(starts)] = end - min(starts)
    return places


def test_a_remote_stream_reads_every_row_group_once_and_skips_on_resume(dataset, http_files):
    files = sorted((dataset / "data").glob("*.parquet"))
    base = f"http://127.0.0.1:{http_files.server_port}"
    clips = ParquetClips([f"{base}/{file.name}" for file in files], COLUMNS)
    assert clips.identity == ParquetClips([str(file) for file in files], COLUMNS).identity
    groups = group_bytes(files)
    http_files.ranges.clear()

    # A window of one clip: row groups one after the other, in random order.
    order = ClipOrder(clips.group_sizes, 2, seed=0, window=1)
    rows = [
        clip_name(row) for batch in islice(GroupReader(clips, order, batches_ahead=0).batches(0), 13) for row in batch
    ]
    assert len(set(rows)) == 26
    assert Counter(http_files.ranges) == Counter({(*place, size): 1 for place, size in groups.items()})

    http_files.ranges.clear()
    rest = [
        clip_name(row) for batch in islice(GroupReader(clips, order, batches_ahead=0).batches(9), 4) for row in batch
    ]
    assert rest == rows[18:]
    assert len(http_files.ranges) <= 4  # 8 of 26 clips are left
    assert all(groups[file, first] == size for file, first, size in http_files.ranges)


def test_a_reader_holds_no_more_than_it_needs(dataset):
    """Row groups are released after their last row, those that a continued run has partly behind it as well."""
    clips = clips_of(dataset, "stream")
    order = ClipOrder(clips.group_sizes, 2, seed=0, window=8)
    for first_batch in (0, 5):
        batches = GroupReader(clips, order, batches_ahead=1).batches(first_batch)
        for batch in range(first_batch, first_batch + 60):
            next(batches)
            held = batches.gi_frame.f_locals["groups"]
            # 13 batches an epoch; with a batch read ahead, an epoch's last row groups and the next one's first.
            assert len(held) <= 8 and all(batch // 13 <= epoch <= (batch + 2) // 13 for epoch, _ in held)


def test_a_hub_repository_is_streamed_without_a_download(dataset, tmp_path):
    program = (
        "import json, sys\n"
        "from vjepa_ac_hf.loading.clips import load_clips, clip_name\n"
        "clips = load_clips('tester/clips', 'train', streaming=True)\n"
        "print(json.dumps([clips.files[0], len(clips), clips.identity, clip_name(clips.read_group(7)[1])]))\n"
    )
    with HubServer() as server:
        files = {f"data/{f.name}": f.read_bytes() for f in (dataset / "data").glob("*.parquet")}
        server.repositories["dataset", "tester/clips"] = files
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        environment.pop("HF_HUB_OFFLINE", None)
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    first, count, identity, name = json.loads(result.stdout.splitlines()[-1])
    stream = clips_of(dataset, "stream")
    assert first.startswith("hf://datasets/tester/clips@") and count == 26
    assert identity == stream.identity and name == clip_name(list(stream)[21])
    assert not list(tmp_path.rglob("*.parquet")) and not list(tmp_path.rglob("*.arrow"))


def test_files_that_cannot_be_streamed_are_named(dataset, tmp_path):
    good = next((dataset / "data").glob("*.parquet"))
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut.parquet: not a Parquet file that can be read"):
        ParquetClips([str(good), str(tmp_path / "cut.parquet")], COLUMNS)
    pq.write_table(pq.read_table(good).drop_columns(["states"]), tmp_path / "bare.parquet")
    with pytest.raises(ValueError, match=r"bare.parquet: columns \['states'\] are missing, found \['actions'"):
        ParquetClips([str(tmp_path / "bare.parquet")], COLUMNS)
    with pytest.raises(ValueError, match="no Parquet file"):
        ParquetClips([], COLUMNS)
    (tmp_path / "short.parquet").write_bytes(good.read_bytes())
    clips = ParquetClips([str(tmp_path / "short.parquet")], COLUMNS)
    (tmp_path / "short.parquet").write_bytes(b"")
    with pytest.raises(OSError, match=r"short.parquet, row group 1: cannot be read"):
        clips.read_group(1)


def test_an_empty_stream_is_named(dataset, processor, tmp_path):
    good = next((dataset / "data").glob("*.parquet"))
    pq.write_table(pq.read_table(good)[:0], tmp_path / "empty.parquet")
    empty = ParquetClips([str(tmp_path / "empty.parquet")], COLUMNS)
    with pytest.raises(ValueError, match="here: holds no clips"):
        check_clips(empty, processor, "here")
    with pytest.raises(ValueError, match="here: holds no clips"):
        clip_frame_rate(empty, "here")


@pytest.mark.parametrize("kind", ["stream", "arrow"])
@pytest.mark.parametrize("rate", [10, 2.5])
def test_clips_of_another_frame_rate_are_refused(processor, tmp_path, kind, rate):
    write_clips(tmp_path, train=1, validation=0, fps=rate)
    clips = clips_of(tmp_path, kind)
    message = rf"here, recording toy-0000-.*: the processor's fps is 5, the video has {rate} frames a second"
    with pytest.raises(ValueError, match=message):
        check_clips(clips, processor, "here")
    found = clip_frame_rate(clips, "here")
    assert found == pytest.approx(rate, rel=1e-6) and isinstance(found, type(rate))
    check_clips(clips, VJEPA2ACProcessor(resolution=32, fps=found), "here")


# ------------------------------------------------------------------------------------------------------ loader


def assert_same(first: list[dict], second: list[dict]) -> None:
    assert [b["clips"] for b in first] == [b["clips"] for b in second]
    for ours, theirs in zip(first, second, strict=True):
        for name in TENSORS:
            assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("kind", ["table", "stream"])
def test_workers_and_resume_change_nothing(dataset, processor, kind):
    """Two processes: tensors of an undisturbed run without workers, and of runs with workers that are stopped."""
    clips = clips_of(dataset, kind)
    options = {"seed": 2, "world_size": 2, "window": 8}
    whole = [list(islice(ClipLoader(clips, processor, 3, rank=r, **options), 10)) for r in (0, 1)]
    names = [name for m in range(10) for r in (0, 1) for name in whole[r][m]["clips"]]
    assert len(set(names[:26])) == len(set(names[26:52])) == 26

    loader = ClipLoader(clips, processor, 3, rank=1, num_workers=2, prefetch_factor=3, **options)
    first = list(islice(loader, 5))  # in the second epoch
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["next_batch"] == 5
    assert_same(first, whole[1][:5])
    # The same loader goes on, its workers living on; so does a new one, in another process than the state's.
    pids = {process.pid for process in multiprocessing.active_children()}
    assert_same(list(islice(loader, 3)), whole[1][5:8])
    assert pids and pids <= {process.pid for process in multiprocessing.active_children()}
    resumed = ClipLoader(clips_of(dataset, kind), processor, 3, rank=0, num_workers=1, **options)
    resumed.load_state_dict(state)
    assert_same(list(islice(resumed, 5)), whole[0][5:])


def test_states_of_another_order_are_refused(dataset, processor, tmp_path):
    stream = clips_of(dataset, "stream")
    state = ClipLoader(stream, processor, 3, window=8).state_dict()
    for change, message in (
        ({"seed": 1}, "seed: 0 in the state, 1 here"),
        ({"batch_size": 4}, "batch_size: 3 in the state, 4 here"),
        ({"world_size": 2}, "world_size: 1 in the state, 2 here"),
        ({"window": 9}, "window: 8 in the state, 9 here"),
        ({"clips": clips_of(dataset, "table")}, "window: 8 in the state, None here"),
    ):
        arguments = {"clips": stream, "batch_size": 3, "window": 8, **change}
        loader = ClipLoader(processor=processor, **arguments)
        with pytest.raises(ValueError, match=message):
            loader.load_state_dict(state)
    table = clips_of(dataset, "table")
    state = ClipLoader(table, processor, 3).state_dict()
    other = table.select([1, 0, *range(2, 26)])  # as many clips, in another order
    with pytest.raises(ValueError, match=r"clips: '\w{64}' in the state, '\w{64}' here"):
        ClipLoader(other, processor, 3).load_state_dict(state)
    with pytest.raises(ValueError, match="next_batch is missing"):
        ClipLoader(table, processor, 3).load_state_dict({k: v for k, v in state.items() if k != "next_batch"})
    # Another build: the same names and numbers of clips, one of them of another size.
    files = sorted((dataset / "data").glob("*.parquet"))
    rows = pq.read_table(files[0])
    videos = rows["video"].to_pylist()
    videos[3]["bytes"] += b"\0"
    column = pa.array(videos, rows.schema.field("video").type)
    pq.write_table(rows.set_column(0, rows.schema.field("video"), column), tmp_path / files[0].name, row_group_size=3)
    (tmp_path / files[1].name).write_bytes(files[1].read_bytes())
    rebuilt = ParquetClips([str(tmp_path / file.name) for file in files], COLUMNS)
    assert (rebuilt.group_sizes == stream.group_sizes).all() and rebuilt.identity != stream.identity


def test_pixels_normalised_on_the_device_equal_the_processors(dataset, processor):
    rows = list(clips_of(dataset, "stream"))[:3]
    normalised = ClipCollator(processor)(rows)["pixel_values_videos"]
    raw = ClipCollator(processor, normalize_pixels=False)(rows)
    assert raw["frames"].dtype == torch.uint8 and "pixel_values_videos" not in raw
    assert raw["frames"].nbytes * 4 == normalised.nbytes
    assert torch.equal(processor.normalize_pixels(raw["frames"]), normalised)
    pixels = raw["frames"].numpy().astype(np.float64)
    mean, std = (np.array(c)[:, None, None] for c in (processor.pixel_mean, processor.pixel_std))
    np.testing.assert_allclose(normalised.numpy(), (pixels / 255 - mean) / std, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_equal_those_on_the_cpu(dataset, processor):
    clips = clips_of(dataset, "stream")
    ours = list(islice(ClipLoader(clips, processor, 3, num_workers=1, device="cuda"), 9))
    theirs = list(islice(ClipLoader(clips, processor, 3), 9))
    assert all(b[name].is_cuda for b in ours for name in TENSORS)
    for gpu, cpu in zip(ours, theirs, strict=True):
        assert gpu["clips"] == cpu["clips"]
        for name in TENSORS:
            torch.testing.assert_close(gpu[name].cpu(), cpu[name], rtol=0, atol=1e-6)


def test_cached_features_come_with_their_clips(dataset, processor, tmp_path):
    table = clips_of(dataset, "table")
    save_file({"features": torch.arange(26.0)[:, None].repeat(1, 4)}, tmp_path / "features-00000.safetensors")
    names = [f"{row['recording_id']}@{row['start_tick']}" for row in table]
    loader = ClipLoader(CachedClips(table, tmp_path), processor, 4, num_workers=1)
    for batch in islice(loader, 8):
        assert "pixel_values_videos" not in batch
        assert [names[int(f[0])] for f in batch["features"]] == batch["clips"]
    state = loader.state_dict()
    assert state["next_batch"] == 8 and state["clips"] == ClipLoader(table, processor, 4).state_dict()["clips"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_clip_that_cannot_be_decoded_is_named(dataset, processor, tmp_path, workers):
    rows = pq.read_table(sorted((dataset / "data").glob("*.parquet"))[0])
    videos = rows["video"].to_pylist()
    videos[3]["bytes"] = videos[3]["bytes"][:200]
    column = pa.array(videos, rows.schema.field("video").type)
    pq.write_table(rows.set_column(0, rows.schema.field("video"), column), tmp_path / "bad.parquet", row_group_size=3)
    bad = f"{rows['recording_id'][3]}, tick {rows['start_tick'][3]}"
    loader = ClipLoader(ParquetClips([str(tmp_path / "bad.parquet")], COLUMNS), processor, 2, num_workers=workers)
    seen = []
    with pytest.raises(ValueError, match=f"recording {bad}: the video cannot be decoded"):
        for batch in islice(loader, 7):
            seen += batch["clips"]
    assert bad.replace(", tick ", "@") not in seen and len(seen) == len(set(seen)) < 14


def test_a_killed_worker_is_an_error(dataset, processor):
    before = {process.pid for process in multiprocessing.active_children()}
    loader = ClipLoader(clips_of(dataset, "stream"), processor, 2, num_workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = [p for p in multiprocessing.active_children() if p.pid not in before]
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"a loader worker died before batch \d+ was complete \(.+\)"):
        for _ in range(10):
            next(batches)


def test_workers_use_one_thread(dataset):
    loader = torch.utils.data.DataLoader(
        [0], collate_fn=threads, num_workers=1, multiprocessing_context=multiprocessing.get_context("forkserver")
    )
    assert list(loader) == [1]


def threads(rows: list) -> int:
    return torch.get_num_threads()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_workers": -1}, "num_workers .* found -1 and 2"),
        ({"prefetch_factor": 0}, "prefetch_factor .* found 0 and 0"),
        ({"start_method": "threads"}, "start_method must be one of .*, found 'threads'"),
    ],
)
def test_loader_arguments_out_of_range_are_refused(dataset, processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        ClipLoader(clips_of(dataset, "table"), processor, 2, **arguments)
