"""Part files: written while volumes stream by, found again after a crash.

A part holds some records of one shard, with an index of its own. The index is written after the part
is closed, so a part counts only where its index is there.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, Final

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


class PartFile:
    """A part file that is written one record at a time.

    Args:
        folder: folder of the file.
        prefix: beginning of its name.
        hasher: gets all that is written; None if no hash is needed.

    Attributes:
        stem: its path without ending, unique to this attempt.
        base: OUTPUT or the temporary folder.
        size: bytes written.
    """

    def __init__(self, folder: str, prefix: str = "", hasher: hashlib._Hash | None = None) -> None:
        # Attempts may overlap when a runner retries, so each writes under a name of its own.
        self.stem = storage.join(folder, f"{prefix}{uuid.uuid4().hex}")
        self.base = base_of(self.stem)
        self.size = 0
        self._hasher = hasher
        self._opened = storage.create(self.path, self.base)
        self._handle: BinaryIO = self._opened.__enter__()

    @property
    def path(self) -> str:
        """Where it is once it is closed."""
        return f"{self.stem}{PART_ENDING}"

    def write(self, *pieces: bytes | memoryview) -> tuple[int, int]:
        """Append one encoded record; its offset and length."""
        start = self.size
        with storage.naming(self.path):
            for piece in pieces:
                self._handle.write(piece)
                if self._hasher:
                    self._hasher.update(piece)
                self.size += len(piece)
        return start, self.size - start

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
        self._hasher = hashlib.sha256() if is_shard else None
        self._file = PartFile(folder, f"{first:010d}-", self._hasher)

    def write(self, entry: IndexEntry, encoded: EncodedRecord) -> None:
        """Append one encoded record."""
        offset, _ = self._file.write(*encoded.pieces)
        self._entries.append((entry, offset, encoded.lengths))

    def close(self) -> Part:
        """Publish the part, then its index."""
        self._file.close()
        part = part_at(self._file.stem)
        facts = versions_fact()
        if self._hasher:
            facts |= file_facts(self._hasher.hexdigest(), self._file.size)
        table = make_table(self._entries, self._record, self._extra_columns)
        write_index(part.index, table, facts, self._file.base)
        return part

    def discard(self) -> None:
        """Close and remove the part."""
        self._file.discard()


def remove_parts(root: str, keep: str | None = None) -> None:
    """Remove the parts of all fingerprints but one from a folder of parts."""
    for folder in storage.list_folders(root):
        if _FINGERPRINT.fullmatch(folder) and folder != keep:
            storage.delete_tree(storage.join(root, folder), storage.dirname(root))


def file_facts(sha256: str, num_bytes: int) -> dict[str, str]:
    """The facts that an index stores about the file that it describes."""
    return {"sha256": sha256, "num_bytes": str(num_bytes)}


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
    part = Part(storage.join(output, str(name)), storage.join(output, name.index_file))
    try:
        limits = Limits.of_data(part.data, output)
        data = read_bytes(part.index, limits, output)
        if index_sha256 and hashlib.sha256(data).hexdigest() != index_sha256:
            return None
        facts = parse_index(data, part.index, columns=[], limits=limits)[1]
    except (FileNotFoundError, ShardError):
        return None
    return part if facts.get("fingerprint") == fingerprint else None
