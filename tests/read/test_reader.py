from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest

from beam_nifti.config import BuildConfig, RecordConfig, Sharding
from beam_nifti.errors import DatasetError, UsageError
from tests.images import (
    REAL_DTYPES,
    Array,
    brain,
    random_voxels,
    write_cohort,
    write_image,
    write_manifest,
)

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
tf = pytest.importorskip("tensorflow")

from beam_nifti.reader import get_batched_dataset, load_dataset  # noqa: E402

pytestmark = pytest.mark.tf

RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
SHAPE = (6, 5, 4)
ENGINES = ["indexed", "sequential"]
Build = Callable[..., str]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build a manifest: `build(manifest, sharding=..., rescale=..., ...)` -> the dataset's folder."""

    def run(manifest: Path, sharding: Sharding | None = None, **options: Any) -> str:
        from apache_beam.options.pipeline_options import PipelineOptions

        from beam_nifti.pipeline.build import open_build, run_build

        names = {f.name for f in dataclasses.fields(RecordConfig)}
        of_record = {k: options.pop(k) for k in names & options.keys()}
        output = str(tmp_path_factory.mktemp("dataset"))
        config = BuildConfig(str(manifest), output, RecordConfig(**of_record), sharding=sharding, **options)
        with open_build(config) as plan:
            run_build(plan, PipelineOptions([f"--runner={RUNNER}"]))
        return output

    return run


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of twelve images; a label is the number of its image."""
    return write_cohort(tmp_path_factory.mktemp("cohort"), 12, shape=SHAPE)


@pytest.fixture(scope="module")
def dataset(build: Build, cohort: Path) -> str:
    """Three shards of five, five and two examples."""
    return build(cohort, Sharding(examples_per_shard=5))


def formula(path: Path) -> Array:
    """The original procedure's preprocessing."""
    image: Any = nib.load(path)
    x = np.asanyarray(image.dataobj).astype(np.float64)
    return ((x - x.min()) / (x.max() - x.min())).astype(np.float32)


def preprocessed(manifest: Path) -> list[Array]:
    return [formula(path) for path in sorted(manifest.parent.glob("*.nii*"))]


def labels(batches: Any) -> list[int]:
    return [int(label) for _, y in batches for label in np.atleast_1d(y.numpy())]


def bits(volumes: Sequence[Array]) -> list[bytes]:
    return [np.ascontiguousarray(v).tobytes() for v in volumes]


def original_reader(pattern: str, batch_size: int) -> Any:
    """The five steps of the original procedure, written without this package."""

    def parse(serialized: Any) -> Any:
        features = {
            "label": tf.io.FixedLenFeature([], tf.float32),
            "image_raw": tf.io.FixedLenFeature([], tf.string),
        }
        example = tf.io.parse_single_example(serialized, features)
        image = tf.io.parse_tensor(example["image_raw"], tf.float32)
        return tf.expand_dims(image, 3), example["label"]

    files = tf.data.Dataset.list_files(pattern, shuffle=False)
    records = tf.data.TFRecordDataset(files, compression_type="GZIP")
    return records.map(parse).batch(batch_size)


def test_the_original_procedure_reads_the_output(dataset: str, cohort: Path) -> None:
    batches = list(original_reader(f"{dataset}/train-*.tfrecord.gz", 4))
    assert [x.shape for x, _ in batches] == [(4, *SHAPE, 1)] * 3
    assert labels(batches) == list(range(12))
    parsed = [x for batch, _ in batches for x in batch.numpy()[..., 0]]
    assert bits(parsed) == bits(preprocessed(cohort))


