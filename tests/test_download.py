"""Downloading recordings from a real server that misbehaves, and the program that does it."""

import asyncio
import base64
import fcntl
import hashlib
import io
import json
import os
import resource
import runpy
import shutil
import signal
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from unittest.mock import patch

import pytest
import python_forks
from faulty_server import Fault, FaultyServer
from helpers_data import make_lines, make_video, name_of, to_log
from hub_server import HubServer
from hypothesis import given
from hypothesis import strategies as st

from vjepa_ac_hf.console import report
from vjepa_ac_hf.downloading import index as remote_index
from vjepa_ac_hf.downloading import recordings as download
from vjepa_ac_hf.downloading import transfer
from vjepa_ac_hf.downloading.index import read_index, select_recordings
from vjepa_ac_hf.downloading.recordings import (
    DownloadError,
    DownloadOptions,
    DownloadReport,
    download_recordings,
)
from vjepa_ac_hf.downloading.transfer import OutOfSpaceError, TransferOptions
from vjepa_ac_hf.recordings.shards import list_shards

SCRIPT = Path(__file__).parent.parent / "dataset_scripts" / "download_vpt.py"
REAL_INDEX = Path(__file__).parent / "golden" / "find-cave-index.json"  # the first lines of one of OpenAI's
FAST = TransferOptions(max_retries=3, connect_timeout=5, read_timeout=0.4, first_wait=0.01, longest_wait=0.02)
TICKS = 80
STEMS = [f"data/{version}/{name_of(session)}" for version, session in (("6.8", "s0"), ("7.6", "s1"), ("8.0", "s2"))]


def padded(video: bytes, size: int) -> bytes:
    """The same video with a box of random bytes behind it, which readers skip."""
    rest = size - len(video)
    return video + rest.to_bytes(4, "big") + b"free" + hashlib.shake_128(video).digest(rest - 8)


@pytest.fixture(scope="module")
def files():
    """Three recordings, the last with options; every video 100,000 bytes."""
    found = {}
    for seed, stem in enumerate(STEMS):
        found[f"{stem}.jsonl"] = to_log(make_lines(TICKS, seed))
        found[f"{stem}.mp4"] = padded(make_video(TICKS, seed=seed), 100_000)
    found[f"{STEMS[2]}-options.json"] = b'{"renderDistance": 8}'
    return found


@pytest.fixture
def server(files):
    with FaultyServer(files) as running:
        yield running


def write_index(folder, server, relpaths=STEMS, basedir=None):
    path = folder / "index.json"
    path.write_text(json.dumps({"basedir": basedir or server.url + "/", "relpaths": list(relpaths)}))
    return path


def fetch(server, output, relpaths=STEMS, *, transfer=FAST, index=None, **options):
    index = index or read_index(str(write_index(output.parent, server, relpaths)))
    report = DownloadReport()
    options = DownloadOptions(transfer=transfer, **options)
    asyncio.run(download_recordings(index.recordings, output, report, options=options, headers=index.headers))
    return report


def manifest(output):
    entries = [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]
    return {entry["relpath"]: entry for entry in entries}


def on_disk(output):
    """All files but the manifest and the report, with their bytes."""
    files = (file for file in output.rglob("*") if file.is_file())
    found = {str(file.relative_to(output)): file.read_bytes() for file in files}
    return {name: content for name, content in found.items() if name not in ("manifest.jsonl", "download_report.json")}


# ------------------------------------------------------------------------------------------------ whole downloads


def test_files_are_the_servers_and_the_manifest_knows_them(server, files, tmp_path):
    report = fetch(server, tmp_path / "out")
    assert on_disk(tmp_path / "out") == files
    total = sum(map(len, files.values()))
    expected = {"selected": 3, "downloaded": 3, "bytes_transferred": total, "retries": 0, "recordings": []}
    assert {name: report.to_dict()[name] for name in expected} == expected
    entry = manifest(tmp_path / "out")[STEMS[2]]
    etag = f'"{hashlib.sha1(files[STEMS[2] + ".mp4"]).hexdigest()}"'
    assert entry["files"][".mp4"] == {"size": 100_000, "etag": etag}
    assert entry["files"]["-options.json"]["size"] == 21
    assert (entry["ticks"], entry["frames"], entry["recorder_version"]) == (TICKS, TICKS, "8.0")
    assert (entry["status"], entry["reason"]) == ("downloaded", None)
    assert entry["url"] == f"{server.url}/{STEMS[2]}.mp4"
    assert manifest(tmp_path / "out")[STEMS[0]]["files"]["-options.json"] is None


