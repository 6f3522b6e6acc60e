"""Texts as numbers or missing values, for cells of tables and values of options.

Only numbers that every program reads alike are accepted. Python alone would also accept 1_0 and the digits of
other scripts.
"""

from __future__ import annotations

import re
from numbers import Real
from typing import Final

MISSING_TEXTS: Final = ("", "n/a", "nan", "-nan", "+nan")
"""What stands in a table's cell without a value, whatever its case and the white space around it: also what
Python's `float` takes for NaN. n/a is how BIDS writes it."""

_INTEGER: Final = re.compile(r"[+-]?\d+", re.ASCII)
_NUMBER: Final = re.compile(
    r"[+-]?(?:(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,9})?|inf(?:inity)?)", re.ASCII | re.IGNORECASE
)


def is_missing(text: str) -> bool:
    """Whether a cell has no value."""
    return text.strip().lower() in MISSING_TEXTS


def parse_number(text: str) -> float:
    """The number that a text spells, or infinity; `Decimal` accepts the same texts.

    Other texts are a ValueError.
    """
    if not _NUMBER.fullmatch(text.strip()):
        raise ValueError(f"{text!r} is not a number")
    return float(text)


def as_float(number: Real) -> float:
    """A number as a float. A numpy number becomes the float that it prints, so that float32's 0.7 is 0.7."""
    return float(str(number) if hasattr(number, "dtype") else number)


def parse_integer(text: str) -> int:
    """The integer that a text spells. Other texts are a ValueError."""
    if not _INTEGER.fullmatch(text.strip()):
        raise ValueError(f"{text!r} is not an integer")
    return int(text)
