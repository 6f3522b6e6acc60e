"""A manifest from the files that there are: of a BIDS study, or of a pattern."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from beam_nifti import storage
from beam_nifti.bids import MISSING, BidsImage, Records, Study
from beam_nifti.errors import UsageError
from beam_nifti.image_names import drop_second_halves, stem_of
from beam_nifti.labels import parse_label
from beam_nifti.signatures import stand_in
from beam_nifti.tables import Problems

_IMAGE_ID: Final = "image_id"
_OWN: Final = frozenset(["participant_id", "session_id", _IMAGE_ID, "path", "label"])
"""Columns that are not copied from a study's tables."""

_POINTER_BYTES: Final = 1 << 10
"""Most bytes of a file that may be a pointer to another one."""

_SHOWN: Final = 3
"""Names in a note that concerns many."""

_PARTICIPANT = re.compile(r"(?:^|[/_])(sub-[A-Za-z0-9+]+)(?=[/_.])")
_SESSION = re.compile(r"(?:^|[/_])(ses-[A-Za-z0-9+]+)(?=[/_.])")


@dataclass(frozen=True)
class FoundImages:
    """A manifest and what its reader should know of it.

    Attributes:
        table: columns of strings, rows in the order of participants, sessions and paths.
        notes: a sentence on everything that was left out or is not as expected.
    """

    table: pa.Table
    notes: tuple[str, ...]


def find_bids_images(
    root: str,
    suffix: str,
    folder: str,
    *,
    entities: Mapping[str, Sequence[str]] | None = None,
    label: str | None = None,
    columns: Sequence[str] = (),
    all_images: bool = False,
) -> FoundImages:
    """The images of a BIDS study.

    Args:
        root: folder or URL of the study, or of one of its derivatives.
        suffix: such as "T1w".
        folder: that the manifest will be in; paths in it are made relative. "" for none.
        entities: by key, the labels of which an image must have one; "" is an image without the key.
        label: column of participants.tsv, or of the sessions.tsv, that is the label. Images without a
            value there are left out.
        columns: further ones that are copied.
        all_images: keep several images of a session, and name each in a column `image_id`.

    Raises:
        UsageError: there are no such images, or several of a session, or no such column.
        ManifestError: labels that are no numbers.
    """
    root = storage.absolute(root)
    for name in columns:
        if name in _OWN:
            raise UsageError(f"--column {name} is a column of every manifest; a label is chosen with --label")
    study = Study.scan(root)
    images = _choose(study, suffix, entities or {})
    _refuse_same_names(images)
    if not all_images:
        _refuse_several(root, images)
    notes = _notes_on_names(study, suffix)
    copied = dict.fromkeys(columns)
    labels, cells = list[str](), dict[str, list[str]]()
    if label is not None or columns:
        wanted = [*copied, *([label] if label is not None else [])]
        records = Records(study, wanted, {image.participant_id for image in images})
        notes += _notes_on_participants(records, images)
        if label is not None:
            images, more = _with_label(root, images, records, label)
            notes += more
            labels = [records.cell(image, label) for image in images]
        cells = {name: [records.cell(image, name) for image in images] for name in copied}
    paths = [storage.join(root, image.path) for image in images]
    notes += _notes_on_content(paths)
    table = {"participant_id": [image.participant_id for image in images]}
    if any("ses" in image.entities for image in images):
        table["session_id"] = [image.session_id for image in images]
    if all_images:
        table[_IMAGE_ID] = [image.stem for image in images]
    table["path"] = [_relative(path, folder) for path in paths]
    if label is not None:
        table["label"] = labels
    table |= cells
    for key, values in _varying(images).items():
        table[f"entity_{key}" if key in _OWN | table.keys() | {"split"} else key] = values
    return FoundImages(pa.table(table), tuple(notes))


