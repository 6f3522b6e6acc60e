"""Manifests of BIDS studies and of patterns: what is taken, what is told, and that a build takes them."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_nifti.cli import main as cli
from beam_nifti.errors import UsageError
from beam_nifti.inspection.verify import verify_dataset
from beam_nifti.manifest.bids import BidsImage
from beam_nifti.manifest.discovery import find_bids_images
from beam_nifti.manifest.tables import read_table
from beam_nifti.record.dataset_info import read_info
from beam_nifti.record.index import read_index
from beam_nifti.storage import paths as storage
from tests.images import brain, write_image


def touch(root: Path, *names: str) -> None:
    """Make empty files and their folders."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write_tsv(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(line.split()) + "\n" for line in lines))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Three participants with a T1w image and an age, and what else a study holds."""
    root = tmp_path / "study"
    for i in (3, 1, 2):
        touch(root, f"sub-0{i}/anat/sub-0{i}_T1w.nii.gz", f"sub-0{i}/anat/sub-0{i}_T1w.json")
    touch(
        root,
        "derivatives/fs/sub-01/anat/sub-01_T1w.nii.gz",
        "sourcedata/sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/func/sub-01_task-rest_bold.nii.gz",
        "sub-01/anat/._sub-01_T1w.nii.gz",
        "sub-01/.git/sub-01_T1w.nii.gz",
        "T1w.nii.gz",
    )
    write_tsv(
        root / "participants.tsv", "participant_id age sex", "sub-01 31 F", "sub-02 42.5 M", "sub-03 53 F"
    )
    return root


Capture = pytest.CaptureFixture[str]


def rows_of(capsys: Capture, *arguments: str) -> tuple[list[dict[str, str]], list[str]]:
    """The rows that a command prints, and its lines on standard error."""
    assert cli.main(["manifest", *arguments]) == cli.SUCCESS
    said = capsys.readouterr()
    names, *lines = (line.split("\t") for line in said.out.splitlines())
    return [dict(zip(names, cells, strict=True)) for cells in lines], said.err.splitlines()


def error_of(capsys: Capture, *arguments: str) -> str:
    assert cli.main(["manifest", *arguments]) == cli.USAGE
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def names(rows: Sequence[Mapping[str, str]]) -> list[str]:
    return [Path(row["path"]).name for row in rows]


# Names


LABELS = st.from_regex(r"[A-Za-z0-9]+", fullmatch=True)
KEYS = st.sampled_from(["acq", "run", "space", "desc", "task", "echo"])


@given(
    LABELS,
    LABELS | st.none(),
    st.dictionaries(KEYS, LABELS),
    st.sampled_from([".nii", ".nii.gz", ".nii.zst", ".hdr", ".img.bz2", ".mgz"]),
)
def test_a_name_is_parsed_into_what_it_was_made_of(
    sub: str, ses: str | None, others: dict[str, str], ending: str
) -> None:
    entities = {"sub": sub, **({} if ses is None else {"ses": ses}), **others}
    stem = "_".join([*(f"{key}-{label}" for key, label in entities.items()), "T1w"])
    folder = f"sub-{sub}/anat" if ses is None else f"sub-{sub}/ses-{ses}/anat"
    image = BidsImage.parse(f"{folder}/{stem}{ending}")
    assert image is not None
    assert (image.entities, image.suffix, image.stem) == (entities, "T1w", stem)
    assert image.participant_id == f"sub-{sub}"
    assert image.session_id == ("" if ses is None else f"ses-{ses}")


@pytest.mark.parametrize(
    "path",
    [
        "sub-01/anat/sub-01_mprage_T1w.nii.gz",
        "sub-01/anat/sub-01_T1w.nii.gz.tmp",
        "sub-01/anat/sub-01_run-1_run-2_T1w.nii.gz",
        "sub-01/anat/run-1_T1w.nii.gz",
        "sub-01/anat/T1w.nii.gz",
        "sub-02/anat/sub-01_T1w.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-1_T1w.nii.gz",
        "sub-01/ses-2/anat/sub-01_T1w.nii.gz",
    ],
)
def test_other_names_are_none_of_a_study(path: str) -> None:
    assert BidsImage.parse(path) is None


# What is taken


def test_the_images_of_a_study_and_nothing_else_of_it(study: Path, capsys: Capture) -> None:
    rows, notes = rows_of(capsys, "bids", str(study), "--suffix=T1w", "--label=age", "--column=sex")
    assert rows == [
        {
            "participant_id": f"sub-0{i}",
            "path": f"{study}/sub-0{i}/anat/sub-0{i}_T1w.nii.gz",
            "label": age,
            "sex": sex,
        }
        for i, age, sex in ((1, "31", "F"), (2, "42.5", "M"), (3, "53", "F"))
    ]
    assert notes == [
        "not used: images of other suffixes: bold (1)",
        "not used: 1 image (T1w.nii.gz) outside the folders of BIDS",
    ]
    rows, _ = rows_of(capsys, "bids", str(study), "--suffix=bold")
    assert [list(row) for row in rows] == [["participant_id", "path"]]


