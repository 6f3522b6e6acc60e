"""Whether two records differ in nothing but rounding, as those of two versions of one library may."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from beam_nifti.record.example import ENDS_FEATURES, decode_doubles, decode_tensor

_EPSILON: Final = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Relative distance of neighbours, by dtype, at most."""

_NOISE: Final = 1e-9
"""Of float64 arithmetic, relative to the largest number: sums of millions of voxels differ by less."""

_BLOCK: Final = 1 << 20
"""Voxels that are compared at a time."""

_Feature = memoryview | npt.NDArray[np.generic]


def differ_in_rounding(one: Mapping[str, _Feature], other: Mapping[str, _Feature], names: list[str]) -> bool:
    """Whether some features of two records differ by no more than the last digit of what they store."""
    return all(name in one and name in other and _is_close(name, one[name], other[name]) for name in names)


def _is_close(name: str, one: _Feature, other: _Feature) -> bool:
    if name == "image_raw":
        voxels = (decode_tensor(feature) for feature in (one, other))  # type: ignore[arg-type]
        return _are_voxels_close(*voxels)
    if name in ENDS_FEATURES:
        return _are_close(np.array(decode_doubles(one)), np.array(decode_doubles(other)), _NOISE)
    a, b = np.asarray(one), np.asarray(other)
    is_number = a.dtype == b.dtype == np.float32 and a.shape == b.shape
    return is_number and _are_close(a, b, _EPSILON["float32"])


def _are_voxels_close(one: npt.NDArray[np.generic], other: npt.NDArray[np.generic]) -> bool:
    dtype = one.dtype.name
    # Of integers only those of uint8 are rounded; the others are stored as they are in the image.
    if (one.shape, dtype) != (other.shape, other.dtype.name) or dtype not in (*_EPSILON, "uint8"):
        return False
    blocks = [slice(start, start + _BLOCK) for start in range(0, one.size, _BLOCK)]
    a, b = one.reshape(-1), other.reshape(-1)
    absolute = 1.0
    if dtype != "uint8":
        largest = (np.abs(v[block].astype(np.float64)).max() for v in (a, b) for block in blocks)
        absolute = _NOISE * float(max(largest))
    relative = _EPSILON.get(dtype, 0.0)
    return all(_are_close(a[block], b[block], relative, absolute) for block in blocks)


def _are_close(
    one: npt.NDArray[np.generic], other: npt.NDArray[np.generic], relative: float, absolute: float = 0.0
) -> bool:
    a, b = one.astype(np.float64), other.astype(np.float64)
    allowed = np.maximum(relative * np.maximum(np.abs(a), np.abs(b)), absolute)
    return bool(np.all((np.abs(a - b) <= allowed) | (np.isnan(a) & np.isnan(b))))
