"""Tables of strings: CSV, TSV, JSON lines and Parquet.

Source: RFC 4180 for CSV; the IANA's text/tab-separated-values for TSV, which has no quoting.
"""

from __future__ import annotations

import base64
import codecs
import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import BinaryIO, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from beam_nifti.errors import ManifestError, UsageError
from beam_nifti.storage import paths as storage
from beam_nifti.storage.signatures import stand_in
from beam_nifti.support.outcomes import may_pass
from beam_nifti.support.parquet_headers import read_bounded, require_schema
from beam_nifti.support.strict_json import dump_json, require_modest, unique_keys

MAX_PROBLEMS: Final = 20  # problems to report at once
BATCH_ROWS: Final = 1 << 13  # rows that are Python objects at a time
_HIDDEN: Final = "(hidden by --anonymous-ids)"
_HEAD_BYTES: Final = 1 << 10  # of a file, by which it is told from a pointer to another one
_MAX_COLUMNS: Final = 1 << 16
_FREE_CELLS: Final = 1 << 24
_CELL_GROWTH: Final = 16  # JSON lines may have so many cells, and so many times those that they give
# The values of a Parquet file may take so many bytes of memory, and so many times those of the file.
_FREE_BYTES: Final = 64 << 20
_FILE_GROWTH: Final = 256
_DEEPEST: Final = 100  # levels of the schema of a Parquet file; more than some thousand end the process
_DELIMITERS: Final = (";", "\t", ",")  # ";" is used where spreadsheets write decimal commas

BLANKS: Final = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
    "\u200a\u2028\u2029\u202f\u205f\u3000"  # white space
    "\xad\u180e\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2061\u2062\u2063\u2064\u2066"
    "\u2067\u2068\u2069\ufeff"  # of no width
)
"""Invisible characters."""


class _Number(str):
    """A number of a JSON text, as it is written: 7.0 and 1e3 keep their text, and every digit."""


_DECODER = json.JSONDecoder(
    parse_float=_Number, parse_int=_Number, parse_constant=str, object_pairs_hook=unique_keys
)


class Problems:
    """Collects problems of a table, up to a limit, and warnings.

    With `hides_cells`, messages do not show cells, which may be names of persons. `options` are the flags
    that remedies may name; None for all.
    """

    def __init__(
        self, path: str, *, hides_cells: bool = False, options: Collection[str] | None = None
    ) -> None:
        self.path, self.hides_cells, self.options = path, hides_cells, options
        self._found, self.warnings = list[str](), list[str]()

    def shown(self, cell: object) -> str:
        """A cell, for a message."""
        return _HIDDEN if self.hides_cells else repr(cell)

    def plain(self, cell: object) -> str:
        """As `shown`, without quotes."""
        return _HIDDEN if self.hides_cells else str(cell)

    def offer(self, flag: str, remedy: str, instead: str) -> str:
        """A remedy that uses a flag, or another one if the command does not have the flag."""
        return remedy if self.options is None or flag in self.options else instead

    def warn(self, warning: str) -> None:
        """Note something suspicious that does not make the table unusable."""
        self.warnings.append(warning)

    def add(self, problem: str) -> None:
        """Note a problem; a ManifestError at the limit."""
        if len(self._found) == MAX_PROBLEMS:
            self._found.append("(and more)")
            self.stop()
        self._found.append(problem)

    def stop(self) -> None:
        """Raise a ManifestError if there was any problem."""
        if self._found:
            raise ManifestError(self.path, self._found)


def read_table(
    path: str, plain: Collection[str] = (), problems: Problems | None = None, content: bytes | None = None
) -> pa.Table:
    """Read a table as strings; an absent cell is an empty string.

    White space and invisible characters are removed from the ends of cells and column names. Columns without
    a name are dropped if they are empty, and so are empty rows of a CSV or TSV. A list or an object becomes
    its JSON text; a column of bytes that are not all text becomes base64.

    Args:
        path: .csv, .tsv, .jsonl (or .ndjson) or .parquet; local or a URL.
        plain: columns in which lists, objects and bytes are problems.
        problems: collects problems and warnings.
        content: content of the file, if it was already read.

    Raises:
        ManifestError: it is absent, or not a table; with row numbers where possible.
    """
    suffix = path.rpartition("/")[2].rpartition(".")[2].lower()
    problems = problems or Problems(path)
    try:
        if suffix not in _READERS:
            if not storage.exists(path):
                raise FileNotFoundError
            raise ManifestError(path, ["is not a .csv, .tsv, .jsonl or .parquet file; rename or convert it"])
        with storage.open_read(path) if content is None else io.BytesIO(content) as handle:
            if what := stand_in(handle.read(_HEAD_BYTES)):
                raise ManifestError(path, [f"not a table but {what}"])
            handle.seek(0)
            table = _READERS[suffix](path, handle, plain, problems).combine_chunks()
        problems.stop()
        return _cleaned(table, problems)
    except FileNotFoundError as e:
        raise ManifestError(path, [storage.broken_link(path) or "no such file"]) from e
    except UnicodeDecodeError as e:
        raise ManifestError(path, [f"not UTF-8 text ({e.reason}); save it as UTF-8"]) from e
    except (pa.ArrowException, UnicodeError) as e:
        raise ManifestError(path, [f"not a table: {e}"]) from e
    except OSError as e:
        if may_pass(e):
            raise  # a store that keeps failing is no fault of the manifest
        raise ManifestError(path, [f"cannot be read: {e.strerror or e}"]) from e


