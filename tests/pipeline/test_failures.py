"""failures.jsonl: complete, in order, and a manifest itself."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.config import Columns
from beam_nifti.manifest import Manifest, VolumeRow, read_manifest
from beam_nifti.pipeline.failures import (
    Failure,
    accepting_fraction,
    format_groups,
    group_failures,
    own_key,
    write_failures,
)
from tests.images import write_manifest

MANIFEST = """scan,file,age,participant_id,session_id,split,site,message
x1,a.nii,31,s1,01,train,Zürich,ok
x2,/b.nii,32.5,s2,,test,,ok
x3,s3://b/c.nii,33,s3,02,train,Basel,ok
"""


def failures_of(manifest: Manifest, stage: str = "LoadVolume") -> list[Failure]:
    rows = manifest.rows(range(len(manifest)))
    return [Failure(r, stage, "VolumeError", f'{r.path}: "broken"\n') for r in reversed(rows)]


def write(path: Path, manifest: Manifest, failures: list[Failure]) -> list[dict[str, object]]:
    write_failures(str(path), failures, manifest.folder, manifest.columns, manifest.extra_columns)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("columns", [Columns("file", "age", "scan"), Columns("file")])
def test_it_is_the_manifest_of_a_retry(tmp_path: Path, columns: Columns) -> None:
    (tmp_path / "m.csv").write_text(MANIFEST)
    first = read_manifest(str(tmp_path / "m.csv"), columns)
    lines = write(tmp_path / "out" / "failures.jsonl", first, failures_of(first))
    assert [line["row"] for line in lines] == [1, 2, 3]
    assert [line["file"] for line in lines] == [f"{tmp_path}/a.nii", "/b.nii", "s3://b/c.nii"]
    retry = read_manifest(str(tmp_path / "out" / "failures.jsonl"), columns)

    def kept(row: VolumeRow) -> VolumeRow:
        return replace(row, path="", extras=())

    again = retry.rows(range(len(retry)))
    assert list(map(kept, again)) == list(map(kept, first.rows([0, 1, 2])))
    for column in set(first.extra_columns) - {"message"}:
        assert retry.table[column].to_pylist() == first.table[column].to_pylist()


def test_a_failure_of_a_retry_tells_the_last_reason(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(MANIFEST)
    first = read_manifest(str(tmp_path / "m.csv"), Columns("file"))
    (line, *_) = write(tmp_path / "f.jsonl", first, failures_of(first, "LoadVolume"))
    assert (line["stage"], line["message"]) == ("LoadVolume", 'a.nii: "broken"\n')
    retry = read_manifest(str(tmp_path / "f.jsonl"), Columns("file"))
    lines = write(tmp_path / "g.jsonl", retry, failures_of(retry, "Rescale")[:1])
    assert [(li["row"], li["stage"], li["error"]) for li in lines] == [(3, "Rescale", "VolumeError")]
    assert lines[0]["message"] == 's3://b/c.nii: "broken"\n'


NAMES = ["row", "stage", "frames", "note", "session_id", "failure_stage"]
NAMES += [f"manifest_{name}" for name in NAMES] + ["manifest_manifest_row"]


@given(
    names=st.lists(st.sampled_from(NAMES), unique=True),
    roles=st.permutations(NAMES),
    num_labels=st.integers(0, 3),
    image=st.sampled_from(["path", "row", "stage", "frames", "message", "failure_stage"]),
)
def test_no_cell_is_lost_however_often_failures_are_retried(
    tmp_path_factory: pytest.TempPathFactory,
    names: list[str],
    roles: list[str],
    num_labels: int,
    image: str,
) -> None:
    folder = tmp_path_factory.mktemp("retries")
    names = [name for name in names if name != image]
    labels = [name for name in roles if name in names][:num_labels]
    columns = Columns(image, label=",".join(f"{name}:string" for name in labels) or None)
    own = {name: f"{name} of two" for name in names}
    rows = [{image: f"{i}.nii"} | {name: f"{cell} {i}" for name, cell in own.items()} for i in range(3)]
    manifest = read_manifest(str(write_manifest(folder / "0.tsv", rows)), columns)
    for number in range(1, 4):
        failed = [f for f in failures_of(manifest) if f.row.path.endswith("2.nii")]
        (line,) = write(folder / f"{number}.jsonl", manifest, failed)
        assert {f"{cell} 2" for cell in own.values()} <= set(line.values())
        assert {name: line[name] for name in labels} == {name: f"{own[name]} 2" for name in labels}
        assert line[image] == f"{folder}/2.nii"
        found = {key: line[own_key(key, columns)] for key in ("row", "stage", "error")}
        (failure,) = failed
        assert found == {"row": failure.row.row, "stage": failure.stage, "error": failure.error}
        manifest = read_manifest(str(folder / f"{number}.jsonl"), columns)


def test_a_retry_of_a_retry_knows_the_row_of_the_first_manifest(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(MANIFEST)
    manifest = read_manifest(str(tmp_path / "m.csv"), Columns("file"))
    for name in ("f", "g", "h"):
        (*_, line) = write(tmp_path / f"{name}.jsonl", manifest, failures_of(manifest)[:1])
        manifest = read_manifest(str(tmp_path / f"{name}.jsonl"), Columns("file"))
    assert (line["row"], line["manifest_row"], line["manifest_manifest_row"]) == (1, "1", "3")


def test_a_retry_of_a_retry_has_each_path_once(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("T1,T2,mask,site\na.nii,b.nii,c.nii,Jena\n")
    columns = Columns("T1,T2", mask="mask")
    manifest = read_manifest(str(tmp_path / "m.csv"), columns)
    for name in ("f", "g", "h"):
        (line,) = write(tmp_path / f"{name}.jsonl", manifest, failures_of(manifest))
        found = {key: cell for key, cell in line.items() if str(cell).endswith(".nii")}
        assert found == {key: f"{tmp_path}/{of}.nii" for key, of in zip(columns.files, "abc", strict=True)}
        assert line["site"] == "Jena"
        manifest = read_manifest(str(tmp_path / f"{name}.jsonl"), columns)


def test_the_path_stays_whole_where_it_is_the_id(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path\na.nii\n")
    manifest = read_manifest(str(tmp_path / "m.csv"), Columns(id="path"))
    (line,) = write(tmp_path / "out" / "failures.jsonl", manifest, failures_of(manifest))
    assert line["path"] == f"{tmp_path}/a.nii"


def test_a_manifest_of_paths_alone(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path\na.nii\n")
    manifest = read_manifest(str(tmp_path / "m.csv"))
    (line,) = write(tmp_path / "f.jsonl", manifest, failures_of(manifest))
    assert set(line) == {"row", "stage", "error", "message", "path", "split"}


# On the screen


def failure(number: int, message: str, error: str = "VolumeError", **fields: Any) -> Failure:
    row = VolumeRow(number, f"sub-{number}", f"{number}.nii", **fields)
    return Failure(row, "LoadVolume", error, message)


def test_reasons_are_counted_without_the_names_and_numbers_in_them() -> None:
    found = [
        failure(n, f"{n}.nii: truncated: {n} bytes where shape (6, 5) needs 60; copy it") for n in range(9)
    ]
    found += [failure(20 + n, f"2{n}.nii: all voxels are {n}:\n a constant image") for n in range(3)]
    found.append(failure(40, "40.nii: all voxels are 7:\n a constant image", error="OtherError"))
    groups = group_failures(reversed(found))
    assert format_groups(groups, 13) == [
        "9 × LoadVolume VolumeError: truncated: … bytes where shape (6, 5) needs 60; copy it "
        "(0.nii, 1.nii, 2.nii and 6 more)",
        "3 × LoadVolume VolumeError: all voxels are …: a constant image (20.nii, 21.nii, 22.nii)",
        "1 × LoadVolume OtherError: all voxels are 7: a constant image (40.nii)",
    ]


def test_a_name_makes_no_line_of_its_own() -> None:
    named = Failure(VolumeRow(1, "a", "a\nb.nii"), "LoadVolume", "VolumeError", "a\nb.nii: is not there")
    assert format_groups(group_failures([named]), 1) == [
        r"1 × LoadVolume VolumeError: is not there (a\nb.nii)"
    ]


def test_the_file_at_fault_is_named() -> None:
    """It may be a mask or a further channel; a name is shown where all messages of a group have it."""
    files = {"other_files": ("t2/1.nii", "mask/1.nii")}
    found = [
        failure(1, "mask/1.nii: shape (9, 9, 10) where 1.nii has (8, 9, 10)", **files),
        failure(2, "t2/2.nii: not found", other_files=("t2/2.nii",)),
        failure(3, "t2/3.nii: not found", other_files=("t2/3.nii",)),
        failure(4, "4.nii: not found", other_files=("t2/4.nii",)),
    ]
    assert format_groups(group_failures(found), 4) == [
        "3 × LoadVolume VolumeError: not found (t2/2.nii, t2/3.nii, 4.nii)",
        "1 × LoadVolume VolumeError: shape (9, 9, 10) where 1.nii has (8, 9, 10) (mask/1.nii)",
    ]
    found.append(
        failure(5, "mask/5.nii: shape (9, 9, 9) where 5.nii has (8, 9, 10)", other_files=("mask/5.nii",))
    )
    assert format_groups(group_failures(found), 5)[1] == (
        "2 × LoadVolume VolumeError: shape (9, 9, …) where … has (8, 9, 10) (mask/1.nii, mask/5.nii)"
    )


def test_an_ellipsis_in_a_message_is_no_number() -> None:
    found = [failure(1, "1.nii: truncated (…)"), failure(2, "2.nii: truncated (7)")]
    assert [group.message for group in group_failures(found)] == ["truncated (…)", "truncated (7)"]


def test_anonymous_images_are_named_by_their_rows_and_frames_by_their_image() -> None:
    hidden = failure(7, "ab12: truncated", pseudonyms=("ab12",))
    frames = [failure(8, "8.nii: all voxels are 0", frame=t, position=t) for t in range(4)]
    assert format_groups(group_failures([hidden, *frames]), 5) == [
        "4 × LoadVolume VolumeError: all voxels are 0 (8.nii)",
        "1 × LoadVolume VolumeError: truncated (row 7)",
    ]


@given(st.lists(st.tuples(st.integers(0, 9), st.text("ab1", max_size=2)), max_size=40))
def test_every_failure_is_counted_once(made: list[tuple[int, str]]) -> None:
    failures = [failure(number, f"{number}.nii: {text}") for number, text in made]
    groups = group_failures(failures)
    lines = format_groups(groups, len(failures))
    assert sum(int(line.split(" × ")[0]) for line in lines) == len(failures)
    assert len(lines) <= 6
    counts = [group.num_volumes for group in groups]
    assert counts == sorted(counts, reverse=True)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_the_fraction_accepts_the_failures_and_hardly_more(one: int, other: int) -> None:
    num_failed, total = sorted((one, other))
    fraction = Fraction(accepting_fraction(num_failed, total))
    assert num_failed <= fraction * total
    assert 1 >= fraction <= Fraction(num_failed, total) * Fraction(11, 10)
