"""Labels: the kind of each column of them, and what its cells become.

Source: docs/format.md, "Labels".
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.config import LabelColumn
from beam_nifti.errors import ShardError
from beam_nifti.manifest.lookalikes import LIKENESS, find_lookalikes
from beam_nifti.manifest.tables import Problems, strings
from beam_nifti.support.cells import is_missing, parse_number
from beam_nifti.support.wording import first_few, one_line

SHOWN_CLASSES: Final = 10  # names of classes to show
NO_CLASS: Final = -1  # number of the class of a row without one
MAX_CLASSES: Final = 1 << 14  # of a column; all are in dataset_info.json and in the job graph

_LIKE_MISSING: Final = frozenset(["NA", "#N/A", "<NA>", "NaT", "null", "NULL", "None"])
"""What other programs write where there is no value; it may also be the name of a class."""

_INTEGER: Final = re.compile(r"[+-]?\d{1,18}", re.ASCII)
_FLOAT32_END: Final = float(np.finfo(np.float32).max) * (1 + 2.0**-25)  # larger numbers round to infinity

_NUMBER_LIKE: Final = re.compile(r"[+-]?\s*\d+([.,]\d+|[\s'’]\d{3}(?!\d))*\s*%?")
"""Numbers as spreadsheets and documents write them, with a decimal comma, separators or a percent sign."""

_MINUS: Final = re.compile("[\u2010-\u2015\u2212]")  # dashes that documents write as minus signs
_FLOAT32_INTEGERS: Final = 1 << 24  # up to which float32 has every integer
_FLOAT32_NORMAL: Final = 2.0**-126  # below which float32 has fewer digits, down to none
_FLOAT32_ERROR: Final = Decimal(2) ** -24  # largest relative error of normal numbers
_SHOWN: Final = 3  # rows and classes named in a warning
LabelValue = float | int | str


@dataclass(frozen=True)
class Labels:
    """The labels of one column, one per row of the manifest.

    Attributes:
        column: column with its kind and its classes.
        values: float64, NaN if missing; int64, NO_CLASS if missing; or string, "" if missing.
        is_missing: which rows have no label.
    """

    column: LabelColumn
    values: pa.Array
    is_missing: npt.NDArray[np.bool_]

    @property
    def numbers(self) -> npt.NDArray[np.float64]:
        """The feature `label` of each row: the number, that of the class, or NaN for a string."""
        if self.column.kind == "string":
            return np.full(len(self.values), np.nan)
        return np.asarray(self.values, np.float64)


def parse_label(text: str) -> float:
    """The number in a cell; NaN if it is not a number, or not a float32."""
    try:
        value = parse_number(text)
    except ValueError:
        return math.nan
    return value if abs(value) < _FLOAT32_END else math.nan


def read_labels(
    cells: pa.ChunkedArray,
    column: LabelColumn,
    missing: str | None,
    problems: Problems,
    default: str | None = None,
) -> Labels:
    """Make labels of a column's cells.

    A column without a kind is "float" if all its values are finite float32 numbers, "class" if none is a
    number, and `default` if all are missing; without a default that is a problem. `missing` is
    `Columns.missing_label`.
    """
    encoded = cells.combine_chunks().dictionary_encode()
    texts, codes = encoded.dictionary, encoded.indices.to_numpy()
    lacks = _find_missing(texts)
    numbers = _numbers(texts)
    is_number = np.isfinite(numbers)
    remedy = ""
    if column.kind is None:
        are_numeric = [_is_numeric(text) for text in strings(texts.filter(pa.array(~lacks)))]
        kind = ("float" if any(are_numeric) else "class") if are_numeric else default
        if kind is None:
            problems.add(
                f"every value of {column.name} is missing, so its kind is unknown; drop it from "
                f"--label-column, or give its kind, such as {column.name}:float"
            )
        if kind == "float" and are_numeric:
            remedy = f"; correct it, or make classes of all labels with --label-column {column.name}:class"
        column = replace(column, kind=kind or "float")
    if missing is None:
        for i in np.flatnonzero(lacks[codes]):
            problems.add(
                f"row {i + 1}: {column.name} is {problems.shown(texts[codes[i]].as_py())}, a missing label; "
                "fill it in, keep such rows with --missing-label nan, or skip them with --missing-label skip"
            )
    if column.kind == "float":
        for i in np.flatnonzero(~(is_number | lacks)[codes]):
            text = problems.shown(texts[codes[i]].as_py())
            problems.add(f"row {i + 1}: {column.name} is {text}, not a finite float32 number{remedy}")
        _warn_of_rounding(column.name, texts, numbers, codes, problems)
        values = pa.array(numbers)
    elif column.kind == "class":
        column = replace(column, classes=_classes(texts.filter(pa.array(~lacks)), column.name, problems))
        found = pc.index_in(texts, value_set=pa.array(column.classes, pa.string()))
        values = pc.fill_null(found, NO_CLASS).cast(pa.int64())
    else:
        values = pc.if_else(pa.array(lacks), "", texts)
    return Labels(column, values.take(encoded.indices), lacks[codes])


def label_of(cell: str | None, column: LabelColumn) -> LabelValue:
    """The label in a cell of an index, which is missing if there is none.

    A ShardError if it is not of the column's kind, or not one of its classes.
    """
    cell = cell or ""
    has_none = is_missing(cell)
    if column.kind == "float":
        number = parse_label(cell)
        if has_none or math.isfinite(number):
            return number
    elif column.kind == "class":
        if has_none or cell in column.numbers:
            return NO_CLASS if has_none else column.numbers[cell]
    else:
        return "" if has_none else cell
    raise ShardError(
        f"the index has {cell!r} in {column.name}, which does not match {column} in dataset_info.json"
    )


def name_classes(classes: Sequence[str]) -> str:
    """The first classes, for people to read."""
    return first_few([one_line(name) for name in classes], SHOWN_CLASSES)


def number_of(label: LabelValue) -> float | None:
    """The value of the feature `label` of a record with this first label; None for NaN."""
    return None if isinstance(label, str) or math.isnan(label) else float(label)


def comparable(cells: pa.ChunkedArray, column: LabelColumn) -> pa.Array:
    """Cells as values that are equal if the labels are: float64 or string, null if missing."""
    encoded = cells.combine_chunks().dictionary_encode()
    texts = encoded.dictionary
    values = pa.array(_numbers(texts)) if column.kind == "float" else texts
    return pc.if_else(pa.array(_find_missing(texts)), None, values).take(encoded.indices)


def _find_missing(texts: pa.Array) -> npt.NDArray[np.bool_]:
    return np.fromiter(map(is_missing, strings(texts)), np.bool_, len(texts))


def _numbers(texts: pa.Array) -> npt.NDArray[np.float64]:
    return np.fromiter(map(parse_label, strings(texts)), np.float64, len(texts))


def _classes(texts: pa.Array, name: str, problems: Problems) -> tuple[str, ...]:
    """The different values of a column, in the order of their numbers."""
    if len(texts) > MAX_CLASSES:
        problems.add(
            f"{name} has {len(texts):,} different values, such as {problems.shown(texts[0].as_py())}, but at "
            f"most {MAX_CLASSES:,} classes are possible; use {name}:string, or, if all should be numbers, "
            f"{name}:float to find those that are not"
        )
        return ()
    classes = sorted(texts.to_pylist())
    if all(map(_INTEGER.fullmatch, classes)):
        classes.sort(key=int)
    _warn_of_classes(name, classes, problems)
    return tuple(classes)


def _warn_of_classes(name: str, classes: Sequence[str], problems: Problems) -> None:
    for i, other in find_lookalikes(pa.array(classes, pa.string()))[:_SHOWN]:
        problems.warn(
            f"{name} has the classes {problems.shown(classes[other])} and {problems.shown(classes[i])}, "
            f"which differ {LIKENESS}; if they are the same class, spell them the same way"
        )
    for text in [text for text in classes if text in _LIKE_MISSING][:_SHOWN]:
        problems.warn(
            f"{name} has a class {text!r}; if that means no value, write n/a or leave the cell empty"
        )


def _is_numeric(text: str) -> bool:
    """Whether a cell looks like a number, including one that cannot be a label."""
    plain = _MINUS.sub("-", unicodedata.normalize("NFKC", text)).strip()
    try:
        float(plain)
    except ValueError:
        return _NUMBER_LIKE.fullmatch(plain) is not None
    return True


def _warn_of_rounding(
    name: str,
    texts: pa.Array,
    numbers: npt.NDArray[np.float64],
    codes: npt.NDArray[np.int32],
    problems: Problems,
) -> None:
    """Warn of labels that float32 changes to another integer, or to fewer digits near 0."""
    is_other = np.zeros(len(texts), np.bool_)
    for i in np.flatnonzero(np.abs(numbers) > _FLOAT32_INTEGERS):
        is_other[i] = abs(Decimal(texts[int(i)].as_py()) - _stored(numbers[i])) >= Decimal("0.5")
    for i in np.flatnonzero(np.abs(numbers) < _FLOAT32_NORMAL):
        exact, stored = Decimal(texts[int(i)].as_py()), _stored(numbers[i])
        is_other[i] = abs(exact - stored) > abs(exact) * _FLOAT32_ERROR if stored else bool(exact)
    rows = np.flatnonzero(is_other[codes])
    if rows.size:
        first = int(codes[rows[0]])
        stored = _stored(numbers[first])
        others = "no other is affected"
        if rows.size > 1:
            others = f"{rows.size:,} labels are affected (rows {first_few((rows + 1).tolist(), _SHOWN)})"
        text = problems.plain(f"{stored:f}" if abs(stored) > 1 else f"{stored:.6g}")
        problems.warn(
            f"{name} is {problems.plain(texts[first])} in row {rows[0] + 1}, but records store float32, "
            f"which rounds it to {text}; {others}. To store them exactly, use --label-column {name}:class "
            f"or {name}:string"
        )


def _stored(number: float) -> Decimal:
    with np.errstate(under="ignore"):
        return Decimal(float(np.float32(number)))
