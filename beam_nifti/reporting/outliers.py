"""Find volumes that differ from the others, by robust statistics, and in which measures they differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]

LIMIT: Final = 5.0
"""Median absolute deviations (MADs) from the median beyond which a volume is an outlier.

Of a normal distribution 5 MADs are 3.4 standard deviations: 7 in 10,000 volumes are beyond.
"""

FEWEST: Final = 10  # volumes for which median and MAD are meaningful
_SHOWN: Final = 100.0  # MADs above which the number is not shown


@dataclass(frozen=True, slots=True)
class Measure:
    """A number of every volume.

    Attributes:
        name: name in sentences.
        floor: deviation that is negligible, in the measure's unit: if most volumes are alike, their MAD is 0.
        only_low: whether only low values are suspicious.
    """

    name: str
    floor: float
    only_low: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """How unusual each volume is.

    Attributes:
        scores: largest deviation of each volume over all measures, in MADs.
        deviations: deviation of each measure and volume, in MADs, positive above the median.
    """

    scores: Numbers
    deviations: Mapping[Measure, Numbers]

    def outliers(self) -> npt.NDArray[np.int64]:
        """Numbers of the outliers, the most unusual first."""
        if len(self.scores) < FEWEST:
            return np.zeros(0, np.int64)
        order = np.argsort(-self.scores, kind="stable")
        return order[self.scores[order] > LIMIT]

    def reasons(self, number: int) -> list[str]:
        """Why a volume is an outlier, the largest deviation first; empty if it is not."""
        if len(self.scores) < FEWEST:
            return []
        found = [
            (m, float(d[number])) for m, d in self.deviations.items() if _suspicion(m, d[number]) > LIMIT
        ]
        return [deviation_text(measure, by) for measure, by in sorted(found, key=lambda f: -abs(f[1]))]


def rank(values: Mapping[Measure, Numbers]) -> Ranking:
    """Compare volumes by the median and the MAD of each measure, which outliers hardly change."""
    found = {measure: deviations(numbers, measure.floor, numbers) for measure, numbers in values.items()}
    suspicions = [_suspicion(measure, numbers) for measure, numbers in found.items()]
    return Ranking(np.max(suspicions, axis=0), found)


def deviations(numbers: Numbers, floor: float, others: Numbers) -> Numbers:
    """How far numbers are from the median of others, in MADs of these, but at least in `floor`."""
    if not numbers.size:
        return numbers
    median = np.median(others)
    spread = max(float(np.median(np.abs(others - median))), floor)
    return (numbers - median) / spread


def _suspicion(measure: Measure, deviation: Numbers) -> Numbers:
    return np.maximum(-deviation, 0) if measure.only_low else np.abs(deviation)


def deviation_text(measure: Measure, by: float) -> str:
    """A deviation in MADs as a phrase."""
    much = f"{abs(by):.1f}" if abs(by) < _SHOWN else f"more than {_SHOWN:.0f}"
    return f"{measure.name} {much} MADs {'above' if by > 0 else 'below'} the median"
