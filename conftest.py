"""What every test run here shares, the doctests of the package among them."""

from __future__ import annotations

import importlib.util

# The reader is the one module that imports TensorFlow. Where that is not installed, its doctests
# cannot be collected; all the others still are.
collect_ignore = [] if importlib.util.find_spec("tensorflow") else ["beam_nifti/reader.py"]
