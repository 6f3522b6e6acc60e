"""The configuration of a build, as checked values. No I/O."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, Final

from beam_nifti.errors import UsageError
from beam_nifti.support.calls import format_call, parse_call, split_call
from beam_nifti.support.rules import parse_rule, spell_rule
from beam_nifti.support.strict_json import dump_json

FORMAT_VERSION: Final = 2
"""Version of the records, index and dataset_info.json. Source: docs/format.md."""

FORMAT_FEATURES: Final = ("sources", "digests", "members", "positions")
"""Names of the features of this version that a reader must know. dataset_info.json lists them."""

CONTENT_REVISION: Final = 1
"""Increases when the same options give different records than before, beyond rounding. Builds do not add to
datasets of earlier revisions."""

RESCALE_METHODS: Final = ("minmax", "percentile:LO,HI", "window:LO,HI", "zscore", "none")
SELECTIONS: Final = ("nonzero", "above:T", "mask")
"""Which voxels: those that are not 0, those above T in the image's units, or those that the mask labels."""

VOXEL_DTYPES: Final = ("float32", "float16", "bfloat16", "uint8", "native")

FRAMES: Final = ("all", "each", "first", "mean", "INDEX")
"""INDEX stands for a number, from 0."""

MASK_DTYPES: Final = ("uint8", "uint16")
COMPLEX_PARTS: Final = ("magnitude", "phase", "real-imag")
COMPRESSIONS: Final = ("gzip", "none")
COMPRESSION_LEVELS: Final = range(4)
LABEL_KINDS: Final = ("float", "class", "string")
MISSING_LABELS: Final = ("nan", "skip")
SPLIT_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]{0,127}")
"""Pattern of a split's name. Names of files begin with it, and file systems limit them to 255 characters."""

PREPARATIONS: Final = ("preprocess", "orientation", "spacing", "crop_foreground", "shape")
"""Fields of RecordConfig for the preparation of a volume, in the order in which they apply."""

ORIENTATIONS: Final = frozenset(
    "".join(letters)
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for letters in itertools.product(*axes)
)
"""Codes of the 48 orientations: the direction in which each of the three indices increases, as in nibabel."""

_SHARES_TOLERANCE: Final = 1e-5
"""Shares such as three times 0.333333 count as a sum of 1."""

_LEAST_SPACING: Final = 1e-6
"""A nanometre, in mm. Quotients of smaller sizes overflow."""

_SHOWN_LENGTH: Final = 60
"""Characters of a text to show in an error. The text may come from a dataset."""


def _choose(name: str, value: object, allowed: tuple[str, ...] | range) -> None:
    if value not in allowed:
        choices = ", ".join(str(a) for a in allowed)
        raise UsageError(f"{name} is {value!r}; choose one of: {choices}")


@dataclass(frozen=True)
class _Range:
    """Two numbers of a method of `rescale`, which is named as the class is, in lower case."""

    low: float
    high: float

    def __str__(self) -> str:
        return spell_rule(type(self).__name__.lower(), (float(self.low), float(self.high)))


class Percentile(_Range):
    """Two percentiles of a volume's intensities, for `rescale`. str() gives the command line's value.

    >>> str(Percentile(0.5, 99))
    'percentile:0.5,99'

    Attributes:
        low: percentile that becomes 0, from 0 to 100.
        high: percentile that becomes 1, above `low`.
    """


class Window(_Range):
    """Two intensities in the image's units (CT: HU), for `rescale`. str() gives the command line's value.

    >>> str(Window(-160, 240))
    'window:-160,240'

    Attributes:
        low: intensity that becomes 0.
        high: intensity that becomes 1, above `low`.
    """


@dataclass(frozen=True)
class LabelColumn:
    """A column of the manifest whose values are labels.

    Attributes:
        name: name of the column.
        kind: "float", a number; "class", one of several values, stored as its number; "string"; None to
            derive the kind from the values.
        classes: all values by number, for the kind "class"; None before the manifest was read.
    """

    name: str
    kind: str | None = None
    classes: tuple[str, ...] | None = None

    @classmethod
    def parse(cls, text: str) -> LabelColumn:
        """From NAME or NAME:KIND.

        Raises:
            UsageError: the kind is unknown, or the name is empty.
        """
        name, colon, kind = text.partition(":")
        if not name:
            raise UsageError("--label-column names an empty column; was a variable not set?")
        if colon and kind not in LABEL_KINDS:
            raise UsageError(
                f"--label-column gives {name} the kind {kind!r}; choose one of: {', '.join(LABEL_KINDS)}"
            )
        return cls(name, kind if colon else None)

    def __str__(self) -> str:
        return f"{self.name}:{self.kind}" if self.kind else self.name

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """The number of each class."""
        return {name: number for number, name in enumerate(self.classes or ())}


