"""Make version-1, a dataset of format version 1: `python -m tests.golden.make_version_1`.

Run it with the code that wrote version 1, the last to say `FORMAT_VERSION: Final = 1`. Examples have two
channels and a mask. The first image is an .hdr/.img pair; another one is missing.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np

from beam_nifti.config import Columns, Sharding
from tests.datasets import build_dataset, set_times
from tests.images import brain, nifti_header, write_image, write_manifest

FOLDER = "/data/version-1"
"""Where the dataset says that it was built."""

SHAPE = (4, 3, 2)
COUNT = 5


def main() -> None:
    """Write the images, their manifest and the dataset."""
    target = Path(__file__).parent / "version-1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = folder / "images"
        rows = []
        for i in range(COUNT):
            t1, t2, mask = (images / f"{i}-{kind}.nii" for kind in ("T1w", "T2w", "mask"))
            write_image(t1, brain(SHAPE, seed=i))
            write_image(t2, brain(SHAPE, seed=10 + i))
            write_image(mask, np.arange(24, dtype=np.uint8).reshape(SHAPE) % (2 + i))
            rows.append(
                {
                    "participant_id": f"sub-{i}",
                    "T1w": t1.name if i else "0-T1w.hdr",
                    "T2w": t2.name,
                    "mask": mask.name,
                    "label": i / 2,
                    "site": "AB"[i % 2],
                }
            )
        voxels = brain(SHAPE)
        (images / "0-T1w.hdr").write_bytes(nifti_header(voxels, fields={"magic": b"ni1", "vox_offset": 0}))
        (images / "0-T1w.img").write_bytes(voxels.tobytes(order="F"))
        (images / "0-T1w.nii").unlink()
        (images / "3-T2w.nii").unlink()
        set_times(images)
        manifest = write_manifest(folder / "manifest.tsv", [{**r, **_in_folder(r)} for r in rows])
        build_dataset(
            manifest,
            folder / "dataset",
            columns=Columns(path="T1w,T2w", mask="mask"),
            sharding=Sharding(examples_per_shard=2),
            max_bad_fraction=0.5,
        )
        for text in ("dataset_info.json", "failures.jsonl"):
            path = folder / "dataset" / text
            path.write_text(path.read_text().replace(name, FOLDER))
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target, ignore=shutil.ignore_patterns(".lock"))


def _in_folder(row: dict[str, object]) -> dict[str, object]:
    return {name: f"images/{row[name]}" for name in ("T1w", "T2w", "mask")}


if __name__ == "__main__":
    main()
