"""The `vpt_tubelets` data-set builder: VPT recordings to clips of tubelets (docs/data.md, "The builder")."""

import logging
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from datasets.builder import Key
from datasets.data_files import DataFilesDict, get_data_patterns

from ..recordings.shards import Shard, list_shards, read_pairs
from ..recordings.splits import (
    SplitOptions,
    check_given_splits,
    split_facts,
    split_options_from,
    validation_recordings,
)
from .rows import BuildReport, clip_features, iter_clips, listing_report
from .selection import BuildOptions, Selection, options_from, select_recordings, selection_from

logger = logging.getLogger(__name__)

_IMPORTED_IN = os.getpid()


@dataclass
class VPTTubeletsConfig(datasets.BuilderConfig):
    """Options of `load_dataset("vpt_tubelets", ...)` (docs/data.md, "The builder").

    Args:
        native_fps: frames and log lines per second of the recordings.
        fps: frames per second of clips; `native_fps / fps` must be whole.
        frames_per_clip: frames in a clip, a multiple of `tubelet_size`.
        tubelet_size: frames in a tubelet.
        resolution: side of the frames in pixels, or (height, width), even.
        resize_mode: `crop` (scaled to cover that, then centre crop) or `squash` (whole frame).
        clip_stride: ticks between clip starts; None: no frame in two clips.
        split_by: `player` or `session`: no player (or session) is in both splits.
        validation_fraction: share of players (or sessions) for validation, by a stable hash; None: 0.05 where both
            splits then have recordings, else no validation split.
        validation_players: players for validation, by name, instead of a share.
        validation_sessions: sessions for validation, likewise.
        draw_cursor: paint the mouse cursor into frames with a GUI open.
        skip_repairs: repairs of the log (docs/data.md, "Repairs") that are not to be done.
        hotbar_injection: number keys that stand for changes of slot are pressed in the tick that caused them (`cause`),
            or in the one that shows them, as OpenAI's loader has it (`vpt`).
        exclude: recording ids to leave out.
        session_fraction: share of sessions to keep, by a stable hash.
        max_clips_per_session: clips of one session to keep at most.
        max_gui_fraction: leave out clips with a GUI open in a larger share of their ticks.
        min_action_fraction: leave out clips with any input in a smaller share of their actions' ticks.
        clip_fraction: share of clips to keep, by a stable hash.

    Raises:
        ValueError: options out of range or that do not fit together; the message has their values.
    """

    native_fps: float = 20
    fps: float = 5
    frames_per_clip: int = 16
    tubelet_size: int = 2
    resolution: int | Sequence[int] = 256
    resize_mode: str = "crop"
    clip_stride: int | None = None
    split_by: str = "player"
    validation_fraction: float | None = None
    validation_players: Sequence[str] | None = None
    validation_sessions: Sequence[str] | None = None
    draw_cursor: bool = False
    skip_repairs: Sequence[str] = ()
    hotbar_injection: str = "cause"
    exclude: Sequence[str] = ()
    session_fraction: float | None = None
    max_clips_per_session: int | None = None
    max_gui_fraction: float | None = None
    min_action_fraction: float | None = None
    clip_fraction: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = (self.build_options, self.selection, self.split_options)  # refuse what does not fit before any file is read

    @property
    def build_options(self) -> BuildOptions:
        return options_from(vars(self))

    @property
    def selection(self) -> Selection:
        return selection_from(vars(self))

    @property
    def split_options(self) -> SplitOptions:
        return split_options_from(vars(self))


