"""Volumes that were left out, and why."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from beam_nifti import storage
from beam_nifti.config import Columns
from beam_nifti.errors import ManifestError
from beam_nifti.manifest import Manifest, VolumeRow
from beam_nifti.strict_json import dump_json

_OWN_KEYS: Final = ("row", "stage", "error", "message", "frames")


@dataclass(frozen=True, slots=True)
class Failure:
    """One volume that could not become a record; or an image none of whose frames could.

    Attributes:
        row: its row of the manifest, or that of the image.
        stage: the step that failed, such as "LoadVolume".
        error: the exception's class.
        message: what it said.
    """

    row: VolumeRow
    stage: str
    error: str
    message: str


def write_failures(
    path: str,
    failures: Iterable[Failure],
    folder: str,
    columns: Columns,
    extra_columns: Sequence[str],
) -> None:
    """Write a list of failures: a line an image, which `build` accepts as the manifest of a retry.

    Where ids are anonymous the lines have no paths either, and are the manifest of nothing.

    Args:
        path: where to.
        failures: in any order; written in the manifest's.
        folder: what relative image paths are relative to; the lines hold absolute ones.
        columns: which manifest columns mean what.
        extra_columns: names of the manifest's further columns.
    """
    labels = {column.name for column in columns.labels}
    with storage.create(path) as handle:
        in_order = sorted(failures, key=lambda f: (f.row.row, f.row.position))
        for _, group in itertools.groupby(in_order, key=lambda f: f.row.row):
            of_image = list(group)
            failure = of_image[0]
            row = failure.row
            cells: dict[str, object] = {
                **{_extra_key(c): v for c, v in zip(extra_columns, row.extras, strict=True)},
                "row": row.row,
                "stage": failure.stage,
                "error": failure.error,
                "message": _message(failure) if row.frame is None else _messages(of_image),
                **_frames_cell(of_image),
                **({columns.id: row.image_id} if columns.id is not None else {}),
                **dict(zip(columns.files, _places(row, folder), strict=True)),
                "participant_id": row.participant_id,
                "session_id": row.session_id,
                "split": row.split,
            }
            if not row.participant_id:
                del cells["participant_id"], cells["session_id"]
            if columns.has_label_features:
                # Under the manifest's names, also where one is a key above: it is what a retry reads.
                cells |= {c: v for c, v in zip(extra_columns, row.extras, strict=True) if c in labels}
            elif columns.label is not None:
                cells[columns.label] = row.label
            handle.write(dump_json(cells, ensure_ascii=False).encode() + b"\n")


def _places(row: VolumeRow, folder: str) -> Sequence[str]:
    return row.pseudonyms or [storage.join(folder, path) for path in row.files]


def failed_frames(listed: Manifest, num_frames: int) -> list[Sequence[int]]:
    """Which frames of its image each line of a list of failures is about.

    Args:
        listed: the file, read as a manifest.
        num_frames: of an image.

    Raises:
        ManifestError: a cell is no list of frames.
    """
    if "frames" not in listed.table.column_names:
        return [range(num_frames)] * len(listed)
    cells = listed.table["frames"].to_pylist()
    try:
        return [list(map(int, cell.split(","))) if cell else range(num_frames) for cell in cells]
    except ValueError as e:
        raise ManifestError(listed.path, [f"column frames is no list of numbers: {e}"]) from e


def _frames_cell(failures: Sequence[Failure]) -> dict[str, str]:
    """Which frames of an image failed, where not all of them did and each is a volume."""
    row = failures[0].row
    frames = row.wanted if row.frame is None else [failure.row.frame for failure in failures]
    return {} if frames is None else {"frames": ",".join(map(str, frames))}


def _messages(failures: Sequence[Failure]) -> str:
    """What went wrong with frames of one image, what is alike once."""
    frames: dict[str, list[str]] = {}
    for failure in failures:
        frames.setdefault(_message(failure), []).append(str(failure.row.frame))
    return "; ".join(f"frames {', '.join(numbers)}: {message}" for message, numbers in frames.items())


def _message(failure: Failure) -> str:
    """What the exception said; where ids are anonymous, without the paths of images."""
    row, message = failure.row, failure.message
    named = zip(row.files, row.pseudonyms, strict=False)
    for path, pseudonym in sorted(named, key=lambda pair: -len(pair[0])):  # one may begin like another
        for spelling in (path, quote(path), quote(path, safe="")):  # servers repeat what they were asked for
            message = message.replace(spelling, pseudonym)
    return message


def _extra_key(column: str) -> str:
    """Under which key a further column of the manifest is kept: as in the index, a clash is renamed."""
    return f"manifest_{column}" if column in _OWN_KEYS else column
