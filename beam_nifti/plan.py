"""What a build will do, decided before it starts and small enough to travel in the job graph."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from beam_nifti import storage
from beam_nifti.config import BuildConfig, RecordConfig, Sharding
from beam_nifti.errors import ManifestChangedError, OutputBusyError
from beam_nifti.manifest import WHOLE_SHARD, Manifest, VolumeRow, read_manifest
from beam_nifti.parts import BUILD_FOLDER
from beam_nifti.pseudonyms import read_pseudonyms
from beam_nifti.sharding import ShardName, order_rows, shard_ranges
from beam_nifti.strict_json import dump_json

SHARD_BYTES: Final = 192 << 20
"""Aimed at for one shard file: large enough to stream from an object store, small enough to shuffle."""

UNIT_BYTES: Final = 1 << 30
"""Voxels a work unit, at most: some seconds, which is what a crash costs a thread. A shard of SHARD_BYTES
has less."""

MAX_UNIT_ROWS: Final = 1 << 14
"""What a crash costs in rows, and about 10 MB of them in memory."""

UNITS_PER_WORKER: Final = 8
"""Least number of units a worker, so that the last ones to finish do not leave the others idle."""

_ASSUMED_BYTES: Final = {1: 0.8, 2: 1.44}
"""Bytes of a voxel after gzip, by bytes of the source's voxels; measured on brain images."""

_ASSUMED_BYTES_WIDE: Final = 3.4
_ASSUMED_SHARE: Final = {"float16": 0.75, "bfloat16": 0.7, "uint8": 0.5}
"""Size after gzip to that of float32, for the dtypes that round; measured on the same images."""

_RECORD_OVERHEAD: Final = 400
"""Bytes of a record that are not voxels, compressed."""

