"""Reading a manifest: a table of strings, checked row by row."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.config import Columns, Splitting
from beam_nifti.manifest.labels import Labels, read_labels
from beam_nifti.manifest.leaks import refuse_leaks
from beam_nifti.manifest.lookalikes import fold, refuse_lookalikes, warn_of_names
from beam_nifti.manifest.manifest import Manifest
from beam_nifti.manifest.pseudonyms import PATTERN, Pseudonyms
from beam_nifti.manifest.splits import draw_from_table, read_splits, refuse_empty_splits, refuse_shared_images
from beam_nifti.manifest.tables import Problems, read_table, strings
from beam_nifti.storage import paths as storage
from beam_nifti.support.cells import is_missing

_LONGEST_NAME: Final = 4096
_MOST_FOLDERS: Final = 100
"""Of paths and ids: what hides them in messages takes a time that grows with both."""

_REMEDIES_OF_MASKS: Final = ", or use --missing-mask empty or --missing-mask skip"
_OWN: Final = ("participant_id", "session_id", "split")
_GIVE_THAT_OF_DATASET: Final = "give the manifest that the dataset was built from"
_AS_IN_DATASET: Final = "add it, because the dataset was built with it"


def read_manifest(
    path: str,
    columns: Columns | None = None,
    splitting: Splitting | None = None,
    pseudonyms: Pseudonyms | None = None,
    *,
    content: bytes | None = None,
    options: Collection[str] | None = None,
    is_list: bool = False,
) -> Manifest:
    """Read and check a manifest.

    Args:
        path: .csv, .tsv, .jsonl (or .ndjson) or .parquet; local or a URL.
        columns: the roles of the columns.
        splitting: how to draw the splits; None takes those of the column `split`.
        pseudonyms: replace ids and paths in everything that is derived from the manifest, also in splits and
            in shuffled order, which could otherwise reveal them; None keeps the names.
        content: same as for `read_table`.
        options: flags that change `columns` and `splitting`, which otherwise are those of a dataset; None for
            all flags, as in a build.
        is_list: whether it is a dataset's list of failures, which may have pseudonyms in the place of paths.

    Raises:
        ManifestError: with every problem found, up to 20, by row number.
    """
    columns = columns or Columns()
    problems = Problems(path, hides_cells=pseudonyms is not None, options=options)
    table = read_table(path, _meaningful(columns, splitting), problems, content)
    _check_columns(table, columns, splitting, problems, is_list=is_list)
    problems.stop()
    if columns.label is None and "label" in table.column_names:
        columns = dataclasses.replace(columns, label="label")
    table, lacks_mask = _find_missing(table, columns.masks)
    table, _ = _find_missing(table, () if columns.target is None else (columns.target,))  # which fails alone
    paths = {name: table[name] for name in columns.files}
    _refuse_names(table, columns, problems, may_be_long=is_list)
    people = table["participant_id"].combine_chunks() if "participant_id" in table.column_names else None
    _warn_of_names(table, columns, people, problems)
    if splitting:
        if people is None:
            refuse_lookalikes("id", _ids(table, columns), problems)
        else:
            refuse_lookalikes("participant_id", people, problems)
    named = dict[str, pa.ChunkedArray]()
    if pseudonyms:
        ids_of = ("participant_id", "session_id", columns.id)
        named = {name: table[name] for name in table.column_names if name in ids_of}
        refuse_leaks(table, columns, problems)
        table = _without_names(table, columns, pseudonyms)
    labels, lacks_label = _labels(table, columns, problems)
    ids = _ids(table, columns)
    if splitting:
        splits = draw_from_table(table, ids, splitting, problems)
    else:
        splits = read_splits(table, people, problems)
    for lacks, rule in ((lacks_label, columns.missing_label), (lacks_mask, columns.missing_mask)):
        if rule == "skip" and lacks is not None:
            splits = pc.if_else(pa.array(lacks), None, splits)
    if columns.missing_mask == "skip" and splits.null_count == len(splits):
        problems.add(f"every row lacks a {columns.lacking}, so all rows would be skipped; keep some of them")
    if splitting:
        refuse_empty_splits(splits, splitting, problems)
    _check_ids(ids, problems)
    refuse_shared_images({name: paths[name] for name in columns.paths}, table, splits, problems)
    problems.stop()
    # Cells of labels that have features are kept in the index, and in failures.jsonl, as extra columns are.
    has_features = columns.has_label_features or any(of.column.kind == "class" for of in labels)
    used, labelled = {columns.paths[0], columns.id, *_OWN}, {of.column.name for of in labels}
    used = used - labelled if has_features else used | labelled
    if has_features:
        columns = dataclasses.replace(columns, label=",".join(str(of.column) for of in labels))
    return Manifest(
        path=path,
        table=table,
        paths=paths,
        columns=columns,
        numbers=labels[0].numbers if labels else None,
        labels=labels if has_features else (),
        ids=ids,
        splits=splits,
        extra_columns=tuple(c for c in table.column_names if c not in used),
        key_check=pseudonyms.check if pseudonyms else None,
        name=pseudonyms.of_path(path) if pseudonyms else path,
        names=named,
        version_key=pseudonyms.version_key if pseudonyms else "",
        lacks_label=lacks_label,
        lacks_mask=lacks_mask,
        warnings=tuple(problems.warnings),
    )


def _meaningful(columns: Columns, splitting: Splitting | None) -> set[str]:
    """The columns that a build interprets."""
    labels = {column.name for column in columns.labels} or {"label"}
    by = (columns.id, splitting.stratify if splitting else None)
    return {*columns.files, *labels, *_OWN, *filter(None, by)}


def _check_columns(
    table: pa.Table,
    columns: Columns,
    splitting: Splitting | None,
    problems: Problems,
    *,
    is_list: bool,
) -> None:
    """Refuse a table that lacks or misspells a column, or has splits that are to be drawn, or nothing."""
    present = ", ".join(table.column_names) or "none"
    for name, flag in (
        *((name, "--path-column") for name in columns.paths),
        *((name, "--mask-column") for name in columns.masks),
        (columns.target, "--target-column"),
        *((column.name, "--label-column") for column in columns.labels),
        (columns.id, "--id-column"),
        (splitting and splitting.stratify, "--stratify"),
    ):
        if name is not None and name not in table.column_names:
            remedy = problems.offer(
                flag, f"choose one with {flag}", _AS_IN_DATASET if problems.options else _GIVE_THAT_OF_DATASET
            )
            problems.add(f"no column {name!r}; the columns are: {present}; {remedy}")
    if splitting and "split" in table.column_names:
        remedy = problems.offer(
            "--split",
            "rename the column, or drop --split (--without split if --like or --config gives it)",
            "rename it, because the splits of the dataset were drawn"
            if problems.options
            else _GIVE_THAT_OF_DATASET,
        )
        problems.add(f"has a column 'split' already; {remedy}")
    for name, meant in _misspelled(table.column_names, columns):
        problems.add(f"column {name!r} is probably meant as {meant!r}; rename it")
    if table.num_rows == 0:
        problems.add("no rows; a manifest needs a header and at least one image")
    if not is_list and _has_pseudonyms(table, columns):
        problems.add(
            "is the list of failures of a dataset with anonymous ids: its paths are pseudonyms, and each "
            "'row' is that of the manifest that the dataset was built from; build these rows of that manifest"
        )


def _find_missing(table: pa.Table, columns: Sequence[str]) -> tuple[pa.Table, npt.NDArray[np.bool_] | None]:
    """A table whose missing cells of columns of masks or targets are empty; and which rows have any.

    The latter is None if there are no such columns.
    """
    lacking = None
    for name in columns:
        cells = table[name].combine_chunks()
        lacks = np.fromiter(map(is_missing, strings(cells)), np.bool_, len(cells))
        at = table.column_names.index(name)
        table = table.set_column(at, name, pc.if_else(pa.array(lacks), "", cells))
        lacking = lacks if lacking is None else lacking | lacks
    return table, lacking


def _refuse_names(table: pa.Table, columns: Columns, problems: Problems, *, may_be_long: bool) -> None:
    """Refuse long ids, and paths that are empty, that no system opens, or that this process cannot spell."""
    is_limited = sys.getfilesystemencoding() != "utf-8"
    for name in columns.files:
        what = "mask" if name in columns.masks else "target" if name == columns.target else "image"
        for i, text in enumerate(strings(table[name])):
            if not text:
                if what == "image" or (what == "mask" and columns.missing_mask is None):
                    others = (
                        "" if what == "image" else problems.offer("--missing-mask", _REMEDIES_OF_MASKS, "")
                    )
                    problems.add(f"row {i + 1}: empty {name}; give the {what}'s path or drop the row{others}")
            elif not may_be_long and len(text) > _LONGEST_NAME:
                has = f"{len(text):,} characters, more than {_LONGEST_NAME:,}"
                problems.add(f"row {i + 1}: {name} has {has}; correct the {what}'s path")
            elif not may_be_long and (num_folders := text.count("/")) > _MOST_FOLDERS:
                has = f"{num_folders:,} folders, more than {_MOST_FOLDERS}"
                problems.add(f"row {i + 1}: {name} has {has}; correct the {what}'s path")
            elif is_limited and not (storage.is_remote(text) or _is_encodable(text)):
                problems.add(f"row {i + 1}: {name} is {problems.shown(text)}, which {storage.UNSPELLABLE}")
    if not may_be_long:
        _refuse_long_ids(table, columns, problems)


def _is_encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _refuse_long_ids(table: pa.Table, columns: Columns, problems: Problems) -> None:
    """Refuse ids that take longer to compare and to hide than anybody would wait."""
    for name in dict.fromkeys(("participant_id", "session_id", columns.id)):
        if name in table.column_names and len(table):
            lengths = pc.utf8_length(table[name]).to_numpy()
            for i in np.flatnonzero(lengths > _LONGEST_NAME).tolist():
                problems.add(
                    f"row {i + 1}: {name} has {lengths[i]:,} characters, more than {_LONGEST_NAME:,}; give a "
                    "shorter one"
                )


def _warn_of_names(table: pa.Table, columns: Columns, people: pa.Array | None, problems: Problems) -> None:
    """Warn of participants and ids that are probably the same, and of ids that a spreadsheet rewrote."""
    if people is not None:
        warn_of_names("participant_id", people, problems)
    if people is None or columns.id is not None:
        warn_of_names("id", _ids(table, columns), problems)
    elif "session_id" in table.column_names:
        # Lookalikes of one participant are ids of two sessions; those of two are known as participants.
        sessions = fold(table["session_id"].combine_chunks())
        keys = pc.binary_join_element_wise(people, sessions, "\0")
        warn_of_names("id", _ids(table, columns), problems, keys)


def _labels(
    table: pa.Table, columns: Columns, problems: Problems
) -> tuple[tuple[Labels, ...], npt.NDArray[np.bool_] | None]:
    """The labels of each column, and which rows lack one of them; None without labels."""
    if columns.missing_label is not None and not columns.labels:
        problems.add(
            "--missing-label requires labels, but there is no column 'label'; name one with --label-column"
        )
    # A single column without a kind was numbers before there were kinds.
    default = None if columns.has_label_features else "float"
    labels = tuple(
        read_labels(table[c.name], c, columns.missing_label, problems, default) for c in columns.labels
    )
    lacks_label = np.any([of.is_missing for of in labels], axis=0) if labels else None
    if columns.missing_label == "skip" and lacks_label is not None and lacks_label.all():
        names = ", ".join(of.column.name for of in labels)
        problems.add(
            f"every row lacks a label ({names}), so --missing-label skip would skip all rows; use "
            "--missing-label nan"
        )
    return labels, lacks_label


def _misspelled(names: Sequence[str], columns: Columns) -> Iterator[tuple[str, str]]:
    """Columns that differ only in case from those with a role, and would become extra columns."""
    labels = [column.name for column in columns.labels] or ["label"]
    wanted = {*_OWN, *columns.files, *labels} - set(names)
    for name in names:
        if name not in (*columns.files, *labels, columns.id) and name.lower() in wanted:
            yield name, name.lower()


def _has_pseudonyms(table: pa.Table, columns: Columns) -> bool:
    """Whether it is a list of failures with pseudonyms for paths; otherwise paths are absolute."""
    paths = [table[name] for name in columns.files if name in table.column_names]
    is_list = {"row", "stage", "error", "message"} <= {*table.column_names}
    return (
        is_list
        and table.num_rows > 0
        and any(pc.all(pc.match_substring_regex(of, PATTERN)).as_py() for of in paths)
    )


def _without_names(table: pa.Table, columns: Columns, pseudonyms: Pseudonyms) -> pa.Table:
    kinds = {columns.id: "id", "participant_id": "participant_id", "session_id": "session_id"}
    for name, kind in (kinds | dict.fromkeys(columns.files, "path")).items():
        if name in table.column_names:
            hashed = pseudonyms.of_column(table[name], kind)
            table = table.set_column(table.column_names.index(name), name, hashed)
    return table


def _ids(table: pa.Table, columns: Columns) -> pa.Array:
    if columns.id is not None:
        ids = table[columns.id]
    elif "participant_id" not in table.column_names:
        ids = table[columns.paths[0]]
    elif "session_id" not in table.column_names:
        ids = table["participant_id"]
    else:
        joined = pc.binary_join_element_wise(table["participant_id"], table["session_id"], "_")
        ids = pc.if_else(pc.equal(table["session_id"], ""), table["participant_id"], joined)
    return ids.combine_chunks()


def _check_ids(ids: pa.Array, problems: Problems) -> None:
    if pc.any(pc.equal(ids, "")).as_py():
        for i, text in enumerate(ids.to_pylist()):
            if not text:
                see = problems.offer("--id-column", " (see --id-column)", "")
                problems.add(f"row {i + 1}: empty id; every image needs one{see}")
    if len(pc.unique(ids)) == len(ids):
        return
    first: dict[str, int] = {}
    for i, text in enumerate(ids.to_pylist()):
        if text in first and text:
            remedy = "add a session_id column, or choose a column of unique ids with --id-column"
            remedy = problems.offer("--id-column", remedy, "correct one of them, or drop the row")
            problems.add(f"row {i + 1}: id {text!r} is also in row {first[text] + 1}; {remedy}")
        first.setdefault(text, i)
