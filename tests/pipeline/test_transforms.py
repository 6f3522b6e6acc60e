"""The steps on their own, and what they count."""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.pvalue import TaggedOutput
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.utils.windowed_value import WindowedValue

from beam_nifti.config import Columns, Percentile, RecordConfig, Splitting, Window
from beam_nifti.errors import ManifestError, UsageError, VolumeError
from beam_nifti.manifest import VolumeRow
from beam_nifti.pipeline.build import open_build, plan_build
from beam_nifti.pipeline.composable import EncodeExample, LoadVolume, Preprocess, ReadManifest, Rescale
from beam_nifti.pipeline.failures import Failure
from beam_nifti.pipeline.parts import Part
from beam_nifti.pipeline.plan import BuildPlan, WorkUnit
from beam_nifti.pipeline.records import Record
from beam_nifti.pipeline.saved_plan import SavedPlan
from beam_nifti.pipeline.steps import (
    FAILURES,
    EncodeExampleFn,
    GuardedFn,
    LoadVolumeFn,
    PreprocessFn,
    RescaleFn,
)
from beam_nifti.pipeline.transforms import (
    FINISHED,
    SHARDS,
    BuildDataset,
    CommitShards,
    ReadUnitsFn,
    ShardOutcome,
    SkipFinished,
    WriteParts,
)
from beam_nifti.record.dataset_info import read_info
from beam_nifti.record.index import read_index
from beam_nifti.volume import Volume
from tests.build_helpers import (
    PER_SHARD,
    SHAPE,
    UNIT_ROWS,
    build,
    finish_interrupted,
    make_config,
    make_options,
    run_steps,
)
from tests.images import brain, row_of, write_cohort, write_image, write_manifest

COUNT = 10


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort"), COUNT, shape=SHAPE)


@pytest.fixture
def plan(manifest: Path, tmp_path: Path) -> BuildPlan:
    plan, _ = plan_build(make_config(manifest, tmp_path / "out"))
    return dataclasses.replace(plan, unit_rows=UNIT_ROWS)


def by_tag(outputs: Iterable[Any]) -> dict[str | None, list[Any]]:
    """What a step yields, by output; None is the main one."""
    found: dict[str | None, list[Any]] = {}
    for output in outputs:
        is_tagged = isinstance(output, TaggedOutput)
        tag, value = (output.tag, output.value) if is_tagged else (None, output)
        found.setdefault(tag, []).append(value)
    return found


def units_of(plan: BuildPlan) -> list[WorkUnit]:
    return by_tag(ReadUnitsFn(plan).process(plan.config.manifest))[None]


def records_of(plan: BuildPlan) -> list[Record]:
    """The encoded records of a plan, in order."""
    steps = [LoadVolumeFn(str(Path(plan.config.manifest).parent)), RescaleFn(), EncodeExampleFn()]
    return [r for unit in units_of(plan) for row in unit.rows for r in run_steps(steps, row)]


def test_the_manifest_becomes_shards_and_units(plan: BuildPlan) -> None:
    outputs = by_tag(ReadUnitsFn(plan).process(plan.config.manifest))
    units = outputs[None]
    assert [len(unit.rows) for unit in units] == [2, 2, 3, 3]
    rows = [row for unit in units for row in unit.rows]
    assert [row.position for row in rows] == list(range(COUNT))
    assert [row.example_id for row in rows] == [f"sub-{i:04d}" for i in range(COUNT)]
    assert [key for key, _ in outputs[SHARDS]] == [str(task.name) for _, task in outputs[SHARDS]]
    assert [task.positions for _, task in outputs[SHARDS]] == [range(PER_SHARD), range(PER_SHARD, COUNT)]
    assert all(row.shard == str(unit.task.name) for unit in units for row in unit.rows)


def test_a_manifest_that_changed_is_refused(manifest: Path, plan: BuildPlan, tmp_path: Path) -> None:
    changed = tmp_path / "changed.tsv"
    changed.write_text(manifest.read_text().replace("\t3\t", "\t4\t"))
    with pytest.raises(ManifestError, match="changed since this build was started"):
        list(ReadUnitsFn(plan).process(str(changed)))


