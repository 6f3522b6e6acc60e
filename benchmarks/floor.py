"""The work that no design avoids, and nothing else: no Beam, no TensorFlow, no index, no affine.

Inflate, find the range, rescale to float32, CRC, deflate (igzip, level 2), write. It is written
plainly: `igzip.decompress` grows its buffer as it goes, and the voxels stay in the file's axis
order. A build that inflates into a buffer of the right size wins back what it spends elsewhere.

Usage: floor.py MANIFEST.tsv OUTPUT
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import google_crc32c
import numpy as np
from isal import igzip

NIFTI_HEADER_BYTES = 352
LEVEL = 2


def main(manifest: Path, output: Path) -> None:
    output.mkdir(parents=True)
    with manifest.open() as file:
        paths = [manifest.parent / row["path"] for row in csv.DictReader(file, delimiter="\t")]
    with (output / "floor.gz").open("wb") as out:
        for path in paths:
            image = igzip.decompress(path.read_bytes())
            voxels = np.frombuffer(image, "<i2", offset=NIFTI_HEADER_BYTES)
            low, high = int(voxels.min()), int(voxels.max())
            scaled = voxels.astype(np.float32)
            scaled -= np.float32(low)
            scaled /= np.float32(high - low)
            google_crc32c.value(scaled.tobytes())
            out.write(igzip.compress(scaled, LEVEL))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
