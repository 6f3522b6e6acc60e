"""`random_access.Dataset` under PyTorch's DataLoader. scripts/check --services has an environment for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beam_nifti.errors import DatasetError
from beam_nifti.random_access import Dataset
from beam_nifti.record.example import decode_tensor
from tests.build_helpers import build
from tests.images import write_cohort

data = pytest.importorskip(
    "torch.utils.data", reason="PyTorch is not installed; scripts/check --services does it"
)

pytestmark = pytest.mark.torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "pytorch_dataloader.py"
SHAPE = (6, 5, 4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    build(write_cohort(folder / "cohort", 12, shape=SHAPE), folder / "out", num_shards=3)
    return folder / "out"


def batches(records: Dataset, method: str | None, **options: Any) -> list[Any]:
    workers = 0 if method is None else 2
    loader = data.DataLoader(
        records, batch_size=5, num_workers=workers, multiprocessing_context=method, **options
    )
    return list(loader)


@pytest.mark.parametrize("method", [None, "fork", "spawn"])
def test_every_worker_gives_the_records_of_the_dataset(dataset: Path, method: str | None) -> None:
    records = Dataset(dataset)
    found = batches(records, method)
    assert [tuple(batch["image"].shape) for batch in found] == [(n, *SHAPE, 1) for n in (5, 5, 2)]
    assert [str(batch["label"].dtype) for batch in found] == ["torch.float32"] * 3
    assert [example_id for batch in found for example_id in batch["id"]] == records.ids
    images = np.concatenate([batch["image"].numpy() for batch in found])
    assert images.tobytes() == b"".join(element["image"].tobytes() for element in records)


def test_parts_of_a_dataset_are_datasets(dataset: Path) -> None:
    part = Dataset(dataset, where="age >= 25", columns=["id", "label"])[::2]
    found = batches(part, "fork", shuffle=True)
    assert sorted(i for batch in found for i in batch["id"]) == sorted(part.ids)


def test_an_error_of_a_worker_names_the_record(tmp_path: Path) -> None:
    build(write_cohort(tmp_path, 2), tmp_path / "out", num_shards=1)
    records = Dataset(tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("*.tfrecord.gz")
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DatasetError, match=r"record 'sub-0000', number 0 from 0, cannot be read"):
        batches(records, "fork")


def test_the_package_tfrecord_reads_records_of_several_members(tmp_path: Path) -> None:
    from tfrecord.torch.dataset import TFRecordDataset

    build(write_cohort(tmp_path / "cohort", 3, shape=(64, 48, 40)), tmp_path / "out", num_shards=1)
    records = Dataset(tmp_path / "out")
    assert min(map(len, records.index(["member_lengths"])["member_lengths"].to_pylist())) > 3
    (shard,) = (tmp_path / "out").glob("*.tfrecord.gz")
    features = {"image_raw": "byte", "label": "float", "id": "byte"}
    found = list(TFRecordDataset(str(shard), None, features, compression_type="gzip"))
    assert [bytes(example["id"]).decode() for example in found] == records.ids
    assert [example["label"][0] for example in found] == [element["label"] for element in records]
    images = [decode_tensor(bytes(example["image_raw"])) for example in found]
    assert all(np.array_equal(a, b["image"][..., 0]) for a, b in zip(images, records, strict=True))


def test_the_example_runs(dataset: Path) -> None:
    command = [sys.executable, EXAMPLE, dataset, "--split=train[:75%]"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(", ")[0] for line in lines] == ["epoch 0: 9 records", "epoch 1: 9 records"]
