"""What a shell completes: commands, flags, values and paths, in a script made from the parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Final

import shtab

_PATHS: Final = {
    **dict.fromkeys(("MANIFEST", "FILE", "KEYFILE", "PATTERN"), shtab.FILE),
    **dict.fromkeys(("OUTPUT", "DIR", "BEFORE", "AFTER", "DATASET", "PATH"), shtab.DIRECTORY),
}
"""How the parser calls arguments that are paths."""


def make_completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for a shell: "bash", "zsh" or "tcsh"."""
    for action in _actions(parser):
        if action.metavar in _PATHS:
            action.complete = _PATHS[action.metavar]  # type: ignore[attr-defined]  # shtab's own
    script: str = shtab.complete(parser, shell)
    return script


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
