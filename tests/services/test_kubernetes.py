"""The manifests of `pipelines/kubernetes` against the schemas of their kinds. No cluster is involved."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "pipelines" / "kubernetes"


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / name).read_text()))


def check(*files: Path) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts" / "check_kubernetes"), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_manifests_fit_their_schemas() -> None:
    done = check()
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(list(FOLDER.glob("*.yaml")))


@pytest.mark.parametrize(
    ("name", "field", "place"),
    [
        ("flink.yaml", "envFrom", "spec.taskManager.podTemplate.spec.containers.0"),
        ("build.yaml", "podFailurePolicy", "spec"),
    ],
)
def test_a_misspelled_field_is_found(tmp_path: Path, name: str, field: str, place: str) -> None:
    changed = tmp_path / name
    changed.write_text(re.sub(f"{field}:", f"{field.lower()}:", (FOLDER / name).read_text()))
    done = check(changed)
    assert done.returncode == 1, done.stdout
    assert f"{changed}: {place}: " in done.stderr
    assert f"'{field.lower()}'" in done.stderr


def test_flink_opens_the_packages_of_the_jdk_that_the_tests_of_flink_open() -> None:
    options = read("flink.yaml")["spec"]["flinkConfiguration"]["env.java.opts.all"].split()
    tested = (ROOT / "scripts" / "flink" / "java.args").read_text().splitlines()
    assert options == [line for line in tested if not line.startswith("#")]


def test_the_build_reaches_the_cluster_and_its_workers() -> None:
    flink = read("flink.yaml")
    (pool,) = flink["spec"]["taskManager"]["podTemplate"]["spec"]["containers"]
    (build,) = read("build.yaml")["spec"]["template"]["spec"]["containers"]
    flags = dict(flag.removeprefix("--").partition("=")[::2] for flag in build["args"][3:])
    slots = flink["spec"]["flinkConfiguration"]["taskmanager.numberOfTaskSlots"]
    assert flags["flink_master"] == f"{flink['metadata']['name']}-rest:8081"  # as the operator names it
    assert flags["environment_config"] == f"localhost:{pool['ports'][0]['containerPort']}"
    assert flags["sdk_worker_parallelism"] == slots
    assert pool["image"] == build["image"]
    secrets = {source["secretRef"]["name"] for source in (*pool["envFrom"], *build["envFrom"])}
    assert secrets == {read("store.yaml")["metadata"]["name"]}
