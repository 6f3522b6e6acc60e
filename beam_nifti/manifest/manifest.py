"""The manifest: a table of images and labels, read as strings and checked row by row."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.config import SPLIT_PATTERN, Columns, LabelColumn, Splitting
from beam_nifti.manifest.labels import Labels, LabelValue, number_of, read_labels
from beam_nifti.manifest.leaks import Kind, Names, refuse_headers, refuse_names
from beam_nifti.manifest.pseudonyms import PATTERN, Pseudonyms
from beam_nifti.manifest.splits import draw_splits, find_disagreements, find_shared_images
from beam_nifti.manifest.tables import Problems, read_table
from beam_nifti.manifest.twins import LIKENESS, find_twins, fold, refuse_twins, warn_of_names
from beam_nifti.storage import paths as storage
from beam_nifti.support import logs

DEFAULT_SPLIT: Final = "train"
WHOLE_SHARD: Final = -1
"""`VolumeRow.unit` where a shard is a single work unit."""

_OWN: Final = ("participant_id", "session_id", "split")
_GIVE_THAT_OF_DATASET: Final = "give the manifest that the dataset was built from"
_BATCH_ROWS: Final = 1 << 14
"""Rows that are turned into Python strings at a time."""


@dataclass(frozen=True, slots=True)
class VolumeRow:
    """One row of the manifest, with its place in the dataset.

    Attributes:
        row: 1-based number of the row in the manifest, its header not counted.
        example_id: what names the example, unique in the manifest.
        path: the image, as the manifest says it; of several the first.
        label: the number of its first label; None where it has none.
        participant_id: "" where the manifest has none.
        session_id: "" where the manifest has none.
        split: such as "train".
        position: 0-based place in its split; of the first of its records where there are several.
        extras: values of the manifest's further columns, in the order of `Manifest.extra_columns`.
        shard: file name of the shard that it belongs to.
        unit: number of the work unit in its shard; WHOLE_SHARD where it is the only one.
        further: the other files of the example, as the manifest says them: its further images, then its mask.
        pseudonyms: what is written in the place of each of its paths; none where those are written.
        labels: name and value of each label that has a feature of its own.
        num_frames: frames of the image, where each becomes a record; None where the image is one.
        wanted: those of them, from 0, whose records are still to be made; None for all.
        frame: the one of them that this record is of; None where it is not of one.
        names: its ids with what is written in the place of each; none where those are written.
        version_key: `Pseudonyms.version_key`; "" where ids are not anonymous.
    """

    row: int
    example_id: str
    path: str
    label: float | None = None
    participant_id: str = ""
    session_id: str = ""
    split: str = DEFAULT_SPLIT
    position: int = 0
    extras: tuple[str, ...] = ()
    shard: str = ""
    unit: int = 0
    further: tuple[str, ...] = ()
    pseudonyms: tuple[str, ...] = ()
    labels: tuple[tuple[str, LabelValue], ...] = ()
    num_frames: int | None = None
    wanted: tuple[int, ...] | None = None
    frame: int | None = None
    names: tuple[tuple[str, str], ...] = ()
    version_key: str = ""

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the images, and of the mask if there is one."""
        return (self.path, *self.further)

    @property
    def source(self) -> str:
        """What is written of where the image is."""
        return self.pseudonyms[0] if self.pseudonyms else self.path

    @property
    def image_id(self) -> str:
        """What names the image in the manifest, also where the example is one of its frames."""
        return (
            self.example_id if self.frame is None else self.example_id.removesuffix(frame_id("", self.frame))
        )

    @property
    def frames(self) -> Sequence[int]:
        """Whose records are still to be made; 0 where the image is one record."""
        return range(self.num_frames or 1) if self.wanted is None else self.wanted

    @property
    def positions(self) -> list[int]:
        """Of the records that are still to be made, in their split."""
        return [self.position + frame for frame in self.frames]

    def of_frame(self, frame: int) -> VolumeRow:
        """The row of one frame's record.

        >>> VolumeRow(1, "sub-01", "bold.nii", position=20, num_frames=10).of_frame(3).example_id
        'sub-01_frame-0003'
        """
        return dataclasses.replace(
            self,
            example_id=frame_id(self.example_id, frame),
            position=self.position + frame,
            num_frames=None,
            wanted=None,
            frame=frame,
        )

    def records(self) -> list[VolumeRow]:
        """A row for each record that is still to be made, in the order of their positions."""
        return [self] if self.num_frames is None else [self.of_frame(frame) for frame in self.frames]


