"""What the pages of a Parquet file say of their sizes, which Arrow does not compare with the file's footer.

A page's header is a Thrift struct in the compact protocol. Source: parquet.apache.org/docs/file-format.
"""

from __future__ import annotations

from typing import Any, Final

from beam_nifti.errors import ShardError

_UNCOMPRESSED: Final = 2
_COMPRESSED: Final = 3
_DATA_PAGES: Final = (5, 8)
"""Fields of a page's header: two sizes, and what is said of a data page of version 1 or 2."""

_DICTIONARY: Final = 7
_NUM_VALUES: Final = 1
_MOST: Final = 2**31 - 1
"""A size or count is an int32; Arrow takes the low bits of a larger one."""

_MOST_FIELD: Final = 2**15 - 1
_DEEPEST: Final = 8


def require_said_sizes(data: bytes, column: Any) -> None:
    """Compare the pages of a column chunk with what the footer says of it.

    Args:
        data: the file.
        column: `pyarrow.parquet.ColumnChunkMetaData`.

    Raises:
        ShardError: its pages hold more bytes or values, or are not where they should be.
    """
    at = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset is not None:
        at = min(at, column.dictionary_page_offset)
    end = at + column.total_compressed_size
    num_bytes = num_values = 0
    try:
        if at <= 0:
            raise ValueError(f"it is at offset {at}")
        while at < end:
            header, at = _struct(data, at)
            _require_sizes(header)
            at += header[_COMPRESSED]
            num_bytes += header[_UNCOMPRESSED]
            num_values += sum(header[page][_NUM_VALUES] for page in _DATA_PAGES if page in header)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        raise ShardError(f"a page of column {column.path_in_schema} has no usable header ({e!r})") from e
    if num_bytes > column.total_uncompressed_size or num_values > column.num_values:
        raise ShardError(f"pages of column {column.path_in_schema} hold more than the file says")


def _require_sizes(header: dict[int, Any]) -> None:
    """Refuse sizes and counts that none can be: Arrow adds them up, or makes room for so many."""
    pages = [header[page] for page in (*_DATA_PAGES, _DICTIONARY) if page in header]
    numbers = [n for page in pages for n in page.values() if isinstance(n, int)]
    for number in (header[_UNCOMPRESSED], header[_COMPRESSED], *numbers):
        if not 0 <= number <= _MOST:
            raise ValueError(f"a size or count is {number}")
    num_values = header.get(_DICTIONARY, {}).get(_NUM_VALUES, 0)
    if num_values > header[_UNCOMPRESSED]:  # a value takes a byte or more
        raise ValueError(f"a dictionary has {num_values} values in {header[_UNCOMPRESSED]} bytes")


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """The fields of a struct, by their numbers, and where it ends."""
    if depth > _DEEPEST:
        raise ValueError("it is nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    while kind := data[at]:
        at += 1
        if kind >> 4:
            number += kind >> 4
        else:
            number, at = _integer(data, at)
        if number in fields or not 0 <= number <= _MOST_FIELD:  # Arrow takes the low bits, and the last one
            raise ValueError(f"it has field {number}, or has it twice")
        fields[number], at = _value(data, at, kind & 15, depth)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    match kind:
        case 1 | 2:  # true, false
            return kind == 1, at
        case 3:
            return data[at], at + 1
        case 4 | 5 | 6:  # integers of 16, 32 and 64 bits
            return _integer(data, at)
        case 7:
            return None, at + 8
        case 8:  # bytes
            size, at = _varint(data, at)
            return None, at + size
        case 12:
            return _struct(data, at, depth + 1)
    raise ValueError(f"it has a field of type {kind}")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("it has a number of more than 64 bits")
