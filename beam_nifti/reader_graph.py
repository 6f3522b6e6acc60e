"""The sequential engine of `reader.load_dataset`: shards read from end to end, all in TensorFlow's graph.

Voxels that were stored as in the file ("native") are rescaled in the graph, to the same bits
that a float32 dataset of the same images holds; those of float16, bfloat16 and uint8 become float32.
Source: docs/format.md, "Intensity".
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

import tensorflow as tf

from beam_nifti.dataset_info import FILE_NAME, DatasetInfo, no_dataset
from beam_nifti.errors import DatasetError
from beam_nifti.example import ENDS_FEATURES

_OPEN_SHARDS: Final = 8
"""Shards that are read at a time. A constant, so that the order is the same on every machine."""

_SHUFFLE_BUFFER: Final = 64
"""Examples among which the next one is drawn: 230 MB for float32 volumes of 91×109×91."""

_SHUFFLE_BYTES: Final = 4 << 30
"""Voxels in that buffer, at most: 64 float32 volumes of 256×256×256, 8 of 512×512×512."""

IMAGE: Final = {"image_raw": tf.io.FixedLenFeature([], tf.string)}
_MASK: Final = {"mask_raw": tf.io.FixedLenFeature([], tf.string)}
LABEL: Final = {"label": tf.io.FixedLenFeature([], tf.float32)}
_LABEL_TYPES: Final = {
    "float": tf.io.FixedLenFeature([], tf.float32),
    "int64": tf.io.FixedLenFeature([], tf.int64),
    "bytes": tf.io.FixedLenFeature([], tf.string),
}
# Adding -0.0 changes nothing; adding 0.0 would turn a -0.0 into 0.0.
_SCALING: Final = {
    "scl_slope": tf.io.FixedLenFeature([], tf.string, struct.pack("<d", 1.0)),
    "scl_inter": tf.io.FixedLenFeature([], tf.string, struct.pack("<d", -0.0)),
}
_ENDS: Final = {name: tf.io.FixedLenFeature([], tf.string) for name in ENDS_FEATURES}
_DOUBLES: Final = {**_SCALING, **_ENDS}

_NORMAL: Final = 2.0**-126
_STEP: Final = 2.0**-149
_SIGN: Final = -(2**31)
_UNSIGNED: Final = {
    tf.int8: tf.uint8,
    tf.int16: tf.uint16,
    tf.int32: tf.uint32,
    tf.int64: tf.uint64,
}


def read_info(folder: str) -> DatasetInfo:
    """What the dataset_info.json of a complete dataset says, read by TensorFlow.

    Raises:
        DatasetError: there is none, it is damaged, or TensorFlow does not know the folder's scheme.
    """
    path = f"{folder}/{FILE_NAME}"
    try:
        with tf.io.gfile.GFile(path, "rb") as handle:
            text = handle.read()
    except tf.errors.NotFoundError as e:
        raise no_dataset(folder) from e
    except tf.errors.UnimplementedError as e:
        raise DatasetError(
            f"{folder}: TensorFlow has no such file system ({e.message}); install beam-nifti[io] and "
            "import tensorflow_io first"
        ) from e
    return DatasetInfo.from_json(text, path)


def read_examples(
    folder: str, info: DatasetInfo, split: str, targets: Sequence[str], *, shuffle: bool, seed: int | None
) -> tf.data.Dataset:
    """The examples of a split, as tuples of X and the targets.

    Args:
        folder: of the dataset.
        info: of it.
        split: name of one.
        targets: features of labels, or "mask".
        shuffle: whether to change their order.
        seed: of that.

    Raises:
        DatasetError: there is no such split, or a shard is missing.
    """
    files = _shard_files(folder, info, split)
    compression = "GZIP" if info.config["compression"] == "gzip" else ""
    names = tf.data.Dataset.from_tensor_slices(files)
    if shuffle:
        names = names.shuffle(len(files), seed)
    records = names.interleave(
        lambda name: tf.data.TFRecordDataset(name, compression),
        cycle_length=min(_OPEN_SHARDS, len(files)),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    # Ends an epoch with an error if a shard holds other than what dataset_info.json says.
    records = records.apply(tf.data.experimental.assert_cardinality(info.splits[split].num_examples))
    if shuffle:
        records = records.shuffle(_window(info), seed)
    return records.map(_parser(info, targets), num_parallel_calls=tf.data.AUTOTUNE)


def _window(info: DatasetInfo) -> int:
    """Examples that a shuffle draws from; the same on every machine."""
    if info.shape is None:
        return _SHUFFLE_BUFFER
    each = math.prod(info.shape) * int(tf.as_dtype(info.dtype).size)
    return max(1, min(_SHUFFLE_BUFFER, _SHUFFLE_BYTES // each))


def _shard_files(folder: str, info: DatasetInfo, split: str) -> list[str]:
    """Paths of a split's shards, all of which are there."""
    shards = info.split(split).shards
    present = set(tf.io.gfile.listdir(folder))  # one request, however many shards
    missing = [s.name for s in shards if s.name not in present]
    if missing:
        raise DatasetError(
            f"{folder}: {len(missing)} of {len(shards)} shards of split {split!r} are missing, "
            f"{missing[0]} among them; copy the dataset again, or build it again with --overwrite"
        )
    return [f"{folder}/{s.name}" for s in shards]


