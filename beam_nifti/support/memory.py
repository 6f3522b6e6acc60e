"""Keeping large buffers in the process instead of handing each back to the kernel."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_MMAP_THRESHOLD: Final = 32 << 20
"""The largest value that glibc accepts on 64-bit machines. Source: mallopt(3)."""

_TRIM_THRESHOLD: Final = 128 << 20


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
