"""Options are checked when they are given, and every one of them that matters changes a fingerprint."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.config import BuildConfig, RecordConfig, Sharding, Splitting
from beam_nifti.errors import UsageError


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("rescale", "quantile", "--rescale"),
        ("rescale", "", "--rescale"),
        ("voxel_dtype", "float64", "--voxel-dtype"),
        ("compression", "zstd", "--compression"),
        ("compression_level", 4, "--compression-level"),
        ("compression_level", -1, "--compression-level"),
        ("compression_level", 9, "--compression-level"),
        ("frames", "", "--frames"),
        ("frames", "some", "--frames"),
        ("frames", "INDEX", "--frames"),
        ("frames", "-1", "--frames"),
        ("frames", "01", "--frames"),
        ("frames", "1.5", "--frames"),
        ("complex", "", "--complex"),
        ("complex", "abs", "--complex"),
    ],
)
def test_record_config_refuses_what_no_record_can_have(field: str, value: object, flag: str) -> None:
    with pytest.raises(UsageError, match=f"^{flag} is {value!r}; choose one of: "):
        RecordConfig(**{field: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rescale": "percentile"}, "--rescale is 'percentile'; write it as percentile:LO,HI"),
        ({"rescale": "window:"}, "write it as window:LO,HI, with finite numbers"),
        ({"rescale": "window:1"}, "write it as window:LO,HI, with finite numbers"),
        ({"rescale": "window:1,2,3"}, "write it as window:LO,HI, with finite numbers"),
        ({"rescale": "window:1,inf"}, "write it as window:LO,HI, with finite numbers"),
        ({"rescale": "percentile:a,b"}, "write it as percentile:LO,HI, with finite numbers"),
        ({"rescale": "minmax:0,1"}, "write it as minmax$"),
        ({"rescale": "window:5,5"}, "LO must be below HI"),
        ({"rescale": "percentile:99,1"}, "LO must be below HI"),
        ({"rescale": "percentile:-1,99"}, "percentiles must be between 0 and 100"),
        ({"rescale": "percentile:1,100.5"}, "percentiles must be between 0 and 100"),
        ({"rescale_within": "brain"}, "--rescale-within is 'brain'; choose one of: nonzero, above:T"),
        ({"rescale_within": "above"}, "--rescale-within is 'above'; write it as above:T"),
        ({"rescale_within": "nonzero:1"}, "write it as nonzero$"),
        ({"rescale": "window:0,1", "rescale_within": "nonzero"}, "no effect on --rescale window:0,1"),
        ({"rescale": "none", "rescale_within": "above:1"}, "no effect on --rescale none"),
        ({"clip": True}, "--clip cannot be used with --rescale minmax"),
        ({"rescale": "zscore", "clip": True}, "--clip cannot be used with --rescale zscore"),
        ({"rescale": "none", "clip": True}, "--clip cannot be used with --rescale none"),
        (
            {"rescale": "zscore", "voxel_dtype": "uint8"},
            r"uint8 holds only \[0, 1\], and --rescale zscore gives",
        ),
        ({"rescale": "none", "voxel_dtype": "uint8"}, "use --clip with percentile or window, or --voxel"),
        (
            {"rescale": "zscore", "rescale_within": "nonzero", "voxel_dtype": "uint8"},
            "use --clip with percentile, or --voxel-dtype float16",
        ),
    ],
)
def test_rescalings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RecordConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"rescale": "percentile:1,99"},
        {"rescale": "window:0,9"},
        {"rescale_within": "nonzero"},
        {"rescale": "percentile:1,99", "rescale_within": "nonzero"},
    ],
)
def test_the_remedy_for_uint8_is_accepted(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"use --clip, or --voxel-dtype float16$"):
        RecordConfig(**options, voxel_dtype="uint8")
    for accepted in ({"clip": True, "voxel_dtype": "uint8"}, {"voxel_dtype": "float16"}):
        RecordConfig(**options, **accepted)


def test_equal_rescalings_are_spelled_alike() -> None:
    spelled = RecordConfig("percentile:00.50,99.5e0", rescale_within="above:-0")
    assert (spelled.rescale, spelled.rescale_within) == ("percentile:0.5,99.5", "above:0")
    assert spelled.fingerprint == RecordConfig("percentile:.5,99.5", rescale_within="above:0.0").fingerprint
    assert RecordConfig("window:-160,240.0").rescale == "window:-160,240"


def test_fingerprints_differ_wherever_bytes_do() -> None:
    configs = [
        RecordConfig(rescale, dtype, compression, level, frames)
        for rescale in ("minmax", "none")
        for dtype in ("float32", "native")
        for compression in ("gzip", "none")
        for level in ((0, 1, 2, 3) if compression == "gzip" else (2,))
        for frames in (None, "all", "first", "1", "12")
    ]
    configs += [
        RecordConfig(frames=frames, complex=part)
        for frames in ("mean", None, "all")
        for part in ("magnitude", "real-imag")
    ]
    configs += [RecordConfig(frames="mean"), RecordConfig(complex="phase")]
    configs += [
        RecordConfig(rescale, dtype, clip=clip, rescale_within=within)
        for rescale in ("percentile:1,99", "percentile:2,99")
        for dtype in ("float32", "float16", "bfloat16")
        for clip in (False, True)
        for within in (None, "nonzero", "above:1")
    ]
    assert len({c.fingerprint for c in configs}) == len(configs)
    assert len({len(c.fingerprint) for c in configs}) == 1


def test_the_frame_of_number_0_is_the_first() -> None:
    assert RecordConfig(frames="0") == RecordConfig(frames="first")


def test_native_records_hold_nothing_that_is_computed() -> None:
    for fields in ({"frames": "mean"}, {"complex": "phase"}, {"complex": "real-imag"}):
        with pytest.raises(
            UsageError, match=r"native stores voxels as in the file, .* use --voxel-dtype float32"
        ):
            RecordConfig(voxel_dtype="native", **fields)


def test_angles_have_no_mean() -> None:
    with pytest.raises(UsageError, match="--complex phase gives angles, which --frames mean cannot average"):
        RecordConfig(frames="mean", complex="phase")


def test_level_does_not_count_without_compression() -> None:
    levels = {RecordConfig(compression="none", compression_level=n).fingerprint for n in range(4)}
    assert len(levels) == 1


def test_fingerprint_is_the_same_on_every_machine() -> None:
    # Changing it makes every unfinished build start again, and refuses to add rows to a dataset.
    assert RecordConfig().fingerprint == "19c14e1018985695"
    assert RecordConfig(format_version=1).fingerprint == "6bd9c063b6a01d2c"


@pytest.mark.parametrize(
    "arguments",
    [{}, {"examples_per_shard": 3, "num_shards": 2}],
)
def test_sharding_takes_exactly_one_size(arguments: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="one of --examples-per-shard and --num-shards"):
        Sharding(**arguments)


@pytest.mark.parametrize(
    ("field", "flag"),
    [("examples_per_shard", "--examples-per-shard"), ("num_shards", "--num-shards")],
)
@pytest.mark.parametrize("value", [0, -1])
def test_sharding_refuses_sizes_below_one(field: str, flag: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"^{flag} is {value}; it must be at least 1"):
        Sharding(**{field: value})


@pytest.mark.parametrize("fraction", [-0.01, 1.01, math.nan, math.inf])
def test_max_bad_fraction_is_a_fraction(fraction: float) -> None:
    with pytest.raises(UsageError, match=r"--max-bad-fraction is .*between 0 and 1"):
        BuildConfig("m.csv", "out", max_bad_fraction=fraction)


def test_workers_are_at_least_one() -> None:
    with pytest.raises(UsageError, match="--workers is 0"):
        BuildConfig("m.csv", "out", workers=0)


def test_dataset_config_holds_what_decides_the_content_and_nothing_else() -> None:
    config = BuildConfig("m.csv", "out", sharding=Sharding(num_shards=2))
    content = {
        "record": RecordConfig(rescale="none"),
        "sharding": Sharding(num_shards=3),
        "splitting": Splitting({"train": 0.8, "test": 0.2}),
        "shuffle_seed": 1,
        "allow_mixed_shapes": True,
    }
    for name, value in content.items():
        changed = dataclasses.replace(config, **{name: value})
        assert changed.as_dataset_config() != config.as_dataset_config(), name
    how = {
        "manifest": "n.csv",
        "output": "other",
        "max_bad_fraction": 0.5,
        "overwrite": True,
        "workers": 7,
    }
    for name, value in how.items():
        changed = dataclasses.replace(config, **{name: value})
        assert changed.as_dataset_config() == config.as_dataset_config(), name


@given(st.integers(0, 10_000), st.integers(1, 10_000), st.integers(0, 4))
def test_the_fraction_that_is_given_is_the_limit_to_the_volume(part: int, total: int, digits: int) -> None:
    """Any decimal of any number of volumes, compared in whole numbers."""
    scale = 10**digits
    part %= scale + 1
    config = BuildConfig("m.csv", "out", max_bad_fraction=float(f"{part}e-{digits}"))
    limit = part * total // scale
    assert config.allows_failures(limit, total)
    assert not config.allows_failures(limit + 1, total)


def test_29_of_100_are_a_fraction_of_0_29() -> None:
    assert BuildConfig("m.csv", "out", max_bad_fraction=0.29).allows_failures(29, 100)
