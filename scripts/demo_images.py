"""Write a manifest of real images: those of one shape among what nilearn and nibabel install.

Usage: demo_images.py MANIFEST
"""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections import defaultdict
from pathlib import Path

import nibabel

# Where the packages keep images, relative to the package.
IMAGE_FOLDERS = (("nilearn", "datasets/data"), ("nibabel", "tests/data"))


def find_images() -> list[Path]:
    """Return every .nii and .nii.gz that the two packages install, in a stable order."""
    images: list[Path] = []
    for package, folder in IMAGE_FOLDERS:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            sys.exit(f"error: {package} is not installed; pip install {package}")
        images += sorted((Path(spec.origin).parent / folder).glob("*.nii*"))
    return images


def choose_largest_group(images: list[Path]) -> tuple[tuple[int, ...], list[Path]]:
    """Return the 3-D shape that most images have, and those images; print what is left out."""
    shapes = {path: tuple(nibabel.load(path).shape) for path in images}
    groups: dict[tuple[int, ...], list[Path]] = defaultdict(list)
    for path, shape in shapes.items():
        if len(shape) == 3:
            groups[shape].append(path)
    if not groups:
        sys.exit(f"error: none of {len(images)} images is 3-D")
    chosen = max(groups, key=lambda shape: (len(groups[shape]), shape))
    for path, shape in shapes.items():
        if shape != chosen:
            reason = "another shape" if len(shape) == 3 else "not 3-D"
            print(f"left out  {path.name:<48} {'×'.join(map(str, shape)):<14} {reason}")
    return chosen, groups[chosen]


def main(manifest: Path) -> None:
    """Write the manifest: an absolute path, a label and an id for each image."""
    shape, images = choose_largest_group(find_images())
    manifest.parent.mkdir(parents=True, exist_ok=True)
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["path", "label", "participant_id"])
        for label, path in enumerate(images):
            print(f"chosen    {path.name:<48} {'×'.join(map(str, shape)):<14} label {label}")
            writer.writerow([path, label, path.name.split(".")[0]])
    print(f"wrote {manifest}: {len(images)} images of shape {'×'.join(map(str, shape))}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
