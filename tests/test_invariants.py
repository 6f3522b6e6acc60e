"""What holds for every build: its bytes, what crosses a shuffle, its memory, how it appears."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import apache_beam as beam
import nibabel as nib
import numpy as np
import pytest
from apache_beam.pipeline import AppliedPTransform, PTransformOverride
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.typehints import typehints

from beam_nifti.pipeline.build import open_build, plan_build
from beam_nifti.pipeline.failures import Absence, Failure
from beam_nifti.pipeline.parts import Part
from beam_nifti.pipeline.plan import ShardTask, WorkUnit
from beam_nifti.pipeline.records import Record
from beam_nifti.pipeline.transforms import BuildDataset, ShardOutcome
from beam_nifti.record.dataset_info import read_info
from beam_nifti.record.example import decode_example, decode_tensor
from beam_nifti.transforms import EncodeExample, LoadVolume, ReadManifest, Rescale, WriteToTFRecord
from beam_nifti.volume.volume import Volume
from tests.build_helpers import (
    CUTTING_RUNNER,
    SHAPE,
    UNIT_ROWS,
    assert_complete,
    build,
    build_apart,
    contents,
    cut_everywhere,
    make_config,
    steps_of,
    watching,
)
from tests.datasets import records_of
from tests.images import random_voxels, write_cohort, write_image, write_manifest

COUNT = 24
SPLITS = ("train", "train", "train", "test")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort"), COUNT, shape=SHAPE, split=SPLITS)


@pytest.fixture(scope="module")
def reference(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "dataset"
    build(manifest, output)
    return output


# 1 and 6: the same bytes


@pytest.mark.parametrize(
    ("mode", "workers", "unit_rows"),
    [
        ("multi_threading", 1, UNIT_ROWS),
        ("multi_threading", 2, 1),
        ("multi_threading", 4, 2),
        ("multi_threading", 2, COUNT),
        ("multi_processing", 2, UNIT_ROWS),
    ],
)
def test_bytes_depend_on_no_worker_or_unit(
    manifest: Path, reference: Path, tmp_path: Path, mode: str, workers: int, unit_rows: int
) -> None:
    build(manifest, tmp_path / "out", mode=mode, workers=workers, unit_rows=unit_rows)
    assert_complete(tmp_path / "out", reference)


@pytest.mark.parametrize("workers", [1, 4])
def test_bytes_depend_on_no_fusion_and_no_order(
    manifest: Path, reference: Path, tmp_path: Path, workers: int
) -> None:
    parts = set[str]()

    def watch(path: str) -> None:
        if ".part." in path:
            parts.add(path)

    with watching(watch):
        build(manifest, tmp_path / "out", runner=CUTTING_RUNNER, workers=workers)
    units = sum(-(-s.num_examples // UNIT_ROWS) for s in read_info(str(reference)).shards)
    assert len(parts) > units, "the runner cut no unit in two"
    assert_complete(tmp_path / "out", reference)


@pytest.mark.parametrize("changes", [{"compression": "none"}, {"voxel_dtype": "native"}, {"shuffle_seed": 5}])
def test_bytes_of_other_configurations(
    manifest: Path, reference: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    build(manifest, tmp_path / "one", **changes)
    build(manifest, tmp_path / "two", runner=CUTTING_RUNNER, workers=2, unit_rows=2, **changes)
    assert_complete(tmp_path / "two", tmp_path / "one")
    assert contents(tmp_path / "two") != contents(reference)


def pipeline_of(manifest: Path, output: Path) -> beam.Pipeline:
    plan, _ = plan_build(make_config(manifest, output))
    pipeline = beam.Pipeline(runner=FnApiRunner())
    pipeline | "BuildDataset" >> BuildDataset(plan)
    return pipeline


class _Inputs(beam.pipeline.PipelineVisitor):
    """Collects each step's main inputs."""

    def __init__(self) -> None:
        self.of: dict[str, tuple[beam.PCollection, ...]] = {}
        self.transforms: dict[str, beam.PTransform] = {}

    def enter_composite_transform(self, applied: AppliedPTransform) -> None:
        self.visit_transform(applied)

    def visit_transform(self, applied: AppliedPTransform) -> None:
        self.of[applied.full_label] = tuple(applied.inputs)
        self.transforms[applied.full_label] = applied.transform


