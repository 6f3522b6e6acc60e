"""Label maps: numpy in, numpy out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from beam_nifti.volume.rescale import Voxels

_CHUNK: Final = 1 << 16  # voxels that are counted at a time
_POSITIONS: Final = 64  # of each label
_MOST_POSITIONS: Final = 4096  # of all labels; one of each where there are more of those
_BITS: Final = 16
_GOLDEN: Final = 40503  # 2^16 by the golden ratio: its multiples are spread evenly, however many there are


def labels_of(mask: Voxels) -> list[int]:
    """The labels that occur in a mask, ascending."""
    found: list[int] = np.flatnonzero(_count(mask)).tolist()
    return found


def positions_of(mask: Voxels) -> list[int]:
    """The positions of some voxels of each label except 0, spread over all that have it.

    Returns:
        Numbers of voxels in C order: as many for each label, one label after the other, in ascending order.
        They are 64 of each, or fewer where the mask has more than 64 labels. Where fewer voxels have a label,
        some are there several times.

    Source: docs/format.md, "Positions".
    """
    totals = _count(mask)
    labels = np.flatnonzero(totals)
    labels = labels[labels > 0]
    count = max(1, min(_POSITIONS, _MOST_POSITIONS // max(1, labels.size)))
    steps = np.arange(count)
    # One of each of `count` equal parts of them, at another place in each part: equal steps would meet the
    # same column of a regular shape again and again.
    shares = (steps << _BITS) + steps * _GOLDEN % (1 << _BITS)
    ranks = totals[labels, np.newaxis] * shares // (count << _BITS)
    found, flat = np.zeros_like(ranks), mask.reshape(-1)
    before = np.zeros(labels.size, np.int64)
    for start, counts in _chunks(mask):
        after = before + counts[labels]
        is_here = (ranks >= before[:, np.newaxis]) & (ranks < after[:, np.newaxis])
        if is_here.any():
            by_label = np.argsort(flat[start : start + _CHUNK], kind="stable")
            firsts = (np.cumsum(counts) - counts)[labels] - before
            found[is_here] = start + by_label[(ranks + firsts[:, np.newaxis])[is_here]]
        before = after
    positions: list[int] = found.reshape(-1).tolist()
    return positions


def _count(mask: Voxels) -> npt.NDArray[np.int64]:
    """How many voxels have each label that the dtype allows."""
    totals = np.zeros(np.iinfo(mask.dtype).max + 1, np.int64)
    for _, counts in _chunks(mask):
        totals += counts
    return totals


def _chunks(mask: Voxels) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """The first voxel of each part of a mask, and how many voxels of the part have each label."""
    flat, num_labels = mask.reshape(-1), np.iinfo(mask.dtype).max + 1
    for start in range(0, flat.size, _CHUNK):
        yield start, np.bincount(flat[start : start + _CHUNK], minlength=num_labels)


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
