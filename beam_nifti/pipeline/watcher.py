"""What a program that runs a pipeline is told of it, and decides."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from beam_nifti.support.arguments import dashed, suggest_flag

if TYPE_CHECKING:
    from beam_nifti.errors import BuildSummary
    from beam_nifti.pipeline.build import Estimate
    from beam_nifti.pipeline.metrics import Metrics
    from beam_nifti.pipeline.plan import BuildPlan, CheckPlan
    from beam_nifti.pipeline.runners import Engine
    from beam_nifti.record.dataset_info import DatasetInfo


class Watcher:
    """Follows a run: each method does nothing, and may be overridden.

    Args:
        has_progress: whether to show progress.

    Attributes:
        has_progress: whether to show progress.
        flags: that the program has besides Beam's, to suggest in the place of one that has no effect.
    """

    flags: Sequence[str] = ()

    def __init__(self, *, has_progress: bool = True) -> None:
        self.has_progress = has_progress

    def explain_unknown(self, argument: str, known: Iterable[str]) -> str:
        """Why an argument is none of Beam's.

        Args:
            argument: that was given.
            known: flags of Beam's that have an effect.
        """
        flag = argument.partition("=")[0]
        hint = suggest_flag(dashed(flag), known) or "leave it out"
        return f"{flag} is no flag of Apache Beam's; {hint}"

    def load_beam(self) -> None:
        """Load Beam."""
        from beam_nifti.pipeline.runners import load_beam

        load_beam()

    def on_dataset(self, info: DatasetInfo) -> None:
        """The dataset that is to be read."""

    def on_engine(self, engine: Engine) -> None:
        """The engine is known; nothing was read or written."""

    def on_plan(self, plan: BuildPlan | CheckPlan) -> None:
        """The run is decided; its pipeline starts now."""

    def on_estimate(self, plan: BuildPlan, estimate: Estimate) -> None:
        """A dry run has decided this, and ends."""

    def on_end(self, summary: BuildSummary, metrics: Metrics) -> None:
        """A build has ended, published or not."""

    def around(self, engine: Engine) -> contextlib.AbstractContextManager[object]:
        """Entered while the pipeline runs."""
        return contextlib.nullcontext()
