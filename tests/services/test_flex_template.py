"""The Flex Template's launcher, with Cloud Storage played by a server on this machine.

It describes a job for Dataflow; the test then runs that very job here, as Dataflow's workers would.
Needs the extra [gcp].
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.services.conftest import INSTALL_TIMEOUT, Reference, run_cli

pytest.importorskip("google.cloud.dataflow", reason="needs the extra [gcp]")

ROOT = Path(__file__).parent.parent.parent
STORES = ROOT / "scripts/object_stores"
IMAGE = "europe-west1-docker.pkg.dev/lab/images/beam-nifti:0.1.0"
JOB = "template-test"

RUN = """\
import sys
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_runner_api_pb2 as proto
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.environments import EmbeddedPythonEnvironment

graph = proto.Pipeline.FromString(sys.stdin.buffer.read())
for environment in graph.components.environments.values():
    environment.CopyFrom(EmbeddedPythonEnvironment.default().to_runner_api(None))
FnApiRunner().run_via_runner_api(graph, PipelineOptions(["--no_auth"])).wait_until_finish()
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """What leads a process to a Cloud Storage server that has an empty bucket, `lab`."""
    stores = [
        str(STORES),
        f"--run={tmp_path_factory.mktemp('stores')}",
        "--s3-port=17072",
        "--gcs-port=17073",
    ]
    subprocess.run([str(STORES), "install"], check=True, timeout=INSTALL_TIMEOUT)
    up = subprocess.run([*stores, "up", "lab"], check=True, stdout=subprocess.PIPE, text=True)
    try:
        exports = [line.removeprefix("export ") for line in up.stdout.splitlines()]
        yield {"PYTHONPATH": str(ROOT)} | dict(line.split("=", 1) for line in exports)
    finally:
        subprocess.run([*stores, "down"], check=True)


@pytest.fixture(scope="module")
def bucket(environment: Mapping[str, str]) -> Any:
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    options = {"api_endpoint": environment["STORAGE_EMULATOR_HOST"]}
    client = storage.Client("lab", AnonymousCredentials(), client_options=options)
    return client.bucket("lab")


def run_python(arguments: list[str], environment: Mapping[str, str], data: bytes = b"") -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        input=data,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode()


def test_a_launched_template_builds_the_dataset(
    reference: Reference, environment: Mapping[str, str], bucket: Any
) -> None:
    for path in reference.manifest.parent.iterdir():
        bucket.blob(f"cohort/{path.name}").upload_from_filename(str(path))
    parameters = {
        "manifest": "gs://lab/cohort/manifest.tsv",
        "output": "gs://lab/dataset",
        "sdk_container_image": IMAGE,
        "overwrite": "false",
        "label_column": "",
    }
    launcher = {
        "project": "lab",
        "region": "europe-west1",
        "job_name": JOB,
        "temp_location": "gs://lab/tmp",
        "staging_location": "gs://lab/staging",
        "template_location": "gs://lab/launch/job_object",
    }
    given = [f"--{name}={value}" for name, value in (parameters | launcher).items()]
    launch = [str(ROOT / "pipelines/flex_template/launch.py"), *given, *reference.flags, "--no_auth"]
    run_python(launch, environment)

    job = json.loads(bucket.blob("launch/job_object").download_as_bytes())
    (pool,) = job["environment"]["workerPools"]
    assert [image["containerImage"] for image in pool["sdkHarnessContainerImages"]] == [IMAGE]
    staged = {blob.name.rpartition("/")[2]: blob for blob in bucket.list_blobs(prefix="staging/")}
    assert staged.keys() == {"pipeline.pb", "submission_environment_dependencies.txt"}
    assert not bucket.blob("dataset/dataset_info.json").exists()

    run_python(["-c", RUN], environment, staged["pipeline.pb"].download_as_bytes())
    built = {
        blob.name.removeprefix("dataset/"): hashlib.sha256(blob.download_as_bytes()).hexdigest()
        for blob in bucket.list_blobs(prefix="dataset/")
    }
    shards = {name: digest for name, digest in reference.content.items() if name.endswith(".tfrecord.gz")}
    assert {name: digest for name, digest in built.items() if name.endswith(".tfrecord.gz")} == shards

    again = [*list(parameters.values())[:2], *reference.flags, "--temp-location=gs://lab/tmp", "--quiet"]
    assert "kept     60 examples" in run_cli(["build", *again], **environment)
    left = {blob.name.removeprefix("dataset/") for blob in bucket.list_blobs(prefix="dataset/")}
    assert left == reference.content.keys()
