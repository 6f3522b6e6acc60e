"""The build on Prism, Beam's local runner in Go: its workers in the build's own process, and outside."""

from __future__ import annotations

import json
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services.conftest import LOCAL, Reference, content_of, run_cli

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


def test_a_terminal_shows_how_far_it_is_and_a_log_how_it_ended(
    prism: Path, reference: Reference, tmp_path: Path
) -> None:
    arguments = ["build", str(reference.manifest), str(tmp_path / "out"), *reference.flags]
    arguments += ["--runner=PrismRunner", f"--prism_location={prism}"]
    screen = b""

    def read(descriptor: int) -> bytes:
        nonlocal screen
        screen += (data := os.read(descriptor, 4096))
        return data

    command = shlex.join([sys.executable, "-m", "beam_nifti", *arguments])
    assert pty.spawn(["sh", "-c", f"stty cols 120 rows 40 && exec {command}"], read) == 0
    assert b"60/60" in screen
    assert b"12 shards complete" in screen
    command_again = [sys.executable, "-m", "beam_nifti", *arguments, "--log-format=json"]
    done = subprocess.run(command_again, capture_output=True, text=True, timeout=300, check=True)
    records = [json.loads(line) for line in done.stderr.splitlines()]
    assert any(record["logger"].startswith("apache_beam") for record in records)
    (ended,) = (record for record in records if record["message"] == "build ended: success")
    assert (ended["num_kept"], ended["runner"]) == (60, "PrismRunner")


def of_their_own(prism: Path, worker: Path) -> list[str]:
    """Flags of `beam-nifti build`, for workers that a program starts."""
    return [
        "--runner=PrismRunner",
        f"--prism_location={prism}",
        "--environment_type=PROCESS",
        f"--environment_config={json.dumps({'command': str(worker)})}",
    ]


def test_same_bytes_by_workers_of_their_own(prism: Path, reference: Reference, tmp_path: Path) -> None:
    log = prism.parent / "workers.log"
    before = log.stat().st_size if log.exists() else 0
    flags = [*reference.flags, *of_their_own(prism, prism.parent / "worker")]
    run_cli(["build", str(reference.manifest), str(tmp_path / "out"), *flags], timeout=120)
    assert content_of(tmp_path / "out") == reference.content
    assert "Provision info" in log.read_text()[before:], "no worker was started"


FUNCTION = """
from dataclasses import replace
from pathlib import Path

def halved(volume):
    Path(__file__).with_suffix(".used").touch()
    return replace(volume, voxels=volume.voxels // 2)
"""


def test_a_function_is_taken_from_the_workers_own_folder(
    prism: Path, reference: Reference, tmp_path: Path
) -> None:
    inherited = os.environ.get("PYTHONPATH", "")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "labcode.py").write_text(FUNCTION)
    worker = tmp_path / "worker"
    worker.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/there:{inherited} exec {prism.parent}/worker "$@"\n')
    worker.chmod(0o755)
    flags = ["--preprocess=labcode:halved", *reference.flags]
    for output, runner in (("out", of_their_own(prism, worker)), ("local", LOCAL)):
        command = ["build", str(reference.manifest), str(tmp_path / output), *flags, *runner]
        run_cli(command, timeout=120, PYTHONPATH=f"{tmp_path}/here:{inherited}")
    assert (tmp_path / "there" / "labcode.used").exists()
    assert content_of(tmp_path / "out") == content_of(tmp_path / "local")
