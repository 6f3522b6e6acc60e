"""Tables that are no files: their cells mean what they mean in a Parquet file."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.errors import ManifestError, UsageError
from beam_nifti.manifest.in_memory import parquet_of
from beam_nifti.manifest.tables import read_table


def cells_of(rows: Any) -> dict[str, list[str]]:
    """The texts that a table's cells become, by column."""
    table = read_table("/data/in-memory-table.parquet", content=parquet_of(rows))
    return {name: table[name].to_pylist() for name in table.column_names}


def column_of(*values: Any) -> list[str]:
    """The texts that values become in a column of dicts, which has another one without an empty cell."""
    return cells_of([{"path": "a.nii", "x": value} for value in values])["x"]


VALUES = st.one_of(
    st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)), max_size=5),
    st.lists(st.one_of(st.none(), st.floats()), max_size=5),
    st.lists(st.one_of(st.none(), st.text(st.characters(codec="utf-8"))), max_size=5),
    st.lists(st.one_of(st.none(), st.booleans()), max_size=5),
    st.lists(st.one_of(st.none(), st.dates()), max_size=5),
    st.lists(
        st.one_of(st.none(), st.datetimes(datetime.datetime(1700, 1, 1), datetime.datetime(2200, 1, 1))),
        max_size=5,
    ),
    st.lists(st.one_of(st.none(), st.lists(st.integers(0, 9), max_size=2)), max_size=5),
)


@given(VALUES, st.booleans())
def test_a_data_frame_is_read_as_the_file_that_pandas_writes(values: list[Any], is_category: bool) -> None:
    frame = pd.DataFrame({"path": [f"{n}.nii" for n in range(len(values))], "x": pd.Series(values)})
    if is_category and not any(isinstance(value, list) for value in values):
        frame["x"] = frame["x"].astype("category")
    content = frame.to_parquet()
    table = read_table("m.parquet", content=content)
    assert read_table("m.parquet", content=parquet_of(frame)).equals(table)
    assert read_table("m.parquet", content=parquet_of(pa.Table.from_pandas(frame))).equals(table)


@given(VALUES)
def test_dicts_are_read_as_the_columns_that_arrow_makes_of_them(values: list[Any]) -> None:
    column = pa.array(values, from_pandas=True)  # NaN stands for a value that is not there
    if values:
        assert column_of(*values) == cells_of(pa.table({"x": column}))["x"]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([1, None, 3], ["1", "", "3"]),
        ([1.5, float("nan"), 2], ["1.5", "", "2"]),
        (["a", pd.NA, float("nan"), pd.NaT, None], ["a", "", "", "", ""]),
        ([np.float32(0.1), np.float32(2)], ["0.1", "2"]),
        ([np.uint8(3), np.int64(-1), 7], ["3", "-1", "7"]),
        ([np.bool_(True), False], ["true", "false"]),
        ([np.str_("x"), "y"], ["x", "y"]),
        ([np.array(3), 4], ["3", "4"]),
        ([PurePosixPath("a/b.nii"), Path("c.nii")], ["a/b.nii", "c.nii"]),
        ([decimal.Decimal("1.50"), None], ["1.50", ""]),
        ([datetime.date(2020, 1, 2)], ["2020-01-02"]),
        ([[1, 2], None], ["[1, 2]", ""]),
        ([None, None], ["", ""]),
    ],
)
def test_cells_of_every_kind(values: list[Any], texts: list[str]) -> None:
    assert column_of(*values) == texts
    frame = pd.DataFrame({"path": "a.nii", "x": pd.Series(values, dtype=object)})
    assert cells_of(frame)["x"] == texts


def test_a_key_that_a_row_lacks_is_an_empty_cell() -> None:
    assert cells_of([{"path": "a"}, {"path": "b", "label": 1}]) == {"path": ["a", "b"], "label": ["", "1"]}


