"""Tables: what was written is read, in every format, or refused by name."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import math
import re
import sys
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from beam_nifti.config import Columns
from beam_nifti.errors import ManifestError, UsageError
from beam_nifti.manifest import read_manifest
from beam_nifti.manifest.tables import BLANKS, Problems, format_delimited, read_table, write_table
from tests.build_helpers import arrow_memory
from tests.datasets import nested_parquet

CELL = st.text(st.sampled_from('ab"\t,;\n\r \xa0é') | st.characters(codec="utf-8"), max_size=6)
NAME = st.text(st.sampled_from("abc d"), min_size=1, max_size=4).map(str.strip).filter(bool)


def read_bytes(tmp_path: Path, data: str | bytes, name: str = "m.csv") -> list[dict[str, str]]:
    """The rows of a table given as text."""
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(read_table(str(tmp_path / name)).to_pylist())


def problems_of(tmp_path: Path, data: str | bytes, name: str = "m.csv") -> tuple[str, ...]:
    with pytest.raises(ManifestError) as caught:
        read_bytes(tmp_path, data, name)
    return caught.value.problems


def warnings_of(tmp_path: Path, data: str, name: str = "m.csv") -> list[str]:
    (tmp_path / name).write_bytes(data.encode())
    problems = Problems(name)
    read_table(str(tmp_path / name), problems=problems)
    return problems.warnings


def rows_of_tsv(text: str) -> list[list[str]]:
    """What the registration of text/tab-separated-values says: no quoting at all."""
    return [line.split("\t") for line in re.split("\r\n|\r|\n", text)]


def rows_of_csv(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline=""), strict=True))


# CSV and TSV


@pytest.mark.parametrize(("name", "parse"), [("any.tsv", rows_of_tsv), ("any.csv", rows_of_csv)])
@given(text=st.text(st.sampled_from('ab"\t,\n\r '), max_size=30))
@example(text='"left\tx\nb\tright"')
@example(text='"left,x\nb,right"')
@example(text='a,"b')
def test_any_text_gives_the_rows_of_a_plain_parser_or_an_error_with_a_row(
    tmp_path_factory: pytest.TempPathFactory, name: str, parse: Any, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    delimiter = "\t" if name.endswith("tsv") else ","
    path.write_bytes(f"x{delimiter}y\n{text}".encode())
    try:
        rows = [[cell.strip() for cell in cells] for cells in parse(text)]
    except csv.Error:
        rows = [["not", "a", "table"]]
    rows = [cells for cells in rows if any(cells)]
    if all(len(cells) == 2 for cells in rows):
        assert [list(row.values()) for row in read_table(str(path)).to_pylist()] == rows
    else:
        with pytest.raises(ManifestError) as caught:
            read_table(str(path))
        assert all(re.match(r"row \d+: ", problem) for problem in caught.value.problems)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@given(data=st.data())
def test_any_table_that_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject
) -> None:
    names = data.draw(st.lists(NAME, min_size=1, max_size=3, unique=True))
    rows = data.draw(st.lists(st.tuples(*[CELL] * len(names)), min_size=1, max_size=4))
    table = pa.table([pa.array(column, pa.string()) for column in zip(*rows, strict=True)], names=names)
    path = str(tmp_path_factory.getbasetemp() / f"back.{suffix}")
    cells = [cell for row in rows for cell in row]
    is_lost = any(cell.strip(BLANKS) != cell for cell in cells)
    if suffix in ("csv", "tsv"):
        is_lost |= "\0" in "".join(cells) or not all(map(any, rows))
    if suffix == "tsv":
        is_lost |= not set("\t\r\n").isdisjoint("".join(cells))
    if is_lost:
        with pytest.raises(UsageError, match=r"row \d+"):
            write_table(path, table)
    else:
        write_table(path, table)
        assert read_table(path).equals(table)


@pytest.mark.parametrize(
    "rows",
    [
        'a.nii,1\nb.nii,"left\nc.nii,3\n',
        '\na.nii,1\n\n,\nb.nii,"left',
        'a.nii,1\nb.nii,"5" disc"\nc.nii,"x"\n',
    ],
)
def test_a_quote_that_is_not_closed_is_an_error_with_the_row_that_opens_it(tmp_path: Path, rows: str) -> None:
    (problem,) = problems_of(tmp_path, "path,note\n" + rows)
    assert problem.startswith("row 2: a quote that is not closed")
    assert "double quotes within it" in problem


def test_an_open_quote_in_the_header(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, 'path,"note\na.nii,1\n')
    assert problem.startswith("the header: a quote that is not closed")


def test_a_cell_of_several_lines_is_reported(tmp_path: Path) -> None:
    (warning,) = warnings_of(tmp_path, 'path,note\na,x\nb,"left\nc,right"\n')
    assert warning == "row 2: note has a line break in a quoted cell; check that it holds no other rows"
    assert warnings_of(tmp_path, 'path,note\na,"x, y"\n') == []


def test_quotes_in_a_tsv_are_characters(tmp_path: Path) -> None:
    text = 'path\tnote\na\t"left\nb\tright"\nc\t"whole"\n'
    assert [row["note"] for row in read_bytes(tmp_path, text, "m.tsv")] == ['"left', 'right"', '"whole"']
    (warning,) = warnings_of(tmp_path, text, "m.tsv")
    assert warning.startswith("row 3: note has quotes around a cell")
    (problem,) = problems_of(tmp_path, '"path"\t"note"\n"a"\t"b"\n', "m.tsv")
    assert problem.startswith(
        'its first line has quotes around "path", and in a TSV they are part of the name'
    )


@pytest.mark.parametrize("cell", ["a\tb", "a\nb", "a\rb", "a\0b"])
def test_what_a_tsv_cannot_hold_is_refused_by_name(cell: str) -> None:
    table = pa.table({"path": ["x", "y"], "note": ["", cell]})
    with pytest.raises(UsageError, match=re.escape(f"row 2: note is {cell!r}, which no TSV can hold")):
        format_delimited(table, "\t")


@pytest.mark.parametrize(
    "text",
    [
        "path,site\na.nii,x\nb.nii,y\n",
        "path,site\ra.nii,x\rb.nii,y\r",
        "path,site\r\na.nii,x\r\nb.nii,y",
        "path,site\ra.nii,x\nb.nii,y\r\n\r",
        "\ufeffpath,site\n\n   \na.nii,x\n , \nb.nii,y\n,\n",
        " path,site\u200b\na.nii ,x\n\xa0b.nii,\ty\n",
        "path,site,,\na.nii,x,,\nb.nii,y,,\n",
        'path,"",site\na.nii,,x\nb.nii, ,y\n',
    ],
)
@pytest.mark.parametrize("name", ["m.csv", "m.tsv"])
def test_one_table_in_many_ways(tmp_path: Path, name: str, text: str) -> None:
    if name == "m.tsv":
        text = text.replace("\t", "").replace(",", "\t").replace('"', "")
    rows = [{"path": "a.nii", "site": "x"}, {"path": "b.nii", "site": "y"}]
    assert read_bytes(tmp_path, text, name) == rows


def test_json_lines_may_end_in_any_way(tmp_path: Path) -> None:
    assert read_bytes(tmp_path, '{"path": "a"}\r{"path": "b"}\r\n\r{"path": "c"}\n', "m.jsonl") == [
        {"path": "a"}, {"path": "b"}, {"path": "c"}
    ]  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_refused_by_name(tmp_path: Path, encoding: str) -> None:
    assert problems_of(tmp_path, "path,label\na.nii,1\n".encode(encoding)) == (
        "not UTF-8 text (UTF-16, or no text at all); save it as UTF-8",
    )


# What nobody sees


def test_white_space_at_the_ends_is_removed_and_reported(tmp_path: Path) -> None:
    text = "path,split ,note\na.nii,train\u3000,in  it\n\u2007b.nii,test,\ufeff\n"
    assert read_bytes(tmp_path, text) == [
        {"path": "a.nii", "split": "train", "note": "in  it"},
        {"path": "b.nii", "split": "test", "note": ""},
    ]
    assert warnings_of(tmp_path, text) == [
        "the name of column 'split ' was read without the white space at its ends",
        "3 cells were read without the white space at the ends, such as 'path' of row 2",
    ]
    assert warnings_of(tmp_path, "path,split\na.nii,train\n") == []


def test_every_white_space_of_unicode_is_known() -> None:
    spaces = {c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace()}
    assert spaces <= set(BLANKS)
    assert not any(c.isprintable() and c != " " for c in BLANKS)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_white_space_that_would_be_lost_is_not_written(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(UsageError, match=r"row 2: path is ' b\.nii', which has white space at its ends"):
        write_table(str(tmp_path / f"m.{suffix}"), pa.table({"path": ["a.nii", " b.nii"]}))
    assert not list(tmp_path.iterdir())


def test_columns_without_a_name(tmp_path: Path) -> None:
    assert problems_of(tmp_path, "path,,\na.nii,,\nb.nii,,x\n") == (
        "column 3 has no name, but a cell in row 2; name it, or remove it",
    )
    (problem,) = problems_of(tmp_path, ",path\n0,a.nii\n")
    assert problem.startswith(
        "column 1 has no name, but a cell in row 1; name it, or remove it (pandas leaves"
    )
    pq.write_table(pa.table([["a"], [""]], names=["path", " "]), tmp_path / "m.parquet")
    assert read_table(str(tmp_path / "m.parquet")).to_pylist() == [{"path": "a"}]


@pytest.mark.parametrize("header", ["path,path ", " path,path", "path,\u200bpath"])
def test_names_that_are_one_without_white_space(tmp_path: Path, header: str) -> None:
    assert problems_of(tmp_path, f"{header}\na,b\n") == ("column 'path' occurs twice; rename one",)


def test_a_key_that_a_line_has_twice(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, '{"path": "a"}\n{"path": "b", "path": "c"}\n', "m.jsonl")
    assert problem == "row 2: not JSON: has the key 'path' twice"


# Types


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("num_rows", "num_keys", "message"),
    [
        (8000, 6, r"10,086 different keys in its first 1,681 rows, and few of them in each"),
        (1, 1 << 17, "more than 65,536 columns"),
    ],
)
def test_json_lines_of_ever_other_keys_are_refused(
    tmp_path: Path, num_rows: int, num_keys: int, message: str
) -> None:
    keys = iter(range(num_rows * num_keys))
    rows = [{f"k{key}": "" for key in itertools.islice(keys, num_keys)} for _ in range(num_rows)]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(ManifestError, match=message):
        read_table(str(path))


def test_a_line_of_many_small_values_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(f'{{"path": [{"[]," * (1 << 19)}[]]}}')
    with pytest.raises(ManifestError, match="row 1: not JSON: holds too many values for the length"):
        read_table(str(tmp_path / "m.jsonl"))


def test_a_parquet_file_whose_columns_nest_does_not_end_the_process(tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_bytes(nested_parquet(50_000))
    with pytest.raises(ManifestError, match="not a table: its columns are nested deeper than the 100 levels"):
        read_table(str(tmp_path / "m.parquet"))


def repeated(text: str, count: int) -> pa.Array:
    """One text in many rows, which takes a bit of each in a file."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int8()), pa.array([text]))


