"""Predictions on the grids of the scans that they were made for."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

import beam_nifti as bn
from beam_nifti.cli import main as cli
from beam_nifti.errors import DatasetError, UsageError
from tests.datasets import edit_index, set_cell
from tests.images import AFFINE, brain, write_image, write_manifest
from tests.record.test_version_1 import GOLDEN

SHAPE = (13, 11, 10)
TURNED = np.array([[0, -0.6, 0, 31], [0.8, 0, 0, -3], [0, 0, -1.7, 9], [0, 0, 0, 1.0]])

TILTED = np.array([[0.96, -0.28, 0, 65], [0.28, 0.96, 0, -140], [0, 0, 1, -80], [0, 0, 0, 1]])
"""A grid of small voxels around the first scan, which does not meet the second."""


def truth(seed: int = 0) -> npt.NDArray[np.uint8]:
    """Two balls, labels 1 and 2, one in the other."""
    distance = np.linalg.norm(np.indices(SHAPE).T - np.array(SHAPE) / 2 - seed, axis=-1).T
    return np.uint8(distance < 4) + np.uint8(distance < 2.5)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scans on different grids, with masks."""
    folder = tmp_path_factory.mktemp("cohort")
    rows = []
    for number, affine in enumerate((AFFINE, TURNED)):
        names = {kind: f"{number}_{kind}.nii.gz" for kind in ("path", "mask")}
        image = brain(SHAPE, seed=number) + 2000 * (truth(number) > 0)
        write_image(folder / names["path"], image.astype(np.int16), affine=affine)
        write_image(folder / names["mask"], truth(number), affine=affine)
        rows.append({"participant_id": f"sub-{number}", **names})
    write_manifest(folder / "m.csv", rows)
    return folder


def build(cohort: Path, output: Path, **options: Any) -> Path:
    bn.build(cohort / "m.csv", output, mask_column="mask", allow_mixed_shapes=True, progress=False, **options)
    return output


@pytest.mark.parametrize("channels_first", [False, True])
def test_a_mask_there_and_back_is_the_mask(cohort: Path, tmp_path: Path, channels_first: bool) -> None:
    """Turned, cropped around all labels, and padded: nothing is interpolated, and nothing is lost."""
    output = build(
        cohort, tmp_path / "out", orientation="PIR", crop_foreground="above:2000", shape=(12, 14, 9)
    )
    records = bn.Dataset(output, columns=["mask", "id"], channels_first=channels_first)
    preparation = bn.Preparation.of(records)
    for number, record in enumerate(records):
        source = nib.load(cohort / f"{number}_mask.nii.gz")
        prepared = preparation.apply(cohort / f"{number}_path.nii.gz", mask=cohort / f"{number}_mask.nii.gz")
        for like in ((records, record["id"]), prepared):
            image = bn.restore(record["mask"], like)
            assert np.array_equal(image.dataobj, truth(number))
            assert (image.get_data_dtype(), image.shape) == (np.uint8, SHAPE)
            assert np.array_equal(image.affine, source.affine)
            assert nib.aff2axcodes(image.affine) == nib.aff2axcodes(source.affine)
        path = tmp_path / f"{number}.nii.gz"
        records.save_nifti(number, record["mask"], path, on_source_grid=True)
        saved = nib.load(path)
        assert np.array_equal(saved.dataobj, truth(number))
        assert saved.header == bn.restore(record["mask"], prepared).header


def test_what_the_record_does_not_cover_is_filled(cohort: Path, tmp_path: Path) -> None:
    output = build(cohort, tmp_path / "out", shape=(5, 30, 4))
    ones = np.ones((5, 30, 4), np.int64)
    image = np.asarray(bn.restore(ones, (output, "sub-0"), fill=9).dataobj)
    expected = np.full(SHAPE, 9)
    expected[4:9, :, 3:7] = 1
    assert image.dtype == np.uint8
    assert np.array_equal(image, expected)
    assert np.unique(bn.restore(ones.astype(bool), (output, "sub-0")).dataobj).tolist() == [0, 1]
    assert bn.restore(ones, (output, "sub-0"), fill=-1).get_data_dtype() == np.int16
    floats = np.asarray(bn.restore(ones.astype(np.float16), (output, "sub-0"), fill=math.nan).dataobj)
    assert floats.dtype == np.float32
    assert np.array_equal(np.isnan(floats), expected == 9)


