"""Functions for --preprocess: what users' own do to volumes, and how they fail."""

from __future__ import annotations

import dataclasses
import errno
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from beam_nifti.volume import Volume


def change_all_in_place(volume: Volume) -> Volume:
    """Change every array of a volume."""
    volume.voxels[:] += 1
    volume.affine[:3, 3] += 1
    if volume.mask is not None:
        volume.mask[:] = 1 - volume.mask
    return volume


def scale(volume: Volume, by: Sequence[float] = (1,), name: str = "") -> Volume:
    """Multiply voxels by numbers."""
    return dataclasses.replace(volume, voxels=(volume.voxels * math.prod(by)).astype("float32"))


def fail_as_named(volume: Volume) -> Volume:
    """Fail as the name of the image says, and tell all that there is to know of it."""
    path = volume.row.path
    told = f"{path} {path.upper()} {path.split('/')[-2:]} {path!a}"
    for word, error in (
        ("raise", ValueError(told)),
        ("unparsable", OSError(told)),
        ("absent", FileNotFoundError(errno.ENOENT, told, path)),
        ("memory", MemoryError(told)),
        ("full", OSError(errno.ENOSPC, told, path)),
        ("late", TimeoutError(told)),
    ):
        if word in Path(path).name:
            raise error from KeyError(told)
    if "exit" in Path(path).name:
        sys.exit(0)
    return volume
