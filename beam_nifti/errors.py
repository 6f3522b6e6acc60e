"""Every error that beam_nifti raises on purpose. Each message names the thing, the value and the remedy."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final

_OF_PATHS: Final = frozenset(
    [
        errno.ENOENT,
        errno.EACCES,
        errno.EPERM,
        errno.EISDIR,
        errno.ENOTDIR,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.EINVAL,
        errno.ENXIO,
    ]
)
"""What the system, and a store, reports of a path that is wrong, missing or not for this user."""


class BeamNiftiError(Exception):
    """The root: `except BeamNiftiError` catches what this package raises on purpose."""


class UsageError(BeamNiftiError):
    """An option or a combination of options that cannot be carried out."""


class ManifestError(BeamNiftiError):
    """A manifest, or its first images, that cannot be built from, with every problem found (up to a limit).

    Args:
        path: of the manifest.
        problems: one sentence each.
        what: the problems mean for the manifest.

    Attributes:
        problems: one sentence a problem.
    """

    def __init__(self, path: str, problems: Sequence[str], what: str = "not usable as a manifest") -> None:
        super().__init__(path, tuple(problems), what)
        self.path = path
        self.problems = tuple(problems)
        self._what = what

    def __str__(self) -> str:
        """The path, then one line per problem."""
        return "\n".join([f"{self.path}: {self._what}", *(f"  {p}" for p in self.problems)])


class ManifestChangedError(ManifestError):
    """A manifest that changed while a build of it ran."""


class OutputError(BeamNiftiError):
    """An output folder that may not be written: it holds something else, or a build is running."""


class OutputBusyError(OutputError):
    """An output folder that another build is writing."""


class VolumeError(BeamNiftiError):
    """One image that cannot become a record."""


class ShardError(BeamNiftiError):
    """A shard, part or index file that is not what it should be."""


class PartsChangedError(ShardError):
    """Parts of a shard that changed or disappeared while they were merged; the next build replaces them."""


class DatasetError(BeamNiftiError):
    """A dataset that is absent, incomplete or damaged."""


class NewerFormatError(DatasetError):
    """A dataset of a format that a later version of this package has written."""


def unreadable(what: str, error: Exception) -> DatasetError:
    """The error where a file or a record of a dataset cannot be read, with its remedy."""
    return DatasetError(f"{what} cannot be read ({error}); run beam-nifti verify")


def is_of_path(error: OSError) -> bool:
    """Whether a file could not be read because of its path or its permissions.

    Everything else is no fault of the file: a store that does not answer or refuses the credentials, a full
    disk, a failing device, too many open files. Another attempt may succeed.
    """
    kinds = FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError
    return isinstance(error, kinds) or error.errno in _OF_PATHS


def is_of_machine(error: BaseException) -> bool:
    """Whether foreign code, such as a user's function, failed for a reason that is not in its input.

    An OSError without a number is what libraries raise for files that they cannot parse.
    """
    if isinstance(error, MemoryError | TimeoutError | ConnectionError):
        return True
    return isinstance(error, OSError) and error.errno is not None and not is_of_path(error)
