"""Studies in the Brain Imaging Data Structure: names of images, folders, tables of participants.

Source: the BIDS specification 1.10, https://bids-specification.readthedocs.io, "Filesystem structure",
"Tabular files" and "Participants file".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from beam_nifti import storage
from beam_nifti.errors import ManifestError, UsageError
from beam_nifti.image_names import drop_second_halves, stem_of
from beam_nifti.tables import read_table

MISSING: Final = "n/a"
"""What a table says of a value that is not known."""

_DEPTH: Final = 3
"""Folders in which an image lies at most: sub-01/ses-01/anat."""

_STEM = re.compile(r"(?P<entities>(?:[A-Za-z0-9]+-[A-Za-z0-9+]+_)+)(?P<suffix>[A-Za-z0-9]+)")
_SESSIONS = re.compile(r"(sub-[A-Za-z0-9+]+)/\1_sessions\.tsv")


@dataclass(frozen=True, slots=True)
class BidsImage:
    """An image and what its name says.

    Attributes:
        path: relative to the study, such as "sub-01/anat/sub-01_run-1_T1w.nii.gz".
        stem: the name without its ending.
        entities: label by key, such as {"sub": "01", "run": "1"}.
        suffix: such as "T1w".
    """

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
    """The files of a study below its folders sub-*.

    Attributes:
        root: folder or URL of the study.
        images: every image with a name of BIDS, by suffix.
        misnamed: paths of images whose names are none, or are those of another folder.
        session_tables: path of its sessions.tsv, by participant_id.
    """

    root: str
    images: Mapping[str, Sequence[BidsImage]]
    misnamed: tuple[str, ...]
    session_tables: Mapping[str, str]

    @classmethod
    def scan(cls, root: str) -> Study:
        """List the files of a study; reads none of them. What is hidden or lies deeper is left out.

        Raises:
            UsageError: there are no folders sub-*.
            OSError: a folder cannot be listed.
        """
        found, session_tables = list[str](), dict[str, str]()
        path = ""
        for path in storage.list_tree(root, "sub-", _DEPTH):
            if stem_of(path) is not None:
                found.append(path)
            elif match := _SESSIONS.fullmatch(path):
                session_tables[match[1]] = path
        if not path:
            raise UsageError(f"{root}: no files in folders sub-*; name the folder of a BIDS dataset")
        images, misnamed = dict[str, list[BidsImage]](), list[str]()
        for path in drop_second_halves(found):
            image = BidsImage.parse(path)
            if image is None:
                misnamed.append(path)
            else:
                images.setdefault(image.suffix, []).append(image)
        return cls(root, images, tuple(sorted(misnamed)), session_tables)


class Records:
    """What the tables of a study say of participants and sessions.

    Args:
        study: whose participants.tsv, and sessions.tsv of participants, are read.
        columns: of them; each must be in one of the tables.
        participants: whose sessions.tsv are of interest.

    Attributes:
        participants: ids in participants.tsv.

    Raises:
        UsageError: no table has one of the columns; or a table is none, or has no ids, or has one twice.
    """

    def __init__(self, study: Study, columns: Collection[str], participants: Collection[str]) -> None:
        self._of_participant = dict[str, dict[str, str]]()
        present = dict[str, None]()
        if storage.exists(path := storage.join(study.root, "participants.tsv")):
            self._of_participant, names = _read_records(path, "participant_id", columns)
            present.update(dict.fromkeys(names))
        self.participants = self._of_participant.keys()
        self._of_session = dict[tuple[str, str], dict[str, str]]()
        for participant in sorted(study.session_tables.keys() & participants):
            path = storage.join(study.root, study.session_tables[participant])
            found, names = _read_records(path, "session_id", columns)
            present.update(dict.fromkeys(names))
            self._of_session |= {(participant, session): cells for session, cells in found.items()}
        for column in columns:
            if column not in present:
                raise UsageError(
                    f"{study.root}: no column {column!r} in participants.tsv or in a sessions.tsv; "
                    f"there are: {', '.join(present) or 'no such tables'}"
                )

    def cell(self, image: BidsImage, column: str) -> str:
        """What is known of an image: of its session, else of its participant, else MISSING."""
        of_session = self._of_session.get((image.participant_id, image.session_id), {})
        of_participant = self._of_participant.get(image.participant_id, {})
        return of_session.get(column, of_participant.get(column, MISSING)) or MISSING


def _read_records(
    path: str, key: str, columns: Collection[str]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Some columns of a table by its key, and the names of all."""
    try:
        table = read_table(path)
    except ManifestError as e:
        raise UsageError(f"{path}: {'; '.join(e.problems)}") from e
    if key not in table.column_names:
        raise UsageError(f"{path}: no column {key!r}, only {', '.join(table.column_names)}")
    cells = table.select([c for c in table.column_names if c in columns]).to_pylist()
    records = dict(zip(table[key].to_pylist(), cells, strict=True))
    if len(records) < len(cells):
        (twice, _), *_ = Counter(table[key].to_pylist()).most_common(1)
        raise UsageError(f"{path}: {key} {twice!r} stands twice; remove one of the rows")
    return records, [name for name in table.column_names if name != key]
