"""What was written, as data: the content of dataset_info.json. No Beam, no TensorFlow."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from beam_nifti import storage
from beam_nifti.config import FORMAT_FEATURES, FORMAT_VERSION, BuildConfig, LabelColumn, RecordConfig
from beam_nifti.errors import DatasetError, NewerFormatError
from beam_nifti.strict_json import dump_json

FILE_NAME: Final = "dataset_info.json"
FAILURES_FILE: Final = "failures.jsonl"
"""Of a first build, and of every one of format version 1."""

_FAILURES_NAME: Final = re.compile(r"failures(-r\d+)?\.jsonl")
_NEW_KEYS: Final = frozenset(["format_features", "failures"])
"""Keys of dataset_info.json that format version 1 does not have."""

_NEEDS: Final = {
    "s3": "the credentials and S3_ENDPOINT (a URL)",
    "hdfs": "whether libhdfs.so is found, and CLASSPATH",
}
"""By scheme what tensorflow-io goes by."""


def no_dataset(output: str, error: OSError | None = None) -> DatasetError:
    """What to tell where dataset_info.json is missing, or a file was given in the place of its folder.

    Args:
        output: where it was looked for, local or a URL.
        error: of reading it; None where TensorFlow has looked, which says of an S3 or HDFS that it cannot
            reach that the file does not exist.
    """
    if isinstance(error, NotADirectoryError) or output.rpartition("/")[2] == FILE_NAME:
        return DatasetError(
            f"{output} is not a folder; give the folder of the dataset, which holds {FILE_NAME}"
        )
    needs = _NEEDS.get(output.partition("://")[0])
    if error is None and needs:
        return DatasetError(
            f"{output}: TensorFlow finds no {FILE_NAME}: the dataset is missing or incomplete, or the store "
            f"cannot be reached: check the path, {needs}, or use engine='indexed', which tells these apart"
        )
    reason = f"{FILE_NAME} is missing"
    if error is not None and error.strerror not in (None, os.strerror(errno.ENOENT)):
        reason = str(error.strerror)  # such as "No such bucket"
    return DatasetError(
        f"{output}: no complete dataset here ({reason}); check the path, or run "
        "`beam-nifti build`, which continues a build that was interrupted"
    )


def failures_file(revision: int, format_version: int = FORMAT_VERSION) -> str:
    """The name of the list of a revision's failures; each has its own, as no published file is replaced."""
    is_first = revision == 1 or format_version == 1
    return FAILURES_FILE if is_first else f"failures-r{revision}.jsonl"


