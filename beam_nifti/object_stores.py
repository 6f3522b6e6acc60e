"""S3 and Cloud Storage, through the client libraries that Beam's extras install, with Beam's options.

Beam's own file systems serve the other schemes. For these two they fall short: they make a client for
every call, ask for an object's size before its bytes, keep the errors of a copy to themselves, and
publish what a writer that failed had sent until then.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import functools
import io
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

T = TypeVar("T")

ATTEMPTS: Final = 8
_FIRST_WAIT: Final = 1.0
_LONGEST_WAIT: Final = 16.0
_ALL_WAITS: Final = 63.0
"""Seconds between the attempts at a request: 1, 2, 4, 8, 16, 16, 16, each cut by up to half at random."""

_SILENCE: Final = 60.0
"""Seconds after which a server that says nothing counts as one that did not answer."""

_CONNECTIONS: Final = 64
_TRANSIENT_STATUS: Final = frozenset([408, 429, 500, 502, 503, 504])
_TRANSIENT_CODES: Final = frozenset(
    ["RequestTimeout", "SlowDown", "Throttling", "InternalError", "ConditionalRequestConflict"]
)
"""What S3 says of a transient error, whatever the HTTP status that it comes with."""

_ABSENT_CODES: Final = frozenset(
    ["NoSuchKey", "NoSuchBucket", "NoSuchUpload", "404", "NotFound", "Not Found", "notFound"]
)
"""What the stores say where there is no object. Some say 404 of unknown users, too."""

_PIECE_BYTES: Final = 16 << 20
"""Bytes that are sent at once. What is shorter is sent in one request."""

_WINDOW_BYTES: Final = 64 << 20
"""Bytes of a Cloud Storage object that are read at once."""

_TOO_LARGE_TO_COPY: Final = ((400, "InvalidRequest"), (400, "EntityTooLarge"))
"""How S3 answers when it is to copy more than 5 GiB at once."""


class Reader(io.RawIOBase):
    """An object, opened for reading.

    Args:
        store: that holds it.
        path: of the object.

    Attributes:
        size: of the object in bytes.
        mtime: when it was written, in seconds since 1970.
    """

    def __init__(self, store: Store, path: str) -> None:
        self._store, self._path = store, path
        self._position = 0
        self.size, self.mtime = 0, 0.0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go elsewhere; costs a request at the next reading."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read some bytes; none only at the end."""
        view = memoryview(buffer).cast("B")
        if not view or self._position >= self.size:
            return 0
        count = self._store.attempt(self._path, lambda: self._read_some(view))
        self._position += count
        return count

    def readall(self) -> bytes:
        """Read what is left; if it breaks off, all of it again."""
        if self._position >= self.size:
            return b""
        data = self._store.attempt(self._path, self._read_rest)
        self._position = self.size
        return data

    @abc.abstractmethod
    def _read_some(self, view: memoryview) -> int:
        """Read at least a byte from the position on."""

    @abc.abstractmethod
    def _read_rest(self) -> bytes:
        """Read from the position to the end."""


class Pieces(abc.ABC):
    """An upload of several pieces; the object appears when it is finished."""

    @abc.abstractmethod
    def add(self, data: bytes) -> None:
        """Send a piece."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Make the object appear."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Forget what was sent."""


class Writer(io.BufferedIOBase):
    """An object that is being written. It appears only with `finish`.

    Args:
        store: that shall hold it.
        path: of the object.
    """

    def __init__(self, store: Store, path: str) -> None:
        self._store, self._path = store, path
        self._buffer = bytearray()
        self._pieces: Pieces | None = None

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: Any) -> int:
        """Take bytes, and send what has come together."""
        view = memoryview(data)
        self._buffer += view
        if len(self._buffer) >= _PIECE_BYTES:
            if self._pieces is None:
                self._pieces = self._store.begin(self._path)
            self._pieces.add(self._take())
        return view.nbytes

    def finish(self) -> None:
        """Send the rest and make the object appear."""
        rest = self._take()
        if self._pieces is None:
            self._store.put(self._path, rest)
        else:
            if rest:
                self._pieces.add(rest)
            self._pieces.finish()
            self._pieces = None
        self.close()

    def close(self) -> None:
        """Close; what was not finished does not appear."""
        pieces, self._pieces = self._pieces, None
        if pieces is not None:
            with contextlib.suppress(OSError):  # the store's own rules for unfinished uploads remain
                pieces.abort()
        super().close()

    def _take(self) -> bytes:
        data = bytes(self._buffer)
        self._buffer.clear()
        return data


