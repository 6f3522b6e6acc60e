"""Prints results, and handles a standard output that fails."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import cast

from beam_nifti.support import logs
from beam_nifti.support.outcomes import CUT_SHORT, exit_code
from beam_nifti.support.terminal import UnwritableError
from beam_nifti.support.wording import one_line


@contextlib.contextmanager
def all_read() -> Iterator[None]:
    """Print what a command is for."""
    try:
        yield
    finally:
        sys.stdout.flush()


@contextlib.contextmanager
def while_read() -> Iterator[None]:
    """Print what a command has done; its exit code stays the same if that cannot be printed."""
    try:
        with all_read():
            yield
    except UnwritableError as e:
        if not isinstance(e.__cause__, BrokenPipeError):
            logs.LOGGER.warning("the result could not be printed: %s", e)


def print_line(text: str) -> None:
    """Print a line, whatever line breaks its names have."""
    print(one_line(text))


def report_unprinted(error: UnwritableError) -> int:
    """Report that standard output cannot be written, unless its reader has gone; the exit code."""
    cause = cast(OSError, error.__cause__)
    if isinstance(cause, BrokenPipeError):  # its reader has seen enough
        return CUT_SHORT
    return complain(error, exit_code(cause))


def complain(error: Exception | str, code: int) -> int:
    """Report an error; the exit code."""
    logs.LOGGER.error("%s", error)
    return code
