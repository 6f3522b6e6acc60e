"""Records by number, without TensorFlow and Beam. See docs/reading.md."""

from beam_nifti.read.grid import PatchGrid
from beam_nifti.read.random_access import Dataset
from beam_nifti.read.sampling import PatchDataset, Patches

__all__ = ["Dataset", "PatchDataset", "PatchGrid", "Patches"]