def test_the_cutting_runner_cuts_before_every_step(manifest: Path, tmp_path: Path) -> None:
    pipeline = pipeline_of(manifest, tmp_path / "out")
    steps = steps_of(pipeline)
    for name in ("SkipFinished", "LoadVolume", "Rescale", "EncodeExample", "WriteParts", "CommitShards"):
        assert any(name in step for step in steps)
    cut_everywhere(pipeline)
    inputs = _Inputs()
    pipeline.visit(inputs)
    for step in steps:
        (elements,) = inputs.of[f"{step}/Step"]
        assert "/Cut/Reshuffle/" in elements.producer.full_label


# 2: only rows and part records cross a shuffle

MAY_CROSS = {None, str, WorkUnit, ShardTask, Part, Failure, Absence, ShardOutcome}


def leaves(hint: Any) -> Iterable[Any]:
    """The types that a type hint is made of."""
    inner = getattr(hint, "tuple_types", None) or getattr(hint, "union_types", None) or get_args(hint)
    if inner:
        for part in inner:
            yield from leaves(part)
    else:
        yield hint


def test_only_rows_and_parts_are_declared_to_cross_a_shuffle(manifest: Path, tmp_path: Path) -> None:
    inputs = _Inputs()
    pipeline_of(manifest, tmp_path / "out").visit(inputs)
    crossing = {
        label: inputs.of[label]
        for label, transform in inputs.transforms.items()
        if isinstance(transform, beam.Reshuffle)
        or (isinstance(transform, beam.GroupByKey) and "/Reshuffle/" not in label)
    }
    assert len(crossing) == 3
    for label, elements in crossing.items():
        (pcollection,) = elements
        assert pcollection.element_type != typehints.Any, label
        assert set(leaves(pcollection.element_type)) <= MAY_CROSS, label


class _Weigh(beam.PTransform):
    """A GroupByKey that refuses arrays, and elements of a volume's size."""

    def expand(self, elements: beam.PCollection) -> beam.PCollection:
        return elements | "Weigh" >> beam.Map(self._weigh) | "Weighed" >> beam.GroupByKey()

    @staticmethod
    def _weigh(element: Any) -> Any:
        data = pickle.dumps(element)
        if len(data) > 4096 or b"numpy" in data:
            raise AssertionError(f"{len(data)} bytes cross a shuffle: {type(element[1])}")
        return element


class _WeighGroups(PTransformOverride):
    def matches(self, applied: AppliedPTransform) -> bool:
        is_weighed = applied.full_label.endswith("/Weighed")
        return isinstance(applied.transform, beam.GroupByKey) and not is_weighed

    def get_replacement_transform_for_applied_ptransform(self, applied: AppliedPTransform) -> beam.PTransform:
        return _Weigh()


class WeighingRunner(FnApiRunner):
    """Fails where a large element goes into a shuffle."""

    def run_pipeline(self, pipeline: beam.Pipeline, options: Any) -> Any:
        pipeline.replace_all([_WeighGroups()])
        return super().run_pipeline(pipeline, options)


