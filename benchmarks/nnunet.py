"""Prepare the same cases with beam_nifti and with nnU-Net's own code; print Markdown tables.

Ten synthetic cases of one image and one label map, of different shapes and voxel sizes, some anisotropic, are
resampled to one voxel size as nnU-Net does it: images by splines of order 3, label maps by their largest
share, and both by nearest neighbours along the axis of thick slices. nnU-Net stretches each image so that its
field of view stays; `--resize` to the same shape does that, `--spacing` keeps the exact voxel size instead.
The statistics of labelled voxels are those before resampling; nnU-Net draws a sample of them.

Each side runs in an interpreter of its own, with one thread, after a case that does not count; CPU is the
process's. The other interpreter needs nnunetv2 and its dependencies.

Usage: nnunet.py PYTHON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

SPACING = (1.2, 1.2, 1.5)
CASES = (
    *(((180, 180, 120), (1.0, 1.0, 1.0)), ((150, 160, 140), (1.5, 1.5, 1.5))),
    *(((256, 256, 40), (0.8, 0.8, 5.0)), ((200, 220, 36), (0.9, 0.9, 4.5))),
    *(((160, 160, 100), (1.3, 1.3, 2.0)), ((192, 192, 90), (0.9, 0.9, 1.8))),
    *(((220, 200, 50), (0.7, 0.7, 3.5)), ((140, 150, 130), (1.1, 1.2, 1.3))),
    *(((170, 170, 60), (1.0, 1.0, 3.0)), ((176, 160, 110), (1.2, 1.0, 1.4))),
)

_CPU = """
import json, resource, sys
import numpy as np
def cpu():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
folder, *rest = sys.argv[1:]
cases = json.load(open(folder + "/cases.json"))
def run(work):
    work(*cases[0])
    start = cpu()
    for number, case in enumerate(cases):
        np.savez(f"{folder}/{rest[0]}{number}.npz", *work(*case))
    return cpu() - start
"""

OURS = """
sys.path.insert(0, rest[1])
from beam_nifti.config import RecordConfig
from beam_nifti.manifest import VolumeRow
from beam_nifti.volume import load_volume
from beam_nifti.volume.preprocess import prepare_volume
def work(image, mask, shape):
    given = {"spacing": tuple(json.loads(rest[2]))} if rest[0] == "spacing" else {"resize": tuple(shape)}
    config = RecordConfig(
        mask_dtype="uint8", interpolation="cubic", mask_interpolation="linear", separate_z="auto", **given
    )
    row = VolumeRow(1, "a", image, other_files=(mask,))
    made = prepare_volume(load_volume(row, record=config), config, release=True)
    return made.voxels, made.mask
print(run(work))
"""

NNUNET = """
import torch
torch.set_num_threads(1)
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
spacing = json.loads(rest[2])
def work(image, mask, shape):
    io = SimpleITKIO()
    data, facts = io.read_images([image])
    labels, _ = io.read_seg(mask)
    sizes = shape[::-1], facts["spacing"], spacing[::-1]
    plan = {"order_z": 0, "force_separate_z": None}
    data = resample_data_or_seg_to_shape(data.astype(np.float32), *sizes, is_seg=False, order=3, **plan)
    labels = resample_data_or_seg_to_shape(labels, *sizes, is_seg=True, order=1, **plan)
    return np.asarray(data)[0].T, np.asarray(labels)[0].T
print(run(work))
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
values = []
start = cpu()
for image, mask, _ in cases:
    found = DatasetFingerprintExtractor.analyze_case([image], mask, SimpleITKIO, int(10e7 / len(cases)))
    values.append(found[2][0])
