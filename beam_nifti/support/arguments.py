"""Parsers of arguments that refuse what argparse would ignore."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, Final

from beam_nifti.errors import UsageError
from beam_nifti.support.cells import parse_integer, parse_number

_SECRET: Final = re.compile("secret|token|access.key|connection.string")
"""Matches names of flags whose values are never shown."""


class StoreOnce(argparse._StoreAction):
    """Store a value once: an empty value, or a second and different one, is a UsageError."""

    _first: object = None

    def __call__(self, parser: Any, namespace: Any, values: Any, flag: str | None = None) -> None:
        """Store it."""
        _refuse_empty(self, values)
        if flag is not None and self._first not in (None, values):
            both = "" if _SECRET.search(flag) else f", as {self._first} and {values}"
            raise UsageError(f"{flag} is given twice{both}; give it once")
        self._first = values
        super().__call__(parser, namespace, values, flag)


class AppendFilled(argparse._AppendAction):
    """Append a value; an empty one is a UsageError."""

    def __call__(self, parser: Any, namespace: Any, values: Any, flag: str | None = None) -> None:
        """Append it."""
        _refuse_empty(self, values)
        super().__call__(parser, namespace, values, flag)


def _refuse_empty(action: argparse.Action, values: Any) -> None:
    for value in values if isinstance(values, list) else [values]:
        if isinstance(value, str) and not value.strip():
            name = action.option_strings[0] if action.option_strings else action.metavar
            raise UsageError(f"{name} is empty; was a variable not set?")


def refuse_swallowed(parser: argparse.ArgumentParser) -> None:
    """Make a parser refuse empty values, second values of options that take one, and numbers such as 1_0."""
    parser.register("action", None, StoreOnce)
    parser.register("action", "store", StoreOnce)
    parser.register("action", "append", AppendFilled)
    parser.register("type", int, parse_integer)
    parser.register("type", float, parse_number)


def suggest_flag(flag: str, known: Iterable[str]) -> str:
    """A hint that names the known flag that was probably meant; "" if none is similar."""
    known = [each for each in known if each != "--help"]
    longer = [each for each in known if each.startswith(f"{flag}-")]
    close = longer or difflib.get_close_matches(flag, known, n=1, cutoff=0.75)
    return f"did you mean {close[0]}?" if close else ""


def dashed(argument: str) -> str:
    """A flag as it is documented, with - in its name; its value stays."""
    return _renamed(argument, "_", "-")


def underscored(argument: str) -> str:
    """A flag as Beam defines it, with _ in its name; its value stays."""
    return _renamed(argument, "-", "_")


def _renamed(argument: str, old: str, new: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace(old, new)}{equals}{value}"
