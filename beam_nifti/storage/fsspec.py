"""The read-only stores of fsspec, such as `az://` with its package adlfs.

These packages retry failed requests themselves.
"""

from __future__ import annotations

from typing import Any

from beam_nifti.storage.object_store import RangeStore, Stat

_TIMES = ("last_modified", "mtime", "LastModified", "modified")
"""Names of the modification time in the results of packages, which fsspec does not standardize."""

_VERSIONS = ("etag", "ETag", "generation")  # names of the version of an object


class Fsspec(RangeStore):
    """A scheme that fsspec serves."""

    _lost = ()

    def __init__(self, options: Any, scheme: str) -> None:
        import fsspec

        try:
            fsspec.get_filesystem_class(scheme)
        except ValueError as e:
            raise ImportError(str(e)) from e
        self._locate = fsspec.core.url_to_fs

    def is_transient(self, error: BaseException) -> bool:
        """No: what the packages give up, they have attempted several times."""
        return False

    @staticmethod
    def _answer(error: BaseException) -> tuple[int | None, str]:
        status = getattr(error, "status_code", None)
        return (status, type(error).__name__) if isinstance(status, int) else (None, "")

    def request_stat(self, path: str) -> Stat:
        filesystem, name = self._locate(path)
        found = filesystem.info(name)
        if found["type"] != "file":
            raise FileNotFoundError(path)
        time = next((found[key] for key in _TIMES if key in found), 0.0)
        version = next((str(found[key]) for key in _VERSIONS if found.get(key)), None)
        return Stat(found["size"], float(time.timestamp() if hasattr(time, "timestamp") else time), version)

    def request_range(self, path: str, start: int, length: int) -> bytes:
        filesystem, name = self._locate(path)
        data: bytes = filesystem.cat_file(name, start=start, end=start + length)
        return data

    def request_list(self, folder: str, *, deep: bool) -> list[tuple[str, bool]]:
        filesystem, root = self._locate(folder)
        filesystem.invalidate_cache()
        found = filesystem.find(root, detail=True).values() if deep else filesystem.ls(root, detail=True)
        below = ((each["name"].strip("/")[len(root.strip("/")) :], each["type"]) for each in found)
        listed = [(f"{folder}{path}", kind != "file") for path, kind in below if path.startswith("/")]
        return [(path, is_folder) for path, is_folder in listed if not (deep and is_folder)]