_NOTE_FILE: Final = f"{BUILD_FOLDER}/plan.json"


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to be made.

    Attributes:
        name: its file name.
        positions: of its records in the split.
        candidates: names of shards that may already hold some of its records; its own is the first.
        compared: name of the published shard that stays if the one that is made is the same; None where
            published records are candidates.
    """

    name: ShardName
    positions: range
    candidates: tuple[ShardName, ...]
    compared: ShardName | None = None


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """Some rows of one shard: what is retried, skipped and resumed as one."""

    task: ShardTask
    rows: tuple[VolumeRow, ...]


@dataclass(frozen=True)
class BuildNote:
    """What a build says of itself in its output: to its own workers, and to the build after it.

    It holds what would make the job graph large.

    Attributes:
        fingerprint: of the configuration that makes the records.
        folder: of the manifest, as the same relative path means another image elsewhere.
        totals: shards a split, of this build and of the unfinished ones before it.
        identity: of this build.
        temp_location: of this build.
        published: names of the shards of the dataset that the output holds, which stay untouched.
        recheck: whether it makes every record again.
    """

    fingerprint: str
    folder: str
    totals: Mapping[str, tuple[int, ...]]
    identity: str = ""
    temp_location: str | None = None
    published: tuple[str, ...] = ()
    recheck: bool = False

    def is_of(self, fingerprint: str, folder: str, recheck: bool) -> bool:
        """Whether a build of these can use what the one that left the note has done."""
        return (self.fingerprint, self.folder, self.recheck) == (fingerprint, folder, recheck)

    def write(self, output: str) -> None:
        """Leave it in an output."""
        storage.write(storage.join(output, _NOTE_FILE), dump_json(asdict(self)).encode())

    @classmethod
    def read(cls, output: str) -> BuildNote | None:
        """The note of an unfinished build, if there is one."""
        try:
            facts = json.loads(storage.read(storage.join(output, _NOTE_FILE)))
            totals = {split: tuple(counts) for split, counts in facts.pop("totals").items()}
            return cls(**facts | {"totals": totals, "published": tuple(facts["published"])})
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            # An empty one is what a loss of power can leave, another one what another version left.
            return None


@dataclass(frozen=True)
class BuildPlan:
    """A build, decided.

    Attributes:
        config: with absolute paths, and `sharding` and `columns.label` set.
        num_rows: rows of the manifest.
        num_skipped: those of them that are left out, as they lack a label.
        digest: of the manifest's content.
        column_names: of the manifest.
        extra_columns: those of them that are only kept in the index.
        split_sizes: rows of each split.
        shape: that every record must have; None where shapes may differ.
        source_dtype: dtype on disk of the first image, such as "int16" or "rgb24".
        loaded_dtype: of its voxels as they are loaded.
        unit_rows: rows of a work unit, at most.
        has_published: whether the output holds a dataset; `BuildNote.published` names its shards.
        reuse_published: whether records may be taken from them.
        earlier_totals: shards a split, of unfinished builds of these or other rows in the output.
        revision: of the dataset that this build makes.
        key_check: `Manifest.key_check`.
        num_frames: frames of the first image, where each frame of an image becomes a record; else None.
    """

    config: BuildConfig
    num_rows: int
    digest: str
    column_names: tuple[str, ...]
    extra_columns: tuple[str, ...]
    split_sizes: Mapping[str, int]
    shape: tuple[int, ...] | None
    source_dtype: str
    loaded_dtype: str
    unit_rows: int
    has_published: bool = False
    reuse_published: bool = True
    earlier_totals: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    revision: int = 1
    key_check: str | None = None
    num_skipped: int = 0
    num_frames: int | None = None

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
    def required_shape(self) -> tuple[int | None, ...] | None:
        """Shape that every image must be loaded with; None for what may differ."""
        record = self.config.record
        if self.shape is None and record.channels is not None:
            return (None, None, None, record.num_channels)
        if self.shape is None and record.frames != "all":
            # Of shapes that differ the reader knows no more than the one channel of 3-D volumes.
            return (None, None, None)
        return self.shape

    @property
    def required_dtype(self) -> str | None:
        """Dtype that every image must have on disk; None where dtypes may differ."""
        return self.source_dtype if self.config.record.voxel_dtype == "native" else None

    @property
    def identity(self) -> str:
        """16 hex digits that differ wherever a build of another making has this output.

        Two builds of one making may overlap, as when a job outlives the command that started it and that
        is given again; they write the same bytes.
        """
        facts: list[Any] = [self.config.as_dataset_config(), storage.dirname(self.config.manifest)]
        facts += [self.digest, self.shape, self.num_frames, self.source_dtype, self.revision]
        facts += [self.config.record.format_version, self.config.recheck]
        text = dump_json(facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def shard_totals(self) -> dict[str, int]:
        """Shards of each split."""
        return {split: len(self.shard_ranges(split)) for split in self.split_sizes}

    def shard_ranges(self, split: str) -> list[range]:
        """Positions of the records of each shard of a split."""
        return shard_ranges(self.split_sizes[split], self.sharding, self.num_frames or 1)

    def tasks(self, split: str, published: Collection[str] = ()) -> list[ShardTask]:
        """The shards of a split.

        Args:
            split: its name.
            published: `BuildNote.published`.
        """
        ranges = self.shard_ranges(split)
        compressed = self.config.record.compression == "gzip"
        held = {(n.split, n.index): n for n in map(ShardName.parse, published) if n}
        return [
            self._task(ShardName(split, i, len(ranges), compressed), positions, published, held)
            for i, positions in enumerate(ranges)
        ]

    def _task(
        self,
        base: ShardName,
        positions: range,
        published: Collection[str],
        held: Mapping[tuple[str, int], ShardName],
    ) -> ShardTask:
        def named(total: int, revision: int = 0) -> ShardName:
            return ShardName(base.split, base.index, total, base.compressed, revision)

        # Both have one index: a shard of the other compression takes the name as well.
        twins = {str(base), str(replace(base, compressed=not base.compressed))}
        name = base if twins.isdisjoint(published) else named(base.total, self.revision)
        candidates = [name]
        found = held.get((base.split, base.index))
        if self.reuse_published and found:
            candidates.append(found)
        for total in self.earlier_totals.get(base.split, ()):
            if base.index < total:
                earlier = (named(total), named(total, self.revision))
                candidates += [c for c in earlier if str(c) not in published]
        compared = found if self.config.recheck else None
        return ShardTask(name, positions, tuple(dict.fromkeys(candidates)), compared)

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
            yield from self._split_units(manifest, split, published)

    def read_tasks(self) -> Iterator[ShardTask]:
        """The shards of all splits, where the build runs or where it was started."""
        published = self._published()
        for split in self.split_sizes:
            yield from self.tasks(split, published)

    def _published(self) -> frozenset[str]:
        if not self.has_published:
            return frozenset()
        return frozenset(require_current(self.config.output, self.identity).published)

    def _split_units(
        self, manifest: Manifest, split: str, published: Collection[str]
    ) -> Iterator[ShardTask | WorkUnit]:
        indices = manifest.row_numbers(split)
        seed = self.config.shuffle_seed
        if seed is not None:
            ids = manifest.ids.take(indices).to_pylist()
            indices = indices[order_rows(ids, seed)]
        frames = self.num_frames or 1
        for task in self.tasks(split, published):
            yield task
            units = self.unit_ranges(task.positions)
            for unit, positions in enumerate(units):
                number = unit if len(units) > 1 else WHOLE_SHARD
                images = indices[positions.start // frames : positions.stop // frames].tolist()
                rows = manifest.rows(images, positions.start, str(task.name), number, self.num_frames)
                yield WorkUnit(task, tuple(rows))

    def unit_ranges(self, positions: range) -> list[range]:
        """Positions of the records of each work unit of a shard.

        Args:
            positions: of the shard's records.
        """
        frames = self.num_frames or 1
        num_images = len(positions) // frames
        units = Sharding(num_shards=math.ceil(num_images / self.unit_rows))
        cuts = shard_ranges(num_images, units, frames)
        return [range(positions.start + cut.start, positions.start + cut.stop) for cut in cuts]


def read_build_manifest(path: str, config: BuildConfig) -> Manifest:
    """The manifest of a build: with its splits, and with pseudonyms where ids are anonymous.

    Raises:
        ManifestError: it cannot be built from.
        UsageError: the key of the pseudonyms is too short.
    """
    key = config.anonymous_ids
    pseudonyms = read_pseudonyms(key) if key else None
    return read_manifest(path, config.columns, config.splitting, pseudonyms)


def require_current(output: str, identity: str) -> BuildNote:
    """The note of the build that has an output.

    Args:
        output: of the build that asks.
        identity: of that build.

    Raises:
        OutputBusyError: the output is another build's by now. A cluster's job can outlive its launcher, whose
            lock is gone with it.
    """
    note = BuildNote.read(output)
    if note is None or note.identity != identity:
        what = "is not being built any more" if note is None else "is being built otherwise by now"
        raise OutputBusyError(
            f"{output}: {what}: a build of it ended or another one was started while this one ran; this one "
            "stops. Cancel jobs that a stopped command left behind before the next build"
        )
    return note


def parts_root(output: str, temp_location: str | None) -> str:
    """Folder of the part files of a build."""
    if temp_location is None:
        return storage.join(output, BUILD_FOLDER)
    # Builds of several outputs may share a temporary folder.
    return storage.join(temp_location, f"beam_nifti-{hashlib.sha256(output.encode()).hexdigest()[:16]}")


def stored_itemsize(voxel_dtype: str, source_itemsize: int) -> int:
    """Bytes of a voxel in a record, uncompressed.

    Args:
        voxel_dtype: `RecordConfig.voxel_dtype`.
        source_itemsize: bytes of a voxel on disk.
    """
    return {"float16": 2, "bfloat16": 2, "uint8": 1, "native": source_itemsize}.get(voxel_dtype, 4)


def default_sharding(
    num_voxels: int, source_itemsize: int, record: RecordConfig, num_frames: int = 1
) -> Sharding:
    """Shards of about SHARD_BYTES, from what the first image's header says.

    Args:
        num_voxels: of a volume.
        source_itemsize: bytes of a voxel on disk.
        record: dtype and compression of what is stored.
        num_frames: records of an image, which stay in one shard.
    """
    each = num_frames * record_bytes(num_voxels, source_itemsize, record)
    return Sharding(examples_per_shard=num_frames * max(1, round(SHARD_BYTES / each)))


def record_bytes(num_voxels: int, source_itemsize: int, record: RecordConfig) -> float:
    """Bytes that one record is expected to take in a shard."""
    each: float = stored_itemsize(record.voxel_dtype, source_itemsize)
    if record.compression == "gzip":
        # What gzip finds in float32 voxels made of narrow integers, it cannot find in the integers again.
        packed = _ASSUMED_BYTES.get(source_itemsize, _ASSUMED_BYTES_WIDE)
        each = min(each, packed * _ASSUMED_SHARE.get(record.voxel_dtype, 1.0))
    return num_voxels * each + _RECORD_OVERHEAD


def choose_unit_rows(num_rows: int, image_bytes: int, workers: int) -> int:
    """Most rows of a work unit.

    Enough units for every worker to have several, and no more: a shard that is one unit is published
    without a copy.

    Args:
        num_rows: of the manifest.
        image_bytes: of the voxels of all records of an image.
        workers: threads, or the parallelism to cut for.
    """
    by_bytes = max(1, UNIT_BYTES // image_bytes)
    by_workers = num_rows if workers == 1 else math.ceil(num_rows / (UNITS_PER_WORKER * workers))
    return max(1, min(by_bytes, by_workers, MAX_UNIT_ROWS))
