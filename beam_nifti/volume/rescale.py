"""Rescale the intensities of an image to those of a record and back, with numpy only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from beam_nifti.errors import VolumeError

UINT8_LEVELS: Final = 255  # 1.0 in uint8
Voxels = npt.NDArray[Any]
_CHUNK: Final = 1 << 15  # voxels per chunk of float64 arithmetic: 256 KiB, which stays in a core's cache
_FLOAT32_EXACT: Final = 1 << 24  # integers up to here are exact in float32


@dataclass(frozen=True, slots=True)
class Scaling:
    """The NIfTI header's linear scaling: value = slope * voxel + inter.

    Source: NIfTI-1, "DATA SCALING". A slope of 0 or NaN means no scaling, and becomes the identity.
    """

    slope: float = 1.0
    inter: float = 0.0

    @property
    def is_identity(self) -> bool:
        """Whether the stored voxels are the values."""
        return self.slope == 1.0 and self.inter == 0.0

    def apply(self, voxels: Voxels) -> npt.NDArray[np.float64]:
        """The values of `voxels` in the image's units, as float64; infinite if float64 cannot hold them."""
        with np.errstate(over="ignore", invalid="ignore"):
            values = voxels.astype(np.float64)
            if self.slope != 1.0:
                values *= self.slope
            if self.inter != 0.0:  # adding 0.0 would turn -0.0 into 0.0
                values += self.inter
        return values


NO_SCALING: Final = Scaling()


@dataclass(frozen=True, slots=True)
class Intensity:
    """A volume's intensities in the image's units: range, mean, standard deviation."""

    min: float
    max: float
    mean: float
    std: float