def frame_id(image_id: str, frame: int) -> str:
    """The example id of a frame of an image."""
    return f"{image_id}_frame-{frame:04d}"


@dataclass(frozen=True)
class Manifest:
    """A checked manifest, held as Arrow columns (about 100 bytes a row).

    Attributes:
        path: where it was read from.
        table: every column as strings, in the manifest's order; where ids are anonymous, with pseudonyms in
            the place of ids and paths.
        paths: the images and masks, as the manifest says it, by column.
        columns: which of them mean what; its `label` is None in an unlabelled manifest, and has the kinds of
            labels that have features of their own.
        numbers: of the feature `label`, float64 of shape (rows,), NaN where a row has none; None in an
            unlabelled manifest.
        labels: the labels that have features of their own.
        ids: example id of each row.
        splits: split of each row; null where the row is skipped, as it lacks a label.
        extra_columns: names of the columns that are only kept in the index.
        key_check: `Pseudonyms.check` where ids are anonymous; else None.
        name: what is written of `path`: itself, or its pseudonym where ids are anonymous.
        names: where ids are anonymous, the ids as the manifest says them, by column; else none.
        version_key: `Pseudonyms.version_key` where ids are anonymous; else "".
        lacks_label: which rows lack one of the labels; None in an unlabelled manifest.
        warnings: what is suspicious, or was changed, in it.
    """

    path: str
    table: pa.Table
    paths: Mapping[str, pa.ChunkedArray]
    columns: Columns
    numbers: npt.NDArray[np.float64] | None
    labels: tuple[Labels, ...]
    ids: pa.Array
    splits: pa.Array
    extra_columns: tuple[str, ...]
    key_check: str | None
    name: str
    names: Mapping[str, pa.ChunkedArray]
    version_key: str
    lacks_label: npt.NDArray[np.bool_] | None = None
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.table.num_rows)

    @property
    def folder(self) -> str:
        """What relative image paths are relative to."""
        return storage.dirname(self.path)

    @property
    def num_skipped(self) -> int:
        """Rows that are skipped, as they lack a label."""
        return int(self.splits.null_count)

    @property
    def num_unlabelled(self) -> int:
        """Rows that lack a label and are kept."""
        return 0 if self.lacks_label is None else int(self.lacks_label.sum()) - self.num_skipped

    @property
    def label_columns(self) -> tuple[LabelColumn, ...]:
        """The columns of the labels that have features of their own."""
        return tuple(labels.column for labels in self.labels)

    def kept_rows(self) -> npt.NDArray[np.int64]:
        """0-based indices of the rows that are in a split."""
        return np.flatnonzero(self.splits.is_valid().to_numpy(zero_copy_only=False))

    def split_sizes(self) -> dict[str, int]:
        """Rows of each split, by the split's name in sorted order."""
        counts = pc.value_counts(self.splits.drop_null()).to_pylist()
        return {c["values"]: c["counts"] for c in sorted(counts, key=lambda c: str(c["values"]))}

    def row_numbers(self, split: str) -> npt.NDArray[np.int64]:
        """0-based row indices of a split, in the manifest's order."""
        mask = pc.fill_null(pc.equal(self.splits, split), False).to_numpy(zero_copy_only=False)
        return np.flatnonzero(mask)

    def rows(
        self,
        indices: Sequence[int],
        first_position: int = 0,
        shard: str = "",
        unit: int = 0,
        num_frames: int | None = None,
    ) -> list[VolumeRow]:
        """The rows at `indices`, whose records have consecutive positions of their split."""
        take = pa.array(indices, pa.int64())
        part = self.table.take(take)
        paths, *further = (column.take(take).to_pylist() for column in self.paths.values())
        ids, splits = self.ids.take(take).to_pylist(), self.splits.take(take).to_pylist()
        blank = [""] * len(indices)
        others = list(zip(*further, strict=True))
        hashed = [part[name].to_pylist() for name in self.paths] if self.key_check else []
        pseudonyms = list(zip(*hashed, strict=True))
        hidden = [
            list(zip(of.take(take).to_pylist(), part[name].to_pylist(), strict=True))
            for name, of in self.names.items()
        ]
        names = list(zip(*hidden, strict=True))
        participants, sessions = (
            part[name].to_pylist() if name in part.column_names else blank
            for name in ("participant_id", "session_id")
        )
        extras = list(zip(*(part[c].to_pylist() for c in self.extra_columns), strict=True))
        named = [[(of.column.name, v) for v in of.values.take(take).to_pylist()] for of in self.labels]
        labels = list(zip(*named, strict=True))
        return [
            VolumeRow(
                row=int(index) + 1,
                example_id=ids[i],
                path=paths[i],
                label=None if self.numbers is None else number_of(float(self.numbers[index])),
                participant_id=participants[i],
                session_id=sessions[i],
                split=splits[i],
                position=first_position + i * (num_frames or 1),
                extras=extras[i] if extras else (),
                shard=shard,
                unit=unit,
                further=others[i] if others else (),
                pseudonyms=pseudonyms[i] if pseudonyms else (),
                labels=labels[i] if labels else (),
                num_frames=num_frames,
                names=names[i] if names else (),
                version_key=self.version_key,
            )
            for i, index in enumerate(indices)
        ]

    def row_of(self, files: Sequence[str]) -> VolumeRow | None:
        """The row of an example by what is written of its files; None where it is none of this manifest's."""
        first, *further = self.columns.files
        is_same = pc.equal(self.table[first], files[0])
        for name, text in zip(further, files[1:], strict=True):
            is_same = pc.and_(is_same, pc.equal(self.table[name], text))
        at = pc.index(is_same, True).as_py()
        return None if at < 0 else self.rows([at])[0]

    def lacks_labels(self, num_rows: int) -> bool:
        """Whether one of the first rows lacks a label."""
        return self.lacks_label is not None and bool(self.lacks_label[:num_rows].any())

    def log_warnings(self) -> None:
        """Report what is suspicious in it; once a command, as it is read several times."""
        for warning in self.warnings:
            logs.LOGGER.warning("%s: %s", self.path, warning)

    def digest(self, num_rows: int | None = None) -> str:
        """sha256 of the column names and the first `num_rows` rows, whatever the file's format."""
        hasher = hashlib.sha256("\x1f".join(self.table.column_names).encode())
        for batch in self.table.slice(0, num_rows).to_batches(max_chunksize=_BATCH_ROWS):
            columns = [batch.column(i).to_pylist() for i in range(batch.num_columns)]
            rows = ("\x1f".join(cells) for cells in zip(*columns, strict=True))
            hasher.update(("\x1e" + "\x1e".join(rows)).encode())
        return hasher.hexdigest()