class VPTTubelets(datasets.GeneratorBasedBuilder):
    """Builds clips from tar shards or folders of `<name>.mp4` + `<name>.jsonl`; split by player."""

    BUILDER_CONFIG_CLASS = VPTTubeletsConfig

    def __init__(self, *args, data_dir: str | None = None, data_files=None, **options) -> None:
        if data_dir is not None and isinstance(data_files, DataFilesDict):
            data_files = _all_files(data_dir, data_files)
        super().__init__(*args, data_dir=data_dir, data_files=data_files, **options)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=clip_features(self.config.build_options.clip))

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        if not self.config.data_files:
            raise ValueError(f"vpt_tubelets needs data_files or data_dir, found {self.config.data_files}")
        # Plain names: datasets' own print as NamedSplit('train').
        names = {str(split): list(map(str, files)) for split, files in self.config.data_files.items()}
        paths = dl_manager.download(self.config.data_files)
        download_config = dl_manager.download_config
        # Listed as one, so that a recording or player found in two splits is noticed.
        listed = list_shards(
            [name for files in names.values() for name in files],
            [str(path) for split in names for path in paths[split]],
            download_config=download_config,
        )
        report = listing_report(listed)
        listed, skipped = select_recordings(listed, self.config.selection)
        report.skip(skipped)
        if not any(shard.entries for shard in listed):
            raise ValueError(
                f"no recording (.mp4 with .jsonl) to build in {sum(map(len, names.values()))} files: "
                + report.summary()
                + '; give data_files="shards/*.tar" or data_dir= (without either, datasets takes the working folder)'
            )
        if len(names) == 1 and "train" in names:
            splits = self._split_by_name(listed)
        else:
            splits = self._given_splits(names, listed)
        # A stream is not prepared: whoever reads all shards of a split must notice that none of them gave a clip.
        needed = {split for split in splits if dl_manager.is_streaming and self._is_needed(split, splits)}
        return [
            datasets.SplitGenerator(
                name=split,
                gen_kwargs={
                    "shards": shards,
                    "download_config": download_config,
                    "split": split,
                    "must_give": len(shards) if split in needed else 0,
                },
            )
            for split, shards in splits.items()
        ]

    def _is_needed(self, split: str, splits: Collection[str]) -> bool:
        """Whether a split without clips is an error; else it is left out, with a warning."""
        return split == "train" or self.config.split_options.asks_for_validation or len(splits) == 1

    def _split_by_name(self, shards: list[Shard]) -> dict[str, list[Shard]]:
        options = self.config.split_options
        recordings = [entry.recording_id for shard in shards for entry in shard.entries]
        validation = validation_recordings(recordings, options)
        if validation:
            counts = {"train": len(recordings) - len(validation), "validation": len(validation)}
            facts = split_facts(options, {split: {"recordings": n} for split, n in counts.items()}, "recordings")
            if facts["warning"]:
                logger.warning("%s", facts["warning"])
        return split_shards(shards, validation)

    def _given_splits(self, names: dict[str, list[str]], shards: list[Shard]) -> dict[str, list[Shard]]:
        """Splits as the user named their files, which must not share a player (or session)."""
        options = self.config.split_options
        if options.asks_for_validation:
            raise ValueError(
                f"data_files names the splits {list(names)}: validation_fraction, validation_players and "
                "validation_sessions choose only where all files are given as one split"
            )
        split_of_file = {name: split for split, files in names.items() for name in files}
        splits: dict[str, list[Shard]] = {}
        for shard in shards:
            if shard.entries:
                splits.setdefault(split_of_file[shard.source], []).append(shard)
        placed = [
            (entry.recording_id, split) for split, own in splits.items() for shard in own for entry in shard.entries
        ]
        check_given_splits(placed, options.split_by)
        return splits

    def _download_and_prepare(self, dl_manager, verification_mode, **prepare_split_kwargs) -> None:
        super()._download_and_prepare(dl_manager, verification_mode, **prepare_split_kwargs)
        empty = [name for name, split in self.info.splits.items() if split.num_examples == 0]
        if not empty:
            return
        if len(empty) == len(self.info.splits) or any(self._is_needed(name, self.info.splits) for name in empty):
            raise _no_clip(empty[0])
        for name in empty:
            logger.warning("no clip could be built for the split %r: there is none", name)
            del self.info.splits[name]

    def _generate_shards(self, shards, **others) -> Iterator[str]:
        yield from (shard.source for shard in shards)

    def _generate_examples(self, shards, download_config, split, must_give) -> Iterator[tuple[Key, dict]]:
        if os.getpid() != _IMPORTED_IN:
            # A forked worker (num_proc=): OpenMP's threads do not survive fork, and resizing would wait for them for
            # ever. There is a process per share of the shards anyway.
            torch.set_num_threads(1)
        report = BuildReport()
        for shard_index, shard in enumerate(shards):
            pairs = read_pairs(shard, download_config=download_config)
            for row_index, row in enumerate(iter_clips(pairs, self.config.build_options, report)):
                yield Key(shard_index, row_index), row
        logger.log(logging.WARNING if report.rejected else logging.INFO, report.summary())
        if must_give == len(shards) and not report.clips:
            raise _no_clip(split)


def _no_clip(split: str) -> ValueError:
    return ValueError(
        f"no clip could be built for the split {split!r}: all of its recordings were rejected or left out by a "
        "selection option; the warnings above have the reasons"
    )


def _all_files(data_dir: str, found: DataFilesDict) -> DataFilesDict:
    """All files of a folder as one split, where `datasets` has chosen files and splits by the words in their names.

    Given a folder and no `data_files`, it looks for train, dev, val, test, eval and the like between dashes, dots,
    blanks, underscores and digits, and takes only files whose name (or folder's) has such a word, if any has
    (`datasets.data_files.get_data_patterns`). Players have names like these.
    """
    folder = Path(data_dir).expanduser().resolve().as_posix()
    everything = DataFilesDict.from_patterns({"train": ["**"]}, base_path=folder)
    if dict(found) == dict(everything):
        return found
    if dict(found) != dict(DataFilesDict.from_patterns(get_data_patterns(folder), base_path=folder)):
        return found  # what the user named in data_files
    logger.warning(
        "%s: names contain words that datasets takes for splits (%s); all %d files are used, and split as the options "
        'say. To choose files and splits yourself, pass data_files={"train": ..., "validation": ...}',
        *(data_dir, ", ".join(f"{split}: {len(files)} files" for split, files in found.items())),
        len(everything["train"]),
    )
    return everything


def split_shards(shards: list[Shard], validation: set[str]) -> dict[str, list[Shard]]:
    """Shards of each split, with the recordings of that split only; a split without recordings is not there."""
    splits: dict[str, list[Shard]] = {}
    for split in ("train", "validation"):
        for shard in shards:
            entries = [
                entry for entry in shard.entries if (entry.recording_id in validation) == (split == "validation")
            ]
            if entries:
                splits.setdefault(split, []).append(Shard(shard.name, shard.source, entries))
    return splits
