"""A dataset of format version 1 is read, checked and added to as what it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from beam_nifti.cli import main as cli
from beam_nifti.config import Columns
from beam_nifti.errors import DatasetError, UsageError
from beam_nifti.inspection.description import describe_record
from beam_nifti.inspection.diff import compare_datasets
from beam_nifti.inspection.extract import read_volume
from beam_nifti.random_access import Dataset
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.reporting.summary import read_failures
from tests.build_helpers import build as build_plainly
from tests.datasets import info_of, manifest_of, records_of, set_times
from tests.golden.make_version_1 import FOLDER
from tests.images import brain, write_image

GOLDEN = Path(__file__).parents[1] / "golden/version-1"
COLUMNS = Columns(path="T1w,T2w", mask="mask")
SHAPE = (4, 3, 2)
IDS = ["sub-0", "sub-1", "sub-2", "sub-4"]
FAILED = {"3-T1w.nii", "3-T2w.nii"}
"""The images of the example that fails every time."""

OLD_COLUMNS = {"source_size", "source_mtime"}
NEW_COLUMNS = {"source_sizes", "source_mtimes", "source_versions", "source_shape", "source_affine"}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder with the dataset, its images, and their manifest, which the test may change."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    set_times(tmp_path / "images")
    for name in ("dataset_info.json", "failures.jsonl"):
        path = tmp_path / "dataset" / name
        path.write_text(path.read_text().replace(FOLDER, str(tmp_path)))
    return tmp_path


@pytest.fixture
def dataset(study: Path) -> Path:
    return study / "dataset"


def build(study: Path, **changes: Any) -> frozenset[str]:
    """Build it again; the names of the images that were read."""
    columns = {"path": COLUMNS.path, "mask": COLUMNS.mask}
    options = {"examples_per_shard": 2, "max_bad_fraction": 0.5, "columns": columns} | changes
    read = build_plainly(study / "manifest.tsv", study / "dataset", **options).read
    return read - {"0-T1w.hdr", "0-T2w.nii", "0-mask.nii"}  # whose headers are looked at in any case


def columns_of(dataset: Path) -> set[str]:
    (columns,) = {tuple(pq.read_schema(dataset / s.index).names) for s in info_of(dataset).shards}
    return set(columns)


def append_row(study: Path) -> None:
    for number, kind in enumerate(("T1w", "T2w", "mask")):
        write_image(study / f"images/5-{kind}.nii", brain(SHAPE, seed=number) % 9)
    with (study / "manifest.tsv").open("a") as handle:
        cells = ["sub-5", *(f"images/5-{kind}.nii" for kind in ("T1w", "T2w", "mask")), "9", "A"]
        handle.write("\t".join(cells) + "\n")


def test_it_is_read(dataset: Path) -> None:
    info = info_of(dataset)
    assert (info.format_version, info.format_features, info.failures) == (1, (), "failures.jsonl")
    assert DatasetInfo.from_json(info.to_json(), "x") == info
    assert json.loads(info.to_json()).keys() == json.loads((dataset / "dataset_info.json").read_text()).keys()
    assert columns_of(dataset) & (OLD_COLUMNS | NEW_COLUMNS) == OLD_COLUMNS
    records = Dataset(dataset, columns=["id", "image", "mask", "source_size"])
    assert [record["id"] for record in records] == IDS
    voxels = brain(SHAPE, seed=2).astype(float)
    expected = ((voxels - voxels.min()) / (voxels.max() - voxels.min())).astype(np.float32)
    assert np.array_equal(records[2]["image"][..., 0], expected)
    assert records[0]["source_size"] == 352 + 48 + 400 + 376
    patch = records.patch(2, (1, 1, 0), (2, 1, 2))
    assert np.array_equal(patch["image"], records[2]["image"][1:3, 1:2, 0:2])
    assert patch["mask"].shape == (2, 1, 2, 1)
    for is_there in (False, True):
        records.save_nifti(2, records[2]["mask"], dataset.parent / "a.nii", overwrite=is_there)


def test_the_only_file_of_an_example_is_never_replaced(dataset: Path, tmp_path: Path) -> None:
    records, path = Dataset(dataset, columns=["mask", "source_size", "source_mtime"]), tmp_path / "a.nii"
    path.write_bytes(bytes(records[2]["source_size"]))  # the sum, which is the size of a single file
    os.utime(path, (records[2]["source_mtime"],) * 2)
    with pytest.raises(UsageError, match="the dataset was built from this file"):
        records.save_nifti(2, records[2]["mask"], path, overwrite=True)


def test_every_command_takes_it(dataset: Path, run: Callable[..., str]) -> None:
    assert run("verify", dataset, "--deep=all", "--manifest", manifest_of(dataset)).startswith("ok ")
    assert "format 1" in run("inspect", dataset)
    assert "2020-09-13" in run("inspect", dataset, "--record=sub-1")
    with pytest.raises(DatasetError, match="No such file"):
        describe_record(str(dataset), "sub-3")
    voxels = read_volume(str(dataset), "sub-1").voxels
    assert np.allclose(voxels[..., 0], brain(SHAPE, seed=1), atol=1e-3)
    assert cli.main(["card", str(dataset)]) == 0
    assert "No such file" in read_failures(str(dataset), info_of(dataset))[0]["message"]


def test_it_is_added_to_as_version_1(
    study: Path, dataset: Path, caplog: pytest.LogCaptureFixture, run: Callable[..., str]
) -> None:
    before = {s.name: s.sha256 for s in info_of(dataset).shards}
    append_row(study)
    assert build(study) == FAILED | {"5-T1w.nii", "5-T2w.nii", "5-mask.nii"}
    (warning,) = (r.getMessage() for r in caplog.records if r.name == "beam_nifti")
    assert "has format version 1" in warning
    assert "--recheck" in warning
    info = info_of(dataset)
    assert (info.format_version, info.num_examples, info.failures) == (1, 5, "failures.jsonl")
    assert set(before.items()) >= {(s.name, s.sha256) for s in info.shards[:2]}
    assert columns_of(dataset) & (OLD_COLUMNS | NEW_COLUMNS) == OLD_COLUMNS
    assert run("verify", dataset, "--deep=all", "--manifest", manifest_of(dataset)).startswith("ok ")


def test_what_its_sums_hide_is_found_by_recheck(study: Path, dataset: Path, run: Callable[..., str]) -> None:
    one, other = study / "images/1-T1w.nii", study / "images/1-T2w.nii"
    one.rename(study / "spare")
    other.rename(one)
    (study / "spare").rename(other)
    assert build(study) == FAILED
    assert "--recheck" in run("verify", dataset, "--deep=all", "--manifest", manifest_of(dataset), code=1)
    build(study, recheck=True)
    assert info_of(dataset).format_version == 1
    assert run("verify", dataset, "--deep=all", "--manifest", manifest_of(dataset)).startswith("ok ")


def test_overwrite_makes_it_the_present_version(study: Path, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "old")
    build(study, overwrite=True)
    assert info_of(dataset).format_version == 2
    assert columns_of(dataset) & (OLD_COLUMNS | NEW_COLUMNS) == NEW_COLUMNS
    # The records are the same, and what only one version keeps is no difference.
    assert [r for _, r in records_of(dataset)] == [r for _, r in records_of(tmp_path / "old")]
    assert compare_datasets(str(tmp_path / "old"), str(dataset)).is_empty
