"""Each preparation against nibabel, scipy, or what the affine says of every voxel."""

from __future__ import annotations

import dataclasses
import itertools
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from nibabel.processing import resample_from_to
from scipy import ndimage, sparse

from beam_nifti.config import ORIENTATIONS, RecordConfig
from beam_nifti.errors import UsageError, VolumeError
from beam_nifti.volume import Volume
from beam_nifti.volume.grid import Grid, prepared_shape, respace
from beam_nifti.volume.preprocess import (
    apply_function,
    crop_foreground,
    crop_or_pad,
    orient,
    prepare_volume,
    resample,
)
from beam_nifti.volume.resample import linear_weights
from beam_nifti.volume.rescale import Scaling
from tests.datasets import SOURCE
from tests.images import REAL_DTYPES, Array, random_voxels, row_of

CODES = sorted(ORIENTATIONS)
SHAPE = (5, 7, 4)
ZOOMS = (2.0, 1.5, 3.0)


def tilted(code: str = "RAS", zooms: tuple[float, ...] = ZOOMS, degrees: float = 12.0) -> Array:
    """An oblique affine whose nearest orientation is `code`, with an origin off the grid."""
    turns = nib.orientations.axcodes2ornt(code)
    axes = np.zeros((3, 3))
    for axis, (place, sign) in enumerate(turns):
        axes[int(place), axis] = sign
    a, b = np.deg2rad([degrees, -0.7 * degrees])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ axes @ np.diag(zooms)
    affine[:3, 3] = (-31.3, 17.9, 5.1)
    return affine


def volume_of(voxels: Array, affine: Array | None = None, scaling: Scaling | None = None) -> Volume:
    affine = tilted() if affine is None else affine
    x, y, z = nib.affines.voxel_sizes(affine).tolist()
    voxels = np.ascontiguousarray(voxels)
    return Volume(row_of("a.nii"), voxels, scaling or Scaling(), affine, (x, y, z), voxels.dtype.name, SOURCE)


def places(volume: Volume) -> Array:
    """Where each voxel's centre lies, in mm: (X, Y, Z, 3)."""
    indices = np.moveaxis(np.indices(volume.voxels.shape[:3]), 0, -1)
    return nib.affines.apply_affine(volume.affine, indices)


def landmarks(volume: Volume) -> dict[tuple[float, ...], bytes]:
    """The voxels by their places."""
    flat = volume.voxels.reshape(-1, *volume.voxels.shape[3:])
    where = np.round(places(volume).reshape(-1, 3), 6) + 0.0
    return {tuple(place): voxel.tobytes() for place, voxel in zip(where.tolist(), flat, strict=True)}


def same(one: Volume, other: Volume) -> bool:
    return one.voxels.dtype == other.voxels.dtype and np.array_equal(one.voxels, other.voxels)


# Orientation


def test_there_are_48_orientations() -> None:
    assert len(CODES) == 48
    assert {nib.aff2axcodes(tilted(code)) for code in CODES} == set(map(tuple, CODES))


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("code", CODES)
def test_turning_leaves_every_voxel_in_its_place(code: str, channels: tuple[int, ...]) -> None:
    volume = volume_of(random_voxels(SHAPE + channels), tilted("LSP"), Scaling(0.5, -3))
    turned = orient(volume, code)
    assert nib.aff2axcodes(turned.affine) == tuple(code)
    assert landmarks(turned) == landmarks(volume)
    assert turned.voxels.flags.c_contiguous
    assert (turned.voxels.dtype, turned.scaling) == (np.int16, Scaling(0.5, -3))
    assert np.allclose(turned.zooms, nib.affines.voxel_sizes(turned.affine))


@pytest.mark.parametrize("code", CODES)
def test_ras_is_what_nibabel_calls_canonical(code: str) -> None:
    volume = volume_of(random_voxels(SHAPE), tilted(code))
    expected: Any = nib.as_closest_canonical(nib.Nifti1Image(volume.voxels, volume.affine))
    turned = orient(volume, "RAS")
    assert np.array_equal(turned.voxels, expected.dataobj)
    assert np.array_equal(turned.affine, expected.affine)


