"""The pipeline: DoFns and PTransforms. Wiring, labels and counters; the work is in plain functions.

Create([manifest])   str
ReadManifest         WorkUnit, and (shard, ShardTask)
Reshuffle            WorkUnit          only rows cross a shuffle, never a voxel
SkipFinished         WorkUnit, and (shard, Part)
UnpackRows           VolumeRow
LoadVolume           Volume            ┐ with --frames each several a row
Prepare              Volume            │ only where a preparation is asked for
Rescale              Volume            │ each with (shard, Failure)
EncodeExample        (IndexEntry, Example bytes) ┘
WriteToTFRecord      ShardOutcome
WriteDatasetInfo     BuildSummary
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.pvalue import PBegin, TaggedOutput
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from beam_nifti.config import RecordConfig
from beam_nifti.errors import VolumeError
from beam_nifti.manifest.concealment import concealing
from beam_nifti.manifest.manifest import WHOLE_SHARD, VolumeRow
from beam_nifti.pipeline import coders as _coders  # noqa: F401  (registers how elements are encoded)
from beam_nifti.pipeline import lock
from beam_nifti.pipeline.build_note import require_current
from beam_nifti.pipeline.failures import Failure
from beam_nifti.pipeline.local_runner import send_whole_elements
from beam_nifti.pipeline.merge import count_differing, keep_if_same, merge_parts
from beam_nifti.pipeline.parts import Part, PartWriter, parts_folder
from beam_nifti.pipeline.plan import BuildPlan, ShardTask, WorkUnit
from beam_nifti.pipeline.progress import METER
from beam_nifti.pipeline.publish import BuildSummary, TooManyFailures, publish_dataset
from beam_nifti.pipeline.resume import find_finished
from beam_nifti.record.dataset_info import ShardInfo
from beam_nifti.record.example import encode_volume
from beam_nifti.record.index import IndexEntry, mask_labels, read_index
from beam_nifti.record.sharding import ShardName
from beam_nifti.record.tfrecord import encode_pieces
from beam_nifti.storage import paths as storage
from beam_nifti.support.memory import keep_buffers
from beam_nifti.volume.notes import counter_name
from beam_nifti.volume.preprocess import prepare_volume
from beam_nifti.volume.user_function import load_function
from beam_nifti.volume.volume import Volume, load_frames, load_volume, rescale_volume

send_whole_elements()

FAILURES: Final = "failures"
FINISHED: Final = "finished"
SHARDS: Final = "shards"
_Values = beam.PCollection[Any]


@dataclass(frozen=True, slots=True)
class ShardOutcome:
    """What became of the volumes of one shard."""

    shard: ShardInfo
    failures: tuple[Failure, ...]
    mask_labels: frozenset[int] = frozenset()


@contextlib.contextmanager
def _timed(distribution: Any) -> Iterator[None]:
    start = time.perf_counter()
    yield
    distribution.update(round(1e3 * (time.perf_counter() - start)))


class ReadManifest(beam.DoFn):
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

    def process(self, unit: WorkUnit) -> Iterable[Any]:
        """Yield what is left of the unit; and (shard, Part) for what is not."""
        found, missing = find_finished(self._plan, unit)
        for part in (f.part for f in found):
            num_records = len(part.positions or ())
            self._skipped.inc(num_records)
            METER.add(kept=num_records)
            yield TaggedOutput(FINISHED, (str(unit.task.name), part))
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


class LoadVolume(beam.DoFn):
    """Read an image.

    Args:
        folder: what relative paths are relative to: the manifest's folder.
        shape: that every record must have; None, or None for an axis, where shapes may differ.
        dtype: that every volume must have on disk; None where dtypes may differ.
        config: of the records that the volumes become.
    """

    def __init__(
        self,
        folder: str = "",
        shape: tuple[int | None, ...] | None = None,
        dtype: str | None = None,
        config: RecordConfig | None = None,
    ) -> None:
        self._folder, self._shape, self._dtype = folder, shape, dtype
        self._config = config or RecordConfig()
        self._msec = Metrics.distribution(type(self), "load-msec")
        self._loaded = Metrics.counter(type(self), "volumes-loaded")
        self._bytes = Metrics.counter(type(self), "bytes-read")

    def setup(self) -> None:
        """Called once a thread."""
        keep_buffers()

    def process(self, row: VolumeRow) -> Iterable[Volume]:
        """Yield the volume; or those of its frames, of which the next is made when it is asked for."""
        arguments = row, self._folder, self._shape, self._dtype, self._config
        with _timed(self._msec):
            is_split = self._config.frames == "each"
            volumes = load_frames(*arguments) if is_split else iter([load_volume(*arguments)])
            volume = next(volumes)
        self._loaded.inc(len(row.positions))
        self._bytes.inc(sum(file.size for files in volume.source.files for file in files))
        yield volume
        yield from volumes


class Prepare(beam.DoFn):
    """Do to a volume what it needs before its intensities are looked at: `prepare_volume`.

    Args:
        config: says what.
        shape: that every record must have; None, or None for an axis, where shapes may differ.
        release: whether no other step gets its volumes, so that it may empty them to save memory.
    """

    def __init__(
        self, config: RecordConfig, shape: tuple[int | None, ...] | None = None, *, release: bool = False
    ) -> None:
        self._config, self._shape, self._release = config, shape, release
        self._msec = Metrics.distribution(type(self), "prepare-msec")

    def setup(self) -> None:
        """Find the user's function: without it the build must stop, not lose every volume."""
        if self._config.preprocess is not None:
            load_function(self._config.preprocess, self._config.preprocess_sha256)

    def process(self, volume: Volume) -> Iterable[Volume]:
        """Yield the prepared volume."""
        with _timed(self._msec):
            prepared = prepare_volume(volume, self._config, self._shape, release=self._release)
        yield prepared


