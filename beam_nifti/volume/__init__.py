"""One example: the row of a manifest comes in, voxels as a record stores them go out.

For other folders: `volume` puts an example together and `preprocess` and `rescale` change it; `header`,
`grid` and `intensity` know what becomes of it beforehand. `formats`, `geometry`, `mask` and `voxels` are
for this folder alone. What users need is given here, and loaded when it is asked for, as most modules need
no nibabel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beam_nifti.volume.rescale import Scaling
    from beam_nifti.volume.volume import Volume, load_volume, rescale_volume

__all__ = ["Scaling", "Volume", "load_volume", "rescale_volume"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from beam_nifti.volume import rescale, volume

    return getattr(rescale if name == "Scaling" else volume, name)
