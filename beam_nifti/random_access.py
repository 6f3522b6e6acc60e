"""Records by number, without TensorFlow and Beam. See docs/reading.md."""

from beam_nifti.read.random_access import Dataset

__all__ = ["Dataset"]
