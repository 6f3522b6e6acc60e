"""`--frames each --max-frames N`: images that differ in their number of frames, in one dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beam_nifti.config import BuildConfig, RecordConfig
from beam_nifti.errors import DatasetError, OutputError, TooManyFailures, UsageError
from beam_nifti.inspection.verify import ALL, verify_dataset
from beam_nifti.pipeline.build import plan_build
from beam_nifti.pipeline.configure import make_config
from beam_nifti.random_access import Dataset
from tests.build_helpers import CUTTING_RUNNER, Built, assert_complete, build, build_apart
from tests.datasets import edit_index, edit_info, failures_of, index_rows, info_of, records_of
from tests.images import random_voxels, write_image, write_manifest
from tests.volume.test_each_frame import write_frames

GRID = (6, 5, 4)
LENGTHS = (3, 1, 4, 2)
MOST = 4


def write_runs(folder: Path, lengths: tuple[int, ...] = LENGTHS) -> Path:
    rows = []
    for i, length in enumerate(lengths):
        if not (folder / f"{i}.nii.gz").exists():
            shape = (*GRID, length) if length > 1 else GRID
            write_image(folder / f"{i}.nii.gz", random_voxels(shape, seed=i), slope=0.5, inter=2.0)
        rows.append({"participant_id": f"sub-{i}", "path": f"{i}.nii.gz", "label": i, "site": "x"})
    return write_manifest(folder / "m.tsv", rows)


def build_runs(manifest: Path, output: Path, **changes: Any) -> Built:
    return build(manifest, output, **{"frames": "each", "max_frames": MOST, "unit_rows": 1, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that no test changes."""
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def reference(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "dataset"
    build_runs(runs, output)
    return output


def test_every_record_is_that_of_the_frame_as_an_image(runs: Path, reference: Path, tmp_path: Path) -> None:
    lengths = (3, 2, 4, 2)  # nibabel cuts no frames of a 3-D image
    manifest = write_runs(tmp_path / "c", lengths)
    build_runs(manifest, tmp_path / "runs")
    build(write_frames(manifest, tmp_path / "frames"), tmp_path / "apart")
    wanted = {cells["example_id"]: payload for cells, payload in records_of(tmp_path / "apart")}
    found = {cells["example_id"]: payload for cells, payload in records_of(tmp_path / "runs")}
    assert len(wanted) == sum(lengths)
    assert found == wanted


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.integers(0, 3),
    st.sampled_from([{"examples_per_shard": 7}, {"examples_per_shard": 1}, {"num_shards": 2}]),
    st.sampled_from([None, 7]),
)
def test_positions_ids_and_frames(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    spare: int,
    sharding: dict[str, int],
    seed: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    manifest, most = write_runs(folder, tuple(lengths)), max(lengths) + spare
    build_runs(manifest, folder / "out", max_frames=most, shuffle_seed=seed, **sharding)
    rows = index_rows(folder / "out")
    order = list(dict.fromkeys(row["row"] for row in rows))
    assert sorted(order) == list(range(1, len(lengths) + 1))
    assert [(row["row"], row["frame"], row["position"]) for row in rows] == [
        (row, frame, place * most + frame)
        for place, row in enumerate(order)
        for frame in range(lengths[row - 1])
    ]
    assert all(row["example_id"] == f"sub-{row['row'] - 1}_frame-{row['frame']:04d}" for row in rows)
    assert verify_dataset(str(folder / "out"), manifest=str(manifest), deep=ALL).problems == ()


def test_nothing_is_loaded_again(runs: Path, reference: Path, tmp_path: Path) -> None:
    again = build_runs(runs, reference)
    assert again.read == frozenset()
    assert again.summary.num_written == sum(LENGTHS)
    assert info_of(reference).revision == 1


def test_a_runner_that_breaks_fusion_makes_the_same(runs: Path, reference: Path, tmp_path: Path) -> None:
    build_runs(runs, tmp_path / "out", runner=CUTTING_RUNNER)
    assert_complete(tmp_path / "out", reference)
    build_runs(runs, tmp_path / "two", workers=2)
    assert_complete(tmp_path / "two", reference)


def test_runs_are_appended_and_repaired(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    manifest, output = write_runs(folder, LENGTHS[:2]), tmp_path / "out"
    build_runs(manifest, output)
    manifest = write_runs(folder)
    (folder / "3.nii.gz").write_bytes(b"no image")
    built = build_runs(manifest, output, max_bad_fraction=0.9)
    assert built.read == {"2.nii.gz", "3.nii.gz"}
    assert (built.summary.num_failed, info_of(output).num_failures) == (MOST, MOST)  # as it may have so many
    assert verify_dataset(str(output), manifest=str(manifest), deep=ALL).problems == ()
    (folder / "3.nii.gz").unlink()
    built = build_runs(write_runs(folder), output, max_bad_fraction=0.9)
    assert (built.read, built.summary.num_failed) == ({"3.nii.gz"}, 0)
    assert verify_dataset(str(output), manifest=str(manifest), deep=ALL).problems == ()
    build_runs(manifest, tmp_path / "at-once")
    assert_complete(output, tmp_path / "at-once")


def test_a_frame_that_fails(tmp_path: Path) -> None:
    voxels = random_voxels((*GRID, 3), seed=1)
    voxels[..., 1] = 7
    write_image(tmp_path / "c/0.nii.gz", voxels)
    manifest, output = write_runs(tmp_path / "c", (3, 2)), tmp_path / "out"
    built = build_runs(manifest, output, max_bad_fraction=0.2)  # 1 of 5, not of 8
    assert (built.summary.num_written, built.summary.num_failed) == (4, 1)
    assert failures_of(output)[0]["frames"] == "1"
    assert verify_dataset(str(output), manifest=str(manifest), deep=ALL).problems == ()
    assert build_runs(manifest, output, max_bad_fraction=0.2).read == {"0.nii.gz"}
    with pytest.raises(TooManyFailures, match="1 of 5 volumes failed"):
        build_runs(manifest, tmp_path / "strict")


def test_an_interrupted_build_continues(runs: Path, reference: Path, tmp_path: Path) -> None:
    build_apart(runs, tmp_path / "out", frames="each", max_frames=MOST, unit_rows=1, kill_at=60)
    built = build_runs(runs, tmp_path / "out")
    assert_complete(tmp_path / "out", reference)
    assert len(built.read) < len(LENGTHS)


def test_a_longer_run_is_refused_by_its_header(tmp_path: Path, run: Callable[..., str]) -> None:
    manifest = write_runs(tmp_path / "c", (2, 5))
    message = "number of frames is 5, more than --max-frames 4 allows; use a larger --max-frames, or leave"
    flags = ["--frames=each", "--max-frames=4"]
    printed = run("check", manifest, *flags, code=1)
    assert message in printed
    assert "would make    2 examples" in printed
    assert message in run("build", manifest, tmp_path / "out", *flags, code=1)
    plain = run("check", manifest, "--frames=each", code=1)
    assert "use --max-frames with the largest number, or build the others into another dataset" in plain
    printed = run("check", manifest, "--frames=each", "--max-frames=5")
    assert "would make    7 examples" in printed
    printed = run("build", manifest, tmp_path / "dry", "--frames=each", "--max-frames=5", "--dry-run")
    assert "volumes  up to 10 of" in printed


def test_another_number_is_another_dataset(runs: Path, reference: Path) -> None:
    with pytest.raises(OutputError, match="--max-frames was 4, now 5"):
        build_runs(runs, reference, max_frames=5)
    assert info_of(reference).manifest["num_frames"] == MOST
    assert "max_frames" not in BuildConfig("m", "o", RecordConfig(frames="each")).as_dataset_config()
    assert make_config("m", "x", {}, like=str(reference)).record.max_frames == MOST
    assert make_config("m", "x", {"without": "frames"}, like=str(reference)).record.max_frames is None
    assert len(Dataset(reference)) == sum(LENGTHS)


def test_a_missing_frame_is_found(runs: Path, tmp_path: Path) -> None:
    build_runs(runs, tmp_path / "out", num_shards=1)
    assert plan_build(BuildConfig(str(runs), str(tmp_path / "x"), RecordConfig(frames="each", max_frames=9)))
    edit_index(tmp_path / "out", lambda table: table.slice(0, table.num_rows - 1))
    problems = " ".join(verify_dataset(str(tmp_path / "out"), manifest=str(runs)).problems)
    assert "1 example is missing: sub-3_frame-0001" in problems or "sub-3_frame-0001" in problems


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_frames": 4}, "--max-frames is for --frames each; add that, or drop it"),
        ({"max_frames": 4, "frames": "all"}, "--max-frames is for --frames each"),
        ({"max_frames": 0, "frames": "each"}, "--max-frames is 0; give 1 to 65536"),
        ({"max_frames": 65537, "frames": "each"}, "--max-frames is 65537; give 1 to 65536"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RecordConfig(**options)


@pytest.mark.parametrize("given", [3, 0, "4", None])
def test_a_received_number_is_checked(runs: Path, tmp_path: Path, given: object) -> None:
    build_runs(runs, tmp_path / "out")
    edit_info(tmp_path / "out", lambda info: info["config"].update(max_frames=given))
    message = "split train has" if given is None else ".*max.frames"  # it must have all frames then
    with pytest.raises(DatasetError, match=f"not a dataset's info: {message}"):
        info_of(tmp_path / "out")
