"""Tables of strings: CSV, TSV, JSON lines and Parquet."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from beam_nifti import storage
from beam_nifti.errors import ManifestError, UsageError
from beam_nifti.strict_json import dump_json

MAX_PROBLEMS: Final = 20
"""Problems that are reported at once."""

_JSON_ROWS: Final = 1 << 13
"""Rows that are held as Python dictionaries, which take ten times the memory of Arrow columns."""

_DECODED_BYTES: Final = 1 << 20

_DELIMITERS: Final = (";", "\t", ",")
"""What stands between cells; the first one where spreadsheets write numbers with a comma."""

# Numbers stay as written: 7.0 and 1e3 keep their text.
_DECODER = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=str)


class Problems:
    """Collects what is wrong with a table; gives up at the limit.

    Args:
        path: of the table, for the error.
    """

    def __init__(self, path: str) -> None:
        self._path, self._found = path, list[str]()

    def add(self, problem: str) -> None:
        """Note one problem.

        Raises:
            ManifestError: it is one too many.
        """
        if len(self._found) == MAX_PROBLEMS:
            self._found.append("(and more)")
            self.stop()
        self._found.append(problem)

    def stop(self) -> None:
        """Go no further if there was any problem.

        Raises:
            ManifestError: with all of them.
        """
        if self._found:
            raise ManifestError(self._path, self._found)


def read_table(path: str) -> pa.Table:
    """Read a table, every cell as a string, an absent one as an empty string.

    Args:
        path: .csv, .tsv, .jsonl (or .ndjson) or .parquet; local or a URL.

    Raises:
        ManifestError: it is not there, or not a table; with row numbers where rows are to blame.
    """
    suffix = path.rpartition("/")[2].rpartition(".")[2].lower()
    if suffix not in _READERS:
        raise ManifestError(path, ["is no .csv, .tsv, .jsonl or .parquet file; rename or convert it"])
    try:
        with storage.open_read(path) as handle:
            table = _READERS[suffix](path, handle).combine_chunks()
    except FileNotFoundError as e:
        raise ManifestError(path, ["no such file"]) from e
    except UnicodeDecodeError as e:
        raise ManifestError(path, [f"not UTF-8 text ({e.reason}); save it as UTF-8"]) from e
    except (pa.ArrowException, UnicodeError, csv.Error) as e:
        raise ManifestError(path, [f"not a table: {e}"]) from e
    except TimeoutError:
        raise  # a store that keeps failing is no fault of the manifest
    except OSError as e:
        raise ManifestError(path, [f"cannot be read: {e.strerror or e}"]) from e
    repeated = {c for c in table.column_names if table.column_names.count(c) > 1}
    if repeated:
        raise ManifestError(path, [f"column {c!r} stands twice; rename one" for c in sorted(repeated)])
    return table


def write_table(path: str, table: pa.Table) -> None:
    """Write a table of strings, as `read_table` reads it.

    Args:
        path: .csv, .tsv, .jsonl (or .ndjson) or .parquet; local or a URL.
        table: of string columns.

    Raises:
        UsageError: another ending.
        OSError: it cannot be written.
    """
    suffix = path.rpartition("/")[2].rpartition(".")[2].lower()
    if suffix not in _READERS:
        raise UsageError(f"{path}: is no .csv, .tsv, .jsonl or .parquet file; choose one of these")
    with storage.create(path) as handle:
        if suffix == "parquet":
            pyarrow.parquet.write_table(table, handle)
        elif suffix in ("csv", "tsv"):
            handle.write(format_delimited(table, "," if suffix == "csv" else "\t").encode())
        else:
            for batch in table.to_batches(max_chunksize=_JSON_ROWS):
                lines = (dump_json(row, ensure_ascii=False) for row in batch.to_pylist())
                handle.write("".join(f"{line}\n" for line in lines).encode())


def format_delimited(table: pa.Table, delimiter: str) -> str:
    """The text of a .csv or .tsv file."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(table.column_names)
    writer.writerows(zip(*(column.to_pylist() for column in table.columns), strict=True))
    return text.getvalue()


