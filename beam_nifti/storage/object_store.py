"""What all stores have in common.

`s3.py` and `gcs.py` are the stores that builds can write to. They use the client libraries that Beam's extras
install, with Beam's options. Beam's own file systems are not enough: they make a client for every call,
request an object's size before its bytes, hide the errors of copies, and publish the partial files of failed
writers.
`http.py` and `fsspec.py` are the read-only stores.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import io
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from beam_nifti.support import logs

T = TypeVar("T")
Listing = tuple[list[str], list[str]]
"""Paths of objects, and of folders, which end in "/"."""

ATTEMPTS: Final = 8
FIRST_WAIT: Final = 1.0
LONGEST_WAIT: Final = 16.0
ALL_WAITS: Final = 63.0
"""Seconds between the attempts at a request: 1, 2, 4, 8, 16, 16, 16, each cut by up to half at random."""

SILENCE: Final = 60.0  # seconds without a byte after which a server counts as silent
_TRANSIENT_STATUS: Final = frozenset([408, 429, 500, 502, 503, 504])
_TRANSIENT_CODES: Final = frozenset(
    [
        *("RequestTimeout", "SlowDown", "Throttling", "InternalError", "ConditionalRequestConflict"),
        *("rateLimitExceeded", "userRateLimitExceeded"),
    ]
)
"""What the stores say of a transient error, whatever the HTTP status that it comes with."""

_ABSENT_CODES: Final = frozenset(
    ["NoSuchKey", "NoSuchBucket", "NoSuchUpload", "404", "NotFound", "Not Found", "notFound"]
)
"""Codes of stores for a missing object. Some stores answer 404 for unknown users, too."""

_CREDENTIALS_CODES: Final = frozenset(
    [
        *("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "RequestExpired"),
        *("TokenRefreshRequired", "RequestTimeTooSkewed", "AccountProblem", "accountDisabled"),
    ]
)
"""Codes of stores that refuse the user, not access to the object."""

_NOT_OF_PATHS: Final = frozenset([404, 407])  # unknown users, and proxies that require a password
_NOT_ACCEPTED: Final = errno.EPROTO  # the client or its credentials are at fault, so a retry fails
PIECE_BYTES: Final = 16 << 20  # bytes to send at once; less is sent in one request


@dataclass(frozen=True, slots=True)
class Stat:
    """What distinguishes a file from another one at the same path.

    Attributes:
        size: size in bytes.
        mtime: time of modification, in seconds since 1970; 0 if the store does not give it.
        version: the store's name for this content: an ETag, or a generation of Cloud Storage; None where it
            has none, as on the local disk.
    """

    size: int
    mtime: float
    version: str | None = None


class Reader(io.RawIOBase):
    """An object, opened for reading.

    Attributes:
        size: bytes that can be read.
        stat: Stat of the object; if only its head was opened, of that.
    """

    stat: Stat

    def __init__(self, store: Store, path: str) -> None:
        self._store, self._path = store, path
        self._position = 0
        self.size = 0

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
        """Read the rest; after an error, all of it again."""
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
        """Discard what was sent."""


class Writer(io.BufferedIOBase):
    """An object that is being written. It appears only with `finish`."""

    def __init__(self, store: ObjectStore, path: str) -> None:
        self._store, self._path = store, path
        self._buffer = bytearray()
        self._pieces: Pieces | None = None

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: Any) -> int:
        """Buffer bytes, and send full pieces."""
        view = memoryview(data)
        self._buffer += view
        if len(self._buffer) >= PIECE_BYTES:
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
    """A readable store. All errors are OSErrors. The options are Beam's, of the running pipeline, or None."""

    _lost: tuple[type[Exception], ...]
    """What the client raises when a connection breaks or a server does not answer."""

    def _unusable(self, error: BaseException) -> str | None:
        """Why a server's answer about this path is unusable; None for other errors."""
        return None

    @abc.abstractmethod
    def __init__(self, options: Any) -> None: ...

    def attempt(self, path: str, request: Callable[[], T]) -> T:
        """Make a request, again while it fails for a reason that may pass.

        Raises:
            FileNotFoundError: HTTP 404.
            PermissionError: HTTP 403, access to this path is denied.
            FileExistsError: HTTP 412, a condition of the request does not hold.
            TimeoutError: it failed ATTEMPTS times.
            OSError: any other error, of which these four are kinds. Its errno shows whether it may pass, as
                `outcomes.may_pass` reads it. EINVAL: the store refuses the path, with another HTTP status of
                the 400s, or its answer is of no use. EPROTO: the client or its credentials are not accepted.
        """
        failures = 0
        while True:
            try:
                return request()
            except Exception as e:
                failures += 1
                if failures == ATTEMPTS or not self.is_transient(e):
                    raise self._as_os_error(path, e) from e
                _tell_once(self._host(path), *self._reason_of(_cause(e)))
            wait = min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT)
            time.sleep(wait * random.uniform(0.5, 1.0))

    def _host(self, path: str) -> str:
        """The server of a path, as people know it."""
        return split_path(path)[0].rpartition("@")[2]  # a URL may have a password

    def _reason_of(self, error: BaseException) -> tuple[str, float]:
        """Why a request failed, without the server's words, and for how many seconds it is repeated."""
        status, _ = self._answer(error)
        if status:
            return f"fails (HTTP {status})", ALL_WAITS
        found = _system_error(error)
        if isinstance(found, TimeoutError) or "Timeout" in type(error).__name__:
            return f"does not answer within {SILENCE:g} s", ALL_WAITS + (ATTEMPTS - 1) * SILENCE
        if isinstance(found, socket.gaierror):
            return "cannot be reached (its name cannot be resolved)", ALL_WAITS
        reason = os.strerror(found.errno).lower() if found and found.errno else type(error).__name__
        return f"cannot be reached ({reason})", ALL_WAITS

    def is_transient(self, error: BaseException) -> bool:
        """Whether a failed request may succeed later."""
        error = _cause(error)
        if self._unusable(error):
            return False
        status, code = self._answer(error)
        return status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES or isinstance(error, self._lost)

    def _as_os_error(self, path: str, error: BaseException) -> OSError:
        error = _cause(error)
        if reason := self._unusable(error):
            return OSError(errno.EINVAL, reason, path)
        status, code = self._answer(error)
        said = f"HTTP {status} {code}" if status else f"{type(error).__name__}: {error}"
        if isinstance(error, FileNotFoundError) or (status == 404 and code in _ABSENT_CODES):
            no_bucket = code == "NoSuchBucket" or "bucket does not exist" in str(error)
            reason = "No such bucket" if no_bucket else os.strerror(errno.ENOENT)
            return FileNotFoundError(errno.ENOENT, reason, path)
        if status == 401 or code in _CREDENTIALS_CODES:
            return OSError(_NOT_ACCEPTED, f"the store does not accept the credentials ({said})", path)
        if status == 412:
            return FileExistsError(errno.EEXIST, f"another process has written it meanwhile ({said})", path)
        if self.is_transient(error):
            return TimeoutError(errno.ETIMEDOUT, f"the store failed {ATTEMPTS} times in a row ({said})", path)
        if status == 403:
            return PermissionError(errno.EACCES, f"access is denied ({said})", path)
        if isinstance(_system_error(error), socket.gaierror):  # whose numbers are none of errno's
            number = errno.EHOSTUNREACH
        elif isinstance(error, OSError) and error.errno:
            number = error.errno
        elif status is not None and 400 <= status < 500 and status not in _NOT_OF_PATHS:
            number = errno.EINVAL
        else:  # a client that names what may pass leaves the rest, such as a bucket's name that cannot be
            number = _NOT_ACCEPTED if self._lost and (status or 0) < 500 else errno.EIO
        return OSError(number, f"{said}: {error}" if status else said, path)

    @staticmethod
    @abc.abstractmethod
    def _answer(error: BaseException) -> tuple[int | None, str]:
        """The HTTP status, if the server answered, and the store's own code for the error."""

    @abc.abstractmethod
    def stat(self, path: str) -> Stat:
        """What a Reader of the object has as its `stat`."""

    @abc.abstractmethod
    def open(self, path: str, head: int | None = None) -> Reader:
        """Open an object, or only its first `head` bytes; in one request together with reading it."""

    @abc.abstractmethod
    def get_range(self, path: str, start: int, length: int) -> bytes:
        """Bytes of an object, in one request; fewer at its end."""

    @abc.abstractmethod
    def find(self, prefix: str, *, deep: bool = False, limit: int | None = None) -> Listing:
        """Paths that begin with a prefix, which ends in "/" unless `deep`. About `limit` paths are enough."""


