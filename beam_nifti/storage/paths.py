"""Files, local or remote. The only module that knows how to reach a path.

URLs with the schemes `s3://` and `gs://` go through `s3` and `gcs`. `http://`, `https://` and `hdfs://`, by
`http`, are read-only, and so is what fsspec serves, such as `az://`, by `fsspec`; but another scheme that
Beam knows goes through its FileSystems. Client libraries are imported only then. All else is the local disk.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fnmatch
import glob as local_glob
import io
import itertools
import os
import re
import shutil
import stat as stat_module
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Final, TypeVar, cast

from beam_nifti.errors import OutputError, UsageError
from beam_nifti.storage import disk
from beam_nifti.storage.fsspec import Fsspec
from beam_nifti.storage.gcs import Gcs
from beam_nifti.storage.http import Http, WebHdfs
from beam_nifti.storage.object_store import ObjectStore, Store, Writer
from beam_nifti.storage.object_store import Stat as Stat
from beam_nifti.storage.object_store import hiding_hosts as hiding_hosts
from beam_nifti.storage.s3 import S3
from beam_nifti.support.outcomes import may_pass

T = TypeVar("T")
ABSENT: Final = ""
"""The version of a file that is not there."""

naming = disk.naming
_BUFFER_BYTES: Final = 1 << 20

_STORES: Final[dict[str, Callable[[Any], Store]]] = {
    "s3": S3,
    "gs": Gcs,
    "http": Http,
    "https": Http,
    "hdfs": WebHdfs,
}
"""By scheme what serves it; Beam or fsspec the others."""

_EXTRAS: Final = {"s3": "aws", "gs": "gcp", "az": "azure", "abfs": "azure", "abfss": "azure"}
"""By scheme the extra of this package that it needs."""

_REMEDY: Final = (
    "use the local disk, s3:// (install beam-nifti[aws]), gs:// (beam-nifti[gcp]), "
    "az:// (beam-nifti[azure]), hdfs:// or https://, or install fsspec and what it needs for this scheme"
)

_FILE_URL: Final = re.compile(r"file:(?://(?:localhost)?(?=/)|(?=/(?!/)))(?P<path>/.*)", re.I | re.S)
_ENCODED_MAGIC: Final = re.compile(r"%(?:2A|3F|5B)", re.I)
"""The characters *, ? and [ in a URL."""

_BARE_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/{2,}")
_WINDOWS: Final = re.compile(r"[A-Za-z]:[\\/]|\\\\")

_KINDS: Final = {
    stat_module.S_ISFIFO: "FIFO",
    stat_module.S_ISSOCK: "socket",
    stat_module.S_ISCHR: "device",
    stat_module.S_ISBLK: "device",
}
"""What a path may be besides a file and a folder."""

_stores: dict[str, tuple[int, Any, Store]] = {}
_stores_lock = threading.Lock()
_TEMPORARY = re.compile(r"(?P<name>.+)\.[0-9a-f]{32}\.tmp")


def local_path(path: str) -> str:
    """The local path that a file:// URL names; all other paths as they are.

    >>> local_path("file:///data/sub%201.nii"), local_path("file://localhost/data"), local_path("s3://bucket")
    ('/data/sub 1.nii', '/data', 's3://bucket')
    """
    match = _FILE_URL.fullmatch(path)
    return urllib.parse.unquote(match["path"], errors="surrogateescape") if match else path


def is_remote(path: str) -> bool:
    """Whether a path names an object store or cluster file system rather than the local disk.

    Paths of other computers, which nothing can reach, count as remote: they are refused when they are opened.

    >>> is_remote("s3://bucket/a.nii.gz"), is_remote("/data/a.nii.gz"), is_remote("file:///data/a.nii.gz")
    (True, False, False)
    """
    return ("://" in path and not _FILE_URL.fullmatch(path)) or _WINDOWS.match(path) is not None


def join(base: str, *parts: str) -> str:
    """Append to a folder; a part that is absolute or a URL starts afresh, and one of file:// becomes a path.

    >>> join("s3://bucket/study", "sub-01/T1w.nii.gz")
    's3://bucket/study/sub-01/T1w.nii.gz'
    >>> join("/data", "/scans/a.nii")
    '/scans/a.nii'
    """
    base = local_path(base)
    for part in map(local_path, parts):
        if is_remote(part) or part.startswith("/"):
            base = part
        else:
            base = f"{base.rstrip('/')}/{part}" if base else part
    return base


def dirname(path: str) -> str:
    """The folder that holds a path.

    >>> dirname("s3://bucket/study/manifest.tsv"), dirname("manifest.tsv")
    ('s3://bucket/study', '')
    """
    return path.rpartition("/")[0]


def absolute(path: str | os.PathLike[str]) -> str:
    """A path that means the same from every working folder: `~` is the home folder, a file:// URL a path.

    Raises:
        UsageError: it is a URL that ends after its scheme.
    """
    path = local_path(os.fspath(path))
    if _BARE_SCHEME.fullmatch(path):
        raise UsageError(f"{path} is a URL without a bucket or host; was a variable not set?")
    return path.rstrip("/") if is_remote(path) else os.path.abspath(os.path.expanduser(path))


def resolved(path: str) -> str:
    """A path as `absolute` makes it, without symbolic links in its folders; the file itself may be one."""
    path = absolute(path)
    return (
        path
        if is_remote(path)
        else os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    )


def is_within(path: str, folder: str) -> bool:
    """Whether a path leads into a folder, also by symbolic links."""
    if is_remote(folder):
        return absolute(path).startswith(f"{absolute(folder)}/")
    return resolved(path).startswith(f"{os.path.realpath(absolute(folder))}/")


def is_same(path: str, other: str) -> bool:
    """Whether two paths lead to one file, also by links of both kinds."""
    path, other = resolved(path), resolved(other)
    if path == other or is_remote(path) or is_remote(other):
        return path == other
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


def scheme_of(path: str) -> str:
    """What a URL begins with: "s3"."""
    return path.partition("://")[0]


def _is_of_beam(scheme: str) -> bool:
    from apache_beam.io.filesystem import FileSystem

    return scheme not in _STORES and any(s.scheme() == scheme for s in FileSystem.get_all_subclasses())


def _wrong_with(path: str) -> str | None:
    """What is wrong with a path that looks like a URL and is none of a store."""
    if _WINDOWS.match(path):
        return "a Windows path; give the path at which this computer has the file"
    if scheme_of(path).lower() == "file":
        return "a file:// URL that names another computer; write file:///FOLDER/FILE for a file of this one"
    return None


def _store(path: str) -> Store | None:
    """What serves a URL; None where Beam does."""
    scheme = scheme_of(path)
    if problem := _wrong_with(path):
        raise OSError(errno.EINVAL, problem, path)
    from apache_beam.io.filesystems import FileSystems
    from apache_beam.options.pipeline_options import PipelineOptions

    make = _STORES.get(scheme)
    if _is_of_beam(scheme):
        return None
    options = FileSystems._pipeline_options
    with _stores_lock:
        # Connections must not be shared by processes.
        pid, known, store = _stores.get(scheme, (0, None, None))
        if store is None or pid != os.getpid() or known is not options:
            try:
                given = options or PipelineOptions([])
                store = make(given) if make else Fsspec(given, scheme)
            except ImportError as e:
                if isinstance(e.__cause__, ValueError):  # no package that is known could serve it
                    reason = f"nothing here serves {scheme}://; {_REMEDY}"
                    raise OSError(errno.EINVAL, reason, path) from e
                remedy = f"install beam-nifti[{_EXTRAS[scheme]}]" if scheme in _EXTRAS else _REMEDY
                raise OSError(f"{path}: nothing here serves {scheme}:// ({e}); {remedy}") from e
            _stores[scheme] = os.getpid(), options, store
    return store


def _writable(path: str) -> ObjectStore | None:
    """What a URL is written by; None where Beam does it.

    Raises:
        OSError: it can only be read.
    """
    store = _store(path)
    if store is None or isinstance(store, ObjectStore):
        return store
    raise OSError(
        f"{path}: {scheme_of(path)}:// is read-only; write to the local disk, s3:// or gs://, and "
        "copy the files from there"
    )


def refuse_read_only(path: str, what: str) -> None:
    """Refuse a URL to which nothing can ever be written, by its scheme.

    Args:
        path: absolute path or URL.
        what: the option or argument that gives it, for the message.

    Raises:
        OutputError: it can only be read.
    """
    scheme = scheme_of(path)
    if not is_remote(path) or scheme in ("s3", "gs") or _is_of_beam(scheme):
        return
    read_only = f"{scheme}:// is read-only; write to the local disk, s3:// or gs://"
    raise OutputError(f"{what} is {path}: {_wrong_with(path) or read_only}")


def can_list(folder: str) -> bool:
    """Whether files can be looked for in a folder; a web server does not say what it has."""
    return _STORES.get(scheme_of(folder)) is not Http


def _remote() -> Any:
    from apache_beam.io.filesystems import FileSystems

    return FileSystems


def _translated(path: str, action: Callable[[], T]) -> T:
    """Run a call into Beam's FileSystems; its errors come back as OSError."""
    from apache_beam.io.filesystem import BeamIOError

    try:
        return action()
    except BeamIOError as e:
        raise OSError(f"{path}: {e}") from e
    except OSError:
        raise
    except Exception as e:  # a client library has errors of its own
        raise OSError(f"{path}: {type(e).__name__}: {e}") from e


def stat(path: str, below: str | None = None) -> Stat:
    """Size, time and version of a file.

    Args:
        path: of the file.
        below: as of `create`.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be reached.
    """
    if not is_remote(path):
        with disk.locate(path, below) as (name, folder):
            status = os.stat(name, dir_fd=folder, follow_symlinks=below is None)
        return Stat(status.st_size, status.st_mtime)
    if store := _store(path):
        return store.stat(path)
    matches = _translated(path, lambda: _remote().match([path]))[0].metadata_list
    if not matches:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
    return Stat(matches[0].size_in_bytes, matches[0].last_updated_in_seconds or 0.0)


def broken_link(path: str) -> str | None:
    """What a symbolic link to a file that is not there is, and the remedy; None for other paths.

    In a clone of a git-annex or DataLad repository every file is such a link until its content is fetched.
    """
    if is_remote(path) or not os.path.islink(path) or os.path.exists(path):
        return None
    if "annex/objects/" in os.readlink(path):
        return "a git-annex link without its content; run `git annex get` (or `datalad get`) on the file"
    return "a symbolic link to a file that is not there; copy that file"


def exists(path: str) -> bool:
    """Whether a file or folder is there."""
    if not is_remote(path):
        return os.path.exists(path)
    if store := _store(path):
        with contextlib.suppress(FileNotFoundError):
            store.stat(path)
            return True
        return can_list(path) and any(store.find(f"{path}/", limit=1))
    if _translated(path, lambda: _remote().exists(path)):
        return True
    # An object store has no folders, only objects whose names begin alike.
    return bool(_translated(path, lambda: _remote().match([f"{path}/**"], [1]))[0].metadata_list)


def open_read(path: str, below: str | None = None) -> BinaryIO:
    """Open for reading; seekable; never decompressed, whatever the path ends in.

    Args:
        path: of the file.
        below: as of `create`, in all functions that read what a build keeps in its output.

    Raises:
        OutputError: a name below `below` is a symbolic link.
        OSError: the file is not there or cannot be reached.
    """
    if not is_remote(path):
        return _open_regular(path, below)
    if store := _store(path):
        return io.BufferedReader(store.open(path), _BUFFER_BYTES)
    from apache_beam.io.filesystem import CompressionTypes

    plain = CompressionTypes.UNCOMPRESSED
    try:
        handle = _translated(path, lambda: _remote().open(path, compression_type=plain))
    except OSError as e:  # few of Beam's file systems say that it is not there
        if isinstance(e, FileNotFoundError) or _translated(path, lambda: _remote().exists(path)):
            raise
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", path) from e
    return cast(BinaryIO, handle)


def _open_regular(path: str, below: str | None = None) -> BinaryIO:
    """Open a local file, but nothing that waits for a writer, never ends, or acts when it is opened."""
    no_link = os.O_NOFOLLOW if below is not None else 0

    def opener(_: str, flags: int) -> int:
        with disk.locate(path, below) as (name, folder):
            _require_regular(path, os.stat(name, dir_fd=folder).st_mode)
            descriptor = os.open(name, flags | os.O_NONBLOCK | no_link, dir_fd=folder)
        try:
            _require_regular(path, os.fstat(descriptor).st_mode)  # another one may have come in between
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    return open(path, "rb", opener=opener)


def _require_regular(path: str, mode: int) -> None:
    if stat_module.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat_module.S_ISREG(mode):
        kind = next(name for is_kind, name in _KINDS.items() if is_kind(mode))
        raise OSError(errno.EINVAL, f"is a {kind}, not a file; give a regular file", path)


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
        if store := _store(path):
            reader = store.open(path)
            return io.BufferedReader(reader, _BUFFER_BYTES), reader.stat
        found = stat(path)
        return open_read(path), found
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
        with _open_regular(path, below) as handle:
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


def require_inside(path: str, folder: str) -> None:
    """Refuse what a folder names and does not hold: links that lead out of it, and what is no regular file.

    A file that is not there is none of these. In stores there are no links.

    Raises:
        OSError: it is one of these.
    """
    if is_remote(path):
        return
    target = os.path.realpath(path)
    if not target.startswith(f"{os.path.realpath(local_path(folder)).rstrip('/')}/"):
        reason = f"is a link that leads out of its dataset, to {target}; replace it with the file"
        raise OSError(errno.EINVAL, reason, path)
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(target).st_mode
        if not stat_module.S_ISDIR(mode):
            _require_regular(path, mode)


def read_head(path: str, size: int) -> bytes:
    """The first `size` bytes of a file, or all of a shorter one."""
    if is_remote(path) and (store := _store(path)):
        with store.open(path, size) as reader:
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
    if is_remote(path) and (store := _store(path)):
        data = store.get_range(path, offset, len(buffer))
    else:
        with open_read(path, below) as handle:
            handle.seek(offset)
            if not is_remote(path):
                return handle.readinto(buffer)  # type: ignore[attr-defined, no-any-return]
            data = handle.read(len(buffer))
    buffer[: len(data)] = data
    return len(data)


@contextlib.contextmanager
def create(path: str, below: str | None = None) -> Iterator[BinaryIO]:
    """Write a file that appears under its name whole, when the block ends well, or not at all.

    Args:
        path: of the file.
        below: as in all functions that write or delete, the folder that the user has named and that holds
            `path`; below it no name may be a symbolic link. None where the user has named `path`. Without
            meaning for remote paths.
    """
    if is_remote(path) and (store := _writable(path)):
        with Writer(store, path) as writer:
            yield cast(BinaryIO, writer)
            writer.finish()
        return
    if is_remote(path):  # an object appears when its upload is closed
        from apache_beam.io.filesystem import CompressionTypes

        plain = CompressionTypes.UNCOMPRESSED
        handle = _translated(path, lambda: _remote().create(path, compression_type=plain))
        try:
            yield handle
        except BaseException:
            with contextlib.suppress(Exception):
                handle.close()  # which uploads what there is of it
                delete(path)
            raise
        handle.close()
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
    if not is_folder and os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", path)
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
    if is_remote(path) and (store := _writable(path)):
        store.put(path, data)
        return
    with create(path, below) as handle:
        handle.write(data)


def read_version(path: str, size: int) -> tuple[bytes, str | None]:
    """As `read_head` of a remote file, and its version for `write_if`; None where the store keeps none.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be reached.
    """
    if store := _writable(path):
        return store.get_version(path, size)
    return read_head(path, size), None


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
    if version is not None and (store := _writable(path)):
        store.put(path, data, version)
    else:
        write(path, data)


def link(source: str, target: str, below: str | None = None, source_below: str | None = None) -> None:
    """Give a file's content a second name, replacing what had it; a copy where links are not possible."""
    if is_remote(source) or is_remote(target):
        if scheme_of(source) != scheme_of(target):
            with open_read(source) as origin, create(target, below) as copy:
                shutil.copyfileobj(origin, copy, _BUFFER_BYTES)
        elif store := _writable(target):
            store.copy(source, target)
        else:
            _translated(target, lambda: _remote().copy([source], [target]))
        return
    disk.link(source, target, below, source_below)


def list_files(folder: str, pattern: str = "*") -> list[str]:
    """Names of the files in a folder that match a glob, sorted; none where there is no folder."""
    if not is_remote(folder):
        try:
            with os.scandir(folder) as entries:
                names = [e.name for e in entries if e.is_file()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(fnmatch.filter(names, pattern))
    if store := _store(folder):
        objects, _ = store.find(f"{folder}/")
        return sorted(fnmatch.filter((path[len(folder) + 1 :] for path in objects), pattern))
    found = _translated(folder, lambda: _remote().match([f"{folder}/{pattern}"]))[0].metadata_list
    names = [m.path[len(folder) + 1 :] for m in found]
    return sorted(n for n in names if "/" not in n)


def list_folders(folder: str) -> list[str]:
    """Names of the folders in a folder, sorted; none where there is no folder."""
    if not is_remote(folder):
        try:
            with os.scandir(folder) as entries:
                return sorted(e.name for e in entries if _is_folder(e))
        except (FileNotFoundError, NotADirectoryError):
            return []
    if store := _store(folder):
        _, folders = store.find(f"{folder}/")
        return sorted(path[len(folder) + 1 : -1] for path in folders)
    found = _translated(folder, lambda: _remote().match([f"{folder}/**"]))[0].metadata_list
    names = [m.path[len(folder) + 1 :] for m in found]
    return sorted({n.partition("/")[0] for n in names if "/" in n})


def list_tree(folder: str, prefix: str, depth: int) -> Iterator[str]:
    """Paths, relative to a folder, of the files below those of its folders that begin alike.

    Args:
        folder: local or a URL.
        prefix: of the names of its folders.
        depth: folders below `folder` that a path has at most.

    Yields:
        In no order. Files and folders whose names begin with a dot are left out.

    Raises:
        FileNotFoundError: there is no such folder on the local disk.
        OSError: a folder cannot be listed.
    """
    if not is_remote(folder):
        with os.scandir(folder) as entries:
            tops = [e.name for e in entries if e.name.startswith(prefix) and _is_folder(e)]
        for name in tops:
            yield from _list_below(folder, name, depth)
        return
    for path in _list_deep(f"{folder}/{prefix}"):
        relative = path[len(folder) + 1 :]
        if 0 < relative.count("/") <= depth and "/." not in relative:
            yield relative


def _list_below(folder: str, relative: str, depth: int) -> Iterator[str]:
    with os.scandir(f"{folder}/{relative}") as entries:
        found = [(f"{relative}/{e.name}", _is_folder(e)) for e in entries if not e.name.startswith(".")]
    for path, is_folder in found:
        if not is_folder:
            yield path
        elif depth > 1:
            yield from _list_below(folder, path, depth - 1)


def _list_deep(prefix: str) -> list[str]:
    """Remote files whose paths begin so."""
    if store := _store(prefix):
        return store.find(prefix, deep=True)[0]
    found = _translated(prefix, lambda: _remote().match([f"{prefix}**"]))[0].metadata_list
    return [m.path for m in found]


def require_text(paths: Iterable[str]) -> None:
    """Refuse names that our files, which are UTF-8, cannot hold."""
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{os.fsencode(path)!r} is not UTF-8 text; correct it, or rename the file or folder"
            ) from None


def glob(pattern: str) -> list[str]:
    """Files whose paths match, sorted: `*`, `?` and `[…]` stand for parts of one name, `**` for any folders.

    Names that begin with a dot match only where the pattern has the dot. An encoded character of a file://
    URL stands for itself. On the local disk `**` follows symbolic links, but enters every folder once.

    Raises:
        OSError: a folder below `**` cannot be listed.
    """
    if _FILE_URL.fullmatch(pattern):
        pattern = local_path(_ENCODED_MAGIC.sub(lambda match: f"[{match[0]}]", pattern))
    if not is_remote(pattern):
        return sorted(path for path in _glob_local(os.path.expanduser(pattern)) if not os.path.isdir(path))
    parts = pattern.split("/")
    # The scheme and the bucket, and the folders before the first that is not plain.
    plain = 3 + sum(1 for _ in itertools.takewhile(lambda p: not local_glob.has_magic(p), parts[3:-1]))
    folder = "/".join(parts[:plain])
    below = (path[len(folder) + 1 :] for path in _list_deep(f"{folder}/"))
    return sorted(f"{folder}/{path}" for path in below if _is_match(path.split("/"), parts[plain:]))


def _glob_local(pattern: str) -> Iterator[str]:
    parts = pattern.split("/")
    if "**" not in parts:
        yield from local_glob.iglob(pattern)
        return
    at = parts.index("**")
    start, rest = "/".join(parts[:at]), parts[at:]
    if at == 0:
        folders = ["."]
    elif parts[:at] == [""]:
        folders = ["/"]
    else:
        folders = sorted(filter(os.path.isdir, local_glob.glob(start)))
    for folder, below in _walk(folders, with_hidden=any(part.startswith(".") for part in rest)):
        if _is_match(below.split("/"), rest):
            yield below if at == 0 else f"{folder.rstrip('/')}/{below}"


def _walk(folders: Iterable[str], *, with_hidden: bool) -> Iterator[tuple[str, str]]:
    """Files below folders, as (folder, path below it): each of the same folder on the disk once."""
    waiting = collections.deque((folder, "") for folder in folders)
    linked = collections.deque[tuple[str, str]]()  # later, so that a folder is found by its own path
    seen = set[tuple[int, int]]()
    while waiting or linked:
        folder, below = (waiting or linked).popleft()
        status = os.stat(f"{folder}/{below}")
        if (key := (status.st_dev, status.st_ino)) in seen:
            continue
        seen.add(key)
        with os.scandir(f"{folder}/{below}") as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            if entry.name.startswith(".") and not with_hidden:
                continue
            if _is_folder(entry):
                (linked if entry.is_symlink() else waiting).append((folder, f"{below}{entry.name}/"))
            else:
                yield folder, below + entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link that leads to itself is none."""
    try:
        return entry.is_dir()
    except OSError as e:
        if e.errno != errno.ELOOP:
            raise
        return False


def _is_match(names: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**" and _is_match(names, patterns[1:]):
        return True
    if not names or (names[0].startswith(".") and not patterns[0].startswith(".")):
        return False
    if patterns[0] == "**":
        return _is_match(names[1:], patterns)
    return fnmatch.fnmatchcase(names[0], patterns[0]) and _is_match(names[1:], patterns[1:])


def temporary_of(name: str) -> str | None:
    """The file that a temporary one, left by a process that died, was to become; None for others.

    >>> temporary_of(f"failures.jsonl.{'0' * 32}.tmp")
    'failures.jsonl'
    """
    match = _TEMPORARY.fullmatch(name)
    return match["name"] if match else None


def delete(path: str, below: str | None = None) -> None:
    """Remove a file; one that is not there is no error."""
    if not is_remote(path):
        disk.delete(path, below)
    elif store := _writable(path):
        store.delete([path])
    elif exists(path):
        _translated(path, lambda: _remote().delete([path]))


def delete_folder(folder: str, below: str | None = None) -> None:
    """Remove a folder if it is empty; an object store has none that are."""
    if not is_remote(folder):
        disk.delete_folder(folder, below)


def list_links(folder: str) -> list[str]:
    """Names of the symbolic links in a folder, sorted; an object store has none."""
    return [] if is_remote(folder) else disk.list_links(folder)


def delete_tree(folder: str, below: str | None = None) -> None:
    """Remove a folder and all in it; one that is not there, or is written to meanwhile, is no error."""
    if not is_remote(folder):
        disk.delete_tree(folder, below)
        return
    if store := _writable(folder):
        store.delete(store.find(f"{folder}/", deep=True)[0])
        return
    found = _translated(folder, lambda: _remote().match([f"{folder}/**"]))[0].metadata_list
    if found:
        _translated(folder, lambda: _remote().delete([m.path for m in found]))
