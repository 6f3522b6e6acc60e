"""Random patches of records, determined by seed, epoch and number, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, SupportsIndex

import numpy as np
import numpy.typing as npt

from beam_nifti.errors import UsageError
from beam_nifti.read.order import item_number, require_share, whole_number
from beam_nifti.read.patches import sizes
from beam_nifti.read.random_access import Dataset
from beam_nifti.read.records import Element

_DRAWS: Final = 6
"""Random 64-bit numbers per patch: one for each axis, and three that choose a labelled voxel."""

_END: Final = 1 << 64
"""The end of their range."""


@dataclass(frozen=True, slots=True)
class Patches:
    """The shape and number of random patches of each volume.

    Attributes:
        shape: voxels along x, y and z.
        per_volume: patches per volume and epoch.
        foreground: share of the patches, from 0 to 1, that are drawn around a labelled voxel of the mask. All
            labels except 0 are equally likely. A patch that would reach beyond the volume is moved inside.
            In volumes without labels, all patches are drawn anywhere.

    Raises:
        UsageError: `shape` is not three integers of at least 1 or does not fit into memory, `per_volume` is
            below 1, or `foreground` is not from 0 to 1.
    """

    shape: tuple[int, ...]
    per_volume: int = 1
    foreground: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", sizes("the shape of a patch", self.shape))
        object.__setattr__(self, "per_volume", whole_number("patches_per_volume", self.per_volume))
        if self.per_volume < 1:
            raise UsageError(f"patches_per_volume is {self.per_volume}; it must be at least 1")
        object.__setattr__(self, "foreground", require_share("foreground", self.foreground))

    def describe(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return {"shape": list(self.shape), "per_volume": self.per_volume, "foreground": self.foreground}

    def draw(
        self,
        volume: Sequence[int],
        seed: int,
        epoch: int,
        number: int,
        positions: npt.NDArray[np.int32] | None = None,
    ) -> tuple[int, ...]:
        """Draw the corner of a patch. All corners with which it is inside the volume are equally likely.

        Along an axis on which the volume is smaller than the patch, the volume is centred, as `shape` of a
        build centres what it pads.

        Args:
            volume: shape of the volume.
            seed: seed of the patches, at least 0.
            epoch: number of the epoch, from 0.
            number: number of the patch in the epoch, from 0.
            positions: labelled voxels, from `Dataset.positions_of`; None if `foreground` is 0.
        """
        # numpy keeps a bit generator's numbers as they are from version to version. Source: NEP 19.
        generator = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch, number)))
        raw: list[int] = generator.random_raw(_DRAWS).tolist()
        spares = [size - length for size, length in zip(volume, self.shape, strict=False)]
        corner = [_below(max(spare, 0) + 1, number) for spare, number in zip(spares, raw, strict=False)]
        if positions is not None and positions.size and raw[3] < self.foreground * _END:
            of_label = positions[_below(len(positions), raw[4])]
            voxel = int(of_label[_below(len(of_label), raw[5])])
            centre = (voxel // (volume[1] * volume[2]), voxel // volume[2] % volume[1], voxel % volume[2])
            corner = [
                min(max(at - length // 2, 0), max(spare, 0))
                for at, length, spare in zip(centre, self.shape, spares, strict=True)
            ]
        return tuple(at if spare >= 0 else -(-spare // 2) for at, spare in zip(corner, spares, strict=True))


def _below(count: int, raw: int) -> int:
    """A number below `count`, from a random 64-bit number."""
    return raw * count // _END


class PatchDataset:
    """Random patches of the records of a `Dataset`, by number: for PyTorch, Grain or numpy.

    The patches of record 0 come first, then those of record 1. `dataset[i]` is the dictionary that
    `Dataset.patch` returns, and reads no more. The patch depends only on seed, epoch and `i`: it is the same
    in every process, on every machine, and in `load_dataset`. Like a `Dataset`, it may be used by several
    threads and in forked and spawned processes.

    Args:
        records: records to draw from.
        patches: shape and number of the patches of each record.
        seed: seed of the patches.
        epoch: number of the epoch, from 0. Every epoch has different patches.

    Raises:
        UsageError: seed or epoch is not a whole number of at least 0; or `patches.foreground` is above 0, but
            records have no masks, or the index does not have the positions of labels.
    """

    def __init__(self, records: Dataset, patches: Patches, *, seed: int, epoch: int = 0) -> None:
        self.records, self.patches = records, patches
        self._seed, self._epoch = whole_number("seed", seed), whole_number("epoch", epoch)
        for name, number in (("seed", self._seed), ("epoch", self._epoch)):
            if number < 0:
                raise UsageError(f"{name} is {number}; it must be at least 0")
        try:
            records.prepare_patches(around_labels=patches.foreground > 0)
        except UsageError as e:
            raise UsageError(f"foreground is {patches.foreground}, but {e}, or drop foreground") from e

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
        volume = self.records.shape_of(record)
        positions = self.records.positions_of(record) if self.patches.foreground else None
        return record, self.patches.draw(volume, self._seed, self._epoch, number, positions)
