"""Parts: written, found again, and merged into shards, whatever died meanwhile."""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beam_nifti.config import BuildConfig, RecordConfig
from beam_nifti.errors import ShardError
from beam_nifti.manifest import VolumeRow
from beam_nifti.pipeline.merge import ShardMerge
from beam_nifti.pipeline.parts import Part, PartWriter, find_parts, find_shard, parts_folder
from beam_nifti.pipeline.plan import BuildPlan
from beam_nifti.pipeline.resume import finished_rows
from beam_nifti.record.dataset_info import ShardInfo
from beam_nifti.record.index import IndexEntry, read_index
from beam_nifti.record.sharding import ShardName
from beam_nifti.record.tfrecord import EncodedRecord
from beam_nifti.storage import paths as storage
from beam_nifti.storage.paths import stat
from beam_nifti.volume.files import Source
from beam_nifti.volume.rescale import Intensity
from tests.build_helpers import Ended, fork_server, sha256, state_of

SHARD = ShardName("train", 0, 1)
RECORD = RecordConfig()
FINGERPRINT = RECORD.fingerprint
COUNT = 8


def record_of(position: int) -> bytes:
    """A record; each is of another length."""
    return gzip.compress(random.Random(position).randbytes(20 + 7 * position), mtime=0)


def encoded(position: int) -> EncodedRecord:
    """The same as two members."""
    record = record_of(position)
    return EncodedRecord((record[:2], record[2:]), (2, len(record) - 2))


def entry_of(folder: Path, position: int) -> IndexEntry:
    """The index entry of an image that exists."""
    image = folder / f"{position}.nii"
    if not image.exists():
        folder.mkdir(parents=True, exist_ok=True)
        image.write_bytes(b"image")
    row = VolumeRow(row=position + 1, example_id=f"sub-{position}", path=image.name, position=position)
    return IndexEntry(
        row=row,
        source=Source(((stat(str(image)),),), (6, 5, 4), (0.0,) * 16),
        shape=(1, 1, 1),
        dtype="int16",
        zooms=(1.0, 1.0, 1.0),
        affine=(0.0,) * 16,
        intensities=(Intensity(0.0, 1.0, 0.5, 0.5),),
    )


def usable(
    part: Part, rows: Sequence[VolumeRow], folder: Path, extra_columns: tuple[str, ...] = ()
) -> Part | None:
    """Which rows a part holds as a build of the images in a folder would make them."""
    config = BuildConfig(str(folder / "manifest.tsv"), "", RECORD)
    plan = BuildPlan(config, COUNT, (), extra_columns, {"train": COUNT}, None, "int16", "int16")
    return finished_rows(plan, part, rows)


class Place:
    """An output and its folder of parts."""

    def __init__(self, folder: Path) -> None:
        self.images, self.output = folder / "images", folder / "out"
        root = self.output / ".build"
        self.parts = Path(parts_folder(str(root), FINGERPRINT, SHARD.split, SHARD.index))

    def write(self, positions: Sequence[int]) -> Part:
        """A complete part of some records."""
        writer = PartWriter(str(self.parts), positions[0], RECORD, ())
        for position in positions:
            writer.write(entry_of(self.images, position), encoded(position))
        return writer.close()

    def merge(self, parts: Sequence[Part], positions: Sequence[int] = range(COUNT)) -> ShardInfo:
        return ShardMerge(str(self.output), SHARD, positions, parts, RECORD, (), str(self.parts)).run()

    def found(self) -> list[Part]:
        """What the next run would merge."""
        shard = find_shard(str(self.output), SHARD, FINGERPRINT)
        rows = [entry_of(self.images, position).row for position in range(COUNT)]
        selected = []
        for part in ([shard] if shard else []) + find_parts(str(self.parts), range(COUNT)):
            held = usable(part, rows, self.images) if rows else None
            if held is not None:
                done = set(held.positions or ())
                rows = [row for row in rows if row.position not in done]
                selected.append(held)
        return selected

    @property
    def shard(self) -> Path:
        return self.output / str(SHARD)

    def check(self, positions: Sequence[int] = range(COUNT)) -> None:
        """The shard holds the records of these positions, in order, as its index says."""
        data = self.shard.read_bytes()
        assert data == b"".join(map(record_of, positions))
        table, facts = read_index(str(self.output / SHARD.index_file))
        assert table["position"].to_pylist() == list(positions)
        for row in table.to_pylist():
            assert data[row["offset"] : row["offset"] + row["length"]] == record_of(row["position"])
        assert facts["fingerprint"] == FINGERPRINT
        assert facts["sha256"] == hashlib.sha256(data).hexdigest()
        assert facts["num_bytes"] == str(len(data))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_part_is_found_only_when_its_index_is_there(place: Place) -> None:
    assert find_parts(str(place.parts), range(COUNT)) == []
    writer = PartWriter(str(place.parts), 0, RECORD, ())
    writer.write(entry_of(place.images, 0), encoded(0))
    assert find_parts(str(place.parts), range(COUNT)) == []
    part = writer.close()
    assert find_parts(str(place.parts), range(COUNT)) == [part]
    assert Path(part.data).read_bytes() == record_of(0)
    Path(part.index).unlink()
    assert find_parts(str(place.parts), range(COUNT)) == []


