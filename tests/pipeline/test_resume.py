"""Builds that fail in part or are killed, and what the next run makes of them."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beam_nifti.errors import OutputError, TooManyFailures
from beam_nifti.record.dataset_info import read_info
from beam_nifti.record.index import read_index
from tests.build_helpers import (
    CUTTING_RUNNER,
    SHAPE,
    UNIT_ROWS,
    assert_complete,
    assert_intact,
    build,
    build_apart,
    contents,
    images_read,
    stray_files,
)
from tests.datasets import failures_of
from tests.images import brain, name_of, write_cohort, write_image, write_manifest

COUNT = 24
KILLS = 20


ALL = frozenset(map(name_of, range(COUNT)))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort that no test changes."""
    return write_cohort(tmp_path_factory.mktemp("cohort"), COUNT, shape=SHAPE)


@pytest.fixture(scope="module")
def reference(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of an undisturbed build."""
    output = tmp_path_factory.mktemp("reference") / "dataset"
    build(manifest, output)
    return output


@pytest.fixture(scope="module")
def operations(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Operations on files of an undisturbed build of one thread: the moments it can be killed at."""
    output = tmp_path_factory.mktemp("undisturbed") / "dataset"
    return build_apart(manifest, output).operations


def finished(output: Path) -> set[str]:
    """The images whose records lie in the complete parts and shards of an output."""
    indexes = output.rglob("*.parquet") if output.exists() else ()
    tables = [read_index(str(path))[0] for path in indexes]
    return {source for table in tables for source in table["source"].to_pylist()}


# Killed


@pytest.mark.parametrize("moment", range(KILLS))
def test_a_killed_build_continues(
    manifest: Path, reference: Path, operations: int, tmp_path: Path, moment: int
) -> None:
    first, last = (1 + m * operations // KILLS for m in (moment, moment + 1))
    kill_at = random.Random(moment).randrange(first, last)
    output = tmp_path / "out"
    killed = build_apart(manifest, output, kill_at)
    assert killed.was_killed
    if (output / "dataset_info.json").exists():
        assert_intact(output)
    done = finished(output)
    resumed = build(manifest, output)
    assert resumed.summary.complete
    assert resumed.read == ALL - done
    # A unit's part is closed when the first image of the next unit has been loaded.
    assert len(killed.read & resumed.read) <= UNIT_ROWS + 1
    assert_complete(output, reference)


@pytest.mark.slow
def test_a_build_killed_again_and_again_ends_well(manifest: Path, reference: Path, tmp_path: Path) -> None:
    output, rng = tmp_path / "out", random.Random(0)
    kills = 0
    for _ in range(8):
        ended = build_apart(
            manifest,
            output,
            kill_at=rng.randrange(20, 60),
            workers=rng.choice([1, 2, 4]),
            unit_rows=rng.choice([1, 2, 5]),
        )
        kills += ended.was_killed
        if not ended.was_killed:
            break
    assert kills > 2
    build_apart(manifest, output)
    assert_complete(output, reference)


def test_a_killed_build_continues_on_a_runner_that_cuts(
    manifest: Path, reference: Path, operations: int, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert build_apart(manifest, output, operations // 3, runner=CUTTING_RUNNER, workers=2).was_killed
    build(manifest, output, runner=CUTTING_RUNNER, workers=4)
    assert_complete(output, reference)


@pytest.mark.parametrize("changes", [{"examples_per_shard": 5}, {"num_shards": 2}])
def test_finished_work_serves_other_shards_of_the_same_records(
    manifest: Path, operations: int, tmp_path: Path, changes: dict[str, int]
) -> None:
    output = tmp_path / "out"
    assert build_apart(manifest, output, operations // 2).was_killed
    built = build(manifest, output, **changes)
    assert built.read < ALL
    build(manifest, tmp_path / "fresh", **changes)
    assert_complete(output, tmp_path / "fresh")


def test_records_of_another_configuration_are_never_mixed_in(
    manifest: Path, operations: int, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for share in (2, 3):  # in the midst of writing parts, and of publishing shards
        assert build_apart(manifest, output, operations * (share - 1) // share).was_killed
        built = build(manifest, output, rescale="none", overwrite=True)
        assert built.read == ALL
        build(manifest, tmp_path / f"fresh-{share}", rescale="none")
        assert_complete(output, tmp_path / f"fresh-{share}")
        shutil.rmtree(output)


def test_records_of_other_labels_are_never_mixed_in(manifest: Path, operations: int, tmp_path: Path) -> None:
    output, copy = tmp_path / "out", tmp_path / "cohort" / "manifest.tsv"
    shutil.copytree(manifest.parent, copy.parent)
    assert build_apart(copy, output, operations * 3 // 4).was_killed
    write_manifest(
        copy,
        [
            {"participant_id": f"sub-{i:04d}", "path": name_of(i), "label": i % 2, "age": 20 + i}
            for i in range(COUNT)
        ],
    )
    with pytest.raises(OutputError, match=r"row \d+ \(sub-\d+\): label was \d+, now [01];"):
        build(copy, output)
    build(copy, output, overwrite=True)
    build(copy, tmp_path / "fresh")
    assert_complete(output, tmp_path / "fresh")


# Failed in part


FAILURES = {
    3: ("LoadVolume", "No such file"),
    6: ("LoadVolume", "truncated"),
    10: ("Rescale", "constant"),
    11: ("Rescale", "NaN"),
    12: ("LoadVolume", "(12, 10, 9), but the first image has (12, 10, 8)"),
    24: ("LoadVolume", "a text file"),
}
"""By row of the manifest: the step that fails, and a word of its message."""

BROKEN = {name_of(row - 1) for row in FAILURES}


def break_images(folder: Path) -> None:
    """Break six images, each in another way."""
    (folder / name_of(2)).unlink()
    whole = (folder / name_of(5)).read_bytes()
    (folder / name_of(5)).write_bytes(whole[: len(whole) // 2])
    write_image(folder / name_of(9), np.full(SHAPE, 7, np.int16))
    bad = brain(SHAPE).astype(np.float32)
    bad[3, 4, 5] = np.nan
    write_image(folder / name_of(10), bad)
    write_image(folder / name_of(11), brain((12, 10, 9)))
    (folder / name_of(23)).write_bytes(b"not an image" * 100)


def break_copy(manifest: Path, folder: Path) -> Path:
    """A copy of the cohort with six broken images."""
    shutil.copytree(manifest.parent, folder)
    break_images(folder)
    return folder / manifest.name


@pytest.fixture
def broken(manifest: Path, tmp_path: Path) -> Path:
    return break_copy(manifest, tmp_path / "cohort")


@dataclasses.dataclass(frozen=True)
class Retry:
    """A build of a broken cohort, which is repaired now.

    Attributes:
        manifest: of the cohort.
        output: where the build failed; no test changes it.
        operations: of the build that finishes it undisturbed.
    """

    manifest: Path
    output: Path
    operations: int


@pytest.fixture(scope="module")
def retry(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Retry:
    folder = tmp_path_factory.mktemp("retry")
    cohort, output = break_copy(manifest, folder / "cohort"), folder / "failed"
    with pytest.raises(TooManyFailures):
        build(cohort, output)
    repair(manifest, cohort)
    shutil.copytree(output, folder / "undisturbed")
    undisturbed = build_apart(cohort, folder / "undisturbed")
    assert undisturbed.read == BROKEN
    return Retry(cohort, output, undisturbed.operations)


def repair(manifest: Path, broken: Path) -> None:
    for name in BROKEN:
        shutil.copyfile(manifest.parent / name, broken.parent / name)


def check_failures(output: Path, broken: Path) -> None:
    """failures.jsonl has a line a broken image, in order, that says which, where and why."""
    lines = failures_of(output)
    assert [line["row"] for line in lines] == sorted(FAILURES)
    for line in lines:
        stage, word = FAILURES[line["row"]]
        number = line["row"] - 1
        assert line["participant_id"] == f"sub-{number:04d}"
        assert line["path"] == str(broken.parent / name_of(number))
        assert (line["stage"], line["error"]) == (stage, "VolumeError")
        assert word in line["message"]
        assert float(line["label"]) == number
        assert line["age"] == str(20 + number)


def test_failed_volumes_fail_the_build_and_lose_nothing(
    manifest: Path, broken: Path, reference: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with pytest.raises(TooManyFailures, match="6 of 24 volumes failed") as raised:
        build(broken, output)
    assert raised.value.summary.num_written == COUNT - 6
    assert not (output / "dataset_info.json").exists()
    check_failures(output, broken)

    with images_read() as again, pytest.raises(TooManyFailures, match="6 of 24"):
        build(broken, output, workers=2)
    assert again - {name_of(0)} == BROKEN  # the first image's header tells the shape

    repair(manifest, broken)
    built = build(broken, output)
    assert built.read == BROKEN
    assert not (output / "failures.jsonl").exists()
    assert_same_but_for_times(output, reference)


def assert_same_but_for_times(output: Path, reference: Path) -> None:
    """As assert_complete, for copies of the same images."""

    def timeless(folder: Path) -> Any:
        return {
            place: (digest, [{**row, "source_mtimes": None} for row in rows])
            for place, (digest, rows) in contents(folder).items()
        }

    assert timeless(output) == timeless(reference)
    assert stray_files(output) == set()
    assert not (output / ".build").exists()


def test_failures_within_the_limit_leave_a_complete_dataset(
    manifest: Path, broken: Path, reference: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with pytest.raises(TooManyFailures):
        build(broken, output, max_bad_fraction=5.9 / COUNT)
    built = build(broken, output, max_bad_fraction=6 / COUNT)
    assert built.read == BROKEN
    assert built.summary.complete
    assert (built.summary.num_written, built.summary.num_failed) == (COUNT - 6, 6)
    check_failures(output, broken)
    assert stray_files(output) == set()
    info = read_info(str(output))
    assert (info.num_examples, info.num_failures) == (COUNT - 6, 6)
    held = [row["source"] for _, rows in contents(output).values() for row in rows]
    assert set(held) == ALL - BROKEN
    assert len(held) == COUNT - 6

    repair(manifest, broken)
    assert build(broken, output).read == BROKEN
    assert_same_but_for_times(output, reference)


def test_a_shard_all_of_whose_volumes_failed_is_written_empty(manifest: Path, tmp_path: Path) -> None:
    shutil.copytree(manifest.parent, tmp_path / "cohort")
    for number in range(7, 14):
        (tmp_path / "cohort" / name_of(number)).unlink()
    output = tmp_path / "out"
    build(tmp_path / "cohort" / manifest.name, output, max_bad_fraction=0.5)
    shards = read_info(str(output)).split("train").shards
    assert [s.num_examples for s in shards] == [7, 0, 7, 3]
    assert_intact(output)


def test_failures_are_the_manifest_of_a_retry(manifest: Path, broken: Path, tmp_path: Path) -> None:
    output, retry = tmp_path / "out", tmp_path / "retry"
    build(broken, output, max_bad_fraction=0.5)
    repair(manifest, broken)
    (broken.parent / name_of(9)).unlink()  # it was constant, now it is missing
    built = build(output / "failures.jsonl", retry, max_bad_fraction=0.5)
    assert built.summary.num_written == 5
    rows = [row for _, rows in contents(retry).values() for row in rows]
    assert [row["example_id"] for row in rows] == [f"sub-{n:04d}" for n in (2, 5, 10, 11, 23)]
    assert [row["label"] for row in rows] == [2, 5, 10, 11, 23]
    (line,) = failures_of(retry)
    assert (line["stage"], line["participant_id"]) == ("LoadVolume", "sub-0009")
    assert "No such file" in line["message"]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.7, 0.8, 0.9, 0.97])
def test_a_retry_that_is_killed_loses_nothing(
    retry: Retry, reference: Path, tmp_path: Path, share: float
) -> None:
    output = shutil.copytree(retry.output, tmp_path / "out")
    assert build_apart(retry.manifest, output, round(share * retry.operations)).was_killed
    resumed = build(retry.manifest, output)
    assert resumed.read <= BROKEN
    assert_same_but_for_times(output, reference)


def test_images_that_cannot_be_read_now_are_no_reason_to_drop_them(
    manifest: Path, reference: Path, tmp_path: Path
) -> None:
    """An image that vanished after it was loaded fails the next run of an unfinished build."""
    shutil.copytree(manifest.parent, tmp_path / "cohort")
    cohort, output = tmp_path / "cohort" / manifest.name, tmp_path / "out"
    (tmp_path / "cohort" / name_of(23)).unlink()
    with pytest.raises(TooManyFailures):
        build(cohort, output)
    (tmp_path / "cohort" / name_of(3)).rename(tmp_path / "away")
    shutil.copyfile(manifest.parent / name_of(23), tmp_path / "cohort" / name_of(23))
    with pytest.raises(TooManyFailures, match="1 of 24"):
        build(cohort, output)
    (tmp_path / "away").rename(tmp_path / "cohort" / name_of(3))
    assert build(cohort, output).read == {name_of(3)}
    assert_same_but_for_times(output, reference)
