"""Options of a build mean the same as text and as values of Python, and what cannot be meant is refused."""

from __future__ import annotations

import contextlib
import csv
import functools
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from beam_nifti.cli import main as cli
from beam_nifti.cli import parser
from beam_nifti.config import BuildConfig, Percentile, RecordConfig, Sharding, Splitting, Window
from beam_nifti.errors import DatasetError, UsageError
from beam_nifti.pipeline.configure import make_config
from beam_nifti.pipeline.options import OPTIONS, flag_of
from beam_nifti.pipeline.parameters import as_parameters, naming_parameters
from beam_nifti.pipeline.statistics_file import parse_statistics
from beam_nifti.volume.user_function import source_sha256
from tests.build_helpers import build_config, contents
from tests.datasets import edit_info, info_of
from tests.golden.make_builds import write_inputs
from tests.images import write_manifest
from tests.user_functions import change_all_in_place, scale

STEP = "tests.golden.steps:double"
SPLIT = {"split": "a=1"}
MASKS = {"mask_column": "seg"}
COHORT = {"rescale": "cohort:zscore"}
STATISTICS = str(Path(__file__).parent.parent / "golden/statistics.json")

REFERENCE = Path(__file__).parent.parent / "golden/version-1/images/1-T1w.nii"
REFERENCE_GRID = {"shape": nib.load(REFERENCE).shape, "affine": nib.load(REFERENCE).affine}  # type: ignore[attr-defined]