def read_manifest(
    path: str,
    columns: Columns | None = None,
    splitting: Splitting | None = None,
    pseudonyms: Pseudonyms | None = None,
    *,
    is_of_dataset: bool = False,
    list_content: bytes | None = None,
) -> Manifest:
    """Read and check a manifest.

    Args:
        path: .csv, .tsv, .jsonl (or .ndjson) or .parquet; local or a URL.
        columns: which columns mean what.
        splitting: how to draw the splits; None takes those of the column `split`.
        pseudonyms: stand for ids and paths in all that is made of the manifest, splits and the order of a
            shuffle included, which would tell them otherwise; None keeps the names.
        is_of_dataset: whether columns and splitting are those of a dataset, so that no option changes them.
        list_content: bytes of the file, where it is a dataset's list of failures: that may have pseudonyms in
            the place of paths.

    Raises:
        ManifestError: with every problem found, up to 20, by row number.
    """
    columns = columns or Columns()
    problems = Problems(path, hides_cells=pseudonyms is not None)
    table = read_table(path, _meaningful(columns, splitting), problems, list_content)
    present = ", ".join(table.column_names) or "none"
    for name, flag in (
        *((name, "--path-column") for name in columns.paths),
        (columns.mask, "--mask-column"),
        *((column.name, "--label-column") for column in columns.labels),
        (columns.id, "--id-column"),
        (splitting and splitting.stratify, "--stratify"),
    ):
        if name is not None and name not in table.column_names:
            remedy = _GIVE_THAT_OF_DATASET if is_of_dataset else f"choose one with {flag}"
            problems.add(f"no column {name!r}; the columns are: {present}; {remedy}")
    if splitting and "split" in table.column_names:
        remedy = "leave --split out, or drop or rename the column"
        problems.add(f"has a column 'split' already; {_GIVE_THAT_OF_DATASET if is_of_dataset else remedy}")
    for name, meant in _misspelled(table.column_names, columns):
        problems.add(f"column {name!r} is probably meant as {meant!r}; rename it")
    if table.num_rows == 0:
        problems.add("no rows; a manifest needs a header and at least one image")
    if list_content is None and _has_pseudonyms(table, columns):
        problems.add(
            "is the list of failures of a dataset with anonymous ids: its paths are pseudonyms, and each "
            "'row' is that of the manifest that the dataset was built from; build these rows of that manifest"
        )
    problems.stop()

    if columns.label is None and "label" in table.column_names:
        columns = dataclasses.replace(columns, label="label")
    for name in columns.files:
        what = "mask" if name == columns.mask else "image"
        for i, text in enumerate(_cells(table, name)):
            if not text:
                problems.add(f"row {i + 1}: empty {name}; give the {what}'s path or drop the row")
    paths = {name: table[name] for name in columns.files}
    people = table["participant_id"].combine_chunks() if "participant_id" in table.column_names else None
    _warn_of_names(table, columns, people, problems, is_anonymous=pseudonyms is not None)
    drawn_by = (_ids(table, columns) if people is None else people) if splitting else None
    if drawn_by is not None:
        refuse_twins(drawn_by, problems, is_anonymous=pseudonyms is not None)
    names = dict[str, pa.ChunkedArray]()
    if pseudonyms:
        kinds = ("participant_id", "session_id", columns.id)
        names = {name: table[name] for name in table.column_names if name in kinds}
        _refuse_leaks(table, columns, problems)
        table = _without_names(table, columns, pseudonyms)
    labels = _labels(table, columns, problems)
    lacks_label = np.any([of.is_missing for of in labels], axis=0) if labels else None
    is_skipped = _skipped(lacks_label, labels, columns, problems)
    ids = _ids(table, columns)
    splits = (
        _drawn_splits(table, ids, splitting, is_skipped, problems)
        if splitting
        else _without(is_skipped, _given_splits(table, people, problems))
    )
    _check_ids(ids, problems)
    _refuse_shared_images(paths, table, columns, splits, problems)
    problems.stop()
    numbers = labels[0].numbers if labels else None
    used = {columns.paths[0], columns.id, *_OWN}
    if columns.has_label_features or any(of.column.kind == "class" for of in labels):
        # Their cells are kept in the index, and in failures.jsonl, as those of further columns are.
        columns = dataclasses.replace(columns, label=",".join(str(of.column) for of in labels))
        used -= {of.column.name for of in labels}
    else:
        used |= {of.column.name for of in labels}
        labels = ()
    return Manifest(
        path=path,
        table=table,
        paths=paths,
        columns=columns,
        numbers=numbers,
        labels=labels,
        ids=ids,
        splits=splits,
        extra_columns=tuple(c for c in table.column_names if c not in used),
        key_check=pseudonyms.check if pseudonyms else None,
        name=pseudonyms.of_path(path) if pseudonyms else path,
        names=names,
        version_key=pseudonyms.version_key if pseudonyms else "",
        lacks_label=lacks_label,
        warnings=tuple(problems.warnings),
    )


