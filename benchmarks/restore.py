"""Measure what resampling to a record's grid and back loses of labelled balls, and how long it takes.

Print Markdown. Usage: restore.py
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

import beam_nifti as bn
from beam_nifti.manifest import VolumeRow
from beam_nifti.volume import Scaling, Volume
from beam_nifti.volume.files import Source
from beam_nifti.volume.grid import Grid
from beam_nifti.volume.preprocess import resample
from beam_nifti.volume.restoring import restore_classes, restore_voxels

SPACINGS, RADII, SIZE = (0.8, 1.5, 2, 3), (3, 6, 40), 128
Labels = npt.NDArray[np.uint8]


def ball(radius: float) -> Labels:
    x, y, z = np.ix_(*[(np.arange(SIZE) - SIZE / 2 - shift) ** 2 for shift in (0.2, 0.35, -0.1)])
    return np.uint8(x + y + z < radius**2)


def dice(one: Labels, other: Labels) -> float:
    return float(2 * np.count_nonzero(one & other) / (np.count_nonzero(one) + np.count_nonzero(other)))


def there_and_back(labels: Labels, spacing: float) -> tuple[float, float]:
    """The Dice coefficients of the restored label map, and of the argmax of restored one-hot channels."""
    grid, source = Grid.of(labels.shape, np.eye(4)), Source((), labels.shape, ())
    row, image = VolumeRow(1, "ball", "ball.nii"), np.zeros(labels.shape, np.float32)
    record = resample(
        Volume(row, image, Scaling(), grid.affine, grid.zooms, "float32", source, labels), [spacing] * 3
    )
    mask, record_grid = record.mask, Grid.of(record.voxels.shape, record.affine)
    assert mask is not None
    nearest = restore_voxels(mask, record_grid, grid, 0, is_linear=False)
    channels = (mask[..., np.newaxis] == np.arange(2)).astype(np.float32)
    return dice(nearest, labels), dice(
        restore_classes(channels, record_grid, grid, 0, is_linear=True), labels
    )


def main() -> None:
    print(f"| radius | {' | '.join(f'{spacing} mm' for spacing in SPACINGS)} |")
    print(f"|---|{'---:|' * len(SPACINGS)}")
    for radius in RADII:
        found = [there_and_back(ball(radius), spacing) for spacing in SPACINGS]
        for name, values in zip(("labels", "argmax"), zip(*found, strict=True), strict=True):
            print(f"| {radius} mm, {name} | {' | '.join(f'{value:.3f}' for value in values)} |")
    source = Grid((512, 512, 300), np.diag([0.7, 0.7, 1, 1]))
    record_grid = Grid((239, 239, 200), np.diag([1.5, 1.5, 1.5, 1]))
    channels = np.random.default_rng(0).random((*record_grid.shape, 3), np.float32)
    labels = np.uint8(channels.argmax(-1))
    print()
    start = time.process_time()
    restore_classes(channels, record_grid, source, 0, is_linear=True)
    print(f"argmax of three channels at 512×512×300 voxels: {time.process_time() - start:.2f} s")
    start = time.process_time()
    restore_voxels(labels, record_grid, source, 0, is_linear=False)
    print(f"labels at 512×512×300 voxels: {time.process_time() - start:.2f} s")
    print(f"\nbeam_nifti {bn.__version__}")


if __name__ == "__main__":
    main()
