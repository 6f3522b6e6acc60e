"""Datasets among other datasets: combined, in Keras, and gone; and the arguments that numpy gives."""

from __future__ import annotations

import gc
import json
import os
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_nifti.errors import DatasetError, UsageError
from beam_nifti.random_access import Dataset
from tests.build_helpers import build
from tests.datasets import edit_info
from tests.images import write_cohort

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
tf = pytest.importorskip("tensorflow")

from beam_nifti.reader import get_batched_dataset, load_dataset, state_after  # noqa: E402

pytestmark = pytest.mark.tf

ENGINES = ("indexed", "sequential")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five records of one shard, with the labels 0 to 4."""
    folder = tmp_path_factory.mktemp("dataset")
    build(write_cohort(folder / "cohort", 5, shape=(5, 4, 3)), folder / "out")
    return folder / "out"


def label_list(elements: Any) -> list[int]:
    return [int(label) for _, y in elements for label in np.atleast_1d(y.numpy())]


def concatenate(a: Any, b: Any) -> Any:
    return a.concatenate(b)


def alternate(a: Any, b: Any) -> Any:
    return tf.data.Dataset.choose_from_datasets([a, b], tf.data.Dataset.range(6).map(lambda i: i % 2))


def sample(a: Any, b: Any) -> Any:
    return tf.data.Dataset.sample_from_datasets([a, b], [1.0, 0.0], stop_on_empty_dataset=True)


def nest(a: Any, b: Any) -> Any:
    return tf.data.Dataset.range(2).flat_map(lambda i: a if i == 0 else b)


@pytest.mark.parametrize(
    "engines", [("indexed", "indexed"), ("indexed", "sequential"), ("sequential", "indexed")], ids="-".join
)
@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        (concatenate, [0, 1, 2, 3, 4, 2, 3, 4]),
        (alternate, [0, 1, 2, 3, 2, 3, 4, 4]),
        (sample, [0, 1, 2, 3, 4]),
        (nest, [0, 1, 2, 3, 4, 2, 3, 4]),
        (lambda a, b: concatenate(a.cache(), b.repeat(2)), [0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 4]),
        (lambda a, b: concatenate(a.unbatch(), b.unbatch()).batch(3), [0, 1, 2, 3, 4, 2, 3, 4]),
    ],
    ids=["concatenate", "alternate", "sample", "nest", "cache and repeat", "unbatch and batch"],
)
def test_datasets_can_be_combined(
    dataset: Path, engines: tuple[Any, Any], combine: Callable[[Any, Any], Any], expected: list[int]
) -> None:
    a, b = (load_dataset(dataset, batch_size=2, engine=engine) for engine in engines)
    assert label_list(combine(a, b.skip(1))) == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 2},
        {"batch_size": 2, "drop_remainder": True},
        {"batch_size": 2, "on_error": "skip"},
        {"batch_size": 2, "on_error": "skip", "drop_remainder": True},
        {"on_error": "skip"},
        {"batch_size": 2, "as_dict": True},
        {"batch_size": 2, "shuffle": True, "seed": 3},
    ],
    ids=str,
)
def test_whatever_the_options_datasets_concatenate(dataset: Path, options: dict[str, Any]) -> None:
    one = load_dataset(dataset, engine="indexed", **options)
    both = one.concatenate(load_dataset(dataset, engine="indexed", **options))
    assert both.element_spec == one.element_spec
    assert len(list(both)) == 2 * len(list(one))


def test_keras_fits_and_validates_on_combined_datasets(dataset: Path) -> None:
    layers = [tf.keras.layers.GlobalAveragePooling3D(), tf.keras.layers.Dense(1)]
    model = tf.keras.Sequential(layers)
    model.compile("sgd", "mse")
    parts = [load_dataset(dataset, f"train[{cut}]", 2) for cut in (":3", "3:")]
    both = parts[0].concatenate(parts[1])
    history = model.fit(both, validation_data=both, epochs=2, shuffle=False, verbose=0)
    assert np.isfinite(history.history["val_loss"]).all()


def held_by(elements: Any) -> Any:
    """What a dataset of the indexed engine holds for its reading."""
    while not hasattr(elements, "beam_nifti_steps"):
        elements = elements._input_dataset
    return weakref.ref(elements.beam_nifti_steps)


def test_a_dataset_that_is_gone_leaves_neither_threads_nor_its_index(dataset: Path) -> None:
    def read(take: int) -> Any:
        elements = load_dataset(dataset, batch_size=2, shuffle=True, engine="indexed").take(take)
        assert len(list(elements)) == min(take, 3)
        return held_by(elements)

    read(3)
    threads = threading.active_count()
    held = [read(take) for take in (0, 1, 3, 3, 3)]
    gc.collect()
    assert threading.active_count() == threads
    assert [ref() for ref in held] == [None] * len(held)


def test_one_that_failed_leaves_nothing_either(dataset: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    elements = load_dataset(copy, engine="indexed")
    for shard in copy.glob("*.tfrecord.gz"):
        shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(tf.errors.OpError, match="cannot be read"):
        list(elements)
    held = held_by(elements)
    del elements
    gc.collect()
    assert held() is None


def test_tensorflow_reads_on_where_python_has_dropped_the_dataset(dataset: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    elements = load_dataset(copy, engine="indexed")
    spec, held = elements.element_spec, held_by(elements)
    variant = tf.data.experimental.to_variant(elements)
    del elements
    gc.collect()
    assert held() is None
    assert label_list(tf.data.experimental.from_variant(variant, spec)) == [0, 1, 2, 3, 4]
    make = tf.autograph.experimental.do_not_convert(lambda _: load_dataset(copy, engine="indexed"))
    inside = tf.data.Dataset.range(2).flat_map(make)
    gc.collect()
    assert label_list(inside) == [0, 1, 2, 3, 4] * 2


def test_but_not_a_dataset_that_was_built_again_since(dataset: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    elements = load_dataset(copy, engine="indexed")
    spec, variant = elements.element_spec, tf.data.experimental.to_variant(elements)
    del elements
    gc.collect()
    edit_info(copy, lambda info: info.update(revision=2))
    with pytest.raises(tf.errors.OpError, match="was rebuilt after it was opened; open it again"):
        list(tf.data.experimental.from_variant(variant, spec))


SIGNED = [int, np.int8, np.int32, np.int64, np.array]
UNSIGNED = [np.uint16, np.uint64]


@given(data=st.data())
@settings(max_examples=20)
def test_numbers_of_numpy_are_numbers(dataset: Path, data: st.DataObject) -> None:
    options = {
        "batch_size": data.draw(st.integers(1, 3)),
        "start": data.draw(st.integers(0, 2)),
        "shard": (data.draw(st.integers(0, 1)), 2),
        "shuffle": True,
        "seed": data.draw(st.integers(0, 100)),
        "repeat": data.draw(st.integers(1, 2)),
    }

    def of_numpy(value: Any) -> Any:
        if isinstance(value, bool):
            return np.bool_(value)
        if isinstance(value, tuple):
            return tuple(map(of_numpy, value))
        kinds = SIGNED if value < 0 else SIGNED + UNSIGNED
        return data.draw(st.sampled_from(kinds))(value)

    given_ = {name: of_numpy(value) for name, value in options.items()}
    state = {name: options[name] for name in ("batch_size", "shuffle", "seed", "shard")}
    assert json.dumps(state_after(of_numpy(2), dataset, **{n: given_[n] for n in state})) == json.dumps(
        state_after(2, dataset, **state)
    )
    number = data.draw(st.integers(-5, 4))
    records = Dataset(dataset)
    assert records[of_numpy(number)]["id"] == records[number]["id"]
    assert records[of_numpy(number) :].ids == records[number:].ids
    assert records[[of_numpy(number)]].ids == [records[number]["id"]]


@pytest.mark.parametrize("engine", ENGINES)
def test_both_engines_take_numbers_of_numpy(dataset: Path, engine: Any) -> None:
    def read(integer: Callable[[int], Any], true: Any) -> list[int]:
        options = {"shuffle": true, "seed": integer(7), "repeat": integer(2)}
        return label_list(load_dataset(dataset, batch_size=integer(2), engine=engine, **options))

    assert read(np.int64, np.True_) == read(int, True)
    endless = load_dataset(dataset, repeat=np.True_, engine=engine)
    assert int(endless.cardinality()) == tf.data.INFINITE_CARDINALITY


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 2.0}, r"batch_size is 2\.0; give a whole number"),
        ({"batch_size": True}, "batch_size is True; give a whole number"),
        ({"start": "3"}, "start is '3'; give a whole number"),
        ({"shuffle": True, "seed": 1.5}, r"seed is 1\.5; give a whole number"),
        ({"repeat": 1.5}, r"repeat is 1\.5; give a whole number"),
        ({"shard": (0, 2.0)}, r"shard is 2\.0; give a whole number"),
    ],
)
def test_other_numbers_are_refused(dataset: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_dataset(dataset, **options)
    with pytest.raises(TypeError):
        Dataset(dataset)[1.0]  # type: ignore[call-overload]
    with pytest.raises(IndexError):
        Dataset(dataset)[np.int64(5)]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_home_folder_can_be_written_as_a_tilde(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, engine: Any
) -> None:
    monkeypatch.setenv("HOME", str(dataset.parent))
    place = f"~/{dataset.name}"
    assert label_list(load_dataset(place, engine=engine)) == [0, 1, 2, 3, 4]
    assert Dataset(place).ids == Dataset(dataset).ids
    files = f"{place}/*.tfrecord.gz"
    assert label_list(load_dataset(files, layout="plain")) == [0, 1, 2, 3, 4]
    assert label_list(get_batched_dataset(files, 2)) == [0, 1, 2, 3, 4]
    assert label_list(get_batched_dataset([Path(place) / f.name for f in dataset.glob("*.gz")], 2))


def test_foreign_files_that_hold_nothing_are_skipped(dataset: Path, tmp_path: Path) -> None:
    (shard,) = dataset.glob("*.tfrecord.gz")
    (tmp_path / "a.tfrecord").write_bytes(b"")
    tf.io.TFRecordWriter(str(tmp_path / "b.tfrecord"), "GZIP").close()
    with pytest.raises(DatasetError, match=r"\*: none of the 2 files holds a record"):
        load_dataset(tmp_path / "*", layout="plain")
    shutil.copy(shard, tmp_path / "c.tfrecord")
    (tmp_path / "d.tfrecord").write_bytes(b"")
    assert label_list(load_dataset(tmp_path / "*", layout="plain")) == [0, 1, 2, 3, 4]


def test_a_record_whose_length_begins_like_gzip_is_not_taken_for_it(tmp_path: Path) -> None:
    features = {
        "image_raw": tf.io.serialize_tensor(np.ones((2, 2, 2), np.float32)).numpy(),
        "label": 5.0,
        "padding": b"",
    }

    def serialize() -> bytes:
        kinds = {bytes: "bytes_list", float: "float_list"}
        found = {
            name: tf.train.Feature(**{kinds[type(value)]: {"value": [value]}})
            for name, value in features.items()
        }
        return bytes(tf.train.Example(features={"feature": found}).SerializeToString())

    features["padding"] = bytes(0x8B1F)
    features["padding"] = bytes(0x8B1F - (len(serialize()) - 0x8B1F))
    record = serialize()
    assert len(record) == 0x8B1F
    with tf.io.TFRecordWriter(str(tmp_path / "plain")) as writer:
        writer.write(record)
    assert label_list(load_dataset(tmp_path / "plain", layout="plain")) == [5]
