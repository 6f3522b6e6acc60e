"""Twins: names that are probably one, written in two ways."""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.manifest.tables import Problems
from beam_nifti.support.cells import MISSING_TEXTS

LIKENESS: Final = "only in letter case, quotes, spaces, leading zeros or the Unicode form"
"""In what the names that `fold` makes equal can differ."""

_REWRITTEN: Final = r"^[0-9]+\.0+$|^[0-9](\.[0-9]+)?[eE]\+[0-9]+$"
"""Numbers as spreadsheets and pandas rewrite ids: 7.0 in the place of 7, 1.23E+11 in that of 123456789012."""

_LEAST_LETTERS: Final = 3
_LEAST_DIGITS: Final = 5
"""Characters of a name below which other texts may be equal to it by chance."""

_BATCH: Final = 1 << 14
"""Rows that are Python strings at a time."""

_SHOWN: Final = 3
"""Twins that are named in warnings."""


def fold(names: pa.Array) -> pa.Array:
    """What is equal for names that are probably one.

    >>> fold(pa.array(["Sub-007", "sub-7", '"SUB-7"', "sub 7", "7.0"])).to_pylist()
    ['sub-7', 'sub-7', 'sub-7', 'sub7', '7']
    """
    folded = pc.utf8_lower(pc.utf8_normalize(names, form="NFKC"))
    folded = pc.replace_substring_regex(folded, r"""[\s\p{Z}\p{Cf}"']+""", "")
    folded = pc.replace_substring_regex(folded, r"^([0-9]+)\.0+$", r"\1")
    return pc.replace_substring_regex(folded, r"^([^0-9]*)0+([0-9]+)$", r"\1\2")


def find_twins(names: pa.Array, folded: pa.Array | None = None) -> list[tuple[int, int]]:
    """Find names that are probably those of earlier rows, written in another way.

    Args:
        names: one per row; "" is nobody's.
        folded: what is equal for twins, one per row; `fold` of the names by default.

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
    twins = np.flatnonzero((first != np.arange(len(rows))) & named & named[first])
    return [(int(rows[i]), int(rows[first[i]])) for i in twins]


def warn_of_names(
    what: str,
    names: pa.Array,
    problems: Problems,
    folded: pa.Array | None = None,
    *,
    is_anonymous: bool = False,
) -> None:
    """Warn of names that are probably one, and of names that a spreadsheet has rewritten.

    Args:
        what: the names are.
        names: one per row.
        problems: where to warn.
        folded: as for `find_twins`; for names that are made of others, which are checked by themselves.
        is_anonymous: whether warnings must not hold the names.
    """
    twins = find_twins(names, folded)
    for row, other in twins[:_SHOWN]:
        problems.warn(
            f"{_twin_text(what, names, row, other, is_anonymous)}; if they are the same, spell them alike"
        )
    if len(twins) > _SHOWN:
        problems.warn(
            f"in all, {len(twins):,} different values of {what} differ from an earlier one only in this way"
        )
    at = pc.index(pc.match_substring_regex(names, _REWRITTEN), True).as_py()
    if at >= 0 and folded is None:
        shown = "" if is_anonymous else f" {names[at]}"
        problems.warn(
            f"row {at + 1}: its {what}{shown} looks like a number that a spreadsheet or pandas has "
            "rewritten; store ids as text"
        )


def refuse_twins(names: pa.Array, problems: Problems, *, is_anonymous: bool = False) -> None:
    """Make problems of names that are probably one, where each would be drawn a split of its own."""
    for row, other in find_twins(names):
        text = _twin_text("name", names, row, other, is_anonymous)
        problems.add(f"{text}, and --split would treat them as two; spell them alike, or rename one")


def refuse_names(column: str, cells: pa.Array, names: pa.Array, problems: Problems) -> None:
    """Refuse a column that would give names away where pseudonyms stand for them.

    That is one with a cell that is one of the names, however spelled, or has that of its own row in it as a
    word; or with the name in every row, which is a warning where all are short numbers, as it may be chance.
    Other short names, and numbers of other rows, are not noticed.

    Args:
        column: that is written as it is.
        cells: of the column.
        names: that are not to be written, one per row.
        problems: where to report; without the names.
    """
    remedy = "which --anonymous-ids does not replace there; drop the column, or replace its values"
    row = _find_name(cells, names)
    if row is not None:
        problems.add(f"row {row + 1}: {column} has the name of a participant, or a path, {remedy}")
        return
    bare = (pc.replace_substring_regex(fold(texts), "^sub-?", "") for texts in (cells, names))
    pairs = pa.table(dict(zip(("cell", "name"), bare, strict=True)))
    pairs = pairs.filter(pc.invert(pc.is_in(pairs["cell"], value_set=pa.array(MISSING_TEXTS))))
    if len(pc.unique(pairs["cell"])) > 1 and pc.all(pc.equal(pairs["cell"], pairs["name"])).as_py():
        is_chance = pc.all(pc.match_substring_regex(pairs["cell"], "^[0-9]+$")).as_py()
        tell = problems.warn if is_chance else problems.add
        tell(f"{column} has the name or number of the participant in every row, {remedy}")


def _find_name(cells: pa.Array, names: pa.Array) -> int | None:
    """The first row whose cell has a name in it."""
    known = fold(pc.unique(names))
    is_text = pc.invert(pc.match_substring_regex(known, "^[0-9]*$"))
    known = known.filter(pc.and_(is_text, pc.greater_equal(pc.utf8_length(known), _LEAST_LETTERS)))
    encoded = cells.dictionary_encode()
    row = pc.index(pc.is_in(fold(encoded.dictionary), value_set=known).take(encoded.indices), True).as_py()
    if row >= 0:
        return int(row)
    for start in range(0, len(cells), _BATCH):
        pairs = (found.slice(start, _BATCH).to_pylist() for found in (cells, names))
        for number, (cell, name) in enumerate(zip(*pairs, strict=True), start):
            if len(name) >= (_LEAST_DIGITS if name.isdigit() else _LEAST_LETTERS) and _has_word(cell, name):
                return number
    return None


def _has_word(text: str, word: str) -> bool:
    """Whether a text has a word that no letter or digit goes on with, in any case."""
    text, word = text.lower(), word.lower()
    at = text.find(word)
    while at >= 0:
        end = at + len(word)
        if not (text[at - 1 : at].isalnum() or text[end : end + 1].isalnum()):
            return True
        at = text.find(word, at + 1)
    return False


def _twin_text(what: str, names: pa.Array, row: int, other: int, is_anonymous: bool) -> str:
    name, resembled = ("", " that") if is_anonymous else (f" {names[i].as_py()!r}" for i in (row, other))
    return f"row {row + 1}: its {what}{name} differs from{resembled} of row {other + 1} {LIKENESS}"
