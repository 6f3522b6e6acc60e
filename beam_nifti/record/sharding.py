"""Shards and the order of rows. Only integers and names."""

from __future__ import annotations

import bisect
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from beam_nifti.config import SPLIT_PATTERN, Sharding

INDEX_FOLDER: Final = "index"
"""Folder of the indexes, in the dataset."""

_NAME = re.compile(
    rf"(?P<split>{SPLIT_PATTERN.pattern})-(?P<index>[0-9]{{5,9}})-of-(?P<total>[0-9]{{5,9}})"
    r"(?:-r(?P<revision>[0-9]{1,9}))?\.tfrecord(?P<gz>\.gz)?"
)


@dataclass(frozen=True, slots=True, order=True)
class ShardName:
    """A shard's file name, formatted and parsed in one place.

    Attributes:
        split: name of the split, such as "train".
        index: 0-based number of the shard in its split.
        total: number of shards in the split.
        compressed: whether the file ends in `.gz`.
        revision: revision of the dataset for which the file was written; 0 for a first build.

    >>> str(ShardName("train", 3, 10))
    'train-00003-of-00010.tfrecord.gz'
    >>> ShardName.parse("test-00000-of-00001-r2.tfrecord")
    ShardName(split='test', index=0, total=1, compressed=False, revision=2)
    """

    split: str
    index: int
    total: int
    compressed: bool = True
    revision: int = 0

    def __str__(self) -> str:
        """The file's name, without a folder."""
        return f"{self.stem}.tfrecord{'.gz' if self.compressed else ''}"

    @property
    def stem(self) -> str:
        """The name without its endings."""
        revision = f"-r{self.revision}" if self.revision else ""
        return f"{self.split}-{self.index:05d}-of-{self.total:05d}{revision}"

    @property
    def index_file(self) -> str:
        """Path of the shard's index, relative to the dataset."""
        return f"{INDEX_FOLDER}/{self.stem}.parquet"

    def is_same_place(self, other: ShardName) -> bool:
        """Whether both are the same shard of the same split, in any revision."""
        return replace(self, revision=0) == replace(other, revision=0)

    @classmethod
    def parse(cls, name: str) -> ShardName | None:
        """The shard that a file name names; None if it is not the name of a shard."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        return cls(
            match["split"],
            int(match["index"]),
            int(match["total"]),
            match["gz"] is not None,
            int(match["revision"] or 0),
        )


def count_shards(num_rows: int, sharding: Sharding, num_frames: int = 1) -> int:
    """Shards that a split of so many rows is cut into; as `shard_ranges`.

    >>> count_shards(7, Sharding(examples_per_shard=3)), count_shards(2, Sharding(num_shards=3))
    (3, 2)
    """
    if sharding.examples_per_shard is not None:
        return -(-num_rows // _images_per_shard(sharding.examples_per_shard, num_frames))
    assert sharding.num_shards is not None
    return min(sharding.num_shards, num_rows)


def _images_per_shard(examples_per_shard: int, num_frames: int) -> int:
    return max(1, examples_per_shard // num_frames)


def shard_ranges(num_rows: int, sharding: Sharding, num_frames: int = 1) -> list[range]:
    """Cut the positions of the examples of a split into consecutive shards, none empty.

    The frames of an image stay together: a shard has as many images as fit into its number of examples, and
    at least one.

    >>> shard_ranges(7, Sharding(examples_per_shard=3))
    [range(0, 3), range(3, 6), range(6, 7)]
    >>> shard_ranges(7, Sharding(num_shards=3))
    [range(0, 2), range(2, 4), range(4, 7)]
    >>> shard_ranges(3, Sharding(examples_per_shard=9), num_frames=4)
    [range(0, 8), range(8, 12)]
    """
    if sharding.examples_per_shard is not None:
        step = _images_per_shard(sharding.examples_per_shard, num_frames)
        images = [range(i, min(i + step, num_rows)) for i in range(0, num_rows, step)]
    else:
        total = count_shards(num_rows, sharding)
        images = [range(s * num_rows // total, (s + 1) * num_rows // total) for s in range(total)]
    return [range(r.start * num_frames, r.stop * num_frames) for r in images]


@dataclass(frozen=True)
class Layout:
    """How the rows of a dataset are cut into shards.

    Attributes:
        split_sizes: number of rows of each split.
        sharding: how each split is cut.
        num_frames: number of records per row.
    """

    split_sizes: Mapping[str, int]
    sharding: Sharding
    num_frames: int = 1

    def ranges(self, split: str) -> list[range]:
        """Positions of the records of each shard of a split; empty if there is no such split."""
        size = self.split_sizes.get(split, 0)
        return shard_ranges(size, self.sharding, self.num_frames) if size else []

    def names(self, split: str, *, compressed: bool, revision: int) -> list[ShardName]:
        """Names of the shards of a split that a build of a revision writes.

        The bytes of a published name never change, because each revision has its own names.
        """
        total, suffix = len(self.ranges(split)), revision if revision > 1 else 0
        return [ShardName(split, index, total, compressed, suffix) for index in range(total)]


def overlapping(ranges: Sequence[range], positions: range) -> range:
    """Find which of some consecutive ranges share a position with another range.

    >>> overlapping([range(0, 4), range(4, 8), range(8, 9)], range(3, 8))
    range(0, 2)
    """
    first = bisect.bisect_right(ranges, positions.start, key=lambda r: r.stop)
    return range(first, max(first, bisect.bisect_left(ranges, positions.stop, key=lambda r: r.start)))


def order_rows(ids: Sequence[str], seed: int | None) -> list[int]:
    """The order in which the rows of a split take their positions.

    Args:
        ids: example ids, unique, in the manifest's order.
        seed: None keeps that order; a number orders by a keyed hash of the ids, which is the same on
            every machine and does not depend on the order of the manifest.

    Returns:
        Indices into `ids`, one per position.
    """
    if seed is None:
        return list(range(len(ids)))
    key = hashlib.sha256(str(seed).encode()).digest()
    keys = [hashlib.blake2b(i.encode(), digest_size=16, key=key).digest() for i in ids]
    return sorted(range(len(ids)), key=lambda i: (keys[i], ids[i]))
