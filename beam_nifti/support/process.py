"""This process: its cores, its memory, threads beside its main one, and whether it was forked."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_MMAP_THRESHOLD: Final = 32 << 20
"""The largest value that glibc accepts on 64-bit machines. Source: mallopt(3)."""

_TRIM_THRESHOLD: Final = 128 << 20


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_buffers() -> None:
    """Let glibc reuse buffers of up to 32 MiB.

    By default it maps every buffer of a volume's size afresh and gives it back after use, so that each
    volume pays for a page fault every 4 KiB: a fifth of a build's CPU (docs/adr/0004-memory.md).
    Does nothing where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)


class ForkGuard:
    """Tells whether this process was forked from one that had used something that does not survive a fork."""

    def __init__(self) -> None:
        self._is_used = self._is_copy = False
        os.register_at_fork(after_in_child=self._on_fork)

    def _on_fork(self) -> None:
        self._is_copy = self._is_used

    def enter(self) -> bool:
        """Note the use of it; False if it cannot be used here."""
        self._is_used = True
        return not self._is_copy


@contextlib.contextmanager
def in_background(work: Iterable[float], name: str) -> Iterator[None]:
    """Go on with some work while the block runs.

    Args:
        work: gives, each time that it has done something, the seconds to sleep before it is asked to go on;
            that is where it ends with the block, which waits for it.
        name: of the thread.
    """
    stop = threading.Event()

    def run() -> None:
        for pause in work:
            if stop.wait(pause):
                return

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