def _parser(info: DatasetInfo, targets: Sequence[str]) -> Callable[[tf.Tensor], Any]:
    """From a serialized Example to X and the targets."""
    native = info.config["voxel_dtype"] == "native"
    has_ends = native and "rescale_low" in info.features
    labels = [name for name in targets if name != "mask"]
    wanted = IMAGE | {name: _LABEL_TYPES[info.features[name]] for name in labels}
    wanted |= _MASK if "mask" in targets else {}
    wanted |= {**(_SCALING if native else {}), **(_ENDS if has_ends else {})}
    rescale = _native_rescaler(info)
    # A dataset that was built before there were frames to choose says nothing of them.
    is_mixed = info.shape is None and (
        info.config.get("frames") == "all" or bool(info.config.get("channels"))
    )
    shape = [None] * 3 if info.shape is None else info.shape

    def parse(record: tf.Tensor) -> Any:
        features = tf.io.parse_single_example(record, wanted)
        voxels = tf.io.parse_tensor(features["image_raw"], tf.as_dtype(info.dtype))
        if not is_mixed:
            voxels = tf.ensure_shape(voxels, shape)
        if native:
            voxels = rescale(voxels, {name: features[name] for name in wanted if name in _DOUBLES})
        elif info.dtype == "uint8":
            voxels = tf.cast(voxels, tf.float32) / 255.0
        else:
            voxels = tf.cast(voxels, tf.float32)
        if is_mixed:  # 3-D and 4-D, perhaps, side by side
            image = tf.reshape(voxels, tf.concat([tf.shape(voxels)[:3], [-1]], 0))
            image = tf.ensure_shape(image, [None] * 4)
        else:
            image = voxels if len(shape) == 4 else tf.expand_dims(voxels, 3)
        if "mask" in targets:
            mask = tf.io.parse_tensor(features["mask_raw"], tf.as_dtype(info.config["mask_dtype"]))
            mask = tf.ensure_shape(mask, [None] * 3 if info.shape is None else info.shape[:3])
            return image, tf.expand_dims(tf.cast(mask, tf.int32), 3)
        return image, *(features[name] for name in labels)

    return parse


def _native_rescaler(info: DatasetInfo) -> Callable[[tf.Tensor, dict[str, tf.Tensor]], tf.Tensor]:
    """From voxels as they are in the file, and the float64 features beside them, to X."""
    channels = info.config.get("channels")

    def rescale_image(voxels: tf.Tensor, doubles: dict[str, tf.Tensor]) -> tf.Tensor:
        if "rescale_low" in doubles:
            return _rescale_between(_to_float64(voxels), **doubles, clip=info.config["clip"])
        return _rescale(voxels, **doubles, method=info.config["rescale"])

    def rescale(voxels: tf.Tensor, features: dict[str, tf.Tensor]) -> tf.Tensor:
        decoded = {name: tf.io.decode_raw(data, tf.float64) for name, data in features.items()}
        if channels is None:
            return rescale_image(voxels, {name: numbers[0] for name, numbers in decoded.items()})
        images = [
            rescale_image(
                voxels[..., i],
                {name: numbers[i if name in _ENDS else 0] for name, numbers in decoded.items()},
            )
            for i in range(len(channels))
        ]
        return tf.stack(images, -1)

    return rescale


