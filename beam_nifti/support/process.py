"""This process: cores, memory, background threads and forks."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Final

from beam_nifti.errors import UsageError

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_MMAP_THRESHOLD: Final = 32 << 20  # glibc's largest value on 64-bit machines. Source: mallopt(3)
_TRIM_THRESHOLD: Final = 128 << 20


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_modules(*names: str) -> None:
    """Require modules of the extra `report`.

    Raises:
        UsageError: one of them is not installed.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"not installed: {', '.join(missing)}; pip install 'beam-nifti[report]'")


def keep_buffers() -> None:
    """Let glibc reuse buffers of up to 32 MiB; without effect if the C library is not glibc.

    By default, glibc maps every buffer of a volume's size anew and returns it after use, so each volume costs
    a page fault every 4 KiB: a fifth of a build's CPU (docs/adr/0004-memory.md).
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)


class ForkGuard:
    """Detects that this process was forked after it had used something that does not survive a fork."""

    def __init__(self) -> None:
        self._is_used = self._is_copy = False
        os.register_at_fork(after_in_child=self._on_fork)

    def _on_fork(self) -> None:
        self._is_copy = self._is_used

    def enter(self) -> bool:
        """Note its use; False if it cannot be used in this process."""
        self._is_used = True
        return not self._is_copy


@contextlib.contextmanager
def in_background(work: Iterable[float], name: str) -> Iterator[None]:
    """Run a generator in a thread of this name while the block runs.

    It yields the seconds to sleep until it continues, and is stopped there when the block ends.
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
