"""`random_access.Dataset` as a data source of Grain."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from beam_nifti.errors import DatasetError
from beam_nifti.random_access import Dataset
from tests.build_helpers import build
from tests.images import write_cohort

grain = pytest.importorskip("grain", reason="Grain is not installed; pip install beam-nifti[grain]")

EXAMPLE = Path(__file__).parents[2] / "examples" / "grain_source.py"
COUNT = 13
SHAPE = (6, 5, 4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    build(write_cohort(folder / "cohort", COUNT, shape=SHAPE), folder / "out", num_shards=3)
    return folder / "out"


def ids(batches: Iterable[Any]) -> list[str]:
    return [str(i) for batch in batches for i in batch["id"]]


def test_it_is_a_source_of_the_records(dataset: Path) -> None:
    records = Dataset(dataset)
    assert isinstance(records, grain.sources.RandomAccessDataSource)
    source = grain.MapDataset.source(records)
    assert len(source) == COUNT
    for number in (0, 5, COUNT - 1):
        assert source[number]["id"] == records.ids[number]
        assert source[number]["image"].tobytes() == records[number]["image"].tobytes()
    first, *_, last = source.batch(5)
    assert (first["image"].shape, first["image"].dtype.name) == ((5, *SHAPE, 1), "float32")
    assert (last["affine"].shape, last["label"].dtype.name) == ((3, 4, 4), "float32")


@pytest.mark.parametrize("num_hosts", [1, 2, 5])
def test_hosts_share_every_epoch_in_an_order_of_its_own(dataset: Path, num_hosts: int) -> None:
    records = Dataset(dataset, columns=["id"])
    epochs: list[list[str]] = [[], [], []]
    for host in range(num_hosts):
        mine = grain.MapDataset.source(records).seed(3).shuffle()[host::num_hosts]
        repeated = mine.repeat(3)
        for number, epoch in enumerate(epochs):
            epoch += [repeated[number * len(mine) + i]["id"] for i in range(len(mine))]
    assert [sorted(epoch) for epoch in epochs] == [sorted(records.ids)] * 3
    assert len(set(map(tuple, epochs))) == 3


@pytest.mark.slow
def test_processes_read_what_one_reads_and_go_on_from_a_state(dataset: Path) -> None:
    source = grain.MapDataset.source(Dataset(dataset, where="age >= 22")).seed(1).shuffle().batch(2).repeat(2)
    alone = list(source)
    by_workers = source.to_iter_dataset().mp_prefetch(grain.MultiprocessingOptions(num_workers=2))
    iterator = iter(by_workers)
    first = [next(iterator) for _ in range(5)]
    state = json.loads(json.dumps(iterator.get_state()))
    rest = list(iterator)
    assert ids([*first, *rest]) == ids(alone)
    assert [b["image"].tobytes() for b in [*first, *rest]] == [b["image"].tobytes() for b in alone]
    iterator = iter(by_workers)
    iterator.set_state(state)
    assert ids(iterator) == ids(rest)


@pytest.mark.slow
def test_a_data_loader_goes_on_from_a_state(dataset: Path) -> None:
    records = Dataset(dataset)
    loader = grain.DataLoader(
        data_source=records,
        sampler=grain.samplers.IndexSampler(len(records), shuffle=True, num_epochs=1, seed=2),
        operations=[grain.transforms.Batch(2)],
        worker_count=2,
    )
    iterator = iter(loader)
    first = ids([next(iterator)])
    state = iterator.get_state()
    rest = ids(iterator)
    assert sorted(first + rest) == sorted(records.ids)
    iterator = iter(loader)
    iterator.set_state(state)
    assert ids(iterator) == rest


def test_an_error_names_the_record(tmp_path: Path) -> None:
    build(write_cohort(tmp_path, 2), tmp_path / "out", num_shards=1)
    records = Dataset(tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("*.tfrecord.gz")
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DatasetError, match=r"record 'sub-0000', number 0 from 0, cannot be read"):
        list(grain.MapDataset.source(records).batch(2))


def run_example(dataset: Path, *arguments: str) -> list[str]:
    """The steps that examples/grain_source.py prints."""
    command = [sys.executable, EXAMPLE, dataset, "--split=train[1:]", "--batch-size=3", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_example_goes_on_where_it_stopped(dataset: Path, tmp_path: Path) -> None:
    checkpoint = f"--checkpoint={tmp_path / 'state.json'}"
    first = run_example(dataset, checkpoint, "--steps=3")
    rest = run_example(dataset, checkpoint)
    assert (len(first), len(rest)) == (3, 5)
    assert first + rest == run_example(dataset, "--workers=0")


def test_processes_of_the_example_share_an_epoch(dataset: Path) -> None:
    hosts = [run_example(dataset, "--epochs=1", "--workers=0", f"--host={host}/2") for host in range(2)]
    read = [name for steps in hosts for step in steps for name in step.split(": ")[1].split(", ")]
    assert sorted(read) == sorted(Dataset(dataset, "train[1:]").ids)
