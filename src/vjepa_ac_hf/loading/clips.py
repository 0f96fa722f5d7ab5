"""Reading a built data set of clips: columns checked, videos decoded, batches made for the model."""

import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from datasets import Dataset, Video, load_dataset, load_dataset_builder
from datasets.data_files import DataFilesDict
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor

from ..actions_vjepa2_ac import ACTION_COLUMNS, ActionStatistics
from ..configuration_encoder_vjepa2_ac import show_resolution
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from ..recordings.names import missing_columns
from .quantization import restore_features
from .streaming import ClipRows, ParquetClips

logger = logging.getLogger(__name__)

COLUMNS = ("video", "actions", "states", "recording_id", "session_id", "player_id", "start_tick")
MAKE_VALIDATION = "build the data set again with --validation_players NAME ..., or with --validation_fraction SHARE"
_RATE_TOLERANCE = 0.01  # of mp4's time stamps


def load_clips(dataset: str, split: str, *, streaming: bool = False) -> Dataset | ParquetClips:
    """A split of a built data set (folder or Hub repository), videos left encoded.

    Args:
        dataset: folder or repository of a built data set.
        split: its name.
        streaming: read the Parquet files where they lie; otherwise those of this split are copied into the Arrow cache
            of `datasets` once, for random access. A warning says how much, from where and to where before it begins.

    Raises:
        ValueError: an unknown split, missing columns, or files that are not Parquet, with what was found.
    """
    splits = split_files(dataset)
    if split not in splits:
        mend = f": {MAKE_VALIDATION}" if split == "validation" else ""
        raise ValueError(f"{dataset}: no split {split!r}, found {list(splits)}{mend}")
    files = splits[split]
    others = [file for file in files if not file.endswith(".parquet")]
    if others:
        raise ValueError(f"{dataset}, split {split}: clips are read from .parquet files, found {others[0]}")
    if streaming:
        return ParquetClips([str(file) for file in files], COLUMNS)
    # `load_dataset` would copy all splits.
    builder = Parquet(data_files=DataFilesDict({split: files}), dataset_name=Path(dataset).name)
    if not os.path.exists(builder.cache_dir):
        size = sum(_size(file) for file in files)
        logger.warning(
            "%s, split %s: copying %.3g GB (%d files) from %s to %s, for random access; a stream (--streaming) copies "
            "nothing",
            *(dataset, split, size / 1e9, len(files), os.path.dirname(files[0]), builder.cache_dir),
        )
    builder.download_and_prepare()
    clips = builder.as_dataset(split)
    assert isinstance(clips, Dataset)
    missing = [c for c in COLUMNS if c not in (clips.features or {})]
    if missing:
        raise missing_columns(f"{dataset}, split {split}", missing, clips.features or {})
    return clips.cast_column("video", Video(decode=False))


def split_files(dataset: str) -> DataFilesDict:
    """Files of a data set (folder or Hub repository) by split."""
    with tempfile.TemporaryDirectory() as unused:  # the builder's lock: nothing comes into the cache of `datasets`
        return load_dataset_builder(dataset, cache_dir=unused).config.data_files or DataFilesDict()


def _size(file: str) -> int:
    filesystem, path = fsspec.core.url_to_fs(file)
    return filesystem.size(path) or 0


def check_players(dataset: str, splits: Mapping[str, Dataset | ParquetClips | ClipRows]) -> None:
    """Refuse splits that share a player, unless the data set was split by session on request (a warning then).

    Args:
        dataset: folder or Hub repository. How it was split is taken from its `report.json`; of a stream from the Hub
            the players are too, as reading a column of every file there would take long.
        splits: what is to be loaded from it.

    Raises:
        ValueError: players in two splits, with the first.
    """
    report = _read_report(dataset)
    if Path(dataset).is_dir() or not any(isinstance(clips, ParquetClips) for clips in splits.values()):
        players = {split: set(clips.unique("player_id")) for split, clips in splits.items()}
    elif "splits" in report:
        players = {split: set(report["splits"][split]["players"]) for split in splits}
    else:
        logger.warning("%s has no report.json: whether a player is in two splits is not known", dataset)
        return
    seen: dict[str, str] = {}
    both = [p for split, own in players.items() for p in sorted(own) if seen.setdefault(p, split) != split]
    if not both:
        return
    text = f"{dataset}: {len(both)} players are in more than one of the splits {list(splits)}, first {both[0]!r}"
    if report.get("split", {}).get("split_by") != "session":
        raise ValueError(
            f"{text}: what is learnt of a player's worlds and habits is then measured as if it were new; build the "
            "data set again, by player (the default), or with --split_by session if that is what you want"
        )
    logger.warning("%s; it was split by session on request: figures say little about players not seen", text)