values = np.concatenate(values)
percentiles = np.percentile(values, [0.5, 99.5]).tolist()
print(json.dumps([values.mean().item(), values.std().item(), *percentiles, cpu() - start]))
"""


def write_cases(folder: Path) -> None:
    """A smooth background with noise, an organ and a lesion in each image, all of it above 0."""
    rng, cases = np.random.default_rng(0), []
    for number, (shape, zooms) in enumerate(CASES):
        places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) * zooms
        extent = np.array(shape) * zooms
        distance = [
            np.linalg.norm((places - extent * share) / radii, axis=-1)
            for share, radii in ((0.5, extent / 4), (0.62, extent / 14))
        ]
        labels = np.select([distance[1] < 1, distance[0] < 1], [2, 1]).astype(np.uint8)
        values = 400 + 60 * np.sin(places[..., 0] / 20) + 220 * (labels == 1) + 420 * (labels == 2)
        voxels = np.clip(values + rng.normal(0, 25, shape), 1, 4000).astype(np.int16)
        paths = [str(folder / f"{name}{number}.nii.gz") for name in ("image", "mask")]
        for path, content in zip(paths, (voxels, labels), strict=True):
            nib.save(nib.Nifti1Image(content, np.diag([*zooms, 1.0])), path)
        cases.append([*paths, [round(n * z / s) for n, z, s in zip(shape, zooms, SPACING, strict=True)]])
    (folder / "cases.json").write_text(json.dumps(cases))


def run(python: str, script: str, folder: Path, name: str) -> list[str]:
    """The lines that a side prints."""
    done = subprocess.run(
        [
            *(python, "-W", "ignore", "-c", _CPU + script, str(folder), name),
            *(str(Path(__file__).parent.parent), json.dumps(SPACING)),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        sys.exit(f"{python}:\n{done.stderr[-3000:]}")
    return done.stdout.splitlines()


def compare(folder: Path, name: str) -> str:
    """The differences of one of our sides from nnU-Net's, relative to the intensities' standard deviation."""
    largest, mean, agreeing, is_same = 0.0, 0.0, 1.0, True
    for number in range(len(CASES)):
        (ours, labels), (theirs, their_labels) = (
            np.load(folder / f"{side}{number}.npz").values() for side in (name, "nnunet")
        )
        is_same &= ours.shape == theirs.shape
        apart = np.abs(ours - theirs) / theirs.std()
        largest, mean = max(largest, float(apart.max())), max(mean, float(apart.mean()))
        agreeing = min(agreeing, float(np.mean(labels == their_labels)))
    return f"{'yes' if is_same else 'no'} | {largest:.1e} | {mean:.1e} | {agreeing:.5%}"


def main() -> None:
    """Print the tables."""
    (python,) = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_cases(folder)
        theirs = run(python, NNUNET, folder, "nnunet")
        print(
            "| | CPU s, 10 cases | same shapes | largest difference, sd | largest mean, sd | equal labels |"
        )
        print("|---|---:|---|---:|---:|---:|")
        for name in ("resize", "spacing"):
            spent = float(run(sys.executable, OURS, folder, name)[-1])
            print(f"| beam_nifti, `--{name}` | {spent:.1f} | {compare(folder, name)} |")
        print(f"| nnU-Net | {float(theirs[0]):.1f} | | | | |\n")
        mean, std, low, high, spent = json.loads(theirs[-1])
        print("| labelled voxels | mean | sd | 0.5 % | 99.5 % | CPU s |\n|---|---:|---:|---:|---:|---:|")
        measured = measure(folder)
        print(f"| beam_nifti | {' | '.join(f'{n:.3f}' for n in measured[:4])} | {measured[4]:.1f} |")
        print(f"| nnU-Net | {mean:.3f} | {std:.3f} | {low:.3f} | {high:.3f} | {spent:.1f} |")


def measure(folder: Path) -> list[float]:
    """Mean, sd and percentiles of the labelled voxels, by `beam_nifti.analyze`, and its CPU seconds."""
    script = """
sys.path.insert(0, rest[1])
import beam_nifti as bn
rows = [{"path": image, "mask": mask} for image, mask, _ in cases]
start = cpu()
found = bn.analyze(rows, mask_column="mask", rescale_within="mask", allow_mixed_shapes=True, workers=1,
    progress=False, rescale="cohort:percentile:0.5,99.5")
(channel,) = found.statistics.channels
values = dict(channel.percentiles)
print(json.dumps([channel.mean, channel.std, values[0.5], values[99.5], cpu() - start]))
"""
    found: list[float] = json.loads(run(sys.executable, script, folder, "analyze")[-1])
    return found


if __name__ == "__main__":
    main()
