"""The records of some splits: where they are stored, which ones are selected, and how to read one."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from beam_nifti.errors import DatasetError, ShardError, UsageError, VolumeError, unreadable
from beam_nifti.read.decoding import decode_feature, decode_image, decode_mask, decode_target
from beam_nifti.read.opening import Opened, open_dataset, rebuilt
from beam_nifti.read.split_spec import SplitPart, parse_split
from beam_nifti.read.where import Condition
from beam_nifti.record.agreement import ROUNDED, compared_columns, find_disagreements
from beam_nifti.record.dataset_info import ShardInfo
from beam_nifti.record.example import (
    RANGE_FEATURES,
    SCALING_FEATURES,
    Features,
    decode_example,
    largest_payload,
    tensors_of,
)
from beam_nifti.record.index import extra_column, schema_of
from beam_nifti.record.tfrecord import decode_buffer, require_stored_size
from beam_nifti.storage import paths as storage
from beam_nifti.support import logs
from beam_nifti.volume.compression import make_buffer

Element = dict[str, Any]
Rows = range | npt.NDArray[np.int64]

_SCRATCH_BYTES: Final = 32 << 20
"""The largest record for which a thread reuses its buffer; new memory costs a page fault per 4 KiB."""

_DECODERS: Final = {"image": decode_image, "mask": decode_mask, "target": decode_target}

_of_thread = threading.local()


@dataclass(frozen=True, eq=False)
class Records:
    """All records of some splits, and where they are stored. The slices of a dataset share it.

    Attributes:
        opened: the dataset.
        splits: names of the splits.
        table: example_id, offset and length of each record, and other columns of the index that are used.
        columns: columns of an element.
        channels_first: whether the channel axis is the first axis of a volume.
    """

    opened: Opened
    splits: tuple[str, ...]
    table: pa.Table
    columns: tuple[str, ...]
    channels_first: bool

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what is needed to open them again."""
        opened = self.opened
        return _reopen, (opened.path, self.splits, self.columns, self.channels_first, opened.digest)

    @cached_property
    def shards(self) -> tuple[ShardInfo, ...]:
        """The shards of all splits, in the order of the table."""
        return self.opened.shards_of(self.splits)

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """The first row of each shard in the table."""
        return np.cumsum([0, *(shard.num_examples for shard in self.shards)])[:-1]

    @cached_property
    def places(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The offset and length of each record."""
        return self.table["offset"].to_numpy(), self.table["length"].to_numpy()

    @cached_property
    def from_record(self) -> frozenset[str]:
        """The columns that require reading the record."""
        asked, known = set(self.columns) - {"id"}, set(self.table.column_names)
        return frozenset(c for c in asked if self.opened.has_tensor(c) or c not in known)

    @cached_property
    def compared(self) -> tuple[str, ...]:
        """The columns of the table that records also state."""
        stated = compared_columns(self.opened.info.record_config)
        return tuple(name for name in self.table.column_names if name in stated)

    @cached_property
    def _numbers(self) -> dict[str, npt.NDArray[np.float64]]:
        """The numbers of columns that records state as float32, a row for each record, if none is missing."""
        found = {}
        for name in ROUNDED.keys() & set(self.compared):
            column = self.table[name].combine_chunks()
            if not column.null_count:
                values = column.flatten() if pa.types.is_list(column.type) else column
                found[name] = values.to_numpy(zero_copy_only=False).reshape(len(self.table), -1)
        return found

    def _is_stated(self, name: str, row: int, features: Features) -> bool:
        """Whether a record has the bits of the index's numbers, which is fast to see and true of most."""
        numbers, feature = self._numbers.get(name), features.get(ROUNDED.get(name, ""))
        if numbers is None or not isinstance(feature, np.ndarray):
            return False
        with np.errstate(over="ignore"):
            rounded = numbers[row].astype("<f4")
        return bool(feature.tobytes() == rounded.tobytes())

    def require_agreement(
        self, row: int, features: Features, cells: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """Check that a record states what the index does: its id, and the columns that are used of both.

        Args:
            row: of the table.
            features: features of the record.
            cells: further cells of its row of the index.

        Raises:
            ShardError: it does not, or is the record of another row.
        """
        require_id(features, self.cell("id", row))
        unequal = [name for name in self.compared if not self._is_stated(name, row, features)]
        known = {**cells, **{name: self.table[name][row].as_py() for name in unequal}}
        for problem in find_disagreements(features, known, self.opened.info.labels):
            raise ShardError(f"its {problem}")

    def describe(self, name: str) -> str:
        """The name of a column, with dtype and shape if it is a tensor."""
        info = self.opened.info
        if not self.opened.has_tensor(name):
            return name
        dtype = info.record_config.mask_dtype if name == "mask" else "float32"
        if info.shape is None:
            return f"{name} {dtype} of mixed shapes"
        num_masks = info.record_config.num_masks if name == "mask" else 1
        *space, channels = (*info.shape, 1)[:4] if name == "image" else (*info.shape[:3], num_masks)
        return f"{name} {dtype} {(channels, *space) if self.channels_first else (*space, channels)}"

    def rows_of(self, parts: Sequence[SplitPart]) -> Rows:
        """The rows of the table that belong to some parts of the splits.

        Raises:
            UsageError: a part reaches beyond its split.
        """
        counts = {name: self.opened.info.splits[name].num_examples for name in self.splits}
        starts = dict(zip(counts, itertools.accumulate([0, *counts.values()]), strict=False))
        taken = [(starts[part.name], part.positions(counts[part.name])) for part in parts]
        found = [range(start + rows.start, start + rows.stop) for start, rows in taken]
        return found[0] if len(found) == 1 else np.concatenate([np.asarray(r, np.int64) for r in found])

    @cached_property
    def patch_table(self) -> pa.Table | None:
        """The columns of the index that are needed to read patches; None if records have no members.

        They are read for the first patch, and take about 0.1 MB per GB of the shards.
        """
        config = self.opened.info.record_config
        names = {"length", "min", "max", "target_min", *RANGE_FEATURES, *SCALING_FEATURES}
        names &= set(schema_of(config).names)
        if not config.has_members:
            return None
        return self.opened.read_indexes(self.shards, {"member_lengths", *names})

    @cached_property
    def agreed(self) -> npt.NDArray[np.bool_]:
        """Whether each record was found to match the index when a patch of it was read."""
        return np.zeros(len(self.table), np.bool_)

    @cached_property
    def positions(self) -> pa.Table:
        """The labels of each record's mask and their positions, from the index."""
        return self.opened.read_indexes(self.shards, {"mask_labels", "mask_positions"})

    @cached_property
    def geometry(self) -> pa.Table:
        """The affine and the voxel sizes of each record, and the grid of its source, from the index."""
        names = {"affine", "zooms", "source_shape", "source_affine"}
        return self.opened.read_indexes(self.shards, names)

    def prepare_patches(self, around_labels: bool) -> None:
        """As `Dataset.prepare_patches`. Without it, each of several threads might read these tables."""
        for name in ("patch_table", *(["positions"] if around_labels else [])):
            getattr(self, name)

    def positions_of(self, row: int) -> dict[int, npt.NDArray[np.int32]]:
        """As `Dataset.positions_of`."""
        cells = self.positions["mask_labels"][row], self.positions["mask_positions"][row]
        labels, found = (cell.values.to_numpy() if cell.is_valid else np.empty(0, np.int32) for cell in cells)
        labels = labels[labels != 0]
        num_voxels = math.prod(self.shape_of(row)[:3])
        if (
            not cells[0].is_valid
            or bool(labels.size) != bool(found.size)
            or found.size % max(1, labels.size)
            or ((found < 0) | (found >= num_voxels)).any()
        ):
            raise DatasetError(
                f"{self.opened.path}: the index has {found.size} mask_positions, which cannot be those "
                f"of {labels.size} labels of record {self.cell('id', row)!r}; run beam-nifti verify"
            )
        rows = found.reshape(labels.size, found.size // max(1, labels.size))
        return dict(zip(labels.tolist(), rows, strict=True))

    def read(self, row: int, in_place: bool = False) -> Element:
        """The element of a row of the table; for `in_place`, see `Dataset.read_in_place`.

        Raises:
            DatasetError: the record is missing or damaged.
        """
        if not self.from_record:
            return {name: self.cell(name, row) for name in self.columns}
        with self.reading(row) as (path, shape):
            features = decode_example(self._payload(path, row, shape, in_place))
            self.require_agreement(row, features)
            return {
                name: self._value(name, features, shape, in_place)
                if name in self.from_record
                else self.cell(name, row)
                for name in self.columns
            }

    def shape_of(self, row: int) -> tuple[int, ...]:
        """The shape of a record's voxels as they are stored."""
        return self.opened.info.shape or tuple(self.table["shape"][row].as_py())

    @contextlib.contextmanager
    def reading(self, row: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name the record in errors of the block. The block gets the path of its shard and its stored shape.

        Raises:
            DatasetError: the block failed to read the record.
        """
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        path = storage.join(self.opened.path, self.shards[shard].name)
        try:
            yield path, self.shape_of(row)
        except (ShardError, VolumeError, OSError, EOFError) as e:
            self.opened.require_current()
            name = f"record {self.cell('id', row)!r}, number {row - self.starts[shard]} from 0,"
            raise unreadable(f"{path}: {name}", e) from e

    def _payload(self, path: str, row: int, shape: tuple[int, ...], in_place: bool) -> memoryview:
        info = self.opened.info
        offsets, lengths = self.places
        compressed, size = info.record_config.compression == "gzip", int(lengths[row])
        most = largest_payload(tensors_of(shape, info.dtype, info.record_config))
        require_stored_size(size, most)
        buffer = scratch(size) if compressed or in_place else make_buffer(size)
        count = storage.read_into(path, int(offsets[row]), buffer)
        if count < size:
            raise ShardError(f"the file has only {count} of its {size} bytes")
        return decode_buffer(buffer, compressed, most)

    def cell(self, name: str, row: int) -> Any:
        """The value of a column in the index."""
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

    def _value(self, name: str, features: Features, shape: tuple[int, ...], in_place: bool) -> Any:
        """The value of a column in the record itself."""
        if not self.opened.has_tensor(name):
            return decode_feature(features, name, self.opened.info)
        tensor = _DECODERS[name](features, shape, self.opened.info)
        if self.channels_first:
            tensor = np.moveaxis(tensor, -1, 0)
        return tensor if in_place else np.ascontiguousarray(tensor)


def require_id(features: Features, example_id: str) -> None:
    """Check that a record has the id that the index gives.

    Raises:
        ShardError: it has a different id, or none.
    """
    found = features.get("id")
    if not isinstance(found, memoryview):
        raise ShardError("it has no id")
    if found != example_id.encode():
        raise ShardError(f"it is the record of {bytes(found).decode(errors='replace')!r}")


def scratch(size: int) -> memoryview:
    """A buffer that this thread reuses for its next read."""
    if size > _SCRATCH_BYTES:
        return make_buffer(size)
    buffer: memoryview | None = getattr(_of_thread, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _of_thread.buffer = make_buffer(size)
    return buffer[:size]


def select_records(
    opened: Opened, split: str, where: str | None, columns: Sequence[str] | None, channels_first: bool
) -> tuple[Records, Rows]:
    """The records of a dataset, and the rows that `split` and `where` select, as for `Dataset`."""
    parts, condition = parse_split(split), None if where is None else Condition(where)
    asked = {*condition.columns, "row"} if condition else ()
    records = open_records(opened, parts, columns, channels_first, asked)
    rows = records.rows_of(parts)
    if condition:
        rows, table = np.asarray(rows, np.int64), records.table
        if not condition.columns <= {"id", *table.column_names}:  # so that the message names all that exist
            table = opened.read_indexes(records.shards)
        table = table.append_column("id", table["example_id"])
        first = next(iter(opened.info.labels), None)  # `label` is its number
        texts = {"label": extra_column(first.name)} if first and first.kind != "float" else {}
        if "label" in condition.columns and not opened.info.labelled:
            raise UsageError(f"where is {where!r}, but {opened.path} has no labels; use other columns")
        if opened.label_is_text and "label" in condition.columns:
            raise UsageError(
                f"where is {where!r}, but a label of the kind string is not a number; use {texts['label']}, "
                "which has the text"
            )
        selected = rows[condition.select(table.take(rows), texts)]
        if rows.size and not selected.size:
            logs.LOGGER.warning(
                "%s: where is %r, which selects none of %d records", opened.path, where, rows.size
            )
        rows = selected
    return records, rows


def open_records(
    opened: Opened,
    parts: Sequence[SplitPart],
    columns: Sequence[str] | None,
    channels_first: bool,
    asked: Collection[str] = (),
) -> Records:
    """Open the records of some splits, with the columns `asked` of the index in their table.

    Raises:
        DatasetError, UsageError: as for `Dataset`.
    """
    splits = tuple(dict.fromkeys(part.name for part in parts))
    shards = opened.shards_of(splits)
    opened.require_shards(shards)
    columns = opened.choose_columns(columns)
    from_index = {name for name in columns if name != "id" and not opened.has_tensor(name)}
    shape = () if opened.info.shape else ["shape"]
    table = opened.read_indexes(shards, {"example_id", "offset", "length", *shape, *from_index, *asked})
    unknown = from_index - {*table.column_names, *opened.columns_of_records}
    if unknown:
        known = {*opened.read_indexes(shards[:1]).column_names, *opened.columns_of_records}
        raise opened.no_column(min(unknown), known)
    return Records(opened, splits, table, columns, channels_first)


def _reopen(
    path: str, splits: Sequence[str], columns: Sequence[str], channels_first: bool, digest: str
) -> Records:
    """The records that were pickled."""
    records = open_records(open_dataset(path), [SplitPart(name) for name in splits], columns, channels_first)
    if records.opened.digest != digest:
        raise rebuilt(path)
    return records
