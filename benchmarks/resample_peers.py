"""Resample one volume with beam_nifti, MONAI, TorchIO, SimpleITK and scikit-image; print a Markdown table.

The volume of make_cohort.py (91×109×91 int16 voxels of 2 mm) is in memory; CPU milliseconds of one thread,
the best of several runs. The peers' interpreter needs: monai, torchio, SimpleITK, scikit-image, torch.

Usage: resample_peers.py --peers PYTHON [--repeat N]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from prepare import DOWN, UP, cpu_ms, load, to_tilted, with_mask

from beam_nifti.volume import Volume
from beam_nifti.volume.grid import Grid, resize
from beam_nifti.volume.preprocess import resample, resize_to
from beam_nifti.volume.resample import Interpolation, resample_labels

PEERS = """
import json, sys, time, warnings
warnings.filterwarnings("ignore")
import numpy as np
import monai.transforms as mt
import SimpleITK as sitk
import torch
import torchio as tio
from monai.data import MetaTensor
from skimage.transform import resize
torch.set_num_threads(1)
sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
path, repeat = sys.argv[1], int(sys.argv[2])
given = np.load(path)
voxels, mask, affine, tilted = (given[name] for name in ("voxels", "mask", "affine", "tilted"))
UP, DOWN = given["up"].tolist(), given["down"].tolist()
tensor = MetaTensor(torch.from_numpy(voxels.astype(np.float32))[None], affine=affine)
image = tio.ScalarImage(tensor=torch.from_numpy(voxels)[None], affine=affine)
labels = tio.LabelMap(tensor=torch.from_numpy(mask)[None], affine=affine)
space = tio.ScalarImage(tensor=torch.zeros((1, *voxels.shape)), affine=tilted)
other = MetaTensor(torch.zeros((1, *voxels.shape)), affine=tilted)
itk = sitk.GetImageFromArray(voxels.astype(np.float32).T)
sizes = [n / m for n, m in zip(voxels.shape, UP)]
def by_itk(how):
    start = [(s - 1) / 2 for s in sizes]
    turn = np.eye(3).ravel().tolist()
    return lambda: sitk.Resample(itk, UP, sitk.Transform(), how, start, sizes, turn, 0.0)
def monai_spacing(mode, padding):
    return lambda: mt.Spacing((1.5,) * 3, mode=mode, padding_mode=padding)(tensor)
def monai_resize(shape, **options):
    return lambda: mt.Resize(shape, **options)(tensor)
def torchio(target, how):
    return lambda: tio.Resample(target, image_interpolation=how)(image)
def one_hot():
    made = np.zeros(UP, np.uint8)
    for label in np.unique(mask):
        made[resize((mask == label).astype(float), UP, 1, mode="edge", anti_aliasing=False) >= 0.5] = label
    return made
WORK = {
    "linear": {
        "MONAI Spacing": monai_spacing("bilinear", "border"),
        "MONAI Resize": monai_resize(UP, mode="trilinear"),
        "TorchIO": torchio(1.5, "linear"), "SimpleITK": by_itk(sitk.sitkLinear)},
    "cubic": {
        "MONAI Spacing": monai_spacing(3, "nearest"), "TorchIO": torchio(1.5, "bspline"),
        "SimpleITK": by_itk(sitk.sitkBSpline),
        "scikit-image": lambda: resize(voxels.astype(float), UP, 3, mode="edge", anti_aliasing=False)},
    "nearest": {
        "MONAI Spacing": monai_spacing("nearest", "border"), "MONAI Resize": monai_resize(UP, mode="nearest"),
        "TorchIO": torchio(1.5, "nearest"), "SimpleITK": by_itk(sitk.sitkNearestNeighbor)},
    "antialias": {
        "MONAI Resize": monai_resize(DOWN, mode="trilinear", anti_aliasing=True),
        "TorchIO": lambda: tio.Resample((2 * 91 / 46,) * 3, antialias=True)(image),
        "scikit-image": lambda: resize(voxels.astype(float), DOWN, 1, mode="edge", anti_aliasing=True)},
    "mask": {"scikit-image, as nnU-Net": one_hot},
    "tilted": {
        "MONAI ResampleToMatch": lambda: mt.ResampleToMatch(
            mode="bilinear", padding_mode="border")(tensor, other),
        "TorchIO": torchio(space, "linear")},
}
def cpu_ms(work):
    times = []
    for _ in range(repeat):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1e3 * min(times)
print(json.dumps({case: {name: cpu_ms(work) for name, work in each.items()} for case, each in WORK.items()}))
"""

Work = Callable[[Volume], Any]


def resample_mask(volume: Volume) -> Any:
    mask = with_mask(volume).mask
    assert mask is not None
    how = Interpolation(mask="linear")
    return resample_labels(mask, resize(Grid.of(mask.shape, volume.affine), UP), how)


CASES: dict[str, tuple[str, Work]] = {
    "linear": ("linear, to 1.5 mm", lambda volume: resample(volume, (1.5, 1.5, 1.5))),
    "cubic": ("cubic, to 1.5 mm", lambda volume: resample(volume, (1.5, 1.5, 1.5), Interpolation("cubic"))),
    "nearest": ("nearest, to 1.5 mm", lambda volume: resample(volume, (1.5,) * 3, Interpolation("nearest"))),
    "antialias": ("smoothed, to half", lambda volume: resize_to(volume, DOWN, Interpolation(antialias=True))),
    "mask": ("mask of 3 labels, linear, to 1.5 mm", resample_mask),
    "tilted": ("linear, to a grid turned by 10°", lambda volume: to_tilted(volume, 10)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers", metavar="PYTHON", required=True)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    volume = load()
    facts = {"voxels": volume.voxels, "mask": with_mask(volume).mask, "affine": volume.affine, "up": UP}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "volume.npz")
        np.savez(path, **facts, down=DOWN, tilted=to_tilted(volume, 10).affine)  # type: ignore[arg-type]
        command = [options.peers, "-c", PEERS, str(path), str(options.repeat)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    peers = json.loads(done.stdout.splitlines()[-1])
    print("| | beam_nifti | others |\n|---|---:|---|")
    for case, (title, work) in CASES.items():
        work(volume)
        others = ", ".join(
            f"{name} {spent:.1f}" for name, spent in sorted(peers[case].items(), key=lambda i: i[1])
        )
        print(f"| {title} | {cpu_ms(work, volume, options.repeat):.1f} | {others} |")


if __name__ == "__main__":
    main()
