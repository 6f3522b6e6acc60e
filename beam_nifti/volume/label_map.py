"""Label maps: numpy in, numpy out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from beam_nifti.volume.rescale import Voxels

_CHUNK: Final = 1 << 16  # voxels that are counted at a time


def labels_of(mask: Voxels) -> list[int]:
    """The labels that occur in a mask, ascending."""
    flat, counts = mask.reshape(-1), np.zeros(np.iinfo(mask.dtype).max + 1, np.int64)
    for start in range(0, flat.size, _CHUNK):
        counts += np.bincount(flat[start : start + _CHUNK], minlength=counts.size)
    found: list[int] = np.flatnonzero(counts).tolist()
    return found


def pick_nearest(
    mask: Voxels, shape: Sequence[int], starts: Sequence[float], steps: Sequence[float]
) -> Voxels:
    """The labels of a 3-D mask at `starts + steps · i`, each that of the nearest voxel, halves up.

    Outside of the mask they are those of its outermost voxels.
    """
    for axis in reversed(range(3)):
        place = np.floor(starts[axis] + steps[axis] * np.arange(shape[axis]) + 0.5).astype(np.intp)
        mask = mask.take(np.clip(place, 0, mask.shape[axis] - 1), axis)
    return mask
