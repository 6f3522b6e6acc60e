"""Manifests of BIDS studies with several images per session, and with masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.cli import main as cli
from beam_nifti.errors import UsageError
from beam_nifti.inspection.verify import verify_dataset
from beam_nifti.manifest.discovery import find_bids_images
from beam_nifti.record.dataset_info import read_info
from tests.images import brain, write_image
from tests.manifest.test_discovery import error_of, rows_of, touch, write_tsv

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two participants with a T1w and a FLAIR in two sessions, and masks of fMRIPrep."""
    root = tmp_path / "study"
    for sub in ("1", "2"):
        for ses in ("a", "b"):
            stem = f"sub-{sub}/ses-{ses}/anat/sub-{sub}_ses-{ses}"
            touch(root, f"{stem}_T1w.nii.gz", f"{stem}_FLAIR.nii.gz")
            touch(root / "derivatives/fmriprep", f"{stem}_desc-brain_mask.nii.gz")
            touch(root / "derivatives/fmriprep", f"{stem}_space-MNI_desc-brain_mask.nii.gz")
    write_tsv(root / "participants.tsv", "participant_id age", "sub-1 31", "sub-2 n/a")
    return root


NATIVE = ["--suffix=T1w", "--derivatives=fmriprep", "--mask-suffix=mask", "--entity=mask:space="]


def test_each_suffix_is_a_column(study: Path, capsys: Capture) -> None:
    rows, notes = rows_of(capsys, "bids", str(study), "--suffix=FLAIR,T1w", "--label=age")
    assert rows == [
        {
            "participant_id": "sub-1",
            "session_id": f"ses-{ses}",
            "FLAIR": f"{study}/sub-1/ses-{ses}/anat/sub-1_ses-{ses}_FLAIR.nii.gz",
            "T1w": f"{study}/sub-1/ses-{ses}/anat/sub-1_ses-{ses}_T1w.nii.gz",
            "label": "31",
        }
        for ses in ("a", "b")
    ]
    assert notes == [
        "not used: 2 images (sub-2_ses-a_FLAIR, sub-2_ses-b_FLAIR) without age",
        "1 participant (sub-2) left with no image",
    ]


def test_sessions_without_one_of_the_images_are_skipped_and_reported(study: Path, capsys: Capture) -> None:
    (study / "sub-1/ses-a/anat/sub-1_ses-a_FLAIR.nii.gz").unlink()
    touch(study, "sub-3/anat/sub-3_FLAIR.nii.gz")
    rows, notes = rows_of(capsys, "bids", str(study), "--suffix=T1w,FLAIR")
    assert [(row["participant_id"], row["session_id"]) for row in rows] == [
        ("sub-1", "ses-b"),
        ("sub-2", "ses-a"),
        ("sub-2", "ses-b"),
    ]
    assert "not used: 1 session (sub-3) without T1w" in notes
    assert "not used: 1 session (sub-1_ses-a) without FLAIR" in notes


def test_several_images_of_one_suffix_are_refused_with_the_flag_for_it(study: Path, capsys: Capture) -> None:
    touch(study, "sub-1/ses-a/anat/sub-1_ses-a_run-2_FLAIR.nii.gz")
    said = error_of(capsys, "bids", str(study), "--suffix=T1w,FLAIR")
    assert said.endswith("Choose with --entity FLAIR:run=2 --entity FLAIR:run=\n") or said.endswith(
        "Choose with --entity FLAIR:KEY=LABEL (KEY= selects images without KEY)\n"
    )
    rows, _ = rows_of(capsys, "bids", str(study), "--suffix=T1w,FLAIR", "--entity=FLAIR:run=")
    assert len(rows) == 4
    rows, _ = rows_of(capsys, "bids", str(study), "--suffix=T1w,FLAIR", "--entity=FLAIR:run=2", "--session=a")
    assert [Path(row["FLAIR"]).name for row in rows] == ["sub-1_ses-a_run-2_FLAIR.nii.gz"]


