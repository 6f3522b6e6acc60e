"""Files, local or remote, by their paths. The only module by which other folders read and write them.

The local disk is `disk`'s; `stores` says what serves a URL. What is written appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import uuid
from collections.abc import Iterator
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
from beam_nifti.storage.stores import refuse_read_only as refuse_read_only
from beam_nifti.storage.stores import store_of, writable_store_of
from beam_nifti.support.outcomes import may_pass

ABSENT: Final = ""
"""The version of a file that is not there."""

_BUFFER_BYTES: Final = 1 << 20


def stat(path: str, below: str | None = None) -> Stat:
    """Size, time and version of a file.

    Args:
        path: of the file.
        below: as of `create`.

    Raises:
        OutputError: a name below `below` is a symbolic link.
        FileNotFoundError: there is none.
        OSError: it cannot be reached.
    """
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
    """Open for reading; seekable; never decompressed, whatever the path ends in.

    Args:
        path: of the file.
        below: as of `create`, in all functions that read what a build keeps in its output.

    Raises:
        OutputError: a name below `below` is a symbolic link.
        OSError: the file is not there or cannot be reached.
    """
    return open_with_stat(path)[0] if is_remote(path) else disk.open_regular(path, below)


def has_changed(path: str, handle: BinaryIO, before: Stat) -> bool:
    """Whether a local file was written to since `open_with_stat`, which gave the other two.

    `s3://` and `gs://` read one version of an object; of other URLs it is not known.
    """
    if is_remote(path):
        return False
    status = os.fstat(handle.fileno())
    return Stat(status.st_size, status.st_mtime) != before


def open_with_stat(path: str) -> tuple[BinaryIO, Stat]:
    """Open for reading, and say what `stat` says of the file; on S3 and Cloud Storage in one request.

    Raises:
        OSError: the file is not there or cannot be reached.
    """
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
    """The whole of a file that has at most so many bytes; of a larger one nothing is kept.

    Raises:
        FileTooLargeError: it has more.
        OSError: the file is not there or cannot be reached.
    """
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
    """Whether a file has this content; of a larger one nothing is kept.

    Raises:
        OSError: the file is not there or cannot be reached.
    """
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
    """Fill a buffer from a place of a file; in one request, and with a descriptor of this call's own.

    Args:
        path: of the file.
        offset: of the first byte.
        buffer: of as many bytes as are wanted.
        below: as of `create`.

    Returns:
        How many bytes there were: fewer where the file ends before.

    Raises:
        OSError: the file is not there or cannot be reached.
    """
    if is_remote(path):
        data = store_of(path).get_range(path, offset, len(buffer))
        buffer[: len(data)] = data
        return len(data)
    with open_read(path, below) as handle:
        handle.seek(offset)
        return handle.readinto(buffer)  # type: ignore[attr-defined, no-any-return]


@contextlib.contextmanager
def create(path: str, below: str | None = None) -> Iterator[BinaryIO]:
    """Write a file that appears under its name whole, when the block ends well, or not at all.

    Args:
        path: of the file.
        below: as in all functions that write or delete, the folder that the user has named and that holds
            `path`; below it no name may be a symbolic link. None where the user has named `path`. Without
            meaning for remote paths.
    """
    if is_remote(path):
        with Writer(writable_store_of(path), path) as writer:
            yield cast(BinaryIO, writer)
            writer.finish()
        return
    with disk.create(path, below) as local:
        yield local


def require_writable(path: str, what: str, *, is_folder: bool = False) -> None:
    """Refuse, before any work, a path to which nothing can be written; leaves nothing behind.

    Args:
        path: absolute path or URL. Folders above it may be missing: writing makes them.
        what: the option or argument that gives it, for the message.
        is_folder: whether it is a folder for files rather than a file.

    Raises:
        OutputError: it cannot be written as it stands.
        OSError: it cannot be written now, but that may pass.
    """
    refuse_read_only(path, what)
    try:
        _write_probe(path, is_folder)
    except OSError as e:
        raise unwritable(path, what, e, is_folder=is_folder) from e


def unwritable(path: str, what: str, error: OSError, *, is_folder: bool = False) -> OutputError | OSError:
    """What `require_writable` raises for an error of writing."""
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
    """As `read_head` of a remote file, and its version for `write_if`; None where the store keeps none.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be reached.
    """
    return writable_store_of(path).get_version(path, size)


def write_if(path: str, data: bytes, version: str | None) -> None:
    """Write a remote file in place of one version of it; in place of any if the version is None.

    Args:
        path: of the file.
        data: all of it.
        version: as `read_version` gave it, or ABSENT if there shall be none yet.

    Raises:
        FileExistsError: there is another version.
        FileNotFoundError: it is gone.
        OSError: it cannot be reached.
    """
    writable_store_of(path).put(path, data, version)


def link(source: str, target: str, below: str | None = None, source_below: str | None = None) -> None:
    """Give a file's content a second name, replacing what had it; a copy where links are not possible."""
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
    """Remove a folder if it is empty; an object store has none that are."""
    if not is_remote(folder):
        disk.delete_folder(folder, below)


def delete_tree(folder: str, below: str | None = None) -> None:
    """Remove a folder and all in it; one that is not there, or is written to meanwhile, is no error."""
    if not is_remote(folder):
        disk.delete_tree(folder, below)
        return
    store = writable_store_of(folder)
    store.delete(store.find(f"{folder}/", deep=True)[0])
