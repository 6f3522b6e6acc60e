"""Options are checked when they are given, and every one of them that matters changes a fingerprint."""

from __future__ import annotations

import dataclasses
import math

import pytest

from beam_nifti.config import BuildConfig, RecordConfig, Sharding
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
    ],
)
def test_record_config_refuses_what_no_record_can_have(field: str, value: object, flag: str) -> None:
    with pytest.raises(UsageError, match=f"^{flag} is {value!r}; choose one of: "):
        RecordConfig(**{field: value})


def test_fingerprints_differ_wherever_bytes_do() -> None:
    configs = [
        RecordConfig(rescale, dtype, compression, level, frames)
        for rescale in ("minmax", "none")
        for dtype in ("float32", "native")
        for compression in ("gzip", "none")
        for level in ((0, 1, 2, 3) if compression == "gzip" else (2,))
        for frames in (None, "all")
    ]
    assert len({c.fingerprint for c in configs}) == len(configs)
    assert len({len(c.fingerprint) for c in configs}) == 1


def test_level_does_not_count_without_compression() -> None:
    levels = {RecordConfig(compression="none", compression_level=n).fingerprint for n in range(4)}
    assert len(levels) == 1


def test_fingerprint_is_the_same_on_every_machine() -> None:
    # Changing it makes every unfinished build start again: do so only together with FORMAT_VERSION.
    assert RecordConfig().fingerprint == "6bd9c063b6a01d2c"


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
