"""Masks beside images, from the manifest to the training batch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from beam_nifti.cli import main as cli
from beam_nifti.config import ORIENTATIONS, BuildConfig, Columns, RecordConfig
from beam_nifti.errors import ManifestError, TooManyFailures, UsageError, VolumeError
from beam_nifti.inspection.extract import read_volume
from beam_nifti.inspection.verify import ALL, verify_dataset
from beam_nifti.manifest import read_manifest
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.record.example import (
    decode_example,
    decode_tensor,
    encode_example,
    encode_tensor,
    encode_volume,
)
from beam_nifti.record.index import IndexEntry
from beam_nifti.volume.label_map import positions_of
from beam_nifti.volume.preprocess import crop_or_pad, prepare_volume
from beam_nifti.volume.rescale import Scaling
from beam_nifti.volume.volume import Volume, load_header, load_volume, rescale_volume
from tests.build_helpers import build
from tests.datasets import SOURCE, edit_index, edit_info, edit_record, info_of, manifest_of, set_cell
from tests.images import AFFINE, Array, brain, random_voxels, row_of, write_image, write_manifest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
SHAPE = (6, 5, 4)
COLUMNS = Columns(mask="lesion")
MASKED = RecordConfig(mask_dtype="uint8")


def labels(seed: int = 0, shape: tuple[int, ...] = SHAPE, most: int = 3) -> Array:
    return np.random.default_rng(seed).integers(0, most, shape, np.uint8, endpoint=True)


def cohort(folder: Path, count: int = 3) -> Path:
    """Images and their masks, whose dtypes differ."""
    rows = []
    for i in range(count):
        write_image(folder / f"{i}.nii.gz", brain(SHAPE, seed=i))
        dtype = ("uint8", "float32", "int64")[i % 3]
        write_image(folder / f"{i}_mask.nii.gz", labels(i, most=i + 1).astype(dtype))
        rows.append({"path": f"{i}.nii.gz", "lesion": f"{i}_mask.nii.gz", "label": i})
    return write_manifest(folder / "m.tsv", rows)


def load(folder: Path, mask: Array, record: RecordConfig = MASKED, **header: Any) -> Volume:
    """An image with this mask."""
    write_image(folder / "a.nii")
    write_image(folder / "m.nii", mask, **header)
    return load_volume(row_of("a.nii", other_files=("m.nii",)), str(folder), record=record)


def test_a_dataset_with_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from beam_nifti.reader import load_dataset

    manifest, output, plain = cohort(tmp_path / "c"), tmp_path / "out", tmp_path / "plain"
    assert cli.main(["build", str(manifest), str(output), "--mask-column=lesion", "--quiet"]) == 0
    build(manifest, plain)
    info = info_of(output)
    assert info.mask_labels == (0, 1, 2, 3)
    assert info.features["mask_raw"] == "bytes"
    assert info.config["mask_dtype"] == "uint8"
    pairs = load_dataset(output, target="mask")
    assert pairs.element_spec[1].shape == (*SHAPE, 1)
    images = [x.numpy() for x, _ in load_dataset(plain)]
    for i, (x, y) in enumerate(pairs.as_numpy_iterator()):
        assert np.array_equal(x, images[i])
        assert y.dtype == np.int32
        assert np.array_equal(y[..., 0], labels(i, most=i + 1))
    report = verify_dataset(str(output), manifest=str(manifest), deep=ALL)
    assert report.problems == ()
    capsys.readouterr()
    assert cli.main(["inspect", str(output)]) == 0
    assert "mask labels   0 1 2 3" in capsys.readouterr().out
    path = tmp_path / "mask.nii.gz"
    assert cli.main(["extract", str(output), "--id=2.nii.gz", "--mask", f"--out={path}"]) == 0
    image: Any = nib.load(path)
    assert image.get_data_dtype() == np.uint8
    assert np.array_equal(image.dataobj, labels(2, most=3))
    assert np.allclose(image.affine, AFFINE)
    with pytest.raises(UsageError, match="has no masks; build it with --mask-column"):
        load_dataset(plain, target="mask")
    assert cli.main(["extract", str(plain), "--id=2.nii.gz", "--mask", f"--out={tmp_path / 'x.nii'}"]) == 2


def test_a_dataset_without_masks_says_nothing_of_them(tmp_path: Path) -> None:
    build(cohort(tmp_path / "c", 1), tmp_path / "out")
    assert "mask_labels" not in json.loads((tmp_path / "out/dataset_info.json").read_text())


def test_a_changed_mask_is_loaded_again(tmp_path: Path) -> None:
    manifest, output = cohort(tmp_path / "c"), tmp_path / "out"
    build(manifest, output, columns=COLUMNS)
    write_image(tmp_path / "c/1_mask.nii.gz", np.full(SHAPE, 9, np.uint8))
    assert build(manifest, output, columns=COLUMNS).read == {"1.nii.gz", "1_mask.nii.gz"}
    assert info_of(output).mask_labels == (0, 1, 2, 3, 9)
    assert verify_dataset(str(output), manifest=manifest_of(output), deep=ALL).ok


CHAINS = st.fixed_dictionaries(
    {},
    optional={
        "orientation": st.sampled_from(sorted(ORIENTATIONS)),
        "crop_foreground": st.sampled_from(["nonzero", "above:3", "mask"]),
        "shape": st.tuples(*[st.integers(1, 9)] * 3),
    },
)


@given(CHAINS, st.integers(0, 2**32 - 1))
def test_a_mask_goes_wherever_its_image_goes(options: dict[str, Any], seed: int) -> None:
    mask = labels(seed, most=5)
    mask[2, 2, 2] = 5
    # Voxels that say their label: what becomes of the image, becomes of the mask.
    image = Volume(row_of("a.nii"), mask * np.int16(10), Scaling(), AFFINE, (2, 2, 2.5), "i", SOURCE, mask)
    prepared = prepare_volume(image, RecordConfig(**options, mask_dtype="uint8"))
    assert prepared.mask is not None
    assert prepared.mask.flags.c_contiguous
    assert prepared.mask.dtype == np.uint8
    inside = prepared.voxels == prepared.mask * 10
    padding = (prepared.mask == 0) & (prepared.voxels == prepared.voxels.min())
    assert (inside | padding).all()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.1, 2.0, 5.0), (1.7, 4.5, 2.2)])
def test_labels_are_those_of_the_nearest_voxel(spacing: tuple[float, float, float]) -> None:
    mask = labels(1, (9, 8, 7), 250)
    image = Volume(row_of("a.nii"), mask.astype(float), Scaling(), AFFINE, (2, 2, 2.5), "i", SOURCE, mask)
    affine = image.affine
    prepared = prepare_volume(image, RecordConfig(spacing=spacing, mask_dtype="uint8"))
    assert prepared.mask is not None
    places = np.linalg.inv(affine) @ prepared.affine
    expected = ndimage.affine_transform(
        mask, places, output_shape=prepared.mask.shape, order=0, mode="nearest"
    )
    assert np.array_equal(prepared.mask, expected)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int64", "float32", "float64"])
def test_whole_numbers_of_any_dtype_are_labels(tmp_path: Path, dtype: str) -> None:
    assert np.array_equal(load(tmp_path, labels().astype(dtype)).mask, labels())


def test_labels_are_scaled(tmp_path: Path) -> None:
    assert np.array_equal(load(tmp_path, labels(), slope=2.0, inter=1.0).mask, labels() * 2 + 1)


STORED = {"uint8": 31, "int8": 31, "int16": 8191, "uint16": 8191, "int32": 65535, "float32": 65535}
"""By dtype, the largest label whose neighbours are told apart by the scaled integers of that dtype."""


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(STORED)),
    st.sampled_from([1, 2]),
    st.lists(st.integers(0, 65535), min_size=1, max_size=6),
    st.sampled_from([0.0, 1e-9, -1e-7]),
)
def test_labels_that_nibabel_has_scaled_are_recovered(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, version: int, wanted: list[int], error: float
) -> None:
    """Also where arithmetic in float32 has made 2.9999998 of a label before."""
    folder = tmp_path_factory.mktemp("mask")
    mask = np.resize([*(label % (STORED[dtype] + 1) for label in wanted), 0], SHAPE).astype(np.uint16)
    kind: Any = nib.Nifti1Image if version == 1 else nib.Nifti2Image
    image = kind(mask * (1 + error), AFFINE)
    image.set_data_dtype(dtype)
    nib.save(image, folder / "m.nii")
    write_image(folder / "a.nii")
    row, record = row_of("a.nii", other_files=("m.nii",)), RecordConfig(mask_dtype="uint16")
    assert np.array_equal(load_volume(row, str(folder), record=record).mask, mask)


@settings(max_examples=40)
@given(st.integers(2, 4000), st.integers(1, 20000), st.sampled_from(["int16", "uint32", "float32"]))
def test_a_number_between_labels_is_never_rounded(
    tmp_path_factory: pytest.TempPathFactory, parts: int, number: int, dtype: str
) -> None:
    """Where a slope of 1/parts stores labels exactly, a number beside them was meant."""
    folder = tmp_path_factory.mktemp("mask")
    mask = np.resize(np.array([0, parts, number], dtype), SHAPE)
    if number % parts == 0:
        assert load(folder, mask, RecordConfig(mask_dtype="uint16"), slope=1 / parts).mask is not None
        return
    with pytest.raises(VolumeError, match=r"m\.nii: a voxel of the mask is [\d.e-]+, not a whole number"):
        load(folder, mask, slope=1 / parts)


@pytest.mark.parametrize("slope", [0.97, 0.9, 0.5, 0.4, 0.26, 1.0001, 2.5])
def test_coarse_scalings_are_not_taken_for_rounded_labels(tmp_path: Path, slope: float) -> None:
    value = np.float64(np.float32(slope))
    with pytest.raises(VolumeError, match=rf"m\.nii: a voxel of the mask is {value}, not a whole number"):
        load(tmp_path, np.resize(np.uint8([1, 0]), SHAPE), slope=slope)


def test_scaled_labels_that_were_stored_again_as_floats_are_recovered(tmp_path: Path) -> None:
    mask = np.resize(np.array([0.0, 1, 2, 3]), SHAPE)
    image = nib.Nifti1Image(mask, AFFINE)
    image.set_data_dtype("int32")
    nib.save(image, tmp_path / "scaled.nii")
    again = np.asanyarray(nib.load(tmp_path / "scaled.nii").dataobj)
    assert not np.array_equal(again, mask)
    for dtype in ("float32", "float64"):
        assert np.array_equal(load(tmp_path, again.astype(dtype)).mask, mask)


def test_the_refusal_of_a_mask_has_all_digits_of_the_value(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"a voxel of the mask is 2\.9999, not a whole number"):
        load(tmp_path, np.full(SHAPE, 2.9999))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (labels() * 0.5, r"m\.nii: a voxel of the mask is \d\.5, not a whole number; threshold or round it"),
        (np.full(SHAPE, np.nan), r"m\.nii: a voxel of the mask is nan"),
        (np.full(SHAPE, np.inf), r"m\.nii: a voxel of the mask is inf"),
        (labels().astype(np.int8) - 1, r"m\.nii: labels from -1 to 2 do not fit uint8; renumber them"),
        (labels().astype(np.int32) * 100, r"m\.nii: labels from 0 to 300 do not.*; use --mask-dtype uint16"),
        (labels().astype(np.int32) * 50000, r"labels from 0 to 150000 do not fit uint8; renumber them"),
        (
            labels(shape=(6, 5, 4, 2)),
            r"m\.nii: shape \(6, 5, 4, 2\) of uint8: a mask must have one number per voxel",
        ),
        (
            labels(shape=(6, 5, 3)),
            r"m\.nii: shape \(6, 5, 3\) where a\.nii has \(6, 5, 4\); use --align first",
        ),
    ],
)
def test_what_is_no_mask_is_refused(tmp_path: Path, mask: Array, message: str) -> None:
    with pytest.raises(VolumeError, match=message):
        load(tmp_path, mask)


def test_a_mask_elsewhere_is_refused_by_its_header(tmp_path: Path) -> None:
    affine = AFFINE @ np.diag([-1, 1, 1, 1])
    with pytest.raises(VolumeError, match=r"m\.nii: its voxels are up to 20 mm away from those of a\.nii"):
        load(tmp_path, labels(), affine=affine)
    row = row_of("a.nii", other_files=("m.nii",))
    with pytest.raises(VolumeError, match=r"m\.nii: its voxels are up to"):
        load_header(row, str(tmp_path), MASKED)
    (tmp_path / "m.nii").unlink()
    with pytest.raises(VolumeError, match=r"m\.nii: cannot be read: No such file"):
        load_volume(row, str(tmp_path), record=MASKED)


def test_uint16_masks(tmp_path: Path) -> None:
    mask = labels().astype(np.int32) * 20000
    volume = load(tmp_path, mask, RecordConfig(mask_dtype="uint16"))
    features = decode_example(bytes(encode_volume(rescale_volume(volume, RecordConfig(mask_dtype="uint16")))))
    stored = decode_tensor(features["mask_raw"])  # type: ignore[arg-type]
    assert stored.dtype == np.uint16
    assert np.array_equal(stored, mask)
    assert IndexEntry.of(volume).mask_labels == (0, 20000, 40000, 60000)


def test_rescaling_within_the_mask(tmp_path: Path) -> None:
    mask = labels(most=1)
    record = RecordConfig(rescale="zscore", rescale_within="mask", mask_dtype="uint8")
    volume = load(tmp_path, mask, record)
    values = volume.voxels.astype(np.float64)
    inside = values[mask != 0]
    expected = (values - inside.mean()) / inside.std()
    assert np.allclose(rescale_volume(volume, record).voxels, expected, rtol=1e-6, atol=1e-6)
    nothing = load(tmp_path, np.zeros(SHAPE, np.uint8), record)
    with pytest.raises(
        VolumeError, match="no voxel is labelled by the mask, so --rescale-within selects nothing"
    ):
        rescale_volume(nothing, record)


def test_cropping_to_the_mask(tmp_path: Path) -> None:
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:3, 2:5, 3] = 7
    record = RecordConfig(crop_foreground="mask", mask_dtype="uint8")
    volume = load(tmp_path, mask, record)
    voxels = volume.voxels
    cropped = prepare_volume(volume, record)
    assert np.array_equal(cropped.voxels, voxels[1:3, 2:5, 3:4])
    assert np.array_equal(cropped.affine[:3, 3], (AFFINE @ [1, 2, 3, 1])[:3])
    nothing = load(tmp_path, np.zeros(SHAPE, np.uint8), record)
    with pytest.raises(VolumeError, match=r"no voxel is labelled by the mask \(--crop-foreground mask\)"):
        prepare_volume(nothing, record)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"rescale_within": "mask"}, "--rescale-within mask"),
        ({"crop_foreground": "mask"}, "--crop-foreground mask"),
        ({"mask_dtype": "uint16"}, "--mask-dtype"),
    ],
)
def test_options_that_need_a_mask(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(UsageError, match=f"{flag} requires --mask-column"):
        BuildConfig("m.tsv", "out", RecordConfig(**options))


def test_the_mask_decides_the_fingerprint() -> None:
    configs = [
        BuildConfig("m.tsv", "out"),
        BuildConfig("m.tsv", "out", columns=COLUMNS),
        BuildConfig("m.tsv", "out", RecordConfig(mask_dtype="uint16"), COLUMNS),
    ]
    assert len({config.record.fingerprint for config in configs}) == 3
    assert configs[0].record.fingerprint == RecordConfig().fingerprint
    with pytest.raises(UsageError, match="--mask-dtype is 'int8'; choose one of: uint8, uint16"):
        RecordConfig(mask_dtype="int8")


def test_manifests_are_refused(tmp_path: Path) -> None:
    manifest = str(write_manifest(tmp_path / "m.csv", [{"path": "a.nii", "lesion": ""}]))
    with pytest.raises(ManifestError, match="row 1: empty lesion; give the mask's path or drop the row"):
        read_manifest(manifest, COLUMNS)
    with pytest.raises(ManifestError, match=r"no column 'tumour'.*choose one with --mask-column"):
        read_manifest(manifest, Columns(mask="tumour"))
    with pytest.raises(UsageError, match="name 'path' twice"):
        Columns(mask="path")


def test_a_function_transforms_the_mask_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cropping.py").write_text(
        "import dataclasses, numpy\n"
        "def crop(a): return numpy.ascontiguousarray(a[1:])\n"
        "def both(v): return dataclasses.replace(v, voxels=crop(v.voxels), mask=crop(v.mask))\n"
        "def image(v): return dataclasses.replace(v, voxels=crop(v.voxels))\n"
        "def wrong(v): return dataclasses.replace(v, mask=v.mask.astype(float))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def prepared(name: str) -> Volume:
        record = RecordConfig(preprocess=f"cropping:{name}", mask_dtype="uint8")
        return prepare_volume(load(tmp_path, labels(), record), record)

    assert np.array_equal(prepared("both").mask, labels()[1:])
    with pytest.raises(VolumeError, match=r"mask of shape \(6, 5, 4\) for voxels of \(5, 5, 4\); transform"):
        prepared("image")
    with pytest.raises(VolumeError, match="returned a mask of float64; return an array of uint8"):
        prepared("wrong")


def with_mask(mask: Array) -> Any:
    """An edit of a record: another mask."""

    def edit(payload: bytes) -> bytes:
        features: dict[str, Any] = dict(decode_example(payload))
        features = {n: bytes(v) if isinstance(v, memoryview) else v for n, v in features.items()}
        return encode_example(features | {"mask_raw": b"".join(encode_tensor(mask))})

    return edit


def test_verify_looks_at_masks(tmp_path: Path) -> None:
    manifest, output = cohort(tmp_path / "c"), tmp_path / "out"
    build(manifest, output, columns=COLUMNS)

    def problems() -> str:
        return "\n".join(verify_dataset(str(output)).problems)

    edit_record(output, 1, with_mask(labels(shape=(6, 5, 3))))
    assert "record 1 (1.nii.gz): the mask has shape (6, 5, 3) of uint8, expected (6, 5, 4)" in problems()
    edit_record(output, 1, with_mask(np.full(SHAPE, 8, np.uint8)))
    assert "record 1 (1.nii.gz): the mask has the labels [8], but the index has [0, 1, 2]" in problems()
    edit_index(output, set_cell("mask_labels", 1, [8]))
    assert "mask_labels are [0, 1, 2, 3], but the indexes have [0, 1, 2, 3, 8]" in problems()
    edit_info(output, lambda info: info.update(mask_labels=[0, 1, 2, 3, 8]))
    assert "record 1 (1.nii.gz): mask_positions of the index are not those of its mask" in problems()
    edit_index(output, set_cell("mask_positions", 1, positions_of(np.full(SHAPE, 8, np.uint8))))
    assert problems() == ""
    (deep,) = verify_dataset(str(output), manifest=manifest_of(output), deep=ALL).problems
    assert "what is stored differs from 1.nii.gz in mask_raw" in deep


def test_the_info_comes_back(tmp_path: Path) -> None:
    build(cohort(tmp_path / "c", 1), tmp_path / "out", columns=COLUMNS)
    info = info_of(tmp_path / "out")
    assert DatasetInfo.from_json(info.to_json(), "x") == info


def test_a_mask_goes_with_every_frame(tmp_path: Path) -> None:
    write_image(tmp_path / "c/a.nii.gz", random_voxels((*SHAPE, 3)))
    write_image(tmp_path / "c/m.nii.gz", labels())
    manifest = write_manifest(tmp_path / "c/m.tsv", [{"path": "a.nii.gz", "lesion": "m.nii.gz"}])
    build(manifest, tmp_path / "out", columns=COLUMNS, frames="each", rescale_within="mask")
    report = verify_dataset(str(tmp_path / "out"), manifest=str(manifest), deep=ALL)
    assert (report.problems, report.num_deep) == ((), 3)
    for number in range(3):
        assert np.array_equal(
            read_volume(str(tmp_path / "out"), f"a.nii.gz_frame-000{number}").mask, labels()
        )
    write_image(tmp_path / "c/m.nii.gz", labels() * 0.5)
    with pytest.raises(TooManyFailures, match="3 of 3 volumes failed"):
        build(manifest, tmp_path / "out", columns=COLUMNS, frames="each", rescale_within="mask")


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        (["--shape=3,5,4"], "warning: 2 examples: --shape cut off labelled voxels of the mask"),
        (["--shape=8,5,4"], None),
        (["--crop-foreground=nonzero"], "warning: 1 example: --crop-foreground cut off labelled voxels"),
        (["--crop-foreground=mask"], None),
    ],
)
def test_labels_that_are_cut_off_are_counted(
    tmp_path: Path, flags: list[str], warning: str | None, run: Callable[..., str]
) -> None:
    places = [(0, 0, 0), (5, 4, 3), (2, 2, 2)]  # of which the image is zero at the first
    for number, place in enumerate(places):
        mask = np.zeros((6, 5, 4), np.uint8)
        mask[place] = 1
        write_image(tmp_path / f"m{number}.nii", mask)
        write_image(tmp_path / f"{number}.nii", brain((6, 5, 4), number))
    rows = [{"path": f"{i}.nii", "mask": f"m{i}.nii"} for i in range(3)]
    manifest = write_manifest(tmp_path / "m.tsv", rows)
    common = ["--mask-column=mask", "--workers=1", "--allow-mixed-shapes", "--rescale=none"]
    printed = run("build", manifest, tmp_path / "out", *common, *flags)
    assert ("cut off" in printed) == (warning is not None)
    assert (warning or "") in printed
    assert "check names them" not in printed


@given(
    size=st.tuples(*[st.integers(1, 5)] * 3),
    wanted=st.tuples(*[st.integers(1, 5)] * 3),
    seed=st.integers(0, 99),
)
def test_a_volume_has_a_note_where_its_mask_has_lost_labels(
    size: tuple[int, int, int], wanted: tuple[int, int, int], seed: int
) -> None:
    mask = (np.random.default_rng(seed).random(size) < 0.1).astype(np.uint8)
    volume = Volume(
        row_of("a.nii"), brain(size), Scaling(), np.eye(4), (1.0, 1.0, 1.0), "int16", SOURCE, mask
    )
    fitted = crop_or_pad(volume, wanted)
    assert fitted.mask is not None
    assert ("labels-lost-to-shape" in fitted.notes) == (fitted.mask.sum() < mask.sum())
