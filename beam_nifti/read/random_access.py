"""Records by number: `dataset[i]`, without TensorFlow and without Beam, for PyTorch, JAX or numpy.

The index gives the offset of a record, which is read without the others. See docs/reading.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, SupportsIndex, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.errors import DatasetError, UsageError
from beam_nifti.read.drawing import Drawing, Weighed
from beam_nifti.read.grid import PatchGrid, RecordSource
from beam_nifti.read.opening import Opened, open_dataset
from beam_nifti.read.order import item_number, whole_number
from beam_nifti.read.patches import Box, read_patch
from beam_nifti.read.records import Element, Records, Rows, select_records
from beam_nifti.read.split_spec import choose_fold
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.record.index import extra_column
from beam_nifti.storage import paths as storage
from beam_nifti.support.wording import counted, one_line


class Dataset:
    """The records of a split, or of a part of it, by number.

    It is a sequence that PyTorch's `DataLoader` accepts. Several threads, and forked and spawned processes,
    may use it: it holds no open file, and is pickled as the dataset's path and the numbers of its records.

    - `dataset[i]` reads one record: a dictionary of the columns, with arrays that belong to the caller.
    - `dataset[10:20]`, `dataset[[3, 1, 4]]` and `dataset[mask]` are datasets of those records.
      Nothing is read.
    - `for element in dataset` reads one record after the other, in the order of the index.

    The columns are:

    - "image": float32 of shape (X, Y, Z, 1), or (X, Y, Z, C) if records have C frames, components or images,
      in C order; the same bits as from `beam_nifti.reader.load_dataset`.
    - "mask": shape (X, Y, Z, 1), in its stored dtype.
    - "target": float32 of shape (X, Y, Z, 1), in the units of its file.
    - "label": float32, as in the record; refused if the dataset has no labels. If the first label is a
      string, "label/NAME" replaces it.
    - "id": str.
    - "affine": float64 of shape (4, 4), from voxel indices to millimetres in RAS+.
    - "zooms": float64 of shape (3,), the voxel sizes in millimetres.
    - every other column of the index, such as "site", "shape" or "max": str, int, float, None, or an array
      if a cell has several numbers. Extra columns of the manifest that are called "id", or "image", "mask"
      or "target" if records have that volume, are renamed to "manifest_id" and so on.
    - every other feature of the records: bytes, a scalar, or an array if there are several numbers.

    All columns of the index are taken from there, so a dataset without "image", "mask" and other features
    reads no record. For every record that is read, the checksums of the gzip members and the CRC-32C of the
    TFRecord are checked, and its id and all columns that it also states itself are compared.

    Args:
        path: folder or URL of the dataset.
        split: split to read, such as "train"; a slice of it, such as `train[:80%]` or `train[10:20]`; or
            several, such as `train+test`.
        where: condition on columns of the index, such as "age > 60 and site == 'A'", which selects from the
            records of `split`; docs/reading.md describes conditions.
        columns: columns of an element; None means image, label (if the dataset has labels), id, affine and
            zooms.
        channels_first: whether images have the shape (C, X, Y, Z), and masks and targets (1, X, Y, Z).
        fold: fold to leave out of "train", or to read as "validation", of a dataset that was built with
            `--split kfold:N`; from 0.

    Raises:
        DatasetError: the dataset is absent or incomplete, or has no such split; or a shard or an index is
            missing, cannot be reached, or does not match dataset_info.json.
        UsageError: `split`, `fold`, `where` or `columns` is not valid, or names a column that does not exist.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str = "train",
        *,
        where: str | None = None,
        columns: Sequence[str] | None = None,
        channels_first: bool = False,
        fold: SupportsIndex | None = None,
    ) -> None:
        opened = open_dataset(storage.absolute(storage.path_text("path", path)))
        if fold is not None:
            split = choose_fold(opened.path, opened.info, split, fold)
        self._records, self._rows = select_records(opened, split, where, columns, channels_first)

    def __len__(self) -> int:
        """The number of records."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Element: ...
    @overload
    def __getitem__(self, index: slice | Iterable[int]) -> Dataset: ...
    def __getitem__(self, index: Any) -> Element | Dataset:
        """One record, by its number from 0, or from -1 backwards; or a dataset of several records.

        Raises:
            IndexError: a number is out of range.
            TypeError: `index` is not a number, a slice, a list of numbers, or one boolean per record.
            DatasetError: the record is missing or damaged; the message names it.
        """
        if isinstance(index, slice):
            return self._of(self._records, self._rows[index])
        try:
            number = item_number(index, "record")
        except TypeError:
            return self._of(self._records, np.asarray(self._rows, np.int64)[self._numbers(index)])
        return self._records.read(self._row(number))

    def _row(self, number: int) -> int:
        if not -len(self) <= number < len(self):
            raise IndexError(f"there is no record {number}: the dataset has {len(self)}")
        return int(self._rows[number])

    def __getitems__(self, indices: Iterable[int]) -> list[Element]:
        """Read several records. PyTorch's `DataLoader` calls this for a batch."""
        return [self[index] for index in indices]

    def read_in_place(self, number: int) -> Element:
        """Like `dataset[number]`, but the next read of this thread may overwrite the arrays, so copy them."""
        return self._records.read(int(self._rows[number]), in_place=True)

    def __iter__(self) -> Iterator[Element]:
        """Read one record after the other.

        Raises:
            DatasetError: the dataset was rebuilt after it was opened, or as for `dataset[i]`.
        """
        self.require_current()
        return (self._records.read(int(row)) for row in self._rows)

    def require_current(self) -> None:
        """Check that the dataset is still the one that was opened, in a few milliseconds or one request.

        Raises:
            DatasetError: it was rebuilt or removed.
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
        """Pickle the path, and the numbers of its records; unpickling reads the index again."""
        return Dataset._of, (self._records, self._rows)

    @property
    def path(self) -> str:
        """The absolute path of the dataset's folder, or its URL."""
        return self._records.opened.path

    @property
    def info(self) -> DatasetInfo:
        """The contents of dataset_info.json."""
        return self._records.opened.info

    @property
    def digest(self) -> str:
        """sha256 of dataset_info.json as it was when the dataset was opened."""
        return self._records.opened.digest

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of an element."""
        return self._records.columns

    @property
    def channels_first(self) -> bool:
        """Whether the channel axis is the first axis of a volume."""
        return self._records.channels_first

    @property
    def ids(self) -> list[str]:
        """The ids of the records, in their order."""
        ids: list[str] = self._records.table["example_id"].take(np.asarray(self._rows, np.int64)).to_pylist()
        return ids

    def shape_of(self, index: SupportsIndex) -> tuple[int, ...]:
        """The shape of a record's voxels: (X, Y, Z), or (X, Y, Z, C). Nothing is read.

        Raises:
            IndexError: `index` is out of range.
        """
        return self._records.shape_of(self._row(item_number(index, "record")))

    def prepare_patches(self, around_labels: bool) -> None:
        """Read the columns of the index that patches require: once, before several threads need them.

        Args:
            around_labels: whether patches will be drawn around labels.

        Raises:
            UsageError: patches cannot be drawn around labels: records have no masks, or the index does not
                have the positions of labels.
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
                "`beam-nifti convert` makes a dataset that has them, without the images"
            )

    def positions_of(self, index: SupportsIndex) -> dict[int, npt.NDArray[np.int32]]:
        """The positions of some voxels of each label of a record's mask. No record is read.

        Returns:
            For each label except 0, ascending, indices of voxels in C order, the same number for each: of a
            label with few voxels, some occur more than once.

        Raises:
            IndexError: `index` is out of range.
            UsageError: records have no masks, or the index does not have the positions of labels.
        """
        self._require_positions()
        return self._records.positions_of(self._row(item_number(index, "record")))

    def patch(
        self, index: SupportsIndex, corner: Sequence[SupportsIndex], shape: Sequence[SupportsIndex]
    ) -> Element:
        """A patch of a record: like `dataset[index]`, with its volumes cropped to a box of voxels.

        The affine is that of the box.

        If the record is compressed, only the gzip members that the box touches are read and decompressed,
        and their CRC-32 are checked. If it is uncompressed, only the rows that the box touches are read,
        without a checksum. From a store, each volume takes one request. Records of a single
        member are read completely: those of small volumes, and those of datasets without the format feature
        "members". The first patch of a record also reads and checks the parts of it that are not voxels.

        Args:
            index: number of the record, as in `dataset[index]`.
            corner: index of the first voxel of the box along x, y and z. The box may reach beyond the volume,
                where an image is padded with its minimum (each of several images with its own), a target with
                its own, and a mask with 0.
            shape: number of voxels along x, y and z.

        Raises:
            IndexError: `index` is out of range.
            UsageError: `corner` or `shape` is not three integers, or `shape` has one below 1 or does not fit
                into memory.
            DatasetError: the record is missing or damaged; the message names it.
        """
        return read_patch(self._records, self._row(item_number(index, "record")), Box.of(corner, shape))

    def grid_patches(
        self, index: SupportsIndex, patch: Sequence[SupportsIndex], overlap: float = 0.5
    ) -> PatchGrid:
        """Patches that cover a record, for inference. `PatchGrid.stitch` combines the predictions.

        Args:
            index: number of the record, as in `dataset[index]`.
            patch: shape of a patch: voxels along x, y and z.
            overlap: least share of a patch that neighbours have in common along each axis.

        Raises:
            IndexError: `index` is out of range.
            UsageError: `patch` is not three integers of at least 1 or does not fit into memory, or `overlap`
                is not from 0 to below 1.
        """
        row = self._row(item_number(index, "record"))
        return PatchGrid(RecordSource(self._records, row), patch, overlap)

    def save_nifti(
        self,
        index: SupportsIndex,
        volume: npt.ArrayLike,
        path: str | os.PathLike[str],
        *,
        on_source_grid: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Save a volume that a model made of a record, such as a prediction, as a NIfTI image in its space.

        The header is that of `beam_nifti.extract`: the affine and the voxel sizes of the record. The file
        appears whole or not at all.

        Args:
            index: number of the record, as in `dataset[index]`.
            volume: voxels in the record's shape. It may have a channel axis, which is where the dataset's
                images have it. Several channels become a 4-D image. Booleans and integers are saved in the
                smallest dtype that holds them, such as uint8 for labels, and floats in their own dtype;
                float16 becomes float32.
            path: ends in .nii or .nii.gz; local or a URL.
            on_source_grid: whether to save it on the grid of the image that the record was made of, by
                `beam_nifti.restore` with its defaults.
            overwrite: whether to replace an existing file. A file with the size and the time of one that the
                dataset was built from is never replaced.

        Raises:
            IndexError: `index` is out of range.
            UsageError: the volume has another shape or another kind of dtype, or the path has another ending
                or is that of a file that the dataset was built from.
            DatasetError: the record has no affine, or the index does not have the grid of its source.
            OutputError: the file exists.
            OSError: the file cannot be written.
        """
        from beam_nifti.read.saving import save_nifti  # loads nibabel

        row = self._row(item_number(index, "record"))
        save_nifti(self._records, row, volume, path, on_source_grid=on_source_grid, overwrite=overwrite)

    def by_id(self, example_id: str) -> Element:
        """The record with this id.

        Raises:
            DatasetError: none of these records has it, or as for `dataset[i]`.
        """
        return self._records.read(self._row_of(example_id))

    def geometry_of(self, example_id: str) -> dict[str, Any]:
        """Where a record and its source lie in space, as the index has it. No record is read.

        Returns:
            The shape of the record, and the columns affine, zooms, source_shape and source_affine of the
            index, if it has them.

        Raises:
            DatasetError: none of these records has the id.
        """
        row = self._row_of(example_id)
        (cells,) = self._records.geometry.slice(row, 1).to_pylist()
        return {**cells, "shape": self._records.shape_of(row)}

    def _row_of(self, example_id: str) -> int:
        row = int(pc.index(self._records.table["example_id"], example_id).as_py())
        if row < 0 or row not in self._rows:
            raise DatasetError(
                f"{self.path}: no record {example_id!r} among these {len(self)}; look for it in "
                "`ids`, or in another split"
            )
        return row

    def draw(
        self,
        *,
        balance: str | None = None,
        weights: str | None = None,
        seed: SupportsIndex,
        epoch: SupportsIndex = 0,
    ) -> Dataset:
        """As many records as there are, drawn by weight, in random order; some occur several times.

        The draw depends only on these records, seed and epoch, and is the same as that of `load_dataset`. It
        is even: a record that is expected 2.5 times is there 2 or 3 times. No record is read.

        Args:
            balance: column of the index, such as "sex", whose values are all equally likely. Texts are
                compared as they are.
            weights: column of the index with the weight of each record: finite numbers of at least 0.
            seed: seed of the draw, at least 0.
            epoch: number of the epoch, from 0. Every epoch has another draw.

        Raises:
            DatasetError: the index cannot be read.
            UsageError: not exactly one of `balance` and `weights` is given; the index does not have the
                column; it has no value for a record, or no weight; or seed or epoch is not a whole number of
                at least 0.
        """
        drawing = Drawing.of(balance, weights)
        if drawing is None:
            raise UsageError("balance and weights are missing; give one of them")
        numbers = {name: whole_number(name, n) for name, n in (("seed", seed), ("epoch", epoch))}
        for name, number in numbers.items():
            if number < 0:
                raise UsageError(f"{name} is {number}; it must be at least 0")
        return self[self.weigh(drawing).draw(**numbers)]

    def weigh(self, drawing: Drawing) -> Weighed:
        """The weights of the records, for `draw`."""
        return drawing.weigh(self.index([drawing.column])[drawing.column])

    def index(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of the index for these records, in their order: labels for a sampler, ages for a plot.

        Args:
            columns: columns of the index; None means all.

        Raises:
            DatasetError: the index cannot be read.
            UsageError: the index does not have one of the columns.
        """
        r = self._records
        table = r.opened.read_indexes(r.shards, columns)
        missing = set(columns or ()) - set(table.column_names)
        if missing:
            raise UsageError(
                f"{self.path}: the index has no column {min(missing)!r}; {self._index_hint(min(missing))}"
            )
        return table.select(columns or table.column_names).take(np.asarray(self._rows, np.int64))

    def _index_hint(self, name: str) -> str:
        """Which column of the index a name of records may stand for."""
        labels = {f"label/{column.name}": extra_column(column.name) for column in self.info.labels}
        meant = {"id": "example_id"} | labels
        if name in meant:
            return f"its name there is {meant[name]!r}"
        return "`index().column_names` lists those that it has"

    @classmethod
    def of_opened(
        cls,
        opened: Opened,
        split: str,
        where: str | None,
        columns: Sequence[str],
        channels_first: bool,
    ) -> Dataset:
        """Like `Dataset(path, …)`, for a dataset that is already open."""
        return cls._of(*select_records(opened, split, where, columns, channels_first))

    @classmethod
    def _of(cls, records: Records, rows: Rows) -> Dataset:
        """A dataset of some rows of records that are already open."""
        dataset = cls.__new__(cls)
        dataset._records, dataset._rows = records, rows
        return dataset

    def _numbers(self, index: Any) -> npt.NDArray[np.int64]:
        numbers = np.asarray(index)
        if numbers.ndim == 1 and numbers.dtype == np.bool_ and len(numbers) == len(self):
            return np.flatnonzero(numbers)
        if numbers.ndim != 1 or not (numbers.dtype.kind in "iu" or numbers.size == 0):
            raise TypeError(
                f"index is {index!r}; give a number, a slice, a list of numbers, or {len(self)} booleans"
            )
        wrong = numbers[(numbers < -len(self)) | (numbers >= len(self))]
        if wrong.size:
            raise IndexError(f"there is no record {wrong[0]}: the dataset has {len(self)}")
        return numbers.astype(np.int64)