@pytest.mark.parametrize(
    ("column", "options"),
    [
        (repeated("x" * 1000, 1 << 18), {}),
        (pa.StructArray.from_arrays([repeated("x" * 1000, 1 << 18)], ["of"]), {}),
        (pa.ListArray.from_arrays(pa.array([0, 1 << 18], pa.int32()), repeated("x" * 1000, 1 << 18)), {}),
        (pa.nulls(1 << 24, pa.int64()), {}),
        (pa.array([bytes(1 << 20)] * 100, pa.binary(1 << 20)), {}),
        (
            pa.array(["x" * (1 << 20)] * 100),
            {"use_dictionary": False, "column_encoding": {"path": "DELTA_BYTE_ARRAY"}},
        ),
    ],
    ids=["texts", "texts in objects", "texts in lists", "nothing", "bytes", "beginnings"],
)
def test_a_small_parquet_file_of_large_cells_is_not_read(
    column: pa.Array, options: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"path": column}), path, compression="zstd", **options)
    assert path.stat().st_size < 1 << 18
    with arrow_memory() as memory, pytest.raises(ManifestError, match=r"not a table: has .* bytes of values"):
        read_table(str(path))
    assert memory.max_memory() < 16 << 20


def test_a_parquet_file_of_any_encoding_is_read(tmp_path: Path) -> None:
    table = pa.table({"path": [f"sub-{i:04}.nii.gz" for i in range(5000)], "site": ["x" * 100] * 5000})
    encodings = {"path": "DELTA_BYTE_ARRAY", "site": "DELTA_LENGTH_BYTE_ARRAY"}
    path = tmp_path / "m.parquet"
    for options in ({}, {"use_dictionary": False, "column_encoding": encodings}):
        for version in ("1.0", "2.0"):
            pq.write_table(table[:500], path, data_page_version=version, **options)
            assert read_table(str(path)) == table[:500]


