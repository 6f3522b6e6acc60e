"""The graph of a build: DoFns and PTransforms. Wiring, labels and counters; the work is in plain functions.

Create([manifest])   str
ReadManifest         WorkUnit, and (shard, ShardTask)
Reshuffle            WorkUnit          only rows cross a shuffle, never a voxel
SkipFinished         WorkUnit, and (shard, Part)
UnpackRows           VolumeRow
LoadVolume           Volume            ┐ with --frames each several a row
Preprocess           Volume            │ only where a preparation is asked for
Rescale              Volume            │ each with (shard, Failure)
EncodeExample        Record            ┘
WriteParts           (shard, Part)
CommitShards         ShardOutcome
WriteDatasetInfo     BuildSummary

The steps from LoadVolume to EncodeExample are in `pipeline.steps`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.pvalue import PBegin, TaggedOutput
from apache_beam.utils.windowed_value import WindowedValue

from beam_nifti.errors import BuildSummary
from beam_nifti.manifest.manifest import WHOLE_SHARD, VolumeRow
from beam_nifti.pipeline import lock
from beam_nifti.pipeline.failures import Absence, Failure
from beam_nifti.pipeline.merge import ShardMerge, count_differing, keep_if_same
from beam_nifti.pipeline.parts import Part, PartWriter, parts_folder
from beam_nifti.pipeline.plan import BuildPlan, ShardTask, WorkUnit
from beam_nifti.pipeline.progress import current_progress
from beam_nifti.pipeline.publish import publish_dataset, too_many_failures
from beam_nifti.pipeline.records import Record
from beam_nifti.pipeline.resume import find_finished
from beam_nifti.pipeline.saved_plan import require_current
from beam_nifti.pipeline.steps import (
    FAILURES,
    EncodeExampleFn,
    LoadVolumeFn,
    PartsFn,
    PreprocessFn,
    RescaleFn,
    at_end,
    guarded,
    timed,
)
from beam_nifti.record.dataset_info import ShardInfo
from beam_nifti.record.index import IndexEntry, read_index
from beam_nifti.record.sharding import ShardName
from beam_nifti.record.tiles import encode_record
from beam_nifti.record.totals import RecordTotals
from beam_nifti.storage import paths as storage
from beam_nifti.volume.volume import Volume

FINISHED: Final = "finished"
SHARDS: Final = "shards"
_Values = beam.PCollection[Any]


@dataclass(frozen=True, slots=True)
class ShardOutcome:
    """What became of the volumes of one shard."""

    shard: ShardInfo
    failures: tuple[Failure, ...]
    totals: RecordTotals
    num_absent: int = 0


class ReadUnitsFn(beam.DoFn):
    """Cut the manifest into work units."""

    def __init__(self, plan: BuildPlan) -> None:
        self._plan = plan

    def process(self, manifest: str) -> Iterable[Any]:
        """Yield units; and (shard, ShardTask), so that a shard without records is written too."""
        for item in self._plan.read_units(manifest):
            yield (TaggedOutput(SHARDS, (str(item.name), item)) if isinstance(item, ShardTask) else item)


class SkipFinished(beam.DoFn):
    """Send what an earlier run, or an attempt of this one, finished straight to CommitShards."""

    def __init__(self, plan: BuildPlan) -> None:
        self._plan = plan
        self._skipped = Metrics.counter(type(self), "volumes-skipped")
        self._progress = current_progress()

    def process(self, unit: WorkUnit) -> Iterable[Any]:
        """Yield what is left of the unit; and (shard, Part or Absence) for what is not."""
        found, missing, absent = find_finished(self._plan, unit)
        for part in (f.part for f in found):
            num_records = len(part.positions or ())
            self._skipped.inc(num_records)
            self._progress.add(kept=num_records)
            yield TaggedOutput(FINISHED, (str(unit.task.name), part))
        if absent:
            yield TaggedOutput(FINISHED, (str(unit.task.name), Absence(tuple(absent))))
        if missing:
            yield WorkUnit(unit.task, tuple(_still_missing(unit.rows, missing)))


def _still_missing(rows: Iterable[VolumeRow], missing: Iterable[VolumeRow]) -> Iterator[VolumeRow]:
    """The rows some of whose records are missing, wanting only those."""
    wanted: dict[int, list[int]] = {}
    for record in missing:
        wanted.setdefault(record.row, []).append(record.frame or 0)
    for row in rows:
        if row.row in wanted:
            is_whole = len(wanted[row.row]) == len(row.frames)
            yield row if is_whole else replace(row, wanted=tuple(wanted[row.row]))


class WriteParts(PartsFn):
    """Write records into part files, one file open and one volume in memory.

    A part ends where the unit or the bundle ends, so a unit that a runner cuts in two becomes two.
    """

    def __init__(self, plan: BuildPlan) -> None:
        self._root, self._config, self._extra_columns = (
            plan.parts_root,
            plan.config.record,
            plan.extra_columns,
        )
        self._level = self._config.compression_level if self._config.compression == "gzip" else None
        self._msec = Metrics.distribution(type(self), "write-msec")
        self._bytes = Metrics.counter(type(self), "bytes-written")
        self._progress = current_progress()

    def start_bundle(self) -> None:
        """Start without an open file."""
        super().start_bundle()
        self._unit: tuple[str, int] | None = None

    def process(self, record: Record) -> Iterable[tuple[str, Part]]:
        """Yield (shard, Part) when a part is complete."""
        entry, example = cast(IndexEntry, record.entry), record.example
        unit = (entry.row.shard, entry.row.unit)
        closed = list[tuple[str, Part]]()
        with self._lock, timed(self._msec):
            if self._is_torn_down:
                return
            if unit != self._unit:
                closed += self._close()
                self._start(entry.row)
            encoded = encode_record(example, self._level, whole=not self._config.has_members)
            cast(PartWriter, self._open).write(entry, encoded)
        yield from closed
        size = sum(encoded.lengths)
        self._bytes.inc(size)
        self._progress.add(volumes=1, num_bytes=size)

    def finish_bundle(self) -> Iterable[WindowedValue]:
        """Yield the bundle's last part."""
        with self._lock:
            closed = list(self._close())
        yield from map(at_end, closed)

    def _start(self, row: VolumeRow) -> None:
        name = ShardName.parse(row.shard)
        assert name is not None
        folder = parts_folder(self._root, self._config.fingerprint, name.split, name.index)
        is_shard = row.unit == WHOLE_SHARD
        self._open = PartWriter(folder, row.position, self._config, self._extra_columns, is_shard)
        self._unit = (row.shard, row.unit)

    def _close(self) -> Iterator[tuple[str, Part]]:
        if self._open is not None and self._unit is not None:
            yield self._unit[0], cast(PartWriter, self._open).close()
            self._open = self._unit = None


