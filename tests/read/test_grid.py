"""Sliding windows over a record."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import beam_nifti as bn
from beam_nifti.errors import OutputError, UsageError
from beam_nifti.read.grid import Corners, _starts
from tests.images import AFFINE
from tests.read.patch_cohort import PATCH, SHAPES, build_patch_cohort


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_patch_cohort(tmp_path_factory.mktemp("cohort"))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, len(SHAPES) - 1),
    st.tuples(*[st.integers(6, 45)] * 3),
    st.floats(0, 0.6),
    st.sampled_from(["gaussian", "constant"]),
    st.booleans(),
)
def test_what_is_cut_and_stitched_is_the_record(
    dataset: Path, number: int, shape: tuple[int, ...], overlap: float, weights: Any, is_first: bool
) -> None:
    records = bn.Dataset(dataset, columns=["image"], channels_first=is_first)
    grid = records.grid_patches(number, shape, overlap)
    patches = [patch["image"] for patch in grid]
    assert len(grid) == len(patches)
    image = records[number]["image"]
    stitched = grid.stitch(patches, weights)
    assert (stitched.shape, stitched.dtype, stitched.flags.c_contiguous) == (image.shape, np.float32, True)
    assert np.allclose(stitched, image, rtol=1e-5, atol=1e-6)
    axis = 0 if is_first else -1
    flat = grid.stitch((patch.squeeze(axis) for patch in patches), weights)
    assert np.array_equal(flat, stitched.squeeze(axis))
    many = grid.stitch((np.concatenate([patch, 2 * patch], axis) for patch in patches), weights)
    assert np.allclose(many, np.concatenate([stitched, 2 * stitched], axis))


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0, 0.99))
def test_neighbours_overlap_as_far_as_was_asked(size: int, length: int, overlap: float) -> None:
    starts = _starts(size, length, overlap)
    if size <= length:
        (start,) = starts
        assert start <= 0
        assert start + length >= size
    else:
        assert (starts[0], starts[-1]) == (0, size - length)
        steps = np.diff(starts)
        assert 1 <= steps.min() <= steps.max() <= max(1, length * (1 - overlap))


def test_corners_are_the_product_of_those_along_each_axis(dataset: Path) -> None:
    corners = bn.Dataset(dataset).grid_patches(3, (20, 12, 9)).corners
    expected = list(itertools.product(*corners.starts))
    assert [*corners] == expected == [corners[i] for i in range(-len(corners), 0)]
    assert corners[::-2] == expected[::-2]
    with pytest.raises(IndexError, match=f"there is no patch {len(corners)}: the grid has {len(corners)}"):
        corners[len(corners)]


def test_a_grid_of_many_patches_takes_no_memory() -> None:
    corners = Corners((tuple(range(30_000)),) * 3)
    assert (len(corners), corners[-1], corners[30_001]) == (27_000_000_000_000, (29_999,) * 3, (0, 1, 1))


def test_overlap_decides_how_many_patches_there_are(dataset: Path) -> None:
    records = bn.Dataset(dataset)
    assert [len(records.grid_patches(0, PATCH, overlap)) for overlap in (0, 0.5, 0.75)] == [18, 60, 280]
    assert repr(records.grid_patches(0, PATCH, 0)).startswith(
        f"<PatchGrid of 18 patches of {PATCH} in a volume"
    )
    assert records.grid_patches(0, PATCH).corners == records.grid_patches(0, PATCH, 0.5).corners


def test_gaussian_weights_trust_the_middle_of_a_patch(dataset: Path) -> None:
    grid = bn.Dataset(dataset).grid_patches(3, (20, 30, 27), 0.1)
    assert [corner[0] for corner in grid.corners] == [0, 18]
    zero, one = np.zeros(grid.shape), np.ones(grid.shape)
    constant = grid.stitch([zero, one], "constant")[:, 0, 0]
    gaussian = grid.stitch([zero, one])[:, 0, 0]
    assert constant.tolist() == [0] * 18 + [0.5] * 2 + [1] * 18
    assert 0 < gaussian[18] < 0.5 < gaussian[19] < 1
    assert np.allclose(gaussian[18] + gaussian[19], 1)


def test_a_pickled_grid_opens_its_dataset_again(dataset: Path) -> None:
    grid = bn.Dataset(dataset, "train[1:]", columns=["image"], channels_first=True).grid_patches(0, PATCH)
    grid[0]  # which reads columns of the index that it keeps
    data = pickle.dumps(grid)
    assert len(data) < 2000
    again = pickle.loads(data)
    assert (again.corners, len(again)) == (grid.corners, len(grid))
    assert np.array_equal(again[7]["image"], grid[7]["image"])


def save_and_load(dataset: Path, volume: Any, path: Path, **options: Any) -> Any:
    """Save a volume for the first record; the image as nibabel loads it."""
    bn.Dataset(dataset, **options).save_nifti(0, volume, path)
    return nib.load(path)


@pytest.mark.parametrize("is_first", [False, True])
def test_a_result_lies_where_its_record_does(dataset: Path, tmp_path: Path, is_first: bool) -> None:
    options = {"channels_first": is_first, "columns": ["image"]}
    grid = bn.Dataset(dataset, **options).grid_patches(0, PATCH)
    both = [np.concatenate([p["image"], -p["image"]], 0 if is_first else -1) for p in grid]
    results = grid.stitch(both), grid.stitch(p["image"] for p in grid)
    images = [save_and_load(dataset, r, tmp_path / f"{r.ndim}-{r.size}.nii.gz", **options) for r in results]
    source = bn.extract(dataset, "sub-0").to_nibabel().header
    for image, result in zip(images, results, strict=True):
        assert image.get_data_dtype() == np.float32
        assert np.array_equal(image.affine, AFFINE)
        assert image.header.get_zooms()[:3] == source.get_zooms()
        for field in ("sform_code", "qform_code", "xyzt_units"):
            assert image.header[field] == source[field]
        last = np.moveaxis(result, 0, -1) if is_first else result
        assert np.array_equal(np.asarray(image.dataobj), last.squeeze(-1) if last.shape[3] == 1 else last)
    assert [image.ndim for image in images] == [4, 3]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([False, True]), "uint8"),
        (np.array([0, 255], np.int64), "uint8"),
        (np.array([0, 256], np.int32), "uint16"),
        (np.array([-1, 127]), "int8"),
        (np.array([-1, 128]), "int16"),
        (np.array([-(2**63), 2**63 - 1]), "int64"),
        (np.array([0, 2**64 - 1], np.uint64), "uint64"),
        (np.array([-0.5, np.inf], np.float16), "float32"),
        (np.array([0.1, np.nan], ">f4"), "float32"),
        (np.array([0.1, 1e300]), "float64"),
    ],
)
def test_a_saved_volume_keeps_its_values(dataset: Path, tmp_path: Path, values: Any, dtype: str) -> None:
    volume = np.resize(values, SHAPES[0])
    image = save_and_load(dataset, volume, tmp_path / "a.nii")
    assert image.get_data_dtype() == dtype
    assert np.array_equal(image.dataobj.get_unscaled(), volume, equal_nan=volume.dtype.kind == "f")
    assert (image.dataobj.slope, image.dataobj.inter) == (1, 0)


X, Y, Z = SHAPES[0]


@pytest.mark.parametrize(
    ("shape", "is_first", "expected"),
    [
        ((X, Y), False, r"\(40, 31, 26\) or \(40, 31, 26, C\); give one volume, without a batch axis"),
        ((1, X, Y, Z, 1), False, "for record 'sub-0' has the shape .1, 40, 31, 26, 1., expected"),
        ((X, Y, Z, 1, 1), False, "expected"),
        ((X, Y, Z, 0), False, "expected"),
        ((2, X, Y, Z), False, "expected"),
        ((X, Y, Z, 2), True, r"expected \(40, 31, 26\) or \(C, 40, 31, 26\)"),
        (SHAPES[1], False, r"has the shape \(36, 40, 25\), expected \(40, 31, 26\)"),
    ],
)
def test_a_volume_of_another_shape_is_not_saved(
    dataset: Path, tmp_path: Path, shape: tuple[int, ...], is_first: bool, expected: str
) -> None:
    with pytest.raises(UsageError, match=expected):
        save_and_load(dataset, np.zeros(shape), tmp_path / "a.nii", channels_first=is_first)
    assert not list(tmp_path.iterdir())


def test_a_volume_that_no_image_holds_is_not_saved(dataset: Path, tmp_path: Path) -> None:
    for dtype in ("complex64", "longdouble", "object", "datetime64[s]"):
        with pytest.raises(UsageError, match=r"record 'sub-0' has the dtype .*; convert it, such as by"):
            save_and_load(dataset, np.zeros(SHAPES[0], dtype), tmp_path / "a.nii")
    with pytest.raises(UsageError, match=r"a\.mgz: not the name of a NIfTI image"):
        save_and_load(dataset, np.zeros(SHAPES[0]), tmp_path / "a.mgz")
    with pytest.raises(IndexError, match="there is no record 5"):
        bn.Dataset(dataset).save_nifti(5, np.zeros(SHAPES[0]), tmp_path / "a.nii")
    assert not list(tmp_path.iterdir())


def test_only_a_file_that_may_be_replaced_is(dataset: Path, tmp_path: Path) -> None:
    records, path = bn.Dataset(dataset), tmp_path / "a.nii.gz"
    records.save_nifti(0, np.zeros(SHAPES[0]), path)
    with pytest.raises(OutputError, match=r"a\.nii\.gz: already exists; .* overwrite=True"):
        records.save_nifti(0, np.ones(SHAPES[0]), path)
    assert np.asarray(nib.load(path).dataobj).max() == 0
    records.save_nifti(0, np.ones(SHAPES[0]), path, overwrite=True)
    assert np.asarray(nib.load(path).dataobj).min() == 1
    for name in ("sub-0_path.nii.gz", "sub-3_mask.nii.gz"):
        source = dataset.parent / name
        before = source.read_bytes()
        with pytest.raises(UsageError, match=f"{name}: the dataset was built from this file; choose another"):
            records.save_nifti(0, np.ones(SHAPES[0]), source, overwrite=True)
        assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda r: r.grid_patches(0, (4, 4)), r"the shape of a patch is \(4, 4\); give three integers"),
        (
            lambda r: r.grid_patches(0, PATCH, 1),
            "overlap is 1; give a share of at least 0 and below 1",
        ),
        (lambda r: r.grid_patches(0, PATCH, 50), "overlap is 50; give a share of at least 0 and below 1"),
        (lambda r: r.grid_patches(0, PATCH, -0.1), "overlap is -0.1; give a share of at least 0 and below 1"),
        (lambda r: r.grid_patches(0, PATCH, "half"), "overlap is 'half'"),
        (
            lambda r: r.grid_patches(0, PATCH, 0).stitch([np.zeros(PATCH)] * 17),
            "the number of predictions is 17, but there are 18 patches; give one for each",
        ),
        (
            lambda r: r.grid_patches(0, PATCH, 0).stitch([np.zeros(PATCH)] * 19),
            "the number of predictions is more than 18, but there are 18",
        ),
        (lambda r: r.grid_patches(0, PATCH, 0).stitch([]), "the number of predictions is 0, but"),
        (
            lambda r: r.grid_patches(0, PATCH).stitch([np.zeros((1, *PATCH))]),
            r"prediction 0 .* \(1, 16, 12, 14\), expected \(16, 12, 14\) or \(16, 12, 14, C\); give",
        ),
        (
            lambda r: r.grid_patches(0, PATCH).stitch([np.zeros((1, *PATCH, 1))]),
            r"expected \(16, 12, 14\) or \(16, 12, 14, C\); give the shape .* without a batch axis",
        ),
        (
            lambda r: r.grid_patches(0, PATCH).stitch([np.zeros((*PATCH, 2)), np.zeros((*PATCH, 3))]),
            r"prediction 1 has the shape \(16, 12, 14, 3\), expected \(16, 12, 14, 2\); give the shape",
        ),
        (
            lambda r: r.grid_patches(0, PATCH).stitch([np.zeros(PATCH), np.zeros((*PATCH, 2))]),
            r"prediction 1 has the shape \(16, 12, 14, 2\), expected \(16, 12, 14\)",
        ),
        (
            lambda r: r.grid_patches(0, PATCH).stitch([], weights="linear"),
            "weights is 'linear'; choose one of: gaussian, constant",
        ),
    ],
)
def test_what_does_not_fit_is_refused(dataset: Path, ask: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ask(bn.Dataset(dataset))
    with pytest.raises(TypeError, match=r"index is slice\(0, 2, None\); give the number of one patch"):
        bn.Dataset(dataset).grid_patches(0, PATCH)[0:2]  # type: ignore[index]
    with pytest.raises(IndexError, match="there is no record 5"):
        bn.Dataset(dataset).grid_patches(5, PATCH)
