"""Reads the indexes of a dataset that anybody may have written, and checks that they are sound."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
from collections.abc import Collection, Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.config import RecordConfig
from beam_nifti.errors import DatasetError, ShardError, unreadable
from beam_nifti.record.dataset_files import FILE_NAME, path_of
from beam_nifti.record.dataset_info import DatasetInfo, ShardInfo
from beam_nifti.record.index import (
    Limits,
    parse_index,
    read_bytes,
    record_name,
    schema_of,
)
from beam_nifti.record.index_checks import check_members, check_table
from beam_nifti.storage import paths as storage
from beam_nifti.volume.compression import DEFLATE_RATIO
from beam_nifti.volume.rescale import numpy_dtype


@functools.lru_cache(maxsize=8)
def known_columns(record: RecordConfig, columns: tuple[str, ...]) -> Mapping[str, pa.DataType]:
    """Types of the columns that an index may have; `columns` are all columns of the manifest."""
    return {field.name: field.type for field in schema_of(record, columns)}


def read_shard_index(
    output: str, info: DatasetInfo, shard: ShardInfo, columns: Collection[str] | None = None
) -> pa.Table:
    """The index of a shard of a published dataset: sound, whoever wrote it.

    Args:
        output: the dataset's folder, local or a URL.
        info: info of the dataset.
        shard: a shard of the dataset.
        columns: names of the columns to read, if the index has them; None means all.

    Raises:
        DatasetError: the index is missing, is not that of the shard, or cannot be reached.
    """
    path = storage.join(output, shard.index)
    try:
        limits = limits_of(output, shard, len(info.shards))
        data = read_bytes(path_of(output, shard.index), limits)
        table, facts = _sound(data, path, info, limits, columns)
    except FileNotFoundError as e:
        raise DatasetError(f"{path}: is missing; copy it again, or run `beam-nifti build` again") from e
    except (ShardError, OSError) as e:
        raise unreadable(f"{path}:", e) from e
    is_same = hashlib.sha256(data).hexdigest() == shard.index_sha256
    if not is_same or facts.get("sha256") != shard.sha256 or table.num_rows != shard.num_examples:
        raise DatasetError(f"{path}: is not the index of {shard.name}; run beam-nifti verify")
    checks = (_find_outside(table, shard), _find_others(table, info), _find_impossible(table, info))
    for problem in itertools.chain(*checks, check_members(table)):
        raise DatasetError(f"{path}: {problem}; run beam-nifti verify")
    return table


def read_sound_index(
    path: str, info: DatasetInfo, limits: Limits, below: str, columns: Collection[str] | None = None
) -> tuple[pa.Table, dict[str, str]]:
    """As `read_index`, but only with columns, types and numbers of values that the dataset can have.

    Raises:
        OutputError: a name below `below` is a symbolic link.
        FileNotFoundError: there is no such file.
        ShardError: the file is not such an index.
    """
    return _sound(read_bytes(path, limits, below), path, info, limits, columns)


def _sound(
    data: bytes, path: str, info: DatasetInfo, limits: Limits, columns: Collection[str] | None
) -> tuple[pa.Table, dict[str, str]]:
    record, names = info.record_config, None if columns is None else sorted(columns)
    known = known_columns(record, tuple(info.manifest["columns"]))
    table, facts = parse_index(data, path, None, names, limits, known)
    every = schema_of(record, [label.name for label in info.labels]).names
    needed = [name for name in every if names is None or name in names]
    may_lack_masks = info.columns.missing_mask == "empty"
    is_sparse = not info.has_manifest
    for problem in check_table(table, needed, record, is_sparse=is_sparse, may_lack_masks=may_lack_masks):
        raise ShardError(f"{path}: not an index: {problem}")
    return table, facts


def limits_of(output: str, shard: ShardInfo, num_shards: int) -> Limits:
    """The limits of the index of a published shard, one of so many, whose file may be missing."""
    size = 0
    if not storage.is_remote(output):  # in a store this would be a request
        with contextlib.suppress(OSError):
            size = storage.stat(path_of(output, shard.name)).size
    return Limits(shard.num_examples, size, num_shards)


def _find_outside(table: pa.Table, shard: ShardInfo) -> Iterator[str]:
    """Find records that are not in their shard."""
    if {"offset", "length"} <= set(table.column_names):
        offsets, lengths = table["offset"].to_numpy(), table["length"].to_numpy()
        size = shard.num_bytes
        wrong = np.flatnonzero((offsets < 0) | (lengths <= 0) | (lengths > size) | (offsets > size - lengths))
        if wrong.size:
            at = int(wrong[0])
            where = f"{lengths[at]} bytes at offset {offsets[at]}"
            yield f"{record_name(at, table)} has {where}, which are not in {shard.name}"


def _find_others(table: pa.Table, info: DatasetInfo) -> Iterator[str]:
    """Find records whose shape is not that of the dataset."""
    if info.shape is not None and "shape" in table.column_names:
        counts = pc.list_value_length(table["shape"]).to_numpy()
        shapes = pc.list_flatten(table["shape"]).to_numpy()
        if (counts != len(info.shape)).any() or (shapes.reshape(-1, len(info.shape)) != info.shape).any():
            yield f"column shape has other shapes than {list(info.shape)}, which {FILE_NAME} gives"


def _find_impossible(table: pa.Table, info: DatasetInfo) -> Iterator[str]:
    """Find records too small for their shapes, for which readers allocate memory before they read them."""
    names = set(table.column_names)
    if not table.num_rows or "length" not in names or (info.shape is None and "shape" not in names):
        return
    if info.shape is None:
        starts = np.cumsum([0, *pc.list_value_length(table["shape"]).to_numpy()[:-1]])
        axes = (
            pc.list_flatten(table["shape"]).to_numpy().astype(np.float64)
        )  # as products may be beyond int64
        sizes, least = np.multiply.reduceat(axes, starts), np.minimum.reduceat(axes, starts)
    else:
        sizes = np.full(table.num_rows, math.prod(info.shape), np.float64)
        least = np.ones(table.num_rows)
    lengths = table["length"].to_numpy()
    most = lengths.astype(np.float64) * (DEFLATE_RATIO if info.record_config.compression == "gzip" else 1)
    wrong = np.flatnonzero((least < 1) | (sizes * numpy_dtype(info.dtype).itemsize > most))
    if wrong.size:
        at = int(wrong[0])
        shape = info.shape or table["shape"][at].as_py()
        yield (
            f"{record_name(at, table)} of {lengths[at]:,} bytes is said to have the shape {list(shape)}, "
            "which it cannot hold"
        )
