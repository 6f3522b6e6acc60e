"""A build into an output that already holds something."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from beam_nifti.config import BuildConfig
from beam_nifti.errors import OutputError, TooManyFailures
from beam_nifti.inspection.verify import ALL, verify_dataset
from beam_nifti.pipeline.build import open_build, plan_build, run_build
from beam_nifti.record.dataset_info import read_info
from tests.build_helpers import (
    SHAPE,
    UNIT_ROWS,
    assert_complete,
    assert_intact,
    build,
    build_apart,
    contents,
    make_config,
    make_options,
    snapshot,
    stray_files,
)
from tests.datasets import edit_info, manifest_of
from tests.images import brain, name_of, write_cohort, write_image, write_manifest

COUNT = 24
LONGER = 31


def names(*numbers: int) -> set[str]:
    return {name_of(n) for n in numbers}


def rows_of(count: int, **changes: Any) -> list[dict[str, Any]]:
    return [
        {"participant_id": f"sub-{i:04d}", "path": name_of(i), "label": i, "age": 20 + i} | changes
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images of the longer manifest and both manifests, which no test changes."""
    folder = write_cohort(tmp_path_factory.mktemp("cohort"), LONGER, shape=SHAPE).parent
    write_manifest(folder / "short.tsv", rows_of(COUNT))
    return folder


