"""The output of a command that rewrites a dataset in its place: what unfinished builds have left there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from beam_nifti.errors import OutputError
from beam_nifti.pipeline import lock
from beam_nifti.pipeline.parts import BUILD_FOLDER, parts_root, remove_parts
from beam_nifti.pipeline.publish import clean_up, files_of, remove_files, require_writable_output
from beam_nifti.pipeline.saved_plan import SavedPlan, SavedWrite
from beam_nifti.record.dataset_files import FILE_NAME, failures_file, revision_of_failures
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.record.sharding import INDEX_FOLDER, ShardName
from beam_nifti.storage import paths as storage
from beam_nifti.support.wording import counted, first_few

_SHOWN: Final = 3  # names in an error


@contextlib.contextmanager
def holding(output: str) -> Iterator[None]:
    """Hold a local or remote output that can be written."""
    storage.refuse_unwritable(output, "OUTPUT")
    if not storage.is_remote(output):
        require_writable_output(output)
    with lock.hold(output):
        yield


def end_rewriting(output: str, info: DatasetInfo) -> None:
    """Remove the files that a published dataset has replaced, if that was not done."""
    for saved in (SavedPlan.read(output), SavedWrite.read(output)):
        is_published = saved is not None and (
            saved.is_of(info) if isinstance(saved, SavedPlan) else saved.revision <= info.revision
        )
        if saved is not None and is_published:
            clean_up(output, saved, info)
    # A run that was killed here has left it empty.
    storage.delete_folder(storage.join(output, BUILD_FOLDER), output)


def discard_unfinished(output: str, info: DatasetInfo, *, overwrite: bool) -> None:
    """Remove what builds have left in the output of a published dataset; the lock is held.

    Raises:
        OutputError: there is an unfinished build, and it may not be discarded.
    """
    end_rewriting(output, info)
    own_root = parts_root(output, None)
    try:
        dead = SavedPlan.read(output)
    except OutputError:
        if not overwrite:
            raise
        dead = None
    saved = SavedWrite.read(output)
    if not overwrite and (dead or storage.list_folders(own_root)):
        raise OutputError(f"{output}: holds an unfinished build; finish it, or use --overwrite to discard it")
    for unfinished in [found for found in (dead, saved) if found is not None]:
        for root in unfinished.parts_roots(output):
            remove_parts(root)
        remove_files(output, unfinished.written, keep=files_of(info))
    if dead:
        name = failures_file(dead.info.revision)
        if name != info.failures:
            storage.delete(storage.join(output, name), output)
    remove_parts(own_root)
    SavedPlan.remove(output)


def refuse_unknown_files(output: str, info: DatasetInfo) -> None:
    """Refuse files that may be those of earlier revisions, but that no index or plan names.

    Raises:
        OutputError: there is one.
    """
    known = {*files_of(info), *(shard.index for shard in info.shards)}
    if saved := SavedWrite.read(output):
        known |= {*saved.written}
        known |= {shard.index_file for shard in map(ShardName.parse, saved.written) if shard}
    found = [*storage.list_files(output, "*.tfrecord*")]
    found += filter(revision_of_failures, storage.list_files(output))
    indexes = storage.list_files(storage.join(output, INDEX_FOLDER), "*.parquet")
    found += (f"{INDEX_FOLDER}/{name}" for name in indexes)
    if unknown := [name for name in found if name not in known]:
        raise OutputError(
            f"{output}: holds {counted(len(unknown), 'file')} ({first_few(unknown, _SHOWN)}) that "
            f"{FILE_NAME} does not name, and that may hold records of earlier revisions; delete them first"
        )
