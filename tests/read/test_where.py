from __future__ import annotations

import operator
from fractions import Fraction

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.errors import UsageError
from beam_nifti.read.where import Condition

TABLE = pa.table(
    {
        "row": [1, 2, 3, 4],
        "example_id": ["sub-1", "sub-2", "sub-3", "sub-4"],
        "label": [1.0, 0.0, None, 1.0],
        "age": ["61", " 9.5", "n/a", ""],
        "site": ["A", "B", "", "A"],
        "scan age": ["1", "2", "3", "4"],
        "shape": [[1, 2], [1, 2], [1, 2], [1, 2]],
        "mask_labels": [[0, 3], [], None, [3, 0, 7]],
        "zooms": [[1.0], [1.0], [1.0], [1.0]],
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
        ("3 in mask_labels", [1, 4]),
        ("not 3 in mask_labels", [2]),
        ("3 not in mask_labels or row == 3", [2, 3]),
        ("7.0 in mask_labels and 0 in column('mask_labels')", [4]),
        ("7.5 in mask_labels or -3 in mask_labels or 1e40 in mask_labels", []),
    ],
)
def test_what_a_condition_selects(text: str, expected: list[int]) -> None:
    assert rows(text) == expected


@given(st.lists(st.one_of(st.none(), st.floats(allow_nan=False)), max_size=8), st.floats(-1e308, 1e308))
def test_numbers_in_text_compare_as_numbers(ages: list[float | None], limit: float) -> None:
    cells = ["n/a" if age is None else repr(age) for age in ages]
    table = pa.table({"age": pa.array(cells, pa.string())})
    text = f"age >= {limit!r}"
    expected = [age is not None and age >= limit for age in ages]
    assert Condition(text).select(table).tolist() == expected


COMPARISONS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
LONG = st.integers(-3, 3).flatmap(
    lambda i: st.sampled_from([10**16, 2**53, 20230115123456700]).map(i.__add__)
)
WRITTEN = LONG.map(str) | LONG.map(lambda n: f"{n}.0") | LONG.map(lambda n: f"{n}e-17") | st.just("+5")


@given(
    cells=st.lists(WRITTEN, min_size=1, max_size=5),
    literal=WRITTEN.map(lambda text: text.lstrip("+")),
    sign=st.sampled_from(list(COMPARISONS)),
)
def test_long_numbers_in_text_are_compared_exactly(cells: list[str], literal: str, sign: str) -> None:
    table = pa.table({"code": cells, "other": [literal] * len(cells), "number": [1] * len(cells)})
    expected = [COMPARISONS[sign](Fraction(cell), Fraction(literal)) for cell in cells]
    assert Condition(f"code {sign} {literal}").select(table).tolist() == expected
    assert Condition(f"not code {sign} {literal}").select(table).tolist() == [not e for e in expected]
    among = [Fraction(cell) == Fraction(literal) for cell in cells]
    assert Condition(f"code in [{literal}, 7]").select(table).tolist() == among
    assert Condition(f"code not in [{literal}, 7]").select(table).tolist() == [not found for found in among]


INTEGERS = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 5)


@given(st.lists(st.none() | st.lists(INTEGERS, max_size=4), max_size=6), st.data())
def test_a_number_is_found_in_lists(cells: list[list[int] | None], data: st.DataObject) -> None:
    known = [number for cell in cells for number in cell or ()]
    number = data.draw(st.sampled_from(known) | LONG if known else LONG)
    chunk = pa.array(cells, pa.list_(pa.int64()))
    table = pa.table({"mask_labels": pa.chunked_array([chunk[:2], chunk[2:]])})
    expected = [cell is not None and number in cell for cell in cells]
    assert Condition(f"{number} in mask_labels").select(table).tolist() == expected
    others = [cell is not None and number not in cell for cell in cells]
    assert Condition(f"{number} not in mask_labels").select(table).tolist() == others


