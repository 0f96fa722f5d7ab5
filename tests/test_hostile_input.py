"""Damaged and hostile input: nothing crashes, hangs, or reaches beyond the output; healthy recordings are built whole.

The cases come from `corpus.py`. Most are built in this process; the slow tests give all of them to the real program,
whose memory, time, files and connections are watched.
"""

import faulthandler
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import corpus
import numpy as np
import pytest
from corpus import BUILT, EITHER, END, REJECTED, member, octal, raw_header, recording
from datasets import load_dataset
from helpers_data import make_lines, make_video, to_log, write_shard

import vjepa_ac_hf  # noqa: F401  (registers the builder)
from vjepa_ac_hf.building.rows import BuildReport, iter_clips
from vjepa_ac_hf.building.selection import BuildOptions
from vjepa_ac_hf.recordings import log as recordings
from vjepa_ac_hf.recordings import mp4, shards
from vjepa_ac_hf.recordings import video as videos
from vjepa_ac_hf.recordings.log import RecordingError, parse_recording
from vjepa_ac_hf.recordings.shards import RecordingPair, Rejection, list_shards, read_pairs
from vjepa_ac_hf.recordings.video import VideoError, VideoReader

OPTIONS = BuildOptions(resolution=32)
REPOSITORY = Path(__file__).parent.parent
HEALTHY_EVERY = 25
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def watchdog(request):
    """A hang ends the tests with the stack of every thread: a decoder that does not return hears no exception."""
    faulthandler.dump_traceback_later(900 if request.node.get_closest_marker("slow") else 240, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def server():
    """A server on this machine that must not be asked for anything: its address, and what it was asked for."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            video = corpus.healthy()[1]
            self.send_response(200)
            self.send_header("Content-Length", str(len(video)))
            self.end_headers()
            self.wfile.write(video)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/canary.mp4", requests
        listening.shutdown()


def build(pairs, options=OPTIONS):
    report = BuildReport()
    rows: dict[str, list[dict]] = {}
    for row in iter_clips(pairs, options, report):
        rows.setdefault(row["recording_id"], []).append(row)
    return rows, report


def same_clips(rows, expected):
    """Whether clips are equal in everything but the recording's name."""
    return len(rows) == len(expected) and all(
        row["start_tick"] == other["start_tick"]
        and row["video"]["bytes"] == other["video"]["bytes"]
        and np.array_equal(row["actions"], other["actions"])
        and np.array_equal(row["states"], other["states"])
        for row, other in zip(rows, expected, strict=True)
    )


def num_threads_and_files():
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module")
def clean():
    """Rows of the healthy recordings of both kinds, built on their own."""
    rows = []
    for seed in range(3):
        log, video = corpus.healthy(seed)
        entry = shards.RecordingEntry(f"clean-{seed}", None, shards.Member("a"), shards.Member("b"))
        built, report = build([RecordingPair(entry, "clean", log, video)])
        assert report.accepted == 1 and len(built[f"clean-{seed}"]) == 1
        rows.append(built[f"clean-{seed}"])
    return rows


@pytest.fixture(scope="module")
def cases():
    return corpus.recording_cases()


@pytest.fixture(scope="module")
def built(cases, tmp_path_factory, clean):
    """All damaged recordings in one shard, a healthy one after every few, built."""
    members, healthy = [], []
    for index, case in enumerate(cases):
        members += [(f"{case.name}.jsonl", case.log), (f"{case.name}.mp4", case.video)]
        if index % HEALTHY_EVERY == 0:
            healthy.append(f"healthy-{index}")
            log, video = corpus.healthy()
            members += [(f"{healthy[-1]}.mp4", video), (f"{healthy[-1]}.jsonl", log)]
    shard = write_shard(tmp_path_factory.mktemp("hostile") / "all.tar", members)
    before = num_threads_and_files()
    (listed,) = list_shards([str(shard)])
    rows, report = build(read_pairs(listed))
    assert num_threads_and_files() == before, "no thread and no open file is left behind"
    assert not listed.rejected
    return rows, report, healthy


# ------------------------------------------------------------------------------------------------------ recordings


def test_corpus_is_large_and_the_same_every_time(cases):
    everything = [*cases, *corpus.shard_cases()]
    names = Counter(case.name for case in everything)
    assert len(names) == len(everything) > 500
    contents = {(case.log, case.video) for case in cases} | {case.data for case in corpus.shard_cases()}
    assert len(contents) > 500, "cases differ in more than their names"
    assert sum(case.outcome == REJECTED for case in cases) > 180
    first = [hashlib.sha256(case.log + case.video).digest() for case in cases]
    corpus.healthy.cache_clear()
    again = [hashlib.sha256(case.log + case.video).digest() for case in corpus.recording_cases()]
    assert [case.name for case, one, other in zip(cases, first, again, strict=True) if one != other] == []


def test_damaged_recordings_are_rejected_with_their_reason(cases, built):
    rows, report, _ = built
    reasons = {rejection.recording: rejection.reason for rejection in report.rejected}
    wrong = [
        (case.name, reasons.get(case.name))
        for case in cases
        if case.outcome == REJECTED
        and (
            case.name in rows or not re.search(case.reason, reasons.get(case.name, "")) or len(reasons[case.name]) > 400
        )
    ]
    assert wrong == []
    assert all(rejection.reason.isprintable() and rejection.shard == "all.tar" for rejection in report.rejected)


def test_every_recording_is_built_or_reported_never_both(cases, built):
    rows, report, healthy = built
    rejected = [rejection.recording for rejection in report.rejected]
    assert len(set(rejected)) == len(rejected)
    assert set(rejected) | set(rows) == {case.name for case in cases} | set(healthy)
    assert not set(rejected) & set(rows)
    assert report.recordings == len(cases) + len(healthy) == report.accepted + len(rejected)
    either = [case.name for case in cases if case.outcome == EITHER]
    assert any(name in rows for name in either) and any(name in rejected for name in either)


def test_healthy_recordings_are_built_as_without_damaged_ones(built, clean):
    rows, _, healthy = built
    assert [name for name in healthy if not same_clips(rows.get(name, []), clean[0])] == []


def test_harmless_oddities_are_built(cases, built, clean):
    rows, report, _ = built
    reasons = {rejection.recording: rejection.reason for rejection in report.rejected}
    assert [
        (case.name, reasons.get(case.name)) for case in cases if case.outcome == BUILT and case.name not in rows
    ] == []
    same = ("crlf", "no-last-newline", "blank-tail", "doubled-key", "unknown-fields", "escaped-keys")
    for name in (*(f"log-{name}" for name in same), "video-duration-0", "video-zeros-behind"):
        assert same_clips(rows[name], clean[0]), name


def test_pixel_formats_and_sizes_become_the_same_picture():
    """Every pixel format is converted to 8-bit RGB; a display matrix is applied."""
    reference = VideoReader(corpus.encoded(), "reference").frames([0, 40]).float()
    oddities = dict(corpus.built_videos())
    for name in ("yuv444p", "yuv422p", "yuv420p10le", "yuvj420p"):
        difference = (VideoReader(oddities[name], name).frames([0, 40]).float() - reference).abs().mean()
        assert difference < 12, (name, difference)
    # Frames are counted, not timed: frame t belongs to line t.
    gray = VideoReader(oddities["gray"], "gray").frames([0]).float()
    assert (gray - gray.mean(dim=1, keepdim=True)).abs().max() <= 2
    assert VideoReader(oddities["odd-size"], "odd").frames([0]).shape == (1, 3, 35, 63)
    assert VideoReader(oddities["rotated"], "rotated").frames([0]).shape == (1, 3, 64, 32)


def test_reasons_are_counted_without_names_or_values(built):
    _, report, _ = built
    kinds = {rejection.kind for rejection in report.rejected}
    assert len(kinds) < 70 and not any("log-" in kind or "video-" in kind for kind in kinds), sorted(kinds)


# ------------------------------------------------------------------------------------------------------ other files


def tree(folder: Path) -> dict[str, tuple]:
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("as_file", [False, True])
def test_playlists_open_no_other_file_and_no_connection(tmp_path, monkeypatch, server, as_file):
    """FFmpeg would follow a text called `.mp4` to the files and addresses in it."""
    url, requests = server
    canary = tmp_path / "canary.mp4"
    canary.write_bytes(corpus.healthy()[1])
    monkeypatch.chdir(tmp_path)  # where relative names would lead
    before = tree(tmp_path)
    opened = []
    for name, text in corpus.playlists(str(canary), url).items():
        source = tmp_path / f"{name}.mp4"
        source.write_bytes(text)
        try:
            VideoReader(str(source) if as_file else text, name)
            opened.append(name)
        except VideoError as error:
            assert re.search("expected an mp4 file|cannot open", str(error)), error
        source.unlink()
    assert opened == [] and requests == []
    assert tree(tmp_path) == before


def test_file_named_like_a_protocol_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("secret.mp4").write_bytes(make_video(30))
    Path("concat:secret.mp4").write_bytes(make_video(40))
    assert VideoReader("concat:secret.mp4", "x").num_frames == 40


def test_references_to_other_files_are_refused_by_the_index_alone(tmp_path):
    """FFmpeg's own default is not to follow them, which is not ours to rely on."""
    case = next(case for case in corpus.video_cases() if case.name == "video-other-file")
    with pytest.raises(VideoError, match=r"found a reference to another \(b'url '\)"):
        VideoReader(case.video, "x")


@pytest.mark.parametrize("name", ["x.mp4", "x.jsonl", "x.tar"])
def test_pipes_and_devices_in_a_folder_are_not_opened(tmp_path, name):
    log, video = corpus.healthy()
    (tmp_path / "x.mp4").write_bytes(video)
    (tmp_path / "x.jsonl").write_bytes(log)
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)):
        path = tmp_path / name
        path.unlink(missing_ok=True)
        make(path)
        files = [str(path)] if name == "x.tar" else [str(tmp_path / "x.mp4"), str(tmp_path / "x.jsonl")]
        listed = list_shards(files)
        rejected = [rejection for shard in listed for rejection in shard.rejected]
        rejected += [pair for shard in listed for pair in read_pairs(shard)]
        assert [type(rejection) for rejection in rejected] == [Rejection]
        assert re.search("expected a regular file, found '[pdc]r", rejected[0].reason), rejected
        path.rmdir() if path.is_dir() else path.unlink()


