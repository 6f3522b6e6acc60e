"""The Airflow DAG, in an environment that has Airflow and no Beam: `scripts/check` makes .venv-airflow.

`beam-nifti` itself is that of .venv, as a team's Airflow would find it: a program with a path.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.dying import MARKER
from tests.images import brain, write_cohort, write_image, write_manifest

if importlib.util.find_spec("airflow") is None:
    pytest.skip("needs Airflow, in an environment of its own", allow_module_level=True)

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / ".venv/bin/beam-nifti"
DAG_FILE = ROOT / "pipelines/airflow_dag.py"
DATAFLOW_FILE = ROOT / "pipelines/airflow_dataflow_dag.py"

pytestmark = pytest.mark.filterwarnings("default")  # Airflow warns of itself


def examples_of(page: str) -> str:
    """The DAGs that a page shows."""
    return "".join(re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DAGs folder with our file and those of the pages, of an Airflow with an empty database."""
    home = tmp_path_factory.mktemp("airflow")
    folder = home / "dags"
    folder.mkdir()
    (folder / DAG_FILE.name).write_bytes(DAG_FILE.read_bytes())
    (folder / "nightly.py").write_text(examples_of("docs/airflow.md"))
    (folder / "brains.py").write_text(examples_of("docs/cookbook/airflow.md"))
    os.environ |= {  # Airflow reads them when it is imported
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(folder),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW_VAR_BEAM_NIFTI_COMMAND": shlex.quote(str(PROGRAM)),
    }
    from airflow.utils.db import initdb

    initdb()
    return folder


def load(folder: Path) -> Any:
    """What Airflow makes of the DAGs folder."""
    from airflow.dag_processing.dagbag import BundleDagBag

    return BundleDagBag(dag_folder=folder, bundle_path=folder, bundle_name="dags-folder")


@pytest.fixture(scope="module")
def module(folder: Path) -> ModuleType:
    """pipelines/airflow_dag.py, as Airflow loads it."""
    return sys.modules[type(load(folder).dags["beam_nifti"].get_task("build")).__module__]


@pytest.fixture
def run_dag(folder: Path) -> Callable[..., dict[str, tuple[str, int]]]:
    """Run the DAG with some params: the state of every task, and how often it was tried."""

    def run(**params: Any) -> dict[str, tuple[str, int]]:
        dag = load(folder).dags["beam_nifti"]  # anew, as a run leaves its params behind in it
        for task in dag.tasks:
            task.retry_delay *= 0
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in params.items()}
        return {
            i.task_id: (str(i.state), i.try_number) for i in dag.test(run_conf=plain).get_task_instances()
        }

    return run


