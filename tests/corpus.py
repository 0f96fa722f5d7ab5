"""Damaged and hostile recordings and shards, made from healthy ones by seeded mutation.

Every case says what must become of it: `rejected` with a reason that matches, `built`, or `either` (flipped bits in a
video: what a decoder makes of them is its own affair, so long as nothing else suffers).
"""

import bz2
import gzip
import io
import json
import lzma
import re
import struct
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from helpers_data import make_lines, make_video, to_log
from torchcodec.encoders import AudioEncoder, VideoEncoder

NUM_TICKS = 70
SIZE = (32, 32)
REJECTED, BUILT, EITHER = "rejected", "built", "either"
FINITE = "expected a finite number|Number out of range|out of range"


@dataclass(frozen=True)
class Case:
    """A recording: its log and its video, either of them damaged."""

    name: str
    log: bytes
    video: bytes
    outcome: str
    reason: str = ""


@dataclass(frozen=True)
class ShardCase:
    """A shard: `healthy` recordings must be found in it whole, and every one of `reasons` among its rejections."""

    name: str
    data: bytes
    healthy: tuple[str, ...]
    reasons: tuple[str, ...] = ()
    suffix: str = ".tar"


@cache
def healthy(seed: int = 0) -> tuple[bytes, bytes]:
    """Log and video of a healthy recording of one clip."""
    return to_log(make_lines(NUM_TICKS, seed)), make_video(NUM_TICKS, size=SIZE, seed=seed)


# ------------------------------------------------------------------------------------------------------ logs


def changed(field_name: str, value: str, line: int = 40) -> bytes:
    """The healthy log with one field of one line (from 0) set to a text that need not be JSON."""
    lines = make_lines(NUM_TICKS)
    lines[line]["mouse"] = lines[line]["mouse"] or dict(lines[0]["mouse"])
    lines[line]["keyboard"] = lines[line]["keyboard"] or {"keys": []}
    target = lines[line]
    *path, last = field_name.split(".")
    for part in path:
        target = target[part]
    assert last in target
    target[last] = "@@"
    return to_log(lines).replace(b'"@@"', value.encode("utf-8", "surrogateescape"))


def without(field_name: str, *, everywhere: bool = False) -> bytes:
    lines = make_lines(NUM_TICKS)
    *path, last = field_name.split(".")
    for target in lines if everywhere else lines[40:41]:
        for part in path:
            target = target[part]
        del target[last]
    return to_log(lines)


BAD_NUMBERS = {
    "nan": ("NaN", FINITE),
    "inf": ("Infinity", FINITE),
    "minus-inf": ("-Infinity", FINITE),
    "1e999": ("1e999", "Number out of range|found `float`|got `float`"),
    "string": ('"1"', "Expected `(float|int)"),
    "boolean": ("true", "Expected `(float|int)"),
    "list": ("[]", "Expected `(float|int)"),
    "object": ("{}", "Expected `(float|int)"),
    "10**400": ("1" + "0" * 400, "out of range|expected -1e|expected 0 to 8"),
    "hex": ("0x1F", "broken JSON"),
    "plus": ("+1", "broken JSON"),
    "octal": ("007", "broken JSON"),
}


def number_cases() -> Iterator[tuple[str, bytes, str]]:
    for number in ("yaw", "pitch", "hotbar", "mouse.dx", "mouse.y"):
        for name, (value, reason) in BAD_NUMBERS.items():
            yield f"{number}-{name}", changed(number, value), reason
    for number in ("yaw", "mouse.dx", "mouse.x"):
        yield f"{number}-1e308", changed(number, "1e308"), f"field '{number}': expected -1e\\+07 to 1e\\+07"
    for name, value in (("null", "null"), ("empty", "")):
        yield f"yaw-{name}", changed("yaw", value), "Expected `float`|broken JSON"
    for name, value in (("9", "9"), ("minus", "-1"), ("2**70", str(2**70))):
        yield f"hotbar-{name}", changed("hotbar", value), "field 'hotbar': expected 0 to 8"
    for name, value in (("half", "0.5"), ("minus-zero", "-0.0"), ("whole-float", "3.0")):
        yield f"hotbar-{name}", changed("hotbar", value), r"Expected `int \| null`, got `float`"


