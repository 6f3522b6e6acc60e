"""NaN and infinite voxels that are replaced, from the file to the index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy

from beam_nifti.config import BuildConfig, Columns, RecordConfig
from beam_nifti.errors import TooManyFailures, UsageError, VolumeError
from beam_nifti.inspection.diff import compare_datasets
from beam_nifti.inspection.verify import ALL, verify_dataset
from beam_nifti.pipeline.build import plan_check
from beam_nifti.pipeline.configure import make_config
from beam_nifti.random_access import Dataset
from beam_nifti.transforms import (
    EncodeExample,
    LoadVolume,
    Preprocess,
    ReadManifest,
    Rescale,
    WriteToTFRecord,
)
from beam_nifti.volume import Scaling, Volume
from beam_nifti.volume.nonfinite import replace_nonfinite
from beam_nifti.volume.preprocess import prepare_volume
from beam_nifti.volume.volume import load_volume, rescale_volume
from tests.build_helpers import build
from tests.datasets import SOURCE, edit_index, failures_of, index_rows, info_of, manifest_of, set_cell
from tests.images import AFFINE, Array, brain, rescaled, row_of, values_of, write_image, write_manifest

SHAPE = (6, 5, 4)
BAD = np.array([np.nan, np.inf, -np.inf])


def holed(seed: int = 0, dtype: str = "float32", count: int = 7) -> Array:
    """A statistical map: signed values, and some that are not finite."""
    rng = np.random.default_rng(seed)
    voxels = rng.standard_normal(SHAPE).astype(dtype)
    voxels.reshape(-1)[rng.choice(voxels.size, count, replace=False)] = rng.choice(BAD, count)
    return voxels


def replaced(values: Array, rule: str) -> Array:
    """The oracle: values in the image's units."""
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    filling = {"zero": 0.0, "min": values[finite].min()}.get(rule)
    return np.where(finite, values, float(rule[6:]) if filling is None else filling)


SCALINGS = st.builds(
    Scaling,
    st.sampled_from([1.0, -1.0, 0.1, -3.0, 2.0**-3, 1e300]),
    st.sampled_from([0.0, 1.0, -0.3, 1e6]),
)
RULES = st.one_of(
    st.sampled_from(["zero", "min"]),
    st.floats(-1e6, 1e6).map(lambda v: f"value:{v!r}"),
)


@given(
    of_numpy.arrays(
        st.sampled_from([np.float32, np.float64]),
        of_numpy.array_shapes(min_dims=3, max_dims=4, max_side=4),
        elements=st.one_of(st.floats(-1e6, 1e6, width=32), st.sampled_from(BAD.tolist())),
    ),
    SCALINGS,
    RULES,
)
def test_every_value_is_that_of_the_oracle(voxels: Array, scaling: Scaling, rule: str) -> None:
    values = scaling.apply(voxels)
    if not np.isfinite(values).any():
        with pytest.raises(VolumeError, match="all voxels are NaN or infinite; leave the image out"):
            replace_nonfinite(voxels, scaling, rule)
        return
    made, made_scaling, counts = replace_nonfinite(voxels, scaling, rule)
    assert np.array_equal(made_scaling.apply(made), replaced(values, rule))
    assert counts == (np.count_nonzero(~np.isfinite(values)),)
    assert made.dtype == voxels.dtype or (made.dtype == np.float64 and made_scaling.is_identity)
    assert made.flags.c_contiguous


def test_each_channel_has_its_own_minimum() -> None:
    images = [holed(1), holed(2), brain(SHAPE, 3).astype(np.float32)]
    made, _, counts = replace_nonfinite(np.stack(images, -1), Scaling(), "min", ["a", "b", "c"])
    assert counts == (7, 7, 0)
    assert all(np.array_equal(made[..., i], replaced(images[i], "min")) for i in range(3))
    images[1][...] = np.nan
    with pytest.raises(VolumeError, match=r"^channel b: all voxels are NaN or infinite"):
        replace_nonfinite(np.stack(images, -1), Scaling(), "zero", ["a", "b", "c"])


def test_native_voxels_hold_the_value_exactly_or_fail() -> None:
    made, scaling, _ = replace_nonfinite(holed(), Scaling(2.0, 1.0), "value:-4", is_native=True)
    assert (made.dtype, scaling) == (np.float32, Scaling(2.0, 1.0))
    assert np.array_equal(scaling.apply(made), replaced(Scaling(2.0, 1.0).apply(holed()), "value:-4"))
    with pytest.raises(VolumeError, match=r"value:0\.1: no float32 voxel has exactly the value 0\.1; use"):
        replace_nonfinite(holed(), Scaling(), "value:0.1", is_native=True)


