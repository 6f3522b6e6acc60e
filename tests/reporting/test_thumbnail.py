"""The picture and the small grid of a volume are the same however its axes are stored."""

from __future__ import annotations

import io
import itertools
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from beam_nifti.reporting.appearance import otsu_threshold
from beam_nifti.reporting.thumbnail import CELL, LABEL_COLOURS, block_means, draw_labels, draw_slices
from beam_nifti.volume.grid import Grid, axes_to, turn_voxels, turn_zooms
from beam_nifti.volume.rescale import Scaling, numpy_dtype

Image = pytest.importorskip("PIL.Image")

ORIENTATIONS = [
    "".join(letters)
    for order in itertools.permutations(("LR", "PA", "IS"))
    for letters in itertools.product(*order)
]
SPACING = (1.0, 2.0, 3.0)


def stored_as(code: str, voxels: Any, zooms: Sequence[float]) -> tuple[Any, Any, tuple[float, ...]]:
    """Voxels in RAS with a slightly oblique affine, stored in another orientation."""
    tilt = nib.eulerangles.euler2mat(0.1, -0.05, 0.15)
    affine = nib.affines.from_matvec(tilt @ np.diag(zooms), [-20, 5, 7])
    image = nib.Nifti1Image(voxels, affine)
    turns = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(code)
    )
    again = image.as_reoriented(turns)
    assert nib.aff2axcodes(again.affine) == tuple(code)
    return np.asarray(again.dataobj), again.affine, again.header.get_zooms()


def test_there_are_48_orientations() -> None:
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_every_orientation_gives_the_same_picture(code: str) -> None:
    voxels = np.random.default_rng(1).random((10, 8, 7), np.float32)
    stored, affine, zooms = stored_as(code, voxels, SPACING)
    turns = axes_to(Grid.of(stored.shape, affine), "RAS")
    again = turn_voxels(stored, turns)
    np.testing.assert_array_equal(again, voxels)
    assert turn_zooms(zooms, turns) == pytest.approx(SPACING)
    assert draw_slices(again, SPACING) == draw_slices(voxels, SPACING)
    np.testing.assert_allclose(block_means(again, 4), block_means(voxels, 4), rtol=1e-12)


def quarters(picture: bytes, cell: int) -> dict[str, float]:
    """The mean brightness of the four quarters of a square of the strip."""
    strip = Image.open(io.BytesIO(picture))
    pixels = np.asarray(strip.convert("L"), np.float64)[:, cell * CELL : (cell + 1) * CELL]
    half = CELL // 2
    return {
        "top left": pixels[:half, :half].mean(),
        "top right": pixels[:half, half:].mean(),
        "bottom left": pixels[half:, :half].mean(),
        "bottom right": pixels[half:, half:].mean(),
    }


@pytest.mark.parametrize("code", ["RAS", "LPS", "PIR", "SAL"])
@pytest.mark.parametrize(
    ("corner", "axial", "coronal", "sagittal"),
    [
        ((1, 1, 1), "top right", "top right", "top right"),
        ((0, 1, 1), "top left", "top left", "top right"),
        ((1, 0, 1), "bottom right", "top right", "top left"),
        ((1, 1, 0), "top right", "bottom right", "bottom right"),
    ],
)
def test_a_bright_corner_is_where_it_is_in_space(
    code: str, corner: tuple[int, int, int], axial: str, coronal: str, sagittal: str
) -> None:
    """Corners are right, anterior and superior where they are 1."""
    voxels = np.zeros((16, 16, 16), np.float32)
    # Beyond the middle, so that the middle slices cut it.
    voxels[tuple(slice(6, None) if high else slice(0, 10) for high in corner)] = 1
    stored, affine, _ = stored_as(code, voxels, (1, 1, 1))
    picture = draw_slices(turn_voxels(stored, axes_to(Grid.of(stored.shape, affine), "RAS")), (1, 1, 1))
    for cell, expected in enumerate((axial, coronal, sagittal)):
        found = quarters(picture, cell)
        assert max(found, key=lambda name: found[name]) == expected


def test_pictures_have_the_aspect_of_the_volume() -> None:
    voxels = np.random.default_rng(0).random((40, 20, 10)) + 1
    picture = np.asarray(Image.open(io.BytesIO(draw_slices(voxels, (1.0, 1.0, 3.0)))).convert("L"))
    assert picture.shape == (CELL, 3 * CELL)
    sizes = []
    for cell in range(3):
        lit = picture[:, cell * CELL : (cell + 1) * CELL] > 8
        sizes.append((np.ptp(np.flatnonzero(lit.any(0))) + 1, np.ptp(np.flatnonzero(lit.any(1))) + 1))
    # The box is 40 × 20 × 30 mm; the compression may darken a row of pixels at the edge.
    expected = [(CELL, CELL / 2), (CELL, CELL * 3 / 4), (CELL / 2, CELL * 3 / 4)]
    np.testing.assert_allclose(sizes, expected, atol=3)