@pytest.mark.parametrize("folder", ["sub-04", "sub-04/anat/deep", "sub-04/ses-1", "sub-04/ses-1/anat/deep"])
def test_images_outside_of_the_folders_of_bids_are_skipped(study: Path, folder: str, capsys: Capture) -> None:
    name = f"sub-04_{'ses-1_' if 'ses' in folder else ''}T1w.nii.gz"
    touch(study, f"{folder}/{name}")
    rows, notes = rows_of(capsys, "bids", str(study), "--suffix=T1w")
    assert [row["participant_id"] for row in rows] == ["sub-01", "sub-02", "sub-03"]
    misplaced = f"2 images (T1w.nii.gz, {folder}/{name}) outside the folders of BIDS"
    assert f"not used: {misplaced}" in notes
    for path in study.glob("sub-*/*/*_*.nii.gz"):
        path.unlink()
    touch(study, f"{folder}/{name}")
    assert f"there are: none; {misplaced}" in error_of(capsys, "bids", str(study), "--suffix=T1w")


def test_tables_of_participants_are_not_copied_unless_asked_for(study: Path, capsys: Capture) -> None:
    (study / "participants.tsv").unlink()
    rows, _ = rows_of(capsys, "bids", str(study), "--suffix=T1w")
    assert [list(row) for row in rows] == [["participant_id", "path"]] * 3


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        (["--entity=run=1"], ["ses-a_run-1", "ses-b_run-1"]),
        (["--entity=acq="], ["ses-a_run-1", "ses-a_run-2", "ses-b_run-1"]),
        (
            ["--entity", "run=1", "--entity", "run=2", "--entity=acq="],
            ["ses-a_run-1", "ses-a_run-2", "ses-b_run-1"],
        ),
        (["--session=a"], ["ses-a_run-1", "ses-a_run-2"]),
        (["--session=ses-b", "--session=c"], ["ses-b_run-1", "ses-c_acq-x"]),
        (["--session=c", "--entity=acq=x"], ["ses-c_acq-x"]),
    ],
)
def test_entities_choose(flags: list[str], chosen: list[str], tmp_path: Path, capsys: Capture) -> None:
    every = ["ses-a_run-1", "ses-a_run-2", "ses-b_run-1", "ses-c_acq-x"]
    touch(tmp_path, *(f"sub-1/{name[:5]}/anat/sub-1_{name}_T1w.nii" for name in every))
    rows, _ = rows_of(capsys, "bids", str(tmp_path), "--suffix=T1w", "--all-images", *flags)
    assert names(rows) == [f"sub-1_{name}_T1w.nii" for name in chosen]
    assert [row["session_id"] for row in rows] == [name[:5] for name in chosen]
    assert [row["image_id"] for row in rows] == [f"sub-1_{name}_T1w" for name in chosen]


def test_entities_that_vary_are_columns(tmp_path: Path, capsys: Capture) -> None:
    touch(
        tmp_path,
        "sub-1/anat/sub-1_desc-x_run-1_label-GM_probseg.nii",
        "sub-2/anat/sub-2_desc-x_label-WM_probseg.nii",
    )
    rows, _ = rows_of(capsys, "bids", str(tmp_path), "--suffix=probseg")
    assert [(row["run"], row["entity_label"]) for row in rows] == [("1", "GM"), ("", "WM")]
    assert set(rows[0]) == {"participant_id", "path", "run", "entity_label"}


def test_labels_of_sessions_come_before_those_of_participants(study: Path, capsys: Capture) -> None:
    touch(study, *(f"sub-01/ses-{s}/anat/sub-01_ses-{s}_FLAIR.nii" for s in ("x", "y", "z")))
    touch(study, "sub-02/ses-x/anat/sub-02_ses-x_FLAIR.nii", "sub-03/ses-x/anat/sub-03_ses-x_FLAIR.nii")
    write_tsv(study / "sub-01/sub-01_sessions.tsv", "session_id age", "ses-x 31.5", "ses-y n/a")
    write_tsv(study / "sub-02/sub-02_sessions.tsv", "session_id site", "ses-x berlin")
    flags = ["--suffix=FLAIR", "--label=age", "--column=site"]
    rows, notes = rows_of(capsys, "bids", str(study), *flags)
    assert [(row["participant_id"], row["session_id"], row["label"], row["site"]) for row in rows] == [
        ("sub-01", "ses-x", "31.5", "n/a"),
        ("sub-02", "ses-x", "42.5", "berlin"),
        ("sub-03", "ses-x", "53", "n/a"),
    ]
    assert notes[2:] == [
        "1 session (ses-z) of sub-01 with images, but no row in the tables, which have ses-x, ses-y",
        "not used: 2 images (sub-01_ses-y_FLAIR, sub-01_ses-z_FLAIR) without age",
        "2 sessions (sub-01_ses-y, sub-01_ses-z) left with no image",
    ]


