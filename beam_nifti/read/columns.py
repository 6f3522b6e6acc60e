"""The columns and cells of which the elements of `reader.load_dataset` are made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tensorflow as tf

from beam_nifti.errors import DatasetError
from beam_nifti.read.records import Element
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.record.example import TENSOR_FEATURES, split_kind
from beam_nifti.record.index import SOURCE_LISTS, schema_of

Array = npt.NDArray[Any]

_ALIGNMENT: Final = 64
"""Alignment of a tensor's memory. Source: the largest value of EIGEN_MAX_ALIGN_BYTES."""

_TOO_MUCH_PADDING: Final = (
    "would take too much memory; use batch_size=1, ragged=True, or volumes of similar shapes"
)
_FREE_PADDED_BYTES: Final = 4 << 30
_PADDED_RATIO: Final = 64
"""Limits of the memory of a padded batch: the bytes above, or this multiple of the bytes of its cells."""

_FEATURE_DTYPES: Final = {"float": tf.float32, "int64": tf.int64, "bytes": tf.string}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a dataset's elements, as TensorFlow sees it.

    Attributes:
        name: name of the column, as in `random_access.Dataset`.
        dtype: dtype of the cells.
        shape: shape of a cell; None for an axis whose length differs between records.
    """

    name: str
    dtype: tf.DType
    shape: tuple[int | None, ...] = ()

    @property
    def varies(self) -> bool:
        """Whether cells differ in shape."""
        return None in self.shape

    def cell(self, element: Element) -> Array:
        """The cell of an element; of a missing one an empty text or list, or NaN."""
        value, dtype = element[self.name], self.dtype.as_numpy_dtype
        if value is None:
            missing = b"" if self.dtype == tf.string else np.nan
            return np.full([size or 0 for size in self.shape], missing, dtype)
        return np.asarray(np.array(value, object) if self.dtype == tf.string else value, dtype)

    @property
    def needs_value(self) -> bool:
        """Whether no cell can be missing: an integer has no NaN."""
        return self.dtype.is_integer and not self.varies

    def allocate(self, elements: Sequence[Element], count: int) -> Array:
        """Allocate an array for cells; it is filled with zeros or empty texts if cells differ in shape.

        Args:
            elements: the elements of the cells; used only if `shape` does not give the shape of a cell.
            count: number of cells.
        """
        dtype = self.dtype.as_numpy_dtype
        if not self.varies:
            return _empty((count, *self.shape), dtype)  # type: ignore[arg-type]  # has no None
        shapes = [self.cell(element).shape for element in elements]
        largest = map(max, zip(*shapes, strict=True)) if shapes else (size or 0 for size in self.shape)
        return np.full((count, *largest), b"" if self.dtype == tf.string else 0, dtype)

    def check_padding(self, folder: str, elements: Sequence[Element]) -> None:
        """Refuse cells of different shapes that would take far more memory in one array than separately.

        Args:
            folder: folder of the dataset, for the error message.
            elements: the elements of the cells.

        Raises:
            DatasetError: the padded array would be too large.
        """
        shapes = [self.cell(element).shape for element in elements] if self.varies else []
        largest, held = tuple(map(max, zip(*shapes, strict=True))), sum(map(math.prod, shapes))
        padded = len(shapes) * math.prod(largest)
        if padded * self.dtype.size > max(_FREE_PADDED_BYTES, _PADDED_RATIO * held * self.dtype.size):
            raise DatasetError(
                f"{folder}: {self.name}, padded to {[len(shapes), *largest]}, {_TOO_MUCH_PADDING}"
            )

    def put(self, element: Element, array: Array, place: int) -> None:
        """Copy an element's cell to its place in a batch."""
        cell = self.cell(element)
        within: Any = (place, *map(slice, cell.shape))
        array[within] = cell[()]  # a cell without axes must be assigned as a string, not as an array

    def join(self, elements: Sequence[Element]) -> tuple[Array, Array]:
        """The parts of a ragged batch: the shapes of the cells, and the values of all cells, concatenated."""
        cells = [self.cell(element) for element in elements]
        shapes = np.array([cell.shape for cell in cells], np.int64).reshape(len(cells), len(self.shape))
        values = [np.zeros(0, self.dtype.as_numpy_dtype), *(cell.ravel() for cell in cells)]
        return shapes, np.concatenate(values)

    def make_ragged(self, shapes: tf.Tensor, values: tf.Tensor) -> tf.RaggedTensor:
        """Make a ragged batch of the result of `join`, as `tf.data.Dataset.ragged_batch` does."""
        rank = max(axis + 1 for axis, size in enumerate(self.shape) if size is None)
        lengths = [shapes[:, 0]]
        rows = lengths[0]  # of each cell, along all axes so far
        for axis in range(1, rank):
            lengths.append(tf.repeat(shapes[:, axis], rows))
            rows *= shapes[:, axis]
        ragged = tf.reshape(values, (-1, *self.shape[rank:]))
        for size, of_axis in zip(self.shape[rank - 1 :: -1], reversed(lengths), strict=True):
            if size is None:
                ragged = tf.RaggedTensor.from_row_lengths(ragged, of_axis, validate=False)
            else:
                ragged = tf.RaggedTensor.from_uniform_row_length(ragged, size, validate=False)
        return ragged


