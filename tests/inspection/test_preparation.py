"""A new image prepared as the records of a dataset, against the record that a build makes of it."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import beam_nifti as bn
from beam_nifti.errors import DatasetError, UsageError, VolumeError
from beam_nifti.record.example import decode_example, decode_tensor
from tests import user_functions
from tests.datasets import edit_info, records_of, set_times
from tests.golden.make_version_1 import FOLDER
from tests.images import AFFINE, brain, write_image, write_manifest

OBLIQUE = np.array([[0, 0.96, 0.28, 0], [-1, 0, 0, 0], [0, -0.28, 0.96, 0], [0, 0, 0, 1]]) @ AFFINE
SHAPE = (9, 8, 7)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of an image, another one and a mask on its grid, and an image of three frames."""
    folder = tmp_path_factory.mktemp("images")
    write_image(folder / "one.nii.gz", brain(SHAPE), affine=OBLIQUE, slope=0.5, inter=-3.0)
    two = brain(SHAPE, seed=2).astype(np.float32)
    write_image(folder / "two.nii", two, affine=OBLIQUE)
    two[2, 3, 4] = np.nan
    write_image(folder / "gap.nii", two, affine=OBLIQUE)
    turned = np.array([[0.9, 0.3, 0, 0.5], [-0.3, 0.9, 0, 1], [0, 0.1, 1, 0], [0, 0, 0, 1]])
    write_image(folder / "other-grid.nii", brain((6, 9, 8), seed=7), affine=OBLIQUE @ turned)
    mask = (brain(SHAPE, seed=3) % 3).astype(np.uint8)
    write_image(folder / "mask.nii.gz", mask, affine=OBLIQUE)
    frames = np.stack([brain(SHAPE, seed=4 + t) for t in range(3)], -1)
    write_image(folder / "frames.nii.gz", frames, affine=OBLIQUE)
    write_manifest(folder / "one.csv", [{"path": "one.nii.gz"}])
    write_manifest(folder / "frames.csv", [{"path": "frames.nii.gz"}])
    rows = [{"one": "one.nii.gz", "two": "two.nii", "mask": "mask.nii.gz"}]
    write_manifest(folder / "all.csv", rows)
    write_manifest(folder / "gap.csv", [{**rows[0], "two": "gap.nii"}])
    return folder


def assert_same(output: Path, prepared: bn.PreparedVolume, number: int = 0) -> None:
    """What was prepared is record `number` of a dataset."""
    cells, payload = list(records_of(output))[number]
    stored, volume = decode_tensor(bytes(decode_example(payload)["image_raw"])), prepared.volume
    assert (volume.voxels.dtype, volume.voxels.tobytes()) == (stored.dtype, stored.tobytes())
    has_mask = "mask_raw" in decode_example(payload)
    columns = ["image", "affine", "zooms", *(["mask"] if has_mask else [])]
    element = bn.Dataset(output, columns=columns, channels_first=prepared.channels_first)[number]
    for name in columns:
        found, expected = getattr(prepared, name), element[name]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.tobytes() == expected.tobytes()
    assert (prepared.mask is not None) == has_mask
    assert cells["source_shape"] == list(volume.source.shape)
    assert cells["source_affine"] == list(volume.source.affine)


REFERENCE = (
    (OBLIQUE @ [[1.1, 0.1, 0, 0.5], [-0.1, 1.1, 0, 0.5], [0, 0, 0.9, 0], [0, 0, 0, 1]]).ravel().tolist()
)


@st.composite
def preparations(draw: st.DrawFn) -> dict[str, Any]:
    """Options of a build that fit one another."""
    options: dict[str, Any] = {
        "orientation": draw(st.sampled_from([None, "RAS", "LPS", "SAR"])),
        "shape": draw(st.sampled_from([None, (6, 10, 7)])),
        "crop_foreground": draw(st.sampled_from([None, "nonzero", "above:100"])),
        "voxel_dtype": draw(st.sampled_from(["float32", "float16", "bfloat16", "uint8", "native"])),
    }
    is_native, is_small = options["voxel_dtype"] == "native", options["voxel_dtype"] == "uint8"
    resamplings: list[dict[str, Any]] = [{}, {"spacing": (2.5, 3, 2), "interpolation": "nearest"}]
    if not is_native:
        resamplings += [{"spacing": (2.5, 3, 2)}, {"resize": (7, 6, 9), "interpolation": "cubic"}]
        resamplings += [
            {"resize_longest": 7, "antialias": True},
            {"spacing": (1, 9, 2), "separate_z": "auto"},
        ]
        if options["orientation"] is None:
            resamplings += [{"reference": {"shape": (6, 7, 5), "affine": REFERENCE}}]
    options |= draw(st.sampled_from(resamplings))
    methods = ["minmax", "percentile:2,98", "window:0,400", "cohort:percentile:2,98"]
    options["rescale"] = draw(st.sampled_from([*methods, *([] if is_small else ["zscore", "none"])]))
    if options["rescale"] not in ("window:0,400", "none"):
        options["rescale_within"] = draw(st.sampled_from([None, "nonzero"]))
    is_wide = options["rescale"].partition(":")[0] in ("percentile", "window", "cohort")
    options["clip"] = is_wide or (is_small and options.get("rescale_within") is not None)
    return options


