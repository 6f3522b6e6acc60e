"""Datasets by number: `dataset[i]` without TensorFlow and without Beam, for PyTorch, JAX or numpy.

A record is found by its place in the index and read by itself. Voxels come with the bits that
`beam_nifti.reader.load_dataset` gives. Source: docs/format.md, docs/reading.md.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.config import RecordConfig
from beam_nifti.errors import DatasetError, ShardError, UsageError, VolumeError
from beam_nifti.read.split_spec import SplitPart, parse_split
from beam_nifti.read.where import Condition
from beam_nifti.record import dataset_info
from beam_nifti.record.dataset_info import FILE_NAME, DatasetInfo, ShardInfo, path_of
from beam_nifti.record.example import (
    SCALING_FEATURES,
    decode_doubles,
    decode_example,
    decode_tensor,
    label_feature,
    largest_payload,
    scaling_of,
    split_kind,
)
from beam_nifti.record.index import extra_column, read_shard_index
from beam_nifti.record.tfrecord import decode_buffer, make_buffer, require_stored_size
from beam_nifti.storage import paths as storage
from beam_nifti.volume.intensity import rescale_voxels
from beam_nifti.volume.rescale import UINT8_LEVELS, Ends, Intensity, Scaling, Voxels

T = TypeVar("T")
Element = dict[str, Any]
_Features = Mapping[str, memoryview | npt.NDArray[np.generic]]
_Rows = range | npt.NDArray[np.int64]

_DEFAULT_COLUMNS: Final = ("image", "label", "id", "affine", "zooms")
_TENSOR: Final = "_raw"
"""How the names of features end that hold a tensor."""

_REMOTE_READS: Final = 16
"""Files that are looked at at a time where each is a request."""

_SCRATCH_BYTES: Final = 32 << 20
"""The largest record for which a thread keeps a buffer, as fresh memory costs a page fault every 4 KiB."""

_of_thread = threading.local()

REBUILT: Final = "was built again after it was opened; open it again"
"""Why a dataset is not read on."""


class Dataset:
    """The records of a split, or of a part of it, by number.

    It is a sequence as PyTorch's `DataLoader` takes it, and may be used by several threads, and in forked and
    spawned processes: it holds no open file, and pickles as the dataset's path and the numbers of its
    records.

    - `dataset[i]` reads one record: a dictionary of the columns. Its arrays are the caller's own.
    - `dataset[10:20]`, `dataset[[3, 1, 4]]`, `dataset[mask]` are datasets of those records. Nothing is read.
    - `for element in dataset` reads one record after the other, in the order of the index.

    The columns are:

    - "image": float32 of shape (X, Y, Z, 1), or (X, Y, Z, C) where records have C frames or components, in C
      order: the x of `beam_nifti.reader.load_dataset`, bit for bit.
    - "label": float32, as in the record; NaN in a dataset without labels. Where the first label is a string,
      there is "label/NAME" instead.
    - "id": str.
    - "affine": float64 of shape (4, 4), from voxel indices to millimetres in RAS+; "zooms": float64 of shape
      (3,), the voxel sizes.
    - every other column of the index, such as "site", "shape" or "max": str, int, float, None, or an array
      where a cell has several numbers. The manifest's own columns "id", "image" and "mask", where they are
      further ones, are called "manifest_id", and so on.
    - every other feature of the records: of one that holds a tensor, `NAME_raw`, the tensor as NAME; of
      numbers a scalar, or an array where there are several; else bytes.

    All but "image" and what only records hold comes from the index, so that a dataset of other columns
    reads no record.

    Of every record that is read its checksums are checked, that of the gzip member and the CRC-32C of the
    TFRecord (3 % of the time of a compressed one), and that it has the id that the index says.

    Args:
        path: the dataset's folder, local or a URL.
        split: such as "train"; `train[:80%]` and `train[10:20]` are slices of it, and `train+test` is both.
        where: a condition on columns of the index, such as "age > 60 and site == 'A'"; `where.Condition` says
            what it may be made of. It selects among the records of `split`.
        columns: what an element has; None means image, label (where there are any), id, affine and zooms.

    Raises:
        DatasetError: there is no complete dataset or no such split; a shard or an index is missing, cannot be
            reached, or is not what dataset_info.json says.
        UsageError: `split`, `where` or `columns` is not written as above, or names a column that is not
            there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str = "train",
        *,
        where: str | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        output = storage.absolute(os.fspath(path))
        self._records, self._rows = _select(output, read_info(output), split, where, columns)

    def __len__(self) -> int:
        """How many records there are."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Element: ...
    @overload
    def __getitem__(self, index: slice | Iterable[int]) -> Dataset: ...
    def __getitem__(self, index: Any) -> Element | Dataset:
        """One record, by a number from 0, or from -1 backwards; or the dataset of several.

        Raises:
            IndexError: there are fewer records.
            TypeError: it is neither a number, nor a slice, nor numbers, nor a boolean for each record.
            DatasetError: the record is missing or damaged; says which it is.
        """
        if isinstance(index, slice):
            return self._of(self._records, self._rows[index])
        try:
            if isinstance(index, bool):
                raise TypeError
            number = operator.index(index)
        except TypeError:
            return self._of(self._records, np.asarray(self._rows, np.int64)[self._numbers(index)])
        if not -len(self) <= number < len(self):
            raise IndexError(f"there is no record {number}: the dataset has {len(self)}")
        return self._records.read(int(self._rows[number]))

    def __getitems__(self, indices: Iterable[int]) -> list[Element]:
        """Several records, read: what PyTorch's `DataLoader` asks for the records of a batch."""
        return [self[index] for index in indices]

    def lend(self, number: int) -> Element:
        """As `dataset[number]`, to be copied: this thread's next read may overwrite its arrays.

        Args:
            number: of the record, from 0.
        """
        return self._records.read(int(self._rows[number]), lent=True)

    def __iter__(self) -> Iterator[Element]:
        """Read one record after the other.

        Raises:
            DatasetError: the dataset was built again after it was opened; or as `dataset[i]`.
        """
        self.require_current()
        return (self._records.read(int(row)) for row in self._rows)

    def require_current(self) -> None:
        """Check that the dataset is the one that was opened; a few milliseconds, or one request.

        Raises:
            DatasetError: it was built again, or is gone.
        """
        self._records.require_current()

    def __repr__(self) -> str:
        return f"<Dataset of {len(self)} records of {self._records.output}: {', '.join(self.columns)}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Its place and the numbers of its records; where it is unpickled, the index is read again."""
        r = self._records
        return _reopen, (r.output, r.splits, r.columns, r.digest, self._rows)

    @property
    def path(self) -> str:
        """The dataset's folder, absolute, or its URL."""
        return self._records.output

    @property
    def info(self) -> DatasetInfo:
        """What dataset_info.json says."""
        return self._records.info

    @property
    def digest(self) -> str:
        """sha256 of dataset_info.json as it was when the dataset was opened."""
        return self._records.digest

    @property
    def columns(self) -> tuple[str, ...]:
        """What an element has."""
        return self._records.columns

    @property
    def ids(self) -> list[str]:
        """The ids of the records, in their order."""
        ids: list[str] = self._records.table["example_id"].take(np.asarray(self._rows, np.int64)).to_pylist()
        return ids

    def by_id(self, example_id: str) -> Element:
        """The record of an id.

        Raises:
            DatasetError: there is none among these records; or as `dataset[i]`.
        """
        row = pc.index(self._records.table["example_id"], example_id).as_py()
        if row < 0 or row not in self._rows:
            raise DatasetError(
                f"{self._records.output}: no record {example_id!r} among these {len(self)}; look for it in "
                "`ids`, or in another split"
            )
        return self._records.read(row)

    def index(self, columns: Sequence[str] | None = None) -> pa.Table:
        """What the index says of the records, in their order: labels for a sampler, ages for a plot.

        Args:
            columns: of the index; None means all.

        Raises:
            DatasetError: the index cannot be read.
            UsageError: it has no such column.
        """
        r = self._records
        table = _read_indexes(r.output, r.info, r.shards, columns)
        missing = set(columns or ()) - set(table.column_names)
        if missing:
            raise UsageError(f"{r.output}: the index has no column {min(missing)!r}")
        return table.select(columns or table.column_names).take(np.asarray(self._rows, np.int64))

    @classmethod
    def of_info(
        cls,
        output: str,
        info: DatasetInfo,
        split: str = "train",
        *,
        where: str | None = None,
        columns: Sequence[str] | None = None,
    ) -> Dataset:
        """As `Dataset(output, …)`, where its dataset_info.json was read already.

        Args:
            output: the dataset's folder, absolute, or its URL.
            info: what dataset_info.json says.
            split: as `Dataset`.
            where: as `Dataset`.
            columns: as `Dataset`.
        """
        return cls._of(*_select(output, info, split, where, columns))

    @classmethod
    def _of(cls, records: _Records, rows: _Rows) -> Dataset:
        """A dataset of some rows of what is open already."""
        dataset = cls.__new__(cls)
        dataset._records, dataset._rows = records, rows
        return dataset

    def _numbers(self, index: Any) -> npt.NDArray[np.int64]:
        numbers = np.asarray(index)
        if numbers.ndim == 1 and numbers.dtype == np.bool_ and len(numbers) == len(self):
            return np.flatnonzero(numbers)
        if numbers.ndim != 1 or not (numbers.dtype.kind in "iu" or numbers.size == 0):
            raise TypeError(
                f"{index!r} is no number of a record, no slice, no list of numbers, and none of {len(self)} "
                "booleans"
            )
        wrong = numbers[(numbers < -len(self)) | (numbers >= len(self))]
        if wrong.size:
            raise IndexError(f"there is no record {wrong[0]}: the dataset has {len(self)}")
        return numbers.astype(np.int64)


