"""Statistics of a cohort, by the command and for a build: the same on every runner, and kept by builds."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import apache_beam as beam
import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import beam_nifti as bn
from beam_nifti.config import BuildConfig, CohortStatistics
from beam_nifti.errors import OutputError, TooManyFailures, UsageError, VolumeError
from beam_nifti.manifest.in_memory import NAME, parquet_of
from beam_nifti.pipeline.analyze import MeasureCohort, run_analysis
from beam_nifti.pipeline.build import open_build, plan_cohort, run_build
from beam_nifti.pipeline.cohort import AnalysisPlan
from beam_nifti.pipeline.configure import make_analysis_config
from beam_nifti.pipeline.launch import run_analysis_on, run_build_on
from beam_nifti.pipeline.runners import Engine
from beam_nifti.pipeline.statistics_file import Analysis, parse_statistics
from beam_nifti.pipeline.watcher import Watcher
from beam_nifti.record.dataset_info import read_info
from tests.build_helpers import (
    CUTTING_RUNNER,
    LOCAL_RUNNER,
    assert_complete,
    build_apart,
    contents,
    make_config,
    make_options,
    stray_files,
)
from tests.datasets import edit_info, index_rows, info_of, records_of
from tests.images import (
    AFFINE,
    Array,
    brain,
    name_of,
    random_voxels,
    write_cohort,
    write_image,
    write_manifest,
)

SPLITS = ("train", "train", "test")
COUNT = 9
ZSCORE = {"rescale": "cohort:zscore"}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several dtypes and scalings."""
    folder = tmp_path_factory.mktemp("cohort")
    manifest = write_cohort(folder, COUNT, split=SPLITS)
    write_image(folder / name_of(1), brain(seed=1).astype(np.float32) / 7)
    write_image(folder / name_of(3), brain(seed=3), slope=0.3, inter=-2.0)
    return manifest


def values_of(manifest: Path, splits: tuple[str, ...] = ("train",)) -> list[Array]:
    """The values of the images of some splits, as float64."""
    numbers = [n for n in range(COUNT) if SPLITS[n % 3] in splits]
    images: list[Any] = [nib.load(manifest.parent / name_of(n)) for n in numbers]
    return [np.asarray(image.dataobj, np.float64) for image in images]


def measure_in(path: Path, manifest: Path, options: dict[str, Any], **engine: Any) -> Analysis:
    """Run an analysis in this process."""
    config = make_analysis_config(str(manifest), options)
    return run_analysis(plan_cohort(config, None, str(path)), make_options(**engine))


def measured_by(calls: list[AnalysisPlan], **engine: Any) -> Callable[[AnalysisPlan], Analysis]:
    """What measures the cohort for a build, and notes it."""

    def measure(plan: AnalysisPlan) -> Analysis:
        calls.append(plan)
        return run_analysis(plan, make_options(**engine))

    return measure


def build(manifest: Path, output: Path, workers: int = 1, runner: str = LOCAL_RUNNER, **changes: Any) -> int:
    """Build a dataset; how many volumes were measured for it."""
    calls = list[AnalysisPlan]()
    measure = measured_by(calls, workers=workers, runner=runner)
    with open_build(make_config(manifest, output, **{**ZSCORE, **changes}), measure=measure) as plan:
        run_build(plan, make_options(workers, runner=runner))
    return sum(plan.num_volumes for plan in calls)


def statistics_of(output: Path) -> CohortStatistics:
    found = info_of(output).record_config.rescale_stats
    assert found is not None
    return found


# What is measured


def test_it_measures_the_training_images(manifest: Path, tmp_path: Path) -> None:
    found = measure_in(tmp_path / "m.json", manifest, {}).statistics
    values = np.concatenate([each.ravel() for each in values_of(manifest)])
    exact = list(map(Fraction, values.tolist()))
    mean = sum(exact) / len(exact)
    (channel,) = found.channels
    assert (found.splits, found.num_volumes, channel.num_voxels) == (("train",), 6, values.size)
    assert (channel.min, channel.max) == (values.min(), values.max())
    assert channel.mean == pytest.approx(float(mean), rel=1e-14)
    variance = sum((value - mean) ** 2 for value in exact) / len(exact)
    assert channel.std == pytest.approx(math.sqrt(variance), rel=1e-14)
    for p, value in channel.percentiles:
        assert value == pytest.approx(np.percentile(values, p), rel=channel.percentile_error)
    assert (found.shape, found.spacing) == ((6, 5, 4), (2, 2, 2.5))


def test_percentiles_of_integers_are_those_of_numpy(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "c", 4)
    found = measure_in(tmp_path / "m.json", manifest, {"rescale_within": "nonzero"}).statistics
    values = np.stack([np.asarray(nib.load(manifest.parent / name_of(n)).dataobj) for n in range(4)])  # type: ignore[attr-defined]
    (channel,) = found.channels
    wanted = np.percentile(values[values != 0], [p for p, _ in channel.percentiles])
    assert [value for _, value in channel.percentiles] == wanted.tolist()
    assert channel.percentile_error == 0