def _meaningful(columns: Columns, splitting: Splitting | None) -> set[str]:
    """The columns whose cells mean something to a build."""
    labels = {column.name for column in columns.labels} or {"label"}
    by = (columns.id, splitting.stratify if splitting else None)
    return {*columns.files, *labels, *_OWN, *filter(None, by)}


def _warn_of_names(
    table: pa.Table, columns: Columns, people: pa.Array | None, problems: Problems, *, is_anonymous: bool
) -> None:
    """Warn of participants and ids that are probably one, and of ids that a spreadsheet has rewritten."""
    if people is not None:
        warn_of_names("participant_id", people, problems, is_anonymous=is_anonymous)
    if people is None or columns.id is not None:
        warn_of_names("id", _ids(table, columns), problems, is_anonymous=is_anonymous)
    elif "session_id" in table.column_names:
        # Twins of one participant are ids of two sessions; those of two are known as participants.
        sessions = fold(table["session_id"].combine_chunks())
        keys = pc.binary_join_element_wise(people, sessions, "\0")
        warn_of_names("id", _ids(table, columns), problems, keys, is_anonymous=is_anonymous)


def _labels(table: pa.Table, columns: Columns, problems: Problems) -> tuple[Labels, ...]:
    if columns.missing_label is not None and not columns.labels:
        problems.add(
            "--missing-label is for labels, and there is no column 'label'; name one with --label-column"
        )
    # A single column without a kind was numbers before there were kinds.
    default = None if columns.has_label_features else "float"
    return tuple(
        read_labels(table[c.name], c, columns.missing_label, problems, default) for c in columns.labels
    )


