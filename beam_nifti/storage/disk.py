"""Files of the local disk. The only module that creates, replaces or removes any.

Folders are opened one name at a time, below a folder that the user has named, and files by names relative to
an open folder. A symbolic link below that folder is an OutputError, also one that appears between two steps.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from typing import BinaryIO, Final

from beam_nifti.errors import OutputError
from beam_nifti.storage.names import is_remote, local_path
from beam_nifti.support.wording import bytes_text, one_line

_FULL: Final = frozenset([errno.ENOSPC, errno.EDQUOT, errno.EFBIG])  # a file cannot grow
_TREE_ATTEMPTS: Final = 3  # at removing a folder to which a worker may still write

_KINDS: Final = {
    stat.S_ISDIR: "folder",
    stat.S_ISFIFO: "FIFO",
    stat.S_ISSOCK: "socket",
    stat.S_ISCHR: "device",
    stat.S_ISBLK: "device",
}
"""What a path may be besides a file."""

_TEMPORARY: Final = re.compile(r"(?P<name>.+)\.[0-9a-f]{32}\.tmp")
_FOLDER: Final = os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def linked(path: str) -> OutputError:
    """The error for a symbolic link in place of a file or folder of the build."""
    return OutputError(
        f"{path}: is a symbolic link, which a build does not follow, because it writes only in OUTPUT; "
        "remove the link, and give --temp-location for temporary files on another disk"
    )


@contextlib.contextmanager
def _open_folder(path: str, below: str | None, *, make: bool = False) -> Iterator[int]:
    """The descriptor of a folder; with `make`, missing folders are created.

    No name of `path` after `below`, which the user has named, may be a link; None if the user has named
    `path`.
    """
    base = path if below is None else below
    names = [] if below is None else path.removeprefix(below).strip("/").split("/")
    if not f"{path}/".startswith(f"{base.rstrip('/')}/") or ".." in names:
        raise OutputError(f"{path}: is not in {base}; a build writes and deletes only there")
    if make:
        os.makedirs(base or ".", exist_ok=True)
    descriptor = os.open(base or ".", _FOLDER)
    try:
        for name in filter(None, names):
            base = f"{base}/{name}"
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, dir_fd=descriptor)
            with _full_path(base, name), _refusing_link(name, base, descriptor):
                inner = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def _is_link(name: str, folder: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _refusing_link(name: str, path: str, folder: int) -> Iterator[None]:
    """Replace the error of opening a link by one that names it."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK) and _is_link(name, folder):
            raise linked(path) from e
        raise


@contextlib.contextmanager
def _full_path(path: str, *names: str) -> Iterator[None]:
    """Put the whole path into errors of calls that get one of these names and an open folder."""
    try:
        yield
    except OSError as e:
        if e.filename in names:
            e.filename, e.filename2 = path, None
        raise


@contextlib.contextmanager
def _replacing(path: str, below: str | None) -> Iterator[tuple[str, int]]:
    """A temporary name and its folder's descriptor; at the end of the block the file is renamed to `path`."""
    parent, name = os.path.split(path)
    temporary = f"{name}.{uuid.uuid4().hex}.tmp"
    with _open_folder(parent, below, make=True) as folder, _full_path(path, name, temporary):
        try:
            yield temporary, folder
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            with contextlib.suppress(FileNotFoundError):
                # Still there after an error, or if both are names of one file.
                os.unlink(temporary, dir_fd=folder)


@contextlib.contextmanager
def create(path: str, below: str | None = None) -> Iterator[BinaryIO]:
    """Write a file, which appears whole when the block ends without an error, or not at all."""
    with _replacing(path, below) as (temporary, folder):
        descriptor = os.open(temporary, _NEW_FILE, 0o666, dir_fd=folder)
        with naming(path), os.fdopen(descriptor, "wb") as handle:
            yield handle


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Add to an error of a full disk the file that was written, and the free space."""
    try:
        yield
    except OSError as e:
        if e.errno in _FULL:
            e.filename = path
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(os.path.dirname(path)).free
                e.strerror = f"{os.strerror(e.errno)} ({bytes_text(free)} free there)"
        raise


@contextlib.contextmanager
def _locate(path: str, below: str | None) -> Iterator[tuple[str, int | None]]:
    """The name of a file, and the descriptor of its folder; or the path itself and None."""
    if below is None:
        yield path, None
        return
    parent, name = os.path.split(path)
    with _open_folder(parent, below) as folder, _full_path(path, name), _refusing_link(name, path, folder):
        if _is_link(name, folder):
            raise linked(path)
        yield name, folder


def link(source: str, target: str, below: str | None = None, source_below: str | None = None) -> None:
    """Give a file's content a second name, replacing an existing file; a copy if links are not possible."""
    with _locate(source, source_below) as (name, origin), _replacing(target, below) as (temporary, folder):
        try:
            os.link(name, temporary, src_dir_fd=origin, dst_dir_fd=folder, follow_symlinks=False)
        except OSError:  # another device, or a file system without links
            opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=origin)
            with os.fdopen(opened, "rb") as content:
                descriptor = os.open(temporary, _NEW_FILE, 0o666, dir_fd=folder)
                with naming(target), os.fdopen(descriptor, "wb") as copy:
                    shutil.copyfileobj(content, copy)
        if _is_link(temporary, folder):
            raise linked(source)


