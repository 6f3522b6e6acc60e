"""What a build will do, decided before it starts and small enough to travel in the job graph."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from beam_nifti.config import BuildConfig, RecordConfig, Sharding
from beam_nifti.errors import ManifestChangedError
from beam_nifti.manifest.manifest import WHOLE_SHARD, Manifest, VolumeRow
from beam_nifti.manifest.pseudonyms import read_pseudonyms
from beam_nifti.manifest.reading import read_manifest
from beam_nifti.pipeline.parts import parts_root
from beam_nifti.pipeline.saved_plan import require_current
from beam_nifti.record.dataset_info import DatasetInfo, read_info
from beam_nifti.record.example import feature_kinds
from beam_nifti.record.sharding import Layout, ShardName, order_rows, overlapping, shard_ranges
from beam_nifti.record.withdrawals import Withdrawal
from beam_nifti.storage import paths as storage
from beam_nifti.support.strict_json import dump_json

SHARD_BYTES: Final = 192 << 20
"""Target size of a shard file: large enough to stream from an object store, small enough to shuffle."""

UNIT_BYTES: Final = 1 << 30
"""Most bytes of voxels per work unit: some seconds, which a crash costs a thread. A shard of SHARD_BYTES has
less."""

_HEADERS_AT_A_TIME: Final = 256
_VOLUMES_AT_A_TIME: Final = 64
"""Most rows of a work unit that makes no records."""

MAX_UNIT_ROWS: Final = 1 << 14
"""Most rows per work unit: about 10 MB in memory."""

UNITS_PER_WORKER: Final = 8
"""Least number of units per worker, so that the last ones to finish do not leave the others idle."""

_ASSUMED_BYTES: Final = {1: 0.8, 2: 1.44}
"""Bytes of a voxel after gzip, by bytes of the source's voxels; measured on brain images."""

_ASSUMED_BYTES_WIDE: Final = 3.4
_ASSUMED_SHARE: Final = {"float16": 0.75, "bfloat16": 0.7, "uint8": 0.5}
"""Size after gzip to that of float32, for the dtypes that round; measured on the same images."""

