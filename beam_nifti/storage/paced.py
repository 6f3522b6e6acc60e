"""Enforces a minimum rate on the answers of web servers, through requests and urllib3.

A socket's time-out restarts with each byte, so a server that sends a byte a minute would never trigger it.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from typing import Any, Final, cast

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from beam_nifti.storage.object_store import SILENCE

SLOWEST: Final = 8192  # bytes per second, on average, after the first SILENCE seconds


class PacedAdapter(HTTPAdapter):
    """Connections whose answers raise a time-out if they are slower than SLOWEST."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Make the pool of connections."""
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}

    def proxy_manager_for(self, proxy: Any, **kwargs: Any) -> Any:
        """The pool of connections to a proxy."""
        manager = super().proxy_manager_for(proxy, **kwargs)
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}
        return manager


class _Reader(io.RawIOBase):
    """What comes from a socket, at the pace."""

    def __init__(self, raw: io.RawIOBase, connection: socket.socket) -> None:
        self._raw, self._socket = raw, connection
        self._waited, self._received = 0.0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = SILENCE + self._received / SLOWEST - self._waited
        if left <= 0:
            raise TimeoutError(f"received only {self._received} bytes in {self._waited:.0f} seconds")
        self._socket.settimeout(min(SILENCE, left))
        began = time.monotonic()
        count = cast(Any, self._raw).readinto(buffer)
        self._waited += time.monotonic() - began
        self._received += count or 0
        return cast("int | None", count)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Reader(self.fp.detach(), sock))


class _Connection(HTTPConnection):
    response_class = _Response


class _SecureConnection(HTTPSConnection):
    response_class = _Response


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection
