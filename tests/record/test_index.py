"""The index: what was put in comes out, in types that other tools read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_nifti.config import RecordConfig
from beam_nifti.errors import ShardError
from beam_nifti.record.index import (
    SCHEMA,
    IndexEntry,
    Limits,
    extra_column,
    make_table,
    parse_index,
    read_index,
    schema_of,
    write_index,
)
from beam_nifti.volume import load_volume, rescale_volume
from tests.images import AFFINE, row_of, write_image


@pytest.fixture
def entry(tmp_path: Path) -> IndexEntry:
    path = write_image(tmp_path / "a.nii.gz", slope=0.5, inter=0.1)
    row = row_of(path, label=0.25, participant_id="007", session_id="02", extras=("Zürich", "x"))
    return IndexEntry.of(rescale_volume(load_volume(row), RecordConfig()))


def test_an_entry_comes_back(tmp_path: Path, entry: IndexEntry) -> None:
    unlabelled = replace(entry, row=replace(entry.row, label=None, position=1, row=9))
    table = make_table(
        [(entry, 0, [60, 40]), (unlabelled, 100, [2**31, 2**31])], RecordConfig(), ["site", "min"]
    )
    write_index(str(tmp_path / "a" / "i.parquet"), table, {"sha256": "ab", "num_bytes": "7"})
    again, facts = read_index(str(tmp_path / "a" / "i.parquet"))
    assert facts == {"sha256": "ab", "num_bytes": "7"}
    first, second = again.to_pylist()
    assert first == {
        "example_id": "sub-01",
        "participant_id": "007",
        "session_id": "02",
        "label": 0.25,
        "position": 0,
        "offset": 0,
        "length": 100,
        "row": 1,
        "source": entry.row.path,
        "source_sizes": [file.size for file in entry.source.files[0]],
        "source_mtimes": [file.mtime for file in entry.source.files[0]],
        "source_versions": [None],
        "source_shape": [6, 5, 4],
        "source_affine": AFFINE.ravel().tolist(),
        "shape": [6, 5, 4],
        "dtype": "int16",
        "zooms": [2.0, 2.0, 2.5],
        "affine": AFFINE.ravel().tolist(),
        "min": entry.intensities[0].min,
        "max": entry.intensities[0].max,
        "mean": entry.intensities[0].mean,
        "std": entry.intensities[0].std,
        "member_lengths": [60, 40],
        "site": "Zürich",
        "manifest_min": "x",
    }
    assert (second["label"], second["length"], second["row"]) == (None, 2**32, 9)


def test_an_index_without_records_has_all_columns(tmp_path: Path) -> None:
    write_index(str(tmp_path / "i.parquet"), make_table([], RecordConfig(), ["site"]), {})
    table, facts = read_index(str(tmp_path / "i.parquet"))
    assert facts == {}
    assert table.schema.equals(schema_of(RecordConfig(), ["site"]))
    assert table.num_rows == 0
    record = RecordConfig("zscore", mask_dtype="uint8", frames="each")
    assert make_table([], record, ["site"]).column_names[-6:] == [
        "rescale_low",
        "rescale_high",
        "mask_labels",
        "mask_positions",
        "frame",
        "site",
    ]


def test_pandas_reads_it(tmp_path: Path, entry: IndexEntry) -> None:
    pytest.importorskip("pandas")
    write_index(
        str(tmp_path / "i.parquet"), make_table([(entry, 0, [1])], RecordConfig(), ["a", "b"]), {"x": "y"}
    )
    frame = pq.read_table(tmp_path / "i.parquet").to_pandas()
    assert frame.loc[0, "participant_id"] == "007"
    assert frame.loc[0, "max"] == entry.intensities[0].max


def test_further_columns_never_share_a_name() -> None:
    names = [*SCHEMA.names, *(f"manifest_{n}" for n in SCHEMA.names), "site", "manifest_", ""]
    kept = [extra_column(n) for n in names]
    assert len(set(kept) | set(SCHEMA.names)) == len(kept) + len(SCHEMA.names)
    assert extra_column("site") == "site"


def test_equal_entries_give_equal_bytes(tmp_path: Path, entry: IndexEntry) -> None:
    for name in "ab":
        write_index(
            str(tmp_path / name), make_table([(entry, 0, [1])], RecordConfig(), ["s", "t"]), {"x": "y"}
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_is_no_index(tmp_path: Path, entry: IndexEntry) -> None:
    path = tmp_path / "i.parquet"
    with pytest.raises(FileNotFoundError):
        read_index(str(path))
    write_index(str(path), make_table([(entry, 0, [1])], RecordConfig(), ["s", "t"]), {})
    data = path.read_bytes()
    for size in [*range(0, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(ShardError, match=f"{path}: not an index"):
            read_index(str(path))


def flipped(data: bytes, start: int, stop: int) -> Iterator[bytes]:
    """The data with each bit of a range changed."""
    for bit in range(8 * start, 8 * stop):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def footer_of(data: bytes) -> tuple[int, int]:
    """Where the footer of a Parquet file begins and ends."""
    stop = len(data) - 8
    return stop - int.from_bytes(data[stop : stop + 4], "little"), stop


def test_no_change_of_a_footer_ends_the_process(tmp_path: Path) -> None:
    path, limits = str(tmp_path / "index.parquet"), Limits(1000, 1 << 20)
    write_index(path, pa.table({"member_lengths": [[1, 2]], "id": ["a"]}), {})
    data = Path(path).read_bytes()
    num_refused = 0
    for changed in flipped(data, *footer_of(data)):
        try:
            parse_index(changed, path, limits=limits)
        except ShardError:
            num_refused += 1
    assert num_refused


def test_a_changed_cell_is_noticed(tmp_path: Path) -> None:
    path, table = str(tmp_path / "index.parquet"), pa.table({"mean": [0.1, 0.2], "id": ["a", "b"]})
    write_index(path, table, {})
    data = Path(path).read_bytes()
    num_unnoticed = num_changed = 0
    for changed in flipped(data, 4, footer_of(data)[0]):
        num_changed += 1
        with contextlib.suppress(ShardError):
            num_unnoticed += not parse_index(changed, path, limits=Limits(1000, 1 << 20))[0].equals(table)
    assert num_unnoticed < num_changed / 100  # those of the bits that say that there is a checksum
