from __future__ import annotations

import itertools
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.errors import UsageError
from beam_nifti.random_access import Dataset
from beam_nifti.read.order import Order, shuffle
from beam_nifti.storage import paths as storage
from tests.build_helpers import build
from tests.datasets import edit_index, edit_info, info_of, set_cell
from tests.images import brain, random_voxels, write_cohort, write_image, write_manifest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
tf = pytest.importorskip("tensorflow")

from beam_nifti.reader import load_dataset  # noqa: E402

pytestmark = pytest.mark.tf

COUNT = 11
SHAPE = (5, 4, 3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven records of train in four shards; labels are numbers from 0, ages from 20."""
    folder = tmp_path_factory.mktemp("dataset")
    build(write_cohort(folder / "cohort", COUNT, shape=SHAPE), folder / "out", examples_per_shard=3)
    return folder / "out"


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return shutil.copytree(dataset, tmp_path / "copy")


def labels(elements: Any) -> list[list[int]]:
    """The labels of each element."""
    return [np.atleast_1d(y.numpy()).astype(int).tolist() for _, y in elements]


def flat(batches: list[list[int]]) -> list[int]:
    return list(itertools.chain(*batches))


# The order


@given(
    count=st.integers(0, 40),
    batch_size=st.integers(1, 6),
    num_hosts=st.integers(1, 8),
    seed=st.none() | st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 3),
)
def test_hosts_read_every_record_once_an_epoch(
    count: int, batch_size: int, num_hosts: int, seed: int | None, epoch: int
) -> None:
    hosts = [Order(count, batch_size, False, seed, host, num_hosts) for host in range(num_hosts)]
    shares = [
        np.concatenate([h.batch(epoch * h.num_steps + step) for step in range(h.num_steps)] or [[]])
        for h in hosts
    ]
    assert sorted(np.concatenate(shares)) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    whole = {Order(count, batch_size, True, seed, host, num_hosts).num_steps for host in range(num_hosts)}
    assert whole == {min(map(len, shares)) // batch_size}


def test_an_order_is_the_same_on_every_machine() -> None:
    assert shuffle(8, 1, 0).tolist() == [4, 6, 1, 3, 2, 0, 5, 7]
    assert shuffle(8, 1, 1).tolist() == [5, 3, 2, 7, 0, 1, 4, 6]
    assert shuffle(8, 2**64 - 1, 0).tolist() == [5, 1, 4, 0, 7, 2, 6, 3]


def test_every_place_is_as_likely_for_every_record() -> None:
    places = np.argsort([shuffle(8, 1, epoch) for epoch in range(4000)])
    for record in range(8):
        counts = np.bincount(places[:, record], minlength=8)
        assert np.abs(counts - 500).max() < 120  # six standard deviations


@pytest.mark.slow
def test_a_process_that_only_reads_gives_the_same_shuffle_without_beam_and_ends_while_it_reads(
    dataset: Path,
) -> None:
    code = (
        "import sys; from beam_nifti.reader import load_dataset;"
        "x = load_dataset(sys.argv[1], shuffle=True, seed=5, repeat=2); print([int(y) for _, y in x]);"
        "assert not {'apache_beam', 'nibabel'} & sys.modules.keys();"
        "slow = iter(load_dataset(sys.argv[1], '+'.join(['train'] * 300), 3300, repeat=True)); next(slow)"
    )
    command = [sys.executable, "-c", code, str(dataset)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    epochs = flat(labels(load_dataset(dataset, batch_size=4, shuffle=True, seed=5, repeat=2)))
    assert ran.stdout.strip() == str(epochs)
    assert [sorted(epoch) for epoch in (epochs[:COUNT], epochs[COUNT:])] == [list(range(COUNT))] * 2
    assert epochs[:COUNT] != epochs[COUNT:]


def test_passes_go_on_with_further_epochs(dataset: Path) -> None:
    def passes(count: int, **options: Any) -> list[list[int]]:
        elements = load_dataset(dataset, shuffle=True, seed=5, **options)
        return [flat(labels(elements)) for _ in range(count)]

    epochs = passes(4)
    assert [epochs[0] + epochs[1], epochs[2] + epochs[3]] == passes(2, repeat=2)
    elements = load_dataset(dataset, shuffle=True, seed=5, repeat=True)
    assert [flat(labels(elements.take(COUNT))) for _ in range(2)] == [epochs[0]] * 2


@pytest.fixture
def no_global_seed() -> Iterator[None]:
    yield
    tf.random.set_seed(None)


def test_without_a_seed_tensorflow_s_own_decides(dataset: Path, no_global_seed: None) -> None:
    def order() -> list[int]:
        return flat(labels(load_dataset(dataset, shuffle=True)))

    assert any(order() != order() for _ in range(3))
    tf.random.set_seed(3)
    first = order()
    tf.random.set_seed(3)
    assert order() == first


# Resuming, repeating, hosts


@pytest.mark.parametrize(
    "options",
    [
        {"repeat": 1},
        {"batch_size": 4, "repeat": 2},
        {"batch_size": 4, "repeat": 3, "shuffle": True, "seed": 2, "drop_remainder": True},
        {"batch_size": 3, "repeat": 2, "shuffle": True, "seed": 2, "shard": (1, 3)},
    ],
)
def test_resuming_at_every_step_gives_what_follows(dataset: Path, options: dict[str, Any]) -> None:
    whole = labels(load_dataset(dataset, **options))
    for start in range(len(whole) + 1):
        rest = load_dataset(dataset, start=start, **options)
        assert int(rest.cardinality()) == len(whole) - start
        assert labels(rest) == whole[start:]
    with pytest.raises(UsageError, match=rf"start is {len(whole) + 1}, but there are {len(whole)} elements"):
        load_dataset(dataset, start=len(whole) + 1, **options)


def test_resuming_without_end(dataset: Path) -> None:
    options = {"batch_size": 4, "shuffle": True, "seed": 2}
    finite = labels(load_dataset(dataset, repeat=4, **options))
    endless = load_dataset(dataset, repeat=True, start=5, **options)
    assert int(endless.cardinality()) == tf.data.INFINITE_CARDINALITY
    assert labels(endless.take(7)) == finite[5:]


def test_resuming_reads_nothing_of_what_is_skipped(copy: Path) -> None:
    elements = load_dataset(copy, batch_size=3, start=2, repeat=1)
    for shard in info_of(copy).splits["train"].shards[:2]:
        (copy / shard.name).unlink()
    assert labels(elements) == [[6, 7, 8], [9, 10]]


@pytest.mark.parametrize("engine", ["indexed", "sequential"])
def test_repeat_and_cardinality(dataset: Path, engine: Any) -> None:
    for repeat, epochs in ((False, 1), (1, 1), (3, 3)):
        batches = load_dataset(dataset, batch_size=4, repeat=repeat, engine=engine)
        assert int(batches.cardinality()) == 3 * epochs
        assert [len(batch) for batch in labels(batches)] == [4, 4, 3] * epochs
    endless = load_dataset(dataset, batch_size=4, repeat=True, engine=engine)
    assert int(endless.cardinality()) == tf.data.INFINITE_CARDINALITY
    assert [len(batch) for batch in labels(endless.take(5))] == [4, 4, 3, 4, 4]


@pytest.mark.parametrize("num_hosts", range(1, 9))
def test_hosts_share_every_epoch(dataset: Path, num_hosts: int) -> None:
    read: list[list[int]] = [[], []]
    for host in range(num_hosts):
        own = flat(labels(load_dataset(dataset, shuffle=True, seed=4, repeat=2, shard=(host, num_hosts))))
        read[0] += own[: len(own) // 2]
        read[1] += own[len(own) // 2 :]
    assert [sorted(epoch) for epoch in read] == [list(range(COUNT))] * 2
    assert num_hosts == 1 or read[0] != read[1]


def test_input_contexts_of_strategies(dataset: Path) -> None:
    context = tf.distribute.InputContext(num_input_pipelines=3, input_pipeline_id=1)
    assert labels(load_dataset(dataset, batch_size=4, shard=context)) == [[1, 4, 7, 10]]
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    shared = strategy.distribute_datasets_from_function(
        lambda context: load_dataset(dataset, batch_size=4, shard=context)
    )
    assert flat(labels(shared)) == list(range(COUNT))


# Which records, and what of them


def test_an_epoch_does_not_end_with_a_wait_for_the_tuner(dataset: Path) -> None:
    elements = load_dataset(dataset, batch_size=2).map(lambda x, y: (x + 1, y))
    assert elements.options().autotune.enabled is False
    wanted = tf.data.Options()
    wanted.autotune.enabled = True
    assert elements.with_options(wanted).options().autotune.enabled is True


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"split": "train[:50%]"}, [0, 1, 2, 3, 4, 5]),
        ({"split": "train[-2:]+train[:1]"}, [9, 10, 0]),
        ({"where": "age >= 28"}, [8, 9, 10]),
        ({"split": "train[:9]", "where": "age >= 28", "shuffle": True}, [8]),
        ({"where": "age > 99"}, []),
        ({"where": "age > 99", "repeat": True, "batch_size": 2}, []),
    ],
)
def test_parts_and_conditions(dataset: Path, options: dict[str, Any], expected: list[int]) -> None:
    elements = load_dataset(dataset, **options)
    assert flat(labels(elements)) == expected
    assert int(elements.cardinality()) == len(expected)


COLUMNS = ["image", "mask", "label", "id", "affine", "zooms", "site", "shape", "max", "intensity_max", "row"]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three records with masks of one to three labels."""
    folder = tmp_path_factory.mktemp("masked")
    rows = []
    for i in range(3):
        write_image(folder / f"{i}.nii", brain(SHAPE, seed=i))
        write_image(folder / f"{i}-mask.nii", np.arange(60).reshape(SHAPE).astype(np.uint8) % (i + 1))
        rows.append({"path": f"{i}.nii", "seg": f"{i}-mask.nii", "label": i, "site": "äé"[:i]})
    manifest = write_manifest(folder / "manifest.tsv", rows)
    build(manifest, folder / "out", num_shards=1, columns={"mask": "seg"})
    return folder / "out"


@pytest.mark.parametrize("batch_size", [None, 2])
def test_dictionaries_of_columns(masked: Path, batch_size: int | None) -> None:
    columns = COLUMNS if batch_size else [*COLUMNS, "mask_labels", "scl_slope"]
    elements = load_dataset(masked, as_dict=True, columns=columns, batch_size=batch_size)
    records = Dataset(masked, columns=columns)
    assert set(elements.element_spec) == set(columns)
    seen = 0
    for element in elements:
        assert list(element) == columns
        rows = {
            name: list(cells.numpy()) if batch_size else [cells.numpy()] for name, cells in element.items()
        }
        for cells in zip(*rows.values(), strict=True):
            expected = records[seen]
            for name, cell in zip(rows, cells, strict=True):
                value = expected[name]
                if name == "mask":
                    assert (cell.dtype, cell.shape) == (np.int32, (*SHAPE, 1))
                if isinstance(cell, bytes):
                    value, cell = value or "", cell.decode()
                assert np.array_equal(cell, value), name
            seen += 1
    assert seen == len(records) == 3
    assert elements.element_spec["image"].shape[-4:] == (*SHAPE, 1)
    assert elements.element_spec["affine"].shape[-2:] == (4, 4)


def test_a_column_of_the_manifest_may_be_named_mask(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii")
    build(write_manifest(tmp_path / "m.tsv", [{"path": "a.nii", "mask": "left"}]), tmp_path / "out")
    ((element),) = load_dataset(tmp_path / "out", as_dict=True, columns=["mask"])
    assert element["mask"].numpy() == b"left"


def test_dictionaries_without_columns(dataset: Path) -> None:
    spec = load_dataset(dataset, as_dict=True, batch_size=2).element_spec
    assert {name: s.dtype for name, s in spec.items()} == {
        "image": tf.float32,
        "label": tf.float32,
        "id": tf.string,
        "affine": tf.float64,
        "zooms": tf.float64,
    }


def test_columns_of_different_lengths_are_padded(masked: Path) -> None:
    options: dict[str, Any] = {"as_dict": True, "columns": ["id", "mask_labels"], "batch_size": 3}
    with pytest.raises(
        UsageError, match=r"batch_size is 3, but mask_labels of .* different shapes; .* pad=True"
    ):
        load_dataset(masked, **options)
    (batch,) = load_dataset(masked, pad=True, **options)
    assert batch["mask_labels"].numpy().tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 2]]


