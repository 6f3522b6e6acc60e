"""The statistics of the cohort that a build uses: those of its dataset, or those that it measures first."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

from beam_nifti.config import BuildConfig, CohortStatistics
from beam_nifti.errors import OutputError, UsageError
from beam_nifti.pipeline.decision import decide, read_saved_plan
from beam_nifti.pipeline.inputs import Inputs
from beam_nifti.pipeline.parts import BUILD_FOLDER
from beam_nifti.pipeline.plan import BuildPlan, unit_rows
from beam_nifti.pipeline.publish import find_replaceable
from beam_nifti.pipeline.statistics_file import STATISTICS_NAME, Analysis, Measured
from beam_nifti.record.versions import record_versions
from beam_nifti.storage import paths as storage
from beam_nifti.support.strict_json import dump_json

_FREE_BYTES: Final = 64 << 20
_ROW_BYTES: Final = 4 << 10
"""Most bytes of a result: a constant, and an amount per row, which may have failed."""

_NOT_COMPARED: Final = ("fingerprint", "rescale_stats", "sharding")
"""Keys of a dataset's `config` that follow from what is measured, or have no effect on it."""


@dataclass(frozen=True)
class AnalysisPlan:
    """What is measured.

    Attributes:
        build: plan of the build into an empty output, with the digest of the manifest.
        path: file of the result, within the workers' reach.
        below: folder below which no link is followed; None for any.
    """

    build: BuildPlan
    path: str
    below: str | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits whose volumes are measured."""
        return self.build.config.record.measured_splits

    @property
    def num_volumes(self) -> int:
        """Volumes of these splits."""
        return sum(self.build.split_examples[split] for split in self.splits)

    @property
    def unit_rows(self) -> int:
        """Most rows of a unit of work."""
        num_rows = sum(self.build.split_sizes[split] for split in self.splits)
        return unit_rows(num_rows, self.build.config.workers)

    @property
    def key(self) -> str:
        """16 hex digits that differ if other volumes are measured, or in another way."""
        plan, record = self.build, self.build.config.record
        facts: list[Any] = [
            record.measured_options,
            record.rescale,
            self.splits,
            plan.digest,
            plan.shape,
        ]
        facts += [storage.dirname(plan.config.manifest), plan.num_frames, plan.source_dtype, plan.versions]
        facts += [plan.config.columns.files]
        return hashlib.sha256(dump_json(facts, sort_keys=True).encode()).hexdigest()[:16]

    def read(self) -> Measured:
        """What the pipeline has found.

        Raises:
            FileNotFoundError: there is no such file.
            OutputError: it differs from what the pipeline wrote.
        """
        most = _FREE_BYTES + _ROW_BYTES * self.build.num_rows
        try:
            return Measured.from_json(storage.read_bounded(self.path, most, self.below))
        except (storage.FileTooLargeError, ValueError) as e:
            raise OutputError(
                f"{self.path}: differs from what the pipeline wrote: {e}; run the command again"
            ) from e


Measure: TypeAlias = Callable[[AnalysisPlan], Analysis]
"""Runs an analysis, whose file stays."""


def plan_analysis(inputs: Inputs, path: str, below: str | None = None) -> AnalysisPlan:
    """Plan the analysis for a build; its result is written to the file."""
    plan = replace(inputs.plan(inputs.config), digest=inputs.manifest.digest(), versions=record_versions())
    return AnalysisPlan(plan, path, below)


def _measured_path(output: str) -> str:
    return storage.join(output, BUILD_FOLDER, STATISTICS_NAME)


def forget_measured(output: str) -> None:
    """Remove what a build has measured, once it is saved elsewhere."""
    storage.delete(_measured_path(output), output)


def with_statistics(inputs: Inputs, measure: Measure | None = None) -> Inputs:
    """The inputs of a build with the statistics that it uses, if its `rescale` depends on them.

    These are, in this order: those that are given; those of the dataset in the output; those of an unfinished
    build there; and those that `measure` gives. Without `measure`, there may be none.

    Raises:
        OutputError: the build would be refused after the measurement.
    """
    config = inputs.config
    if not config.record.is_of_cohort or config.record.rescale_stats is not None:
        return inputs
    plan = plan_analysis(inputs, _measured_path(config.output), config.output)
    found = _find_statistics(config, plan.build)
    if found is None:
        found = _left_behind(plan)
        if found is None and measure is not None:
            decide(inputs, is_dry=True)
            try:
                found = measure(plan).statistics
            except Exception:
                forget_measured(config.output)  # and measure again once images are repaired
                raise
    return inputs if found is None else replace(inputs, config=_with(config, found))


def _with(config: BuildConfig, statistics: CohortStatistics) -> BuildConfig:
    return replace(config, record=replace(config.record, rescale_stats=statistics))


def _find_statistics(config: BuildConfig, plan: BuildPlan) -> CohortStatistics | None:
    """Statistics of the dataset in the output, or of an unfinished build, if they suit this one."""
    published = find_replaceable(config.output, overwrite=config.overwrite)
    of_published = published.record_config.rescale_stats if published else None
    if published and not config.overwrite:
        return of_published if _suits(config, of_published) else None
    dead = read_saved_plan(config)
    if dead is None or not _is_same(dead.info.config, plan.describe().config):
        return None
    found = dead.info.record_config.rescale_stats
    # An unfinished build that kept the statistics of the dataset is not the one that replaces them.
    is_new = not config.overwrite or published is None or found != of_published
    return found if is_new and _suits(config, found) else None


def _suits(config: BuildConfig, statistics: CohortStatistics | None) -> bool:
    try:
        return statistics is not None and bool(_with(config, statistics))
    except UsageError:  # they lack what the method requires: the options have changed
        return False


def _is_same(*configs: Mapping[str, Any]) -> bool:
    """Whether two datasets have the same options, whatever their statistics are."""
    one, other = (
        {name: value for name, value in each.items() if name not in _NOT_COMPARED} for each in configs
    )
    return one == other


def _left_behind(plan: AnalysisPlan) -> CohortStatistics | None:
    """What a build measured that ended before it saved its plan."""
    try:
        measured = plan.read()
    except (FileNotFoundError, OutputError):
        return None
    is_complete = plan.build.config.allows_failures(measured.num_failed, plan.num_volumes)
    return measured.statistics if measured.key == plan.key and is_complete else None