def structure_cases() -> Iterator[tuple[str, bytes, str]]:
    for name in ("yaw", "pitch", "mouse.dx", "mouse.buttons"):
        yield f"no-{name}", without(name), f"missing required field `{name.split('.')[-1]}`"
    yield "no-hotbar", without("hotbar"), "line 41: field 'hotbar': expected in all lines or in none, found it missing"
    for name in ("isGuiOpen", "mouse", "keyboard"):
        yield f"no-{name}-anywhere", without(name, everywhere=True), f"field '{name}': missing in all 70 lines"
    for name in ("mouse", "keyboard"):
        for value in ("[]", "3", '"x"', "true", "{}"):
            yield f"{name}-{value}", changed(name, value), f"Expected `object|missing required field.*{name}"
    for value in ("null", "{}", "[1]", '["a", null]', '"key.keyboard.w"', "[[]]"):
        yield f"keys-{value}", changed("keyboard.keys", value), "Expected `(array|str)`"
    for value in ("null", "{}", "[true]", '["0"]', "[[0]]", "0"):
        yield f"buttons-{value}", changed("mouse.buttons", value), "Expected `(array|float)`"
    for value in ("0", '"false"', "[]"):
        yield f"gui-{value}", changed("isGuiOpen", value), r"Expected `bool \| null`"
    many = json.dumps(["key.keyboard.w"] * 65)
    yield "65-keys", changed("keyboard.keys", many), "field 'keyboard.keys': expected at most 64 entries, found 65"
    many = json.dumps(["key.keyboard.w"] * 100_000)
    yield "100000-keys", changed("keyboard.keys", many), "line too long: expected at most 1048576 bytes, found 1800"
    yield "65-buttons", changed("mouse.buttons", str([0] * 65)), "field 'mouse.buttons': expected at most 64 entries"


def text_cases() -> Iterator[tuple[str, bytes, str]]:
    log, _ = healthy()
    lines = log.splitlines(keepends=True)
    for name, line in (("list", "[1]"), ("string", '"x"'), ("number", "1"), ("null", "null"), ("empty-object", "{}")):
        yield f"line-{name}", b"".join([*lines[:40], line.encode() + b"\n", *lines[41:]]), "line 41: "
    yield "empty-log", b"", "found an empty log"
    yield "blank-log", b" \n\r\n\t\n" * 100, "found an empty log"
    yield "blank-line", b"".join([*lines[:40], b"\n", *lines[40:]]), "line 41: expected a JSON object, found an empty"
    yield "two-on-a-line", b"".join([*lines[:40], lines[40][:-1], *lines[41:]]), "line 41: broken JSON"
    yield "pretty-printed", json.dumps(json.loads(lines[0]), indent=1).encode() * 3, "line 1: broken JSON"
    yield "one-list", b"[" + b",".join(lines) + b"]", "line 1: Expected `object`, got `array`"
    yield "old-mac-ends", log.replace(b"\n", b"\r"), "line 1: broken JSON"
    yield "byte-order-mark", b"\xef\xbb\xbf" + log, "line 1: broken JSON"
    yield "utf-16", log.decode().encode("utf-16"), "line 1: broken JSON"
    yield "nul-byte", b"".join([*lines[:40], lines[40][:30] + b"\0" + lines[40][30:], *lines[41:]]), "line 41: broken"
    yield "nul-tail", log + b"\0" * 4096, "line 71: broken JSON"
    yield (
        "invalid-utf-8",
        changed("keyboard.keys", '["\udcff\udcfe"]'),
        "line 41: broken JSON: expected UTF-8, found 0xff",
    )
    yield "lone-surrogate", changed("keyboard.keys", r'["\ud800"]'), "line 41: broken JSON"
    yield "deep-list", changed("unused", "[" * 100_000 + "]" * 100_000), "line 41: broken JSON: nested too deeply"
    yield "deep-object", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "line 1: broken JSON: nested too deeply"
    yield "deep-unclosed", changed("unused", "[" * 100_000), "line 41: broken JSON"
    yield "long-string", changed("unused", '"' + "x" * 2**21 + '"'), "line 41: line too long"
    yield "unclosed-string", changed("unused", '"x'), "line 41: broken JSON"
    yield "single-quotes", log.replace(b'"', b"'"), "line 1: broken JSON"
    yield "comment", b"".join([*lines[:40], b"// comment\n", *lines[40:]]), "line 41: broken JSON"
    yield "html", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "line 1: broken JSON"
    yield "lines-missing", b"".join(lines[:60]), "lengths differ: 70 frames, 60 log lines"
    yield "lines-doubled", log + log, "lengths differ: 70 frames, 140 log lines"
    rng = np.random.default_rng(0)
    for index in range(12):
        line = int(rng.integers(5, 69))
        cut = int(rng.integers(1, len(lines[line]) - 1))
        yield f"cut-{index}", b"".join([*lines[:line], lines[line][:cut]]), f"line {line + 1}: broken JSON"


