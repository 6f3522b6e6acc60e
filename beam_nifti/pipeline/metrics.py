"""What the steps of a pipeline have counted, summed over its workers. docs/monitoring.md has the names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Distribution:
    """Summary of whole numbers that a step has seen, such as the milliseconds that each volume took.

    Attributes:
        count: number of the numbers.
        sum: sum of the numbers.
        min: smallest number.
        max: largest number.
    """

    count: int
    sum: int
    min: int
    max: int

    def plus(self, other: Distribution) -> Distribution:
        """The summary of the numbers of both."""
        return Distribution(
            self.count + other.count, self.sum + other.sum, min(self.min, other.min), max(self.max, other.max)
        )


@dataclass(frozen=True)
class Metrics:
    """Counters and distributions by name, such as "volumes-loaded" and "load-msec"."""

    counters: Mapping[str, int] = field(default_factory=dict)
    distributions: Mapping[str, Distribution] = field(default_factory=dict)