def test_the_original_procedure_reads_records_of_several_members(build: Build, tmp_path: Path) -> None:
    shape = (64, 48, 40)
    manifest = write_cohort(tmp_path / "cohort", 3, shape=shape)
    dataset = build(manifest, Sharding(num_shards=1))
    index = pq.read_table(f"{dataset}/index/train-00000-of-00001.parquet")
    assert min(map(len, index["member_lengths"].to_pylist())) > 3
    batches = list(original_reader(f"{dataset}/train-*.tfrecord.gz", 2))
    assert [x.shape for x, _ in batches] == [(2, *shape, 1), (1, *shape, 1)]
    assert labels(batches) == [0, 1, 2]
    parsed = [x for batch, _ in batches for x in batch.numpy()[..., 0]]
    assert bits(parsed) == bits(preprocessed(manifest))


def test_beam_reads_the_output(dataset: str) -> None:
    import apache_beam as beam
    from apache_beam.testing.test_pipeline import TestPipeline
    from apache_beam.testing.util import assert_that, equal_to

    pattern = f"{dataset}/train-*.tfrecord.gz"
    files = sorted(tf.io.gfile.glob(pattern))
    records = [r.numpy() for r in tf.data.TFRecordDataset(files, "GZIP")]
    assert len(records) == 12
    with TestPipeline(runner=RUNNER) as pipeline:
        assert_that(pipeline | beam.io.ReadFromTFRecord(pattern), equal_to(records))


def test_load_dataset_gives_every_volume_with_its_label(dataset: str, cohort: Path) -> None:
    expected = preprocessed(cohort)
    seen = {}
    for x, y in load_dataset(dataset, batch_size=5):
        assert x.dtype == y.dtype == tf.float32
        seen.update({int(label): image.tobytes() for label, image in zip(y, x.numpy(), strict=True)})
    assert seen == dict(enumerate(bits(expected)))


def test_shapes_and_cardinality_are_known_before_reading(dataset: str) -> None:
    float32 = tf.float32
    single = load_dataset(dataset)
    assert single.element_spec == (tf.TensorSpec((*SHAPE, 1), float32), tf.TensorSpec((), float32))
    assert int(single.cardinality()) == 12
    batched = load_dataset(dataset, batch_size=5)
    x, y = tf.TensorSpec((None, *SHAPE, 1), float32), tf.TensorSpec((None,), float32)
    assert batched.element_spec == (x, y)
    assert int(batched.cardinality()) == 3


def test_drop_remainder_leaves_out_the_last_batch_and_fixes_its_size(dataset: str) -> None:
    batches = load_dataset(dataset, batch_size=5, drop_remainder=True)
    x, y = tf.TensorSpec((5, *SHAPE, 1), tf.float32), tf.TensorSpec((5,), tf.float32)
    assert batches.element_spec == (x, y)
    assert len(labels(batches)) == 10 == 5 * int(batches.cardinality())


def test_the_order_is_the_same_in_every_epoch(dataset: str) -> None:
    in_turn = [0, 5, 10, 1, 6, 11, 2, 7, 3, 8, 4, 9]
    for engine, order in (("indexed", list(range(12))), ("sequential", in_turn)):
        batches = load_dataset(dataset, batch_size=5, engine=engine)
        assert [labels(batches), labels(batches)] == [order, order]


@pytest.mark.parametrize("engine", ENGINES)
def test_shuffle_gives_every_epoch_another_order(dataset: str, engine: str) -> None:
    batches = load_dataset(dataset, batch_size=5, shuffle=True, seed=1, engine=engine)
    epochs = [labels(batches), labels(batches)]
    assert epochs[0] != epochs[1]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2


