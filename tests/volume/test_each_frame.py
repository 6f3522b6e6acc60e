"""`--frames each`: the frames of a 4-D image as examples of their own."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beam_nifti.cli import main as cli
from beam_nifti.config import BuildConfig, RecordConfig, Sharding
from beam_nifti.errors import DatasetError, OutputError, TooManyFailures, UsageError, VolumeError
from beam_nifti.inspection.description import describe_record
from beam_nifti.inspection.extract import read_volume
from beam_nifti.inspection.verify import ALL, verify_dataset
from beam_nifti.manifest import read_manifest
from beam_nifti.pipeline.failures import failed_frames
from beam_nifti.pipeline.plan import SHARD_BYTES, CheckPlan, default_sharding, record_bytes
from beam_nifti.pipeline.survey import survey_image
from beam_nifti.record.dataset_info import read_info
from beam_nifti.record.example import encode_volume
from beam_nifti.record.sharding import shard_ranges
from beam_nifti.volume.volume import Volume, load_frames, load_header, load_volume, rescale_volume
from tests.build_helpers import CUTTING_RUNNER, Built, assert_complete, build, build_apart, contents
from tests.datasets import failures_of, records_of
from tests.images import (
    REAL_DTYPES,
    Array,
    nifti_header,
    random_voxels,
    row_of,
    write_image,
    write_manifest,
)

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
GRID = (6, 5, 4)
FRAMES = 5
EACH = RecordConfig(frames="each")
_EACH: dict[str, Any] = {"frames": "each", "unit_rows": 1, "examples_per_shard": 2 * FRAMES + 1}
COLOURS = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


def write_runs(folder: Path, count: int = 4, frames: int = FRAMES) -> Path:
    """Images of some frames, and their manifest."""
    rows = []
    for i in range(count):
        write_run(folder / f"{i}.nii.gz", i, frames)
        rows.append({"participant_id": f"sub-{i}", "path": f"{i}.nii.gz", "label": i, "site": "x"})
    return write_manifest(folder / "m.tsv", rows)


def write_run(path: Path, number: int, frames: int) -> Path:
    """One of those images."""
    return write_image(path, random_voxels((*GRID, frames), seed=number), slope=0.5, inter=2.0)


def write_frames(manifest: Path, folder: Path) -> Path:
    """The frames of a manifest's images as 3-D images, cut by nibabel, with a manifest of their own."""
    rows, table = [], read_manifest(str(manifest))
    for row in table.rows(range(len(table))):
        image: Any = nib.load(manifest.parent / row.path)
        stored = image.dataobj.get_unscaled()
        for t in range(image.shape[3]):
            name = f"{row.example_id}_frame-{t:04d}"
            slope, inter = image.dataobj.slope, image.dataobj.inter
            write_image(folder / f"{name}.nii.gz", stored[..., t], slope=slope, inter=inter)
            cells = {"participant_id": name, "path": f"{name}.nii.gz", "label": row.label, "site": "x"}
            rows.append(cells)
    return write_manifest(folder / "m.tsv", rows)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort that no test changes."""
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def reference(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of an undisturbed build: two images a shard."""
    output = tmp_path_factory.mktemp("reference") / "dataset"
    build_each(manifest, output)
    return output


def build_each(manifest: Path, output: Path, **changes: Any) -> Built:
    return build(manifest, output, **{**_EACH, **changes})


def encoded(volume: Volume, config: RecordConfig) -> bytes:
    return bytes(encode_volume(rescale_volume(volume, config)))


