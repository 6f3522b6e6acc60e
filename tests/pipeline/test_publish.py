"""A dataset and its list of failures change together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from beam_nifti.inspection.verify import verify_dataset
from tests.build_helpers import build, build_apart, stray_files
from tests.datasets import info_of
from tests.images import brain, name_of, write_cohort, write_image

COUNT = 4


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Four images, of which the last is missing."""
    manifest = write_cohort(tmp_path / "cohort", COUNT)
    (manifest.parent / name_of(3)).unlink()
    return manifest


def failed(output: Path) -> list[int]:
    """Rows in the list of failures that the dataset names."""
    name = info_of(output).failures
    return [json.loads(line)["row"] for line in (output / name).read_text().splitlines()] if name else []


def test_each_revision_has_a_list_of_failures_of_its_own(manifest: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    build(manifest, output, max_bad_fraction=0.5)
    assert (info_of(output).failures, failed(output)) == ("failures.jsonl", [4])
    build(manifest, output, max_bad_fraction=0.5)
    assert (info_of(output).failures, info_of(output).revision) == ("failures.jsonl", 1)
    (manifest.parent / name_of(1)).write_bytes(b"no image")
    build(manifest, output, max_bad_fraction=0.5)
    assert (info_of(output).failures, failed(output)) == ("failures-r2.jsonl", [2, 4])
    assert stray_files(output) == set()
    for number in (1, 3):
        write_image(manifest.parent / name_of(number), brain(seed=number))
    build(manifest, output, max_bad_fraction=0.5)
    assert info_of(output).failures is None
    assert stray_files(output) == set()


@pytest.mark.slow
def test_a_rebuild_killed_at_any_moment_of_publishing_leaves_a_sound_dataset(
    manifest: Path, tmp_path: Path
) -> None:
    """The list of failures is written before dataset_info.json: between them the old list is still there."""
    output, kept = tmp_path / "out", tmp_path / "kept"
    build(manifest, output, max_bad_fraction=0.5)
    shutil.copytree(output, kept)
    (manifest.parent / name_of(1)).write_bytes(b"no image")
    (manifest.parent / name_of(0)).touch()
    operations = build_apart(manifest, output, max_bad_fraction=0.5).operations
    is_between = False
    for kill_at in range(operations, 0, -2):
        shutil.rmtree(output)
        shutil.copytree(kept, output)
        assert build_apart(manifest, output, kill_at, max_bad_fraction=0.5).was_killed
        assert verify_dataset(str(output)).problems == ()
        is_between = len(list(output.glob("failures*.jsonl"))) == 2 and failed(output) == [4]
        if is_between:
            break
    assert is_between
    assert build(manifest, output, max_bad_fraction=0.5).summary.complete
    assert failed(output) == [2, 4]
    assert stray_files(output) == set()
