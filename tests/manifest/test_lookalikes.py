"""Lookalikes: one participant under two names is reported, and is never in two splits."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.config import Columns, Splitting
from beam_nifti.errors import ManifestError
from beam_nifti.manifest import Manifest, read_manifest
from beam_nifti.manifest.lookalikes import find_lookalikes, fold
from beam_nifti.manifest.pseudonyms import Pseudonyms
from tests.images import write_image, write_manifest

KEY = Pseudonyms(b"0123456789abcdef")
SPELLINGS = {
    "case": str.upper,
    "NFD": lambda name: unicodedata.normalize("NFD", name),
    "space": lambda name: f" {name}\u3000",
    "no width": lambda name: f"{name[:2]}\u200b{name[2:]}",
    "no-break": lambda name: f"{name}\xa0",
    "zeros": lambda name: name.replace("-", "-00"),
    "quotes": lambda name: f'"{name}"',
}


def manifest_of(folder: Path, header: str, *rows: str, **given: object) -> Manifest:
    """Read a manifest of rows whose cells are divided by bars; paths are added."""
    text = "\n".join("\t".join(line.split("|")) for line in [f"path|{header}", *rows])
    (folder / "m.tsv").write_text(text + "\n")
    return read_manifest(str(folder / "m.tsv"), **given)  # type: ignore[arg-type]


def problems_of(folder: Path, header: str, *rows: str, **given: object) -> tuple[str, ...]:
    with pytest.raises(ManifestError) as caught:
        manifest_of(folder, header, *rows, **given)
    return caught.value.problems


@given(st.lists(st.sampled_from(["", "a1", "A1", "a01", "a10", " a1", "b", "ß", "\u1e9e", "1", "1.0", "10"])))
def test_lookalikes_are_those_of_a_plain_loop(names: list[str]) -> None:
    expected = []
    for i, name in enumerate(names):
        alike = [j for j in range(i) if names[j] and fold(pa.array([names[j], name])).unique().__len__() == 1]
        if name and name not in names[:i] and alike:
            expected.append((i, alike[0]))
    assert find_lookalikes(pa.array(names, pa.string())) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [("sub-1", "sub-10"), ("1.05", "1.5"), ("a-1", "b-1"), ("a01b", "a1b"), ("0", "00a"), ("x.0", "x")],
)
def test_names_that_are_two(one: str, other: str) -> None:
    assert find_lookalikes(pa.array([one, other])) == []


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_participant_is_never_in_two_splits(tmp_path: Path, spelling: str) -> None:
    one, other = "süb-7", SPELLINGS[spelling]("süb-7")
    rows = (f"a.nii|1|{one}|train", f"b.nii|2|{other}|test")
    columns = "session_id|participant_id|split"
    (problem,) = problems_of(tmp_path, columns, *rows)
    assert problem.startswith(f"row 2: participant {other.strip()} is in split test, and ")
    assert "in train; give all rows of a participant one split" in problem
    (hidden,) = problems_of(tmp_path, columns, *rows, pseudonyms=KEY)
    assert "in row 1" in hidden
    assert "7" not in hidden.replace(KEY.of(one, "participant_id"), "").replace(
        KEY.of(other.strip(), "participant_id"), ""
    )


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("pseudonyms", [None, KEY])
def test_one_participant_is_drawn_once(tmp_path: Path, spelling: str, pseudonyms: Pseudonyms | None) -> None:
    one, other = "süb-7", SPELLINGS[spelling]("süb-7")
    rows = (f"a.nii|1|{one}", "c.nii|1|süb-8", f"b.nii|2|{other}")
    splitting = Splitting({"train": 0.999, "test": 0.001})
    given = {"splitting": splitting, "pseudonyms": pseudonyms}
    if spelling in ("space", "no-break"):  # which are removed before anything is hashed
        given["splitting"] = Splitting({"train": 1})
        ids = manifest_of(tmp_path, "session_id|participant_id", *rows, **given).rows([0, 2])
        assert ids[0].participant_id == ids[1].participant_id
        return
    problem = problems_of(tmp_path, "session_id|participant_id", *rows, **given)[0]
    assert problem.startswith("row 3: its participant_id")
    assert "of row 1 only in letter case" in problem
    assert ("süb-7" in problem) == (pseudonyms is None)


def test_lookalikes_of_one_split_are_reported(tmp_path: Path) -> None:
    rows = [f"{i}.nii|{name}" for i, name in enumerate(["s1", "S1", "s2", "s01", "S01", "S2"])]
    warnings = manifest_of(tmp_path, "participant_id", *rows).warnings
    assert len(warnings) == 4
    assert warnings[0] == (
        "row 2: its participant_id 'S1' differs from 's1' of row 1 only in letter case, quotes, spaces, "
        "leading zeros or the Unicode form; if they are the same, spell them alike"
    )
    assert (
        warnings[3]
        == "in all, 4 different values of participant_id differ from an earlier one only in this way"
    )
    hidden = manifest_of(tmp_path, "participant_id", *rows, pseudonyms=KEY).warnings
    assert hidden[0].startswith("row 2: its participant_id differs from that of row 1 only in letter case")


def test_ids_and_sessions_have_lookalikes_too(tmp_path: Path) -> None:
    columns = "participant_id|session_id"
    (warning,) = manifest_of(tmp_path, columns, "a|s1|1", "b|s1|01", "c|s2|1").warnings
    assert warning.startswith("row 2: its id 's1_01' differs from 's1_1' of row 1")
    (warning,) = manifest_of(tmp_path, "scan", "a|x", "b|X", columns=Columns(id="scan")).warnings
    assert warning.startswith("row 2: its id 'X' differs from 'x' of row 1")
    assert manifest_of(tmp_path, columns, "a|s1|1", "b|s1|2", "c|s2|1").warnings == ()


@pytest.mark.parametrize(
    ("name", "is_told"), [("7.0", True), ("1.23E+11", True), ("7", False), ("1e5", False)]
)
def test_ids_that_a_spreadsheet_has_rewritten_are_reported(tmp_path: Path, name: str, is_told: bool) -> None:
    rows = ("a.nii|s1", f"b.nii|{name}")
    warnings = manifest_of(tmp_path, "participant_id", *rows).warnings
    assert [w.startswith(f"row 2: its participant_id {name} looks like a number") for w in warnings] == (
        [True] if is_told else []
    )
    hidden = manifest_of(tmp_path, "participant_id", *rows, pseudonyms=KEY).warnings
    assert not any(name in warning for warning in hidden)


def test_one_split_under_two_names_is_refused(tmp_path: Path) -> None:
    problems = problems_of(tmp_path, "split", "a.nii|train", "b.nii|Train")
    assert problems == ("row 2: split is 'Train', and 'train' in row 1; give them one spelling",)


def test_classes_that_are_probably_one_are_reported(tmp_path: Path) -> None:
    columns = Columns(label="sex:class")
    rows = ("a.nii|Male", "b.nii|male ", "c.nii|F", "d.nii|NA")
    manifest = manifest_of(tmp_path, "sex", *rows, columns=columns)
    assert manifest.label_columns[0].classes == ("F", "Male", "NA", "male")
    stripped, missing, lookalikes = sorted(manifest.warnings)
    assert stripped.startswith("1 cell was read without the white space at the ends")
    assert missing.startswith("sex has a class 'NA'; if that means no value, write n/a")
    assert lookalikes.startswith("sex has the classes 'Male' and 'male', which differ only in letter case")


@pytest.mark.parametrize("command", ["build", "check"])
def test_build_and_check_report_each_warning_once(
    tmp_path: Path, command: str, run: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        write_image(tmp_path / f"{name}.nii")
    rows = [{"path": "a.nii ", "participant_id": "s1"}, {"path": "b.nii", "participant_id": "S1"}]
    manifest = write_manifest(tmp_path / "m.csv", rows)
    said = run(command, manifest, *([tmp_path / "out"] if command == "build" else []))
    assert said.count("1 cell was read without the white space at the ends, such as 'path' of row 1") == 1
    assert said.count("participant_id 'S1' differs from 's1' of row 1") == 1
    if command == "build":
        again = run("verify", tmp_path / "out", "--manifest", manifest, "--deep", "all")
        assert "2 rebuilt from their images" in again
