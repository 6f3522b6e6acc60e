"""Statistics of many volumes: measured one volume at a time, and added in any order with the same result.

Sums are exact rational numbers, and histograms are counts, so neither rounds when it is added
(docs/adr/0029-cohort-statistics.md).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from beam_nifti.config import ChannelStatistics, CohortStatistics, LabelStatistics, RecordConfig
from beam_nifti.errors import VolumeError
from beam_nifti.volume.intensity import describe_rule, select_voxels
from beam_nifti.volume.label_map import label_counts
from beam_nifti.volume.rescale import Scaling, Voxels, measure
from beam_nifti.volume.volume import Volume, images_of

PERCENTILES: Final = (0.5, 1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0, 99.5)
"""Percentiles that are always computed."""

PERCENTILE_ERROR: Final = 2.0**-12
"""Largest relative error of a percentile that was not counted exactly: half of a bin."""

_Integers = npt.NDArray[np.int64]
_ROW_BITS: Final = 11  # of a bin's key: bins are counted in rows of 2,048
_ROW: Final = 1 << _ROW_BITS
_MOST_ROWS: Final = 4096  # of exact counts, 67 MB; all floats together have no more
_DENSE_ROWS: Final = 64  # rows that are counted without looking for those in use: a histogram of 1 MB
_LOWER_BITS: Final = 52 - _ROW_BITS  # of a float64, which its bin does not tell
_SMALL: Final = 1 << 22  # integers whose squares int64 can add up
_MAGNITUDE: Final = (1 << 63) - 1
_MOST_SPAN: Final = 1 << 14  # of rows that have a table of places: those of all floats
_COUNT_CHUNK: Final = 1 << 17
_SUM_CHUNK: Final = 1 << 15  # the sums of so many products of limbs are exact in float64
_SUM_BLOCK: Final = 1 << 22  # and those of so many in int64
_LEAST_EXPONENT: Final = -1080
_EXPONENTS: Final = 2112  # of float64, by frexp, from there on


def _sums_of_floats(flat: Voxels) -> tuple[Fraction, Fraction]:
    """The exact sum of finite float32 or float64 values, and that of their squares.

    A value is m * 2**e. m is cut into limbs of 12 or 18 bits, whose sums and products are added for each e
    without rounding.
    """
    limbs, bits = (2, 12) if flat.dtype.itemsize <= 4 else (3, 18)
    total = squares = Fraction(0)
    for begin in range(0, flat.size, _SUM_BLOCK):
        block = flat[begin : begin + _SUM_BLOCK]
        sums = np.zeros((3 * limbs - 1, _EXPONENTS), np.int64)
        for start in range(0, block.size, _SUM_CHUNK):
            rest, exponents = np.frexp(block[start : start + _SUM_CHUNK].astype(np.float64))
            places, cut = exponents - _LEAST_EXPONENT, list[npt.NDArray[np.float64]]()
            for _ in range(limbs):
                rest *= 1 << bits
                cut.append(np.trunc(rest))
                rest -= cut[-1]
            weights = cut + [
                sum((cut[i] * cut[s - i] for i in range(limbs) if 0 <= s - i < limbs), np.float64(0))
                for s in range(2 * limbs - 1)
            ]
            for row, weight in zip(sums, weights, strict=True):
                row += np.bincount(places, weight, _EXPONENTS).astype(np.int64)
        for place in np.flatnonzero(sums.any(0)).tolist():
            exponent, column = place + _LEAST_EXPONENT, sums[:, place].tolist()
            total += _limbs_value(column[:limbs], bits, exponent - bits)
            squares += _limbs_value(column[limbs:], bits, 2 * exponent - 2 * bits)
    return total, squares


def _limbs_value(limbs: Sequence[int], bits: int, exponent: int) -> Fraction:
    """The sum of `limbs[i] * 2**(exponent - i * bits)`."""
    whole = 0
    for limb in limbs:
        whole = (whole << bits) + limb
    exponent -= bits * (len(limbs) - 1)
    return Fraction(whole << exponent) if exponent >= 0 else Fraction(whole, 1 << -exponent)


def exact_sums(voxels: Voxels) -> tuple[Fraction, Fraction]:
    """The sum of finite voxels of any real dtype, and the sum of their squares, as exact numbers."""
    flat = voxels.reshape(-1)
    if flat.dtype.kind == "f":
        return _sums_of_floats(flat.astype(np.float32) if flat.dtype.itemsize < 4 else flat)
    if max(-int(flat.min()), int(flat.max())) < _SMALL:
        total = squares = 0
        for start in range(0, flat.size, _COUNT_CHUNK):
            chunk = flat[start : start + _COUNT_CHUNK].astype(np.int64)
            total += int(chunk.sum())
            squares += int(chunk @ chunk)
        return Fraction(total), Fraction(squares)
    if flat.dtype.itemsize < 8:
        return _sums_of_floats(flat.astype(np.float64))
    high, low = (flat >> 32).astype(np.float64), (flat & 0xFFFFFFFF).astype(np.float64)
    (of_high, high_squares), (of_low, low_squares), (_, both) = map(_sums_of_floats, (high, low, high + low))
    twice_products = both - high_squares - low_squares
    return of_high * 2**32 + of_low, high_squares * 2**64 + twice_products * 2**32 + low_squares


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of values, in bins whose keys are in the order of the values.

    A bin is an integer as it is stored, if all images are integers with one scaling; otherwise an interval of
    floats with the same sign, exponent and first 11 bits. Only rows of 2,048 bins that have counts are kept.

    Attributes:
        scaling: scaling of the stored integers; None if the bins are intervals of floats.
        rows: ascending numbers of the rows: the keys of their bins, divided by 2,048.
        counts: int64 (rows, 2048).
    """

    scaling: Scaling | None
    rows: _Integers
    counts: _Integers

    @classmethod
    def of(cls, voxels: Voxels, scaling: Scaling) -> Histogram:
        """Count voxels of any real dtype."""
        flat = voxels.reshape(-1)
        if flat.size == 0:
            return EMPTY
        is_exact = flat.dtype.kind in "iu" and int(flat.max()) <= _MAGNITUDE
        if is_exact and (found := _count(flat, None)) is not None:
            return cls(scaling, *found)
        found = _count(flat, scaling)
        assert found is not None  # all floats together have few rows
        return cls(None, *found)

    def __reduce__(self) -> tuple[Any, ...]:
        flat = self.counts.reshape(-1)
        places = np.flatnonzero(flat)
        return _unpacked, (self.scaling, self.rows, places, flat[places])

    @property
    def error(self) -> float:
        """Largest relative error of a percentile."""
        return 0.0 if self.scaling else PERCENTILE_ERROR

    def plus(self, other: Histogram) -> Histogram:
        """The counts of both, which are exact if both are, have one scaling, and are not too many."""
        if not (self.rows.size and other.rows.size):
            return self if self.rows.size else other
        if self.scaling != other.scaling:
            return self._of_floats().plus(other._of_floats())
        rows = np.union1d(self.rows, other.rows)
        if self.scaling and rows.size > _MOST_ROWS:
            return self._of_floats().plus(other._of_floats())
        counts = np.zeros((rows.size, _ROW), np.int64)
        for each in (self, other):
            counts[np.searchsorted(rows, each.rows)] += each.counts
        return Histogram(self.scaling, rows, counts)

    def _of_floats(self) -> Histogram:
        if self.scaling is None:
            return self
        places = np.flatnonzero(self.counts)
        keys = _keys_of(self._values(places))
        rows, inverse = np.unique(keys >> _ROW_BITS, return_inverse=True)
        counts = np.zeros((rows.size, _ROW), np.int64)
        np.add.at(counts, (inverse, keys & (_ROW - 1)), self.counts.reshape(-1)[places])
        return Histogram(None, rows, counts)

    def _values(self, places: _Integers) -> npt.NDArray[np.float64]:
        """Values of bins, by their places in the counts; of an interval, its middle."""
        keys = (self.rows[places >> _ROW_BITS] << _ROW_BITS) + (places & (_ROW - 1))
        if self.scaling is not None:
            return self.scaling.apply(keys)
        magnitudes = np.where(keys < 0, ~keys, keys)
        middles = ((magnitudes << _LOWER_BITS) | (1 << (_LOWER_BITS - 1))).view(np.float64)
        middles[magnitudes == 0] = 0.0  # and numbers below 1e-311
        signed: npt.NDArray[np.float64] = np.where(keys < 0, -middles, middles)
        return signed

    def percentiles(self, wanted: Sequence[float]) -> list[float]:
        """The result of `numpy.percentile` for all values that were counted, within `error`."""
        ends = np.cumsum(self.counts)
        last = int(ends[-1]) - 1
        ranks = [last * (p / 100) for p in wanted]
        numbers = np.array([[math.floor(rank), min(math.floor(rank) + 1, last)] for rank in ranks])
        is_reversed = self.scaling is not None and self.scaling.slope < 0
        places = np.searchsorted(ends, last - numbers if is_reversed else numbers, side="right")
        pairs = self._values(places)
        return [
            float(np.quantile(pair, rank - math.floor(rank))) + 0.0
            for pair, rank in zip(pairs, ranks, strict=True)
        ]


