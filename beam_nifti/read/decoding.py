"""Decode a record with numpy: its voxels as float32, its mask, its target, and its other features.

Source: docs/format.md, "Intensity".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from beam_nifti.config import RecordConfig
from beam_nifti.errors import ShardError
from beam_nifti.record.dataset_files import FILE_NAME
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.record.example import (
    MASK_FEATURE,
    SCALING_FEATURES,
    TARGET_FEATURE,
    Features,
    decode_doubles,
    decode_tensor,
    scaling_of,
    split_kind,
)
from beam_nifti.volume.intensity import rescale_voxels
from beam_nifti.volume.rescale import UINT8_LEVELS, Intensity, RescaleRange, Scaling, Voxels
from beam_nifti.volume.target import TARGET_DTYPE


def decode_image(features: Features, shape: tuple[int, ...], info: DatasetInfo) -> npt.NDArray[np.float32]:
    """The voxels of a record, of shape (X, Y, Z, C), as `reader.load_dataset` returns them.

    Args:
        features: features of the record. The voxels may be moved within their memory, so decode
            them only once.
        shape: expected shape of the stored voxels.
        info: dataset_info.json.

    Raises:
        ShardError: the stored voxels do not match `shape` and `info`.
    """
    config, stored = info.record_config, _tensor(features, "image_raw")
    if stored.dtype.name != info.dtype or stored.shape != shape:
        by = FILE_NAME if info.shape else "the index"
        raise ShardError(
            f"it holds {stored.dtype.name} of {stored.shape}, but {by} has {info.dtype} of {shape}"
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
    """Check that voxels have one channel for each of several images.

    Raises:
        ShardError: the number of channels differs.
    """
    if config.channels is not None and shape[3:] != (config.num_channels,):
        raise ShardError(f"it holds voxels of shape {shape}, but there are {config.num_channels} channels")


def restore_image(
    stored: Voxels,
    config: RecordConfig,
    scaling: Scaling,
    ends: Sequence[RescaleRange] | None,
    ranges: Sequence[Intensity] | None = None,
) -> npt.NDArray[np.float32]:
    """Convert stored voxels to those that `reader.load_dataset` returns, of shape (X, Y, Z, C).

    `scaling`, `ends` and `ranges` apply to native voxels.

    Args:
        stored: voxels as records hold them, in C order.
        config: configuration of the records.
        scaling: scaling of the voxels to the image's units.
        ends: intensities of each image that become 0 and 1; None if its range determines them.
        ranges: range of each image; None if `stored` has all of its voxels.
    """
    if config.voxel_dtype == "native":
        image = _rescale(stored, config, scaling, ends, ranges)
    elif stored.dtype == np.uint8:
        image = np.divide(stored, UINT8_LEVELS, dtype=np.float32)
    else:
        image = stored.astype(np.float32, copy=False)
    return image if image.ndim == 4 else image[..., np.newaxis]


def decode_mask(features: Features, shape: tuple[int, ...], info: DatasetInfo) -> npt.NDArray[Any]:
    """The labels of a record's masks, of shape (X, Y, Z, C), in their stored dtype.

    Raises:
        ShardError: they do not match `shape` and `info`.
    """
    config = info.record_config
    return _plain_tensor(features, MASK_FEATURE, config.mask_dtype, shape[:3] + config.mask_axes)


def decode_target(features: Features, shape: tuple[int, ...], info: DatasetInfo) -> npt.NDArray[Any]:
    """The values of a record's target, float32 of shape (X, Y, Z, 1).

    Raises:
        ShardError: they do not match `shape` and `info`.
    """
    return _plain_tensor(features, TARGET_FEATURE, TARGET_DTYPE, shape[:3])


def _plain_tensor(
    features: Features, name: str, dtype: str | None, shape: tuple[int, ...]
) -> npt.NDArray[Any]:
    tensor = _tensor(features, name)
    if tensor.dtype.name != dtype or tensor.shape != shape:
        raise ShardError(f"its {name} is {tensor.dtype.name} of {tensor.shape}")
    return tensor if tensor.ndim == 4 else tensor[..., np.newaxis]


def decode_feature(features: Features, name: str, info: DatasetInfo) -> Any:
    """A small feature: bytes, a scalar or an array; None for the scaling of a header that has none.

    Raises:
        ShardError: the feature is missing, or not of the kind in `info`.
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
    """A tensor, aligned for its dtype: it is moved by a few bytes, over the bytes that precede it.

    This takes a tenth of the time of a copy, which needs new memory.
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
    """Rescale native voxels to those that a float32 dataset would hold."""
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
        found = Intensity(low, high, math.nan, math.nan)  # mean and deviation are not used
    return rescale_voxels(voxels, scaling, found, ends, config)
