"""Fuzzed parsers: whatever the bytes, no exception but the documented one, and what is accepted makes sense.

Few examples by default, the same every time; the slow tests take many new ones. `fuzz_atheris.py` goes further, guided
by coverage.
"""

import faulthandler
import io
import json
import math
from pathlib import Path

import corpus
import numpy as np
import pytest
from corpus import END, member, pax, pax_record, raw_header
from helpers_data import make_lines, make_video, to_log
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vjepa_ac_hf.recordings.clips import ClipSpec, aggregate_actions, clip_states
from vjepa_ac_hf.recordings.log import PRESSED_COLUMNS, REPAIRS, Recording, RecordingError, parse_recording
from vjepa_ac_hf.recordings.mp4 import check_mp4
from vjepa_ac_hf.recordings.observed import OBSERVED
from vjepa_ac_hf.recordings.shards import RecordingPair, Rejection, list_shards, read_pairs
from vjepa_ac_hf.recordings.video import VideoError, VideoReader


@pytest.fixture(autouse=True)
def watchdog(request):
    faulthandler.dump_traceback_later(1500 if request.node.get_closest_marker("slow") else 240, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def examples(quick: int, slow: int):
    """Runs a test with few examples, and as a slow test with many."""
    return pytest.mark.parametrize("num_examples", [quick, pytest.param(slow, marks=pytest.mark.slow)])


def run(check, num_examples: int, *strategies) -> None:
    few = num_examples <= 500
    fuzz = settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        derandomize=few,
        suppress_health_check=list(HealthCheck),
    )
    fuzz(given(*strategies)(check))()


# ------------------------------------------------------------------------------------------------------ mutations

INTERESTING = [b"\0", b"\xff", b"\n", b"\r\n", b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"e", b"9" * 30, b"NaN"]
INTERESTING += [b"Infinity", b"null", b"true", b"\\u", b"\\ud800", b"\xef\xbb\xbf", b"\xc3", b"1e999", b"[" * 2000]
INTERESTING += [value.to_bytes(4, "big") for value in (0, 1, 7, 8, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1)]
mutation = st.tuples(
    st.sampled_from(["replace", "insert", "delete", "cut", "double"]),
    st.floats(0, 1, exclude_max=True),
    st.one_of(st.sampled_from(INTERESTING), st.binary(min_size=1, max_size=8)),
    st.integers(1, 600),
)


def mutate(data: bytes, mutations, places: list[int] | None = None) -> tuple[bytes, int]:
    """Data with mutations, and the place of the first of them; `places` is where they may be."""
    first = len(data)
    for kind, where, value, length in mutations:
        place = places[int(where * len(places))] if places else int(where * len(data))
        place = min(place, len(data))
        first = min(first, place)
        if kind == "replace":
            data = data[:place] + value + data[place + len(value) :]
        elif kind == "insert":
            data = data[:place] + value + data[place:]
        elif kind == "delete":
            data = data[:place] + data[place + length :]
        elif kind == "cut":
            data = data[:place]
        else:
            data = data[: place + length] + data[place:]
    return data, first


# ------------------------------------------------------------------------------------------------------ logs

numbers = st.one_of(
    st.integers(-10, 10),
    st.integers(-(10**30), 10**30),
    st.just(10**400),
    st.floats(),
    st.sampled_from([1e7, 1e7 + 1, -1e7, 1e308, -0.0, 5e-324, 8, 9, -1, 0.5]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5), st.sampled_from(["key.keyboard.w", "0"]))
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["mouse", "keyboard", "isGuiOpen", "hotbar", "yaw", "pitch", "unused", "mouse.dx", "mouse.dy", "mouse.x"]
FIELDS += [
    "mouse.dwheel",
    "tick",
    "milli",
    "serverTick",
    "isGuiInventory",
    "mouse.y",
    "mouse.buttons",
    "mouse.newButtons",
    "keyboard.keys",
]
field_values = st.one_of(
    values, st.lists(st.integers(-1, 4), max_size=70), st.lists(st.sampled_from(["key.keyboard.w"]))
)
change = st.tuples(st.integers(0, 5), st.sampled_from(FIELDS), st.one_of(st.just("delete"), field_values))


def change_lines(num_lines: int, changes) -> list:
    lines = make_lines(num_lines, seed=num_lines)
    for index, field, value in changes:
        *path, last = field.split(".")
        target = lines[index % num_lines]
        for part in path:
            target = target.get(part) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            continue
        if value == "delete":
            target.pop(last, None)
        else:
            target[last] = value
    return lines


