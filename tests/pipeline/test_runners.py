"""From Beam's flags to a runner: what is refused before anything is read, and how wide the work is cut."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from apache_beam.options.pipeline_options import (
    DirectOptions,
    FlinkRunnerOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    StandardOptions,
)

from beam_nifti.cli import main as cli
from beam_nifti.cli import parser as options
from beam_nifti.cli.run_summary import RunSummary
from beam_nifti.cli.watching import CommandWatcher
from beam_nifti.errors import UsageError
from beam_nifti.pipeline import beam_flags, runners
from beam_nifti.pipeline.build import plan_build
from beam_nifti.pipeline.local_runner import RUNNER
from beam_nifti.pipeline.runners import CLUSTER_WORKERS, Engine
from beam_nifti.support.process import count_cores
from tests.build_helpers import build_config
from tests.images import write_cohort

CORES = count_cores()
FLINK = ("--runner=FlinkRunner", "--job-endpoint=localhost:8099")
POOL = ("--environment-type=EXTERNAL", "--environment-config=localhost:50000")
DATAFLOW = (
    "--runner=DataflowRunner",
    "--project=lab",
    "--region=europe-west1",
    "--temp-location=gs://lab/tmp",
    "--sdk-container-image=registry/beam-nifti:0.1.0",
)


def choose(*flags: str, manifest: str = "m.csv", output: str = "out") -> Engine:
    """The engine of `beam-nifti build`."""
    parsed, rest = options.parse(["build", manifest, output, *flags])
    watcher = CommandWatcher(RunSummary("build"), parsed)
    return beam_flags.choose_engine(build_config(parsed), rest, watcher)


def refusal(*flags: str, manifest: str = "m.csv", output: str = "out") -> str:
    """What is said where `choose` refuses."""
    with pytest.raises(UsageError) as caught:
        choose(*flags, manifest=manifest, output=output)
    return str(caught.value)


@pytest.fixture
def with_dataflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Beam's Google Cloud parts were installed, and would accept all that is left to them."""
    monkeypatch.setattr(runners, "_is_installed", lambda _: True)
    monkeypatch.setattr(runners, "_accepted", PipelineOptions)


# What is missing


def test_dataflow_says_all_that_is_missing_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["build", str(tmp_path / "m.csv"), str(tmp_path / "out"), "--runner=DataflowRunner"]
    assert cli.main(argv) == cli.USAGE
    said = capsys.readouterr().err
    for flag in ("project", "region", "temp_location", "sdk_container_image"):
        assert re.search(rf"--{flag} is missing: .+; for example --{flag}=\S+", said), flag
    assert f"MANIFEST is {tmp_path / 'm.csv'}: workers do not reach" in said
    assert f"OUTPUT is {tmp_path / 'out'}: workers do not reach" in said
    assert list(tmp_path.iterdir()) == []  # and the manifest, which is not there, was not looked for


REMOTE = {"manifest": "gs://lab/m.csv", "output": "gs://lab/out"}


@pytest.mark.usefixtures("with_dataflow")
@pytest.mark.parametrize("flag", [f.partition("=")[0] for f in DATAFLOW[1:]])
def test_dataflow_needs_each_of_its_flags(flag: str) -> None:
    said = refusal(*(f for f in DATAFLOW if not f.startswith(flag)), **REMOTE)
    assert said.count("\n") == 1
    assert f"{flag.replace('-', '_').replace('__', '--')} is missing" in said


@pytest.mark.usefixtures("with_dataflow")
def test_dataflow_with_all_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = choose(*DATAFLOW, **REMOTE)
    cloud = engine.options.view_as(GoogleCloudOptions)
    assert (cloud.project, cloud.region, cloud.temp_location) == ("lab", "europe-west1", "gs://lab/tmp")
    assert not engine.is_local
    assert not engine.is_template
    # Beam's own default for Dataflow is True, which pickles whatever started the build.
    assert engine.options.view_as(SetupOptions).save_main_session is False
    staged = [*DATAFLOW[:-1], "--setup-file=./setup.py"]
    assert choose(*staged, **REMOTE).options.view_as(SetupOptions).setup_file == "./setup.py"
    monkeypatch.setenv("CLOUDSDK_COMPUTE_REGION", "europe-west1")
    assert choose(*(f for f in DATAFLOW if "region" not in f), **REMOTE)
    assert choose(*DATAFLOW, "--template-location=gs://lab/job", **REMOTE).is_template


