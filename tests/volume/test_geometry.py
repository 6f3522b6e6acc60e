"""Where images lie: one answer about affine, voxel sizes and units, whatever the header holds."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_nifti.config import ORIENTATIONS, RecordConfig
from beam_nifti.errors import DatasetError, VolumeError
from beam_nifti.inspection.extract import read_volume
from beam_nifti.volume import geometry, load_volume
from beam_nifti.volume.formats import parse_header
from beam_nifti.volume.header import VolumeHeader
from beam_nifti.volume.notes import OF_VOXELS, TEXTS
from beam_nifti.volume.preprocess import apply_function, prepare_volume
from tests.datasets import manifest_of
from tests.images import AFFINE, brain, nifti_bytes, row_of, write_image, write_manifest
from tests.pages import ROOT

SHAPE = (6, 5, 4)
ZOOMS = (2.0, 2.0, 2.5)


def header_of(**header: Any) -> VolumeHeader:
    return parse_header("a.nii", nifti_bytes(brain(SHAPE), **header))


def qform(affine: Any = AFFINE, code: int = 1) -> dict[str, Any]:
    """The fields of the qform of an affine."""
    header = nib.Nifti1Header()
    header.set_qform(affine, code=code)
    names = ("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
    return {name: header[name] for name in names} | {"pixdim": header["pixdim"]}


def sform(affine: Any, code: int = 1) -> dict[str, Any]:
    rows = {f"srow_{axis}": row for axis, row in zip("xyz", affine, strict=False)}
    return {"sform_code": code, **rows}


ZEROS = np.zeros((3, 4))
FLAT = AFFINE * [[1], [1], [0], [1]]
"""An affine that puts all slices in one place."""


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("pixdim", [(1, 1, 1), (2, 2, 2.6), (0, 0, 0), (np.nan, 2, 2.5), (np.inf, 1, 1)])
def test_voxel_sizes_are_those_of_the_affine(pixdim: tuple[float, ...], version: int) -> None:
    header = header_of(version=version, fields={"pixdim": [1, *pixdim, 0, 0, 0, 0]})
    assert header.zooms == ZOOMS
    assert header.notes == ("pixdim-disagrees",)


@pytest.mark.parametrize("pixdim", [ZOOMS, (-2, 2, 2.5), (2.0001, 2, 2.5)])
def test_voxel_sizes_that_agree_but_for_rounding_stay_as_they_are(pixdim: tuple[float, ...]) -> None:
    header = header_of(fields={"pixdim": [1, *pixdim, 0, 0, 0, 0]})
    assert header.zooms == tuple(np.abs(np.float32(pixdim)).astype(float))
    assert header.notes == ()


def test_an_axis_of_one_voxel_needs_no_size() -> None:
    voxels = brain((6, 5, 1))
    for affine, size in ((AFFINE, 2.5), (None, 1.0)):
        data = nifti_bytes(voxels, affine=affine, fields={"pixdim": [1, 2, 2, 0, 0, 0, 0, 0]})
        header = parse_header("a.nii", data)
        assert (header.zooms, header.notes) == ((2.0, 2.0, size), ())


@pytest.mark.parametrize("unusable", [ZEROS, FLAT, AFFINE * np.nan])
def test_the_qform_counts_where_the_sform_is_unusable(unusable: Any) -> None:
    header = header_of(affine=None, fields=qform() | sform(unusable))
    assert np.allclose(header.affine, AFFINE, atol=1e-5)
    assert (header.zooms, header.notes) == (ZOOMS, ("sform-unusable",))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (sform(ZEROS), "the affine is singular; repair its sform or qform"),
        (sform(AFFINE + np.inf), "the affine is not finite; repair its sform or qform"),
        (sform(ZEROS) | qform() | {"quatern_b": 3}, "the affine is singular"),
        (qform() | {"quatern_b": 3}, "the affine is not finite"),
        (qform() | {"qoffset_x": np.nan}, "the affine is not finite"),
        (
            qform() | {"pixdim": [1, 0, 2, 2, 0, 0, 0, 0]},
            "voxel sizes in the header .* 0×2×2, and it has no sform",
        ),
        ({"pixdim": [0] * 8}, r"voxel sizes in the header \(pixdim\) are 0×0×0, and it has no sform; repair"),
        ({"pixdim": [1, np.nan, 2, 2, 0, 0, 0, 0]}, "nan×2×2"),
        ({"pixdim": [1, np.inf, 2, 2, 0, 0, 0, 0]}, "inf×2×2"),
    ],
)
def test_an_image_that_lies_nowhere_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(VolumeError, match=f"^a.nii: .*{message}"):
        header_of(affine=None, fields=fields)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("code", "unit"), [(1, 1e3), (3, 1e-3)])
def test_units_are_converted_to_millimetres(code: int, unit: float, version: int) -> None:
    in_file = np.vstack([AFFINE[:3] / unit, AFFINE[3:]])
    header = header_of(version=version, affine=in_file, fields={"xyzt_units": code | 8})
    assert np.allclose(header.affine, AFFINE, rtol=1e-6)
    assert np.allclose(header.zooms, ZOOMS, rtol=1e-6)
    assert header.notes == ("units-converted",)


@pytest.mark.parametrize(("code", "notes"), [(0, ()), (2, ()), (10, ()), (5, ("units-unknown",))])
def test_other_units_are_millimetres(code: int, notes: tuple[str, ...]) -> None:
    header = header_of(fields={"xyzt_units": code})
    assert (header.zooms, header.notes) == (ZOOMS, notes)


def test_analyze_and_mgh_have_units_and_sizes_too() -> None:
    header = nib.spm2analyze.Spm2AnalyzeHeader()
    header.set_data_shape(SHAPE)
    header.set_zooms((0.2, 0.3, 0.4))
    header["vox_units"] = b"cm"
    found = parse_header("a.hdr", bytes(header.binaryblock))
    assert np.allclose(found.zooms, (2, 3, 4))
    assert np.allclose(nib.affines.voxel_sizes(found.affine), (2, 3, 4))
    assert found.notes == ("units-converted",)
    header["pixdim"][1:4] = 0
    with pytest.raises(VolumeError, match=r"voxel sizes in the header \(pixdim\) are 0×0×0"):
        parse_header("a.hdr", bytes(header.binaryblock))
    mgh = nib.freesurfer.mghformat.MGHHeader()
    mgh.set_data_shape(SHAPE)
    mgh["Mdc"] = np.diag([2, 1, 1])
    found = parse_header("a.mgh", bytes(mgh.binaryblock).ljust(284, b"\0"))
    assert (found.zooms, found.notes) == ((2.0, 1.0, 1.0), ("pixdim-disagrees",))
    mgh["Mdc"] = 0
    with pytest.raises(VolumeError, match="the affine is singular; repair its direction cosines"):
        parse_header("a.mgh", bytes(mgh.binaryblock).ljust(284, b"\0"))


def test_sform_and_qform_are_compared_where_both_are_set() -> None:
    shifted, rounded = (nib.affines.from_matvec(np.eye(3), [x, 0, 0]) @ AFFINE for x in (0.3, 0.01))
    disagree = ("sform-qform-disagree",)
    assert header_of(fields=qform(shifted)).notes == disagree
    assert header_of(fields=qform() | {"quatern_b": 3}).notes == disagree
    assert header_of(fields=qform(rounded)).notes == ()
    assert header_of(fields=qform(shifted, code=0)).notes == ()
    assert header_of(affine=None, fields=qform() | sform(shifted, code=0)).notes == ()
    assert np.array_equal(header_of(fields=qform(shifted)).affine, AFFINE)


AFFINES = {
    "unset": None,
    "good": AFFINE,
    "turned": AFFINE @ nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, 0.2, 0.1)),
    "zeros": ZEROS,
    "flat": FLAT,
    "not finite": AFFINE * np.nan,
}
SIZES = [ZOOMS, (2, -2, 2.5), (3, 2, 2.5), (0, 2, 2.5), (np.nan, 2, 2.5), (np.inf, 2, 2.5)]


@given(
    st.sampled_from(list(AFFINES)),
    st.sampled_from(["unset", "good", "turned", "not finite"]),
    st.sampled_from(SIZES),
    st.integers(0, 7),
    st.sampled_from([1, 2]),
)
def test_any_header_places_its_voxels_or_is_refused(
    s: str, q: str, sizes: tuple[float, ...], unit: int, version: int
) -> None:
    fields: dict[str, Any] = {"xyzt_units": unit}
    if q != "unset":
        fields |= qform(AFFINE if q == "not finite" else AFFINES[q])
        if q == "not finite":
            fields["qoffset_y"] = np.nan
    if AFFINES[s] is not None:
        fields |= sform(AFFINES[s])
    fields["pixdim"] = [1, *sizes, 0, 0, 0, 0]
    is_sized = bool(np.isfinite(sizes).all() and all(sizes))
    data = nifti_bytes(brain(SHAPE), affine=None, version=version, fields=fields)
    is_placed = s in ("good", "turned") or (is_sized and (q in ("good", "turned") or s == q == "unset"))
    if not is_placed:
        with pytest.raises(VolumeError, match=r"^a\.nii: .*; repair"):
            parse_header("a.nii", data)
        return
    header = parse_header("a.nii", data)
    assert np.allclose(header.zooms, np.sqrt((header.affine[:3, :3] ** 2).sum(0)), rtol=1e-4, atol=0)
    assert abs(np.linalg.det(header.affine)) > 0
    assert all(note in TEXTS for note in header.notes)
    per_mm = {1: 1e-3, 3: 1e3}.get(unit, 1)
    if s in ("good", "turned"):
        in_file = np.float32(AFFINES[s])
    else:
        in_file = np.diag([*np.abs(sizes), 1.0])
        in_file = None if s == "unset" and q == "unset" else in_file
    if in_file is not None:
        assert np.allclose(header.zooms, np.sqrt((in_file[:3, :3] ** 2).sum(0)) / per_mm, rtol=1e-4)
    assert ("sform-unusable" in header.notes) == (s in ("zeros", "flat", "not finite"))
    assert ("units-converted" in header.notes) == (unit in (1, 3))


def test_the_page_names_every_note_of_headers() -> None:
    page = (ROOT / "docs/images.md").read_text()
    assert set(re.findall(r"^\| `([\w-]+)` \| ", page, re.M)) >= TEXTS.keys() - OF_VOXELS


def test_a_build_warns_once_of_each_kind_and_check_names_the_images(
    tmp_path: Path, run: Callable[..., str]
) -> None:
    rows = []
    for i in range(5):
        fields: dict[str, Any] = {"pixdim": [1, 9, 9, 9, 0, 0, 0, 0]} if i else {}
        fields |= {"xyzt_units": 3} if i == 4 else {}
        write_image(tmp_path / f"{i}.nii", brain(SHAPE, seed=i), fields=fields)
        rows.append({"participant_id": f"sub-{i}", "path": f"{i}.nii"})
    manifest = write_manifest(tmp_path / "m.tsv", rows)
    printed = run("build", manifest, tmp_path / "out")
    assert printed.count("warning: ") == 2
    assert (
        f"warning: 4 examples: {TEXTS['pixdim-disagrees']}; beam-nifti check lists these images\n" in printed
    )
    assert f"warning: 1 example: {TEXTS['units-converted']};" in printed
    assert "warning" not in run("build", manifest, tmp_path / "out")  # which loads nothing
    report = json.loads(run("check", manifest, "--json"))
    assert report["notes"]["pixdim-disagrees"] == {
        "message": TEXTS["pixdim-disagrees"],
        "num_images": 4,
        "images": [{"row": i + 1, "example_id": f"sub-{i}"} for i in range(1, 5)],
    }
    assert report["notes"]["units-converted"]["num_images"] == 1
    table = run("check", manifest)
    assert "warning       1 image: the header's spatial unit is not mm" in table
    assert "row 5 (sub-4)" in table


def test_what_is_stored_and_extracted_is_in_millimetres(tmp_path: Path, run: Callable[..., str]) -> None:
    in_file = np.vstack([AFFINE[:3] * 1000, AFFINE[3:]])
    write_image(tmp_path / "a.nii", brain(SHAPE), affine=in_file, fields={"xyzt_units": 3})
    write_image(tmp_path / "b.nii", brain(SHAPE, seed=1))
    manifest = write_manifest(tmp_path / "m.csv", [{"participant_id": "a", "path": "a.nii", "t2": "b.nii"}])
    run("build", manifest, tmp_path / "out", "--path-column=path,t2")
    volume = read_volume(str(tmp_path / "out"), "a")
    assert np.allclose(volume.zooms, ZOOMS)
    assert np.allclose(volume.affine, AFFINE)
    volume.save(str(tmp_path / "x.nii"))
    header = nib.load(tmp_path / "x.nii").header
    assert header.get_xyzt_units()[0] == "mm"
    assert np.allclose(header.get_zooms()[:3], ZOOMS)


def test_check_measures_as_build_does(tmp_path: Path, run: Callable[..., str]) -> None:
    write_image(tmp_path / "a.nii", brain(SHAPE), fields={"pixdim": [1, 1, 1, 1, 0, 0, 0, 0]})
    manifest = write_manifest(tmp_path / "m.tsv", [{"path": "a.nii"}])
    assert json.loads(run("check", manifest, "--json"))["spacings"] == {"2×2×2.5": 1}


def test_a_stored_affine_that_places_nothing_is_wrong(
    tmp_path: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of earlier versions may have one."""
    write_image(tmp_path / "a.nii", affine=None, fields=sform(FLAT))
    manifest = write_manifest(tmp_path / "m.tsv", [{"participant_id": "a", "path": "a.nii"}])
    monkeypatch.setattr(geometry, "is_usable", lambda affine: True)
    run("build", manifest, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(DatasetError, match="affine is singular or not finite; repair the image"):
        read_volume(str(tmp_path / "out"), "a")
    assert "(a): affine is singular or not finite" in run("verify", tmp_path / "out", code=1)


# Images of one example


def turned_file(path: Path, voxels: Any, code: str, affine: Any = AFFINE) -> Path:
    """An image with its axes in another order or direction, by nibabel."""
    image = nib.Nifti1Image(voxels, affine)
    ornt = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(code)
    )
    turned = image.as_reoriented(ornt)
    return write_image(path, np.asarray(turned.dataobj), affine=turned.affine)


