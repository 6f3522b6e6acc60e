"""The build in every mode of Beam's in-process runner: the same bytes, and a quiet screen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.services.conftest import Reference, content_of, run_cli

MODES = {
    "one thread": ["--workers=1"],
    "two threads": ["--workers=2"],
    "four threads": ["--workers=4"],
    "in_memory": ["--direct_running_mode=in_memory"],
    "multi_threading": ["--direct_running_mode=multi_threading", "--direct_num_workers=2"],
    "one process": ["--direct_running_mode=multi_processing", "--direct_num_workers=1"],
    "two processes": ["--direct_running_mode=multi_processing", "--direct_num_workers=2"],
    "DirectRunner": ["--runner=DirectRunner", "--direct_num_workers=2"],
}


@pytest.mark.parametrize("flags", MODES.values(), ids=MODES)
def test_same_bytes(reference: Reference, tmp_path: Path, flags: list[str]) -> None:
    run_cli(["build", str(reference.manifest), str(tmp_path / "out"), *reference.flags, *flags])
    assert content_of(tmp_path / "out") == reference.content


@pytest.mark.parametrize("mode", ["in_memory", "multi_threading", "multi_processing"])
def test_a_build_that_succeeds_writes_no_log(reference: Reference, tmp_path: Path, mode: str) -> None:
    arguments = ["build", str(reference.manifest), str(tmp_path / "out"), "--quiet"]
    command = [sys.executable, "-m", "beam_nifti", *arguments, f"--direct_running_mode={mode}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("dataset  60 examples, ")
