"""Output on standard output and standard error.

Names, paths, answers of servers and texts of exceptions may contain control characters, so all text passes
through here. A stream may be closed, full, or unable to encode a character. Only a command whose result is
text fails then.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import traceback
from collections.abc import Iterator
from typing import TextIO

from beam_nifti.errors import printable


class UnwritableError(Exception):
    """Standard output cannot be written; the cause is the OSError."""


class Screen(io.TextIOBase):
    """A standard stream (None if it is closed) that escapes control characters except line breaks and tabs.

    After an error, further text is dropped. If the screen is strict, the first error is an UnwritableError.
    """

    def __init__(self, stream: TextIO | None, *, is_strict: bool) -> None:
        self.stream, self._is_strict, self._is_lost = stream, is_strict, False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self.stream is not None and self.stream.isatty()

    def fileno(self) -> int:
        """That of the stream."""
        return self.stream.fileno() if self.stream is not None else super().fileno()

    def writable(self) -> bool:
        """Always: what cannot be written is dropped, or raises."""
        return True

    def write(self, text: str) -> int:
        """Write text without what controls a terminal."""
        self._put(printable(text).encode(self.encoding, "backslashreplace").decode(self.encoding))
        return len(text)

    def write_result(self, text: str) -> None:
        """Write a table or a script for other programs, unchanged and in UTF-8 unless to a terminal."""
        buffer = getattr(self.stream, "buffer", None)
        if self.isatty():
            self.write(text)
        elif buffer is None:
            self._put(text)
        else:
            self.flush()
            with self._lost_by_errors():
                buffer.write(text.encode())

    def flush(self) -> None:
        """Flush the stream."""
        with self._lost_by_errors():
            if self.stream is not None and not self._is_lost:
                self.stream.flush()

    def _put(self, text: str) -> None:
        with self._lost_by_errors():
            if self.stream is None and text:
                raise OSError(errno.EBADF, "it is closed")
            if self.stream is not None and not self._is_lost:
                self.stream.write(text)

    @contextlib.contextmanager
    def _lost_by_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as e:  # ValueError: closed by another part of this process
            if self._is_lost:
                return
            self._is_lost = True
            with contextlib.suppress(OSError, ValueError):
                _replace_by_null(self.fileno())
            if self._is_strict:
                raise UnwritableError(f"standard output: {getattr(e, 'strerror', None) or e}") from e


def _replace_by_null(descriptor: int) -> None:
    """Send what is still buffered to the null device: Python flushes at exit, and would exit with 120."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _open_closed_descriptors() -> None:
    """Keep the descriptors of standard streams from becoming files: libraries write to these numbers."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Replace the standard streams by Screens while the block runs.

    An exception is printed and becomes SystemExit.
    """
    _open_closed_descriptors()
    out, err = Screen(sys.stdout, is_strict=True), Screen(sys.stderr, is_strict=False)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
        except Exception as e:
            traceback.print_exc()
            raise SystemExit(1) from e
        finally:
            err.flush()
            with contextlib.suppress(UnwritableError):
                out.flush()


def write_result(text: str) -> None:
    """Print the result of a command, such as a table. A file or a pipe gets it byte for byte."""
    if isinstance(sys.stdout, Screen):
        sys.stdout.write_result(text)
    else:
        sys.stdout.write(text)


def under_screen(stream: TextIO) -> TextIO:
    """The stream below a Screen, for code that moves the cursor."""
    return stream.stream if isinstance(stream, Screen) and stream.stream is not None else stream
