"""Checks of the schema, the page sizes and the values of a Parquet file, before Arrow reads it.

Arrow recurses into schemas of any depth, does not compare pages with the footer, and makes as many values as
a few bytes stand for. Statistics that a column cannot have end the process. Footer and pages begin with
Thrift structs in the compact protocol. Source: parquet.apache.org/docs/file-format, and its parquet.thrift.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from typing import Any, BinaryIO, Final, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_UNCOMPRESSED: Final = 2
_COMPRESSED: Final = 3
_ENCODINGS: Final = {5: 2, 8: 4}  # headers of data pages in that of a page, and their fields of encodings
_DICTIONARY: Final = 7
_NUM_VALUES: Final = 1
_DELTA_BYTE_ARRAY: Final = 7  # encodes a text by how much of the last one begins it: no size shows its length
_MOST: Final = 2**31 - 1  # a size or count is an int32; Arrow takes the low bits of a larger one
_SCHEMA, _ROW_GROUPS = 2, 4  # fields of the footer: the schema, each group before its children; and the rows
_TYPE, _REPETITION, _NUM_CHILDREN = 1, 3, 5
_OPTIONAL, _REPEATED = 1, 2
_BYTE_ARRAY: Final = 6
_INT32: Final = 5
_COLUMNS, _METADATA, _ENCRYPTED, _SIZES = 1, 3, (8, 9), 16
_NUM_TEXT_BYTES, _HISTOGRAMS = 1, (2, 3)  # in the statistics of sizes: of levels of repetition and definition
_MAGIC: Final = b"PAR1"
_END_BYTES: Final = 8  # of the file: the length of the footer, and the magic number
_INTEGERS: Final = frozenset([4, 5, 6])
_BYTES: Final = frozenset([8])
_STRUCT: Final = 12
_STRUCTS: Final = frozenset([_STRUCT])
_LISTS: Final = {
    **dict.fromkeys([(0, _SCHEMA), (0, 4), (0, 5), (0, 7), (1, 1), (1, 4), (3, 8), (3, 13)], _STRUCTS),
    **dict.fromkeys([(3, 2), (4, 2), (4, 3)], _INTEGERS),
    (3, 3): _BYTES,
}
"""Types of the values in a footer's lists, by depth and field. Arrow ignores the type that a list states."""

_MOST_FIELD: Final = 2**15 - 1
_DEEPEST: Final = 8


def require_schema(handle: BinaryIO, deepest: int, most_values: int | None = None) -> None:
    """Refuse a large footer, or one that would end the process.

    These are schemas of more than `deepest` levels, and statistics that a column cannot have.

    `most_values` limits the values of the footer, each of which takes memory.

    Raises:
        ValueError: the file exceeds a limit, or its footer is unusable.
    """
    before = handle.seek(0, io.SEEK_END) - _END_BYTES
    handle.seek(max(before, 0))
    end = handle.read(_END_BYTES)
    size = int.from_bytes(end[:-4], "little")
    if end[-4:] != _MAGIC or size > before:
        return  # which Arrow refuses, and says why
    handle.seek(before - size)
    reader = _Reader(handle.read(size), most_values)
    leaves = list[_Leaf]()
    try:
        for number, kind in reader.fields(0):
            if number == _SCHEMA:
                leaves = _read_leaves(reader.items(kind, 0, number), reader, deepest)
            elif number == _ROW_GROUPS:
                for _ in reader.items(kind, 0, number):
                    _check_group(reader, leaves)
            else:
                reader.skip(kind, 0, number)
    except (IndexError, TypeError) as e:
        raise ValueError(f"its footer is not usable ({e!r})") from e


class _Leaf(NamedTuple):
    """A column: the most levels of repetition and definition, and whether it has texts or bytes."""

    levels: tuple[int, int]
    is_text: bool


def _read_leaves(elements: Iterator[int], reader: _Reader, deepest: int) -> list[_Leaf]:
    unread = list[int]()  # elements of each group that is open
    leaves, repetitions = list[_Leaf](), list[int | None]()
    for _ in elements:
        element = dict[int, Any]()
        for number, kind in reader.fields(1):
            if number not in (_TYPE, _REPETITION, _NUM_CHILDREN):
                reader.skip(kind, 1, number)
            elif kind == _INT32:
                element[number] = reader.value(kind, 1)
            else:  # which Arrow takes for absent
                raise ValueError(f"its schema has a field {number} of type {kind}")
        count = element.get(_NUM_CHILDREN, 0)
        if type(count) is not int or not 0 <= count <= _MOST:
            raise ValueError(f"a group of its schema has {count} elements")
        repetitions[len(unread) :] = [element.get(_REPETITION) if unread else None]  # the root has none
        if not count and _TYPE in element:
            num_repeated = repetitions.count(_REPEATED)
            levels = num_repeated, num_repeated + repetitions.count(_OPTIONAL)
            leaves.append(_Leaf(levels, element[_TYPE] == _BYTE_ARRAY))
        if unread:
            unread[-1] -= 1
        unread.append(count)
        if len(unread) > deepest:
            raise ValueError(f"its columns are nested deeper than the {deepest} levels that they can have")
        while unread and unread[-1] == 0:
            unread.pop()
    return leaves


