"""Examples and tensors: TensorFlow's own bytes, and no copy too many."""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from beam_nifti.config import RecordConfig
from beam_nifti.errors import ShardError, VolumeError
from beam_nifti.record import example
from beam_nifti.record.example import (
    FEATURES,
    MAX_EXAMPLE_BYTES,
    FeatureValue,
    decode_example,
    decode_tensor,
    encode_example,
    encode_tensor,
    encode_volume,
)
from beam_nifti.volume import load_volume, rescale_volume
from tests.images import AFFINE, REAL_DTYPES, Array, brain, random_voxels, row_of, write_image


@pytest.fixture(scope="module")
def tf() -> ModuleType:
    return pytest.importorskip("tensorflow")


def tensor_bytes(voxels: Array) -> bytes:
    return b"".join(encode_tensor(voxels))


TENSORS = st.sampled_from(REAL_DTYPES).flatmap(
    lambda dtype: hnp.arrays(
        dtype,
        hnp.array_shapes(min_dims=1, max_dims=4, max_side=6),
        elements=hnp.from_dtype(np.dtype(dtype)),
    )
)


@pytest.mark.tf
@given(voxels=TENSORS)
def test_tensors_are_tensorflows_bytes(tf: ModuleType, voxels: Array) -> None:
    data = tensor_bytes(voxels)
    assert data == tf.io.serialize_tensor(voxels).numpy()
    parsed = tf.io.parse_tensor(data, voxels.dtype).numpy()
    assert parsed.tobytes() == voxels.tobytes()


@pytest.mark.tf
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (127, 1, 1), (128, 1, 1), (1, 16383, 1), (1, 1, 16384), (128, 129, 130)]
)
def test_tensors_of_long_axes_are_tensorflows_bytes(tf: ModuleType, shape: tuple[int, ...]) -> None:
    voxels = random_voxels(shape, "float32")
    assert tensor_bytes(voxels) == tf.io.serialize_tensor(voxels).numpy()


FLOATS = hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32))
INTEGERS = hnp.arrays(np.int64, st.integers(0, 40), elements=st.integers(-(2**63), 2**63 - 1))
FEATURE_DICTS = st.dictionaries(st.text(max_size=5), st.binary(max_size=200) | FLOATS | INTEGERS, max_size=6)


def has_no_prefixes(names: Iterable[str]) -> bool:
    """Where one name begins with another, protobuf's C++ sorts the shorter first, its Python, as we, last."""
    return not any(a != b and b.startswith(a) for a, b in itertools.product(names, repeat=2))


