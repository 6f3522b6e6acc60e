"""WriteToTFRecord on its own: what it takes, what it writes, and that nothing but its input decides that."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import apache_beam as beam
import nibabel
import numpy as np
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing import test_stream
from apache_beam.transforms.window import FixedWindows, TimestampedValue
from apache_beam.utils.windowed_value import WindowedValue
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_nifti.cli import main as cli
from beam_nifti.config import BuildConfig, Columns, RecordConfig, Sharding
from beam_nifti.errors import DatasetError, OutputBusyError, OutputError, UsageError, VolumeError
from beam_nifti.inspection.description import describe_record, format_description
from beam_nifti.inspection.extract import read_volume
from beam_nifti.inspection.verify import verify_dataset
from beam_nifti.manifest.reading import read_manifest
from beam_nifti.pipeline import lock
from beam_nifti.pipeline.build import open_build
from beam_nifti.pipeline.publish import publish_info
from beam_nifti.pipeline.records import examine, to_record
from beam_nifti.pipeline.saved_plan import SavedWrite
from beam_nifti.pipeline.steps import EncodeExampleFn, PreprocessFn, RescaleFn
from beam_nifti.pipeline.write import CommitRecordsFn, PlanFn, StartFn, WritePartsFn
from beam_nifti.pipeline.write_target import Target
from beam_nifti.random_access import Dataset
from beam_nifti.record.dataset_info import read_info
from beam_nifti.record.example import decode_example, decode_tensor, encode_example, encode_tensor
from beam_nifti.record.sharding import shard_ranges
from beam_nifti.transforms import (
    EncodeExample,
    LoadVolume,
    Preprocess,
    ReadManifest,
    Record,
    Rescale,
    WriteToTFRecord,
)
from beam_nifti.volume import Scaling, Volume
from beam_nifti.volume.volume import load_volume, rescale_volume
from tests.build_helpers import (
    CUTTING_RUNNER,
    PER_SHARD,
    SHAPE,
    arrays_of,
    assert_complete,
    build,
    contents,
    finish_interrupted,
    fork_server,
    make_config,
    make_options,
    stray_files,
    write_arrays,
)
from tests.datasets import edit_index, records_of, set_cell
from tests.images import brain, random_voxels, write_cohort, write_image, write_manifest

IDS = [f"case-{i:03d}" for i in range(3 * PER_SHARD - 2)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "dataset"
    write_arrays(output, IDS)
    return output


def shuffled(ids: Iterable[str], seed: int = 1) -> list[str]:
    mixed = list(ids)
    random.Random(seed).shuffle(mixed)
    return mixed


def write(elements: Iterable[Any], output: Path, **arguments: Any) -> Path:
    """Write some elements in this process; the output."""
    with beam.Pipeline(options=make_options()) as pipeline:
        pipeline | beam.Create(list(elements)) | WriteToTFRecord(str(output), **arguments)
    return output


# The same bytes


def test_what_is_written_is_what_both_were_given(reference: Path) -> None:
    assert stray_files(reference) == set()
    assert [s.num_examples for s in read_info(str(reference)).shards] == [PER_SHARD, PER_SHARD, PER_SHARD - 2]
    dataset = Dataset(reference, columns=["image", "label", "id", "age"])
    assert dataset.ids == IDS
    for example in dataset:
        _, given_ = arrays_of(example["id"])
        assert np.array_equal(example["image"][..., 0], given_["image"])
        assert (example["label"], example["age"]) == (given_["label"], 40.5)


@pytest.mark.parametrize(
    "how",
    [
        {"workers": 2},
        {"workers": 3, "mode": "multi_threading"},
        {"runner": CUTTING_RUNNER},
        {"runner": FnApiRunner(bundle_repeat=2)},
    ],
    ids=["two", "three", "cut", "repeated"],
)
def test_bytes_depend_on_input_alone(reference: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    """Neither on its order, nor on workers, fusion, or bundles that are done several times."""
    write_arrays(tmp_path / "out", shuffled(IDS), **how)
    assert_complete(tmp_path / "out", reference)


@pytest.mark.parametrize(
    "more", [{}, {"mask": np.ones((30, 40, 50), np.uint8)}, {"label": 1}, {"z": b"last"}]
)
def test_records_that_are_cut_are_read(tmp_path: Path, more: dict[str, Any]) -> None:
    """Whatever comes after the tensors that are cut: without a label, nothing does."""
    import tensorflow as tf

    voxels = random_voxels((30, 40, 50), "float32", seed=1)
    output = write([(f"{i}", {"image": voxels + i, **more}) for i in range(3)], tmp_path / "out")
    assert verify_dataset(str(output)).problems == ()
    dataset = Dataset(output)
    for number in range(3):
        assert np.array_equal(dataset[number]["image"][..., 0], voxels + number)
        patch = dataset.patch(number, (3, 4, 5), (6, 7, 8))["image"]
        assert np.array_equal(patch[..., 0], voxels[3:9, 4:11, 5:13] + number)
    shards = [str(output / shard.name) for shard in read_info(str(output)).shards]
    assert len(list(tf.data.TFRecordDataset(shards, "GZIP"))) == 3


def test_bytes_of_processes(reference: Path, tmp_path: Path) -> None:
    write_arrays(tmp_path / "out", shuffled(IDS, 2), workers=2, mode="multi_processing")
    assert_complete(tmp_path / "out", reference)


def test_windows_have_no_effect(reference: Path, tmp_path: Path) -> None:
    with beam.Pipeline(options=make_options()) as pipeline:
        elements = pipeline | beam.Create(IDS) | beam.Map(arrays_of)
        timed = elements | "Times" >> beam.Map(lambda e: TimestampedValue(e, sum(e[0].encode()) % 7))
        windows = timed | beam.WindowInto(FixedWindows(2))
        windows | WriteToTFRecord(str(tmp_path / "out"), examples_per_shard=PER_SHARD)
    assert_complete(tmp_path / "out", reference)


def target_of(output: Path, token: str = "0" * 16) -> Target:
    return Target(BuildConfig("", str(output), sharding=Sharding(PER_SHARD)), token)


def test_an_attempt_that_dies_leaves_no_record(tmp_path: Path) -> None:
    """A bundle ends with its file: without it nothing is handed on, and the next attempt does all again."""
    elements = [arrays_of(i) for i in IDS[:3]]
    dead, alive = WritePartsFn(target_of(tmp_path)), WritePartsFn(target_of(tmp_path))
    dead.start_bundle()
    lost = [next(iter(dead.process(element))) for element in elements[:2]]
    alive.start_bundle()
    done = [next(iter(alive.process(element))) for element in elements]
    (traits,) = alive.finish_bundle()
    assert isinstance(traits.value, WindowedValue)
    assert {p.part for p in done}.isdisjoint(p.part for p in lost)
    assert {Path(p.part).exists() for p in done} == {True}
    assert {Path(p.part).exists() for p in lost} == {False}
    ends = [p.offset + p.length for p in done]
    assert [p.offset for p in done] == [0, *ends[:-1]]
    assert Path(done[0].part).stat().st_size == ends[-1]


def test_an_interrupt_waits_for_the_part_that_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = WritePartsFn(target_of(tmp_path))
    writer.start_bundle()
    placed, _ = writer.process(arrays_of("a"))
    assert finish_interrupted(writer, monkeypatch)
    assert Path(placed.part).stat().st_size == placed.length


@settings(max_examples=25)
@given(
    ids=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), min_size=1, unique=True),
    splits=st.lists(st.sampled_from(["train", "test", "x"]), min_size=1),
    sharding=st.one_of(
        st.builds(lambda n: {"examples_per_shard": n}, st.integers(1, 5)),
        st.builds(lambda n: {"num_shards": n}, st.integers(1, 5)),
    ),
    compression=st.sampled_from(["gzip", "none"]),
)
def test_a_dataset_is_the_sorted_records_of_each_split(
    tmp_path_factory: pytest.TempPathFactory,
    ids: list[str],
    splits: list[str],
    sharding: dict[str, int],
    compression: str,
) -> None:
    records = [record_of(i, splits[n % len(splits)]) for n, i in enumerate(ids)]
    output = write(records, tmp_path_factory.mktemp("any") / "out", compression=compression, **sharding)
    info = read_info(str(output))
    found = [(cells["example_id"], cells["position"], payload) for cells, payload in records_of(output)]
    expected = []
    for split in sorted({r.split for r in records}):
        of_split = sorted((r for r in records if r.split == split), key=lambda r: r.id)
        expected += [(r.id, position, r.example) for position, r in enumerate(of_split)]
        sizes = [s.num_examples for s in info.splits[split].shards]
        assert sizes == list(map(len, shard_ranges(len(of_split), Sharding(**sharding))))
    assert found == expected


def record_of(example_id: str, split: str = "train", **features: Any) -> Record:
    voxels = encode_tensor(np.ones((2, 2, 1), np.float32))
    return Record(
        example_id, encode_example({"id": example_id.encode(), "image_raw": voxels, **features}), split
    )


def test_nothing_of_a_volumes_size_crosses_a_shuffle(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", 6, shape=(24, 24, 24))
    options = make_options(runner="tests.test_invariants.WeighingRunner")
    with beam.Pipeline(options=options) as p:
        records = p | ReadManifest(str(manifest)) | LoadVolume() | Rescale() | EncodeExample()
        records | WriteToTFRecord(str(tmp_path / "out"))
    assert len(Dataset(tmp_path / "out")) == 6


# What it takes


def test_a_feature_of_ones_own_is_read_by_its_own_name(tmp_path: Path) -> None:
    """Whatever it is called, it is neither the image nor the mask."""
    mask = encode_tensor(np.ones((2, 2, 1), np.uint8))
    output = write([record_of("a", mask_raw=mask, pet_raw=b"own")], tmp_path / "out")
    assert Dataset(output, columns=["pet_raw"])[0] == {"pet_raw": b"own"}
    with pytest.raises(UsageError, match=r"no column 'pet'; choose one of: .*mask.*pet_raw"):
        Dataset(output, columns=["pet"])


def my_own_step(volume: Volume) -> Volume:
    """What users do to volumes in steps of their own."""
    return dataclasses.replace(volume, voxels=np.abs(volume.voxels))


def test_steps_make_the_records_of_a_build(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", 9, shape=SHAPE, split=("train", "train", "test"))
    options = {"rescale": "percentile:1,99", "clip": True, "orientation": "SPL"}
    build(manifest, tmp_path / "built", examples_per_shard=4, **options)
    with beam.Pipeline(options=make_options(2)) as pipeline:
        volumes = pipeline | ReadManifest(str(manifest)) | LoadVolume()
        (
            volumes
            | beam.Map(my_own_step)
            | Preprocess(orientation="SPL")
            | Rescale("percentile:1,99", clip=True)
            | EncodeExample()
            | WriteToTFRecord(str(tmp_path / "out"), examples_per_shard=4)
        )
    ours, theirs = (list(records_of(tmp_path / name)) for name in ("out", "built"))
    assert [payload for _, payload in ours] == [payload for _, payload in theirs]
    folder = manifest.parent
    for (cells, _), (built, _) in zip(ours, theirs, strict=True):
        assert cells == built | {"source": str(folder / built["source"])}
    infos = [read_info(str(tmp_path / name)) for name in ("out", "built")]
    assert infos[0].record_config == infos[1].record_config
    for of in ("shape", "dtype", "labelled"):
        assert getattr(infos[0], of) == getattr(infos[1], of)


@pytest.mark.parametrize("voxel_dtype", ["native", "uint8", "bfloat16"])
def test_readers_give_what_they_give_of_a_build(tmp_path: Path, voxel_dtype: str) -> None:
    names = ["a", "b", "c"]
    for seed, name in enumerate(names):
        write_image(tmp_path / f"{name}.nii", brain(SHAPE, seed), slope=0.5, inter=-3)
        write_image(tmp_path / f"{name}-seg.nii", (brain(SHAPE, seed) > 500).astype(np.uint8))
    rows = [{"path": f"{n}.nii", "seg": f"{n}-seg.nii", "participant_id": n} for n in names]
    manifest, columns = write_manifest(tmp_path / "m.csv", rows), Columns(mask="seg")
    build(manifest, tmp_path / "built", voxel_dtype=voxel_dtype, columns=columns)
    with beam.Pipeline(options=make_options()) as pipeline:
        volumes = pipeline | ReadManifest(str(manifest), columns=columns) | LoadVolume(mask_dtype="uint8")
        encoded = volumes | Rescale(voxel_dtype=voxel_dtype) | EncodeExample()
        encoded | WriteToTFRecord(str(tmp_path / "out"))
    assert read_info(str(tmp_path / "out")).mask_labels == (0, 1)
    wanted = ["image", "mask", "id", "affine"]
    datasets = [Dataset(tmp_path / name, columns=wanted) for name in ("out", "built")]
    for ours, theirs in zip(*datasets, strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in wanted)


def test_values_that_a_step_returns_are_not_scaled_again(tmp_path: Path) -> None:
    stored = random_voxels(SHAPE, "int16", 1)
    stored[0, 0, 0] = -(2**15)  # whose magnitude is no int16
    write_image(tmp_path / "a.nii", stored, slope=0.5, inter=-3)
    manifest = write_manifest(tmp_path / "m.csv", [{"path": "a.nii"}])

    def absolute(volume: Volume) -> Volume:
        values = np.abs(volume.scaling.apply(volume.voxels))
        return dataclasses.replace(volume, voxels=values, scaling=Scaling())

    with beam.Pipeline(options=make_options()) as pipeline:
        volumes = pipeline | ReadManifest(str(manifest)) | LoadVolume() | beam.Map(absolute)
        volumes | Rescale("none") | EncodeExample() | WriteToTFRecord(str(tmp_path / "out"))
    expected = np.abs(nibabel.load(tmp_path / "a.nii").get_fdata())
    assert np.array_equal(Dataset(tmp_path / "out")[0]["image"][..., 0], expected.astype(np.float32))


def test_examples_may_be_of_any_making(tmp_path: Path) -> None:
    image = random_voxels((4, 3, 2), "int16", 1)
    affine = np.diag([2, 2, 3, 1]).astype(np.float32)
    features = {"image_raw": encode_tensor(image), "affine": affine.ravel()}
    with_id = encode_example({**features, "id": b"b"})
    without = encode_example(features)
    output = write([("c", without), ("b", with_id)], tmp_path / "out")
    first, second = Dataset(output, columns=["image", "affine", "id"])
    assert (first["id"], second["id"]) == ("b", "c")
    assert np.array_equal(first["image"][..., 0], image)
    assert np.array_equal(second["affine"], affine)
    payloads = [payload for _, payload in records_of(output)]
    assert payloads == [with_id, encode_example({**features, "id": b"c"})]


class _Message:
    """As protobuf's messages are serialized."""

    def SerializeToString(self, *, deterministic: bool) -> bytes:  # noqa: N802
        assert deterministic
        return record_of("a").example


