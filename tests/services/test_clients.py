"""Libraries that train on a dataset: medicai, Keras's example of CT scans, and Flax with Grain.

scripts/check --services has an environment for them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

import beam_nifti as bn
from benchmarks.ct import prepare_original, write_cohort

REASON = "is not installed; scripts/check --services does it"
EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPE = (36, 34, 32)


@pytest.fixture(scope="module")
def lesions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of noise per participant, with an organ and a lesion, and their mask."""
    folder = tmp_path_factory.mktemp("lesions")
    random = np.random.default_rng(0)
    rows = []
    for number in range(5):
        centre = np.array(SHAPE) / 2 + random.uniform(-3, 3, 3)
        distance = np.linalg.norm(np.moveaxis(np.indices(SHAPE), 0, -1) - centre, axis=-1)
        mask = np.uint8(distance < 12) + np.uint8(distance < 5)
        row = {"participant_id": f"sub-{number}", "split": "train" if number < 4 else "test"}
        images = {"T1w": [100, 200, 400], "FLAIR": [300, 100, 200]}
        voxels = {name: random.normal(np.array(means)[mask], 30) for name, means in images.items()}
        for name, array in {**voxels, "mask": mask}.items():
            row[name] = str(folder / f"{number}_{name}.nii.gz")
            nibabel.Nifti1Image(array.astype(np.int16), np.eye(4)).to_filename(row[name])
        rows.append(row)
    options: dict[str, Any] = {"path_column": ("T1w", "FLAIR"), "mask_column": "mask", "rescale": "zscore"}
    bn.build(rows, folder / "dataset", **options, progress=False)
    return folder / "dataset"


@pytest.mark.timeout(1200, func_only=True)
def test_medicai_learns_from_patches_and_scores_whole_volumes(lesions: Path) -> None:
    pytest.importorskip("medicai", reason=f"medicai {REASON}")
    from examples.medicai_segmentation import main

    small = ["--patch=32,32,32", "--features=4", "--per-volume=3", "--batch-size=2", "--epochs=2"]
    assert main([str(lesions), *small]) > 0.3


def test_keras_s_example_of_ct_scans_learns_from_a_dataset(tmp_path: Path) -> None:
    pytest.importorskip("keras", reason=f"Keras {REASON}")
    from examples.keras_ct import main

    size = (16, 16, 8)
    manifest = write_cohort(tmp_path, 20, (40, 40, 16))
    history = main([str(manifest), str(tmp_path / "dataset"), "--size=16,16,8", "--epochs=25"])
    assert max(history.history["val_accuracy"]) == 1
    for record in bn.Dataset(tmp_path / "dataset", "validation", columns=["image", "id"]):
        original = prepare_original(tmp_path / f"{record['id'].removeprefix('sub-')}.nii.gz", size)
        assert record["image"].shape == (*size, 1)
        assert np.abs(record["image"][..., 0] - original).mean() < 0.05


def test_flax_goes_on_where_it_stopped(lesions: Path, tmp_path: Path) -> None:
    pytest.importorskip("flax", reason=f"Flax {REASON}")

    def run(*arguments: str) -> list[str]:
        command = [sys.executable, EXAMPLES / "flax_training.py", lesions, "--per-volume=2", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    checkpoint = f"--checkpoint={tmp_path / 'state.msgpack'}"
    first, rest = run(checkpoint, "--steps=1"), run(checkpoint)
    whole = run("--workers=0")
    assert (len(first), len(rest)) == (1, 3)
    assert first + rest == whole
    losses = [float(line.split()[-1]) for line in whole]
    assert losses[-1] < losses[0]
