"""Train a network of MONAI on patches of a dataset, and label whole records by sliding windows.

The dataset has masks (`beam-nifti build --mask-column`) and the splits "train" and "test". Prints the Dice
coefficient of each label in "test", and saves the labels of each of its records as a NIfTI image with the
shape and the affine of the record's source.

Usage: monai_segmentation.py DATASET OUTPUT [--patch N] [--epochs N] [--batch-size N] [--workers N]
"""

import argparse
from pathlib import Path
from typing import Any

import nibabel
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from monai.transforms import AsDiscrete, Compose, RandFlipd, RandGaussianNoised
from monai.utils import set_determinism

import beam_nifti as bn

COLUMNS = ["image", "mask", "affine", "id"]


def to_monai(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose volumes carry their affine through the transforms of MONAI."""
    volumes = {key: MetaTensor(record[key], affine=record["affine"]) for key in ("image", "mask")}
    return {"id": record["id"], **volumes}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a network of MONAI on patches of a dataset.")
    parser.add_argument("dataset", help="folder or URL")
    parser.add_argument("output", type=Path, help="folder for the labels")
    parser.add_argument("--patch", type=int, default=96, help="voxels along each axis, a multiple of 4")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2, help="processes that read; 0 reads in this one")
    options = parser.parse_args()

    set_determinism(0)
    train = bn.Dataset(options.dataset, "train", columns=COLUMNS, channels_first=True)
    test = bn.Dataset(options.dataset, "test", columns=COLUMNS, channels_first=True)
    shape = (options.patch,) * 3
    patches = bn.PatchDataset(train, bn.Patches(shape, per_volume=4, foreground=0.5), seed=0)
    augment = [RandFlipd(["image", "mask"], 0.5, spatial_axis=0), RandGaussianNoised("image", std=0.05)]
    num_labels = max(train.info.mask_labels) + 1
    network = UNet(3, train[0]["image"].shape[0], num_labels, (8, 16, 32), (2, 2), num_res_units=1)
    compute_loss = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for epoch in range(options.epochs):
        items = Dataset(patches.epoch(epoch), Compose([to_monai, *augment]))
        for batch in DataLoader(
            items, batch_size=options.batch_size, num_workers=options.workers, shuffle=True
        ):
            loss = compute_loss(network(batch["image"]), batch["mask"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    options.output.mkdir(parents=True, exist_ok=True)
    network.eval()
    dice = DiceMetric(include_background=False, reduction="mean_batch")
    to_labels, split_labels = AsDiscrete(argmax=True, to_onehot=num_labels), AsDiscrete(to_onehot=num_labels)
    for batch in DataLoader(Dataset(test, to_monai), batch_size=1, num_workers=options.workers):
        with torch.inference_mode():
            scores = sliding_window_inference(batch["image"], shape, options.batch_size, network, overlap=0.5)
        for item, found in zip(decollate_batch(batch), decollate_batch(scores.softmax(1)), strict=True):
            dice([to_labels(found)], [split_labels(item["mask"])])
            labels = bn.restore(found, (test, item["id"]), argmax=True)
            nibabel.save(labels, options.output / f"{item['id'].replace('/', '_')}.nii.gz")
    print("Dice of each label:", *(f"{score:.2f}" for score in dice.aggregate().tolist()))


if __name__ == "__main__":
    main()
