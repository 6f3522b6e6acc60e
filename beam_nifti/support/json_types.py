"""Checks JSON values against type annotations."""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from reprlib import Repr
from typing import Any, Final, NoReturn

_WORDS: Final[Mapping[Any, str]] = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "a whole number",
    list: "a list",
    str: "text",
}
hints_of: Final[Callable[[Any], Mapping[str, Any]]] = functools.cache(typing.get_type_hints)
"""The evaluated annotations of a dataclass's fields."""

_SHOWN: Final = Repr()
_SHOWN.maxother = _SHOWN.maxstring = 60


def require_type(value: Any, kind: Any, name: str) -> None:
    """Check a value of `json.loads` against an annotation; `name` names the value in the error.

    The annotation is a scalar, `X | None`, `str | X | None`, a tuple (in JSON a list), a Mapping of text, or
    a dataclass (in JSON an object).

    Raises:
        ValueError: the value has another type, or its keys are not those of the dataclass.
    """
    if _is_plain(value, kind):
        return
    if kind is str and type(value) is str:
        _require_text(value, name)
    elif kind is float:
        # Of integers those that a float can be: a larger one raises where it becomes one.
        if type(value) not in (int, float) or not abs(value) <= math.ldexp(1, 1000):
            _refuse(value, kind, name)
    elif is_dataclass(kind):
        require_keys(value, hints_of(kind), _required_of(kind), name)
    elif (origin := typing.get_origin(kind)) in (types.UnionType, typing.Union):
        if value is not None:
            others = [a for a in typing.get_args(kind) if a is not types.NoneType]
            require_type(value, str if isinstance(value, str) and str in others else others[-1], name)
    elif origin is tuple:
        _require_list(value, typing.get_args(kind), name)
    elif origin is Mapping:
        require_type(value, dict, name)
        of_values = typing.get_args(kind)[1]
        for key, item in value.items():
            _require_text(key, name)
            require_type(item, of_values, f"{name}.{key}")
    else:
        _refuse(value, kind, name)


def require_keys(value: Any, kinds: Mapping[str, Any], required: Collection[str], name: str) -> None:
    """Compare an object's keys and values with annotations.

    Args:
        value: same as for `require_type`.
        kinds: annotations by key.
        required: keys that must be there.
        name: name of the object, for the error; "" for the whole file.

    Raises:
        ValueError: it is no object, a key is missing or is not among `kinds`, or a value is of another type.
    """
    require_type(value, dict, name or "it")
    within = f"{name} " if name else ""
    if value.keys() != kinds.keys():
        if unknown := value.keys() - kinds.keys():
            raise ValueError(f"{within}has a key {_SHOWN.repr(min(unknown))} that this format does not have")
        if missing := set(required) - value.keys():
            raise ValueError(f"{within}lacks the key {min(missing)!r}")
    for key, item in value.items():
        if not _is_plain(item, kinds[key]):
            require_type(item, kinds[key], f"{name}.{key}" if name else key)


def _find_required(kind: Any) -> frozenset[str]:
    return frozenset(f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING)


_required_of: Final[Callable[[Any], frozenset[str]]] = functools.cache(_find_required)
"""The fields of a dataclass that have no default."""


def _is_plain(value: Any, kind: Any) -> bool:
    """Whether a value needs no further check, which is true of most values."""
    return type(value) is kind and kind is not float and (kind is not str or value.isascii())


def _require_list(value: Any, kinds: tuple[Any, ...], name: str) -> None:
    require_type(value, list, name)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(value) != len(kinds):
        raise ValueError(f"{name} has {len(value)} values, expected {len(kinds)}")
    for number, (item, kind) in enumerate(zip(value, kinds, strict=True)):
        require_type(item, kind, f"{name}[{number}]")


def _require_text(value: str, name: str) -> None:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} is {_SHOWN.repr(value)}, which is not Unicode text") from None


def _refuse(value: Any, kind: Any, name: str) -> NoReturn:
    raise ValueError(f"{name} is {_SHOWN.repr(value)}, expected {_WORDS[kind]}")