def _skipped(
    lacks_label: npt.NDArray[np.bool_] | None, labels: Sequence[Labels], columns: Columns, problems: Problems
) -> npt.NDArray[np.bool_] | None:
    """Which rows are skipped, as they lack a label; None where none may be."""
    if columns.missing_label != "skip" or lacks_label is None:
        return None
    if lacks_label.all():
        names = ", ".join(of.column.name for of in labels)
        problems.add(f"every row lacks a label ({names}), and --missing-label skip would skip all of them")
    return lacks_label


def _without(is_skipped: npt.NDArray[np.bool_] | None, splits: pa.Array) -> pa.Array:
    return splits if is_skipped is None else pc.if_else(pa.array(is_skipped), None, splits)


def _misspelled(names: Sequence[str], columns: Columns) -> Iterator[tuple[str, str]]:
    """Columns that are ours but for case, which would be taken for further ones."""
    labels = [column.name for column in columns.labels] or ["label"]
    wanted = {*_OWN, *columns.files, *labels} - set(names)
    for name in names:
        if name not in (*columns.files, *labels, columns.id) and name.lower() in wanted:
            yield name, name.lower()


def _cells(table: pa.Table, column: str) -> Iterator[str]:
    for batch in table.select([column]).to_batches(max_chunksize=_BATCH_ROWS):
        yield from batch.column(0).to_pylist()


def _given_splits(table: pa.Table, people: pa.Array | None, problems: Problems) -> pa.Array:
    """The column `split`. `people` has the names of participants, where the table may have pseudonyms."""
    if "split" not in table.column_names:
        return pa.array([DEFAULT_SPLIT]).take(pa.array(np.zeros(table.num_rows, np.int64)))
    splits = table["split"].combine_chunks()
    bad = {s for s in pc.unique(splits).to_pylist() if not SPLIT_PATTERN.fullmatch(s)}
    for i, text in enumerate(splits.to_pylist() if bad else ()):
        if text in bad:
            problems.add(
                f"row {i + 1}: split is {problems.shown(text)}; use letters, digits, '_' and '.', a "
                "letter or digit first, such as train"
            )
    for i, other in find_twins(splits):
        problems.add(
            f"row {i + 1}: split is {problems.shown(splits[i].as_py())}, and "
            f"{problems.shown(splits[other].as_py())} in row {other + 1}; "
            "give them one spelling"
        )
    if people is not None:
        shown = table["participant_id"].combine_chunks()
        for i, first in zip(*find_disagreements(fold(people), splits), strict=True):
            elsewhere = f"in row {first + 1}"
            if people[i].as_py() != people[first].as_py():
                elsewhere = f"{shown[first]} {elsewhere}, probably the same participant, is"
            problems.add(
                f"row {i + 1}: participant {shown[i]} is in split {problems.plain(splits[i])}, and "
                f"{elsewhere} in {problems.plain(splits[first])}; give all rows of a participant one split, "
                "or, where participant_id does not name persons, rename that column"
            )
    return splits


