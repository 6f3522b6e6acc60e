"""A function's name with keyword arguments, as a text: `package.module:function(threshold=3, mode="x")`."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, Final

from beam_nifti.support.cells import as_float

_MOST: Final = 4096  # characters: Python's parser has no limit that protects memory and stack
_CALL: Final = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*)(\(.*\))?", re.DOTALL)


def split_call(text: str) -> tuple[str, str]:
    """The name of a call, and its arguments, as they are written; without parsing them.

    Raises:
        ValueError: the text does not look like a call.
    """
    match = _CALL.fullmatch(text.strip()) if len(text) <= _MOST else None
    if match is None:
        raise ValueError(f"{text[:60]!r} is not a call")
    return match[1], match[2] or "()"


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a call, which are literals. Nothing is executed.

    Python's parser may print warnings, so this is only for what a user has typed.

    >>> parse_call("lab.brains:strip(threshold=3)")
    ('lab.brains:strip', {'threshold': 3})

    Raises:
        ValueError: the text is not such a call.
    """
    name, arguments = split_call(text)
    try:
        call = ast.parse(f"f{arguments}", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            raise ValueError(f"{text!r} is not a call with named arguments")
        values = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    except (SyntaxError, TypeError, MemoryError, RecursionError) as e:
        raise ValueError(f"{text!r}: {e}") from e
    if len(values) < len(call.keywords):
        raise ValueError(f"{text!r} has an argument twice, or without a name")
    return name, values


def format_call(name: str, arguments: Mapping[str, Any]) -> str:
    """The canonical text of a call.

    >>> format_call("lab.brains:strip", {"mode": "x", "by": (1, 2.5)})
    "lab.brains:strip(by=(1, 2.5), mode='x')"

    Raises:
        ValueError: an argument is not a literal.
    """
    words = [f"{word}={_literal(value)}" for word, value in sorted(arguments.items())]
    return f"{name}({', '.join(words)})" if words else name


def _literal(value: Any) -> str:
    if value is None or isinstance(value, bool | bytes):
        return repr(value)
    if isinstance(value, str):
        return repr(str(value))
    if isinstance(value, Integral):
        return repr(int(value))
    if isinstance(value, Real) and math.isfinite(value):
        return repr(as_float(value))
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(item)}' for key, item in value.items())}}}"
    raise ValueError(
        f"{value!r} is not a literal; give a text, a finite number, True or False, or None, or a "
        "tuple, list or dict of these"
    )
