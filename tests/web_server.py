"""Web servers of this machine: a plain one that knows ranges, and Python's own, which does not."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.services.fault_proxy import FaultProxy


class Plain(SimpleHTTPRequestHandler):
    """Files whole, whatever is asked for."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the tests' output clean."""

    def end_headers(self) -> None:
        if self.path.endswith(".gz"):  # as some servers are set up to say of them
            self.send_header("Content-Encoding", "gzip")
        super().end_headers()


class Ranges(Plain):
    """Files whole or in parts."""

    def do_GET(self) -> None:
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range")
        if wanted is None or not path.is_file():
            super().do_GET()
            return
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())  # type: ignore[union-attr]
        data = path.read_bytes()
        part = data[first : last + 1]
        self.send_response(206 if part else 416)
        if part:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


class Redirecting(Ranges):
    """Files, and redirects to what stands behind /to/; /to/LENGTH and /to/DATE have a header of no sense."""

    def do_GET(self) -> None:
        if not self.path.startswith("/to/"):
            super().do_GET()
            return
        name, value = {
            "LENGTH": ("Content-Length", "many"),
            "DATE": ("Last-Modified", "yesterday"),
        }.get(self.path[4:], ("Location", unquote(self.path[4:], "latin-1") or self.path))
        self.send_response(302 if name == "Location" else 200)
        self.send_header(name, value)
        if name != "Content-Length":
            self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()


@contextlib.contextmanager
def serve(folder: Path, handler: type[Plain]) -> Iterator[FaultProxy]:
    """A server of a folder, behind a proxy that counts."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True)
        thread.start()
        proxy = FaultProxy(server.server_address[1])
        yield proxy
        proxy.close()
        server.shutdown()
