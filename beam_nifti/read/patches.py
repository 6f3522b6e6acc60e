"""Patches of records. Only the tiles that a patch touches are read and decompressed."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, SupportsIndex

import numpy as np
import numpy.typing as npt

from beam_nifti.config import RecordConfig
from beam_nifti.errors import ShardError, UsageError
from beam_nifti.read.decoding import require_channels, restore_image
from beam_nifti.read.opening import for_each
from beam_nifti.read.records import Element, Records, scratch
from beam_nifti.record.example import (
    Features,
    Tensors,
    decode_example,
    decode_tensor,
    largest_payload,
    tensors_of,
)
from beam_nifti.record.index import scaling_in
from beam_nifti.record.tfrecord import (
    FOOTER_BYTES,
    HEADER_BYTES,
    inflate_one,
    payload_of,
    require_stored_size,
)
from beam_nifti.record.tiles import Tiles, tiles_of
from beam_nifti.storage import paths as storage
from beam_nifti.volume.compression import make_buffer
from beam_nifti.volume.intensity import rescale_voxels
from beam_nifti.volume.rescale import (
    NO_SCALING,
    UINT8_LEVELS,
    Intensity,
    RescaleRange,
    Scaling,
    numpy_dtype,
)

Array = npt.NDArray[Any]

_SPACE: Final = 3
"""Number of spatial axes, which come before the channel axis."""


@dataclass(frozen=True, slots=True)
class Box:
    """A box of voxels, which may reach beyond the volume.

    Attributes:
        corner: index of its first voxel along x, y and z.
        shape: number of voxels along each axis.
    """

    corner: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, corner: Sequence[SupportsIndex], shape: Sequence[SupportsIndex]) -> Box:
        """The box of a corner and a shape, after checking them.

        Raises:
            UsageError: `corner` or `shape` is not three integers, or `shape` has one below 1 or does not fit
                into memory.
        """
        return cls(integers("corner", corner), sizes("shape", shape))

    def inside(self, volume: Sequence[int]) -> tuple[slice, ...]:
        """The part of the box inside a volume of this shape, as indices of the volume; it may be empty."""
        starts = [min(max(corner, 0), size) for corner, size in zip(self.corner, volume, strict=False)]
        stops = map(operator.add, self.corner, self.shape)
        return tuple(
            slice(start, max(start, min(stop, size)))
            for start, stop, size in zip(starts, stops, volume, strict=False)
        )

    def place(self, affine: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The affine of the box, from that of the volume."""
        placed = affine.copy()
        placed[:_SPACE, _SPACE] += affine[:_SPACE, :_SPACE] @ self.corner
        return placed

    def pad(self, part: Array, inside: Sequence[slice], padding: Array) -> Array:
        """The voxels of the box, padded outside the volume.

        Args:
            part: voxels inside the volume, with a channel axis.
            inside: indices of `part` in the volume.
            padding: value of the other voxels: one for each channel, or one for all.
        """
        if part.shape[:_SPACE] == self.shape:
            return np.ascontiguousarray(part)
        out = np.empty((*self.shape, part.shape[_SPACE]), part.dtype)
        out[...] = padding
        out[tuple(slice(s.start - c, s.stop - c) for s, c in zip(inside, self.corner, strict=True))] = part
        return out


def integers(name: str, given: Sequence[SupportsIndex], least: int | None = None) -> tuple[int, ...]:
    """An integer for each axis of space, from what a user gives.

    Raises:
        UsageError: it is something else.
    """
    try:
        numbers = () if any(isinstance(n, bool) for n in given) else tuple(map(operator.index, given))
    except TypeError:
        numbers = ()
    if len(numbers) != _SPACE or (least is not None and min(numbers) < least):
        which = "" if least is None else f" of at least {least}"
        raise UsageError(f"{name} is {given!r}; give three integers{which}, along x, y and z")
    return numbers


def sizes(name: str, given: Sequence[SupportsIndex]) -> tuple[int, ...]:
    """The shape of a patch, from what a user gives.

    Raises:
        UsageError: it is not three integers of at least 1, or does not fit into memory.
    """
    shape = integers(name, given, least=1)
    try:
        np.empty(shape, np.float32)  # memory that is not written to takes none
    except (MemoryError, ValueError) as e:  # ValueError: more bytes than an array can have
        raise UsageError(f"{name} is {shape}, which does not fit into memory; give a smaller one") from e
    return shape


