"""The feature cache: what is stored, what is refused, builds that are killed, and losses with and without it."""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset, Video
from helpers_clips import FEATURES, write_clips
from helpers_training import TINY, command, losses, metrics, write_workspace
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vjepa_ac_hf import VJEPA2ACConfig, VJEPA2ACModel, VJEPA2ACProcessor
from vjepa_ac_hf.loading import cached_clips, feature_cache
from vjepa_ac_hf.loading.cache_key import cache_key, weights_digest
from vjepa_ac_hf.loading.cached_clips import CachedClips
from vjepa_ac_hf.loading.clips import ClipCollator, load_clips
from vjepa_ac_hf.loading.feature_cache import bytes_per_clip, cache_features
from vjepa_ac_hf.loading.loader import ClipLoader
from vjepa_ac_hf.loading.quantization import quantize_features, restore_features

TESTS = Path(__file__).resolve().parent
CHUNK = 4  # 14 clips: chunks of 4, 4, 4 and 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    write_clips(folder / "clips", train=14, validation=3)
    return folder


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)  # of a test with another precision
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_model(**config) -> VJEPA2ACModel:
    torch.manual_seed(0)
    return VJEPA2ACModel(VJEPA2ACConfig(**TINY | config)).eval()


def make_processor(folder: Path, **options) -> VJEPA2ACProcessor:
    statistics = json.loads((folder / "clips" / "action_stats.json").read_text())
    return VJEPA2ACProcessor(resolution=32, action_statistics=statistics, **options)


def build(folder: Path, cache: Path, **changes) -> CachedClips:
    """The cache of `folder`'s training clips, small chunks; what the key depends on can be changed."""
    options = {"dtype": "float32", "batch_size": 3, "clips_per_chunk": CHUNK} | changes
    model = options.pop("model", None) or make_model()
    clips = options.pop("clips", None) or load_clips(str(folder / "clips"), "train")
    processor = options.pop("processor", None) or make_processor(folder)
    accelerator = options.pop("accelerator", None) or Accelerator(cpu=True)
    return cache_features(model, clips, processor, cache, accelerator, **options)


@pytest.fixture(scope="module")
def built(folder):
    """A whole float32 cache; tests that change something copy it."""
    build(folder, folder / "built")
    return folder / "built"


def copy_of(built: Path, target: Path) -> Path:
    shutil.copytree(built, target)
    return target


def chunk_files(cache: Path) -> dict[str, tuple]:
    """Content of every chunk, and what it says of itself (in any order); another file that looks like one fails."""
    files = {}
    for path in cache.glob("features-*"):
        with safe_open(path, "pt") as file:
            tensors = {name: hashlib.sha256(t.numpy()).hexdigest() for name, t in load_file(path).items()}
            files[path.name] = (path.stat().st_size, file.metadata(), tensors)
    return files


