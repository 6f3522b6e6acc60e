"""Detects names that pseudonyms replace in columns that are kept unchanged."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.config import Columns
from beam_nifti.manifest.image_names import ENDING
from beam_nifti.manifest.lookalikes import fold
from beam_nifti.manifest.tables import Problems, strings
from beam_nifti.support.cells import MISSING_TEXTS

Kind = Literal["id", "session", "path"]

_LEAST_LETTERS: Final = 3
_LEAST_DIGITS: Final = 5
_LEAST_OF_FILE: Final = 6  # characters of a name or a file's; shorter texts may be equal by chance
_ENDING: Final = f"(?i){ENDING}$"
_PREFIX: Final = "(?i)^(sub|ses)[-_]?"
_NUMBER: Final = "^[0-9]*$"
_LONG_NUMBER: Final = f"^[0-9]{{{_LEAST_DIGITS},}}$"
_REMEDY: Final = "which --anonymous-ids does not replace there; drop the column, or replace its values"


@dataclass(frozen=True)
class _Names:
    """The names in a column that pseudonyms replace, and how other columns would reveal them.

    Attributes:
        texts: names in the column, one per row.
        bare: form that all spellings of a name share, one per row.
        kind: kind of the names.
        certain: forms that a spelling of another text has only if it is a copy.
        possible: forms that a spelling of another text may also have by chance.
        files: results of `_key` that a text with an image's ending has only if it is a copy.
        words: words of each row that a text of the row contains only if it is a copy; "" for none.
    """

    texts: pa.Array
    bare: pa.Array
    kind: Kind
    certain: pa.Array
    possible: pa.Array
    files: pa.Array
    words: tuple[pa.Array, ...]

    @classmethod
    def of(cls, texts: pa.Array, kind: Kind) -> _Names:
        """The names of a column."""
        encoded, none = texts.dictionary_encode(), pa.array([], pa.string())
        known = encoded.dictionary
        keys = _key(known)
        bare = _bare(keys).take(encoded.indices)
        if kind == "path":
            # Files of one name in several folders, such as T1w.nii, are not known by it.
            counts = pc.value_counts(keys)
            files = counts.field("values").filter(pc.equal(counts.field("counts"), 1))
            names = _letters(files, 2)
            is_long = pc.greater_equal(pc.utf8_length(names), _LEAST_OF_FILE)
            certain, short = names.filter(is_long), names.filter(pc.invert(is_long))
            own = pc.if_else(pc.is_in(keys, value_set=files).take(encoded.indices), _base(texts), "")
            words = (_words(texts), _words(own, _LEAST_OF_FILE))
            certain = pa.concat_arrays([certain, _letters(fold(known), _LEAST_LETTERS)])
            return cls(texts, bare, kind, certain, short, files, words)
        cut = pc.replace_substring_regex(texts, _PREFIX, "")
        words = (_words(texts), pc.if_else(pc.match_substring_regex(cut, _LONG_NUMBER), cut, ""))
        spelled = _letters(pa.concat_arrays([keys, _bare(keys)]), _LEAST_LETTERS)
        if kind == "id":
            return cls(texts, bare, kind, spelled, none, none, words)
        # A session may be called by a word that has other meanings, such as test or baseline.
        is_certain = pc.match_substring_regex(spelled, "[0-9]|^ses.")
        is_word = pc.match_substring_regex(texts, "(?i)[0-9]|^ses-")
        words = (pc.if_else(is_word, words[0], ""), words[1])
        possible = spelled.filter(pc.invert(is_certain))
        return cls(texts, bare, kind, spelled.filter(is_certain), possible, none, words)


def refuse_leaks(table: pa.Table, columns: Columns, problems: Problems) -> None:
    """Refuse kept columns that contain names that pseudonyms replace. The problems do not show the names."""
    kinds: dict[str | None, Kind] = {columns.id: "id", "participant_id": "id", "session_id": "session"}
    kinds |= dict.fromkeys(columns.files, "path")
    at = {name: number for number, name in enumerate(table.column_names, 1)}
    names = [_Names.of(table[n].combine_chunks(), kind) for n, kind in kinds.items() if n in at]
    kept = [(number, name) for name, number in at.items() if name not in kinds]
    _refuse_headers(kept, names, problems)
    problems.stop()  # what is found later may show names of columns
    for _, column in kept:
        _refuse_names(column, table[column].combine_chunks(), names, problems)
    problems.stop()  # what is found later may show cells


def _refuse_names(column: str, cells: pa.Array, names: Sequence[_Names], problems: Problems) -> None:
    """Refuse a column that would reveal names that pseudonyms replace.

    It has a cell that is a name or an image's file name, in any spelling, or that contains a name of its own
    row as a word; or it has the name of every row. What may be chance is a warning: short numbers in every
    row, short file names, and names of sessions without a digit. Other short names, and numbers of other
    rows, are not detected.
    """
    what = "the name of a participant, a session or an image"
    spellings = _Spellings(cells)
    for of in names:
        if (row := _find_copy(cells, spellings, of)) is not None:
            problems.add(f"row {row + 1}: {column} has {what}, {_REMEDY}")
            return
    everywhere = [is_long for of in names if (is_long := _copies_all(spellings, of)) is not None]
    if everywhere:
        tell = problems.add if any(everywhere) else problems.warn
        tell(f"{column} has the name or number of the participant, session or image in every row, {_REMEDY}")
        return
    for of in names:
        if of.kind != "id" and (row := spellings.first_in(of.possible)) is not None:
            problems.warn(f"row {row + 1}: {column} has {what}, perhaps by chance, {_REMEDY}")
            return


def _refuse_headers(columns: Sequence[tuple[int, str]], names: Sequence[_Names], problems: Problems) -> None:
    """Refuse columns, given by number, whose name is one that a pseudonym replaces."""
    for number, column in columns:
        header = pa.array([column])
        is_number = pc.match_substring_regex(header, _LONG_NUMBER)[0].as_py()
        for of in names:
            is_name = _Spellings(header).first_in(of.certain) is not None
            if is_name or (is_number and any(pc.index(words, column).as_py() >= 0 for words in of.words)):
                problems.add(
                    f"the name of column {number} is that of a participant, a session or an image, which "
                    "--anonymous-ids does not replace there; rename or drop it"
                )
                break


class _Spellings:
    """The texts of a column in the forms that are compared with names, each text once."""

    def __init__(self, cells: pa.Array) -> None:
        encoded = cells.dictionary_encode()
        self.rows, self.texts = encoded.indices, encoded.dictionary
        self.keys = _key(self.texts)
        self.folded, self.bare = fold(self.texts), _bare(self.keys)

    def first(self, is_found: pa.Array) -> int | None:
        at = pc.index(is_found.take(self.rows), True).as_py()
        return int(at) if at >= 0 else None

    def first_in(self, known: pa.Array) -> int | None:
        is_known = [pc.is_in(texts, value_set=known) for texts in (self.folded, self.keys, self.bare)]
        return self.first(pc.or_(pc.or_(is_known[0], is_known[1]), is_known[2]))


def _find_copy(cells: pa.Array, spellings: _Spellings, names: _Names) -> int | None:
    """The first row whose cell certainly contains a name."""
    is_file = pc.match_substring_regex(spellings.texts, _ENDING)
    is_of_file = pc.and_(is_file, pc.is_in(spellings.keys, value_set=names.files))
    found = [spellings.first_in(names.certain), spellings.first(is_of_file)]
    if names.kind == "path" and pc.any(is_file).as_py():
        rows = pc.indices_nonzero(is_file.take(spellings.rows))
        ends, own = (
            pc.extract_regex(texts.take(rows), r"(?s)(?P<end>[^/\\]+[/\\][^/\\]+)$").field("end")
            for texts in (cells, names.texts)
        )
        at = pc.index(pc.equal(ends, own), True).as_py()
        found.append(rows[at].as_py() if at >= 0 else None)
    if any(row is not None for row in found):
        return min(row for row in found if row is not None)
    for words in names.words:
        for number, (cell, word) in enumerate(zip(strings(cells), strings(words), strict=True)):
            if word and len(word) <= len(cell) and _has_word(cell, word):
                return number
    return None


def _copies_all(spellings: _Spellings, names: _Names) -> bool | None:
    """Whether the names are more than short numbers, if they are all values of the column; otherwise None."""
    is_missing = pc.is_in(spellings.folded, value_set=pa.array(MISSING_TEXTS)).take(spellings.rows)
    bare = spellings.bare.take(spellings.rows)
    told, own = (texts.filter(pc.invert(is_missing)) for texts in (bare, names.bare))
    if len(pc.unique(told)) < 2 or not pc.all(pc.equal(told, own)).as_py():
        return None
    return not pc.all(pc.match_substring_regex(told, _NUMBER)).as_py()


def _base(texts: pa.Array) -> pa.Array:
    """The name of the file that a text may be the path of, without an image's ending."""
    if pc.any(pc.match_substring(texts, "%")).as_py():
        texts = pa.array([unquote(text) for text in strings(texts)], pa.string())
    texts = pc.replace_substring_regex(texts, r"(?s)^.*[/\\]([^/\\])", r"\1")
    return pc.replace_substring_regex(texts, _ENDING, "")


