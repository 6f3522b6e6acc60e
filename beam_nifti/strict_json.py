"""JSON as its standard has it: no token for NaN or infinity, which parsers in other languages refuse."""

from __future__ import annotations

import json
import math
from typing import Any


def dump_json(value: Any, **options: Any) -> str:
    """As `json.dumps`; numbers that are not finite become null.

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