@pytest.fixture
def sparse(masked: Path, tmp_path: Path) -> Path:
    """The same records in a dataset of which no manifest says what it must have."""
    output = Path(shutil.copytree(masked, tmp_path / "sparse"))
    edit_info(output, lambda facts: facts["manifest"].update(path=""))
    return output


def test_missing_cells_are_empty(sparse: Path) -> None:
    columns = ["source", "source_sizes", "source_versions", "mask_labels", "min", "affine"]
    for name in columns:
        edit_index(sparse, set_cell(name, 0, None))
    edit_index(sparse, set_cell("source_sizes", 1, [1, 2, 3]))
    edit_index(sparse, set_cell("source_versions", 1, ["a", None, "c"]))
    edit_index(sparse, set_cell("source_mtimes", 1, [1.0, 2.0, 3.0]))
    (batch,) = load_dataset(sparse, as_dict=True, columns=columns, batch_size=3, pad=True)
    found = {name: cells.numpy() for name, cells in batch.items()}
    assert found["source"].tolist() == [b"", b"1.nii", b"2.nii"]
    assert found["source_sizes"][:2].tolist() == [[0, 0, 0], [1, 2, 3]]
    assert found["source_versions"].tolist() == [[b""] * 3, [b"a", b"", b"c"], [b""] * 3]
    assert found["mask_labels"].tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 2]]
    assert np.isnan(found["min"]).tolist() == [True, False, False]
    assert np.isnan(found["affine"]).all((1, 2)).tolist() == [True, False, False]


