"""Datasets of the Medical Segmentation Decathlon and of nnU-Net: dataset.json and its folders of images.

Source: http://medicaldecathlon.com; nnU-Net's documentation/dataset_format.md, for versions 1 and 2.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import pyarrow as pa

from beam_nifti.errors import ManifestError, UsageError
from beam_nifti.manifest.discovery import FoundImages, notes_on_content
from beam_nifti.manifest.image_names import is_of_macos, stem_of
from beam_nifti.manifest.tables import BLANKS, MAX_PROBLEMS
from beam_nifti.storage import paths as storage
from beam_nifti.support.strict_json import load_json
from beam_nifti.support.wording import counted, first_few

_MOST_BYTES: Final = 64 << 20  # of dataset.json
_FILE: Final = "dataset.json"
_CASE_ID: Final = "case_id"
_MASK: Final = "mask"
_OWN: Final = frozenset([_CASE_ID, _MASK, "split", "path", "label", "participant_id", "session_id"])
_LISTS: Final = {"training": "train", "validation": "validation", "test": "test"}
"""The lists of dataset.json, and their splits."""

SPLITS: Final = tuple(_LISTS.values())
_FOLDERS: Final = {"train": "Tr", "test": "Ts"}  # imagesTr, labelsTr, imagesTs, labelsTs
_SHOWN: Final = 3  # names in a note that concerns many


@dataclass(frozen=True)
class _Case:
    """An example: the paths of its images, one per channel or one of all, and of its mask; "" without one."""

    case_id: str
    split: str
    images: tuple[str, ...]
    mask: str = ""


class _Files:
    """Which files exist, found by listing each folder once."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._names = dict[str, frozenset[str]]()

    def path_of(self, text: str) -> str:
        """The path that dataset.json writes relative to its folder, or absolute."""
        return storage.join(self.root, re.sub(r"^(?:\./+)+", "", text))

    def names(self, folder: str) -> frozenset[str]:
        """The files of a folder, and links to files that may be absent; without those of macOS."""
        if folder not in self._names:
            found = [*storage.list_files(folder), *storage.list_links(folder)]
            self._names[folder] = frozenset(name for name in found if not name.startswith("."))
        return self._names[folder]

    def has(self, path: str) -> bool:
        """Whether a file exists."""
        return path.rpartition("/")[2] in self.names(storage.dirname(path))


def find_msd_images(
    root: str, folder: str, only: str | None = None, *, is_explained: bool = True
) -> FoundImages:
    """The cases of a dataset of the Decathlon or of nnU-Net, one row each.

    Args:
        root: folder or URL with dataset.json.
        folder: folder of the manifest; paths in it become relative. "" for none.
        only: split whose cases are listed; None for all.
        is_explained: whether the notes have the options with which `build` reads the manifest.

    Returns:
        The columns `case_id`, `split` (not for `only="train"`), `path` (one column per channel if these are
        files of their own) and, if there are masks, `mask`.

    Raises:
        UsageError: there is no dataset.json, or it is none of these datasets.
        ManifestError: files that it lists are missing, or its counts are not those of the files.
    """
    files = _Files(storage.absolute(root))
    content = _read_description(files.root)
    channels = _channels_of(content, files.root)
    problems, notes = list[str](), list[str]()
    if "channel_names" in content and "dataset" not in content:
        cases = list(_cases_in_folders(content, files, len(channels), only, problems, notes))
    else:
        cases = list(_listed_cases(content, files, len(channels), only, problems, notes))
    _require_files(cases, files, problems)
    counts = Counter(case.case_id for case in cases)
    problems += (
        f"{name} is listed {count} times; rename or drop all but one"
        for name, count in counts.items()
        if count > 1
    )
    _compare_counts(content, cases, only, problems)
    if problems:
        more = ["(and more)"] if len(problems) > MAX_PROBLEMS else []
        path = storage.join(files.root, _FILE)
        raise ManifestError(path, [*problems[:MAX_PROBLEMS], *more], "does not match the files")
    if not cases:
        where = f"{files.root}: no cases"
        if only:
            raise UsageError(f"{where} of the split {only}; drop --only, or choose another split")
        raise UsageError(f"{where}; name the folder of one dataset")
    cases.sort(key=lambda case: (SPLITS.index(case.split), case.case_id))
    # Cases of "train" alone go there without a column, which would forbid to draw splits.
    table = _table_of(cases, channels, folder, has_split=only != "train")
    notes += notes_on_content([path for case in cases for path in (*case.images, case.mask) if path])
    if labels := _labels_text(content.get("labels")):
        notes.append(f"labels of the masks: {labels}")
    if is_explained:
        notes += _notes_on_use(cases, channels, table.column_names)
    return FoundImages(table, tuple(notes))


