"""Several columns of masks, which are the channels of one mask."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apache_beam as beam
import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import beam_nifti as bn
from beam_nifti.cli import main as cli
from beam_nifti.config import ORIENTATIONS, BuildConfig, Columns, RecordConfig
from beam_nifti.errors import DatasetError, ManifestError, TooManyFailures, UsageError, VolumeError
from beam_nifti.inference import Preparation
from beam_nifti.inspection.verify import ALL, verify_dataset
from beam_nifti.manifest import read_manifest
from beam_nifti.pipeline.configure import make_config
from beam_nifti.transforms import EncodeExample, LoadVolume, ReadManifest, Rescale, WriteToTFRecord
from beam_nifti.volume.label_map import label_counts, labels_of, overlaid, positions_of
from beam_nifti.volume.preprocess import prepare_volume
from beam_nifti.volume.rescale import Scaling
from beam_nifti.volume.volume import Volume, load_frames, load_header, load_volume, rescale_volume
from tests.datasets import SOURCE, edit_info, index_rows, info_of
from tests.images import AFFINE, Array, brain, row_of, write_image, write_manifest

SHAPE = (6, 5, 4)
NAMES = ("organs", "lesions")
TWO = RecordConfig(mask_dtype="uint8", masks=NAMES)


def labels(seed: int, most: int, shape: tuple[int, ...] = SHAPE) -> Array:
    return np.random.default_rng(seed).integers(0, most, shape, np.uint8, endpoint=True)


def masks_of(number: int) -> Array:
    """The masks of a row of `cohort`, whose second row has no lesions."""
    lesions = labels(10 + number, 1) * np.uint8(9) if number != 1 else np.zeros(SHAPE, np.uint8)
    return np.stack([labels(number, 3), lesions], -1)


def cohort(folder: Path, count: int = 3, **header: Any) -> Path:
    rows = []
    for i in range(count):
        write_image(folder / f"{i}.nii.gz", brain(SHAPE, seed=i))
        write_image(folder / f"{i}_organs.nii.gz", masks_of(i)[..., 0].astype(("int16", "float32")[i % 2]))
        write_image(folder / f"{i}_lesions.nii.gz", masks_of(i)[..., 1], **header)
        cells = {name: f"{i}_{name}.nii.gz" for name in NAMES}
        cells |= {"lesions": ""} if i == 1 else {}
        rows.append({"participant_id": f"sub-{i}", "path": f"{i}.nii.gz", **cells, "label": i})
    return write_manifest(folder / "m.tsv", rows)


def made(folder: Path, **options: Any) -> Path:
    """A dataset of two masks per record."""
    given: dict[str, Any] = {"mask_column": list(NAMES), "missing_mask": "empty", **options}
    bn.build(cohort(folder / "c"), folder / "out", progress=False, workers=1, **given)
    return folder / "out"


def test_a_dataset_of_two_masks(tmp_path: Path, run: Callable[..., str]) -> None:
    manifest, output = cohort(tmp_path / "c"), tmp_path / "out"
    flags = ["--mask-column=organs,lesions", "--missing-mask=empty"]
    assert "kept     1 row without a mask" in run("check", manifest, *flags, "--voxels")
    run("build", manifest, output, *flags)
    info = info_of(output)
    assert (info.config["masks"], info.config["columns"]["mask"]) == (list(NAMES), "organs,lesions")
    assert (info.mask_labels, info.columns.masks) == ((0, 1, 2, 3, 9), NAMES)
    records = bn.Dataset(output, columns=["image", "mask"])
    for number, record in enumerate(records):
        assert record["mask"].dtype == np.uint8
        assert np.array_equal(record["mask"], masks_of(number))
    first = bn.Dataset(output, columns=["mask"], channels_first=True)[0]["mask"]
    assert np.array_equal(first, np.moveaxis(masks_of(0), -1, 0))
    assert "mask uint8 (6, 5, 4, 2)" in repr(records)
    rows = index_rows(output)
    assert [row["mask_labels"] for row in rows] == [[0, 1, 2, 3, 9], [0, 1, 2, 3], [0, 1, 2, 3, 9]]
    assert [len(row["source_sizes"]) for row in rows] == [3, 2, 3]
    assert [len(row["mask_positions"]) for row in rows] == [4 * 64, 3 * 64, 4 * 64]
    for number in range(3):
        for label, places in records.positions_of(number).items():
            assert (masks_of(number).reshape(-1, 2)[places] == label).any(axis=1).all()
    assert verify_dataset(str(output), manifest=str(manifest), deep=ALL).problems == ()
    printed = run("inspect", output)
    assert "masks         organs, lesions" in printed
    assert "empty       in 1 example without a mask" in printed
    assert cli.main(["card", str(output)]) == 0
    assert "mask\\_raw | tensor of uint8 | 6×5×4×2 |" in (output / "README.md").read_text()
    assert "kept     3 examples" in run("build", manifest, output, *flags)
    assert make_config("m", "x", {}, like=str(output)).columns.masks == NAMES


def test_tensorflow_reads_them(tmp_path: Path) -> None:
    from beam_nifti.reader import load_dataset

    output = made(tmp_path)
    for options in ({}, {"columns": ["image", "mask"], "as_dict": True}):
        batches = load_dataset(output, batch_size=3, **(options or {"target": "mask"}))
        element = next(batches.as_numpy_iterator())
        y = element["mask"] if options else element[1]
        assert np.array_equal(y, np.stack([masks_of(number) for number in range(3)]))
    spec = load_dataset(output, target="mask", channels_first=True).element_spec[1]
    assert spec.shape.as_list() == [2, *SHAPE]


def test_patches_of_masks(tmp_path: Path) -> None:
    shape = (40, 31, 26)
    organs, lesions = labels(1, 2, shape), np.zeros(shape, np.uint8)
    lesions[30:34, 20:24, 5:9] = 7
    for name, voxels in {"path": brain(shape), "organs": organs, "lesions": lesions}.items():
        write_image(tmp_path / f"{name}.nii", voxels)
    manifest = write_manifest(tmp_path / "m.tsv", [{n: f"{n}.nii" for n in ("path", *NAMES)}])
    bn.build(manifest, tmp_path / "out", progress=False, workers=1, mask_column=NAMES)
    records = bn.Dataset(tmp_path / "out", columns=["image", "mask"])
    expected = np.stack([organs, lesions], -1)
    for corner, size in (((3, 4, 5), (9, 8, 7)), ((30, 20, 20), (12, 14, 10))):
        box = tuple(slice(start, start + length) for start, length in zip(corner, size, strict=True))
        patch, inside = records.patch(0, corner, size)["mask"], expected[box]
        padding = [(0, length - found) for length, found in zip(size, inside.shape, strict=False)]
        assert np.array_equal(patch, np.pad(inside, [*padding, (0, 0)]))
    grid = records.grid_patches(0, (20, 16, 13))
    assert all(patch["mask"].shape == (20, 16, 13, 2) for patch in grid)
    from beam_nifti.reader import load_dataset

    patches = bn.Patches((6, 6, 6), per_volume=4, foreground=1.0, label_weights={7: 1})
    for _, y in load_dataset(tmp_path / "out", target="mask", patches=patches).as_numpy_iterator():
        assert y.shape == (6, 6, 6, 2)
        assert (y[..., 1] == 7).any()


CHAINS = st.fixed_dictionaries(
    {},
    optional={
        "orientation": st.sampled_from(sorted(ORIENTATIONS)),
        "spacing": st.just((1.6, 2.9, 2.0)),
        "mask_interpolation": st.just("linear"),
        "crop_foreground": st.sampled_from(["nonzero", "above:3"]),
        "shape": st.tuples(*[st.integers(1, 9)] * 3),
    },
).filter(lambda options: "spacing" in options or "mask_interpolation" not in options)


@given(CHAINS, st.integers(0, 2**32 - 1))
def test_each_mask_is_prepared_as_if_it_were_alone(options: dict[str, Any], seed: int) -> None:
    masks = labels(seed, 5, (*SHAPE, 2))
    image = brain(SHAPE, seed=1)

    def prepared(mask: Array, record: RecordConfig) -> Array:
        volume = Volume(row_of("a.nii"), image.copy(), Scaling(), AFFINE, (2, 2, 2.5), "i", SOURCE, mask)
        found = prepare_volume(volume, record).mask
        assert found is not None
        assert found.flags.c_contiguous
        return found

    both = prepared(masks, RecordConfig(**options, mask_dtype="uint8", masks=NAMES))
    alone = RecordConfig(**options, mask_dtype="uint8")
    for channel in range(2):
        one = prepared(np.ascontiguousarray(masks[..., channel]), alone)
        assert np.array_equal(both[..., channel], one)


@given(st.integers(1, 4), st.sampled_from(["uint8", "uint16"]), st.integers(0, 2**32 - 1))
def test_counts_and_positions_are_those_of_the_union(count: int, dtype: str, seed: int) -> None:
    masks = labels(seed, 4, (5, 4, 3, count)).astype(dtype)
    has = {label: (masks == label).any(axis=3) for label in range(5)}
    assert labels_of(masks) == [label for label in has if has[label].any()]
    assert label_counts(masks)[:5].tolist() == [has[label].sum() for label in range(5)]
    found = [label for label in range(1, 5) if has[label].any()]
    places = np.reshape(positions_of(masks), (len(found), -1))
    for label, row in zip(found, places, strict=True):
        # Those of a mask in which only the voxels of the union are labelled.
        assert row.tolist() == positions_of(has[label].astype(np.uint8))[: row.size]
    drawn = overlaid(masks)
    for voxel, label in zip(masks.reshape(-1, count), drawn.reshape(-1), strict=True):
        labelled = [each for each in voxel.tolist() if each]
        assert label == (labelled[-1] if labelled else 0)


def test_voxels_in_any_mask_are_measured_and_cropped_to() -> None:
    masks = np.zeros((*SHAPE, 2), np.uint8)
    masks[1, 2, 0, 0] = masks[3, 1, 2, 1] = 1
    image = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    volume = Volume(row_of("a.nii"), image, Scaling(), AFFINE, (2, 2, 2.5), "i", SOURCE, masks)
    record = RecordConfig(mask_dtype="uint8", masks=NAMES, rescale_within="mask", crop_foreground="mask")
    prepared = prepare_volume(volume, record)
    assert np.array_equal(prepared.voxels, image[1:4, 1:3, 0:3])
    (ends,) = rescale_volume(prepared, record).rescale_ranges
    assert (ends.low, ends.high) == (image[1, 2, 0], image[3, 1, 2])


def test_labels_of_each_mask_are_mapped(tmp_path: Path) -> None:
    output = made(tmp_path, map_labels={9: 4, 3: 0})
    masks = np.stack([record["mask"] for record in bn.Dataset(output, columns=["mask"])])
    expected = np.stack([masks_of(number) for number in range(3)])
    expected[expected == 9] = 4
    expected[expected == 3] = 0
    assert np.array_equal(masks, expected)
    assert [row["mapped_labels"] for row in index_rows(output)] == [[3, 9], [3], [3, 9]]
    assert verify_dataset(str(output), manifest=str(tmp_path / "c/m.tsv"), deep=ALL).ok


def test_masks_on_other_grids(tmp_path: Path) -> None:
    manifest = cohort(tmp_path / "c", affine=AFFINE + np.array([[0, 0, 0, 0.6], *[[0] * 4] * 3]))
    options: dict[str, Any] = {"mask_column": NAMES, "missing_mask": "empty", "progress": False, "workers": 1}
    with pytest.raises(TooManyFailures):
        bn.build(manifest, tmp_path / "bad", **options)
    bn.build(manifest, tmp_path / "out", align="first", **options)
    for number, record in enumerate(bn.Dataset(tmp_path / "out", columns=["mask"])):
        assert np.array_equal(record["mask"][..., 0], masks_of(number)[..., 0])
        assert record["mask"].shape == (*SHAPE, 2)


def test_a_row_that_lacks_one_mask(tmp_path: Path) -> None:
    manifest = str(cohort(tmp_path))
    with pytest.raises(ManifestError, match=r"row 2: empty lesions; give the mask's path .*--missing-mask"):
        read_manifest(manifest, Columns(mask="organs,lesions"))
    skipping = read_manifest(manifest, Columns(mask="organs,lesions", missing_mask="skip"))
    assert skipping.num_skipped == 1
    keeping = read_manifest(manifest, Columns(mask="organs,lesions", missing_mask="empty"))
    assert keeping.num_unmasked == 1
    # Of the first mask, whose number among the files is that of the second one then.
    row = row_of("0.nii.gz", other_files=("", "0_lesions.nii.gz"))
    assert load_header(row, str(tmp_path), TWO).space == SHAPE
    volume = load_volume(row, str(tmp_path), record=TWO)
    assert volume.mask is not None
    assert np.array_equal(volume.mask[..., 1], masks_of(0)[..., 1])
    assert not volume.mask[..., 0].any()


def test_masks_go_with_every_frame(tmp_path: Path) -> None:
    cohort(tmp_path, 1)
    write_image(tmp_path / "bold.nii", np.stack([brain(SHAPE, seed=i) for i in range(3)], -1))
    record = RecordConfig(mask_dtype="uint8", masks=NAMES, frames="each")
    row = row_of("bold.nii", other_files=tuple(f"0_{name}.nii.gz" for name in NAMES), num_frames=3)
    for number, volume in enumerate(load_frames(row, str(tmp_path), record=record)):
        assert np.array_equal(volume.voxels, brain(SHAPE, seed=number))
        assert volume.mask is not None
        assert np.array_equal(volume.mask, masks_of(0))


def test_masks_go_back_to_images(tmp_path: Path, run: Callable[..., str]) -> None:
    output = made(tmp_path, orientation="SRA", shape=(5, 6, 7))
    path = tmp_path / "mask.nii.gz"
    assert (
        cli.main(["extract", str(output), "--id=sub-0", "--mask", "--on-source-grid", f"--out={path}"]) == 0
    )
    image: Any = nib.load(path)
    assert image.shape == (*SHAPE, 2)
    kept = np.asarray(image.dataobj)
    assert np.array_equal(kept[kept != 0], masks_of(0)[kept != 0])
    stored = bn.extract(output, "sub-0")
    assert stored.mask is not None
    assert stored.mask.shape == (5, 6, 7, 2)
    assert stored.of_mask().to_nibabel().shape == (5, 6, 7, 2)


@pytest.mark.slow
def test_pages_show_all_masks(tmp_path: Path, run: Callable[..., str]) -> None:
    output, report, view = made(tmp_path), tmp_path / "report.html", tmp_path / "view.html"
    run("report", output, f"--out={report}")
    masks = np.stack([masks_of(number) for number in range(3)])
    labelled = (masks != 0).any(axis=-1)
    text = report.read_text()
    assert f"No label: {100 * (1 - labelled.mean()):.2f} % of the voxels of train." in text
    (share,) = re.findall(
        r'<th scope="row">9</th><td class="number">2 \([\d.]+ %\), ([\d.]+) % of voxels', text
    )
    assert float(share) == pytest.approx(100 * (masks == 9).any(axis=-1).sum() / labelled.sum(), rel=0.01)
    assert cli.main(["view", str(output), "--id=sub-0", "--mask", f"--out={view}"]) == 0
    assert "mask labels 0, 1, 2, 3, 9" in view.read_text()


def test_new_images_are_prepared_with_their_masks(tmp_path: Path) -> None:
    output = made(tmp_path, spacing=1.7)
    preparation, folder = Preparation.of(output), tmp_path / "c"
    assert preparation.masks == NAMES
    paths = [folder / f"2_{name}.nii.gz" for name in NAMES]
    prepared = preparation.apply(folder / "2.nii.gz", mask=paths)
    record = bn.Dataset(output, columns=["image", "mask"])[2]
    assert prepared.mask is not None
    assert np.array_equal(prepared.mask, record["mask"])
    assert np.array_equal(prepared.image, record["image"])
    assert prepared.grid_patches((3, 3, 3))[0]["mask"].shape == (3, 3, 3, 2)
    assert preparation.apply(folder / "2.nii.gz").mask is None
    with pytest.raises(UsageError, match=r"mask has 1 path, but .* has 2 masks: organs, lesions; give one"):
        preparation.apply(folder / "2.nii.gz", mask=paths[0])


def test_a_dataset_is_rewritten(tmp_path: Path, run: Callable[..., str]) -> None:
    output = made(tmp_path)
    lines = (tmp_path / "c/m.tsv").read_text().splitlines()
    at = lines[0].split("\t").index("label")
    changed = [
        "\t".join([*cells[:at], "5", *cells[at + 1 :]]) for cells in (s.split("\t") for s in lines[1:])
    ]
    (tmp_path / "c/new.tsv").write_text("\n".join([lines[0], *changed]))
    run("relabel", output, tmp_path / "c/new.tsv")
    run("withdraw", output, "--participant=sub-0", f"--manifest={tmp_path / 'c/new.tsv'}")
    records = list(bn.Dataset(output, columns=["mask", "label"]))
    assert [float(record["label"]) for record in records] == [5, 5]
    assert [np.array_equal(record["mask"], masks_of(n)) for record, n in zip(records, (1, 2), strict=True)]
    assert verify_dataset(str(output)).ok


def test_voxels_of_each_label_are_counted_once(tmp_path: Path) -> None:
    analysis = bn.analyze(cohort(tmp_path / "c"), mask_column=NAMES, missing_mask="empty", progress=False)
    masks = [masks_of(number) for number in range(3)]
    voxels = {label: sum(int((mask == label).any(axis=3).sum()) for mask in masks) for label in (1, 2, 3, 9)}
    assert {each.label: each.num_voxels for each in analysis.statistics.labels} == voxels


def test_steps_of_a_pipeline(tmp_path: Path) -> None:
    manifest = cohort(tmp_path / "c")
    columns = Columns(mask="organs,lesions", missing_mask="empty")
    with beam.Pipeline() as pipeline:
        rows = pipeline | ReadManifest(manifest, columns=columns)
        volumes = rows | LoadVolume(mask_dtype="uint8", masks=list(NAMES))
        _ = volumes | Rescale() | EncodeExample() | WriteToTFRecord(tmp_path / "out")
    records = bn.Dataset(tmp_path / "out", columns=["mask"])
    assert all(np.array_equal(record["mask"], masks_of(n)) for n, record in enumerate(records))
    assert info_of(tmp_path / "out").columns.masks == NAMES
    remedy = r"use LoadVolume\(mask_dtype='uint8', masks=\('organs', 'lesions'\)\)"
    refused = pytest.raises(
        Exception, match=rf"'organs' \(mask\), 'lesions' \(mask\), but .* a mask; {remedy}"
    )
    with refused, beam.Pipeline() as pipeline:
        _ = pipeline | ReadManifest(manifest, columns=columns) | LoadVolume(mask_dtype="uint8")
    with pytest.raises(UsageError, match="masks names the columns of masks; give mask_dtype too"):
        LoadVolume(masks=NAMES)


def test_a_function_gets_and_returns_all_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "changing.py").write_text(
        "import dataclasses, numpy\n"
        "def crop(a): return numpy.ascontiguousarray(a[1:])\n"
        "def both(v): return dataclasses.replace(v, voxels=crop(v.voxels), mask=crop(v.mask))\n"
        "def first(v): return dataclasses.replace(v, mask=crop(v.mask[..., 0]))\n"
        "def draw(v): return dataclasses.replace(v, mask=(v.voxels > 0).astype('uint8'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cohort(tmp_path)

    def prepared(name: str, record: RecordConfig, *masks: str) -> Volume:
        row = row_of("0.nii.gz", other_files=masks)
        volume = load_volume(row, str(tmp_path), record=record)
        return prepare_volume(volume, RecordConfig(**{**vars_of(record), "preprocess": f"changing:{name}"}))

    def vars_of(record: RecordConfig) -> dict[str, Any]:
        return {"mask_dtype": record.mask_dtype, "masks": record.masks}

    files = [f"0_{name}.nii.gz" for name in NAMES]
    assert np.array_equal(prepared("both", TWO, *files).mask, masks_of(0)[1:])
    with pytest.raises(VolumeError, match=r"a mask of shape \(5, 5, 4\) for voxels of .* and 2 masks; trans"):
        prepared("first", TWO, *files)
    with pytest.raises(VolumeError, match=r"returned a mask, but records have none; name .* --mask-column"):
        prepared("draw", RecordConfig())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("organs,", "--mask-column is 'organs,'; give the name of each column, such as organs,lesions"),
        ("organs,organs", "name 'organs' twice; drop one"),
        ("organs,path", "name 'path' twice; drop one"),
    ],
)
def test_columns_that_are_refused(mask: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Columns(mask=mask)


def test_one_column_is_as_before() -> None:
    one = BuildConfig("m.tsv", "out", columns=Columns(mask="organs"))
    assert "masks" not in one.as_dataset_config()
    fingerprints = {
        BuildConfig("m.tsv", "out", columns=Columns(mask=mask)).record.fingerprint
        for mask in ("organs", "organs,lesions", "lesions,organs")
    }
    assert len(fingerprints) == 3
    assert one.record.fingerprint == RecordConfig(mask_dtype="uint8").fingerprint


@pytest.mark.parametrize("masks", [["organs"], ["lesions", "organs"], ["organs", "lesions", "c"], []])
def test_a_received_list_of_masks_is_checked(tmp_path: Path, masks: list[str]) -> None:
    output = made(tmp_path)
    edit_info(output, lambda info: info["config"].update(masks=masks))
    with pytest.raises(DatasetError, match=r"config\.masks is"):
        info_of(output)


def test_differences_are_found(tmp_path: Path, run: Callable[..., str]) -> None:
    one, other = made(tmp_path / "a"), made(tmp_path / "b", mask_column=["lesions", "organs"])
    assert "organs,lesions" in str(bn.diff(one, other))
    refused = run(
        "build", tmp_path / "a/c/m.tsv", one, "--mask-column=lesions,organs", "--missing-mask=empty", code=2
    )
    assert "--mask-column" in refused
