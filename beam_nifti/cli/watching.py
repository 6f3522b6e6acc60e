"""What the command line does while a pipeline runs: it notes facts, and keeps noise off the screen."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from beam_nifti.cli.parser import explain_unknown, flags_of_commands
from beam_nifti.cli.run_summary import RunSummary, forget_earlier
from beam_nifti.pipeline.watcher import Watcher

if TYPE_CHECKING:
    from beam_nifti.errors import BuildSummary
    from beam_nifti.pipeline.build import Estimate
    from beam_nifti.pipeline.metrics import Metrics
    from beam_nifti.pipeline.plan import BuildPlan, CheckPlan
    from beam_nifti.pipeline.runners import Engine
    from beam_nifti.record.dataset_info import DatasetInfo


class CommandWatcher(Watcher):
    """Follows the run of a command.

    Attributes:
        run: gets the facts.
        engine: engine of the command, once it is known.
        noise: what a local runner has written to standard error.
        plan: plan of a build or a check, once it is known.
        estimate: estimate of a dry run.
        summary: how a build has ended.
    """

    plan: Any = None
    estimate: Estimate | None = None
    summary: BuildSummary | None = None

    def __init__(self, run: RunSummary, options: argparse.Namespace) -> None:
        super().__init__(has_progress=not options.quiet)
        self.run, self.noise = run, io.StringIO()
        self.engine: Engine | None = None
        self._options = options
        self.flags = flags_of_commands()[options.command]

    def explain_unknown(self, argument: str, known: Iterable[str]) -> str:
        """Why a command does not take an argument."""
        return explain_unknown(argument, self._options.command, known)

    def load_beam(self) -> None:
        """Load Beam as it suits a process that does nothing else."""
        from beam_nifti.pipeline.runners import load_beam

        load_beam(is_alone=True)

    def on_dataset(self, info: DatasetInfo) -> None:
        """Note it."""
        num_failed = info.num_failures if self.run.command == "convert" else 0  # as of the build
        num_volumes = info.num_examples + num_failed
        self.run.know(fingerprint=info.config.get("fingerprint"), num_volumes=num_volumes)

    def on_engine(self, engine: Engine) -> None:
        """Note it, and forget how an earlier run ended, now that Beam knows the flags of the storage."""
        self.engine, self.run.runner = engine, engine.runner
        if not self.run.dry_run:
            forget_earlier(self._options)

    def on_plan(self, plan: BuildPlan | CheckPlan) -> None:
        """Note what is to be made."""
        from beam_nifti.pipeline.plan import CheckPlan

        self.plan = plan
        self.run.know(fingerprint=plan.config.record.fingerprint)
        if isinstance(plan, CheckPlan):
            self.run.know(manifest=plan.config.manifest)
            return
        self.run.know(num_volumes=plan.num_examples, splits=plan.split_examples)
        if self.engine and self.engine.is_template:
            self.run.dry_run = True

    def on_estimate(self, plan: BuildPlan, estimate: Estimate) -> None:
        """Note the result of a dry run."""
        self.estimate = estimate
        self.run.know(num_shards=plan.num_shards, num_bytes=estimate.num_bytes)

    def on_kept(self, num_examples: int) -> None:
        """Note it."""
        self.run.num_kept = num_examples

    def on_end(self, summary: BuildSummary, metrics: Metrics) -> None:
        """Note how a build has ended."""
        self.summary = summary
        self.run.know(
            num_examples=summary.num_written,
            num_kept=metrics.counters.get("volumes-skipped", 0),
            num_failed=summary.num_failed,
            failures=summary.failures,
            failure_reasons=[asdict(group) for group in summary.reasons],
            failures_path=summary.failures_path or None,
            num_shards=summary.num_shards,
            num_bytes=summary.num_bytes,
            counters=metrics.counters,
            distributions=metrics.distributions,
        )

    @contextlib.contextmanager
    def around(self, engine: Engine) -> Iterator[None]:
        """Keep what a local runner and its processes write on standard error from the screen."""
        from beam_nifti.pipeline.runners import quiet_processes

        with contextlib.ExitStack() as stack:
            if engine.in_processes:
                stack.enter_context(quiet_processes())
            if engine.is_local:
                stack.enter_context(contextlib.redirect_stderr(self.noise))
            yield
