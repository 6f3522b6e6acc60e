"""Standard JSON: without NaN and Infinity, which parsers in other languages refuse."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, Final, NoReturn

_SIZES: Final = {"{": 256, "[": 80, ",": 64}
"""Bytes that what follows a sign takes in Python, about: an object with a key, a list, a text or number."""

_FREE_BYTES: Final = 16 << 20
_GROWTH: Final = 4  # JSON may take so many bytes, and so many times the length of its text


def dump_json(value: Any, **options: Any) -> str:
    """As `json.dumps`, with null for numbers that are not finite.

    >>> dump_json({"zooms": [2.0, float("nan")]})
    '{"zooms": [2.0, null]}'
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def require_modest(text: str) -> None:
    """Refuse, with a ValueError, JSON of many small values, which takes far more memory than its text."""
    most = _FREE_BYTES + _GROWTH * len(text)
    if sum(size * text.count(sign) for sign, size in _SIZES.items()) > most:
        raise ValueError("holds too many values for the length of its text")


def load_json(text: str | bytes, *, is_modest: bool = False) -> Any:
    """Parse JSON that this package has written, and whoever has received it may have changed.

    Args:
        text: the JSON text.
        is_modest: whether to `require_modest`.

    Raises:
        ValueError: it is no JSON, not UTF-8, nested too deeply, or has a key twice or a number that is not
            finite.
    """
    decoded = text if isinstance(text, str) else text.decode()  # json.loads guesses other encodings
    if is_modest:
        require_modest(decoded)
    try:
        return json.loads(
            decoded, parse_constant=_refuse, parse_float=_finite_number, object_pairs_hook=unique_keys
        )
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _refuse(token: str) -> NoReturn:
    raise ValueError(f"holds {token}, which is not a JSON number")


def _finite_number(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `object_pairs_hook`; a duplicate key is a ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"has the key {twice!r} twice")
    return found
