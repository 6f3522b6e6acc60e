"""Finds records that have the same image, by digests of voxels, or nearly the same one, by small grids.

Volumes of a cohort resemble each other, above all if they are registered to a template. So grids are compared
after what they have in common is removed: the mean volume, its square (contrast), its derivatives (shift and
size), and the principal components of large cohorts. Source: docs/adr/0034-copies.md, with measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from beam_nifti.reporting.outliers import FEWEST, Numbers
from beam_nifti.reporting.thumbnail import GRID

LIMIT: Final = 0.65  # correlation of what two grids do not share with the cohort, above which they are copies
MAX_PAIRS: Final = 500  # pairs to list of each kind; all are counted
MOST_COMPARED: Final = 200_000  # records; twice as many take four times as long

_SIZE: Final = GRID // 2  # blocks along each axis
_SAMPLE: Final = 500  # records of which to compute principal components, or up to twice as many
_MOST_COMPONENTS: Final = 16
_PER_COMPONENT: Final = 60  # records for each component, so that none is a single pair
_LEAST: Final = 0.01  # share of a grid's contrast below which the rest is noise
_TILE: Final = 1024  # records that are compared with as many others at a time

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class CopiedImage:
    """Two records that have the same image, or nearly the same one.

    Attributes:
        ids: example ids, in the order of the dataset.
        splits: their splits.
        is_exact: whether all voxels are equal, as stored or in RAS orientation.
        similarity: correlation of the images without what the cohort has in common, 1 if `is_exact`.
    """

    ids: tuple[str, str]
    splits: tuple[str, str]
    is_exact: bool
    similarity: float

    @property
    def is_leak(self) -> bool:
        """Whether the records are in different splits."""
        return self.splits[0] != self.splits[1]

    def __str__(self) -> str:
        (first, second), (split, other) = self.ids, self.splits
        what = "the same voxels" if self.is_exact else f"nearly the same image ({self.similarity:.2f})"
        return f"{first} ({split}) and {second} ({other}) have {what}"


@dataclass(frozen=True, slots=True)
class Copies:
    """Records that have the same image.

    Attributes:
        across: pairs in different splits, the most similar first, at most MAX_PAIRS.
        within: pairs in one split, likewise.
        num_across: number of all pairs in different splits.
        num_within: number of all pairs in one split.
        is_complete: whether nearly equal images were searched for, for which there must be FEWEST records,
            and at most MOST_COMPARED.
    """

    across: tuple[CopiedImage, ...]
    within: tuple[CopiedImage, ...]
    num_across: int
    num_within: int
    is_complete: bool


class _Best:
    """The most similar pairs of records, and how many there are."""

    def __init__(self) -> None:
        self.count = 0
        self._pairs, self._values = np.zeros((0, 2), np.int64), np.zeros(0, np.float32)

    def add(self, pairs: npt.NDArray[np.int64], values: Floats) -> None:
        self.count += len(pairs)
        pairs, values = np.concatenate([self._pairs, pairs]), np.concatenate([self._values, values])
        kept = np.lexsort((pairs[:, 1], pairs[:, 0], -values))[:MAX_PAIRS]
        self._pairs, self._values = pairs[kept], values[kept]

    def of(self, rows: pa.Table) -> tuple[CopiedImage, ...]:
        ids, splits = (rows[name].take(self._pairs.ravel()).to_pylist() for name in ("example_id", "split"))
        return tuple(
            CopiedImage((ids[n], ids[n + 1]), (splits[n], splits[n + 1]), value == _EXACT, min(1.0, value))
            for n, value in zip(range(0, len(ids), 2), self._values.tolist(), strict=True)
        )


_EXACT: Final = 2.0  # sorts before every correlation


def find_copies(
    rows: pa.Table, digests: Sequence[Sequence[bytes]], descriptors: npt.NDArray[np.int8]
) -> Copies:
    """Find the pairs of records that have the same image.

    Each exact copy is paired with the first record of its image only. Frames of one image are not compared.

    Args:
        rows: `example_id`, `split` and `row` of each record.
        digests: digests of the voxels of each record.
        descriptors: result of `describe` for each record.
    """
    splits = np.unique(rows["split"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)[1]
    # Records without a row of a manifest have numbers of their own.
    sources = np.array([-1 - n if row is None else row for n, row in enumerate(rows["row"].to_pylist())])
    origins = _origins(digests)
    across, within = _Best(), _Best()

    def add(pairs: npt.NDArray[np.int64], values: Floats) -> None:
        first, second = pairs.T
        is_pair = sources[first] != sources[second]
        is_across = splits[first] != splits[second]
        across.add(pairs[is_pair & is_across], values[is_pair & is_across])
        within.add(pairs[is_pair & ~is_across], values[is_pair & ~is_across])

    repeated = np.flatnonzero(origins != np.arange(len(origins)))
    add(np.stack([origins[repeated], repeated], 1), np.full(len(repeated), _EXACT, np.float32))
    is_complete = FEWEST <= len(origins) <= MOST_COMPARED
    if is_complete:
        # One of the records of a split that have the same image.
        numbers = np.sort(np.unique(np.stack([origins, splits]), axis=1, return_index=True)[1])
        for start in range(0, len(numbers), _TILE):
            some = _floats(descriptors[numbers[start : start + _TILE]])
            for other in range(start, len(numbers), _TILE):
                alike = some @ _floats(descriptors[numbers[other : other + _TILE]]).T
                if start == other:
                    alike = np.triu(alike, 1)
                found = np.argwhere(alike > LIMIT)
                values, pairs = alike[tuple(found.T)], numbers[found + np.array([start, other])]
                is_other = origins[pairs[:, 0]] != origins[pairs[:, 1]]
                add(pairs[is_other], values[is_other])
    return Copies(across.of(rows), within.of(rows), across.count, within.count, is_complete)


def _origins(digests: Sequence[Sequence[bytes]]) -> npt.NDArray[np.int64]:
    """The number of the first record with the image of each record."""
    first, origins = dict[bytes, int](), np.arange(len(digests))
    for number, own in enumerate(digests):
        origins[number] = min((first[digest] for digest in own if digest in first), default=number)
        for digest in own:
            first.setdefault(digest, int(origins[number]))
    return origins


class Sample:
    """The small grids of some records, evenly spread over all that are added."""

    def __init__(self) -> None:
        self._grids: list[Floats] = []
        self._step, self._count = 1, 0

    def add(self, grids: Numbers) -> None:
        """Take some of standardized grids, (records, GRID³)."""
        for grid in grids:
            if self._count % self._step == 0:
                self._grids.append(_pooled(grid[np.newaxis])[0].astype(np.float32))
            self._count += 1
            if len(self._grids) > 2 * _SAMPLE:
                self._grids, self._step = self._grids[::2], 2 * self._step

    def common(self, mean: Numbers) -> Numbers:
        """Orthonormal directions, (blocks, directions), of what the records have in common.

        Args:
            mean: mean of the standardized grids of all records, (GRID³).
        """
        pooled = _pooled(mean[np.newaxis])[0]
        cube, along = pooled.reshape(3 * [_SIZE]), np.linspace(-1, 1, _SIZE)
        slopes = np.stack(np.gradient(cube))
        zooms = [slope * along.reshape(np.roll((_SIZE, 1, 1), axis)) for axis, slope in enumerate(slopes)]
        directions = np.stack([pooled, pooled**2, *(d.ravel() for d in (*slopes, *zooms))])
        directions = np.linalg.qr((directions - directions.mean(1, keepdims=True)).T)[0]
        if count := min(_MOST_COMPONENTS, self._count // _PER_COMPONENT):
            rest = _rest(np.array(self._grids, np.float64), directions)
            components = np.linalg.svd(rest - rest.mean(0), full_matrices=False)[2][:count]
            directions = np.linalg.qr(np.concatenate([directions, components.T], 1))[0]
        return directions


def describe(grids: Numbers, common: Numbers) -> npt.NDArray[np.int8]:
    """What records do not share with the others, (records, blocks); 0 where that is nothing but noise.

    Args:
        grids: standardized grids, (records, GRID³).
        common: result of `Sample.common`.
    """
    rest = _rest(_pooled(grids), common)
    largest = np.abs(rest).max(1, keepdims=True)
    largest[largest == 0] = 1
    described: npt.NDArray[np.int8] = np.round(127 * rest / largest).astype(np.int8)
    return described


def _pooled(grids: Numbers) -> Numbers:
    """The grids with half as many blocks along each axis."""
    pooled: Numbers = grids.reshape(-1, *3 * (_SIZE, 2)).mean((2, 4, 6)).reshape(len(grids), -1)
    return pooled


def _rest(pooled: Numbers, common: Numbers) -> Numbers:
    """Unit vectors of what remains of grids without the directions, or 0."""
    pooled = pooled - pooled.mean(1, keepdims=True)
    pooled /= np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), np.finfo(float).tiny)
    rest = pooled - (pooled @ common) @ common.T
    norms = np.linalg.norm(rest, axis=1, keepdims=True)
    scaled: Numbers = np.where(norms > _LEAST, rest / np.maximum(norms, _LEAST), 0)
    return scaled


def _floats(descriptors: npt.NDArray[np.int8]) -> Floats:
    floats = descriptors.astype(np.float32)
    scaled: Floats = floats / np.maximum(np.linalg.norm(floats, axis=1, keepdims=True), 1)
    return scaled
