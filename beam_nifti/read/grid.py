"""Sliding windows: patches that cover a volume, and one volume from the predictions of a model for them."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, SupportsIndex

import numpy as np
import numpy.typing as npt

from beam_nifti.errors import UsageError
from beam_nifti.read.order import item_number, require_share
from beam_nifti.read.patches import Box, read_patch, sizes
from beam_nifti.read.records import Element, Records

_WEIGHTS: Final = ("gaussian", "constant")
_DEVIATION: Final = 1 / 8
"""Standard deviation of the weights, in sides of a patch. Source: Isensee et al. 2021, nnU-Net."""


@dataclass(frozen=True)
class Corners(Sequence[tuple[int, ...]]):
    """The corners of the patches of a grid, in C order. Each is computed when it is read: they may be many.

    Attributes:
        starts: the first voxels of the patches along each axis.
    """

    starts: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        """The number of patches."""
        return math.prod(map(len, self.starts))

    def __getitem__(self, index: Any) -> Any:
        """One corner, or a list of those of a slice."""
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"there is no patch {number}: the grid has {len(self)}")
        number %= len(self)
        corner = list[int]()
        for starts in reversed(self.starts):
            number, place = divmod(number, len(starts))
            corner.insert(0, starts[place])
        return tuple(corner)


class PatchSource(Protocol):
    """A volume of which patches can be read."""

    @property
    def channels_first(self) -> bool:
        """Whether the channel axis is the first axis of a patch."""

    @property
    def space(self) -> tuple[int, ...]:
        """The number of voxels along x, y and z."""

    def read_patch(self, box: Box) -> Element:
        """The patch in a box of voxels, as `Dataset.patch` returns it."""


@dataclass(frozen=True)
class RecordSource:
    """A record, by its row of the table."""

    records: Records
    row: int

    @property
    def channels_first(self) -> bool:
        """As for `PatchSource`."""
        return self.records.channels_first

    @property
    def space(self) -> tuple[int, ...]:
        """As for `PatchSource`."""
        return self.records.shape_of(self.row)[:3]

    def read_patch(self, box: Box) -> Element:
        """As for `PatchSource`; a DatasetError if the record is missing or damaged."""
        return read_patch(self.records, self.row, box)


class PatchGrid:
    """The sequence of patches that cover a volume, from `grid_patches` of `Dataset` or `PreparedVolume`.

    `grid[i]` reads one patch, like `Dataset.patch`. Neighbours overlap by at least the requested share, and
    are evenly spaced along each axis. Patches are inside the volume; along an axis on which the volume is
    smaller than a patch, it is centred. PyTorch's `DataLoader` accepts a grid, also with several workers.

    Attributes:
        corners: sequence of the corners of the patches, as for `Dataset.patch`, in C order.
        shape: shape of a patch: voxels along x, y and z.
    """

    def __init__(self, source: PatchSource, shape: Sequence[SupportsIndex], overlap: float) -> None:
        overlap = require_share("overlap", overlap, below_1=True)
        self._source = source
        self.shape = sizes("the shape of a patch", shape)
        self._volume = source.space
        axes = zip(self._volume, self.shape, strict=True)
        self.corners = Corners(tuple(_starts(size, length, overlap) for size, length in axes))

    def __len__(self) -> int:
        """The number of patches."""
        return len(self.corners)

    def __repr__(self) -> str:
        return f"<PatchGrid of {len(self):,} patches of {self.shape} in a volume of {self._volume}>"

    def __getitem__(self, index: SupportsIndex) -> Element:
        """Read one patch.

        Raises:
            IndexError: the number is out of range.
            TypeError: `index` is not a number.
            DatasetError: the record is missing or damaged; the message names it.
        """
        return self._source.read_patch(Box(self.corners[item_number(index, "patch")], self.shape))

    def stitch(
        self, predictions: Iterable[npt.ArrayLike], weights: Literal["gaussian", "constant"] = "gaussian"
    ) -> npt.NDArray[np.float32]:
        """Combine predictions for the patches into one volume: a weighted mean where patches overlap.

        Args:
            predictions: one prediction per patch, in order, in the shape of a patch. It may have a channel
                axis, which is where the dataset's images have it. Values must be such that a mean makes
                sense: probabilities, not labels. One prediction is held in memory at a time.
            weights: "gaussian" gives the middle of a patch more weight than its border, where a model sees
                less context; "constant" gives all voxels the same weight.

        Returns:
            float32 of the record's shape, with a channel axis if predictions have one.

        Raises:
            UsageError: there are more or fewer predictions than patches, one has the wrong shape, or
                `weights` is not valid.
        """
        if weights not in _WEIGHTS:
            raise UsageError(f"weights is {weights!r}; choose one of: {', '.join(_WEIGHTS)}")
        sides = [_side(size) if weights == "gaussian" else np.ones(size, np.float32) for size in self.shape]
        weight = functools.reduce(np.multiply, np.ix_(*sides))[..., np.newaxis]
        axis = 0 if self._source.channels_first else len(self.shape)
        found, mass = None, np.zeros((*self._volume, 1), np.float32)
        number = -1
        for number, prediction in enumerate(predictions):
            if number == len(self):
                break
            values = np.asarray(prediction, np.float32)
            if found is None:
                is_flat = values.ndim == len(self.shape)
                num_channels = 1 if is_flat else values.shape[axis] if values.ndim > axis else 0
                found = np.zeros((*self._volume, num_channels), np.float32)
                expected = list(self.shape)
                expected[axis:axis] = [] if is_flat else [num_channels]
            if values.shape != tuple(expected):
                wanted = tuple(expected) if number else _either(self.shape, axis)
                raise UsageError(
                    f"prediction {number} has the shape {values.shape}, expected {wanted}; give the shape "
                    "of a patch, with a channel axis for all or for none, and without a batch axis"
                )
            values = values[..., np.newaxis] if is_flat else np.moveaxis(values, axis, -1)
            box = Box(self.corners[number], self.shape)
            inside = box.inside(self._volume)
            part = tuple(slice(s.start - c, s.stop - c) for s, c in zip(inside, box.corner, strict=True))
            found[inside] += values[part] * weight[part]
            mass[inside] += weight[part]
        if found is None or number + 1 != len(self):
            count = f"more than {len(self)}" if number == len(self) else number + 1
            raise UsageError(
                f"the number of predictions is {count}, but there are {len(self)} patches; give one for "
                "each, in order"
            )
        found /= mass
        return found[..., 0] if is_flat else np.ascontiguousarray(np.moveaxis(found, -1, axis))


def _starts(size: int, length: int, overlap: float) -> tuple[int, ...]:
    """The first voxel of each patch along one axis."""
    spare = size - length
    if spare <= 0:
        return (-(-spare // 2),)
    step = max(1, int(length * (1 - overlap)))
    count = -(-spare // step)
    return tuple(spare * number // count for number in range(count + 1))


def _either(shape: Sequence[int], axis: int) -> str:
    """The shapes of predictions for a patch: without channels, and with any number of them."""
    sizes = [*map(str, shape)]
    return f"({', '.join(sizes)}) or ({', '.join([*sizes[:axis], 'C', *sizes[axis:]])})"


def _side(size: int) -> npt.NDArray[np.float32]:
    """The weights along one side of a patch."""
    places = (np.arange(size) - (size - 1) / 2) / (size * _DEVIATION)
    return np.exp(-(places**2) / 2).astype(np.float32)
