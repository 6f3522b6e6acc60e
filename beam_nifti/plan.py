"""What a build will do, decided before it starts and small enough to travel in the job graph."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from beam_nifti import storage
from beam_nifti.config import BuildConfig, Sharding
from beam_nifti.errors import ManifestError
from beam_nifti.manifest import Manifest, VolumeRow, read_manifest
from beam_nifti.parts import BUILD_FOLDER
from beam_nifti.sharding import ShardName, order_rows, shard_ranges

SHARD_BYTES: Final = 192 << 20
"""Aimed at for one shard file: large enough to stream from an object store, small enough to shuffle."""

UNIT_BYTES: Final = 512 << 20
"""Voxels a work unit, at most: a few seconds, which is what a crash costs a thread."""

MAX_UNIT_ROWS: Final = 1024
UNITS_PER_WORKER: Final = 8
"""Least number of units a worker, so that the last ones to finish do not leave the others idle."""

_ASSUMED_RATIO: Final = {1: 0.2, 2: 0.36}
"""Size after gzip to float32 size, by bytes of the source's voxels; measured on brain images."""

_ASSUMED_RATIO_WIDE: Final = 0.85


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to be made.

    Attributes:
        name: its file name.
        positions: of its rows in the split.
        candidates: names of shards that may already hold some of its records.
    """

    name: ShardName
    positions: range
    candidates: tuple[ShardName, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """Some rows of one shard: what is retried, skipped and resumed as one."""

    task: ShardTask
    rows: tuple[VolumeRow, ...]


@dataclass(frozen=True)
class BuildPlan:
    """A build, decided.

    Attributes:
        config: with absolute paths, and `sharding` and `columns.label` set.
        num_rows: rows of the manifest.
        digest: of the manifest's content.
        column_names: of the manifest.
        extra_columns: those of them that are only kept in the index.
        split_sizes: rows of each split.
        shape: that every volume must have; None where shapes may differ.
        source_dtype: dtype on disk of the first image.
        unit_rows: rows of a work unit, at most.
        resume: whether finished work may lie in the output.
        published: names of the shards of the dataset that the output holds, which stay untouched.
        reuse_published: whether records may be taken from them.
        earlier_totals: shards a split, of unfinished builds of these or other rows in the output.
        revision: of the dataset that this build makes.
    """

    config: BuildConfig
    num_rows: int
    digest: str
    column_names: tuple[str, ...]
    extra_columns: tuple[str, ...]
    split_sizes: Mapping[str, int]
    shape: tuple[int, ...] | None
    source_dtype: str
    unit_rows: int
    resume: bool = False
    published: frozenset[str] = frozenset()
    reuse_published: bool = True
    earlier_totals: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    revision: int = 1

    @property
    def sharding(self) -> Sharding:
        """How the splits are cut."""
        assert self.config.sharding is not None
        return self.config.sharding

    @property
    def stored_dtype(self) -> str:
        """Dtype of the voxels in the records."""
        record = self.config.record
        return "float32" if record.voxel_dtype == "float32" else self.source_dtype

    @property
    def parts_root(self) -> str:
        """Folder of the part files."""
        return parts_root(self.config.output, self.config.temp_location)

    @property
    def required_dtype(self) -> str | None:
        """Dtype that every image must have on disk; None where dtypes may differ."""
        return self.source_dtype if self.config.record.voxel_dtype == "native" else None

    def shard_totals(self) -> dict[str, int]:
        """Shards of each split."""
        return {s: len(shard_ranges(n, self.sharding)) for s, n in self.split_sizes.items()}

    def tasks(self, split: str) -> list[ShardTask]:
        """The shards of a split."""
        ranges = shard_ranges(self.split_sizes[split], self.sharding)
        return [
            self._task(ShardName(split, i, len(ranges), self._compressed), positions)
            for i, positions in enumerate(ranges)
        ]

    @property
    def _compressed(self) -> bool:
        return self.config.record.compression == "gzip"

    def _task(self, base: ShardName, positions: range) -> ShardTask:
        def named(total: int, revision: int = 0) -> ShardName:
            return ShardName(base.split, base.index, total, base.compressed, revision)

        # Both have one index: a shard of the other compression takes the name as well.
        twins = {str(base), str(replace(base, compressed=not base.compressed))}
        name = named(base.total, self.revision) if twins & self.published else base
        if not self.resume:
            return ShardTask(name, positions)
        candidates = [name]
        if self.reuse_published:
            candidates += self._published_at.get((base.split, base.index), [])
        for total in self.earlier_totals.get(base.split, ()):
            if base.index < total:
                candidates += [c for c in (named(total), named(total, self.revision)) if self._is_free(c)]
        return ShardTask(name, positions, tuple(dict.fromkeys(candidates)))

    def _is_free(self, name: ShardName) -> bool:
        return str(name) not in self.published

    @functools.cached_property
    def _published_at(self) -> dict[tuple[str, int], list[ShardName]]:
        names = [name for name in map(ShardName.parse, sorted(self.published)) if name]
        return {(n.split, n.index): [n] for n in names}

    def read_units(self, manifest_path: str) -> Iterator[ShardTask | WorkUnit]:
        """Read the manifest again, where the build runs, and cut it into units.

        Yields:
            Each shard's task, followed by its units.

        Raises:
            ManifestError: the manifest is no longer the one that was planned for.
        """
        manifest = read_manifest(manifest_path, self.config.columns)
        if manifest.digest() != self.digest:
            raise ManifestError(manifest_path, ["changed since this build was started; start it again"])
        for split in self.split_sizes:
            yield from self._split_units(manifest, split)

    def _split_units(self, manifest: Manifest, split: str) -> Iterator[ShardTask | WorkUnit]:
        indices = manifest.row_numbers(split)
        seed = self.config.shuffle_seed
        if seed is not None:
            ids = manifest.ids.take(indices).to_pylist()
            indices = indices[order_rows(ids, seed)]
        for task in self.tasks(split):
            yield task
            of_shard = indices[task.positions.start : task.positions.stop].tolist()
            units = Sharding(num_shards=math.ceil(len(of_shard) / self.unit_rows))
            for unit, cut in enumerate(shard_ranges(len(of_shard), units)):
                first = task.positions.start + cut.start
                rows = manifest.rows(of_shard[cut.start : cut.stop], first, str(task.name), unit)
                yield WorkUnit(task, tuple(rows))


def parts_root(output: str, temp_location: str | None) -> str:
    """Folder of the part files of a build."""
    if temp_location is None:
        return storage.join(output, BUILD_FOLDER)
    # Builds of several outputs may share a temporary folder.
    return storage.join(temp_location, f"beam_nifti-{hashlib.sha256(output.encode()).hexdigest()[:16]}")


def default_sharding(volume_bytes: int, source_itemsize: int, compressed: bool, native: bool) -> Sharding:
    """Shards of about SHARD_BYTES, from what the first image's header says.

    Args:
        volume_bytes: of one stored volume, uncompressed.
        source_itemsize: bytes of a voxel on disk.
        compressed: whether shards are gzip.
        native: whether voxels are stored as on disk.
    """
    return Sharding(
        examples_per_shard=max(
            1, round(SHARD_BYTES / record_bytes(volume_bytes, source_itemsize, compressed, native))
        )
    )


def record_bytes(volume_bytes: int, source_itemsize: int, compressed: bool, native: bool) -> float:
    """Bytes that one record is expected to take in a shard."""
    if not compressed:
        return float(volume_bytes)
    ratio = _ASSUMED_RATIO.get(source_itemsize, _ASSUMED_RATIO_WIDE)
    # What gzip finds in float32 voxels made of narrow integers, it cannot find in the integers again.
    return volume_bytes * (min(1.0, ratio * 4 / source_itemsize) if native else ratio)


def choose_unit_rows(num_rows: int, volume_bytes: int, workers: int) -> int:
    """Most rows of a work unit.

    Enough units for every worker to have several, and no more: a shard that is one unit is published
    without a copy.
    """
    by_bytes = max(1, UNIT_BYTES // volume_bytes)
    by_workers = num_rows if workers == 1 else math.ceil(num_rows / (UNITS_PER_WORKER * workers))
    return max(1, min(by_bytes, by_workers, MAX_UNIT_ROWS))
