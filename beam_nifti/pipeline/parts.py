"""Part files: written while volumes stream by, found again after a crash.

A part holds some records of one shard, with an index of its own. The index is written after the part
is closed, so a part counts only where its index is there.
"""

from __future__ import annotations

import functools
import hashlib
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Final, Protocol

from isal import isal_zlib

from beam_nifti.config import RecordConfig
from beam_nifti.errors import ShardError
from beam_nifti.record.index import (
    IndexEntry,
    Limits,
    make_table,
    parse_index,
    read_bytes,
    write_index,
)
from beam_nifti.record.sharding import ShardName
from beam_nifti.record.tfrecord import EncodedRecord
from beam_nifti.record.versions import versions_fact
from beam_nifti.storage import paths as storage

BUILD_FOLDER: Final = ".build"
"""Folder, in the output, for files that a build needs only until it is complete."""

PART_ENDING: Final = ".part"

COPY_BYTES: Final = 1 << 20
"""Small enough to stay in a core's cache between being read, hashed and written."""

_INDEX_NAME: Final = re.compile(r"([0-9]{10,}-[0-9a-f]{32}|[0-9a-f]{64})\.parquet")
"""Names of the indexes that a `PartWriter` or a merge writes."""

_FINGERPRINT: Final = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Part:
    """Records of one shard that are already written: a part file, or another shard.

    Attributes:
        data: path of the file that holds them.
        index: path of its index.
        positions: which of its records are meant; None means all.
    """

    data: str
    index: str
    positions: tuple[int, ...] | None = None

    @property
    def base(self) -> str:
        """The folder that the user has named, and below which none of its names may be a link."""
        return base_of(self.data) if self.data.endswith(PART_ENDING) else storage.dirname(self.data)


def part_at(stem: str) -> Part:
    """A part file and its index, by the name that they share."""
    return Part(f"{stem}{PART_ENDING}", f"{stem}.parquet")


def shard_at(output: str, name: ShardName) -> Part:
    """A shard and its index."""
    return Part(storage.join(output, str(name)), storage.join(output, name.index_file))


def parts_root(output: str, temp_location: str | None) -> str:
    """Folder of the part files of a build."""
    if temp_location is None:
        return storage.join(output, BUILD_FOLDER)
    # Builds of several outputs may share a temporary folder.
    return storage.join(temp_location, f"beam_nifti-{hashlib.sha256(output.encode()).hexdigest()[:16]}")


def base_of(part: str) -> str:
    """OUTPUT or the temporary folder, by the path of a part: the user has named it, and no folder below it.

    >>> base_of("/data/out/.build/0123456789abcdef/train-00000/0000000000-af.part")
    '/data/out'
    """
    for _ in range(4):  # the part's name, and the folders of `parts_folder`
        part = storage.dirname(part)
    return part


def parts_folder(root: str, fingerprint: str, split: str, shard_index: int) -> str:
    """The folder of the parts of a shard. It does not depend on the number of shards of the split."""
    return storage.join(root, fingerprint, f"{split}-{shard_index:05d}")


class Hasher(Protocol):
    """A hash of hashlib, or `Crc32`."""

    @property
    def name(self) -> str:
        """Key of the hash in the metadata of an index."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Add bytes."""

    def hexdigest(self) -> str:
        """The hash of all bytes, in hex."""


class Crc32:
    """The CRC-32 of what is written. It is 30 times as fast as sha256, and finds damage, but no intent."""

    name = "crc32"

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes | memoryview, /) -> None:
        """Add bytes."""
        self._value = isal_zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        """The CRC of all bytes, in hex."""
        return f"{self._value:08x}"


class RecordFile:
    """A file to which records are appended.

    Args:
        handle: the file.
        hasher: gets all that is written; None means sha256.

    Attributes:
        size: bytes written.
    """

    def __init__(self, handle: BinaryIO, hasher: Hasher | None = None) -> None:
        self._handle, self._hasher, self.size = handle, hasher or hashlib.sha256(), 0

    def write(self, *pieces: bytes | memoryview) -> tuple[int, int]:
        """Append one encoded record; its offset and length."""
        start = self.size
        for piece in pieces:
            self._handle.write(piece)
            self._hasher.update(piece)
            self.size += len(piece)
        return start, self.size - start

    @property
    def facts(self) -> dict[str, str]:
        """The facts that an index stores about the file that it describes."""
        return {self._hasher.name: self._hasher.hexdigest(), "num_bytes": str(self.size)}


