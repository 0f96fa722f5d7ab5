"""Clips with stored features of the frozen encoder in place of the video (docs/model.md, "Feature cache")."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor

CLIPS_PER_CHUNK = 256
OPEN_CHUNKS = 64  # a process; at 2.25 million clips there are 8,800


class CachedClips(torch.utils.data.Dataset):
    """Clips with `features` (and, of int8, `feature_scales`), as they are stored, in place of the video or beside it.

    Chunks are memory-mapped; each process keeps the `OPEN_CHUNKS` last used ones.

    Args:
        clips: the clips that the cache was made of, in their order.
        folder: of the cache; `training.feature_cache` makes and checks it.
        clips_per_chunk: clips a file.
        videos: keep the encoded video beside the features.
    """

    def __init__(self, clips: Dataset, folder: Path, clips_per_chunk: int = CLIPS_PER_CHUNK, *, videos: bool = False):
        self.clips = clips if videos else clips.remove_columns("video")
        self.folder, self.clips_per_chunk = folder, clips_per_chunk
        self._chunks: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.clips)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_chunks": OrderedDict()}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.clips[index], **self._stored(index)}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        columns = self.clips[indices]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [{**row, **self._stored(i)} for row, i in zip(rows, indices, strict=True)]

    def _stored(self, index: int) -> dict[str, Tensor]:
        number, offset = divmod(index, self.clips_per_chunk)
        if number not in self._chunks:
            if len(self._chunks) >= OPEN_CHUNKS:
                self._chunks.popitem(last=False)
            self._chunks[number] = load_file(chunk_path(self.folder, number))  # a map: reads nothing but the header
        self._chunks.move_to_end(number)
        return {name: tensor[offset] for name, tensor in self._chunks[number].items()}


def chunk_path(folder: Path, number: int) -> Path:
    """File of clips `number * clips_per_chunk` and on."""
    return folder / f"features-{number:05d}.safetensors"
