"""Studies in the Brain Imaging Data Structure: names of images, folders, tables of participants.

Source: the BIDS specification 1.10, https://bids-specification.readthedocs.io, "Filesystem structure",
"Tabular files" and "Participants file".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from beam_nifti.errors import ManifestError, UsageError
from beam_nifti.manifest.image_names import drop_second_halves, stem_of
from beam_nifti.manifest.tables import Problems, read_table
from beam_nifti.storage import paths as storage
from beam_nifti.support.cells import is_missing

MISSING: Final = "n/a"  # an unknown value in a table

_PLACE: Final = re.compile(r"sub-[^/]*/(?:ses-[^/]*/)?(?!ses-)[^/]*/[^/]*")
"""Paths of images in a study, such as sub-01/ses-01/anat/NAME."""

_LISTED_DEPTH: Final = 6  # folders that are listed, to find images that lie deeper
_PARTICIPANTS: Final = "participants.tsv"
PREFIXES: Final = {"participant_id": "sub-", "session_id": "ses-"}
_STEM = re.compile(r"(?P<entities>(?:[A-Za-z0-9]+-[A-Za-z0-9+]+_)+)(?P<suffix>[A-Za-z0-9]+)")
_SESSIONS = re.compile(r"(sub-[A-Za-z0-9+]+)/\1_sessions\.tsv")


@dataclass(frozen=True, slots=True)
class BidsImage:
    """An image of a study, with its path, and its name's stem, entities (label by key) and suffix."""

    path: str
    stem: str
    entities: Mapping[str, str]
    suffix: str

    @property
    def participant_id(self) -> str:
        """Such as "sub-01"."""
        return f"sub-{self.entities['sub']}"

    @property
    def session_id(self) -> str:
        """Such as "ses-01"; "" where the name has none."""
        return f"ses-{self.entities['ses']}" if "ses" in self.entities else ""

    @property
    def session(self) -> tuple[str, str]:
        """Whose it is, and of which session."""
        return self.participant_id, self.session_id

    def has(self, entities: Mapping[str, Collection[str]]) -> bool:
        """Whether it has one of the labels of each key; "" is that of images without the key."""
        return all(self.entities.get(key, "") in labels for key, labels in entities.items())

    @classmethod
    def parse(cls, path: str) -> BidsImage | None:
        """The image at a path of a study; None if the name is none of BIDS, or not one for its folders.

        >>> BidsImage.parse("sub-01/anat/sub-01_run-1_T1w.nii.gz").entities
        {'sub': '01', 'run': '1'}
        >>> BidsImage.parse("sub-02/anat/sub-01_T1w.nii.gz") is None
        True
        """
        *folders, name = path.split("/")
        stem = stem_of(name)
        match = _STEM.fullmatch(stem or "")
        if stem is None or match is None:
            return None
        pairs = [pair.partition("-") for pair in match["entities"].rstrip("_").split("_")]
        entities = {key: label for key, _, label in pairs}
        image = cls(path, stem, entities, match["suffix"])
        if len(entities) < len(pairs) or "sub" not in entities or folders[:1] != [image.participant_id]:
            return None
        if len(folders) > 1 and folders[1].startswith("ses-") and folders[1] != image.session_id:
            return None
        return image


