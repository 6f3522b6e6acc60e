"""Measure what the statistics of a cohort cost for one volume, and how exact they are; print Markdown tables.

A volume of 91×109×91 voxels, made as those of make_cohort.py are, is measured as int16, as float32 (as
--spacing makes it) and as float64, and compared with numpy: mean, std and percentile of the same voxels. The
least CPU time of 10 runs counts. Then 100 volumes in scalings of their own are added up.

Usage: cohort.py
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from make_cohort import load_anatomy, scan

from beam_nifti.config import RecordConfig
from beam_nifti.manifest import VolumeRow
from beam_nifti.volume import Scaling, Volume, load_volume
from beam_nifti.volume.cohort import PERCENTILES, CohortMeasure, measure_volume

REPEATS = 10
CONFIG = RecordConfig("cohort:zscore")
VOLUMES = 100


def cpu_ms(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return 1e3 * best


def by_numpy(volume: Volume) -> None:
    values = volume.scaling.apply(volume.voxels)
    values.mean(), values.std(), np.percentile(values, PERCENTILES)


def times(volume: Volume) -> Iterator[str]:
    yield "| voxels | measured, CPU ms | numpy, CPU ms | added, CPU ms | counts, kB | sent, kB |"
    yield "|---|---:|---:|---:|---:|---:|"
    rng = np.random.default_rng(0)
    noise = rng.random(volume.voxels.shape)
    for dtype in ("int16", "float32", "float64"):
        voxels = volume.voxels if dtype == "int16" else (volume.voxels + noise).astype(dtype)
        each = replace(volume, voxels=voxels)
        measure, total = measure_volume(each, CONFIG), CohortMeasure()
        counts = measure.channels[0].histogram.counts.nbytes
        cells = [cpu_ms(lambda v=each: measure_volume(v, CONFIG)), cpu_ms(lambda v=each: by_numpy(v))]
        cells.append(cpu_ms(lambda m=measure, t=total: t.add(m)))
        numbers = " | ".join(f"{cell:.1f}" for cell in cells)
        yield f"| {dtype} | {numbers} | {counts / 1e3:.0f} | {len(pickle.dumps(measure)) / 1e3:.0f} |"


def errors(volume: Volume) -> Iterator[str]:
    total, values = CohortMeasure(), list[np.ndarray]()
    for number in range(VOLUMES):
        scaling = Scaling(0.5 + number / 97, -number / 3)
        each = replace(volume, scaling=scaling, voxels=volume.voxels[::3, ::3, ::3].copy() + number % 7)
        total.add(measure_volume(each, CONFIG))
        values.append(scaling.apply(each.voxels))
    (channel,) = total.statistics(CONFIG, ["train"]).channels
    exact = np.percentile(np.concatenate(values), PERCENTILES)
    size, kilobytes = len(pickle.dumps(total)) / 1e3, total.channels[0].histogram.counts.nbytes / 1e3
    yield f"{VOLUMES} scalings: counts of {kilobytes:.0f} kB, {size:.0f} kB when they are sent"
    yield ""
    yield "| percentile | numpy | found | relative error |"
    yield "|---:|---:|---:|---:|"
    for (p, found), wanted in zip(channel.percentiles, exact.tolist(), strict=True):
        error = abs(found - wanted) / abs(wanted) if wanted else abs(found)
        yield f"| {p:g} | {wanted:.6g} | {found:.6g} | {error:.1e} |"


def main() -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "scan.nii.gz"
        path.write_bytes(scan(load_anatomy(), 0))
        volume = load_volume(VolumeRow(1, "scan", str(path), None))
        for row in (*times(volume), "", *errors(volume)):
            print(row, flush=True)


if __name__ == "__main__":
    main()