class CommitShards(beam.DoFn):
    """Merge the parts of a shard and publish it."""

    def __init__(self, plan: BuildPlan) -> None:
        self._plan = plan
        self._msec = Metrics.distribution(type(self), "commit-msec")
        self._committed = Metrics.counter(type(self), "shards-committed")
        self._compared = Metrics.counter(type(self), "examples-compared")
        self._differing = Metrics.counter(type(self), "examples-differing")
        self._progress = current_progress()

    def process(
        self, shard: tuple[str, Iterable[ShardTask | Part | Failure | Absence]]
    ) -> Iterable[ShardOutcome]:
        """Yield what became of the shard's rows."""
        plan, output, record = self._plan, self._plan.config.output, self._plan.config.record
        outcomes = list(shard[1])
        (task,) = {o for o in outcomes if isinstance(o, ShardTask)}
        parts = [o for o in outcomes if isinstance(o, Part)]
        failures = {o.row.position: o for o in outcomes if isinstance(o, Failure)}
        failed = {position for failure in failures.values() for position in failure.row.positions}
        absent = {p for o in outcomes if isinstance(o, Absence) for p in o.positions}
        name, expected = task.name, set(task.positions) - failed - absent
        require_current(output, plan.identity)
        with timed(self._msec):
            folder = parts_folder(plan.parts_root, record.fingerprint, name.split, name.index)
            info = ShardMerge(output, name, expected, parts, record, plan.extra_columns, folder).run()
            if task.compared is not None and info.name != str(task.compared):
                info = keep_if_same(output, task.compared, info)
            if task.compared is not None and task.published is None:  # made anew to be compared
                num_compared, num_differing = count_differing(output, task.compared, info)
                self._compared.inc(num_compared)
                self._differing.inc(num_differing)
        self._committed.inc()
        self._progress.add(shards=1)
        totals = RecordTotals()
        if columns := RecordTotals.columns(record):
            table, _ = read_index(storage.join(output, info.index), columns=columns, below=output)
            totals = RecordTotals.of(table)
        yield ShardOutcome(info, tuple(failures.values()), totals, len(absent))