def test_an_example_may_be_a_message(tmp_path: Path) -> None:
    output = write([("a", _Message())], tmp_path / "out")
    assert [payload for _, payload in records_of(output)] == [record_of("a").example]


def test_a_dictionary_becomes_an_example(tmp_path: Path) -> None:
    mask = np.zeros((4, 3, 2), np.uint8)
    mask[1, 1] = 7
    image = np.asfortranarray(random_voxels((4, 3, 2), "int16", 1).astype(">i2"))
    given_ = {"image": image, "mask": mask, "label": 3, "site": "Zürich", "count": [1, -2], "raw": b"\x00"}
    output = write([("a", given_)], tmp_path / "out")
    ((cells, payload),) = records_of(output)
    features: dict[str, Any] = decode_example(payload)
    assert np.array_equal(decode_tensor(features["image_raw"]), image)
    assert bytes(features["site"]).decode() == "Zürich"
    assert features["count"].tolist() == [1, -2]
    assert bytes(features["raw"]) == b"\x00"
    assert features["label"].dtype == np.float32
    assert (cells["label"], cells["mask_labels"], cells["shape"]) == (3, [0, 7], [4, 3, 2])
    assert [cells[name] for name in ("affine", "source", "min", "row", "participant_id")] == [None] * 5
    (element,) = Dataset(output)
    assert sorted(element) == ["id", "image", "label"]
    (element,) = Dataset(output, columns=["image", "mask", "affine", "min", "site"])
    assert np.array_equal(element["mask"].reshape(mask.shape), mask)
    assert (element["affine"], element["min"], element["site"]) == (None, None, "Zürich".encode())
    info = read_info(str(output))
    assert not info.has_manifest
    assert info.features["count"] == "int64[2]"


