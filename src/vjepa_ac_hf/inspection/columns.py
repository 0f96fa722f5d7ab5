"""Single columns and single rows of a built data set, without the videos in between (docs/data.md, "Columns").

Parquet is read directly, from a folder or the Hub, a piece at a time: `load_dataset` would first copy or download all
of it, which for terabytes is out of the question when only actions are wanted.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import load_dataset_builder
from datasets.utils.file_utils import xopen
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..actions_vjepa2_ac import ACTION_COLUMNS
from ..recordings.names import missing_columns

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, order=True)
class RowPlace:
    """Where a row lies: its split, Parquet file and number in that file."""

    split: str
    file: str
    row: int


class ClipFiles:
    """The Parquet files of a built data set, by split.

    Args:
        dataset: folder or Hub repository.
        splits: those wanted; None: all there are.

    Attributes:
        name: the data set, for messages.
        files: paths or URLs of each split, in order.

    Raises:
        FileNotFoundError: no such folder or repository, or no data in it.
        ValueError: an unknown split, or files that are not Parquet.
    """

    def __init__(self, dataset: str, splits: Sequence[str] | None = None) -> None:
        self.name = dataset
        # For names alone: nothing is read or downloaded but the card.
        found = {str(split): list(map(str, files)) for split, files in _data_files(dataset).items()}
        unknown = [split for split in splits or () if split not in found]
        if unknown:
            raise ValueError(f"{dataset}: no split {unknown[0]!r}, found {list(found)}")
        self.files = {split: files for split, files in found.items() if splits is None or split in splits}
        for file in (file for files in self.files.values() for file in files):
            if not file.endswith(".parquet"):
                raise ValueError(
                    f"{dataset}: expected the Parquet files that dataset_scripts/build_vpt_tubelets.py writes, "
                    f"found {file}"
                )

    def num_bytes(self, split: str) -> int:
        """Size of a split's files together."""
        total = 0
        for name in self.files[split]:
            with xopen(name, "rb") as file:
                total += file.seek(0, 2)
        return total

    def iter_file(self, split: str, file: str, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Pieces of one file: number of the first row, and the columns of up to 1,024 rows.

        Raises:
            ValueError: missing columns, or a file that is no Parquet; the message has what was found.
        """
        with xopen(file, "rb") as content:
            parquet = self._open(content, split, file, columns)
            first = 0
            for batch in parquet.iter_batches(batch_size=_ROWS_AT_ONCE, columns=list(columns)):
                yield first, batch
                first += batch.num_rows

    def read_row(self, place: RowPlace, columns: Sequence[str]) -> dict[str, Any]:
        """One row as Python values; reads the group of rows that it is in.

        Raises:
            ValueError: missing columns, or a file that is no Parquet.
            IndexError: the file has fewer rows.
        """
        with xopen(place.file, "rb") as content:
            parquet = self._open(content, place.split, place.file, columns)
            first = 0
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                if place.row < first + rows:
                    table = parquet.read_row_group(group, columns=list(columns))
                    return table.slice(place.row - first, 1).to_pylist()[0]
                first += rows
        raise IndexError(f"{place.file}: no row {place.row}, found {first} rows")

    def _open(self, content: Any, split: str, file: str, columns: Sequence[str]) -> pq.ParquetFile:
        try:
            parquet = pq.ParquetFile(content)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file}: not a Parquet file, or a damaged one: {error}") from error
        found = parquet.schema_arrow.names
        missing = [column for column in columns if column not in found]
        if missing:
            raise missing_columns(f"{self.name}, split {split}: {file}", missing, found)
        return parquet

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file beside the data, such as `report.json`; None where there is none.

        Raises:
            ValueError: a file that is not a JSON object.
        """
        path = Path(self.name) / name
        if not Path(self.name).is_dir():
            try:
                path = Path(hf_hub_download(self.name, name, repo_type="dataset"))
            except EntryNotFoundError:
                return None
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
        return values


def _data_files(dataset: str) -> dict:
    files = load_dataset_builder(dataset).config.data_files
    if not files:
        raise FileNotFoundError(f"{dataset}: no data files found")
    return files


def action_array(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """The column `actions` of some rows as float32 `(rows, K, 38)`.

    Args:
        batch: rows as `ClipFiles.iter_file` gives them.
        name: what messages call them.

    Raises:
        ValueError: rows without actions, of another width than 38, or of different lengths.
    """
    column = batch.column("actions")
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    lengths, steps = _list_lengths(column, name), column.flatten()
    widths = _list_lengths(steps, name)
    if len(column) == 0:
        return np.zeros((0, 0, len(ACTION_COLUMNS)), dtype=np.float32)
    if widths != {len(ACTION_COLUMNS)} or len(lengths) != 1:
        raise ValueError(
            f"{name}: column 'actions': expected {len(ACTION_COLUMNS)} values an action and the same number of actions "
            f"in every clip, found {sorted(widths)} values and {sorted(lengths)} actions"
        )
    values = steps.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return values.reshape(len(column), lengths.pop(), len(ACTION_COLUMNS))


def _list_lengths(column: pa.Array, name: str) -> set[int]:
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or _is_fixed(column.type)):
        raise ValueError(f"{name}: column 'actions': expected lists of lists of numbers, found {column.type}")
    if column.null_count:
        raise ValueError(f"{name}: column 'actions' has {column.null_count} empty values of {len(column)}")
    return set(pc.unique(pc.list_value_length(column)).to_pylist())


def _is_fixed(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind)
