"""Both engines of `load_dataset` give the same elements for the same arguments."""

from __future__ import annotations

import itertools
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beam_nifti.errors import UsageError
from beam_nifti.random_access import Dataset
from tests.build_helpers import build
from tests.images import AFFINE, brain, random_voxels, write_image, write_manifest
from tests.peak import peak_growth

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
tf = pytest.importorskip("tensorflow")

from beam_nifti.reader import load_dataset  # noqa: E402

pytestmark = pytest.mark.tf

SHAPE = (5, 4, 3)
COUNT = 5
ROUNDED = ("affine", "zooms")
"""Columns that the index has as float64, and records as float32."""


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small datasets, each with features of its own, of one shard, as the engines' orders differ."""
    folder = tmp_path_factory.mktemp("engines")
    rotated = AFFINE + np.diag([0, 0, 0.1, 0]) + np.eye(4, k=1) / 3 * [[1], [1], [0], [0]]
    rows = []
    for i in range(COUNT):
        header: dict[str, Any] = {"affine": rotated, "slope": 0.3, "inter": i}
        shapes = {"": SHAPE, "mixed-": (5 + i % 2, 4, 3 + i), "colours-": (4, 3 + i, 2, 3)}
        for kind, shape in shapes.items():
            voxels = random_voxels(shape, "uint8" if kind == "colours-" else "int16", seed=i)
            if kind == "colours-":
                write_image(folder / f"{kind}{i}.nii", voxels.view([(c, "u1") for c in "RGB"])[..., 0])
                continue
            write_image(folder / f"{kind}t1-{i}.nii", voxels, **header)
            write_image(folder / f"{kind}t2-{i}.nii", brain(shape, seed=i), **header)
            write_image(folder / f"{kind}seg-{i}.nii", brain(shape, seed=i) % (i + 2), affine=rotated)
            # Subnormal: TensorFlow's arithmetic makes zeros of these.
            tiny = voxels.astype(np.float32) * np.float32(1e-42)
            write_image(folder / f"{kind}tiny-{i}.nii", tiny, affine=rotated)
        rows.append(
            {"participant_id": f"sub-é{i}", "age": 30.5 + i, "sex": "FM"[i % 2], "name": "abc"[: i % 4]}
        )

    def make(name: str, path: str, **options: Any) -> Path:
        columns = {"path": "t1", "mask": "seg"} | options.pop("columns", {})
        cells = {column: f"{path}{column}-{{}}.nii" for column in ("t1", "t2", "seg", "tiny")}
        if path == "colours-":
            columns, cells = {"path": "t1"}, {"t1": "colours-{}.nii"}
        listed = [r | {c: f.format(i) for c, f in cells.items()} for i, r in enumerate(rows)]
        manifest = write_manifest(folder / f"{name}.tsv", listed)
        build(manifest, folder / name, num_shards=1, columns=columns, **options)
        return folder / name

    labels = {"label": "age,sex:class,name:string", "missing_label": "nan"}
    return {
        "labels": make("labels", "", columns=labels),
        "tiny": make("tiny", "", columns={"path": "tiny"}, rescale="none"),
        "channels": make("channels", "", columns={"path": "t1,t2"}, voxel_dtype="float16"),
        "native": make("native", "", voxel_dtype="native", columns={"label": "age"}),
        "percentiles": make(
            "percentiles", "", voxel_dtype="native", columns={"path": "t1,t2"}, rescale="percentile:5,95"
        ),
        "mixed": make("mixed", "mixed-", voxel_dtype="native", allow_mixed_shapes=True),
        "mixed channels": make(
            "mixed-channels", "mixed-", columns={"path": "t1,t2"}, allow_mixed_shapes=True, compression="none"
        ),
        "mixed colours": make("mixed-colours", "colours-", allow_mixed_shapes=True, frames="all"),
    }


def cells_of(element: Any) -> Iterator[tuple[str, Any]]:
    """The tensors of an element, with names where it is a dictionary."""
    if isinstance(element, dict):
        return iter(element.items())
    return (("", cell) for cell in tf.nest.flatten(element))


