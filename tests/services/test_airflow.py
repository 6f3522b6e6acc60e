"""The DAG under a real scheduler: it is asked for by REST, its build is killed, and another DAG follows it.

The environment .venv-airflow has Airflow: `scripts/check` makes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.dying import MARKER
from tests.images import write_cohort
from tests.services.conftest import LOCAL, content_of, run_cli

ROOT = Path(__file__).parents[2]
AIRFLOW = ROOT / ".venv-airflow/bin/airflow"
PATIENCE = 240.0
"""Seconds for whatever is waited for."""

DAGS = """
from datetime import timedelta

from airflow.sdk import Asset, dag, task

from airflow_dag import make_dag

cohort = make_dag("cohort")
for each in cohort.tasks:
    each.retry_delay = timedelta(seconds=1)


@dag(schedule=[Asset("cohort")])
def train():
    @task
    def start(triggering_asset_events):
        *_, event = triggering_asset_events[Asset("cohort")]
        with open(event.extra["output"] + ".trained", "w") as file:
            file.write(event.extra["manifest"])

    start()


train()
"""


@dataclass
class Standalone:
    """A running `airflow standalone`.

    Attributes:
        url: of its API.
        process: it.
        log: file of what it prints.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    _headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})

    def call(self, method: str, path: str, body: object = None) -> Any:
        """The answer of the API; None while there is none."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, self._headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as e:
            if e.code == 404:
                return None
            raise AssertionError(e.read().decode()) from e
        except (urllib.error.URLError, ConnectionError):
            return None

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        """What the condition is once it is something; polled."""
        deadline = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert time.monotonic() < deadline, self.log.read_text()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.3)
                raise AssertionError(self.log.read_text())
        return found

    def log_in(self) -> None:
        token = self.wait_for(lambda: self.call("GET", "/auth/token"))["access_token"]
        self._headers["Authorization"] = f"Bearer {token}"

    def ended_run(self, dag_id: str) -> dict[str, Any] | None:
        """The only run of a DAG, if it has come to its end."""
        runs = (self.call("GET", f"/api/v2/dags/{dag_id}/dagRuns") or {"dag_runs": []})["dag_runs"]
        return next((run for run in runs if run["state"] in ("success", "failed")), None)


@pytest.fixture
def standalone(tmp_path: Path) -> Iterator[Standalone]:
    home, log = tmp_path / "airflow", tmp_path / "airflow.log"
    (home / "dags").mkdir(parents=True)
    shutil.copy(ROOT / "pipelines/airflow_dag.py", home / "dags")
    (home / "dags/cohort.py").write_text(DAGS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": url,
        "AIRFLOW_VAR_BEAM_NIFTI_COMMAND": f"{shlex.quote(sys.executable)} -m beam_nifti",
        "PATH": f"{AIRFLOW.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        MARKER: str(tmp_path / "died"),
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(AIRFLOW), "standalone"], env=environment, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        yield Standalone(url, process, log)
    finally:
        started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in started:  # all of them: told alone, `standalone` leaves its parts behind
            with contextlib.suppress(psutil.NoSuchProcess):
                each.terminate()
        _, alive = psutil.wait_procs(started, timeout=60)
        for survivor in alive:
            survivor.kill()
        process.wait()


@pytest.mark.timeout(600)
def test_a_triggered_build_is_killed_and_tried_again_and_training_starts(
    standalone: Standalone, tmp_path: Path
) -> None:
    manifest, output = write_cohort(tmp_path / "cohort", 12), tmp_path / "dataset"
    flags = ["--preprocess=tests.dying:at_the_tenth", "--workers=1"]
    conf = {"manifest": str(manifest), "output": str(output), "examples_per_shard": 3, "flags": flags}
    standalone.log_in()
    for dag_id in ("cohort", "train"):
        standalone.wait_for(lambda dag_id=dag_id: standalone.call("GET", f"/api/v2/dags/{dag_id}"))
    run = standalone.call("POST", "/api/v2/dags/cohort/dagRuns", {"logical_date": None, "conf": conf})
    ended = standalone.wait_for(lambda: standalone.ended_run("cohort"))
    tasks = standalone.call("GET", f"/api/v2/dags/cohort/dagRuns/{run['dag_run_id']}/taskInstances")
    tries = {task["task_id"]: (task["state"], task["try_number"]) for task in tasks["task_instances"]}
    assert tries.pop("report")[0] == "skipped", "none was asked for"
    assert ended["state"] == "success", (tries, standalone.log.read_text())
    assert (tmp_path / "died").exists()
    assert tries == {"check_manifest": ("success", 1), "build": ("success", 2), "verify": ("success", 1)}

    assert standalone.wait_for(lambda: standalone.ended_run("train"))["state"] == "success"
    assert (tmp_path / "dataset.trained").read_text() == str(manifest)

    again = ["build", str(manifest), str(tmp_path / "reference"), "--examples-per-shard=3", *flags, *LOCAL]
    run_cli(again, **{MARKER: str(tmp_path / "died"), "PYTHONPATH": str(ROOT)})
    assert content_of(output) == content_of(tmp_path / "reference")
