"""Measure how well, and how fast, `beam-nifti report` finds records with nearly the same image.

Prints Markdown. Each cohort is a folder of NIfTI images of different people. Another one is made here: the
template of nilearn, deformed by 1.5 voxels of 2 mm, with another brightness and noise for each of 60 people.
"Highest" is the highest similarity of two images, and "false" the number of pairs above the limit.
The other columns are the share of up to 30 images whose changed copies are found. The time is that of
comparing random descriptors with each other.

Usage: copies.py [--records N] [FOLDER …]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa
from nilearn.datasets import load_mni152_template
from scipy import ndimage

from beam_nifti.reporting import copies
from beam_nifti.reporting.summary import _unit_deviation
from beam_nifti.reporting.thumbnail import block_means

ADDED = 30  # images of a cohort that are changed
RANDOM = np.random.default_rng(0)


def noisy(volume: Any) -> Any:
    low, high = np.percentile(volume, [1, 99])
    return volume + RANDOM.normal(0, 0.05 * (high - low), volume.shape)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "scaled": lambda v: 1.7 * v + 30,
    "8 bits": lambda v: np.round(255 * np.clip((v - v.min()) / (np.percentile(v, 99.9) - v.min()), 0, 1)),
    "noise 5 %": noisy,
    "shift x": lambda v: np.roll(v, 1, 0),
    "shift y": lambda v: np.roll(v, 1, 1),
    "shift z": lambda v: np.roll(v, 1, 2),
    "resampled": lambda v: ndimage.zoom(v, 0.75, order=1),
    "cropped": lambda v: v[1:-1, 1:-1, 1:-1],
    "clipped": lambda v: np.clip(v, *np.percentile(v, [1, 99])),
}


def read_folder(folder: str) -> Iterable[Any]:
    for path in sorted(Path(folder).iterdir()):
        if path.name.endswith((".nii", ".nii.gz", ".img")):
            image = nib.as_closest_canonical(nib.load(path))
            yield np.nan_to_num(np.asarray(image.dataobj, np.float32).squeeze())


def deform_template(count: int = 60, voxels: float = 1.5) -> Iterable[Any]:
    template = np.asarray(load_mni152_template(resolution=2).dataobj, np.float32)
    places = np.indices(template.shape).astype(np.float32)

    def waves(width: float) -> Any:
        field = ndimage.gaussian_filter(RANDOM.standard_normal(template.shape).astype(np.float32), width)
        return field / field.std()

    for _ in range(count):
        moved = np.stack([(waves(4) + waves(8)) * voxels / 8**0.5 for _ in range(3)])
        volume = ndimage.map_coordinates(template, places + moved, order=1) * (1 + 0.05 * waves(20))
        yield volume + RANDOM.normal(0, 0.02 * template.max(), template.shape)


def grid_of(volume: Any) -> Any:
    """A grid as stored in a sheet, standardized."""
    grid = block_means(volume).ravel()
    shades = np.round(255 * (grid - grid.min()) / np.ptp(grid))
    return _unit_deviation(shades[np.newaxis])[0]


def measure(name: str, volumes: Iterable[Any]) -> None:
    found, changed = [], []
    for number, volume in enumerate(volumes):
        found.append(grid_of(volume))
        if number < ADDED:
            changed.append([grid_of(change(volume)) for change in CHANGES.values()])
    grids, sample = np.array(found), copies.Sample()
    sample.add(grids)
    common = sample.common(grids.mean(0))
    units = copies._floats(copies.describe(grids, common))
    apart = (units @ units.T)[np.triu_indices(len(grids), 1)]
    alike = [
        units[number] @ copies._floats(copies.describe(np.array(copied), common)).T
        for number, copied in enumerate(changed)
    ]
    shares = " | ".join(f"{share:.0%}" for share in np.mean(np.array(alike) > copies.LIMIT, axis=0))
    false = np.count_nonzero(apart > copies.LIMIT)
    print(f"| {name} | {len(grids)} | {apart.max():.2f} | {false} of {apart.size:,} | {shares} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("folders", nargs="*")
    options = parser.parse_args()
    print(f"| cohort | images | highest | false | {' | '.join(CHANGES)} |")
    print(f"|---|{'---:|' * (3 + len(CHANGES))}")
    for folder in options.folders:
        measure(Path(folder).name, read_folder(folder))
    measure("deformed template", deform_template())
    count = options.records
    descriptors = RANDOM.integers(-127, 128, (count, 12**3), np.int8)
    rows = pa.table(
        {"example_id": [str(n) for n in range(count)], "split": ["train"] * count, "row": range(count)}
    )
    start = time.perf_counter()
    copies.find_copies(rows, [()] * count, descriptors)
    seconds = time.perf_counter() - start
    print(f"\n{count:,} records: {seconds:.0f} s, {descriptors.nbytes / 1e6:.0f} MB of descriptors")


if __name__ == "__main__":
    main()
