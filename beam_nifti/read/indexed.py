"""The indexed engine of `reader.load_dataset`: records in any order, located by the index.

A step of the dataset is a number. TensorFlow calls Python for the records of that step; threads read them
with `random_access` and put them into one array. Any order is therefore arithmetic (`order.py`), and earlier
records can be skipped without reading them.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Final, TypeAlias

import numpy as np
import tensorflow as tf

from beam_nifti.errors import DatasetError, ShardError, UsageError
from beam_nifti.read.columns import Array, Column, channels_of, describe_columns
from beam_nifti.read.opening import REMOTE_READS, rebuilt
from beam_nifti.read.order import Numbers, Order
from beam_nifti.read.random_access import Dataset
from beam_nifti.read.records import Element
from beam_nifti.read.request import Batching, Passes
from beam_nifti.read.sampling import PatchDataset
from beam_nifti.record.example import TENSOR_FEATURES
from beam_nifti.storage import paths as storage
from beam_nifti.support.process import count_cores

Cells: TypeAlias = tf.Tensor | tf.RaggedTensor
"""The cells of a column."""

Draw: TypeAlias = Callable[[Dataset], PatchDataset]
"""Draws patches of records."""

DrawRecords: TypeAlias = Callable[[Dataset], Callable[[int], Numbers]]
"""Makes a function of records that draws the numbers of some of them in an epoch."""

_QUIET_SECONDS: Final = 0.1
"""Time without a call after which a pipeline counts as idle. Calls are microseconds apart."""

_log = logging.getLogger(__name__)


def _count_channels(records: Dataset) -> int | None:
    """The number of channels of the images; None if it differs between them."""
    known = channels_of(records.info)
    if known is not None or "image" not in records.columns:
        return known
    sizes = {(*shape, 1)[3] for shape in records.index(["shape"])["shape"].to_pylist()}
    return sizes.pop() if len(sizes) == 1 else None


class _Gate:
    """Admits TensorFlow's threads to Python until the process ends.

    A pipeline that still exists at that time continues to read ahead. If one of its threads waits for
    Python's global lock after Python has ended, it never returns, and the process waits for it.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Open the gate, with no thread inside."""
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
        """Wait until no thread is inside and none has come for a while, so that all buffers are full."""
        with self._changed:
            self._is_closed = True
            while self._changed.wait(_QUIET_SECONDS) or self._inside:
                pass


_gate = _Gate()
atexit.register(_gate.close)
os.register_at_fork(after_in_child=_gate.reset)  # a child has none of the threads


class _Steps:
    """Reads the records of a step, for several threads of TensorFlow at a time.

    A step is a batch, or a single record. If damaged records are skipped, a single record is a batch of one
    record or none.

    Attributes:
        columns: columns of an element.
        batching: how records become batches.
    """

    def __init__(
        self,
        records: Dataset,
        columns: Sequence[Column],
        order: Order,
        batching: Batching,
        *,
        skips: bool,
        draw: Draw | None,
        draw_records: DrawRecords | None,
    ) -> None:
        self._records, self.columns, self._order = records, columns, order
        self._drawn = drawn = draw_records and draw_records(records)
        self._per_volume = draw(records).patches.per_volume if draw else 1
        # They do not refer to this object, which is freed with its last reference.
        records_of = lru_cache(maxsize=2)(lambda epoch: records[drawn(epoch)] if drawn else records)
        self._records_of: Callable[[int], Dataset] = records_of
        self._patches_of: Callable[[int], PatchDataset] | None = None
        if draw is not None:
            self._patches_of = lru_cache(maxsize=2)(lambda epoch: draw(records_of(epoch)).epoch(epoch))
        self.batching, self._skips = batching, skips
        self._is_batch = batching.size is not None or skips
        self._skipped: set[int] = set()
        self._epoch = -1
        self._lock = threading.Lock()

    @property
    def lead(self) -> tuple[int | None, ...]:
        """The batch axis, if there is one, with its size if that is known before reading."""
        is_full = self.batching.drop_remainder and not self._skips
        return (self.batching.size if is_full else None,) if self._is_batch else ()

    def read(self, step: int) -> list[Array]:
        """The cells of a step's records: one array per column, two for a ragged one."""
        epoch = self._begin(step)
        numbers, pool = self._order.batch(step).tolist(), _threads(_count_reads(self._records.path))
        if self._skips or any(column.varies for column in self.columns):
            elements = list(filter(None, pool.map(partial(self._read, epoch), numbers)))
            arrays = [array for column in self.columns for array in self._join(column, elements)]
        else:
            arrays = [column.allocate((), len(numbers)) for column in self.columns]
            for done in [pool.submit(self._fill, arrays, epoch, *each) for each in enumerate(numbers)]:
                done.result()
        return arrays if self._is_batch else [array.reshape(array.shape[1:]) for array in arrays]

    def _begin(self, step: int) -> int:
        """The epoch; at its beginning, check that the dataset is the one that was opened."""
        epoch, number = divmod(step, self._order.num_steps)
        with self._lock:
            is_new, self._epoch = number == 0 or epoch > self._epoch, max(epoch, self._epoch)
        if is_new:
            self._records.require_current()
        return epoch

    def _fill(self, arrays: Sequence[Array], epoch: int, place: int, number: int) -> None:
        """Put a record, or a patch, where it belongs in a batch."""
        element = self._find(epoch, number, in_place=True)
        for column, array in zip(self.columns, arrays, strict=True):
            column.put(element, array, place)

    def _find(self, epoch: int, number: int, *, in_place: bool) -> Element:
        if self._patches_of is not None:
            return self._patches_of(epoch)[number]
        records = self._records_of(epoch)
        return records.read_in_place(number) if in_place else records[number]

    def _join(self, column: Column, elements: Sequence[Element]) -> Sequence[Array]:
        """The arrays of a column whose cells may differ in shape, or of records that may be skipped."""
        if self.batching.makes_ragged(column):
            return column.join(elements)
        column.check_padding(self._records.path, elements)
        array = column.allocate(elements, len(elements))
        for place, element in enumerate(elements):
            column.put(element, array, place)
        return [array]

    def _read(self, epoch: int, number: int) -> Element | None:
        """A record, or a patch; None in the place of a damaged one that is to be skipped."""
        try:
            return self._find(epoch, number, in_place=False)
        except DatasetError as e:
            if not (self._skips and isinstance(e.__cause__, ShardError)):
                raise
            number //= self._per_volume
            if self._drawn is not None:
                number = int(self._drawn(epoch)[number])
            with self._lock:
                is_new = number not in self._skipped
                self._skipped.add(number)
                count = len(self._skipped)
            if is_new:
                _log.warning("%s; skipped (%d of %d records so far)", e, count, len(self._records))
            return None