class WriteDatasetInfo(beam.DoFn):
    """Write dataset_info.json, last of all.

    Args:
        plan: plan of the build.
        enforces_limit: whether too many failed volumes fail the pipeline. A runner would try that again.
    """

    def __init__(self, plan: BuildPlan, enforces_limit: bool = False) -> None:
        self._plan, self._enforces_limit = plan, enforces_limit

    def process(self, group: tuple[None, Iterable[ShardOutcome]]) -> Iterable[BuildSummary]:
        """Yield how the build ended."""
        outcomes = list(group[1])
        failures = [f for o in outcomes for f in o.failures]
        require_current(self._plan.config.output, self._plan.identity)
        lock.require_held(self._plan.config.output)
        totals = sum((o.totals for o in outcomes), RecordTotals())
        num_absent = sum(o.num_absent for o in outcomes)
        summary = publish_dataset(self._plan, [o.shard for o in outcomes], failures, totals, num_absent)
        if self._enforces_limit and not summary.complete:
            raise too_many_failures(summary, self._plan.config)
        yield summary


def _rows_of(unit: WorkUnit) -> Iterable[VolumeRow]:
    return unit.rows


def _without_key(outcome: ShardOutcome) -> tuple[None, ShardOutcome]:
    return None, outcome


class BuildDataset(beam.PTransform[Any, Any]):
    """The whole graph of a build, up to the published dataset.

    Args:
        plan: what to build.
        enforces_limit: whether too many failed volumes fail the pipeline; otherwise, who runs it must check
            the summary.
    """

    def __init__(self, plan: BuildPlan, enforces_limit: bool = False) -> None:
        super().__init__()
        self._plan, self._enforces_limit = plan, enforces_limit

    def expand(self, pipeline: beam.Pipeline | PBegin) -> _Values:
        """To one BuildSummary."""
        plan, config = self._plan, self._plan.config
        manifest = (
            pipeline
            | "Create" >> beam.Create([config.manifest], reshuffle=False)  # str
            | "ReadManifest"
            >> beam.ParDo(ReadUnitsFn(plan))
            .with_output_types(WorkUnit, **{SHARDS: tuple[str, ShardTask]})
            .with_outputs(SHARDS, main="units")
        )
        units = (
            manifest.units
            | "Reshuffle" >> beam.Reshuffle().with_output_types(WorkUnit)  # WorkUnit
            | "SkipFinished"
            >> beam.ParDo(SkipFinished(plan))
            .with_output_types(WorkUnit, **{FINISHED: tuple[str, Part | Absence]})
            .with_outputs(FINISHED, main="units")
        )
        folder = storage.dirname(config.manifest)
        loading = LoadVolumeFn(folder, plan.required_shape, plan.required_dtype, config.record)
        loaded = (
            units.units
            | "UnpackRows" >> beam.FlatMap(_rows_of).with_output_types(VolumeRow)  # VolumeRow
            | "LoadVolume" >> guarded(loading, Volume, folder, release=True)  # Volume
        )
        steps, volumes = [loaded], loaded.main
        if config.record.prepares:
            prepared = volumes | "Preprocess" >> guarded(
                PreprocessFn(config.record, plan.required_shape, release=True), Volume, folder, release=True
            )  # Volume
            steps, volumes = [loaded, prepared], prepared.main
        rescaled = volumes | "Rescale" >> guarded(
            RescaleFn(config.record), Volume, folder, release=True
        )  # Volume
        encoded = rescaled.main | "EncodeExample" >> guarded(
            EncodeExampleFn(joined=False), Record, folder, release=True
        )  # Record
        written = encoded.main | "WriteParts" >> beam.ParDo(WriteParts(plan)).with_output_types(
            tuple[str, Part]
        )  # (shard, Part)
        outcomes = (manifest[SHARDS], units[FINISHED], written)
        summary: _Values = (
            (*outcomes, *(s[FAILURES] for s in (*steps, rescaled, encoded)))
            | "Flatten"
            >> beam.Flatten().with_output_types(
                tuple[str, ShardTask | Part | Failure | Absence]
            )  # (shard, ShardTask | Part | Failure | Absence)
            | "GroupByKey" >> beam.GroupByKey()  # (shard, [ShardTask | Part | Failure | Absence])
            | "CommitShards" >> beam.ParDo(CommitShards(plan)).with_output_types(ShardOutcome)  # ShardOutcome
            | "WithoutKey"
            >> beam.Map(_without_key).with_output_types(tuple[None, ShardOutcome])  # (None, ShardOutcome)
            | "Gather" >> beam.GroupByKey()  # (None, [ShardOutcome])
            | "WriteDatasetInfo" >> beam.ParDo(WriteDatasetInfo(plan, self._enforces_limit))  # BuildSummary
        )
        return summary
