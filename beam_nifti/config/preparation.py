"""The options that change a volume between loading and rescaling."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Final

from beam_nifti.errors import UsageError
from beam_nifti.support.calls import format_call, parse_call, split_call
from beam_nifti.support.rules import parse_rule, spell_rule

PREPARATIONS: Final = ("nonfinite", "preprocess", "orientation", "spacing", "crop_foreground", "shape")
"""Fields of RecordConfig for the preparation of a volume, in the order in which they apply."""

NONFINITE: Final = ("error", "zero", "min", "value:V")
"""What becomes of NaN and infinite voxels; V is in the image's units."""

ORIENTATIONS: Final = frozenset(
    "".join(letters)
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for letters in itertools.product(*axes)
)
"""Codes of the 48 orientations: the direction in which each of the three indices increases, as in nibabel."""

_LEAST_SPACING: Final = 1e-6
"""A nanometre, in mm. Quotients of smaller sizes overflow."""

_SHOWN_LENGTH: Final = 60
"""Characters of a text to show in an error. The text may come from a dataset."""


def check_steps(steps: tuple[str, ...], digests: tuple[str, ...]) -> None:
    """Refuse functions of `preprocess` that no spelling names, or that have too many or too few digests."""
    for step in steps:  # which is not parsed, as it may come from a dataset
        with _naming_step(step):
            split_call(step)
    if len(digests) not in (0, len(steps)):
        raise UsageError(
            f"--preprocess has {len(steps)} functions, but {len(digests)} digests of their files"
        )


def spell_nonfinite(rule: str) -> str | None:
    """Give what becomes of NaN and infinite voxels its one spelling; None if they are an error.

    >>> spell_nonfinite("value:-1024.0"), spell_nonfinite("value:0"), spell_nonfinite("error")
    ('value:-1024', 'zero', None)
    """
    method, numbers = parse_rule("--nonfinite", rule, NONFINITE)
    if method == "error":
        return None
    return "zero" if numbers == (0.0,) else spell_rule(method, numbers)


def check_orientation(code: str) -> None:
    """Refuse what is no code of an orientation."""
    if code not in ORIENTATIONS:
        raise UsageError(
            f"--orientation is {code!r}; write native, or three letters, one of each pair R/L, A/P and S/I, "
            "such as RAS or LPS"
        )


def check_spacing(spacing: tuple[float, ...]) -> None:
    """Refuse what is not three sizes of voxels in mm."""
    if not (len(spacing) == 3 and all(_LEAST_SPACING <= n < math.inf for n in spacing)):
        raise UsageError(
            f"--spacing is {_joined(spacing)}; give three sizes in mm, from {_LEAST_SPACING:g}, such as 1,1,1"
        )


def check_shape(shape: tuple[int, ...]) -> None:
    """Refuse what is not three numbers of voxels."""
    if not (len(shape) == 3 and all(n >= 1 for n in shape)):
        raise UsageError(f"--shape is {_joined(shape)}; give three numbers of voxels, such as 160,192,160")


@contextlib.contextmanager
def _naming_step(step: str) -> Iterator[None]:
    """Refuse, as an option, what is no call."""
    try:
        yield
    except ValueError as e:
        shown = step if len(step) <= _SHOWN_LENGTH else f"{step[:_SHOWN_LENGTH]}…"
        raise UsageError(
            f"--preprocess is {shown!r}; write it as package.module:function, or with literals as "
            "arguments, such as package.module:function(threshold=3)"
        ) from e


def spell_steps(given: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    """Give the functions of `RecordConfig.preprocess` their canonical spelling.

    Raises:
        UsageError: an entry does not name a function, or has arguments that are not literals.
    """
    steps = list[str]()
    for step in all_of(given):
        with _naming_step(step):
            steps.append(format_call(*parse_call(step)))
    return one_or_more(steps)


def all_of(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Give one or more values as a tuple."""
    return (given,) if isinstance(given, str) else tuple(given or ())


def one_or_more(given: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    """Give a single value as itself, and none as None."""
    found = all_of(given)
    return found[0] if len(found) == 1 else found or None


def _joined(numbers: tuple[float, ...]) -> str:
    return ",".join(f"{n:g}" for n in numbers)
