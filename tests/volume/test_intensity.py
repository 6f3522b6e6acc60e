"""The methods of --rescale and the dtypes of records, against plain numpy in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_nifti.config import RecordConfig
from beam_nifti.errors import VolumeError
from beam_nifti.record.example import decode_example, decode_tensor, encode_tensor, encode_volume
from beam_nifti.record.index import IndexEntry
from beam_nifti.volume import Volume, load_volume, rescale_volume
from beam_nifti.volume.intensity import find_percentiles
from beam_nifti.volume.rescale import Scaling, quantize
from tests.images import REAL_DTYPES, Array, brain, random_voxels, row_of, write_image

NONE = Scaling()
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SCALINGS = st.sampled_from([Scaling(), Scaling(0.25, -7.5), Scaling(-1 / 3, 1e3), Scaling(1.0, 5.0)])
Values = npt.NDArray[np.float64]


def rescaled(path: Path, voxels: Array, scaling: Scaling = NONE, **options: Any) -> Volume:
    """What a build makes of an image of these voxels."""
    header = {"version": 2, "slope": scaling.slope, "inter": scaling.inter}
    config = RecordConfig(**options)
    return rescale_volume(load_volume(row_of(write_image(path, voxels, **header))), config)


def selected(values: Values, within: str | None) -> Values:
    name, _, threshold = (within or "all").partition(":")
    choices: dict[str, Callable[[], Values]] = {
        "all": values.ravel,
        "nonzero": lambda: values[values != 0],
        "above": lambda: values[values > float(threshold)],
    }
    return choices[name]()


def oracle_ends(values: Values, rescale: str, within: str | None) -> tuple[float, float]:
    """The two intensities, as the documents define them."""
    asked, (name, _, numbers) = selected(values, within), rescale.partition(":")
    if name == "window":
        low, high = map(float, numbers.split(","))
    elif name == "percentile":
        low, high = np.percentile(asked, [float(n) for n in numbers.split(",")])
    elif name == "zscore":
        low, high = asked.mean(), asked.mean() + asked.std()
    else:
        low, high = asked.min(), asked.max()
    return float(low), float(high)


def law(values: Values, low: float, high: float, clip: bool) -> npt.NDArray[np.float32]:
    out = (values - low) / (high - low)
    return (np.clip(out, 0, 1) if clip else out).astype(np.float32)


METHODS: list[dict[str, Any]] = [
    {"rescale": "percentile:1,99"},
    {"rescale": "percentile:0.5,99.5", "clip": True},
    {"rescale": "percentile:0,100"},
    {"rescale": "percentile:5,87.3", "rescale_within": "nonzero", "clip": True},
    {"rescale": "window:-12.5,30", "clip": True},
    {"rescale": "window:0,40"},
    {"rescale": "zscore"},
    {"rescale": "zscore", "rescale_within": "above:3.5"},
    {"rescale": "minmax", "rescale_within": "nonzero"},
    {"rescale": "minmax", "rescale_within": "above:10", "clip": True},
]


def small_voxels(dtype: str, seed: int, shape: tuple[int, ...] = (5, 4, 7)) -> Array:
    """Voxels near those that the options of METHODS tell apart, zeros and repeated ones among them."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 120, shape) - (0 if dtype.startswith("u") else 40)
    return np.where(rng.random(shape) < 0.2, 0, values).astype(dtype)


@settings(max_examples=60)
@given(st.sampled_from(REAL_DTYPES), SCALINGS, st.sampled_from(METHODS), st.integers(0, 2**32 - 1))
def test_every_method_follows_its_law(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, scaling: Scaling, options: dict[str, Any], seed: int
) -> None:
    voxels = small_voxels(dtype, seed)
    values = voxels.astype(np.float64) * scaling.slope + scaling.inter
    volume = rescaled(tmp_path_factory.mktemp("v") / "a.nii", voxels, scaling, **options)
    (ends,) = volume.rescale_ranges
    expected = oracle_ends(values, options["rescale"], options.get("rescale_within"))
    if options["rescale"] == "zscore":  # sums of floats depend on their order
        assert (ends.low, ends.high) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    else:
        assert (ends.low, ends.high) == expected
    clip = options.get("clip", False)
    assert (volume.voxels + np.float32(0)).tobytes() == (
        law(values, ends.low, ends.high, clip) + np.float32(0)
    ).tobytes()
    assert not np.signbit(volume.voxels[volume.voxels == 0]).any()
    assert (volume.intensities[0].min, volume.intensities[0].max) == (values.min(), values.max())


