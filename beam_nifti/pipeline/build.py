"""Plan a build, run it, clean up after it."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from beam_nifti.config import BuildConfig
from beam_nifti.errors import BuildSummary, ManifestError, UsageError
from beam_nifti.pipeline import lock
from beam_nifti.pipeline.cohort import AnalysisPlan, Measure, forget_measured, plan_analysis, with_statistics
from beam_nifti.pipeline.decision import Decision, decide
from beam_nifti.pipeline.inputs import Inputs, read_inputs, read_rows
from beam_nifti.pipeline.metrics import Distribution, Metrics
from beam_nifti.pipeline.parts import parts_root, remove_parts
from beam_nifti.pipeline.plan import BuildPlan, CheckPlan, record_bytes, with_absolute_paths
from beam_nifti.pipeline.publish import (
    ROWS_FILE,
    clean_up,
    forget_summary,
    remove_files,
    take_summary,
    too_many_failures,
)
from beam_nifti.pipeline.resume import Reuse, preview_reuse
from beam_nifti.pipeline.saved_plan import require_current
from beam_nifti.record.dataset_files import FILE_NAME
from beam_nifti.record.dataset_info import read_info
from beam_nifti.storage import paths as storage

if TYPE_CHECKING:
    from apache_beam.metrics.metric import MetricResult
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.runner import PipelineResult


@dataclass(frozen=True)
class Estimate:
    """What a build would write.

    Attributes:
        num_bytes: size of the shards, roughly.
        shape: (X, Y, Z) or (X, Y, Z, C) of the first image's record.
        reuse: what is taken from what the output holds; None if it holds nothing.
    """

    num_bytes: int
    shape: tuple[int, ...]
    reuse: Reuse | None = None


def plan_build(config: BuildConfig, rows: bytes | None = None) -> tuple[BuildPlan, Estimate]:
    """Read the manifest and the first header, look at the output, and decide. Writes nothing.

    `rows` are those of a manifest that `config` only names, as a Parquet file; None if it is a file.

    Raises:
        ManifestError: the manifest cannot be built from.
        OutputError: the output holds something that this build must not touch; or nothing can be written
            to it, or to the temporary folder.
        UsageError: the user's function cannot be imported; or the key of anonymous ids is in the output,
            or too short.
        OSError: a folder cannot be written now, but that may pass.
    """
    inputs = with_statistics(read_inputs(config, rows))
    decision = decide(inputs, is_dry=True)
    return decision.plan, _estimate(inputs, decision)


def plan_check(config: BuildConfig, rows: bytes | None = None, *, voxels: bool = False) -> CheckPlan:
    """Read the manifest and the first header as a build does, apart from its output.

    The output of `config` is the report, "" for none. `voxels` is as of `CheckPlan`.

    Raises:
        ManifestError: the manifest cannot be built from, whatever its images are.
        UsageError: as `plan_build`.
    """
    config, manifest = read_rows(with_absolute_paths(config), rows)
    num_skipped = manifest.num_skipped
    plan = CheckPlan(
        config,
        len(manifest) - num_skipped,
        num_skipped,
        None,
        num_unlabelled=manifest.num_unlabelled,
        num_unmasked=manifest.num_unmasked,
        voxels=voxels,
    )
    try:
        inputs = Inputs.of(config, manifest)
    except ManifestError as e:
        return replace(plan, refusal=str(e))
    return replace(plan, build=inputs.plan(replace(config, sharding=inputs.choose_sharding())))


def plan_cohort(config: BuildConfig, rows: bytes | None, path: str) -> AnalysisPlan:
    """Read the manifest and the first header, and plan an analysis; its result is written to the file.

    Raises:
        ManifestError: the manifest cannot be built from.
        UsageError: the manifest lacks a split that is to be measured.
    """
    return plan_analysis(Inputs.of(*read_rows(with_absolute_paths(config), rows)), path)


def _estimate(inputs: Inputs, decision: Decision) -> Estimate:
    plan = decision.plan
    each = record_bytes(math.prod(inputs.shape), inputs.itemsize, plan.config.record)
    holds_something = decision.published or decision.is_continued
    return Estimate(
        num_bytes=round(plan.num_examples * each),
        shape=inputs.shape,
        reuse=preview_reuse(plan, inputs.manifest, decision.published) if holds_something else None,
    )


@contextlib.contextmanager
def open_build(
    config: BuildConfig,
    rows: bytes | None = None,
    *,
    is_local: bool = True,
    measure: Measure | None = None,
) -> Iterator[BuildPlan]:
    """Plan a build and prepare its output, which no other build can write to during the block.

    Workers reach the `rows` of `plan_build` during the block; `is_local` is whether they reach this disk.
    `measure` measures the cohort if its statistics are required and not known yet.

    Raises:
        ManifestError: as `plan_build`.
        UsageError: as `plan_build`.
        OutputError: as `plan_build`; or another build is writing there.
    """
    inputs = read_inputs(config, rows)  # a manifest that cannot be built from leaves no trace of the build
    with lock.hold(inputs.config.output):
        temp_location = inputs.config.temp_location
        if temp_location and storage.is_remote(temp_location):
            storage.require_writable(temp_location, "--temp-location", is_folder=True)
        inputs = with_statistics(inputs, measure)
        decision = decide(inputs)
        del inputs  # hundreds of megabytes of rows, in a large cohort, for as long as the build runs
        _prepare(decision)
        config = decision.plan.config
        folder = None if is_local else decision.plan.parts_root
        with rows_for_workers(config, rows, folder) as config:
            yield replace(decision.plan, config=config)


@contextlib.contextmanager
def rows_for_workers(config: BuildConfig, rows: bytes | None, folder: str | None) -> Iterator[BuildConfig]:
    """The configuration of a build whose workers can read the `rows` of `plan_build` during the block.

    They are in the folder, or in a temporary one of this machine.

    Raises:
        UsageError: they would be in the output, with names that pseudonyms must replace there.
    """
    if rows is None:
        yield config
    elif folder is None:
        with (
            tempfile.TemporaryDirectory(prefix="beam-nifti-") as here,
            rows_for_workers(config, rows, storage.join(here, "rows")) as config,
        ):
            yield config
    else:
        if config.anonymous_ids and config.output and storage.is_within(folder, config.output):
            raise UsageError(
                "a table in memory is written to a file for the workers, and it has the names that "
                "--anonymous-ids keeps out of OUTPUT; give --temp-location, or a manifest that is a file"
            )
        path, below = storage.join(folder, ROWS_FILE), storage.dirname(folder)
        storage.write(path, rows, below)
        try:
            yield replace(config, rows=path)
        finally:
            storage.delete(path, below)
            storage.delete_folder(folder, below)


def _prepare(decision: Decision) -> None:
    """Remove what this build cannot use of unfinished ones, and save its plan."""
    plan, dead, saved = decision.plan, decision.dead, decision.to_save()
    output, published = plan.config.output, decision.published
    unfinished = [found for found in (dead, decision.write) if found]
    roots = {*plan.parts_roots, parts_root(output, None)}.union(*(u.parts_roots(output) for u in unfinished))
    for root in roots:
        remove_parts(root, keep=saved.fingerprint if decision.is_continued else None)
    has_ended = dead is not None and published is not None and dead.is_of(published)
    if has_ended or not decision.is_continued:
        written = set[str]().union(*(found.written for found in unfinished))
        remove_files(output, written, keep=saved.published)
    if not plan.has_published:  # a damaged one, which --overwrite was given for
        storage.delete(storage.join(output, FILE_NAME), output)
    forget_summary(output)
    saved.write(output)
    if plan.config.record.is_of_cohort:
        forget_measured(output)  # the saved plan has the statistics


def run_build(
    plan: BuildPlan, options: PipelineOptions, on_end: Callable[[BuildSummary, Metrics], None] | None = None
) -> tuple[BuildSummary, Metrics]:
    """Run the pipeline and remove what only the build needed.

    `on_end` gets what is returned, also if too many volumes failed.

    Raises:
        TooManyFailures: the dataset is not published; the next run loads only what failed.
        OutputBusyError: another build has taken the output.
    """
    import apache_beam as beam

    from beam_nifti.pipeline.transforms import BuildDataset

    pipeline = beam.Pipeline(options=options)
    pipeline | "BuildDataset" >> BuildDataset(plan)
    result = pipeline.run()
    result.wait_until_finish()
    lock.require_held(plan.config.output)  # or what is removed now may be another build's
    summary, metrics = take_summary(plan.config.output), _metrics(result)
    assert summary is not None
    if on_end:
        on_end(summary, metrics)
    if not summary.complete:
        raise too_many_failures(summary, plan.config)
    output = plan.config.output
    clean_up(output, require_current(output, plan.identity), read_info(output))
    return summary, metrics


def _metrics(result: PipelineResult) -> Metrics:
    """What our steps have counted; runners count more, under names of their own."""
    counters: dict[str, int] = {}
    distributions: dict[str, Distribution] = {}
    found = result.metrics().query()
    for counter in filter(_is_ours, found["counters"]):
        name = counter.key.metric.name
        counters[name] = counters.get(name, 0) + (counter.result or 0)
    for distribution in filter(_is_ours, found["distributions"]):
        name, of_step = distribution.key.metric.name, distribution.result
        if of_step is not None and of_step.count:
            values = Distribution(of_step.count, of_step.sum, of_step.min, of_step.max)
            distributions[name] = values.plus(distributions[name]) if name in distributions else values
    return Metrics(counters, distributions)


def _is_ours(found: MetricResult) -> bool:
    namespace = found.key.metric.namespace
    return namespace is not None and namespace.startswith("beam_nifti.")
