"""Damaged and lying images: a right record or a clean refusal, soon and in little memory.

500 cases run with the other tests; more at night, each time others:

    pytest tests/volume/test_fuzz.py --hypothesis-profile=nightly
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import signal
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.freesurfer.mghformat import header_dtype as mgh_dtype
from nibabel.spm2analyze import Spm2AnalyzeHeader, Spm2AnalyzeImage

from beam_nifti.config import RecordConfig
from beam_nifti.errors import VolumeError
from beam_nifti.record.example import decode_example, decode_tensor, encode_volume
from beam_nifti.volume import load_volume, rescale_volume
from tests.images import AFFINE, REAL_DTYPES, Array, nifti_header, random_voxels, row_of

CONFIG = RecordConfig(frames="all")
SECONDS = 10
"""A case may not take longer."""

FIXED_BYTES = 2 << 20
"""What a case may take besides three times its files, inflated; of MGH it is half room for a footer."""

KINDS = {
    "nifti1": nib.Nifti1Header().template_dtype,
    "nifti2": nib.Nifti2Header().template_dtype,
    "pair1": nib.Nifti1Header().template_dtype,
    "pair2": nib.Nifti2Header().template_dtype,
    "analyze": Spm2AnalyzeHeader().template_dtype,
    "mgh": mgh_dtype,
}
"""The fields of their headers."""

PACK: dict[str, Callable[[bytes, int], bytes]] = {
    "": lambda data, _: data,
    ".gz": lambda data, level: gzip.compress(data, level, mtime=0),
    ".bz2": lambda data, level: bz2.compress(data, max(1, level)),
    ".zst": lambda data, level: zstandard.ZstdCompressor(level, write_checksum=level > 0).compress(data),
}


def unpack(data: bytes, magic: bytes, make: Callable[[], Any]) -> bytes:
    """What the streams of a file hold, without what follows them."""
    content = b""
    while data.lstrip(b"\0").startswith(magic):
        stream = make()
        content += stream.decompress(data.lstrip(b"\0"))
        data = stream.unused_data
    return content


UNPACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": lambda data: unpack(data, b"\x1f\x8b", lambda: zlib.decompressobj(wbits=31)),
    ".bz2": lambda data: unpack(data, b"BZh", bz2.BZ2Decompressor),
    ".zst": lambda data: unpack(data, b"\x28\xb5\x2f\xfd", zstandard.ZstdDecompressor().decompressobj),
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
def _header_edits(draw: st.DrawFn, kind: str) -> tuple[int, bytes]:
    """Where in the header, and what."""
    field, start = KINDS[kind].fields[draw(st.sampled_from(sorted(KINDS[kind].names)))][:2]
    size = field.itemsize
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


def _header(kind: str, voxels: Array, order: str, slope: float | None) -> bytes:
    """A header of some voxels, up to where they start."""
    if kind == "mgh":
        return nib.MGHImage(voxels, AFFINE).to_bytes()[:284]
    if kind == "analyze":
        header = Spm2AnalyzeHeader(endianness=order)
        header.set_data_dtype(voxels.dtype)
        header.set_data_shape(voxels.shape)
        header["scl_slope"] = slope or 0.0
        return bytes(header.binaryblock)
    version = int(kind[-1])
    fields = {"magic": f"ni{version}".encode(), "vox_offset": 0} if kind.startswith("pair") else {}
    return nifti_header(voxels, byte_order=order, version=version, slope=slope, fields=fields)


@st.composite
def images(draw: st.DrawFn) -> tuple[dict[str, bytes], int]:
    """The files of an image by their endings, and how many bytes they hold when they are inflated."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    dtypes = {
        "mgh": ("uint8", "int16", "int32", "float32"),
        "analyze": ("uint8", "int16", "int32", "float64"),
    }
    shape = draw(st.lists(st.integers(1, 6), min_size=3, max_size=3)) + draw(st.sampled_from([[], [2], [6]]))
    voxels = random_voxels(
        shape, draw(st.sampled_from(dtypes.get(kind, REAL_DTYPES))), draw(st.integers(0, 9))
    )
    order = ">" if kind == "mgh" else draw(st.sampled_from("<>"))
    slope = draw(st.sampled_from([None, 1.0, 0.5, -2.0, float("nan")]))
    head = bytearray(_header(kind, voxels, order, slope))
    for at, content in draw(st.lists(_header_edits(kind), max_size=3)):
        head[at : at + len(content)] = content
    data = voxels.astype(voxels.dtype.newbyteorder(order)).tobytes(order="F")
    if kind in ("nifti1", "nifti2", "mgh"):
        held = {".mgh" if kind == "mgh" else ".nii": bytes(head) + data}
    else:
        held = {".hdr": bytes(head), ".img": data}
    damaged = draw(st.sampled_from([None, *held]))
    if damaged:
        held[damaged] = draw(_damages(held[damaged]))
    files = dict[str, bytes]()
    for ending, content in held.items():
        packed = draw(st.sampled_from(sorted(PACK)))
        files[ending + packed] = PACK[packed](content, draw(st.sampled_from([0, 1, 9])))
    damaged = draw(st.sampled_from([None, *(ending for ending in files if ending not in held)]))
    if damaged:
        files[damaged] = draw(_damages(files[damaged]))
    return files, sum(map(len, held.values())) + sum(map(len, files.values()))


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