def is_failures_file(name: str) -> bool:
    """Whether a file is, by its name, a list of failures."""
    return _FAILURES_NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class ShardInfo:
    """One shard file.

    Attributes:
        name: file name, relative to the dataset.
        index: path of its index, relative to the dataset.
        num_examples: records in it.
        num_bytes: of the file.
        sha256: of the file, in hex.
        index_sha256: of its index, in hex.
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


@dataclass(frozen=True)
class DatasetInfo:
    """A complete dataset.

    Attributes:
        config: what decided its content (`BuildConfig.as_dataset_config`).
        manifest: path, digest, num_rows and columns of the manifest; num_frames where each frame of its
            images became a record.
        shape: (X, Y, Z) or (X, Y, Z, T) of every volume; None where shapes are mixed.
        dtype: of the stored voxels, such as "float32".
        labelled: whether the manifest had labels; without, every `label` is NaN.
        labels: columns whose values have features of their own; none where there is only `label`.
        features: name to kind of every feature of a record.
        splits: by name.
        mask_labels: those that the masks have, ascending; None where there are no masks.
        num_failures: volumes left out.
        failures: name of the file that lists them; None where there are none.
        revision: 1 for a first build, counting up with every rebuild in the same place.
        versions: of the software that wrote it.
        format_version: of the format.
        format_features: what the dataset has and a reader must know, by name; none in version 1.
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
    revision: int = 1
    versions: Mapping[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    format_features: tuple[str, ...] = FORMAT_FEATURES

    @property
    def num_frames(self) -> int | None:
        """Frames of an image, where each became a record; else None."""
        return self.manifest.get("num_frames")

    @property
    def num_examples(self) -> int:
        """Records in all splits."""
        return sum(s.num_examples for s in self.splits.values())

    @property
    def num_skipped(self) -> int:
        """Rows of the manifest that were left out, as they lack a label."""
        return int(self.manifest.get("num_skipped", 0))

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(s.num_bytes for s in self.splits.values())

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """The shards of all splits."""
        return tuple(shard for split in self.splits.values() for shard in split.shards)

    def loading_call(self, path: str, **further: object) -> str:
        """A call of `reader.load_dataset` that this dataset can be read with.

        Args:
            path: of the dataset.
            further: arguments besides those that the dataset needs.
        """
        filled = [name for name, split in self.splits.items() if split.num_examples]
        split = "train" if "train" in filled else next(iter([*filled, *self.splits]))
        needed: dict[str, object] = {}
        if self.mask_labels is not None:
            needed["target"] = "mask"
        elif self.labels and self.labels[0].kind == "string":
            needed["label"] = self.labels[0].name
        if self.shape is None and "batch_size" in further:
            needed["pad"] = True
        words = [repr(path), repr(split), *(f"{k}={v!r}" for k, v in (further | needed).items())]
        return f"load_dataset({', '.join(words)})"

    @property
    def record_config(self) -> RecordConfig:
        """The part of `config` that decided the records' bytes.

        Raises:
            UsageError: it is not one that this version knows.
        """
        known = {f.name for f in fields(RecordConfig)}
        given = {k: v for k, v in self.config.items() if k in known}
        return RecordConfig(**given, labels=self.labels or None, format_version=self.format_version)

    def split(self, name: str) -> SplitInfo:
        """A split by name.

        Raises:
            DatasetError: there is none of that name.
        """
        if name not in self.splits:
            raise DatasetError(f"no split {name!r}; the dataset has {', '.join(self.splits)}")
        return self.splits[name]

    def label_facts(self) -> dict[str, dict[str, Any]]:
        """The kind of each of `labels`, and its classes if it has some, by name."""
        return {
            column.name: {
                "kind": column.kind,
                **({} if column.classes is None else {"classes": column.classes}),
            }
            for column in self.labels
        }

    def to_json(self) -> str:
        """The content of dataset_info.json."""
        facts = asdict(self)
        facts["splits"] = {
            name: {
                "num_examples": split.num_examples,
                "num_bytes": split.num_bytes,
                "shards": [asdict(s) for s in split.shards],
            }
            for name, split in self.splits.items()
        }
        del facts["labels"]
        if self.labels:
            facts["labels"] = self.label_facts()
        if self.mask_labels is None:
            del facts["mask_labels"]
        first = {name: facts.pop(name) for name in ("format_version", "format_features")}
        if self.format_version == 1:
            del first["format_features"], facts["failures"]
        return dump_json({**first, **facts}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, path: str) -> DatasetInfo:
        """Parse dataset_info.json.

        Args:
            text: its content.
            path: where it was read from, for errors.

        Raises:
            DatasetError: it is damaged, or of a later format, or has a key that its version does not know.
        """
        try:
            facts = json.loads(text)
            _require_known(facts, path)
            facts["splits"] = {
                name: SplitInfo(tuple(ShardInfo(**s) for s in split["shards"]))
                for name, split in facts["splits"].items()
            }
            mask_labels = facts.get("mask_labels")
            facts["mask_labels"] = None if mask_labels is None else tuple(mask_labels)
            facts["shape"] = None if facts["shape"] is None else tuple(facts["shape"])
            facts["labels"] = tuple(
                LabelColumn(name, said["kind"], tuple(said["classes"]) if "classes" in said else None)
                for name, said in facts.get("labels", {}).items()
            )
            facts["format_features"] = tuple(facts.get("format_features", ()))
            if facts["format_version"] == 1 and facts.get("num_failures"):
                facts["failures"] = FAILURES_FILE
            return cls(**facts)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise DatasetError(f"{path}: not a dataset's info: {e!r}; rebuild the dataset") from e


def _require_known(facts: Mapping[str, Any], path: str) -> None:
    """Refuse what a later version has written, and keys that no version has."""
    version, features = facts["format_version"], facts.get("format_features", [])
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{path}: format version {version}; this beam_nifti reads up to {FORMAT_VERSION}: "
            "install a newer one"
        )
    for feature in features:
        if feature not in FORMAT_FEATURES:
            raise NewerFormatError(
                f"{path}: the dataset has the format feature {feature!r}, which this beam_nifti does not "
                "know; install a newer one"
            )
    unknown = facts.keys() - {f.name for f in fields(DatasetInfo)}
    if version == 1:
        unknown |= facts.keys() & _NEW_KEYS
    else:
        # What is unknown here may decide what the records hold, and would be taken for its default.
        unknown |= facts["config"].keys() - {*BuildConfig("", "").as_dataset_config(), "fingerprint"}
    if unknown:
        raise DatasetError(
            f"{path}: has a key {min(unknown)!r}, which format version {version} does not have; correct or "
            "remove it, or copy the file again"
        )
    name = facts.get("failures")
    if name is not None and not is_failures_file(name):
        raise DatasetError(f"{path}: failures is {name!r}, which names no list of failures; copy it again")


def read_info(output: str) -> DatasetInfo:
    """What the dataset_info.json of a complete dataset says.

    Args:
        output: the dataset's folder, local or a URL.

    Raises:
        DatasetError: there is none, or it is damaged, or `output` is a file.
        OSError: it cannot be reached.
    """
    path = storage.join(output, FILE_NAME)
    try:
        return DatasetInfo.from_json(storage.read(path), path)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise no_dataset(output, e) from e
