"""Compare Keras's example of CT scans with a dataset of the same preparation; print a Markdown table.

The original loads every .nii.gz with nibabel, limits it to -1000 to 400 HU, resamples it with
`scipy.ndimage.zoom`, and keeps all volumes in memory for `tf.data.Dataset.from_tensor_slices`. Here, the
dataset is built with `resize`, `rescale` and `clip`, and `load_dataset` reads it. Each side runs in
processes of its own, alternately. Also prints by how much the voxels differ, and the accuracy of the
network of examples/keras_ct.py on the volumes of each side.

Usage: ct.py [--count N] [--source X,Y,Z] [--size X,Y,Z] [--epochs N] [--repeat N]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from scipy import ndimage

Numbers = dict[str, float]


def write_cohort(folder: Path, count: int, shape: tuple[int, ...]) -> Path:
    """CT-like volumes: a body of water in air, with lungs, a spine and, in every second one, lesions."""
    folder.mkdir(parents=True, exist_ok=True)
    axes = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    lines = ["path\tlabel\tsplit\tparticipant_id"]
    for number in range(count):
        random = np.random.default_rng(number)
        volume = np.full(shape, -1000.0)
        volume[(axes[0] / 0.9) ** 2 + (axes[1] / 0.7) ** 2 < 1] = 40
        for side in (-0.4, 0.4):
            lung = ((axes[0] - side) / 0.3) ** 2 + (axes[1] / 0.5) ** 2 + (axes[2] / 0.9) ** 2 < 1
            volume[lung] = -850
            if number % 2:
                centre = np.array([side, *random.uniform(-0.2, 0.2, 2)])
                lesion = np.linalg.norm(axes - centre[:, None, None, None], axis=0) < random.uniform(
                    0.15, 0.25
                )
                volume[lung & lesion] = -200
        volume[axes[0] ** 2 + (axes[1] + 0.55) ** 2 < 0.01] = 700
        image = nibabel.Nifti1Image((volume + random.normal(0, 30, shape)).astype(np.int16), np.eye(4))
        image.to_filename(folder / f"{number:03d}.nii.gz")
        split = "validation" if number % 10 in (3, 6, 9) else "train"
        lines.append(f"{number:03d}.nii.gz\t{number % 2}\t{split}\tsub-{number:03d}")
    manifest = folder / "manifest.tsv"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def prepare_original(path: Path, size: tuple[int, ...]) -> np.ndarray:
    """What the example does to a volume, but for its turn by 90°, which only moves voxels."""
    volume = nibabel.load(path).get_fdata()
    volume = ((np.clip(volume, -1000, 400) + 1000) / 1400).astype(np.float32)
    return ndimage.zoom(volume, [m / n for m, n in zip(size, volume.shape, strict=True)], order=1)


def read_rows(manifest: Path, split: str) -> list[tuple[Path, float]]:
    rows = [line.split("\t") for line in manifest.read_text().splitlines()[1:]]
    return [(manifest.parent / path, float(label)) for path, label, of, _ in rows if of == split]


def open_original(manifest: Path, split: str, size: tuple[int, ...]) -> Any:
    import tensorflow as tf

    rows = read_rows(manifest, split)
    x = np.array([prepare_original(path, size) for path, _ in rows])[..., np.newaxis]
    return tf.data.Dataset.from_tensor_slices((x, np.array([label for _, label in rows], np.float32)))


def open_dataset(manifest: Path, split: str, size: tuple[int, ...]) -> Any:
    from beam_nifti.reader import load_dataset

    return load_dataset(manifest.parent / "dataset", split)


OPENERS: dict[str, Callable[[Path, str, tuple[int, ...]], Any]] = {
    "original": open_original,
    "dataset": open_dataset,
}


def measure(way: str, manifest: Path, size: tuple[int, ...], epochs: int) -> Numbers:
    """Times and memory of reading on one side, without imports, and the accuracy after some epochs."""
    import keras
    import tensorflow as tf

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from examples.keras_ct import make_network

    list(tf.data.Dataset.range(2).batch(2))  # TensorFlow's own start
    before, start, cpu = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        time.perf_counter(),
        time.process_time(),
    )
    volumes = OPENERS[way](manifest, "train", size)
    batches = volumes.batch(2).prefetch(2)
    next(iter(batches))
    first = time.perf_counter() - start
    count = 0
    start, epoch_cpu = time.perf_counter(), time.process_time()
    for x, _ in batches:
        count += len(x)
    seconds, epoch_cpu = time.perf_counter() - start, time.process_time() - epoch_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    numbers = {
        "first": first,
        "cpu": time.process_time() - cpu,
        "rate": count / seconds,
        "epoch_cpu_ms": epoch_cpu / count * 1000,
        "mb": (peak - before) / 1024,
    }
    if epochs:
        keras.utils.set_random_seed(0)
        network = make_network((*size, 1))
        shuffled = volumes.shuffle(100, seed=0).batch(2)
        validation = OPENERS[way](manifest, "validation", size).batch(2)
        history = network.fit(shuffled, validation_data=validation, epochs=epochs, shuffle=False, verbose=0)
        numbers["accuracy"] = max(history.history["val_accuracy"])
    return numbers


def compare_voxels(manifest: Path, size: tuple[int, ...]) -> None:
    from beam_nifti.random_access import Dataset

    records = Dataset(manifest.parent / "dataset", "validation", columns=["image", "id"])
    theirs = {path.name[:3]: prepare_original(path, size) for path, _ in read_rows(manifest, "validation")}
    differences = np.concatenate(
        [np.abs(r["image"][..., 0] - theirs[r["id"].removeprefix("sub-")]).ravel() for r in records]
    )
    mean, high = differences.mean(), np.percentile(differences, 99)
    print(f"\nVoxels in [0, 1] differ by {mean:.4f} on average, 99 % of them by less than {high:.3f}.")


def main() -> None:
    def sizes(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(",")))

    parser = argparse.ArgumentParser(description="Compare Keras's example of CT scans with a dataset.")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--source", type=sizes, default=(256, 256, 96))
    parser.add_argument("--size", type=sizes, default=(128, 128, 64))
    parser.add_argument("--epochs", type=int, default=0, help="to train; 0 trains nothing")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--way", choices=OPENERS, help=argparse.SUPPRESS)
    parser.add_argument("--manifest", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.manifest, options.size, options.epochs)))
        return
    import beam_nifti as bn

    with tempfile.TemporaryDirectory() as folder:
        manifest = write_cohort(Path(folder), options.count, options.source)
        start, cpu = time.perf_counter(), os.times()
        bn.build(
            manifest,
            Path(folder) / "dataset",
            resize=options.size,
            rescale=bn.Window(-1000, 400),
            clip=True,
            progress=False,
        )
        used = os.times()
        print(f"build: {time.perf_counter() - start:.1f} s, {sum(used[:4]) - sum(cpu[:4]):.1f} s of CPU\n")
        found: dict[str, list[Numbers]] = {way: [] for way in OPENERS}
        for repeat in range(options.repeat):
            for way in OPENERS:
                of_run = [
                    f"--size={','.join(map(str, options.size))}",
                    f"--epochs={0 if repeat else options.epochs}",
                ]
                command = [sys.executable, __file__, f"--way={way}", f"--manifest={manifest}", *of_run]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
        print("| | first batch, s | CPU s | volumes/s | CPU ms per volume | MB | accuracy |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        for way, runs in found.items():
            keys = ("first", "cpu", "rate", "epoch_cpu_ms", "mb")
            cells = [f"{statistics.median(run[key] for run in runs):.1f}" for key in keys]
            print(f"| {way} | {' | '.join(cells)} | {runs[0].get('accuracy', float('nan')):.2f} |")
        compare_voxels(manifest, options.size)


if __name__ == "__main__":
    main()
