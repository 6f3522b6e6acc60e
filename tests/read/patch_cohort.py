"""A dataset of volumes of different shapes with masks, some smaller than the patches that are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import beam_nifti as bn
from tests.images import write_image, write_manifest

SHAPES = ((40, 31, 26), (36, 40, 25), (12, 33, 11), (38, 30, 27), (41, 32, 30))
"""The third is smaller than a patch along two axes."""

PATCH = (16, 12, 14)
LABELLED = (slice(3, 6), slice(20, 24), slice(4, 8))
"""Where masks have the labels 7, in the first plane along x, and 2. The last mask is empty."""


def build_patch_cohort(folder: Path) -> Path:
    """Build it; its folder."""
    rows = []
    for i, shape in enumerate(SHAPES):
        mask = np.zeros(shape, np.uint8)
        if i < len(SHAPES) - 1:
            mask[LABELLED] = 2
            mask[LABELLED[0].start, *LABELLED[1:]] = 7
        names = {kind: f"sub-{i}_{kind}.nii.gz" for kind in ("path", "mask")}
        write_image(folder / names["path"], np.random.default_rng(i).normal(0, 99, shape).astype(np.int16))
        write_image(folder / names["mask"], mask)
        rows.append({"participant_id": f"sub-{i}", **names, "label": i})
    manifest = write_manifest(folder / "manifest.tsv", rows)
    options = {"mask_column": "mask", "allow_mixed_shapes": True, "num_shards": 2, "voxel_dtype": "native"}
    bn.build(manifest, folder / "out", progress=False, **options)
    return folder / "out"
