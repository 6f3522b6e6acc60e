"""Records as input of a writer, and what the records of a dataset have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from beam_nifti.config import MASK_DTYPES, SPLIT_PATTERN, TENSOR_DTYPES, RecordConfig
from beam_nifti.errors import ShardError, VolumeError
from beam_nifti.manifest.manifest import DEFAULT_SPLIT
from beam_nifti.record.example import (
    MASK_FEATURE,
    SCALING_FEATURES,
    FeatureValue,
    decode_example,
    decode_tensor,
    encode_example,
    encode_tensor,
)
from beam_nifti.record.index import IndexEntry, entry_cells
from beam_nifti.volume.label_map import labels_of

_IMAGE: Final = "image_raw"
_TENSORS: Final = {"image": _IMAGE, "mask": MASK_FEATURE}
_AXES: Final = (3, 4)
_AFFINE_SHAPE: Final = (4, 4)


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a dataset, before it is written.

    Attributes:
        id: unique id in the dataset; equal to the feature `id` of the Example.
        example: serialized tf.train.Example.
        split: split that the record belongs to.
        entry: entry of the index; None to derive it from the Example.
        config: configuration of the steps that made the record; None if other steps made it.
    """

    id: str
    example: bytes
    split: str = DEFAULT_SPLIT
    entry: IndexEntry | None = None
    config: RecordConfig | None = None


@dataclass(frozen=True)
class Traits:
    """Properties that the records of a dataset share, or that are collected over all of them.

    Attributes:
        id: id of one of the records, for messages.
        config: configuration that they were made with.
        features: kind of every feature, by name.
        dtype: dtype of the stored voxels.
        shape: shape of the voxels; None if shapes differ.
        labelled: whether any record has a label.
        mask_labels: labels of all masks.
        columns: further columns of their manifest.
    """

    id: str
    config: RecordConfig
    features: dict[str, str]
    dtype: str
    shape: tuple[int, ...] | None
    labelled: bool
    mask_labels: frozenset[int]
    columns: tuple[str, ...] = ()

    def joined(self, other: Traits) -> Traits:
        """The traits of both together.

        Raises:
            VolumeError: the records cannot be in one dataset.
        """
        optional = dict.fromkeys(SCALING_FEATURES, "bytes")
        for what, ours, theirs in (
            ("options", self.config, other.config),
            ("features", self.features | optional, other.features | optional),
            ("dtype", self.dtype, other.dtype),
        ):
            if ours != theirs:
                raise VolumeError(
                    f"records {self.id!r} and {other.id!r} differ in {what} ({_difference(ours, theirs)}); "
                    "all records of a dataset must have the same: make them equal, or write two datasets"
                )
        return replace(
            self,
            id=min(self.id, other.id),
            features=dict(sorted((self.features | other.features).items())),
            shape=self.shape if self.shape == other.shape else None,
            labelled=self.labelled or other.labelled,
            mask_labels=self.mask_labels | other.mask_labels,
            columns=self.columns
            if self.columns == other.columns
            else tuple(sorted({*self.columns, *other.columns})),
        )


def _difference(ours: Any, theirs: Any) -> str:
    if isinstance(ours, RecordConfig):
        ours, theirs = ({n: getattr(c, n) for n in c.__dataclass_fields__} for c in (ours, theirs))
    if isinstance(ours, Mapping):
        name = next(n for n in sorted({*ours, *theirs}) if ours.get(n) != theirs.get(n))
        return f"{name}: {ours.get(name)}, {theirs.get(name)}"
    return f"{ours}, {theirs}"


def to_record(element: Any) -> Record:
    """Make a record of an element, whose Example then has the id.

    Args:
        element: a Record; or an id with a tf.train.Example, its bytes, or a dictionary of features by name:
            arrays, numbers, texts, bytes. "image" and "mask" are arrays of voxels, in C order (X, Y, Z) or
            (X, Y, Z, C), which become the tensors `image_raw` and `mask_raw`.

    Raises:
        VolumeError: the element is none of these.
    """
    if isinstance(element, Record):
        return element
    if not isinstance(element, tuple) or len(element) != 2 or not isinstance(element[0], str):
        raise VolumeError(
            f"an element is {type(element).__name__}, expected a Record or (id, Example, bytes or dictionary)"
        )
    example_id, content = element
    try:
        if isinstance(content, Mapping):
            features = {"id": example_id.encode()}
            features |= dict(_feature(str(name), value) for name, value in content.items())
            return Record(example_id, encode_example(features))
        if hasattr(content, "SerializeToString"):
            content = content.SerializeToString(deterministic=True)
        if not isinstance(content, bytes):
            raise VolumeError(f"is {type(content).__name__}, expected an Example, bytes or a dictionary")
        found = decode_example(content)
        if "id" not in found:
            content = encode_example({**{n: _kept(v) for n, v in found.items()}, "id": example_id.encode()})
    except (ShardError, VolumeError) as e:
        raise VolumeError(f"record {example_id!r}: {e}") from e
    return Record(example_id, content)


def _kept(value: memoryview | npt.NDArray[Any]) -> FeatureValue:
    return (value,) if isinstance(value, memoryview) else value


