"""A function for `--preprocess` whose process dies once: in the midst of a build, at a certain volume."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # where the DAG is tested there is no Beam
    from beam_nifti.volume import Volume

MARKER = "BEAM_NIFTI_TEST_DIED"
"""The variable that names the file which says that it is over."""


def at_the_tenth(volume: Volume) -> Volume:
    """The volume itself; SIGKILL at the tenth one of a cohort, if it is the first time."""
    marker = Path(os.environ[MARKER])
    if volume.row.example_id == "sub-0009" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return volume