@pytest.mark.parametrize(
    "engine",
    [
        {"workers": 4},
        {"runner": CUTTING_RUNNER, "workers": 4},
    ],
)
def test_the_numbers_depend_on_no_runner(manifest: Path, tmp_path: Path, engine: dict[str, Any]) -> None:
    options = {"rescale_within": "above:3", "spacing": (1.5, 1.5, 1.5), "rescale_split": "train,test"}
    one = measure_in(tmp_path / "one.json", manifest, options)
    other = measure_in(tmp_path / "other.json", manifest, options, **engine)
    assert one.to_json() == other.to_json()
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "other.json").read_bytes()


def test_collections_are_joined_only_where_they_have_one_coder(manifest: Path, tmp_path: Path) -> None:
    """Flink refuses others."""
    config = make_analysis_config(str(manifest), {"spacing": 2})
    pipeline = beam.Pipeline()
    pipeline | MeasureCohort(plan_cohort(config, None, str(tmp_path / "m.json")))
    graph = pipeline.to_runner_api().components
    joined = [t for t in graph.transforms.values() if t.spec.urn == "beam:transform:flatten:v1"]
    assert joined
    for transform in joined:
        assert len({graph.pcollections[name].coder_id for name in transform.inputs.values()}) == 1


@pytest.mark.parametrize("is_table", [False, True])
def test_workers_elsewhere_write_where_the_launcher_reads(
    manifest: Path, tmp_path: Path, is_table: bool
) -> None:
    config = make_analysis_config(str(manifest), {})
    rows = None
    if is_table:
        table = pd.read_csv(manifest, sep="\t", dtype=str)
        table["path"] = [str(manifest.parent / path) for path in table["path"]]
        rows, config = parquet_of(table, hides_cells=False), replace(config, manifest=NAME, rows="")
    engine = Engine(make_options(), config, is_local=False)
    out = tmp_path / "s.json"
    found = run_analysis_on(engine, rows, str(out), Watcher(has_progress=False))
    assert found.statistics == measure_in(tmp_path / "m.json", manifest, {}).statistics
    assert {path.name for path in tmp_path.iterdir()} == {"s.json", "m.json"}
    with pytest.raises(UsageError, match="measures the volumes first; run `beam-nifti analyze`"):
        run_build_on(
            Engine(
                make_options(), make_config(manifest, tmp_path / "out", **ZSCORE), False, is_template=True
            ),
            None,
            Watcher(has_progress=False),
        )


