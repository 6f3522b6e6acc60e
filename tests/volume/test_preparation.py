"""Preparation from the command line to the dataset, and the user's own function."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apache_beam as beam
import nibabel as nib
import numpy as np
import pytest

from beam_nifti.cli import main as cli
from beam_nifti.cli import parser as options
from beam_nifti.config import BuildConfig, RecordConfig
from beam_nifti.errors import UsageError, VolumeError
from beam_nifti.pipeline.build import plan_build
from beam_nifti.pipeline.options import read_steps
from beam_nifti.record.index import read_index
from beam_nifti.transforms import BuildDataset, PreprocessFn
from beam_nifti.volume.user_function import _find, load_function, source_sha256
from beam_nifti.volume.volume import load_header, load_volume
from tests import build_helpers
from tests.build_helpers import CUTTING_RUNNER, assert_complete, build, steps_of
from tests.datasets import info_of
from tests.images import AFFINE, brain, nifti_header, row_of, write_cohort, write_image, write_manifest

Run = Callable[..., str]
MakeModule = Callable[[str], str]
_numbers = itertools.count()


@pytest.fixture
def make_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeModule:
    """Write an importable module; its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(source: str) -> str:
        name = f"lab_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        return name

    return make


def index_of(output: Path) -> list[dict[str, Any]]:
    tables = [read_index(str(output / shard.index))[0] for shard in info_of(output).shards]
    return [row for table in tables for row in table.to_pylist()]


def as_in_another_process() -> None:
    """Forget the modules that were imported for their functions."""
    _find.cache_clear()
    for name in [name for name in sys.modules if name.startswith("lab_")]:
        del sys.modules[name]


def build_config(*flags: str) -> BuildConfig:
    known, _ = options.parse(["build", "m.tsv", "out", *flags])
    return build_helpers.build_config(known)


# Options

GIVEN: dict[str, Any] = {
    "preprocess": "lab.brains:strip",
    "orientation": "LPS",
    "spacing": (1.0, 1.0, 1.5),
    "crop_foreground": "above:-5.5",
    "shape": (16, 18, 20),
}
FLAGS = [
    "--preprocess=lab.brains:strip",
    "--orientation=LPS",
    "--spacing=1,1,1.5",
    "--crop-foreground=above:-5.5",
    "--shape=16,18,20",
]


def test_the_flags_become_the_configuration() -> None:
    assert build_config(*FLAGS).record == RecordConfig(**GIVEN)
    for flag, (name, value) in zip(FLAGS, GIVEN.items(), strict=True):
        record = build_config(flag).record
        assert (record, record.prepares) == (RecordConfig(**{name: value}), True)
    assert build_config("--orientation=native").record == RecordConfig()
    assert not RecordConfig().prepares


def test_every_preparation_has_its_own_fingerprint() -> None:
    configs = [RecordConfig(), RecordConfig(**GIVEN)]
    configs += [RecordConfig(**{name: value}) for name, value in GIVEN.items()]
    others = {"orientation": "RAS", "spacing": (1, 1, 1), "crop_foreground": "nonzero", "shape": (16, 20, 18)}
    configs += [RecordConfig(**{name: value}) for name, value in others.items()]
    configs += [RecordConfig(preprocess="lab.brains:strip", preprocess_sha256=digit * 64) for digit in "ab"]
    assert len({c.fingerprint for c in configs}) == len(configs)


