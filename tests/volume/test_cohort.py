"""Statistics of a cohort, against fractions and numpy; in any order and grouping they are the same."""

from __future__ import annotations

import functools
import itertools
import math
import pickle
from collections.abc import Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from beam_nifti.config import CohortStatistics, RecordConfig
from beam_nifti.errors import UsageError, VolumeError
from beam_nifti.support.strict_json import dump_json, load_json
from beam_nifti.volume import load_volume
from beam_nifti.volume.cohort import (
    PERCENTILE_ERROR,
    PERCENTILES,
    ChannelMeasure,
    CohortMeasure,
    Histogram,
    exact_sums,
    measure_volume,
)
from beam_nifti.volume.rescale import Scaling
from tests.images import REAL_DTYPES, Array, random_voxels, row_of, write_image

WANTED = (0.0, 0.5, 25.0, 50.0, 99.5, 100.0)
SCALINGS = st.sampled_from([Scaling(), Scaling(0.25, -7.5), Scaling(-1 / 3, 1e3), Scaling(1.0, 5.0)])


def of_dtype(name: str) -> Any:
    """Arrays of a dtype; floats are small enough for their squares to be finite."""
    kind = np.dtype(name)
    if kind.kind == "f":
        most = min(float(np.finfo(kind).max), 2.0**400)
        elements: Any = st.floats(-most, most, width=8 * kind.itemsize)  # type: ignore[arg-type]
    else:
        elements = st.integers(int(np.iinfo(kind).min), int(np.iinfo(kind).max))
    return arrays.arrays(kind, st.integers(1, 40), elements=elements)


ANY_VOXELS = st.sampled_from((*REAL_DTYPES, "float16")).flatmap(of_dtype)


@given(ANY_VOXELS)
def test_sums_are_exact(voxels: Array) -> None:
    values = list(map(Fraction, voxels.tolist()))
    assert exact_sums(voxels) == (sum(values), sum(value * value for value in values))


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "uint64"])
def test_sums_of_many_voxels_are_exact(dtype: str) -> None:
    """Of more than one block and chunk, all with one exponent, so that the counters are full."""
    voxels = np.full((1 << 22) + 40_000, np.iinfo(dtype).max if dtype[0] in "iu" else 2 - 2**-20, dtype)
    value = Fraction(voxels[0].item())
    assert exact_sums(voxels) == (value * voxels.size, value * value * voxels.size)


def test_sums_of_the_largest_and_the_smallest_floats_are_exact() -> None:
    voxels = np.array([5e-324, 1.7e308, -1.7e308, 2.2e-308, -0.0, 1.0])
    values = list(map(Fraction, voxels.tolist()))
    assert exact_sums(voxels) == (sum(values), sum(value * value for value in values))


def assert_describes(measure: ChannelMeasure, values: Array, *, is_exact: bool) -> None:
    """The statistics are those of the values, in float64."""
    found, exact = measure.statistics(WANTED), list(map(Fraction, values.tolist()))
    mean = sum(exact) / len(exact)
    variance = sum((value - mean) ** 2 for value in exact) / len(exact)
    assert (found.num_voxels, found.min, found.max) == (values.size, values.min(), values.max())
    spread = max(abs(found.min), abs(found.max))
    assert math.isclose(found.mean, float(mean), rel_tol=1e-15, abs_tol=1e-15 * spread)
    assert math.isclose(found.std, math.sqrt(variance), rel_tol=1e-7, abs_tol=1e-7 * spread)
    wanted = np.percentile(values, WANTED)
    if is_exact:
        assert dict(found.percentiles) == dict(zip(WANTED, wanted.tolist(), strict=True))
        assert found.percentile_error == 0
    else:
        assert found.percentile_error == PERCENTILE_ERROR
        neighbours = [
            np.percentile(np.abs(np.percentile(values, p, method=m)), 50)
            for p in WANTED
            for m in ("lower", "higher")
        ]
        for (_, value), want, low, high in zip(
            found.percentiles, wanted, neighbours[::2], neighbours[1::2], strict=True
        ):
            assert abs(value - want) <= PERCENTILE_ERROR * 1.001 * max(low, high) + 1e-300


