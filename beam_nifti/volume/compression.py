"""Decompression of gzip, bzip2 and zstd files in memory, and compression of gzip.

The first bytes of a file tell its compression.

Damage is a VolumeError.
"""

from __future__ import annotations

import bz2
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from isal import igzip_lib, isal_zlib

from beam_nifti.errors import VolumeError

Bytes = bytes | memoryview

DEFLATE_RATIO: Final = 1032  # at most. Source: zlib's technical notes
_BLOCKS_HEAD_BYTES: Final = 1 << 20  # `head_bytes` of formats with blocks; those of bzip2 have up to 900 kB
_SCRATCH_BYTES: Final = 1 << 16
_GZIP_WBITS: Final = 31
_SAFE_START_BYTES: Final = 16
"""igzip starts so many bytes without the search that depends on an address. docs/adr/0023-same-bytes.md."""

_DAMAGE: Final[tuple[type[Exception], ...]] = (
    EOFError,
    OSError,
    pa.ArrowException,
    igzip_lib.IsalError,  # type: ignore[assignment]  # isal's stub calls the class an instance
)
"""What a damaged stream raises."""


def compress_gzip(pieces: Iterable[Bytes], level: int) -> Iterator[bytes]:
    """Compress pieces, not all of them empty, into one gzip member without a name or a time.

    Equal pieces give equal bytes. igzip does not grant that by itself: if a stream starts with more than 16
    bytes, where it finds repetitions depends on the address of igzip's state.

    Args:
        pieces: the content, in order.
        level: igzip level, 0 to 3.

    Returns:
        The member; its header is in the first piece.
    """
    packer = isal_zlib.compressobj(level, wbits=_GZIP_WBITS)
    views = (memoryview(piece) for piece in pieces if len(piece))
    first = next(views)
    start = packer.compress(first[:_SAFE_START_BYTES])
    yield start + packer.flush(isal_zlib.Z_SYNC_FLUSH)
    yield packer.compress(first[_SAFE_START_BYTES:])
    yield from map(packer.compress, views)
    yield packer.flush()


def make_buffer(size: int) -> memoryview:
    """Uninitialized memory of this many bytes."""
    return memoryview(np.empty(size, np.uint8)).cast("B")


@dataclass(frozen=True, slots=True)
class Compression:
    """A compression format.

    Attributes:
        name: name of the format.
        magic: matches the beginning of each stream.
        open: function from a file's bytes to an object with `readinto`.
        find_end: function from a file's bytes to the end of its last complete stream; 0 if none is complete.
        head_bytes: bytes at the start of a file, from which its first kilobyte can be decompressed.
        ratio: most bytes that a compressed byte can become; None if there is no useful bound.
    """

    name: str
    magic: re.Pattern[bytes]
    open: Callable[[Bytes], Any]
    find_end: Callable[[Bytes], int]
    head_bytes: int
    ratio: int | None = None


_GZIP: Final = re.compile(rb"\x1f\x8b")
_BZIP2: Final = re.compile(rb"BZh")
_ZSTD: Final = re.compile(rb"(?s:\x28\xb5\x2f\xfd|(?P<skipped>[\x50-\x5f]\x2a\x4d\x18(?P<size>.{4})))")
"""A frame, or a skippable frame, as pzstd writes them. Source: RFC 8878, 3.1.1 and 3.1.2."""


def _open_with_arrow(codec: str) -> Callable[[Bytes], Any]:
    """Open with Arrow, which, unlike Python's own reader, notices a stream that breaks off."""
    return lambda data: pa.CompressedInputStream(pa.BufferReader(pa.py_buffer(data)), codec)


def _skip_zeros(data: Bytes, at: int) -> int:
    """The offset of the next byte that is not 0, or of the end."""
    zeros = re.compile(rb"\0*").match(data, at)
    return zeros.end() if zeros else at


def _end_by_decompressing(magic: re.Pattern[bytes], make: Callable[[], Any]) -> Callable[[Bytes], int]:
    """The `Compression.find_end` of a format whose streams do not give their own length."""

    def find(data: Bytes) -> int:
        end = start = 0
        while magic.match(data, start):
            stream, at = make(), start
            try:
                while not stream.eof:
                    chunk = data[at : at + _SCRATCH_BYTES] if stream.needs_input else b""
                    if stream.needs_input and not chunk:
                        return end
                    stream.decompress(chunk, _SCRATCH_BYTES)
                    at += len(chunk)
            except _DAMAGE:
                return end
            end = at - len(stream.unused_data)
            start = _skip_zeros(data, end)
        return end

    return find


def _zstd_end(data: Bytes) -> int:
    """Pass from block to block. Source: RFC 8878, 3.1.1."""
    at = 0
    while (frame := _ZSTD.match(data, at)) and at + 5 <= len(data):
        start, is_last = at, False
        if frame["skipped"]:
            at, is_last = frame.end() + int.from_bytes(frame["size"], "little"), True
        else:
            flags = data[at + 4]
            is_single = flags >> 5 & 1
            at += 6 - is_single + (0, 1, 2, 4)[flags & 3] + (is_single, 2, 4, 8)[flags >> 6]
            while not is_last and at + 3 <= len(data):
                block = int.from_bytes(data[at : at + 3], "little")
                at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
                is_last = bool(block & 1)
            at += 4 * (flags >> 2 & 1)  # a checksum
        if not is_last or at > len(data):
            return start
    return at


