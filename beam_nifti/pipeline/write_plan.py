"""Which record is in which shard, for `WriteToTFRecord`: decided by the ids of all records."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from beam_nifti.config import FORMAT_FEATURES, FORMAT_VERSION, BuildConfig, Columns, RecordConfig, Sharding
from beam_nifti.errors import PartsChangedError, UsageError
from beam_nifti.pipeline.plan import SHARD_BYTES
from beam_nifti.pipeline.records import Traits
from beam_nifti.pipeline.write_target import Target
from beam_nifti.record.dataset_info import DatasetInfo, ShardInfo, SplitInfo
from beam_nifti.record.sharding import Layout, ShardName
from beam_nifti.record.versions import all_versions
from beam_nifti.support.strict_json import dump_json
from beam_nifti.support.wording import counted, first_few

SAME_IDS: Final = (
    "run the pipeline again, and make sure that every step gives the same ids when it is repeated"
)
"""The remedy if records differ from those that were counted."""

_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class Placed:
    """A record in a part file: where it is, and its row of the index without its offset in a shard."""

    id: str
    split: str
    part: str
    offset: int
    length: int
    cells: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Key:
    """The id and split, which decide a record's position in the dataset, and its size."""

    id: str
    split: str
    length: int


@dataclass(frozen=True)
class WritePlan:
    """Which records are in which shard.

    Attributes:
        target: target that they are written to.
        layout: sizes of the splits, and how they are divided into shards.
        firsts: the first id of each shard, by split.
        traits: traits of all records.
        revision: revision of the dataset.
        digest: digest of all ids with their splits.
    """

    target: Target
    layout: Layout
    firsts: Mapping[str, tuple[str, ...]]
    traits: Traits
    revision: int
    digest: str

    @classmethod
    def of(
        cls, target: Target, ids: list[tuple[str, str]], num_bytes: int, traits: Traits, revision: int
    ) -> WritePlan:
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
            frames=("all" if made.clip_frames > 1 else None) if made.splits_frames else made.frames,
            max_frames=None,
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
            mask=",".join(config.masks or ("mask",)) if config.mask_dtype else None,
            target="target" if config.has_target else None,
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


def to_shard(placed: Placed, plan: WritePlan) -> tuple[str, Placed]:
    """A record, keyed by the name of its shard."""
    index = bisect.bisect_right(plan.firsts.get(placed.split, ()), placed.id) - 1
    if index < 0:
        raise PartsChangedError(
            f"record {placed.id!r} of split {placed.split!r} was missing when the records were counted; "
            f"{SAME_IDS}"
        )
    return str(plan.name(placed.split, index)), placed
