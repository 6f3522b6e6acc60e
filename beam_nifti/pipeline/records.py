"""Records as input of a writer, and what the records of a dataset have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from beam_nifti.config import MASK_DTYPES, SPLIT_PATTERN, RecordConfig
from beam_nifti.errors import ShardError, VolumeError
from beam_nifti.manifest.manifest import DEFAULT_SPLIT
from beam_nifti.record.example import (
    MASK_FEATURE,
    RANGE_FEATURES,
    SCALING_FEATURES,
    TARGET_FEATURE,
    TENSOR_DTYPES,
    ExamplePieces,
    FeatureValue,
    decode_example,
    decode_tensor,
    encode_example,
    encode_tensor,
    require_readable,
    scaling_of,
)
from beam_nifti.record.index import IndexEntry, entry_cells, scaling_cells, target_cells
from beam_nifti.volume.grid import is_usable
from beam_nifti.volume.header import COLOURS
from beam_nifti.volume.label_map import labels_of, positions_of
from beam_nifti.volume.rescale import NO_SCALING, measure
from beam_nifti.volume.target import TARGET_DTYPE

_IMAGE: Final = "image_raw"
_TENSORS: Final = {"image": _IMAGE, "mask": MASK_FEATURE, "target": TARGET_FEATURE}
_TENSOR_DTYPES: Final = {"mask": MASK_DTYPES, "target": (TARGET_DTYPE,)}
_SPACE_AXES: Final = 3
_AXES: Final = (3, 4)

_PLACE: Final = {"affine": 16, "zooms": 3}
"""Features that give the position of voxels, and how many numbers each has."""

_SIZES_TOLERANCE: Final = 1e-3  # relative; programs round voxel sizes
_DOUBLES: Final = (*SCALING_FEATURES, *RANGE_FEATURES)
"""Features from which the units of voxels are computed."""

_DOUBLE_BYTES: Final = 8
_FLOATS: Final = {"label", "intensity_min", "intensity_max", *_PLACE}
_INT64: Final = np.iinfo(np.int64)


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a dataset, before it is written.

    Attributes:
        id: unique id in the dataset; equal to the feature `id` of the Example.
        example: serialized tf.train.Example; in pieces only inside a build.
        split: split that the record belongs to.
        entry: entry of the index; None to derive it from the Example.
        config: configuration of the steps that made the record; None if other steps made it.
    """

    id: str
    example: bytes | ExamplePieces
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
        columns: extra columns of their manifest.
        num_axes: number of axes of the voxels, if other steps made the records; None if `config` determines
            it.
    """

    id: str
    config: RecordConfig
    features: dict[str, str]
    dtype: str
    shape: tuple[int, ...] | None
    labelled: bool
    mask_labels: frozenset[int]
    columns: tuple[str, ...] = ()
    num_axes: int | None = None

    def joined(self, other: Traits) -> Traits:
        """The traits of both together.

        Raises:
            VolumeError: the records cannot be in one dataset.
        """
        optional = dict.fromkeys(SCALING_FEATURES, "bytes")
        options = ("options", self.config, other.config)
        are_given = self.num_axes is None or other.num_axes is None
        for what, ours, theirs in (
            *([options] if are_given else []),
            ("dtype", self.dtype, other.dtype),
            ("number of axes", self.num_axes, other.num_axes),
            ("features", self.features | optional, other.features | optional),
            options,
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
            (X, Y, Z, C), which become the tensors `image_raw` and `mask_raw`. So is "target", as float32, if
            it has several axes.

    Raises:
        VolumeError: the element is none of these.
    """
    if isinstance(element, Record):
        return element
    if not isinstance(element, tuple) or len(element) != 2:
        kind = f"a tuple of {len(element)}" if isinstance(element, tuple) else type(element).__name__
        raise VolumeError(
            f"an element is {kind}, expected a Record, or a tuple of 2: an id, and an Example, bytes or a "
            "dictionary"
        )
    example_id, content = element
    if not isinstance(example_id, str):
        raise VolumeError(
            f"an element has the id {example_id!r:.80}, which is {type(example_id).__name__}; make it a str"
        )
    try:
        if isinstance(content, Mapping):
            return Record(example_id, encode_example(_features(example_id, content)))
        if hasattr(content, "SerializeToString"):
            content = content.SerializeToString(deterministic=True)
        if not isinstance(content, bytes):
            raise VolumeError(f"is {type(content).__name__}, expected an Example, bytes or a dictionary")
        found = decode_example(content)
        if "id" not in found:
            content = encode_example({**{n: _kept(v) for n, v in found.items()}, "id": example_id.encode()})
    except (ShardError, UnicodeEncodeError, VolumeError) as e:
        raise VolumeError(f"record {example_id!r}: {e}") from e
    return Record(example_id, content)