def built_logs() -> Iterator[tuple[str, bytes]]:
    log, _ = healthy()
    yield "crlf", log.replace(b"\n", b"\r\n")
    yield "no-last-newline", log.rstrip()
    yield "blank-tail", log + b"\n \r\n" * 1000
    yield "doubled-key", log.replace(b'"hotbar"', b'"hotbar": 8, "hotbar"')  # the last one counts
    yield (
        "unknown-fields",
        log.replace(b'"unused"', '"\u4e2d\u202e\U0001f600": [NULL], "unused"'.replace("NULL", "null").encode()),
    )
    yield "escaped-keys", log.replace(b'"yaw"', b'"\\u0079aw"').replace(b'"pitch"', b'"pit\\u0063h"')
    yield "wide-unknown", changed("unused", json.dumps({str(index): index for index in range(20_000)}))
    yield "long-unknown-integer", changed("unused", "1" * 10_000)
    yield "64-keys", changed("keyboard.keys", json.dumps(["key.keyboard.x"] * 64))
    yield "tiny-float", changed("unused", "1e-99999999")
    yield "invalid-utf-8-ignored", changed("unused", '"\udcff"')
    yield "gui-null", changed("isGuiOpen", "null")
    yield "hotbar-null", changed("hotbar", "null")
    for name in ("isGuiOpen", "mouse", "keyboard"):
        yield f"no-{name.lower()}", without(name)
    yield "no-hotbar-anywhere", without("hotbar", everywhere=True)


def label(text: str) -> str:
    """A part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:50].strip("-")


def flipped(data: bytes, seed: int, start: int = 0, end: int | None = None, number: int = 8) -> bytes:
    rng = np.random.default_rng(seed)
    result = bytearray(data)
    for place in rng.integers(start, len(data) if end is None else end, size=number):
        result[place] ^= int(rng.integers(1, 256))
    return bytes(result)


def log_cases() -> list[Case]:
    _, video = healthy()
    rejected = [case for make in (number_cases, structure_cases, text_cases) for case in make()]
    cases = [
        Case(f"log-{label(name)}-{index}", log, video, REJECTED, reason)
        for index, (name, log, reason) in enumerate(rejected)
    ]
    cases += [Case(f"log-{name}", log, video, BUILT) for name, log in built_logs()]
    log, _ = healthy()
    cases += [Case(f"log-flipped-{seed}", flipped(log, seed), video, EITHER) for seed in range(12)]
    return cases


# ------------------------------------------------------------------------------------------------------ videos

CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"stbl", b"edts", b"udta", b"moof", b"traf")


def boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """Type, place and size of every box, outer ones first."""
    end = len(data) if end is None else end
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        yield kind, start, size
        if kind in CONTAINERS:
            yield from boxes(data, start + 8, start + size)
        start += size


def place_of(data: bytes, kind: bytes) -> int:
    return next(start for found, start, _ in boxes(data) if found == kind)


def patched(data: bytes, kind: bytes, offset: int, value: bytes) -> bytes:
    """The video with bytes at an offset from a box's start replaced."""
    start = place_of(data, kind) + offset
    return data[:start] + value + data[start + len(value) :]


