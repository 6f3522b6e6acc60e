"""Hooks for a program that runs a pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from beam_nifti.support import logs
from beam_nifti.support.arguments import dashed, suggest_flag

if TYPE_CHECKING:
    from beam_nifti.errors import BuildSummary
    from beam_nifti.pipeline.build import Estimate
    from beam_nifti.pipeline.metrics import Metrics
    from beam_nifti.pipeline.plan import BuildPlan, CheckPlan
    from beam_nifti.pipeline.runners import Engine
    from beam_nifti.record.dataset_info import DatasetInfo


class Watcher:
    """Follows a run. The `on_` methods do nothing by default; any method may be overridden.

    Args:
        has_progress: whether to show progress.

    Attributes:
        has_progress: whether to show progress.
        flags: flags of the program besides Beam's, to suggest instead of an unknown one.
    """

    flags: Sequence[str] = ()

    def __init__(self, *, has_progress: bool = True) -> None:
        self.has_progress = has_progress

    def explain_unknown(self, argument: str, known: Iterable[str]) -> str:
        """Explain that an argument is not a flag of Beam.

        Args:
            argument: argument that was given.
            known: Beam's flags that have an effect.
        """
        flag = argument.partition("=")[0]
        hint = suggest_flag(dashed(flag), known) or "drop it"
        return f"{flag} is not a flag of Apache Beam; {hint}"

    def load_beam(self) -> None:
        """Load Beam."""
        from beam_nifti.pipeline.runners import load_beam

        load_beam()

    def on_dataset(self, info: DatasetInfo) -> None:
        """Called with the dataset to read, before it is read."""

    def on_engine(self, engine: Engine) -> None:
        """Called when the engine is chosen, before anything is read or written."""

    def on_plan(self, plan: BuildPlan | CheckPlan) -> None:
        """Called after planning, before the pipeline starts."""

    def on_estimate(self, plan: BuildPlan, estimate: Estimate) -> None:
        """Called at the end of a dry run."""

    def on_kept(self, num_examples: int) -> None:
        """Called when a conversion has ended, with how many of its examples an earlier run had finished."""

    def on_end(self, summary: BuildSummary, metrics: Metrics) -> None:
        """Called when a build has ended, published or not."""

    def around(self, engine: Engine) -> contextlib.AbstractContextManager[object]:
        """Make a context that is entered while the pipeline runs."""
        return contextlib.nullcontext()


class LogWatcher(Watcher):
    """Logs the numbers that the command line prints, which the result of a build does not have."""

    def on_estimate(self, plan: BuildPlan, estimate: Estimate) -> None:
        """Log what would be done."""
        reuse = estimate.reuse
        kept = reuse.num_published + reuse.num_unfinished if reuse else 0
        built = reuse.num_rebuilt if reuse else plan.num_examples
        logs.LOGGER.info("would keep %d and build %d examples", kept, built)

    def on_kept(self, num_examples: int) -> None:
        """Log it."""
        logs.LOGGER.info("kept %d examples of an earlier run", num_examples)

    def on_end(self, summary: BuildSummary, metrics: Metrics) -> None:
        """Log what was done."""
        kept = metrics.counters.get("volumes-skipped", 0)
        built = summary.num_written - kept
        logs.LOGGER.info("kept %d and built %d examples; %d failed", kept, built, summary.num_failed)
