"""From float32 to the dtypes that records hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

LARGEST: Final[Mapping[str, float]] = {
    "float32": float(np.finfo(np.float32).max),
    "float16": float(np.finfo(np.float16).max),
    "bfloat16": (2 - 2.0**-7) * 2.0**127,
}
"""Largest value of a dtype that voxels outside [0, 1] may be stored in."""

UINT8_LEVELS: Final = 255
"""What 1.0 is stored as in uint8."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of a name, also of "bfloat16", which numpy itself does not have."""
    if name == "bfloat16":
        import ml_dtypes  # here, as most datasets need none of it

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


def quantize(rescaled: npt.NDArray[np.float32], out: npt.NDArray[Any]) -> None:
    """Round to nearest, halves to even.

    Args:
        rescaled: within the range of the dtype of `out`; within [0, 1] for uint8.
        out: of the same shape. As uint8 it holds 255 times the value.
    """
    if out.dtype == np.uint8:
        # In float64 the product is exact, so that it is rounded once.
        out[...] = np.rint(np.multiply(rescaled, UINT8_LEVELS, dtype=np.float64))
    else:
        out[...] = rescaled
