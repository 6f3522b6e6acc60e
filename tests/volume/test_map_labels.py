"""Labels of masks that are mapped to others, from the file to the index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import apache_beam as beam
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import beam_nifti as bn
from beam_nifti.config import BuildConfig, Columns, RecordConfig
from beam_nifti.errors import DatasetError, UsageError, VolumeError
from beam_nifti.inspection.diff import compare_datasets
from beam_nifti.inspection.verify import ALL, verify_dataset
from beam_nifti.pipeline.configure import make_config
from beam_nifti.random_access import Dataset
from beam_nifti.record.index import IndexEntry
from beam_nifti.transforms import EncodeExample, LoadVolume, ReadManifest, Rescale, WriteToTFRecord
from beam_nifti.volume.volume import Volume, load_volume
from tests.build_helpers import build
from tests.datasets import edit_index, edit_info, index_rows, info_of, set_cell
from tests.images import Array, brain, row_of, write_image, write_manifest

SHAPE = (6, 5, 4)
BRATS = RecordConfig(mask_dtype="uint8", map_labels="4=3")
COLUMNS = Columns(mask="seg")


def labels(*values: int, dtype: str = "uint8") -> Array:
    return np.resize(np.array(values, dtype), SHAPE)


def load(folder: Path, mask: Array, record: RecordConfig, slope: float | None = None) -> Volume:
    write_image(folder / "a.nii")
    write_image(folder / "m.nii", mask, slope=slope)
    return load_volume(row_of("a.nii", other_files=("m.nii",)), str(folder), record=record)


OLD = st.integers(-5, 12)


@given(
    st.dictionaries(OLD, st.integers(0, 12), min_size=1),
    st.lists(OLD, min_size=1, max_size=9),
    st.sampled_from(["int8", "int16", "int64", "float32", "float64"]),
)
def test_every_label_is_that_of_the_oracle(
    tmp_path_factory: pytest.TempPathFactory, mapped: dict[int, int], values: list[int], dtype: str
) -> None:
    changed = {old: new for old, new in mapped.items() if old != new}
    if not changed:
        return
    record = RecordConfig(mask_dtype="uint8", map_labels=",".join(f"{a}={b}" for a, b in mapped.items()))
    mask = labels(*values, dtype=dtype)
    expected = np.vectorize(lambda old: mapped.get(old, old))(mask.astype(int))
    folder = tmp_path_factory.mktemp("map")
    if expected.min() < 0:
        with pytest.raises(VolumeError, match=r"labels from -\d to .* renumber them with --map-labels"):
            load(folder, mask, record)
        return
    volume = load(folder, mask, record)
    assert volume.mask is not None
    assert volume.mask.dtype == np.uint8
    assert np.array_equal(volume.mask, expected)
    assert volume.mapped_labels == tuple(sorted(changed.keys() & set(values)))
    assert IndexEntry.of(volume).mask_labels == tuple(np.unique(expected).tolist())


def test_large_and_scaled_labels(tmp_path: Path) -> None:
    record = RecordConfig(mask_dtype="uint8", map_labels="1001=1,2001=2,4294967295=3,-7=0")
    mask = labels(1001, 2001, 4294967295, -7, 5, dtype="int64")
    assert np.array_equal(load(tmp_path, mask, record).mask, labels(1, 2, 3, 0, 5))
    assert np.array_equal(load(tmp_path, labels(2, 1, 0), BRATS, slope=2.0).mask, labels(3, 2, 0))
    with pytest.raises(VolumeError, match=r"labels from 3 to 3e\+18 do not fit uint8; renumber"):
        load(tmp_path, labels(4, 3_000_000_000_000_000_000, dtype="uint64"), BRATS)
    with pytest.raises(VolumeError, match=r"a voxel of the mask is 4\.4, not a whole number"):
        load(tmp_path, labels(4) * 1.1, BRATS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4", "--map-labels is '4'; write each label once, as OLD=NEW"),
        ("4=x", "write each label once, as OLD=NEW"),
        ("4=3=2", "write each label once, as OLD=NEW"),
        ("4=3,", "write each label once, as OLD=NEW"),
        ("4=3.5", "write each label once, as OLD=NEW"),
        ("4=3,4=2", "--map-labels maps 4 twice, to 3 and to 2; drop one"),
        ("4=-1", "--map-labels has 4=-1, but -1 is not from 0 to 65535"),
        ("4294967296=1", "but 4294967296 is not from -2147483648 to 4294967295"),
        ("4=300", "--map-labels maps 4 to 300, which uint8 cannot hold; use --mask-dtype uint16"),
        ("4=4,0=0", "which maps every label to itself; drop it"),
    ],
)
def test_what_is_no_map_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BuildConfig("m.tsv", "out", RecordConfig(map_labels=text), COLUMNS)


def test_a_map_requires_masks() -> None:
    with pytest.raises(UsageError, match="--map-labels requires --mask-column"):
        BuildConfig("m.tsv", "out", RecordConfig(map_labels="4=3"))
    with pytest.raises(UsageError, match="map_labels maps labels of masks; give mask_dtype too"):
        LoadVolume(map_labels={4: 3})
    with pytest.raises(UsageError, match=r"--map-labels is \{\}; give the new label of each"):
        make_config("m.tsv", "out", {"mask_column": "seg", "map_labels": {}})


def cohort(folder: Path) -> Path:
    """As in BraTS: labels 0, 1, 2 and 4, not all of them in each mask."""
    rows = []
    for i, mask in enumerate([labels(0, 1, 2, 4), labels(0, 2), labels(0, 4, dtype="float32")]):
        write_image(folder / f"{i}.nii.gz", brain(SHAPE, i))
        write_image(folder / f"{i}_seg.nii.gz", mask)
        rows.append({"path": f"{i}.nii.gz", "seg": f"{i}_seg.nii.gz"})
    return write_manifest(folder / "m.tsv", rows)


def test_a_dataset_of_mapped_masks(tmp_path: Path, run: Callable[..., str]) -> None:
    manifest, output = cohort(tmp_path / "c"), tmp_path / "out"
    printed = run("build", manifest, output, "--mask-column=seg", "--map-labels=0=0,7=1,4=3")
    assert "warning: --map-labels replaces labels that no mask has: 7" in printed
    info = info_of(output)
    assert info.mask_labels == (0, 1, 2, 3)
    assert info.config["map_labels"] == "4=3,7=1"
    assert [row["mapped_labels"] for row in index_rows(output)] == [[4], [], [4]]
    assert [row["mask_labels"] for row in index_rows(output)] == [[0, 1, 2, 3], [0, 2], [0, 3]]
    records = Dataset(output, columns=["image", "mask", "mapped_labels"])
    assert np.array_equal(records[0]["mask"][..., 0], labels(0, 1, 2, 3))
    assert verify_dataset(str(output), manifest=str(manifest), deep=ALL).ok
    text = run("inspect", output)
    assert "mask labels   0 1 2 3" in text
    assert "4 to 3 in 2 examples" in text
    assert "7 to 1 in 0 examples" in text
    assert "labels that no mask has: 7" in run("build", manifest, output, f"--like={output}")
    assert (
        make_config(str(manifest), "x", {"without": "mask-column"}, like=str(output)).record.map_labels
        is None
    )


def test_labels_that_no_mask_has_are_known_before_a_build(tmp_path: Path) -> None:
    options = {"mask_column": "seg", "map_labels": {4: 3, 7: 1}, "progress": False}
    survey = bn.check(cohort(tmp_path / "c"), voxels=True, **options)
    assert survey["unmapped_labels"] == [7]
    assert "warning       map_labels replaces labels that no mask has: 7" in str(survey)
    assert "unmapped_labels" not in bn.check(tmp_path / "c/m.tsv", **options)
    survey = bn.check(tmp_path / "c/m.tsv", voxels=True, **options | {"map_labels": "4=3"})
    assert survey["unmapped_labels"] == []


def test_a_map_in_a_file_of_options(tmp_path: Path) -> None:
    (tmp_path / "o.toml").write_text("mask-column = 'seg'\nmap-labels = {4 = 3, -1 = 0}\n")
    assert make_config("m.tsv", "x", {}, config=str(tmp_path / "o.toml")).record.map_labels == "-1=0,4=3"


def map_of(path: object) -> str | None:
    return make_config("m.tsv", "x", {"mask_column": "seg", "map_labels": path}).record.map_labels


def test_a_map_in_a_table_is_stored_and_not_its_path(tmp_path: Path, run: Callable[..., str]) -> None:
    manifest, table = cohort(tmp_path / "c"), tmp_path / "labels.tsv"
    table.write_text("from\tto\tname\n4\t3\tenhancing\n7\t1\t\n0\t0\tbackground\n")
    run("build", manifest, tmp_path / "out", "--mask-column=seg", f"--map-labels={table}")
    info = info_of(tmp_path / "out")
    assert info.config["map_labels"] == map_of(table) == map_of("4=3,7=1") == "4=3,7=1"
    assert info.mask_labels == (0, 1, 2, 3)
    table.rename(tmp_path / "moved.tsv")
    run("build", manifest, tmp_path / "out", "--mask-column=seg", "--map-labels=7=1,4=3")
    assert info_of(tmp_path / "out").revision == 1


def test_a_table_in_a_folder_whose_name_has_an_equals_sign(tmp_path: Path) -> None:
    table = tmp_path / "site=a" / "labels.TSV"
    table.parent.mkdir()
    table.write_text("from\tto\n4\t3\n")
    assert map_of(str(table)) == map_of(table) == "4=3"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "which is no label map: no such file; give the new label of each"),
        ("a.txt", "4 3", r"is not a \.csv, .*; give the new label of each label to change, such as 4=3"),
        ("a.csv", "old,to\n4,3\n", "whose columns are old, to; give .* a table with the columns from and to"),
        ("a.csv", "from,to\n4,3\n5,\n", r"a\.csv: row 2: '' is not an integer; give whole numbers, or drop"),
        ("a.csv", "from,to\n4,3\n5,1.5\n", r"a\.csv: row 2: '1\.5' is not an integer; give whole"),
        ("a.csv", "from,to\n4,3\n4,2\n", r"a\.csv: row 2 maps 4 twice, to 3 and to 2; drop one"),
        ("a.csv", "from,to\n4,-3\n", r"a\.csv: row 1 has 4=-3, but -3 is not from 0 to 65535; choose"),
        ("a.csv", "from,to\n4,4\n", "which maps every label to itself; drop it"),
        ("a.csv", "from,to\n", "which has no rows; give the new label of each label to change"),
        ("a.csv", "from,to\n4,300\n", "maps 4 to 300, which uint8 cannot hold; use --mask-dtype uint16"),
    ],
)
def test_a_table_that_is_no_map_is_refused(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        make_config(
            "m.tsv", "x", {"mask_column": "seg", "mask_dtype": "uint8", "map_labels": tmp_path / name}
        )


def test_another_map_is_another_dataset(tmp_path: Path) -> None:
    manifest = cohort(tmp_path / "c")
    for name, mapped in (("a", None), ("b", "4=3")):
        build(manifest, tmp_path / name, columns=COLUMNS, map_labels=mapped)
    assert "map_labels" not in info_of(tmp_path / "a").config
    assert compare_datasets(str(tmp_path / "a"), str(tmp_path / "b")).config == {"map_labels": (None, "4=3")}
    fingerprints = {RecordConfig(mask_dtype="uint8", map_labels=m).fingerprint for m in (None, "4=3", "4=2")}
    assert len(fingerprints) == 3


def test_changed_mapped_labels_are_found(tmp_path: Path) -> None:
    manifest, output = cohort(tmp_path / "c"), tmp_path / "out"
    build(manifest, output, columns=COLUMNS, map_labels="4=3,7=1")
    edit_index(output, set_cell("mapped_labels", 0, [4, 7]))
    (problem,) = verify_dataset(str(output), manifest=str(manifest), deep=ALL).problems
    assert "the index has mapped_labels 4 7, but its mask has 4; run the build again" in problem
    edit_index(output, set_cell("mapped_labels", 0, [5]))
    (problem,) = verify_dataset(str(output)).problems
    assert "mapped_labels of the index are [5], which --map-labels does not map" in problem


@pytest.mark.parametrize("mapped", ["4=3,4=2", "4=300", 3, "4=3;"])
def test_a_received_map_is_checked(tmp_path: Path, mapped: object) -> None:
    build(cohort(tmp_path / "c"), tmp_path / "out", columns=COLUMNS)
    edit_info(tmp_path / "out", lambda info: info["config"].update(map_labels=mapped))
    with pytest.raises(DatasetError, match=r"not a dataset.s info: .*map.labels"):
        info_of(tmp_path / "out")


def test_a_received_map_without_masks_is_refused(tmp_path: Path) -> None:
    build(cohort(tmp_path / "c"), tmp_path / "out")
    edit_info(tmp_path / "out", lambda info: info["config"].update(map_labels="4=3"))
    with pytest.raises(DatasetError, match=r"config\.map_labels is '4=3', but the records have no masks"):
        info_of(tmp_path / "out")


def test_steps_of_a_pipeline(tmp_path: Path) -> None:
    manifest = cohort(tmp_path / "c")
    with beam.Pipeline() as pipeline:
        volumes = (
            pipeline
            | ReadManifest(manifest, columns=COLUMNS)
            | LoadVolume(mask_dtype="uint8", map_labels={4: 3})
        )
        _ = volumes | Rescale() | EncodeExample() | WriteToTFRecord(tmp_path / "out")
    assert [row["mapped_labels"] for row in index_rows(tmp_path / "out")] == [[4], [], [4]]
    assert info_of(tmp_path / "out").mask_labels == (0, 1, 2, 3)
