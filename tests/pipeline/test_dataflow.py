"""The job that Dataflow would get, described here without Google: its size, its shuffles, its workers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.internal import pickler
from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2 as proto
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.environments import DockerEnvironment, python_sdk_dependencies

from beam_nifti.cli import main as cli
from beam_nifti.cli import parser as options
from beam_nifti.config import BuildConfig, Sharding
from beam_nifti.errors import UsageError
from beam_nifti.pipeline import beam_flags, runners
from beam_nifti.pipeline.build import open_build, plan_build
from beam_nifti.pipeline.plan import BuildPlan
from beam_nifti.pipeline.publish import publish_dataset
from beam_nifti.record.dataset_info import ShardInfo
from beam_nifti.record.sharding import ShardName, shard_ranges
from beam_nifti.transforms import BuildDataset
from pipelines.flex_template import launch
from tests.build_helpers import build_config
from tests.images import brain, write_image

ROOT = Path(__file__).parents[2]
METADATA = ROOT / "pipelines/flex_template/metadata.json"
IMAGE = "europe-west1-docker.pkg.dev/lab/images/beam-nifti:0.1.0"
FLAGS = (
    "--project=lab",
    "--region=europe-west1",
    "--temp_location=gs://lab/tmp",
    f"--sdk_container_image={IMAGE}",
)
HAS_DATAFLOW = runners._is_installed("google.cloud.dataflow")
ROWS = 250_000
PER_SHARD = 20
MOST_BYTES = ROWS
"""Of a job: one for each row would be too much."""

Graph = proto.Pipeline


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many rows of one image."""
    folder = tmp_path_factory.mktemp("rows")
    write_image(folder / "image.nii", brain((8, 8, 8)))
    path = folder / "manifest.tsv"
    with path.open("w") as file:
        file.write("participant_id\tpath\tlabel\n")
        file.writelines(f"sub-{i:07d}\timage.nii\t{i % 90}\n" for i in range(ROWS))
    return path


@pytest.fixture(scope="module")
def plan(manifest: Path) -> BuildPlan:
    """Of a first build, in 12,500 shards."""
    return plan_build(make_config(manifest, manifest.parent / "out"))[0]


def make_config(manifest: Path, output: Path) -> BuildConfig:
    return BuildConfig(str(manifest), str(output), sharding=Sharding(PER_SHARD), workers=400)


def describe_portable(plan: BuildPlan) -> Graph:
    """The graph as any cluster gets it, with the workers' image."""
    pipeline = beam.Pipeline(runner=FnApiRunner())
    pipeline | "BuildDataset" >> BuildDataset(plan)
    environment = DockerEnvironment.from_container_image(IMAGE)
    return pipeline.to_runner_api(default_environment=environment)


def describe_dataflow(plan: BuildPlan) -> Graph:
    """The graph that Beam's runner for Dataflow makes; a dry run sends it to nobody."""
    from apache_beam.runners.dataflow.dataflow_runner import DataflowRunner

    runner = DataflowRunner()
    flags = ["--runner=DataflowRunner", "--dry_run=true", "--no_auth", "--no_save_main_session", *FLAGS]
    pipeline = beam.Pipeline(runner, PipelineOptions(flags))
    pipeline | "BuildDataset" >> BuildDataset(plan)
    pipeline.run()
    return runner.proto_pipeline


@pytest.fixture(
    params=[
        describe_portable,
        pytest.param(
            describe_dataflow,
            marks=pytest.mark.skipif(not HAS_DATAFLOW, reason="needs the extra [gcp]"),
        ),
    ]
)
def describe(request: pytest.FixtureRequest) -> Callable[[BuildPlan], Graph]:
    function: Callable[[BuildPlan], Graph] = request.param
    return function


# Its size


