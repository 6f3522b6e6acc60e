"""Rows of a name and a text, for the screen."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Final

_CONTROL: Final = frozenset({"Cc", "Zl", "Zp"})
"""Unicode's categories of control characters and of line and paragraph separators."""


def format_rows(rows: Iterable[tuple[str, str]], width: int) -> str:
    """Rows as lines, a row a line, whatever its text holds.

    Args:
        rows: of a name and a text.
        width: of the names.
    """
    return "\n".join(f"{one_line(name):<{width}}{one_line(text)}".rstrip() for name, text in rows)


def one_line(text: str) -> str:
    r"""A text, such as a cell of a table, with line breaks and control characters as Python writes them.

    >>> print(one_line("left\nright"))
    left\nright
    """
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in _CONTROL else c for c in text)