class RangeStore(Store):
    """A read-only store, by requests for ranges."""

    @abc.abstractmethod
    def request_stat(self, path: str) -> Stat:
        """The Stat of a file; one attempt."""

    @abc.abstractmethod
    def request_range(self, path: str, start: int, length: int) -> bytes:
        """Bytes of a file, fewer at its end; one attempt."""

    @abc.abstractmethod
    def request_list(self, folder: str, *, deep: bool) -> list[tuple[str, bool]]:
        """Paths in a folder, each with whether it is a folder; if `deep`, perhaps of lower folders, too."""

    def stat(self, path: str) -> Stat:
        """What a file is."""
        return self.attempt(path, lambda: self.request_stat(path))

    def open(self, path: str, head: int | None = None) -> Reader:
        """Open a file, or only its first `head` bytes."""
        return RangeReader(self, path, head, self.request_range)

    def get_range(self, path: str, start: int, length: int) -> bytes:
        """Bytes of a file, in one request; fewer if it ends before."""
        return self.attempt(path, lambda: self.request_range(path, start, length))

    def find(self, prefix: str, *, deep: bool = False, limit: int | None = None) -> Listing:
        """Paths that begin with a prefix."""
        folder = prefix.rpartition("/")[0]
        try:
            found = self.attempt(folder, lambda: self.request_list(folder, deep=deep))
        except FileNotFoundError:
            return [], []
        objects = [path for path, is_folder in found if not is_folder and path.startswith(prefix)]
        folders = [f"{path}/" for path, is_folder in found if is_folder and path.startswith(prefix)]
        if not deep:
            return objects, folders
        return objects + [path for each in folders for path in self.find(each, deep=True)[0]], []