def _reopen(output: str, splits: Sequence[str], columns: Sequence[str], digest: str, rows: _Rows) -> Dataset:
    """The dataset that was pickled."""
    records = _open(output, read_info(output), [SplitPart(name) for name in splits], columns)
    if records.digest != digest:
        raise rebuilt(output)
    return Dataset._of(records, rows)


@dataclass(frozen=True, eq=False)
class _Records:
    """All records of some splits, and where they lie: what the parts of a dataset share.

    Attributes:
        output: the dataset's folder.
        digest: of dataset_info.json.
        info: what that says.
        config: what decided the records' bytes.
        splits: names of them.
        table: of each record example_id, offset and length, and what was asked of the index besides.
        columns: of an element.
    """

    output: str
    digest: str
    info: DatasetInfo
    config: RecordConfig
    splits: tuple[str, ...]
    table: pa.Table
    columns: tuple[str, ...]

    def require_current(self) -> None:
        """As `Dataset.require_current`."""
        if _digest(read_info(self.output)) != self.digest:
            raise rebuilt(self.output)

    @cached_property
    def shards(self) -> tuple[ShardInfo, ...]:
        """Those of all splits, in the order of the table."""
        return tuple(shard for name in self.splits for shard in self.info.splits[name].shards)

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """The row of the table at which each shard begins."""
        return np.cumsum([0, *(shard.num_examples for shard in self.shards)])[:-1]

    @cached_property
    def places(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Offset and length of each record."""
        return self.table["offset"].to_numpy(), self.table["length"].to_numpy()

    def shape_of(self, row: int) -> tuple[int, ...]:
        """The shape of a record's voxels."""
        return self.info.shape or tuple(self.table["shape"][row].as_py())

    @cached_property
    def _most_bytes(self) -> int | None:
        """Of the payload of any record: it bounds what is decompressed; None where shapes differ."""
        info = self.info
        return None if info.shape is None else largest_payload(info.shape, info.dtype, self.config.mask_dtype)

    @cached_property
    def from_record(self) -> frozenset[str]:
        """The columns for which a record has to be read."""
        asked, known = set(self.columns) - {"id"}, set(self.table.column_names)
        return frozenset(c for c in asked if _has_tensor(c, self.info) or c not in known)

    def rows_of(self, parts: Sequence[SplitPart]) -> _Rows:
        """The rows of the table that some parts of the splits take.

        Raises:
            UsageError: a part is beyond its split.
        """
        counts = [self.info.splits[name].num_examples for name in self.splits]
        starts = dict(zip(self.splits, itertools.accumulate([0, *counts]), strict=False))
        found = []
        for part in parts:
            positions = part.positions(self.info.splits[part.name].num_examples)
            found.append(range(starts[part.name] + positions.start, starts[part.name] + positions.stop))
        return found[0] if len(found) == 1 else np.concatenate([np.asarray(r, np.int64) for r in found])

    def read(self, row: int, lent: bool = False) -> Element:
        """The element of a row of the table.

        Args:
            row: of the table.
            lent: as `Dataset.lend`.

        Raises:
            DatasetError: the record is missing or damaged.
        """
        if not self.from_record:
            return {name: self._cell(name, row) for name in self.columns}
        example_id = self._cell("id", row)
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        path = storage.join(self.output, self.shards[shard].name)
        try:
            features = decode_example(self._payload(path, row, lent))
            found = features.get("id")
            if found != example_id.encode():
                raise ShardError(f"it is the record of {bytes(found or b'').decode(errors='replace')!r}")
            return {
                name: self._value(name, features, row) if name in self.from_record else self._cell(name, row)
                for name in self.columns
            }
        except (ShardError, VolumeError, OSError) as e:
            self.require_current()
            number = row - self.starts[shard]
            raise DatasetError(
                f"{path}: record {example_id!r}, number {number} from 0, cannot be read ({e}); run "
                "beam-nifti verify"
            ) from e

    def _payload(self, path: str, row: int, lent: bool) -> memoryview:
        offsets, lengths = self.places
        compressed, size = self.config.compression == "gzip", int(lengths[row])
        most = self._most_bytes
        if most is None:
            most = largest_payload(self.shape_of(row), self.info.dtype, self.config.mask_dtype)
        require_stored_size(size, most)
        buffer = _scratch(size) if compressed or lent else make_buffer(size)
        count = storage.read_into(path, int(offsets[row]), buffer)
        if count < size:
            raise ShardError(f"of its {size} bytes the file has {count}")
        return decode_buffer(buffer, compressed, most)

    def _cell(self, name: str, row: int) -> Any:
        """What the index says of a record."""
        cell = self.table["example_id" if name == "id" else name][row]
        if isinstance(cell, pa.ListScalar) and cell.is_valid:
            values = cell.values.fill_null("") if pa.types.is_string(cell.type.value_type) else cell.values
            array = values.to_numpy(zero_copy_only=False).copy()
            return array.reshape((4, 4) if name == "affine" else -1)
        value = cell.as_py()
        if name == "label":
            with np.errstate(over="ignore"):  # as in the record
                return np.float64(math.nan if value is None else value).astype(np.float32)
        return value

    def _value(self, name: str, features: _Features, row: int) -> Any:
        """What a record itself says."""
        if name == "image":
            return self._image(features, self.shape_of(row))
        if _has_tensor(name, self.info):
            return self._mask(features, name + _TENSOR, self.shape_of(row))
        value = features.get(name)
        if value is None and name in SCALING_FEATURES:
            return None
        kind, size = split_kind(self.info.features[name])
        if isinstance(value, np.ndarray) and kind != "bytes" and value.size == (size or 1):
            return value[0] if value.size == 1 else value
        if isinstance(value, memoryview) and kind == "bytes":
            return bytes(value)
        raise ShardError(f"it has no {name} that is {self.info.features[name]}")

    def _mask(self, features: _Features, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        tensor = _tensor(features, name)
        if tensor.dtype.name != self.config.mask_dtype or tensor.shape != shape[:3]:
            raise ShardError(f"its {name} is {tensor.dtype.name} of {tensor.shape}")
        return tensor

    def _image(self, features: _Features, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        stored = _tensor(features, "image_raw")
        if stored.dtype.name != self.info.dtype or stored.shape != shape:
            by = FILE_NAME if self.info.shape else "the index"
            raise ShardError(
                f"it holds {stored.dtype.name} of {stored.shape}, and {by} says {self.info.dtype} of {shape}"
            )
        channels = self.config.channels
        if channels is not None and stored.shape[3:] != (len(channels),):
            raise ShardError(
                f"it holds voxels of shape {stored.shape}, and there are {len(channels)} channels"
            )
        if self.config.voxel_dtype == "native":
            image = _rescale(stored, features, self.config)
        elif stored.dtype == np.uint8:
            image = np.divide(stored, UINT8_LEVELS, dtype=np.float32)
        else:
            image = stored.astype(np.float32, copy=False)
        return image if image.ndim == 4 else image[..., np.newaxis]


def _has_tensor(name: str, info: DatasetInfo) -> bool:
    return name + _TENSOR in info.features


def _scratch(size: int) -> memoryview:
    """A buffer of this thread's for what is needed only until its next read."""
    if size > _SCRATCH_BYTES:
        return make_buffer(size)
    buffer: memoryview | None = getattr(_of_thread, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _of_thread.buffer = make_buffer(size)
    return buffer[:size]


def _tensor(features: _Features, name: str) -> npt.NDArray[Any]:
    """A tensor, moved to where its dtype may lie: by a few bytes, over those that announce it.

    So it can be had once. It takes a tenth of the time of a copy, whose memory is fresh.
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


def _rescale(voxels: Voxels, features: _Features, config: RecordConfig) -> Voxels:
    """What a float32 dataset would hold of voxels that were stored as in the image's file."""
    scaling = scaling_of(features)
    ends = []
    if config.has_ends:
        lows, highs = (
            _doubles(features, name, config.num_channels) for name in ("rescale_low", "rescale_high")
        )
        ends = list(map(Ends, lows, highs))
    if config.channels is None:
        return _rescale_image(voxels, scaling, ends[0] if ends else None, config)
    return np.stack(
        [
            _rescale_image(np.ascontiguousarray(voxels[..., i]), scaling, ends[i] if ends else None, config)
            for i in range(config.num_channels)
        ],
        -1,
    )


def _doubles(features: _Features, name: str, count: int) -> list[float]:
    numbers = decode_doubles(features[name]) if name in features else []
    if len(numbers) != count:
        raise ShardError(f"its {name} has {len(numbers)} numbers, expected {count}")
    return numbers


def _rescale_image(voxels: Voxels, scaling: Scaling, ends: Ends | None, config: RecordConfig) -> Voxels:
    low, high = sorted(scaling.apply(np.array([voxels.min(), voxels.max()], voxels.dtype)).tolist())
    # Nothing asks for mean and deviation, which would take another pass.
    return rescale_voxels(voxels, scaling, Intensity(low, high, math.nan, math.nan), ends, config)


def read_info(output: str) -> DatasetInfo:
    """What `dataset_info.read_info` gives; a store that cannot be reached is a DatasetError, too."""
    return DatasetInfo.from_json(read_content(output), storage.join(output, FILE_NAME))


def read_content(output: str) -> bytes:
    """What `dataset_info.read_content` gives; a store that cannot be reached is a DatasetError, too."""
    try:
        return dataset_info.read_content(output)
    except OSError as e:
        raise DatasetError(f"{storage.join(output, FILE_NAME)}: cannot be reached ({e})") from e


def rebuilt(output: str) -> DatasetError:
    """The error where a dataset is no longer the one that was opened."""
    return DatasetError(f"{output}: {REBUILT}")


def _digest(info: DatasetInfo) -> str:
    return hashlib.sha256(info.to_json().encode()).hexdigest()


def default_columns(info: DatasetInfo) -> tuple[str, ...]:
    """The columns of a dataset where none are asked for; of a first label that is a text, its feature."""
    label = label_feature(info.labels[0].name) if _has_texts(info) else "label"
    lacked = {name for name in ("affine", "zooms") if name not in info.features}
    lacked |= set() if info.labelled else {"label"}
    names = (label if name == "label" else name for name in _DEFAULT_COLUMNS)
    return tuple(name for name in names if name not in lacked)


def check_label(output: str, info: DatasetInfo, columns: Collection[str]) -> None:
    """Refuse the number of a first label that is a text: it would be NaN, and look like a missing one.

    Args:
        output: the dataset's folder, for the error.
        info: of it.
        columns: that are asked for.

    Raises:
        UsageError: it is among them.
    """
    if "label" in columns and _has_texts(info):
        known = ", ".join(label_feature(column.name) for column in info.labels)
        raise UsageError(f"{output}: the first label is a string and no number; choose among {known}")


def _has_texts(info: DatasetInfo) -> bool:
    """Whether the first label is a text."""
    return bool(info.labels) and info.labels[0].kind == "string"


def _select(
    output: str, info: DatasetInfo, split: str, where: str | None, columns: Sequence[str] | None
) -> tuple[_Records, _Rows]:
    """Records, and which of their rows `split` and `where` take; as `Dataset`."""
    parts, condition = parse_split(split), None if where is None else Condition(where)
    records = _open(output, info, parts, columns, {*condition.columns, "row"} if condition else ())
    rows = records.rows_of(parts)
    if condition:
        rows, table = np.asarray(rows, np.int64), records.table
        if not condition.columns <= {"id", *table.column_names}:  # the message has those that there are
            table = _read_indexes(output, info, records.shards)
        table = table.append_column("id", table["example_id"])
        first = next(iter(info.labels), None)  # of which `label` is the number
        texts = {"label": extra_column(first.name)} if first and first.kind != "float" else {}
        if _has_texts(info) and "label" in condition.columns:
            raise UsageError(
                f"where is {where!r}, but a label of the kind string is no number; ask {texts['label']}, "
                "which has the text"
            )
        rows = rows[condition.select(table.take(rows), texts)]
    return records, rows


def _open(
    output: str,
    info: DatasetInfo,
    parts: Sequence[SplitPart],
    columns: Sequence[str] | None,
    asked: Collection[str] = (),
) -> _Records:
    """Read what is needed to find the records of some splits.

    Args:
        output: the dataset's folder.
        info: of it.
        parts: name the splits.
        columns: of an element; None means the default.
        asked: columns of the index, besides.

    Raises:
        DatasetError, UsageError: as `Dataset`.
    """
    splits = tuple(dict.fromkeys(part.name for part in parts))
    shards = [shard for name in splits for shard in shards_of(output, info, name)]
    # Of a store one list, which has no sizes, instead of a request for each.
    is_listed = storage.is_remote(output) and storage.can_list(output)
    check_shards(output, shards, set(storage.list_files(output)) if is_listed else None)
    columns = tuple(dict.fromkeys(default_columns(info) if columns is None else columns))
    check_label(output, info, columns)
    from_index = {name for name in columns if name != "id" and not _has_tensor(name, info)}
    needed = {"example_id", "offset", "length", *(() if info.shape else ["shape"]), *from_index, *asked}
    table = _read_indexes(output, info, shards, needed)
    in_records = {name.removesuffix(_TENSOR) for name in info.features}
    unknown = from_index - {*table.column_names, *in_records}
    if unknown:
        known = {*_read_indexes(output, info, shards[:1]).column_names, *in_records}
        raise UsageError(
            f"{output}: records have no column {min(unknown)!r}; choose among {', '.join(sorted(known))}"
        )
    return _Records(output, _digest(info), info, info.record_config, splits, table, columns)


def shards_of(output: str, info: DatasetInfo, split: str) -> tuple[ShardInfo, ...]:
    """The shards of a split.

    Raises:
        DatasetError: there is none of that name.
    """
    try:
        return info.split(split).shards
    except DatasetError as e:
        raise DatasetError(f"{output}: {e}") from None


def check_shards(output: str, shards: Sequence[ShardInfo], present: Collection[str] | None = None) -> None:
    """Find what is missing or cut off before training reaches it.

    Args:
        output: the dataset's folder.
        shards: that are to be read.
        present: names of the files that are there; None looks for each, and at its size.

    Raises:
        DatasetError: a shard is missing, cannot be reached, or has another size than dataset_info.json says.
    """

    def check(shard: ShardInfo) -> None:
        path = storage.join(output, shard.name)
        try:
            path_of(output, shard.name)
            size = storage.stat(path).size if present is None else shard.num_bytes
        except FileNotFoundError:
            size = None
        except OSError as e:
            raise DatasetError(f"{path}: cannot be reached ({e})") from e
        if size is None or (present is not None and shard.name not in present):
            raise DatasetError(f"{path}: the shard is missing; copy the dataset again, or build it again")
        if size != shard.num_bytes:
            raise DatasetError(
                f"{path}: the shard has {size} bytes, and {FILE_NAME} says {shard.num_bytes}; copy the "
                "dataset again, or delete the shard and its index and build again"
            )

    _for_each(check, shards, together=present is None and storage.is_remote(output))


def _read_indexes(
    output: str, info: DatasetInfo, shards: Sequence[ShardInfo], columns: Collection[str] | None = None
) -> pa.Table:
    """The indexes of some shards, as one table; of the columns those that there are."""
    names = None if columns is None else sorted(_name_in_index(name, info) for name in columns)

    def read(shard: ShardInfo) -> pa.Table:
        return read_shard_index(output, info, shard, names)

    tables = _for_each(read, shards, together=storage.is_remote(output))
    table = pa.concat_tables(tables).replace_schema_metadata(None).combine_chunks()
    return table.rename_columns(
        [f"manifest_{name}" if _is_of_record(name, info) else name for name in table.column_names]
    )


def _name_in_index(name: str, info: DatasetInfo) -> str:
    """Under which name an index has a column: it may have further ones named id and image."""
    bare = name.removeprefix("manifest_")
    return bare if bare != name and _is_of_record(bare, info) else name


def _is_of_record(name: str, info: DatasetInfo) -> bool:
    """Whether a column's name means something of a record, whatever the index has under it."""
    return name == "id" or _has_tensor(name, info)


def _for_each(look: Callable[[ShardInfo], T], shards: Sequence[ShardInfo], together: bool) -> list[T]:
    """What is found of each shard; several at a time if each look is a request."""
    if not together:
        return [look(shard) for shard in shards]
    with ThreadPoolExecutor(_REMOTE_READS) as pool:
        return list(pool.map(look, shards))
