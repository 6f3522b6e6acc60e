"""What one record must be. Bytes and its row of the index in, sentences out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from beam_nifti.config import LabelColumn, RecordConfig
from beam_nifti.errors import ShardError, VolumeError
from beam_nifti.inspection.rounding import differ_in_rounding
from beam_nifti.manifest.concealment import concealing
from beam_nifti.manifest.labels import LabelValue, label_of, number_of
from beam_nifti.manifest.manifest import VolumeRow
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.record.example import (
    ENDS_FEATURES,
    MASK_FEATURE,
    SCALING_FEATURES,
    decode_doubles,
    decode_example,
    decode_tensor,
    encode_volume,
    label_feature,
    largest_payload,
    scaling_of,
)
from beam_nifti.record.index import extra_column, file_cells
from beam_nifti.volume.grid import is_usable
from beam_nifti.volume.header import COLOURS
from beam_nifti.volume.intensity import rescale_voxels
from beam_nifti.volume.label_map import labels_of
from beam_nifti.volume.preprocess import prepare_volume
from beam_nifti.volume.rescale import Ends, Intensity, Scaling
from beam_nifti.volume.volume import load_volume, rescale_volume

_FLOATS: Final = re.compile(r"float(?:\[(\d+)\])?")
_SCALING: Final = frozenset(SCALING_FEATURES)
"""Features that stand only beside native voxels whose header scales them."""

_DOUBLE_BYTES: Final = 8
_STATISTICS_TOLERANCE: Final = 1e-6
"""Relative; sums of the same voxels differ in their last bits between processors."""

_STATISTICS: Final = ("min", "max", "mean", "std")
"""Columns of an index of what the intensities of a record are."""

_REMAKE: Final = "run the build again with --recheck"
"""The remedy where a build would find nothing that has changed."""

_Feature = memoryview | npt.NDArray[np.generic]


@dataclass(frozen=True)
class RecordSpec:
    """What every record of a dataset must be.

    Attributes:
        config: what decided its bytes.
        features: name to kind, such as "float[16]".
        shape: (X, Y, Z) or (X, Y, Z, T) of every volume; None where shapes are mixed.
        dtype: of the stored voxels.
        labelled: whether records have a label; without, every label is NaN.
        may_lack: whether some of a labelled dataset may lack it.
        columns: names of all columns of the manifest.
        ids_of_people: whether ids are made of participants and sessions.
        is_sparse: whether records may lack features, and their rows of the index cells, as where no manifest
            says what is in them.
    """

    config: RecordConfig
    features: Mapping[str, str]
    shape: tuple[int, ...] | None
    dtype: str
    labelled: bool
    may_lack: bool = False
    columns: tuple[str, ...] = ()
    ids_of_people: bool = False
    is_sparse: bool = False

    @classmethod
    def of(cls, info: DatasetInfo) -> RecordSpec:
        """The spec of a dataset."""
        is_string = bool(info.labels) and info.labels[0].kind == "string"
        return cls(
            info.record_config,
            info.features,
            info.shape,
            info.dtype,
            info.labelled,
            may_lack=is_string
            or not info.has_manifest
            or info.config["columns"].get("missing_label") == "nan",
            columns=tuple(info.manifest["columns"]),
            ids_of_people=info.config["columns"].get("id") is None
            and "participant_id" in info.manifest["columns"],
            is_sparse=not info.has_manifest,
        )

    def most_bytes(self, shape: Sequence[int]) -> int:
        """Of the payload of a record whose index says that shape: it bounds what is decompressed."""
        return largest_payload(self.shape or shape, self.dtype, self.config.mask_dtype)


def check_record(payload: bytes, cells: Mapping[str, Any], spec: RecordSpec) -> Iterator[str]:
    """Find what is wrong with one record.

    Args:
        payload: the serialized Example.
        cells: the record's row of the index.
        spec: of the dataset.

    Raises:
        ShardError: the payload is no Example, or `image_raw` no tensor.
    """
    features = decode_example(payload)
    wrong = list(_check_schema(features, spec))
    yield from wrong
    if wrong:
        return
    yield from _check_metadata(features, cells, spec)
    voxels = decode_tensor(features["image_raw"])  # type: ignore[arg-type]
    shape = tuple(cells["shape"])
    if voxels.shape != shape:
        yield f"shape is {voxels.shape}, the index says {shape}"
    if spec.shape is not None and voxels.shape != spec.shape:
        yield f"shape is {voxels.shape}, dataset_info.json says {spec.shape}"
    if voxels.dtype.name != spec.dtype:
        yield f"voxels are {voxels.dtype.name}, dataset_info.json says {spec.dtype}"
    native = spec.config.voxel_dtype == "native"
    on_disk = "uint8" if cells["dtype"] in COLOURS.values() else cells["dtype"]
    if native and on_disk != spec.dtype:
        yield f"voxels are {spec.dtype} as in the image's file, the index says {cells['dtype']}"
    if voxels.size == 0:
        yield "there are no voxels"
        return
    unknown = [name for name in _STATISTICS if cells[name] is None]
    if spec.is_sparse and len(unknown) == len(_STATISTICS):  # nothing says what its voxels must be
        if cells["dtype"] != voxels.dtype.name:
            yield f"voxels are {voxels.dtype.name}, the index says {cells['dtype']}"
    elif unknown:
        yield f"the index has no {unknown[0]}"
    elif spec.config.channels is None:
        yield from _check_intensities(voxels, features, cells, spec.config)
    elif voxels.ndim != 4 or voxels.shape[3] != len(spec.config.channels):
        yield f"shape is {voxels.shape}, and there are {len(spec.config.channels)} channels"
    else:
        for number, name in enumerate(spec.config.channels):
            for problem in _check_intensities(voxels[..., number], features, cells, spec.config, number):
                yield f"channel {name}: {problem}"
    if spec.config.mask_dtype is not None:
        yield from _check_mask(features, cells, voxels.shape[:3], spec.config.mask_dtype)


def affine_of(cells: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Voxel indices of a record to millimetres, by its row of the index.

    Raises:
        ShardError: the record has none, as it was not made of an image.
    """
    if cells["affine"] is None:
        raise ShardError(
            f"record {cells['example_id']!r} has no affine, without which nothing says where its voxels lie; "
            "give WriteToTFRecord Examples with the feature affine"
        )
    return np.array(cells["affine"], np.float64).reshape(4, 4)