def _cleaned(table: pa.Table, problems: Problems) -> pa.Table:
    """The table without invisible characters at the ends of cells and names, and without empty columns."""
    names = [name.strip(BLANKS) for name in table.column_names]
    for name, bare in zip(table.column_names, names, strict=True):
        if bare and name != bare:
            problems.warn(f"the name of column {name!r} was read without the white space at its ends")
    columns, count, first = dict[int, pa.ChunkedArray](), 0, ""
    for number, (name, column) in enumerate(zip(names, table.columns, strict=True)):
        bare = pc.utf8_trim(column, BLANKS)
        changed = pc.not_equal(bare, column)
        if num_changed := pc.sum(changed).as_py():
            count += num_changed
            first = first or f"{name!r} of row {pc.index(changed, True).as_py() + 1}"
        if name:
            columns[number] = bare
            continue
        filled = pc.index(pc.not_equal(bare, ""), True).as_py()
        if filled >= 0:
            problems.add(
                f"column {number + 1} has no name, but a cell in row {filled + 1}; name it, or remove it"
                + ("" if number else " (pandas leaves out its index with to_csv(..., index=False))")
            )
    if count:
        cells = "1 cell was" if count == 1 else f"{count:,} cells were"
        problems.warn(f"{cells} read without the white space at the ends, such as {first}")
    kept = [names[number] for number in columns]
    for name in sorted(name for name, count in Counter(kept).items() if count > 1):
        problems.add(f"column {name!r} occurs twice; rename one")
    problems.stop()
    return pa.table(list(columns.values()), names=kept)


def strings(column: pa.Array | pa.ChunkedArray) -> Iterator[str]:
    """The texts of a column, as Python objects in batches, because they take ten times the memory."""
    for start in range(0, len(column), BATCH_ROWS):
        yield from column.slice(start, BATCH_ROWS).to_pylist()


def write_table(path: str, table: pa.Table) -> None:
    """Write a table of strings in the format of the path's ending; `read_table` returns the same table.

    Raises:
        UsageError: the ending is unknown, or the format cannot hold a cell.
    """
    suffix = path.rpartition("/")[2].rpartition(".")[2].lower()
    if suffix not in _READERS:
        raise UsageError(f"{path}: is not a .csv, .tsv, .jsonl or .parquet file; use one of these endings")
    delimited = ""
    if suffix in ("csv", "tsv"):
        delimited = format_delimited(table, "," if suffix == "csv" else "\t")
    else:
        _require_visible(table)
    with storage.create(path) as handle:
        if delimited:
            handle.write(delimited.encode())
        elif suffix == "parquet":
            pyarrow.parquet.write_table(table, handle)
        else:
            for batch in table.to_batches(max_chunksize=BATCH_ROWS):
                lines = (dump_json(row, ensure_ascii=False) for row in batch.to_pylist())
                handle.write("".join(f"{line}\n" for line in lines).encode())


def format_delimited(table: pa.Table, delimiter: str) -> str:
    """The text of a .csv or, with a tab as delimiter, a .tsv file; a UsageError if it cannot hold a cell."""
    _require_visible(table)
    if problem := _header_problem(table.column_names, delimiter):
        raise UsageError(f"the table cannot be written: {problem}")
    forbidden = re.compile("\0" if delimiter == "," else "[\0\t\r\n]")
    quoted = re.compile('[",\r\n]' if delimiter == "," else r"(?!)")
    rows = [table.column_names, *zip(*(column.to_pylist() for column in table.columns), strict=True)]
    for number, cells in enumerate(rows):
        where = f"row {number}" if number else "the header"
        for name, cell in zip(table.column_names, cells, strict=True):
            if forbidden.search(cell):
                raise UsageError(
                    f"{where}: {name} is {cell!r}, which no {'CSV' if delimiter == ',' else 'TSV'} can hold; "
                    "write .jsonl or .parquet"
                )
        if not any(cells):
            raise UsageError(
                f"{where}: all cells are empty, so readers would ignore the row; write .jsonl or .parquet"
            )
    lines = (
        delimiter.join('"' + c.replace('"', '""') + '"' if quoted.search(c) else c for c in cells)
        for cells in rows
    )
    return "".join(f"{line}\n" for line in lines)