def uint32(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return uint32(len(content) + 8) + kind + content


def encoded(size: tuple[int, int] = SIZE, num_frames: int = NUM_TICKS, fps: float = 20, **options) -> bytes:
    frames = torch.arange(num_frames * 3 * size[0] * size[1]).reshape(num_frames, 3, *size) // 7 % 256
    encoder = VideoEncoder(frames.to(torch.uint8), frame_rate=fps)
    options = {"format": "mp4", "codec": "libx264", "pixel_format": "yuv420p", **options}
    # As in `make_video`: the same bytes every time. No frames out of order, so that times can be changed one by one.
    options["extra_options"] = {"threads": "1", "x264-params": "mbtree=0", "bf": "0"}
    return encoder.to_tensor(**options).numpy().tobytes()


def timed(
    video: bytes, runs: list[tuple[int, int]], offsets: Sequence[tuple[int, int]] = (), edits: bytes = b""
) -> bytes:
    """The video with other times: runs of (pictures, duration), of (pictures, offset of showing), an edit list."""
    moov = place_of(video, b"moov")
    tables = dict.fromkeys((b"ctts", b"elst"), b"")
    tables[b"stts"] = box(b"stts", uint32(0, len(runs)), *(uint32(*run) for run in runs))
    if offsets:
        signed = (struct.pack(">Ii", *run) for run in offsets)
        tables[b"stts"] += box(b"ctts", uint32(1 << 24, len(offsets)), *signed)
    if edits:
        tables[b"elst"] = box(b"elst", edits)
    return video[:moov] + rebuilt(video[moov:], tables)


def changing_picture() -> bytes:
    """One video track whose pictures change from 32x32 to 64x48 midway, as parameter sets within the stream say."""
    first, second = encoded(num_frames=35, preset="ultrafast"), encoded((48, 64), num_frames=35, preset="ultrafast")
    samples, sizes = b"", []
    for video in (first, second):
        start, size = next((start, size) for kind, start, size in boxes(video) if kind == b"mdat")
        place_avcc = video.index(b"avcC")
        sps_size = struct.unpack_from(">H", video, place_avcc + 10)[0]
        sps = video[place_avcc + 12 : place_avcc + 12 + sps_size]
        place_pps = place_avcc + 12 + sps_size + 1
        pps_size = struct.unpack_from(">H", video, place_pps)[0]
        pps = video[place_pps + 2 : place_pps + 2 + pps_size]
        stsz = place_of(video, b"stsz")
        (count,) = struct.unpack_from(">I", video, stsz + 16)
        of_video = list(struct.unpack_from(f">{count}I", video, stsz + 20))
        data = video[start + 8 : start + size]
        if video is second:
            sets = uint32(len(sps)) + sps + uint32(len(pps)) + pps
            data, of_video[0] = sets + data, of_video[0] + len(sets)
        samples, sizes = samples + data, sizes + of_video
    moov_start = place_of(first, b"moov")
    start = place_of(first, b"mdat")
    result = first[:start] + box(b"mdat", samples)
    moov = first[moov_start:]
    tables = {
        b"stts": box(b"stts", uint32(0, 1, len(sizes), 512)),
        b"stsz": box(b"stsz", uint32(0, 0, len(sizes), *sizes)),
        b"stsc": box(b"stsc", uint32(0, 1, 1, len(sizes), 1)),
        b"stss": box(b"stss", uint32(0, 2, 1, 36)),
        b"elst": b"",
        b"ctts": b"",
    }
    return result + rebuilt(moov, tables)


def rebuilt(data: bytes, replaced: dict[bytes, bytes]) -> bytes:
    """Boxes with some of them replaced, and the sizes of those around them put right."""
    result, start = b"", 0
    while start + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        content = data[start + 8 : start + size]
        if kind in replaced:
            result += replaced[kind]
        elif kind in CONTAINERS:
            result += box(kind, rebuilt(content, replaced))
        else:
            result += data[start : start + size]
        start += size
    return result


OPEN = "cannot open the video: "


def rejected_videos() -> Iterator[tuple[str, bytes, str]]:
    _, video = healthy()
    places = {"type": 6, "ftyp-end": 32, "mdat-header": 44, "mdat": 2000, "mdat-end": place_of(video, b"moov")}
    for name, place in places.items():
        yield f"cut-{name}", video[:place], OPEN
    for kind in (b"mvhd", b"trak", b"mdhd", b"stsd", b"stts", b"stsz", b"stco", b"udta"):
        yield f"cut-{kind.decode()}", video[: place_of(video, kind) + 10], OPEN + "damaged or truncated"
    yield "cut-last-byte", video[:-1], OPEN + "damaged or truncated: box b'moov'"
    yield "empty", b"", "empty video file: expected an mp4 video, found 0 bytes"
    yield "no-moov", patched(video, b"moov", 4, b"skip"), OPEN
    yield "no-mdat", video[:40] + video[place_of(video, b"moov") :], "cannot (open|decode)|lengths differ"
    yield "zeros", bytes(5000), OPEN + "expected an mp4 file"
    yield "front-lost", video[100:], OPEN + "expected an mp4 file"
    yield "text-in-front", b"x" + video, OPEN + "expected an mp4 file"
    yield "2**32-frames", patched(video, b"stsz", 12, uint32(10, 2**32 - 1)), OPEN + "stsz table too long"
    yield "2**26-frames", patched(video, b"stsz", 12, uint32(10, 2**26)), OPEN + "stsz table too long"
    yield "2**31-times", patched(video, b"stts", 16, uint32(2**31)), OPEN + "stts table too long"
    yield "2**31-time-runs", patched(video, b"stts", 12, uint32(2**31)), OPEN + "stts table too long"
    yield "2**31-offsets", patched(video, b"ctts", 16, uint32(2**31)), OPEN + "ctts table too long"
    yield "2**20-edits", patched(video, b"elst", 12, uint32(2**20)), OPEN + "elst table too long"
    edits = uint32(0, 60, *([3500, 0, 65536] * 60))
    moov = place_of(video, b"moov")
    long_index = rebuilt(video[moov:], {b"elst": box(b"elst", edits), b"stsz": box(b"stsz", uint32(0, 1, 2**20 - 70))})
    yield "edits-times-frames", video[:moov] + long_index, OPEN + "edit lists: expected entries times samples"
    half = rebuilt(video[moov:], {b"stsz": box(b"stsz", uint32(0, 1, 2**19))})
    track = next(half[start : start + size] for kind, start, size in boxes(half) if kind == b"trak")
    yield "many-tracks", video[:moov] + box(b"moov", half[8:116], track * 3), OPEN + "stsz table too long"
    yield "compressed-index", patched(video, b"mvhd", 4, b"cmov"), OPEN + "expected an index that is not compressed"
    link = box(b"url ", uint32(0), b"file:///etc/passwd\0")
    outside = rebuilt(video[moov:], {b"dref": box(b"dref", uint32(0, 1), link)})
    yield "other-file", video[:moov] + outside, OPEN + "expected a video that is all in one file"
    yield "huge-box", video + uint32(1) + b"free" + struct.pack(">Q", 2**63), OPEN + "damaged or truncated: box b'free'"
    yield "huge-file-type", uint32(5000) + b"ftyp" + bytes(4992) + video[32:], OPEN + "ftyp box: expected at most 4096"
    yield "time-scale-0", patched(video, b"mdhd", 20, uint32(0)), "lengths differ|frame rate|cannot"
    yield "uneven-rate", timed(encoded(), [(17, 256), (18, 768), (17, 256), (18, 760)]), "time stamps: 70 frames, 70"
    yield "fps-30", encoded(fps=30), "frame rate: expected 20 FPS, found 30"
    yield "fps-10", patched(video, b"mdhd", 20, uint32(5120)), "frame rate: expected 20 FPS, found 10"
    yield "60-frames", encoded(num_frames=60), "lengths differ: 60 frames, 70 log lines"
    yield "one-frame", encoded(num_frames=1), "lengths differ: 1 frames|frame rate"
    yield "changing-picture", changing_picture(), "cannot decode: frames 0 to 60 of 70"
    yield "avi", encoded(format="avi"), OPEN + "expected an mp4 file"
    audio = AudioEncoder(torch.zeros(1, 16_000), sample_rate=16_000)
    yield "sound-only", audio.to_tensor("mp4").numpy().tobytes(), OPEN
    yield "wave", audio.to_tensor("wav").numpy().tobytes(), OPEN + "expected an mp4 file"
    yield "png", b"\x89PNG\r\n\x1a\n" + bytes(100), OPEN + "expected an mp4 file"
    yield "html", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", OPEN + "expected an mp4 file"
    yield "log-as-video", healthy()[0], OPEN + "expected an mp4 file"


def playlists(target: str, url: str) -> dict[str, bytes]:
    """Texts that FFmpeg takes for a video and then opens what they name: a file and an address."""
    dash = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT3S" profiles="urn:mpeg:dash:profile:isoff-live:2011"><Period><AdaptationSet '
        f'mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{url}</BaseURL></Representation>'
        "</AdaptationSet></Period></MPD>"
    )
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n"
    relative = target.rsplit("/", 1)[-1]
    texts = {
        "concat-absolute": f"ffconcat version 1.0\nfile '{target}'\n",
        "concat-relative": f"ffconcat version 1.0\nfile {relative}\n",
        "concat-url": f"ffconcat version 1.0\nfile '{url}'\n",
        "hls-file": hls.format(target),
        "hls-url": hls.format(url),
        "hls-protocol": hls.format(f"concat:{target}"),
        "hls-as-key": f'#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{url}"\n#EXTINF:10,\n{target}\n',
        "dash": dash,
        "dash-after-text": "x" * 100 + dash,
        "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=control:{url}\n",
        "link": url,
        "real-reference": f"rtsp://{url[7:]}\n",
        "smil": f'<smil><body><video src="{url}"/></body></smil>',
    }
    found = {name: text.encode() for name, text in texts.items()}
    # Behind an ftyp box of which a text could be part: its size would have to be text as well.
    found["dash-behind-ftyp"] = b"AAAAftypisom" + dash.encode()
    found["dash-in-ftyp"] = box(b"ftyp", b"isom" + dash.encode())
    found["hls-in-ftyp"] = box(b"ftyp", b"\n" + hls.format(url).encode())
    return found