def delete(path: str, below: str | None = None) -> None:
    """Remove a file; one that is not there is no error. Of a symbolic link the link itself is removed."""
    parent, name = os.path.split(path)
    with (
        contextlib.suppress(FileNotFoundError),
        _open_folder(parent, below) as folder,
        _full_path(path, name),
    ):
        os.unlink(name, dir_fd=folder)


def delete_folder(path: str, below: str | None = None) -> None:
    """Remove an empty folder; one that is not there, or is not empty, is no error."""
    parent, name = os.path.split(path)
    try:
        with _open_folder(parent, below) as folder, _full_path(path, name):
            os.rmdir(name, dir_fd=folder)
    except OSError as e:
        if e.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise


def delete_tree(path: str, below: str | None = None) -> None:
    """Remove a folder with its contents. It may be absent, or be written to at the same time."""
    parent, name = os.path.split(path)
    with contextlib.suppress(FileNotFoundError), _open_folder(parent, below) as folder:
        for _ in range(_TREE_ATTEMPTS):
            if _is_link(name, folder):
                raise linked(path)
            try:
                with _full_path(path, name):
                    shutil.rmtree(name, dir_fd=folder)
            except OSError as e:
                if e.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                    raise
            if not os.path.lexists(path):
                return


def open_lock(path: str, *, make: bool = True) -> int:
    """The descriptor of a lock file, whose folder the user has named."""
    parent, name = os.path.split(path)
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_CREAT if make else 0)
    with (
        _open_folder(parent, None, make=make) as folder,
        _full_path(path, name),
        _refusing_link(name, path, folder),
    ):
        return os.open(name, flags, 0o666, dir_fd=folder)


def probe_folder(folder: str) -> None:
    """Try to write to a folder; leaves nothing behind."""
    with tempfile.TemporaryFile(dir=folder):  # without a name, where the file system knows such files
        pass


def stat_file(path: str, below: str | None = None) -> os.stat_result:
    """The stat of a file."""
    with _locate(path, below) as (name, folder):
        return os.stat(name, dir_fd=folder, follow_symlinks=below is None)


def open_regular(path: str, below: str | None = None) -> BinaryIO:
    """Open a regular file for reading. Others may wait for a writer, never end, or act when opened."""
    no_link = os.O_NOFOLLOW if below is not None else 0

    def opener(_: str, flags: int) -> int:
        with _locate(path, below) as (name, folder):
            _require_regular(path, os.stat(name, dir_fd=folder).st_mode)
            descriptor = os.open(name, flags | os.O_NONBLOCK | no_link, dir_fd=folder)
        try:
            _require_regular(path, os.fstat(descriptor).st_mode)  # another one may have come in between
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    return open(path, "rb", opener=opener)


def special_kind(path: str) -> str | None:
    """What a path leads to that is no regular file, such as "FIFO"; None for files and what is not there."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return None
    return None if stat.S_ISREG(mode) else _kind_of(mode)


def _kind_of(mode: int) -> str:
    return next((name for is_kind, name in _KINDS.items() if is_kind(mode)), "file")


def _require_regular(path: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"is a {_kind_of(mode)}, not a file; give a regular file", path)


def broken_link(path: str) -> str | None:
    """What a symbolic link to a missing file is, as in git-annex, and the remedy; None for other paths."""
    if is_remote(path) or not os.path.islink(path) or os.path.exists(path):
        return None
    if "annex/objects/" in os.readlink(path):
        return "a git-annex link without its content; run `git annex get` (or `datalad get`) on the file"
    return "a symbolic link to a file that is not there; copy that file"


def require_inside(path: str, folder: str) -> None:
    """Refuse, with an OSError, a link that leads out of its folder, or a file that is not regular."""
    if is_remote(path):
        return
    target = os.path.realpath(path)
    if not target.startswith(f"{os.path.realpath(local_path(folder)).rstrip('/')}/"):
        shown = one_line(target)  # as no error of this package escapes it
        reason = f"is a link that leads out of its dataset, to {shown}; replace it with the file"
        raise OSError(errno.EINVAL, reason, path)
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(target).st_mode
        if not stat.S_ISDIR(mode):
            _require_regular(path, mode)


def temporary_of(name: str) -> str | None:
    """The file that a temporary file of a killed process was to become; None for other names.

    >>> temporary_of(f"failures.jsonl.{'0' * 32}.tmp")
    'failures.jsonl'
    """
    match = _TEMPORARY.fullmatch(name)
    return match["name"] if match else None