def values_of(cell: Any) -> tuple[bytes, ...]:
    """What makes two tensors the same: dtype, shape and bits."""
    if isinstance(cell, tf.RaggedTensor):
        return tuple(itertools.chain(*map(values_of, [cell.flat_values, *cell.nested_row_splits])))
    array = np.asarray(cell.numpy())
    content = str(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
    return array.dtype.str.encode(), str(cell.shape).encode(), content


UNLABELLED = ["image", "id", "affine", "zooms", "intensity_min", "intensity_max", "scl_slope"]
OF_ALL = [*UNLABELLED, "label"]
ENDS = ["rescale_low", "rescale_high"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("labels", {"label": "age"}),
        ("labels", {"label": ["sex", "name", "age"], "batch_size": 2}),
        ("labels", {"target": "mask", "batch_size": 3, "drop_remainder": True}),
        ("labels", {"as_dict": True, "columns": [*OF_ALL, "mask", "label/age", "label/sex", "label/name"]}),
        ("tiny", {"batch_size": 2}),
        ("channels", {"batch_size": 2}),
        ("channels", {"as_dict": True, "batch_size": 2, "columns": [*UNLABELLED, "mask"], "repeat": 2}),
        ("native", {"as_dict": True, "columns": [*OF_ALL, "scl_inter"]}),
        ("native", {"as_dict": True}),
        ("percentiles", {"as_dict": True, "columns": ["image", *ENDS], "batch_size": 5}),
        ("mixed", {"target": "mask"}),
        ("mixed", {"target": "mask", "batch_size": 3, "pad": True}),
        ("mixed", {"target": "mask", "batch_size": 3, "ragged": True}),
        ("mixed", {"batch_size": 2, "ragged": True, "drop_remainder": True, "repeat": 2}),
        ("mixed channels", {"batch_size": 4, "pad": True}),
        (
            "mixed channels",
            {"batch_size": 4, "ragged": True, "as_dict": True, "columns": ["id", "mask", "image"]},
        ),
        ("mixed colours", {"batch_size": 1}),
        ("percentiles", {"channels_first": True, "batch_size": 2, "target": "mask"}),
        ("native", {"channels_first": True, "as_dict": True}),
        ("mixed channels", {"channels_first": True, "batch_size": 4, "pad": True, "target": "mask"}),
        ("mixed", {"channels_first": True, "batch_size": 3, "ragged": True, "target": "mask"}),
        ("mixed colours", {"channels_first": True}),
        ("mixed colours", {"batch_size": 5, "ragged": True}),
    ],
)
def test_both_engines_give_the_same_elements(
    datasets: dict[str, Path], name: str, options: dict[str, Any]
) -> None:
    indexed = load_dataset(datasets[name], engine="indexed", **options)
    sequential = load_dataset(datasets[name], engine="sequential", **options)
    # Only the index knows that all of these images have three channels.
    assert name == "mixed colours" or indexed.element_spec == sequential.element_spec
    count = 0
    for one, other in zip(indexed, sequential, strict=True):
        for (column, cell), (_, expected) in zip(cells_of(one), cells_of(other), strict=True):
            if column in ROUNDED:
                cell = tf.cast(tf.cast(cell, tf.float32), tf.float64)
            if name == "mixed colours" and isinstance(cell, tf.RaggedTensor):
                cell, expected = cell.flat_values, tf.reshape(expected.flat_values, (-1, 3))
            assert values_of(cell) == values_of(expected), column
        count += 1
    assert count == int(indexed.cardinality()) == int(sequential.cardinality())


