"""The errors that beam_nifti raises on purpose. Each message names the thing, the value and the remedy."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

_OF_PATHS: Final = frozenset(
    [
        *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG),
        *(errno.ELOOP, errno.EINVAL, errno.ENXIO),
    ]
)
"""What the system or a store reports for a path that is wrong, missing or not accessible to this user."""


_CONTROL: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters, line separators, marks of text direction, and bytes that are not UTF-8.

Source: Unicode's categories Cc, Zl, Zp and Cs, and its property Bidi_Control.
"""


def printable(text: str, keep: str = "\n\t") -> str:
    """Escape control characters, as Python does, except those in `keep`."""
    return _CONTROL.sub(lambda match: match[0] if match[0] in keep else repr(match[0])[1:-1], text)


class BeamNiftiError(Exception):
    """Base class of the errors that this package raises on purpose, except IndexError, TypeError and OSError.

    A traceback prints the text of an error as it is. Names and paths in it may come from anyone, so control
    characters are escaped.
    """

    def __str__(self) -> str:
        """The text of the error, harmless to a terminal."""
        return printable(self._text())

    def _text(self) -> str:
        return super().__str__()

    def reword(self, words: Callable[[str], str]) -> None:
        """Change every text of the error.

        Args:
            words: maps a text to the one to show instead.
        """
        self.args = tuple(_reworded(each, words) for each in self.args)


def _reworded(value: Any, words: Callable[[str], str]) -> Any:
    if isinstance(value, tuple):
        return tuple(_reworded(each, words) for each in value)
    return words(value) if isinstance(value, str) else value


class UsageError(BeamNiftiError):
    """An invalid option, or options that cannot be combined."""


class ManifestError(BeamNiftiError):
    """A manifest, or its first images, that no build can use, with every problem found (up to a limit).

    Args:
        path: path of the manifest.
        problems: one sentence per problem.
        what: what the problems mean for the manifest.
    """

    def __init__(self, path: str, problems: Sequence[str], what: str = "not usable as a manifest") -> None:
        super().__init__(path, tuple(problems), what)
        self.path = path

    @property
    def problems(self) -> tuple[str, ...]:
        """One sentence per problem."""
        problems: tuple[str, ...] = self.args[1]
        return problems

    def reword(self, words: Callable[[str], str]) -> None:
        """Change every text of the error, and its path."""
        super().reword(words)
        self.path = self.args[0]

    def _text(self) -> str:
        """The path, then one line per problem."""
        return "\n".join([f"{self.path}: {self.args[2]}", *(f"  {p}" for p in self.problems)])


class ManifestChangedError(ManifestError):
    """A manifest that changed during a build."""


class OutputError(BeamNiftiError):
    """A folder or file that may not be written: it exists, holds something else, or is being written."""


class OutputBusyError(OutputError):
    """An output folder that another command is writing."""


class VolumeError(BeamNiftiError):
    """An image that cannot become a record."""


@dataclass(frozen=True, slots=True)
class FailedVolume:
    """A row of the manifest whose image failed.

    Attributes:
        row: number of the row in the manifest, from 1.
        example_id: id of the example.
        path: absolute path of the image; a pseudonym if ids are anonymous.
        stage: step that failed, such as "LoadVolume".
        error: class of the exception.
        message: text of the exception.
    """

    row: int
    example_id: str
    path: str
    stage: str
    error: str
    message: str


@dataclass(frozen=True, slots=True)
class FailureGroup:
    """Volumes that failed for the same reason.

    Attributes:
        stage: step that failed.
        error: class of the exception.
        message: common text of the messages, with "…" for names and numbers that differ.
        num_volumes: number of failed volumes.
        examples: the first files at fault: paths, or rows of the manifest if ids are anonymous.
        num_images: number of files at fault.
    """

    stage: str
    error: str
    message: str
    num_volumes: int
    examples: tuple[str, ...]
    num_images: int


