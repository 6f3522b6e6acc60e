"""The DAG `beam_nifti_dataflow`: the build as a Dataflow Flex Template. For Airflow 3.

Copy this file and airflow_dag.py into the DAGs folder of an Airflow with apache-airflow-providers-google and
apache-airflow-providers-apache-beam. docs/dataflow.md explains how to make the template, and docs/airflow.md
the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from airflow.providers.google.cloud.operators.dataflow import DataflowStartFlexTemplateOperator
from airflow.sdk import DAG, Asset
from airflow_dag import (
    PARAMS,
    BeamNiftiOperator,
    check_arguments,
    make_params,
    new_dag,
    report_arguments,
    verify_arguments,
)

if TYPE_CHECKING:
    from airflow.sdk import Context

_BUCKET: Final = {"type": "string", "pattern": "^gs://.+"}
_NEEDED: Final = {"type": "string", "minLength": 1}

DATAFLOW_PARAMS: Final[Mapping[str, Mapping[str, Any]]] = {
    **{name: schema for name, schema in PARAMS.items() if name != "runner"},
    "manifest": {**PARAMS["manifest"], **_BUCKET},
    "output": {**PARAMS["output"], **_BUCKET},
    "template": {
        **_BUCKET,
        "description": "The template's file, such as gs://lab/templates/beam-nifti.json.",
    },
    "container_image": {**_NEEDED, "description": "The template's image, which the workers also run."},
    "project": {**_NEEDED, "description": "Google Cloud project that runs and pays for the job."},
    "region": {**_NEEDED, "description": "Region of the workers and of the bucket, such as europe-west1."},
    "temp_location": {**_BUCKET, "description": "Folder for temporary files of the build."},
    "machine_type": {**_NEEDED, "default": "n2-standard-4", "description": "Machine type of the workers."},
    "max_workers": {
        "type": "integer",
        "minimum": 1,
        "default": 10,
        "description": "Largest number of workers.",
    },
}


def template_parameters(params: Mapping[str, Any]) -> dict[str, str]:
    """What the template is given: options by name, all of them texts."""
    names = ("manifest", "output", "examples_per_shard", "num_shards", "max_bad_fraction", "anonymous_ids")
    given = {name: str(params[name]) for name in names if params[name] is not None}
    for flag in params["flags"]:
        name, equals, value = flag.removeprefix("--").partition("=")
        given[name.replace("-", "_")] = value if equals else "true"
    return given | {"sdk_container_image": params["container_image"]}


def template_check_arguments(params: Mapping[str, Any]) -> list[str]:
    """The arguments of `beam-nifti` to check manifest, options and output for Dataflow."""
    flags = [f"--{name}={params[name]}" for name in ("project", "region", "temp_location")]
    everything = {**params, "runner": "DataflowRunner", "flags": [*params["flags"], *flags]}
    arguments: list[str] = check_arguments(everything)
    return arguments


class BuildOnDataflow(DataflowStartFlexTemplateOperator):
    """Starts the template with the run's params, and waits in the triggerer.

    Args:
        kwargs: keyword arguments of any operator.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            body={},
            project_id="{{ params.project }}",
            location="{{ params.region }}",
            deferrable=True,
            **kwargs,
        )

    def execute(self, context: Context) -> Any:
        """Start the job; the trigger resumes the task when the job ends."""
        params = context["params"]
        self.body = {
            "launchParameter": {
                "jobName": "beam-nifti",  # the operator makes it unique
                "containerSpecGcsPath": params["template"],
                "parameters": template_parameters(params),
                "environment": {
                    "tempLocation": params["temp_location"],
                    "machineType": params["machine_type"],
                    "maxWorkers": params["max_workers"],
                },
            }
        }
        return super().execute(context)


def make_dataflow_dag(dag_id: str, *, schedule: Any = None, **defaults: Any) -> DAG:
    """The tasks of `airflow_dag.make_dag`, of which the build is a job on Dataflow.

    Args:
        dag_id: name of the DAG and of its asset.
        schedule: when it runs, such as "0 2 * * *"; None: when it is triggered.
        defaults: default values of params. With a schedule, every param without a default needs one here.

    Raises:
        TypeError: there is a default for an unknown param.
    """
    dag = new_dag(dag_id, schedule, make_params(DATAFLOW_PARAMS, defaults))
    check = BeamNiftiOperator(task_id="check_manifest", arguments=template_check_arguments, dag=dag)
    build = BuildOnDataflow(task_id="build", dag=dag)
    verify = BeamNiftiOperator(task_id="verify", arguments=verify_arguments, outlets=[Asset(dag_id)], dag=dag)
    report = BeamNiftiOperator(task_id="report", arguments=report_arguments, dag=dag)
    check >> build >> verify >> report
    return dag


beam_nifti_dataflow = make_dataflow_dag("beam_nifti_dataflow")
