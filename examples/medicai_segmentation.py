"""Train medicai's SwinUNETR on random patches of a dataset with masks; score whole volumes of another split.

Usage: medicai_segmentation.py DATASET [--split train] [--test-split test] [--patch X,Y,Z] [--per-volume N]
           [--epochs N] [--batch-size N] [--features N]
"""

from __future__ import annotations

import argparse

import keras
import tensorflow as tf
from medicai.losses import SparseDiceCELoss
from medicai.metrics import SparseDiceMetric
from medicai.models import SwinBackbone, SwinUNETR
from medicai.transforms import Compose, RandomFlip, RandomShiftIntensity
from medicai.utils import SlidingWindowInference

import beam_nifti as bn

AUGMENT = Compose(
    [
        *(RandomFlip(keys=["image", "label"], spatial_axis=[axis], prob=0.5) for axis in range(3)),
        RandomShiftIntensity(keys=["image"], offset=0.1, prob=1.0),
    ]
)


def augment(sample: dict[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """The image and the mask of a patch, through transforms that take dictionaries."""
    data = AUGMENT({"image": sample["image"], "label": sample["mask"]}, {"affine": sample["affine"]})
    return data["image"], data["label"]


def make_network(shape: tuple[int, ...], labels: int, features: int) -> keras.Model:
    encoder = SwinBackbone(
        input_shape=shape,
        embed_dim=features,
        window_size=4,
        patch_size=2,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
        downsampling_strategy="swin_unetr_like",
    )
    network = SwinUNETR(encoder=encoder, num_classes=labels, feature_size=features)
    loss = SparseDiceCELoss(from_logits=True, num_classes=labels)
    # On a CPU, XLA takes minutes to compile the network.
    network.compile(
        keras.optimizers.AdamW(3e-3), loss, jit_compile=bool(tf.config.list_physical_devices("GPU"))
    )
    return network


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description="Train medicai's SwinUNETR on patches of a dataset.")
    parser.add_argument("dataset", help="folder or URL")
    parser.add_argument("--split", default="train")
    parser.add_argument("--test-split", default="test")
    parser.add_argument("--patch", type=lambda text: tuple(map(int, text.split(","))), default=(96, 96, 96))
    parser.add_argument("--per-volume", type=int, default=1, help="patches of a volume in an epoch")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--features", type=int, default=48)
    options = parser.parse_args(arguments)

    keras.utils.set_random_seed(101)
    found = bn.Patches(options.patch, options.per_volume, foreground=0.5)
    columns = ["image", "mask", "affine"]
    train = bn.load_dataset(
        options.dataset, options.split, as_dict=True, columns=columns, patches=found, shuffle=True, seed=0
    )
    train = train.map(augment, num_parallel_calls=tf.data.AUTOTUNE)
    train = train.batch(options.batch_size, drop_remainder=True).prefetch(2)
    labels = max(bn.inspect(options.dataset)["mask_labels"]) + 1
    network = make_network(train.element_spec[0].shape[1:], labels, options.features)
    network.fit(train, epochs=options.epochs, shuffle=False, verbose=2)

    infer = SlidingWindowInference(
        network, labels, options.patch, sw_batch_size=4, overlap=0.5, mode="gaussian"
    )
    dice = SparseDiceMetric(from_logits=True, num_classes=labels, ignore_class_ids=[0])
    for x, y in bn.load_dataset(options.dataset, options.test_split, target="mask", batch_size=1):
        dice.update_state(tf.cast(y, tf.float32), infer(x))  # medicai multiplies labels by probabilities
    print(f"Dice {float(dice.result()):.2f}")
    return float(dice.result())


if __name__ == "__main__":
    main()