_RECORD_OVERHEAD: Final = 400
"""Bytes of a record that are not voxels, compressed."""


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to be made.

    Attributes:
        name: its file name.
        positions: positions of its records in the split.
        candidates: names of shards that may already hold some of its records; its own is one of them.
        published: the one of them that belongs to a published dataset.
        part_indices: numbers of the shards in whose folders parts may be that hold some of its records.
        compared: name of the published shard that stays if the one that is made is the same; None where
            there is none, or all is replaced.
        index_sha256: of the index of `published`, as its dataset says; "" where there is none.
    """

    name: ShardName
    positions: range
    candidates: tuple[ShardName, ...]
    published: ShardName | None = None
    part_indices: tuple[int, ...] = ()
    compared: ShardName | None = None
    index_sha256: str = ""


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """Some rows of one shard: what is retried, skipped and resumed as one."""

    task: ShardTask
    rows: tuple[VolumeRow, ...]


@dataclass(frozen=True)
class BuildPlan:
    """A build, decided.

    Attributes:
        config: configuration with absolute paths, and `sharding` and `columns.label` set.
        num_rows: rows of the manifest; of these, `num_skipped` are skipped because they lack a label or a
            mask.
        column_names: columns of the manifest; `extra_columns` are those that are only kept in the index.
        split_sizes: rows of each split.
        shape: required shape of every record; None if shapes may differ.
        source_dtype: dtype on disk of the first image, such as "int16" or "rgb24".
        loaded_dtype: dtype of its voxels as they are loaded.
        key_check, manifest_name, num_unlabelled, num_unmasked: as of `Manifest`.
        num_frames: records per image if frames, or clips of them, become records; else None.
        digest: digest of the manifest's content.
        unit_rows: largest number of rows of a work unit.
        has_published: whether the output holds a dataset; `SavedPlan.published` names its shards.
        reuse_published: whether records may be taken from them.
        versions: versions of the software that makes the records, where the build was planned.
        earlier: how the unfinished builds that it continues divide their rows into shards.
        earlier_roots: folders of their parts.
        revision: revision of the dataset.
        withdrawn, withdrawals: as of the `DatasetInfo` of the published dataset.
    """

    config: BuildConfig
    num_rows: int
    column_names: tuple[str, ...]
    extra_columns: tuple[str, ...]
    split_sizes: Mapping[str, int]
    shape: tuple[int, ...] | None
    source_dtype: str
    loaded_dtype: str
    key_check: str | None = None
    manifest_name: str = ""
    num_skipped: int = 0
    num_unlabelled: int = 0
    num_unmasked: int = 0
    num_frames: int | None = None
    digest: str = ""
    unit_rows: int = 1
    has_published: bool = False
    reuse_published: bool = True
    versions: Mapping[str, str] = field(default_factory=dict)
    earlier: tuple[Layout, ...] = ()
    earlier_roots: tuple[str, ...] = ()
    revision: int = 1
    withdrawn: tuple[str, ...] = ()
    withdrawals: tuple[Withdrawal, ...] = ()

    @property
    def num_examples(self) -> int:
        """Records, if no volume fails."""
        return (self.num_rows - self.num_skipped) * (self.num_frames or 1)

    @property
    def sharding(self) -> Sharding:
        """How the splits are cut."""
        assert self.config.sharding is not None
        return self.config.sharding

    @property
    def stored_dtype(self) -> str:
        """Dtype of the voxels in the records."""
        record = self.config.record
        return self.loaded_dtype if record.voxel_dtype == "native" else record.voxel_dtype

    @property
    def parts_root(self) -> str:
        """Folder of the part files."""
        return parts_root(self.config.output, self.config.temp_location)

    @property
    def parts_roots(self) -> tuple[str, ...]:
        """Folders in which part files may be; those of this build are in the first."""
        return tuple(dict.fromkeys((self.parts_root, *self.earlier_roots)))

    @property
    def layout(self) -> Layout:
        """How the rows are cut into shards."""
        return Layout(self.split_sizes, self.sharding, self.num_frames or 1)

    @property
    def required_shape(self) -> tuple[int | None, ...] | None:
        """Shape that every image must be loaded with; None, or None for an axis, if it may differ."""
        return self.config.record.required_shape(self.shape)

    @property
    def required_dtype(self) -> str | None:
        """Dtype that every image must have on disk; None if dtypes may differ."""
        return self.source_dtype if self.config.record.voxel_dtype == "native" else None

    @property
    def identity(self) -> str:
        """16 hex digits that differ wherever another build that has this output writes other bytes.

        Two builds of one identity may overlap, as when a job outlives the command that started it and that
        is given again.
        """
        facts: list[Any] = [self.config.as_dataset_config(), storage.dirname(self.config.manifest)]
        facts += [self.digest, self.shape, self.num_frames, self.source_dtype, self.revision, self.versions]
        record = self.config.record
        facts += [record.format_version, record.format_features, self.config.recheck]
        text = dump_json(facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def describe(self) -> DatasetInfo:
        """The dataset that is made, as far as it is known before it is: without shards."""
        config = self.config
        return DatasetInfo(
            config=config.as_dataset_config() | {"fingerprint": config.record.fingerprint},
            manifest={
                "path": self.manifest_name,
                "num_rows": self.num_rows,
                "digest": self.digest,
                "columns": list(self.column_names),
                **({"num_skipped": self.num_skipped} if self.num_skipped else {}),
                **({"num_frames": self.num_frames} if self.num_frames else {}),
                **({"key_check": self.key_check} if self.key_check else {}),
            },
            shape=self.shape,
            dtype=self.stored_dtype,
            labelled=config.columns.label is not None,
            features=feature_kinds(config.record),
            splits={},
            labels=config.record.labels or (),
            revision=self.revision,
            versions=self.versions,
            format_version=config.record.format_version,
            format_features=config.record.format_features,
            withdrawn=self.withdrawn,
            withdrawals=self.withdrawals,
        )

    def shard_totals(self) -> dict[str, int]:
        """Shards of each split."""
        return {split: len(self.shard_ranges(split)) for split in self.split_sizes}

    @property
    def num_shards(self) -> int:
        """Shards of all splits."""
        return sum(self.shard_totals().values())

    @property
    def split_examples(self) -> dict[str, int]:
        """Records of each split, if no volume fails."""
        return {split: size * (self.num_frames or 1) for split, size in self.split_sizes.items()}

    def shard_ranges(self, split: str) -> list[range]:
        """Positions of the records of each shard of a split."""
        return self.layout.ranges(split)

    def tasks(self, split: str, published: Mapping[str, str] = MappingProxyType({})) -> list[ShardTask]:
        """The shards of a split, given the sha256 of the index of each published shard, by its name."""
        ranges = self.shard_ranges(split)
        names = self.layout.names(
            split, compressed=self.config.record.compression == "gzip", revision=self.revision
        )
        held = {(n.split, n.index): n for n in map(ShardName.parse, published) if n}
        earlier = [layout.ranges(split) for layout in self.earlier]
        made = [
            self._task(name, positions, held, earlier) for name, positions in zip(names, ranges, strict=True)
        ]
        return [replace(task, index_sha256=published.get(str(task.published), "")) for task in made]

    def _task(
        self,
        name: ShardName,
        positions: range,
        held: Mapping[tuple[str, int], ShardName],
        earlier: Sequence[Sequence[range]],
    ) -> ShardTask:
        same_place = held.get((name.split, name.index))
        kept = same_place if self.reuse_published else None
        candidates, part_indices = [name, *([kept] if kept else [])], {name.index}
        for ranges in earlier:
            for index in overlapping(ranges, positions):
                part_indices.add(index)
                # The file of another shard of this build may be replaced before it is read.
                if index == name.index or len(ranges) != name.total:
                    candidates.append(replace(name, index=index, total=len(ranges)))
        unique = tuple(dict.fromkeys(candidates))
        compared = None if self.config.overwrite else same_place
        return ShardTask(name, positions, unique, kept, tuple(sorted(part_indices)), compared)

    def read_units(self, manifest_path: str) -> Iterator[ShardTask | WorkUnit]:
        """Read the manifest again, where the build runs, and cut it into units.

        Yields:
            Each shard's task, followed by its units.

        Raises:
            ManifestChangedError: the manifest is no longer the one that was planned for.
        """
        manifest = read_build_manifest(manifest_path, self.config)
        if manifest.digest() != self.digest:
            raise ManifestChangedError(
                manifest_path, ["changed since this build was started; start it again"]
            )
        # So the classes of labels, which are made of the rows alone, are the planned ones as well.
        published = self._published()
        for split in self.split_sizes:
            yield from self.split_units(manifest, split, published)

    def read_tasks(self) -> Iterator[ShardTask]:
        """The shards of all splits, where the build runs or where it was started."""
        published = self._published()
        for split in self.split_sizes:
            yield from self.tasks(split, published)

    def _published(self) -> dict[str, str]:
        if not self.has_published:
            return {}
        names = require_current(self.config.output, self.identity).published
        known = {shard.name: shard.index_sha256 for shard in read_info(self.config.output).shards}
        return {name: known.get(name, "") for name in names}

    def row_order(self, manifest: Manifest, split: str) -> npt.NDArray[np.int64]:
        """0-based indices of the rows of a split, in the order of their positions."""
        indices = manifest.row_numbers(split)
        seed = self.config.shuffle_seed
        if seed is not None:
            ids = manifest.ids.take(indices).to_pylist()
            indices = indices[order_rows(ids, seed)]
        return indices

    def split_units(
        self, manifest: Manifest, split: str, published: Mapping[str, str]
    ) -> Iterator[ShardTask | WorkUnit]:
        """Each shard's task, followed by its units; `published` is as of `tasks`."""
        indices = self.row_order(manifest, split)
        frames, clip = self.num_frames or 1, self.config.record.clip_frames
        for task in self.tasks(split, published):
            yield task
            units = self.unit_ranges(task.positions)
            for unit, positions in enumerate(units):
                number = unit if len(units) > 1 else WHOLE_SHARD
                images = indices[positions.start // frames : positions.stop // frames].tolist()
                rows = manifest.rows(images, positions.start, str(task.name), number, self.num_frames, clip)
                yield WorkUnit(task, tuple(rows))

    def unit_ranges(self, positions: range) -> list[range]:
        """Positions of the records of each work unit of a shard, given those of the shard."""
        frames = self.num_frames or 1
        num_images = len(positions) // frames
        units = Sharding(num_shards=math.ceil(num_images / self.unit_rows))
        cuts = shard_ranges(num_images, units, frames)
        return [range(positions.start + cut.start, positions.start + cut.stop) for cut in cuts]


@dataclass(frozen=True)
class CheckPlan:
    """What a check compares the images of a manifest with.

    Attributes:
        config: configuration of the build, with absolute paths.
        num_rows: rows of the manifest, without those that are skipped.
        num_skipped: rows without a label or a mask that are skipped.
        build: plan of the build into an empty output; None if it would be refused before it starts.
        refusal: why it would be refused; "" if it would not.
        num_unlabelled, num_unmasked: as of `Manifest`.
        voxels: whether to read voxels, too.
    """

    config: BuildConfig
    num_rows: int
    num_skipped: int
    build: BuildPlan | None
    refusal: str = ""
    num_unlabelled: int = 0
    num_unmasked: int = 0
    voxels: bool = False

    @property
    def unit_rows(self) -> int:
        """Most rows of a unit of work."""
        return unit_rows(self.num_rows, self.config.workers) if self.voxels else _HEADERS_AT_A_TIME


def with_absolute_paths(config: BuildConfig) -> BuildConfig:
    """A configuration whose paths do not depend on the working directory."""
    return replace(
        config,
        manifest=storage.absolute(config.manifest),
        output=config.output and storage.absolute(config.output),
        temp_location=config.temp_location and storage.absolute(config.temp_location),
        anonymous_ids=config.anonymous_ids and storage.absolute(config.anonymous_ids),
    )


def read_build_manifest(path: str, config: BuildConfig, content: bytes | None = None) -> Manifest:
    """The manifest of a build: with its splits, and with pseudonyms if ids are anonymous.

    `content` is as of `read_table`; None reads `BuildConfig.rows`, or the manifest itself.

    Raises:
        ManifestError: it cannot be built from.
        UsageError: the key of the pseudonyms is too short.
    """
    key = config.anonymous_ids
    pseudonyms = read_pseudonyms(key) if key else None
    if content is None and config.rows is not None:
        content = storage.read(config.rows, storage.dirname(storage.dirname(config.rows)))
    return read_manifest(path, config.columns, config.splitting, pseudonyms, content=content)


def stored_itemsize(voxel_dtype: str, source_itemsize: int) -> int:
    """Bytes of a voxel in a record, uncompressed, given its bytes on disk."""
    return {"float16": 2, "bfloat16": 2, "uint8": 1, "native": source_itemsize}.get(voxel_dtype, 4)


def default_sharding(
    num_voxels: int, source_itemsize: int, record: RecordConfig, num_frames: int = 1
) -> Sharding:
    """Shards of about SHARD_BYTES, as `record_bytes` estimates; all frames of an image are in one shard."""
    each = num_frames * record_bytes(num_voxels, source_itemsize, record)
    return Sharding(examples_per_shard=num_frames * max(1, round(SHARD_BYTES / each)))


def record_bytes(num_voxels: int, source_itemsize: int, record: RecordConfig) -> float:
    """Bytes that one record is expected to take in a shard, given the bytes of a voxel on disk."""
    each: float = stored_itemsize(record.voxel_dtype, source_itemsize)
    if record.compression == "gzip":
        # Computed voxels compress like a float32 image. What gzip finds in float32 voxels made of narrow
        # integers, it cannot find in the integers again.
        packed = (
            _ASSUMED_BYTES_WIDE
            if record.computes
            else _ASSUMED_BYTES.get(source_itemsize, _ASSUMED_BYTES_WIDE)
        )
        each = min(each, packed * _ASSUMED_SHARE.get(record.voxel_dtype, 1.0))
    if record.has_target:
        each += _ASSUMED_BYTES_WIDE if record.compression == "gzip" else 4
    return num_voxels * each + _RECORD_OVERHEAD


def unit_rows(num_rows: int, workers: int | None) -> int:
    """Most rows of a work unit that reads volumes and makes no records."""
    return max(1, min(_VOLUMES_AT_A_TIME, num_rows // (UNITS_PER_WORKER * (workers or 1))))


def choose_unit_rows(num_rows: int, image_bytes: int, workers: int) -> int:
    """Most rows of a work unit.

    Enough units for every worker to have several, and no more: a shard that is one unit is published
    without a copy. `image_bytes` is the size of the voxels of all records of an image.
    """
    by_bytes = max(1, UNIT_BYTES // image_bytes)
    by_workers = num_rows if workers == 1 else math.ceil(num_rows / (UNITS_PER_WORKER * workers))
    return max(1, min(by_bytes, by_workers, MAX_UNIT_ROWS))
