"""Open a dataset for reading: its dataset_info.json, its shards and its indexes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.errors import DatasetError, UsageError
from beam_nifti.record import dataset_files
from beam_nifti.record.dataset_files import FILE_NAME, path_of
from beam_nifti.record.dataset_info import DatasetInfo, ShardInfo
from beam_nifti.record.example import TENSOR_FEATURES, label_feature
from beam_nifti.record.index import SOURCE_LISTS, SOURCE_SUMS
from beam_nifti.record.shard_index import read_shard_index
from beam_nifti.storage import paths as storage

K = TypeVar("K")
T = TypeVar("T")

REMOTE_READS: Final = 16
"""Number of files or records that are read at a time if each is a request."""

REBUILT: Final = "was rebuilt after it was opened; open it again"
"""Why reading a dataset stopped."""

_DEFAULT_COLUMNS: Final = ("image", "label", "id", "affine", "zooms")
_COLUMN_OF_TENSOR: Final = {feature: name for name, feature in TENSOR_FEATURES.items()}


@dataclass(frozen=True, eq=False)
class Opened:
    """A complete dataset, as it was when it was opened.

    Attributes:
        path: absolute path of its folder, or its URL.
        content: bytes of its dataset_info.json.
        info: the parsed dataset_info.json.
    """

    path: str
    content: bytes
    info: DatasetInfo

    @classmethod
    def of(cls, path: str, content: bytes) -> Opened:
        """The dataset of a folder whose dataset_info.json was read.

        Raises:
            DatasetError: dataset_info.json is damaged.
        """
        return cls(path, content, DatasetInfo.from_json(content, storage.join(path, FILE_NAME)))

    @cached_property
    def digest(self) -> str:
        """sha256 of dataset_info.json, in hex."""
        return hashlib.sha256(self.content).hexdigest()

    def require_current(self) -> None:
        """Check that the dataset is still the one that was opened.

        Raises:
            DatasetError: it was rebuilt or removed.
        """
        if read_content(self.path) != self.content:
            raise rebuilt(self.path)

    def shards_of(self, splits: Iterable[str]) -> tuple[ShardInfo, ...]:
        """The shards of some splits.

        Raises:
            DatasetError: a split does not exist.
        """
        try:
            return tuple(shard for split in splits for shard in self.info.split(split).shards)
        except DatasetError as e:
            raise DatasetError(f"{self.path}: {e}") from None

    def require_shards(
        self, shards: Sequence[ShardInfo], list_names: Callable[[str], Iterable[str]] = storage.list_files
    ) -> None:
        """Check that shards exist and, on the local disk, have the right size, before training reaches them.

        Args:
            shards: shards to check.
            list_names: lists the files of a folder in a store: one listing, which has no sizes, instead of a
                request per shard.

        Raises:
            DatasetError: a shard is missing, cannot be reached, or its size differs from the one in
                dataset_info.json.
        """
        is_remote = storage.is_remote(self.path)
        present = set(list_names(self.path)) if is_remote and storage.can_list(self.path) else None

        def check(shard: ShardInfo) -> None:
            path = storage.join(self.path, shard.name)
            size = self._size_of(shard, path) if present is None else shard.num_bytes
            if size is None or (present is not None and shard.name not in present):
                raise DatasetError(f"{path}: the shard is missing; copy the dataset again, or rebuild it")
            if size != shard.num_bytes:
                raise DatasetError(
                    f"{path}: the shard has {size} bytes, but {FILE_NAME} gives {shard.num_bytes}; copy the "
                    "dataset again, or delete the shard and its index and build again"
                )

        for_each(check, shards, together=is_remote and present is None)

    def require_no_source(self, path: str) -> None:
        """Refuse to replace an existing file that the dataset was built from, by its size and its time.

        Raises:
            UsageError: it is one.
            DatasetError: an index is damaged.
        """
        found, (sizes, mtimes) = storage.stat(path), self._sources
        if ((sizes == found.size) & (mtimes == found.mtime)).any():
            raise UsageError(f"{path}: the dataset was built from this file; choose another path")

    @cached_property
    def _sources(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Size and time of each file that the dataset was built from, as far as the indexes have them."""
        # Format version 1 has the sum of the sizes of an example's files: of a single file, its size.
        has_lists = self.info.record_config.has_sources
        names = SOURCE_LISTS[:2] if has_lists else SOURCE_SUMS
        table = self.read_indexes(self.info.shards, names)
        columns = (pc.list_flatten(table[name]) if has_lists else table[name] for name in names)
        sizes, mtimes = (column.to_numpy(zero_copy_only=False) for column in columns)
        if sizes.size != mtimes.size:
            raise DatasetError(
                f"{self.path}: the indexes have {sizes.size} {names[0]} and {mtimes.size} {names[1]}; run "
                "beam-nifti verify"
            )
        return sizes, mtimes

    def _size_of(self, shard: ShardInfo, path: str) -> int | None:
        """The size of a shard's file in bytes; None if it does not exist."""
        try:
            return storage.stat(path_of(self.path, shard.name)).size
        except FileNotFoundError:
            return None
        except OSError as e:
            raise DatasetError(f"{path}: cannot be reached ({e.strerror or e})") from e

    def read_indexes(self, shards: Sequence[ShardInfo], columns: Collection[str] | None = None) -> pa.Table:
        """The indexes of some shards, as one table.

        Extra columns with the name of a column of records, such as "id", are called `manifest_NAME`.

        Raises:
            DatasetError: an index cannot be read, does not belong to its shard, or has other columns.
        """
        names = None if columns is None else sorted(map(self._name_in_index, columns))
        tables = for_each(
            lambda shard: read_shard_index(self.path, self.info, shard, names),
            shards,
            together=storage.is_remote(self.path),
        )
        for shard, table in zip(shards, tables, strict=True):
            if table.column_names != tables[0].column_names:
                path = storage.join(self.path, shard.index)
                raise DatasetError(f"{path}: has other columns than {shards[0].index}; run beam-nifti verify")
        table = pa.concat_tables(tables).replace_schema_metadata(None).combine_chunks()
        return table.rename_columns(
            [f"manifest_{name}" if self._is_of_record(name) else name for name in table.column_names]
        )

    def _name_in_index(self, name: str) -> str:
        bare = name.removeprefix("manifest_")
        return bare if bare != name and self._is_of_record(bare) else name

    def _is_of_record(self, name: str) -> bool:
        """Whether a name always means a column of records, even if the index has a column of that name."""
        return name == "id" or self.has_tensor(name)

    def has_tensor(self, name: str) -> bool:
        """Whether records have a tensor of that name."""
        return TENSOR_FEATURES.get(name) in self.info.features

    @cached_property
    def columns_of_records(self) -> frozenset[str]:
        """The names of the columns that are stored in records."""
        return frozenset(_COLUMN_OF_TENSOR.get(name, name) for name in self.info.features)

    def no_column(self, name: str, known: Collection[str], remedy: str = "") -> UsageError:
        """The error for a column that does not exist."""
        choices = ", ".join(sorted(known))
        return UsageError(f"{self.path}: records have no column {name!r}; choose one of: {choices}{remedy}")

    @property
    def label_is_text(self) -> bool:
        """Whether the first label is a string, which has no number."""
        return bool(self.info.labels) and self.info.labels[0].kind == "string"

    def choose_columns(self, asked: Sequence[str] | None) -> tuple[str, ...]:
        """The columns of an element: those in `asked`, without duplicates, or the default ones.

        Raises:
            UsageError: `label` is among them, but there are no labels, or the first one is a string. The
                number would be NaN, which would look like a missing label.
        """
        labels = [label_feature(column.name) for column in self.info.labels]
        if asked is None:
            label = labels[0] if self.label_is_text else "label"
            there = [name for name in _DEFAULT_COLUMNS if name in self.columns_of_records]
            names = (label if name == "label" else name for name in there)
            return tuple(name for name in names if self.info.labelled or name != "label")
        if "label" in asked and not self.info.labelled:
            raise UsageError(f"{self.path}: columns has 'label', but the dataset has no labels; drop it")
        if "label" in asked and self.label_is_text:
            raise UsageError(
                f"{self.path}: the first label is a string, not a number; choose one of: {', '.join(labels)}"
            )
        return tuple(dict.fromkeys(asked))


def open_dataset(path: str) -> Opened:
    """Open a complete dataset, by its absolute path or its URL.

    Raises:
        DatasetError: there is no complete dataset, or it is damaged or cannot be reached.
    """
    return Opened.of(path, read_content(path))


def read_content(path: str) -> bytes:
    """Read dataset_info.json as `dataset_files.read_content` does; an unreachable store is a DatasetError."""
    try:
        return dataset_files.read_content(path)
    except OSError as e:
        raise DatasetError(f"{storage.join(path, FILE_NAME)}: cannot be reached ({e.strerror or e})") from e


def rebuilt(path: str) -> DatasetError:
    """The error for a dataset that is no longer the one that was opened."""
    return DatasetError(f"{path}: {REBUILT}")


def for_each(look: Callable[[K], T], items: Sequence[K], together: bool) -> list[T]:
    """Call a function for each shard or member, for several at a time with `together`."""
    if not together:
        return [look(item) for item in items]
    with ThreadPoolExecutor(REMOTE_READS) as pool:
        return list(pool.map(look, items))