@given(
    st.sampled_from(CODES),
    st.sampled_from(CODES),
    st.sampled_from(REAL_DTYPES),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.floats(-40, 40),
)
def test_there_and_back_gives_the_same_bits(
    code: str, other: str, dtype: str, shape: tuple[int, ...], degrees: float
) -> None:
    volume = volume_of(random_voxels(shape, dtype), tilted(code, degrees=degrees))
    original = "".join(nib.aff2axcodes(volume.affine))
    back = orient(orient(volume, other), original)
    assert back.voxels.tobytes() == volume.voxels.tobytes()
    assert back.voxels.shape == volume.voxels.shape
    assert np.allclose(back.affine, volume.affine, rtol=0, atol=1e-12)
    assert back.zooms == volume.zooms


def test_an_affine_without_directions_is_refused() -> None:
    volume = volume_of(random_voxels(SHAPE), np.diag([2.0, 0, 2, 1]))
    with pytest.raises(VolumeError, match="no direction; repair its sform"):
        orient(volume, "RAS")
    with pytest.raises(VolumeError, match="no size; repair its sform"):
        resample(volume, (1, 1, 1))


# Spacing

SPACINGS = [(1.0, 1.0, 1.0), (2.5, 1.0, 4.5), (3.1, 2.9, 0.7), (50.0, 50.0, 50.0)]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64", "int64"])
def test_interpolation_is_that_of_scipy(dtype: str, spacing: tuple[float, ...]) -> None:
    scaling = Scaling(0.25, 7)
    volume = volume_of(random_voxels(SHAPE, dtype), scaling=scaling)
    made = resample(volume, spacing)
    values = scaling.apply(volume.voxels)
    steps = np.array(spacing) / volume.zooms
    starts = (np.array(SHAPE) - 1) / 2 - steps * (np.array(made.voxels.shape) - 1) / 2
    expected = ndimage.affine_transform(values, steps, starts, made.voxels.shape, order=1, mode="nearest")
    assert made.voxels.dtype == np.float32
    assert made.scaling.is_identity
    assert np.allclose(made.voxels, expected, rtol=1e-7, atol=1e-14 * np.abs(values).max())


@given(st.integers(1, 40), st.integers(1, 90), st.floats(-50, 50), st.floats(0.01, 20))
def test_weights_are_those_of_numpys_interpolation(old: int, new: int, start: float, step: float) -> None:
    lines = [np.interp(start + step * np.arange(new), np.arange(old), unit) for unit in np.eye(old)]
    expected = sparse.csr_array(np.stack(lines, axis=1))
    weights = linear_weights(old, start + step * np.arange(new))
    for name in ("indptr", "indices", "data"):
        assert getattr(weights, name).tobytes() == getattr(expected, name).tobytes()