def test_shapes_may_differ(tmp_path: Path) -> None:
    output = write(
        [("a", {"image": np.ones((2, 3, 4), np.float32)}), ("b", {"image": np.ones((3, 3, 3), np.float32)})],
        tmp_path / "out",
    )
    assert read_info(str(output)).shape is None
    assert [element["image"].shape for element in Dataset(output)] == [(2, 3, 4, 1), (3, 3, 3, 1)]


IMAGE = np.ones((2, 2, 2), np.float32)
MASK = np.ones((2, 2, 2), np.uint8)
TENSOR = encode_tensor(IMAGE)
LARGEST = float(np.finfo(np.float32).max)


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ([7], "an element is int, expected a Record, or a tuple of 2"),
        ([("a", 1, 2)], "an element is a tuple of 3, expected a Record, or a tuple of 2"),
        ([("a", 7)], "record 'a': is int, expected an Example, bytes or a dictionary"),
        ([("a", b"\x07")], "record 'a': not an Example"),
        (
            [("a", {"label": 1})],
            "record 'a': its Example has no feature image_raw, which is required; add a tensor",
        ),
        ([("a", {"image": IMAGE[0]})], r"record 'a': its image has the shape \(2, 2\), expected \(X, Y, Z\)"),
        ([("a", {"image": IMAGE.astype(complex)})], "record 'a': image is complex128, expected one of"),
        (
            [("a", {"image": IMAGE, "mask": IMAGE})],
            "record 'a': mask is float32, expected one of uint8, uint16",
        ),
        ([("a", {"image": IMAGE, "mask": IMAGE > 0})], "mask is bool, .*; convert it with astype"),
        (
            [("a", {"image": IMAGE, "mask": MASK[1:]})],
            r"record 'a': its mask is uint8 of \(1, 2, 2\), expected",
        ),
        (
            [("a", {"image": IMAGE, "x": None})],
            "record 'a': x is NoneType, expected numbers, a text or bytes",
        ),
        (
            [("a", {"image": IMAGE, "label": "ill"})],
            "record 'a': its feature label is bytes, expected one float",
        ),
        ([("", {"image": IMAGE})], "record '': its id is empty; give every record a unique id"),
        (
            [("a" * (1 << 20), {"image": IMAGE})],
            "takes 1,048,.* bytes, more than the 1,048,608 that readers accept of a record of this shape",
        ),
        ([(1, {"image": IMAGE})], "an element has the id 1, which is int; make it a str"),
        ([(b"a", {"image": IMAGE})], "an element has the id b'a', which is bytes; make it a str"),
        ([record_of("a", "no split")], "record 'a': its split is 'no split'"),
        ([dataclasses.replace(record_of("a"), id="b")], "record 'b': its Example has a different feature id"),
        (
            [("a", {"image": IMAGE}), ("b", {"image": IMAGE, "age": 3.0})],
            r"records '[ab]' and '[ab]' differ in features \(age: ",
        ),
        (
            [("a", {"image": IMAGE}), ("b", {"image": IMAGE.astype(np.float16)})],
            r"records '[ab]' and '[ab]' differ in dtype \(float",
        ),
        (
            [("a", {"image": IMAGE.astype(np.int16)}), ("b", {"image": IMAGE.astype(np.int32)})],
            r"records '[ab]' and '[ab]' differ in dtype \(int",
        ),
        (
            [("a", {"image": IMAGE}), ("b", {"image": IMAGE[..., None]})],
            r"records '[ab]' and '[ab]' differ in number of axes \([34], [34]\)",
        ),
        (
            [record_of(i) for i in ("b", "a", "b")],
            "1 id of more than one record: 'b'; give every record a unique id",
        ),
        ([record_of("a"), record_of("a", "test")], "1 id of more than one record: 'a'"),
        ([], "there are no records to write; check the steps before WriteToTFRecord"),
    ],
)
def test_what_is_no_dataset_is_refused(elements: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((VolumeError, UsageError), match=message):
        write(elements, tmp_path / "out")
    assert not (tmp_path / "out" / "dataset_info.json").exists()


@pytest.mark.parametrize(
    "ids", [["a", ""], ["a", "a"]], ids=["while parts are written", "with all ids known"]
)
def test_after_a_refusal_the_output_can_be_written(ids: list[str], tmp_path: Path) -> None:
    with pytest.raises((VolumeError, UsageError), match="give every record a unique id"):
        write([(name, {"image": IMAGE}) for name in ids], tmp_path / "out")
    write([record_of("a")], tmp_path / "out")
    assert stray_files(tmp_path / "out") == set()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        # What no feature holds
        ({"x": 2**63 + 5}, r"x holds 9223372036854775813, but integers are stored as int64, from -2\*\*63"),
        ({"x": np.uint64(2**63)}, "x holds 9223372036854775808, but"),
        ({"x": [2**63, 1]}, "x holds 9223372036854775808, but"),
        ({"x": [1, -(2**63) - 1]}, "x holds -9223372036854775809, but"),
        ({"x": 2**70}, "x holds 1180591620717411303424, but"),
        ({"x": [0.5, 1e300]}, r"x holds 1e\+300, which is beyond the range of float32"),
        ({"x": []}, "its feature x is empty; give it a value in every record, or drop it"),
        ({"x": [[1, 2], [3]]}, "x cannot be stored: .*inhomogeneous"),
        ({"x": np.ones((2, 3))}, r"x has the shape \(2, 3\), but a feature is a list of numbers"),
        ({"x": "\ud800"}, "x cannot be stored: .*surrogates"),
        ({"x": np.ma.masked_less([1, 2], 2)}, r"x is a masked array; fill it, such as with x.filled\(0\)"),
        ({"label": 1e300}, r"label holds 1e\+300, which is beyond the range of float32"),
        ({"label": np.inf}, "its label is inf; give a number of float32, or NaN if there is none"),
        ({"label": [1, 2]}, r"its feature label is float\[2\], expected one float"),
        # What readers would read otherwise
        ({"image": IMAGE.astype(np.float64) * 1e300}, "its image has voxels beyond the range of float32"),
        ({"image": np.ma.masked_less(IMAGE, 2)}, "image is a masked array; fill it"),
        ({"image": IMAGE > 0}, "image is bool, expected one of float32, .*; convert it with astype"),
        ({"image_raw": b""}, "the feature image_raw is given twice; drop one"),
        (
            {"scl_slope": 2.0},
            "the name scl_slope is reserved for how voxels were scaled; choose another name",
        ),
        ({"rescale_low": b"12345678"}, "the name rescale_low is reserved"),
        ({"affine": [2.0, 3.0]}, r"its feature affine is float\[2\], expected float\[16\]"),
        ({"affine": np.zeros((4, 4))}, r"its affine is \[0.0, .*which is singular or not finite"),
        ({"affine": np.diag([1, 1, np.nan, 1])}, "its affine is .*which is singular or not finite"),
        ({"zooms": 1.0}, r"its feature zooms is float, expected float\[3\]"),
        ({"zooms": [1.0, 0.0, 1.0]}, "its zooms are .*; give sizes above 0 in millimetres"),
        ({"zooms": [1.0, np.nan, 1.0]}, "its zooms are .*; give sizes above 0 in millimetres"),
        (
            {"zooms": [1.0, 1.0, 2.0], "affine": np.diag([1.0, 1, 1, 1])},
            r"its zooms are .*, and its affine has voxels of \[1.0, 1.0, 1.0\] mm",
        ),
    ],
)
def test_a_dictionary_that_would_be_read_otherwise_is_refused(features: dict[str, Any], message: str) -> None:
    with pytest.raises(VolumeError, match=f"^record 'a': {message}"):
        examine(to_record(("a", {"image": IMAGE, **features})))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            {"image_raw": IMAGE.tobytes()},
            "its feature image_raw is not a tensor of real numbers as tf.io.seria",
        ),
        (
            {"image_raw": b"\x08\x0a" + TENSOR[0][2:] + bytes(TENSOR[1])},
            "image_raw is not a tensor .*: not a tensor of float32",
        ),
        ({"x": np.zeros(0, np.float32)}, "its feature x is empty"),
        ({"label": np.array([1])}, "its feature label is int64, expected one float"),
        ({"label": np.array([-np.inf], np.float32)}, "its label is -inf"),
        ({"affine": np.arange(16, dtype=np.float32)}, "its affine is .*, which is singular"),
        (
            {"rescale_low": np.ones(1, np.float32)},
            "its feature rescale_low is reserved for 8 bytes, a float64",
        ),
        (
            {"scl_slope": bytes(8), "scl_inter": bytes(8)},
            "scl_slope scales voxels that are stored as in a file",
        ),
    ],
)
def test_an_example_that_would_be_read_otherwise_is_refused(features: dict[str, Any], message: str) -> None:
    with pytest.raises(VolumeError, match=f"^record 'a': .*{message}"):
        examine(record_of("a", **features))


