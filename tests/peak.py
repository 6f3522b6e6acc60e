"""The peak memory of a piece of code, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# VmHWM belongs to the program; ru_maxrss would start at what the parent held when it forked.
_REPORT = """
import pathlib, re
print(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""


def peak_mib(code: str, *arguments: object) -> float:
    """Run Python code and return the most memory that its process ever held, in MiB.

    Args:
        code: may print nothing; an exception in it fails the test.
        arguments: are in its `sys.argv[1:]`.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("this system has no /proc to read the peak memory of a process from")
    command = [sys.executable, "-c", code + _REPORT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 1024
