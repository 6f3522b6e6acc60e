"""Whole builds for the tests: in this process, in a forked one, or in one that is killed.

Run as a script, this module is a server that has imported everything and forks a process for each task
that it is sent, so that a test pays for the imports once.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pipeline import AppliedPTransform, PTransformOverride
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.core import _MultiParDo

from beam_nifti.config import BuildConfig, Columns, RecordConfig, Sharding
from beam_nifti.errors import BuildSummary
from beam_nifti.inspection.convert import convert_dataset
from beam_nifti.pipeline.build import open_build, run_build
from beam_nifti.pipeline.configure import make_config as combine
from beam_nifti.pipeline.conversion import Conversion
from beam_nifti.pipeline.merge import ShardMerge
from beam_nifti.pipeline.options import OPTIONS
from beam_nifti.pipeline.parts import Part, PartFile
from beam_nifti.pipeline.relabeling import relabel_dataset
from beam_nifti.pipeline.steps import PartsFn
from beam_nifti.pipeline.withdrawal import withdraw_people
from beam_nifti.pipeline.write import WriteToTFRecord
from beam_nifti.record.dataset_info import read_info
from beam_nifti.record.index import read_index
from beam_nifti.record.sharding import ShardName
from tests import quick_beam
from tests.images import random_voxels

if TYPE_CHECKING:
    import pytest

LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
SHAPE = (12, 10, 8)
UNIT_ROWS = 3
PER_SHARD = 7
"""No multiple of the unit's rows, so that every shard ends with a smaller unit."""


def make_config(manifest: Path | str, output: Path | str, **changes: Any) -> BuildConfig:
    """A build of small shards; changes may be those of BuildConfig or of RecordConfig."""
    names = {f.name for f in dataclasses.fields(RecordConfig)}
    record = RecordConfig(**{k: changes.pop(k) for k in names & changes.keys()})
    if isinstance(changes.get("columns"), dict):
        changes["columns"] = Columns(**changes["columns"])
    sharding = Sharding(changes.pop("examples_per_shard", PER_SHARD))
    if "num_shards" in changes:
        sharding = Sharding(num_shards=changes.pop("num_shards"))
    return BuildConfig(str(manifest), str(output), record=record, sharding=sharding, **changes)


def build_config(options: argparse.Namespace) -> BuildConfig:
    """The configuration of a parsed `beam-nifti build`."""
    return _config_of(options, options.output)


def check_config(options: argparse.Namespace) -> BuildConfig:
    """The configuration of a parsed `beam-nifti check`, whose output is the report."""
    return _config_of(options, options.out or "")


def _config_of(options: argparse.Namespace, output: str) -> BuildConfig:
    given = {name: getattr(options, name) for name in OPTIONS}
    return combine(options.manifest, output, given, config=options.config, like=options.like)


def make_options(
    workers: int = 1,
    mode: str | None = None,
    runner: str = LOCAL_RUNNER,
    flags: Iterable[str] = (),
) -> PipelineOptions:
    """Beam's options for a local run; one worker needs no threads, and starts sooner without."""
    mode = mode or ("in_memory" if workers == 1 else "multi_threading")
    return PipelineOptions(
        [
            f"--runner={runner}",
            f"--direct_running_mode={mode}",
            f"--direct_num_workers={workers}",
            *flags,
        ]
    )


@dataclasses.dataclass(frozen=True)
class Built:
    """What a build did.

    Attributes:
        summary: how it ended.
        counters: Beam's.
        read: names of the images that the pipeline opened.
    """

    summary: BuildSummary
    counters: Mapping[str, int]
    read: frozenset[str]


def build(
    manifest: Path | str,
    output: Path | str,
    *,
    unit_rows: int = UNIT_ROWS,
    workers: int = 1,
    mode: str | None = None,
    runner: str = LOCAL_RUNNER,
    flags: Iterable[str] = (),
    **changes: Any,
) -> Built:
    """Build a dataset in this process, with work units of a few rows."""
    with open_build(make_config(manifest, output, **changes)) as plan:
        plan = dataclasses.replace(plan, unit_rows=unit_rows)
        with images_read() as read:
            summary, metrics = run_build(plan, make_options(workers, mode, runner, flags))
    return Built(summary, metrics.counters, frozenset(read))


def run_steps(steps: Iterable[beam.DoFn], element: Any) -> list[Any]:
    """Send an element through some steps, without a pipeline."""
    elements = [element]
    for step in steps:
        elements = [output for e in elements for output in step.process(e)]
    return elements


# What a dataset holds


