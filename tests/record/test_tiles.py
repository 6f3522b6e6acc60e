"""Which members a record is cut into."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.record.example import encode_example, encode_tensor
from beam_nifti.record.tfrecord import TILE_BYTES
from beam_nifti.record.tiles import Tiles, check_cuts, find_cuts, tiles_of

axes = st.tuples(st.integers(1, 300), st.integers(1, 300), st.integers(1, 9000))


@given(axes, st.sampled_from([(), (2,), (7,)]), st.sampled_from([1, 2, 4, 8]))
def test_tiles_are_whole_planes_or_rows_of_about_one_size(
    axes: tuple[int, int, int], channels: tuple[int, ...], itemsize: int
) -> None:
    tiles = Tiles.of((*axes, *channels), itemsize, compressed=True)
    total = math.prod(axes) * math.prod(channels) * itemsize
    if tiles is None:
        assert total <= 1.5 * TILE_BYTES or axes[:2] == (1, 1)
        return
    sizes = tiles.sizes()
    assert sum(sizes) == total
    assert len(sizes) == tiles.count > 1
    assert tiles.planes == 1 or tiles.rows == axes[1]
    assert max(sizes) <= max(2 * TILE_BYTES, tiles.row_bytes)
    assert total / len(sizes) > TILE_BYTES / 3


def test_uncompressed_voxels_are_one_tile() -> None:
    assert Tiles.of((2, 3, 4), 2, compressed=False) == Tiles((2, 3, 4), 2, 2, 3)


@pytest.mark.parametrize("compressed", [True, False])
def test_a_record_is_cut_around_its_voxels_and_its_mask(compressed: bool) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 99, (70, 60, 50)).astype(np.int16)
    mask = (image > 40).astype(np.uint8)
    features = {"image_raw": encode_tensor(image), "mask_raw": encode_tensor(mask), "id": b"a", "zooms": b"z"}
    payload = encode_example(features)
    cuts = find_cuts(payload, compressed)
    members = [payload[start:end] for start, end in itertools.pairwise([0, *cuts, len(payload)])]
    found, count = tiles_of(image.shape, "int16", "uint8", compressed=compressed)
    assert len(members) == count
    for name, tensor in (("image_raw", image), ("mask_raw", mask)):
        first, tiles = found[name]
        assert b"".join(members[first : first + tiles.count]) == tensor.tobytes()
        assert [len(m) for m in members[first : first + tiles.count]] == tiles.sizes()


def test_small_records_and_those_in_another_order_stay_whole() -> None:
    small, large = np.zeros((8, 8, 8), np.uint8), np.zeros((64, 64, 64), np.float32)
    assert find_cuts(encode_example({"image_raw": encode_tensor(small)}), True) == []
    assert find_cuts(encode_example({"image_raw": encode_tensor(large)}), True)
    # Protobuf may write a map in any order.
    parts = [encode_example({name: encode_tensor(large)}) for name in ("mask_raw", "image_raw")]
    assert find_cuts(_joined(parts), False) == []


def _joined(examples: list[bytes]) -> bytes:
    """An Example of the features of several."""

    def split(data: bytes) -> bytes:
        at = 1
        while data[at] > 127:
            at += 1
        return data[at + 1 :]

    body, size = b"".join(map(split, examples)), b""
    left = len(body)
    while left > 127:
        size, left = size + bytes([left & 127 | 128]), left >> 7
    return b"\n" + size + bytes([left]) + body


def test_other_cuts_than_those_of_the_format_are_told() -> None:
    payload = encode_example({"image_raw": encode_tensor(np.zeros((64, 64, 64), np.float32))})
    assert len(list(check_cuts(b"", payload, [len(payload) + 16], compressed=False))) == 1