def test_folder_links_to_recordings_are_followed(tmp_path):
    log, video = corpus.healthy()
    (tmp_path / "store").mkdir()
    for suffix, data in ((".mp4", video), (".jsonl", log)):
        (tmp_path / "store" / f"a{suffix}").write_bytes(data)
        (tmp_path / f"b{suffix}").symlink_to(tmp_path / "store" / f"a{suffix}")
    listed = list_shards([str(tmp_path / "b.mp4"), str(tmp_path / "b.jsonl")])
    assert list(build(read_pairs(listed[0]))[0]) == ["b"]


def test_path_that_is_no_text_is_reported(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.tar")
    Path(name).write_bytes(recording("a") + END)
    (shard,) = list_shards([name])
    assert not shard.entries and shard.rejected[0].reason.startswith("unusable path: expected UTF-8")
    json.dumps(shard.rejected[0].reason).encode()


# ------------------------------------------------------------------------------------------------------ shards


@pytest.fixture(scope="module")
def listed_cases(tmp_path_factory):
    """Every shard case, its listed shard, what was read from it, and the processor time that took."""
    folder = tmp_path_factory.mktemp("shards")
    before = tree(folder.parent)
    listed = []
    for case in corpus.shard_cases():
        path = folder / f"{case.name}{case.suffix}"
        path.write_bytes(case.data)
        start = time.process_time()
        (shard,) = list_shards([str(path)])
        pairs = list(read_pairs(shard))
        listed.append((case, shard, pairs, time.process_time() - start))
        path.unlink()
    folder.rmdir()
    assert {name: stamp for name, stamp in tree(folder.parent).items() if Path(name).suffix} == {
        name: stamp for name, stamp in before.items() if Path(name).suffix
    }
    return listed


def contents(name):
    return corpus.healthy(1 if "second" in name else 0)


def test_healthy_recordings_of_damaged_shards_are_read_whole(listed_cases):
    wrong = []
    for case, _, pairs, _ in listed_cases:
        found = [pair for pair in pairs if isinstance(pair, RecordingPair)]
        whole = all((pair.log, pair.video) == contents(pair.entry.recording_id) for pair in found)
        if tuple(pair.entry.recording_id for pair in found) != case.healthy or not whole:
            wrong.append((case.name, [pair.entry.recording_id for pair in found], case.healthy))
    assert wrong == []


def test_damage_of_shards_is_reported(listed_cases):
    wrong = []
    for case, shard, pairs, _ in listed_cases:
        rejected = [*shard.rejected, *(pair for pair in pairs if isinstance(pair, Rejection))]
        texts = [f"{rejection.recording}.mp4 {rejection.reason}" for rejection in rejected]
        if not all(any(re.search(reason, text) for text in texts) for reason in case.reasons):
            wrong.append((case.name, case.reasons, texts))
        if bool(texts) != bool(case.reasons) or not all(text.isprintable() and len(text) < 1000 for text in texts):
            wrong.append((case.name, texts))
    assert wrong == []


def test_no_shard_takes_long(listed_cases):
    assert [(case.name, seconds) for case, _, _, seconds in listed_cases if seconds > 10] == []


def test_names_of_recordings_make_file_names(listed_cases):
    """Names become the clips' file names and go into reports: they must not leave a folder or be markup."""
    for _, shard, _, _ in listed_cases:
        for entry in shard.entries:
            name = entry.recording_id
            assert name and Path(name).name == name not in (".", "..") and not set(name) & set('<>|:"\\*?')
            assert len(f"{name}-000000.mp4".encode()) <= 255 and name.isprintable()


def test_rows_of_hostile_shards_through_load_dataset(tmp_path, clean):
    """The builder of `datasets`, normal and streaming, on one shard of each kind of damage."""
    chosen = [case for case in corpus.shard_cases() if case.healthy][::6]
    members = b"".join(recording(f"fine-{index}") for index in range(2))
    video = next(case for case in corpus.video_cases() if case.name == "video-no-moov").video
    log = next(case for case in corpus.log_cases() if "deep-list" in case.name).log
    members += member("bad-video.mp4", video) + member("bad-video.jsonl", corpus.healthy()[0])
    members += member("bad-log.mp4", corpus.healthy()[1]) + member("bad-log.jsonl", log)
    (tmp_path / "mixed.tar").write_bytes(members + recording("fine-2") + END)
    for case in chosen:
        (tmp_path / f"{case.name}{case.suffix}").write_bytes(case.data)
    expected = sorted([name for case in chosen for name in case.healthy] + ["fine-0", "fine-1", "fine-2"])
    files = [str(path) for path in sorted(tmp_path.glob("*.t*"))]
    options = {"data_files": files, "resolution": 32, "validation_fraction": 0, "split": "train"}
    normal = load_dataset("vpt_tubelets", cache_dir=str(tmp_path / "cache"), **options)
    streamed = load_dataset("vpt_tubelets", streaming=True, **options)
    for rows in (normal, streamed):
        rows = list(rows.remove_columns("video"))
        assert sorted(row["recording_id"] for row in rows) == expected
        for row in rows:
            other = clean[1 if "second" in row["recording_id"] else 0][0]
            assert np.array_equal(np.asarray(row["actions"], np.float32), other["actions"]), row["recording_id"]


# ------------------------------------------------------------------------------------------------------ limits


def test_limits_are_those_of_the_documentation():
    text = (REPOSITORY / "docs/data.md").read_text()
    table = dict(re.findall(r"^\| `([A-Z_]+)` \| ([^|]+?) \|", text, re.MULTILINE))
    units = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
    documented = {}
    for name, value in table.items():
        number, _, unit = value.partition(" ")
        documented[name] = int(number.replace(",", "")) * units.get(unit, 1)
    modules = (recordings, shards, mp4, videos)
    constants = {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if re.match("(LARGEST|LONGEST|MOST)_", name)
    }
    assert documented == constants


def test_largest_log_line_and_recording(monkeypatch):
    log = to_log(make_lines(30))
    for limit, value, message in (
        ("LARGEST_LOG", len(log) - 1, f"rec: log too large: expected at most {len(log) - 1} bytes, found {len(log)}"),
        ("MOST_TICKS", 29, "rec: too long: expected at most 29 lines, found more"),
        ("LONGEST_LINE", 200, "rec: line 1: line too long: expected at most 200 bytes, found"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(recordings, limit, value)
            with pytest.raises(RecordingError, match=message):
                parse_recording(log, "rec")
            patch.setattr(recordings, limit, 10**6)
            assert parse_recording(log, "rec").num_ticks == 30


def test_largest_member(tmp_path, monkeypatch):
    """A header that claims more than any recording has is refused before anything is allocated."""
    path = tmp_path / "a.tar"
    path.write_bytes(recording("a") + recording("b") + END)
    log, video = corpus.healthy()
    for limit, value, message in (
        (
            "LARGEST_VIDEO",
            len(video) - 1,
            f".mp4 too large: expected at most {len(video) - 1} bytes, found {len(video)}",
        ),
        ("LARGEST_LOG", len(log) - 1, f".jsonl too large: expected at most {len(log) - 1} bytes, found {len(log)}"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(shards, limit, value)
            (shard,) = list_shards([str(path)])
            assert not shard.entries and [rejection.reason for rejection in shard.rejected] == [message] * 2
            files = [str(tmp_path / f"c{suffix}") for suffix in (".mp4", ".jsonl")]
            Path(files[0]).write_bytes(video)
            Path(files[1]).write_bytes(log)
            results = [pair for shard in list_shards(files) for pair in read_pairs(shard)]
            if limit == "LARGEST_LOG":
                assert isinstance(results[0], Rejection) and "cannot be read from its file" in results[0].reason
    monkeypatch.setattr(shards, "MOST_FILES", 3)
    (shard,) = list_shards([str(path)])
    assert len(shard.entries) == 1 and "expected at most 3 .mp4 and .jsonl files" in shard.rejected[0].reason


def test_largest_picture(monkeypatch):
    monkeypatch.setattr(videos, "LARGEST_PICTURE", 512 * 16)
    assert VideoReader(corpus.encoded((16, 512)), "x").num_frames == 70
    with pytest.raises(VideoError, match=r"x: picture too large: expected at most 8192 pixels, found 514x16"):
        VideoReader(corpus.encoded((16, 514)), "x")


def test_limits_of_the_index(monkeypatch):
    video = corpus.healthy()[1]
    monkeypatch.setattr(mp4, "LARGEST_INDEX", 1000)
    with pytest.raises(VideoError, match="index too large: expected at most 131072 boxes, 1000 bytes"):
        VideoReader(video, "x")
    monkeypatch.setattr(mp4, "LARGEST_INDEX", 10**6)
    monkeypatch.setattr(mp4, "MOST_BOXES", 3)
    with pytest.raises(VideoError, match="index too large: expected at most 3 boxes"):
        VideoReader(video, "x")


# ------------------------------------------------------------------------------------------------------ the program


def limited(command, folder, seconds, environment=None):
    """Run a command with a limit of time; its result and the largest memory of any of its processes, in bytes.

    A process of its own waits for it, because the largest of all children is all that a process can learn.
    """
    code = (
        "import resource, subprocess, sys\n"
        "result = subprocess.run(sys.argv[1:], capture_output=True, text=True)\n"
        "sys.stdout.write(result.stdout); sys.stderr.write(result.stderr)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)\n"
        "sys.exit(result.returncode)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=seconds,
        env={**os.environ, **(environment or {})},
    )
    return result, int(result.stdout.splitlines()[-1])


def huge_cases(folder: Path) -> dict[str, str]:
    """Expensive shards: their recordings' names, and the reasons that must be reported (empty: built)."""
    log, video = corpus.healthy()
    lines = log.splitlines(keepends=True)
    huge = {
        "huge-line": (
            b"".join([*lines[:40], lines[40][:-2], b', "x": "', b"x" * 50_000_000, b'"}\n', *lines[41:]]),
            video,
        ),
        "huge-blank-tail": (log + b"\n" * 10_000_000, video),
        "huge-blank-middle": (b"".join([*lines[:40], b"\n" * 10_000_000, *lines[40:]]), video),
        "huge-many-lines": (lines[0] * (recordings.MOST_TICKS + 1), video),
        "huge-index": (log, corpus.healthy()[1] + corpus.box(b"free", bytes(65 * 2**20))),
    }
    reasons = {
        "huge-line": "line 41: line too long: expected at most 1048576 bytes, found 50",
        "huge-blank-tail": "",
        "huge-blank-middle": "line 41: expected a JSON object, found an empty line",
        "huge-many-lines": "too long: expected at most 131072 lines, found more",
        "huge-index": "index too large",
        "huge-holes": ".mp4 too large: expected at most 2147483648 bytes, found 3221225472",
    }
    members = [
        (f"{name}{suffix}", data)
        for name, pair in huge.items()
        for suffix, data in zip((".jsonl", ".mp4"), pair, strict=True)
    ]
    write_shard(folder / "huge.tar", members)
    size = 3 * 2**30
    with (folder / "holes.tar").open("wb") as file:  # a video of zeros that takes no room on the disk
        file.write(recording("holes-first") + raw_header(b"huge-holes.mp4", octal(size)))
        file.seek(size, os.SEEK_CUR)
        file.write(member("huge-holes.jsonl", log) + recording("holes-second", 1) + END)
    with tarfile.open(folder / "many.tar", "w") as archive:
        for index in range(100_000):
            archive.addfile(tarfile.TarInfo(f"tiny/{index}.{'jsonl' if index % 2 else 'mp4'}"))
    (folder / "bomb.tar.gz").write_bytes(corpus.make_gz_bomb(2**30))
    return reasons


def run_program(sandbox: Path, server_url: str, *, num_proc: int, huge: bool):
    """All cases, as shards and as loose files, through the program; the sandbox holds everything it may see."""
    shard_folder, loose = sandbox / "shards", sandbox / "work" / "loose"
    for folder in (shard_folder, loose, sandbox / "home", sandbox / "tmp"):
        folder.mkdir(parents=True)
    (sandbox / "work" / "canary.mp4").write_bytes(corpus.healthy()[1])
    cases, shard_cases = corpus.recording_cases(), corpus.shard_cases()
    for start in range(0, len(cases), 40):
        members = [(f"fine-{start}.mp4", corpus.healthy()[1]), (f"fine-{start}.jsonl", corpus.healthy()[0])]
        for case in cases[start : start + 40]:
            members += [(f"{case.name}.mp4", case.video), (f"{case.name}.jsonl", case.log)]
        write_shard(shard_folder / f"cases-{start:04d}.tar", members)
    for case in shard_cases:
        (shard_folder / f"{case.name}{case.suffix}").write_bytes(case.data)
    playlists = corpus.playlists(str(sandbox / "work" / "canary.mp4"), server_url)
    for name, text in playlists.items():
        (loose / f"playlist-{name}.mp4").write_bytes(text)
        (loose / f"playlist-{name}.jsonl").write_bytes(corpus.healthy()[0])
    os.symlink("/dev/zero", loose / "endless.mp4")
    os.mkfifo(loose / "pipe.jsonl")
    for file in ("endless.jsonl", "<b>|x.jsonl"):
        (loose / file).write_bytes(corpus.healthy()[0])
    for file in ("pipe.mp4", "<b>|x.mp4"):
        (loose / file).write_bytes(corpus.healthy()[1])
    reasons = huge_cases(shard_folder) if huge else {}
    before = tree(sandbox)
    command = [sys.executable, "-X", "faulthandler", str(REPOSITORY / "dataset_scripts/build_vpt_tubelets.py")]
    command += ["--shards", str(shard_folder), "loose", "--output", "../out", "--resolution", "32"]
    command += ["--validation_fraction", "0", "--num_proc", str(num_proc)]
    environment = {"HOME": str(sandbox / "home"), "TMPDIR": str(sandbox / "tmp"), "HF_HUB_OFFLINE": "1"}
    result, memory = limited(command, sandbox / "work", 600, environment)
    after = {name: stamp for name, stamp in tree(sandbox).items() if name.split("/")[0] != "out"}
    return result, memory, before, after, cases, shard_cases, playlists, reasons


@pytest.mark.slow
@pytest.mark.parametrize("num_proc", [1, 2])
def test_program_on_everything(tmp_path, server, num_proc, clean):
    url, requests = server
    sandbox = tmp_path / "sandbox"
    result, memory, before, after, cases, shard_cases, playlists, reasons = run_program(
        sandbox, url, num_proc=num_proc, huge=num_proc == 2
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert requests == [], "no connection"
    # What the interpreter and the libraries keep in their home folder is no output of the data.
    written = {name for name in after if after[name] != before.get(name) and not name.startswith("home/.")}
    assert {name for name in written if not (sandbox / name).is_dir()} == set(), "nothing is written elsewhere"
    assert set(before) <= set(after), "nothing is removed"
    assert memory < 2.5e9, memory

    report = json.loads((sandbox / "out" / "report.json").read_text())
    found = {entry["recording"]: entry["reason"] for entry in report["rejected"] if entry["recording"]}
    expected = {case.name: case.reason for case in cases if case.outcome == REJECTED}
    expected |= {f"playlist-{name}": "cannot open the video" for name in playlists} | {
        n: r for n, r in reasons.items() if r
    }
    expected |= {"endless": "cannot be read|expected a regular file", "pipe": "expected a regular file"}
    expected |= {"<b>|x": "unusable name"}
    wrong = {name: found.get(name) for name, reason in expected.items() if not re.search(reason, found.get(name, ""))}
    assert wrong == {}
    shard_reasons = [(entry["shard"], f"{entry['recording']}.mp4 {entry['reason']}") for entry in report["rejected"]]
    for case in shard_cases:
        texts = [text for shard, text in shard_reasons if shard == f"{case.name}{case.suffix}"]
        for reason in case.reasons:
            doubled = any("doubled: already found in" in text for text in texts)
            assert doubled or any(re.search(reason, text) for text in texts), (case.name, reason, texts)

    data = load_dataset(str(sandbox / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    data = data.cast_column("video", data.features["video"].__class__(decode=False))
    rows: dict[str, list[dict]] = {}
    for row in data:
        rows.setdefault(row["recording_id"], []).append(row)
    fine = [f"fine-{start}" for start in range(0, len(cases), 40)]
    fine += [name for case in shard_cases for name in case.healthy]
    fine += [name for name, reason in reasons.items() if not reason] + (
        ["holes-first", "holes-second"] if reasons else []
    )
    for name in set(fine):
        assert len(rows.get(name, [])) == 1, name
        other = clean[1 if "second" in name else 0][0]
        assert rows[name][0]["video"]["bytes"] == other["video"]["bytes"], name
        assert np.array_equal(np.asarray(rows[name][0]["actions"], np.float32), other["actions"]), name
    assert report["clips"] == len(data) and report["accepted"] == len(rows)
    assert not set(rows) & set(found) - {name for name, reason in found.items() if reason.startswith("doubled")}
    card = (sandbox / "out" / "README.md").read_text()
    assert "<b>" not in card and "|x" not in card


MEMORY_SCRIPT = """
import resource, sys
from vjepa_ac_hf.recordings.shards import list_shards, read_pairs
from vjepa_ac_hf.building.rows import BuildReport, iter_clips
from vjepa_ac_hf.building.selection import BuildOptions
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for shard in list_shards(sys.argv[1:]):
    for row in iter_clips(read_pairs(shard), BuildOptions(resolution=32), BuildReport()):
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["keys", "buttons", "claims", "members"])
def test_memory_of_worst_cases(tmp_path, kind):
    """The most expensive inputs within the limits, and claims far beyond them."""
    log, video = corpus.healthy()
    path = tmp_path / "a.tar"
    if kind in ("keys", "buttons"):
        lines = make_lines(1)
        lines[0]["keyboard"]["keys"] = [f"k{index}" for index in range(64)] if kind == "keys" else []
        lines[0]["mouse"]["buttons"] = [0.5] * 64 if kind == "buttons" else []
        lines[0]["mouse"]["newButtons"] = lines[0]["mouse"]["buttons"]
        write_shard(path, [("a.jsonl", to_log(lines) * recordings.MOST_TICKS), ("a.mp4", video)])
    elif kind == "claims":
        cases = [case for case in corpus.video_cases() if "2-" in case.name or "edits" in case.name]
        assert len(cases) > 5
        write_shard(path, [(f"{c.name}{s}", d) for c in cases for s, d in ((".jsonl", log), (".mp4", c.video))])
    else:
        path.write_bytes(member("x.txt") * 300_000 + END)
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(path)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < (1.5e9 if kind in ("keys", "buttons") else 200e6), result.stdout