@pytest.mark.usefixtures("with_dataflow")
def test_dataflow_needs_paths_that_its_workers_reach() -> None:
    flags = [f for f in DATAFLOW if not f.startswith("--temp-location")]
    flags += ["--temp-location=/tmp/x", "--anonymous-ids=/data/key"]
    said = refusal(*flags, manifest="/data/m.csv", output="gs://lab/out")
    assert "MANIFEST is /data/m.csv" in said
    assert "--anonymous-ids is /data/key" in said
    assert "--temp_location is /tmp/x" in said
    assert "OUTPUT" not in said


@pytest.mark.skipif(runners._is_installed("google.cloud.dataflow"), reason="Dataflow's parts are installed")
def test_dataflow_needs_its_extra() -> None:
    assert "install beam-nifti[gcp]" in refusal(*DATAFLOW, **REMOTE)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--runner=FlinkRunner"], "--flink_master is missing"),
        (["--runner=flink", "--flink-master=host:8081"], "--environment_config is missing"),
        (["--runner=FlinkRunner", "--flink-master=host:8081", "--environment-type=PROCESS"], "command"),
        ([*FLINK, "--environment-type=EXTERNAL"], "the address of the worker pool"),
        ([*FLINK, "--sdk-container-image=mine"], "for Dataflow only; for example --environment_config=mine"),
        (["--runner=FlinkRunner", *POOL], "--flink_master is missing"),
        (["--runner=SparkRunner"], "--spark_master_url is missing"),
        (["--runner=SparkRunner", "--spark-master-url=spark://h:7077"], "--environment_config is missing"),
        (["--runner=PortableRunner"], "--job_endpoint is missing"),
        (["--runner=PortableRunner", "--job-endpoint=h:8099"], "--environment_config is missing"),
        ([*FLINK, *POOL, "--save-main-session"], "--save_main_session: nothing that a worker runs"),
        (["--runtime-type-check"], "--runtime_type_check: it takes the other outputs of a step"),
        (["--streaming"], "--streaming: a build reads a finite manifest, so it runs as a batch job"),
        (["--no-wait-until-finish"], "--no_wait_until_finish"),
        ([*FLINK, *POOL, "--parallelism=many"], "--parallelism: invalid int value: 'many'"),
        (["--direct-running-mode=fast"], "--direct_running_mode: invalid choice: 'fast'"),
        ([*FLINK, *POOL, "--num-shard=3"], "did you mean --num-shards"),
        ([*FLINK, *POOL, "--paralelism=3"], "did you mean --parallelism"),
        (
            [*FLINK, *POOL, "--label=sex"],
            "--label is an Apache Beam flag that has no effect with FlinkRunner; did you mean",
        ),
        (
            [*FLINK, *POOL, "--spark-version=3"],
            "--spark_version is an Apache Beam flag that has no effect with FlinkRunner",
        ),
        ([*FLINK, *POOL, "--parallelism=2", "--parallelism=3"], "given twice, as 2 and 3"),
        ([*FLINK, *POOL, "--worker-machine-type=a", "--machine-type=b"], "given twice, as a and b"),
        ([*FLINK, *POOL, "--job-name="], "--job_name is empty"),
        ([*FLINK, *POOL, "--auto-unique-labels", "yes"], "unknown argument yes"),
        (
            ["--label", "sex"],
            "--label is an Apache Beam flag that has no effect without --runner; did you mean --label-col",
        ),
        (["--labels=sex"], "did you mean --label-column?"),
        (["--num-workers=3"], "did you mean --workers?"),
        (["--region=x"], "has no effect without --runner; name the runner that it is for with --runner, or"),
        (["--disk-type=ssd"], "without --runner; name the runner"),
        ([*FLINK, *POOL, "--region=x"], "has no effect with FlinkRunner; drop it"),
        (["--parallelism=3"], "--parallelism is an Apache Beam flag that has no effect without --runner"),
        (["--runner=DirectRunner", "--setup-file=setup.py"], "--setup_file is an Apache Beam flag"),
        (["--surprise"], "unknown flag --surprise"),
        (
            ["--s3-secret-access-key=a", "--s3-secret-access-key=b"],
            "--s3_secret_access_key is given twice; give",
        ),
    ],
)
def test_what_is_missing_or_of_no_use_is_said(flags: list[str], says: str) -> None:
    assert says in refusal(*flags)


