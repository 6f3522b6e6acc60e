"""Files, local or remote, by their paths. The only module by which other folders read and write them.

`disk` serves local paths, and `stores` finds the store of a URL. A written file appears whole or not at all.
All functions raise FileNotFoundError for a missing file, another OSError for one that cannot be reached, and
an OutputError if a name of a local path after `below` is a symbolic link.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Final, cast

from beam_nifti.errors import OutputError
from beam_nifti.storage import disk
from beam_nifti.storage.disk import broken_link as broken_link
from beam_nifti.storage.disk import naming as naming
from beam_nifti.storage.disk import require_inside as require_inside
from beam_nifti.storage.disk import temporary_of as temporary_of
from beam_nifti.storage.listing import glob as glob
from beam_nifti.storage.listing import list_files as list_files
from beam_nifti.storage.listing import list_folders as list_folders
from beam_nifti.storage.listing import list_links as list_links
from beam_nifti.storage.listing import list_tree as list_tree
from beam_nifti.storage.names import UNSPELLABLE as UNSPELLABLE
from beam_nifti.storage.names import absolute as absolute
from beam_nifti.storage.names import dirname as dirname
from beam_nifti.storage.names import is_remote as is_remote
from beam_nifti.storage.names import is_same as is_same
from beam_nifti.storage.names import is_within as is_within
from beam_nifti.storage.names import join as join
from beam_nifti.storage.names import local_path as local_path
from beam_nifti.storage.names import path_text as path_text
from beam_nifti.storage.names import require_text as require_text
from beam_nifti.storage.names import resolved as resolved
from beam_nifti.storage.names import scheme_of as scheme_of
from beam_nifti.storage.object_store import Stat as Stat
from beam_nifti.storage.object_store import Writer
from beam_nifti.storage.object_store import hiding_hosts as hiding_hosts
from beam_nifti.storage.stores import can_list as can_list
from beam_nifti.storage.stores import refuse_unwritable as refuse_unwritable
from beam_nifti.storage.stores import store_of, writable_store_of
from beam_nifti.support.outcomes import may_pass

ABSENT: Final = ""  # the version of a missing file
_BUFFER_BYTES: Final = 1 << 20


def stat(path: str, below: str | None = None) -> Stat:
    """Size, time and version of a file."""
    if not is_remote(path):
        status = disk.stat_file(path, below)
        return Stat(status.st_size, status.st_mtime)
    return store_of(path).stat(path)


def exists(path: str) -> bool:
    """Whether a file or folder is there."""
    if not is_remote(path):
        return os.path.exists(path)
    store = store_of(path)
    with contextlib.suppress(FileNotFoundError):
        store.stat(path)
        return True
    # An object store has no folders, only objects whose names begin alike.
    return can_list(path) and any(store.find(f"{path}/", limit=1))


def open_read(path: str, below: str | None = None) -> BinaryIO:
    """Open for reading: seekable and never decompressed. `below` is as for `create`."""
    return open_with_stat(path)[0] if is_remote(path) else disk.open_regular(path, below)


def has_changed(path: str, handle: BinaryIO, before: Stat) -> bool:
    """Whether a local file was written to since `open_with_stat`, whose results are the other two arguments.

    `s3://` and `gs://` read one version of an object; for other URLs it is unknown.
    """
    if is_remote(path):
        return False
    status = os.fstat(handle.fileno())
    return Stat(status.st_size, status.st_mtime) != before


def open_with_stat(path: str) -> tuple[BinaryIO, Stat]:
    """Open for reading, and return the file's `stat`; on S3 and Cloud Storage in one request."""
    if is_remote(path):
        reader = store_of(path).open(path)
        return io.BufferedReader(reader, _BUFFER_BYTES), reader.stat
    handle = open_read(path)
    status = os.fstat(handle.fileno())
    return handle, Stat(status.st_size, status.st_mtime)


def read(path: str, below: str | None = None) -> bytes:
    """The whole of a file."""
    with open_read(path, below) as handle:
        return handle.read()


class FileTooLargeError(OSError):
    """A file that has more bytes than it can need."""


def read_bounded(path: str, most: int, below: str | None = None) -> bytes:
    """The whole of a file of at most `most` bytes; a larger file is a FileTooLargeError."""
    if is_remote(path):
        data = read_head(path, most + 1)
        size = len(data)
    else:
        with disk.open_regular(path, below) as handle:
            size = os.fstat(handle.fileno()).st_size
            data = b"" if size > most else handle.read(size)
    if size > most:
        raise FileTooLargeError(f"has more than the {most:,} bytes that it may have")
    return data


def holds(path: str, content: bytes, below: str | None = None) -> bool:
    """Whether a file has this content."""
    try:
        return read_bounded(path, len(content), below) == content
    except FileTooLargeError:
        return False


def read_head(path: str, size: int) -> bytes:
    """The first `size` bytes of a file, or all of a shorter one."""
    if is_remote(path):
        with store_of(path).open(path, size) as reader:
            return reader.readall()
    with open_read(path) as handle:
        return handle.read(size)


def read_into(path: str, offset: int, buffer: memoryview, below: str | None = None) -> int:
    """Fill a buffer from an offset of a file, in one request or with a descriptor of its own.

    Returns:
        The number of bytes, smaller at the end of the file.
    """
    if is_remote(path):
        data = store_of(path).get_range(path, offset, len(buffer))
        buffer[: len(data)] = data
        return len(data)
    with open_read(path, below) as handle:
        handle.seek(offset)
        return handle.readinto(buffer)  # type: ignore[attr-defined, no-any-return]