def test_an_index_is_a_column_where_it_has_a_name() -> None:
    frame = pd.DataFrame({"participant_id": ["s1", "s2", "s3"], "path": ["a", "b", "c"]})
    assert cells_of(frame[1:]) == {"participant_id": ["s2", "s3"], "path": ["b", "c"]}
    assert cells_of(frame.set_index("participant_id")[1:]) == {
        "path": ["b", "c"],
        "participant_id": ["s2", "s3"],
    }


OTHER_TYPE = "; give a column one type"
NO_CELL = "; give texts, numbers, dates or paths"


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([1, None, "one"], f"row 3: x is 'one', of type str, and in row 1 of type int{OTHER_TYPE}"),
        ([None, True, 2], f"row 3: x is 2, of type int, and in row 2 of type bool{OTHER_TYPE}"),
        (["a", object], f"row 2: x is <class 'object'>, of type type{NO_CELL}"),
        ([2**70], f"row 1: x is 1180591620717411303424, of type int{NO_CELL}"),
        ([1j], f"row 1: x is 1j, of type complex{NO_CELL}"),
        ([np.zeros((1, 2))], f"row 1: x is array([[0., 0.]]), of type ndarray{NO_CELL}"),
    ],
)
def test_what_no_column_can_hold_is_refused_by_row_and_column(values: list[Any], problem: str) -> None:
    column = pd.Series(values, dtype=object)
    for rows in ([{"path": "a", "x": value} for value in values], pd.DataFrame({"path": "a", "x": column})):
        with pytest.raises(ManifestError) as raised:
            parquet_of(rows)
        assert raised.value.problems == (problem,)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: [{"path": "a"}, ("b",)], "row 2: of type tuple; give a dict"),
        (lambda: [{"path": "a", 3: 1}], "the name of column 3 is of type int; make it a text"),
        (lambda: pd.DataFrame([["a", "b"]], columns=["x", "x"]), "column 'x' occurs twice; rename one"),
        (lambda: pa.table([["a"], ["b"]], names=["x", "x"]), "column 'x' occurs twice; rename one"),
        (lambda: [], "no rows; give at least one"),
        (lambda: pd.DataFrame(), "no rows; give at least one"),
    ],
)
def test_what_is_no_manifest_is_refused(make: Callable[[], object], problem: str) -> None:
    with pytest.raises(ManifestError) as raised:
        parquet_of(make())
    assert raised.value.problems == (problem,)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (["Doe", object], f"row 2: x is (hidden by --anonymous-ids), of type type{NO_CELL}"),
        (
            ["Doe", 1],
            f"row 2: x is (hidden by --anonymous-ids), of type int, and in row 1 of type str{OTHER_TYPE}",
        ),
        (["\ud800Doe"], f"row 1: x is (hidden by --anonymous-ids), of type str{NO_CELL}"),
    ],
)
def test_problems_show_no_cell_of_rows_with_names(values: list[Any], problem: str) -> None:
    with pytest.raises(ManifestError) as raised:
        parquet_of([{"path": "a", "x": value} for value in values], hides_cells=True)
    assert raised.value.problems == (problem,)


def test_every_column_is_reported_at_once() -> None:
    with pytest.raises(ManifestError) as raised:
        parquet_of([{"path": object(), "x": 1}, {"path": "b", "x": "c"}])
    assert len(raised.value.problems) == 2


def test_what_nests_without_end_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    deep: dict[str, Any] = {}
    for _ in range(10_000):
        deep = {"x": deep}
    for cell in (endless, deep, [(deep,)]):
        with pytest.raises(ManifestError, match="row 2: site nests deeper than 64 levels, or holds itself"):
            parquet_of([{"path": "a", "site": [["b"]]}, {"path": "b", "site": cell}])


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"path": ["a"]},
        lambda: 3,
        lambda: b"path\na\n",
        lambda: None,
        lambda: pa.chunked_array([["a"]]),
    ],
)
def test_what_is_no_table_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UsageError, match="give a path, a pandas DataFrame, an Arrow table"):
        parquet_of(make())