def test_an_id_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(VolumeError, match=r"record '\\ud800': .*surrogates not allowed"):
        to_record(("\ud800", {"image": IMAGE}))


def test_an_empty_feature_is_named() -> None:
    entry = b"\x0a\x01q\x12\x00"
    with pytest.raises(VolumeError, match="record 'a': feature 'q': holds 0 kinds of values instead of 1"):
        to_record(("a", b"\x0a" + bytes([len(entry) + 2]) + b"\x0a" + bytes([len(entry)]) + entry))


def test_numbers_at_the_ends_of_their_range_are_kept(tmp_path: Path) -> None:
    integers, floats = [-(2**63), 2**63 - 1], [-LARGEST, np.inf, np.nan]
    given_ = {"image": IMAGE, "x": integers, "y": floats, "label": LARGEST, "affine": np.eye(4, dtype=int)}
    output = write([("a", given_)], tmp_path / "out")
    ((_, payload),) = records_of(output)
    features: dict[str, Any] = decode_example(payload)
    assert features["x"].tolist() == integers
    assert np.array_equal(features["y"], floats, equal_nan=True)
    (example,) = Dataset(output, columns=["image", "label", "affine"])
    assert example["label"] == LARGEST
    assert np.array_equal(example["affine"], np.eye(4))
    assert verify_dataset(str(output)).problems == ()


def test_a_record_that_disagrees_with_its_entry_is_refused(tmp_path: Path) -> None:
    (record,) = EncodeExampleFn().process(volume_of(tmp_path, RecordConfig()))
    examine(record)
    features: dict[str, Any] = decode_example(record.example)
    voxels = decode_tensor(features["image_raw"])
    for changed, message in (
        ({"label": np.array([99], np.float32)}, r"the feature label is \[99.0\], but its entry of the index"),
        ({"image_raw": encode_tensor(voxels[:-1])}, r"the shape of image_raw is \(\d+, "),
        ({"image_raw": encode_tensor(voxels.astype(np.float64))}, "the dtype of image_raw is float64, but"),
        ({"affine": np.eye(4, dtype=np.float32).ravel()}, "the feature affine is"),
        ({"zooms": np.full(3, 9, np.float32)}, "the feature zooms is"),
        ({"intensity_max": np.zeros(1, np.float32)}, "the feature intensity_max is"),
    ):
        kept = {name: (f,) if isinstance(f, memoryview) else f for name, f in features.items()}
        edited = dataclasses.replace(record, example=encode_example(kept | changed))
        with pytest.raises(VolumeError, match=f"^record '{record.id}': {message}"):
            examine(edited)
    lacking = encode_example({name: f for name, f in kept.items() if name != "label"})
    with pytest.raises(VolumeError, match="the feature label is missing, but"):
        examine(dataclasses.replace(record, example=lacking))


