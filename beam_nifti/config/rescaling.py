"""The methods of `rescale`, and the voxels that they measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from beam_nifti.support.rules import spell_rule

RESCALE_METHODS: Final = (
    *("minmax", "percentile:LO,HI", "window:LO,HI", "zscore", "none"),
    *("cohort:zscore", "cohort:percentile:LO,HI"),
)
SELECTIONS: Final = ("nonzero", "above:T", "mask")
"""Which voxels: those that are not 0, those above T in the image's units, or those that the mask labels."""


@dataclass(frozen=True)
class _Range:
    """Two numbers of a method of `rescale`, which is named as the class is, in lower case."""

    low: float
    high: float

    def __str__(self) -> str:
        return spell_rule(type(self).__name__.lower(), (float(self.low), float(self.high)))


class Percentile(_Range):
    """Two percentiles of a volume's intensities, for `rescale`. str() gives the command line's value.

    >>> str(Percentile(0.5, 99))
    'percentile:0.5,99'

    Attributes:
        low: percentile that becomes 0, from 0 to 100.
        high: percentile that becomes 1, above `low`.
    """


class Window(_Range):
    """Two intensities in the image's units (CT: HU), for `rescale`. str() gives the command line's value.

    >>> str(Window(-160, 240))
    'window:-160,240'

    Attributes:
        low: intensity that becomes 0.
        high: intensity that becomes 1, above `low`.
    """
