"""Lists files and folders, on the local disk and in stores."""

from __future__ import annotations

import collections
import errno
import fnmatch
import glob as local_glob
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from beam_nifti.storage.names import FILE_URL, is_remote, local_path
from beam_nifti.storage.stores import store_of

_ENCODED_MAGIC: Final = re.compile(r"%(?:2A|3F|5B)", re.I)  # the characters *, ? and [ in a URL


def list_files(folder: str, pattern: str = "*") -> list[str]:
    """Names of the files in a folder that match a glob, sorted; none if there is no folder."""
    if not is_remote(folder):
        return fnmatch.filter(_local_names(folder, _is_file), pattern)
    objects, _ = store_of(folder).find(f"{folder}/")
    return sorted(fnmatch.filter((path[len(folder) + 1 :] for path in objects), pattern))


def list_folders(folder: str) -> list[str]:
    """Names of the folders in a folder, sorted; none if there is no folder."""
    if not is_remote(folder):
        return _local_names(folder, _is_folder)
    _, folders = store_of(folder).find(f"{folder}/")
    return sorted(path[len(folder) + 1 : -1] for path in folders)


def list_links(folder: str) -> list[str]:
    """Names of the symbolic links in a folder, sorted; object stores have none."""
    return [] if is_remote(folder) else _local_names(folder, os.DirEntry.is_symlink)


def _local_names(folder: str, is_listed: Callable[[os.DirEntry[str]], bool]) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if is_listed(entry))
    except (FileNotFoundError, NotADirectoryError):
        return []


def list_tree(folder: str, prefix: str, depth: int) -> Iterator[str]:
    """Relative paths of files up to `depth` folders below the folders of `folder` that begin with `prefix`.

    Hidden files and folders are omitted. The order is arbitrary. On the local disk, links to folders are
    followed, but every folder is entered once.
    """
    if not is_remote(folder):
        with os.scandir(folder) as entries:
            tops = [e.name for e in entries if e.name.startswith(prefix) and _is_folder(e)]
        for top, below in _walk((f"{folder}/{name}" for name in tops), with_hidden=False, depth=depth):
            yield f"{top[len(folder) + 1 :]}/{below}"
        return
    for path in store_of(folder).find(f"{folder}/{prefix}", deep=True)[0]:
        relative = path[len(folder) + 1 :]
        if 0 < relative.count("/") <= depth and "/." not in relative:
            yield relative


def glob(pattern: str) -> list[str]:
    """Files that match a pattern, sorted: `*`, `?` and `[…]` match within one name, and `**` any folders.

    Hidden names match only explicitly. An encoded character of a file:// URL is literal. On the local disk,
    `**` follows symbolic links, but enters every folder once.
    """
    if FILE_URL.fullmatch(pattern):
        pattern = local_path(_ENCODED_MAGIC.sub(lambda match: f"[{match[0]}]", pattern))
    if not is_remote(pattern):
        return sorted(path for path in _glob_local(os.path.expanduser(pattern)) if not os.path.isdir(path))
    parts = pattern.split("/")
    # The scheme and the bucket, and the folders before the first that is not plain.
    plain = 3 + sum(1 for _ in itertools.takewhile(lambda p: not local_glob.has_magic(p), parts[3:-1]))
    folder = "/".join(parts[:plain])
    below = (path[len(folder) + 1 :] for path in store_of(folder).find(f"{folder}/", deep=True)[0])
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


def _walk(folders: Iterable[str], *, with_hidden: bool, depth: float = math.inf) -> Iterator[tuple[str, str]]:
    """Files up to `depth` folders deep, as (folder, path below it). Folders are entered only once."""
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
            if not _is_folder(entry):
                yield folder, below + entry.name
            elif below.count("/") + 1 < depth:
                (linked if entry.is_symlink() else waiting).append((folder, f"{below}{entry.name}/"))


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a regular file or a link to one; a link that leads to itself is none."""
    return _unless_endless(entry.is_file)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; not a link to itself."""
    return _unless_endless(entry.is_dir)


def _unless_endless(is_kind: Callable[[], bool]) -> bool:
    try:
        return is_kind()
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