@dataclass(frozen=True)
class RecordConfig:
    """The options that decide the bytes of one record, apart from its row and its image.

    The fields are those of `BuildOptions`, as text, numbers or tuples; a preparation that is None does not
    apply. docs/preparation.md describes the preparations in order. The build sets the others:

    Attributes:
        preprocess_sha256: sha256 of the file that defines the function of `preprocess`, or a tuple of them.
        channels: columns of the images that are the channels of a record, in order; None if a record has a
            single image.
        mask_dtype: dtype of the label map of every record; None if there are no masks.
        labels: columns whose values have features of their own, with kinds and classes; None if there is
            only the feature `label`.
        format_version: format version of the dataset: rows are added to a dataset in the format that it
            already has.
    """

    rescale: str = "minmax"
    voxel_dtype: str = "float32"
    compression: str = "gzip"
    compression_level: int = 2
    frames: str | None = None
    clip: bool = False
    rescale_within: str | None = None
    complex: str | None = None
    preprocess: str | tuple[str, ...] | None = None
    preprocess_sha256: str | tuple[str, ...] | None = None
    orientation: str | None = None
    spacing: tuple[float, float, float] | None = None
    crop_foreground: str | None = None
    shape: tuple[int, int, int] | None = None
    channels: tuple[str, ...] | None = None
    mask_dtype: str | None = None
    labels: tuple[LabelColumn, ...] | None = None
    format_version: int = FORMAT_VERSION
    format_features: tuple[str, ...] = FORMAT_FEATURES

    def __post_init__(self) -> None:
        """Refuse invalid values; give equal values the same spelling."""
        # Lists come from JSON; 1 and 1.0 are one spacing.
        if self.spacing is not None:
            object.__setattr__(self, "spacing", tuple(map(float, self.spacing)))
        for name in ("shape", "channels"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(values))
        object.__setattr__(self, "preprocess", _one_or_more(_all_of(self.preprocess)))
        object.__setattr__(self, "preprocess_sha256", _one_or_more(self.preprocess_sha256))
        if self.mask_dtype is not None:
            _choose("--mask-dtype", self.mask_dtype, MASK_DTYPES)
        self._check_rescaling()
        _choose("--voxel-dtype", self.voxel_dtype, VOXEL_DTYPES)
        _choose("--compression", self.compression, COMPRESSIONS)
        _choose("--compression-level", self.compression_level, COMPRESSION_LEVELS)
        self._check_frames()
        if self.voxel_dtype == "uint8" and not self.is_bounded:
            within = f" --rescale-within {self.rescale_within}" if self.rescale_within else ""
            others = "percentile" if within else "percentile or window"
            method = f" with {others}" if self.method in ("zscore", "none") else ""
            raise UsageError(
                f"--voxel-dtype uint8 holds only [0, 1], and --rescale {self.rescale}{within} gives values "
                f"outside it; use --clip{method}, or --voxel-dtype float16"
            )
        _check_preparation(self)

    def _check_frames(self) -> None:
        if self.frames is not None and not re.fullmatch(
            r"all|each|first|mean|0|[1-9]\d{0,8}", self.frames, re.A
        ):
            raise UsageError(f"--frames is {self.frames!r}; choose one of: {', '.join(FRAMES)} (from 0)")
        if self.frames == "0":
            object.__setattr__(self, "frames", "first")
        if self.frames == "each" and self.channels is not None:
            raise UsageError(
                "--frames each makes examples of the frames of one image, but --path-column names several "
                "images; use --frames first, mean or a number"
            )
        if self.complex is not None:
            _choose("--complex", self.complex, COMPLEX_PARTS)
        computed = "--frames mean" if self.frames == "mean" else self.complex and f"--complex {self.complex}"
        if computed and self.voxel_dtype == "native":
            raise UsageError(
                f"--voxel-dtype native stores voxels as in the file, but {computed} computes new ones; use "
                "--voxel-dtype float32"
            )
        if (self.frames, self.complex) == ("mean", "phase"):
            raise UsageError(
                "--complex phase gives angles, which --frames mean cannot average; choose one frame"
            )

    def _check_rescaling(self) -> None:
        method, numbers = parse_rule("--rescale", self.rescale, RESCALE_METHODS)
        if numbers and not numbers[0] < numbers[1]:
            raise UsageError(f"--rescale is {self.rescale!r}; LO must be below HI")
        if method == "percentile" and not (numbers[0] >= 0 and numbers[1] <= 100):
            raise UsageError(f"--rescale is {self.rescale!r}; percentiles are between 0 and 100")
        object.__setattr__(self, "rescale", spell_rule(method, numbers))
        if self.rescale_within is not None:
            selection = parse_rule("--rescale-within", self.rescale_within, SELECTIONS)
            object.__setattr__(self, "rescale_within", spell_rule(*selection))
            if method in ("window", "none"):
                raise UsageError(
                    f"--rescale-within has no effect on --rescale {self.rescale}, which does not depend on "
                    "the voxels; drop it"
                )
        if self.clip and (method in ("zscore", "none") or not self.has_range):
            raise UsageError(
                f"--clip cannot be used with --rescale {self.rescale}, only with percentile, window, or "
                "minmax with --rescale-within; drop it"
            )

    @property
    def has_sources(self) -> bool:
        """Whether the index has the facts of each file of an example, and not only their sum and mean."""
        return self.format_version > 1 and "sources" in self.format_features

    @property
    def has_members(self) -> bool:
        """Whether records are cut so that a patch can be read, and the index has the lengths."""
        return self.format_version > 1 and "members" in self.format_features

    @property
    def has_positions(self) -> bool:
        """Whether records have masks, and the index has the positions of some voxels of each label."""
        is_known = self.format_version > 1 and "positions" in self.format_features
        return self.mask_dtype is not None and is_known

    @property
    def method(self) -> str:
        """The method of `rescale`, without its numbers."""
        return self.rescale.partition(":")[0]

    @property
    def rescale_numbers(self) -> tuple[float, ...]:
        """The two percentiles, or the two ends of the window; else none."""
        return parse_rule("--rescale", self.rescale, RESCALE_METHODS)[1]

    @property
    def has_range(self) -> bool:
        """Whether a record must store which intensities became 0 and 1: its range does not show them."""
        return self.method in ("percentile", "window", "zscore") or self.rescale_within is not None

    @property
    def rescaled_dtype(self) -> str:
        """The dtype that rescaled voxels are rounded to; for native records, by the reader."""
        return "float32" if self.voxel_dtype == "native" else self.voxel_dtype

    @property
    def is_bounded(self) -> bool:
        """Whether all rescaled voxels are in [0, 1]."""
        return self.clip or (self.method == "minmax" and not self.has_range)

    @property
    def num_channels(self) -> int:
        """Images per record. Each is rescaled on its own."""
        return len(self.channels or (None,))

    @property
    def steps(self) -> tuple[tuple[str, str | None], ...]:
        """The user's functions in order, each with the sha256 of its file, if known."""
        names, digests = _all_of(self.preprocess), _all_of(self.preprocess_sha256)
        return tuple(zip(names, digests or [None] * len(names), strict=True))

    @property
    def prepares(self) -> bool:
        """Whether a volume is changed between loading and rescaling."""
        return any(getattr(self, name) is not None for name in PREPARATIONS)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that differ if the same image would give different bytes."""
        return self._fingerprint_at(CONTENT_REVISION)

    @property
    def earlier_fingerprints(self) -> tuple[str, ...]:
        """The `fingerprint` at each earlier content revision."""
        return tuple(map(self._fingerprint_at, range(1, CONTENT_REVISION)))

    def _fingerprint_at(self, content_revision: int) -> str:
        # Options that are None are omitted, so a new option does not change the fingerprint of old datasets.
        facts = {name: value for name, value in asdict(self).items() if value is not None}
        del facts["format_features"]
        if facts.pop("format_version") == 1:
            facts["format"] = 1
        if content_revision > 1:
            facts["content"] = content_revision
        if self.compression == "none":
            del facts["compression_level"]
        if not self.clip:
            del facts["clip"]
        return hashlib.sha256(dump_json(facts, sort_keys=True).encode()).hexdigest()[:16]


def _check_preparation(record: RecordConfig) -> None:
    for step in _all_of(record.preprocess):  # which is not parsed, as it may come from a dataset
        with _naming_step(step):
            split_call(step)
    num_steps, num_digests = len(_all_of(record.preprocess)), len(_all_of(record.preprocess_sha256))
    if num_digests not in (0, num_steps):
        raise UsageError(f"--preprocess has {num_steps} functions, but {num_digests} digests of their files")
    if record.orientation is not None and record.orientation not in ORIENTATIONS:
        raise UsageError(
            f"--orientation is {record.orientation!r}; write native, or three letters, one of each pair "
            "R/L, A/P and S/I, such as RAS or LPS"
        )
    spacing, shape = record.spacing, record.shape
    if spacing is not None and not (
        len(spacing) == 3 and all(_LEAST_SPACING <= n < math.inf for n in spacing)
    ):
        raise UsageError(
            f"--spacing is {_joined(spacing)}; give three sizes in mm, from {_LEAST_SPACING:g}, such as 1,1,1"
        )
    if shape is not None and not (len(shape) == 3 and all(n >= 1 for n in shape)):
        raise UsageError(f"--shape is {_joined(shape)}; give three numbers of voxels, such as 160,192,160")
    if record.crop_foreground is not None:
        selection = parse_rule("--crop-foreground", record.crop_foreground, SELECTIONS)
        object.__setattr__(record, "crop_foreground", spell_rule(*selection))
    if record.voxel_dtype == "native":
        for name in ("preprocess", "spacing"):
            if getattr(record, name) is not None:
                raise UsageError(
                    f"--{name} changes the voxels, but --voxel-dtype native stores them as in the file; "
                    "use --voxel-dtype float32"
                )


@contextlib.contextmanager
def _naming_step(step: str) -> Iterator[None]:
    """Refuse, as an option, what is no call."""
    try:
        yield
    except ValueError as e:
        shown = step if len(step) <= _SHOWN_LENGTH else f"{step[:_SHOWN_LENGTH]}…"
        raise UsageError(
            f"--preprocess is {shown!r}; write it as package.module:function, or with literals as "
            "arguments, such as package.module:function(threshold=3)"
        ) from e


def spell_steps(given: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    """Give the functions of `RecordConfig.preprocess` their canonical spelling.

    Raises:
        UsageError: an entry does not name a function, or has arguments that are not literals.
    """
    steps = list[str]()
    for step in _all_of(given):
        with _naming_step(step):
            steps.append(format_call(*parse_call(step)))
    return _one_or_more(steps)


def _all_of(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


def _one_or_more(given: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    found = _all_of(given)
    return found[0] if len(found) == 1 else found or None


def _joined(numbers: tuple[float, ...]) -> str:
    return ",".join(f"{n:g}" for n in numbers)


@dataclass(frozen=True)
class Columns:
    """The roles of the manifest's columns.

    Attributes:
        path: column of image paths, relative to the manifest's folder, absolute, or URLs. Several columns,
            separated by commas, are the channels of an example.
        label: NAME or NAME:KIND of a column of finite numbers or texts, or several separated by commas, such
            as "age:float,sex"; None uses the column `label` if there is one.
        id: column of example ids; None means `participant_id` (with `session_id`), otherwise the path.
        mask: column of paths of label maps; None if there are no masks.
        missing_label: how to handle a row without a label: "nan" stores NaN, the class -1, or an empty
            string; "skip" skips the row; None refuses it.
    """

    path: str = "path"
    label: str | None = None
    id: str | None = None
    mask: str | None = None
    missing_label: str | None = None

    def __post_init__(self) -> None:
        """Refuse empty names, unknown kinds, and a column with two roles."""
        files = self.files
        if "" in files:
            raise UsageError(
                f"--path-column is {self.path!r}; give the name of each column, such as T1w,FLAIR"
            )
        for name in {name for name in files if files.count(name) > 1}:
            raise UsageError(f"column {name!r} is named twice by --path-column and --mask-column; drop one")
        labels = [column.name for column in self.labels]
        for name in labels:
            if labels.count(name) > 1:
                raise UsageError(f"--label-column names {name!r} twice; drop one")
        if self.missing_label is not None:
            _choose("--missing-label", self.missing_label, MISSING_LABELS)

    @property
    def paths(self) -> tuple[str, ...]:
        """The columns of the images."""
        return tuple(self.path.split(","))

    @property
    def files(self) -> tuple[str, ...]:
        """The columns of all files of an example: its images and its mask."""
        return self.paths if self.mask is None else (*self.paths, self.mask)

    @property
    def labels(self) -> tuple[LabelColumn, ...]:
        """The columns of labels; empty if no label was requested."""
        return tuple(map(LabelColumn.parse, self.label.split(","))) if self.label is not None else ()

    @property
    def has_label_features(self) -> bool:
        """Whether each label has a feature of its own, besides `label`."""
        return len(self.labels) > 1 or any(column.kind for column in self.labels)


@dataclass(frozen=True)
class Sharding:
    """How the rows of a split are divided into shards. Exactly one of the two is set.

    Attributes:
        examples_per_shard: rows per shard (the last shard may hold fewer).
        num_shards: shards per split. Their sizes differ by at most one row.
    """

    examples_per_shard: int | None = None
    num_shards: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers below 1, and both or neither."""
        if (self.examples_per_shard is None) == (self.num_shards is None):
            raise UsageError("give one of --examples-per-shard and --num-shards, not both")
        for flag, value in vars(self).items():
            if value is not None and value < 1:
                raise UsageError(f"--{flag.replace('_', '-')} is {value}; it must be at least 1")


