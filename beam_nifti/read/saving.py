"""Save what a model makes of a record, such as a prediction, as a NIfTI image in the record's space."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from beam_nifti.errors import OutputError
from beam_nifti.read.records import Records
from beam_nifti.read.restoring import (
    channels_last,
    in_stored_dtype,
    record_affine,
    restore_prediction,
    source_grid,
)
from beam_nifti.storage import paths as storage
from beam_nifti.volume.grid import Grid, agreed_zooms
from beam_nifti.volume.nifti_writer import require_nifti_name, write_nifti
from beam_nifti.volume.rescale import NO_SCALING


def save_nifti(
    records: Records,
    row: int,
    volume: npt.ArrayLike,
    path: str | os.PathLike[str],
    *,
    on_source_grid: bool,
    overwrite: bool,
) -> None:
    """As `Dataset.save_nifti`, for a row of the table."""
    target = storage.absolute(storage.path_text("path", path))
    require_nifti_name(target)
    record = f"record {records.cell('id', row)!r}"
    name, space = f"the volume for {record}", records.shape_of(row)[:3]
    voxels = channels_last(name, np.asarray(volume), space, records.channels_first)
    cells = records.geometry.slice(row, 1).to_pylist()[0]
    affine = record_affine(name, cells)
    if on_source_grid:
        source = source_grid(f"{records.opened.path}: {record}", cells)
        voxels = restore_prediction(name, voxels, Grid.of(space, affine), source)
        affine, (x, y, z) = source.affine, source.zooms
    else:
        voxels = in_stored_dtype(name, voxels)
        x, y, z = agreed_zooms(affine, cells["zooms"] or np.nan).tolist()
    if storage.exists(target):
        if not overwrite:
            raise OutputError(
                f"{target}: already exists; choose another path, or replace it with overwrite=True"
            )
        records.opened.require_no_source(target)
    write_nifti(target, voxels, NO_SCALING, affine, (x, y, z))
