"""The table of the cohort. Input: a file, or folders of images. Output: rows with labels and splits.

For other folders: `manifest`, `reading`, `tables`, `in_memory`, `labels`, `discovery`, `msd`, `recognition`,
`joining`, `image_names`, `pseudonyms` and `redaction`. Users import the names below from here; each is loaded
on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beam_nifti.manifest.manifest import Manifest, VolumeRow
    from beam_nifti.manifest.reading import read_manifest

__all__ = ["Manifest", "VolumeRow", "read_manifest"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from beam_nifti.manifest import manifest, reading

    return getattr(reading if name == "read_manifest" else manifest, name)
