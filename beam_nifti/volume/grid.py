"""The positions of voxels in space, before and after preparation.

The functions that prepare a volume also compute the shape that its header promises, so the two agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, NamedTuple

import nibabel as nib
import numpy as np
import numpy.typing as npt

from beam_nifti.config import RecordConfig, ReferenceGrid
from beam_nifti.errors import VolumeError
from beam_nifti.volume.rescale import Voxels

Shape3 = tuple[int, int, int]
Affine = npt.NDArray[np.float64]  # (4, 4), voxel indices to millimetres in RAS+
_SAME_SPACING: Final = 1e-4  # relative difference of voxel sizes by rounding: headers hold float32

_KEPT_SPACING: Final = 1e-3
"""Relative difference from a requested spacing up to which an axis is not resampled: people and programs
round voxel sizes, 0.9375 mm to 0.938, and resampling to that would only blur."""

_ANISOTROPIC: Final = 3  # quotient of voxel sizes above which nnU-Net resamples one axis separately

_SINGULAR: Final = 1e-4  # smallest volume of a voxel relative to that of a box with its edges

AT_EDGE: Final = 1e-3  # voxels beyond the field of view that are taken for rounding
_ROUNDING: Final = 1e-3  # of the position of a voxel, in voxels: headers hold float32

SAME_PLACE: Final = 0.1
"""Distance of voxel centres, in voxels, up to which two images are at the same position: programs
round affines differently in headers."""


UNTURNED: Final = ((0, 1), (1, 1), (2, 1))  # turns, as of `axes_to`, that change nothing


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Voxel centres in space, of (X, Y, Z) voxels."""

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
        """The grid whose voxel i is at voxel `starts + steps · i` of this one."""
        affine = self.affine.copy()
        affine[:3, :3] *= steps
        affine[:3, 3] += self.affine[:3, :3] @ np.asarray(starts, np.float64)
        return Grid(shape, affine)

    def distance(self, other: Grid) -> float:
        """Largest distance of the voxel centres of two grids of one shape, in millimetres."""
        corners = list(itertools.product(*((0, size - 1) for size in self.shape)))
        apart = nib.affines.apply_affine(self.affine - other.affine, corners)
        return float(np.linalg.norm(apart, axis=1).max())


def is_usable(affine: Affine) -> bool:
    """Whether an affine is finite and gives voxels a volume, so that it is not singular."""
    edges = affine[:3, :3]
    sizes = nib.affines.voxel_sizes(affine)
    if not (np.isfinite(affine).all() and np.isfinite(sizes).all() and sizes.min() > 0):
        return False
    return bool(abs(np.linalg.det(edges / sizes)) > _SINGULAR)


