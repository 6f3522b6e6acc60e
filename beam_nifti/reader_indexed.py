"""The indexed engine of `reader.load_dataset`: records in any order, found by the index.

A step of the dataset is a number; TensorFlow asks Python for the records of that step, which threads read
with `random_access` and put into one array. So any order is arithmetic (`order.py`), and nothing has to be
read to skip what was seen before.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tensorflow as tf

from beam_nifti import storage
from beam_nifti.cores import count_cores
from beam_nifti.dataset_info import DatasetInfo
from beam_nifti.errors import DatasetError, ShardError
from beam_nifti.index import schema_of
from beam_nifti.order import Order
from beam_nifti.random_access import Dataset, Element

_Array = npt.NDArray[Any]

_REMOTE_READS: Final = 16
"""Records that are read at a time where each is a request."""

_ALIGNMENT: Final = 64
"""Of a tensor's memory. Source: EIGEN_MAX_ALIGN_BYTES, whose largest value this is."""

_QUIET_SECONDS: Final = 0.1
"""Without a call until a pipeline counts as standing still. It takes microseconds from one to the next."""

_FEATURE_DTYPES: Final = {"float": tf.float32, "int64": tf.int64, "bytes": tf.string}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a dataset's elements, as TensorFlow sees it.

    Attributes:
        name: as `random_access.Dataset` calls it.
        dtype: of its cells.
        shape: of a cell; None for an axis whose length differs between records.
    """

    name: str
    dtype: tf.DType
    shape: tuple[int | None, ...] = ()

    def cell(self, element: Element) -> _Array:
        """An element's cell."""
        value = element[self.name]
        if self.name == "mask":
            value = value[..., np.newaxis]
        elif self.dtype == tf.string:
            value = np.array(value or b"", object)
        return np.asarray(value, self.dtype.as_numpy_dtype)

    def allocate(self, elements: Sequence[Element], count: int) -> _Array:
        """An array for cells, of zeros where some are smaller than others.

        Args:
            elements: whose cells they are, where `shape` does not say how large those are.
            count: of them.
        """
        dtype = self.dtype.as_numpy_dtype
        if None not in self.shape:
            return _empty((count, *self.shape), dtype)  # type: ignore[arg-type]  # has no None
        shapes = [self.cell(element).shape for element in elements]
        largest = map(max, zip(*shapes, strict=True)) if shapes else (size or 0 for size in self.shape)
        return np.zeros((count, *largest), dtype)


