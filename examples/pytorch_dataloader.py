"""Fit a small 3-D network to the labels of a dataset, which PyTorch's DataLoader reads record by record.

Usage: pytorch_dataloader.py DATASET [--split "train[:80%]"] [--where "age > 60"] [--epochs N]
           [--batch-size N] [--workers N] [--start-method fork|spawn]
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader

from beam_nifti.random_access import Dataset


def make_network(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(channels, 8, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(8, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit a small network to the labels of a dataset.")
    parser.add_argument("dataset", help="folder or URL")
    parser.add_argument("--split", default="train")
    parser.add_argument("--where", help="condition on columns of the index")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="processes that read; 0 reads in this one")
    parser.add_argument("--start-method", choices=("fork", "spawn"), default="spawn")
    options = parser.parse_args()

    torch.manual_seed(0)
    records = Dataset(
        options.dataset,
        options.split,
        where=options.where,
        columns=["image", "label", "id", "affine"],
        channels_first=True,
    )
    loader = DataLoader(
        records,
        batch_size=options.batch_size,
        shuffle=True,
        num_workers=options.workers,
        multiprocessing_context=options.start_method if options.workers else None,
        persistent_workers=options.workers > 0,
    )
    network = make_network(records[0]["image"].shape[0])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for epoch in range(options.epochs):
        total = 0.0
        ids = list[str]()
        for batch in loader:
            x = batch["image"]  # (B, C, X, Y, Z)
            loss = nn.functional.mse_loss(network(x)[:, 0], batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(x)
            ids += batch["id"]
        print(f"epoch {epoch}: {len(ids)} records, first {ids[0]}, mean squared error {total / len(ids):.4g}")


if __name__ == "__main__":
    main()
