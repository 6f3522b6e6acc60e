"""Checks of an index against the configuration of its records."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.config import RecordConfig
from beam_nifti.record.example import SCALING_FEATURES
from beam_nifti.record.index import OF_IMAGES, SOURCE_LISTS, record_name

_PLACES: Final = ("example_id", "position", "offset", "length", "member_lengths", "shape")
"""Columns by which a record is found and read."""


def check_table(
    table: pa.Table,
    columns: Collection[str],
    record: RecordConfig,
    *,
    is_sparse: bool = False,
    may_lack_masks: bool = False,
) -> Iterator[str]:
    """Find what makes an index unusable.

    Args:
        table: table whose columns have the types of `schema_of`.
        columns: names of the columns that it must have.
        record: configuration of the records.
        is_sparse: whether cells may be empty, except those that locate records, as in a dataset without a
            manifest.
        may_lack_masks: whether examples may lack files of their masks.
    """
    least = 0 if may_lack_masks or is_sparse else record.num_masks
    num_masks = range(least, record.num_masks + 1)
    try:
        table.validate(full=True)  # Parquet's text is not checked when it is read
    except pa.ArrowInvalid as e:
        yield f"cannot be read: {e}"
        return
    for name in columns:
        if name not in table.column_names:
            yield f"column {name} is missing"
    for name in table.column_names:
        may_lack = name not in _PLACES if is_sparse else name in ("label", *SCALING_FEATURES)
        yield from _check_column(table, name, record, num_masks, may_lack=may_lack)


def check_members(table: pa.Table) -> Iterator[str]:
    """Find records whose members do not make up their length, in an index that `check_table` accepts."""
    if table.num_rows and {"length", "member_lengths"} <= set(table.column_names):
        column = table["member_lengths"]
        counts = pc.list_value_length(column).to_numpy()
        lengths = pc.list_flatten(column).cast(pa.int64()).to_numpy()
        sums = np.add.reduceat(lengths, np.cumsum([0, *counts[:-1]]))
        wrong = np.flatnonzero(sums != table["length"].to_numpy())
        if wrong.size:
            at = int(wrong[0])
            name, length = record_name(at, table), table["length"][at]
            yield f"the members of {name} have {sums[at]} bytes, but it has {length}"


def _check_column(
    table: pa.Table, name: str, record: RecordConfig, num_masks: range, *, may_lack: bool
) -> Iterator[str]:
    column = table[name]
    if column.null_count and may_lack:
        table = table.filter(column.is_valid())
        column = table[name]
    if column.null_count:
        yield f"column {name} has {column.null_count} empty cells"
    elif pa.types.is_list(column.type):
        num_empty = pc.list_flatten(column).null_count
        if num_empty and name != "source_versions":
            yield f"column {name} has {num_empty} empty values"
        counts = pc.list_value_length(column).to_numpy()
        expected = _expected_counts(name, counts, record, num_masks)
        if name in SOURCE_LISTS and SOURCE_LISTS[0] in table.column_names:
            of_files = pc.list_value_length(table[SOURCE_LISTS[0]]).to_numpy()
            expected = _expected_counts(name, of_files, record, num_masks)
        wrong = np.flatnonzero(counts != expected)
        if wrong.size:
            at = int(wrong[0])
            number = f"{counts[at]} values, expected {expected[at]}"
            yield f"column {name} of {record_name(at, table)} has {number}"


def _expected_counts(
    name: str, counts: npt.NDArray[np.int64], record: RecordConfig, num_masks: range
) -> npt.NDArray[np.int64]:
    """How many values each cell of a column of lists must have: the allowed number nearest to the actual."""
    least, most = (record.num_files - record.num_masks + num_masks[i] for i in (0, -1))
    bounds = {
        **dict.fromkeys(SOURCE_LISTS, (least, 2 * most)),  # as each may be a pair
        **dict.fromkeys(OF_IMAGES, (record.num_channels,) * 2),
        "source_shape": (3, 5),
        "shape": (3, 4),
        "zooms": (3, 3),
        "affine": (16, 16),
        "source_affine": (16, 16),
        "member_lengths": (1, None),
    }
    low, high = bounds.get(name, (0, None))
    return counts.clip(low, high)
