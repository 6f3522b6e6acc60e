"""Sheets: files of some rows each, in which workers describe records, so that no process holds all of them.

On a cluster, the folder of the sheets is shared, so they are checked before they are read.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from beam_nifti.errors import OutputError
from beam_nifti.reporting.appearance import SCHEMA
from beam_nifti.storage import paths as storage
from beam_nifti.support.json_types import require_type
from beam_nifti.support.parquet_headers import require_said_sizes, require_schema
from beam_nifti.support.strict_json import dump_json, load_json

_ROWS: Final = 256  # rows of a sheet, which take 5 MB
_MOST_BYTES: Final = 1 << 26  # bytes of a file, and of the values in a sheet
_DEEPEST: Final = 4  # levels of the schema: of a list the column, what repeats, and the value, below the root


def write_sheets(folder: str, shard: int, split: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the rows of a shard's records, some at a time."""
    schema, left = SCHEMA.with_metadata({"split": split}), iter(rows)
    for number in itertools.count():
        if not (some := list(itertools.islice(left, _ROWS))):
            return
        sink = io.BytesIO()
        table = pa.Table.from_pylist(some, schema)
        pq.write_table(table, sink, compression="zstd", use_dictionary=False)  # so that sizes bound memory
        storage.write(f"{folder}/{shard:06}-{number:06}.parquet", sink.getvalue(), storage.dirname(folder))


def read_sheets(folder: str, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
    """The split and the rows of each sheet, in the order of the dataset.

    Raises:
        OutputError: a file is not a sheet.
    """
    for name in storage.list_files(folder, "*.parquet"):
        path = f"{folder}/{name}"
        try:
            table = _parse(storage.read_bounded(path, _MOST_BYTES), columns)
            split = (table.schema.metadata or {})[b"split"].decode()
        except (storage.FileTooLargeError, pa.ArrowException, ValueError, KeyError, TypeError) as e:
            raise _foreign(path, e) from e
        yield split, table.replace_schema_metadata(None)


def _parse(data: bytes, columns: Sequence[str]) -> pa.Table:
    require_schema(io.BytesIO(data), _DEEPEST)
    file = pq.ParquetFile(io.BytesIO(data))
    groups = list(map(file.metadata.row_group, range(file.metadata.num_row_groups)))
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    for chunk in chunks:
        require_said_sizes(data, chunk)
    num_rows = sum(group.num_rows for group in groups)
    num_bytes = sum(max(chunk.total_uncompressed_size, 8 * chunk.num_values) for chunk in chunks)
    if num_rows > _ROWS or num_bytes > _MOST_BYTES:
        raise ValueError(f"has {num_rows:,} rows and {num_bytes:,} bytes, more than a sheet can have")
    if any(chunk.has_dictionary_page for chunk in chunks) or not file.schema_arrow.equals(SCHEMA):
        raise ValueError("has other columns than a sheet")
    return file.read(list(columns))


def _foreign(path: str, error: Exception) -> OutputError:
    return OutputError(f"{path}: not written by this report ({error}); run it again in a folder of its own")


def write_problems(folder: str, shard: int, problems: Sequence[str]) -> None:
    """Write what is wrong with a shard, if anything is."""
    if problems:
        storage.write(f"{folder}/{shard:06}.json", dump_json(problems).encode(), storage.dirname(folder))


def read_problems(folder: str) -> list[str]:
    """What is wrong with all shards, in their order.

    Raises:
        OutputError: a file is not a list of problems.
    """
    problems = list[str]()
    for name in storage.list_files(folder, "*.json"):
        path = f"{folder}/{name}"
        try:
            found = load_json(storage.read_bounded(path, _MOST_BYTES), is_modest=True)
            require_type(found, tuple[str, ...], "it")
        except (storage.FileTooLargeError, ValueError) as e:
            raise _foreign(path, e) from e
        problems += found
    return problems