def test_a_missing_integer_is_refused(sparse: Path) -> None:
    assert load_dataset(sparse, as_dict=True, columns=["id", "row"])
    edit_index(sparse, set_cell("row", 1, None))
    with pytest.raises(
        UsageError, match=f"{sparse}: column row lacks values, .* leave it out, or use Dataset"
    ):
        load_dataset(sparse, as_dict=True, columns=["id", "row"])
    assert [element["row"] for element in Dataset(sparse, columns=["row"])] == [1, None, 3]


@pytest.mark.parametrize(
    ("voxel_dtype", "compression", "batch_size"),
    [("float32", "none", 2), ("float16", "gzip", None), ("uint8", "none", 3), ("native", "gzip", 2)],
)
def test_both_engines_give_the_same_channels_and_masks(
    tmp_path: Path, voxel_dtype: str, compression: str, batch_size: int | None
) -> None:
    rows = []
    for i in range(3):
        for name in ("t1", "t2"):
            write_image(tmp_path / f"{name}-{i}.nii", random_voxels(SHAPE, seed=i), slope=0.3, inter=i)
        write_image(tmp_path / f"seg-{i}.nii", brain(SHAPE, seed=i) % 7)
        rows.append({"t1": f"t1-{i}.nii", "t2": f"t2-{i}.nii", "seg": f"seg-{i}.nii"})
    manifest = write_manifest(tmp_path / "manifest.tsv", rows)
    columns = {"path": "t1,t2", "mask": "seg"}
    build(
        manifest,
        tmp_path / "out",
        num_shards=1,
        columns=columns,
        voxel_dtype=voxel_dtype,
        compression=compression,
    )
    options: dict[str, Any] = {"batch_size": batch_size, "target": "mask", "repeat": 2}
    indexed, sequential = (
        load_dataset(tmp_path / "out", engine=engine, **options) for engine in ("indexed", "sequential")
    )
    assert indexed.element_spec == sequential.element_spec
    for one, other in zip(indexed, sequential, strict=True):
        for cell, expected in zip(one, other, strict=True):
            assert cell.numpy().tobytes() == expected.numpy().tobytes()


