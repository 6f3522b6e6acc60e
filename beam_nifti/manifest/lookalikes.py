"""Detects two spellings of one name."""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.manifest.tables import Problems

LIKENESS: Final = "only in letter case, quotes, spaces, leading zeros or the Unicode form"
"""How names that `fold` makes equal can differ."""

_REWRITTEN: Final = r"^[0-9]+\.0+$|^[0-9](\.[0-9]+)?[eE]\+[0-9]+$"
"""Numbers as spreadsheets and pandas rewrite ids: 7.0 in the place of 7, 1.23E+11 in that of 123456789012."""

_SHOWN: Final = 3  # lookalikes that are named in warnings


def fold(names: pa.Array) -> pa.Array:
    """A text that is equal for names that are probably the same.

    >>> fold(pa.array(["Sub-007", "sub-7", '"SUB-7"', "sub 7", "7.0"])).to_pylist()
    ['sub-7', 'sub-7', 'sub-7', 'sub7', '7']
    """
    folded = pc.utf8_lower(pc.utf8_normalize(names, form="NFKC"))
    folded = pc.replace_substring_regex(folded, r"""[\s\p{Z}\p{Cf}"']+""", "")
    folded = pc.replace_substring_regex(folded, r"^([0-9]+)\.0+$", r"\1")
    return pc.replace_substring_regex(folded, r"^([^0-9]*)0+([0-9]+)$", r"\1\2")


def find_lookalikes(names: pa.Array, folded: pa.Array | None = None) -> list[tuple[int, int]]:
    """Find names (not "") that are probably another spelling of an earlier name.

    `folded` has equal texts for lookalikes; by default it is `fold` of the names.

    Returns:
        The first row of each such name, ascending, and the first row of the name that it resembles.
    """
    encoded = names.dictionary_encode()
    rows = np.unique(encoded.indices.to_numpy(), return_index=True)[1]  # where each name comes first
    keys = (fold(encoded.dictionary) if folded is None else folded.take(pa.array(rows))).dictionary_encode()
    if len(keys.dictionary) == len(rows):
        return []
    groups = keys.indices.to_numpy()
    first = np.unique(groups, return_index=True)[1][groups]
    named = pc.not_equal(encoded.dictionary, "").to_numpy(zero_copy_only=False)
    lookalikes = np.flatnonzero((first != np.arange(len(rows))) & named & named[first])
    return [(int(rows[i]), int(rows[first[i]])) for i in lookalikes]


def warn_of_names(what: str, names: pa.Array, problems: Problems, folded: pa.Array | None = None) -> None:
    """Warn of names that are probably the same, and of numbers that a spreadsheet rewrote.

    `folded` is as for `find_lookalikes`; numbers are not checked then.
    """
    lookalikes = find_lookalikes(names, folded)
    for row, other in lookalikes[:_SHOWN]:
        text = _lookalike_text(what, names, row, other, problems)
        problems.warn(f"{text}; if they are the same, spell them alike")
    if len(lookalikes) > _SHOWN:
        problems.warn(
            f"in all, {len(lookalikes):,} different values of {what} differ from an earlier one only in this "
            "way"
        )
    at = pc.index(pc.match_substring_regex(names, _REWRITTEN), True).as_py()
    if at >= 0 and folded is None:
        shown = "" if problems.hides_cells else f" {names[at]}"
        problems.warn(
            f"row {at + 1}: its {what}{shown} looks like a number that a spreadsheet or pandas has "
            "rewritten; store ids as text"
        )


def refuse_lookalikes(what: str, names: pa.Array, problems: Problems) -> None:
    """Refuse names that are probably the same, because each would be drawn a split of its own."""
    for row, other in find_lookalikes(names):
        text = _lookalike_text(what, names, row, other, problems)
        problems.add(f"{text}, and --split would treat them as two; spell them alike, or rename one")


def _lookalike_text(what: str, names: pa.Array, row: int, other: int, problems: Problems) -> str:
    name, resembled = "", " that"
    if not problems.hides_cells:
        name, resembled = (f" {names[i].as_py()!r}" for i in (row, other))
    return f"row {row + 1}: its {what}{name} differs from{resembled} of row {other + 1} {LIKENESS}"
