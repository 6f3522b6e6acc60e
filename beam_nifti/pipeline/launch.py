"""Run a build or a check on an engine: what the command line and Python have in common."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from beam_nifti.config import BuildConfig
from beam_nifti.errors import BuildSummary, EngineError, UsageError
from beam_nifti.pipeline.build import (
    open_build,
    plan_build,
    plan_check,
    plan_cohort,
    rows_for_workers,
    run_build,
)
from beam_nifti.pipeline.cohort import AnalysisPlan
from beam_nifti.pipeline.follow import follow_build
from beam_nifti.pipeline.metrics import Metrics
from beam_nifti.pipeline.plan import BuildPlan
from beam_nifti.pipeline.progress import no_progress, show_progress
from beam_nifti.pipeline.runners import Engine, write_template
from beam_nifti.pipeline.statistics_file import STATISTICS_NAME, Analysis
from beam_nifti.pipeline.watcher import Watcher
from beam_nifti.record.dataset_info import DatasetInfo, read_info
from beam_nifti.storage import paths as storage
from beam_nifti.support import logs
from beam_nifti.support.outcomes import engine_outcome
from beam_nifti.support.wording import counted
from beam_nifti.volume.notes import of_unmapped, warnings_of

if TYPE_CHECKING:
    from beam_nifti.pipeline.survey import Survey


@logs.shared
@contextlib.contextmanager
def _quiet_beam() -> Iterator[None]:
    """Keep a local runner's own report of a failure out of the log, because the error reports it."""
    logger = logging.getLogger("apache_beam")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@logs.shared
@contextlib.contextmanager
def _plain_labels() -> Iterator[None]:
    """Keep Beam from adding the number of a notebook's cell to the labels of steps.

    For these numbers it imports its interactive runner, which fails without pandas, and with pandas 3.
    """
    from apache_beam import pipeline

    add_number = pipeline.alter_label_if_ipython
    pipeline.alter_label_if_ipython = lambda *_: None
    try:
        yield
    finally:
        pipeline.alter_label_if_ipython = add_number


@contextlib.contextmanager
def running(
    engine: Engine, watcher: Watcher, total: int, unit: str, what: str, plan: BuildPlan | None = None
) -> Iterator[None]:
    """Run a pipeline in the block: with its progress, and without what a local runner logs.

    Args:
        engine: the engine that it runs on.
        watcher: follows the run.
        total: number of what is counted.
        unit: what is counted.
        what: what to report if it stops, such as "the build stopped".
        plan: plan of a build, which is followed on a cluster by what appears in its storage.

    Raises:
        EngineError: the engine or a worker failed.
    """
    progress: contextlib.AbstractContextManager[None] = no_progress()
    if watcher.has_progress and engine.is_local and not engine.in_processes:
        progress = show_progress(total, unit)
    elif watcher.has_progress and not engine.is_local and plan is not None:
        progress = follow_build(plan)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(progress)
            stack.enter_context(watcher.around(engine))
            stack.enter_context(_plain_labels())
            if engine.is_local:
                stack.enter_context(_quiet_beam())
            yield
    except Exception as e:
        outcome = engine_outcome(e)
        if outcome is None:
            raise
        raise EngineError(what, outcome.reason, outcome.code, outcome.is_explained) from e


def run_dry(config: BuildConfig, rows: bytes | None, watcher: Watcher) -> DatasetInfo:
    """Plan a build; nothing is written. As `run_build_on`."""
    plan, estimate = plan_build(config, rows)
    watcher.on_plan(plan)
    watcher.on_estimate(plan, estimate)
    return plan.describe()