class Store(abc.ABC):
    """An object store. Everything it raises is an OSError.

    Args:
        options: Beam's, of the pipeline that runs here.
    """

    _lost: tuple[type[Exception], ...]
    """What its client raises when a connection breaks or a server keeps silent."""

    @abc.abstractmethod
    def __init__(self, options: Any) -> None: ...

    def attempt(self, path: str, request: Callable[[], T]) -> T:
        """Make a request, again while it fails for a reason that may pass.

        Raises:
            FileNotFoundError: HTTP 404.
            PermissionError: HTTP 401 or 403.
            FileExistsError: HTTP 412, a condition of the request does not hold.
            TimeoutError: it failed ATTEMPTS times.
            OSError: any other error; these four are kinds of it.
        """
        from apache_beam.utils.retry import with_exponential_backoff

        retrying = with_exponential_backoff(
            num_retries=ATTEMPTS - 1,
            initial_delay_secs=_FIRST_WAIT,
            max_delay_secs=_LONGEST_WAIT,
            retry_filter=self.is_transient,
            logger=_say_nothing,
        )
        try:
            result: T = retrying(request)()
        except Exception as e:
            raise self._as_os_error(path, e) from e
        return result

    def is_transient(self, error: BaseException) -> bool:
        """Whether a request that failed so may succeed later."""
        error = _cause(error)
        status, code = self._answer(error)
        return status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES or isinstance(error, self._lost)

    def _as_os_error(self, path: str, error: BaseException) -> OSError:
        error = _cause(error)
        status, code = self._answer(error)
        said = f"HTTP {status} {code}" if status else f"{type(error).__name__}: {error}"
        if status == 404 and code in _ABSENT_CODES:
            reason = "No such bucket" if code == "NoSuchBucket" else os.strerror(errno.ENOENT)
            return FileNotFoundError(errno.ENOENT, reason, path)
        if status in (401, 403):
            return PermissionError(errno.EACCES, f"access is denied ({said})", path)
        if status == 412:
            return FileExistsError(errno.EEXIST, f"another process has written it meanwhile ({said})", path)
        if self.is_transient(error):
            return TimeoutError(errno.ETIMEDOUT, f"the store failed {ATTEMPTS} times in a row ({said})", path)
        return OSError(errno.EIO, f"{said}: {error}" if status else said, path)

    @staticmethod
    @abc.abstractmethod
    def _answer(error: BaseException) -> tuple[int | None, str]:
        """The HTTP status, if the server answered, and the store's own code for the error."""

    @abc.abstractmethod
    def stat(self, path: str) -> tuple[int, float]:
        """Size and time of an object, as a Reader has them."""

    @abc.abstractmethod
    def open(self, path: str, head: int | None = None) -> Reader:
        """Open an object, or only its first `head` bytes; in one request together with reading it."""

    @abc.abstractmethod
    def put(self, path: str, data: bytes, version: str | None = None) -> None:
        """Write an object whole.

        Args:
            path: of the object.
            data: all of it.
            version: only if the object has this one, or, if "", only if there is none.
        """

    @abc.abstractmethod
    def get_version(self, path: str) -> tuple[bytes, str]:
        """An object whole, and what `put` calls its version."""

    @abc.abstractmethod
    def begin(self, path: str) -> Pieces:
        """Begin an upload of several pieces."""

    @abc.abstractmethod
    def copy(self, source: str, target: str) -> None:
        """Copy an object inside the store."""

    @abc.abstractmethod
    def delete(self, paths: Iterable[str]) -> None:
        """Remove objects; those that are not there are no error."""

    @abc.abstractmethod
    def find(
        self, prefix: str, *, deep: bool = False, limit: int | None = None
    ) -> tuple[list[str], list[str]]:
        """Paths that begin with a prefix.

        Args:
            prefix: a path that ends in "/".
            deep: whether to list what lies in folders below.
            limit: give no more than about so many.

        Returns:
            Paths of objects, and, unless `deep`, of folders, which end in "/".
        """


def _say_nothing(*_: object) -> None:
    """Take the place of a logger: an error that passed is nobody's concern."""


def _cause(error: BaseException) -> BaseException:
    """What a client's error about its own attempts is about."""
    return getattr(error, "cause", None) or error


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.partition("://")[2].partition("/")
    return bucket, key