@given(ANY_VOXELS, SCALINGS)
def test_one_volume(voxels: Array, scaling: Scaling) -> None:
    is_exact = voxels.dtype.kind in "iu" and int(voxels.max()) < 2**63
    assert_describes(ChannelMeasure.of(voxels, scaling), scaling.apply(voxels), is_exact=is_exact)


@given(st.lists(ANY_VOXELS, min_size=1, max_size=5), st.lists(SCALINGS, min_size=5, max_size=5))
def test_several_volumes_of_different_dtypes_and_scalings(
    volumes: list[Array], scalings: list[Scaling]
) -> None:
    measure, values = ChannelMeasure(), list[Array]()
    for voxels, scaling in zip(volumes, scalings, strict=False):
        measure.add(ChannelMeasure.of(voxels, scaling))
        values.append(scaling.apply(voxels))
    is_exact = (
        all(v.dtype.kind in "iu" and int(v.max()) < 2**63 for v in volumes)
        and len(set(scalings[: len(volumes)])) == 1
    )
    assert_describes(measure, np.concatenate(values), is_exact=is_exact)


def test_percentiles_of_integers_are_those_of_numpy() -> None:
    volumes = [random_voxels((20, 20, 20), "int16", seed) for seed in range(5)]
    scaling = Scaling(-0.37, 11.0)
    parts = [ChannelMeasure.of(voxels, scaling) for voxels in volumes]
    total = ChannelMeasure()
    for part in parts:
        total.add(part)
    values = scaling.apply(np.stack(volumes))
    assert dict(total.statistics(PERCENTILES).percentiles) == dict(
        zip(PERCENTILES, np.percentile(values, PERCENTILES).tolist(), strict=True)
    )


def test_integers_of_too_many_values_are_counted_as_floats_in_any_order() -> None:
    rng = np.random.default_rng(0)
    volumes = [rng.integers(0, 1 << 31, 2000, np.int64) for _ in range(4)]
    parts = [Histogram.of(voxels, Scaling()) for voxels in volumes]
    assert parts[0].error == 0  # below the limit of rows
    one = functools.reduce(Histogram.plus, parts)
    other = functools.reduce(Histogram.plus, parts[::-1])
    assert one.error == PERCENTILE_ERROR
    assert state_of(one) == state_of(other) == state_of(Histogram.of(np.concatenate(volumes), Scaling()))


def state_of(histogram: Histogram) -> tuple[Any, ...]:
    return histogram.scaling, histogram.rows.tolist(), histogram.counts.tobytes()


def sample(seed: int) -> CohortMeasure:
    """A measure of one volume: of integers in one scaling, of others, of floats, or without voxels."""
    rng = np.random.default_rng(seed)
    voxels = [
        random_voxels((3, 3, 3), "int16", seed),
        random_voxels((3, 3, 3), "uint8", seed),
        random_voxels((3, 3, 3), "float32", seed),
        np.zeros(0, np.int16),
    ][seed % 4]
    scaling = Scaling(0.5, 1.0) if seed % 3 == 0 else Scaling()
    measure = CohortMeasure((ChannelMeasure.of(voxels, scaling),), 1, int(voxels.size == 0))
    for axis in range(3):
        measure.shapes[axis].update([int(rng.integers(1, 5))])
        measure.spacings[axis].update([float(rng.random())])
    measure.labels.update({int(rng.integers(1, 4)): (int(rng.integers(1, 99)), 1)})
    return measure


def total_of(groups: Sequence[Sequence[int]]) -> CohortMeasure:
    """The total of the totals of groups, each of which was sent between two machines."""
    total = CohortMeasure()
    for group in groups:
        part = CohortMeasure()
        for seed in group:
            part.add(sample(seed))
        total.add(pickle.loads(pickle.dumps(part)))
    return total


