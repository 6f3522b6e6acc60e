"""`WriteToTFRecord`: a dataset of the records of any pipeline, in the order of their ids.

Start              (None, revision)
WriteParts         _Placed, of each record; (None, _Key), of each record; (None, Traits), of each bundle
Plan               _WritePlan           of the keys of all records: splits, shards, order
ToShard            (shard, _Placed)
CommitShards       (None, ShardInfo)
WriteDatasetInfo   DatasetInfo

Payloads go to part files where they are made; only ids, offsets and rows of the index cross a shuffle.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import sys
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, SupportsIndex, cast

import apache_beam as beam
import pyarrow as pa
from apache_beam.metrics import Metrics
from apache_beam.pvalue import AsSingleton, TaggedOutput
from apache_beam.transforms.window import GlobalWindows

from beam_nifti.config import FORMAT_FEATURES, FORMAT_VERSION, BuildConfig, Columns, RecordConfig, Sharding
from beam_nifti.errors import OutputBusyError, OutputError, PartsChangedError, UsageError
from beam_nifti.pipeline import lock
from beam_nifti.pipeline.local_runner import send_whole_elements
from beam_nifti.pipeline.merge import write_shard
from beam_nifti.pipeline.options import StrPath, make_config, naming_parameters
from beam_nifti.pipeline.parts import BUILD_FOLDER, PartFile, parts_folder, parts_root, remove_parts
from beam_nifti.pipeline.plan import SHARD_BYTES, with_absolute_paths
from beam_nifti.pipeline.publish import (
    clean_up,
    files_of,
    find_info,
    find_replaceable,
    next_revision,
    publish_info,
    refuse_foreign,
    remove_files,
    require_writable_output,
)
from beam_nifti.pipeline.records import Traits, examine, to_record
from beam_nifti.pipeline.saved_plan import SavedPlan, SavedWrite
from beam_nifti.pipeline.steps import PartsFn, at_end, timed
from beam_nifti.record.dataset_info import FILE_NAME, DatasetInfo, ShardInfo, SplitInfo
from beam_nifti.record.index import schema_of
from beam_nifti.record.sharding import Layout, ShardName
from beam_nifti.record.tiles import encode_record
from beam_nifti.record.versions import all_versions
from beam_nifti.storage import paths as storage
from beam_nifti.support.process import keep_buffers
from beam_nifti.support.strict_json import dump_json
from beam_nifti.support.wording import counted, first_few

send_whole_elements()

_TRAITS: Final = "traits"
_KEYS: Final = "keys"
_SHOWN: Final = 3
_SAME_IDS: Final = (
    "run the pipeline again, and make sure that every step gives the same ids when it is repeated"
)
_Values = beam.PCollection[Any]


@dataclass(frozen=True, slots=True)
class _Placed:
    """A record in a part file: where it is, and its row of the index without its offset in a shard."""

    id: str
    split: str
    part: str
    offset: int
    length: int
    cells: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class _Key:
    """The id and split, which decide a record's position in the dataset, and its size."""

    id: str
    split: str
    length: int


_Noted = int | _Key | Traits
"""What is planned with: the revision, keys and traits. They are of one type, because Flink joins only
collections of the same coder."""


@dataclass(frozen=True)
class _Occupied:
    """What an output holds.

    Attributes:
        published: dataset; None if there is none, or if it is damaged and will be replaced.
        saved: plan of a pipeline that has not published its dataset, this one or another.
        build: plan of an unfinished build.
    """

    published: DatasetInfo | None
    saved: SavedWrite | None
    build: SavedPlan | None


