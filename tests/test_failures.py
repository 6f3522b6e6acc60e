"""failures.jsonl: complete, in order, and a manifest itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from beam_nifti.config import Columns
from beam_nifti.failures import Failure, write_failures
from beam_nifti.manifest import Manifest, VolumeRow, read_manifest

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