class Rescale(beam.DoFn):
    """Measure a volume's intensities and make its voxels what the record stores."""

    def __init__(self, config: RecordConfig | None = None) -> None:
        self._config = config or RecordConfig()
        self._msec = Metrics.distribution(type(self), "rescale-msec")

    def process(self, volume: Volume) -> Iterable[Volume]:
        """Yield the rescaled volume."""
        with _timed(self._msec):
            rescaled = rescale_volume(volume, self._config)
        yield rescaled


class EncodeExample(beam.DoFn):
    """Serialize a volume as a tf.train.Example, and count its notes."""

    def __init__(self) -> None:
        self._msec = Metrics.distribution(type(self), "encode-msec")
        self._bytes = Metrics.counter(type(self), "bytes-encoded")

    def process(self, volume: Volume) -> Iterable[tuple[IndexEntry, bytes]]:
        """Yield the index entry and the Example."""
        with _timed(self._msec):
            example = encode_volume(volume)
        self._bytes.inc(len(example))
        for note in volume.notes:
            Metrics.counter(type(self), counter_name(note)).inc()
        yield IndexEntry.of(volume), example


class _DeadLetters(beam.DoFn):
    """Run a step; a VolumeError that it raises becomes (shard, Failure) on the output FAILURES.

    Every other error leaves it: the runner tries again, or the build stops. Beam's
    `with_exception_handling` would put the element itself, voxels and all, on that output.
    Use it only for volumes that no other step receives: they are released once the step has returned its
    first result. A step may return further results lazily; none of these may fail.

    Args:
        step: that is run.
        folder: what the rows' paths are relative to.
    """

    def __init__(self, step: beam.DoFn, folder: str) -> None:
        self._step, self._folder = step, folder
        self._failed = Metrics.counter(type(step), "volumes-failed")

    def setup(self) -> None:
        self._step.setup()

    def process(self, element: VolumeRow | Volume) -> Iterable[Any]:
        row = element if isinstance(element, VolumeRow) else element.row
        results = iter(self._step.process(element))
        try:
            with concealing(row, self._folder):
                first = next(results)
        except VolumeError as e:
            self._failed.inc(len(row.positions))
            METER.add(failed=len(row.positions))
            failure = Failure(row, type(self._step).__name__, type(e).__name__, str(e))
            yield TaggedOutput(FAILURES, (row.shard, failure))
        else:
            if isinstance(element, Volume):
                element.release()
            yield first
            del first  # frames are many, and this one is done with
            yield from self._further(results, row)

    def _further(self, results: Iterator[Any], row: VolumeRow) -> Iterator[Any]:
        done = object()
        while True:
            with concealing(row, self._folder):
                result = next(results, done)
            if result is done:
                return
            yield result
            del result


def _guarded(step: beam.DoFn, output: Any, folder: str) -> Any:
    pardo = beam.ParDo(_DeadLetters(step, folder))
    typed = pardo.with_output_types(output, **{FAILURES: tuple[str, Failure]})
    return typed.with_outputs(FAILURES, main="main")