@dataclass(frozen=True)
class _Target:
    """Where a dataset is written, and how.

    Attributes:
        config: configuration of the dataset, as far as it is given, with absolute paths.
        token: 16 hex digits, unique to this pipeline.
    """

    config: BuildConfig
    token: str

    @property
    def output(self) -> str:
        """The folder of the dataset."""
        return self.config.output

    @property
    def root(self) -> str:
        """The folder of all part files."""
        return parts_root(self.output, self.config.temp_location)

    @property
    def folder(self) -> str:
        """The folder of this pipeline's part files."""
        return parts_folder(self.root, self.token, "records", 0)

    def find_published(self) -> DatasetInfo | None:
        """The existing dataset, if it may be replaced and can be read.

        Raises:
            OutputError: it may not be replaced.
            DatasetError: it is damaged.
        """
        published = find_replaceable(self.output, overwrite=self.config.overwrite)
        if published is not None and not self.config.overwrite:
            raise OutputError(
                f"{self.output}: holds a dataset; choose another output, or use overwrite=True to replace it"
            )
        return published

    def require_available(self) -> _Occupied:
        """What the output holds, all of which may be replaced.

        Raises:
            OutputError: it may not be replaced, or the output cannot be written.
            DatasetError: it is damaged.
        """
        with naming_parameters():
            self.require_writable()
            published, saved = self.find_published(), SavedWrite.read(self.output)
            build = None if saved and saved.token == self.token else self._find_build()
            if not (published or (saved and saved.token == self.token)):
                unfinished = set[str]().union(*(found.written for found in (saved, build) if found))
                refuse_foreign(self.output, unfinished, overwrite=self.config.overwrite)
        return _Occupied(published, saved, build)

    def _find_build(self) -> SavedPlan | None:
        try:
            build = SavedPlan.read(self.output)
        except OutputError:
            if self.config.overwrite:
                return None
            raise
        if build is not None and not self.config.overwrite:
            raise OutputError(
                f"{self.output}: holds an unfinished build; finish it, choose another output, or use "
                "overwrite=True to discard it"
            )
        return build

    def require_writable(self) -> None:
        """Refuse folders to which nothing can be written."""
        folders = {"OUTPUT": self.output}
        if self.root != parts_root(self.output, None):
            folders["temp_location"] = storage.dirname(self.root)
        for name, folder in folders.items():
            storage.require_writable(folder, name, is_folder=True)
        if not storage.is_remote(self.output):
            require_writable_output(self.output)

    def require_current(self) -> SavedWrite:
        """The saved plan of this pipeline.

        Raises:
            OutputBusyError: another build or pipeline has taken over the output.
        """
        saved = SavedWrite.read(self.output)
        if saved is None or saved.token != self.token or SavedPlan.read(self.output) is not None:
            raise OutputBusyError(
                f"{self.output}: another pipeline has started to write here, so this one stops; give each "
                "its own output, or run one after the other"
            )
        return saved

    @contextlib.contextmanager
    def reading_parts(self) -> Iterator[None]:
        """If a part file is gone during the block, say what has removed it."""
        try:
            yield
        except FileNotFoundError as e:
            self.require_current()
            raise OutputBusyError(
                f"{e.filename}: is gone; another pipeline that started here at the same time may have "
                "removed it, so run one after the other"
            ) from e