def _kept(value: memoryview | npt.NDArray[Any]) -> FeatureValue:
    return (value,) if isinstance(value, memoryview) else value


def _features(example_id: str, content: Mapping[Any, Any]) -> dict[str, FeatureValue]:
    """The features of a dictionary."""
    features: dict[str, FeatureValue] = {}
    for key, value in content.items():
        is_tensor = key in _TENSORS and (key != "target" or np.ndim(value) > 1)
        name = _TENSORS[key] if is_tensor else str(key)
        if name in features:
            raise VolumeError(f"the feature {name} is given twice; drop one")
        if name in _DOUBLES:
            raise VolumeError(f"the name {name} is reserved for how voxels were scaled; choose another name")
        if isinstance(value, np.ma.MaskedArray):
            raise VolumeError(f"{key} is a masked array; fill it, such as with {key}.filled(0)")
        try:
            features[name] = _tensor_of(key, value) if is_tensor else _feature(name, value)
        except ValueError as e:  # a list of lists of several lengths, a text that is no Unicode
            raise VolumeError(f"{key} cannot be stored: {e}") from e
    return {"id": example_id.encode(), **features}


def _tensor_of(name: str, value: Any) -> FeatureValue:
    voxels = np.ascontiguousarray(value)
    expected = _TENSOR_DTYPES.get(name, TENSOR_DTYPES)
    if voxels.dtype.name not in expected:
        raise VolumeError(
            f"{name} is {voxels.dtype}, expected one of {', '.join(expected)}; convert it with astype"
        )
    return encode_tensor(voxels.astype(voxels.dtype.newbyteorder("="), copy=False))


def _feature(name: str, value: Any) -> FeatureValue:
    if isinstance(value, str | bytes):
        return value.encode() if isinstance(value, str) else value
    numbers = np.asarray(value)
    if numbers.ndim > 1 and name not in _PLACE:
        raise VolumeError(
            f"{name} has the shape {numbers.shape}, but a feature is a list of numbers; give {name}.ravel(), "
            "and the shape as another feature"
        )
    numbers = numbers.ravel()
    if isinstance(value, int | list | tuple) and numbers.dtype.kind in "fO":
        # numpy makes floats, or objects, of integers that no integer dtype holds together.
        items = np.asarray(value, object).ravel().tolist()
        for item in items if all(isinstance(item, int | np.integer) for item in items) else ():
            _require_int64(name, item)
    if numbers.dtype.kind in "iub" and name not in _FLOATS:
        if numbers.dtype == np.uint64 and numbers.size:
            _require_int64(name, numbers.max())
        return numbers.astype(np.int64)
    if numbers.dtype.kind not in "iubf":
        raise VolumeError(f"{name} is {type(value).__name__}, expected numbers, a text or bytes")
    with np.errstate(over="ignore"):
        stored = numbers.astype(np.float32)
    lost = numbers[np.isfinite(numbers) & np.isinf(stored)]
    if lost.size:
        raise VolumeError(f"{name} holds {lost[0]:g}, which is beyond the range of float32; rescale it")
    return stored


