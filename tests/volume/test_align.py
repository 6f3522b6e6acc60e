"""Volumes at the positions of a reference: against scipy, and from the command line to the dataset."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from beam_nifti.cli import main as cli
from beam_nifti.config import BuildConfig, Columns, RecordConfig, ReferenceGrid
from beam_nifti.errors import DatasetError, UsageError, VolumeError
from beam_nifti.pipeline.options import read_option
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.volume import Volume
from beam_nifti.volume import align as module
from beam_nifti.volume.align import align_labels, align_voxels, loses_labels
from beam_nifti.volume.grid import Grid, covers, match_axes, overlaps
from beam_nifti.volume.preprocess import orient, prepare_volume
from beam_nifti.volume.resample import Interpolation
from beam_nifti.volume.rescale import Scaling
from beam_nifti.volume.volume import load_header, load_volume
from tests.datasets import info_of
from tests.images import AFFINE, Array, brain, random_voxels, row_of, write_image, write_manifest
from tests.volume.test_prepare import CODES, SHAPE, landmarks, places, tilted, volume_of

Run = Callable[..., str]
ORDERS = {"nearest": 0, "linear": 1, "cubic": 3}
TEMPLATE = Grid((8, 9, 7), tilted("LPS", (1.3, 1.9, 2.2), degrees=12.0))


def reference_of(grid: Grid) -> ReferenceGrid:
    return ReferenceGrid(grid.shape, tuple(grid.affine.ravel().tolist()))


def centred(shape: tuple[int, int, int], affine: Array, other: Grid) -> Grid:
    """A grid around the centre of another one."""
    moved = affine.copy()
    centres = [(np.array(size) - 1) / 2 for size in (shape, other.shape)]
    moved[:3, 3] += nib.affines.apply_affine(other.affine, centres[1])
    moved[:3, 3] -= nib.affines.apply_affine(affine, centres[0])
    return Grid(shape, moved)


def by_scipy(values: Array, old: Grid, new: Grid, order: int, beyond: float) -> Array:
    to_old = np.linalg.inv(old.affine) @ new.affine
    made: Array = ndimage.affine_transform(
        values, to_old[:3, :3], to_old[:3, 3], new.shape, order=order, mode="nearest"
    )
    made[beyond_of(old, new)] = beyond
    return made


def beyond_of(old: Grid, new: Grid) -> Array:
    """Where voxels of a grid are beyond the field of view of another one."""
    indices = nib.affines.apply_affine(
        np.linalg.inv(old.affine) @ new.affine, np.moveaxis(np.indices(new.shape), 0, -1)
    )
    sizes = np.array(old.shape)
    found: Array = (np.abs(indices - (sizes - 1) / 2) > sizes / 2 + 1e-3).any(axis=-1)
    return found


GRIDS = st.builds(
    lambda shape, code, zooms, degrees: centred(shape, tilted(code, zooms, degrees), TEMPLATE),
    st.tuples(*[st.integers(1, 9)] * 3),
    st.sampled_from(CODES),
    st.tuples(*[st.sampled_from([1.0, 1.37, 2.1, 3.3])] * 3),
    st.sampled_from([12.0, 0.0, 31.0]),
)


@given(GRIDS, st.integers(0, 2**32 - 1), st.sampled_from(["linear", "cubic"]))
def test_values_are_those_of_scipy_at_the_same_positions(grid: Grid, seed: int, kind: str) -> None:
    values = np.random.default_rng(seed).normal(100, 300, grid.shape)
    made, scaling = align_voxels(values, Scaling(), grid, TEMPLATE, Interpolation(kind))
    assert scaling.is_identity
    expected = by_scipy(values, grid, TEMPLATE, ORDERS[kind], values.min())
    assert np.abs(made - expected).max() <= 2e-7 * np.abs(values).max()


@given(GRIDS, st.integers(0, 2**32 - 1))
def test_labels_are_those_of_the_nearest_voxels(grid: Grid, seed: int) -> None:
    mask = np.random.default_rng(seed).integers(1, 200, grid.shape).astype(np.uint8)
    made = align_labels(mask, grid, TEMPLATE, Interpolation())
    indices = nib.affines.apply_affine(
        np.linalg.inv(grid.affine) @ TEMPLATE.affine, np.moveaxis(np.indices(TEMPLATE.shape), 0, -1)
    )
    clear = (np.abs(indices % 1 - 0.5) > 1e-6).all(axis=-1)  # of which neighbour is nearer
    expected = by_scipy(mask, grid, TEMPLATE, 0, 0)
    assert np.array_equal(made[clear], expected[clear])
    linear = align_labels(mask, grid, TEMPLATE, Interpolation(mask="linear"))
    assert np.array_equal(linear == 0, beyond_of(grid, TEMPLATE))
    assert set(np.unique(linear)) <= {0, *np.unique(mask)}


@given(GRIDS)
def test_headers_tell_what_a_grid_covers(grid: Grid) -> None:
    beyond = beyond_of(grid, TEMPLATE)
    assert covers(grid, TEMPLATE) == (not beyond.any())
    assert overlaps(grid, TEMPLATE)  # as they have one centre
    far = Grid(grid.shape, grid.affine + np.pad([[70.0], [0], [0], [0]], ((0, 0), (3, 0))))
    assert not overlaps(far, TEMPLATE)
    assert beyond_of(far, TEMPLATE).all()


@given(GRIDS, st.integers(0, 40))
def test_no_box_that_has_a_voxel_is_taken_to_be_apart(grid: Grid, shift: int) -> None:
    moved = Grid(grid.shape, grid.affine + np.pad([[shift], [shift / 3], [0], [0]], ((0, 0), (3, 0))))
    assert overlaps(moved, TEMPLATE) or beyond_of(moved, TEMPLATE).all()


@pytest.mark.parametrize("channels", [(), (2,)])
@pytest.mark.parametrize("code", CODES)
def test_axes_in_another_order_are_matched_bit_for_bit(code: str, channels: tuple[int, ...]) -> None:
    volume = volume_of(random_voxels(SHAPE + channels), tilted("RAS"), Scaling(0.5, 3))
    turned = orient(volume, code)
    old, new = Grid.of(SHAPE, volume.affine), Grid.of(turned.voxels.shape, turned.affine)
    made, scaling = align_voxels(volume.voxels, volume.scaling, old, new, Interpolation())
    assert (made.dtype, scaling) == (np.int16, volume.scaling)
    assert np.array_equal(made, turned.voxels)
    back = dataclasses.replace(volume, voxels=made, affine=new.affine)
    assert landmarks(back) == landmarks(volume)


def test_voxels_beyond_the_field_of_view_have_the_least_value() -> None:
    """A grid of the same voxels, moved by three: two of five slices stay, and the mask has 0 beyond them."""
    voxels = random_voxels((*SHAPE, 2)) + np.array([0, 9], np.int16)
    old = Grid.of(SHAPE, tilted())
    new = old.part((3, 0, 0), old.shape)
    mask = np.full(SHAPE, 7, np.uint8)
    for scaling in (Scaling(), Scaling(-2, 1)):
        made, _ = align_voxels(voxels, scaling, old, new, Interpolation(), each=True)
        assert np.array_equal(made[:2], voxels[3:])
        least = scaling.apply(voxels).min(axis=(0, 1, 2))
        assert (scaling.apply(made[2:]) == least).all()
    labels = align_labels(mask, old, new, Interpolation())
    assert np.array_equal(labels, np.where(np.arange(5)[:, np.newaxis, np.newaxis] < 2, mask, 0))
    assert loses_labels(mask, old, new)
    assert not loses_labels(mask * (np.arange(5) >= 3)[:, np.newaxis, np.newaxis], old, new)


@pytest.mark.parametrize("code", CODES)
def test_what_is_at_a_position_stays_there(code: str) -> None:
    """Voxels that are a linear function of their positions are so still, on an oblique grid."""
    direction = np.array([1.0, -2.0, 0.5])
    grid = centred((9, 12, 9), tilted(code, (2.0, 1.5, 3.0), degrees=31.0), TEMPLATE)
    empty = volume_of(np.zeros(grid.shape, np.float32), grid.affine)
    volume = dataclasses.replace(empty, voxels=(places(empty) @ direction).astype(np.float32))
    made = prepare_volume(volume, RecordConfig(reference=reference_of(TEMPLATE)))
    assert np.array_equal(made.affine, TEMPLATE.affine)
    indices = nib.affines.apply_affine(np.linalg.inv(grid.affine), places(made))
    inside = ((indices >= 0) & (indices <= np.array(grid.shape) - 1)).all(axis=-1)
    assert inside.mean() > 0.5
    assert np.allclose(made.voxels[inside], (places(made) @ direction)[inside], atol=1e-4)


@pytest.mark.parametrize("degrees", [12.0, 30.0])
@pytest.mark.parametrize("how", [Interpolation("cubic", "linear", antialias=True), Interpolation("nearest")])
def test_blocks_together_are_as_the_volume_at_once(
    how: Interpolation, degrees: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = centred((40, 30, 20), tilted("LPS", (0.6, 0.6, 1.0), degrees), TEMPLATE)
    values = np.random.default_rng(0).normal(100, 300, (*grid.shape, 2))
    mask = np.random.default_rng(1).integers(0, 4, grid.shape).astype(np.uint8)
    made = [align_voxels(values, Scaling(), grid, TEMPLATE, how)[0], align_labels(mask, grid, TEMPLATE, how)]
    monkeypatch.setattr(module, "_SLAB_VOXELS", 1)
    monkeypatch.setattr(module, "_BLOCK", 3)
    again = [align_voxels(values, Scaling(), grid, TEMPLATE, how)[0], align_labels(mask, grid, TEMPLATE, how)]
    assert np.allclose(made[0], again[0], rtol=0, atol=1e-4)
    assert np.array_equal(made[1], again[1])


def test_smoothing_is_by_the_size_of_voxels() -> None:
    grid = centred((31, 30, 29), tilted("LPS", (0.4, 1.9, 0.5), 40.0), TEMPLATE)
    values = np.random.default_rng(0).normal(100, 300, grid.shape)
    made, _ = align_voxels(values, Scaling(), grid, TEMPLATE, Interpolation(antialias=True))
    deviations = np.maximum(0, (np.array(TEMPLATE.zooms) / grid.zooms - 1) / 2)
    smooth = ndimage.gaussian_filter(values, deviations, mode="nearest")
    expected = by_scipy(smooth, grid, TEMPLATE, 1, values.min())
    assert np.allclose(made, expected, rtol=0, atol=1e-4)


def test_rounding_in_headers_does_not_make_a_grid_oblique() -> None:
    grid = Grid((181, 217, 181), tilted("RAS", (1.0, 1.0, 1.0)))
    rounded = Grid(grid.shape, grid.affine.astype(np.float32).astype(np.float64))
    _, resampling = match_axes(grid, rounded)
    assert resampling is not None
    assert resampling.is_exact
    assert match_axes(grid, Grid(grid.shape, tilted("RAS", (1.0, 1.0, 1.0), 12.01)))[1] is None


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spacing": (1, 1, 1)}, "--reference and --spacing both decide the positions of voxels; drop one"),
        ({"resize": (9, 9, 9)}, "--reference and --resize both decide"),
        ({"resize_longest": 9}, "--reference and --resize-longest both decide"),
        ({"orientation": "RAS"}, "--orientation and --reference both decide"),
        ({"shape": (8, 9, 7)}, "--shape has no effect after --reference, which gives that shape"),
        (
            {"separate_z": "auto"},
            "--separate-z has no effect without --spacing, --resize or",
        ),
        ({"voxel_dtype": "native"}, "--reference changes the voxels, .*or --interpolation nearest$"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        RecordConfig(reference=reference_of(TEMPLATE), **options)


@pytest.mark.parametrize(
    ("shape", "affine", "message"),
    [
        ((8, 9, 0), np.eye(4), "--reference is 8,9,0; give three numbers"),
        ((8, 9, 7), np.diag([1, 1, 0, 1]), "--reference has the affine .*finite and not singular"),
        ((8, 9, 7), np.diag([1, 1, math.inf, 1]), "--reference has the affine"),
        ((8, 9, 7), np.diag([1, 1, math.nan, 1]), "--reference has the affine"),
        ((8, 9, 7), np.diag([1, 1, 1, 2]), "--reference has the affine"),
        ((8, 9, 7), np.eye(3), "--reference has the affine"),
    ],
)
def test_a_reference_is_the_grid_of_an_image(shape: Any, affine: Array, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        ReferenceGrid(shape, tuple(affine.ravel()))


def test_a_volume_elsewhere_is_refused() -> None:
    affine = tilted()
    affine[0, 3] += 100
    record = RecordConfig(reference=reference_of(TEMPLATE))
    with pytest.raises(VolumeError, match=r"^a\.nii: its field of view does not meet that of --reference; "):
        prepare_volume(volume_of(random_voxels(SHAPE), affine), record)


# Datasets


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Images with masks: one like the template, one in another orientation, one oblique, one elsewhere."""
    rows = []
    for number in range(4):
        grid = centred((9, 8, 10), tilted("RAS", degrees=12.0 + 5 * (number == 2)), TEMPLATE)
        affine = grid.affine
        if number == 3:
            affine[2, 3] += 200
        voxels, labels = brain((9, 8, 10), seed=number), np.ones((9, 8, 10), np.uint8)
        write_image(tmp_path / f"{number}.nii.gz", voxels, affine=affine)
        write_image(tmp_path / f"{number}_mask.nii.gz", labels, affine=affine)
        rows.append({"path": f"{number}.nii.gz", "mask": f"{number}_mask.nii.gz"})
    write_image(tmp_path / "template.nii.gz", np.zeros(TEMPLATE.shape, np.uint8), affine=TEMPLATE.affine)
    return write_manifest(tmp_path / "m.tsv", rows)