def test_parquet_columns_are_the_texts_of_their_values(tmp_path: Path) -> None:
    columns = {
        "path": pa.array(["a", None], pa.large_string()),
        "site": pa.array(["x", "y"]).dictionary_encode(),
        "id": pa.array([7.0, None]),
        "label": pa.array([0.1, 2**24], pa.float32()),
        "day": pa.array([date(2020, 1, 2), None]),
        "dose": pa.array([Decimal("1.10"), None]),
        "flag": pa.array([True, False]),
        "old": pa.array([b"text", None]),
        "half": pa.array(np.array([1.5, 2], np.float16)),
        "nothing": pa.nulls(2),
        "tags": pa.array([["é", None], None]),
        "scan": pa.array([(3.5, b"\xff"), None], pa.struct({"te": pa.float64(), "raw": pa.binary()})),
        "picture": pa.array([b"\xff\xd8", None]),
    }
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    first, second = read_table(str(tmp_path / "m.parquet")).to_pylist()
    assert first == {
        "path": "a", "site": "x", "id": "7", "label": "0.1", "day": "2020-01-02", "dose": "1.10",
        "flag": "true", "old": "text", "half": "1.5", "nothing": "", "tags": '["é", null]',
        "scan": '{"te": 3.5, "raw": "/w=="}', "picture": "/9g=",
    }  # fmt: skip
    assert {name for name, cell in second.items() if cell} == {"site", "label", "flag", "half"}


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1], pa.timestamp("us", "Nowhere/Here")),
        pa.array([(2**62,)], pa.struct({"time": pa.timestamp("us")})),
        pa.array([(2**30,)], pa.struct({"day": pa.date32()})),
    ],
)
def test_times_that_python_does_not_have_are_refused(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"path": ["a"], "when": column}), tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match=r"column 'when' is of the type .* a value of it cannot be read"):
        read_table(str(tmp_path / "m.parquet"))