def _read_delimited(path: str, handle: BinaryIO, delimiter: str) -> pa.Table:
    head = handle.readline().decode("utf-8-sig")
    names = next(csv.reader([head], delimiter=delimiter), [])
    if not names:
        raise ManifestError(path, ["not a table: the first line is empty; it must name the columns"])
    for other in _DELIMITERS:
        if len(names) == 1 and other in names[0]:
            remedy = "save it as .csv with commas, or as .tsv with tabs"
            raise ManifestError(path, [f"its first line has {other!r} and no {delimiter!r}; {remedy}"])
    ragged: list[str] = []

    def note(row: Any) -> str:  # must not raise: what it raises is dropped, and the row with it
        number = "a row" if row.number is None else f"row {row.number - 1}"
        ragged.append(f"{number}: {row.actual_columns} cells where the header names {len(names)}")
        return "skip" if len(ragged) <= MAX_PROBLEMS else "error"

    data = head.encode() + handle.read()
    _require_utf8(data)
    try:
        table = pyarrow.csv.read_csv(
            io.BytesIO(data),
            read_options=pyarrow.csv.ReadOptions(use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={name: pa.string() for name in names}, strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid:
        if not ragged:
            raise
    problems = Problems(path)
    for problem in ragged:
        problems.add(problem)
    problems.stop()
    if any(pc.any(pc.match_substring(column, "\n")).as_py() for column in table.columns):
        # Arrow takes a quote that is never closed for one long cell, and all rows in it are lost.
        text = io.TextIOWrapper(io.BytesIO(data), "utf-8", newline="")
        for _ in csv.reader(text, delimiter=delimiter, strict=True):
            pass
    return table


def _require_utf8(data: bytes) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(data), _DECODED_BYTES):
        decoder.decode(data[start : start + _DECODED_BYTES])
    decoder.decode(b"", final=True)


def _read_json_lines(path: str, handle: BinaryIO) -> pa.Table:
    problems, rows, tables = Problems(path), list[dict[str, str]](), list[pa.Table]()
    for number, line in enumerate((text for text in handle if text.strip()), start=1):
        try:
            cells = _DECODER.decode(line.decode().removeprefix("\ufeff"))
        except (ValueError, RecursionError) as e:
            problems.add(f"row {number}: not JSON: {e}")
            continue
        if not isinstance(cells, dict) or any(isinstance(v, dict | list) for v in cells.values()):
            problems.add(f"row {number}: not an object of plain values")
            continue
        rows.append({k: _text(v) for k, v in cells.items()})
        if len(rows) == _JSON_ROWS:
            tables.append(_as_table(rows))
            rows.clear()
    problems.stop()
    table = pa.concat_tables([*tables, _as_table(rows)], promote_options="default")
    return _as_strings(table)


def _text(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else dump_json(value)


def _as_table(rows: list[dict[str, str]]) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({n: pa.array([r.get(n, "") for r in rows], pa.string()) for n in names})


def _read_parquet(path: str, handle: BinaryIO) -> pa.Table:
    return _as_strings(pyarrow.parquet.read_table(handle, use_threads=False))


def _as_strings(table: pa.Table) -> pa.Table:
    columns = [pc.fill_null(pc.cast(column, pa.string()), "") for column in table.columns]
    return pa.table(columns, names=table.column_names)


_READERS: Final[dict[str, Callable[[str, BinaryIO], pa.Table]]] = {
    "csv": lambda path, handle: _read_delimited(path, handle, ","),
    "tsv": lambda path, handle: _read_delimited(path, handle, "\t"),
    "jsonl": _read_json_lines,
    "ndjson": _read_json_lines,
    "parquet": _read_parquet,
}