def test_shuffle_reaches_beyond_the_window_of_examples(build: Build, tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", 100, shape=(3, 2, 1))
    output = build(manifest, Sharding(num_shards=100))
    batches = load_dataset(output, shuffle=True, seed=1, engine="sequential")
    assert max(labels(batches.take(8))) >= 64 + 8


@pytest.mark.parametrize("engine", ENGINES)
def test_seed_decides_the_orders(dataset: str, engine: str) -> None:
    def epochs(seed: int) -> list[list[int]]:
        batches = load_dataset(dataset, shuffle=True, seed=seed, engine=engine)
        return [labels(batches), labels(batches)]

    assert epochs(1) == epochs(1)
    assert epochs(1) != epochs(2)


def test_a_path_object_and_a_trailing_slash_name_the_same_dataset(dataset: str) -> None:
    expected = labels(load_dataset(dataset))
    assert labels(load_dataset(Path(dataset))) == labels(load_dataset(f"{dataset}/")) == expected


def test_more_shards_than_are_open_at_a_time(build: Build, cohort: Path) -> None:
    output = build(cohort, Sharding(examples_per_shard=1))
    assert labels(load_dataset(output, batch_size=4, engine="sequential")) == list(range(12))


def test_splits(build: Build, tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", 5, split=["train", "test"])
    output = build(manifest, Sharding(num_shards=1))
    assert labels(load_dataset(output)) == [0, 2, 4]
    assert labels(load_dataset(output, "test", batch_size=2)) == [1, 3]


def test_an_uncompressed_dataset(build: Build, dataset: str, cohort: Path) -> None:
    plain = build(cohort, Sharding(examples_per_shard=5), compression="none")
    for (x, y), (x_gzip, y_gzip) in zip(load_dataset(plain), load_dataset(dataset), strict=True):
        assert x.numpy().tobytes() == x_gzip.numpy().tobytes()
        assert y == y_gzip


def test_an_unlabelled_dataset_gives_images_alone(build: Build, tmp_path: Path) -> None:
    for i in range(3):
        write_image(tmp_path / f"{i}.nii.gz", brain(SHAPE, seed=i))
    manifest = write_manifest(tmp_path / "manifest.tsv", [{"path": f"{i}.nii.gz"} for i in range(3)])
    batches = load_dataset(build(manifest), batch_size=2)
    assert batches.element_spec == tf.TensorSpec((None, *SHAPE, 1), tf.float32)
    images = [x for batch in batches for x in batch.numpy()]
    assert bits(images) == bits(preprocessed(manifest))


def test_labels_that_do_not_exist_are_not_nan(build: Build, tmp_path: Path) -> None:
    write_image(tmp_path / "0.nii.gz", brain(SHAPE))
    output = build(write_manifest(tmp_path / "manifest.tsv", [{"path": "0.nii.gz"}]))
    for options in ({"columns": ["image", "label"], "as_dict": True}, {"where": "label > 3"}):
        with pytest.raises(UsageError, match=r"has no labels; (drop it|use other columns)"):
            load_dataset(output, **options)


def test_a_condition_that_selects_nothing_is_logged(dataset: str, caplog: pytest.LogCaptureFixture) -> None:
    assert len(load_dataset(dataset, where="label > 99")) == 0
    assert "where is 'label > 99', which selects none of 12 records" in caplog.text


@pytest.mark.parametrize("voxel_dtype", ["float32", "native"])
def test_volumes_of_different_shapes(build: Build, tmp_path: Path, voxel_dtype: str) -> None:
    shapes = [SHAPE, (3, 4, 5), (7, 2, 2)]
    for i, shape in enumerate(shapes):
        write_image(tmp_path / f"{i}.nii.gz", brain(shape, seed=i))
    rows = [{"path": f"{i}.nii.gz", "label": i} for i in range(3)]
    manifest = write_manifest(tmp_path / "manifest.tsv", rows)
    output = build(manifest, allow_mixed_shapes=True, voxel_dtype=voxel_dtype)
    expected = preprocessed(manifest)
    for engine, batch_size in itertools.product(ENGINES, (None, 1)):
        batches = load_dataset(output, batch_size=batch_size, engine=engine)
        lead = () if batch_size is None else (None,)
        assert batches.element_spec[0].shape.as_list() == [*lead, None, None, None, 1]
        images = [x.numpy().reshape(shape) for (x, _), shape in zip(batches, shapes, strict=True)]
        assert bits(images) == bits(expected)
        with pytest.raises(UsageError, match=r"batch_size is 2, but .* different shapes; use batch_size=1"):
            load_dataset(output, batch_size=2, engine=engine)
        (x, y), (rest, _) = load_dataset(output, batch_size=2, pad=True, engine=engine)
        assert (x.shape, y.numpy().tolist()) == ((2, 6, 5, 5, 1), [0, 1])
        assert rest.shape == (1, 7, 2, 2, 1)
        for image, volume in zip(x.numpy()[..., 0], expected, strict=False):
            within = tuple(map(slice, volume.shape))
            assert bits([image[within]]) == bits([volume])
            image[within] = 0
            assert not image.any()


def test_a_shard_without_records(build: Build, tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", 3)
    (manifest.parent / "sub-0001.nii.gz").write_bytes(b"damaged")
    output = build(manifest, Sharding(examples_per_shard=1), max_bad_fraction=0.5)
    batches = load_dataset(output, batch_size=2)
    assert int(batches.cardinality()) == 1
    assert labels(batches) == [0, 2]


# Native voxels


@dataclass(frozen=True)
class Scans:
    """Images of every dtype, and the float32 dataset of all of them."""

    folder: Path
    names: dict[str, list[str]]
    minmax: dict[str, bytes]
    unscaled: dict[str, bytes]


def scans_of(dtype: str) -> list[tuple[Array, dict[str, Any]]]:
    """Voxels and headers that take every way through the arithmetic."""
    kind = np.dtype(dtype)
    voxels = random_voxels(SHAPE, dtype, seed=1)
    narrow = random_voxels(SHAPE, dtype, seed=2) // (64 if kind.kind in "iu" else 1)
    scans: list[tuple[Array, dict[str, Any]]] = [
        (voxels, {}),
        (voxels, {"byte_order": ">"}),
        (narrow.astype(kind), {}),
        (voxels, {"slope": 0.37, "inter": -11.25}),
        (voxels, {"slope": -2.5, "inter": 3e4, "byte_order": ">"}),
        (voxels, {"slope": 1.0, "inter": 0.1}),
        # No float32 is near enough to these.
        (voxels, {"slope": 1 / 3, "inter": 1e-3 / 7, "version": 2}),
    ]
    if kind.kind == "f":
        subnormal = voxels.copy()
        subnormal[0] = np.linspace(-3e-38, 3e-38, subnormal[0].size).reshape(subnormal[0].shape)
        subnormal[1, 0, 0] = 2.0
        below = np.abs(subnormal) * kind.type(1e-3)
        zeros = np.abs(voxels)
        zeros[0], zeros[1], zeros[2] = 0.0, -0.0, 1e-42
        lone = np.abs(voxels)
        lone[0], lone[0, 1, 1] = 0.0, -0.0
        tiny = np.linspace(-1e-40, 3e-40, voxels.size).astype(kind).reshape(SHAPE)
        scans += [
            (subnormal, {}),
            (below, {"slope": -1.5}),
            (zeros, {}),
            (lone, {}),
            (lone[::-1], {}),
            (tiny, {}),
        ]
    return scans


@pytest.fixture(scope="module")
def scans(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Scans:
    folder = tmp_path_factory.mktemp("scans")
    names: dict[str, list[str]] = {}
    for dtype in REAL_DTYPES:
        for i, (voxels, header) in enumerate(scans_of(dtype)):
            name = f"{dtype}-{i}.nii"
            write_image(folder / name, voxels, **header)
            names.setdefault(dtype, []).append(name)
    every = [name for of_dtype in names.values() for name in of_dtype]
    manifest = write_manifest(folder / "all.tsv", manifest_rows(every))
    stored = {}
    for method in ("minmax", "none"):
        x = load_dataset(build(manifest, Sharding(num_shards=1), rescale=method))
        stored[method] = {every[int(y)]: image.numpy().tobytes() for image, y in x}
    return Scans(folder, names, stored["minmax"], stored["none"])


def manifest_rows(names: Sequence[str]) -> list[dict[str, object]]:
    return [{"path": name, "label": i} for i, name in enumerate(names)]


@pytest.mark.parametrize("rescale", ["minmax", "none"])
@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_native_voxels_give_the_bits_of_float32(build: Build, scans: Scans, dtype: str, rescale: str) -> None:
    names = scans.names[dtype]
    manifest = write_manifest(scans.folder / f"{dtype}-{rescale}.tsv", manifest_rows(names))
    output = build(manifest, Sharding(num_shards=1), voxel_dtype="native", rescale=rescale)
    stored = scans.minmax if rescale == "minmax" else scans.unscaled
    for engine, batch_size in (("sequential", None), ("indexed", None), ("indexed", 1)):
        read = load_dataset(output, batch_size=batch_size, engine=engine)
        assert read.element_spec[0].shape[-4:] == (*SHAPE, 1)
        assert read.element_spec[0].dtype == tf.float32
        for x, y in read:
            name = names[int(y.numpy().item())]
            expected = np.frombuffer(stored[name], np.float32)
            np.testing.assert_array_equal(x.numpy().ravel(), expected, err_msg=name)
            assert x.numpy().tobytes() == stored[name], f"{name}: signs of zeros differ"


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("int16", {"rescale": "percentile:5,95", "rescale_within": "nonzero", "clip": True}),
        ("float32", {"rescale": "window:-20,300.5", "clip": True}),
        ("int16", {"rescale": "zscore"}),
        ("float32", {"rescale": "minmax", "rescale_within": "above:0"}),
    ],
    ids=["percentile", "window", "zscore", "minmax"],
)
def test_native_voxels_give_the_bits_of_float32_with_every_method(
    build: Build, tmp_path: Path, dtype: str, options: dict[str, Any]
) -> None:
    images: list[dict[str, Any]] = [{}, {"slope": -1 / 3, "inter": 100.7}, {"slope": 0.5, "inter": -200.0}]
    for i, header in enumerate(images):
        write_image(tmp_path / f"{i}.nii", (brain(SHAPE, seed=i) - 100).astype(dtype), version=2, **header)
    manifest = write_manifest(tmp_path / "m.csv", manifest_rows([f"{i}.nii" for i in range(len(images))]))
    native, stored = (build(manifest, voxel_dtype=d, **options) for d in ("native", "float32"))
    expected = [x.numpy().tobytes() for x, _ in load_dataset(stored)]
    assert len(expected) == len(images)
    for engine in ENGINES:
        assert [x.numpy().tobytes() for x, _ in load_dataset(native, engine=engine)] == expected


def test_voxels_of_every_dtype_are_read_as_float32(build: Build, cohort: Path) -> None:
    import ml_dtypes

    rounded = {
        "float16": lambda x: x.astype(np.float16).astype(np.float32),
        "bfloat16": lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32),
        "uint8": lambda x: np.rint(x.astype(np.float64) * 255).astype(np.float32) / np.float32(255),
    }
    for (dtype, round_), engine in itertools.product(rounded.items(), ENGINES):
        read = load_dataset(build(cohort, voxel_dtype=dtype), batch_size=12, engine=engine)
        assert read.element_spec[0] == tf.TensorSpec((None, *SHAPE, 1), tf.float32)
        ((x, y),) = read
        order = np.argsort(y.numpy())
        assert bits(x.numpy()[order, ..., 0]) == bits([round_(v) for v in preprocessed(cohort)])


def test_the_float32_volumes_follow_the_formula(scans: Scans) -> None:
    for name, stored in scans.minmax.items():
        volume = np.frombuffer(stored, np.float32).reshape(SHAPE)
        np.testing.assert_array_equal(volume, formula(scans.folder / name), name)
        assert not np.signbit(volume).any(), f"{name}: a -0.0, which depends on the processor"


@pytest.mark.filterwarnings("ignore:overflow")  # in the mean and deviation that the index keeps
@pytest.mark.filterwarnings("ignore:invalid value")
def test_native_voxels_whose_range_is_wider_than_float64(build: Build, tmp_path: Path) -> None:
    voxels = np.linspace(-1.0, 1.0, 120).reshape(SHAPE) * 1.7e308
    write_image(tmp_path / "wide.nii", voxels)
    manifest = write_manifest(tmp_path / "manifest.tsv", manifest_rows(["wide.nii"]))
    ((x, _),) = load_dataset(build(manifest, voxel_dtype="native"))
    ((stored, _),) = load_dataset(build(manifest))
    assert x.numpy().tobytes() == stored.numpy().tobytes()
    np.testing.assert_allclose(x.numpy().ravel(), np.linspace(0, 1, 120), atol=1e-7)


# Training


def test_a_network_learns_from_it(dataset: str) -> None:
    keras = tf.keras
    keras.utils.set_random_seed(1)
    network = keras.Sequential(
        [
            keras.Input((*SHAPE, 1)),
            keras.layers.Conv3D(4, 3, strides=2, padding="same", activation="relu"),
            keras.layers.GlobalAveragePooling3D(),
            keras.layers.Dense(1),
        ]
    )
    network.compile(optimizer=keras.optimizers.Adam(0.05), loss="mse")
    train = load_dataset(dataset, batch_size=4, shuffle=True, seed=1)
    before = network.evaluate(train, verbose=0)
    losses = network.fit(train, epochs=2, shuffle=False, verbose=0).history["loss"]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert network.evaluate(train, verbose=0) < before


# From files alone


def test_get_batched_dataset(dataset: str, cohort: Path) -> None:
    batches = get_batched_dataset(f"{dataset}/train-*.tfrecord.gz", 5)
    x, y = tf.TensorSpec((None, None, None, None, 1), tf.float32), tf.TensorSpec((None,), tf.float32)
    assert batches.element_spec == (x, y)
    assert [x.shape for x, _ in batches] == [(5, *SHAPE, 1), (5, *SHAPE, 1), (2, *SHAPE, 1)]
    assert labels(batches) == list(range(12))
    images = [image for batch, _ in batches for image in batch.numpy()]
    assert bits(images) == bits(preprocessed(cohort))


def test_get_batched_dataset_keeps_the_order_of_a_list(dataset: str) -> None:
    first, _, last = sorted(tf.io.gfile.glob(f"{dataset}/*.tfrecord.gz"))
    assert labels(get_batched_dataset([last, first], 4)) == [10, 11, 0, 1, 2, 3, 4]


def test_get_batched_dataset_refuses_what_is_not_there(dataset: str) -> None:
    with pytest.raises(DatasetError, match=r"test-\*: no file matches; check the folder"):
        get_batched_dataset(f"{dataset}/test-*", 4)
    with pytest.raises(DatasetError, match=r"absent\.gz: no such file"):
        get_batched_dataset([f"{dataset}/train-00000-of-00003.tfrecord.gz", "absent.gz"], 4)
    with pytest.raises(DatasetError, match="list of files is empty"):
        get_batched_dataset([], 4)
    with pytest.raises(UsageError, match="batch_size is 0; it must be at least 1"):
        get_batched_dataset(f"{dataset}/*.gz", 0)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"drop_remainder": True}, "give a batch_size"),
        ({"seed": 1}, "seed is 1, but nothing is shuffled; add shuffle=True"),
    ],
)
def test_arguments_that_do_not_fit_together(dataset: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_dataset(dataset, **arguments)


def test_a_scheme_that_nothing_serves() -> None:
    with pytest.raises(DatasetError, match="nowhere:// is not supported here"):
        load_dataset("nowhere://a/b")
    with pytest.raises(DatasetError, match=r"nowhere://a/b: .*drop engine, or install beam-nifti\[io\]"):
        load_dataset("nowhere://a/b", engine="sequential")


def test_what_cannot_be_read_is_not_missing(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").mkdir()
    with pytest.raises(DatasetError, match=r"dataset_info.json: cannot be read .*Is a directory"):
        load_dataset(tmp_path, engine="sequential")