@dataclass(frozen=True, slots=True)
class RescaleRange:
    """The intensities, in the image's units, that become 0 and 1: low < high."""

    low: float
    high: float


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype with this name, including "bfloat16", which numpy itself does not have."""
    if name == "bfloat16":
        import ml_dtypes  # here, because most datasets do not need it

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


def float_limits(name: str) -> Any:
    """As `numpy.finfo`, for a dtype by name, including "bfloat16"."""
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.finfo(name)  # type: ignore[no-untyped-call]
    return np.finfo(name)


FINITE_REMEDY: Final = "replace them with --nonfinite, or repair the image"


def measure(voxels: Voxels, scaling: Scaling, remedy: str = FINITE_REMEDY) -> Intensity:
    """A volume's range, mean and standard deviation.

    The range is exact. The error of the mean is at most 1e-12 of the mean or of the range's width, whichever
    is larger, and that of the standard deviation at most 1e-7 of the width.

    Args:
        voxels: any shape, real dtype, C order. Not modified.
        scaling: scaling from stored voxels to the image's units.
        remedy: for the error.

    Raises:
        VolumeError: a voxel is NaN or infinite, before or after scaling.
    """
    # min and max of a float array are NaN if any voxel is: two passes find every bad voxel.
    extremes = scaling.apply(np.array([voxels.min(), voxels.max()], voxels.dtype))
    if not np.isfinite(extremes).all():
        if voxels.dtype.kind == "f":
            bad = int(np.count_nonzero(~np.isfinite(scaling.apply(voxels))))
            raise VolumeError(f"{bad} of {voxels.size} voxels are NaN or infinite; {remedy}")
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
        min=float(min(extremes)),
        max=float(max(extremes)),
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


def rescale_minmax(voxels: Voxels, intensity: Intensity, scaling: Scaling, dtype: str = "float32") -> Voxels:
    """Map a volume's own intensity range linearly onto [0, 1].

    Bit-equal to `((x - x.min()) / (x.max() - x.min())).astype(float32)` in float64 without overflow: a
    quotient of two integers below 2**24 rounds to the same float32 with or without rounding to float64 first,
    so those are divided in float32; all others in float64. Differences of integers are exact before they
    become float64. Rounding to float64 first leaves a result at most 1 ulp from the exact quotient. The
    smallest voxels become 0.0, never -0.0.

    Args:
        voxels: any shape, real dtype, C order, as stored. Not modified.
        intensity: intensities of the same voxels.
        scaling: scaling from stored voxels to the image's units.
        dtype: dtype of the result, as in `quantize`.

    Raises:
        VolumeError: all voxels are equal.

    Source: docs/format.md, "Intensity".
    """
    if voxels.dtype.kind in "iu" and scaling.is_identity:
        if voxels.dtype.itemsize < np.dtype(np.float64).itemsize:
            return _rescale_integers(voxels, int(intensity.min), int(intensity.max), dtype)
        return _rescale_integers(voxels, int(voxels.min()), int(voxels.max()), dtype)
    if intensity.min == intensity.max:
        raise constant_image(intensity.min)
    return rescale_between(voxels, RescaleRange(intensity.min, intensity.max), scaling, dtype=dtype)


def rescale_between(
    voxels: Voxels,
    rescale_range: RescaleRange,
    scaling: Scaling,
    *,
    clip: bool = False,
    dtype: str = "float32",
) -> Voxels:
    """Map two intensities linearly onto 0 and 1: `(v - low) / (high - low)`.

    In float64, rounded once to float32. `low` becomes 0.0, never -0.0. With `clip`, values outside [0, 1]
    become 0 or 1. Arguments and result are as for `rescale_minmax`.
    """
    # 0.0 and -0.0 both give 0.0 above -0.0; which of them is the minimum depends on the processor.
    low, high = rescale_range.low or -0.0, rescale_range.high
    if math.isinf(high - low):  # the range of float64 itself: halve everything, which is exact up here
        low, high, scaling = low / 2, high / 2, Scaling(scaling.slope / 2, scaling.inter / 2)

    def fill(chunk: Voxels, out: Voxels) -> None:
        values = scaling.apply(chunk)
        if clip:
            np.clip(values, low, high, out=values)
        values -= low
        values /= high - low
        out[...] = values

    return _in_chunks(voxels, dtype, fill)


def _in_chunks(voxels: Voxels, dtype: str, fill: Callable[[Voxels, Voxels], None]) -> Voxels:
    """Let `fill` make float32 of one chunk of voxels after the other, and round it to the dtype."""
    out = np.empty(voxels.shape, numpy_dtype(dtype))
    source, target = voxels.reshape(-1), out.reshape(-1)
    rescaled = np.empty(_CHUNK, np.float32)
    for start in range(0, source.size, _CHUNK):
        chunk, stored = source[start : start + _CHUNK], target[start : start + _CHUNK]
        if dtype == "float32":
            fill(chunk, stored)
        else:
            fill(chunk, rescaled[: chunk.size])
            quantize(rescaled[: chunk.size], stored)
    return out


def quantize(rescaled: npt.NDArray[np.float32], out: npt.NDArray[Any]) -> None:
    """Round values to the dtype of `out`, halves to even; uint8 holds 255 times values in [0, 1]."""
    if out.dtype == np.uint8:
        # In float64 the product is exact, so that it is rounded once.
        out[...] = np.rint(np.multiply(rescaled, UINT8_LEVELS, dtype=np.float64))
    else:
        out[...] = rescaled


def constant_image(value: float) -> VolumeError:
    """The error for an image all of whose voxels are equal."""
    return VolumeError(
        f"all voxels are {value:g}: a constant image has no range to rescale; leave it out, or use "
        "--rescale none"
    )


def _rescale_integers(voxels: Voxels, low: int, high: int, dtype: str) -> Voxels:
    if low == high:
        raise constant_image(low)
    # Modular subtraction of unsigned integers is exact where the signed one would overflow.
    unsigned = np.dtype(f"u{voxels.dtype.itemsize}")
    least = np.array(low, voxels.dtype).view(unsigned)
    exact = np.float32 if high - low < _FLOAT32_EXACT else np.float64
    width = exact(high - low)

    def fill(chunk: Voxels, out: Voxels) -> None:
        np.divide(chunk.view(unsigned) - least, width, out=out, dtype=exact, casting="unsafe")

    return _in_chunks(voxels, dtype, fill)


def require_range(intensity: Intensity, rescale_range: RescaleRange | None, dtype: str) -> None:
    """Refuse a volume whose voxels the dtype of the records cannot hold.

    `rescale_range` is what becomes 0 and 1, without clipping; None for voxels in the image's units.
    """
    low, high = intensity.min, intensity.max
    if rescale_range is not None:
        with np.errstate(over="ignore"):
            low, high = (
                (np.array([low, high]) - rescale_range.low) / (rescale_range.high - rescale_range.low)
            ).tolist()
    if max(abs(low), abs(high)) > float(float_limits(dtype).max):
        what = "intensities" if rescale_range is None else "rescaled intensities"
        where = ", which training reads" if dtype == "float32" else ""
        raise VolumeError(f"{what} from {low:g} to {high:g} do not fit {dtype}{where}; use --rescale minmax")


def keep_units(voxels: Voxels, scaling: Scaling, dtype: str = "float32") -> Voxels:
    """The values in the image's units, within `require_range`, rounded to float32 and then to the dtype."""

    def fill(chunk: Voxels, out: Voxels) -> None:
        out[...] = scaling.apply(chunk)

    return _in_chunks(voxels, dtype, fill)


def restore_units(stored: Voxels, rescale_range: RescaleRange | None) -> Voxels:
    """The values in the image's units: `low + x * (high - low)`, the inverse of `rescale_between`.

    In float64, rounded once. Clipped values are not restored.

    Args:
        stored: any shape, C order, as a record holds rescaled voxels: x, or as uint8 255 times x.
        rescale_range: what became 0 and 1; None for voxels in the image's units.

    Returns:
        float32 of the same shape; float64 if float32 cannot hold the largest value.
    """
    if rescale_range is None:
        return stored.astype(np.float32, copy=False)
    levels = UINT8_LEVELS if stored.dtype == np.uint8 else 1
    factor = (
        0.5 if math.isinf(rescale_range.high - rescale_range.low) else 1.0
    )  # the range of float64 itself, as above
    low, width = rescale_range.low * factor, rescale_range.high * factor - rescale_range.low * factor

    def restore(chunk: Voxels) -> npt.NDArray[np.float64]:
        values = chunk.astype(np.float64)
        values *= width / levels
        values += low
        values /= factor
        return values

    largest = np.abs(restore(np.array([stored.min(), stored.max()]))).max()
    fits = largest == 0 or np.finfo(np.float32).tiny <= largest <= np.finfo(np.float32).max
    out = np.empty(stored.shape, np.float32 if fits else np.float64)
    source, target = stored.reshape(-1), out.reshape(-1)
    for start in range(0, source.size, _CHUNK):
        target[start : start + _CHUNK] = restore(source[start : start + _CHUNK])
    return out
