"""Volumes that failed, and why."""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.config import Columns
from beam_nifti.errors import DatasetError, FailedVolume, FailureGroup, ManifestError
from beam_nifti.manifest.manifest import Manifest, VolumeRow
from beam_nifti.manifest.reading import read_manifest
from beam_nifti.record.dataset_files import FILE_NAME, read_failures_of
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.storage import paths as storage
from beam_nifti.support.strict_json import dump_json
from beam_nifti.support.wording import one_line

_SHOWN_GROUPS: Final = 5
_SHOWN_NAMES: Final = 3
_SHOWN_LETTERS: Final = 300
_NUMBER: Final = r"(?<![A-Za-z\d])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![A-Za-z\d])"

MAX_FAILED_FRAMES: Final = 1 << 22
"""Most frames of the images in a list, whose lines may cover any number of frames: 1 GB of rows."""

PEOPLE: Final = ("participant_id", "session_id")
"""Columns of a manifest that every list of failures and index has under their own names."""

_OWN_KEYS: Final = ("row", "stage", "error", "message", "frames")


@dataclass(frozen=True, slots=True)
class Failure:
    """One volume that could not become a record; or an image none of whose frames could.

    Attributes:
        row: its row of the manifest, or that of the image.
        stage: step that failed, such as "LoadVolume".
        error: class of the exception.
        message: text of the exception, without names if ids are anonymous.
    """

    row: VolumeRow
    stage: str
    error: str
    message: str


@dataclass(frozen=True, slots=True)
class Absence:
    """Frames that an image does not have, with --max-frames, by their positions in the split."""

    positions: tuple[int, ...]


def group_failures(failures: Iterable[Failure]) -> list[FailureGroup]:
    """The most frequent reasons of failures, at most five."""
    groups = dict[tuple[str, ...], list[_Words]]()
    for failure in sorted(failures, key=lambda f: (f.row.row, f.row.position)):
        words = _Words.of(failure)
        groups.setdefault((failure.stage, failure.error, *words.pieces[::2]), []).append(words)
    found = [_group(of_reason) for of_reason in groups.values()]
    return sorted(found, key=lambda group: -group.num_volumes)[:_SHOWN_GROUPS]


@dataclass(frozen=True, slots=True)
class _Words:
    """The message of a failure, on one line.

    Attributes:
        file: the file at fault, with whose name messages begin; its row if ids are anonymous.
        pieces: the rest of the message; every second one is the name of a file of the row, or a number.
    """

    failure: Failure
    file: str
    pieces: tuple[str, ...]

    @classmethod
    def of(cls, failure: Failure) -> _Words:
        message, row = failure.message, failure.row
        names = sorted(filter(None, {*row.files, *row.pseudonyms}), key=len, reverse=True)
        file = next((name for name in names if message.startswith(f"{name}: ")), "")
        varying = "|".join([*map(re.escape, names), _NUMBER])
        pieces = re.split(f"({varying})", message.removeprefix(f"{file}: "))
        pieces[::2] = (re.sub(r"\s+", " ", piece) for piece in pieces[::2])
        at_fault = f"row {row.row}" if row.pseudonyms else file or row.path
        return cls(failure, at_fault, tuple(pieces))


def _group(failures: Sequence[_Words]) -> FailureGroup:
    first = failures[0]
    columns = zip(*(each.pieces for each in failures), strict=True)
    message = "".join(each[0] if len(set(each)) == 1 else "…" for each in columns).strip()
    files = {each.failure.row.row: each.file for each in reversed(failures)}
    return FailureGroup(
        first.failure.stage,
        first.failure.error,
        message if len(message) <= _SHOWN_LETTERS else f"{message[:_SHOWN_LETTERS]}…",
        sum(len(each.failure.row.positions) for each in failures),
        tuple(files[row] for row in sorted(files)[:_SHOWN_NAMES]),
        len(files),
    )


def format_groups(groups: Sequence[FailureGroup], num_failed: int) -> list[str]:
    """A line for each of the most frequent reasons, and one for those that are not among them."""
    lines = []
    for group in groups:
        more = group.num_images - len(group.examples)
        names = ", ".join(group.examples) + (f" and {more} more" if more else "")
        reason = f"{group.stage} {group.error}: {group.message} ({names})"
        lines.append(f"{group.num_volumes} × {one_line(reason)}")
    others = num_failed - sum(group.num_volumes for group in groups)
    return [*lines, f"{others} × other reasons"] if others else lines


