"""TFRecord framing, CRCs and gzip members, without TensorFlow.

A record is `length (uint64) | masked CRC32C of the length | payload | masked CRC32C of the payload`,
all little-endian; a compressed shard is a chain of gzip members, one or several per record. If a record has
several, the header of each gives its length. Source: docs/format.md, "Shards".
"""

from __future__ import annotations

import gzip
import itertools
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import deflate
import google_crc32c
import numpy as np
from isal import igzip_lib, isal_zlib

from beam_nifti.errors import ShardError
from beam_nifti.volume.compression import DEFLATE_RATIO, Bytes, compress_gzip, make_buffer

_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")
_SIZE = struct.Struct("<I")
_GZIP_FOOTER = struct.Struct("<II")
_MASK_DELTA: Final = 0xA282EAD8

HEADER_BYTES: Final = 12
FOOTER_BYTES: Final = 4
EMPTY_MEMBER: Final = gzip.compress(b"", mtime=0)
"""An empty gzip member: the file of a compressed shard without records."""

TILE_BYTES: Final = 72 << 10
"""Bytes that a member of voxels holds, approximately. Measured in docs/adr/0022-members.md."""

_MEMBER_HEAD: Final = struct.Struct("<10sH2sHI")
_MEMBER_START: Final = _MEMBER_HEAD.pack(b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff", 8, b"BN", 4, 0)[:-4]
"""The beginning of each of several members, before its length: RFC 1952 with one extra field, and no time."""

_GZIP_HEAD_BYTES: Final = 10
"""Bytes of a member's header without an extra field, as igzip writes it."""

_MOST_PAYLOAD: Final = 1 << 31
"""The limit if no better one is known: more than any Example has."""

_LENGTH_BYTES: Final = 8
_WRONG_BOUNDS: Final = "gzip member is truncated, or its bounds are wrong"

_FREE_MEMBERS: Final = 16
"""Members that any record may have, besides two for each TILE_BYTES."""

_FREE_STORED_BYTES: Final = 64 << 10
_STORED_RATIO: Final = 2
"""Bytes that a record may take in its file: a constant, and a multiple of its payload. No compression adds
as much."""


@dataclass(frozen=True, slots=True)
class EncodedRecord:
    """A record, encoded to be written.

    Attributes:
        pieces: bytes of the record, to be written one after the other.
        lengths: bytes of each member; in an uncompressed record, bytes between the cuts.
    """

    pieces: tuple[bytes | memoryview, ...]
    lengths: tuple[int, ...]


def _masked_crc(*pieces: Bytes) -> bytes:
    crc = 0
    for piece in pieces:
        # The library takes no memoryview, but arrays; neither way are the bytes copied.
        data = np.frombuffer(piece, np.uint8) if isinstance(piece, memoryview) else piece
        crc = google_crc32c.extend(crc, data)
    return _CRC.pack((((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF)


def is_record_header(head: bytes) -> bool:
    """Whether HEADER_BYTES bytes are a length with its checksum, as an uncompressed record begins."""
    return len(head) == HEADER_BYTES and _masked_crc(head[:_LENGTH_BYTES]) == head[_LENGTH_BYTES:]


def payload_of(framed: memoryview) -> memoryview:
    """The payload of a record, some of whose bytes may not have been read: only its length is checked.

    Raises:
        ShardError: the length is damaged, or does not match.
    """
    size = len(framed) - HEADER_BYTES - FOOTER_BYTES
    head = bytes(framed[:HEADER_BYTES])
    if size < 0 or not is_record_header(head) or _LENGTH.unpack_from(head)[0] != size:
        raise ShardError(f"its members do not hold a record of {max(size, 0)} bytes")
    return framed[HEADER_BYTES:-FOOTER_BYTES]


def encode_members(
    payload: Sequence[Bytes],
    level: int | None,
    cuts: Sequence[int] = (),
    known: Mapping[int, bytes] = MappingProxyType({}),
) -> EncodedRecord:
    """Frame a record, and compress it to one or several gzip members.

    Args:
        payload: a serialized Example, in any number of pieces.
        level: igzip level 0 to 3; None for an uncompressed shard, whose payload is not copied.
        cuts: offsets in the payload at which members begin, ascending; empty for a single member.
        known: members that are already compressed, by their numbers.

    Returns:
        The record. Equal arguments give equal bytes, however the payload is divided.
    """
    size = sum(map(len, payload))
    length = _LENGTH.pack(size)
    header, footer = length + _masked_crc(length), _masked_crc(*payload)
    bounds = [0, *(HEADER_BYTES + cut for cut in cuts), HEADER_BYTES + size + FOOTER_BYTES]
    sizes = [end - start for start, end in itertools.pairwise(bounds)]
    if level is None:
        return EncodedRecord((header, *payload, footer), tuple(sizes))
    if not cuts:
        # igzip's bytes depend on where its input is divided.
        packed = tuple(compress_gzip((header, _joined(payload), footer), level))
        return EncodedRecord(packed, (sum(map(len, packed)),))
    members, lengths = list[bytes](), list[int]()
    for number, content in enumerate(_divided((header, *payload, footer), sizes)):
        if number in known:
            members.append(known[number])
            lengths.append(len(known[number]))
            continue
        head, *rest = compress_gzip((_joined(content),), level)
        head = head[_GZIP_HEAD_BYTES:]
        lengths.append(_MEMBER_HEAD.size + len(head) + sum(map(len, rest)))
        members += [_MEMBER_START + _SIZE.pack(lengths[-1]), head, *rest]
    return EncodedRecord(tuple(members), tuple(lengths))


def _joined(pieces: Sequence[Bytes]) -> Bytes:
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _divided(pieces: Iterable[Bytes], sizes: Iterable[int]) -> Iterator[list[Bytes]]:
    """The same bytes in lists of pieces that have so many bytes each."""
    left = iter(pieces)
    piece = memoryview(b"")
    for size in sizes:
        part = list[Bytes]()
        while size:
            piece = piece or memoryview(next(left))
            part.append(piece[:size])
            size, piece = size - len(part[-1]), piece[size:]
        yield part


def decode_record(data: bytes, compressed: bool, most: int = _MOST_PAYLOAD) -> bytes:
    """The payload of one record, after checking its gzip checksum and both CRCs.

    Unlike `decode_buffer`, it refuses bytes after a gzip member, which other programs read as another member.

    Args:
        data: exactly the record's bytes, as an index locates them.
        compressed: whether they are gzip members.
        most: the most bytes that the payload may have.

    Raises:
        ShardError: the bytes are truncated, damaged, or hold more than one record.
    """
    return bytes(decode_buffer(memoryview(data), compressed, most, _inflate_whole))


def require_stored_size(size: int, most: int) -> None:
    """Refuse to read a record that takes more bytes in its file than its payload can need.

    Args:
        size: bytes of the record in the file, according to the index.
        most: the most bytes that the payload may have.

    Raises:
        ShardError: it takes more.
    """
    if size > (bound := _FREE_STORED_BYTES + _STORED_RATIO * most):
        raise ShardError(f"has {size:,} bytes according to the index, but can have at most {bound:,}")


def decode_buffer(
    data: memoryview,
    compressed: bool,
    most: int = _MOST_PAYLOAD,
    inflate: Callable[[memoryview, int], Bytes | bytearray] | None = None,
) -> memoryview:
    """As `decode_record`, without a copy.

    Args:
        data: exactly the record's bytes, as an index locates them.
        compressed: whether they are gzip members.
        most: same as for `decode_record`.
        inflate: function of a gzip member and its size; None means `inflate_member`.

    Returns:
        A part of `data`; if that is compressed, memory of its own, which may be written to.

    Raises:
        ShardError: as `decode_record`.
    """
    if compressed:
        data = _inflate(data, most + HEADER_BYTES + FOOTER_BYTES, inflate or inflate_member)
    if len(data) < HEADER_BYTES + FOOTER_BYTES:
        raise ShardError(f"record is truncated: {len(data)} bytes")
    if _masked_crc(data[:_LENGTH_BYTES]) != data[_LENGTH_BYTES:HEADER_BYTES]:
        raise ShardError("the CRC of the record's length does not match")
    size, held = _LENGTH.unpack_from(data)[0], len(data) - HEADER_BYTES - FOOTER_BYTES
    if held != size:
        raise ShardError(f"record gives its size as {size} bytes, but holds {held}")
    payload = data[HEADER_BYTES:-FOOTER_BYTES]
    if _masked_crc(payload) != data[-FOOTER_BYTES:]:
        raise ShardError("the CRC of the record's payload does not match")
    return payload


def _inflate(
    data: memoryview, most: int, inflate: Callable[[memoryview, int], Bytes | bytearray]
) -> memoryview:
    """The content of the gzip members of a record."""
    members = _members(data, most)
    sizes = [_stated_size(member) for member in members]
    if (total := sum(sizes)) > most:
        raise ShardError(f"the record's gzip holds {total:,} bytes, but the record has at most {most:,}")
    if len(members) == 1:
        return memoryview(inflate(members[0], sizes[0]))
    content, at = make_buffer(total), 0
    for member, size in zip(members, sizes, strict=True):
        content[at : at + size] = inflate(member, size)
        at += size
    return content


def member_lengths(data: memoryview, most: int = _MOST_PAYLOAD) -> list[int]:
    """Bytes of each gzip member of a record.

    Args:
        data: exactly the record's bytes.
        most: the most bytes that the record may hold.

    Raises:
        ShardError: a member reaches beyond the record, or there are too many.
    """
    lengths, at, start = list[int](), 0, len(_MEMBER_START)
    if data[:start] != _MEMBER_START:
        return [len(data)]
    while at < len(data):
        head = data[at : at + _MEMBER_HEAD.size]
        if head[:start] != _MEMBER_START or len(head) < _MEMBER_HEAD.size:
            raise ShardError(f"byte {at} of the record does not begin a gzip member")
        (length,) = _SIZE.unpack_from(head, start)
        if not _MEMBER_HEAD.size + _GZIP_FOOTER.size < length <= len(data) - at:
            raise ShardError(
                f"the gzip member at byte {at} of the record cannot have the length {length} in its header"
            )
        lengths.append(length)
        at += length
        if len(lengths) > _FREE_MEMBERS + 2 * most // TILE_BYTES:
            raise ShardError(f"the record has more than {len(lengths) - 1} gzip members")
    return lengths


def _members(data: memoryview, most: int) -> list[memoryview]:
    bounds = itertools.accumulate(member_lengths(data, most), initial=0)
    return [data[start:end] for start, end in itertools.pairwise(bounds)]


def member_sizes(data: memoryview) -> list[int]:
    """Bytes that each gzip member of a record holds, by its footer; errors as of `member_lengths`."""
    return list(map(_stated_size, _members(data, _MOST_PAYLOAD)))


def _stated_size(member: memoryview) -> int:
    """Bytes that a member holds, according to its footer."""
    if len(member) < _GZIP_FOOTER.size:
        raise ShardError(_WRONG_BOUNDS)
    size: int = _GZIP_FOOTER.unpack_from(member, len(member) - _GZIP_FOOTER.size)[1]
    if not 0 < size <= DEFLATE_RATIO * len(member):
        raise ShardError(_WRONG_BOUNDS)
    return size


def inflate_one(member: memoryview, size: int | None = None, most: int = _MOST_PAYLOAD) -> bytearray:
    """The content of one of several members of a record.

    Args:
        member: exactly its bytes, as an index locates them.
        size: bytes that it must hold; None for what its footer states.
        most: the most bytes that it may hold.

    Raises:
        ShardError: as `inflate_member`, or its header gives another length.
    """
    if bytes(member[: _MEMBER_HEAD.size]) != _MEMBER_START + _SIZE.pack(len(member)):
        raise ShardError(f"no gzip member of {len(member)} bytes is at its offset in the index")
    holds = _stated_size(member) if size is None else size
    if holds > most:
        raise ShardError(f"gzip member holds {holds:,} bytes, expected at most {most:,}")
    return inflate_member(member, holds)


def inflate_member(member: memoryview, size: int) -> bytearray:
    """The content of a gzip member. libdeflate needs three quarters of igzip's time, and all of it in memory.

    Args:
        member: exactly its bytes.
        size: bytes that it must hold.

    Raises:
        ShardError: it is damaged, or does not hold that many bytes.
    """
    if _stated_size(member) != size:
        raise ShardError(_WRONG_BOUNDS)
    try:
        content: bytearray = deflate.gzip_decompress(member, size)
    except deflate.DeflateError as e:
        raise ShardError(f"gzip member is damaged ({e})") from e
    # libdeflate ignores what follows a member; but then this is not the member's checksum.
    checksum = _GZIP_FOOTER.unpack_from(member, len(member) - _GZIP_FOOTER.size)[0]
    if len(content) != size or isal_zlib.crc32(content) != checksum:
        raise ShardError(_WRONG_BOUNDS)
    return content


def _inflate_whole(member: memoryview, size: int) -> bytes:
    """As `inflate_member`, but nothing may follow the end of the member, which igzip tells."""
    reader = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_GZIP)
    try:
        content: bytes = reader.decompress(member, size + 1)
    except igzip_lib.IsalError as e:  # type: ignore[misc]  # isal's stub calls the class an instance
        raise ShardError(f"gzip member is damaged ({e})") from e
    if len(content) != size or not reader.eof:
        raise ShardError(_WRONG_BOUNDS)
    if reader.unused_data:
        after = len(reader.unused_data)
        raise ShardError(f"{after:,} bytes follow the end of a gzip member, which other programs may read")
    return content
