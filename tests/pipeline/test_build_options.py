"""Options of a build mean the same as text and as values of Python, and what cannot be meant is refused."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beam_nifti.cli import parser
from beam_nifti.cli.build_options import build_config
from beam_nifti.config import BuildConfig, Percentile, Window
from beam_nifti.errors import UsageError
from beam_nifti.pipeline.options import OPTIONS, as_parameters, flag_of, make_config
from tests.user_functions import change_all_in_place

SPLIT = {"split": "a=1"}
MASKS = {"mask_column": "seg"}

ALIKE: list[tuple[dict[str, Any], str, list[Any]]] = [
    ({}, "--path-column=T1w", ["T1w", ["T1w"], ("T1w",)]),
    ({}, "--path-column=T1w,FLAIR", ["T1w,FLAIR", ["T1w", "FLAIR"], np.array(["T1w", "FLAIR"])]),
    ({}, "--mask-column=seg", ["seg"]),
    ({}, "--label-column=age:float,sex", ["age:float,sex", ("age:float", "sex")]),
    ({}, "--missing-label=nan", ["nan"]),
    ({}, "--id-column=name", ["name", np.str_("name")]),
    ({}, "--anonymous-ids=lab/key", ["lab/key", Path("lab/key")]),
    (
        {},
        "--split=train=0.75,test=0.25",
        ["train=.75,test=0.25", {"train": 0.75, "test": np.float32(0.25)}, {"train": "0.75", "test": 0.25}],
    ),
    (SPLIT, "--stratify=site", ["site"]),
    (SPLIT, "--split-seed=-3", [-3, "-3", np.int8(-3)]),
    ({}, "--examples-per-shard=5", [5, "5", np.uint64(5)]),
    ({}, "--num-shards=5", [5, "5", np.int64(5)]),
    ({}, "--compression=none", ["none"]),
    ({}, "--compression-level=0", [0, "0", np.int64(0)]),
    ({}, "--shuffle-seed=7", [7, "7", np.int32(7)]),
    (
        {},
        "--rescale=percentile:1,99.5",
        ["percentile:1,99.5", Percentile(1, 99.5), ("percentile", 1, 99.5), ["percentile", "1", 99.5]],
    ),
    ({}, "--rescale=window:-160,240", [Window(-160, np.int16(240)), ("window", np.float32(-160), 240)]),
    ({}, "--rescale=zscore", ["zscore", ("zscore",)]),
    ({}, "--rescale-within=above:-0.5", ["above:-.5", ("above", -0.5), ["above", np.float64(-0.5)]]),
    ({"rescale": "window:0,1"}, "--clip", [True, np.True_]),
    (MASKS, "--mask-dtype=uint16", ["uint16"]),
    ({}, "--voxel-dtype=float16", ["float16"]),
    ({}, "--frames=3", [3, "3", np.int64(3)]),
    ({}, "--frames=first", ["first", 0, "0"]),
    ({}, "--complex=real-imag", ["real-imag"]),
    ({}, "--allow-mixed-shapes", [True]),
    (
        {},
        "--preprocess=tests.user_functions:change_all_in_place",
        ["tests.user_functions:change_all_in_place", change_all_in_place],
    ),
    ({}, "--orientation=RAS", ["RAS"]),
    ({}, "--spacing=1,1,1", ["1,1,1", 1, 1.0, np.float32(1), (1, 1, 1), [1, "1", 1.0], np.ones(3)]),
    ({}, "--crop-foreground=nonzero", ["nonzero", ("nonzero",)]),
    ({}, "--shape=160,192,161", ["160,192,161", (160, 192, 161), np.array([160, 192, 161])]),
    ({}, "--max-bad-fraction=0.25", [0.25, ".25", np.float16(0.25)]),
    ({}, "--overwrite", [True]),
    ({}, "--recheck", [True]),
    ({}, "--workers=3", [3, "3", np.int64(3)]),
    ({}, "--temp-location=tmp", ["tmp", Path("tmp")]),
]


def flags_of(options: dict[str, Any]) -> list[str]:
    return [flag_of(name) if value is True else f"{flag_of(name)}={value}" for name, value in options.items()]


def of_command_line(*flags: str) -> BuildConfig:
    known, rest = parser.parse(["build", "m.tsv", "out", *flags])
    assert rest == []
    return build_config(known)


@pytest.mark.parametrize(("further", "flag", "values"), ALIKE, ids=[flag for _, flag, _ in ALIKE])
def test_text_and_values_mean_the_same(further: dict[str, Any], flag: str, values: list[Any]) -> None:
    name = flag.removeprefix("--").partition("=")[0].replace("-", "_")
    wanted = of_command_line(flag, *flags_of(further))
    assert wanted != of_command_line(*flags_of(further))
    for value in values:
        assert make_config("m.tsv", "out", {**further, name: value}) == wanted, value


def test_every_option_is_tried_here() -> None:
    assert {flag.partition("=")[0] for _, flag, _ in ALIKE} == set(map(flag_of, OPTIONS))


def test_none_is_not_given() -> None:
    assert make_config("m.tsv", "out", dict.fromkeys(OPTIONS)) == of_command_line()
    assert make_config("m.tsv", "out", {"clip": False, "orientation": "native"}) == of_command_line()


def test_the_defaults_can_be_given() -> None:
    defaults = {"rescale": "minmax", "path_column": "path", "compression": "gzip", "max_bad_fraction": 0}
    assert make_config("m.tsv", "out", defaults) == of_command_line(*flags_of(defaults)) == of_command_line()


def nested() -> Callable[[object], object]:
    def step(volume: object) -> object:
        return volume

    return step


class Steps:
    """Functions that cannot be imported by a name."""

    def method(self, volume: object) -> object:
        return volume


def script() -> None:
    """A function that a script would define."""


script.__module__ = "__main__"


@functools.wraps(change_all_in_place)
def wrapped(volume: Any) -> Any:
    return volume


REFUSED: list[tuple[str, Any, str]] = [
    ("rescal", "minmax", "unknown option 'rescal'; did you mean rescale?"),
    ("zzz", 1, "unknown option 'zzz'; choose one of: path_column, "),
    ("workers", True, "--workers is True; give a whole number"),
    ("workers", 2.5, "--workers is 2.5; give a whole number"),
    ("workers", 2.0, "--workers is 2.0; give a whole number"),
    ("workers", np.float64(2), "; give a whole number"),
    ("workers", "two", "--workers is 'two'; give a whole number"),
    ("workers", 0, "--workers is 0; it must be at least 1"),
    ("compression_level", 9, "--compression-level is 9; choose one of: 0, 1, 2, 3"),
    ("max_bad_fraction", True, "--max-bad-fraction is True; give a number"),
    ("max_bad_fraction", float("nan"), "--max-bad-fraction is nan; give a number"),
    ("max_bad_fraction", np.float32("nan"), "; give a number"),
    ("max_bad_fraction", [0.5], "--max-bad-fraction is [0.5]; give a number"),
    ("max_bad_fraction", 1 + 1j, "--max-bad-fraction is (1+1j); give a number"),
    ("max_bad_fraction", 10**400, "; give a number"),
    ("clip", 1, "--clip is 1; give True or False"),
    ("clip", "yes", "--clip is 'yes'; give True or False"),
    ("clip", np.array([True]), "give True or False"),
    ("rescale", 3, "--rescale is 3; choose one of: minmax, percentile:LO,HI, window:LO,HI, zscore, none"),
    ("rescale", ("percentile", 1, True), "--rescale is ('percentile', 1, True); choose one of"),
    ("rescale", ("percentile", 1), "--rescale is 'percentile:1.0'; write it as percentile:LO,HI"),
    ("rescale", Percentile(5, 5), "LO must be below HI"),
    ("rescale", Percentile("a", 5), "; choose one of"),  # type: ignore[arg-type]
    ("rescale", Window(0, float("inf")), "write it as window:LO,HI, with finite numbers"),
    ("rescale_within", ("above", None), "--rescale-within is ('above', None); choose one of: nonzero, "),
    ("crop_foreground", True, "--crop-foreground is True; choose one of: nonzero, above:T, mask"),
    ("frames", True, "--frames is True; choose one of: all, each, first, mean, INDEX (from 0)"),
    ("frames", 1.5, "--frames is 1.5; choose one of"),
    ("frames", -1, "--frames is '-1'; choose one of"),
    ("voxel_dtype", np.float32, "; choose one of: float32, float16, bfloat16, uint8, native"),
    ("voxel_dtype", "float64", "--voxel-dtype is 'float64'; choose one of: float32"),
    ("spacing", (1, 1), "--spacing is (1, 1); give three sizes in mm"),
    ("spacing", {1, 2, 3}, "--spacing is {1, 2, 3}; give three sizes in mm"),
    ("spacing", True, "--spacing is True; give three sizes in mm"),
    ("spacing", (1, 1, True), "--spacing is (1, 1, True); give three sizes in mm"),
    ("spacing", np.ones((3, 1)), "; give three sizes in mm"),
    ("shape", (16.5, 16, 16), "--shape is (16.5, 16, 16); give three whole numbers of voxels"),
    ("shape", 16, "--shape is 16; give three whole numbers of voxels"),
    ("path_column", 3, "--path-column is 3; give the name of a column, or a list of them"),
    ("path_column", [], "--path-column is []; give the name"),
    ("path_column", ["a,b"], "--path-column is ['a,b']; give the name"),
    ("id_column", "", "--id-column is empty; give a text, or leave it out"),
    ("id_column", ["a"], "--id-column is ['a']; give a text"),
    ("split", {}, "--split is {}; give each split once, with its share"),
    ("split", {"train": True}, "--split is {'train': True}; give each split once"),
    ("split", {1: 1.0}, "--split is {1: 1.0}; give each split once"),
    ("split", {"train": 0.5}, "--split has shares that sum to 0.5"),
    ("split", 0.8, "--split is 0.8; give each split once"),
    ("stratify", "site", "--stratify needs --split"),
    ("anonymous_ids", b"key", "--anonymous-ids is b'key'; give a path"),
    ("preprocess", lambda volume: volume, "which has no name to import it by; define a function at the top"),
    ("preprocess", nested(), "nested.<locals>.step of tests.pipeline.test_build_options, which cannot be"),
    ("preprocess", Steps().method, "is Steps.method of tests.pipeline.test_build_options, which cannot"),
    ("preprocess", script, "is script of __main__, which workers cannot import"),
    ("preprocess", wrapped, "change_all_in_place of tests.user_functions, which cannot be imported by that"),
    ("preprocess", 3, "--preprocess is 3; give a function, or its name as package.module:function"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_what_no_build_can_have_is_named_with_what_is_allowed(name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        make_config("m.tsv", "out", {name: value})


def test_values_are_compared_with_each_other() -> None:
    with pytest.raises(UsageError, match="give one of --examples-per-shard and --num-shards, not both"):
        make_config("m.tsv", "out", {"examples_per_shard": 1, "num_shards": 1})
    with pytest.raises(UsageError, match="--compression-level has no effect with --compression none"):
        make_config("m.tsv", "out", {"compression": "none", "compression_level": 1})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("--clip cannot be used with --rescale minmax; drop it", "clip=True cannot be used with rescale min"),
        ("--rescale-within is 'x'; see --rescale", "rescale_within is 'x'; see rescale"),
        ("--runner=Flink is not ours; a--clip, --", "--runner=Flink is not ours; a--clip, --"),
    ],
)
def test_errors_of_python_name_parameters(text: str, named: str) -> None:
    assert as_parameters(text).startswith(named)
