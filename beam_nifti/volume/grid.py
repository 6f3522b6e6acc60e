"""Where the voxels of a volume lie, and where preparation puts them.

The shape that a header and a configuration promise is computed by the functions that make it, so that
no volume gets another one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import nibabel as nib
import numpy as np
import numpy.typing as npt

from beam_nifti.config import RecordConfig
from beam_nifti.errors import VolumeError
from beam_nifti.volume.rescale import Voxels

Shape3 = tuple[int, int, int]
Affine = npt.NDArray[np.float64]
"""(4, 4), voxel indices to millimetres in RAS+."""

_SAME_SPACING: Final = 1e-4
"""Relative difference of voxel sizes up to which they are one size: headers hold float32."""

_KEPT_SPACING: Final = 1e-3
"""Relative difference from a requested spacing up to which an axis is not resampled: people and programs
round voxel sizes, 0.9375 mm to 0.938, and resampling to that would only blur."""

_SINGULAR: Final = 1e-4
"""Volume of a voxel as a fraction of what its edges would have at right angles, below which it has none."""

SAME_PLACE: Final = 0.1
"""Distance of voxel centres, in voxels, up to which two images lie in one place: headers round affines,
each program its own way."""


UNTURNED: Final = ((0, 1), (1, 1), (2, 1))
"""Turns, as of `axes_to`, that leave all axes as they are."""


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Voxel centres in space.

    Attributes:
        shape: (X, Y, Z).
        affine: of the voxel indices.
    """

    shape: Shape3
    affine: Affine

    @classmethod
    def of(cls, shape: Sequence[int], affine: Affine) -> Grid:
        """The grid of a volume of (X, Y, Z) or (X, Y, Z, T)."""
        x, y, z = shape[:3]
        return cls((x, y, z), affine)

    @property
    def zooms(self) -> tuple[float, float, float]:
        """Distance in millimetres of neighbours along each axis."""
        x, y, z = nib.affines.voxel_sizes(self.affine).tolist()
        return x, y, z

    def part(self, starts: Sequence[float], shape: Shape3, steps: Sequence[float] = (1.0, 1.0, 1.0)) -> Grid:
        """The grid whose voxel i lies where voxel `starts + steps · i` of this one does."""
        affine = self.affine.copy()
        affine[:3, :3] *= steps
        affine[:3, 3] += self.affine[:3, :3] @ np.asarray(starts, np.float64)
        return Grid(shape, affine)

    def distance(self, other: Grid) -> float:
        """How far apart the voxel centres of two grids of one shape are at most, in millimetres."""
        corners = list(itertools.product(*((0, size - 1) for size in self.shape)))
        apart = nib.affines.apply_affine(self.affine - other.affine, corners)
        return float(np.linalg.norm(apart, axis=1).max())


def is_usable(affine: Affine) -> bool:
    """Whether an affine places voxels: it is finite, and gives a voxel a volume, so it is not singular."""
    edges = affine[:3, :3]
    sizes = nib.affines.voxel_sizes(affine)
    if not (np.isfinite(affine).all() and np.isfinite(sizes).all() and sizes.min() > 0):
        return False
    return bool(abs(np.linalg.det(edges / sizes)) > _SINGULAR)