def serialize_with_tensorflow(tf: ModuleType, features: dict[str, Any]) -> bytes:
    def feature(value: Any) -> Any:
        if isinstance(value, bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        if value.dtype == np.int64:
            return tf.train.Feature(int64_list=tf.train.Int64List(value=value))
        return tf.train.Feature(float_list=tf.train.FloatList(value=value))

    values = {name: feature(value) for name, value in features.items()}
    example = tf.train.Example(features=tf.train.Features(feature=values))
    return bytes(example.SerializeToString(deterministic=True))


@pytest.mark.tf
@given(features=FEATURE_DICTS)
def test_examples_are_tensorflows_bytes(tf: ModuleType, features: dict[str, FeatureValue]) -> None:
    assert encode_example(features) == serialize_with_tensorflow(tf, features)


def test_features_sort_the_same_in_every_protobuf() -> None:
    assert has_no_prefixes(FEATURES)


@pytest.mark.tf
@pytest.mark.parametrize("size", [127, 128, 16_383, 16_384, 16_385, 2_097_151, 2_097_152])
def test_examples_of_every_length_are_tensorflows_bytes(tf: ModuleType, size: int) -> None:
    for shift in range(-40, 10):  # the headers around the value have lengths of their own
        features: dict[str, FeatureValue] = {"image_raw": bytes(max(0, size + shift)), "id": b"a"}
        assert encode_example(features) == serialize_with_tensorflow(tf, features)
        if size > 20_000:
            break


@given(FEATURE_DICTS)
def test_examples_come_back(features: dict[str, FeatureValue]) -> None:
    decoded = decode_example(encode_example(features))
    assert list(decoded) == sorted(features, key=lambda name: name.encode() + b"\xff")
    for name, value in features.items():
        assert bytes(decoded[name]) == bytes(value)  # type: ignore[arg-type]
        assert getattr(decoded[name], "dtype", None) == getattr(value, "dtype", None)


@given(TENSORS)
def test_tensors_come_back(voxels: Array) -> None:
    decoded = decode_tensor(tensor_bytes(voxels))
    assert (decoded.shape, decoded.dtype) == (voxels.shape, voxels.dtype)
    assert decoded.tobytes() == voxels.tobytes()


def test_pieces_of_a_value_are_one_value() -> None:
    pieces = (b"ab", memoryview(b"cd"), b"")
    assert encode_example({"x": pieces}) == encode_example({"x": b"abcd"})


@given(st.data())
def test_damaged_bytes_are_shard_errors_and_nothing_else(data: st.DataObject) -> None:
    if data.draw(st.booleans()):
        content = bytearray(data.draw(st.binary(max_size=60)))
    else:
        voxels = tensor_bytes(np.ones((2, 3, 1), np.float32))
        features = {"image_raw": voxels, "label": LABEL, "label/sex": np.array([-1, 300])}
        content = bytearray(encode_example(features))
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        content = content[: data.draw(st.integers(0, len(content)))]
    for decode in (decode_example, decode_tensor):
        with contextlib.suppress(ShardError):
            decode(bytes(content))
    for value in _values(bytes(content)):
        with contextlib.suppress(ShardError):
            decode_tensor(value)


LABEL = np.array([1], np.float32)


def _values(content: bytes) -> list[memoryview]:
    with contextlib.suppress(ShardError):
        return [v for v in decode_example(content).values() if isinstance(v, memoryview)]
    return []


@pytest.mark.parametrize(
    "content",
    [
        b"\x0a",  # a length is missing
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # more than there is
        b"\x80" * 30,  # a number without an end
        b"\x0b",  # a group, which is not used any more
        b"\x08\x05",  # a number where features should stand
        b"\x0a\x05\x0a\x03\x0a\x01\xff",  # a name that is not text
    ],
)
def test_what_is_no_example(content: bytes) -> None:
    with pytest.raises(ShardError):
        decode_example(content)


def test_what_is_no_tensor() -> None:
    good = tensor_bytes(np.ones((2, 3, 1), np.float32))
    huge = b"\x08\x01\x12\x0d\x12\x0b\x08" + b"\xff" * 9 + b"\x01" + b"\x22\x04abcd"
    for content in (b"", good[:-1], b"\x08\x63" + good[2:], huge, good + b"\x12\x04\x12\x02\x08\x07"):
        with pytest.raises(ShardError, match=r"not a tensor|not an Example"):
            decode_tensor(content)


@pytest.mark.tf
@pytest.mark.parametrize("voxel_dtype", ["float32", "native"])
@pytest.mark.parametrize("slope", [None, 2.0])
def test_a_volume_is_read_by_tensorflow(
    tf: ModuleType, tmp_path: Path, voxel_dtype: str, slope: float | None
) -> None:
    path = write_image(tmp_path / "a.nii.gz", slope=slope, inter=1.0)
    volume = load_volume(row_of(path, label=0.1))
    volume = rescale_volume(volume, RecordConfig(voxel_dtype=voxel_dtype))
    data = bytes(encode_volume(volume))

    def feature(kind: str) -> Any:
        size = [int(kind[6:-1])] if kind.startswith("float[") else []
        return tf.io.FixedLenFeature(size, tf.string if kind == "bytes" else tf.float32)

    scaled = voxel_dtype == "native" and slope is not None
    expected = {n for n in FEATURES if scaled or not n.startswith("scl_")}
    assert set(decode_example(data)) == expected
    parsed = tf.io.parse_single_example(data, {n: feature(FEATURES[n]) for n in expected})
    voxels = tf.io.parse_tensor(parsed["image_raw"], volume.voxels.dtype).numpy()
    assert np.array_equal(voxels, volume.voxels)
    assert parsed["label"].numpy() == np.float32(0.1)
    assert parsed["id"].numpy() == b"sub-01"
    assert np.array_equal(parsed["affine"].numpy(), AFFINE.ravel().astype(np.float32))
    assert parsed["zooms"].numpy().tolist() == [2.0, 2.0, 2.5]
    assert parsed["intensity_min"].numpy() == np.float32(volume.intensities[0].min)
    assert parsed["intensity_max"].numpy() == np.float32(volume.intensities[0].max)
    if scaled:
        scaling = [np.frombuffer(parsed[n].numpy(), "<f8") for n in ("scl_slope", "scl_inter")]
        assert scaling == [2.0, 1.0]


def test_an_example_that_protobuf_cannot_read_is_refused_and_not_made(tmp_path: Path) -> None:
    with mmap.mmap(-1, 2**31) as unused, memoryview(unused) as content, content[:-100] as voxels:
        tracemalloc.start()
        try:
            with pytest.raises(
                VolumeError, match=r"takes 2,147,483,\d\d\d bytes, more than protobuf can read"
            ):
                encode_example({"image_raw": (b"head", voxels), "id": bytes(80)})
            assert tracemalloc.get_traced_memory()[1] < 20_000
        finally:
            tracemalloc.stop()


def test_the_largest_example_is_allowed_and_one_byte_more_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    features: dict[str, FeatureValue] = {"image_raw": (b"head", bytes(1000)), "label": LABEL}
    size = len(encode_example(features))
    monkeypatch.setattr(example, "MAX_EXAMPLE_BYTES", size)
    assert len(encode_example(features)) == size
    monkeypatch.setattr(example, "MAX_EXAMPLE_BYTES", size - 1)
    with pytest.raises(VolumeError, match=f"takes {size:,} bytes"):
        encode_example(features)


def test_the_largest_example_is_one_that_protobuf_reads() -> None:
    assert MAX_EXAMPLE_BYTES <= 2**31 - 1 - 16


def test_an_unlabelled_volume_has_a_label_that_is_no_number(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nii")
    volume = rescale_volume(load_volume(row_of(path, label=None)), RecordConfig())
    label = decode_example(bytes(encode_volume(volume)))["label"]
    assert isinstance(label, np.ndarray)
    assert math.isnan(label[0])


def test_the_voxels_are_copied_once_and_never_on_the_way_back(tmp_path: Path) -> None:
    voxels = brain((128, 128, 64))
    path = write_image(tmp_path / "a.nii", voxels)
    volume = rescale_volume(load_volume(row_of(path)), RecordConfig())
    assert volume.voxels.nbytes == 4 << 20
    tracemalloc.start()
    try:
        data = bytes(encode_volume(volume))
        encoding = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        raw = decode_example(data)["image_raw"]
        assert isinstance(raw, memoryview)
        decoded = decode_tensor(raw)
        decoding = tracemalloc.get_traced_memory()[1] - len(data)
    finally:
        tracemalloc.stop()
    assert encoding < volume.voxels.nbytes + 20_000
    assert decoding < 20_000
    assert np.shares_memory(decoded, np.frombuffer(data, np.uint8))
    assert np.array_equal(decoded, volume.voxels)
