"""The order of the records of an epoch, its batches, and the records of each host. Nothing is read."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from beam_nifti.errors import UsageError

Numbers = npt.NDArray[np.int64]


def whole_number(name: str, value: Any) -> int:
    """Convert an argument to a Python integer, because numpy's integers may overflow.

    Args:
        name: name of the argument, for the error message.
        value: an integer of Python, numpy or another library.

    Raises:
        UsageError: the value is not an integer, or is a boolean.
    """
    if isinstance(value, bool | np.bool_):
        raise UsageError(f"{name} is {value}; give a whole number")
    try:
        return operator.index(value)
    except TypeError:
        raise UsageError(f"{name} is {value!r}; give a whole number") from None


def item_number(index: Any, of: str) -> int:
    """The number of one item, such as a "record", from an index.

    Raises:
        TypeError: the index is something else, such as a slice or a boolean.
    """
    try:
        return whole_number("index", index)
    except UsageError:
        raise TypeError(f"index is {index!r:.80}; give the number of one {of}") from None


def require_share(name: str, value: Any, *, below_1: bool = False) -> float:
    """Convert an argument to a share from 0 to 1.

    Args:
        name: name of the argument, for the error message.
        value: a number of Python, numpy or another library.
        below_1: whether 1 is refused.

    Raises:
        UsageError: the value is not a number from 0 to 1, or is 1 where that is refused.
    """
    if not (isinstance(value, Real) and 0 <= float(value) <= 1) or (below_1 and float(value) == 1):
        bounds = "of at least 0 and below 1" if below_1 else "from 0 to 1"
        raise UsageError(f"{name} is {value!r}; give a share {bounds}")
    return float(value)


@dataclass(frozen=True, slots=True)
class Order:
    """The order in which one host reads records, one batch per step, epoch after epoch.

    Attributes:
        count: number of records of all hosts.
        batch_size: records per step. The last step of an epoch may have fewer.
        drop_remainder: whether to omit a smaller last step, and steps that only some hosts have, so that
            all hosts have the same number of steps.
        seed: seed of the shuffling, at least 0; None keeps the order of the records.
        host: number of this host, from 0.
        num_hosts: number of hosts. Host i reads the i-th of every `num_hosts` records of an epoch.
    """

    count: int
    batch_size: int = 1
    drop_remainder: bool = False
    seed: int | None = None
    host: int = 0
    num_hosts: int = 1

    @property
    def num_steps(self) -> int:
        """Steps per epoch."""
        if self.drop_remainder:
            return self.count // self.num_hosts // self.batch_size
        share = len(range(self.host, self.count, self.num_hosts))
        return -(-share // self.batch_size)

    def batch(self, step: int) -> Numbers:
        """The numbers of the records of a step, counted from 0 through all epochs.

        >>> [Order(5, batch_size=2).batch(step).tolist() for step in range(4)]
        [[0, 1], [2, 3], [4], [0, 1]]
        """
        epoch, place = divmod(step, self.num_steps)
        numbers = range(self.count) if self.seed is None else shuffle(self.count, self.seed, epoch)
        own = numbers[self.host :: self.num_hosts]
        return np.asarray(own[place * self.batch_size : (place + 1) * self.batch_size], np.int64)


@lru_cache(maxsize=2)
def shuffle(count: int, seed: int, epoch: int) -> Numbers:
    """The numbers below `count` in random order, which depends only on the seed and the epoch.

    Returns:
        A permutation, as a read-only array.
    """
    # The numbers of a bit generator are the same in every version of numpy, but the result of
    # Generator.permutation may change. Source: NEP 19.
    generator = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    order = np.argsort(generator.random_raw(count), kind="stable")
    order.flags.writeable = False
    return order
