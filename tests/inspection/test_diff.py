"""The examples and options that differ between two datasets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from beam_nifti.cli import main as cli
from beam_nifti.config import Columns, RecordConfig, Sharding, Splitting
from beam_nifti.errors import DatasetError
from beam_nifti.inspection.diff import Difference, compare_datasets
from tests.datasets import build_dataset, edit_index, edit_info, set_cell
from tests.images import brain, name_of, write_cohort, write_image, write_manifest


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of the second, one image is gone, one is new, and three are different, each in its way."""
    folder = tmp_path_factory.mktemp("data")
    manifest = write_cohort(folder / "cohort", 6)
    before = build_dataset(manifest, folder / "before")
    write_image(manifest.parent / "sub-0001.nii.gz", brain(seed=99))
    write_image(manifest.parent / "sub-0009.nii.gz", brain(seed=9))
    rows = [
        {"participant_id": f"sub-000{i}", "path": f"sub-000{i}.nii.gz", "label": i + (i == 2), "age": 20 + i}
        for i in (0, 1, 2, 3, 5, 9)
    ]
    rows[3]["age"] = 77
    return before, build_dataset(
        write_manifest(folder / "cohort/new.tsv", rows), folder / "after", RecordConfig(voxel_dtype="float16")
    )


def test_what_is_different(datasets: tuple[Path, Path]) -> None:
    diff = compare_datasets(*map(str, datasets))
    assert (diff.num_before, diff.num_after) == (6, 6)
    assert (diff.added, diff.removed) == (("sub-0009",), ("sub-0004",))
    assert diff.changed == {
        "source": ("sub-0001",),
        "voxels": ("sub-0001",),
        "label": ("sub-0002",),
        "age": ("sub-0003",),
    }
    assert diff.config == {"voxel_dtype": ("float32", "float16")}


def test_the_command(datasets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    before, after = map(str, datasets)
    assert cli.main(["diff", before, after]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"before    6 examples: {before}",
        f"after     6 examples: {after}",
        "added     1: sub-0009",
        "removed   1: sub-0004",
        "label     1: sub-0002",
        "source    1: sub-0001",
        "voxels    1: sub-0001",
        "age       1: sub-0003",
        "config    voxel-dtype was float32, now float16",
    ]
    assert cli.main(["diff", before, after, "--json"]) == 1
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["changed"]["age"] == ["sub-0003"]
    assert found["config"]["voxel_dtype"] == {"before": "float32", "after": "float16"}
    assert cli.main(["diff", before, before]) == 0
    assert "the same  no example was added, removed or changed" in capsys.readouterr().out


def test_options_and_labels_that_differ_have_a_line_each(tmp_path: Path) -> None:
    rows = [{"path": name_of(i), "age": i, "sex": "FM"[i % 2]} for i in range(4)]
    write_cohort(tmp_path, 4)
    manifest = write_manifest(tmp_path / "m.tsv", rows)
    before = build_dataset(manifest, tmp_path / "a", columns=Columns(label="age"))
    after = build_dataset(
        manifest,
        tmp_path / "b",
        RecordConfig(rescale="percentile:1,99", clip=True, shape=(9, 9, 9)),
        columns=Columns(label="age,sex"),
        sharding=Sharding(examples_per_shard=1),
        splitting=Splitting({"train": 0.5, "test": 0.5}, seed=3),
    )
    difference = compare_datasets(str(before), str(after))
    assert difference.config["label_column"] == ("age", "age:float,sex:class")
    text = str(difference)
    assert [line[10:] for line in text[text.index("config") :].splitlines()] == [
        "clip was not given, now given",
        "examples-per-shard was not given, now 1",
        "label-column was age, now age:float,sex:class",
        "label 'age' was absent, now float",
        "label 'sex' was absent, now class (F, M)",
        "num-shards was 2, now not given",
        "rescale was minmax, now percentile:1,99",
        "shape was not given, now 9,9,9",
        "split was not given, now test=0.5,train=0.5",
        "split-seed was not given, now 3",
    ]


def test_index_and_info_are_enough(datasets: tuple[Path, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(datasets[0], tmp_path / "copy", ignore=shutil.ignore_patterns("*.gz")))
    assert compare_datasets(str(copy), str(datasets[0])).is_empty


def test_splits_and_places(datasets: tuple[Path, Path], tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", 4)
    before = build_dataset(manifest, tmp_path / "a")
    after = build_dataset(manifest, tmp_path / "b", shuffle_seed=1)
    assert compare_datasets(str(before), str(after)).changed == {}
    split = build_dataset(write_cohort(tmp_path / "cohort", 4, split=["train", "test"]), tmp_path / "c")
    assert compare_datasets(str(before), str(split)).changed["split"] == ("sub-0001", "sub-0003")


def test_an_image_of_other_statistics_is_other_voxels(datasets: tuple[Path, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(datasets[0], tmp_path / "copy"))
    edit_index(copy, set_cell("mean", 1, 0.5))
    assert compare_datasets(str(datasets[0]), str(copy)).changed == {"voxels": ("sub-0001",)}


def test_a_long_name_of_a_column_stands_apart_from_its_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cohort(tmp_path, 3)
    for years in "89":
        rows = [{"path": name_of(i), "label": i, "years_of_education": years} for i in range(3)]
        build_dataset(write_manifest(tmp_path / "m.tsv", rows), tmp_path / years)
    assert cli.main(["diff", str(tmp_path / "8"), str(tmp_path / "9")]) == 1
    names = ", ".join(map(name_of, range(3)))
    assert f"years_of_education  3: {names}" in capsys.readouterr().out


def test_a_column_that_is_called_like_a_kind_of_change_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cohort(tmp_path, 1)
    names = ("voxels", "source", "added", "config", "the same", "manifest_voxels")
    for cell in "89":
        rows = [{"path": name_of(0), "label": 0, **dict.fromkeys(names, cell)}]
        build_dataset(write_manifest(tmp_path / "m.tsv", rows), tmp_path / cell)
    before, after = str(tmp_path / "8"), str(tmp_path / "9")
    expected = {f"manifest_{name}" for name in names}
    assert compare_datasets(before, after).changed.keys() == expected
    assert cli.main(["diff", before, after]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in printed[:2]] == ["before", "after"]
    assert {line.partition("  ")[0] for line in printed[2:]} == expected


def test_a_column_called_split_that_no_build_keeps_is_none(
    datasets: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(datasets[0], tmp_path / "copy"))
    edit_index(copy, lambda table: table.append_column("split", pa.array(["x"] * table.num_rows)))
    edit_info(copy, lambda facts: facts["manifest"]["columns"].append("split"))
    assert compare_datasets(str(datasets[0]), str(copy)).changed.keys() == {"manifest_split"}


def test_what_is_no_dataset(datasets: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no complete dataset here"):
        compare_datasets(str(datasets[0]), str(tmp_path))


def test_names_of_columns_are_harmless_when_shown() -> None:
    difference = Difference("a", "b", 1, 1, (), (), {"site\x1b[2J": ("sub-01",)}, {})
    assert repr(difference) == "<Difference: 0 added, 0 removed, changed: site\\x1b[2J>"
