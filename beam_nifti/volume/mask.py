"""The mask of an example: an image of whole numbers, which label the voxels of its images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from beam_nifti.config import MASK_DTYPES, RecordConfig
from beam_nifti.errors import VolumeError
from beam_nifti.volume.files import FileStats, ReadHeader, open_image
from beam_nifti.volume.formats import parse_header
from beam_nifti.volume.header import VolumeHeader, record_layout
from beam_nifti.volume.rescale import Scaling, Voxels
from beam_nifti.volume.voxels import take_voxels

PLAIN: Final = RecordConfig()  # by which voxels are loaded as they are in the file
_CHUNK: Final = 1 << 16  # voxels that are looked at at a time
_LARGEST_STEP: Final = 1 / 8  # between two stored integers, of which the nearest may represent a label
_LARGEST_ERROR: Final = _LARGEST_STEP / 2  # distance from a whole number that is taken for rounding at most
_RELATIVE_ERROR: Final = 2.0**-22  # of arithmetic in float32: two units in the last place


def parse_plain_header(name: str, head: bytes, kind: str = "mask") -> VolumeHeader:
    """Parse the header of a mask or a target, as `parse_header`, and require one number per voxel."""
    header = parse_header(name, head)
    if len(header.shape) > 3 or header.num_colours > 1 or header.is_complex:
        raise VolumeError(
            f"{name}: shape {header.shape} of {header.dtype_name}: a {kind} must have one number per "
            "voxel; extract the intended volume"
        )
    return header


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """A mask as it was loaded.

    Attributes:
        header: its header.
        labels: (X, Y, Z), C order.
        stats: of its files.
        mapped: labels in the file that were mapped to others, ascending.
    """

    header: VolumeHeader
    labels: Voxels
    stats: FileStats
    mapped: tuple[int, ...]


def load_mask(name: str, path: str, parse: ReadHeader, record: RecordConfig) -> Mask:
    """Read a mask, whose labels have the dtype of the record and are mapped by its `map_labels`.

    Other voxels than whole numbers of the dtype are a VolumeError.
    """
    with open_image(name, path, parse) as image:
        voxels = take_voxels(image, record_layout(name, image.header, PLAIN))
        mapping = _Mapping(record.label_map) if record.map_labels is not None else None
        labels = _as_labels(name, voxels, image.header.scaling, record.mask_dtype or MASK_DTYPES[0], mapping)
    return Mask(image.header, labels, image.stats, mapping.found() if mapping else ())


class _Mapping:
    """Maps labels, all at once, and knows which ones it has met."""

    def __init__(self, labels: Mapping[int, int]) -> None:
        self._old = np.array(sorted(labels), np.float64)
        self._new = np.array([labels[old] for old in sorted(labels)], np.float64)
        self._is_found = np.zeros(len(labels), np.bool_)

    def apply(self, values: npt.NDArray[np.float64]) -> None:
        """Map whole numbers in place."""
        at = np.minimum(np.searchsorted(self._old, values), len(self._old) - 1)
        is_mapped = self._old[at] == values
        at = at[is_mapped]
        self._is_found[at] = True
        values[is_mapped] = self._new[at]

    def found(self) -> tuple[int, ...]:
        """The labels that were mapped, ascending."""
        return tuple(map(int, self._old[self._is_found]))


def _as_labels(name: str, voxels: Voxels, scaling: Scaling, dtype: str, mapping: _Mapping | None) -> Voxels:
    if voxels.dtype.kind in "iu" and scaling.is_identity and mapping is None:
        low, high = float(voxels.min()), float(voxels.max())
        labels = voxels.astype(dtype, copy=False)
    else:
        low, high, labels = _whole_numbers(name, voxels, scaling, dtype, mapping)
    if low < 0 or high > np.iinfo(dtype).max:
        wider = MASK_DTYPES[-1]
        fits = low >= 0 and high <= np.iinfo(wider).max
        remedy = f"use --mask-dtype {wider}" if fits else "renumber them with --map-labels"
        raise VolumeError(f"{name}: labels from {low:g} to {high:g} do not fit {dtype}; {remedy}")
    return labels


def _whole_numbers(
    name: str, voxels: Voxels, scaling: Scaling, dtype: str, mapping: _Mapping | None
) -> tuple[float, float, Voxels]:
    """The smallest and largest label of a mask, and its labels, which are wrong if they do not fit.

    Scaled integers cannot store the labels 0, 1, 2 and 4 exactly: of 256 integers with a slope of 4/255,
    number 64 is the nearest to 1, and its value is 1.0039. A value is rounded to a label if half the slope
    and the precision of float32 explain the difference.
    """
    labels = np.empty(voxels.shape, dtype)
    source, target = voxels.reshape(-1), labels.reshape(-1)
    low, high = math.inf, -math.inf
    step = abs(scaling.slope) if voxels.dtype.kind in "iu" else 0.0
    half_step = step / 2 if step <= _LARGEST_STEP else 0.0
    for start in range(0, source.size, _CHUNK):
        values = scaling.apply(source[start : start + _CHUNK])
        rounded = np.rint(values)
        with np.errstate(invalid="ignore", over="ignore"):
            magnitude = np.abs(values - scaling.inter) + abs(scaling.inter)
            error = half_step + _RELATIVE_ERROR * np.maximum(magnitude, 1)
            uneven = values[~(np.abs(values - rounded) <= np.minimum(error, _LARGEST_ERROR))]
            if uneven.size:
                raise VolumeError(
                    f"{name}: a voxel of the mask is {float(uneven[0])}, not a whole number; threshold or "
                    "round it"
                )
            if mapping is not None:
                mapping.apply(rounded)
            low, high = min(low, rounded.min()), max(high, rounded.max())
            target[start : start + _CHUNK] = rounded
    return low, high, labels
