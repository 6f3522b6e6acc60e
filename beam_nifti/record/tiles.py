"""How a record is cut so that a patch of its voxels can be read without the rest.

A compressed record has one gzip member for what precedes its voxels, one for each tile of them, and one for
what follows; its mask and its target are cut in the same way. A tile is some planes along x, or some rows
along y of one plane. The voxels of an uncompressed record are one tile. Source: docs/format.md, "Members".
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from beam_nifti.record.example import (
    TENSOR_FEATURES,
    ExamplePieces,
    Tensors,
    decode_example,
    decode_tensor,
)
from beam_nifti.record.tfrecord import (
    FOOTER_BYTES,
    HEADER_BYTES,
    TILE_BYTES,
    EncodedRecord,
    encode_members,
    member_lengths,
    member_sizes,
)
from beam_nifti.volume.rescale import numpy_dtype

_SHOWN: Final = 4


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of a tensor, in C order.

    Attributes:
        shape: shape of the tensor, (X, Y, Z) or (X, Y, Z, C).
        itemsize: bytes of a voxel.
        planes: the most planes of a tile along x.
        rows: the most rows of a tile along y; all of them unless `planes` is 1.
    """

    shape: tuple[int, ...]
    itemsize: int
    planes: int
    rows: int

    @classmethod
    def of(cls, shape: tuple[int, ...], itemsize: int, *, compressed: bool) -> Tiles | None:
        """The tiles of a tensor; None if it is too small to be cut.

        >>> Tiles.of((91, 109, 91), 4, compressed=True)
        Tiles(shape=(91, 109, 91), itemsize=4, planes=2, rows=109)
        >>> Tiles.of((512, 512, 256), 2, compressed=True)
        Tiles(shape=(512, 512, 256), itemsize=2, planes=1, rows=128)
        """
        planes, rows = shape[:2]
        if not compressed:
            return cls(shape, itemsize, planes, rows)
        size = math.prod(shape[1:]) * itemsize
        if (parts := _divide(size, TILE_BYTES)) > 1:
            tiles = cls(shape, itemsize, 1, -(-rows // min(parts, rows)))
        else:
            tiles = cls(shape, itemsize, max(1, _divide(TILE_BYTES, size)), rows)
        return tiles if tiles.count > 1 else None

    @property
    def columns(self) -> int:
        """Tiles along y."""
        return -(-self.shape[1] // self.rows)

    @property
    def count(self) -> int:
        """Tiles of the tensor."""
        return -(-self.shape[0] // self.planes) * self.columns

    @property
    def row_bytes(self) -> int:
        """Bytes of the voxels at one x and y."""
        return math.prod(self.shape[2:]) * self.itemsize

    def sizes(self) -> list[int]:
        """Bytes of each tile."""
        planes, rows = self.shape[:2]
        return [
            min(self.planes, planes - x) * min(self.rows, rows - y) * self.row_bytes
            for x in range(0, planes, self.planes)
            for y in range(0, rows, self.rows)
        ]


def _divide(number: int, by: int) -> int:
    """The nearest integer to the quotient, halves up."""
    return (2 * number + by) // (2 * by)


def encode_record(example: bytes | ExamplePieces, level: int | None, *, whole: bool = False) -> EncodedRecord:
    """Frame a record, cut so that patches can be read.

    Args:
        example: a serialized Example with an `image_raw`.
        level: igzip level 0 to 3; None for an uncompressed shard.
        whole: whether it is not cut, as in format version 1.
    """
    cuts = [] if whole else find_cuts(example, level is not None)
    return encode_members(example.pieces if isinstance(example, ExamplePieces) else (example,), level, cuts)


def find_cuts(example: bytes | ExamplePieces, compressed: bool) -> list[int]:
    """Find where to cut a record.

    Args:
        example: a serialized Example with an `image_raw`.
        compressed: whether it is compressed.

    Returns:
        Offsets in the payload, ascending; empty if the record is too small to be cut, or if its image, mask
        and target are in another order.
    """
    cuts = list[int]()
    for start, shape, itemsize in (
        example.tensors if isinstance(example, ExamplePieces) else _tensors_in(example)
    ):
        if (tiles := Tiles.of(shape, itemsize, compressed=compressed)) is not None:
            cuts += itertools.accumulate(tiles.sizes(), initial=start)
    return cuts if cuts == sorted(cuts) else []


def kept_members(record: bytes, was: bytes, now: bytes) -> dict[int, bytes]:
    """The gzip members of a record that it still has with another payload, by their numbers.

    Args:
        record: exactly the record's bytes.
        was: its payload.
        now: the other payload, of a record that is cut in the same way.
    """
    old, new = ([cut + HEADER_BYTES for cut in find_cuts(payload, True)] for payload in (was, now))
    members, sizes = member_lengths(memoryview(record)), member_sizes(memoryview(record))
    if len(old) != len(new) or [*itertools.accumulate(sizes)][:-1] != old:
        return {}
    starts = [*itertools.accumulate(members, initial=0)]
    then, there = (np.frombuffer(payload, np.uint8) for payload in (was, now))
    # The first member and the last one hold the frame of the record, which is another one.
    return {
        number: record[starts[number] : starts[number + 1]]
        for number in range(1, len(old))
        if np.array_equal(
            then[old[number - 1] - HEADER_BYTES : old[number] - HEADER_BYTES],
            there[new[number - 1] - HEADER_BYTES : new[number] - HEADER_BYTES],
        )
    }


def _tensors_in(payload: bytes) -> Iterator[tuple[int, tuple[int, ...], int]]:
    """As `ExamplePieces.tensors`, but the image first."""
    features = decode_example(payload)
    begin = np.frombuffer(payload, np.uint8).ctypes.data
    for name in TENSOR_FEATURES.values():
        if name in features:
            tensor = decode_tensor(features[name])  # type: ignore[arg-type]  # else examine has refused it
            yield tensor.ctypes.data - begin, tensor.shape, tensor.itemsize


def check_cuts(record: bytes, payload: bytes, lengths: Sequence[int], compressed: bool) -> Iterator[str]:
    """Find what is wrong with the members of a record that is otherwise sound.

    Args:
        record: bytes of the record in the shard.
        payload: the Example that the record holds.
        lengths: bytes of each member, according to the index.
        compressed: whether the record is compressed.
    """
    ends = [HEADER_BYTES + cut for cut in find_cuts(payload, compressed)]
    bounds = [0, *ends, HEADER_BYTES + len(payload) + FOOTER_BYTES]
    expected = [end - start for start, end in itertools.pairwise(bounds)]
    found, held = list(lengths), list(lengths)
    if compressed:
        view = memoryview(record)
        found, held = member_lengths(view), member_sizes(view)
    if found != list(lengths):
        yield f"its members have {_show(found)} bytes, but the index has {_show(lengths)}"
    elif held != expected:
        yield f"its members hold {_show(held)} bytes, expected {_show(expected)}"


def _show(numbers: Sequence[int]) -> str:
    more = ", …" if len(numbers) > _SHOWN else ""
    return f"{', '.join(map(str, numbers[:_SHOWN]))}{more} ({len(numbers)} in all)"


@functools.lru_cache(maxsize=1024)
def tiles_of(tensors: Tensors, *, compressed: bool) -> tuple[dict[str, tuple[int, Tiles]], int]:
    """Find which members of a record hold its voxels.

    Args:
        tensors: the record's, as of `tensors_of`.
        compressed: whether the record is compressed.

    Returns:
        For each feature that is cut, the number of its first member and its tiles; and how many members the
        record has.
    """
    found, number = dict[str, tuple[int, Tiles]](), 1
    for name, shape, dtype in tensors:
        tiles = Tiles.of(shape, numpy_dtype(dtype).itemsize, compressed=compressed)
        if tiles is not None:
            found[name] = number, tiles
            number += tiles.count + 1
    return found, number
