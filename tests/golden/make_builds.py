"""Make builds.json, digests of what builds write: `python -m tests.golden.make_builds`.

They change only with the format of the records or of the index, or with its pinned libraries.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from beam_nifti.support.strict_json import dump_json
from tests.build_helpers import build, contents
from tests.datasets import set_times
from tests.images import brain, write_image, write_manifest

GOLDEN: Final = Path(__file__).parent / "builds.json"
KEY: Final = b"0123456789abcdef" * 2
COUNT: Final = 6

BUILDS: Final[dict[str, dict[str, Any]]] = {
    "default": {},
    "no compression": {"compression": "none"},
    "float16, percentiles": {"rescale": "percentile:1,99", "clip": True, "voxel_dtype": "float16"},
    "native": {"voxel_dtype": "native", "num_shards": 1},
    "z-scores": {"rescale": "zscore", "rescale_within": "nonzero", "compression_level": 1},
    "prepared": {
        "preprocess": "tests.golden.steps:double",
        "orientation": "LPS",
        "spacing": (1.5, 2, 2),
        "crop_foreground": "nonzero",
        "shape": (8, 6, 5),
    },
    "channels, mask, labels": {
        "columns": {"path": "path,frames", "mask": "mask", "label": "label,site", "missing_label": "nan"},
        "frames": "mean",
        "rescale": "window:-5,500",
    },
    "each frame": {"columns": {"path": "frames"}, "frames": "each", "shuffle_seed": 3},
    "resized, mask": {
        "columns": {"path": "path", "mask": "mask"},
        "resize": (8, 4, 5),
        "mask_interpolation": "linear",
    },
    "cubic, smoothed": {"spacing": (3, 1.5, 4), "interpolation": "cubic", "antialias": True},
    "reference": {
        "columns": {"path": "path", "mask": "mask"},
        "reference": {
            "shape": (5, 6, 5),
            "affine": (0, -1.7, 0, 88, 1.7, 0, 0, -125, 0, 0, 2, -71, 0, 0, 0, 1),
        },
    },
    "target": {
        "columns": {"path": "path", "target": "mask"},
        "nonfinite": "zero",
        "spacing": (3, 2, 4),
        "shape": (8, 6, 5),
    },
    "pseudonyms": {
        "anonymous_ids": "key",
        "columns": {"path": "path,frames", "mask": "mask"},
        "frames": "first",
        "examples_per_shard": 2,
    },
}
"""Changes of a build's options, by what they are about."""

LARGE: Final = "large: "
LARGE_SHAPE: Final = (60, 50, 40)
BUILDS |= {
    f"{LARGE}default": {},
    f"{LARGE}native, mask": {"voxel_dtype": "native", "columns": {"mask": "mask"}, "num_shards": 2},
    f"{LARGE}uint8, no compression": {"voxel_dtype": "uint8", "compression": "none"},
}
"""Those of images whose records are cut into several members begin with LARGE."""

CONTENT: Final = GOLDEN.with_name("content.json")
"""sha256 of what the shards of these hold, decompressed, as it was when each record was one gzip member. No
change of the compression may change it, so it is not made again."""


def write_inputs(folder: Path, shape: Sequence[int] | None = None) -> Path:
    """Write images with one frame and with three, masks, and a key; their manifest."""
    rows = []
    for i in range(COUNT):
        voxels = brain(seed=i) if shape is None else brain(shape, seed=i)
        names = {kind: f"sub-{i}_{kind}.nii.gz" for kind in ("path", "frames", "mask")}
        write_image(folder / names["path"], voxels)
        write_image(folder / names["frames"], np.stack([brain(seed=10 * f + i) for f in range(3)], axis=-1))
        write_image(folder / names["mask"], (voxels > np.median(voxels)).astype(np.uint8))
        cells = {"participant_id": f"sub-{i}", **names, "label": i / 4, "site": "AB"[i % 2]}
        rows.append(cells | {"split": "test" if i == 4 else "train"})
    set_times(folder)
    (folder / "key").write_bytes(KEY)
    return write_manifest(folder / "manifest.tsv", rows)


def digests(manifest: Path, output: Path, changes: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Build; by shard the sha256 of its bytes, and that of the rows of its index."""
    if "anonymous_ids" in changes:
        changes = changes | {"anonymous_ids": str(manifest.parent / changes["anonymous_ids"])}
    build(manifest, output, **changes)
    return {
        f"{split}-{index}-of-{total}": {
            "records": records,
            "index": hashlib.sha256(dump_json(list(map(_older, rows)), sort_keys=True).encode()).hexdigest(),
        }
        for (split, index, total), (records, rows) in contents(output).items()
    }


def _older(row: dict[str, object]) -> dict[str, object]:
    """A row without what the format feature "positions" added, which tests/volume/test_label_map.py fixes."""
    return {name: cell for name, cell in row.items() if name != "mask_positions"}


def content_digests(output: Path) -> dict[str, str]:
    """By shard the sha256 of its bytes, decompressed."""
    shards = ((path.name, path.read_bytes()) for path in sorted(output.glob("*.tfrecord*")))
    return {
        name: hashlib.sha256(gzip.decompress(data) if name.endswith(".gz") else data).hexdigest()
        for name, data in shards
    }


def main() -> None:
    """Write builds.json."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, large = write_inputs(folder / "small"), write_inputs(folder / "large", LARGE_SHAPE)
        found = {
            what: digests(large if what.startswith(LARGE) else small, folder / what, changes)
            for what, changes in BUILDS.items()
        }
    GOLDEN.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
