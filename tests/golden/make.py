"""Make the golden files of this folder: `python tests/golden/make.py`. Needs TensorFlow."""

from __future__ import annotations

from pathlib import Path

import tensorflow as tf

PAYLOADS = [b"", b"a", b"golden record", bytes(range(256)) * 40]


def main() -> None:
    """Write the records with TensorFlow's own writer, plain and compressed."""
    folder = Path(__file__).parent
    for name, compression in (("records.tfrecord", ""), ("records.tfrecord.gz", "GZIP")):
        with tf.io.TFRecordWriter(str(folder / name), compression) as writer:
            for payload in PAYLOADS:
                writer.write(payload)


if __name__ == "__main__":
    main()