class _Call:
    """Finds the `_Steps` of a dataset for TensorFlow, which keeps this object until the process ends.

    It therefore refers to them weakly, so that their index can be freed with the dataset. TensorFlow may
    continue to read after Python has deleted the dataset, for example in a graph; then the records are
    opened again.
    """

    def __init__(self, steps: _Steps, reopen: Callable[[], _Steps]) -> None:
        self._steps, self._reopen = weakref.ref(steps), reopen
        self._reopened: _Steps | None = None
        self._lock = threading.Lock()

    def __call__(self, step: np.int64) -> list[Array]:
        with _gate:
            return self._find().read(int(step))

    def _find(self) -> _Steps:
        steps = self._steps()
        if steps is not None:
            return steps
        with self._lock:
            if self._reopened is None:
                self._reopened = self._reopen()
            return self._reopened


def _count_reads(path: str) -> int:
    """The number of records that are read at a time."""
    return REMOTE_READS if storage.is_remote(path) else count_cores()


@lru_cache
def _threads(count: int) -> ThreadPoolExecutor:
    """The threads that read records, for all datasets of this process.

    A Python thread must start them: TensorFlow's threads treat subnormal numbers as 0, and so do threads that
    these start.
    """
    pool, barrier = ThreadPoolExecutor(count, "beam_nifti"), threading.Barrier(count)
    for waiting in [pool.submit(barrier.wait) for _ in range(count)]:
        waiting.result()
    return pool


os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has none of the threads