def test_integers_are_left_alone() -> None:
    voxels = brain(SHAPE)
    made, scaling, counts = replace_nonfinite(voxels, Scaling(0.5, 1.0), "value:0.1", is_native=True)
    assert made is voxels
    assert (scaling, counts) == (Scaling(0.5, 1.0), (0,))


def test_a_volume_of_somebody_else_keeps_its_voxels() -> None:
    volume = Volume(row_of("a.nii"), holed(), Scaling(), AFFINE, (2, 2, 2.5), "float32", SOURCE)
    prepared = prepare_volume(volume, RecordConfig(nonfinite="zero"))
    assert np.array_equal(volume.voxels, holed(), equal_nan=True)
    assert (np.isfinite(prepared.voxels).all(), prepared.num_nonfinite) == (True, (7,))
    again = prepare_volume(prepared, RecordConfig(nonfinite="min"))
    assert again.num_nonfinite == (7,)


def test_what_a_preparation_sees_is_finite(tmp_path: Path) -> None:
    """The oracle is the preparation of the image that was repaired beforehand."""
    write_image(tmp_path / "holed.nii", holed())
    write_image(tmp_path / "repaired.nii", replaced(holed(), "min").astype(np.float32))
    options: dict[str, Any] = {"spacing": (1.5, 3.0, 2.0), "crop_foreground": "above:0", "shape": (9, 2, 4)}
    record = RecordConfig(nonfinite="min", **options)
    made = prepare_volume(load_volume(row_of("holed.nii"), str(tmp_path), record=record), record)
    plain = RecordConfig(**options)
    wanted = prepare_volume(load_volume(row_of("repaired.nii"), str(tmp_path), record=plain), plain)
    assert np.array_equal(made.voxels, wanted.voxels)
    assert np.array_equal(made.affine, wanted.affine)


def cohort(folder: Path) -> Path:
    """Maps of floats, an image of integers and one of scaled floats."""
    write_image(folder / "0.nii.gz", holed(0))
    write_image(folder / "1.nii.gz", brain(SHAPE, 1))
    write_image(folder / "2.nii.gz", holed(2, "float64", 1), slope=0.5, inter=-3.0)
    rows = [{"path": f"{i}.nii.gz", "label": i} for i in range(3)]
    return write_manifest(folder / "m.tsv", rows)


def test_a_dataset_of_maps(tmp_path: Path, run: Callable[..., str]) -> None:
    manifest, output = cohort(tmp_path / "c"), tmp_path / "out"
    printed = run("build", manifest, output, "--max-bad-fraction=0.9")
    assert "voxels are NaN or infinite; replace them with --nonfinite, or repair the image" in printed
    assert "nonfinite" not in (output / "dataset_info.json").read_text()
    output = tmp_path / "replaced"
    printed = run("build", manifest, output, "--nonfinite=min")
    assert "replaced 8 NaN or infinite voxels of 2 examples" in printed
    assert [row["num_nonfinite"] for row in index_rows(output)] == [7, 0, 1]
    for i, record in enumerate(Dataset(output)):
        values = replaced(values_of(tmp_path / f"c/{i}.nii.gz"), "min")
        assert np.array_equal(record["image"][..., 0], rescaled(values))
        assert index_rows(output)[i]["mean"] == pytest.approx(values.mean())
    assert verify_dataset(str(output), manifest=str(manifest), deep=ALL).ok
    text = run("inspect", output)
    assert "not finite    8 voxels of 2 examples, replaced" in text
    assert "prepared with nonfinite min" in text
    again = run("build", manifest, output, "--nonfinite=min")
    assert "kept     3 examples" in again
    assert "replaced 8 NaN or infinite voxels of 2 examples" in again
    assert make_config(str(manifest), "out", {}, like=str(output)).record.nonfinite == "min"
    assert (
        make_config(str(manifest), "out", {"nonfinite": "error"}, like=str(output)).record.nonfinite is None
    )


def test_check_crops_to_finite_voxels(tmp_path: Path) -> None:
    voxels = np.zeros(SHAPE, np.float32)
    voxels[2:4, 2, 2], voxels[0, 0, 0] = 5, np.inf
    write_image(tmp_path / "a.nii", voxels)
    manifest = str(write_manifest(tmp_path / "m.tsv", [{"path": "a.nii"}]))
    for rule, shape in ((None, (4, 3, 3)), ("zero", (2, 1, 1))):
        record = RecordConfig(nonfinite=rule, crop_foreground="above:0")
        plan = plan_check(BuildConfig(manifest, "", record)).build
        assert plan is not None
        assert plan.shape == shape


def test_a_changed_count_is_found(tmp_path: Path) -> None:
    manifest, output = cohort(tmp_path / "c"), tmp_path / "out"
    build(manifest, output, nonfinite="zero")
    edit_index(output, set_cell("num_nonfinite", 0, 6))
    assert verify_dataset(str(output)).ok
    (problem,) = verify_dataset(str(output), manifest=manifest_of(output), deep=ALL).problems
    assert "the index has num_nonfinite 6, but its image has 7; run the build again" in problem
    edit_index(output, set_cell("num_nonfinite", 0, -1))
    (problem,) = verify_dataset(str(output)).problems
    assert "num_nonfinite -1, which is below 0" in problem


