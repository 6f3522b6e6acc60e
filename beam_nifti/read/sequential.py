"""The sequential engine of `reader.load_dataset`, which reads whole shards in TensorFlow's graph.

Native voxels are rescaled in the graph, to the same bits as in a float32 dataset of the same images. float16,
bfloat16 and uint8 are converted to float32.
Source: docs/format.md, "Intensity".
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import tensorflow as tf

from beam_nifti.errors import DatasetError, printable
from beam_nifti.read import opening
from beam_nifti.read.columns import Column, channels_of, describe_columns, parse_kind
from beam_nifti.read.opening import REBUILT, Opened
from beam_nifti.read.request import Batching, Passes
from beam_nifti.record.dataset_files import FILE_NAME, MAX_INFO_BYTES, no_dataset
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.record.example import RANGE_FEATURES, SCALING_FEATURES, TARGET_FEATURE, TENSOR_FEATURES
from beam_nifti.storage import paths as storage

_OPEN_SHARDS: Final = 8
"""Number of shards that are read at a time. It is constant, so the order is the same on every machine."""

_SHUFFLE_BUFFER: Final = 64
"""Number of examples from which the next one is drawn: 230 MB for float32 volumes of 91×109×91."""

_SHUFFLE_BYTES: Final = 4 << 30
"""Limit of the voxels in that buffer: 64 float32 volumes of 256×256×256, 8 of 512×512×512."""

IMAGE: Final = {"image_raw": tf.io.FixedLenFeature([], tf.string)}
LABEL: Final = {"label": tf.io.FixedLenFeature([], tf.float32)}

# Adding -0.0 changes nothing; adding 0.0 would turn a -0.0 into 0.0.
_NO_SCALING: Final = {"scl_slope": struct.pack("<d", 1.0), "scl_inter": struct.pack("<d", -0.0)}
"""Values of these features for headers that do not scale, whose records lack them."""

_NORMAL: Final = 2.0**-126
_STEP: Final = 2.0**-149
_SIGN: Final = -(2**31)
_UNSIGNED: Final = {
    tf.int8: tf.uint8,
    tf.int16: tf.uint16,
    tf.int32: tf.uint32,
    tf.int64: tf.uint64,
}


def open_dataset(path: str) -> Opened:
    """Open a complete dataset, with TensorFlow if it is in a store.

    Raises:
        DatasetError: there is no complete dataset, it is damaged, or TensorFlow does not support its scheme.
    """
    if not storage.is_remote(path):
        return opening.open_dataset(path)
    name = f"{path}/{FILE_NAME}"
    try:
        with tf.io.gfile.GFile(name, "rb") as handle:
            content = handle.read(MAX_INFO_BYTES + 1)
    except tf.errors.NotFoundError as e:
        raise no_dataset(path) from e
    except tf.errors.UnimplementedError as e:
        raise DatasetError(
            f"{path}: TensorFlow has no such file system ({e.message}); drop engine, or install "
            "beam-nifti[io] and import tensorflow_io first"
        ) from e
    except (tf.errors.OpError, RuntimeError) as e:  # the latter from tensorflow-io, of az://
        raise DatasetError(f"{name}: TensorFlow cannot read it ({e}); engine='indexed' may say why") from e
    if len(content) > MAX_INFO_BYTES:
        raise DatasetError(f"{name}: has more than the {MAX_INFO_BYTES:,} bytes that it may have")
    return Opened.of(path, content)


def read_examples(
    opened: Opened,
    split: str,
    names: Sequence[str],
    batching: Batching,
    passes: Passes,
    channels_first: bool,
) -> tf.data.Dataset:
    """A dataset whose elements are tuples of tensors, one per column.

    Raises:
        DatasetError: the split does not exist, or a shard is missing or truncated.
        UsageError: records do not have a column, or a batch would have examples of different shapes.
    """
    info, shards = opened.info, opened.shards_of([split])
    opened.require_shards(shards, tf.io.gfile.listdir)
    for name in names:
        if name not in opened.columns_of_records:
            remedy = "; a column of the index requires engine='indexed'"
            raise opened.no_column(name, opened.columns_of_records, remedy)
    columns = describe_columns(names, info, channels_of(info), channels_first)
    batching.check(opened.path, columns)
    files = {storage.join(opened.path, shard.name): shard.num_examples for shard in shards}
    compression = "GZIP" if info.config["compression"] == "gzip" else ""
    check = partial(_checked, opened)
    records = read_records(list(files), compression, passes, list(files.values()), check)
    records = records.apply(tf.data.experimental.assert_cardinality(info.splits[split].num_examples))
    return finish(
        records, _parser(info, columns, channels_first), batching, passes, info.shape, tf.as_dtype(info.dtype)
    )


def finish(
    records: tf.data.Dataset,
    parse: Callable[[tf.Tensor], tuple[tf.Tensor, ...]],
    batching: Batching,
    passes: Passes,
    shape: Sequence[int] | None,
    dtype: tf.DType,
) -> tf.data.Dataset:
    """Shuffle, parse and batch serialized Examples."""
    if passes.shuffle:
        records = records.shuffle(shuffle_window(shape, dtype.size), passes.seed)
    examples = records.map(parse, num_parallel_calls=tf.data.AUTOTUNE)
    return batching.apply(examples).repeat(passes.epochs).prefetch(tf.data.AUTOTUNE)


def read_records(
    files: Sequence[str],
    compression: str,
    passes: Passes,
    counts: Sequence[int] | None = None,
    check: Callable[[tf.data.Dataset], tf.data.Dataset] = lambda files: files,
) -> tf.data.Dataset:
    """The serialized Examples of some files: one from each of eight files in turn.

    Args:
        files: paths of the files.
        compression: compression of all files: "GZIP" or "".
        passes: the order of the files, and the epochs.
        counts: expected number of records of each file; None does not check it.
        check: function of the dataset of files, which adds a check at the beginning of each epoch.
    """
    shown = list(map(printable, files))  # in TensorFlow's errors
    places = check(tf.data.Dataset.from_tensor_slices((list(files), shown, list(counts or [0] * len(files)))))
    if passes.shuffle:
        places = places.shuffle(len(files), passes.seed)

    def read(path: tf.Tensor, name: tf.Tensor, count: tf.Tensor) -> tf.data.Dataset:
        if counts is None:
            return tf.data.TFRecordDataset(path, compression)
        return _read_shard(path, name, compression, tf.cast(count, tf.int64))

    return places.interleave(
        read, cycle_length=min(_OPEN_SHARDS, len(files)), num_parallel_calls=tf.data.AUTOTUNE
    )


def _checked(opened: Opened, files: tf.data.Dataset) -> tf.data.Dataset:
    """The files, after a check that the dataset was not rebuilt."""

    def check(content: tf.Tensor) -> tf.Tensor:
        is_same = tf.io.read_file(f"{opened.path}/{FILE_NAME}") == content
        with tf.control_dependencies(
            [tf.debugging.Assert(is_same, [printable(f"{opened.path}: {REBUILT}")])]
        ):
            return tf.identity(is_same)

    return tf.data.Dataset.from_tensors(opened.content).map(check).flat_map(lambda _: files)


def _read_shard(path: tf.Tensor, name: tf.Tensor, compression: str, count: tf.Tensor) -> tf.data.Dataset:
    """The records of a shard, with an error by its name if a record is damaged, missing or surplus."""
    # TensorFlow's own error does not name the file. Here, damage ends the shard early, and the number of
    # records before it shows where. ignore_errors would retry a file that cannot be opened for ever, so it is
    # opened before.
    opened = tf.data.FixedLengthRecordDataset(path, 1, buffer_size=1).take(1)
    records = opened.flat_map(
        lambda _: tf.data.TFRecordDataset(path, compression).ignore_errors(log_warning=True)
    )
    filled = records.concatenate(tf.data.Dataset.from_tensors(b"").repeat()).take(count + 1).enumerate()

    def is_record(record: tf.Tensor) -> tf.Tensor:
        return tf.strings.length(record) > 0  # a comparison with b"" would copy it

    def check(number: tf.Tensor, record: tf.Tensor) -> tf.Tensor:
        says = tf.strings.as_string(count) + " in dataset_info.json"
        unread = "record number " + tf.strings.as_string(number) + " from 0, of " + says + ", cannot be read"
        problem = tf.where(number < count, unread, "it has more records than the " + says)
        message = name + ": " + problem + "; copy the dataset again, or run beam-nifti verify"
        right = (number < count) & is_record(record)
        with tf.control_dependencies([tf.debugging.Assert(right, [message])]):
            return tf.identity(record)

    expected = filled.filter(lambda number, record: (number < count) | is_record(record))
    return expected.map(check)


def shuffle_window(shape: Sequence[int] | None, itemsize: int) -> int:
    """The number of examples from which a shuffle draws, which is the same on every machine."""
    if shape is None:
        return _SHUFFLE_BUFFER
    return max(1, min(_SHUFFLE_BUFFER, _SHUFFLE_BYTES // (math.prod(shape) * itemsize)))


def _parser(
    info: DatasetInfo, columns: Sequence[Column], channels_first: bool
) -> Callable[[tf.Tensor], tuple[tf.Tensor, ...]]:
    """A function from a serialized Example to its cells."""
    wanted: dict[str, tf.io.FixedLenFeature] = {}
    for column in columns:
        wanted |= _features_of(column.name, info)
    rescale, mask_axes = _native_rescaler(info), info.record_config.mask_axes

    def place(volume: tf.Tensor, column: Column) -> tf.Tensor:
        return tf.ensure_shape(move_channels(volume) if channels_first else volume, column.shape)

    def cell(column: Column, features: dict[str, tf.Tensor]) -> tf.Tensor:
        if column.name == "image":
            image = _parse_image(features["image_raw"], info)
            if info.config["voxel_dtype"] == "native":
                return place(rescale(image, features), column)
            values = tf.cast(image, tf.float32)
            return place(values / 255.0 if info.dtype == "uint8" else values, column)
        if column.name == "mask":
            mask = tf.io.parse_tensor(features["mask_raw"], tf.as_dtype(info.config["mask_dtype"]))
            mask = tf.ensure_shape(mask, (*(info.shape or (None,) * 3)[:3], *mask_axes))
            mask = mask if mask_axes else mask[..., tf.newaxis]
            return place(tf.cast(mask, tf.int32), column)
        if TENSOR_FEATURES.get(column.name) in info.features:
            target = tf.io.parse_tensor(features[TARGET_FEATURE], tf.float32)
            target = tf.ensure_shape(target, (info.shape or (None,) * 3)[:3])
            return place(target[..., tf.newaxis], column)
        value = features[column.name]
        if value.dtype == column.dtype == tf.string:
            return value
        numbers = _decode_doubles(value) if value.dtype == tf.string else tf.cast(value, column.dtype)
        return tf.reshape(numbers, column.shape)

    def parse(record: tf.Tensor) -> tuple[tf.Tensor, ...]:
        features = tf.io.parse_single_example(record, wanted)
        return tuple(cell(column, features) for column in columns)

    return parse


def _features_of(name: str, info: DatasetInfo) -> dict[str, tf.io.FixedLenFeature]:
    """The features that a column requires."""
    tensor = TENSOR_FEATURES.get(name, name)
    needed = [tensor if tensor in info.features else name]
    if name == "image" and info.config["voxel_dtype"] == "native":
        needed += [feature for feature in (*SCALING_FEATURES, *RANGE_FEATURES) if feature in info.features]
    found = {}
    for feature in needed:
        dtype, shape = parse_kind(info.features[feature])
        found[feature] = tf.io.FixedLenFeature(shape, dtype, b"" if feature in SCALING_FEATURES else None)
    return found


def move_channels(volume: tf.Tensor) -> tf.Tensor:
    """Move the channel axis of a volume (X, Y, Z, C) to the front: (C, X, Y, Z)."""
    if volume.shape[3] == 1:  # without a copy
        return volume[..., 0][tf.newaxis]
    return tf.transpose(volume, (3, 0, 1, 2))


def _parse_image(feature: tf.Tensor, info: DatasetInfo) -> tf.Tensor:
    """The stored voxels, with a channel axis."""
    voxels = tf.io.parse_tensor(feature, tf.as_dtype(info.dtype))
    if info.shape is not None:
        voxels = tf.ensure_shape(voxels, info.shape)
    # A dataset may have both 3-D and 4-D volumes.
    image = tf.reshape(voxels, tf.concat([tf.shape(voxels)[:3], [-1]], 0))
    return tf.ensure_shape(image, (*(info.shape or (None,) * 3)[:3], channels_of(info)))


def _decode_doubles(feature: tf.Tensor) -> tf.Tensor:
    """The float64 numbers in a feature of bytes."""
    return tf.io.decode_raw(feature, tf.float64)


def _native_rescaler(info: DatasetInfo) -> Callable[[tf.Tensor, dict[str, tf.Tensor]], tf.Tensor]:
    """A function from native voxels, and the features of their record, to X."""
    channels = info.config.get("channels")
    has_range = "rescale_low" in info.features

    def rescale_image(voxels: tf.Tensor, doubles: dict[str, tf.Tensor]) -> tf.Tensor:
        if has_range:
            return _rescale_between(_to_float64(voxels), **doubles, clip=info.config.get("clip", False))
        return _rescale(voxels, **doubles, method=info.config["rescale"])

    def rescale(voxels: tf.Tensor, features: dict[str, tf.Tensor]) -> tf.Tensor:
        scaling = {
            name: _decode_doubles(tf.where(features[name] == b"", none, features[name]))[0]
            for name, none in _NO_SCALING.items()
        }
        ends = {name: _decode_doubles(features[name]) for name in (RANGE_FEATURES if has_range else ())}
        if channels is None:
            return rescale_image(voxels, scaling | {name: numbers[0] for name, numbers in ends.items()})
        images = [
            rescale_image(voxels[..., i], scaling | {name: numbers[i] for name, numbers in ends.items()})
            for i in range(len(channels))
        ]
        return tf.stack(images, -1)

    return rescale


def _rescale(voxels: tf.Tensor, scl_slope: tf.Tensor, scl_inter: tf.Tensor, method: str) -> tf.Tensor:
    """Rescale by the range of the voxels, with the same bits as `beam_nifti.volume.rescale`."""
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
    """Rescale integers without scaling; their differences are exact, whatever their size."""
    low = tf.reduce_min(voxels)
    # Unsigned subtraction wraps around to the exact result, where a signed one would overflow.
    unsigned = _UNSIGNED.get(voxels.dtype, voxels.dtype)
    above = tf.bitcast(voxels, unsigned) - tf.bitcast(low, unsigned)
    # For integers of up to 16 bits, the float32 quotient is the same and takes half the time.
    exact = tf.float32 if unsigned.size <= 2 else tf.float64
    quotient = tf.cast(above, exact) / tf.cast(tf.reduce_max(above), exact)
    return tf.cast(quotient, tf.float32)


def _rescale_values(voxels: tf.Tensor, slope: tf.Tensor, inter: tf.Tensor) -> tf.Tensor:
    """Rescale floats, and integers with a scaling, in float64."""
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
    """Rescale in float64, with the same bits as `beam_nifti.volume.rescale.rescale_between`."""
    low, high = rescale_low, rescale_high
    # high - low may overflow float64; halving numbers that large is exact.
    factor = tf.where(tf.math.is_inf(high - low), tf.constant(0.5, tf.float64), 1.0)
    low, high = low * factor, high * factor
    # Subtracting -0.0 from 0.0 or -0.0 gives 0.0. Which of them is the minimum depends on the processor.
    low = tf.where(low == 0.0, tf.constant(-0.0, tf.float64), low)
    values = values * (scl_slope * factor) + scl_inter * factor
    if clip:
        values = tf.clip_by_value(values, low, high)
    return _to_float32((values - low) / (high - low))


# TensorFlow's threads treat subnormal numbers as 0, and round results that would be subnormal to 0. Float32
# images may have some (probability maps, smoothed masks), so these are computed as integers: the n-th
# subnormal float32 above 0 is n times _STEP, and has the bits of the integer n.


def _to_float64(voxels: tf.Tensor) -> tf.Tensor:
    """Convert to float64 exactly, including subnormal float32."""
    values = tf.cast(voxels, tf.float64)
    if voxels.dtype != tf.float32:
        return values
    bits = tf.bitcast(voxels, tf.int32)
    size = tf.cast(tf.bitwise.bitwise_and(bits, ~_SIGN), tf.float64) * _STEP
    return tf.where(size < _NORMAL, tf.where(bits < 0, -size, size), values)


def _to_float32(values: tf.Tensor) -> tf.Tensor:
    """Round to the nearest float32, including subnormal ones."""
    rounded = tf.bitcast(tf.cast(values, tf.float32), tf.int32)
    size = tf.abs(values)
    steps = tf.cast(tf.round(tf.where(size < _NORMAL, size / _STEP, 0.0)), tf.int32)
    return tf.bitcast(tf.bitwise.bitwise_or(rounded, steps), tf.float32)