class WritePartsFn(PartsFn):
    """Write records to part files, one file per bundle, with one record in memory."""

    def __init__(self, target: _Target) -> None:
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
        """Yield where the record is; and (None, _Key) on the output KEYS.

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
        yield _Placed(record.id, record.split, part.path, offset, length, cells)
        yield TaggedOutput(_KEYS, (None, _Key(record.id, record.split, length)))

    def finish_bundle(self) -> Iterable[Any]:
        """Close the part; yield (None, Traits) on the output TRAITS."""
        if self._open is not None:
            with self._target.reading_parts():
                self._open.close()
            yield TaggedOutput(_TRAITS, at_end((None, self._traits)))
        self._open = self._traits = None


class StartFn(beam.DoFn):
    """Take over the output: check what it holds, and remove what dead pipelines left."""

    def __init__(self, target: _Target) -> None:
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
                    saved = self._take(occupied)
        yield None, saved.revision

    def _take(self, occupied: _Occupied) -> SavedWrite:
        target, output, published, dead = (
            self._target,
            self._target.output,
            occupied.published,
            occupied.saved,
        )
        kept = files_of(published) if published else ()
        unfinished = [saved for saved in (dead, occupied.build) if saved is not None]
        own_root = parts_root(output, None)
        revision = next_revision(output, published, dead.revision if dead else None)
        if unfinished:  # else they may be those of a pipeline that starts now, too, and will be refused later
            for root in {target.root, own_root}.union(*(saved.parts_roots(output) for saved in unfinished)):
                remove_parts(root, keep=target.token)
        remove_files(output, set[str]().union(*(saved.written for saved in unfinished)), keep=kept)
        if published is None:  # a damaged one, which is to be replaced
            storage.delete(storage.join(output, FILE_NAME), output)
        root = BUILD_FOLDER if target.root == own_root else target.root
        saved = SavedWrite(target.token, root, revision, kept)
        SavedPlan.remove(output)
        saved.write(output)
        return saved


@dataclass(frozen=True)
class _WritePlan:
    """Which records are in which shard.

    Attributes:
        target: target that they are written to.
        layout: sizes of the splits, and how they are divided into shards.
        firsts: the first id of each shard, by split.
        traits: traits of all records.
        revision: revision of the dataset.
        digest: digest of all ids with their splits.
    """

    target: _Target
    layout: Layout
    firsts: Mapping[str, tuple[str, ...]]
    traits: Traits
    revision: int
    digest: str

    @classmethod
    def of(
        cls, target: _Target, ids: list[tuple[str, str]], num_bytes: int, traits: Traits, revision: int
    ) -> _WritePlan:
        """The plan of records with these ids and splits, in any order. The list is sorted in place.

        Raises:
            UsageError: several records have the same id, or splits differ only in letter case.
        """
        ids.sort()
        twice = sorted({one[0] for one, other in itertools.pairwise(ids) if one[0] == other[0]})
        if twice:
            shown = first_few([*map(repr, twice)], _SHOWN)
            raise UsageError(
                f"{target.output}: {counted(len(twice), 'id')} of more than one record: {shown}; give every "
                "record a unique id"
            )
        of_splits: dict[str, list[str]] = {}
        for example_id, split in ids:
            of_splits.setdefault(split, []).append(example_id)
        of_splits = dict(sorted(of_splits.items()))
        spellings = {split.lower(): split for split in of_splits}
        for split in of_splits:
            if (other := spellings[split.lower()]) != split:
                raise UsageError(
                    f"{target.output}: there are records of split {split!r} and of split {other!r}, whose "
                    "files are the same where letter case does not count; give them one spelling"
                )
        sharding = target.config.sharding or Sharding(max(1, round(SHARD_BYTES * len(ids) / num_bytes)))
        layout = Layout({split: len(found) for split, found in of_splits.items()}, sharding)
        firsts = {
            split: tuple(found[positions.start] for positions in layout.ranges(split))
            for split, found in of_splits.items()
        }
        digest = hashlib.sha256()
        for pair in ids:
            digest.update(dump_json(pair).encode())
        return cls(target, layout, firsts, traits, revision, digest.hexdigest())

    @property
    def config(self) -> RecordConfig:
        """The configuration of the records, as far as readers use it."""
        made = self.traits.config
        return replace(
            made,
            compression=self.target.config.record.compression,
            compression_level=self.target.config.record.compression_level,
            labels=None,
            frames=None if made.frames == "each" else made.frames,
            format_version=FORMAT_VERSION,
            format_features=FORMAT_FEATURES,
        )

    def name(self, split: str, index: int) -> ShardName:
        """The name of a shard, by its number in its split."""
        revision = self.revision if self.revision > 1 else 0
        return ShardName(
            split, index, len(self.firsts[split]), self.target.config.record.compression == "gzip", revision
        )

    @cached_property
    def shards(self) -> Mapping[str, tuple[ShardName, range]]:
        """Each shard, with the positions of its records, by file name."""
        ranges = {split: self.layout.ranges(split) for split in self.firsts}
        names = {
            self.name(split, index): positions
            for split in ranges
            for index, positions in enumerate(ranges[split])
        }
        return {str(name): (name, positions) for name, positions in names.items()}

    def describe(self, shards: Mapping[str, ShardInfo]) -> DatasetInfo:
        """Describe the dataset, given its shards by name."""
        traits, config = self.traits, self.config
        columns = Columns(
            path=",".join(config.channels or ("path",)),
            label="label" if traits.labelled else None,
            mask="mask" if config.mask_dtype else None,
        )
        build = BuildConfig(
            "",
            self.target.output,
            config,
            columns,
            self.layout.sharding,
            allow_mixed_shapes=traits.shape is None,
        )
        num_rows = sum(self.layout.split_sizes.values())
        return DatasetInfo(
            config=build.as_dataset_config() | {"fingerprint": config.fingerprint},
            manifest={"path": "", "num_rows": num_rows, "digest": self.digest, "columns": [*traits.columns]},
            shape=traits.shape,
            dtype=traits.dtype,
            labelled=traits.labelled,
            features=traits.features,
            splits={
                split: SplitInfo(tuple(shards[str(self.name(split, index))] for index in range(len(firsts))))
                for split, firsts in self.firsts.items()
            },
            mask_labels=tuple(sorted(traits.mask_labels)) if config.mask_dtype else None,
            revision=self.revision,
            versions=all_versions(),
        )


class PlanFn(beam.DoFn):
    """Sort the ids of all records, and plan splits, shards and order."""

    def __init__(self, target: _Target) -> None:
        self._target = target

    def process(self, group: tuple[None, Iterable[_Noted]]) -> Iterable[_WritePlan]:
        """Yield the plan."""
        target, traits, revision = self._target, None, 0
        num_bytes, ids = 0, list[tuple[str, str]]()
        for item in group[1]:
            if isinstance(item, _Key):
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
        plan = _WritePlan.of(target, ids, num_bytes, traits, revision)
        replace(target.require_current(), shards=tuple(plan.shards)).write(target.output)
        yield plan


def _to_shard(placed: _Placed, plan: _WritePlan) -> tuple[str, _Placed]:
    """A record, keyed by the name of its shard."""
    index = bisect.bisect_right(plan.firsts.get(placed.split, ()), placed.id) - 1
    if index < 0:
        raise PartsChangedError(
            f"record {placed.id!r} of split {placed.split!r} was missing when the records were counted; "
            f"{_SAME_IDS}"
        )
    return str(plan.name(placed.split, index)), placed


class CommitRecordsFn(beam.DoFn):
    """Merge the records of a shard from their parts."""

    def __init__(self, target: _Target) -> None:
        self._target = target
        self._msec = Metrics.distribution(type(self), "commit-msec")
        self._committed = Metrics.counter(type(self), "shards-committed")

    def process(
        self, shard: tuple[str, Iterable[_Placed]], plan: _WritePlan
    ) -> Iterable[tuple[None, ShardInfo]]:
        """Yield (None, ShardInfo)."""
        name, positions = plan.shards[shard[0]]
        with timed(self._msec):
            records = sorted(shard[1], key=lambda placed: placed.id)
            if len({placed.id for placed in records}) != len(positions) or len(records) != len(positions):
                raise PartsChangedError(
                    f"{name}: has {counted(len(records), 'record')}, but {len(positions)} were counted; "
                    f"{_SAME_IDS}"
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

    def __init__(self, target: _Target) -> None:
        self._target = target

    def process(self, group: tuple[None, Iterable[ShardInfo]], plan: _WritePlan) -> Iterable[DatasetInfo]:
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
        num_shards: shards per split. If neither is given, shards have about 192 MiB.
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
        self._target = _Target(with_absolute_paths(config), uuid.uuid4().hex[:16])

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
            .with_output_types(_Placed, **dict.fromkeys((_KEYS, _TRAITS), tuple[None, _Noted]))
            .with_outputs(_KEYS, _TRAITS, main="placed")
        )
        plan = AsSingleton(
            (started, parts[_KEYS], parts[_TRAITS])
            | "Flatten" >> beam.Flatten()  # (None, revision | _Key | Traits)
            | "GatherKeys" >> beam.GroupByKey()  # (None, [revision | _Key | Traits])
            | "Plan" >> beam.ParDo(PlanFn(target)).with_output_types(_WritePlan)  # _WritePlan
        )
        info: _Values = (
            parts.placed
            | "ToShard"
            >> beam.Map(_to_shard, plan).with_output_types(tuple[str, _Placed])  # (shard, _Placed)
            | "GroupByShard" >> beam.GroupByKey()  # (shard, [_Placed])
            | "CommitShards"
            >> beam.ParDo(CommitRecordsFn(target), plan).with_output_types(tuple[None, ShardInfo])
            | "Gather" >> beam.GroupByKey()  # (None, [ShardInfo])
            | "WriteDatasetInfo"
            >> beam.ParDo(PublishFn(target), plan).with_output_types(DatasetInfo)  # DatasetInfo
        )
        return info

    def _require_only_writer(self, pipeline: beam.Pipeline) -> None:
        output = self._target.output
        if not output.strip("/"):
            raise UsageError(f"output is {output}, the root of the file system; choose a folder below it")
        outputs = _OUTPUTS.setdefault(pipeline, set())
        if output in outputs:
            raise UsageError(
                f"{output}: this pipeline has two WriteToTFRecord into it; give each its own output, or join "
                "their records with beam.Flatten"
            )
        outputs.add(output)


_OUTPUTS: Final = weakref.WeakKeyDictionary[beam.Pipeline, set[str]]()
"""The outputs of the pipelines of this process."""
