"""Examples that need TensorFlow; test_grain.py and test_pytorch.py run the others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import pages

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.tf
@pytest.mark.slow
def test_keras_learns_from_a_dataset() -> None:
    pytest.importorskip("tensorflow")
    done = subprocess.run(
        [sys.executable, EXAMPLES / "keras_training.py", "--epochs=8"],
        env=os.environ | {"KERAS_BACKEND": "tensorflow"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    losses = [float(loss) for loss in re.findall(r"val_loss: ([\d.]+)", done.stdout)]
    assert len(losses) == 8
    assert losses[-1] < 1  # the variance of the labels is 2


@pytest.mark.tf
@pytest.mark.slow
def test_the_notebook_ends_with_a_label_map_of_the_new_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorflow")
    monkeypatch.chdir(tmp_path)
    blocks = pages.read_notebook(EXAMPLES / "bids_to_prediction.ipynb")
    for block in blocks:
        pages.check_block(block)
    names, printed = pages.run_blocks(blocks)
    assert [block.text for block in blocks if block.language == "bash"] == ["beam-nifti init study"]
    assert "{'test': 3, 'train': 9} (0, 1)" in "".join(printed)
    assert names["dice"] > 0.9
    assert printed[-1] == f"Dice {names['dice']:.2f}\n"
    assert {"report.html", "sub-16_prediction.nii.gz"} <= {path.name for path in tmp_path.iterdir()}