def _empty(shape: Sequence[int], dtype: Any) -> _Array:
    """An array that TensorFlow takes as it is; one that begins elsewhere it copies."""
    dtype = np.dtype(dtype)
    if dtype.hasobject:
        return np.empty(shape, dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    array: _Array = memory[start : start + size].view(dtype).reshape(shape)
    return array


def describe_columns(records: Dataset) -> list[Column]:
    """The columns that a dataset's elements have."""
    return [_describe(name, records) for name in records.columns]


def _describe(name: str, records: Dataset) -> Column:
    info = records.info
    space = (info.shape or (None,) * 3)[:3]
    known = {
        "image": Column(name, tf.float32, (*space, _last_axis(records) if name == "image" else 1)),
        "mask": Column(name, tf.int32, (*space, 1)),
        "label": Column(name, tf.float32),
        "affine": Column(name, tf.float64, (4, 4)),
    }
    if name in known:
        return known[name]
    fields = schema_of(info.record_config)
    if name in fields.names:
        return _describe_field(fields.field(name), info)
    kind, _, size = info.features.get(name, "bytes").rstrip("]").partition("[")
    # What is in neither is a further column of the manifest.
    return Column(name, _FEATURE_DTYPES[kind], (int(size),) if size else ())


def _describe_field(field: pa.Field, info: DatasetInfo) -> Column:
    """A column that every index has."""
    is_list = pa.types.is_list(field.type)
    kind = field.type.value_type if is_list else field.type
    dtype = tf.string if pa.types.is_string(kind) else tf.as_dtype(kind.to_pandas_dtype())
    num_axes = len(info.shape) if info.shape else None
    sizes = {"zooms": 3, "shape": num_axes, "mask_labels": None}
    size = sizes.get(field.name, info.record_config.num_channels)
    return Column(field.name, dtype, (size,) if is_list else ())


def _last_axis(records: Dataset) -> int | None:
    """How many channels images have, where all have as many."""
    if records.info.shape is not None:
        return (*records.info.shape, 1)[3]
    sizes = {(*shape, 1)[3] for shape in records.index(["shape"])["shape"].to_pylist()}
    return sizes.pop() if len(sizes) == 1 else None


class _Gate:
    """Lets TensorFlow's threads into Python until the process ends.

    A pipeline that is alive then goes on reading ahead. A thread of its that waits for Python's lock when
    Python is gone never comes back, and the process waits for it.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Open it, with nobody inside."""
        self._changed = threading.Condition()
        self._inside, self._is_closed = 0, False

    def __enter__(self) -> None:
        with self._changed:
            self._changed.notify_all()
            if self._is_closed:
                raise RuntimeError("the process is ending")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Wait until nobody is inside, and nobody has come for a while: all buffers are full then."""
        with self._changed:
            self._is_closed = True
            while self._changed.wait(_QUIET_SECONDS) or self._inside:
                pass


_gate = _Gate()
atexit.register(_gate.close)
os.register_at_fork(after_in_child=_gate.reset)  # which has none of the threads


class _Steps:
    """What TensorFlow calls for the records of a step, from several threads at a time.

    Args:
        records: to read.
        columns: of them.
        order: of them.
        threads: that read records.
        is_batch: whether a step is a batch; a single record, without the axis B, otherwise.
        skips: whether to leave out damaged records, of a batch.
    """

    def __init__(
        self,
        records: Dataset,
        columns: Sequence[Column],
        order: Order,
        threads: int,
        *,
        is_batch: bool,
        skips: bool,
    ) -> None:
        self._records, self._columns, self._order = records, columns, order
        self._is_batch, self._skips = is_batch, skips
        self._pool = _start_threads(threads)
        self._skipped: set[int] = set()
        self._lock = threading.Lock()

    def __call__(self, step: np.int64) -> list[_Array]:
        """The cells of a step's records, an array a column."""
        with _gate:
            return self._read_step(int(step))

    def _read_step(self, step: int) -> list[_Array]:
        numbers = self._order.batch(step).tolist()
        if self._skips or any(None in column.shape for column in self._columns):
            elements = list(filter(None, self._pool.map(self._read, numbers)))
            arrays = [column.allocate(elements, len(elements)) for column in self._columns]
            for place, element in enumerate(elements):
                self._put(element, arrays, place)
        else:
            arrays = [column.allocate((), len(numbers)) for column in self._columns]
            for done in [self._pool.submit(self._fill, arrays, *each) for each in enumerate(numbers)]:
                done.result()
        return arrays if self._is_batch else [array.reshape(array.shape[1:]) for array in arrays]

    def _fill(self, arrays: Sequence[_Array], place: int, number: int) -> None:
        """Put a record where it belongs in a batch."""
        self._put(self._records.lend(number), arrays, place)

    def _put(self, element: Element, arrays: Sequence[_Array], place: int) -> None:
        for column, array in zip(self._columns, arrays, strict=True):
            cell = column.cell(element)
            within: Any = (place, *map(slice, cell.shape))
            array[within] = cell[()]  # of no axes it is a string itself, and no array around it

    def _read(self, number: int) -> Element | None:
        """A record; None in the place of a damaged one that is to be skipped."""
        try:
            return self._records[number]
        except DatasetError as e:
            if not (self._skips and isinstance(e.__cause__, ShardError)):
                raise
            with self._lock:
                is_new = number not in self._skipped
                self._skipped.add(number)
                count = len(self._skipped)
            if is_new:
                _log.warning("%s; left out, as %d of %d records so far", e, count, len(self._records))
            return None


def _start_threads(count: int) -> ThreadPoolExecutor:
    """Threads, started here: TensorFlow's take subnormal numbers for 0, and so do threads that they start."""
    pool, barrier = ThreadPoolExecutor(count, "beam_nifti"), threading.Barrier(count)
    for waiting in [pool.submit(barrier.wait) for _ in range(count)]:
        waiting.result()
    return pool


def read_indexed(
    records: Dataset,
    columns: Sequence[Column],
    order: Order,
    *,
    is_batched: bool,
    repeat: int | None,
    start: int,
    skips: bool,
) -> tf.data.Dataset:
    """A dataset whose elements are tuples of tensors, one a column.

    Args:
        records: to read.
        columns: of them.
        order: of them.
        is_batched: whether an element is a batch; a single record otherwise.
        repeat: how many epochs; None means without end.
        start: the first step, counted through all epochs.
        skips: whether to leave out damaged records. The cardinality is unknown then.
    """
    threads = _REMOTE_READS if storage.is_remote(records.path) else count_cores()
    # Enough that every thread has a record to read while the batch before is taken.
    calls = -(-threads // order.batch_size) + 1
    is_batch = is_batched or skips  # of one record, perhaps, which is skipped as a batch of none
    read = _Steps(records, columns, order, threads, is_batch=is_batch, skips=skips)
    size = order.batch_size if order.drop_remainder and not skips else None
    lead = (size,) if is_batch else ()

    def cells(step: tf.Tensor) -> tuple[tf.Tensor, ...]:
        tensors = tf.numpy_function(read, [step], [column.dtype for column in columns])
        for tensor, column in zip(tensors, columns, strict=True):
            tensor.set_shape((*lead, *column.shape))
        return tuple(tensors)

    steps = _count_steps(order, repeat, start)
    elements = steps.map(cells, num_parallel_calls=calls, deterministic=True)
    if skips:
        elements = _leave_out_short(elements, order.batch_size if order.drop_remainder else None)
        elements = elements if is_batched else elements.unbatch()
    if order.num_hosts > 1:  # or tf.distribute would split a host's share once more
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        elements = elements.with_options(options)
    return elements


def _leave_out_short(batches: tf.data.Dataset, size: int | None) -> tf.data.Dataset:
    """Without the batches that have not this size; None leaves out the empty ones."""
    if size is None:
        return batches.filter(lambda first, *_: tf.shape(first)[0] > 0)
    full = batches.filter(lambda first, *_: tf.shape(first)[0] == size)
    return full.map(lambda *cells: tuple(tf.ensure_shape(c, (size, *c.shape[1:])) for c in cells))


def _count_steps(order: Order, repeat: int | None, start: int) -> tf.data.Dataset:
    """The numbers of the steps; where records are shuffled, those of further epochs in each further pass."""
    if repeat is None and order.num_steps:
        return tf.data.Dataset.counter(start)
    total = order.num_steps * (repeat or 0)
    steps = tf.data.Dataset.range(start, total)
    if order.seed is None:
        return steps
    passes = itertools.count()

    def begin() -> np.int64:
        with _gate:
            return np.int64(next(passes))

    begun = tf.data.Dataset.from_tensors(0).map(
        lambda _: tf.ensure_shape(tf.numpy_function(begin, [], tf.int64), [])
    )
    every = begun.flat_map(lambda number: steps.map(lambda step: step + number * total))
    return every.apply(tf.data.experimental.assert_cardinality(max(0, total - start)))
