"""`beam-nifti check --voxels`: what the voxels of a cohort tell before anything is built."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import beam_nifti as bn
from beam_nifti.cli import main as cli
from beam_nifti.config import FAR, LEAST_COMPARED
from beam_nifti.pipeline.voxel_survey import CohortFacts, Comparison, ImageFacts
from tests.build_helpers import build
from tests.images import Array, brain, write_image, write_manifest

SHAPE = (6, 5, 4)
SOUND = 22
ZOOMS = np.diag([2.0, 2.0, 2.5, 1.0])
Check = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Check:
    """Run the command: `check(manifest, *flags)` -> exit code, report."""

    def run(manifest: Path, *flags: str) -> tuple[int, dict[str, Any]]:
        code = cli.main(["check", str(manifest), "--json", "--quiet", "--voxels", *flags])
        return code, json.loads(capsys.readouterr().out)

    return run


def mask_of(*labels: int) -> Array:
    return np.resize(np.array([0, *labels], np.uint8), SHAPE)


def row(
    folder: Path, name: str, voxels: Array, mask: Array | None = None, affine: Array = ZOOMS
) -> dict[str, str]:
    write_image(folder / f"{name}.nii", voxels, affine=affine)
    write_image(folder / f"{name}-mask.nii", mask_of(1, 2) if mask is None else mask, affine=affine)
    return {"participant_id": name, "path": f"{name}.nii", "mask": f"{name}-mask.nii"}


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Sound images, and one of each kind that is not."""
    rows = [row(tmp_path, f"sub-{i:02}", brain(seed=i)) for i in range(SOUND)]
    with_nan = brain().astype(np.float32)
    with_nan[0, 0, 0] = np.nan
    rows += [
        row(tmp_path, "bright", brain() * 9),
        row(tmp_path, "coarse", brain(), affine=ZOOMS * [3, 3, 3, 1]),
        row(tmp_path, "equal", np.full(SHAPE, 7, np.int16)),
        row(tmp_path, "nan", with_nan),
        row(tmp_path, "cut", brain()),
        row(tmp_path, "empty", brain(seed=50), mask_of()),
        row(tmp_path, "odd", brain(seed=51), mask_of(1, 77)),
    ]
    cut = tmp_path / "cut.nii"
    cut.write_bytes(cut.read_bytes()[:-9])
    return write_manifest(tmp_path / "m.tsv", rows)


def named(report: dict[str, Any]) -> dict[str, list[str]]:
    """The examples of each finding."""
    return {key: [image["example_id"] for image in of["images"]] for key, of in report["notes"].items()}


def test_what_voxels_show_is_reported(cohort: Path, check: Check) -> None:
    code, report = check(cohort, "--mask-column=mask")
    assert (code, report["voxels"], report["num_images"]) == (1, True, SOUND + 7)
    problems = {problem["example_id"]: problem["message"] for problem in report["problems"]}
    assert problems.keys() == {"equal", "nan", "cut"}
    assert "all voxels are 7" in problems["equal"]
    assert "1 of 120 voxels are NaN or infinite" in problems["nan"]
    assert (report["num_bad"], report["num_failed"], report["num_examples"]) == (3, 3, SOUND + 4)
    assert named(report) == {
        "unusual-intensity": ["bright"],
        "unusual-size": ["coarse"],
        "unusual-spacing": ["coarse"],
        "empty-mask": ["empty"],
        "rare-label": ["odd"],
    }
    assert report["notes"]["rare-label"]["images"] == [
        {"row": 29, "example_id": "odd", "message": "77 (in 1 mask)"}
    ]
    (spacing,) = report["notes"]["unusual-spacing"]["images"]
    assert spacing["message"].split("; ")[2] == "inferior-superior 7.5 mm (middle half of all: 2.5 to 2.5)"
    survey = bn.check(cohort, voxels=True, mask_column="mask", max_bad_fraction=0.11, progress=False)
    assert survey.ok
    assert "accepts" not in str(survey)
    refused = bn.check(cohort, voxels=True, mask_column="mask", progress=False)
    assert not refused.ok
    assert f"{'':14}max_bad_fraction=0.11 accepts them" in str(refused)
    table = str(survey)
    assert "would fail    row 25 (equal): " in table
    assert "row 29 (odd): 77 (in 1 mask)" in table


def test_nothing_is_unusual_in_few_volumes_or_in_those_that_are_alike(tmp_path: Path, check: Check) -> None:
    few = [row(tmp_path, f"sub-{i}", brain(seed=i) * (9 if i == 1 else 1), mask_of(i)) for i in range(1, 4)]
    code, report = check(write_manifest(tmp_path / "few.tsv", few), "--mask-column=mask")
    assert (code, report["notes"], report["num_examples"]) == (0, {}, 3)
    assert report["not_compared"] == "no image is called unusual: 3 images are too few, 20 are required"
    survey = bn.check(tmp_path / "few.tsv", voxels=True, progress=False)
    assert f"not compared  {report['not_compared']}" in str(survey)
    assert "not_compared" not in bn.check(tmp_path / "few.tsv", progress=False)


