"""Containers, dtypes and frames: whatever nibabel reads is read equally, and nothing bad goes unnoticed."""

from __future__ import annotations

import bz2
import gzip
import itertools
import os
import struct
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from nibabel.casting import have_binary128

from beam_nifti.config import BuildConfig, RecordConfig
from beam_nifti.errors import VolumeError
from beam_nifti.pipeline.plan import CheckPlan
from beam_nifti.pipeline.survey import survey_image
from beam_nifti.volume import files as image_module
from beam_nifti.volume.compression import Decompressor, compression_of
from beam_nifti.volume.files import image_files, stat_image
from beam_nifti.volume.header import record_layout
from beam_nifti.volume.volume import Volume, load_header, load_volume
from tests.images import (
    AFFINE,
    REAL_DTYPES,
    Array,
    brain,
    nifti_bytes,
    nifti_header,
    numbers_of,
    random_voxels,
    row_of,
    write_image,
)
from tests.peak import peak_mib

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, 1),
    ".bz2": bz2.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
RGBA = np.dtype([*RGB.descr, ("A", "u1")])
WIDE = ("float128", "complex256") if have_binary128() else ()
ANALYZE_DTYPES = ("uint8", "int16", "int32", "float32", "float64")
MGH_DTYPES = ("uint8", "int16", "uint16", "int32", "float32")


def pair(folder: Path, voxels: Array, packed: str = "", version: int = 1, **header: Any) -> Path:
    """Write a NIfTI pair, both halves packed so; its header."""
    magic = {"magic": f"ni{version}".encode(), "vox_offset": 0} | header.pop("fields", {})
    order = header.get("byte_order", "<")
    head = nifti_header(voxels, version=version, fields=magic, **header)
    data = voxels.astype(voxels.dtype.newbyteorder(order)).tobytes(order="F")
    (folder / f"a.hdr{packed}").write_bytes(PACK[packed](head))
    (folder / f"a.img{packed}").write_bytes(PACK[packed](bytes(int(magic["vox_offset"])) + data))
    return folder / f"a.hdr{packed}"


def analyze(folder: Path, voxels: Array, packed: str = "", order: str = "<", **fields: Any) -> Path:
    """Write an ANALYZE 7.5 pair; its header."""
    header = nib.spm2analyze.Spm2AnalyzeHeader(endianness=order)
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape)
    header.set_zooms((2.0, 3.0, 4.0, *[1.0] * (voxels.ndim - 3)))
    for name, value in fields.items():
        header[name] = value
    data = voxels.astype(voxels.dtype.newbyteorder(order)).tobytes(order="F")
    (folder / f"a.hdr{packed}").write_bytes(PACK[packed](bytes(header.binaryblock)))
    (folder / f"a.img{packed}").write_bytes(PACK[packed](data))
    return folder / f"a.hdr{packed}"


def mgh(folder: Path, voxels: Array, packed: str = "", footer: bytes = b"") -> Path:
    """Write an MGH image, .mgz where it is gzip."""
    name = {"": "a.mgh", ".gz": "a.mgz"}.get(packed, f"a.mgh{packed}")
    squeezed = voxels[..., 0] if voxels.shape[3:] == (1,) else voxels  # nibabel writes no other
    data = nib.MGHImage(squeezed, AFFINE).to_bytes() + footer
    (folder / name).write_bytes(PACK[packed](data))
    return folder / name


def with_nibabel(path: Path, packed: str = "") -> Any:
    """The image as nibabel loads it; a compression that it does not know is taken off first."""
    if packed in (".bz2", ".zst"):
        unpack = bz2.decompress if packed == ".bz2" else zstandard.ZstdDecompressor().decompress
        for file in image_files(str(path)):
            Path(file.removesuffix(packed)).write_bytes(unpack(Path(file).read_bytes()))
        path = path.with_suffix("")
    with warnings.catch_warnings(action="ignore"):
        image: Any = nib.load(path)
        np.asanyarray(image.dataobj)
    return image


