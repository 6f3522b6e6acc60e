"""`WriteToTFRecord`: a dataset of the records of any pipeline, in the order of their ids.

Start              (None, revision)
WriteParts         Placed, of each record; (None, Key), of each record; (None, Traits), of each bundle
Plan               WritePlan, of the keys of all records: splits, shards, order
ToShard            (shard, Placed)
CommitShards       (None, ShardInfo)
WriteDatasetInfo   DatasetInfo

Payloads go to part files where they are made; only ids, offsets and rows of the index cross a shuffle.
"""

from __future__ import annotations

import sys
import uuid
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final, SupportsIndex, cast

import apache_beam as beam
import pyarrow as pa
from apache_beam.metrics import Metrics
from apache_beam.pvalue import AsSingleton, TaggedOutput
from apache_beam.transforms.window import GlobalWindows

from beam_nifti.errors import PartsChangedError, UsageError
from beam_nifti.pipeline import lock
from beam_nifti.pipeline.configure import make_config
from beam_nifti.pipeline.local_runner import send_whole_elements
from beam_nifti.pipeline.merge import write_shard
from beam_nifti.pipeline.options import StrPath
from beam_nifti.pipeline.parameters import naming_parameters
from beam_nifti.pipeline.parts import PartFile
from beam_nifti.pipeline.plan import with_absolute_paths
from beam_nifti.pipeline.publish import clean_up, find_info, publish_info
from beam_nifti.pipeline.records import Traits, examine, to_record
from beam_nifti.pipeline.saved_plan import SavedWrite
from beam_nifti.pipeline.steps import PartsFn, at_end, timed
from beam_nifti.pipeline.write_plan import SAME_IDS, Key, Placed, WritePlan, to_shard
from beam_nifti.pipeline.write_target import Target
from beam_nifti.record.dataset_info import DatasetInfo, ShardInfo
from beam_nifti.record.index import schema_of
from beam_nifti.record.tiles import encode_record
from beam_nifti.storage import paths as storage
from beam_nifti.support.process import keep_buffers
from beam_nifti.support.wording import counted

send_whole_elements()

_TRAITS: Final = "traits"
_KEYS: Final = "keys"
_Values = beam.PCollection[Any]

_Noted = int | Key | Traits
"""What is planned with: the revision, keys and traits. They are of one type, because Flink joins only
collections of the same coder."""


class WritePartsFn(PartsFn):
    """Write records to part files, one file per bundle, with one record in memory."""

    def __init__(self, target: Target) -> None:
        self._target = target
        record = target.config.record
        self._level = record.compression_level if record.compression == "gzip" else None
        self._msec = Metrics.distribution(type(self), "write-msec")
        self._bytes = Metrics.counter(type(self), "bytes-written")
        self._count = Metrics.counter(type(self), "records-written")

    def setup(self) -> None:
        """Refuse an output that holds a dataset, or cannot be written, before the work starts."""
        keep_buffers()
        self._target.require_available()

    def start_bundle(self) -> None:
        """Start without an open file."""
        super().start_bundle()
        self._traits: Traits | None = None

    def process(self, element: Any) -> Iterable[Any]:
        """Yield where the record is; and (None, Key) on the output KEYS.

        It does not wait for `StartFn`, which keeps the parts of this pipeline: runners fuse no step that
        waits for another collection, and would pass all records from process to process.
        """
        record = to_record(element)
        traits, cells = examine(record)
        self._traits = self._traits.joined(traits) if self._traits else traits
        with self._lock, timed(self._msec), self._target.reading_parts():
            if self._is_torn_down:
                return
            part = cast(PartFile, self._open or PartFile(self._target.folder))
            self._open = part
            encoded = encode_record(record.example, self._level)
            offset, length = part.write(*encoded.pieces)
        self._bytes.inc(length)
        self._count.inc()
        cells["member_lengths"] = encoded.lengths
        yield Placed(record.id, record.split, part.path, offset, length, cells)
        yield TaggedOutput(_KEYS, (None, Key(record.id, record.split, length)))

    def finish_bundle(self) -> Iterable[Any]:
        """Close the part; yield (None, Traits) on the output TRAITS."""
        with self._lock, self._target.reading_parts():
            part, self._open = self._open, None
            if part is not None:
                part.close()
        if part is not None:
            yield TaggedOutput(_TRAITS, at_end((None, self._traits)))


