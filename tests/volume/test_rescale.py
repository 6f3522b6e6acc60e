"""Intensities against arithmetic that cannot overflow: Python's integers and fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from beam_nifti.errors import VolumeError
from beam_nifti.volume.rescale import Intensity, Scaling, keep_units, measure, require_range, rescale_minmax
from tests.images import REAL_DTYPES, Array, random_voxels

INTEGERS = [d for d in REAL_DTYPES if np.dtype(d).kind in "iu"]
FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT64_MAX = float(np.finfo(np.float64).max)
NONE = Scaling()


def rescale(voxels: Array, scaling: Scaling = NONE) -> npt.NDArray[np.float32]:
    """What a build does with a volume's voxels."""
    before = voxels.copy()
    out = rescale_minmax(voxels, measure(voxels, scaling), scaling)
    assert voxels.tobytes() == before.tobytes()
    assert (out.shape, out.dtype, out.flags.c_contiguous) == (voxels.shape, np.float32, True)
    return out


def same_bits(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> bool:
    """Bit for bit: 0.0 is not -0.0."""
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def integer_oracle(voxels: Array) -> npt.NDArray[np.float32]:
    """The formula, with differences of Python's integers, divided in float64."""
    values = [int(v) for v in voxels.ravel()]
    low, width = min(values), float(max(values) - min(values))
    return np.array([float(v - low) / width for v in values]).astype(np.float32)


def float_oracle(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """The formula, as it stands, in float64."""
    out = (values - values.min()) / (values.max() - values.min())
    return out.astype(np.float32).ravel()


def exact_oracle(voxels: Array) -> list[Fraction]:
    """The formula, with no rounding at all."""
    exact = [Fraction(v.item()) for v in voxels.ravel()]
    low, high = min(exact), max(exact)
    return [(v - low) / (high - low) for v in exact]


@st.composite
def integer_volumes(draw: st.DrawFn) -> Array:
    """Volumes of every integer dtype: full ranges, narrow ones, and ranges at the limits."""
    dtype = np.dtype(draw(st.sampled_from(INTEGERS)))
    limits = np.iinfo(dtype)
    width = draw(st.integers(1, limits.bits))
    low = draw(st.integers(limits.min, limits.max) | st.just(limits.min) | st.just(limits.max))
    elements = st.integers(low, min(limits.max, low + 2**width))
    size = draw(st.integers(1, 12))
    values = draw(st.lists(elements, min_size=size, max_size=size))
    return np.array(values, dtype).reshape(1, size, 1)


@given(integer_volumes())
def test_integers_are_bit_equal_to_the_formula(voxels: Array) -> None:
    if voxels.min() == voxels.max():
        with pytest.raises(VolumeError, match="constant image"):
            rescale(voxels)
        return
    assert same_bits(rescale(voxels).ravel(), integer_oracle(voxels))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_whole_ranges_are_bit_equal_to_the_formula(dtype: str) -> None:
    limits = np.iinfo(dtype)
    ends = [limits.min, limits.min + 1, limits.max - 1, limits.max, limits.max // 2]
    voxels = random_voxels((20, 20, 20), dtype)
    voxels.ravel()[: len(ends)] = ends
    out = rescale(voxels)
    assert same_bits(out.ravel(), integer_oracle(voxels))
    assert out.min() == 0.0
    assert out.max() == 1.0


@pytest.mark.parametrize("low", [0, -32768])
def test_every_int16_value_is_bit_equal_to_the_formula(low: int) -> None:
    voxels = np.arange(low, 32768, dtype=np.int16).reshape(-1, 8, 8)
    assert same_bits(rescale(voxels).ravel(), integer_oracle(voxels))


@pytest.mark.parametrize("width", [2**24 - 2, 2**24 - 1, 2**24, 2**24 + 1, 2**31, 2**32 - 1])
def test_both_sides_of_what_float32_holds_are_bit_equal(width: int) -> None:
    rng = np.random.default_rng(width)
    voxels = rng.integers(0, width, (10, 20, 30), np.uint32, endpoint=True)
    voxels[0, 0, :2] = 0, width
    assert same_bits(rescale(voxels).ravel(), integer_oracle(voxels))


def floats(dtype: str) -> st.SearchStrategy[Array]:
    """Volumes of any finite floats, subnormals and the largest among them."""
    bits = np.dtype(dtype).itemsize * 8
    elements = st.floats(width=bits, allow_nan=False, allow_infinity=False)
    return hnp.arrays(dtype, st.tuples(*[st.integers(1, 3)] * 3), elements=elements)


@given(floats("float32"))
def test_float32_is_bit_equal_to_the_formula(voxels: Array) -> None:
    values = voxels.astype(np.float64)
    if values.min() == values.max():
        with pytest.raises(VolumeError, match="constant image"):
            rescale(voxels)
        return
    out = rescale(voxels)
    # -0.0 and 0.0 are one value; the formula gives 0.0 above either, but for -0.0 - 0.0.
    assert same_bits(out.ravel(), float_oracle(values) + np.float32(0))
    assert (out.min(), out.max()) == (0.0, 1.0)


@given(floats("float64"))
def test_float64_is_the_formula_without_overflow(voxels: Array) -> None:
    if voxels.min() == voxels.max():
        with pytest.raises(VolumeError, match="constant image"):
            rescale(voxels)
        return
    out = rescale(voxels)
    assert (out.min(), out.max()) == (0.0, 1.0)
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(voxels.max() - voxels.min()):
            assert same_bits(out.ravel(), float_oracle(voxels) + np.float32(0))
    assert_within_one_ulp(out, exact_oracle(voxels))


@given(integer_volumes())
def test_nothing_is_further_than_one_ulp_from_the_exact_value(voxels: Array) -> None:
    if voxels.min() < voxels.max():
        assert_within_one_ulp(rescale(voxels), exact_oracle(voxels))


def assert_within_one_ulp(out: npt.NDArray[np.float32], exact: list[Fraction]) -> None:
    """float64 rounds first, float32 after it: that is one float32 beside the nearest at most."""
    for value, truth in zip(out.ravel(), exact, strict=True):
        step = Fraction(float(np.spacing(value)))
        assert abs(Fraction(float(value)) - truth) <= step


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 5e-324, 1e-323],
        [-FLOAT64_MAX, 0.0, FLOAT64_MAX],
        [-FLOAT64_MAX, -1.0, 1.0],
        [-FLOAT32_MAX, 1e-45, FLOAT32_MAX],
        [1.0, 1.0 + 2**-52, 1.0 + 2**-51],
        [-0.0, 0.0, 1.0],
        [0.0, -0.0, 1.0],
        [-1.0, -0.0, 0.0],
    ],
)
def test_extreme_floats(values: list[float]) -> None:
    voxels = np.array(values).reshape(3, 1, 1)
    out = rescale(voxels)
    assert (out.min(), out.max()) == (0.0, 1.0)
    assert not np.signbit(out).any()
    assert_within_one_ulp(out, exact_oracle(voxels))


