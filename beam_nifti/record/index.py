"""The index: one row per record, with its offset in the shard and what it was made of.

The same table describes a part file while a build runs and a finished shard afterwards.
Source: docs/format.md, "Index".
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from beam_nifti.config import RecordConfig
from beam_nifti.errors import ShardError
from beam_nifti.manifest.manifest import VolumeRow
from beam_nifti.manifest.pseudonyms import hash_version
from beam_nifti.record.dataset_files import FILE_NAME
from beam_nifti.record.dataset_info import LEAST_RECORD_BYTES
from beam_nifti.storage import paths as storage
from beam_nifti.support.parquet_headers import read_bounded, require_schema
from beam_nifti.volume.label_map import labels_of, positions_of
from beam_nifti.volume.rescale import NO_SCALING, Intensity, RescaleRange, Scaling

if TYPE_CHECKING:
    from beam_nifti.volume.files import Source
    from beam_nifti.volume.volume import Volume

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
"""Columns of every index; the manifest's extra columns follow as strings."""

SOURCE_LISTS: Final = ("source_sizes", "source_mtimes", "source_versions")
"""Columns that have a value for each file of an example."""

_SOURCE_SCHEMA: Final = pa.schema([field for field in SCHEMA if field.name.startswith("source_")])
_SOURCE_SCHEMA_1: Final = pa.schema([("source_size", pa.int64()), ("source_mtime", pa.float64())])
"""Columns that format version 1, and what was converted from it, have instead: the sum of all sizes, and the
mean time of the images. The time of a pair is the mean of its two files."""

SOURCE_SUMS: Final = tuple(_SOURCE_SCHEMA_1.names)
"""The names of these columns."""

_MEMBERS_SCHEMA: Final = pa.schema([("member_lengths", pa.list_(pa.uint32()))])
"""Column that follows if records are cut: the bytes of each member, which add up to the record's length."""

_SCALING_SCHEMA: Final = pa.schema([("scl_slope", pa.float64()), ("scl_inter", pa.float64())])
"""Columns that follow if voxels are native too; empty if the header does not scale."""

_RANGE_SCHEMA: Final = pa.schema([("rescale_low", pa.float64()), ("rescale_high", pa.float64())])
"""Columns that follow if records have the features of these names."""

_MASK_SCHEMA: Final = pa.schema([("mask_labels", pa.list_(pa.int64()))])
"""Column that follows if records have a mask."""

_POSITIONS_SCHEMA: Final = pa.schema([("mask_positions", pa.list_(pa.int32()))])
"""Column that follows if records have a mask, unless an earlier version built the dataset."""

_NONFINITE_SCHEMA: Final = pa.schema([("num_nonfinite", pa.int64())])
"""Column that follows if NaN and infinite voxels were replaced."""

_MAPPED_SCHEMA: Final = pa.schema([("mapped_labels", pa.list_(pa.int64()))])
"""Column that follows if labels of masks were mapped to others."""

_TARGET_SCHEMA: Final = pa.schema(
    [(f"target_{name}", pa.float64()) for name in ("min", "max", "mean", "std")]
)
"""Columns that follow if records have a target."""

_TARGET_NONFINITE_SCHEMA: Final = pa.schema([("target_nonfinite", pa.int64())])
"""Column that follows if records have a target, of which NaN and infinite voxels were replaced."""

_FRAME_SCHEMA: Final = pa.schema([("frame", pa.int64())])
"""Column that follows if each frame of an image became a record."""

OF_IMAGES: Final = frozenset(["min", "max", "mean", "std", *_RANGE_SCHEMA.names, *_NONFINITE_SCHEMA.names])
"""Columns that are lists, one number per image, if a record has several images."""

OWN_NAMES: Final = frozenset(
    name
    for schema in (
        *(SCHEMA, _SOURCE_SCHEMA_1, _MEMBERS_SCHEMA, _SCALING_SCHEMA),
        *(_RANGE_SCHEMA, _MASK_SCHEMA, _POSITIONS_SCHEMA, _FRAME_SCHEMA),
        *(_NONFINITE_SCHEMA, _MAPPED_SCHEMA, _TARGET_SCHEMA, _TARGET_NONFINITE_SCHEMA),
    )
    for name in schema.names
)

_UNREPEATED: Final = ("member_lengths", "mask_positions")
"""Lists of numbers that hardly repeat: a Parquet dictionary of them would add a third to their bytes."""

_GROUP_ROWS: Final = 1 << 14
"""Rows of a group, which is read without the others: at most a work unit's (5 MB)."""

_FREE_BYTES: Final = 64 << 20
_FREE_ROWS: Final = 1000
_ROW_BYTES: Final = 64 << 10
_FILE_GROWTH: Final = 256
_DATA_GROWTH: Final = 16
"""Limits of an index: bytes of its file, in all and per row; bytes in memory, in all and as multiples of the
bytes of its file and of its records; and rows beyond which each must have a byte of its file."""

