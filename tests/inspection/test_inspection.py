from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.cli import main as cli
from beam_nifti.config import Columns, RecordConfig, Sharding
from beam_nifti.errors import DatasetError
from beam_nifti.inspection.description import describe_dataset, describe_record, format_description
from beam_nifti.support.wording import one_line
from tests.datasets import build_dataset, info_of
from tests.images import AFFINE, brain, name_of, write_cohort, write_image, write_manifest

COUNT = 5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits and one volume that failed."""
    folder = tmp_path_factory.mktemp("data")
    manifest = write_cohort(folder / "cohort", COUNT + 1, split=["train", "test"])
    (manifest.parent / "sub-0001.nii.gz").write_bytes(b"no image")
    sharding = Sharding(examples_per_shard=2)
    return build_dataset(manifest, folder / "out", sharding=sharding, max_bad_fraction=0.5)


def value_of(text: str, name: str) -> str:
    """What a line of the text says, by the line's first words."""
    (line,) = [found for found in text.splitlines() if found.startswith(f"{name} ")]
    return line.removeprefix(name).strip()


def test_dataset(dataset: Path) -> None:
    found = describe_dataset(str(dataset))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    sizes = {f.name: f.stat().st_size for f in dataset.glob("*.tfrecord.gz")}
    assert (found["num_examples"], found["num_bytes"]) == (COUNT, sum(sizes.values()))
    assert found["splits"] == {
        name: {
            "num_examples": examples,
            "num_shards": 2,
            "num_bytes": sum(size for file, size in sizes.items() if file.startswith(name)),
        }
        for name, examples in (("test", 2), ("train", 3))
    }
    assert (found["shape"], found["dtype"]) == ([6, 5, 4], "float32")
    assert found["source_dtypes"] == {"int16": COUNT}
    assert found["labels"] == {"count": COUNT, "min": 0.0, "max": 5.0, "mean": (0 + 2 + 3 + 4 + 5) / 5}
    assert found["failures"] == {"count": 1, "path": str(dataset / "failures.jsonl")}
    assert found["config"]["rescale"] == "minmax"
    assert found["manifest"]["num_rows"] == COUNT + 1


def test_intensities_are_those_of_the_images(dataset: Path) -> None:
    images = [brain(seed=i) for i in (0, 2, 3, 4, 5)]
    found = describe_dataset(str(dataset))["intensities"]
    for name, values in (
        ("min", [i.min() for i in images]),
        ("max", [i.max() for i in images]),
        ("mean", [i.mean() for i in images]),
    ):
        assert found[name]["count"] == COUNT
        assert [found[name][k] for k in ("min", "max", "mean")] == pytest.approx(
            [np.min(values), np.max(values), np.mean(values)]
        )


@given(st.text())
def test_whatever_a_text_holds_it_is_one_line(text: str) -> None:
    shown = one_line(text)
    assert len(shown.splitlines()) == bool(text)
    assert (shown == text) == (len(text.splitlines()) <= 1 and not re.search(r"[\x00-\x1f\x7f-\x9f]", text))


def test_line_breaks_of_the_table_break_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"path": f"{i}.nii", "side": "left\nright\x1b[1m", "note": "a\u2028b"} for i in range(2)]
    for row in rows:
        write_image(tmp_path / row["path"], brain())
    manifest, output = write_manifest(tmp_path / "manifest.csv", rows), str(tmp_path / "out")
    assert cli.main(["build", str(manifest), output, "--label-column=side:class"]) == cli.SUCCESS
    assert "labels   side: class, 1: left\\nright\\x1b[1m\n" in capsys.readouterr().out
    text = format_description(describe_dataset(output))
    assert value_of(text, "labels") == r"side: class, 0 = left\nright\x1b[1m (2)"
    text = format_description(describe_record(output, "0.nii"))
    assert value_of(text, "side") == r"left\nright\x1b[1m"
    assert value_of(text, "note") == r"a\u2028b"


def test_dataset_as_text(dataset: Path) -> None:
    text = format_description(describe_dataset(str(dataset)))
    assert value_of(text, "dataset").startswith(str(dataset))
    assert value_of(text, "examples").startswith("5 in ")
    assert value_of(text, "  train").startswith("3 in 2 shards, ")
    assert value_of(text, "voxels") == "6×5×4 float32"
    assert value_of(text, "on disk") == "int16 (5)"
    assert value_of(text, "written with") == "rescale minmax, compression gzip level 2"
    assert value_of(text, "labels") == "0 to 5, mean 2.8"
    assert value_of(text, "failed") == f"1 volume: {dataset}/failures.jsonl"
    assert value_of(text, "skipped") == "none"
    assert value_of(text, "manifest").endswith("manifest.tsv  (6 rows)")
    assert "apache-beam" in value_of(text, "versions")