def read_channels(root: str) -> list[str] | None:
    """The names of the channels of a dataset; None if the folder has no dataset.json with channels.

    Raises:
        UsageError: dataset.json is damaged.
    """
    if not storage.exists(storage.join(root, _FILE)):
        return None
    content = _read_description(root)
    return _channels_of(content, root) if content.keys() & {"channel_names", "modality"} else None


def _read_description(root: str) -> Mapping[str, Any]:
    path = storage.join(root, _FILE)
    try:
        content = load_json(
            storage.read_bounded(path, _MOST_BYTES).removeprefix(b"\xef\xbb\xbf"), is_modest=True
        )
    except FileNotFoundError as e:
        reason = storage.broken_link(path) or "no such file; name the folder of one dataset"
        raise UsageError(f"{path}: {reason}") from e
    except (storage.FileTooLargeError, ValueError) as e:
        raise UsageError(f"{path}: cannot be read as JSON: {e}") from e
    if not isinstance(content, dict):
        raise UsageError(f"{path}: is not a JSON object")
    return content


def _channels_of(content: Mapping[str, Any], root: str) -> list[str]:
    """The names of the channels, in their order."""
    key = "channel_names" if "channel_names" in content else "modality"
    names = content.get(key)
    keys = [str(number) for number in range(len(names))] if isinstance(names, dict) else []
    if not isinstance(names, dict) or not names or names.keys() != {*keys}:
        raise UsageError(
            f"{root}/{_FILE}: {key} is {names!r}, expected the names of the channels by number, such as "
            '{"0": "T1w", "1": "FLAIR"}; every dataset of the Decathlon or nnU-Net has them'
        )
    return [str(names[number]) for number in keys]


def _cases_in_folders(
    content: Mapping[str, Any],
    files: _Files,
    num_channels: int,
    only: str | None,
    problems: list[str],
    notes: list[str],
) -> Iterator[_Case]:
    """The cases of nnU-Net 2, whose files are named CASE_NNNN by their channels."""
    ending = content.get("file_ending")
    if not isinstance(ending, str) or stem_of(f"x{ending}") is None:
        raise UsageError(
            f"{files.root}/{_FILE}: file_ending is {ending!r}, expected that of an image, such as .nii.gz; "
            "convert the images"
        )
    pattern = re.compile(rf"(?P<case>.+)_(?P<channel>[0-9]{{4}}){re.escape(ending)}", re.S)
    for split, part in _FOLDERS.items():
        if only not in (None, split):
            continue
        images, masks = f"{files.root}/images{part}", f"{files.root}/labels{part}"
        found = {name: pattern.fullmatch(name) for name in sorted(files.names(images))}
        others = [name for name, match in found.items() if match is None]
        if others:
            names = first_few(others, _SHOWN)
            notes.append(
                f"not used: {counted(len(others), 'file')} of images{part} ({names}) with names other than "
                f"CASE_0000{ending}"
            )
        ids = sorted({match["case"] for match in found.values() if match})
        for match in filter(None, found.values()):
            if int(match["channel"]) >= num_channels:
                problems.append(f"images{part}/{match[0]} is of a channel that channel_names does not name")
        for name in ids:
            paths = tuple(f"{images}/{name}_{number:04d}{ending}" for number in range(num_channels))
            mask = f"{masks}/{name}{ending}"
            yield _Case(name, split, paths, mask if split == "train" or files.has(mask) else "")
        unused = sorted(files.names(masks) - {f"{name}{ending}" for name in ids})
        if unused:
            names = first_few(unused, _SHOWN)
            notes.append(f"not used: {counted(len(unused), 'file')} of labels{part} ({names}) without images")