@dataclass(frozen=True)
class Study:
    """The files of a study in its folders sub-*.

    Attributes:
        root: folder or URL of the study.
        images: every image with a BIDS name, by suffix.
        misnamed: paths of images with other names, or names for another folder.
        misplaced: paths of images that are not in sub-*/FOLDER or sub-*/ses-*/FOLDER.
        odd_folders: folders that differ from sub-* in case or the hyphen.
        session_tables: path of the sessions.tsv, by participant_id.
    """

    root: str
    images: Mapping[str, Sequence[BidsImage]]
    misnamed: tuple[str, ...]
    misplaced: tuple[str, ...]
    odd_folders: tuple[str, ...]
    session_tables: Mapping[str, str]

    @classmethod
    def scan(cls, root: str) -> Study:
        """List the files of a study without reading them. Hidden files and folders are skipped.

        Raises:
            UsageError: there are no folders sub-*.
        """
        found, misplaced, session_tables = list[str](), list[str](), dict[str, str]()
        path = ""
        for path in storage.list_tree(root, "sub-", _LISTED_DEPTH):
            if stem_of(path) is not None:
                (found if _PLACE.fullmatch(path) else misplaced).append(path)
            elif match := _SESSIONS.fullmatch(path):
                session_tables[match[1]] = path
        if not path:
            raise UsageError(f"{root}: no files in folders sub-*; name the folder of a BIDS dataset")
        misplaced += [name for name in storage.list_files(root) if stem_of(name) is not None]
        folders = storage.list_folders(root)
        odd = [name for name in folders if name.lower().startswith("sub") and not name.startswith("sub-")]
        images, misnamed = dict[str, list[BidsImage]](), list[str]()
        for path in drop_second_halves(found):
            image = BidsImage.parse(path)
            if image is None:
                misnamed.append(path)
            else:
                images.setdefault(image.suffix, []).append(image)
        others = tuple(sorted(drop_second_halves(misplaced)))
        return cls(root, images, tuple(sorted(misnamed)), others, tuple(odd), session_tables)


_Cells = dict[str, str]


class Records:
    """The tables of a study, which describe participants and sessions.

    Ids are taken with their prefixes, sub- and ses-, whether the tables write them or not.

    Args:
        study: whose participants.tsv, and sessions.tsv of participants, are read.
        columns: columns of the tables; each must be in one of the tables.
        images: whose participants and sessions are of interest.

    Attributes:
        participants: ids in participants.tsv.
        rowless: sessions of images that have no row in the table of sessions with one of the columns, and
            the sessions that it has, by participant.
        imageless: sessions that only a table has, by participant with images.
        notes: sentences on which tables were read, and on what is suspicious in them.

    Raises:
        UsageError: no table has one of the columns; or a table is none, has no ids, or has one twice with
            different values.
    """

    def __init__(self, study: Study, columns: Collection[str], images: Sequence[BidsImage]) -> None:
        sessions = dict[str, set[str]]()
        for image in images:
            sessions.setdefault(image.participant_id, set()).add(image.session_id)
        present, has_tables = dict[str, None](), False
        self._of_participant = dict[str, dict[str, _Cells]]()
        root, session_tables, self.notes = _find_tables(study, sessions)
        if _has_content(path := storage.join(root, _PARTICIPANTS)):
            has_tables = True
            found, names = _read_records(path, ("participant_id", "session_id"), columns, self.notes)
            present.update(dict.fromkeys(names))
            for (participant, session), cells in found.items():
                self._of_participant.setdefault(participant, {})[session] = cells
        self.participants = self._of_participant.keys()
        self._of_session = dict[str, dict[str, _Cells]]()
        for participant in sorted(session_tables.keys() & sessions):
            path = storage.join(root, session_tables[participant])
            if not _has_content(path):
                continue
            has_tables = True
            found, names = _read_records(path, ("session_id",), columns, self.notes)
            present.update(dict.fromkeys(names))
            self._of_session[participant] = {session: cells for (session,), cells in found.items()}
        for column in columns:
            if column not in present:
                there = ", ".join(present) or "no others"
                raise UsageError(
                    f"{study.root}: no column {column!r} in participants.tsv or in a sessions.tsv; "
                    f"there are: {there if has_tables else 'no such tables'}"
                )
        self.rowless = dict[str, tuple[list[str], list[str]]]()
        self.imageless = dict[str, list[str]]()
        for participant, of_images in sessions.items():
            known = self._table_of(participant)
            if known.keys() <= {""}:
                continue
            if without := sorted(of_images - known.keys() - {""}):
                self.rowless[participant] = (without, sorted(known))
            if rest := sorted(known.keys() - of_images):
                self.imageless[participant] = rest

    def _table_of(self, participant: str) -> Mapping[str, _Cells]:
        """Rows by session, from the participant's own table or from participants.tsv."""
        rows = self._of_session.get(participant, {})
        return rows if any(rows.values()) else self._of_participant.get(participant, {})

    def cell(self, image: BidsImage, column: str) -> str:
        """The value for an image: that of its session, otherwise that of its participant, otherwise MISSING.

        If a participant's own table of sessions has the column, a session without a row in it has no value.
        """
        of_session = self._of_session.get(image.participant_id, {})
        if image.session_id and any(column in cells for cells in of_session.values()):
            row = of_session.get(image.session_id)
        else:
            rows = self._of_participant.get(image.participant_id, {})
            row = rows.get(image.session_id, rows.get(""))
            if row is None and not image.session_id and len(rows) == 1:
                (row,) = rows.values()
        text = (row or {}).get(column, "").strip()
        return MISSING if is_missing(text) else text