@given(st.lists(LONG.map(float) | st.floats(allow_nan=False), min_size=1, max_size=4), LONG)
def test_an_integer_that_float64_rounds_is_compared_exactly_or_refused(
    labels: list[float], literal: int
) -> None:
    table = pa.table({"label": labels})
    for sign, compare in COMPARISONS.items():
        condition = Condition(f"label {sign} {literal}")
        if float(literal) != literal and float(literal) in labels:
            with pytest.raises(UsageError, match=rf"has {int(float(literal))} instead of {literal}"):
                condition.select(table)
        else:
            assert condition.select(table).tolist() == [compare(label, literal) for label in labels]


def test_a_decimal_finds_the_label_that_was_rounded_to_float64() -> None:
    table = pa.table({"label": [0.1, 1e23, 0.3], "code": ["0.1", "1e23", "0.30000000000000004"]})
    assert Condition("label == 0.1 or label in [1e23]").select(table).tolist() == [True, True, False]
    assert Condition("label == code").select(table).tolist() == [True, True, False]
    assert Condition("code == 0.3").select(table).tolist() == [False, False, False]


def test_a_number_beyond_float64_is_itself() -> None:
    table = pa.table({"code": ["1e400", "inf", "2e400", "1e-400"]})
    assert Condition("code == 1e400 or 0 < code < 1e-399").select(table).tolist() == [
        True,
        False,
        False,
        True,
    ]


def test_a_negative_number_keeps_its_digits() -> None:
    digits = "-20230115123456700.1234567890123456789"
    table = pa.table({"code": [f"{digits}1", f"{digits}2"]})
    assert Condition(f"code == {digits}1").select(table).tolist() == [True, False]


def test_numbers_as_other_programs_write_them_are_no_numbers() -> None:
    for cell in ("1_0", "\uff11", "nan(ind)", "1e99999999999999999999"):
        with pytest.raises(UsageError, match="which is not a number"):
            Condition("age > 1").select(pa.table({"row": [1], "example_id": ["a"], "age": [cell]}))


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
        ("age >", "is not a valid condition; "),
        ("", "is not a valid condition; "),
        ("age = 60", "is not a valid condition; "),
        ("not " * 50_000 + "age", "is not a valid condition; "),
        ("age" + ".b" * 50_000, "is not a valid condition; "),
        ("age", "'age' is not supported"),
        ("age > 60 and site", "'site' is not supported"),
        ("1 < 2", "'1' is not supported"),
        ("age.x > 1", "'age.x' is not supported"),
        ("age[0] > 1", "is not supported"),
        ("age + 1 > 60", r"'age \+ 1' is not supported"),
        ("age > True", "'True' is not supported"),
        ("age is None", "write == or != instead of is"),
        ("age in 'abc'", "is not supported"),
        ("age in []", "is not supported"),
        ("age in [1, 'a']", "is not supported"),
        ("'a' in site", "is not supported"),
        ("age > 1e99999999999999999999", "is not supported"),
        ("__import__('os').system('true') == 0", "is not supported"),
        ("(lambda: 1) == 1", "is not supported"),
        ("sex == 'F'", "has no column 'sex'; it has row, example_id, label, age, site, scan age, shape"),
        ("shape == 1", "each cell of shape is a list; write 3 in shape or 3 not in shape$"),
        ("mask_labels in [3]", "each cell of mask_labels is a list; write 3 in mask_labels or 3 not in"),
        ("'3' in mask_labels", "each cell of mask_labels is a list; write 3 in mask_labels or 3 not in"),
        ("label in mask_labels", "each cell of mask_labels is a list; write 3 in mask_labels or 3 not in"),
        ("[3, 4] in mask_labels", "each cell of mask_labels is a list; write 3 in mask_labels or 3 not in"),
        ("1 in zooms", "each cell of zooms is a list; use other columns$"),
        ("1 in sex", "has no column 'sex'"),
        ("label == '1'", "label is a number; compare it with a number, without quotes"),
        ("site > 1", r"site is 'A' in row 1 of the manifest \(sub-1\), which is not a number"),
    ],
)
def test_what_is_no_condition_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rows(text)