def _listed_cases(
    content: Mapping[str, Any],
    files: _Files,
    num_channels: int,
    only: str | None,
    problems: list[str],
    notes: list[str],
) -> Iterator[_Case]:
    """The cases that dataset.json lists: those of the Decathlon, of nnU-Net 1, and `dataset` of nnU-Net 2."""
    where = f"{files.root}/{_FILE}"
    by_macos, listed = list[str](), list[_Case]()
    entries: list[tuple[str, str, Any]] = []
    if isinstance(found := content.get("dataset", {}), dict):
        entries += (("train", str(name), entry) for name, entry in found.items())
    for key, split in _LISTS.items():
        values = content.get(key, [])
        if not isinstance(values, list):
            raise UsageError(f"{where}: {key} is not a list of cases")
        entries += ((split, "", entry) for entry in values)
    for split, name, entry in entries:
        if only not in (None, split):
            continue
        images, mask = _paths_of(entry, where)
        if is_of_macos(images[0]):
            by_macos.append(images[0])
            continue
        first = stem_of(images[0].rpartition("/")[2])
        if first is None:
            problems.append(f"{images[0]} does not have the ending of an image; convert it")
            continue
        listed.append(
            _Case(name or first, split, tuple(map(files.path_of, images)), mask and files.path_of(mask))
        )
    if by_macos:
        notes.append(f"not used: {counted(len(by_macos), 'file')} of macOS ({first_few(by_macos, _SHOWN)})")
    named = "dataset" in content
    is_version_1 = not named and any(
        not files.has(case.images[0]) and files.has(_of_channel(case.images[0], 0)) for case in listed
    )
    for case in listed:
        if is_version_1 and len(case.images) == 1:
            paths = tuple(_of_channel(case.images[0], number) for number in range(num_channels))
            case = replace(case, images=paths)
        if len(case.images) not in ((num_channels,) if named or is_version_1 else (1, num_channels)):
            problems.append(
                f"{case.case_id} has {counted(len(case.images), 'image')} for {num_channels} channels"
            )
            continue
        yield case
    _note_unlisted(listed, files, by_macos, num_channels if is_version_1 else 0, notes)


def _note_unlisted(
    listed: Iterable[_Case], files: _Files, by_macos: Sequence[str], num_channels: int, notes: list[str]
) -> None:
    """Note the files in the folders of listed images that are not listed."""
    paths = {path for case in listed for path in case.images}
    paths |= {_of_channel(path, number) for path in paths for number in range(num_channels)}
    for folder in sorted({storage.dirname(path) for path in paths}):
        names = [name for name in sorted(files.names(folder)) if f"{folder}/{name}" not in paths]
        if others := [name for name in names if stem_of(name) is not None]:
            short = folder.rpartition("/")[2]
            notes.append(
                f"not used: {counted(len(others), 'image')} of {short} ({first_few(others, _SHOWN)}) that "
                f"{_FILE} does not list"
            )


def _of_channel(path: str, number: int) -> str:
    stem = stem_of(path) or path
    return f"{stem}_{number:04d}{path[len(stem) :]}"


def _paths_of(entry: Any, where: str) -> tuple[list[str], str]:
    """The images and the mask of an entry of dataset.json; "" without a mask."""
    if isinstance(entry, str):
        return [entry], ""
    if isinstance(entry, dict):
        images, mask = entry.get("image", entry.get("images")), entry.get("label") or ""
        paths = [images] if isinstance(images, str) else images if isinstance(images, list) else []
        if paths and all(isinstance(path, str) for path in (*paths, mask)):
            return paths, mask
    raise UsageError(f"{where}: a case is {entry!r}, expected a path, or an object with image and label")