def _require_int64(name: str, number: int) -> None:
    if not _INT64.min <= number <= _INT64.max:
        raise VolumeError(
            f"{name} holds {number}, but integers are stored as int64, from -2**63 to 2**63 - 1; store it as "
            "a float or a text"
        )


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
    if not record.id:
        raise VolumeError("its id is empty; give every record a unique id")
    if not SPLIT_PATTERN.fullmatch(record.split):
        raise VolumeError(
            f"its split is {record.split!r}; give every record a split of up to 128 letters, digits, '_' "
            "and '.', a letter or digit first"
        )
    features = decode_example(bytes(record.example))
    found = features.get("id")
    if not isinstance(found, memoryview) or bytes(found) != record.id.encode():
        raise VolumeError("its Example has a different feature id; make them equal, or drop the feature")
    voxels = _tensor(features, _IMAGE)
    if voxels.ndim not in _AXES or voxels.size == 0:
        raise VolumeError(f"its image has the shape {voxels.shape}, expected (X, Y, Z) or (X, Y, Z, C)")
    for name, value in features.items():
        if isinstance(value, np.ndarray) and not value.size:
            raise VolumeError(f"its feature {name} is empty; give it a value in every record, or drop it")
    kinds = {name: _kind(value) for name, value in features.items()}
    if kinds.get("label", "float") != "float":
        raise VolumeError(
            f"its feature label is {kinds['label']}, expected one float; use another name for other values"
        )
    space, mask_axes = voxels.shape[:_SPACE_AXES], record.config.mask_axes if record.config else ()
    mask, target = _beside(features, "mask", space + mask_axes), _beside(features, "target", space)
    require_readable(len(record.example), (voxels, mask, target))
    label = features.get("label")
    number = None if label is None or np.isnan(label[0]) else float(label[0])
    if number is not None and np.isinf(number):
        raise VolumeError(f"its label is {number}; give a number of float32, or NaN if there is none")
    if record.entry is None:
        _require_meaning(features, kinds, voxels)
        cells = _cells_of(record.id, features, voxels, number)
    else:
        row = record.entry.row
        _require_entry(record.entry, features, voxels, record.config or RecordConfig())
        named = replace(row, extras=row.extras if row.extra_columns else ())
        entry = replace(record.entry, row=named)
        cells = entry_cells(entry, record.config or RecordConfig(), row.extra_columns)
        cells["example_id"] = record.id
    config = record.config or _config_of(voxels, mask, target)
    if (target is None) == bool(config.has_target):  # another step has added it, or dropped it
        config = replace(config, has_target=None if target is None else True)
    found_labels = None if record.entry is None else record.entry.mask_labels
    labels = frozenset(labels_of(mask) if mask is not None and found_labels is None else found_labels or ())
    if mask is not None:
        cells["mask_labels"] = sorted(labels)
        known_positions = record.entry and record.entry.mask_positions
        cells["mask_positions"] = positions_of(mask) if known_positions is None else known_positions
    if target is not None and (record.entry is None or record.entry.target_intensity is None):
        cells |= target_cells(measure(target, NO_SCALING, "replace them"))
    traits = Traits(
        id=record.id,
        config=config,
        features=kinds,
        dtype=voxels.dtype.name,
        shape=voxels.shape,
        labelled=number is not None,
        mask_labels=labels,
        columns=record.entry.row.extra_columns if record.entry else (),
        num_axes=voxels.ndim if record.config is None else None,
    )
    return traits, cells


