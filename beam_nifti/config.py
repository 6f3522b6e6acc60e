"""What a build is asked to do, as checked values. No I/O."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from beam_nifti.errors import UsageError

FORMAT_VERSION: Final = 1
"""Version of the records, index and dataset_info.json. Source: docs/format.md."""

RESCALE_METHODS: Final = ("minmax", "none")
VOXEL_DTYPES: Final = ("float32", "native")
FRAMES: Final = ("all",)
COMPRESSIONS: Final = ("gzip", "none")
COMPRESSION_LEVELS: Final = range(4)
SPLIT_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")

_SHARES_TOLERANCE: Final = 1e-5
"""Three times 0.333333 is a whole."""


def _choose(name: str, value: object, allowed: tuple[str, ...] | range) -> None:
    if value not in allowed:
        choices = ", ".join(str(a) for a in allowed)
        raise UsageError(f"{name} is {value!r}; choose one of: {choices}")


@dataclass(frozen=True)
class RecordConfig:
    """What decides the bytes of one record, apart from its row and its image.

    Attributes:
        rescale: "minmax" maps each volume's own range onto [0, 1]; "none" keeps the image's units.
        voxel_dtype: "float32" stores rescaled voxels; "native" stores them as in the file, and the
            reader rescales.
        compression: "gzip" (one member a record) or "none".
        compression_level: igzip level, 0 (fastest) to 3.
        frames: "all" makes the time axis of a 4-D image the record's last axis; None refuses 4-D images.
    """

    rescale: str = "minmax"
    voxel_dtype: str = "float32"
    compression: str = "gzip"
    compression_level: int = 2
    frames: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that no record can have."""
        _choose("--rescale", self.rescale, RESCALE_METHODS)
        _choose("--voxel-dtype", self.voxel_dtype, VOXEL_DTYPES)
        _choose("--compression", self.compression, COMPRESSIONS)
        _choose("--compression-level", self.compression_level, COMPRESSION_LEVELS)
        if self.frames is not None:
            _choose("--frames", self.frames, FRAMES)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that differ wherever the same image would give other bytes."""
        facts = {"format": FORMAT_VERSION, **asdict(self)}
        if self.compression == "none":
            del facts["compression_level"]
        if self.frames is None:  # as it was before there was a choice
            del facts["frames"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Columns:
    """Which manifest columns mean what.

    Attributes:
        path: the image, relative to the manifest's folder, absolute, or a URL.
        label: a finite number; None where no label was asked for and `label` may be absent.
        id: what names an example; None means `participant_id` (with `session_id`), else the path.
    """

    path: str = "path"
    label: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class Sharding:
    """How the rows of a split are cut into shards. Exactly one of the two is set.

    Attributes:
        examples_per_shard: rows a shard (the last shard may hold fewer).
        num_shards: shards a split, of sizes that differ by at most one row.
    """

    examples_per_shard: int | None = None
    num_shards: int | None = None

    def __post_init__(self) -> None:
        """Refuse zero, negatives, and both or neither."""
        if (self.examples_per_shard is None) == (self.num_shards is None):
            raise UsageError("give one of --examples-per-shard and --num-shards, not both")
        name, value = (
            ("--examples-per-shard", self.examples_per_shard)
            if self.examples_per_shard is not None
            else ("--num-shards", self.num_shards)
        )
        if value is None or value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class Splitting:
    """How participants are dealt to splits, where the manifest does not say.

    Attributes:
        shares: fraction of the participants, by the name of the split; their order makes no difference.
        seed: another one gives another draw.
        stratify: column within each of whose values the shares are held; None draws every participant on
            its own.
    """

    shares: Mapping[str, float]
    seed: int = 0
    stratify: str | None = None

    def __post_init__(self) -> None:
        """Refuse names that no split can have, and shares that do not make a whole."""
        for name, share in self.shares.items():
            if not SPLIT_PATTERN.fullmatch(name):
                raise UsageError(
                    f"--split names {name!r}; use letters, digits, '_' and '.', a letter or digit first"
                )
            if not share > 0:
                raise UsageError(f"--split gives {name} a share of {share}; it must be above 0")
        total = math.fsum(self.shares.values())
        if not abs(total - 1) <= _SHARES_TOLERANCE:
            raise UsageError(f"--split has shares that sum to {total:g}; they must sum to 1")


@dataclass(frozen=True)
class BuildConfig:
    """Everything `beam-nifti build` was asked to do.

    Attributes:
        manifest: path or URL of the table of images.
        output: folder or URL prefix of the dataset.
        record: what decides a record's bytes.
        columns: which manifest columns mean what.
        sharding: how shards are cut; None derives it from the first image's header.
        splitting: how participants are dealt to splits; None leaves that to the manifest.
        shuffle_seed: orders the rows of a split by a keyed hash of their ids; None keeps the
            manifest's order.
        allow_mixed_shapes: accept volumes of other shapes than the first image's.
        max_bad_fraction: the largest fraction of volumes, 0 to 1, that may be left out.
        overwrite: replace a dataset of other rows or another configuration.
        temp_location: folder of what is needed only until the dataset is complete; None keeps it in
            the output.
        workers: threads of the local runner; on a cluster, the least parallelism to cut units for.
    """

    manifest: str
    output: str
    record: RecordConfig = field(default_factory=RecordConfig)
    columns: Columns = field(default_factory=Columns)
    sharding: Sharding | None = None
    splitting: Splitting | None = None
    shuffle_seed: int | None = None
    allow_mixed_shapes: bool = False
    max_bad_fraction: float = 0.0
    overwrite: bool = False
    temp_location: str | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        """Refuse fractions outside [0, 1] and worker counts below 1."""
        if not (math.isfinite(self.max_bad_fraction) and 0 <= self.max_bad_fraction <= 1):
            raise UsageError(
                f"--max-bad-fraction is {self.max_bad_fraction}; it is a fraction between 0 and 1"
            )
        if self.workers < 1:
            raise UsageError(f"--workers is {self.workers}; it must be at least 1")

    def as_dataset_config(self) -> dict[str, Any]:
        """The part of it that decides a dataset's content, as dataset_info.json records it."""
        return {
            **asdict(self.record),
            "columns": asdict(self.columns),
            "sharding": asdict(self.sharding) if self.sharding else None,
            "splitting": asdict(self.splitting) if self.splitting else None,
            "shuffle_seed": self.shuffle_seed,
            "allow_mixed_shapes": self.allow_mixed_shapes,
        }
