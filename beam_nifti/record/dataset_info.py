"""The description of a dataset: the content of dataset_info.json. Without Beam and TensorFlow."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Final

from beam_nifti.config import (
    FOLD_PARTS,
    FORMAT_FEATURES,
    FORMAT_VERSION,
    LABEL_KINDS,
    LATER_COLUMNS,
    LATER_OPTIONS,
    SPLIT_PATTERN,
    BuildConfig,
    Columns,
    LabelColumn,
    RecordConfig,
    Sharding,
    Splitting,
)
from beam_nifti.errors import DatasetError, NewerFormatError, UsageError
from beam_nifti.record.dataset_files import FAILURES_FILE, FILE_NAME, read_content, revision_of_failures
from beam_nifti.record.example import TENSOR_DTYPES
from beam_nifti.record.sharding import ShardName, count_shards
from beam_nifti.record.withdrawals import Withdrawal, check_withdrawals, withdrawals_of
from beam_nifti.storage import paths as storage
from beam_nifti.support.json_types import hints_of, require_keys, require_type
from beam_nifti.support.strict_json import dump_json, load_json
from beam_nifti.support.wording import size_text

LAST_REVISION: Final = 10**9 - 1

LEAST_RECORD_BYTES: Final = 16
"""Bytes of an empty record in its shard: only its frame."""

_SHA256: Final = re.compile("[0-9a-f]{64}")
_FINGERPRINT: Final = re.compile("[0-9a-f]{16}")
_FOLD: Final = re.compile(r"fold\d+", re.A)
_FEATURE_KIND: Final = re.compile(r"(float|int64|bytes)(\[[1-9][0-9]{0,4}\])?")
_MOST_ROWS: Final = 1 << 31
_MOST_NAMES: Final = 1 << 16  # columns of a manifest, and features of a record

_OPTIONAL_FEATURES: Final = ("sources", "members", "positions")
"""Features that a dataset of this version may lack."""

_WITHDRAWN: Final = ("withdrawn", "withdrawals")
"""Fields that only a dataset has from which participants were withdrawn."""

_NOT_IN_VERSION_1: Final = ("format_features", "failures", "failures_sha256", "digest", *_WITHDRAWN)
_SINCE_THE_FIRST: Final = (
    "rescale",
    "voxel_dtype",
    "compression",
    "compression_level",
    "columns",
    "sharding",
)
"""Keys of `config` in every dataset of format version 1. Without a later key, that option was not given."""

_MANIFEST_KINDS: Final[Mapping[str, Any]] = {
    "path": str,
    "num_rows": int,
    "digest": str,
    "columns": tuple[str, ...],
    "num_frames": int,
    "num_skipped": int,
    "key_check": str,
}
_MANIFEST_REQUIRED: Final = ("path", "num_rows", "digest", "columns")


@dataclass(frozen=True)
class ShardInfo:
    """One shard file.

    Attributes:
        name: file name, relative to the dataset.
        index: path of its index, relative to the dataset.
        num_examples: records in the shard.
        num_bytes: size of the file.
        sha256: sha256 of the file, in hex.
        index_sha256: sha256 of its index, in hex.
    """

    name: str
    index: str
    num_examples: int
    num_bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """One split: its shards in order."""

    shards: tuple[ShardInfo, ...]

    @property
    def num_examples(self) -> int:
        """Records in the split."""
        return sum(s.num_examples for s in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of the split's shards."""
        return sum(s.num_bytes for s in self.shards)