def _choose(study: Study, suffix: str, entities: Mapping[str, Sequence[str]]) -> list[BidsImage]:
    of_suffix = study.images.get(suffix, ())
    if not of_suffix:
        counts = (f"{name} ({len(found)})" for name, found in sorted(study.images.items()))
        raise UsageError(f"{study.root}: no {suffix} images; there are: {', '.join(counts) or 'none'}")
    images = [
        image
        for image in of_suffix
        if all(image.entities.get(key, "") in labels for key, labels in entities.items())
    ]
    if not images:
        found = "; ".join(f"{key} is {_labels(key, of_suffix)}" for key in entities)
        raise UsageError(f"{study.root}: none of {len(of_suffix)} {suffix} images is chosen: {found}")
    return sorted(images, key=lambda image: (image.participant_id, image.session_id, image.path))


def _labels(key: str, images: Iterable[BidsImage]) -> str:
    labels = sorted({image.entities.get(key, "") for image in images})
    return ", ".join(label or "absent" for label in labels)


def _refuse_same_names(images: Iterable[BidsImage]) -> None:
    seen = dict[frozenset[tuple[str, str]], BidsImage]()
    for image in images:
        other = seen.setdefault(frozenset(image.entities.items()), image)
        if other is not image:
            raise UsageError(f"{other.path} and {image.path} have one name; remove or rename one of them")


def _refuse_several(root: str, images: Sequence[BidsImage]) -> None:
    grouped = itertools.groupby(images, key=lambda image: (image.participant_id, image.session_id))
    several = [group for _, found in grouped if len(group := list(found)) > 1]
    if not several:
        return
    differing = sorted({key for group in several for key in _varying(group)})
    among = list(itertools.chain(*several))
    texts = [f"{key} ({_labels(key, among)})" for key in differing]
    example = next(label for image in among if (label := image.entities.get(differing[0])))
    raise UsageError(
        f"{root}: {len(several)} of the participants' sessions have several images, such as "
        f"{several[0][0].path} and {several[0][1].path}; they differ in {', '.join(texts)}. Choose with "
        f"--entity {differing[0]}={example} (or {differing[0]}= for those without), or keep all with "
        "--all-images"
    )


def _varying(images: Sequence[BidsImage]) -> dict[str, list[str]]:
    """Labels of the entities that are not the same for all images, "" for none; without sub and ses."""
    keys = dict.fromkeys(key for image in images for key in image.entities if key not in ("sub", "ses"))
    columns = {key: [image.entities.get(key, "") for image in images] for key in keys}
    return {key: labels for key, labels in columns.items() if len(set(labels)) > 1}


def _with_label(
    root: str, images: Sequence[BidsImage], records: Records, label: str
) -> tuple[list[BidsImage], list[str]]:
    """The images that have one, and a note on the others."""
    problems = Problems(root)
    labelled, unlabelled = list[BidsImage](), list[str]()
    for image in images:
        text = records.cell(image, label)
        if text == MISSING:
            unlabelled.append(image.stem)
            continue
        if not math.isfinite(parse_label(text)):
            problems.add(f"{label} of {image.stem} is {text!r}, not a finite number (of float32); recode it")
        labelled.append(image)
    problems.stop()
    if not labelled:
        raise UsageError(
            f"{root}: none of the {len(images)} images has a value of {label}; does participants.tsv have "
            f"their ids, such as {images[0].participant_id}?"
        )
    return labelled, [f"left out {_named(unlabelled, 'image')} without {label}"] if unlabelled else []


def _notes_on_names(study: Study, suffix: str) -> list[str]:
    misnamed = [path for path in study.misnamed if (stem_of(path) or "").endswith(suffix)]
    note = f"left out {_named(misnamed, 'file')} not named as BIDS has it, or in the folder of another"
    return [note] if misnamed else []


def _notes_on_participants(records: Records, images: Iterable[BidsImage]) -> list[str]:
    with_images = {image.participant_id for image in images}
    notes = []
    if unknown := sorted(with_images - records.participants):
        notes.append(f"{_named(unknown, 'participant')} with images, not in participants.tsv")
    if without := sorted(records.participants - with_images):
        notes.append(f"{_named(without, 'participant')} in participants.tsv, without such an image")
    return notes