def stored_features(path: Path) -> torch.Tensor:
    """A chunk's features as numbers, by a plain reading of the format."""
    tensors = load_file(path)
    features = tensors["features"].float()
    if "feature_scales" in tensors:
        scales = tensors["feature_scales"]
        features *= scales.repeat_interleave(features.shape[-1] // scales.shape[-1], dim=-1)
    return features


def encoded_one_by_one(folder: Path) -> torch.Tensor:
    model, collator = make_model(), ClipCollator(make_processor(folder))
    clips = load_clips(str(folder / "clips"), "train")
    return torch.cat([model.encode(collator([clips[i]])["pixel_values_videos"]) for i in range(len(clips))])


# Frames beside features


def test_frames_come_beside_stored_features_where_they_are_asked_for(folder, built):
    """A decoder's targets: the same bytes as without a cache, in the same batches; not asked for, no video is read."""
    clips, processor = build(folder, built, videos=True), make_processor(folder)
    plain = load_clips(str(folder / "clips"), "train")
    for ours, theirs in zip(
        islice(ClipLoader(clips, processor, 3, frames=True), 3),
        islice(ClipLoader(plain, processor, 3, frames=True), 3),
        strict=True,
    ):
        assert ours["clips"] == theirs["clips"] and ours["frames"].dtype == torch.uint8
        assert torch.equal(ours["frames"], theirs["frames"])
        assert torch.equal(processor.normalize_pixels(ours["frames"]), theirs["pixel_values_videos"])
        assert "pixel_values_videos" not in ours and "features" not in theirs
    without = next(iter(ClipLoader(build(folder, built), processor, 3)))
    assert "frames" not in without and torch.equal(
        without["features"], next(iter(ClipLoader(clips, processor, 3)))["features"]
    )
    # What goes to a device as bytes arrives as bytes, beside what is made of it there.
    meta = [next(iter(ClipLoader(c, processor, 3, frames=True, device="meta"))) for c in (clips, plain)]
    assert [b["frames"].dtype for b in meta] == [torch.uint8] * 2
    assert "pixel_values_videos" not in meta[0] and meta[1]["pixel_values_videos"].dtype == torch.float32
    assert "frames" not in next(iter(ClipLoader(plain, processor, 3, device="meta")))


# What is stored


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 3),
    width=st.sampled_from([1, 16, 48, 64, 128]),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**31),
)
def test_int8_equals_a_loop_over_groups(groups, width, exponent, seed):
    values = np.random.default_rng(seed).standard_t(2, size=(groups, width)).astype(np.float32) * 2.0**exponent
    values[0, : width // 2] = 0.0
    integers, scales = quantize_features(torch.from_numpy(values))
    restored = restore_features(integers, scales).numpy()
    size = 64 if width % 64 == 0 else 16 if width % 16 == 0 else 1
    assert integers.dtype == torch.int8 and scales.dtype == torch.float32
    assert scales.shape == (groups, width // size)
    for row in range(groups):
        for first in range(0, width, size):
            group = values[row, first : first + size].astype(np.float64)
            scale = abs(group).max() / 127
            assert scales[row, first // size] == pytest.approx(scale, rel=1e-6)
            error = abs(restored[row, first : first + size] - group)
            assert (error <= scale * 0.5 * (1 + 1e-4)).all()
            largest = abs(group).argmax()
            assert restored[row, first + largest] == pytest.approx(group[largest], rel=1e-6)


def test_int8_uses_all_of_its_range_in_every_group():
    """A loud channel costs precision in its own group alone."""
    features = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    features[:, 100] = 1000.0
    quiet = (restore_features(*quantize_features(features)) - features)[:, :64]
    assert quiet.abs().max() < 0.02
    assert quantize_features(features)[0].abs().unflatten(-1, (2, 64)).amax(-1).eq(127).all()


def test_announced_sizes_and_errors_are_those_of_the_files(folder, tmp_path):
    expected = encoded_one_by_one(folder)
    assert bytes_per_clip((8, 256, 1024), "bfloat16") == 4_194_304
    assert bytes_per_clip((8, 256, 1024), "float32") == 8_388_608
    assert bytes_per_clip((8, 256, 1024), "int8") == 8 * 256 * (1024 + 16 * 4)
    for dtype in ("float32", "bfloat16", "int8"):
        said: list[str] = []
        build(folder, tmp_path / dtype, dtype=dtype, announce=said.append)
        size = bytes_per_clip((8, 4, 48), dtype)
        stored = sum(t.nbytes for p in (tmp_path / dtype).glob("features-*") for t in load_file(p).values())
        assert stored == 14 * size
        before, encoded, after = said
        assert f"14 of 14 clips are to be encoded: {size:,} bytes a clip ({dtype}), {14 * size:,} bytes" in before
        on_disk = sum(p.stat().st_size for p in (tmp_path / dtype).glob("features-*"))
        assert f"features of 14 clips ({dtype}) take {on_disk:,} bytes" in after
        error = torch.cat([stored_features(p) for p in sorted((tmp_path / dtype).glob("*.safetensors"))]) - expected
        relative = (error.double().square().sum() / expected.double().square().sum()).sqrt().item()
        assert float(encoded.split()[-1]) == pytest.approx(relative, rel=0.02, abs=1e-5)
        assert (relative > 1e-3) == (dtype != "float32")


def test_features_are_those_of_each_clip(folder, tmp_path, built):
    expected = encoded_one_by_one(folder)
    names = [f"{r['recording_id']}@{r['start_tick']}" for r in load_clips(str(folder / "clips"), "train")]
    bounds = {"float32": 1e-5, "bfloat16": 2.0**-8, "int8": 0.5 / 127 + 1e-5}  # of the clip's largest magnitude
    for dtype, bound in bounds.items():
        cache = build(folder, built if dtype == "float32" else tmp_path / dtype, dtype=dtype)
        seen = set()
        for batch in islice(ClipLoader(cache, make_processor(folder), 4, seed=1), 7):
            assert "feature_scales" not in batch and batch["features"].dtype == torch.float32
            for name, features in zip(batch["clips"], batch["features"], strict=True):
                true = expected[names.index(name)]
                assert (features - true).abs().max() <= bound * true.abs().max()
                seen.add(name)
        assert seen == set(names)


def test_features_are_made_in_the_precision_of_the_run(folder, tmp_path, built):
    """As in a step without cache: the encoder under autocast, features as it gives them."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    build(folder, tmp_path / "cache", accelerator=accelerator)
    found = torch.cat([stored_features(p) for p in sorted((tmp_path / "cache").glob("*.safetensors"))])
    with torch.autocast("cpu", torch.bfloat16):
        expected = encoded_one_by_one(folder).float()
    full = torch.cat([stored_features(p) for p in sorted(built.glob("*.safetensors"))])
    assert (found - expected).norm() < 0.2 * (found - full).norm()


def test_a_cache_that_is_there_is_not_touched(folder, built, monkeypatch):
    before = chunk_files(built)
    monkeypatch.setattr(VJEPA2ACModel, "encode", None)
    said: list[str] = []
    assert len(build(folder, built, announce=said.append)) == 14
    assert chunk_files(built) == before and len(said) == 1 and "features of 14 clips (float32) take" in said[0]


def test_open_chunks_are_few(folder, built, monkeypatch):
    monkeypatch.setattr(cached_clips, "OPEN_CHUNKS", 2)
    cached = CachedClips(load_clips(str(folder / "clips"), "train"), built, CHUNK)
    whole = torch.cat([load_file(p)["features"] for p in sorted(built.glob("features-*"))])
    order = np.random.default_rng(0).permutation(14).tolist() * 3
    for index in order:
        torch.testing.assert_close(cached.__getitems__([index])[0]["features"], whole[index], rtol=0, atol=0)
        torch.testing.assert_close(cached[index]["features"], whole[index], rtol=0, atol=0)
        assert sum(str(built) in line for line in Path("/proc/self/maps").read_text().splitlines()) <= 2


# What is refused


def other_clips(folder: Path, **columns) -> Dataset:
    rows = Dataset.from_dict(load_clips(str(folder / "clips"), "train").to_dict() | columns, features=FEATURES)
    return rows.cast_column("video", Video(decode=False))


def other_weights() -> VJEPA2ACModel:
    model = make_model()
    with torch.no_grad():
        next(model.encoder.parameters()).view(-1)[-1] += 1e-3
    return model


def one_tick_later(folder: Path) -> Dataset:
    ticks = load_clips(str(folder / "clips"), "train")["start_tick"][:]
    return other_clips(folder, start_tick=[*ticks[:-1], ticks[-1] + 1])


def wider(folder: Path) -> VJEPA2ACModel:
    return make_model(encoder_config=TINY["encoder_config"] | {"num_attention_heads": 4})


CHANGES = {
    "encoder_weights": lambda f: {"model": other_weights()},
    "encoder_config.num_attention_heads: found 2, expected 4": lambda f: {"model": wider(f)},
    "encoding: found 'tubelet', expected 'clip'": lambda f: {"model": make_model(encoding="clip")},
    "normalize_features: found True, expected False": lambda f: {"model": make_model(normalize_features=False)},
    "mixed_precision: found 'no', expected 'bf16'": lambda f: {
        "accelerator": Accelerator(cpu=True, mixed_precision="bf16")
    },
    "resize_mode: found 'crop', expected 'squash'": lambda f: {"processor": make_processor(f, resize_mode="squash")},
    r"pixel_std: found \[0.229, .*\], expected \[1.0, 1.0, 1.0\]": lambda f: {
        "processor": make_processor(f, pixel_std=[1.0] * 3)
    },
    "frames_per_clip: found 16, expected 8": lambda f: {"processor": make_processor(f, frames_per_clip=8)},
    "num_clips: found 14, expected 13": lambda f: {
        "clips": load_clips(str(f / "clips"), "train").select(range(13)),
    },
    "clips: found '[0-9a-f]{64}', expected '[0-9a-f]{64}'": lambda f: {"clips": one_tick_later(f)},
    "dtype: found 'float32', expected 'bfloat16'": lambda f: {"dtype": "bfloat16"},
    "clips_per_chunk: found 4, expected 5": lambda f: {"clips_per_chunk": 5},
}


@pytest.mark.parametrize("message", CHANGES)
def test_features_of_something_else_are_refused(folder, built, monkeypatch, message):
    changes = CHANGES[message](folder)
    before = chunk_files(built)
    monkeypatch.setattr(VJEPA2ACModel, "encode", None)
    with pytest.raises(ValueError, match=f"key.json: these features are of something else .*{message}") as error:
        build(folder, built, **changes)
    if message not in ("num_clips: found 14, expected 13",):  # fewer clips are other clips too
        assert str(error.value).count("found ") == 1
    assert chunk_files(built) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"resolution": 32}', "format: found None, expected 2; encoder_weights: found None"),
        ("{", "key.json: Expecting .*; remove the folder"),
    ],
)
def test_a_key_of_another_format_is_refused(folder, built, tmp_path, content, message):
    cache = copy_of(built, tmp_path / "cache")
    (cache / "key.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        build(folder, cache)


def test_changed_pictures_of_the_same_size_are_refused(folder, built, monkeypatch):
    videos = load_clips(str(folder / "clips"), "train").to_dict()["video"]
    content = bytearray(videos[9]["bytes"])
    content[len(content) // 2] ^= 1
    videos[9] = videos[9] | {"bytes": bytes(content)}
    monkeypatch.setattr(VJEPA2ACModel, "encode", None)
    with pytest.raises(ValueError, match="1 chunks cannot be used") as error:
        build(folder, built, clips=other_clips(folder, video=videos))
    assert re.search(
        r"features-00002.safetensors: of something else \(videos: found '\w{64}', expected '\w{64}'\)", str(error.value)
    )


def stored_clips(folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A data set of this test alone, and its Arrow file."""
    load_clips(str(folder / "clips"), "train").save_to_disk(tmp_path / "stored")
    (file,) = (tmp_path / "stored").glob("*.arrow")
    return tmp_path / "stored", file


def change_a_video(clips: Path, file: Path, index: int) -> None:
    """One bit of one video in the Arrow file, whose size and time stay as they were."""
    video = Dataset.load_from_disk(clips).cast_column("video", Video(decode=False))[index]["video"]["bytes"]
    content, times = bytearray(file.read_bytes()), file.stat()
    content[content.index(video) + len(video) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_start_with_a_complete_cache_reads_no_video(folder, tmp_path, monkeypatch):
    """A changed bit shows who reads: nobody at a start, all with `verify` or where the files' times have changed."""
    stored, file = stored_clips(folder, tmp_path)
    cache = tmp_path / "cache"

    def start(**options) -> int:
        return len(build(folder, cache, clips=Dataset.load_from_disk(stored), **options))

    assert start() == 14
    before = chunk_files(cache)
    monkeypatch.setattr(VJEPA2ACModel, "encode", None)
    change_a_video(stored, file, 9)
    assert start() == 14
    with pytest.raises(ValueError, match=r"(?s)1 chunks cannot be used.*features-00002.*videos: found"):
        start(verify=True)
    os.utime(file, ns=(1, 10**18))
    for _ in range(2):  # and again: what was refused is not remembered
        with pytest.raises(ValueError, match=r"(?s)1 chunks cannot be used.*features-00002.*videos: found"):
            start()
    change_a_video(stored, file, 9)  # back as it was, at another time: read once, and known from then on
    assert start() == 14
    change_a_video(stored, file, 2)
    assert start() == 14 and chunk_files(cache) == before
    file.write_bytes(file.read_bytes())  # written again: the time alone has changed
    with pytest.raises(ValueError, match=r"(?s)1 chunks cannot be used.*features-00000"):
        start()


def test_the_same_clips_in_memory_are_compared_at_every_start(folder, built, tmp_path):
    """They have no files whose times could tell; a copy of the data set on another disk is the same data set."""
    cache = copy_of(built, tmp_path / "cache")
    known = json.loads((cache / "files.json").read_text())
    assert len(build(folder, cache, clips=other_clips(folder))) == 14
    assert json.loads((cache / "files.json").read_text()) == known
    stored, _ = stored_clips(folder, tmp_path)
    assert len(build(folder, cache, clips=Dataset.load_from_disk(stored))) == 14
    assert len(json.loads((cache / "files.json").read_text())) == len(known) + 1


def test_some_clips_have_the_sizes_of_their_own_videos(folder):
    clips = load_clips(str(folder / "clips"), "train")
    for rows in ([3, 0, 12], range(4, 9), [13]):
        some = clips.select(rows)
        expected = [(r["recording_id"], r["start_tick"], len(r["video"]["bytes"])) for r in some]
        digest = hashlib.sha256(json.dumps(expected).encode()).hexdigest()
        assert cache_key(make_model(), make_processor(folder), some, "int8")["clips"] == digest


def test_caches_of_several_keys_lie_beside_each_other(folder, built, tmp_path, monkeypatch):
    said: list[str] = []
    options = {"shared": True, "announce": said.append}
    first = build(folder, tmp_path / "train", **options)
    assert first.folder.parent == tmp_path and re.fullmatch(r"train-[0-9a-f]{12}", first.folder.name)
    second = build(folder, tmp_path / "train", dtype="int8", **options)
    assert second.folder != first.folder and chunk_files(first.folder) == chunk_files(built)
    assert any(
        line.startswith(f"{second.folder} is new: {first.folder} holds features of something else (dtype: found")
        for line in said
    )
    # Another predictor and action space, the same encoder: nothing is encoded.
    monkeypatch.setattr(VJEPA2ACModel, "encode", None)
    model = make_model(action_space="vpt-36", pred_num_hidden_layers=1, auto_steps=1)
    assert build(folder, tmp_path / "train", model=model, **options).folder == first.folder
    old = copy_of(built, tmp_path / "old" / "train")  # named as before there were keys in names
    assert build(folder, old, **options).folder == old


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def rewrite(path: Path, change) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({"features": change(load_file(path)["features"])}, path, metadata=metadata)


DAMAGE = {
    "damaged .*incomplete metadata": truncate,
    "damaged .*header too small": lambda p: p.write_bytes(b""),
    "damaged .*header": lambda p: p.write_bytes(b"\xff" * 500),
    r"tensors: found '.*F32 \[3, 8, 4, 48\].*', expected '.*F32 \[4, 8, 4, 48\]": lambda p: rewrite(p, lambda t: t[:3]),
    r"tensors: found '.*F32 \[4, 8, 3, 48\]": lambda p: rewrite(p, lambda t: t[:, :, :3].contiguous()),
    r"tensors: found '.*BF16 \[4, 8, 4, 48\]": lambda p: rewrite(p, lambda t: t.bfloat16()),
    r"rows: found '8\.\.11', expected '4\.\.7'": lambda p: shutil.copy(p.with_name("features-00002.safetensors"), p),
    "key: found None, expected": lambda p: save_file(load_file(p), p),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_chunks_are_named_before_anything_is_computed(folder, built, tmp_path, monkeypatch, message):
    cache = copy_of(built, tmp_path / "cache")
    DAMAGE[message](cache / "features-00001.safetensors")
    (cache / "features-00003.safetensors").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(VJEPA2ACModel, "encode", None)
        with pytest.raises(ValueError, match=f"(?s)1 chunks cannot be used.*features-00001.safetensors: .*{message}"):
            build(folder, cache)
    assert not (cache / "features-00003.safetensors").exists()
    (cache / "features-00001.safetensors").unlink()
    build(folder, cache)
    assert chunk_files(cache) == chunk_files(built)


def test_chunks_of_another_cache_are_refused(folder, built, tmp_path):
    build(folder, tmp_path / "other", model=other_weights())
    cache = copy_of(built, tmp_path / "cache")
    shutil.copy(tmp_path / "other" / "features-00000.safetensors", cache)
    with pytest.raises(ValueError, match=r"features-00000.safetensors: of something else \(key: found"):
        build(folder, cache)


def test_a_full_disk_is_an_error_before_encoding(folder, tmp_path, monkeypatch):
    size = 14 * bytes_per_clip((8, 4, 48), "float32")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match="14 of 14 clips.*6,144 bytes a clip.*free: 86,015 bytes"),
    ):
        patch.setattr(VJEPA2ACModel, "encode", None)
        build(folder, tmp_path / "cache")
    assert chunk_files(tmp_path / "cache") == {}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    build(folder, tmp_path / "cache")
    (tmp_path / "cache" / "features-00003.safetensors").unlink()
    # What is there already takes no more room.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size // 7))
    build(folder, tmp_path / "cache")


def test_features_that_are_not_finite_are_refused(folder, tmp_path):
    model = make_model()
    with torch.no_grad():
        next(model.encoder.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite. Clips: toy-0000-00000000beef-20260101-000000@0, toy-"):
        build(folder, tmp_path / "cache", model=model, dtype="int8")
    assert chunk_files(tmp_path / "cache") == {}


def test_types_that_are_not_known_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="dtype must be one of .*'int8'.*, found 'int4'"):
        build(folder, tmp_path / "cache", dtype="int4")
    assert not (tmp_path / "cache").exists()


def test_weights_are_told_apart_by_every_byte_type_and_shape():
    linear = torch.nn.Linear(3, 2)
    digest = hashlib.sha256()
    for name, shape in (("bias", (2,)), ("weight", (2, 3))):
        digest.update(f"{name} torch.float32 {shape}\n".encode())
        digest.update(getattr(linear, name).detach().numpy().tobytes())
    assert weights_digest(linear) == digest.hexdigest()
    assert weights_digest(linear.bfloat16()) != digest.hexdigest()
    assert len(weights_digest(torch.nn.BatchNorm1d(2))) == 64  # a counter without dimensions


# Builds by processes


def child(folder: str, cache: str, seconds_per_batch: str, report: str) -> None:
    """Run in a process of its own, twice: what it wrote, and why the second call failed, goes to `report`."""
    written: list[str] = []
    save, encode = feature_cache.save_file, VJEPA2ACModel.encode

    def save_and_note(tensors, path, **options):
        written.append(path.name)
        save(tensors, path, **options)

    def encode_slowly(self, pixels):
        time.sleep(float(seconds_per_batch))
        return encode(self, pixels)

    feature_cache.save_file, VJEPA2ACModel.encode = save_and_note, encode_slowly
    accelerator = Accelerator(cpu=True)
    cached = build(Path(folder), Path(cache), accelerator=accelerator)
    total = sum(cached[i]["features"].double().sum().item() for i in range(14))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        truncate(Path(cache) / "features-00001.safetensors")
    accelerator.wait_for_everyone()
    message = ""
    try:
        build(Path(folder), Path(cache), accelerator=accelerator)
    except (ValueError, RuntimeError) as error:
        message = f"{type(error).__name__}: {error}"
    Path(f"{report}-{accelerator.process_index}.json").write_text(json.dumps([written, total, message]))
    accelerator.end_training()


def start(folder: Path, cache: Path, seconds_per_batch: float, report: Path, **environment: str) -> subprocess.Popen:
    arguments = [str(folder), str(cache), str(seconds_per_batch), str(report)]
    return subprocess.Popen(
        [sys.executable, "-c", "import sys, test_feature_cache; test_feature_cache.child(*sys.argv[1:])", *arguments],
        env=os.environ | {"PYTHONPATH": f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_build_continues(folder, built, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    process = start(folder, cache, 0.2, tmp_path / "report")
    deadline = time.monotonic() + 120
    while not (cache / "features-00000.safetensors").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    with contextlib.ExitStack() as stack:
        stack.callback(process.communicate)
        stack.callback(process.kill)
        with pytest.raises(OSError, match="another run builds this cache"):
            build(folder, cache)
    assert process.returncode == -signal.SIGKILL
    first = (cache / "features-00000.safetensors").stat()
    assert not (cache / "features-00003.safetensors").exists()
    # What a kill in the middle of writing leaves, of a chunk that is there by now and of one that is not.
    for number in (1, 3):
        (cache / f"features-0000{number}.tmp").write_bytes((built / "features-00001.safetensors").read_bytes()[:999])
    encoded = []
    encode = VJEPA2ACModel.encode
    monkeypatch.setattr(VJEPA2ACModel, "encode", lambda self, pixels: (encoded.append(1), encode(self, pixels))[1])
    missing = 4 - len(list(cache.glob("*.safetensors")))
    build(folder, cache)
    assert (cache / "features-00000.safetensors").stat().st_mtime_ns == first.st_mtime_ns
    assert 1 <= len(encoded) <= 2 * missing and chunk_files(cache) == chunk_files(built)


@pytest.mark.slow
def test_workers_decode_the_same(folder, built, tmp_path):
    before = {process.pid for process in multiprocessing.active_children()}
    build(folder, tmp_path / "cache", num_workers=2)
    assert chunk_files(tmp_path / "cache") == chunk_files(built)
    assert {process.pid for process in multiprocessing.active_children()} <= before


@pytest.mark.slow
def test_two_processes_build_and_refuse_together(folder, built, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    cluster = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [start(folder, tmp_path / "cache", 0, tmp_path / "report", **cluster, **rank) for rank in ranks]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    reports = [json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in range(2)]
    assert reports[0][0] == ["features-00000.tmp", "features-00002.tmp"]
    assert reports[1][0] == ["features-00001.tmp", "features-00003.tmp"]
    assert reports[0][1] == reports[1][1]
    (tmp_path / "cache" / "features-00001.safetensors").unlink()
    expected = chunk_files(built)
    del expected["features-00001.safetensors"]
    assert chunk_files(tmp_path / "cache") == expected
    assert "another process cannot use this cache" in reports[0][2] and reports[0][2].startswith("RuntimeError")
    assert "features-00001.safetensors: damaged" in reports[1][2] and reports[1][2].startswith("ValueError")


# Training

TOLERANCE = {"bfloat16": 1e-3, "int8": 2e-3}  # of a loss, relative; twice what is measured here


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("train"))


def test_losses_are_those_without_a_cache(workspace, train_here):
    plain = workspace / "plain"
    train_here(command(workspace, plain))
    # Kernels whose result depends on a clip's place in its batch would make exact equality a matter of luck.
    pixels, model = torch.randn(4, 16, 3, 32, 32), make_model()
    invariant = torch.equal(model.encode(pixels).flip(0), model.encode(pixels.flip(0)))
    exact = 0.0 if invariant else 1e-5
    compared = ("loss", "teacher_forcing_loss", "rollout_loss", "gradient_norm", "validation_loss", "validation_error")
    for dtype in ("float32", "bfloat16", "int8"):
        output = workspace / dtype
        flags = [f"--cache_features={workspace / 'cache' / dtype}", f"--cache_dtype={dtype}"]
        train_here(command(workspace, output, *flags))
        for found, expected in zip(metrics(output), metrics(plain), strict=True):
            assert [n in found for n in compared] == [n in expected for n in compared]
            for name in (n for n in compared if n in expected):
                if dtype == "float32":
                    assert found[name] == pytest.approx(expected[name], rel=exact, abs=0), name
                elif "gradient" not in name:
                    assert found[name] == pytest.approx(expected[name], rel=TOLERANCE[dtype]), name
        if dtype != "float32":
            assert losses(output) != losses(plain)
        caches = sorted(p.name for p in (workspace / "cache" / dtype).iterdir())
        assert [re.sub(r"-[0-9a-f]{12}$", "", name) for name in caches] == ["train", "validation-6"]


def test_types_by_default_and_on_resume(workspace, train_here):
    """A run that goes on with features of another type is refused, the cache or not; equal ones are not."""
    output, cache = workspace / "default", workspace / "cache_default"
    flags = [f"--cache_features={cache}", "--max_steps=4"]
    train_here(command(workspace, output, *flags))
    (key,) = cache.glob("train-*/key.json")
    assert json.loads(key.read_text())["dtype"] == "bfloat16"
    for other in ("int8", "float32"):
        with pytest.raises(ValueError, match=f"cache_dtype: 'bfloat16' then, '{other}' now"):
            train_here(command(workspace, output, *flags, f"--cache_dtype={other}"))
    with pytest.raises(ValueError, match="cache_dtype: 'bfloat16' then, 'float32' now"):
        train_here(command(workspace, output, "--max_steps=4"))


def test_a_type_without_a_cache_is_refused(workspace, train_here, capsys):
    with pytest.raises(SystemExit):
        train_here(command(workspace, workspace / "flags", "--cache_dtype=int8"))
    assert "--cache_dtype int8 needs --cache_features DIR" in capsys.readouterr().err