def built_videos() -> Iterator[tuple[str, bytes]]:
    _, video = healthy()
    for pixel_format in ("gray", "yuv444p", "yuv422p", "yuv420p10le", "yuvj420p"):
        yield pixel_format, encoded(pixel_format=pixel_format)
    yield "odd-size", encoded((35, 63), pixel_format="yuv444p")
    yield "tiny", encoded((2, 2))
    yield "wide", encoded((16, 512))
    yield "upright", encoded((64, 32))
    yield (
        "rotated",
        patched(encoded((32, 64)), b"tkhd", 48, struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)),
    )
    yield "picture-65535-claimed", patched(video, b"stsd", 48, struct.pack(">HH", 65535, 65535))
    yield "duration-0", patched(video, b"mdhd", 24, uint32(0))
    yield "zeros-behind", video + bytes(4096)
    yield "free-boxes-behind", video + box(b"free", bytes(100)) * 50


def either_videos() -> Iterator[tuple[str, bytes]]:
    _, video = healthy()
    moov = place_of(video, b"moov")
    for seed in range(16):
        yield f"flipped-picture-{seed}", flipped(video, seed, 48, moov, 1 + 3 * seed)
    for seed in range(16):
        yield f"flipped-index-{seed}", flipped(video, seed, moov, len(video), 1 + seed // 2)
    for kind, start, size in boxes(video):
        name = kind.decode("latin-1").strip()
        if kind in (b"ftyp", b"free"):
            continue
        yield f"type-{name}", video[: start + 4] + b"abcd" + video[start + 8 :]
        yield f"blank-{name}", video[: start + 8] + bytes(min(size - 8, 64)) + video[start + 8 + min(size - 8, 64) :]
        for claimed in (0, 1, 7, size - 1, size + 1, 2**32 - 1):
            yield f"size-{name}-{claimed}", video[:start] + uint32(claimed) + video[start + 4 :]
    yield "chunk-beyond-end", patched(video, b"stco", 16, uint32(2**31))
    yield "frame-sizes-0", patched(video, b"stsz", 20, bytes(280))
    yield "frame-sizes-huge", patched(video, b"stsz", 20, uint32(2**31 - 1) * 70)
    yield "time-step-0", patched(video, b"stts", 20, uint32(0))
    yield "time-step-huge", patched(video, b"stts", 20, uint32(2**32 - 1))
    yield "twice", video + video
    yield "picture-data-zero", video[:100] + bytes(moov - 200) + video[moov - 100 :]
    blocks = [video[start : start + 512] for start in range(512, moov - 512, 512)]
    yield "picture-data-shuffled", video[:512] + b"".join(reversed(blocks)) + video[512 + 512 * len(blocks) :]


def video_cases() -> list[Case]:
    log, _ = healthy()
    cases = [Case(f"video-{name}", log, video, REJECTED, reason) for name, video, reason in rejected_videos()]
    cases += [Case(f"video-{name}", log, video, BUILT) for name, video in built_videos()]
    cases += [Case(f"video-{name}", log, video, EITHER) for name, video in either_videos()]
    return [replace(case, name=label(case.name)) for case in cases]


# ------------------------------------------------------------------------------------------------------ shards


def member(name: str, data: bytes = b"", **fields) -> bytes:
    """One member of a tar: header, data and padding."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    header = info.tobuf(tarfile.PAX_FORMAT, errors="surrogateescape")
    return header + data + bytes(-len(data) % 512)


def recording(name: str, seed: int = 0) -> bytes:
    log, video = healthy(seed)
    return member(f"{name}.mp4", video) + member(f"{name}.jsonl", log)


END = bytes(1024)


def raw_header(name: bytes, size: bytes, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """A header with any bytes for its size (12 of them), with a proper checksum."""
    header = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0")
    header += b"00000000000\0" + b" " * 8 + kind + link.ljust(100, b"\0") + b"ustar\x0000"
    header = header.ljust(512, b"\0")
    return header[:148] + f"{sum(header):06o}\0 ".encode() + header[156:]


def octal(size: int) -> bytes:
    return f"{size:011o}\0".encode()


def pax(records: bytes, kind: bytes = b"x", size: bytes | None = None) -> bytes:
    return raw_header(b"pax", size or octal(len(records)), kind) + records + bytes(-len(records) % 512)


def pax_record(key: str, value: bytes) -> bytes:
    content = b" " + key.encode() + b"=" + value + b"\n"
    size = len(content) + len(str(len(content)))
    size = len(content) + len(str(size))
    return str(size).encode() + content


def lost_cases(first: str, second: str) -> Iterator[tuple[str, bytes, tuple[str, ...], tuple[str, ...]]]:
    """Damage after the first of two recordings: the second cannot be found, and the report says so."""
    before, after = recording(first), recording(second, 1)
    log = healthy(1)[0]
    lost = (f"unreadable tar: .*everything after {first}.jsonl \\(file 2\\) is lost",)
    nothing = ("unreadable tar: .*",)
    negative = ("unreadable tar: damaged header \\(size: expected 0 or more, found -",)
    too_long = ("unreadable tar: headers of a member: expected at most 65536 bytes, found more",)
    yield "header-garbage", before + b"\xff" * 512 + after[512:] + END, (first,), lost
    yield "header-checksum", before + after[:148] + b"000000\0 " + after[156:] + END, (first,), lost
    yield "header-zeroed", before + bytes(512) + after[512:] + END, (first,), lost
    yield "header-cut", before + after[:300], (first,), lost
    yield "payload-cut", before + after[:1500], (first,), (f"{second}.mp4",)
    yield "padding-cut", before + after + member("x.jsonl", b"1")[:514], (first, second), ("unreadable tar: ",)
    yield "end-missing", before + after, (first, second), ("damaged or missing header \\(empty header\\)",)
    yield "end-cut", before + after + END[:700], (first, second), ("damaged or missing header \\(truncated header\\)",)
    yield "garbage-behind", before + after + END + b"garbage" * 200, (first, second), ("unreadable tar: ",)
    huge = 8 * 2**60
    for name, size in {
        "size-octal": b"77777777777\0",
        "size-2^63": b"\x80" + bytes(3) + struct.pack(">Q", huge),
        "size-2^80": b"\x80" + (2**80).to_bytes(11, "big"),
        "size-negative": b"\xff" * 10 + b"\xfe\x00",
        "size-minus-1": b"\xff" * 12,
        "size-letters": b"abcdefghijk\0",
    }.items():
        expected = negative if "negative" in name or "minus" in name else nothing
        yield name, before + raw_header(b"x.mp4", size) + log[:512] + after + END, (first,), expected
    for name, value in {
        "pax-size-huge": str(huge).encode(),
        "pax-size-negative": b"-5120",
        "pax-size-10^400": b"1" + b"0" * 400,
    }.items():
        extended = pax(pax_record("size", value))
        expected = negative if "negative" in name else nothing
        yield name, before + extended + member("x.mp4", log[:700]) + after + END, (first,), expected
    big = octal(2**32)
    yield "pax-header-huge", before + pax(b"", size=big) + after + END, (first,), too_long
    yield "pax-header-negative", before + pax(b"", size=b"\xff" * 10 + b"\xec\0") + after + END, (first,), too_long
    yield "long-name-huge", before + raw_header(b"n", big, b"L") + after + END, (first,), too_long
    yield "pax-chain", before + pax(pax_record("path", b"a")) * 5000 + after + END, (first,), too_long
    yield "long-name-chain", before + raw_header(b"n", octal(0), b"L") * 5000 + after + END, (first,), nothing
    yield "pax-digits", before + pax(b"1" * 60_000) + after + END, (first,), nothing
    yield "pax-zero-record", before + pax(b"0 a=b\n") + after + END, (first,), nothing
    yield "pax-binary", before + pax(b"12 hdrcharset=\xff\xfe\n") + after + END, (first,), nothing
    sparse = pax_record("GNU.sparse.major", b"1") + pax_record("GNU.sparse.minor", b"0")
    yield "sparse-map", before + pax(sparse) + member("x.mp4", b"no number\n" * 60) + after + END, (first,), nothing
    yield "sparse-map-open", before + pax(sparse) + member("x.mp4", b"1" * 200_000) + after + END, (first,), nothing
    blocks = raw_header(b"x.mp4", octal(0), b"S")
    blocks = blocks[:482] + b"\1" + blocks[483:]
    blocks = blocks[:148] + f"{sum(blocks[:148]) + 256 + sum(blocks[156:]):06o}\0 ".encode() + blocks[156:]
    yield "sparse-blocks", before + blocks + b"1" * 2**20 + after + END, (first,), too_long


def found_cases(first: str, second: str) -> Iterator[tuple[str, bytes, tuple[str, ...], tuple[str, ...]]]:
    """Hostile members between two recordings, both of which must be found."""
    before, after = recording(first), recording(second, 1) + END
    both = (first, second)
    log, video = healthy(2)

    def between(name: str, data: bytes, *reasons: str):
        return name, before + data + after, both, reasons

    pair = lambda name: member(f"{name}.mp4", video) + member(f"{name}.jsonl", log)  # noqa: E731
    links = {
        "symbolic-link": (tarfile.SYMTYPE, "a symbolic link"),
        "hard-link": (tarfile.LNKTYPE, "a hard link"),
        "device": (tarfile.CHRTYPE, "a device"),
        "block-device": (tarfile.BLKTYPE, "a device"),
        "pipe": (tarfile.FIFOTYPE, "a named pipe"),
    }
    for name, (kind, words) in links.items():
        for target in ("/etc/passwd", f"{first}.mp4"):
            link = member("x.mp4", type=kind, linkname=target) + member("x.jsonl", log)
            label = name if target == "/etc/passwd" else f"{name}-inside"
            yield between(label, link, f"unusable .mp4: expected a regular file, found {words}")
        link = member("y.jsonl", type=kind, linkname="/etc/passwd")
        yield between(f"{name}-alone", link, f"unusable .jsonl: expected a regular file, found {words}")
    yield between("unknown-type", member("x.mp4", b"abc", type=b"Z"), "unusable .mp4: .* of unknown type b'Z'")
    sparse = pax_record("GNU.sparse.map", b"0,5") + pax_record("GNU.sparse.size", b"5")
    yield between("sparse", pax(sparse) + member("x.mp4", b"12345"), "unusable .mp4: .* a sparse file")
    yield between("folder", member("x.mp4", type=tarfile.DIRTYPE) + member("x.jsonl", log), "missing .mp4")
    yield between("only-video", member("x.mp4", video), "missing .jsonl")
    yield between("only-log", member("x.jsonl", log), "missing .mp4")
    yield between("doubled", before, "doubled: .jsonl and .mp4 found again")
    yield between("doubled-video", member(f"{first}.mp4", b"other"), "doubled: .mp4 found again")
    yield between("empty-name", member("", b"abc"))
    yield between("hidden", member(f"._{first}.mp4", b"abc") + member("a/.mp4", b"abc") + member("...mp4", b"abc"))
    yield between(
        "other-files", member("x.MP4", b"") + member("x.mp4.part", b"") + member("mp4", b"") + member("é", b"")
    )
    yield between("nested-tar", member("inner.tar", recording("inner") + END))
    yield between("padded", bytes(20 * 512))
    yield between("concatenated", END + bytes(8192))
    bad_names = {
        "newline": "a\nb",
        "escape": "a\x1b[31mb",
        "surrogate": "a\udcffb",
        "right-to-left": "a\u202eb",
        "zero-width": "a\u200bb",
        "markup": "<script>alert(1)",
        "table": "a|b",
        "protocol": "http:x",
        "backslash": "a\\b",
        "quote": 'a"b',
        "star": "a*b",
    }
    for name, bad in bad_names.items():
        yield between(f"name-{name}", pair(bad), "unusable name: expected printable characters")
    yield between("name-4000", pair("n" * 4000), "name too long: expected at most 200 bytes, found 4000")
    yield between("name-201", pair("é" * 100 + "n"), "name too long: expected at most 200 bytes, found 201")
    extended = pax(pax_record("path", b"a\0b.mp4")) + member("x.mp4", video)
    yield between("name-nul", extended, "unusable name")
    yield between("global-path", pax(pax_record("comment", b"x" * 100), b"g"))


def named_cases(first: str, second: str) -> Iterator[tuple[str, bytes, tuple[str, ...], tuple[str, ...]]]:
    """Strange names under which a healthy recording is built all the same."""
    before, after = recording(first), END
    names = {
        "upward": f"../../{second}",
        "absolute": f"/etc/{second}",
        "dots": f"a/./..//{second}",
        "link-folder": f"{'f' * 3000}/{second}",
        "newline-folder": f"a\nb/{second}",
    }
    for name, path in names.items():
        yield name, before + recording(path, 1) + after, (first, second), ()
    accented = f"{second}e\u0301"
    composed = f"{second}\u00e9"
    log, video = healthy(1)
    halves = member(f"{accented}.mp4", video) + member(f"{composed}.jsonl", log)
    yield "normal-form", before + halves + after, (first, composed), ()
    twice = recording(accented, 1) + recording(composed, 1)
    yield "normal-form-doubled", before + twice + after, (first, composed), ("doubled: ",)
    for name in (f"{second} (1)", f"{second}&amp;", f"{second}\u4e2d\u6587", f"{second}.mp4", f"{second}.jsonl"):
        yield f"name-{name}", before + recording(name, 1) + after, (first, name), ()
    exact = second + "n" * (200 - len(second))
    yield "name-200", before + recording(exact, 1) + after, (first, exact), ()


def shard_cases() -> list[ShardCase]:
    """Cases of whole shards; recordings are named after their case, so that all can be built together."""
    cases = []
    for make in (lost_cases, found_cases, named_cases):
        for index, (name, _, _, _) in enumerate(make("a", "b")):
            unique = f"{label(f'{make.__name__[:-6]} {name}')}-{index}"
            _, data, found, reasons = list(make(f"{unique}-first", f"{unique}-second"))[index]
            cases.append(ShardCase(f"tar-{unique}", data, found, reasons))
    cases += whole_shards()
    return cases


def whole_shards() -> list[ShardCase]:
    everything_lost = ("unreadable tar: .*all of it is lost",)
    tar = recording("whole-first") + recording("whole-second", 1) + END
    packed = gzip.compress(tar, mtime=0)
    rng = np.random.default_rng(0)
    cases = [
        ShardCase("tar-empty", b"", (), everything_lost),
        ShardCase("tar-zeros", bytes(10_240), ()),
        ShardCase("tar-3-mb-of-zeros", bytes(3 * 2**20), (), ("at most 2097152 bytes of zeros",)),
        ShardCase("tar-short", b"tar", (), everything_lost),
        ShardCase("tar-text", b"<html>404 Not Found</html>" * 100, (), everything_lost),
        ShardCase("tar-random", rng.bytes(5000), (), everything_lost),
        ShardCase("tar-is-video", healthy()[1], (), everything_lost),
        ShardCase("tar-gz-good", packed, ("whole-first", "whole-second"), suffix=".tar.gz"),
        ShardCase("tar-gz-called-tar", packed, ("whole-first", "whole-second")),
        ShardCase("tar-called-gz", tar, ("whole-first", "whole-second"), suffix=".tgz"),
        ShardCase("tar-gz-half", packed[: len(packed) // 2], (), ("unreadable tar: |cannot be read",), ".tar.gz"),
        ShardCase("tar-gz-header", packed[:6], (), everything_lost, ".tar.gz"),
        ShardCase("tar-gz-crc", packed[:-8] + bytes(8), ("whole-first", "whole-second"), ("CRC",), ".tar.gz"),
        ShardCase("tar-gz-of-gz", gzip.compress(packed), (), everything_lost, ".tar.gz"),
        ShardCase("tar-bzip2", bz2.compress(tar), (), everything_lost),
        ShardCase("tar-xz", lzma.compress(tar), (), everything_lost),
    ]
    cases.append(ShardCase("tar-gz-bomb", make_gz_bomb(100 * 2**20), ("bomb",), ("expands too much",), ".tar.gz"))
    return cases


def make_gz_bomb(num_bytes: int) -> bytes:
    """A gzipped tar of a recording and one member of zeros, without ever holding these."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
        file.write(recording("bomb") + raw_header(b"x.txt", octal(num_bytes)))
        for _ in range(num_bytes // 2**20):
            file.write(bytes(2**20))
    return packed.getvalue()


def recording_cases() -> list[Case]:
    return log_cases() + video_cases()