def test_colours() -> None:
    colours = np.zeros((8, 8, 8, 3), np.uint8)
    colours[..., 0] = 255
    red = np.asarray(Image.open(io.BytesIO(draw_slices(colours, (1, 1, 1)))))
    assert red[CELL // 2, CELL // 2].tolist() == pytest.approx([255, 0, 0], abs=12)


def test_labels_have_colours_outlines_and_nothing_around() -> None:
    mask = np.zeros((8, 8, 8), np.uint8)
    mask[2:6, 2:6, 2:4], mask[2:6, 2:6, 4:6] = 7, 200
    picture = draw_labels(mask, (1, 1, 1), [0, 3, 7, 200])
    assert picture is not None
    pixels = np.asarray(Image.open(io.BytesIO(picture)))
    assert pixels.shape == (CELL, 3 * CELL, 4)
    coronal, step = pixels[:, CELL : 2 * CELL], CELL // 8
    # The second and the third label: 7 below, 200 above.
    for place, number in ((5, 1), (3, 2)):
        inside = coronal[place * step - step // 2, CELL // 2]
        assert "#{:02x}{:02x}{:02x}".format(*inside[:3]) == LABEL_COLOURS[number]
        assert 0 < inside[3] < 128
        assert coronal[place * step - step // 2, 2 * step, 3] == 255, "no outline"
    assert coronal[CELL // 2, CELL // 2, 3] == 255, "no outline between labels"
    assert not coronal[: 2 * step].any()
    assert not coronal[:, : 2 * step].any()
    assert draw_labels(np.zeros_like(mask), (1, 1, 1), [0, 7]) is None
    assert draw_labels(mask, (1, 1, 1), []) is not None, "labels that dataset_info.json does not name"


def test_labels_lie_where_the_voxels_are_drawn() -> None:
    mask = np.zeros((20, 12, 7), np.uint8)
    mask[3:15, 2:9, 1:6] = 1
    overlay = draw_labels(mask, SPACING, [0, 1])
    assert overlay is not None
    shown = np.asarray(Image.open(io.BytesIO(overlay)))[..., 3] > 0
    drawn = np.asarray(Image.open(io.BytesIO(draw_slices(mask, SPACING))).convert("L")) > 128
    assert np.mean(shown != drawn) < 0.05 < shown.mean()


def test_a_single_bright_voxel_is_seen() -> None:
    voxels = np.zeros((32, 32, 32))
    voxels[16, 16, 16] = 1e-4
    assert np.asarray(Image.open(io.BytesIO(draw_slices(voxels, (1, 1, 1))))).max() > 200
    flat = Image.open(io.BytesIO(draw_slices(np.full((4, 4, 4), 7.0), (1, 1, 1))))
    assert np.asarray(flat).max() < 8


def test_a_negative_slope_turns_dark_into_bright() -> None:
    voxels = np.arange(512, dtype=np.int16).reshape(8, 8, 8)
    assert draw_slices(voxels, (1, 1, 1), Scaling(-1.0, 600.0)) == draw_slices(-voxels, (1, 1, 1))


@given(
    arrays.arrays(np.int16, st.tuples(*3 * [st.integers(1, 9)]), elements=st.integers(-99, 99)),
    st.integers(1, 6),
)
def test_block_means_are_means_of_blocks(volume: Any, size: int) -> None:
    found = block_means(volume, size)
    for place in itertools.product(range(size), repeat=3):
        block = []
        for n, i in zip(volume.shape, place, strict=True):
            start, stop = n * i // size, n * (i + 1) // size
            block.append(slice(start, max(stop, start + 1)))
        assert found[place] == pytest.approx(volume[tuple(block)].mean())


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float16", "bfloat16", "float32", "uint64", "float64"])
def test_voxels_of_every_dtype_are_drawn(dtype: str) -> None:
    voxels = np.arange(27 * 8).reshape(6, 6, 6).astype(numpy_dtype(dtype))
    assert draw_slices(voxels, (1, 1, 1)) == draw_slices(voxels.astype(np.float64), (1, 1, 1))
    np.testing.assert_allclose(block_means(voxels, 3), block_means(voxels.astype(np.float64), 3))


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that numpy and Python hold while they work."""
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_a_view_of_a_volume_is_not_copied() -> None:
    voxels = np.zeros((128, 128, 128), np.uint8)
    view = voxels[::-1].transpose(2, 0, 1)
    assert peak_bytes(lambda: block_means(view)) < 4 * voxels.nbytes
    assert peak_bytes(lambda: draw_slices(view, (1, 1, 1))) < 2 * voxels.nbytes


def test_the_threshold_parts_two_classes() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(10, 2, 5000), rng.normal(100, 10, 2000), [1e6]])
    assert np.count_nonzero(values > otsu_threshold(values)) == 2001
    assert otsu_threshold(np.full(5, 3.0)) == 3.0