def _refuse_shared_images(
    paths: Mapping[str, pa.ChunkedArray],
    shown: pa.Table,
    columns: Columns,
    splits: pa.Array,
    problems: Problems,
) -> None:
    """Refuse images that are in several splits; the table that is shown may have pseudonyms for paths."""
    folder = storage.absolute(storage.dirname(problems.path) or ".")
    files = [paths[name] for name in columns.paths]
    for (column, row), (_, first) in find_shared_images(files, splits, folder):
        problems.add(
            f"row {row + 1}: image {shown[columns.paths[column]][row]} is in split "
            f"{problems.plain(splits[row])} and, in row {first + 1}, in {problems.plain(splits[first])}; "
            "keep one of the rows, or give both one split"
        )


def _drawn_splits(
    table: pa.Table,
    ids: pa.Array,
    splitting: Splitting,
    is_skipped: npt.NDArray[np.bool_] | None,
    problems: Problems,
) -> pa.Array:
    names = sorted(splitting.shares)
    for twin, other in find_twins(pa.array(names, pa.string())):
        problems.add(
            f"--split names {names[other]!r} and {names[twin]!r}, which differ {LIKENESS}; rename one"
        )
    participants, categories = ids, None
    if "participant_id" in table.column_names:
        participants = table["participant_id"].combine_chunks()
        nobody = pc.equal(participants, "").to_numpy(zero_copy_only=False)
        for i in np.flatnonzero(nobody):
            problems.add(f"row {i + 1}: empty participant_id; --split needs to know whose image it is")
    if splitting.stratify is not None:
        categories = table[splitting.stratify].combine_chunks()
        for i, first in zip(*find_disagreements(participants, categories), strict=True):
            problems.add(
                f"row {i + 1}: participant {participants[i]} has {splitting.stratify} "
                f"{problems.shown(categories[i].as_py())} here and "
                f"{problems.shown(categories[first].as_py())} in row {first + 1}; "
                "--stratify requires one value per participant"
            )
    # With the rows that are skipped, so that no one moves when their labels are filled in.
    splits = _without(is_skipped, draw_splits(participants, splitting, categories).cast(pa.string()))
    for name in sorted(splitting.shares.keys() - set(pc.unique(splits).to_pylist())):
        problems.add(
            f"no participant falls into split {name} with a share of {splitting.shares[name]:g}; give it a "
            "larger share, or draw again with another --split-seed"
        )
    return splits


def _refuse_leaks(table: pa.Table, columns: Columns, problems: Problems) -> None:
    """Refuse columns that are kept as they are, and have names that pseudonyms shall stand for."""
    kinds: dict[str | None, Kind] = {columns.id: "id", "participant_id": "id", "session_id": "session"}
    kinds |= dict.fromkeys(columns.files, "path")
    at = {name: number for number, name in enumerate(table.column_names, 1)}
    names = [
        Names.of(table[n].combine_chunks(), kind) for n, kind in kinds.items() if n is not None and n in at
    ]
    kept = [(number, name) for name, number in at.items() if name not in kinds]
    refuse_headers(kept, names, problems)
    problems.stop()  # what is found later may show names of columns
    for _, column in kept:
        refuse_names(column, table[column].combine_chunks(), names, problems)
    problems.stop()  # what is found later may show cells


def _has_pseudonyms(table: pa.Table, columns: Columns) -> bool:
    """Whether it is a list of failures without paths; with them, they are absolute."""
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
                problems.add(f"row {i + 1}: empty id; every image needs one (see --id-column)")
    if len(pc.unique(ids)) == len(ids):
        return
    first: dict[str, int] = {}
    for i, text in enumerate(ids.to_pylist()):
        if text in first and text:
            problems.add(
                f"row {i + 1}: id {text!r} is also in row {first[text] + 1}; "
                "add a session_id column, or choose a column of unique ids with --id-column"
            )
        first.setdefault(text, i)
