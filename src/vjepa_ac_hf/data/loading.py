"""Reading a built data set of clips: columns checked, videos decoded, batches made for the model."""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, Video, get_dataset_split_names, load_dataset
from datasets.distributed import split_dataset_by_node
from huggingface_hub import hf_hub_download
from torch import Tensor

from ..actions_vjepa2_ac import ACTION_COLUMNS, ActionStatistics
from ..processing_vjepa2_ac import VJEPA2ACProcessor

COLUMNS = ("video", "actions", "states", "recording_id", "session_id", "start_tick")


def load_clips(dataset: str, split: str, *, streaming: bool = False) -> Dataset | IterableDataset:
    """A split of a built data set (folder or Hub repository), videos left encoded.

    Raises:
        ValueError: an unknown split or missing columns, with what was found.
    """
    splits = get_dataset_split_names(dataset)
    if split not in splits:
        raise ValueError(f"{dataset}: no split {split!r}, found {splits}")
    clips = load_dataset(dataset, split=split, streaming=streaming)
    assert not isinstance(clips, DatasetDict)
    missing = [c for c in COLUMNS if c not in (clips.features or {})]
    if missing:
        raise ValueError(
            f"{dataset}, split {split}: columns {missing} are missing, found {sorted(clips.features or {})}"
        )
    return clips.cast_column("video", Video(decode=False))


def check_clips(clips: Dataset | IterableDataset, processor: VJEPA2ACProcessor, name: str) -> None:
    """Compare a data set's shapes with the processor's, before any expensive work; decodes one clip.

    Raises:
        ValueError: another number of steps or columns, no clips, or frames smaller than the model's.
    """
    steps = processor.frames_per_clip // processor.tubelet_size
    assert clips.features is not None
    for column, expected in (("actions", (steps - 1, len(ACTION_COLUMNS))), ("states", (steps, 2))):
        found = tuple(getattr(clips.features[column], "shape", ()))
        if found != expected:
            raise ValueError(
                f"{name}: column {column!r} has shape {found}, but clips of {processor.frames_per_clip} frames in "
                f"tubelets of {processor.tubelet_size} need {expected}"
            )
    first = next(iter(clips), None)
    if first is None:
        raise ValueError(f"{name}: holds no clips")
    frames = decode_clip(first["video"], f"{name}, {clip_name(first)}", processor.frames_per_clip)
    if min(frames.shape[-2:]) < processor.resolution:
        raise ValueError(
            f"{name}: clips are {frames.shape[-1]} x {frames.shape[-2]} pixels, smaller than the model's "
            f"{processor.resolution}; build the data set with --resolution {processor.resolution}"
        )


def clip_name(row: dict[str, Any]) -> str:
    """What messages call a clip: its recording and first tick."""
    return f"recording {row['recording_id']}, tick {row['start_tick']}"


def decode_clip(video: dict[str, Any], name: str, num_frames: int) -> Tensor:
    """Frames of an encoded clip, uint8 `(num_frames, 3, Y, X)`.

    Args:
        video: `{"bytes": ..., "path": ...}`, what `datasets.Video(decode=False)` gives.
        name: what messages call the clip.
        num_frames: how many frames it must have.

    Raises:
        ValueError: a video that cannot be decoded, or of another length.
    """
    from torchcodec.decoders import VideoDecoder  # loads FFmpeg's shared libraries

    source = video["bytes"] if video["bytes"] is not None else video["path"]
    try:
        frames = VideoDecoder(source, num_ffmpeg_threads=1)[:]
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{name}: the video cannot be decoded: {error}") from error
    if len(frames) != num_frames:
        raise ValueError(f"{name}: the processor's frames_per_clip is {num_frames}, the video has {len(frames)} frames")
    return frames