def test_a_long_axis_takes_no_square_of_memory() -> None:
    linear_weights(9, 0.5 + 0.5 * np.arange(9))
    tracemalloc.start()
    linear_weights(20_000, -0.25 + 0.5 * np.arange(40_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6


def test_many_small_slices_take_a_moment() -> None:
    """As of a file of some bytes that says so, or whose affine does."""
    voxels = random_voxels((400_000, 2, 1), "uint8")
    voxels[:9] = voxels[-3:] = 0
    volume = volume_of(voxels, np.diag([2.0, 1, 1, 1]), Scaling(0.5, 0))
    start = time.process_time()
    cropped = crop_foreground(volume, "nonzero")
    resampled = resample(volume, (4, 1, 1))
    assert time.process_time() - start < 5
    assert cropped.voxels.shape[0] == 400_000 - 12 - int(voxels[9:-3].any(axis=1).argmax())
    assert np.array_equal(resampled.voxels, voxels.reshape(-1, 2, 2, 1).sum(axis=1) / 4)


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_slices_together_are_as_slices_alone(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = volume_of(random_voxels((11, 5, 4, 2), "float32"), scaling=Scaling(0.3, -7))
    alone = resample(volume, (1.3, 1.1, 2.9)).voxels
    monkeypatch.setattr("beam_nifti.volume.resample._SLAB_VOXELS", size * 200)
    assert resample(volume, (1.3, 1.1, 2.9)).voxels.tobytes() == alone.tobytes()


def test_no_more_is_made_than_a_record_can_hold() -> None:
    volume = volume_of(random_voxels((5, 4, 3)), np.diag([1e4, 1e4, 1e4, 1.0]))
    with pytest.raises(VolumeError, match=r"would make shape \(50000, 40000, 30000\)"):
        prepare_volume(volume, RecordConfig(spacing=(1, 1, 1), shape=(8, 8, 8)))


@pytest.mark.parametrize("noise", [-1e-7, 0.0, 1e-7])
def test_noise_in_a_header_changes_no_shape(noise: float) -> None:
    """Half a voxel more or less would go either way: 181 voxels of 1 mm are 90.5 of 2 mm."""
    grid = Grid.of((181, 7, 7), np.diag([1 + noise, 2.0, 2.0, 1.0]))
    assert respace(grid, (2, 2, 2)).grid.shape == (90, 7, 7)


@pytest.mark.parametrize("spacing", SPACINGS[:3])
def test_interpolation_is_that_of_nibabel_inside(spacing: tuple[float, ...]) -> None:
    volume = volume_of(random_voxels(SHAPE, "float32"), tilted("PIR"))
    made = resample(volume, spacing)
    image = nib.Nifti1Image(volume.voxels.astype(np.float64), volume.affine)
    target = (made.voxels.shape, made.affine)
    expected = resample_from_to(image, target, order=1, mode="nearest").get_fdata()
    assert np.allclose(made.voxels, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("spacing", SPACINGS[:3])
@pytest.mark.parametrize("code", CODES)
def test_resampling_leaves_what_it_shows_in_its_place(code: str, spacing: tuple[float, ...]) -> None:
    """Voxels that are a linear function of their places are so still, where there were voxels around."""
    direction, affine = np.array([1.0, -2.0, 0.5]), tilted(code)
    empty = volume_of(np.zeros(SHAPE, np.float32), affine)
    volume = dataclasses.replace(empty, voxels=places(empty) @ direction)
    made = resample(volume, spacing)
    indices = nib.affines.apply_affine(np.linalg.inv(affine), places(made))
    inside = ((indices >= 0) & (indices <= np.array(SHAPE) - 1)).all(axis=-1)
    assert inside.any()
    assert np.allclose(made.voxels[inside], (places(made) @ direction)[inside], atol=1e-4)
    middle = [nib.affines.apply_affine(v.affine, (np.array(v.voxels.shape) - 1) / 2) for v in (volume, made)]
    assert np.allclose(*middle)
    assert np.allclose(made.zooms, spacing)
    assert nib.aff2axcodes(made.affine) == tuple(code)


def test_the_number_of_voxels_keeps_the_field_of_view() -> None:
    volume = volume_of(np.zeros((91, 109, 1), np.uint8), tilted(zooms=(2.0, 2.0, 5.0)))
    assert resample(volume, (1.5, 1.5, 20.0)).voxels.shape == (121, 145, 1)


def test_frames_are_resampled_one_by_one() -> None:
    volume = volume_of(random_voxels((*SHAPE, 3)), scaling=Scaling(2, 1))
    made = resample(volume, (1, 1, 1))
    for t in range(3):
        frame = resample(dataclasses.replace(volume, voxels=volume.voxels[..., t]), (1, 1, 1))
        assert np.array_equal(made.voxels[..., t], frame.voxels)
    assert made.voxels.flags.c_contiguous


def test_voxels_of_that_size_stay_as_they_are() -> None:
    affine = tilted(zooms=(1.00009, 0.99991, 1.0))
    volume = dataclasses.replace(volume_of(random_voxels(SHAPE), affine, Scaling(2, 1)), zooms=(9, 9, 9))
    made = resample(volume, (1, 1, 1))
    assert (made.voxels is volume.voxels, made.scaling) == (True, Scaling(2, 1))
    assert np.array_equal(made.affine, affine)
    assert np.allclose(made.zooms, 1, rtol=1e-4)  # by the affine, whatever the header says


def test_an_axis_of_that_size_is_left_alone() -> None:
    volume = volume_of(random_voxels(SHAPE, "float32"), tilted(zooms=(2, 1, 1.00005)))
    made = resample(volume, (1, 1, 1))
    assert made.voxels.shape == (10, 7, 4)
    assert np.array_equal(made.affine[:, 1:3], volume.affine[:, 1:3])
    steps = [0.5, 1, 1]
    expected = ndimage.affine_transform(
        volume.voxels, steps, [-0.25, 0, 0], (10, 7, 4), output=np.float32, order=1, mode="nearest"
    )
    assert np.array_equal(made.voxels, expected)


def test_interpolation_adds_no_intensities() -> None:
    volume = volume_of(np.full(SHAPE, 0.1, np.float32))
    assert set(resample(volume, (0.7, 0.7, 0.7)).voxels.ravel()) == {np.float32(0.1)}


# Foreground


@given(
    st.tuples(*[st.integers(1, 5)] * 3),
    st.sampled_from([(), (2,)]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([Scaling(), Scaling(-2.0, 6.0)]),
    st.sampled_from(["above:1.5", "above:-3", "nonzero"]),
)
def test_the_foreground_is_a_bounding_box(
    shape: tuple[int, ...], channels: tuple[int, ...], seed: int, scaling: Scaling, rule: str
) -> None:
    rng = np.random.default_rng(seed)
    voxels = rng.choice(np.array([0, 1, 3], np.int16), (*shape, *channels), p=[0.8, 0.1, 0.1])
    volume = volume_of(voxels, tilted("ASL"), scaling)
    values = scaling.slope * voxels + scaling.inter
    mask = values != 0 if rule == "nonzero" else values > float(rule.removeprefix("above:"))
    found = np.argwhere(mask)[:, :3]
    if not len(found):
        with pytest.raises(VolumeError, match=r"no voxel is .*leave the image out$"):
            crop_foreground(volume, rule)
        return
    cropped = crop_foreground(volume, rule)
    box = tuple(slice(a, b + 1) for a, b in zip(found.min(axis=0), found.max(axis=0), strict=True))
    assert np.array_equal(cropped.voxels, voxels[box])
    assert landmarks(cropped).items() <= landmarks(volume).items()
    assert (cropped.voxels.dtype, cropped.scaling) == (voxels.dtype, scaling)
    assert cropped.voxels.flags.c_contiguous


def test_the_threshold_is_compared_as_float64() -> None:
    voxels = np.array([0.1, np.float32(0.1) * 2], np.float32).reshape(2, 1, 1)
    assert crop_foreground(volume_of(voxels), "above:0.1").voxels.shape == (2, 1, 1)  # float32(0.1) > 0.1


# Shape


@given(
    st.tuples(*[st.integers(1, 6)] * 3),
    st.tuples(*[st.integers(1, 6)] * 3),
    st.sampled_from([(), (2,)]),
    st.sampled_from(REAL_DTYPES),
    st.sampled_from([Scaling(), Scaling(-0.5, 3.0)]),
)
def test_cropping_and_padding_are_centred(
    shape: tuple[int, ...],
    wanted: tuple[int, int, int],
    channels: tuple[int, ...],
    dtype: str,
    scaling: Scaling,
) -> None:
    volume = volume_of(random_voxels(shape + channels, dtype), tilted("IPL"), scaling)
    made = crop_or_pad(volume, wanted)
    assert made.voxels.shape == wanted + channels
    assert (made.voxels.dtype, made.scaling) == (volume.voxels.dtype, scaling)
    assert made.voxels.flags.c_contiguous
    least = scaling.apply(volume.voxels).min()
    for index in itertools.product(*map(range, wanted)):
        source = tuple(
            i + (n - m) // 2 if n >= m else i - (m - n) // 2
            for i, n, m in zip(index, shape, wanted, strict=True)
        )
        if all(0 <= i < n for i, n in zip(source, shape, strict=True)):
            assert np.array_equal(made.voxels[index], volume.voxels[source])
            where = [nib.affines.apply_affine(v.affine, i) for v, i in ((made, index), (volume, source))]
            assert np.allclose(*where)
        else:
            assert (scaling.apply(made.voxels[index]) == least).all()


@given(st.tuples(*[st.integers(1, 5)] * 3), st.tuples(*[st.integers(0, 5)] * 3))
def test_padding_and_cropping_back_gives_the_same_bits(
    shape: tuple[int, int, int], more: tuple[int, ...]
) -> None:
    volume = volume_of(random_voxels(shape))
    x, y, z = (n + m for n, m in zip(shape, more, strict=True))
    padded = crop_or_pad(volume, (x, y, z))
    back = crop_or_pad(padded, shape)
    assert same(back, volume)
    assert np.allclose(back.affine, volume.affine, rtol=0, atol=1e-12)
    assert (padded.voxels.min(), padded.voxels.max()) == (volume.voxels.min(), volume.voxels.max())


def test_an_odd_voxel_goes_and_comes_at_the_end() -> None:
    volume = volume_of(np.arange(1, 5, dtype=np.uint8).reshape(4, 1, 1))
    assert crop_or_pad(volume, (1, 1, 1)).voxels.ravel().tolist() == [2]
    assert crop_or_pad(volume, (7, 1, 1)).voxels.ravel().tolist() == [1, 1, 2, 3, 4, 1, 1]


def test_nan_that_is_cropped_away_does_not_come_back() -> None:
    voxels = np.array([[np.nan, 3, 2, np.nan]], np.float32).reshape(1, 4, 1)
    assert crop_or_pad(volume_of(voxels), (2, 2, 1)).voxels.ravel().tolist() == [3, 2, 2, 2]


# The user's function


def halved(volume: Volume) -> Volume:
    values = volume.scaling.apply(volume.voxels)[::2, ::2, ::2]
    affine = volume.affine @ np.diag([2, 2, 2, 1])
    voxels = np.ascontiguousarray(values, np.float32)
    return dataclasses.replace(volume, voxels=voxels, scaling=Scaling(), affine=affine, dtype="mine")


def test_a_function_gives_voxels_and_affine() -> None:
    volume = volume_of(random_voxels(SHAPE), scaling=Scaling(2, 1))
    made = apply_function(volume, halved, "lab:halved")
    assert np.array_equal(made.voxels, (2.0 * volume.voxels + 1)[::2, ::2, ::2].astype(np.float32))
    assert made.scaling.is_identity
    assert np.allclose(made.zooms, np.array(ZOOMS) * 2)
    assert (made.row, made.source, made.dtype) == (volume.row, volume.source, "int16")


def test_a_function_may_return_what_it_got() -> None:
    volume = volume_of(random_voxels(SHAPE))
    made = apply_function(volume, lambda volume: volume, "lab:same")
    made.release()
    assert volume.voxels.shape == SHAPE


def changed(**changes: Any) -> Callable[[Volume], Any]:
    return lambda volume: dataclasses.replace(volume, **changes)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda volume: None, "returned an object of type NoneType; return dataclasses.replace"),
        (lambda volume: volume.voxels, "returned an object of type ndarray; return dataclasses.replace"),
        (changed(voxels=[[[1.0]]]), "voxels of type list; return a numpy array"),
        (changed(voxels=np.zeros(SHAPE, np.complex64)), "returned complex64 voxels"),
        (changed(voxels=np.zeros(SHAPE, bool)), "returned bool voxels"),
        (changed(voxels=np.zeros(SHAPE, np.float16)), "returned float16 voxels"),
        (changed(voxels=np.zeros((2, 2))), r"voxels of shape \(2, 2\); return \(X, Y, Z\)"),
        (changed(voxels=np.zeros((2, 2, 2, 2, 2))), r"voxels of shape \(2, 2, 2, 2, 2\)"),
        (changed(voxels=np.zeros((2, 0, 2))), r"voxels of shape \(2, 0, 2\)"),
        (lambda v: dataclasses.replace(v, voxels=v.voxels[::-1]), r"another order; return numpy\.ascont"),
        (changed(voxels=np.zeros(SHAPE, ">i2")), "in native byte order"),
        (changed(affine=np.eye(3)), r"return a finite \(4, 4\) array"),
        (changed(affine=np.full((4, 4), np.nan)), r"return a finite \(4, 4\) array"),
        (changed(affine="RAS"), "returned an affine of type str; return a finite"),
        (lambda volume: 1 / 0, "failed: ZeroDivisionError: division by zero; repair it"),
    ],
)
def test_what_a_function_does_wrong_names_it(function: Callable[[Volume], Any], message: str) -> None:
    with pytest.raises(VolumeError, match=f"^--preprocess lab:f .*{message}"):
        apply_function(volume_of(random_voxels(SHAPE)), function, "lab:f")


# All of it

_RECORDS = st.builds(
    RecordConfig,
    orientation=st.none() | st.sampled_from(CODES),
    spacing=st.none() | st.tuples(*[st.sampled_from([0.5, 1.0, 1.3, 2.0, 3.0])] * 3),
    crop_foreground=st.none() | st.just("above:0"),
    shape=st.none() | st.tuples(*[st.integers(1, 9)] * 3),
)


@given(_RECORDS, st.tuples(*[st.integers(1, 6)] * 3), st.sampled_from([(), (2,)]), st.sampled_from(CODES))
def test_the_header_tells_the_shape_that_comes_of_it(
    record: RecordConfig, shape: tuple[int, ...], channels: tuple[int, ...], code: str
) -> None:
    volume = volume_of(random_voxels(shape + channels), tilted(code))
    assume((volume.voxels > 0).any())
    predicted = prepared_shape(volume.voxels.shape, volume.affine, record)
    made = prepare_volume(volume, record)
    assert (predicted is None) == (record.crop_foreground is not None and record.shape is None)
    assert predicted in (None, made.voxels.shape)


def test_preparations_are_done_in_their_order() -> None:
    volume = volume_of(random_voxels(SHAPE), tilted("LPS"), Scaling(0.5, 1))
    expected = crop_or_pad(crop_foreground(resample(orient(volume, "SAR"), (1, 2, 3)), "above:5"), (8, 8, 8))
    record = RecordConfig(orientation="SAR", spacing=(1, 2, 3), crop_foreground="above:5", shape=(8, 8, 8))
    made = prepare_volume(volume, record, (8, 8, 8))
    assert same(made, expected)
    assert np.array_equal(made.affine, expected.affine)
    assert made.zooms == expected.zooms
    assert volume.voxels.shape == SHAPE
    assert same(prepare_volume(volume, record, release=True), expected)
    assert volume.voxels.size == 0


def test_without_preparations_the_voxels_are_handed_on() -> None:
    volume = volume_of(random_voxels(SHAPE))
    voxels = volume.voxels
    assert prepare_volume(volume, RecordConfig()).voxels is voxels


def test_errors_name_the_image() -> None:
    with pytest.raises(
        VolumeError, match=r"^a\.nii: no voxel is above 40000 .*; lower the threshold, or leave"
    ):
        prepare_volume(volume_of(random_voxels(SHAPE)), RecordConfig(crop_foreground="above:40000"))
    with pytest.raises(VolumeError, match=r"^a\.nii: shape \(5, 7, 4\), but the first image has \(5, 7, 5\)"):
        prepare_volume(volume_of(random_voxels(SHAPE)), RecordConfig(orientation="RAS"), (5, 7, 5))


def test_a_function_that_is_not_there_is_no_fault_of_the_image() -> None:
    with pytest.raises(UsageError, match="nowhere:f: cannot be imported"):
        prepare_volume(volume_of(random_voxels(SHAPE)), RecordConfig(preprocess="nowhere:f"))


@pytest.mark.parametrize(
    "record",
    [
        RecordConfig(orientation="SAR", crop_foreground="above:-1", shape=(64, 64, 64)),
        RecordConfig(orientation="SAR", spacing=(1.01, 1.01, 1.01), shape=(64, 64, 64)),
    ],
)
def test_there_are_two_copies_of_a_volume_at_most(record: RecordConfig) -> None:
    size = 4 * 64**3
    resample(volume_of(np.ones((2, 2, 2)), np.eye(4)), (3, 3, 3))  # scipy's import takes memory of its own
    tracemalloc.start()
    try:
        volume = volume_of(np.ones((64, 64, 64), np.float32), np.diag([-1.0, 1, 1, 1]))
        tracemalloc.reset_peak()
        prepare_volume(volume, record, release=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.3 * size
