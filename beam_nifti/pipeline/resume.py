"""Which existing records a build may reuse; the same rules hold for finished and unfinished datasets.

A record is taken only where a build into an empty output would make the same one.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.config import RecordConfig
from beam_nifti.errors import OutputError, ShardError, VolumeError, is_of_path
from beam_nifti.manifest.manifest import Manifest, VolumeRow
from beam_nifti.pipeline.parts import (
    Part,
    find_parts,
    find_shard,
    is_intact,
    part_at,
    part_stems,
    parts_folder,
)
from beam_nifti.pipeline.plan import BuildPlan, ShardTask, WorkUnit
from beam_nifti.pipeline.saved_plan import SavedPlan, SavedWrite
from beam_nifti.record.dataset_info import DatasetInfo, ShardInfo
from beam_nifti.record.index import (
    Limits,
    file_cells,
    read_index,
    row_cells,
    schema_of,
)
from beam_nifti.record.index_checks import check_members, check_table
from beam_nifti.record.shard_index import read_sound_index
from beam_nifti.record.sharding import ShardName
from beam_nifti.record.versions import is_written_here, versions_in
from beam_nifti.storage import paths as storage
from beam_nifti.support.wording import bytes_text, counted
from beam_nifti.volume.files import frames_of, stat_image
from beam_nifti.volume.header import require_shape

_SHA256: Final = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Found:
    """A part that holds records of a work unit; it may be a shard of a published dataset."""

    part: Part
    is_published: bool


def find_finished(
    plan: BuildPlan, unit: WorkUnit, *, check_images: bool = True, check_data: bool = True
) -> tuple[list[Found], list[VolumeRow], list[int]]:
    """What earlier builds, or attempts of this one, finished of a unit; and a row for each record to be made.

    Last, the positions of frames that images do not have, as far as finished records of them show.

    With `check_images` only what was made of images that are what they were when they were read. With
    `check_data` only what an unfinished build has left as it was written; a dataset is checked by `verify`.
    """
    missing = [record for row in unit.rows for record in row.records()]
    found, lengths = [], dict[int, int]()
    for part, is_published in _candidates(plan, unit):
        if not missing:
            break
        usable = finished_rows(
            plan,
            part,
            missing,
            any_versions=is_published,
            check_images=check_images,
            check_data=check_data and not is_published,
            lengths=lengths,
        )
        if usable is not None:
            done = set(usable.positions or ())
            missing = [record for record in missing if record.position not in done]
            found.append(Found(usable, is_published))
    absent = [
        record.position
        for record in missing
        if record.row in lengths and (record.frame or 0) + record.clip_frames > lengths[record.row]
    ]
    are_absent = set(absent)
    return found, [record for record in missing if record.position not in are_absent], absent


def finished_rows(
    plan: BuildPlan,
    part: Part,
    rows: Sequence[VolumeRow],
    *,
    any_versions: bool = False,
    check_images: bool = True,
    check_data: bool = False,
    lengths: dict[int, int] | None = None,
) -> Part | None:
    """Which of `rows` a part of the same fingerprint holds as a build would make them.

    Args:
        plan: plan of the build.
        part: holds records.
        rows: rows of a shard, at least one, one for each record, in the order of their positions.
        any_versions: whether software of other versions may have made them, as in a published dataset.
        check_images: whether the images must be unchanged since they were read.
        check_data: whether the part must be unchanged since it was written.
        lengths: gets the number of frames of the image of each row of which the part has a record.

    Returns:
        The part with its `positions` set; None if it holds none of them.
    """
    record, extra_columns = plan.config.record, plan.extra_columns
    folder = storage.dirname(plan.config.manifest)
    try:
        limits, schema = Limits.of_data(part.data, part.base), schema_of(record, extra_columns)
        near = range(rows[0].position, rows[-1].position + 1)
        table, facts = read_index(part.index, near, limits=limits, below=part.base)
    except (FileNotFoundError, ShardError):
        return None
    if (table.schema.names, table.schema.types) != (schema.names, schema.types) or table.num_rows == 0:
        return None
    may_lack_masks = plan.config.columns.missing_mask == "empty"
    checks = check_table(table, (), record, may_lack_masks=may_lack_masks), check_members(table)
    if any(itertools.chain(*checks)):
        return None
    if pc.min(table["length"]).as_py() <= 0:
        return None
    ends = pc.add(table["offset"], table["length"])
    if pc.min(table["offset"]).as_py() < 0 or limits.data_bytes < pc.max(ends).as_py():
        return None
    if not _are_sound(facts, limits) or not (any_versions or is_written_here(facts)):
        return None
    now = functools.cache(_file_cells)  # frames of one image follow one another
    of_files = [name for name in table.column_names if name.startswith("source_")]
    compared = dict.fromkeys([*row_cells(rows[0], extra_columns), "shape", "dtype", *of_files])
    by_position = {row.position: row for row in rows}
    positions, shown = [], dict[int, int]()
    ours = table.filter(pc.is_in(table["position"], pa.array(list(by_position), pa.int64())))
    for found in ours.select(list(compared)).to_pylist():
        row = by_position[found["position"]]
        same = all(found.get(k) == v for k, v in row_cells(row, extra_columns).items())
        if not (
            same
            and _fits(tuple(found["shape"]), plan.required_shape)
            and plan.required_dtype in (None, found["dtype"])
        ):
            continue
        if check_images:
            paths = tuple(storage.join(folder, path) for path in row.existing_files)
            files = now(paths, record, row.version_key)
            if files is None or not files.items() <= found.items():
                continue
        positions.append(row.position)
        shown[row.row] = frames_of(found.get("source_shape", ()))
    is_usable = positions and not (check_data and not _is_intact(part, facts))
    if is_usable and lengths is not None and record.max_frames is not None:
        lengths.update(shown)
    return replace(part, positions=tuple(positions)) if is_usable else None


def _is_intact(part: Part, facts: Mapping[str, str]) -> bool:
    try:
        return is_intact(part, facts)
    except FileNotFoundError:
        return False


def _are_sound(facts: Mapping[str, str], limits: Limits) -> bool:
    """Whether the metadata of an index can be kept: what it says of its file, if it does, and of versions."""
    if "sha256" in facts or "fingerprint" in facts:  # the file is a shard, or can be one as it is
        is_hash = _SHA256.fullmatch(facts.get("sha256", ""))
        if not is_hash or facts.get("num_bytes") != str(limits.data_bytes):
            return False
    try:
        versions_in(facts)
    except ShardError:
        return False
    return True


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...] | None) -> bool:
    try:
        require_shape("", shape, wanted)
    except VolumeError:
        return False
    return True


def _file_cells(paths: Sequence[str], record: RecordConfig, version_key: str) -> dict[str, object] | None:
    try:
        with storage.hiding_hosts(bool(version_key)):
            return file_cells(list(map(stat_image, paths)), record, version_key)
    except (OSError, VolumeError):
        return None  # loading it again says what is wrong


def _candidates(plan: BuildPlan, unit: WorkUnit) -> Iterator[tuple[Part, bool]]:
    """Files that may hold records of a unit, and whether they are published."""
    task, fingerprint = unit.task, plan.config.record.fingerprint
    for name in task.candidates:
        is_published = name == task.published
        index_sha256 = task.index_sha256 if is_published else ""
        shard = find_shard(plan.config.output, name, fingerprint, index_sha256)
        if shard is not None:
            yield shard, is_published
    positions = range(unit.rows[0].position, unit.rows[-1].positions[-1] + 1)
    for root in plan.parts_roots:
        for index in task.part_indices:
            folder = parts_folder(root, fingerprint, task.name.split, index)
            for part in find_parts(folder, positions):
                yield part, False


@dataclass(frozen=True)
class Work:
    """Some finished records, and their size in their files."""

    num_records: int = 0
    num_bytes: int = 0

    def __str__(self) -> str:
        """Such as 1,200 finished examples (293.1 MB)."""
        return f"{counted(self.num_records, 'finished example')} ({bytes_text(self.num_bytes)})"


@dataclass(frozen=True)
class UnfinishedBuild:
    """A build that did not end, and the shards of the dataset that its output holds besides."""

    output: str
    saved: SavedPlan
    published: frozenset[str]

    def indexes(self) -> Iterator[tuple[str, pa.Table]]:
        """Splits, with the indexes of its parts and shards but for those that cannot be used."""
        for split, part in self._parts():
            with contextlib.suppress(FileNotFoundError, ShardError):
                limits = Limits.of_data(part.data, part.base)
                yield split, read_sound_index(part.index, self.saved.info, limits, part.base)[0]

    def work(self) -> Work:
        """All of its finished records."""
        return self._work(lambda _split, _part, positions: positions)

    def unusable(self, plan: BuildPlan, manifest: Manifest) -> Work:
        """The finished records for which a plan has another row, or none.

        Records of images that have changed since are not among them: they are to be rebuilt.
        """
        orders = {split: plan.row_order(manifest, split) for split in plan.split_sizes}
        frames, clip = plan.num_frames or 1, plan.config.record.clip_frames

        def rows_at(split: str, positions: Iterable[int]) -> Iterator[VolumeRow]:
            order = orders.get(split, ())
            inside = sorted(p for p in positions if p < len(order) * frames)
            images = [int(order[p // frames]) for p in inside]
            rows = manifest.rows(images, num_frames=plan.num_frames, clip_frames=clip)
            for position, row in zip(inside, rows, strict=True):
                placed = replace(row, position=position - position % frames)
                yield placed.of_frame(position % frames * clip) if plan.num_frames else placed

        def not_usable(split: str, part: Part, positions: Collection[int]) -> Collection[int]:
            rows = list(rows_at(split, positions))
            usable = finished_rows(plan, part, rows, any_versions=True, check_images=False) if rows else None
            return set(positions).difference(usable.positions or () if usable else ())

        return self._work(not_usable)

    def _parts(self) -> Iterator[tuple[str, Part]]:
        """Split, and part or shard."""
        for root in self.saved.parts_roots(self.output):
            top = storage.join(root, self.saved.fingerprint)
            for name in storage.list_folders(top):
                folder = storage.join(top, name)
                for stem in part_stems(folder):
                    yield name.rpartition("-")[0], part_at(storage.join(folder, stem))
        for file in storage.list_files(self.output, "*.tfrecord*"):
            shard = ShardName.parse(file)
            found = shard and file not in self.published
            part = find_shard(self.output, shard, self.saved.fingerprint) if shard and found else None
            if shard and part:
                yield shard.split, part

    def _work(self, select: Callable[[str, Part, Collection[int]], Collection[int]]) -> Work:
        """The records at those positions of each part that are selected, each record once."""
        sizes: dict[tuple[str, int], int] = {}
        for split, part in self._parts():
            try:
                limits, columns = Limits.of_data(part.data, part.base), ("position", "length")
                table, _ = read_sound_index(part.index, self.saved.info, limits, part.base, columns)
            except (FileNotFoundError, ShardError):
                continue
            lengths = dict(zip(table["position"].to_pylist(), table["length"].to_pylist(), strict=True))
            sizes |= {(split, position): lengths[position] for position in select(split, part, lengths)}
        return Work(len(sizes), sum(sizes.values()))


def unfinished_names(output: str) -> set[str]:
    """Shards and indexes that an unfinished build in an output may have written, by its saved plan."""
    names = set[str]()
    try:
        for saved in (SavedPlan.read(output), SavedWrite.read(output)):
            names |= saved.written if saved else set()
    except OutputError:
        pass  # it is damaged, or somebody else's
    except OSError as e:
        if storage.is_remote(output) or not is_of_path(e):
            raise
    return names.union(shard.index_file for shard in map(ShardName.parse, names) if shard)


@dataclass(frozen=True)
class Reuse:
    """What a build would take from what its output holds.

    Attributes:
        num_published: records taken from the published dataset.
        num_unfinished: records taken from an unfinished build.
        num_rebuilt: records made from their images.
        replaced: shards of the published dataset that are removed once the new one is complete.
        revision: revision of the published dataset, if there is one.
        is_checked: whether images were compared with what they were.
    """

    num_published: int
    num_unfinished: int
    num_rebuilt: int
    replaced: tuple[ShardInfo, ...] = ()
    revision: int | None = None
    is_checked: bool = True


def preview_reuse(plan: BuildPlan, manifest: Manifest, published: DatasetInfo | None) -> Reuse:
    """Look at every index that the build would look at, as it would, and at images that are not remote."""
    first_image = storage.join(manifest.folder, next(iter(manifest.paths.values()))[0].as_py())
    is_checked = not storage.is_remote(first_image)
    kept: Counter[bool] = Counter()
    num_rebuilt = 0
    shards = {shard.name: shard for shard in published.shards} if published else {}
    digests = {name: shard.index_sha256 for name, shard in shards.items()}
    taken: dict[ShardTask, set[int]] = {}
    for split in plan.split_sizes:
        for item in plan.split_units(manifest, split, digests):
            if isinstance(item, ShardTask):
                continue
            found, missing, _ = find_finished(plan, item, check_images=is_checked, check_data=False)
            num_rebuilt += len(missing)
            for part in found:
                positions = part.part.positions or ()
                kept[part.is_published] += len(positions)
                if part.is_published:
                    taken.setdefault(item.task, set()).update(positions)
    stay = {str(task.published) for task, positions in taken.items() if _stays(task, positions, shards)}
    # Which shards a recheck replaces is known once their records are made.
    replaced = tuple(s for name, s in shards.items() if name not in stay and not plan.config.recheck)
    revision = published.revision if published else None
    return Reuse(kept[True], kept[False], num_rebuilt, replaced, revision, is_checked)


def _stays(task: ShardTask, taken: Collection[int], shards: Mapping[str, ShardInfo]) -> bool:
    """Whether a shard keeps its file, as all of its records and no others are taken from it."""
    kept = task.published
    return (
        kept is not None
        and kept.is_same_place(task.name)
        and len(taken) == len(task.positions) == shards[str(kept)].num_examples
    )
