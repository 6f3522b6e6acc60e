"""One build, conversion or pipeline at a time in one output."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from beam_nifti.errors import OutputBusyError
from beam_nifti.storage import disk
from beam_nifti.storage import paths as storage
from beam_nifti.support.process import in_background
from beam_nifti.support.strict_json import dump_json, load_json

LOCK_FILE: Final = ".lock"
_RENEW_SECONDS: Final = 30.0
_STALE_SECONDS: Final = 180.0  # a lease that was not renewed for so long belongs to a dead build
_LEASE_BYTES: Final = 1 << 16  # of a lease that are read: more than one has

_held: dict[str, str] = {}
"""Tokens of the leases of this process, by their paths."""


@contextlib.contextmanager
def hold(output: str) -> Iterator[None]:
    """Hold an output for the time of the block.

    On the local disk the lock dies with its process. On an object store it is a lease that is renewed
    every 30 seconds. It is dead when it was not renewed for 3 minutes by the store's clock, or when its
    process is known to be gone. On S3 and Cloud Storage it is taken and renewed by conditional writes, so
    by one build alone.

    Raises:
        OutputBusyError: another build holds it.
        OutputError: the output cannot be written.
        OSError: the output cannot be written now, but that may pass.
    """
    path = storage.join(output, LOCK_FILE)
    with _lease(path) if storage.is_remote(output) else _flock(path):
        yield


def require_held(output: str) -> None:
    """Stop a build that has lost its output to another one; nothing if this process holds no lease.

    A machine that was suspended, or that could not reach the store for minutes, has not renewed its lease.

    Raises:
        OutputBusyError: the lease is another build's by now, or was removed.
        OSError: the store cannot be reached.
    """
    path = storage.join(output, LOCK_FILE)
    if path in _held and not _is_own(path, _held[path]):
        raise _lost(path)


@contextlib.contextmanager
def _flock(path: str) -> Iterator[None]:
    while True:
        descriptor = disk.open_lock(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise OutputBusyError(
                f"{Path(path).parent}: another command is writing here; wait for it, or choose another OUTPUT"
            ) from None
        except OSError as e:  # a file system without locks
            os.close(descriptor)
            raise storage.unwritable(storage.dirname(path), "OUTPUT", e, is_folder=True) from e
        with contextlib.suppress(FileNotFoundError):
            if os.path.sameopenfile(descriptor, again := disk.open_lock(path, make=False)):
                os.close(again)
                break
            os.close(again)
        os.close(descriptor)  # its holder removed the file between our open and our lock
    try:
        yield
    finally:
        disk.delete(path)
        os.close(descriptor)


@contextlib.contextmanager
def _lease(path: str) -> Iterator[None]:
    token = uuid.uuid4().hex
    try:
        found, version = storage.read_version(path, _LEASE_BYTES)
    except FileNotFoundError:
        version = storage.ABSENT
    else:
        _refuse_held(path, _parse(found))
    _take(path, token, version)
    if not _is_own(path, token):
        raise _lost(path)
    _held[path] = token
    is_own = False
    try:
        with in_background(_keep(path, token), "lease"):
            yield
    finally:
        del _held[path]
        if is_own := _is_own(path, token):
            storage.delete(path)
    if not is_own:
        raise _lost(path)


def _take(path: str, token: str, version: str | None) -> None:
    """Write the first lease; it also shows whether the output can be written."""
    try:
        _write(path, token, version)
    except FileExistsError:
        return  # another build was faster, which the caller sees
    except OSError as e:
        if isinstance(e, FileNotFoundError) and version != storage.ABSENT:
            _take(path, token, storage.ABSENT)  # its holder has just removed it
        else:  # such as a bucket that does not exist
            raise storage.unwritable(storage.dirname(path), "OUTPUT", e, is_folder=True) from e


def _keep(path: str, token: str) -> Iterator[float]:
    """Renew a lease, now and then, until it is another build's."""
    while True:
        yield _RENEW_SECONDS
        with contextlib.suppress(OSError):  # tried again; `require_held` looks whether it held
            found, version = storage.read_version(path, _LEASE_BYTES)
            if _parse(found).get("token") != token:
                return
            _write(path, token, version)


def _is_own(path: str, token: str) -> bool:
    try:
        return _parse(storage.read_head(path, _LEASE_BYTES)).get("token") == token
    except FileNotFoundError:
        return False


def _lost(path: str) -> OutputBusyError:
    return OutputBusyError(
        f"{storage.dirname(path)}: another command took this output, or its {LOCK_FILE} was "
        "removed; run one at a time, and run this one again"
    )


def _parse(lease: bytes) -> dict[str, object]:
    try:
        holder = load_json(lease)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _write(path: str, token: str, version: str | None) -> None:
    """Write a lease in place of the one that was read, unless another build was faster."""
    pid = os.getpid()
    process = {"pid": pid, "started": _start_of(pid), "system": this_system()}
    lease = {"token": token, "host": socket.gethostname(), **process}
    storage.write_if(path, dump_json(lease).encode(), version)


def _refuse_held(path: str, holder: dict[str, object]) -> None:
    if _is_gone(holder):
        return
    try:
        age = _age(path)
    except FileNotFoundError:
        return  # its holder has just removed it
    if age is not None and age > _STALE_SECONDS:
        return
    raise OutputBusyError(
        f"{storage.dirname(path)}: a build or conversion on {holder.get('host', 'another machine')} is "
        "writing here"
        + (f" (last renewed {age:.0f} s ago)" if age is not None else "")
        + "; wait for it to finish or, if it died, "
        + (f"remove {path}" if age is None else f"until its lock expires, after {_STALE_SECONDS:.0f} s")
    )


def _age(path: str) -> float | None:
    """Seconds since a remote file was written, by the store's clock alone; None if it keeps no times.

    The time is that of a file written now: machines whose clocks differ by minutes all see the
    same age.
    """
    written = storage.stat(path).mtime
    probe = f"{path}.{uuid.uuid4().hex}.tmp"
    storage.write(probe, b"")
    try:
        now = storage.stat(probe).mtime
    except FileNotFoundError:
        return None  # and no sign that the lease is gone
    finally:
        storage.delete(probe)
    return max(0.0, now - written) if now and written else None


def _is_gone(holder: dict[str, object]) -> bool:
    """Whether the process that wrote a lease is known to have ended; False if that is unknown."""
    system, pid = holder.get("system"), holder.get("pid")
    if system is None or system != this_system() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # it is somebody else's
    started = _start_of(pid)
    return started is not None and started != holder.get("started")


def this_system() -> str | None:
    """The name of the namespace in which process numbers are valid; None if it is unknown.

    Containers may share a host name, and the boot of their host, and still number their processes apart.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _start_of(pid: int) -> int | None:
    """When a process started, in ticks since the boot: its number may be another's by now.

    Source: proc_pid_stat(5), field 22.
    """
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None
