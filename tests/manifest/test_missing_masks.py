"""Rows without a mask, from the manifest to the index."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest

import beam_nifti as bn
from beam_nifti.config import BuildConfig, Columns, RecordConfig
from beam_nifti.errors import DatasetError, ManifestError, UsageError
from beam_nifti.inspection.verify import ALL, verify_dataset
from beam_nifti.manifest import read_manifest
from beam_nifti.pipeline.configure import make_config
from beam_nifti.random_access import Dataset
from beam_nifti.transforms import (
    EncodeExample,
    LoadVolume,
    Preprocess,
    ReadManifest,
    Rescale,
    WriteToTFRecord,
)
from tests.build_helpers import build
from tests.datasets import edit_index, edit_info, failures_of, index_rows, info_of, set_cell
from tests.images import Array, brain, write_image, write_manifest

SHAPE = (6, 5, 4)
EMPTY = Columns(mask="lesion", missing_mask="empty")
SKIP = Columns(mask="lesion", missing_mask="skip")


def mask(seed: int) -> Array:
    return np.random.default_rng(seed).integers(0, 3, SHAPE, np.uint8)


def cohort(folder: Path, masks: str = "x-x-", missing: tuple[str, ...] = ("", "n/a")) -> Path:
    """Images, of which those with an x have a mask."""
    rows: list[dict[str, Any]] = []
    for i, has in enumerate(masks):
        if not (folder / f"{i}.nii.gz").exists():
            write_image(folder / f"{i}.nii.gz", brain(SHAPE, i))
        if has == "x" and not (folder / f"{i}_lesion.nii.gz").exists():
            write_image(folder / f"{i}_lesion.nii.gz", mask(i))
        cell = f"{i}_lesion.nii.gz" if has == "x" else missing[i // 2 % len(missing)]
        rows.append({"participant_id": f"sub-{i}", "path": f"{i}.nii.gz", "lesion": cell, "label": i})
    return write_manifest(folder / "m.tsv", rows)


def test_a_missing_mask_is_an_error_that_names_the_remedies(tmp_path: Path) -> None:
    manifest = str(cohort(tmp_path))
    with pytest.raises(ManifestError) as refused:
        read_manifest(manifest, Columns(mask="lesion"))
    remedy = "give the mask's path or drop the row, or use --missing-mask empty or --missing-mask skip"
    assert list(refused.value.problems) == [f"row {i}: empty lesion; {remedy}" for i in (2, 4)]


def test_empty_masks(tmp_path: Path, run: Callable[..., str]) -> None:
    manifest, output = cohort(tmp_path / "c"), tmp_path / "out"
    flags = ["--mask-column=lesion", "--missing-mask=empty", "--orientation=SRA", "--shape=5,7,5"]
    assert "kept     2 rows without a mask" in run("check", manifest, *flags)
    assert "kept     2 rows without a mask" in run("build", manifest, output, *flags)
    records = list(Dataset(output, columns=["image", "mask"]))
    assert [bool(record["mask"].any()) for record in records] == [True, False, True, False]
    assert all(record["mask"].shape == record["image"].shape for record in records)
    rows = index_rows(output)
    assert [row["lesion"] for row in rows] == ["0_lesion.nii.gz", "", "2_lesion.nii.gz", ""]
    assert [row["mask_labels"] for row in rows] == [[0, 1, 2], [0], [0, 1, 2], [0]]
    assert [len(row["source_sizes"]) for row in rows] == [2, 1, 2, 1]
    assert [record["id"] for record in Dataset(output, where="lesion == ''")] == ["sub-1", "sub-3"]
    assert verify_dataset(str(output), manifest=str(manifest), deep=ALL).ok
    assert "empty       in 2 examples without a mask" in run("inspect", output)
    again = run("build", manifest, output, *flags)
    assert "kept     4 examples" in again
    assert make_config("m", "x", {}, like=str(output)).columns.missing_mask == "empty"
    dropped = make_config("m", "x", {"without": "mask-column"}, like=str(output)).columns
    assert dropped.missing_mask is None


def test_skipped_rows(tmp_path: Path, run: Callable[..., str]) -> None:
    manifest, output = cohort(tmp_path / "c"), tmp_path / "out"
    printed = run("build", manifest, output, "--mask-column=lesion", "--missing-mask=skip")
    assert "skipped  2 rows without a mask" in printed
    assert info_of(output).manifest["num_skipped"] == 2
    assert [row["participant_id"] for row in index_rows(output)] == ["sub-0", "sub-2"]
    assert verify_dataset(str(output), manifest=str(manifest), deep=ALL).ok
    assert "skipped       2 rows without a mask" in run("inspect", output)
    edit_info(output, lambda info: info["manifest"].update(num_skipped=1))
    (problem,) = verify_dataset(str(output)).problems
    assert "do not make the manifest's 4 rows, 1 without a mask" in problem


def test_rows_without_a_label_or_a_mask(tmp_path: Path) -> None:
    rows = [
        {"path": f"{i}.nii", "lesion": f"m{i}" if i != 1 else "n/a", "label": i if i % 3 else "n/a"}
        for i in range(5)
    ]
    manifest = str(write_manifest(tmp_path / "m.tsv", rows))
    for label, given, kept, unlabelled, unmasked in (
        ("skip", "skip", [2, 4], 0, 0),
        ("nan", "skip", [0, 2, 3, 4], 2, 0),
        ("skip", "empty", [1, 2, 4], 0, 1),
        ("nan", "empty", [0, 1, 2, 3, 4], 2, 1),
    ):
        found = read_manifest(
            manifest, Columns(mask="lesion", missing_mask=given, missing_label=label, label="label")
        )
        assert found.kept_rows().tolist() == kept
        assert (found.num_unlabelled, found.num_unmasked) == (unlabelled, unmasked)
        assert found.num_skipped == 5 - len(kept)
    both = Columns(mask="lesion", missing_mask="skip", missing_label="skip", label="label")
    assert both.lacking == "label or mask"
    manifest = str(write_manifest(tmp_path / "n.tsv", [rows[0], rows[1]]))
    with pytest.raises(ManifestError, match="every row lacks a label or mask, so all rows would be skipped"):
        read_manifest(manifest, both)


def test_the_option_is_free_to_change_until_a_row_lacks_a_mask(tmp_path: Path) -> None:
    manifest, output = cohort(tmp_path / "c", "xx"), tmp_path / "out"
    build(manifest, output, columns=Columns(mask="lesion"))
    assert "missing_mask" not in (output / "dataset_info.json").read_text()
    cohort(tmp_path / "c", "xx--")
    built = build(manifest, output, columns=EMPTY)  # appends two rows
    assert built.read == {"2.nii.gz", "3.nii.gz"}
    assert [row["mask_labels"] for row in index_rows(output)][2:] == [[0], [0]]
    with pytest.raises(Exception, match="--missing-mask was empty, now skip"):
        build(manifest, output, columns=SKIP)


def test_a_mask_that_comes_later_is_loaded(tmp_path: Path) -> None:
    manifest, output = cohort(tmp_path / "c", "xx-"), tmp_path / "out"
    build(manifest, output, columns=EMPTY)
    cohort(tmp_path / "c", "xxx")
    with pytest.raises(Exception, match=r"row 3 .*: lesion was '', now '2_lesion\.nii\.gz'"):
        build(manifest, output, columns=EMPTY)


def test_a_failed_volume_without_a_mask_can_be_retried(tmp_path: Path) -> None:
    manifest = cohort(tmp_path / "c")
    (tmp_path / "c/1.nii.gz").write_bytes(b"no image")
    build(manifest, tmp_path / "out", columns=EMPTY, max_bad_fraction=0.5)
    (failure,) = failures_of(tmp_path / "out")
    assert failure["lesion"] == ""
    assert verify_dataset(str(tmp_path / "out"), manifest=str(manifest)).ok
    write_image(tmp_path / "c/1.nii.gz", brain(SHAPE, 1))
    build(tmp_path / "out/failures.jsonl", tmp_path / "retry", columns=EMPTY)
    assert [row["mask_labels"] for row in index_rows(tmp_path / "retry")] == [[0]]


def test_anonymous_ids(tmp_path: Path) -> None:
    manifest, output = cohort(tmp_path / "c", missing=("n/a",)), tmp_path / "out"
    (tmp_path / "key").write_bytes(bytes(range(32)))
    (tmp_path / "c/1.nii.gz").write_bytes(b"no image")
    key = str(tmp_path / "key")
    build(manifest, output, columns=EMPTY, anonymous_ids=key, max_bad_fraction=0.5)
    assert [bool(row["lesion"]) for row in index_rows(output)] == [True, True, False]
    assert verify_dataset(str(output), manifest=str(manifest), anonymous_ids=key, deep=ALL).ok
    (failure,) = failures_of(output)
    assert "1.nii" not in json.dumps(failure)


def test_channels_and_frames(tmp_path: Path) -> None:
    manifest = cohort(tmp_path, "x-")
    rows = [
        {"path": f"{i}.nii.gz", "b": f"{i}.nii.gz", "lesion": cell}
        for i, cell in enumerate(["0_lesion.nii.gz", ""])
    ]
    manifest = write_manifest(tmp_path / "two.tsv", rows)
    build(manifest, tmp_path / "two", columns=Columns(path="path,b", mask="lesion", missing_mask="empty"))
    assert verify_dataset(str(tmp_path / "two"), manifest=str(manifest), deep=ALL).ok
    write_image(tmp_path / "run.nii.gz", np.stack([brain(SHAPE, i) for i in range(2)], -1))
    manifest = write_manifest(tmp_path / "run.tsv", [{"path": "run.nii.gz", "lesion": "n/a"}])
    build(manifest, tmp_path / "run", columns=EMPTY, frames="each", map_labels="1=2", mask_dtype="uint16")
    assert [row["mapped_labels"] for row in index_rows(tmp_path / "run")] == [[], []]
    assert verify_dataset(str(tmp_path / "run"), manifest=str(manifest), deep=ALL).ok


def test_an_index_with_fewer_files_than_the_option_allows(tmp_path: Path) -> None:
    manifest = cohort(tmp_path / "c", "xx")
    for name, columns in (("plain", Columns(mask="lesion")), ("empty", EMPTY)):
        output = tmp_path / name
        build(manifest, output, columns=columns)
        for column, values in (("source_sizes", [1]), ("source_mtimes", [1.0]), ("source_versions", [None])):
            edit_index(output, set_cell(column, 0, values))
        assert verify_dataset(str(output)).ok == (name == "empty")


@pytest.mark.parametrize(
    ("columns", "record", "message"),
    [
        ({"missing_mask": "skip"}, {}, "--missing-mask requires --mask-column"),
        ({"mask": "m", "missing_mask": "zero"}, {}, "--missing-mask is 'zero'; choose one of: empty, skip"),
        ({"mask": "m", "missing_mask": "empty"}, {"crop_foreground": "mask"}, "--crop-foreground mask fails"),
        (
            {"mask": "m", "missing_mask": "empty"},
            {"rescale": "zscore", "rescale_within": "mask"},
            "within mask fails",
        ),
    ],
)
def test_refusals(columns: dict[str, str], record: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BuildConfig("m.tsv", "out", RecordConfig(**record), Columns(**columns))


def test_the_statistics_of_a_cohort_within_masks_do_not_need_every_mask(tmp_path: Path) -> None:
    manifest, output = cohort(tmp_path / "c"), tmp_path / "out"
    options: dict[str, Any] = {"rescale": "cohort:zscore", "rescale_within": "mask", "missing_mask": "empty"}
    bn.build(manifest, output, mask_column="lesion", progress=False, **options)
    inside = np.concatenate([brain(SHAPE, i)[mask(i) > 0] for i in (0, 2)]).astype(np.float64)
    first = Dataset(output)[1]["image"][..., 0]
    assert np.allclose(first, (brain(SHAPE, 1) - inside.mean()) / inside.std(), atol=1e-5)
    assert bn.verify(output, manifest=manifest, deep="all")


@pytest.mark.parametrize("given", ["zero", 1, None])
def test_a_received_rule_is_checked(tmp_path: Path, given: object) -> None:
    build(cohort(tmp_path / "c", "x"), tmp_path / "out", columns=Columns(mask="lesion"))
    edit_info(tmp_path / "out", lambda info: info["config"]["columns"].update(missing_mask=given))
    if given is None:  # as `Columns` has it
        assert info_of(tmp_path / "out").columns.missing_mask is None
        return
    with pytest.raises(DatasetError, match=r"not a dataset's info: .*missing.mask"):
        info_of(tmp_path / "out")


def test_steps_of_a_pipeline(tmp_path: Path) -> None:
    manifest = cohort(tmp_path / "c")
    with beam.Pipeline() as pipeline:
        volumes = pipeline | ReadManifest(manifest, columns=EMPTY) | LoadVolume(mask_dtype="uint8")
        prepared = volumes | Preprocess(spacing=1.5) | Rescale()
        _ = prepared | EncodeExample() | WriteToTFRecord(tmp_path / "out")
    assert [row["mask_labels"] for row in index_rows(tmp_path / "out")] == [[0, 1, 2], [0], [0, 1, 2], [0]]
    refused = pytest.raises(
        Exception,
        match=r"row 2: empty lesion; .* or use Columns.missing_mask=.empty. or Columns.missing_mask=.skip",
    )
    with refused, beam.Pipeline() as pipeline:
        _ = pipeline | ReadManifest(manifest, columns=Columns(mask="lesion")) | LoadVolume(mask_dtype="uint8")