_MOST_FILE_BYTES: Final = 1 << 29
_MOST_BYTES: Final = 1 << 31
"""Limits for any number of records, as a sparse file may claim any size. All indexes of a dataset share them,
besides what their own files allow."""

_DEEPEST: Final = 4
"""Levels of its schema. A list has three below the root: the column, the repeated group, and the value."""

_MOST_FOOTER_VALUES: Final = 1 << 20
"""Values in its footer, which has about 20 for each column of a group of rows."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of an index that anybody may have written.

    Attributes:
        num_rows: the most rows that it may have.
        data_bytes: size of the file that it describes; 0 if there is no such file.
        num_indexes: number of indexes of its dataset: readers hold all, so each has a part of the memory.
    """

    num_rows: int
    data_bytes: int
    num_indexes: int = 1

    @classmethod
    def of_data(cls, path: str, below: str) -> Limits:
        """The limits of the index of a file of records.

        Args:
            path: path of the file.
            below: same as for `storage.create`.

        Raises:
            FileNotFoundError: the file is not there.
            OSError: it cannot be reached.
        """
        size = storage.stat(path, below).size
        return cls(size // LEAST_RECORD_BYTES, size)

    def require_rows(self, metadata: pq.FileMetaData, file_bytes: int) -> None:
        """Refuse an index that has more rows than an index of so many bytes can have.

        Raises:
            ShardError: it has more.
        """
        groups = map(metadata.row_group, range(metadata.num_row_groups))
        num_rows = max(metadata.num_rows, sum(group.num_rows for group in groups))
        if num_rows > min(self.num_rows, _FREE_ROWS + file_bytes):
            raise ShardError(f"has {num_rows:,} rows, but can have {self.num_rows:,}")

    def most_bytes(self, file_bytes: int) -> int:
        """The most bytes of memory that the values of an index of so many bytes may take."""
        of_data = min(
            _FREE_BYTES // self.num_indexes + _DATA_GROWTH * self.data_bytes, _MOST_BYTES // self.num_indexes
        )
        return min(of_data + _FILE_GROWTH * file_bytes, _MOST_BYTES)


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """The index's row for one record, without its offset in the file.

    Attributes:
        row: the record's row of the manifest.
        source: the files that the record was made of.
        shape: (X, Y, Z) or (X, Y, Z, T).
        dtype: dtype of the voxels on disk, as `Volume.dtype`.
        zooms: voxel size along each axis.
        affine: 16 numbers, row by row.
        intensities: statistics of each image, in its units.
        rescale_ranges: intensities of each image that became 0 and 1; empty if they are its range.
        mask_labels: labels of the mask, ascending; None if there are no masks.
        mask_positions: some voxels of each label, as `positions_of` gives them; None if there are no masks.
        scaling: scaling of native voxels to the image's units.
        num_nonfinite, mapped_labels, target_intensity, target_nonfinite: as of `Volume`.
    """

    row: VolumeRow
    source: Source
    shape: tuple[int, ...]
    dtype: str
    zooms: tuple[float, ...]
    affine: tuple[float, ...]
    intensities: tuple[Intensity, ...]
    rescale_ranges: tuple[RescaleRange, ...] = ()
    mask_labels: tuple[int, ...] | None = None
    mask_positions: tuple[int, ...] | None = None
    scaling: Scaling = NO_SCALING
    num_nonfinite: tuple[int, ...] = ()
    mapped_labels: tuple[int, ...] | None = None
    target_intensity: Intensity | None = None
    target_nonfinite: int = 0

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
            rescale_ranges=volume.rescale_ranges,
            mask_labels=None if volume.mask is None else tuple(labels_of(volume.mask)),
            mask_positions=None if volume.mask is None else tuple(positions_of(volume.mask)),
            scaling=volume.scaling,
            num_nonfinite=volume.num_nonfinite,
            mapped_labels=volume.mapped_labels,
            target_intensity=volume.target_intensity,
            target_nonfinite=volume.target_nonfinite,
        )


def file_cells(
    images: Sequence[Sequence[storage.Stat]], record: RecordConfig, version_key: str
) -> dict[str, object]:
    """The part of an index row that shows whether one of the record's files has changed."""
    files = list(itertools.chain.from_iterable(images))
    sizes = [file.size for file in files]
    if not record.has_sources:
        mtimes = [sum(file.mtime for file in image) / len(image) for image in images]
        return {"source_size": sum(sizes), "source_mtime": sum(mtimes) / len(mtimes)}
    mtimes = [file.mtime for file in files]
    versions = [hash_version(file.version, version_key) for file in files]
    return dict(zip(SOURCE_LISTS, (sizes, mtimes, versions), strict=True))


