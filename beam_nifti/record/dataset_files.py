"""The files of a dataset besides its shards: their names, and reading them within limits."""

from __future__ import annotations

import errno
import os
import re
from typing import Final

from beam_nifti.config import FORMAT_VERSION
from beam_nifti.errors import DatasetError, is_of_path
from beam_nifti.storage import paths as storage

FILE_NAME: Final = "dataset_info.json"
FAILURES_FILE: Final = "failures.jsonl"
"""The list of failures of a first build, and of every build of format version 1."""
CARD_FILE: Final = "README.md"
CROISSANT_FILE: Final = "croissant.json"
"""The files of `beam-nifti card`, for people and for programs."""

MAX_INFO_BYTES: Final = 1 << 26
"""Most bytes of a dataset_info.json that is read: 180,000 shards, or 35 TB of the default size."""

_FREE_FAILURES_BYTES: Final = 64 << 20
_FAILURE_BYTES: Final = 64 << 10
_MOST_FAILURES_BYTES: Final = 1 << 28
"""Most bytes of a list of failures: a constant, an amount per failure, and a limit for all."""

_FAILURES_NAME: Final = re.compile(r"failures(?:-r(?P<revision>[1-9][0-9]{0,8}))?\.jsonl")

_NEEDS: Final = {
    "s3": "the credentials and S3_ENDPOINT (a URL)",
    "hdfs": "whether libhdfs.so is found, and CLASSPATH",
}
"""What tensorflow-io needs for a store, by scheme."""


def failures_file(revision: int, format_version: int = FORMAT_VERSION) -> str:
    """The name of a revision's list of failures. Each has its own: published files are not replaced."""
    is_first = revision == 1 or format_version == 1
    return FAILURES_FILE if is_first else f"failures-r{revision}.jsonl"


def revision_of_failures(name: str) -> int | None:
    """The revision of a list of failures, by its file name; None if it names no such list."""
    match = _FAILURES_NAME.fullmatch(name)
    return int(match["revision"] or 1) if match else None


def path_of(output: str, name: str) -> str:
    """The path at which to open a file that dataset_info.json names.

    Args:
        output: the dataset's folder, local or a URL.
        name: name in a `DatasetInfo`, which accepts only names that a build writes.

    Raises:
        OSError: it exists but is not a regular file, or leads out of the folder.
    """
    path = storage.join(output, name)
    storage.require_inside(path, output)
    return path


def read_content(output: str) -> bytes:
    """The bytes of the dataset_info.json of a complete dataset.

    Raises:
        DatasetError: there is none, it is too large, or it is no regular file of the dataset.
        OSError: it cannot be reached at present.
    """
    path = storage.join(output, FILE_NAME)
    try:
        return storage.read_bounded(path_of(output, FILE_NAME), MAX_INFO_BYTES)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise no_dataset(output, e) from e
    except storage.FileTooLargeError as e:
        raise DatasetError(f"{path}: {e}; copy the dataset again") from e
    except OSError as e:
        if storage.is_remote(path) or not is_of_path(e):
            raise
        raise DatasetError(f"{path}: cannot be read ({e.strerror}); copy the dataset again") from e


def no_dataset(output: str, error: OSError | None = None) -> DatasetError:
    """The error if dataset_info.json is missing, or if a file was given instead of its folder.

    Args:
        output: folder in which it was expected, local or a URL.
        error: error of reading it; None if TensorFlow looked for it, which reports a missing file even if
            it cannot reach an S3 or HDFS.
    """
    if isinstance(error, NotADirectoryError) or output.rpartition("/")[2] == FILE_NAME:
        return DatasetError(
            f"{output} is not a folder; give the folder of the dataset, which holds {FILE_NAME}"
        )
    needs = _NEEDS.get(output.partition("://")[0])
    if error is None and needs:
        return DatasetError(
            f"{output}: TensorFlow finds no {FILE_NAME}: the dataset is missing or incomplete, or the store "
            f"cannot be reached: check the path, {needs}, or use engine='indexed', which tells these apart"
        )
    reason = f"{FILE_NAME} is missing"
    if error is not None and error.strerror not in (None, os.strerror(errno.ENOENT)):
        reason = str(error.strerror)  # such as "No such bucket"
    return DatasetError(
        f"{output}: no complete dataset here ({reason}); check the path, or run the interrupted `beam-nifti "
        "build`, `beam-nifti convert` or WriteToTFRecord pipeline again"
    )


def read_failures_list(output: str, name: str, num_failures: int) -> bytes:
    """The bytes of a dataset's list of failures.

    Args:
        output: the dataset's folder, local or a URL.
        name: name of the list.
        num_failures: number of failures by dataset_info.json.

    Raises:
        DatasetError: it is larger than a list of so many failures can be.
        OSError: as `path_of`; or it is missing, or cannot be reached.
    """
    path = path_of(output, name)
    try:
        return read_failures_of(path, num_failures)
    except storage.FileTooLargeError as e:
        raise DatasetError(
            f"{path}: {e} where num_failures in {FILE_NAME} is {num_failures}; copy the dataset again"
        ) from e


def read_failures_of(path: str, num_failures: int, below: str | None = None) -> bytes:
    """The bytes of a list of so many failures.

    Args:
        path: path of the list.
        num_failures: number of failures in the list.
        below: same as for `storage.create`.

    Raises:
        FileTooLargeError: it has more bytes than such a list can have.
        OSError: it is missing, or cannot be reached.
    """
    most = min(_FREE_FAILURES_BYTES + _FAILURE_BYTES * num_failures, _MOST_FAILURES_BYTES)
    return storage.read_bounded(path, most, below)