# A frame's record is that of the frame as an image


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(REAL_DTYPES),
    st.tuples(*[st.integers(1, 5)] * 3, st.integers(2, 12)),
    st.sampled_from(["a.nii", "a.nii.gz"]),
    st.sampled_from(["none", "window:-10,10"]),
    st.integers(0, 2**32 - 1),
)
def test_frames_are_those_that_nibabel_cuts(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], name: str, rescale: str, seed: int
) -> None:
    path = write_image(tmp_path / name, random_voxels(shape, dtype, seed), slope=0.5, inter=-1.0)
    config = RecordConfig(frames="each", rescale=rescale, voxel_dtype="native")
    row = row_of(path, num_frames=shape[3])
    stored = np.asarray(nib.load(path).dataobj.get_unscaled())  # type: ignore[attr-defined]
    volumes = list(load_frames(row, record=config))
    assert len(volumes) == shape[3]
    alone = RecordConfig(rescale=rescale, voxel_dtype="native")
    for t, volume in enumerate(volumes):
        assert volume.voxels.flags.c_contiguous
        assert volume.voxels.tobytes() == stored[..., t].tobytes()
        single = write_image(tmp_path / f"of_{name}", stored[..., t], slope=0.5, inter=-1.0)
        read = load_volume(replace(row_of(single), example_id=f"sub-01_frame-{t:04d}"), record=alone)
        assert encoded(volume, config) == encoded(read, alone)


def _colours() -> Array:
    return random_voxels((*GRID, FRAMES, 3), "uint8").view(COLOURS)[..., 0]


@pytest.mark.parametrize(
    ("voxels", "options"),
    [
        (random_voxels((*GRID, FRAMES, 3)), {}),
        (_colours(), {}),
        (random_voxels((*GRID, FRAMES), "complex64"), {"complex": "phase"}),
        (random_voxels((*GRID, FRAMES), "complex64"), {"complex": "real-imag"}),
        (random_voxels(GRID), {}),
    ],
    ids=["vectors", "colours", "phase", "real-imag", "3-D"],
)
def test_a_frame_is_what_its_number_gives(tmp_path: Path, voxels: Array, options: dict[str, Any]) -> None:
    path = write_image(tmp_path / "a.nii.gz", voxels)
    frames = voxels.shape[3] if voxels.ndim > 3 else 1
    each = RecordConfig(frames="each", **options)
    volumes = list(load_frames(row_of(path, num_frames=frames), record=each))
    assert [volume.row.frame for volume in volumes] == list(range(frames))
    for t, volume in enumerate(volumes):
        one = RecordConfig(frames=str(t), **options)
        assert encoded(volume, each) == encoded(
            replace(load_volume(row_of(path), record=one), row=volume.row), one
        )


@pytest.mark.parametrize("name", ["a.img", "a.mgz"])
def test_frames_of_other_formats(tmp_path: Path, name: str) -> None:
    voxels = random_voxels((*GRID, FRAMES))
    if name == "a.img":
        header = nifti_header(voxels, fields={"magic": b"ni1", "vox_offset": 0})
        (tmp_path / "a.hdr").write_bytes(header)
        (tmp_path / name).write_bytes(voxels.tobytes(order="F"))
    else:
        nib.save(nib.MGHImage(voxels, np.eye(4)), tmp_path / name)  # type: ignore[attr-defined, no-untyped-call]
    volumes = load_frames(row_of(tmp_path / name, num_frames=FRAMES))
    assert [v.voxels.tobytes() for v in volumes] == [voxels[..., t].tobytes() for t in range(FRAMES)]


@pytest.mark.parametrize(
    "options",
    [{}, {"orientation": "RPS", "shape": (7, 4, 4)}, {"crop_foreground": "nonzero", "voxel_dtype": "native"}],
    ids=["as is", "turned", "cropped"],
)
def test_a_dataset_of_frames_is_that_of_3d_images(
    manifest: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    build_each(manifest, tmp_path / "each", **options)
    build(write_frames(manifest, tmp_path / "cut"), tmp_path / "alone", **options)
    each, alone = (list(records_of(tmp_path / name)) for name in ("each", "alone"))
    assert [cells.pop("frame") for cells, _ in each] == list(range(FRAMES)) * 4
    for cells, _ in (*each, *alone):
        for column in [name for name in cells if name.startswith("source")]:
            del cells[column]
        del cells["row"], cells["offset"], cells["participant_id"]
    assert each == alone
    report = verify_dataset(str(tmp_path / "each"), manifest=str(manifest), deep=ALL)
    assert (report.problems, report.num_deep) == ((), 4 * FRAMES)


def test_shards_hold_whole_images(manifest: Path, reference: Path) -> None:
    info = read_info(str(reference))
    assert [s.num_examples for s in info.shards] == [2 * FRAMES, 2 * FRAMES]
    assert info.shape == GRID
    cells = describe_record(str(reference), "sub-2_frame-0003")
    assert (cells["position"], cells["row"], cells["frame"]) == (2 * FRAMES + 3, 3, 3)
    image: Any = nib.load(manifest.parent / "2.nii.gz")
    volume = read_volume(str(reference), "sub-2_frame-0003")
    assert np.allclose(volume.voxels, image.dataobj[..., 3], atol=1e-2)


@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 40))
def test_shards_are_cut_between_images(num_rows: int, frames: int, wanted: int) -> None:
    for sharding in (Sharding(examples_per_shard=wanted), Sharding(num_shards=wanted)):
        ranges = shard_ranges(num_rows, sharding, frames)
        assert [p for r in ranges for p in r] == list(range(num_rows * frames))
        assert all(r.start % frames == 0 == len(r) % frames for r in ranges)
        if sharding.examples_per_shard:
            assert all(len(r) <= max(wanted, frames) for r in ranges)


