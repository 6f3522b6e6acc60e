"""TFRecords of other programs, for `reader.load_dataset(…, layout=…)`. Only the files are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import tensorflow as tf

from beam_nifti.errors import DatasetError, ShardError
from beam_nifti.read.request import Batching, Passes
from beam_nifti.read.sequential import finish, move_channels, read_records
from beam_nifti.record.example import decode_example, decode_tensor
from beam_nifti.record.tfrecord import HEADER_BYTES, is_record_header

LAYOUTS: Final = ("plain", "nobrainer", "medicai")

_GZIP: Final = b"\x1f\x8b"
_MARKS: Final = {"plain": "image_raw", "nobrainer": "feature/value", "medicai": "label_raw"}
"""A feature that every record of this layout has."""

_Features = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Cell:
    """One tensor of a record.

    Attributes:
        features: features that contain it, for TensorFlow's parser.
        parse: function from the parsed features to the tensor.
        shape: shape in the first record.
    """

    features: Mapping[str, tf.io.FixedLenFeature]
    parse: Callable[[_Features], tf.Tensor]
    shape: tuple[int, ...]


def read_files(
    pattern: str, layout: str, batching: Batching, passes: Passes, channels_first: bool
) -> tf.data.Dataset:
    """A dataset of X, or of X and y if records have labels, of unknown cardinality.

    Raises:
        DatasetError: no file matches, no file holds a record, or the first record does not have the layout.
    """
    files = sorted(tf.io.gfile.glob(pattern))
    if not files:
        raise DatasetError(
            f"{pattern}: no file matches; give the glob of the TFRecords, such as DIR/*.tfrec*"
        )
    path, compression, first = _read_first(pattern, files)
    if _MARKS[layout] not in first:
        raise DatasetError(
            f"{path}: its first record has {', '.join(sorted(first))}, but not {_MARKS[layout]}, which "
            f"layout={layout!r} requires; choose the layout that the files have: {', '.join(LAYOUTS)}"
        )
    try:
        cells = _DESCRIBE[layout](first)
    except (KeyError, TypeError, ValueError, ShardError) as e:
        raise DatasetError(f"{path}: its first record is not of layout={layout!r} ({e!r})") from e
    varies = batching.pad or batching.ragged
    wanted = {name: feature for cell in cells for name, feature in cell.features.items()}

    def parse(record: tf.Tensor) -> tuple[tf.Tensor, ...]:
        features = tf.io.parse_single_example(record, wanted)
        image, *label = (_finish(cell, cell.parse(features), varies, channels_first) for cell in cells)
        return tf.cast(image, tf.float32), *label

    records = read_records(files, compression, passes)
    elements = finish(records, parse, batching, passes, None if varies else cells[0].shape, tf.float32)
    return elements if len(cells) > 1 else elements.map(lambda image: image)


def _read_first(pattern: str, files: Sequence[str]) -> tuple[str, str, _Features]:
    """The first file that holds a record, its compression, and the features of that record."""
    for path in files:
        try:
            with tf.io.gfile.GFile(path, "rb") as handle:
                head = handle.read(HEADER_BYTES)
            # An uncompressed file may begin like gzip by chance; then the checksum in its header is right.
            compression = "GZIP" if head.startswith(_GZIP) and not is_record_header(head) else ""
            records = list(tf.data.TFRecordDataset(path, compression).take(1).as_numpy_iterator())
            if records:
                return path, compression, decode_example(records[0])
        except (ShardError, tf.errors.OpError) as e:
            raise DatasetError(f"{path}: its first record cannot be read ({e}); is it a TFRecord?") from e
    raise DatasetError(f"{pattern}: none of the {len(files)} files holds a record; was writing them stopped?")


def _finish(cell: _Cell, tensor: tf.Tensor, varies: bool, channels_first: bool) -> tf.Tensor:
    """A tensor with the shape of its cell; volumes get a channel axis."""
    if varies:
        tensor = tf.ensure_shape(tensor, [None] * len(cell.shape))
    else:
        same = tf.debugging.assert_equal(
            tf.shape(tensor),
            tf.constant(cell.shape, tf.int32),
            "a volume has another shape than the first one; use pad=True, or ragged=True",
        )
        with tf.control_dependencies([same]):
            tensor = tf.ensure_shape(tf.identity(tensor), cell.shape)
    if len(cell.shape) not in (3, 4):
        return tensor
    volume = tensor[..., tf.newaxis] if len(cell.shape) == 3 else tensor
    return move_channels(volume) if channels_first else volume


def _describe_plain(first: _Features) -> list[_Cell]:
    """The cells of "plain": a serialized tensor and, if there is one, a number."""
    stored, label = decode_tensor(first["image_raw"]), first.get("label")
    dtype = tf.as_dtype(stored.dtype.name)
    image = _Cell(
        {"image_raw": tf.io.FixedLenFeature([], tf.string)},
        lambda features: tf.io.parse_tensor(features["image_raw"], dtype),
        stored.shape,
    )
    if label is None:
        return [image]
    if not isinstance(label, np.ndarray) or label.size != 1:
        raise ValueError("label is not one number")
    kind = tf.io.FixedLenFeature([], tf.as_dtype(label.dtype.name))
    return [image, _Cell({"label": kind}, lambda features: features["label"], ())]


def _describe_nobrainer(first: _Features) -> list[_Cell]:
    """The cells of "nobrainer": two arrays as raw bytes, with their dtypes and shapes; y may be a scalar."""
    return [_describe_array(name, first) for name in ("feature", "label")]


def _describe_array(name: str, first: _Features) -> _Cell:
    """One of these arrays. The feature `shape` is not used: that of a label volume overwrites the image's."""
    dims = [f"{name}/shape/dim{axis}" for axis in range(int(first[f"{name}/rank"][0]))]
    dtype = tf.as_dtype(bytes(first[f"{name}/dtype"]).decode())
    shape = tuple(int(first[dim][0]) for dim in dims)
    if len(first[f"{name}/value"]) != np.prod(shape, dtype=int) * dtype.size:
        raise ValueError(f"{name}/value has {len(first[f'{name}/value'])} bytes for {shape} of {dtype.name}")

    def parse(features: _Features) -> tf.Tensor:
        values = tf.io.decode_raw(features[f"{name}/value"], dtype)
        return tf.reshape(values, [features[dim] for dim in dims])

    kinds = {f"{name}/value": tf.string, **dict.fromkeys(dims, tf.int64)}
    return _Cell({key: tf.io.FixedLenFeature([], kind) for key, kind in kinds.items()}, parse, shape)


