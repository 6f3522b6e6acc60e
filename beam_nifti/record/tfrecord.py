"""TFRecord framing, CRCs and gzip members, without TensorFlow.

A record is `length (uint64) | masked CRC32C of the length | payload | masked CRC32C of the payload`,
all little-endian; a compressed shard is a chain of gzip members, one a record.
Source: docs/format.md, "Shards".
"""

from __future__ import annotations

import gzip
import struct
from typing import Final

import deflate
import google_crc32c
import numpy as np
from isal import isal_zlib

from beam_nifti.errors import ShardError
from beam_nifti.volume.compression import DEFLATE_RATIO

_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")
_GZIP_FOOTER = struct.Struct("<II")
_MASK_DELTA: Final = 0xA282EAD8
_GZIP_WBITS: Final = 31

HEADER_BYTES: Final = 12
FOOTER_BYTES: Final = 4
EMPTY_MEMBER: Final = gzip.compress(b"", mtime=0)
"""A gzip member of nothing: the file of a compressed shard without records."""

_MOST_PAYLOAD: Final = 1 << 31
"""Where nothing better is known: more than any Example has."""

_LENGTH_BYTES: Final = 8

_FREE_STORED_BYTES: Final = 64 << 10
_STORED_RATIO: Final = 2
"""What a record may take in its file: so much, and so many times its payload. No compression adds as much."""


def _masked_crc(data: bytes | memoryview) -> bytes:
    # The library takes no memoryview, but arrays; neither way are the bytes copied.
    crc = google_crc32c.value(np.frombuffer(data, np.uint8) if isinstance(data, memoryview) else data)
    return _CRC.pack((((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF)


def is_record_header(head: bytes) -> bool:
    """Whether HEADER_BYTES bytes are a length with its checksum, as an uncompressed record begins."""
    return len(head) == HEADER_BYTES and _masked_crc(head[:_LENGTH_BYTES]) == head[_LENGTH_BYTES:]


def frame(payload: bytes) -> tuple[bytes, bytes, bytes]:
    """The three pieces of a record: header, the payload itself (not copied), footer."""
    length = _LENGTH.pack(len(payload))
    return length + _masked_crc(length), payload, _masked_crc(payload)


def encode_pieces(payload: bytes, level: int | None) -> tuple[bytes, ...]:
    """One framed record, as one gzip member, in pieces to be written one after the other.

    Args:
        payload: a serialized Example.
        level: igzip level 0 to 3; None for an uncompressed shard, whose payload is not copied.

    Returns:
        The bytes of the record; equal for equal arguments (the member's header holds no time).
    """
    pieces = frame(payload)
    if level is None:
        return pieces
    packer = isal_zlib.compressobj(level, wbits=_GZIP_WBITS)
    # The payload goes in at one go: where igzip's input is cut, its output may differ.
    return (*map(packer.compress, pieces), packer.flush())


def encode_record(payload: bytes, level: int | None) -> bytes:
    """One framed record in one piece; else as `encode_pieces`."""
    return b"".join(encode_pieces(payload, level))


def decode_record(data: bytes, compressed: bool, most: int = _MOST_PAYLOAD) -> bytes:
    """The payload of one record, after checking its gzip checksum and both CRCs.

    Args:
        data: the record's bytes, exactly, as an index locates them.
        compressed: whether they are a gzip member.
        most: bytes that the payload has at most.

    Raises:
        ShardError: the bytes are truncated, damaged, or hold more than one record.
    """
    return bytes(decode_buffer(memoryview(data), compressed, most))


def require_stored_size(size: int, most: int) -> None:
    """Refuse a record that takes more bytes in its file than its payload can need, before they are read.

    Args:
        size: as the index has it.
        most: bytes that the payload has at most.

    Raises:
        ShardError: it takes more.
    """
    if size > (bound := _FREE_STORED_BYTES + _STORED_RATIO * most):
        raise ShardError(f"is said to take {size:,} bytes, and can take at most {bound:,}")


def decode_buffer(data: memoryview, compressed: bool, most: int = _MOST_PAYLOAD) -> memoryview:
    """As `decode_record`, without a copy.

    Args:
        data: the record's bytes, exactly, as an index locates them.
        compressed: whether they are a gzip member.
        most: as `decode_record`.

    Returns:
        A part of `data`; where that is compressed, of memory of its own, which may be written to.

    Raises:
        ShardError: as `decode_record`.
    """
    if compressed:
        data = _inflate(data, most + HEADER_BYTES + FOOTER_BYTES)
    if len(data) < HEADER_BYTES + FOOTER_BYTES:
        raise ShardError(f"record is truncated: {len(data)} bytes")
    if _masked_crc(data[:_LENGTH_BYTES]) != data[_LENGTH_BYTES:HEADER_BYTES]:
        raise ShardError("the CRC of the record's length does not match")
    size, held = _LENGTH.unpack_from(data)[0], len(data) - HEADER_BYTES - FOOTER_BYTES
    if held != size:
        raise ShardError(f"record says {size} bytes, and holds {held}")
    payload = data[HEADER_BYTES:-FOOTER_BYTES]
    if _masked_crc(payload) != data[-FOOTER_BYTES:]:
        raise ShardError("the CRC of the record's payload does not match")
    return payload


def _inflate(member: memoryview, most: int) -> memoryview:
    """What a gzip member holds: libdeflate needs three quarters of igzip's time, and all of it in memory."""
    bounds = ShardError("gzip member is truncated, or its bounds are wrong")
    if len(member) < _GZIP_FOOTER.size:
        raise bounds
    checksum, size = _GZIP_FOOTER.unpack_from(member, len(member) - _GZIP_FOOTER.size)
    if not 0 < size <= DEFLATE_RATIO * len(member):
        raise bounds
    if size > most:
        raise ShardError(f"gzip member holds {size:,} bytes, and the record has at most {most:,}")
    try:
        content = deflate.gzip_decompress(member, size)
    except deflate.DeflateError as e:
        raise ShardError(f"gzip member is damaged ({e})") from e
    # What follows a member is passed over; but then this is not its own checksum.
    if len(content) != size or isal_zlib.crc32(content) != checksum:
        raise bounds
    return memoryview(content)
