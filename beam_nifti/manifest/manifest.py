"""A checked manifest, and its rows with their places in the dataset."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.config import Columns, LabelColumn
from beam_nifti.manifest.labels import Labels, LabelValue, number_of
from beam_nifti.manifest.splits import DEFAULT_SPLIT as DEFAULT_SPLIT
from beam_nifti.manifest.tables import BATCH_ROWS
from beam_nifti.storage import paths as storage
from beam_nifti.support import logs

WHOLE_SHARD: Final = -1  # `VolumeRow.unit` if a shard is a single work unit


@dataclass(frozen=True, slots=True)
class VolumeRow:
    """One row of the manifest, with its place in the dataset.

    Attributes:
        row: 1-based number of the row, without the header.
        example_id: unique id of the example.
        path: path of the image, or of the first of several, as in the manifest.
        label: number of its first label; None if missing.
        participant_id: "" if the manifest has none.
        session_id: "" if the manifest has none.
        split: such as "train".
        position: 0-based place in its split; if it has several records, of the first.
        extras: values of the extra columns, in the order of `Manifest.extra_columns`.
        shard: file name of its shard.
        unit: number of its work unit in the shard; WHOLE_SHARD if there is only one.
        other_files: paths of the other images of the example, then of its masks and of its target, as in the
            manifest; "" for a mask that is empty because there is none, and for a target that is missing.
        pseudonyms: pseudonym of each of its paths, if ids are anonymous.
        labels: name and value of each label with a feature of its own.
        num_frames: frames of the image, or clips of frames, if each becomes a record; otherwise None.
        wanted: 0-based frames, or first frames of clips, whose records are still to be built; None for all.
        frame: frame of the record, or first frame of its clip; None if the record is the whole image.
        names: its ids with their pseudonyms, if ids are anonymous.
        version_key: `Pseudonyms.version_key`; "" if ids are not anonymous.
        extra_columns: names of `extras`; empty in a build, whose plan has them.
        columns: roles of the manifest's columns; None in a build, whose plan has them.
        clip_frames: frames of a record, if frames become records.
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
    other_files: tuple[str, ...] = ()
    pseudonyms: tuple[str, ...] = ()
    labels: tuple[tuple[str, LabelValue], ...] = ()
    num_frames: int | None = None
    wanted: tuple[int, ...] | None = None
    frame: int | None = None
    names: tuple[tuple[str, str], ...] = ()
    version_key: str = ""
    extra_columns: tuple[str, ...] = ()
    columns: Columns | None = None
    clip_frames: int = 1

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the images, and of the masks and the target if there are any."""
        return (self.path, *self.other_files)

    @property
    def existing_files(self) -> tuple[str, ...]:
        """Paths of those that are given."""
        return tuple(filter(None, self.files))

    @property
    def source(self) -> str:
        """The written path of the image: a pseudonym if ids are anonymous."""
        return self.pseudonyms[0] if self.pseudonyms else self.path

    @property
    def image_id(self) -> str:
        """The id of the image in the manifest, also if the example is one of its frames."""
        return (
            self.example_id if self.frame is None else self.example_id.removesuffix(frame_id("", self.frame))
        )

    @property
    def frames(self) -> Sequence[int]:
        """Frames, or first frames of clips, of records that are still to be built; 0 for a whole image."""
        step = self.clip_frames
        return range(0, (self.num_frames or 1) * step, step) if self.wanted is None else self.wanted

    def position_of(self, frame: int) -> int:
        """Position, in its split, of the record of a frame, or of a clip that begins with it."""
        return self.position + frame // self.clip_frames

    @property
    def positions(self) -> list[int]:
        """Positions, in their split, of the records that are still to be built."""
        return list(map(self.position_of, self.frames))

    def of_frame(self, frame: int) -> VolumeRow:
        """The row of the record of one frame, or of the clip that begins with it.

        >>> VolumeRow(1, "sub-01", "bold.nii", position=20, num_frames=10).of_frame(3).example_id
        'sub-01_frame-0003'
        """
        return dataclasses.replace(
            self,
            example_id=frame_id(self.example_id, frame),
            position=self.position_of(frame),
            num_frames=None,
            wanted=None,
            frame=frame,
        )

    def records(self) -> list[VolumeRow]:
        """A row for each record that is still to be built, by position."""
        return [self] if self.num_frames is None else [self.of_frame(frame) for frame in self.frames]


def frame_id(image_id: str, frame: int) -> str:
    """The example id of a frame of an image."""
    return f"{image_id}_frame-{frame:04d}"


@dataclass(frozen=True)
class Manifest:
    """A checked manifest, held as Arrow columns (about 100 bytes per row).

    Attributes:
        path: path of its file.
        table: every column as strings, with pseudonyms for ids and paths if ids are anonymous.
        paths: paths of the images, masks and targets, as in the manifest, by column.
        columns: their roles; `label` is None without labels, and has the kinds of labels with own features.
        numbers: values of the feature `label`, float64 of shape (rows,), NaN if missing; None without labels.
        labels: the labels with features of their own.
        ids: example id of each row.
        splits: split of each row; null if it is skipped because it lacks a label or a mask.
        extra_columns: names of the columns that are only kept in the index.
        key_check: `Pseudonyms.check` if ids are anonymous; otherwise None.
        name: written form of `path`: its pseudonym if ids are anonymous.
        names: ids as in the manifest, by column, if ids are anonymous.
        version_key: `Pseudonyms.version_key` if ids are anonymous; otherwise "".
        lacks_label: rows that lack one of the labels; None without labels.
        lacks_mask: rows that lack a mask; None without masks.
        warnings: about suspicious or changed contents.
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
    lacks_mask: npt.NDArray[np.bool_] | None = None
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def folder(self) -> str:
        """What relative image paths are relative to."""
        return storage.dirname(self.path)

    @property
    def num_skipped(self) -> int:
        """Rows that are skipped because they lack a label or a mask."""
        return int(self.splits.null_count)

    @property
    def num_unlabelled(self) -> int:
        """Rows that lack a label and are kept."""
        return self._num_kept(self.lacks_label)

    @property
    def num_unmasked(self) -> int:
        """Rows that lack a mask and are kept."""
        return self._num_kept(self.lacks_mask)

    def _num_kept(self, lacks: npt.NDArray[np.bool_] | None) -> int:
        return 0 if lacks is None else int(np.count_nonzero(lacks[self.kept_rows()]))

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
        clip_frames: int = 1,
    ) -> list[VolumeRow]:
        """The rows at `indices`, whose records have consecutive positions of their split."""
        take = pa.array(indices, pa.int64())
        part = self.table.take(take)

        def by_row(columns: Iterable[Iterable[Any]]) -> list[tuple[Any, ...]]:
            return list(zip(*columns, strict=True)) or [()] * len(indices)

        def cells(*names: str) -> list[tuple[Any, ...]]:
            return by_row(part[name].to_pylist() for name in names)

        def own(name: str) -> list[str]:
            return part[name].to_pylist() if name in part.column_names else [""] * len(indices)

        files = by_row(column.take(take).to_pylist() for column in self.paths.values())
        written = cells(*self.paths) if self.key_check else [()] * len(indices)
        names = by_row(
            zip(column.take(take).to_pylist(), part[name].to_pylist(), strict=True)
            for name, column in self.names.items()
        )
        labels = by_row(
            [(of.column.name, value) for value in of.values.take(take).to_pylist()] for of in self.labels
        )
        ids, splits = self.ids.take(take).to_pylist(), self.splits.take(take).to_pylist()
        participants, sessions = own("participant_id"), own("session_id")
        extras = cells(*self.extra_columns)
        return [
            VolumeRow(
                row=int(index) + 1,
                example_id=ids[i],
                path=files[i][0],
                label=None if self.numbers is None else number_of(float(self.numbers[index])),
                participant_id=participants[i],
                session_id=sessions[i],
                split=splits[i],
                position=first_position + i * (num_frames or 1),
                extras=extras[i],
                shard=shard,
                unit=unit,
                other_files=files[i][1:],
                pseudonyms=written[i],
                labels=labels[i],
                num_frames=num_frames,
                names=names[i],
                version_key=self.version_key,
                clip_frames=clip_frames,
            )
            for i, index in enumerate(indices)
        ]

    def row_of(self, files: Sequence[str]) -> VolumeRow | None:
        """The row of an example with these written paths; None if there is no such row."""
        first, *others = self.columns.files
        is_same = pc.equal(self.table[first], files[0])
        for name, text in zip(others, files[1:], strict=True):
            is_same = pc.and_(is_same, pc.equal(self.table[name], text))
        at = pc.index(is_same, True).as_py()
        return None if at < 0 else self.rows([at])[0]

    def lacks_labels(self, num_rows: int) -> bool:
        """Whether one of the first rows lacks a label."""
        return self.lacks_label is not None and bool(self.lacks_label[:num_rows].any())

    def lacks_masks(self, num_rows: int) -> bool:
        """Whether one of the first rows lacks a mask."""
        return self.lacks_mask is not None and bool(self.lacks_mask[:num_rows].any())

    def log_warnings(self) -> None:
        """Log the warnings, once per command, because a manifest is read several times."""
        for warning in self.warnings:
            logs.LOGGER.warning("%s: %s", self.path, warning)

    def digest(self, num_rows: int | None = None) -> str:
        """sha256 of the column names and the first `num_rows` rows, independent of the file's format."""
        hasher = hashlib.sha256("\x1f".join(self.table.column_names).encode())
        for batch in self.table.slice(0, num_rows).to_batches(max_chunksize=BATCH_ROWS):
            columns = [batch.column(i).to_pylist() for i in range(batch.num_columns)]
            rows = ("\x1f".join(cells) for cells in zip(*columns, strict=True))
            hasher.update(("\x1e" + "\x1e".join(rows)).encode())
        return hasher.hexdigest()
