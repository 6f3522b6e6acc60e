"""Gives the records of a dataset the labels, splits and further columns of a changed manifest."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pyarrow.compute as pc

from beam_nifti.config import Columns
from beam_nifti.errors import UsageError
from beam_nifti.manifest.manifest import Manifest
from beam_nifti.manifest.reading import read_manifest
from beam_nifti.pipeline.outputs import refuse_own
from beam_nifti.pipeline.progress import current_progress
from beam_nifti.pipeline.rewrite import Rewrite
from beam_nifti.pipeline.rewrite_target import end_rewriting, holding
from beam_nifti.pipeline.withdrawal import read_rewritable, refuse_withdrawn
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.storage import paths as storage

_OPTIONS: Final = ("--label-column", "--missing-label", "--anonymous-ids")
"""Flags of the command that concern the manifest."""


def relabel_dataset(
    output: str,
    manifest: str,
    *,
    rows: bytes | None = None,
    label_column: str | None = None,
    missing_label: str | None = None,
    anonymous_ids: str | None = None,
    overwrite: bool = False,
    workers: int = 1,
) -> DatasetInfo:
    """Relabel a dataset, as `beam_nifti.relabel`, which documents arguments and errors.

    `rows` is the Parquet file of a manifest in memory.
    """
    content, info, pseudonyms = read_rewritable(output, anonymous_ids, workers)
    path = storage.absolute(manifest)
    refuse_own(path, output)
    given = {"label": label_column, "missing_label": missing_label}
    columns = Columns(**vars(info.columns) | {name: text for name, text in given.items() if text is not None})
    changed = read_manifest(path, columns, info.splitting, pseudonyms, content=rows, options=_OPTIONS)
    changed.log_warnings()
    refuse_withdrawn(changed, info)
    _require_same_folder(output, info, changed)
    rewrite = Rewrite(output, content, info, changed, path)
    finish = replace(rewrite.facts, withdrawn=info.withdrawn, withdrawals=info.withdrawals)
    if _is_like(finish, info):
        with holding(output):
            end_rewriting(output, info)
        return info
    rewrite.require_all()
    with rewrite.opened(overwrite=overwrite):
        return rewrite.run(finish, current_progress(), workers)


def _is_like(made: DatasetInfo, info: DatasetInfo) -> bool:
    """Whether the dataset has the labels, splits and columns already."""
    return (made.config, made.manifest, made.labels) == (info.config, info.manifest, info.labels)


def _require_same_folder(output: str, info: DatasetInfo, manifest: Manifest) -> None:
    """Refuse a manifest in another folder, whose relative paths would be those of other images."""
    was, now = (storage.dirname(name) for name in (info.manifest["path"], manifest.name))
    if was == now:
        return
    columns = [manifest.paths[name] for name in manifest.columns.files]
    are_absolute = all(
        not path or storage.is_remote(path) or path.startswith("/")
        for column in columns
        for path in pc.unique(column).to_pylist()
    )
    if manifest.key_check or not are_absolute:
        where = "another folder" if manifest.key_check else f"{now}, not in {was}"
        raise UsageError(
            f"{manifest.path}: is in {where}, and paths of images are relative to the manifest's folder; "
            "move it there"
        )
