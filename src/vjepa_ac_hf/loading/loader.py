"""Batches for training: workers that decode, copies to the device ahead of time, exact resume.

(docs/data.md, "Training input")
"""

import hashlib
import logging
import multiprocessing
import re
import signal
from collections.abc import Iterable, Iterator
from itertools import count
from multiprocessing import forkserver, resource_tracker
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader

from ..processing_vjepa2_ac import VJEPA2ACProcessor
from .clips import ClipCollator
from .order import ClipOrder
from .quantization import restore_features
from .streaming import GroupReader, ParquetClips

logger = logging.getLogger(__name__)

START_METHODS = ("forkserver", "spawn", "fork")
# Imported once, in the server from which workers are forked, instead of by every worker.
_PRELOADED = ["vjepa_ac_hf.loading.loader", "torchcodec.decoders"]


class ClipLoader:
    """Endless training batches of one process, the same on every machine and with any number of workers.

    What batch m holds depends on the data set, the seed, the batch size, the number of processes and, for streams, the
    window (`ClipOrder`), and on nothing else. Epochs are joined without a gap: each clip comes once an epoch over all
    processes, no batch is short.

        loader = ClipLoader(clips, processor, 8, seed=0, num_workers=4, device="cuda")
        for batch in loader:
            output = model(**{k: v for k, v in batch.items() if k != "clips"})
            ...
            state = loader.state_dict()  # JSON; the same in all processes

    A batch holds `pixel_values_videos` (or cached `features`), `actions` and `states` on the device, as the processor
    makes them, and `clips`, the clips' names. An iterator goes on where the last one stopped; use one at a time.

    Args:
        clips: clips with random access (`load_clips`, `CachedClips`), or `ParquetClips`, a stream.
        processor: makes the tensors.
        batch_size: clips a batch of one process.
        seed: of the order.
        rank: this process.
        world_size: number of processes; all of them give the same arguments but for `rank`.
        window: clips among which a stream is mixed, about as many are held in memory, encoded; ignored for clips with
            random access.
        num_workers: processes that decode; 0: this one does.
        prefetch_factor: batches that each worker makes ahead.
        device: where batches go. On a CUDA device they are copied from pinned memory while the model computes, as
            bytes, and normalised there.
        frames: batches hold the uint8 `frames` too, beside pixels or cached features (`CachedClips(videos=True)`).
        start_method: of workers; "fork" copies a process whose threads (torch's, and those that read streams) do not
            survive, and can hang.

    Raises:
        ValueError: arguments out of range, or no clips.
        RuntimeError: on iteration: a worker died; found within seconds.
        ValueError, OSError: on iteration: a clip that cannot be decoded (names recording and tick) or read (names the
            file). No clip is ever replaced by another.
    """

    def __init__(
        self,
        clips: Any,
        processor: VJEPA2ACProcessor,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        window: int = 1000,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        device: torch.device | str = "cpu",
        frames: bool = False,
        start_method: str = "forkserver",
    ):
        workers = worker_options(num_workers, prefetch_factor, start_method)
        streamed = isinstance(clips, ParquetClips)
        self.clips, self.processor, self.device, self.frames = clips, processor, torch.device(device), frames
        self.order = ClipOrder(
            clips.group_sizes if streamed else len(clips),
            batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            window=window if streamed else None,
        )
        self._next_batch = 0
        self._identity: str | None = None
        on_device = self.device.type != "cpu"
        self._batches = _Batches(clips, self.order, batches_ahead=2 + num_workers * prefetch_factor)
        self._loader = DataLoader(
            _Rows() if streamed else clips,
            batch_sampler=self._batches,
            collate_fn=ClipCollator(processor, normalize_pixels=not on_device, frames=frames),
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # it draws a seed for workers, not to be taken from the model's generator
            **workers,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._batches.first_batch = self._next_batch
        try:
            for batch in copy_ahead(self._loader, self.device):
                if "frames" in batch and not {"features", "pixel_values_videos"} & batch.keys():
                    batch["pixel_values_videos"] = self.processor.normalize_pixels(batch["frames"])
                if not self.frames:
                    batch.pop("frames", None)
                if "features" in batch:  # on the CPU the collator has done it, and this changes nothing
                    batch["features"] = restore_features(batch["features"], batch.pop("feature_scales", None))
                self._next_batch += 1
                yield batch
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            if not (self._loader.num_workers and _tells_of_death(error)):
                raise
            raise RuntimeError(
                f"a loader worker died before batch {self._next_batch} was complete ({type(error).__name__}: {error}). "
                "Where nobody killed it, the machine ran out of memory, or a library crashed on a clip: num_workers=0 "
                "shows which"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, after the batch last handed out, and what its order depends on; JSON."""
        if self._identity is None:
            self._identity = clips_identity(self.clips)
        order = self.order
        return {
            "next_batch": self._next_batch,
            "clips": self._identity,
            "num_clips": order.num_clips,
            "seed": order.seed,
            "batch_size": order.batch_size,
            "world_size": order.world_size,
            "window": order.window,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue, from the next iterator on, after the batch where `state` was taken.

        Raises:
            ValueError: the state of another order; the fields that differ are named with both values.
        """
        own = self.state_dict()
        differing = sorted(k for k in own.keys() | state.keys() if k != "next_batch" and own.get(k) != state.get(k))
        if differing or "next_batch" not in state:
            details = "; ".join(f"{k}: {state.get(k)!r} in the state, {own.get(k)!r} here" for k in differing)
            raise ValueError(f"the loader's state is of another order of clips ({details or 'next_batch is missing'})")
        self._next_batch = state["next_batch"]


def worker_options(num_workers: int, prefetch_factor: int = 2, start_method: str = "forkserver") -> dict[str, Any]:
    """Arguments of a `DataLoader` whose workers start safely and live on between its iterators.

    Raises:
        ValueError: values out of range.
    """
    if start_method not in START_METHODS:
        raise ValueError(f"start_method must be one of {START_METHODS}, found {start_method!r}")
    if num_workers < 0 or prefetch_factor < 1:
        raise ValueError(
            f"num_workers must be at least 0 and prefetch_factor at least 1, found {num_workers} and {prefetch_factor}"
        )
    if num_workers == 0:
        return {"num_workers": 0}
    context = multiprocessing.get_context(start_method)
    if start_method == "forkserver":
        context.set_forkserver_preload(_PRELOADED)
        # Schedulers signal all processes of a job. Workers (which inherit the mask) leave that to the main process,
        # which stops with a checkpoint while they still bring its batches; they end with it.
        resource_tracker.ensure_running()  # started by the server, it would unblock them for what starts after it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})
        forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return {
        "num_workers": num_workers,
        "prefetch_factor": prefetch_factor,
        "persistent_workers": True,
        "multiprocessing_context": context,
    }


class _Rows(torch.utils.data.Dataset):
    """A stream's rows are read in the main process and sent to the workers as they are: encoded, they are small."""

    def __getitems__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return rows


class _Batches:
    """What the workers get, batch by batch: clip numbers, or rows of a stream."""

    def __init__(self, clips: Any, order: ClipOrder, batches_ahead: int):
        self.clips, self.order, self.batches_ahead = clips, order, batches_ahead
        self.first_batch = 0

    def __iter__(self) -> Iterator[list[Any]]:
        if isinstance(self.clips, ParquetClips):
            reader = GroupReader(self.clips, self.order, batches_ahead=self.batches_ahead)
            return reader.batches(self.first_batch)
        return (self.order.batch(batch)[1].tolist() for batch in count(self.first_batch))


def _tells_of_death(error: Exception) -> bool:
    """Whether a DataLoader's error comes of a dead worker; its batches under way are lost with its sockets."""
    if isinstance(error, RuntimeError):
        return re.search(r"DataLoader worker .*(exited unexpectedly|killed by signal)", str(error)) is not None
    return not str(error).startswith("Caught ")  # an error raised in a worker that lives


def copy_ahead(batches: Iterable[dict[str, Any]], device: torch.device) -> Iterator[dict[str, Any]]:
    """Batches on a device. On CUDA the next one is copied, on a stream of its own, while the last one is used.

    Args:
        batches: dicts whose tensors are moved, in pinned memory for CUDA; other values are kept.
        device: the CPU leaves batches as they are.
    """
    if device.type != "cuda":
        for batch in batches:
            yield _to(batch, device)
        return
    copies = torch.cuda.Stream(device)
    moved: tuple[dict[str, Any], torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            following = _to(batch, device), copies.record_event()
        if moved is not None:
            yield _hand_over(*moved, device)
        moved = following
    if moved is not None:
        yield _hand_over(*moved, device)


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _hand_over(batch: dict[str, Any], copied: torch.cuda.Event, device: torch.device) -> dict[str, Any]:
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for value in batch.values():
        if isinstance(value, Tensor):
            value.record_stream(current)  # its memory is not given to a later copy while the model reads it
    return batch


def clips_identity(clips: Any) -> str:
    """Names of all clips in their order, hashed; reads neither videos nor actions. Of a stream its own `identity`."""
    if isinstance(clips, ParquetClips):
        return clips.identity
    table = clips if isinstance(clips, Dataset) else clips.clips
    names = hashlib.sha256()
    for part in table.select_columns(["recording_id", "start_tick"]).with_format("arrow").iter(batch_size=65536):
        recordings, ticks = part["recording_id"].to_pylist(), part["start_tick"].to_pylist()
        names.update("".join(f"{r}@{t}\n" for r, t in zip(recordings, ticks, strict=True)).encode())
    return names.hexdigest()
