"""The loop that this project replaces: nibabel, numpy and tf.io.TFRecordWriter, at their defaults.

Usage: loop.py MANIFEST.tsv OUTPUT
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt
import tensorflow as tf

EXAMPLES_PER_SHARD = 155  # what `beam-nifti build` chooses for this cohort


def to_example(voxels: npt.NDArray[np.float32], label: float) -> bytes:
    tensor = tf.io.serialize_tensor(voxels).numpy()
    feature = {
        "image_raw": tf.train.Feature(bytes_list=tf.train.BytesList(value=[tensor])),
        "label": tf.train.Feature(float_list=tf.train.FloatList(value=[label])),
    }
    example = tf.train.Example(features=tf.train.Features(feature=feature))
    return example.SerializeToString()


def rescale(voxels: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
    values = voxels.astype(np.float64)  # int16 differences overflow
    low, high = values.min(), values.max()
    return ((values - low) / (high - low)).astype(np.float32)


def main(manifest: Path, output: Path) -> None:
    output.mkdir(parents=True)
    with manifest.open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    options = tf.io.TFRecordOptions(compression_type="GZIP")
    for shard, start in enumerate(range(0, len(rows), EXAMPLES_PER_SHARD)):
        path = output / f"train-{shard:05d}.tfrecord.gz"
        with tf.io.TFRecordWriter(str(path), options) as writer:
            for row in rows[start : start + EXAMPLES_PER_SHARD]:
                image = nibabel.load(manifest.parent / row["path"])
                voxels = rescale(np.asanyarray(image.dataobj))
                writer.write(to_example(voxels, float(row["label"])))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
