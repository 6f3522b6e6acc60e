"""Checks of a single record against its row of the index and dataset_info.json."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from beam_nifti.config import MOST_FRAMES, VOXEL_DTYPES, LabelColumn, RecordConfig
from beam_nifti.errors import ShardError, VolumeError
from beam_nifti.manifest.labels import LabelValue, label_of, number_of
from beam_nifti.manifest.manifest import VolumeRow, frame_id
from beam_nifti.manifest.redaction import redacting
from beam_nifti.record.agreement import as_list, compared_columns, find_disagreements, show
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.record.example import (
    MASK_FEATURE,
    RANGE_FEATURES,
    SCALING_FEATURES,
    TARGET_FEATURE,
    Feature,
    Features,
    decode_doubles,
    decode_example,
    decode_tensor,
    encode_volume,
    largest_payload,
    scaling_of,
    tensors_of,
)
from beam_nifti.record.index import extra_column, file_cells, scaling_in, target_cells
from beam_nifti.record.tfrecord import decode_record
from beam_nifti.volume.grid import is_usable
from beam_nifti.volume.header import COLOURS
from beam_nifti.volume.intensity import stored_range
from beam_nifti.volume.label_map import labels_of, positions_of
from beam_nifti.volume.preprocess import prepare_volume
from beam_nifti.volume.rescale import Intensity, RescaleRange, float_limits
from beam_nifti.volume.target import TARGET_DTYPE
from beam_nifti.volume.volume import Volume, load_frames, load_volume, rescale_volume

_FLOATS: Final = re.compile(r"float(?:\[(\d+)\])?")
_SCALING: Final = frozenset(SCALING_FEATURES)  # features of native voxels with a scaling
_DOUBLE_BYTES: Final = 8
_STATISTICS_TOLERANCE: Final = 1e-6  # relative; last bits of sums differ between processors
_STATISTICS: Final = ("min", "max", "mean", "std")  # columns of an index
_REMAKE: Final = "run the build again with --recheck"  # because no file changed
_NOISE: Final = 1e-9  # of float64 sums, relative to the largest number
_BLOCK: Final = 1 << 20  # voxels that are compared at a time


class RecordSpec:
    """What every record of a dataset must be.

    Attributes:
        info: dataset_info.json, without the shards, so that it is small.
        num_shards: how many there are.
        config: the options that decide a record's bytes.
    """

    def __init__(self, info: DatasetInfo) -> None:
        self.info, self.config = replace(info, splits={}), info.record_config
        self.num_shards = len(info.shards)

    @property
    def may_lack(self) -> bool:
        """Whether some records of a labelled dataset may lack the label."""
        is_string = bool(self.info.labels) and self.info.labels[0].kind == "string"
        return is_string or self.is_sparse or self.info.config["columns"].get("missing_label") == "nan"

    @property
    def ids_of_people(self) -> bool:
        """Whether ids consist of participants and sessions."""
        manifest, columns = self.info.manifest, self.info.config["columns"]
        return columns.get("id") is None and "participant_id" in manifest["columns"]

    @property
    def is_sparse(self) -> bool:
        """Whether records may lack features, and their rows cells, because no manifest describes them."""
        return not self.info.has_manifest

    def most_bytes(self, cells: Mapping[str, Any]) -> int:
        """The largest payload of a record with this row of the index. It bounds what is decompressed."""
        return largest_payload(tensors_of(self.info.shape or cells["shape"], self.info.dtype, self.config))

    def unpack(self, data: bytes, cells: Mapping[str, Any]) -> bytes:
        """The serialized Example of a stored record; a ShardError if it is damaged or too large."""
        return decode_record(data, self.config.compression == "gzip", self.most_bytes(cells))


def check_record(payload: bytes, cells: Mapping[str, Any], spec: RecordSpec) -> Iterator[str]:
    """Find what is wrong with one record. A ShardError if it, or `image_raw`, cannot be parsed."""
    features = decode_example(payload)
    wrong = list(_check_schema(features, spec))
    yield from wrong
    if wrong:
        return
    yield from _check_metadata(features, cells, spec)
    voxels = decode_tensor(features["image_raw"])  # type: ignore[arg-type]
    shape = tuple(cells["shape"])
    if voxels.shape != shape:
        yield f"shape is {voxels.shape}, but the index has {shape}"
    if spec.info.shape is not None and voxels.shape != spec.info.shape:
        yield f"shape is {voxels.shape}, but dataset_info.json gives {spec.info.shape}"
    if voxels.dtype.name != spec.info.dtype:
        yield f"voxels are {voxels.dtype.name}, but dataset_info.json gives {spec.info.dtype}"
    native = spec.config.voxel_dtype == "native"
    on_disk = "uint8" if cells["dtype"] in COLOURS.values() else cells["dtype"]
    if native and on_disk != spec.info.dtype:
        yield f"voxels are {spec.info.dtype} as in the image's file, but the index has {cells['dtype']}"
    if voxels.size == 0:
        yield "there are no voxels"
        return
    unknown = [name for name in _STATISTICS if cells[name] is None]
    if spec.is_sparse and len(unknown) == len(_STATISTICS):  # nothing says what its voxels must be
        if cells["dtype"] != voxels.dtype.name:
            yield f"voxels are {voxels.dtype.name}, but the index has {cells['dtype']}"
    elif unknown:
        yield f"the index has no {unknown[0]}"
    elif spec.config.channels is None:
        yield from _check_intensities(voxels, features, cells, spec.config)
    elif voxels.ndim != 4 or voxels.shape[3] != len(spec.config.channels):
        yield f"shape is {voxels.shape}, but there are {len(spec.config.channels)} channels"
    else:
        for number, name in enumerate(spec.config.channels):
            for problem in _check_intensities(voxels[..., number], features, cells, spec.config, number):
                yield f"channel {name}: {problem}"
    if spec.config.nonfinite is not None and min(as_list(cells["num_nonfinite"]), default=0) < 0:
        yield f"the index has num_nonfinite {cells['num_nonfinite']}, which is below 0"
    if spec.config.mask_dtype is not None:
        yield from _check_mask(features, cells, voxels.shape[:3] + spec.config.mask_axes, spec.config)
    if spec.config.has_target:
        yield from _check_target(features, cells, voxels.shape[:3])


def affine_of(cells: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """The affine of a record, by its row of the index; a ShardError if it was not made from an image."""
    if cells["affine"] is None:
        raise ShardError(
            f"record {cells['example_id']!r} has no affine, without which the position of its voxels is "
            "unknown; give WriteToTFRecord Examples with the feature affine"
        )
    return np.array(cells["affine"], np.float64).reshape(4, 4)


def _check_mask(
    features: Features, cells: Mapping[str, Any], shape: tuple[int, ...], config: RecordConfig
) -> Iterator[str]:
    mask, dtype = decode_tensor(features[MASK_FEATURE]), config.mask_dtype  # type: ignore[arg-type]
    if mask.shape != shape or mask.dtype.name != dtype:
        yield f"the mask has shape {mask.shape} of {mask.dtype.name}, expected {shape} of {dtype}"
    elif (found := labels_of(mask)) != cells["mask_labels"]:
        yield f"the mask has the labels {found}, but the index has {cells['mask_labels']}"
    elif not set(cells.get("mapped_labels") or ()) <= config.label_map.keys():
        yield f"mapped_labels of the index are {cells['mapped_labels']}, which --map-labels does not map"
    elif config.has_positions and positions_of(mask) != cells["mask_positions"]:
        yield "mask_positions of the index are not those of its mask"


def _check_target(features: Features, cells: Mapping[str, Any], shape: tuple[int, ...]) -> Iterator[str]:
    target = decode_tensor(features[TARGET_FEATURE])  # type: ignore[arg-type]
    if target.shape != shape or target.dtype.name != TARGET_DTYPE:
        found = f"shape {target.shape} of {target.dtype.name}"
        yield f"the target has {found}, expected {shape} of {TARGET_DTYPE}"
        return
    ends, said = [float(target.min()), float(target.max())], [cells["target_min"], cells["target_max"]]
    if not np.isfinite(ends).all():
        yield "the target has voxels that are NaN or infinite"
    elif ends != said:
        yield f"the target ranges from {ends[0]:g} to {ends[1]:g}, but the index has {said[0]} to {said[1]}"
    if (cells.get("target_nonfinite") or 0) < 0:
        yield f"the index has target_nonfinite {cells['target_nonfinite']}, which is below 0"


def _check_schema(features: Features, spec: RecordSpec) -> Iterator[str]:
    required = spec.info.features.keys() - _SCALING
    if spec.config.voxel_dtype == "native" and _SCALING & features.keys():
        required |= _SCALING
    if spec.config.has_range:
        required |= RANGE_FEATURES.keys()
    for name in sorted(required - features.keys()):
        yield f"feature {name} is missing"
    for name in sorted(features.keys() - required):
        yield f"feature {name} is not one that dataset_info.json names"
    sizes = dict.fromkeys(_SCALING, _DOUBLE_BYTES)
    sizes |= dict.fromkeys(RANGE_FEATURES, _DOUBLE_BYTES * spec.config.num_channels)
    for name in sorted(required & features.keys()):
        kind, value = spec.info.features.get(name, "none"), features[name]
        found = "bytes" if isinstance(value, memoryview) else f"{value.dtype.name}[{value.size}]"
        found = found.replace("float32", "float")
        if found != (f"{kind}[1]" if kind in ("float", "int64") else kind):
            yield f"feature {name} is {found}, but dataset_info.json gives {kind}"
        elif len(value) != (wanted := sizes.get(name, len(value))):
            yield f"feature {name} has {len(value)} bytes, expected {wanted}: {_DOUBLE_BYTES} a float64"


def _check_metadata(features: Features, cells: Mapping[str, Any], spec: RecordSpec) -> Iterator[str]:
    stored_id = bytes(features["id"]).decode(errors="replace")
    if stored_id != cells["example_id"]:
        yield f"id is {stored_id!r}, but the index has {cells['example_id']!r}"
    label = cells["label"]
    if (label is None) == spec.info.labelled and not (label is None and spec.may_lack):
        yield f"the index's label is {label}, but dataset_info.json gives labelled: {spec.info.labelled}"
    if spec.is_sparse:
        yield from _check_sizes(features, cells)
    compared = {name: cells[name] for name in compared_columns(spec.config) if name in cells}
    wrong = list(find_disagreements(features, compared, spec.config.labels or ()))
    yield from wrong
    if not wrong and "affine" in features:
        affine = np.asarray(features["affine"], np.float64).reshape(4, 4)
        if not is_usable(affine):
            yield "affine is singular or not finite; repair the image and build it again"
    if spec.config.has_members and spec.config.voxel_dtype == "native":
        scaling_in(cells)  # a ShardError if only half of a scaling is there
    labels = _labels_in(cells, spec.config.labels or ())
    if labels and label != number_of(labels[0][1]):
        yield f"the index's label is {label}, but its {labels[0][0]} gives {number_of(labels[0][1])}"


def _check_sizes(features: Features, cells: Mapping[str, Any]) -> Iterator[str]:
    """Find where voxel sizes that a record does not state are not those of its affine."""
    if "zooms" not in features:
        sizes = None if cells["affine"] is None else np.linalg.norm(affine_of(cells)[:3, :3], axis=0)
        found = cells["zooms"]
        if (found is None) != (sizes is None) or (sizes is not None and not np.allclose(found, sizes)):
            shown, wanted = ("none" if numbers is None else show(numbers) for numbers in (found, sizes))
            yield f"the index has voxel sizes of {shown}, expected {wanted}"


def _labels_in(
    cells: Mapping[str, Any], columns: Sequence[LabelColumn]
) -> tuple[tuple[str, LabelValue], ...]:
    """The labels in a row of the index, as `VolumeRow.labels`."""
    return tuple((c.name, label_of(cells[extra_column(c.name)], c)) for c in columns)


def _check_intensities(
    voxels: npt.NDArray[Any],
    features: Features,
    cells: Mapping[str, Any],
    config: RecordConfig,
    number: int = 0,
) -> Iterator[str]:
    """Find where the voxels of image `number` of a record are not what they must be."""
    # One NaN makes both NaN: two passes find every bad voxel.
    extremes = np.array([voxels.min(), voxels.max()])
    if not np.isfinite(extremes).all():
        bad = voxels.size - int(np.count_nonzero(np.isfinite(voxels)))
        yield f"{bad} of {voxels.size} voxels are NaN or infinite"
        return
    intensity = Intensity(*(float(as_list(cells[name])[number]) for name in _STATISTICS))
    least, largest = intensity.min, intensity.max
    if config.method == "minmax" and not least < largest:
        yield f"the index has an intensity range from {least:g} to {largest:g}, which cannot be rescaled"
        return
    rescale_range = None
    if config.has_range:
        names = ("rescale_low", "rescale_high")
        low, high = (decode_doubles(features[name])[number] for name in names)
        wrong = list(_check_rescale_range(low, high, intensity, config, number))
        yield from wrong
        if wrong:
            return
        rescale_range = RescaleRange(low, high)
    expected = stored_range(intensity, rescale_range, config).astype(np.float64)
    if config.voxel_dtype == "native":
        name, found = "voxels, scaled,", np.sort(scaling_of(features).apply(extremes))
    else:
        name, found = "voxels" if config.method == "none" else "rescaled voxels", extremes.astype(np.float64)
    if not np.array_equal(found, expected):
        yield (f"{name} range from {found[0]:g} to {found[1]:g}, expected {expected[0]:g} to {expected[1]:g}")


def _check_rescale_range(
    low: float, high: float, intensity: Intensity, config: RecordConfig, number: int
) -> Iterator[str]:
    """Find where the rescale range is none, or not that of the configuration."""
    if not low < high:
        yield f"rescale_low is {low:g} and rescale_high {high:g}, which is not a range"
    expected: tuple[float, ...] = config.rescale_numbers if config.method == "window" else ()
    if (ranges := config.cohort_ranges) is not None:
        expected = ranges[number]
    if config.method == "zscore" and config.rescale_within is None:
        expected = (intensity.mean, intensity.mean + intensity.std)
    if expected and (low, high) != expected:
        yield f"{low:g} and {high:g} became 0 and 1, expected {expected[0]:g} and {expected[1]:g}"


class RoundingNote(str):
    """A note, not a problem: a record differs by rounding from what this software makes."""


def check_source(
    payload: bytes,
    cells: Mapping[str, Any],
    row: VolumeRow,
    folder: str,
    config: RecordConfig,
    versions: str = "",
) -> Iterator[str]:
    """Rebuild a record from its image and find where it differs.

    `cells` is its row of the index. `versions` describes how the versions of the software that built it
    differ from those here; a difference by rounding is then a RoundingNote.

    Raises:
        OSError: the disk, the network or a store failed, which does not concern the record.
    """
    row = replace(row, labels=_labels_in(cells, config.labels or ()))
    try:
        with redacting(row, folder):
            volume = _load_example(row, folder, cells, config)
            volume = rescale_volume(prepare_volume(volume, config, release=True), config)
    except VolumeError as e:
        yield f"cannot be rebuilt: {e}"
        return
    again = bytes(encode_volume(volume))
    if again != payload:
        stored, made = decode_example(payload), decode_example(again)
        names = sorted(n for n in stored.keys() | made.keys() if not _same(stored, made, n))
        if versions and differ_in_rounding(stored, made, names):
            yield RoundingNote(f"{', '.join(names)} differs in rounding; it was built with {versions}")
            return
        files = file_cells(volume.source.files, config, row.version_key)
        changes = [f"{n} was {cells[n]}, now {now}" for n, now in files.items() if cells[n] != now]
        reason = (
            f"a file changed since the build ({'; '.join(changes)}); build it again"
            if changes
            else f"the sizes and times of its files are unchanged; {_REMAKE}"
        )
        by = f"it was built with {versions}; " if versions else ""
        yield f"what is stored differs from {row.source} in {', '.join(names)}; {by}{reason}"
        return
    for number, now in enumerate(volume.intensities):
        image = f"channel {config.channels[number]}" if config.channels else "its image"
        tolerance = _STATISTICS_TOLERANCE * max(abs(now.min), abs(now.max))
        for name, far in (("min", 0.0), ("max", 0.0), ("mean", tolerance), ("std", tolerance)):
            said, found = as_list(cells[name])[number], getattr(now, name)
            if not abs(said - found) <= far:
                yield f"the index has {name} {said:g}, but {image} has {found:g}; {_REMAKE}"
    for name, value in target_cells(volume.target_intensity).items():
        largest = max(abs(cells["target_min"]), abs(cells["target_max"]))
        if not abs(cells[name] - value) <= _STATISTICS_TOLERANCE * largest:
            yield f"the index has {name} {cells[name]:g}, but its target has {value:g}; {_REMAKE}"
    if (was := cells.get("target_nonfinite")) not in (None, volume.target_nonfinite):
        is_now = volume.target_nonfinite
        yield f"the index has target_nonfinite {was}, but its target has {is_now}; {_REMAKE}"
    if cells["dtype"] != volume.dtype:
        yield f"the index has dtype {cells['dtype']}, but its image has {volume.dtype}; {_REMAKE}"
    if config.nonfinite is not None:
        replaced, counted = as_list(cells["num_nonfinite"]), list(volume.num_nonfinite)
        if replaced != counted:
            yield (
                f"the index has num_nonfinite {show(replaced)}, but its image has {show(counted)}; {_REMAKE}"
            )
    if config.map_labels is not None and cells["mapped_labels"] != list(volume.mapped_labels or ()):
        found = show(volume.mapped_labels or ())
        yield (
            f"the index has mapped_labels {show(cells['mapped_labels'])}, but its mask has {found}; {_REMAKE}"
        )
    if not config.has_sources:
        return
    for name, has in (("source_shape", volume.source.shape), ("source_affine", volume.source.affine)):
        if not np.array_equal(cells[name], has, equal_nan=True):
            yield f"the index has {name} {show(cells[name])}, but its image has {show(has)}; {_REMAKE}"


def _load_example(row: VolumeRow, folder: str, cells: Mapping[str, Any], config: RecordConfig) -> Volume:
    """The volume of a record, whose row has its id, by its row of the index."""
    if not config.splits_frames:
        return load_volume(row, folder, record=config)
    frame = cells["frame"]
    if config.clip_frames == 1:  # without the other frames
        return load_volume(row, folder, record=replace(config, frames=str(frame), max_frames=None))
    image_id = row.example_id.removesuffix(frame_id("", frame))
    wanted = replace(
        row, example_id=image_id, num_frames=MOST_FRAMES, clip_frames=config.clip_frames, wanted=(frame,)
    )
    for volume in load_frames(wanted, folder, record=replace(config, max_frames=MOST_FRAMES)):
        return replace(volume, config=config)
    raise VolumeError(f"{row.path}: has no frame {frame}")


def _same(one: Features, other: Features, name: str) -> bool:
    if name not in one or name not in other:
        return False
    # memoryview and float32 arrays both hand out their bytes; NaN labels compare equal so.
    return bytes(memoryview(one[name]).cast("B")) == bytes(memoryview(other[name]).cast("B"))


def differ_in_rounding(one: Features, other: Features, names: list[str]) -> bool:
    """Whether the named features of two records differ by at most the last digit of what they store."""
    return all(name in one and name in other and _is_close(name, one[name], other[name]) for name in names)


def _is_close(name: str, one: Feature, other: Feature) -> bool:
    if name in ("image_raw", TARGET_FEATURE):
        voxels = (decode_tensor(feature) for feature in (one, other))  # type: ignore[arg-type]
        return _are_voxels_close(*voxels)
    if name in RANGE_FEATURES:
        return _are_close(np.array(decode_doubles(one)), np.array(decode_doubles(other)), _NOISE)
    a, b = np.asarray(one), np.asarray(other)
    is_number = a.dtype == b.dtype == np.float32 and a.shape == b.shape
    return is_number and _are_close(a, b, float(float_limits("float32").eps))


def _are_voxels_close(one: npt.NDArray[np.generic], other: npt.NDArray[np.generic]) -> bool:
    dtype = one.dtype.name
    # Other dtypes are stored as they are in the image, without rounding.
    if (one.shape, dtype) != (other.shape, other.dtype.name) or dtype not in VOXEL_DTYPES:
        return False
    blocks = [slice(start, start + _BLOCK) for start in range(0, one.size, _BLOCK)]
    a, b = one.reshape(-1), other.reshape(-1)
    absolute = 1.0
    if dtype != "uint8":
        largest = (np.abs(v[block].astype(np.float64)).max() for v in (a, b) for block in blocks)
        absolute = _NOISE * float(max(largest))
    relative = 0.0 if dtype == "uint8" else float(float_limits(dtype).eps)
    return all(_are_close(a[block], b[block], relative, absolute) for block in blocks)


def _are_close(
    one: npt.NDArray[np.generic], other: npt.NDArray[np.generic], relative: float, absolute: float = 0.0
) -> bool:
    a, b = one.astype(np.float64), other.astype(np.float64)
    allowed = np.maximum(relative * np.maximum(np.abs(a), np.abs(b)), absolute)
    return bool(np.all((np.abs(a - b) <= allowed) | (np.isnan(a) & np.isnan(b))))