SCALINGS = st.builds(
    Scaling,
    st.floats(-1e6, 1e6, width=32).filter(bool),
    st.floats(-1e6, 1e6, width=32),
)


@given(st.sampled_from(REAL_DTYPES), SCALINGS, st.integers(0, 2**32 - 1))
def test_scaled_voxels_are_bit_equal_to_the_formula_on_scaled_values(
    dtype: str, scaling: Scaling, seed: int
) -> None:
    voxels = random_voxels((3, 4, 2), dtype, seed)
    values = voxels.astype(np.float64) * scaling.slope + scaling.inter
    if scaling.is_identity or values.min() == values.max():
        return
    intensity = measure(voxels, scaling)
    assert (intensity.min, intensity.max) == (values.min(), values.max())
    assert same_bits(rescale(voxels, scaling).ravel(), float_oracle(values) + np.float32(0))


def test_scaling_applies_as_nibabel_does() -> None:
    voxels = np.array([-0.0, 0.0, 1.5], np.float32)
    assert same_bits(Scaling().apply(voxels).astype(np.float32), voxels)
    assert np.signbit(Scaling(2.0, 0.0).apply(voxels)).tolist() == [True, False, False]
    assert Scaling(1.0, -1.0).apply(voxels).tolist() == [-1.0, -1.0, 0.5]
    assert Scaling(-2.0, 1.0).apply(np.array([127], np.int8)).tolist() == [-253.0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 17, 59])
def test_one_bad_voxel_is_found_and_counted(dtype: str, bad: float, where: int) -> None:
    voxels = random_voxels((5, 4, 3), dtype)
    voxels.ravel()[where] = bad
    with pytest.raises(VolumeError, match=r"^1 of 60 voxels are NaN or infinite; replace them"):
        measure(voxels, NONE)


def test_all_bad_voxels_are_counted() -> None:
    voxels = np.full((2, 3, 4), np.nan, np.float32)
    with pytest.raises(VolumeError, match=r"^24 of 24 voxels"):
        measure(voxels, NONE)