@pytest.fixture(scope="module")
def built(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of the shorter manifest, which no test changes."""
    output = tmp_path_factory.mktemp("built") / "dataset"
    build(images / "short.tsv", output)
    return output


@pytest.fixture(scope="module")
def longer(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of the longer manifest, built afresh; no test changes it."""
    output = tmp_path_factory.mktemp("longer") / "dataset"
    build(images / "manifest.tsv", output)
    return output


@pytest.fixture
def manifest(images: Path) -> Path:
    return images / "short.tsv"


@pytest.fixture
def output(built: Path, tmp_path: Path) -> Path:
    """A copy of the shorter dataset, to be built into."""
    return Path(shutil.copytree(built, tmp_path / "dataset"))


@pytest.fixture
def own(images: Path, manifest: Path, tmp_path: Path) -> Path:
    """A manifest of images that the test may change."""
    shutil.copytree(images, tmp_path / "own")
    return tmp_path / "own" / manifest.name


def identities(output: Path) -> dict[int, tuple[int, int]]:
    """By number of the shard: inode and time of its file."""
    shards = read_info(str(output)).split("train").shards
    status = [(output / shard.name).stat() for shard in shards]
    return {i: (s.st_ino, s.st_mtime_ns) for i, s in enumerate(status)}


# Nothing, or little, has changed


def test_unchanged_inputs_change_nothing(manifest: Path, output: Path, built: Path) -> None:
    before, held = identities(output), snapshot(output)
    again = build(manifest, output, workers=2, unit_rows=5)
    assert again.read == set()
    assert again.summary.complete
    assert identities(output) == before
    assert {k: v for k, v in snapshot(output).items() if k != "dataset_info.json"} == {
        k: v for k, v in held.items() if k != "dataset_info.json"
    }
    assert_complete(output, built)


def test_a_manifest_of_another_format_is_the_same_manifest(images: Path, output: Path, built: Path) -> None:
    manifest = write_manifest(images / "short.csv", rows_of(COUNT))
    assert build(manifest, output).read == set()
    assert_complete(output, built)


def test_only_a_changed_image_is_loaded_again(own: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    build(own, output)
    before = identities(output)
    write_image(own.parent / name_of(9), brain(SHAPE, seed=99))
    again = build(own, output)
    assert again.read == names(9)
    after = identities(output)
    assert [i for i in after if after[i] != before[i]] == [1]
    build(own, tmp_path / "fresh")
    assert_complete(output, tmp_path / "fresh")
    # Changed back and forth, as often as one likes.
    for seed in (100, 101):
        write_image(own.parent / name_of(9), brain(SHAPE, seed=seed))
        assert build(own, output).read == names(9)
    build(own, tmp_path / "fresher")
    assert_complete(output, tmp_path / "fresher")


def test_a_touched_image_is_loaded_again(own: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    build(own, output)
    os.utime(own.parent / name_of(3), (1, 1))
    assert build(own, output).read == names(3)


@pytest.mark.parametrize("is_complete", [True, False])
def test_the_same_paths_in_another_folder_are_other_images(
    own: Path, tmp_path: Path, is_complete: bool
) -> None:
    """Two sites of a study with one manifest, and an image of the same size and time in both."""
    output, other = tmp_path / "out", Path(shutil.copytree(own.parent, tmp_path / "other"))
    image = other / name_of(3)
    before = image.stat()
    changed = bytearray(image.read_bytes())
    changed[4] ^= 1  # in the gzip header's time, so that the voxels stay right
    image.write_bytes(changed)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert build_apart(own, output, kill_at=None if is_complete else 60).was_killed != is_complete
    if not is_complete:
        with pytest.raises(OutputError, match=r"the manifest was in \S*/own, now in \S*/other"):
            build(other / own.name, output)
        shutil.rmtree(output)
    assert build(other / own.name, output).read == names(*range(COUNT))
    build(other / own.name, tmp_path / "fresh")
    assert_complete(output, tmp_path / "fresh")


def test_a_rebuild_that_fails_leaves_the_dataset_as_it_was(own: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    build(own, output)
    before = snapshot(output)
    write_image(own.parent / name_of(5), brain(SHAPE, seed=99))
    (own.parent / name_of(9)).write_bytes(b"no image")
    with pytest.raises(TooManyFailures, match="1 of 24"):
        build(own, output)
    now = snapshot(output)
    assert {name: now[name] for name in before} == before
    write_image(own.parent / name_of(9), brain(SHAPE, seed=9))
    assert build(own, output).read == names(9)
    build(own, tmp_path / "fresh")
    assert_complete(output, tmp_path / "fresh")


# Rows were appended


def test_appended_rows_are_added(images: Path, output: Path, longer: Path) -> None:
    before = identities(output)
    again = build(images / "manifest.tsv", output)
    assert again.read == names(*range(COUNT, LONGER))
    after = identities(output)
    assert {i for i in after if after[i] == before.get(i)} == {0, 1, 2}  # the fourth held 3 of 7
    assert_complete(output, longer)


def test_rows_appended_to_an_unfinished_build_are_added(
    images: Path, manifest: Path, longer: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    operations = build_apart(manifest, tmp_path / "undisturbed").operations
    for share in (0.4, 0.9):
        killed = build_apart(manifest, output, round(share * operations))
        assert killed.was_killed
        again = build(images / "manifest.tsv", output)
        assert names(*range(COUNT, LONGER)) <= again.read
        assert len(again.read & killed.read) <= UNIT_ROWS + 1
        assert_complete(output, longer)
        shutil.rmtree(output)


def test_appended_rows_of_a_shuffled_dataset(images: Path, manifest: Path, tmp_path: Path) -> None:
    """A row's place among the shuffled moves; the records are made anew, and are right."""
    output = tmp_path / "out"
    build(manifest, output, shuffle_seed=3)
    build(images / "manifest.tsv", output, shuffle_seed=3)
    build(images / "manifest.tsv", tmp_path / "fresh", shuffle_seed=3)
    assert_complete(output, tmp_path / "fresh")


def test_appended_rows_of_one_split_leave_the_others(images: Path, tmp_path: Path) -> None:
    rows = [row | {"split": ("train", "test")[i % 2]} for i, row in enumerate(rows_of(20))]
    more = [row | {"split": "val"} for row in rows_of(LONGER)[20:]]
    output = tmp_path / "out"
    build(write_manifest(images / "splits.tsv", rows), output)
    before = identities(output)
    again = build(write_manifest(images / "splits.tsv", rows + more), output)
    assert again.read == names(*range(20, LONGER))
    assert identities(output) == before
    build(images / "splits.tsv", tmp_path / "fresh")
    assert_complete(output, tmp_path / "fresh")


def test_a_dataset_of_before_there_was_a_choice_is_the_same(manifest: Path, tmp_path: Path) -> None:
    output = tmp_path / "old"
    build(manifest, output)

    def forget(info: dict[str, Any]) -> None:
        for name in ("clip", "rescale_within", "frames"):
            del info["config"][name]

    edit_info(output, forget)
    assert build(manifest, output).read == frozenset()


def test_what_became_0_and_1_is_kept_beside_a_shard_without_records(tmp_path: Path) -> None:
    manifest, output = write_cohort(tmp_path / "images", 6), tmp_path / "out"
    for i in (3, 4, 5):
        write_image(tmp_path / f"images/sub-{i:04d}.nii.gz", brain() * 0)
    options: dict[str, Any] = {"rescale": "percentile:1,99", "examples_per_shard": 3, "max_bad_fraction": 0.5}
    build(manifest, output, unit_rows=2, **options)
    assert verify_dataset(str(output), manifest=manifest_of(output), deep=ALL).problems == ()
    for i in (3, 4, 5):
        write_image(tmp_path / f"images/sub-{i:04d}.nii.gz", brain(seed=i))
    assert build(manifest, output, unit_rows=2, **options).read == names(3, 4, 5)
    assert verify_dataset(str(output), manifest=manifest_of(output), deep=ALL).problems == ()


# Something else was asked for


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rescale": "none"}, "--rescale was minmax, now none"),
        ({"rescale_within": "nonzero"}, "--rescale-within was not given, now nonzero"),
        ({"rescale": "window:0,9", "clip": True}, "--clip was not given, now given"),
        ({"voxel_dtype": "native"}, "--voxel-dtype was float32, now native"),
        ({"compression": "none"}, "--compression was gzip, now none"),
        ({"compression_level": 1}, "--compression-level was 2, now 1"),
        ({"shuffle_seed": 1}, "--shuffle-seed was not given, now 1"),
        ({"examples_per_shard": 5}, "--examples-per-shard was 7, now 5"),
        ({"num_shards": 2}, r":\n  --num-shards was not given, now 2\nchoose"),
        ({"allow_mixed_shapes": True}, "--allow-mixed-shapes was not given, now given"),
        ({"columns": {"label": "age"}}, "--label-column was label, now age"),
    ],
)
def test_another_configuration_is_refused(
    manifest: Path, output: Path, changes: dict[str, Any], message: str
) -> None:
    before = snapshot(output)
    with pytest.raises(OutputError, match=message) as raised:
        build(manifest, output, **changes)
    assert "--overwrite" in str(raised.value)
    assert snapshot(output) == before


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (rows_of(COUNT - 1), r"row 24 \(sub-0023\) was dropped"),
        (
            [*rows_of(3), *rows_of(COUNT, label=5)[3:]],
            r"row 4 \(sub-0003\): label was 3, now 5; 19 more rows changed",
        ),
        ([*rows_of(2), *rows_of(LONGER)[3:]], r"row 3 \(sub-0002\) was dropped"),
        ([{**row, "site": "A"} for row in rows_of(COUNT)], "columns were .*now .*site"),
        (
            [{**row, "age": 1} for row in rows_of(COUNT)],
            r"row 1 \(sub-0000\): age was '20', now '1'; 23 more rows",
        ),
    ],
)
def test_other_rows_are_refused(images: Path, output: Path, rows: list[dict[str, Any]], message: str) -> None:
    before = snapshot(output)
    with pytest.raises(OutputError, match=message):
        build(write_manifest(images / "other.tsv", rows), output)
    assert snapshot(output) == before


@pytest.mark.parametrize("changes", [{"rescale": "none"}, {"num_shards": 2}, {"compression": "none"}, {}])
def test_overwrite_replaces(manifest: Path, output: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    again = build(manifest, output, overwrite=True, **changes)
    assert again.read == names(*range(COUNT))
    build(manifest, tmp_path / "fresh", **changes)
    assert_complete(output, tmp_path / "fresh")


def test_a_dataset_that_was_replaced_can_be_appended_to(
    images: Path, output: Path, manifest: Path, longer: Path
) -> None:
    build(manifest, output, overwrite=True, rescale="none")
    build(manifest, output, overwrite=True)
    assert build(images / "manifest.tsv", output).read == names(*range(COUNT, LONGER))
    assert_complete(output, longer)


# Until the end, the old dataset is there

CHANGES = {"append": {}, "overwrite": {"overwrite": True, "rescale": "none"}}


@pytest.fixture(scope="module", params=CHANGES)
def undisturbed(
    request: pytest.FixtureRequest, images: Path, built: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, int]:
    """A change, the dataset after it, and how many operations on files it took."""
    output = shutil.copytree(built, tmp_path_factory.mktemp("undisturbed") / "dataset")
    ended = build_apart(images / "manifest.tsv", output, **CHANGES[request.param])
    return request.param, output, ended.operations


@pytest.mark.parametrize("share", [0.1, 0.45, 0.7, 0.85, 0.93, 0.98])
def test_the_old_dataset_is_intact_until_the_new_one_is_complete(
    images: Path, output: Path, built: Path, undisturbed: tuple[str, Path, int], share: float
) -> None:
    change, whole, operations = undisturbed
    changes, manifest = CHANGES[change], images / "manifest.tsv"
    old, new = contents(built), contents(whole)
    assert build_apart(manifest, output, round(share * operations), **changes).was_killed
    assert contents(output) in (old, new)
    build_apart(manifest, output, **changes)
    assert_complete(output, whole)


def test_the_old_dataset_can_be_read_while_its_rebuild_is_planned_and_dropped(
    manifest: Path, images: Path, output: Path, built: Path
) -> None:
    """Once the records that only the rebuild has are given up, which takes more than another command."""
    whole = shutil.copytree(output, output.parent / "whole")
    operations = build_apart(images / "manifest.tsv", whole).operations
    assert build_apart(images / "manifest.tsv", output, operations // 2).was_killed
    assert_intact(output)
    with pytest.raises(
        OutputError,
        match=r"rows 25, .* were dropped\n.* would be lost; .*use --overwrite to discard it, and rebuild",
    ):
        build(manifest, output)
    shutil.rmtree(output / ".build")
    assert build(manifest, output).read == set()
    assert_complete(output, built)


# Others


def test_a_second_build_is_refused_and_the_first_unharmed(
    manifest: Path, built: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with open_build(make_config(manifest, output)) as plan:
        second = build_apart(manifest, output)
        assert second.result["error"] == "OutputBusyError"
        assert "another command is writing here" in second.result["message"]
        assert build_apart(manifest, output, overwrite=True).result["error"] == "OutputBusyError"
        plan = dataclasses.replace(plan, unit_rows=UNIT_ROWS)
        run_build(plan, make_options())
    assert_complete(output, built)


@pytest.mark.parametrize("has_ended", [True, False])
@pytest.mark.parametrize("is_rebuild", [True, False])
def test_a_job_that_outlives_its_launcher_does_not_write_into_the_next_build(
    images: Path, manifest: Path, longer: Path, output: Path, has_ended: bool, is_rebuild: bool
) -> None:
    if not is_rebuild:
        shutil.rmtree(output)
    with open_build(make_config(manifest, output, shuffle_seed=1, overwrite=True)) as orphan:
        pass  # the launcher is gone, and the lock with it; its job on the cluster is not
    with open_build(make_config(images / "manifest.tsv", output)) as plan:
        if has_ended:
            run_build(plan, make_options())
        with pytest.raises(OutputError, match=r"(the build here has ended|another build has started here)"):
            run_build(orphan, make_options())
        if not has_ended:
            run_build(plan, make_options())
    assert contents(output) == contents(longer)


def test_a_job_that_outlives_its_launcher_may_share_the_work_with_it(
    manifest: Path, built: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with open_build(make_config(manifest, output)) as orphan:
        pass
    with open_build(make_config(manifest, output)) as plan:
        run_build(dataclasses.replace(orphan, unit_rows=UNIT_ROWS), make_options())
    assert plan.identity == orphan.identity
    assert_complete(output, built)


def test_a_build_that_was_killed_holds_no_lock(
    manifest: Path, output: Path, built: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    assert build_apart(manifest, new, 20).was_killed
    assert (new / ".lock").exists()
    build(manifest, new)
    assert_complete(new, built)


def test_a_lock_file_alone_is_no_build(manifest: Path, built: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()
    build(manifest, tmp_path / "out")
    assert_complete(tmp_path / "out", built)


@pytest.mark.parametrize("name", ["train-00000-of-00004.tfrecord.gz", "val-00001-of-00009-r3.tfrecord"])
def test_files_of_others_are_not_touched(manifest: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / name).write_bytes(b"somebody's")
    with pytest.raises(OutputError, match=name):
        build(manifest, output)
    assert snapshot(output) == {name: b"somebody's"}


def test_files_of_other_names_stay(manifest: Path, tmp_path: Path) -> None:
    """Also through an overwrite and the leavings of a killed build."""
    output = tmp_path / "out"
    (output / "index").mkdir(parents=True)
    kept = {"README.md", "index/notes.parquet", "mnist.tfrecord", "work.tmp"}
    for name in kept:
        (output / name).write_bytes(b"mine")
    build_apart(manifest, output, 120)
    build(manifest, output)
    build(manifest, output, overwrite=True, rescale="none")
    assert stray_files(output) == kept
    assert {(output / name).read_bytes() for name in kept} == {b"mine"}


def test_parts_may_lie_elsewhere(manifest: Path, built: Path, tmp_path: Path) -> None:
    output, scratch = tmp_path / "out", tmp_path / "scratch"
    operations = build_apart(manifest, tmp_path / "undisturbed").operations
    killed = build_apart(manifest, output, operations // 4, temp_location=str(scratch))
    assert killed.was_killed
    assert list(scratch.rglob("*.part"))
    again = build(manifest, output, temp_location=str(scratch))
    assert len(again.read & killed.read) <= UNIT_ROWS + 1
    assert_complete(output, built)
    assert [p for p in scratch.rglob("*") if p.is_file()] == []


def test_planning_writes_nothing(manifest: Path, output: Path, tmp_path: Path) -> None:
    before = snapshot(output)
    plan_build(make_config(manifest, output))
    plan_build(BuildConfig(str(manifest), str(tmp_path / "none")))
    assert snapshot(output) == before
    assert not (tmp_path / "none").exists()
