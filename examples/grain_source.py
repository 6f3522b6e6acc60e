"""Fit a linear model to the labels of a dataset that Grain reads; a stopped run continues where it was.

Usage: grain_source.py DATASET [--split "train[:80%]"] [--where "age > 60"] [--epochs N] [--batch-size N]
           [--workers N] [--host I/N] [--checkpoint FILE] [--steps N]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import grain
import numpy as np

from beam_nifti.random_access import Dataset


def parse_host(text: str) -> tuple[int, int]:
    host, _, count = text.partition("/")
    return int(host), int(count)


def make_loader(records: Dataset, options: argparse.Namespace) -> grain.IterDataset:
    host, num_hosts = options.host
    order = grain.MapDataset.source(records).seed(0).shuffle()  # another order in every epoch
    batches = order[host::num_hosts].batch(options.batch_size).repeat(options.epochs)
    # By default each worker reads 500 elements ahead, which are batches of volumes here.
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    workers = grain.MultiprocessingOptions(num_workers=options.workers)
    return batches.to_iter_dataset(ahead).mp_prefetch(workers)


def fit(weights: np.ndarray, batch: dict[str, Any]) -> tuple[np.ndarray, float]:
    """A step of normalised least mean squares; `jax.jit` of a step of Optax goes here."""
    x = batch["image"].reshape(len(batch["id"]), -1)
    x = np.c_[x, np.ones(len(x))]
    error = batch["label"] - x @ weights
    return weights + x.T @ error / np.square(x).sum(), float(np.square(error).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit a linear model to the labels of a dataset.")
    parser.add_argument("dataset", help="folder or URL")
    parser.add_argument("--split", default="train")
    parser.add_argument("--where", help="condition on columns of the index")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="processes that read; 0 reads in this one")
    parser.add_argument(
        "--host", type=parse_host, default=(0, 1), metavar="I/N", help="this is host I, from 0, of N"
    )
    parser.add_argument("--checkpoint", type=Path, help="file to save to, and to continue from if it exists")
    parser.add_argument("--steps", type=int, help="stop after this many steps")
    options = parser.parse_args()

    records = Dataset(options.dataset, options.split, where=options.where, columns=["image", "label", "id"])
    weights = np.zeros(records[0]["image"].size + 1)
    batches, step = iter(make_loader(records, options)), 0
    if options.checkpoint and options.checkpoint.exists():
        saved = json.loads(options.checkpoint.read_text())
        step, weights = saved["step"], np.array(saved["weights"])
        batches.set_state(saved["batches"])
    for batch in batches:
        weights, error = fit(weights, batch)
        step += 1
        print(f"step {step}: {', '.join(batch['id'])}: mean squared error {error:.4g}")
        if options.checkpoint:
            # Weights and place in the data belong together: one file, which is replaced as a whole.
            saved = {"step": step, "weights": weights.tolist(), "batches": batches.get_state()}
            unfinished = options.checkpoint.with_suffix(".tmp")
            unfinished.write_text(json.dumps(saved))
            unfinished.replace(options.checkpoint)
        if step == options.steps:
            break
    batches.close()


if __name__ == "__main__":
    main()
