"""Which members a record is cut into."""

from __future__ import annotations

import itertools
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_nifti.config import RecordConfig
from beam_nifti.record.example import encode_example, encode_tensor, encode_volume, tensors_of
from beam_nifti.record.tfrecord import TILE_BYTES, encode_members
from beam_nifti.record.tiles import Tiles, check_cuts, find_cuts, kept_members, tiles_of
from beam_nifti.volume import load_volume, rescale_volume
from tests.images import brain, row_of, write_image

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
def test_a_record_is_cut_around_its_voxels_its_mask_and_its_target(compressed: bool) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 99, (70, 60, 50)).astype(np.int16)
    mask = (image > 40).astype(np.uint8)
    target = rng.normal(0, 1, image.shape).astype(np.float32)
    tensors = {"image_raw": image, "mask_raw": mask, "target_raw": target}
    encoded = {name: encode_tensor(tensor) for name, tensor in tensors.items()}
    payload = encode_example({**encoded, "id": b"a", "zooms": b"z"})
    cuts = find_cuts(payload, compressed)
    members = [payload[start:end] for start, end in itertools.pairwise([0, *cuts, len(payload)])]
    record = RecordConfig(mask_dtype="uint8", has_target=True)
    found, count = tiles_of(tensors_of(image.shape, "int16", record), compressed=compressed)
    assert len(members) == count
    for name, tensor in tensors.items():
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


@given(st.data())
def test_a_record_is_the_same_however_its_example_is_divided(data: st.DataObject) -> None:
    large = data.draw(st.booleans())
    shape = (40, 50, 60) if large else (3, 4, 5)
    image = np.arange(math.prod(shape), dtype=np.int16).reshape(shape)
    payload = encode_example(
        {"id": b"a", "image_raw": encode_tensor(image), "mask_raw": encode_tensor(image)}
    )
    ends = sorted(data.draw(st.lists(st.integers(0, len(payload)), max_size=5)))
    pieces = [memoryview(payload)[a:b] for a, b in itertools.pairwise([0, *ends, len(payload)])]
    for level in (None, 2):
        cuts = find_cuts(payload, level is not None)
        whole, divided = (encode_members(p, level, cuts) for p in ([payload], pieces))
        assert b"".join(whole.pieces) == b"".join(divided.pieces)
        assert whole.lengths == divided.lengths


def test_the_pieces_of_a_volume_are_its_example(tmp_path: Path) -> None:
    """They are cut where the same bytes are, they hold the volume's own memory, and they can be sent."""
    image = write_image(tmp_path / "a.nii", brain((40, 50, 60)))
    mask = write_image(tmp_path / "mask.nii", np.ones((40, 50, 60), np.uint16))
    config = RecordConfig(mask_dtype="uint16")
    row = row_of(image, other_files=(str(mask),))
    volume = rescale_volume(load_volume(row, record=config), config)
    pieces = encode_volume(volume)
    payload = bytes(pieces)
    assert len(pieces) == len(payload)
    assert bytes(pickle.loads(pickle.dumps(pieces))) == payload
    assert any(np.shares_memory(np.frombuffer(p, np.uint8), volume.voxels) for p in pieces.pieces)
    for compressed in (True, False):
        assert find_cuts(pieces, compressed) == find_cuts(payload, compressed) != []


@given(st.text(max_size=5), st.text(max_size=300), st.booleans())
@settings(max_examples=20)
def test_members_of_voxels_are_kept_when_labels_change(was: str, now: str, changes_mask: bool) -> None:
    image = np.arange(60 * 50 * 20, dtype=np.int32).reshape(60, 50, 20)
    mask = (image % 7).astype(np.uint16)
    old, new = (
        encode_example(
            {
                "id": b"a",
                "image_raw": encode_tensor(image),
                "label/site": text.encode(),
                "mask_raw": encode_tensor(labels),
            }
        )
        for text, labels in ((was, mask), (now, mask[::-1].copy() if changes_mask else mask))
    )
    record = b"".join(encode_members((old,), 2, find_cuts(old, True)).pieces)
    kept = kept_members(record, old, new)
    tensors = tensors_of(image.shape, "int32", RecordConfig(mask_dtype="uint16"))
    found, _ = tiles_of(tensors, compressed=True)
    voxels = {range(first, first + tiles.count) for first, tiles in list(found.values())[: 2 - changes_mask]}
    assert kept.keys() >= set(itertools.chain(*voxels))
    cuts = find_cuts(new, True)
    assert encode_members((new,), 2, cuts, kept).lengths == encode_members((new,), 2, cuts).lengths
    assert b"".join(encode_members((new,), 2, cuts, kept).pieces) == b"".join(
        encode_members((new,), 2, cuts).pieces
    )
    whole = b"".join(encode_members((old,), 2).pieces)
    assert kept_members(whole, old, new) == {}