def test_parts_of_one_shard_never_share_a_name(place: Place) -> None:
    assert place.write([0]) != place.write([0])
    assert len(find_parts(str(place.parts), range(COUNT))) == 2


def test_a_unit_looks_only_at_the_parts_that_may_be_its_own(place: Place) -> None:
    parts = {first: place.write([first, first + 1]) for first in (0, 2, 4, 6)}
    again = place.write([2])
    assert find_parts(str(place.parts), range(0, 2)) == [parts[0]]
    assert set(find_parts(str(place.parts), range(2, 4))) == {parts[2], again}
    assert set(find_parts(str(place.parts), range(3, 5))) == {parts[2], again, parts[4]}
    assert find_parts(str(place.parts), range(7, 8)) == [parts[6]]


@pytest.mark.parametrize("name", ["foo-bar.parquet", "\u00b2-bar.parquet", "1-a.parquet", "notes.parquet"])
def test_files_of_other_programs_among_the_parts_are_ignored(place: Place, name: str) -> None:
    part = place.write([0])
    shutil.copy(part.index, place.parts / name)
    shutil.copy(part.data, (place.parts / name).with_suffix(".part"))
    assert find_parts(str(place.parts), range(COUNT)) == [part]


def test_an_index_that_is_larger_than_its_shard_allows_is_not_read(place: Place) -> None:
    place.merge([place.write(range(COUNT))])
    assert find_shard(str(place.output), SHARD, FINGERPRINT)
    os.truncate(place.output / SHARD.index_file, 1 << 30)
    assert find_shard(str(place.output), SHARD, FINGERPRINT) is None


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=4), min_size=1, max_size=6),
    st.booleans(),
)
def test_any_parts_merge_into_the_same_shard(
    tmp_path_factory: pytest.TempPathFactory, groups: list[list[int]], twice: bool
) -> None:
    place = Place(tmp_path_factory.mktemp("merge"))
    groups = [list(dict.fromkeys(group)) for group in groups]
    positions = sorted({position for group in groups for position in group})
    parts = [place.write(group) for group in groups]
    info = place.merge(parts, positions)
    if twice:  # a retry, after the parts are gone
        assert place.merge(parts, positions) == info
    place.check(positions)
    assert info.sha256 == sha256(place.shard)
    assert (info.num_examples, info.num_bytes) == (len(positions), place.shard.stat().st_size)
    assert find_parts(str(place.parts), range(COUNT)) == []


def test_one_part_that_is_the_shard_is_not_copied(place: Place) -> None:
    part = place.write(range(COUNT))
    inode = Path(part.data).stat().st_ino
    place.merge([part])
    place.check()
    assert place.shard.stat().st_ino == inode


def test_a_part_that_will_be_the_shard_is_hashed_while_it_is_written(place: Place) -> None:
    writer = PartWriter(str(place.parts), 0, RECORD, (), is_shard=True)
    for position in range(COUNT):
        writer.write(entry_of(place.images, position), encoded(position))
    part = writer.close()
    digest = sha256(Path(part.data))
    said = {"sha256": digest, "num_bytes": str(stat(part.data).size)}
    assert said.items() <= read_index(part.index)[1].items()
    place.merge([part])
    place.check()