def _describe_medicai(first: _Features) -> list[_Cell]:
    """The cells of "medicai": images `NAME_raw` as channels, in the order of their names, and `label_raw`."""
    names = sorted(
        name.removesuffix("_raw") for name in first if name.endswith("_raw") and name != "label_raw"
    )
    images = [_describe_raw(name, first) for name in names]
    if len(shapes := {image.shape for image in images}) != 1:
        raise ValueError(f"the images {', '.join(names) or '(none)'} have the shapes {sorted(shapes)}")
    features = {key: kind for image in images for key, kind in image.features.items()}
    shape = (*images[0].shape, len(images))
    image = _Cell(features, lambda found: tf.stack([cell.parse(found) for cell in images], axis=-1), shape)
    return [image, _describe_raw("label", first)]


def _describe_raw(name: str, first: _Features) -> _Cell:
    """One volume: `NAME_raw` has its float32 voxels in C order, `NAME_shape` its three axes."""
    raw, shape = first[f"{name}_raw"], tuple(map(int, first[f"{name}_shape"]))
    if len(shape) != 3 or len(raw) != np.prod(shape, dtype=int) * 4:
        raise ValueError(f"{name}_raw has {len(raw)} bytes for {shape} of float32")
    features = {
        f"{name}_raw": tf.io.FixedLenFeature([], tf.string),
        f"{name}_shape": tf.io.FixedLenFeature([3], tf.int64),
    }

    def parse(found: _Features) -> tf.Tensor:
        return tf.reshape(tf.io.decode_raw(found[f"{name}_raw"], tf.float32), found[f"{name}_shape"])

    return _Cell(features, parse, shape)


_DESCRIBE: Final = {"plain": _describe_plain, "nobrainer": _describe_nobrainer, "medicai": _describe_medicai}
