"""What is read over HTTP, through requests: files of web servers, and HDFS by WebHDFS.

Sources: RFC 9110, section 14, "Range Requests"; Hadoop 3.4.2, "WebHDFS REST API".
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import io
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote, urlencode

from beam_nifti.storage.object_store import SILENCE, RangeStore, Stat, broken_connections, split_path

_CONNECTIONS: Final = 64
_MOST_JSON: Final = 1 << 30  # bytes of an answer of WebHDFS, such as a list of files
_MOST_REASON: Final = 1 << 20  # bytes of the text of an error
_WEBHDFS_PORT: Final = 9870  # of a NameNode, if the URL has no port

_DENIED: Final = frozenset(["AccessControlException", "AuthorizationException", "SecurityException"])
"""Exceptions of WebHDFS for missing rights. It gives the status 403 to most errors."""


def _is_no_http(error: BaseException) -> bool:
    """Whether an answer was no HTTP, such as an endless header; one that broke off may come whole later."""
    causes = [error]
    for cause in causes:
        if isinstance(cause, http.client.HTTPException):
            return not isinstance(cause, http.client.RemoteDisconnected | http.client.IncompleteRead)
        causes += [inner for inner in cause.args if isinstance(inner, Exception) and inner not in causes]
    return False


class Http(RangeStore):
    """`http://` and `https://`: a server of files that knows ranges."""

    def __init__(self, options: Any) -> None:
        import requests

        from beam_nifti.storage.paced import PacedAdapter

        self._lost = broken_connections()
        self._error = requests.HTTPError
        self._session = requests.Session()
        self._session.hooks["response"].append(_close_redirect)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, PacedAdapter(pool_maxsize=_CONNECTIONS))

    def _unusable(self, error: BaseException) -> str | None:
        """Why an answer is of no use, without the server's words: they may be of other files and persons."""
        import requests.exceptions as known

        if _is_no_http(error):
            return "what the server answers is not HTTP; check the URL in a browser"
        if isinstance(error, io.UnsupportedOperation | EOFError):
            return str(error)
        if isinstance(error, known.TooManyRedirects):
            return "the server redirects without end; check the URL in a browser"
        # Of this machine: a proxy, and a package that one needs.
        is_of_proxy = isinstance(error, known.InvalidProxyURL) or str(error).startswith(
            "Missing dependencies"
        )
        if is_of_proxy or not isinstance(error, ValueError | OverflowError):
            return None
        kind = type(error).__name__
        return f"the URL, or an answer of its server, is not valid ({kind}); check the URL in a browser"

    @staticmethod
    def _answer(error: BaseException) -> tuple[int | None, str]:
        response = getattr(error, "response", None)
        if response is None:
            return None, ""
        return response.status_code, "NotFound" if response.status_code == 404 else response.reason

    @contextlib.contextmanager
    def _ask(self, method: str, url: str, **headers: str) -> Iterator[Any]:
        """The answer of a server, its body unread."""
        plain = {"Accept-Encoding": "identity"}  # or a server may pack what it sends, and ranges count that
        with self._session.request(
            method, url, headers=plain | headers, timeout=SILENCE, allow_redirects=True, stream=True
        ) as response:
            if not response.ok:
                raise self._error(self._reason(response), response=response)
            yield response

    def _reason(self, response: Any) -> str:
        return str(response.reason)

    @staticmethod
    def _body(response: Any, most: int) -> bytes:
        """The body of an answer, as it was sent: to some servers .gz is an encoding of what it unpacks to."""
        pieces, left = list[bytes](), most
        # The last reading, of nothing, is where urllib3 notices an answer that broke off.
        while piece := response.raw.read(left or 1, decode_content=False):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                raise io.UnsupportedOperation(
                    f"the server sent more than the {most} bytes that were requested"
                )
        return b"".join(pieces)

    def request_stat(self, path: str) -> Stat:
        with self._ask("HEAD", path) as response:
            headers = response.headers
        if "Content-Length" not in headers:
            raise io.UnsupportedOperation("the server does not give the size of the file")
        written = headers.get("Last-Modified")
        mtime = email.utils.parsedate_to_datetime(written).timestamp() if written else 0.0
        return Stat(int(headers["Content-Length"]), mtime, headers.get("ETag") or None)

    def request_range(self, path: str, start: int, length: int) -> bytes:
        try:
            with self._ask("GET", path, Range=f"bytes={start}-{start + length - 1}") as response:
                _require_range(response.status_code, response.headers, start, length)
                return self._body(response, length)
        except self._error as e:
            if self._answer(e)[0] != 416:
                raise
            return b""  # the file ends before the first of them

    def request_list(self, folder: str, *, deep: bool) -> list[tuple[str, bool]]:
        raise io.UnsupportedOperation("a web server does not list its files")


