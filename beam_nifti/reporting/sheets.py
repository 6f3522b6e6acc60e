"""What workers saw of the records, in files of some rows each, so that nobody holds all of it."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from beam_nifti.reporting.appearance import SCHEMA
from beam_nifti.storage import paths as storage
from beam_nifti.support.strict_json import dump_json

_ROWS: Final = 256  # rows of a sheet, which take 5 MB


def write_sheets(folder: str, shard: int, split: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the rows of a shard's records, some at a time."""
    schema, left = SCHEMA.with_metadata({"split": split}), iter(rows)
    for number in itertools.count():
        if not (some := list(itertools.islice(left, _ROWS))):
            return
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(some, schema), sink, compression="zstd")
        storage.write(f"{folder}/{shard:06}-{number:06}.parquet", sink.getvalue(), storage.dirname(folder))


def read_sheets(folder: str, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
    """The split and the rows of each sheet, in the order of the dataset."""
    for name in storage.list_files(folder, "*.parquet"):
        table = pq.read_table(io.BytesIO(storage.read(f"{folder}/{name}")), columns=list(columns))
        yield table.schema.metadata[b"split"].decode(), table.replace_schema_metadata(None)


def write_problems(folder: str, shard: int, problems: Sequence[str]) -> None:
    """Write what is wrong with a shard, if anything is."""
    if problems:
        storage.write(f"{folder}/{shard:06}.json", dump_json(problems).encode(), storage.dirname(folder))


def read_problems(folder: str) -> list[str]:
    """What is wrong with all shards, in their order."""
    names = storage.list_files(folder, "*.json")
    return [problem for name in names for problem in json.loads(storage.read(f"{folder}/{name}"))]
