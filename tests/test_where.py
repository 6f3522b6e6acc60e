from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.errors import UsageError
from beam_nifti.where import Condition

TABLE = pa.table(
    {
        "row": [1, 2, 3, 4],
        "example_id": ["sub-1", "sub-2", "sub-3", "sub-4"],
        "label": [1.0, 0.0, None, 1.0],
        "age": ["61", " 9.5", "n/a", ""],
        "site": ["A", "B", "", "A"],
        "scan age": ["1", "2", "3", "4"],
        "shape": [[1, 2], [1, 2], [1, 2], [1, 2]],
    }
)


def rows(text: str) -> list[int]:
    """The rows that a condition selects, from 1."""
    return [i + 1 for i, found in enumerate(Condition(text).select(TABLE)) if found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("age > 60", [1]),
        ("60 < age", [1]),
        ("0 < age < 60", [2]),
        ("age >= 9.5", [1, 2]),
        ("age != 61", [2]),
        ("not age == 61", [2]),
        ("age > -1", [1, 2]),
        ("age > 'n'", []),
        ("age == 'n/a'", [3]),
        ("age != 'n/a'", [1, 2, 4]),
        ("site != 'A'", [2]),
        ("not site == 'A'", [2]),
        ("site in ['', 'B']", [2, 3]),
        ("label != 1", [2]),
        ("site == 'A'", [1, 4]),
        ("site == ''", [3]),
        ("site == 'A' and age > 60 or site == 'B'", [1, 2]),
        ("not (site == 'A' or label == 0)", []),
        ("site in ['A', 'C']", [1, 4]),
        ("site not in ('A',)", [2]),
        ("age in [61, 62]", [1]),
        ("age not in [61]", [2]),
        ("label in [1]", [1, 4]),
        ("label == 1 or row == 3", [1, 3, 4]),
        ("column('scan age') <= 2", [1, 2]),
        ("example_id <= 'sub-2'", [1, 2]),
        ("row > label", [2, 4]),
        ("row == age", []),
    ],
)
def test_what_a_condition_selects(text: str, expected: list[int]) -> None:
    assert rows(text) == expected


@given(st.lists(st.one_of(st.none(), st.floats(allow_nan=False)), max_size=8), st.floats(allow_nan=False))
def test_numbers_in_text_compare_as_numbers(ages: list[float | None], limit: float) -> None:
    cells = ["n/a" if age is None else repr(age) for age in ages]
    table = pa.table({"age": pa.array(cells, pa.string())})
    text = f"age >= {limit!r}".replace("inf", "1e999")
    expected = [age is not None and age >= limit for age in ages]
    assert Condition(text).select(table).tolist() == expected


@pytest.mark.parametrize("text", ["NaN", "N/A", " n/a ", "", "nan", "-nan", "+NAN"])
def test_a_cell_without_a_value_is_never_selected_unasked(text: str) -> None:
    table = pa.table({"age": [text, "40"], "number": [float("nan"), 40.0]})
    for condition in ("age != 41", "not age > 41", "age != 'x'", "number != 41", "not number > 41"):
        assert Condition(condition).select(table).tolist() == [False, True]


def test_the_columns_that_are_asked_are_known_before() -> None:
    assert Condition("age > 6 and column('scan age') in [1] or x == y").columns == {
        "age",
        "scan age",
        "x",
        "y",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("age >", "is no condition"),
        ("", "is no condition"),
        ("age = 60", "is no condition"),
        ("age", "'age' is not understood"),
        ("age > 60 and site", "'site' is not understood"),
        ("1 < 2", "'1' is not understood"),
        ("age.x > 1", "'age.x' is not understood"),
        ("age[0] > 1", "is not understood"),
        ("age + 1 > 60", r"'age \+ 1' is not understood"),
        ("age > True", "'True' is not understood"),
        ("age is None", "write == or != in the place of is"),
        ("age in 'abc'", "is not understood"),
        ("age in []", "is not understood"),
        ("age in [1, 'a']", "is not understood"),
        ("'a' in site", "is not understood"),
        ("__import__('os').system('true') == 0", "is not understood"),
        ("(lambda: 1) == 1", "is not understood"),
        ("sex == 'F'", "has no column 'sex'; it has row, example_id, label, age, site, scan age, shape"),
        ("shape == 1", "each cell of shape holds several numbers"),
        ("label == '1'", "label is a number; compare it with one, without quotes"),
        ("site > 1", r"site is 'A' in row 1 of the manifest \(sub-1\), which is no number"),
    ],
)
def test_what_is_no_condition_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rows(text)