def extra_column(name: str) -> str:
    """The name of an extra column of the manifest in the index."""
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
    entries: Sequence[tuple[IndexEntry, int, Sequence[int]]],
    record: RecordConfig,
    extra_columns: Sequence[str],
) -> pa.Table:
    """The index of some records.

    Args:
        entries: entry, offset and bytes of each member of each record, in the order of the file.
        record: configuration of the records.
        extra_columns: names of the manifest's extra columns.
    """
    rows = [
        entry_cells(entry, record, extra_columns)
        | {"offset": offset, "length": sum(lengths), "member_lengths": lengths}
        for entry, offset, lengths in entries
    ]
    return pa.Table.from_pylist(rows, schema=schema_of(record, extra_columns))


def entry_cells(
    entry: IndexEntry, record: RecordConfig, extra_columns: Sequence[str] = ()
) -> dict[str, object]:
    """The row of an index, without the offset in the file.

    Args:
        entry: entry of the record.
        record: configuration of the record.
        extra_columns: names of the manifest's extra columns.
    """
    row = entry.row
    return {
        **row_cells(row, extra_columns),
        **file_cells(entry.source.files, record, row.version_key),
        "source_shape": entry.source.shape,
        "source_affine": entry.source.affine,
        "shape": entry.shape,
        "dtype": entry.dtype,
        "zooms": entry.zooms,
        "affine": entry.affine,
        **_of_images([asdict(i) for i in entry.intensities], record),
        **_of_images([{"rescale_low": e.low, "rescale_high": e.high} for e in entry.rescale_ranges], record),
        **_of_images([{"num_nonfinite": count} for count in entry.num_nonfinite], record),
        "mapped_labels": entry.mapped_labels,
        "mask_labels": entry.mask_labels,
        "mask_positions": entry.mask_positions,
        **target_cells(entry.target_intensity),
        "target_nonfinite": entry.target_nonfinite,
        **scaling_cells(entry.scaling),
    }


def target_cells(intensity: Intensity | None) -> dict[str, object]:
    """The part of an index row with the values of a target, if there is one."""
    return {} if intensity is None else {f"target_{n}": value for n, value in asdict(intensity).items()}


def scaling_cells(scaling: Scaling) -> dict[str, object]:
    """The part of an index row with the scaling that a header gives native voxels."""
    is_none = scaling.is_identity
    return {f"scl_{name}": None if is_none else getattr(scaling, name) for name in ("slope", "inter")}


def _of_images(numbers: Sequence[Mapping[str, float]], record: RecordConfig) -> Mapping[str, object]:
    """The cells for the numbers of each image."""
    if record.channels is None:
        return next(iter(numbers), {})
    return {name: [of_image[name] for of_image in numbers] for name in next(iter(numbers), {})}


def scaling_in(cells: Mapping[str, Any]) -> Scaling:
    """The scaling in a row of an index; `NO_SCALING` if it has none.

    Raises:
        ShardError: only slope or intercept is given.
    """
    slope, inter = cells.get("scl_slope"), cells.get("scl_inter")
    if slope is None and inter is None:
        return NO_SCALING
    if slope is None or inter is None:
        raise ShardError(f"the index has a scaling by {slope} and {inter}; both must be there, or none")
    return Scaling(slope, inter)


def schema_of(record: RecordConfig, extra_columns: Sequence[str] = ()) -> pa.Schema:
    """The schema of an index, with the manifest's extra columns."""
    fields = [*SCHEMA, *(_MEMBERS_SCHEMA if record.has_members else ())]
    fields += _SCALING_SCHEMA if record.has_members and record.voxel_dtype == "native" else ()
    fields += _RANGE_SCHEMA if record.has_range else ()
    fields += _NONFINITE_SCHEMA if record.nonfinite is not None else ()
    if not record.has_sources:
        at = SCHEMA.get_field_index("source_sizes")
        fields[at : at + len(_SOURCE_SCHEMA)] = _SOURCE_SCHEMA_1
    if record.channels is not None:
        fields = [f.with_type(pa.list_(f.type)) if f.name in OF_IMAGES else f for f in fields]
    fields += _MASK_SCHEMA if record.mask_dtype else ()
    fields += _POSITIONS_SCHEMA if record.has_positions else ()
    fields += _MAPPED_SCHEMA if record.map_labels is not None else ()
    fields += _TARGET_SCHEMA if record.has_target else ()
    fields += _TARGET_NONFINITE_SCHEMA if record.has_target and record.nonfinite is not None else ()
    fields += _FRAME_SCHEMA if record.splits_frames else ()
    return pa.schema([*fields, *((extra_column(c), pa.string()) for c in extra_columns)])


