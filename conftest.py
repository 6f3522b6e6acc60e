"""What every test run here shares, the doctests of the package among them."""

from __future__ import annotations

import importlib.util
import os

# PyTorch's threads spin while they wait, and take the cores from the other workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The readers are what imports TensorFlow. Where that is not installed, their doctests cannot be collected;
# all the others still are.
_READERS = ["reader", "read/reader", "read/columns", "read/indexed", "read/layouts", "read/sequential"]
_WITHOUT_TENSORFLOW = (
    [] if importlib.util.find_spec("tensorflow") else [f"beam_nifti/{name}.py" for name in _READERS]
)
# Scripts that make golden files want the libraries whose files they are.
collect_ignore_glob = ["tests/golden/*.py", *_WITHOUT_TENSORFLOW]
