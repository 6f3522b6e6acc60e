"""Google Cloud Storage, through google-cloud-storage."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Iterable
from typing import Any, Final

from beam_nifti.storage.object_store import (
    ALL_WAITS,
    FIRST_WAIT,
    LONGEST_WAIT,
    PIECE_BYTES,
    Listing,
    ObjectStore,
    Pieces,
    Reader,
    Stat,
    broken_connections,
    split_path,
)

_WINDOW_BYTES: Final = 64 << 20  # bytes of a Cloud Storage object that are read at once
_CONTENT_TYPE: Final = "application/octet-stream"


class Gcs(ObjectStore):
    """Cloud Storage."""

    def __init__(self, options: Any) -> None:
        from google.api_core.retry import Retry
        from google.auth.exceptions import TransportError
        from google.cloud.storage import Client

        self._lost = (ConnectionError, TransportError, *broken_connections())
        # Or it would ask for the bucket's properties too, which tracing wants and the user may not read.
        os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
        if "STORAGE_EMULATOR_HOST" in os.environ:  # which asks for no credentials; the look-up is slow
            self.client = Client.create_anonymous_client()
        else:
            from apache_beam.io.gcp.gcsio import create_storage_client
            from apache_beam.options.pipeline_options import PipelineOptions

            self.client = create_storage_client(options or PipelineOptions([]))
        # For the requests of an upload, which only the client can take up again in the middle.
        self.retry = Retry(
            predicate=self.is_transient,
            initial=FIRST_WAIT,
            maximum=LONGEST_WAIT,
            multiplier=2.0,
            timeout=ALL_WAITS,
        )

    def _host(self, path: str) -> str:
        return super()._host(self.client._connection.API_BASE_URL)

    @staticmethod
    def _answer(error: BaseException) -> tuple[int | None, str]:
        response = getattr(error, "response", None)
        status = getattr(error, "code", None) or getattr(response, "status_code", None)
        if not isinstance(status, int):
            return None, ""
        errors = getattr(error, "errors", None) or [{}]
        reason = errors[0].get("reason") if isinstance(errors[0], dict) else None
        return int(status), reason or getattr(response, "reason", None) or type(error).__name__

    def blob(self, path: str) -> Any:
        """The client's handle of an object."""
        bucket, key = split_path(path)
        return self.client.bucket(bucket).blob(key)

    def stat(self, path: str) -> Stat:
        blob = self.blob(path)
        self.attempt(path, lambda: blob.reload(retry=None))
        return _stat(blob, blob.size)

    def open(self, path: str, head: int | None = None) -> Reader:
        return _Reader(self, path, head)

    def get_range(self, path: str, start: int, length: int) -> bytes:
        blob = self.blob(path)
        return self.attempt(path, lambda: _download(blob, start, length))

    def put(self, path: str, data: bytes, version: str | None = None) -> None:
        blob = self.blob(path)
        condition = None if version is None else int(version or 0)
        try:
            self.attempt(
                path,
                lambda: blob.upload_from_string(
                    data, content_type=_CONTENT_TYPE, if_generation_match=condition, retry=None
                ),
            )
        except FileNotFoundError as e:  # a write needs nothing but the bucket; not every server names it
            raise FileNotFoundError(errno.ENOENT, "No such bucket", path) from e

    def get_version(self, path: str, size: int) -> tuple[bytes, str]:
        with _Reader(self, path, size) as reader:
            return reader.readall(), str(reader.generation)

    def begin(self, path: str) -> Pieces:
        return _Pieces(self, path)

    def copy(self, source: str, target: str) -> None:
        origin, blob = self.blob(source), self.blob(target)

        def request() -> None:
            token, _, _ = blob.rewrite(origin, retry=None)
            while token:
                token, _, _ = blob.rewrite(origin, token=token, retry=None)

        self.attempt(source, request)

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                self.attempt(path, functools.partial(self.blob(path).delete, retry=None))

    def find(self, prefix: str, *, deep: bool = False, limit: int | None = None) -> Listing:
        bucket, key = split_path(prefix)

        def request() -> Listing:
            found = self.client.list_blobs(
                bucket, prefix=key, delimiter=None if deep else "/", max_results=limit, retry=None
            )
            objects = [f"gs://{bucket}/{blob.name}" for blob in found]
            return objects, [f"gs://{bucket}/{folder}" for folder in sorted(found.prefixes)]

        return self.attempt(prefix, request)


def _stat(blob: Any, size: int) -> Stat:
    """What an object is; its time is its generation, as that is what comes with every answer."""
    return Stat(size, int(blob.generation) / 1e6, str(blob.generation))


def _download(blob: Any, start: int, length: int, generation: int | None = None) -> bytes:
    """Bytes of an object; fewer if it ends before."""
    from google.api_core.exceptions import RequestRangeNotSatisfiable

    try:
        data: bytes = blob.download_as_bytes(
            start=start,
            end=start + length - 1,
            raw_download=True,  # or what is stored as gzip would be unpacked on the way
            checksum=None,  # the server knows only that of the whole
            if_generation_match=generation,
            retry=None,
        )
    except RequestRangeNotSatisfiable:
        return b""  # the object ends before the first of them
    return data


class _Reader(Reader):
    """A GET for each window of the object, most often the only one."""

    def __init__(self, store: Gcs, path: str, head: int | None = None) -> None:
        super().__init__(store, path)
        self._blob = store.blob(path)
        self._start, self._window = 0, b""
        self.generation: int | None = None
        length = head or _WINDOW_BYTES
        store.attempt(path, lambda: self._request(0, length))
        if self._blob.generation is None or (head is None and len(self._window) == length):
            store.attempt(path, lambda: self._blob.reload(retry=None))
            self.size = self._blob.size
        else:
            self.size = len(self._window)
        self.generation, self.stat = int(self._blob.generation), _stat(self._blob, self.size)

    def _request(self, start: int, length: int) -> None:
        self._window = _download(self._blob, start, length, self.generation)
        self._start = start

    def _read_some(self, view: memoryview) -> int:
        if not self._start <= self._position < self._start + len(self._window):
            self._request(self._position, _WINDOW_BYTES)
        start = self._position - self._start
        piece = self._window[start : start + len(view)]
        if not piece:
            raise ConnectionError(f"received only {self._position} of the {self.size} bytes of the object")
        view[: len(piece)] = piece
        return len(piece)

    def _read_rest(self) -> bytes:
        ahead = self._position - self._start
        data = self._window[ahead:] if ahead >= 0 else b""
        if missing := self.size - self._position - len(data):
            self._request(self.size - missing, missing)
            data += self._window
        if len(data) != self.size - self._position:
            raise ConnectionError(f"received {len(data)} bytes, expected {self.size - self._position}")
        return data


class _Pieces(Pieces):
    def __init__(self, store: Gcs, path: str) -> None:
        self._store, self._path = store, path
        self._handle = store.blob(path).open(
            "wb", chunk_size=PIECE_BYTES, ignore_flush=True, content_type=_CONTENT_TYPE, retry=store.retry
        )

    def add(self, data: bytes) -> None:
        self._translated(lambda: self._handle.write(data))

    def finish(self) -> None:
        self._translated(self._handle.close)

    def abort(self) -> None:
        try:
            self._translated(self._handle.terminate)
        finally:
            self._handle._buffer.close()  # or its destructor would send the rest and publish it

    def _translated(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as e:
            raise self._store._as_os_error(self._path, e) from e