@pytest.mark.parametrize("name", ["native", "percentiles", "mixed channels", "mixed colours"])
def test_channels_first_gives_the_same_numbers_in_another_order(datasets: dict[str, Path], name: str) -> None:
    columns = ["image"] if name == "mixed colours" else ["image", "mask"]
    last, first = (Dataset(datasets[name], columns=columns, channels_first=c) for c in (False, True))
    read = load_dataset(datasets[name], as_dict=True, columns=columns, channels_first=True)
    for element, expected, tensors in zip(first, last, read, strict=True):
        for column, array in element.items():
            assert array.flags.c_contiguous
            np.testing.assert_array_equal(array, np.moveaxis(expected[column], -1, 0))
            np.testing.assert_array_equal(array, tensors[column])
    assert pickle.loads(pickle.dumps(first))[0]["image"].shape == first[0]["image"].shape


def test_columns_of_the_index_are_for_the_indexed_engine(datasets: dict[str, Path]) -> None:
    options: dict[str, Any] = {"as_dict": True, "columns": ["id", "sex"]}
    assert {e["sex"].numpy() for e in load_dataset(datasets["native"], **options)} == {b"F", b"M"}
    with pytest.raises(UsageError, match=r"no column 'sex'; choose one of: affine, id, .*engine='indexed'"):
        load_dataset(datasets["native"], engine="sequential", **options)


def test_ragged_batches_hold_the_volumes_without_zeros(datasets: dict[str, Path]) -> None:
    single = [(x.numpy(), y.numpy()) for x, y in load_dataset(datasets["mixed"], target="mask")]
    seen = 0
    for x, y in load_dataset(datasets["mixed"], batch_size=2, target="mask", ragged=True):
        assert x.shape.as_list() == y.shape.as_list() == [len(x.to_list()), None, None, None, 1]
        for image, mask in zip(x, y, strict=True):
            np.testing.assert_array_equal(image.to_tensor(), single[seen][0])
            np.testing.assert_array_equal(mask.to_tensor(), single[seen][1])
            seen += 1
    assert seen == COUNT


def test_ragged_batches_without_damaged_records(datasets: dict[str, Path]) -> None:
    options: dict[str, Any] = {"batch_size": 2, "ragged": True}
    skipping, plain = (load_dataset(datasets["mixed"], on_error=e, **options) for e in ("skip", "raise"))
    assert skipping.element_spec == plain.element_spec
    for one, other in zip(skipping, plain, strict=True):
        np.testing.assert_array_equal(one.to_tensor(), other.to_tensor())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ragged": True}, "ragged requires batches; give a batch_size"),
        ({"ragged": True, "pad": True, "batch_size": 2}, "pad and ragged are two ways .*; choose one"),
        ({"batch_size": 2}, "have different shapes; use batch_size=1 or None, or pad=True, or ragged=True"),
    ],
)
def test_batches_that_cannot_be(datasets: dict[str, Path], options: dict[str, Any], message: str) -> None:
    for engine in ("indexed", "sequential"):
        with pytest.raises(UsageError, match=message):
            load_dataset(datasets["mixed"], engine=engine, **options)


@pytest.mark.parametrize("engine", ["indexed", "sequential"])
def test_padding_that_no_memory_holds_is_refused(tmp_path: Path, engine: str) -> None:
    """Three small volumes, each long in another direction; padded, one of them takes 140 TB."""
    shapes = [(32767, 1, 1), (1, 32767, 1), (1, 1, 32767)]
    for i, shape in enumerate(shapes):
        write_image(tmp_path / f"{i}.nii", np.arange(32767, dtype=np.int16).reshape(shape))
    manifest = write_manifest(tmp_path / "m.tsv", [{"path": f"{i}.nii", "label": i} for i in range(3)])
    build(manifest, tmp_path / "out", allow_mixed_shapes=True)
    options: dict[str, Any] = {"engine": engine, "pad": True}
    with peak_growth() as growth, pytest.raises(tf.errors.OpError, match="would take too much memory; use"):
        list(load_dataset(tmp_path / "out", batch_size=3, **options))
    assert growth() < 256 << 20
    assert [y.numpy().tolist() for _, y in load_dataset(tmp_path / "out", batch_size=1, **options)] == [
        [0],
        [1],
        [2],
    ]
