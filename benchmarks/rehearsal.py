"""Rehearse a study from `check` to `report`, on Flink with a TaskManager killed, and here; print Markdown.

Distinct int16 volumes of 128×128×96 voxels, and all that is made of them, are in an S3 server on this
machine. Both engines must write the same bytes. The CPU of each build is divided among the steps by what
they take in a plain loop over some of the volumes; what the processes used beyond that is the engine's.

Needs an environment with beam_nifti[aws,report,test], and what `scripts/object_stores install` and
`scripts/flink_cluster install` install. 2,000 volumes take 11 GB of disk in the folder.

Usage: rehearsal.py [--volumes N] [--folder DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt
import psutil
from isal import igzip
from make_cohort import AFFINE, NOISE, load_anatomy

from beam_nifti.manifest.reading import read_manifest
from beam_nifti.pipeline.configure import make_record_config
from beam_nifti.pipeline.parts import PartWriter, file_facts
from beam_nifti.record.example import encode_volume
from beam_nifti.record.tiles import encode_record
from beam_nifti.storage import paths as storage
from beam_nifti.volume.volume import load_volume, rescale_volume

ROOT = Path(__file__).resolve().parents[1]
FLINK_RUN = ROOT / ".services" / "flink" / "run"
FLINK_MARK = b"BEAM_NIFTI_FLINK_CLUSTER="
S3_PORT = 7270
TEMPLATE_SHAPE = (197, 233, 189)
SHAPE = (128, 128, 96)
TASK_MANAGERS = 3
SAMPLED = 100
"""Volumes of the plain loop."""

STEPS = ("read", "decompress", "rescale", "encode", "compress", "write", "merge")
WORKERS, JAVA, LAUNCHER, STORE = "Python workers", "Java", "launching command", "S3 server"


def script(name: str, *arguments: str) -> str:
    return subprocess.run(
        [ROOT / "scripts" / name, *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


@contextlib.contextmanager
def object_store(folder: Path) -> Iterator[Path]:
    """An S3 server with a bucket, for this process and its children; the folder of the bucket's objects."""
    options = (f"--run={folder}", f"--s3-port={S3_PORT}", f"--gcs-port={S3_PORT + 1}")
    text = script("object_stores", "up", "lab", *options)
    try:
        os.environ.update(re.findall(r"^export (AWS_\w+)=(.*)$", text, re.M))
        yield folder / "s3" / "lab"
    finally:
        script("object_stores", "down", *options)


@contextlib.contextmanager
def flink() -> Iterator[list[str]]:
    """A cluster, whose workers have the environment of this process; the flags that reach it."""
    text = script("flink_cluster", "up", str(TASK_MANAGERS), f"--python={sys.executable}")
    try:
        (flags,) = re.findall(r"^beam-nifti build MANIFEST OUTPUT (.+?)\n\n", text, re.M | re.S)
        yield shlex.split(flags.replace("\\\n", " "))
    finally:
        script("flink_cluster", "down")