def test_one_cell_that_is_no_text_makes_base64_of_its_column_and_a_warning(tmp_path: Path) -> None:
    table = pa.table({"path": ["a", "b"], "note": pa.array([b"left", b"\xff"])})
    pq.write_table(table, tmp_path / "m.parquet")
    problems = Problems("m.parquet")
    notes = read_table(str(tmp_path / "m.parquet"), problems=problems)["note"].to_pylist()
    assert [base64.b64decode(note) for note in notes] == [b"left", b"\xff"]
    assert problems.warnings == ["column 'note' has bytes that are not UTF-8, so all its cells became base64"]


NUMBER = st.floats(allow_nan=False).map(repr) | st.integers().map(str)
NUMBER |= st.sampled_from(["1e400", "1.50", "-0.0", "123456789012345678.5", "0.1000000000000000055"])
NUMBER = NUMBER.map(lambda text: text.replace("inf", "1e999"))


@given(
    values=st.recursive(
        NUMBER, lambda v: st.lists(v) | st.dictionaries(st.sampled_from("ab"), v), max_leaves=5
    )
)
def test_numbers_in_lists_and_objects_of_json_keep_their_text(
    tmp_path_factory: pytest.TempPathFactory, values: Any
) -> None:
    def write(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f'"{key}": {write(item)}' for key, item in value.items()) + "}"
        return "[" + ", ".join(map(write, value)) + "]" if isinstance(value, list) else str(value)

    text = write([values])
    found = read_bytes(tmp_path_factory.getbasetemp(), f'{{"path": "a", "x": {text}}}', "numbers.jsonl")
    assert found == [{"path": "a", "x": text}]


