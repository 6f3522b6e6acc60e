"""Logging on standard error: as lines for people, or as JSON lines for log collectors.

Messages at INFO name no participant, image or path. Warnings and errors may, because they have to name the
cause.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Final

from beam_nifti.support.strict_json import dump_json

FORMATS: Final = ("text", "json")

LOGGER: Final = logging.getLogger("beam_nifti")


def fields(**values: Any) -> dict[str, Any]:
    """The argument `extra=` of a log call: keys of the JSON line besides the message."""
    return {"fields": values}


class _Text(logging.Formatter):
    """Plain sentences. Errors begin with the program's name, as those of other commands."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.levelno >= logging.ERROR:
            message = f"beam-nifti: error: {message}"
        # A line break may come with a name: only what begins at the margin is a message of its own.
        first, *more = message.split("\n")
        message = "\n".join([first, *(line if line[:1] == " " else f"  {line}" for line in more)])
        return f"{self.formatException(record.exc_info)}\n{message}" if record.exc_info else message


class _Json(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        facts = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            facts["exception"] = self.formatException(record.exc_info)
        return dump_json(facts)  # in ASCII, as a daemon's standard error may be


class _Lines(io.TextIOBase):
    """A replacement of standard error that logs each line."""

    def __init__(self) -> None:
        self._begun = ""
        self._lock = threading.Lock()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._begun = (self._begun + text).split("\n")
        for line in filter(str.strip, lines):
            logging.getLogger("stderr").warning("%s", line)
        return len(text)


@contextlib.contextmanager
def on_stderr(log_format: str) -> Iterator[None]:
    """Log to standard error while the block runs.

    With "text" these are the messages of this package, and warnings and errors of others as Python prints
    them. With "json" these are the messages of every library, and everything else that is written to standard
    error; an exception that leaves the block is logged, and SystemExit is raised instead.
    """
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(_Json())
        logging.getLogger("apache_beam.typehints").setLevel(logging.WARNING)  # a line for each annotation
        with _handling(logging.getLogger(), handler), contextlib.redirect_stderr(_Lines()):
            logging.captureWarnings(True)
            try:
                yield
            except Exception as e:
                LOGGER.critical("%s", e, exc_info=e)
                raise SystemExit(1) from e
            finally:
                logging.captureWarnings(False)
                # Beam ends its job servers when the process ends, and says so.
                atexit.register(logging.getLogger().addHandler, handler)
    else:
        handler.setFormatter(_Text())
        with _handling(LOGGER, handler):
            yield


@contextlib.contextmanager
def _handling(logger: logging.Logger, handler: logging.Handler) -> Iterator[None]:
    """Give a logger's messages, from INFO on, to this handler only."""
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        logger.setLevel(level)


class shared:  # noqa: N801
    """Lets threads share a context manager that changes the process.

    The first thread to enter makes the change, and the last one to leave reverts it.
    """

    def __init__(self, change: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._change, self._lock, self._count = change, threading.Lock(), 0
        self._stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Have the change while the block runs."""
        with self._lock:
            if self._count == 0:
                self._stack.enter_context(self._change())
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if self._count == 0:
                    self._stack.close()


@shared
@contextlib.contextmanager
def unconfigured() -> Iterator[None]:
    """Leave the configuration of logging to the host program; Beam would configure it permanently."""
    root, default = logging.getLogger(), logging.lastResort
    if root.handlers or default is None:
        yield
        return
    root.addHandler(default)  # which shows what Python shows where logging is not set up
    try:
        yield
    finally:
        root.removeHandler(default)
