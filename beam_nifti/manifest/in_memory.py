"""Manifests in memory (DataFrames, Arrow tables and dicts) as Parquet files.

The launcher and the workers can then read them like files.
"""

from __future__ import annotations

import bisect
import io
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet

from beam_nifti.errors import UsageError
from beam_nifti.manifest.tables import Problems
from beam_nifti.storage import paths as storage
from beam_nifti.support.wording import one_line

NAME: Final = "in-memory-table.parquet"  # in the folder that relative paths refer to

_DEEPEST: Final = 64  # levels of a cell

_UNFIT: Final = (pa.ArrowException, ValueError, TypeError, OverflowError)
"""What Arrow raises for values that a column cannot hold."""


def parquet_of(rows: Any, *, hides_cells: bool = False) -> bytes:
    """A table as a Parquet file.

    It is a pandas DataFrame, whose index becomes a column if it has a name; a table of Arrow, or one that
    exports to Arrow; or an iterable of dicts, one per row, in which a missing key, None and NaN are empty
    cells.

    Raises:
        ManifestError: with every cell that no column can hold, up to 20.
        UsageError: it is none of these.
    """
    problems = Problems(storage.absolute(NAME), hides_cells=hides_cells)
    if type(rows).__module__.partition(".")[0] == "pandas" and hasattr(rows, "columns"):
        table = _of_columns(_pandas_columns(rows), problems)
    elif hasattr(rows, "__arrow_c_stream__") or hasattr(rows, "__arrow_c_array__"):
        try:
            table = pa.table(rows)
        except _UNFIT as e:  # such as a single column
            raise _no_table(rows) from e
    elif isinstance(rows, Iterable) and not isinstance(rows, str | bytes | Mapping):
        table = _of_columns(_dict_columns(rows, problems), problems)
    else:
        raise _no_table(rows)
    for name in sorted({name for name in table.column_names if table.column_names.count(name) > 1}):
        problems.add(f"column {name!r} occurs twice; rename one")
    if not table.num_columns:
        problems.add("no rows; give at least one")
    problems.stop()
    sink = io.BytesIO()
    try:
        pyarrow.parquet.write_table(table, sink)
    except _UNFIT as e:
        problems.add(f"cannot be a Parquet file: {problems.plain(e)}")
    problems.stop()
    return sink.getvalue()


def _no_table(rows: Any) -> UsageError:
    return UsageError(
        f"the manifest is of type {type(rows).__name__}; give a path, a pandas DataFrame, an Arrow table, or "
        "an iterable of dicts, one per row"
    )


def _pandas_columns(frame: Any) -> list[tuple[Any, Any]]:
    columns = [(name, frame.iloc[:, number]) for number, name in enumerate(frame.columns)]
    levels = [(name, frame.index.get_level_values(number)) for number, name in enumerate(frame.index.names)]
    return columns + [(name, level) for name, level in levels if name is not None]


def _dict_columns(rows: Iterable[Any], problems: Problems) -> list[tuple[Any, Any]]:
    kept = list[Mapping[Any, Any]]()
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Mapping):
            kept.append(row)
        else:
            problems.add(f"row {number}: of type {type(row).__name__}; give a dict")
    problems.stop()
    return [(name, [row.get(name) for row in kept]) for name in dict.fromkeys(n for row in kept for n in row)]


def _of_columns(columns: Sequence[tuple[Any, Any]], problems: Problems) -> pa.Table:
    arrays = list[pa.Array]()
    for name, values in columns:
        if not isinstance(name, str):
            problems.add(f"the name of column {name!r} is of type {type(name).__name__}; make it a text")
            continue
        is_of_objects = getattr(values, "dtype", None) in (None, object)
        deep = [row for row, value in enumerate(values, 1) if _is_deeper(value)] if is_of_objects else []
        if deep:
            problems.add(
                f"row {deep[0]}: {name} nests deeper than {_DEEPEST} levels, or holds itself; flatten it"
            )
            continue
        try:
            arrays.append(_array(list(map(_plain, values))) if is_of_objects else pa.array(values))
        except _UNFIT as e:
            misfit = _misfit(name, list(map(_plain, values)), problems)
            problems.add(misfit or f"column {name!r}: {problems.plain(e)}")
    problems.stop()
    return pa.table(arrays, names=[name for name, _ in columns])


def _is_deeper(value: Any, levels: int = _DEEPEST) -> bool:
    """Whether lists and dicts nest deeper, which ends the process in Arrow."""
    if not isinstance(value, list | tuple | dict):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in items)


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _array(values: Sequence[Any]) -> pa.Array:
    try:
        return pa.array(values, from_pandas=True)
    except _UNFIT:  # perhaps only for scalars of several numpy dtypes
        return pa.array([v.item() if hasattr(v, "dtype") and v.ndim == 0 else v for v in values])


def _misfit(name: str, values: Sequence[Any], problems: Problems) -> str:
    """Why some values cannot be a column; "" if no prefix of them explains it."""

    def is_unfit(count: int) -> bool:
        try:
            _array(values[:count])
        except _UNFIT:
            return True
        return False

    row = bisect.bisect_left(range(len(values) + 1), True, key=is_unfit)
    if row > len(values):
        return ""
    value = values[row - 1]
    shown = problems.plain(one_line(reprlib.repr(value)))
    cell = f"row {row}: {name} is {shown}, of type {type(value).__name__}"
    try:
        _array([value])
    except _UNFIT:
        return f"{cell}; give texts, numbers, dates or paths"
    first = next(i for i, other in enumerate(values, start=1) if not _array([other]).null_count)
    return f"{cell}, and in row {first} of type {type(values[first - 1]).__name__}; give a column one type"
