"""Statistics of a cohort on any runner: `beam-nifti analyze`, and what a build measures before its records.

Create([manifest])   str
CutRows              tuple of VolumeRow
Reshuffle            tuple of VolumeRow
UnpackRows           VolumeRow
LoadVolume           Volume            ┐
Preprocess           Volume            │ each with (shard, Failure)
Measure              (VolumeMeans, CohortMeasure) ┘
AddUp                CohortMeasure
FindUnusual          UnusualVolume     of VolumeMeans, when all are measured
WriteMeasured        one file
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.pvalue import AsList, AsSingleton, PBegin

from beam_nifti.config import LEAST_COMPARED, ChannelStatistics, RecordConfig
from beam_nifti.errors import (
    BuildSummary,
    FailedVolume,
    ManifestChangedError,
    TooManyFailures,
    VolumeError,
)
from beam_nifti.manifest.manifest import VolumeRow
from beam_nifti.pipeline.cohort import AnalysisPlan
from beam_nifti.pipeline.failures import Absence, Failure, accepting_fraction
from beam_nifti.pipeline.local_runner import send_whole_elements
from beam_nifti.pipeline.plan import read_build_manifest
from beam_nifti.pipeline.progress import current_progress
from beam_nifti.pipeline.statistics_file import Analysis, Measured, UnusualVolume
from beam_nifti.pipeline.steps import FAILURES, LoadVolumeFn, PreprocessFn, guarded, timed
from beam_nifti.storage import paths as storage
from beam_nifti.support.wording import counted
from beam_nifti.volume.cohort import CohortMeasure, measure_volume
from beam_nifti.volume.volume import Volume

if TYPE_CHECKING:
    from apache_beam.options.pipeline_options import PipelineOptions

send_whole_elements()

_SHOWN: Final = 5  # failures in an error
_Values = beam.PCollection[Any]


class CutRows(beam.DoFn):
    """Cut the rows of the measured splits into units of work."""

    def __init__(self, plan: AnalysisPlan) -> None:
        self._plan = plan

    def process(self, path: str) -> Iterable[tuple[VolumeRow, ...]]:
        """Yield rows, some at a time.

        Raises:
            ManifestChangedError: the manifest is no longer the one that was planned for.
        """
        plan = self._plan.build
        manifest = read_build_manifest(path, plan.config)
        if manifest.digest() != plan.digest:
            raise ManifestChangedError(path, ["changed since it was read; start again"])
        clip = plan.config.record.clip_frames
        for split in self._plan.splits:
            indices = manifest.row_numbers(split).tolist()
            for start in range(0, len(indices), self._plan.unit_rows):
                some = indices[start : start + self._plan.unit_rows]
                yield tuple(manifest.rows(some, num_frames=plan.num_frames, clip_frames=clip))


class VolumeMeans(NamedTuple):
    """A measured volume: row and position in the manifest, and the mean of each channel that has voxels."""

    row: int
    position: int
    example_id: str
    means: tuple[float | None, ...]


class MeasureFn(beam.DoFn):
    """Measure a prepared volume."""

    def __init__(self, config: RecordConfig) -> None:
        self._config = config
        self._msec = Metrics.distribution(type(self), "measure-msec")
        self._progress = current_progress()

    def process(self, volume: Volume) -> Iterable[tuple[VolumeMeans, CohortMeasure]]:
        """Yield its means and its measure."""
        with timed(self._msec):
            measure = measure_volume(volume, self._config)
        self._progress.add(volumes=1)
        means = tuple(channel.mean if channel.count else None for channel in measure.channels)
        yield VolumeMeans(volume.row.row, volume.row.position, volume.row.example_id, means), measure


def _add_up(measures: Iterable[CohortMeasure]) -> CohortMeasure:
    """The total of measures or of totals, whose order and grouping the runner chooses."""
    total = CohortMeasure()
    for measure in measures:
        total.add(measure)
    return total


def _means_of(measured: tuple[VolumeMeans, CohortMeasure]) -> VolumeMeans:
    return measured[0]


def _measure_of(measured: tuple[VolumeMeans, CohortMeasure]) -> CohortMeasure:
    return measured[1]


def _summarize(total: CohortMeasure) -> tuple[ChannelStatistics | None, ...]:
    is_enough = total.num_volumes >= LEAST_COMPARED
    return tuple(c.statistics(()) if is_enough and c.count else None for c in total.channels)


def _find_unusual(
    volume: VolumeMeans, channels: tuple[ChannelStatistics | None, ...], names: Sequence[str]
) -> Iterable[tuple[int, UnusualVolume]]:
    """Yield a volume with its position for each channel in which it is far from the others."""
    for name, mean, channel in zip(names, volume.means, channels, strict=True):
        if mean is not None and channel is not None and channel.is_far(mean):
            yield volume.position, UnusualVolume(volume.row, volume.example_id, name, mean)


def _failures_of(outcome: tuple[str, Failure | Absence]) -> Iterable[Failure]:
    """Yield a failure; an image with fewer frames than others has not failed."""
    if isinstance(outcome[1], Failure):
        yield outcome[1]


def _rows_of(rows: tuple[VolumeRow, ...]) -> Iterable[VolumeRow]:
    return rows


def _write_measured(
    total: CohortMeasure,
    failures: Sequence[Failure],
    unusual: Sequence[tuple[int, UnusualVolume]],
    plan: AnalysisPlan,
) -> None:
    in_order = sorted(failures, key=lambda f: (f.row.row, f.row.position, f.stage))
    num_failed = sum(len(failure.row.positions) for failure in in_order)
    folder = storage.dirname(plan.build.config.manifest)
    failed = tuple(
        FailedVolume(
            row=failure.row.row,
            example_id=failure.row.example_id,
            path=failure.row.source if failure.row.pseudonyms else storage.join(folder, failure.row.path),
            stage=failure.stage,
            error=failure.error,
            message=failure.message,
        )
        for failure in in_order
    )
    statistics, problem, config = None, "no volume could be measured", plan.build.config
    if total.num_volumes:
        try:
            statistics = total.statistics(config.record, plan.splits, num_failed)
            problem = ""
        except VolumeError as e:
            problem = str(e)
    by_row = sorted(unusual, key=lambda found: (found[1].row, found[0], found[1].channel))
    far = tuple(volume for _, volume in by_row)
    measured = Measured(statistics, problem, failed, far, num_failed, plan.key)
    storage.write(plan.path, measured.to_json().encode(), plan.below)


class MeasureCohort(beam.PTransform[Any, Any]):
    """The whole graph of an analysis, up to the file of the result."""

    def __init__(self, plan: AnalysisPlan) -> None:
        super().__init__()
        self._plan = plan

    def expand(self, pipeline: beam.Pipeline | PBegin) -> _Values:
        """To one None."""
        plan = self._plan
        record, folder = plan.build.config.record, storage.dirname(plan.build.config.manifest)
        loading = LoadVolumeFn(folder, plan.build.required_shape, plan.build.required_dtype, record)
        loaded = (
            pipeline
            | "Create" >> beam.Create([plan.build.config.manifest], reshuffle=False)  # str
            | "CutRows" >> beam.ParDo(CutRows(plan)).with_output_types(tuple[VolumeRow, ...])
            | "Reshuffle" >> beam.Reshuffle().with_output_types(tuple[VolumeRow, ...])  # tuple of VolumeRow
            | "UnpackRows" >> beam.FlatMap(_rows_of).with_output_types(VolumeRow)  # VolumeRow
            | "LoadVolume" >> guarded(loading, Volume, folder, release=True)  # Volume
        )
        steps, volumes = [loaded], loaded.main
        if record.prepares:
            preparing = PreprocessFn(record, plan.build.required_shape, release=True)
            steps += [volumes | "Preprocess" >> guarded(preparing, Volume, folder, release=True)]  # Volume
            volumes = steps[-1].main
        measured = volumes | "Measure" >> guarded(
            MeasureFn(record), tuple[VolumeMeans, CohortMeasure], folder, release=True
        )  # (VolumeMeans, CohortMeasure)
        failures: _Values = (
            tuple(step[FAILURES] for step in (*steps, measured))
            | "Flatten" >> beam.Flatten().with_output_types(tuple[str, Failure | Absence])
            | "Failures" >> beam.FlatMap(_failures_of).with_output_types(Failure)  # Failure
        )
        total = (
            measured.main
            | "Measures" >> beam.Map(_measure_of).with_output_types(CohortMeasure)  # CohortMeasure
            | "AddUp" >> beam.CombineGlobally(_add_up)  # CohortMeasure
        )
        channels = total | "Summarize" >> beam.Map(_summarize)  # ChannelStatistics of each channel
        unusual = (
            measured.main
            | "Means" >> beam.Map(_means_of).with_output_types(VolumeMeans)  # VolumeMeans
            | "FindUnusual" >> beam.FlatMap(_find_unusual, AsSingleton(channels), record.channels or ("",))
        )  # (position, UnusualVolume)
        written: _Values = total | "WriteMeasured" >> beam.Map(
            _write_measured, AsList(failures), AsList(unusual), plan
        )  # None
        return written


def run_analysis(plan: AnalysisPlan, options: PipelineOptions) -> Analysis:
    """Measure the volumes on an engine. The file of the result stays.

    Raises:
        TooManyFailures: more volumes failed than `max_bad_fraction` allows.
        VolumeError: none of them has a voxel to measure.
    """
    pipeline = beam.Pipeline(options=options)
    pipeline | "MeasureCohort" >> MeasureCohort(plan)
    pipeline.run().wait_until_finish()
    return _accepted(plan.read(), plan)


def _accepted(measured: Measured, plan: AnalysisPlan) -> Analysis:
    failed, total = measured.num_failed, plan.num_volumes
    if not plan.build.config.allows_failures(failed, total):
        lines = [f"{failed} of {counted(total, 'volume')} failed, more than --max-bad-fraction allows:"]
        lines += [f"row {f.row} ({f.example_id}): {f.message}" for f in measured.failures[:_SHOWN]]
        if len(measured.failures) > _SHOWN:
            lines.append(f"and {len(measured.failures) - _SHOWN:,} more")
        lines.append(f"--max-bad-fraction {accepting_fraction(failed, total)} accepts them")
        counts: dict[str, dict[str, int]] = {}
        for failure in measured.failures:
            of_stage = counts.setdefault(failure.stage, {})
            of_stage[failure.error] = of_stage.get(failure.error, 0) + 1
        summary = BuildSummary(0, failed, 0, 0, complete=False, failures=counts)
        raise TooManyFailures("\n  ".join(lines), summary, measured.failures)
    if measured.statistics is None:
        raise VolumeError(f"{plan.build.config.manifest}: {measured.problem}")
    return Analysis(measured.statistics, measured.failures, measured.unusual)