class ClipCollator:
    """Rows of a built data set -> a batch: `pixel_values_videos` (or cached `features`), `actions`, `states`, `clips`.

    `clips` names the batch's clips as "recording_id@start_tick", for messages.
    """

    def __init__(self, processor: VJEPA2ACProcessor):
        self.processor = processor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "actions": self.processor.normalize_actions(torch.tensor([r["actions"] for r in rows])),
            "states": self.processor.normalize_states(torch.tensor([r["states"] for r in rows])),
            "clips": [f"{r['recording_id']}@{r['start_tick']}" for r in rows],
        }
        if "features" in rows[0]:
            batch["features"] = torch.stack([r["features"] for r in rows])
        else:
            frames = self.processor.prepare_frames(
                [decode_clip(r["video"], clip_name(r), self.processor.frames_per_clip) for r in rows]
            )
            batch["pixel_values_videos"] = self.processor.normalize_pixels(frames)
        return batch


def load_action_statistics(dataset: str, source: str = "auto") -> ActionStatistics:
    """Statistics of the training split.

    Args:
        dataset: folder or Hub repository of a built data set.
        source: "auto" reads the data set's `action_stats.json`, "compute" reads the training split's actions, any
            other value is a file.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: the file holds something else.
    """
    if source == "compute":
        statistics = ActionStatistics()
        actions = load_dataset(dataset, split="train", streaming=True, columns=["actions"])
        for batch in actions.with_format("numpy").iter(batch_size=1024):
            statistics.update(batch["actions"])
        return statistics
    if source != "auto":
        path = Path(source)
    elif Path(dataset).is_dir():
        path = Path(dataset) / "action_stats.json"
    else:
        path = Path(hf_hub_download(dataset, "action_stats.json", repo_type="dataset"))
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: action statistics are missing; build the data set with dataset_scripts/build_vpt_tubelets.py, or "
            "pass --action_stats compute"
        )
    try:
        return ActionStatistics.from_dict(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class EndlessBatches(torch.utils.data.Sampler[list[int]]):
    """Indices of a process's batches, for ever: every epoch a new permutation, epochs joined without a gap.

    Batch m of rank r takes positions `(m * world_size + r) * batch_size ...` of the joined permutations, so what is
    seen in which step depends on the product of batch size and processes alone, and a run continues anywhere.
    """

    def __init__(
        self, size: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1, first_batch: int = 0
    ):
        if size < 1:
            raise ValueError("the data set holds no clips")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size, self.first_batch = rank, world_size, first_batch
        self._permutations: dict[int, list[int]] = {}

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, self.size)
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            self._permutations[epoch] = torch.randperm(self.size, generator=generator).tolist()
        return self._permutations[epoch][offset]

    def __iter__(self) -> Iterator[list[int]]:
        batch = self.first_batch
        while True:
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield [self._index(position) for position in range(start, start + self.batch_size)]
            batch += 1


class EndlessStream(torch.utils.data.IterableDataset):
    """A streamed data set for ever, shuffled anew every epoch, this process's share only.

    A continued run skips what it has consumed by reading past it: exact with at most one worker; with more workers
    nothing is lost or seen twice, but batches of different workers may come in another order.
    """

    def __init__(
        self,
        clips: IterableDataset,
        batch_size: int,
        *,
        seed: int,
        buffer_size: int,
        rank: int = 0,
        world_size: int = 1,
        first_batch: int = 0,
    ):
        shuffled = clips.shuffle(seed=seed, buffer_size=buffer_size)
        self.clips = split_dataset_by_node(shuffled, rank=rank, world_size=world_size)
        self.batch_size, self.first_batch = batch_size, first_batch

    def _rows(self) -> Iterator[dict[str, Any]]:
        epoch = 0
        while True:
            self.clips.set_epoch(epoch)
            count = 0
            for row in self.clips:
                count += 1
                yield row
            if count == 0:
                return  # more workers than shards: this one has nothing to read
            epoch += 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        batches_done = len(range(index, self.first_batch, workers))
        return islice(self._rows(), batches_done * self.batch_size, None)