def run_build_on(engine: Engine, rows: bytes | None, watcher: Watcher) -> DatasetInfo:
    """Build a dataset on an engine, whose configuration is that of the build.

    `rows` are as of `plan_build`. Of a template, whose job somebody else starts, the result has no shards.

    Raises:
        TooManyFailures: the dataset is not published.
        EngineError: the engine or a worker failed.
        BeamNiftiError: as `build.open_build`.
    """
    if engine.is_template and rows is not None:
        raise UsageError(
            "--template_location describes a job that starts later, when a table in memory is gone; give a "
            "manifest that is a file"
        )
    measuring = partial(_measure, engine, rows, watcher)
    with open_build(engine.config, rows, is_local=engine.is_local, measure=measuring) as plan:
        watcher.on_plan(plan)
        if engine.is_template:
            with running(engine, Watcher(has_progress=False), 0, "", "the template was not written"):
                write_template(plan, engine.options)
            return plan.describe()
        ended = list[tuple[BuildSummary, Metrics]]()
        try:
            with running(engine, watcher, plan.num_examples, "volume", "the build stopped", plan):
                run_build(plan, engine.options, lambda *end: ended.append(end))
        finally:
            for summary, metrics in ended:
                watcher.on_end(summary, metrics)
                for warning in warnings_of(metrics.counters):
                    logs.LOGGER.warning("%s", warning)
                if unmapped := summary.unmapped_labels:
                    logs.LOGGER.warning("warning: %s", of_unmapped(unmapped))
        return read_info(plan.config.output)


def _measure(
    engine: Engine, rows: bytes | None, watcher: Watcher, plan: AnalysisPlan, what: str = "the build stopped"
) -> Analysis:
    """Run an analysis; `rows` are as of `plan_build`."""
    from beam_nifti.pipeline.analyze import run_analysis

    config = plan.build.config
    if engine.is_template:
        raise UsageError(
            f"--template_location describes a job that starts later, but --rescale {config.record.rescale} "
            "measures the volumes first; run `beam-nifti analyze`, and give its file with --rescale-stats"
        )
    if plan.below is not None and watcher.has_progress:  # a build goes on after it
        splits = " and ".join(plan.splits)
        logs.LOGGER.info("measuring %s of %s", counted(plan.num_volumes, "volume"), splits)
    of_rows = plan.build.parts_root if plan.below else storage.dirname(plan.path)
    folder = None if engine.is_local else of_rows
    with (
        rows_for_workers(config, rows, folder) as config,
        running(engine, watcher, plan.num_volumes, "volume", what),
    ):
        return run_analysis(replace(plan, build=replace(plan.build, config=config)), engine.options)


def run_analysis_on(engine: Engine, rows: bytes | None, out: str | None, watcher: Watcher) -> Analysis:
    """Measure a cohort on an engine, as `run_build_on`; `out` is the file of the result, if any.

    Raises:
        TooManyFailures: more volumes failed than `max_bad_fraction` allows.
        EngineError: the engine or a worker failed.
        BeamNiftiError: as `build.plan_cohort`.
    """
    with contextlib.ExitStack() as stack:
        if engine.is_local:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="beam-nifti-"))
        else:
            base = engine.config.temp_location or storage.dirname(storage.absolute(out or ""))
            folder = storage.join(base, f"beam_nifti-{uuid.uuid4().hex}")
            stack.callback(storage.delete_folder, folder, base)
        path = storage.join(folder, STATISTICS_NAME)
        plan = plan_cohort(engine.config, rows, path)
        stack.callback(storage.delete, path, folder)
        analysis = _measure(engine, rows, watcher, plan, "the analysis stopped")
    if out is not None:
        storage.write(storage.absolute(out), analysis.to_json().encode())
    return analysis


def run_check_on(
    engine: Engine, rows: bytes | None, out: str | None, watcher: Watcher, *, voxels: bool = False
) -> Survey:
    """Check the images of a manifest, as `run_build_on`; `out` is the file of the report, if any.

    `voxels` is as of `CheckPlan`.

    Raises:
        EngineError: the engine or a worker failed.
        BeamNiftiError: as `build.plan_check`.
    """
    # Beam is loaded with it.
    from beam_nifti.pipeline.check import check_images

    plan = plan_check(engine.config, rows, voxels=voxels)
    watcher.on_plan(plan)
    base = plan.config.temp_location or storage.dirname(plan.config.output)
    folder = None if engine.is_local else storage.join(base, f"beam_nifti-{uuid.uuid4().hex}")
    with (
        rows_for_workers(plan.config, rows, folder) as config,
        running(engine, watcher, plan.num_rows, "image", "the check stopped"),
    ):
        return check_images(replace(plan, config=config), engine.options, out)