class PartFile(RecordFile):
    """A part file that is written one record at a time.

    Args:
        folder: folder of the file.
        prefix: beginning of its name.
        hasher: as for `RecordFile`, but None means CRC-32.

    Attributes:
        stem: its path without ending, unique to this attempt.
        base: OUTPUT or the temporary folder.
    """

    def __init__(self, folder: str, prefix: str = "", hasher: Hasher | None = None) -> None:
        # Attempts may overlap when a runner retries, so each writes under a name of its own.
        self.stem = storage.join(folder, f"{prefix}{uuid.uuid4().hex}")
        self.base = base_of(self.stem)
        self._opened = storage.create(self.path, self.base)
        super().__init__(self._opened.__enter__(), hasher or Crc32())

    @property
    def path(self) -> str:
        """Where it is once it is closed."""
        return f"{self.stem}{PART_ENDING}"

    def write(self, *pieces: bytes | memoryview) -> tuple[int, int]:
        """Append one encoded record; its offset and length."""
        with storage.naming(self.path):
            return super().write(*pieces)

    def close(self) -> None:
        """Publish it."""
        self._opened.__exit__(None, None, None)

    def discard(self) -> None:
        """Close and remove it."""
        self._opened.__exit__(GeneratorExit, GeneratorExit(), None)


class PartWriter:
    """Writes one part file of a build, whose first record has the position `first`, and its index.

    If the part will be a whole shard, it is published as it is later, without being read for its sha256.
    """

    def __init__(
        self,
        folder: str,
        first: int,
        record: RecordConfig,
        extra_columns: Sequence[str],
        is_shard: bool = False,
    ) -> None:
        self._record, self._extra_columns = record, extra_columns
        self._entries: list[tuple[IndexEntry, int, Sequence[int]]] = []
        self._file = PartFile(folder, f"{first:010d}-", hashlib.sha256() if is_shard else None)

    def write(self, entry: IndexEntry, encoded: EncodedRecord) -> None:
        """Append one encoded record."""
        offset, _ = self._file.write(*encoded.pieces)
        self._entries.append((entry, offset, encoded.lengths))

    def close(self) -> Part:
        """Publish the part, then its index."""
        self._file.close()
        part = part_at(self._file.stem)
        table = make_table(self._entries, self._record, self._extra_columns)
        write_index(part.index, table, versions_fact() | self._file.facts, self._file.base)
        return part

    def discard(self) -> None:
        """Close and remove the part."""
        self._file.discard()


def remove_parts(root: str, keep: str | None = None) -> None:
    """Remove the parts of all fingerprints but one from a folder of parts."""
    for folder in storage.list_folders(root):
        if _FINGERPRINT.fullmatch(folder) and folder != keep:
            storage.delete_tree(storage.join(root, folder), storage.dirname(root))


def file_facts(path: str, below: str, hasher: Hasher | None = None) -> dict[str, str]:
    """`RecordFile.facts` of a file that is written."""
    hasher, size = hasher or hashlib.sha256(), 0
    with storage.open_read(path, below) as handle:
        while chunk := handle.read(COPY_BYTES):
            hasher.update(chunk)
            size += len(chunk)
    return {hasher.name: hasher.hexdigest(), "num_bytes": str(size)}


def is_intact(part: Part, facts: Mapping[str, str]) -> bool:
    """Whether the bytes of a part or shard are those that its index describes, by the index's facts.

    Raises:
        FileNotFoundError: it is gone.
    """
    is_hashed, stat = "sha256" in facts, storage.stat(part.data, part.base)
    return _facts_now(part, is_hashed, stat).items() <= facts.items()


@functools.lru_cache(maxsize=256)
def _facts_now(part: Part, is_hashed: bool, _: storage.Stat) -> dict[str, str]:
    """The facts of a file as it is. Each unit of a large shard needs them."""
    return file_facts(part.data, part.base, None if is_hashed else Crc32())


def part_stems(folder: str) -> list[str]:
    """The names, without endings, of the parts in a folder; files of other programs are none."""
    names = map(_INDEX_NAME.fullmatch, storage.list_files(folder, "*.parquet"))
    return [match[1] for match in names if match]


def find_parts(folder: str, positions: range) -> list[Part]:
    """The complete parts of a shard that an earlier attempt left, as far as they concern positions of a unit.

    Not among them are parts that begin after the unit and, of those that begin before it, all but the last:
    each unit of a large shard opens only a few.
    """
    stems = part_stems(folder)
    firsts = {stem: int(stem.partition("-")[0]) for stem in stems if "-" in stem}
    begin = max((first for first in firsts.values() if first <= positions.start), default=0)
    # What a merge has put together has no position in its name, and may hold any.
    found = [stem for stem in stems if begin <= firsts.get(stem, begin) < positions.stop]
    return [part_at(storage.join(folder, stem)) for stem in found]


def find_shard(output: str, name: ShardName, fingerprint: str, index_sha256: str = "") -> Part | None:
    """A finished shard of the same making, if there is one; of this sha256 of its index, if it is given."""
    part = shard_at(output, name)
    try:
        limits = Limits.of_data(part.data, output)
        data = read_bytes(part.index, limits, output)
        if index_sha256 and hashlib.sha256(data).hexdigest() != index_sha256:
            return None
        facts = parse_index(data, part.index, columns=[], limits=limits)[1]
    except (FileNotFoundError, ShardError):
        return None
    return part if facts.get("fingerprint") == fingerprint else None