def _check_mask(
    features: Mapping[str, _Feature], cells: Mapping[str, Any], shape: tuple[int, ...], dtype: str
) -> Iterator[str]:
    mask = decode_tensor(features[MASK_FEATURE])  # type: ignore[arg-type]
    if mask.shape != shape or mask.dtype.name != dtype:
        yield f"the mask has shape {mask.shape} of {mask.dtype.name}, expected {shape} of {dtype}"
    elif (found := labels_of(mask)) != cells["mask_labels"]:
        yield f"the mask has the labels {found}, the index says {cells['mask_labels']}"


def _check_schema(features: Mapping[str, _Feature], spec: RecordSpec) -> Iterator[str]:
    required = spec.features.keys() - _SCALING
    if spec.config.voxel_dtype == "native" and _SCALING & features.keys():
        required |= _SCALING
    if spec.config.has_ends:
        required |= ENDS_FEATURES.keys()
    for name in sorted(required - features.keys()):
        yield f"feature {name} is missing"
    for name in sorted(features.keys() - required):
        yield f"feature {name} is not one that dataset_info.json names"
    sizes = dict.fromkeys(_SCALING, _DOUBLE_BYTES)
    sizes |= dict.fromkeys(ENDS_FEATURES, _DOUBLE_BYTES * spec.config.num_channels)
    for name in sorted(required & features.keys()):
        kind, value = spec.features.get(name, "none"), features[name]
        found = "bytes" if isinstance(value, memoryview) else f"{value.dtype.name}[{value.size}]"
        found = found.replace("float32", "float")
        if found != (f"{kind}[1]" if kind in ("float", "int64") else kind):
            yield f"feature {name} is {found}, dataset_info.json says {kind}"
        elif len(value) != (wanted := sizes.get(name, len(value))):
            yield f"feature {name} has {len(value)} bytes, expected {wanted}: {_DOUBLE_BYTES} a float64"


def _check_metadata(
    features: Mapping[str, _Feature], cells: Mapping[str, Any], spec: RecordSpec
) -> Iterator[str]:
    stored_id = bytes(features["id"]).decode(errors="replace")
    if stored_id != cells["example_id"]:
        yield f"id is {stored_id!r}, the index says {cells['example_id']!r}"
    label = cells["label"]
    if (label is None) == spec.labelled and not (label is None and spec.may_lack):
        yield f"the index's label is {label}, and dataset_info.json says labelled: {spec.labelled}"
    expected = {
        "label": [np.nan if label is None else label],
        "affine": cells["affine"],
        "zooms": cells["zooms"],
        "intensity_min": _of_images(cells["min"]),
        "intensity_max": _of_images(cells["max"]),
    }
    if spec.is_sparse:
        known = {name for name, numbers in expected.items() if numbers not in (None, [None])}
        known -= {"label"} if label is None else set()
        yield from _check_presence(features, cells, known)
        compared = features.keys() & {*known, "label"}
        expected = {name: numbers for name, numbers in expected.items() if name in compared}
    for name, numbers in expected.items():
        stored, said = np.asarray(features[name]), _as_float32(numbers)
        if not np.array_equal(stored, said, equal_nan=True):
            yield f"{name} is {_show(stored)}, the index says {_show(said)}"
        elif name == "affine" and not is_usable(stored.astype(np.float64).reshape(4, 4)):
            yield "affine is singular or not finite; repair the image and build it again"
    labels = _labels_in(cells, spec.config.labels or ())
    if labels and label != number_of(labels[0][1]):
        yield f"the index's label is {label}, of its {labels[0][0]} it is {number_of(labels[0][1])}"
    for name, value in labels:
        yield from _check_label(features[label_feature(name)], name, value)


