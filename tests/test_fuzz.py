"""Damaged and lying images: a right record or a clean refusal, soon and in little memory.

500 cases run with the other tests; more at night, each time others:

    pytest tests/test_fuzz.py --hypothesis-profile=nightly
"""

from __future__ import annotations

import contextlib
import gzip
import signal
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_nifti.config import RecordConfig
from beam_nifti.errors import VolumeError
from beam_nifti.example import decode_example, decode_tensor, encode_volume
from beam_nifti.volume import load_volume, rescale_volume
from tests.images import REAL_DTYPES, Array, nifti_bytes, random_voxels, row_of

CONFIG = RecordConfig(frames="all")
SECONDS = 10
"""A case may not take longer."""

FIXED_BYTES = 1 << 20
"""What a case may take besides three times its file, inflated."""

_ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")
_FIELDS = {
    version: {name: (kind.fields[name][1], kind.fields[name][0].itemsize) for name in kind.names}
    for version, kind in ((1, nib.Nifti1Header().template_dtype), (2, nib.Nifti2Header().template_dtype))
}
_SHORTS = [0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 64, 128, 255, 256, 348, 512, 540, 768, 1024, 2304, 32767, -32768]
_INTEGERS = [*_SHORTS, 2**31 - 1, -(2**31)]
_DECIMALS = [0.0, -0.0, 1.0, -1.0, 352.0, 1e-45, 3e38, -3e38, float("nan"), float("inf"), float("-inf")]


def _values(size: int) -> st.SearchStrategy[bytes]:
    """Contents of a header field: of its size, telling ones or any."""
    kinds = {"i2": _SHORTS, "i4": _INTEGERS, "i8": _INTEGERS, "f4": _DECIMALS, "f8": _DECIMALS}
    telling = [
        np.array(value, order + kind).tobytes()[:size]
        for kind, values in kinds.items()
        for value in values
        for order in "<>"
    ]
    return st.sampled_from(telling) | st.binary(min_size=1, max_size=size)


@st.composite
def _header_edits(draw: st.DrawFn, version: int) -> tuple[int, bytes]:
    """Where in the header, and what."""
    start, size = _FIELDS[version][draw(st.sampled_from(sorted(_FIELDS[version])))]
    content = draw(_values(min(size, 8)))
    return start + draw(st.integers(0, max(0, size - len(content)))), content


@st.composite
def _damages(draw: st.DrawFn, data: bytes) -> bytes:
    """What copying and storing do to a file."""
    at = draw(st.integers(0, len(data)))
    kind = draw(st.sampled_from(["cut", "flip", "drop", "repeat", "append"]))
    if kind == "cut":
        return data[:at]
    if kind == "flip":
        return (
            data[:at] + bytes(byte ^ draw(st.integers(1, 255)) for byte in data[at : at + 1]) + data[at + 1 :]
        )
    length = draw(st.integers(1, 600))
    if kind == "drop":
        return data[:at] + data[at + length :]
    if kind == "repeat":
        return data[:at] + data[at : at + length] + data[at:]
    return data + draw(st.sampled_from([bytes(length), bytes(5000), b"x" * length, gzip.compress(data)]))


@st.composite
def images(draw: st.DrawFn) -> tuple[bytes, int]:
    """A file, and how many bytes it holds when it is inflated."""
    shape = draw(st.lists(st.integers(1, 6), min_size=3, max_size=4))
    version = draw(st.sampled_from([1, 2]))
    voxels = random_voxels(shape, draw(st.sampled_from(REAL_DTYPES)), draw(st.integers(0, 9)))
    slope = draw(st.sampled_from([None, 1.0, 0.5, -2.0, float("nan")]))
    data = bytearray(
        nifti_bytes(voxels, byte_order=draw(st.sampled_from("<>")), version=version, slope=slope)
    )
    for at, content in draw(st.lists(_header_edits(version), max_size=3)):
        data[at : at + len(content)] = content
    content = bytes(data)
    for _ in range(draw(st.integers(0, 1))):
        content = draw(_damages(content))
    if not draw(st.booleans()):
        return content, len(content)
    packed = gzip.compress(content, draw(st.sampled_from([0, 1, 9])), mtime=0)
    if draw(st.booleans()):
        packed = draw(_damages(packed))
    return packed, len(content) + len(packed)


@contextlib.contextmanager
def bounds(num_bytes: int) -> Iterator[None]:
    """Neither long nor large."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert peak < 3 * num_bytes + FIXED_BYTES


def expected(data: bytes) -> Array:
    """The voxels of the record of an image, by nibabel and one line of arithmetic."""
    # Its own choice of the class looks for NIfTI-1's magic before the size of the header.
    kind = (
        nib.Nifti2Image if 540 in (int.from_bytes(data[:4], order) for order in _ORDERS) else nib.Nifti1Image
    )
    with np.errstate(all="ignore"):
        values = np.asarray(kind.from_bytes(data).dataobj)
        while values.ndim > 3 and values.shape[-1] == 1:
            values = values[..., 0]
        # Python's integers do not overflow, nor do long doubles.
        values = values.astype(object if values.dtype.kind in "iu" else np.longdouble)
        low, high = values.min(), values.max()
        return ((values - low) / (high - low)).astype(np.float64).astype(np.float32)


def test_any_file_is_a_right_record_or_a_clean_refusal(tmp_path: Path) -> None:
    outcomes = Counter[str]()

    @settings(max_examples=max(500, settings().max_examples))
    @given(images())
    def check(image: tuple[bytes, int]) -> None:
        content, size = image
        path = tmp_path / ("a.nii.gz" if content[:2] == b"\x1f\x8b" else "a.nii")
        path.write_bytes(content)
        try:
            with bounds(size):
                volume = rescale_volume(load_volume(row_of(path), record=CONFIG), CONFIG)
                record = encode_volume(volume)
        except VolumeError as e:
            message = str(e)
            assert message.startswith(f"{path}: ")
            assert message.isprintable()
            assert len(message) < len(str(path)) + 400
            outcomes["refused"] += 1
            return
        inflated = gzip.decompress(content) if path.suffix == ".gz" else content
        voxels = decode_tensor(decode_example(record)["image_raw"])  # type: ignore[arg-type]
        np.testing.assert_array_max_ulp(voxels.astype(np.float32), expected(inflated), 1)
        outcomes["read"] += 1

    check()
    print(dict(outcomes))
    assert min(outcomes["read"], outcomes["refused"]) > sum(outcomes.values()) / 10


def test_too_much_memory_would_be_noticed() -> None:
    with pytest.raises(AssertionError), bounds(0):
        np.ones(2 * FIXED_BYTES, np.uint8)