@dataclass(frozen=True, slots=True)
class _Facts:
    """The intensities of a record, from the index.

    Attributes:
        scaling: scaling of native voxels to the image's units.
        ranges: range of each image, in its units; None if it is not known.
        ends: intensities that became 0 and 1, for each image; None if the ranges determine them.
    """

    scaling: Scaling
    ranges: list[Intensity] | None
    ends: list[RescaleRange] | None

    @classmethod
    def of(cls, cells: Mapping[str, Any], config: RecordConfig) -> _Facts:
        """The intensities in a row of the index."""
        lows, highs = _numbers(cells["min"]), _numbers(cells["max"])
        if not len(lows) == len(highs) in (0, config.num_channels):
            raise ShardError(f"the index has minima {lows} and maxima {highs}")
        ranges = [Intensity(low, high, math.nan, math.nan) for low, high in zip(lows, highs, strict=True)]
        lows, highs = (
            _numbers(cells[n]) if config.has_range else [] for n in ("rescale_low", "rescale_high")
        )
        if config.has_range and not len(lows) == len(highs) == config.num_channels:
            raise ShardError(f"the index has rescale_low {lows} and rescale_high {highs}")
        return cls(
            scaling_in(cells),
            ranges or None,
            list(map(RescaleRange, lows, highs)) if config.has_range else None,
        )

    def padding(self, config: RecordConfig) -> Array:
        """The minimum of each image, which must be known, rescaled and rounded as in the record."""
        ranges = self.ranges or []
        no_ends: list[RescaleRange | None] = [None] * len(ranges)
        of_images = zip(ranges, self.ends or no_ends, strict=True)
        least = [rescale_voxels(np.array([r.min]), NO_SCALING, r, ends, config)[0] for r, ends in of_images]
        stored = np.array(least, least[0].dtype).astype(np.float32)
        return stored / np.float32(UINT8_LEVELS) if config.voxel_dtype == "uint8" else stored

    def suffice(self, config: RecordConfig, dtype: np.dtype[Any]) -> bool:
        """Whether a part of the voxels can be rescaled and padded without the others."""
        if self.ranges is None:
            return False
        if config.voxel_dtype != "native" or config.has_range or config.method == "none":
            return True
        # float64 does not hold the range of 64-bit integers exactly.
        return not (dtype.kind in "iu" and dtype.itemsize > np.dtype(np.int32).itemsize)

    def require_possible(self, config: RecordConfig, dtype: np.dtype[Any]) -> None:
        """Check that voxels can have these intensities.

        Raises:
            ShardError: none can.
        """
        is_native = config.voxel_dtype == "native"
        is_exact = is_native and dtype.kind in "iu" and self.scaling.is_identity
        for r in self.ranges or ():
            is_range = r.min < r.max or (r.min == r.max and config.method != "minmax")
            if is_range and is_exact:  # of which a float32 is not exact enough
                limits = np.iinfo(dtype)
                is_range = limits.min <= r.min == int(r.min) and limits.max >= r.max == int(r.max)
            if not (is_range and math.isfinite(r.min) and math.isfinite(r.max)):
                raise ShardError(
                    f"the index has intensities from {r.min:g} to {r.max:g}, which no voxels can have"
                )


def _numbers(cell: Any) -> list[float]:
    """The numbers in a cell, one for each image."""
    return cell if isinstance(cell, list) else [] if cell is None else [cell]


def read_patch(records: Records, row: int, box: Box) -> Element:
    """The element of a row of the table, with its volumes cropped to a box, and padded outside the volume.

    The affine is that of the box.

    Raises:
        DatasetError: the record is missing or damaged.
    """
    names = [name for name in records.columns if records.opened.has_tensor(name)]
    element = {name: records.cell(name, row) for name in records.columns if name not in records.from_record}
    patches = _from_tiles(records, row, names, box)
    if patches is None:
        element = records.read(row)
        config = records.opened.info.record_config
        cut = partial(cut_patch, box=box, config=config, channels_first=records.channels_first)
        patches = {name: cut(element[name], name=name) for name in names}
    elif records.channels_first:
        patches = {name: np.ascontiguousarray(np.moveaxis(p, -1, 0)) for name, p in patches.items()}
    if "affine" in element:
        element["affine"] = box.place(element["affine"])
    return {name: patches[name] if name in patches else element[name] for name in records.columns}