def test_all_records_have_the_grid_of_the_reference(run: Run, cohort: Path, tmp_path: Path) -> None:
    output, template = tmp_path / "out", tmp_path / "template.nii.gz"
    flags = [
        "--mask-column=mask",
        f"--reference={template}",
        "--interpolation=cubic",
        "--max-bad-fraction=0.25",
    ]
    checked = run("check", cohort, *flags)
    assert "row 4 (3.nii.gz): its field of view does not meet that of --reference" in checked
    told = run("build", cohort, output, *flags)
    assert "3 examples: an image does not cover the whole grid of --reference" in told
    assert "3 examples: labelled voxels of the mask lie outside the grid of --reference" in told
    info = info_of(output)
    assert info.shape == TEMPLATE.shape
    assert info.config["reference"].keys() == {"shape", "affine"}
    (failure,) = map(json.loads, (output / "failures.jsonl").read_text().splitlines())
    assert failure["message"].startswith("3.nii.gz: its field of view does not meet that of --reference")
    template.unlink()  # of which the dataset has what is needed
    assert "3 rebuilt" in run("verify", output, "--deep=all", "--manifest", cohort)
    described = run("inspect", output)
    assert "prepared with reference 8×9×7 voxels of 1.3×1.9×2.2 mm, interpolation cubic\n" in described
    again = tmp_path / "again"
    run("build", cohort, again, "--like", output, "--max-bad-fraction=0.25")
    assert info_of(again).config == info.config
    told = run(
        "build", cohort, output, "--mask-column=mask", "--spacing=2,2,2", "--max-bad-fraction=1", code=2
    )
    assert "--reference was 8×9×7 voxels of 1.3×1.9×2.2 mm with the affine " in told


