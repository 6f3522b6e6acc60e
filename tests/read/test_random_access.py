from __future__ import annotations

import importlib.util
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from beam_nifti.config import Columns
from beam_nifti.errors import DatasetError, UsageError
from beam_nifti.random_access import Dataset
from beam_nifti.storage import paths as storage
from tests.build_helpers import build
from tests.datasets import edit_index, edit_info, edit_record, info_of, set_cell
from tests.images import AFFINE, brain, random_voxels, write_cohort, write_image, write_manifest

SHAPE = (6, 5, 4)
TRAIN = 2
"""The number of the first shard of train; those of test come before."""

IDS = [f"sub-{i:04d}" for i in range(12)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve records, 9 of train in two shards and 3 of test; labels are numbers from 0, ages from 20."""
    folder = tmp_path_factory.mktemp("dataset")
    splits = ["train", "train", "train", "test"]
    build(write_cohort(folder / "cohort", 12, shape=SHAPE, split=splits), folder / "out", num_shards=2)
    return folder / "out"


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return shutil.copytree(dataset, tmp_path / "copy")


def numbers(records: Any) -> list[int]:
    return [int(element["label"]) for element in records]


def test_an_element(dataset: Path) -> None:
    element = Dataset(dataset)[2]
    assert list(element) == ["image", "label", "id", "affine", "zooms"]
    voxels = brain(SHAPE, seed=2).astype(np.float64)
    expected = (voxels / voxels.max()).astype(np.float32)
    assert element["image"].dtype == np.float32
    assert element["image"].tobytes() == expected[..., np.newaxis].tobytes()
    assert element["image"].shape == (*SHAPE, 1)
    assert (element["label"], element["label"].dtype) == (2, np.float32)
    assert element["id"] == "sub-0002"
    assert np.array_equal(element["affine"], AFFINE)
    assert element["zooms"].tolist() == [2, 2, 2.5]


def test_numbers_slices_and_lists(dataset: Path) -> None:
    train = Dataset(dataset, columns=["label"])
    in_order = [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert len(train) == 9
    assert numbers(train) == [int(train[i]["label"]) for i in range(9)] == in_order
    assert [train[-1], train[np.int64(-9)]] == [{"label": 10}, {"label": 0}]
    assert isinstance(train[2:5], Dataset)
    assert numbers(train[2:5]) == in_order[2:5]
    assert numbers(train[::-1][:2]) == [10, 9]
    assert numbers(train[[3, -1, 3]]) == [4, 10, 4]
    assert numbers(train[np.array([8, 0])][[1]]) == [0]
    assert numbers(train[np.array(in_order) > 5]) == [6, 8, 9, 10]
    for nothing in (
        train[[]],
        train[5:5],
        Dataset(dataset, "train[:1%]"),
        Dataset(dataset, where="label > 99"),
    ):
        assert (len(nothing), nothing.ids, list(nothing)) == (0, [], [])
        assert nothing.index().equals(train.index().slice(0, 0))
    assert numbers(train.__getitems__([1, 0])) == [1, 0]


@pytest.mark.parametrize("index", [9, -10, [0, 9], [-10]])
def test_numbers_beyond_the_end(dataset: Path, index: Any) -> None:
    with pytest.raises(IndexError, match=r"there is no record -?\d+: the dataset has 9"):
        Dataset(dataset)[index]


@pytest.mark.parametrize("index", ["0", 1.0, [0.5], [True], [[0]], None])
def test_what_is_no_number_of_a_record(dataset: Path, index: Any) -> None:
    with pytest.raises(TypeError, match="give a number, a slice, a list of numbers, or"):
        Dataset(dataset)[index]


@pytest.mark.parametrize(
    ("split", "where", "expected"),
    [
        ("test", None, [3, 7, 11]),
        ("train[:3]", None, [0, 1, 2]),
        ("train[-1:]+test", None, [10, 3, 7, 11]),
        ("test+train", "age >= 30", [11, 10]),
        ("train[:50%]", "age > 21 and participant_id != 'sub-0004'", [2]),
        ("train", "label > 100", []),
    ],
)
def test_splits_and_conditions(dataset: Path, split: str, where: str | None, expected: list[int]) -> None:
    assert numbers(Dataset(dataset, split, where=where)) == expected


def test_ids_and_by_id(dataset: Path) -> None:
    part = Dataset(dataset, "train+test")[::-1]
    assert sorted(part.ids) == IDS
    assert part.ids[0] == "sub-0011"
    assert part.by_id("sub-0007")["image"].tobytes() == part[part.ids.index("sub-0007")]["image"].tobytes()
    with pytest.raises(DatasetError, match="no record 'sub-0007' among these 1"):
        part[:1].by_id("sub-0007")


def test_columns_of_the_index_need_no_shard(copy: Path) -> None:
    columns = ["id", "label", "age", "shape", "max", "source_sizes", "source_versions", "affine"]
    records = Dataset(copy, "test", columns=columns)
    for shard in info_of(copy).shards:
        (copy / shard.name).unlink()
    element = records[1]
    assert list(element) == columns == list(records.columns)
    assert (element["id"], element["label"], element["age"]) == ("sub-0007", 7, "27")
    assert element["shape"].tolist() == list(SHAPE)
    assert element["max"] == brain(SHAPE, seed=7).max()
    assert element["affine"].shape == (4, 4)
    assert element["source_versions"].tolist() == [""]


def test_features_that_only_records_have(dataset: Path) -> None:
    element = Dataset(dataset, columns=["intensity_max", "scl_slope"])[0]
    assert element == {"intensity_max": brain(SHAPE).max(), "scl_slope": None}
    assert element["intensity_max"].dtype == np.float32


def test_the_table_of_the_index(dataset: Path) -> None:
    part = Dataset(dataset, "train+test")[[5, 9]]
    table = part.index(["age", "label"])
    assert table.column_names == ["age", "label"]
    assert table.to_pylist() == [{"age": "26", "label": 6}, {"age": "23", "label": 3}]
    assert {"site_size", "affine"} & set(part.index().column_names) == {"affine"}
    with pytest.raises(UsageError, match="the index has no column 'sex'"):
        part.index(["sex"])


def _write(folder: Path, voxels: list[Any], **header: Any) -> Path:
    rows = []
    for i, each in enumerate(voxels):
        write_image(folder / f"{i}.nii", each, **header)
        rows.append({"path": f"{i}.nii", "label": i + 0.1})
    return write_manifest(folder / "manifest.tsv", rows)


SAME: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "float32": (lambda f: _write(f, [brain(seed=i) for i in range(3)]), {}),
    "uncompressed": (lambda f: _write(f, [brain(seed=i) for i in range(3)]), {"compression": "none"}),
    "float16": (lambda f: _write(f, [brain(seed=1)]), {"voxel_dtype": "float16"}),
    "bfloat16": (lambda f: _write(f, [brain(seed=1)]), {"voxel_dtype": "bfloat16", "compression": "none"}),
    "uint8": (lambda f: _write(f, [brain(seed=1)]), {"voxel_dtype": "uint8"}),
    "native int16": (lambda f: _write(f, [random_voxels()]), {"voxel_dtype": "native"}),
    "native int64": (lambda f: _write(f, [random_voxels(dtype="int64")]), {"voxel_dtype": "native"}),
    "native float32": (
        lambda f: _write(f, [np.float32(1e-41) * brain(), random_voxels((6, 5, 4), "float32")]),
        {"voxel_dtype": "native", "compression": "none"},
    ),
    "native scaled": (
        lambda f: _write(f, [random_voxels()], slope=-0.3, inter=7),
        {"voxel_dtype": "native"},
    ),
    "native percentile": (
        lambda f: _write(f, [random_voxels()], slope=0.7),
        {"voxel_dtype": "native", "rescale": "percentile:5,95", "clip": True},
    ),
    "native in units": (
        lambda f: _write(f, [brain()], slope=0.1, inter=-3),
        {"voxel_dtype": "native", "rescale": "none"},
    ),
    "frames": (lambda f: _write(f, [random_voxels((5, 4, 3, 4))]), {"frames": "all"}),
    "mixed shapes": (
        lambda f: _write(f, [brain((6, 5, 4)), brain((3, 4, 5, 2)), brain((7, 2, 2))]),
        {"allow_mixed_shapes": True, "frames": "all", "voxel_dtype": "native"},
    ),
}


@pytest.mark.tf
@pytest.mark.parametrize("case", SAME)
def test_images_and_labels_are_those_of_load_dataset(tmp_path: Path, case: str) -> None:
    pytest.importorskip("tensorflow")
    from beam_nifti.reader import load_dataset

    make, options = SAME[case]
    output = tmp_path / "out"
    build(make(tmp_path), output, num_shards=1, **options)
    records = Dataset(output)
    for element, (x, y) in zip(records, load_dataset(output), strict=True):
        image = element["image"]
        assert (image.dtype, image.shape) == (np.float32, x.shape)
        assert image.tobytes() == x.numpy().tobytes()
        assert element["label"].tobytes() == y.numpy().tobytes()
        assert image.flags.aligned
        assert image.flags.c_contiguous


@pytest.mark.parametrize("compression", ["gzip", "none"])
def test_an_element_is_the_callers_own(tmp_path: Path, compression: str) -> None:
    build(write_cohort(tmp_path, 2, shape=SHAPE), tmp_path / "out", compression=compression)
    records = Dataset(tmp_path / "out")
    first, copies = records[0], [e["image"].copy() for e in records]
    records[1]["image"][...] = 7
    for i in range(2):
        assert np.array_equal(records[i]["image"], copies[i])
    assert np.array_equal(first["image"], copies[0])


@pytest.mark.parametrize("compression", ["gzip", "none"])
def test_what_is_lent_is_the_same_until_the_next_read(tmp_path: Path, compression: str) -> None:
    build(write_cohort(tmp_path, 2, shape=SHAPE), tmp_path / "out", compression=compression)
    records = Dataset(tmp_path / "out")[::-1]
    for i in (0, 1):
        assert records.read_in_place(i)["image"].tobytes() == records[i]["image"].tobytes()


def test_what_is_lent_takes_no_fresh_memory(tmp_path: Path) -> None:
    build(write_cohort(tmp_path, 2, shape=SHAPE), tmp_path / "out", compression="none")
    records = Dataset(tmp_path / "out")
    first, second = records.read_in_place(0), records.read_in_place(1)
    assert first["id"] != second["id"]
    assert np.shares_memory(first["image"], second["image"])


def test_without_labels(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii")
    build(write_manifest(tmp_path / "manifest.tsv", [{"path": "a.nii"}]), tmp_path / "out")
    assert "label" not in Dataset(tmp_path / "out")[0]
    with pytest.raises(UsageError, match="columns has 'label', but the dataset has no labels; drop it"):
        Dataset(tmp_path / "out", columns=["label"])


def test_a_first_label_that_is_a_text(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii")
    manifest = write_manifest(tmp_path / "manifest.tsv", [{"path": "a.nii", "name": "left"}])
    build(manifest, tmp_path / "out", columns={"label": "name:string"})
    assert list(Dataset(tmp_path / "out")[0]) == ["image", "label/name", "id", "affine", "zooms"]
    assert Dataset(tmp_path / "out", columns=["label/name"])[0]["label/name"] == b"left"
    with pytest.raises(UsageError, match="first label is a string, not a number; choose one of: label/name"):
        Dataset(tmp_path / "out", columns=["label"])


def test_columns_of_the_manifest_named_like_those_of_records(tmp_path: Path) -> None:
    rows = [
        {
            "participant_id": f"sub-{i}",
            "path": f"{i}.nii",
            "id": f"x{2 - i}",
            "image": "T1",
            "manifest_id": "y",
        }
        for i in range(3)
    ]
    for i in range(3):
        write_image(tmp_path / f"{i}.nii", brain(seed=i))
    build(write_manifest(tmp_path / "manifest.tsv", rows), tmp_path / "out")
    columns = ["id", "image", "manifest_id", "manifest_image", "manifest_manifest_id"]
    (found,) = Dataset(tmp_path / "out", where="id == 'sub-0' and manifest_id == 'x2'", columns=columns)
    assert np.array_equal(found.pop("image"), Dataset(tmp_path / "out")[0]["image"])
    assert list(found.values()) == ["sub-0", "x2", "T1", "y"]
    assert Dataset(tmp_path / "out", where="id == 'x2'").ids == []
    assert Dataset(tmp_path / "out").index(["manifest_id"]).to_pydict() == {"manifest_id": ["x2", "x1", "x0"]}
    with pytest.raises(UsageError, match="has no column 'image'"):
        Dataset(tmp_path / "out", where="image == 'T1'")


def test_a_dataset_is_shown_in_one_line(dataset: Path) -> None:
    records = Dataset(dataset, "train[1:]+test", channels_first=True, columns=["image", "age"])
    text = f"<Dataset train+test: 11 of 12 records of image float32 (1, 6, 5, 4), age; {dataset}>"
    assert repr(records) == text
    assert repr(records[:1]) == text.replace("11 of", "1 of")
    assert repr(Dataset(dataset, "test", columns=["id"])) == f"<Dataset test: 3 records of id; {dataset}>"


def test_shards_without_records(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path, 3)
    (tmp_path / "sub-0001.nii.gz").write_bytes(b"damaged")
    build(manifest, tmp_path / "out", examples_per_shard=1, max_bad_fraction=0.5)
    assert Dataset(tmp_path / "out").ids == ["sub-0000", "sub-0002"]
    assert numbers(Dataset(tmp_path / "out")) == [0, 2]


def test_a_pickle_is_small_and_gives_the_same_records(dataset: Path) -> None:
    records = Dataset(dataset, "train", where="age > 22")[1:]
    data = pickle.dumps(records)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again.ids == records.ids
    assert again.columns == records.columns
    assert again[0]["image"].tobytes() == records[0]["image"].tobytes()


def test_a_pickle_of_a_dataset_that_was_built_again_is_refused(copy: Path) -> None:
    data = pickle.dumps(Dataset(copy))
    edit_info(copy, lambda info: info.update(revision=2))
    with pytest.raises(DatasetError, match="was rebuilt after it was opened; open it again"):
        pickle.loads(data)


@pytest.mark.parametrize("pool", ["threads", "fork", "spawn"])
def test_threads_and_processes(dataset: Path, pool: str) -> None:
    records = Dataset(dataset)
    expected = [element["image"].tobytes() for element in records]
    wanted = list(range(len(records))) * 4
    executor: Any = (
        ThreadPoolExecutor(4) if pool == "threads" else ProcessPoolExecutor(2, mp_context=get_context(pool))
    )
    with executor:
        found = list(executor.map(Dataset.__getitem__, [records] * len(wanted), wanted))
    assert [element["image"].tobytes() for element in found] == [expected[i] for i in wanted]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts descriptors in /proc")
def test_no_file_stays_open(dataset: Path) -> None:
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    records = Dataset(dataset)
    elements = list(records)
    assert len(elements) == 9
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


def test_a_remote_dataset(dataset: Path) -> None:
    import tests.object_store

    store = tests.object_store.MemoryFileSystem
    for path in dataset.rglob("*"):
        if path.is_file():
            storage.write(f"memory://lab/{path.relative_to(dataset)}", path.read_bytes())
    records = Dataset("memory://lab", "test")
    assert numbers(pickle.loads(pickle.dumps(records))) == [3, 7, 11]
    for element, local in zip(records, Dataset(dataset, "test"), strict=True):
        assert element["image"].tobytes() == local["image"].tobytes()
    shard = next(path for path in store.objects if "/test-00001" in path)
    del store.objects[shard]
    with pytest.raises(DatasetError, match=r"memory://lab/test-00001.*: the shard is missing"):
        Dataset("memory://lab", "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "validation"}, r"copy: no split 'validation'; the dataset has test, train"),
        ({"split": "train[:"}, r"write the name of a split"),
        ({"split": "train[:99]"}, r"reaches beyond the 9 records of 'train'"),
        ({"columns": ["image_raw"]}, r"no column 'image_raw'"),
        ({"columns": ["sex"]}, r"no column 'sex'; choose one of: affine, age, .*image, .*zooms"),
        ({"where": "sex == 1"}, r"the index has no column 'sex'; it has example_id, .*, source, .*, age"),
        ({"where": "participant_id > 1"}, r"participant_id is 'sub-0000' in row 1 of the manifest"),
    ],
)
def test_what_cannot_be_opened_says_why(copy: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((DatasetError, UsageError), match=message):
        Dataset(copy, **options)


def _first_shard(output: Path) -> Path:
    return output / info_of(output).splits["train"].shards[0].name


def test_damage_that_opening_finds(copy: Path, tmp_path: Path) -> None:
    def refusal(message: str) -> None:
        with pytest.raises(DatasetError, match=message):
            Dataset(copy)

    shard = _first_shard(copy)
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    refusal(
        rf"{shard}: the shard has {len(content) - 1} bytes, but dataset_info.json gives {len(content)}; copy"
    )
    shard.unlink()
    refusal(rf"{shard}: the shard is missing; copy the dataset again")
    shard.write_bytes(content)
    first, second = (copy / s.index for s in info_of(copy).splits["train"].shards)
    data, other = first.read_bytes(), second.read_bytes()
    second.write_bytes(data)
    refusal(rf"{second}: is not the index of train-00001-of-00002.tfrecord.gz; run beam-nifti verify")
    second.write_bytes(other)
    first.write_bytes(data[:-9])
    refusal(rf"{first}: cannot be read \(.*\); run beam-nifti verify")
    first.unlink()
    refusal(rf"{first}: is missing; copy it again")
    (copy / "dataset_info.json").unlink()
    refusal(r"no complete dataset here \(dataset_info.json is missing\)")


def test_damage_that_reading_finds(copy: Path) -> None:
    records, shard = Dataset(copy), _first_shard(copy)
    content = bytearray(shard.read_bytes())
    start = records.index(["offset"])["offset"][1].as_py()
    content[start + 200] ^= 1
    shard.write_bytes(content)
    assert records[0]["id"] == "sub-0000"
    with pytest.raises(
        DatasetError, match=rf"{shard}: record 'sub-0001', number 1 from 0, cannot be read \(.*gzip"
    ):
        records[1]
    shard.write_bytes(content[: start + 100])
    with pytest.raises(
        DatasetError, match=r"'sub-0001', .*the file has only 100 of its \d+ bytes\); run beam-nifti ver"
    ):
        records.by_id("sub-0001")
    shard.unlink()
    with pytest.raises(DatasetError, match=r"'sub-0001', number 1 from 0, cannot be read \(.*No such file"):
        records[1]


def test_a_record_that_is_not_what_the_index_says(copy: Path) -> None:
    edit_index(copy, set_cell("example_id", 1, "sub-0009"), TRAIN)
    with pytest.raises(DatasetError, match=r"record 'sub-0009', .*read .it is the record of 'sub-0001'"):
        Dataset(copy)[1]
    edit_record(copy, 0, lambda payload: payload.replace(b"image_raw", b"image_rew"), TRAIN)
    with pytest.raises(DatasetError, match=r"record 'sub-0000', .*read .it has no image_raw"):
        Dataset(copy)[0]


def test_a_record_takes_little_memory(dataset: Path) -> None:
    records = Dataset(dataset)._records
    assert isinstance(records.table, pa.Table)
    assert records.table.nbytes / len(records.table) < 300


@pytest.mark.parametrize("rescale", ["minmax", "percentile:1,99"])
def test_channels_masks_and_labels(tmp_path: Path, rescale: str) -> None:
    rows = []
    for i in range(3):
        for name in ("T1w", "T2w"):
            write_image(
                tmp_path / f"{i}_{name}.nii", brain(seed=10 * i + int(name[1])), slope=0.5, inter=-3.0
            )
        write_image(tmp_path / f"{i}_mask.nii", np.full((6, 5, 4), i, np.uint8))
        cells = {"T1w": f"{i}_T1w.nii", "T2w": f"{i}_T2w.nii", "lesion": f"{i}_mask.nii"}
        rows.append(cells | {"age": i / 2, "sex": "FMF"[i]})
    from beam_nifti.reader import load_dataset

    columns = Columns("T1w,T2w", "age,sex", mask="lesion")
    manifest, output = write_manifest(tmp_path / "m.csv", rows), tmp_path / "out"
    build(manifest, output, columns=columns, rescale=rescale, voxel_dtype="native")
    records = Dataset(output, columns=["image", "label", "mask", "label/sex", "sex", "max"])
    read = load_dataset(output, label=("age", "sex")).as_numpy_iterator()
    for i, (element, (x, labels)) in enumerate(zip(records, read, strict=True)):
        assert np.array_equal(element["image"], x)
        assert element["label"] == labels["age"] == i / 2
        assert element["label/sex"] == labels["sex"] == (i == 1)
        assert element["sex"] == "FMF"[i]
        assert np.array_equal(element["mask"], np.full((6, 5, 4, 1), i))
        assert element["max"].shape == (2,)
    assert Dataset(output, where="sex == 'F' and age > 0.5").ids == ["2_T1w.nii"]
    assert Dataset(output, where="2 in mask_labels or 0 in mask_labels").ids == ["0_T1w.nii", "2_T1w.nii"]
    assert [float(y) for _, y in load_dataset(output, where="1 not in mask_labels")] == [0, 1]


@pytest.mark.parametrize(
    ("url", "remedy"),
    [("az://lab/out", r"install beam-nifti\[azure\]"), ("nowhere://lab/out", "install fsspec and what")],
)
def test_a_scheme_that_nothing_serves_is_not_a_missing_dataset(url: str, remedy: str) -> None:
    if url.startswith("az") and importlib.util.find_spec("adlfs") is not None:
        pytest.skip("beam-nifti[azure] is installed")
    with pytest.raises(DatasetError, match=rf"{url}/dataset_info.json: cannot be reached .*{remedy}"):
        Dataset(url)