@settings(max_examples=15, deadline=None)
@given(preparations(), st.sampled_from(["one", "mean", "each", "several"]), st.booleans())
def test_it_is_what_a_build_makes_of_the_image(
    images: Path,
    tmp_path_factory: pytest.TempPathFactory,
    options: dict[str, Any],
    kind: str,
    channels_first: bool,
) -> None:
    output, arguments = tmp_path_factory.mktemp("out") / "dataset", {}
    image: Any = images / ("one.nii.gz" if kind == "one" else "frames.nii.gz")
    if kind == "mean" and options["voxel_dtype"] == "native":
        kind = "each"
    if kind == "several":
        if options["voxel_dtype"] == "native":
            options = {**options, "voxel_dtype": "float32"}
        options |= {"path_column": ["one", "two"], "mask_column": "mask"}
        options |= {"nonfinite": "min", "map_labels": {2: 7}}
        if "interpolation" in options:
            options["mask_interpolation"] = "linear"
        image, arguments = [images / "one.nii.gz", images / "gap.nii"], {"mask": images / "mask.nii.gz"}
    elif kind != "one":
        options |= {"frames": kind}
    manifest = images / {"one": "one.csv", "several": "gap.csv"}.get(kind, "frames.csv")
    bn.build(manifest, output, progress=False, workers=1, allow_mixed_shapes=True, **options)
    preparation = bn.Preparation.of(output, channels_first=channels_first)
    for number in range(3 if kind == "each" else 1):
        if kind == "each":
            arguments = {"frame": number}
        assert_same(output, preparation.apply(image, **arguments), number)


GOLDEN = Path(__file__).parents[1] / "golden/version-1"


