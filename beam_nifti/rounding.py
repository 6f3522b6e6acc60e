"""Whether two records differ in nothing but rounding, as those of two versions of one library may."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from beam_nifti.example import ENDS_FEATURES, decode_doubles, decode_tensor

_EPSILON: Final = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Relative distance of neighbours, by dtype, at most."""

_NOISE: Final = 1e-9
"""Of float64 arithmetic, relative to the largest number: sums of millions of voxels differ by less."""

_BLOCK: Final = 1 << 20
"""Voxels that are compared at a time."""

_Feature = memoryview | npt.NDArray[np.generic]


def differ_in_rounding(one: Mapping[str, _Feature], other: Mapping[str, _Feature], names: list[str]) -> bool:
    """Whether some features of two records differ by no more than the last digit of what they store.

    Args:
        one: the features of a record.
        other: those of the other record.
        names: of the features that differ.
    """
    return all(name in one and name in other and _is_close(name, one[name], other[name]) for name in names)


def _is_close(name: str, one: _Feature, other: _Feature) -> bool:
    if name == "image_raw":
        voxels = [decode_tensor(feature) for feature in (one, other)]  # type: ignore[arg-type]
        return _are_voxels_close(*voxels)
    if name in ENDS_FEATURES:
        return _are_close(np.array(decode_doubles(one)), np.array(decode_doubles(other)), _NOISE, 0.0)
    numbers = [np.asarray(feature) for feature in (one, other)]
    if any(n.dtype != np.float32 for n in numbers) or numbers[0].shape != numbers[1].shape:
        return False
    return _are_close(*numbers, _EPSILON["float32"], 0.0)


def _are_voxels_close(one: npt.NDArray[np.generic], other: npt.NDArray[np.generic]) -> bool:
    """Integers may be rounded to the next one: those of --voxel-dtype native do not differ at all."""
    dtype = one.dtype.name
    if (one.shape, dtype) != (other.shape, other.dtype.name) or dtype not in (*_EPSILON, "uint8"):
        return False
    relative = _EPSILON.get(dtype, 0.0)
    blocks = range(0, one.size, _BLOCK)
    flat = one.reshape(-1), other.reshape(-1)
    largest = max(float(np.abs(a[i : i + _BLOCK].astype(np.float64)).max()) for a in flat for i in blocks)
    absolute = 1.0 if dtype == "uint8" else _NOISE * largest
    return all(_are_close(*(a[i : i + _BLOCK] for a in flat), relative, absolute) for i in blocks)


def _are_close(
    one: npt.NDArray[np.generic], other: npt.NDArray[np.generic], relative: float, absolute: float
) -> bool:
    a, b = one.astype(np.float64), other.astype(np.float64)
    allowed = np.maximum(relative * np.maximum(np.abs(a), np.abs(b)), absolute)
    return bool(np.all((np.abs(a - b) <= allowed) | (np.isnan(a) & np.isnan(b))))