def test_a_fresh_build_skips_nothing(plan: BuildPlan) -> None:
    for unit in units_of(plan):
        assert by_tag(SkipFinished(plan).process(unit)) == {None: [unit]}


def test_a_second_attempt_of_a_fresh_build_skips_what_the_first_finished(plan: BuildPlan) -> None:
    first, second, *_ = units_of(plan)
    folder = str(Path(plan.config.manifest).parent)
    steps = (LoadVolumeFn(folder), RescaleFn(), EncodeExampleFn())
    writer = WriteParts(plan)
    writer.start_bundle()
    for row in first.rows:
        (record,) = run_steps(steps, row)
        list(writer.process(record))
    (written,) = writer.finish_bundle()
    _, part = written.value
    done = dataclasses.replace(part, positions=tuple(row.position for row in first.rows))
    assert by_tag(SkipFinished(plan).process(first)) == {FINISHED: [(str(first.task.name), done)]}
    assert by_tag(SkipFinished(plan).process(second)) == {None: [second]}


def test_a_resumed_build_skips_what_is_there(plan: BuildPlan) -> None:
    build(plan.config.manifest, plan.config.output)
    with open_build(plan.config) as again:
        again = dataclasses.replace(again, unit_rows=UNIT_ROWS)
        for unit in units_of(again):
            outputs = by_tag(SkipFinished(again).process(unit))
            assert list(outputs) == [FINISHED]
            ((key, part),) = outputs[FINISHED]
            assert key == str(unit.task.name)
            assert part.positions == tuple(row.position for row in unit.rows)


def test_the_steps_work_without_a_build(tmp_path: Path) -> None:
    row = row_of(write_image(tmp_path / "a.nii.gz", brain(SHAPE)))
    (volume,) = run_steps([LoadVolumeFn(), RescaleFn()], row)
    assert (volume.voxels.dtype, volume.voxels.shape) == (np.float32, SHAPE)
    assert (volume.voxels.min(), volume.voxels.max()) == (0, 1)


GRID = {"shape": (4, 5, 6), "affine": [2.0, 0, 0, 1, 0, 2, 0, 1, 0, 0, 2, 1, 0, 0, 0, 1]}