def accepting_fraction(num_failed: int, num_volumes: int) -> str:
    """The least --max-bad-fraction, to two digits, with which a build completes.

    >>> accepting_fraction(12, 400), accepting_fraction(1, 3), accepting_fraction(3, 3)
    ('0.03', '0.34', '1')
    """
    digits = 2
    while num_failed * 10 ** (digits - 1) < num_volumes:
        digits += 1
    rounded = -(-num_failed * 10**digits // num_volumes)
    return f"{rounded / 10**digits:.{digits}f}".rstrip("0").rstrip(".")


def write_failures(
    path: str,
    failures: Iterable[Failure],
    folder: str,
    columns: Columns,
    extra_columns: Sequence[str],
    below: str | None = None,
) -> None:
    """Write a list of failures: a line for each image, which `build` accepts as the manifest of a retry.

    Lines are in the order of the manifest. Their paths, which may be relative to `folder`, become absolute.
    If ids are anonymous, the lines have no paths, and `read_manifest` refuses them.
    """
    labels = {column.name for column in columns.labels}
    own, named = {key: own_key(key, columns) for key in _OWN_KEYS}, _named(columns)
    elsewhere = {*labels, *columns.files}  # are in the line already, the paths made absolute
    keys = {column: _extra_key(column, named) for column in extra_columns if column not in elsewhere}
    with storage.create(path, below) as handle:
        in_order = sorted(failures, key=lambda f: (f.row.row, f.row.position))
        for _, group in itertools.groupby(in_order, key=lambda f: f.row.row):
            of_image = list(group)
            failure = of_image[0]
            row = failure.row
            paths = row.pseudonyms or [path and storage.join(folder, path) for path in row.files]
            cells: dict[str, object] = {
                **{keys[c]: v for c, v in zip(extra_columns, row.extras, strict=True) if c in keys},
                own["row"]: row.row,
                own["stage"]: failure.stage,
                own["error"]: failure.error,
                own["message"]: failure.message if row.frame is None else _messages(of_image),
                **{own[key]: cell for key, cell in _frames_cell(of_image).items()},
                **({columns.id: row.image_id} if columns.id is not None else {}),
                **dict(zip(columns.files, paths, strict=True)),
                "participant_id": row.participant_id,
                "session_id": row.session_id,
                "split": row.split,
            }
            for name in PEOPLE:
                if not cells[name]:
                    del cells[name]
            if columns.has_label_features:
                # Under the manifest's names, which a retry reads.
                cells |= {c: v for c, v in zip(extra_columns, row.extras, strict=True) if c in labels}
            elif columns.label is not None:
                cells[columns.label] = row.label
            handle.write(dump_json(cells, ensure_ascii=False).encode() + b"\n")


def ids_are_paths(columns: Columns, names: Container[str]) -> bool:
    """Whether ids are paths of images, which a list of failures holds with the manifest's folder.

    `names` are the columns of the manifest.
    """
    if columns.id is None:
        return "participant_id" not in names
    return columns.id in columns.files


def listed_cells(listed: Manifest, column: str, manifest: Manifest, folder: str) -> pa.Array | None:
    """A column of the manifest as a list of its failures has it; None if the list lacks it.

    The column is neither of labels nor the split. The list, read as a manifest, holds absolute paths; the
    relative ones were relative to `folder`.
    """
    columns = listed.columns
    is_kept = column in PEOPLE or column in columns.files
    key = column if is_kept else _extra_key(column, _named(columns))
    if key not in listed.table.column_names:
        return None
    cells = listed.table[key].combine_chunks()
    if column not in columns.files:
        return cells
    as_listed = pc.is_in(cells, value_set=manifest.table[column].combine_chunks())
    relative = pa.array([cell.removeprefix(f"{folder}/") for cell in cells.to_pylist()], pa.string())
    return pc.if_else(as_listed, cells, relative)


def failed_frames(listed: Manifest, num_frames: int, clip_frames: int = 1) -> list[Sequence[int]]:
    """Which frames of its image, which has `num_frames`, each line of a list of failures is about.

    If they are clips, of `clip_frames`, the first frame of each.

    Raises:
        ManifestError: a cell is no list of frames, or there are too many.
    """
    cells = own_cells(listed, "frames") or [""] * len(listed)
    if (total := sum(cell.count(",") + 1 if cell else num_frames for cell in cells)) > MAX_FAILED_FRAMES:
        raise ManifestError(listed.path, [f"lists {total} frames, more than {MAX_FAILED_FRAMES}"])
    every = range(0, num_frames * clip_frames, clip_frames)
    try:
        return [list(map(int, cell.split(","))) if cell else every for cell in cells]
    except ValueError as e:
        raise ManifestError(listed.path, [f"column frames is not a list of numbers: {e}"]) from e


def check_failures(content: bytes, path: str, info: DatasetInfo) -> None:
    """Refuse a list of failures that is not that of a dataset.

    Raises:
        DatasetError: it is damaged, or lists another number of failures.
    """
    what = "frames" if info.num_frames else "lines"
    try:
        listed = read_manifest(path, Columns(**info.config["columns"]), content=content, is_list=True)
        clip = info.record_config.clip_frames
        frames = failed_frames(listed, info.num_frames, clip) if info.num_frames else ()
    except ManifestError as e:
        raise DatasetError(f"{path}: {'; '.join(e.problems)}; copy it again") from e
    if (count := sum(map(len, frames)) if info.num_frames else len(listed)) != info.num_failures:
        raise DatasetError(
            f"{path}: has {count} {what}, but {FILE_NAME} gives {info.num_failures} failures; copy it again"
        )


def read_failures(path: str, num_failed: int, columns: Columns, below: str) -> list[FailedVolume]:
    """The rows of a list of failures, which is of `num_failed` volumes."""
    content = read_failures_of(path, num_failed, below)
    listed = read_manifest(path, columns, content=content, is_list=True)
    images = listed.table[columns.paths[0]].to_pylist()
    cells = (own_cells(listed, key) for key in ("row", "stage", "error", "message"))
    return [
        FailedVolume(int(row), example_id, image, stage, error, message)
        for example_id, image, row, stage, error, message in zip(
            listed.ids.to_pylist(), images, *cells, strict=True
        )
    ]


def _frames_cell(failures: Sequence[Failure]) -> dict[str, str]:
    """The frames of an image that failed, if each frame is a volume and not all failed."""
    row = failures[0].row
    frames = row.wanted if row.frame is None else [failure.row.frame for failure in failures]
    return {} if frames is None else {"frames": ",".join(map(str, frames))}


def _messages(failures: Sequence[Failure]) -> str:
    """What went wrong with frames of one image, what is alike once."""
    frames: dict[str, list[str]] = {}
    for failure in failures:
        frames.setdefault(failure.message, []).append(str(failure.row.frame))
    return "; ".join(f"frames {', '.join(numbers)}: {message}" for message, numbers in frames.items())


def own_key(key: str, columns: Columns) -> str:
    """The name of a key of ours: with a prefix if it is that of a column of files, ids or labels."""
    roles = _names_of_roles(columns)
    while key in roles:
        key = f"failure_{key}"
    return key


def own_cells(listed: Manifest, key: str) -> list[str]:
    """The cells of a key of ours in a list of failures; none if it does not have the key."""
    name = own_key(key, listed.columns)
    return listed.table[name].to_pylist() if name in listed.table.column_names else []


def _named(columns: Columns) -> set[str | None]:
    """The keys that further columns cannot have."""
    return {*_names_of_roles(columns), *(own_key(key, columns) for key in _OWN_KEYS)}


def _names_of_roles(columns: Columns) -> set[str | None]:
    return {*columns.files, columns.id, *(column.name for column in columns.labels)}


def _extra_key(column: str, named: Container[str | None]) -> str:
    """Under which key a further column of the manifest is kept: as in the index, a clash is renamed."""
    key = f"manifest_{column}" if column in _OWN_KEYS or column.startswith("manifest_") else column
    while key in named:
        key = f"manifest_{key}"
    return key
