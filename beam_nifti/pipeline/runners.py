"""Where a build runs: from Beam's flags to options that the runner can work with.

Missing flags are reported before anything is read, written or staged.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from beam_nifti.config import BuildConfig
from beam_nifti.errors import UsageError
from beam_nifti.pipeline import local_runner
from beam_nifti.storage import disk
from beam_nifti.storage import paths as storage
from beam_nifti.support.process import count_cores

if TYPE_CHECKING:
    from apache_beam.options.pipeline_options import PipelineOptions

    from beam_nifti.pipeline.plan import BuildPlan

UNUSABLE: Final = {
    "save_main_session": "nothing that a worker runs is defined in the main program",
    "runtime_type_check": "it takes the other outputs of a step, such as failures, for its main one",
    "streaming": "a build reads a finite manifest, so it runs as a batch job",
    "no_wait_until_finish": "the command publishes and cleans up when the pipeline has ended",
}
"""Beam's flags that no command can take, each with why."""

CLUSTER_WORKERS: Final = 32
"""Parallelism to divide the work for if the flags do not give that of the cluster."""

_THIS_MACHINE: Final = re.compile(r"\[(local|auto)\]|local(\[(?P<threads>\d+|\*)(,.*)?\])?")
"""What --flink_master and --spark_master_url may say and mean an engine inside the job server."""


@dataclass(frozen=True)
class Engine:
    """A runner, and what is known of it.

    Attributes:
        options: Beam's options.
        config: configuration of the build, with the number of workers.
        is_local: whether it is Beam's in-process runner.
        in_processes: whether that one starts a process for each worker.
        is_template: whether the job is only described, to be started by somebody else.
        runner: Beam's name of it.
    """

    options: PipelineOptions
    config: BuildConfig
    is_local: bool
    in_processes: bool = False
    is_template: bool = False
    runner: str = "DirectRunner"


def make_engine(config: BuildConfig, flags: Sequence[str], known: argparse.Namespace) -> Engine:
    """The engine that Beam's flags ask for, given what Beam's Python SDK understands of them.

    Raises:
        UsageError: a flag is missing or refused by Beam, or a path is out of the workers' reach. Nothing
            was read.
    """
    name = runner_name(known.runner)
    is_local = name in local_runner.NAMES
    config = replace(config, temp_location=config.temp_location or known.temp_location)
    given = {flag.partition("=")[0].removeprefix("--") for flag in flags if flag.startswith("--")}
    problems = [f"--{flag}: {why}; drop it" for flag, why in UNUSABLE.items() if flag in given]
    problems += _CHECKS[name](known, given, config) if name in _CHECKS else ()
    if problems:
        raise UsageError("\n  ".join([f"{name or 'this build'} cannot run with these options:", *problems]))
    flags = [*flags, "--no_save_main_session"]  # Dataflow's default is to pickle the main program
    if config.temp_location is not None:
        flags.append(f"--temp_location={config.temp_location}")
    if not is_local:
        return Engine(
            options=_accepted(flags),
            config=replace(config, workers=config.workers or _cluster_workers(name, known)),
            is_local=False,
            is_template=known.template_location is not None,
            runner=name,
        )
    threads = config.workers or count_cores()
    if "direct_num_workers" in given:
        threads = known.direct_num_workers or count_cores()
    mode = known.direct_running_mode if "direct_running_mode" in given else "multi_threading"
    flags += [
        f"--runner={local_runner.RUNNER}",
        f"--direct_num_workers={threads}",
        f"--direct_running_mode={mode}",
    ]
    return Engine(
        options=_accepted(flags),
        config=replace(config, workers=config.workers or threads),
        is_local=True,
        in_processes=mode == "multi_processing",
    )


def load_beam(*, is_alone: bool = False) -> None:
    """Load Beam and the steps, without Beam's warnings about missing optional packages.

    Args:
        is_alone: whether the process does nothing else, and may have settings that make it start sooner.
    """
    root, words = logging.getLogger(), logging.Filter("beam_nifti")
    root.addFilter(words)
    if is_alone:
        # numpy's linear algebra is not used: its threads would only start, spin and take memory.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        logging.disable(logging.WARNING)
        # What is imported stays: collecting garbage among it would cost a third of the start.
        gc.disable()
    try:
        from beam_nifti.pipeline import transforms  # noqa: F401
    finally:
        root.removeFilter(words)
        if is_alone:
            gc.freeze()
            gc.enable()
            logging.disable(logging.NOTSET)


