"""What cached features depend on: encoder, geometry, clips, precision (docs/model.md, "Feature cache")."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedConfig

from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from .cached_clips import CLIPS_PER_CHUNK

FORMAT = 2  # of the cache's files


def cache_key(
    model: VJEPA2ACModel,
    processor: VJEPA2ACProcessor,
    clips: Dataset,
    dtype: str,
    mixed_precision: str = "no",
    clips_per_chunk: int = CLIPS_PER_CHUNK,
) -> dict[str, Any]:
    """What cached features depend on, as flat JSON: encoder, geometry, clips, precision, storage, format.

    `clips` is a hash of the clips' names, first ticks and encoded sizes. Their encoded videos are hashed chunk by chunk
    (`videos_digest`), because that reads all of the data set and is divided among the processes.
    """
    config = model.config
    # Fields of every configuration (library version, names, labels) say nothing about features.
    general = PreTrainedConfig().to_dict().keys() | {"_name_or_path", "model_type", "dtype", "transformers_version"}
    encoder = {k: v for k, v in config.encoder_config.to_dict().items() if k not in general}
    identity = hashlib.sha256()
    sizes = _video_sizes(clips)
    names = clips.select_columns(["recording_id", "start_tick"]).with_format("arrow")
    for first, table in zip(range(0, len(clips), 4096), names.iter(batch_size=4096), strict=True):
        columns = [table["recording_id"].to_pylist(), table["start_tick"].to_pylist(), sizes[first : first + 4096]]
        identity.update(json.dumps(list(zip(*columns, strict=True))).encode())
    key = {
        "format": FORMAT,
        "encoder_weights": weights_digest(model.encoder),
        **{f"encoder_config.{k}": v for k, v in sorted(encoder.items())},
        "encoding": config.encoding,
        "normalize_features": config.normalize_features,
        "mixed_precision": mixed_precision,
        "resolution": processor.resolution,
        "resize_mode": processor.resize_mode,
        "frames_per_clip": processor.frames_per_clip,
        "tubelet_size": processor.tubelet_size,
        "pixel_mean": processor.pixel_mean,
        "pixel_std": processor.pixel_std,
        "clips": identity.hexdigest(),
        "num_clips": len(clips),
        "dtype": dtype,
        "clips_per_chunk": clips_per_chunk,
    }
    if config.hierarchical_features:  # only then, so that caches made before there was the field stay valid
        key["hierarchical_features"] = True
    return json.loads(json.dumps(key))  # as it will be read: tuples are lists


def _video_sizes(clips: Dataset) -> list[int | None]:
    """Encoded sizes in bytes, from the offsets of the Arrow table: no byte of a video is read."""
    sizes = pc.binary_length(pc.struct_field(clips.data["video"], "bytes"))  # of all rows, before any selection
    return (sizes if clips._indices is None else sizes.take(clips._indices.column(0))).to_pylist()


def files_stamp(clips: Dataset) -> str | None:
    """SHA-256 of names, sizes and times of the files that the clips lie in; None where they lie in memory.

    What has been copied anew, or changed, has another one. The folders that the files lie in do not count.
    """
    files = [Path(file["filename"]) for file in clips.cache_files]
    if not files:
        return None
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(sorted(facts)).encode()).hexdigest()


def weights_digest(module: torch.nn.Module) -> str:
    """SHA-256 of a module's tensors with names, types and shapes, hashed where they lie, one at a time."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def videos_digest(clips: Dataset, rows: range) -> str:
    """SHA-256 of some clips' encoded videos, read from the Arrow table without copying or decoding them."""
    digest = hashlib.sha256()
    video = clips.select(rows).with_format("arrow")[:]["video"]
    for content, path in zip(pc.struct_field(video, "bytes"), pc.struct_field(video, "path"), strict=True):
        buffer = content.as_buffer() if content.is_valid else Path(path.as_py()).read_bytes()
        digest.update(len(buffer).to_bytes(8, "little"))
        digest.update(buffer)
    return digest.hexdigest()


def differences(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Fields that differ, with both values; empty where none does."""
    fields = [k for k in expected | found if expected.get(k) != found.get(k)]
    return "; ".join(f"{k}: found {found.get(k)!r}, expected {expected.get(k)!r}" for k in fields)
