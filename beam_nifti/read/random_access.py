"""Datasets by number: `dataset[i]` without TensorFlow and without Beam, for PyTorch, JAX or numpy.

A record is found by its place in the index and read by itself. Source: docs/format.md, docs/reading.md.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, SupportsIndex, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.errors import DatasetError, UsageError
from beam_nifti.read.grid import PatchGrid
from beam_nifti.read.opening import Opened, open_dataset, rebuilt
from beam_nifti.read.patches import Box, read_patch
from beam_nifti.read.records import Element, Records, Rows, open_records, select_records
from beam_nifti.read.split_spec import SplitPart
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.storage import paths as storage
from beam_nifti.support.wording import counted, one_line


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
    - "mask": of shape (X, Y, Z, 1), in the dtype in which it is stored.
    - "label": float32, as in the record; NaN in a dataset without labels. Where the first label is a string,
      there is "label/NAME" instead.
    - "id": str.
    - "affine": float64 of shape (4, 4), from voxel indices to millimetres in RAS+; "zooms": float64 of shape
      (3,), the voxel sizes.
    - every other column of the index, such as "site", "shape" or "max": str, int, float, None, or an array
      where a cell has several numbers. The manifest's own columns "id", "image" and "mask", where they are
      further ones, are called "manifest_id", and so on.
    - every other feature of the records: a scalar, or an array where there are several numbers; else bytes.

    All but "image", "mask" and what only records hold comes from the index, so that a dataset of other
    columns reads no record. Of every record that is read its checksums are checked, that of the gzip member
    and the CRC-32C of the TFRecord (3 % of the time of a compressed one), and that it has the id that the
    index says.

    Args:
        path: the dataset's folder, local or a URL.
        split: such as "train"; `train[:80%]` and `train[10:20]` are slices of it, and `train+test` is both.
        where: a condition on columns of the index, such as "age > 60 and site == 'A'"; `where.Condition` says
            what it may be made of. It selects among the records of `split`.
        columns: what an element has; None means image, label (where there are any), id, affine and zooms.
        channels_first: give images of shape (C, X, Y, Z), and masks of shape (1, X, Y, Z).

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
        channels_first: bool = False,
    ) -> None:
        opened = open_dataset(storage.absolute(storage.path_text("path", path)))
        self._records, self._rows = select_records(opened, split, where, columns, channels_first)

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
        return self._records.read(self._row(number))

    def _row(self, number: int) -> int:
        if not -len(self) <= number < len(self):
            raise IndexError(f"there is no record {number}: the dataset has {len(self)}")
        return int(self._rows[number])

    def __getitems__(self, indices: Iterable[int]) -> list[Element]:
        """Several records, read: what PyTorch's `DataLoader` asks for the records of a batch."""
        return [self[index] for index in indices]

    def lend(self, number: int) -> Element:
        """As `dataset[number]`, to be copied: this thread's next read may overwrite its arrays."""
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
        self._records.opened.require_current()

    def __repr__(self) -> str:
        r = self._records
        count, total = len(self), len(r.table)
        some = f"{count:,} of " if count != total else ""
        columns = ", ".join(map(r.describe, r.columns))
        text = f"{'+'.join(r.splits)}: {some}{counted(total, 'record')} of {columns}; {self.path}"
        return f"<Dataset {one_line(text)}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Its place and the numbers of its records; where it is unpickled, the index is read again."""
        r = self._records
        return _reopen, (r.opened.path, r.splits, r.columns, r.channels_first, self.digest, self._rows)

    @property
    def path(self) -> str:
        """The dataset's folder, absolute, or its URL."""
        return self._records.opened.path

    @property
    def info(self) -> DatasetInfo:
        """What dataset_info.json says."""
        return self._records.opened.info

    @property
    def digest(self) -> str:
        """sha256 of dataset_info.json as it was when the dataset was opened."""
        return self._records.opened.digest

    @property
    def columns(self) -> tuple[str, ...]:
        """What an element has."""
        return self._records.columns

    @property
    def channels_first(self) -> bool:
        """Whether the axis of channels is the first one of a volume."""
        return self._records.channels_first

    @property
    def ids(self) -> list[str]:
        """The ids of the records, in their order."""
        ids: list[str] = self._records.table["example_id"].take(np.asarray(self._rows, np.int64)).to_pylist()
        return ids

    def shape_of(self, index: SupportsIndex) -> tuple[int, ...]:
        """The shape of a record's voxels: (X, Y, Z), or (X, Y, Z, C). Nothing is read.

        Raises:
            IndexError: there are fewer records.
        """
        return self._records.shape_of(self._row(operator.index(index)))

    def prepare_patches(self, around_labels: bool) -> None:
        """Read what the index says for patches: once, before several threads ask for them.

        Args:
            around_labels: whether patches are to be drawn around labels.

        Raises:
            UsageError: records have no masks then, or the index does not say where their labels are.
        """
        if around_labels:
            self._require_positions()
        self._records.prepare_patches(around_labels)

    def _require_positions(self) -> None:
        config = self.info.record_config
        if config.mask_dtype is None:
            raise UsageError(f"{self.path} has no masks; build it with --mask-column")
        if not config.has_positions:
            raise UsageError(
                f"the index of {self.path}, which an earlier version wrote, has no positions of labels; "
                "build the dataset again with --overwrite"
            )

    def positions_of(self, index: SupportsIndex) -> npt.NDArray[np.int32]:
        """Where some voxels of each label of a record's mask are. No record is read.

        Returns:
            Numbers of voxels in C order: a row for each label but 0, ascending.

        Raises:
            IndexError: there are fewer records.
            UsageError: records have no masks, or the index does not say it.
        """
        self._require_positions()
        return self._records.positions_of(self._row(operator.index(index)))

    def patch(
        self, index: SupportsIndex, corner: Sequence[SupportsIndex], shape: Sequence[SupportsIndex]
    ) -> Element:
        """A box of a record's voxels: as `dataset[index]`, with the image and the mask cropped.

        Of a compressed record, only the gzip members that the box touches are read and decompressed, and each
        is checked by its CRC-32; of an uncompressed one, only the rows that it touches. From a store, each
        volume is one request. Records without such members are read as a whole: those of small volumes, and
        those of datasets without the format feature "members".

        Args:
            index: number of the record, as of `dataset[index]`.
            corner: index of the first voxel of the box along x, y and z. The box may reach beyond the volume;
                it is padded there with the least value of the volume (of several images, of each), and a mask
                with 0.
            shape: number of voxels along x, y and z.

        Raises:
            IndexError: there are fewer records.
            UsageError: `corner` or `shape` is not three integers, or `shape` has one below 1.
            DatasetError: the record is missing or damaged; says which it is.
        """
        return read_patch(self._records, self._row(operator.index(index)), Box.of(corner, shape))

    def grid_patches(
        self, index: SupportsIndex, patch: Sequence[SupportsIndex], overlap: float = 0.5
    ) -> PatchGrid:
        """Patches that cover a record, for inference; `PatchGrid.stitch` makes one volume of the results.

        Args:
            index: number of the record, as of `dataset[index]`.
            patch: voxels of each along x, y and z.
            overlap: share of a patch that neighbours have in common at least, along each axis.

        Raises:
            IndexError: there are fewer records.
            UsageError: `patch` is not three integers of at least 1, or `overlap` is not from 0 to below 1.
        """
        return PatchGrid(self._records, self._row(operator.index(index)), patch, overlap)

    def by_id(self, example_id: str) -> Element:
        """The record of an id.

        Raises:
            DatasetError: there is none among these records; or as `dataset[i]`.
        """
        row = pc.index(self._records.table["example_id"], example_id).as_py()
        if row < 0 or row not in self._rows:
            raise DatasetError(
                f"{self.path}: no record {example_id!r} among these {len(self)}; look for it in "
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
        table = r.opened.read_indexes(r.shards, columns)
        missing = set(columns or ()) - set(table.column_names)
        if missing:
            raise UsageError(f"{self.path}: the index has no column {min(missing)!r}")
        return table.select(columns or table.column_names).take(np.asarray(self._rows, np.int64))

    @classmethod
    def of_opened(
        cls,
        opened: Opened,
        split: str,
        where: str | None,
        columns: Sequence[str],
        channels_first: bool,
    ) -> Dataset:
        """As `Dataset(path, …)`, of a dataset that is open already."""
        return cls._of(*select_records(opened, split, where, columns, channels_first))

    @classmethod
    def _of(cls, records: Records, rows: Rows) -> Dataset:
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


def _reopen(
    path: str, splits: Sequence[str], columns: Sequence[str], channels_first: bool, digest: str, rows: Rows
) -> Dataset:
    """The dataset that was pickled."""
    records = open_records(open_dataset(path), [SplitPart(name) for name in splits], columns, channels_first)
    if records.opened.digest != digest:
        raise rebuilt(path)
    return Dataset._of(records, rows)
