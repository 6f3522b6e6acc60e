from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.errors import UsageError
from beam_nifti.read.split_spec import parse_split


def positions(spec: str, count: int = 10) -> list[int]:
    return [n for part in parse_split(spec) for n in part.positions(count)]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("train", range(10)),
        ("train[:]", range(10)),
        ("train[:80%]", range(8)),
        ("train[80%:]", range(8, 10)),
        ("train[-20%:]", range(8, 10)),
        ("train[2:5]", range(2, 5)),
        ("train[ 2 : 5 ]", range(2, 5)),
        ("train[-3:]", range(7, 10)),
        ("train[:-3]", range(7)),
        ("train[5:2]", ()),
        ("train[10:]", ()),
        ("train[25%:75%]", range(2, 8)),
        ("train[:2]+train[8:]", (0, 1, 8, 9)),
    ],
)
def test_slices_are_those_of_tensorflow_datasets(spec: str, expected: object) -> None:
    assert positions(spec) == list(expected)  # type: ignore[call-overload]


@given(st.integers(0, 10_000), st.integers(0, 100))
def test_two_shares_make_the_whole(count: int, percent: int) -> None:
    assert positions(f"a[:{percent}%]+a[{percent}%:]", count) == list(range(count))


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "+",
        "train+",
        "train[",
        "train[1]",
        "train[:x]",
        "train[::2]",
        "train[:80 %]",
        "a b",
        "train[:\uff11]",
    ],
)
def test_what_is_no_split_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match=r"split is .*; write the name of a split"):
        parse_split(spec)


@pytest.mark.parametrize("spec", [None, 3, ["train"]])
def test_what_is_no_text_is_refused(spec: Any) -> None:
    with pytest.raises(TypeError, match=r"split is .*; give text, such as 'train'"):
        parse_split(spec)


@pytest.mark.parametrize("spec", ["train[:11]", "train[-11:]", "train[:101%]", "train[-100.5%:]"])
def test_slices_beyond_the_split_are_refused(spec: str) -> None:
    with pytest.raises(UsageError, match=r"reaches beyond the 10 records of 'train'"):
        positions(spec)