def test_what_lies_in_the_folder_is_packed_and_built_as_it_is(server, tmp_path):
    server.files[f"{STEMS[0]}.mp4"] = b"not a video"
    server.faults[f"{STEMS[1]}.mp4"] = [Fault(drop_after=1000)]
    fetch(server, tmp_path / "out", transfer=TransferOptions(max_retries=0))
    find_recordings = runpy.run_path(str(SCRIPT.with_name("pack_shards.py")))["find_recordings"]
    assert find_recordings(tmp_path / "out") == ([STEMS[2]], [])
    files = sorted(str(file) for file in (tmp_path / "out").rglob("*") if file.is_file())
    shards = list_shards(files)
    assert [entry.recording_id for shard in shards for entry in shard.entries] == [name_of("s2")]
    assert not any(shard.rejected for shard in shards)


def test_rerun_asks_the_server_for_nothing(server, files, tmp_path):
    fetch(server, tmp_path / "out")
    server.requests.clear()
    report = fetch(server, tmp_path / "out")
    assert server.requests == [] and (report.already_there, report.downloaded) == (3, 0) and report.is_complete()

    (tmp_path / "out" / f"{STEMS[0]}.jsonl").unlink()
    (tmp_path / "out" / f"{STEMS[1]}.mp4").write_bytes(b"short")
    report = fetch(server, tmp_path / "out")
    assert (report.already_there, report.downloaded) == (1, 2)
    paths = {request.path for request in server.gets() if not request.path.endswith("-options.json")}
    assert paths == {f"{STEMS[0]}.jsonl", f"{STEMS[1]}.mp4"}
    assert on_disk(tmp_path / "out") == files


def test_options_are_left_out_on_request_and_got_later(server, files, tmp_path):
    fetch(server, tmp_path / "out", with_options=False)
    assert not server.gets("-options.json") and f"{STEMS[2]}-options.json" not in on_disk(tmp_path / "out")
    server.requests.clear()
    assert fetch(server, tmp_path / "out").downloaded == 3
    assert {request.path for request in server.requests} == {f"{stem}-options.json" for stem in STEMS}
    assert on_disk(tmp_path / "out") == files


def test_files_without_a_manifest_are_taken_over_after_a_look_at_their_size(server, files, tmp_path):
    fetch(server, tmp_path / "out")
    (tmp_path / "out/manifest.jsonl").unlink()
    wrong = tmp_path / "out" / f"{STEMS[0]}.mp4"
    wrong.write_bytes(wrong.read_bytes()[:-1])
    server.requests.clear()
    assert fetch(server, tmp_path / "out").downloaded == 3
    bodies = [request.path for request in server.gets() if request.body_bytes]
    assert bodies == [f"{STEMS[0]}.mp4"] and on_disk(tmp_path / "out") == files


def test_no_more_recordings_at_a_time_than_workers(files, tmp_path):
    with FaultyServer() as server:
        stems = [f"6.8/{name_of('many', segment)}" for segment in range(8)]
        for stem in stems:
            server.files |= {stem + suffix: files[STEMS[0] + suffix] for suffix in (".mp4", ".jsonl")}
        server.delay = 0.01
        assert fetch(server, tmp_path / "out", stems, num_workers=3).downloaded == 8
        assert server.max_simultaneous == 3
    with pytest.raises(ValueError, match="num_workers must be at least 1, found 0"):
        DownloadOptions(num_workers=0)


# ------------------------------------------------------------------------------------------------ faults


