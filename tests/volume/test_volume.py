"""Images: what nibabel reads is read equally; what is no such image is refused by name."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import lzma
import math
import os
import tarfile
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from beam_nifti.config import RecordConfig
from beam_nifti.errors import VolumeError
from beam_nifti.record.example import MAX_EXAMPLE_BYTES, encode_volume
from beam_nifti.storage.paths import Stat
from beam_nifti.volume.header import MAX_VOLUME_BYTES
from beam_nifti.volume.volume import Volume, load_header, load_volume, rescale_volume
from tests.images import (
    AFFINE,
    REAL_DTYPES,
    Array,
    brain,
    nifti_bytes,
    nifti_header,
    random_voxels,
    row_of,
    write_image,
)
from tests.peak import peak_mib

SCALINGS: dict[str, dict[str, float | None]] = {
    "none": {"slope": None},
    "slope 0 with inter": {"slope": 0.0, "inter": 5.0},
    "NaN": {"slope": np.nan, "inter": np.nan},
    "infinite slope": {"slope": np.inf},
    "identity": {"slope": 1.0, "inter": 0.0},
    "slope": {"slope": 0.1},
    "slope and inter": {"slope": 2.5, "inter": -1024.0},
    "negative slope": {"slope": -0.3, "inter": 7.7},
    "only inter": {"slope": 1.0, "inter": -0.1},
}


def load_with_nibabel(path: Path) -> tuple[Array, Array, tuple[float, ...]]:
    with warnings.catch_warnings(action="ignore"):
        image = nib.load(path)
        return np.asanyarray(image.dataobj), image.affine, image.header.get_zooms()


def assert_as_nibabel(volume: Volume, path: Path) -> None:
    """Values, affine and zooms are nibabel's, bit for bit."""
    values, affine, zooms = load_with_nibabel(path)
    assert volume.voxels.flags.c_contiguous
    assert volume.voxels.dtype.isnative
    assert volume.voxels.shape == values.shape
    if volume.scaling.is_identity:
        assert volume.voxels.dtype == values.dtype.newbyteorder("=")
        assert volume.voxels.tobytes() == values.astype(volume.voxels.dtype).tobytes()
    assert volume.scaling.apply(volume.voxels).tobytes() == values.astype(np.float64).tobytes()
    assert np.array_equal(volume.affine, affine)
    assert volume.zooms == tuple(map(float, zooms))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_every_real_image_is_read_as_nibabel_reads_it(tmp_path: Path, dtype: str, scaling: str) -> None:
    voxels = random_voxels((5, 4, 3), dtype)
    for version, order, suffix in itertools.product((1, 2), "<>", (".nii", ".nii.gz")):
        name = f"{version}{order}{suffix}"
        path = write_image(tmp_path / name, voxels, version=version, byte_order=order, **SCALINGS[scaling])
        volume = load_volume(row_of(name), str(tmp_path))
        assert_as_nibabel(volume, path)
        assert volume.dtype == dtype
        assert volume.source.files == ((Stat(path.stat().st_size, path.stat().st_mtime),),)
        assert volume.source.shape == volume.voxels.shape


def test_minus_zero_is_scaled_as_nibabel_does(tmp_path: Path) -> None:
    voxels = np.array([[[-0.0, 0.0, 1.0]]], np.float32)
    for slope, inter in ((1.0, 0.0), (2.0, 0.0), (-2.0, 0.0), (1.0, 1.0)):
        path = write_image(tmp_path / "a.nii", voxels, slope=slope, inter=inter)
        assert_as_nibabel(load_volume(row_of(path)), path)


def test_scaling_that_nibabel_needs_a_long_double_for_is_refused(tmp_path: Path) -> None:
    voxels = np.array([[[0, 1, 65535]]], np.uint16)
    path = write_image(tmp_path / "a.nii", voxels, version=2, slope=1e305)
    volume = load_volume(row_of(path))
    with np.errstate(over="ignore"), pytest.raises(VolumeError, match=r"a\.nii: scaling .*infinite"):
        rescale_volume(volume, RecordConfig())