@dataclass(frozen=True)
class Splitting:
    """How participants are assigned to splits if the manifest does not assign them.

    Attributes:
        shares: fraction of the participants by name of the split. The order has no effect.
        seed: a different seed gives a different draw.
        stratify: column whose values each keep the shares; None draws every participant independently.
    """

    shares: Mapping[str, float]
    seed: int = 0
    stratify: str | None = None

    def __post_init__(self) -> None:
        """Refuse invalid names of splits, and shares that do not sum to 1."""
        for name, share in self.shares.items():
            if not SPLIT_PATTERN.fullmatch(name):
                raise UsageError(
                    f"--split names {name!r}; use up to 128 letters, digits, '_' and '.', a letter or digit "
                    "first"
                )
            if not share > 0:
                raise UsageError(f"--split gives {name} a share of {share}; it must be above 0")
        total = math.fsum(self.shares.values())
        if not abs(total - 1) <= _SHARES_TOLERANCE:
            raise UsageError(f"--split has shares that sum to {total:g}; they must sum to 1")


def _with_columns(record: RecordConfig, columns: Columns) -> RecordConfig:
    """Complete the configuration of records with what the columns of images and masks decide."""
    if columns.mask is None:
        for flag, value in (
            ("--mask-dtype", record.mask_dtype),
            ("--rescale-within mask", record.rescale_within == "mask"),
            ("--crop-foreground mask", record.crop_foreground == "mask"),
        ):
            if value:
                raise UsageError(f"{flag} requires --mask-column, which names the column of the masks")
        mask_dtype = None
    else:
        mask_dtype = record.mask_dtype or MASK_DTYPES[0]
    channels = columns.paths if len(columns.paths) > 1 else None
    return replace(record, channels=channels, mask_dtype=mask_dtype)


