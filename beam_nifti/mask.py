"""The mask of an example: an image of whole numbers, which label the voxels of its images."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from beam_nifti import storage
from beam_nifti.config import MASK_DTYPES, RecordConfig
from beam_nifti.errors import VolumeError
from beam_nifti.formats import parse_header
from beam_nifti.header import VolumeHeader, record_layout
from beam_nifti.image import ReadHeader, open_image
from beam_nifti.rescale import Scaling, Voxels
from beam_nifti.voxels import take_voxels

_RECORD: Final = RecordConfig()
"""By which the voxels of a mask are loaded: as they are in the file."""

_CHUNK: Final = 1 << 16
"""Voxels that are looked at at a time."""


def parse_mask_header(name: str, head: bytes) -> VolumeHeader:
    """What the first bytes of a mask say.

    Args:
        name: its path, for errors.
        head: as for `parse_header`.

    Raises:
        VolumeError: they are not the header of a 3-D image of one number a voxel.
    """
    header = parse_header(name, head)
    if len(header.shape) > 3 or header.num_colours > 1 or header.is_complex:
        raise VolumeError(
            f"{name}: shape {header.shape} of {header.dtype_name}: a mask has one number a voxel; extract "
            "the volume that is meant"
        )
    return header


def load_mask(
    name: str, path: str, parse: ReadHeader, dtype: str
) -> tuple[VolumeHeader, Voxels, storage.Stat]:
    """Read a mask.

    Args:
        name: its path, for errors.
        path: of the file.
        parse: reads its header, and refuses it where it does not fit the image.
        dtype: "uint8" or "uint16".

    Returns:
        Its header; the labels, of that dtype and shape (X, Y, Z), C order; size and time of the file.

    Raises:
        VolumeError: it cannot be read, or its voxels are not whole numbers of that dtype.
    """
    with open_image(name, path, parse) as image:
        voxels = take_voxels(image, record_layout(name, image.header, _RECORD))
        labels = _as_labels(name, voxels, image.header.scaling, dtype)
    return image.header, labels, image.source


def _as_labels(name: str, voxels: Voxels, scaling: Scaling, dtype: str) -> Voxels:
    if voxels.dtype.kind in "iu" and scaling.is_identity:
        low, high = float(voxels.min()), float(voxels.max())
        labels = voxels.astype(dtype, copy=False)
    else:
        low, high, labels = _whole_numbers(name, voxels, scaling, dtype)
    if low < 0 or high > np.iinfo(dtype).max:
        wider = MASK_DTYPES[-1]
        fits = low >= 0 and high <= np.iinfo(wider).max
        remedy = f"use --mask-dtype {wider}" if fits else "renumber them"
        raise VolumeError(f"{name}: labels from {low:g} to {high:g} do not fit {dtype}; {remedy}")
    return labels


def _whole_numbers(name: str, voxels: Voxels, scaling: Scaling, dtype: str) -> tuple[float, float, Voxels]:
    """The least and the largest value of a mask, and its labels, which may be wrong where they do not fit."""
    labels = np.empty(voxels.shape, dtype)
    source, target = voxels.reshape(-1), labels.reshape(-1)
    low, high = math.inf, -math.inf
    for start in range(0, source.size, _CHUNK):
        values = scaling.apply(source[start : start + _CHUNK])
        low, high = min(low, values.min()), max(high, values.max())
        uneven = values[~((np.rint(values) == values) & np.isfinite(values))]
        if uneven.size:
            raise VolumeError(
                f"{name}: a voxel of the mask is {uneven[0]:g}, no whole number; threshold or round it"
            )
        with np.errstate(invalid="ignore"):
            target[start : start + _CHUNK] = values
    return low, high, labels