def test_another_rule_is_another_dataset(tmp_path: Path) -> None:
    configs = [RecordConfig(nonfinite=rule) for rule in (None, "zero", "min", "value:1")]
    assert len({config.fingerprint for config in configs}) == 4
    manifest = cohort(tmp_path / "c")
    build(manifest, tmp_path / "a", max_bad_fraction=0.9)
    build(manifest, tmp_path / "b", nonfinite="zero")
    found = compare_datasets(str(tmp_path / "a"), str(tmp_path / "b"))
    assert found.config == {"nonfinite": (None, "zero")}
    assert found.changed == {}
    assert info_of(tmp_path / "b").config["nonfinite"] == "zero"


@pytest.mark.parametrize("rule", ["nan", "value", "value:nan", "value:inf", "zero:1", "min:", "value:1,2"])
def test_what_is_no_rule_is_refused(rule: str) -> None:
    with pytest.raises(UsageError, match=r"--nonfinite is '.*'; (choose one of: error, zero|write it as)"):
        BuildConfig("m.tsv", "out", RecordConfig(nonfinite=rule))


def test_frames_and_channels(tmp_path: Path) -> None:
    frames = np.stack([holed(i, count=i) for i in range(3)], -1)
    frames[..., 1] = np.nan
    write_image(tmp_path / "run.nii.gz", frames)
    manifest = write_manifest(tmp_path / "m.tsv", [{"path": "run.nii.gz"}])
    built = build(manifest, tmp_path / "each", frames="each", nonfinite="zero", max_bad_fraction=0.4)
    assert built.summary.num_failed == 1  # and the frames after it are there
    assert [row["num_nonfinite"] for row in index_rows(tmp_path / "each")] == [0, 2]
    (failure,) = failures_of(tmp_path / "each")
    assert (failure["frames"], failure["stage"]) == ("1", "Preprocess")
    build(manifest, tmp_path / "all", frames="all", nonfinite="zero")
    assert [row["num_nonfinite"] for row in index_rows(tmp_path / "all")] == [120 + 2]
    with pytest.raises(
        TooManyFailures, match=r"all voxels are NaN or infinite; leave the image out \(run\.nii\.gz\)"
    ):
        build(manifest, tmp_path / "mean", frames="mean", nonfinite="zero")  # NaN in one frame
    write_image(tmp_path / "b.nii.gz", holed(5, "float64"), slope=2.0)
    write_image(tmp_path / "a.nii.gz", holed(4))
    manifest = write_manifest(tmp_path / "n.tsv", [{"path": "a.nii.gz", "b": "b.nii.gz"}])
    build(manifest, tmp_path / "two", columns=Columns(path="path,b"), nonfinite="value:9")
    (row,) = index_rows(tmp_path / "two")
    assert row["num_nonfinite"] == [7, 7]
    assert row["max"] == [9.0, 9.0]
    assert verify_dataset(str(tmp_path / "two"), manifest=str(manifest), deep=ALL).ok


def test_voxels_that_a_function_made_infinite_are_refused(tmp_path: Path) -> None:
    record = RecordConfig(nonfinite="zero")
    volume = Volume(row_of("a.nii"), holed(), Scaling(), AFFINE, (2, 2, 2.5), "float32", SOURCE)
    with pytest.raises(
        VolumeError, match="7 of 120 voxels are NaN or infinite; they came with the preparation"
    ):
        rescale_volume(volume, record)


def test_steps_of_a_pipeline(tmp_path: Path) -> None:
    manifest = cohort(tmp_path / "c")
    with beam.Pipeline() as pipeline:
        volumes = pipeline | ReadManifest(manifest) | LoadVolume() | Preprocess(nonfinite=("value", 2))
        _ = volumes | Rescale("none") | EncodeExample() | WriteToTFRecord(tmp_path / "out")
    assert [row["num_nonfinite"] for row in index_rows(tmp_path / "out")] == [7, 0, 1]
    assert info_of(tmp_path / "out").record_config.nonfinite == "value:2"
    assert np.array_equal(
        Dataset(tmp_path / "out")[0]["image"][..., 0], replaced(holed(), "value:2").astype(np.float32)
    )


def test_the_report_tells_how_many(tmp_path: Path) -> None:
    import beam_nifti as bn

    build(cohort(tmp_path / "c"), tmp_path / "out", nonfinite="zero")
    bn.report(tmp_path / "out", out=tmp_path / "report.html")
    assert "8 NaN or infinite voxels of 2 volumes replaced." in (tmp_path / "report.html").read_text()
