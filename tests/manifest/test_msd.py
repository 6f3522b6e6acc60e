"""Manifests of datasets of the Medical Segmentation Decathlon and of nnU-Net."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beam_nifti.cli import main as cli
from beam_nifti.record.dataset_info import read_info
from tests.datasets import index_rows
from tests.images import brain, write_image
from tests.manifest.test_discovery import error_of, rows_of, touch

Capture = pytest.CaptureFixture[str]


def describe(root: Path, **content: Any) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(content))


def decathlon(root: Path, **changes: Any) -> Path:
    """Two training cases and a test case, with the files of macOS that its archives have."""
    training = [{"image": f"./imagesTr/la_{i}.nii.gz", "label": f"./labelsTr/la_{i}.nii.gz"} for i in (3, 1)]
    content: dict[str, Any] = {
        "name": "LeftAtrium",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "left atrium"},
        "numTraining": 2,
        "numTest": 1,
        "training": training,
        "test": ["./imagesTs/la_2.nii.gz"],
    }
    describe(root, **content | changes)
    for folder, numbers in (("imagesTr", (1, 3)), ("labelsTr", (1, 3)), ("imagesTs", (2,))):
        touch(root, *(f"{folder}/{mac}la_{i}.nii.gz" for i in numbers for mac in ("", "._")))
    return root


NNUNET: Mapping[str, Any] = {
    "channel_names": {"0": "T1w", "1": "FLAIR"},
    "labels": {"background": 0, "whole tumour": [1, 2], "core": 2},
    "regions_class_order": [1, 2],
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


def nnunet(root: Path, **changes: Any) -> Path:
    """Two training cases and a test case of two channels."""
    describe(root, **{**NNUNET, **changes})
    for i in ("a", "b"):
        touch(root, *(f"imagesTr/{i}_000{c}.nii.gz" for c in (0, 1)), f"labelsTr/{i}.nii.gz")
    touch(root, *(f"imagesTs/c_000{c}.nii.gz" for c in (0, 1)), "imagesTr/._a_0000.nii.gz")
    return root


def test_the_cases_of_the_decathlon(tmp_path: Path, capsys: Capture) -> None:
    root = decathlon(tmp_path / "Task02_Heart")
    rows, notes = rows_of(capsys, "msd", str(root))
    assert rows == [
        {
            "case_id": f"la_{i}",
            "split": split,
            "path": f"{root}/images{part}/la_{i}.nii.gz",
            "mask": f"{root}/labels{part}/la_{i}.nii.gz" if part == "Tr" else "",
        }
        for i, split, part in ((1, "train", "Tr"), (3, "train", "Tr"), (2, "test", "Ts"))
    ]
    assert notes == [
        "labels of the masks: 0 background, 1 left atrium",
        "build the manifest with --id-column case_id --mask-column mask",
        "1 case of test without a mask: build with --missing-mask empty or skip, or list the training cases "
        "alone with --only train",
    ]
    rows, _ = rows_of(capsys, "msd", str(root), "--only=test")
    assert [row["case_id"] for row in rows] == ["la_2"]
    assert "mask" not in rows[0]


def test_one_file_of_several_channels(tmp_path: Path, capsys: Capture) -> None:
    root = decathlon(tmp_path, modality={"0": "FLAIR", "1": "T1w"})
    rows, notes = rows_of(capsys, "msd", str(root))
    assert "path" in rows[0]
    assert "the channels of an image are FLAIR, T1w, according to dataset.json" in notes
    assert "build the manifest with --id-column case_id --mask-column mask --frames all" in notes


def test_the_channels_of_nnunet_are_columns(tmp_path: Path, capsys: Capture) -> None:
    root = nnunet(tmp_path)
    touch(root, "labelsTs/c.nii.gz", "imagesTr/readme.txt", "labelsTr/z.nii.gz")
    rows, notes = rows_of(capsys, "msd", str(root))
    assert rows == [
        {
            "case_id": case,
            "split": split,
            "T1w": f"{root}/images{part}/{case}_0000.nii.gz",
            "FLAIR": f"{root}/images{part}/{case}_0001.nii.gz",
            "mask": f"{root}/labels{part}/{case}.nii.gz",
        }
        for case, split, part in (("a", "train", "Tr"), ("b", "train", "Tr"), ("c", "test", "Ts"))
    ]
    assert notes == [
        "not used: 1 file of imagesTr (readme.txt) with names other than CASE_0000.nii.gz",
        "not used: 1 file of labelsTr (z.nii.gz) without images",
        "labels of the masks: 0 background, 1+2 whole tumour, 2 core",
        "build the manifest with --id-column case_id --path-column T1w,FLAIR --mask-column mask",
    ]


def test_version_1_lists_names_without_channels(tmp_path: Path, capsys: Capture) -> None:
    root = nnunet(tmp_path)
    listed = [{"image": f"./imagesTr/{i}.nii.gz", "label": f"./labelsTr/{i}.nii.gz"} for i in ("a", "b")]
    modality = {"0": "T1", "1": "T2"}
    describe(root, modality=modality, numTraining=2, training=listed, test=["./imagesTs/c.nii.gz"])
    rows, _ = rows_of(capsys, "msd", str(root))
    assert [(row["case_id"], Path(row["T2"]).name) for row in rows] == [
        (case, f"{case}_0001.nii.gz") for case in ("a", "b", "c")
    ]


def test_version_2_may_list_files_elsewhere(tmp_path: Path, capsys: Capture) -> None:
    root, other = tmp_path / "raw", tmp_path / "elsewhere"
    touch(other, "x.nii.gz", "y.nii.gz", "m.nii.gz")
    images = ["../elsewhere/x.nii.gz", f"{other}/y.nii.gz"]
    entry = {"case 1": {"images": images, "label": "../elsewhere/m.nii.gz"}}
    describe(root, **{**NNUNET, "numTraining": 1, "dataset": entry})
    (row,), _ = rows_of(capsys, "msd", str(root))
    assert row["case_id"] == "case 1"
    assert Path(row["T1w"]).samefile(other / "x.nii.gz")
    assert row["FLAIR"] == f"{other}/y.nii.gz"


def test_files_of_macos_are_skipped_even_if_they_are_listed(tmp_path: Path, capsys: Capture) -> None:
    listed = [{"image": f"imagesTr/{mac}la_3.nii.gz", "label": "labelsTr/la_3.nii.gz"} for mac in ("", "._")]
    root = decathlon(tmp_path, training=listed, numTraining=1)
    rows, notes = rows_of(capsys, "msd", str(root), "--only=train")
    assert [row["case_id"] for row in rows] == ["la_3"]
    assert "split" not in rows[0]  # so that splits can be drawn
    assert notes[:2] == [
        "not used: 1 file of macOS (imagesTr/._la_3.nii.gz)",
        "not used: 1 image of imagesTr (la_1.nii.gz) that dataset.json does not list",
    ]


@pytest.mark.parametrize("pattern", ["imagesTr/*.nii.gz", "**/.*.nii.gz", "imagesTr/._la_1.nii.gz"])
def test_no_pattern_finds_files_of_macos(pattern: str, tmp_path: Path, capsys: Capture) -> None:
    root = decathlon(tmp_path)
    if "._" in pattern or ".*" in pattern:
        assert "no file matches" in error_of(capsys, "glob", f"{root}/{pattern}")
    else:
        rows, _ = rows_of(capsys, "glob", f"{root}/{pattern}")
        assert [Path(row["path"]).name for row in rows] == ["la_1.nii.gz", "la_3.nii.gz"]


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("imagesTr/a_0001.nii.gz", "image of a is missing: imagesTr/a_0001.nii.gz"),
        ("labelsTr/b.nii.gz", "mask of b is missing: labelsTr/b.nii.gz"),
        ("imagesTs/c_0000.nii.gz", "image of c is missing: imagesTs/c_0000.nii.gz"),
        ("dataset.json", "dataset.json: no such file; name the folder of one dataset"),
    ],
)
def test_a_missing_file_is_named(missing: str, said: str, tmp_path: Path, capsys: Capture) -> None:
    root = nnunet(tmp_path)
    (root / missing).unlink()
    assert said in error_of(capsys, "msd", str(root))


def test_a_missing_file_of_the_list_is_named(tmp_path: Path, capsys: Capture) -> None:
    root = decathlon(tmp_path)
    (root / "imagesTr/la_3.nii.gz").unlink()
    said = error_of(capsys, "msd", str(root))
    assert "image of la_3 is missing: imagesTr/la_3.nii.gz; copy it, or drop the case" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"file_ending": ".nrrd"}, "file_ending is '.nrrd', expected that of an image, such as .nii.gz"),
        (
            {"channel_names": {"0": "T1w"}},
            "imagesTr/a_0001.nii.gz is of a channel that channel_names does not",
        ),
        (
            {"channel_names": {"1": "T1w"}},
            "channel_names is {'1': 'T1w'}, expected the names of the channels",
        ),
        ({"channel_names": ["T1w"]}, "channel_names is ['T1w'], expected"),
        ({"numTraining": 3}, "numTraining is 3, but there are 2 training cases"),
        ({"dataset": {"a": 5}}, "a case is 5, expected a path"),
        ({"dataset": {"a": {"images": ["x.nii.gz"], "label": ""}}}, "a has 1 image for 2 channels"),
    ],
)
def test_errors_of_nnunet(changes: dict[str, Any], said: str, tmp_path: Path, capsys: Capture) -> None:
    assert said in error_of(capsys, "msd", str(nnunet(tmp_path, **changes)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "cannot be read as JSON"),
        (b"[]", "is not a JSON object"),
        (b"{}", "every dataset of the Decathlon or nnU-Net"),
        (b'{"modality": {"0": "CT"}, "modality": {"0": "CT"}}', "has the key 'modality' twice"),
        (b'{"modality": {"0": "CT"}, "training": {}}', "training is not a list of cases"),
        (b'{"modality": {"0": "CT"}}', "no cases; name the folder of one dataset"),
        (b'{"modality": {"0": "CT"}, "test": ["a.png"]}', "a.png does not have the ending of an image"),
        (b'{"modality": {"0": "CT"}, "test": ["a.nii", "b/a.nii"]}', "a is listed 2 times"),
    ],
)
def test_errors_of_the_description(content: bytes, said: str, tmp_path: Path, capsys: Capture) -> None:
    touch(tmp_path, "a.nii", "b/a.nii")
    (tmp_path / "dataset.json").write_bytes(content)
    assert said in error_of(capsys, "msd", str(tmp_path))


def test_a_build_takes_the_manifest_with_the_options_that_are_reported(
    tmp_path: Path, capsys: Capture
) -> None:
    root, manifest = nnunet(tmp_path / "raw"), tmp_path / "raw/m.tsv"
    for number, path in enumerate(sorted(root.glob("images*/[!.]*"))):
        write_image(path, brain(seed=number))
    for path in root.glob("labelsTr/*"):
        write_image(path, np.ones((6, 5, 4), np.uint8))
    assert cli.main(["manifest", "msd", str(root), "--only=train", "--out", str(manifest)]) == cli.SUCCESS
    said = capsys.readouterr().err
    flags = next(line for line in said.splitlines() if line.startswith("build the")).split()[4:]
    dataset = tmp_path / "dataset"
    assert cli.main(["build", str(manifest), str(dataset), *flags, "--workers=1", "--quiet"]) == cli.SUCCESS
    assert read_info(str(dataset)).shape == (6, 5, 4, 2)
    assert [(row["example_id"], row["source"], row["FLAIR"]) for row in index_rows(dataset)] == [
        (case, f"imagesTr/{case}_0000.nii.gz", f"imagesTr/{case}_0001.nii.gz") for case in ("a", "b")
    ]


def test_cases_without_a_mask_are_built_with_empty_ones(tmp_path: Path) -> None:
    root, manifest, dataset = decathlon(tmp_path / "raw"), tmp_path / "raw/m.tsv", tmp_path / "dataset"
    for path in root.rglob("la_*.nii.gz"):
        is_mask = path.parent.name == "labelsTr"
        write_image(path, np.ones((6, 5, 4), np.uint8) if is_mask else brain(seed=int(path.stem[3])))
    assert cli.main(["manifest", "msd", str(root), "--out", str(manifest)]) == cli.SUCCESS
    flags = ["--id-column=case_id", "--mask-column=mask", "--missing-mask=empty", "--workers=1", "--quiet"]
    assert cli.main(["build", str(manifest), str(dataset), *flags]) == cli.SUCCESS
    labels = {row["example_id"]: row["mask_labels"] for row in index_rows(dataset)}
    assert labels == {"la_1": [1], "la_2": [0], "la_3": [1]}


def test_a_dataset_on_an_object_store_gives_the_same(tmp_path: Path, capsys: Capture) -> None:
    from tests.object_store import MemoryFileSystem

    root, remote = nnunet(tmp_path), "memory://bucket/raw"
    MemoryFileSystem.objects.clear()
    for path in (path for path in root.rglob("*") if path.is_file()):
        MemoryFileSystem.objects[f"{remote}/{path.relative_to(root)}"] = path.read_bytes(), 1.0
    here, there = (rows_of(capsys, "msd", place)[0] for place in (str(root), remote))
    MemoryFileSystem.objects.clear()
    as_here = [{name: cell.replace(remote, str(root)) for name, cell in row.items()} for row in there]
    assert as_here == here