ORIENTATIONS: dict[str, dict[str, Any]] = {
    "neither": {"affine": None},
    "sform": {},
    "oblique sform": {"affine": AFFINE @ nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, 0.2, 0.1))},
    "qform": {
        "affine": None,
        "fields": {
            "qform_code": 1, "quatern_b": 0.1, "quatern_c": -0.2, "quatern_d": 0.3,
            "qoffset_x": -90, "qoffset_y": 12, "pixdim": [-1, 1.5, 2.5, 3, 1, 1, 1, 1],
        },
    },
    "both": {"fields": {"qform_code": 2, "quatern_d": 1, "qoffset_z": 9}},
    "qfac 0": {"affine": None, "fields": {"qform_code": 1, "pixdim": [0, 2, 2, 2, 0, 0, 0, 0]}},
    "negative pixdim": {"fields": {"pixdim": [1, -2, 2, 2.5, 0, 0, 0, 0]}},
}  # fmt: skip


@pytest.mark.parametrize("kind", ORIENTATIONS)
@pytest.mark.parametrize("version", [1, 2])
def test_every_orientation_is_nibabels(tmp_path: Path, kind: str, version: int) -> None:
    path = write_image(tmp_path / "a.nii", version=version, **ORIENTATIONS[kind])
    assert_as_nibabel(load_volume(row_of(path)), path)


@pytest.mark.parametrize("offset", [352, 353, 368, 1000, 70_000])
def test_voxels_start_where_the_header_says(tmp_path: Path, offset: int) -> None:
    voxels = random_voxels()
    header = nifti_header(voxels, fields={"vox_offset": offset})
    data = header.ljust(offset, b"\x55") + voxels.tobytes(order="F")
    for name, content in (("a.nii", data), ("a.nii.gz", gzip.compress(data))):
        (tmp_path / name).write_bytes(content)
        assert np.array_equal(load_volume(row_of(tmp_path / name)).voxels, voxels)


@pytest.mark.parametrize("size", [8, 300, 100_000])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_header_extensions_are_passed_over(tmp_path: Path, size: int, version: int, suffix: str) -> None:
    image = (nib.Nifti1Image if version == 1 else nib.Nifti2Image)(brain(), AFFINE)
    for code in (4, 6):  # AFNI's attributes, a comment
        image.header.extensions.append(nib.nifti1.Nifti1Extension(code, b"x" * size))
    path = tmp_path / f"a{suffix}"
    nib.save(image, path)
    assert_as_nibabel(load_volume(row_of(path)), path)
    assert load_header(row_of(path)).offset > 2 * size


def test_a_damaged_extension_does_not_matter(tmp_path: Path) -> None:
    data = bytearray(nifti_bytes(brain(), fields={"vox_offset": 352}))
    data[348] = 1  # there is an extension, it says; there is none
    (tmp_path / "a.nii").write_bytes(data)
    assert np.array_equal(load_volume(row_of(tmp_path / "a.nii")).voxels, brain())


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 7), (300, 1, 1), (33, 34, 35)])
def test_any_3d_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    voxels = random_voxels(shape)
    for name in ("a.nii", "a.nii.gz"):
        path = write_image(tmp_path / name, voxels)
        assert_as_nibabel(load_volume(row_of(path)), path)


def test_the_content_tells_what_is_compressed_and_not_the_name(tmp_path: Path) -> None:
    data = nifti_bytes(brain())
    (tmp_path / "plain.nii.gz").write_bytes(data)
    (tmp_path / "packed.nii").write_bytes(gzip.compress(data))
    for name in ("plain.nii.gz", "packed.nii"):
        assert np.array_equal(load_volume(row_of(tmp_path / name)).voxels, brain())


def test_gzip_of_many_members_and_with_a_name_is_read(tmp_path: Path) -> None:
    path, data = tmp_path / "a.nii.gz", nifti_bytes(brain((20, 20, 20)))
    members = [gzip.compress(data[i : i + 999]) for i in range(0, len(data), 999)]
    path.write_bytes(b"".join(members) + bytes(512))  # padded, as tape and some archivers do
    assert_as_nibabel(load_volume(row_of(path)), path)
    with path.open("wb") as file, gzip.GzipFile("original.nii", "wb", fileobj=file) as handle:
        handle.write(data)
    assert_as_nibabel(load_volume(row_of(path)), path)


