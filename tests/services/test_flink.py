"""The build on a real Flink cluster of processes, whose TaskManagers are killed while they work.

Flink and Beam's Java side are of the versions in scripts/flink_cluster, older than the Python SDK.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from inotify_simple import flags

from tests.services.conftest import (
    LOCAL,
    Reference,
    build_flags,
    content_of,
    installed,
    run_cli,
    run_script,
)
from tests.services.watching import Watched, catch_writing, watch_build, write_rows

SCRIPT = Path(__file__).parents[2] / "scripts" / "flink_cluster"
RUN = SCRIPT.parents[1] / ".services" / "flink" / "run"
TASK_MANAGERS = 3

pytestmark = pytest.mark.timeout(600)

_STEPS = """
import sys

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from beam_nifti.transforms import EncodeExample, LoadVolume, ReadManifest, Rescale, WriteToTFRecord

with beam.Pipeline(options=PipelineOptions(sys.argv[3:])) as pipeline:
    records = pipeline | ReadManifest(sys.argv[1]) | LoadVolume() | Rescale() | EncodeExample()
    records | WriteToTFRecord(sys.argv[2], examples_per_shard=5)
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        flags: of `beam-nifti build`, as `up` prints them.
        text: all that `up` prints.
        address: of Flink's REST interface.
    """

    flags: tuple[str, ...]
    text: str
    address: str

    @classmethod
    def up(cls) -> Cluster:
        text = run_script(SCRIPT, "up", str(TASK_MANAGERS))
        (address,) = re.findall(r"http://[\d.:]+", text.partition("\n")[0])
        return cls(build_flags(text), text, address)

    def ask(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.address}/{path}", timeout=10) as response:
            return json.load(response)

    def newest_job(self) -> str:
        return str(max(self.ask("jobs/overview")["jobs"], key=lambda job: job["start-time"])["jid"])

    def subtasks(self, step: str) -> list[dict[str, Any]]:
        """What the newest job says of the stage that has a step."""
        job = self.ask(f"jobs/{self.newest_job()}")
        (stage,) = (v for v in job["vertices"] if re.search(rf"\b{step}\b", v["name"]))
        return list(self.ask(f"jobs/{job['jid']}/vertices/{stage['id']}")["subtasks"])

    def kill_worker_of(self, step: str) -> None:
        """SIGKILL a TaskManager that works on a step; its Python worker goes on."""
        busy = [s["taskmanager-id"] for s in self.subtasks(step) if s["status"] == "RUNNING"]
        os.kill(int((RUN / f"{busy[0]}.pid").read_text()), signal.SIGKILL)

    def kill_writer(self) -> None:
        """SIGKILL a TaskManager and its Python workers, which have a part half written."""
        master, workers = catch_writing(self._task_managers)
        for process in (*workers, master):
            process.kill()

    def kill_python_worker(self) -> None:
        """SIGKILL a Python worker with a part half written, as if out of memory; its TaskManager goes on."""
        _, workers = catch_writing(self._task_managers)
        for process in workers:
            if process.name().startswith("python"):
                process.kill()
            else:
                process.resume()

    @staticmethod
    def _task_managers() -> Iterator[psutil.Process]:
        for pid in RUN.glob("taskmanager*.pid"):
            with contextlib.suppress(psutil.NoSuchProcess):
                yield psutil.Process(int(pid.read_text()))


@pytest.fixture(scope="module")
def running() -> Iterator[Cluster]:
    with installed(SCRIPT):
        yield Cluster.up()


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    """With all its TaskManagers, whatever an earlier test did to them."""
    return running if running.ask("overview")["taskmanagers"] == TASK_MANAGERS else Cluster.up()


def _local(manifest: Path, output: Path, *arguments: str) -> dict[str, str]:
    run_cli(["build", str(manifest), str(output), *arguments, *LOCAL])
    return content_of(output)


def test_same_bytes_by_a_running_job_server(cluster: Cluster, reference: Reference, tmp_path: Path) -> None:
    run_cli(["build", str(reference.manifest), str(tmp_path / "out"), *reference.flags, *cluster.flags])
    assert content_of(tmp_path / "out") == reference.content
    places = {s["taskmanager-id"] for s in cluster.subtasks("LoadVolume")}
    assert len(places) == TASK_MANAGERS - 1, "it did not run in parallel"


def test_same_bytes_by_flink_runner(cluster: Cluster, reference: Reference, tmp_path: Path) -> None:
    (instead,) = re.findall(r"^With (--runner=FlinkRunner .+)$", cluster.text, re.M)
    replaced = ("--runner", "--job_endpoint", "--artifact_endpoint")
    used = [*shlex.split(instead), *(flag for flag in cluster.flags if not flag.startswith(replaced))]
    run_cli(["build", str(reference.manifest), str(tmp_path / "out"), *reference.flags, *used])
    assert content_of(tmp_path / "out") == reference.content


def _kill_while_loading(
    cluster: Cluster, folder: Path, volumes: int, edge: int, kill: Callable[[], None]
) -> Watched:
    """A build in which something is killed when a quarter of the volumes were opened; its bytes are right."""
    manifest = write_rows(folder / "cohort", volumes, 40, (edge, edge, edge))
    expected = _local(manifest, folder / "local", "--num-shards=8")
    arguments = [str(manifest), str(folder / "out"), "--num-shards=8", *cluster.flags]
    watched = watch_build(arguments, manifest.parent, flags.OPEN, ".nii.gz", {volumes // 4: kill})
    assert watched.code == 0, watched.printed
    assert any(s["attempt"] > 0 for s in cluster.subtasks("LoadVolume")), "the fault hit nobody"
    assert content_of(folder / "out") == expected
    return watched


def test_a_task_manager_dies_while_volumes_are_loaded(cluster: Cluster, tmp_path: Path) -> None:
    volumes = 400
    watched = _kill_while_loading(cluster, tmp_path, volumes, 64, cluster.kill_writer)
    assert volumes // 4 <= len(watched.seen) < volumes, "the fault did not come midway"
    assert watched.events > volumes + 1, "nothing was loaded again"


def test_a_task_manager_dies_while_shards_are_committed(cluster: Cluster, tmp_path: Path) -> None:
    shards, output = 600, tmp_path / "out"
    manifest = write_rows(tmp_path / "cohort", 2 * shards, 30, (8, 8, 8))
    expected = _local(manifest, tmp_path / "local", f"--num-shards={shards}")
    output.mkdir()

    def kill() -> None:
        parts = [len(list(folder.glob("*.part"))) for folder in output.glob(".build/*/*")]
        several.append(max(parts) > 1)
        cluster.kill_worker_of("WithoutKey")  # the step behind CommitShards, and in its stage

    several: list[bool] = []
    watched = watch_build(
        # Units of one row, so that every shard is merged of two parts.
        [str(manifest), str(output), f"--num-shards={shards}", *cluster.flags, f"--workers={shards}"],
        output,
        flags.MOVED_TO,
        ".tfrecord.gz",
        {20: kill},
    )
    assert watched.code == 0, watched.printed
    assert several == [True], "no shard was to be merged"
    assert len(set(watched.seen)) < shards, "the fault did not come midway"
    # Shards that were complete are not written again, so it is Flink that tells.
    assert any(s["attempt"] > 0 for s in cluster.subtasks("WithoutKey")), "the fault hit nobody"
    assert content_of(output) == expected


def test_a_python_worker_dies(cluster: Cluster, tmp_path: Path) -> None:
    """Flink restarts the task, and Beam gives it the dead worker again until its cache expires."""
    _kill_while_loading(cluster, tmp_path, 300, 48, cluster.kill_python_worker)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """A pipeline of steps, its manifest of 300 rows, and what it writes on this machine."""
    folder = tmp_path_factory.mktemp("steps")
    manifest, script = write_rows(folder / "cohort", 300, 40, (48, 48, 48)), folder / "steps.py"
    script.write_text(_STEPS)
    here = [sys.executable, str(script), str(manifest), str(folder / "local"), *LOCAL]
    subprocess.run(here, check=True, capture_output=True)
    return script, manifest, content_of(folder / "local")


@pytest.mark.parametrize("phase", ["loaded", "committed"])
def test_a_task_manager_dies_in_a_pipeline_of_steps(
    cluster: Cluster, steps: tuple[Path, Path, dict[str, str]], tmp_path: Path, phase: str
) -> None:
    """While volumes are loaded and written into parts; and while shards are made of these."""
    (script, manifest, expected), count, output = steps, 300, tmp_path / "out"
    output.mkdir()
    if phase == "loaded":
        watched = watch_build(
            [str(manifest), str(output), *cluster.flags],
            manifest.parent,
            flags.OPEN,
            ".nii.gz",
            {count // 4: cluster.kill_writer},
            program=(str(script),),
        )
        assert watched.events > count + 1, "nothing was loaded again"
    else:
        watched = watch_build(
            [str(manifest), str(output), *cluster.flags],
            output,
            flags.MOVED_TO,
            ".tfrecord.gz",
            {5: lambda: cluster.kill_worker_of("CommitShards")},
            program=(str(script),),
        )
    assert watched.code == 0, watched.printed
    assert 0 < len(watched.seen) < (count if phase == "loaded" else count // 5), "the fault came too late"
    assert content_of(output) == expected


def test_volumes_that_fail_are_said_as_on_one_machine(cluster: Cluster, tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "cohort", 12, 12, (12, 11, 10))
    image = manifest.parent / "0005.nii.gz"
    image.write_bytes(image.read_bytes()[:-40])
    watched = watch_build(
        [str(manifest), str(tmp_path / "out"), *cluster.flags], manifest.parent, flags.OPEN, ".nii.gz", {}
    )
    assert watched.code == 1, watched.printed
    message = watched.printed[watched.printed.rindex("beam-nifti: error: ") :]
    assert "error: 1 of 12 volumes failed, more than --max-bad-fraction allows" in message
    failures = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    assert [json.loads(line)["participant_id"] for line in failures] == ["sub-00005"]
    assert watched.events <= 12 + 1, "what the user must repair was tried again"


def test_a_check_reports_what_it_does_on_one_machine(
    cluster: Cluster, reference: Reference, tmp_path: Path
) -> None:
    command = ["check", str(reference.manifest), "--json", "--quiet"]
    here = run_cli([*command, *LOCAL])
    there = run_cli([*command, "--out", str(tmp_path / "report.json"), *cluster.flags])
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(here)
    assert json.loads(here)["num_images"] == 60
    assert there.endswith(here)