ALIKE: list[tuple[dict[str, Any], str, list[Any]]] = [
    ({}, "--path-column=T1w", ["T1w", ["T1w"], ("T1w",)]),
    ({}, "--path-column=T1w,FLAIR", ["T1w,FLAIR", ["T1w", "FLAIR"], np.array(["T1w", "FLAIR"])]),
    ({}, "--mask-column=seg", ["seg"]),
    ({}, "--mask-column=organs,lesions", ["organs,lesions", ["organs", "lesions"], ("organs", "lesions")]),
    ({}, "--target-column=dose", ["dose"]),
    ({}, "--label-column=age:float,sex", ["age:float,sex", ("age:float", "sex")]),
    ({}, "--missing-label=nan", ["nan"]),
    (MASKS, "--missing-mask=empty", ["empty"]),
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
    ({}, "--rescale=cohort:zscore", ["cohort:zscore", ("cohort:zscore",)]),
    (
        {},
        "--rescale=cohort:percentile:0.5,99.5",
        ["cohort:percentile:.5,99.5", ("cohort:percentile", 0.5, np.float64(99.5))],
    ),
    (COHORT, "--rescale-split=test,train", ["train,test", ["train", "test"], ("test", "train", "test")]),
    (
        COHORT,
        f"--rescale-stats={STATISTICS}",
        [STATISTICS, Path(STATISTICS), parse_statistics(Path(STATISTICS).read_text())],
    ),
    ({"rescale": "window:0,1"}, "--clip", [True, np.True_]),
    (MASKS, "--mask-dtype=uint16", ["uint16"]),
    (
        MASKS,
        "--map-labels=4=3,10=0",
        ["10=0, 4=3", {10: 0, 4: 3}, {"4": "3", 10: np.int8(0)}, "0=0,4=3,10=0"],
    ),
    ({}, "--voxel-dtype=float16", ["float16"]),
    ({}, "--frames=3", [3, "3", np.int64(3)]),
    ({}, "--frames=first", ["first", 0, "0"]),
    ({"frames": "each"}, "--max-frames=400", [400, "400", np.int16(400)]),
    ({}, "--complex=real-imag", ["real-imag"]),
    ({}, "--allow-mixed-shapes", [True]),
    ({}, "--nonfinite=value:-1024", ["value:-1024.0", ("value", -1024), ["value", np.float32(-1024)]]),
    ({}, "--nonfinite=zero", ["zero", ("zero",), ("value", 0), "value:-0"]),
    (
        {},
        "--preprocess=tests.user_functions:change_all_in_place",
        ["tests.user_functions:change_all_in_place", change_all_in_place, [change_all_in_place]],
    ),
    (
        {},
        "--preprocess=tests.user_functions:scale(by=(2, 0.5), name='x')",
        [
            functools.partial(scale, by=(np.int8(2), np.float32(0.5)), name=np.str_("x")),
            functools.partial(functools.partial(scale, name="x"), by=(2, 0.5)),
            'tests.user_functions:scale( name = "x" , by=(2,.5) )',
            {"function": "tests.user_functions:scale", "name": "x", "by": (2, 0.5)},
        ],
    ),
    ({}, "--orientation=RAS", ["RAS"]),
    ({}, "--spacing=1,1,1", ["1,1,1", 1, 1.0, np.float32(1), (1, 1, 1), [1, "1", 1.0], np.ones(3)]),
    ({}, "--crop-foreground=nonzero", ["nonzero", ("nonzero",)]),
    ({}, "--spacing=0.7,0.7,2", [np.array([0.7, 0.7, 2], np.float32), (0.7, np.float32(0.7), 2)]),
    (MASKS, "--align=first", ["first"]),
    ({}, f"--reference={REFERENCE}", [REFERENCE, REFERENCE_GRID]),
    ({}, "--resize=160,192,161", ["160,192,161", (160, 192, 161), np.array([160, 192, 161])]),
    ({}, "--resize-longest=128", [128, "128", np.int64(128)]),
    ({"spacing": "1,1,1"}, "--separate-z=auto", ["auto"]),
    ({"spacing": "1,1,1"}, "--antialias", [True, np.bool_(True)]),
    ({"spacing": "1,1,1"}, "--interpolation=cubic", ["cubic"]),
    ({"spacing": "1,1,1", "mask_column": "mask"}, "--mask-interpolation=linear", ["linear"]),
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
    assert {flag.partition("=")[0] for _, flag, _ in ALIKE} == set(map(flag_of, OPTIONS)) - {"--without"}


def test_none_is_not_given() -> None:
    assert make_config("m.tsv", "out", dict.fromkeys(OPTIONS)) == of_command_line()
    assert (
        make_config("m.tsv", "out", {"clip": False, "orientation": "native", "nonfinite": "error"})
        == of_command_line()
    )


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
    ("rescal", "minmax", "unknown option 'rescal'; did you mean rescale or rescale_stats or rescale_split?"),
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
    (
        "rescale",
        "cohort:minmax",
        "--rescale is 'cohort:minmax'; choose one of: minmax, percentile:LO,HI, win",
    ),
    (
        "rescale",
        "cohort:percentile:9",
        "'cohort:percentile:9'; write it as cohort:percentile:LO,HI, with fin",
    ),
    ("rescale", ("cohort:percentile", 1, 101), "percentiles must be between 0 and 100"),
    ("rescale_split", 3, "--rescale-split is 3; give the name of a split, or a list of them"),
    ("rescale_split", "train", "--rescale-split has no effect on --rescale minmax, which does not depend on"),
    ("rescale_stats", {"channels": []}, "--rescale-stats is {'channels': []}; give a path"),
    ("rescale_stats", STATISTICS, "--rescale-stats has no effect on --rescale minmax, which does not depend"),
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
    ("frames", True, "--frames is True; choose one of: all, each, each:N, first, mean, INDEX (from 0)"),
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
    ("id_column", "", "--id-column is empty; give a text, or drop it"),
    ("id_column", ["a"], "--id-column is ['a']; give a text"),
    ("split", {}, "--split is {}; give each split once, with its share"),
    ("split", {"train": True}, "--split is {'train': True}; give each split once"),
    ("split", {1: 1.0}, "--split is {1: 1.0}; give each split once"),
    ("split", {"train": 0.5}, "--split has shares that sum to 0.5"),
    ("split", 0.8, "--split is 0.8; give each split once"),
    ("stratify", "site", "--stratify requires --split"),
    ("anonymous_ids", b"key", "--anonymous-ids is b'key'; give a path"),
    ("temp_location", 5, "--temp-location is 5; give a path"),
    ("temp_location", "", "--temp-location is empty; was a variable not set?"),
    ("temp_location", "a\0b", "--temp-location is 'a\\x00b', which has a NUL character"),
    ("preprocess", lambda volume: volume, "which has no name to import it by; define a function at the top"),
    ("preprocess", nested(), "nested.<locals>.step of tests.pipeline.test_build_options, which cannot be"),
    ("preprocess", Steps().method, "is Steps.method of tests.pipeline.test_build_options, which cannot"),
    ("preprocess", script, "is script of __main__, which workers cannot import"),
    ("preprocess", wrapped, "change_all_in_place of tests.user_functions, which cannot be imported by that"),
    (
        "preprocess",
        functools.partial(scale, 3),
        "is tests.user_functions:scale with arguments (3,) that have",
    ),
    (
        "preprocess",
        functools.partial(scale, by={1}),
        "scale: {1} is not a literal; give a text, a finite number",
    ),
    ("preprocess", functools.partial(scale, by=float("inf")), "scale: inf is not a literal"),
    ("preprocess", functools.partial(lambda volume: volume), "is a lambda of tests.pipeline.test_build_opt"),
    ("preprocess", [change_all_in_place, nested()], "nested.<locals>.step of tests.pipeline"),
    ("preprocess", [change_all_in_place, 3], "--preprocess is 3; give a function, or its name"),
    ("preprocess", {"threshold": 3}, "--preprocess is {'threshold': 3}; give the name of a function under"),
    (
        "preprocess",
        "a:f(1)",
        "--preprocess is 'a:f(1)'; write it as package.module:function, or with literals",
    ),
    ("preprocess", "a:f(x=1, x=2)", "write it as package.module:function"),
    ("preprocess", "a:f(**{'x': 1})", "write it as package.module:function"),
    ("preprocess", "a:f(x=__import__('os').getcwd())", "write it as package.module:function"),
    ("preprocess", "a:f(x=1)(y=2)", "write it as package.module:function"),
    ("preprocess", "a:f(x=1", "write it as package.module:function"),
    ("preprocess", "a:f(x={1, 2})", "write it as package.module:function"),
    ("preprocess", f"a:f(x={'-' * 4000}1)", "write it as package.module:function"),
    ("preprocess", f"a:f(x={'[' * 2000}{']' * 2000})", "write it as package.module:function"),
    ("preprocess", f"a:f(x='{'x' * 4096}')", "write it as package.module:function"),
    ("preprocess", 3, "--preprocess is 3; give a function, or its name as package.module:function"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED, ids=range(len(REFUSED)))
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
        (
            "--clip cannot be used with --rescale minmax; drop it",
            'clip=True cannot be used with rescale="minmax"; drop',
        ),
        (
            "--clip --rescale none, --frames 3 or --frames first.",
            'clip=True rescale="none", frames=3 or frames="first".',
        ),
        ("--rescale percentile:1,99 (--shape 4,5,6)", 'rescale="percentile:1,99" (shape=(4, 5, 6))'),
        ("--split would, or --split a=0.8,b=0.2; --spacing", 'split would, or split="a=0.8,b=0.2"; spacing'),
        ("--without anonymous-ids ignores it", 'without="anonymous_ids" ignores it'),
        ("--without --like or --max-bad-fraction 0.5", "without --like or max_bad_fraction=0.5"),
        ("--preprocess a.b:c; a", "preprocess='a.b:c'; a"),
        ("--preprocess a.b:c: its file", "preprocess a.b:c: its file"),
        (
            "--preprocess a.b:c --preprocess " + shlex.quote("a:f(x='y')") + " is",
            """preprocess=['a.b:c', "a:f(x='y')"] is""",
        ),
        ("--rescale-within is 'x'; see --rescale", "rescale_within is 'x'; see rescale"),
        ("--overwrite is 5; give True or False", "overwrite is 5; give True or False"),
        ("--runner=Flink is not ours; a--clip, --", "--runner=Flink is not ours; a--clip, --"),
    ],
)
def test_errors_of_python_name_parameters(text: str, named: str) -> None:
    assert as_parameters(text).startswith(named)