def _read_report(dataset: str) -> dict[str, Any]:
    """`report.json` of a built data set; empty where there is none."""
    path = Path(dataset) / "report.json"
    if not Path(dataset).is_dir():
        try:
            path = Path(hf_hub_download(dataset, "report.json", repo_type="dataset"))
        except EntryNotFoundError:
            return {}
    return json.loads(path.read_text()) if path.is_file() else {}


def clip_geometry(dataset: str, resize_mode: str | None = None) -> dict[str, Any]:
    """How raw frames have become a data set's clips: what a processor over it must do with raw frames, too.

    Args:
        dataset: folder or Hub repository. Its `report.json` says how it was built; where there is none, `resize_mode`
            is taken, or crop with a warning.
        resize_mode: what the user says of it, or None.

    Returns:
        `resize_mode` and, where it is known, `native_fps`, as `VJEPA2ACProcessor` takes them.

    Raises:
        ValueError: the data set was built with another mode.
    """
    options = _read_report(dataset).get("options")
    if options is None:
        if resize_mode is None:
            logger.warning(
                "%s has no report.json with its options: its frames are taken to be cut from the centre; if it was "
                "built otherwise, give --resize_mode",
                dataset,
            )
        return {"resize_mode": resize_mode or "crop"}
    if resize_mode not in (None, options["resize_mode"]):
        raise ValueError(
            f"{dataset}: was built with resize_mode {options['resize_mode']!r} (report.json), --resize_mode is "
            f"{resize_mode!r}: leave it out"
        )
    return {"resize_mode": options["resize_mode"], "native_fps": options["clip"]["native_fps"]}


def check_geometry(dataset: str, processor: VJEPA2ACProcessor) -> None:
    """Refuse a data set whose clips were made of raw frames in another way than the processor makes its frames.

    Raises:
        ValueError: naming both values.
    """
    options = _read_report(dataset).get("options")
    if options is None:
        return
    if options["resize_mode"] != processor.resize_mode:
        raise ValueError(
            f"{dataset}: was built with resize_mode {options['resize_mode']!r} (report.json), the model's processor "
            f"has {processor.resize_mode!r}: take a data set that was built like the one it was trained on"
        )
    (height, width), (rows, columns) = (np.broadcast_to(r, 2) for r in (options["resolution"], processor.resolution))
    if height * columns != width * rows:
        raise ValueError(
            f"{dataset}: was built with clips of {width} x {height} pixels (report.json), the model's processor has "
            f"{columns} x {rows}: another shape"
        )