@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_second_attempt_at_a_merge_at_the_same_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_replaced: bool
) -> None:
    """A runner that took a slow worker for dead: another does the whole merge between two of its steps."""
    steps = ("exists", "stat", "open_read", "create", "write", "link", "delete")
    originals = {step: getattr(storage, step) for step in steps}

    def interrupted(folder: Path, moment: int | None) -> int:
        """Merge, with another attempt before the step of this number; the number of steps."""
        place = Place(folder)
        parts = [place.write([5, 1, 0, 4]), place.write([2, 3, 7, 6])]
        if is_replaced:  # by a shard with more records
            place.merge([place.write([0, 1])], [0, 1])
        count, busy, is_done = 0, False, False

        def hooked(step: str) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                nonlocal count, busy, is_done
                if not busy:
                    assert is_replaced or not is_done or (place.output / SHARD.index_file).exists()
                    if count == moment:
                        busy = True
                        place.merge(parts)
                        busy, is_done = False, True
                    count += 1
                return originals[step](*arguments)

            return call

        with monkeypatch.context() as patch:
            for step in steps:
                patch.setattr(storage, step, hooked(step))
            place.merge(parts)
        place.check()
        assert find_parts(str(place.parts), range(COUNT)) == []
        return count

    total = interrupted(tmp_path / "alone", None)
    assert total > 15
    for moment in range(total):
        interrupted(tmp_path / str(moment), moment)


def test_a_shard_found_by_several_units_is_not_copied(place: Place) -> None:
    place.merge([place.write(range(COUNT))])
    before = place.shard.stat()
    found = find_shard(str(place.output), SHARD, FINGERPRINT)
    assert found is not None
    units = [replace(found, positions=p) for p in ((0, 1, 2), (5, 3, 4), (6, 7))]
    info = place.merge(units)
    place.check()
    assert info.num_examples == COUNT
    assert place.shard.stat().st_ino == before.st_ino
    assert place.shard.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    ("positions", "found"),
    [
        ([0, 1, 2], "positions [3] are missing; run"),
        ([0, 1, 2, 3, 4], "positions [4] are superfluous; run"),
        ([0, 1, 2, 4], "positions [3] are missing and positions [4] are superfluous; run"),
    ],
)
def test_missing_and_surplus_records_are_refused(place: Place, positions: list[int], found: str) -> None:
    parts = [place.write(positions)]
    with pytest.raises(ShardError, match=re.escape(found)):
        place.merge(parts, range(4))
    assert not place.shard.exists()
    assert find_parts(str(place.parts), range(COUNT)) == parts


@pytest.mark.parametrize("compressed", [True, False])
def test_a_shard_without_records_is_a_readable_file(place: Place, compressed: bool) -> None:
    name = replace(SHARD, compressed=compressed)
    info = ShardMerge(str(place.output), name, (), (), RECORD, (), str(place.parts)).run()
    written = (place.output / str(name)).read_bytes()
    assert (gzip.decompress(written) if compressed else written) == b""
    assert bool(written) == compressed  # an empty file is no gzip file
    assert (info.num_examples, info.num_bytes) == (0, len(written))


def test_a_part_that_lost_its_end_is_not_used(place: Place) -> None:
    part = place.write([0, 1, 2])
    rows = [entry_of(place.images, p).row for p in range(3)]
    assert usable(part, rows, place.images) is not None
    os.truncate(part.data, Path(part.data).stat().st_size - 1)
    assert usable(part, rows, place.images) is None
    Path(part.data).unlink()
    assert usable(part, rows, place.images) is None


def test_a_damaged_index_is_as_none(place: Place) -> None:
    part = place.write([0, 1])
    rows = [entry_of(place.images, p).row for p in range(2)]
    Path(part.index).write_bytes(b"PAR1 and then nothing")
    assert usable(part, rows, place.images) is None
    place.merge([place.write(range(COUNT))])
    (place.output / SHARD.index_file).write_bytes(b"")
    assert find_shard(str(place.output), SHARD, FINGERPRINT) is None