def agreed_zooms(affine: Affine, stated: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The voxel sizes of an affine, or the stated ones along axes where they differ only by rounding."""
    sizes = nib.affines.voxel_sizes(affine)
    zooms: npt.NDArray[np.float64] = np.where(np.isclose(stated, sizes, _SAME_SPACING, 0), stated, sizes)
    return zooms


def require_same_grid(name: str, grid: Grid, first_name: str, first: Grid, *, may_turn: bool) -> None:
    """Refuse an image whose voxels are more than a tenth of the smallest voxel size from the first image's.

    With `may_turn` its axes may be flipped or in another order.
    """
    turns = turns_between(grid, first)
    remedy = f"use --align first, which resamples it to the voxels of {first_name}"
    if turns is not None:
        if may_turn or np.array_equal(turns, UNTURNED):
            return
        codes = f"{orientation_of(grid.affine)}, not {orientation_of(first.affine)}"
        raise VolumeError(
            f"{name}: its voxels are those of {first_name} with axes flipped or in another order ({codes}); "
            "add --orientation RAS, which reorients both without interpolation"
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
    """How to turn the axes of a grid onto another one, as `axes_to`; None if that is impossible."""
    if _is_same(grid, first):
        return np.array(UNTURNED)
    turns: npt.NDArray[Any] = nib.orientations.io_orientation(np.linalg.inv(first.affine) @ grid.affine)
    return turns if not np.isnan(turns).any() and _is_same(turn(grid, turns), first) else None


def _is_same(grid: Grid, first: Grid) -> bool:
    return grid.shape == first.shape and grid.distance(first) <= SAME_PLACE * min(first.zooms)


def orientation_of(affine: Affine) -> str:
    """The directions of the indices, such as "RAS"; "?" for a direction that the affine does not give."""
    return "".join(letter or "?" for letter in nib.aff2axcodes(affine))


def axes_to(grid: Grid, code: str) -> npt.NDArray[Any]:
    """How to turn the axes to an orientation, such as "RAS", or the nearest of an oblique grid.

    Returns:
        For each axis its new place, and 1, or -1 if it is flipped.
    """
    found = nib.orientations.io_orientation(grid.affine)
    if np.isnan(found).any():
        raise VolumeError("the affine gives an axis no direction; repair its sform or qform")
    turns: npt.NDArray[Any] = nib.orientations.ornt_transform(found, nib.orientations.axcodes2ornt(code))
    return turns


def turn_voxels(voxels: Voxels, turns: npt.NDArray[Any]) -> Voxels:
    """A view of voxels of (X, Y, Z) or (X, Y, Z, C) whose first three axes are turned by `axes_to`."""
    view: Voxels = nib.orientations.apply_orientation(voxels, turns)
    return view


def turn_zooms(zooms: Sequence[float], turns: npt.NDArray[Any]) -> tuple[float, float, float]:
    """Voxel sizes of axes turned by the result of `axes_to`."""
    x, y, z = (zooms[axis] for axis in np.argsort(turns[:, 0]))
    return x, y, z


def turn(grid: Grid, turns: npt.NDArray[Any]) -> Grid:
    """The grid with its axes turned by the result of `axes_to`."""
    shape = [0, 0, 0]
    for size, place in zip(grid.shape, turns[:, 0].astype(int), strict=True):
        shape[place] = size
    return Grid.of(shape, grid.affine @ nib.orientations.inv_ornt_aff(turns, grid.shape))


def keeps_spacing(zooms: npt.ArrayLike, spacing: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Whether voxels of these sizes are not resampled to a spacing, for each axis."""
    wanted = np.asarray(spacing)
    return np.asarray(np.abs(zooms - wanted) <= _KEPT_SPACING * wanted)


@dataclass(frozen=True, slots=True, eq=False)
class Resampling:
    """A grid of other voxels along the axes of an old one.

    Attributes:
        old: the old grid.
        grid: the new grid.
        starts: index in the old grid of the first new voxel, along each axis.
        steps: distance of new voxels, in old ones; 1.0 for axes that are kept.
        ratios: numerators and denominators of the steps, if both grids have the same centre; otherwise None.
    """

    old: Grid
    grid: Grid
    starts: tuple[float, float, float]
    steps: tuple[float, float, float]
    ratios: tuple[tuple[int, int], ...] | None = None

    @property
    def is_exact(self) -> bool:
        """Whether each new voxel within the old grid lies on an old one."""
        return self.steps == (1.0, 1.0, 1.0) and all(start.is_integer() for start in self.starts)

    def positions(self, axis: int) -> npt.NDArray[np.float64]:
        """The indices in the old grid of the new voxels along an axis."""
        size, numbers = self.grid.shape[axis], np.arange(self.grid.shape[axis])
        if self.ratios is None:
            return np.asarray(self.starts[axis] + self.steps[axis] * numbers)
        # Rounded once, so that what lies in the middle of two voxels does so exactly.
        numerator, denominator = self.ratios[axis]
        from_centre = (2 * numbers - (size - 1)) * numerator / (2 * denominator)
        return np.asarray((self.old.shape[axis] - 1) / 2 + from_centre)


def respace(grid: Grid, spacing: Sequence[float]) -> Resampling:
    """Another voxel size around the same centre.

    Along an axis of n voxels of size z there are `max(1, round(n · z / spacing))` voxels. An axis whose voxel
    size is within a thousandth of the spacing is kept.
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
    return Resampling(grid, grid.part(starts, (x, y, z), steps), _three(starts), _three(steps))


def coarse_axis(resampling: Resampling) -> int | None:
    """The axis along which voxels are more than three times as long as along another one, beyond rounding.

    Those of the old grid decide, or else those of the new one. None if no axis is that long, or several are.

    Source: `resample_data_or_seg_to_spacing` of nnU-Net v2, whose ANISO_THRESHOLD is 3.
    """
    for grid in (resampling.old, resampling.grid):
        zooms = np.asarray(grid.zooms)
        limit = _ANISOTROPIC * zooms.min()
        if zooms.max() > limit and not keeps_spacing(zooms.max(), limit):
            longest = np.flatnonzero(keeps_spacing(zooms, zooms.max()))
            return int(longest[0]) if longest.size == 1 else None
    return None


def resize(grid: Grid, shape: Shape3) -> Resampling:
    """So many voxels in the same field of view, whose corners stay in place."""
    return _by_ratios(grid, shape, tuple(zip(grid.shape, shape, strict=True)))


def resize_longest(grid: Grid, size: int) -> Resampling:
    """So many voxels along the axis that has most, and fewer along the others, around the same centre.

    Voxel sizes are multiplied by the same factor. Along an axis of n voxels there are
    `max(1, round(n · size / longest))`.
    """
    longest = max(grid.shape)
    x, y, z = (max(1, round(Fraction(n * size, longest))) for n in grid.shape)
    return _by_ratios(grid, (x, y, z), ((longest, size),) * 3)


def _by_ratios(grid: Grid, shape: Shape3, ratios: tuple[tuple[int, int], ...]) -> Resampling:
    steps = [numerator / denominator for numerator, denominator in ratios]
    starts = [
        (old - 1) / 2 - step * (new - 1) / 2 for old, new, step in zip(grid.shape, shape, steps, strict=True)
    ]
    return Resampling(grid, grid.part(starts, shape, steps), _three(starts), _three(steps), ratios)


def _three(numbers: Sequence[float]) -> tuple[float, float, float]:
    x, y, z = numbers
    return x, y, z


def fit(grid: Grid, shape: Shape3) -> tuple[Grid, list[int]]:
    """A grid that is cropped and padded around its centre, and the index in the old grid of its first voxel.

    If the number of voxels to remove or to add is odd, the additional one is at the end of the axis.
    """
    starts = [
        (size - wanted) // 2 if size >= wanted else -((wanted - size) // 2)
        for size, wanted in zip(grid.shape, shape, strict=True)
    ]
    return grid.part(starts, shape), starts


def match_axes(old: Grid, new: Grid) -> tuple[npt.NDArray[Any], Resampling | None]:
    """How to turn the axes of an old grid, as `axes_to`, so that they run along those of a new one.

    Returns:
        The turns, and the new grid as a resampling of the turned one; None if their axes are not parallel.
        Up to a thousandth of a voxel is taken for rounding.
    """
    turns: npt.NDArray[Any] = nib.orientations.io_orientation(np.linalg.inv(new.affine) @ old.affine)
    if np.isnan(turns).any():
        return np.array(UNTURNED), None
    turned = turn(old, turns)
    to_turned = np.linalg.inv(turned.affine) @ new.affine
    lengths = np.array(new.shape) - 1.0
    steps, starts = np.diag(to_turned)[:3].copy(), to_turned[:3, 3].copy()
    drifts = np.abs(to_turned[:3, :3] - np.diag(steps)) @ lengths
    if drifts.max() > _ROUNDING:
        return turns, None
    is_whole = np.abs(steps - 1) * lengths + np.abs(starts - np.rint(starts)) <= _ROUNDING
    steps, starts = np.where(is_whole, 1.0, steps), np.where(is_whole, np.rint(starts), starts)
    return turns, Resampling(turned, new, _three(starts.tolist()), _three(steps.tolist()))


def covers(old: Grid, new: Grid) -> bool:
    """Whether all voxel centres of a new grid are within the field of view of an old one."""
    corners = _corners(np.linalg.inv(old.affine) @ new.affine, [(0, size - 1) for size in new.shape])
    sizes = np.array(old.shape)
    return bool((np.abs(corners - (sizes - 1) / 2) <= sizes / 2 + AT_EDGE).all())


def overlaps(old: Grid, new: Grid) -> bool:
    """Whether the box of all voxel centres of a new grid meets the field of view of an old one.

    Two boxes are apart if they are apart along a normal of a face of one, or along one of an edge of each.
    """
    to_old = np.linalg.inv(old.affine) @ new.affine
    edge = 0.5 + AT_EDGE
    boxes = (
        _corners(np.eye(4), [(-edge, size - 1 + edge) for size in old.shape]),
        _corners(to_old, [(0, size - 1) for size in new.shape]),
    )
    edges, units = to_old[:3, :3].T, np.eye(3)
    pairs = itertools.chain(itertools.product(edges, units), itertools.combinations(edges, 2))
    for normal in (*units, *(np.cross(*pair) for pair in pairs)):
        one, other = (box @ normal for box in boxes)
        if one.max() < other.min() or other.max() < one.min():
            return False
    return True


def _corners(affine: Affine, ends: Sequence[tuple[float, float]]) -> npt.NDArray[np.float64]:
    return np.asarray(nib.affines.apply_affine(affine, list(itertools.product(*ends))))


def reference_grid(reference: ReferenceGrid) -> Grid:
    """The grid of `RecordConfig.reference`."""
    return Grid(reference.shape, np.reshape(np.array(reference.affine, np.float64), (4, 4)))


def require_overlap(grid: Grid, reference: ReferenceGrid) -> None:
    """Refuse a grid that has nothing at the positions of a reference."""
    if not overlaps(grid, reference_grid(reference)):
        raise VolumeError(
            "its field of view does not meet that of --reference; correct its affine, register it to the "
            "reference, or leave it out"
        )


class GridStep(NamedTuple):
    """A preparation: the name of its option, and the grids of a volume before and after it."""

    name: str
    before: Grid
    after: Grid


def prepared_grids(grid: Grid, record: RecordConfig) -> list[GridStep]:
    """The grids of an image in the order of its preparations, up to one that depends on voxels.

    A user's function and the crop to the foreground depend on voxels. The function comes first, so with one
    the list is empty. A crop is followed by `shape` at most, and no step after the crop is listed.

    Raises:
        VolumeError: an image with this affine cannot be prepared.
    """
    steps = list[GridStep]()
    if record.preprocess is not None:
        return steps
    for name, follow in _FOLLOWERS.items():
        value = getattr(record, name)
        if value is None:
            continue
        if name == "crop_foreground":
            return steps
        steps.append(GridStep(name, grid, follow(grid, value)))
        grid = steps[-1].after
    return steps


_FOLLOWERS: Final[Mapping[str, Callable[[Grid, Any], Grid]]] = {
    "orientation": lambda grid, code: turn(grid, axes_to(grid, code)),
    "reference": lambda _, reference: reference_grid(reference),
    "spacing": lambda grid, spacing: respace(grid, spacing).grid,
    "resize": lambda grid, shape: resize(grid, shape).grid,
    "resize_longest": lambda grid, size: fit(resize_longest(grid, size).grid, (size, size, size))[0],
    "crop_foreground": lambda grid, _: grid,
    "shape": lambda grid, shape: fit(grid, shape)[0],
}
"""The grid that follows from another one by each preparation, in order."""


def prepared_shape(shape: tuple[int, ...], affine: Affine, record: RecordConfig) -> tuple[int, ...] | None:
    """The shape of a volume after preparation; None if it depends on voxels or on the user's function."""
    if record.preprocess is not None:  # which may even add channels
        return None
    channels = shape[3:]
    if record.shape is not None:
        return record.shape + channels
    if record.crop_foreground is not None:
        return None
    grid = Grid.of(shape, affine)
    steps = prepared_grids(grid, record)
    return (steps[-1].after if steps else grid).shape + channels
