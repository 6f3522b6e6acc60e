"""Which existing records a build may reuse; the same rules hold for finished and unfinished datasets.

A record is taken only where a build of an empty output would make the same one.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import pyarrow as pa

from beam_nifti.errors import OutputError, ShardError
from beam_nifti.manifest.manifest import Manifest, VolumeRow
from beam_nifti.pipeline.parts import (
    Part,
    find_parts,
    find_shard,
    finished_rows,
    part_at,
    part_stems,
    parts_folder,
)
from beam_nifti.pipeline.plan import BuildPlan, ShardTask, WorkUnit
from beam_nifti.pipeline.saved_plan import SavedPlan, SavedWrite
from beam_nifti.record.dataset_info import DatasetInfo, ShardInfo
from beam_nifti.record.index import Limits
from beam_nifti.record.shard_index import read_sound_index
from beam_nifti.record.sharding import ShardName
from beam_nifti.storage import paths as storage
from beam_nifti.support.wording import bytes_text, counted


@dataclass(frozen=True, slots=True)
class Found:
    """Records of a work unit that are already there.

    Attributes:
        part: holds them; its `positions` are set.
        is_published: whether it is a shard of a published dataset.
    """

    part: Part
    is_published: bool


def find_finished(
    plan: BuildPlan, unit: WorkUnit, *, check_images: bool = True
) -> tuple[list[Found], list[VolumeRow]]:
    """What earlier builds, or attempts of this one, finished of a unit; and a row for each record to be made.

    With `check_images` only what was made of images that are what they were when they were read.
    """
    missing = [record for row in unit.rows for record in row.records()]
    found = []
    for part, is_published in _candidates(plan, unit):
        if not missing:
            break
        usable = _usable_rows(plan, part, missing, any_versions=is_published, check_images=check_images)
        if usable is not None:
            done = set(usable.positions or ())
            missing = [record for record in missing if record.position not in done]
            found.append(Found(usable, is_published))
    return found, missing


def _usable_rows(
    plan: BuildPlan,
    part: Part,
    rows: list[VolumeRow],
    *,
    any_versions: bool = False,
    check_images: bool = True,
) -> Part | None:
    """`finished_rows` of a plan."""
    return finished_rows(
        part,
        rows,
        plan.config.record,
        plan.extra_columns,
        storage.dirname(plan.config.manifest),
        plan.required_shape,
        plan.required_dtype,
        any_versions=any_versions,
        check_images=check_images,
    )


def _candidates(plan: BuildPlan, unit: WorkUnit) -> Iterator[tuple[Part, bool]]:
    """Files that may hold records of a unit, and whether they are published."""
    task, fingerprint = unit.task, plan.config.record.fingerprint
    for name in task.candidates:
        shard = find_shard(plan.config.output, name, fingerprint)
        if shard is not None:
            yield shard, name == task.published
    positions = range(unit.rows[0].position, unit.rows[-1].positions[-1] + 1)
    for root in plan.parts_roots:
        for index in task.part_indices:
            folder = parts_folder(root, fingerprint, task.name.split, index)
            for part in find_parts(folder, positions):
                yield part, False


@dataclass(frozen=True)
class Work:
    """Some finished records.

    Attributes:
        num_records: how many.
        num_bytes: of them, in their files.
    """

    num_records: int = 0
    num_bytes: int = 0

    def __str__(self) -> str:
        """Such as 1,200 finished examples (293.1 MB)."""
        return f"{counted(self.num_records, 'finished example')} ({bytes_text(self.num_bytes)})"


@dataclass(frozen=True)
class UnfinishedBuild:
    """A build that did not end.

    Attributes:
        output: folder of the dataset.
        saved: its plan, in the output.
        published: shards of the dataset that the output holds besides.
    """

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
        """Those of its finished records that a plan has another row for, or none.

        Records of images that have changed since are not among them: they are to be made again.
        """
        orders = {split: plan.row_order(manifest, split) for split in plan.split_sizes}
        frames = plan.num_frames or 1

        def rows_at(split: str, positions: Iterable[int]) -> Iterator[VolumeRow]:
            order = orders.get(split, ())
            inside = sorted(p for p in positions if p < len(order) * frames)
            images = [int(order[p // frames]) for p in inside]
            for position, row in zip(inside, manifest.rows(images, num_frames=plan.num_frames), strict=True):
                placed = replace(row, position=position - position % frames)
                yield placed.of_frame(position % frames) if plan.num_frames else placed

        def not_usable(split: str, part: Part, positions: Collection[int]) -> Collection[int]:
            rows = list(rows_at(split, positions))
            usable = _usable_rows(plan, part, rows, any_versions=True, check_images=False) if rows else None
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
    with contextlib.suppress(OutputError):  # it is damaged, or somebody else's
        for saved in (SavedPlan.read(output), SavedWrite.read(output)):
            names |= saved.written if saved else set()
    return names.union(shard.index_file for shard in map(ShardName.parse, names) if shard)


@dataclass(frozen=True)
class Reuse:
    """What a build would take from what its output holds.

    Attributes:
        num_published: records taken from the published dataset.
        num_unfinished: records taken from an unfinished build.
        num_rebuilt: records made from their images.
        replaced: shards of the published dataset that are removed once the new one is complete.
        revision: of the published dataset; None where there is none.
        is_checked: whether it was looked whether images have changed.
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
    taken: dict[ShardTask, set[int]] = {}
    for split in plan.split_sizes:
        for item in plan.split_units(manifest, split, shards.keys()):
            if isinstance(item, ShardTask):
                continue
            found, missing = find_finished(plan, item, check_images=is_checked)
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
