"""The sequential engine on S3, and on web servers, by tensorflow-io, of the extra [io].

A process that has used S3 through tensorflow-io aborts at its end, when all its work is done: each of these
reads in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from beam_nifti.random_access import Dataset
from tests.build_helpers import build
from tests.images import write_cohort
from tests.services.stores import BUCKET, Servers, free_ports, serve
from tests.web_server import Ranges
from tests.web_server import serve as serve_web

pytest.importorskip("tensorflow_io", reason="tensorflow-io is not installed; pip install beam-nifti[io]")

READ = """
import sys
import numpy as np
import tensorflow_io
from beam_nifti.errors import DatasetError
from beam_nifti.reader import load_dataset

try:
    batches = [(x.numpy(), y.numpy()) for x, y in load_dataset(sys.argv[1], batch_size=1)]
except DatasetError as e:
    print("error:", e)
else:
    images, labels = map(np.concatenate, zip(*batches))
    np.savez(sys.argv[2], x=images, y=labels)
    print("read", len(batches))
"""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with serve(tmp_path_factory.mktemp("object-stores")) as servers:
        yield servers


@pytest.fixture(scope="module")
def local(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset on the disk, which is also at s3://lab/dataset."""
    folder = tmp_path_factory.mktemp("dataset")
    build(write_cohort(folder / "cohort", 7), folder / "out", num_shards=2)
    shutil.copytree(folder / "out", servers.bucket / "dataset")
    return folder / "out"


def read(url: str, output: Path, endpoint: str = "") -> str:
    """What a process that loads a dataset prints; its batches are in the output."""
    done = subprocess.run(
        [sys.executable, "-c", READ, url, output],
        env=os.environ | {"S3_ENDPOINT": endpoint, "S3_USE_HTTPS": "0", "AWS_REGION": "us-east-1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.stdout.strip()


def assert_same(found: Path, dataset: Path) -> None:
    read = np.load(found)
    expected = {float(e["label"]): e["image"].tobytes() for e in Dataset(dataset)}
    assert {float(y): x.tobytes() for x, y in zip(read["x"], read["y"], strict=True)} == expected


def test_it_reads_what_is_on_the_disk(servers: Servers, local: Path, tmp_path: Path) -> None:
    endpoint = servers.proxies["s3"].url
    assert read(f"s3://{BUCKET}/dataset", tmp_path / "read.npz", endpoint) == "read 7"
    assert_same(tmp_path / "read.npz", local)


def test_it_reads_from_a_web_server(tmp_path: Path) -> None:
    build(write_cohort(tmp_path / "cohort", 7), tmp_path / "out", num_shards=2)
    with serve_web(tmp_path, Ranges) as server:
        assert read(f"{server.url}/out", tmp_path / "read.npz") == "read 7"
    assert_same(tmp_path / "read.npz", tmp_path / "out")


def test_without_libhdfs_nothing_is_said_to_be_missing(tmp_path: Path) -> None:
    said = read("hdfs://127.0.0.1:9000/dataset", tmp_path / "read.npz")
    assert said.startswith("error: hdfs://127.0.0.1:9000/dataset: TensorFlow finds no dataset_info.json")
    assert "check the path, whether libhdfs.so is found, and CLASSPATH, or use engine='indexed'" in said


def test_a_server_that_refuses_is_named(tmp_path: Path) -> None:
    """After a minute or two."""
    url = f"s3://{BUCKET}/dataset"
    said = read(url, tmp_path / "read.npz", f"http://127.0.0.1:{free_ports(1)[0]}")
    assert said.startswith(f"error: {url}/dataset_info.json: TensorFlow cannot read it (")
    assert "Couldn't connect to server); engine='indexed' may say why" in said


@pytest.mark.parametrize("url", [f"s3://{BUCKET}/another", "s3://another/dataset"])
def test_what_may_not_be_reached_is_not_said_to_be_missing(
    servers: Servers, local: Path, tmp_path: Path, url: str
) -> None:
    """Of these tensorflow-io reports that nothing is there."""
    said = read(url, tmp_path / "read.npz", servers.proxies["s3"].url)
    assert said.startswith(f"error: {url}: TensorFlow finds no dataset_info.json")
    assert "or the store cannot be reached: check the path, the credentials and S3_ENDPOINT" in said
