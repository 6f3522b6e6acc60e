"""Replace NaN and infinite voxels before anything is computed of an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from beam_nifti.errors import VolumeError
from beam_nifti.volume.rescale import NO_SCALING, Scaling, Voxels

_CHUNK: Final = 1 << 16  # voxels that are scaled at a time, in whole planes


def replace_nonfinite(
    voxels: Voxels,
    scaling: Scaling,
    rule: str,
    channels: Sequence[str] | None = None,
    *,
    is_native: bool = False,
) -> tuple[Voxels, Scaling, tuple[int, ...]]:
    """Replace voxels that are NaN or infinite, before or after scaling, exactly.

    Args:
        voxels: (X, Y, Z) or (X, Y, Z, C), C order. Changed in place.
        scaling: scaling from stored voxels to the image's units.
        rule: `zero`; `min`, the least finite voxel of the image; or `value:V`, V in the image's units.
        channels: names of the images of the last axis, each of which has its own minimum; None for one image.
        is_native: whether the dtype and the scaling must stay.

    Returns:
        The voxels and their scaling: the same array, or float64 in the image's units if stored voxels cannot
        hold the value; and how many voxels were replaced in each image.

    Raises:
        VolumeError: an image has no finite voxel; or dtype and scaling must stay, but cannot hold the value.
    """
    images = [voxels] if channels is None else [voxels[..., number] for number in range(len(channels))]
    if voxels.dtype.kind != "f":
        return voxels, scaling, (0,) * len(images)
    counts, fillings = list[int](), list[Any]()
    for number, image in enumerate(images):
        count, least = _survey(image, scaling)
        if count == image.size:
            of = f"channel {channels[number]}: " if channels else ""
            raise VolumeError(f"{of}all voxels are NaN or infinite; leave the image out")
        counts.append(count)
        fillings.append(least if rule == "min" else _stored(_value_of(rule), scaling, voxels.dtype))
    if any(count and filling is None for count, filling in zip(counts, fillings, strict=True)):
        value = _value_of(rule)
        if is_native:
            raise VolumeError(
                f"--nonfinite {rule}: no {voxels.dtype} voxel has exactly the value {value:g}; use "
                "--nonfinite min, or --voxel-dtype float32"
            )
        voxels, scaling = scaling.apply(voxels), NO_SCALING
        images = [voxels] if channels is None else [voxels[..., number] for number in range(len(channels))]
        fillings = [value] * len(images)
    for image, count, filling in zip(images, counts, fillings, strict=True):
        if count:
            for planes in _chunks(image):
                planes[~np.isfinite(scaling.apply(planes))] = filling
    return voxels, scaling, tuple(counts)


def _value_of(rule: str) -> float:
    return 0.0 if rule == "zero" else float(rule.partition(":")[2])


def _survey(image: Voxels, scaling: Scaling) -> tuple[int, Any]:
    """How many voxels are not finite, and the stored voxel of the least finite value, if any."""
    ends = scaling.apply(np.array([image.min(), image.max()], image.dtype))
    if np.isfinite(ends).all():  # NaN makes both NaN, and a scaling keeps the order
        return 0, None
    count, found = 0, list[Any]()
    for planes in _chunks(image):
        finite = planes[np.isfinite(scaling.apply(planes))]
        count += planes.size - finite.size
        if finite.size:
            found.append(finite.min() if scaling.slope > 0 else finite.max())
    if not found:
        return count, None
    return count, min(found) if scaling.slope > 0 else max(found)


def _stored(value: float, scaling: Scaling, dtype: np.dtype[Any]) -> Any:
    """The stored voxel that has exactly this value; None if there is none."""
    with np.errstate(over="ignore", under="ignore"):
        stored = np.array([(value - scaling.inter) / scaling.slope + 0.0]).astype(dtype)
    return stored[0] if scaling.apply(stored)[0] == value else None


def _chunks(image: npt.NDArray[Any]) -> Iterator[Voxels]:
    """Views of some planes each."""
    step = max(1, _CHUNK * len(image) // image.size)
    return (image[start : start + step] for start in range(0, len(image), step))