def finish_interrupted(writer: PartsFn, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a bundle ends with if the user interrupts the build while its part is being closed."""
    close, called = PartFile.close, threading.Event()

    def interrupt() -> None:
        called.set()
        writer.teardown()

    def close_meanwhile(part: PartFile) -> None:
        interrupting.start()
        called.wait()
        close(part)

    interrupting = threading.Thread(target=interrupt)
    monkeypatch.setattr(PartFile, "close", close_meanwhile)
    finished = list(writer.finish_bundle())
    interrupting.join()
    return finished


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(output: Path) -> dict[tuple[str, int, int], tuple[str, list[dict[str, object]]]]:
    """By (split, number, total) of every shard: the sha256 of its file and the rows of its index.

    Fails where the files are not those that dataset_info.json names.
    """
    info = read_info(str(output))
    found = {}
    for shard in info.shards:
        name = ShardName.parse(shard.name)
        assert name is not None
        digest = sha256(output / shard.name)
        assert digest == shard.sha256, f"{shard.name} is not what dataset_info.json says"
        assert (output / shard.name).stat().st_size == shard.num_bytes
        assert sha256(output / shard.index) == shard.index_sha256, f"{shard.index} is another"
        table, _ = read_index(str(output / shard.index))
        assert table.num_rows == shard.num_examples
        found[name.split, name.index, name.total] = digest, table.to_pylist()
    return found


def stray_files(output: Path) -> set[str]:
    """Files in an output that do not belong to the dataset that it holds."""
    info = read_info(str(output))
    belong = {"dataset_info.json", info.failures}
    belong |= {name for shard in info.shards for name in (shard.name, shard.index)}
    return {str(p.relative_to(output)) for p in output.rglob("*") if not p.is_dir()} - belong


def snapshot(output: Path) -> dict[str, bytes]:
    """The content of every file but the lock."""
    files = (p for p in output.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(output)): p.read_bytes() for p in files}


def state_of(output: Path) -> list[tuple[str, bytes]]:
    """What a next run finds in an output: all files and folders, but for what is random in their names."""
    names = {path: re.sub("[0-9a-f]{32}", "*", str(path.relative_to(output))) for path in output.rglob("*")}
    return sorted((name, path.read_bytes() if path.is_file() else b"") for path, name in names.items())


def assert_complete(output: Path, reference: Path) -> None:
    """The output holds the same records as the reference in the same bytes, and nothing else."""
    assert contents(output) == contents(reference)
    assert stray_files(output) == set()
    assert not (output / ".build").exists()


def assert_intact(output: Path) -> None:
    """A dataset is there, and every file that dataset_info.json names is what it says."""
    assert contents(output)


# What a process does to files

_FILE_EVENTS = frozenset(["open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"])
_watchers: list[Callable[[str], None]] = []


@functools.cache
def _hook() -> None:
    """Tell every watcher of the paths that this process is about to open, rename or remove."""

    def tell(event: str, arguments: tuple[Any, ...]) -> None:
        if _watchers and event in _FILE_EVENTS and isinstance(arguments[0], str):
            for watcher in _watchers:
                watcher(arguments[0])

    sys.addaudithook(tell)


@contextlib.contextmanager
def watching(watcher: Callable[[str], None]) -> Iterator[None]:
    """Call `watcher(path)` before each operation on a file while the block runs."""
    _hook()
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


_on_image: list[Callable[[str], None]] = []


@contextlib.contextmanager
def images_read() -> Iterator[set[str]]:
    """The names of the images that this process opens while the block runs."""
    names = set[str]()

    def watch(path: str) -> None:
        if path.endswith((".nii", ".nii.gz")):
            names.add(Path(path).name)
            for tell in _on_image:
                tell(Path(path).name)

    with watching(watch):
        yield names


class _Operations:
    """Counts operations on files below a folder; ends the process before a certain one."""

    def __init__(self, folder: str, kill_at: int | None) -> None:
        self.count = 0
        self._folder, self._kill_at = folder, kill_at
        self._lock = threading.Lock()

    def __call__(self, path: str) -> None:
        # Names without a folder are relative to an open one.
        if path.startswith(self._folder) or "/" not in path:
            with self._lock:
                self.count += 1
                if self.count == self._kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)


# Runners that do what a cluster may do


class _Shuffled(beam.DoFn):
    """Give back a group in another order, the same one every time."""

    def process(self, group: tuple[None, Iterable[Any]]) -> Iterable[Any]:
        elements = list(group[1])
        random.Random(len(elements)).shuffle(elements)
        yield from elements


class Cut(beam.PTransform):
    """A shuffle that also changes the order and spreads neighbours over bundles."""

    def expand(self, elements: beam.PCollection) -> beam.PCollection:
        return (
            elements
            | "Key" >> beam.Map(lambda element: (None, element))
            | "Group" >> beam.GroupByKey()
            | "Shuffle" >> beam.ParDo(_Shuffled())
            | "Reshuffle" >> beam.Reshuffle()
        )


class _CutFirst(beam.PTransform):
    """A step with a shuffle in front."""

    def __init__(self, step: beam.PTransform) -> None:
        super().__init__()
        self._step = step

    def expand(self, elements: Any) -> Any:
        if isinstance(elements, tuple):  # with side inputs, which the step has
            elements = elements[0]
        cut = elements | "Cut" >> Cut().with_output_types(elements.element_type)
        return cut | "Step" >> self._step


class _CutBefore(PTransformOverride):
    """Put a shuffle in front of the step of this label."""

    def __init__(self, label: str) -> None:
        self._label = label

    def matches(self, applied: AppliedPTransform) -> bool:
        return applied.full_label == self._label and not isinstance(applied.transform, _CutFirst)

    def get_replacement_transform_for_applied_ptransform(self, applied: AppliedPTransform) -> beam.PTransform:
        return _CutFirst(applied.transform)


class _Steps(beam.pipeline.PipelineVisitor):
    """Finds the labels of the ParDos that a pipeline's author wrote."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self._inside: str | None = None

    def enter_composite_transform(self, applied: AppliedPTransform) -> None:
        if self._inside is None and isinstance(applied.transform, _MultiParDo):
            self.labels.append(applied.full_label)
        opaque = (_MultiParDo, beam.Reshuffle, beam.Create)
        if self._inside is None and isinstance(applied.transform, opaque):
            self._inside = applied.full_label

    def leave_composite_transform(self, applied: AppliedPTransform) -> None:
        if self._inside == applied.full_label:
            self._inside = None

    def visit_transform(self, applied: AppliedPTransform) -> None:
        if self._inside is None and isinstance(applied.transform, beam.ParDo):
            self.labels.append(applied.full_label)


def steps_of(pipeline: beam.Pipeline) -> list[str]:
    """The labels of the steps between which a runner may cut."""
    steps = _Steps()
    pipeline.visit(steps)
    return steps.labels


def cut_everywhere(pipeline: beam.Pipeline) -> None:
    """Put a shuffle in front of every step."""
    pipeline.replace_all([_CutBefore(label) for label in steps_of(pipeline)])


class CuttingRunner(FnApiRunner):
    """Cuts the chain before every step; nothing is fused, and everything arrives in another order."""

    def run_pipeline(self, pipeline: beam.Pipeline, options: PipelineOptions) -> Any:
        cut_everywhere(pipeline)
        return super().run_pipeline(pipeline, options)


CUTTING_RUNNER = "tests.build_helpers.CuttingRunner"


# Builds in other processes


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a forked task ended.

    Attributes:
        status: its exit code; minus the signal's number where it was killed.
        result: what the task returned; {"error": class, "message": text} where it raised.
        read: names of the images that its pipeline opened.
        operations: on files below the folder that was watched.
        peak_bytes: of resident memory.
    """

    status: int
    result: Any
    read: frozenset[str]
    operations: int
    peak_bytes: int

    @property
    def was_killed(self) -> bool:
        return self.status == -signal.SIGKILL


class ForkServer:
    """Runs tasks in processes of their own, forked from one that has imported everything."""

    def __init__(self) -> None:
        root = Path(__file__).parent.parent
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.build_helpers"],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        atexit.register(self.stop)

    def run(
        self, task: str, *, folder: Path | str = "/", kill_at: int | None = None, **arguments: Any
    ) -> Ended:
        """Run a task to its end.

        Args:
            task: name of a function below, such as "build".
            folder: operations on files below it are counted.
            kill_at: SIGKILL the process before this operation, counting from 1.
            arguments: of the task; plain values.
        """
        order = {"task": task, "folder": str(folder), "kill_at": kill_at, "arguments": arguments}
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps(order, default=str) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the fork server has died"
        ended = json.loads(answer)
        return Ended(**ended | {"read": frozenset(ended["read"])})

    def stop(self) -> None:
        """End the server."""
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()


@functools.cache
def fork_server() -> ForkServer:
    """The one server of this test run."""
    return ForkServer()


def build_apart(manifest: Path, output: Path, kill_at: int | None = None, **arguments: Any) -> Ended:
    """A build in a process of its own, killed before one of its operations on files in the output."""
    return fork_server().run(
        "build", folder=output, kill_at=kill_at, manifest=manifest, output=output, **arguments
    )


def _build_task(**arguments: Any) -> dict[str, Any]:
    return dataclasses.asdict(build(**arguments).summary)


def _code_task(code: str, arguments: Iterable[str]) -> None:
    """Run Python code; as an error of the task where it exits with a message."""
    sys.argv[1:] = arguments
    try:
        exec(code, {})
    except SystemExit as e:
        raise AssertionError(e.code) from e


def _merge_task(
    output: str, parts_folder: str, parts: Iterable[tuple[str, str, list[int] | None]], count: int
) -> str:
    """Merge parts into the only shard of an output."""
    merge = ShardMerge(
        output,
        ShardName("train", 0, 1),
        range(count),
        [Part(data, index, positions and tuple(positions)) for data, index, positions in parts],
        RecordConfig(),
        (),
        parts_folder,
    )
    return merge.run().sha256


def arrays_of(example_id: str) -> tuple[str, dict[str, Any]]:
    """An element for WriteToTFRecord, by its id alone."""
    voxels = random_voxels((5, 4, 3), "float32", seed=sum(example_id.encode()))
    return example_id, {"image": voxels, "label": len(example_id), "age": 40.5}


def write_arrays(
    output: Path | str,
    ids: Iterable[str],
    *,
    workers: int = 1,
    mode: str | None = None,
    runner: Any = LOCAL_RUNNER,
    **arguments: Any,
) -> None:
    """Write elements of these ids in this process, each from a bundle of its own if the runner likes."""
    options = make_options(workers, mode, runner) if isinstance(runner, str) else make_options(workers, mode)
    with beam.Pipeline(None if isinstance(runner, str) else runner, options) as pipeline:
        elements = pipeline | beam.Create(list(ids)) | beam.Map(arrays_of)
        elements | WriteToTFRecord(str(output), **{"examples_per_shard": PER_SHARD, **arguments})


def _convert_task(old: str, output: str, workers: int) -> int:
    """Convert a dataset; how many records were there already."""
    return convert_dataset(Conversion.of(old, output), workers)[1]


def _withdraw_task(output: str, people: list[str], manifest: str) -> int:
    """Withdraw participants; the revision of the dataset."""
    return withdraw_people(output, people, manifest).revision


def _relabel_task(output: str, manifest: str) -> int:
    """Relabel a dataset; its revision."""
    return relabel_dataset(output, manifest).revision


def _write_large_task(output: str, count: int) -> None:
    """Write records of a megabyte each."""
    image = random_voxels((64, 64, 64), "float32")
    with beam.Pipeline(options=make_options(2)) as pipeline:
        elements = pipeline | beam.Create(range(count)) | beam.Reshuffle()
        named = elements | beam.Map(lambda number: (f"{number:05d}", {"image": image + number}))
        named | WriteToTFRecord(output, examples_per_shard=20)


_TASKS: Mapping[str, Callable[..., Any]] = {
    "build": _build_task,
    "code": _code_task,
    "convert": _convert_task,
    "relabel": _relabel_task,
    "withdraw": _withdraw_task,
    "merge": _merge_task,
    "write": write_arrays,
    "write_large": _write_large_task,
}


def _peak_bytes() -> int:
    """Largest resident size of this process; getrusage would count its parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _run_task(order: Mapping[str, Any], report: int) -> None:
    operations = _Operations(order["folder"], order["kill_at"])
    _on_image.append(lambda name: os.write(report, f"{name}\n".encode()) and None)
    try:
        with watching(operations):
            result = _TASKS[order["task"]](**order["arguments"])
        status = 0
    except Exception as e:
        result, status = {"error": type(e).__name__, "message": str(e)}, 1
    facts = {"result": result, "operations": operations.count, "peak_bytes": _peak_bytes()}
    os.write(report, json.dumps(facts).encode() + b"\n")
    os._exit(status)


def _serve() -> None:
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy the pages of all that was imported
    answers = os.fdopen(os.dup(1), "w")  # what a task prints must not come between the answers
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            _run_task(order, write)
        os.close(write)
        with os.fdopen(read) as pipe:
            lines = pipe.read().splitlines()
        _, status = os.waitpid(child, 0)
        facts = {"result": None, "operations": 0, "peak_bytes": 0}
        if lines and lines[-1].startswith("{"):
            facts = json.loads(lines.pop())
        answer = facts | {"read": sorted(set(lines)), "status": os.waitstatus_to_exitcode(status)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    quick_beam.install()
    _serve()


_POOLS: list[pa.MemoryPool] = []
"""Kept: what was allocated from a pool may be freed long after the block that it is for."""


@contextlib.contextmanager
def arrow_memory() -> Iterator[pa.MemoryPool]:
    """What Arrow allocates in the block, apart from what else this process has allocated."""
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    _POOLS.append(pool)
    pa.set_memory_pool(pool)
    try:
        yield pool
    finally:
        pa.set_memory_pool(usual)