class RangeReader(Reader):
    """Reads the Stat of a file first, and then each requested range."""

    def __init__(
        self, store: Store, path: str, head: int | None, request_range: Callable[[str, int, int], bytes]
    ) -> None:
        super().__init__(store, path)
        self._request_range = request_range
        self.stat = store.stat(path)
        self.size = self.stat.size if head is None else min(self.stat.size, head)

    def _read_some(self, view: memoryview) -> int:
        data = self._request(min(len(view), self.size - self._position))
        view[: len(data)] = data
        return len(data)

    def _read_rest(self) -> bytes:
        return self._request(self.size - self._position)

    def _request(self, length: int) -> bytes:
        data = self._request_range(self._path, self._position, length)
        if len(data) != length:
            raise EOFError(f"the file has only {self._position + len(data)} of its {self.size} bytes")
        return data


class ObjectStore(Store):
    """A writable store."""

    @abc.abstractmethod
    def put(self, path: str, data: bytes, version: str | None = None) -> None:
        """Write an object; given a version only over that version, and given "" only if there is none."""

    @abc.abstractmethod
    def get_version(self, path: str, size: int) -> tuple[bytes, str | None]:
        """The first `size` bytes of an object, and its version for `put`; None if it has none."""

    @abc.abstractmethod
    def begin(self, path: str) -> Pieces:
        """Begin an upload of several pieces."""

    @abc.abstractmethod
    def copy(self, source: str, target: str) -> None:
        """Copy an object inside the store."""

    @abc.abstractmethod
    def delete(self, paths: Iterable[str]) -> None:
        """Remove objects, which may be absent."""


_hides_hosts: ContextVar[bool] = ContextVar("hides_hosts", default=False)


@contextlib.contextmanager
def hiding_hosts(is_hidden: bool) -> Iterator[None]:
    """Whether warnings of the block omit servers, whose names may be those of persons."""
    token = _hides_hosts.set(is_hidden)
    try:
        yield
    finally:
        _hides_hosts.reset(token)


logging.getLogger("urllib3.connectionpool").addFilter(lambda _: not _hides_hosts.get())

_told: dict[str, float] = {}
_telling = threading.Lock()


def _tell_once(host: str, what: str, seconds: float) -> None:
    """Report that a server fails, once for concurrent requests."""
    with _telling:
        now = time.monotonic()
        if now - _told.get(host, -seconds) < seconds:
            return
        _told[host] = now
    host = "a server of an image" if _hides_hosts.get() else host
    logs.LOGGER.warning("%s %s; trying again for up to %.0f s", host, what, seconds)


def _system_error(error: BaseException | None) -> OSError | None:
    """The system error, or the error of a name lookup, that caused a client's error."""
    found = None
    while error is not None:
        if isinstance(error, TimeoutError) or (isinstance(error, OSError) and error.errno):
            found = error
        error = getattr(error, "os_error", None) or error.__cause__ or error.__context__
    return found


def _cause(error: BaseException) -> BaseException:
    """The error that caused a client's error about its own attempts."""
    return getattr(error, "cause", None) or error


def broken_connections() -> tuple[type[Exception], ...]:
    """What requests raises when a connection breaks or a server does not answer."""
    import requests
    import urllib3

    return (
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
        urllib3.exceptions.HTTPError,
    )


def split_path(path: str) -> tuple[str, str]:
    """Bucket and key of a path.

    >>> split_path("s3://lab/cohort/manifest.tsv")
    ('lab', 'cohort/manifest.tsv')
    """
    bucket, _, key = path.partition("://")[2].partition("/")
    return bucket, key