DROP = Fault(drop_after=30_000)
# What happens to GETs of a video, and how many there are until it is got.
FAULTS = {
    "429": ([Fault(status=429, headers={"Retry-After": "0"})], 2),
    "500, 503, 408": ([Fault(status=500), Fault(status=503), Fault(status=408)], 4),
    "dropped before the first byte": ([Fault(drop_after=0)], 2),
    # More often than retries allow: each gets further.
    "dropped again and again": ([Fault(drop_after=10_000)] * 7, 8),
    "stalled": ([Fault(stall_after=20_000)], 2),
    "shorter than promised": ([Fault(headers={"Content-Length": "100100"}), DROP], 3),
    "range ignored": ([DROP, Fault(ignore_range=True)], 2),
    "range refused": ([DROP, Fault(status=416)], 3),
    "range of another place": ([DROP, Fault(range_shift=-1000)], 3),
    "no length": ([Fault(headers={"Content-Length": None})], 1),
    "no tag": ([Fault(headers={"ETag": None}, drop_after=30_000)], 2),
    "weak tag": ([Fault(headers={"ETag": 'W/"x"'}, drop_after=30_000)], 2),
    "not what its MD5 says": ([Fault(headers={"Content-MD5": base64.b64encode(bytes(16)).decode()})], 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_leaves_no_trace_in_the_files(server, files, tmp_path, fault):
    video = f"{STEMS[0]}.mp4"
    faults, num_gets = FAULTS[fault]
    server.faults[video] = list(faults)
    report = fetch(server, tmp_path / "out", STEMS[:1])
    assert report.downloaded == 1 and len(server.gets(video)) == num_gets and report.retries == num_gets - 1
    assert on_disk(tmp_path / "out") == {name: data for name, data in files.items() if name.startswith(STEMS[0])}


def test_a_length_that_is_too_small_shows_in_what_is_got(server, files, tmp_path):
    video = f"{STEMS[0]}.mp4"
    server.faults[video] = [Fault(headers={"Content-Length": "2000"})]
    assert fetch(server, tmp_path / "out", STEMS[:1]).reasons == {"rejected": {"cannot open the video": 1}}
    assert on_disk(tmp_path / "out")[f"{video}.rejected"] == files[video][:2000]


def test_only_missing_bytes_are_asked_for(server, files, tmp_path):
    video = f"{STEMS[0]}.mp4"
    server.faults[video] = [DROP, DROP]
    fetch(server, tmp_path / "out", STEMS[:1])
    etag = f'"{hashlib.sha1(files[video]).hexdigest()}"'
    asked = [(request.range, request.if_range) for request in server.gets(video)]
    assert asked == [(None, None), ("bytes=30000-", etag), ("bytes=60000-", etag)]
    assert server.body_bytes(video) == len(files[video]) == 100_000


@pytest.mark.parametrize(
    ("tags", "range_asked"),
    [
        ({"ETag": 'W/"x"'}, (None, None)),
        ({"ETag": None}, (None, None)),
        (
            {"ETag": 'W/"x"', "Last-Modified": "Mon, 05 Dec 2022 10:00:00 GMT"},
            ("bytes=30000-", "Mon, 05 Dec 2022 10:00:00 GMT"),
        ),
    ],
)
def test_ranges_are_asked_for_only_of_what_can_be_told_from_another_file(server, tmp_path, tags, range_asked):
    video = f"{STEMS[0]}.mp4"
    server.faults[video] = [Fault(headers=tags, drop_after=30_000)]
    assert fetch(server, tmp_path / "out", STEMS[:1]).downloaded == 1
    assert [(request.range, request.if_range) for request in server.gets(video)] == [(None, None), range_asked]


def test_partial_files_of_an_earlier_run_are_gone_on_with(server, files, tmp_path):
    video, out = f"{STEMS[0]}.mp4", tmp_path / "out"
    server.faults[video] = [DROP]
    report = fetch(server, out, STEMS[:1], transfer=TransferOptions(max_retries=0))
    assert report.failed == 1 and "RemoteProtocolError" in report.recordings[0]["reason"]
    assert not (out / video).exists() and (out / f"{video}.part").stat().st_size == 30_000
    assert not (out / f"{STEMS[0]}.jsonl").exists()
    assert fetch(server, out, STEMS[:1]).downloaded == 1
    assert server.body_bytes(video) == 100_000 and server.body_bytes(".jsonl") == len(files[f"{STEMS[0]}.jsonl"])
    assert (out / video).read_bytes() == files[video]


@pytest.mark.parametrize("ignore_if_range", [False, True])
def test_a_file_that_changes_starts_anew(server, files, tmp_path, ignore_if_range):
    video, out = f"{STEMS[0]}.mp4", tmp_path / "out"
    server.faults[video] = [DROP]
    fetch(server, out, STEMS[:1], transfer=TransferOptions(max_retries=0))
    server.files[video] = files[f"{STEMS[1]}.mp4"]  # as long as the other, and other bytes
    server.faults[video] = [Fault(ignore_if_range=ignore_if_range)]
    assert fetch(server, out, STEMS[:1]).downloaded == 1
    assert (out / video).read_bytes() == files[f"{STEMS[1]}.mp4"]


def test_what_the_server_lacks_is_missing_and_what_it_refuses_fails_at_once(server, tmp_path):
    del server.files[f"{STEMS[0]}.mp4"]
    server.always[f"{STEMS[1]}.jsonl"] = Fault(status=403)
    server.always[f"{STEMS[2]}.mp4"] = Fault(status=500)
    report = fetch(server, tmp_path / "out")
    assert (report.missing, report.failed, report.downloaded) == (1, 2, 0)
    assert report.reasons == {"missing": {"HTTP 404": 1}, "failed": {"HTTP 403": 1, "HTTP 500": 1}}
    counts = [len(server.gets(f"{STEMS[i]}{s}")) for i, s in ((0, ".mp4"), (1, ".jsonl"), (1, ".mp4"), (2, ".mp4"))]
    assert counts == [1, 1, 0, 4]
    reasons = {recording["relpath"]: recording["reason"] for recording in report.to_dict()["recordings"]}
    assert reasons[STEMS[2]] == f"HTTP 500: {server.url}/{STEMS[2]}.mp4, after 4 tries"
    assert not [name for name in on_disk(tmp_path / "out") if not name.endswith((".part", ".part.json"))]
    assert not report.is_complete(allow_missing=True)
    server.always.clear()
    report = fetch(server, tmp_path / "out")
    assert (report.missing, report.downloaded) == (1, 2)
    assert report.is_complete(allow_missing=True) and not report.is_complete(allow_rejected=True)


@pytest.mark.parametrize("as_date", [False, True])
def test_a_busy_server_is_left_alone_by_all_for_as_long_as_it_asks(server, tmp_path, monkeypatch, as_date):
    def after():
        return formatdate(time.time() + 2, usegmt=True) if as_date else "1"

    server.faults[f"{STEMS[0]}.jsonl"] = [Fault(status=429, headers={"Retry-After": after})]
    # The others are in the middle of their first file until the answer has been read.
    was_read = threading.Event()
    for stem in STEMS[1:]:
        server.faults[f"{stem}.jsonl"] = [Fault(hold=was_read)]
    monkeypatch.setattr(transfer.logger, "info", lambda *message: was_read.set())
    assert fetch(server, tmp_path / "out", transfer=replace(FAST, read_timeout=60)).downloaded == 3
    asked = next(request.time for request in server.requests if request.status == 429)
    first = {f"{stem}.jsonl" for stem in STEMS[1:]}
    later = [request.time - asked for request in server.requests if request.status != 429 and request.path not in first]
    assert len(later) == 7 and min(later) > 0.95


def test_a_server_that_asks_for_more_patience_than_an_hour_fails(server, tmp_path):
    server.always[f"{STEMS[0]}.mp4"] = Fault(status=503, headers={"Retry-After": "9999999"})
    report = fetch(server, tmp_path / "out", STEMS[:1])
    assert report.failed == 1 and "asks to wait 9999999 seconds" in report.recordings[0]["reason"]


def test_a_server_that_is_gone_stops_the_run(tmp_path, monkeypatch):
    with FaultyServer() as server:
        pass
    stems = [f"6.8/{name_of('gone', segment)}" for segment in range(9)]
    monkeypatch.setattr(download, "MAX_FAILURES_IN_A_ROW", 4)
    with pytest.raises(DownloadError, match="4 recordings failed in a row, the last one: ConnectError: http://127"):
        fetch(server, tmp_path / "out", stems, num_workers=2)
    assert 4 <= len(manifest(tmp_path / "out")) < 6


def test_encoded_bodies_are_refused(server, tmp_path):
    server.always[f"{STEMS[0]}.jsonl"] = Fault(headers={"Content-Encoding": "gzip"})
    report = fetch(server, tmp_path / "out", STEMS[:1])
    assert report.failed == 1 and "Content-Encoding 'gzip'" in report.recordings[0]["reason"]


# ------------------------------------------------------------------------------------------------ rejected recordings


def test_rejected_recordings_are_not_used_not_got_again_and_retried_on_request(server, files, tmp_path):
    out, good = tmp_path / "out", dict(server.files)
    server.files[f"{STEMS[0]}.mp4"] = good[f"{STEMS[0]}.mp4"][:2000]
    lines = good[f"{STEMS[1]}.jsonl"].splitlines(keepends=True)
    server.files[f"{STEMS[1]}.jsonl"] = b"".join([*lines[:9], b'{"torn', *lines[10:]])
    server.files[f"{STEMS[2]}.mp4"] = make_video(TICKS - 5)
    report = fetch(server, out)
    assert report.rejected == 3 and not report.is_complete() and report.is_complete(allow_rejected=True)
    reasons = {recording["relpath"]: recording["reason"] for recording in report.recordings}
    assert reasons[STEMS[0]].startswith(f"{STEMS[0]}.mp4: cannot open the video")
    assert reasons[STEMS[1]].startswith(f"{STEMS[1]}.jsonl: line 10: ")
    lengths = "lengths differ"
    assert reasons[STEMS[2]].startswith(f"{STEMS[2]}.mp4: {lengths}: 75 frames, 80 log lines")
    assert sum(report.reasons["rejected"].values()) == 3 and report.reasons["rejected"][lengths] == 1
    # A log that cannot be used spares its video.
    assert not server.gets(f"{STEMS[1]}.mp4")
    assert sorted(on_disk(out)) == sorted(
        f"{stem}{suffix}.rejected"
        for stem in STEMS
        for suffix in (".jsonl", ".mp4")
        if stem + suffix != f"{STEMS[1]}.mp4"
    )
    server.requests.clear()
    assert fetch(server, out).rejected == 3 and server.requests == []

    server.files = good
    report = fetch(server, out, retry_rejected=True)
    assert report.downloaded == 3 and on_disk(out) == files


def test_one_frame_more_than_lines_is_what_recorders_write_and_any_other_difference_is_not(server, tmp_path):
    for stem, frames in zip(STEMS, (TICKS + 1, TICKS - 1, TICKS + 2), strict=True):
        server.files[f"{stem}.mp4"] = make_video(frames)
    report = fetch(server, tmp_path / "out")
    assert (report.downloaded, report.rejected) == (1, 2)
    assert manifest(tmp_path / "out")[STEMS[0]]["frames"] == TICKS + 1


def test_recordings_of_recorders_before_6_11_whose_logs_have_no_slot_are_kept(server, tmp_path):
    lines = make_lines(TICKS)
    for line in lines:
        del line["hotbar"]
    server.files[f"{STEMS[0]}.jsonl"] = to_log(lines)
    assert fetch(server, tmp_path / "out", STEMS[:1]).downloaded == 1
    for line in lines[:30]:
        line["hotbar"] = 0
    server.files[f"{STEMS[0]}.jsonl"] = to_log(lines)
    assert fetch(server, tmp_path / "half", STEMS[:1]).rejected == 1
    assert (
        "line 31: field 'hotbar': expected in all lines or in none" in manifest(tmp_path / "half")[STEMS[0]]["reason"]
    )


# ------------------------------------------------------------------------------------------------ manifest, disk


def test_a_torn_manifest_costs_a_look_not_a_transfer(server, tmp_path, caplog):
    out = tmp_path / "out"
    fetch(server, out, num_workers=1)
    path = out / "manifest.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    server.requests.clear()
    report = fetch(server, out)
    assert "the last line is torn and dropped" in caplog.text
    assert (report.already_there, report.downloaded) == (2, 1) and not server.body_bytes()
    assert [json.loads(line)["relpath"] for line in path.read_text().splitlines()] == STEMS

    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(ValueError, match=r"manifest.jsonl: line 1: .*missing required field"):
        fetch(server, out)


def test_two_downloads_to_one_folder_are_refused(server, tmp_path):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out/manifest.jsonl").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="another process downloads to this folder"):
            fetch(server, tmp_path / "out")
    assert not server.requests


def test_too_little_space_is_found_before_anything_is_written(server, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutOfSpaceError, match=r"disk full: .*\.mp4\.part needs 100000 more bytes, 50000 are free"):
        fetch(server, tmp_path / "out", STEMS[:1])
    assert not (tmp_path / "out" / f"{STEMS[0]}.mp4.part").exists()


def test_a_disk_that_takes_no_more_stops_the_run_and_keeps_what_is_there(server, files, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # a real error of write()
    try:
        with pytest.raises(OSError, match="File too large"):
            fetch(server, tmp_path / "out", STEMS[:1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    part = tmp_path / "out" / f"{STEMS[0]}.mp4.part"
    there = part.stat().st_size
    assert 0 < there <= 60_000 and part.read_bytes() == files[f"{STEMS[0]}.mp4"][:there]
    assert fetch(server, tmp_path / "out", STEMS[:1]).downloaded == 1
    assert server.gets(".mp4")[-1].range == f"bytes={there}-"


def test_output_that_is_no_folder(server, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(FileExistsError):
        fetch(server, tmp_path / "out")
    assert not server.requests


# ------------------------------------------------------------------------------------------------ indexes


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("suffix", ["", ".mp4"])
def test_index_files_with_and_without_slash_and_suffix(server, tmp_path, slash, suffix):
    relpaths = [stem + suffix for stem in STEMS] + [STEMS[0]]
    index = read_index(str(write_index(tmp_path, server, relpaths, server.url + slash)))
    assert [recording.relpath for recording in index.recordings] == STEMS and index.doubled == 1
    assert index.recordings[0].files[".mp4"].url == f"{server.url}/{STEMS[0]}.mp4"
    assert index.recordings[0].files["-options.json"].url == f"{server.url}/{STEMS[0]}-options.json"
    assert [recording.recorder_version for recording in index.recordings] == ["6.8", "7.6", "8.0"]


def test_a_real_index_file():
    index = read_index(str(REAL_INDEX))
    assert len(index.recordings) == 25 and index.doubled == 0
    base = "https://openaipublic.blob.core.windows.net/minecraft-rl/data/find-cave/"
    assert (
        index.recordings[0].files[".jsonl"].url == base + "cheeky-cornflower-setter-00467564a5cd-20220715-094908.jsonl"
    )


def test_index_from_a_server(server, tmp_path):
    server.files["index.json"] = write_index(tmp_path, server).read_bytes()
    server.faults["index.json"] = [Fault(status=503, headers={"Retry-After": "0"})]
    assert [recording.relpath for recording in read_index(f"{server.url}/index.json").recordings] == STEMS
    with pytest.raises(ValueError, match=r"nothing.json: cannot get the index: HTTP 404"):
        read_index(f"{server.url}/nothing.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<html>", "not an index file.*malformed"),
        ('{"basedir": "http://x"}', "not an index file.*missing required field `relpaths`"),
        ('{"basedir": "http://x", "relpaths": ["a", 3]}', r"Expected `str`, got `int` - at `\$.relpaths\[1\]`"),
        ('{"basedir": "/data", "relpaths": ["a"]}', "field 'basedir': expected an http.s. URL.*found '/data'"),
        ('{"basedir": "http://x?sig=1", "relpaths": ["a"]}', "without query, found 'http://x.sig=1'"),
        ('{"basedir": "http://x", "relpaths": []}', "no recording is left of 0"),
    ],
)
def test_malformed_indexes(tmp_path, content, message):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match=rf"(?s)index.json: .*{message}"):
        select_recordings(read_index(str(tmp_path / "index.json")))


HOSTILE = [
    "/etc/x",
    "../x",
    "a/../../x",
    "a\\..\\x",
    "C:/x",
    "a//b",
    "",
    "a/",
    "./a",
    "a\nb",
    "a\0b",
    "a/manifest",
    ".x",
]


@pytest.mark.parametrize("relpath", HOSTILE)
def test_relpaths_that_leave_the_output_are_refused_by_name(server, tmp_path, relpath):
    index = write_index(tmp_path, server, [STEMS[0], f"{relpath}.mp4"])
    with pytest.raises(ValueError) as error:
        read_index(str(index))
    assert "1 of 2 relpaths are refused" in str(error.value) and repr(relpath) in str(error.value)


@given(st.text(alphabet=st.sampled_from("ab./\\ \0:%?#é"), max_size=12))
def test_whatever_is_accepted_stays_below_the_output(relpath):
    if remote_index._is_safe(relpath):
        inside = os.path.normpath(os.path.join("/srv/out", relpath + ".mp4"))
        assert inside == f"/srv/out/{relpath}.mp4"


def test_names_with_odd_characters_are_quoted(server, files, tmp_path):
    odd = "6.8/a b#1?%20é"
    server.files = {odd + suffix: files[STEMS[0] + suffix] for suffix in (".mp4", ".jsonl")}
    assert fetch(server, tmp_path / "out", [odd]).downloaded == 1
    assert on_disk(tmp_path / "out") == server.files


def test_filters_keep_the_order_and_count_what_they_leave_out(server, tmp_path):
    versions = {"6.8": "a", "6.10": "b", "7.6": "c"}
    relpaths = [f"{version}/p{i}{name}" for i in range(4) for version, name in versions.items()] + ["6.8/p0a.mp4"]
    index = read_index(str(write_index(tmp_path, server, relpaths)))
    chosen = select_recordings(index, recorder_versions=["7.6", "6.8"], match="*/p[123]*", limit=4)
    assert [recording.relpath for recording in chosen.recordings] == ["6.8/p1a", "7.6/p1c", "6.8/p2a", "7.6/p2c"]
    assert chosen.left_out == {"doubled": 1, "recorder_version": 4, "match": 2, "limit": 2}
    with pytest.raises(ValueError, match=r"no recording is left of 12: .*\['6.9'\], found \['6.10', '6.8', '7.6'\]"):
        select_recordings(index, recorder_versions=["6.9"])
    with pytest.raises(ValueError, match="match 'P1', first relpath '6.8/p0a'"):
        select_recordings(index, match="P1")
    with pytest.raises(ValueError, match="limit must be at least 1, found 0"):
        select_recordings(index, limit=0)


# ------------------------------------------------------------------------------------------------ the Hub


def test_a_data_set_on_the_hub(files, tmp_path):
    with HubServer() as hub:
        stored = {
            **files,
            "README.md": b"x",
            "data/6.8/lonely.mp4": b"x",
            "data/manifest.jsonl": b"x",
            f"other/{name_of('s9')}.mp4": b"x",
        }
        hub.repositories[("dataset", "org/vpt")] = stored
        index = read_index("hf://datasets/org/vpt@main/data", endpoint=hub.url)
        assert [recording.relpath for recording in index.recordings] == sorted([*STEMS, "data/6.8/lonely"])
        report = fetch(None, tmp_path / "out", index=index)
        assert (report.downloaded, report.missing) == (3, 1) and on_disk(tmp_path / "out") == files
        assert report.recordings[0]["reason"] == "not in the data set: data/6.8/lonely.jsonl"
        # The commit is fixed, and no options file is asked for that is not there.
        resolved = [request for request in hub.requests if "/resolve/" in request]
        assert len(resolved) == 7 and all(f"/resolve/{hub.commit_of(stored)}/" in request for request in resolved)

        hub.requests.clear()
        assert fetch(None, tmp_path / "out", index=index).already_there == 3 and not hub.requests
        stored[f"{STEMS[0]}.jsonl"] = to_log(make_lines(TICKS - 1))
        index = read_index("hf://datasets/org/vpt/data", endpoint=hub.url)
        assert fetch(None, tmp_path / "out", index=index).downloaded == 1
        assert (tmp_path / "out" / f"{STEMS[0]}.jsonl").read_bytes() == stored[f"{STEMS[0]}.jsonl"]

        with pytest.raises(
            ValueError, match="hf://datasets/org/none: cannot list the data set: .*Repository Not Found"
        ):
            read_index("hf://datasets/org/none", endpoint=hub.url)
    with pytest.raises(ValueError, match="expected hf://datasets/ORG/NAME.*, found a model"):
        read_index("hf://org/vpt")


def test_sums_and_sizes_of_an_index_are_checked(server, files, tmp_path):
    index = read_index(str(write_index(tmp_path, server, STEMS[:2])))
    for recording, changed in zip(index.recordings, ({"sha256": "0" * 64}, {"size": 99}), strict=True):
        video = recording.files[".mp4"]
        recording.files[".mp4"] = remote_index.RemoteFile(**{**vars(video), **changed})
    report = fetch(server, tmp_path / "out", index=index)
    reasons = {recording["relpath"]: recording["reason"] for recording in report.recordings}
    assert report.failed == 2 and reasons[STEMS[0]].startswith("sha256 differs (")
    assert "size differs: " in reasons[STEMS[1]] and "index 99 bytes, server 100000 bytes" in reasons[STEMS[1]]
    sha256 = hashlib.sha256(files[f"{STEMS[0]}.mp4"]).hexdigest()
    index.recordings[0].files[".mp4"] = remote_index.RemoteFile(f"{server.url}/{STEMS[0]}.mp4", 100_000, sha256)
    assert fetch(server, tmp_path / "out", index=index).downloaded == 1


# ------------------------------------------------------------------------------------------------ the program


def run(*arguments):
    """The program's `main` in this process: importing the package takes longer than these downloads."""
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    with (
        patch.object(sys, "argv", ["download_vpt.py", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            code = runpy.run_path(str(SCRIPT))["main"]()
        except SystemExit as stop:
            code = stop.code
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            code = report(error)  # as the interpreter does for an uncaught one
        finally:
            signal.signal(signal.SIGTERM, handler)
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_a_stopped_program_leaves_partial_files_and_goes_on(server, files, tmp_path, number):
    out = tmp_path / "out"
    command = ["--index", write_index(tmp_path, server), "--output", out, "--num_workers", "2"]
    # The first recording gets through, the others stop in the middle of their videos.
    for stem in STEMS[1:]:
        server.faults[f"{stem}.mp4"] = [Fault(stall_after=48_000, stall=600)]
    process = python_forks.start([SCRIPT, *command])
    parts = [out / f"{stem}.mp4.part" for stem in STEMS[1:]]
    deadline = time.monotonic() + 90
    while not (all(part.exists() and part.stat().st_size >= 40_000 for part in parts) and len(on_disk(out)) >= 10):
        assert process.poll() is None and time.monotonic() < deadline, process.poll()
        time.sleep(0.02)
    os.kill(process.pid, number)
    err = process.wait().stderr  # and does not wait for what has stalled
    assert process.returncode == (130 if number != signal.SIGKILL else -signal.SIGKILL), err

    for name, content in on_disk(out).items():
        if name.endswith(".part"):
            assert files[name.removesuffix(".part")].startswith(content), name
        elif not name.endswith(".part.json"):
            assert name.startswith(STEMS[0]) and files[name] == content, name
    assert list(manifest(out)) == [STEMS[0]]
    if number != signal.SIGKILL:
        report = json.loads((out / "download_report.json").read_text())
        assert (report["downloaded"], report["not_attempted"]) == (1, 2) and "the same command continues" in err

    kept = sum(part.stat().st_size for part in out.rglob("*.part"))
    total = sum(len(content) for name, content in files.items() if not name.startswith(STEMS[0]))
    server.requests.clear()
    code, printed, err = run(*command)
    assert code == 0 and "2 downloaded, 1 already there" in printed, err
    assert server.body_bytes() == total - kept and on_disk(out) == files


def test_the_programs_report_and_exit_status(server, tmp_path):
    del server.files[f"{STEMS[0]}.mp4"]
    command = ["--index", write_index(tmp_path, server, [*STEMS, STEMS[0]]), "--output", tmp_path / "out"]
    code, printed, err = run(*command, "--limit", 2, "--match", "data/[67]*")
    assert code == 1 and "2 of 3 recordings selected; left out: 1 by doubled, 1 by match" in printed
    assert f"missing {STEMS[0]}: HTTP 404: {server.url}/{STEMS[0]}.mp4" in err
    assert "1 x HTTP 404 (missing)" in printed
    report = json.loads((tmp_path / "out/download_report.json").read_text())
    counts = ("selected", "downloaded", "already_there", "missing", "failed", "rejected", "not_attempted")
    assert [report[name] for name in counts] == [2, 1, 0, 1, 0, 0, 0]
    assert report["indexed"] == 3 and report["left_out"]["match"] == 1
    assert report["reasons"] == {"missing": {"HTTP 404": 1}}
    assert run(*command, "--allow_missing")[0] == 0
    assert run(*command, "--recorder_version", "8.0")[0] == 0

    server.files[f"{STEMS[0]}.mp4"] = b"x"
    assert run(*command)[0] == 1 and run(*command, "--allow_rejected")[0] == 0
    server.files[f"{STEMS[0]}.mp4"] = make_video(TICKS)
    assert run(*command)[0] == 1 and run(*command, "--retry_rejected")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--index", "nowhere.json"), "No such file or directory: 'nowhere.json'"),
        (("--index", "http://127.0.0.1:9/index.json", "--num_workers", "0"), "num_workers must be at least 1, found 0"),
        (("--recorder_version", "9.9"), "recorder versions asked for ['9.9'], found ['6.8', '7.6', '8.0']"),
        (("--timeout", "0"), "read_timeout must be positive, found 0.0 seconds"),
    ],
)
def test_errors_of_the_program_have_one_line(server, tmp_path, options, message):
    code, _, err = run("--index", write_index(tmp_path, server), "--output", tmp_path / "out", *options)
    assert code == 1 and err.startswith("error: ") and message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()