def test_a_remote_dataset(dataset: Path) -> None:
    import tests.object_store  # noqa: F401

    for path in dataset.rglob("*"):
        if path.is_file():
            storage.write(f"memory://lab/tf/{path.relative_to(dataset)}", path.read_bytes())
    batches = load_dataset("memory://lab/tf", batch_size=4, shuffle=True, seed=1, engine="indexed")
    assert sorted(flat(labels(batches))) == list(range(COUNT))


def test_shards_without_their_index(copy: Path) -> None:
    shutil.rmtree(copy / "index")
    assert sorted(flat(labels(load_dataset(copy, batch_size=4)))) == list(range(COUNT))


# Errors


@pytest.fixture
def damaged(copy: Path) -> Path:
    """The fourth record does not inflate."""
    offset = Dataset(copy).index(["offset"])["offset"][4].as_py()
    shard = copy / info_of(copy).splits["train"].shards[1].name
    content = bytearray(shard.read_bytes())
    content[offset + 100] ^= 255
    shard.write_bytes(content)
    return copy


def test_a_damaged_record_is_named(damaged: Path) -> None:
    message = r"train-00001\S+: record 'sub-0004', number 1 from 0, cannot be read .*run beam-nifti verify"
    for batch_size in (None, 3):
        with pytest.raises(tf.errors.OpError, match=message):
            labels(load_dataset(damaged, batch_size=batch_size))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[i] for i in range(COUNT) if i != 4]),
        ({"batch_size": 1}, [[i] for i in range(COUNT) if i != 4]),
        ({"batch_size": 3}, [[0, 1, 2], [3, 5], [6, 7, 8], [9, 10]]),
        ({"batch_size": 3, "drop_remainder": True}, [[0, 1, 2], [6, 7, 8]]),
    ],
)
def test_damaged_records_can_be_skipped(
    damaged: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], expected: list[list[int]]
) -> None:
    elements = load_dataset(damaged, on_error="skip", **options)
    with caplog.at_level(logging.WARNING, "beam_nifti"):
        assert [labels(elements), labels(elements)] == [expected, expected]
    (warning,) = caplog.messages
    assert "record 'sub-0004', number 1 from 0, cannot be read" in warning
    assert warning.endswith("skipped (1 of 11 records so far)")
    assert elements.element_spec[0].shape[-4:] == (*SHAPE, 1)