class WriteParts(beam.DoFn):
    """Write records into part files, one file open and one volume in memory.

    A part ends where the unit or the bundle ends, so a unit that a runner cuts in two becomes two.
    """

    def __init__(self, root: str, config: RecordConfig, extra_columns: tuple[str, ...]) -> None:
        self._root, self._config, self._extra_columns = root, config, extra_columns
        self._level = config.compression_level if config.compression == "gzip" else None
        self._msec = Metrics.distribution(type(self), "write-msec")
        self._bytes = Metrics.counter(type(self), "bytes-written")

    def start_bundle(self) -> None:
        """Start without an open file."""
        self._open: PartWriter | None = None
        self._unit: tuple[str, int] | None = None

    def process(self, record: tuple[IndexEntry, bytes]) -> Iterable[tuple[str, Part]]:
        """Yield (shard, Part) when a part is complete."""
        entry, example = record
        unit = (entry.row.shard, entry.row.unit)
        if unit != self._unit:
            yield from self._close()
            self._start(entry.row)
        with _timed(self._msec):
            pieces = encode_pieces(example, self._level)
            cast(PartWriter, self._open).write(entry, *pieces)
        size = sum(map(len, pieces))
        self._bytes.inc(size)
        METER.add(volumes=1, num_bytes=size)

    def finish_bundle(self) -> Iterable[WindowedValue]:
        """Yield the bundle's last part."""
        window = GlobalWindow()
        for part in self._close():
            yield WindowedValue(part, window.max_timestamp(), (window,))

    def _start(self, row: VolumeRow) -> None:
        name = ShardName.parse(row.shard)
        assert name is not None
        folder = parts_folder(self._root, self._config.fingerprint, name.split, name.index)
        is_shard = row.unit == WHOLE_SHARD
        self._open = PartWriter(folder, row.position, self._config, self._extra_columns, is_shard)
        self._unit = (row.shard, row.unit)

    def _close(self) -> Iterator[tuple[str, Part]]:
        if self._open is not None and self._unit is not None:
            yield self._unit[0], self._open.close()
            self._open = self._unit = None


class CommitShards(beam.DoFn):
    """Merge the parts of a shard and publish it."""

    def __init__(
        self,
        output: str,
        root: str,
        config: RecordConfig,
        extra_columns: tuple[str, ...],
        identity: str | None = None,
    ) -> None:
        self._output, self._root, self._config = output, root, config
        self._extra_columns, self._identity = extra_columns, identity
        self._msec = Metrics.distribution(type(self), "commit-msec")
        self._committed = Metrics.counter(type(self), "shards-committed")
        self._compared = Metrics.counter(type(self), "examples-compared")
        self._differing = Metrics.counter(type(self), "examples-differing")

    def process(self, shard: tuple[str, Iterable[ShardTask | Part | Failure]]) -> Iterable[ShardOutcome]:
        """Yield what became of the shard's rows."""
        outcomes = list(shard[1])
        (task,) = {o for o in outcomes if isinstance(o, ShardTask)}
        parts = [o for o in outcomes if isinstance(o, Part)]
        failures = {o.row.position: o for o in outcomes if isinstance(o, Failure)}
        failed = {position for failure in failures.values() for position in failure.row.positions}
        name, expected = task.name, set(task.positions) - failed
        if self._identity is not None:
            require_current(self._output, self._identity)
        with _timed(self._msec):
            info = merge_parts(
                self._output,
                name,
                expected,
                parts,
                self._config,
                self._extra_columns,
                parts_folder(self._root, self._config.fingerprint, name.split, name.index),
            )
            if task.compared is not None and info.name != str(task.compared):
                info = keep_if_same(self._output, task.compared, info)
            if task.compared is not None and task.published is None:  # made anew to be compared
                num_compared, num_differing = count_differing(self._output, task.compared, info)
                self._compared.inc(num_compared)
                self._differing.inc(num_differing)
        self._committed.inc()
        METER.add(shards=1)
        labels = frozenset[int]()
        if self._config.mask_dtype is not None:
            index = storage.join(self._output, info.index)
            labels = frozenset(mask_labels(read_index(index, below=self._output)[0]))
        yield ShardOutcome(info, tuple(failures.values()), labels)


class WriteToTFRecord(beam.PTransform[Any, Any]):
    """Write (IndexEntry, Example bytes) as sharded TFRecords, without sending them through a shuffle.

    It does what `beam.io.WriteToTFRecord`, whose name it keeps, cannot: the same bytes on every runner,
    memory of one volume a thread, an index beside every shard.

    Args:
        file_path_prefix: folder of the dataset.
        temp_location: folder of the part files.
        config: compression and its level, with whatever else decides a record's bytes.
        extra_columns: names of the manifest's further columns, which the index keeps.
        identity: `BuildPlan.identity`, where the folder may become another build's; None where it cannot.
    """

    def __init__(
        self,
        file_path_prefix: str,
        temp_location: str,
        config: RecordConfig,
        extra_columns: tuple[str, ...] = (),
        identity: str | None = None,
    ) -> None:
        super().__init__()
        self._output, self._root, self._identity = file_path_prefix, temp_location, identity
        self._arguments = (config, extra_columns)

    def expand(self, inputs: dict[str, _Values]) -> _Values:
        """From `records`, and (shard, ShardTask | Part | Failure) in `outcomes`, to ShardOutcome."""
        written = inputs["records"] | "WriteParts" >> beam.ParDo(
            WriteParts(self._root, *self._arguments)
        ).with_output_types(tuple[str, Part])
        committed: _Values = (
            (written, inputs["outcomes"])
            | "Flatten" >> beam.Flatten()  # (shard, ShardTask | Part | Failure)
            | "GroupByKey" >> beam.GroupByKey()  # (shard, [ShardTask | Part | Failure])
            | "CommitShards"
            >> beam.ParDo(
                CommitShards(self._output, self._root, *self._arguments, self._identity)
            ).with_output_types(ShardOutcome)  # ShardOutcome
        )
        return committed


