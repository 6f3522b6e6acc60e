"""Which store serves a URL, by its scheme. Client libraries are imported when a store is first used."""

from __future__ import annotations

import errno
import functools
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

from beam_nifti.errors import OutputError
from beam_nifti.storage.beam_files import BeamFiles
from beam_nifti.storage.fsspec import Fsspec
from beam_nifti.storage.gcs import Gcs
from beam_nifti.storage.http import Http, WebHdfs
from beam_nifti.storage.names import is_remote, scheme_of, wrong_with
from beam_nifti.storage.object_store import ObjectStore, Store
from beam_nifti.storage.s3 import S3

_STORES: Final[dict[str, Callable[[Any], Store]]] = {
    "s3": S3,
    "gs": Gcs,
    "http": Http,
    "https": Http,
    "hdfs": WebHdfs,
    **{scheme: functools.partial(Fsspec, scheme=scheme) for scheme in ("az", "abfs", "abfss")},
}
"""Stores by scheme; Beam or fsspec serves other schemes."""

_EXTRAS: Final = {"s3": "aws", "gs": "gcp", "az": "azure", "abfs": "azure", "abfss": "azure"}  # by scheme

_REMEDY: Final = (
    "use the local disk, s3:// (install beam-nifti[aws]), gs:// (beam-nifti[gcp]), "
    "az:// (beam-nifti[azure]), hdfs:// or https://, or install fsspec and what it needs for this scheme"
)

_WRITE_ELSEWHERE: Final = "is read-only; write to the local disk, s3:// or gs://"
_stores: dict[str, tuple[int, Any, Store]] = {}
_stores_lock = threading.Lock()


def store_of(path: str) -> Store:
    """The store of a URL; an OSError with the remedy if there is none."""
    if problem := wrong_with(path):
        raise OSError(errno.EINVAL, problem, path)
    scheme = scheme_of(path)
    # A pipeline sets its options there; where Beam is not loaded, none did.
    beam = getattr(sys.modules.get("apache_beam.io.filesystems"), "FileSystems", None)
    options = getattr(beam, "_pipeline_options", None)
    with _stores_lock:
        # Connections must not be shared by processes.
        pid, known, store = _stores.get(scheme, (0, None, None))
        if store is None or pid != os.getpid() or known is not options:
            try:
                store = _maker(scheme)(options)
            except ImportError as e:
                if isinstance(e.__cause__, ValueError):  # no package that is known could serve it
                    reason = f"{scheme}:// is not supported here; {_REMEDY}"
                    raise OSError(errno.EINVAL, reason, path) from e
                remedy = f"install beam-nifti[{_EXTRAS[scheme]}]" if scheme in _EXTRAS else _REMEDY
                raise OSError(f"{path}: {scheme}:// is not supported here ({e}); {remedy}") from e
            _stores[scheme] = os.getpid(), options, store
    return store


def writable_store_of(path: str) -> ObjectStore:
    """The store to write a URL with; an OSError if it is read-only."""
    store = store_of(path)
    if isinstance(store, ObjectStore):
        return store
    raise OSError(f"{path}: {scheme_of(path)}:// {_WRITE_ELSEWHERE}, and copy the files from there")


def refuse_unwritable(path: str, what: str) -> None:
    """Refuse the root of the file system, and a URL of a store that is read-only or not supported.

    `what` is the option or argument that gives the path.
    """
    if path and not path.strip("/"):
        raise OutputError(f"{what} is {path}, the root of the file system; choose a folder below it")
    scheme = scheme_of(path)
    if is_remote(path) and scheme not in ("s3", "gs") and _maker(scheme) is not BeamFiles:
        why = (
            _WRITE_ELSEWHERE
            if scheme in _STORES
            else "is not supported; write to the local disk, s3:// or gs://"
        )
        raise OutputError(f"{what} is {path}: {wrong_with(path) or f'{scheme}:// {why}'}")


def can_list(folder: str) -> bool:
    """Whether files can be listed; web servers have no listing."""
    return _STORES.get(scheme_of(folder)) is not Http


def _maker(scheme: str) -> Callable[[Any], Store]:
    if scheme in _STORES:
        return _STORES[scheme]
    from apache_beam.io.filesystems import FileSystem  # from there, as that loads those of Beam's own

    is_of_beam = any(known.scheme() == scheme for known in FileSystem.get_all_subclasses())
    return BeamFiles if is_of_beam else functools.partial(Fsspec, scheme=scheme)
