"""One pass over a shard: the bytes that are hashed are the bytes that are parsed."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.errors import ShardError
from beam_nifti.inspection.problems import Problems, Scope
from beam_nifti.inspection.record_checks import RecordSpec, check_record
from beam_nifti.inspection.table_checks import check_index, check_people, check_places, index_rows, no_rows
from beam_nifti.pipeline.withdrawal import people_in
from beam_nifti.record.dataset_files import FILE_NAME, path_of
from beam_nifti.record.dataset_info import ShardInfo
from beam_nifti.record.index import mask_labels, parse_index, read_bytes
from beam_nifti.record.shard_index import known_columns, limits_of
from beam_nifti.record.tfrecord import EMPTY_MEMBER, require_stored_size
from beam_nifti.record.tiles import check_cuts
from beam_nifti.record.versions import versions_in
from beam_nifti.storage import paths as storage
from beam_nifti.volume.files import frames_of

_READ_BYTES: Final = 1 << 22
_BATCH_ROWS: Final = 256
_MOST_HASHED: Final = 1 << 32
"""Bytes of a file that are hashed where no index bounds them: a hole in a file may have any size."""

_RESTORE: Final = "copy it again, or delete it and its index and run the build again"


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record as stored in its shard.

    Attributes:
        ordinal: 0-based number in the shard.
        data: its bytes.
        cells: its row of the index.
        name: name of the record in problems.
    """

    ordinal: int
    data: bytes
    cells: Mapping[str, Any]
    name: str

    def check(
        self,
        spec: RecordSpec,
        tell: Callable[[str], None],
        rebuild: Callable[[bytes], Iterable[str]] = lambda _: (),
    ) -> bytes | None:
        """Report what is wrong with the record, and what differs in a rebuilt one.

        Returns:
            The serialized Example; None if it cannot be checked.

        Raises:
            OSError: its images cannot be reached, which does not concern the record.
        """
        try:
            payload = spec.unpack(self.data, self.cells)
            problems = [check_record(payload, self.cells, spec), rebuild(payload)]
            if spec.config.has_members:
                lengths, is_compressed = self.cells["member_lengths"], spec.config.compression == "gzip"
                problems.append(check_cuts(self.data, payload, lengths, is_compressed))
            for problem in itertools.chain(*problems):
                tell(problem)
            return payload
        except OSError:
            raise
        except ShardError as e:
            tell(str(e))
        except Exception as e:  # whatever a parser raises, the other records are still read
            tell(f"cannot be checked: {e!r}")
        return None


