"""What a file is packed in: gzip, bzip2 or zstd, told by its first bytes and unpacked from memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from isal import igzip_lib, isal_zlib

from beam_nifti.errors import VolumeError
from beam_nifti.tfrecord import DEFLATE_RATIO

Bytes = bytes | memoryview

_BLOCKS_HEAD_BYTES: Final = 1 << 20
"""`Packing.head_bytes` where blocks are unpacked as a whole; those of bzip2 have up to 900 kB."""

_SCRATCH_BYTES: Final = 1 << 16

_DAMAGE: Final[tuple[type[Exception], ...]] = (
    EOFError,
    OSError,
    pa.ArrowException,
    igzip_lib.IsalError,  # type: ignore[assignment]  # isal's stub calls the class an instance
)
"""What a damaged stream raises."""


@dataclass(frozen=True, slots=True)
class Packing:
    """A way of packing.

    Attributes:
        name: of the format.
        magic: what every file of it begins with.
        open: from a file's bytes to an object with `readinto`.
        head_bytes: of a file, from which its first kilobyte can be unpacked.
        ratio: the most bytes that one packed byte can stand for; None where that is no bound worth having.
    """

    name: str
    magic: bytes
    open: Callable[[Bytes], Any]
    head_bytes: int
    ratio: int | None = None


_BZIP2_END: Final = f"{0x177245385090:048b}"
"""What a bzip2 stream ends with, but for a checksum of 32 bits and bits to fill its last byte."""

_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"


def _open_with_arrow(codec: str, find_end: Callable[[Bytes, int], int]) -> Callable[[Bytes], Any]:
    """Open with Arrow, which notices, unlike Python's own, a stream that breaks off or goes on otherwise.

    Args:
        codec: Arrow's name of it.
        find_end: from a file, and its size without the zeros at its end, to the end of its streams. Arrow
            takes zeros behind them, as of tapes and disk blocks, for damage; isal passes over them.
    """

    def opened(data: Bytes) -> Any:
        size = len(data)
        if size and not data[-1]:
            size -= int(np.argmax(np.frombuffer(data, np.uint8)[::-1] != 0))
            end = find_end(data, size)
            size = end if size <= end <= len(data) else len(data)
        return pa.CompressedInputStream(pa.BufferReader(pa.py_buffer(data)[:size]), codec)

    return opened


def _bzip2_end(data: Bytes, size: int) -> int:
    # Streams begin at any bit. What follows the mark may be zeros, up to five bytes of them.
    start = max(0, size - 11)
    tail = bytes(data[start : size + 5])
    at = f"{int.from_bytes(tail):0{8 * len(tail)}b}".rfind(_BZIP2_END)
    return start + (at + 48 + 32 + 7) // 8 if at >= 0 else len(data)


def _zstd_end(data: Bytes, size: int) -> int:
    """Pass from block to block. Source: RFC 8878, 3.1.1."""
    at = 0
    while at < size and bytes(data[at : at + 4]) == _ZSTD_MAGIC:
        flags = data[at + 4]
        is_single = flags >> 5 & 1
        at += 6 - is_single + (0, 1, 2, 4)[flags & 3] + (is_single, 2, 4, 8)[flags >> 6]
        while at < size:
            block = int.from_bytes(data[at : at + 3], "little")
            at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
            if block & 1 or not block:  # the last one; or a hole in the file
                break
        at += 4 * (flags >> 2 & 1)  # a checksum
    return at


PACKINGS: Final = (
    # isal offers reading into a buffer (a third of the CPU of growing one) only under this name.
    Packing("gzip", b"\x1f\x8b", isal_zlib._GzipReader, 1 << 16, DEFLATE_RATIO),  # type: ignore[arg-type]
    Packing("bzip2", b"BZh", _open_with_arrow("bz2", _bzip2_end), _BLOCKS_HEAD_BYTES),
    Packing("zstd", _ZSTD_MAGIC, _open_with_arrow("zstd", _zstd_end), _BLOCKS_HEAD_BYTES),
)


def packing_of(head: Bytes) -> Packing | None:
    """The packing of a file that begins so; None where it is not packed."""
    start = bytes(head[:4])
    return next((p for p in PACKINGS if start.startswith(p.magic)), None)


class Unpacker:
    """The content of a packed file, a buffer at a time.

    Args:
        name: the image's path, for errors.
        data: the file, or as much of its start as is needed.
        packing: of the file.
    """

    def __init__(self, name: str, data: Bytes, packing: Packing) -> None:
        self._name, self._packing, self._size = name, packing, len(data)
        self._peeked = memoryview(b"")
        self._reader = self._checked(lambda: packing.open(data))

    def _checked(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except MemoryError:  # of Arrow, too
            raise
        except _DAMAGE as e:
            what = "truncated" if isinstance(e, EOFError) or "Truncated" in str(e) else "damaged"
            raise VolumeError(
                f"{self._name}: {what} {self._packing.name} stream ({e}); copy the file again"
            ) from e

    def peek(self, size: int) -> bytes:
        """The next bytes, fewer at the end, which are read again.

        Raises:
            VolumeError: the file is damaged.
        """
        buffer = bytearray(size)
        self._peeked = memoryview(buffer)[: self.readinto(memoryview(buffer))]
        return bytes(self._peeked)

    def readinto(self, buffer: memoryview) -> int:
        """Fill a buffer, as far as there is content; the number of bytes.

        Raises:
            VolumeError: the file is damaged.
        """
        size = min(len(self._peeked), len(buffer))
        buffer[:size] = self._peeked[:size]
        self._peeked = self._peeked[size:]
        return size + int(self._checked(lambda: fill(self._reader, buffer[size:])))

    def read(self, expected: int, most: int) -> memoryview:
        """All that is left, into one buffer, which is not grown beyond what the file can hold.

        Args:
            expected: bytes that the header promises.
            most: bytes to stop at.

        Raises:
            VolumeError: the file is damaged, or so small that the header's promise is a lie.
        """
        self.require(expected)
        size = 0
        content = memoryview(np.empty(min(most, self._size * DEFLATE_RATIO), np.uint8)).cast("B")
        while True:
            size += self.readinto(content[size:])
            if size < len(content) or size == most:
                return content[:size]
            larger = memoryview(np.empty(min(most, 2 * size), np.uint8)).cast("B")
            larger[:size] = content
            content = larger

    def require(self, expected: int) -> None:
        """Refuse a promise of more bytes than the file can hold.

        Raises:
            VolumeError: it cannot hold as many.
        """
        if self._packing.ratio is not None and expected > self._packing.ratio * self._size:
            raise VolumeError(
                f"{self._name}: the header promises {expected} bytes, more than {self._size} bytes of "
                f"{self._packing.name} can hold; copy the file again"
            )

    def skip(self, size: int) -> int:
        """Pass over bytes; how many there were.

        Raises:
            VolumeError: the file is damaged.
        """
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


def unpacked_head(name: str, head: Bytes, size: int) -> bytes:
    """The first `size` bytes of what a file holds, from its own first bytes.

    Raises:
        VolumeError: the file is damaged.
    """
    packing = packing_of(head)
    return Unpacker(name, head, packing).peek(size) if packing else bytes(head[:size])
