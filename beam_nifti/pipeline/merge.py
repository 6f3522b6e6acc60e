"""Merging the parts of a shard into its file."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.config import RecordConfig
from beam_nifti.errors import OutputError, PartsChangedError, ShardError
from beam_nifti.pipeline.parts import (
    COPY_BYTES,
    PART_ENDING,
    Crc32,
    Part,
    RecordFile,
    file_facts,
    is_intact,
    part_at,
    shard_at,
)
from beam_nifti.record.dataset_info import ShardInfo
from beam_nifti.record.index import Limits, parse_index, read_index, schema_of, write_index
from beam_nifti.record.sharding import ShardName
from beam_nifti.record.tfrecord import EMPTY_MEMBER
from beam_nifti.record.versions import versions_fact, versions_in
from beam_nifti.storage import paths as storage


@dataclass(frozen=True)
class ShardMerge:
    """The merge of parts into a finished shard, in the order of positions.

    Doing it again with the same parts gives the same result, also when they are gone by then, and also
    while another attempt, which the runner gave up too early, is still at it.

    Attributes:
        output: folder of the dataset.
        name: the shard's file name.
        expected: the positions that the shard must hold.
        parts: what was written or found; several may hold the same position, with the same bytes.
        record: configuration that made the records.
        extra_columns: names of the manifest's extra columns.
        folder: `parts_folder` of the shard.
    """

    output: str
    name: ShardName
    expected: Collection[int]
    parts: Iterable[Part]
    record: RecordConfig
    extra_columns: Sequence[str]
    folder: str

    def run(self) -> ShardInfo:
        """Write the shard and its index.

        Raises:
            PartsChangedError: the parts do not hold exactly the expected positions.
            OutputError: records of a damaged shard would be copied.
        """
        parts = _joined(self.parts)
        try:
            return self._run(parts)
        except FileNotFoundError:
            # Another attempt was faster: it has removed the parts, as their records are in the shard.
            return self._run(parts)

    def _run(self, parts: list[Part]) -> ShardInfo:
        name, target = self.name, shard_at(self.output, self.name)
        spare = part_at(storage.join(self.folder, hashlib.sha256(repr(parts).encode()).hexdigest()))
        present = [part for part in parts if storage.exists(part.index)]
        if len(present) < len(parts):
            # An earlier attempt removed them once their records were in the shard, or in its spare.
            held = tuple(sorted(self.expected))
            present += [replace(p, positions=held) for p in (spare, target) if storage.exists(p.index)]
        records = self._select(present)
        if any(part.data == target.data for part in records.sources) and not _whole_file(records):
            # Between losing its index and getting the next one, a shard could not be found again.
            _write_part(spare, records, name.compressed)
            records = self._select([spare])
        source = _whole_file(records)
        known = records.facts[source.data] if source else {}
        kept = _shard_of(source) if source else None
        if kept is not None and kept.is_same_place(name):
            name, facts = kept, known  # unchanged: it keeps its file
        else:
            if source is None:
                self._refuse_damaged(records)
            facts = self._finished(records) or self._write(records, source, known)
        for part in (*parts, spare):
            # Another shard may need a part that an earlier build wrote for other shards.
            if part.data.endswith(PART_ENDING) and part.data not in records.shared:
                storage.delete(part.index, part.base)
                storage.delete(part.data, part.base)
        return describe_shard(self.output, name, len(self.expected), facts)

    def _refuse_damaged(self, records: _Records) -> None:
        """Refuse to copy from a shard that has changed, as the copy would have a sha256 that matches."""
        target = shard_at(self.output, self.name)
        for part in {*records.sources}:
            # The target may be replaced by another attempt, and parts were checked when they were found.
            is_shard = part.data != target.data and not part.data.endswith(PART_ENDING)
            if is_shard and not is_intact(part, records.facts[part.data]):
                raise OutputError(
                    f"{part.data}: is damaged, so no records of it are copied; use --recheck, which makes "
                    "all of them from their images"
                )

    def _select(self, parts: Sequence[Part]) -> _Records:
        schema = schema_of(self.record, self.extra_columns)
        return _select(parts, self.expected, self.name, schema)

    def _finished(self, records: _Records) -> dict[str, str] | None:
        """What is known of the shard if another attempt at this merge has written it."""
        target = shard_at(self.output, self.name)
        try:
            limits = Limits.of_data(target.data, self.output)
            table, facts = read_index(target.index, limits=limits, below=self.output)
            is_same = self._making(records).items() <= facts.items()
            same_rows = is_same and table.replace_schema_metadata().equals(_placed(records))
            return facts if same_rows and is_intact(target, facts) else None
        except (FileNotFoundError, ShardError):
            return None

    def _making(self, records: _Records) -> dict[str, str]:
        return {"fingerprint": self.record.fingerprint, **_versions_of(records)}

    def _write(self, records: _Records, source: Part | None, known: dict[str, str]) -> dict[str, str]:
        target = shard_at(self.output, self.name)
        facts = self._making(records)
        try:
            facts |= _write_shard(target, self.output, records, source, known, self.name.compressed)
        except FileNotFoundError:
            # Another attempt has removed the parts, so its shard is whole, and we its index.
            facts |= _facts_of_data(target, records)
        write_index(target.index, _placed(records), facts, self.output)
        return facts


def write_shard(
    output: str, name: ShardName, table: pa.Table, files: Sequence[str], fingerprint: str
) -> ShardInfo:
    """Write a shard of records that are anywhere in part files, and its index.

    Doing it again gives the same bytes, also while another attempt is still at it. No published dataset has
    the name. The table is the index of the records in their order, and `files` the part file of each.
    """
    records = _Records(table, [Part(file, "") for file in files], {}, frozenset())
    target = shard_at(output, name)
    facts = {"fingerprint": fingerprint, **versions_fact()}
    facts |= _write_shard(target, output, records, None, {}, name.compressed)
    write_index(target.index, _placed(records), facts, output)
    return describe_shard(output, name, table.num_rows, facts)


def describe_shard(output: str, name: ShardName, num_examples: int, facts: dict[str, str]) -> ShardInfo:
    """A shard whose file and index are written.

    Raises:
        OutputError: no reader would accept the index.
    """
    path, num_bytes = storage.join(output, name.index_file), int(facts["num_bytes"])
    index = storage.read(path, output)
    try:
        parse_index(index, path, limits=Limits(num_examples, num_bytes))
    except ShardError as e:
        raise OutputError(
            f"{e}; no reader would accept it: drop or shorten the manifest's largest columns, and use "
            "--overwrite"
        ) from e
    return ShardInfo(
        name=str(name),
        index=name.index_file,
        num_examples=num_examples,
        num_bytes=num_bytes,
        sha256=facts["sha256"],
        index_sha256=hashlib.sha256(index).hexdigest(),
    )


def keep_if_same(output: str, published: ShardName, made: ShardInfo) -> ShardInfo:
    """The published shard, if its file and its index hold what was just made; else the one that was made.

    Both files are read again, so a damaged one does not stay.
    """
    name = ShardName.parse(made.name)
    if name is None or not name.is_same_place(published):
        return made
    try:
        index = storage.read(storage.join(output, made.index), output)
        is_same = storage.holds(storage.join(output, published.index_file), index, output)
        if not is_same or file_facts(storage.join(output, str(published)), output)["sha256"] != made.sha256:
            return made
    except FileNotFoundError:
        return made
    return replace(made, name=str(published), index=published.index_file)


def count_differing(output: str, published: ShardName, made: ShardInfo) -> tuple[int, int]:
    """How many records of a published shard were rebuilt, and how many of them differ."""
    new = Part(storage.join(output, made.name), storage.join(output, made.index))
    old = shard_at(output, published)
    if old == new:
        return made.num_examples, 0
    try:
        before, after = _extents_of(old), _extents_of(new)
        common = before.keys() & after.keys()
        same = [
            p
            for p in common
            # What anybody may have written is not read where its length tells the difference.
            if before[p][1] == after[p][1] and _bytes_at(old, *before[p]) == _bytes_at(new, *after[p])
        ]
    except (FileNotFoundError, ShardError):  # nothing is left of it to be the same
        return made.num_examples, made.num_examples
    return len(common), len(common) - len(same)


def _extents_of(part: Part) -> dict[int, tuple[int, int]]:
    """Offset and length of each record, by position; of those that the file cannot have, of no bytes.

    Raises:
        ShardError: the index has no such numbers.
    """
    limits = Limits.of_data(part.data, part.base)
    names = ["position", "offset", "length"]
    table, _ = read_index(part.index, columns=names, limits=limits, below=part.base)
    kinds = {field.name: field.type for field in table.schema}
    if kinds != dict.fromkeys(names, pa.int64()) or any(column.null_count for column in table.columns):
        raise ShardError(f"{part.index}: not an index: {', '.join(names)} are not all numbers")
    return {
        position: (offset, length)
        if 0 <= offset <= limits.data_bytes - length < limits.data_bytes
        else (0, 0)
        for position, offset, length in zip(*(table[name].to_pylist() for name in names), strict=True)
    }


def _bytes_at(part: Part, offset: int, length: int) -> bytearray:
    buffer = bytearray(length)
    return buffer[: storage.read_into(part.data, offset, memoryview(buffer), part.base)]


def _joined(parts: Iterable[Part]) -> list[Part]:
    """One part a file, in a fixed order: the units of a shard each name what they found in it."""
    joined: dict[str, Part] = {}
    for part in parts:
        known = joined.setdefault(part.data, part)
        if known.positions is not None and part.positions is not None:
            positions = tuple(sorted({*known.positions, *part.positions}))
            joined[part.data] = replace(part, positions=positions)
        else:
            joined[part.data] = replace(part, positions=None)
    return [joined[data] for data in sorted(joined)]


def _write_part(part: Part, records: _Records, compressed: bool) -> None:
    with storage.create(part.data, part.base) as handle:
        file = RecordFile(handle, Crc32())
        for chunk in _content(records, compressed):
            file.write(chunk)
    write_index(part.index, _placed(records), _versions_of(records) | file.facts, part.base)


def _versions_of(records: _Records) -> dict[str, str]:
    files = {part.data for part in records.sources}
    return versions_fact(v for data in files for v in versions_in(records.facts[data]))


def _shard_of(part: Part) -> ShardName | None:
    return ShardName.parse(part.data.rpartition("/")[2])


@dataclass(frozen=True)
class _Records:
    """Records in the order of their positions.

    Attributes:
        table: their index.
        sources: the part that holds each of them.
        facts: metadata of the index of each part, by the path of the part.
        shared: paths of parts that also hold records of other shards.
    """

    table: pa.Table
    sources: list[Part]
    facts: dict[str, dict[str, str]]
    shared: frozenset[str]


def _select(parts: Sequence[Part], expected: Collection[int], name: ShardName, schema: pa.Schema) -> _Records:
    tables, facts, shared = [], {}, set[str]()
    numbers = pa.array(sorted(expected), pa.int64())
    for part in parts:
        table, facts[part.data] = read_index(part.index, below=part.base)
        if not pc.all(pc.is_in(table["position"], numbers), min_count=0).as_py():
            shared.add(part.data)
        if part.positions is not None:
            table = table.filter(pc.is_in(table["position"], pa.array(part.positions, pa.int64())))
        tables.append(table.replace_schema_metadata())
    merged = pa.concat_tables([schema.empty_table(), *tables])
    part_numbers = np.repeat(np.arange(len(parts)), [table.num_rows for table in tables])
    positions = merged["position"].to_numpy()
    order = np.argsort(positions, kind="stable")  # of a position that several parts hold, the first part's
    order = order[np.diff(positions[order], prepend=-1) != 0]
    found, wanted = positions[order], np.array(sorted(expected), np.int64)
    if not np.array_equal(found, wanted):
        missing = np.setdiff1d(wanted, found)[:5].tolist()
        surplus = np.setdiff1d(found, wanted)[:5].tolist()
        wrong = {"missing": missing, "superfluous": surplus}
        listed = " and ".join(f"positions {numbers} are {what}" for what, numbers in wrong.items() if numbers)
        raise PartsChangedError(f"{name}: {listed}; run the build again")
    if not np.array_equal(order, np.arange(len(positions))):  # as a rule, and then nothing is copied
        merged = merged.take(pa.array(order))
    sources = [parts[number] for number in part_numbers[order].tolist()]
    return _Records(merged, sources, facts, frozenset(shared))


def _whole_file(records: _Records) -> Part | None:
    """The one file whose content, as it is, is these records."""
    sources = {part.data: part for part in records.sources}  # a part's own hash takes all its positions
    if len(sources) != 1:
        return None
    end = 0
    for offset, length in _extents(records):
        if offset != end:
            return None
        end += length
    (source,) = sources.values()
    return source if storage.stat(source.data, source.base).size == end else None


def _extents(records: _Records) -> Iterator[tuple[int, int]]:
    table = records.table
    return zip(table["offset"].to_pylist(), table["length"].to_pylist(), strict=True)


def _placed(records: _Records) -> pa.Table:
    """The index of the records in the order of the shard."""
    ends = itertools.accumulate((length for _, length in _extents(records)), initial=0)
    offsets = pa.array(list(ends)[:-1], pa.int64())
    column = records.table.schema.get_field_index("offset")
    return records.table.set_column(column, "offset", offsets)


def _write_shard(
    target: Part, output: str, records: _Records, source: Part | None, known: dict[str, str], compressed: bool
) -> dict[str, str]:
    """Write the shard's file; its sha256 and its size."""
    if source:
        # It is published without a copy. It is read to be hashed if it was not written to be a whole shard:
        # the rows that fill it may have failed in the other parts.
        is_hashed = "sha256" in known
        facts = (
            {k: known[k] for k in ("sha256", "num_bytes")}
            if is_hashed
            else file_facts(source.data, source.base)
        )
        _remove_other_index(target, output, facts)
        storage.link(source.data, target.data, output, source.base)
        return facts
    with storage.create(target.data, output) as handle:
        file = RecordFile(handle)
        for chunk in _content(records, compressed):
            file.write(chunk)
        _remove_other_index(target, output, file.facts)
    return file.facts