def test_numbers_that_are_not_finite_are_kept_by_name(tmp_path: Path) -> None:
    expected = '{"a": ["NaN", "Infinity", "-Infinity"]}'
    read = read_bytes(tmp_path, '{"x": {"a": [NaN, Infinity, -Infinity]}}', "m.jsonl")
    assert read == [{"x": expected}]
    pq.write_table(pa.table({"x": [{"a": [math.nan, math.inf, -math.inf]}]}), tmp_path / "m.parquet")
    assert read_table(str(tmp_path / "m.parquet"))["x"].to_pylist() == [expected]


def test_json_that_is_nested_too_deeply_is_an_error(tmp_path: Path) -> None:
    deep = '{"x": ' + "[" * 5000 + "]" * 5000 + "}"
    assert problems_of(tmp_path, deep, "m.jsonl")[0].startswith("row 1: not JSON: ")


def test_lists_and_objects_that_nobody_asked_for_are_kept_as_json(tmp_path: Path) -> None:
    text = '{"path": "a.nii", "tags": ["é", 1.50], "scan": {"te": 3}}\n{"path": "b.nii", "scan": 7.0}\n'
    assert read_bytes(tmp_path, text, "m.jsonl") == [
        {"path": "a.nii", "tags": '["é", 1.50]', "scan": '{"te": 3}'},
        {"path": "b.nii", "tags": "", "scan": "7.0"},
    ]
    manifest = read_manifest(str(tmp_path / "m.jsonl"))
    assert manifest.extra_columns == ("tags", "scan")
    assert manifest.rows([0])[0].extras == ('["é", 1.50]', '{"te": 3}')


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("path", Columns()),
        ("split", Columns()),
        ("participant_id", Columns()),
        ("label", Columns()),
        ("scan", Columns(id="scan")),
        ("seg", Columns(mask="seg")),
        ("dx", Columns(label="age,dx:string")),
    ],
)
def test_lists_in_columns_that_mean_something_are_refused_by_name(
    tmp_path: Path, name: str, columns: Columns
) -> None:
    table = pa.table({"path": ["a"], "age": ["3"], name: [["x"]]} if name != "path" else {"path": [["a"]]})
    pq.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(
        ManifestError, match=f"column '{name}' is of the type list.*; give it texts or numbers"
    ):
        read_manifest(str(tmp_path / "m.parquet"), columns)
    write = {"path": "a", "age": 3} | {name: ["x"]}
    (tmp_path / "m.jsonl").write_text(str(write).replace("'", '"'))
    with pytest.raises(
        ManifestError, match=f"row 1: {name} is a list or an object; give it a text or a number"
    ):
        read_manifest(str(tmp_path / "m.jsonl"), columns)
