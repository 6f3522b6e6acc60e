"""Adds columns of another table to a manifest, such as those of a clinical sheet, by ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.config.choices import choose
from beam_nifti.errors import ManifestError, UsageError
from beam_nifti.manifest.bids import MISSING, PREFIXES
from beam_nifti.manifest.discovery import FoundImages
from beam_nifti.manifest.tables import MAX_PROBLEMS, Problems, read_table, strings
from beam_nifti.storage import paths as storage
from beam_nifti.support.cells import is_missing
from beam_nifti.support.wording import counted, first_few

UNMATCHED: Final = ("refuse", "keep", "skip")
_SHOWN: Final = 3  # names in a note that concerns many
_BETWEEN: Final = "\x1f"  # the cells of a key


@dataclass(frozen=True)
class Join:
    """Which columns of which table are added, and by which ids.

    Attributes:
        path: .csv, .tsv, .jsonl or .parquet file; local or a URL.
        on: column of ids of the manifest and of the table, or several of each.
        columns: new and old name of each column to add.
        unmatched: what becomes of rows of the manifest without a partner: "refuse", "keep" with n/a, or
            "skip".
    """

    path: str
    on: tuple[tuple[str, str], ...]
    columns: tuple[tuple[str, str], ...]
    unmatched: str = "refuse"

    @classmethod
    def parse(cls, path: str, on: str, columns: str, unmatched: str | None) -> Join:
        """From the texts of the options: `on` is NAME or NAME=NAME_IN_TABLE, `columns` NAME or NEW=NAME.

        Raises:
            UsageError: a name is empty or occurs twice, or `unmatched` is unknown.
        """
        unmatched = unmatched or "refuse"
        choose("--unmatched", unmatched, UNMATCHED)
        pairs = _pairs_of("--on", on), _pairs_of("--join-columns", columns)
        return cls(storage.absolute(path), *pairs, unmatched)


def _pairs_of(flag: str, text: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for part in text.split(","):
        new, equals, old = (cell.strip() for cell in part.partition("="))
        pairs.append((new, old if equals else new))
        if not all(pairs[-1]):
            raise UsageError(f"{flag} is {text!r}; give names of columns, such as age or age=Age")
        if [name for name, _ in pairs].count(new) > 1:
            raise UsageError(f"{flag} is {text!r}, which names {new!r} twice; drop one")
    return tuple(pairs)


def read_images(path: str, folder: str) -> FoundImages:
    """A manifest that exists; `folder` is that of the new one, or "".

    Raises:
        UsageError: the new one is in another folder, where relative paths would lead to other files; or it is
            no table.
    """
    path = storage.absolute(path)
    if folder and not storage.is_same(folder, storage.dirname(path)):
        raise UsageError(
            f"--out is in {folder}, but paths in MANIFEST are relative to {storage.dirname(path)}; write it "
            "there"
        )
    table, notes = _read(path)
    return FoundImages(table, tuple(notes))


def join_table(found: FoundImages, join: Join) -> FoundImages:
    """Add columns of another table.

    The manifest's rows keep their order. An id of a participant or session is the same with and without sub-
    or ses-; other ids must be equal.

    Args:
        found: a manifest.
        join: what to add.

    Raises:
        UsageError: the table cannot be read, a column is missing or there already, or an id has two rows with
            different values.
        ManifestError: rows have no partner, and `join.unmatched` is "refuse".
    """
    manifest, notes = found.table, list(found.notes)
    table, warnings = _read(join.path)
    notes += warnings
    for name, of, columns in (
        ("the manifest", manifest, [name for name, _ in join.on]),
        (join.path, table, [name for _, name in (*join.on, *join.columns)]),
    ):
        if missing := [column for column in columns if column not in of.column_names]:
            raise UsageError(
                f"{name}: no column {missing[0]!r}; the columns are: {', '.join(of.column_names)}"
            )
    for new, old in join.columns:
        if new in manifest.column_names:
            raise UsageError(
                f"--join-columns: the manifest has a column {new!r} already; rename it as NEW={old}"
            )
    keys = _keys_of(table, [old for _, old in join.on], [new for new, _ in join.on])
    if num_empty := keys.null_count:
        names = " and ".join(old for _, old in join.on)
        notes.append(f"not used: {counted(num_empty, 'row')} of {join.path} without {names}")
    added = table.select([old for _, old in join.columns]).rename_columns([new for new, _ in join.columns])
    rows = _first_rows(keys, added, join.path)
    wanted = _keys_of(manifest, [new for new, _ in join.on], [new for new, _ in join.on])
    at = pc.index_in(wanted, keys.take(rows), skip_nulls=True)
    is_matched = at.is_valid()
    names = pc.binary_join_element_wise(*(manifest[new] for new, _ in join.on), ", ").to_pylist()
    notes += _notes_on_partners(join, wanted.to_pylist(), keys.take(rows).to_pylist(), names)
    added = added.take(rows).take(at)
    for name, column in zip(added.column_names, added.columns, strict=True):
        manifest = manifest.append_column(name, pc.fill_null(column, MISSING))
    if join.unmatched == "skip":
        manifest = manifest.filter(is_matched)
        if not manifest.num_rows:
            raise UsageError(
                f"{join.path}: no row of the manifest matches a row of this table; compare their ids"
            )
    return FoundImages(manifest, tuple(notes))


def _read(path: str) -> tuple[pa.Table, list[str]]:
    problems = Problems(path)
    try:
        return read_table(path, problems=problems), [f"{path}: {text}" for text in problems.warnings]
    except ManifestError as e:
        raise UsageError(f"{path}: {'; '.join(e.problems)}") from e


def _keys_of(table: pa.Table, columns: Sequence[str], meant: Sequence[str]) -> pa.Array:
    """The key of each row; null if one of its cells is missing.

    `meant` are the names of the columns in the manifest, which tell what their ids are those of.
    """
    cells = []
    for column, name in zip(columns, meant, strict=True):
        prefix = PREFIXES.get(name, "")
        texts = (None if is_missing(text) else text.removeprefix(prefix) for text in strings(table[column]))
        cells.append(pa.array(texts, pa.string()))
    return pc.binary_join_element_wise(*cells, _BETWEEN, null_handling="emit_null")


def _first_rows(keys: pa.Array, added: pa.Table, path: str) -> pa.Array:
    """The first row of each key; another row with other values is an error."""
    values = added.to_pylist()
    first = dict[str, int]()
    for number, key in enumerate(strings(keys)):
        if key is not None and values[first.setdefault(key, number)] != values[number]:
            raise UsageError(
                f"{path}: {_shown(key)} is in rows {first[key] + 1} and {number + 1} with different values; "
                "remove one of them, or give a further column with --on, such as session_id"
            )
    return pa.array(first.values(), pa.int64())


def _shown(key: str) -> str:
    return key.replace(_BETWEEN, ", ")


def _notes_on_partners(
    join: Join, wanted: Sequence[str | None], keys: Sequence[str], ids: Sequence[str]
) -> list[str]:
    """Notes on rows without a partner in either table; refuses those of the manifest if that is requested."""
    notes = []
    partners, present = set(keys), set(wanted)
    alone = [i for i, key in enumerate(wanted) if key is None or key not in partners]
    names = [ids[i] or "an empty id" for i in alone]
    known = {_folded(key): key for key in keys}
    likes = [(known.get(_folded(wanted[i] or "")), ids[i]) for i in alone]
    hints = [f"{_shown(key)} for {name}" for key, name in likes if key is not None]
    if alone and join.unmatched == "refuse":
        problems = [
            f"row {i + 1}: {name} is not in {join.path}" for i, name in zip(alone, names, strict=True)
        ]
        more = ["(and more)"] if len(problems) > MAX_PROBLEMS else []
        hint = [f"possibly the same id: {first_few(hints, _SHOWN)}; ids must match exactly"] if hints else []
        remedy = ["correct the ids, or choose with --unmatched keep or --unmatched skip"]
        raise ManifestError(
            "the manifest", [*problems[:MAX_PROBLEMS], *more, *hint, *remedy], "not all rows are in the table"
        )
    if alone:
        what = "not used" if join.unmatched == "skip" else f"{MISSING} in the columns of {join.path}"
        shown = first_few([*dict.fromkeys(names)], _SHOWN)
        notes.append(f"{what}: {counted(len(alone), 'row')} ({shown}) without a match in {join.path}")
    if hints:
        notes.append(f"possibly the same id: {first_few(hints, _SHOWN)}; ids must match exactly")
    if others := [_shown(key) for key in keys if key not in present]:
        notes.append(
            f"not used: {counted(len(others), 'id')} ({first_few(others, _SHOWN)}) of {join.path} that the "
            "manifest does not have"
        )
    return notes


def _folded(key: str) -> str:
    """A key without case, prefixes and leading zeros."""
    return re.sub(r"\b(?:sub-|ses-)?0*(\d+)", r"\1", key.casefold())
