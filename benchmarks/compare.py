"""Load and prepare the same volumes with beam_nifti, MONAI, TorchIO and nobrainer; print Markdown tables.

Twelve .nii.gz volumes of 91×109×91 int16 voxels, made as those of make_cohort.py are. Each contender runs
in an interpreter of its own, with one thread, after two volumes that do not count; CPU is the process's.
The interpreters need: monai, torchio and torch; nobrainer 1.2.1 with its TensorFlow.

Usage: compare.py [--peers PYTHON] [--nobrainer PYTHON]
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
from make_cohort import load_anatomy, scan

COUNT = 12
SHAPE = (112, 132, 112)
SPACING = 1.5

_MEASURE = """
import json, resource, sys
import numpy as np
def cpu():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
def measure(work, paths, out):
    for path in paths[:2]:
        result = work(path)
    start = cpu()
    for path in paths:
        result = work(path)
    spent = (cpu() - start) / len(paths)
    voxels, affine = result
    np.savez(out, voxels=np.asarray(voxels, np.float32), affine=np.asarray(affine, float))
    print(json.dumps(1e3 * spent))
case, out, *paths = sys.argv[1:]
"""

OURS = """
import sys
sys.path.insert(0, {root!r})
from beam_nifti.config import RecordConfig
from beam_nifti.manifest import VolumeRow
from beam_nifti.volume.preprocess import prepare_volume
from beam_nifti.volume import load_volume, rescale_volume
prepared = {{"spacing": ({spacing},) * 3, "shape": {shape}}} if case == "spacing" else {{}}
config = RecordConfig(orientation=None if case == "load" else "RAS", **prepared)
def work(path):
    volume = load_volume(VolumeRow(1, "a", path), record=config)
    if config.prepares:
        volume = prepare_volume(volume, config, release=True)
    volume = rescale_volume(volume, config)
    return volume.voxels, volume.affine
measure(work, paths, out)
"""

MONAI = """
import torch
torch.set_num_threads(1)
from monai.transforms import Compose, LoadImage, Orientation, ResizeWithPadOrCrop, ScaleIntensity, Spacing
steps = [LoadImage(image_only=True, ensure_channel_first=True)]
if case != "load":
    steps.append(Orientation("RAS", labels=None))
if case == "spacing":
    steps.append(Spacing(({spacing},) * 3, mode="bilinear", padding_mode="border"))
    steps.append(ResizeWithPadOrCrop({shape}, mode="minimum"))
transform = Compose([*steps, ScaleIntensity()])
def work(path):
    image = transform(path)
    return image[0].numpy(), image.affine
measure(work, paths, out)
"""

TORCHIO = """
import torch
torch.set_num_threads(1)
import torchio as tio
steps = []
if case != "load":
    steps.append(tio.ToCanonical())
if case == "spacing":
    steps += [tio.Resample({spacing}), tio.CropOrPad({shape}, padding_mode="minimum")]
transform = tio.Compose([*steps, tio.RescaleIntensity((0, 1))])
def work(path):
    image = transform(tio.ScalarImage(path))
    return image.data[0].numpy(), image.affine
measure(work, paths, out)
"""

WRITE_OURS = """
import sys, tempfile
sys.path.insert(0, {root!r})
from pathlib import Path
from beam_nifti.config import RecordConfig
from beam_nifti.record.example import encode_volume
from beam_nifti.manifest import VolumeRow
from beam_nifti.record.tiles import encode_record
from beam_nifti.volume import load_volume, rescale_volume
def write(paths):
    with tempfile.TemporaryFile() as handle:
        for path in paths:
            volume = rescale_volume(load_volume(VolumeRow(1, "a", path)), RecordConfig())
            example = encode_volume(volume)
            handle.writelines(encode_record(example, 2).pieces)
write(paths[:2])
start = cpu()
write(paths)
print(json.dumps(1e3 * (cpu() - start) / len(paths)))
"""

WRITE_NOBRAINER = """
import tempfile
import nobrainer.tfrecord
def write(paths):
    with tempfile.TemporaryDirectory() as folder:
        pairs = [(path, 0) for path in paths]
        nobrainer.tfrecord.write(pairs, folder + "/{{shard}}.tfrec", len(pairs), processes=1, verbose=0)