@settings(max_examples=30)
@given(st.permutations(range(8)), st.lists(st.integers(0, 8), max_size=5))
def test_order_and_grouping_have_no_effect(order: list[int], cuts: list[int]) -> None:
    ends = [0, *sorted(cuts), len(order)]
    groups = [order[start:stop] for start, stop in itertools.pairwise(ends)]
    config = RecordConfig(rescale="cohort:zscore")
    found = total_of(groups).statistics(config, ["train"])
    assert found == total_of([range(8)]).statistics(config, ["train"])
    assert CohortStatistics.of(load_json(dump_json(asdict(found)))) == found


def test_a_volume_is_measured_in_each_channel_where_it_is_selected(tmp_path: Path) -> None:
    names = ("T1w", "FLAIR")
    images = [random_voxels((5, 4, 3), dtype, seed) for seed, dtype in enumerate(("int16", "float32"))]
    labels = (np.arange(60).reshape(5, 4, 3) % 5 // 2).astype(np.uint8)
    files = [
        write_image(tmp_path / f"{n}.nii", v) for n, v in zip((*names, "seg"), (*images, labels), strict=True)
    ]
    row = replace(row_of(files[0]), other_files=tuple(map(str, files[1:])))
    config = RecordConfig(rescale="cohort:zscore", rescale_within="mask", mask_dtype="uint8", channels=names)
    measure = measure_volume(load_volume(row, record=config), config)
    found = measure.statistics(config, ["train"])
    for image, channel in zip(images, found.channels, strict=True):
        values = image[labels > 0].astype(np.float64)
        assert channel.num_voxels == values.size
        assert channel.mean == pytest.approx(values.mean(), rel=1e-12)
        assert channel.std == pytest.approx(values.std(), rel=1e-12)
    counts = np.bincount(labels.ravel()).tolist()
    assert [(label.label, label.num_voxels, label.num_volumes) for label in found.labels] == [
        (1, counts[1], 1),
        (2, counts[2], 1),
    ]
    assert found.shape == (5, 4, 3)
    assert found.options == (("channels", "T1w,FLAIR"), ("rescale_within", "mask"))


def test_a_volume_is_far_from_the_quartiles_of_others() -> None:
    total, means = ChannelMeasure(), list[float]()
    for number in range(20):
        voxels = random_voxels((300 + 40 * (number % 3),), "uint8", number)
        voxels = voxels if number else voxels + np.float32(1e6)  # an outlier that would widen a deviation
        total.add(ChannelMeasure.of(voxels, Scaling(0.3, 2.0)))
        means.append(float(np.mean(voxels.astype(np.float64) * 0.3 + 2)))
    found = total.statistics(())
    low, median, high = np.percentile(means, (25, 50, 75)).tolist()
    assert found.volume_quartiles == pytest.approx((low, median, high), rel=PERCENTILE_ERROR)
    assert [number for number, mean in enumerate(means) if found.is_far(mean)] == [0]
    width = high - low
    assert found.is_far(high + 3.05 * width)
    assert found.is_far(low - 3.05 * width)
    assert not found.is_far(high + 2.95 * width)
    assert not replace(found, volume_quartiles=(1.0, 1.0, 1.0)).is_far(9)  # equal volumes tell nothing


def test_medians_are_of_volumes() -> None:
    total = CohortMeasure()
    for size, spacing in ((10, 1.0), (20, 2.0), (20, 2.0), (90, 9.0)):
        measure = sample(0)
        measure.shapes = tuple(type(measure.shapes[0])([size]) for _ in range(3))
        measure.spacings = tuple(type(measure.spacings[0])([spacing]) for _ in range(3))
        total.add(measure)
    found = total.statistics(RecordConfig(rescale="cohort:zscore"), ["train"])
    assert (found.shape, found.spacing) == ((20, 20, 20), (2, 2, 2))


def test_a_volume_that_a_build_refuses_is_not_measured(tmp_path: Path) -> None:
    voxels = random_voxels((3, 3, 3), "float32")
    voxels[1, 1, 1] = np.nan
    config = RecordConfig(rescale="cohort:zscore")
    volume = load_volume(row_of(write_image(tmp_path / "a.nii", voxels)))
    with pytest.raises(VolumeError, match=r"a\.nii: 1 of 27 voxels are NaN or infinite"):
        measure_volume(volume, config)


def test_a_cohort_without_a_selected_voxel_has_no_statistics(tmp_path: Path) -> None:
    config = RecordConfig(rescale="cohort:zscore", rescale_within="above:1e6")
    volume = load_volume(row_of(write_image(tmp_path / "a.nii")))
    with pytest.raises(VolumeError, match="no voxel is above 1000000 in any volume"):
        measure_volume(volume, config).statistics(config, ["train"])


FOUND = total_of([range(4)]).statistics(RecordConfig(rescale="cohort:zscore"), ["train"])


def changed(path: str, value: Any) -> dict[str, Any]:
    """The JSON of statistics with one value changed."""
    facts: dict[str, Any] = load_json(dump_json(asdict(FOUND)))
    at: Any = facts
    *names, last = path.split(".")
    for name in names:
        at = at[int(name) if isinstance(at, list) else name]
    if isinstance(at, list):
        at[int(last)] = value
    else:
        at[last] = value
    return facts


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("channels.0.mean", 1e9, "channels[0] has num_voxels"),
        ("channels.0.std", -1.0, "which no voxels have"),
        ("channels.0.volume_quartiles", [3, 2, 1], "which no voxels have"),
        ("channels.0.volume_quartiles.2", 1e9, "which no voxels have"),
        ("channels.0.std", "1", "channels[0].std is '1', expected a number"),
        ("channels.0.mean", 10**400, "expected a number"),
        ("channels.0.num_voxels", 0, "channels[0].num_voxels is 0, expected at least 1"),
        ("channels.0.num_voxels", True, "expected a whole number"),
        ("channels.0.percentile_error", 2, "which no voxels have"),
        ("channels.0.percentiles.0", [101, 0.0], "which no voxels have"),
        ("channels.0.percentiles.0", [0.5], "has 1 values, expected 2"),
        ("channels.0.percentiles", [[50, 1.0], [25, 0.0]], "which no voxels have"),
        ("channels", [], "channels is 0, expected at least 1"),
        ("channels.0.further", 1, "further"),
        ("num_volumes", 0, "num_volumes is 0"),
        ("num_empty", 99, "num_empty is 99, of 4 volumes"),
        ("num_failed", -1, "num_failed is -1"),
        ("spacing", [1, 1, 0], "spacing is [1.0, 1.0, 0.0], expected sizes"),
        ("shape", [1, 1], "has 2 values, expected 3"),
        ("labels.0.label", 0, "label 0 is 0"),
        ("options", {"spacing": "1"}, "expected a list"),
        ("splits", "train", "expected a list"),
        ("unknown", 1, "unknown"),
    ],
)
def test_statistics_that_no_cohort_has_are_refused(path: str, value: Any, text: str) -> None:
    with pytest.raises(ValueError, match=r"rescale_stats") as error:
        CohortStatistics.of(changed(path, value))
    assert text in str(error.value)


def test_ranges_are_those_of_the_channels() -> None:
    (channel,) = FOUND.channels
    config = RecordConfig(rescale="cohort:zscore", rescale_stats=FOUND)
    assert config.cohort_ranges == ((channel.mean, channel.mean + channel.std),)
    config = replace(config, rescale="cohort:percentile:0.5,99.5")
    values = dict(channel.percentiles)
    assert config.cohort_ranges == ((values[0.5], values[99.5]),)
    assert RecordConfig(rescale="zscore").cohort_ranges is None
    with pytest.raises(
        UsageError, match="has no percentile 2, which --rescale cohort:percentile:2,98 requires"
    ):
        _ = replace(config, rescale="cohort:percentile:2,98").cohort_ranges
    with pytest.raises(UsageError, match="requires statistics; give them with --rescale-stats"):
        _ = RecordConfig(rescale="cohort:zscore").cohort_ranges