def test_a_cohort_on_an_object_store(
    manifest: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.object_store import MemoryFileSystem

    images = {f"memory://lab/c/{path.name}": (path.read_bytes(), 0.0) for path in manifest.parent.iterdir()}
    monkeypatch.setattr(MemoryFileSystem, "objects", dict(images))
    source, output, file = "memory://lab/c/manifest.tsv", "memory://lab/out", "memory://lab/s.json"
    engine = Engine(make_options(), make_analysis_config(source, {}), is_local=False)
    assert run_analysis_on(engine, None, file, Watcher(has_progress=False)).statistics == statistics_of(built)
    assert MemoryFileSystem.objects.keys() - images == {file}
    with open_build(make_config(source, output, **ZSCORE), measure=measured_by([])) as plan:
        run_build(plan, make_options())
    assert read_info(output).record_config.rescale_stats == statistics_of(built)
    assert not [name for name in MemoryFileSystem.objects if ".build" in name]


def test_the_measured_splits_are_those_that_are_named(manifest: Path, tmp_path: Path) -> None:
    found = measure_in(tmp_path / "m.json", manifest, {"rescale_split": ["test"]}).statistics
    assert (found.splits, found.num_volumes) == (("test",), 3)
    both = measure_in(tmp_path / "m.json", manifest, {"rescale_split": "train,test"}).statistics
    assert (both.splits, both.num_volumes) == (("test", "train"), 9)
    with pytest.raises(UsageError, match="--rescale-split is valid, but the splits are test, train; name"):
        measure_in(tmp_path / "m.json", manifest, {"rescale_split": "valid"})


def test_a_cohort_without_a_split_of_training_must_name_one(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "c", 2, split=("a", "b"))
    with pytest.raises(UsageError, match="cohort:zscore measures train, but the splits are a, b; name"):
        measure_in(tmp_path / "m.json", manifest, {})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several kinds in columns, with masks, labels, sites, and participants."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = []
    for n in range(6):
        write_image(folder / f"{n}_a.nii", brain((6, 5, 4), n))
        write_image(folder / f"{n}_b.nii", random_voxels((6, 5, 4), "float32", n))
        write_image(folder / f"{n}_m.nii", (brain((6, 5, 4), n) % 3).astype(np.uint8))
        write_image(folder / f"{n}_t.nii", brain((6, 5, 4, 3 - n % 2), n))
        write_image(folder / f"{n}_f.nii", brain((6, 5, 4, 3), n))
        write_image(folder / f"{n}_c.nii", random_voxels((6, 5, 4), "complex64", n))
        write_image(folder / f"{n}_s.nii", brain((6 + n % 2, 5, 4), n))
        write_image(folder / f"{n}_o.nii", brain((6, 5, 4), n), affine=AFFINE @ np.diag([0.75, 1, 1, 1]))
        holes = random_voxels((6, 5, 4), "float32", n)
        holes[0] = np.nan
        write_image(folder / f"{n}_n.nii", holes)
        cells = {name: f"{n}_{name}.nii" for name in "abmtfcson"} | {"l": f"{n}_m.nii" if n else ""}
        age: Any = "" if n == 2 else n
        rows.append(cells | {"path": f"{n}_a.nii", "participant_id": f"s{n}", "site": n % 2, "age": age})
    return write_manifest(folder / "m.tsv", rows)


_MEASURED = dict[str, CohortStatistics]()


def measured_once(path: Path, manifest: Path, options: dict[str, Any]) -> CohortStatistics:
    """The statistics of `mixed`, which several tests compare with others."""
    key = repr(options)
    if key not in _MEASURED:
        _MEASURED[key] = measure_in(path, manifest, options).statistics
    return _MEASURED[key]


SPLIT = {"split": {"train": 0.5, "test": 0.5}}
AGE = {"label_column": "age"}


@pytest.mark.parametrize(
    ("before", "change"),
    [
        ({}, {"path_column": "b"}),
        ({}, {"path_column": "a,b"}),
        ({}, {"mask_column": "m"}),
        ({"mask_column": "m"}, {"rescale_within": "mask"}),
        ({}, {"rescale_within": "nonzero"}),
        ({}, {"rescale": "cohort:percentile:3,97"}),
        ({}, SPLIT),
        (SPLIT, {"split_seed": 3}),
        (SPLIT, {"stratify": "site"}),
        (SPLIT, {"rescale_split": "test"}),
        ({"path_column": "t", "frames": "first"}, {"frames": "each", "max_frames": 3}),
        ({"path_column": "c", "complex": "phase"}, {"complex": "magnitude"}),
        ({}, {"preprocess": "tests.user_functions:change_all_in_place"}),
        ({}, {"orientation": "SPL"}),
        ({}, {"spacing": 3}),
        ({}, {"resize": (5, 5, 5)}),
        ({}, {"resize_longest": 5}),
        ({}, {"reference": "0_o.nii"}),
        ({"spacing": 3}, {"interpolation": "cubic"}),
        ({"spacing": 3}, {"antialias": True}),
        ({"spacing": (3, 3, 12), "orientation": "RAS"}, {"separate_z": "auto"}),
        ({"mask_column": "m", "spacing": 3}, {"mask_interpolation": "linear"}),
        ({"path_column": "n", "nonfinite": "zero"}, {"nonfinite": "value:9"}),
        ({"mask_column": "m"}, {"map_labels": "2=1"}),
        ({"mask_column": "l", "missing_mask": "empty"}, {"missing_mask": "skip"}),
        ({"path_column": "t", "frames": "each", "max_bad_fraction": 0.9}, {"max_frames": 3}),
        ({}, {"path_column": "a,o", "align": "first"}),
        ({}, {"crop_foreground": "above:900"}),
        ({}, {"shape": (4, 4, 4)}),
        ({"path_column": "s", "max_bad_fraction": 0.5}, {"allow_mixed_shapes": True}),
        ({**AGE, "missing_label": "nan"}, {"missing_label": "skip"}),
        ({"max_bad_fraction": 0.5}, {"target_column": "l"}),
    ],
)
def test_an_option_changes_what_is_measured(
    mixed: Path, tmp_path: Path, before: dict[str, Any], change: dict[str, Any]
) -> None:
    if "reference" in change:
        change = {"reference": mixed.parent / change["reference"]}
    one = measured_once(tmp_path / "m.json", mixed, before)
    other = measure_in(tmp_path / "m.json", mixed, before | change).statistics
    assert one != other
    assert replace(one, options=()) != replace(other, options=())


def test_failures_name_examples_as_the_options_say(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "c", 6)
    for number in (1, 3):
        write_image(manifest.parent / name_of(number), brain((7, 5, 4)))
    options: dict[str, Any] = {"max_bad_fraction": 0.5}
    named = measure_in(tmp_path / "m.json", manifest, options)
    assert [failure.example_id for failure in named.failures] == ["sub-0001", "sub-0003"]
    assert named.failures[0].path == str(manifest.parent / name_of(1))
    assert named.statistics.num_failed == 2
    by_path = measure_in(tmp_path / "m.json", manifest, {**options, "id_column": "path"})
    assert by_path.failures[0].example_id == name_of(1)
    (tmp_path / "key").write_bytes(bytes(range(32)))
    hidden = measure_in(tmp_path / "m.json", manifest, {**options, "anonymous_ids": str(tmp_path / "key")})
    assert "sub-" not in hidden.to_json()
    assert hidden.statistics == named.statistics


def test_unusual_volumes_are_named(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "c", 20)
    write_image(manifest.parent / name_of(4), 9 * brain(seed=4))
    options = {"rescale_within": "nonzero"}
    found = measure_in(tmp_path / "m.json", manifest, options)
    mean = float(brain(seed=4)[1:].mean())
    assert [(v.row, v.example_id, v.channel) for v in found.unusual] == [(5, "sub-0004", "")]
    assert found.unusual[0].mean == pytest.approx(9 * mean, rel=1e-12)
    assert f"unusual       row 5 (sub-0004): mean {9 * mean:.6g}" in str(found)
    assert parse_statistics(found.to_json()).unusual == found.unusual
    fewer = write_cohort(tmp_path / "c", 19)
    write_image(manifest.parent / name_of(4), 9 * brain(seed=4))
    assert measure_in(tmp_path / "m.json", fewer, options).unusual == ()


def test_too_many_failures_end_it_and_their_number_is_told(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(TooManyFailures, match=r"3 of 6 volumes failed.*\n.*row 2 \(s1\): 1_s") as error:
        measure_in(tmp_path / "m.json", mixed, {"path_column": "s", "max_bad_fraction": 0.4})
    assert [failure.row for failure in error.value.failures] == [2, 4, 6]
    assert "--max-bad-fraction 0.5 accepts them" in str(error.value)
    assert error.value.summary.failures == {"LoadVolume": {"VolumeError": 3}}


def test_a_cohort_of_which_nothing_is_selected_has_no_statistics(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"m\.tsv: no voxel is above 1000000 in any volume"):
        measure_in(tmp_path / "m.json", mixed, {"rescale_within": "above:1e6"})


# The command


def test_the_command_prints_and_writes_the_same(
    manifest: Path, tmp_path: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = run("analyze", manifest, "--json", "--out=s.json", "--summary-json=ended.json", "--workers=1")
    written = Path("s.json").read_text()
    assert json.loads(shown) == json.loads(written)
    assert json.loads(Path("ended.json").read_text())["num_volumes"] == 6
    table = run("analyze", manifest, "--workers=1")
    found = parse_statistics(written)
    assert "volumes       6 of train" in table
    assert f"mean {found.statistics.channels[0].mean:.6g}" in table
    analysis = bn.analyze(manifest, out="t.json", workers=1, progress=False)
    assert Path("t.json").read_text() == written
    assert repr(analysis) == "<Analysis of 6 volumes, 1 channel>"
    assert dict(analysis) == dict(found)
    assert table == f"{analysis}\n"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rescale": "zscore"}, "--rescale is zscore, which needs no statistics of the cohort"),
        ({"clip": True}, "--clip has no effect on an analysis; drop it"),
        ({"num_shards": 3}, "--num-shards has no effect on an analysis; drop it"),
        ({"rescale_split": "a b"}, "--rescale-split is 'a b'; give the name of a split, or a list of them"),
    ],
)
def test_options_without_effect_are_refused(manifest: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as error:
        make_analysis_config(str(manifest), options)
    assert str(error.value).startswith(text)


def test_options_of_a_file_that_concern_records_are_ignored(manifest: Path, tmp_path: Path) -> None:
    file = tmp_path / "o.toml"
    file.write_text('rescale = "window:0,1"\nclip = true\nvoxel_dtype = "uint8"\nspacing = 2\nworkers = 1\n')
    config = make_analysis_config(str(manifest), {}, config=str(file))
    assert (config.record.rescale, config.record.spacing) == ("cohort:zscore", (2, 2, 2))
    file.write_text('rescale = "cohort:percentile:2,98"\nclip = true\nvoxel_dtype = "native"\n')
    config = make_analysis_config(str(manifest), {}, config=str(file))
    assert (config.record.rescale, config.record.voxel_dtype) == ("cohort:percentile:2,98", "native")


# Builds


@pytest.fixture(scope="module")
def built(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("built") / "out"
    assert build(manifest, output) == 6
    return output


def test_a_build_rescales_all_volumes_by_the_statistics_of_the_training_images(
    manifest: Path, built: Path
) -> None:
    (channel,) = statistics_of(built).channels
    rows = index_rows(built)
    assert len(rows) == COUNT
    assert {(row["rescale_low"], row["rescale_high"]) for row in rows} == {
        (channel.mean, channel.mean + channel.std)
    }
    dataset = bn.Dataset(str(built), "test")
    width = channel.mean + channel.std - channel.mean
    for number, values in enumerate(values_of(manifest, ("test",))):
        voxels = dataset[number]["image"].squeeze()
        np.testing.assert_array_equal(voxels, ((values - channel.mean) / width).astype(np.float32))
    assert bn.verify(str(built), manifest=str(manifest), deep="all", progress=False)
    assert stray_files(built) == set()
    assert not (built / ".build").exists()


def test_the_bytes_depend_on_no_runner(manifest: Path, built: Path, tmp_path: Path) -> None:
    build(manifest, tmp_path / "out", workers=4, runner=CUTTING_RUNNER)
    assert contents(tmp_path / "out") == contents(built)
    assert statistics_of(tmp_path / "out") == statistics_of(built)


def test_percentiles_clip_and_units_are_restored(manifest: Path, tmp_path: Path) -> None:
    changes = {"rescale": "cohort:percentile:2,98", "clip": True, "rescale_within": "nonzero"}
    build(manifest, tmp_path / "out", **changes)
    values = dict(statistics_of(tmp_path / "out").channels[0].percentiles)
    stored = bn.extract(str(tmp_path / "out"), "sub-0002")
    (wanted,) = (np.clip(v, values[2], values[98]) for v in values_of(manifest, ("test",))[:1])
    np.testing.assert_allclose(stored.voxels, wanted, rtol=1e-5, atol=1e-3)
    assert bn.verify(str(tmp_path / "out"), manifest=str(manifest), deep="all", progress=False)


@pytest.mark.parametrize("changes", [{"frames": "each"}, {"frames": "all", "voxel_dtype": "native"}])
def test_frames_and_native_voxels(mixed: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    columns = {"path": "f", "label": None, "id": None}
    build(mixed, tmp_path / "out", columns=columns, rescale_within="nonzero", **changes)
    found = statistics_of(tmp_path / "out")
    assert found.num_volumes == (18 if changes["frames"] == "each" else 6)
    frames = np.stack([np.asarray(nib.load(mixed.parent / f"{n}_f.nii").dataobj) for n in range(6)])  # type: ignore[attr-defined]
    (channel,) = found.channels
    assert channel.mean == pytest.approx(frames[frames != 0].mean(), rel=1e-12)
    voxels = bn.Dataset(str(tmp_path / "out"))[0]["image"].squeeze()
    wanted = (frames[0].astype(np.float64) - channel.mean) / (channel.mean + channel.std - channel.mean)
    np.testing.assert_array_equal(voxels, (wanted[..., 0] if voxels.ndim == 3 else wanted).astype(np.float32))
    assert bn.verify(str(tmp_path / "out"), manifest=str(mixed), deep="all", progress=False)


def test_appended_volumes_are_rescaled_by_the_frozen_statistics(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "c", 4)
    assert build(manifest, tmp_path / "out") == 4
    first = statistics_of(tmp_path / "out")
    manifest = write_cohort(tmp_path / "c", 3, first=4)
    assert build(manifest, tmp_path / "out") == 0
    assert statistics_of(tmp_path / "out") == first
    assert len({row["rescale_low"] for row in index_rows(tmp_path / "out")}) == 1
    assert len(index_rows(tmp_path / "out")) == 7
    assert build(manifest, tmp_path / "out", overwrite=True) == 7  # measured again
    assert statistics_of(tmp_path / "out").num_volumes == 7
    assert build(manifest, tmp_path / "fresh") == 7
    assert statistics_of(tmp_path / "out") == statistics_of(tmp_path / "fresh")


def test_volumes_far_from_the_cohort_are_counted(tmp_path: Path, run: Callable[..., str]) -> None:
    manifest, output = write_cohort(tmp_path / "c", 20), tmp_path / "out"
    flags = ["--rescale=cohort:zscore", "--rescale-within=nonzero"]
    assert "warning" not in run("build", manifest, output, *flags)
    write_cohort(tmp_path / "c", 2, first=20)
    write_image(tmp_path / "c" / name_of(21), 7 * brain(seed=9))
    said = run("build", manifest, output, *flags)
    assert "1 example: the mean of the voxels that --rescale-within selects is far from the means" in said
    assert len(index_rows(output)) == 22


def test_a_build_refuses_to_change_the_statistics_of_a_dataset(
    manifest: Path, built: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(built, output)
    other = measure_in(tmp_path / "m.json", manifest, {"rescale_split": "test,train"}).statistics
    with pytest.raises(OutputError, match=r"--rescale-stats was \w+: 6 volumes, .*, now \w+: 9 volumes"):
        build(manifest, output, rescale_stats=other)
    with pytest.raises(OutputError, match="--rescale-within was not given, now nonzero") as error:
        build(manifest, output, rescale_within="nonzero")
    assert "--rescale-stats" not in str(error.value)
    with pytest.raises(OutputError, match="--rescale-split was not given, now test"):
        build(manifest, output, rescale_split="test")
    assert contents(output) == contents(built)
    assert not (output / ".build").exists()


def test_nothing_is_measured_for_a_build_that_is_refused(manifest: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "train-00000-of-00001.tfrecord.gz").write_bytes(b"")
    calls = list[AnalysisPlan]()
    with (
        pytest.raises(OutputError, match="holds train-00000"),
        open_build(make_config(manifest, output, **ZSCORE), measure=measured_by(calls)),
    ):
        pass
    assert not calls


class _Killed(BaseException):
    """Ends a build as a signal does."""


def kill_before_records(manifest: Path, output: Path, **changes: Any) -> None:
    """End a build when it has saved its plan."""
    config = make_config(manifest, output, **{**ZSCORE, **changes})
    with contextlib.suppress(_Killed), open_build(config, measure=measured_by([])):
        assert not (output / ".build/statistics.json").exists()  # the plan has them
        raise _Killed


def test_what_was_measured_is_kept_if_the_build_ends_before_its_plan(manifest: Path, tmp_path: Path) -> None:
    output, calls = tmp_path / "out", list[AnalysisPlan]()

    def killed(plan: AnalysisPlan) -> Analysis:
        measured_by(calls)(plan)
        raise _Killed

    with pytest.raises(_Killed), open_build(make_config(manifest, output, **ZSCORE), measure=killed):
        pass
    assert (output / ".build/statistics.json").exists()
    assert build(manifest, output, rescale_within="nonzero") == 6  # which is another measurement
    shutil.rmtree(output)
    with pytest.raises(_Killed), open_build(make_config(manifest, output, **ZSCORE), measure=killed):
        pass
    assert build(manifest, output) == 0
    assert stray_files(output) == set()


def test_an_unfinished_build_is_continued_with_its_statistics(tmp_path: Path) -> None:
    manifest, output = write_cohort(tmp_path / "c", 4), tmp_path / "out"
    kill_before_records(manifest, output)
    write_image(tmp_path / "c" / name_of(2), brain(seed=99))  # would give other numbers
    assert build(manifest, output) == 0
    write_cohort(tmp_path / "d", 4)
    assert build(tmp_path / "d/manifest.tsv", tmp_path / "reference") == 4
    assert statistics_of(output) == statistics_of(tmp_path / "reference")


def test_an_overwriting_build_that_ended_is_continued_with_its_statistics(tmp_path: Path) -> None:
    manifest, output = write_cohort(tmp_path / "c", 4), tmp_path / "out"
    build(manifest, output)
    before = statistics_of(output)
    write_image(tmp_path / "c" / name_of(2), brain(seed=99))
    kill_before_records(manifest, output, overwrite=True)
    assert build(manifest, output, overwrite=True) == 0
    assert statistics_of(output) != before


@pytest.fixture(scope="module")
def operations(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many operations on files of OUTPUT a build takes."""
    return build_apart(manifest, tmp_path_factory.mktemp("whole") / "out", **ZSCORE).operations


BEFORE_THE_PLAN = 52
"""Operations on files of OUTPUT until the plan is saved; the statistics are written in the middle."""


@pytest.mark.parametrize("moment", range(4))
def test_a_build_killed_at_any_moment_ends_with_the_same_statistics(
    manifest: Path, built: Path, tmp_path: Path, operations: int, moment: int
) -> None:
    first, last = BEFORE_THE_PLAN * moment // 3, BEFORE_THE_PLAN * (moment + 1) // 3
    if moment == 3:
        first, last = BEFORE_THE_PLAN, operations
    kill_at = random.Random(moment).randrange(first + 1, last + 1)
    output = tmp_path / "out"
    assert build_apart(manifest, output, kill_at, **ZSCORE).was_killed
    assert build_apart(manifest, output, **ZSCORE).status == 0
    assert_complete(output, built)
    assert statistics_of(output) == statistics_of(built)


def test_too_many_failures_of_a_build_leave_nothing_to_continue(tmp_path: Path) -> None:
    manifest, output = write_cohort(tmp_path / "c", 4), tmp_path / "out"
    image = tmp_path / "c" / name_of(1)
    data = image.read_bytes()
    image.write_bytes(data[:100])
    with pytest.raises(TooManyFailures, match="1 of 4 volumes failed"):
        build(manifest, output)
    image.write_bytes(data)
    assert build(manifest, output) == 4
    assert statistics_of(output).num_failed == 0


def test_a_failed_volume_is_not_in_the_statistics(tmp_path: Path) -> None:
    manifest, output = write_cohort(tmp_path / "c", 4), tmp_path / "out"
    (tmp_path / "c" / name_of(1)).unlink()
    assert build(manifest, output, max_bad_fraction=0.5) == 4
    found = statistics_of(output)
    assert (found.num_volumes, found.num_failed, info_of(output).num_failures) == (3, 1, 1)


def test_a_build_takes_the_file_of_an_analysis(
    manifest: Path, built: Path, tmp_path: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("analyze", manifest, "--out=s.json", "--workers=1")
    flags = ["--rescale=cohort:zscore", "--rescale-stats=s.json", "--examples-per-shard=7"]
    (tmp_path / "s.json").read_text()
    run("build", manifest, "out", *flags)
    assert contents(tmp_path / "out") == contents(built)
    analysis = parse_statistics(Path("s.json").read_text())
    bn.build(
        manifest, "two", rescale="cohort:zscore", rescale_stats=analysis, examples_per_shard=7, progress=False
    )
    assert contents(tmp_path / "two") == contents(built)


def test_a_dataset_like_another_has_its_statistics(
    manifest: Path, built: Path, tmp_path: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    smaller = write_cohort(tmp_path / "c", 3)
    run("build", smaller, "out", f"--like={built}")
    assert statistics_of(tmp_path / "out") == statistics_of(built)
    said = run("build", smaller, "three", f"--like={built}", "--spacing=3,3,3", code=2)
    assert "--rescale-stats was measured with no --spacing, but this build has --spacing 3,3,3" in said
    assert "--without rescale-stats ignores it" in said
    run("build", smaller, "three", f"--like={built}", "--spacing=3,3,3", "--without=rescale-stats")
    assert statistics_of(tmp_path / "three").num_volumes == 3


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"rescale_within": "nonzero"},
            "was measured with no --rescale-within, but this build has --rescale-w",
        ),
        (
            {"orientation": "RAS"},
            "with no --orientation, but this build has --orientation RAS; measure again",
        ),
        ({"rescale_split": "test"}, "--rescale-split is test, but --rescale-stats was measured of train"),
        ({"rescale": "cohort:percentile:2,98"}, "--rescale-stats has no percentile 2"),
        ({"rescale": "zscore"}, "--rescale-stats has no effect on --rescale zscore"),
    ],
)
def test_statistics_of_other_voxels_are_refused(
    manifest: Path, built: Path, change: dict[str, Any], text: str
) -> None:
    with pytest.raises(UsageError) as error:
        make_config(manifest, "out", **{**ZSCORE, "rescale_stats": statistics_of(built), **change})
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "which cannot be read: No such file or directory; give a file of `analyze`"),
        ("{", "which is no file of `beam-nifti analyze`: "),
        ("[]", "it is [], expected an object"),
        ("{}", "statistics_version is None, expected 1"),
        ('{"statistics_version": 2}', "statistics_version is 2, expected 1"),
        ('{"statistics_version": 1, "statistics": {}, "failures": [], "unusual": []}', "lacks the key"),
        ('{"statistics_version": 1, "statistics": {}, "failures": [], "x": 1}', "has a key 'x'"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, manifest: Path, content: str | None, text: str) -> None:
    path = tmp_path / "s.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=r"^rescale_stats is .*s\.json, which ") as error:
        bn.build(manifest, tmp_path / "out", rescale="cohort:zscore", rescale_stats=path, progress=False)
    assert text in str(error.value)


def _without_statistics(facts: dict[str, Any]) -> None:
    del facts["config"]["rescale_stats"]


def _of_nothing(facts: dict[str, Any]) -> None:
    facts["config"]["rescale_stats"]["channels"][0]["std"] = 0


def _of_others(facts: dict[str, Any]) -> None:
    facts["config"]["rescale_stats"]["options"] = [["spacing", "1,1,1"]]


def _of_text(facts: dict[str, Any]) -> None:
    facts["config"]["rescale_stats"] = "statistics"


def _of_channels(facts: dict[str, Any]) -> None:
    facts["config"]["rescale_stats"]["channels"] *= 2


def _of_zscore(facts: dict[str, Any]) -> None:
    facts["config"]["rescale"] = "zscore"


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (_without_statistics, "there is no config.rescale_stats"),
        (_of_nothing, "which is no range"),
        (_of_others, "rescale_stats was measured with spacing=(1, 1, 1)"),
        (_of_text, "config.rescale_stats is 'statistics', expected an object"),
        (_of_channels, "rescale_stats has 2 channels, but records have 1"),
        (_of_zscore, 'rescale_stats has no effect on rescale="zscore"'),
    ],
)
def test_a_dataset_with_other_statistics_is_refused(
    built: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], None], text: str
) -> None:
    output = tmp_path / "out"
    shutil.copytree(built, output)
    edit_info(output, edit)
    with pytest.raises(bn.DatasetError, match="not a dataset's info") as error:
        bn.inspect(output)
    assert text in str(error.value)


def test_a_dry_run_tells_what_would_be_measured(
    manifest: Path, built: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    flags = ["--rescale=cohort:zscore", "--dry-run"]
    assert "measure  6 volumes of train, before the first record" in run(
        "build", manifest, tmp_path / "o", *flags
    )
    output = tmp_path / "out"
    shutil.copytree(built, output)
    said = run("build", manifest, output, *flags)
    assert "measure" not in said
    assert f"keep     {COUNT} examples" in said


def test_check_tells_what_would_be_measured(manifest: Path, built: Path) -> None:
    found = bn.check(manifest, rescale="cohort:zscore", progress=False)
    assert found["measured"] == {"splits": ["train"], "num_volumes": 6}
    assert "measure first 6 volumes of train, unless the output has statistics" in str(found)
    assert "measured" not in bn.check(manifest, like=built, progress=False)
    both = bn.check(manifest, rescale="cohort:zscore", rescale_split="train,test", progress=False)
    assert both["measured"]["num_volumes"] == 9
    with pytest.raises(UsageError, match="the splits are test, train; name those to measure"):
        bn.check(manifest, rescale="cohort:zscore", rescale_split="other", progress=False)


def test_descriptions_have_the_statistics(built: Path, tmp_path: Path) -> None:
    (channel,) = statistics_of(built).channels
    described = bn.inspect(built)
    assert described["config"]["rescale_stats"]["channels"][0]["mean"] == channel.mean
    assert "statistics    6 volumes of train" in str(described)
    assert f"  intensity   mean {channel.mean:.6g}, std {channel.std:.6g}, " in str(described)
    other = tmp_path / "other"
    shutil.copytree(built, other)

    def change(facts: dict[str, Any]) -> None:
        facts["config"]["rescale_stats"]["num_empty"] = 1

    edit_info(other, change)
    assert re.search(
        "rescale-stats was .{8}: 6 volumes, mean .*, now .{8}: 6 vol", str(bn.diff(built, other))
    )


def test_the_page_has_the_statistics(built: Path) -> None:
    from beam_nifti.reporting.page import _settings

    settings = dict(_settings(info_of(built)))
    assert settings["Statistics"]["median size"] == "6×5×4 voxels of 2×2×2.5 mm"
    assert "rescale_stats" not in settings["Configuration"]


def test_the_step_rescales_by_statistics(manifest: Path, built: Path, tmp_path: Path) -> None:
    statistics = statistics_of(built)
    with beam.Pipeline(options=make_options()) as pipeline:
        volumes = pipeline | bn.ReadManifest(manifest) | bn.LoadVolume()
        records = volumes | bn.Rescale("cohort:zscore", stats=statistics) | bn.EncodeExample()
        records | bn.WriteToTFRecord(str(tmp_path / "out"), examples_per_shard=99)
    wanted, found = (
        {cells["example_id"]: data for cells, data in records_of(o)} for o in (built, tmp_path / "out")
    )
    assert found == wanted
    assert statistics_of(tmp_path / "out") == statistics
    with pytest.raises(
        UsageError, match=r'^rescale="cohort:zscore" requires statistics; give them with stats$'
    ):
        bn.Rescale("cohort:zscore")
    with pytest.raises(UsageError, match="stats has no percentile 2"):
        bn.Rescale(("cohort:percentile", 2, 98), stats=statistics)


def test_the_step_refuses_statistics_of_other_voxels(manifest: Path, built: Path) -> None:
    pipeline = beam.Pipeline(options=make_options())
    prepared = pipeline | bn.ReadManifest(manifest) | bn.LoadVolume() | bn.Preprocess(spacing=3)
    prepared | bn.Rescale("cohort:zscore", stats=statistics_of(built))
    with pytest.raises(Exception, match="was measured with no --spacing, but this build has --spacing 3,3,3"):
        pipeline.run().wait_until_finish()


def test_each_channel_has_its_own_range(mixed: Path, tmp_path: Path) -> None:
    columns = {"path": "a,b", "mask": "m", "label": None, "id": None}
    changes: dict[str, Any] = {"columns": columns, "rescale_within": "mask"}
    assert build(mixed, tmp_path / "out", **changes) == 6
    found = statistics_of(tmp_path / "out")
    lows = {tuple(row["rescale_low"]) for row in index_rows(tmp_path / "out")}
    assert lows == {tuple(channel.mean for channel in found.channels)}
    assert [label.label for label in found.labels] == [1, 2]
    assert found.options == (("channels", "a,b"), ("rescale_within", "mask"))
    # Another cohort may name its masks otherwise, also where an older version has recorded the name.
    for stats in (found, replace(found, options=(*found.options, ("mask_column", "m")))):
        other = {**ZSCORE, **changes, "columns": {**columns, "mask": "s"}, "rescale_stats": stats}
        assert make_config(mixed, "o", **other).record.rescale_stats == stats
    assert bn.verify(str(tmp_path / "out"), manifest=str(mixed), deep="all", progress=False)


def test_a_new_image_is_rescaled_without_a_mask(mixed: Path, tmp_path: Path) -> None:
    columns = {"path": "a", "mask": "m", "label": None, "id": None}
    build(mixed, tmp_path / "out", columns=columns, rescale_within="mask", orientation="LPS")
    preparation = bn.Preparation.of(tmp_path / "out")
    wanted = bn.Dataset(str(tmp_path / "out"))[3]
    for mask in (None, mixed.parent / "3_m.nii"):
        found = preparation.apply(mixed.parent / "3_a.nii", mask=mask)
        np.testing.assert_array_equal(found.image, wanted["image"])
        assert (found.mask is None) == (mask is None)


def test_participants_are_withdrawn_with_the_same_statistics(mixed: Path, tmp_path: Path) -> None:
    columns = {"path": "a", "mask": None, "label": "site", "id": None}
    build(mixed, tmp_path / "out", columns=columns)
    before = statistics_of(tmp_path / "out")
    bn.withdraw(tmp_path / "out", participants=["s1"], manifest=mixed, progress=False)
    assert statistics_of(tmp_path / "out") == before
    assert len(index_rows(tmp_path / "out")) == 5
    assert bn.verify(tmp_path / "out", progress=False)


def test_a_reference_elsewhere_is_another(mixed: Path, tmp_path: Path) -> None:
    """Though it has as many voxels of the same size."""
    moved = AFFINE + np.array([[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    references = [
        write_image(tmp_path / f"{n}.nii", affine=affine) for n, affine in enumerate((AFFINE, moved))
    ]
    found = bn.analyze(mixed, reference=references[0], progress=False, workers=1)
    given: Any = {"rescale": "cohort:zscore", "rescale_stats": found, "progress": False, "dry_run": True}
    bn.build(mixed, tmp_path / "out", reference=references[0], **given)
    with pytest.raises(UsageError, match=r"was measured with reference .*, but this build has reference"):
        bn.build(mixed, tmp_path / "out", reference=references[1], **given)


def test_a_configuration_without_it_has_no_new_keys() -> None:
    assert not {"rescale_split", "rescale_stats"} & BuildConfig("", "").as_dataset_config().keys()