# What is told


def test_what_is_left_out_is_told(study: Path, capsys: Capture) -> None:
    write_tsv(study / "participants.tsv", "participant_id age", "sub-01 31", "sub-02 n/a", "sub-09 40")
    touch(study, "sub-01/anat/sub-01_mprage_T1w.nii.gz", "sub-01/anat/sub-02_T1w.nii.gz")
    (study / "sub-01/anat/sub-01_run-2_T1w.nii.gz").symlink_to("nowhere")
    (study / "sub-01/anat/sub-01_T1w.nii.gz").write_bytes(b"/annex/objects/MD5E-s592--0.nii.gz\n")
    rows, notes = rows_of(capsys, "bids", str(study), "--suffix=T1w", "--label=age", "--all-images")
    assert [row["image_id"] for row in rows] == ["sub-01_T1w", "sub-01_run-2_T1w"]
    assert sorted(notes) == [
        "1 image (sub-01_T1w.nii.gz): a git-annex pointer; run `git annex get` (or `datalad get`) on the "
        "file",
        "1 image (sub-01_run-2_T1w.nii.gz): a symbolic link to a file that is not there; copy that file",
        "1 participant (sub-03) with images, but not in participants.tsv",
        "1 participant (sub-09) in participants.tsv, but with no such image",
        "2 participants (sub-02, sub-03) left with no image",
        "not used: 1 image (T1w.nii.gz) outside the folders of BIDS",
        "not used: 2 images (sub-01/anat/sub-01_mprage_T1w.nii.gz, sub-01/anat/sub-02_T1w.nii.gz) with names "
        "that do not follow BIDS, or in the folder of another participant or session",
        "not used: 2 images (sub-02_T1w, sub-03_T1w) without age",
        "not used: images of other suffixes: bold (1)",
    ]


def test_several_images_of_a_session_are_refused_with_the_flag_to_choose(
    tmp_path: Path, capsys: Capture
) -> None:
    touch(
        tmp_path,
        *(f"sub-{i}/anat/sub-{i}_{e}T1w.nii" for i in (1, 2) for e in ("", "run-2_", "acq-x_run-3_")),
    )
    said = error_of(capsys, "bids", str(tmp_path), "--suffix=T1w")
    assert "2 sessions have several images, such as sub-1/anat/sub-1_" in said
    assert "they differ in acq (absent, x), run (absent, 2, 3)" in said
    assert "Choose with --entity acq=x, or keep all with --all-images" in said


@pytest.mark.parametrize(
    ("table", "flags", "says"),
    [
        (
            None,
            ["--label=age"],
            "no column 'age' in participants.tsv or in a sessions.tsv; there are: no such",
        ),
        (["participant_id sex", "sub-01 F"], ["--label=age"], "there are: sex"),
        (["participant_id sex", "sub-01 F"], ["--column=age"], "no column 'age'"),
        (
            ["id age", "sub-01 3"],
            ["--label=age"],
            "participants.tsv: no column 'participant_id', only id, age",
        ),
        (["participant_id age", "sub-01 3", "sub-01 4"], ["--label=age"], "sub-01 is in two rows with"),
        (["participant_id age", "sub-01 3 4"], ["--label=age"], "row 1: 3 cells where the header names 2"),
        (
            ["participant_id age", "sub-1 3", "sub-9 4"],
            ["--label=age"],
            "none of the 3 images has a value of age: 3 participants (sub-01, sub-02, sub-03) with images, "
            "but not in participants.tsv; 2 participants (sub-1, sub-9) in participants.tsv, but with no "
            "such image; possibly the same id in table and image name: sub-1 for sub-01; ids must match "
            "exactly",
        ),
        (
            ["participant_id age", "sub-01 89+", "sub-02 42"],
            ["--label=age"],
            "sub-01_T1w is '89+', not a finite",
        ),
        (["participant_id age", "sub-01 NaN"], ["--label=age"], "none of the 3 images has a value of age: "),
        ([], ["--column=path"], "--column path: the manifest has this column already; drop it"),
        ([], ["--entity=run"], "--entity is 'run'; give a key and a label, such as run=1"),
        ([], ["--entity==1"], "--entity is '=1'"),
        (
            [],
            ["--entity=run=1"],
            "none of the 3 T1w images is selected: run-1 was requested, but their names have no run-",
        ),
        ([], ["--session=1"], "ses-1 was requested, but their names have no ses-; drop --session"),
    ],
)
def test_errors_of_a_study(
    table: Sequence[str] | None, flags: list[str], says: str, study: Path, capsys: Capture
) -> None:
    (study / "participants.tsv").unlink()
    if table:
        write_tsv(study / "participants.tsv", *table)
    assert says in error_of(capsys, "bids", str(study), "--suffix=T1w", *flags)