def test_the_configuration_comes_back_from_json() -> None:
    config = BuildConfig("m.tsv", "out", record=RecordConfig(**GIVEN))
    facts = json.loads(json.dumps(config.as_dataset_config()))
    assert facts == config.as_dataset_config()
    known = {f.name for f in dataclasses.fields(RecordConfig)}
    again = RecordConfig(**{name: value for name, value in facts.items() if name in known})
    assert (again, again.fingerprint) == (config.record, config.record.fingerprint)
    assert RecordConfig(spacing=(1, 1, 2)).fingerprint == RecordConfig(spacing=(1.0, 1.0, 2.0)).fingerprint


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--preprocess=strip", "--preprocess is 'strip'; write it as package.module:function"),
        ("--preprocess=lab:a.b", "--preprocess is 'lab:a.b'; write it"),
        ("--preprocess=lab/brains.py:strip", "write it as package.module:function"),
        ("--orientation=RAX", "--orientation is 'RAX'; write native, or three letters"),
        ("--orientation=RLS", "--orientation is 'RLS'"),
        ("--orientation=ras", "--orientation is 'ras'"),
        ("--spacing=1", "--spacing is '1'; give three sizes in mm, such as 1,1,1.5"),
        ("--spacing=1,1,x", "--spacing is '1,1,x'"),
        ("--spacing=1,1,0", "--spacing is 1,1,0; give three sizes in mm"),
        ("--spacing=1,1,inf", "--spacing is 1,1,inf"),
        ("--spacing=1,nan,1", "--spacing is '1,nan,1'"),
        ("--shape=16,16", "--shape is '16,16'; give three whole numbers of voxels, x,y,z without channels"),
        ("--shape=16,16,16,1", "--shape is '16,16,16,1'; give three whole numbers of voxels, x,y,z without"),
        ("--shape=16.5,16,16", "--shape is '16.5,16,16'; give three whole numbers"),
        ("--shape=16,16,1.5", "--shape is '16,16,1.5'"),
        ("--shape=16,16,0", "--shape is 16,16,0; give three numbers of voxels"),
        ("--crop-foreground=yes", "--crop-foreground is 'yes'; choose one of: nonzero, above:T"),
        ("--crop-foreground=above", "--crop-foreground is 'above'"),
        ("--crop-foreground=above:nan", "--crop-foreground is 'above:nan'"),
        ("--crop-foreground=below:3", "--crop-foreground is 'below:3'"),
    ],
)
def test_what_cannot_be_done_is_refused(flag: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^.*{message}"):
        build_config(flag)


@pytest.mark.parametrize("name", ["preprocess", "spacing"])
def test_native_voxels_are_the_files(name: str) -> None:
    with pytest.raises(UsageError, match=f"^--{name} changes the voxels, .*use --voxel-dtype float32"):
        RecordConfig(voxel_dtype="native", **{name: GIVEN[name]})
    kept = {k: v for k, v in GIVEN.items() if k not in ("preprocess", "spacing")}
    assert RecordConfig(voxel_dtype="native", **kept).prepares


# What the header tells


def test_shapes_are_compared_as_they_will_be(tmp_path: Path) -> None:
    swapped = AFFINE[:, [2, 0, 1, 3]]  # the first index grows towards S
    one = write_image(tmp_path / "a.nii", brain((6, 5, 4)))
    other = write_image(tmp_path / "b.nii", brain((4, 6, 5)), affine=swapped)
    record = RecordConfig(orientation="RAS")
    for path in (one, other):
        assert load_volume(row_of(path), shape=(6, 5, 4), record=record).voxels.size == 120
    with pytest.raises(VolumeError, match=r"b\.nii: shape \(4, 6, 5\), but .*crop and pad all .* --shape"):
        load_volume(row_of(other), shape=(6, 5, 4))
    with pytest.raises(VolumeError, match=r"b\.nii: shape \(6, 5, 4\), but the first image has \(4, 6, 5\)"):
        load_volume(row_of(other), shape=(4, 6, 5), record=record)


def test_the_limit_of_a_record_is_that_of_what_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "large.nii"
    large = np.broadcast_to(np.int16(0), (1000, 1000, 1000))
    path.write_bytes(nifti_header(large, affine=np.eye(4)))
    os.truncate(path, 352 + large.nbytes)
    for fits in (
        {"spacing": (2, 1, 1)},
        {"shape": (500, 500, 500)},
        {"crop_foreground": "nonzero"},  # the header cannot tell
    ):
        load_header(row_of(path), record=RecordConfig(**fits))  # type: ignore[arg-type]
    for large_ones in ({"spacing": (1, 1, 1.5)}, {"orientation": "LPS"}, {"shape": (900, 900, 900)}):
        with pytest.raises(VolumeError, match=r"more than a record can hold .* with --shape or --spacing$"):
            load_header(row_of(path), record=RecordConfig(**large_ones))  # type: ignore[arg-type]


# The user's function


def test_a_function_is_told_apart_by_the_file_that_defines_it(
    make_module: MakeModule, tmp_path: Path
) -> None:
    inner = make_module("def f(volume): return volume\n")
    outer = make_module(
        f"""
        import functools
        from {inner} import f

        @functools.wraps(f)
        def wrapped(volume): return f(volume)

        class Step:
            def __call__(self, volume): return volume

        step = Step()
        """
    )
    digests = [source_sha256(name) for name in (f"{inner}:f", f"{outer}:f", f"{outer}:wrapped")]
    assert len(set(digests)) == 1
    assert source_sha256(f"{outer}:step") not in digests
    assert load_function(f"{inner}:f", digests[0])(1) == 1
    with (tmp_path / f"{inner}.py").open("a") as file:
        file.write("# another version\n")
    assert source_sha256(f"{inner}:f") == digests[0]  # of what was imported
    as_in_another_process()
    assert source_sha256(f"{inner}:f") != digests[0]
    with pytest.raises(UsageError, match=rf"^--preprocess {outer}:f: the file that defines it differs"):
        load_function(f"{outer}:f", digests[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at_all:f", "cannot be imported: ModuleNotFoundError: .*put its folder on PYTHONPATH"),
        ("json:no_such", "json has no function 'no_such'; correct the name"),
        ("json:dump_", "json has no function 'dump_'; did you mean dump?"),
        ("json:__doc__", "is of type str; give a function"),
        ("sys:exit", "sys has no file; define the function in a module"),
    ],
)
def test_a_function_that_is_none_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^--preprocess {name}: {message}"):
        source_sha256(name)


def test_a_module_may_fail_in_any_way(make_module: MakeModule) -> None:
    name = make_module("1 / 0")
    with pytest.raises(UsageError, match="cannot be imported: ZeroDivisionError: division by zero; install"):
        load_function(f"{name}:f")


def test_a_worker_without_the_function_stops_the_build() -> None:
    with pytest.raises(UsageError, match="on the workers"):
        PreprocessFn(RecordConfig(preprocess="nowhere:f")).setup()


# Datasets


def write_odd_cohort(folder: Path) -> Path:
    """Images of different shapes, voxel sizes and orientations; the third has no foreground."""
    shapes, axes = (
        [(8, 10, 9), (10, 9, 8), (6, 6, 6), (4, 5, 12)],
        [(0, 1, 2), (1, 2, 0), (0, 1, 2), (2, 1, 0)],
    )
    rows = []
    for number, (shape, order) in enumerate(zip(shapes, axes, strict=True)):
        affine = AFFINE.copy()
        affine[:3, :3] = AFFINE[:3, order] * (1 + number / 4)
        voxels = np.zeros(shape, np.int16) if number == 2 else brain(shape, seed=number)
        write_image(folder / f"{number}.nii.gz", voxels, affine=affine, slope=0.5)
        rows.append({"path": f"{number}.nii.gz", "label": number})
    return write_manifest(folder / "m.tsv", rows)


@pytest.mark.parametrize(
    "flags",
    [
        ["--orientation=RAS", "--spacing=1.5,2,2", "--crop-foreground=above:0", "--shape=8,9,10"],
        ["--orientation=PIR", "--crop-foreground=nonzero", "--shape=8,9,10", "--voxel-dtype=native"],
    ],
)
def test_odd_images_become_volumes_of_one_shape(run: Run, tmp_path: Path, flags: list[str]) -> None:
    manifest, output = write_odd_cohort(tmp_path / "c"), tmp_path / "out"
    assert "4 of 8×9×10 voxels" in run("build", manifest, output, "--dry-run", *flags)
    assert "failed   1 volume" in run("build", manifest, output, "--max-bad-fraction=0.25", *flags)
    assert info_of(output).shape == (8, 9, 10)
    (failure,) = map(json.loads, (output / "failures.jsonl").read_text().splitlines())
    assert (failure["row"], failure["stage"], failure["error"]) == (3, "Preprocess", "VolumeError")
    assert failure["message"].startswith("2.nii.gz: no voxel is ")
    code = flags[0].removeprefix("--orientation=")
    for cells in index_of(output):
        affine = np.reshape(cells["affine"], (4, 4))
        assert nib.aff2axcodes(affine) == tuple(code)
        assert np.allclose(cells["zooms"], nib.affines.voxel_sizes(affine))
        assert (cells["shape"], cells["dtype"]) == ([8, 9, 10], "int16")
    assert "3 rebuilt" in run("verify", output, "--deep=all", "--manifest", manifest)
    prepared = next(li for li in run("inspect", output).splitlines() if li.startswith("prepared with"))
    assert prepared.removeprefix("prepared with").strip() == ", ".join(
        flag.removeprefix("--").replace("=", " ") for flag in flags if "dtype" not in flag
    )
    # The second run finds everything done but for the volume that failed; another one is refused.
    assert "kept     3 examples" in run("build", manifest, output, "--max-bad-fraction=0.25", *flags)
    told = run("build", manifest, output, *[f.replace("8,9,10", "8,9,9") for f in flags], code=cli.USAGE)
    assert "--shape was 8,9,10, now 8,9,9" in told


def test_a_shape_that_the_header_does_not_tell_is_that_of_the_first_image(run: Run, tmp_path: Path) -> None:
    for number, width in enumerate((3, 3, 2)):
        voxels = np.zeros((6, 5, 4), np.int16)
        voxels[number : number + width, :2, :2] = np.arange(4).reshape(2, 2) + 1
        write_image(tmp_path / f"{number}.nii", voxels)
    manifest = write_manifest(tmp_path / "m.tsv", [{"path": f"{number}.nii"} for number in range(3)])
    arguments = ("build", manifest, tmp_path / "out", "--crop-foreground=nonzero", "--max-bad-fraction=0.5")
    assert "3 of 3×2×2 voxels" in run(*arguments, "--dry-run")
    run(*arguments)
    assert info_of(tmp_path / "out").shape == (3, 2, 2)
    (failure,) = map(json.loads, (tmp_path / "out/failures.jsonl").read_text().splitlines())
    assert failure["stage"] == "Preprocess"
    assert failure["message"].startswith("2.nii: shape (2, 2, 2), but the first image has (3, 2, 2)")


def test_a_function_of_the_users(run: Run, tmp_path: Path, make_module: MakeModule) -> None:
    module = make_module(
        """
        import dataclasses, numpy

        def halves(volume):
            if volume.row.label == 2:
                raise KeyError("no mask")
            voxels = numpy.stack([volume.voxels, volume.voxels // 2], axis=-1)
            return dataclasses.replace(volume, voxels=voxels)
        """
    )
    for number in range(3):
        write_image(tmp_path / f"{number}.nii.gz", brain(seed=number))
    manifest = write_manifest(tmp_path / "m.tsv", [{"path": f"{n}.nii.gz", "label": n} for n in range(3)])
    output, flag = tmp_path / "out", f"--preprocess={module}:halves"
    run("build", manifest, output, flag, "--rescale=none", "--max-bad-fraction=0.5")
    assert info_of(output).shape == (6, 5, 4, 2)
    assert info_of(output).config["preprocess_sha256"] == source_sha256(f"{module}:halves")
    (failure,) = map(json.loads, (output / "failures.jsonl").read_text().splitlines())
    assert (failure["row"], failure["stage"]) == (3, "Preprocess")
    assert failure["message"].startswith(
        f"2.nii.gz: --preprocess {module}:halves failed: KeyError: 'no mask'; repair it"
    )
    deep = ("verify", output, "--deep=all", "--manifest", manifest)
    assert "2 rebuilt" in run(*deep, flag)
    assert f"prepared with preprocess {module}:halves" in run("inspect", output)
    with (tmp_path / f"{module}.py").open("a") as file:
        file.write("# another version\n")
    as_in_another_process()
    told = run("build", manifest, output, flag, "--rescale=none", code=cli.USAGE)
    assert "sha256 of the file of --preprocess was " in told
    assert "the file that defines it differs" in run(*deep, flag, code=cli.USAGE)
    run("verify", output)


def test_functions_are_called_in_order_with_their_arguments(
    run: Run, cohort: Path, tmp_path: Path, make_module: MakeModule
) -> None:
    module = make_module(
        """
        import dataclasses

        def add(volume, number):
            return dataclasses.replace(volume, voxels=(volume.voxels + number).astype("float32"))

        def times(volume, factors):
            while factors:  # which the next volume finds as they were
                volume = dataclasses.replace(volume, voxels=(volume.voxels * factors.pop()).astype("float32"))
            return volume
        """
    )
    steps = [f"--preprocess={module}:add(number=3)", f"--preprocess={module}:times(factors=[4, 0.5])"]
    output = tmp_path / "out"
    run("build", cohort, output, *steps, "--rescale=none")
    config = info_of(output).config
    assert config["preprocess"] == [step.removeprefix("--preprocess=") for step in steps]
    assert config["preprocess_sha256"] == [source_sha256(config["preprocess"][1])] * 2
    for cells in index_of(output):
        voxels = np.asanyarray(nib.load(cohort.parent / cells["source"]).dataobj)
        assert (cells["min"], cells["max"]) == ((voxels.min() + 3) * 2, (voxels.max() + 3) * 2)
    assert f"prepared with preprocess {module}:add(number=3),{module}:times" in run("inspect", output)
    deep = ("verify", output, "--deep=all", "--manifest", cohort)
    assert "rebuilt" in run(*deep, *steps)
    told = run(*deep, *steps[::-1], code=cli.USAGE)
    quoted = [f"--preprocess '{step}'" for step in config["preprocess"]]
    assert told.strip().endswith(f"to import and run that function here, give {' '.join(quoted)}")
    run("build", cohort, output, *steps, "--rescale=none")
    told = run("build", cohort, output, steps[0], "--rescale=none", code=cli.USAGE)
    assert f"--preprocess was {','.join(config['preprocess'])}, now {module}:add(number=3)" in told


def test_steps_and_their_arguments_have_fingerprints_of_their_own() -> None:
    assert read_steps("a:f") == read_steps(["a:f"]) == read_steps("a:f()") == "a:f"
    assert RecordConfig(preprocess=["a:f"]) == RecordConfig(preprocess="a:f")
    assert RecordConfig(preprocess=()) == RecordConfig()
    assert read_steps("a:f( y='1',x = 2 )") == "a:f(x=2, y='1')"
    given = ["a:f", "a:f(x=1)", "a:f(x=1.0)", "a:f(x=True)", "a:f(x='1')", ["a:f", "a:g"], ["a:g", "a:f"]]
    configs = [RecordConfig(preprocess=steps) for steps in given]
    configs += [RecordConfig(preprocess=["a:f", "a:g"], preprocess_sha256=list(d)) for d in ("ab", "ba")]
    assert len({config.fingerprint for config in configs}) == len(configs)
    with pytest.raises(UsageError, match="--preprocess has 2 functions, but 1 digests"):
        RecordConfig(preprocess=["a:f", "a:g"], preprocess_sha256="a")


def test_an_argument_that_a_function_does_not_have(make_module: MakeModule) -> None:
    module = make_module("def f(volume, x): return volume\n")
    with pytest.raises(UsageError, match=r"f\(y=1\): missing a required argument: 'x'; give arguments that"):
        source_sha256(f"{module}:f(y=1)")
    with pytest.raises(UsageError, match=r"f: missing a required argument: 'x'; give arguments that"):
        source_sha256(f"{module}:f")


def test_a_function_that_cannot_be_imported_leaves_no_trace(run: Run, cohort: Path, tmp_path: Path) -> None:
    told = run("build", cohort, tmp_path / "out", "--preprocess=nowhere:f", code=cli.USAGE)
    assert "--preprocess nowhere:f: cannot be imported: ModuleNotFoundError" in told
    assert not (tmp_path / "out").exists()


def test_a_function_that_fails_for_the_first_images_is_told_at_once(
    run: Run, cohort: Path, tmp_path: Path, make_module: MakeModule
) -> None:
    module = make_module("def f(volume): return None\n")
    told = run("build", cohort, tmp_path / "out", f"--preprocess={module}:f", code=cli.USAGE)
    assert f"{cohort}: none of the first images can be used with these options\n" in told
    assert (
        f"row 1 (sub-0000): sub-0000.nii.gz: --preprocess {module}:f returned an object of type NoneType"
        in told
    )
    assert "relative paths" not in told
    assert not (tmp_path / "out").exists()


def test_paths_of_which_none_is_there_are_told_at_once(run: Run, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.tsv", [{"path": "a.nii", "label": 1}])
    told = run("build", manifest, tmp_path / "out", code=cli.USAGE)
    assert "a.nii: cannot be read: No such file or directory; check the path and its permissions" in told
    assert "relative paths are relative to the manifest's folder" in told


def test_the_step_is_there_only_where_it_is_asked_for(cohort: Path, tmp_path: Path) -> None:
    for record, count in ((RecordConfig(), 0), (RecordConfig(orientation="RAS"), 1)):
        plan, _ = plan_build(BuildConfig(str(cohort), str(tmp_path / "out"), record=record))
        pipeline = beam.Pipeline()
        pipeline | BuildDataset(plan)
        assert sum("Preprocess" in step for step in steps_of(pipeline)) == count


def test_a_runner_may_cut_before_and_after_the_step(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "c", 4)
    changes = {"orientation": "LPI", "spacing": (3, 3, 3), "crop_foreground": "above:0", "shape": (6, 6, 6)}
    build(manifest, tmp_path / "whole", **changes)
    build(manifest, tmp_path / "cut", runner=CUTTING_RUNNER, **changes)
    assert_complete(tmp_path / "cut", tmp_path / "whole")