def _check_presence(
    features: Mapping[str, _Feature], cells: Mapping[str, Any], said: Set[str]
) -> Iterator[str]:
    """Find where only one of a record and its row of the index says something, which readers take from there.

    Args:
        features: of the record, of which a step may have left out some.
        cells: the record's row of the index.
        said: names of the features whose values that says.
    """
    for name in sorted(said - features.keys() - {"zooms"}):
        yield f"feature {name} is missing, and the index says what it is"
    for name in ("affine", "zooms"):
        if name in features and name not in said:
            yield f"{name} is {_show(np.asarray(features[name]))}, and the index does not say it"
    if "zooms" not in features:
        sizes = None if cells["affine"] is None else np.linalg.norm(affine_of(cells)[:3, :3], axis=0)
        found = cells["zooms"]
        if (found is None) != (sizes is None) or (sizes is not None and not np.allclose(found, sizes)):
            shown, wanted = ("none" if numbers is None else _show(numbers) for numbers in (found, sizes))
            yield f"the index says voxel sizes of {shown}, expected {wanted}"


def _labels_in(
    cells: Mapping[str, Any], columns: Sequence[LabelColumn]
) -> tuple[tuple[str, LabelValue], ...]:
    """The labels that a row of the index says; as `VolumeRow.labels`."""
    return tuple((c.name, label_of(cells[extra_column(c.name)], c)) for c in columns)


def _check_label(feature: _Feature, name: str, said: LabelValue) -> Iterator[str]:
    if isinstance(said, str):
        text = bytes(feature).decode(errors="replace")
        if text != said:
            yield f"{label_feature(name)} is {text!r}, the index says {said!r}"
        return
    stored = np.asarray(feature)
    expected = np.array([said]) if isinstance(said, int) else _as_float32([said])
    if not np.array_equal(stored, expected, equal_nan=True):
        yield f"{label_feature(name)} is {_show(stored)}, the index says {_show(expected)}"


def _of_images(cell: Any) -> list[float]:
    """What the index says of the images of a record, which may be a single one."""
    return cell if isinstance(cell, list) else [cell]