def test_a_reference_must_be_an_image(cohort: Path, tmp_path: Path) -> None:
    for name, message in (
        ("none.nii", r"--reference: .*none\.nii: cannot be read: No such file"),
        ("m.tsv", r"--reference: .*m\.tsv: "),
    ):
        with pytest.raises(UsageError, match=message):
            read_option("reference", tmp_path / name)


def test_notes_on_the_header_of_a_reference_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_image(
        tmp_path / "a.nii", brain(), affine=TEMPLATE.affine, fields={"pixdim": [1, 9, 9, 9, 0, 0, 0, 0]}
    )
    read_option("reference", tmp_path / "a.nii")
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(f"--reference: {tmp_path / 'a.nii'}: the voxel sizes in the header")


def test_a_dataset_with_a_grid_that_no_image_has_is_refused(run: Run, cohort: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = [f"--reference={tmp_path / 'template.nii.gz'}", "--max-bad-fraction=0.25"]
    assert cli.main(["build", str(cohort), str(output), "--quiet", *flags]) == 0
    info = info_of(output)
    shape, affine = info.config["reference"]["shape"], info.config["reference"]["affine"]
    for grid, message in (
        ({"shape": shape}, "config.reference lacks the key 'affine'"),
        ({"shape": shape, "affine": affine, "path": "x"}, "config.reference has a key 'path'"),
        ({"shape": [*shape, 1], "affine": affine}, "config.reference.shape has 4 values"),
        ({"shape": shape, "affine": affine[:-1]}, "--reference has the affine"),
        ({"shape": shape, "affine": [0.0] * 15 + [1.0]}, "--reference has the affine"),
        ("template.nii.gz", "config.reference is 'template.nii.gz', expected an object"),
    ):
        changed = dataclasses.replace(info, config={**info.config, "reference": grid})
        with pytest.raises(DatasetError, match=message):
            DatasetInfo.from_json(changed.to_json(), "dataset_info.json")


def test_a_reference_in_python(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii", brain((4, 5, 6)), affine=AFFINE)
    wanted = ReferenceGrid((4, 5, 6), tuple(AFFINE.ravel().tolist()))
    for value in (
        tmp_path / "a.nii",
        str(tmp_path / "a.nii"),
        {"shape": (4, 5, 6), "affine": AFFINE},
        {"shape": [4, 5, 6], "affine": AFFINE.ravel().tolist()},
        wanted,
    ):
        assert read_option("reference", value) == wanted
    for wrong in (
        {"shape": (4, 5, 6)},
        {"shape": (4, 5), "affine": AFFINE},
        {"shape": (4, 5, 6), "affine": "x"},
        3,
    ):
        with pytest.raises(UsageError, match=r"^--reference (is|has the affine) "):
            read_option("reference", wrong)


# The images of an example


def pair_of(folder: Path, first: Grid, other: Grid, seed: int = 0, name: str = "0") -> dict[str, str]:
    """Write an image, another one and a mask on another grid; their cells of a manifest."""
    rng = np.random.default_rng(seed)
    write_image(folder / f"{name}_T1w.nii", brain(first.shape, seed), affine=first.affine)
    voxels = rng.integers(-900, 900, other.shape).astype(np.int16)
    write_image(folder / f"{name}_T2w.nii", voxels, affine=other.affine, slope=0.5, inter=3.0)
    labels = rng.integers(1, 5, other.shape).astype(np.uint8)
    write_image(folder / f"{name}_mask.nii", labels, affine=other.affine)
    return {kind: f"{name}_{kind}.nii" for kind in ("T1w", "T2w", "mask")}


def load_pair(folder: Path, cells: dict[str, str], **options: Any) -> Volume:
    record = RecordConfig(channels=("T1w", "T2w"), mask_dtype="uint8", align="first", **options)
    row = row_of(cells["T1w"], other_files=(cells["T2w"], cells["mask"]))
    load_header(row, str(folder), record)
    return load_volume(row, str(folder), record=record)


@pytest.mark.parametrize(
    "options", [{}, {"interpolation": "cubic", "mask_interpolation": "linear"}, {"interpolation": "nearest"}]
)
@pytest.mark.parametrize("degrees", [12.0, 31.0])
def test_other_images_come_to_the_grid_of_the_first(
    tmp_path: Path, degrees: float, options: dict[str, str]
) -> None:
    other = centred((12, 9, 8), tilted("PIR", (1.1, 1.7, 2.9), degrees), TEMPLATE)
    cells = pair_of(tmp_path, TEMPLATE, other)
    volume = load_pair(tmp_path, cells, **options)
    how = Interpolation.of(RecordConfig(align="first", **options))  # type: ignore[arg-type]
    images = {kind: nib.load(tmp_path / path) for kind, path in cells.items()}
    grids = {kind: Grid.of(image.shape, image.affine) for kind, image in images.items()}  # type: ignore[attr-defined]
    voxels = np.asanyarray(images["T2w"].dataobj).astype(np.float64)  # type: ignore[attr-defined]
    expected, _ = align_voxels(voxels, Scaling(), grids["T2w"], grids["T1w"], how)
    assert np.array_equal(volume.affine, grids["T1w"].affine)
    first = np.asanyarray(images["T1w"].dataobj)  # type: ignore[attr-defined]
    assert np.array_equal(volume.scaling.apply(volume.voxels[..., 0]), first)
    assert np.allclose(volume.scaling.apply(volume.voxels[..., 1]), expected, rtol=0, atol=1e-3)
    labels = np.asanyarray(images["mask"].dataobj)  # type: ignore[attr-defined]
    assert volume.mask is not None
    assert np.array_equal(volume.mask, align_labels(labels, grids["mask"], grids["T1w"], how))
    notes = [] if covers(grids["T2w"], grids["T1w"]) else ["beyond-other-image"]
    notes += ["labels-lost-to-align"] if loses_labels(labels, grids["mask"], grids["T1w"]) else []
    assert volume.notes == tuple(notes)


@pytest.mark.parametrize("code", CODES)
def test_images_of_one_grid_are_matched_without_interpolation(tmp_path: Path, code: str) -> None:
    first = Grid(SHAPE, tilted("RAS"))
    turned = orient(volume_of(np.zeros(SHAPE), first.affine), code)
    cells = pair_of(tmp_path, first, Grid.of(turned.voxels.shape, turned.affine))
    volume, same = (load_pair(tmp_path, cells, **options) for options in ({}, {"orientation": "RAS"}))
    assert np.array_equal(volume.voxels, same.voxels)
    assert volume.mask is not None
    assert same.mask is not None
    assert np.array_equal(volume.mask, same.mask)
    assert volume.notes == ()
    plain = RecordConfig(channels=("T1w", "T2w"), mask_dtype="uint8", orientation="RAS")
    row = row_of(cells["T1w"], other_files=(cells["T2w"], cells["mask"]))
    assert np.array_equal(load_volume(row, str(tmp_path), record=plain).voxels, volume.voxels)


def test_a_dataset_of_aligned_images(run: Run, tmp_path: Path) -> None:
    rows = []
    for number in range(4):
        other = centred((12, 9, 8), tilted("PIR", (1.1, 1.7, 2.9), 10.0 + number), TEMPLATE)
        if number == 3:
            other.affine[2, 3] += 100
        rows.append(pair_of(tmp_path, TEMPLATE, other, number, str(number)))
    manifest, output = write_manifest(tmp_path / "m.tsv", rows), tmp_path / "out"
    columns = ["--path-column=T1w,T2w", "--mask-column=mask", "--max-bad-fraction=0.25"]
    told = run("build", manifest, output, *columns, code=2)
    assert "0_T2w.nii: shape (12, 9, 8) where 0_T1w.nii has (8, 9, 7); use --align first, which" in told
    flags = [*columns, "--align=first", "--mask-interpolation=linear"]
    checked = run("check", manifest, *flags)
    assert "row 4 (3_T1w.nii): 3_T2w.nii: its field of view does not meet that of 3_T1w.nii" in checked
    told = run("build", manifest, output, *flags)
    assert "an image, mask or target does not cover the whole first image of its example" in told
    assert info_of(output).shape == (*TEMPLATE.shape, 2)
    assert "3 rebuilt" in run("verify", output, "--deep=all", "--manifest", manifest)
    assert "align first" in run("inspect", output)
    again = tmp_path / "again"
    run("build", manifest, again, "--like", output, "--max-bad-fraction=0.25")
    assert info_of(again).config == info_of(output).config


def test_a_single_image_has_nothing_to_align() -> None:
    record = RecordConfig(align="first")
    with pytest.raises(UsageError, match=r"^--align has no effect on a single image; name several columns"):
        BuildConfig("m.tsv", "out", record)
    for columns in (Columns("a,b"), Columns("a", mask="m")):
        assert BuildConfig("m.tsv", "out", record, columns).record.align == "first"
    with pytest.raises(UsageError, match=r"^--align is 'last'; choose one of: never, first"):
        RecordConfig(align="last")
    assert RecordConfig(align="never") == RecordConfig()
    assert record.fingerprint != RecordConfig().fingerprint
    assert not record.prepares  # as it is done where images are loaded
    with pytest.raises(UsageError, match=r"^--separate-z has no effect without --spacing, --resize or"):
        RecordConfig(align="first", separate_z="auto")


@pytest.mark.parametrize("kind", ["linear", "cubic"])
def test_nan_is_replaced_before_it_spreads(tmp_path: Path, kind: str) -> None:
    """A NaN in an image that is interpolated changes as many voxels as the value that replaces it does."""
    other = centred((12, 9, 8), tilted("PIR", (1.1, 1.7, 2.9), 31.0), TEMPLATE)
    cells = pair_of(tmp_path, TEMPLATE, other)
    voxels = np.random.default_rng(0).normal(50, 9, other.shape).astype(np.float32)
    voxels[6, 4, 4], voxels[0, 0, 0] = np.nan, np.inf
    expected = []
    for image in (voxels, np.nan_to_num(voxels, nan=0, posinf=0)):
        write_image(tmp_path / cells["T2w"], image, affine=other.affine)
        record = RecordConfig(
            channels=("T1w", "T2w"), mask_dtype="uint8", align="first", interpolation=kind, nonfinite="zero"
        )
        row = row_of(cells["T1w"], other_files=(cells["T2w"], cells["mask"]))
        volume = prepare_volume(load_volume(row, str(tmp_path), record=record), record)
        expected.append(volume)
    assert np.array_equal(expected[0].voxels, expected[1].voxels)
    assert np.isfinite(expected[0].voxels).all()
    assert [volume.num_nonfinite for volume in expected] == [(0, 2), (0, 0)]
