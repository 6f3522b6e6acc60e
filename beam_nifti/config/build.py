"""The options of a build."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any, Final

from beam_nifti.config.columns import LATER_COLUMNS, Columns
from beam_nifti.config.record import LATER_OPTIONS, MASK_DTYPES, RecordConfig
from beam_nifti.errors import UsageError
from beam_nifti.support.strict_json import dump_json

SPLIT_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]{0,127}")
"""Pattern of a split's name. Names of files begin with it, and file systems limit them to 255 characters."""

FOLD_PATTERN: Final = re.compile(r"fold(0|[1-9][0-9]?)")
"""Pattern of a fold's name."""

FOLD_PARTS: Final = ("train", "validation")
"""What readers make of folds: all but one, and that one."""

MOST_FOLDS: Final = 100

_SHARES_TOLERANCE: Final = 1e-5
"""Shares such as three times 0.333333 count as a sum of 1."""


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


def fold_shares(count: int, others: Mapping[str, float]) -> dict[str, float]:
    """The shares of folds of equal size, which are called fold0, fold1 and so on, and of other splits.

    Args:
        count: number of folds.
        others: shares of splits that belong to no fold, such as "test".

    Raises:
        UsageError: there are too few or too many folds, or another split has a name that readers use for
            folds.
    """
    if not 2 <= count <= MOST_FOLDS:
        raise UsageError(f"--split is kfold:{count}; the number of folds must be from 2 to {MOST_FOLDS}")
    for name in others:
        if name in FOLD_PARTS or FOLD_PATTERN.fullmatch(name):
            raise UsageError(
                f"--split names {name!r} besides kfold:{count}, but readers use that name for folds; use "
                "another name, such as test"
            )
    rest = 1 - math.fsum(others.values())
    if not rest > 0:
        raise UsageError(f"--split leaves the folds a share of {rest:g}; it must be above 0")
    return {**{f"fold{number}": rest / count for number in range(count)}, **others}


def _with_columns(record: RecordConfig, columns: Columns) -> RecordConfig:
    """Complete the configuration of records with what the columns of files decide."""
    if columns.mask is None:
        for flag, value in (
            ("--mask-dtype", record.mask_dtype),
            ("--mask-interpolation", record.mask_interpolation),
            ("--map-labels", record.map_labels),
            ("--rescale-within mask", record.rescale_within == "mask"),
            ("--crop-foreground mask", record.crop_foreground == "mask"),
        ):
            if value:
                raise UsageError(f"{flag} requires --mask-column, which names the column of the masks")
        mask_dtype = None
    else:
        mask_dtype = record.mask_dtype or MASK_DTYPES[0]
        within = {"--rescale-within": record.rescale_within, "--crop-foreground": record.crop_foreground}
        for flag, rule in within.items():
            if record.is_of_cohort and flag == "--rescale-within":
                continue  # other volumes have labelled voxels
            if rule == "mask" and columns.missing_mask == "empty":
                raise UsageError(
                    f"--missing-mask empty makes masks without a label, for which {flag} mask fails; use "
                    f"--missing-mask skip, or another {flag}"
                )
    if record.align is not None and len(columns.files) == 1:
        raise UsageError(
            "--align has no effect on a single image; name several columns with --path-column, give "
            "--mask-column or --target-column, or drop --align"
        )
    channels = columns.paths if len(columns.paths) > 1 else None
    masks = columns.masks if len(columns.masks) > 1 else None
    has_target = True if columns.target is not None else None
    record = replace(record, channels=channels, mask_dtype=mask_dtype, masks=masks, has_target=has_target)
    record.require_own_statistics()
    return record


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
            raise UsageError(f"--max-bad-fraction is {self.max_bad_fraction}; it must be between 0 and 1")
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
        for name in LATER_OPTIONS:
            if content[name] is None:
                del content[name]
        for name in LATER_COLUMNS:
            if content["columns"][name] is None:
                del content["columns"][name]
        as_json: dict[str, Any] = json.loads(dump_json(content))  # which has no tuples
        return as_json