def test_entities_that_vary_have_the_suffix_in_their_columns(study: Path, capsys: Capture) -> None:
    for sub in ("1", "2"):
        path = study / f"sub-{sub}/ses-a/anat/sub-{sub}_ses-a_FLAIR.nii.gz"
        path.rename(path.with_name(f"sub-{sub}_ses-a_acq-x{sub}_FLAIR.nii.gz"))
    rows, _ = rows_of(capsys, "bids", str(study), "--suffix=T1w,FLAIR", "--session=a")
    assert [row["FLAIR_acq"] for row in rows] == ["x1", "x2"]
    assert "T1w_acq" not in rows[0]


# Masks


def test_masks_of_a_derivative_are_a_column(study: Path, capsys: Capture) -> None:
    rows, notes = rows_of(capsys, "bids", str(study), *NATIVE)
    assert [row["mask"] for row in rows] == [
        f"{study}/derivatives/fmriprep/sub-{i}/ses-{s}/anat/sub-{i}_ses-{s}_desc-brain_mask.nii.gz"
        for i in (1, 2)
        for s in ("a", "b")
    ]
    assert notes == ["not used: images of other suffixes: FLAIR (4)"]
    path = str(study / "derivatives/fmriprep")
    flags = ["--suffix=T1w", f"--derivatives={path}", *NATIVE[2:]]
    assert rows_of(capsys, "bids", str(study), *flags)[0] == rows


def test_images_in_a_space_have_masks_in_that_space(study: Path, capsys: Capture) -> None:
    root = study / "derivatives/fmriprep"
    touch(root, "sub-1/ses-a/anat/sub-1_ses-a_space-MNI_desc-preproc_T1w.nii.gz")
    touch(root, "sub-1/ses-a/anat/sub-1_ses-a_desc-preproc_T1w.nii.gz")
    flags = ["--suffix=T1w", "--mask-suffix=mask", "--entity=space=MNI"]
    (row,), notes = rows_of(capsys, "bids", str(root), *flags)
    assert Path(row["mask"]).name == "sub-1_ses-a_space-MNI_desc-brain_mask.nii.gz"
    assert [note for note in notes if "masks" in note] == [
        "not used: 7 masks (sub-1_ses-a_desc-brain_mask, sub-1_ses-b_desc-brain_mask, "
        "sub-1_ses-b_space-MNI_desc-brain_mask, …) of other images"
    ]


def test_several_masks_of_an_image_are_refused(study: Path, capsys: Capture) -> None:
    said = error_of(capsys, "bids", str(study), *NATIVE[:3])
    assert "4 sessions have several masks, such as sub-1/ses-a/anat/sub-1_ses-a_desc-brain_mask" in said
    assert "they differ in space (absent, MNI). Choose with --entity mask:space=\n" in said


def test_images_without_a_mask_are_skipped_and_reported(study: Path, capsys: Capture) -> None:
    for path in (study / "derivatives/fmriprep/sub-1/ses-b/anat").iterdir():
        path.unlink()
    rows, notes = rows_of(capsys, "bids", str(study), *NATIVE, "--label=age")
    assert [(row["participant_id"], row["session_id"]) for row in rows] == [("sub-1", "ses-a")]
    assert "not used: 1 image (sub-1_ses-b_T1w) without a mask" in notes


def test_a_mask_that_could_be_of_two_images_is_refused(study: Path, capsys: Capture) -> None:
    touch(study, "sub-1/ses-a/anat/sub-1_ses-a_run-2_T1w.nii.gz")
    said = error_of(capsys, "bids", str(study), *NATIVE, "--all-images")
    assert "could be the mask of sub-1_ses-a_T1w and of sub-1_ses-a_run-2_T1w; select one image" in said