class _S3(Store):
    def __init__(self, options: Any) -> None:
        import boto3
        from apache_beam.options.pipeline_options import S3Options
        from botocore import exceptions
        from botocore.config import Config

        self._lost = (
            exceptions.HTTPClientError,
            exceptions.ResponseStreamingError,
            exceptions.IncompleteReadError,
            exceptions.FlexibleChecksumError,
        )
        s3 = options.view_as(S3Options)
        self.client = boto3.session.Session().client(
            "s3",
            endpoint_url=s3.s3_endpoint_url,
            region_name=s3.s3_region_name,
            aws_access_key_id=s3.s3_access_key_id,
            aws_secret_access_key=s3.s3_secret_access_key,
            aws_session_token=s3.s3_session_token,
            api_version=s3.s3_api_version,
            use_ssl=not s3.s3_disable_ssl,
            verify=s3.s3_verify,
            config=Config(
                retries={"total_max_attempts": 1},  # `attempt` is the one that retries
                connect_timeout=_SILENCE,
                read_timeout=_SILENCE,
                max_pool_connections=_CONNECTIONS,
            ),
        )

    @staticmethod
    def _answer(error: BaseException) -> tuple[int | None, str]:
        response = getattr(error, "response", None) or {}
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status, response.get("Error", {}).get("Code", "")

    def stat(self, path: str) -> tuple[int, float]:
        bucket, key = _split(path)
        found = self.attempt(path, lambda: self.client.head_object(Bucket=bucket, Key=key))
        return found["ContentLength"], found["LastModified"].timestamp()

    def open(self, path: str, head: int | None = None) -> Reader:
        return _S3Reader(self, path, head)

    def put(self, path: str, data: bytes, version: str | None = None) -> None:
        bucket, key = _split(path)
        condition = {} if version is None else {"IfMatch": version} if version else {"IfNoneMatch": "*"}

        def request() -> None:
            try:
                self.client.put_object(Bucket=bucket, Key=key, Body=data, **condition)
            except Exception as e:
                if not condition or self._answer(e)[0] != 501:
                    raise
                # A store of another make, which does not know conditions.
                self.client.put_object(Bucket=bucket, Key=key, Body=data)

        self.attempt(path, request)

    def get_version(self, path: str) -> tuple[bytes, str]:
        with _S3Reader(self, path) as reader:
            return reader.readall(), reader.etag

    def begin(self, path: str) -> Pieces:
        return _S3Pieces(self, path)

    def copy(self, source: str, target: str) -> None:
        (from_bucket, from_key), (bucket, key) = _split(source), _split(target)
        origin = {"Bucket": from_bucket, "Key": from_key}

        def request() -> None:
            try:
                self.client.copy_object(CopySource=origin, Bucket=bucket, Key=key)
            except Exception as e:
                if self._answer(e) not in _TOO_LARGE_TO_COPY:
                    raise
                self.client.copy(origin, bucket, key)  # in pieces

        self.attempt(source, request)

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            bucket, key = _split(path)
            self.attempt(path, functools.partial(self.client.delete_object, Bucket=bucket, Key=key))

    def find(
        self, prefix: str, *, deep: bool = False, limit: int | None = None
    ) -> tuple[list[str], list[str]]:
        bucket, key = _split(prefix)
        where = {"Bucket": bucket, "Prefix": key} | ({} if deep else {"Delimiter": "/"})
        paging = {"MaxItems": limit, "PageSize": limit} if limit else {}

        def request() -> tuple[list[str], list[str]]:
            pages = self.client.get_paginator("list_objects_v2").paginate(**where, PaginationConfig=paging)
            objects, folders = list[str](), list[str]()
            for page in pages:
                objects += (f"s3://{bucket}/{found['Key']}" for found in page.get("Contents", ()))
                folders += (f"s3://{bucket}/{found['Prefix']}" for found in page.get("CommonPrefixes", ()))
            return objects, folders

        return self.attempt(prefix, request)


