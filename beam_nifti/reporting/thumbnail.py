"""Small views of a volume in anatomical orientation: pictures of its middle slices, and block means."""

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
_WEBP: Final[dict[str, Any]] = {"quality": 80, "method": 4}
_SHARP: Final[dict[str, Any]] = {"lossless": True, "method": 4}
LABEL_COLOURS: Final = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
"""Colours of labels, which repeat after the last one. Source: Okabe and Ito 2008, Color Universal Design,
without black, which is the background of the slices."""

_INSIDE: Final = 96  # of 255, the opacity of a label within its outline


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


def draw_slices(volume: Voxels, zooms: Sequence[float], scaling: Scaling | None = None) -> bytes:
    """A picture of the three middle slices, side by side: axial, coronal, sagittal, on one scale.

    The patient's left is on the left, anterior is up on the axial slice and right on the sagittal one, and
    superior is up on the other two.

    Args:
        volume: (X, Y, Z), or (X, Y, Z, 3) for colours, whose axes point right, anterior and superior.
        zooms: voxel size along each axis, above 0.
        scaling: scaling of the voxels; None if they are the values.

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
    strip = Image.new("RGB" if volume.ndim == 4 else "L", (3 * CELL, CELL))
    for (corner, size), values in zip(_boxes(volume.shape, zooms), slices, strict=True):
        shades = np.clip((values - low) / max(high - low, np.finfo(float).tiny), 0, 1)
        pixels = np.round(255 * shades).astype(np.uint8)
        strip.paste(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR), corner)
    return _encode(strip, _WEBP)


def draw_labels(mask: Voxels, zooms: Sequence[float], labels: Sequence[int]) -> bytes | None:
    """A picture to lay over that of `draw_slices`: each label in its colour, transparent where there is none.

    Args:
        mask: (X, Y, Z), of unsigned integers, whose axes point right, anterior and superior.
        zooms: voxel size along each axis, above 0.
        labels: labels of all masks of the dataset, ascending; 0 is the background.

    Returns:
        A lossless WebP of 3 · CELL × CELL pixels; None if the slices show no label.
    """
    from PIL import Image, ImageColor

    colours = np.array([ImageColor.getrgb(colour) for colour in LABEL_COLOURS], np.uint8)
    known = np.array([label for label in labels if label])
    pixels = np.zeros((CELL, 3 * CELL, 4), np.uint8)
    for ((left, top), size), plane in zip(_boxes(mask.shape, zooms), _PLANES, strict=True):
        shown = Image.fromarray(_middle(mask, *plane).astype(np.int32)).resize(size, Image.Resampling.NEAREST)
        found = np.asarray(shown)
        part = pixels[top : top + size[1], left : left + size[0]]
        part[..., :3] = colours[np.searchsorted(known, found) % len(colours)] if known.size else 0
        part[..., 3] = np.where(_outline(found), 255, _INSIDE)
        part[found == 0] = 0
    return _encode(Image.fromarray(pixels), _SHARP) if pixels.any() else None


def _boxes(shape: Sequence[int], zooms: Sequence[float]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The upper left corner and the size of each slice on the strip, in pixels."""
    extents = [n * zoom for n, zoom in zip(shape[:3], zooms, strict=True)]
    boxes = []
    for number, (across, up) in enumerate(_PLANES):
        width, height = (max(1, round(CELL * extents[axis] / max(extents))) for axis in (across, up))
        boxes.append(((number * CELL + (CELL - width) // 2, (CELL - height) // 2), (width, height)))
    return boxes


def _encode(image: Any, how: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    image.save(file, "WEBP", **how)
    return file.getvalue()


def _middle(volume: Voxels, across: int, up: int) -> Voxels:
    """The middle slice as rows from the top, of pixels from the left."""
    through = 3 - across - up
    middle: Voxels = np.take(volume, volume.shape[through] // 2, axis=through)
    return np.swapaxes(middle, 0, 1)[::-1]


def _outline(labels: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """The pixels that have a neighbour with another label, or are at the edge."""
    padded = np.pad(labels, 1, constant_values=-1)
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    edge: npt.NDArray[np.bool_] = np.any([labels != other for other in neighbours], axis=0)
    return edge