def test_masks_of_runs_are_those_of_their_images(study: Path, capsys: Capture) -> None:
    for run in (1, 2):
        touch(study, f"sub-9/anat/sub-9_run-{run}_T1w.nii", f"sub-9/anat/sub-9_run-{run}_label-L_dseg.nii")
    rows, _ = rows_of(capsys, "bids", str(study), "--suffix=T1w", "--mask-suffix=dseg", "--all-images")
    assert [(row["image_id"], Path(row["mask"]).name) for row in rows] == [
        (f"sub-9_run-{run}_T1w", f"sub-9_run-{run}_label-L_dseg.nii") for run in (1, 2)
    ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--suffix=T1w,"], "--suffix is 'T1w,'; name each suffix once"),
        (["--suffix=T1w,T1w"], "name each suffix once"),
        (["--suffix=T1w", "--mask-suffix=T1w"], "--suffix is 'T1w', and --mask-suffix T1w; name each"),
        (["--suffix=T1w,FLAIR", "--all-images"], "--all-images requires a single --suffix"),
        (["--suffix=T1w", "--derivatives=fmriprep"], "--derivatives requires --mask-suffix"),
        (
            ["--suffix=T1w", "--entity=FLAIR:run=1"],
            "--entity FLAIR:run=1: 'FLAIR' is not given with --suffix",
        ),
        (
            ["--suffix=T1w", "--mask-suffix=mask"],
            "no mask images for --mask-suffix; there are: FLAIR (4), T1w",
        ),
        ([*NATIVE, "--entity=mask:desc=x"], "desc-x was requested, but desc is brain"),
        ([*NATIVE[:3], "--entity=mask:run=1"], "have no run-; drop --entity mask:run"),
        (["--suffix=T1w,FLAIR", "--column=FLAIR"], "--column FLAIR: the manifest has this column already"),
        (["--suffix=T1w,bold"], "no bold images"),
        ([*NATIVE[2:], "--suffix=T1w", "--derivatives=none"], "none: No such file or directory"),
    ],
)
def test_errors(flags: list[str], said: str, study: Path, capsys: Capture) -> None:
    assert said in error_of(capsys, "bids", str(study), *flags)


NAMES = st.fixed_dictionaries(
    {},
    optional={
        "ses": st.sampled_from("ab"),
        "run": st.sampled_from("12"),
        "space": st.sampled_from(["MNI", "T1w"]),
        "desc": st.sampled_from("xy"),
    },
)


@given(NAMES, NAMES)
def test_a_mask_belongs_to_the_image_whose_name_agrees(
    tmp_path_factory: pytest.TempPathFactory, image: dict[str, str], mask: dict[str, str]
) -> None:
    root = tmp_path_factory.mktemp("one")

    def name(entities: dict[str, str], suffix: str) -> str:
        folder = f"sub-1/ses-{entities['ses']}/anat" if "ses" in entities else "sub-1/anat"
        pairs = [f"{key}-{label}" for key, label in entities.items()]
        return f"{folder}/{'_'.join(['sub-1', *pairs, suffix])}.nii"

    touch(root, name(image, "T1w"), name(mask, "mask"))
    is_same_session = image.get("ses") == mask.get("ses")
    is_same_run = "run" not in image or mask.get("run", image["run"]) == image["run"]
    is_same_space = "space" not in image or image["space"] == mask.get("space")
    if is_same_session and is_same_run and is_same_space:
        assert find_bids_images(str(root), "T1w", "", mask_suffix="mask").table.num_rows == 1
    else:
        with pytest.raises(UsageError, match="is a mask of one of the 1 images"):
            find_bids_images(str(root), "T1w", "", mask_suffix="mask")


def test_a_build_takes_the_manifest(tmp_path: Path, capsys: Capture) -> None:
    root, manifest, dataset = tmp_path / "study", tmp_path / "m.tsv", tmp_path / "dataset"
    for i in range(3):
        for suffix in ("T1w", "FLAIR"):
            write_image(root / f"sub-{i}/anat/sub-{i}_{suffix}.nii.gz", brain(seed=i))
        write_image(root / f"derivatives/fs/sub-{i}/anat/sub-{i}_dseg.nii.gz", np.ones((6, 5, 4), np.uint8))
    flags = ["--suffix=T1w,FLAIR", "--derivatives=fs", "--mask-suffix=dseg", "--out", str(manifest)]
    assert cli.main(["manifest", "bids", str(root), *flags]) == cli.SUCCESS
    build = ["--path-column=T1w,FLAIR", "--mask-column=mask", "--workers=1", "--quiet"]
    assert cli.main(["build", str(manifest), str(dataset), *build]) == cli.SUCCESS
    assert read_info(str(dataset)).shape == (6, 5, 4, 2)
    assert verify_dataset(str(dataset), manifest=str(manifest), deep=3).problems == ()