def expected(files: dict[str, bytes]) -> Array:
    """The voxels of the record of an image, by nibabel and one line of arithmetic."""
    head, *rest = (UNPACK.get(f".{ending.split('.')[-1]}", bytes)(files[ending]) for ending in sorted(files))
    data = rest[0] if rest else head
    # Its own choice of the class looks for NIfTI-1's magic before the size of the header.
    is_second = 540 in (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big"))
    kind: Any
    if ".mgh" in next(iter(files)):
        kind, size = nib.MGHImage, mgh_dtype.itemsize
    elif len(files) == 1:
        kind, size = (nib.Nifti2Image, 540) if is_second else (nib.Nifti1Image, 348)
    elif is_second:
        kind, size = nib.Nifti2Pair, 540
    else:
        kind, size = nib.Nifti1Pair if head[344:348] == b"ni1\0" else Spm2AnalyzeImage, 348
    with np.errstate(all="ignore"):
        header = kind.header_class(head[:size])
        values = np.asarray(kind.ImageArrayProxy(io.BytesIO(data), header))
        while values.ndim > 3 and values.shape[-1] == 1:
            values = values[..., 0]
        # Python's integers do not overflow, nor do long doubles.
        values = values.astype(object if values.dtype.kind in "iu" else np.longdouble)
        low, high = values.min(), values.max()
        return ((values - low) / (high - low)).astype(np.float64).astype(np.float32)


@pytest.mark.slow
def test_any_file_is_a_right_record_or_a_clean_refusal(tmp_path: Path) -> None:
    outcomes = Counter[str]()

    @settings(max_examples=max(500, settings().max_examples))
    @given(images(), st.integers(0, 1))
    def check(image: tuple[dict[str, bytes], int], named: int) -> None:
        files, size = image
        for old in tmp_path.iterdir():
            old.unlink()
        for ending, content in files.items():
            (tmp_path / f"a{ending}").write_bytes(content)
        path = tmp_path / f"a{[*files][named % len(files)]}"
        try:
            with bounds(size):
                volume = rescale_volume(load_volume(row_of(path), record=CONFIG), CONFIG)
                record = bytes(encode_volume(volume))
        except VolumeError as e:
            message = str(e)
            assert message.startswith(f"{path}: ")
            assert message.isprintable()
            assert len(message) < len(str(path)) + 400
            outcomes["refused"] += 1
            return
        voxels = decode_tensor(decode_example(record)["image_raw"])  # type: ignore[arg-type]
        np.testing.assert_array_max_ulp(voxels.astype(np.float32), expected(files), 1)
        outcomes["read"] += 1

    check()
    print(dict(outcomes))
    assert min(outcomes["read"], outcomes["refused"]) > sum(outcomes.values()) / 10


def test_too_much_memory_would_be_noticed() -> None:
    with pytest.raises(AssertionError), bounds(0):
        np.ones(2 * FIXED_BYTES, np.uint8)
