"""Build a dataset of CT volumes and classify them with a 3-D network, as Keras's example of CT scans does.

Usage: keras_ct.py MANIFEST DATASET [--size X,Y,Z] [--epochs N] [--batch-size N]

MANIFEST has the columns path, label (0 or 1) and split (train or validation).
"""

from __future__ import annotations

import argparse

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from scipy import ndimage

import beam_nifti as bn

ANGLES = (-20, -10, -5, 5, 10, 20)


def build(manifest: str, output: str, size: tuple[int, ...]) -> None:
    """Resample to one size, and map -1000 to 400 HU onto [0, 1]."""
    bn.build(manifest, output, resize=size, rescale=bn.Window(-1000, 400), clip=True, progress=False)


def rotate(volume: np.ndarray) -> np.ndarray:
    """Turn a volume in the axial plane by one of some angles, at random."""
    turned = ndimage.rotate(volume, np.random.choice(ANGLES), reshape=False)
    return np.clip(turned, 0, 1)


def augment(x: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return tf.ensure_shape(tf.numpy_function(rotate, [x], tf.float32), x.shape), y


def make_network(shape: tuple[int, ...]) -> keras.Model:
    network = keras.Sequential([keras.Input(shape)])
    for filters in (16, 32):
        network.add(layers.Conv3D(filters, 3, padding="same", activation="relu"))
        network.add(layers.MaxPool3D(2))
        network.add(layers.BatchNormalization(momentum=0.9))  # for epochs of a few steps
    network.add(layers.GlobalAveragePooling3D())
    network.add(layers.Dense(64, activation="relu"))
    network.add(layers.Dense(1, activation="sigmoid"))
    network.compile(keras.optimizers.Adam(3e-3), "binary_crossentropy", metrics=["accuracy"])
    return network


def main(arguments: list[str] | None = None) -> keras.callbacks.History:
    parser = argparse.ArgumentParser(description="Classify CT volumes with a 3-D network.")
    parser.add_argument("manifest")
    parser.add_argument("dataset", help="where the dataset is built")
    parser.add_argument("--size", type=lambda text: tuple(map(int, text.split(","))), default=(128, 128, 64))
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=2)
    options = parser.parse_args(arguments)

    build(options.manifest, options.dataset, options.size)
    keras.utils.set_random_seed(0)
    train = bn.load_dataset(options.dataset, "train", shuffle=True, seed=0)
    train = train.map(augment, num_parallel_calls=tf.data.AUTOTUNE).batch(options.batch_size).prefetch(2)
    validation = bn.load_dataset(options.dataset, "validation", batch_size=options.batch_size)
    network = make_network((*options.size, 1))
    # `train` is shuffled already; Keras's own shuffle is for arrays.
    return network.fit(train, validation_data=validation, epochs=options.epochs, shuffle=False, verbose=2)


if __name__ == "__main__":
    main()
