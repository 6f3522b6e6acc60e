"""Files that others wrote, through `load_dataset(…, layout=…)`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beam_nifti.errors import DatasetError, UsageError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
tf = pytest.importorskip("tensorflow")

from beam_nifti.reader import load_dataset  # noqa: E402

pytestmark = pytest.mark.tf

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPE = (4, 3, 2)


def nobrainer(kind: str, **options: Any) -> Any:
    """Files that nobrainer wrote, two examples and one."""
    return load_dataset(GOLDEN / f"nobrainer-{kind}-*.tfrec", layout="nobrainer", **options)


def example(**features: Any) -> bytes:
    """A serialized Example; a list is a feature of several values."""
    kinds = {bytes: "bytes_list", float: "float_list", int: "int64_list"}
    lists = {name: value if isinstance(value, list) else [value] for name, value in features.items()}
    found = {
        name: tf.train.Feature(**{kinds[type(values[0])]: {"value": values}})
        for name, values in lists.items()
    }
    return tf.train.Example(features={"feature": found}).SerializeToString()


def write_plain(
    path: Path, shapes: list[tuple[int, ...]], dtype: str = "float32", **labels: Any
) -> list[Any]:
    """What a loop of `tf.io.TFRecordWriter` writes; the volumes."""
    volumes = [np.random.default_rng(i).normal(9, 3, shape).astype(dtype) for i, shape in enumerate(shapes)]
    with tf.io.TFRecordWriter(str(path), "GZIP" if path.suffix == ".gz" else "") as writer:
        for i, volume in enumerate(volumes):
            numbers = {name: label(i) for name, label in labels.items()}
            writer.write(example(image_raw=tf.io.serialize_tensor(volume).numpy(), **numbers))
    return volumes


@pytest.mark.parametrize(("kind", "axes"), [("scalar", ()), ("volume", (*SHAPE, 1))])
def test_nobrainer_s_files_as_nobrainer_reads_them(kind: str, axes: tuple[int, ...]) -> None:
    batches = nobrainer(kind, batch_size=2)
    x, y = tf.TensorSpec((None, *SHAPE, 1), tf.float32), tf.TensorSpec((None, *axes), tf.float32)
    assert batches.element_spec == (x, y)
    assert int(batches.cardinality()) == tf.data.UNKNOWN_CARDINALITY
    read = [np.concatenate(cells) for cells in zip(*batches.as_numpy_iterator(), strict=True)]
    with np.load(GOLDEN / "nobrainer.npz") as expected:
        order = [0, 2, 1]  # one of each file in turn
        for name, cells in zip("xy", read, strict=True):
            known = expected[f"{kind}_{name}"][order]
            np.testing.assert_array_equal(cells.reshape(known.shape), known)
        assert len(np.unique(read[1])) == (3 if kind == "scalar" else 4)


def test_nobrainer_s_files_in_batches_and_epochs() -> None:
    labels = [float(y) for _, y in nobrainer("scalar", repeat=2, shuffle=True, seed=1)]
    assert [sorted(labels[:3]), sorted(labels[3:])] == [[0.5, 1.5, 2.5]] * 2
    (batch,) = nobrainer("volume", batch_size=2, drop_remainder=True)
    assert [cells.shape for cells in batch] == [(2, *SHAPE, 1)] * 2
    (batch,) = nobrainer("volume", batch_size=2, drop_remainder=True, channels_first=True)
    assert [cells.shape for cells in batch] == [(2, 1, *SHAPE)] * 2


@pytest.mark.parametrize("name", ["a.tfrecords.gz", "a.tfrecords"])
def test_plain_files(tmp_path: Path, name: str) -> None:
    volumes = write_plain(tmp_path / name, [SHAPE] * 3, label=lambda i: i + 0.25)
    ((x, y),) = load_dataset(tmp_path / "*.tfrecords*", batch_size=4, layout="plain")
    np.testing.assert_array_equal(x[..., 0], volumes)
    assert y.numpy().tolist() == [0.25, 1.25, 2.25]


def test_plain_files_of_other_kinds(tmp_path: Path) -> None:
    numbers = write_plain(tmp_path / "int", [SHAPE] * 2, "int16", label=lambda i: i)
    ((x, y),) = load_dataset(tmp_path / "int", batch_size=2, layout="plain")
    assert (x.dtype, y.dtype, y.numpy().tolist()) == (tf.float32, tf.int64, [0, 1])
    np.testing.assert_array_equal(x[..., 0], numbers)
    images = write_plain(tmp_path / "images", [(*SHAPE, 2)] * 2)
    (x,) = load_dataset(tmp_path / "images", batch_size=2, layout="plain")
    np.testing.assert_array_equal(x, images)
    (x,) = load_dataset(tmp_path / "images", batch_size=2, layout="plain", channels_first=True)
    np.testing.assert_array_equal(x, np.moveaxis(images, -1, 1))


def write_medicai(path: Path, shapes: list[tuple[int, ...]], *names: str) -> list[dict[str, Any]]:
    """What medicai's tutorial on BraTS reads: raw voxels, shapes, and features that no reader needs."""
    cases = []
    with tf.io.TFRecordWriter(str(path)) as writer:
        for seed, shape in enumerate(shapes):
            random = np.random.default_rng(seed)
            case = {name: random.normal(9, 3, shape).astype("float32") for name in names}
            case["label"] = random.integers(0, 5, shape).astype("float32")
            features: dict[str, Any] = {}
            for name, volume in case.items():
                features |= {f"{name}_raw": volume.tobytes(), f"{name}_shape": list(volume.shape)}
                features |= {f"{name}_affine": [1.0] * 16, f"{name}_filename": f"{name}.nii".encode()}
            writer.write(example(**features))
            cases.append(case)
    return cases


