"""Voxels of one grid at the positions of another one in space: numpy in, numpy out.

Grids with parallel axes are interpolated along these axes, as by `volume.resample`; others block by block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import nibabel as nib
import numpy as np
import numpy.typing as npt

from beam_nifti.volume.grid import AT_EDGE, Affine, Grid, Resampling, match_axes, turn_voxels
from beam_nifti.volume.label_map import pick_nearest
from beam_nifti.volume.resample import (
    SPLINE_ORDERS,
    TRUNCATE,
    Floats,
    Interpolation,
    gaussian,
    resample_labels,
    resample_voxels,
    split_slices,
)
from beam_nifti.volume.rescale import Scaling, Voxels

_SLAB_VOXELS: Final = 1 << 20
_BLOCK: Final = 96  # voxels along an axis of a block that is interpolated at once
_SPLINE_MARGIN: Final = 20  # voxels around it: what lies beyond changes a spline by 4e-12 of it
_LABEL_VOXELS: Final = 1 << 16
_SAME_SHARE: Final = 1e-9  # difference of shares that rounding may make
_Box = tuple[slice, slice, slice]


def align_voxels(
    voxels: Voxels, scaling: Scaling, old: Grid, new: Grid, how: Interpolation, *, each: bool = False
) -> tuple[Voxels, Scaling]:
    """The voxels of a new grid, of shape (X, Y, Z) or (X, Y, Z, C), and their scaling.

    Beyond the field of view of the old grid they are the least value of the voxels, or with `each` of each
    channel. They are float32 in the image's units. Those of nearest neighbours keep dtype and scaling, as do
    voxels that lie on those of the old grid.
    """
    how = replace(how, separate_z=False)
    ufunc = np.fmin if scaling.slope > 0 else np.fmax  # of NaN and a number the number
    least = ufunc.reduce(voxels, axis=(0, 1, 2) if each else None)
    turns, resampling = match_axes(old, new)
    if resampling is None:
        made, now = _interpolate_oblique(voxels, scaling, old, new, how, turns)
    elif resampling.is_exact:
        made, now = pick_nearest(turn_voxels(voxels, turns), _positions(resampling)), scaling
    else:
        made, now = resample_voxels(turn_voxels(voxels, turns), scaling, resampling, how)
    value = least if now == scaling else scaling.apply(np.asarray(least))
    _fill(made, value, old, new, resampling)
    return made, now


def align_labels(mask: Voxels, old: Grid, new: Grid, how: Interpolation) -> Voxels:
    """The labels of a new grid, of shape (X, Y, Z); 0 beyond the field of view of the old one."""
    how = replace(how, separate_z=False)
    turns, resampling = match_axes(old, new)
    if resampling is None:
        made = _label_oblique(mask, old, new, how)
    elif resampling.is_exact:
        made = pick_nearest(turn_voxels(mask, turns), _positions(resampling))
    else:
        made = resample_labels(np.asarray(turn_voxels(mask, turns)), resampling, how)
    _fill(made, 0, old, new, resampling)
    return made


def loses_labels(mask: Voxels, old: Grid, new: Grid) -> bool:
    """Whether a labelled voxel of a mask lies beyond the field of view of a new grid."""
    to_new = np.linalg.inv(new.affine) @ old.affine
    for xs in split_slices(len(mask), math.prod(mask.shape[1:]), _LABEL_VOXELS):
        indices = np.argwhere(mask[xs])[:, :3]
        indices[:, 0] += xs.start
        places = nib.affines.apply_affine(to_new, indices)
        if any(_is_beyond(places[:, axis], new.shape[axis]).any() for axis in range(3)):
            return True
    return False


def _positions(resampling: Resampling) -> list[Floats]:
    return [resampling.positions(axis) for axis in range(3)]


def _is_beyond(positions: Floats, size: int) -> npt.NDArray[np.bool_]:
    """Whether positions are more than half a voxel from the outermost voxel centres of an axis."""
    return np.asarray(np.abs(positions - (size - 1) / 2) > size / 2 + AT_EDGE)


def _fill(made: Voxels, value: Any, old: Grid, new: Grid, resampling: Resampling | None) -> None:
    """Set the voxels beyond the field of view of the old grid."""
    if resampling is not None:
        for axis, positions in enumerate(_positions(resampling)):
            made[(slice(None),) * axis + (_is_beyond(positions, resampling.old.shape[axis]),)] = value
        return
    to_old = np.linalg.inv(old.affine) @ new.affine
    x, y, z = (np.arange(size) for size in new.shape)
    for xs in split_slices(new.shape[0], math.prod(new.shape[1:]), _SLAB_VOXELS):
        slab = made[xs]
        for axis, (a, b, c, start) in enumerate(to_old[:3]):
            positions = start + a * x[xs, np.newaxis, np.newaxis] + b * y[:, np.newaxis] + c * z
            slab[_is_beyond(positions, old.shape[axis])] = value


def _blocks(old: Grid, new: Grid, margins: npt.NDArray[Any]) -> Iterator[tuple[_Box, _Box, Affine]]:
    """Blocks of a new grid, the old voxels that each depends on, and the affine from the one to the other.

    Args:
        old: the old grid.
        new: the new grid.
        margins: voxels along each old axis that are needed around the positions of the new ones.
    """
    to_old = np.linalg.inv(old.affine) @ new.affine
    last = np.array(old.shape) - 1
    along_x, along_y, along_z = (list(split_slices(size, 1, _BLOCK)) for size in new.shape)
    for block in itertools.product(along_x, along_y, along_z):
        moved = to_old.copy()
        moved[:3, 3] += to_old[:3, :3] @ [part.start for part in block]
        ends = [part.stop - part.start - 1 for part in block]
        corners = nib.affines.apply_affine(moved, list(itertools.product(*((0, end) for end in ends))))
        first = np.clip(np.floor(corners.min(axis=0)) - margins, 0, last).astype(int)
        stop = np.clip(np.ceil(corners.max(axis=0)) + margins, 0, last).astype(int) + 1
        moved[:3, 3] -= first
        x, y, z = map(slice, first.tolist(), stop.tolist())
        yield block, (x, y, z), moved


def _interpolate_oblique(
    voxels: Voxels, scaling: Scaling, old: Grid, new: Grid, how: Interpolation, turns: npt.NDArray[Any]
) -> tuple[Voxels, Scaling]:
    from scipy import ndimage

    order = SPLINE_ORDERS[how.image]
    factors = np.asarray(new.zooms)[turns[:, 0].astype(int)] / old.zooms
    deviations = np.maximum(0, (factors - 1) / 2) if how.antialias else np.zeros(3)
    margins = np.ceil(TRUNCATE * deviations) + (_SPLINE_MARGIN if order > 1 else order) + 1
    frames = voxels.reshape(*old.shape, -1)
    made = np.empty((*new.shape, frames.shape[3]), np.float32 if order else voxels.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        for block, box, moved in _blocks(old, new, margins):
            for frame in range(frames.shape[3]):
                part = frames[(*box, frame)]
                if order:
                    part = scaling.apply(part)
                for axis in np.flatnonzero(deviations):
                    part = ndimage.correlate1d(part, gaussian(deviations[axis]), axis, mode="nearest")
                target = made[(*block, frame)]
                target[...] = ndimage.affine_transform(
                    part, moved[:3, :3], moved[:3, 3], target.shape, order=order, mode="nearest"
                )
    return made.reshape(new.shape + voxels.shape[3:]), Scaling() if order else scaling


def _label_oblique(mask: Voxels, old: Grid, new: Grid, how: Interpolation) -> Voxels:
    from scipy import ndimage

    made = np.empty(new.shape, mask.dtype)
    for block, box, moved in _blocks(old, new, np.full(3, 2)):
        part, matrix, start, shape = mask[box], moved[:3, :3], moved[:3, 3], made[block].shape
        if how.mask == "nearest":
            made[block] = ndimage.affine_transform(part, matrix, start, shape, order=0, mode="nearest")
            continue
        best = np.zeros(shape)
        for label in np.unique(part):
            only = (part == label).astype(np.float64)
            share = ndimage.affine_transform(only, matrix, start, shape, order=1, mode="nearest")
            wins = share >= best - _SAME_SHARE
            made[block][wins] = label
            np.maximum(best, share, out=best)
    return made