def test_unlabelled_mixed_uncompressed_dataset(tmp_path: Path) -> None:
    rows = []
    for i in range(7):
        dtype = np.uint8 if i == 6 else np.int16
        write_image(tmp_path / f"{i}.nii", brain((9 - i, 3, 2)).clip(0, 99).astype(dtype))
        rows.append({"path": f"{i}.nii"})
    manifest = write_manifest(tmp_path / "m.csv", rows)
    config = RecordConfig(compression="none", rescale="none")
    output = build_dataset(manifest, tmp_path / "out", config, allow_mixed_shapes=True)
    found = describe_dataset(str(output))
    assert (found["shape"], found["labels"]) == (None, None)
    assert found["shapes"] == {f"{9 - i}×3×2": 1 for i in range(7)}
    text = format_description(found)
    assert value_of(text, "voxels") == "9×3×2 float32: 1 volume"
    assert "and 2 more shapes" in text
    assert value_of(text, "on disk") == "int16 (6), uint8 (1)"
    assert value_of(text, "labels") == "none"
    assert value_of(text, "failed") == "none"
    assert value_of(text, "written with") == "rescale none, compression none"


def test_dataset_without_records(tmp_path: Path) -> None:
    folder = write_cohort(tmp_path / "cohort", 2).parent
    write_image(folder / "sub-0000.nii.gz", np.ones((6, 5, 4), np.int16))
    write_image(folder / "sub-0001.nii.gz", np.ones((6, 5, 4), np.int16))
    output = build_dataset(folder / "manifest.tsv", tmp_path / "out", max_bad_fraction=1)
    found = describe_dataset(str(output))
    assert found["labels"] == {"count": 0, "min": None, "max": None, "mean": None}
    assert value_of(format_description(found), "labels") == "none"


def test_record(dataset: Path) -> None:
    found = describe_record(str(dataset), "sub-0004")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    shard = info_of(dataset).split("train").shards[1]
    assert (found["split"], found["shard"], found["number_in_shard"]) == ("train", shard.name, 0)
    assert (found["offset"], found["length"]) == (0, shard.num_bytes)
    assert (found["label"], found["age"], found["row"]) == (4.0, "24", 5)
    assert found["source"] == "sub-0004.nii.gz"
    assert found["shape"] == [6, 5, 4]
    assert found["affine"] == AFFINE.ravel().tolist()
    assert found["max"] == brain(seed=4).max()


def test_record_as_text(dataset: Path) -> None:
    text = format_description(describe_record(str(dataset), "sub-0004"))
    assert value_of(text, "shard") == info_of(dataset).split("train").shards[1].name
    assert value_of(text, "shape") == "6×5×4"
    assert value_of(text, "zooms") == "2 2 2.5"
    assert value_of(text, "affine").split() == ["-2", "0", "0", "90"]
    assert "0            0          2.5          -72" in text
    assert value_of(text, "source_mtimes").startswith("20")
    assert value_of(text, "source_shape") == "6×5×4"
    assert value_of(text, "source_affine").split() == ["-2", "0", "0", "90"]
    (size,) = describe_record(str(dataset), "sub-0004")["source_sizes"]
    assert value_of(text, "source_sizes") == str(size)


def test_further_columns_named_like_the_place_are_shown_too(tmp_path: Path) -> None:
    write_image(tmp_path / name_of(0), brain((4, 3, 2)))
    row = {
        "participant_id": "sub-0000",
        "path": name_of(0),
        "label": 1,
        "shard": "A1",
        "number_in_shard": "7th",
    }
    output = build_dataset(write_manifest(tmp_path / "m.tsv", [row]), tmp_path / "out")
    found = describe_record(str(output), "sub-0000")
    assert (found["shard"], found["manifest_shard"]) == (info_of(output).shards[0].name, "A1")
    assert (found["number_in_shard"], found["manifest_number_in_shard"]) == (0, "7th")


def test_unknown_record_names_a_close_one(dataset: Path) -> None:
    with pytest.raises(DatasetError, match=r"no record 'sub-004'; did you mean 'sub-00\d4'\?"):
        describe_record(str(dataset), "sub-004")


def test_unknown_record_unlike_all(dataset: Path) -> None:
    with pytest.raises(
        DatasetError, match="no record 'x'; the ids of its 5 records are in the column example_id"
    ):
        describe_record(str(dataset), "x")


def test_record_that_was_left_out(dataset: Path) -> None:
    with pytest.raises(DatasetError, match=r"'sub-0001'; it failed: LoadVolume: sub-0001\.nii"):
        describe_record(str(dataset), "sub-0001")


@pytest.mark.parametrize("columns", [Columns(), Columns(path="image", id="age")])
def test_record_that_was_left_out_by_other_ids(tmp_path: Path, columns: Columns) -> None:
    folder = write_cohort(tmp_path / "cohort", 2).parent
    (folder / "sub-0001.nii.gz").write_bytes(b"no image")
    rows = [{columns.path: f"sub-000{i}.nii.gz", "age": 20 + i} for i in range(2)]
    manifest = write_manifest(folder / "m.csv", rows)
    output = build_dataset(manifest, tmp_path / "out", columns=columns, max_bad_fraction=0.5)
    with pytest.raises(DatasetError, match="it failed: LoadVolume: "):
        describe_record(str(output), "21" if columns.id else "sub-0001.nii.gz")


def test_index_that_cannot_be_read(dataset: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(dataset, tmp_path / "out"))
    index = output / info_of(output).shards[0].index
    index.write_bytes(b"no index")
    with pytest.raises(DatasetError, match=r"parquet: cannot be read.*run beam-nifti verify"):
        describe_dataset(str(output))
    index.unlink()
    with pytest.raises(DatasetError, match=r"parquet: is missing; copy it again"):
        describe_record(str(output), "sub-0000")


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no complete dataset here"):
        describe_dataset(str(tmp_path))