def read_indexed(
    records: Dataset,
    order: Order,
    batching: Batching,
    passes: Passes,
    *,
    reopen: Callable[[], Dataset],
    start: int,
    resumes: str | None,
    skips: bool,
) -> tf.data.Dataset:
    """A dataset whose elements are tuples of tensors, one per column.

    Args:
        records: records to read.
        order: order of the records, or of the patches of them.
        batching: how records become batches; its size is that of `order`, or None for single records.
        passes: the epochs, and the patches to draw.
        reopen: function that opens the same records again; it is kept until the process ends.
        start: first step, counted over all epochs.
        resumes: name of the argument that gives it; None if it is 0.
        skips: whether to skip damaged records; the cardinality is then unknown.

    Raises:
        UsageError: `start` is beyond the last step, or within an epoch without `repeat`; or a batch would
            have records of different shapes.
    """
    draw = passes.draw()
    columns = describe_columns(
        records.columns,
        records.info,
        _count_channels(records),
        records.channels_first,
        draw and draw(records).patches.shape,
    )
    batching.check(records.path, columns)
    if not records.info.has_manifest:
        _require_values(records, [column.name for column in columns if column.needs_value])
    numbers = _count_steps(order, passes, start, resumes)
    threads = _count_reads(records.path)
    _threads(threads)  # start them here, in a Python thread
    open_steps = partial(
        _Steps,
        columns=columns,
        order=order,
        batching=batching,
        skips=skips,
        draw=draw,
        draw_records=passes.draw_records(),
    )
    digest = records.digest

    def open_again() -> _Steps:
        found = reopen()
        if found.digest != digest:
            raise rebuilt(found.path)
        return open_steps(found)

    steps = open_steps(records)
    # Every thread then has a record to read while the previous batch is consumed.
    calls = -(-threads // order.batch_size) + 1
    call = _to_tensors(_Call(steps, open_again), steps)
    elements = numbers.map(call, num_parallel_calls=calls, deterministic=True)
    elements.beam_nifti_steps = steps  # a dataset keeps those that it is made from
    if skips:
        elements = _without_skipped(elements, order.batch_size, batching)
    options = tf.data.Options()
    # There is nothing to tune here, and an iterator that ends may wait for the tuner's next round. The time
    # between rounds grows with the time since the start.
    options.autotune.enabled = False
    if order.num_hosts > 1:  # otherwise tf.distribute would divide the records of a host again
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return elements.with_options(options)


def _require_values(records: Dataset, names: Sequence[str]) -> None:
    """Refuse columns of integers with missing cells, which a dataset that no build made can have.

    Raises:
        UsageError: there is one.
    """
    known = records.info.features.keys()
    for name in names:
        is_of_record = name in known or TENSOR_FEATURES.get(name) in known
        if not is_of_record and records.index([name])[name].null_count:
            raise UsageError(
                f"{records.path}: column {name} lacks values, and integers of TensorFlow cannot be missing; "
                "leave it out, or use Dataset, which gives None"
            )


def _to_tensors(read: _Call, steps: _Steps) -> Callable[[tf.Tensor], tuple[Cells, ...]]:
    """A function from the number of a step to its cells, in TensorFlow's graph.

    It also sets the shapes, because TensorFlow removes a map that only sets shapes, and the shapes with it.
    """
    batching, lead = steps.batching, steps.lead
    dtypes = [
        dtype
        for column in steps.columns
        for dtype in ([tf.int64, column.dtype] if batching.makes_ragged(column) else [column.dtype])
    ]

    def call(step: tf.Tensor) -> tuple[Cells, ...]:
        rest = iter(tf.numpy_function(read, [step], dtypes))
        cells = []
        for column in steps.columns:
            tensor = next(rest)
            if batching.makes_ragged(column):
                tensor.set_shape((*lead, len(column.shape)))
                tensor = column.make_ragged(tensor, next(rest))
            else:
                tensor.set_shape((*lead, *column.shape))
            cells.append(tensor)
        return tuple(cells)

    return call


def _without_skipped(elements: tf.data.Dataset, batch_size: int, batching: Batching) -> tf.data.Dataset:
    """Drop batches that are empty or, with `drop_remainder`, not full."""
    least = batch_size if batching.drop_remainder else 1
    elements = elements.filter(lambda first, *_: _count_rows(first) >= least)
    if batching.drop_remainder:
        elements = elements.map(partial(_with_rows, batch_size))
    return elements if batching.size is not None else elements.unbatch()


def _count_rows(cells: Cells) -> tf.Tensor:
    return cells.nrows() if isinstance(cells, tf.RaggedTensor) else tf.shape(cells)[0]


def _with_rows(size: int, *columns: Cells) -> tuple[Cells, ...]:
    """The cells of a batch of `size` records, with that number in their static shape."""
    return tuple(
        cells if isinstance(cells, tf.RaggedTensor) else tf.ensure_shape(cells, (size, *cells.shape[1:]))
        for cells in columns
    )


def _count_steps(order: Order, passes: Passes, start: int, resumes: str | None) -> tf.data.Dataset:
    """The numbers of the steps; each further iteration has those of the next epochs.

    Every iteration has the same number of steps, because Keras takes that of the first one for all. Therefore
    an iteration that starts after its first step is the only one.

    Raises:
        UsageError: there is no such step, or the iterations would differ.
    """
    epoch, given = order.num_steps, f"{resumes} is {'at step ' * (resumes == 'start_state')}{start}"
    if passes.epochs is None and epoch:
        return tf.data.Dataset.counter(start)
    total = epoch * (passes.epochs or 0)
    is_rest = start > 0 and passes.has_count
    if start > total and (is_rest or not epoch):
        raise UsageError(
            f"{given}, but there are {total} elements in all epochs; raise repeat, or start at 0"
        )
    if not is_rest and start and start % epoch:
        raise UsageError(
            f"{given}, within an epoch of {epoch} elements, so the first iteration would be shorter than the "
            f"next; add repeat=True, or repeat={start // epoch + 1} to read only the rest of this epoch"
        )
    length = total - start if is_rest else total
    steps = tf.data.Dataset.range(start, start + length)
    if not (passes.is_random or is_rest):
        return steps
    iterations = itertools.count()

    def begin() -> np.int64:
        with _gate:
            number = next(iterations)
        if is_rest and number:
            raise UsageError(
                f"{given}, so this dataset is the rest of a run and can be iterated once; open it again with "
                "the next start, or use repeat=True"
            )
        return np.int64(number)

    begun = tf.data.Dataset.from_tensors(0).map(
        lambda _: tf.ensure_shape(tf.numpy_function(begin, [], tf.int64), [])
    )
    every = begun.flat_map(lambda number: steps.map(lambda step: step + number * total))
    return every.apply(tf.data.experimental.assert_cardinality(length))
