"""Volumes on the grids of their sources, against scipy and against the steps of a build."""

from __future__ import annotations

import itertools
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from beam_nifti.config import RecordConfig
from beam_nifti.volume import Scaling, Volume
from beam_nifti.volume.files import Source
from beam_nifti.volume.grid import Grid
from beam_nifti.volume.preprocess import prepare_volume
from beam_nifti.volume.restoring import restore_classes, restore_voxels
from tests.images import row_of

CODES = [
    "".join(code) for axes in itertools.permutations(("RL", "AP", "SI")) for code in itertools.product(*axes)
]
SHAPES = st.tuples(*[st.integers(1, 9)] * 3)


def rotation(angles: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    """A rotation of space, (4, 4)."""
    return nib.affines.from_matvec(nib.eulerangles.euler2mat(*angles))


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Voxels anywhere, of any orientation, a few of them oblique."""
    zooms = draw(st.tuples(*[st.sampled_from([0.8, 1.0, 1.5, 2.0, 3.3])] * 3))
    turned = nib.orientations.inv_ornt_aff(
        nib.orientations.axcodes2ornt(draw(st.sampled_from(CODES))), (1, 1, 1)
    )
    angles = draw(st.sampled_from([(0.0, 0.0, 0.0), (0.3, -0.2, 0.1)]))
    affine = rotation(angles) @ np.diag([*zooms, 1]) @ turned
    affine[:3, 3] = draw(st.tuples(*[st.floats(-100, 100)] * 3))
    return Grid(draw(SHAPES), affine)


def volume_on(grid: Grid, voxels: npt.NDArray[Any], mask: npt.NDArray[Any] | None = None) -> Volume:
    source = Source((), grid.shape, tuple(grid.affine.ravel().tolist()))
    return Volume(row_of("a.nii"), voxels, Scaling(), grid.affine, grid.zooms, "float32", source, mask)


def distinct(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Voxels that are all different, and not 0."""
    return np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)


@given(grids(), st.sampled_from(CODES), SHAPES, st.booleans())
def test_what_was_turned_cropped_and_padded_comes_back_bit_for_bit(
    grid: Grid, code: str, shape: tuple[int, int, int], is_linear: bool
) -> None:
    voxels = distinct((*grid.shape, 2))
    made = prepare_volume(volume_on(grid, voxels), RecordConfig(orientation=code, shape=shape))
    marked = made.voxels + 1000  # also the padding, which is not to come back
    found = restore_voxels(marked, Grid.of(marked.shape, made.affine), grid, -1, is_linear=is_linear)
    assert (found.shape, found.dtype) == (voxels.shape, voxels.dtype)
    is_inside = found != -1
    assert np.array_equal(found[is_inside], (voxels + 1000)[is_inside])
    is_known = voxels != voxels.min()  # which is also the padding
    assert np.array_equal(is_inside[is_known], np.isin(voxels, made.voxels)[is_known])
    classes = restore_classes(marked, Grid.of(marked.shape, made.affine), grid, 7, is_linear=is_linear)
    assert np.array_equal(classes, np.where(is_inside[..., 0], 1, 7))


@settings(max_examples=60)
@given(grids(), grids(), st.sampled_from([(), (2,)]))
def test_anything_between_two_grids_is_what_scipy_gives(
    grid: Grid, other: Grid, channels: tuple[int, ...]
) -> None:
    middle = Grid(other.shape, other.affine.copy())  # with the centre of the other one
    centre = [nib.affines.apply_affine(g.affine, (np.array(g.shape) - 1) / 2) for g in (grid, other)]
    middle.affine[:3, 3] += centre[0] - centre[1] + 0.123
    voxels = np.random.default_rng(0).normal(size=(*grid.shape, *channels)).astype(np.float32)
    points = nib.affines.apply_affine(
        np.linalg.inv(grid.affine) @ middle.affine, np.moveaxis(np.indices(middle.shape), 0, -1)
    )
    # Where rounding decides on which side of a border a voxel lies, scipy may find it on the other one.
    is_clear = (np.abs(points % 1 - 0.5) > 1e-5).all(-1)
    is_inside = ((points >= -0.5) & (points <= np.array(grid.shape) - 0.5)).all(-1)
    for order, is_linear in ((0, False), (1, True)):
        found = restore_voxels(voxels, grid, middle, -9, is_linear=is_linear)
        for channel in range(2 if channels else 1):
            one, got = (voxels[..., channel], found[..., channel]) if channels else (voxels, found)
            nearest = np.moveaxis(np.floor(points + 0.5) if order == 0 else points, -1, 0)
            expected = ndimage.map_coordinates(one, nearest, order=order, mode="nearest")
            expected[~is_inside] = -9
            assert np.allclose(got[is_clear], expected[is_clear], rtol=1e-5, atol=2e-5)


def test_a_voxel_in_the_middle_of_two_gets_the_later_one_however_it_is_rounded() -> None:
    fine = Grid((7, 1, 1), np.diag([1.0, 1, 1, 1]))
    for shift in (-1e-9, 0.0, 1e-9):
        coarse = Grid((4, 1, 1), np.diag([2.0, 1, 1, 1]))
        coarse.affine[0, 3] = shift
        labels = np.arange(4, dtype=np.uint8).reshape(4, 1, 1)
        found = restore_voxels(labels, coarse, fine, 0, is_linear=False)
        assert found.ravel().tolist() == [0, 1, 1, 2, 2, 3, 3]


def test_a_constant_stays_and_edges_are_the_outermost_voxels() -> None:
    coarse, fine = Grid((3, 3, 3), np.diag([3.0, 3, 3, 1])), Grid((13, 9, 9), np.eye(4))
    fine.affine[:3, 3] = -1
    found = restore_voxels(np.full((3, 3, 3), 0.1, np.float32), coarse, fine, 5, is_linear=True)
    assert np.unique(found[:9]).tolist() == [np.float32(0.1)]
    assert np.unique(found[9:]).tolist() == [5]


@pytest.mark.parametrize("is_linear", [False, True])
def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch, is_linear: bool) -> None:
    source = Grid((11, 6, 5), np.diag([0.7, 1.1, 0.9, 1]))
    grids = [Grid((5, 4, 3), affine) for affine in (np.diag([1.5, 1, 1, 1]), rotation((0.3, 0.1, 0.2)))]
    whole = [restore_voxels(distinct(g.shape), g, source, 0, is_linear=is_linear) for g in grids]
    monkeypatch.setattr("beam_nifti.volume.restoring._SLAB_VOXELS", 60)
    parts = [restore_voxels(distinct(g.shape), g, source, 0, is_linear=is_linear) for g in grids]
    assert all(map(np.array_equal, whole, parts))
