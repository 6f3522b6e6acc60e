"""A build on a cluster, as it is seen from outside: by the parts and shards that appear."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.config import Sharding
from beam_nifti.pipeline import follow
from beam_nifti.pipeline.build import open_build, run_build
from beam_nifti.pipeline.follow import BuildProgress, BuildWatcher, follow_build
from beam_nifti.pipeline.parts import part_at, parts_folder
from beam_nifti.pipeline.plan import BuildPlan
from beam_nifti.storage import paths as storage
from beam_nifti.support import logs
from tests.build_helpers import PER_SHARD, UNIT_ROWS, make_config, make_options
from tests.images import write_cohort
from tests.object_store import MemoryFileSystem

COUNT = 20


def seen(plan: BuildPlan) -> tuple[int, int]:
    progress = BuildWatcher(plan).look()
    return progress.num_volumes, progress.num_shards


def leave_part(plan: BuildPlan, shard: int, first: int, name: str = "a") -> None:
    """What `PartWriter` leaves, in its order."""
    folder = parts_folder(plan.parts_root, plan.config.record.fingerprint, "train", shard)
    part = part_at(storage.join(folder, f"{first:010d}-{name}"))
    before = seen(plan)
    storage.write(part.data, b"")
    assert seen(plan) == before, "a part without its index does not count"
    storage.write(part.index, b"")


@pytest.mark.parametrize("place", [None, "{}/tmp", "memory://lab/tmp"])
def test_parts_and_shards_count_as_they_appear(tmp_path: Path, place: str | None) -> None:
    MemoryFileSystem.objects.clear()
    manifest = write_cohort(tmp_path / "cohort", COUNT)
    config = make_config(manifest, tmp_path / "out", temp_location=place and place.format(tmp_path))
    with open_build(config) as plan:
        # Shards of 7, 7 and 6, of units of 2, 2, 3 and 2, 2, 3 and 3, 3.
        object.__setattr__(plan, "unit_rows", UNIT_ROWS)
        assert seen(plan) == (0, 0)
        leave_part(plan, shard=1, first=PER_SHARD)
        assert seen(plan) == (2, 0)
        leave_part(plan, shard=1, first=PER_SHARD, name="another-attempt")
        assert seen(plan) == (2, 0)
        leave_part(plan, shard=1, first=PER_SHARD + 4)
        leave_part(plan, shard=1, first=PER_SHARD + 5)  # a runner has cut the unit in two
        assert seen(plan) == (5, 0)
        leave_part(plan, shard=2, first=0)  # of an earlier build with other shards
        leave_part(plan, shard=2, first=1000)
        assert seen(plan) == (5, 0)
        run_build(plan, make_options())
        assert seen(plan) == (COUNT, 3)


def test_shards_of_a_dataset_that_grows_count_under_their_new_names(tmp_path: Path) -> None:
    for count, num_shards in ((10, 2), (COUNT, 3)):
        manifest = write_cohort(tmp_path / "cohort", count)
        with open_build(make_config(manifest, tmp_path / "out")) as plan:
            watcher = BuildWatcher(plan)
            assert watcher.look().num_volumes == 0
            run_build(plan, make_options())
            end = watcher.look()
            assert (end.num_volumes, end.num_shards) == (count, num_shards)


@given(
    num_rows=st.integers(1, 200), shard=st.integers(1, 60), unit=st.integers(1, 70), frames=st.integers(1, 3)
)
def test_units_cut_each_shard_without_a_gap(num_rows: int, shard: int, unit: int, frames: int) -> None:
    plan = BuildPlan(
        config=make_config("m.tsv", "out", examples_per_shard=shard * frames),
        num_rows=num_rows,
        digest="",
        column_names=(),
        extra_columns=(),
        split_sizes={"train": num_rows},
        shape=None,
        source_dtype="int16",
        loaded_dtype="int16",
        unit_rows=unit,
        num_frames=frames,
    )
    assert plan.sharding == Sharding(shard * frames)
    for positions in plan.shard_ranges("train"):
        units = plan.unit_ranges(positions)
        assert [p for u in units for p in u] == list(positions)
        assert all(0 < len(u) <= unit * frames and len(u) % frames == 0 for u in units)


@given(st.integers(0, 10**7))
def test_looking_stays_within_its_requests(num_names: int) -> None:
    pages = num_names // 1000
    progress = BuildProgress(0, 0, num_requests=2 + pages)
    assert progress.num_requests * 60 / progress.pause <= follow.REQUESTS_PER_MINUTE
    assert progress.pause >= 6


def test_a_log_tells_how_far_a_build_elsewhere_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "REQUESTS_PER_MINUTE", 60_000)
    monkeypatch.setattr("beam_nifti.pipeline.progress._LINE_SECONDS", 0.01)
    manifest = write_cohort(tmp_path / "cohort", COUNT)
    with open_build(make_config(manifest, tmp_path / "out")) as plan:
        object.__setattr__(plan, "unit_rows", UNIT_ROWS)
        leave_part(plan, shard=0, first=0)  # of an earlier run
        with logs.on_stderr("json"), follow_build(plan):
            said: list[dict[str, object]] = []

            def wait_for(done: int) -> dict[str, object]:
                while not said or said[-1]["done"] != done:
                    lines = map(json.loads, capsys.readouterr().err.splitlines())
                    said.extend(line for line in lines if "done" in line)
                return said[-1]

            assert wait_for(2)["per_second"] == 0
            leave_part(plan, shard=1, first=PER_SHARD)
            assert wait_for(4)["total"] == COUNT
            run_build(plan, make_options())
            last = wait_for(COUNT)
        assert (last["shards"], last["seconds_left"]) == (3, 0)
