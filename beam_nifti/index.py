"""The index: one row per record, saying where it lies and what it was made of.

The same table describes a part file while a build runs and a finished shard afterwards.
Source: docs/format.md, "Index".
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from beam_nifti import storage
from beam_nifti.config import RecordConfig
from beam_nifti.errors import ShardError
from beam_nifti.label_map import labels_of
from beam_nifti.manifest import VolumeRow
from beam_nifti.rescale import Ends, Intensity

if TYPE_CHECKING:
    from beam_nifti.image import Source
    from beam_nifti.volume import Volume

SCHEMA: Final = pa.schema(
    [
        ("example_id", pa.string()),
        ("participant_id", pa.string()),
        ("session_id", pa.string()),
        ("label", pa.float64()),
        ("position", pa.int64()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("row", pa.int64()),
        ("source", pa.string()),
        ("source_sizes", pa.list_(pa.int64())),
        ("source_mtimes", pa.list_(pa.float64())),
        ("source_versions", pa.list_(pa.string())),
        ("source_shape", pa.list_(pa.int64())),
        ("source_affine", pa.list_(pa.float64())),
        ("shape", pa.list_(pa.int64())),
        ("dtype", pa.string()),
        ("zooms", pa.list_(pa.float64())),
        ("affine", pa.list_(pa.float64())),
        ("min", pa.float64()),
        ("max", pa.float64()),
        ("mean", pa.float64()),
        ("std", pa.float64()),
    ]
)
"""Columns of every index; the manifest's further columns follow as strings."""

SOURCE_LISTS: Final = ("source_sizes", "source_mtimes", "source_versions")
"""Columns that have a value for each file of an example."""

_SOURCE_SCHEMA: Final = pa.schema([field for field in SCHEMA if field.name.startswith("source_")])
_SOURCE_SCHEMA_1: Final = pa.schema([("source_size", pa.int64()), ("source_mtime", pa.float64())])
"""What stands in their place in format version 1: the sum of all sizes, and the mean of the images' times,
that of a pair being the mean of its two."""

_ENDS_SCHEMA: Final = pa.schema([("rescale_low", pa.float64()), ("rescale_high", pa.float64())])
"""Columns that stand between them where records have the features of these names."""

_MASK_SCHEMA: Final = pa.schema([("mask_labels", pa.list_(pa.int64()))])
"""Likewise where records have a mask."""

_FRAME_SCHEMA: Final = pa.schema([("frame", pa.int64())])
"""Likewise where each frame of an image became a record."""

_OF_IMAGES: Final = frozenset(["min", "max", "mean", "std", *_ENDS_SCHEMA.names])
"""Columns that are lists, a number an image, where a record has several images."""

OWN_NAMES: Final = frozenset(
    name
    for schema in (SCHEMA, _SOURCE_SCHEMA_1, _ENDS_SCHEMA, _MASK_SCHEMA, _FRAME_SCHEMA)
    for name in schema.names
)