def assert_makes_sense(recording: Recording, log: bytes) -> None:
    ticks = len(log.rstrip().split(b"\n"))
    assert recording.num_ticks == ticks > 0
    for name in ("mouse_dx", "mouse_dy", "yaw", "pitch"):
        column = getattr(recording, name)
        assert column.shape == (ticks,) and column.dtype == np.float64
        # GUI movement of some recorders is doubled after the check.
        assert np.isfinite(column).all() and np.abs(column).max() <= (2e7 if name.startswith("mouse") else 1e7)
    for column in (recording.cursor_x, recording.cursor_y):
        assert column.shape == (ticks,) and (np.isnan(column) | (np.abs(column) <= 1e7)).all()
    assert recording.hotbar.dtype == np.int64 and recording.hotbar.min() >= -1 and recording.hotbar.max() <= 8
    assert recording.pressed.shape == (ticks, len(PRESSED_COLUMNS)) and recording.pressed.dtype == bool
    assert recording.gui_open.shape == (ticks,) and recording.gui_open.dtype == bool
    assert set(recording.repairs) == set(REPAIRS)
    assert all(0 <= count <= ticks for count in recording.repairs.values())
    assert set(recording.observed) == set(OBSERVED)
    assert all(0 <= count <= ticks for count in recording.observed.values())
    assert sum(recording.other_keys.values()) <= ticks * 64 and len(recording.other_keys) <= 32


def assert_same(one: Recording, other: Recording, num_ticks: int | None = None) -> None:
    for name, value in vars(one).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value[:num_ticks], getattr(other, name), err_msg=name)
    assert num_ticks or one.repairs == other.repairs


def check_log(log: bytes, version: str | None = None) -> Recording | None:
    try:
        recording = parse_recording(log, "rec.jsonl", recorder_version=version)
    except RecordingError as error:
        message = str(error)
        assert message.startswith("rec.jsonl: ") and len(message) < 400, message
        with pytest.raises(RecordingError):
            parse_recording(log + b"\n \r\n", "rec.jsonl", recorder_version=version)
        return None
    assert_makes_sense(recording, log)
    assert_same(recording, parse_recording(log, "rec.jsonl", recorder_version=version))
    assert_same(recording, parse_recording(log + b"\n \r\n\n", "rec.jsonl", recorder_version=version))
    # What comes later changes nothing of what was before, but for the key of a slot that the next line shows. (Fields
    # that all lines of the first half lack make an error of it.)
    half = (recording.num_ticks + 1) // 2
    begin = b"\n".join(log.split(b"\n")[:half])
    try:
        first = parse_recording(begin, "rec.jsonl", recorder_version=version)
    except RecordingError as error:
        assert "missing in all" in str(error)
        return recording
    numbers = slice(0, 9)
    if (
        half < recording.num_ticks
        and recording.hotbar[half] != recording.hotbar[half - 1] >= 0 <= recording.hotbar[half]
    ):
        first.pressed[half - 1, recording.hotbar[half]] = True
    assert (recording.pressed[:half, numbers] == first.pressed[:, numbers]).all()
    assert_same(recording, first, half)
    return recording


@examples(120, 5_000)
def test_logs_changed_in_their_fields(num_examples):
    outcomes = set()

    def check(num_lines, changes, version, crlf):
        lines = change_lines(num_lines, changes)
        log = to_log(lines).replace(b"\n", b"\r\n" if crlf else b"\n")
        recording = check_log(log, version)
        outcomes.add(recording is not None)
        if recording is not None:
            spec = ClipSpec(native_fps=20, fps=20, frames_per_clip=4, tubelet_size=2)
            if recording.num_ticks >= spec.span:
                starts = np.array([0])
                assert np.isfinite(aggregate_actions(recording, starts, spec)).all()
                assert np.isfinite(clip_states(recording, starts, spec)).all()

    run(
        check,
        num_examples,
        st.integers(1, 6),
        st.lists(change, max_size=3),
        st.sampled_from([None, "5.7", "6.8", "x"]),
        st.booleans(),
    )
    assert outcomes == {True, False}, "some are accepted and some are not"


@examples(120, 5_000)
def test_logs_changed_in_their_bytes(num_examples):
    outcomes = set()

    def check(num_lines, mutations):
        outcomes.add(check_log(mutate(to_log(make_lines(num_lines)), mutations)[0]) is not None)

    run(check, num_examples, st.integers(1, 4), st.lists(mutation, max_size=3))
    assert outcomes == {True, False}


@examples(120, 5_000)
def test_logs_of_any_bytes_or_any_json(num_examples):
    def check(log):
        check_log(log if isinstance(log, bytes) else "\n".join(json.dumps(value) for value in log).encode())

    pieces = st.lists(st.sampled_from([*INTERESTING, b'"yaw"', b'"mouse"', b"0", b" "]), max_size=12).map(b"".join)
    run(check, num_examples, st.one_of(st.binary(max_size=200), pieces, st.lists(values, min_size=1, max_size=3)))