def _as_float32(numbers: Sequence[float]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return np.array(numbers, np.float64).astype(np.float32)


def _show(numbers: Iterable[Any]) -> str:
    return " ".join(f"{n:g}" for n in numbers)


def _check_intensities(
    voxels: npt.NDArray[Any],
    features: Mapping[str, _Feature],
    cells: Mapping[str, Any],
    config: RecordConfig,
    number: int = 0,
) -> Iterator[str]:
    """Find where the voxels of one image, of that number in its record, are not what they must be."""
    # One NaN makes both ends NaN: two passes find every bad voxel.
    ends = np.array([voxels.min(), voxels.max()])
    if not np.isfinite(ends).all():
        bad = voxels.size - int(np.count_nonzero(np.isfinite(voxels)))
        yield f"{bad} of {voxels.size} voxels are NaN or infinite"
        return
    statistics = (_of_images(cells[name])[number] for name in _STATISTICS)
    intensity = Intensity(*map(float, statistics))
    said = np.array([intensity.min, intensity.max])
    if config.method == "minmax" and not intensity.min < intensity.max:
        yield f"the index says an intensity range from {said[0]:g} to {said[1]:g}, which cannot be rescaled"
        return
    becomes = None
    if config.has_ends:
        becomes = Ends(*(decode_doubles(features[name])[number] for name in ("rescale_low", "rescale_high")))
        said_ends = [_of_images(cells.get(name))[number] for name in ("rescale_low", "rescale_high")]
        wrong = list(_check_ends(becomes, said_ends, intensity, config))
        yield from wrong
        if wrong:
            return
    if config.voxel_dtype == "native":
        name, found, expected = "voxels, scaled,", _native_range(ends, features), said
    else:
        # Every rescaling keeps the order of voxels, so the ends of the range stay its ends.
        name, found = "voxels" if config.method == "none" else "rescaled voxels", ends.astype(np.float64)
        with np.errstate(over="ignore"):
            expected = rescale_voxels(said, Scaling(), intensity, becomes, config).astype(np.float64)
    if not np.array_equal(found, expected):
        ends_text = f"{found[0]:g} to {found[1]:g}, expected {expected[0]:g} to {expected[1]:g}"
        yield f"{name} range from {ends_text}"


def _check_ends(ends: Ends, said: Sequence[Any], intensity: Intensity, config: RecordConfig) -> Iterator[str]:
    """Find where what became 0 and 1 is not what the index and the configuration say."""
    for name, stored, cell in zip(("rescale_low", "rescale_high"), (ends.low, ends.high), said, strict=True):
        if stored != cell:
            yield f"{name} is {stored!r}, the index says {cell!r}"
    if not ends.low < ends.high:
        yield f"rescale_low is {ends.low:g} and rescale_high {ends.high:g}, which is no range"
    expected: tuple[float, ...] = config.rescale_numbers if config.method == "window" else ()
    if config.method == "zscore" and config.rescale_within is None:
        expected = (intensity.mean, intensity.mean + intensity.std)
    if expected and (ends.low, ends.high) != expected:
        yield f"{ends.low:g} and {ends.high:g} became 0 and 1, expected {expected[0]:g} and {expected[1]:g}"


def _native_range(ends: npt.NDArray[Any], features: Mapping[str, _Feature]) -> npt.NDArray[np.float64]:
    """The range in the image's units."""
    return np.sort(scaling_of(features).apply(ends))


class RoundingNote(str):
    """A remark that a record differs in rounding from what this software makes. It is no problem."""


def check_source(
    payload: bytes,
    cells: Mapping[str, Any],
    row: VolumeRow,
    folder: str,
    config: RecordConfig,
    versions: str = "",
) -> Iterator[str]:
    """Make a record again from its image and find where it differs.

    Args:
        payload: the serialized Example.
        cells: the record's row of the index.
        row: the record's row of the manifest.
        folder: what relative image paths are relative to.
        config: that the record was made with.
        versions: how those of the software that made it differ from the ones here, in words; then a
            difference in rounding is a RoundingNote.

    Raises:
        OSError: the disk, the network or a store failed, which says nothing about the record.
    """
    row = replace(row, labels=_labels_in(cells, config.labels or ()))
    if config.frames == "each":
        config = replace(config, frames=str(cells["frame"]))
    try:
        with concealing(row, folder):
            volume = load_volume(row, folder, record=config)
            volume = rescale_volume(prepare_volume(volume, config, release=True), config)
    except VolumeError as e:
        yield f"cannot be made again: {e}"
        return
    again = encode_volume(volume)
    if again != payload:
        stored, made = decode_example(payload), decode_example(again)
        names = sorted(n for n in stored.keys() | made.keys() if not _same(stored, made, n))
        if versions and differ_in_rounding(stored, made, names):
            yield RoundingNote(f"{', '.join(names)} differs in rounding; it was made with {versions}")
            return
        files = file_cells(volume.source.files, config, row.version_key)
        changes = [f"{n} was {cells[n]}, now {now}" for n, now in files.items() if cells[n] != now]
        reason = (
            f"a file changed since the build ({'; '.join(changes)}); build it again"
            if changes
            else f"its files have the sizes and times that they had; {_REMAKE}"
        )
        by = f"it was made with {versions}; " if versions else ""
        yield f"what is stored differs from {row.source} in {', '.join(names)}; {by}{reason}"
        return
    for number, now in enumerate(volume.intensities):
        image = f"channel {config.channels[number]}" if config.channels else "its image"
        tolerance = _STATISTICS_TOLERANCE * max(abs(now.min), abs(now.max))
        for name, far in (("min", 0.0), ("max", 0.0), ("mean", tolerance), ("std", tolerance)):
            said, found = _of_images(cells[name])[number], getattr(now, name)
            if not abs(said - found) <= far:
                yield f"the index says {name} {said:g}, {image} has {found:g}; {_REMAKE}"
    if cells["dtype"] != volume.dtype:
        yield f"the index says dtype {cells['dtype']}, its image has {volume.dtype}; {_REMAKE}"
    if config.format_version == 1:
        return
    for name, has in (("source_shape", volume.source.shape), ("source_affine", volume.source.affine)):
        if not np.array_equal(cells[name], has, equal_nan=True):
            yield f"the index says {name} {_show(cells[name])}, its image has {_show(has)}; {_REMAKE}"


def _same(one: Mapping[str, _Feature], other: Mapping[str, _Feature], name: str) -> bool:
    if name not in one or name not in other:
        return False
    # memoryview and float32 arrays both hand out their bytes; NaN labels compare equal so.
    return bytes(memoryview(one[name]).cast("B")) == bytes(memoryview(other[name]).cast("B"))