@functools.cache
def anatomy_and_noises() -> tuple[npt.NDArray[np.float32], list[npt.NDArray[np.float32]]]:
    """The middle of the template at 1 mm, and noise to choose from: to draw it anew would take long."""
    middle = tuple(slice((n - m) // 2, (n + m) // 2) for n, m in zip(TEMPLATE_SHAPE, SHAPE, strict=True))
    anatomy = load_anatomy(middle)
    random = np.random.default_rng(0)
    noises = [random.normal(0.0, NOISE, SHAPE).astype(np.float32) for _ in range(8)]
    return anatomy.astype(np.float32), noises


def put_image(subject: int) -> int:
    """Put a volume into the store; its size as a file."""
    anatomy, noises = anatomy_and_noises()
    random = np.random.default_rng(subject)
    signal = anatomy * np.float32(random.normal(1.0, 0.1))
    real, imaginary = (np.roll(noises[i], random.integers(noises[i].size)) for i in random.integers(0, 8, 2))
    voxels = np.hypot(signal + real, imaginary).astype(np.int16)
    data = igzip.compress(nibabel.Nifti1Image(voxels, AFFINE).to_bytes(), 2)
    storage.write(f"s3://lab/images/sub-{subject:05d}_T1w.nii.gz", data)
    return len(data)


def put_cohort(volumes: int) -> tuple[str, int]:
    """Put the images and their manifest into the store; the manifest, and the bytes of the images."""
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        size = sum(pool.imap_unordered(put_image, range(volumes), chunksize=10))
    rows = (f"images/sub-{i:05d}_T1w.nii.gz\t{20 + i % 60}\tsub-{i:05d}\n" for i in range(volumes))
    manifest = "s3://lab/manifest.tsv"
    storage.write(manifest, ("path\tlabel\tparticipant_id\n" + "".join(rows)).encode())
    return manifest, size


class CpuMeter:
    """The CPU seconds of the processes of a command, and of the cluster and the store beside it, by role."""

    def __init__(self, launcher: psutil.Process, store: psutil.Process) -> None:
        self._launcher, self._store = launcher, store
        self._roles: dict[psutil.Process, str | None] = {}
        self._first: dict[psutil.Process, float] = {}
        self._last: dict[psutil.Process, float] = {}

    def sample(self) -> None:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process not in self._roles:
                    self._roles[process] = self._role(process)
                if self._roles[process] is not None:
                    times = process.cpu_times()
                    self._last[process] = times.user + times.system
                    self._first.setdefault(process, self._last[process])

    def _role(self, process: psutil.Process) -> str | None:
        if process == self._store:
            return STORE
        if FLINK_MARK in Path(f"/proc/{process.pid}/environ").read_bytes():
            return JAVA if process.name() == "java" else WORKERS
        return LAUNCHER if self._launcher in (process, *process.parents()) else None

    def seconds(self) -> Counter[str]:
        used = Counter[str]()
        for process, last in self._last.items():
            # A process that was there before has not used all of its time for this command.
            used[str(self._roles[process])] += last - self._first[process]
        return used


@dataclass
class Phase:
    """What one command took, in seconds: of wall, of CPU by role, and of both cores while nothing ran."""

    wall: float
    cpu: Counter[str]
    idle: float
    summary: dict[str, object] = field(default_factory=dict)


def run(
    folder: Path, store: psutil.Process, *arguments: str, watch: Callable[[], None] = lambda: None
) -> Phase:
    """Run `beam-nifti`, and `watch` four times a second."""
    summary = folder / "summary.json"
    if arguments[0] in ("check", "build", "verify"):
        arguments += (f"--summary-json={summary}",)
    before, start = psutil.cpu_times(), time.perf_counter()
    with (folder / "printed.txt").open("w") as printed:
        command = [sys.executable, "-m", "beam_nifti", *arguments, "--quiet"]
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        meter = CpuMeter(psutil.Process(process.pid), store)
        while process.poll() is None:
            meter.sample()
            watch()
            time.sleep(0.25)
    wall, after = time.perf_counter() - start, psutil.cpu_times()
    if process.returncode != 0:
        sys.exit(
            f"{shlex.join(command)}: exit code {process.returncode}\n{(folder / 'printed.txt').read_text()}"
        )
    idle = after.idle + after.iowait - before.idle - before.iowait
    print(f"{arguments[0]}: {wall:.0f} s, {dict(meter.seconds())}", file=sys.stderr)
    return Phase(wall, meter.seconds(), idle, json.loads(summary.read_text()) if summary.exists() else {})


class Killer:
    """Kills a TaskManager and its Python workers once a quarter of a build's parts are written."""

    def __init__(self, output: Path, parts: int) -> None:
        self._output, self._parts = output, parts
        self.killed_after: int | None = None

    def __call__(self) -> None:
        written = len(list(self._output.glob(".build/*/*/*.parquet")))
        if self.killed_after is not None or written < self._parts:
            return
        for file in sorted(FLINK_RUN.glob("taskmanager*.pid")):
            master = psutil.Process(int(file.read_text()))
            if workers := master.children(recursive=True):  # one without has no task
                for process in (*workers, master):
                    process.kill()
                self.killed_after = written
                return


def measure_steps(manifest: str, folder: Path) -> dict[str, float]:
    """CPU seconds per volume of each step, in one thread, without Beam."""
    config = make_record_config({"voxel_dtype": "native"})
    table = read_manifest(manifest)
    used: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def step(name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        used[name] += time.process_time() - start

    for name in ("warm-up", "measured"):
        used.clear()
        part = PartWriter(f"s3://lab/loop/.build/0/{name}", 0, config, ())
        for row in table.rows(range(min(SAMPLED, len(table)))):
            with step("read"):
                data = storage.read(storage.join(table.folder, row.path))
            local = folder / row.path
            local.parent.mkdir(exist_ok=True)
            local.write_bytes(data)
            with step("decompress"):
                volume = load_volume(row, str(folder), record=config)
            with step("rescale"):
                rescaled = rescale_volume(volume, config)
            with step("encode"):
                example = encode_volume(rescaled)
            with step("compress"):
                encoded = encode_record(example, config.compression_level)
            with step("write"):
                part._file.write(*encoded.pieces)
            local.unlink()
        with step("write"):
            part._file.close()
        with step("merge"):  # of several parts: their bytes are read, hashed and written once more
            file_facts(part._file.path, part._file.base)
            storage.write(f"{part._file.path}.copy", storage.read(part._file.path))
    storage.delete_tree("s3://lab/loop", "s3://lab")
    return {name: seconds / min(SAMPLED, len(table)) for name, seconds in used.items()}


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def rehearse(
    manifest: str, name: str, flags: list[str], folder: Path, store: psutil.Process, kill: Killer | None
) -> dict[str, Phase]:
    """All commands on one engine. `verify` has no engine: it is a command of this machine."""
    output = f"s3://lab/{name}"
    return {
        "check": run(
            folder, store, "check", manifest, f"--out={folder}/{name}.json", "--voxel-dtype=native", *flags
        ),
        "build": run(
            folder, store, "build", manifest, output, "--voxel-dtype=native", *flags, watch=kill or bool
        ),
        "verify": run(folder, store, "verify", output, f"--manifest={manifest}", "--deep=5"),
        "report": run(folder, store, "report", output, f"--out={folder}/{name}.html", *flags),
    }


def table(header: str, rows: dict[str, list[str]]) -> str:
    columns = header.count("|") - 2
    lines = [header, "|---|" + "---:|" * columns]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def print_results(phases: dict[str, dict[str, Phase]], steps: dict[str, float], volumes: int) -> None:
    engines = "".join(f" {name} |" for name in phases)
    commands = ("check", "build", "verify", "report")
    walls = {c: [f"{p[c].wall:.0f}" for p in phases.values()] for c in commands}
    walls["all"] = [f"{sum(phase.wall for phase in p.values()):.0f}" for p in phases.values()]
    print(f"\nSeconds:\n\n{table(f'| |{engines}', walls)}")

    rows = defaultdict[str, list[str]](list)
    for name, found in phases.items():
        build, cores = found["build"], os.cpu_count() or 1
        python = build.cpu[LAUNCHER if name == "direct" else WORKERS]
        loop = sum(steps.values()) * volumes
        for step in STEPS:
            rows[step].append(f"{steps[step] * volumes:.0f}")
        rows["engine: Python outside these steps"].append(f"{python - loop:.0f}")
        rows["engine: Java"].append(f"{build.cpu[JAVA]:.0f}")
        rows["engine: the launching command"].append(f"{0 if name == 'direct' else build.cpu[LAUNCHER]:.0f}")
        rows["the S3 server"].append(f"{build.cpu[STORE]:.0f}")
        rows["idle"].append(f"{build.idle:.0f}")
        others = cores * build.wall - build.cpu.total() - build.idle
        rows["other programs"].append(f"{others:.0f}")
        rows[f"in all: {cores} cores × seconds"].append(f"{cores * build.wall:.0f}")
    print(f"\nCPU seconds of `build`:\n\n{table(f'| |{engines}', rows)}")

    per_volume = {step: [f"{1e3 * steps[step]:.1f}"] for step in STEPS}
    per_volume["all steps"] = [f"{1e3 * sum(steps.values()):.1f}"]
    print(f"\nOf these, CPU milliseconds per volume:\n\n{table('| | ms |', per_volume)}")

    for name, found in phases.items():
        distributions = found["build"].summary["distributions"]
        assert isinstance(distributions, dict)
        busy = {k.removesuffix("-msec"): v["sum"] / 1e3 for k, v in distributions.items()}
        text = ", ".join(f"{step} {seconds:.0f}" for step, seconds in sorted(busy.items()))
        print(f"\n{name}: threads were in steps for {sum(busy.values()):.0f} s ({text})")


def main() -> None:
    parser = argparse.ArgumentParser(description="Rehearse a study; print Markdown.")
    parser.add_argument("--volumes", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "beam_nifti_rehearsal")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True)
    with object_store(folder / "store") as bucket:
        store = psutil.Process(int((folder / "store" / "versitygw.pid").read_text()))
        start = time.perf_counter()
        manifest, size = put_cohort(options.volumes)
        print(f"{options.volumes} images of {size / 1e6:.0f} MB, made in {time.perf_counter() - start:.0f} s")
        steps = measure_steps(manifest, folder)
        killer = Killer(bucket / "flink", 4)
        with flink() as flags:
            phases = {"flink": rehearse(manifest, "flink", flags, folder, store, killer)}
        phases["direct"] = rehearse(manifest, "direct", ["--workers=2"], folder, store, None)
        assert killer.killed_after is not None, "no TaskManager was killed"
        print(f"a TaskManager was killed after {killer.killed_after} parts")
        assert hashes(bucket / "direct") == hashes(bucket / "flink"), "the engines wrote different bytes"
        print_results(phases, steps, options.volumes)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
