"""Random patches of records. A seed decides them, together with epoch and number, on every machine."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, SupportsIndex

import numpy as np

from beam_nifti.errors import UsageError
from beam_nifti.read.order import whole_number
from beam_nifti.read.patches import integers
from beam_nifti.read.random_access import Dataset
from beam_nifti.read.records import Element

_DRAWS: Final = 3
"""Random numbers of 64 bits for each patch: one for each axis."""


@dataclass(frozen=True, slots=True)
class Patches:
    """Random patches of volumes: how large they are, and how many of each.

    Attributes:
        shape: voxels along x, y and z.
        per_volume: patches of each volume in an epoch.

    Raises:
        UsageError: `shape` is not three integers of at least 1, or `per_volume` is below 1.
    """

    shape: tuple[int, ...]
    per_volume: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", integers("the shape of a patch", self.shape, least=1))
        object.__setattr__(self, "per_volume", whole_number("patches_per_volume", self.per_volume))
        if self.per_volume < 1:
            raise UsageError(f"patches_per_volume is {self.per_volume}; it must be at least 1")

    def describe(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return {"shape": list(self.shape), "per_volume": self.per_volume}

    def draw(self, volume: Sequence[int], seed: int, epoch: int, number: int) -> tuple[int, ...]:
        """The corner of a patch: any that leaves it inside the volume is as likely as another.

        Where a volume is smaller than the patch, it is centred, as `--shape` centres what it pads.

        Args:
            volume: shape of the volume.
            seed: at least 0.
            epoch: from 0.
            number: of the patch in the epoch, from 0.
        """
        # numpy keeps a bit generator's numbers as they are from version to version. Source: NEP 19.
        generator = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch, number)))
        raw: list[int] = generator.random_raw(_DRAWS).tolist()
        return tuple(map(_corner, volume, self.shape, raw))


def _corner(size: int, length: int, raw: int) -> int:
    """Along one axis, by a random number of 64 bits."""
    spare = size - length
    return _below(spare + 1, raw) if spare >= 0 else -(-spare // 2)


def _below(count: int, raw: int) -> int:
    """A number below `count`, by a random number of 64 bits."""
    return raw * count >> 64


class PatchDataset:
    """Random patches of the records of a `Dataset`, by number: for PyTorch, Grain or numpy.

    The patches of record 0 come first, then those of record 1. `dataset[i]` is a dictionary, as
    `Dataset.patch` gives it, and reads only what that reads. Which patch it is depends on seed, epoch and `i`
    alone: it is the same in every process and on every machine, and the one of `load_dataset`. Like a
    `Dataset`, it may be used by several threads and in forked and spawned processes.

    Args:
        records: to draw from.
        patches: how large they are, and how many of each record.
        seed: of the patches.
        epoch: from 0; each has other patches.

    Raises:
        UsageError: seed or epoch is not a whole number of at least 0.
    """

    def __init__(self, records: Dataset, patches: Patches, *, seed: int, epoch: int = 0) -> None:
        self.records, self.patches = records, patches
        self._seed, self._epoch = whole_number("seed", seed), whole_number("epoch", epoch)
        for name, number in (("seed", self._seed), ("epoch", self._epoch)):
            if number < 0:
                raise UsageError(f"{name} is {number}; it must be at least 0")

    def epoch(self, number: int) -> PatchDataset:
        """The patches of another epoch, from 0. Nothing is read."""
        return PatchDataset(self.records, self.patches, seed=self._seed, epoch=number)

    def __len__(self) -> int:
        """How many patches an epoch has."""
        return len(self.records) * self.patches.per_volume

    def __getitem__(self, index: SupportsIndex) -> Element:
        """Read one patch, by a number from 0, or from -1 backwards.

        Raises:
            IndexError: there are fewer.
            DatasetError: the record is missing or damaged; says which it is.
        """
        number, corner = self.place(index)
        return self.records.patch(number, corner, self.patches.shape)

    def __getitems__(self, indices: Iterable[int]) -> list[Element]:
        """Several patches: what PyTorch's `DataLoader` asks for those of a batch."""
        return [self[index] for index in indices]

    def __repr__(self) -> str:
        return f"<PatchDataset {self.patches}, seed {self._seed}, epoch {self._epoch}: {self.records!r}>"

    def place(self, index: SupportsIndex) -> tuple[int, tuple[int, ...]]:
        """Where a patch lies: the number of its record, and its corner, as `Dataset.patch` takes them.

        Raises:
            IndexError: there are fewer.
        """
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"there is no patch {number}: the dataset has {len(self)}")
        number %= len(self)
        record = number // self.patches.per_volume
        volume = self.records.shape_of(record)
        return record, self.patches.draw(volume, self._seed, self._epoch, number)