def _check_group(reader: _Reader, leaves: Sequence[_Leaf]) -> None:
    for number, kind in reader.fields(1):
        if number != _COLUMNS:
            reader.skip(kind, 1, number)
            continue
        for place, _ in enumerate(reader.items(kind, 1, number)):
            for field, inner in reader.fields(2):
                if field in _ENCRYPTED:
                    raise ValueError("a column of it is encrypted")
                if field == _METADATA and inner == _STRUCT:
                    _check_metadata(reader, leaves[place])
                else:
                    reader.skip(inner, 2, field)


def _check_metadata(reader: _Reader, leaf: _Leaf) -> None:
    for number, kind in reader.fields(3):
        if number != _SIZES or kind != _STRUCT:
            reader.skip(kind, 3, number)
            continue
        for field, inner in reader.fields(4):
            if field in _HISTOGRAMS:
                count = 0
                for each in reader.items(inner, 4, field):
                    reader.skip(each, 4, field)
                    count += 1
                is_possible = count in (0, leaf.levels[_HISTOGRAMS.index(field)] + 1)
            else:
                reader.skip(inner, 4, field)
                is_possible = leaf.is_text or field != _NUM_TEXT_BYTES
            if not is_possible:
                raise ValueError("statistics of its sizes are not those of the column")


def read_bounded(
    data: bytes, most: int, groups: Sequence[int] | None = None, columns: Collection[str] | None = None
) -> pa.Table:
    """Read a file whose values take a bounded amount of memory, whatever it states.

    Args:
        data: the file, whose schema is known to be usable (`require_schema`).
        most: bytes that the values of all of its groups may take.
        groups: row groups to read; None reads all.
        columns: columns to read, if the file has them; None reads all.

    Raises:
        ValueError: they take more, or a page does not match the footer.
        ArrowException: it is no Parquet file.
    """
    # By itself, as `read_table` starts threads, which can bring a short process down at its end.
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    texts = _require_values(file.metadata, data, most, columns)
    if texts:
        file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=texts, page_checksum_verification=True)
    groups = range(file.num_row_groups) if groups is None else groups
    names = None if columns is None else [name for name in file.schema_arrow.names if name in columns]
    table = file.read_row_groups(list(groups), columns=names, use_threads=False)
    if texts:
        _require(sum(_text_bytes(chunk) for column in table.columns for chunk in column.chunks), most)
        plain = [field.with_type(_without_dictionary(field.type)) for field in table.schema]
        table = table.cast(pa.schema(plain, table.schema.metadata))
    return table


def _require_values(
    metadata: pq.FileMetaData, data: bytes, most: int, columns: Collection[str] | None
) -> list[str]:
    """Refuse values that take more memory than they may, before they are read.

    Returns:
        Columns of texts that may still do so, where rows repeat a long one.
    """
    total, repeated, texts = 0, 0, set[str]()
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        # An empty one, which has no pages, is not read.
        for number in range(group.num_columns if group.num_rows else 0):
            column = group.column(number)
            if columns is not None and column.path_in_schema.partition(".")[0] not in columns:
                continue
            encodings = require_said_sizes(data, column)
            size, count = column.total_uncompressed_size, column.num_values
            if _DELTA_BYTE_ARRAY in encodings:
                size *= count
            elif column.physical_type == "FIXED_LEN_BYTE_ARRAY":
                size = max(size, count * metadata.schema.column(number).length)
            elif column.physical_type == "BYTE_ARRAY" and column.has_dictionary_page:
                repeated += count * size
                texts.add(column.path_in_schema)
            total += max(size, 8 * count)
    _require(total, most)
    return sorted(texts) if repeated > most else []


def _require(num_bytes: int, most: int) -> None:
    if num_bytes > most:
        raise ValueError(f"has {num_bytes:,} bytes of values, more than it can have")