def test_a_dataset_of_version_1_prepares_what_it_holds(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    set_times(tmp_path / "images")
    info = tmp_path / "dataset/dataset_info.json"
    info.write_text(info.read_text().replace(FOLDER, str(tmp_path)))
    preparation = bn.Preparation.of(tmp_path / "dataset")
    assert preparation.channels == ("T1w", "T2w")
    folder = tmp_path / "images"
    images, mask = [folder / f"2-{kind}.nii" for kind in preparation.channels], folder / "2-mask.nii"
    element = bn.Dataset(tmp_path / "dataset", columns=["image", "mask"])[2]
    prepared = preparation.apply(images, mask=mask)
    assert np.array_equal(prepared.image, element["image"])
    assert prepared.mask is not None
    assert np.array_equal(prepared.mask, element["mask"])
    without = preparation.apply(images)
    assert without.mask is None
    assert np.array_equal(without.image, element["image"])


def test_a_4d_image_is_refused_without_naming_options_of_a_build(images: Path, tmp_path: Path) -> None:
    bn.build([{"path": str(images / "one.nii.gz")}], tmp_path / "out", progress=False)
    with pytest.raises(bn.VolumeError) as caught:
        bn.Preparation.of(tmp_path / "out").apply(images / "frames.nii.gz")
    assert "was built without frames, got shape" in str(caught.value)
    assert str(caught.value).endswith("extract the frame to prepare")


def test_images_on_other_grids_are_brought_together(images: Path, tmp_path: Path) -> None:
    rows = [{"one": str(images / "one.nii.gz"), "two": str(images / "other-grid.nii")}]
    reference = str(images / "other-grid.nii")
    options = {"path_column": ["one", "two"], "align": "first", "reference": reference}
    bn.build(rows, tmp_path / "out", progress=False, **options)
    (tmp_path / "moved").mkdir()
    sources = [shutil.copy(path, tmp_path / "moved") for path in rows[0].values()]
    prepared = bn.Preparation.of(tmp_path / "out").apply(sources)
    assert_same(tmp_path / "out", prepared)
    image = bn.restore(prepared.image, prepared)
    assert image.shape == (*SHAPE, 2)
    assert np.allclose(image.affine, OBLIQUE)


def test_statistics_of_a_cohort_within_masks_need_no_mask(images: Path, tmp_path: Path) -> None:
    rescaling = {"rescale": "cohort:percentile:1,99", "rescale_within": "mask", "clip": True}
    rows = [{"path": str(images / "one.nii.gz"), "mask": str(images / "mask.nii.gz")}]
    bn.build(rows, tmp_path / "out", mask_column="mask", progress=False, **rescaling)
    preparation = bn.Preparation.of(tmp_path / "out")
    with_mask = preparation.apply(images / "one.nii.gz", mask=images / "mask.nii.gz")
    assert_same(tmp_path / "out", with_mask)
    without = preparation.apply(images / "one.nii.gz")
    assert np.array_equal(without.image, with_mask.image)
    assert without.volume.notes == ()


def test_runs_of_unequal_length_have_their_own_frames(images: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "short.nii", np.stack([brain(SHAPE, seed=30 + t) for t in range(2)], -1))
    bn.build(images / "frames.csv", tmp_path / "out", frames="each", max_frames=5, progress=False)
    preparation = bn.Preparation.of(tmp_path / "out")
    assert_same(tmp_path / "out", preparation.apply(images / "frames.nii.gz", frame=2), 2)
    assert preparation.apply(tmp_path / "short.nii", frame=1).image.shape == (*SHAPE, 1)


def test_functions_run_when_they_are_named(images: Path, tmp_path: Path) -> None:
    step = {"function": "tests.user_functions:scale", "by": [2, 3]}
    functions = [user_functions.change_all_in_place, step]
    bn.build(images / "one.csv", tmp_path / "out", preprocess=functions, rescale="none", progress=False)
    assert_same(
        tmp_path / "out",
        bn.Preparation.of(tmp_path / "out", preprocess=functions).apply(images / "one.nii.gz"),
    )
    with pytest.raises(
        UsageError, match=r"Preparation runs only a function that you name; .* give preprocess=\["
    ):
        bn.Preparation.of(tmp_path / "out")
    with pytest.raises(UsageError, match="Preparation runs only a function that you name"):
        bn.Preparation(str(tmp_path / "out"), bn.Dataset(tmp_path / "out").info)
    with pytest.raises(UsageError, match=r"preprocess is tests\.user_functions:scale; .*out was built with"):
        bn.Preparation.of(tmp_path / "out", preprocess=user_functions.scale)


@pytest.fixture(scope="module")
def plain(images: Path) -> Path:
    """A dataset of one image."""
    bn.build(images / "one.csv", images / "plain", progress=False)
    return images / "plain"


@pytest.fixture(scope="module")
def several(images: Path) -> Path:
    """A dataset of two images and a mask, which decides what is cropped."""
    bn.build(
        images / "all.csv",
        images / "several",
        path_column=["one", "two"],
        mask_column="mask",
        crop_foreground="mask",
        progress=False,
    )
    return images / "several"


def test_it_is_pickled_and_needs_nothing_of_the_dataset_again(
    plain: Path, images: Path, tmp_path: Path
) -> None:
    shutil.copytree(plain, tmp_path / "copy")
    preparation = bn.Preparation.of(bn.Dataset(tmp_path / "copy", channels_first=True))
    shutil.rmtree(tmp_path / "copy")
    again = pickle.loads(pickle.dumps(preparation))
    prepared = again.apply(str(images / "one.nii.gz"))
    assert prepared.image.shape == (1, *SHAPE)
    assert prepared.image.flags.c_contiguous
    assert_same(plain, prepared)
    assert repr(again) == f"<Preparation of {str(tmp_path / 'copy')!r}>"
    assert repr(prepared) == f"<PreparedVolume {str(images / 'one.nii.gz')!r}: 1×9×8×7, 2×2×2.5 mm>"


def test_a_file_that_a_build_would_refuse_is_refused(plain: Path, images: Path, tmp_path: Path) -> None:
    preparation = bn.Preparation.of(plain)
    with pytest.raises(VolumeError, match=r"absent\.nii: .*No such file"):
        preparation.apply(images / "absent.nii")
    with pytest.raises(VolumeError, match=r"frames\.nii\.gz: expected a 3-D image"):
        preparation.apply(images / "frames.nii.gz")
    small = write_image(tmp_path / "small.nii", brain((5, 4, 3)))
    with pytest.raises(
        VolumeError, match=r"small\.nii: shape \(5, 4, 3\), but the records of .*plain have \(9, 8, 7\)"
    ):
        preparation.apply(small)
    constant = write_image(tmp_path / "constant.nii", np.ones(SHAPE, np.int16))
    with pytest.raises(VolumeError, match=r'a constant image has no range.* rescale="none"'):
        preparation.apply(constant)


def test_native_voxels_have_the_dtype_of_the_dataset(images: Path, tmp_path: Path) -> None:
    bn.build(images / "one.csv", tmp_path / "out", voxel_dtype="native", progress=False)
    with pytest.raises(VolumeError, match=r"two\.nii: float32 voxels, but the records of .*out hold int16"):
        bn.Preparation.of(tmp_path / "out").apply(images / "two.nii")


def test_arguments_without_effect_and_missing_ones_are_refused(
    plain: Path, several: Path, images: Path
) -> None:
    one, preparation = images / "one.nii.gz", bn.Preparation.of(plain)
    with pytest.raises(
        UsageError, match=r"frame is 0, but the records of .*plain are not single frames; drop it"
    ):
        preparation.apply(one, frame=0)
    with pytest.raises(UsageError, match=r"mask is .*, but .*plain was built without masks; drop it"):
        preparation.apply(one, mask=one)
    with pytest.raises(UsageError, match=r"image has 2 paths, but a record of .*plain has 1 image: path"):
        preparation.apply([one, one])
    with pytest.raises(
        UsageError, match=r"image has 1 path, but .* has 2 images: one, two; give one path for each"
    ):
        bn.Preparation.of(several).apply(one)
    with pytest.raises(UsageError, match=r'mask is missing: .*several was built with crop_foreground="mask"'):
        bn.Preparation.of(several).apply([one, images / "two.nii"])
    with pytest.raises(UsageError, match=r"image is array\(\[1\]\); give a path"):
        preparation.apply(np.array([1]))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"plain was built without a function; drop it"):
        bn.Preparation.of(plain, preprocess="a:b")
    with pytest.raises(DatasetError, match="nowhere: no complete dataset here"):
        bn.Preparation.of(images / "nowhere")