def _notes_on_content(paths: Sequence[str]) -> list[str]:
    """Name the images of which only a pointer is here, such as in a clone of a DataLad repository."""
    found = defaultdict[str, list[str]](list)
    for path in paths:
        if not storage.is_remote(path) and (what := _described_stand_in(path)):
            found[what].append(path.rpartition("/")[2])
    return [f"{_named(names, 'image')}: {what}" for what, names in found.items()]


def _described_stand_in(path: str) -> str | None:
    if what := storage.broken_link(path):
        return what
    is_small = storage.stat(path).size <= _POINTER_BYTES
    return stand_in(storage.read(path)) if is_small else None


def _named(names: Sequence[str], noun: str) -> str:
    """A count and the first few: `4 images (sub-01_T1w, …)`."""
    shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'} ({shown})"


def _relative(path: str, folder: str) -> str:
    return path.removeprefix(f"{folder}/") if folder else path


def find_matching_images(patterns: Sequence[str], folder: str, *, all_images: bool = False) -> FoundImages:
    """The images whose paths match patterns.

    Args:
        patterns: as `storage.glob` takes them.
        folder: that the manifest will be in; paths in it are made relative. "" for none.
        all_images: keep several images of a session, and name each in a column `image_id`.

    Raises:
        UsageError: a pattern that nothing matches, or that matches other files, or only some whose paths
            name a participant, or several of one.
    """
    paths = drop_second_halves(sorted({path for pattern in patterns for path in _matches(pattern)}))
    participants, sessions = (_ids(pattern, paths) for pattern in (_PARTICIPANT, _SESSION))
    table = dict[str, list[str]]()
    if any(participants):
        _refuse_some(paths, participants)
        table["participant_id"] = participants
        if any(sessions):
            table["session_id"] = sessions
        if not all_images:
            _refuse_repeated(paths, participants, sessions)
    found = [_relative(path, folder) for path in paths]
    if all_images:
        table[_IMAGE_ID] = [stem_of(path) or path for path in found]
    table["path"] = found
    order = [("participant_id", "ascending")] if any(participants) else []
    order += [("session_id", "ascending")] if "session_id" in table else []
    return FoundImages(
        pa.table(table).sort_by([*order, ("path", "ascending")]), tuple(_notes_on_content(paths))
    )


def _matches(pattern: str) -> list[str]:
    paths = [storage.absolute(path) for path in storage.glob(pattern)]
    if not paths:
        raise UsageError(f"{pattern}: no file matches")
    others = [path for path in paths if stem_of(path) is None]
    if others:
        raise UsageError(
            f"{pattern}: matches {len(others)} files that are no images by their names, such as {others[0]}; "
            "end it as images do, in .nii.gz for example"
        )
    return paths


def _ids(pattern: re.Pattern[str], paths: Iterable[str]) -> list[str]:
    """What each path says last, in its name or in its folders; "" for nothing."""
    return [(pattern.findall(path) or [""])[-1] for path in paths]


def _refuse_some(paths: Sequence[str], participants: Sequence[str]) -> None:
    without = [path for path, participant in zip(paths, participants, strict=True) if not participant]
    if without:
        raise UsageError(
            f"{len(without)} of {len(paths)} paths name no participant (sub-), such as {without[0]}; "
            "make two manifests, or a narrower pattern"
        )


def _refuse_repeated(paths: Sequence[str], participants: Sequence[str], sessions: Sequence[str]) -> None:
    groups = defaultdict[tuple[str, str], list[str]](list)
    for path, *session in zip(paths, participants, sessions, strict=True):
        groups[session[0], session[1]].append(path)
    several = [found for found in groups.values() if len(found) > 1]
    if several:
        raise UsageError(
            f"{len(several)} of the participants' sessions have several images, such as {several[0][0]} and "
            f"{several[0][1]}; give a narrower pattern, or keep all with --all-images"
        )