def _text_bytes(array: pa.Array) -> int:
    """What the texts of an array take that were read as numbers of those that differ."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(array.dictionary).take(array.indices)
        return pc.sum(lengths).as_py() or 0
    if pa.types.is_struct(kind):
        return sum(map(_text_bytes, array.flatten()))
    if pa.types.is_map(kind):
        return _text_bytes(array.keys) + _text_bytes(array.items)
    return _text_bytes(array.flatten()) if pa.types.is_nested(kind) else 0


def _without_dictionary(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(_without_dictionary(kind.value_type))
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def require_said_sizes(data: bytes, column: Any) -> set[int]:
    """Compare the pages of a column chunk with its entry in the footer.

    Args:
        data: the file.
        column: `pyarrow.parquet.ColumnChunkMetaData`.

    Returns:
        The encodings of its data pages, by their numbers.

    Raises:
        ValueError: the pages hold more bytes or values than stated, or are not where they should be.
    """
    at = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset is not None:
        at = min(at, column.dictionary_page_offset)
    end = at + column.total_compressed_size
    num_bytes = num_values = 0
    encodings = set[int]()
    try:
        if at <= 0:
            raise ValueError(f"it is at offset {at}")
        reader = _Reader(data, at=at)
        while reader.at < end:
            header = reader.struct(0)
            _require_sizes(header)
            reader.at += header[_COMPRESSED]
            num_bytes += header[_UNCOMPRESSED]
            for page in header.keys() & _ENCODINGS.keys():
                num_values += header[page][_NUM_VALUES]
                encodings.add(header[page][_ENCODINGS[page]])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"a page of column {column.path_in_schema} has no usable header ({e!r})") from e
    if num_bytes > column.total_uncompressed_size or num_values > column.num_values:
        raise ValueError(f"pages of column {column.path_in_schema} hold more than its metadata gives")
    return encodings


def _require_sizes(header: dict[int, Any]) -> None:
    """Refuse impossible sizes and counts: Arrow adds them up, or allocates memory for them."""
    pages = [header[page] for page in (*_ENCODINGS, _DICTIONARY) if page in header]
    numbers = [n for page in pages for n in page.values() if isinstance(n, int)]
    for number in (header[_UNCOMPRESSED], header[_COMPRESSED], *numbers):
        if not 0 <= number <= _MOST:
            raise ValueError(f"a size or count is {number}")
    num_values = header.get(_DICTIONARY, {}).get(_NUM_VALUES, 0)
    if num_values > header[_UNCOMPRESSED]:  # a value takes a byte or more
        raise ValueError(f"a dictionary has {num_values} values in {header[_UNCOMPRESSED]} bytes")


class _Reader:
    """Reads at most `most` Thrift values one after the other, without keeping those that are skipped."""

    def __init__(self, data: bytes, most: int | None = None, at: int = 0) -> None:
        self._data, self._left, self.at = data, most, at

    def struct(self, depth: int) -> dict[int, Any]:
        """The fields of a struct, by their numbers."""
        return {number: self.value(kind, depth) for number, kind in self.fields(depth)}

    def fields(self, depth: int) -> Iterator[tuple[int, int]]:
        """Number and type of each field of a struct.

        The caller reads or skips its value before the next field.
        """
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply")
        seen, number = set[int](), 0
        while kind := self._byte():
            number = number + (kind >> 4) if kind >> 4 else self._integer()
            if number in seen or not 0 <= number <= _MOST_FIELD:  # Arrow takes the low bits, and the last one
                raise ValueError(f"field {number} is out of range or occurs twice")
            seen.add(number)
            self._count()
            yield number, kind & 15

    def items(self, kind: int, depth: int, number: int) -> Iterator[int]:
        """The type of each value of a list. The caller reads or skips the value before the next one."""
        head = self._byte()
        size, inner = head >> 4, head & 15
        if size == 15:
            size = self._varint()
        if kind != 9 or inner not in _LISTS.get((depth, number), ()):
            raise ValueError(f"it has a field {number} of type {kind}, of {inner}")
        for _ in range(size):
            self._count()
            yield inner

    def skip(self, kind: int, depth: int, number: int) -> None:
        """Pass over a value of a field."""
        if kind == _STRUCT:
            for inner_number, inner in self.fields(depth + 1):
                self.skip(inner, depth + 1, inner_number)
        elif kind == 9:
            for inner in self.items(kind, depth, number):
                self.skip(inner, depth, number)
        else:
            self.value(kind, depth)

    def value(self, kind: int, depth: int) -> Any:
        """A value that is not a list."""
        match kind:
            case 1 | 2:  # true, false
                return kind == 1
            case 3:
                return self._byte()
            case 4 | 5 | 6:  # integers of 16, 32 and 64 bits
                return self._integer()
            case 7:
                self.at += 8
                return None
            case 8:  # bytes
                size = self._varint()
                self.at += size
                return None
            case 12:
                return self.struct(depth + 1)
        raise ValueError(f"it has a field of type {kind}")

    def _count(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise ValueError("its footer has more values than it can need")

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("it has a number of more than 64 bits")
