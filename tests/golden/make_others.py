"""Make the files that other writers wrote: `python tests/golden/make_others.py`. Needs nobrainer 1.2."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import tensorflow as tf
from nobrainer.tfrecord import parse_example_fn, write

SHAPE = (4, 3, 2)
COUNT = 3


def main() -> None:
    """Write volumes with numbers and with label maps, and what nobrainer reads of them."""
    golden = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for i in range(COUNT):
            voxels = np.random.default_rng(i).normal(100, 30, SHAPE).astype(np.float32)
            mask = (voxels > 100).astype(np.int16) * (i + 1)
            for name, array in (("image", voxels), ("mask", mask)):
                nib.Nifti1Image(array, np.eye(4)).to_filename(f"{folder}/{name}-{i}.nii")
            paths.append((f"{folder}/image-{i}.nii", f"{folder}/mask-{i}.nii"))
        read = {}
        for name, pairs in {
            "scalar": [(image, i + 0.5) for i, (image, _) in enumerate(paths)],
            "volume": paths,
        }.items():
            write(pairs, f"{golden}/nobrainer-{name}-{{shard:03d}}.tfrec", examples_per_shard=2, processes=1)
            files = sorted(map(str, golden.glob(f"nobrainer-{name}-*.tfrec")))
            parse = parse_example_fn(SHAPE, scalar_labels=name == "scalar")
            cells = [parse(record) for record in tf.data.TFRecordDataset(files, "GZIP")]
            read[f"{name}_x"] = np.stack([x for x, _ in cells])
            read[f"{name}_y"] = np.stack([y for _, y in cells])
    np.savez_compressed(golden / "nobrainer.npz", **read)


if __name__ == "__main__":
    main()
