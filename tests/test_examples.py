"""Examples that need TensorFlow; test_grain.py and test_pytorch.py run the others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