class _S3Reader(Reader):
    """One GET, from the position to the end of the object; another one after a seek or a broken one."""

    def __init__(self, store: _S3, path: str, head: int | None = None) -> None:
        super().__init__(store, path)
        self._client = store.client
        self._body: Any = None
        self._body_position = 0
        self._end = head
        self.etag = ""
        store.attempt(path, self._request)

    def _request(self) -> None:
        bucket, key = _split(self._path)
        start, condition = self._position, {"IfMatch": self.etag} if self.etag else {}
        if start or self._end:
            condition["Range"] = f"bytes={start}-{self._end - 1 if self._end else ''}"
        try:
            found = self._client.get_object(Bucket=bucket, Key=key, **condition)
        except Exception as e:
            if self._store._answer(e)[0] != 416:
                raise
            found = self._client.get_object(Bucket=bucket, Key=key)  # an empty object has no first byte
        self._body, self._body_position = found["Body"], start
        if not self.etag:
            self.etag, self.mtime = found["ETag"], found["LastModified"].timestamp()
            self.size = found["ContentLength"]

    def _at_position(self) -> Any:
        if self._body is None or self._body_position != self._position:
            self._drop()
            self._request()
        return self._body

    def _read_some(self, view: memoryview) -> int:
        from botocore.exceptions import IncompleteReadError

        with self._dropping():
            count: int = self._at_position().readinto(view)
            if not count:
                raise IncompleteReadError(actual_bytes=self._position, expected_bytes=self.size)
        self._body_position += count
        return count

    def _read_rest(self) -> bytes:
        with self._dropping():
            data: bytes = self._at_position().read()  # checks the length, and the checksum if there is one
        self._body_position += len(data)
        return data

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        """Drop the connection if the block fails."""
        try:
            yield
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            body.close()

    def close(self) -> None:
        """Close; the connection is used again if all was read."""
        if self._body is not None and self._body_position == self.size:
            with contextlib.suppress(Exception):
                self._body.read()  # only at its end does a body give its connection back
        self._drop()
        super().close()


class _S3Pieces(Pieces):
    _MARK: Final = "beam-nifti-upload"

    def __init__(self, store: _S3, path: str) -> None:
        self._store, self._client, self._path = store, store.client, path
        self._bucket, self._key = _split(path)
        self._mark = uuid.uuid4().hex
        begun = store.attempt(
            path,
            lambda: self._client.create_multipart_upload(
                Bucket=self._bucket, Key=self._key, Metadata={self._MARK: self._mark}
            ),
        )
        self._upload = {"Bucket": self._bucket, "Key": self._key, "UploadId": begun["UploadId"]}
        self._parts: list[dict[str, Any]] = []

    def add(self, data: bytes) -> None:
        number = len(self._parts) + 1
        sent = self._store.attempt(
            self._path, lambda: self._client.upload_part(**self._upload, PartNumber=number, Body=data)
        )
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"]})

    def finish(self) -> None:
        self._store.attempt(self._path, self._complete)

    def _complete(self) -> None:
        try:
            self._client.complete_multipart_upload(**self._upload, MultipartUpload={"Parts": self._parts})
        except self._client.exceptions.ClientError as e:
            if self._store._answer(e)[1] != "NoSuchUpload" or not self._is_there():
                raise

    def _is_there(self) -> bool:
        """Whether the object is already this upload: an earlier attempt worked, but its answer was lost."""
        found = self._client.head_object(Bucket=self._bucket, Key=self._key)
        return bool(found["Metadata"].get(self._MARK) == self._mark)

    def abort(self) -> None:
        self._store.attempt(self._path, lambda: self._client.abort_multipart_upload(**self._upload))


