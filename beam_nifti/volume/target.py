"""The target of an example: an image of real values that a network predicts for each voxel."""

from __future__ import annotations

import numpy as np

from beam_nifti.errors import VolumeError
from beam_nifti.volume.nonfinite import replace_nonfinite
from beam_nifti.volume.rescale import NO_SCALING, Scaling, Voxels, keep_units

TARGET_DTYPE = "float32"

_FIRST_GAP = 1 << 24  # float32 has all integers up to this one


def in_own_units(name: str, voxels: Voxels, scaling: Scaling) -> Voxels:
    """The values of a target in the units of its file, as float32. NaN and infinite voxels stay.

    Raises:
        VolumeError: finite values are beyond float32.
    """
    if voxels.dtype == TARGET_DTYPE and scaling.is_identity:
        return voxels
    with np.errstate(over="ignore"):
        target = keep_units(voxels, scaling)
    beyond = np.isinf(target) & np.isfinite(voxels)
    if beyond.any():
        value = scaling.apply(voxels[beyond])[0]
        raise VolumeError(
            f"{name}: the target has values such as {value:g}, which {TARGET_DTYPE} cannot hold; store it in "
            "another unit"
        )
    return target


def is_rounded(voxels: Voxels, scaling: Scaling, target: Voxels) -> bool:
    """Whether `in_own_units` changed values of integers by a half or more."""
    if voxels.dtype.kind not in "iu" or np.abs(target).max() < _FIRST_GAP:
        return False
    if not scaling.is_identity:
        return bool((np.abs(scaling.apply(voxels) - target) >= 0.5).any())
    # float64 does not hold all integers either: those of float32 are 24 bits, and then zeros.
    sizes = voxels.astype(np.uint64)
    sizes = np.where(voxels < 0, -sizes, sizes)
    units = np.maximum(sizes & (~sizes + np.uint64(1)), np.uint64(1))
    return bool((sizes // units >= _FIRST_GAP).any())


def replace_in_target(target: Voxels, rule: str) -> tuple[Voxels, int]:
    """A target without NaN and infinite voxels, by `RecordConfig.nonfinite`, and how many were replaced."""
    if np.isfinite(target).all():
        return target, 0
    made, _, (count,) = replace_nonfinite(target.copy(), NO_SCALING, rule)
    return made.astype(TARGET_DTYPE, copy=False), count
