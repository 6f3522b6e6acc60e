"""Statistics of a cohort, as a file and a dataset store them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from beam_nifti.support.json_types import require_type

FAR: Final = 3
"""Interquartile ranges from the mean of an unusual volume to the nearest quartile: Tukey's outer fences."""

LEAST_COMPARED: Final = 20
"""Volumes without which quartiles are too uncertain to call another volume unusual."""

_MOST: Final = 1 << 62  # of anything that is counted


def is_far(value: float, quartiles: tuple[float, float, float], least_width: float = 0.0) -> bool:
    """Whether a value is more than FAR interquartile ranges from the quartiles.

    An interquartile range below `least_width` counts as that.
    """
    low, _, high = quartiles
    width = max(high - low, least_width)
    return width > 0 and not low - FAR * width <= value <= high + FAR * width


@dataclass(frozen=True)
class ChannelStatistics:
    """The measured voxels of one channel of all volumes, in the image's units.

    Attributes:
        num_voxels: number of measured voxels.
        min: least value.
        max: largest value.
        mean: mean, correctly rounded.
        std: standard deviation of all voxels together, of the population.
        volume_quartiles: quartiles of the means of the volumes, each of which counts alike, with a relative
            error of at most 2**-12.
        percentiles: pairs of a percentile, from 0 to 100, and its value; ascending.
        percentile_error: largest relative error of these values; 0 if they are exact, and then they are those
            of `numpy.percentile`.
    """

    num_voxels: int
    min: float
    max: float
    mean: float
    std: float
    volume_quartiles: tuple[float, float, float]
    percentiles: tuple[tuple[float, float], ...]
    percentile_error: float

    def is_far(self, mean: float) -> bool:
        """Whether the mean of a volume is far from those of all volumes."""
        return is_far(mean, self.volume_quartiles)


@dataclass(frozen=True)
class LabelStatistics:
    """Voxels of one label of the masks, and the volumes that have any."""

    label: int
    num_voxels: int
    num_volumes: int


@dataclass(frozen=True)
class CohortStatistics:
    """Statistics of the volumes of a cohort, after their preparation.

    Attributes:
        options: names and values of the options that decided which voxels were measured.
        splits: splits whose volumes were measured.
        num_volumes: volumes that were measured.
        num_empty: those of them in which no voxel was selected.
        num_failed: volumes of these splits that failed, and are not among `num_volumes`.
        shape: median number of voxels along each axis.
        spacing: median voxel size along each axis, in millimetres.
        channels: the channels of a record, in order; a single one without `--path-column`.
        labels: labels of the masks but 0, ascending.
    """

    options: tuple[tuple[str, str], ...]
    splits: tuple[str, ...]
    num_volumes: int
    num_empty: int
    num_failed: int
    shape: tuple[float, float, float]
    spacing: tuple[float, float, float]
    channels: tuple[ChannelStatistics, ...]
    labels: tuple[LabelStatistics, ...]

    @classmethod
    def of(cls, facts: Any) -> CohortStatistics:
        """The statistics that a JSON object describes, which anybody may have written.

        Raises:
            ValueError: it describes none.
        """
        require_type(facts, cls, "rescale_stats")
        channels = tuple(map(_channel_of, facts["channels"]))
        labels = tuple(LabelStatistics(**label) for label in facts["labels"])
        found = cls(
            options=tuple((name, value) for name, value in facts["options"]),
            splits=tuple(facts["splits"]),
            **{name: facts[name] for name in ("num_volumes", "num_empty", "num_failed")},
            shape=_triple(facts["shape"]),
            spacing=_triple(facts["spacing"]),
            channels=channels,
            labels=labels,
        )
        found._require_possible()
        return found

    def is_far(self, number: int, mean: float) -> bool:
        """Whether the mean of a volume in a channel is far from those of enough measured volumes."""
        return self.num_volumes >= LEAST_COMPARED and self.channels[number].is_far(mean)

    def _require_possible(self) -> None:
        counts = [("num_volumes", self.num_volumes, 1), ("num_empty", self.num_empty, 0)]
        counts += [("num_failed", self.num_failed, 0), ("channels", len(self.channels), 1)]
        counts += [(f"channels[{n}].num_voxels", c.num_voxels, 1) for n, c in enumerate(self.channels)]
        for label in self.labels:
            name = f"label {label.label}"
            counts += [(name, label.label, 1), (f"voxels of {name}", label.num_voxels, 1)]
            counts += [(f"volumes of {name}", label.num_volumes, 1)]
        for name, count, least in counts:
            if not least <= count < _MOST:
                raise ValueError(f"rescale_stats: {name} is {count}, expected at least {least}")
        if self.num_empty > self.num_volumes:
            raise ValueError(f"rescale_stats: num_empty is {self.num_empty}, of {self.num_volumes} volumes")
        for name in ("shape", "spacing"):
            if not min(getattr(self, name)) > 0:
                raise ValueError(f"rescale_stats: {name} is {list(getattr(self, name))}, expected sizes")
        for number, channel in enumerate(self.channels):
            if not _is_possible(channel):
                shown = ", ".join(f"{f.name} {getattr(channel, f.name)}" for f in fields(channel))
                raise ValueError(f"rescale_stats: channels[{number}] has {shown}, which no voxels have")


def _channel_of(facts: Mapping[str, Any]) -> ChannelStatistics:
    names = ("min", "max", "mean", "std", "percentile_error")
    numbers = {name: float(facts[name]) for name in names}
    percentiles = tuple((float(p), float(value)) for p, value in facts["percentiles"])
    quartiles = _triple(facts["volume_quartiles"])
    return ChannelStatistics(
        facts["num_voxels"], volume_quartiles=quartiles, percentiles=percentiles, **numbers
    )


def _triple(numbers: Any) -> tuple[float, float, float]:
    x, y, z = map(float, numbers)
    return x, y, z


def _is_possible(channel: ChannelStatistics) -> bool:
    percents, values = zip(*channel.percentiles, strict=True) if channel.percentiles else ((), ())
    return (
        channel.min <= channel.mean <= channel.max
        and 0 <= channel.std <= channel.max - channel.min
        and math.isfinite(channel.max - channel.min)
        and 0 <= channel.percentile_error < 1
        and all(a < b for a, b in itertools.pairwise(percents))
        and all(0 <= p <= 100 for p in percents)
        and all(
            list(each) == sorted(each) and all(channel.min <= value <= channel.max for value in each)
            for each in (values, channel.volume_quartiles)
        )
    )