@dataclass(frozen=True)
class BuildConfig:
    """All options of `beam-nifti build`.

    Attributes:
        manifest: path or URL of the table of images.
        output: folder or URL prefix of the dataset.
        record: options that decide a record's bytes.
        columns: the roles of the manifest's columns.
        sharding: how rows are divided into shards; None derives it from the first image's header.
        splitting: how participants are assigned to splits; None uses the manifest.
        workers: threads of the local runner; on a cluster, the minimum parallelism to divide the work for;
            None for what the engine has.
        rows: Parquet file from which workers read the rows if `manifest` is the name of a table in memory;
            "" before it is written; None if `manifest` is a file.

    The other fields are those of `BuildOptions`.
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
    recheck: bool = False
    temp_location: str | None = None
    workers: int | None = None
    anonymous_ids: str | None = None
    rows: str | None = None

    def __post_init__(self) -> None:
        """Refuse fractions outside [0, 1] and worker counts below 1; complete the record's configuration."""
        if not (math.isfinite(self.max_bad_fraction) and 0 <= self.max_bad_fraction <= 1):
            raise UsageError(
                f"--max-bad-fraction is {self.max_bad_fraction}; it is a fraction between 0 and 1"
            )
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"--workers is {self.workers}; it must be at least 1")
        if self.overwrite and self.recheck:
            raise UsageError("--overwrite already rebuilds every record; drop --recheck")
        object.__setattr__(self, "record", _with_columns(self.record, self.columns))

    @property
    def makes_all(self) -> bool:
        """Whether every record is built from its image, and none is kept from a published dataset."""
        return self.overwrite or self.recheck

    def allows_failures(self, num_failed: int, num_volumes: int) -> bool:
        """Whether a dataset counts as complete without this many of its volumes.

        The calculation uses the decimal that was given, because 0.29 * 100 is less than 29 in floats.
        """
        return num_failed <= Fraction(str(self.max_bad_fraction)) * num_volumes

    def as_dataset_config(self) -> dict[str, Any]:
        """The options that decide a dataset's content, as dataset_info.json stores them."""
        content = {
            **asdict(self.record),
            "columns": asdict(self.columns),
            "sharding": asdict(self.sharding) if self.sharding else None,
            "splitting": asdict(self.splitting) if self.splitting else None,
            "shuffle_seed": self.shuffle_seed,
            "allow_mixed_shapes": self.allow_mixed_shapes,
        }
        for name in ("labels", "format_version", "format_features"):  # which have fields of their own
            del content[name]
        as_json: dict[str, Any] = json.loads(dump_json(content))  # which has no tuples
        return as_json