def test_frames_are_given_by_their_number(images: Path, tmp_path: Path) -> None:
    bn.build(images / "frames.csv", tmp_path / "out", frames="each", progress=False)
    preparation = bn.Preparation.of(tmp_path / "out")
    with pytest.raises(UsageError, match=r"frame is missing: each record of .*out is a frame"):
        preparation.apply(images / "frames.nii.gz")
    with pytest.raises(UsageError, match="frame is -1; frames are numbered from 0"):
        preparation.apply(images / "frames.nii.gz", frame=-1)
    with pytest.raises(VolumeError, match=r"no frame 3: .* numbers 0 to 2"):
        preparation.apply(images / "frames.nii.gz", frame=3)


def test_a_dataset_that_no_build_or_another_version_made_is_refused(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "out")
    edit_info(tmp_path / "out", lambda facts: facts["manifest"].update(path=""))
    with pytest.raises(UsageError, match=r"out: WriteToTFRecord wrote it, so the steps .* are unknown"):
        bn.Preparation.of(tmp_path / "out")


@pytest.mark.parametrize("channels_first", [False, True])
def test_patches_are_those_of_the_record(images: Path, several: Path, channels_first: bool) -> None:
    records = bn.Dataset(several, columns=["image", "mask", "affine", "zooms"], channels_first=channels_first)
    sources = [images / "one.nii.gz", images / "two.nii"]
    prepared = bn.Preparation.of(records).apply(sources, mask=images / "mask.nii.gz")
    for shape in ((4, 5, 3), (20, 4, 9)):
        expected, grid = records.grid_patches(0, shape), prepared.grid_patches(shape)
        assert grid.corners == expected.corners
        for one, other in zip(grid, expected, strict=True):
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[name], other[name]) for name in one)
            assert one["image"].flags.c_contiguous
        stitched = grid.stitch(patch["image"] for patch in pickle.loads(pickle.dumps(grid)))
        assert np.allclose(stitched, prepared.image, rtol=1e-5, atol=1e-6)
