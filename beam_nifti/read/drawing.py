"""Draw records by weight: as often as expected, rounded up or down, and determined by seed and epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from beam_nifti.errors import UsageError
from beam_nifti.read.order import Numbers
from beam_nifti.support.cells import is_missing, parse_number

_END: Final = float(1 << 64)


@dataclass(frozen=True, slots=True)
class Drawing:
    """By what records are drawn: exactly one of the two.

    Attributes:
        balance: column of the index whose values are all equally likely.
        weights: column of the index with the weight of each record.
    """

    balance: str | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        for name in ("balance", "weights"):
            given = getattr(self, name)
            if not (given is None or isinstance(given, str)):
                raise UsageError(f"{name} is {given!r:.80}; give the name of a column of the index")
        if self.balance is not None and self.weights is not None:
            raise UsageError(
                f"balance is {self.balance!r} and weights is {self.weights!r}, which are two ways to draw "
                "records; drop one of them"
            )

    @classmethod
    def of(cls, balance: str | None, weights: str | None) -> Drawing | None:
        """The drawing that arguments ask for; None if they ask for none."""
        return None if balance is None and weights is None else cls(balance, weights)

    @property
    def column(self) -> str:
        """The column that decides."""
        return self.balance if self.balance is not None else str(self.weights)

    def describe(self) -> dict[str, str | None]:
        """The fields, for JSON."""
        return {"balance": self.balance, "weights": self.weights}

    def weigh(self, cells: pa.ChunkedArray) -> Weighed:
        """The weights of records, by their cells of the column.

        Raises:
            UsageError: there are no records, a cell has no value, or a weight is not a finite number of at
                least 0, or all are 0.
        """
        name = "balance" if self.balance is not None else "weights"
        where = f"{name} is {self.column!r}"
        if not len(cells):
            raise UsageError(f"{where}, but there are no records to draw; select others")
        if pa.types.is_nested(cells.type):
            raise UsageError(f"{where}, a column of lists; give one with one value for each record")
        values = cells.to_pylist()
        missing = [at for at, value in enumerate(values) if _is_missing(value)]
        if missing:
            raise UsageError(
                f"{where}, which {len(missing)} of {len(values)} records do not have; select the others by "
                "where"
            )
        if self.balance is not None:
            _, classes, counts = np.unique(np.array(values), return_inverse=True, return_counts=True)
            return Weighed(classes.reshape(-1), 1 / counts[classes.reshape(-1)])
        weights = np.array([_weight(where, value) for value in values])
        if not weights.any():
            raise UsageError(f"{where}, which is 0 in all records; give one a weight above 0")
        return Weighed(np.zeros(len(weights), np.int64), weights / weights.max())


def _is_missing(value: Any) -> bool:
    return value is None or (is_missing(value) if isinstance(value, str) else value != value)


def _weight(where: str, value: Any) -> float:
    try:
        weight = parse_number(value) if isinstance(value, str) else float(value)
    except (ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise UsageError(f"{where}, which has the value {value!r}; give finite numbers of at least 0")
    return weight


@dataclass(frozen=True, slots=True, eq=False)
class Weighed:
    """Records with weights.

    Attributes:
        classes: number of the class of each record. Each class is drawn as often as expected, too.
        weights: weight of each record, at most 1.
    """

    classes: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]

    def draw(self, seed: int, epoch: int) -> Numbers:
        """Draw as many records as there are, in random order.

        Equal steps along the sum of all weights, from a random place, are taken in random order of records,
        class by class. A record of the share p of all weights is therefore drawn ⌊p · n⌋ or ⌈p · n⌉ times.

        Args:
            seed: seed of the draw, at least 0.
            epoch: number of the epoch, from 0. Every epoch has another draw.

        Returns:
            Numbers of records, from 0.
        """
        count = len(self.weights)
        # The numbers of a bit generator are the same in every version of numpy. Source: NEP 19. No patch, and
        # no order of records, has this key.
        generator = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch, 0, 1)))
        phase = generator.random_raw() / _END
        order = np.argsort(generator.random_raw(count), kind="stable")
        order = order[np.argsort(self.classes[order], kind="stable")]
        order = order[self.weights[order] > 0]
        ends = np.cumsum(self.weights[order])
        places = (np.arange(count) + phase) * (ends[-1] / count)
        drawn: Numbers = order[np.searchsorted(ends, places, side="right").clip(max=len(order) - 1)]
        drawn = drawn[np.argsort(generator.random_raw(count), kind="stable")]
        return drawn