def test_parameters_may_have_names_of_their_own() -> None:
    with pytest.raises(UsageError, match=r"^within has no effect on rescale=\"none\""):  # noqa: SIM117
        with naming_parameters(rescale_within="within"):
            make_config("m.tsv", "out", {"rescale": "none", "rescale_within": "nonzero"})


# Options of a file and of a dataset


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort with a key, and datasets of it."""
    folder = tmp_path_factory.mktemp("study")
    with write_inputs(folder).open() as file:
        rows = [
            {n: c for n, c in row.items() if n not in ("split", "frames")}
            for row in csv.DictReader(file, delimiter="\t")
        ]
    write_manifest(folder / "manifest.tsv", rows)
    (folder / "other-key").write_bytes(bytes(range(16)))
    for name, flags in {
        "rescaled": ["--rescale=percentile:1,99", "--clip", "--rescale-within=nonzero", "--num-shards=2"],
        "drawn": ["--split=a=0.5,b=0.5", "--split-seed=3", "--stratify=site", "--mask-column=mask"],
        "stepped": [f"--preprocess={STEP}"],
        "anonymous": [f"--anonymous-ids={folder / 'key'}", "--mask-column=mask"],
        "plain": ["--compression-level=1", "--shuffle-seed=4"],
    }.items():
        command = ["build", str(folder / "manifest.tsv"), str(folder / name), "--workers=1", "--quiet"]
        assert cli.main([*command, *flags]) == 0
    return folder


def write_toml(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_command_line_precedes_the_file_and_that_the_dataset(study: Path, tmp_path: Path) -> None:
    like = f"--like={study / 'rescaled'}"
    path = write_toml(tmp_path / "o.toml", "rescale = 'window:0,9'\nvoxel-dtype = 'uint8'")
    config = f"--config={path}"
    taken = ["--rescale=percentile:1,99", "--clip", "--rescale-within=nonzero", "--num-shards=2"]
    assert of_command_line(like) == of_command_line("--path-column=path", "--label-column=label", *taken)
    minmax = of_command_line(like, "--rescale=minmax").record
    assert (minmax.rescale, minmax.rescale_within, minmax.clip) == ("minmax", "nonzero", True)
    without = ["--without=rescale-within"]
    record = of_command_line(like, config, *without).record
    assert (record.rescale, record.voxel_dtype, record.clip) == ("window:0,9", "uint8", True)
    record = of_command_line(
        like, config, *without, "--rescale=percentile:2,98", "--voxel-dtype=float32"
    ).record
    assert (record.rescale, record.voxel_dtype) == ("percentile:2,98", "float32")
    assert not make_config("m.tsv", "out", {"clip": False}, like=str(study / "rescaled")).record.clip


@pytest.mark.parametrize(
    "text",
    [
        "spacing = [1, 1.0, 1]\nframes = 2\nclip = true\nrescale = ['window', 0, 9]\n",
        "spacing = 1\nframes = '2'\nclip = true\nrescale = 'window:0,9'\n",
    ],
)
def test_a_file_has_the_values_of_python(text: str, tmp_path: Path) -> None:
    flags = ["--spacing=1,1,1", "--frames=2", "--clip", "--rescale=window:0,9"]
    assert of_command_line(f"--config={write_toml(tmp_path / 'o.toml', text)}") == of_command_line(*flags)


def test_a_file_may_name_the_dataset(study: Path, tmp_path: Path) -> None:
    config = write_toml(tmp_path / "o.toml", f"like = '{study / 'plain'}'\n[split]\na = 1\n")
    found = make_config("m.tsv", "out", {}, config=config)
    assert (found.shuffle_seed, found.splitting and found.splitting.shares) == (4, {"a": 1})
    other = make_config("m.tsv", "out", {}, config=config, like=str(study / "rescaled"))
    assert (other.shuffle_seed, other.record.clip) == (None, True)


def test_what_is_given_takes_the_place_of_what_it_cannot_go_with(study: Path, tmp_path: Path) -> None:
    sharding = of_command_line(f"--like={study / 'rescaled'}", "--examples-per-shard=3").sharding
    assert sharding == Sharding(examples_per_shard=3)
    sharding = of_command_line(f"--like={study / 'plain'}", "--num-shards=3").sharding
    assert sharding == Sharding(num_shards=3)
    record = of_command_line(f"--like={study / 'plain'}", "--compression=none").record
    assert record == of_command_line("--compression=none").record
    config = write_toml(tmp_path / "o.toml", "num_shards = 7")
    sharding = make_config("m.tsv", "out", {}, config=config, like=str(study / "plain")).sharding
    assert sharding == Sharding(num_shards=7)


def test_what_only_comes_with_an_option_goes_with_it(study: Path) -> None:
    like = str(study / "drawn")
    found = make_config("m.tsv", "out", {"without": ["split", "mask-column"]}, like=like)
    assert (found.splitting, found.columns.mask, found.record.mask_dtype) == (None, None, None)
    redrawn = make_config("m.tsv", "out", {"split": {"c": 1}}, like=like).splitting
    assert redrawn == Splitting({"c": 1}, 3, "site")


def test_a_conflict_names_where_an_option_is_from(study: Path) -> None:
    with pytest.raises(UsageError) as e:
        of_command_line(f"--like={study / 'rescaled'}", "--rescale=zscore")
    assert str(e.value) == (
        "--clip cannot be used with --rescale zscore, only with percentile, window, or minmax with "
        "--rescale-within; drop it (--clip comes from --like or --config; --without clip ignores it)"
    )
    assert of_command_line(f"--like={study / 'rescaled'}", "--rescale=zscore", "--without=clip")
    with pytest.raises(UsageError, match=r"--workers is 0; it must be at least 1$"):
        of_command_line(f"--like={study / 'rescaled'}", "--workers=0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "rescal = 'zscore'",
            "{}: unknown option 'rescal'; did you mean rescale or rescale_stats or rescale_split?",
        ),
        ("num-shards = 1\nnum_shards = 1", "{}: num_shards is given twice; give it once"),
        ("workers = true", "{}: --workers is True; give a whole number"),
        ("frames = 1979-05-27", "{}: --frames is datetime.date(1979, 5, 27); choose one of"),
        ("like = 3", "{}: --like is 3; give a path"),
        (
            "rescale = ",
            "--config is {}, which is not valid TOML: Invalid value (at end of document); correct it",
        ),
        ("rescale = '\udcff'", "--config is {}, which is not valid TOML: 'utf-8' codec can't decode"),
        (None, "--config is {}, which cannot be read: No such file or directory; give a TOML file"),
        (" " * (1 << 20) + "\n", "--config is {}, which cannot be read: has more than the 65,536 bytes"),
        (f"{'a.' * 101}b = 1", "--config is {}, which is not valid TOML: a line has more than 100 dots"),
        (
            f"rescale = {'[' * 50_000}",
            "--config is {}, which is not valid TOML: maximum recursion depth exceeded",
        ),
    ],
)
def test_a_file_that_is_wrong_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "o.toml"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=re.escape(message.format(path))):
        make_config("m.tsv", "out", {}, config=str(path))


def test_relative_paths_of_a_file_start_where_the_command_does(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study)
    config = write_toml(tmp_path / "o.toml", "like = 'anonymous'\nanonymous_ids = 'key'")
    assert make_config("m.tsv", "out", {}, config=config).anonymous_ids == "key"


def test_a_function_is_given_again_or_left_out(
    study: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    like = f"--like={study / 'stepped'}"
    for flags in ([], [f"--config={write_toml(tmp_path / 'o.toml', '')}"]):
        with pytest.raises(UsageError, match=f"stepped, which was built with --preprocess {STEP}; .*give it"):
            of_command_line(like, *flags)
    step = f"--preprocess={STEP}"
    assert of_command_line(like, step).record == RecordConfig(preprocess=STEP)
    in_file = write_toml(tmp_path / "o.toml", f"preprocess = '{STEP}'")
    assert of_command_line(like, f"--config={in_file}") == of_command_line(like, step)
    assert of_command_line(like, "--without=preprocess").record == of_command_line().record
    assert (
        make_config("m.tsv", "out", {"preprocess": []}, like=str(study / "stepped")).record == RecordConfig()
    )
    assert caplog.messages == []
    other = "tests.user_functions:fail_as_named"
    assert of_command_line(like, f"--preprocess={other}").record == RecordConfig(preprocess=other)
    assert caplog.messages == [f"{other} replaces {STEP} of {study / 'stepped'}"]


def test_another_version_of_a_function_is_refused(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study / "stepped", tmp_path / "out")
    edit_info(tmp_path / "out", lambda i: i["config"].update(preprocess_sha256="0" * 64))
    digest = source_sha256(STEP)
    own = "tests.user_functions:scale"
    assert (
        make_config("m.tsv", "out", {"preprocess": own}, like=str(tmp_path / "out")).record.preprocess == own
    )
    with pytest.raises(
        UsageError, match=f"{STEP}: its file has sha256 {digest}, but .*/out, .* sha256 {'0' * 64};"
    ):
        make_config("m.tsv", "out", {"preprocess": [own, STEP]}, like=str(tmp_path / "out"))
    edit_info(tmp_path / "out", lambda i: i["config"].update(preprocess=f"{own}(by=[3])"))
    with pytest.raises(UsageError, match=f"{own}: its file has sha256"):
        make_config("m.tsv", "out", {"preprocess": own}, like=str(tmp_path / "out"))


def test_a_function_that_only_the_dataset_names_is_not_imported(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study / "stepped", tmp_path / "out")
    edit_info(tmp_path / "out", lambda i: i["config"].update(preprocess="tests.never_imported:f"))
    with pytest.raises(
        UsageError, match=r"was built with --preprocess tests\.never_imported:f; a function is"
    ):
        make_config("m.tsv", "out", {}, like=str(tmp_path / "out"))
    make_config("m.tsv", "out", {"preprocess": STEP}, like=str(tmp_path / "out"))
    with pytest.raises(UsageError, match="cannot be imported"):
        make_config("m.tsv", "out", {"preprocess": "tests.never_imported:f"}, like=str(tmp_path / "out"))


def test_the_key_of_pseudonyms_is_given_again(study: Path) -> None:
    like = str(study / "anonymous")
    with pytest.raises(UsageError, match=r"whose ids are anonymous; .* give it with --anonymous-ids"):
        make_config("m.tsv", "out", {}, like=like)
    key = study / "key"
    assert make_config("m.tsv", "out", {"anonymous_ids": key}, like=like).anonymous_ids == str(key)
    with pytest.raises(UsageError, match=r"other-key, not the key that .*/anonymous was built with"):
        make_config("m.tsv", "out", {"anonymous_ids": study / "other-key"}, like=like)
    assert make_config("m.tsv", "out", {"without": "anonymous-ids"}, like=like).anonymous_ids is None


def test_without_leaves_out_something_that_there_is() -> None:
    with pytest.raises(UsageError, match=r"^--without ignores options of --like or --config"):
        make_config("m.tsv", "out", {"without": "clip"})
    with pytest.raises(UsageError, match="--without has 'clipp', which is not an option; did you mean clip"):
        make_config("m.tsv", "out", {"without": ["clipp"]})


def test_like_needs_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no complete dataset here"):
        make_config("m.tsv", "out", {}, like=str(tmp_path))


def some_of(*choices: str) -> st.SearchStrategy[list[str]]:
    """No option, or those of one of these texts."""
    return st.sampled_from(("", *choices)).map(str.split)


RANDOM = st.tuples(
    some_of(
        *(
            "--rescale=zscore",
            "--rescale=percentile:1,99.5 --clip",
            "--rescale=window:-5,500",
            "--rescale=none",
        ),
        *("--rescale-within=nonzero --clip", "--rescale=zscore --rescale-within=above:3.5"),
    ),
    some_of("--voxel-dtype=float16", "--voxel-dtype=native", "--allow-mixed-shapes"),
    some_of("--label-column=site", "--label-column=label:float,site:class --missing-label=nan"),
    some_of("--mask-column=mask", "--mask-column=mask --mask-dtype=uint16 --crop-foreground=mask"),
    some_of("--split=a=0.5,b=0.5", "--split=b=0.25,a=0.75 --split-seed=2 --stratify=site"),
    some_of("--num-shards=2", "--examples-per-shard=2"),
    some_of("--shuffle-seed=-3", "--id-column=participant_id"),
    some_of("--compression=none", "--compression-level=0"),
    some_of("--orientation=LPS", "--spacing=1.5,2,2", "--shape=8,6,5", "--orientation=SRA --shape=5,6,7"),
    st.just([f"--preprocess={STEP}", "--preprocess=tests.user_functions:scale(by=(0.5,))"]) | some_of(),
    some_of("--anonymous-ids=key --mask-column=mask"),
)


@pytest.mark.slow
@settings(max_examples=6)
@given(groups=RANDOM)
def test_a_build_like_another_writes_the_same_bytes(study: Path, groups: tuple[list[str], ...]) -> None:
    flags = list(dict.fromkeys(flag for group in groups for flag in group))
    again = [flag for flag in flags if flag.startswith(("--preprocess", "--anonymous"))]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(study):
        one, other = Path(folder, "one"), Path(folder, "other")
        command = ["build", "manifest.tsv", "--workers=1", "--quiet"]
        assume(cli.main([*command, str(one), *flags]) == 0)
        assert cli.main([*command, str(other), f"--like={one}", *again]) == 0
        assert contents(other) == contents(one)
        assert info_of(other).config == info_of(one).config
        # Which is what a build goes on with.
        assert cli.main([*command, str(one), f"--like={one}", *again]) == 0
        assert info_of(one).config == info_of(other).config


def test_a_dry_run_and_a_check_take_options_from_elsewhere(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_toml(tmp_path / "o.toml", "orientation = 'LPS'")
    manifest, like = str(study / "manifest.tsv"), f"--like={study / 'rescaled'}"
    flags = [like, f"--config={config}", "--shape=7,6,5"]
    assert cli.main(["build", manifest, str(tmp_path / "out"), *flags, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "volumes  6 of 7×6×5 voxels (train 6)\nshards   2 of up to 3 examples" in planned
    assert cli.main(["check", manifest, *flags, "--quiet"]) == 0
    assert "7×6×5" in capsys.readouterr().out
    assert cli.main(["build", manifest, str(study / "rescaled"), like, "--dry-run"]) == 0
    assert "keep     6 examples from the dataset" in capsys.readouterr().out
