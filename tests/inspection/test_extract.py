"""Images out of records, against the images that went in and nibabel's reading of both."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.cli import main as cli
from beam_nifti.config import RecordConfig, Sharding
from beam_nifti.errors import DatasetError, UsageError
from beam_nifti.inspection.extract import file_name, read_volume, read_volumes, refuse_sources
from beam_nifti.volume import load_volume, rescale_volume
from beam_nifti.volume.nifti_writer import write_nifti
from beam_nifti.volume.rescale import RescaleRange, Scaling, restore_units
from tests.datasets import build_dataset, edit_index, edit_info, edit_record, info_of, set_cell
from tests.images import (
    AFFINE,
    REAL_DTYPES,
    Array,
    brain,
    random_voxels,
    row_of,
    write_cohort,
    write_image,
    write_manifest,
)

COUNT = 3
SHEARED = AFFINE + np.array([[0, 0.7, 0, 0], [0] * 4, [0] * 4, [0] * 4])
METHODS = ("minmax", "percentile:2,98", "window:-50,800", "zscore", "none")
PRECISION = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half a unit in the last place, relative."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return build_dataset(write_cohort(folder / "cohort", COUNT), folder / "out")


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Int16 images: with a scaling, with frames and a sheared affine, and of an id that is a path."""
    folder = tmp_path_factory.mktemp("native")
    write_image(folder / "scans/scaled.nii.gz", brain(), slope=0.25, inter=-7.5, byte_order=">")
    write_image(folder / "frames.nii", random_voxels((5, 4, 3, 6)), affine=SHEARED, version=2)
    rows = [{"path": "scans/scaled.nii.gz"}, {"path": "frames.nii"}]
    config = RecordConfig(voxel_dtype="native", frames="all", compression="none")
    manifest = write_manifest(folder / "m.csv", rows)
    return build_dataset(manifest, folder / "out", config, allow_mixed_shapes=True)


@pytest.fixture
def extract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run the command in an empty folder: `extract(dataset, "--id", "a")` -> what it says."""
    monkeypatch.chdir(tmp_path)

    def run(output: Path, *flags: str, code: int = cli.SUCCESS) -> str:
        assert cli.main(["extract", str(output), *flags]) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    return run


def values_of(path: Path) -> npt.NDArray[np.float64]:
    """The image's units, as nibabel has them."""
    return np.asarray(nib.load(path).dataobj, np.float64)