def test_the_job_of_many_rows_is_small(plan: BuildPlan, describe: Callable[[BuildPlan], Graph]) -> None:
    assert plan.num_rows == ROWS
    assert plan.shard_totals() == {"train": ROWS // PER_SHARD}
    assert len(describe(plan).SerializeToString()) < MOST_BYTES


@pytest.mark.slow
def test_the_job_is_small_where_a_dataset_of_many_shards_lies(
    manifest: Path, plan: BuildPlan, describe: Callable[[BuildPlan], Graph]
) -> None:
    ranges = shard_ranges(ROWS, plan.sharding)
    names = [ShardName("train", i, len(ranges), True) for i in range(len(ranges))]
    sizes = [(len(r), 1000 * len(r), "a" * 64, "b" * 64) for r in ranges]
    shards = [ShardInfo(str(n), n.index_file, *size) for n, size in zip(names, sizes, strict=True)]
    publish_dataset(plan, shards, [])
    with open_build(make_config(manifest, Path(plan.config.output))) as again:
        assert again.has_published
        assert len(describe(again).SerializeToString()) < MOST_BYTES


# Its shuffles

HEAVY = ("LoadVolume", "Rescale", "EncodeExample")
"""Steps whose results hold voxels."""


def leaf_steps(graph: Graph) -> Iterator[proto.PTransform]:
    """The steps that do something, without the composites that they are in."""
    for step in graph.components.transforms.values():
        if not step.subtransforms and step.spec.urn:
            yield step


def named(graph: Graph, name: str) -> proto.PTransform:
    pardo = common_urns.primitives.PAR_DO.urn
    (step,) = (s for s in leaf_steps(graph) if name in s.unique_name and s.spec.urn == pardo)
    return step


def test_no_voxels_cross_a_shuffle(plan: BuildPlan, describe: Callable[[BuildPlan], Graph]) -> None:
    graph = describe(plan)
    shuffles = [s for s in leaf_steps(graph) if s.spec.urn == common_urns.primitives.GROUP_BY_KEY.urn]
    assert len(shuffles) == 3
    consumers: dict[str, set[str]] = {}
    for step in leaf_steps(graph):
        for elements in step.inputs.values():
            consumers.setdefault(elements, set()).add(step.unique_name)
    for name in HEAVY:
        outputs = named(graph, name).outputs
        main = [elements for tag, elements in outputs.items() if tag != "failures"]
        assert len(main) == len(outputs) - 1 == 1
        (consumer,) = consumers[main[0]]
        # The next of them, and after the last the one that writes: nothing else sees a voxel.
        following = dict(zip(HEAVY, (*HEAVY[1:], "WriteParts"), strict=True))[name]
        assert consumer == named(graph, following).unique_name


# Its workers


def test_workers_run_in_the_image_and_get_no_main_program(
    plan: BuildPlan, describe: Callable[[BuildPlan], Graph]
) -> None:
    graph = describe(plan)
    (environment,) = graph.components.environments.values()
    payload = proto.DockerPayload.FromString(environment.payload)
    assert payload.container_image == IMAGE
    staged = {
        proto.ArtifactStagingToRolePayload.FromString(d.role_payload).staged_name
        for d in environment.dependencies
    }
    assert staged <= {"submission_environment_dependencies.txt"}
    for name in ("ReadManifest", "SkipFinished", *HEAVY, "WriteParts", "CommitShards", "WriteDatasetInfo"):
        pardo = proto.ParDoPayload.FromString(named(graph, name).spec.payload)
        do_fn = pickler.loads(pardo.do_fn.payload)[0]
        module = "steps" if name in HEAVY else "transforms"
        assert type(do_fn).__module__ == f"beam_nifti.pipeline.{module}", name


def test_beam_would_stage_the_main_program_if_we_let_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "_is_installed", lambda _: True)
    monkeypatch.setattr(runners, "_accepted", PipelineOptions)
    config = BuildConfig("gs://lab/m.csv", "gs://lab/out", temp_location="gs://lab/tmp")
    chosen = beam_flags.choose_engine(config, ["--runner=DataflowRunner", *FLAGS]).options

    def staged(setup: PipelineOptions) -> set[str]:
        resources = python_sdk_dependencies(setup, str(tmp_path))
        return {proto.ArtifactStagingToRolePayload.FromString(r.role_payload).staged_name for r in resources}

    assert "pickled_main_session" not in staged(chosen)
    chosen.view_as(SetupOptions).save_main_session = True
    assert "pickled_main_session" in staged(chosen)


# The Flex Template


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What the launcher makes of a template's parameters: `launched(name=value)` -> our command line."""
    commands: list[list[str]] = []

    def run(argv: list[str]) -> int:
        commands.append(argv)
        return cli.SUCCESS

    monkeypatch.setattr(cli, "main", run)

    def launch_with(**parameters: str) -> list[str]:
        paths = {"manifest": "gs://lab/m.csv", "output": "gs://lab/out"}
        assert launch.main([f"--{k}={v}" for k, v in (paths | parameters).items()]) == cli.SUCCESS
        return commands[-1]

    return launch_with


def metadata() -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = json.loads(METADATA.read_text())["parameters"]
    return parameters


def test_the_template_offers_every_option_of_the_build() -> None:
    ours = {f[2:].replace("-", "_") for f in options.flags_of_commands()["build"]}
    # What a person at a screen asks for; what tells of the end, which the launcher does not see; and what
    # the environment of a launch sets.
    ours -= {"help", "dry_run", "quiet", "log_format", "summary_json", "metrics_file", "temp_location"}
    ours -= {"config", "like", "without"}  # a launch has its options in its parameters
    names = [p["name"] for p in metadata()]
    beams = {"sdk_container_image", "number_of_worker_harness_threads"}
    assert set(names) == ours | beams | {"manifest", "output"}
    assert len(names) == len(set(names))
    required = {p["name"] for p in metadata() if not p.get("isOptional")}
    assert required == {"manifest", "output", "sdk_container_image"}