def test_paths_are_relative_to_the_manifest(tmp_path: Path) -> None:
    path = write_image(tmp_path / "site 1" / "ä.nii")
    row = row_of("site 1/ä.nii")
    assert load_volume(row, str(tmp_path)).row is row
    assert load_header(row, str(tmp_path)).shape == brain().shape
    assert load_volume(row_of(path), "/elsewhere").voxels.shape == brain().shape


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_the_header_alone_says_what_the_image_does(tmp_path: Path, suffix: str) -> None:
    voxels = random_voxels((60, 60, 60), "float32")  # more than what load_header reads
    path = write_image(tmp_path / f"a{suffix}", voxels, slope=2.0, inter=1.0, byte_order=">")
    header, volume = load_header(row_of(path)), load_volume(row_of(path))
    assert header.shape == volume.voxels.shape
    assert header.dtype.name == volume.dtype
    assert (header.scaling, header.zooms) == (volume.scaling, volume.zooms)
    assert np.array_equal(header.affine, volume.affine)
    assert header.num_bytes == voxels.nbytes


def pair(version: int) -> bytes:
    magic = b"ni1" if version == 1 else b"ni2"
    return nifti_header(brain(), version=version, fields={"magic": magic, "vox_offset": 0})


def analyze() -> bytes:
    header = nib.AnalyzeHeader()
    header.set_data_shape((4, 4, 4))
    return bytes(header.binaryblock)


def fields(**values: Any) -> bytes:
    return nifti_bytes(brain(), fields=values)


def fields2(**values: Any) -> bytes:
    return nifti_bytes(brain(), version=2, fields=values)


def flawed(*positions: int) -> bytes:
    affine = AFFINE.copy()
    affine.ravel()[list(positions)] = np.nan
    return fields(**{f"srow_{axis}": affine[i] for i, axis in enumerate("xyz")})


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 592\n" % (b"0" * 64)
ANNEX_POINTER = b"/annex/objects/SHA256E-s592--%s.nii.gz\n" % (b"0" * 64)