def test_nothing_of_a_volumes_size_crosses_a_shuffle(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", 6, shape=(24, 24, 24))
    (tmp_path / "cohort" / "sub-0003.nii.gz").unlink()
    runner = f"{__name__}.WeighingRunner"
    built = build(manifest, tmp_path / "out", runner=runner, max_bad_fraction=0.5)
    assert built.summary.num_written == 5


def test_the_job_graph_does_not_grow_with_the_manifest(tmp_path: Path) -> None:
    write_image(tmp_path / "image.nii.gz")
    sizes = []
    for count in (10, 10_000):
        rows = [{"path": "image.nii.gz", "participant_id": f"{i:06d}"} for i in range(count)]
        manifest = write_manifest(tmp_path / f"{count:06d}.csv", rows)
        pipeline = pipeline_of(manifest, tmp_path / "out")
        sizes.append(len(pipeline.to_runner_api().SerializeToString()))
    assert abs(sizes[1] - sizes[0]) < 100


def graph_of(folder: Path, steps: bool) -> beam.Pipeline:
    """The graph of a build, or of a pipeline of steps."""
    manifest = write_cohort(folder / "cohort", 1)
    if not steps:
        return pipeline_of(manifest, folder / "out")
    pipeline = beam.Pipeline()
    loaded = pipeline | ReadManifest(str(manifest)) | LoadVolume()
    loaded | Rescale() | EncodeExample() | WriteToTFRecord(str(folder / "out"))
    return pipeline


@pytest.mark.parametrize("steps", [False, True])
def test_collections_are_joined_only_where_they_have_one_coder(tmp_path: Path, steps: bool) -> None:
    """Flink refuses others."""
    graph = graph_of(tmp_path, steps).to_runner_api().components
    joined = [t for t in graph.transforms.values() if t.spec.urn == "beam:transform:flatten:v1"]
    for transform in joined:
        coders = {graph.pcollections[name].coder_id for name in transform.inputs.values()}
        assert len(coders) == 1, transform.unique_name
    assert joined


@pytest.mark.parametrize("steps", [False, True])
def test_no_step_that_takes_voxels_waits_for_another_collection(tmp_path: Path, steps: bool) -> None:
    """Flink and Spark do not fuse a step with a side input: each volume would pass through Java."""
    waiting, taking = set[str](), set[str]()

    class Visitor(beam.pipeline.PipelineVisitor):
        def visit_transform(self, node: Any) -> None:
            if isinstance(node.transform, beam.ParDo):
                if {getattr(i, "element_type", None) for i in node.inputs} & {Volume, Record}:
                    taking.add(node.full_label)
                if node.side_inputs:
                    waiting.add(node.full_label)

    graph_of(tmp_path, steps).visit(Visitor())
    assert any("WriteParts" in label for label in taking)
    assert not waiting & taking


# 3: memory


@pytest.mark.slow
def test_memory_does_not_grow_with_the_cohort(tmp_path: Path) -> None:
    shape, megabyte = (64, 64, 64), 1 << 20  # float32: one megabyte
    names = [f"image-{i}.nii" for i in range(4)]
    for seed, name in enumerate(names):
        write_image(tmp_path / name, random_voxels(shape, "float32", seed))
    peaks = []
    for count in (40, 160):
        rows = [{"path": names[i % 4], "participant_id": f"{i:04d}"} for i in range(count)]
        manifest = write_manifest(tmp_path / f"{count}.csv", rows)
        output = tmp_path / f"out-{count}"
        ended = build_apart(manifest, output, workers=2, unit_rows=10, examples_per_shard=40)
        assert ended.result["num_written"] == count
        peaks.append(ended.peak_bytes)
    # The 120 further volumes are 120 MB of float32 voxels.
    assert peaks[1] - peaks[0] < 16 * megabyte


# 4: whole or not at all


def test_dataset_info_appears_last(manifest: Path, tmp_path: Path) -> None:
    written = list[str]()

    def watch(path: str) -> None:
        # Files of an output are opened by their names in a folder that is open.
        if not path.startswith("/") and path.endswith(".tmp"):
            written.append(Path(path).name.split(".")[0])

    with watching(watch):
        build(manifest, tmp_path / "out")
    first = written.index("dataset_info")
    assert {"train-00000-of-00003", "test-00000-of-00001"} <= set(written[:first])
    assert set(written[first:]) == {"dataset_info"}


def test_a_pipeline_that_fails_publishes_nothing(manifest: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "train-00001-of-00003.tfrecord.gz").mkdir(parents=True)  # in the way of one shard
    with pytest.raises(Exception, match="train-00001-of-00003"):
        build(manifest, output)
    assert not (output / "dataset_info.json").exists()
    assert not list(output.rglob("*.tmp"))
    (output / "train-00001-of-00003.tfrecord.gz").rmdir()
    build(manifest, output)
    assert read_info(str(output)).num_examples == COUNT


def test_a_manifest_that_changes_meanwhile_publishes_nothing(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", 4, shape=SHAPE)
    with open_build(make_config(manifest, tmp_path / "out")) as plan:
        write_cohort(tmp_path / "cohort", 5, shape=SHAPE)
        with pytest.raises(Exception, match="changed since this build was started"):
            list(plan.read_units(plan.config.manifest))
    assert not (tmp_path / "out" / "dataset_info.json").exists()


# 7: the way back


def odd_images(folder: Path) -> Path:
    """Images of one shape and float32, int16, scaled and big-endian voxels."""
    affine = np.array([[-1.5, 0.1, 0, 80], [0.1, 2, 0, -120], [0, 0, 3.25, -7.5], [0, 0, 0, 1]])
    write_image(folder / "a.nii.gz", random_voxels(SHAPE, "int16", 1), affine=affine)
    write_image(folder / "b.nii", random_voxels(SHAPE, "int16", 2), byte_order=">")
    write_image(folder / "c.nii.gz", random_voxels(SHAPE, "int16", 3), slope=0.37, inter=-11.5)
    write_image(folder / "d.nii.gz", random_voxels(SHAPE, "int16", 4), version=2, affine=affine)
    names = ("a.nii.gz", "b.nii", "c.nii.gz", "d.nii.gz")
    return write_manifest(folder / "m.csv", [{"path": n, "label": 0.1} for n in names])


def check_metadata(row: dict[str, Any], features: dict[str, Any], image: Any) -> None:
    values = image.get_fdata()
    assert np.array_equal(features["affine"], image.affine.ravel().astype(np.float32))
    assert np.array_equal(np.reshape(row["affine"], (4, 4)), image.affine)
    assert np.array_equal(features["zooms"], np.float32(image.header.get_zooms()))
    assert (row["min"], row["max"]) == (values.min(), values.max())
    assert features["intensity_min"] == np.float32(values.min())
    assert features["intensity_max"] == np.float32(values.max())
    assert features["label"] == np.float32(0.1)
    assert bytes(features["id"]).decode() == row["source"]


def test_native_records_give_back_the_image_exactly(tmp_path: Path) -> None:
    manifest = odd_images(tmp_path)
    build(manifest, tmp_path / "out", voxel_dtype="native")
    records = list(records_of(tmp_path / "out"))
    assert len(records) == 4
    for row, payload in records:
        features: dict[str, Any] = decode_example(payload)
        image = nib.load(tmp_path / row["source"])
        check_metadata(row, features, image)
        voxels = decode_tensor(features["image_raw"])
        assert np.array_equal(voxels, image.dataobj.get_unscaled())
        slope, inter = (
            struct.unpack("<d", features[name])[0] if name in features else None
            for name in ("scl_slope", "scl_inter")
        )
        again = nib.Nifti1Image(np.asarray(voxels), features["affine"].reshape(4, 4))
        again.header.set_slope_inter(slope, inter)
        again.to_filename(tmp_path / "again.nii")
        assert np.array_equal(nib.load(tmp_path / "again.nii").get_fdata(), image.get_fdata())


def test_float32_records_give_back_the_image_to_half_a_step(tmp_path: Path) -> None:
    manifest = odd_images(tmp_path)
    write_image(tmp_path / "e.nii.gz", random_voxels(SHAPE, "float32", 5))
    manifest.write_text(manifest.read_text() + "e.nii.gz,0.1\n")
    build(manifest, tmp_path / "out")
    records = list(records_of(tmp_path / "out"))
    assert len(records) == 5
    for row, payload in records:
        features: dict[str, Any] = decode_example(payload)
        image = nib.load(tmp_path / row["source"])
        check_metadata(row, features, image)
        values, width = image.get_fdata(), row["max"] - row["min"]
        unit = decode_tensor(features["image_raw"])
        assert np.array_equal(unit, ((values - row["min"]) / width).astype(np.float32))
        # float32 rounds a number in [0, 1] by at most 2**-25; the rest is float64's.
        again = unit.astype(np.float64) * width + row["min"]
        assert np.abs(again - values).max() <= (2.0**-25 + 2.0**-50) * width
        if image.dataobj.slope == 1:  # whole numbers come back whole
            integers = np.issubdtype(image.get_data_dtype(), np.integer)
            assert not integers or np.array_equal(np.rint(again), values)
