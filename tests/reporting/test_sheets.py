"""Sheets, which are read from a folder that others may be able to write to."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_nifti.errors import OutputError
from beam_nifti.reporting.appearance import SCHEMA
from beam_nifti.reporting.sheets import read_problems, read_sheets, write_problems, write_sheets

ROW = dict.fromkeys(SCHEMA.names) | {"example_id": "sub-01", "labels": ["1", None], "grid": b"grid"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "report.html.tmp"


def test_rows_and_problems_come_back_in_the_order_of_the_shards(folder: Path) -> None:
    for shard, split in ((1, "val"), (0, "train")):
        write_sheets(str(folder), shard, split, [ROW] * 300)
        write_problems(str(folder), shard, [f"of {split}"])
    found = [(split, table.num_rows) for split, table in read_sheets(str(folder), ["example_id", "labels"])]
    assert found == [("train", 256), ("train", 44), ("val", 256), ("val", 44)]
    assert read_problems(str(folder)) == ["of train", "of val"]


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (pa.table({"a": [1]}), "other columns"),
        (pa.Table.from_pylist([ROW], SCHEMA), "split"),
        (pa.Table.from_pylist([ROW] * 300, SCHEMA), "300 rows"),
        (
            pa.Table.from_pylist([ROW | {"example_id": "a" * (70 << 20)}], SCHEMA),
            "more than a sheet can have",
        ),
    ],
)
def test_a_foreign_table_is_refused(folder: Path, table: pa.Table, reason: str) -> None:
    folder.mkdir()
    pq.write_table(table, folder / "000000-000000.parquet", use_dictionary=False, compression="zstd")
    with pytest.raises(OutputError, match=reason):
        list(read_sheets(str(folder), ["example_id"]))


def test_a_text_that_is_stored_once_for_many_rows_is_refused(folder: Path) -> None:
    folder.mkdir()
    table = pa.Table.from_pylist([ROW | {"example_id": "a" * 1000}] * 200, SCHEMA)
    pq.write_table(table.replace_schema_metadata({"split": "train"}), folder / "000000-000000.parquet")
    with pytest.raises(OutputError, match="other columns"):
        list(read_sheets(str(folder), ["example_id"]))


@pytest.mark.parametrize(
    "content", [b"", b"no Parquet", b"\0" * ((64 << 20) + 1)], ids=["0", "text", "64 MB"]
)
def test_a_file_that_is_no_table_is_refused(folder: Path, content: bytes) -> None:
    folder.mkdir()
    (folder / "000000-000000.parquet").write_bytes(content)
    with pytest.raises(OutputError, match="not written by this report"):
        list(read_sheets(str(folder), ["example_id"]))


@pytest.mark.parametrize("content", ['{"a": 1}', "[1]", "[", '["\\ud800"]'])
def test_problems_that_are_no_list_of_texts_are_refused(folder: Path, content: str) -> None:
    folder.mkdir()
    (folder / "000000.json").write_text(content)
    with pytest.raises(OutputError, match="not written by this report"):
        read_problems(str(folder))