def test_an_image_comes_back(dataset: Path, extract: Callable[..., str], tmp_path: Path) -> None:
    said = extract(dataset, "--id", "sub-0002", "--id", "sub-0000", "--id", "sub-0002")
    assert said.splitlines() == [f"image    6×5×4 float32: sub-000{i}.nii.gz" for i in (2, 0)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sub-0000.nii.gz", "sub-0002.nii.gz"]
    for i in (0, 2):
        image = nib.load(tmp_path / f"sub-000{i}.nii.gz")
        assert image.get_data_dtype() == np.float32
        assert np.array_equal(np.rint(image.dataobj), brain(seed=i))
        assert np.array_equal(image.affine, AFFINE)
        header = image.header
        assert header.get_xyzt_units() == ("mm", "unknown")
        assert (int(header["sform_code"]), int(header["qform_code"])) == (2, 2)
        assert np.allclose(header.get_qform(), AFFINE)
        assert header["descrip"] == header["aux_file"] == header["intent_name"] == header["db_name"] == b""


@pytest.mark.parametrize(
    ("example_id", "source", "name", "axes"),
    [
        ("scans/scaled.nii.gz", "scans/scaled.nii.gz", "scans_scaled.nii.gz", 3),
        ("frames.nii", "frames.nii", "frames.nii.gz", 4),
    ],
)
def test_native_voxels_come_back_bit_for_bit(
    native: Path,
    extract: Callable[..., str],
    tmp_path: Path,
    example_id: str,
    source: str,
    name: str,
    axes: int,
) -> None:
    extract(native, "--id", example_id)
    was, now = nib.load(native.parent / source), nib.load(tmp_path / name)
    assert now.get_data_dtype() == np.int16
    assert now.ndim == axes
    assert np.array_equal(now.dataobj.get_unscaled(), was.dataobj.get_unscaled())
    assert np.array_equal(values_of(tmp_path / name), values_of(native.parent / source))
    assert np.array_equal(now.affine, was.affine.astype(np.float32))
    assert np.array_equal(now.header.get_zooms()[:3], np.float32(was.header.get_zooms()[:3]))


def test_what_goes_in_again_is_the_same_record(native: Path, tmp_path: Path) -> None:
    for number, example_id in enumerate(("scans/scaled.nii.gz", "frames.nii")):
        volume = read_volume(str(native), example_id)
        assert volume.example_id == example_id
        volume.save(str(tmp_path / f"{number}.nii"))
        again = load_volume(row_of(tmp_path / f"{number}.nii"), record=RecordConfig(frames="all"))
        assert np.array_equal(again.voxels, volume.voxels)
        assert again.scaling == volume.scaling
        assert again.zooms == pytest.approx(volume.zooms, rel=1e-7)
        assert np.allclose(again.affine, volume.affine, rtol=1e-7)


def restored(path: Path, config: RecordConfig) -> tuple[Array, RescaleRange | None]:
    """What comes back of an image, and what became 0 and 1 on the way."""
    volume = rescale_volume(load_volume(row_of(path)), config)
    ends = (
        volume.rescale_ranges[0]
        if volume.rescale_ranges
        else RescaleRange(volume.intensities[0].min, volume.intensities[0].max)
    )
    ends_or_none = None if config.method == "none" else ends
    return restore_units(volume.voxels, ends_or_none), ends_or_none


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("source", ["int16", "float32", "uint8"])
def test_values_come_back_within_the_stated_error(
    tmp_path: Path, method: str, dtype: str, source: str
) -> None:
    voxels = random_voxels((9, 8, 7), source) if source != "int16" else brain((9, 8, 7))
    path = write_image(tmp_path / "a.nii", voxels.clip(-1e4, 1e4).astype(source), slope=0.5, inter=-3)
    found, ends = restored(path, RecordConfig(rescale=method, voxel_dtype=dtype))
    values = values_of(path)
    far = PRECISION[dtype] * np.abs(values)
    if ends is not None:
        # 2**-25 of the width is half a step between the subnormal numbers of float16.
        stored = np.maximum(PRECISION[dtype] * np.abs(values - ends.low), 2.0**-25 * (ends.high - ends.low))
        far = stored + 2.0**-24 * (np.abs(values) + np.abs(values - ends.low))
    assert found.dtype == np.float32
    assert (np.abs(found - values) <= far * (1 + 1e-6)).all()


@pytest.mark.parametrize("method", ["minmax", "percentile:5,95", "window:100,900"])
def test_uint8_comes_back_within_half_a_level_and_clipped(tmp_path: Path, method: str) -> None:
    path = write_image(tmp_path / "a.nii", brain((9, 8, 7)))
    found, ends = restored(path, RecordConfig(rescale=method, voxel_dtype="uint8", clip=method != "minmax"))
    assert ends is not None
    clipped = values_of(path).clip(ends.low, ends.high)
    assert np.abs(found - clipped).max() <= (ends.high - ends.low) / 510 + 2.0**-24 * np.abs(clipped).max()
    assert (found.min(), found.max()) == pytest.approx((ends.low, ends.high), rel=1e-7)


@given(st.sampled_from(["int8", "uint8", "int16", "uint16"]), st.integers(0, 1000))
def test_integers_of_16_bits_come_back_exactly(dtype: str, seed: int) -> None:
    voxels = random_voxels((5, 4, 3), dtype, seed)
    low, high = int(voxels.min()), int(voxels.max())
    stored = ((voxels.astype(np.float64) - low) / (high - low)).astype(np.float32)
    assert np.array_equal(np.rint(restore_units(stored, RescaleRange(low, high))), voxels)


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        (-1.7e308, 1.7e308, np.float64),
        (0.0, 1e-300, np.float64),
        (0.0, 3e38, np.float32),
        (-1e-9, 1e-9, np.float32),
    ],
)
def test_float64_where_float32_cannot_hold_the_values(low: float, high: float, dtype: type) -> None:
    stored = np.array([0.0, 0.25, 1.0], np.float32)
    found = restore_units(stored, RescaleRange(low, high))
    assert found.dtype == dtype
    expected = np.array([low, low / 2 + (low / 4 + high / 4), high])
    assert np.allclose(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_every_dtype_is_written(tmp_path: Path, dtype: str) -> None:
    voxels = random_voxels((5, 4, 3), dtype)
    for name in ("a.nii", "a.nii.gz"):
        write_nifti(str(tmp_path / name), voxels, Scaling(), AFFINE, (2, 2, 2.5))
        image = nib.load(tmp_path / name)
        assert isinstance(image, nib.Nifti1Image)
        assert image.get_data_dtype() == dtype
        assert np.array_equal(np.asarray(image.dataobj), voxels)


def test_an_affine_that_no_qform_can_be_is_the_sform_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "a.nii")
    for affine, zooms in ((SHEARED, (2.0, 2.119, 2.5)), (AFFINE, (1.0, 1.0, 1.0))):
        write_nifti(path, brain(), Scaling(), affine, zooms)
        header = nib.load(path).header
        assert (int(header["sform_code"]), int(header["qform_code"])) == (2, 0)
        assert np.allclose(nib.load(path).affine, affine)
        assert header.get_zooms() == pytest.approx(zooms)


def test_nifti_2_where_nifti_1_would_change_a_value(tmp_path: Path) -> None:
    path = str(tmp_path / "a.nii.gz")
    for voxels, scaling in (
        (np.zeros((1, 1, 40_000), np.uint8), Scaling()),
        (brain(), Scaling(1 / 3, 0.1)),
    ):
        write_nifti(path, voxels, scaling, AFFINE, (2, 2, 2.5))
        image = nib.load(path)
        assert isinstance(image, nib.Nifti2Image)
        assert image.shape == voxels.shape
        assert np.array_equal(np.asarray(image.dataobj, np.float64), scaling.apply(voxels))


