"""Records by their number, without TensorFlow and Beam: docs/reading.md."""

from beam_nifti.read.random_access import Dataset

__all__ = ["Dataset"]