def beam_nifti(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def content_of(output: Path) -> dict[str, bytes]:
    return {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file()}


# The files


def test_each_file_gives_its_own_dags(folder: Path) -> None:
    bag = load(folder)
    assert bag.import_errors == {}
    files = {name: Path(dag.fileloc).name for name, dag in bag.dags.items()}
    examples = dict.fromkeys(("cohort", "on_flink", "train"), "nightly.py")
    assert files == {"beam_nifti": "airflow_dag.py", "brains": "brains.py"} | examples


def test_parsing_costs_little_beyond_airflow(folder: Path) -> None:
    code = f"""
import sys, time
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG, Asset, BaseOperator, Param
before, start = set(sys.modules), time.process_time()
bag = DagBag({str(folder / DAG_FILE.name)!r})
print(time.process_time() - start)
assert list(bag.dags) == ["beam_nifti"]
print(*sys.modules.keys() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    seconds, modules = done.stdout.splitlines()[-2:]
    assert float(seconds) < 0.1
    loaded = {name.partition(".")[0] for name in modules.split()}
    assert not {"apache_beam", "beam_nifti", "google", "numpy", "tensorflow"} & loaded


def test_a_param_that_does_not_fit_is_refused_before_the_run(
    run_dag: Callable[..., Any], tmp_path: Path
) -> None:
    good = {"manifest": "/data/manifest.tsv", "output": "s3://lab/dataset"}
    for wrong in (
        {"manifest": "manifest.tsv"},
        {"output": "--overwrite"},
        {"runner": "NoRunner"},
        {"num_shards": 0},
        {"max_bad_fraction": 2},
        {"container_image": ""},
        {"flags": ["rescale=none"]},
        {"report": "report.html"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            run_dag(**good | wrong)
    with pytest.raises(ValueError, match="manifest"):
        run_dag(output=tmp_path)


def test_a_default_for_no_param_is_refused(module: ModuleType) -> None:
    with pytest.raises(TypeError, match="unknown params: outptu; choose from manifest, output"):
        module.make_dag("cohort", manifest="/data/manifest.tsv", outptu="/data/dataset")


# The arguments


@pytest.mark.parametrize(
    ("runner", "flags"),
    [
        ("DirectRunner", []),
        ("FlinkRunner", ["--flink_master=flink:8081"]),
        ("SparkRunner", ["--spark_master_url=spark://spark:7077"]),
        ("PortableRunner", ["--job_endpoint=jobs:8099"]),
        ("PrismRunner", []),
    ],
)
def test_the_command_takes_the_arguments_for_every_runner(
    module: ModuleType, tmp_path: Path, runner: str, flags: list[str]
) -> None:
    params = {
        **{name: schema.get("default") for name, schema in module.PARAMS.items()},
        "manifest": str(write_cohort(tmp_path / "cohort", 2)),
        "output": str(tmp_path / "out"),
        "runner": runner,
        "flags": ["--shuffle-seed=1", *flags],
        "container_image": None if runner == "DirectRunner" else "beam-nifti:0.1.0",
        "num_shards": 2,
    }
    done = beam_nifti(*module.check_arguments(params))
    assert done.returncode == 0, done.stderr
    assert "2 of up to 1 example" in done.stdout


def test_an_image_without_workers_is_refused(module: ModuleType) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    params = {name: schema.get("default", "/") for name, schema in module.PARAMS.items()}
    with pytest.raises(AirflowFailException, match="DirectRunner starts no workers"):
        module.build_arguments(params | {"container_image": "beam-nifti:0.1.0"})


def test_dataflow_gets_its_image(module: ModuleType) -> None:
    params = {name: schema.get("default", "gs://lab/x") for name, schema in module.PARAMS.items()}
    given = module.build_arguments(params | {"runner": "DataflowRunner", "container_image": "lab/x:1"})
    assert {"--runner=DataflowRunner", "--sdk_container_image=lab/x:1"} < set(given)


def test_the_dag_of_dataflow_asks_its_template_for_what_it_has(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("airflow.providers.apache.beam", reason="needs the provider for Dataflow")
    for name in (DAG_FILE.name, DATAFLOW_FILE.name):
        (tmp_path / name).write_bytes((ROOT / "pipelines" / name).read_bytes())
    bag = load(tmp_path)
    assert bag.import_errors == {}
    dag = bag.dags["beam_nifti_dataflow"]
    assert [task.task_id for task in dag.topological_sort()] == [
        "check_manifest",
        "build",
        "verify",
        "report",
    ]
    module = sys.modules[type(dag.get_task("build")).__module__]
    params = {name: schema.get("default", "gs://lab/x") for name, schema in module.DATAFLOW_PARAMS.items()}
    params |= {"num_shards": 2, "anonymous_ids": "gs://lab/key", "flags": ["--shuffle-seed=1", "--clip"]}
    given = module.template_parameters(params)
    known = json.loads((ROOT / "pipelines/flex_template/metadata.json").read_text())["parameters"]
    assert given.keys() <= {parameter["name"] for parameter in known}
    assert {parameter["name"] for parameter in known if not parameter.get("isOptional")} <= given.keys()
    for parameter in known:
        for regex in parameter.get("regexes", ()):
            assert re.search(regex, given.get(parameter["name"], "")) or parameter["name"] not in given
    assert (given["clip"], given["shuffle_seed"], given["num_shards"]) == ("true", "1", "2")


# Exit codes


def operator(module: ModuleType, command: str, arguments: Sequence[str] = ()) -> Any:
    return module.BeamNiftiOperator(task_id="run", arguments=lambda _: list(arguments), command=command)


@pytest.mark.parametrize("code", [1, 2])
def test_a_failure_that_stays_fails_at_once(module: ModuleType, code: int) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    task = operator(module, f"sh -c 'echo error: of manifest.tsv; exit {code}'")
    with pytest.raises(AirflowFailException, match=rf"exit code {code}, .* error: of manifest\.tsv"):
        task.execute({"params": {}})


@pytest.mark.parametrize("end", ["exit 75", "exit 130", "kill -KILL $$"])
def test_any_other_failure_is_tried_again(module: ModuleType, end: str) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    with pytest.raises(AirflowException) as raised:
        operator(module, f"sh -c 'echo stopped; {end}'").execute({"params": {}})
    assert not isinstance(raised.value, AirflowFailException)


def test_a_program_that_is_not_there_is_the_variables_fault(module: ModuleType) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    with pytest.raises(AirflowFailException, match=r"/none: No such file.* Variable beam_nifti_command"):
        operator(module, "/none").execute({"params": {}})


def test_a_task_that_is_stopped_stops_its_command(module: ModuleType) -> None:
    from airflow.sdk.exceptions import AirflowException

    task, raised = operator(module, "tail", ["-f", "/dev/null"]), list[str]()

    def execute() -> None:
        try:
            task.execute({"params": {}})
        except AirflowException as e:
            raised.append(str(e))

    thread = threading.Thread(target=execute, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while task._process.sub_process is None:
        assert time.monotonic() < deadline
    task.on_kill()
    thread.join(timeout=60)
    assert raised == ["exit code -15. "]


# Whole runs


def test_a_run_builds_the_dataset_and_tells_of_it(run_dag: Callable[..., Any], tmp_path: Path) -> None:
    """With paths that a shell, or Jinja, would make something else of."""
    from airflow.models.asset import AssetEvent
    from airflow.utils.session import create_session

    odd = 'o\'dd "cohort" $(touch HERE) {{ ds }} ;&*'
    manifest, output = write_cohort(tmp_path / odd, 12), tmp_path / f"{odd} out"
    page, flags = tmp_path / f"{odd}.html", ["--rescale=window:-10,900"]
    states = run_dag(manifest=manifest, output=output, num_shards=2, flags=flags, report=page)
    assert states == dict.fromkeys(("check_manifest", "build", "verify", "report"), ("success", 1))
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert beam_nifti("verify", output, f"--manifest={manifest}", "--deep=all").returncode == 0
    assert len(list(output.glob("*-of-00002.tfrecord.gz"))) == 2
    with create_session() as session:
        event = session.query(AssetEvent).order_by(AssetEvent.id.desc()).first()
        assert event is not None
        assert event.asset.name == "beam_nifti"
        assert event.extra == {"manifest": str(manifest), "output": str(output)}


def test_a_wrong_manifest_fails_at_once_and_nothing_is_written(
    run_dag: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path / "manifest.tsv", [{"image": "a.nii"}])
    states = run_dag(manifest=manifest, output=tmp_path / "out")
    assert states["check_manifest"] == ("failed", 1)
    assert {states["build"][0], states["verify"][0]} == {"upstream_failed"}
    assert "not usable as a manifest" in "".join(capfd.readouterr())
    assert not (tmp_path / "out").exists()


def test_bad_volumes_fail_at_once_and_are_listed_where_the_log_says(
    run_dag: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest, output = write_cohort(tmp_path / "cohort", 12), tmp_path / "out"
    write_image(manifest.parent / "sub-0007.nii.gz", brain((2, 2, 2)))
    states = run_dag(manifest=manifest, output=output)
    assert states["build"] == ("failed", 1)
    assert states["verify"][0] == "upstream_failed"
    (place,) = set(re.findall(r"listed in (\S+)", "".join(capfd.readouterr())))
    assert "sub-0007" in Path(place).read_text()
    allowed = run_dag(manifest=manifest, output=output, max_bad_fraction=0.1)
    assert allowed["verify"] == ("success", 1)
    assert allowed["report"][0] == "skipped", "none was asked for"


def test_a_killed_build_continues_when_it_is_tried_again(
    run_dag: Callable[..., Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(MARKER, str(tmp_path / "died"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    manifest = write_cohort(tmp_path / "cohort", 12)
    flags = ["--preprocess=tests.dying:at_the_tenth", "--workers=1"]
    states = run_dag(manifest=manifest, output=tmp_path / "out", examples_per_shard=3, flags=flags)
    assert (tmp_path / "died").exists()
    assert states.pop("report")[0] == "skipped"
    assert states == {"check_manifest": ("success", 1), "build": ("success", 2), "verify": ("success", 1)}
    log = "".join(capfd.readouterr())
    assert "exit code -9" in log
    (kept,) = re.findall(r"kept +(\d+) examples of an earlier run", log)
    assert int(kept) >= 6
    undisturbed = beam_nifti("build", manifest, tmp_path / "reference", "--examples-per-shard=3", *flags)
    assert undisturbed.returncode == 0
    assert content_of(tmp_path / "out") == content_of(tmp_path / "reference")