@given(st.integers(1, 10**7), st.integers(1, 400))
def test_default_shards_of_frames_have_the_usual_size(num_voxels: int, frames: int) -> None:
    sharding = default_sharding(num_voxels, 2, EACH, frames)
    (shard,) = shard_ranges(1, sharding, frames)
    assert len(shard) == frames
    each = record_bytes(num_voxels, 2, EACH)
    assert sharding.examples_per_shard is not None
    if frames * each <= SHARD_BYTES:
        assert SHARD_BYTES / 1.5 <= each * sharding.examples_per_shard <= SHARD_BYTES * 1.5


def test_memory_is_the_image_and_a_frame(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nii", random_voxels((32, 32, 16, 64), "float32"))
    config = RecordConfig(frames="each", rescale="none")
    tracemalloc.start()
    try:
        for volume in load_frames(row_of(path, num_frames=64), record=config):
            encoded(volume, config)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    frame = 32 * 32 * 16 * 4
    assert peak < (64 + 8) * frame


@pytest.mark.tf
def test_frames_are_the_examples_of_a_batch(reference: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    from beam_nifti.reader import load_dataset

    batches = load_dataset(reference, batch_size=8)
    assert batches.element_spec[0] == tf.TensorSpec((None, *GRID, 1), tf.float32)
    labels = [float(label) for _, y in batches for label in y]
    assert sorted(labels) == np.repeat(np.arange(4.0), FRAMES).tolist()


# Interrupted and cut otherwise


def test_other_units_and_a_runner_that_cuts_everywhere(
    manifest: Path, reference: Path, tmp_path: Path
) -> None:
    build_each(manifest, tmp_path / "units", unit_rows=3)
    assert_complete(tmp_path / "units", reference)
    build_each(manifest, tmp_path / "cut", runner=CUTTING_RUNNER)
    assert_complete(tmp_path / "cut", reference)


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_build_continues(manifest: Path, reference: Path, tmp_path: Path, seed: int) -> None:
    output, kill_at = tmp_path / "out", random.Random(seed).randrange(15, 60)
    assert build_apart(manifest, output, kill_at, **_EACH).was_killed
    assert build_apart(manifest, output, **_EACH).result["complete"]
    assert_complete(output, reference)


# Left out


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Four images of which the second has two constant frames, and the third another length."""
    manifest = write_runs(tmp_path / "c")
    voxels = random_voxels((*GRID, FRAMES), seed=1)
    voxels[..., [1, 3]] = 7
    write_image(tmp_path / "c/1.nii.gz", voxels)
    write_image(tmp_path / "c/2.nii.gz", random_voxels((*GRID, FRAMES + 2)))
    return manifest


def repair(damaged: Path) -> None:
    for number in (1, 2):
        write_run(damaged.parent / f"{number}.nii.gz", number, FRAMES)


def test_a_frame_that_fails_leaves_the_others(damaged: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(TooManyFailures, match=f"{FRAMES + 2} of {4 * FRAMES} volumes failed"):
        build_each(damaged, output, max_bad_fraction=(FRAMES + 1) / (4 * FRAMES))
    again = build_each(damaged, output, max_bad_fraction=(FRAMES + 2) / (4 * FRAMES))
    assert again.read == {"1.nii.gz", "2.nii.gz"}
    assert again.counters["volumes-skipped"] == 3 * FRAMES - 2
    info = read_info(str(output))
    assert (info.num_examples, info.num_failures) == (3 * FRAMES - 2, FRAMES + 2)
    of_frames, of_image = failures_of(output)
    assert (of_frames["row"], of_frames["stage"], of_frames["frames"]) == (2, "Rescale", "1,3")
    assert of_frames["message"].startswith("frames 1, 3: 1.nii.gz: all voxels are 7")
    assert (of_image["row"], of_image["stage"], "frames" in of_image) == (3, "LoadVolume", False)
    assert "number of frames is 7, but the first image has 5" in of_image["message"]
    assert "build the others into another dataset" in of_image["message"]
    assert verify_dataset(str(output), manifest=str(damaged), deep=ALL).ok
    with pytest.raises(DatasetError, match=r"'sub-1_frame-0003'; it failed: Rescale: frames 1, 3"):
        describe_record(str(output), "sub-1_frame-0003")


def test_frames_that_failed_are_tried_again(damaged: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    build_each(damaged, output, max_bad_fraction=0.5)
    before = contents(output)
    build_each(damaged, output, max_bad_fraction=0.5)
    assert contents(output) == before
    assert read_info(str(output)).revision == 1
    repair(damaged)
    repaired = build_each(damaged, output)
    assert repaired.read == {"1.nii.gz", "2.nii.gz"}
    build_each(damaged, tmp_path / "undisturbed")
    assert contents(output) == contents(tmp_path / "undisturbed")


def test_the_failures_are_the_manifest_of_a_retry(damaged: Path, tmp_path: Path) -> None:
    build_each(damaged, tmp_path / "out", max_bad_fraction=0.5)
    failures = tmp_path / "out/failures.jsonl"
    assert failed_frames(read_manifest(str(failures)), FRAMES) == [[1, 3], range(FRAMES)]
    repair(damaged)
    build_each(failures, tmp_path / "retry")
    ids = [cells["example_id"] for cells, _ in records_of(tmp_path / "retry")]
    assert ids == [f"sub-{i}_frame-{t:04d}" for i in (1, 2) for t in range(FRAMES)]


@pytest.mark.parametrize("is_anonymous", [False, True])
def test_frames_of_images_that_only_their_path_names(
    damaged: Path, tmp_path: Path, is_anonymous: bool
) -> None:
    (damaged.parent / "paths.tsv").write_text("path\n" + "".join(f"{i}.nii.gz\n" for i in range(4)))
    key = tmp_path / "key" if is_anonymous else None
    (tmp_path / "key").write_bytes(bytes(range(32)))
    manifest, output = damaged.parent / "paths.tsv", tmp_path / "out"
    build_each(manifest, output, max_bad_fraction=0.5, anonymous_ids=key and str(key))
    report = verify_dataset(str(output), manifest=str(manifest), anonymous_ids=key and str(key), deep=ALL)
    assert (report.problems, report.num_deep) == ((), 3 * FRAMES - 2)
    if not is_anonymous:
        with pytest.raises(DatasetError, match="it failed: Rescale"):
            describe_record(str(output), "1.nii.gz_frame-0003")


def test_damage_anywhere_in_the_file_is_found_before_the_first_frame(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nii.gz", random_voxels((*GRID, FRAMES)))
    path.write_bytes(path.read_bytes()[:-6] + b"\0" * 6)
    with pytest.raises(VolumeError, match="copy the file again"):
        load_frames(row_of(path, num_frames=FRAMES))


def test_a_first_image_of_another_length_is_another_dataset(tmp_path: Path) -> None:
    manifest, output = write_runs(tmp_path / "c"), tmp_path / "out"
    build_each(manifest, output)
    write_runs(tmp_path / "c", frames=3)
    with pytest.raises(OutputError, match="the number of frames of the first image was 5, now 3"):
        build_each(manifest, output)


def test_an_image_that_was_replaced_in_the_manifest_is_named(tmp_path: Path) -> None:
    manifest, output = write_runs(tmp_path / "c"), tmp_path / "out"
    build_each(manifest, output)
    manifest.write_text(manifest.read_text().replace("2.nii.gz\t2", "2.nii.gz\t9"))
    with pytest.raises(OutputError, match=r"  row 3 \(sub-2\): label was 2, now 9\n"):
        build_each(manifest, output)


def test_what_verify_finds(reference: Path, tmp_path: Path) -> None:
    other = write_runs(tmp_path / "c", count=5)
    problems = verify_dataset(str(reference), manifest=str(other)).problems
    assert len(problems) == 1
    assert f"{FRAMES} manifest rows are neither in the shards" in problems[0]
    assert "sub-4_frame-0000" in problems[0]


def test_a_survey_counts_frames(manifest: Path) -> None:
    row = read_manifest(str(manifest)).rows([0])[0]
    plan = CheckPlan(BuildConfig(str(manifest), "", record=EACH), 1, 0, None)
    found, *_ = survey_image(row, str(manifest.parent), plan)
    assert (found.num_examples, found.frames, found.records) == (FRAMES, {"5": 1}, {"6×5×4": 1})
    assert found.record_bytes == FRAMES * record_bytes(6 * 5 * 4, 2, EACH)


def test_a_check_tells_lengths_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_runs(tmp_path / "c")
    arguments = ["check", str(manifest), "--frames=each", "--json", "--quiet"]
    assert cli.main(arguments) == cli.SUCCESS
    report = json.loads(capsys.readouterr().out)
    assert (report["num_examples"], report["frames"]) == (4 * FRAMES, {"5": 4})
    write_run(tmp_path / "c/3.nii.gz", 3, 2)
    assert cli.main(arguments) == cli.FAILED
    assert json.loads(capsys.readouterr().out)["frames"] == {"5": 3, "2": 1}


def test_a_dry_run_counts_frames(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", str(manifest), str(tmp_path / "out"), "--frames=each", "--dry-run"]
    assert cli.main([*arguments, "--examples-per-shard=12"]) == cli.SUCCESS
    told = capsys.readouterr().out
    assert "volumes  20 of 6×5×4 voxels (train 20)" in told
    assert "shards   2 of up to 10 examples" in told


def test_a_split_image_is_another_record() -> None:
    made = {RecordConfig(frames=frames).fingerprint for frames in (None, "all", "each", "first")}
    assert len(made) == 4


# Remedies


@pytest.mark.parametrize(
    ("voxels", "options"),
    [
        (random_voxels((*GRID, FRAMES)), {}),
        (random_voxels((*GRID, FRAMES)), {"voxel_dtype": "native"}),
        (random_voxels((*GRID, 1, 3)), {}),
        (random_voxels((*GRID, FRAMES, 3)), {}),
        (_colours(), {}),
        (random_voxels((*GRID, FRAMES), "complex64"), {"complex": "phase"}),
        (random_voxels((*GRID, FRAMES), "complex64"), {"complex": "real-imag"}),
    ],
)
@pytest.mark.parametrize("frames", [None, "all"])
def test_the_choices_that_an_error_names_are_possible(
    tmp_path: Path, voxels: Array, options: dict[str, Any], frames: str | None
) -> None:
    path = write_image(tmp_path / "a.nii", voxels)

    def refusal(frames: str | None) -> str | None:
        try:
            load_header(row_of(path), record=RecordConfig(frames=frames, **options))
        except VolumeError as e:
            return str(e)
        return None

    told = refusal(frames)
    if told is None:
        return  # there is nothing to choose
    named = told.partition("--frames ")[2].partition(" or a number")[0].split(", ")
    possible = []
    for choice in ("all", "each", "first", "mean"):
        try:
            if refusal(choice) is None:
                possible.append(choice)
        except UsageError:
            pass
    assert named == possible


def test_no_frame_is_offered_where_one_has_too_much(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nii", random_voxels((*GRID, FRAMES, 3), "complex64"))
    for frames in (None, "all", "first"):
        with pytest.raises(VolumeError, match="one axis for them; extract one of the components"):
            load_header(row_of(path), record=RecordConfig(frames=frames, complex="real-imag"))
