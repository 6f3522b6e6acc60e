"""Images to predict beside images, from the manifest to the training batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import beam_nifti as bn
from beam_nifti.cli import main as cli
from beam_nifti.config import ORIENTATIONS, Columns, RecordConfig
from beam_nifti.errors import TooManyFailures, UsageError, VolumeError
from beam_nifti.inspection.extract import read_volume
from beam_nifti.inspection.verify import ALL, verify_dataset
from beam_nifti.pipeline.records import Record, examine, to_record
from beam_nifti.pipeline.steps import LoadVolumeFn
from beam_nifti.read.patches import Box, cut_patch
from beam_nifti.record.example import encode_volume
from beam_nifti.record.index import IndexEntry
from beam_nifti.record.tiles import find_cuts
from beam_nifti.volume.preprocess import prepare_volume
from beam_nifti.volume.rescale import Scaling
from beam_nifti.volume.target import in_own_units, is_rounded
from beam_nifti.volume.volume import Volume, load_volume, require_rescaled, rescale_volume
from tests.build_helpers import build
from tests.datasets import SOURCE, edit_index, info_of, manifest_of, set_cell
from tests.images import AFFINE, Array, brain, row_of, write_image, write_manifest

SHAPE = (6, 5, 4)
WITH_TARGET = RecordConfig(has_target=True)


def dose(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Array:
    return np.random.default_rng(seed).gamma(2.0, 20.0, shape).astype(np.float32)


def cohort(folder: Path, count: int = 3, **options: Any) -> Path:
    """Images, their doses and their masks; the dose of the second one is stored as scaled integers."""
    rows = []
    for i in range(count):
        names = {name: f"{i}_{name}.nii.gz" for name in ("path", "dose", "organs")}
        write_image(folder / names["path"], brain(SHAPE, seed=i), **options)
        scaled = {"slope": 0.5, "inter": -1.0} if i == 1 else {}
        stored = np.round(dose(i)).astype(np.int16) if i == 1 else dose(i)
        write_image(folder / names["dose"], stored, **scaled)
        write_image(folder / names["organs"], (brain(SHAPE, seed=i) > 500).astype(np.uint8))
        rows.append({"participant_id": f"sub-{i}", **names, "label": i})
    return write_manifest(folder / "m.tsv", rows)


def value_of(number: int) -> Array:
    """What the target of a volume of `cohort` must be."""
    return np.round(dose(1)) * 0.5 - 1 if number == 1 else dose(number)


def load(folder: Path, target: Array, record: RecordConfig = WITH_TARGET, **header: Any) -> Volume:
    write_image(folder / "a.nii")
    write_image(folder / "t.nii", target, **header)
    return load_volume(row_of("a.nii", other_files=("t.nii",)), str(folder), record=record)


def test_a_dataset_with_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from beam_nifti.reader import load_dataset

    manifest, output, plain = cohort(tmp_path / "c"), tmp_path / "out", tmp_path / "plain"
    options = ["--target-column=dose", "--mask-column=organs", "--quiet"]
    assert cli.main(["build", str(manifest), str(output), *options]) == 0
    build(manifest, plain)
    assert info_of(output).features["target_raw"] == "bytes"
    assert verify_dataset(str(output), manifest=str(manifest), deep=ALL).problems == ()

    records = bn.Dataset(output, columns=["image", "target", "mask", "id"])
    for i, (element, without) in enumerate(zip(records, bn.Dataset(plain), strict=True)):
        assert np.array_equal(element["image"], without["image"])
        assert element["target"].dtype == np.float32
        assert np.array_equal(element["target"][..., 0], value_of(i))
    assert bn.Dataset(output, columns=["target"], channels_first=True)[0]["target"].shape == (1, *SHAPE)
    for engine in ("indexed", "sequential"):
        pairs = load_dataset(output, batch_size=3, target="target", engine=engine)
        assert pairs.element_spec[1].shape == (None, *SHAPE, 1)
        ((x, y),) = pairs.as_numpy_iterator()
        assert np.array_equal(y[..., 0], [value_of(i) for i in range(3)])
        assert np.array_equal(x[..., 0], [e["image"][..., 0] for e in records])
    for refused, message in (
        ({"target": "target"}, "target is 'target', but .* has no targets; build it with --target-column"),
        ({"target": "dose"}, "target is 'dose'; choose 'label' or 'mask' or 'target'"),
    ):
        with pytest.raises(UsageError, match=message):
            load_dataset(plain, **refused)

    capsys.readouterr()
    assert cli.main(["inspect", str(output)]) == 0
    assert "targets       min" in capsys.readouterr().out
    path = tmp_path / "dose.nii.gz"
    assert cli.main(["extract", str(output), "--id=sub-1", "--target", f"--out={path}"]) == 0
    image: Any = nib.load(path)
    assert image.get_data_dtype() == np.float32
    assert np.array_equal(image.dataobj, value_of(1))
    assert np.allclose(image.affine, AFFINE)
    for wrong in ([str(output), "--mask", "--target"], [str(plain), "--target"]):
        assert cli.main(["extract", *wrong, "--id=sub-1", f"--out={tmp_path / 'x.nii'}"]) == 2
    assert bn.diff(plain, output).config["target_column"] == (None, "dose")


EVEN = (0, 1 << 24, (1 << 24) + 2, 1 << 62, 3 << 30)


@given(
    st.lists(st.one_of(st.sampled_from(EVEN), st.integers(-(2**63), 2**64 - 1)), max_size=4),
    st.sampled_from([np.int32, np.uint32, np.int64, np.uint64]),
)
def test_integers_that_float32_changes_are_noted(values: list[int], dtype: Any) -> None:
    limits = np.iinfo(dtype)
    voxels = np.array([limits.min, *(v for v in values if limits.min <= v <= limits.max)], dtype)
    target = in_own_units("t.nii", voxels, Scaling())
    is_changed = any(int(a) != int(b) for a, b in zip(voxels, target, strict=True))
    assert is_rounded(voxels, Scaling(), target) == is_changed


def test_a_target_that_float32_rounds_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = np.arange(120, dtype=np.uint32).reshape(SHAPE) + (1 << 24)
    assert load(tmp_path, codes).notes == ("rounded-target",)
    assert load(tmp_path, codes, slope=2.0**-10).notes == ()
    assert load(tmp_path, codes, slope=3.0).notes == ("rounded-target",)
    write_manifest(tmp_path / "m.tsv", [{"path": "a.nii", "dose": "t.nii"}])
    arguments = [str(tmp_path / "m.tsv"), str(tmp_path / "out"), "--target-column=dose"]
    assert cli.main(["build", *arguments]) == 0
    assert "integers of the target change by a half or more in float32" in capsys.readouterr().err


def test_only_a_row_without_a_usable_target_fails(tmp_path: Path) -> None:
    manifest = cohort(tmp_path / "c", 4)
    lines = manifest.read_text().replace("0_dose.nii.gz", "n/a").splitlines()
    manifest.write_text("\n".join(lines))
    bad = dose(2)
    bad[1, 2, 3] = np.nan
    write_image(tmp_path / "c/2_dose.nii.gz", bad)
    with pytest.raises(TooManyFailures):
        bn.build(manifest, tmp_path / "out", target_column="dose", progress=False)
    options = {"target_column": "dose", "max_bad_fraction": 0.5, "progress": False}
    assert bn.build(manifest, tmp_path / "out", **options).num_failures == 2
    failed = [json.loads(line) for line in (tmp_path / "out/failures.jsonl").read_text().splitlines()]
    assert "the row has no target; give the path of one, or drop the row" in failed[0]["message"]
    assert "2_dose.nii.gz: the target: 1 of 120 voxels are NaN or infinite" in failed[1]["message"]
    assert failed[0]["dose"] == ""
    options |= {"nonfinite": "zero", "overwrite": True}
    assert bn.build(manifest, tmp_path / "out", **options).num_failures == 1
    assert verify_dataset(str(tmp_path / "out"), manifest=str(manifest), deep=ALL).problems == ()
    bad[1, 2, 3] = 0
    assert np.array_equal(read_volume(str(tmp_path / "out"), "sub-2").of_target().voxels, bad)
    assert bn.inspect(tmp_path / "out")["nonfinite"] == {"num_voxels": 1, "num_examples": 1}
    (problem,) = bn.check(manifest, target_column="dose").problems
    assert "sub-0" in problem
    assert "the row has no target" in problem


def test_anonymous_ids_hide_the_paths_of_targets(tmp_path: Path) -> None:
    manifest, output = cohort(tmp_path / "c"), tmp_path / "out"
    manifest.write_text(manifest.read_text().replace("1_dose.nii.gz", ""))
    (tmp_path / "key").write_bytes(bytes(range(32)))
    options: dict[str, Any] = {"target_column": "dose", "mask_column": "organs", "max_bad_fraction": 0.5}
    options["anonymous_ids"] = tmp_path / "key"
    assert bn.build(manifest, output, progress=False, **options).num_failures == 1
    written = b"".join(path.read_bytes() for path in output.rglob("*.json*"))
    assert b"_dose" not in written
    assert not any("_dose" in name for name in bn.Dataset(output).index(["dose"])["dose"].to_pylist())
    assert bn.verify(output)


def test_a_changed_target_is_loaded_again(tmp_path: Path) -> None:
    manifest, output, columns = cohort(tmp_path / "c"), tmp_path / "out", Columns(target="dose")
    build(manifest, output, columns=columns)
    write_image(tmp_path / "c/0_dose.nii.gz", dose(9))
    assert build(manifest, output, columns=columns).read == {"0_path.nii.gz", "0_dose.nii.gz"}
    assert verify_dataset(str(output), manifest=manifest_of(output), deep=ALL).ok


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "orientation": st.sampled_from(sorted(ORIENTATIONS)),
            "spacing": st.sampled_from([(1.0, 2.0, 3.0), (3.1, 2.0, 5.0)]),
            "interpolation": st.sampled_from(["nearest", "cubic"]),
            "crop_foreground": st.sampled_from(["nonzero", "above:9"]),
            "shape": st.tuples(*[st.integers(1, 9)] * 3),
        },
    ).filter(lambda options: "interpolation" not in options or "spacing" in options),
    st.integers(0, 99),
)
def test_a_target_that_equals_its_image_stays_equal(options: dict[str, Any], seed: int) -> None:
    values = dose(seed)
    values[0] = 0
    given = values.copy()
    volume = Volume(row_of("a.nii"), values, Scaling(), AFFINE, (2, 2, 2.5), "f", SOURCE, target=given)
    prepared = prepare_volume(volume, RecordConfig(**options, has_target=True))
    assert prepared.target is not None
    assert prepared.target.flags.c_contiguous
    assert np.array_equal(prepared.target, prepared.voxels)
    assert np.array_equal(given, values)


def test_targets_are_aligned_as_images_are(tmp_path: Path) -> None:
    image, other = brain(SHAPE), dose(1, (9, 8, 7))
    affine = AFFINE @ np.array([[0.8, 0, 0, 1], [0, 0.7, 0, 0], [0, 0, 0.6, 0.3], [0, 0, 0, 1]])
    write_image(tmp_path / "a.nii", image)
    write_image(tmp_path / "t.nii", other, affine=affine)
    row = row_of("a.nii", other_files=("t.nii",))
    with pytest.raises(VolumeError, match=r"t\.nii: shape .* where a\.nii has .*; use --align first"):
        load_volume(row, str(tmp_path), record=WITH_TARGET)
    target = load_volume(row, str(tmp_path), record=RecordConfig(has_target=True, align="first")).target
    channels = RecordConfig(channels=("a", "t"), align="first")
    both = load_volume(row, str(tmp_path), record=channels).voxels
    assert target is not None
    assert np.array_equal(target, both[..., 1].astype(np.float32))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (dose(shape=(*SHAPE, 2)), r"t\.nii: shape \(6, 5, 4, 2\) of float32: a target must have one number"),
        (dose(shape=(6, 5, 3)), r"t\.nii: shape \(6, 5, 3\) where a\.nii has \(6, 5, 4\)"),
        (
            dose().astype(np.float64) * 1e38,
            r"t\.nii: the target has values such as .*e\+\d+, which float32 cannot hold",
        ),
        (
            np.where(np.arange(120).reshape(SHAPE) == 7, np.nan, dose().astype(np.float64) * 1e38),
            "which float32 cannot hold",
        ),
    ],
)
def test_what_is_no_target_is_refused(tmp_path: Path, target: Array, message: str) -> None:
    with pytest.raises(VolumeError, match=message):
        load(tmp_path, target)


def test_values_that_are_not_finite_are_replaced_before_they_spread(tmp_path: Path) -> None:
    target = dose() + 1
    target[2, 2, 2], target[3, 3, 3] = np.inf, np.nan
    for rule, value in (("min", np.nanmin(target)), ("zero", 0), ("value:-2.5", -2.5)):
        volume = load(tmp_path, target, RecordConfig(has_target=True, nonfinite=rule))
        assert volume.target is not None
        assert volume.target_nonfinite == 2
        assert volume.target[2, 2, 2] == volume.target[3, 3, 3] == value
    # A step of one's own pipeline may also do it after loading, and leaves its input alone.
    volume = load(tmp_path, target)
    made = prepare_volume(volume, RecordConfig(has_target=True, nonfinite="zero"))
    assert made.target_nonfinite == 2
    assert np.isnan(volume.target).any()  # type: ignore[arg-type]
    assert np.array_equal(made.target, np.where(np.isfinite(target), target, 0))  # type: ignore[arg-type]
    with pytest.raises(VolumeError, match=r"t\.nii: the target: 2 of 120 voxels are NaN or infinite"):
        rescale_volume(volume, WITH_TARGET)


def test_patches_have_the_target(tmp_path: Path) -> None:
    shape = (40, 36, 30)
    values = dose(3, shape) + 5
    write_image(tmp_path / "a.nii.gz", brain(shape))
    write_image(tmp_path / "t.nii.gz", values)
    manifest = write_manifest(tmp_path / "m.tsv", [{"path": "a.nii.gz", "target": "t.nii.gz"}])
    for compression in ("gzip", "none"):
        output = tmp_path / compression
        bn.build(manifest, output, target_column="target", compression=compression, progress=False)
        records = bn.Dataset(output, columns=["target", "image", "affine"])
        (example,) = (read.example for read in [_record(records, output)])
        assert len(find_cuts(example, compression == "gzip")) > 1
        whole = records[0]
        for corner, size in (((3, 4, 5), (9, 8, 7)), ((-4, 30, -2), (20, 12, 40)), ((50, 0, 0), (4, 4, 4))):
            patch = records.patch(0, corner, size)
            box = Box.of(corner, size)
            cut = cut_patch(
                whole["target"], box, records.info.record_config, name="target", channels_first=False
            )
            assert np.array_equal(patch["target"], cut)
        assert (patch["target"] == values.min()).all()
        patches = bn.PatchDataset(records, bn.Patches((8, 8, 8), 2), seed=1)
        assert patches[1]["target"].shape == (8, 8, 8, 1)
    assert bn.Dataset(output, columns=["manifest_target"])[0]["manifest_target"] == "t.nii.gz"


def _record(records: bn.Dataset, output: Path) -> Record:
    """The record as its shard has it."""
    from beam_nifti.record.tfrecord import decode_record

    shard = records.info.shards[0]
    data = (output / shard.name).read_bytes()
    return Record("a", decode_record(data, shard.name.endswith(".gz")))


def test_a_function_gets_the_target_and_must_return_it(tmp_path: Path) -> None:
    from beam_nifti.volume.preprocess import apply_function

    volume = load(tmp_path, dose())

    def halved(volume: Volume) -> Volume:
        assert volume.target is not None
        volume.target[...] *= 0.5
        return volume

    made = apply_function(volume, halved, "halved")
    assert np.array_equal(made.target, dose() / 2)  # type: ignore[arg-type]
    assert np.array_equal(volume.target, dose())  # type: ignore[arg-type]
    plain = load_volume(row_of("a.nii"), str(tmp_path))
    with pytest.raises(VolumeError, match="returned a target, but records have none; name a column"):
        apply_function(plain, lambda v: _with(v, target=dose()), "f")
    for function, message in (
        (
            lambda v: _with(v, voxels=np.ascontiguousarray(v.voxels[1:])),
            r"returned a target of shape \(6, 5, 4\)",
        ),
        (lambda v: _with(v, target=None), "returned a target of NoneType; return an array of float32"),
        (lambda v: _with(v, target=v.target.astype(float)), "returned a target of float64"),
    ):
        with pytest.raises(VolumeError, match=message):
            apply_function(volume, function, "f")


def test_steps_of_a_pipeline(tmp_path: Path) -> None:
    """Targets are loaded, or a step makes them, before they are measured."""
    made = rescale_volume(_with(load(tmp_path, dose()), target=dose(5)), WITH_TARGET)
    row = row_of("a.nii")
    volume = rescale_volume(_with(load_volume(row, str(tmp_path)), target=dose(5)), RecordConfig())
    for each in (made, volume):
        entry = IndexEntry.of(each)
        record = Record("sub-01", bytes(encode_volume(each)), entry=entry, config=each.config)
        traits, cells = examine(record)
        assert traits.config.has_target
        assert cells["target_max"] == dose(5).max()
        require_rescaled(each)
        with pytest.raises(VolumeError, match="put steps that change targets before Rescale"):
            require_rescaled(_with(each, target=dose(6)))
    step = LoadVolumeFn(config=RecordConfig())
    with pytest.raises(UsageError, match="the row has 2 files, but LoadVolume reads 1; give it the channels"):
        next(iter(step.process(row_of("a.nii", other_files=("t.nii",)))))
    columns = Columns(target="dose")
    with pytest.raises(UsageError, match=r"'dose' \(target\).*; use LoadVolume\(has_target=True\)"):
        next(iter(step.process(row_of("a.nii", other_files=("t.nii",), columns=columns))))


def _with(volume: Volume, **fields: Any) -> Volume:
    from dataclasses import replace

    return replace(volume, **fields)


def test_new_images_and_predictions(tmp_path: Path) -> None:
    manifest, output = cohort(tmp_path / "c"), tmp_path / "out"
    options: dict[str, Any] = {"spacing": (3, 2, 2), "orientation": "RAS", "progress": False}
    bn.build(manifest, output, target_column="dose", **options)
    records = bn.Dataset(output, columns=["image", "target"])
    preparation = bn.Preparation.of(output)
    image, target = (tmp_path / f"c/0_{name}.nii.gz" for name in ("path", "dose"))
    made = preparation.apply(image, target=target)
    assert np.array_equal(made.target, records[0]["target"])  # type: ignore[arg-type]
    assert made.grid_patches((2, 2, 2))[0]["target"].shape == (2, 2, 2, 1)
    assert "with a target" in repr(made)
    assert preparation.apply(image).target is None
    stored = bn.extract(output, "sub-0")
    back = stored.on_source_grid().of_target().voxels
    assert np.array_equal(back, np.asarray(bn.restore(records[0]["target"], made, fill=back.min()).dataobj))
    bn.build(manifest, tmp_path / "plain", **options)
    with pytest.raises(UsageError, match="was built without targets; drop it"):
        bn.Preparation.of(tmp_path / "plain").apply(image, target=target)


def test_datasets_with_targets_are_relabelled_and_participants_withdrawn(tmp_path: Path) -> None:
    manifest, output = cohort(tmp_path / "c"), tmp_path / "out"
    bn.build(manifest, output, target_column="dose", mask_column="organs", progress=False)
    before = {i: read_volume(str(output), f"sub-{i}").of_target().voxels for i in range(3)}
    manifest.write_text(manifest.read_text().replace("\t2\n", "\t7\n"))
    bn.relabel(output, manifest)
    bn.withdraw(output, participants=["sub-1"], manifest=manifest)
    assert verify_dataset(str(output)).problems == ()
    for i in (0, 2):
        assert np.array_equal(read_volume(str(output), f"sub-{i}").of_target().voxels, before[i])


def test_verify_finds_another_index(tmp_path: Path) -> None:
    manifest, output = cohort(tmp_path / "c"), tmp_path / "out"
    build(manifest, output, columns=Columns(target="dose"))
    edit_index(output, set_cell("target_max", 1, 7.5))
    (problem,) = verify_dataset(str(output)).problems
    assert "the target ranges from" in problem
    assert "to 7.5" in problem


def test_written_examples_have_targets() -> None:
    image, target = dose(), dose(1)
    record = to_record(("a", {"image": image, "target": target}))
    traits, cells = examine(record)
    assert traits.config.has_target
    assert (cells["target_min"], cells["target_max"]) == (target.min(), target.max())
    # A number of that name is a feature like any other.
    assert examine(to_record(("a", {"image": image, "target": 3})))[0].features["target"] == "int64"
    bad = target.copy()
    bad[0, 0, 0] = np.nan
    for wrong, message in (
        (target.astype(float), "target is float64, expected one of float32"),
        (target[1:], r"its target is float32 of \(5, 5, 4\), expected float32 of \(6, 5, 4\)"),
        (bad, "1 of 120 voxels are NaN"),
    ):
        with pytest.raises(VolumeError, match=message):
            examine(to_record(("a", {"image": image, "target": wrong})))
