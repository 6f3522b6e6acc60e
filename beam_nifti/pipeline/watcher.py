"""What a program that runs a pipeline is told of it, and decides."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beam_nifti.errors import BuildSummary
    from beam_nifti.pipeline.metrics import Metrics
    from beam_nifti.pipeline.plan import BuildPlan, CheckPlan
    from beam_nifti.pipeline.runners import Engine


class Watcher:
    """Follows a run: each method does nothing, and may be overridden.

    Args:
        has_progress: whether to show progress.

    Attributes:
        has_progress: whether to show progress.
    """

    def __init__(self, *, has_progress: bool = True) -> None:
        self.has_progress = has_progress

    def on_engine(self, engine: Engine) -> None:
        """The engine is known; nothing was read or written."""

    def on_plan(self, plan: BuildPlan | CheckPlan) -> None:
        """The run is decided; its pipeline starts now."""

    def on_estimate(self, plan: BuildPlan, estimate: Any) -> None:
        """A dry run has decided this (`build.Estimate`), and ends."""

    def on_end(self, summary: BuildSummary, metrics: Metrics) -> None:
        """A build has ended, published or not."""

    def around(self, engine: Engine) -> contextlib.AbstractContextManager[object]:
        """Entered while the pipeline runs."""
        return contextlib.nullcontext()
