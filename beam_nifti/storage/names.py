"""Paths and URLs as names: where they lead, and how they are put together. Reads no file."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import urllib.parse
from collections.abc import Iterable
from typing import Final

from beam_nifti.errors import UsageError
from beam_nifti.support.wording import one_line

FILE_URL: Final = re.compile(r"file:(?://(?:localhost)?(?=/)|(?=/(?!/)))(?P<path>/.*)", re.I | re.S)
UNSPELLABLE: Final = (
    f"cannot be opened, because file names are in {sys.getfilesystemencoding()} here; set PYTHONUTF8=1, or a "
    "locale such as LC_ALL=C.UTF-8"
)
"""Of a path whose letters this process cannot give to the system."""

_BARE_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/{2,}")
_WINDOWS: Final = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def local_path(path: str) -> str:
    """The local path that a file:// URL names; all other paths as they are.

    >>> local_path("file:///data/sub%201.nii"), local_path("file://localhost/data"), local_path("s3://bucket")
    ('/data/sub 1.nii', '/data', 's3://bucket')
    """
    match = FILE_URL.fullmatch(path)
    return urllib.parse.unquote(match["path"], errors="surrogateescape") if match else path


def is_remote(path: str) -> bool:
    """Whether a path is not on the local disk.

    Paths of other computers count as remote: opening them is refused.

    >>> is_remote("s3://bucket/a.nii.gz"), is_remote("/data/a.nii.gz"), is_remote("file:///data/a.nii.gz")
    (True, False, False)
    """
    return ("://" in path and not FILE_URL.fullmatch(path)) or _WINDOWS.match(path) is not None


def join(base: str, *parts: str) -> str:
    """Append to a folder. An absolute part or a URL replaces it, and a file:// URL becomes a path.

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


def path_text(name: str, value: object) -> str:
    """The text of a path or URL that a caller gives; `name` is the parameter or flag."""
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str):
        raise UsageError(f"{name} is {one_line(repr(value)):.80}; give a path")
    if not path.strip():
        raise UsageError(f"{name} is empty; was a variable not set?")
    if "\0" in path:
        raise UsageError(f"{name} is {path!r}, which has a NUL character; give a path without one")
    require_text([path])
    return str(path)


def absolute(path: str | os.PathLike[str]) -> str:
    """A path that does not depend on the working folder: `~` is expanded, and a file:// URL becomes a path.

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
    if is_remote(path):
        return path
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


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
    """The scheme of a URL, such as "s3"."""
    return path.partition("://")[0]


def require_text(paths: Iterable[str]) -> None:
    """Refuse names that are not Unicode text, because dataset files are UTF-8."""
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError:
            name = os.fsencode(path)
            with contextlib.suppress(UnicodeDecodeError):
                raise UsageError(f"{name.decode()} {UNSPELLABLE}") from None
            raise UsageError(
                f"{name!r} is not UTF-8 text; correct it, or rename the file or folder"
            ) from None


def wrong_with(path: str) -> str | None:
    """Why a path that looks like a URL is not a URL of a store; None if it is."""
    if _WINDOWS.match(path):
        return "a Windows path; give the path at which this computer has the file"
    if scheme_of(path).lower() == "file":
        return "a file:// URL that names another computer; write file:///FOLDER/FILE for a file of this one"
    return None
