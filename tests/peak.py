"""The peak memory of a piece of code, in a process of its own or in this one."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from tests.build_helpers import fork_server


def peak_mib(code: str, *arguments: object) -> float:
    """Run Python code in a process of its own; the most memory that it held, in MiB.

    The process is a fork, so it begins with what Beam and this package take.

    Args:
        code: an exception in it fails the test.
        arguments: are in its `sys.argv[1:]`.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("this system has no /proc to read the peak memory of a process from")
    ended = fork_server().run("code", code=code, arguments=list(map(str, arguments)))
    assert ended.status == 0, ended.result
    return ended.peak_bytes / (1 << 20)


_STATUS = Path("/proc/self/status")
_PEAK = Path("/proc/self/clear_refs")
_RESET = "5"
"""What makes the peak of a process what it holds now. Source: proc_pid_clear_refs(5)."""


@contextlib.contextmanager
def peak_growth() -> Iterator[Callable[[], int]]:
    """How many bytes of real memory this process took in the block, at most, besides what it held before.

    What was freed before the block goes back to the system, so that taking it again counts.
    """
    if not _PEAK.exists():
        pytest.skip("this system has no /proc/self/clear_refs to measure the peak memory of a block with")
    pa.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)
    _PEAK.write_text(_RESET)
    before, after = _resident("VmRSS"), list[int]()
    try:
        yield lambda: after[0] - before
    finally:
        after.append(_resident("VmHWM"))


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+)", _STATUS.read_text())
    assert found is not None
    return int(found[1]) << 10
