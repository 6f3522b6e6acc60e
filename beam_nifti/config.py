"""What a build is asked to do, as checked values. No I/O."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
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
PREPARATIONS: Final = ("preprocess", "orientation", "spacing", "crop_foreground", "shape")
"""Fields of RecordConfig that say how a volume is prepared, in the order in which it is done."""

ORIENTATIONS: Final = frozenset(
    "".join(letters)
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for letters in itertools.product(*axes)
)
"""Codes of the 48 orientations: to where each of the three indices grows, as nibabel writes them."""

_FUNCTION: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


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
        preprocess: the user's function, `package.module:function`, from Volume to Volume.
        preprocess_sha256: of the file that defines it; set by the build.
        orientation: code, such as "RAS", that the axes are turned to.
        spacing: voxel size along each axis, in mm, that volumes are resampled to.
        crop_foreground: which voxels' bounding box to crop to: "nonzero", or "above:T", with T in the
            image's units.
        shape: (X, Y, Z) that volumes are cropped and padded to.

    A preparation that is None is left out. docs/preparation.md has what they do, in their order.
    """

    rescale: str = "minmax"
    voxel_dtype: str = "float32"
    compression: str = "gzip"
    compression_level: int = 2
    frames: str | None = None
    preprocess: str | None = None
    preprocess_sha256: str | None = None
    orientation: str | None = None
    spacing: tuple[float, float, float] | None = None
    crop_foreground: str | None = None
    shape: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        """Refuse values that no record can have."""
        # Lists come from JSON; 1 and 1.0 are one spacing.
        if self.spacing is not None:
            object.__setattr__(self, "spacing", tuple(map(float, self.spacing)))
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(self.shape))
        _choose("--rescale", self.rescale, RESCALE_METHODS)
        _choose("--voxel-dtype", self.voxel_dtype, VOXEL_DTYPES)
        _choose("--compression", self.compression, COMPRESSIONS)
        _choose("--compression-level", self.compression_level, COMPRESSION_LEVELS)
        if self.frames is not None:
            _choose("--frames", self.frames, FRAMES)
        _check_preparation(self)

    @property
    def prepares(self) -> bool:
        """Whether anything is done to a volume between loading and rescaling."""
        return any(getattr(self, name) is not None for name in PREPARATIONS)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that differ wherever the same image would give other bytes."""
        # Without what is None, it is as it was before there was that choice.
        given = {name: value for name, value in asdict(self).items() if value is not None}
        facts = {"format": FORMAT_VERSION, **given}
        if self.compression == "none":
            del facts["compression_level"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _check_preparation(record: RecordConfig) -> None:
    if record.preprocess is not None and not _FUNCTION.fullmatch(record.preprocess):
        raise UsageError(f"--preprocess is {record.preprocess!r}; write it as package.module:function")
    if record.orientation is not None and record.orientation not in ORIENTATIONS:
        raise UsageError(
            f"--orientation is {record.orientation!r}; write native, or three letters, one of each pair "
            "R/L, A/P and S/I, such as RAS or LPS"
        )
    spacing, shape = record.spacing, record.shape
    if spacing is not None and not (len(spacing) == 3 and all(0 < n < math.inf for n in spacing)):
        raise UsageError(f"--spacing is {_joined(spacing)}; give three sizes in mm, such as 1,1,1")
    if shape is not None and not (len(shape) == 3 and all(n >= 1 for n in shape)):
        raise UsageError(f"--shape is {_joined(shape)}; give three numbers of voxels, such as 160,192,160")
    if record.crop_foreground is not None:
        foreground_threshold(record.crop_foreground)
    if record.voxel_dtype == "native":
        for name in ("preprocess", "spacing"):
            if getattr(record, name) is not None:
                raise UsageError(
                    f"--{name} makes other voxels than the file's, which --voxel-dtype native stores; "
                    "use --voxel-dtype float32"
                )


def _joined(numbers: tuple[float, ...]) -> str:
    return ",".join(f"{n:g}" for n in numbers)


def foreground_threshold(rule: str) -> float | None:
    """The T of `above:T`, in the image's units; None for `nonzero`.

    Raises:
        UsageError: the rule is neither.
    """
    if rule == "nonzero":
        return None
    name, _, text = rule.partition(":")
    try:
        threshold = float(text)
    except ValueError:
        threshold = math.nan
    if name != "above" or not math.isfinite(threshold):
        raise UsageError(f"--crop-foreground is {rule!r}; write nonzero, or above:T with a number T")
    return threshold


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
class BuildConfig:
    """Everything `beam-nifti build` was asked to do.

    Attributes:
        manifest: path or URL of the table of images.
        output: folder or URL prefix of the dataset.
        record: what decides a record's bytes.
        columns: which manifest columns mean what.
        sharding: how shards are cut; None derives it from the first image's header.
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
        content = {
            **asdict(self.record),
            "columns": asdict(self.columns),
            "sharding": asdict(self.sharding) if self.sharding else None,
            "shuffle_seed": self.shuffle_seed,
            "allow_mixed_shapes": self.allow_mixed_shapes,
        }
        as_json: dict[str, Any] = json.loads(json.dumps(content))  # which has no tuples
        return as_json
