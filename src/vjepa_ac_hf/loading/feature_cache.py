"""Features of the frozen encoder, computed once and kept on disk, so that later epochs neither decode nor encode.

A cache is a folder a split: `key.json` (what the features depend on) and `features-00000.safetensors`, ... of
`CLIPS_PER_CHUNK` clips each, written under temporary names and renamed. A build that was interrupted continues; what
was made with another encoder, geometry or data set is refused. `files.json` has the stamps (`files_stamp`) of data sets
whose videos have been compared with the chunks. Sizes and errors: docs/model.md, "Feature cache".
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from ..records import write_json
from .cache_key import cache_key, differences, files_stamp, videos_digest
from .cached_clips import CLIPS_PER_CHUNK, CachedClips, chunk_path
from .clips import ClipCollator
from .loader import copy_ahead, worker_options
from .quantization import channels_per_scale, quantize_features, restore_features

logger = logging.getLogger(__name__)

CACHE_DTYPES = ("bfloat16", "int8", "float32")
_STAMPS_KEPT = 64
_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8"}


def bytes_per_clip(shape: tuple[int, int, int], dtype: str) -> int:
    """What the features `(T, N, D)` of a clip take on disk, with the scales of int8."""
    steps, tokens, width = shape
    sizes = {"float32": 4 * width, "bfloat16": 2 * width, "int8": width + 4 * (width // channels_per_scale(width))}
    return steps * tokens * sizes[dtype]


def cache_features(
    model: VJEPA2ACModel,
    clips: Dataset,
    processor: VJEPA2ACProcessor,
    folder: Path,
    accelerator: Accelerator,
    *,
    dtype: str = "bfloat16",
    batch_size: int = 8,
    num_workers: int = 0,
    prefetch_factor: int = 2,
    clips_per_chunk: int = CLIPS_PER_CHUNK,
    videos: bool = False,
    announce: Callable[[str], None] = logger.info,
    verify: bool = False,
    shared: bool = False,
) -> CachedClips:
    """Encode what is not in `folder` yet, every process its share of the chunks, and return the clips with features.

    Args:
        model: its encoder makes the features, under the accelerator's mixed precision.
        clips: clips with random access (`load_clips`).
        processor: makes the frames.
        folder: of this split; all processes must see the same one.
        accelerator: processes and device.
        dtype: of `CACHE_DTYPES`.
        batch_size: clips encoded at once. With that of training, kernels see the same shapes as in a run without cache.
        num_workers: processes that decode, per training process.
        prefetch_factor: batches that each of them makes ahead.
        clips_per_chunk: clips a file; a killed build loses at most what each process had of one.
        videos: leave the encoded videos in the clips, beside the features.
        announce: gets, on the main process, the size before anything is encoded, and size and error afterwards.
        verify: hash the videos of all chunks, even where sizes and times of the data set's files are known.
        shared: caches of several encoders, clips or precisions lie beside each other: a hash of the key follows the
            name of `folder`, unless `folder` itself holds the features.

    Raises:
        ValueError: the folder holds features of another encoder, geometry or data set, or damaged chunks; the differing
            fields are named with both values, the chunks by their files.
        OSError: the features do not fit on the disk, or another run builds the same cache.
        FloatingPointError: features that are not finite.
        RuntimeError: another process refused (its message says why).
    """
    if dtype not in CACHE_DTYPES:
        raise ValueError(f"dtype must be one of {CACHE_DTYPES}, found {dtype!r}")
    key = cache_key(model, processor, clips, dtype, accelerator.mixed_precision, clips_per_chunk)
    config = model.config
    steps = config.frames_per_clip // config.encoder_config.tubelet_size
    shape = (steps, config.num_tokens, config.feature_size)
    if shared:
        folder = broadcast_object_list(
            [_shared_folder(folder, key, announce) if accelerator.is_main_process else None]
        )[0]
    cache = _Cache(folder, clips, key, shape, accelerator)
    cache.claim_folder()
    stamp = files_stamp(clips)
    cache.check_chunks(verify or not cache.knows(stamp))
    # As the main process sees the folder: all must divide the same chunks.
    missing = broadcast_object_list([[n for n in range(len(cache.chunks)) if not cache.path(n).is_file()]])[0]
    if missing:
        with cache.locked():
            cache.check_space(missing, announce)
            cache.build(missing, model, processor, batch_size, worker_options(num_workers, prefetch_factor), announce)
    cache.check_complete()
    cache.remember(stamp if stamp == files_stamp(clips) else None)
    if accelerator.is_main_process:
        stored = sum(cache.path(n).stat().st_size for n in range(len(cache.chunks)))
        announce(
            f"{folder}: features of {len(clips):,} clips ({dtype}) take {stored:,} bytes ({stored / 2**30:,.2f} GiB)"
        )
    return CachedClips(clips, folder, clips_per_chunk, videos=videos)


def _shared_folder(folder: Path, key: dict[str, Any], announce: Callable[[str], None]) -> Path:
    """The folder beside `folder` for features of this key; says how those that are there differ, if it is new."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    own = folder.with_name(f"{folder.name}-{digest[:12]}")
    others = {}
    for path in [folder / "key.json", *folder.parent.glob(f"{folder.name}-*/key.json")]:
        if path.is_file():
            try:
                others[path.parent] = differences(json.loads(path.read_text()), key)
            except json.JSONDecodeError as damage:
                raise ValueError(f"{path}: {damage}; remove the folder") from damage
    if folder in others and not others[folder]:
        return folder  # made before folders had their key in their name
    if others and own not in others:
        nearest = min(others, key=lambda path: others[path].count("found "))
        announce(f"{own} is new: {nearest} holds features of something else ({others[nearest]})")
    return own


