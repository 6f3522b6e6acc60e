"""Brings a prediction back to the grid of the image that it was made for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from beam_nifti.errors import UsageError
from beam_nifti.inspection.description import describe_records
from beam_nifti.inspection.preparation import PreparedVolume
from beam_nifti.read.random_access import Dataset
from beam_nifti.read.restoring import (
    Interpolation,
    channels_last,
    record_affine,
    restore_prediction,
    source_grid,
)
from beam_nifti.storage import paths as storage
from beam_nifti.volume.grid import Grid
from beam_nifti.volume.nifti_writer import make_image
from beam_nifti.volume.rescale import NO_SCALING

if TYPE_CHECKING:
    import nibabel as nib

Path: TypeAlias = "str | os.PathLike[str]"


def restore(
    prediction: npt.ArrayLike,
    like: PreparedVolume | tuple[Path | Dataset, str],
    *,
    interpolation: Interpolation | None = None,
    argmax: bool = False,
    fill: float = 0,
) -> nib.Nifti1Image | nib.Nifti2Image:
    """Bring a prediction for a volume back to the grid of the volume's source.

    The positions of the voxels in space decide, so cropping, padding, reorientation, resampling and changes
    of the affine by a function of `preprocess` are all undone. If axes were only turned, cropped or padded,
    the voxels of the result are those of the prediction, bit for bit.

    Args:
        prediction: voxels in the shape of the record. It may have a channel axis, which is where the images
            have it.
        like: what the prediction was made for: the result of `Preparation.apply`, or a dataset (its path, or
            a `Dataset`) and the id of the record.
        interpolation: "nearest" or "linear", for the axes that were resampled. Default: "nearest" for
            booleans and integers, which are labels, and "linear" for floats, such as probabilities.
        argmax: whether to return the number of the channel with the largest value, found after interpolation.
        fill: value of the voxels that the record does not cover, in every channel.

    Returns:
        An image with shape and affine of the source; 4-D if the prediction has several channels. Booleans and
        integers are in the smallest dtype that holds them, and floats in their own; float16 becomes float32.

    Raises:
        UsageError: the prediction has another shape, or a dtype that no image can hold, or another argument
            is not valid.
        DatasetError: there is no complete dataset, it has no such record, or its index does not have the grid
            of the source.
    """
    if isinstance(like, PreparedVolume):
        volume = like.volume
        name, is_first = f"the prediction for {volume.row.path}", like.channels_first
        grid = Grid.of(volume.voxels.shape, volume.affine)
        source = Grid.of(volume.source.shape, np.array(volume.source.affine).reshape(4, 4))
    else:
        name, grid, source, is_first = _find(like)
    voxels = channels_last(name, np.asarray(prediction), grid.shape, is_first)
    voxels = restore_prediction(
        name, voxels, grid, source, interpolation=interpolation, argmax=argmax, fill=fill
    )
    return make_image(voxels, NO_SCALING, source.affine, source.zooms)


def _find(like: object) -> tuple[str, Grid, Grid, bool]:
    """Name, grid, and grid of the source of a record, and whether its channel axis is the first."""
    if not (isinstance(like, tuple) and len(like) == 2 and isinstance(like[1], str)):
        raise UsageError(
            f"like is {like!r:.80}; give what Preparation.apply returned, or a dataset and the id of a record"
        )
    dataset, example_id = like
    if isinstance(dataset, Dataset):
        path, cells, is_first = dataset.path, dataset.geometry_of(example_id), dataset.channels_first
    else:
        path, is_first = storage.absolute(storage.path_text("like", dataset)), False
        (cells,) = describe_records(path, [example_id])
    name = f"{path}: record {example_id!r}"
    grid = Grid.of(cells["shape"], record_affine(f"the prediction for {name}", cells))
    return f"the prediction for {name}", grid, source_grid(name, cells), is_first
