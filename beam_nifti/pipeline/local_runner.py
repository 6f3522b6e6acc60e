"""Beam's in-process runner, set up so that it never splits an element."""

from __future__ import annotations

from typing import Final

RUNNER: Final = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
"""Named in full: plain DirectRunner first looks for a binary of another runner to download."""

NAMES: Final = ("", "DirectRunner", "FnApiRunner", RUNNER)
"""What `--runner` may say and mean this runner."""


def send_whole_elements() -> None:
    """Keep the in-process runner of this process from cutting elements in two, in every pipeline.

    Its threads send what they have written every second, whether or not an element is half written;
    the other half, read by itself, is garbage or takes all memory. Without the clock they send by
    size, between elements. Clusters have no such clock (docs/adr/0010-local-runner.md). Modules that define
    steps call this when they are imported, so it also holds for pipelines that others make of the steps.
    """
    from apache_beam.runners.portability.fn_api_runner import worker_handlers

    worker_handlers.DATA_BUFFER_TIME_LIMIT_MS = 0