EMPTY: Final = Histogram(None, np.zeros(0, np.int64), np.zeros((0, _ROW), np.int64))


def _unpacked(scaling: Scaling | None, rows: _Integers, places: _Integers, counts: _Integers) -> Histogram:
    flat = np.zeros(rows.size * _ROW, np.int64)
    flat[places] = counts
    return Histogram(scaling, rows, flat.reshape(-1, _ROW))


def _keys_of(values: npt.NDArray[np.float64]) -> _Integers:
    """Keys of the intervals of finite values: their first bits, as integers in the same order."""
    bits = (values + 0.0).view(np.int64)  # without -0.0
    magnitudes = (bits & _MAGNITUDE) >> _LOWER_BITS
    return np.where(bits < 0, ~magnitudes, magnitudes)


def _count(flat: Voxels, scaling: Scaling | None) -> tuple[_Integers, _Integers] | None:
    """Rows and counts of voxels: as stored, without a scaling; None if those have too many rows."""

    def keys_of(chunk: Voxels) -> _Integers:
        return chunk.astype(np.int64) if scaling is None else _keys_of(scaling.apply(chunk))

    ends = np.array([flat.min(), flat.max()], flat.dtype)
    first, last = np.sort(keys_of(ends) >> _ROW_BITS).tolist()
    chunks = [flat[start : start + _COUNT_CHUNK] for start in range(0, flat.size, _COUNT_CHUNK)]
    rows = (
        np.arange(first, last + 1) if last - first < _DENSE_ROWS else _rows_of(chunks, keys_of, first, last)
    )
    if scaling is None and rows.size > _MOST_ROWS:
        return None
    counts = np.zeros(rows.size * _ROW, np.int64)
    starts = None if last - first >= _MOST_SPAN else np.zeros(last - first + 1, np.int64)
    if starts is not None:
        starts[rows - first] = np.arange(rows.size) << _ROW_BITS
    for chunk in chunks:
        keys = keys_of(chunk)
        of_row = keys >> _ROW_BITS
        keys &= _ROW - 1
        keys += np.searchsorted(rows, of_row) << _ROW_BITS if starts is None else starts[of_row - first]
        counts += np.bincount(keys, minlength=counts.size)
    by_row = counts.reshape(-1, _ROW)
    in_use = by_row.any(1)
    return rows[in_use], by_row[in_use]


