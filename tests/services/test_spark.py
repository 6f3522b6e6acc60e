"""The build on a real Spark cluster of processes, whose executors are killed while they work.

Spark and Beam's job server are of the versions in scripts/spark_cluster, older than the Python SDK.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from inotify_simple import flags

import beam_nifti as bn
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

SCRIPT = Path(__file__).parents[2] / "scripts" / "spark_cluster"
HOME = SCRIPT.parents[1] / ".services" / "spark"
WORKERS = 2

pytestmark = pytest.mark.timeout(600)


def _processes(main_class: str) -> list[psutil.Process]:
    """Processes of this cluster that run a class of Spark's."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        ours = (process.info["environ"] or {}).get("BEAM_NIFTI_SPARK_CLUSTER") == str(HOME)
        if ours and any(a.endswith(f".{main_class}") for a in process.info["cmdline"] or ()):
            found.append(process)
    return found


def _catch_loading() -> tuple[psutil.Process, list[psutil.Process]]:
    """An executor, and its launcher and Python worker; these are stopped, with a part half written."""
    return catch_writing(lambda: _processes("CoarseGrainedExecutorBackend"))


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        flags: of `beam-nifti build` that reach its job server, as `up` prints them.
        flags_without: of `beam-nifti build` that reach its master by a job server of the build's own.
    """

    flags: tuple[str, ...]
    flags_without: tuple[str, ...]

    @classmethod
    def up(cls) -> Cluster:
        text = run_script(SCRIPT, "up", str(WORKERS))
        (instead,) = re.findall(r"^With (--runner=SparkRunner .+)$", text, re.M)
        words = build_flags(text)
        rest = [w for w in words if not w.startswith(("--runner", "--job_endpoint", "--artifact_endpoint"))]
        return cls(words, (*shlex.split(instead), *rest))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with installed(SCRIPT):
        yield Cluster.up()


def test_same_bytes_by_a_running_job_server(cluster: Cluster, reference: Reference, tmp_path: Path) -> None:
    logs = set(HOME.glob("work/*/app-*/*/stderr"))
    run_cli(["build", str(reference.manifest), str(tmp_path / "out"), *reference.flags, *cluster.flags])
    assert content_of(tmp_path / "out") == reference.content
    tasks = [
        len(re.findall("Finished task", p.read_text()))
        for p in set(HOME.glob("work/*/app-*/*/stderr")) - logs
    ]
    assert len(tasks) == WORKERS, "it did not start an executor for each worker"
    assert min(tasks) > 0, "an executor had nothing to do"


VOLUMES = 400
"""Of which each of four tasks loads a hundred."""


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("cohort")
    manifest = write_rows(folder / "cohort", VOLUMES, 40, (64, 64, 64))
    flags_ = ("--num-shards=8",)
    run_cli(["build", str(manifest), str(folder / "dataset"), *flags_, *LOCAL])
    return Reference(manifest, flags_, content_of(folder / "dataset"))


def _watch_loading(
    cohort: Reference, output: Path, flags_: Sequence[str], faults: Mapping[int, Callable[[], None]]
) -> Watched:
    arguments = [str(cohort.manifest), str(output), *cohort.flags, *flags_]
    return watch_build(arguments, cohort.manifest.parent, flags.OPEN, ".nii.gz", faults)


def test_executors_die_while_volumes_are_loaded(cluster: Cluster, cohort: Reference, tmp_path: Path) -> None:
    """One alone, whose Python worker goes on; then one with all that belongs to it."""
    killed: list[int] = []

    def kill_alone() -> None:
        executor, workers = _catch_loading()
        executor.kill()
        for worker in workers:
            worker.resume()
        killed.append(executor.pid)

    def kill_all() -> None:
        executor, workers = _catch_loading()
        for process in (*workers, executor):
            process.kill()
        killed.append(executor.pid)

    faults = {VOLUMES // 4: kill_alone, VOLUMES // 2: kill_all}
    watched = _watch_loading(cohort, tmp_path / "out", cluster.flags, faults)
    assert watched.code == 0, watched.printed
    assert len(set(killed)) == 2, "the faults did not come midway"
    assert watched.events > VOLUMES + 1, "nothing was loaded again"
    assert content_of(tmp_path / "out") == cohort.content


def test_a_slow_worker_is_overtaken_by_a_second_copy_of_its_task(
    cluster: Cluster, cohort: Reference, tmp_path: Path
) -> None:
    """By Spark's speculative execution: for a while both copies write parts of the same rows.

    The build starts a job server of its own here, by --runner=SparkRunner.
    """
    stopped: list[psutil.Process] = []

    def stop() -> None:
        stopped.extend(_catch_loading()[1])

    def resume() -> None:
        for worker in stopped:
            worker.resume()

    flags_ = (*cluster.flags_without, "--job_server_jvm_properties=-Dspark.speculation=true")
    # Without a copy, images are opened once each, and the first one's header before.
    faults = {VOLUMES // 4: stop, VOLUMES + 2: resume}
    watched = _watch_loading(cohort, tmp_path / "out", flags_, faults)
    assert watched.code == 0, watched.printed
    assert watched.events > VOLUMES + 1, "there was no second copy"
    assert content_of(tmp_path / "out") == cohort.content


def test_spark_reads_a_dataset_as_its_page_says(
    cluster: Cluster, reference: Reference, tmp_path: Path
) -> None:
    page = SCRIPT.parents[1] / "docs" / "spark.md"
    (code,) = re.findall(r"^```python\n(.+?)^```", page.read_text(), re.M | re.S)
    dataset = reference.manifest.parents[1] / "dataset"
    (library,) = HOME.glob("venv/lib/python*/site-packages/pyspark")
    (bridge,) = library.glob("python/lib/py4j-*.zip")
    places = (library.parent, bridge, SCRIPT.parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code.replace("/data/dataset", str(dataset))],
        env=os.environ | {"PYSPARK_PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(map(str, places))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    records = bn.Dataset(str(dataset), "train")
    means = {record["id"]: float(record["image"].mean()) for record in records}
    shown = {
        cells[0]: float(cells[1]) for cells in re.findall(r"^\| *(\S+)\| *(0\.\d+) *\|$", done.stdout, re.M)
    }
    assert len(shown) == min(20, len(means))  # the rows that `show` prints
    assert shown == pytest.approx({name: means[name] for name in shown})


def test_down_ends_all_that_was_started(cluster: Cluster) -> None:
    """What a killed executor has left behind as well."""
    assert len(_processes("Worker")) == WORKERS
    run_script(SCRIPT, "down")
    survivors = [
        p for p in psutil.process_iter(["environ"]) if "BEAM_NIFTI_SPARK_CLUSTER" in (p.info["environ"] or {})
    ]
    assert survivors == []