def zipped(name: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(name, bytes(900))
    return data.getvalue()


def tarred(name: str) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return data.getvalue()


def saved(voxels: Array) -> bytes:
    data = io.BytesIO()
    np.save(data, voxels)
    return data.getvalue()


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "an empty file; copy it again"),
    "one byte": (lambda: b"\x01", "1 bytes are less than a NIfTI header"),
    "unknown": (lambda: b"\x01\xff" * 500, "not a NIfTI, ANALYZE or MGH image; convert it"),
    "zeros": (lambda: bytes(5000), "zeros where a header should be, .*; copy it again"),
    "Git LFS": (lambda: LFS_POINTER, "a Git LFS pointer; run `git lfs pull`"),
    "git-annex": (lambda: ANNEX_POINTER, r"a git-annex pointer; run `git annex get` \(or"),
    "annex of FAT": (lambda: b"../.git" + ANNEX_POINTER, "a git-annex pointer; run `git annex get`"),
    "HTML": (lambda: b"\n<!DOCTYPE HTML>" * 100, "an HTML page, .*; download the file again"),
    "HTML at once": (lambda: b"<html lang='en'><head>", "an HTML page, .*; download the file again"),
    "XML": (lambda: b"<?xml version='1.0'?><Error>" * 30, "an XML file, .*; download the file again"),
    "GIFTI": (lambda: b'<?xml version="1.0"?>\n<!DOCTYPE GIFTI SYSTEM>', "a GIFTI file, .*; leave it out"),
    "MRtrix": (lambda: b"mrtrix image\ndim: 2,2,2\n", "an MRtrix image; convert it: mrconvert"),
    "macOS": (lambda: b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(900), "metadata of macOS .*; leave it out"),
    "HTML with a BOM": (lambda: b"\xef\xbb\xbf<html>", "an HTML page"),
    "text in UTF-8": (lambda: "Zugriff verweigert: für Gäste\n".encode(), "a text file; copy or download"),
    "text": (lambda: b"Access denied\r\n", "a text file; copy or download"),
    "DICOM": (lambda: bytes(128) + b"DICM\x02\0\0\0UL" + bytes(900), "a DICOM file; convert .* dcm2niix"),
    "old DICOM": (lambda: b"\x08\0\x05\0CS\x0a\0ISO_IR 100" + bytes(900), "a DICOM file; convert"),
    "zip": (lambda: zipped("a.dcm"), "a zip archive; extract the image from it, or convert the DICOM"),
    "tar": (lambda: tarred("a.nii"), "a tar archive; extract the image from it"),
    "gzip in gzip": (lambda: gzip.compress(gzip.compress(gzip.compress(nifti_bytes(brain())))), "twice; dec"),
    "xz": (lambda: lzma.compress(nifti_bytes(brain())), "an xz file; decompress it"),
    "NumPy": (lambda: saved(brain()), "a NumPy array; save it as NIfTI"),
    "MetaImage": (lambda: b"ObjectType = Image\nNDims = 3\n", "a MetaImage; convert it"),
    "PNG": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(900), "a picture .*; leave it out"),
    "pair": (lambda: pair(1), r"the header of an \.hdr/\.img pair without its voxels; copy the \.img file"),
    "NIfTI-2 pair": (lambda: pair(2), "pair without its voxels; copy"),
    "ANALYZE": (analyze, "an ANALYZE header, or .* without its magic string, in a single file; repair"),
    "MINC 1": (lambda: b"CDF\x01" + bytes(600), "a MINC image; convert it: nib-convert --out-dtype float32 "),
    "MINC 2": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(600), "MINC 2 image, install h5py, and convert"),
    "PAR": (lambda: b"# === DATA DESCRIPTION FILE" * 20, "PAR/REC pair; convert it: parrec2nii --comp"),
    "NRRD": (lambda: b"NRRD0004" * 99, "an NRRD image; convert"),
    "CIFTI": (lambda: fields2(intent_code=3001), "a CIFTI-2 file, .*; extract"),
    "1-D": (lambda: nifti_bytes(random_voxels((9,))), r"a 3-D image, got shape \(9,\); leave it out"),
    "2-D": (lambda: nifti_bytes(random_voxels((4, 4))), r"expected a 3-D image, got shape \(4, 4\)"),
    "4-D": (lambda: nifti_bytes(random_voxels((4, 3, 2, 7))), r"\(4, 3, 2, 7\); choose frames with --frames"),
    "5-D": (lambda: nifti_bytes(random_voxels((4, 3, 2, 1, 3))), r"shape \(4, 3, 2, 1, 3\); choose frames"),
    "no frames": (lambda: fields(dim=[4, 6, 5, 4, 0, 1, 1, 1]), r"shape \(6, 5, 4, 0\) has no voxels"),
    "no voxels": (lambda: fields(dim=[3, 4, 0, 4, 1, 1, 1, 1]), r"shape \(4, 0, 4\) has no voxels"),
    "negative": (lambda: fields(dim=[3, 4, -5, 4, 1, 1, 1, 1]), r"\(4, -5, 4\) has no voxels"),
    "no dimensions": (lambda: fields(dim=[0] * 8), "expected a 3-D image"),
    "6-D": (lambda: nifti_bytes(random_voxels((2, 2, 2, 1, 1, 3))), "expected a 3-D image, .*; extract"),
    "complex": (lambda: nifti_bytes(random_voxels(dtype="complex64")), "complex64 .* --complex magnitude"),
    "bits": (lambda: fields(datatype=1, bitpix=1), "data code 1 not supported"),
    "no dtype": (lambda: fields(datatype=0), "data code 0"),
    "odd dtype": (lambda: fields(datatype=2826), "data code 2826 not recognized"),
    "bad inter": (lambda: nifti_bytes(brain(), slope=2.0, inter=np.nan), "invalid intercept"),
    "NaN affine": (lambda: flawed(0, 7), "the affine is not finite; repair its sform or qform"),
    "offset in the header": (lambda: fields(vox_offset=12), "vox offset"),
    "huge offset": (lambda: fields(vox_offset=3e38), "vox_offset"),
    "far offset": (lambda: fields(vox_offset=2e9), "beyond any header extension; repair vox_offset"),
    "NaN offset": (lambda: fields(vox_offset=np.nan), "header is not valid"),
    "infinite offset": (lambda: fields(vox_offset=np.inf), "header is not valid"),
    "32767 cubed": (lambda: fields(dim=[3, *[32767] * 3, 1, 1, 1, 1]), "more than a record can hold"),
    "too long": (lambda: nifti_bytes(brain()) + b"x" * 4097, "holds more than the 592 bytes that shape"),
    "half the voxels": (lambda: nifti_bytes(brain())[:470], r"truncated: 470 bytes where shape \(6, 5, 4\)"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", REFUSED)
def test_other_files_are_refused_by_name(tmp_path: Path, kind: str, suffix: str) -> None:
    content, message = REFUSED[kind]
    data = content()
    path = tmp_path / f"sub-01{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    with pytest.raises(VolumeError, match=rf"^{path}: .*{message}"):
        load_volume(row_of(path))


def test_either_file_of_a_pair_may_be_a_pointer(tmp_path: Path) -> None:
    for suffix in ("", ".gz"):
        header, voxels = tmp_path / "a.hdr", tmp_path / f"a.img{suffix}"
        header.write_bytes(pair(1))
        voxels.write_bytes(LFS_POINTER)
        with pytest.raises(
            VolumeError, match=r"a\.hdr: its \.img file is a Git LFS pointer; run `git lfs pull`"
        ):
            load_volume(row_of(header))
        header.write_bytes(ANNEX_POINTER)
        for load in (load_header, load_volume):
            with pytest.raises(VolumeError, match=r"a\.hdr: a git-annex pointer; run `git annex get`"):
                load(row_of(header))
        voxels.unlink()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "../.git/annex/objects/Gk/2m/SHA256E-s592--0.nii.gz/SHA256E-s592--0.nii.gz",
            r"a git-annex link without its content; run `git annex get` \(or `datalad get`\) on the file$",
        ),
        ("elsewhere.nii.gz", "a symbolic link to a file that is not there; copy that file$"),
    ],
)
def test_links_without_their_file_are_named(tmp_path: Path, target: str, message: str) -> None:
    for name in ("a.nii.gz", "b.hdr", "c.img"):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "c.hdr").write_bytes(pair(1))
    for name in ("a.nii.gz", "b.hdr", "c.hdr", "c.img"):
        for load in (load_header, load_volume):
            with pytest.raises(VolumeError, match=rf"{name}: {message}"):
                load(row_of(tmp_path / name))


