"""Make a cohort of T1-like volumes: N .nii.gz of int16, 91×109×91 voxels of 2 mm, and a manifest.

The anatomy is the ICBM152 template that nilearn installs. Each subject has a gain and Rician noise
of its own, seeded by its number, so that the files compress as scans do. Images that are there
already are kept; a smaller cohort is the beginning of a larger one.

Usage: make_cohort.py N DIRECTORY
"""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt
from isal import igzip

TEMPLATE = "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
CROP = (slice(7, 189, 2), slice(8, 226, 2), slice(3, 185, 2))  # 1 mm to 91×109×91 of 2 mm
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
INTENSITY = 4.0
NOISE = 12.0


def load_anatomy(crop: tuple[slice, ...] = CROP) -> npt.NDArray[np.float64]:
    spec = importlib.util.find_spec("nilearn")  # its import would cost seconds and is not needed
    if spec is None or spec.origin is None:
        sys.exit("error: the anatomy comes from nilearn; pip install 'beam-nifti[test]'")
    image = nibabel.load(Path(spec.origin).parent / TEMPLATE)
    return INTENSITY * np.asanyarray(image.dataobj)[crop].astype(np.float64)


def scan(anatomy: npt.NDArray[np.float64], subject: int) -> bytes:
    """One subject's image, as the bytes of its .nii.gz file."""
    random = np.random.default_rng(subject)
    signal = anatomy * random.normal(1.0, 0.1)
    real, imaginary = random.normal(0.0, NOISE, (2, *anatomy.shape))
    voxels = np.hypot(signal + real, imaginary).astype(np.int16)
    return igzip.compress(nibabel.Nifti1Image(voxels, AFFINE).to_bytes(), 2)


def make_cohort(size: int, folder: Path) -> Path:
    """Make what is missing of a cohort; the path of its manifest."""
    manifest = folder / f"manifest-{size}.tsv"
    if manifest.exists():
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    anatomy = load_anatomy()
    rows = []
    for subject in range(size):
        image = folder / f"sub-{subject:05d}_T1w.nii.gz"
        if not image.exists():
            unfinished = image.with_suffix(".tmp")
            unfinished.write_bytes(scan(anatomy, subject))
            unfinished.rename(image)
        rows.append((image.name, 20 + subject % 60, f"sub-{subject:05d}"))
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["path", "label", "participant_id"])
        writer.writerows(rows)
    return manifest


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(make_cohort(int(sys.argv[1]), Path(sys.argv[2])))