COMPRESSIONS: Final = (
    Compression(
        "gzip",
        _GZIP,
        # isal offers reading into a buffer (a third of the CPU of growing one) only under this name.
        isal_zlib._GzipReader,  # type: ignore[arg-type]
        _end_by_decompressing(_GZIP, lambda: igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_GZIP)),
        1 << 16,
        DEFLATE_RATIO,
    ),
    Compression(
        "bzip2",
        _BZIP2,
        _open_with_arrow("bz2"),
        _end_by_decompressing(_BZIP2, bz2.BZ2Decompressor),
        _BLOCKS_HEAD_BYTES,
    ),
    Compression("zstd", _ZSTD, _open_with_arrow("zstd"), _zstd_end, _BLOCKS_HEAD_BYTES),
)


def compression_of(head: Bytes) -> Compression | None:
    """The compression of a file that begins with these bytes; None if it is not compressed."""
    return next((compression for compression in COMPRESSIONS if compression.magic.match(head)), None)


class Decompressor:
    """The content of a compressed file, a buffer at a time.

    Bytes after the last stream that do not begin another one, such as padding or text, are ignored, as by
    gunzip and nibabel.

    `data` is the file, or as much of its start as is needed.

    Attributes:
        trailing: how many bytes after the streams were ignored, so far as they have been met.
    """

    def __init__(self, name: str, data: Bytes, compression: Compression) -> None:
        self.trailing = 0
        self._name, self._compression, self._data, self._size = name, compression, data, len(data)
        self._peeked = memoryview(b"")
        self._position = 0  # of the reader in the content
        self._reader = self._checked(lambda: compression.open(data))

    @property
    def trailing_text(self) -> str:
        """What follows the streams, for errors; "" for nothing."""
        return f", and {self.trailing} bytes after the {self._compression.name} data" if self.trailing else ""

    def _checked(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except MemoryError:  # of Arrow, too
            raise
        except _DAMAGE as e:
            what = "truncated" if isinstance(e, EOFError) or "Truncated" in str(e) else "damaged"
            raise VolumeError(
                f"{self._name}: {what} {self._compression.name} stream ({e}); copy the file again"
            ) from e

    def _fill(self, buffer: memoryview) -> int:
        try:
            size = fill(self._reader, buffer)
        except _DAMAGE:
            if not self._drop_trailing():
                raise
            size = fill(self._reader, buffer)
        self._position += size
        return size

    def _drop_trailing(self) -> bool:
        """Continue without what follows the streams; False if that begins a stream, and so is damage."""
        end = self._compression.find_end(self._data)
        starts_another = self._compression.magic.match(self._data, _skip_zeros(self._data, end))
        if self.trailing or not 0 < end < len(self._data) or starts_another:
            return False
        self.trailing = len(self._data) - end
        self._reader = self._compression.open(self._data[:end])
        scratch = memoryview(bytearray(_SCRATCH_BYTES))
        left = self._position
        while left and (count := fill(self._reader, scratch[:left])):
            left -= count
        return not left

    def peek(self, size: int) -> bytes:
        """The next bytes, fewer at the end, which are read again."""
        buffer = bytearray(size)
        self._peeked = memoryview(buffer)[: self.readinto(memoryview(buffer))]
        return bytes(self._peeked)

    def readinto(self, buffer: memoryview) -> int:
        """Fill a buffer as far as there is content; returns the number of bytes."""
        size = min(len(self._peeked), len(buffer))
        buffer[:size] = self._peeked[:size]
        self._peeked = self._peeked[size:]
        return size + int(self._checked(lambda: self._fill(buffer[size:])))

    def read(self, expected: int, most: int) -> memoryview:
        """The rest in one buffer, of at most `most` bytes, of which the header promises `expected`.

        The buffer never grows beyond what the file can hold.
        """
        self.require(expected)
        size = 0
        content = make_buffer(min(most, self._size * DEFLATE_RATIO))
        while True:
            size += self.readinto(content[size:])
            if size < len(content) or size == most:
                return content[:size]
            larger = make_buffer(min(most, 2 * size))
            larger[:size] = content
            content = larger

    def require(self, expected: int) -> None:
        """Refuse a promise of more bytes than the file can hold."""
        if self._compression.ratio is not None and expected > self._compression.ratio * self._size:
            raise VolumeError(
                f"{self._name}: the header promises {expected} bytes, more than {self._size} bytes of "
                f"{self._compression.name} can hold; copy the file again"
            )

    def skip(self, size: int) -> int:
        """Skip bytes; returns how many there were."""
        scratch = memoryview(bytearray(min(size, _SCRATCH_BYTES)))
        passed = 0
        while passed < size and (count := self.readinto(scratch[: size - passed])):
            passed += count
        return passed


def fill(reader: Any, buffer: memoryview) -> int:
    """Read until a buffer is full or there is no more; the number of bytes."""
    size = 0
    while size < len(buffer) and (count := reader.readinto(buffer[size:])):
        size += count
    return size


def content_size(name: str, data: Bytes, most: int) -> int:
    """The number of bytes that a file holds, at most `most`."""
    compression = compression_of(data)
    return Decompressor(name, data, compression).skip(most) if compression else min(len(data), most)


def decompressed_head(name: str, head: Bytes, size: int) -> bytes:
    """The first `size` bytes of what a file holds, from its own first bytes."""
    compression = compression_of(head)
    return Decompressor(name, head, compression).peek(size) if compression else bytes(head[:size])
