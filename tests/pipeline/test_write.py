"""WriteToTFRecord on its own: what it takes, what it writes, and that nothing but its input decides that."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing import test_stream
from apache_beam.transforms.window import FixedWindows, TimestampedValue
from apache_beam.utils.windowed_value import WindowedValue
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_nifti.cli import main as cli
from beam_nifti.config import Columns, Sharding
from beam_nifti.errors import DatasetError, OutputBusyError, OutputError, UsageError, VolumeError
from beam_nifti.inspection.extract import read_volume
from beam_nifti.inspection.verify import verify_dataset
from beam_nifti.pipeline import lock
from beam_nifti.pipeline.build import open_build
from beam_nifti.pipeline.build_note import WriteNote
from beam_nifti.pipeline.publish import publish_info
from beam_nifti.pipeline.write import PlanFn, StartFn, WritePartsFn, _Target
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
from beam_nifti.volume import Volume
from tests.build_helpers import (
    CUTTING_RUNNER,
    PER_SHARD,
    SHAPE,
    arrays_of,
    assert_complete,
    build,
    contents,
    fork_server,
    make_config,
    make_options,
    stray_files,
    write_arrays,
)
from tests.datasets import records_of
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


def target_of(output: Path) -> _Target:
    return _Target(str(output), f"{output}/.build", "0" * 16, Sharding(PER_SHARD), "gzip", 2, False)


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


def test_examples_may_be_of_any_making(tmp_path: Path) -> None:
    image = random_voxels((4, 3, 2), "int16", 1)
    features = {"image_raw": encode_tensor(image), "affine": np.arange(16, dtype=np.float32)}
    with_id = encode_example({**features, "id": b"b"})
    without = encode_example(features)
    output = write([("c", without), ("b", with_id)], tmp_path / "out")
    first, second = Dataset(output, columns=["image", "affine", "id"])
    assert (first["id"], second["id"]) == ("b", "c")
    assert np.array_equal(first["image"][..., 0], image)
    assert np.array_equal(second["affine"], np.arange(16.0).reshape(4, 4))
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


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ([7], "an element is int, expected a Record or"),
        ([("a", 7)], "record 'a': is int, expected an Example, bytes or a dictionary"),
        ([("a", b"\x07")], "record 'a': not an Example"),
        ([("a", {"label": 1})], "record 'a': its Example has no feature image_raw, a tensor as"),
        ([("a", {"image": IMAGE[0]})], r"record 'a': its image has the shape \(2, 2\), expected \(X, Y, Z\)"),
        ([("a", {"image": IMAGE.astype(complex)})], "record 'a': image is complex128, expected one of"),
        ([("a", {"image": IMAGE, "mask": IMAGE})], "record 'a': its mask is float32 of"),
        (
            [("a", {"image": IMAGE, "x": None})],
            "record 'a': x is NoneType, expected numbers, a text or bytes",
        ),
        (
            [("a", {"image": IMAGE, "label": "ill"})],
            "record 'a': its feature label is bytes, expected one float",
        ),
        ([("", {"image": IMAGE})], "record '': .*give every record an id"),
        ([record_of("a", "no split")], "record 'a': its split is 'no split'"),
        ([dataclasses.replace(record_of("a"), id="b")], "record 'b': its Example has a different feature id"),
        (
            [("a", {"image": IMAGE}), ("b", {"image": IMAGE, "age": 3.0})],
            r"records '[ab]' and '[ab]' differ in features \(age: ",
        ),
        (
            [("a", {"image": IMAGE}), ("b", {"image": IMAGE.astype(np.float16)})],
            r"records '[ab]' and '[ab]' differ in options \(voxel_dtype: float",
        ),
        (
            [("a", {"image": IMAGE.astype(np.int16)}), ("b", {"image": IMAGE.astype(np.int32)})],
            r"records '[ab]' and '[ab]' differ in dtype \(int",
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
    write([record_of("a")], tmp_path / "out")
    assert stray_files(tmp_path / "out") == set()


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
            "^compression_level has no effect with compression no",
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
    what = "OUTPUT" if parameter == "output" else "temp_location"
    with pytest.raises(OutputError, match=f"^{what} is {paths[parameter]}, which cannot be written: "):
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
    with lock.hold(str(tmp_path / "out")), pytest.raises(OutputBusyError):
        write_arrays(tmp_path / "out", IDS)


def test_files_of_others_are_not_replaced(tmp_path: Path, reference: Path) -> None:
    foreign = tmp_path / "out" / "train-00000-of-00009.tfrecord.gz"
    foreign.parent.mkdir()
    foreign.write_bytes(b"mine")
    with pytest.raises(Exception, match=r"holds train-00000-of-00009.tfrecord.gz but no dataset_info.json"):
        write_arrays(tmp_path / "out", IDS)
    assert foreign.read_bytes() == b"mine"


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
    WriteNote("0" * 16, ".build", 2, (), (shard,)).write(str(output))
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
    affine = np.diag([2.0, 2, 3, 1])
    output = write([("a", {"image": IMAGE, "affine": affine})], tmp_path / "out")
    stored = read_volume(str(output), "a")
    assert np.array_equal(stored.affine, affine)
    assert stored.zooms == (2, 2, 3)
    assert np.array_equal(stored.voxels, IMAGE)


def test_memory_is_that_of_a_record(tmp_path: Path) -> None:
    """Of further records only ids, places and rows of the index are kept."""
    megabyte, peaks = 1 << 20, []
    for count in (20, 140):
        ended = fork_server().run(
            "write_large", folder=tmp_path, output=tmp_path / f"out-{count}", count=count
        )
        assert ended.status == 0, ended.result
        peaks.append(ended.peak_bytes)
    # The 120 further records are 120 MB.
    assert peaks[1] - peaks[0] < 16 * megabyte
