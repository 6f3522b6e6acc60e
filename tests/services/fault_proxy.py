"""An HTTP proxy in front of one server: it notes every request, and spoils some."""

from __future__ import annotations

import http.client
import itertools
import random
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NoReturn
from urllib.parse import parse_qsl, unquote, urlsplit

FAULTS = ("429", "500", "502", "503", "504", "reset", "lost", "cut", "slow")
"""What may happen to a request.

A number is the status of an answer to a question that the server never saw; `reset` breaks the connection
before the question reaches the server, `lost` after it has done as asked; `cut` breaks it in the middle of
the answer; `slow` sends the answer in drops.
"""

_HOP_BY_HOP = frozenset(["connection", "content-length", "expect", "keep-alive", "transfer-encoding"])


@dataclass(frozen=True)
class Request:
    """A request that came through.

    Attributes:
        method: of HTTP.
        path: without the query, unquoted.
        query: its parameters.
        status: of the answer; 0 if there was none.
        sent: bytes of the request's body.
        received: bytes of the answer's body.
        fault: that was done to it, or "".
    """

    method: str
    path: str
    query: dict[str, str]
    status: int
    sent: int
    received: int
    fault: str


class FaultProxy:
    """Serves on a port of 127.0.0.1, until it is closed.

    Args:
        port: of the server, on 127.0.0.1.

    Attributes:
        port: of the proxy.
        requests: what came through, in the order of the answers.
        choose: says what to do to a request, by its method and path: one of FAULTS, or another status, or "".
    """

    def __init__(self, port: int) -> None:
        self.upstream = port
        self.requests: list[Request] = []
        self.choose: Callable[[str, str], str] = _nothing
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.005,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def spoil(self, rate: float, seed: int) -> None:
        """Spoil this share of the requests from now on, in all the ways in turn."""
        dice, faults, lock = random.Random(seed), itertools.cycle(FAULTS), threading.Lock()

        def choose(method: str, path: str) -> str:
            with lock:
                return next(faults) if dice.random() < rate else ""

        self.choose = choose

    def rest(self) -> list[Request]:
        """Spoil nothing any more; what came through so far, which is forgotten."""
        self.choose = _nothing
        seen, self.requests = self.requests, []
        return seen

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _nothing(method: str, path: str) -> str:
    return ""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A broken connection, by us or by the client, is what this proxy is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultProxy

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the tests' output clean."""

    def _serve(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        fault = self.owner.choose(self.command, path)
        answer: tuple[int, list[tuple[str, str]], bytes] = (0, [], b"")
        if fault.isdigit():
            answer = int(fault), [], b""
        elif fault != "reset":
            answer = self._ask(body)
        query = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
        status, headers, data = answer if fault != "lost" else (0, [], b"")
        half = len(data) // 2 if fault == "cut" else len(data)
        self.owner.requests.append(
            Request(
                self.command, path, query, status, len(body), 0 if self.command == "HEAD" else half, fault
            )
        )
        if status == 0:
            self._break()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            step = max(1, half // 20) if fault == "slow" else half
            for start in range(0, half, step or 1):
                self.wfile.write(data[start : min(start + step, half)])
                self.wfile.flush()
                if fault == "slow":
                    threading.Event().wait(0.01)
        if fault == "cut":
            self._break()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _serve  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.owner.upstream)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        data = response.read()
        is_head = self.command == "HEAD"  # whose answer has the length of a body that is not sent
        dropped = _HOP_BY_HOP - {"content-length"} if is_head else _HOP_BY_HOP
        headers = [(n, v) for n, v in response.getheaders() if n.lower() not in dropped]
        connection.close()
        return response.status, headers, data

    def _break(self) -> NoReturn:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise ConnectionAbortedError