def runner_name(given: str | None) -> str:
    """Beam's own name of a runner: it takes `flink` for `FlinkRunner` as well."""
    from apache_beam.options.pipeline_options import StandardOptions

    names = {name.lower(): name for name in StandardOptions.KNOWN_RUNNER_NAMES}
    given = given or ""
    return names.get(given.lower()) or names.get(f"{given.lower()}runner") or given


def _accepted(flags: list[str]) -> PipelineOptions:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    try:
        options = PipelineOptions(flags)
        pipeline = beam.Pipeline(options=options)  # checks them, and sets up the file systems
    except (ValueError, ImportError, AttributeError) as e:
        raise UsageError(f"Apache Beam does not accept these options: {e}") from e
    disk.delete_tree(pipeline.local_tempdir)  # which only a run would remove
    return options


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that would hold it
        return False


def _missing(flag: str, why: str, example: str) -> str:
    return f"--{flag} is missing: {why}; for example --{flag}={example}"


def _dataflow_problems(known: argparse.Namespace, _: set[str], config: BuildConfig) -> Iterator[str]:
    if not _is_installed("google.cloud.dataflow"):
        yield "Beam's Google Cloud parts are not installed; install beam-nifti[gcp]"
    if not known.project:
        yield _missing("project", "the Google Cloud project that runs and pays for the job", "my-project")
    if not known.region and "CLOUDSDK_COMPUTE_REGION" not in os.environ:
        yield _missing("region", "where the workers run; the region of the bucket", "europe-west1")
    for path, what, example in (
        (config.manifest if config.rows is None else None, "MANIFEST", "gs://my-bucket/manifest.csv"),
        (config.output, "OUTPUT", "gs://my-bucket/dataset"),
        (config.anonymous_ids, "--anonymous-ids", "gs://my-bucket/key"),
    ):
        if path and not storage.is_remote(path):
            yield f"{what} is {path}: workers do not reach this machine's disk; for example {example}"
    example = "gs://my-bucket/tmp"
    if config.temp_location is None:
        yield _missing("temp_location", "a bucket for the job's files and for parts", example)
    elif not config.temp_location.startswith("gs://"):
        yield f"--temp_location is {config.temp_location}: Dataflow needs a bucket; for example {example}"
    if not (known.sdk_container_image or known.worker_harness_container_image or _stages_packages(known)):
        why = (
            "the image of the workers, which must hold this package (docs/image.md), unless --setup_file does"
        )
        yield _missing(
            "sdk_container_image", why, "REGION-docker.pkg.dev/PROJECT/REPOSITORY/beam-nifti:0.1.0"
        )


def _master_problems(known: argparse.Namespace, given: set[str], _: BuildConfig) -> Iterator[str]:
    flag, why, example = _MASTERS[runner_name(known.runner)]
    if not given & {flag, "job_endpoint"}:
        yield _missing(flag, why, example)
    is_here = not known.job_endpoint and _THIS_MACHINE.fullmatch(getattr(known, flag))
    if is_here or not (known.flink_submit_uber_jar or known.spark_submit_uber_jar):
        yield from _job_server_problems(known)
    if not is_here:
        yield from _environment_problems(known)


def _portable_problems(known: argparse.Namespace, _: set[str], __: BuildConfig) -> Iterator[str]:
    if not known.job_endpoint:
        yield _missing("job_endpoint", "the job server of the engine", "HOST:8099")
    yield from _environment_problems(known)


def _job_server_problems(known: argparse.Namespace) -> Iterator[str]:
    java = known.job_server_java_launcher
    if not known.job_endpoint and shutil.which(java) is None:
        yield (
            f"{java} is not on PATH: Beam starts its job server with it; install Java 11 or newer, name it "
            "with --job_server_java_launcher, give the address of a running job server with --job_endpoint, "
            "or submit without one, with --flink_submit_uber_jar or --spark_submit_uber_jar"
        )


