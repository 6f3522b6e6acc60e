"""Headers that disagree with themselves or with their files give nibabel's voxels, or are refused."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.spm2analyze import Spm2AnalyzeHeader

from beam_nifti.config import RecordConfig
from beam_nifti.errors import VolumeError
from beam_nifti.volume.volume import Volume, load_header, load_volume
from tests.images import AFFINE, Array, brain, nifti_bytes, nifti_header, numbers_of, row_of

WHOLE = RecordConfig(frames="all")
LONG = 4000
"""Bytes of the voxels' files: more than what most headers promise, and all of it different."""

MAGICS = (b"n+1\0", b"ni1\0", b"n+2\0", b"ni2\0", b"\0\0\0\0", b"n+3\0")
SHORTS = (-32768, -5, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 27307, 256, 768, 1280, 32767)
DECIMALS = (0.0, -0.0, 1.0, -1.0, 0.5, 3e38, 1e-45, np.nan, np.inf, -np.inf)
FIELDS: dict[str, tuple[Any, ...]] = {
    "sizeof_hdr": (0, 348, 540, 352, 1543569408, 469893120),
    "dim": SHORTS,
    "datatype": (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2304, 3, 255, 1024),
    "bitpix": (0, 1, 8, 16, 32, 64, 24, 96, -8),
    "pixdim": DECIMALS,
    "vox_offset": (0, 1, 16, 347, 348, 351, 352, 352.5, 353, 368, 540, 544, 560, -1, 1e9, np.nan),
    "scl_slope": DECIMALS,
    "scl_inter": DECIMALS,
    "cal_max": DECIMALS,
    "glmax": (0, 5, 255),
    "glmin": (0, 1, 24),
    "intent_code": (0, 1007, 3001, -1),
    "qform_code": (0, 1, 9, -1),
    "eol_check": (0, 10, 13),
}


@pytest.fixture(autouse=True)
def _without_nibabels_remarks() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
        yield
    logging.disable(logging.NOTSET)


def with_nibabel(path: Path) -> Array | None:
    """Nibabel's values; None where it refuses the image."""
    try:
        return numbers_of(np.asanyarray(nib.load(path).dataobj))
    except Exception:
        return None


