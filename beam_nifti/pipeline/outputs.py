"""Files that a command writes apart from a dataset, such as a report: what they hold and must not replace."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, Final

from beam_nifti.errors import OutputError, UsageError
from beam_nifti.pipeline.lock import LOCK_FILE
from beam_nifti.record.dataset_files import CARD_FILE, CROISSANT_FILE, FILE_NAME, revision_of_failures
from beam_nifti.storage import paths as storage
from beam_nifti.support.json_types import require_type
from beam_nifti.support.strict_json import load_json

_FOLDERS: Final = ("index", ".build")  # folders of a dataset, all of whose files are its own
_DEPTH: Final = 4  # of the files of a dataset: a part is in .build/FINGERPRINT/SHARD
_FILES: Final = (FILE_NAME, LOCK_FILE, CARD_FILE, CROISSANT_FILE)
_SHARD: Final = re.compile(r".+\.tfrecord(\.gz)?")


def read_result(path: str, most: int, below: str | None = None) -> dict[str, Any]:
    """What the last step of a pipeline has written for the process that started it.

    Raises:
        FileNotFoundError: there is no such file.
        OutputError: it has more than `most` bytes, or is no JSON object: others can write to a store, too.
    """
    try:
        facts = load_json(storage.read_bounded(path, most, below))
        require_type(facts, dict, "it")
    except (storage.FileTooLargeError, ValueError) as e:
        raise OutputError(f"{path}: differs from what the pipeline wrote: {e}; run the command again") from e
    return dict(facts)


def require_apart(path: str, flag: str, inputs: Mapping[str, str | None] | None = None) -> None:
    """Refuse to write a file that would replace an input, or a file of a dataset.

    Args:
        path: path of the file.
        flag: flag that gives it, for the message.
        inputs: paths that the command reads, by what they are, such as "the manifest".

    Raises:
        UsageError: it would.
    """
    for what, known in (inputs or {}).items():
        if known is not None and storage.is_same(path, known):
            raise UsageError(f"{flag} is {path}, which is {what}; choose another file")
    dataset = dataset_of(path)
    if dataset is not None:
        raise UsageError(f"{flag} is {path}, a file of the dataset in {dataset}; choose another file")


def require_ending(path: str | None, ending: str) -> None:
    """Refuse a name with another ending for --out, so that a typing error cannot replace an image or a table.

    Raises:
        UsageError: it has another ending.
    """
    if path is not None and not path.endswith(ending):
        raise UsageError(f"--out is {path}; give a name that ends in {ending}")


def require_out(
    path: str,
    *,
    overwrite: bool,
    inputs: Mapping[str, str | None] | None = None,
    other: str = "another path",
) -> None:
    """Refuse, before any work, to write a file that exists, is in use otherwise, or cannot be written.

    Args:
        path: file to be written.
        overwrite: replace it if it exists.
        inputs: as of `require_apart`.
        other: what to choose if it exists.

    Raises:
        UsageError: as `require_apart`.
        OutputError: it exists and may not be overwritten, or cannot be written.
        OSError: it cannot be written now.
    """
    require_apart(path, "--out", inputs)
    storage.require_writable(storage.absolute(path), "--out")
    if not overwrite and storage.exists(storage.absolute(path)):
        raise OutputError(f"{path}: already exists; choose {other}, or use --overwrite to replace it")


def refuse_own(manifest: str, output: str) -> None:
    """Refuse a manifest that a build into OUTPUT would replace or remove.

    Raises:
        UsageError: it is named as a file of a dataset in OUTPUT, such as its list of failures.
    """
    target = manifest if storage.is_remote(manifest) else os.path.realpath(manifest)
    if dataset_of(target, output) is not None:
        raise UsageError(
            f"MANIFEST is {manifest}, which a build into {output} may replace or remove; copy it elsewhere, "
            "or choose another OUTPUT"
        )


def dataset_of(path: str, output: str | None = None) -> str | None:
    """The folder of the dataset to which a file belongs by name; None for other files.

    `output` is the one folder that it may be, with or without a dataset; None for any that has one, complete
    or not.
    """
    folder = storage.resolved(path)
    below: list[str] = []
    for _ in range(_DEPTH):
        folder, _, name = folder.rpartition("/")
        below.insert(0, name)
        if below[1:]:
            is_own = below[0] in _FOLDERS
        else:
            is_own = bool(name in _FILES or revision_of_failures(name) or _SHARD.fullmatch(name))
        marks = (storage.join(folder, mark) for mark in (FILE_NAME, ".build"))
        if is_own and (storage.is_same(folder, output) if output else any(map(storage.exists, marks))):
            return folder
    return None
