"""Conditions on records, such as `age > 60 and site == 'A'`, answered from their index.

The text is Python's syntax for comparisons, parsed by Python and never run.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.config import MISSING_TEXTS
from beam_nifti.errors import UsageError

"""Cells without a value; n/a is how BIDS writes it."""

_COMPARISONS: Final[Mapping[type[ast.cmpop], Callable[..., Any]]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}


@dataclass(frozen=True, slots=True)
class _Operand:
    """One side of a comparison: a column of the index, or a literal where the name is ""."""

    values: Any
    name: str = ""

    @property
    def is_number(self) -> bool:
        return not pa.types.is_string(self.values.type)


class Condition:
    """A condition on records.

    It is made of columns of the index, numbers, strings, `==`, `!=`, `<`, `<=`, `>`, `>=`, `in` and `not in`
    a list, `and`, `or`, `not` and parentheses. A column whose name is no Python name is written
    `column('scan age')`. Where a column of strings is compared with numbers, its cells are read as numbers.
    A comparison with a cell that has no value (null, empty, `n/a` or NaN) is neither true nor false, and
    selects no record, with `not` neither. A comparison with such a text itself, as in `site == ''`, compares
    cells as they are written.

    Args:
        text: of the condition.

    Attributes:
        columns: the names of the columns that it asks.

    Raises:
        UsageError: it is not written so.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError) as e:
            raise UsageError(f"where is {text!r}, which is no condition ({e}); {_EXPLANATION}") from e
        self.columns = frozenset(_columns_below(self._tree))

    def select(self, table: pa.Table, texts: Mapping[str, str] | None = None) -> npt.NDArray[np.bool_]:
        """Which rows it is true of.

        Args:
            table: some rows of an index; of columns, those that the condition asks, and `row` and
                `example_id`.
            texts: by column of numbers that stand for texts, the column that has these; for messages.

        Raises:
            UsageError: the condition is no such one, there is no such column, or a cell that is to be a
                number is none.
        """
        truth = pc.fill_null(_Evaluation(self._text, table, texts or {}).condition(self._tree), False)
        return np.asarray(truth, np.bool_)


_EXPLANATION: Final = (
    "compare columns of the index with numbers or strings, as in age > 60 and site in ['A', 'B']"
)


def _column_of(node: ast.AST) -> str | None:
    """The column that a node names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "column":
        match node:
            case ast.Call(args=[ast.Constant(value=str() as name)], keywords=[]):
                return name
    return None


def _written(name: str) -> str:
    """How a condition names a column."""
    return name if name.isidentifier() else f"column({name!r})"


def _columns_below(node: ast.AST) -> Iterator[str]:
    name = _column_of(node)
    if name is not None:
        yield name
        return
    for child in ast.iter_child_nodes(node):
        yield from _columns_below(child)


def _is_number(cell: Any) -> bool:
    try:
        cell.cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def _is_missing_text(node: ast.expr) -> bool:
    """Whether a literal is what stands in a cell without a value: who asks for it wants such cells."""
    return (
        isinstance(node, ast.Constant) and isinstance(node.value, str) and _bare(node.value) in MISSING_TEXTS
    )


def _bare(text: str) -> str:
    return text.strip().lower()


def _without_missing(values: Any) -> Any:
    """The cells of a column, null where they have no value."""
    if pa.types.is_floating(values.type):
        return pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
    if pa.types.is_string(values.type):
        bare = pc.ascii_lower(pc.utf8_trim_whitespace(values))
        return pc.if_else(
            pc.is_in(bare, value_set=pa.array(MISSING_TEXTS)), pa.scalar(None, pa.string()), values
        )
    return values


class _Evaluation:
    def __init__(self, text: str, table: pa.Table, texts: Mapping[str, str]) -> None:
        self._text, self._table, self._texts = text, table, texts

    def condition(self, node: ast.expr) -> Any:
        """What a node says of each row: true, false, or null."""
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
            raise UsageError(f"where is {self._text!r}; write == or != in the place of is; {_EXPLANATION}")
        as_written = _is_missing_text(left) or _is_missing_text(right)
        one, other = self._operand(left, as_written), self._operand(right, as_written)
        if not (one.name or other.name):
            raise self._refusal(left)
        if one.is_number != other.is_number:
            one, other = self._as_number(one, other), self._as_number(other, one)
        return _COMPARISONS[type(op)](one.values, other.values)

    def _membership(self, left: ast.expr, right: ast.expr, is_negated: bool) -> Any:
        if not isinstance(right, ast.List | ast.Tuple | ast.Set) or not right.elts:
            raise self._refusal(right)
        as_written = any(map(_is_missing_text, right.elts))
        members, column = [self._operand(item) for item in right.elts], self._operand(left, as_written)
        if not column.name or any(m.name or m.is_number != members[0].is_number for m in members):
            raise self._refusal(right)
        if column.is_number != members[0].is_number:
            column = self._as_number(column, members[0])
        kind = pa.float64() if column.is_number else pa.string()
        among = pa.array([m.values.as_py() for m in members], kind)
        found = pc.is_in(column.values.cast(kind), value_set=among)
        # Of a cell without a value it is not known.
        known = pc.if_else(pc.is_valid(column.values), found, pa.scalar(None, pa.bool_()))
        return pc.invert(known) if is_negated else known

    def _operand(self, node: ast.expr, as_written: bool = False) -> _Operand:
        """One side; a column's cells without a value are null unless they are wanted as written."""
        name = _column_of(node)
        if name is not None:
            values = self._column(name)
            return _Operand(values if as_written else _without_missing(values), name)
        match node:
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return _Operand(pa.scalar(-float(number)))
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return _Operand(pa.scalar(float(number)))
            case ast.Constant(value=str() as string):
                return _Operand(pa.scalar(string))
        raise self._refusal(node)

    def _column(self, name: str) -> Any:
        if name not in self._table.column_names:
            there = ", ".join(self._table.column_names)
            raise UsageError(f"where is {self._text!r}, but the index has no column {name!r}; it has {there}")
        values = self._table[name]
        if pa.types.is_nested(values.type):
            raise UsageError(
                f"where is {self._text!r}, but each cell of {name} holds several numbers; ask other columns"
            )
        return values

    def _as_number(self, operand: _Operand, other: _Operand) -> _Operand:
        """The numbers that stand in a column of strings; numbers as they are."""
        if operand.is_number:
            return operand
        if not operand.name:
            text = self._texts.get(other.name)
            remedy = (
                f"ask {_written(text)}, which has the text" if text else "compare it with one, without quotes"
            )
            raise UsageError(f"where is {self._text!r}, but {other.name} is a number; {remedy}")
        cells = pc.utf8_trim_whitespace(operand.values)
        try:
            return _Operand(pc.cast(cells, pa.float64()), operand.name)
        except pa.ArrowInvalid as e:
            raise self._no_number(operand.name, cells) from e

    def _no_number(self, name: str, cells: Any) -> UsageError:
        at = next(i for i, cell in enumerate(cells) if not _is_number(cell))
        row, example_id = self._table["row"][at].as_py(), self._table["example_id"][at].as_py()
        return UsageError(
            f"where is {self._text!r}, but {name} is {cells[at].as_py()!r} in row {row} of the manifest "
            f"({example_id}), which is no number; compare it with strings, in quotes"
        )

    def _refusal(self, node: ast.expr) -> UsageError:
        return UsageError(
            f"where is {self._text!r}, of which {ast.unparse(node)!r} is not understood; {_EXPLANATION}"
        )