def _close_redirect(response: Any, *_: Any, **__: Any) -> None:
    """Leave the body of a redirect unread; requests would read all of it before it goes on."""
    if response.is_redirect and response.headers.get("Content-Length") != "0":
        response.close()


def _require_range(status: int, headers: Mapping[str, str], start: int, length: int) -> None:
    """Refuse the answer of a server that sends the whole file instead of a range."""
    sent = headers.get("Content-Range", "")
    is_whole = start == 0 and status == 200 and int(headers.get("Content-Length", length + 1)) <= length
    if not is_whole and (status != 206 or not sent.startswith(f"bytes {start}-")):
        raise io.UnsupportedOperation(
            "the server sent the whole file instead of the requested range; use a server that supports range "
            "requests, such as nginx, Apache or Caddy"
        )


class WebHdfs(Http):
    """`hdfs://NAMENODE:9870/path`: HDFS, by the WebHDFS of its NameNode or of an HttpFS."""

    @staticmethod
    def _answer(error: BaseException) -> tuple[int | None, str]:
        status, _ = Http._answer(error)
        if status is None:
            return None, ""
        try:
            name = json.loads(str(error))["RemoteException"]["exception"]
        except (ValueError, KeyError, TypeError):
            return status, "not from WebHDFS: the URL's port must be that of the NameNode's web page"
        if name == "FileNotFoundException":
            return 404, "NotFound"
        return (None if status == 403 and name not in _DENIED else status), name

    def _reason(self, response: Any) -> str:
        is_json = "json" in response.headers.get("Content-Type", "")
        return self._body(response, _MOST_REASON).decode() if is_json else str(response.reason)

    def _ask_json(self, url: str) -> Any:
        with self._ask("GET", url) as response:
            return json.loads(self._body(response, _MOST_JSON))

    def _url(self, path: str, operation: str, **parameters: int) -> str:
        host, name = split_path(path)
        address = host if ":" in host else f"{host}:{_WEBHDFS_PORT}"
        user = os.environ.get("HADOOP_USER_NAME")
        query = {"op": operation, **parameters} | ({"user.name": user} if user else {})
        return f"http://{address}/webhdfs/v1/{quote(name)}?{urlencode(query)}"

    def request_stat(self, path: str) -> Stat:
        found = self._ask_json(self._url(path, "GETFILESTATUS"))["FileStatus"]
        if found["type"] != "FILE":
            raise FileNotFoundError(path)
        return Stat(found["length"], found["modificationTime"] / 1000)

    def request_range(self, path: str, start: int, length: int) -> bytes:
        try:
            with self._ask("GET", self._url(path, "OPEN", offset=start, length=length)) as response:
                return self._body(response, length)
        except self._error as e:
            if "out of the range" not in str(e):
                raise
            return b""  # the file ends before the first of them

    def request_list(self, folder: str, *, deep: bool) -> list[tuple[str, bool]]:
        found = self._ask_json(self._url(folder, "LISTSTATUS"))["FileStatuses"]["FileStatus"]
        named = ((each["pathSuffix"], each["type"] != "FILE") for each in found)
        return [(f"{folder}/{name}", is_folder) for name, is_folder in named if name]
