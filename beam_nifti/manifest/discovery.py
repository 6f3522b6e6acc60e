"""Finds the images for a manifest: those of a BIDS study, or of a pattern."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from beam_nifti.errors import UsageError
from beam_nifti.manifest.bids import MISSING, BidsImage, Records, Study
from beam_nifti.manifest.bids_choice import (
    Row,
    counts_text,
    match_masks,
    reason_for_none,
    refuse_several,
    varying,
)
from beam_nifti.manifest.image_names import drop_second_halves, is_of_macos, stem_of
from beam_nifti.manifest.labels import parse_label
from beam_nifti.manifest.lookalikes import find_lookalikes
from beam_nifti.manifest.tables import Problems
from beam_nifti.storage import paths as storage
from beam_nifti.storage.signatures import stand_in
from beam_nifti.support.wording import counted, first_few

_IMAGE_ID: Final = "image_id"
_MASK: Final = "mask"
_OWN: Final = frozenset(["participant_id", "session_id", _IMAGE_ID, "path", "label"])  # not copied
_POINTER_BYTES: Final = 1 << 10  # most bytes of a file that may be a pointer to another one
_SHOWN: Final = 3  # names in a note that concerns many
_PARTICIPANT = re.compile(r"(?:^|[/_])(sub-[A-Za-z0-9+]+)(?=[/_.])")
_SESSION = re.compile(r"(?:^|[/_])(ses-[A-Za-z0-9+]+)(?=[/_.])")


@dataclass(frozen=True)
class FoundImages:
    """A manifest as a table of strings, by participant, session and path, and notes on what was not used."""

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
    mask_suffix: str | None = None,
    derivatives: str | None = None,
) -> FoundImages:
    """The images of a BIDS study, or of one of its derivatives.

    Args:
        root: folder or URL of the study.
        suffix: such as "T1w". Several, such as "T1w,FLAIR", become columns, with one row per session.
        folder: folder of the manifest; paths in it become relative. "" for none.
        entities: labels of the images to select, by key; "" selects images without the key. A key such as
            "FLAIR:run" is for images of that suffix alone, and the only kind for masks.
        label: column of participants.tsv or sessions.tsv with the label. Images without a value are skipped.
        columns: columns of the study's tables to copy.
        all_images: keep several images of a session, and name each in a column `image_id`.
        mask_suffix: suffix of the masks, such as "mask" or "dseg", in a column `mask`. Images without a mask
            are skipped.
        derivatives: where the masks are: a folder of `derivatives`, or a path; None for `root`.

    Raises:
        UsageError: there are no such images, or several per session, or no such column.
        ManifestError: only some of the labels are numbers.
    """
    root = storage.absolute(root)
    suffixes = _suffixes_of(suffix, entities or {}, mask_suffix, derivatives, all_images=all_images)
    own = _OWN | {*(suffixes if len(suffixes) > 1 else ()), *([_MASK] if mask_suffix else ())}
    for name in columns:
        if name in own:
            raise UsageError(f"--column {name}: the manifest has this column already; drop it")
    study = Study.scan(root)
    mask_root = _mask_folder(root, derivatives)
    used = [*suffixes, *([mask_suffix] if mask_suffix and mask_root == root else [])]
    rows, more = _choose_rows(study, suffixes, entities or {}, all_images=all_images)
    notes = [*_notes_on_names(study, suffixes, used), *more]
    masks = list[BidsImage]()
    if mask_suffix is not None:
        of_masks = study if mask_root == root else Study.scan(mask_root)
        chosen = _entities_of(mask_suffix, entities or {}, has_own=True)
        rows, masks, more = match_masks(of_masks, mask_suffix, chosen, rows)
        notes += more
    copied = {**({} if label is None else {"label": label}), **dict(zip(columns, columns, strict=True))}
    cells = dict[str, list[str]]()
    if copied:
        firsts = [row[0] for row in rows]
        records = Records(study, copied.values(), firsts)
        notes += _notes_on_records(records, firsts)
        if label is not None:
            images, more = _with_label(root, firsts, records, label)
            kept = {image.path for image in images}
            masks = [mask for row, mask in zip(rows, masks, strict=False) if row[0].path in kept]
            rows = [row for row in rows if row[0].path in kept]
            notes += more
        cells = {name: [records.cell(row[0], column) for row in rows] for name, column in copied.items()}
    names = ["path"] if len(suffixes) == 1 else suffixes
    files = {
        name: [storage.join(root, row[number].path) for row in rows] for number, name in enumerate(names)
    }
    if masks:
        files[_MASK] = [storage.join(mask_root, mask.path) for mask in masks]
    paths = [path for found in files.values() for path in found]
    storage.require_text(paths)
    notes += notes_on_content(paths)
    table = {"participant_id": [row[0].participant_id for row in rows]}
    if any("ses" in row[0].entities for row in rows):
        table["session_id"] = [row[0].session_id for row in rows]
    if all_images:
        table[_IMAGE_ID] = [row[0].stem for row in rows]
    for name, found in files.items():
        table[name] = [path.removeprefix(folder and f"{folder}/") for path in found]
    table |= cells
    for column, values in _entity_columns(suffixes, rows).items():
        table[f"entity_{column}" if column in own | table.keys() | {"split"} else column] = values
    return FoundImages(pa.table(table), tuple(notes))


def _entity_columns(suffixes: Sequence[str], rows: Sequence[Row]) -> dict[str, list[str]]:
    """The labels of entities that differ between images of a suffix; with several suffixes by SUFFIX_KEY."""
    columns = dict[str, list[str]]()
    for number, name in enumerate(suffixes):
        prefix = f"{name}_" if len(suffixes) > 1 else ""
        found = varying([row[number] for row in rows])
        columns |= {f"{prefix}{key}": values for key, values in found.items()}
    return columns


def _suffixes_of(
    suffix: str,
    entities: Mapping[str, Sequence[str]],
    mask_suffix: str | None,
    derivatives: str | None,
    *,
    all_images: bool,
) -> list[str]:
    """The suffixes of the images; refuses options that do not go together."""
    suffixes = suffix.split(",")
    if "" in suffixes or len({*suffixes, mask_suffix}) <= len(suffixes):
        raise UsageError(
            f"--suffix is {suffix!r}{f', and --mask-suffix {mask_suffix}' if mask_suffix else ''}; name each "
            "suffix once, such as T1w,FLAIR"
        )
    if len(suffixes) > 1 and all_images:
        raise UsageError("--all-images requires a single --suffix, because several have one row per session")
    if derivatives is not None and mask_suffix is None:
        raise UsageError(
            "--derivatives requires --mask-suffix; for images of a derivative, name its folder as DIR"
        )
    for name in suffixes if len(suffixes) > 1 else ():
        if name in _OWN or (name == _MASK and mask_suffix):
            raise UsageError(f"--suffix {name}: the manifest has this column already; make two manifests")
    for key, labels in entities.items():
        of, colon, _ = key.rpartition(":")
        if colon and of not in (*suffixes, mask_suffix):
            raise UsageError(
                f"--entity {key}={labels[0]}: {of!r} is not given with --suffix or --mask-suffix; add it "
                "there, or drop this --entity"
            )
    return suffixes


def _mask_folder(root: str, derivatives: str | None) -> str:
    if derivatives is None:
        return root
    return storage.absolute(
        derivatives if "/" in derivatives else storage.join(root, "derivatives", derivatives)
    )


def _entities_of(
    suffix: str, entities: Mapping[str, Sequence[str]], *, has_own: bool = False
) -> dict[str, Sequence[str]]:
    """The labels for a suffix: those of its own, and those for all images unless it `has_own` alone."""
    found = {} if has_own else {key: labels for key, labels in entities.items() if ":" not in key}
    own = {key.partition(":")[2]: labels for key, labels in entities.items() if key.startswith(f"{suffix}:")}
    return {**found, **own}


def _choose_rows(
    study: Study, suffixes: Sequence[str], entities: Mapping[str, Sequence[str]], *, all_images: bool
) -> tuple[list[Row], list[str]]:
    """The images of each row of the manifest, one of each suffix, and notes on others of these suffixes."""
    by_suffix, notes = list[list[BidsImage]](), list[str]()
    for suffix in suffixes:
        prefix = f"{suffix}:" if len(suffixes) > 1 else ""
        images, more = _choose(study, suffix, _entities_of(suffix, entities), prefix)
        _refuse_same_names(images)
        if not all_images:
            groups = itertools.groupby(images, key=lambda image: image.session)
            refuse_several(study.root, [list(found) for _, found in groups], prefix, has_all=not prefix)
        by_suffix.append(images)
        notes += more
    if len(suffixes) == 1:
        return [(image,) for image in by_suffix[0]], notes
    of_session = [{image.session: image for image in images} for images in by_suffix]
    common = sorted(set(of_session[0]).intersection(*of_session[1:]))
    if not common:
        raise UsageError(f"{study.root}: no session has an image of each of {', '.join(suffixes)}")
    for suffix, found in zip(suffixes, of_session, strict=True):
        lacking = sorted(set[tuple[str, str]]().union(*of_session) - found.keys())
        if lacking:
            names = [f"{participant}_{session}".rstrip("_") for participant, session in lacking]
            notes.append(f"not used: {_named(names, 'session')} without {suffix}")
    return [tuple(found[session] for found in of_session) for session in common], notes


def _choose(
    study: Study, suffix: str, entities: Mapping[str, Sequence[str]], prefix: str
) -> tuple[list[BidsImage], list[str]]:
    """The images of a suffix and of some labels, and notes on the others of the suffix."""
    of_suffix = study.images.get(suffix, ())
    if not of_suffix:
        there = counts_text(study.images) or "none"
        like = [name for name in study.images if name.lower() == suffix.lower()]
        hint = f"; did you mean {like[0]}?" if like else ""
        if not (study.images or like) and study.misplaced:
            hint = f"; {_named(study.misplaced, 'image')} outside the folders of BIDS"
        raise UsageError(f"{study.root}: no {suffix} images; there are: {there}{hint}")
    images = [image for image in of_suffix if image.has(entities)]
    if not images:
        reasons = "; ".join(reason_for_none(key, entities[key], of_suffix, prefix) for key in entities)
        raise UsageError(f"{study.root}: none of the {len(of_suffix)} {suffix} images is selected: {reasons}")
    chosen = sorted(images, key=lambda image: (image.session, image.path))
    return chosen, _notes_on_choice(of_suffix, chosen)


def _refuse_same_names(images: Iterable[BidsImage]) -> None:
    seen = dict[frozenset[tuple[str, str]], BidsImage]()
    for new in images:
        old = seen.setdefault(frozenset(new.entities.items()), new)
        if old is not new:
            raise UsageError(f"{old.path} and {new.path} have the same name; remove or rename one of them")


def _with_label(
    root: str, images: Sequence[BidsImage], records: Records, label: str
) -> tuple[list[BidsImage], list[str]]:
    """The images that have a label, and notes on the others."""
    labelled = [image for image in images if records.cell(image, label) != MISSING]
    if not labelled:
        why = "; ".join(_notes_on_records(records, images)) or f"all values of {label} are missing"
        raise UsageError(f"{root}: none of the {len(images)} images has a value of {label}: {why}")
    texts = [image for image in labelled if not math.isfinite(parse_label(records.cell(image, label)))]
    if 0 < len(texts) < len(labelled):
        problems = Problems(root)
        for image in texts:
            problems.add(
                f"{label} of {image.stem} is {records.cell(image, label)!r}, not a finite float32 "
                "number, and others are numbers; recode it"
            )
        problems.stop()
    return labelled, _notes_on_choice(images, labelled, f" without {label}")


def _notes_on_names(study: Study, suffixes: Sequence[str], used: Sequence[str]) -> list[str]:
    """Notes on all images that cannot be selected; `used` are the suffixes of images and masks."""
    notes = []
    if others := {name: found for name, found in study.images.items() if name not in used}:
        notes.append(f"not used: images of other suffixes: {counts_text(others)}")
    if misnamed := study.misnamed:
        notes.append(
            f"not used: {_named(misnamed, 'image')} with names that do not follow BIDS, or in the folder of "
            "another participant or session"
        )
    if misplaced := study.misplaced:
        notes.append(f"not used: {_named(misplaced, 'image')} outside the folders of BIDS")
    if odd := study.odd_folders:
        notes.append(f"not used: {_named(odd, 'folder')}; folders of participants are named sub-LABEL")
    images = itertools.chain.from_iterable(study.images.get(suffix, ()) for suffix in suffixes)
    names = sorted({image.participant_id for image in images}) + list(study.odd_folders)
    lookalikes = [f"{names[i]} and {names[other]}" for i, other in find_lookalikes(pa.array(names))]
    if lookalikes:
        notes.append(
            f"possibly one participant with two names: {first_few(lookalikes, _SHOWN)}; if so, rename one"
        )
    return notes


def _notes_on_choice(
    images: Sequence[BidsImage], chosen: Sequence[BidsImage], why: str = " excluded by --entity or --session"
) -> list[str]:
    """Notes on images that were not selected, and on participants and sessions without any image."""
    kept = {image.path for image in chosen}
    dropped = [image for image in images if image.path not in kept]
    if not dropped:
        return []
    notes = [f"not used: {_named(sorted(image.stem for image in dropped), 'image')}{why}"]
    participants = {image.participant_id for image in chosen}
    gone = sorted({image.participant_id for image in dropped} - participants)
    if gone:
        notes.append(f"{_named(gone, 'participant')} left with no image")
    left = sorted({image.session for image in dropped} - {image.session for image in chosen})
    rest = [f"{participant}_{session}" for participant, session in left if participant in participants]
    if rest:
        notes.append(f"{_named(rest, 'session')} left with no image")
    return notes


def _notes_on_records(records: Records, images: Iterable[BidsImage]) -> list[str]:
    """Notes on participants and sessions that occur only in names or only in tables."""
    with_images = {image.participant_id for image in images}
    unknown = sorted(with_images - records.participants)
    without = sorted(records.participants - with_images - {""})
    notes = list(records.notes)
    if unknown and records.participants:
        notes.append(f"{_named(unknown, 'participant')} with images, but not in participants.tsv")
    if without:
        notes.append(f"{_named(without, 'participant')} in participants.tsv, but with no such image")
    notes += _notes_on_lookalikes(unknown, without)
    for of_participant, (sessions, known) in itertools.islice(records.rowless.items(), _SHOWN):
        notes.append(
            f"{_named(sessions, 'session')} of {of_participant} with images, but no row in the tables, "
            f"which have {first_few(known, _SHOWN)}"
        )
        notes += _notes_on_lookalikes(sessions, known)
    if len(records.rowless) > _SHOWN:
        notes.append(f"the same of {len(records.rowless) - _SHOWN} other participants")
    if records.imageless:
        names = [f"{of}_{session}" for of, sessions in records.imageless.items() for session in sessions]
        notes.append(f"{_named(names, 'session')} in tables, but with no such image")
    return notes


def _notes_on_lookalikes(of_images: Iterable[str], of_tables: Iterable[str]) -> list[str]:
    """A note on ids that are probably meant to be equal."""
    known = {_bare(name): name for name in of_tables}
    lookalikes = [f"{known[_bare(name)]} for {name}" for name in of_images if _bare(name) in known]
    shown = first_few(lookalikes, _SHOWN)
    note = f"possibly the same id in table and image name: {shown}; ids must match exactly"
    return [note] if lookalikes else []


def _bare(name: str) -> str:
    """An id without case and leading zeros."""
    return re.sub(r"0*(\d+)", lambda match: str(int(match[1])), name.casefold())


def notes_on_content(paths: Sequence[str]) -> list[str]:
    """Name the images that are only pointers, as in a clone of a DataLad repository."""
    found = defaultdict[str, list[str]](list)
    for path in itertools.filterfalse(storage.is_remote, paths):
        what = storage.broken_link(path)
        if what is None and storage.stat(path).size <= _POINTER_BYTES:
            what = stand_in(storage.read(path))
        if what:
            found[what].append(path.rpartition("/")[2])
    return [f"{_named(names, 'image')}: {what}" for what, names in found.items()]


def _named(names: Sequence[str], noun: str) -> str:
    """A count and the first few: `4 images (sub-01_T1w, …)`."""
    return f"{counted(len(names), noun)} ({first_few(names, _SHOWN)})"


def find_matching_images(patterns: Sequence[str], folder: str, *, all_images: bool = False) -> FoundImages:
    """The images whose paths match patterns.

    Args:
        patterns: patterns for `storage.glob`.
        folder: folder of the manifest; paths below it are made relative. "" for none.
        all_images: keep several images of a session, and name each in a column `image_id`.

    Raises:
        UsageError: a pattern matches nothing, or matches other files; only some of the paths name a
            participant; or a session has several images.
    """
    paths = drop_second_halves(sorted({path for pattern in patterns for path in _matches(pattern)}))
    table = list_images(paths, folder, all_images=all_images)
    return FoundImages(table, tuple(notes_on_content(paths)))


def list_images(paths: Sequence[str], folder: str, *, all_images: bool | None = False) -> pa.Table:
    """The manifest of some images, by participant, session and path.

    Args:
        paths: absolute paths, sorted.
        folder: folder of the manifest; paths below it are made relative. "" for none.
        all_images: keep several images of a session, and name each in a column `image_id`; None does so only
            if there are several.

    Raises:
        UsageError: as `find_matching_images`.
    """
    # What each path says last, in its name or in its folders; "" for nothing.
    participants, sessions = (
        [(pattern.findall(path) or [""])[-1] for path in paths] for pattern in (_PARTICIPANT, _SESSION)
    )
    table = dict[str, list[str]]()
    if any(participants):
        _refuse_some(paths, participants)
        table["participant_id"] = participants
        if any(sessions):
            table["session_id"] = sessions
        if all_images is None:
            all_images = len({*zip(participants, sessions, strict=True)}) < len(paths)
        if not all_images:
            _refuse_repeated(paths, participants, sessions)
    found = [path.removeprefix(folder and f"{folder}/") for path in paths]
    if all_images:
        table[_IMAGE_ID] = [stem_of(path) or path for path in found]
    table["path"] = found
    order = [("participant_id", "ascending")] if any(participants) else []
    order += [("session_id", "ascending")] if "session_id" in table else []
    return pa.table(table).sort_by([*order, ("path", "ascending")])


def _matches(pattern: str) -> list[str]:
    paths = [storage.absolute(path) for path in storage.glob(pattern) if not is_of_macos(path)]
    if not paths:
        raise UsageError(f"{pattern}: no file matches")
    others = [path for path in paths if stem_of(path) is None]
    storage.require_text(paths)
    if others:
        raise UsageError(
            f"{pattern}: matches {counted(len(others), 'file')} without an image's ending, such as "
            f"{others[0]}; end the pattern in .nii.gz, for example"
        )
    return paths


def _refuse_some(paths: Sequence[str], participants: Sequence[str]) -> None:
    without = [path for path, participant in zip(paths, participants, strict=True) if not participant]
    if without:
        raise UsageError(
            f"{counted(len(without), 'path', 'do')} not name a participant (sub-), such as {without[0]}; "
            "make two manifests, or a narrower pattern"
        )


def _refuse_repeated(paths: Sequence[str], participants: Sequence[str], sessions: Sequence[str]) -> None:
    groups = defaultdict[tuple[str, str], list[str]](list)
    for path, *session in zip(paths, participants, sessions, strict=True):
        groups[session[0], session[1]].append(path)
    several = [found for found in groups.values() if len(found) > 1]
    if several:
        raise UsageError(
            f"{counted(len(several), 'session', 'have')} several images, such as {several[0][0]} and "
            f"{several[0][1]}; give a narrower pattern, or keep all with --all-images"
        )
