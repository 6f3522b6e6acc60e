from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_nifti.config import Columns, RecordConfig, Sharding
from beam_nifti.errors import DatasetError, ManifestError, OutputBusyError, UsageError
from beam_nifti.inspection.verify import ALL, verify_dataset
from beam_nifti.pipeline.progress import Progress
from beam_nifti.record.example import decode_example, decode_tensor, encode_example, encode_tensor
from beam_nifti.record.index import read_index
from tests.datasets import (
    build_dataset,
    edit_index,
    edit_info,
    edit_record,
    info_of,
    manifest_of,
    set_cell,
)
from tests.images import brain, name_of, nifti_bytes, write_cohort, write_image, write_manifest

COUNT = 5


@pytest.fixture(scope="module")
def cohort_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort"), COUNT).parent


@pytest.fixture(scope="module")
def built(cohort_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Datasets that no test may change."""
    folder, manifest = tmp_path_factory.mktemp("built"), cohort_folder / "manifest.tsv"
    return {
        "gzip": build_dataset(manifest, folder / "gzip"),
        "plain": build_dataset(manifest, folder / "plain", RecordConfig(compression="none")),
        "native": build_dataset(manifest, folder / "native", RecordConfig(voxel_dtype="native")),
        "unscaled": build_dataset(manifest, folder / "unscaled", RecordConfig(rescale="none")),
    }


@pytest.fixture
def manifest(cohort_folder: Path, tmp_path: Path) -> Path:
    """A manifest and its images, to be changed."""
    shutil.copytree(cohort_folder, tmp_path / "cohort")
    return tmp_path / "cohort" / "manifest.tsv"


@pytest.fixture
def copy_of(built: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A dataset to be damaged."""
    return lambda name: Path(shutil.copytree(built[name], tmp_path / name))


@pytest.fixture
def gzip(copy_of: Callable[[str], Path]) -> Path:
    return copy_of("gzip")


@pytest.fixture
def plain(copy_of: Callable[[str], Path]) -> Path:
    return copy_of("plain")


def problems(output: Path, **options: Any) -> tuple[str, ...]:
    if options.get("deep"):
        options.setdefault("manifest", manifest_of(output))
    return verify_dataset(str(output), **options).problems


def only(found: tuple[str, ...], *texts: str) -> None:
    """There is one problem, and it holds all the texts."""
    assert len(found) == 1, found
    for text in texts:
        assert text in found[0]


def some(found: tuple[str, ...], *texts: str) -> None:
    """One of the problems holds all the texts."""
    assert any(all(text in problem for text in texts) for problem in found), found


SHARD0, SHARD1 = "train-00000-of-00002.tfrecord", "train-00001-of-00002.tfrecord"


# Sound datasets


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", ["gzip", "plain", "native", "unscaled"])
def test_sound_dataset(built: dict[str, Path], cohort_folder: Path, name: str, workers: int) -> None:
    output = built[name]
    report = verify_dataset(
        str(output), manifest=str(cohort_folder / "manifest.tsv"), deep=ALL, workers=workers
    )
    assert report.problems == ()
    assert report.ok
    assert (report.num_examples, report.num_shards, report.num_deep) == (COUNT, 2, COUNT)
    assert report.num_bytes == sum(f.stat().st_size for f in output.glob("*.tfrecord*"))


@pytest.mark.parametrize("compression", ["gzip", "none"])
@pytest.mark.parametrize("rescale", ["minmax", "none"])
@pytest.mark.parametrize("voxel_dtype", ["float32", "native"])
def test_scaled_images(tmp_path: Path, compression: str, rescale: str, voxel_dtype: str) -> None:
    for version in (1, 2):  # of NIfTI: 1 scales by float32, 2 by float64
        scaling: dict[str, Any] = {"version": version, "slope": -1 / 3, "inter": 1e5 / 7}
        write_image(tmp_path / f"{version}.nii", brain(seed=version), **scaling)
    rows = [{"path": f"{version}.nii"} for version in (1, 2)]
    manifest = write_manifest(tmp_path / "m.csv", rows)
    config = RecordConfig(rescale=rescale, voxel_dtype=voxel_dtype, compression=compression)
    output = build_dataset(manifest, tmp_path / "out", config, sharding=Sharding(num_shards=1))
    assert problems(output, manifest=str(manifest), deep=ALL) == ()


@pytest.fixture(scope="module")
def rescaled(cohort_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose records say what became 0 and 1."""
    config = RecordConfig("zscore", "float16")
    return build_dataset(cohort_folder / "manifest.tsv", tmp_path_factory.mktemp("rescaled") / "out", config)


@pytest.mark.parametrize(
    ("rescale", "options"),
    [
        ("percentile:2,98", {"voxel_dtype": "uint8", "clip": True}),
        ("percentile:2,98", {"voxel_dtype": "native", "rescale_within": "nonzero"}),
        ("window:0,600", {"voxel_dtype": "bfloat16"}),
        ("minmax", {"rescale_within": "nonzero"}),
        ("none", {"voxel_dtype": "float16"}),
    ],
)
def test_sound_datasets_of_every_method(
    cohort_folder: Path, tmp_path: Path, rescale: str, options: dict[str, Any]
) -> None:
    config = RecordConfig(rescale, **options)
    output = build_dataset(cohort_folder / "manifest.tsv", tmp_path / "out", config)
    assert problems(output, deep=ALL) == ()


def test_what_became_0_and_1_is_checked(rescaled: Path, tmp_path: Path) -> None:
    assert problems(rescaled, deep=ALL) == ()

    def moved(name: str, by: float) -> Callable[[bytes], bytes]:
        def edit(payload: bytes) -> bytes:
            features: dict[str, Any] = dict(decode_example(payload))
            features = {n: bytes(v) if isinstance(v, memoryview) else v for n, v in features.items()}
            features[name] = struct.pack("<d", struct.unpack("<d", features[name])[0] + by)
            return encode_example(features)

        return edit

    for name in ("rescale_low", "rescale_high"):
        output = Path(shutil.copytree(rescaled, tmp_path / name))
        edit_record(output, 1, moved(name, 0.5))
        some(problems(output), "record 1 (sub-0001)", f"{name} is", "the index has")
    output = Path(shutil.copytree(rescaled, tmp_path / "index"))
    edit_index(output, set_cell("rescale_low", 1, None))
    some(problems(output), INDEX0, "column rescale_low has 1 empty cells")
    output = Path(shutil.copytree(rescaled, tmp_path / "both"))
    low = read_index(str(output / INDEX0))[0]["rescale_low"][1].as_py()
    edit_record(output, 1, moved("rescale_low", 0.5))
    edit_index(output, set_cell("rescale_low", 1, low + 0.5))
    some(problems(output), "record 1 (sub-0001)", "became 0 and 1, expected")
    output = Path(shutil.copytree(rescaled, tmp_path / "order"))
    edit_record(output, 1, moved("rescale_high", -1e9))
    some(problems(output), "record 1 (sub-0001)", "which is not a range")


def test_ends_that_the_voxels_belie(cohort_folder: Path, tmp_path: Path) -> None:
    config = RecordConfig("window:0,600")
    output = build_dataset(cohort_folder / "manifest.tsv", tmp_path / "out", config)
    edit_info(output, lambda i: i["config"].update(clip=True))
    some(problems(output), "record 0 (sub-0000)", "rescaled voxels range from", "expected 0 to 1")
    edit_info(output, lambda i: i["config"].update(clip=False, rescale="window:0,500"))
    some(problems(output), "record 0 (sub-0000)", "0 and 600 became 0 and 1, expected 0 and 500")


def test_mixed_shapes_dtypes_and_splits(tmp_path: Path) -> None:
    rows = []
    for i, dtype in enumerate(["uint8", "int16", "float64", "float32", "int32"]):
        write_image(tmp_path / f"{i}.nii.gz", brain((4 + i, 3, 2), seed=i).astype(dtype))
        rows.append({"path": f"{i}.nii.gz", "label": i / 3, "split": ["train", "test"][i % 2]})
    manifest = write_manifest(tmp_path / "m.csv", rows)
    output = build_dataset(manifest, tmp_path / "out", allow_mixed_shapes=True)
    report = verify_dataset(str(output), manifest=str(manifest), deep=ALL, workers=2)
    assert report.problems == ()
    assert (report.num_examples, report.num_shards) == (5, 4)


@pytest.mark.parametrize("id_column", ["participant_id", None])
def test_failures_account_for_the_rest_of_the_manifest(tmp_path: Path, id_column: str | None) -> None:
    folder = write_cohort(tmp_path / "cohort", COUNT).parent
    (folder / "sub-0000.nii.gz").write_bytes(b"no image")
    write_image(folder / "sub-0001.nii.gz", np.ones((6, 5, 4), np.int16))
    rows = [{"path": f"sub-000{i}.nii.gz", "label": i} for i in range(COUNT)]
    if id_column:
        rows = [{id_column: f"id-{i}", **row} for i, row in enumerate(rows)]
    manifest = write_manifest(folder / "m.csv", rows)
    sharding = Sharding(examples_per_shard=2)  # the first shard remains empty
    output = build_dataset(manifest, tmp_path / "out", sharding=sharding, max_bad_fraction=0.5)
    report = verify_dataset(str(output), manifest=str(manifest), deep=ALL)
    assert report.problems == ()
    assert report.num_examples == COUNT - 2
    assert info_of(output).shards[0].num_examples == 0


def test_local_datasets_need_neither_beam_nor_tensorflow(built: dict[str, Path]) -> None:
    manifest = manifest_of(built["gzip"])
    code = (
        "import sys; from beam_nifti.inspection.verify import verify_dataset;"
        f"assert verify_dataset({str(built['gzip'])!r}, manifest={manifest!r}, deep=1).ok;"
        "assert not {'apache_beam', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_progress_counts_every_record_and_byte(built: dict[str, Path]) -> None:
    meter = Progress()
    report = verify_dataset(str(built["gzip"]), workers=2, on_progress=meter.add)
    assert (meter.volumes, meter.failed, meter.num_bytes) == (COUNT, 0, report.num_bytes)


@pytest.mark.parametrize("deep", [0, 1, 2, 3, COUNT, 100])
def test_deep_checks_as_many_as_asked(built: dict[str, Path], deep: int) -> None:
    output = built["gzip"]
    report = verify_dataset(str(output), manifest=manifest_of(output), deep=deep)
    assert report.num_deep == min(deep, COUNT)


# Not a dataset


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no complete dataset here"):
        verify_dataset(str(tmp_path))


def test_later_format(gzip: Path) -> None:
    edit_info(gzip, lambda info: info.update(format_version=99))
    with pytest.raises(DatasetError, match="format version 99"):
        verify_dataset(str(gzip))


@pytest.mark.parametrize("config", [{"rescale": "quantile"}, {"columns": {"age": 1}}])
def test_unknown_configuration(gzip: Path, config: dict[str, Any]) -> None:
    edit_info(gzip, lambda info: info["config"].update(config))
    with pytest.raises(DatasetError, match=r"dataset_info\.json: not a dataset's info: .*(quantile|age)"):
        verify_dataset(str(gzip))


def test_a_fingerprint_of_other_options(gzip: Path) -> None:
    found = info_of(gzip).config["fingerprint"]
    edit_info(gzip, lambda info: info["config"].update(fingerprint="0" * 16))
    some(problems(gzip), f"the fingerprint is {'0' * 16}, but its options give {found}")


@pytest.mark.parametrize("options", [{"workers": 0}, {"deep": -1}])
def test_options_out_of_range(built: dict[str, Path], options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"--(workers|deep) is (0|-1)"):
        verify_dataset(str(built["gzip"]), **options)  # type: ignore[arg-type]


def test_manifest_that_cannot_be_read(built: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ManifestError):
        verify_dataset(str(built["gzip"]), manifest=str(tmp_path / "none.tsv"))


# Damaged files


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (0, "the CRC of the record's length"),
        (9, "the CRC of the record's length"),
        (200, "the CRC of the record's payload"),
        (-1, "the CRC of the record's payload"),
    ],
    ids=["length", "length's CRC", "payload", "payload's CRC"],
)
def test_flipped_bit(plain: Path, place: int, text: str) -> None:
    first = (plain / SHARD0).stat().st_size // 2  # both records of the shard are of one size
    flip(plain / SHARD0, first + place if place >= 0 else -1)
    report = verify_dataset(str(plain))
    assert len(report.problems) == 2
    some(report.problems, SHARD0, "sha256", "run the build again")
    some(report.problems, SHARD0, "record 1 (sub-0001)", text)
    assert report.num_examples == COUNT  # the others were read all the same


@pytest.mark.parametrize("name", ["gzip", "plain"])
@settings(max_examples=60)
@given(data=st.data())
def test_any_changed_byte_is_found(
    built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    output = Path(shutil.copytree(built[name], tmp_path_factory.mktemp("flip") / name))
    file = data.draw(st.sampled_from([f for s in info_of(output).shards for f in (s.name, s.index)]))
    content = bytearray((output / file).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    (output / file).write_bytes(content)
    some(problems(output), file, "sha256" if file.endswith((".gz", ".tfrecord")) else "describes")
    shutil.rmtree(output)


def test_gzip_damage_names_the_record(gzip: Path) -> None:
    flip(gzip / f"{SHARD1}.gz", 100)
    some(problems(gzip), f"{SHARD1}.gz", "record 0 (sub-0002)", "gzip member is damaged")


def test_truncated_shard(gzip: Path) -> None:
    shard = gzip / f"{SHARD1}.gz"
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    found = problems(gzip)
    some(found, shard.name, f"has {len(content) - 10} bytes", f"gives {len(content)}")
    some(found, shard.name, "record 2 (sub-0004)", "not in the file")
    assert not any("record 1" in p for p in found)


def test_shard_with_a_tail(gzip: Path) -> None:
    with (gzip / f"{SHARD1}.gz").open("ab") as handle:
        handle.write(b"tail")
    some(problems(gzip), "index/train-00001-of-00002.parquet", "its rows end at byte")


def test_empty_shard_that_is_not_empty(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", 2)
    (manifest.parent / "sub-0000.nii.gz").write_bytes(b"no image")
    output = build_dataset(manifest, tmp_path / "out", max_bad_fraction=0.5)
    shutil.copy(output / f"{SHARD1}.gz", output / f"{SHARD0}.gz")
    some(problems(output), f"{SHARD0}.gz", "sha256")


def test_swapped_shards(gzip: Path) -> None:
    (gzip / f"{SHARD0}.gz").rename(gzip / "x")
    (gzip / f"{SHARD1}.gz").rename(gzip / f"{SHARD0}.gz")
    (gzip / "x").rename(gzip / f"{SHARD1}.gz")
    found = problems(gzip)
    some(found, f"{SHARD0}.gz", "sha256")
    some(found, f"{SHARD1}.gz", "sha256")


def test_deleted_shard(gzip: Path) -> None:
    (gzip / f"{SHARD0}.gz").unlink()
    report = verify_dataset(str(gzip))
    only(report.problems, f"{SHARD0}.gz: is missing")
    assert report.num_examples == 3


def test_shard_that_is_a_folder(gzip: Path) -> None:
    (gzip / f"{SHARD0}.gz").unlink()
    (gzip / f"{SHARD0}.gz").mkdir()
    only(problems(gzip), f"{SHARD0}.gz: cannot be read")


def test_shard_of_another_dataset_in_the_folder(gzip: Path) -> None:
    shutil.copy(gzip / f"{SHARD0}.gz", gzip / "train-00000-of-00009.tfrecord.gz")
    only(problems(gzip), "train-00000-of-00009.tfrecord.gz: not in dataset_info.json")


@pytest.mark.parametrize("note", [None, "{}"])
@pytest.mark.parametrize(
    "name", ["train-00000-of-00009.tfrecord.gz", "train-0.copy.tfrecord.gz", "x.tfrecord", "index/x.parquet"]
)
def test_whatever_a_glob_takes_is_the_datasets(gzip: Path, name: str, note: str | None) -> None:
    """A folder of a build excuses only what a note in it names."""
    (gzip / ".build").mkdir()
    if note is not None:
        (gzip / ".build/plan.json").write_text(note)
    (gzip / name).touch()
    only(problems(gzip), f"{name}: not in dataset_info.json")


def test_a_dataset_that_is_rebuilt_meanwhile_is_not_judged(gzip: Path, tmp_path: Path) -> None:
    newer = shutil.copytree(gzip, tmp_path / "newer")
    edit_info(newer, lambda info: info.update(revision=2))
    (newer / f"{SHARD0}.gz").rename(newer / "train-00000-of-00002-r2.tfrecord.gz")

    def rebuild(*_: object, **__: object) -> None:
        if newer.exists():
            shutil.rmtree(gzip)
            newer.rename(gzip)

    with pytest.raises(
        OutputBusyError, match="was rebuilt while it was verified; run the same command again"
    ):
        problems(gzip, on_progress=rebuild, workers=1)


def test_the_remedy_for_a_damaged_shard_works(gzip: Path, cohort_folder: Path) -> None:
    flip(gzip / f"{SHARD1}.gz", 100)
    shard = info_of(gzip).shards[1]
    (gzip / shard.name).unlink()
    (gzip / shard.index).unlink()
    build_dataset(cohort_folder / "manifest.tsv", gzip)
    assert problems(gzip, deep=ALL) == ()


def test_many_problems_are_counted(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", 30)
    output = build_dataset(manifest, tmp_path / "out", RecordConfig(compression="none"))
    for shard in info_of(output).shards:
        content = (output / shard.name).read_bytes()
        (output / shard.name).write_bytes(bytes(b ^ 1 for b in content))
    found = problems(output, workers=2)
    assert len(found) == 21
    assert found == problems(output, workers=1)
    assert [p.partition(":")[0] for p in found[:2]] == [SHARD0, SHARD1]  # files before records
    assert found[-1] == "and 12 more problems"


# Indexes


INDEX0 = "index/train-00000-of-00002.parquet"


@pytest.mark.parametrize(
    ("column", "value", "texts"),
    [
        ("offset", 1, ["do not tile", "at offset 1"]),
        ("length", 7, ["its rows end at byte"]),
        ("length", -1, ["not in the file"]),
        ("length", 2**62, ["not in the file"]),
        ("position", 0, ["positions do not ascend at record 1 (sub-0001)"]),
        ("example_id", "sub-0000", ["1 id occurs more than once: sub-0000 (2)"]),
        ("example_id", "sub-9", ["record 1 (sub-9)", "id is 'sub-0001', but the index has 'sub-9'"]),
        ("label", 5.0, ["record 1 (sub-0001)", "label is 1, but the index has 5"]),
        ("label", None, ["record 1 (sub-0001)", "label is None", "labelled: True"]),
        ("shape", [5, 6, 4], ["record 1 (sub-0001)", "(6, 5, 4), but the index has (5, 6, 4)"]),
        ("zooms", [1.0, 1.0, 1.0], ["record 1 (sub-0001)", "zooms is 2 2 2.5"]),
        ("zooms", None, ["column zooms has 1 empty cells"]),
        ("affine", [0.0] * 15, ["column affine of record 1 (sub-0001) has 15 values, expected 16"]),
        ("min", -3.0, ["record 1 (sub-0001)", "intensity_min is 0, but the index has -3"]),
        ("max", 0.0, ["record 1 (sub-0001)", "cannot be rescaled"]),
        ("source_mtimes", [1.0, 2.0], ["source_mtimes of record 1 (sub-0001) has 2 values, expected 1"]),
        ("source_sizes", [], ["source_sizes of record 1 (sub-0001) has 0 values, expected 1"]),
        ("source_sizes", [1, 2, 3], ["source_sizes of record 1 (sub-0001) has 3 values, expected 2"]),
        ("source_sizes", [None], ["column source_sizes has 1 empty values"]),
        ("source_affine", [0.0] * 15, ["source_affine of record 1 (sub-0001) has 15 values, expected 16"]),
    ],
)
def test_changed_index(gzip: Path, column: str, value: object, texts: list[str]) -> None:
    edit_index(gzip, set_cell(column, 1, value))
    some(problems(gzip), *texts)


def test_positions_of_other_shards(gzip: Path) -> None:
    def shift(table: pa.Table) -> pa.Table:
        place = table.column_names.index("position")
        return table.set_column(place, "position", pc.add(table["position"], 50))

    edit_index(gzip, shift)
    only(problems(gzip), f"{INDEX0}: its positions are 50 to", "expected some of 0 to")


def test_a_sharding_by_which_the_dataset_is_not_cut(gzip: Path) -> None:
    """Another number of shards is refused by all that read a dataset; this one has the same."""
    size = COUNT - 1
    edit_info(gzip, lambda i: i["config"].update(sharding={"examples_per_shard": size, "num_shards": None}))
    some(problems(gzip), "index/train-00001-of-00002.parquet: its positions are", f"some of {size} to {size}")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("min", 1e-9), ("mean", 1.0), ("std", 1.0), ("dtype", "uint8")),
        *(("source_shape", [6, 5, 5]), ("source_affine", [1.0] * 16)),
    ],
)
def test_deep_compares_the_statistics(gzip: Path, column: str, value: object) -> None:
    edit_index(gzip, set_cell(column, 1, value))
    some(problems(gzip, deep=ALL), "record 1 (sub-0001)", f"index has {column}", "its image has")


def test_dtype_of_native_voxels(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("native")
    edit_index(output, set_cell("dtype", 1, "uint16"))
    only(problems(output), "record 1 (sub-0001)", "int16", "the index has uint16")


def test_records_beside_a_wrong_row_are_still_checked(gzip: Path) -> None:
    edit_index(gzip, set_cell("offset", 1, 1))
    report = verify_dataset(str(gzip))
    assert report.num_examples == COUNT
    assert not any("record 0" in p for p in report.problems)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda t: t.drop_columns(["zooms"]), "column zooms is missing"),
        (
            lambda t: t.set_column(5, "offset", t["offset"].cast(pa.string())),
            "column offset is string, expected int64",
        ),
        (lambda t: t.slice(1), "has 1 rows, but dataset_info.json gives 2 examples"),
        (
            lambda t: t.set_column(0, "example_id", t["example_id"].cast(pa.binary())),
            "column example_id is binary, expected string",
        ),
    ],
)
def test_index_of_another_form(gzip: Path, edit: Callable[[pa.Table], pa.Table], text: str) -> None:
    edit_index(gzip, edit)
    some(problems(gzip), INDEX0, text)


def test_index_whose_text_is_no_text(gzip: Path) -> None:
    content = (gzip / INDEX0).read_bytes()
    edit_index(gzip, set_cell("participant_id", 1, "marked"))

    def spoil(table: pa.Table) -> pa.Table:
        damaged = pa.array([b"ok", b"\xff\xfe"], pa.binary()).view(pa.string())
        return table.set_column(1, "participant_id", damaged)

    edit_index(gzip, spoil)
    assert (gzip / INDEX0).read_bytes() != content
    only(problems(gzip), f"{INDEX0}: cannot be read", "run the build again")


@pytest.mark.parametrize("damage", [b"", b"no index", b"PAR1 no index PAR1"])
def test_index_that_cannot_be_read(gzip: Path, damage: bytes) -> None:
    (gzip / INDEX0).write_bytes(damage)
    some(problems(gzip), f"{INDEX0}: cannot be read")


def test_deleted_index(gzip: Path) -> None:
    (gzip / INDEX0).unlink()
    report = verify_dataset(str(gzip))
    only(report.problems, f"{INDEX0}: is missing", f"{SHARD0}.gz cannot be checked")
    assert report.num_examples == 3


def test_index_of_another_shard(gzip: Path) -> None:
    other = "index/train-00001-of-00002.parquet"
    shutil.copy(gzip / INDEX0, gzip / other)
    some(problems(gzip), other, "written for a file of sha256")


# dataset_info.json


@pytest.mark.parametrize(
    ("edit", "texts"),
    [
        (
            lambda i: i["splits"]["train"]["shards"][0].update(num_bytes=999),
            [f"{SHARD0}.gz", "dataset_info.json gives 999"],
        ),
        (
            lambda i: i["splits"]["train"]["shards"][0].update(sha256="0" * 64),
            [f"{SHARD0}.gz", "dataset_info.json gives 0000"],
        ),
        (lambda i: i["manifest"].update(num_rows=7), ["do not make the manifest's 7 rows"]),
        (
            lambda i: i.update(num_failures=1, failures="failures.jsonl", failures_sha256="0" * 64),
            ["failures.jsonl: is missing", "gives 1 failure"],
        ),
        (lambda i: i.update(num_failures=1), ["num_failures is 1, but failures is None"]),
        (lambda i: i.update(shape=[6, 5, 5]), ["(6, 5, 4), but dataset_info.json gives (6, 5, 5)"]),
        (
            lambda i: (i.update(dtype="float16"), i["config"].update(voxel_dtype="float16")),
            ["float32, but dataset_info.json gives float16"],
        ),
        (lambda i: i.update(labelled=False), ["label is 0", "labelled: False"]),
        (lambda i: i["features"].pop("zooms"), ["feature zooms is not one"]),
        (lambda i: i["features"].update(age="float"), ["feature age is missing"]),
        (lambda i: i["features"].update(zooms="float[4]"), ["feature zooms is float[3]", "float[4]"]),
        (lambda i: i["features"].update(id="float"), ["feature id is bytes", "gives float"]),
        (lambda i: i["config"].update(rescale="none"), ["range from 0 to 1, expected 0 to"]),
        (lambda i: i["config"].update(voxel_dtype="native"), ["column scl_slope is missing"]),
    ],
)
def test_changed_info(gzip: Path, edit: Callable[[dict[str, Any]], None], texts: list[str]) -> None:
    edit_info(gzip, edit)
    edit_info(gzip, add_up)
    found = problems(gzip)
    for text in texts:
        some(found, text)


def add_up(facts: dict[str, Any]) -> None:
    """Make the sums of splits those of their shards."""
    for split in facts["splits"].values():
        split |= {key: sum(s[key] for s in split["shards"]) for key in ("num_examples", "num_bytes")}


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda i: i["splits"]["train"].update(num_examples=6), "num_examples of split train is 6"),
        (lambda i: i["splits"]["train"].update(num_bytes=6), "num_bytes of split train is 6"),
        (
            lambda i: i["splits"]["train"]["shards"][0].update(num_bytes=9),
            rf"{SHARD0}\.gz has 2 examples in 9 bytes",
        ),
        (lambda i: i["splits"]["train"]["shards"].pop(), r"expected train-00000-of-00001\.tfrecord\.gz"),
        (lambda i: i["splits"].update(test=i["splits"].pop("train")), f"split test is {SHARD0}"),
        (lambda i: i["splits"]["train"]["shards"].reverse(), f"shard 0 of split train is {SHARD1}"),
        (lambda i: i["config"].update(compression="none"), "with compression none"),
    ],
)
def test_info_that_no_build_has_written(
    gzip: Path, edit: Callable[[dict[str, Any]], None], text: str
) -> None:
    edit_info(gzip, edit)
    with pytest.raises(DatasetError, match=rf"dataset_info\.json: not a dataset's info: .*{text}"):
        problems(gzip)


# Records that are whole, and wrong


def with_features(**values: Any) -> Callable[[bytes], bytes]:
    """An edit of a payload that sets features; None removes one."""

    def change(payload: bytes) -> bytes:
        held = decode_example(payload)
        features = {k: bytes(v) if isinstance(v, memoryview) else v for k, v in held.items()}
        return encode_example({k: v for k, v in (features | values).items() if v is not None})

    return change


def with_voxels(edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[bytes], bytes]:
    """An edit of a payload that changes its voxels."""

    def change(payload: bytes) -> bytes:
        voxels = decode_tensor(decode_example(payload)["image_raw"]).copy()
        return with_features(image_raw=encode_tensor(edit(voxels)))(payload)

    return change


def put(value: float, at: tuple[int, int, int] = (3, 2, 1)) -> Callable[[np.ndarray], np.ndarray]:
    def edit(voxels: np.ndarray) -> np.ndarray:
        voxels[at] = value
        return voxels

    return edit


def double(value: float) -> bytes:
    return struct.pack("<d", value)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("edit", "texts"),
    [
        (with_voxels(put(np.nan)), ["1 of 120 voxels are NaN or infinite"]),
        (with_voxels(put(-np.inf)), ["1 of 120 voxels are NaN or infinite"]),
        (with_voxels(put(1.5)), ["range from 0 to 1.5, expected 0 to 1"]),
        (with_voxels(put(-0.5)), ["range from -0.5 to 1, expected 0 to 1"]),
        (with_voxels(lambda v: v / 2), ["range from 0 to 0.5, expected 0 to 1"]),
        (with_voxels(lambda v: v[:5]), ["shape is (5, 5, 4), but the index has (6, 5, 4)"]),
        (with_voxels(lambda v: v[:0]), ["there are no voxels"]),
        (with_voxels(lambda v: v.astype(np.float64)), ["voxels are float64"]),
        (with_features(id=b"sub-7"), ["id is 'sub-7', but the index has 'sub-0001'"]),
        (with_features(id=b"\xff"), ["id is '\ufffd'"]),
        (with_features(label=floats(7)), ["label is 7, but the index has 1"]),
        (with_features(label=floats(np.nan)), ["label is nan, but the index has 1"]),
        (with_features(affine=floats(*range(16))), ["affine is 0 1 2", "the index has -2 0 0"]),
        (with_features(intensity_max=floats(7)), ["intensity_max is 7"]),
        (with_features(zooms=None), ["feature zooms is missing"]),
        (with_features(age=floats(7)), ["feature age is not one"]),
        (with_features(scl_slope=double(7), scl_inter=double(0)), ["feature scl_slope is not one"]),
        (with_features(label=b"1"), ["feature label is bytes", "gives float"]),
        (with_features(label=floats(1, 2)), ["feature label is float[2]", "gives float"]),
        (with_features(image_raw=b"\x08\x01"), ["not a tensor"]),
        (with_features(image_raw=b"junk"), ["not a"]),
        (lambda payload: payload[:-1], ["not an Example"]),
        (lambda payload: b"junk", ["not an Example"]),
    ],
)
def test_wrong_record(gzip: Path, edit: Callable[[bytes], bytes], texts: list[str]) -> None:
    edit_record(gzip, 1, edit)
    report = verify_dataset(str(gzip))
    assert report.num_examples == COUNT
    assert all(p.startswith(f"{SHARD0}.gz: record 1 (sub-0001): ") for p in report.problems)
    for text in texts:
        some(report.problems, text)


@pytest.mark.parametrize(
    ("edit", "texts"),
    [
        (with_voxels(put(2000)), ["voxels, scaled, range from 0 to 2000"]),
        (
            with_features(scl_slope=double(2), scl_inter=double(1)),
            ["scaling is 2 1, but the index has", "range from 1 to"],
        ),
        (with_features(scl_slope=double(2)), ["feature scl_inter is missing"]),
        (
            with_features(scl_slope=double(np.nan), scl_inter=double(0)),
            ["scaling is nan 0, but the index has", "range from nan"],
        ),
        (with_features(scl_slope=double(1), scl_inter=b""), ["feature scl_inter has 0 bytes"]),
    ],
)
def test_wrong_native_record(
    copy_of: Callable[[str], Path], edit: Callable[[bytes], bytes], texts: list[str]
) -> None:
    output = copy_of("native")
    edit_record(output, 1, edit)
    found = problems(output)
    assert len(found) == len(texts)
    for problem, text in zip(found, texts, strict=True):
        assert problem.startswith(f"{SHARD0}.gz: record 1 (sub-0001): ")
        assert text in problem


def test_wrong_unscaled_record(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("unscaled")
    edit_record(output, 1, with_voxels(put(2000)))
    only(problems(output), "record 1 (sub-0001)", "range from 0 to 2000, expected 0 to")


# The manifest and failures.jsonl


def change_manifest(manifest: Path, *lines: tuple[int, str | None]) -> None:
    """Replace data lines by their number, or remove them."""
    held = manifest.read_text().splitlines()
    for number, line in sorted(lines, reverse=True):
        held[1 + number : 2 + number] = [] if line is None else [line]
    manifest.write_text("\n".join(held) + "\n")


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (
            (1, "sub-0001\tsub-0001.nii.gz\t8\t21"),
            ["1 example has another label", "sub-0001 (1.0, 8.0)"],
        ),
        ((2, None), ["1 example is not in the manifest: sub-0002"]),
        (
            (COUNT, "sub-9\tsub-9.nii.gz\t8\t21"),
            ["1 manifest row is neither in the shards nor in the list of failures: sub-9; run"],
        ),
        (
            (1, "sub-0001\tsub-0002.nii.gz\t1\t21"),
            ["1 example has another path", "sub-0001 (sub-0001.nii.gz, sub-0002.nii.gz)"],
        ),
        ((1, "sub-0001\tsub-0001.nii.gz\t1\t8"), ["1 example has another age", "sub-0001 (21, 8)"]),
    ],
)
def test_changed_manifest(
    gzip: Path, manifest: Path, change: tuple[int, str | None], texts: list[str]
) -> None:
    assert problems(gzip, manifest=str(manifest)) == ()
    change_manifest(manifest, change)
    only(problems(gzip, manifest=str(manifest)), str(manifest), *texts)


@pytest.mark.parametrize(
    ("was", "now", "texts"),
    [
        ("age", "years", ["lacks columns: age; give the", "has new columns: years; give the"]),
        ("path", "path\tsite", ["has new columns: site"]),
    ],
)
def test_other_columns_of_the_manifest(
    gzip: Path, manifest: Path, was: str, now: str, texts: list[str]
) -> None:
    head, *lines = manifest.read_text().splitlines()
    cell = "\tA" if "\t" in now else ""
    at = head.split("\t").index(was)
    rows = [line.split("\t") for line in lines]
    lines = ["\t".join([*row[:at], row[at] + cell, *row[at + 1 :]]) for row in rows]
    manifest.write_text("\n".join([head.replace(was, now), *lines]) + "\n")
    found = problems(gzip, manifest=str(manifest))
    assert len(found) == len(texts)
    for text in texts:
        some(found, text)


def test_files_that_are_swapped_in_the_manifest(tmp_path: Path) -> None:
    write_cohort(tmp_path, 3)
    for i in range(3):
        write_image(tmp_path / f"mask-{i}.nii", np.full(brain().shape, i, np.uint8))
    rows = [
        {"participant_id": f"sub-000{i}", "path": name_of(i), "label": i, "mask": f"mask-{i}.nii"}
        for i in range(3)
    ]
    manifest = write_manifest(tmp_path / "masks.tsv", rows)
    output = build_dataset(
        manifest, tmp_path / "out", RecordConfig(mask_dtype="uint8"), columns=Columns(mask="mask")
    )
    assert problems(output, manifest=str(manifest), deep=ALL) == ()
    for column in ("path", "mask"):
        swapped = [dict(row) for row in rows]
        swapped[0][column], swapped[1][column] = rows[1][column], rows[0][column]
        write_manifest(manifest, swapped)
        only(problems(output, manifest=str(manifest)), f"2 examples have another {column} in the manifest")


def test_order_of_the_manifest_does_not_matter(gzip: Path, manifest: Path) -> None:
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    assert problems(gzip, manifest=str(manifest)) == ()


def test_first_few_of_many_differences_are_named(gzip: Path, manifest: Path) -> None:
    rows = [{"participant_id": f"new-{i}", "path": "x.nii", "label": 0} for i in range(9)]
    found = problems(gzip, manifest=str(write_manifest(manifest, rows)))
    some(found, f"{COUNT} examples", "sub-0000, sub-0001, sub-0002, …")
    some(found, "9 manifest rows", "new-0, new-1, new-2, …")


def test_other_splits_in_the_manifest(gzip: Path, manifest: Path) -> None:
    lines = manifest.read_text().splitlines()
    splits = ["split", "train", "test", *["train"] * (COUNT - 2)]
    manifest.write_text("".join(f"{a}\t{b}\n" for a, b in zip(lines, splits, strict=True)))
    only(problems(gzip, manifest=str(manifest)), "1 example has another split", "(train, test)")


def test_labels_where_the_dataset_has_none(tmp_path: Path) -> None:
    folder = write_cohort(tmp_path / "cohort", 2).parent
    rows = [{"path": f"sub-000{i}.nii.gz"} for i in range(2)]
    manifest = write_manifest(folder / "m.csv", rows)
    output = build_dataset(manifest, tmp_path / "out")
    write_manifest(manifest, [{**row, "label": 1} for row in rows])
    only(problems(output, manifest=str(manifest)), "2 examples have another label", "(None, 1.0)")


@pytest.fixture
def with_failure(tmp_path: Path) -> Path:
    manifest = write_cohort(tmp_path / "cohort", 3)
    (manifest.parent / "sub-0002.nii.gz").write_bytes(b"no image")
    return build_dataset(manifest, tmp_path / "out", max_bad_fraction=0.5)


@pytest.mark.parametrize(
    ("edit", "texts"),
    [
        (lambda text: text + text.replace("0002", "0003"), ["has 2 lines", "gives 1 failure"]),
        (lambda text: text.replace("0002", "0001"), ["1 example is also in the shards", "sub-0001"]),
        (lambda text: text[:20], ["failures.jsonl: row 1: not JSON"]),
        (lambda text: text + text, ["failures.jsonl: row 2: id 'sub-0002' is also in row 1"]),
    ],
)
def test_changed_failures(with_failure: Path, edit: Callable[[str], str], texts: list[str]) -> None:
    path = with_failure / "failures.jsonl"
    path.write_text(edit(path.read_text()))
    some(problems(with_failure), *texts)


def test_failure_of_no_row_of_the_manifest(with_failure: Path, tmp_path: Path) -> None:
    path = with_failure / "failures.jsonl"
    path.write_text(path.read_text().replace("sub-0002", "sub-0003"))
    found = problems(with_failure, manifest=str(tmp_path / "cohort/manifest.tsv"))
    some(found, "1 example is not in the manifest: sub-0003")
    some(found, "1 manifest row is neither", "sub-0002")


@pytest.mark.parametrize("column", ["site", "message", "manifest_row"])
def test_a_changed_cell_of_a_failed_row_is_named_by_its_column(tmp_path: Path, column: str) -> None:
    folder = write_cohort(tmp_path / "cohort", 3).parent
    (folder / "sub-0002.nii.gz").write_bytes(b"no image")
    rows = [{"path": f"sub-000{i}.nii.gz", "session_id": "", column: f"cell {i}"} for i in range(3)]
    rows = [{"participant_id": f"sub-000{i}", **row} for i, row in enumerate(rows)]
    manifest = write_manifest(folder / "m.csv", rows)
    output = build_dataset(manifest, tmp_path / "out", max_bad_fraction=0.5)
    assert problems(output, manifest=str(manifest)) == ()
    write_manifest(manifest, [*rows[:2], {**rows[2], column: "other"}])
    text = f"1 example has another {column} in the manifest (dataset's, manifest's): sub-0002 (cell 2, other)"
    only(problems(output, manifest=str(manifest)), text)
    absolute = [{**row, "path": str(folder / row["path"])} for row in rows]
    write_manifest(manifest, [*rows[:2], absolute[2]])
    assert problems(output, manifest=str(manifest)) == ()  # the list does not say how a path was written
    write_manifest(manifest, [*rows[:2], {**rows[2], "path": "other.nii"}])
    only(problems(output, manifest=str(manifest)), "another path", "sub-0002 (sub-0002.nii.gz, other.nii)")


def test_deleted_failures(with_failure: Path) -> None:
    (with_failure / "failures.jsonl").unlink()
    only(problems(with_failure), "failures.jsonl: is missing", "gives 1 failure")


# Deep


def test_changed_image(gzip: Path, manifest: Path) -> None:
    voxels = brain(seed=1)
    voxels[2, 2, 2] ^= 1
    write_image(manifest.parent / "sub-0001.nii.gz", voxels)
    assert problems(gzip, manifest=str(manifest)) == ()
    only(
        problems(gzip, manifest=str(manifest), deep=ALL),
        f"{SHARD0}.gz: record 1 (sub-0001): what is stored differs from sub-0001.nii.gz in image_raw",
        "a file changed since the build (source_",
        "build it again",
    )


def test_changed_header(plain: Path, manifest: Path) -> None:
    affine = np.diag([-2.0, 2, 2.5, 1])
    write_image(manifest.parent / "sub-0001.nii.gz", brain(seed=1), affine=affine)
    only(problems(plain, manifest=str(manifest), deep=ALL), "in affine; ")


def test_record_that_its_unchanged_image_does_not_give(gzip: Path) -> None:
    edit_record(gzip, 1, with_voxels(put(0.25)))
    assert problems(gzip) == ()
    only(
        problems(gzip, deep=ALL),
        " in image_raw",
        "the sizes and times of its files are unchanged",
        "--recheck",
    )


def test_image_that_was_only_copied(gzip: Path, manifest: Path) -> None:
    (manifest.parent / "sub-0001.nii.gz").touch()
    image = manifest.parent / "sub-0002.nii.gz"
    image.write_bytes(nifti_bytes(brain(seed=2)))  # no longer compressed
    assert problems(gzip, manifest=str(manifest), deep=ALL) == ()


def test_missing_image(gzip: Path, manifest: Path) -> None:
    (manifest.parent / "sub-0003.nii.gz").unlink()
    report = verify_dataset(str(gzip), manifest=str(manifest), deep=ALL)
    only(
        report.problems,
        f"{SHARD1}.gz: record 1 (sub-0003): cannot be rebuilt: sub-0003.nii.gz: cannot be read",
    )


def test_other_id_column(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", 2)
    columns = Columns(id="age", label="label")
    output = build_dataset(manifest, tmp_path / "out", columns=columns)
    assert problems(output, manifest=str(manifest), deep=ALL) == ()
    text = json.loads((output / "dataset_info.json").read_text())
    assert text["config"]["columns"]["id"] == "age"
