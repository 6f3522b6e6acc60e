"""Datasets on a schedule: the DAG `beam_nifti`, and `make_dag` for more of them. For Airflow 3.

Copy this file into the DAGs folder as it is. docs/airflow.md has the other steps.

The tasks call the command `beam-nifti`, which is installed in another environment, or runs in a container;
Airflow's own environment needs only Airflow. The Variable `beam_nifti_command` names the command.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from airflow.providers.standard.hooks.subprocess import SubprocessHook
from airflow.sdk import DAG, Asset, BaseOperator, Param
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

if TYPE_CHECKING:
    from airflow.sdk import Context

COMMAND: Final = "{{ var.value.get('beam_nifti_command', 'beam-nifti') }}"

FINAL_EXIT_CODES: Final = {
    1: "too many volumes failed, or the dataset is damaged; see the log above",
    2: "a wrong option, manifest or output, or a path that cannot be read or written",
}
"""Exit codes of `beam-nifti` for which a retry of the task is useless, and their meaning."""

_PLACE: Final = r"^(/|[a-z][a-z0-9+.-]*://)"
"""Absolute paths and URLs, because a task has no working folder."""

PARAMS: Final[Mapping[str, Mapping[str, Any]]] = {
    "manifest": {
        "type": "string",
        "pattern": _PLACE,
        "description": "Table of images, .csv, .tsv, .jsonl or .parquet: absolute path or URL.",
    },
    "output": {
        "type": "string",
        "pattern": _PLACE,
        "description": "Folder of the dataset: absolute path or URL. An existing dataset is extended.",
    },
    "runner": {
        "default": "DirectRunner",
        "enum": [
            "DirectRunner",
            "FlinkRunner",
            "SparkRunner",
            "PortableRunner",
            "PrismRunner",
            "DataflowRunner",
        ],
        "description": "Beam runner. DirectRunner runs in the task; others need flags, such as an address.",
    },
    "container_image": {
        "default": None,
        "type": ["null", "string"],
        "minLength": 1,
        "description": "Container image of the workers, such as beam-nifti:0.1.0. Not for DirectRunner.",
    },
    "examples_per_shard": {
        "default": None,
        "type": ["null", "integer"],
        "minimum": 1,
        "description": "Records per shard. Default: shards of about 200 MB.",
    },
    "num_shards": {
        "default": None,
        "type": ["null", "integer"],
        "minimum": 1,
        "description": "Number of shards per split. Give this or examples_per_shard.",
    },
    "max_bad_fraction": {
        "default": 0,
        "type": "number",
        "minimum": 0,
        "maximum": 1,
        "description": "Largest fraction of volumes, 0 to 1, that may fail.",
    },
    "anonymous_ids": {
        "default": None,
        "type": ["null", "string"],
        "pattern": _PLACE,
        "description": "File of the key that replaces ids and paths by pseudonyms.",
    },
    "flags": {
        "default": [],
        "type": "array",
        "items": {"type": "string", "pattern": "^--[a-z]"},
        "description": "Other flags of `beam-nifti build` and its runner, one per line, such as --clip.",
    },
    "verify_deep": {
        "default": 2,
        "type": "integer",
        "minimum": 0,
        "description": "Records to rebuild from their images after the build and compare bit for bit.",
    },
    "report": {
        "default": None,
        "type": ["null", "string"],
        "pattern": _PLACE,
        "description": "Page to write, such as /data/report.html. Requires beam-nifti[report].",
    },
}
"""Parameters of a run, as `airflow.sdk.Param`s: invalid values are refused before the run starts."""


def build_arguments(params: Mapping[str, Any]) -> list[str]:
    """The arguments of `beam-nifti` for a build."""
    options = [
        f"--{name.replace('_', '-')}={params[name]}"
        for name in ("examples_per_shard", "num_shards", "max_bad_fraction", "anonymous_ids")
        if params[name] is not None
    ]
    engine = _engine_flags(params["runner"], params["container_image"])
    return ["build", params["manifest"], params["output"], "--quiet", *options, *engine, *params["flags"]]


def _engine_flags(runner: str, image: str | None) -> list[str]:
    flags = [f"--runner={runner}"]
    if runner == "FlinkRunner":
        flags += ["--execution_mode_for_batch=BATCH_FORCED", "--environment_cache_millis=10000"]
    if image is None:
        return flags
    if runner == "DirectRunner":
        raise AirflowFailException(f"container_image is {image}, but DirectRunner starts no workers")
    if runner == "DataflowRunner":
        return [*flags, f"--sdk_container_image={image}"]
    return [*flags, "--environment_type=DOCKER", f"--environment_config={image}"]


def check_arguments(params: Mapping[str, Any]) -> list[str]:
    """The arguments of `beam-nifti` to check manifest, options and output, and to write nothing."""
    return [*build_arguments(params), "--dry-run"]


def verify_arguments(params: Mapping[str, Any]) -> list[str]:
    """The arguments of `beam-nifti` to check every byte of the dataset, and some against the images."""
    key = params["anonymous_ids"]
    return [
        "verify",
        params["output"],
        f"--manifest={params['manifest']}",
        f"--deep={params['verify_deep']}",
        "--quiet",
        *([] if key is None else [f"--anonymous-ids={key}"]),
        *(flag for flag in params["flags"] if flag.startswith("--preprocess=")),
    ]


def report_arguments(params: Mapping[str, Any]) -> list[str]:
    """The arguments of `beam-nifti` to write the page about the dataset.

    Raises:
        AirflowSkipException: the param `report` is not set.
    """
    if params["report"] is None:
        raise AirflowSkipException("the param report is not set")
    return ["report", params["output"], f"--out={params['report']}", "--quiet"]


class BeamNiftiOperator(BaseOperator):
    """Runs `beam-nifti`, without a shell, and distinguishes temporary from permanent failures.

    A build that is tried again continues where it stopped. Each asset in `outlets` gets an event that names
    the manifest and the output.

    Args:
        arguments: makes the command's arguments from the run's params.
        command: the program, with its own leading arguments if it has any, quoted as for a shell.
        kwargs: keyword arguments of any operator.
    """

    template_fields = ("command",)

    def __init__(
        self, *, arguments: Callable[[Mapping[str, Any]], list[str]], command: str = COMMAND, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.arguments = arguments
        self.command = command

    def execute(self, context: Context) -> None:
        """Run the command to its end.

        Raises:
            AirflowSkipException: there is nothing to run.
            AirflowFailException: it would fail in the same way again.
            AirflowException: it may succeed when it is tried again.
        """
        params = context["params"]
        program = shlex.split(self.command)
        try:
            ended = self._process.run_command([*program, *self.arguments(params)])
        except (FileNotFoundError, PermissionError) as e:
            raise AirflowFailException(
                f"{program[0]}: {e.strerror}; let the Variable beam_nifti_command name the program beam-nifti"
            ) from e
        if ended.exit_code in FINAL_EXIT_CODES:
            reason = FINAL_EXIT_CODES[ended.exit_code]
            raise AirflowFailException(f"exit code {ended.exit_code}, {reason}. {ended.output}")
        if ended.exit_code != 0:
            raise AirflowException(f"exit code {ended.exit_code}. {ended.output}")
        for outlet in self.outlets:
            context["outlet_events"][outlet].extra = {key: params[key] for key in ("manifest", "output")}

    def on_kill(self) -> None:
        """End the command with the task; a later run continues."""
        self._process.send_sigterm()

    @cached_property
    def _process(self) -> SubprocessHook:
        return SubprocessHook()


def make_params(schemas: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any]) -> dict[str, Param]:
    """Params, with some of their defaults replaced.

    Raises:
        TypeError: there is a default for an unknown param.
    """
    if unknown := defaults.keys() - schemas.keys():
        raise TypeError(f"unknown params: {', '.join(sorted(unknown))}; choose from {', '.join(schemas)}")
    own = {name: {"default": value} for name, value in defaults.items()}
    return {name: Param(**{**schema, **own.get(name, {})}) for name, schema in schemas.items()}


def new_dag(dag_id: str, schedule: Any, params: dict[str, Param]) -> DAG:
    """A DAG without tasks, whose runs follow each other and are tried again."""
    return DAG(
        dag_id,
        description="Check a manifest of NIfTI volumes, build TFRecords from it, verify and report.",
        schedule=schedule,
        start_date=datetime(2025, 1, 1, tzinfo=UTC),
        catchup=False,
        max_active_runs=1,  # two builds into one output exclude each other
        params=params,
        # Longer than the three minutes for which the lock of a build that died holds on an object store.
        default_args={"retries": 3, "retry_delay": timedelta(minutes=5)},
        tags=["beam-nifti"],
    )


def make_dag(dag_id: str, *, schedule: Any = None, **defaults: Any) -> DAG:
    """A DAG of four tasks: check the manifest, build the dataset, verify it, make a page about it.

    `verify` emits an event of the asset named like the DAG, which starts DAGs with
    `schedule=[Asset(dag_id)]`. The page does not affect it.

    Args:
        dag_id: name of the DAG and of its asset.
        schedule: when it runs, such as "0 2 * * *"; None: when it is triggered.
        defaults: default values of params. With a schedule `manifest` and `output` are needed.

    Raises:
        TypeError: there is a default for an unknown param.
    """
    dag = new_dag(dag_id, schedule, make_params(PARAMS, defaults))
    check = BeamNiftiOperator(task_id="check_manifest", arguments=check_arguments, dag=dag)
    build = BeamNiftiOperator(task_id="build", arguments=build_arguments, dag=dag)
    verify = BeamNiftiOperator(task_id="verify", arguments=verify_arguments, outlets=[Asset(dag_id)], dag=dag)
    report = BeamNiftiOperator(task_id="report", arguments=report_arguments, dag=dag)
    check >> build >> verify >> report
    return dag


beam_nifti = make_dag("beam_nifti")
