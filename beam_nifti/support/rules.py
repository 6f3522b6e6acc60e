"""Texts of a name and numbers, such as "window:-160,240"."""

from __future__ import annotations

import math
from collections.abc import Sequence

from beam_nifti.errors import UsageError
from beam_nifti.support.cells import parse_number


def parse_rule(flag: str, text: str, forms: Sequence[str]) -> tuple[str, tuple[float, ...]]:
    """Take a text apart into its name and numbers.

    >>> parse_rule("--rescale", "window:-160,240", ["window:LO,HI", "none"])
    ('window', (-160.0, 240.0))
    >>> parse_rule("--rescale", "cohort:zscore", ["cohort:zscore", "cohort:percentile:LO,HI"])
    ('cohort:zscore', ())

    Args:
        flag: option that has the text as its value, for errors.
        text: text to take apart.
        forms: forms that the text may have, such as "window:LO,HI".

    Raises:
        UsageError: it has none of the forms, or a number is not finite.
    """
    form = next((f for f in forms if f"{text}:".startswith(f"{name_of_form(f)}:")), None)
    if form is None:
        raise UsageError(f"{flag} is {text!r}; choose one of: {', '.join(forms)}")
    name = name_of_form(form)
    colon, cells = text[len(name) : len(name) + 1], text[len(name) + 1 :]
    try:
        numbers = tuple(parse_number(cell) + 0.0 for cell in cells.split(",")) if colon else ()
    except ValueError:
        numbers = (math.nan,)
    wanted = form[len(name) + 1 :].split(",") if form != name else []
    if len(numbers) != len(wanted) or not all(map(math.isfinite, numbers)):
        hint = ", with finite numbers" if wanted else ""
        raise UsageError(f"{flag} is {text!r}; write it as {form}{hint}")
    return name, numbers


def name_of_form(form: str) -> str:
    """The name in a form of values, without what stands for numbers, such as "window" in "window:LO,HI"."""
    name, _, cells = form.rpartition(":")
    return name if cells.isupper() else form


def spell_rule(name: str, numbers: tuple[float, ...]) -> str:
    """The one spelling of what `parse_rule` takes apart."""
    return ":".join([name, *([",".join(repr(n).removesuffix(".0") for n in numbers)] if numbers else [])])


def threshold_of(selection: str) -> float | None:
    """The T of `above:T`; None for `nonzero`. `parse_rule` must have accepted the selection."""
    return float(selection.partition(":")[2]) if ":" in selection else None
