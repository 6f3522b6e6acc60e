"""Small views of a volume in anatomical orientation: a picture of its middle slices, and block means."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from beam_nifti.volume.rescale import Scaling, Voxels

CELL: Final = 96  # pixels of the square around each slice
GRID: Final = 24  # blocks along each axis of the small grid
_PLANES: Final = ((0, 1), (0, 2), (1, 2))  # axes to the right and up: axial, coronal, sagittal
_WINDOW: Final = (0.5, 99.5)  # percentiles of the slices that are drawn black and white
_MASK_COLOUR: Final = (255, 140, 0)
_WEBP: Final[dict[str, Any]] = {"quality": 80, "method": 4}


def block_means(volume: Voxels, size: int = GRID) -> npt.NDArray[np.float64]:
    """The means of `size` blocks along each axis, float64 (size, size, size).

    The volume is (X, Y, Z), of any real dtype and strides, and is not copied. Along a shorter axis voxels are
    repeated.
    """
    starts, counts = _blocks(volume.shape[0], size)
    slabs = zip(starts.tolist(), counts.tolist(), strict=True)
    # One slab at a time, as numpy converts all that it is given at once.
    means = np.stack([volume[start : start + n].mean(0, dtype=np.float64) for start, n in slabs])
    for axis in (1, 2):
        starts, counts = _blocks(volume.shape[axis], size)
        sums = np.add.reduceat(means, starts, axis=axis)
        means = sums / np.expand_dims(counts, tuple({0, 1, 2} - {axis}))
    return means


def _blocks(length: int, size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The start of each block of an axis, and its number of voxels, at least one."""
    starts = np.arange(size) * length // size
    return starts, np.maximum(np.diff(starts, append=length), 1)


def draw_slices(
    volume: Voxels, zooms: Sequence[float], scaling: Scaling | None = None, *, mask: Voxels | None = None
) -> bytes:
    """A picture of the three middle slices, side by side: axial, coronal, sagittal, on one scale.

    The patient's left is on the left, anterior is up on the axial slice and right on the sagittal one, and
    superior is up on the other two.

    Args:
        volume: (X, Y, Z), or (X, Y, Z, 3) for colours, whose axes point right, anterior and superior.
        zooms: voxel size along each axis, above 0.
        scaling: scaling of the voxels; None if they are the values.
        mask: (X, Y, Z), to draw the outline of what is not 0.

    Returns:
        A WebP of 3 · CELL × CELL pixels.
    """
    from PIL import Image

    scaling = scaling or Scaling()
    slices = [scaling.apply(_middle(volume, *plane)) for plane in _PLANES]
    shown = np.concatenate([s.ravel() for s in slices])
    low, high = np.percentile(shown, _WINDOW)
    if not low < high:  # hardly anything but background, as in a mask of a lesion
        low, high = shown.min(), shown.max()
    extents = [n * zoom for n, zoom in zip(volume.shape[:3], zooms, strict=True)]
    strip = Image.new("RGB" if volume.ndim == 4 or mask is not None else "L", (3 * CELL, CELL))
    for number, (plane, values) in enumerate(zip(_PLANES, slices, strict=True)):
        size = [max(1, round(CELL * extents[axis] / max(extents))) for axis in plane]
        shades = np.clip((values - low) / max(high - low, np.finfo(float).tiny), 0, 1)
        pixels = np.round(255 * shades).astype(np.uint8)
        picture = Image.fromarray(pixels).resize((size[0], size[1]), Image.Resampling.BILINEAR)
        if mask is not None:
            inside = Image.fromarray(_middle(mask, *plane) != 0).resize(
                picture.size, Image.Resampling.NEAREST
            )
            coloured = np.array(picture.convert("RGB"))
            coloured[_outline(np.array(inside))] = _MASK_COLOUR
            picture = Image.fromarray(coloured)
        strip.paste(picture, (number * CELL + (CELL - size[0]) // 2, (CELL - size[1]) // 2))
    file = io.BytesIO()
    strip.save(file, "WEBP", **_WEBP)
    return file.getvalue()


def _middle(volume: Voxels, across: int, up: int) -> Voxels:
    """The middle slice as rows from the top, of pixels from the left."""
    through = 3 - across - up
    middle: Voxels = np.take(volume, volume.shape[through] // 2, axis=through)
    return np.swapaxes(middle, 0, 1)[::-1]


def _outline(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The pixels inside that have a neighbour outside."""
    padded = np.pad(inside, 1)
    within = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~within