def read_ranges(path: str, ranges: Sequence[tuple[int, int]], buffer: memoryview) -> None:
    """Read several ranges of a file; from a store in one request, which also reads the bytes between them.

    Args:
        path: path of the file.
        ranges: offset and size of each range, ascending.
        buffer: receives the ranges, one after the other; it has as many bytes as all of them together.

    Raises:
        EOFError: the file ends before one of them does.
        OSError: the file is not there or cannot be reached.
    """
    start, stop = ranges[0][0], sum(ranges[-1])
    ends = itertools.accumulate(size for _, size in ranges)
    if is_remote(path):
        data = memoryview(store_of(path).get_range(path, start, stop - start))
        if len(data) < stop - start:
            raise EOFError(f"ends before byte {stop}")
        for end, (offset, size) in zip(ends, ranges, strict=True):
            buffer[end - size : end] = data[offset - start :][:size]
        return
    with open_read(path) as handle:
        begin, at = 0, start
        for end, (offset, size), (following, _) in zip(ends, ranges, (*ranges[1:], (-1, 0)), strict=True):
            if offset + size == following:
                continue  # they are read together
            while begin < end:
                count = os.preadv(handle.fileno(), [buffer[begin:end]], at)
                if not count:
                    raise EOFError(f"ends before byte {offset + size}")
                begin, at = begin + count, at + count
            at = following


@contextlib.contextmanager
def create(path: str, below: str | None = None) -> Iterator[BinaryIO]:
    """Write a file, which appears whole when the block ends without an error, or not at all.

    In all functions that write or delete, no name of `path` after `below`, the folder that the user has
    named, may be a symbolic link; None if the user has named `path`. Remote paths have no links.
    """
    if is_remote(path):
        with Writer(writable_store_of(path), path) as writer:
            yield cast(BinaryIO, writer)
            writer.finish()
        return
    with disk.create(path, below) as local:
        yield local


def require_writable(path: str, what: str, *, is_folder: bool = False) -> None:
    """Refuse, before any work, a path that cannot be written to; leaves nothing behind.

    `what` is the option or argument that gives the path. Folders above it may be missing.

    Raises:
        OutputError: it cannot be written.
        OSError: it cannot be written at present.
    """
    refuse_unwritable(path, what)
    try:
        _write_probe(path, is_folder)
    except OSError as e:
        raise unwritable(path, what, e, is_folder=is_folder) from e


def unwritable(path: str, what: str, error: OSError, *, is_folder: bool = False) -> OutputError | OSError:
    """The error of `require_writable` for a failed write."""
    kind = "folder" if is_folder else "file"
    reason = f"{what} is {path}, which cannot be written: {error.strerror or error}; choose another {kind}"
    # A broken connection may come without a number, by which alone this one says that it may pass.
    return OSError(error.errno or errno.EIO, reason) if may_pass(error) else OutputError(reason)


def _write_probe(path: str, is_folder: bool) -> None:
    name = f"{uuid.uuid4().hex}.tmp"
    if is_remote(path):
        probe = f"{path}/{name}" if is_folder else f"{path}.{name}"
        write(probe, b"")
        delete(probe)
        return
    if is_folder and os.path.exists(path) and not os.path.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, "it is a file", path)
    if not is_folder and (kind := disk.special_kind(path)):  # which a file would replace
        raise OSError(errno.EINVAL, f"it is a {kind}", path)
    with contextlib.suppress(FileNotFoundError):
        os.stat(f"{path}/{name}" if is_folder else f"{path}.{name}")  # or the name may be too long
    folder = path if is_folder else os.path.dirname(path) or "."
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder) or "."
    if not os.path.isdir(folder):
        target = "a link to what is not there" if os.path.islink(folder) else "no folder"
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is {target}", folder)
    disk.probe_folder(folder)


def write(path: str, data: bytes, below: str | None = None) -> None:
    """Write a file whole or not at all."""
    if is_remote(path):
        writable_store_of(path).put(path, data)
        return
    with disk.create(path, below) as handle:
        handle.write(data)


def read_version(path: str, size: int) -> tuple[bytes, str | None]:
    """As `read_head` of a remote file, and its version for `write_if`; None if the store has no versions."""
    return writable_store_of(path).get_version(path, size)


def write_if(path: str, data: bytes, version: str | None) -> None:
    """Replace one version of a remote file, from `read_version`, or create it if the version is ABSENT.

    Without a version, any is replaced. Another version is a FileExistsError, and an absent file a
    FileNotFoundError.
    """
    writable_store_of(path).put(path, data, version)


def link(source: str, target: str, below: str | None = None, source_below: str | None = None) -> None:
    """Give a file a second name, replacing any file of that name; a copy if links are not possible."""
    if is_remote(source) or is_remote(target):
        if scheme_of(source) != scheme_of(target):
            with open_read(source, source_below) as origin, create(target, below) as copy:
                shutil.copyfileobj(origin, copy, _BUFFER_BYTES)
        else:
            writable_store_of(target).copy(source, target)
        return
    disk.link(source, target, below, source_below)


def delete(path: str, below: str | None = None) -> None:
    """Remove a file; one that is not there is no error."""
    if not is_remote(path):
        disk.delete(path, below)
    else:
        writable_store_of(path).delete([path])


def delete_folder(folder: str, below: str | None = None) -> None:
    """Remove an empty folder; object stores have none."""
    if not is_remote(folder):
        disk.delete_folder(folder, below)


def delete_tree(folder: str, below: str | None = None) -> None:
    """Remove a folder with its contents. It may be absent, or be written to at the same time."""
    if not is_remote(folder):
        disk.delete_tree(folder, below)
        return
    store = writable_store_of(folder)
    store.delete(store.find(f"{folder}/", deep=True)[0])