def cut_patch(volume: Array, box: Box, config: RecordConfig, *, name: str, channels_first: bool) -> Array:
    """A patch of a volume that is in memory, in C order: an "image", a "mask" or a "target"."""
    if channels_first:
        volume = np.moveaxis(volume, 0, -1)
    inside = box.inside(volume.shape)
    if name == "mask":
        padding = np.zeros(1, volume.dtype)
    else:
        is_of_all = config.channels is None or name == "target"
        padding = np.fmin.reduce(volume, axis=None if is_of_all else (0, 1, 2))
    patch = box.pad(volume[inside], inside, padding)
    return np.ascontiguousarray(np.moveaxis(patch, -1, 0)) if channels_first else patch


def _from_tiles(records: Records, row: int, names: Sequence[str], box: Box) -> dict[str, Array] | None:
    """The patches of some tensors; None if the whole record must be read."""
    table, info = records.patch_table, records.opened.info
    if table is None or not records.from_record <= set(names):
        return None
    config, is_compressed = info.record_config, info.record_config.compression == "gzip"
    with records.reading(row) as (path, shape):
        require_channels(shape, config)
        tensors = tensors_of(shape, info.dtype, config)
        found, count = tiles_of(tensors, compressed=is_compressed)
        cells = {name: table[name][row].as_py() for name in table.column_names if name != "member_lengths"}
        facts, lengths = _Facts.of(cells, config), table["member_lengths"][row].values.to_numpy()
        is_cut = len(lengths) > 1 and all(f"{name}_raw" in found for name in names)
        if not is_cut or not facts.suffice(config, numpy_dtype(info.dtype)):
            return None
        if len(lengths) != count:
            raise ShardError(f"the index gives it {len(lengths)} members, expected {count}")
        require_stored_size(cells["length"], largest_payload(tensors))
        starts = np.cumsum(lengths, dtype=np.int64) - lengths + records.places[0][row]
        if not records.agreed[row]:
            features = _read_beside(path, found, starts, lengths, tensors, config.compression)
            records.require_agreement(row, features, cells)
            facts.require_possible(config, numpy_dtype(info.dtype))
            records.agreed[row] = True
        least = facts.padding(config)
        if "target" in names and cells["target_min"] is None:
            raise ShardError("the index has no target_min")
        dtypes = {feature: numpy_dtype(dtype).newbyteorder("<") for feature, _, dtype in tensors}
        patches = {}
        for name in names:
            number, tiles = found[f"{name}_raw"]
            dtype = dtypes[f"{name}_raw"]
            inside = box.inside(shape)
            part = np.empty([*(s.stop - s.start for s in inside), *tiles.shape[_SPACE:]], dtype)
            if part.size:
                members = starts[number:], lengths[number:]
                _fill(part, path, tiles, *members, inside, is_compressed=is_compressed)
            if name == "image":
                part = restore_image(part, config, facts.scaling, facts.ends, facts.ranges)
            elif part.ndim == _SPACE:
                part = part[..., np.newaxis]
            paddings = {"image": least, "target": np.array([cells.get("target_min")], np.float64)}
            padding = paddings.get(name, np.zeros(1)).astype(part.dtype)
            patches[name] = box.pad(part, inside, padding)
    return patches