def _key(texts: pa.Array) -> pa.Array:
    """What is equal for names that are probably one, and for files of one name, whatever divides its words.

    >>> _key(pa.array(["/data/Maier_Hans.nii.gz", "maier-hans", "sub_007"])).to_pylist()
    ['maierhans', 'maierhans', 'sub7']
    """
    return pc.replace_substring_regex(fold(_base(texts)), r"[\p{Pd}_./\\]+", "")


def _bare(keys: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(pc.replace_substring_regex(keys, _PREFIX, ""), "^0+([0-9]+)$", r"\1")


def _letters(keys: pa.Array, least: int) -> pa.Array:
    """Those that have at least so many characters and are not numbers."""
    is_number = pc.match_substring_regex(keys, _NUMBER)
    return keys.filter(pc.and_not(pc.greater_equal(pc.utf8_length(keys), least), is_number))


def _words(texts: pa.Array, least: int = _LEAST_LETTERS) -> pa.Array:
    """The texts that are long enough to be searched for in others; "" replaces the rest."""
    needed = pc.if_else(pc.match_substring_regex(texts, _NUMBER), _LEAST_DIGITS, least)
    return pc.if_else(pc.greater_equal(pc.utf8_length(texts), needed), texts, "")


def _has_word(text: str, word: str) -> bool:
    """Whether a text contains a word, in any case, that no letter or digit continues."""
    text, word = text.lower(), word.lower()
    # Most texts do not have it at all, and to compile a pattern takes a hundred times longer.
    return word in text and re.search(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])", text) is not None