class StartFn(beam.DoFn):
    """Take over the output: check what it holds, and remove what dead pipelines left."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def process(self, token: str) -> Iterable[tuple[None, int]]:
        """Yield (None, revision of the dataset); repeated calls yield the same."""
        target = self._target
        with naming_parameters():
            target.require_writable()  # or the lock would be in a folder that is not for it
            with lock.hold(target.output):
                occupied = target.require_available()
                saved = occupied.saved
                if saved is None or saved.token != token:
                    saved = target.take_over(occupied)
        yield None, saved.revision


class PlanFn(beam.DoFn):
    """Sort the ids of all records, and plan splits, shards and order."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def process(self, group: tuple[None, Iterable[_Noted]]) -> Iterable[WritePlan]:
        """Yield the plan."""
        target, traits, revision = self._target, None, 0
        num_bytes, ids = 0, list[tuple[str, str]]()
        for item in group[1]:
            if isinstance(item, Key):
                num_bytes += item.length
                ids.append((item.id, sys.intern(item.split)))  # which a million records have in common
            elif isinstance(item, Traits):
                traits = item if traits is None else traits.joined(item)
            else:
                revision = item
        if traits is None:
            raise UsageError(
                f"{target.output}: there are no records to write; check the steps before WriteToTFRecord"
            )
        plan = WritePlan.of(target, ids, num_bytes, traits, revision)
        replace(target.require_current(), shards=tuple(plan.shards)).write(target.output)
        yield plan


class CommitRecordsFn(beam.DoFn):
    """Merge the records of a shard from their parts."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._msec = Metrics.distribution(type(self), "commit-msec")
        self._committed = Metrics.counter(type(self), "shards-committed")

    def process(
        self, shard: tuple[str, Iterable[Placed]], plan: WritePlan
    ) -> Iterable[tuple[None, ShardInfo]]:
        """Yield (None, ShardInfo)."""
        name, positions = plan.shards[shard[0]]
        with timed(self._msec):
            records = sorted(shard[1], key=lambda placed: placed.id)
            if len({placed.id for placed in records}) != len(positions) or len(records) != len(positions):
                raise PartsChangedError(
                    f"{name}: has {counted(len(records), 'record')}, but {len(positions)} were counted; "
                    f"{SAME_IDS}"
                )
            self._target.require_current()
            rows = [
                {**placed.cells, "position": position, "offset": placed.offset, "length": placed.length}
                for position, placed in zip(positions, records, strict=True)
            ]
            table = pa.Table.from_pylist(rows, schema=schema_of(plan.config, plan.traits.columns))
            files = [placed.part for placed in records]
            with self._target.reading_parts():
                info = write_shard(self._target.output, name, table, files, plan.config.fingerprint)
        self._committed.inc()
        yield None, info


class PublishFn(beam.DoFn):
    """Write dataset_info.json, last, and remove temporary files."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def process(self, group: tuple[None, Iterable[ShardInfo]], plan: WritePlan) -> Iterable[DatasetInfo]:
        """Yield the dataset."""
        output = self._target.output
        shards = {shard.name: shard for shard in group[1]}
        missing = plan.shards.keys() - shards.keys()
        if missing:
            raise PartsChangedError(f"{output}: {min(missing)} is missing; run the pipeline again")
        info = plan.describe(shards)
        with naming_parameters(), lock.hold(output):
            if SavedWrite.read(output) is not None or find_info(output) != info:
                saved = self._target.require_current()
                publish_info(info, output)
                clean_up(output, saved, info)
        yield info


