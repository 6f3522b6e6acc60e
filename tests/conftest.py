"""Fixtures for all tests."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.images import write_cohort

# The same examples every time: a red check shall be the fault of the change that it checks.
settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.register_profile("nightly", deadline=None, database=None, max_examples=10_000)
settings.load_profile("suite")


SLOW = 40
"""Of how many other tests a slow one takes the time."""


def pytest_configure(config: pytest.Config) -> None:
    """Let xdist keep the order of files; its own is by how many tests each has."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files that take longest first, so that no worker is alone with one at the end."""
    times = Counter[Path]()
    for item in items:
        times[item.path] += SLOW if item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: -times[item.path])


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Make small builds quicker, once a module of tests has loaded Beam; real engines get the real one."""
    if "apache_beam" in sys.modules and "services" not in item.path.parts:
        from tests import quick_beam

        quick_beam.install()


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """The manifest of twelve small images."""
    return write_cohort(tmp_path / "cohort", 12)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command of the command line: `run("verify", output)` -> what it prints."""
    from beam_nifti.cli import main as cli

    def command(*arguments: object, code: int = 0) -> str:
        name, *rest = map(str, arguments)
        quiet = [] if name == "inspect" else ["--quiet"]
        workers = ["--workers=1"] if name == "build" else []  # starts sooner than as many as cores
        status = cli.main([name, *workers, *rest, *quiet])
        captured = capsys.readouterr()
        assert status == code, captured
        return captured.out + captured.err

    return command


@pytest.fixture
def local_flags() -> Callable[..., list[str]]:
    """Beam's flags for the in-process runner: `local_flags(workers)`."""

    def flags(workers: int = 1, mode: str = "multi_threading") -> list[str]:
        return [
            "--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner",
            f"--direct_running_mode={mode}",
            f"--direct_num_workers={workers}",
        ]

    return flags


@pytest.fixture
def build(local_flags: Callable[..., list[str]]) -> Callable[..., Any]:
    """Build a dataset in this process: `build(config, workers)` -> BuildSummary."""

    def run(config: Any, workers: int = 1, mode: str = "multi_threading") -> Any:
        from apache_beam.options.pipeline_options import PipelineOptions

        from beam_nifti.pipeline.build import open_build, run_build

        with open_build(config) as plan:
            summary, _ = run_build(plan, PipelineOptions(local_flags(workers, mode)))
        return summary

    return run
