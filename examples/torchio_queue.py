"""Train a network on patches from a queue of TorchIO, which a dataset fills, and label whole records.

The dataset has masks (`beam-nifti build --mask-column`) and the splits "train" and "test". Prints the share
of correct voxels in each record of "test", and saves the labels on the grid of the record's source.

Usage: torchio_queue.py DATASET OUTPUT [--patch N] [--epochs N] [--batch-size N] [--workers N]
"""

import argparse
from pathlib import Path

import torch
import torchio as tio
from torch import nn

import beam_nifti as bn


class Subjects(tio.SubjectsDataset):
    """The records of a dataset, or its patches, as subjects: each is read when it is needed."""

    def __init__(self, records: bn.Dataset | bn.PatchDataset, transform: tio.Transform | None = None) -> None:
        self.records = records
        self.set_transform(transform)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> tio.Subject:
        record = self.records[number]
        image = tio.ScalarImage(tensor=record["image"], affine=record["affine"])
        mask = tio.LabelMap(tensor=record["mask"], affine=record["affine"])
        subject = tio.Subject(image=image, mask=mask, id=record["id"])
        return self._transform(subject) if self._transform else subject

    def dry_iter(self) -> range:
        return range(len(self))  # the queue counts subjects, and must not read them for that


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a network on patches from a queue of TorchIO.")
    parser.add_argument("dataset", help="folder or URL")
    parser.add_argument("output", type=Path, help="folder for the labels")
    parser.add_argument("--patch", type=int, default=96, help="voxels along each axis, a multiple of 4")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2, help="processes that read; 0 reads in this one")
    options = parser.parse_args()

    torch.manual_seed(0)
    both = {"columns": ["image", "mask", "affine", "id"], "channels_first": True}
    train, test = (bn.Dataset(options.dataset, split, **both) for split in ("train", "test"))
    subjects = Subjects(train, tio.Compose([tio.RandomFlip(), tio.RandomNoise(std=(0, 0.05))]))
    queue = tio.Queue(subjects, 64, 4, tio.LabelSampler(options.patch, "mask"), num_workers=options.workers)
    channels, labels = train[0]["image"].shape[0], max(train.info.mask_labels) + 1
    network = nn.Sequential(nn.Conv3d(channels, 16, 5, padding=2), nn.ReLU(), nn.Conv3d(16, labels, 1))
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(options.epochs):
        for batch in tio.SubjectsLoader(queue, batch_size=options.batch_size):
            scores = network(batch["image"][tio.DATA])
            loss = nn.functional.cross_entropy(scores, batch["mask"][tio.DATA][:, 0].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    options.output.mkdir(parents=True, exist_ok=True)
    for number, subject in enumerate(Subjects(test)):
        grid = tio.GridSampler(subject, options.patch, options.patch // 2)
        aggregator = tio.GridAggregator(grid, "hann")
        for batch in tio.SubjectsLoader(grid, batch_size=options.batch_size):
            with torch.inference_mode():
                aggregator.add_batch(network(batch["image"][tio.DATA]), batch[tio.LOCATION])
        found = aggregator.get_output_tensor().argmax(0)
        print(f"{subject.id}: {(found == subject.mask.data[0]).float().mean():.3f}")
        path = options.output / f"{subject.id.replace('/', '_')}.nii.gz"
        test.save_nifti(number, found, path, on_source_grid=True, overwrite=True)


if __name__ == "__main__":
    main()
