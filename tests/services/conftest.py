"""The same build on real engines and object stores, compared with this machine's own.

Not part of a plain `pytest`: each module needs something that a script of `scripts/` installs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from beam_nifti.pipeline.local_runner import RUNNER
from tests.images import write_cohort

INSTALL_TIMEOUT = 900.0
"""Seconds in which a script installs or starts a service."""

LOCAL = (f"--runner={RUNNER}", "--direct_running_mode=in_memory")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave fixtures out of the time limit of a test: the first installation of a service takes minutes."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            own = item.get_closest_marker("timeout")
            item.add_marker(pytest.mark.timeout(*(own.args if own else (300,)), func_only=True))


@dataclass(frozen=True)
class Reference:
    """A cohort, and what the local runner makes of it.

    Attributes:
        manifest: of the cohort.
        flags: of `beam-nifti build`, that decide the dataset.
        content: `content_of` the dataset.
    """

    manifest: Path
    flags: tuple[str, ...]
    content: dict[str, str]


def content_of(output: Path) -> dict[str, str]:
    """The sha256 of every file below a folder, by its relative path; hidden ones too."""
    files = sorted(p for p in output.rglob("*") if p.is_file())
    return {str(p.relative_to(output)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def run_cli(arguments: Sequence[str], timeout: float = 300.0, **environment: str) -> str:
    """Run beam-nifti in a process of its own; what it printed. A failure shows all of it."""
    done = subprocess.run(
        [sys.executable, "-m", "beam_nifti", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}"
    return done.stdout


def run_script(script: Path, *arguments: str) -> str:
    """Run a script that installs, starts or ends a service for this interpreter; what it printed."""
    command = [str(script), *arguments, f"--python={sys.executable}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def installed(script: Path) -> Iterator[None]:
    """Have what a script runs installed while the block lasts, and nothing of it running before or after."""
    run_script(script, "install")
    run_script(script, "down")  # workers of an earlier run may still hold an earlier beam_nifti
    try:
        yield
    finally:
        run_script(script, "down")


def build_flags(text: str) -> tuple[str, ...]:
    """The flags of `beam-nifti build` that a script prints when its cluster is up."""
    (flags,) = re.findall(r"^beam-nifti build MANIFEST OUTPUT (.+?)\n\n", text, re.M | re.S)
    return tuple(shlex.split(flags.replace("\\\n", " ")))


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Sixty images in twelve shards of two splits, built by one thread of the local runner."""
    folder = tmp_path_factory.mktemp("reference")
    manifest = write_cohort(folder / "cohort", 60, shape=(12, 11, 10), split=("train", "test"))
    flags = ("--num-shards=6", "--shuffle-seed=7")
    run_cli(["build", str(manifest), str(folder / "dataset"), *flags, "--workers=1", *LOCAL])
    return Reference(manifest, flags, content_of(folder / "dataset"))
