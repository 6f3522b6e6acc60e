"""Random patches of records, determined by seed, epoch and number, the same on every machine."""

from __future__ import annotations

import bisect
import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Real
from typing import Any, Final, SupportsIndex

import numpy as np
import numpy.typing as npt

from beam_nifti.errors import UsageError
from beam_nifti.read.order import item_number, require_share, whole_number
from beam_nifti.read.patches import sizes
from beam_nifti.read.random_access import Dataset
from beam_nifti.read.records import Element
from beam_nifti.support.wording import first_few

_DRAWS: Final = 5
"""Random 64-bit numbers per patch: one for each axis, and two that choose a labelled voxel."""

_END: Final = 1 << 64
"""The end of their range."""

_SHOWN: Final = 20
"""Labels in a message."""


@dataclass(frozen=True, slots=True)
class Patches:
    """The shape and number of random patches of each volume.

    Attributes:
        shape: voxels along x, y and z.
        per_volume: patches per volume and epoch.
        foreground: share of the patches, from 0 to 1, that are drawn around a labelled voxel of the mask. It
            is exact: of any n successive patches, the count differs from `foreground` · n by less than 1.
            The voxel is in the middle half of the patch along each axis, at random; but a patch that would
            reach beyond the volume is moved inside. In volumes without labels, all patches are drawn
            anywhere.
        label_weights: weight of each label, such as {1: 1, 2: 3}. The probability of a label is its weight,
            divided by the sum for all labels of the volume. Labels that are not given have the weight 0, and
            volumes with none of the others count as volumes without labels. None means that all labels except
            0 have the same weight.

    Raises:
        UsageError: `shape` is not three integers of at least 1 or does not fit into memory, `per_volume` is
            below 1, or `foreground` is not from 0 to 1; or `label_weights` is not a dictionary of labels from
            1 with finite weights of at least 0, all of them are 0, or `foreground` is 0.
    """

    shape: tuple[int, ...]
    per_volume: int = 1
    foreground: float = 0.0
    label_weights: Mapping[int, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", sizes("the shape of a patch", self.shape))
        object.__setattr__(self, "per_volume", whole_number("patches_per_volume", self.per_volume))
        if self.per_volume < 1:
            raise UsageError(f"patches_per_volume is {self.per_volume}; it must be at least 1")
        object.__setattr__(self, "foreground", require_share("foreground", self.foreground))
        if self.label_weights is not None:
            object.__setattr__(self, "label_weights", _require_weights(self.label_weights))
            if not self.foreground:
                raise UsageError(
                    f"label_weights is {self.label_weights}, but foreground is 0, so no patch is drawn "
                    "around a label; give a foreground above 0"
                )

    def describe(self) -> dict[str, Any]:
        """The fields, for JSON."""
        weights = self.label_weights
        return {
            "shape": list(self.shape),
            "per_volume": self.per_volume,
            "foreground": self.foreground,
            "label_weights": weights and {str(label): weight for label, weight in weights.items()},
        }

    def is_foreground(self, seed: int, epoch: int, number: int) -> bool:
        """Whether a patch is one of those that are drawn around a labelled voxel; arguments as of `draw`."""
        share, whole = self.foreground.as_integer_ratio()
        phase = _phase(seed, epoch)
        # They are those at which the line share · n + phase passes an integer, computed without rounding.
        before, after = ((share * n * _END + phase * whole) // (whole * _END) for n in (number, number + 1))
        return after > before

    def draw(
        self,
        volume: Sequence[int],
        seed: int,
        epoch: int,
        number: int,
        positions: Mapping[int, npt.NDArray[np.int32]] | None = None,
    ) -> tuple[int, ...]:
        """Draw the corner of a patch: around a labelled voxel if there is one, otherwise anywhere.

        First the label is drawn, by its weight, then one of its voxels, then the voxel's place in the patch.
        Anywhere means that all corners with which the patch is inside the volume are equally likely.

        Along an axis on which the volume is smaller than the patch, the volume is centred, as `shape` of a
        build centres what it pads.

        Args:
            volume: shape of the volume.
            seed: seed of the patches, at least 0.
            epoch: number of the epoch, from 0.
            number: number of the patch in the epoch, from 0.
            positions: labelled voxels, from `Dataset.positions_of`; None if not `is_foreground`.
        """
        raw = _random(_DRAWS, seed, epoch, number)
        spares = [size - length for size, length in zip(volume, self.shape, strict=False)]
        corner = [_below(max(spare, 0) + 1, number) for spare, number in zip(spares, raw, strict=False)]
        label = self._pick(list(positions), raw[3]) if positions else None
        if positions and label is not None:
            voxels = np.unique(positions[label])  # a label with few voxels has some of them more than once
            voxel = int(voxels[_below(len(voxels), raw[4])])
            place = (voxel // (volume[1] * volume[2]), voxel // volume[2] % volume[1], voxel % volume[2])
            # Exactly in the middle, there would be no more patches of a label than it has positions.
            drawn = [
                at - length // 2 + _below(2 * (length // 4) + 1, number) - length // 4
                for at, length, number in zip(place, self.shape, raw, strict=False)
            ]
            corner = [min(max(at, 0), max(spare, 0)) for at, spare in zip(drawn, spares, strict=True)]
        return tuple(at if spare >= 0 else -(-spare // 2) for at, spare in zip(corner, spares, strict=True))

    def _pick(self, labels: Sequence[int], raw: int) -> int | None:
        """One of some labels by its weight, from a random 64-bit number; None if all have the weight 0."""
        if self.label_weights is None:
            return labels[_below(len(labels), raw)]
        ratios = [self.label_weights.get(label, 0.0).as_integer_ratio() for label in labels]
        whole = max(denominator for _, denominator in ratios)  # all are powers of 2
        ends = list(itertools.accumulate(weight * (whole // denominator) for weight, denominator in ratios))
        return labels[bisect.bisect_right(ends, _below(ends[-1], raw))] if ends[-1] else None


def _require_weights(given: Any) -> dict[int, float]:
    """The weights of labels, from what a user gives, by ascending label.

    Raises:
        UsageError: it is something else, or no weight is above 0.
    """
    if not isinstance(given, Mapping):
        raise UsageError(f"label_weights is {given!r}; give a dictionary, such as {{1: 1, 2: 3}}")
    for label, weight in given.items():
        if whole_number("a label in label_weights", label) < 1:
            raise UsageError(
                f"label_weights has the label {label}; give labels from 1, because patches around the "
                "background are those that are drawn anywhere"
            )
        if not 0 <= _as_float(weight) < math.inf:
            raise UsageError(
                f"label_weights gives label {label} the weight {weight!r}; give a finite number of at least 0"
            )
    weights = {operator.index(label): float(given[label]) for label in sorted(given)}
    if not any(weights.values()):
        raise UsageError(f"label_weights is {weights}; give at least one label a weight above 0")
    return weights


def _as_float(weight: Any) -> float:
    """A weight as a float; NaN if it is no number."""
    try:
        return float(weight) if isinstance(weight, Real) and not isinstance(weight, bool) else math.nan
    except OverflowError:
        return math.inf


def require_patches(given: Any) -> Patches:
    """Check that an argument says how patches are drawn.

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(given, Patches):
        raise UsageError(f"patches is {given!r:.80}; give Patches, such as beam_nifti.Patches((96, 96, 96))")
    return given


def _random(count: int, seed: int, *key: int) -> list[int]:
    """Random 64-bit numbers, which depend only on the seed and the key."""
    # numpy keeps a bit generator's numbers as they are from version to version. Source: NEP 19.
    generator = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key))
    numbers: list[int] = generator.random_raw(count).tolist()
    return numbers


@lru_cache
def _phase(seed: int, epoch: int) -> int:
    """Where an epoch begins to count its patches around labels, so that other patches are in each epoch."""
    return _random(1, seed, epoch, 0, 0)[0]  # a key that neither a patch nor `order.shuffle` has


def _below(count: int, raw: int) -> int:
    """A number below `count`, from a random 64-bit number."""
    return raw * count // _END


class PatchDataset:
    """Random patches of the records of a `Dataset`, by number: for PyTorch, Grain or numpy.

    The patches of record 0 come first, then those of record 1. `dataset[i]` is the dictionary that
    `Dataset.patch` returns, and reads no more than it. It depends only on seed, epoch and `i`: it is the same
    in every process, on every machine, and in `load_dataset`. Like a `Dataset`, it may be used by several
    threads and in forked and spawned processes.

    Args:
        records: records to draw from.
        patches: shape and number of the patches of each record.
        seed: seed of the patches.
        epoch: number of the epoch, from 0. Every epoch has different patches.

    Raises:
        UsageError: `records` or `patches` is something else; seed or epoch is not a whole number of at least
            0; or `patches.foreground` is above 0, but records have no masks, or the index does not have the
            positions of labels; or `patches.label_weights` has a label that no mask of the dataset has.
    """

    def __init__(self, records: Dataset, patches: Patches, *, seed: int, epoch: int = 0) -> None:
        if not isinstance(records, Dataset):
            raise UsageError(
                f"records is {records!r:.80}; give a Dataset, such as beam_nifti.Dataset('cohort/dataset')"
            )
        self.records, self.patches = records, require_patches(patches)
        self._seed, self._epoch = whole_number("seed", seed), whole_number("epoch", epoch)
        for name, number in (("seed", self._seed), ("epoch", self._epoch)):
            if number < 0:
                raise UsageError(f"{name} is {number}; it must be at least 0")
        try:
            records.prepare_patches(around_labels=patches.foreground > 0)
        except UsageError as e:
            raise UsageError(f"foreground is {patches.foreground}, but {e}, or drop foreground") from e
        known = records.info.mask_labels or ()
        unknown = set(patches.label_weights or ()).difference(known)
        if unknown:
            raise UsageError(
                f"label_weights has the label {min(unknown)}, but the labels in masks of {records.path} are "
                f"{first_few([label for label in known if label], _SHOWN) or 'none'}; drop it, or correct it"
            )

    def epoch(self, number: int) -> PatchDataset:
        """The patches of another epoch, from 0. Nothing is read."""
        return PatchDataset(self.records, self.patches, seed=self._seed, epoch=number)

    def __len__(self) -> int:
        """The number of patches in an epoch."""
        return len(self.records) * self.patches.per_volume

    def __getitem__(self, index: SupportsIndex) -> Element:
        """Read one patch, by its number from 0, or from -1 backwards.

        Raises:
            IndexError: the number is out of range.
            TypeError: `index` is not a number.
            DatasetError: the record is missing or damaged; the message names it.
        """
        number, corner = self.place(index)
        return self.records.patch(number, corner, self.patches.shape)

    def __getitems__(self, indices: Iterable[int]) -> list[Element]:
        """Read several patches. PyTorch's `DataLoader` calls this for a batch."""
        return [self[index] for index in indices]

    def __repr__(self) -> str:
        return f"<PatchDataset {self.patches}, seed {self._seed}, epoch {self._epoch}: {self.records!r}>"

    def place(self, index: SupportsIndex) -> tuple[int, tuple[int, ...]]:
        """The number of a patch's record, and its corner: arguments of `Dataset.patch`.

        Raises:
            IndexError: the number is out of range.
        """
        number = item_number(index, "patch")
        if not -len(self) <= number < len(self):
            raise IndexError(f"there is no patch {number}: the dataset has {len(self)}")
        number %= len(self)
        record = number // self.patches.per_volume
        draws = self._seed, self._epoch, number
        positions = self.records.positions_of(record) if self.patches.is_foreground(*draws) else None
        return record, self.patches.draw(self.records.shape_of(record), *draws, positions)
