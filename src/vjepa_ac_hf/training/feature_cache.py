"""Features of the frozen encoder, computed once and kept on disk, so that later epochs neither decode nor encode.

A cache is a folder a split: `key.json` (what the features depend on) and `features-00000.safetensors`, ... of
`CHUNK` clips each, written under temporary names and renamed. A build that was interrupted continues; a folder made
with another encoder, geometry or data set is refused.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..data.loading import ClipCollator
from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..records import write_json

logger = logging.getLogger(__name__)

CHUNK = 256


class CachedClips(torch.utils.data.Dataset):
    """Clips with `features` in place of the video. Chunks are memory-mapped; each process opens them when needed."""

    def __init__(self, clips: Dataset, folder: Path):
        self.clips = clips.remove_columns("video")
        self.folder = folder
        self._chunks: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.clips)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_chunks": {}}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.clips[index], "features": self._features(index)}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        columns = self.clips[indices]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [{**row, "features": self._features(i)} for row, i in zip(rows, indices, strict=True)]

    def _features(self, index: int) -> Tensor:
        chunk, offset = divmod(index, CHUNK)
        if chunk not in self._chunks:
            self._chunks[chunk] = safe_open(_chunk_path(self.folder, chunk), "pt").get_slice("features")
        return self._chunks[chunk][offset]


def cache_key(model: VJEPA2ACModel, collator: ClipCollator, clips: Dataset, dtype: torch.dtype) -> dict[str, Any]:
    """What cached features depend on: encoder weights and configuration, geometry, clips and storage type."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.encoder.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    processor = collator.processor
    identity = hashlib.sha256()
    for table in clips.with_format("arrow").iter(batch_size=4096):
        # Names and encoded sizes of the clips: changes whenever the data set is built differently, costs no reading.
        sizes = pc.binary_length(pc.struct_field(table["video"], "bytes"))
        columns = [table["recording_id"].to_pylist(), table["start_tick"].to_pylist(), sizes.to_pylist()]
        identity.update(json.dumps(list(zip(*columns, strict=True))).encode())
    return {
        "encoder_weights": weights.hexdigest(),
        "encoder_config": json.loads(model.config.encoder_config.to_json_string()),
        "encoding": model.config.encoding,
        "normalize_features": model.config.normalize_features,
        "resolution": processor.resolution,
        "resize_mode": processor.resize_mode,
        "pixel_mean": processor.pixel_mean,
        "pixel_std": processor.pixel_std,
        "clips": identity.hexdigest(),
        "num_clips": len(clips),
        "dtype": str(dtype).removeprefix("torch."),
    }


def cache_features(
    model: VJEPA2ACModel,
    clips: Dataset,
    collator: ClipCollator,
    folder: Path,
    accelerator: Accelerator,
    *,
    dtype: torch.dtype,
    batch_size: int = 32,
    num_workers: int = 0,
) -> CachedClips:
    """Encode what is not in `folder` yet, every process its share of the chunks, and return the clips with features.

    Raises:
        ValueError: the folder holds features of another encoder, geometry or data set; the differing fields are named.
    """
    key = cache_key(model, collator, clips, dtype)
    _claim_folder(folder, key, accelerator)
    chunks = range((len(clips) + CHUNK - 1) // CHUNK)
    mine = chunks[accelerator.process_index :: accelerator.num_processes]
    todo = [chunk for chunk in mine if not _chunk_path(folder, chunk).is_file()]
    for chunk in tqdm(todo, desc=f"features of {folder.name}", unit="chunk", disable=not accelerator.is_main_process):
        indices = range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(clips)))
        loader = torch.utils.data.DataLoader(
            clips.select(indices), batch_size=batch_size, collate_fn=collator, num_workers=num_workers
        )
        encoded = []
        for batch in loader:
            with accelerator.autocast():
                features = model.encode(batch["pixel_values_videos"].to(accelerator.device))
            encoded.append(features.to(dtype).cpu())
        path = _chunk_path(folder, chunk)
        temporary = path.with_suffix(".tmp")
        save_file({"features": torch.cat(encoded)}, temporary)
        os.replace(temporary, path)
    accelerator.wait_for_everyone()
    return CachedClips(clips, folder)


def _claim_folder(folder: Path, key: dict[str, Any], accelerator: Accelerator) -> None:
    path = folder / "key.json"
    if accelerator.is_main_process and not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, key)
    accelerator.wait_for_everyone()
    found = json.loads(path.read_text())
    differing = sorted(k for k in key.keys() | found.keys() if key.get(k) != found.get(k))
    if differing:
        details = "; ".join(f"{k}: found {found.get(k)!r}, expected {key.get(k)!r}" for k in differing)
        raise ValueError(f"{path}: these features are of something else ({details}). Choose another --cache_features")


def _chunk_path(folder: Path, chunk: int) -> Path:
    return folder / f"features-{chunk:05d}.safetensors"