@pytest.mark.parametrize(
    ("voxels", "scaling"),
    [
        (np.array([1, 2], np.int16), Scaling(1e308, 1e308)),
        (np.array([-2, 2], np.int64), Scaling(-1.5e308, 0.0)),
        (np.array([1.0, 1e300]), Scaling(1e300, 0.0)),
    ],
)
def test_scaling_beyond_float64_is_refused(voxels: Array, scaling: Scaling) -> None:
    with np.errstate(over="ignore"), pytest.raises(VolumeError, match="infinite"):
        measure(voxels, scaling)


@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_a_constant_image_is_refused(dtype: str) -> None:
    voxels = np.full((2, 2, 2), 7, dtype)
    for scaling in (NONE, Scaling(2.0, 1.0)):
        with pytest.raises(VolumeError, match=r"all voxels are .*: a constant image"):
            rescale(voxels, scaling)


def test_a_scaling_that_flattens_an_image_makes_it_constant() -> None:
    with pytest.raises(VolumeError, match="constant image"):
        rescale(np.array([[[1, 2]]], np.int16), Scaling(1e-30, 1e9))


@pytest.mark.parametrize("dtype", REAL_DTYPES)
@pytest.mark.parametrize("scaling", [NONE, Scaling(0.25, -3.0), Scaling(-2.0, 1e4)], ids=str)
def test_measured_intensities(dtype: str, scaling: Scaling) -> None:
    voxels = random_voxels((40, 41, 42), dtype, seed=3)
    found, values = measure(voxels, scaling), scaling.apply(voxels)
    assert_measured(found, values)


def test_measuring_does_not_depend_on_the_order_of_axes() -> None:
    voxels = random_voxels((40, 41, 42), "int16")
    a, b = measure(voxels, NONE), measure(np.ascontiguousarray(voxels.T), NONE)
    assert (a.min, a.max) == (b.min, b.max)
    assert a.mean == pytest.approx(b.mean, rel=1e-12, abs=1e-9)


@pytest.mark.parametrize(
    "values",
    [
        [5.0],
        [1e9, 1e9 + 1, 1e9 + 2, 1e9 + 3],
        [0.0, *([1e6, 1e6 + 1] * 500)],
        [-FLOAT64_MAX, 0.0, FLOAT64_MAX],
        [1e200, -3e200, 2e200],
        [5e-324, 1e-323, 0.0],
        [1e-200, 3e-200],
        [0.0, 0.0],
    ],
)
def test_measured_intensities_of_hard_values(values: list[float]) -> None:
    voxels = np.array(values).reshape(-1, 1, 1)
    found = measure(voxels, NONE)
    exact = [Fraction(v) for v in values]
    mean = sum(exact) / len(exact)
    width = max(exact) - min(exact)
    variance = sum((v - mean) ** 2 for v in exact) / len(exact)
    assert (found.min, found.max) == (min(values), max(values))
    tolerance = Fraction(float(np.spacing(max(map(abs, values)) / 2)))
    assert abs(Fraction(found.mean) - mean) <= width / 10**12 + tolerance
    low, high = Fraction(found.std) - width / 10**7, Fraction(found.std) + width / 10**7
    assert max(low - tolerance, Fraction(0)) ** 2 <= variance <= (high + tolerance) ** 2


def assert_measured(found: Intensity, values: npt.NDArray[np.float64]) -> None:
    """The stated tolerances: range exact; mean and deviation to fractions of it."""
    assert (found.min, found.max) == (values.min(), values.max())
    width = found.max - found.min
    assert found.mean == pytest.approx(values.mean(), rel=1e-12, abs=1e-12 * width)
    assert found.std == pytest.approx(values.std(), rel=0, abs=1e-7 * width)


@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_without_rescaling_values_keep_their_units(dtype: str) -> None:
    voxels = random_voxels((5, 4, 3), dtype)
    for scaling in (NONE, Scaling(0.5, -1.0)):
        out = keep_units(voxels, scaling)
        assert same_bits(out, scaling.apply(voxels).astype(np.float32))


def test_values_that_float32_cannot_hold_are_refused() -> None:
    largest = np.array([[[-FLOAT32_MAX, FLOAT32_MAX]]])
    assert same_bits(keep_units(largest, NONE), largest.astype(np.float32))
    larger = np.nextafter(largest, np.inf)
    with pytest.raises(VolumeError, match=r"do not fit float32.*use --rescale minmax"):
        require_range(measure(larger, NONE), None, "float32")