@pytest.mark.parametrize("dtype", REAL_DTYPES)
@given(
    size=st.integers(1, 40),
    percentiles=st.lists(st.floats(0, 100) | st.sampled_from([0.0, 25.0, 50.0, 99.5, 100.0]), min_size=2),
    scaling=SCALINGS,
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40)
def test_percentiles_are_those_of_numpy_to_the_bit(
    dtype: str, size: int, percentiles: list[float], scaling: Scaling, seed: int
) -> None:
    voxels = random_voxels((size, 1, 1), dtype, seed)
    values = scaling.apply(voxels)
    before = voxels.copy()
    assert find_percentiles(voxels, scaling, percentiles) == np.percentile(values, percentiles).tolist()
    assert np.array_equal(voxels, before)


def test_percentiles_of_more_voxels_than_are_counted_at_a_time() -> None:
    for dtype in ("int16", "uint8", "float32"):
        voxels = random_voxels((70, 60, 50), dtype)
        found = find_percentiles(voxels, Scaling(), [0.5, 33, 99.5])
        assert found == np.percentile(voxels.astype(np.float64), [0.5, 33, 99.5]).tolist()


@pytest.mark.parametrize("method", ["percentile:2,98", "window:-100,700", "zscore", "minmax"])
def test_the_law_is_invertible(tmp_path: Path, method: str) -> None:
    within = "nonzero" if method == "minmax" else None
    voxels = brain()
    volume = rescaled(tmp_path / "a.nii", voxels, rescale=method, rescale_within=within)
    low, high = volume.rescale_ranges[0].low, volume.rescale_ranges[0].high
    np.testing.assert_allclose(low + volume.voxels * (high - low), voxels, atol=1e-3)


# Dtypes


@pytest.mark.parametrize("options", [{}, {"rescale": "percentile:1,99", "clip": True}])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint8"])
@pytest.mark.parametrize("source", ["int16", "uint8", "float32", "int32"])
def test_dtypes_round_the_float32_result(
    tmp_path: Path, source: str, dtype: str, options: dict[str, Any]
) -> None:
    voxels = np.abs(random_voxels((40, 40, 41), source))
    x = rescaled(tmp_path / "a.nii", voxels, **options).voxels
    stored = rescaled(tmp_path / "a.nii", voxels, voxel_dtype=dtype, **options).voxels
    if dtype == "uint8":
        levels = stored.astype(np.float64)
        assert stored.dtype == np.uint8
        assert np.abs(levels / 255 - x.astype(np.float64)).max() <= 1 / 510 + 1e-12
        assert {0, 255} <= set(np.unique(stored))
    else:
        numpy_dtype = np.dtype(np.float16) if dtype == "float16" else BFLOAT16
        assert stored.tobytes() == x.astype(numpy_dtype).tobytes()


def test_halves_are_rounded_to_even() -> None:
    out = np.empty(2, np.uint8)
    quantize(np.array([0.5, 1.0], np.float32), out)
    assert out.tolist() == [128, 255]
    halves = np.empty(3, np.float16)
    quantize(np.array([1 + 2**-11, 1 + 3 * 2**-11, 2**-25], np.float32), halves)
    assert halves.tolist() == [1.0, 1 + 2**-9, 0.0]
    upper = np.empty(2, BFLOAT16)
    quantize(np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32), upper)
    assert upper.astype(float).tolist() == [1.0, 1 + 2**-6]


