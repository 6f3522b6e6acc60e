"""Save what a model makes of a record, such as a prediction, as a NIfTI image in the record's space."""

from __future__ import annotations

import os
from typing import Final

import numpy as np
import numpy.typing as npt

from beam_nifti.errors import DatasetError, OutputError, UsageError
from beam_nifti.read.records import Records
from beam_nifti.storage import paths as storage
from beam_nifti.volume.grid import agreed_zooms, is_usable
from beam_nifti.volume.nifti_writer import require_nifti_name, write_nifti
from beam_nifti.volume.rescale import NO_SCALING, Voxels

_FLOATS: Final = ("float16", "float32", "float64")


def save_nifti(
    records: Records, row: int, volume: npt.ArrayLike, path: str | os.PathLike[str], overwrite: bool
) -> None:
    """As `Dataset.save_nifti`, for a row of the table."""
    target = storage.absolute(storage.path_text("path", path))
    require_nifti_name(target)
    name = f"the volume for record {records.cell('id', row)!r}"
    voxels = _in_stored_dtype(name, _channels_last(name, np.asarray(volume), records, row))
    cells = records.geometry.slice(row, 1).to_pylist()[0]
    affine = np.array(cells["affine"] or [np.nan] * 16, np.float64).reshape(4, 4)
    if not is_usable(affine):
        raise DatasetError(
            f"{name} cannot be saved: the record has no usable affine, without which the position of its "
            "voxels is unknown; build the dataset from images, or from Examples with the feature affine"
        )
    x, y, z = agreed_zooms(affine, cells["zooms"] or np.nan).tolist()
    if storage.exists(target):
        if not overwrite:
            raise OutputError(
                f"{target}: already exists; choose another path, or replace it with overwrite=True"
            )
        records.opened.require_no_source(target)
    write_nifti(target, voxels, NO_SCALING, affine, (x, y, z))


def _channels_last(name: str, volume: Voxels, records: Records, row: int) -> Voxels:
    """The volume as (X, Y, Z), or as (X, Y, Z, C) if it has several channels."""
    space = records.shape_of(row)[:3]
    voxels = np.moveaxis(volume, 0, -1) if records.channels_first and volume.ndim == 4 else volume
    if voxels.shape[:3] != space or voxels.ndim > 4 or not voxels.size:
        x, y, z = space
        channels = f"(C, {x}, {y}, {z})" if records.channels_first else f"({x}, {y}, {z}, C)"
        raise UsageError(
            f"{name} has the shape {volume.shape}, expected {space} or {channels}; give one volume, without "
            "a batch axis"
        )
    return voxels[..., 0] if voxels.shape[3:] == (1,) else voxels


def _in_stored_dtype(name: str, voxels: Voxels) -> Voxels:
    """The same values: booleans and integers in the smallest dtype that holds them, float16 as float32."""
    if voxels.dtype.kind in "bui":
        low, high = int(voxels.min()), int(voxels.max())
        return voxels.astype(np.min_scalar_type(high if low >= 0 else min(low, -high - 1)))
    if voxels.dtype.name not in _FLOATS:
        raise UsageError(
            f"{name} has the dtype {voxels.dtype}; convert it, such as by astype('float32') for "
            "probabilities or astype('uint8') for labels"
        )
    return voxels.astype(np.float32) if voxels.dtype == np.float16 else voxels