def _beside(features: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> npt.NDArray[Any] | None:
    """The mask or the target of an Example; None if it has none."""
    if (feature := _TENSORS[name]) not in features:
        return None
    tensor, dtypes = _tensor(features, feature), _TENSOR_DTYPES[name]
    if tensor.shape != shape or tensor.dtype.name not in dtypes:
        raise VolumeError(
            f"its {name} is {tensor.dtype.name} of {tensor.shape}, expected {' or '.join(dtypes)} of {shape}"
        )
    return tensor


def _require_meaning(features: Mapping[str, Any], kinds: Mapping[str, str], voxels: npt.NDArray[Any]) -> None:
    """Refuse features to which readers give a meaning that their values cannot have.

    Raises:
        VolumeError: one has another size or type; or voxels are beyond float32, in which they are read.
    """
    for name, count in _PLACE.items():
        if name in kinds and kinds[name] != f"float[{count}]":
            raise VolumeError(
                f"its feature {name} is {kinds[name]}, expected float[{count}]; convert it, or drop it"
            )
    if "affine" in features and not is_usable(features["affine"].astype(np.float64).reshape(4, 4)):
        raise VolumeError(
            f"its affine is {features['affine'].tolist()}, which is singular or not finite; repair it, or "
            "drop the feature"
        )
    if "zooms" in features:
        _require_sizes(features["zooms"], features.get("affine"))
    doubles = [name for name in _DOUBLES if name in features]
    for name in doubles:
        if kinds[name] != "bytes" or len(features[name]) != _DOUBLE_BYTES:
            raise VolumeError(
                f"its feature {name} is reserved for {_DOUBLE_BYTES} bytes, a float64; use another name"
            )
    scaling = [name for name in SCALING_FEATURES if name in features]
    if scaling and (len(scaling) == 1 or _config_of(voxels).voxel_dtype != "native"):
        raise VolumeError(
            f"its feature {scaling[0]} scales voxels that are stored as in a file, so it requires "
            f"{' and '.join(SCALING_FEATURES)}, and integers or float64; apply the scaling, and drop it"
        )
    if voxels.dtype == np.float64:
        with np.errstate(over="ignore"):
            for plane in voxels:
                if (np.isfinite(plane) & np.isinf(plane.astype(np.float32))).any():
                    raise VolumeError(
                        "its image has voxels beyond the range of float32, in which they are read; rescale it"
                    )


def _require_sizes(zooms: npt.NDArray[Any], affine: npt.NDArray[Any] | None) -> None:
    """Refuse impossible voxel sizes, and sizes that differ from those of the affine.

    Raises:
        VolumeError: they are.
    """
    if not (np.isfinite(zooms) & (zooms > 0)).all():
        raise VolumeError(f"its zooms are {zooms.tolist()}; give sizes above 0 in millimetres, or drop them")
    if affine is not None:
        sizes = _sizes_of(affine)
        if not np.allclose(zooms, sizes, rtol=_SIZES_TOLERANCE):
            raise VolumeError(
                f"its zooms are {zooms.tolist()}, and its affine has voxels of {sizes.tolist()} mm; correct "
                "one, or drop the zooms"
            )


def _sizes_of(affine: Any) -> npt.NDArray[np.float64]:
    """The voxel sizes of an affine, in millimetres."""
    sizes: npt.NDArray[np.float64] = np.linalg.norm(
        np.array(affine, np.float64).reshape(4, 4)[:3, :3], axis=0
    )
    return sizes


def _require_entry(
    entry: IndexEntry, features: Mapping[str, Any], voxels: npt.NDArray[Any], config: RecordConfig
) -> None:
    """Refuse a record whose Example was changed without its entry of the index.

    Raises:
        VolumeError: they disagree.
    """
    on_disk = "uint8" if entry.dtype in COLOURS.values() else entry.dtype
    dtype = on_disk if config.voxel_dtype == "native" else config.voxel_dtype
    label = np.nan if entry.row.label is None else entry.row.label
    differences: list[tuple[str, object, object]] = []
    if voxels.shape != entry.shape:
        differences.append((f"shape of {_IMAGE}", voxels.shape, entry.shape))
    if voxels.dtype.name != dtype:
        differences.append((f"dtype of {_IMAGE}", voxels.dtype.name, dtype))
    if (found_scaling := scaling_of(features)) != entry.scaling:
        differences.append(("scaling", found_scaling, entry.scaling))
    for name, said in (
        ("label", [label]),
        ("affine", entry.affine),
        ("zooms", entry.zooms),
        ("intensity_min", [i.min for i in entry.intensities]),
        ("intensity_max", [i.max for i in entry.intensities]),
    ):
        with np.errstate(over="ignore"):
            expected = np.array(said, np.float64).astype(np.float32)
        found = features.get(name)
        if not isinstance(found, np.ndarray) or not np.array_equal(found, expected, equal_nan=True):
            shown = found.tolist() if isinstance(found, np.ndarray) else "missing"
            differences.append((f"feature {name}", shown, expected.tolist()))
    for what, is_now, was in differences:
        raise VolumeError(
            f"the {what} is {is_now}, but its entry of the index has {was}; change volumes before "
            "EncodeExample, or give (id, Example) instead of a Record"
        )


def _tensor(features: Mapping[str, Any], name: str) -> npt.NDArray[Any]:
    if not isinstance(features.get(name), memoryview):
        raise VolumeError(
            f"its Example has no feature {name}, which is required; add a tensor as tf.io.serialize_tensor "
            "writes it"
        )
    try:
        return decode_tensor(features[name])
    except ShardError as e:
        raise VolumeError(
            f"its feature {name} is not a tensor of real numbers as tf.io.serialize_tensor writes it: {e}"
        ) from e


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
        **scaling_cells(scaling_of(features)),
    }
    for name, count in (("affine", 16), ("zooms", 3)):
        value = features.get(name)
        if isinstance(value, np.ndarray) and value.size == count:
            cells[name] = value.tolist()
    if "affine" in cells and "zooms" not in cells:
        cells["zooms"] = _sizes_of(cells["affine"]).tolist()
    return cells


def _config_of(
    voxels: npt.NDArray[Any], mask: npt.NDArray[Any] | None = None, target: npt.NDArray[Any] | None = None
) -> RecordConfig:
    """A configuration with which readers return voxels unchanged, for records that other steps made."""
    is_float = voxels.dtype.name in ("float32", "float16", "bfloat16")
    return RecordConfig(
        rescale="none",
        voxel_dtype=voxels.dtype.name if is_float else "native",
        frames="all" if voxels.ndim == max(_AXES) else None,
        mask_dtype=None if mask is None else mask.dtype.name,
        has_target=None if target is None else True,
    )
