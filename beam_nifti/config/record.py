"""The options that decide the bytes of a record."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Final

from beam_nifti.config.choices import choose
from beam_nifti.config.columns import LabelColumn
from beam_nifti.config.label_map import parse_label_map, spell_label_map
from beam_nifti.config.preparation import (
    ALIGNMENTS,
    INTERPOLATIONS,
    MASK_INTERPOLATIONS,
    PREPARATIONS,
    RESAMPLINGS,
    SEPARATE_Z,
    ReferenceGrid,
    all_of,
    check_orientation,
    check_resampling,
    check_shape,
    check_spacing,
    check_steps,
    one_or_more,
    spell_nonfinite,
)
from beam_nifti.config.rescaling import RESCALE_METHODS, SELECTIONS
from beam_nifti.config.statistics import ChannelStatistics, CohortStatistics
from beam_nifti.errors import UsageError
from beam_nifti.support.rules import parse_rule, spell_rule
from beam_nifti.support.strict_json import dump_json

FORMAT_VERSION: Final = 2
"""Version of the records, index and dataset_info.json. Source: docs/format.md."""

FORMAT_FEATURES: Final = ("sources", "digests", "members", "positions")
"""Names of the features of this version that a reader must know. dataset_info.json lists them."""

CONTENT_REVISION: Final = 1
"""Increases when the same options give different records than before, beyond rounding. Builds do not add to
datasets of earlier revisions."""

VOXEL_DTYPES: Final = ("float32", "float16", "bfloat16", "uint8", "native")

LATER_OPTIONS: Final = (
    "nonfinite",
    "map_labels",
    "max_frames",
    "align",
    "reference",
    "resize",
    "resize_longest",
    "interpolation",
    "mask_interpolation",
    "antialias",
    "separate_z",
    "rescale_split",
    "rescale_stats",
    "has_target",
    "masks",
)
"""Options that dataset_info.json contains only if they are given, as it did before they existed."""

FRAMES: Final = ("all", "each", "each:N", "first", "mean", "INDEX")
"""N stands for the number of frames of a clip, and INDEX for a number, from 0."""

MASK_DTYPES: Final = ("uint8", "uint16")

COMPLEX_PARTS: Final = ("magnitude", "phase", "real-imag")

COMPRESSIONS: Final = ("gzip", "none")

COMPRESSION_LEVELS: Final = range(4)

MOST_FRAMES: Final = 1 << 16
"""Largest value of `max_frames`: so many positions are looked at for each image."""

_FLAGS: Final = {"channels": "--path-column", "preprocess_sha256": "a file of --preprocess with sha256"}
_UNBOUNDED: Final = ("zscore", "cohort:zscore")


@dataclass(frozen=True)
class RecordConfig:
    """The options that decide the bytes of one record, apart from its row and its image.

    The fields are those of `BuildOptions`, as text, numbers or tuples; a preparation that is None does not
    apply. docs/preparation.md describes the preparations in order. The build sets the others:

    Attributes:
        rescale_stats: statistics of the cohort, which `rescale` refers to; None before they are measured.
        preprocess_sha256: sha256 of the file that defines the function of `preprocess`, or a tuple of them.
        channels: columns of the images that are the channels of a record, in order; None if a record has a
            single image.
        mask_dtype: dtype of the label maps of every record; None if there are no masks.
        masks: columns of the label maps that are the channels of a record's mask, in order; None if it has a
            single one.
        has_target: whether every record has a target, an image of real values to predict; None if not.
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
    max_frames: int | None = None
    clip: bool = False
    rescale_within: str | None = None
    rescale_split: str | None = None
    rescale_stats: CohortStatistics | None = None
    complex: str | None = None
    nonfinite: str | None = None
    preprocess: str | tuple[str, ...] | None = None
    preprocess_sha256: str | tuple[str, ...] | None = None
    orientation: str | None = None
    align: str | None = None
    reference: ReferenceGrid | None = None
    spacing: tuple[float, float, float] | None = None
    resize: tuple[int, int, int] | None = None
    resize_longest: int | None = None
    interpolation: str | None = None
    mask_interpolation: str | None = None
    antialias: bool | None = None
    separate_z: str | None = None
    crop_foreground: str | None = None
    shape: tuple[int, int, int] | None = None
    channels: tuple[str, ...] | None = None
    mask_dtype: str | None = None
    masks: tuple[str, ...] | None = None
    map_labels: str | None = None
    has_target: bool | None = None
    labels: tuple[LabelColumn, ...] | None = None
    format_version: int = FORMAT_VERSION
    format_features: tuple[str, ...] = FORMAT_FEATURES

    def __post_init__(self) -> None:
        """Refuse invalid values; give equal values the same spelling."""
        # Lists come from JSON; 1 and 1.0 are one spacing.
        if isinstance(self.reference, Mapping):
            object.__setattr__(self, "reference", ReferenceGrid(**self.reference))
        if self.spacing is not None:
            object.__setattr__(self, "spacing", tuple(map(float, self.spacing)))
        for name in ("resize", "shape", "channels", "masks"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(values))
        if isinstance(self.rescale_stats, dict):
            object.__setattr__(self, "rescale_stats", CohortStatistics.of(self.rescale_stats))
        object.__setattr__(self, "preprocess", one_or_more(all_of(self.preprocess)))
        object.__setattr__(self, "preprocess_sha256", one_or_more(self.preprocess_sha256))
        if self.mask_dtype is not None:
            choose("--mask-dtype", self.mask_dtype, MASK_DTYPES)
        self._check_label_map()
        self._check_rescaling()
        choose("--voxel-dtype", self.voxel_dtype, VOXEL_DTYPES)
        choose("--compression", self.compression, COMPRESSIONS)
        choose("--compression-level", self.compression_level, COMPRESSION_LEVELS)
        self._check_frames()
        if self.voxel_dtype == "uint8" and not self.is_bounded:
            within = f" --rescale-within {self.rescale_within}" if self.rescale_within else ""
            others = "percentile" if within else "percentile or window"
            method = f" with {others}" if self.method in (*_UNBOUNDED, "none") else ""
            raise UsageError(
                f"--voxel-dtype uint8 holds only [0, 1], and --rescale {self.rescale}{within} gives values "
                f"outside it; use --clip{method}, or --voxel-dtype float16"
            )
        self._check_preparation()

    def _check_label_map(self) -> None:
        if self.map_labels is None:
            return
        object.__setattr__(self, "map_labels", spell_label_map(self.label_map))
        if self.mask_dtype == MASK_DTYPES[0]:
            for old, new in self.label_map.items():
                if new > 255:
                    raise UsageError(
                        f"--map-labels maps {old} to {new}, which {self.mask_dtype} cannot hold; use "
                        f"--mask-dtype {MASK_DTYPES[-1]}"
                    )

    def _check_frames(self) -> None:
        if self.frames is not None and not re.fullmatch(
            r"all|each(:[1-9]\d{0,4})?|first|mean|0|[1-9]\d{0,8}", self.frames, re.A
        ):
            raise UsageError(f"--frames is {self.frames!r}; choose one of: {', '.join(FRAMES)} (from 0)")
        if self.frames == "0":
            object.__setattr__(self, "frames", "first")
        if self.frames == "each:1":
            object.__setattr__(self, "frames", "each")
        if self.max_frames is not None:
            if not self.splits_frames:
                raise UsageError("--max-frames is for --frames each; add that, or drop it")
            if not self.clip_frames <= self.max_frames <= MOST_FRAMES:
                raise UsageError(
                    f"--max-frames is {self.max_frames}; give {self.clip_frames} to {MOST_FRAMES}"
                )
        if self.splits_frames and self.channels is not None:
            raise UsageError(
                "--frames each makes examples of the frames of one image, but --path-column names several "
                "images; use --frames first, mean or a number"
            )
        if self.complex is not None:
            choose("--complex", self.complex, COMPLEX_PARTS)
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
        if method.endswith("percentile") and not (numbers[0] >= 0 and numbers[1] <= 100):
            raise UsageError(f"--rescale is {self.rescale!r}; percentiles must be between 0 and 100")
        object.__setattr__(self, "rescale", spell_rule(method, numbers))
        if self.rescale_within is not None:
            selection = parse_rule("--rescale-within", self.rescale_within, SELECTIONS)
            object.__setattr__(self, "rescale_within", spell_rule(*selection))
            if method in ("window", "none"):
                raise UsageError(
                    f"--rescale-within has no effect on --rescale {self.rescale}, which does not depend on "
                    "the voxels; drop it"
                )
        for name in ("rescale_split", "rescale_stats"):
            if getattr(self, name) is not None and not self.is_of_cohort:
                raise UsageError(
                    f"--{name.replace('_', '-')} has no effect on --rescale {self.rescale}, which does not "
                    "depend on the cohort; drop it, or use --rescale cohort:zscore"
                )
        if self.clip and (method in (*_UNBOUNDED, "none") or not self.has_range):
            raise UsageError(
                f"--clip cannot be used with --rescale {self.rescale}, only with percentile, window, or "
                "minmax with --rescale-within; drop it"
            )

    def _check_preparation(self) -> None:
        if self.nonfinite is not None:
            object.__setattr__(self, "nonfinite", spell_nonfinite(self.nonfinite))
        check_steps(all_of(self.preprocess), all_of(self.preprocess_sha256))
        if self.orientation is not None:
            check_orientation(self.orientation)
        if self.spacing is not None:
            check_spacing(self.spacing)
        if self.resize is not None:
            check_shape("--resize", self.resize)
        if self.shape is not None:
            check_shape("--shape", self.shape)
        check_resampling({name: getattr(self, name) for name in ("align", *PREPARATIONS)})
        if self.crop_foreground is not None:
            selection = parse_rule("--crop-foreground", self.crop_foreground, SELECTIONS)
            object.__setattr__(self, "crop_foreground", spell_rule(*selection))
        if self.voxel_dtype == "native":
            changing = RESAMPLINGS if self.interpolation != "nearest" else ()
            for name in ("preprocess", *changing):
                if getattr(self, name) is not None:
                    nearest = ", or --interpolation nearest" if name in RESAMPLINGS else ""
                    flag = name.replace("_", "-")
                    raise UsageError(
                        f"--{flag} changes the voxels, but --voxel-dtype native stores them as in the file; "
                        f"use --voxel-dtype float32{nearest}"
                    )
        for name, (default, *_) in (
            ("interpolation", INTERPOLATIONS),
            ("mask_interpolation", MASK_INTERPOLATIONS),
            ("antialias", (False, True)),
            ("separate_z", SEPARATE_Z),
            ("align", ALIGNMENTS),
        ):
            if getattr(self, name) == default:  # which has no spelling of its own
                object.__setattr__(self, name, None)

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

    @cached_property
    def method(self) -> str:
        """The method of `rescale`, without its numbers."""
        return parse_rule("--rescale", self.rescale, RESCALE_METHODS)[0]

    @property
    def is_of_cohort(self) -> bool:
        """Whether `rescale` depends on statistics of the cohort, and not of one volume."""
        return self.method.startswith("cohort:")

    @property
    def measured_splits(self) -> tuple[str, ...]:
        """The splits whose volumes are measured."""
        return tuple((self.rescale_split or "train").split(","))

    @property
    def measured_options(self) -> tuple[tuple[str, str], ...]:
        """Names and values of the options that decide which voxels statistics of the cohort are of."""
        names = (
            *("channels", "frames", "max_frames", "complex", "map_labels", "align", *PREPARATIONS),
            *("preprocess_sha256", "rescale_within"),
        )
        given = ((name, getattr(self, name)) for name in names)
        return tuple((name, _spelled(value)) for name, value in given if value is not None)

    @cached_property
    def cohort_ranges(self) -> tuple[tuple[float, float], ...] | None:
        """The intensities of each channel that become 0 and 1; None if those are not of the cohort.

        Raises:
            UsageError: the statistics are not measured yet, or do not have them.
        """
        if not self.is_of_cohort:
            return None
        if self.rescale_stats is None:
            raise UsageError(f"--rescale {self.rescale} requires statistics; give them with --rescale-stats")
        return tuple(map(self._range_of, self.rescale_stats.channels))

    def _range_of(self, channel: ChannelStatistics) -> tuple[float, float]:
        if self.method == "cohort:zscore":
            low, high = channel.mean, channel.mean + channel.std
        else:
            values = dict(channel.percentiles)
            missing = [p for p in self.rescale_numbers if p not in values]
            if missing:
                raise UsageError(
                    f"--rescale-stats has no percentile {missing[0]:g}, which --rescale {self.rescale} "
                    f"requires; measure the cohort again with --rescale {self.rescale}"
                )
            low, high = (values[p] for p in self.rescale_numbers)
        if not (low < high and math.isfinite(high - low)):
            raise UsageError(
                f"--rescale {self.rescale} would map {low:g} to 0 and {high:g} to 1, which is no range; use "
                "another --rescale, or other voxels with --rescale-within"
            )
        return low, high

    def require_own_statistics(self) -> None:
        """Refuse statistics of other voxels than those of this configuration.

        Raises:
            UsageError: they were measured with other options or of other splits, or lack a number.
        """
        if self.rescale_stats is None:
            return
        found, wanted = dict(self.rescale_stats.options), dict(self.measured_options)
        ignored = {"mask_column"}  # older statistics have it; another cohort may name its columns otherwise
        if self.preprocess_sha256 is None:
            ignored.add("preprocess_sha256")  # not known yet
        for name in dict.fromkeys([*wanted, *found]):
            if name in ignored:
                continue
            if found.get(name) != wanted.get(name):
                flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
                was, now = (
                    f"{flag} {each[name]}" if name in each else f"no {flag}" for each in (found, wanted)
                )
                raise UsageError(
                    f"--rescale-stats was measured with {was}, but this build has {now}; measure again with "
                    "the options of the build, or without --rescale-stats"
                )
        if self.rescale_split is not None and set(self.measured_splits) != set(self.rescale_stats.splits):
            raise UsageError(
                f"--rescale-split is {self.rescale_split}, but --rescale-stats was measured of "
                f"{','.join(self.rescale_stats.splits)}; drop one of them"
            )
        if len(self.rescale_stats.channels) != self.num_channels:
            raise UsageError(
                f"--rescale-stats has {len(self.rescale_stats.channels)} channels, but records have "
                f"{self.num_channels}; measure again with the options of the build"
            )
        _ = self.cohort_ranges

    @property
    def rescale_numbers(self) -> tuple[float, ...]:
        """The two percentiles, or the two ends of the window; else none."""
        return parse_rule("--rescale", self.rescale, RESCALE_METHODS)[1]

    @property
    def has_range(self) -> bool:
        """Whether a record must store which intensities became 0 and 1: its range does not show them."""
        return (
            self.method in ("percentile", "window", "zscore")
            or self.is_of_cohort
            or self.rescale_within is not None
        )

    @property
    def rescaled_dtype(self) -> str:
        """The dtype that rescaled voxels are rounded to; for native records, by the reader."""
        return "float32" if self.voxel_dtype == "native" else self.voxel_dtype

    @property
    def is_bounded(self) -> bool:
        """Whether all rescaled voxels are in [0, 1]."""
        return self.clip or (self.method == "minmax" and not self.has_range)

    @property
    def splits_frames(self) -> bool:
        """Whether an image becomes several examples: each frame, or each clip of frames."""
        return (self.frames or "").partition(":")[0] == "each"

    @property
    def clip_frames(self) -> int:
        """Frames of an example if an image becomes several examples."""
        return int((self.frames or "").partition(":")[2] or 1)

    @property
    def label_map(self) -> dict[int, int]:
        """The new label of each label of masks that is mapped to another one."""
        return {} if self.map_labels is None else parse_label_map(self.map_labels)

    @property
    def num_files(self) -> int:
        """Images, masks and targets per record."""
        return self.num_channels + self.num_masks + int(self.has_target or False)

    @property
    def num_channels(self) -> int:
        """Images per record. Each is rescaled on its own."""
        return len(self.channels or (None,))

    @property
    def num_masks(self) -> int:
        """Label maps per record."""
        return 0 if self.mask_dtype is None else len(self.masks or (None,))

    @property
    def mask_axes(self) -> tuple[int, ...]:
        """The axis that a record's mask has besides x, y and z: none, unless there are several label maps."""
        return () if self.masks is None else (self.num_masks,)

    def required_shape(self, shape: tuple[int, ...] | None) -> tuple[int | None, ...] | None:
        """The shape that every volume of a dataset must have; None, or None for an axis, if it may differ.

        `shape` is that of the dataset; None if shapes are mixed.
        """
        if shape is None and self.channels is not None:
            return (None, None, None, self.num_channels)
        if shape is None and self.clip_frames > 1:
            return (None, None, None, self.clip_frames)
        if shape is None and self.frames != "all":
            # Of mixed shapes the reader knows no more than the one channel of 3-D volumes.
            return (None, None, None)
        return shape

    @property
    def steps(self) -> tuple[tuple[str, str | None], ...]:
        """The user's functions in order, each with the sha256 of its file, if known."""
        names, digests = all_of(self.preprocess), all_of(self.preprocess_sha256)
        return tuple(zip(names, digests or [None] * len(names), strict=True))

    @property
    def computes(self) -> bool:
        """Whether a volume's preparation computes new values, and does not only choose among its voxels."""
        resamples = any(getattr(self, name) is not None for name in RESAMPLINGS)
        return self.preprocess is not None or (resamples and self.interpolation != "nearest")

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


def _spelled(value: object) -> str:
    """The value of an option as text."""
    if isinstance(value, tuple):
        return ",".join(map(_spelled, value))
    if isinstance(value, ReferenceGrid):
        return f"{value} with the affine {_spelled(value.affine)}"
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