_OF_RECORDS: Final = {
    "label": Column("label", tf.float32),
    "affine": Column("affine", tf.float64, (4, 4)),
}
"""Columns whose dtype or shape differs from that in the index."""


def with_bounded_padding(examples: tf.data.Dataset, size: int) -> tf.data.Dataset:
    """Return the same examples, with an error where a padded batch exceeds the limits of `check_padding`."""
    specs = tf.nest.flatten(examples.element_spec)
    varying = [at for at, spec in enumerate(specs) if not spec.shape.is_fully_defined()]
    if not varying:
        return examples
    ranks = [specs[at].shape.rank for at in varying]
    begin = tuple((tf.zeros([rank], tf.float64), tf.zeros([], tf.float64)) for rank in ranks)

    def look(state: Any, example: Any) -> Any:
        number, known = state
        cells = tf.nest.flatten(example)
        found, checks = [], []
        for (largest, held), at in zip(known, varying, strict=True):
            shape, itemsize = tf.cast(tf.shape(cells[at]), tf.float64), float(cells[at].dtype.size)
            largest, held = tf.maximum(largest, shape), held + itemsize * tf.reduce_prod(shape)
            padded = tf.cast(number + 1, tf.float64) * itemsize * tf.reduce_prod(largest)
            is_right = padded <= tf.maximum(_PADDED_RATIO * held, float(_FREE_PADDED_BYTES))
            checks.append(tf.debugging.Assert(is_right, [f"a padded batch {_TOO_MUCH_PADDING}: ", largest]))
            found.append((largest, held))
        with tf.control_dependencies(checks):
            number = tf.identity((number + 1) % size)
        is_first = number == 0
        again = tf.nest.map_structure(lambda was, now: tf.where(is_first, was, now), begin, tuple(found))
        return (number, again), example

    return examples.scan((tf.zeros([], tf.int64), begin), look)


def _empty(shape: Sequence[int], dtype: Any) -> Array:
    """An uninitialized array that TensorFlow uses without a copy; it copies arrays that are not aligned."""
    dtype = np.dtype(dtype)
    if dtype.hasobject:
        return np.empty(shape, dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    array: Array = memory[start : start + size].view(dtype).reshape(shape)
    return array


def channels_of(info: DatasetInfo) -> int | None:
    """The number of channels of a dataset's images; None if dataset_info.json does not determine it."""
    if info.shape is not None:
        return (*info.shape, 1)[3]
    if info.config.get("channels"):
        return len(info.config["channels"])
    if info.record_config.clip_frames > 1:
        return info.record_config.clip_frames
    # If shapes differ, a build accepts only 3-D images, unless `frames` is "all".
    return None if info.config.get("frames") == "all" else 1


def describe_columns(
    names: Sequence[str],
    info: DatasetInfo,
    num_channels: int | None,
    channels_first: bool,
    patch: Sequence[int] | None = None,
) -> list[Column]:
    """Columns as TensorFlow sees them.

    Args:
        names: names of the columns.
        info: info of the dataset.
        num_channels: number of channels of the images; None if it differs between them.
        channels_first: whether the channel axis is the first axis of a volume.
        patch: shape of the patches that are read; None if whole volumes are read.
    """
    space = (patch or info.shape or (None,) * 3)[:3]
    return [_describe(name, info, num_channels, channels_first, space) for name in names]


def _describe(
    name: str,
    info: DatasetInfo,
    num_channels: int | None,
    channels_first: bool,
    space: Sequence[int | None],
) -> Column:
    if TENSOR_FEATURES.get(name) in info.features:
        dtype = tf.int32 if name == "mask" else tf.float32
        channels = {"image": num_channels, "mask": info.record_config.num_masks}.get(name, 1)
        return Column(name, dtype, (channels, *space) if channels_first else (*space, channels))
    if name in _OF_RECORDS:
        return _OF_RECORDS[name]
    fields = schema_of(info.record_config)
    if name in fields.names:
        return _describe_field(fields.field(name), info)
    # A column that is in neither is an extra column of the manifest.
    return Column(name, *parse_kind(info.features.get(name, "bytes")))


def parse_kind(kind: str) -> tuple[tf.DType, tuple[int, ...]]:
    """The dtype and shape of a feature of a kind such as "float[16]"."""
    name, size = split_kind(kind)
    return _FEATURE_DTYPES[name], () if size is None else (size,)


def _describe_field(field: pa.Field, info: DatasetInfo) -> Column:
    """A column that every index has."""
    is_list = pa.types.is_list(field.type)
    kind = field.type.value_type if is_list else field.type
    dtype = tf.string if pa.types.is_string(kind) else tf.as_dtype(kind.to_pandas_dtype())
    num_axes = len(info.shape) if info.shape else None
    sizes = {"zooms": 3, "shape": num_axes, "mask_labels": None, "source_shape": None, "source_affine": 16}
    sizes |= dict.fromkeys((*SOURCE_LISTS, "mask_positions", "mapped_labels", "member_lengths"))
    size = sizes.get(field.name, info.record_config.num_channels)
    return Column(field.name, dtype, (size,) if is_list else ())