def test_targets_are_compared_too(tmp_path: Path, check: Check) -> None:
    """A dose in other units, and one that is empty, among sound ones."""
    rows = []
    for i in range(SOUND):
        factor = {3: 100, 5: 0}.get(i, 1)
        write_image(tmp_path / f"dose-{i}.nii", (brain(seed=i) * factor).astype(np.float32), affine=ZOOMS)
        rows.append(row(tmp_path, f"sub-{i:02}", brain(seed=i)) | {"dose": f"dose-{i}.nii"})
    manifest = write_manifest(tmp_path / "m.tsv", rows)
    code, report = check(manifest, "--target-column=dose")
    assert (code, "not_compared" in report) == (0, False)
    assert named(report)["constant-target"] == ["sub-05"]
    assert "sub-03" in named(report)["unusual-target"]
    assert "unusual-intensity" not in report["notes"]
    assert report["notes"]["constant-target"]["images"][0]["message"] == "0"


def test_voxels_are_those_that_a_build_prepares(tmp_path: Path, check: Check) -> None:
    """Options have the effect that they have on a build, also those that headers do not depend on."""
    with_nan = brain().astype(np.float32)
    with_nan[0] = np.inf
    rows = [row(tmp_path, "equal", np.full(SHAPE, 7, np.int16)), row(tmp_path, "inf", with_nan)]
    manifest = write_manifest(tmp_path / "m.tsv", rows)
    code, report = check(manifest, "--rescale=none", "--nonfinite=min", "--crop-foreground=above:3")
    assert code == 0
    assert named(report) == {"constant": ["equal"], "nonfinite": ["inf"]}
    assert report["notes"]["nonfinite"]["images"][0]["message"] == "20 voxels"
    assert "?" not in report["records"]
    _, report = check(manifest, "--nonfinite=min", "--rescale-within=above:30000")
    assert report["num_bad"] == 2
    assert "no voxel is above 30000" in report["problems"][1]["message"]


def test_frames_fail_one_by_one_as_in_a_build(tmp_path: Path, check: Check) -> None:
    runs = [brain((*SHAPE, 3), seed=i) for i in range(2)]
    runs[1][..., 1] = 4
    for number, voxels in enumerate(runs):
        write_image(tmp_path / f"{number}.nii", voxels)
    manifest = write_manifest(tmp_path / "m.tsv", [{"path": "0.nii"}, {"path": "1.nii"}])
    code, report = check(manifest, "--frames=each")
    assert (code, report["num_bad"], report["num_failed"], report["num_examples"]) == (1, 1, 1, 5)
    assert check(manifest, "--frames=each", "--max-bad-fraction=0.17")[0] == 0
    summary = build(manifest, tmp_path / "out", frames="each", max_bad_fraction=0.17).summary
    assert (summary.num_failed, summary.num_written) == (1, 5)


VALUES = st.lists(st.floats(1, 100, width=32), min_size=LEAST_COMPARED, max_size=40)


@settings(max_examples=30)
@given(VALUES, st.lists(st.integers(0, 40), max_size=3), st.floats(-200, 400))
def test_far_is_what_quartiles_say_in_any_grouping(
    values: list[float], cuts: list[int], value: float
) -> None:
    measure = ("unusual-intensity", "")
    images = [ImageFacts(i + 1, str(i), ((str(i), measure, v),), (1,)) for i, v in enumerate(values)]
    total, ends = CohortFacts(), sorted([0, *cuts, len(images)])
    for start, end in itertools.pairwise(ends):
        total.add(CohortFacts.of(images[start:end]))
    low, high = np.percentile(values, [25, 75])
    edges = low - FAR * (high - low), high + FAR * (high - low)
    error = (abs(low) + abs(high)) * (2 * FAR + 1) * 2.0**-12
    if high - low <= error or min(abs(value - edge) for edge in edges) <= error:
        return  # percentiles are counted in bins
    found = Comparison.of(total).findings(ImageFacts(0, "x", (("x", measure, value),), None))
    assert bool(found) == (not edges[0] <= value <= edges[1])


@settings(max_examples=30)
@given(st.lists(st.sets(st.integers(1, 6)), max_size=130))
def test_a_rare_label_is_in_one_of_a_hundred_masks(masks: list[set[int]]) -> None:
    total = CohortFacts.of(
        [ImageFacts(n, str(n), (), tuple(sorted(labels))) for n, labels in enumerate(masks)]
    )
    labelled = sum(map(bool, masks))
    comparison = Comparison.of(total)
    for label in range(1, 7):
        count = sum(label in labels for labels in masks)
        is_rare = labelled >= LEAST_COMPARED and 0 < count <= max(1, labelled / 100)
        found = comparison.findings(ImageFacts(0, "x", (), (label,)))
        assert bool(found and count) == is_rare