def _require_visible(table: pa.Table) -> None:
    """Refuse what `read_table` would remove."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        remedy = "which has white space at its ends, which would be lost on reading; remove it"
        if name != name.strip(BLANKS):
            raise UsageError(f"the name of a column is {name!r}, {remedy}")
        at = pc.index(pc.not_equal(pc.utf8_trim(column, BLANKS), column), True).as_py()
        if at >= 0:
            raise UsageError(f"row {at + 1}: {name} is {column[at].as_py()!r}, {remedy}")


def _header_problem(names: Sequence[str], delimiter: str) -> str | None:
    """Why the names are not those of a table of this format; None if they are."""
    if not any(name.strip(BLANKS) for name in names):
        return "not a table: the first line is empty; it must name the columns"
    other = next((d for d in _DELIMITERS if d != delimiter and len(names) == 1 and d in names[0]), None)
    if other is not None:
        remedy = "save it as .csv with commas, or as .tsv with tabs"
        return f"its first line has {other!r} and no {delimiter!r}; {remedy}"
    quoted = next((name for name in names if delimiter == "\t" and re.fullmatch('(?s)".*"', name)), None)
    if quoted is not None:
        return (
            f"its first line has quotes around {quoted}, and in a TSV they are part of the name; save it "
            "without quotes, or as .csv"
        )
    return None


def _read_delimited(path: str, handle: BinaryIO, delimiter: str, problems: Problems) -> pa.Table:
    data = handle.read()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        raise ManifestError(path, ["not UTF-8 text (UTF-16, or no text at all); save it as UTF-8"])
    rows = _delimited_rows(path, data, delimiter)
    names = next(rows, [])
    _require_few(path, len(names))
    if problem := _header_problem(names, delimiter):
        raise ManifestError(path, [problem])
    tables, batch = list[pa.Table](), list[list[str]]()
    for number, cells in enumerate(rows, start=1):
        if len(cells) != len(names):
            problems.add(f"row {number}: {len(cells)} cells where the header names {len(names)}")
            continue
        batch.append(cells)
        if len(batch) == BATCH_ROWS:
            tables.append(_of_rows(batch, names))
            batch.clear()
    problems.stop()
    table = pa.concat_tables([*tables, _of_rows(batch, names)])
    if delimiter == ",":
        _warn_of_cells(
            table, r"[\r\n]", "has a line break in a quoted cell; check that it holds no other rows", problems
        )
    else:
        _warn_of_cells(
            table, r'^".*"$', "has quotes around a cell; in a TSV they are part of the value", problems
        )
    return table


def _delimited_rows(path: str, data: bytes, delimiter: str) -> Iterator[list[str]]:
    """The header and the rows of a text, without lines that are blank except for delimiters."""
    text = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline="")
    reader = csv.reader(
        text,
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE,
        strict=True,
    )
    number = 0
    try:
        for cells in reader:
            if number == 0 or "".join(cells).strip(BLANKS):
                yield cells
                number += 1
    except csv.Error as e:
        where = f"row {number}" if number else "the header"
        # The other error that there is, of a very long cell, is one of an open quote in a CSV.
        remedy = 'close it after the cell, and double quotes within it ("")'
        problem = f"a quote that is not closed ({e}); {remedy}" if delimiter == "," else str(e)
        raise ManifestError(path, [f"{where}: {problem}"]) from e


def _of_rows(rows: Sequence[Sequence[str]], names: Sequence[str]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(names)
    return pa.table([pa.array(cells, pa.string()) for cells in columns], names=list(names))


def _warn_of_cells(table: pa.Table, pattern: str, what: str, problems: Problems) -> None:
    """Warn of the cells that a pattern finds, and of where the first one is."""
    found = {
        name: pc.match_substring_regex(column, pattern)
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
    counts = {name: pc.sum(matches).as_py() or 0 for name, matches in found.items()}
    name = next((name for name, count in counts.items() if count), None)
    if name is not None:
        row, total = pc.index(found[name], True).as_py() + 1, sum(counts.values())
        problems.warn(f"row {row}: {name} {what}" + (f" ({total:,} such cells)" if total > 1 else ""))


def _read_json_lines(path: str, handle: BinaryIO, plain: Collection[str], problems: Problems) -> pa.Table:
    rows, tables = list[dict[str, str]](), list[pa.Table]()
    names, num_given = set[str](), 0
    lines = (text for line in handle for text in line.splitlines() if text.strip())
    for number, line in enumerate(lines, start=1):
        text = line.decode().removeprefix("\ufeff")
        try:
            require_modest(text)
            cells = _DECODER.decode(text)
            if not isinstance(cells, dict):
                problems.add(f'row {number}: not an object, such as {{"path": "a.nii"}}')
                continue
            row = {name: _text(value) for name, value in cells.items()}
        except (ValueError, RecursionError) as e:
            problems.add(f"row {number}: not JSON: {e}")
            continue
        for name, value in cells.items():
            if isinstance(value, dict | list) and name.strip(BLANKS) in plain:
                problems.add(f"row {number}: {name} is a list or an object; give it a text or a number")
        names.update(row)
        num_given += len(row)
        _require_few(path, len(names))
        if number * len(names) > _FREE_CELLS + _CELL_GROWTH * num_given:
            problem = f"{len(names):,} different keys in its first {number:,} rows, and few of them in each"
            raise ManifestError(path, [f"{problem}; give all rows the same keys"])
        rows.append(row)
        if len(rows) == BATCH_ROWS:
            tables.append(_as_table(rows))
            rows.clear()
    problems.stop()
    table = pa.concat_tables([*tables, _as_table(rows)], promote_options="default")
    return _filled(table.columns, table.column_names)


def _require_few(path: str, num_columns: int) -> None:
    if num_columns > _MAX_COLUMNS:
        raise ManifestError(
            path, [f"more than {_MAX_COLUMNS:,} columns; drop those that the dataset does not need"]
        )


def _text(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else _json_text(value)


def _json_text(value: object) -> str:
    """A value as JSON: numbers as written, those that are not finite as text, bytes as base64."""
    match value:
        case dict():
            pairs = (f"{_json_text(str(key))}: {_json_text(item)}" for key, item in value.items())
            return f"{{{', '.join(pairs)}}}"
        case list() | tuple():
            return f"[{', '.join(map(_json_text, value))}]"
        case _Number():
            return str(value)
        case bytes():
            value = base64.b64encode(value).decode()
        case float() if not math.isfinite(value):
            value = str(value).replace("inf", "Infinity").replace("nan", "NaN")
    return dump_json(value, ensure_ascii=False, default=str)


def _as_table(rows: list[dict[str, str]]) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({n: pa.array([r.get(n, "") for r in rows], pa.string()) for n in names})


def _read_parquet(path: str, handle: BinaryIO, plain: Collection[str], problems: Problems) -> pa.Table:
    try:
        require_schema(handle, _DEEPEST)
        handle.seek(0)
        data = handle.read()
        table = read_bounded(data, _FREE_BYTES + _FILE_GROWTH * len(data))
    except pa.ArrowException:
        raise
    except ValueError as e:
        raise ManifestError(path, [f"not a table: {e}"]) from e
    _require_few(path, table.num_columns)
    columns = list[pa.ChunkedArray]()
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            columns.append(pc.cast(column, pa.string()))
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
            if name.strip(BLANKS) in plain:
                problems.add(f"column {name!r} is of the type {column.type}; give it texts or numbers")
            try:
                values = column.to_pylist()
            except (ArithmeticError, LookupError, ValueError) as e:  # a year after 9999, an unknown time zone
                reason = (
                    f"is of the type {column.type}, and a value of it cannot be read ({problems.plain(e)})"
                )
                problems.add(f"column {name!r} {reason}; give it texts or numbers")
                values = [None] * len(column)
            if any(isinstance(v, bytes) for v in values):
                problems.warn(f"column {name!r} has bytes that are not UTF-8, so all its cells became base64")
                values = [v if v is None else base64.b64encode(v).decode() for v in values]
            texts = [None if v is None else _text(v) for v in values]
            columns.append(pa.chunked_array([pa.array(texts, pa.string())]))
    return _filled(columns, table.column_names)


def _filled(columns: Sequence[pa.ChunkedArray], names: Sequence[str]) -> pa.Table:
    return pa.table([pc.fill_null(column, "") for column in columns], names=list(names))


_Reader = Callable[[str, BinaryIO, Collection[str], Problems], pa.Table]
_READERS: Final[dict[str, _Reader]] = {
    "csv": lambda path, handle, _, problems: _read_delimited(path, handle, ",", problems),
    "tsv": lambda path, handle, _, problems: _read_delimited(path, handle, "\t", problems),
    "jsonl": _read_json_lines,
    "ndjson": _read_json_lines,
    "parquet": _read_parquet,
}
