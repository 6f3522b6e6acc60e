"""Intensities: numpy in, numpy out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from beam_nifti.errors import VolumeError

Voxels = npt.NDArray[Any]
_CHUNK: Final = 1 << 15
"""Voxels a chunk of float64 arithmetic: 256 KiB, which stays in a core's cache."""
_FLOAT32_EXACT: Final = 1 << 24
"""Integers up to here are exact in float32."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """The NIfTI header's linear scaling: value = slope * voxel + inter.

    Source: NIfTI-1, "DATA SCALING"; a slope of 0 or NaN means none and is never built as one.
    """

    slope: float = 1.0
    inter: float = 0.0

    @property
    def is_identity(self) -> bool:
        """Whether the stored voxels are the values."""
        return self.slope == 1.0 and self.inter == 0.0

    def apply(self, voxels: Voxels) -> npt.NDArray[np.float64]:
        """The values of `voxels` in the image's units, as float64."""
        values = voxels.astype(np.float64)
        if self.slope != 1.0:
            values *= self.slope
        if self.inter != 0.0:  # adding 0.0 would turn -0.0 into 0.0
            values += self.inter
        return values


@dataclass(frozen=True, slots=True)
class Intensity:
    """A volume's intensities in the image's units: range, mean, standard deviation."""

    min: float
    max: float
    mean: float
    std: float


def measure(voxels: Voxels, scaling: Scaling) -> Intensity:
    """A volume's range, mean and standard deviation.

    The range is exact; the mean is within 1e-12 of it, and the standard deviation within 1e-7 of it.

    Args:
        voxels: any shape, real dtype, C order. Not modified.
        scaling: from stored voxels to the image's units.

    Raises:
        VolumeError: a voxel is NaN or infinite, before or after scaling.
    """
    # min and max of a float array are NaN if any voxel is: two passes find every bad voxel.
    ends = scaling.apply(np.array([voxels.min(), voxels.max()], voxels.dtype))
    if not np.isfinite(ends).all():
        if voxels.dtype.kind == "f":
            bad = int(np.count_nonzero(~np.isfinite(scaling.apply(voxels))))
            raise VolumeError(
                f"{bad} of {voxels.size} voxels are NaN or infinite; mask them or repair the image"
            )
        raise VolumeError(f"scaling by {scaling} gives infinite values; repair the header")
    flat, shrink = voxels.reshape(-1), _shrink(voxels)
    total = squares = 0.0
    # Shifting by the first voxel keeps the sums of squares free of cancellation.
    origin = float(flat[0]) * shrink
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK].astype(np.float64)
        if shrink != 1.0:
            chunk *= shrink
        chunk -= origin
        total += float(np.add.reduce(chunk))
        np.multiply(chunk, chunk, out=chunk)
        squares += float(np.add.reduce(chunk))
    mean = total / flat.size
    spread = math.sqrt(max(squares / flat.size - mean * mean, 0.0))
    return Intensity(
        min=float(min(ends)),
        max=float(max(ends)),
        mean=scaling.slope * ((mean + origin) / shrink) + scaling.inter,
        std=abs(scaling.slope) * (spread / shrink),
    )


def _shrink(voxels: Voxels) -> float:
    """A power of two that brings voxels whose squares float64 cannot hold near to 1; else 1."""
    if voxels.dtype != np.float64:
        return 1.0
    largest = max(abs(float(voxels.min())), abs(float(voxels.max())))
    if 1e-140 < largest < 1e140 or largest == 0.0:
        return 1.0
    return 2.0 ** -max(-1000, math.frexp(largest)[1])


def rescale_minmax(voxels: Voxels, intensity: Intensity, scaling: Scaling) -> npt.NDArray[np.float32]:
    """Map a volume's own intensity range linearly onto [0, 1].

    Bit-equal to `((x - x.min()) / (x.max() - x.min())).astype(float32)` in float64 without overflow:
    a quotient of two integers below 2**24 rounds to the same float32 whether or not it was rounded to
    float64 first, so those are divided in float32; all others in float64. Differences of integers are
    exact before they become float64, also where the integers have more bits than that. Rounding first
    to float64 and then to float32 leaves a result at most 1 ulp beside the exact quotient. The
    smallest voxels become 0.0, never -0.0.

    Args:
        voxels: any shape, real dtype, C order, as stored. Not modified.
        intensity: of the same voxels.
        scaling: from stored voxels to the image's units.

    Returns:
        float32 of the same shape, C order.

    Raises:
        VolumeError: all voxels are equal.

    Source: docs/format.md, "Intensity".
    """
    if voxels.dtype.kind in "iu" and scaling.is_identity:
        return _rescale_integers(voxels)
    if intensity.min == intensity.max:
        raise _constant(voxels, intensity.min)
    # 0.0 and -0.0 both give 0.0 above -0.0; which of them is the minimum depends on the processor.
    low_value, width = intensity.min or -0.0, intensity.max - intensity.min
    if math.isinf(width):  # the range of float64 itself: halve everything, which is exact up here
        halved = Scaling(scaling.slope / 2, scaling.inter / 2)
        return _divide(voxels, low_value / 2, intensity.max / 2 - low_value / 2, halved)
    return _divide(voxels, low_value, width, scaling)


def _constant(voxels: Voxels, value: float) -> VolumeError:
    return VolumeError(
        f"all {voxels.size} voxels are {value:g}: a constant image has no range to rescale; "
        "leave it out, or use --rescale none"
    )


def _rescale_integers(voxels: Voxels) -> npt.NDArray[np.float32]:
    low, high = int(voxels.min()), int(voxels.max())
    if low == high:
        raise _constant(voxels, low)
    # Modular subtraction of unsigned integers is exact where the signed one would overflow.
    unsigned = np.dtype(f"u{voxels.dtype.itemsize}")
    least = np.array(low, voxels.dtype).view(unsigned)
    exact = np.float32 if high - low < _FLOAT32_EXACT else np.float64
    width = exact(high - low)
    out = np.empty(voxels.shape, np.float32)
    source, target = voxels.reshape(-1).view(unsigned), out.reshape(-1)
    for start in range(0, source.size, _CHUNK):
        above = source[start : start + _CHUNK] - least
        np.divide(above, width, out=target[start : start + _CHUNK], dtype=exact, casting="unsafe")
    return out


def _divide(voxels: Voxels, low: float, width: float, scaling: Scaling) -> npt.NDArray[np.float32]:
    out = np.empty(voxels.shape, np.float32)
    source, target = voxels.reshape(-1), out.reshape(-1)
    for start in range(0, source.size, _CHUNK):
        values = scaling.apply(source[start : start + _CHUNK])
        values -= low
        values /= width
        target[start : start + _CHUNK] = values
    return out


def require_float32(intensity: Intensity) -> None:
    """Refuse intensities that are not rescaled and that float32 cannot hold.

    Raises:
        VolumeError: a value is beyond float32's range.
    """
    if max(abs(intensity.min), abs(intensity.max)) > float(np.finfo(np.float32).max):
        raise VolumeError(
            f"intensities from {intensity.min:g} to {intensity.max:g} do not fit float32, which "
            "training reads; use --rescale minmax"
        )


def to_float32(voxels: Voxels, scaling: Scaling) -> npt.NDArray[np.float32]:
    """The values in the image's units, rounded to float32.

    Args:
        voxels: as stored; within `require_float32` once they are scaled.
        scaling: from stored voxels to the image's units.
    """
    return _divide(voxels, 0.0, 1.0, scaling)