def volume_of(tmp_path: Path, rescale: RecordConfig | None = None) -> Volume:
    manifest = write_cohort(tmp_path / "cohort", 1, shape=SHAPE)
    row = next(iter(read_manifest(str(manifest)).rows([0])))
    volume = load_volume(row, str(manifest.parent), record=rescale)
    return rescale_volume(volume, rescale) if rescale else volume


OWN_STEPS = [
    ({"voxels": lambda v: v.astype(">f4")}, "in another order; return numpy.ascontiguousarray"),
    ({"voxels": lambda v: v[::-1]}, "in another order; return numpy.ascontiguousarray"),
    (
        {"voxels": lambda v: np.ma.masked_less(v, 100)},
        r"masked voxels; fill them, such as with voxels.filled",
    ),
    ({"voxels": lambda v: v.astype(np.complex64)}, "complex64 voxels; return integers, float32 or float64"),
    ({"voxels": lambda v: v.astype(object)}, "object voxels; return integers, float32 or float64"),
    ({"voxels": lambda v: v > 100}, "bool voxels; return integers, float32 or float64"),
    ({"voxels": lambda v: v.astype(np.float16)}, "float16 voxels; return integers, float32 or float64"),
    ({"voxels": lambda v: v.tolist()}, "voxels of type list; return a numpy array"),
    ({"voxels": lambda v: v[:0]}, r"voxels of shape \(0, "),
    ({"affine": lambda a: a.tolist()}, r"an affine of type list; return a finite \(4, 4\) array"),
    ({"affine": lambda a: a * 0}, "the affine .* that is not singular"),
    ({"scaling": lambda s: None}, "a scaling of type NoneType; return the Scaling that it got"),
    ({"mask": lambda m: np.ones(SHAPE, bool)}, "a mask of bool; return an array of uint8 or uint16"),
    ({"mask": lambda m: np.ones((1, 1, 1), np.uint8)}, r"a mask of shape \(1, 1, 1\)"),
]


@pytest.mark.parametrize(("change", "message"), OWN_STEPS)
@pytest.mark.parametrize(
    "step", [PreprocessFn(RecordConfig(orientation="LPS")), RescaleFn(), EncodeExampleFn()]
)
def test_volumes_of_own_steps_are_checked(
    tmp_path: Path, step: Any, change: dict[str, Any], message: str
) -> None:
    volume = volume_of(tmp_path, RecordConfig() if isinstance(step, EncodeExampleFn) else None)
    if isinstance(step, EncodeExampleFn) and message.startswith("float16"):
        message = "its voxels are float16, but Rescale made them float32; put steps that change voxels before"
    changed = {name: make(getattr(volume, name)) for name, make in change.items()}
    step.follows_any = True
    with pytest.raises(VolumeError, match=message) as caught:
        list(step.process(dataclasses.replace(volume, **changed)))
    assert volume.row.path in str(caught.value)


def test_voxel_sizes_follow_an_affine_that_an_own_step_changes(tmp_path: Path) -> None:
    volume = volume_of(tmp_path)
    step = RescaleFn()
    step.follows_any = True
    (rescaled,) = step.process(dataclasses.replace(volume, affine=np.diag([2, 3, 4, 1])))
    assert rescaled.zooms == (2, 3, 4)
    assert rescaled.affine.dtype == np.float64
    (rescaled,) = step.process(volume)
    assert rescaled.zooms == volume.zooms


@pytest.mark.parametrize(
    ("rescale", "change"),
    [
        (RecordConfig(), lambda v: v * 10),
        (RecordConfig(), lambda v: v * np.float32(np.nan)),
        (RecordConfig(rescale="zscore"), lambda v: v + 1),
        (RecordConfig(voxel_dtype="native"), lambda v: v + 1),
        (RecordConfig(voxel_dtype="bfloat16"), lambda v: v / 2),
    ],
)
def test_voxels_that_change_after_rescaling_are_refused(
    tmp_path: Path, rescale: RecordConfig, change: Any
) -> None:
    volume = volume_of(tmp_path, rescale)
    step = EncodeExampleFn()
    step.follows_any = True
    assert len(list(step.process(volume))) == 1
    with pytest.raises(VolumeError, match=r"but Rescale made them range from .* before Rescale"):
        list(step.process(dataclasses.replace(volume, voxels=change(volume.voxels))))


def fortran_if_odd(volume: Volume) -> Volume:
    is_odd = volume.row.example_id[-1] in "13"
    return dataclasses.replace(volume, voxels=np.asfortranarray(volume.voxels)) if is_odd else volume