def test_a_job_server_needs_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refusal("--runner=FlinkRunner", "--flink-master=host:8081", *POOL)
    assert "java is not on PATH" in said
    assert "--job_endpoint" in said
    assert choose(*FLINK, *POOL)  # whose job server runs already
    submitting = ("--runner=FlinkRunner", "--flink-submit-uber-jar", *POOL)
    assert choose(*submitting, "--flink-master=host:8081")  # Flink runs the jar
    assert "java is not on PATH" in refusal(*submitting, "--flink-master=[local]")


@pytest.mark.parametrize(
    "environment",
    [
        ["--environment-config=beam-nifti:0.1.0"],
        ["--environment-type=DOCKER", "--environment-options=docker_container_image=beam-nifti:0.1.0"],
        ["--environment-type=PROCESS", '--environment-config={"command": "/opt/apache/beam/boot"}'],
        ["--environment-type=PROCESS", "--environment-options=process_command=/opt/apache/beam/boot"],
        ["--environment-type=LOOPBACK"],
        ["--setup-file=./setup.py"],
        POOL,
    ],
)
def test_a_cluster_with_workers_that_have_the_package(environment: Sequence[str]) -> None:
    engine = choose(*FLINK, *environment)
    assert engine.options.view_as(StandardOptions).runner == "FlinkRunner"
    assert not engine.is_local


@pytest.mark.skipif(shutil.which("java") is None, reason="Beam's job server needs Java")
def test_an_engine_inside_the_job_server_needs_no_environment() -> None:
    assert choose("--runner=FlinkRunner", "--flink-master=[local]").config.workers == CORES
    assert choose("--runner=SparkRunner", "--spark-master-url=local[3]").config.workers == 3


def test_flags_take_dashes_and_underscores() -> None:
    dashed = choose(*FLINK, *POOL, "--max-parallelism=7")
    under = choose(
        *(f.replace("-", "_").replace("__", "--", 1) for f in (*FLINK, *POOL)), "--max_parallelism=7"
    )
    assert dashed.options.get_all_options() == under.options.get_all_options()
    assert dashed.options.view_as(FlinkRunnerOptions).max_parallelism == 7


def test_flags_are_checked_in_a_dry_run_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_cohort(tmp_path / "cohort", 3)
    dry = ["build", str(manifest), str(tmp_path / "out"), "--dry-run"]
    assert cli.main([*dry, "--runner=FlinkRunner"]) == cli.USAGE
    assert "--flink_master is missing" in capsys.readouterr().err
    assert cli.main([*dry, *FLINK, *POOL]) == cli.SUCCESS
    assert "volumes  3 of" in capsys.readouterr().out


@pytest.mark.usefixtures("with_dataflow")
@pytest.mark.parametrize(
    "flags",
    [
        [*DATAFLOW, "--labels=airflow-version=v3-0-0", "--labels=lab=ours"],  # as Airflow's operators add
        [*DATAFLOW, "--experiments=use_runner_v2", "--no_use_public_ips"],
        [*FLINK, *POOL, "--execution_mode_for_batch=BATCH_FORCED", "--max_bundle_size", "7"],
        ["--s3-endpoint-url=http://localhost:1", "--s3-disable-ssl", "--profile-cpu"],
        ["--direct-num-workers=2", "--direct-running-mode=multi_processing"],
        ["--runner=PrismRunner", "--prism-log-level=warn"],
    ],
)
def test_flags_that_the_runner_uses_are_passed_on(flags: list[str]) -> None:
    known = choose(*flags, **REMOTE).options.get_all_options()
    for flag in flags:
        name, _, value = flag.removeprefix("--").replace("-", "_").partition("=")
        if name in known and value:
            assert flag.partition("=")[2] in str(known[name])


