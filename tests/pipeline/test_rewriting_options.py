"""Relabelling, withdrawal and preparation where images differ in their frames, masks and finite voxels."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import beam_nifti as bn
from beam_nifti.config import Columns
from tests.build_helpers import build, contents
from tests.datasets import info_of
from tests.images import random_voxels, write_image, write_manifest

GRID = (6, 5, 4)
LENGTHS = (7, 3, 9, 4, 6)
CASES: dict[str, dict[str, Any]] = {
    "frames": {"frames": "each", "max_frames": 9},
    "clips": {"frames": "each:3", "max_frames": 11},
    "masks": {
        "frames": "first",
        "columns": Columns(mask="lesion", missing_mask="empty", label="label"),
        "map_labels": "2=1",
        "nonfinite": "zero",
    },
    "masked": {
        "frames": "mean",
        "columns": Columns(mask="lesion", missing_mask="skip", label="label"),
        "nonfinite": "min",
    },
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, of which one is no image, one has a constant frame and only the others have masks."""
    folder = tmp_path_factory.mktemp("study")
    for i, length in enumerate(LENGTHS):
        voxels = random_voxels((*GRID, length), "float32", seed=i)
        if i == 2:
            voxels[..., 3:6] = 7
        write_image(folder / f"{i}.nii.gz", voxels)
        write_image(folder / f"{i}_lesion.nii.gz", np.random.default_rng(i).integers(0, 3, GRID, np.uint8))
    (folder / "3.nii.gz").write_bytes(b"no image")
    return manifest_of(folder, "m.tsv")


def manifest_of(folder: Path, name: str, *, without: int | None = None, factor: int = 1) -> Path:
    rows = [
        {
            "participant_id": f"sub-{i}",
            "path": f"{i}.nii.gz",
            "lesion": f"{i}_lesion.nii.gz" if i in (1, 3, 4) else "n/a",
            "label": factor * i,
        }
        for i in range(len(LENGTHS))
        if i != without
    ]
    return write_manifest(folder / name, rows)


def build_case(manifest: Path, output: Path, case: str) -> Path:
    build(manifest, output, **{"max_bad_fraction": 0.9, "examples_per_shard": 6, **CASES[case]})
    return output


@pytest.mark.parametrize("case", CASES)
def test_a_relabelled_dataset_is_that_of_the_manifest(study: Path, tmp_path: Path, case: str) -> None:
    output, other = (
        build_case(study, tmp_path / "out", case),
        manifest_of(study.parent, "other.tsv", factor=3),
    )
    fresh = build_case(other, tmp_path / "fresh", case)
    info = bn.relabel(output, other, progress=False)
    assert contents(output) == contents(fresh)
    assert (info.config, info.manifest) == (info_of(fresh).config, info_of(fresh).manifest)
    assert (output / str(info.failures)).read_bytes() == (fresh / "failures.jsonl").read_bytes()
    assert bn.verify(output, manifest=other, deep="all")


@pytest.mark.parametrize("gone", ["sub-1", "sub-2", "sub-3"])
@pytest.mark.parametrize("case", ["frames", "clips", "masks"])
def test_a_dataset_after_a_withdrawal_is_that_of_the_others(
    study: Path, tmp_path: Path, case: str, gone: str
) -> None:
    output, rest = (
        build_case(study, tmp_path / "out", case),
        manifest_of(study.parent, "rest.tsv", without=int(gone[-1])),
    )
    fresh = build_case(rest, tmp_path / "fresh", case)
    before = Path(shutil.copytree(output, tmp_path / "before"))
    bn.withdraw(output, gone, manifest=study, progress=False)
    ids = [set(bn.Dataset(each).ids) for each in (output, fresh)]
    assert ids[0] == ids[1]
    withdrawal = info_of(output).withdrawals[0]
    assert withdrawal.num_failures == info_of(before).num_failures - info_of(output).num_failures
    assert info_of(output).num_failures == info_of(fresh).num_failures
    assert bn.verify(output, deep=0)


def test_a_clip_and_a_frame_of_a_new_image_are_prepared_as_records(study: Path, tmp_path: Path) -> None:
    for case, frame in (("frames", 4), ("clips", 3)):
        output = build_case(study, tmp_path / case, case)
        record = next(r for r in bn.Dataset(output) if r["id"] == f"sub-0_frame-{frame:04d}")
        prepared = bn.Preparation.of(output).apply(study.parent / "0.nii.gz", frame=frame)
        assert np.array_equal(prepared.image, record["image"])
    with pytest.raises(bn.errors.UsageError, match="frame is 4; clips of 3 begin with multiples of that"):
        bn.Preparation.of(output).apply(study.parent / "0.nii.gz", frame=4)
    with pytest.raises(bn.errors.VolumeError, match="no frames 6 to 8: number of frames is 7; choose others"):
        bn.Preparation.of(output).apply(study.parent / "0.nii.gz", frame=6)


def test_statistics_of_the_cohort_are_those_of_the_clips(study: Path, tmp_path: Path) -> None:
    """They do not depend on how the frames of an image are cut, if no frame is left over."""
    folder = tmp_path / "c"
    rows = []
    for i, length in enumerate((6, 3, 9)):
        write_image(folder / f"{i}.nii.gz", random_voxels((*GRID, length), seed=i))
        rows.append({"path": f"{i}.nii.gz"})
    manifest = write_manifest(folder / "m.tsv", rows)
    clips, frames = (
        bn.analyze(manifest, frames=each, max_frames=9, progress=False).statistics
        for each in ("each:3", "each")
    )
    assert clips.channels[0].mean == frames.channels[0].mean
    assert clips.channels[0].std == frames.channels[0].std