def test_errors_of_folders(study: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "missing" in error_of(capsys, "bids", str(tmp_path / "missing"), "--suffix=T1w")
    assert "no files in folders sub-*" in error_of(capsys, "bids", str(tmp_path), "--suffix=T1w")
    assert "--suffix" in error_of(capsys, "bids", str(study))
    touch(study, "sub-01/anat/sub-01_T1w.nii")
    said = error_of(capsys, "bids", str(study), "--suffix=T1w", "--all-images")
    assert "sub-01_T1w.nii and sub-01/anat/sub-01_T1w.nii.gz have the same name" in said


def test_the_table_of_sessions_has_the_last_word(study: Path, capsys: Capture) -> None:
    touch(study, *(f"sub-01/ses-{s}/anat/sub-01_ses-{s}_FLAIR.nii" for s in ("M000", "M048")))
    write_tsv(study / "sub-01/sub-01_sessions.tsv", "session_id age", "M00 60", "ses-M048 64")
    rows, notes = rows_of(capsys, "bids", str(study), "--suffix=FLAIR", "--label=age")
    assert [(row["session_id"], row["label"]) for row in rows] == [("ses-M048", "64")]
    assert notes[2:] == [
        "2 participants (sub-02, sub-03) in participants.tsv, but with no such image",
        "1 session (ses-M000) of sub-01 with images, but no row in the tables, which have ses-M00, ses-M048",
        "possibly the same id in table and image name: ses-M00 for ses-M000; ids must match exactly",
        "1 session (sub-01_ses-M00) in tables, but with no such image",
        "not used: 1 image (sub-01_ses-M000_FLAIR) without age",
        "1 session (sub-01_ses-M000) left with no image",
    ]
    write_tsv(study / "sub-01/sub-01_sessions.tsv", "session_id age", "M00 60", "M48 64")
    said = error_of(capsys, "bids", str(study), "--suffix=FLAIR", "--label=age")
    assert "none of the 2 images has a value of age: " in said
    assert "2 sessions (ses-M000, ses-M048) of sub-01 with images, but no row in the tables" in said


def test_participants_tsv_may_have_a_row_per_session(study: Path, capsys: Capture) -> None:
    touch(study, *(f"sub-0{i}/ses-{s}/anat/sub-0{i}_ses-{s}_FLAIR.nii" for i in (1, 2) for s in "ab"))
    write_tsv(
        study / "participants.tsv",
        "participant_id session_id age",
        *("sub-01 ses-a 1", "01 b 2", "sub-02 a 3", "sub-03 n/a 5"),
    )
    rows, notes = rows_of(capsys, "bids", str(study), "--suffix=FLAIR", "--label=age")
    assert [(row["participant_id"], row["session_id"], row["label"]) for row in rows] == [
        ("sub-01", "ses-a", "1"),
        ("sub-01", "ses-b", "2"),
        ("sub-02", "ses-a", "3"),
    ]
    assert "1 session (ses-b) of sub-02 with images, but no row in the tables, which have ses-a" in notes
    rows, _ = rows_of(capsys, "bids", str(study), "--suffix=T1w", "--label=age")
    assert [(row["participant_id"], row["label"]) for row in rows] == [("sub-02", "3"), ("sub-03", "5")]


def test_rows_of_a_participant_that_agree_are_one(study: Path, capsys: Capture) -> None:
    write_tsv(study / "participants.tsv", "participant_id age visit", "sub-01 31 1", "sub-01 31 2")
    rows, _ = rows_of(capsys, "bids", str(study), "--suffix=T1w", "--label=age")
    assert [row["label"] for row in rows] == ["31"]
    assert "sub-01 is in two rows with different values" in error_of(
        capsys, "bids", str(study), "--suffix=T1w", "--column=visit"
    )


@pytest.mark.parametrize("text", ["n/a", "N/A", "NaN", "nan", "-nan", "+nan", " n/a ", "", " "])
def test_a_missing_value_has_many_spellings(text: str, study: Path, capsys: Capture) -> None:
    (study / "participants.tsv").write_text(
        f"participant_id\tage\tsex\nsub-01\t31\t{text}\nsub-02\t{text}\tF\n"
    )
    rows, _ = rows_of(capsys, "bids", str(study), "--suffix=T1w", "--label=age", "--column=sex")
    assert [(row["label"], row["sex"]) for row in rows] == [("31", "n/a")]


def test_texts_are_labels_where_no_value_is_a_number(study: Path, capsys: Capture) -> None:
    rows, notes = rows_of(capsys, "bids", str(study), "--suffix=T1w", "--label=sex")
    assert [row["label"] for row in rows] == ["F", "M", "F"]
    assert not any("sex" in note for note in notes)


def test_a_table_that_is_a_link_to_nothing_is_named(study: Path, capsys: Capture) -> None:
    for name in ("participants.tsv", "sub-01/sub-01_sessions.tsv"):
        (study / name).unlink(missing_ok=True)
        (study / name).symlink_to(".git/annex/objects/x")
        said = error_of(capsys, "bids", str(study), "--suffix=T1w", "--label=age")
        assert f"{study / name}: a git-annex link without its content; run `git annex get`" in said
        (study / name).unlink()
        write_tsv(study / name, "participant_id age", "sub-01 31")


def test_a_derivative_takes_the_tables_of_its_dataset(study: Path, capsys: Capture) -> None:
    root = study / "derivatives/fmriprep"
    touch(root, *(f"sub-01/ses-{s}/anat/sub-01_ses-{s}_T1w.nii.gz" for s in "ab"))
    touch(root, "sub-02/anat/sub-02_T1w.nii.gz")
    write_tsv(study / "sub-01/sub-01_sessions.tsv", "session_id age", "ses-b 32")
    rows, notes = rows_of(capsys, "bids", str(root), "--suffix=T1w", "--label=age")
    assert [row["label"] for row in rows] == ["32", "42.5"]
    assert f"{root} has no participants.tsv; the tables of {study} are used" in notes
    write_tsv(root / "participants.tsv", "participant_id age", "sub-02 43")
    rows, _ = rows_of(capsys, "bids", str(root), "--suffix=T1w", "--label=age")
    assert [row["label"] for row in rows] == ["43"]


def test_what_is_suspicious_in_a_table_is_reported(study: Path, capsys: Capture) -> None:
    participants, sessions = study / "participants.tsv", study / "sub-01/sub-01_sessions.tsv"
    touch(study, "sub-01/ses-a/anat/sub-01_ses-a_FLAIR.nii")
    participants.write_text('participant_id\tage\nsub-01 \t31\nsub-02\t"42.5"\nsub-03\t77\n')
    sessions.write_text("session_id\tdate\nses-a \t1\n")
    _, notes = rows_of(capsys, "bids", str(study), "--suffix=FLAIR", "--column=age", "--column=date")
    blanks = "1 cell was read without the white space at the ends, such as"
    assert [note for note in notes if ".tsv: " in note] == [
        f"{participants}: row 2: age has quotes around a cell; in a TSV they are part of the value",
        f"{participants}: {blanks} 'participant_id' of row 1",
        f"{sessions}: {blanks} 'session_id' of row 1",
    ]
    write_tsv(participants, "participant_id age", "sub-01 31", "sub-02 42 5", "sub-03")
    said = error_of(capsys, "bids", str(study), "--suffix=T1w", "--column=age")
    assert f"{participants}: row 2: 3 cells where the header names 2; row 3: 1 cells" in said


def test_participants_whose_names_are_probably_one_are_named(study: Path, capsys: Capture) -> None:
    touch(study, "sub-003/anat/sub-003_T1w.nii.gz", "Sub-02/anat/Sub-02_T1w.nii.gz")
    write_tsv(study / "participants.tsv", "participant_id age", "sub-01 31", "Sub-02 42", "sub-03 7")
    _, notes = rows_of(capsys, "bids", str(study), "--suffix=T1w", "--label=age")
    assert (
        "possibly one participant with two names: sub-03 and sub-003, Sub-02 and sub-02; if so, rename one"
    ) in notes
    assert "1 participant (Sub-02) in participants.tsv, but with no such image" in notes
    assert "possibly the same id in table and image name: Sub-02 for sub-02; ids must match exactly" in notes


def test_images_and_folders_out_of_place_are_named(study: Path, capsys: Capture) -> None:
    touch(
        study, "sub-01/ses-1/anat/extra/sub-01_ses-1_T1w.nii.gz", "SUB-04/anat/SUB-04_T1w.nii", "sub5/x.nii"
    )
    _, notes = rows_of(capsys, "bids", str(study), "--suffix=T1w")
    assert notes[1:] == [
        "not used: 2 images (T1w.nii.gz, sub-01/ses-1/anat/extra/sub-01_ses-1_T1w.nii.gz) outside the "
        "folders of BIDS",
        "not used: 2 folders (SUB-04, sub5); folders of participants are named sub-LABEL",
    ]
    assert "no T2w images; there are: T1w (3), bold (1)" in error_of(
        capsys, "bids", str(study), "--suffix=T2w"
    )
    assert "no t1W images; there are: T1w (3), bold (1); did you mean T1w?" in error_of(
        capsys, "bids", str(study), "--suffix=t1W"
    )


SESSIONS = st.dictionaries(
    st.tuples(st.sampled_from("123"), st.sampled_from(["", "a", "b"])),
    st.sets(st.tuples(st.sampled_from(["", "x"]), st.sampled_from(["", "1", "2"])), min_size=1),
    min_size=1,
)


@given(SESSIONS, st.data())
@settings(max_examples=40)
def test_every_image_is_in_the_manifest_or_named(
    tmp_path_factory: pytest.TempPathFactory,
    sessions: dict[tuple[str, str], set[tuple[str, str]]],
    data: st.DataObject,
) -> None:
    root = tmp_path_factory.mktemp("study")
    stems = []
    for (participant, session), of_session in sessions.items():
        for acq, run in of_session:
            entities = {"sub": participant, "ses": session, "acq": acq, "run": run}
            stem = "_".join([*(f"{key}-{label}" for key, label in entities.items() if label), "T1w"])
            folder = f"sub-{participant}/ses-{session}/anat" if session else f"sub-{participant}/anat"
            touch(root, f"{folder}/{stem}.nii")
            stems.append(stem)
    filters: dict[str, list[str]] = {}
    if data.draw(st.booleans()):
        filters["run"] = data.draw(st.lists(st.sampled_from(["", "1", "2"]), min_size=1, unique=True))
    try:
        found = find_bids_images(str(root), "T1w", "", entities=filters, all_images=True)
    except UsageError:
        runs = {match[1] if (match := re.search(r"_run-(\w)_", stem)) else "" for stem in stems}
        assert runs.isdisjoint(filters["run"])
        return
    rows = found.table["image_id"].to_pylist()
    notes = " ".join(found.notes)
    dropped = set(stems) - set(rows)
    assert f"not used: {len(dropped)} image" in notes or not dropped
    whole = {stem.split("_")[0] for stem in stems} - {stem.split("_")[0] for stem in rows}
    assert f"{len(whole)} participant" in notes or not whole

    # What a refusal advises is accepted, and leaves nobody without an image but as many as it says.
    try:
        find_bids_images(str(root), "T1w", "")
    except UsageError as e:
        flags = re.findall(r"--entity (?!KEY=)(\w+)=(\S*?)(?=[ ,])", str(e).partition("Choose with ")[2])
        advised: dict[str, list[str]] = {}
        for key, label in flags:
            advised.setdefault(key, []).append(label)
        if advised:
            followed = find_bids_images(str(root), "T1w", "", entities=advised)
            lost = re.search(r"leaves (\d+) of", str(e))
            assert followed.table.num_rows == len(sessions) - int(lost[1] if lost else 0)


# Where it is written


@pytest.mark.parametrize("name", ["m.tsv", "m.csv", "m.jsonl", "m.parquet"])
def test_every_format_is_read_back(name: str, study: Path, capsys: Capture) -> None:
    out = str(study / name)
    arguments = ["manifest", "bids", str(study), "--suffix=T1w", "--label=age", "--out", out]
    assert cli.main(arguments) == cli.SUCCESS
    assert capsys.readouterr().out == f"manifest 3 images: {out}\n"
    rows = read_table(out).to_pylist()
    assert rows[1] == {"participant_id": "sub-02", "path": "sub-02/anat/sub-02_T1w.nii.gz", "label": "42.5"}
    before = (study / name).read_bytes()
    assert "already exists" in error_of(capsys, *arguments[1:])
    assert (study / name).read_bytes() == before
    assert cli.main([*arguments, "--overwrite"]) == cli.SUCCESS
    assert (study / name).read_bytes() == before


def test_paths_are_relative_only_below_the_manifest(study: Path, tmp_path: Path) -> None:
    for out, expected in (
        (tmp_path / "m.tsv", "study/sub-01/anat/sub-01_T1w.nii.gz"),
        (tmp_path / "other/m.tsv", f"{study}/sub-01/anat/sub-01_T1w.nii.gz"),
    ):
        assert cli.main(["manifest", "bids", str(study), "--suffix=T1w", "--out", str(out)]) == cli.SUCCESS
        assert read_table(str(out))["path"][0].as_py() == expected


def test_another_ending_is_refused(study: Path, capsys: Capture) -> None:
    out = study / "m.xlsx"
    assert "use one of these endings" in error_of(
        capsys, "bids", str(study), "--suffix=T1w", "--out", str(out)
    )
    assert not out.exists()


# Patterns


def test_a_pattern_finds_what_matches(study: Path, capsys: Capture) -> None:
    rows, _ = rows_of(capsys, "glob", f"{study}/sub-*/**/*_T1w.nii.gz")
    assert [row["participant_id"] for row in rows] == ["sub-01", "sub-02", "sub-03"]
    assert names(rows) == [f"sub-0{i}_T1w.nii.gz" for i in (1, 2, 3)]
    assert list(rows[0]) == ["participant_id", "path"]
    paths = [row["path"] for row in rows]
    again, _ = rows_of(capsys, "glob", *reversed(paths), paths[0])
    assert [row["path"] for row in again] == paths


def test_participants_and_sessions_are_those_of_the_path(tmp_path: Path, capsys: Capture) -> None:
    touch(tmp_path, "sub-study/sub-1/ses-a/T1w.nii", "sub-study/sub-1/ses-b/T1w.nii", "sub-study/sub-2/x.nii")
    rows, _ = rows_of(capsys, "glob", f"{tmp_path}/**/*.nii")
    ids = [(row["participant_id"], row["session_id"]) for row in rows]
    assert ids == [("sub-1", "ses-a"), ("sub-1", "ses-b"), ("sub-2", "")]
    touch(tmp_path, "plain/b.nii", "plain/a.nii.gz")
    rows, _ = rows_of(capsys, "glob", f"{tmp_path}/plain/*")
    assert [list(row) for row in rows] == [["path"]] * 2
    assert names(rows) == ["a.nii.gz", "b.nii"]


PAIRS = ("sub-1/anat/sub-1_T1w.hdr", "sub-1/anat/sub-1_T1w.img", "sub-2/anat/sub-2_T1w.img.gz")
OTHERS = ("sub-3/anat/sub-3_T1w.mgz", "sub-4/anat/sub-4_T1w.mgh.gz", "sub-5/anat/sub-5_T1w.nii.zst")


def test_every_container_is_found_and_a_pair_once(tmp_path: Path, capsys: Capture) -> None:
    touch(tmp_path, *PAIRS, *OTHERS, "sub-2/anat/sub-2_T1w.hdr.bz2", "sub-6_T1w.HDR", "sub-6_T1w.IMG")
    wanted = ["sub-1_T1w.hdr", "sub-2_T1w.hdr.bz2", *(Path(name).name for name in OTHERS)]
    for command in (["bids", str(tmp_path), "--suffix=T1w"], ["glob", f"{tmp_path}/*/**/*_T1w*"]):
        rows, notes = rows_of(capsys, *command, "--all-images")
        assert names(rows) == wanted
        assert [Path(row["image_id"]).name for row in rows] == [f"sub-{i}_T1w" for i in range(1, 6)]
        outside = "not used: 1 image (sub-6_T1w.HDR) outside the folders of BIDS"
        assert notes == ([outside] if command[0] == "bids" else [])
    for pattern, found in (("*.img*", ["sub-1_T1w.img", "sub-2_T1w.img.gz"]), ("*.hdr", ["sub-1_T1w.hdr"])):
        assert names(rows_of(capsys, "glob", f"{tmp_path}/**/{pattern}")[0]) == found
    assert names(rows_of(capsys, "glob", f"{tmp_path}/sub-6*")[0]) == ["sub-6_T1w.HDR"]
    touch(tmp_path, "sub-1/anat/sub-1_T1w.nii")
    assert "sub-1_T1w.nii have the same name" in error_of(capsys, "bids", str(tmp_path), "--suffix=T1w")


def test_errors_of_patterns(study: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "no file matches" in error_of(capsys, "glob", f"{tmp_path}/*.nii.gz")
    assert "3 files without an image's ending" in error_of(capsys, "glob", f"{study}/sub-*/anat/sub*")
    assert "1 path does not name a participant" in error_of(
        capsys, "glob", f"{study}/**/*.nii.gz", f"{study}/*.nii.gz"
    )
    said = error_of(capsys, "glob", f"{study}/sub-*/*/*.nii.gz")
    assert "1 session has several images" in said
    rows, _ = rows_of(capsys, "glob", f"{study}/sub-01/*/*.nii.gz", "--all-images")
    assert [row["image_id"] for row in rows] == [row["path"].removesuffix(".nii.gz") for row in rows]


# On an object store


@pytest.fixture
def remote() -> Iterator[str]:
    from tests.object_store import MemoryFileSystem

    MemoryFileSystem.objects.clear()
    yield "memory://bucket/lab"
    MemoryFileSystem.objects.clear()


def test_a_study_on_an_object_store_gives_the_same(study: Path, remote: str, capsys: Capture) -> None:
    from tests.object_store import MemoryFileSystem

    for path in study.rglob("*"):
        if path.is_file():
            MemoryFileSystem.objects[f"{remote}/{path.relative_to(study)}"] = path.read_bytes(), 1.0
    flags = ["--suffix=T1w", "--label=age"]
    here, _ = rows_of(capsys, "bids", str(study), *flags)
    there, _ = rows_of(capsys, "bids", remote, *flags)
    assert [row | {"path": row["path"].replace(remote, str(study))} for row in there] == here
    for pattern in ("sub-*/**/*_T1w.nii.gz", "**/sub-0[12]_T1w.nii.gz", "sub-01/anat/sub-01_T1w.nii.gz"):
        here, _ = rows_of(capsys, "glob", f"{study}/{pattern}", "--all-images")
        there, _ = rows_of(capsys, "glob", f"{remote}/{pattern}", "--all-images")
        assert [row["path"].replace(remote, str(study)) for row in there] == [row["path"] for row in here]
    assert cli.main(["manifest", "bids", remote, *flags, "--out", f"{remote}/m.tsv"]) == cli.SUCCESS
    assert read_table(f"{remote}/m.tsv")["path"][0].as_py() == "sub-01/anat/sub-01_T1w.nii.gz"


# And then


def test_a_build_takes_the_manifest_as_it_is(tmp_path: Path, capsys: Capture) -> None:
    study, manifest, dataset = tmp_path / "study", tmp_path / "manifest.tsv", tmp_path / "dataset"
    lines = []
    for i in range(6):
        for run in (1, 2):
            name = f"sub-0{i}/ses-1/anat/sub-0{i}_ses-1_run-{run}_T1w.nii.gz"
            write_image(study / name, brain(seed=2 * i + run))
        lines.append(f"sub-0{i} {20 + i} {'MF'[i % 2]}")
    write_tsv(study / "participants.tsv", "participant_id age sex", *lines)
    (study / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.10.0"}))
    flags = ["--suffix=T1w", "--label=age", "--column=sex", "--out", str(manifest)]
    assert cli.main(["manifest", "bids", str(study), *flags, "--entity=run=2"]) == cli.SUCCESS
    split = ["--split=train=0.5,test=0.5", "--stratify=sex", "--workers=1", "--quiet"]
    assert cli.main(["build", str(manifest), str(dataset), *split]) == cli.SUCCESS
    info = read_info(str(dataset))
    tables = [read_index(str(dataset / shard.index))[0] for shard in info.shards]
    rows = sorted(pa.concat_tables(tables).to_pylist(), key=lambda row: str(row["example_id"]))
    assert [(row["example_id"], row["label"], row["sex"]) for row in rows] == [
        (f"sub-0{i}_ses-1", 20.0 + i, "MF"[i % 2]) for i in range(6)
    ]
    assert verify_dataset(str(dataset), manifest=str(manifest), deep=6).problems == ()
    assert cli.main(["manifest", "bids", str(study), *flags, "--all-images", "--overwrite"]) == cli.SUCCESS
    capsys.readouterr()
    assert cli.main(["build", str(manifest), str(tmp_path / "all"), "--dry-run", "--id-column=image_id"]) == 0
    assert "volumes  12 of" in capsys.readouterr().out


def test_links_that_lead_back_are_followed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in "abcdefgh":
        write_image(tmp_path / f"study/{folder}/{folder}.nii")
    for folder in "abcdefgh":
        for other in "abcdefgh":
            (tmp_path / f"study/{folder}/to_{other}").symlink_to(f"../{other}")
    (tmp_path / "study/up").symlink_to("..")
    (tmp_path / "study/itself").symlink_to("itself")
    write_image(tmp_path / "elsewhere/i.nii")
    (tmp_path / "study/other").symlink_to("../elsewhere")
    found = [f"{tmp_path}/study/{folder}/{folder}.nii" for folder in "abcdefgh"]
    rows, _ = rows_of(capsys, "glob", f"{tmp_path}/study/**/*.nii")
    assert [row["path"] for row in rows] == [*found, f"{tmp_path}/study/other/i.nii"]


def test_patterns_match_what_they_match_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.x", "s/a.x", "s/t/a.x", "s/.h/a.x", ".h/t/a.x", "s/t/u/b.x", "s/t/.a.x", "[s]/a.x"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    patterns = ["**/*.x", "**", "s/**", "*/**/a.x", "**/t/**/*.x", "**/.h/*", "**/.*", ".h/**", "./**/b.x"]
    patterns += [f"{tmp_path}/**/t/*", "s/**/**/a.x", "none/**/*.x", "[[]s]/**", "**/u/**"]
    for pattern in patterns:
        found = glob.glob(pattern, recursive=True)  # noqa: PTH207
        expected = sorted({path for path in found if Path(path).is_file()})
        assert storage.glob(pattern) == expected, pattern


def test_names_that_are_no_text_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tmp_path / "sub-1/anat"
    write_image(study / os.fsdecode(b"sub-1_acq-\xff_T1w.nii"))
    assert r"sub-1_acq-\xff_T1w.nii' is not UTF-8 text" in error_of(capsys, "glob", f"{tmp_path}/**/*.nii")