def test_number_of_the_wrong_field_is_named():
    """The oracle of what a log may hold, in one table: which numbers are accepted in which field."""
    accepted = {
        "yaw": lambda number: abs(number) <= 1e7,
        "mouse.dx": lambda number: abs(number) <= 1e7,
        "mouse.x": lambda number: abs(number) <= 1e7,
        "mouse.dwheel": lambda number: abs(number) <= 1e7,
        "hotbar": lambda number: isinstance(number, int) and 0 <= number <= 8,
    }
    for field, is_good in accepted.items():
        for number in (0, 8, 9, -1, 0.5, 3.0, -0.0, 1e7, 1e7 + 1, -1e7 - 1, 10**30, 10**400, 1e308, math.inf, math.nan):
            lines = change_lines(3, [(0, field, number)])
            good = (isinstance(number, int) or math.isfinite(number)) and is_good(number)
            try:
                parse_recording(to_log(lines), "rec")
                assert good, (field, number)
            except RecordingError as error:
                assert not good and field.split(".")[-1] in str(error), (field, number, error)


# ------------------------------------------------------------------------------------------------------ shards

TAR_RECORDINGS = {f"r{index}": (bytes([65 + index]) * 700, b"{}\n" * (100 * index + 1)) for index in range(3)}


def small_tar() -> tuple[bytes, dict[str, int]]:
    """A tar of three recordings, and where each of them ends."""
    data, ends = b"", {}
    for name, (video, log) in TAR_RECORDINGS.items():
        data += member(f"5.7/{name}.mp4", video) + member(f"5.7/{name}.jsonl", log)
        ends[name] = len(data) - -len(log) % 512
    return data + END, ends


def check_tar(data: bytes, folder: Path, suffix: str = ".tar") -> dict[str, RecordingPair]:
    """List and read a shard: it must not fail, and must account for what it finds."""
    path = folder / f"fuzzed{suffix}"
    path.write_bytes(data)
    (shard,) = list_shards([str(path)])
    results = list(read_pairs(shard))
    assert len(results) == len(shard.entries)
    for rejection in (*shard.rejected, *(result for result in results if isinstance(result, Rejection))):
        assert isinstance(rejection, Rejection) and rejection.reason and rejection.reason.isprintable(), rejection
        assert rejection.recording is None or rejection.recording.isprintable()
        assert len(rejection.reason) < 1000 and rejection.kind
        json.dumps(rejection.reason).encode()
    found = {result.entry.recording_id: result for result in results if isinstance(result, RecordingPair)}
    for name in found:
        assert Path(name).name == name and len(name.encode()) <= 200 and name.isprintable()
    assert [path.name for path in folder.iterdir()] == [path.name]
    return found


def assert_untouched_are_found(found: dict[str, RecordingPair], ends: dict[str, int], first: int) -> None:
    for name, end in ends.items():
        if end <= first:
            video, log = TAR_RECORDINGS[name]
            assert (found[name].video, found[name].log) == (video, log), name
            assert found[name].entry.recorder_version == "5.7"


