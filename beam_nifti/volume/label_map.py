"""Label maps: numpy in, numpy out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from beam_nifti.volume.rescale import Voxels

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

_CHUNK: Final = 1 << 16  # voxels that are counted at a time
_POSITIONS: Final = 64  # of each label
_MOST_POSITIONS: Final = 4096  # of all labels; one of each where there are more of those
_BITS: Final = 16
_SHARE_BITS: Final = 10
"""Bits of a position below its voxel: float32 in headers shall not decide between two equally near voxels."""

_WHOLE: Final = 1 << 3 * _SHARE_BITS  # sum of the weights of eight neighbours
_GOLDEN: Final = 40503  # 2^16 by the golden ratio: its multiples are spread evenly, however many there are


def labels_of(mask: Voxels) -> list[int]:
    """The labels that occur in a mask, ascending. With a channel axis, they are those of all channels."""
    found: list[int] = np.flatnonzero(label_counts(mask)).tolist()
    return found


def positions_of(mask: Voxels) -> list[int]:
    """The positions of some voxels of each label except 0, spread over all that have it, in any channel.

    Returns:
        Numbers of voxels in C order: as many for each label, one label after the other, in ascending order.
        They are 64 of each, or fewer where the mask has more than 64 labels. Where fewer voxels have a label,
        some are there several times.

    Source: docs/format.md, "Positions".
    """
    totals = label_counts(mask)
    labels = np.flatnonzero(totals)
    labels = labels[labels > 0]
    count = max(1, min(_POSITIONS, _MOST_POSITIONS // max(1, labels.size)))
    steps = np.arange(count)
    # One of each of `count` equal parts of them, at another place in each part: equal steps would meet the
    # same column of a regular shape again and again.
    shares = (steps << _BITS) + steps * _GOLDEN % (1 << _BITS)
    ranks = totals[labels, np.newaxis] * shares // (count << _BITS)
    found, before = np.zeros_like(ranks), np.zeros(labels.size, np.int64)
    for start, part, voxels, counts in _chunks(mask):
        after = before + counts[labels]
        is_here = (ranks >= before[:, np.newaxis]) & (ranks < after[:, np.newaxis])
        if is_here.any():
            by_label = np.argsort(part, kind="stable")
            firsts = (np.cumsum(counts) - counts)[labels] - before
            found[is_here] = start + voxels[by_label[(ranks + firsts[:, np.newaxis])[is_here]]]
        before = after
    positions: list[int] = found.reshape(-1).tolist()
    return positions


def label_counts(mask: Voxels) -> npt.NDArray[np.int64]:
    """How many voxels have each label that the dtype allows, in any channel."""
    totals = np.zeros(np.iinfo(mask.dtype).max + 1, np.int64)
    for _, _, _, counts in _chunks(mask):
        totals += counts
    return totals


def _chunks(mask: Voxels) -> Iterator[tuple[int, Voxels, Places, Places]]:
    """The first voxel of each part of a mask, its labels and their voxels in it, and the count of each label.

    A label that a voxel has in several channels is there once.
    """
    flat, num_labels = mask.reshape(math.prod(mask.shape[:3]), -1), np.iinfo(mask.dtype).max + 1
    everything = np.arange(min(_CHUNK, len(flat)))
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        labels, voxels = part[:, 0], everything[: len(part)]
        if part.shape[1] > 1:
            is_new = np.ones(part.shape, np.bool_)
            for one, other in itertools.combinations(range(part.shape[1]), 2):
                is_new[:, other] &= part[:, one] != part[:, other]
            labels, voxels = part[is_new], np.nonzero(is_new)[0]
        yield start, labels, voxels, np.bincount(labels, minlength=num_labels)


def of_each_mask(mask: Voxels, make: Callable[[Voxels], Voxels]) -> Voxels:
    """What a function makes of a mask (X, Y, Z), or of each channel of one (X, Y, Z, C)."""
    if mask.shape[3:] == ():
        return make(mask)
    channels = (make(np.ascontiguousarray(mask[..., channel])) for channel in range(mask.shape[3]))
    return np.ascontiguousarray(np.stack(list(channels), -1))


def overlaid(mask: Voxels) -> Voxels:
    """One label per voxel, to be drawn: of the channels with a label, that of the last one."""
    if mask.shape[3:] == ():
        return mask
    drawn = np.zeros(mask.shape[:3], mask.dtype)
    for channel in range(mask.shape[3]):
        np.copyto(drawn, mask[..., channel], where=mask[..., channel] != 0)
    return drawn


def nearest(positions: Floats) -> Floats:
    """The whole numbers nearest to positions that are rounded to 2^-10, halves up."""
    return np.asarray(np.floor(np.ldexp(np.rint(np.ldexp(positions, _SHARE_BITS)), -_SHARE_BITS) + 0.5))


def pick_nearest(voxels: Voxels, positions: Sequence[Floats]) -> Voxels:
    """The voxels of (X, Y, Z) or (X, Y, Z, C) that are nearest to positions along each axis.

    Outside of the volume they are its outermost voxels.
    """
    for axis in reversed(range(3)):
        places = nearest(positions[axis]).astype(np.intp)
        voxels = voxels.take(np.clip(places, 0, voxels.shape[axis] - 1), axis)
    return voxels


def pick_mixed(mask: Voxels, positions: Sequence[Floats]) -> Voxels:
    """The labels of a 3-D mask that have the largest share at positions along each axis.

    The share of a label is what its voxels, as 1 among 0, are linearly interpolated to. Of labels with equal
    shares it is the largest one. Positions are rounded to 2^-10 of a voxel, so that shares are exact. Outside
    of the mask, labels are those of its outermost voxels.
    """
    below, above, shares = zip(*map(_neighbours, mask.shape, positions), strict=True)
    made = np.empty([len(along) for along in positions], mask.dtype)
    slab = max(1, _CHUNK // math.prod(made.shape[1:]))
    for start in range(0, len(made), slab):
        xs = slice(start, start + slab)
        made[xs] = _mix(
            mask, (below[0][xs], *below[1:]), (above[0][xs], *above[1:]), (shares[0][xs], *shares[1:])
        )
    return made


def _neighbours(size: int, positions: Floats) -> tuple[Places, Places, Places]:
    """The voxels below and above positions, and the share of the one above, in parts of 2^10."""
    places = np.rint(np.clip(positions, 0, size - 1) * (1 << _SHARE_BITS)).astype(np.int64)
    below = places >> _SHARE_BITS
    return below, np.minimum(below + 1, size - 1), places & ((1 << _SHARE_BITS) - 1)


def _mix(mask: Voxels, below: Sequence[Places], above: Sequence[Places], shares: Sequence[Places]) -> Voxels:
    least = most = mask
    for axis in range(3):
        least = np.minimum(least.take(below[axis], axis), least.take(above[axis], axis))
        most = np.maximum(most.take(below[axis], axis), most.take(above[axis], axis))
    made = least
    # Where all eight neighbours have one label, it is that. Elsewhere each of them adds its weight to those
    # of its label, whatever the number of labels.
    mixed = np.nonzero(least != most)
    low, high = least[mixed], most[mixed]
    labels, weights = _corners(mask, *(list(map(np.take, along, mixed)) for along in (below, above, shares)))
    is_high = labels == high
    made[mixed] = np.where(2 * np.sum(weights, axis=0, where=is_high) >= _WHOLE, high, low)
    several = np.flatnonzero(~(is_high | (labels == low)).all(axis=0))
    if several.size:
        made[tuple(axis[several] for axis in mixed)] = _largest_share(labels[:, several], weights[:, several])
    return made


def _corners(
    mask: Voxels, below: Sequence[Places], above: Sequence[Places], shares: Sequence[Places]
) -> tuple[Voxels, Places]:
    """Labels and weights of the eight neighbours of some positions, both (8, positions)."""
    flat, (_, size_y, size_z) = mask.reshape(-1), mask.shape
    places = [
        (below[0] * size_y * size_z, above[0] * size_y * size_z),
        (below[1] * size_z, above[1] * size_z),
        (below[2], above[2]),
    ]
    weights = [((1 << _SHARE_BITS) - share, share) for share in shares]
    labels, products = [], []
    for x, y in itertools.product((0, 1), repeat=2):
        place, weight = places[0][x] + places[1][y], weights[0][x] * weights[1][y]
        labels += [flat.take(place + places[2][z]) for z in (0, 1)]
        products += [weight * weights[2][z] for z in (0, 1)]
    return np.stack(labels), np.stack(products)


def _largest_share(labels: Voxels, weights: Places) -> Voxels:
    """Of (8, positions) labels, those with the largest sums of weights; of equal sums, the largest label."""
    best, chosen = np.zeros_like(weights[0]), labels[0]
    for label in labels:
        total = np.sum(weights, axis=0, where=labels == label)
        wins = (total > best) | ((total == best) & (label > chosen))
        best, chosen = np.where(wins, total, best), np.where(wins, label, chosen)
    return np.asarray(chosen)
