"""Beam's in-process runner, as a pipeline of anybody's finds it once the steps are imported."""

from __future__ import annotations

import time
from collections.abc import Callable

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.worker.data_plane import PeriodicThread
from apache_beam.testing.util import assert_that, equal_to

import beam_nifti.transforms  # noqa: F401  (as every pipeline of the steps has)

TICK = 0.1
"""Seconds between the ticks of the runner's clock, which are one, where it has one."""


class _SlowToPickle:
    """Takes longer to write than the runner's clock ticks: its beginning is out before its end is in."""

    def __reduce__(self) -> tuple[type[_SlowToPickle], tuple[()]]:
        end = time.monotonic() + 1.5 * TICK
        while time.monotonic() < end:
            pass
        return _SlowToPickle, ()


def _make(_: None) -> _SlowToPickle:
    return _SlowToPickle()


def _name(element: object) -> str:
    return type(element).__name__


def test_an_element_is_never_sent_in_halves(
    local_flags: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = PeriodicThread.__init__
    monkeypatch.setattr(
        PeriodicThread, "__init__", lambda self, interval, *rest: begin(self, interval * TICK, *rest)
    )
    with beam.Pipeline(options=PipelineOptions(local_flags(2))) as pipeline:
        names = (
            pipeline
            | beam.Create([None], reshuffle=False)
            | beam.Map(_make)
            | beam.Reshuffle()
            | beam.Map(_name)
        )
        assert_that(names, equal_to(["_SlowToPickle"]))
