"""What a record says of itself: its voxels as float32, its mask and its other features, with numpy.

Source: docs/format.md, "Intensity".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from beam_nifti.config import RecordConfig
from beam_nifti.errors import ShardError
from beam_nifti.record.dataset_info import FILE_NAME, DatasetInfo
from beam_nifti.record.example import (
    MASK_FEATURE,
    SCALING_FEATURES,
    decode_doubles,
    decode_tensor,
    scaling_of,
    split_kind,
)
from beam_nifti.volume.intensity import rescale_voxels
from beam_nifti.volume.rescale import UINT8_LEVELS, Intensity, RescaleRange, Scaling, Voxels

Features = Mapping[str, memoryview | npt.NDArray[np.generic]]


def decode_image(features: Features, shape: tuple[int, ...], info: DatasetInfo) -> npt.NDArray[np.float32]:
    """The voxels of a record, of shape (X, Y, Z, C), as `reader.load_dataset` gives them.

    Args:
        features: of the record. The voxels may be moved within their memory, so they can be had once.
        shape: that they must have as they are stored.
        info: of the dataset.

    Raises:
        ShardError: they are not as `shape` and `info` say.
    """
    config, stored = info.record_config, _tensor(features, "image_raw")
    if stored.dtype.name != info.dtype or stored.shape != shape:
        by = FILE_NAME if info.shape else "the index"
        raise ShardError(
            f"it holds {stored.dtype.name} of {stored.shape}, and {by} says {info.dtype} of {shape}"
        )
    require_channels(shape, config)
    scaling, ends, count = Scaling(), None, config.num_channels
    if config.voxel_dtype == "native":
        scaling = scaling_of(features)
        if config.has_range:
            lows, highs = (_doubles(features, name, count) for name in ("rescale_low", "rescale_high"))
            ends = list(map(RescaleRange, lows, highs))
    return restore_image(stored, config, scaling, ends)


def require_channels(shape: tuple[int, ...], config: RecordConfig) -> None:
    """Refuse voxels of a shape that has not a channel for each of several images.

    Raises:
        ShardError: it has not.
    """
    if config.channels is not None and shape[3:] != (config.num_channels,):
        raise ShardError(f"it holds voxels of shape {shape}, and there are {config.num_channels} channels")


def restore_image(
    stored: Voxels,
    config: RecordConfig,
    scaling: Scaling,
    ends: Sequence[RescaleRange] | None,
    ranges: Sequence[Intensity] | None = None,
) -> npt.NDArray[np.float32]:
    """Voxels as `reader.load_dataset` gives them, of shape (X, Y, Z, C).

    Args:
        stored: as records hold them, in C order.
        config: of the records.
        scaling: of native voxels to the image's units.
        ends: of native voxels, of each image, what became 0 and 1; None where the range of each says it.
        ranges: of native voxels, the range of each image; None where `stored` has all of its voxels.
    """
    if config.voxel_dtype == "native":
        image = _rescale(stored, config, scaling, ends, ranges)
    elif stored.dtype == np.uint8:
        image = np.divide(stored, UINT8_LEVELS, dtype=np.float32)
    else:
        image = stored.astype(np.float32, copy=False)
    return image if image.ndim == 4 else image[..., np.newaxis]


def decode_mask(features: Features, shape: tuple[int, ...], info: DatasetInfo) -> npt.NDArray[Any]:
    """The labels of a record's mask, of shape (X, Y, Z, 1), in the dtype in which they are stored.

    Raises:
        ShardError: they are not as `shape` and `info` say.
    """
    tensor = _tensor(features, MASK_FEATURE)
    if tensor.dtype.name != info.record_config.mask_dtype or tensor.shape != shape[:3]:
        raise ShardError(f"its {MASK_FEATURE} is {tensor.dtype.name} of {tensor.shape}")
    return tensor[..., np.newaxis]


def decode_feature(features: Features, name: str, info: DatasetInfo) -> Any:
    """A small feature: bytes, a scalar or an array; None where a header has no scaling.

    Raises:
        ShardError: it is missing, or not of the kind that `info` says.
    """
    value = features.get(name)
    if value is None and name in SCALING_FEATURES:
        return None
    kind, size = split_kind(info.features[name])
    if isinstance(value, np.ndarray) and kind != "bytes" and value.size == (size or 1):
        return value[0] if value.size == 1 else value
    if isinstance(value, memoryview) and kind == "bytes":
        return bytes(value)
    raise ShardError(f"it has no {name} that is {info.features[name]}")


def _tensor(features: Features, name: str) -> npt.NDArray[Any]:
    """A tensor, moved to where its dtype may lie: by a few bytes, over those that announce it.

    It takes a tenth of the time of a copy, whose memory is fresh.
    """
    value = features.get(name)
    if not isinstance(value, memoryview):
        raise ShardError(f"it has no {name}")
    tensor = decode_tensor(value)
    if tensor.size == 0:
        raise ShardError(f"its {name} is empty")
    gap = tensor.ctypes.data % tensor.itemsize
    if gap:
        start = tensor.ctypes.data - np.frombuffer(value, np.uint8).ctypes.data
        content = value[start - gap : start - gap + tensor.nbytes]
        content[:] = value[start : start + tensor.nbytes]
        tensor = np.frombuffer(content, tensor.dtype).reshape(tensor.shape)
    return tensor


def _rescale(
    voxels: Voxels,
    config: RecordConfig,
    scaling: Scaling,
    ends: Sequence[RescaleRange] | None,
    ranges: Sequence[Intensity] | None,
) -> Voxels:
    """What a float32 dataset would hold of voxels that were stored as in the image's file."""
    none = [None] * config.num_channels
    of_images = list(zip(ends or none, ranges or none, strict=True))
    if config.channels is None:
        return _rescale_image(voxels, scaling, *of_images[0], config)
    images = (np.ascontiguousarray(voxels[..., number]) for number in range(config.num_channels))
    rescaled = [_rescale_image(i, scaling, *e, config) for i, e in zip(images, of_images, strict=True)]
    return np.stack(rescaled, -1)


def _doubles(features: Features, name: str, count: int) -> list[float]:
    numbers = decode_doubles(features[name]) if name in features else []
    if len(numbers) != count:
        raise ShardError(f"its {name} has {len(numbers)} numbers, expected {count}")
    return numbers


def _rescale_image(
    voxels: Voxels, scaling: Scaling, ends: RescaleRange | None, found: Intensity | None, config: RecordConfig
) -> Voxels:
    if found is None:
        low, high = sorted(scaling.apply(np.array([voxels.min(), voxels.max()], voxels.dtype)).tolist())
        found = Intensity(low, high, math.nan, math.nan)  # nothing asks for mean and deviation
    return rescale_voxels(voxels, scaling, found, ends, config)