@settings(max_examples=30)
@given(st.sampled_from(sorted(ORIENTATIONS)), st.sampled_from(sorted(ORIENTATIONS)), st.sampled_from("gt"))
def test_flipped_images_of_one_grid_are_one_example(
    tmp_path_factory: pytest.TempPathFactory, code: str, wanted: str, kind: str
) -> None:
    tmp_path = tmp_path_factory.mktemp("grids")
    affine = AFFINES["good" if kind == "g" else "turned"]
    image, other, mask = brain(SHAPE), brain(SHAPE, seed=1), (brain(SHAPE, seed=2) % 7).astype(np.int16)
    write_image(tmp_path / "a.nii", image, affine=affine)
    for name, voxels in (("b", other), ("m", mask)):
        turned_file(tmp_path / f"{name}.nii", voxels, code, affine)
        write_image(tmp_path / f"straight_{name}.nii", voxels, affine=affine)
    record = RecordConfig(orientation=wanted, channels=("a", "b"), mask_dtype="uint8")
    made, expected = (
        prepare_volume(load_volume(row_of("a.nii", other_files=files), str(tmp_path), record=record), record)
        for files in (("b.nii", "m.nii"), ("straight_b.nii", "straight_m.nii"))
    )
    assert np.array_equal(made.voxels, expected.voxels)
    assert np.array_equal(made.mask, expected.mask)  # type: ignore[arg-type]
    assert np.array_equal(made.affine, expected.affine)
    assert made.voxels.flags.c_contiguous