def _rows_of(
    chunks: Iterable[Voxels], keys_of: Callable[[Voxels], _Integers], first: int, last: int
) -> _Integers:
    """The rows in use, of those between two."""
    if last - first >= _MOST_SPAN:
        return np.unique(np.concatenate([np.unique(keys_of(chunk) >> _ROW_BITS) for chunk in chunks]))
    is_used = np.zeros(last - first + 1, np.bool_)
    for chunk in chunks:
        is_used[(keys_of(chunk) >> _ROW_BITS) - first] = True
    return np.flatnonzero(is_used) + first


@dataclass
class ChannelMeasure:
    """The selected voxels of one channel, of some volumes.

    Attributes:
        count: number of voxels.
        total: their sum, exactly: of slope * voxel + inter, without rounding.
        squares: sum of their squares, exactly.
        low: least value, as float64.
        high: largest value, as float64.
        histogram: their counts.
        volume_means: counts of the means of the volumes with selected voxels.
    """

    count: int = 0
    total: Fraction = Fraction(0)
    squares: Fraction = Fraction(0)
    low: float = math.inf
    high: float = -math.inf
    histogram: Histogram = EMPTY
    volume_means: Histogram = EMPTY

    @classmethod
    def of(cls, voxels: Voxels, scaling: Scaling) -> ChannelMeasure:
        """Measure finite voxels of any real dtype, whose values are finite too."""
        if voxels.size == 0:
            return cls()
        total, squares = exact_sums(voxels)
        slope, inter, count = Fraction(scaling.slope), Fraction(scaling.inter), voxels.size
        ends = scaling.apply(np.array([voxels.min(), voxels.max()], voxels.dtype)) + 0.0
        found = cls(
            count=count,
            total=slope * total + inter * count,
            squares=slope * slope * squares + 2 * slope * inter * total + inter * inter * count,
            low=float(ends.min()),
            high=float(ends.max()),
            histogram=Histogram.of(voxels, scaling),
        )
        found.volume_means = Histogram.of(np.array([found.mean]), Scaling())
        return found

    @property
    def mean(self) -> float:
        """The mean of at least one voxel, as float64."""
        # Values are rounded, and the exact mean of equal ones may be beside them.
        return min(max(float(self.total / self.count), self.low), self.high)

    def add(self, other: ChannelMeasure) -> None:
        """Add the voxels of other volumes."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.histogram = self.histogram.plus(other.histogram)
        self.volume_means = self.volume_means.plus(other.volume_means)

    def statistics(self, percentiles: Sequence[float]) -> ChannelStatistics:
        """The statistics of at least one voxel."""
        variance = self.squares / self.count - (self.total / self.count) ** 2
        values = np.clip(self.histogram.percentiles(percentiles), self.low, self.high)
        quartiles = np.clip(self.volume_means.percentiles((25, 50, 75)), self.low, self.high)
        low, median, high = quartiles.tolist()
        return ChannelStatistics(
            num_voxels=self.count,
            min=self.low,
            max=self.high,
            mean=self.mean,
            std=min(_square_root(variance), self.high - self.low),
            volume_quartiles=(low, median, high),
            percentiles=tuple(zip(percentiles, values.tolist(), strict=True)),
            percentile_error=self.histogram.error,
        )


def _square_root(number: Fraction) -> float:
    """The square root, to the last bit or its neighbour, whatever the size of the number."""
    half = (number.numerator.bit_length() - number.denominator.bit_length()) // 2
    return math.ldexp(math.sqrt(float(number / Fraction(4) ** half)), half)


@dataclass
class CohortMeasure:
    """What was measured of some volumes. Measures of disjoint volumes add up, in any order and grouping.

    Attributes:
        channels: their channels; none before the first volume.
        num_volumes: number of volumes.
        num_empty: those in which no voxel was selected.
        shapes: counts of the numbers of voxels along each axis.
        spacings: counts of the voxel sizes along each axis.
        labels: by label of the masks, its voxels and the volumes that have any.
    """

    channels: tuple[ChannelMeasure, ...] = ()
    num_volumes: int = 0
    num_empty: int = 0
    shapes: tuple[Counter[int], ...] = field(default_factory=lambda: (Counter(), Counter(), Counter()))
    spacings: tuple[Counter[float], ...] = field(default_factory=lambda: (Counter(), Counter(), Counter()))
    labels: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, other: CohortMeasure) -> None:
        """Add other volumes."""
        self.channels = self.channels or tuple(ChannelMeasure() for _ in other.channels)
        for channel, further in zip(self.channels, other.channels, strict=False):
            channel.add(further)
        self.num_volumes += other.num_volumes
        self.num_empty += other.num_empty
        for own, further_sizes in zip(self.shapes, other.shapes, strict=True):
            own.update(further_sizes)
        for of_axis, further_spacings in zip(self.spacings, other.spacings, strict=True):
            of_axis.update(further_spacings)
        for label, (voxels, volumes) in other.labels.items():
            known = self.labels.get(label, (0, 0))
            self.labels[label] = known[0] + voxels, known[1] + volumes

    def statistics(
        self,
        config: RecordConfig,
        splits: Sequence[str],
        num_failed: int = 0,
    ) -> CohortStatistics:
        """The statistics of at least one volume, which has been measured by a configuration.

        Raises:
            VolumeError: no voxel of a channel was selected.
        """
        for name, channel in zip(config.channels or ("",), self.channels, strict=True):
            if channel.count == 0:
                of = f" of {name}" if name else ""
                raise VolumeError(
                    f"no voxel{of} is {describe_rule(config.rescale_within)} in any volume, so "
                    "--rescale-within selects nothing; select other voxels"
                )
        wanted = config.rescale_numbers if config.method == "cohort:percentile" else ()
        percentiles = sorted({*PERCENTILES, *wanted})
        return CohortStatistics(
            options=config.measured_options,
            splits=tuple(sorted(splits)),
            num_volumes=self.num_volumes,
            num_empty=self.num_empty,
            num_failed=num_failed,
            shape=_medians(self.shapes),
            spacing=_medians(self.spacings),
            channels=tuple(channel.statistics(percentiles) for channel in self.channels),
            labels=tuple(LabelStatistics(label, *self.labels[label]) for label in sorted(self.labels)),
        )


def _medians(counts: Sequence[Counter[Any]]) -> tuple[float, float, float]:
    x, y, z = (_median(of_axis) for of_axis in counts)
    return x, y, z


def _median(counts: Counter[Any]) -> float:
    """The middle value, or the mean of the two in the middle."""
    values = sorted(counts)
    ends = np.cumsum([counts[value] for value in values])
    middle = np.searchsorted(ends, [(ends[-1] - 1) // 2, ends[-1] // 2], side="right").tolist()
    low, high = (values[at] for at in middle)
    return float((low + high) / 2)


def measure_volume(volume: Volume, config: RecordConfig) -> CohortMeasure:
    """Measure one prepared volume: the voxels of each channel that `rescale_within` selects, and its grid.

    Raises:
        VolumeError: voxels are NaN or infinite, as in `rescale_volume`.
    """
    channels = list[ChannelMeasure]()
    for number, voxels in enumerate(images_of(volume, config)):
        try:
            measure(voxels, volume.scaling)  # refuses what a build refuses
        except VolumeError as e:
            raise VolumeError(f"{volume.row.files[number]}: {e}") from e
        if config.rescale_within is not None:
            voxels = voxels[select_voxels(voxels, volume.scaling, config.rescale_within, volume.mask)]
        channels.append(ChannelMeasure.of(voxels, volume.scaling))
    labels = dict[int, tuple[int, int]]()
    if volume.mask is not None:
        counts = label_counts(volume.mask)
        labels = {label: (int(counts[label]), 1) for label in np.flatnonzero(counts).tolist() if label}
    return CohortMeasure(
        channels=tuple(channels),
        num_volumes=1,
        num_empty=int(not all(channel.count for channel in channels)),
        shapes=tuple(Counter([size]) for size in volume.voxels.shape[:3]),
        spacings=tuple(Counter([float(size)]) for size in volume.zooms),
        labels=labels,
    )
