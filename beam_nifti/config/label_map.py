"""The labels of masks that become other labels, as a text such as "4=3"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from beam_nifti.errors import UsageError
from beam_nifti.support.cells import parse_integer

_OLD: Final = range(-(1 << 31), 1 << 32)  # labels that files of int32 or uint32 may have; float64 is exact
_NEW: Final = range(1 << 16)


def parse_label_map(text: str) -> dict[int, int]:
    """The new label of each old one, without those that stay the same.

    >>> parse_label_map("4=3,0=0")
    {4: 3}

    Raises:
        UsageError: the text is no map, or as `make_label_map`.
    """
    rows = list[tuple[str, int, int]]()
    for part in text.split(","):
        try:
            old, new = map(parse_integer, part.split("="))
        except ValueError as e:
            raise UsageError(
                f"--map-labels is {text!r}; write each label once, as OLD=NEW of whole numbers, such as 4=3 "
                "or 4=3,10=0"
            ) from e
        rows.append(("--map-labels", old, new))
    return make_label_map(text, rows)


def make_label_map(given: str, rows: Iterable[tuple[str, int, int]]) -> dict[int, int]:
    """The new label of each old one, without those that stay the same.

    Args:
        given: value of the option.
        rows: where each label is mapped, for errors; the old label, and the new one.

    Raises:
        UsageError: a label is mapped twice or is out of range, or all are mapped to themselves.
    """
    labels = dict[int, int]()
    for where, old, new in rows:
        if old in labels:
            raise UsageError(f"{where} maps {old} twice, to {labels[old]} and to {new}; drop one")
        if old not in _OLD or new not in _NEW:
            wrong, allowed = (old, _OLD) if old not in _OLD else (new, _NEW)
            raise UsageError(
                f"{where} has {old}={new}, but {wrong} is not from {allowed[0]} to {allowed[-1]}; choose "
                "another label"
            )
        labels[old] = new
    changed = {old: new for old, new in labels.items() if old != new}
    if not changed:
        raise UsageError(f"--map-labels is {given!r}, which maps every label to itself; drop it")
    return changed


def spell_label_map(labels: Mapping[int, int]) -> str:
    """The one spelling of what `parse_label_map` gives."""
    return ",".join(f"{old}={new}" for old, new in sorted(labels.items()))