def _require_files(cases: Iterable[_Case], files: _Files, problems: list[str]) -> None:
    for case in cases:
        for path in (*case.images, case.mask):
            if path and not files.has(path):
                what = "image" if path in case.images else "mask"
                shown = path.removeprefix(f"{files.root}/")
                problems.append(f"{what} of {case.case_id} is missing: {shown}; copy it, or drop the case")


def _compare_counts(
    content: Mapping[str, Any], cases: Sequence[_Case], only: str | None, problems: list[str]
) -> None:
    """Compare numTraining with the cases: a folder that was copied in part has fewer."""
    stated, found = content.get("numTraining"), sum(case.split == "train" for case in cases)
    if only in (None, "train") and stated is not None and stated != found and not problems:
        problems.append(
            f"numTraining is {stated}, but there are {counted(found, 'training case')}; correct it"
        )


def _table_of(cases: Sequence[_Case], channels: Sequence[str], folder: str, *, has_split: bool) -> pa.Table:
    columns = _column_names(channels) if len(cases[0].images) > 1 else ["path"]
    paths = [path for case in cases for path in (*case.images, case.mask)]
    storage.require_text(paths)

    def relative(path: str) -> str:
        return path.removeprefix(folder and f"{folder}/")

    table = {_CASE_ID: [case.case_id for case in cases]}
    if has_split:
        table["split"] = [case.split for case in cases]
    for number, name in enumerate(columns):
        table[name] = [relative(case.images[number]) for case in cases]
    if any(case.mask for case in cases):
        table[_MASK] = [relative(case.mask) for case in cases]
    return pa.table(table)


def _column_names(channels: Sequence[str]) -> list[str]:
    """Names of columns: those of the channels, with their numbers where they are not unique.

    >>> _column_names(["T1w", "T2 (fat, sat)", "CT", "ct"])
    ['T1w', 'T2_(fat_sat)', 'CT_0002', 'ct_0003']
    """
    bare = [re.sub(rf"[{BLANKS},:\"'\0]+", "_", name.strip(BLANKS)) for name in channels]
    counts = Counter(name.casefold() for name in (*bare, *_OWN))
    names = [
        name if name and counts[name.casefold()] == 1 else f"{name or 'channel'}_{number:04d}"
        for number, name in enumerate(bare)
    ]
    if len({name.casefold() for name in names}) < len(names):
        return [f"channel_{number:04d}" for number in range(len(channels))]
    return names


def _notes_on_use(cases: Sequence[_Case], channels: Sequence[str], columns: Sequence[str]) -> Iterator[str]:
    """Notes on the options with which `build` reads the manifest."""
    images = [name for name in columns if name not in (_CASE_ID, "split", _MASK)]
    flags = [f"--id-column {_CASE_ID}"]
    flags += [f"--path-column {','.join(images)}"] if images != ["path"] else []
    flags += [f"--mask-column {_MASK}"] if _MASK in columns else []
    if images == ["path"] and len(channels) > 1:
        flags.append("--frames all")
        yield f"the channels of an image are {', '.join(channels)}, according to {_FILE}"
    yield f"build the manifest with {' '.join(flags)}"
    without = Counter(case.split for case in cases if not case.mask)
    if _MASK in columns and without:
        texts = [f"{counted(count, 'case')} of {split}" for split, count in without.items()]
        yield (
            f"{' and '.join(texts)} without a mask: build with --missing-mask empty or skip, or list the "
            "training cases alone with --only train"
        )


def _labels_text(labels: Any) -> str:
    """The labels and their numbers.

    >>> _labels_text({"0": "background", "1": "tumour"})  # of the Decathlon
    '0 background, 1 tumour'
    >>> _labels_text({"background": 0, "whole tumour": [1, 2]})  # of nnU-Net, with a region
    '0 background, 1+2 whole tumour'
    """
    if not isinstance(labels, dict):
        return ""
    texts = list[str]()
    for name, value in labels.items():
        if isinstance(value, str):
            texts.append(f"{name} {value}")
        else:
            numbers = value if isinstance(value, list) else [value]
            texts.append(f"{'+'.join(map(str, numbers))} {name}")
    return ", ".join(texts)
