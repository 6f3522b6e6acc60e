"""One example. Input: a row of the manifest. Output: voxels as a record stores them.

For other folders: `volume` assembles an example; `preprocess` and `rescale` change it; `header`, `grid` and
`intensity` determine the result without the voxels; `cohort` measures many examples. `files`, `compression`,
`label_map`, `target`, `user_function`, `notes`, `nifti_writer` and `restoring` serve other folders too.
`formats`, `geometry`, `mask` and `voxels` are private to this folder. Users import the names below from here;
each is loaded on first use, because most modules do not require nibabel.
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
