"""One build at a time in one output."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from beam_nifti import storage
from beam_nifti.background import in_background
from beam_nifti.errors import OutputBusyError
from beam_nifti.strict_json import dump_json

LOCK_FILE: Final = ".lock"
_RENEW_SECONDS: Final = 30.0
_STALE_SECONDS: Final = 180.0
"""A lease that was not renewed for so long belongs to a dead build."""


@contextlib.contextmanager
def hold(output: str) -> Iterator[None]:
    """Hold an output for the time of the block.

    On the local disk the lock dies with its process. On an object store it is a lease that is renewed
    every 30 seconds; one that was not for 3 minutes, or whose process on this machine is gone, is dead.
    On S3 and Cloud Storage it is taken and renewed by conditional writes, so by one build alone.

    Raises:
        OutputBusyError: another build holds it.
    """
    path = storage.join(output, LOCK_FILE)
    with _lease(path) if storage.is_remote(output) else _flock(path):
        yield


@contextlib.contextmanager
def _flock(path: str) -> Iterator[None]:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise OutputBusyError(
                f"{Path(path).parent}: another build is writing here; wait for it, or choose another OUTPUT"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.sameopenfile(descriptor, again := os.open(path, os.O_RDWR)):
                os.close(again)
                break
            os.close(again)
        os.close(descriptor)  # its holder removed the file between our open and our lock
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(path).unlink()
        os.close(descriptor)


@contextlib.contextmanager
def _lease(path: str) -> Iterator[None]:
    token = uuid.uuid4().hex
    try:
        found, version = storage.read_version(path)
    except FileNotFoundError:
        version = storage.ABSENT
    else:
        _refuse_held(path, _parse(found))
    _write(path, token, version)
    _require_own(path, token)
    try:
        with in_background(_keep(path, token), "lease"):
            yield
            _require_own(path, token)
    finally:
        if _holder(path).get("token") == token:
            storage.delete(path)


def _keep(path: str, token: str) -> Iterator[float]:
    """Renew a lease, now and then, until it is another build's."""
    while True:
        yield _RENEW_SECONDS
        with contextlib.suppress(OSError):  # tried again; the end of the build looks whether it held
            found, version = storage.read_version(path)
            if _parse(found).get("token") != token:
                return
            _write(path, token, version)


def _require_own(path: str, token: str) -> None:
    if _holder(path).get("token") != token:
        raise OutputBusyError(
            f"{storage.dirname(path)}: another build took this output; start one at a time, and run "
            "this one again"
        )


def _holder(path: str) -> dict[str, object]:
    try:
        return _parse(storage.read(path))
    except FileNotFoundError:
        return {}


def _parse(lease: bytes) -> dict[str, object]:
    try:
        holder = json.loads(lease)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _write(path: str, token: str, version: str | None) -> None:
    """Write a lease in place of the one that was read, unless another build was faster."""
    lease = {"token": token, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    with contextlib.suppress(FileExistsError, FileNotFoundError):  # whose it is now, the callers look
        storage.write_if(path, dump_json(lease).encode(), version)


def _refuse_held(path: str, holder: dict[str, object]) -> None:
    age = time.time() - float(str(holder.get("time", 0)))
    dead = age > _STALE_SECONDS or (
        holder.get("host") == socket.gethostname() and not _is_alive(int(str(holder.get("pid", 0))))
    )
    if not dead:
        raise OutputBusyError(
            f"{storage.dirname(path)}: a build on {holder.get('host')} was writing here {age:.0f} s ago; "
            f"wait for it, or, if it died, for its lease to end after {_STALE_SECONDS:.0f} s"
        )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