def test_a_shard_of_another_fingerprint_is_not_found(place: Place) -> None:
    place.merge([place.write(range(COUNT))])
    assert find_shard(str(place.output), SHARD, "another") is None
    assert find_shard(str(place.output), replace(SHARD, index=1), FINGERPRINT) is None


@pytest.mark.parametrize(
    "change",
    [
        {"row": 9},
        {"example_id": "sub-9"},
        {"path": "9.nii"},
        {"label": 9.0},
        {"participant_id": "9"},
        {"session_id": "9"},
        {"position": 9},
    ],
)
def test_only_the_same_row_is_finished(place: Place, change: dict[str, object]) -> None:
    part = place.write([0, 1])
    rows = [entry_of(place.images, p).row for p in range(2)]
    whole = usable(part, rows, place.images)
    assert whole == replace(part, positions=(0, 1))
    half = usable(part, [rows[0], replace(rows[1], **change)], place.images)
    assert half == replace(part, positions=(0,))


def test_only_an_unchanged_image_is_finished(place: Place) -> None:
    part = place.write([0, 1, 2, 3])
    rows = [entry_of(place.images, p).row for p in range(4)]
    (place.images / "1.nii").write_bytes(b"a longer image")
    os.utime(place.images / "2.nii", (1, 1))
    (place.images / "3.nii").unlink()
    found = usable(part, rows, place.images)
    assert found == replace(part, positions=(0,))


def test_other_further_columns_are_not_finished(place: Place) -> None:
    part = place.write([0])
    row = entry_of(place.images, 0).row
    assert usable(part, [replace(row, extras=("7",))], place.images, ("age",)) is None


def test_a_part_that_is_published_twice_leaves_nothing(place: Place) -> None:
    """As after a death between a shard's appearance and that of its index."""
    part = place.write(range(COUNT))
    index = Path(part.index).read_bytes()
    place.merge([part])
    (place.output / SHARD.index_file).unlink()
    os.link(place.shard, part.data)
    Path(part.index).write_bytes(index)
    place.merge([part])
    place.check()
    assert not list(place.output.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_merge_killed_at_any_moment_loses_nothing(tmp_path: Path, is_replaced: bool) -> None:
    """Two parts; or a shard, and a part that is to go into its middle."""

    def prepare(folder: Path) -> tuple[Place, list[Part]]:
        place = Place(folder)
        if not is_replaced:
            return place, [place.write([5, 1, 0, 4]), place.write([2, 3, 7, 6])]
        held = [p for p in range(COUNT) if p != 3]
        place.merge([place.write(held)], held)
        shard = find_shard(str(place.output), SHARD, FINGERPRINT)
        assert shard is not None
        return place, [replace(shard, positions=tuple(held)), place.write([3])]

    def merge(place: Place, parts: Sequence[Part], kill_at: int | None = None) -> Ended:
        return fork_server().run(
            "merge",
            folder=place.output,
            kill_at=kill_at,
            output=str(place.output),
            parts_folder=str(place.parts),
            parts=[(p.data, p.index, p.positions) for p in parts],
            count=COUNT,
        )

    place, parts = prepare(tmp_path)
    shutil.copytree(place.output, tmp_path / "prepared")
    undisturbed = merge(place, parts)
    place.check()
    assert undisturbed.operations > 8
    states = list[list[tuple[str, bytes]]]()
    for kill_at in range(1, undisturbed.operations + 1):
        shutil.rmtree(place.output)
        shutil.copytree(tmp_path / "prepared", place.output)
        assert merge(place, parts, kill_at).was_killed
        if (state := state_of(place.output)) in states:  # it has only read since
            continue
        states.append(state)
        shutil.copytree(place.output, tmp_path / "left")
        # The next run merges what it finds.
        found = place.found()
        assert sorted(p for part in found for p in part.positions or ()) == list(range(COUNT))
        place.merge(found)
        place.check()
        # A runner merges the same parts again.
        shutil.rmtree(place.output)
        (tmp_path / "left").rename(place.output)
        place.merge(parts)
        place.check()
