"""Measure what each preparation costs a volume; print a Markdown table.

One volume of make_cohort.py (91×109×91 voxels of 2 mm, int16) goes through each function, and, for the
interpolation, through those of scipy that do the same. CPU milliseconds of one thread, the best of
several runs; and the bytes of the record's voxels, rescaled and compressed as `beam-nifti build` does by
default, beside those of the volume as it is.

Usage: prepare.py [--repeat N]
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np
from isal import igzip
from make_cohort import AFFINE, load_anatomy, scan
from nibabel import Nifti1Image
from numpy.typing import NDArray
from scipy import ndimage

from beam_nifti.config import RecordConfig, ReferenceGrid
from beam_nifti.manifest import VolumeRow
from beam_nifti.volume import Volume, rescale_volume
from beam_nifti.volume.files import Source
from beam_nifti.volume.preprocess import align, crop_foreground, crop_or_pad, orient, resample, resize_to
from beam_nifti.volume.resample import LINEAR, Interpolation
from beam_nifti.volume.rescale import Scaling

STEP = 0.75  # from 2 mm to 1.5 mm
MASK = list[NDArray[np.uint8]]()
UP, DOWN = (121, 145, 121), (46, 55, 46)
GRID: dict[str, Any] = {"mode": "nearest", "grid_mode": True}
CUBIC, NEAREST, SMOOTH = Interpolation("cubic"), Interpolation("nearest"), Interpolation(antialias=True)
LABELS = Interpolation("nearest", "linear")
Preparation = Callable[[Volume], Volume]


def load() -> Volume:
    image = Nifti1Image.from_bytes(igzip.decompress(scan(load_anatomy(), 0)))
    voxels = np.ascontiguousarray(image.dataobj)
    row = VolumeRow(1, "sub-00000", "sub-00000_T1w.nii.gz", None)
    return Volume(row, voxels, Scaling(), AFFINE, (2.0, 2.0, 2.0), voxels.dtype.name, Source((), (), ()))


def by_affine_transform(volume: Volume) -> Volume:
    old = volume.voxels.shape
    new = tuple(round(n / STEP) for n in old)
    starts = [(n - 1) / 2 - STEP * (m - 1) / 2 for n, m in zip(old, new, strict=True)]
    voxels = ndimage.affine_transform(
        volume.voxels, [STEP] * 3, starts, new, np.float32, order=1, mode="nearest"
    )
    return dataclasses.replace(volume, voxels=voxels)


def by_zoom(volume: Volume, order: int, shape: tuple[int, ...] = UP, *, smooth: bool = False) -> Volume:
    factors = np.array(volume.voxels.shape) / shape
    voxels = volume.voxels
    if smooth:
        voxels = ndimage.gaussian_filter(
            voxels, np.maximum(0, (factors - 1) / 2), mode="nearest", output=float
        )
    made = ndimage.zoom(voxels, 1 / factors, np.float32, order=order, mode="nearest", grid_mode=True)
    return dataclasses.replace(volume, voxels=made)


def by_one_hot(volume: Volume) -> Volume:
    """The label of the largest share, of all labels at once."""
    mask = MASK[0]
    shares = [
        ndimage.zoom((mask == label).astype(np.float32), np.array(UP) / mask.shape, order=1, **GRID)
        for label in range(3)
    ]
    return dataclasses.replace(volume, voxels=np.argmax(shares, axis=0).astype(np.uint8))


def to_tilted(volume: Volume, degrees: float) -> Volume:
    """To a grid of as many voxels, turned about the centre and then moved by a third of a voxel."""
    turn, size = np.eye(4), np.array(volume.voxels.shape)
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn[:2, :2] = [[c, -s], [s, c]]
    turn[:3, 3] = (np.eye(3) - turn[:3, :3]) @ ((size - 1) / 2) + 1 / 3
    affine = volume.affine @ turn
    return align(volume, ReferenceGrid(volume.voxels.shape, tuple(affine.ravel().tolist())), LINEAR)


def with_mask(volume: Volume) -> Volume:
    """Labels for the halves of the head, made once, as they take longer than what is measured."""
    if not MASK:
        MASK.append((volume.voxels > 100).astype(np.uint8))
        MASK[0][45:] *= 2
    return dataclasses.replace(volume, mask=MASK[0])


PREPARATIONS: dict[str, Preparation] = {
    "none": lambda volume: volume,
    "`--orientation LPS` of RAS": lambda volume: orient(volume, "LPS"),
    "`--orientation SAR` of RAS": lambda volume: orient(volume, "SAR"),
    "`--spacing 1.5,1.5,1.5` of 2 mm": lambda volume: resample(volume, (1.5, 1.5, 1.5)),
    "… by `scipy.ndimage.affine_transform`": by_affine_transform,
    "`--spacing 1.5,1.5,1.5`, with a mask": lambda volume: resample(with_mask(volume), (1.5, 1.5, 1.5)),
    "`--spacing 3,3,3` of 2 mm": lambda volume: resample(volume, (3, 3, 3)),
    "`--resize 121,145,121`": lambda volume: resize_to(volume, UP),
    "… by `scipy.ndimage.zoom`": lambda volume: by_zoom(volume, 1),
    "`--resize 121,145,121 --interpolation cubic`": lambda volume: resize_to(volume, UP, CUBIC),
    "… by `scipy.ndimage.zoom` of order 3": lambda volume: by_zoom(volume, 3),
    "`--resize 121,145,121 --interpolation nearest`": lambda volume: resize_to(volume, UP, NEAREST),
    "… by `scipy.ndimage.zoom` of order 0": lambda volume: by_zoom(volume, 0),
    "`--resize 46,55,46 --antialias`": lambda volume: resize_to(volume, DOWN, SMOOTH),
    "… by `scipy.ndimage.gaussian_filter` and `zoom`": lambda volume: by_zoom(volume, 1, DOWN, smooth=True),
    "`--resize 121,145,121 --interpolation nearest --mask-interpolation linear`": lambda volume: resize_to(
        with_mask(volume), UP, LABELS
    ),
    "… mask of 3 labels by `scipy.ndimage.zoom` of each": by_one_hot,
    "`--reference` of parallel axes": lambda volume: to_tilted(volume, 0),
    "`--reference` turned by 10°": lambda volume: to_tilted(volume, 10),
    "`--crop-foreground above:100`": lambda volume: crop_foreground(volume, "above:100"),
    "`--shape 96,96,96`": lambda volume: crop_or_pad(volume, (96, 96, 96)),
}


def cpu_ms(prepare: Preparation, volume: Volume, repeat: int) -> float:
    times = []
    for _ in range(repeat):
        start = time.process_time()
        prepare(volume)
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeat", type=int, default=9)
    repeat = parser.parse_args().repeat
    volume = load()
    print("| preparation | CPU ms | shape | voxels as float32, MB | packed, MB | packed / float32 |")
    print("|---|---:|---|---:|---:|---:|")
    for name, prepare in PREPARATIONS.items():
        made = prepare(volume)
        voxels = rescale_volume(made, RecordConfig()).voxels
        packed = len(igzip.compress(voxels, RecordConfig.compression_level))
        shape = "×".join(map(str, voxels.shape))
        sizes = f"{voxels.nbytes / 1e6:.1f} | {packed / 1e6:.1f} | {packed / voxels.nbytes:.2f}"
        print(f"| {name} | {cpu_ms(prepare, volume, repeat):.1f} | {shape} | {sizes} |")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("numpy", "scipy", "nibabel", "isal"))
    print(f"\n{versions}, Python {platform.python_version()}")


if __name__ == "__main__":
    main()