def test_an_image_that_is_there_stays(dataset: Path, extract: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "sub-0001.nii.gz").write_bytes(b"mine")
    ids = ("--id", "sub-0000", "--id", "sub-0001")
    assert "sub-0001.nii.gz: already exists" in extract(dataset, *ids, code=cli.USAGE)
    assert [p.name for p in tmp_path.iterdir()] == ["sub-0001.nii.gz"]
    extract(dataset, *ids, "--overwrite")
    assert nib.load(tmp_path / "sub-0001.nii.gz").shape == (6, 5, 4)


def test_an_image_that_the_dataset_was_built_from_stays(
    dataset: Path, extract: Callable[..., str], tmp_path: Path
) -> None:
    (source,) = dataset.parent.glob("cohort/**/sub-0001*.nii.gz")
    content, link = source.read_bytes(), tmp_path / "sub-0001.nii.gz"
    link.symlink_to(source)
    for path in (source, link):
        found = extract(dataset, "--id", "sub-0001", "--out", str(path), "--overwrite", code=cli.USAGE)
        assert f"{path}: the dataset was built from this file; choose another path" in found
    assert source.read_bytes() == content


def test_an_index_that_lacks_the_time_of_a_source_is_named(dataset: Path, tmp_path: Path) -> None:
    sparse = Path(shutil.copytree(dataset, tmp_path / "sparse"))
    edit_info(sparse, lambda facts: facts["manifest"].update(path=""))  # as of WriteToTFRecord
    edit_index(sparse, set_cell("source_mtimes", 0, None))
    with pytest.raises(DatasetError, match="indexes have 3 source_sizes and 2 source_mtimes; run beam-nifti"):
        refuse_sources(str(sparse), [str(sparse / "dataset_info.json")])


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--id", "sub-0000", "--id", "x"], cli.FAILED, "no record 'x'; the ids of its 3 records"),
        (["--id", "sub-0000", "--out", "a.mgz"], cli.USAGE, "a.mgz: not the name of a NIfTI image"),
        (
            ["--id", "a", "--id", "b", "--out", "a.nii"],
            cli.USAGE,
            "--out names one file, but there are 2 ids",
        ),
        (["--id", "a/b", "--id", "a:b"], cli.USAGE, "would both be written to a_b.nii.gz"),
        (["--id", "sub-0000", "--out", ""], cli.USAGE, "--out is empty"),
    ],
)
def test_what_is_refused_writes_nothing(
    dataset: Path, extract: Callable[..., str], tmp_path: Path, flags: list[str], code: int, message: str
) -> None:
    assert message in extract(dataset, *flags, code=code)
    assert list(tmp_path.iterdir()) == []


def test_names_that_no_file_can_have() -> None:
    assert file_name('a/b\\c:d*e?f"g<h>i|j\x00k\nl', ".nii.gz") == "a_b_c_d_e_f_g_h_i_j_k_l.nii.gz"
    assert file_name("Müller 1.5", ".nii.gz") == "Müller 1.5.nii.gz"


def test_a_damaged_record_is_not_extracted(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", COUNT)
    output = build_dataset(manifest, tmp_path / "out", sharding=Sharding(num_shards=1))
    shard = output / info_of(output).shards[0].name
    edit_record(output, 0, lambda payload: payload.replace(b"sub-0000", b"sub-0009"))
    with pytest.raises(DatasetError, match=r"'sub-0000' of train.*id is 'sub-0009'.*run beam-nifti verify"):
        read_volume(str(output), "sub-0000")
    shard.write_bytes(shard.read_bytes()[:-40] + bytes(40))
    with pytest.raises(DatasetError, match=r"'sub-0002' of train.*cannot be read"):
        read_volume(str(output), "sub-0002")
    assert read_volume(str(output), "sub-0001").voxels.shape == (6, 5, 4)
    shard.unlink()
    with pytest.raises(DatasetError, match="No such file"):
        read_volume(str(output), "sub-0000")


def test_from_an_object_store_to_an_object_store(dataset: Path) -> None:
    from tests.object_store import MemoryFileSystem

    files = [path for path in dataset.rglob("*") if path.is_file()]
    store: dict[str, Any] = MemoryFileSystem.objects
    store |= {f"memory://d/{p.relative_to(dataset)}": (p.read_bytes(), 0.0) for p in files}
    (volume,) = read_volumes("memory://d", ["sub-0001"])
    volume.save("memory://d/again.nii")
    assert np.array_equal(np.rint(volume.voxels), brain(seed=1))
    assert load_volume(row_of("memory://d/again.nii")).voxels.dtype == np.float32


def test_the_name_of_an_image_is_needed() -> None:
    with pytest.raises(UsageError, match=r"a\.txt: not the name"):
        write_nifti("a.txt", brain(), Scaling(), AFFINE, (2, 2, 2.5))
