"""Keyed hashes that replace names by which a person could be recognized.

The key is read from its file wherever it is needed, and is never written, logged or sent.
Source: docs/format.md, "Anonymous ids".
"""

from __future__ import annotations

import hashlib
from typing import Final, NoReturn

import pyarrow as pa

from beam_nifti.errors import UsageError
from beam_nifti.manifest.tables import strings
from beam_nifti.storage import paths as storage
from beam_nifti.support.outcomes import may_pass

_LEAST_BYTES: Final = 16
_DIGEST_BYTES: Final = 16
PATTERN: Final = f"^[0-9a-f]{{{2 * _DIGEST_BYTES}}}$"  # of every pseudonym
_CHECK_BYTES: Final = 8


class Pseudonyms:
    """The pseudonyms of one key."""

    def __init__(self, secret: bytes) -> None:
        self._key = hashlib.sha256(secret).digest()

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled, so that no key gets into a job graph."""
        raise TypeError("a key cannot be sent to workers; send the path of its file")

    @property
    def check(self) -> str:
        """16 hex digits that identify the key without revealing it."""
        return self._hash("", "check", _CHECK_BYTES)

    @property
    def version_key(self) -> str:
        """The key of `hash_version`. Unlike that of names, it is sent to workers."""
        return self.of("key", "version")

    def of(self, name: str, kind: str) -> str:
        """The pseudonym of a name; "" for "". Kinds, of at most 16 letters, have nothing in common."""
        return self._hash(name, kind, _DIGEST_BYTES) if name else ""

    def of_path(self, path: str) -> str:
        """The pseudonym of a path: its folder and its name each have one."""
        folder, _, name = path.rpartition("/")
        return f"{self.of(folder, 'path')}/{self.of(name, 'path')}"

    def of_column(self, column: pa.ChunkedArray, kind: str) -> pa.Array:
        """The pseudonyms of a column of names."""
        names = column.combine_chunks().dictionary_encode()
        hashed = (self.of(name, kind) for name in strings(names.dictionary))
        return pa.array(hashed, pa.string(), size=len(names.dictionary)).take(names.indices)

    def _hash(self, name: str, kind: str, size: int) -> str:
        person = kind.encode()
        return hashlib.blake2b(name.encode(), digest_size=size, key=self._key, person=person).hexdigest()


def hash_version(version: str | None, version_key: str) -> str | None:
    """The pseudonym of a store's version of a file, which may contain its name; unchanged without a key."""
    if version is None or not version_key:
        return version
    return Pseudonyms(version_key.encode()).of(version, "version")


def read_pseudonyms(path: str) -> Pseudonyms:
    """The pseudonyms of the key in a file.

    Raises:
        UsageError: the file cannot be read, or the key is too short.
        OSError: the file cannot be read at present.
    """
    try:
        secret = storage.read(path)
    except OSError as e:
        if may_pass(e):
            raise
        reason = f"cannot be read: {e.strerror or e}"
        raise UsageError(f"--anonymous-ids is {path}, which {reason}; give the file of the key") from e
    if len(secret) < _LEAST_BYTES:
        raise UsageError(
            f"{path}: {len(secret)} bytes are too few for a key, which requires {_LEAST_BYTES}; make one "
            "with `head -c 32 /dev/urandom`"
        )
    return Pseudonyms(secret)