def assert_equal(volume: Volume, image: Any) -> None:
    values = numbers_of(np.asanyarray(image.dataobj))
    assert volume.voxels.flags.c_contiguous
    assert volume.voxels.dtype.isnative
    assert volume.voxels.shape == values.shape
    assert volume.scaling.apply(volume.voxels).tobytes() == values.astype(np.float64).tobytes()
    assert np.array_equal(volume.affine, image.affine)
    assert volume.zooms == tuple(map(float, image.header.get_zooms()[:3]))


KINDS = ("nifti1", "nifti2", "pair1", "pair2", "analyze", "mgh")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(list(PACK)),
    st.sampled_from("<>"),
    st.tuples(*[st.integers(1, 5)] * 3, st.integers(1, 3)),
    st.data(),
)
def test_every_container_is_read_as_nibabel_reads_it(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    packed: str,
    order: str,
    shape: tuple[int, ...],
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("image")
    dtypes = {"analyze": ANALYZE_DTYPES, "mgh": MGH_DTYPES}.get(kind, (*REAL_DTYPES, "RGB", "RGBA"))
    dtype = data.draw(st.sampled_from(dtypes))
    if dtype.startswith("RGB"):
        shape = shape[:3]
        voxels = random_voxels((*shape, len(dtype)), "uint8").view(RGB if dtype == "RGB" else RGBA)[..., 0]
    else:
        voxels = random_voxels(shape, dtype)
    scaling = {} if voxels.dtype.names else {"slope": data.draw(st.sampled_from([None, 0.5, -2.0]))}
    version = int(kind[-1]) if kind[-1].isdigit() else 0
    if kind.startswith("nifti"):
        path = folder / f"a.nii{packed}"
        path.write_bytes(PACK[packed](nifti_bytes(voxels, version=version, byte_order=order, **scaling)))
    elif kind.startswith("pair"):
        path = pair(folder, voxels, packed, version, byte_order=order, **scaling)
    elif kind == "analyze":
        path = analyze(
            folder, voxels, packed, order, scl_slope=scaling["slope"] or 0.0, origin=[2, 3, 1, 0, 0]
        )
    else:
        path = mgh(folder, voxels, packed)
    record = RecordConfig(frames="all")
    volume, header = load_volume(row_of(path), record=record), load_header(row_of(path), record=record)
    assert_equal(volume, with_nibabel(path, packed))
    assert record_layout("a", header, record).shape == volume.voxels.shape
    assert record_layout("a", header, record).dtype == volume.voxels.dtype
    assert header.dtype_name == volume.dtype
    assert volume.dtype == {"RGB": "rgb24", "RGBA": "rgba32"}.get(dtype, dtype)
    assert volume.source.files == (stat_image(str(path)),)


def test_a_pair_is_named_by_either_file_and_packed_in_any_way(tmp_path: Path) -> None:
    head, data = nifti_header(brain(), fields={"magic": b"ni1", "vox_offset": 16}), brain().tobytes(order="F")
    for number, (first, second) in enumerate(itertools.product(PACK, PACK)):
        for half, other in (("hdr", "img"), ("HDR", "IMG")):
            folder = tmp_path / f"{number}{half}"
            folder.mkdir()
            (folder / f"a.b.{half}{first}").write_bytes(PACK[first](head))
            (folder / f"a.b.{other}{second}").write_bytes(PACK[second](bytes(16) + data))
            for name in (f"a.b.{half}{first}", f"a.b.{other}{second}"):
                volume = load_volume(row_of(name), str(folder))
                assert np.array_equal(volume.voxels, brain())
                assert volume.source.files == (stat_image(str(folder / name)),)


def test_the_named_half_is_the_one_that_is_taken(tmp_path: Path) -> None:
    pair(tmp_path, brain())
    other = brain(seed=1).tobytes(order="F")
    (tmp_path / "a.img.gz").write_bytes(gzip.compress(other))
    for name, seed in (("a.hdr", 0), ("a.img", 0), ("a.img.gz", 1)):
        assert np.array_equal(load_volume(row_of(tmp_path / name)).voxels, brain(seed=seed))


def test_a_change_of_either_half_shows(tmp_path: Path) -> None:
    path = pair(tmp_path, brain())
    before = stat_image(str(path))
    assert before == stat_image(str(tmp_path / "a.img"))
    for name, step in itertools.product(("a.hdr", "a.img"), (-100, 100)):
        status = (tmp_path / name).stat()
        os.utime(tmp_path / name, (status.st_atime, status.st_mtime + step))
        assert stat_image(str(path)) != before
        os.utime(tmp_path / name, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert stat_image(str(path)) == before
    for name in ("a.hdr", "a.img"):
        with (tmp_path / name).open("ab") as handle:
            handle.write(b"\0")
        assert stat_image(str(path)) != before
        before = stat_image(str(path))


def test_an_exchange_of_both_halves_of_two_pairs_shows(tmp_path: Path) -> None:
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    one, other = pair(tmp_path, brain()), pair(other_folder, brain(seed=1))
    before = stat_image(str(one))
    for name in ("a.hdr", "a.img"):
        os.utime(tmp_path / name, (1, 1))
        os.utime(other_folder / name, (2, 2))
    both = stat_image(str(one)), stat_image(str(other))
    assert before not in both
    (tmp_path / "a.img").rename(tmp_path / "kept")
    (other_folder / "a.img").rename(tmp_path / "a.img")
    assert stat_image(str(one)) == (both[0][0], both[1][1])


def test_images_with_equal_headers_are_not_copies_of_each_other(tmp_path: Path) -> None:
    twins = []
    for seed in (0, 1, 0):
        folder = tmp_path / str(len(twins))
        folder.mkdir()
        path = pair(folder, brain(seed=seed))
        twins.append(survey_image(row_of(path), "", CheckPlan(BuildConfig("", ""), 1, 0, None))[1])
    assert twins[0] == twins[2] != twins[1]


def test_voxels_that_begin_like_a_packed_file_are_voxels(tmp_path: Path) -> None:
    for magic in (b"\x1f\x8b", b"BZ", b"\x28\xb5"):
        voxels = np.full((2, 2, 2), struct.unpack("<h", magic)[0], np.int16)
        voxels[1, 0, 0] = {b"BZ": 0x3168, b"\x28\xb5": -720}.get(magic, 8)
        path = pair(tmp_path, voxels)
        assert np.array_equal(load_volume(row_of(path)).voxels, voxels)


def test_voxels_that_are_named_packed_and_are_not_are_refused(tmp_path: Path) -> None:
    """Damage to its first bytes makes of a packed file something that may have the size of the voxels."""
    for packed in (".gz", ".bz2", ".zst"):
        data = PACK[packed](brain().tobytes(order="F"))
        path = pair(tmp_path, brain().ravel()[: len(data) // 2].reshape(1, 1, -1), packed)
        (tmp_path / f"a.img{packed}").write_bytes(b"xx" + data[2:])
        with pytest.raises(
            VolumeError, match=r"its \.img file is not compressed as its name implies; copy it again"
        ):
            load_volume(row_of(path))


def test_a_single_file_may_be_called_img(tmp_path: Path) -> None:
    for name in ("a.img", "b.hdr", "c.anything"):
        (tmp_path / name).write_bytes(nifti_bytes(brain()))
        volume = load_volume(row_of(tmp_path / name))
        assert np.array_equal(volume.voxels, brain())
        assert volume.source.files == (stat_image(str(tmp_path / name)),)


def test_halves_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    path = pair(tmp_path, brain())
    whole = path.read_bytes()
    (tmp_path / "a.img").write_bytes(brain().tobytes()[:-1])
    with pytest.raises(VolumeError, match=r"a\.hdr: truncated: 239 bytes where .* needs 240; copy"):
        load_volume(row_of(path))
    (tmp_path / "a.img").write_bytes(brain().tobytes() + bytes(4097))
    with pytest.raises(VolumeError, match="holds more than the 240 bytes"):
        load_volume(row_of(path))
    path.write_bytes(nifti_bytes(brain()))
    for load in (load_volume, load_header):
        with pytest.raises(VolumeError, match=r"its \.hdr file is a whole image, .*; repair its name"):
            load(row_of(path))
    path.write_bytes(whole + bytes(2 << 20))
    with pytest.raises(VolumeError, match="which no header has"):
        load_volume(row_of(path))
    (tmp_path / "a.img").unlink()
    path.write_bytes(whole)
    for load in (load_volume, load_header):
        with pytest.raises(VolumeError, match=r"without its voxels; copy the \.img file"):
            load(row_of(path))


def test_a_damaged_header_of_a_pair_is_found(tmp_path: Path) -> None:
    for packed in (".gz", ".bz2", ".zst"):
        path = pair(tmp_path, brain(), packed)
        data = bytearray(path.read_bytes())
        data[-2] ^= 1  # in its checksum
        path.write_bytes(data)
        with pytest.raises(VolumeError, match=rf"a\.hdr{packed}: (damaged|truncated) .* stream"):
            load_volume(row_of(path))


def test_an_analyze_image_whose_affine_is_elsewhere_is_refused(tmp_path: Path) -> None:
    path = analyze(tmp_path, brain(), ".gz")
    assert_equal(load_volume(row_of(path)), with_nibabel(path))
    (tmp_path / "a.mat").write_bytes(b"MATLAB")
    for load in (load_volume, load_header):
        with pytest.raises(VolumeError, match=r"its affine is in a \.mat file .*; convert"):
            load(row_of(path))


@pytest.mark.parametrize(
    "fields",
    [
        {"scl_slope": 0.0, "cal_max": 0.8, "cal_min": 0.2, "glmax": 110, "glmin": 10},
        {"scl_slope": 2.0, "scl_inter": 3.0},
        {"scl_slope": 2.0, "scl_inter": np.nan},
        {"scl_slope": np.nan},
        {"origin": [500, 1, 1, 0, 0]},
    ],
)
def test_the_scaling_and_origin_of_analyze_are_nibabels(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = analyze(tmp_path, brain(), **fields)
    assert_equal(load_volume(row_of(path)), with_nibabel(path))


def test_the_footer_of_mgh_may_be_long_and_is_bounded(tmp_path: Path) -> None:
    for packed in ("", ".gz"):
        path = mgh(tmp_path, brain(), packed, footer=os.urandom(200_000))
        assert_equal(load_volume(row_of(path)), with_nibabel(path))
        mgh(tmp_path, brain(), packed, footer=bytes(2 << 20))
        with pytest.raises(VolumeError, match="holds more than"):
            load_volume(row_of(path))


def mgh_header(**fields: Any) -> bytes:
    header = nib.freesurfer.mghformat.MGHHeader()
    header.set_data_shape((6, 5, 4))
    for name, value in fields.items():
        header[name] = value
    return bytes(header.binaryblock).ljust(284, b"\0") + brain().astype(">f4").tobytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": 7}, "data type 7 is not known; repair"),
        ({"dims": [6, 0, 4, 1]}, "has no voxels; leave it out"),
        ({"dims": [6, -5, 4, 1]}, "has no voxels; leave it out"),
        ({"dims": [2**31 - 1] * 4}, "choose frames"),
        ({"dims": [2**31 - 1] * 3 + [1]}, "more than a record can hold"),
        ({"delta": [np.nan, 1, 1]}, "the affine is not finite; repair its direction cosines"),
        ({"dims": [6, 5, 5, 1]}, "truncated"),
    ],
)
def test_mgh_headers_that_lie_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    (tmp_path / "a.mgh").write_bytes(mgh_header() + bytes(20))
    load_volume(row_of(tmp_path / "a.mgh"))
    (tmp_path / "a.mgh").write_bytes(mgh_header(**fields) + bytes(20))
    with pytest.raises(VolumeError, match=rf"a\.mgh: .*{message}"):
        load_volume(row_of(tmp_path / "a.mgh"))


# Packed streams


@pytest.mark.parametrize("packed", [".bz2", ".zst"])
def test_a_packed_file_that_is_cut_or_changed_is_refused(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"a.nii{packed}"
    data = PACK[packed](nifti_bytes(brain()))
    broken = [data[:size] for size in range(len(data))]
    broken += [data + data[:-1], PACK[packed](nifti_bytes(brain()) + bytes(5000))]
    for position in range(4, len(data), 7):
        broken.append(data[:position] + bytes([data[position] ^ 255]) + data[position + 1 :])
    for record, content in itertools.product((RecordConfig(), RecordConfig(frames="first")), broken):
        path.write_bytes(content)
        with pytest.raises(VolumeError, match=rf"^{path}: "):
            load_volume(row_of(path), record=record)


@pytest.mark.parametrize("packed", [".bz2", ".zst"])
def test_streams_of_several_pieces_are_read(tmp_path: Path, packed: str) -> None:
    data = nifti_bytes(brain())
    (tmp_path / "a.nii").write_bytes(PACK[packed](data[:300]) + PACK[packed](data[300:]))
    assert np.array_equal(load_volume(row_of(tmp_path / "a.nii")).voxels, brain())


@given(
    st.sampled_from([".gz", ".bz2", ".zst", ".zst without checksum"]),
    st.lists(st.tuples(st.binary(min_size=1, max_size=40), st.integers(1, 9)), min_size=1, max_size=3),
    st.sampled_from(
        [b"", bytes(1), bytes(600), b"\n", b"some text", bytes(3) + b"x", b"x\0", b"\x1f", b"BZ"]
    ),
    st.integers(1, 50),
)
@example(".zst", [(random_voxels((300_000,), "uint8").tobytes(), 1)], bytes(512), 9)  # of several blocks
@example(".bz2", [(random_voxels((1_000_000,), "uint8").tobytes(), 1)], b"\n", 999_999)
@example(".gz", [(random_voxels((200_000,), "uint8").tobytes(), 1), (bytes(500_000), 2)], b"\n", 99)
def test_what_follows_the_streams_is_passed_over(
    kind: str, pieces: list[tuple[bytes, int]], after: bytes, first: int
) -> None:
    """As by gunzip, bunzip2 and nibabel; but a further stream that is damaged is found."""
    pack = PACK.get(kind, zstandard.ZstdCompressor(write_content_size=False).compress)
    contents = [piece * count for piece, count in pieces]
    data = b"".join(map(pack, contents))
    compression = compression_of(data)
    assert compression is not None
    buffer = bytearray(sum(map(len, contents)) + 99)

    def unpack(data: bytes) -> bytes:
        decompressor = Decompressor("a", data, compression)
        size = decompressor.readinto(memoryview(buffer)[:first])
        return bytes(buffer[: size + decompressor.readinto(memoryview(buffer)[size:])])

    assert unpack(data + after) == b"".join(contents)
    with pytest.raises(VolumeError, match=rf"^a: (truncated|damaged) {compression.name} stream"):
        unpack(data + pack(b"more")[:-1])


def test_zstd_frames_to_skip_are_skipped(tmp_path: Path) -> None:
    """Pzstd begins each of its frames with one."""
    skipped = b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"size"
    data = nifti_bytes(brain())
    frames = skipped + PACK[".zst"](data[:300]) + skipped + PACK[".zst"](data[300:])
    for after in (b"", skipped, b"text"):
        (tmp_path / "a.nii.zst").write_bytes(frames + after)
        assert np.array_equal(load_volume(row_of(tmp_path / "a.nii.zst")).voxels, brain())


def test_bytes_after_a_stream_that_is_too_short_are_named(tmp_path: Path) -> None:
    """As where a member of several has lost its first bytes."""
    for packed, name in ((".gz", "gzip"), (".bz2", "bzip2"), (".zst", "zstd")):
        path = tmp_path / f"a.nii{packed}"
        path.write_bytes(PACK[packed](nifti_bytes(brain())[:400]) + b"lost")
        for frames in (None, "first"):
            with pytest.raises(
                VolumeError,
                match=f"truncated: 400 bytes where .* needs 592, and 4 bytes after the {name} data;",
            ):
                load_volume(row_of(path), record=RecordConfig(frames=frames))


def test_a_padded_file_is_read_in_every_way(tmp_path: Path) -> None:
    for packed in (".gz", ".bz2", ".zst"):
        path = tmp_path / f"a.nii{packed}"
        for after in (bytes(2048), b"\n", b"some text"):
            path.write_bytes(PACK[packed](nifti_bytes(brain())) + after)
            assert load_header(row_of(path)).shape == brain().shape
            for frames in (None, "first"):
                volume = load_volume(row_of(path), record=RecordConfig(frames=frames))
                assert np.array_equal(volume.voxels, brain())


@pytest.mark.parametrize("packed", [".bz2", ".zst"])
def test_the_header_of_a_long_packed_file_is_found(tmp_path: Path, packed: str) -> None:
    voxels = random_voxels((100, 100, 100), "uint8")  # whose first block is longer than 64 kB
    (tmp_path / "a.nii").write_bytes(PACK[packed](nifti_bytes(voxels)))
    assert load_header(row_of(tmp_path / "a.nii")).shape == voxels.shape
    assert np.array_equal(load_volume(row_of(tmp_path / "a.nii")).voxels, voxels)


_REFUSE = """
import sys
from beam_nifti.config import RecordConfig
from beam_nifti.errors import VolumeError
from beam_nifti.manifest import VolumeRow
from beam_nifti.volume import load_volume
for path in sys.argv[1:]:
    for frames in (None, "first", "mean"):
        try:
            load_volume(VolumeRow(1, "a", path), record=RecordConfig(frames=frames))
        except VolumeError:
            continue
        sys.exit(path + " was accepted")
"""


def test_bombs_and_lying_headers_take_no_memory(tmp_path: Path) -> None:
    claims = nifti_header(brain(), fields={"dim": [4, 1024, 1024, 100, 9, 1, 1, 1]})
    bad = []
    for packed in (".gz", ".bz2", ".zst"):
        bomb = PACK[packed](nifti_bytes(brain()) + bytes(256 << 20))  # 256 MiB behind 592 bytes of image
        for name, content in (("bomb", bomb), ("claim", PACK[packed](claims))):
            bad.append(tmp_path / f"{name}.nii{packed}")
            bad[-1].write_bytes(content)
    good = write_image(tmp_path / "good.nii.gz")
    at_rest = peak_mib(_REFUSE.replace("sys.exit", "str"), good)
    assert peak_mib(_REFUSE, *bad) < at_rest + 16


# Numbers


def test_complex_images_are_refused_without_the_option_and_converted_with_it(tmp_path: Path) -> None:
    for dtype, order, slope in itertools.product(("complex64", "complex128"), "<>", (None, -2.5)):
        path = write_image(tmp_path / "a.nii", random_voxels(dtype=dtype), byte_order=order, slope=slope)
        values = numbers_of(np.asanyarray(with_nibabel(path).dataobj)).astype(np.complex128)
        expected = {
            "magnitude": np.abs(values),
            "phase": np.angle(values),
            "real-imag": np.stack([values.real, values.imag], -1),
        }
        for part, wanted in expected.items():
            volume = load_volume(row_of(path), record=RecordConfig(complex=part))
            assert np.array_equal(volume.voxels, wanted)
            assert volume.scaling.is_identity
            assert volume.dtype == dtype
        with pytest.raises(VolumeError, match="choose how to store them with --complex magnitude, phase or"):
            load_volume(row_of(path))
        with pytest.raises(VolumeError, match="no record can hold as they are; use --voxel-dtype float32"):
            load_volume(row_of(path), record=RecordConfig(voxel_dtype="native"))


def test_an_intercept_of_complex_voxels_is_refused(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nii", random_voxels(dtype="complex64"), slope=1.0, inter=3.0)
    with pytest.raises(VolumeError, match="intercept of 3, which NIfTI adds to both parts and nibabel to"):
        load_volume(row_of(path), record=RecordConfig(complex="phase"))


def test_frames_of_complex_images(tmp_path: Path) -> None:
    voxels = random_voxels((5, 4, 3, 6), "complex64")
    path = write_image(tmp_path / "a.nii.gz", voxels)
    z = voxels.astype(np.complex128)

    def loaded(frames: str, part: str) -> Array:
        return load_volume(row_of(path), record=RecordConfig(frames=frames, complex=part)).voxels

    assert np.array_equal(loaded("all", "magnitude"), np.abs(z))
    assert np.array_equal(loaded("2", "phase"), np.angle(z[..., 2]))
    np.testing.assert_allclose(loaded("mean", "magnitude"), np.abs(z).mean(3), rtol=1e-14)
    parts = np.stack([z.real, z.imag], -1).mean(3)
    np.testing.assert_allclose(loaded("mean", "real-imag"), parts, rtol=1e-12, atol=1e-15)
    with pytest.raises(VolumeError, match="has 6 × 2 numbers per voxel, but a record has one axis"):
        loaded("all", "real-imag")


@pytest.mark.skipif(not WIDE, reason="this processor has no 128-bit floats")
def test_128_bit_floats_are_rounded_to_64(tmp_path: Path) -> None:
    voxels = random_voxels(dtype="float64").astype(np.longdouble)
    path = write_image(tmp_path / "a.nii", voxels)
    assert np.array_equal(load_volume(row_of(path)).voxels, voxels.astype(np.float64))


@pytest.mark.skipif(bool(WIDE), reason="this processor has 128-bit floats")
def test_128_bit_floats_are_refused_where_they_cannot_be_read(tmp_path: Path) -> None:
    for code in (1536, 2048):
        (tmp_path / "a.nii").write_bytes(nifti_bytes(brain(), fields={"datatype": code, "bitpix": 128}))
        with pytest.raises(VolumeError, match=f"data code {code} not supported; repair or convert"):
            load_volume(row_of(tmp_path / "a.nii"))


def test_the_scaling_of_colours_is_ignored_as_nifti_wants_it(tmp_path: Path) -> None:
    voxels = random_voxels((4, 3, 2, 3), "uint8").view(RGB)[..., 0]
    path = write_image(tmp_path / "a.nii", voxels, slope=2.0, inter=1.0)
    volume = load_volume(row_of(path))
    assert volume.scaling.is_identity
    assert volume.voxels.shape == (4, 3, 2, 3)


# Frames

FIVE = (5, 4, 3, 2, 3)


def five(version: int = 1, **fields: Any) -> bytes:
    return nifti_bytes(random_voxels(FIVE), version=version, slope=0.5, inter=3.0, fields=fields)


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("shape", [(5, 4, 3, 6), FIVE, (5, 4, 3, 1, 3), (5, 4, 3)])
def test_one_frame_or_the_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], packed: str, large: bool
) -> None:
    if large:
        monkeypatch.setattr(image_module, "_LARGE_FILE", 400)
    for dtype in ("int16", "float32"):
        path = tmp_path / f"a.nii{packed}"
        path.write_bytes(PACK[packed](nifti_bytes(random_voxels(shape, dtype), slope=0.5, inter=3.0)))
        values = np.asanyarray(with_nibabel(path, packed).dataobj)
        values = values.reshape((*shape[:3], *[*shape[3:], 1][:1], *shape[4:])).astype(np.float64)
        for frames in ["first", *map(str, range(values.shape[3]))]:
            volume = load_volume(row_of(path), record=RecordConfig(frames=frames))
            taken = values[:, :, :, 0 if frames == "first" else int(frames)]
            assert volume.scaling.apply(volume.voxels).tobytes() == np.ascontiguousarray(taken).tobytes()
            assert volume.voxels.dtype == dtype
        volume = load_volume(row_of(path), record=RecordConfig(frames="mean"))
        np.testing.assert_allclose(volume.scaling.apply(volume.voxels), values.mean(3), rtol=1e-12, atol=1e-9)
        assert volume.dtype == dtype
        with pytest.raises(
            VolumeError, match=rf"no frame {values.shape[3]}: shape .* has {values.shape[3]} frame"
        ):
            load_volume(row_of(path), record=RecordConfig(frames=str(values.shape[3])))


def test_minus_zero_of_a_frame_is_kept(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nii", np.full((2, 2, 2, 2), -0.0, np.float32))
    volume = load_volume(row_of(path), record=RecordConfig(frames="1"))
    assert np.signbit(volume.voxels).all()


@pytest.mark.parametrize("packed", PACK)
def test_damage_behind_the_frame_does_not_go_unnoticed(tmp_path: Path, packed: str) -> None:
    path = tmp_path / "a.nii"
    data = nifti_bytes(random_voxels((5, 4, 3, 6)))
    for content in (data[:-1], data + bytes(5000)):
        path.write_bytes(PACK[packed](content))
        with pytest.raises(VolumeError, match=r"truncated|holds more"):
            load_volume(row_of(path), record=RecordConfig(frames="first"))
    if packed:
        whole = PACK[packed](data)
        for content in (whole[:-1], whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:], whole + whole[:-1]):
            path.write_bytes(content)
            with pytest.raises(VolumeError, match="stream"):
                load_volume(row_of(path), record=RecordConfig(frames="first"))


def test_one_frame_takes_the_memory_of_one(tmp_path: Path) -> None:
    code = _REFUSE.replace("(None, ", "(").replace("sys.exit", "str")
    small = write_image(tmp_path / "a.nii.gz", np.zeros((64, 64, 32, 2), np.int16))
    large = write_image(tmp_path / "b.nii.gz", np.zeros((64, 64, 32, 400), np.int16))  # 105 MB
    assert peak_mib(code, large) < peak_mib(code, small) + 16


def test_vectors_are_channels(tmp_path: Path) -> None:
    for intent, frames in ((1007, None), (1006, None), (1007, "all"), (0, "all"), (0, "first")):
        data = nifti_bytes(random_voxels((5, 4, 3, 1, 3)), fields={"intent_code": intent})
        (tmp_path / "a.nii").write_bytes(data)
        volume = load_volume(row_of(tmp_path / "a.nii"), record=RecordConfig(frames=frames))
        assert_equal(volume, with_nibabel(tmp_path / "a.nii"))
        assert volume.voxels.shape == (5, 4, 3, 3)
    with pytest.raises(VolumeError, match=r"got shape \(5, 4, 3, 1, 3\); choose frames with --frames all"):
        load_volume(row_of(tmp_path / "a.nii"))


def test_frames_of_vectors_and_of_colours_need_a_choice(tmp_path: Path) -> None:
    colours = random_voxels((4, 3, 2, 5, 3), "uint8").view(RGB)[..., 0]
    for name, content, count in (
        ("v.nii", five(intent_code=1007), "2 × 3"),
        ("c.nii", nifti_bytes(colours), "5 × 3"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            VolumeError, match=f"has {count} numbers per voxel, .*; choose frames with --frames each, first"
        ):
            load_volume(row_of(tmp_path / name), record=RecordConfig(frames="all"))
        with pytest.raises(VolumeError, match="expected a 3-D image"):
            load_volume(row_of(tmp_path / name))
        for frames in ("first", "1", "mean"):
            assert (
                load_volume(row_of(tmp_path / name), record=RecordConfig(frames=frames)).voxels.shape[3] == 3
            )
    frame = load_volume(row_of(tmp_path / "c.nii"), record=RecordConfig(frames="3"))
    assert np.array_equal(frame.voxels, colours.view("u1").reshape(4, 3, 2, 5, 3)[:, :, :, 3])


def test_what_the_first_image_decides_is_what_records_hold(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nii", random_voxels((5, 4, 3, 6)))
    record = RecordConfig(frames="mean")
    load_volume(row_of(path), shape=(5, 4, 3), record=record)
    load_volume(row_of(path), shape=(None, None, None), record=record)
    with pytest.raises(VolumeError, match=r"shape \(5, 4, 3\), but the first image has \(5, 4, 4\)"):
        load_volume(row_of(path), shape=(5, 4, 4), record=record)
    colours = write_image(tmp_path / "b.nii", random_voxels((4, 3, 2, 3), "uint8").view(RGB)[..., 0])
    with pytest.raises(
        VolumeError, match=r"shape \(4, 3, 2, 3\) in a dataset of 3-D volumes of mixed shapes"
    ):
        load_volume(row_of(colours), shape=(None, None, None))
    with pytest.raises(VolumeError, match="rgb24 voxels, but the first image has uint8"):
        load_volume(row_of(colours), dtype="uint8", record=replace(record, frames=None))