def agreed_zooms(affine: Affine, stated: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The voxel sizes of an affine: along an axis the stated one, where it is the same but for rounding."""
    sizes = nib.affines.voxel_sizes(affine)
    zooms: npt.NDArray[np.float64] = np.where(np.isclose(stated, sizes, _SAME_SPACING, 0), stated, sizes)
    return zooms


def require_same_grid(
    name: str, grid: Grid, first_name: str, first: Grid, *, may_turn: bool, is_mask: bool = False
) -> None:
    """Refuse an image whose voxels are not those of the first one, whose path and grid are given besides.

    With `may_turn` its axes may be flipped or in another order. Labels of a mask must not be interpolated.

    Raises:
        VolumeError: they have other shapes, or voxel centres that are further apart than a tenth of the
            first one's smallest voxel size; or their axes have to be turned, and may not be.
    """
    turns = turns_between(grid, first)
    how = ' with interpolation="nearest"' if is_mask else ""
    remedy = f"resample it to the voxels of {first_name}, such as by nilearn.image.resample_to_img{how}"
    if turns is not None:
        if may_turn or np.array_equal(turns, UNTURNED):
            return
        codes = f"{orientation_of(grid.affine)}, not {orientation_of(first.affine)}"
        raise VolumeError(
            f"{name}: its voxels are those of {first_name} with axes flipped or in another order ({codes}); "
            "add --orientation RAS, which turns both without interpolation"
        )
    if grid.shape != first.shape:
        raise VolumeError(f"{name}: shape {grid.shape} where {first_name} has {first.shape}; {remedy}")
    if np.allclose(grid.zooms, first.zooms, rtol=1e-3):
        remedy = (
            f"if they are the same voxels, copy the affine of {first_name} into its header; else {remedy}"
        )
    raise VolumeError(
        f"{name}: its voxels are up to {grid.distance(first):.3g} mm away from those of {first_name}; "
        f"{remedy}"
    )


def turns_between(grid: Grid, first: Grid) -> npt.NDArray[Any] | None:
    """How the axes of a grid have to be turned so that its voxels are those of another one.

    Returns:
        As `axes_to`; UNTURNED where they are already; None where they are others, however turned.
    """
    if _is_same(grid, first):
        return np.array(UNTURNED)
    turns: npt.NDArray[Any] = nib.orientations.io_orientation(np.linalg.inv(first.affine) @ grid.affine)
    return turns if not np.isnan(turns).any() and _is_same(turn(grid, turns), first) else None


def _is_same(grid: Grid, first: Grid) -> bool:
    return grid.shape == first.shape and grid.distance(first) <= SAME_PLACE * min(first.zooms)


def orientation_of(affine: Affine) -> str:
    """To where each index grows, such as "RAS"; "?" for an axis whose direction the affine does not tell."""
    return "".join(letter or "?" for letter in nib.aff2axcodes(affine))


def axes_to(grid: Grid, code: str) -> npt.NDArray[Any]:
    """How the axes have to be turned to an orientation, such as "RAS".

    Returns:
        For each axis its new place, and 1 or -1 where it is flipped. Of an oblique grid the nearest
        orientation counts.

    Raises:
        VolumeError: the affine does not tell where an axis points.
    """
    found = nib.orientations.io_orientation(grid.affine)
    if np.isnan(found).any():
        raise VolumeError("the affine gives an axis no direction; repair its sform or qform")
    turns: npt.NDArray[Any] = nib.orientations.ornt_transform(found, nib.orientations.axcodes2ornt(code))
    return turns


def turn_voxels(voxels: Voxels, turns: npt.NDArray[Any]) -> Voxels:
    """A view of voxels of (X, Y, Z) or (X, Y, Z, C) with the first three axes turned as `axes_to` says."""
    view: Voxels = nib.orientations.apply_orientation(voxels, turns)
    return view


def turn_zooms(zooms: Sequence[float], turns: npt.NDArray[Any]) -> tuple[float, float, float]:
    """Voxel sizes of axes turned as `axes_to` says."""
    x, y, z = (zooms[axis] for axis in np.argsort(turns[:, 0]))
    return x, y, z


def turn(grid: Grid, turns: npt.NDArray[Any]) -> Grid:
    """The grid with its axes turned as `axes_to` says."""
    shape = [0, 0, 0]
    for size, place in zip(grid.shape, turns[:, 0].astype(int), strict=True):
        shape[place] = size
    return Grid.of(shape, grid.affine @ nib.orientations.inv_ornt_aff(turns, grid.shape))


def keeps_spacing(zooms: npt.ArrayLike, spacing: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Whether voxels of these sizes are not resampled to a spacing, for each axis."""
    wanted = np.asarray(spacing)
    return np.asarray(np.abs(zooms - wanted) <= _KEPT_SPACING * wanted)


def respace(grid: Grid, spacing: Sequence[float]) -> tuple[Grid, list[float], list[float]]:
    """A grid of another voxel size around the same centre.

    Along an axis of n voxels of size z it has `max(1, round(n · z / spacing))` of them. An axis whose
    voxel size is within a thousandth of the spacing stays as it is.

    Returns:
        The grid; and the starts and steps by which it is a part of the former one.

    Raises:
        VolumeError: the affine gives the voxels no size along an axis.
    """
    if not min(grid.zooms) > 0:
        raise VolumeError("the affine gives the voxels no size; repair its sform or qform")
    shape, starts, steps = list(grid.shape), [0.0] * 3, [1.0] * 3
    kept = keeps_spacing(grid.zooms, spacing)
    for axis, (size, zoom, wanted) in enumerate(zip(grid.shape, grid.zooms, spacing, strict=True)):
        if not kept[axis]:
            # First to a thousandth: headers hold float32, and 181 voxels of about 1 mm shall not become 90
            # of 2 mm in one image and 91 in the next.
            shape[axis] = max(1, round(round(size * zoom / wanted, 3)))
            steps[axis] = wanted / zoom
            starts[axis] = (size - 1) / 2 - steps[axis] * (shape[axis] - 1) / 2
    x, y, z = shape
    return grid.part(starts, (x, y, z), steps), starts, steps


def prepared_shape(shape: tuple[int, ...], affine: Affine, record: RecordConfig) -> tuple[int, ...] | None:
    """The shape of a volume after its preparation, from its shape and its affine as loaded.

    Returns:
        None where only the voxels or the user's function can tell.

    Raises:
        VolumeError: the affine does not allow the preparation.
    """
    if record.preprocess is not None:  # which may even add channels
        return None
    channels = shape[3:]
    if record.shape is not None:
        return record.shape + channels
    if record.crop_foreground is not None:
        return None
    grid = Grid.of(shape, affine)
    if record.orientation is not None:
        grid = turn(grid, axes_to(grid, record.orientation))
    if record.spacing is not None:
        grid, _, _ = respace(grid, record.spacing)
    return grid.shape + channels