def _read_beside(
    path: str,
    found: Mapping[str, tuple[int, Tiles]],
    starts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.uint32],
    tensors: Tensors,
    compression: str,
) -> Features:
    """The features of a record, read without the tensors that are cut, whose voxels are then 0.

    Args:
        path: path of the shard.
        found: tiles of the record, as `tiles_of` gives them.
        starts: offset in the shard of each member.
        lengths: bytes of each member.
        tensors: the record's, as of `tensors_of`, according to the index.
        compression: as of `RecordConfig`.

    Raises:
        ShardError, EOFError: the record is damaged, or its tensors differ from the index.
        OSError: the file cannot be reached.
    """
    most = largest_payload(tensors)

    def read_member(number: int) -> bytearray | memoryview:
        size = int(lengths[number])
        require_stored_size(size, most)
        piece = make_buffer(size)
        storage.read_ranges(path, [(int(starts[number]), size)], piece)
        return inflate_one(piece, most=most) if compression == "gzip" else piece

    numbers = [0, *(first + tiles.count for first, tiles in found.values())]
    pieces = for_each(read_member, numbers, together=storage.is_remote(path))
    places, total, starts_of = list[int](), 0, dict[str, int]()
    for number, piece in zip(numbers, pieces, strict=True):
        places.append(total)
        total += len(piece)
        for name, (first, tiles) in found.items():
            if first == number + 1:
                starts_of[name] = total
                total += math.prod(tiles.shape) * tiles.itemsize
    if total > most + HEADER_BYTES + FOOTER_BYTES:
        raise ShardError(f"its members hold {total:,} bytes, but the record has at most {most:,}")
    framed = np.zeros(total, np.uint8)  # memory that is not written to takes none
    for at, piece in zip(places, pieces, strict=True):
        framed[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
    features = decode_example(payload_of(framed.data))
    for name, shape, dtype in tensors:
        if name not in starts_of:
            continue
        tensor = decode_tensor(features.get(name, b""))  # type: ignore[arg-type]
        if (tensor.shape, tensor.dtype.name) != (shape, dtype):
            raise ShardError(
                f"its {name} holds {tensor.dtype.name} of {tensor.shape}, expected {dtype} of {shape}"
            )
        if tensor.ctypes.data - framed.ctypes.data != starts_of[name]:
            raise ShardError(f"its {name} is not in the members that the index gives")
    return features


def _fill(
    out: Array,
    path: str,
    tiles: Tiles,
    starts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.uint32],
    inside: Sequence[slice],
    *,
    is_compressed: bool,
) -> None:
    """Read the voxels of a part of a volume, which must not be empty.

    Args:
        out: array to fill.
        path: path of the shard.
        tiles: tiles of the tensor.
        starts: offset in the shard of each member, from the tensor's first tile on.
        lengths: bytes of each member.
        inside: indices of the part in the volume.
        is_compressed: whether the members are compressed.

    Raises:
        ShardError, EOFError: the file is damaged.
        OSError: it cannot be reached.
    """
    xs, ys, zs = inside
    if not is_compressed:
        if lengths[0] != math.prod(tiles.shape) * tiles.itemsize:
            raise ShardError(f"the index gives its voxels {lengths[0]} bytes")
        num_planes, num_rows, row_bytes = xs.stop - xs.start, ys.stop - ys.start, tiles.row_bytes
        offsets = (
            int(starts[0]) + (x * tiles.shape[1] + ys.start) * row_bytes for x in range(xs.start, xs.stop)
        )
        voxels = scratch(num_planes * num_rows * row_bytes)
        storage.read_ranges(path, [(offset, num_rows * row_bytes) for offset in offsets], voxels)
        out[...] = np.frombuffer(voxels, out.dtype).reshape(num_planes, num_rows, *tiles.shape[2:])[:, :, zs]
        return
    blocks = list[tuple[int, int, int, int]]()  # x, y, planes, rows
    ranges = list[tuple[int, int]]()
    for x in range(xs.start - xs.start % tiles.planes, xs.stop, tiles.planes):
        for y in range(ys.start - ys.start % tiles.rows, ys.stop, tiles.rows):
            number = x // tiles.planes * tiles.columns + y // tiles.rows
            ranges.append((int(starts[number]), int(lengths[number])))
            size = min(tiles.planes, tiles.shape[0] - x), min(tiles.rows, tiles.shape[1] - y)
            blocks.append((x, y, *size))
    members = scratch(sum(length for _, length in ranges))
    storage.read_ranges(path, ranges, members)
    for (x, y, planes, rows), (_, length) in zip(blocks, ranges, strict=True):
        content = inflate_one(members[:length], planes * rows * tiles.row_bytes)
        members = members[length:]
        block = np.frombuffer(content, out.dtype).reshape(planes, rows, *tiles.shape[2:])
        left, right = max(x, xs.start), min(x + planes, xs.stop)
        low, high = max(y, ys.start), min(y + rows, ys.stop)
        target = out[left - xs.start : right - xs.start, low - ys.start : high - ys.start]
        target[...] = block[left - x : right - x, low - y : high - y, zs]
