"""Reading a built data set's Parquet files where they lie, on disk or behind a URL, row group by row group."""

import hashlib
import logging
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Features
from tqdm.auto import tqdm

from ..recordings.names import missing_columns
from .order import ClipOrder

logger = logging.getLogger(__name__)

_READ_ERRORS = (OSError, pa.ArrowException)
_ROWS_AT_ONCE = 64  # of an iteration over `ClipRows`; their row groups are held together


class ParquetClips:
    """Clips of Parquet files, read where they lie.

    Opening reads the files' footers alone (some kB each), in threads. They are kept, compressed, so that a row group
    is later one request of exactly its bytes.

    Args:
        files: paths or URLs (`hf://datasets/...`) in the order of clip numbers.
        columns: columns to read; others cost nothing.
        threads: files opened at a time.

    Attributes:
        features: the data set's features, those of `columns`.
        group_sizes: clips of every row group, int64.
        identity: changes with the files' names (without folders), row groups and their sizes in bytes.

    Raises:
        ValueError: no files, a file that is no Parquet file or lacks a column; the message has its name.
    """

    def __init__(self, files: Sequence[str], columns: Sequence[str], *, threads: int = 16):
        if not files:
            raise ValueError("the data set has no Parquet file")
        self.files, self.columns = list(files), list(columns)
        sizes: list[int] = []
        self._places: list[tuple[int, int]] = []  # of every row group: its file and its number in the file
        self._footers: list[bytes] = []
        identity = hashlib.sha256()
        with ThreadPoolExecutor(threads) as pool:
            footers = pool.map(_read_footer, self.files)
            progress = tqdm(footers, desc="Parquet footers", total=len(self.files), disable=len(self.files) < 256)
            for index, footer in enumerate(progress):
                schema = footer.schema.to_arrow_schema()
                missing = [column for column in self.columns if column not in schema.names]
                if missing:
                    raise missing_columns(files[index], missing, schema.names)
                if index == 0:
                    self.features = Features({n: Features.from_arrow_schema(schema)[n] for n in self.columns})
                groups = [footer.row_group(g) for g in range(footer.num_row_groups)]
                sizes += [group.num_rows for group in groups]
                self._places += [(index, g) for g in range(len(groups))]
                content = [(group.num_rows, group.total_byte_size) for group in groups]
                identity.update(f"{PurePosixPath(files[index]).name}:{content}\n".encode())
                sink = pa.BufferOutputStream()
                footer.write_metadata_file(sink)
                self._footers.append(zlib.compress(sink.getvalue(), 1))
        self.group_sizes = np.array(sizes, dtype=np.int64)
        self.identity = identity.hexdigest()

    def __len__(self) -> int:
        return int(self.group_sizes.sum())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for group in range(len(self.group_sizes)):
            yield from self.read_group(group)

    @property
    def column_names(self) -> list[str]:
        return self.columns

    def select(self, rows: Sequence[int]) -> "ClipRows":
        """Some of the clips, by number, with random access: each is read from its file when it is asked for."""
        return ClipRows(self, rows, self.columns)

    def unique(self, column: str) -> list[Any]:
        """Distinct values of one column, from all files."""
        values: set[Any] = set()
        for file in self.files:
            with _open(file) as source:
                values.update(pq.ParquetFile(source).read([column])[column].unique().to_pylist())
        return sorted(values)

    def read_group(self, group: int, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Rows of a row group: video `{"bytes", "path"}`, actions and states as arrays; some of the columns, or all.

        Raises:
            OSError: the file cannot be read, or holds something else than when it was opened.
        """
        file, number = self._places[group]
        footer = pq.read_metadata(pa.BufferReader(zlib.decompress(self._footers[file])))
        try:
            with _open(self.files[file]) as source:
                # Pre-buffering joins the columns of a row group into one read.
                table = pq.ParquetFile(source, metadata=footer, pre_buffer=True).read_row_group(
                    number, self.columns if columns is None else list(columns)
                )
        except _READ_ERRORS as error:
            raise OSError(f"{self.files[file]}, row group {number}: cannot be read: {error}") from error
        return table_rows(table, self.features)


class ClipRows(torch.utils.data.Dataset):
    """Some of a data set's clips, with random access to the Parquet files where they lie, as `datasets.Dataset` has it.

    For what reads few clips, or all of them in order: a row costs the reading of its row group. Row groups of the last
    batch are kept for the next one; nothing is written to disk.

    Args:
        clips: the files.
        rows: numbers of clips.
        columns: what rows have.
        threads: row groups read at a time.
    """

    def __init__(
        self, clips: ParquetClips, rows: Sequence[int] | np.ndarray, columns: Sequence[str], *, threads: int = 16
    ):
        self.clips, self.column_names, self.threads = clips, list(columns), threads
        self.rows = np.asarray(rows, dtype=np.int64)
        self._first_clips = np.cumsum(clips.group_sizes) - clips.group_sizes
        self._groups: dict[int, list[dict[str, Any]]] = {}

    @property
    def features(self) -> Features:
        return Features({name: self.clips.features[name] for name in self.column_names})

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": {}}

    def __getitem__(self, index: Any) -> Any:
        """A row; with a slice or a list of indices, the columns of these rows."""
        if isinstance(index, int | np.integer):
            return self.__getitems__([int(index)])[0]
        indices = np.arange(len(self))[index].tolist()
        rows = self.__getitems__(indices)
        return {name: [row[name] for row in rows] for name in self.column_names}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Rows, as a `DataLoader` asks for a batch; each row group is read once."""
        numbers = self.rows[np.asarray(indices, dtype=np.int64)]
        groups = (np.searchsorted(self._first_clips, numbers, side="right") - 1).tolist()
        held = {group: self._groups[group] for group in groups if group in self._groups}
        missing = [group for group in dict.fromkeys(groups) if group not in held]
        with ThreadPoolExecutor(self.threads) as pool:
            read = pool.map(lambda group: self.clips.read_group(group, self.column_names), missing)
            held.update(zip(missing, read, strict=True))
        self._groups = held
        return [held[g][n - self._first_clips[g]] for g, n in zip(groups, numbers, strict=True)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield from self.__getitems__(range(start, min(start + _ROWS_AT_ONCE, len(self))))

    def select(self, indices: Sequence[int]) -> "ClipRows":
        return ClipRows(self.clips, self.rows[np.asarray(indices, dtype=np.int64)], self.column_names)

    def select_columns(self, columns: Sequence[str]) -> "ClipRows":
        return ClipRows(self.clips, self.rows, columns)


class GroupReader:
    """Rows of a process's batches, in order; row groups are read ahead in threads and dropped after their last row.

    Args:
        clips: the files.
        order: a windowed order over their row groups.
        batches_ahead: how many batches ahead of the one asked for row groups are fetched.
        threads: reads at a time.
    """

    def __init__(self, clips: ParquetClips, order: ClipOrder, *, batches_ahead: int, threads: int = 4):
        self.clips, self.order = clips, order
        self.batches_ahead = batches_ahead
        self.threads = threads
        self._first_clips = np.cumsum(clips.group_sizes) - clips.group_sizes

    def batches(self, first_batch: int) -> Iterator[list[dict[str, Any]]]:
        """Rows of batch `first_batch`, `first_batch + 1`, ... for ever."""
        groups: dict[tuple[int, int], Future[list[dict[str, Any]]]] = {}
        # Rows still to come of every row group, by epoch: a group of which none is left is dropped.
        left: dict[int, np.ndarray] = {}
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="row-groups")
        try:
            wanted = first_batch
            batch = first_batch
            while True:
                while wanted <= batch + self.batches_ahead:
                    for epoch, group, _ in self._places(wanted):
                        if (epoch, group) not in groups:
                            groups[epoch, group] = pool.submit(self.clips.read_group, group)
                    wanted += 1
                rows = []
                for epoch, group, number in self._places(batch):
                    if epoch not in left:
                        left = {e: counts for e, counts in left.items() if e == epoch - 1}
                        left[epoch] = self._count_left(epoch, first_batch)
                    read = groups[epoch, group].result()
                    row, read[number] = read[number], {}  # what has been handed out takes no memory
                    assert row, f"clip {number} of row group {group} was asked for twice in epoch {epoch}"
                    rows.append(row)
                    left[epoch][group] -= 1
                    if left[epoch][group] == 0:
                        del groups[epoch, group]
                yield rows
                batch += 1
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _places(self, batch: int) -> list[tuple[int, int, int]]:
        """Epoch, row group and row in it of a batch's clips."""
        epochs, clips = self.order.batch(batch)
        groups = np.searchsorted(self._first_clips, clips, side="right") - 1
        return list(zip(epochs.tolist(), groups.tolist(), (clips - self._first_clips[groups]).tolist(), strict=True))

    def _count_left(self, epoch: int, first_batch: int) -> np.ndarray:
        clips = self.order.rest_of_epoch(epoch, first_batch)
        groups = np.searchsorted(self._first_clips, clips, side="right") - 1
        return np.bincount(groups, minlength=len(self._first_clips))


def table_rows(table: pa.Table, features: Features) -> list[dict[str, Any]]:
    """Rows of a table; arrays as numpy arrays instead of nested lists, videos encoded."""
    columns: dict[str, Any] = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        shape = getattr(features[name], "shape", None)
        if shape is None:
            columns[name] = column.to_pylist()
            continue
        values = getattr(column, "storage", column)
        while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            values = values.flatten()
        columns[name] = values.to_numpy(zero_copy_only=False).reshape(len(column), *shape)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _open(file: str) -> Any:
    filesystem, path = fsspec.core.url_to_fs(file)
    if "file" in np.atleast_1d(filesystem.protocol):
        return pa.OSFile(path)
    # No read-ahead of fsspec's: pyarrow asks for whole row groups.
    return filesystem.open(path, "rb", cache_type="none")


def _read_footer(file: str) -> pq.FileMetaData:
    try:
        with _open(file) as source:
            return pq.read_metadata(source)
    except _READ_ERRORS as error:
        raise ValueError(f"{file}: not a Parquet file that can be read: {error}") from error
