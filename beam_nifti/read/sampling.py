"""Random patches of records. A seed decides them, together with epoch and number, on every machine."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, SupportsIndex

import numpy as np
import numpy.typing as npt

from beam_nifti.errors import UsageError
from beam_nifti.read.order import require_share, whole_number
from beam_nifti.read.patches import sizes
from beam_nifti.read.random_access import Dataset
from beam_nifti.read.records import Element

_DRAWS: Final = 6
"""Random numbers of 64 bits for each patch: one for each axis, and three that choose a labelled voxel."""

_END: Final = 1 << 64
"""Above these."""


@dataclass(frozen=True, slots=True)
class Patches:
    """Random patches of volumes: how large they are, and how many of each.

    Attributes:
        shape: voxels along x, y and z.
        per_volume: patches of each volume in an epoch.
        foreground: share of them, from 0 to 1, that are drawn around a labelled voxel of the mask: each of
            the labels but 0 is as likely as another. At the border of the volume they are moved inside.
            Volumes without labels have none.

    Raises:
        UsageError: `shape` is not three integers of at least 1 or does not fit into memory, `per_volume` is
            below 1, or `foreground` is no such share.
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
        """The corner of a patch: any that leaves it inside the volume is as likely as another.

        Where a volume is smaller than the patch, it is centred, as `--shape` centres what it pads.

        Args:
            volume: shape of the volume.
            seed: at least 0.
            epoch: from 0.
            number: of the patch in the epoch, from 0.
            positions: of labelled voxels, as `Dataset.positions_of`; None where `foreground` is 0.
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
    """A number below `count`, by a random number of 64 bits."""
    return raw * count // _END


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
        UsageError: seed or epoch is not a whole number of at least 0; or patches are to be drawn around
            labels, and the index does not say where these are.
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
        positions = self.records.positions_of(record) if self.patches.foreground else None
        return record, self.patches.draw(volume, self._seed, self._epoch, number, positions)
