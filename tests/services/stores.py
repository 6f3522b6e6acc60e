"""An S3 server and a Cloud Storage server on this machine, each behind a proxy."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.services.conftest import INSTALL_TIMEOUT
from tests.services.fault_proxy import FaultProxy

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "object_stores"
BUCKET = "lab"


@dataclass(frozen=True)
class Servers:
    """The two servers.

    Attributes:
        proxies: by scheme.
        bucket: the folder in which the S3 server keeps the objects of its bucket.
    """

    proxies: dict[str, FaultProxy]
    bucket: Path

    def rest(self) -> None:
        for proxy in self.proxies.values():
            proxy.rest()


@contextlib.contextmanager
def serve(run: Path) -> Iterator[Servers]:
    """Both servers, with what leads to them in the environment.

    Args:
        run: a folder for what they hold.
    """
    subprocess.run([SCRIPT, "install"], check=True, timeout=INSTALL_TIMEOUT)
    s3_port, gcs_port = free_ports(2)
    s3, gcs = FaultProxy(s3_port), FaultProxy(gcs_port)
    ports = [f"--s3-port={s3_port}", f"--gcs-port={gcs_port}", f"--gcs-url={gcs.url}"]
    up = subprocess.run(
        [SCRIPT, "up", BUCKET, f"--run={run}", *ports],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=INSTALL_TIMEOUT,
    )
    exports = (line.removeprefix("export ").partition("=") for line in up.stdout.splitlines())
    with pytest.MonkeyPatch.context() as patch:
        for name, _, value in exports:
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", s3.url)
        yield Servers({"s3": s3, "gs": gcs}, run / "s3" / BUCKET)
    subprocess.run([SCRIPT, "down", f"--run={run}"], check=True)
    s3.close()
    gcs.close()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