@dataclass(frozen=True)
class BuildSummary:
    """How a build ended.

    Attributes:
        num_written: records in the shards.
        num_failed: volumes that failed.
        num_bytes: size of the shards.
        num_shards: number of shards of all splits.
        complete: whether the dataset was published.
        failures_path: path of the list of failed volumes; "" if none failed.
        failures: volumes that failed, by step and then by class of the error.
        reasons: the most frequent reasons of failures.
        num_nonfinite: voxels that were NaN or infinite and were replaced, in all records.
        num_made_finite: records that had such voxels.
        unmapped_labels: labels that `map_labels` maps to others, but that no mask has.
    """

    num_written: int
    num_failed: int
    num_bytes: int
    num_shards: int
    complete: bool
    failures_path: str = ""
    failures: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    reasons: tuple[FailureGroup, ...] = ()
    num_nonfinite: int = 0
    num_made_finite: int = 0
    unmapped_labels: tuple[int, ...] = ()


class TooManyFailures(BeamNiftiError):
    """More volumes failed than the build allows; the dataset is not published.

    Finished records are kept: the next build into the same output loads only the volumes that failed.

    Attributes:
        summary: how the build ended.
        failures: every row that failed, in the manifest's order.
    """

    def __init__(self, message: str, summary: BuildSummary, failures: Sequence[FailedVolume]) -> None:
        super().__init__(message, summary, tuple(failures))
        self.summary, self.failures = summary, tuple(failures)

    def reword(self, words: Callable[[str], str]) -> None:
        """Change every text of the error, and the messages of its failures."""
        super().reword(words)
        reasons = tuple(replace(group, message=words(group.message)) for group in self.summary.reasons)
        self.summary = replace(self.summary, reasons=reasons)
        self.failures = tuple(replace(each, message=words(each.message)) for each in self.failures)
        self.args = (self.args[0], self.summary, self.failures)

    def _text(self) -> str:
        """How many failed, and why."""
        return str(self.args[0])


class EngineError(BeamNiftiError):
    """A pipeline that was stopped by its runner or a worker; `__cause__` is the exception of the runner.

    Args:
        what: what was stopped, such as "the build stopped".
        reason: why it stopped.
        exit_code: exit code of the command; 75 for a temporary failure.
        is_explained: whether the reason is complete, so that a traceback would add nothing.
    """

    def __init__(self, what: str, reason: str, exit_code: int, is_explained: bool) -> None:
        super().__init__(what, reason, exit_code, is_explained)
        self.what, self.exit_code, self.is_explained = what, exit_code, is_explained

    @property
    def reason(self) -> str:
        """Why it stopped."""
        return str(self.args[1])

    def _text(self) -> str:
        """What was stopped, and why."""
        return f"{self.what}: {self.reason}"


class ShardError(BeamNiftiError):
    """A shard, part or index file that is damaged or does not match the dataset."""


class PartsChangedError(ShardError):
    """Parts of a shard that changed or disappeared while they were merged; the next build replaces them."""


class DatasetError(BeamNiftiError):
    """A dataset that is absent, incomplete or damaged."""


class NewerFormatError(DatasetError):
    """A dataset in a format that a later version of this package wrote."""


def unreadable(what: str, error: Exception) -> DatasetError:
    """The error for a file or record of a dataset that cannot be read."""
    return DatasetError(f"{what} cannot be read ({error}); run beam-nifti verify")


def is_of_path(error: OSError) -> bool:
    """Whether a file could not be read because of its path or its permissions.

    All other errors are not a fault of the file: a store that does not answer or refuses the credentials, a
    full disk, a failing device, too many open files. Another attempt may succeed.
    """
    kinds = FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError
    return isinstance(error, kinds) or error.errno in _OF_PATHS


def is_of_machine(error: BaseException) -> bool:
    """Whether foreign code, such as a user's function, failed for a reason other than its input.

    Libraries raise an OSError without a number for files that they cannot parse.
    """
    if isinstance(error, MemoryError | TimeoutError | ConnectionError):
        return True
    return isinstance(error, OSError) and error.errno is not None and not is_of_path(error)
