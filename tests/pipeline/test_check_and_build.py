"""`check` and `build` are of one opinion, and the flags that `check` suggests lose nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from beam_nifti.cli import main as cli
from beam_nifti.cli import parser as options
from beam_nifti.config import BuildConfig, RecordConfig, ReferenceGrid
from beam_nifti.errors import BeamNiftiError, ManifestError, UsageError
from beam_nifti.manifest import VolumeRow
from beam_nifti.pipeline.build import plan_build, plan_check
from beam_nifti.pipeline.plan import read_build_manifest
from beam_nifti.pipeline.survey import Tally, format_report, make_report, survey_image
from beam_nifti.transforms import EncodeExampleFn, LoadVolumeFn, PreprocessFn, RescaleFn
from beam_nifti.volume import load_volume
from beam_nifti.volume.grid import orientation_of
from beam_nifti.volume.preprocess import prepare_volume
from tests.build_helpers import build_config, run_steps
from tests.images import random_voxels, write_image, write_manifest

SPACINGS = (
    (2.0, 2.0, 2.5),
    (0.9375, 0.9375, 1.2),
    (0.93750008, 0.9375, 1.2),
    (1.0, 1.0, 3.0),
    (0.5, 0.51, 0.5),
)
TURNS = {
    "RAS": np.eye(4),
    "LAS": np.diag([-1.0, 1, 1, 1]),
    "SRA": np.array([[0.0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]),
}

Image = Mapping[str, Any]

images = st.fixed_dictionaries(
    {
        "grid": st.sampled_from([(6, 5, 4), (6, 5, 4), (4, 5, 6), (7, 5, 4)]),
        "frames": st.sampled_from([(), (), (), (2,), (3,)]),
        "dtype": st.sampled_from(["int16", "int16", "uint8", "float32"]),
        "spacing": st.sampled_from(SPACINGS),
        "turn": st.sampled_from(sorted(TURNS)),
    }
)
broken = st.sampled_from(["junk", "missing", "header only", "short", "long"])
records = st.fixed_dictionaries(
    {},
    optional={
        "frames": st.sampled_from(["all", "each", "first", "mean", "1"]),
        "voxel_dtype": st.sampled_from(["float32", "native"]),
        "orientation": st.just("RAS"),
        "shape": st.just((5, 5, 5)),
        "crop_foreground": st.just("nonzero"),
    },
)
BESIDE = ReferenceGrid(
    (5, 6, 4), (1.5, 0, 0, 2, 0, 2, 0, 0, 0, 0, 2, 0, 0, 0, 0, 1)
)  # LAS images have nothing there
resamplings = st.sampled_from(
    [
        {},
        *({"spacing": spacing} for spacing in SPACINGS),
        {"spacing": SPACINGS[0], "interpolation": "cubic", "antialias": True},
        {"spacing": SPACINGS[0], "interpolation": "nearest"},
        {"resize": (4, 5, 7)},
        {"resize_longest": 7},
        {"spacing": SPACINGS[1], "resize_longest": 6},
        {"reference": BESIDE},
    ]
)


def affine_of(image: Image) -> Any:
    return TURNS[image["turn"]] @ np.diag([*image["spacing"], 1.0])


@contextmanager
def cohort_of(contents: list[Image | str]) -> Iterator[Path]:
    """The manifest of these images."""
    folder = Path(tempfile.mkdtemp())
    try:
        for number, image in enumerate(contents):
            path = folder / f"{number}.nii"
            if isinstance(image, str):
                if image == "junk":
                    path.write_bytes(b"junk" * 300)
                elif image != "missing":
                    write_image(path, random_voxels((6, 5, 4), "int16", seed=number))
                    whole = path.read_bytes()
                    end = {"header only": 352, "short": -1, "long": None}[image]
                    path.write_bytes(whole[:end] + bytes(5000 if image == "long" else 0))
                continue
            voxels = random_voxels((*image["grid"], *image["frames"]), image["dtype"], seed=number)
            write_image(path, voxels, affine=affine_of(image))
        yield write_manifest(folder / "m.tsv", [{"path": f"{i}.nii"} for i in range(len(contents))])
    finally:
        shutil.rmtree(folder)


def checked(config: BuildConfig) -> tuple[int, dict[str, Any]]:
    """The exit code of `check`, and its report, without a pipeline."""
    plan, survey = plan_check(config), Tally()
    manifest = read_build_manifest(plan.config.manifest, plan.config)
    for row in manifest.rows(manifest.kept_rows().tolist()):
        survey.add(survey_image(row, manifest.folder, plan)[0])
    report = make_report(survey, [], plan)
    code = cli.USAGE if plan.refusal else int(not config.allows_failures(survey.bad.num, survey.num_images))
    return code, report


def built(config: BuildConfig) -> tuple[int, int, set[int]]:
    """Exit code, records and failed rows of a build, by its own steps and without a pipeline."""
    try:
        plan, _ = plan_build(config)
    except ManifestError:
        return cli.USAGE, 0, set()
    record = plan.config.record
    manifest = read_build_manifest(plan.config.manifest, plan.config)
    num_records, failed = 0, set()
    for row in manifest.rows(manifest.kept_rows().tolist(), num_frames=plan.num_frames):
        steps = [
            LoadVolumeFn(manifest.folder, plan.required_shape, plan.required_dtype, record),
            PreprocessFn(record, plan.required_shape),
            RescaleFn(record),
            EncodeExampleFn(),
        ]
        try:
            num_records += len(run_steps(steps, row))
        except BeamNiftiError:
            failed.add(row.row)
    num_failed = len(failed) * (plan.num_frames or 1)
    return int(not config.allows_failures(num_failed, plan.num_examples)), num_records, failed


@settings(max_examples=40)
@given(
    contents=st.lists(st.one_of(images, images, images, broken), min_size=1, max_size=6),
    record=records,
    resampling=resamplings,
    mixed=st.booleans(),
    limit=st.sampled_from([0.0, 0.0, 0.34, 1.0]),
)
def test_check_counts_what_a_build_makes(
    contents: list[Image | str],
    record: dict[str, Any],
    resampling: dict[str, Any],
    mixed: bool,
    limit: float,
) -> None:
    # Only the voxels tell which shape a cropped image has.
    assume("crop_foreground" not in record or "shape" in record or mixed)
    try:
        whole = RecordConfig(rescale="none", **record, **resampling)  # a single voxel has no range
    except UsageError:  # of options that cannot be combined
        assume(False)
    with cohort_of(contents) as manifest:
        config = BuildConfig(
            str(manifest),
            str(manifest.parent / "out"),
            record=whole,
            allow_mixed_shapes=mixed,
            max_bad_fraction=limit,
        )
        code, report = checked(config)
        built_code, num_records, failed = built(config)
    assert (code, report["num_examples"]) == (built_code, num_records)
    if code != cli.USAGE:
        assert {problem["row"] for problem in report["problems"]} == failed
        assert report["num_bad"] == len(failed)
        assert all(problem["message"] for problem in report["problems"])


def applied(manifest: Path, flags: list[str], *more: str) -> BuildConfig:
    """The build that suggested flags make, as a user gives them."""
    words = [word for flag in flags for word in flag.split()]
    parsed, rest = options.parse(["build", str(manifest), str(manifest.parent / "out"), *more, *words])
    assert rest == []
    return build_config(parsed)


@settings(max_examples=20)
@given(contents=st.lists(images, min_size=1, max_size=6), record=records)
def test_the_advice_of_check_loses_nothing(contents: list[Image], record: dict[str, Any]) -> None:
    # `each` makes as many examples of every image, and a number is of no use where there are fewer frames.
    given_frames = {"frames": "all"} if record.get("frames") == "all" else {}
    with cohort_of(list(contents)) as manifest:
        config = BuildConfig(str(manifest), "", record=RecordConfig(rescale="none", **given_frames))
        flags = checked(config)[1]["suggested_flags"]
        if given_frames and not any(flag.startswith("--frames") for flag in flags):
            flags = [*flags, "--frames all"]
        config = applied(manifest, flags, "--rescale=none")
        code, num_records, failed = built(config)
        assert (code, num_records, failed) == (cli.SUCCESS, len(contents), set()), flags
        assert checked(replace(config, output=""))[1]["suggested_flags"] == []
        for number, image in enumerate(contents):
            assert_kept(VolumeRow(number + 1, "", f"{number}.nii", None), manifest, config.record, image)


odd_spacings = st.sampled_from([(0.002,) * 3, (2000.0,) * 3, (20.0, 20.0, 25.0), (1e-4, 2.0, 2.5)])
still_images = images.map(lambda image: {**image, "frames": ()})
odd_images = st.builds(lambda image, spacing: {**image, "spacing": spacing}, still_images, odd_spacings)


@settings(max_examples=10)
@given(
    contents=st.lists(st.one_of(still_images, still_images, odd_images), min_size=2, max_size=6),
    native=st.booleans(),
    mixed=st.booleans(),
)
def test_the_advice_of_check_makes_no_image_fail(contents: list[Image], native: bool, mixed: bool) -> None:
    """Not even images whose headers have their voxel size in another unit."""
    flags = ["--allow-mixed-shapes"] if mixed else []
    flags += ["--rescale none", "--voxel-dtype native"] if native else []
    with cohort_of(list(contents)) as manifest:
        config = applied(manifest, flags)
        suggested = checked(replace(config, output=""))[1]["suggested_flags"]
        code, _, failed = built(config)
        if any("voxel-dtype" in flag for flag in suggested):
            flags.pop()  # in the place of it
        code_with, _, failed_with = built(applied(manifest, [*flags, *suggested]))
    assert failed_with <= failed
    assert code_with <= code


def test_a_spacing_that_an_odd_image_cannot_have_is_not_suggested() -> None:
    image = {"grid": (6, 5, 4), "frames": (), "dtype": "int16", "spacing": (2.0,) * 3, "turn": "RAS"}
    for spacing, reason in (
        ((0.002,) * 3, "would shrink from 6×5×4 to 1×1×1 voxels"),
        ((2000.0,) * 3, "would fail: shape (6000, 5000, 4000) takes 480,000,000,000 bytes as float32, "),
    ):
        with cohort_of([image, image, image, image | {"spacing": spacing}, image]) as manifest:
            config = BuildConfig(str(manifest), "")
            code, report = checked(config)
        assert (code, report["num_bad"], report["suggested_flags"]) == (0, 0, [])
        dropped = report["not_suggested"]
        assert dropped["flags"][0] == "--spacing 2,2,2"
        assert (dropped["row"], dropped["example_id"]) == (4, "3.nii")
        assert dropped["reason"].startswith(reason)
        line = f"not suggested {' '.join(dropped['flags'])}, with which row 4 (3.nii) {dropped['reason']}"
        assert line in format_report(report)


def assert_kept(row: VolumeRow, manifest: Path, record: RecordConfig, image: Image) -> None:
    """An image that has the suggested spacing is turned and padded, and keeps all of its voxels."""
    folder = str(manifest.parent)
    loaded = load_volume(row, folder, record=record)
    turned = prepare_volume(replace(loaded), replace(record, shape=None, spacing=None))
    if record.spacing is None or np.allclose(turned.zooms, record.spacing, rtol=1e-5):
        unpadded = prepare_volume(load_volume(row, folder, record=record), replace(record, shape=None))
        assert np.array_equal(unpadded.voxels, turned.voxels)
        assert unpadded.voxels.dtype == turned.voxels.dtype
    if record.shape is not None:
        sizes = prepare_volume(
            load_volume(row, folder, record=record), replace(record, shape=None)
        ).voxels.shape
        assert all(size <= wanted for size, wanted in zip(sizes, record.shape, strict=False))
    assert record.orientation in (None, orientation_of(turned.affine))


@pytest.mark.parametrize("name", ["a.nii", "a.img", "a.hdr"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (-1, "truncated: {size} bytes where shape (6, 5, 4) of int16 needs"),
        (4096, None),  # padding
        (4097, "holds more than the "),
    ],
)
def test_check_fails_images_whose_size_shows_it(
    tmp_path: Path, name: str, change: int, message: str | None
) -> None:
    image = nib.Nifti1Image if name == "a.nii" else nib.Nifti1Pair
    nib.save(image(random_voxels((6, 5, 4), "int16", 0), np.eye(4)), tmp_path / name)
    file = tmp_path / name.replace("hdr", "img")
    whole = file.read_bytes()
    file.write_bytes(whole[:change] if change < 0 else whole + bytes(change))
    write_image(tmp_path / "b.nii", random_voxels((6, 5, 4), "int16", 1))
    manifest = write_manifest(tmp_path / "m.tsv", [{"path": "b.nii"}, {"path": name}])
    config = BuildConfig(str(manifest), str(tmp_path / "out"))
    code, report = checked(config)
    found = [problem["message"] for problem in report["problems"]]
    assert len(found) == (message is not None)
    assert all((message or "").format(size=file.stat().st_size) in text for text in found)
    assert (code, report["num_examples"]) == built(config)[:2]


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--max-bad-fraction=0.5"], 0),
        (["--voxel-dtype=native", "--allow-mixed-shapes"], 1),
        (["--frames=each"], 1),
    ],
)
def test_check_and_build_of_the_command_line_agree(
    tmp_path: Path, flags: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    each = "--frames=each" in flags
    for number, shape in enumerate([(6, 5, 4), (6, 5, 4), (7, 5, 4)]):
        voxels = random_voxels((*shape, 2) if each else shape, "uint8" if number == 2 else "int16", number)
        write_image(tmp_path / f"{number}.nii", voxels)
    manifest = str(write_manifest(tmp_path / "m.tsv", [{"path": f"{i}.nii"} for i in range(3)]))
    assert cli.main(["check", manifest, "--quiet", *flags]) == code
    report = capsys.readouterr().out
    assert cli.main(["build", manifest, str(tmp_path / "out"), "--quiet", "--workers=1", *flags]) == code
    written = capsys.readouterr().out
    count = 4 if each else 2
    assert f"would make    {count} examples" in report
    assert f"{count} examples" in written