def test_files_of_medicai_s_tutorial(tmp_path: Path) -> None:
    modalities = ("t1", "flair", "t2", "t1ce")
    cases = write_medicai(tmp_path / "training_shard_0.tfrec", [SHAPE] * 2, *modalities)
    ((x, y),) = load_dataset(tmp_path / "*.tfrec", batch_size=2, layout="medicai")
    assert (x.shape, y.shape, y.dtype) == ((2, *SHAPE, 4), (2, *SHAPE, 1), tf.float32)
    for read, labels, case in zip(x, y, cases, strict=True):
        expected = np.stack([case[name] for name in ("flair", "t1", "t1ce", "t2")], axis=-1)
        np.testing.assert_array_equal(read, expected)
        np.testing.assert_array_equal(labels[..., 0], case["label"])
    ((x, y),) = load_dataset(tmp_path / "*.tfrec", batch_size=2, layout="medicai", channels_first=True)
    assert (x.shape, y.shape) == ((2, 4, *SHAPE), (2, 1, *SHAPE))
    small, large = write_medicai(tmp_path / "ct", [(2, 2, 1), SHAPE], "image")
    ((x, y),) = load_dataset(tmp_path / "ct", batch_size=2, layout="medicai", pad=True)
    np.testing.assert_array_equal(x[0, :2, :2, :1, 0], small["image"])
    np.testing.assert_array_equal(y[1, ..., 0], large["label"])


def test_volumes_of_different_shapes(tmp_path: Path) -> None:
    small, large = write_plain(tmp_path / "mixed", [(2, 2, 1), SHAPE], label=float)
    options: dict[str, Any] = {"layout": "plain", "batch_size": 2}
    ((x, _),) = load_dataset(tmp_path / "mixed", pad=True, **options)
    np.testing.assert_array_equal(x[0, :2, :2, :1, 0], small)
    np.testing.assert_array_equal(x[1, ..., 0], large)
    ((x, _),) = load_dataset(tmp_path / "mixed", ragged=True, **options)
    np.testing.assert_array_equal(x[0].to_tensor()[..., 0], small)
    with pytest.raises(tf.errors.OpError, match=r"another shape than the first one; use pad=True, or ragged"):
        list(load_dataset(tmp_path / "mixed", layout="plain"))


def test_files_that_are_not_of_the_layout(tmp_path: Path) -> None:
    write_plain(tmp_path / "plain", [SHAPE], label=float)
    write_plain(tmp_path / "named", [SHAPE], label=lambda i: b"patient")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("no TFRecord at all, but long enough")
    with tf.io.TFRecordWriter(str(tmp_path / "short")) as writer:
        fields = {"feature/rank": 1, "feature/shape/dim0": 3, "feature/dtype": b"float32"}
        writer.write(example(**fields, **{"feature/value": b"1234"}))
    with tf.io.TFRecordWriter(str(tmp_path / "half")) as writer:
        writer.write(example(**fields, **{"feature/value": bytes(12)}))
    volume = {"label_raw": bytes(12), "label_shape": [3, 1, 1]}
    for name, other in [
        ("bytes", {"t1_raw": bytes(6), "t1_shape": [3, 1, 1]}),
        ("shapes", {"t1_raw": bytes(12), "t1_shape": [3, 1, 1], "t2_raw": bytes(8), "t2_shape": [2, 1, 1]}),
        ("alone", {}),
    ]:
        with tf.io.TFRecordWriter(str(tmp_path / name)) as writer:
            writer.write(example(**volume, **other))
    for name, layout, message in [
        ("bytes", "medicai", r"bytes: its first record is not of .*t1_raw has 6 bytes for \(3, 1, 1\) of"),
        ("shapes", "medicai", r"images t1, t2 have the shapes \[\(2, 1, 1\), \(3, 1, 1\)\]"),
        ("alone", "medicai", r"images \(none\) have"),
        (
            "plain",
            "nobrainer",
            r"plain: its first record has image_raw, label, but not feature/value, which .* requires; choose",
        ),
        ("named", "plain", "named: its first record is not of layout='plain' .*label is not one number"),
        ("absent*", "plain", r"absent\*: no file matches; give the glob"),
        ("empty", "plain", "empty: none of the 1 files holds a record"),
        ("text", "plain", "text: its first record cannot be read .*; is it a TFRecord"),
        ("short", "nobrainer", r"short: its first record is not of .* has 4 bytes for \(3,\) of float32"),
        ("half", "nobrainer", "half: its first record is not of .*label/rank"),
    ]:
        with pytest.raises(DatasetError, match=message):
            load_dataset(tmp_path / name, layout=layout)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"split": "test"},
            "split 'test' requires a dataset_info.json, but layout='nobrainer' has none",
        ),
        ({"where": "age > 1"}, "where requires a dataset_info.json"),
        ({"start": 1}, "start requires a dataset_info.json"),
        ({"as_dict": True}, "as_dict requires a dataset_info.json"),
        ({"label": "age"}, "label requires a dataset_info.json"),
        ({"engine": "indexed"}, "engine='indexed' requires a dataset_info.json"),
        ({"layout": "tfds"}, "layout is 'tfds'; choose 'plain' or 'nobrainer' or 'medicai'"),
    ],
)
def test_arguments_that_need_a_dataset(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_dataset(GOLDEN / "nobrainer-scalar-*", **{"layout": "nobrainer", **options})