@pytest.mark.parametrize(
    ("step", "options", "wanted"),
    [
        (LoadVolume, {"frames": 0}, {"frames": "first"}),
        (LoadVolume, {"frames": np.int64(3)}, {"frames": "3"}),
        (LoadVolume, {"channels": "T1w"}, {}),
        (LoadVolume, {"channels": ("T1w",)}, {}),
        (LoadVolume, {"channels": "T1w,FLAIR"}, {"channels": ("T1w", "FLAIR")}),
        (LoadVolume, {"channels": ["T1w", "FLAIR"]}, {"channels": ("T1w", "FLAIR")}),
        (LoadVolume, {"mask_dtype": "uint16"}, {"mask_dtype": "uint16"}),
        (Preprocess, {"orientation": "native"}, {}),
        (Preprocess, {"spacing": 2}, {"spacing": (2.0, 2.0, 2.0)}),
        (Preprocess, {"spacing": "1,1,1.5"}, {"spacing": (1.0, 1.0, 1.5)}),
        (
            LoadVolume,
            {"align": "first", "interpolation": "cubic", "mask_interpolation": "linear", "antialias": True},
            {"align": "first", "interpolation": "cubic", "mask_interpolation": "linear", "antialias": True},
        ),
        (Preprocess, {"reference": GRID}, {"reference": GRID}),
        (Preprocess, {"resize": np.array([4, 5, 6])}, {"resize": (4, 5, 6)}),
        (
            Preprocess,
            {"resize_longest": np.int64(4), "interpolation": "cubic", "antialias": np.True_},
            {"resize_longest": 4, "interpolation": "cubic", "antialias": True},
        ),
        (
            Preprocess,
            {"spacing": 2, "mask_interpolation": "linear", "separate_z": "auto"},
            {"spacing": (2.0, 2.0, 2.0), "mask_interpolation": "linear", "separate_z": "auto"},
        ),
        (Preprocess, {"shape": "4,4,4"}, {"shape": (4, 4, 4)}),
        (Preprocess, {"shape": np.array([4, 5, 6])}, {"shape": (4, 5, 6)}),
        (Preprocess, {"crop_foreground": ("above", 3)}, {"crop_foreground": "above:3"}),
        (Rescale, {"rescale": Percentile(1, 99)}, {"rescale": "percentile:1,99"}),
        (Rescale, {"rescale": ("percentile", 1, 99)}, {"rescale": "percentile:1,99"}),
        (Rescale, {"rescale": Window(0, 5), "clip": np.True_}, {"rescale": "window:0,5", "clip": True}),
        (Rescale, {"within": ("above", 3)}, {"rescale_within": "above:3"}),
        (Rescale, {"rescale": None, "within": None, "clip": None, "voxel_dtype": None}, {}),
    ],
)
def test_steps_take_the_values_that_builds_take(step: Any, options: dict[str, Any], wanted: Any) -> None:
    config = step(**options)._step._config
    assert config == RecordConfig(**wanted)
    RecordConfig(**dataclasses.asdict(config)).fingerprint  # noqa: B018  (of JSON values alone)


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        (LoadVolume, {"frames": True}, "^frames is True; choose one of: all"),
        (LoadVolume, {"frames": "each"}, "^frames is 'each', which makes several records per row"),
        (LoadVolume, {"channels": ()}, r"^channels is \(\); give the name of a column"),
        (LoadVolume, {"channels": "T1w,"}, "^channels is 'T1w,'; give the name of each"),
        (LoadVolume, {"mask_dtype": np.uint8}, "^mask_dtype is .*; choose one of: uint8"),
        (LoadVolume, {"complex": "x"}, "^complex is 'x'; choose one of"),
        (LoadVolume, {"interpolation": "cubic"}, "^interpolation has no effect without align, "),
        (LoadVolume, {"align": "last"}, "^align is 'last'; choose one of"),
        (Preprocess, {"resize_longest": 4.5}, "^resize_longest is 4.5; give a whole number"),
        (Preprocess, {"resize": (4, 4, 4), "spacing": 2}, "^spacing and resize both decide"),
        (Preprocess, {"reference": {"shape": (4, 4, 4)}}, "^reference is .*; give the path of an image"),
        (Preprocess, {"antialias": True}, "^antialias=True has no effect without|^antialias has no effect"),
        (Preprocess, {"spacing": "222"}, "^spacing is '222'; give three sizes"),
        (Preprocess, {"spacing": (0, 1, 1)}, "^spacing is 0,1,1; give three sizes"),
        (Preprocess, {"shape": (10.5, 10, 10)}, "^shape is .*; give three whole numbers"),
        (Preprocess, {"shape": 4}, "^shape is 4; give three whole numbers"),
        (Preprocess, {"orientation": "ras"}, "^orientation is 'ras'; write native"),
        (Rescale, {"rescale": "percentile:10,90", "clip": "no"}, "^clip is 'no'; give True or False"),
        (Rescale, {"rescale": 3}, "^rescale is 3; choose one of"),
        (Rescale, {"rescale": "none", "clip": True}, '^clip=True cannot be used with rescale="none"'),
        (Rescale, {"rescale": "none", "within": "mask"}, '^within has no effect on rescale="none"'),
        (Rescale, {"within": "above:x"}, r"^within is 'above:x'; write it as \(.above., T\)"),
        (Rescale, {"voxel_dtype": np.float32}, "^voxel_dtype is .*; choose one of"),
        (ReadManifest, {"path": None}, "^path is None; give a path"),
        (ReadManifest, {"path": ""}, "^path is empty; was a variable not set"),
        (ReadManifest, {"path": "m.tsv", "columns": "label"}, "^columns is 'label'; give a .*Columns"),
        (
            ReadManifest,
            {"path": "m.tsv", "splitting": {"a": 1}},
            "^splitting is {'a': 1}; give a .*Splitting",
        ),
    ],
)
def test_steps_refuse_the_values_that_builds_refuse(step: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        step(**options)


@pytest.mark.parametrize(
    ("columns", "loading", "message"),
    [
        (
            Columns(path="T1w,T2w", mask="seg"),
            {},
            r"names the columns 'T1w', 'T2w', 'seg' \(mask\), but LoadVolume reads one image; use "
            r"LoadVolume\(channels=\('T1w', 'T2w'\), mask_dtype='uint8'\), or give",
        ),
        (Columns(path="T1w,T2w"), {}, r"use LoadVolume\(channels=\('T1w', 'T2w'\)\), or give"),
        (Columns(path="T1w", mask="seg"), {}, r"use LoadVolume\(mask_dtype='uint8'\), or give"),
        (
            Columns(path="T1w"),
            {"mask_dtype": "uint8"},
            r"names the columns 'T1w', but LoadVolume reads one image, a mask; use LoadVolume\(\), or give",
        ),
        (Columns(path="T1w"), {"channels": "T1w,T2w"}, r"reads 'T1w', 'T2w'; use LoadVolume\(\), or give"),
        # As many files as are read, but not the same
        (Columns(path="T1w,T2w"), {"mask_dtype": "uint8"}, r"use LoadVolume\(channels=\('T1w', 'T2w'\)\)"),
        (
            Columns(path="T1w", mask="seg"),
            {"channels": "T1w,seg"},
            r"use LoadVolume\(mask_dtype='uint8'\), or give",
        ),
        (Columns(path="T2w,T1w"), {"channels": "T1w,T2w"}, r"use LoadVolume\(channels=\('T2w', 'T1w'\)\)"),
        (
            Columns(path="T1w,T2w", mask="seg"),
            {"mask_dtype": "uint16"},
            r"use LoadVolume\(channels=\('T1w', 'T2w'\), mask_dtype='uint16'\)",
        ),
    ],
)
def test_images_and_masks_that_a_manifest_names_are_never_dropped(
    tmp_path: Path, columns: Columns, loading: dict[str, Any], message: str
) -> None:
    pipeline = beam.Pipeline(options=make_options())
    loaded = pipeline | ReadManifest(_with_modalities(tmp_path), columns=columns) | LoadVolume(**loading)
    assert loaded.element_type is Volume
    with pytest.raises(UsageError, match=message):
        pipeline.run()


@pytest.mark.parametrize(
    ("columns", "loading", "shape"),
    [
        (Columns(path="T1w"), {}, SHAPE),
        (Columns(path="T2w"), {"channels": "T2w"}, SHAPE),
        (Columns(path="T1w,T2w"), {"channels": ["T1w", "T2w"]}, (*SHAPE, 2)),
        (Columns(path="T1w,T2w", mask="seg"), {"channels": "T1w,T2w", "mask_dtype": "uint8"}, (*SHAPE, 2)),
    ],
)
def test_images_and_masks_that_both_steps_name_are_read(
    tmp_path: Path, columns: Columns, loading: dict[str, Any], shape: tuple[int, ...]
) -> None:
    with beam.Pipeline(options=make_options()) as pipeline:
        volumes = pipeline | ReadManifest(_with_modalities(tmp_path), columns=columns) | LoadVolume(**loading)
        found = volumes | beam.Map(lambda v: (v.voxels.shape, v.mask is not None))
        assert_that(found, equal_to([(shape, columns.mask is not None)]))


def _with_modalities(folder: Path) -> str:
    """A manifest of one row, with two images and a mask."""
    for seed, name in enumerate(("T1w", "T2w", "seg")):
        voxels = brain(SHAPE, seed)
        write_image(folder / f"{name}.nii", (voxels > 500).astype(np.uint8) if name == "seg" else voxels)
    row = {"participant_id": "a", "T1w": "T1w.nii", "T2w": "T2w.nii", "seg": "seg.nii"}
    return str(write_manifest(folder / "m.tsv", [row]))


def test_a_row_with_more_or_fewer_files_than_are_read_is_refused(tmp_path: Path) -> None:
    image = str(write_image(tmp_path / "a.nii.gz", brain(SHAPE)))
    masked, two = RecordConfig(mask_dtype="uint8"), "the row has 2 files, but LoadVolume reads 1; give it"
    for fields, config, message in (
        ({}, masked, "the row has 1 file, but LoadVolume reads 2; give it"),
        ({"columns": Columns(mask="seg")}, masked, "the row has 1 file, but LoadVolume reads 2; give it"),
        ({"other_files": (image,)}, RecordConfig(), two),
        ({"other_files": (image,), "columns": Columns()}, RecordConfig(), two),
    ):
        with pytest.raises(UsageError, match=message):
            list(LoadVolumeFn(config=config).process(row_of(image, **fields)))


@pytest.mark.parametrize(
    ("header", "arguments", "message"),
    [
        ("scan", {}, r"no column 'path'; the columns are: scan; choose one with Columns\.path$"),
        ("path", {"columns": Columns(mask="seg")}, r"no column 'seg'; .*; choose one with Columns\.mask$"),
        ("path\tsplit", {"splitting": Splitting({"a": 1})}, "; rename the column, or drop splitting$"),
        (
            "path\tlabel",
            {"columns": Columns(label="label")},
            r"keep such rows with Columns\.missing_label=\"nan\", or skip them with Columns\.missing_label=",
        ),
    ],
)
def test_errors_of_a_manifest_name_what_a_pipeline_gives(
    tmp_path: Path, header: str, arguments: dict[str, Any], message: str
) -> None:
    (tmp_path / "m.tsv").write_text(f"{header}\na.nii" + "\t" * header.count("\t") + "\n")
    pipeline = beam.Pipeline(options=make_options())
    pipeline | ReadManifest(tmp_path / "m.tsv", **arguments)
    with pytest.raises(ManifestError) as caught:
        pipeline.run()
    assert re.search(message, str(caught.value), re.M)
    assert "--" not in str(caught.value)


def test_a_column_is_not_taken_for_the_label_of_a_step() -> None:
    with pytest.raises(TypeError):
        EncodeExample("site")  # type: ignore[call-arg]


def test_images_lie_relative_to_the_manifest(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii.gz", brain(SHAPE))
    (volume,) = LoadVolumeFn(str(tmp_path)).process(row_of("a.nii.gz"))
    assert np.array_equal(volume.voxels, brain(SHAPE))


@pytest.mark.parametrize(
    ("step", "word"),
    [(LoadVolumeFn(shape=(12, 10, 9)), "shape"), (LoadVolumeFn(dtype="float32"), "int16 voxels")],
)
def test_unlike_volumes_are_refused(tmp_path: Path, step: LoadVolumeFn, word: str) -> None:
    row = row_of(write_image(tmp_path / "a.nii.gz", brain(SHAPE)))
    with pytest.raises(VolumeError, match=word):
        list(step.process(row))


class _Broken(beam.DoFn):
    """Fails after some results."""

    def __init__(self, num_results: int, error: Exception) -> None:
        self._num_results, self._error = num_results, error

    def process(self, element: VolumeRow | Volume) -> Iterable[Any]:
        yield from [element] * self._num_results
        raise self._error


def test_dead_letters_hold_no_voxels(tmp_path: Path) -> None:
    row = dataclasses.replace(row_of(write_image(tmp_path / "a.nii.gz", brain(SHAPE))), shard="shard")
    (volume,) = LoadVolumeFn().process(row)
    for element in (row, volume):
        outputs = by_tag(GuardedFn(_Broken(0, VolumeError("half way"))).process(element))
        failure = Failure(row, "_Broken", "VolumeError", "half way")
        assert outputs == {FAILURES: [("shard", failure)]}
        assert b"numpy" not in pickle.dumps(outputs)
        # With a result handed on already, a dead letter would count the volume twice: the build has to stop.
        with pytest.raises(VolumeError, match="half way"):
            list(GuardedFn(_Broken(1, VolumeError("half way"))).process(element))


@pytest.mark.parametrize(
    "error", [MemoryError(), TimeoutError("late"), OSError(28, "full"), KeyError("ours")]
)
def test_what_is_no_fault_of_the_volume_is_no_dead_letter(tmp_path: Path, error: Exception) -> None:
    row = row_of(write_image(tmp_path / "a.nii.gz", brain(SHAPE)))
    with pytest.raises(type(error)):
        list(GuardedFn(_Broken(0, error)).process(row))


PUBLIC_STEPS = [
    PreprocessFn(RecordConfig(orientation="SPL", shape=(6, 11, 9))),
    PreprocessFn(RecordConfig(spacing=(1.5, 2, 2), crop_foreground="nonzero")),
    PreprocessFn(RecordConfig(preprocess="tests.user_functions:change_all_in_place")),
    RescaleFn(),
    RescaleFn(RecordConfig("none", "native")),
    RescaleFn(RecordConfig(rescale="percentile:1,99", clip=True, voxel_dtype="uint8")),
]


@pytest.mark.parametrize("step", PUBLIC_STEPS)
def test_a_step_leaves_its_input_as_it_is(tmp_path: Path, step: beam.DoFn) -> None:
    image = write_image(tmp_path / "a.nii.gz", brain(SHAPE))
    mask = write_image(tmp_path / "m.nii.gz", (brain(SHAPE) > 500).astype(np.uint8))
    row = row_of(image, other_files=(str(mask),))
    (volume,) = LoadVolumeFn(config=RecordConfig(mask_dtype="uint8")).process(row)
    before = pickle.dumps(volume)
    first, second = list(step.process(volume)), list(step.process(volume))
    assert pickle.dumps(volume) == before
    assert pickle.dumps(first) == pickle.dumps(second)
    rescaled = next(iter(RescaleFn().process(volume)))
    before = pickle.dumps(rescaled)
    list(EncodeExampleFn().process(rescaled))
    assert pickle.dumps(rescaled) == before


def test_two_steps_may_take_the_same_volumes(tmp_path: Path) -> None:
    row = row_of(write_image(tmp_path / "a.nii.gz", brain(SHAPE)))
    with beam.Pipeline(options=make_options()) as pipeline:
        volumes = pipeline | beam.Create([row]) | beam.ParDo(LoadVolumeFn())
        for number in (1, 2):
            cropped = volumes | f"Prepare{number}" >> beam.ParDo(PreprocessFn(RecordConfig(shape=(6, 5, 4))))
            shapes = cropped | f"Shape{number}" >> beam.Map(lambda volume: volume.voxels.shape)
            assert_that(shapes, equal_to([(6, 5, 4)]), f"Check{number}")
        shapes = volumes | "Shape" >> beam.Map(lambda volume: volume.voxels.shape)
        assert_that(shapes, equal_to([SHAPE]))


def write_bundles(plan: BuildPlan, bundles: Iterable[Iterable[Any]]) -> list[tuple[str, Part]]:
    """Send records through WriteParts, as bundles of one worker."""
    writer = WriteParts(plan)
    written = []
    for bundle in bundles:
        writer.start_bundle()
        for record in bundle:
            written += list(writer.process(record))
        for last in writer.finish_bundle():
            assert isinstance(last, WindowedValue)
            written.append(last.value)
    return written


def commit(plan: BuildPlan, written: Iterable[tuple[str, Any]]) -> list[ShardOutcome]:
    SavedPlan(plan.describe(), (plan.layout,), (".build",), plan.identity, False).write(plan.config.output)
    step = CommitShards(plan)
    outcomes = []
    for task in plan.tasks("train"):
        parts = [value for key, value in written if key == str(task.name)]
        outcomes += list(step.process((str(task.name), [*parts, task])))
    return outcomes


def test_an_interrupt_waits_for_the_part_that_is_closed(
    plan: BuildPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = WriteParts(plan)
    writer.start_bundle()
    assert not list(writer.process(records_of(plan)[0]))
    ((_, part),) = (last.value for last in finish_interrupted(writer, monkeypatch))
    assert read_index(part.index)[0].num_rows == 1
    assert Path(part.data).stat().st_size > 0


@pytest.mark.parametrize("order", ["cut", "interleaved", "reversed"])
def test_units_may_be_cut_and_mixed(plan: BuildPlan, tmp_path: Path, order: str) -> None:
    records = records_of(plan)
    bundles = {
        "cut": [records[:1], records[1:3], records[3:8], records[8:]],
        "interleaved": [records[0::2], records[1::2]],
        "reversed": [records[::-1]],
    }[order]
    written = write_bundles(plan, bundles)
    if order == "cut":
        # Of the units, 2 + 2 + 3 + 3 rows, the bundles hold 1 | 1 + 1 | 1 + 3 + 1 | 2.
        assert len(written) == 7
    outcomes = commit(plan, written)
    build(plan.config.manifest, tmp_path / "whole")
    expected = read_info(str(tmp_path / "whole")).shards
    assert [outcome.shard.sha256 for outcome in outcomes] == [shard.sha256 for shard in expected]
    for shard in expected:
        tables = [read_index(f"{o}/{shard.index}")[0] for o in (plan.config.output, tmp_path / "whole")]
        assert tables[0].equals(tables[1])


def test_a_commit_may_be_repeated(plan: BuildPlan) -> None:
    written = write_bundles(plan, [records_of(plan)])
    assert commit(plan, written) == commit(plan, written)


def test_failures_leave_their_positions_out(plan: BuildPlan) -> None:
    records = records_of(plan)
    lost = records.pop(1).entry.row
    failure = Failure(lost, "LoadVolume", "VolumeError", "gone")
    written = [*write_bundles(plan, [records]), (lost.shard, failure)]
    first, second = commit(plan, written)
    assert (first.shard.num_examples, first.failures) == (PER_SHARD - 1, (failure,))
    assert (second.shard.num_examples, second.failures) == (COUNT - PER_SHARD, ())


def test_every_step_counts(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path / "cohort", COUNT, shape=SHAPE)
    write_image(tmp_path / "cohort" / "sub-0004.nii.gz", np.zeros(SHAPE, np.int16))
    sizes = [p.stat().st_size for p in (tmp_path / "cohort").glob("*.nii.gz")]
    config = make_config(cohort, tmp_path / "out", max_bad_fraction=0.1)
    with open_build(config) as plan:
        pipeline = beam.Pipeline(options=make_options())
        pipeline | "BuildDataset" >> BuildDataset(plan)
        metrics = pipeline.run().metrics().query()
    counters = {c.key.metric.name: c.result for c in metrics["counters"]}
    assert counters["volumes-loaded"] == COUNT
    assert counters["bytes-read"] == sum(sizes)
    assert counters["volumes-failed"] == 1
    assert counters["bytes-encoded"] > (COUNT - 1) * 4 * np.prod(SHAPE)
    assert counters["bytes-written"] == read_info(str(tmp_path / "out")).num_bytes
    assert counters["shards-committed"] == 2
    counts = {d.key.metric.name: d.result.count for d in metrics["distributions"]}
    assert counts["load-msec"] == COUNT
    assert {counts[f"{s}-msec"] for s in ("rescale", "encode", "write")} == {COUNT - 1}
    assert counts["commit-msec"] == 2


def test_a_resumed_build_counts_what_it_skips(manifest: Path, tmp_path: Path) -> None:
    build(manifest, tmp_path / "out")
    counters = build(manifest, tmp_path / "out").counters
    assert counters["volumes-skipped"] == COUNT
    assert "volumes-loaded" not in counters
