"""Measure what the positions of labels cost in an index, and what patches around them reach; print Markdown.

Masks are of 512×512×300 voxels: a label of 40 lesions with radii of 2 to 8 voxels, a vessel, and organs,
which are ellipsoids of about 20 to 100 voxels across. There are N positions of each label, but at most 64 · N
of all. "Reached" is the share of a label's voxels in a patch of 96³ around at least one of its positions.
"Lesions" is how many of the 40 have a position within 8 voxels of their centre.

Usage: positions.py [--masks M]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

import beam_nifti as bn
from beam_nifti.record.index import write_index
from beam_nifti.volume import label_map

SHAPE, EDGE, LESIONS = (512, 512, 300), 96, 40
Mask = npt.NDArray[np.uint8]


def add_ellipsoid(mask: Mask, label: int, centre: npt.ArrayLike, radii: npt.ArrayLike) -> None:
    lows = np.maximum(np.subtract(centre, radii).astype(int), 0)
    highs = np.minimum(np.add(centre, radii).astype(int) + 1, SHAPE)
    axes = zip(lows, highs, np.asarray(centre), np.asarray(radii), strict=True)
    x, y, z = np.ix_(*(((np.arange(low, high) - c) / r) ** 2 for low, high, c, r in axes))
    mask[tuple(map(slice, lows, highs))][x + y + z < 1] = label


def make_mask(num_labels: int, random: np.random.Generator) -> tuple[Mask, list[npt.NDArray[np.float64]]]:
    """A mask, and the centres of its lesions, whose label is 2; the vessel has label 1."""
    mask = np.zeros(SHAPE, np.uint8)
    for label in range(3, num_labels + 1):
        centre = random.uniform(0.15, 0.85, 3) * SHAPE
        add_ellipsoid(mask, label, centre, np.clip(random.lognormal(3.2, 0.4, 3), 10, 50))
    for z in range(SHAPE[2]):
        add_ellipsoid(mask, 1, (256 + 60 * np.sin(z / 40), 256 + 40 * np.cos(z / 55), z), (7, 7, 1))
    lesions = [random.uniform(0.2, 0.8, 3) * SHAPE for _ in range(LESIONS)]
    for centre in lesions:
        add_ellipsoid(mask, 2, centre, np.repeat(random.uniform(2, 8), 3))
    return mask, lesions


def reached(voxels: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> float:
    """The share of some voxels in a patch around any of the positions; both as coordinates."""
    lows = np.clip(positions - EDGE // 2, 0, np.subtract(SHAPE, EDGE))
    away = voxels[:, np.newaxis] - lows
    return float(((away >= 0) & (away < EDGE)).all(2).any(1).mean())


def index_bytes(rows: list[list[int]]) -> float:
    """Bytes of the index for each record."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "index.parquet")
        write_index(path, pa.table({"mask_positions": pa.array(rows, pa.list_(pa.int32()))}), {})
        return pq.read_metadata(path).row_group(0).column(0).total_compressed_size / len(rows)


def measure(num_labels: int, count: int, masks: int) -> str:
    label_map._POSITIONS, label_map._MOST_POSITIONS = count, 64 * count
    random, rows = np.random.default_rng(0), list[list[int]]()
    times, shares, hit = list[float](), list[float](), list[int]()
    for _ in range(masks):
        mask, lesions = make_mask(num_labels, random)
        start = time.thread_time()
        rows.append(label_map.positions_of(mask))
        times.append(time.thread_time() - start)
        labels = [label for label in label_map.labels_of(mask) if label]
        flat = np.array(rows[-1]).reshape(len(labels), -1)
        places = np.stack(np.unravel_index(flat, SHAPE), -1)
        for label, of_label in zip(labels, places, strict=True):
            voxels = np.flatnonzero(mask == label)
            chosen = np.stack(np.unravel_index(voxels[:: len(voxels) // 3000 + 1], SHAPE), -1)
            shares.append(reached(chosen, of_label))
        near = np.linalg.norm(np.array(lesions)[:, np.newaxis] - places[labels.index(2)], axis=2) < 8
        hit.append(int(near.any(1).sum()))
    size = index_bytes(rows)
    return (
        f"| {num_labels} | {count} | {len(rows[0]) // num_labels} | {size / 1e3:.2f} | {size / 10:.0f} "
        f"| {1e3 * statistics.median(times):.0f} | {min(shares):.0%}, {statistics.mean(shares):.1%} "
        f"| {statistics.mean(hit):.0f} of {LESIONS} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the positions of labels.")
    parser.add_argument("--masks", type=int, default=4)
    options = parser.parse_args()
    print(
        "| labels | N | of each | kB a record | MB, 10⁵ records | CPU ms | reached: least, mean | lesions |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for num_labels, count in itertools.product((2, 20, 104), (16, 64, 256)):
        print(measure(num_labels, count, options.masks), flush=True)
    print(f"\nbeam_nifti {bn.__version__}, masks of {'×'.join(map(str, SHAPE))}")


if __name__ == "__main__":
    main()