def _rescale(voxels: tf.Tensor, scl_slope: tf.Tensor, scl_inter: tf.Tensor, method: str) -> tf.Tensor:
    """What `beam_nifti.rescale` makes of the same voxels, bit for bit, where their range says it."""
    if method == "none":
        return _to_float32(_to_float64(voxels) * scl_slope + scl_inter)
    if not voxels.dtype.is_integer:
        return _rescale_values(voxels, scl_slope, scl_inter)
    return tf.cond(
        (scl_slope == 1.0) & (scl_inter == 0.0),
        lambda: _rescale_integers(voxels),
        lambda: _rescale_values(voxels, scl_slope, scl_inter),
    )


def _rescale_integers(voxels: tf.Tensor) -> tf.Tensor:
    """Unscaled integers: their differences are exact, whatever their size."""
    low = tf.reduce_min(voxels)
    # Modular subtraction of unsigned integers is exact where the signed one would overflow.
    unsigned = _UNSIGNED.get(voxels.dtype, voxels.dtype)
    above = tf.bitcast(voxels, unsigned) - tf.bitcast(low, unsigned)
    # In float32 the quotient of narrow integers is the same, and takes half the time.
    exact = tf.float32 if unsigned.size <= 2 else tf.float64
    quotient = tf.cast(above, exact) / tf.cast(tf.reduce_max(above), exact)
    return tf.cast(quotient, tf.float32)


def _rescale_values(voxels: tf.Tensor, slope: tf.Tensor, inter: tf.Tensor) -> tf.Tensor:
    """Floats, and integers with a scaling: all in float64."""
    values = _to_float64(voxels)
    ends = tf.stack([tf.reduce_min(values), tf.reduce_max(values)]) * slope + inter
    return _rescale_between(values, slope, inter, tf.reduce_min(ends), tf.reduce_max(ends))


def _rescale_between(
    values: tf.Tensor,
    scl_slope: tf.Tensor,
    scl_inter: tf.Tensor,
    rescale_low: tf.Tensor,
    rescale_high: tf.Tensor,
    clip: bool = False,
) -> tf.Tensor:
    """What `beam_nifti.rescale.rescale_between` makes of the same voxels, in float64, bit for bit."""
    low, high = rescale_low, rescale_high
    # A range wider than float64's own overflows; halving everything is exact up there.
    factor = tf.where(tf.math.is_inf(high - low), tf.constant(0.5, tf.float64), 1.0)
    low, high = low * factor, high * factor
    # 0.0 and -0.0 both give 0.0 above -0.0; which of them is the minimum depends on the processor.
    low = tf.where(low == 0.0, tf.constant(-0.0, tf.float64), low)
    values = values * (scl_slope * factor) + scl_inter * factor
    if clip:
        values = tf.clip_by_value(values, low, high)
    return _to_float32((values - low) / (high - low))


# TensorFlow's threads take subnormal numbers for 0 and round to 0 what would be one. Float32 images do
# hold some (probability maps, smoothed masks), so those go through integers: the n-th subnormal float32
# above 0 is n times _STEP, and has the bits of the integer n.


def _to_float64(voxels: tf.Tensor) -> tf.Tensor:
    """Exactly, subnormal float32 included."""
    values = tf.cast(voxels, tf.float64)
    if voxels.dtype != tf.float32:
        return values
    bits = tf.bitcast(voxels, tf.int32)
    size = tf.cast(tf.bitwise.bitwise_and(bits, ~_SIGN), tf.float64) * _STEP
    return tf.where(size < _NORMAL, tf.where(bits < 0, -size, size), values)


def _to_float32(values: tf.Tensor) -> tf.Tensor:
    """Rounded to nearest, subnormal float32 included."""
    rounded = tf.bitcast(tf.cast(values, tf.float32), tf.int32)
    size = tf.abs(values)
    steps = tf.cast(tf.round(tf.where(size < _NORMAL, size / _STEP, 0.0)), tf.int32)
    return tf.bitcast(tf.bitwise.bitwise_or(rounded, steps), tf.float32)