def test_half_of_a_pair_is_called_so(tmp_path: Path) -> None:
    for name in ("a.img", "a.img.gz"):
        (tmp_path / name).write_bytes(brain().tobytes() * 9)
        with pytest.raises(VolumeError, match=r"voxels without their header; copy the \.hdr file"):
            load_volume(row_of(tmp_path / name))


def test_padding_after_the_voxels_is_allowed(tmp_path: Path) -> None:
    for name, pack in (("a.nii", bytes), ("a.nii.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(nifti_bytes(brain()) + bytes(4096)))
        assert np.array_equal(load_volume(row_of(tmp_path / name)).voxels, brain())


def test_text_after_the_gzip_stream_is_ignored_and_a_damaged_stream_is_not(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nii.gz", brain((9, 9, 9)))  # nibabel looks at the first kilobyte
    data = path.read_bytes()
    for text in (b"\n", b"x", b"text", b"more text than there are bytes in a header" * 20, bytes(9) + b"x"):
        path.write_bytes(data + text)
        assert np.array_equal(load_volume(row_of(path)).voxels, np.asanyarray(nib.load(path).dataobj))
    path.write_bytes(data + data[:-1])
    with pytest.raises(VolumeError, match=r"a\.nii\.gz: truncated gzip stream"):
        load_volume(row_of(path))


def test_paths_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    plain = write_image(tmp_path / "a.nii")
    reasons = {
        str(tmp_path / "missing.nii"): "No such file or directory",
        str(tmp_path): "Is a directory",
        f"{plain}/b.nii": "Not a directory",
        str(tmp_path / ("x" * 300)): "File name too long",
        "nowhere://bucket/a.nii": "nowhere:// is not supported here",
        "C:\\scans\\a.nii": "a Windows path; give the path at which this computer has the file$",
    }
    for path, reason in reasons.items():
        for load in (load_volume, load_header):
            with pytest.raises(VolumeError, match=reason) as caught:
                load(row_of(path))
            assert str(caught.value).startswith(f"{path}: cannot be read: ")
    with pytest.raises(VolumeError, match="not a path: it has a NUL character; repair the manifest"):
        load_volume(row_of(f"{tmp_path}/a\0.nii"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nii")
    path.chmod(0)
    with pytest.raises(VolumeError, match="cannot be read: Permission denied"):
        load_volume(row_of(path))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path, suffix: str) -> None:
    path = write_image(tmp_path / f"a{suffix}")
    data = path.read_bytes()
    some = {*range(0, len(data), 5), *range(340, 356), len(data) - 1}
    for size in some if suffix == ".nii" else range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(VolumeError, match=rf"^{path}: ") as caught:
            load_volume(row_of(path))
        assert "copy" in str(caught.value)


def test_a_flipped_bit_of_a_gzip_stream_is_found_or_harmless(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nii.gz")
    data, accepted = path.read_bytes(), 0
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with contextlib.suppress(VolumeError):
            load_volume(row_of(path))
            # The time in the gzip header, say, or a code that the stream never uses.
            assert gzip.decompress(flipped) == gzip.decompress(data)
            accepted += 1
    assert 0 < accepted < 40


@contextlib.contextmanager
def peak_below(limit: int) -> Iterator[None]:
    """Python and numpy allocate less than `limit` bytes at any time in the block."""
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < limit


_REFUSE = """
import sys
from beam_nifti.errors import VolumeError
from beam_nifti.manifest import VolumeRow
from beam_nifti.volume import load_volume
for path in sys.argv[1:]:
    try:
        load_volume(VolumeRow(1, "a", path))
    except VolumeError:
        continue
    sys.exit(path + " was accepted")
"""


def test_nothing_is_allocated_because_a_file_says_so(tmp_path: Path) -> None:
    def sparse(name: str, head: bytes) -> Path:
        with (tmp_path / name).open("wb") as handle:
            handle.write(head)
            handle.truncate(5 << 30)
        return tmp_path / name

    def packed(name: str, *members: bytes) -> Path:
        (tmp_path / name).write_bytes(b"".join(members))
        return tmp_path / name

    small = nifti_bytes(brain())
    claims = nifti_header(brain(), fields={"dim": [3, 1024, 1024, 500, 1, 1, 1, 1]})
    claims_much = nifti_header(brain(), fields={"dim": [3, *[32767] * 3, 1, 1, 1, 1]})
    zeros = gzip.compress(bytes(16 << 20), 9)
    bad = [
        packed("bomb.nii.gz", gzip.compress(small), zeros * 64),  # 1 GiB after 592 bytes of image
        packed("claim.nii.gz", gzip.compress(claims)),
        packed("claim.nii", claims),
        packed("claim-much.nii.gz", gzip.compress(claims_much)),
        packed("claim-much.nii", claims_much),
        sparse("tail.nii", small),
        sparse("tail.nii.gz", gzip.compress(small)),
        sparse("run.nii", nifti_header(np.broadcast_to(brain(), (300, 6, 5, 4)).T)),
        sparse("zeros.nii", b""),
    ]
    good = write_image(tmp_path / "good.nii.gz")
    at_rest = peak_mib(_REFUSE.replace("sys.exit", "str"), good)
    assert peak_mib(_REFUSE, *bad) < at_rest + 16


def test_a_claim_of_a_small_file_allocates_nothing(tmp_path: Path) -> None:
    claims = nifti_header(brain(), fields={"dim": [3, 1024, 1024, 500, 1, 1, 1, 1]})
    for name, data in (("a.nii.gz", gzip.compress(claims)), ("a.nii", claims)):
        (tmp_path / name).write_bytes(data)
        with peak_below(1 << 20), pytest.raises(VolumeError, match="copy the file again"):
            load_volume(row_of(tmp_path / name))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_loading_holds_the_file_and_its_voxels_twice(tmp_path: Path, suffix: str) -> None:
    voxels = random_voxels((128, 128, 64))
    path = write_image(tmp_path / f"a{suffix}", voxels)
    copies = 2 if suffix == ".nii.gz" else 1  # inflated, then in C order; else the file is one
    with peak_below(path.stat().st_size + copies * voxels.nbytes + (1 << 19)):
        load_volume(row_of(path))


def test_the_largest_volume_is_what_an_example_can_hold(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nii", slope=2.0)
    row = replace(row_of(path), example_id="i" * 60_000)
    volume = rescale_volume(load_volume(row), RecordConfig(voxel_dtype="native"))
    rest = len(encode_volume(volume)) - volume.voxels.nbytes
    assert MAX_VOLUME_BYTES + rest + 40 <= MAX_EXAMPLE_BYTES  # lengths take up to 5 bytes instead of 1


FLOATS_HELD = MAX_VOLUME_BYTES // 4
SIZES: dict[str, tuple[str, tuple[int, ...], str, str | None]] = {
    "float32": ("float32", (FLOATS_HELD, 1, 1), "float32", None),
    "one more": (
        "float32",
        (FLOATS_HELD + 1, 1, 1),
        "float32",
        r"2,147,418,116 bytes as float32, more than a record can hold \(2,147,418,112: .*\); crop",
    ),
    "uint8": ("uint8", (MAX_VOLUME_BYTES, 1, 1), "native", None),
    "one more uint8": ("uint8", (MAX_VOLUME_BYTES + 1, 1, 1), "native", "2,147,418,113 bytes as uint8"),
    "fits as it is": (
        "int16",
        (1024, 1024, 1000),
        "float32",
        r"4,194,304,000 bytes .*; use --voxel-dtype native, which takes 2,097,152,000, or crop",
    ),
    "and so it does": ("int16", (1024, 1024, 1000), "native", None),
    "fits narrowed": (
        "float64",
        (1024, 1024, 400),
        "native",
        "; use --voxel-dtype float32, which takes 1,677,721,600, or",
    ),
    "and so it is": ("float64", (1024, 1024, 400), "float32", None),
    "fits as halves": ("float32", (1024, 1024, 1000), "float16", None),
    "fits as bytes": ("float32", (1024, 1024, 2000), "uint8", None),
    "no halves": ("float32", (1024, 1024, 1100), "bfloat16", r"2,306,867,200 bytes as bfloat16, .*\); crop"),
    "frames": (
        "int16",
        (64, 64, 40, 7000),
        "native",
        "; split the image along time, for example with fslroi, or crop",
    ),
}


@pytest.mark.parametrize("case", SIZES)
def test_what_a_record_cannot_hold_is_refused_by_the_header_alone(tmp_path: Path, case: str) -> None:
    dtype, shape, stored, message = SIZES[case]
    header = nifti_header(np.broadcast_to(np.zeros((), dtype), shape), version=2)
    record = RecordConfig(voxel_dtype=stored, frames="all")
    plain, packed = tmp_path / "a.nii", tmp_path / "a.nii.gz"
    plain.write_bytes(header)
    os.truncate(plain, len(header) + math.prod(shape) * np.dtype(dtype).itemsize)  # of holes
    packed.write_bytes(gzip.compress(header))
    for path in (plain, packed):
        with peak_below(1 << 20):
            if message is None:
                assert load_header(row_of(path), record=record).shape == shape
                continue
            for load in (load_header, load_volume):
                with pytest.raises(VolumeError, match=rf"^{path}: shape .*{message}"):
                    load(row_of(path), record=record)


@pytest.mark.parametrize("shape", [(5, 4, 3, 7), (3, 9, 2, 17), (2, 8, 1, 16), (1, 1, 1, 2), (40, 3, 2, 33)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_frames_are_read_as_nibabel_reads_them(tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
    for dtype, order in itertools.product(("int16", "float32", "float64"), "<>"):
        voxels = random_voxels(shape, dtype)
        path = write_image(tmp_path / f"a{suffix}", voxels, byte_order=order, slope=0.5, inter=3.0)
        volume = load_volume(row_of(path), record=RecordConfig(frames="all"))
        values, affine, zooms = load_with_nibabel(path)
        assert volume.voxels.flags.c_contiguous
        assert volume.scaling.apply(volume.voxels).tobytes() == values.astype(np.float64).tobytes()
        assert np.array_equal(volume.affine, affine)
        assert volume.zooms == tuple(map(float, zooms[:3]))


@pytest.mark.parametrize("frames", [None, "all"])
@pytest.mark.parametrize("shape", [(5, 4, 3, 1), (5, 4, 3, 1, 1), (5, 4, 3, 1, 1, 1, 1)])
def test_axes_of_length_one_at_the_end_are_none(
    tmp_path: Path, shape: tuple[int, ...], frames: str | None
) -> None:
    voxels = random_voxels(shape)
    path = write_image(tmp_path / "a.nii", voxels)
    volume = load_volume(row_of(path), record=RecordConfig(frames=frames))
    assert np.array_equal(volume.voxels, voxels.reshape(5, 4, 3))
    assert volume.zooms == (2.0, 2.0, 2.5)


def test_what_is_released_is_only_the_voxels(tmp_path: Path) -> None:
    loaded = load_volume(row_of(write_image(tmp_path / "a.nii")))
    kept = rescale_volume(loaded, RecordConfig(voxel_dtype="native"))
    loaded.release()
    assert loaded.voxels.size == 0
    assert kept.voxels.shape == (6, 5, 4)
    assert loaded.affine is kept.affine


def test_a_dataset_has_one_shape_and_native_voxels_one_dtype(tmp_path: Path) -> None:
    row = row_of(write_image(tmp_path / "a.nii"))
    load_volume(row, shape=(6, 5, 4), dtype="int16")
    with pytest.raises(VolumeError, match=r"a\.nii: shape \(6, 5, 4\), but .* has \(6, 5, 5\)"):
        load_volume(row, shape=(6, 5, 5))
    with pytest.raises(VolumeError, match=r"a\.nii: int16 voxels, but .* has uint8; use --voxel-"):
        load_volume(row, dtype="uint8")


@pytest.mark.parametrize("rescale", ["minmax", "none"])
@pytest.mark.parametrize("dtype", ["float32", "native"])
def test_what_a_record_stores(tmp_path: Path, rescale: str, dtype: str) -> None:
    path = write_image(tmp_path / "a.nii", slope=0.5, inter=-7.0)
    loaded = load_volume(row_of(path))
    volume = rescale_volume(loaded, RecordConfig(rescale, dtype))
    values = load_with_nibabel(path)[0]
    assert (volume.intensities[0].min, volume.intensities[0].max) == (values.min(), values.max())
    if dtype == "native":
        assert volume.voxels is loaded.voxels
        assert volume.scaling == loaded.scaling
        return
    assert volume.scaling.is_identity
    if rescale == "minmax":
        values = (values - values.min()) / (values.max() - values.min())
    assert np.array_equal(volume.voxels, values.astype(np.float32))
    assert volume.voxels.dtype == np.float32


@pytest.mark.parametrize("dtype", ["float32", "native"])
def test_images_without_a_range_are_refused(tmp_path: Path, dtype: str) -> None:
    constant = load_volume(row_of(write_image(tmp_path / "c.nii", np.full((3, 3, 3), 9.0))))
    with pytest.raises(VolumeError, match=r"c\.nii: all voxels are 9: .* use --rescale none"):
        rescale_volume(constant, RecordConfig("minmax", dtype))
    assert rescale_volume(constant, RecordConfig("none", dtype)).voxels.mean() == 9.0
    voxels = random_voxels(dtype="float32")
    voxels[2, 1, 0] = np.nan
    holed = load_volume(row_of(write_image(tmp_path / "n.nii", voxels)))
    for rescale in ("minmax", "none"):
        with pytest.raises(VolumeError, match=r"n\.nii: 1 of 60 voxels are NaN or infinite"):
            rescale_volume(holed, RecordConfig(rescale, dtype))


@pytest.mark.parametrize("dtype", ["float32", "native"])
def test_values_that_the_reader_could_not_give_are_refused(tmp_path: Path, dtype: str) -> None:
    huge = load_volume(row_of(write_image(tmp_path / "h.nii", brain().astype("f8") * 1e300)))
    with pytest.raises(VolumeError, match=r"h\.nii: intensities .* do not fit float32.*--rescale minmax"):
        rescale_volume(huge, RecordConfig("none", dtype))
    assert rescale_volume(huge, RecordConfig("minmax", dtype)).intensities[0].max > 1e300