write(paths[:2])
start = cpu()
write(paths)
print(json.dumps(1e3 * (cpu() - start) / len(paths)))
"""

CASES = {
    "load": "load, minmax",
    "turn": "load, RAS, minmax",
    "spacing": "load, RAS, 1.5 mm, crop and pad, minmax",
}


def run(python: str, script: str, *arguments: str) -> float:
    """CPU milliseconds per volume."""
    names = {"root": str(Path(__file__).parent.parent), "spacing": SPACING, "shape": SHAPE}
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-W", "ignore", "-c", _MEASURE + script.format(**names), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{python}:\n{done.stderr[-3000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def ramp_error(voxels: np.ndarray, affine: np.ndarray, ramp: np.ndarray) -> float:
    """Largest distance, in millimetres, between the position that a value states and that of the affine.

    Edges, where padding and cropping show, are left out; scale and offset of the values are fitted.
    """
    inner = tuple(slice(n // 4, -(n // 4)) for n in voxels.shape)
    places = np.stack(np.meshgrid(*map(np.arange, voxels.shape), indexing="ij"), -1)[inner] @ affine[:3, :3].T
    heights = (places + affine[:3, 3]) @ ramp
    values = voxels[inner].ravel()
    design = np.stack([values, np.ones_like(values)], 1)
    fitted = design @ np.linalg.lstsq(design, heights.ravel(), rcond=None)[0]
    return float(np.abs(fitted - heights.ravel()).max() / np.linalg.norm(ramp))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare with MONAI, TorchIO and nobrainer.")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter with monai and torchio")
    parser.add_argument("--nobrainer", metavar="PYTHON", help="interpreter with nobrainer 1.2.1")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, anatomy, paths = Path(scratch), load_anatomy(), []
        affine = np.diag([-2.0, 2.0, 2.0, 1.0])
        affine[:3, 3] = 90, -126, -72
        for number in range(COUNT):
            paths.append(str(folder / f"{number}.nii.gz"))
            voxels = np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(scan(anatomy, number))).dataobj)
            nib.save(nib.Nifti1Image(voxels, affine), paths[-1])
        ramp = np.array([1.0, 0.7, -0.4])
        places = np.stack(np.meshgrid(*map(np.arange, (91, 109, 91)), indexing="ij"), -1)
        heights = (places @ affine[:3, :3].T + affine[:3, 3]) @ ramp
        nib.save(nib.Nifti1Image(heights.astype(np.float32), affine), folder / "ramp.nii")

        if options.peers:
            print("| | beam_nifti | MONAI | TorchIO | largest difference of values |")
            print("|---|---:|---:|---:|---|")
            contenders = {"ours": (sys.executable, OURS), "monai": (options.peers, MONAI)}
            contenders["torchio"] = (options.peers, TORCHIO)
            for case, title in CASES.items():
                spent, results = [], {}
                for name, (python, script) in contenders.items():
                    out = str(folder / f"{name}.npz")
                    spent.append(f"{run(python, script, case, out, *paths):.1f}")
                    if case == "spacing":
                        run(python, script, case, out, str(folder / "ramp.nii"))
                    results[name] = np.load(out)
                if case == "spacing":
                    errors = [ramp_error(r["voxels"], r["affine"], ramp) for r in results.values()]
                    told = "of a ramp from its affine: " + ", ".join(f"{e:.4f}" for e in errors) + " mm"
                else:
                    ours = results["ours"]["voxels"]
                    told = " ".join(
                        f"{np.abs(results[n]['voxels'] - ours).max():.1e}" for n in ("monai", "torchio")
                    )
                print(f"| {title} | {' | '.join(spent)} | {told} |", flush=True)
        if options.nobrainer:
            ours = run(sys.executable, WRITE_OURS, "write", "", *paths)
            theirs = run(options.nobrainer, WRITE_NOBRAINER, "write", "", *paths)
            print("\n| write GZIP TFRecords | CPU ms per volume |\n|---|---:|")
            print(f"| beam_nifti | {ours:.1f} |\n| nobrainer 1.2.1 | {theirs:.1f} |")


if __name__ == "__main__":
    main()