def _environment_problems(known: argparse.Namespace) -> Iterator[str]:
    """Workers start in a container, a process or a pool, where this package must be installed."""
    kind = known.environment_type or "DOCKER"
    options = {option.partition("=")[0] for option in known.environment_options or ()}
    config = known.environment_config
    if kind == "DOCKER" and not (config or "docker_container_image" in options or _stages_packages(known)):
        yield _missing(
            "environment_config",
            "the image of the workers, which must hold this package (docs/image.md)"
            + (", as --sdk_container_image is for Dataflow only" if known.sdk_container_image else ""),
            known.sdk_container_image or "beam-nifti:0.1.0",
        )
    if kind == "PROCESS" and not (config or "process_command" in options):
        why = "the command that starts a worker on a machine with this package"
        yield _missing("environment_config", why, """'{"command": "/opt/apache/beam/boot"}'""")
    if kind == "EXTERNAL" and not (config or "external_service_address" in options):
        yield _missing("environment_config", "the address of the worker pool", "localhost:50000")


def _stages_packages(known: argparse.Namespace) -> bool:
    return bool(known.setup_file or known.requirements_file or known.extra_packages)


_MASTERS: Final = {
    "FlinkRunner": (
        "flink_master",
        "give the address of the cluster, or [local] for a Flink inside the job server on this machine",
        "HOST:8081",
    ),
    "SparkRunner": (
        "spark_master_url",
        "give the address of the cluster, or local[4] for a Spark inside the job server on this machine",
        "spark://HOST:7077",
    ),
}
"""The flags that name clusters, what they mean, and examples."""


def _prism_problems(known: argparse.Namespace, _: set[str], __: BuildConfig) -> Iterator[str]:
    path = known.prism_location
    if path and "://" not in path and not Path(path).is_file():
        yield f"--prism_location is {path}: no such file; give the path or URL of Prism's binary, or drop it"


_CHECKS: Final[dict[str, Callable[[argparse.Namespace, set[str], BuildConfig], Iterator[str]]]] = {
    "DataflowRunner": _dataflow_problems,
    "FlinkRunner": _master_problems,
    "SparkRunner": _master_problems,
    "PortableRunner": _portable_problems,
    "PrismRunner": _prism_problems,
}


def _cluster_workers(name: str, known: argparse.Namespace) -> int:
    """Parallelism that the flags give the engine."""
    if known.parallelism > 0:
        return int(known.parallelism)
    if name == "DataflowRunner":
        machines = known.max_num_workers or known.num_workers
        return machines * _cores(known.machine_type) if machines else CLUSTER_WORKERS
    if name == "SparkRunner" and not known.job_endpoint:
        local = _THIS_MACHINE.fullmatch(known.spark_master_url)
        if local:
            threads = local["threads"] or "1"
            return count_cores() if threads == "*" else int(threads)
    on_this_machine = (
        name == "PrismRunner"
        or known.job_endpoint == "embed"
        or (name == "FlinkRunner" and not known.job_endpoint and _THIS_MACHINE.fullmatch(known.flink_master))
    )
    return count_cores() if on_this_machine else CLUSTER_WORKERS


def _cores(machine_type: str | None) -> int:
    """Cores of a Compute Engine machine, from its name; 1 if the name does not show it.

    >>> _cores("n2-standard-4"), _cores("n2-custom-8-16384"), _cores("c3-standard-8-lssd"), _cores(None)
    (4, 8, 8, 1)
    """
    found = re.search(r"-(\d+)(?=-|$)", machine_type or "")
    return int(found[1]) if found else 1


def write_template(plan: BuildPlan, options: PipelineOptions) -> None:
    """Describe the job in the file --template_location, from which Dataflow starts it."""
    import apache_beam as beam

    from beam_nifti.pipeline.transforms import BuildDataset

    pipeline = beam.Pipeline(options=options)
    pipeline | "BuildDataset" >> BuildDataset(plan, enforces_limit=True)
    pipeline.run()


@contextlib.contextmanager
def quiet_processes() -> Iterator[None]:
    """Keep what processes started during the block write on standard error from the screen.

    Beam's workers log every step of their start and end there. It is shown if the block fails by a
    RuntimeError, which may be a worker's death.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as noise:
        screen = os.dup(2)
        os.dup2(noise.fileno(), 2)
        died = False
        try:
            yield
        except RuntimeError:
            died = True
            raise
        finally:
            sys.stderr.flush()
            os.dup2(screen, 2)
            os.close(screen)
            if died:
                noise.seek(0)
                sys.stderr.write(noise.read().decode(errors="replace"))