@pytest.mark.parametrize(
    "options",
    [
        {"orientation": "LAS", "spacing": (1.3, 1.1, 1.7), "shape": (26, 26, 20)},
        {"resize": (17, 15, 13)},
        {"orientation": "LAS", "resize_longest": 31, "mask_interpolation": "linear"},
        {
            "reference": {"shape": (40, 40, 40), "affine": TILTED},
            "mask_interpolation": "linear",
            "max_bad_fraction": 0.5,
        },
    ],
)
def test_probabilities_are_interpolated_and_then_compared(
    cohort: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    output = build(cohort, tmp_path / "out", **options)
    record = bn.Dataset(output, columns=["mask"])[0]["mask"]
    probabilities = (record == np.arange(3)).astype(np.float32)
    like = (str(output), "sub-0")
    back = bn.restore(probabilities, like)
    assert back.shape == (*SHAPE, 3)
    assert back.get_data_dtype() == np.float32
    values = np.asarray(back.dataobj)
    assert np.count_nonzero((values > 0) & (values < 1)) > 0
    assert np.allclose(values.sum(-1), 1)
    labels = bn.restore(probabilities, like, argmax=True)
    assert labels.get_data_dtype() == np.uint8
    assert np.array_equal(labels.dataobj, values.argmax(-1))
    nearest = bn.restore(record, like)
    assert np.array_equal(
        bn.restore(probabilities, like, argmax=True, interpolation="nearest").dataobj, nearest.dataobj
    )
    for found in (labels, nearest):
        assert dice(np.asarray(found.dataobj) > 0, truth() > 0) > 0.97
    halves = np.asarray(bn.restore(record, like, interpolation="linear").dataobj)
    assert halves.dtype == np.float32
    assert np.count_nonzero(halves % 1) > 0


def dice(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> float:
    return 2 * np.count_nonzero(one & other) / (np.count_nonzero(one) + np.count_nonzero(other))


def test_a_prediction_for_another_record_is_refused(cohort: Path, tmp_path: Path) -> None:
    output = build(cohort, tmp_path / "out", crop_foreground="above:2000")
    records = bn.Dataset(output)
    shape = records.shape_of(0)
    refused: list[tuple[Any, Any, dict[str, Any], str]] = [
        (np.zeros(SHAPE), records, {}, rf"record 'sub-0' has the shape \({SHAPE[0]}, .*without a batch axis"),
        (np.zeros((1, *shape, 3)), records, {}, "without a batch axis"),
        (np.zeros(shape, complex), records, {}, "has the dtype complex128"),
        (np.zeros(shape), records, {"argmax": True}, "argmax is True, but .* without a channel per class"),
        (np.zeros(shape), records, {"interpolation": "cubic"}, "choose one of: nearest, linear"),
        (np.zeros(shape, int), records, {"fill": 0.5}, "fill is 0.5, but the image will hold whole numbers"),
        (np.zeros((*shape, 2)), records, {"argmax": True, "fill": math.nan}, "fill is nan, but the image"),
        (np.zeros(shape), records, {"fill": None}, "fill is None; give a number"),
    ]
    for prediction, dataset, options, message in refused:
        with pytest.raises(UsageError, match=message):
            bn.restore(prediction, (dataset, "sub-0"), **options)
    for like in (records, (records, 0), str(output)):
        with pytest.raises(UsageError, match=r"give what Preparation.apply returned, or a dataset and"):
            bn.restore(np.zeros(shape), like)  # type: ignore[arg-type]
    for dataset in (output, records):
        with pytest.raises(DatasetError, match="no record 'sub-7'"):
            bn.restore(np.zeros(shape), (dataset, "sub-7"))


def test_a_dataset_without_sources_is_refused(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "dataset", tmp_path / "dataset")
    records = bn.Dataset(tmp_path / "dataset")
    prediction = np.zeros(records.shape_of(0)[:3])
    for like in (records, tmp_path / "dataset"):
        with pytest.raises(
            DatasetError, match="record 'sub-0': the index has no source_shape and source_affine"
        ):
            bn.restore(prediction, (like, "sub-0"))
    with pytest.raises(DatasetError, match="the index has no source_shape"):
        records.save_nifti(0, prediction, tmp_path / "a.nii", on_source_grid=True)


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("source_affine", [0.0] * 16, "do not describe an image; run beam-nifti verify"),
        ("source_shape", [4, 0, 4], "do not describe an image; run beam-nifti verify"),
        ("source_shape", [1 << 40, 1 << 40, 1], "does not fit into memory"),
    ],
)
def test_a_grid_that_is_none_is_refused(
    cohort: Path, tmp_path: Path, column: str, cell: list[Any], message: str
) -> None:
    output = build(cohort, tmp_path / "out", num_shards=1)
    edit_index(output, set_cell(column, 0, cell))
    with pytest.raises(DatasetError, match=message):
        bn.restore(np.zeros(SHAPE), (output, "sub-0"))


@pytest.mark.parametrize("dtype", ["native", "float32"])
def test_records_are_extracted_on_the_grids_of_their_sources(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    options = {"orientation": "PIR", "crop_foreground": "above:2000", "shape": (12, 14, 9)}
    output = build(cohort, tmp_path / "out", voxel_dtype=dtype, rescale="none", **options)
    monkeypatch.chdir(tmp_path)
    for flags, name in ((["--mask"], "sub-1_mask.nii.gz"), ([], "sub-1.nii.gz")):
        assert cli.main(["extract", str(output), "--id", "sub-1", "--on-source-grid", *flags]) == cli.SUCCESS
        source, found = (
            nib.load(folder) for folder in (cohort / f"1_{'mask' if flags else 'path'}.nii.gz", name)
        )
        assert (found.shape, found.get_data_dtype().name) == (
            SHAPE,
            "uint8" if flags else {"native": "int16"}.get(dtype, dtype),
        )
        assert np.array_equal(found.affine, source.affine)
        values, expected = np.asarray(found.dataobj), np.asarray(source.dataobj)
        if not flags:
            is_labelled = truth(1) > 0
            assert np.array_equal(values[is_labelled], expected[is_labelled])
            expected = np.where(values == values.min(), values.min(), expected)
        assert np.array_equal(values, expected)


def test_an_image_without_its_source_is_not_extracted_on_its_grid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(GOLDEN / "dataset", tmp_path / "dataset")
    flags = ["--id", "sub-0", "--on-source-grid", "--out", str(tmp_path / "a.nii")]
    assert cli.main(["extract", str(tmp_path / "dataset"), *flags]) != cli.SUCCESS
    assert "record 'sub-0': the index has no source_shape and source_affine" in capsys.readouterr().err
    assert not (tmp_path / "a.nii").exists()
