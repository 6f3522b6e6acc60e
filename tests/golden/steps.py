"""A function for --preprocess. Its file's sha256 is in the datasets that it makes: leave it as it is."""

from __future__ import annotations

from dataclasses import replace

from beam_nifti.volume import Volume


def double(volume: Volume) -> Volume:
    """Twice the intensities."""
    return replace(volume, voxels=2 * volume.voxels)