class ShardPass:
    """Reads the records of a shard for several threads, in order, and reports what is wrong with its files.

    `cells` are extra columns to compare with a manifest, with their names in the index.

    Attributes:
        rows: id, labels, split and these cells of the records, once the shard was read.
        numbers: row numbers of the records in the manifest.
        lengths: frames of the image of each row, by its number, if images may differ in them.
        positions: positions of the first and the last of the records in the split.
        mask_labels: labels of the masks.
        versions: versions of the software that wrote the records, according to the index.
        columns: names of the columns of the index.
        people: participants of the records, if some were withdrawn from the dataset.
    """

    def __init__(
        self,
        output: str,
        shard: ShardInfo,
        split: str,
        number: int,
        spec: RecordSpec,
        problems: Problems,
        cells: Mapping[str, str] | None = None,
    ) -> None:
        self._output, self._shard, self._split, self._spec = output, shard, split, spec
        self._cells = cells or {}
        record = self._record = spec.config
        self._number, self._problems = number, problems
        self._lock = threading.Lock()
        self._records = self._read()
        self.rows = no_rows(record, [*self._cells])
        self.numbers: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self.lengths = dict[int, int]()
        self.positions: tuple[int, int] | None = None
        self.mask_labels = set[int]()
        self.versions: list[dict[str, str]] = []
        self.columns: list[str] = []
        self.people: list[str] = []

    def take(self) -> StoredRecord | None:
        """The next record; None at the end."""
        with self._lock:
            return next(self._records, None)

    def _tell(self, file: str, problem: str) -> None:
        self._problems.add(Scope.SHARD, f"{file}: {problem}", self._number)

    def _read(self) -> Iterator[StoredRecord]:
        table = self._read_index()
        name = self._shard.name
        try:
            path = path_of(self._output, name)
            size = storage.stat(path).size
            with storage.open_read(path) as handle:
                yield from self._read_file(handle, size, table)
        except FileNotFoundError:
            self._tell(name, "is missing; copy it again, or delete its index and build again")
        except (TimeoutError, ConnectionError):
            raise  # a store that keeps failing is no fault of the dataset
        except OSError as e:
            self._tell(name, f"cannot be read: {e.strerror or e}; {_RESTORE}")

    def _read_index(self) -> pa.Table:
        """The shard's index; without rows if they cannot be used."""
        shard = self._shard
        path = storage.join(self._output, shard.index)
        limits = limits_of(self._output, shard, self._spec.num_shards)
        known = known_columns(self._record, tuple(self._spec.info.manifest["columns"]))
        try:
            data = read_bytes(path_of(self._output, shard.index), limits)
            if hashlib.sha256(data).hexdigest() != shard.index_sha256:
                self._tell(shard.index, f"is not the file that {FILE_NAME} describes; {_RESTORE}")
            table, facts = parse_index(data, path, limits=limits, known=known)
            self.versions = versions_in(facts)
            is_sparse, may_lack_masks = self._spec.is_sparse, self._spec.info.columns.missing_mask == "empty"
            problems = list(
                check_index(
                    table, facts, shard, self._record, is_sparse=is_sparse, may_lack_masks=may_lack_masks
                )
            )
            lacking = {*self._cells.values()}.difference(table.column_names)
            problems += (f"column {name} is missing" for name in sorted(lacking))
        except FileNotFoundError:
            problems = ["is missing"]
        except (TimeoutError, ConnectionError):
            raise
        except (ShardError, pa.ArrowException, OSError, ValueError) as e:
            problems = [f"cannot be read: {e}"]
        for problem in problems:
            remedy = f"{shard.name} cannot be checked against it; delete both and run the build again"
            self._tell(shard.index, f"{problem}; {remedy}")
        if problems:
            return no_rows(self._record)
        if table.num_rows != shard.num_examples:
            said = f"{FILE_NAME} gives {shard.num_examples} examples"
            self._tell(shard.index, f"has {table.num_rows} rows, but {said}")
        for problem in check_people(table) if self._spec.ids_of_people else ():
            self._tell(shard.index, f"{problem}; {_RESTORE}")
        self.columns = table.column_names
        if self._spec.info.withdrawn:
            self.people = pc.unique(people_in(table, self._spec.info)).to_pylist()
        self.rows = index_rows(table, self._split, self._record, self._cells)
        self.numbers = table["row"].drop_null().to_numpy()
        if self._record.max_frames is not None:
            shapes = map(frames_of, table["source_shape"].to_pylist())
            self.lengths = dict(zip(table["row"].to_pylist(), shapes, strict=True))
        if table.num_rows:
            self.positions = tuple(pc.min_max(table["position"]).as_py().values())
        if self._record.mask_dtype is not None:
            self.mask_labels = mask_labels(table)
        return table

    def _read_file(self, handle: BinaryIO, size: int, table: pa.Table) -> Iterator[StoredRecord]:
        shard, hasher = self._shard, hashlib.sha256()
        problems = list(self._check_places(table, size))
        for problem in problems:
            self._tell(shard.index, problem)
        # Where the index does not lead through the file from front to back, it is hashed by itself.
        in_order, num_hashed = not problems, 0
        if not in_order:
            num_hashed = _hash(handle, hasher)
        batches = (batch.to_pylist() for batch in table.to_batches(max_chunksize=_BATCH_ROWS))
        for ordinal, cells in enumerate(itertools.chain.from_iterable(batches)):
            offset, length = cells["offset"], cells["length"]
            name = f"{shard.name}: record {ordinal} ({cells['example_id']})"
            if not 0 <= offset < offset + length <= size:
                problem = f"{name}: bytes {offset} to {offset + length} are not in the file ({size})"
                self._problems.add(Scope.RECORD, problem, self._number, ordinal)
                continue
            try:
                require_stored_size(length, self._spec.most_bytes(cells))
            except ShardError as e:
                self._problems.add(Scope.RECORD, f"{name}: {e}", self._number, ordinal)
                handle.seek(offset + length)
                continue
            if not in_order:
                handle.seek(offset)
            data = handle.read(length)
            if in_order:
                hasher.update(data)
                num_hashed += len(data)
            yield StoredRecord(ordinal, data, cells, name)
        if in_order:
            num_hashed += _hash(handle, hasher)
        if size != shard.num_bytes:
            self._tell(shard.name, f"has {size} bytes, but {FILE_NAME} gives {shard.num_bytes}")
        if num_hashed < size:
            self._tell(
                shard.name, f"its sha256 is not known, as its {size:,} bytes were not all read; {_RESTORE}"
            )
        elif (found := hasher.hexdigest()) != shard.sha256:
            said = f"{FILE_NAME} gives {shard.sha256}: one of the files was changed"
            self._tell(shard.name, f"sha256 is {found}, but {said}; {_RESTORE}")

    def _check_places(self, table: pa.Table, size: int) -> Iterator[str]:
        """Find where the records of the index do not fill the shard's file."""
        if table.num_rows:
            yield from check_places(table, size)
        elif not self._shard.num_examples:
            expected = len(EMPTY_MEMBER) if self._record.compression == "gzip" else 0
            if size != expected:
                yield f"has no rows, but the shard's file has {size} bytes, expected {expected}"


def _hash(handle: BinaryIO, hasher: hashlib._Hash) -> int:
    """Hash the rest of a file without keeping it, but at most _MOST_HASHED bytes; how many there were."""
    count = 0
    while chunk := handle.read(min(_READ_BYTES, _MOST_HASHED - count)):
        hasher.update(chunk)
        count += len(chunk)
    return count
