"""Measure MONAI, TorchIO and Lightning on datasets, and on the .nii.gz by their own means; print a table.

24 volumes of make_cohort.py with a mask of three labels each. Every way runs in a process of its own, forked
when all is imported, with one thread and no workers, through two epochs in batches of 2. The first batch is
what constructing everything and reading one batch takes; items are counted in the second epoch, when caches
are full. Times are those of the CPU. The memory is the peak beyond that of the imports. Figures are medians
over the rounds.

The volumes of all ways are rescaled to [0, 1] and have the same values, which is checked. Patches are 4 of
64×64×64 per volume, half of them around labels, at places that each library draws.

The environment needs monai, torchio and lightning.

Usage: pytorch_libraries.py [--repeat N] [--cohort-dir DIR]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import monai.data
import nibabel
import numpy as np
import torch
import torchio as tio
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from make_cohort import AFFINE, load_anatomy, make_cohort
from monai import transforms
from read import ROOT, build
from torch.utils.data import DataLoader

sys.path.insert(0, str(ROOT))
import beam_nifti as bn
from examples.monai_segmentation import to_monai
from examples.torchio_queue import Subjects

COUNT = 24
BATCH = 2
PATCH = (64, 64, 64)
PER_VOLUME = 4
EPOCHS = 2
KEYS = ("image", "mask")


class Clock:
    """Takes note of each batch."""

    def __init__(self) -> None:
        self.ticks = [time.process_time()]
        self.total = 0.0

    def tick(self, images: Any) -> None:
        self.ticks.append(time.process_time())
        if len(self.ticks) <= COUNT // BATCH + 1:
            self.total += float(images.double().sum())

    def epochs(self, loader: Iterable[Any], image: Callable[[Any], Any]) -> None:
        for _ in range(EPOCHS):
            for batch in loader:
                self.tick(image(batch))


def pairs(folder: Path) -> list[dict[str, str]]:
    """The files of each image and its mask."""
    images = sorted((folder / "images").glob("*_T1w.nii.gz"))[:COUNT]
    return [{"image": str(p), "mask": str(folder / "masks" / p.name)} for p in images]


def records(folder: Path, kind: str = "gzip") -> Any:
    return bn.Dataset(folder / kind, columns=[*KEYS, "affine", "id"], channels_first=True)


def patches(folder: Path, kind: str = "gzip") -> Any:
    drawn = bn.Patches(PATCH, per_volume=PER_VOLUME, foreground=0.5)
    return bn.PatchDataset(records(folder, kind), drawn, seed=0)


def monai_own(folder: Path, clock: Clock, dataset: str = "Dataset", crop: bool = False) -> None:
    steps = [transforms.LoadImaged(KEYS, ensure_channel_first=True), transforms.ScaleIntensityd("image")]
    if crop:
        steps.append(transforms.RandCropByPosNegLabeld(KEYS, "mask", PATCH, num_samples=PER_VOLUME))
    options = {"progress": False} if dataset == "CacheDataset" else {}
    items = getattr(monai.data, dataset)(pairs(folder), transforms.Compose(steps), **options)
    batch = 1 if crop else BATCH  # of volumes, each with its patches
    clock.epochs(monai.data.DataLoader(items, batch_size=batch, shuffle=True), lambda b: b["image"])


def monai_ours(folder: Path, clock: Clock, source: Any) -> None:
    items = monai.data.Dataset(source, to_monai)
    clock.epochs(monai.data.DataLoader(items, batch_size=BATCH, shuffle=True), lambda b: b["image"])


def torchio(folder: Path, clock: Clock, subjects: Any, queue: bool = False) -> None:
    if queue:
        sampler = tio.LabelSampler(PATCH, "mask", {0: 1, 1: 1})
        subjects = tio.Queue(subjects, 12 * PER_VOLUME, PER_VOLUME, sampler)
    loader = tio.SubjectsLoader(subjects, batch_size=BATCH, shuffle=not queue)
    clock.epochs(loader, lambda b: b["image"][tio.DATA])


def torchio_own(folder: Path) -> Any:
    found = [
        tio.Subject(image=tio.ScalarImage(p["image"]), mask=tio.LabelMap(p["mask"])) for p in pairs(folder)
    ]
    return tio.SubjectsDataset(found, transform=tio.RescaleIntensity())


class Images:
    """The .nii.gz by nibabel; with `crop`, a random patch of each, half of them around a label."""

    def __init__(self, folder: Path, crop: bool) -> None:
        self._pairs, self._crop, self._random = pairs(folder), crop, np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self._pairs) * (PER_VOLUME if self._crop else 1)

    def __getitem__(self, number: int) -> dict[str, Any]:
        files = self._pairs[number // PER_VOLUME if self._crop else number]
        image, mask = (np.asanyarray(nibabel.load(files[key]).dataobj)[np.newaxis] for key in KEYS)
        image = (image - np.float32(image.min())) / np.float32(image.max() - image.min())
        if self._crop:
            spare = np.subtract(mask.shape[1:], PATCH)
            corner = self._random.integers(0, spare + 1)
            if number % 2:
                labelled = np.argwhere(mask[0])
                corner = np.clip(self._random.choice(labelled) - np.array(PATCH) // 2, 0, spare)
            box = (..., *(slice(a, a + b) for a, b in zip(corner, PATCH, strict=True)))
            image, mask = image[box].copy(), mask[box].copy()
        return {"image": image, "mask": mask}


def lightning(folder: Path, clock: Clock, source: Any) -> None:
    class Module(LightningModule):
        automatic_optimization = False

        def training_step(self, batch: Any, number: int) -> None:
            clock.tick(batch["image"])

        def configure_optimizers(self) -> None:
            return None

    class Data(LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(source, batch_size=BATCH, shuffle=True)

    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    Trainer(max_epochs=EPOCHS, **dict.fromkeys(quiet, False)).fit(Module(), Data())


Way = Callable[[Path, Clock], None]
WAYS: dict[str, tuple[str, str, Way]] = {
    "MONAI `LoadImaged`": ("MONAI", "volumes", monai_own),
    "MONAI, records": ("MONAI", "volumes", lambda f, c: monai_ours(f, c, records(f))),
    "TorchIO `SubjectsDataset`": ("TorchIO", "volumes", lambda f, c: torchio(f, c, torchio_own(f))),
    "TorchIO, records": ("TorchIO", "volumes", lambda f, c: torchio(f, c, Subjects(records(f)))),
    "Lightning, nibabel": ("Lightning", "volumes", lambda f, c: lightning(f, c, Images(f, crop=False))),
    "Lightning, records": ("Lightning", "volumes", lambda f, c: lightning(f, c, records(f))),
    "MONAI `LoadImaged`, `RandCropByPosNegLabeld`": (
        "MONAI",
        "patches",
        lambda f, c: monai_own(f, c, crop=True),
    ),
    "MONAI `CacheDataset`, `RandCropByPosNegLabeld`": (
        "MONAI",
        "patches",
        lambda f, c: monai_own(f, c, "CacheDataset", crop=True),
    ),
    "MONAI, `PatchDataset`": ("MONAI", "patches", lambda f, c: monai_ours(f, c, patches(f))),
    "MONAI, `PatchDataset`, uncompressed": (
        "MONAI",
        "patches",
        lambda f, c: monai_ours(f, c, patches(f, "none")),
    ),
    "TorchIO `Queue` of files": ("TorchIO", "patches", lambda f, c: torchio(f, c, torchio_own(f), True)),
    "TorchIO `Queue` of records": (
        "TorchIO",
        "patches",
        lambda f, c: torchio(f, c, Subjects(records(f)), True),
    ),
    "TorchIO, `PatchDataset`": ("TorchIO", "patches", lambda f, c: torchio(f, c, Subjects(patches(f)))),
    "Lightning, nibabel, cropped": (
        "Lightning",
        "patches",
        lambda f, c: lightning(f, c, Images(f, crop=True)),
    ),
    "Lightning, `PatchDataset`": ("Lightning", "patches", lambda f, c: lightning(f, c, patches(f))),
}


def memory(field: str) -> float:
    """A line of this process's status, in MB."""
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]) / 1024