def help_text(name: str) -> str:
    """The help of an option on the command line, in the words of a form."""
    (action,) = [
        a for command, p in options.commands() if command == "build" for a in p._actions if a.dest == name
    ]
    text = re.sub(r"--([a-z-]+)", lambda found: found[1].replace("-", "_"), str(action.help))
    switch = "true: " if action.nargs == 0 else ""
    text = f"{switch}{text.replace('%%', '%').rstrip('.')}."
    is_value = any(text.startswith(f"{choice}:") for choice in action.choices or ())
    return text if action.nargs == 0 or is_value else text[0].upper() + text[1:]


def test_a_parameter_has_the_help_of_its_option() -> None:
    own = {"sdk_container_image", "number_of_worker_harness_threads", "manifest", "output"}
    own |= {"preprocess", "workers"}  # not repeated in a form, and not of the launcher's machine
    shown = {p["name"]: p["helpText"] for p in metadata() if p["name"] not in own}
    assert shown == {name: help_text(name) for name in shown}


VALUES = {
    "label_column": "age,sex:class",
    "missing_label": "skip",
    "missing_mask": "empty",
    "rescale": "percentile:0.5,99.5",
    "rescale_within": "nonzero",
    "voxel_dtype": "native",
    "mask_dtype": "uint16",
    "map_labels": "4=3,10=0",
    "frames": "all",
    "max_frames": "400",
    "complex": "magnitude",
    "nonfinite": "value:-1024",
    "preprocess": "lab.brains:strip",
    "orientation": "LPS",
    "spacing": "1,1,1.5",
    "rescale_split": "train,test",
    "align": "first",
    "resize": "16,18,20",
    "interpolation": "cubic",
    "mask_interpolation": "linear",
    "separate_z": "auto",
    "crop_foreground": "above:-1.5",
    "shape": "16,18,20",
    "compression": "none",
    "compression_level": "1",
    "examples_per_shard": "7",
    "shuffle_seed": "1",
    "split": "train=0.8,test=0.2",
    "split_seed": "1",
    "max_bad_fraction": "0.5",
    "workers": "9",
    "number_of_worker_harness_threads": "2",
}

NEEDED = {
    "stratify": {"split": VALUES["split"]},
    "split_seed": {"split": VALUES["split"]},
    "mask_dtype": {"mask_column": "lesion"},
    "max_frames": {"frames": "each"},
    "missing_mask": {"mask_column": "lesion"},
    "map_labels": {"mask_column": "lesion"},
    "rescale_split": {"rescale": "cohort:zscore"},
    "rescale_stats": {"rescale": "cohort:zscore"},
    "align": {"mask_column": "lesion"},
    "interpolation": {"spacing": "1,1,1"},
    "mask_interpolation": {"spacing": "1,1,1", "mask_column": "lesion"},
    "antialias": {"spacing": "1,1,1"},
    "separate_z": {"spacing": "1,1,1"},
}
"""Parameters without which another one means nothing."""


@pytest.mark.parametrize("parameter", metadata(), ids=lambda p: p["name"])
def test_a_parameter_is_what_the_parser_takes(
    parameter: dict[str, Any], launched: Callable[..., list[str]]
) -> None:
    name = parameter["name"]
    assert set(parameter) <= {"name", "label", "helpText", "isOptional", "regexes", "paramType"}
    assert parameter["label"]
    assert parameter["helpText"]
    if f"--{name.replace('_', '-')}" in launch.switches():
        assert f"--{name}" in launched(**{name: "true"})
        assert f"--{name}" not in launched(**{name: "false"})
        with pytest.raises(SystemExit):
            launched(**{name: "maybe"})
        return
    value = VALUES.get(name, "gs://lab/x" if name in ("manifest", "output") else "3")
    for pattern in parameter.get("regexes", ()):
        assert re.fullmatch(pattern, value)
        assert not re.fullmatch(pattern, "no/such value")
    needed = NEEDED.get(name, {})
    plain, _ = options.parse(launched(**needed))
    given, rest = options.parse(launched(**needed, **{name: value}))
    if name in ("reference", "rescale_stats"):  # which are read
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}.* cannot be read"):
            build_config(given)
    else:
        build_config(given)
    assert given != plain or f"--{name}={value}" in rest
    if name not in ("manifest", "output"):
        assert options.parse(launched(**needed, **{name: ""}))[0] == plain


def test_the_launcher_is_what_the_image_starts() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "COPY pipelines/flex_template/launch.py /opt/beam_nifti/flex_template/launch.py" in dockerfile
    assert "ENV FLEX_TEMPLATE_PYTHON_PY_FILE=/opt/beam_nifti/flex_template/launch.py" in dockerfile
    assert "!pipelines/flex_template/launch.py" in (ROOT / ".dockerignore").read_text().splitlines()