def test_flipped_images_of_one_grid_need_an_orientation(tmp_path: Path, run: Callable[..., str]) -> None:
    write_image(tmp_path / "a.nii", brain(SHAPE))
    turned_file(tmp_path / "b.nii", brain(SHAPE, seed=1), "PIR")
    manifest = write_manifest(tmp_path / "m.tsv", [{"participant_id": "a", "path": "a.nii", "seg": "b.nii"}])
    flags = ("build", manifest, tmp_path / "out", "--path-column=path,seg")
    assert (
        "b.nii: its voxels are those of a.nii with axes flipped or in another order (PIR, not LAS); add "
        "--orientation RAS, which reorients both without interpolation"
    ) in run(*flags, code=2)
    run(*flags, "--orientation=RAS")
    assert "ok " in run("verify", tmp_path / "out", "--deep=all", "--manifest", manifest_of(tmp_path / "out"))


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (np.zeros((4, 4)), "not singular"),
        (np.diag([1.0, 1, 0, 1]), "not singular"),
        (np.diag([1.0, 1, 1, 2]), "whose last row is 0, 0, 0, 1"),
    ],
)
def test_a_function_returns_an_affine_that_places_voxels(tmp_path: Path, affine: Any, message: str) -> None:
    volume = load_volume(row_of(write_image(tmp_path / "a.nii")))
    with pytest.raises(VolumeError, match=f"returned the affine .*{message}"):
        apply_function(volume, lambda v: dataclasses.replace(v, affine=affine), "lab:f")
