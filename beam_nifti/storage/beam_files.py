"""The schemes of Beam's file systems for which this package has no store of its own.

Beam retries failed requests itself. Its file systems have no versions, and publish the partial files of
failed writers until these are deleted.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from beam_nifti.storage.object_store import Listing, ObjectStore, Pieces, RangeReader, Reader, Stat

T = TypeVar("T")


class BeamFiles(ObjectStore):
    """What `apache_beam.io.filesystems.FileSystems` reaches."""

    _lost = ()

    def __init__(self, options: Any) -> None:
        from apache_beam.io.filesystem import BeamIOError, CompressionTypes
        from apache_beam.io.filesystems import FileSystems

        self.files = FileSystems
        self.plain = {"compression_type": CompressionTypes.UNCOMPRESSED}
        self._error = BeamIOError

    def attempt(self, path: str, request: Callable[[], T]) -> T:
        """Make a request once."""
        try:
            return request()
        except Exception as e:  # a client library has errors of its own
            if isinstance(e, OSError) and not isinstance(e, self._error):
                raise
            kind = "" if isinstance(e, self._error) else f"{type(e).__name__}: "
            raise OSError(f"{path}: {kind}{e}") from e

    @staticmethod
    def _answer(error: BaseException) -> tuple[int | None, str]:
        return None, ""

    def stat(self, path: str) -> Stat:
        try:
            found = self.attempt(path, lambda: self.files.get_filesystem(path).metadata(path))
        except OSError as e:  # few of Beam's file systems say that it is not there
            if isinstance(e, FileNotFoundError) or self._exists(path):
                raise
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from e
        return Stat(found.size_in_bytes, found.last_updated_in_seconds or 0.0)

    def _exists(self, path: str) -> bool:
        return bool(self.attempt(path, lambda: self.files.exists(path)))

    def open(self, path: str, head: int | None = None) -> Reader:
        return _Reader(self, path, head)

    def get_range(self, path: str, start: int, length: int) -> bytes:
        with self.open(path) as reader:
            reader.seek(start)
            return reader.read(length)

    def put(self, path: str, data: bytes, version: str | None = None) -> None:
        pieces = _Pieces(self, path)
        try:
            pieces.add(data)
            pieces.finish()
        except OSError:
            with contextlib.suppress(OSError):
                pieces.abort()
            raise

    def get_version(self, path: str, size: int) -> tuple[bytes, str | None]:
        with self.open(path, size) as reader:
            return reader.readall(), None

    def begin(self, path: str) -> Pieces:
        return _Pieces(self, path)

    def copy(self, source: str, target: str) -> None:
        self.attempt(target, lambda: self.files.copy([source], [target]))

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            if self._exists(path):
                self.attempt(path, functools.partial(self.files.delete, [path]))

    def find(self, prefix: str, *, deep: bool = False, limit: int | None = None) -> Listing:
        limits = [limit] if limit else None
        (found,) = self.attempt(prefix, lambda: self.files.match([f"{prefix}**"], limits))
        paths = [each.path for each in found.metadata_list]
        if deep:
            return paths, []
        below = [path.removeprefix(prefix).partition("/") for path in paths]
        folders = {f"{prefix}{name}/" for name, slash, _ in below if slash}
        return [path for path, (_, slash, _) in zip(paths, below, strict=True) if not slash], sorted(folders)


class _Reader(RangeReader):
    def __init__(self, store: BeamFiles, path: str, head: int | None) -> None:
        super().__init__(store, path, head, self._read)
        self._handle = store.attempt(path, lambda: store.files.open(path, **store.plain))

    def _read(self, path: str, start: int, length: int) -> bytes:
        self._handle.seek(start)
        data: bytes = self._handle.read(length)
        return data

    def close(self) -> None:
        self._handle.close()
        super().close()


class _Pieces(Pieces):
    def __init__(self, store: BeamFiles, path: str) -> None:
        self._store, self._path = store, path
        self._handle = store.attempt(path, lambda: store.files.create(path, **store.plain))

    def add(self, data: bytes) -> None:
        self._store.attempt(self._path, lambda: self._handle.write(data))

    def finish(self) -> None:
        self._store.attempt(self._path, self._handle.close)

    def abort(self) -> None:
        self._store.attempt(self._path, self._handle.close)  # which uploads what there is of it
        self._store.delete([self._path])