_GROUP_ROWS: Final = 1 << 14
"""Rows that can be read without the others: a work unit's, at most (5 MB)."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """What the index says of one record, but for its place in the file.

    Attributes:
        row: its row of the manifest.
        source: the files that it was made of.
        shape: (X, Y, Z) or (X, Y, Z, T).
        dtype: of the voxels on disk, as `Volume.dtype`.
        zooms: voxel size along each axis.
        affine: 16 numbers, row by row.
        intensities: of each image, in its units.
        ends: what became 0 and 1 of each image, in its units; none where the ranges say it.
        mask_labels: the labels that its mask has, ascending; None where there are no masks.
    """

    row: VolumeRow
    source: Source
    shape: tuple[int, ...]
    dtype: str
    zooms: tuple[float, ...]
    affine: tuple[float, ...]
    intensities: tuple[Intensity, ...]
    ends: tuple[Ends, ...] = ()
    mask_labels: tuple[int, ...] | None = None

    @classmethod
    def of(cls, volume: Volume) -> IndexEntry:
        """The entry of a rescaled volume."""
        return cls(
            row=volume.row,
            source=volume.source,
            shape=volume.voxels.shape,
            dtype=volume.dtype,
            zooms=volume.zooms,
            affine=tuple(volume.affine.ravel().tolist()),
            intensities=volume.intensities,
            ends=volume.ends,
            mask_labels=None if volume.mask is None else tuple(labels_of(volume.mask)),
        )


def file_cells(images: Sequence[Sequence[storage.Stat]], record: RecordConfig) -> dict[str, object]:
    """The part of an index row by which a change of one of its files is noticed.

    Args:
        images: `Source.files`.
        record: configuration of the record.
    """
    files = list(itertools.chain.from_iterable(images))
    sizes = [file.size for file in files]
    if record.format_version == 1:
        mtimes = [sum(file.mtime for file in image) / len(image) for image in images]
        return {"source_size": sum(sizes), "source_mtime": sum(mtimes) / len(mtimes)}
    mtimes, versions = [file.mtime for file in files], [file.version for file in files]
    return dict(zip(SOURCE_LISTS, (sizes, mtimes, versions), strict=True))


def extra_column(name: str) -> str:
    """Under which name the index keeps a further column of the manifest."""
    taken = name in OWN_NAMES or name.startswith("manifest_")
    return f"manifest_{name}" if taken else name


def row_cells(row: VolumeRow, extra_columns: Sequence[str]) -> dict[str, object]:
    """The part of an index row that comes from the manifest."""
    return {
        "example_id": row.example_id,
        "participant_id": row.participant_id,
        "session_id": row.session_id,
        "label": row.label,
        "position": row.position,
        "row": row.row,
        "source": row.source,
        **({} if row.frame is None else {"frame": row.frame}),
        **dict(zip(map(extra_column, extra_columns), row.extras, strict=True)),
    }


def make_table(
    entries: Sequence[tuple[IndexEntry, int, int]], record: RecordConfig, extra_columns: Sequence[str]
) -> pa.Table:
    """The index of some records.

    Args:
        entries: entry, offset and length in bytes, in the order of the file.
        record: their configuration.
        extra_columns: names of the manifest's further columns.
    """
    rows = [
        {
            **row_cells(e.row, extra_columns),
            "offset": offset,
            "length": length,
            **file_cells(e.source.files, record),
            "source_shape": e.source.shape,
            "source_affine": e.source.affine,
            "shape": e.shape,
            "dtype": e.dtype,
            "zooms": e.zooms,
            "affine": e.affine,
            **_of_images([asdict(i) for i in e.intensities], record),
            **_of_images([{"rescale_low": ends.low, "rescale_high": ends.high} for ends in e.ends], record),
            "mask_labels": e.mask_labels,
        }
        for e, offset, length in entries
    ]
    return pa.Table.from_pylist(rows, schema=schema_of(record, extra_columns))


def _of_images(numbers: Sequence[Mapping[str, float]], record: RecordConfig) -> Mapping[str, object]:
    """The cells of what is known of each image."""
    if record.channels is None:
        return next(iter(numbers), {})
    return {name: [of_image[name] for of_image in numbers] for name in next(iter(numbers), {})}


def schema_of(record: RecordConfig, extra_columns: Sequence[str] = ()) -> pa.Schema:
    """The schema of an index.

    Args:
        record: configuration of its records.
        extra_columns: names of the manifest's further columns.
    """
    fields = [*SCHEMA, *(_ENDS_SCHEMA if record.has_ends else ())]
    if record.format_version == 1:
        at = SCHEMA.get_field_index("source_sizes")
        fields[at : at + len(_SOURCE_SCHEMA)] = _SOURCE_SCHEMA_1
    if record.channels is not None:
        fields = [f.with_type(pa.list_(f.type)) if f.name in _OF_IMAGES else f for f in fields]
    fields += _MASK_SCHEMA if record.mask_dtype else ()
    fields += _FRAME_SCHEMA if record.frames == "each" else ()
    return pa.schema([*fields, *((extra_column(c), pa.string()) for c in extra_columns)])


def comparable_sources(table: pa.Table) -> pa.Table:
    """The index with what format versions 1 and 2 both say of an example's files: the sum of their sizes."""
    sizes = "source_sizes" if "source_sizes" in table.column_names else "source_size"
    sums = [np.sum(cell) for cell in table[sizes].to_pylist()]
    of_files = {*_SOURCE_SCHEMA.names, *_SOURCE_SCHEMA_1.names}
    kept = table.select([name for name in table.column_names if name not in of_files])
    return kept.append_column("source_size", pa.array(sums, pa.int64()))


def mask_labels(table: pa.Table) -> set[int]:
    """The labels that the masks of an index's records have."""
    return set(pc.unique(pc.list_flatten(table["mask_labels"])).to_pylist())


def write_index(path: str, table: pa.Table, facts: dict[str, str], below: str | None = None) -> None:
    """Write an index, whole or not at all.

    Args:
        path: where to.
        table: as `make_table` gives it.
        facts: about the file that it describes; kept in the Parquet file's metadata.
        below: as of `storage.create`.
    """
    sink = io.BytesIO()
    schema = table.schema.with_metadata(facts)
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for start in range(0, max(1, table.num_rows), _GROUP_ROWS):
            # In one chunk, as the pages of the file are cut where chunks end.
            group = table.slice(start, _GROUP_ROWS).combine_chunks()
            writer.write_table(group.replace_schema_metadata(facts))
    storage.write(path, sink.getvalue(), below)


def read_index(
    path: str, positions: range | None = None, columns: Sequence[str] | None = None
) -> tuple[pa.Table, dict[str, str]]:
    """An index and the facts about the file that it describes.

    Args:
        path: of the index.
        positions: in whose neighbourhood the records are wanted, with some others; None means all.
        columns: to read, of those that it has; None means all.

    Raises:
        FileNotFoundError: there is none.
        ShardError: the file is no index.
    """
    data = storage.read(path)
    try:
        # By itself, as `read_table` starts threads, which can bring a short process down at its end.
        file = pq.ParquetFile(pa.BufferReader(data))
        groups = [i for i in range(file.num_row_groups) if _is_near(file.metadata.row_group(i), positions)]
        table = file.read_row_groups(groups, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as e:
        raise ShardError(f"{path}: not an index: {e}") from e
    facts = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    return table, facts


def _is_near(group: pq.RowGroupMetaData, positions: range | None) -> bool:
    """Whether some rows of a group may be at these positions."""
    columns = (group.column(i) for i in range(group.num_columns))
    found = next((c.statistics for c in columns if c.path_in_schema == "position"), None)
    if positions is None or found is None or not found.has_min_max:
        return True
    return bool(found.min < positions.stop and found.max >= positions.start)