def with_us(path: Path) -> Volume | str:
    """The volume, or why there is none."""
    try:
        return load_volume(row_of(path), record=WHOLE)
    except VolumeError as e:
        return str(e)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A header of some kind, of which some fields hold something else."""
    kind = draw(st.sampled_from(["nifti1", "nifti2", "analyze"]))
    order = draw(st.sampled_from("<>"))
    dtype = draw(st.sampled_from(["uint8", "int16", "float32", "uint64"]))
    voxels = np.zeros(draw(st.sampled_from([(3, 4, 5), (3, 4, 5, 2), (2, 2, 2, 1, 3)])), dtype)
    header: Any
    if kind == "analyze":
        header = Spm2AnalyzeHeader(endianness=order)
        header.set_data_dtype("uint8")
        header.set_data_shape(voxels.shape)
    else:
        version = int(kind[-1])
        magic = draw(st.sampled_from([b"n+%d" % version, b"ni%d" % version] * 3 + [*MAGICS]))
        fields = {"magic": magic, "vox_offset": draw(st.sampled_from([0, 352, 544, 544]))}
        data = nifti_header(voxels, version=version, byte_order=order, fields=fields)[:-4]
        header = (nib.Nifti1Header if version == 1 else nib.Nifti2Header)(data, order, check=False)
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=2)):
        if name in header:
            value = draw(st.sampled_from(FIELDS[name]))
            field = header[name]
            if field.dtype.kind in "iu":
                value = 0 if not np.isfinite(value) else int(np.int64(value).astype(field.dtype))
            if field.ndim:
                field[draw(st.integers(0, field.size - 1))] = value
            else:
                header[name] = value
    return bytes(header.binaryblock)


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(headers(), st.sampled_from(["a.nii", "a.hdr", "a.img"]), st.sampled_from([LONG, LONG, LONG, 50]))
def check_headers(folder: Path, outcomes: Counter[str], header: bytes, name: str, size: int) -> None:
    for old in folder.iterdir():
        old.unlink()
    data = np.random.default_rng(0).bytes(size)
    no_extension = bytes(4)
    if name == "a.nii":
        (folder / name).write_bytes(header + no_extension + data)
    else:
        (folder / "a.hdr").write_bytes(header + no_extension)
        (folder / "a.img").write_bytes(data)
    ours, theirs = with_us(folder / name), with_nibabel(folder / name)
    if isinstance(ours, str):
        assert ours.startswith(f"{folder / name}: ")
        outcomes["refused by both" if theirs is None else "refused"] += 1
        return
    outcomes["read"] += 1
    assert theirs is not None
    values = ours.scaling.apply(ours.voxels)
    assert values.shape == theirs.shape
    assert values.tobytes() == theirs.astype(np.float64).tobytes()


def test_any_header_gives_nibabels_voxels_or_is_refused(tmp_path: Path) -> None:
    outcomes = Counter[str]()
    check_headers(tmp_path, outcomes)
    assert outcomes["read"] > outcomes.total() / 4
    assert outcomes["refused"] < outcomes["read"] / 3


def test_the_files_decide_where_voxels_are_and_not_the_magic_string(tmp_path: Path) -> None:
    """As in nibabel: programs that rename images, or split them, leave the magic string of the other kind."""
    for version, offset in ((1, 352), (1, 1024), (2, 544)):
        fields = {"magic": f"ni{version}".encode(), "vox_offset": offset}
        data = nifti_header(brain(), version=version, fields=fields).ljust(offset, b"\0")
        path = tmp_path / "single.nii"
        path.write_bytes(data + brain().tobytes(order="F"))
        for header in (load_header(row_of(path)), load_volume(row_of(path))):
            assert np.array_equal(header.affine, AFFINE)
        assert np.array_equal(load_volume(row_of(path)).voxels, np.asanyarray(nib.load(path).dataobj))
    for version, offset in ((1, 0), (1, 352), (1, 1024), (2, 0), (2, 544)):
        fields = {"magic": f"n+{version}".encode(), "vox_offset": offset}
        path = tmp_path / "pair.hdr"
        path.write_bytes(nifti_header(brain(), version=version, fields=fields))
        path.with_suffix(".img").write_bytes(bytes(offset) + brain().tobytes(order="F"))
        load_header(row_of(path))
        assert np.array_equal(load_volume(row_of(path)).voxels, brain())
        assert np.array_equal(brain(), np.asanyarray(nib.load(path).dataobj))


def no_magic() -> bytes:
    return nifti_bytes(brain(), fields={"magic": b""})


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "a.nii",
            lambda: nifti_bytes(brain(), fields={"vox_offset": 0}),
            "start at byte 0, inside the header",
        ),
        (
            "a.nii",
            lambda: nifti_bytes(brain(), fields={"magic": b"ni1", "vox_offset": 16}),
            r"header of an \.hdr/\.img pair without its voxels; copy the \.img file",
        ),
        ("a.nii", no_magic, "an ANALYZE header, or a NIfTI header without its magic string, in a single"),
        ("a.img", no_magic, r"header of an \.hdr/\.img pair without its voxels"),
        (
            "a.hdr",
            lambda: nifti_bytes(brain(), fields={"magic": b"ni1"}),
            r"header of an \.hdr/\.img pair without its voxels",
        ),
    ],
)
def test_voxels_that_could_be_anywhere_are_refused(
    tmp_path: Path, name: str, data: Callable[[], bytes], message: str
) -> None:
    (tmp_path / name).write_bytes(data())
    for load in (load_volume, load_header):
        with pytest.raises(VolumeError, match=message):
            load(row_of(tmp_path / name))


def test_a_header_with_another_size_in_it_is_read_by_its_magic_string(tmp_path: Path) -> None:
    for size in (0, 352, 1543569408):
        path = tmp_path / "a.nii"
        path.write_bytes(nifti_bytes(brain(), fields={"sizeof_hdr": size}))
        volume = load_volume(row_of(path))
        assert np.array_equal(volume.voxels, np.asanyarray(nib.load(path).dataobj))
        assert np.array_equal(volume.affine, nib.load(path).affine)