@pytest.mark.tf
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint8"])
def test_tensors_of_the_dtypes_are_those_of_tensorflow(tmp_path: Path, dtype: str) -> None:
    tf = pytest.importorskip("tensorflow")
    voxels = rescaled(tmp_path / "a.nii", brain(), voxel_dtype=dtype).voxels
    data = b"".join(encode_tensor(voxels))
    assert data == tf.io.serialize_tensor(tf.constant(voxels)).numpy()
    back = decode_tensor(data)
    assert (back.dtype, back.tobytes()) == (voxels.dtype, voxels.tobytes())


def test_a_record_says_what_became_0_and_1_where_its_range_does_not(tmp_path: Path) -> None:
    plain = rescaled(tmp_path / "a.nii", brain())
    assert not {"rescale_low", "rescale_high"} & decode_example(bytes(encode_volume(plain))).keys()
    assert IndexEntry.of(plain).rescale_ranges == ()
    for options in METHODS:
        volume = rescaled(tmp_path / "a.nii", brain(), **options)
        features = decode_example(bytes(encode_volume(volume)))
        found = [np.frombuffer(features[n], "<f8")[0] for n in ("rescale_low", "rescale_high")]
        assert found == [volume.rescale_ranges[0].low, volume.rescale_ranges[0].high]
        assert IndexEntry.of(volume).rescale_ranges == volume.rescale_ranges


# What cannot be rescaled


@pytest.mark.parametrize(
    ("voxels", "options", "message"),
    [
        ([7, 7, 7, 7], {"rescale": "percentile:1,99"}, r"map 7 onto 0 and 7 onto 1"),
        ([7, 7, 7, 7], {"rescale": "zscore"}, r"all voxels are 7, a constant image"),
        ([0, 5, 5, 5], {"rescale": "minmax", "rescale_within": "nonzero"}, r"map 5 onto 0 and 5 onto 1"),
        ([0, 0, 0, 9], {"rescale": "percentile:1,60"}, r"percentile:1,60 would map 0 onto 0 and 0 onto 1"),
        ([0, 5, 5, 5], {"rescale": "zscore", "rescale_within": "nonzero"}, "all selected voxels are 5, a"),
        ([0, 0, 0, 0], {"rescale": "zscore", "rescale_within": "nonzero"}, "no voxel is nonzero"),
        ([1, 2, 3, 4], {"rescale": "zscore", "rescale_within": "above:4"}, "no voxel is above 4"),
        ([0, 70000, 1, 2], {"rescale": "none", "voxel_dtype": "float16"}, "to 70000 do not fit float16;"),
        ([0, 1, 2, 70000], {"rescale": "window:0,1", "voxel_dtype": "float16"}, "rescaled .* fit float16"),
        ([0, 1, 2, 3.4e38], {"rescale": "none", "voxel_dtype": "bfloat16"}, "do not fit bfloat16;"),
        ([0, 1, 2, 1e30], {"rescale": "window:0,1e-20"}, "rescaled intensities .* do not fit float32"),
        ([0, 1, 2, 1e30], {"rescale": "window:0,1e-20", "voxel_dtype": "native"}, "do not fit float32"),
        ([-1.7e308, 0, 1, 1.7e308], {"rescale": "percentile:0,100"}, "not a usable range"),
        ([0, 1, np.nan, 3], {"rescale": "percentile:0,100"}, "1 of 4 voxels are NaN"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_volumes_that_are_left_out(
    tmp_path: Path, voxels: list[float], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(VolumeError, match=rf"a\.nii: .*{message}"):
        rescaled(tmp_path / "a.nii", np.array(voxels).reshape(4, 1, 1), **options)


def test_a_clipped_volume_fits_whatever_its_range(tmp_path: Path) -> None:
    voxels = np.array([-1e300, 0, 1, 1e300]).reshape(4, 1, 1)
    with np.errstate(over="ignore"):
        volume = rescaled(tmp_path / "a.nii", voxels, rescale="window:0,2", clip=True, voxel_dtype="float16")
    assert volume.voxels.ravel().tolist() == [0, 0, 0.5, 1]
