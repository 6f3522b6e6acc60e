"""New images as a network needs them, and its predictions on the images' own grids.

See docs/cookbook/inference.md.
"""

from beam_nifti.inspection.preparation import Preparation, PreparedVolume
from beam_nifti.inspection.restoring import restore

__all__ = ["Preparation", "PreparedVolume", "restore"]