def check_clips(clips: Dataset | ParquetClips | ClipRows, processor: VJEPA2ACProcessor, name: str) -> None:
    """Compare a data set's shapes with the processor's, before any expensive work; decodes one clip.

    Raises:
        ValueError: another number of steps or columns, no clips, another frame rate, or frames smaller than the
            model's.
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
    first = _first(clips, name)
    frames = decode_clip(first["video"], f"{name}, {clip_name(first)}", processor.frames_per_clip, processor.fps)
    height, width = processor.frame_shape
    if frames.shape[-2] < height or frames.shape[-1] < width:
        wanted = show_resolution(processor.resolution)
        raise ValueError(
            f"{name}: clips are {frames.shape[-1]} x {frames.shape[-2]} pixels, smaller than the model's "
            f"{wanted if height == width else f'{width} x {height}'}; build the data set with --resolution {wanted}"
        )


def clip_frame_rate(clips: Dataset | ParquetClips | ClipRows, name: str) -> float:
    """Frames a second of a data set's clips, by its first one; an int where it is whole.

    Raises:
        ValueError: no clips, or a video that cannot be decoded.
    """
    first = _first(clips, name)
    rate = _open(first["video"], f"{name}, {clip_name(first)}").metadata.average_fps or 0.0
    return round(rate) if math.isclose(rate, round(rate), rel_tol=_RATE_TOLERANCE) else rate


def _first(clips: Dataset | ParquetClips | ClipRows, name: str) -> dict[str, Any]:
    first = next(iter(clips), None)
    if first is None:
        raise ValueError(f"{name}: holds no clips")
    return first


def clip_name(row: dict[str, Any]) -> str:
    """What messages call a clip: its recording and first tick."""
    return f"recording {row['recording_id']}, tick {row['start_tick']}"


def _open(video: dict[str, Any], name: str) -> Any:
    from torchcodec.decoders import VideoDecoder  # loads FFmpeg's shared libraries

    try:
        return VideoDecoder(video["bytes"] if video["bytes"] is not None else video["path"], num_ffmpeg_threads=1)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{name}: the video cannot be decoded: {error}") from error


def decode_clip(video: dict[str, Any], name: str, num_frames: int, fps: float | None = None) -> Tensor:
    """Frames of an encoded clip, uint8 `(num_frames, 3, Y, X)`.

    Args:
        video: `{"bytes": ..., "path": ...}`, what `datasets.Video(decode=False)` gives.
        name: what messages call the clip.
        num_frames: how many frames it must have.
        fps: how many a second; None: any.

    Raises:
        ValueError: a video that cannot be decoded, of another length or frame rate.
    """
    decoder = _open(video, name)
    try:
        frames = decoder[:]
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{name}: the video cannot be decoded: {error}") from error
    if len(frames) != num_frames:
        raise ValueError(f"{name}: the processor's frames_per_clip is {num_frames}, the video has {len(frames)} frames")
    found = decoder.metadata.average_fps or 0.0
    if fps is not None and not math.isclose(found, fps, rel_tol=_RATE_TOLERANCE):
        raise ValueError(
            f"{name}: the processor's fps is {fps:g}, the video has {found:g} frames a second: actions would last "
            "another time than the model was made for"
        )
    return frames


class ClipCollator:
    """Rows of a built data set -> a batch: `pixel_values_videos` (or cached `features`), `actions`, `states`, `clips`.

    `clips` names the batch's clips as "recording_id@start_tick", for messages.

    Args:
        processor: makes the tensors.
        normalize_pixels: False leaves frames as uint8 `frames` for `processor.normalize_pixels` on another device: a
            quarter of the bytes to hand over. Likewise cached features stay as they are stored, for `restore_features`.
        names: False leaves `clips` out: the batch then holds what `VJEPA2ACModel` takes and no more, as the `Trainer`
            of transformers needs it (docs/training.md).
        frames: also give the uint8 `frames` `(B, frames, 3, Y, X)`, beside cached features too (whose rows must then
            hold the video: `CachedClips(videos=True)`).
    """

    def __init__(
        self,
        processor: VJEPA2ACProcessor,
        *,
        normalize_pixels: bool = True,
        names: bool = True,
        frames: bool = False,
    ):
        self.processor, self.normalize_pixels, self.names, self.frames = processor, normalize_pixels, names, frames

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "actions": self.processor.normalize_actions(np.array([r["actions"] for r in rows])),
            "states": self.processor.normalize_states(np.array([r["states"] for r in rows])),
        }
        if self.names:
            batch["clips"] = [f"{r['recording_id']}@{r['start_tick']}" for r in rows]
        if "features" in rows[0]:
            names = [name for name in ("features", "feature_scales") if name in rows[0]]
            stored: dict[str, Any] = {name: torch.stack([r[name] for r in rows]) for name in names}
            batch |= {"features": restore_features(**stored)} if self.normalize_pixels else stored
            if not self.frames:
                return batch
        frames = self.processor.prepare_frames(
            [decode_clip(r["video"], clip_name(r), self.processor.frames_per_clip) for r in rows]
        )
        if self.normalize_pixels and "features" not in batch:
            batch["pixel_values_videos"] = self.processor.normalize_pixels(frames)
        if self.frames or not self.normalize_pixels:
            batch["frames"] = frames
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
