"""Measure what reading a volume costs, by each way that there is; print a Markdown table.

200 volumes of make_cohort.py, as .nii.gz and as datasets that are built first (1.3 GB in all). Every way runs
in a process of its own, one after the other, and passes over all volumes twice; the second pass counts. CPU
and wall time are per volume, the peak is the process's resident memory, and "one by number" is the median of
100 reads in random order. Figures are medians over the rounds. Plain tf.data is:
list_files, flat_map of TFRecordDataset, parse, shuffle, batch.

Usage: read.py [--repeat N] [--cohort-dir DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from make_cohort import make_cohort

ROOT = Path(__file__).resolve().parent.parent
COUNT = 200
BATCH = 4
READS = 100
IMAGES = "images"

Way = tuple[str, Callable[[Path], Any]]
"""The kind of data that it reads, and what opens a folder of that."""

Maker = Callable[[Path, Path], None]
"""What makes data of a kind from a manifest of images, in a folder."""


def build(*flags: str) -> Maker:
    def make(manifest: Path, folder: Path) -> None:
        command = [sys.executable, "-m", "beam_nifti", "build", manifest, folder, "--quiet", *flags]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)

    return make


MAKERS: dict[str, Maker] = {
    "gzip": build(),
    "native": build("--voxel-dtype=native"),
    "none": build("--compression=none"),
}


def parse(record: Any) -> Any:
    import tensorflow as tf

    kinds = {
        "image_raw": tf.io.FixedLenFeature([], tf.string),
        "label": tf.io.FixedLenFeature([], tf.float32),
    }
    features = tf.io.parse_single_example(record, kinds)
    return tf.expand_dims(tf.io.parse_tensor(features["image_raw"], tf.float32), 3), features["label"]


def original(folder: Path) -> Any:
    import tensorflow as tf

    files = tf.data.Dataset.list_files(f"{folder}/train-*.tfrecord.gz")
    records = files.flat_map(lambda name: tf.data.TFRecordDataset(name, compression_type="GZIP"))
    return records.map(parse).shuffle(COUNT).batch(BATCH)


def tuned(folder: Path) -> Any:
    import tensorflow as tf

    files = sorted(map(str, folder.glob("train-*.tfrecord.gz")))
    records = tf.data.TFRecordDataset(files, "GZIP", num_parallel_reads=tf.data.AUTOTUNE)
    return records.map(parse, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH).prefetch(tf.data.AUTOTUNE)


def reader(folder: Path) -> Any:
    from beam_nifti.reader import load_dataset

    return load_dataset(folder, batch_size=BATCH, shuffle=True)


def sequential(folder: Path) -> Any:
    from beam_nifti.reader import load_dataset

    return load_dataset(folder, batch_size=BATCH, shuffle=True, engine="sequential")


def random_access(folder: Path) -> Any:
    from beam_nifti.random_access import Dataset

    return Dataset(folder)


class Images:
    """The .nii.gz themselves, rescaled to what a record holds of them."""

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.glob("*.nii.gz"))[:COUNT]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> Any:
        import nibabel
        import numpy as np

        voxels = np.asanyarray(nibabel.load(self._paths[number]).dataobj).astype(np.float64)
        low, high = voxels.min(), voxels.max()
        return ((voxels - low) / (high - low)).astype(np.float32)


WAYS: dict[str, Way] = {
    "plain tf.data, gzip": ("gzip", original),
    "`TFRecordDataset`, tuned, gzip": ("gzip", tuned),
    "`reader.load_dataset`, gzip": ("gzip", reader),
    "`reader.load_dataset`, gzip, native": ("native", reader),
    "`reader.load_dataset`, uncompressed": ("none", reader),
    "`reader.load_dataset`, sequential, gzip": ("gzip", sequential),
    "`random_access.Dataset`, gzip": ("gzip", random_access),
    "`random_access.Dataset`, gzip, native": ("native", random_access),
    "`random_access.Dataset`, uncompressed": ("none", random_access),
    "`.nii.gz` with nibabel": (IMAGES, Images),
}


def exhaust(elements: Iterable[Any]) -> None:
    for _ in elements:
        pass


def measure(way: Way, folder: Path) -> dict[str, float]:
    """What one way takes, in this process."""
    elements = way[1](folder)
    exhaust(elements)
    wall, cpu = time.perf_counter(), time.process_time()
    exhaust(elements)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    figures = {"cpu": 1e3 * cpu / COUNT, "wall": 1e3 * wall / COUNT}
    if hasattr(elements, "__getitem__"):
        times = []
        for number in random.Random(0).sample(range(len(elements)), READS):
            start = time.perf_counter()
            elements[number]
            times.append(time.perf_counter() - start)
        figures["one"] = 1e3 * statistics.median(times)
    peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    return figures | {"peak": int(peak) / 1024}


def in_its_own_process(way: str, folder: Path) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, sys.argv[0], "--way", way, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{way}:\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def compare(ways: dict[str, Way], makers: dict[str, Maker], reference: str) -> None:
    """Make the data, measure every way, print the table.

    Args:
        ways: each way to read, by name. CPU times are also given as shares of that of the first.
        makers: what makes each kind of data, by its name.
        reference: title of the column of these shares.
    """
    parser = argparse.ArgumentParser(description="Measure what reading a volume costs.")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds; default: 3")
    parser.add_argument("--cohort-dir", type=Path, default=Path("/tmp/beam-nifti-cohort"), metavar="DIR")
    parser.add_argument("--way", choices=ways, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(ways[options.way], options.folder)))
        return
    manifest = make_cohort(COUNT, options.cohort_dir)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {IMAGES: options.cohort_dir}
        sizes = {IMAGES: sum(p.stat().st_size for p in sorted(options.cohort_dir.glob("*.nii.gz"))[:COUNT])}
        for kind, make in makers.items():
            folder = Path(scratch, kind)
            try:
                make(manifest, folder)
            except ModuleNotFoundError as e:
                print(f"not measured, as {e.name} is not installed: {kind}")
                continue
            folders[kind] = folder
            sizes[kind] = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        measured = {way: kind for way, (kind, _) in ways.items() if kind in folders}
        found = defaultdict(list)
        for _ in range(options.repeat):
            for way, kind in measured.items():
                found[way].append(in_its_own_process(way, folders[kind]))
    print(f"{platform.machine()}, {os.cpu_count()} cores, {options.repeat} rounds\n")
    print(f"| | CPU ms | {reference} | wall ms | one by number, ms | peak MB | MB on disk |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    first = None
    for way, rounds in found.items():
        cpu, wall, peak = (statistics.median(r[key] for r in rounds) for key in ("cpu", "wall", "peak"))
        first = first or cpu
        one = f"{statistics.median(r['one'] for r in rounds):.1f}" if "one" in rounds[0] else ""
        size = sizes[measured[way]] / 1e6
        print(f"| {way} | {cpu:.1f} | {cpu / first:.2f} | {wall:.1f} | {one} | {peak:.0f} | {size:.0f} |")


if __name__ == "__main__":
    compare(WAYS, MAKERS, "of plain tf.data")