class WriteToTFRecord(beam.PTransform[Any, Any]):
    """Write records as a dataset: stable shards of TFRecords, an index of each, `dataset_info.json`.

    In contrast to `beam.io.WriteToTFRecord`, equal input gives equal bytes on every runner, no payload
    crosses a shuffle, each thread needs the memory of one record, and `Dataset` and `load_dataset` read the
    result.

    An input element is a `Record`, as `EncodeExample` gives it; or (id, Example), where the Example is a
    tf.train.Example, its bytes, or a dictionary of arrays with "image" and optionally "label", "mask" and
    others (`docs/steps.md`). Each requires an image and a unique id. The records of a split are sorted by id
    and then divided into shards. Windows of the input have no effect.

    The output is one element, the `DatasetInfo` of the dataset, once it is complete.

    Args:
        output: folder of the dataset, local or a URL that all workers can reach.
        examples_per_shard: records per shard.
        num_shards: shards per split. If neither is given, shards have about 200 MB.
        compression: "gzip" or "none".
        compression_level: igzip level, 0 (fastest) to 3; None means 2.
        overwrite: whether to replace an existing dataset, which stays readable until then.
        temp_location: folder of the part files, on a file system that all workers can reach; None keeps them
            in the output. They take as much space as the shards.

    Raises:
        UsageError: an argument is invalid, or the input is unbounded. While the pipeline runs: two records
            have the same id, or there are no records.
        OutputError: while the pipeline runs: the output holds a dataset that may not be overwritten, or
            another pipeline or build writes there.
        VolumeError: while the pipeline runs: an element is not a record, or does not match the others.
    """

    def __init__(
        self,
        output: StrPath,
        *,
        examples_per_shard: str | SupportsIndex | None = None,
        num_shards: str | SupportsIndex | None = None,
        compression: str | None = "gzip",
        compression_level: str | SupportsIndex | None = None,
        overwrite: bool | None = False,
        temp_location: StrPath | None = None,
    ) -> None:
        super().__init__()
        given = {
            "examples_per_shard": examples_per_shard,
            "num_shards": num_shards,
            "compression": compression,
            "compression_level": compression_level,
            "overwrite": overwrite,
            "temp_location": temp_location,
        }
        with naming_parameters():
            config = make_config("", storage.path_text("output", output), given)
        self._target = Target(with_absolute_paths(config), uuid.uuid4().hex[:16])

    def expand(self, records: _Values) -> _Values:
        """To one DatasetInfo."""
        if not records.is_bounded:
            raise UsageError(
                f"{self._target.output}: WriteToTFRecord requires bounded input, because a dataset is "
                "complete only at its end; read a bounded source"
            )
        target = self._target
        self._require_only_writer(records.pipeline)
        started = (
            records.pipeline
            | "Create" >> beam.Create([target.token], reshuffle=False)  # str
            | "Start"
            >> beam.ParDo(StartFn(target)).with_output_types(tuple[None, _Noted])  # (None, revision)
        )
        parts = (
            records
            | "Global" >> beam.WindowInto(GlobalWindows())  # Record or (id, Example)
            | "WriteParts"
            >> beam.ParDo(WritePartsFn(target))
            .with_output_types(Placed, **dict.fromkeys((_KEYS, _TRAITS), tuple[None, _Noted]))
            .with_outputs(_KEYS, _TRAITS, main="placed")
        )
        plan = AsSingleton(
            (started, parts[_KEYS], parts[_TRAITS])
            | "Flatten" >> beam.Flatten()  # (None, revision | Key | Traits)
            | "GatherKeys" >> beam.GroupByKey()  # (None, [revision | Key | Traits])
            | "Plan" >> beam.ParDo(PlanFn(target)).with_output_types(WritePlan)  # WritePlan
        )
        info: _Values = (
            parts.placed
            | "ToShard" >> beam.Map(to_shard, plan).with_output_types(tuple[str, Placed])  # (shard, Placed)
            | "GroupByShard" >> beam.GroupByKey()  # (shard, [Placed])
            | "CommitShards"
            >> beam.ParDo(CommitRecordsFn(target), plan).with_output_types(tuple[None, ShardInfo])
            | "Gather" >> beam.GroupByKey()  # (None, [ShardInfo])
            | "WriteDatasetInfo"
            >> beam.ParDo(PublishFn(target), plan).with_output_types(DatasetInfo)  # DatasetInfo
        )
        return info

    def _require_only_writer(self, pipeline: beam.Pipeline) -> None:
        output = self._target.output
        storage.refuse_unwritable(output, "output")
        outputs = _OUTPUTS.setdefault(pipeline, set())
        if output in outputs:
            raise UsageError(
                f"{output}: this pipeline has two WriteToTFRecord into it; give each its own output, or join "
                "their records with beam.Flatten"
            )
        outputs.add(output)


_OUTPUTS: Final = weakref.WeakKeyDictionary[beam.Pipeline, set[str]]()
"""The outputs of the pipelines of this process."""
