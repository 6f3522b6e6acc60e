"""Manifests with the columns of another table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.cli import main as cli
from beam_nifti.manifest.discovery import FoundImages
from beam_nifti.manifest.joining import Join, join_table
from beam_nifti.manifest.tables import read_table, write_table
from tests.images import write_manifest
from tests.manifest.test_discovery import error_of, rows_of, touch, write_tsv

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_manifest(
        tmp_path / "m.tsv",
        [{"participant_id": f"sub-{i}", "session_id": "ses-1", "path": f"{i}.nii"} for i in ("1", "2", "10")],
    )


def clinic(folder: Path, *lines: str, name: str = "clinic.tsv") -> str:
    write_tsv(folder / name, *lines)
    return str(folder / name)


ON = ["--on=participant_id=Subject", "--join-columns=age=Age,sex"]


def test_chosen_columns_are_added_and_renamed(manifest: Path, capsys: Capture) -> None:
    file = clinic(manifest.parent, "Subject Age sex income", "10 81 F 1", "sub-2 7 M 2", "1 30.50 F 3")
    rows, notes = rows_of(capsys, "table", str(manifest), f"--join={file}", *ON)
    assert rows == [
        {"participant_id": f"sub-{i}", "session_id": "ses-1", "path": f"{i}.nii", "age": age, "sex": sex}
        for i, age, sex in (("1", "30.50", "F"), ("2", "7", "M"), ("10", "81", "F"))
    ]
    assert notes == []


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_every_format_is_joined(ending: str, manifest: Path) -> None:
    table = pa.table({"Subject": ["1", "2", "10"], "Age": ["1", "2", "3"], "sex": ["", "F", "M"]})
    write_table(f"{manifest.parent}/t.{ending}", table)
    out = manifest.parent / f"joined.{ending}"
    words = ["table", str(manifest), f"--join={manifest.parent}/t.{ending}", *ON, f"--out={out}"]
    assert cli.main(["manifest", *words]) == cli.SUCCESS
    assert read_table(str(out))["sex"].to_pylist() == ["", "F", "M"]


def test_rows_without_a_partner_are_named(manifest: Path, capsys: Capture) -> None:
    file = clinic(manifest.parent, "Subject Age sex", "01 30 F", "2 7 M", "3 1 M", "n/a 1 F")
    words = ["table", str(manifest), f"--join={file}", *ON]
    said = error_of(capsys, *words)
    assert f"row 1: sub-1 is not in {file}" in said
    assert f"row 3: sub-10 is not in {file}" in said
    assert "possibly the same id: 01 for sub-1; ids must match exactly" in said
    assert "choose with --unmatched keep or --unmatched skip" in said
    kept, notes = rows_of(capsys, *words, "--unmatched=keep")
    assert [row["age"] for row in kept] == ["n/a", "7", "n/a"]
    assert notes == [
        f"not used: 1 row of {file} without Subject",
        f"n/a in the columns of {file}: 2 rows (sub-1, sub-10) without a match in {file}",
        "possibly the same id: 01 for sub-1; ids must match exactly",
        f"not used: 2 ids (01, 3) of {file} that the manifest does not have",
    ]
    skipped, notes = rows_of(capsys, *words, "--unmatched=skip")
    assert skipped == kept[1:2]
    assert f"not used: 2 rows (sub-1, sub-10) without a match in {file}" in notes


def test_an_id_with_two_values_is_refused_and_one_with_two_equal_rows_is_not(
    manifest: Path, capsys: Capture
) -> None:
    lines = ["Subject Age sex note", "1 30 F x", "2 7 M x", "10 1 M x", "sub-2 7 M y"]
    file = clinic(manifest.parent, *lines)
    rows, _ = rows_of(capsys, "table", str(manifest), f"--join={file}", *ON)
    assert [row["age"] for row in rows] == ["30", "7", "1"]
    file = clinic(manifest.parent, *lines[:-1], "2 8 M x")
    said = error_of(capsys, "table", str(manifest), f"--join={file}", *ON)
    assert "clinic.tsv: 2 is in rows 2 and 4 with different values; remove one of them, or give a" in said


def test_ids_of_several_columns(manifest: Path, capsys: Capture) -> None:
    lines = [f"{i} {visit} {i}{visit}" for i in ("1", "2", "10") for visit in ("1", "2")]
    file = clinic(manifest.parent, "Subject Visit Age", *lines)
    on = ["--on=participant_id=Subject,session_id=Visit", "--join-columns=Age"]
    rows, _ = rows_of(capsys, "table", str(manifest), f"--join={file}", *on)
    assert [row["Age"] for row in rows] == ["11", "21", "101"]


def test_every_source_can_be_joined(tmp_path: Path, capsys: Capture) -> None:
    touch(tmp_path, "study/sub-1/anat/sub-1_T1w.nii", "study/sub-2/anat/sub-2_T1w.nii")
    file = clinic(tmp_path, "participant_id label", "sub-1 5", "sub-2 6")
    flags = [f"--join={file}", "--on=participant_id", "--join-columns=label"]
    for source in (["bids", f"{tmp_path}/study", "--suffix=T1w"], ["glob", f"{tmp_path}/study/**/*.nii"]):
        rows, _ = rows_of(capsys, *source, *flags)
        assert [row["label"] for row in rows] == ["5", "6"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--on=subject", "--join-columns=Age"], "the manifest: no column 'subject'; the columns are: part"),
        (
            ["--on=participant_id", "--join-columns=Age"],
            "no column 'participant_id'; the columns are: Subject",
        ),
        ([ON[0], "--join-columns=age"], "no column 'age'; the columns are: Subject, Age, path"),
        ([ON[0], "--join-columns=path"], "the manifest has a column 'path' already; rename it as NEW=path"),
        ([ON[0], "--join-columns=Age,Age"], "which names 'Age' twice"),
        ([ON[0], "--join-columns=Age,"], "--join-columns is 'Age,'; give names of columns"),
        ([ON[0], "--join-columns=Age", "--unmatched=skip"], "no row of the manifest matches"),
    ],
)
def test_errors(flags: list[str], said: str, manifest: Path, capsys: Capture) -> None:
    file = clinic(manifest.parent, "Subject Age path", "9 30 x")
    assert said in error_of(capsys, "table", str(manifest), f"--join={file}", *flags)


def test_options_that_lack_another(manifest: Path, capsys: Capture) -> None:
    pattern = f"{manifest.parent}/*.nii"
    assert "--join requires --on" in error_of(capsys, "glob", pattern, "--join=x.tsv")
    assert "--unmatched requires --join" in error_of(capsys, "glob", pattern, "--unmatched=skip")
    assert "required: --join, --on, --join-columns" in error_of(capsys, "table", str(manifest))


def test_no_input_is_replaced_and_paths_stay_true(manifest: Path, tmp_path: Path, capsys: Capture) -> None:
    file = clinic(tmp_path, "Subject Age sex", "1 1 F", "2 1 F", "10 1 F")
    words = ["table", str(manifest), f"--join={file}", *ON, "--overwrite"]
    assert "which is MANIFEST" in error_of(capsys, *words, f"--out={manifest}")
    assert "which is the table of --join" in error_of(capsys, *words, f"--out={file}")
    said = error_of(capsys, *words, f"--out={tmp_path}/other/m.tsv")
    assert f"paths in MANIFEST are relative to {tmp_path}; write it there" in said
    assert "none.tsv: no such file" in error_of(capsys, "table", "none.tsv", *words[2:])


IDS = st.lists(st.sampled_from(["a", "b", "c", "d", "n/a"]), min_size=1, max_size=6)


@given(IDS, st.lists(st.sampled_from(["a", "b", "e", ""]), unique=True, max_size=4), st.booleans())
def test_it_is_a_left_or_inner_join_of_pandas(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str], others: list[str], keeps: bool
) -> None:
    left = pa.table({"id": ids, "row": [str(i) for i in range(len(ids))]})
    right = {"id": others, "value": [f"v{i}" for i in range(len(others))]}
    path = tmp_path_factory.mktemp("join") / "t.parquet"
    write_table(str(path), pa.table({name: pa.array(cells, pa.string()) for name, cells in right.items()}))
    known = pd.DataFrame(right, dtype=object)
    expected = left.to_pandas().merge(known[known.id != ""], "left" if keeps else "inner", "id").fillna("n/a")
    join = Join(str(path), (("id", "id"),), (("value", "value"),), "keep" if keeps else "skip")
    if expected.empty:
        return
    assert join_table(FoundImages(left, ()), join).table.to_pylist() == expected.to_dict("records")