@dataclass(frozen=True, repr=False)
class DatasetInfo:
    """A complete dataset.

    Attributes:
        config: options that decided its content (`BuildConfig.as_dataset_config`).
        manifest: path, digest, num_rows and columns of the manifest; num_frames if each frame of its images
            became a record.
        shape: (X, Y, Z) or (X, Y, Z, T) of every volume; None if shapes are mixed.
        dtype: dtype of the stored voxels, such as "float32".
        labelled: whether the manifest had labels. If not, every `label` is NaN.
        labels: columns whose values have features of their own; empty if there is only `label`.
        features: kind of every feature of a record, by name.
        splits: the splits, by name.
        mask_labels: labels of all masks, ascending; None if there are no masks.
        num_failures: volumes that failed.
        failures: name of the file that lists the failed volumes; None if there are none.
        failures_sha256: sha256 of that file, in hex; None in version 1.
        revision: 1 for a first build, plus 1 each time a build into the same folder changed the dataset.
        versions: versions of the software that wrote it.
        format_version: version of the format.
        format_features: features of the format that a reader must know, by name; empty in version 1.
        withdrawn: hashes of the participants that were withdrawn, as of `hash_person`.
        withdrawals: what was removed with them, by revision.
    """

    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    shape: tuple[int, ...] | None
    dtype: str
    labelled: bool
    features: Mapping[str, str]
    splits: Mapping[str, SplitInfo]
    labels: tuple[LabelColumn, ...] = ()
    mask_labels: tuple[int, ...] | None = None
    num_failures: int = 0
    failures: str | None = None
    failures_sha256: str | None = None
    revision: int = 1
    versions: Mapping[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    format_features: tuple[str, ...] = FORMAT_FEATURES
    withdrawn: tuple[str, ...] = ()
    withdrawals: tuple[Withdrawal, ...] = ()

    def __repr__(self) -> str:
        """One line."""
        splits = ", ".join(f"{name} {split.num_examples:,}" for name, split in self.splits.items())
        shape = "mixed shapes" if self.shape is None else size_text(self.shape)
        return f"<DatasetInfo: {splits or 'not built'}; {shape} {self.dtype}, revision {self.revision}>"

    @property
    def num_frames(self) -> int | None:
        """Frames of an image if each became a record; otherwise None."""
        return self.manifest.get("num_frames")

    @property
    def has_manifest(self) -> bool:
        """Whether a build made it. If `WriteToTFRecord` did, the index may have empty cells."""
        return bool(self.manifest["path"])

    @property
    def folds(self) -> tuple[str, ...]:
        """The names of the folds for cross-validation, from fold0 without a gap; empty if there are none."""
        named = {name for name in self.splits if _FOLD.fullmatch(name)}
        folds = tuple(f"fold{number}" for number in range(len(named)))
        return folds if len(folds) > 1 and named == {*folds} else ()

    @property
    def num_examples(self) -> int:
        """Records in all splits."""
        return sum(s.num_examples for s in self.splits.values())

    @property
    def num_skipped(self) -> int:
        """Rows of the manifest that were skipped because they lack a label or a mask."""
        return int(self.manifest.get("num_skipped", 0))

    @property
    def columns(self) -> Columns:
        """The roles of the manifest's columns."""
        return Columns(**self.config["columns"])

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(s.num_bytes for s in self.splits.values())

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """The shards of all splits."""
        return tuple(shard for split in self.splits.values() for shard in split.shards)

    @property
    def splitting(self) -> Splitting | None:
        """How the splits were drawn; None if the manifest assigns them."""
        drawn = self.config.get("splitting")
        return Splitting(**drawn) if drawn else None

    @property
    def first_split(self) -> str:
        """The split to show in an example: "train", or else the first one that is not empty."""
        filled = [name for name, split in self.splits.items() if split.num_examples]
        return "train" if "train" in filled else next(iter([*filled, *self.splits]))

    def loading_call(self, path: str, **further: object) -> str:
        """A call of `reader.load_dataset` that reads this dataset.

        Args:
            path: path of the dataset.
            further: arguments besides those that the dataset requires.
        """
        split, needed = self.first_split, dict[str, object]()
        if split in self.folds:
            split, needed["fold"] = "train", 0
        if self.record_config.has_target:
            needed["target"] = "target"
        elif self.mask_labels is not None:
            needed["target"] = "mask"
        elif self.labels and self.labels[0].kind == "string":
            needed["label"] = self.labels[0].name
        if self.shape is None and "batch_size" in further:
            needed["pad"] = True
        words = [repr(path), repr(split), *(f"{k}={v!r}" for k, v in (further | needed).items())]
        return f"load_dataset({', '.join(words)})"

    @cached_property
    def record_config(self) -> RecordConfig:
        """The part of `config` that decided the records' bytes.

        Raises:
            UsageError: this version cannot read it.
        """
        known = {f.name for f in fields(RecordConfig)}
        given = {k: v for k, v in self.config.items() if k in known}
        return RecordConfig(
            **given,
            labels=self.labels or None,
            format_version=self.format_version,
            format_features=self.format_features,
        )

    def split(self, name: str) -> SplitInfo:
        """A split by name.

        Raises:
            DatasetError: there is no split of that name.
        """
        if name not in self.splits:
            hint = "; give the number of a fold, such as fold=0" if self.folds and name in FOLD_PARTS else ""
            raise DatasetError(f"no split {name!r}; the dataset has {', '.join(self.splits)}{hint}")
        return self.splits[name]

    def label_facts(self) -> dict[str, dict[str, Any]]:
        """The kind of each of `labels`, and its classes if it has any, by name."""
        return {
            column.name: {
                "kind": column.kind,
                **({} if column.classes is None else {"classes": column.classes}),
            }
            for column in self.labels
        }

    def to_json(self) -> str:
        """The content of dataset_info.json."""
        facts = {f.name: getattr(self, f.name) for f in fields(self)}
        facts["splits"] = {
            name: {
                "num_examples": split.num_examples,
                "num_bytes": split.num_bytes,
                "shards": list(map(vars, split.shards)),
            }
            for name, split in self.splits.items()
        }
        del facts["labels"]
        if self.labels:
            facts["labels"] = self.label_facts()
        if self.mask_labels is None:
            del facts["mask_labels"]
        facts["withdrawals"] = list(map(asdict, self.withdrawals))
        facts = {name: fact for name, fact in facts.items() if fact or name not in _WITHDRAWN}
        first = {name: facts.pop(name) for name in ("format_version", "format_features")}
        facts = {**first, **facts}
        if self.format_version == 1:
            facts = {name: fact for name, fact in facts.items() if name not in _NOT_IN_VERSION_1}
        else:
            facts["digest"] = content_digest(facts)
        return dump_json(facts, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, path: str, *, is_complete: bool = True) -> DatasetInfo:
        """Parse a dataset_info.json that anybody may have written. It is checked before it is used.

        Args:
            text: content of the file.
            path: path of the file, for errors.
            is_complete: whether the dataset is complete; False if it is still to be built.

        Raises:
            DatasetError: it is damaged, was changed, has a later format or a key that its version does not
                have, or names files that no build writes.
        """
        try:
            facts = load_json(text, is_modest=True)
            _require_known(facts, path)
            info = cls(**_parse(facts))
            _check(info, is_complete)
        except (ValueError, UsageError) as e:
            raise DatasetError(
                f"{path}: not a dataset's info: {e}; copy the dataset again, or rebuild the dataset"
            ) from e
        return info


def content_digest(facts: Mapping[str, Any]) -> str:
    """The `digest` of dataset_info.json: the sha256, in hex, of its other values in canonical form."""
    said = {name: fact for name, fact in facts.items() if name != "digest"}
    return hashlib.sha256(dump_json(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _require_known(facts: Any, path: str) -> None:
    """Refuse a file that a later version wrote."""
    require_type(facts, dict, "it")
    version, features = facts.get("format_version"), facts.get("format_features", [])
    require_type(version, int, "format_version")
    require_type(features, tuple[str, ...], "format_features")
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{path}: format version {version}; this beam_nifti reads up to {FORMAT_VERSION}: "
            "install a newer one"
        )
    if version < 1:
        raise ValueError(f"format_version is {version}, expected 1 to {FORMAT_VERSION}")
    for feature in features:
        if feature not in FORMAT_FEATURES:
            raise NewerFormatError(
                f"{path}: the dataset has the format feature {feature!r}, which this beam_nifti does not "
                "know; install a newer one"
            )
    required = set(FORMAT_FEATURES) - set(_OPTIONAL_FEATURES)
    if version > 1 and not (required <= set(features) and len(set(features)) == len(features)):
        raise ValueError(f"format_features is {features}, expected {list(FORMAT_FEATURES)}")


def _parse(facts: dict[str, Any]) -> dict[str, Any]:
    """The fields of a DatasetInfo, their types checked."""
    is_first = facts["format_version"] == 1
    kinds = {**hints_of(DatasetInfo), "labels": dict, "splits": dict, "digest": str}
    required = [f.name for f in fields(DatasetInfo) if f.name not in ("labels", "mask_labels", *_WITHDRAWN)]
    if is_first:
        kinds = {name: kind for name, kind in kinds.items() if name not in _NOT_IN_VERSION_1}
        required = list(
            kinds.keys() - {"labels", "mask_labels", "num_failures", "revision", "versions", "digest"}
        )
    # The values of these two are checked below.
    require_keys(facts, {**kinds, "config": dict, "manifest": dict}, required, "")
    if not is_first:
        said, found = facts.pop("digest", None), content_digest(facts)
        if said != found:
            raise ValueError(
                f"was changed after it was written: digest is {said!r}, but its content has {found!r}"
            )
    config_kinds = _config_kinds()
    require_keys(facts["config"], config_kinds, _SINCE_THE_FIRST, "config")
    roles = hints_of(Columns)
    require_keys(facts["config"]["columns"], roles, roles.keys() - LATER_COLUMNS, "config.columns")
    require_keys(facts["manifest"], _MANIFEST_KINDS, _MANIFEST_REQUIRED, "manifest")
    mask_labels = facts.get("mask_labels")
    parsed = facts | {
        "splits": {name: _split_of(name, said, facts) for name, said in facts["splits"].items()},
        "labels": tuple(_label_of(name, said) for name, said in facts.get("labels", {}).items()),
        "shape": None if facts["shape"] is None else tuple(facts["shape"]),
        "mask_labels": None if mask_labels is None else tuple(mask_labels),
        "format_features": tuple(facts.get("format_features", ())),
        "withdrawn": tuple(facts.get("withdrawn", ())),
        "withdrawals": withdrawals_of(facts.get("withdrawals", ())),
    }
    if is_first and facts.get("num_failures"):
        parsed["failures"] = FAILURES_FILE
    return parsed


def _config_kinds() -> dict[str, Any]:
    """The type of each key of `config`."""
    known = {**hints_of(RecordConfig), **hints_of(BuildConfig)}
    names = (*BuildConfig("", "").as_dataset_config(), *LATER_OPTIONS)
    return {name: known[name] for name in names} | {"fingerprint": str}


def _split_of(name: str, said: Any, facts: Mapping[str, Any]) -> SplitInfo:
    at = f"splits.{name}"
    if not SPLIT_PATTERN.fullmatch(name):
        raise ValueError(f"splits has the name {name!r}, which no split can have")
    keys = {"num_examples": int, "num_bytes": int, "shards": tuple[ShardInfo, ...]}
    require_keys(said, keys, keys, at)
    split = SplitInfo(tuple(ShardInfo(**shard) for shard in said["shards"]))
    compression, of_dataset = facts["config"]["compression"], facts.get("revision", 1)
    for number, shard in enumerate(split.shards):
        parsed = ShardName.parse(shard.name)
        revision, compressed = (parsed.revision, parsed.compressed) if parsed else (0, True)
        expected = ShardName(name, number, len(split.shards), compressed, revision)
        if (shard.name, shard.index) != (str(expected), expected.index_file):
            raise ValueError(
                f"shard {number} of split {name} is {shard.name} with {shard.index}, "
                f"expected {expected} with {expected.index_file}"
            )
        if compressed != (compression == "gzip") or revision > of_dataset:
            raise ValueError(
                f"names {shard.name}, but is revision {of_dataset} with compression {compression}"
            )
        for key in ("sha256", "index_sha256"):
            if not _SHA256.fullmatch(getattr(shard, key)):
                raise ValueError(f"{key} of {shard.name} is {getattr(shard, key)!r}, expected 64 hex digits")
        if not 0 <= shard.num_examples * LEAST_RECORD_BYTES <= shard.num_bytes < 1 << 63:
            raise ValueError(f"{shard.name} has {shard.num_examples} examples in {shard.num_bytes} bytes")
    for count in ("num_examples", "num_bytes"):
        if said[count] != getattr(split, count):
            raise ValueError(
                f"{count} of split {name} is {said[count]}, but its shards have {getattr(split, count)}"
            )
    return split


def _label_of(name: str, said: Any) -> LabelColumn:
    at = f"labels.{name}"
    require_keys(said, {"kind": str, "classes": tuple[str, ...]}, ["kind"], at)
    if said["kind"] not in LABEL_KINDS or (said["kind"] == "class") != ("classes" in said):
        raise ValueError(
            f"{at} is {said}, expected a kind, one of {', '.join(LABEL_KINDS)}, and classes of a class"
        )
    column = LabelColumn(name, said["kind"], tuple(said["classes"]) if "classes" in said else None)
    if column.classes is not None and len(column.numbers) < len(column.classes):
        raise ValueError(f"{at}.classes has a class twice")
    return column


def _check(info: DatasetInfo, is_complete: bool) -> None:
    """Refuse values that no build writes and that would confuse readers.

    Raises:
        ValueError, UsageError: there is such a value.
    """
    config = info.config
    columns = Columns(**config["columns"])
    record = info.record_config
    if config["sharding"] is not None:
        Sharding(**config["sharding"])
    if drawn := config.get("splitting"):
        Splitting(**drawn)
    named = columns.label if columns.has_label_features else ""
    if ",".join(map(str, info.labels)) != named:
        raise ValueError(
            f"labels are {', '.join(map(str, info.labels)) or 'none'}, but the columns are {named!r}"
        )
    if not _FINGERPRINT.fullmatch(fingerprint := config.get("fingerprint", "")):
        raise ValueError(f"config.fingerprint is {fingerprint!r}, expected 16 hex digits")
    if info.dtype not in TENSOR_DTYPES:
        raise ValueError(f"dtype is {info.dtype!r}, expected one of {', '.join(TENSOR_DTYPES)}")
    if record.voxel_dtype not in ("native", info.dtype):
        raise ValueError(f"dtype is {info.dtype!r}, but config.voxel_dtype {record.voxel_dtype!r}")
    if info.shape is not None and not (
        len(info.shape) in (3, 4) and min(info.shape) > 0 and math.prod(info.shape) < 1 << 31
    ):
        raise ValueError(f"shape is {list(info.shape)}, expected the numbers of voxels of a volume")
    if info.shape is not None and record.channels is not None and info.shape[3:] != (record.num_channels,):
        raise ValueError(f"shape is {list(info.shape)}, but there are {record.num_channels} channels")
    for feature, kind in info.features.items():
        if not _FEATURE_KIND.fullmatch(kind):
            raise ValueError(f"features.{feature} is {kind!r}, expected float, int64 or bytes, or float[N]")
    if info.mask_labels is not None and (record.mask_dtype is None or "mask_raw" not in info.features):
        raise ValueError("mask_labels are given, but the records have no masks")
    if record.masks is not None and record.mask_dtype is None:
        raise ValueError(f"config.masks is {list(record.masks)}, but the records have no masks")
    if record.map_labels is not None and record.mask_dtype is None:
        raise ValueError(f"config.map_labels is {record.map_labels!r}, but the records have no masks")
    if record.has_target and not ("target_raw" in info.features and columns.target is not None):
        raise ValueError("config.has_target is true, but the records have no targets")
    if "image_raw" not in info.features:
        raise ValueError("features has no image_raw")
    num_frames = info.manifest.get("num_frames")
    is_count = num_frames is None or 0 < num_frames < 1 << 31
    if (num_frames is not None) != record.splits_frames or not is_count:
        raise ValueError(f"manifest.num_frames is {num_frames}, but config.frames is {record.frames!r}")
    if record.max_frames is not None and record.max_frames // record.clip_frames != num_frames:
        raise ValueError(f"manifest.num_frames is {num_frames}, but config.max_frames is {record.max_frames}")
    if not 1 <= info.revision <= LAST_REVISION:
        raise ValueError(f"revision is {info.revision}, expected 1 to {LAST_REVISION}")
    check_withdrawals(info.withdrawn, info.withdrawals, info.revision)
    _check_counts(info)
    _check_names(info)
    if info.failures is not None:
        revision = revision_of_failures(info.failures)
        if revision is None or revision > info.revision:
            raise ValueError(f"failures is {info.failures!r}, which names no list of failures")
    has_digest = info.failures_sha256 is not None
    if has_digest != (info.failures is not None and info.format_version > 1):
        raise ValueError(f"failures is {info.failures!r}, but failures_sha256 is {info.failures_sha256!r}")
    record.require_own_statistics()
    if is_complete:
        if record.is_of_cohort and record.rescale_stats is None:
            raise ValueError(f"config.rescale is {record.rescale!r}, but there is no config.rescale_stats")
        if not info.shards or config["sharding"] is None:
            raise ValueError("names no shards, or config.sharding is null")
        _check_sharding(info, Sharding(**config["sharding"]))


def _check_sharding(info: DatasetInfo, sharding: Sharding) -> None:
    """Refuse splits that are not cut as `config` states, whichever of them has the failures."""
    for name, split in info.splits.items():
        frames = info.num_frames or 1
        most_rows = split.num_examples + info.num_failures
        if info.record_config.max_frames is None:  # else an image may have a single frame
            most_rows //= frames
        rows = -(-split.num_examples // frames), most_rows
        least, most = (count_shards(count, sharding, frames) for count in rows)
        if not least <= len(split.shards) <= most:
            expected = str(least) if least == most else f"{least} to {most}"
            raise ValueError(
                f"split {name} has {len(split.shards)} shards, expected {expected} for its "
                f"{split.num_examples} examples by config.sharding"
            )


def _check_counts(info: DatasetInfo) -> None:
    """Refuse numbers that no dataset can have and that would overflow."""
    num_rows = info.manifest["num_rows"]
    for name, count, most in (
        ("manifest.num_rows", num_rows, _MOST_ROWS),
        ("manifest.num_skipped", info.num_skipped, num_rows),
        ("num_failures", info.num_failures, num_rows * (info.num_frames or 1)),
        ("num_bytes of all splits", info.num_bytes, (1 << 63) - 1),
        *(("mask_labels", label, (1 << 16) - 1) for label in info.mask_labels or ()),
    ):
        if not 0 <= count <= most:
            raise ValueError(f"{name} is {count}, expected 0 to {most}")


def _check_names(info: DatasetInfo) -> None:
    """Refuse columns and features without a name, and channels that are not the columns of the files."""
    columns, roles = info.config["columns"], Columns(**info.config["columns"])
    for what, names in {
        "config.columns": [name for name in columns.values() if name is not None],
        "manifest.columns": info.manifest["columns"],
        "features": info.features,
        "labels": [label.name for label in info.labels],
    }.items():
        if "" in names:
            raise ValueError(f"{what} has an empty name")
        if len(names) > _MOST_NAMES:
            raise ValueError(f"{what} has {len(names):,} names, expected at most {_MOST_NAMES:,}")
    for name, role, found in (("channels", "path", roles.paths), ("masks", "mask", roles.masks)):
        if (stated := getattr(info.record_config, name)) is not None and stated != found:
            raise ValueError(
                f"config.{name} is {list(stated)}, but config.columns.{role} is {columns[role]!r}"
            )


def read_info(output: str) -> DatasetInfo:
    """Read the dataset_info.json of a complete dataset.

    Raises:
        DatasetError: as `read_content`, or it is damaged.
        OSError: as `read_content`.
    """
    return DatasetInfo.from_json(read_content(output), storage.join(output, FILE_NAME))
