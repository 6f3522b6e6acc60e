"""Fit a small 3-D network of Flax to random patches of a dataset with masks, which Grain reads.

Usage: flax_training.py DATASET [--split "train[:80%]"] [--patch X,Y,Z] [--per-volume N] [--epochs N]
           [--batch-size N] [--workers N] [--checkpoint FILE] [--steps N]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import grain
import jax
import optax
from absl import flags
from flax import nnx, serialization

import beam_nifti as bn


class Network(nnx.Module):
    """Two convolutions; logits of each label, for every voxel."""

    def __init__(self, channels: int, labels: int, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(channels, 8, (3, 3, 3), rngs=rngs)
        self.last = nnx.Conv(8, labels, (3, 3, 3), rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        return self.last(nnx.relu(self.first(image)))


def make_loader(records: bn.Dataset, options: argparse.Namespace) -> grain.IterDataset:
    patches = bn.PatchDataset(records, bn.Patches(options.patch, options.per_volume, foreground=0.5), seed=0)
    # Every epoch has patches and an order of its own.
    epochs = [grain.MapDataset.source(patches.epoch(n)).seed(n).shuffle() for n in range(options.epochs)]
    batches = grain.MapDataset.concatenate(epochs).batch(options.batch_size, drop_remainder=True)
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return batches.to_iter_dataset(ahead).mp_prefetch(grain.MultiprocessingOptions(options.workers))


@nnx.jit
def fit(network: Network, optimizer: nnx.Optimizer, image: jax.Array, mask: jax.Array) -> jax.Array:
    def loss(network: Network) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(network(image), mask[..., 0]).mean()

    value, gradients = nnx.value_and_grad(loss)(network)
    optimizer.update(network, gradients)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit a small network of Flax to patches of a dataset.")
    parser.add_argument("dataset", help="folder or URL")
    parser.add_argument("--split", default="train")
    parser.add_argument("--patch", type=lambda text: tuple(map(int, text.split(","))), default=(16, 16, 16))
    parser.add_argument("--per-volume", type=int, default=4, help="patches of a volume in an epoch")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2, help="processes that read; 0 reads in this one")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="file to save to, and to continue from if it exists, with the same --workers",
    )
    parser.add_argument("--steps", type=int, help="stop after this many steps")
    options = parser.parse_args()
    flags.FLAGS([parser.prog])  # with JAX, Grain starts no worker before they are parsed

    records = bn.Dataset(options.dataset, options.split, columns=["image", "mask"])
    labels = max(bn.inspect(options.dataset)["mask_labels"]) + 1
    network = Network(records[0]["image"].shape[-1], labels, nnx.Rngs(0))
    optimizer = nnx.Optimizer(network, optax.adam(1e-2), wrt=nnx.Param)
    batches = iter(make_loader(records, options))
    saved = {"weights": nnx.to_pure_dict(nnx.state((network, optimizer))), "batches": "", "step": 0}
    if options.checkpoint and options.checkpoint.exists():
        saved = serialization.from_bytes(saved, options.checkpoint.read_bytes())
        state = nnx.state((network, optimizer))
        nnx.replace_by_pure_dict(state, saved["weights"])
        nnx.update((network, optimizer), state)
        batches.set_state(json.loads(saved["batches"]))
    for step, batch in enumerate(batches, saved["step"] + 1):
        print(f"step {step}: loss {fit(network, optimizer, batch['image'], batch['mask']):.5f}")
        if options.checkpoint:
            weights = nnx.to_pure_dict(nnx.state((network, optimizer)))
            saved = {"weights": weights, "batches": json.dumps(batches.get_state()), "step": step}
            options.checkpoint.with_suffix(".tmp").write_bytes(serialization.to_bytes(saved))
            options.checkpoint.with_suffix(".tmp").replace(options.checkpoint)
        if step == options.steps:
            break
    batches.close()


if __name__ == "__main__":
    main()
