"""Several images an example: each becomes what it would be by itself, in one record."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from beam_nifti.cli import main as cli
from beam_nifti.config import BuildConfig, Columns, RecordConfig
from beam_nifti.errors import ManifestError, UsageError, VolumeError
from beam_nifti.inspection.extract import read_volume
from beam_nifti.inspection.verify import ALL, verify_dataset
from beam_nifti.manifest import VolumeRow, read_manifest
from beam_nifti.volume.preprocess import prepare_volume
from beam_nifti.volume.volume import Volume, load_header, load_volume, rescale_volume
from tests.build_helpers import CUTTING_RUNNER, assert_complete, build
from tests.datasets import edit_index, index_rows, info_of, manifest_of, set_cell
from tests.images import AFFINE, Array, brain, random_voxels, row_of, write_image, write_manifest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
NAMES = ("T1w", "T2w", "FLAIR")
COLUMNS = Columns(",".join(NAMES))
SHAPE = (6, 5, 4)


def cohort(folder: Path, count: int = 3, alike: bool = False) -> Path:
    """Examples of three images each; on disk in three ways, or alike."""
    rows = []
    for i in range(count):
        ways: Mapping[str, Any] = {"T1w": ("int16", 0.5, 3.0), "T2w": ("uint8", None, 0.0)}
        for n, name in enumerate(NAMES):
            dtype, slope, inter = ("int16", None, 0.0) if alike else ways.get(name, ("float32", None, 0.0))
            voxels = random_voxels(SHAPE, dtype, seed=10 * i + n)
            write_image(folder / f"{i}_{name}.nii.gz", voxels, slope=slope, inter=inter)
        rows.append({name: f"{i}_{name}.nii.gz" for name in NAMES} | {"participant_id": f"s{i}", "label": i})
    return write_manifest(folder / "m.tsv", rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rescale": "none", "compression": "none"},
        {"rescale": "percentile:1,99", "clip": True, "voxel_dtype": "uint8"},
        {"rescale": "zscore", "rescale_within": "nonzero", "orientation": "LPS", "shape": (8, 4, 4)},
        {"spacing": (3.0, 2.0, 2.0), "voxel_dtype": "float16"},
        {"voxel_dtype": "native"},
    ],
)
def test_each_channel_is_what_its_image_would_be_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    cohort(tmp_path, 1, alike=options.get("voxel_dtype") == "native")
    paths = [f"0_{name}.nii.gz" for name in NAMES]

    def made(row: VolumeRow, record: RecordConfig) -> Volume:
        return rescale_volume(prepare_volume(load_volume(row, str(tmp_path), record=record), record), record)

    row = row_of(paths[0], other_files=tuple(paths[1:]))
    stacked = made(row, RecordConfig(**options, channels=NAMES))
    for number, path in enumerate(paths):
        alone = made(row_of(path), RecordConfig(**options))
        assert stacked.voxels.dtype == alone.voxels.dtype
        assert np.array_equal(stacked.voxels[..., number], alone.voxels)
        assert np.array_equal(stacked.affine, alone.affine)
        for statistic in ("min", "max", "mean", "std"):
            found = getattr(stacked.intensities[number], statistic)
            assert found == pytest.approx(getattr(alone.intensities[0], statistic), rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"voxel_dtype": "native", "rescale": "percentile:1,99"}])
def test_a_dataset_is_that_of_its_columns(tmp_path: Path, options: dict[str, Any]) -> None:
    from beam_nifti.reader import load_dataset

    manifest = cohort(tmp_path / "c", alike=options.get("voxel_dtype") == "native")
    output = tmp_path / "all"
    build(manifest, output, columns=COLUMNS, **options)
    read = [x.numpy() for x, _ in load_dataset(output)]
    for number, name in enumerate(NAMES):
        single = tmp_path / name
        build(manifest, single, columns=Columns(name), **options)
        for x, (x_alone, _) in zip(read, load_dataset(single), strict=True):
            assert np.array_equal(x[..., number : number + 1], x_alone.numpy())
        for example_id in ("s0", "s2"):
            mine, its = (read_volume(str(o), example_id).voxels for o in (output, single))
            assert np.array_equal(mine[..., number], its)
    report = verify_dataset(str(output), manifest=str(manifest), deep=ALL)
    assert report.problems == ()
    assert report.num_deep == 3


def test_what_a_dataset_of_channels_says_of_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, output = cohort(tmp_path / "c"), tmp_path / "out"
    assert cli.main(["build", str(manifest), str(output), f"--path-column={COLUMNS.path}", "--quiet"]) == 0
    info = info_of(output)
    assert info.shape == (*SHAPE, 3)
    assert info.config["channels"] == list(NAMES)
    assert info.config["columns"]["path"] == "T1w,T2w,FLAIR"
    assert info.features["intensity_max"] == "float[3]"
    first = index_rows(output)[0]
    assert [first[name] for name in ("source", "T2w", "FLAIR")] == [f"0_{name}.nii.gz" for name in NAMES]
    assert first["dtype"] == "int16,uint8,float32"
    sizes = [(tmp_path / "c" / f"0_{name}.nii.gz").stat().st_size for name in NAMES]
    assert first["source_sizes"] == sizes
    capsys.readouterr()
    assert cli.main(["inspect", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "channels      T1w, T2w, FLAIR" in shown
    assert "FLAIR mean" in shown
    assert cli.main(["inspect", str(output), "--record=s1"]) == 0


def test_cut_everywhere_it_is_the_same(tmp_path: Path) -> None:
    manifest = cohort(tmp_path / "c")
    for name, runner in (("a", {}), ("b", {"runner": CUTTING_RUNNER})):
        build(manifest, tmp_path / name, columns=COLUMNS, unit_rows=1, **runner)
    assert_complete(tmp_path / "b", tmp_path / "a")


def test_a_change_of_any_image_is_noticed(tmp_path: Path) -> None:
    manifest, output = cohort(tmp_path / "c"), tmp_path / "out"
    build(manifest, output, columns=COLUMNS)
    assert build(manifest, output, columns=COLUMNS).read == frozenset()
    write_image(tmp_path / "c/1_FLAIR.nii.gz", random_voxels((6, 5, 4), "float32", seed=99))
    again = build(manifest, output, columns=COLUMNS)
    assert again.read == {f"1_{name}.nii.gz" for name in NAMES}
    assert verify_dataset(str(output), manifest=manifest_of(output), deep=ALL).ok


def test_other_channels_are_other_records() -> None:
    configs = [BuildConfig("m.tsv", "out", columns=Columns(path)) for path in ("a", "a,b", "b,a", "a,c")]
    assert len({config.record.fingerprint for config in configs}) == 4


def grids(folder: Path, affine: Array, shape: tuple[int, ...] = SHAPE) -> Any:
    write_image(folder / "a.nii")
    write_image(folder / "b.nii", brain(shape, seed=1), affine=affine)
    row = row_of("a.nii", other_files=("b.nii",))
    return row, str(folder), RecordConfig(channels=("a", "b"))


def shifted(mm: float) -> Array:
    affine = AFFINE.copy()
    affine[0, 3] += mm
    return affine


def turned(degrees: float) -> Array:
    affine, angle = AFFINE.copy(), np.deg2rad(degrees)
    turn = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    affine[:3, :3] = turn @ affine[:3, :3]
    return affine


@pytest.mark.parametrize(
    ("affine", "shape", "message"),
    [
        (
            shifted(0.21),
            SHAPE,
            r"b\.nii: its voxels are up to 0\.21 mm away from those of a\.nii; if they are the",
        ),
        (turned(3.0), SHAPE, r"b\.nii: its voxels are up to 0\.\d+ mm away from those of a\.nii"),
        (AFFINE @ np.diag([-1, 1, 1, 1]), SHAPE, r"b\.nii: its voxels are up to 20 mm away from"),
        (AFFINE, (6, 5, 3), r"b\.nii: shape \(6, 5, 3\) where a\.nii has \(6, 5, 4\); use --align first"),
    ],
)
def test_images_of_other_voxels_are_refused(
    tmp_path: Path, affine: Array, shape: tuple[int, ...], message: str
) -> None:
    row, folder, record = grids(tmp_path, affine, shape)
    for load in (load_volume, load_header):
        with pytest.raises(VolumeError, match=message):
            load(row, folder, record=record)


def test_images_within_a_tenth_of_a_voxel_are_stacked(tmp_path: Path) -> None:
    row, folder, record = grids(tmp_path, shifted(0.19))
    volume = load_volume(row, folder, record=record)
    assert volume.voxels.shape == (*SHAPE, 2)
    assert np.array_equal(volume.affine, AFFINE)


def test_native_voxels_have_one_dtype_and_scaling(tmp_path: Path) -> None:
    record = RecordConfig(voxel_dtype="native", channels=("a", "b"))
    write_image(tmp_path / "a.nii")
    write_image(tmp_path / "b.nii", slope=2.0)
    with pytest.raises(VolumeError, match=r"different dtypes or scalings.*--voxel-dtype float32"):
        load_volume(row_of("a.nii", other_files=("b.nii",)), str(tmp_path), record=record)


def test_frames_are_chosen_before_they_are_stacked(tmp_path: Path) -> None:
    voxels = random_voxels((6, 5, 4, 3))
    write_image(tmp_path / "a.nii")
    write_image(tmp_path / "b.nii", voxels)
    row = row_of("a.nii", other_files=("b.nii",))
    volume = load_volume(row, str(tmp_path), record=RecordConfig(frames="first", channels=("a", "b")))
    assert np.array_equal(volume.voxels[..., 1], voxels[..., 0])
    with pytest.raises(VolumeError, match=r"b\.nii: .*has 3 × 2 numbers per voxel.*--frames first"):
        load_volume(row, str(tmp_path), record=RecordConfig(frames="all", channels=("a", "b")))


def test_frames_of_several_images_are_no_examples() -> None:
    with pytest.raises(UsageError, match="--frames each makes examples of the frames of one image"):
        BuildConfig("m.tsv", "out", RecordConfig(frames="each"), COLUMNS)


def test_padding_keeps_the_range_of_each_channel(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii", np.full(SHAPE, 5, np.int16) + np.arange(4, dtype=np.int16))
    write_image(tmp_path / "b.nii", np.full(SHAPE, -90, np.int16) + np.arange(4, dtype=np.int16))
    record = RecordConfig(shape=(8, 8, 8), channels=("a", "b"))
    volume = prepare_volume(
        load_volume(row_of("a.nii", other_files=("b.nii",)), str(tmp_path), record=record), record
    )
    assert volume.voxels[0, 0, 0].tolist() == [5, -90]
    intensities = rescale_volume(volume, record).intensities
    assert [(i.min, i.max) for i in intensities] == [(5, 8), (-90, -87)]


def test_a_constant_channel_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii")
    write_image(tmp_path / "b.nii", np.ones(SHAPE, np.int16))
    record = RecordConfig(channels=("a", "b"))
    volume = load_volume(row_of("a.nii", other_files=("b.nii",)), str(tmp_path), record=record)
    with pytest.raises(VolumeError, match=r"^b\.nii: all voxels are 1"):
        rescale_volume(volume, record)


def test_failures_are_the_manifest_of_a_retry(tmp_path: Path) -> None:
    manifest, output = cohort(tmp_path / "c"), tmp_path / "out"
    write_image(tmp_path / "c/2_T2w.nii.gz", brain((6, 5, 3)))
    assert cli.main(["build", str(manifest), str(output), f"--path-column={COLUMNS.path}", "--quiet"]) == 1
    (line,) = (output / "failures.jsonl").read_text().splitlines()
    assert json.loads(line)["FLAIR"] == str(tmp_path / "c/2_FLAIR.nii.gz")
    write_image(tmp_path / "c/2_T2w.nii.gz", brain())
    assert build(output / "failures.jsonl", tmp_path / "retry", columns=COLUMNS).summary.num_written == 1


def test_anonymous_ids_hide_every_path(tmp_path: Path) -> None:
    manifest, output, key = cohort(tmp_path / "secret"), tmp_path / "out", tmp_path / "key"
    key.write_bytes(bytes(range(32)))
    write_image(tmp_path / "secret/2_T2w.nii.gz", brain((6, 5, 3)))
    build(manifest, output, columns=COLUMNS, anonymous_ids=str(key), max_bad_fraction=0.5)
    for path in output.rglob("*"):
        if path.is_file() and path.name != "dataset_info.json":  # which has the manifest's path
            assert b"T2w.nii" not in path.read_bytes(), path
    assert "T2w.nii" not in str(index_rows(output))
    report = verify_dataset(str(output), manifest=str(manifest), anonymous_ids=str(key), deep=ALL)
    assert report.problems == ()


def test_manifests_are_refused(tmp_path: Path) -> None:
    rows = [{"T1w": "a.nii", "T2w": ""}, {"T1w": " ", "T2w": "b.nii"}]
    manifest = str(write_manifest(tmp_path / "m.csv", rows))
    with pytest.raises(ManifestError, match=r"row 2: empty T1w(.|\n)*row 1: empty T2w"):
        read_manifest(manifest, Columns("T1w,T2w"))
    with pytest.raises(
        ManifestError, match="no column 'FLAIR'; the columns are: T1w, T2w; choose one with --path"
    ):
        read_manifest(manifest, Columns("T1w,FLAIR"))
    for path in ("T1w,", ",", ""):
        with pytest.raises(UsageError, match="--path-column is"):
            Columns(path)
    with pytest.raises(UsageError, match="name 'T1w' twice"):
        Columns("T1w,T2w,T1w")


def test_a_function_keeps_all_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one_channel.py").write_text(
        "import dataclasses, numpy\n"
        "def first(v): return dataclasses.replace(v, voxels=numpy.ascontiguousarray(v.voxels[..., 0]))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    row, folder, _ = grids(tmp_path, AFFINE)
    record = RecordConfig(preprocess="one_channel:first", channels=("a", "b"))
    with pytest.raises(VolumeError, match=r"returned voxels of shape \(6, 5, 4\); return all 2 channels"):
        prepare_volume(load_volume(row, folder, record=record), record)


def test_check_finds_images_that_do_not_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = cohort(tmp_path / "c")
    write_image(tmp_path / "c/1_FLAIR.nii.gz", affine=shifted(1.0))
    flags = [f"--path-column={COLUMNS.path}", "--json", "--quiet"]
    assert cli.main(["check", str(manifest), *flags]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["records"] == {"6×5×4×3": 2}
    assert report["num_examples"] == 2
    assert ["1_FLAIR.nii.gz: its voxels are up to 1 mm" in p["message"] for p in report["problems"]] == [True]


def test_verify_looks_at_every_channel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, output = cohort(tmp_path / "c"), tmp_path / "out"
    build(manifest, output, columns=COLUMNS, rescale="zscore")
    lows = index_rows(output)[1]["rescale_low"]
    edit_index(output, set_cell("rescale_low", 1, [*lows[:2], lows[2] - 1]))
    (problem,) = verify_dataset(str(output)).problems
    assert "record 1 (s1): rescale_low is" in problem


def test_an_extracted_image_opens(tmp_path: Path) -> None:
    manifest, output = cohort(tmp_path / "c"), tmp_path / "out"
    build(manifest, output, columns=COLUMNS)
    path = tmp_path / "s1.nii.gz"
    assert cli.main(["extract", str(output), "--id=s1", f"--out={path}"]) == 0
    image: Any = nib.load(path)
    assert image.shape == (*SHAPE, 3)
    for number, name in enumerate(NAMES):
        source: Any = nib.load(tmp_path / f"c/1_{name}.nii.gz")
        found, values = image.dataobj[..., number], np.asarray(source.dataobj, np.float64)
        assert np.abs(found - values).max() <= 1e-6 * np.abs(values).max()
        assert np.allclose(image.affine, source.affine)