@examples(120, 3_000)
def test_tars_changed_in_their_bytes(num_examples, tmp_path):
    tar, ends = small_tar()
    # Half of the mutations fall on headers, which are a small part of the bytes.
    headers = [
        place for place in range(len(tar)) if tar[place // 512 * 512 + 257 : place // 512 * 512 + 262] == b"ustar"
    ]

    def check(mutations, on_headers):
        data, first = mutate(tar, mutations, headers if on_headers else None)
        assert_untouched_are_found(check_tar(data, tmp_path), ends, first)

    run(check, num_examples, st.lists(mutation, min_size=1, max_size=3), st.booleans())


@examples(60, 2_000)
def test_compressed_tars_changed_in_their_bytes(num_examples, tmp_path):
    packed = corpus.gzip.compress(small_tar()[0], mtime=0)
    assert set(check_tar(packed, tmp_path, ".tar.gz")) == set(TAR_RECORDINGS)

    def check(mutations):
        check_tar(mutate(packed, mutations)[0], tmp_path, ".tar.gz")

    run(check, num_examples, st.lists(mutation, min_size=1, max_size=3))


sizes = st.one_of(
    st.integers(0, 3000).map(corpus.octal),
    st.binary(min_size=12, max_size=12),
    st.integers(-(2**80), 2**80).map(lambda size: b"\x80" + (size % 2**88).to_bytes(11, "big")),
)
KINDS = [b"0", b"\0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"L", b"K", b"S", b"g", b"x", b"X", b"Z"]
member_names = st.one_of(
    st.sampled_from(["x.mp4", "x.jsonl", "r0.mp4", "../x.mp4", "/x.jsonl", "a/\u00e9.mp4", "\ud800.mp4", "\n.mp4", ""]),
    st.text(max_size=20).map(lambda name: f"{name}.mp4"),
).map(lambda name: name.encode("utf-8", "surrogateescape" if "\udc80" <= name[:1] <= "\udcff" else "replace")[:100])
KEYS = [
    "path",
    "size",
    "linkpath",
    "hdrcharset",
    "mtime",
    "uid",
    "GNU.sparse.map",
    "GNU.sparse.size",
    "GNU.sparse.name",
]
KEYS += ["GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.offset", "GNU.sparse.numbytes", "GNU.sparse.numblocks"]
record_values = st.one_of(
    st.binary(max_size=30),
    st.integers(-(10**25), 10**25).map(lambda number: str(number).encode()),
    st.sampled_from([b"0", b"1"]),
)
hostile_member = st.one_of(
    st.builds(
        lambda name, size, kind: raw_header(name, size, kind) + bytes(512), member_names, sizes, st.sampled_from(KINDS)
    ),
    st.builds(
        lambda records, kind, size: pax(b"".join(pax_record(key, value) for key, value in records), kind, size),
        st.lists(st.tuples(st.sampled_from(KEYS), record_values), max_size=4),
        st.sampled_from([b"x", b"g", b"X"]),
        st.one_of(st.none(), st.none(), sizes),
    ),
    st.binary(max_size=100).map(lambda records: pax(records)),
)


@examples(120, 3_000)
def test_tars_with_hostile_headers(num_examples, tmp_path):
    tar, ends = small_tar()
    place = -(-ends["r1"] // 512) * 512  # where the third recording begins

    def check(members):
        found = check_tar(tar[:place] + b"".join(members) + tar[place:], tmp_path)
        assert_untouched_are_found(found, ends, place)

    run(check, num_examples, st.lists(hostile_member, min_size=1, max_size=4))


# ------------------------------------------------------------------------------------------------------ videos


def check_video(data: bytes) -> bool:
    try:
        reader = VideoReader(data, "rec.mp4")
        assert reader.num_frames > 0 and reader.frame_rate > 0
        indices = sorted({0, reader.num_frames // 2, reader.num_frames - 1})
        frames = reader.frames(indices)
        assert frames.shape[:2] == (len(indices), 3) and str(frames.dtype) == "torch.uint8"
        return True
    except VideoError as error:
        assert str(error).startswith("rec.mp4: ") and "\n" not in str(error) and len(str(error)) < 600
        return False


@examples(120, 5_000)
def test_videos_changed_in_their_bytes(num_examples):
    video = make_video(12, size=(32, 32))
    index = list(range(corpus.place_of(video, b"moov"), len(video)))
    outcomes = set()

    def check(mutations, in_index):
        outcomes.add(check_video(mutate(video, mutations, index if in_index else None)[0]))

    run(check, num_examples, st.lists(mutation, max_size=3), st.booleans())
    assert outcomes == {True, False}


@examples(120, 5_000)
def test_videos_changed_in_the_fields_of_their_boxes(num_examples):
    """Every 32-bit field of the index, with the values at which tables end, overflow or turn negative."""
    video = make_video(12, size=(32, 32))
    fields = [(start + offset) for _, start, size in corpus.boxes(video) for offset in range(0, min(size, 128), 4)]
    fields = [field for field in fields if field >= corpus.place_of(video, b"moov")]

    def check(changes):
        data = video
        for where, value in changes:
            place = fields[int(where * len(fields))]
            data = (data[:place] + corpus.uint32(value) + data[place + 4 :])[: len(video)]
        check_video(data)

    integers = st.one_of(
        st.integers(0, 64), st.sampled_from([2**k + d for k in (7, 8, 15, 16, 20, 31) for d in (-1, 0, 1)])
    )
    integers |= st.sampled_from([2**32 - 1, 2**32 - 2, 2**30])
    run(check, num_examples, st.lists(st.tuples(st.floats(0, 1, exclude_max=True), integers), min_size=1, max_size=3))


@examples(200, 10_000)
def test_index_of_any_bytes(num_examples):
    def check(data):
        try:
            check_mp4(io.BytesIO(data))
        except ValueError as error:
            assert type(error) is ValueError and str(error)

    kinds = st.sampled_from([b"moov", b"stsz", b"stts", b"ctts", b"trun", b"elst", b"dref", b"cmov", b"mdat", b"free"])
    piece = st.one_of(kinds, st.sampled_from(INTERESTING), st.binary(max_size=20))
    content = st.lists(piece, max_size=10).map(b"".join)
    boxes = st.lists(st.builds(corpus.box, kinds, content), max_size=4).map(b"".join)
    begin = corpus.box(b"ftyp", b"isom")
    run(
        check,
        num_examples,
        st.one_of(content, content.map(lambda rest: begin + rest), boxes.map(lambda rest: begin + rest)),
    )