class _Gcs(Store):
    def __init__(self, options: Any) -> None:
        import requests
        import urllib3
        from apache_beam.io.gcp.gcsio import create_storage_client
        from google.api_core.retry import Retry
        from google.auth.exceptions import TransportError
        from google.cloud.storage import Client

        self._lost = (
            ConnectionError,
            TransportError,
            requests.ConnectionError,
            requests.Timeout,
            requests.exceptions.ChunkedEncodingError,
            urllib3.exceptions.HTTPError,
        )
        # Or it would ask for the bucket's properties too, which tracing wants and the user may not read.
        os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
        emulated = "STORAGE_EMULATOR_HOST" in os.environ  # which asks for no credentials; the look-up is slow
        client = Client.create_anonymous_client() if emulated else create_storage_client(options)
        self.client = client
        # For the requests of an upload, which only the client can take up again in the middle.
        self.retry = Retry(
            predicate=self.is_transient,
            initial=_FIRST_WAIT,
            maximum=_LONGEST_WAIT,
            multiplier=2.0,
            timeout=_ALL_WAITS,
        )

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
        bucket, key = _split(path)
        return self.client.bucket(bucket).blob(key)

    def stat(self, path: str) -> tuple[int, float]:
        blob = self.blob(path)
        self.attempt(path, lambda: blob.reload(retry=None))
        return blob.size, _mtime(blob)

    def open(self, path: str, head: int | None = None) -> Reader:
        return _GcsReader(self, path, head)

    def put(self, path: str, data: bytes, version: str | None = None) -> None:
        blob = self.blob(path)
        condition = None if version is None else int(version or 0)
        self.attempt(
            path,
            lambda: blob.upload_from_string(
                data, content_type=_CONTENT_TYPE, if_generation_match=condition, retry=None
            ),
        )

    def get_version(self, path: str) -> tuple[bytes, str]:
        with _GcsReader(self, path) as reader:
            return reader.readall(), str(reader.generation)

    def begin(self, path: str) -> Pieces:
        return _GcsPieces(self, path)

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

    def find(
        self, prefix: str, *, deep: bool = False, limit: int | None = None
    ) -> tuple[list[str], list[str]]:
        bucket, key = _split(prefix)

        def request() -> tuple[list[str], list[str]]:
            found = self.client.list_blobs(
                bucket, prefix=key, delimiter=None if deep else "/", max_results=limit, retry=None
            )
            objects = [f"gs://{bucket}/{blob.name}" for blob in found]
            return objects, [f"gs://{bucket}/{folder}" for folder in sorted(found.prefixes)]

        return self.attempt(prefix, request)


_CONTENT_TYPE: Final = "application/octet-stream"


def _mtime(blob: Any) -> float:
    """When an object was written; its generation, as that is what comes with every answer."""
    return int(blob.generation) / 1e6


class _GcsReader(Reader):
    """A GET for each window of the object, most often the only one."""

    def __init__(self, store: _Gcs, path: str, head: int | None = None) -> None:
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
        self.generation, self.mtime = int(self._blob.generation), _mtime(self._blob)

    def _request(self, start: int, length: int) -> None:
        from google.api_core.exceptions import RequestRangeNotSatisfiable

        try:
            self._window = self._blob.download_as_bytes(
                start=start,
                end=start + length - 1,
                raw_download=True,  # or what is stored as gzip would be unpacked on the way
                checksum=None,  # the server knows only that of the whole
                if_generation_match=self.generation,
                retry=None,
            )
        except RequestRangeNotSatisfiable:
            self._window = b""  # an empty object has no first byte
        self._start = start

    def _from_position(self) -> bytes:
        """What the window has from the position on."""
        ahead = self._position - self._start
        return self._window[ahead:] if ahead else self._window

    def _read_some(self, view: memoryview) -> int:
        if not self._start <= self._position < self._start + len(self._window):
            self._request(self._position, _WINDOW_BYTES)
        start = self._position - self._start
        piece = self._window[start : start + len(view)]
        if not piece:
            raise ConnectionError(f"{self._position} bytes came, where the object has {self.size}")
        view[: len(piece)] = piece
        return len(piece)

    def _read_rest(self) -> bytes:
        data = self._from_position() if self._start <= self._position else b""
        if missing := self.size - self._position - len(data):
            self._request(self.size - missing, missing)
            data += self._window
        if len(data) != self.size - self._position:
            raise ConnectionError(f"{len(data)} bytes came, where {self.size - self._position} are left")
        return data


class _GcsPieces(Pieces):
    def __init__(self, store: _Gcs, path: str) -> None:
        self._store, self._path = store, path
        self._handle = store.blob(path).open(
            "wb", chunk_size=_PIECE_BYTES, ignore_flush=True, content_type=_CONTENT_TYPE, retry=store.retry
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


_KINDS: Final[dict[str, type[Store]]] = {"s3": _S3, "gs": _Gcs}
_lock = threading.Lock()
_made: dict[str, tuple[int, Any, Store]] = {}


def store_of(path: str) -> Store | None:
    """The store that a path lies in; None for the schemes that Beam's file systems serve.

    Raises:
        ImportError: its client library is not installed.
    """
    scheme = path.partition("://")[0]
    if scheme not in _KINDS:
        return None
    from apache_beam.io.filesystems import FileSystems
    from apache_beam.options.pipeline_options import PipelineOptions

    options = FileSystems._pipeline_options
    with _lock:
        # Connections must not be shared by processes.
        pid, known, store = _made.get(scheme, (0, None, None))
        if store is None or pid != os.getpid() or known is not options:
            store = _KINDS[scheme](options or PipelineOptions([]))
            _made[scheme] = os.getpid(), options, store
    return store
