"""An object store in this process's memory, which Beam serves as `memory://`.

It behaves as S3 and Cloud Storage do: there are no folders, an object appears when its upload is closed,
and whatever was uploaded until then becomes the object, even if an exception closed it.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from typing import ClassVar

from apache_beam.io.filesystem import CompressionTypes, FileMetadata, FileSystem


class _Upload(io.BytesIO):
    def __init__(self, store: type[MemoryFileSystem], path: str) -> None:
        super().__init__()
        self._store, self._path = store, path

    def close(self) -> None:
        if not self.closed:
            self._store.objects[self._path] = (self.getvalue(), self._store.now())
        super().close()


class MemoryFileSystem(FileSystem):
    """Objects by their whole path."""

    objects: ClassVar[dict[str, tuple[bytes, float]]] = {}
    ahead: ClassVar[float] = 0.0
    """Seconds by which its clock is ahead of this machine's."""

    @classmethod
    def now(cls) -> float:
        return time.time() + cls.ahead

    @classmethod
    def scheme(cls) -> str:
        return "memory"

    def join(self, basepath: str, *paths: str) -> str:
        return "/".join([basepath.rstrip("/"), *paths])

    def split(self, path: str) -> tuple[str, str]:
        head, _, tail = path.rpartition("/")
        return head, tail

    def mkdirs(self, path: str) -> None:
        raise AssertionError("an object store has no folders")

    def has_dirs(self) -> bool:
        return False

    def _list(self, dir_or_prefix: str) -> Iterator[FileMetadata]:
        for path, (data, modified) in sorted(self.objects.items()):
            if path.startswith(dir_or_prefix):
                yield FileMetadata(path, len(data), modified)

    def create(self, path: str, mime_type: str = "", compression_type: str = "") -> _Upload:
        assert compression_type == CompressionTypes.UNCOMPRESSED
        return _Upload(type(self), path)

    def open(self, path: str, mime_type: str = "", compression_type: str = "") -> io.BytesIO:
        assert compression_type == CompressionTypes.UNCOMPRESSED
        return io.BytesIO(self._object(path)[0])

    def copy(self, source_file_names: list[str], destination_file_names: list[str]) -> None:
        for source, target in zip(source_file_names, destination_file_names, strict=True):
            self.objects[target] = (self._object(source)[0], self.now())

    def rename(self, source_file_names: list[str], destination_file_names: list[str]) -> None:
        self.copy(source_file_names, destination_file_names)
        self.delete(source_file_names)

    def exists(self, path: str) -> bool:
        return path in self.objects

    def size(self, path: str) -> int:
        return len(self._object(path)[0])

    def last_updated(self, path: str) -> float:
        return self._object(path)[1]

    def metadata(self, path: str) -> FileMetadata:
        data, modified = self._object(path)
        return FileMetadata(path, len(data), modified)

    def delete(self, paths: list[str]) -> None:
        for path in paths:
            self._object(path)
            del self.objects[path]

    def _object(self, path: str) -> tuple[bytes, float]:
        return self.objects[path]  # the client library's own error, as Cloud Storage has it
