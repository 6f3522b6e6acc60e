"""The files of an image, and the bytes of its voxels.

In errors, `name` is the image's path as in the manifest; `path` is its location. `parse` makes a header from
the first HEAD_BYTES of a file's content, before anything large is read or allocated. A path or a file that
cannot be used is a VolumeError, and a failure of the disk, the network or the store an OSError.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Final

from beam_nifti.errors import VolumeError, is_of_path
from beam_nifti.manifest.image_names import COMPRESSED, HALF
from beam_nifti.storage import paths as storage
from beam_nifti.storage.signatures import stand_in
from beam_nifti.volume.compression import (
    Bytes,
    Decompressor,
    compression_of,
    content_size,
    decompressed_head,
    fill,
    make_buffer,
)
from beam_nifti.volume.formats import HEAD_BYTES
from beam_nifti.volume.header import VolumeHeader

ReadHeader = Callable[[bytes], VolumeHeader]
FileStats = tuple[storage.Stat, ...]  # of an image's file, or of the header and the voxels of a pair
_LARGE_FILE: Final = 64 << 20  # bytes of a file above which its header is checked before the rest is read
_HEAD_OF_FILE: Final = 1 << 16  # bytes that contain the header, unless the compression needs more
_LARGEST_HALF: Final = 1 << 20  # bytes of the header's file of a pair
_LARGEST_HEADER: Final = 64 << 20  # bytes of a header and its extensions


@dataclass(frozen=True, slots=True)
class Source:
    """The files that an example was made from.

    Attributes:
        files: Stats of each image, then of the mask and the target, when they were read.
        shape: `VolumeHeader.shape` of the first image.
        affine: affine of the first image, 16 numbers, row by row.
    """

    files: tuple[FileStats, ...]
    shape: tuple[int, ...]
    affine: tuple[float, ...]


def frames_of(shape: Sequence[int]) -> int:
    """The number of frames of an image with this `Source.shape`."""
    return shape[3] if len(shape) > 3 else 1


def image_files(path: str) -> tuple[str, ...]:
    """The files of an image: one, or the header and the voxels of a pair, whichever of them is named.

    The other half of a pair may be compressed differently. A half without the other counts as a single file,
    because some programs name images .img.
    """
    if "\0" in path:
        raise VolumeError(f"{path!r}: not a path: it has a NUL character; repair the manifest")
    match = HALF.fullmatch(path)
    if match is None:
        return (path,)
    half, compressed = match["half"], match["compressed"]
    is_header = half.lower() == "hdr"
    other = "img" if is_header else "hdr"
    stem = match["stem"] + (other.upper() if half.isupper() else other)
    for ending in dict.fromkeys((compressed, "", *COMPRESSED)):
        with contextlib.suppress(FileNotFoundError):
            if not storage.broken_link(stem + ending):
                storage.stat(stem + ending)
            return (path, stem + ending) if is_header else (stem + ending, path)
    return (path,)


def _files_to_read(name: str, path: str) -> tuple[str, ...]:
    files = image_files(path)
    for file in files:
        if what := storage.broken_link(file):
            raise VolumeError(f"{name}: {what}")
    return files


def stat_image(path: str) -> FileStats:
    """The Stat of each file of an image; of a pair, the header first."""
    return tuple(map(storage.stat, image_files(path)))


def read_header(name: str, path: str, parse: ReadHeader) -> VolumeHeader:
    """The header of an image, from its first kilobytes, checked against the sizes of its files."""
    with reading(name):
        files = _files_to_read(name, path)
        head = storage.read_head(files[0], _HEAD_OF_FILE)
        compression = compression_of(head)
        if compression and compression.head_bytes > len(head) == _HEAD_OF_FILE:
            head = storage.read_head(files[0], compression.head_bytes)
    header = parse(decompressed_head(name, head, HEAD_BYTES))
    if len(files) == 2:
        _refuse_whole_image(name, head, header)
    _check_container(name, files, header)
    with reading(name):
        if len(files) == 2:
            head = storage.read_head(files[1], HEAD_BYTES)
        is_compressed = compression_of(head) is not None
        if is_compressed and storage.is_remote(path):
            return header  # its size reveals too little to be worth a request
        size = storage.stat(files[-1]).size
    if len(files) == 2:
        _check_img(name, files[1], head, size, header)
    if not is_compressed:
        _check_size(name, size, header)
    elif size > _LARGE_FILE:
        _refuse_oversized(name, size, header, is_compressed=True)
    return header


def _check_img(name: str, file: str, head: Bytes, size: int, header: VolumeHeader) -> None:
    """Refuse an .img file of this size and beginning that cannot hold the voxels of its header."""
    if size < header.end and (what := stand_in(bytes(head[:HEAD_BYTES]))):
        raise VolumeError(f"{name}: its .img file is {what}")
    if file.lower().endswith(COMPRESSED) and compression_of(head) is None:
        raise VolumeError(f"{name}: its .img file is not compressed as its name implies; copy it again")


def _check_size(name: str, size: int, header: VolumeHeader, trailing: str = "") -> None:
    """Refuse an uncompressed file that holds fewer bytes than its header promises, or more."""
    if size < header.end:
        raise VolumeError(
            f"{name}: truncated: {size} bytes where shape {header.shape} of {header.dtype_name} needs "
            f"{header.end}{trailing}; copy the file again"
        )
    if size >= header.size_limit:
        raise _disowned(name, header)


def _refuse_oversized(name: str, size: int, header: VolumeHeader, *, is_compressed: bool) -> None:
    """Refuse a large file that does not match its header, such as a wrong download, before reading it."""
    # What cannot be compressed is stored, by deflate with 5 bytes a block of 16 KiB, by bzip2 with 1 %.
    allowance = header.end // (50 if is_compressed else 1000)
    if size > header.end + allowance + _LARGE_FILE // 2:
        raise _disowned(name, header)


def _disowned(name: str, header: VolumeHeader) -> VolumeError:
    return VolumeError(
        f"{name}: holds more than the {header.end} bytes that shape {header.shape} of "
        f"{header.dtype_name} needs; repair its header or convert it again"
    )


def _check_container(name: str, files: tuple[str, ...], header: VolumeHeader) -> None:
    """Refuse a header whose voxels cannot be in these files.

    As in nibabel, the files decide where voxels are, not the magic string of a NIfTI header.
    """
    is_inside = header.offset < header.header_bytes
    if len(files) == 1:
        if header.is_analyze and not HALF.fullmatch(files[0]):
            raise VolumeError(
                f"{name}: an ANALYZE header, or a NIfTI header without its magic string, in a single file; "
                "repair or convert the image"
            )
        if header.is_pair and (is_inside or HALF.fullmatch(files[0])):
            raise VolumeError(
                f"{name}: the header of an .hdr/.img pair without its voxels; copy the .img file beside it"
            )
        if is_inside:
            raise VolumeError(
                f"{name}: voxels start at byte {header.offset}, inside the header; repair vox_offset"
            )
    if header.is_analyze and (match := HALF.fullmatch(files[0])):
        with reading(name):
            found = any(storage.exists(f"{match['stem']}mat{end}") for end in {"", match["compressed"]})
        if found:
            raise VolumeError(
                f"{name}: its affine is in a .mat file beside it, which is not read; convert the pair to "
                "NIfTI with nibabel or SPM"
            )


@contextlib.contextmanager
def open_image(name: str, path: str, parse: ReadHeader) -> Iterator[Image]:
    """Open an image to read its voxels; a file that changes in the meantime is a VolumeError at the end."""
    with contextlib.ExitStack() as stack:
        with reading(name):
            opened = []
            files = _files_to_read(name, path)
            for file in files:
                handle, stat = storage.open_with_stat(file)
                opened.append((stack.enter_context(handle), stat))
        header = _read_half(name, *opened[0], parse) if len(opened) > 1 else None
        stats = tuple(stat for _, stat in opened)
        image = Image(name, handle, stats, parse, header, files[-1])
        _check_container(name, files, image.header)
        try:
            yield image
        except VolumeError:
            _refuse_changed(name, files, opened)
            raise
        _refuse_changed(name, files, opened)


def _refuse_changed(name: str, files: Iterable[str], opened: Iterable[tuple[BinaryIO, storage.Stat]]) -> None:
    if any(storage.has_changed(file, *each) for file, each in zip(files, opened, strict=True)):
        raise VolumeError(f"{name}: changed while it was read; build again once no program writes to it")


def _read_half(name: str, handle: BinaryIO, stat: storage.Stat, parse: ReadHeader) -> VolumeHeader:
    """The header of a pair, from its own file."""
    if stat.size > _LARGEST_HALF:
        raise VolumeError(f"{name}: its .hdr file has {stat.size} bytes, which no header has; copy it again")
    with reading(name):
        data = handle.read()
    content_size(name, data, _LARGEST_HEADER)  # reads to its end, where the checksum is
    header = parse(decompressed_head(name, data, HEAD_BYTES))
    _refuse_whole_image(name, data, header)
    return header


def _refuse_whole_image(name: str, data: Bytes, header: VolumeHeader) -> None:
    """Refuse an .hdr file that holds voxels, because those of the .img file may be of another image."""
    if header.is_pair or header.offset < header.header_bytes:
        return
    if content_size(name, data, header.offset + 1) > header.offset:
        raise VolumeError(
            f"{name}: its .hdr file is a whole image, not the header of an .img file; repair its name: .nii"
        )


class Image:
    """An image that is open for reading, with the Stats of its files and its header.

    The last Stat is that of `handle`, the file of the voxels. `header` is that of a pair; None if it precedes
    the voxels. If `file`, its path, says that it is compressed, it must be: otherwise, damage to its first
    bytes could not be distinguished from voxels.
    """

    def __init__(
        self,
        name: str,
        handle: BinaryIO,
        stats: FileStats,
        parse: ReadHeader,
        header: VolumeHeader | None,
        file: str,
    ) -> None:
        self.stats = stats
        self._name, self._handle, self._size = name, handle, stats[-1].size
        self._is_large = self._size > _LARGE_FILE
        self._data: Bytes = self._read_start()
        self._compression = compression_of(self._data)
        self._decompressor: Decompressor | None = None
        if header is not None:
            self.header = header
            _check_img(name, file, self._data, self._size, header)
            if not file.lower().endswith(COMPRESSED) and self._size == self.header.end:
                self._compression = None  # voxels may happen to begin like a compressed file
        elif self._compression and not self._is_large:
            self._decompressor = Decompressor(name, self._data, self._compression)
            self.header = parse(self._decompressor.peek(HEAD_BYTES))
        else:
            self.header = parse(decompressed_head(name, self._data, HEAD_BYTES))
        if self._is_large:
            _refuse_oversized(name, self._size, self.header, is_compressed=self._compression is not None)

    def _read_start(self) -> bytes:
        """All of a small file, or the beginning of a large one."""
        with reading(self._name):
            if self._is_large:
                head = self._handle.read(_HEAD_OF_FILE)
                compression = compression_of(head)
                return head + self._handle.read(compression.head_bytes - len(head)) if compression else head
            data = self._handle.read()
        self._size = len(data)
        return data

    def _read_rest(self) -> Bytes:
        """All of the file."""
        if not self._is_large:
            return self._data
        data = make_buffer(self._size)
        data[: len(self._data)] = self._data
        with reading(self._name):
            return data[: len(self._data) + fill(self._handle, data[len(self._data) :])]

    def read_all(self) -> memoryview:
        """The bytes of all voxels. The image keeps nothing of the file."""
        data = self._read_rest()
        self._data = b""
        if self._compression:
            decompressor = self._decompressor or Decompressor(self._name, data, self._compression)
            self._decompressor = None
            content = decompressor.read(self.header.end, self.header.size_limit)
            _check_size(self._name, len(content), self.header, decompressor.trailing_text)
        else:
            content = memoryview(data)
            _check_size(self._name, len(content), self.header)
        return content[self.header.offset : self.header.end]

    def read_frames(self, numbers: Iterable[int]) -> Iterator[memoryview]:
        """The bytes of single components of frames; each buffer is valid until the next one.

        The numbers ascend; component v of frame t has number v * T + t. A compressed file is read to its end,
        so that damage behind the frames is detected.
        """
        size = self.header.frame_bytes
        if self._compression:
            decompressor = Decompressor(self._name, self._read_rest(), self._compression)
            decompressor.require(self.header.end)
            reader: Decompressor | BinaryIO = decompressor
        else:
            _check_size(self._name, self._size, self.header)
            reader = self._handle if self._is_large else io.BytesIO(self._data)
        at = 0
        buffer = make_buffer(size)
        for number in numbers:
            start = self.header.offset + number * size
            with reading(self._name):
                if isinstance(reader, Decompressor):
                    at += reader.skip(start - at)
                else:
                    at = reader.seek(start)
                got = fill(reader, buffer)
            at += got
            if got < size:
                trailing = reader.trailing_text if isinstance(reader, Decompressor) else ""
                _check_size(self._name, at, self.header, trailing)
            yield buffer
        if isinstance(reader, Decompressor):
            at += reader.skip(self.header.size_limit - at)
            _check_size(self._name, at, self.header, reader.trailing_text)


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn the error of a missing or unreadable path into a VolumeError."""
    try:
        yield
    except OSError as e:
        if not is_of_path(e):
            if e.errno is not None and e.filename is None and e.strerror == os.strerror(e.errno):
                e.filename = name  # the system names no file where reading an open one fails
            raise
        reason = e.strerror or str(e)
        remedy = "" if "; " in reason else "; check the path and its permissions"  # ours have their own
        raise VolumeError(f"{name}: cannot be read: {reason}{remedy}") from e
