"""Predictions for records on the grids of the records' sources. Source: docs/extract.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from beam_nifti.errors import DatasetError, UsageError
from beam_nifti.volume.grid import Affine, Grid, is_usable
from beam_nifti.volume.rescale import Voxels
from beam_nifti.volume.restoring import restore_classes, restore_voxels

Interpolation: TypeAlias = Literal["nearest", "linear"]

_INTERPOLATIONS: Final = ("nearest", "linear")
_FLOATS: Final = ("float16", "float32", "float64")


def source_grid(name: str, cells: Mapping[str, Any]) -> Grid:
    """The grid of the source of a record.

    Args:
        name: name of the record, for errors.
        cells: its row of the index.

    Raises:
        DatasetError: the index does not have it, or it cannot be one.
    """
    shape, numbers = cells.get("source_shape"), cells.get("source_affine")
    if shape is None or numbers is None:
        raise DatasetError(
            f"{name}: the index has no source_shape and source_affine, because an earlier version wrote "
            "it or the record was not made from an image; build the dataset again from its images"
        )
    affine = np.array(numbers, np.float64).reshape(4, 4)
    if not is_usable(affine) or min(shape) < 1:
        raise DatasetError(
            f"{name}: source_shape {list(shape)} and source_affine of the index do not describe an image; "
            "run beam-nifti verify"
        )
    grid = Grid.of(shape, affine)
    try:
        np.empty(grid.shape, np.float32)  # memory that is not written to takes none
    except (MemoryError, ValueError) as e:  # ValueError: more bytes than an array can have
        raise DatasetError(f"{name}: source_shape {list(shape)} does not fit into memory") from e
    return grid


def record_affine(name: str, cells: Mapping[str, Any]) -> Affine:
    """The affine of a record.

    Raises:
        DatasetError: the index does not have a usable one.
    """
    affine = np.array(cells["affine"] or [np.nan] * 16, np.float64).reshape(4, 4)
    if not is_usable(affine):
        raise DatasetError(
            f"{name} cannot be saved: the record has no usable affine, without which the position of its "
            "voxels is unknown; build the dataset from images, or from Examples with the feature affine"
        )
    return affine


def channels_last(name: str, volume: Voxels, space: tuple[int, ...], channels_first: bool) -> Voxels:
    """A volume of the shape `space`, perhaps with channels, as (X, Y, Z), or (X, Y, Z, C) if C > 1.

    Raises:
        UsageError: it has another shape.
    """
    voxels = np.moveaxis(volume, 0, -1) if channels_first and volume.ndim == 4 else volume
    if voxels.shape[:3] != space or voxels.ndim > 4 or not voxels.size:
        x, y, z = space
        channels = f"(C, {x}, {y}, {z})" if channels_first else f"({x}, {y}, {z}, C)"
        raise UsageError(
            f"{name} has the shape {volume.shape}, expected {space} or {channels}; give one volume, without "
            "a batch axis"
        )
    return voxels[..., 0] if voxels.shape[3:] == (1,) else voxels


def in_stored_dtype(name: str, voxels: Voxels) -> Voxels:
    """The same values: booleans and integers in the smallest dtype that holds them, float16 as float32.

    Raises:
        UsageError: no image can hold the dtype.
    """
    if voxels.dtype.kind in "bui":
        low, high = int(voxels.min()), int(voxels.max())
        return voxels.astype(np.min_scalar_type(high if low >= 0 else min(low, -high - 1)))
    if voxels.dtype.name not in _FLOATS:
        raise UsageError(
            f"{name} has the dtype {voxels.dtype}; convert it, such as by astype('float32') for "
            "probabilities or astype('uint8') for labels"
        )
    return voxels.astype(np.float32) if voxels.dtype == np.float16 else voxels


def restore_prediction(
    name: str,
    voxels: Voxels,
    grid: Grid,
    source: Grid,
    *,
    interpolation: Interpolation | None = None,
    argmax: bool = False,
    fill: float = 0,
) -> Voxels:
    """A prediction on the grid of a source, as `beam_nifti.restore`, which documents the arguments.

    Args:
        name: name of the prediction, for errors.
        voxels: shape (X, Y, Z), or (X, Y, Z, C), as from `channels_last`.
        grid: positions of its voxels.
        source: grid of the result.
        interpolation: same as for `restore`.
        argmax: same as for `restore`.
        fill: same as for `restore`.
    """
    if interpolation not in (None, *_INTERPOLATIONS):
        raise UsageError(f"interpolation is {interpolation!r}; choose one of: {', '.join(_INTERPOLATIONS)}")
    if not isinstance(fill, Real | np.number) or isinstance(fill, bool):
        raise UsageError(f"fill is {fill!r}; give a number")
    voxels = in_stored_dtype(name, voxels)
    is_linear = interpolation == "linear" or (interpolation is None and (argmax or voxels.dtype.kind == "f"))
    if argmax and voxels.ndim < 4:
        raise UsageError(
            f"argmax is True, but {name} has the shape {voxels.shape}, without a channel per class; drop "
            "argmax"
        )
    if is_linear and voxels.dtype.kind != "f":
        voxels = voxels.astype(np.float32 if voxels.dtype.itemsize < 3 else np.float64)
    if argmax or voxels.dtype.kind != "f":
        if not (math.isfinite(fill) and fill == int(fill)):
            raise UsageError(f"fill is {fill}, but the image will hold whole numbers; give a whole number")
        fill = int(fill)
    if argmax:
        return restore_classes(voxels, grid, source, fill, is_linear=is_linear)
    if voxels.dtype.kind != "f":
        wide = np.promote_types(voxels.dtype, np.min_scalar_type(fill))
        if wide.kind == "f":
            raise UsageError(f"fill is {fill}, which {voxels.dtype} cannot hold; give a number that it holds")
        voxels = voxels.astype(wide, copy=False)
    return restore_voxels(voxels, grid, source, fill, is_linear=is_linear)
