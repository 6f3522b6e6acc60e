"""Conditions on records, such as `age > 60 and site == 'A'`, evaluated on the index.

The notation is that of Python's comparisons. Python parses the text, and never runs it.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.errors import UsageError
from beam_nifti.support.cells import is_missing, parse_number

_COMPARISONS: Final[Mapping[type[ast.cmpop], Callable[..., Any]]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass(frozen=True, slots=True)
class _Operand:
    """One side of a comparison: a column of the index, or a literal.

    Attributes:
        cells: distinct cells of the column, with None for missing ones; or the literal. Numbers that are
            written as text are exact: int or Decimal.
        name: name of the column; "" for a literal.
        numbers: number of each row's cell in `cells`; None for a literal.
        is_number: whether the cells are numbers.
        is_rounded: whether the cells are float64, to which the manifest's cells were rounded.
    """

    cells: Sequence[Any]
    name: str = ""
    numbers: npt.NDArray[np.int64] | None = None
    is_number: bool = True
    is_rounded: bool = False


class Condition:
    """A condition on records.

    It consists of columns of the index, numbers, strings, lists, `==`, `!=`, `<`, `<=`, `>`, `>=`, `in`,
    `not in`, `and`, `or`, `not` and parentheses. `column('scan age')` is a column whose name is not a Python
    name. If a column of strings is compared with numbers, its cells are read as numbers, exactly. Of a column
    of lists of integers, `3 in mask_labels` and `3 not in mask_labels` are conditions.
    A comparison with a missing cell (null, empty, `n/a` or NaN) is neither true nor false, so it selects no
    record, even after `not`. A comparison with such a text, as in `site == ''`, compares the text of cells.

    Attributes:
        columns: names of the columns in the condition.

    Raises:
        UsageError: the text is not a condition.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
            self.columns = frozenset(_columns_below(self._tree))
        except (SyntaxError, ValueError, MemoryError, RecursionError) as e:  # the latter two: it is too long
            raise UsageError(f"where is {text!r:.999}, which is not a valid condition; {_EXPLANATION}") from e

    def select(self, table: pa.Table, texts: Mapping[str, str] | None = None) -> npt.NDArray[np.bool_]:
        """Whether the condition is true, for each row.

        Args:
            table: rows of an index, with the columns of the condition, and `row` and `example_id`.
            texts: for messages: the column that has the texts, for each column of their numbers.

        Raises:
            UsageError: the condition is not supported, a column does not exist, a cell that is compared with
                a number is not one, or a column of float64 cannot hold the integer that it is compared with.
        """
        truth = pc.fill_null(_Evaluation(self._text, table, texts or {}).condition(self._tree), False)
        return np.asarray(truth, np.bool_)


_EXPLANATION: Final = (
    "compare columns of the index with numbers or strings, as in age > 60 and site in ['A', 'B']"
)


def _column_of(node: ast.AST) -> str | None:
    """The name of the column, if a node is one."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "column":
        match node:
            case ast.Call(args=[ast.Constant(value=str() as name)], keywords=[]):
                return name
    return None


def _written(name: str) -> str:
    """The notation of a column in a condition."""
    return name if name.isidentifier() else f"column({name!r})"


def _has_integers(kind: pa.DataType) -> bool:
    """Whether a column of this type consists of lists of integers."""
    return bool(pa.types.is_list(kind) and pa.types.is_integer(kind.value_type))


def _columns_below(node: ast.AST) -> Iterator[str]:
    name = _column_of(node)
    if name is not None:
        yield name
        return
    for child in ast.iter_child_nodes(node):
        yield from _columns_below(child)


def _exact(text: str) -> int | Decimal | None:
    """A cell as a number, of any length; None if it is not one."""
    bare = text.strip()
    try:
        parse_number(bare)
        return int(bare) if bare.isdecimal() else Decimal(bare)  # the former is fast
    except ValueError:
        return None


def _is_missing_text(node: ast.expr) -> bool:
    """Whether a literal is the text of a missing cell, so that the condition selects these cells."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and is_missing(node.value)


