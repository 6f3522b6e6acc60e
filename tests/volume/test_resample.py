"""Interpolation against scipy, and options of it from the command line to the dataset."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import ndimage

from beam_nifti.cli import main as cli
from beam_nifti.config import BuildConfig, Columns, RecordConfig
from beam_nifti.errors import DatasetError, UsageError
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.volume import Volume
from beam_nifti.volume import resample as module
from beam_nifti.volume.grid import (
    Grid,
    Resampling,
    coarse_axis,
    prepared_grids,
    resize,
    resize_longest,
    respace,
)
from beam_nifti.volume.preprocess import orient, prepare_volume, resample, resize_longest_to, resize_to
from beam_nifti.volume.resample import Interpolation, resample_labels, resample_voxels
from beam_nifti.volume.rescale import Scaling
from tests.datasets import info_of
from tests.images import AFFINE, Array, brain, random_voxels, write_image, write_manifest
from tests.volume.test_prepare import CODES, SHAPE, ZOOMS, places, tilted, volume_of

Run = Callable[..., str]
ORDERS = {"nearest": 0, "linear": 1, "cubic": 3}
SIZES = st.tuples(*[st.integers(1, 9)] * 3)
SEEDS = st.integers(0, 2**32 - 1)
STEPS = st.tuples(*[st.sampled_from([0.37, 0.5, 0.81, 1.0, 1.3, 2.0, 3.3])] * 3)


def values_of(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).normal(100, 300, shape)


def by_scipy(values: Array, resampling: Resampling, order: int) -> Array:
    indices = np.meshgrid(*map(resampling.positions, range(3)), indexing="ij")
    made: Array = ndimage.map_coordinates(values, indices, order=order, mode="nearest")
    return made


def assert_close(found: Array, expected: Array, values: Array) -> None:
    """Within the rounding to float32."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-7 * np.abs(values).max() * 2


# Images


@given(SIZES, STEPS, SEEDS, st.sampled_from(sorted(ORDERS)))
def test_interpolation_is_that_of_scipy(
    shape: tuple[int, int, int], spacing: tuple[float, ...], seed: int, kind: str
) -> None:
    values = values_of(shape, seed)
    resampling = respace(Grid(shape, np.eye(4)), spacing)
    made, scaling = resample_voxels(values, Scaling(), resampling, Interpolation(kind))
    assert scaling.is_identity
    assert_close(made, by_scipy(values, resampling, ORDERS[kind]), values)


@pytest.mark.parametrize("kind", sorted(ORDERS))
@pytest.mark.parametrize("code", CODES)
def test_what_an_image_shows_stays_in_its_place(code: str, kind: str) -> None:
    """An image in another orientation gives the same values at the same places."""
    volume = volume_of(values_of(SHAPE, 1).astype(np.float32), tilted("RAS"))
    how = Interpolation(kind)
    straight = resample(volume, (1.1, 0.7, 1.9), how)  # no ties
    x, y, z = (straight.zooms[axis] for axis in nib.orientations.axcodes2ornt(code)[:, 0].astype(int))
    turned = orient(resample(orient(volume, code), (x, y, z), how), "RAS")
    assert np.allclose(places(turned), places(straight))
    assert_close(turned.voxels, straight.voxels, volume.voxels)


def test_a_cubic_spline_shows_a_landmark_between_voxels() -> None:
    """The top of a smooth bump, which no voxel has, is where and as high as it was."""
    top, width = np.array([20.0, 17.4, 31.2]), 7.0

    def bump(volume: Volume) -> Array:
        squared: Array = ((places(volume) - top) ** 2).sum(axis=-1)
        return np.exp(-squared / (2 * width**2))

    empty = volume_of(np.zeros((20, 24, 18), np.float32), np.diag([2.0, 1.5, 3.0, 1.0]))
    made = resample(dataclasses.replace(empty, voxels=bump(empty)), (0.9, 1.1, 0.8), Interpolation("cubic"))
    assert np.abs(made.voxels - bump(made)).max() < 6e-3
    assert np.allclose(places(made)[np.unravel_index(made.voxels.argmax(), made.voxels.shape)], top, atol=0.6)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64"])