def comparable_sources(table: pa.Table) -> pa.Table:
    """The index with what all format versions store about an example's files: the sum of their sizes."""
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
        path: path to write to.
        table: result of `make_table`.
        facts: about the file that it describes; kept in the Parquet file's metadata.
        below: same as for `storage.create`.
    """
    sink = io.BytesIO()
    schema = table.schema.with_metadata(facts)
    repeated = [
        f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        for field in schema
        if field.name not in _UNREPEATED
    ]
    with pq.ParquetWriter(
        sink, schema, compression="zstd", use_dictionary=repeated, write_page_checksum=True
    ) as writer:
        for start in range(0, max(1, table.num_rows), _GROUP_ROWS):
            # In one chunk, as the pages of the file are cut where chunks end.
            group = table.slice(start, _GROUP_ROWS).combine_chunks()
            writer.write_table(group.replace_schema_metadata(facts))
    storage.write(path, sink.getvalue(), below)


def read_index(
    path: str,
    positions: range | None = None,
    columns: Sequence[str] | None = None,
    limits: Limits | None = None,
    below: str | None = None,
) -> tuple[pa.Table, dict[str, str]]:
    """An index and the facts about the file that it describes.

    Args:
        path: path of the index.
        positions: positions of the records that are needed; the result may have others too. None means all.
        columns: names of the columns to read, if the index has them; None means all.
        limits: limits of the index; None if this process wrote it.
        below: same as for `storage.create`.

    Raises:
        FileNotFoundError: there is no such file.
        ShardError: the file is not an index, or exceeds its limits.
    """
    return parse_index(read_bytes(path, limits, below), path, positions, columns, limits)


def read_bytes(path: str, limits: Limits | None, below: str | None = None) -> bytes:
    """The bytes of an index; as `read_index`."""
    if limits is None:
        return storage.read(path, below)
    most = min(_FREE_BYTES + _ROW_BYTES * limits.num_rows, _MOST_FILE_BYTES)
    try:
        return storage.read_bounded(path, most, below)
    except storage.FileTooLargeError as e:
        raise ShardError(f"{path}: not an index: {e}") from e


def parse_index(
    data: bytes,
    path: str,
    positions: range | None = None,
    columns: Sequence[str] | None = None,
    limits: Limits | None = None,
    known: Mapping[str, pa.DataType] | None = None,
) -> tuple[pa.Table, dict[str, str]]:
    """An index by its bytes; as `read_index`.

    Args:
        data: the bytes.
        path: path that they were read from.
        positions: same as for `read_index`.
        columns: same as for `read_index`.
        limits: same as for `read_index`.
        known: types of the columns that it may have; None takes any.
    """
    try:
        if limits is not None:
            require_schema(io.BytesIO(data), _DEEPEST, _MOST_FOOTER_VALUES)
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
            raise ShardError("has a column twice")
        if known is not None:
            _require_columns(file.schema_arrow, known)
        if limits is not None:
            limits.require_rows(file.metadata, len(data))
        groups = [i for i in range(file.num_row_groups) if _is_near(file.metadata.row_group(i), positions)]
        if limits is not None:
            table = read_bounded(data, limits.most_bytes(len(data)), groups, columns)
        else:
            # Not `read_table`, which starts threads that can crash a short process at its end.
            table = file.read_row_groups(groups, columns=columns, use_threads=False)
        facts = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    except (pa.ArrowException, ShardError, OSError, ValueError) as e:
        raise ShardError(f"{path}: not an index: {e}") from e
    return table, facts


def _require_columns(schema: pa.Schema, known: Mapping[str, pa.DataType]) -> None:
    """Refuse columns before they are read, as types may nest."""
    for name, kind in zip(schema.names, schema.types, strict=True):
        if name not in known:
            raise ShardError(f"has a column {name!r}, which {FILE_NAME} does not name")
        if kind != known[name]:
            raise ShardError(f"column {name} is {str(kind)[:60]}, expected {known[name]}")


def record_name(ordinal: int, table: pa.Table) -> str:
    """The name of a row of an index in problems."""
    has_id = "example_id" in table.column_names
    return f"record {ordinal}" + (f" ({table['example_id'][ordinal].as_py()})" if has_id else "")


def _is_near(group: pq.RowGroupMetaData, positions: range | None) -> bool:
    """Whether some rows of a group may be at these positions."""
    if positions is None:
        return bool(group.num_rows)
    columns = (group.column(i) for i in range(group.num_columns))
    found = next((c.statistics for c in columns if c.path_in_schema == "position"), None)
    if found is None or not found.has_min_max or type(found.min) is not int:  # which the caller refuses
        return bool(group.num_rows)
    return bool(found.min < positions.stop and found.max >= positions.start)
