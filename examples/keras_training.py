"""Fit a small 3-D convolutional network with Keras to a dataset that this builds first.

The cohort is made up: 24 volumes of noise, each with a bright ball whose radius, in voxels, is the label.

Usage: keras_training.py [FOLDER] [--epochs N]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import keras
import nibabel
import numpy as np

from beam_nifti.cli import main as cli
from beam_nifti.reader import load_dataset

SHAPE = (16, 16, 16)
COUNT = 24
BATCH = 4


def write_cohort(folder: Path) -> Path:
    """The images of the cohort and its manifest, whose path is returned."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    radii = random.permutation(np.linspace(2, 7, COUNT)).round(1)
    distance = np.linalg.norm(np.indices(SHAPE) - 7.5, axis=0)
    lines = ["path\tlabel\tparticipant_id\tsplit"]
    for number, radius in enumerate(radii):
        voxels = random.normal(100, 10, SHAPE) + 300 * (distance < radius)
        image = nibabel.Nifti1Image(voxels.astype(np.int16), np.eye(4))
        image.to_filename(folder / f"{number:02d}.nii.gz")
        split = "validation" if number % 4 == 0 else "train"
        lines.append(f"{number:02d}.nii.gz\t{radius}\tsub-{number:02d}\t{split}")
    manifest = folder / "manifest.tsv"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def make_network(shape: tuple[int, ...]) -> keras.Model:
    network = keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Conv3D(8, kernel_size=3, strides=2, activation="relu"),
            keras.layers.Conv3D(16, kernel_size=3, activation="relu"),
            keras.layers.GlobalAveragePooling3D(),
            keras.layers.Dense(1),
        ]
    )
    network.compile(optimizer=keras.optimizers.Adam(3e-2), loss="mse")
    return network


def train(folder: Path, epochs: int) -> None:
    dataset = str(folder / "dataset")
    status = cli.main(["build", str(write_cohort(folder / "images")), dataset, "--quiet"])
    if status:
        raise SystemExit(status)
    keras.utils.set_random_seed(0)
    training = load_dataset(dataset, "train", batch_size=BATCH, shuffle=True, seed=0)
    validation = load_dataset(dataset, "validation", batch_size=BATCH)
    network = make_network(training.element_spec[0].shape[1:])
    # Keras's own shuffle is for arrays.
    network.fit(training, validation_data=validation, epochs=epochs, shuffle=False, verbose=2)
    for x, y in validation.take(1):
        for radius, found in zip(y.numpy(), network.predict_on_batch(x)[:, 0], strict=True):
            print(f"radius {radius:.1f}, predicted {found:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit a small 3-D network to a dataset made up here.")
    parser.add_argument(
        "folder", nargs="?", type=Path, help="keeps the cohort and the dataset; default: a temporary folder"
    )
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    if options.folder:
        train(options.folder, options.epochs)
        return
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder), options.epochs)


if __name__ == "__main__":
    main()