def _find_tables(study: Study, participants: Iterable[str]) -> tuple[str, Mapping[str, str], list[str]]:
    """The folder of a study's tables, its sessions.tsv by participant, and a note if it is another study's.

    Derivatives seldom have tables; those of their source dataset are used.
    """
    above, _, name = study.root.rpartition("/")
    raw = storage.dirname(above)
    is_derivative = bool(name) and above.rpartition("/")[2] == "derivatives"
    has_own = study.session_tables or _has_content(storage.join(study.root, _PARTICIPANTS))
    if not is_derivative or has_own or not _has_content(storage.join(raw, _PARTICIPANTS)):
        return study.root, study.session_tables, []
    paths = {participant: f"{participant}/{participant}_sessions.tsv" for participant in participants}
    tables = {of: path for of, path in paths.items() if _has_content(storage.join(raw, path))}
    return raw, tables, [f"{study.root} has no {_PARTICIPANTS}; the tables of {raw} are used"]


def _has_content(path: str) -> bool:
    """Whether a file exists. A link to a missing file, as in git-annex, is an error."""
    if what := storage.broken_link(path):
        raise UsageError(f"{path}: {what}")
    return storage.exists(path)


def _read_records(
    path: str, keys: Sequence[str], columns: Collection[str], notes: list[str]
) -> tuple[dict[tuple[str, ...], _Cells], list[str]]:
    """Some columns of a table by its keys, and the names of all columns but the keys.

    The first key is required.
    """
    problems = Problems(path)
    try:
        table = read_table(path, problems=problems)
    except ManifestError as e:
        raise UsageError(f"{path}: {'; '.join(e.problems)}") from e
    notes += (f"{path}: {warning}" for warning in problems.warnings)
    if keys[0] not in table.column_names:
        raise UsageError(f"{path}: no column {keys[0]!r}, only {', '.join(table.column_names)}")
    names = [name for name in table.column_names if name not in keys]
    ids = [
        [_with_prefix(text, PREFIXES[key]) for text in table[key].to_pylist()]
        if key in table.column_names
        else [""] * table.num_rows
        for key in keys
    ]
    records = dict[tuple[str, ...], _Cells]()
    rows = table.select([name for name in names if name in columns]).to_pylist()
    for found, cells in zip(zip(*ids, strict=True), rows, strict=True):
        if records.setdefault(found, cells) != cells:
            where = " and ".join(filter(None, found))
            raise UsageError(
                f"{path}: {where} is in two rows with different values; remove one of the rows, or add a "
                "column session_id if they are sessions"
            )
    return records, names


def _with_prefix(text: str, prefix: str) -> str:
    """An id as in file names."""
    text = "" if is_missing(text) else text.strip()
    # In another case it is another id, which is named as the table writes it.
    return text if not text or text.lower().startswith(prefix) else f"{prefix}{text}"