def _feature(name: str, value: Any) -> tuple[str, FeatureValue]:
    """The feature of an entry of a dictionary."""
    if name in _TENSORS:
        voxels = np.ascontiguousarray(value)
        if voxels.dtype.name not in TENSOR_DTYPES:
            raise VolumeError(f"{name} is {voxels.dtype}, expected one of {', '.join(TENSOR_DTYPES)}")
        return _TENSORS[name], encode_tensor(voxels.astype(voxels.dtype.newbyteorder("="), copy=False))
    if isinstance(value, str | bytes):
        return name, value.encode() if isinstance(value, str) else value
    numbers = np.asarray(value).ravel()
    if numbers.dtype.kind in "iub" and name != "label":
        return name, numbers.astype(np.int64)
    if numbers.dtype.kind not in "iubf":
        raise VolumeError(f"{name} is {type(value).__name__}, expected numbers, a text or bytes")
    with np.errstate(over="ignore"):
        return name, numbers.astype(np.float32)


def examine(record: Record) -> tuple[Traits, dict[str, object]]:
    """A record's traits, and its row of the index without its position and offset.

    Raises:
        VolumeError: the record is invalid.
    """
    try:
        return _examine(record)
    except (ShardError, VolumeError) as e:
        raise VolumeError(f"record {record.id!r}: {e}") from e


def _examine(record: Record) -> tuple[Traits, dict[str, object]]:
    if not record.id or not SPLIT_PATTERN.fullmatch(record.split):
        raise VolumeError(
            f"its split is {record.split!r}; give every record an id, and a split of letters, digits, '_' "
            "and '.', a letter or digit first"
        )
    features = decode_example(record.example)
    found = features.get("id")
    if not isinstance(found, memoryview) or bytes(found) != record.id.encode():
        raise VolumeError("its Example has a different feature id; make them equal, or drop the feature")
    voxels = _tensor(features, _IMAGE)
    if voxels.ndim not in _AXES or voxels.size == 0:
        raise VolumeError(f"its image has the shape {voxels.shape}, expected (X, Y, Z) or (X, Y, Z, C)")
    kinds = {name: _kind(value) for name, value in features.items()}
    if kinds.get("label", "float") != "float":
        raise VolumeError(
            f"its feature label is {kinds['label']}, expected one float; use another name for other values"
        )
    mask = _tensor(features, MASK_FEATURE) if MASK_FEATURE in features else None
    if mask is not None and (mask.shape != voxels.shape[:3] or mask.dtype.name not in MASK_DTYPES):
        raise VolumeError(
            f"its mask is {mask.dtype.name} of {mask.shape}, expected {' or '.join(MASK_DTYPES)} of "
            f"{voxels.shape[:3]}"
        )
    label = features.get("label")
    number = None if label is None or np.isnan(label[0]) else float(label[0])
    if record.entry is None:
        cells = _cells_of(record.id, features, voxels, number)
    else:
        row = record.entry.row
        named = replace(row, extras=row.extras if row.extra_columns else ())
        entry = replace(record.entry, row=named)
        cells = entry_cells(entry, record.config or RecordConfig(), row.extra_columns)
        cells["example_id"] = record.id
    config = record.config or _config_of(voxels, mask)
    found_labels = None if record.entry is None else record.entry.mask_labels
    labels = frozenset(labels_of(mask) if mask is not None and found_labels is None else found_labels or ())
    if mask is not None:
        cells["mask_labels"] = sorted(labels)
    traits = Traits(
        id=record.id,
        config=config,
        features=kinds,
        dtype=voxels.dtype.name,
        shape=voxels.shape,
        labelled=number is not None,
        mask_labels=labels,
        columns=record.entry.row.extra_columns if record.entry else (),
    )
    return traits, cells


def _tensor(features: Mapping[str, Any], name: str) -> npt.NDArray[Any]:
    if not isinstance(features.get(name), memoryview):
        raise VolumeError(
            f"its Example has no feature {name}, which is required; add a tensor as tf.io.serialize_tensor "
            "writes it"
        )
    return decode_tensor(features[name])


def _kind(value: memoryview | npt.NDArray[Any]) -> str:
    if isinstance(value, memoryview):
        return "bytes"
    name = "int64" if value.dtype.kind == "i" else "float"
    return name if value.size == 1 else f"{name}[{value.size}]"


def _cells_of(
    example_id: str, features: Mapping[str, Any], voxels: npt.NDArray[Any], label: float | None
) -> dict[str, object]:
    """The cells of the index that an Example provides."""
    cells: dict[str, object] = {
        "example_id": example_id,
        "label": label,
        "shape": voxels.shape,
        "dtype": voxels.dtype.name,
    }
    for name, count in (("affine", 16), ("zooms", 3)):
        value = features.get(name)
        if isinstance(value, np.ndarray) and value.size == count:
            cells[name] = value.tolist()
    if "affine" in cells and "zooms" not in cells:
        columns = np.array(cells["affine"], np.float64).reshape(4, 4)[:3, :3]
        cells["zooms"] = np.linalg.norm(columns, axis=0).tolist()
    return cells


def _config_of(voxels: npt.NDArray[Any], mask: npt.NDArray[Any] | None) -> RecordConfig:
    """A configuration with which readers return voxels unchanged, for records that other steps made."""
    is_float = voxels.dtype.name in ("float32", "float16", "bfloat16")
    return RecordConfig(
        rescale="none",
        voxel_dtype=voxels.dtype.name if is_float else "native",
        frames="all" if voxels.ndim == max(_AXES) else None,
        mask_dtype=None if mask is None else mask.dtype.name,
    )