def test_a_missing_prism_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--prism_location is /missing: no such file; give the path or URL"):
        choose("--runner=PrismRunner", "--prism_location=/missing")
    binary = tmp_path / "prism"
    binary.touch()
    for location in (str(binary), "https://example.org/prism.zip"):
        engine = choose("--runner=PrismRunner", f"--prism_location={location}")
        assert engine.options.get_all_options()["prism_location"] == location


# How wide the work is cut


@pytest.mark.parametrize(
    ("flags", "threads", "mode", "workers"),
    [
        ([], CORES, "multi_threading", CORES),
        (["--workers=3"], 3, "multi_threading", 3),
        (["--runner=direct", "--direct-num-workers=5"], 5, "multi_threading", 5),
        (["--direct-num-workers=0"], CORES, "multi_threading", CORES),
        (["--direct-num-workers=1"], 1, "multi_threading", 1),
        (["--direct-num-workers=5", "--workers=2"], 5, "multi_threading", 2),
        (["--workers=2", "--direct-running-mode=multi_processing"], 2, "multi_processing", 2),
        (["--workers=1", "--direct-running-mode=in_memory"], 1, "in_memory", 1),
    ],
)
def test_workers_of_this_machine(flags: list[str], threads: int, mode: str, workers: int) -> None:
    engine = choose(*flags)
    direct = engine.options.view_as(DirectOptions)
    assert engine.is_local
    assert engine.options.view_as(StandardOptions).runner == RUNNER
    assert (direct.direct_num_workers, direct.direct_running_mode) == (threads, mode)
    assert engine.config.workers == workers


@pytest.mark.usefixtures("with_dataflow")
@pytest.mark.parametrize(
    ("flags", "workers"),
    [
        ([*FLINK, *POOL], CLUSTER_WORKERS),
        ([*FLINK, *POOL, "--parallelism=12"], 12),
        ([*FLINK, *POOL, "--parallelism=12", "--workers=3"], 3),
        (["--runner=PortableRunner", "--job-endpoint=h:1", *POOL, "--parallelism=5"], 5),
        (["--runner=PortableRunner", "--job-endpoint=embed", *POOL], CORES),
        (["--runner=PrismRunner"], CORES),
        (["--runner=SparkRunner", "--job-endpoint=h:1", *POOL], CLUSTER_WORKERS),
        ([*DATAFLOW], CLUSTER_WORKERS),
        ([*DATAFLOW, "--max-num-workers=10", "--machine-type=n2-standard-4"], 40),
        ([*DATAFLOW, "--num-workers=6"], 6),
        ([*DATAFLOW, "--num-workers=6", "--worker-machine-type=n2-custom-8-16384"], 48),
    ],
)
def test_workers_of_a_cluster(flags: list[str], workers: int) -> None:
    assert choose(*flags, **REMOTE).config.workers == workers


def test_more_workers_cut_smaller_units(tmp_path: Path) -> None:
    manifest, output = str(write_cohort(tmp_path / "cohort", 96)), str(tmp_path / "out")
    one, two, six = (
        plan_build(choose(*flags, manifest=manifest, output=output).config)[0].unit_rows
        for flags in (["--workers=1"], [*FLINK, *POOL, "--parallelism=2"], [*FLINK, *POOL, "--parallelism=6"])
    )
    assert one > two > six


# Processes of this machine


def test_processes_make_the_same_dataset_in_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = write_cohort(tmp_path / "cohort", 12)
    build = ["build", str(manifest)]
    assert cli.main([*build, str(tmp_path / "threads"), "--num-shards=2", "--workers=2"]) == cli.SUCCESS
    capfd.readouterr()
    flags = ["--num-shards=2", "--workers=2", "--direct-running-mode=multi_processing"]
    assert cli.main([*build, str(tmp_path / "processes"), *flags]) == cli.SUCCESS
    said = capfd.readouterr()
    assert "12 examples" in said.out
    assert said.err == ""
    files = sorted(p.relative_to(tmp_path / "threads") for p in (tmp_path / "threads").rglob("*.*"))
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "threads" / file).read_bytes() == (tmp_path / "processes" / file).read_bytes()