def measure(way: str, folder: Path) -> dict[str, float]:
    """What one way takes, in this process."""
    _, unit, run = WAYS[way]
    torch.manual_seed(0)
    before, clock = memory("VmRSS"), Clock()
    run(folder, clock)
    count = COUNT * (PER_VOLUME if unit == "patches" else 1)
    steps = len(clock.ticks) - 1
    spent = clock.ticks[-1] - clock.ticks[steps // EPOCHS]
    return {
        "first": clock.ticks[1] - clock.ticks[0],
        "rate": count / spent,
        "peak": memory("VmHWM") - before,
        "total": clock.total,
    }


def make_data(images: Path, folder: Path) -> None:
    """The masks of the cohort, and its datasets."""
    manifest = make_cohort(COUNT, images)
    (folder / "masks").mkdir()
    (folder / "images").symlink_to(images.resolve())
    labels = np.digitize(load_anatomy(), [100, 250, 350]).astype(np.uint8)
    lines = []
    for number, line in enumerate(manifest.read_text().splitlines()[1:]):
        name = line.partition("\t")[0]
        nibabel.save(nibabel.Nifti1Image(np.roll(labels, number % 5, 0), AFFINE), folder / "masks" / name)
        lines.append(f"images/{name}\tmasks/{name}\tsub-{number:05d}\n")
    (folder / "manifest.tsv").write_text("path\tmask\tparticipant_id\n" + "".join(lines))
    for kind, flags in {"gzip": [], "none": ["--compression=none"]}.items():
        build("--mask-column=mask", *flags)(folder / "manifest.tsv", folder / kind)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure MONAI, TorchIO and Lightning on datasets.")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds; default: 3")
    parser.add_argument("--cohort-dir", type=Path, default=Path("/tmp/beam-nifti-cohort"), metavar="DIR")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_data(options.cohort_dir, folder)
        patches(folder)[0]  # imports what is imported late
        with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
            for _ in range(options.repeat):
                for way in WAYS:
                    found[way].append(pool.apply(measure, (way, folder)))
    totals = [rounds[0]["total"] for way, rounds in found.items() if WAYS[way][1] == "volumes"]
    if max(totals) > min(totals) * (1 + 1e-6):
        sys.exit(f"error: the voxels of volumes differ: their sums are {totals}")
    libraries = ("torch", "monai", "torchio", "lightning")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries), end="\n\n")
    print("| | unit | first batch, ms | a second | times | peak MB |\n|---|---|---:|---:|---:|---:|")
    base: dict[tuple[str, str], float] = {}
    for way, rounds in found.items():
        first, rate, peak = (statistics.median(r[key] for r in rounds) for key in ("first", "rate", "peak"))
        times = rate / base.setdefault(WAYS[way][:2], rate)
        unit = WAYS[way][1]
        print(f"| {way} | {unit} | {1e3 * first:.0f} | {rate:.1f} | {times:.1f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