def _remove_other_index(shard: Part, output: str, facts: dict[str, str]) -> None:
    """Remove an index that does not describe the file that the shard is about to get.

    That of another attempt does, and may already be part of a dataset.
    """
    try:
        is_same = facts.items() <= read_index(shard.index, columns=[], below=output)[1].items()
    except FileNotFoundError:
        return
    except ShardError:
        is_same = False
    if not is_same:
        storage.delete(shard.index, output)


def _facts_of_data(shard: Part, records: _Records) -> dict[str, str]:
    facts = file_facts(shard.data, shard.base)
    if facts["num_bytes"] != str(sum(length for _, length in _extents(records))):
        removed = f"{shard.data}: its parts were removed while they were merged"
        raise PartsChangedError(f"{removed}; run the build again")
    return facts


def _content(records: _Records, compressed: bool) -> Iterator[bytes]:
    if not records.sources and compressed:
        yield EMPTY_MEMBER
    by_file = itertools.groupby(
        zip(records.sources, _extents(records), strict=True), key=lambda record: record[0]
    )
    for part, run in by_file:
        with storage.open_read(part.data, part.base) as handle:
            for start, stop in _runs(extent for _, extent in run):
                handle.seek(start)
                while start < stop:
                    chunk = handle.read(min(COPY_BYTES, stop - start))
                    if not chunk:
                        raise PartsChangedError(f"{part.data}: ends before byte {stop}; run the build again")
                    start += len(chunk)
                    yield chunk


def _runs(extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join extents that touch: (offset, length) to (start, stop)."""
    start = stop = -1
    for offset, length in extents:
        if offset != stop:
            if start >= 0:
                yield start, stop
            start = offset
        stop = offset + length
    if start >= 0:
        yield start, stop
