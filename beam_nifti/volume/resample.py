"""Interpolation along the axes of a volume: numpy in, numpy out. Conventions: docs/preparation.md.

New and old voxels are on parallel axes, so a volume is interpolated along one axis after the other, each as a
product with a sparse matrix of a few weights per new voxel. Memory is the result and some slices in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from beam_nifti.volume.grid import Resampling, coarse_axis
from beam_nifti.volume.label_map import nearest, of_each_mask, pick_mixed, pick_nearest
from beam_nifti.volume.rescale import Scaling, Voxels

if TYPE_CHECKING:
    from scipy import sparse

    from beam_nifti.config import RecordConfig

Floats = npt.NDArray[np.float64]

_SLAB_VOXELS: Final = 1 << 11
_SPLINE_VOXELS: Final = 1 << 17  # in a slab of the recursive filter, which takes a call per row of them
_SPLINE_SLICES: Final = 32  # fewest in such a slab, as each needs its neighbours too
_COLUMNS: Final = 1 << 12  # lines that the filter takes at once, so that a row of them stays in the cache

_POLE: Final = math.sqrt(3) - 2
"""Pole of the filter whose result are the coefficients of a cubic B-spline.

Source: M. Unser, "Splines: a perfect fit for signal and image processing", IEEE Signal Processing Magazine 16
(1999), box 2.
"""

_REACH: Final = 28  # voxels beyond which no other matters to a coefficient: _POLE^28 is 1e-16

TRUNCATE: Final = 4.0  # standard deviations at which a Gaussian ends, as in scipy.ndimage


SPLINE_ORDERS: Final = {"nearest": 0, "linear": 1, "cubic": 3}


@dataclass(frozen=True, slots=True)
class Interpolation:
    """How voxels between voxels are computed.

    Attributes:
        image: "nearest", "linear" or "cubic".
        mask: "nearest" or "linear".
        antialias: whether an image is smoothed along the axes that get fewer voxels.
        separate_z: whether nearest neighbours are used along the `coarse_axis`, if there is one.
    """

    image: str = "linear"
    mask: str = "nearest"
    antialias: bool = False
    separate_z: bool = False

    @classmethod
    def of(cls, record: RecordConfig) -> Interpolation:
        """That of a configuration."""
        return cls(
            record.interpolation or "linear",
            record.mask_interpolation or "nearest",
            bool(record.antialias),
            record.separate_z == "auto",
        )

    def positions(self, resampling: Resampling) -> tuple[list[Floats], int | None]:
        """The positions of new voxels along each axis, and the axis of nearest neighbours, if any."""
        positions = list(map(resampling.positions, range(3)))
        axis = coarse_axis(resampling) if self.separate_z else None
        if axis is not None:
            positions[axis] = nearest(positions[axis])
        return positions, axis


LINEAR: Final = Interpolation()


def resample_voxels(
    voxels: Voxels, scaling: Scaling, resampling: Resampling, how: Interpolation
) -> tuple[Voxels, Scaling]:
    """The voxels of a new grid, of shape (X, Y, Z) or (X, Y, Z, C), and their scaling.

    They are float32 in the image's units; those of nearest neighbours keep dtype and scaling.
    """
    positions, separate = how.positions(resampling)
    if how.image == "nearest":
        return pick_nearest(voxels, positions), scaling
    shape, channels = voxels.shape[:3], voxels.shape[3:]
    ways = [LINEAR if axis == separate else how for axis in range(3)]  # exact at whole numbers
    axes = list(map(_axis, shape, positions, resampling.steps, ways))
    frames = voxels.reshape(*shape, -1)
    made = np.empty((*resampling.grid.shape, frames.shape[3]), np.float32)
    # Rescaling refuses what comes of infinite voxels, and of those that float32 cannot hold.
    with np.errstate(over="ignore", invalid="ignore"):
        for frame in range(frames.shape[3]):
            _resample_frame(frames[..., frame], scaling, axes, made[..., frame])
    return made.reshape(resampling.grid.shape + channels), Scaling()


def resample_labels(mask: Voxels, resampling: Resampling, how: Interpolation) -> Voxels:
    """The labels of a new grid, of shape (X, Y, Z) or (X, Y, Z, C)."""
    positions, _ = how.positions(resampling)
    pick = pick_mixed if how.mask == "linear" else pick_nearest
    return of_each_mask(mask, lambda each: pick(each, positions))


@dataclass(frozen=True, slots=True, eq=False)
class _Axis:
    """Interpolation along one axis.

    Attributes:
        weights: weights of each new voxel, of the old voxels, or with `is_spline` of the coefficients of
            their spline, with two more at each end.
        is_spline: whether the weights are those of coefficients.
        smoothing: weights (old size, old size) by which old voxels are smoothed before their coefficients are
            computed; None for none.
    """

    weights: sparse.csr_array
    is_spline: bool = False
    smoothing: sparse.csr_array | None = None

    def apply(self, lines: Floats) -> Floats:
        """Interpolate lines (old size, any), which may be changed."""
        if self.smoothing is not None:
            lines = self.smoothing @ lines
        made: Floats = self.weights @ (_coefficients(lines) if self.is_spline else lines)
        return made


def _axis(size: int, positions: Floats, step: float, how: Interpolation) -> _Axis:
    is_whole = np.array_equal(positions, np.rint(positions))  # where splines are the voxels themselves
    smoothing = smoothing_weights(size, (step - 1) / 2) if how.antialias and step > 1.0 else None
    if how.image == "cubic" and not is_whole:
        return _Axis(spline_weights(size, positions), True, smoothing)
    weights = linear_weights(size, positions)
    return _Axis(weights if smoothing is None else weights @ smoothing)


def _resample_frame(voxels: Voxels, scaling: Scaling, axes: list[_Axis], made: Voxels) -> None:
    """Interpolate voxels (X, Y, Z) into an array: x first, slice by slice, then y and z of each slab."""
    largest = max(math.prod(voxels.shape[1:]), math.prod(made.shape[1:]))
    if not axes[0].is_spline:
        slabs = _SPLINE_VOXELS if any(axis.is_spline for axis in axes) else _SLAB_VOXELS
        for xs in split_slices(made.shape[0], largest, slabs):
            made[xs] = _along_y_and_z(_weighted(axes[0].weights, xs, voxels, scaling), axes)
        return
    for xs in split_slices(made.shape[0], largest, _SPLINE_VOXELS, _SPLINE_SLICES):
        slab = _along_x(axes[0], xs, voxels, scaling)
        for part in split_slices(len(slab), largest, _SPLINE_VOXELS):
            made[xs][part] = _along_y_and_z(slab[part], axes)


def _along_y_and_z(slab: Floats, axes: list[_Axis]) -> Floats:
    """Interpolate slices (x, old Y, old Z) to (x, new Y, new Z)."""
    count, size_y, size_z = slab.shape
    along_y = axes[1].apply(slab.swapaxes(0, 1).reshape(size_y, -1))
    turned = along_y.reshape(along_y.shape[0], -1, size_z).T
    along_z = axes[2].apply(turned.reshape(size_z, -1))
    return along_z.reshape(along_z.shape[0], count, -1).transpose(1, 2, 0)


def _weighted(weights: sparse.csr_array, rows: slice, slices: Voxels, scaling: Scaling) -> Floats:
    """Sums of a few slices each, by some rows of their weights, as float64 (rows, Y, Z)."""
    begins = weights.indptr[rows.start : rows.stop + 1]
    counts, begins = np.diff(begins), begins[:-1]
    totals = np.zeros((len(begins), *slices.shape[1:]))
    if len(begins) == 1:  # without copies of large slices
        for at in range(begins[0], begins[0] + counts[0]):
            totals[0] += weights.data[at] * scaling.apply(slices[weights.indices[at]])
        return totals
    for which in range(counts.max()):
        places = np.flatnonzero(counts > which)
        at = begins[places] + which
        values = scaling.apply(slices[weights.indices[at]])
        totals[places] += weights.data[at, np.newaxis, np.newaxis] * values
    return totals


def _along_x(axis: _Axis, rows: slice, slices: Voxels, scaling: Scaling) -> Floats:
    """As `_weighted`, by weights of spline coefficients, which are computed from the slices around."""
    chosen = axis.weights[rows]
    first = max(0, int(chosen.indices.min()) - 2 - _REACH)
    last = min(len(slices), int(chosen.indices.max()) - 1 + _REACH)
    smoothing = None if axis.smoothing is None else axis.smoothing[first:last]
    part = _Axis(chosen[:, first : last + 4], True, smoothing)
    if smoothing is not None:
        first, last = int(smoothing.indices.min()), int(smoothing.indices.max()) + 1
        part = replace(part, smoothing=smoothing[:, first:last])
    made = np.empty((chosen.shape[0], *slices.shape[1:]))
    for ys in split_slices(slices.shape[1], slices.shape[2], _COLUMNS):
        lines = scaling.apply(slices[first:last, ys])
        made[:, ys] = part.apply(lines.reshape(last - first, -1)).reshape(made[:, ys].shape)
    return made


def split_slices(
    num_slices: int, slice_voxels: int, voxels: int = _SLAB_VOXELS, least: int = 1
) -> Iterator[slice]:
    """Slices to handle at once: one, or several where they are small, as calls take longer than those."""
    step = max(least, voxels // slice_voxels)
    return (slice(start, min(start + step, num_slices)) for start in range(0, num_slices, step))


def linear_weights(size: int, positions: Floats) -> sparse.csr_array:
    """The weights of a linear interpolation, float64 (new size, old size), as `numpy.interp`, bit for bit.

    Args:
        size: old size.
        positions: indices in the line of the new voxels.
    """
    places = np.clip(positions, 0, size - 1)
    below = np.floor(places)
    shares = places - below
    columns = np.stack([below, np.minimum(below + 1, size - 1)])
    return _sparse_rows(np.stack([1 - shares, shares]), columns, size)


def spline_weights(size: int, positions: Floats) -> sparse.csr_array:
    """The weights of a cubic B-spline, float64 (new size, old size + 4), of the result of `_coefficients`."""
    places = np.clip(positions, -1, size)
    below = np.clip(np.floor(places), -1, size - 1)
    t = places - below
    u = 1 - t
    # Products, as the last bit of numpy's powers depends on the processor.
    shares = [u * u * u / 6, (4 - 3 * t * t * (2 - t)) / 6, (4 - 3 * u * u * (2 - u)) / 6, t * t * t / 6]
    return _sparse_rows(np.stack(shares), below + 1 + np.arange(4)[:, np.newaxis], size + 4)


def smoothing_weights(size: int, deviation: float) -> sparse.csr_array:
    """The weights of a Gaussian, float64 (size, size), as `scipy.ndimage.gaussian_filter1d` by "nearest".

    Args:
        size: voxels in the line.
        deviation: standard deviation in voxels, above 0.
    """
    shares = gaussian(deviation)
    offsets = np.arange(len(shares)) - len(shares) // 2
    columns = np.clip(np.arange(size) + offsets[:, np.newaxis], 0, size - 1)
    return _sparse_rows(np.tile(shares[:, np.newaxis], size), columns, size)


def gaussian(deviation: float) -> Floats:
    """The weights of a Gaussian around its middle, which sum to 1, up to four standard deviations.

    They are rounded to 2^-40, so that the last bit of an exponential, which depends on the processor, makes
    no difference.
    """
    radius = int(TRUNCATE * deviation + 0.5)
    shares = [math.exp(-0.5 * (offset / deviation) ** 2) for offset in range(-radius, radius + 1)]
    return np.rint(np.ldexp(np.array(shares) / math.fsum(shares), 40)) / (1 << 40)


def _sparse_rows(shares: Floats, columns: Floats, size: int) -> sparse.csr_array:
    """A sparse matrix whose row i has `shares[:, i]` at `columns[:, i]`, float64 (rows, size)."""
    from scipy import sparse  # 0.15 s, which no other build shall wait for

    rows = np.tile(np.arange(shares.shape[1], dtype=np.int32), len(shares))
    cells = (shares.reshape(-1), (rows, columns.astype(np.int32).reshape(-1)))
    matrix = sparse.coo_array(cells, (shares.shape[1], size)).tocsr()
    matrix.eliminate_zeros()
    return matrix


def _coefficients(lines: Floats) -> Floats:
    """The coefficients of the cubic B-splines through lines (size, any), with two more at each end.

    Beyond its ends, a line continues with its outermost values for ever; so does the spline, whose
    coefficients there come to these values by a factor of `_POLE` from each to the next.
    """
    size, z = len(lines), _POLE
    made = np.empty((size + 4, lines.shape[1]))
    inner, row = made[2:-2], np.empty(lines.shape[1])
    np.multiply(lines, 6.0, out=inner)
    inner[0] /= 1 - z
    for k in range(1, size):
        inner[k] += np.multiply(inner[k - 1], z, out=row)
    inner[-1] = z / (1 - z * z) * ((1 - z) * lines[-1] - inner[-1])
    for k in range(size - 2, -1, -1):
        np.subtract(inner[k + 1], inner[k], out=inner[k])
        inner[k] *= z
    for end, step in ((2, -1), (size + 1, 1)):
        edge = lines[0 if step < 0 else -1]
        for k in (1, 2):
            made[end + k * step] = edge + z**k * (made[end] - edge)
    return made