@dataclass
class _Cache:
    """One split's folder, as one process of a run sees it; the methods are called in their order."""

    folder: Path
    clips: Dataset
    key: dict[str, Any]
    shape: tuple[int, int, int]  # (T, N, D) of a clip
    accelerator: Accelerator

    def __post_init__(self) -> None:
        size, total = self.key["clips_per_chunk"], len(self.clips)
        self.chunks = [range(i, min(i + size, total)) for i in range(0, total, size)]  # clips of each

    def path(self, number: int) -> Path:
        return chunk_path(self.folder, number)

    def share(self, numbers: list[int]) -> list[int]:
        """Those of these chunks that are this process's work."""
        return numbers[self.accelerator.process_index :: self.accelerator.num_processes]

    def claim_folder(self) -> None:
        """Write the key into a new folder; refuse a folder with another one."""
        path = self.folder / "key.json"
        if self.accelerator.is_main_process and not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, self.key)
        self.accelerator.wait_for_everyone()
        error: Exception | None = None
        try:
            details = differences(json.loads(path.read_text()), self.key)
            if details:
                advice = "choose another --cache_features, or remove the folder"
                error = ValueError(f"{path}: these features are of something else ({details}); {advice}")
        except FileNotFoundError:
            error = FileNotFoundError(f"{path}: written by the main process, not seen by this one: share the folder")
        except json.JSONDecodeError as damage:
            error = ValueError(f"{path}: {damage}; remove the folder")
        self.agree(error)

    def knows(self, stamp: str | None) -> bool:
        """Whether the videos of these files have been compared with the chunks before."""
        path = self.folder / "files.json"
        return stamp is not None and path.is_file() and stamp in json.loads(path.read_text())

    def remember(self, stamp: str | None) -> None:
        """Note that every process has compared the videos of its files; of data sets copied anew the last few."""
        path = self.folder / "files.json"
        stamps = [s for s in gather_object([stamp]) if s is not None]
        if self.accelerator.is_main_process and stamps:
            known = json.loads(path.read_text()) if path.is_file() else []
            stamps = list(dict.fromkeys([*known, *stamps]))[-_STAMPS_KEPT:]
            if stamps != known:
                write_json(path, stamps)

    def check_chunks(self, verify: bool) -> None:
        """Chunks that are there must be whole and of this key, with `verify` of these videos too, which reads them all.

        Each process checks its share.
        """
        present = [n for n in self.share(list(range(len(self.chunks)))) if self.path(n).is_file()]
        quiet = not present or not self.accelerator.is_main_process
        errors = []
        for n in tqdm(present, desc=f"checking {self.folder.name}", unit="chunk", disable=quiet):
            try:
                found = _describe_file(self.path(n))
                videos = videos_digest(self.clips, self.chunks[n]) if verify else found.get("videos", "")
                details = differences(found, self.describe(self.chunks[n], videos))
            except (SafetensorError, OSError) as error:
                errors.append(f"{self.path(n)}: damaged ({error})")
                continue
            if details:
                errors.append(f"{self.path(n)}: of something else ({details})")
        shown = "\n".join(errors[:5]) + (f"\nand {len(errors) - 5} others" if len(errors) > 5 else "")
        message = f"{len(errors)} chunks cannot be used; remove them to have them computed again:\n{shown}"
        self.agree(ValueError(message) if errors else None)

    def describe(self, rows: range, videos: str) -> dict[str, str]:
        """Metadata of a chunk of videos with this digest; under `tensors` the types and shapes that it must have."""
        tensors = self.stored(torch.empty(0, *self.shape))
        types = {name: f"{_SAFETENSORS_DTYPES[t.dtype]} {[len(rows), *t.shape[1:]]}" for name, t in tensors.items()}
        return {
            "key": hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest(),
            "rows": f"{rows[0]}..{rows[-1]}",
            "videos": videos,
            "tensors": json.dumps(types, sort_keys=True),
        }

    def stored(self, features: Tensor) -> dict[str, Tensor]:
        """Features as they are stored, by the names that a batch has them under."""
        if self.key["dtype"] == "int8":
            return dict(zip(("features", "feature_scales"), quantize_features(features), strict=True))
        return {"features": features.to(getattr(torch, self.key["dtype"]))}

    def check_space(self, missing: list[int], announce: Callable[[str], None]) -> None:
        """Say what the features will take; on every process an error where that is more than the disk has."""
        error = None
        if self.accelerator.is_main_process:
            for leftover in self.folder.glob("features-*.tmp"):  # of a killed build: the lock says nobody writes them
                leftover.unlink()
            clips = sum(len(self.chunks[n]) for n in missing)
            size, dtype = bytes_per_clip(self.shape, self.key["dtype"]), self.key["dtype"]
            free = shutil.disk_usage(self.folder).free
            text = (
                f"{self.folder}: {clips:,} of {len(self.clips):,} clips are to be encoded: {size:,} bytes a clip "
                f"({dtype}), {clips * size:,} bytes ({clips * size / 2**30:,.2f} GiB); free: {free:,} bytes"
            )
            if clips * size > free:
                advice = "int8 takes about half of bfloat16, a quarter of float32 (--cache_dtype)"
                error = OSError(errno.ENOSPC, f"{text}. {advice}")
            else:
                announce(text)
        self.agree(error)

    def build(
        self,
        missing: list[int],
        model: VJEPA2ACModel,
        processor: VJEPA2ACProcessor,
        batch_size: int,
        workers: dict[str, Any],
        announce: Callable[[str], None],
    ) -> None:
        """Encode this process's share of these chunks and write each as soon as it is complete."""
        todo, started = {n: self.chunks[n] for n in self.share(missing)}, time.perf_counter()
        # Ranges, not lists: 2.25 million clips in little memory.
        indices = [rows[i : i + batch_size] for rows in todo.values() for i in range(0, len(rows), batch_size)]
        loader = torch.utils.data.DataLoader(
            self.clips,
            batch_sampler=indices,  # type: ignore[arg-type]
            collate_fn=ClipCollator(processor, normalize_pixels=False),
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator(),  # it draws a seed for workers, not to be taken from the model's generator
            **workers,
        )
        batches = copy_ahead(loader, self.accelerator.device)
        progress = tqdm(
            total=sum(len(rows) for rows in todo.values()),
            desc=f"features of {self.folder.name}",
            unit="clip",
            disable=not self.accelerator.is_main_process,
        )
        squares = torch.zeros(2, device=self.accelerator.device)  # of the errors of storage, and of the features
        for number, rows in todo.items():
            chunk: dict[str, Tensor] = {}
            for start in range(0, len(rows), batch_size):
                features = _encode(model, processor, next(batches), batch_size, self.accelerator)
                stored = self.stored(features)
                error = restore_features(*stored.values()) - features
                squares += torch.stack([error.square().mean(), features.square().mean()]) * len(features)
                for name, values in stored.items():
                    if name not in chunk:
                        chunk[name] = torch.empty(len(rows), *values.shape[1:], dtype=values.dtype)
                    chunk[name][start : start + len(values)] = values
                progress.update(len(features))
            _write_chunk(self.path(number), chunk, self.describe(rows, videos_digest(self.clips, rows)))
        progress.close()
        error, magnitude = self.accelerator.reduce(squares, reduction="sum").tolist()
        if self.accelerator.is_main_process:
            share = (error / magnitude) ** 0.5 if magnitude else 0.0
            seconds = time.perf_counter() - started
            announce(f"{self.folder}: encoded in {seconds:,.0f} s; relative error of storage (rms) {share:.5f}")

    def check_complete(self) -> None:
        """All chunks must be there, those of the other processes too."""
        absent = [self.path(n) for n in range(len(self.chunks)) if not self.path(n).is_file()]
        message = f"{len(absent)} chunks are missing, {absent[:1]} first: all processes must see the same folder"
        self.agree(FileNotFoundError(message) if absent else None)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One build of a cache at a time; a lock that the kernel drops with its process, held by the main one."""
        error, file = None, None
        if self.accelerator.is_main_process:
            file = (self.folder / ".lock").open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                text = f"{self.folder}: another run builds this cache; start again when it is done"
                error = OSError(errno.EWOULDBLOCK, text)
            except OSError as failure:  # some network file systems have no locks
                logger.warning("%s: cannot be locked (%s): start no second build of it", self.folder, failure)
        try:
            self.agree(error)
            yield
        finally:
            if file is not None:
                file.close()

    def agree(self, error: Exception | None) -> None:
        """Raise `error`, and on processes without one that there was one: none waits for another that gave up."""
        failed = torch.tensor([float(error is not None)], device=self.accelerator.device)
        failed = self.accelerator.reduce(failed, reduction="sum")
        if error is not None:
            raise error
        if failed.item():
            raise RuntimeError(f"{self.folder}: another process cannot use this cache; its message says why")


def _encode(
    model: VJEPA2ACModel, processor: VJEPA2ACProcessor, batch: dict[str, Any], batch_size: int, accelerator: Accelerator
) -> Tensor:
    """Features of a batch, float32 `(clips, T, N, D)`; a short batch is filled up, so that all have the same shape."""
    pixels = processor.normalize_pixels(batch["frames"])
    missing = batch_size - len(pixels)
    with accelerator.autocast():
        features = model.encode(torch.cat([pixels, pixels[-1:].expand(missing, *pixels.shape[1:])]))[: len(pixels)]
    finite = features.isfinite().flatten(1).all(dim=1).tolist()
    if not all(finite):
        bad = [name for name, fine in zip(batch["clips"], finite, strict=True) if not fine]
        raise FloatingPointError(f"the encoder's features are not finite. Clips: {', '.join(bad)}")
    return features.float()


def _write_chunk(path: Path, tensors: dict[str, Tensor], description: dict[str, str]) -> None:
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=description)
    with temporary.open("rb") as file:
        os.fsync(file)
    os.replace(temporary, path)


def _describe_file(path: Path) -> dict[str, str]:
    """What a chunk says of itself, as `_Cache.describe`; its header is checked, and the file's length."""
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        types = {name: f"{s.get_dtype()} {s.get_shape()}" for name, s in slices.items()}
        return {**(file.metadata() or {}), "tensors": json.dumps(types, sort_keys=True)}
