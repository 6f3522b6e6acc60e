"""Memory of one large volume: what is given up is given back (docs/large-volumes.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.images import Array, brain, random_voxels, write_image, write_manifest
from tests.peak import peak_mib

pytestmark = pytest.mark.slow

_RUN = """
import contextlib, io, sys
from beam_nifti.cli import main as cli
with contextlib.redirect_stdout(io.StringIO()):
    assert cli.main([*sys.argv[1:], "--workers=1", "--quiet"]) == 0
"""
SLACK_MIB = 24


def peak_of(folder: Path, voxels: Array, suffix: str, *options: str) -> float:
    """MiB that the build of a dataset of one image takes, at its peak."""
    write_image(folder / f"a{suffix}", voxels)
    manifest = write_manifest(folder / "m.tsv", [{"path": f"a{suffix}"}])
    return peak_mib(_RUN, "build", manifest, folder / "out", *options)


@pytest.mark.parametrize(
    ("dtype", "shape", "suffix", "options", "mib"),
    [
        ("int16", (256, 256, 256), ".nii", (), 2 * 64),
        ("int16", (256, 256, 256), ".nii.gz", ("--voxel-dtype=native",), 3 * 32),
        ("int32", (64, 64, 40, 100), ".nii", ("--frames=all", "--compression=none"), 2 * 62.5),
        ("float32", (64, 64, 40, 100), ".nii", ("--frames=all",), 2 * 62.5),
        ("float64", (256, 256, 128), ".nii", (), 2 * 64),
    ],
)
def test_a_build_holds_a_volume_twice(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], suffix: str, options: tuple[str, ...], mib: float
) -> None:
    # Noise does not compress: a packed file, or shard, is as large as its voxels.
    at_rest = peak_of(tmp_path / "small", brain(), ".nii", *options)
    assert (
        peak_of(tmp_path / "large", random_voxels(shape, dtype), suffix, *options) < at_rest + mib + SLACK_MIB
    )
