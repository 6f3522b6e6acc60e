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

WHOLE_SHARD: Final = -1
"""`VolumeRow.unit` where a shard is a single work unit."""


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
        extras: values of the manifest's extra columns, in the order of `Manifest.extra_columns`.
        shard: file name of the shard that it belongs to.
        unit: number of the work unit in its shard; WHOLE_SHARD where it is the only one.
        other_files: paths of the other images of the example, then of its mask, as in the manifest.
        pseudonyms: what is written in the place of each of its paths; none where those are written.
        labels: name and value of each label that has a feature of its own.
        num_frames: frames of the image, where each becomes a record; None where the image is one.
        wanted: those of them, from 0, whose records are still to be made; None for all.
        frame: the one of them that this record is of; None where it is not of one.
        names: its ids with what is written in the place of each; none where those are written.
        version_key: `Pseudonyms.version_key`; "" where ids are not anonymous.
        extra_columns: names of `extras`; none in a build, whose plan has them.
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

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the images, and of the mask if there is one."""
        return (self.path, *self.other_files)

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
            )
            for i, index in enumerate(indices)
        ]

    def row_of(self, files: Sequence[str]) -> VolumeRow | None:
        """The row of an example by what is written of its files; None where it is none of this manifest's."""
        first, *others = self.columns.files
        is_same = pc.equal(self.table[first], files[0])
        for name, text in zip(others, files[1:], strict=True):
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
        for batch in self.table.slice(0, num_rows).to_batches(max_chunksize=BATCH_ROWS):
            columns = [batch.column(i).to_pylist() for i in range(batch.num_columns)]
            rows = ("\x1f".join(cells) for cells in zip(*columns, strict=True))
            hasher.update(("\x1e" + "\x1e".join(rows)).encode())
        return hasher.hexdigest()
