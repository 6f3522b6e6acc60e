"""The methods of `--rescale`: which intensities of a volume become 0 and 1, and what its voxels become.

`voxels` are as stored in the image, in C order and all finite; `scaling` takes them to the image's units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from beam_nifti.config import RecordConfig
from beam_nifti.errors import VolumeError
from beam_nifti.support.rules import threshold_of
from beam_nifti.volume.rescale import (
    Intensity,
    RescaleRange,
    Scaling,
    Voxels,
    keep_units,
    measure,
    rescale_between,
    rescale_minmax,
)

_CHUNK: Final = 1 << 17  # voxels that are selected or counted at a time


def describe_rule(rule: str | None) -> str:
    """The description of the voxels that a rule selects, for errors."""
    return "labelled by the mask" if rule == "mask" else (rule or "").replace(":", " ")


def select_voxels(
    voxels: Voxels, scaling: Scaling, rule: str, mask: Voxels | None = None
) -> npt.NDArray[np.bool_]:
    """Which voxels a rule selects, as bool of their shape.

    The rules are `nonzero`, `above:T`, with T in the image's units, and `mask`, for those with a label.
    """
    if rule == "mask":
        assert mask is not None
        labelled: npt.NDArray[np.bool_] = mask != 0
        if mask.shape[3:]:  # of several masks
            labelled = np.any(labelled, axis=3)
        if labelled.ndim < voxels.ndim:
            labelled = np.repeat(labelled[..., None], voxels.shape[-1], -1)
        return labelled
    threshold = threshold_of(rule)
    selection = np.empty(voxels.shape, np.bool_)
    source, target = voxels.reshape(-1), selection.reshape(-1)
    for start in range(0, source.size, _CHUNK):
        values = scaling.apply(source[start : start + _CHUNK])
        target[start : start + _CHUNK] = values != 0 if threshold is None else values > threshold
    return selection


def find_rescale_range(
    voxels: Voxels,
    scaling: Scaling,
    intensity: Intensity,
    config: RecordConfig,
    mask: Voxels | None = None,
    number: int = 0,
) -> RescaleRange | None:
    """The intensities of a volume that become 0 and 1; None if they are its range, or nothing is rescaled.

    They are measured in the voxels that the configuration selects, or are those of the cohort for the
    channel `number`.

    Raises:
        VolumeError: no voxel is selected, or the two are equal.

    Source: docs/format.md, "Intensity".
    """
    if not config.has_range:
        return None
    if (ranges := config.cohort_ranges) is not None:
        return RescaleRange(*ranges[number])
    is_part = config.rescale_within is not None
    if config.rescale_within is not None:
        voxels = voxels[select_voxels(voxels, scaling, config.rescale_within, mask)]
        if voxels.size == 0:
            raise VolumeError(
                f"no voxel is {describe_rule(config.rescale_within)}, so --rescale-within "
                "selects nothing; leave the image out, or select other voxels"
            )
    if config.method == "window":
        low, high = config.rescale_numbers
    elif config.method == "percentile":
        low, high = find_percentiles(voxels, scaling, config.rescale_numbers, overwrite=is_part)
    else:
        measured = measure(voxels, scaling) if is_part else intensity
        low, high = measured.min, measured.max
        if config.method == "zscore":
            low, high = measured.mean, measured.mean + measured.std
    if not (low < high and math.isfinite(high - low)):
        if config.method == "zscore" and measured.min == measured.max:
            raise VolumeError(
                f"all {'selected ' if is_part else ''}voxels are {low:g}, a constant image, which --rescale "
                "zscore cannot scale; leave the image out, or use another --rescale"
            )
        raise VolumeError(
            f"--rescale {config.rescale} would map {low:g} onto 0 and {high:g} onto 1, which is not a usable "
            "range; leave the image out, or use another --rescale"
        )
    return RescaleRange(low, high)


def find_percentiles(
    voxels: Voxels, scaling: Scaling, percentiles: Sequence[float], *, overwrite: bool = False
) -> list[float]:
    """The result of `numpy.percentile` for the values in the image's units, as float64, bit for bit.

    With `overwrite` the voxels may be reordered, which saves a copy.
    """
    flat = voxels.reshape(-1)
    last = flat.size - 1
    ranks = [last * (p / 100) for p in percentiles]
    places = np.array([[math.floor(rank), min(math.floor(rank) + 1, last)] for rank in ranks])
    # A scaling keeps the order of the voxels, or turns it around, so only these few are scaled.
    stored = _order_statistics(flat, places if scaling.slope > 0 else last - places, overwrite)
    neighbours = scaling.apply(stored)
    # numpy's own interpolation, between two values; 0.0 and not -0.0, which are one value in an order.
    return [
        float(np.quantile(pair, rank - math.floor(rank))) + 0.0
        for pair, rank in zip(neighbours, ranks, strict=True)
    ]


def _order_statistics(flat: Voxels, places: npt.NDArray[np.int64], overwrite: bool) -> Voxels:
    """The values at these positions of the sorted voxels."""
    if flat.dtype.kind == "f" or flat.dtype.itemsize > 2:
        ordered = flat if overwrite else flat.copy()
        ordered.partition(np.unique(places))
        return ordered[places]
    # Counting the values of 16 bits takes a fifth of the time of a partition.
    unsigned = np.dtype(f"u{flat.dtype.itemsize}")
    least = flat.min()
    counts = np.zeros(1 << 8 * unsigned.itemsize, np.int64)
    for start in range(0, flat.size, _CHUNK):
        above = flat[start : start + _CHUNK].view(unsigned) - least.view(unsigned)
        counts += np.bincount(above, minlength=counts.size)
    return np.searchsorted(np.cumsum(counts), places, side="right") + int(least)


def rescale_voxels(
    voxels: Voxels,
    scaling: Scaling,
    intensity: Intensity,
    rescale_range: RescaleRange | None,
    config: RecordConfig,
) -> Voxels:
    """The voxels that a record stores, unless it stores them natively; `intensity` is that of the volume."""
    if rescale_range is not None:
        return rescale_between(voxels, rescale_range, scaling, clip=config.clip, dtype=config.rescaled_dtype)
    if config.method == "none":
        return keep_units(voxels, scaling, config.rescaled_dtype)
    return rescale_minmax(voxels, intensity, scaling, config.rescaled_dtype)


def stored_range(
    intensity: Intensity, rescale_range: RescaleRange | None, config: RecordConfig
) -> npt.NDArray[np.generic]:
    """The least and the largest voxel that a record stores; the range in the image's units for native voxels.

    Every rescaling keeps the order of voxels.
    """
    found = np.array([intensity.min, intensity.max])
    if config.voxel_dtype == "native":
        return found
    with np.errstate(over="ignore"):
        return rescale_voxels(found, Scaling(), intensity, rescale_range, config)