def test_nearest_voxels_are_those_of_the_file(dtype: str) -> None:
    volume = volume_of(random_voxels((*SHAPE, 2), dtype), scaling=Scaling(0.5, 3))
    made = resample(volume, (0.9, 1.2, 2.0), Interpolation("nearest"))
    assert (made.voxels.dtype, made.scaling) == (volume.voxels.dtype, volume.scaling)
    assert made.voxels.flags.c_contiguous
    indices = np.linalg.inv(volume.affine) @ made.affine
    where = nib.affines.apply_affine(indices, np.moveaxis(np.indices(made.voxels.shape[:3]), 0, -1))
    x, y, z = np.moveaxis(np.clip(np.floor(where + 0.5), 0, np.array(SHAPE) - 1).astype(int), -1, 0)
    assert np.array_equal(made.voxels, volume.voxels[x, y, z])


@pytest.mark.parametrize("how", [Interpolation("cubic"), Interpolation("cubic", antialias=True)])
def test_slabs_together_are_as_the_volume_at_once(
    how: Interpolation, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = volume_of(values_of((150, 11, 9), 2), scaling=Scaling(0.3, -7))
    whole = resample(volume, (4.3, 1.1, 2.9), how).voxels
    for name, value in (("_SPLINE_VOXELS", 50), ("_SPLINE_SLICES", 2), ("_COLUMNS", 20)):
        monkeypatch.setattr(module, name, value)
    slabs = resample(volume, (4.3, 1.1, 2.9), how).voxels
    assert_close(slabs, whole, whole)


def test_channels_are_resampled_one_by_one() -> None:
    volume = volume_of(random_voxels((*SHAPE, 3)), scaling=Scaling(2, 1))
    made = resample(volume, (1, 1, 1), Interpolation("cubic"))
    for t in range(3):
        frame = resample(
            dataclasses.replace(volume, voxels=volume.voxels[..., t]), (1, 1, 1), Interpolation("cubic")
        )
        assert np.array_equal(made.voxels[..., t], frame.voxels)


@pytest.mark.parametrize("kind", sorted(ORDERS))
def test_memory_is_the_result_and_some_slices(kind: str) -> None:
    volume = volume_of(np.ones((300, 96, 96), np.uint8), np.diag([2.0, 2, 2, 1]))
    resample(volume_of(np.ones((5, 5, 5), np.uint8)), (1, 1, 1), Interpolation(kind))
    tracemalloc.start()
    made = resample(volume, (1.7, 1.9, 1.8), Interpolation(kind))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < made.voxels.nbytes + 14e6  # float64 of all voxels would take 22 MB


# Numbers of voxels


@given(SIZES, SIZES, SEEDS, st.sampled_from(sorted(ORDERS)))
def test_a_resized_volume_is_that_of_scipys_zoom(
    shape: tuple[int, int, int], wanted: tuple[int, int, int], seed: int, kind: str
) -> None:
    values = values_of(shape, seed)
    resampling = resize(Grid(shape, np.eye(4)), wanted)
    between = [np.abs(resampling.positions(axis) % 1 - 0.5).min() for axis in range(3)]
    assume(kind != "nearest" or min(between) > 1e-9)  # where scipy's rounding decides
    made, _ = resample_voxels(values, Scaling(), resampling, Interpolation(kind))
    factors = np.array(wanted) / shape
    expected = ndimage.zoom(values, factors, order=ORDERS[kind], mode="nearest", grid_mode=True)
    assert_close(made, expected, values)


@given(st.integers(1, 40), st.integers(1, 40))
def test_of_two_equally_near_voxels_the_later_counts(old: int, new: int) -> None:
    line = np.arange(old).reshape(old, 1, 1)
    resampling = resize(Grid((old, 1, 1), np.eye(4)), (new, 1, 1))
    made, _ = resample_voxels(line, Scaling(), resampling, Interpolation("nearest"))
    exact = [Fraction((2 * i + 1) * old, 2 * new) for i in range(new)]
    assert made.ravel().tolist() == [min(old - 1, math.floor(place)) for place in exact]


def corners(volume: Volume) -> Array:
    """The corners of the field of view, in mm."""
    outer = itertools.product(*((-0.5, size - 0.5) for size in volume.voxels.shape[:3]))
    made: Array = nib.affines.apply_affine(volume.affine, list(outer))
    return made


@pytest.mark.parametrize("code", CODES)
def test_a_resized_volume_has_the_same_field_of_view(code: str) -> None:
    direction = np.array([1.0, -2.0, 0.5])
    empty = volume_of(np.zeros(SHAPE, np.float32), tilted(code))
    volume = dataclasses.replace(empty, voxels=(places(empty) @ direction).astype(np.float32))
    made = resize_to(volume, (9, 6, 11))
    assert np.allclose(corners(made), corners(volume))
    assert np.allclose(made.zooms, nib.affines.voxel_sizes(made.affine))
    assert nib.aff2axcodes(made.affine) == tuple(code)
    inner = (slice(1, -1),) * 3  # around which there were voxels
    assert np.allclose(made.voxels[inner], (places(made) @ direction)[inner], atol=1e-4)


def test_a_volume_of_that_size_stays_as_it_is() -> None:
    volume = volume_of(random_voxels(SHAPE), scaling=Scaling(2, 1))
    assert resize_to(volume, SHAPE).voxels is volume.voxels
    assert resize_longest_to(volume, max(SHAPE)).voxels.dtype == np.int16


@given(SIZES, st.integers(1, 20), st.sampled_from(CODES))
def test_the_longest_axis_decides_the_factor_of_all(
    shape: tuple[int, int, int], size: int, code: str
) -> None:
    volume = volume_of(values_of(shape, 0).astype(np.float32), tilted(code))
    made = resize_longest_to(volume, size)
    assert made.voxels.shape == (size,) * 3
    assert np.allclose(np.array(made.zooms) / volume.zooms, max(shape) / size)
    resampling = resize_longest(Grid.of(shape, volume.affine), size)
    assert resampling.grid.shape == tuple(max(1, round(Fraction(n * size, max(shape)))) for n in shape)
    inside, grid = resample_voxels(volume.voxels, Scaling(), resampling, Interpolation())[0], resampling.grid
    starts = np.linalg.inv(made.affine) @ grid.affine[:, 3]
    box = tuple(slice(a, a + n) for a, n in zip(np.rint(starts[:3]).astype(int), grid.shape, strict=True))
    assert np.array_equal(made.voxels[box], inside)
    assert np.allclose(starts[:3], [s.start for s in box], atol=1e-6)
    padding = np.ones(made.voxels.shape, bool)
    padding[box] = False
    assert (made.voxels[padding] == inside.min()).all()


# Smoothing


@given(SIZES, SIZES, SEEDS, st.sampled_from(["linear", "cubic"]))
def test_smoothing_is_that_of_scikit_image(
    shape: tuple[int, int, int], wanted: tuple[int, int, int], seed: int, kind: str
) -> None:
    values = values_of(shape, seed)
    resampling = resize(Grid(shape, np.eye(4)), wanted)
    made, _ = resample_voxels(values, Scaling(), resampling, Interpolation(kind, antialias=True))
    factors = np.array(shape) / wanted
    smooth = ndimage.gaussian_filter(values, np.maximum(0, (factors - 1) / 2), mode="nearest")
    expected = ndimage.zoom(smooth, 1 / factors, order=ORDERS[kind], mode="nearest", grid_mode=True)
    assert_close(made, expected, values)


@pytest.mark.parametrize("kind", ["linear", "cubic"])
def test_stripes_become_grey(kind: str) -> None:
    """Without smoothing, every third stripe would stay as it is."""
    stripes = np.resize([0, 90], (60, 1, 1))
    resampling = resize(Grid((60, 1, 1), np.eye(4)), (20, 1, 1))
    plain, smooth = (
        resample_voxels(stripes, Scaling(), resampling, Interpolation(kind, antialias=antialias))[0].ravel()[
            2:-2
        ]
        for antialias in (False, True)
    )
    assert np.ptp(plain) > 80
    assert np.abs(smooth - 45).max() < 2


def test_only_axes_that_get_fewer_voxels_are_smoothed() -> None:
    volume = volume_of(values_of(SHAPE, 4))
    for spacing in ((1.0, 1.5, 1.1), (2.0, 0.4, 3.0)):
        plain, smooth = (resample(volume, spacing, Interpolation(antialias=on)) for on in (False, True))
        assert np.array_equal(plain.voxels, smooth.voxels)


# Anisotropic volumes


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_anisotropic_volume_is_resampled_as_by_nnunet(axis: int) -> None:
    """Each slice by splines, and the slices by nearest neighbours."""
    others = [each for each in range(3) if each != axis]
    shape, wanted = np.full(3, 9), np.full(3, 14)
    shape[axis], wanted[axis] = 5, 12
    zooms = np.where(np.arange(3) == axis, 5.0, 1.2)
    volume = volume_of(values_of(tuple(shape), 3), np.diag([*zooms, 1]))
    mask = (volume.voxels > 200).astype(np.uint8)
    how = Interpolation("cubic", "linear", separate_z=True)
    x, y, z = wanted.tolist()
    made = resize_to(dataclasses.replace(volume, mask=mask), (x, y, z), how)
    slices = np.floor((np.arange(12) + 0.5) * 5 / 12).astype(int)
    factors = (wanted / shape)[others]
    for values, result, order in ((volume.voxels, made.voxels, 3), (mask.astype(float), made.mask, 1)):
        expected = np.stack(
            [
                ndimage.zoom(values.take(n, axis), factors, order=order, mode="nearest", grid_mode=True)
                for n in slices
            ],
            axis,
        )
        assert result is not None
        assert_close(result, expected if order == 3 else expected >= 0.5, values)


@pytest.mark.parametrize(
    ("zooms", "spacing", "axis"),
    [
        ((1.0, 1.0, 3.0), (1.0, 1.0, 1.0), None),
        ((1.0, 1.0, 3.1), (1.0, 1.0, 1.0), 2),
        ((4.0, 1.0, 1.2), (1.0, 1.0, 1.0), 0),
        ((1.0, 1.0, 1.0), (1.0, 5.0, 1.0), 1),
        ((5.0, 1.0, 1.0), (1.0, 5.0, 1.0), 0),
        ((0.24, 1.25, 1.2500001), (1.0, 1.0, 1.0), None),
        ((0.24, 1.25, 1.25), (1.0, 1.0, 9.0), None),
    ],
)
def test_the_axis_of_long_voxels_is_that_of_nnunet(
    zooms: tuple[float, ...], spacing: tuple[float, ...], axis: int | None
) -> None:
    assert coarse_axis(respace(Grid((9, 9, 9), np.diag([*zooms, 1.0])), spacing)) == axis


# Masks


@given(SIZES, STEPS, SEEDS, st.integers(1, 4))
def test_a_mask_has_the_label_of_the_largest_share(
    shape: tuple[int, int, int], spacing: tuple[float, ...], seed: int, most: int
) -> None:
    mask = np.random.default_rng(seed).integers(0, most + 1, shape).astype(np.uint16) * 1000
    resampling = respace(Grid(shape, np.eye(4)), spacing)
    made = resample_labels(mask, resampling, Interpolation(mask="linear"))
    labels = np.unique(mask)
    shares = np.stack([by_scipy((mask == label).astype(np.float64), resampling, 1) for label in labels])
    chosen = np.take_along_axis(shares, np.searchsorted(labels, made)[np.newaxis], axis=0)[0]
    assert made.dtype == mask.dtype
    assert (chosen >= shares.max(axis=0) - 3 * 2**-10).all()  # positions are rounded


def test_of_equal_shares_the_largest_label_wins() -> None:
    mask = np.array([0, 1, 1, 0, 2, 1], np.uint8).reshape(6, 1, 1)
    made = resample_labels(mask, respace(Grid((6, 1, 1), np.eye(4)), (2, 1, 1)), Interpolation(mask="linear"))
    assert made.ravel().tolist() == [1, 1, 2]


def test_labels_are_mixed_slab_by_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.random.default_rng(0).integers(0, 4, (9, 8, 7)).astype(np.uint8)
    resampling = respace(Grid((9, 8, 7), np.eye(4)), (0.8, 1.3, 0.7))
    whole = resample_labels(mask, resampling, Interpolation(mask="linear"))
    monkeypatch.setattr("beam_nifti.volume.label_map._CHUNK", 1)
    assert np.array_equal(resample_labels(mask, resampling, Interpolation(mask="linear")), whole)


# Grids


def test_the_grids_of_a_preparation_follow_each_other() -> None:
    record = RecordConfig(orientation="LPS", spacing=(1, 1, 1), shape=(8, 9, 10))
    volume = volume_of(random_voxels(SHAPE), tilted("RAS"))
    steps = prepared_grids(Grid.of(SHAPE, volume.affine), record)
    assert [step.name for step in steps] == ["orientation", "spacing", "shape"]
    for number, step in enumerate(steps):
        options = dict.fromkeys(("orientation", "spacing", "shape")[number + 1 :])
        made = prepare_volume(volume, dataclasses.replace(record, **options))  # type: ignore[arg-type]
        assert step.after.shape == made.voxels.shape
        assert np.array_equal(step.after.affine, made.affine)
        assert step.before is (steps[number - 1].after if number else step.before)
    assert steps[0].before.zooms == pytest.approx(ZOOMS)


@pytest.mark.parametrize(
    "record",
    [
        RecordConfig(orientation="SRA", resize=(8, 9, 10), shape=(6, 12, 10)),
        RecordConfig(spacing=(1, 1, 1), resize_longest=11, shape=(6, 12, 10)),
    ],
)
def test_a_resized_volume_has_the_last_of_these_grids(record: RecordConfig) -> None:
    volume = volume_of(random_voxels(SHAPE), tilted("ILP"))
    made, steps = prepare_volume(volume, record), prepared_grids(Grid.of(SHAPE, volume.affine), record)
    assert (len(steps), steps[-1].after.shape) == (3, made.voxels.shape)
    assert np.allclose(steps[-1].after.affine, made.affine, rtol=0, atol=1e-9)


def test_the_grids_end_before_one_that_voxels_determine() -> None:
    grid = Grid.of(SHAPE, tilted())
    cropped = RecordConfig(spacing=(1, 1, 1), crop_foreground="nonzero", shape=(8, 8, 8))
    assert [step.name for step in prepared_grids(grid, cropped)] == ["spacing"]
    assert prepared_grids(grid, RecordConfig(preprocess="a:f", spacing=(1, 1, 1))) == []


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"interpolation": "lanczos", "spacing": (1, 1, 1)},
            "--interpolation is 'lanczos'; choose one of: linear",
        ),
        (
            {"mask_interpolation": "cubic", "spacing": (1, 1, 1)},
            "--mask-interpolation is 'cubic'; choose one of",
        ),
        (
            {"interpolation": "linear"},
            "--interpolation has no effect without --align, --reference, ",
        ),
        (
            {"mask_interpolation": "nearest"},
            "--mask-interpolation has no effect without --align, --reference, ",
        ),
        (
            {"resize": (9, 9, 9), "voxel_dtype": "native"},
            "--resize changes the voxels, .*use --voxel-dtype float32, or --interpolation nearest$",
        ),
        (
            {"antialias": True},
            "--antialias has no effect without --align, --reference, --spacing, --resize or",
        ),
        (
            {"antialias": True, "spacing": (1, 1, 1), "interpolation": "nearest"},
            "--antialias smooths images before they are interpolated, but --interpolation nearest keeps",
        ),
        ({"separate_z": "always", "spacing": (1, 1, 1)}, "--separate-z is 'always'; choose one of: never"),
        ({"interpolation": "cubic", "align": "never"}, "--interpolation has no effect without --align, "),
        ({"separate_z": "auto"}, "--separate-z has no effect without --spacing"),
        (
            {"separate_z": "auto", "spacing": (1, 1, 1), "interpolation": "nearest"},
            "--separate-z auto has no effect with --interpolation nearest",
        ),
        ({"resize": (9, 9, 0)}, "--resize is 9,9,0; give three numbers of voxels"),
        ({"resize_longest": 0}, "--resize-longest is 0; give a number of voxels, such as 128"),
        (
            {"resize": (9, 9, 9), "resize_longest": 9},
            "--resize and --resize-longest both decide",
        ),
        (
            {"resize": (9, 9, 9), "spacing": (1, 1, 1)},
            "--spacing and --resize both decide the positions",
        ),
        ({"resize": (9, 8, 7), "shape": (9, 8, 7)}, "--shape has no effect after --resize, which gives that"),
        ({"resize_longest": 9, "shape": (9, 9, 9)}, "--shape has no effect after --resize-longest, which"),
        (
            {"interpolation": "cubic", "spacing": (1, 1, 1), "voxel_dtype": "native"},
            "--spacing changes the voxels, .*use --voxel-dtype float32, or --interpolation nearest$",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        RecordConfig(**options)


def test_a_mask_interpolation_requires_masks() -> None:
    record = RecordConfig(spacing=(1, 1, 1), mask_interpolation="linear")
    with pytest.raises(UsageError, match=r"^--mask-interpolation requires --mask-column"):
        BuildConfig("m.tsv", "out", record)
    assert BuildConfig("m.tsv", "out", record, Columns(mask="lesion")).record.mask_interpolation == "linear"


def test_the_defaults_are_those_of_datasets_without_these_options() -> None:
    plain = RecordConfig(spacing=(1, 1, 1))
    assert RecordConfig(spacing=(1, 1, 1), interpolation="linear", mask_interpolation="nearest") == plain
    assert RecordConfig(spacing=(1, 1, 1), antialias=False, separate_z="never") == plain
    assert RecordConfig(antialias=False, separate_z="never", align="never") == RecordConfig()
    others = [
        RecordConfig(spacing=(1, 1, 1), **{name: value})  # type: ignore[arg-type]
        for name, value in (
            ("interpolation", "cubic"),
            ("interpolation", "nearest"),
            ("mask_interpolation", "linear"),
            ("antialias", True),
            ("separate_z", "auto"),
        )
    ]
    assert len({record.fingerprint for record in (plain, *others)}) == 6
    facts = BuildConfig("m.tsv", "out", plain).as_dataset_config()
    assert not {"interpolation", "mask_interpolation"} & facts.keys()


# Datasets


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Images with masks, of voxels of different sizes."""
    rows = []
    for number in range(3):
        affine = AFFINE @ np.diag([1 + number / 4, 1, 1, 1])
        write_image(tmp_path / f"{number}.nii.gz", brain((9, 8, 7), seed=number), affine=affine)
        labels = np.random.default_rng(number).integers(0, 4, (9, 8, 7)).astype(np.uint8)
        write_image(tmp_path / f"{number}_mask.nii.gz", labels, affine=affine)
        rows.append({"path": f"{number}.nii.gz", "mask": f"{number}_mask.nii.gz"})
    return write_manifest(tmp_path / "m.tsv", rows)


def test_a_dataset_states_how_it_was_resampled(run: Run, cohort: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = [
        "--spacing=3,2.5,2",
        "--interpolation=cubic",
        "--mask-interpolation=linear",
        "--allow-mixed-shapes",
        "--antialias",
        "--separate-z=auto",
    ]
    run("build", cohort, output, "--mask-column=mask", *flags)
    assert "3 rebuilt" in run("verify", output, "--deep=all", "--manifest", cohort)
    described = run("inspect", output)
    options = "interpolation cubic, mask-interpolation linear, antialias, separate-z auto"
    assert f"prepared with spacing 3,2.5,2, {options}\n" in described
    told = run("build", cohort, output, "--mask-column=mask", flags[0], flags[3], code=2)
    assert "--interpolation was cubic, now not given" in told
    again = tmp_path / "again"
    run("build", cohort, again, "--like", output)
    assert info_of(again).config == info_of(output).config
    coarse = tmp_path / "coarse"
    run("build", cohort, coarse, "--like", output, "--without=spacing")
    assert info_of(coarse).record_config == RecordConfig(mask_dtype="uint8")


@pytest.mark.parametrize(
    ("flags", "shape", "said"),
    [
        (["--resize=8,9,10"], (8, 9, 10), "resize 8,9,10"),
        (["--resize-longest=12", "--spacing=1,1,1"], (12, 12, 12), "spacing 1,1,1, resize-longest 12"),
        (["--resize=8,9,10", "--crop-foreground=mask", "--shape=8,9,10"], (8, 9, 10), "resize 8,9,10, crop"),
    ],
)
def test_volumes_of_any_shape_become_ones_of_so_many_voxels(
    run: Run, cohort: Path, tmp_path: Path, flags: list[str], shape: tuple[int, ...], said: str
) -> None:
    output = tmp_path / "out"
    write_image(tmp_path / "1.nii.gz", brain((5, 4, 12)))
    write_image(tmp_path / "1_mask.nii.gz", np.ones((5, 4, 12), np.uint8))
    assert cli.main(["check", str(cohort), "--mask-column=mask", *flags]) == 0
    run("build", cohort, output, "--mask-column=mask", *flags)
    assert info_of(output).shape == shape
    assert "3 rebuilt" in run("verify", output, "--deep=all", "--manifest", cohort)
    assert f"prepared with {said}" in run("inspect", output)
    again = tmp_path / "again"
    run("build", cohort, again, "--like", output, "--resize=7,7,7")  # which precedes a --resize-longest
    assert info_of(again).record_config.resize == (7, 7, 7)
    assert info_of(again).record_config.resize_longest is None


def test_a_dataset_with_a_way_that_there_is_not_is_refused(run: Run, cohort: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run("build", cohort, output, "--spacing=1.5,2,2", "--interpolation=cubic", "--allow-mixed-shapes")
    info = info_of(output)
    for value, message in (
        ("lanczos", "--interpolation is 'lanczos'"),
        (3, "config.interpolation is 3, expected text"),
    ):
        changed = dataclasses.replace(info, config={**info.config, "interpolation": value})
        with pytest.raises(DatasetError, match=message):
            DatasetInfo.from_json(changed.to_json(), "dataset_info.json")
    assert json.loads(info.to_json())["config"]["interpolation"] == "cubic"


def test_native_voxels_can_be_those_of_nearest_neighbours(run: Run, cohort: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = ["--spacing=1.5,2,2", "--interpolation=nearest", "--voxel-dtype=native", "--allow-mixed-shapes"]
    run("build", cohort, output, *flags)
    assert info_of(output).dtype == "int16"
    assert "3 rebuilt" in run("verify", output, "--deep=all", "--manifest", cohort)


def rounded(code: str, zooms: tuple[float, ...], degrees: float) -> Array:
    """An oblique affine as headers hold it, in float32."""
    affine: Array = tilted(code, zooms, degrees).astype(np.float32).astype(np.float64)
    return affine


@pytest.mark.parametrize("degrees", [0.0, 5.0, 12.0, 20.0, 33.0])
@pytest.mark.parametrize("size", [20, 512])
def test_rounding_in_headers_does_not_decide_between_two_voxels(degrees: float, size: int) -> None:
    voxels = np.arange(size, dtype=np.int16).reshape(size, 1, 1)
    volume = volume_of(voxels, rounded("RAS", (1, 1, 1), degrees))
    made = prepare_volume(volume, RecordConfig(spacing=(2, 1, 1), interpolation="nearest"))
    assert made.voxels.ravel().tolist() == list(range(1, size, 2))
    mask = (voxels[:, 0, 0] // (size // 2) + 1).astype(np.uint8).reshape(size, 1, 1)
    for way in ("nearest", "linear"):
        config = RecordConfig(spacing=(2, 1, 1), mask_dtype="uint8", mask_interpolation=way)
        labels = prepare_volume(dataclasses.replace(volume, mask=mask), config).mask
        assert labels is not None
        assert labels.ravel().tolist() == [1] * (size // 4) + [2] * (size // 4)


@pytest.mark.parametrize("degrees", [0.0, 5.0, 12.0, 20.0, 33.0])
@pytest.mark.parametrize("size", [0.5, 0.8, 1.0])
def test_rounding_in_headers_does_not_decide_what_is_anisotropic(degrees: float, size: float) -> None:
    grid = Grid((9, 9, 9), rounded("RAS", (size, size, 3 * size), degrees))
    assert coarse_axis(resize(grid, (14, 14, 14))) is None
    longer = Grid((9, 9, 9), rounded("RAS", (size, size, 3.01 * size), degrees))
    assert coarse_axis(resize(longer, (14, 14, 14))) == 2