def test_a_volume_that_an_own_step_spoils_is_a_failure(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", 4, shape=SHAPE)
    with beam.Pipeline(options=make_options()) as pipeline:
        volumes = pipeline | ReadManifest(str(manifest)) | LoadVolume() | beam.Map(fortran_if_odd)
        rescaled = volumes | Rescale().with_failures()
        rescaled.done | EncodeExample() | WriteToTFRecord(str(tmp_path / "out"))
        texts = rescaled.failures | "Text" >> beam.Map(lambda f: f"{f.row.example_id} {f.stage} {f.message}")
        texts | beam.io.WriteToText(str(tmp_path / "failures"), shard_name_template="")
    assert Dataset(tmp_path / "out").ids == ["sub-0000", "sub-0002"]
    lines = sorted((tmp_path / "failures").read_text().splitlines())
    assert [line[:16] for line in lines] == ["sub-0001 Rescale", "sub-0003 Rescale"]
    assert all("the step before Rescale returned voxels in another order" in line for line in lines)


def test_a_volume_that_was_not_rescaled_is_refused(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", 1, shape=SHAPE)
    pipeline = beam.Pipeline(options=make_options())
    pipeline | ReadManifest(str(manifest)) | LoadVolume() | EncodeExample()
    with pytest.raises(VolumeError, match=r"was not rescaled; add Rescale\(\) before EncodeExample"):
        pipeline.run()


def test_unbounded_input_is_refused(tmp_path: Path) -> None:
    pipeline = beam.Pipeline()
    with pytest.raises(UsageError, match="WriteToTFRecord requires bounded input"):
        pipeline | test_stream.TestStream() | WriteToTFRecord(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": ""}, "^output is empty; was a variable not set"),
        ({"output": "a\0b"}, "^output is .*which has a NUL character"),
        ({"output": "a\udcff"}, r"^b'a\\xff' is not UTF-8 text; correct it"),
        ({"output": None}, "^output is None; give a path"),
        ({"output": b"out"}, "^output is b'out'; give a path"),
        ({"examples_per_shard": 0}, "^examples_per_shard is 0; it must be at least 1"),
        ({"examples_per_shard": 1.5}, "^examples_per_shard is 1.5; give a whole number"),
        ({"examples_per_shard": True}, "^examples_per_shard is True; give a whole number"),
        ({"examples_per_shard": "x"}, "^examples_per_shard is 'x'; give a whole number"),
        ({"num_shards": 2.0}, "^num_shards is 2.0; give a whole number"),
        (
            {"examples_per_shard": 1, "num_shards": 1},
            "^give one of examples_per_shard and num_shards, not both",
        ),
        ({"compression": "bzip2"}, "^compression is 'bzip2'; choose one of: gzip, none"),
        ({"compression_level": 9}, "^compression_level is 9; choose one of: 0, 1, 2, 3"),
        (
            {"compression": "none", "compression_level": 1},
            '^compression_level has no effect with compression="no',
        ),
        ({"overwrite": "false"}, "^overwrite is 'false'; give True or False"),
        ({"overwrite": 1}, "^overwrite is 1; give True or False"),
        ({"temp_location": ""}, "^temp_location is empty; was a variable not set"),
        ({"temp_location": 5}, "^temp_location is 5; give a path"),
    ],
)
def test_options_are_checked_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        WriteToTFRecord(**{"output": "out", **options})


def test_options_may_be_of_numpy_or_text(tmp_path: Path, reference: Path) -> None:
    options = {"examples_per_shard": np.int64(PER_SHARD), "compression_level": "2", "overwrite": np.False_}
    write(map(arrays_of, IDS), tmp_path / "out", temp_location=tmp_path / "parts", **options)
    assert_complete(tmp_path / "out", reference)


def test_shards_have_a_size_of_their_own_where_none_is_asked_for(tmp_path: Path) -> None:
    (shard,) = read_info(str(write(map(arrays_of, IDS), tmp_path / "out"))).shards
    assert shard.num_examples == len(IDS)


@pytest.mark.parametrize("compression", ["gzip", "none"])
def test_level_and_compression_have_an_effect(tmp_path: Path, reference: Path, compression: str) -> None:
    level = {"compression_level": 1} if compression == "gzip" else {}
    output = write(map(arrays_of, IDS), tmp_path / "out", compression=compression, **level)
    assert read_info(str(output)).record_config.compression == compression
    assert [p for _, p in records_of(output)] == [p for _, p in records_of(reference)]
    assert contents(output) != contents(reference)


# Failures


def test_failures_are_an_output_where_they_are_asked_for(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", 5, shape=SHAPE)
    (manifest.parent / "sub-0003.nii.gz").unlink()
    write_image(manifest.parent / "sub-0001.nii.gz", np.zeros(SHAPE, np.int16))
    lines = []
    with beam.Pipeline(options=make_options()) as pipeline:
        loaded = pipeline | ReadManifest(str(manifest)) | LoadVolume().with_failures()
        rescaled = loaded.done | Rescale().with_failures()
        rescaled.done | EncodeExample() | WriteToTFRecord(str(tmp_path / "out"))
        lines = (loaded.failures, rescaled.failures) | beam.Flatten()
        texts = lines | "Text" >> beam.Map(lambda f: f"{f.row.example_id} {f.stage} {f.error}")
        texts | beam.io.WriteToText(str(tmp_path / "failures"), shard_name_template="")
    assert Dataset(tmp_path / "out").ids == ["sub-0000", "sub-0002", "sub-0004"]
    assert sorted((tmp_path / "failures").read_text().splitlines()) == [
        "sub-0001 Rescale VolumeError",
        "sub-0003 LoadVolume VolumeError",
    ]


def test_a_volume_that_fails_fails_the_pipeline(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", 3, shape=SHAPE)
    (manifest.parent / "sub-0001.nii.gz").unlink()
    pipeline = beam.Pipeline(options=make_options())
    records = pipeline | ReadManifest(str(manifest)) | LoadVolume() | Rescale() | EncodeExample()
    records | WriteToTFRecord(str(tmp_path / "out"))
    with pytest.raises(VolumeError, match=r"sub-0001\.nii\.gz"):
        pipeline.run()
    assert not (tmp_path / "out" / "dataset_info.json").exists()


# The output


def test_a_dataset_is_replaced_only_where_that_is_asked_for(reference: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    write_arrays(output, IDS[:5])
    before = contents(output)
    with pytest.raises(Exception, match="holds a dataset; choose another output, or use overwrite=True"):
        write_arrays(output, IDS)
    assert contents(output) == before
    assert stray_files(output) == set()
    write_arrays(output, IDS, overwrite=True)
    assert read_info(str(output)).revision == 2
    assert contents(output) == contents(reference)
    assert stray_files(output) == set()


def test_what_no_reader_accepts_is_not_published(tmp_path: Path) -> None:
    output = tmp_path / "out"
    write_arrays(output, IDS[:5])
    before = contents(output)
    info = dataclasses.replace(read_info(str(output)), features={"x": "float[0]"})
    with pytest.raises(
        OutputError, match=r"not published, because no reader .*: features\.x is 'float\[0\]'"
    ):
        publish_info(info, str(output))
    assert contents(output) == before


@pytest.mark.parametrize("name", ["file", "dangling", "file/below", "n" * 300, "/proc/out"])
@pytest.mark.parametrize("parameter", ["output", "temp_location"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, parameter: str, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    paths = {"output": tmp_path / "out", parameter: tmp_path / name}
    with pytest.raises(OutputError, match=f"^{parameter} is {paths[parameter]}, which cannot be written: "):
        write(map(arrays_of, IDS[:2]), **paths)


def test_a_dataset_stays_readable_where_its_replacement_fails(tmp_path: Path) -> None:
    output = tmp_path / "out"
    write_arrays(output, IDS[:5])
    before = contents(output)
    with pytest.raises(Exception, match="of more than one record"):
        write_arrays(output, [*IDS, IDS[3]], overwrite=True)
    assert contents(output) == before
    assert Dataset(output).ids == IDS[:5]
    write_arrays(output, IDS, overwrite=True)
    assert stray_files(output) == set()


def test_a_build_and_a_pipeline_do_not_replace_each_other(reference: Path, tmp_path: Path) -> None:
    manifest, output = write_cohort(tmp_path / "cohort", 3, shape=SHAPE), tmp_path / "out"
    write_arrays(output, IDS[:5])
    with pytest.raises(OutputError, match="built with different options or rows"):
        build(manifest, output)
    build(manifest, output, overwrite=True)
    assert stray_files(output) == set()
    with pytest.raises(Exception, match="holds a dataset"):
        write_arrays(output, IDS)
    with open_build(make_config(manifest, output, overwrite=True, rescale="zscore")):
        pass
    write_arrays(output, IDS, overwrite=True)
    assert contents(output) == contents(reference)
    assert stray_files(output) == set()
    unfinished = tmp_path / "unfinished"
    with open_build(make_config(manifest, unfinished)):
        pass
    with pytest.raises(OutputError, match="holds an unfinished build"):
        write_arrays(unfinished, IDS)
    write_arrays(unfinished, IDS, overwrite=True)
    assert stray_files(unfinished) == set()


def test_an_output_that_a_build_holds_is_busy(tmp_path: Path) -> None:
    with (
        lock.hold(str(tmp_path / "OUTPUT")),
        pytest.raises(OutputBusyError, match=r"/OUTPUT: .*; wait for it, or choose another output\b"),
    ):
        write_arrays(tmp_path / "OUTPUT", IDS)


def test_files_of_others_are_not_replaced(tmp_path: Path, reference: Path) -> None:
    foreign = tmp_path / "out" / "train-00000-of-00009.tfrecord.gz"
    foreign.parent.mkdir()
    foreign.write_bytes(b"mine")
    with pytest.raises(Exception, match=r"holds train-00000-of-00009.tfrecord.gz but no dataset_info.json"):
        write_arrays(tmp_path / "out", IDS)
    assert foreign.read_bytes() == b"mine"
    foreign = tmp_path / "index-only" / "index" / "train-00000-of-00001.parquet"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"mine")
    with pytest.raises(Exception, match=r"holds index/train-00000-of-00001.parquet but no dataset_info.json"):
        write_arrays(tmp_path / "index-only", IDS)
    assert foreign.read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["train-00000-of-00009.tfrecord.gz", "index/train-00000-of-00001.parquet"])
def test_shards_of_others_are_not_left_beside_new_ones(tmp_path: Path, name: str) -> None:
    output, images = tmp_path / "out", write_cohort(tmp_path / "images", 1)
    (output / name).parent.mkdir(parents=True)
    (output / name).write_bytes(b"mine")
    for further in ({}, {"overwrite": True}):
        refusal = (
            rf"holds {name} but no dataset_info.json; choose another (OUTPUT|output), or delete it first"
        )
        with pytest.raises(Exception, match=refusal):
            write_arrays(output, IDS, **further)
        with pytest.raises(OutputError, match=refusal):
            build(images, output, **further)
        assert (output / name).read_bytes() == b"mine"
    (output / name).unlink()
    write_arrays(output, IDS, overwrite=True)
    assert Dataset(output).ids == IDS
    assert verify_dataset(str(output)).ok


def test_the_later_of_two_pipelines_stops_the_earlier_one(tmp_path: Path) -> None:
    target = target_of(tmp_path / "out")
    (started,) = StartFn(target).process(target.token)
    writer = WritePartsFn(target)
    writer.start_bundle()
    _, key = writer.process(arrays_of("a"))
    (traits,) = writer.finish_bundle()
    write_arrays(target.output, IDS[:4])
    with pytest.raises(OutputBusyError, match="another pipeline has started to write here"):
        list(PlanFn(target).process((None, [started[1], key.value[1], traits.value.value[1]])))
    assert Dataset(target.output).ids == IDS[:4]


def test_a_pipeline_whose_parts_another_one_removes_is_told_why(tmp_path: Path) -> None:
    target = target_of(tmp_path / "out")
    ((_, revision),) = StartFn(target).process(target.token)
    writing, written = WritePartsFn(target), WritePartsFn(target)
    for writer in (writing, written):
        writer.start_bundle()
        placed, key = writer.process(arrays_of("a"))
    (traits,) = written.finish_bundle()
    (plan,) = PlanFn(target).process((None, [revision, key.value[1], traits.value.value[1]]))
    other = dataclasses.replace(target, token="1" * 16)
    list(StartFn(other).process(other.token))
    with pytest.raises(OutputBusyError, match="another pipeline has started to write here"):
        list(writing.finish_bundle())
    (shard,) = plan.shards
    with pytest.raises(OutputBusyError, match="another pipeline has started to write here"):
        list(CommitRecordsFn(target).process((shard, [placed]), plan))


def test_of_two_pipelines_that_start_at_once_the_later_one_finishes(tmp_path: Path) -> None:
    """Both have written parts before either has taken over the output."""
    one, other = (target_of(tmp_path / "out", token=digit * 16) for digit in "12")
    noted = {}
    for target in (one, other):
        writer = WritePartsFn(target)
        writer.setup()
        writer.start_bundle()
        placed, key = writer.process(arrays_of("a"))
        (traits,) = writer.finish_bundle()
        noted[target.token] = placed, [key.value[1], traits.value.value[1]]
    revisions = {t.token: next(iter(StartFn(t).process(t.token)))[1] for t in (one, other)}
    with pytest.raises(OutputBusyError, match="another pipeline has started to write here"):
        list(PlanFn(one).process((None, [revisions[one.token], *noted[one.token][1]])))
    placed, keys = noted[other.token]
    (plan,) = PlanFn(other).process((None, [revisions[other.token], *keys]))
    (shard,) = plan.shards
    assert list(CommitRecordsFn(other).process((shard, [placed]), plan))


def test_one_pipeline_writes_an_output_once(tmp_path: Path) -> None:
    for _ in range(2):
        pipeline = beam.Pipeline()
        records = pipeline | beam.Create([record_of("a")])
        records | WriteToTFRecord(str(tmp_path / "out"))
        records | "other" >> WriteToTFRecord(str(tmp_path / "other"))
        with pytest.raises(UsageError, match="this pipeline has two WriteToTFRecord into it; give each its"):
            records | "again" >> WriteToTFRecord(f"{tmp_path}/out/")


def test_the_root_of_the_file_system_is_refused() -> None:
    with pytest.raises(OutputError, match="output is /, the root of the file system; choose a folder below"):
        beam.Pipeline() | beam.Create([record_of("a")]) | WriteToTFRecord("/")


@pytest.mark.parametrize(
    "change",
    [
        {"shards": ["mine.txt"]},
        {"root": "/"},
        {"revision": 0},
        {"revision": 10**9},
        {"shards": [f"train-{'0' * 5000}-of-00001.tfrecord"]},
        {"published": ["failures-r0.jsonl"]},
        {"surplus": 1},
    ],
)
def test_a_note_that_no_pipeline_writes_is_none(
    tmp_path: Path, reference: Path, change: dict[str, Any]
) -> None:
    output = tmp_path / "out"
    (output / ".build").mkdir(parents=True)
    (output / "mine.txt").write_text("mine")
    note = {"token": "0" * 16, "root": ".build", "revision": 1, "published": [], "shards": []}
    (output / ".build" / "write.json").write_text(json.dumps(note | change))
    write_arrays(output, IDS)
    assert contents(output) == contents(reference)
    assert stray_files(output) == {"mine.txt"}


def test_splits_that_differ_in_letter_case_are_refused(tmp_path: Path) -> None:
    records = [record_of(split, split) for split in ("train", "Train")]
    with pytest.raises(Exception, match=r"split 'Train' and of split 'train', whose files are the same"):
        write(records, tmp_path / "out")


def test_after_the_last_revision_there_is_none(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "dataset_info.json").write_text('{"revision": 999999999}')
    with pytest.raises(Exception, match=r"holds files of revision 999,999,999, and there can be none after"):
        write_arrays(output, IDS, overwrite=True)
    images = write_cohort(tmp_path / "images", 1)
    with pytest.raises(
        OutputError, match=r"holds files of revision 999,999,999, and there can be none after"
    ):
        build(images, output, overwrite=True)


@pytest.mark.parametrize("note", ["{", '{"token": 1}', None])
def test_a_note_of_anybody_removes_no_file_of_others(
    tmp_path: Path, reference: Path, note: str | None
) -> None:
    output = tmp_path / "out"
    (output / ".build").mkdir(parents=True)
    (output / "mine.txt").write_text("mine")
    facts = {"token": "0" * 16, "root": str(tmp_path), "revision": 1, "published": [], "shards": ["mine.txt"]}
    (output / ".build" / "write.json").write_text(note or json.dumps(facts))
    (output / ".build" / "plan.json").write_text("{")
    write_arrays(output, IDS, overwrite=True)
    assert contents(output) == contents(reference)
    assert stray_files(output) == {"mine.txt"}


def test_a_note_is_not_read_through_a_link(tmp_path: Path) -> None:
    output = tmp_path / "out"
    write_arrays(output, IDS[:4])
    (output / ".build").mkdir()
    (output / ".build" / "write.json").symlink_to(tmp_path / "elsewhere.json")
    (tmp_path / "elsewhere.json").write_text("{}")
    with pytest.raises(Exception, match=r"write.json: is a symbolic link, which a build does not follow"):
        write_arrays(output, IDS, overwrite=True)
    assert Dataset(output).ids == IDS[:4]


def test_verify_excuses_only_the_shards_that_an_unfinished_replacement_names(tmp_path: Path) -> None:
    output = tmp_path / "out"
    write_arrays(output, IDS[:4])
    shard = "train-00000-of-00001-r2.tfrecord.gz"
    SavedWrite("0" * 16, ".build", 2, (), (shard,)).write(str(output))
    for name in (shard, "index/train-00000-of-00001-r2.parquet", f"{shard}.{'0' * 32}.tmp"):
        (output / name).touch()
    assert verify_dataset(str(output)).problems == ()
    (output / "x.tfrecord").touch()
    (problem,) = verify_dataset(str(output)).problems
    assert problem.startswith("x.tfrecord: not in dataset_info.json")


def test_parts_may_be_elsewhere(reference: Path, tmp_path: Path) -> None:
    temp = tmp_path / "temp"
    write_arrays(tmp_path / "out", shuffled(IDS), temp_location=str(temp))
    assert_complete(tmp_path / "out", reference)
    assert list(temp.iterdir()) == []


def test_a_killed_pipeline_is_started_again(reference: Path, tmp_path: Path) -> None:
    server = fork_server()
    arguments = {"ids": IDS, "examples_per_shard": PER_SHARD}
    whole = server.run("write", folder=tmp_path / "whole", output=tmp_path / "whole", **arguments)
    assert whole.status == 0, whole.result
    step = max(1, whole.operations // 6)
    for kill_at in range(1, whole.operations + 1, step):
        output = tmp_path / f"out-{kill_at}"
        dead = server.run("write", folder=output, kill_at=kill_at, output=output, **arguments)
        assert dead.was_killed
        if (output / "dataset_info.json").exists():  # all but the cleaning was done
            assert contents(output) == contents(reference)
            write_arrays(output, IDS, overwrite=True)
            assert contents(output) == contents(reference)
            assert stray_files(output) == set()
        else:
            write_arrays(output, IDS[:-1])  # what it has left of another number of shards goes
            assert Dataset(output).ids == IDS[:-1]
            assert stray_files(output) == set()


def test_verify_finds_nothing_wrong(reference: Path, tmp_path: Path, run: Any) -> None:
    run("verify", reference)
    manifest = write_cohort(tmp_path / "cohort", 5, shape=SHAPE)
    with beam.Pipeline(options=make_options()) as p:
        records = p | ReadManifest(str(manifest)) | LoadVolume() | Rescale("zscore") | EncodeExample()
        records | WriteToTFRecord(str(tmp_path / "out"))
    run("verify", tmp_path / "out")
    run("inspect", tmp_path / "out")
    output = write(
        [("a", {"image": IMAGE, "label": 2}), ("b", {"image": IMAGE, "label": np.nan})], tmp_path / "any"
    )
    run("verify", output)
    run("inspect", output)
    assert cli.main(["diff", str(output), str(reference)]) == 1
    assert cli.main(["card", str(output)]) == 0


def test_a_record_without_an_affine_is_no_image(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="record 'case-003' has no affine, without which"):
        read_volume(str(reference), "case-003")
    with pytest.raises(DatasetError, match=r"record 'case-000' cannot be saved: .* no usable affine"):
        Dataset(reference).save_nifti(0, np.zeros((5, 4, 3)), tmp_path / "a.nii")
    affine = np.diag([2.0, 2, 3, 1])
    output = write([("a", {"image": IMAGE, "affine": affine})], tmp_path / "out")
    stored = read_volume(str(output), "a")
    assert np.array_equal(stored.affine, affine)
    assert stored.zooms == (2, 2, 3)
    assert np.array_equal(stored.voxels, IMAGE)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("affine", np.diag([3.0, 1, 1, 1]).ravel().tolist(), "affine is .*, but the index has"),
        ("affine", None, "affine is .*, but the index has no value for it"),
        ("zooms", [5.0, 5.0, 5.0], "the index has voxel sizes of 5 5 5, expected 2 2 2"),
        ("zooms", None, "the index has voxel sizes of none, expected 2 2 2"),
        ("label", 7.0, "feature label is missing, but the index has a value for it"),
        ("dtype", "int16", "voxels are float32, but the index has int16"),
        ("dtype", None, "voxels are float32, but the index has None"),
        ("mean", 1.0, "the index has no min"),
    ],
)
def test_what_no_record_says_is_not_believed(
    tmp_path: Path, column: str, value: object, message: str
) -> None:
    affine = np.diag([2, 2, 2, 1]).astype(np.float32)
    write([record_of("a", affine=affine.ravel())], tmp_path / "out")
    assert verify_dataset(str(tmp_path / "out")).problems == ()
    edit_index(tmp_path / "out", set_cell(column, 0, value))
    assert any(re.search(message, text) for text in verify_dataset(str(tmp_path / "out")).problems)
    with pytest.raises(DatasetError, match="run beam-nifti verify"):
        read_volume(str(tmp_path / "out"), "a")


def test_a_record_of_which_little_is_known_is_described(tmp_path: Path) -> None:
    output = write([record_of("a")], tmp_path / "out")
    text = format_description(describe_record(str(output), "a"))
    assert re.search(r"^affine *$", text, re.M)
    assert re.search(r"^shape +2×2×1$", text, re.M)


def test_memory_is_that_of_a_record(tmp_path: Path) -> None:
    """Of further records only ids, places and rows of the index are kept."""
    megabyte, peaks = 1 << 20, []
    for count in (60, 180):
        ended = fork_server().run(
            "write_large", folder=tmp_path, output=tmp_path / f"out-{count}", count=count
        )
        assert ended.status == 0, ended.result
        peaks.append(ended.peak_bytes)
    # The 260 further records are 260 MB.
    assert peaks[1] - peaks[0] < 16 * megabyte