class WriteDatasetInfo(beam.DoFn):
    """Write dataset_info.json, last of all.

    Args:
        plan: of the build.
        is_judge: whether too many failed volumes fail the pipeline. A runner would try that again.
    """

    def __init__(self, plan: BuildPlan, is_judge: bool = False) -> None:
        self._plan, self._is_judge = plan, is_judge

    def process(self, group: tuple[None, Iterable[ShardOutcome]]) -> Iterable[BuildSummary]:
        """Yield how the build ended."""
        outcomes = list(group[1])
        failures = [f for o in outcomes for f in o.failures]
        require_current(self._plan.config.output, self._plan.identity)
        lock.require_held(self._plan.config.output)
        labels = {label for o in outcomes for label in o.mask_labels}
        summary = publish_dataset(self._plan, [o.shard for o in outcomes], failures, labels)
        if self._is_judge and not summary.complete:
            raise TooManyFailures(summary)
        yield summary


def _rows_of(unit: WorkUnit) -> Iterable[VolumeRow]:
    return unit.rows


def _without_key(outcome: ShardOutcome) -> tuple[None, ShardOutcome]:
    return None, outcome


class BuildDataset(beam.PTransform[Any, Any]):
    """From nothing to a published dataset: the whole graph.

    Args:
        plan: what to build.
        is_judge: whether too many failed volumes fail the pipeline; else whoever runs it must look at the
            summary.
    """

    def __init__(self, plan: BuildPlan, is_judge: bool = False) -> None:
        super().__init__()
        self._plan, self._is_judge = plan, is_judge

    def expand(self, pipeline: beam.Pipeline | PBegin) -> _Values:
        """To one BuildSummary."""
        plan, config = self._plan, self._plan.config
        manifest = (
            pipeline
            | "Create" >> beam.Create([config.manifest], reshuffle=False)  # str
            | "ReadManifest"
            >> beam.ParDo(ReadManifest(plan))
            .with_output_types(WorkUnit, **{SHARDS: tuple[str, ShardTask]})
            .with_outputs(SHARDS, main="units")
        )
        units = (
            manifest.units
            | "Reshuffle" >> beam.Reshuffle().with_output_types(WorkUnit)  # WorkUnit
            | "SkipFinished"
            >> beam.ParDo(SkipFinished(plan))
            .with_output_types(WorkUnit, **{FINISHED: tuple[str, Part]})
            .with_outputs(FINISHED, main="units")
        )
        folder = storage.dirname(config.manifest)
        loading = LoadVolume(folder, plan.required_shape, plan.required_dtype, config.record)
        loaded = (
            units.units
            | "UnpackRows" >> beam.FlatMap(_rows_of).with_output_types(VolumeRow)  # VolumeRow
            | "LoadVolume" >> _guarded(loading, Volume, folder)  # Volume
        )
        steps, volumes = [loaded], loaded.main
        if config.record.prepares:
            prepared = volumes | "Prepare" >> _guarded(
                Prepare(config.record, plan.required_shape, release=True), Volume, folder
            )  # Volume
            steps, volumes = [loaded, prepared], prepared.main
        rescaled = volumes | "Rescale" >> _guarded(Rescale(config.record), Volume, folder)  # Volume
        encoded = rescaled.main | "EncodeExample" >> _guarded(
            EncodeExample(), tuple[IndexEntry, bytes], folder
        )  # (IndexEntry, Example bytes)
        outcomes = (
            (manifest[SHARDS], units[FINISHED], *(s[FAILURES] for s in (*steps, rescaled, encoded)))
            | "Outcomes" >> beam.Flatten()  # (shard, ShardTask | Part | Failure)
        )
        summary: _Values = (
            {"records": encoded.main, "outcomes": outcomes}
            | "WriteToTFRecord"
            >> WriteToTFRecord(
                config.output, plan.parts_root, config.record, plan.extra_columns, plan.identity
            )  # ShardOutcome
            | "WithoutKey"
            >> beam.Map(_without_key).with_output_types(tuple[None, ShardOutcome])  # (None, ShardOutcome)
            | "Gather" >> beam.GroupByKey()  # (None, [ShardOutcome])
            | "WriteDatasetInfo" >> beam.ParDo(WriteDatasetInfo(plan, self._is_judge))  # BuildSummary
        )
        return summary
