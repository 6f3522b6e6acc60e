"""Bring what was made of a prepared volume back to the grid of its source image.

Positions in space decide, so it does not matter which steps prepared the volume. Source: docs/extract.md,
"On the grid of the source".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from beam_nifti.volume.grid import Affine, Grid
from beam_nifti.volume.rescale import Voxels

_SAME: Final = 1e-3
"""Distance of voxel centres, in voxels, up to which they are at the same position."""

_DECIMALS: Final = 6
"""Decimals of positions in voxels: rounding errors of an affine shall not decide which voxel is nearest."""

_SLAB_VOXELS: Final = 1 << 20

_Positions = npt.NDArray[np.float64]
_Take = Callable[[Voxels], Voxels]


def restore_voxels(
    voxels: Voxels, grid: Grid, source: Grid, fill: float | Voxels, *, is_linear: bool
) -> Voxels:
    """The value of a volume at each voxel of its source.

    Args:
        voxels: shape (X, Y, Z), or (X, Y, Z, C), on `grid`; floats if `is_linear`. Not modified.
        grid: positions of the voxels.
        source: positions of the voxels of the result.
        fill: value where the source lies outside the volume, or one for each channel. The dtype must be able
            to hold it.
        is_linear: whether to interpolate linearly; otherwise the nearest voxel counts, halves up. Within half
            a voxel of the border, the outermost voxel counts.

    Returns:
        The same dtype, on the grid of the source. Where its voxel centres are those of the volume, the values
        are those of the volume, bit for bit.
    """
    restored = np.full((*source.shape, *voxels.shape[3:]), fill, voxels.dtype)
    for part in _parts(grid, source, is_linear=is_linear):
        restored[part.xs][part.inside] = part.take(voxels)
    return restored


def restore_classes(voxels: Voxels, grid: Grid, source: Grid, fill: int, *, is_linear: bool) -> Voxels:
    """The class of the largest value at each voxel of the source: the argmax of the restored volume.

    Arguments are those of `restore_voxels`, for voxels of shape (X, Y, Z, C). Returns integers in the
    smallest dtype that holds the classes and `fill`. The restored volume, which may be large, is never in
    memory.
    """
    count = voxels.shape[3]
    dtype = np.promote_types(np.min_scalar_type(count - 1), np.min_scalar_type(fill))
    classes = np.full(source.shape, fill, dtype)
    for part in _parts(grid, source, is_linear=is_linear):
        classes[part.xs][part.inside] = np.argmax(part.take(voxels), -1)
    return classes


@dataclass(frozen=True, slots=True)
class _Part:
    """A slab of the source.

    Attributes:
        xs: slices of the source.
        inside: which voxels of the slab are inside the volume, as an index.
        take: function from a volume to its values at these voxels.
    """

    xs: slice
    inside: Any
    take: _Take


def _parts(grid: Grid, source: Grid, *, is_linear: bool) -> Iterator[_Part]:
    to_voxels = np.linalg.inv(grid.affine) @ source.affine
    step = max(1, _SLAB_VOXELS // max(1, math.prod(source.shape[1:])))
    aligned = _along_axes(to_voxels, grid, source)
    for start in range(0, source.shape[0], step):
        xs = slice(start, min(start + step, source.shape[0]))
        yield (
            _part_along(*aligned, xs, is_linear)
            if aligned
            else _part_across(to_voxels, grid, source, xs, is_linear)
        )


def _along_axes(
    to_voxels: Affine, grid: Grid, source: Grid
) -> tuple[list[int], list[_Positions], Grid] | None:
    """For each axis of the source, the axis of the volume along which it runs, and positions along that axis.

    None if the axes of the two are not parallel.
    """
    axes: list[int] = np.abs(to_voxels[:3, :3]).argmax(0).tolist()
    reach = np.abs(to_voxels[:3, :3]) * (np.array(source.shape) - 1)
    reach[axes, range(3)] = 0
    if sorted(axes) != [0, 1, 2] or reach.sum(1).max() > _SAME:
        return None
    found = []
    for number, (axis, size) in enumerate(zip(axes, source.shape, strict=True)):
        positions = to_voxels[axis, number] * np.arange(size) + to_voxels[axis, 3]
        whole = np.rint(positions)
        is_same = np.abs(positions - whole).max() <= _SAME
        found.append(whole if is_same else positions.round(_DECIMALS))
    return axes, found, grid


def _part_along(
    axes: list[int], positions: list[_Positions], grid: Grid, xs: slice, is_linear: bool
) -> _Part:
    """A slab whose axes are parallel to those of the volume, so that one axis is handled after the other."""
    inside, within = list[slice](), list[_Positions]()
    for axis, along in zip(axes, [positions[0][xs], *positions[1:]], strict=True):
        (numbers,) = np.nonzero(_is_inside(along, grid.shape[axis]))
        kept = slice(numbers[0], numbers[-1] + 1) if numbers.size else slice(0)
        inside.append(kept)
        within.append(along[kept])

    def take(voxels: Voxels) -> Voxels:
        taken = voxels.transpose(*axes, *range(3, voxels.ndim))
        for axis, along in enumerate(within):
            taken = _take_along(taken, along, axis, is_linear)
        return np.asarray(taken)

    return _Part(xs, tuple(inside), take)


def _is_inside(positions: _Positions, size: int) -> npt.NDArray[np.bool_]:
    return (positions >= -0.5) & (positions <= size - 0.5)


def _take_along(voxels: Voxels, positions: _Positions, axis: int, is_linear: bool) -> Voxels:
    last = voxels.shape[axis] - 1
    nearest = np.floor(positions + 0.5)
    if not is_linear or np.array_equal(nearest, positions):
        return voxels.take(nearest.clip(0, last).astype(np.intp), axis)
    positions = positions.clip(0, last)
    below = np.floor(positions).astype(np.intp)
    shares = (positions - below).astype(voxels.dtype)
    low, high = voxels.take(below, axis), voxels.take(np.minimum(below + 1, last), axis)
    high -= low
    high *= shares.reshape(-1, *[1] * (voxels.ndim - axis - 1))
    high += low
    return np.asarray(high)


def _part_across(to_voxels: Affine, grid: Grid, source: Grid, xs: slice, is_linear: bool) -> _Part:
    """A slab whose axes have any directions in the volume, so that every voxel has a position of its own."""
    numbers = np.indices((xs.stop - xs.start, *source.shape[1:]), np.float64)
    numbers[0] += xs.start
    positions = np.tensordot(to_voxels[:3, :3], numbers, 1) + to_voxels[:3, 3].reshape(3, 1, 1, 1)
    positions = positions.round(_DECIMALS)
    inside = np.logical_and.reduce([_is_inside(*each) for each in zip(positions, grid.shape, strict=True)])
    points = positions[:, inside]

    def take(voxels: Voxels) -> Voxels:
        if not is_linear:
            nearest = np.floor(points + 0.5).astype(np.intp)
            picked: Voxels = voxels[tuple(map(np.minimum, nearest, np.array(grid.shape) - 1))]
            return picked
        from scipy import ndimage  # slow to load

        channels = voxels.reshape(*grid.shape, -1)
        taken = np.empty((points.shape[1], channels.shape[3]), voxels.dtype)
        for number in range(channels.shape[3]):
            ndimage.map_coordinates(channels[..., number], points, taken[:, number], 1, "nearest")
        return taken.reshape(-1, *voxels.shape[3:])

    return _Part(xs, inside, take)