def _has_no_value(cell: Any) -> bool:
    return cell is None or (is_missing(cell) if isinstance(cell, str) else cell != cell)


class _Evaluation:
    def __init__(self, text: str, table: pa.Table, texts: Mapping[str, str]) -> None:
        self._text, self._table, self._texts = text, table, texts

    def condition(self, node: ast.expr) -> Any:
        """The value of a node for each row: true, false, or null."""
        match node:
            case ast.BoolOp(op=op, values=values):
                join = pc.and_kleene if isinstance(op, ast.And) else pc.or_kleene
                truth = self.condition(values[0])
                for value in values[1:]:
                    truth = join(truth, self.condition(value))
                return truth
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return pc.invert(self.condition(operand))
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                truth = None
                for comparison, right in zip(ops, comparators, strict=True):
                    found = self._comparison(comparison, left, right)
                    truth = found if truth is None else pc.and_kleene(truth, found)
                    left = right
                return truth
        raise self._refusal(node)

    def _comparison(self, op: ast.cmpop, left: ast.expr, right: ast.expr) -> Any:
        if isinstance(op, ast.In | ast.NotIn):
            return self._membership(left, right, isinstance(op, ast.NotIn))
        if type(op) not in _COMPARISONS:
            raise UsageError(f"where is {self._text!r}; write == or != instead of is; {_EXPLANATION}")
        as_written = _is_missing_text(left) or _is_missing_text(right)
        one, other = self._operand(left, as_written), self._operand(right, as_written)
        if not (one.name or other.name):
            raise self._refusal(left)
        if one.is_number != other.is_number:
            one, other = self._as_number(one, other), self._as_number(other, one)
        one, other = self._alike(one, other), self._alike(other, one)
        return _each(_COMPARISONS[type(op)], one, other)

    def _membership(self, left: ast.expr, right: ast.expr, is_negated: bool) -> Any:
        if (name := _column_of(right)) is not None and pa.types.is_nested(self._column(name).type):
            return self._holding(left, name, is_negated)
        if not isinstance(right, ast.List | ast.Tuple | ast.Set) or not right.elts:
            raise self._refusal(right)
        as_written = any(map(_is_missing_text, right.elts))
        members, column = [self._operand(item) for item in right.elts], self._operand(left, as_written)
        if not column.name or any(m.name or m.is_number != members[0].is_number for m in members):
            raise self._refusal(right)
        if column.is_number != members[0].is_number:
            column = self._as_number(column, members[0])
        among = {self._alike(member, column).cells[0] for member in members}
        return _each(lambda cell, _: (cell in among) != is_negated, column, members[0])

    def _holding(self, left: ast.expr, name: str, is_negated: bool) -> Any:
        """Whether the lists of a column hold a number."""
        lists = self._column(name).combine_chunks()
        number = self._operand(left) if isinstance(left, ast.Constant | ast.UnaryOp) else None
        if not _has_integers(lists.type) or number is None or not number.is_number:
            raise self._no_cells(name, lists.type)
        rows = np.repeat(np.arange(len(lists)), pc.fill_null(pc.list_value_length(lists), 0))
        found = np.zeros(len(lists), np.bool_)
        found[rows[np.asarray(pc.list_flatten(lists)) == number.cells[0]]] = True
        return pa.array(found != is_negated, mask=np.asarray(lists.is_null()))

    def _operand(self, node: ast.expr, as_written: bool = False) -> _Operand:
        """One side; missing cells of a column are null, unless cells are compared `as_written`."""
        name = _column_of(node)
        if name is not None:
            values = self._column(name)
            if pa.types.is_nested(values.type):
                raise self._no_cells(name, values.type)
            encoded = values.combine_chunks().dictionary_encode("encode")
            cells = encoded.dictionary.to_pylist()
            if not as_written:
                cells = [None if _has_no_value(cell) else cell for cell in cells]
            return _Operand(
                cells,
                name,
                encoded.indices.to_numpy(),
                not pa.types.is_string(values.type),
                pa.types.is_floating(values.type),
            )
        match node:
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float()) as literal):
                number = self._number(literal)
                return _Operand([number.copy_negate() if isinstance(number, Decimal) else -number])
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return _Operand([self._number(node)])
            case ast.Constant(value=str() as string):
                return _Operand([string], is_number=False)
        raise self._refusal(node)

    def _number(self, literal: ast.Constant) -> Any:
        """The exact number of a literal, from its text, because Python rounds it."""
        if isinstance(literal.value, int):
            return literal.value
        number = _exact((ast.get_source_segment(self._text.strip(), literal) or "").replace("_", ""))
        if number is None:  # its exponent is larger than that of any cell
            raise self._refusal(literal)
        return number

    def _column(self, name: str) -> Any:
        if name not in self._table.column_names:
            there = ", ".join(self._table.column_names)
            raise UsageError(f"where is {self._text!r}, but the index has no column {name!r}; it has {there}")
        return self._table[name]

    def _no_cells(self, name: str, kind: pa.DataType) -> UsageError:
        """A use of a column of lists that is not supported."""
        listed = _written(name)
        remedy = f"write 3 in {listed} or 3 not in {listed}" if _has_integers(kind) else "use other columns"
        return UsageError(f"where is {self._text!r}, but each cell of {name} is a list; {remedy}")

    def _as_number(self, operand: _Operand, other: _Operand) -> _Operand:
        """Convert a column of strings to numbers; numbers are not changed."""
        if operand.is_number:
            return operand
        if not operand.name:
            text = self._texts.get(other.name)
            remedy = (
                f"use {_written(text)}, which has the text"
                if text
                else "compare it with a number, without quotes"
            )
            raise UsageError(f"where is {self._text!r}, but {other.name} is a number; {remedy}")
        cells = [None if cell is None else _exact(cell) for cell in operand.cells]
        for number, (text, cell) in enumerate(zip(operand.cells, cells, strict=True)):
            if text is not None and cell is None:
                raise self._no_number(operand, number)
        return replace(operand, cells=cells, is_number=True)

    def _alike(self, operand: _Operand, other: _Operand) -> _Operand:
        """Round numbers to float64, as labels were, if the other side is a column of float64."""
        if not other.is_rounded or operand.is_rounded:
            return operand
        cells = [None if cell is None else float(Decimal(cell)) for cell in operand.cells]
        literal, rounded = (None, None) if operand.name else (operand.cells[0], cells[0])
        if isinstance(literal, int) and rounded != literal and rounded in other.cells:
            raise UsageError(
                f"where is {self._text!r}, but {other.name} is rounded to float64 in the index, which has "
                f"{Decimal(rounded or 0):f} instead of {literal}; labels of the kind string are exact"
            )
        return replace(operand, cells=cells)

    def _no_number(self, operand: _Operand, number: int) -> UsageError:
        assert operand.numbers is not None
        at = int(np.flatnonzero(operand.numbers == number)[0])
        row, example_id = self._table["row"][at].as_py(), self._table["example_id"][at].as_py()
        cell = f"{operand.cells[number]!r:.99}"
        return UsageError(
            f"where is {self._text!r}, but {operand.name} is {cell} in row {row} of the "
            f"manifest ({example_id}), which is not a number; compare it with strings, in quotes"
        )

    def _refusal(self, node: ast.expr) -> UsageError:
        return UsageError(
            f"where is {self._text!r}, but {ast.unparse(node)!r} is not supported; {_EXPLANATION}"
        )


def _each(compare: Callable[[Any, Any], bool], one: _Operand, other: _Operand) -> Any:
    """The result of a comparison for each row: true, false, or null if a cell is missing."""
    if one.numbers is None or other.numbers is None:  # one is a literal
        truth = [_truth(compare, a, b) for a in one.cells for b in other.cells]
        numbers = other.numbers if one.numbers is None else one.numbers
        return pa.array(truth, pa.bool_()).take(pa.array(numbers))
    pairs = zip(one.numbers, other.numbers, strict=True)
    return pa.array([_truth(compare, one.cells[i], other.cells[j]) for i, j in pairs], pa.bool_())


def _truth(compare: Callable[[Any, Any], bool], a: Any, b: Any) -> bool | None:
    return None if a is None or b is None else compare(a, b)
