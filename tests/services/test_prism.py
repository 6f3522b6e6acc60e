"""The build on Prism, Beam's local runner in Go: its workers in the build's own process, and outside."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services.conftest import Reference, content_of, run_cli

SCRIPT = Path(__file__).parents[2] / "scripts" / "prism"

pytestmark = pytest.mark.timeout(1200)  # a first installation compiles Prism


@pytest.fixture(scope="module")
def prism() -> Path:
    """The program."""
    command = [str(SCRIPT), "install", f"--python={sys.executable}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    return Path(done.stdout.splitlines()[-1])


def test_same_bytes_by_a_worker_in_this_process(prism: Path, reference: Reference, tmp_path: Path) -> None:
    flags = [*reference.flags, "--runner=PrismRunner", f"--prism_location={prism}"]
    run_cli(["build", str(reference.manifest), str(tmp_path / "out"), *flags])
    assert content_of(tmp_path / "out") == reference.content


def test_same_bytes_by_workers_of_their_own(prism: Path, reference: Reference, tmp_path: Path) -> None:
    log = prism.parent / "workers.log"
    before = log.stat().st_size if log.exists() else 0
    flags = [
        *reference.flags,
        "--runner=PrismRunner",
        f"--prism_location={prism}",
        "--environment_type=PROCESS",
        f"--environment_config={json.dumps({'command': str(prism.parent / 'worker')})}",
    ]
    run_cli(["build", str(reference.manifest), str(tmp_path / "out"), *flags], timeout=120)
    assert content_of(tmp_path / "out") == reference.content
    assert "Provision info" in log.read_text()[before:], "no worker was started"