def test_what_is_gone_is_not_skipped(copy: Path) -> None:
    elements = load_dataset(copy, on_error="skip")
    (copy / info_of(copy).splits["train"].shards[1].name).unlink()
    with pytest.raises(tf.errors.OpError, match="No such file"):
        labels(elements)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -1}, "start is -1; give how many elements were consumed, from 0"),
        ({"repeat": 0}, "repeat is 0; give a number of epochs from 1, or True"),
        ({"repeat": -1}, "repeat is -1; give a number"),
        ({"shard": (2, 2)}, r"shard is \(2, 2\); give \(i, n\)"),
        ({"shuffle": True, "start": 1}, "start requires an order that is known beforehand; give a seed"),
        ({"shuffle": True, "shard": (0, 2)}, "shard requires an order that is known beforehand; give a seed"),
        ({"columns": ["id"]}, "columns is .'id'., but elements are X and y; add as_dict=True"),
        ({"as_dict": True, "columns": []}, "columns is empty; give at least one, or None for"),
        ({"as_dict": True, "columns": ["sex"]}, "records have no column 'sex'"),
        ({"where": "sex == 1"}, "the index has no column 'sex'"),
        ({"split": "train[:99]"}, "reaches beyond the 11 records"),
        ({"engine": "fast"}, "engine is 'fast'; choose 'indexed' or 'sequential'"),
        ({"on_error": "ignore"}, "on_error is 'ignore'; choose 'raise' or 'skip'"),
        ({"engine": "sequential", "start": 1}, "start requires the index, but engine is 'sequential'"),
        ({"engine": "sequential", "split": "train[:2]"}, r"split 'train\[:2\]' requires the index"),
    ],
)
def test_arguments_that_do_not_fit(dataset: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_dataset(dataset, **options)
