"""Recognizes what a folder of images is, and makes the manifest that it calls for. Reads no image.

A folder is, in this order: a dataset of the Medical Segmentation Decathlon or nnU-Net, a BIDS study, or other
images, of which a table in the folder may be the manifest.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa

from beam_nifti.errors import ManifestError, UsageError
from beam_nifti.manifest.bids import BidsImage, Study
from beam_nifti.manifest.discovery import FoundImages, find_bids_images, list_images, notes_on_content
from beam_nifti.manifest.image_names import drop_second_halves, is_of_macos, stem_of
from beam_nifti.manifest.msd import SPLITS, find_msd_images, read_channels
from beam_nifti.manifest.tables import read_table
from beam_nifti.storage import paths as storage
from beam_nifti.support.cells import is_missing
from beam_nifti.support.strict_json import dump_json
from beam_nifti.support.wording import counted, first_few

_DEPTH: Final = 99  # folders below the one that is searched for images
_SHOWN: Final = 3  # names in a note that concerns many
_TABLES: Final = (".tsv", ".csv", ".jsonl", ".ndjson", ".parquet")
_MASKS: Final = "masks?|(?:d|prob|a)?segs?|segmentations?|labels?|labelmaps?|lesions?|rois?|gt|groundtruth"
_IMAGES: Final = (
    "images?|imgs?|scans?|t1|t1w|t1n|t1c|t1ce|t1gd|t2|t2w|t2f|flair|pd|pdw|dwi|adc|swi|ct|pet|mr|mri"
)
_ROLE_OF_NAME: Final = re.compile(rf"(?:(?P<case>.*)[_.-])?(?P<role>{_MASKS}|{_IMAGES})", re.I | re.S)
_ROLE_OF_FOLDER: Final = re.compile(rf"(?P<role>{_MASKS}|{_IMAGES})(?:Tr|Ts)?", re.I | re.S)
_IS_MASK: Final = re.compile(rf"(?:.*[_.-])?(?:{_MASKS})(?:[_.-].*)?", re.I | re.S)
_MASK_SUFFIX: Final = re.compile("(?:.*mask|dseg|probseg|aseg)", re.I)
_TARGETS: Final = re.compile(r"(?:.*[_.-])?(?:doses?|targets?)(?:[_.-].*)?", re.I | re.S)
_NEARLY_ALL: Final = 0.8  # share of folders that have files of the same names, from which these are columns
_MOST_CLASSES: Final = 20
_RESERVED: Final = frozenset(["path", "split", "participant_id", "session_id", "image_id", "case_id"])
_LABEL_MAPS: Final = ("dseg", "mask")
_IDS: Final = ("image_id", "case_id")
_KEYS: Final = ("participant_id", "session_id")


@dataclass(frozen=True)
class Recognized:
    """A folder of images as a manifest.

    Attributes:
        kind: what the folder is, such as "a BIDS study".
        table: the manifest, with absolute paths; None if `path` is one that exists.
        path: path of a table of the folder that is the manifest; "" if there is none.
        images: columns of images.
        mask: column of masks; "" without masks.
        id_column: column of unique ids that `build` must be told; "" if it finds ids by itself.
        modality: names of the channels or suffixes, if they are known.
        without_mask: images without a mask, by split, if there are masks.
        label_columns: columns that may hold labels, of the manifest if `path` is given, otherwise of the
            tables of a study.
        command: command that writes the manifest again with a label, if there is one.
        notes: what was not used, and why.
        left: what a user should decide, by its name: a comment, and a line to use, "" for none.
        class_folders: folders of several examples each, which may be classes.
    """

    kind: str
    table: pa.Table | None
    path: str = ""
    images: tuple[str, ...] = ("path",)
    mask: str = ""
    id_column: str = ""
    modality: tuple[str, ...] = ()
    without_mask: Mapping[str, int] = field(default_factory=dict)
    label_columns: tuple[str, ...] = ()
    command: str = ""
    notes: tuple[str, ...] = ()
    left: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    class_folders: tuple[str, ...] = ()

    def cells(self, column: str) -> list[str]:
        """The cells of a column of the manifest."""
        table = self.read()
        return list(table[column].to_pylist()) if column in table.column_names else []

    def read(self) -> pa.Table:
        """The manifest."""
        return read_table(self.path) if self.table is None else self.table

    def is_empty(self, column: str) -> bool:
        """Whether a column exists and has no value."""
        return column in self.read().column_names and all(map(is_missing, self.cells(column)))

    def relative_to(self, folder: str) -> pa.Table:
        """The manifest with relative paths of files below a folder."""
        table = self.read()
        for name in (*self.images, *([self.mask] if self.mask else [])):
            paths = [path.removeprefix(f"{folder}/") for path in table[name].to_pylist()]
            table = table.set_column(table.column_names.index(name), name, pa.array(paths, pa.string()))
        return table


def recognize(root: str, out: str) -> Recognized:
    """Recognize a folder.

    Args:
        root: folder or URL.
        out: path of the manifest to be written, for the commands that are shown.

    Raises:
        UsageError: it has no images, or names of images contradict each other.
        ManifestError: its dataset.json does not match its files.
    """
    folder = storage.absolute(root)
    if channels := read_channels(folder):
        return _recognize_msd(folder, channels)
    study = _scan(folder)
    if study is not None and (images := _images_of_study(study)):
        return _recognize_bids(study, images, root, out)
    paths = _list_all(folder)
    if not paths:
        raise UsageError(f"{root}: no images, neither there nor in a folder below; name a folder of images")
    table, notes = _recognize_table(folder, paths, root)
    if table:
        return table
    kept = paths if storage.is_remote(folder) else _drop_links(folder, paths)
    if links := len(paths) - len(kept):
        notes.append(f"not used: {counted(links, 'link')} to files that are there under another name")
    return _recognize_files(folder, kept, [*notes, *_notes_on_twins(folder, kept)])


def _recognize_msd(folder: str, channels: Sequence[str]) -> Recognized:
    found = find_msd_images(folder, "", is_explained=False)
    names = tuple(name for name in found.table.column_names if name not in ("case_id", "split", "mask"))
    has_mask = "mask" in found.table.column_names
    return Recognized(
        "a dataset in the layout of the Decathlon or nnU-Net",
        found.table,
        images=names,
        mask="mask" if has_mask else "",
        id_column="case_id",
        modality=tuple(channels),
        without_mask=_count_empty(found.table, "mask") if has_mask else {},
        notes=found.notes,
    )


def _count_empty(table: pa.Table, mask: str) -> dict[str, int]:
    splits = table["split"].to_pylist() if "split" in table.column_names else ["train"] * table.num_rows
    cells = zip(splits, table[mask].to_pylist(), strict=True)
    counts = Counter(split for split, cell in cells if is_missing(cell))
    return {split: counts[split] for split in sorted(counts, key=lambda name: (name not in SPLITS, name))}


# BIDS


def _scan(folder: str) -> Study | None:
    """The study in a folder; None if it has no files in folders sub-*."""
    if any(name.startswith("sub-") for name in storage.list_folders(folder)):
        with contextlib.suppress(UsageError):
            return Study.scan(folder)
    return None


def _images_of_study(study: Study) -> dict[str, list[BidsImage]]:
    """The images of a study by suffix: those of anat, or of the folder with most images; without masks."""
    by_folder = defaultdict[str, dict[str, list[BidsImage]]](dict)
    for suffix, images in study.images.items():
        for image in images if not _MASK_SUFFIX.fullmatch(suffix) else ():
            by_folder[image.path.split("/")[-2]].setdefault(suffix, []).append(image)

    def rank(name: str) -> tuple[bool, int]:
        return name == "anat", sum(map(len, by_folder[name].values()))

    return by_folder[max(sorted(by_folder), key=rank)] if by_folder else {}


def _recognize_bids(
    study: Study, images: Mapping[str, Sequence[BidsImage]], root: str, out: str
) -> Recognized:
    sessions = {suffix: {image.session for image in found} for suffix, found in images.items()}
    # The first of several images has the voxel grid of the record: T1w, as usual.
    order = sorted(sessions, key=lambda name: (-len(sessions[name]), name != "T1w", name))
    suffixes = [name for name in order if sessions[name] == sessions[order[0]]]
    if any(len(images[name]) > len(sessions[name]) for name in suffixes):
        suffixes = order[:1]
    suffix = ",".join(suffixes)
    has_several = len(images[suffixes[0]]) > len(sessions[suffixes[0]])
    found = find_bids_images(study.root, suffix, "", all_images=has_several)
    masked, flags, notes = _find_masks(study, suffix, found, all_images=has_several)
    if masked is not None:
        found = masked
    command = ["beam-nifti", "manifest", "bids", root, "--suffix", suffix]
    command += ["--all-images"] if has_several else []
    written = ["--out", out, "--overwrite"]
    people = storage.join(root, "participants.tsv")
    columns = _columns_of(storage.join(study.root, "participants.tsv"))
    without_mask = {} if masked is None else _count_empty(found.table, "mask")
    rare = {name: those for name, those in sessions.items() if len(images[name]) == len(those)}
    more = [*(flags if masked and not without_mask else []), *written]
    left = {} if has_several else _rare_suffixes(rare, suffixes, command[:-1], more)
    if masked is None and flags:
        selecting = shlex.join([*command, *flags, *written])
        notes.append(f"init has no --entity; this command has it: {selecting}")
        left["masks"] = ("Masks are not used. This command selects one for each image:", selecting)
    with_label = [*command, *(flags if masked else []), "--label", *columns[:1], *written]
    if without_mask:  # manifest bids skips images without a mask
        target = re.sub(r"(\.\w+)$", r"_labelled\1", out)
        on = ["--on", "participant_id", "--join-columns", f"label={columns[0]}"] if columns else []
        with_label = ["beam-nifti", "manifest", "table", out, "--join", people, *on, "--unmatched", "keep"]
        with_label += ["--out", target]
    return Recognized(
        f"a BIDS study with {' and '.join(suffixes)} images",
        found.table,
        images=tuple(suffixes) if len(suffixes) > 1 else ("path",),
        mask="" if masked is None else "mask",
        id_column="image_id" if has_several else "",
        modality=tuple(suffixes),
        without_mask=without_mask,
        label_columns=tuple(columns),
        command=shlex.join(with_label) if columns else "",
        notes=(*found.notes, *notes),
        left=left,
    )


def _rare_suffixes(
    sessions: Mapping[str, set[tuple[str, str]]],
    suffixes: Sequence[str],
    command: Sequence[str],
    written: Sequence[str],
) -> dict[str, tuple[str, str]]:
    """Suffixes that most sessions have: who lacks them, and the command for a manifest of the others."""
    all_of = sessions[suffixes[0]]
    left = dict[str, tuple[str, str]]()
    for suffix, those in sessions.items():
        lacking = ["_".join(filter(None, session)) for session in sorted(all_of - those)]
        if suffix not in suffixes and 2 * len(lacking) < len(all_of):
            both = [*suffixes, suffix]
            text = (
                f"{suffix} images are not used, because {first_few(lacking, _SHOWN)} "
                f"{'has' if len(lacking) == 1 else 'have'} none. This command writes the manifest of the "
                f"others, for path_column = {dump_json(both)}:"
            )
            left[suffix] = (text, shlex.join([*command, ",".join(both), *written]))
    return left


def _columns_of(path: str) -> list[str]:
    """The columns of a table of participants, besides the ids and empty ones; none if there is no table."""
    if not storage.exists(path):
        return []
    table = read_table(path)
    return [name for name in table.column_names if name not in _KEYS and _num_given(table, name)]


def _find_masks(
    study: Study, suffix: str, found: FoundImages, *, all_images: bool
) -> tuple[FoundImages | None, list[str], list[str]]:
    """The manifest with the masks of most images; its flags; and notes on masks that are not used.

    Without masks, the flags are those for masks of which a user can select some.
    """
    above, notes = storage.join(study.root, "derivatives"), list[str]()
    best, best_flags, ambiguous = FoundImages(found.table.slice(0, 0), ()), list[str](), list[str]()
    places = {"": study}
    for name in storage.list_folders(above):
        if (derivative := _scan(storage.join(above, name))) is not None:
            places[name] = derivative
    for name, place in places.items():
        where = f"derivatives/{name}" if name else "the study"
        for mask in (each for each in _LABEL_MAPS if each in place.images):
            refusal: UsageError | None = None
            flags = ["--mask-suffix", mask, *(["--derivatives", name] if name else [])]
            for entities in ({}, {f"{mask}:space": [""]}):
                try:
                    masked = find_bids_images(
                        study.root,
                        suffix,
                        "",
                        entities=entities,
                        all_images=all_images,
                        mask_suffix=mask,
                        derivatives=name or None,
                    )
                except UsageError as e:
                    refusal = refusal or e
                    continue
                chosen = [*flags, *(f"--entity={key}={labels[0]}" for key, labels in entities.items())]
                if masked.table.num_rows == found.table.num_rows:
                    return masked, chosen, notes
                if masked.table.num_rows > best.table.num_rows:
                    best, best_flags = masked, chosen
                refusal = None
                break
            if refusal:
                if "--entity" in str(refusal):
                    prefix = f"{mask}:" if f"--entity {mask}:" in str(refusal) else ""
                    ambiguous = ambiguous or [*flags, "--entity", f"{prefix}KEY=LABEL"]
                notes.append(f"not used: {mask} images of {where} as masks: {refusal}")
    if not best.table.num_rows:
        return None, ambiguous, notes
    image = suffix.split(",")[0] if "," in suffix else "path"
    masks = dict(zip(best.table[image].to_pylist(), best.table["mask"].to_pylist(), strict=True))
    cells = [masks.get(path, "") for path in found.table[image].to_pylist()]
    table = found.table.append_column("mask", pa.array(cells, pa.string()))
    kept = tuple(note for note in best.notes if not note.endswith(" without a mask"))
    return FoundImages(table, kept), best_flags, notes


# Other images


def _list_all(folder: str) -> list[str]:
    """The paths of all images of a folder, sorted; without hidden ones."""
    try:
        below = [*storage.list_files(folder), *storage.list_tree(folder, "", _DEPTH)]
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UsageError(f"{folder}: no such folder; name a folder of images") from e
    found = [path for path in below if not path.startswith(".") and not is_of_macos(path)]
    paths = [storage.join(folder, path) for path in found if stem_of(path) is not None]
    storage.require_text(paths)
    return drop_second_halves(sorted(paths))


def _drop_links(folder: str, paths: Sequence[str]) -> list[str]:
    """Leave out links to files that are among the paths, and the files of folders that are there twice.

    Links to files elsewhere stay, because those of git-annex lead to one file where images are equal.
    """
    real = {path: os.path.realpath(path) for path in paths}
    place = {  # of the file itself or of its link, in a folder without links
        path: storage.join(os.path.realpath(path.rpartition("/")[0]), path.rpartition("/")[2])
        for path in paths
    }
    root, seen, kept = os.path.realpath(folder), set[str](), list[str]()

    def rank(path: str) -> tuple[bool, bool, str]:
        return real[path] != place[path], place[path] != root + path.removeprefix(folder), path

    for path in sorted(paths, key=rank):
        if not {place[path], real[path]} & seen:
            kept.append(path)
        seen.add(place[path])
    return sorted(kept)


def _notes_on_twins(folder: str, paths: Sequence[str]) -> list[str]:
    """A note on images whose names differ only in the ending, such as .nii and .nii.gz."""
    counts = Counter(map(stem_of, paths))
    twins = [path.removeprefix(f"{folder}/") for path in paths if counts[stem_of(path)] > 1]
    if not twins:
        return []
    shown = first_few(twins, 2 * _SHOWN)
    return [f"same name but for the ending: {shown}; each is an image; remove one if they are the same"]


def _recognize_table(folder: str, paths: Sequence[str], root: str) -> tuple[Recognized | None, list[str]]:
    """The table of the folder that names most of the images by their paths; and notes on the other tables."""
    known, notes = {*paths}, list[str]()
    best = dict[str, tuple[int, pa.Table, list[str]]]()  # number of images, table, columns of paths
    for name in (name for name in storage.list_files(folder) if name.lower().endswith(_TABLES)):
        try:
            table = read_table(storage.join(folder, name))
        except ManifestError as e:
            notes.append(f"not used: {name}: {'; '.join(e.problems)}")
            continue
        named, absent = dict[str, set[str]](), dict[str, list[str]]()
        for column in table.column_names:
            paths_of = _named(table, column, folder)
            if paths_of and paths_of <= known and paths_of not in named.values():
                named[column] = paths_of
            elif paths_of & known and (
                missing := [path for path in sorted(paths_of - known) if not storage.exists(path)]
            ):
                absent[column] = missing
        is_full = any(_num_given(table, column) == table.num_rows for column in named)
        num = len(set[str]().union(*named.values()))
        for column, missing in absent.items():
            shown = first_few([path.removeprefix(f"{folder}/") for path in missing], _SHOWN)
            notes.append(
                f"not used: the column {column} of {name}, which names {counted(len(missing), 'file')} that "
                f"{'is' if len(missing) == 1 else 'are'} not there: {shown}; copy what is missing, or empty "
                "its cells"
            )
        if is_full and 2 * num >= len(known):
            best[name] = (num, table, [*named])
        elif named:
            notes.append(f"not used: {name}, which names {num:,} of {counted(len(known), 'image')}")
        elif not absent:
            notes.append(
                f"not used: {name}, which has no column of paths of images; beam-nifti manifest table adds "
                "its columns by ids"
            )
    if not best:
        return None, notes
    name = max(best, key=lambda each: best[each][0])
    num, table, columns = best[name]
    masks = [column for column in columns if _is_mask(column) or _num_given(table, column) < table.num_rows]
    images = tuple(column for column in columns if column not in masks)
    if not images:  # nothing but masks, which are images then
        images, masks = tuple(columns), []
    notes += [f"not used: {each}, which names images too" for each in best if each != name]
    if num < len(known):
        notes.append(f"not used: {counted(len(known) - num, 'image')} that {name} does not name")
    notes += [
        f"not used: the column {column} of {name}; only the first column of masks is" for column in masks[1:]
    ]
    given = [each for each in table.column_names if _num_given(table, each)]
    others = [each for each in given if each not in (*columns, *_KEYS, *_IDS, "split", "label")]
    found = Recognized(
        f"images that {name} lists",
        None,
        path=storage.join(root, name),
        images=images,
        mask=masks[0] if masks else "",
        id_column=_id_column(table, images[0]),
        modality=images if len(images) > 1 else (),
        without_mask=_count_empty(table, masks[0]) if masks else {},
        label_columns=tuple(others),
        notes=(*notes, *notes_on_content(paths)),
    )
    return found, notes


def _named(table: pa.Table, column: str, folder: str) -> set[str]:
    cells = (text for text in table[column].to_pylist() if not is_missing(text))
    return {storage.join(folder, re.sub(r"^(?:\./)+", "", text)) for text in cells}


def _num_given(table: pa.Table, column: str) -> int:
    return sum(not is_missing(text) for text in table[column].to_pylist())


def _is_mask(name: str) -> bool:
    return _IS_MASK.fullmatch(name) is not None


def _id_column(table: pa.Table, image: str) -> str:
    """The column of ids that a build must be told: the one that has unique ids where its own are not."""
    own = [name for name in _KEYS if name in table.column_names]
    for name in (*_IDS, *([image] if own else [])):
        if name in table.column_names and len(set(table[name].to_pylist())) == table.num_rows:
            ids = {*zip(*(table[each].to_pylist() for each in own), strict=True)}
            return "" if name == image and len(ids) == table.num_rows else name
    return ""


def _recognize_files(folder: str, paths: Sequence[str], notes: Sequence[str]) -> Recognized:
    """Images without a table, several of a case by the words in their names or folders."""
    cases, more = _group_by_folder(folder, paths) or _group(folder, paths)
    notes = [*notes, *more]
    kinds = {tuple(sorted(role for role in of if not _is_mask(role))) for of in cases.values()}
    masks = Counter(role for of in cases.values() for role in of if _is_mask(role))
    if len(kinds) == 1 and any(kinds):
        (roles,) = kinds
        mask = min(masks, key=lambda role: (-masks[role], role), default="")
        unused = [role for role in sorted(masks) if role != mask]
    elif any(kinds):  # cases have different images, so each image is an example
        images = [path for of in cases.values() for role, path in of.items() if not _is_mask(role)]
        cases, roles, mask, unused = {path: {"": path} for path in images}, ("",), "", sorted(masks)
    else:  # nothing but images that are named like masks
        cases, roles, mask, unused = {path: {"": path} for path in paths}, ("",), "", []
    notes += [f"not used: {counted(masks[role], 'mask')} named {role}" for role in unused]
    first = {of[roles[0]]: (case, of) for case, of in cases.items()}
    table = list_images(sorted(first), folder, all_images=None)
    rows = [first[storage.join(folder, path)] for path in table["path"].to_pylist()]
    table = table.drop_columns("path")
    if len(roles) > 1 and "participant_id" not in table.column_names:
        table = table.append_column("case_id", pa.array([case for case, _ in rows], pa.string()))
    tops = Counter(path.removeprefix(f"{folder}/").rpartition("/")[0].partition("/")[0] for path in first)
    is_class = "" not in tops and 1 < len(tops) <= _MOST_CLASSES and min(tops.values()) > 1
    names = tuple(role or "image" for role in roles) if len(roles) > 1 else ("path",)
    for name, role in (*zip(names, roles, strict=True), *([("mask", mask)] if mask else [])):
        table = table.append_column(name, pa.array([of.get(role, "") for _, of in rows], pa.string()))
    return Recognized(
        "a folder of images" + (f" with {' and '.join(names)}" if len(roles) > 1 else ""),
        table,
        images=names,
        mask="mask" if mask else "",
        id_column=next((name for name in _IDS if name in table.column_names), ""),
        modality=roles if len(roles) > 1 else (),
        without_mask=_count_empty(table, "mask") if mask else {},
        notes=(*notes, *notes_on_content(paths)),
        class_folders=tuple(sorted(tops)) if is_class and "participant_id" not in table.column_names else (),
    )


def _group_by_folder(folder: str, paths: Sequence[str]) -> tuple[dict[str, dict[str, str]], list[str]] | None:
    """The images of each folder by their names, if (nearly) all folders have the same; None otherwise.

    Names that differ only in numbers are a series of examples, not the images of a case. Masks may be
    missing.
    """
    cases = defaultdict[str, dict[str, str]](dict)
    for path in paths:
        below = path.removeprefix(f"{folder}/")
        parent, _, name = (stem_of(below) or below).rpartition("/")
        name = name.lower()
        if name in cases[parent] or any(map(_ROLE_OF_FOLDER.fullmatch, parent.split("/"))):
            return None
        cases[parent][name] = path
    counts = Counter(name for of in cases.values() for name in of)
    enough = max(2, math.ceil(_NEARLY_ALL * len(cases)))
    images = {name for name, count in counts.items() if count >= enough and not _is_mask(name)}
    names = images | {name for name, count in counts.items() if count > 1 and _is_mask(name)}
    words = {name if _ROLE_OF_FOLDER.fullmatch(name) else re.sub(r"\d+", "", name) for name in names}
    whole = {case: of for case, of in cases.items() if images <= of.keys()}
    if not images or len(names) < 2 or len(words) < len(names) or names & _RESERVED or len(whole) < enough:
        return None
    lacking = sorted(cases.keys() - whole.keys())
    notes = [
        f"not used: {case or folder}, which has no {' and no '.join(sorted(images - cases[case].keys()))}"
        for case in lacking[:_SHOWN]
    ]
    if len(lacking) > _SHOWN:
        notes.append(f"not used: {counted(len(lacking) - _SHOWN, 'other folder')} without these images")
    others = sorted(path for of in whole.values() for name, path in of.items() if name not in names)
    if others:
        shown = first_few([path.removeprefix(f"{folder}/") for path in others], _SHOWN)
        notes.append(f"not used: {counted(len(others), 'image')} ({shown}) that few folders have")
    return {
        case or folder.rpartition("/")[2]: {n: path for n, path in of.items() if n in names}
        for case, of in whole.items()
    }, notes


def is_target(name: str) -> bool:
    """Whether a column is named like one of images to predict, such as "dose"."""
    return _TARGETS.fullmatch(name) is not None


def _group(folder: str, paths: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The images of each case by their roles, such as t1 and seg; "" is that of a name without such a word.

    The name of a case is the path without these words. An image whose case and role another one has too is
    a case of its own. Masks of no image are noted, unless there are only masks.
    """
    cases = defaultdict[str, dict[str, str]](dict)
    for path in paths:
        below = path.removeprefix(f"{folder}/")
        case, role = _case_of(stem_of(below) or below)
        if role in cases[case or folder.rpartition("/")[2]]:
            case, role = below, ""
        cases[case or folder.rpartition("/")[2]][role] = path
    alone = [case for case, of in cases.items() if all(map(_is_mask, of))]
    if not alone or len(alone) == len(cases):
        return dict(cases), []
    notes = [
        f"not used: the masks of {counted(len(alone), 'case')} ({first_few(alone, _SHOWN)}) without an image"
    ]
    return {case: of for case, of in cases.items() if case not in {*alone}}, notes


def _case_of(stem: str) -> tuple[str, str]:
    """The case and the role of an image by its path without ending.

    >>> _case_of("imagesTr/liver_1"), _case_of("sub-01/sub-01_flair"), _case_of("a/masks/x_t1")
    (('liver_1', 'images'), ('sub-01', 'flair'), ('a/x', 'masks'))
    """
    *folders, name = stem.split("/")
    roles = [match["role"].lower() for match in map(_ROLE_OF_FOLDER.fullmatch, folders) if match]
    kept = [folder for folder in folders if not _ROLE_OF_FOLDER.fullmatch(folder)]
    if match := _ROLE_OF_NAME.fullmatch(name):
        roles.append(match["role"].lower())
        name = match["case"] or ""
    kept += [name] if name and name not in kept[-1:] else []
    role = next(filter(_is_mask, roles), roles[-1] if roles else "")
    return "/".join(kept), role
