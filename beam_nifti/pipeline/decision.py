"""Decide what a build does with what its output holds: keep it, continue it, replace it, or refuse."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from beam_nifti.config import BuildConfig, Columns, RecordConfig, Sharding
from beam_nifti.errors import BeamNiftiError, DatasetError, OutputError
from beam_nifti.manifest.manifest import Manifest
from beam_nifti.manifest.reading import read_manifest
from beam_nifti.pipeline.differences import find_differences, image_folder
from beam_nifti.pipeline.inputs import Inputs
from beam_nifti.pipeline.parts import BUILD_FOLDER
from beam_nifti.pipeline.plan import BuildPlan, choose_unit_rows, stored_itemsize
from beam_nifti.pipeline.publish import files_of, find_replaceable, next_revision, refuse_foreign
from beam_nifti.pipeline.resume import UnfinishedBuild, Work
from beam_nifti.pipeline.saved_plan import SavedPlan, SavedWrite
from beam_nifti.pipeline.withdrawal import refuse_withdrawn
from beam_nifti.record.dataset_files import read_failures_list
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.record.shard_index import read_shard_index
from beam_nifti.record.versions import record_versions, version_changes
from beam_nifti.storage import paths as storage
from beam_nifti.support import logs
from beam_nifti.support.outcomes import may_pass

if TYPE_CHECKING:
    import pyarrow as pa

_NO_SOURCES: Final = (
    "%s: the dataset %s. Version 1 records only the total size and the mean time of an example's files, so "
    "swapping two files may go unnoticed; if you swap files, build with --recheck. To record every file, "
    "build once with --overwrite"
)


@dataclass(frozen=True)
class Decision:
    """What a build does with its output.

    Attributes:
        plan: plan of the build.
        published: dataset that the output holds.
        dead: saved plan of an unfinished build in the output.
        write: saved plan of an unfinished conversion or `WriteToTFRecord` in the output.
        is_continued: whether the build continues that one.
    """

    plan: BuildPlan
    published: DatasetInfo | None
    dead: SavedPlan | None
    write: SavedWrite | None
    is_continued: bool

    def to_save(self) -> SavedPlan:
        """What the build saves in its output."""
        plan, layout = self.plan, self.plan.layout
        roots = self.dead.roots if self.dead and self.is_continued else ()
        own_root = plan.parts_root if plan.config.temp_location else BUILD_FOLDER
        return SavedPlan(
            info=plan.describe(),
            layouts=(*(earlier for earlier in plan.earlier if earlier != layout), layout),
            roots=tuple(dict.fromkeys((own_root, *roots))),
            identity=plan.identity,
            from_images=plan.config.makes_all,
            published=files_of(self.published) if self.published else (),
        )


def decide(inputs: Inputs, *, is_dry: bool = False) -> Decision:
    """Decide what a build does, and plan it. `is_dry` is whether it will not run.

    Raises:
        OutputError: the output holds something that the build must not touch, or another build's records
            that would be lost.
        ManifestError: rows are of participants who were withdrawn from the dataset in the output.
    """
    config, manifest = inputs.config, inputs.manifest
    published = find_replaceable(config.output, overwrite=config.overwrite)
    keeps_published = published is not None and not config.overwrite
    if published is not None:
        refuse_withdrawn(manifest, published)
    sharding = inputs.choose_sharding()
    if published and keeps_published:
        sharding = config.sharding or Sharding(**published.config["sharding"])
        record = replace(
            config.record,
            format_version=published.format_version,
            format_features=published.format_features,
        )
        config = replace(config, record=record)
    config = replace(config, sharding=sharding)
    dead = read_saved_plan(config)
    write = SavedWrite.read(config.output)
    if dead is None and not config.overwrite:
        _refuse_foreign(config.output, published, write)
    voxel_bytes = stored_itemsize(config.record.voxel_dtype, inputs.itemsize)
    image_bytes = (inputs.num_frames or 1) * math.prod(inputs.shape) * voxel_bytes
    plan = replace(
        inputs.plan(config),
        digest=manifest.digest(),
        unit_rows=choose_unit_rows(len(manifest), image_bytes, config.workers or 1),
        has_published=published is not None,
        versions=record_versions(),
        revision=next_revision(config.output, published, dead.info.revision if dead else None),
        withdrawn=published.withdrawn if published else (),
        withdrawals=published.withdrawals if published else (),
    )
    if published is None and config.overwrite:
        unfinished = set[str]().union(*(found.written for found in (dead, write) if found))
        refuse_foreign(config.output, unfinished, overwrite=True)
    if published and keeps_published:
        _refuse_other(published, dead, plan, manifest)
        if not config.record.has_sources:
            is_first = published.format_version == 1
            kept = "has format version 1 and keeps it (`beam-nifti convert` makes one of the current format)"
            what = kept if is_first else "was converted from format version 1"
            logs.LOGGER.warning(_NO_SOURCES, config.output, what)
    now = plan.describe()
    if dead and inputs.config.sharding is None:  # nobody has asked for the shards that are planned
        now = replace(now, config={**now.config, "sharding": dead.info.config["sharding"]})
    is_continued = dead and _is_continued(dead, plan, now, manifest, published, is_dry=is_dry)
    continued = dead if is_continued else None
    has_ended = published is not None and continued is not None and continued.is_of(published)
    # A build that was killed once it had published has only to be cleaned up after.
    reuse_published = published is not None and (
        (has_ended or not config.makes_all) and image_folder(published) == storage.dirname(manifest.name)
    )
    plan = replace(
        plan,
        reuse_published=reuse_published,
        earlier=continued.layouts if continued else (),
        earlier_roots=tuple(continued.parts_roots(config.output)) if continued else (),
    )
    return Decision(plan, published, dead, write, continued is not None)


def _refuse_foreign(output: str, published: DatasetInfo | None, write: SavedWrite | None) -> None:
    """An output without an unfinished build must not hold files that this build would replace."""
    if write and published is None:
        raise OutputError(
            f"{output}: holds an unfinished `beam-nifti convert` or WriteToTFRecord; run that again, choose "
            "another OUTPUT, or use --overwrite to discard it"
        )
    if storage.list_folders(storage.join(output, BUILD_FOLDER)):
        raise OutputError(
            f"{output}: holds a folder {BUILD_FOLDER} that is not from an unfinished build; choose another "
            "OUTPUT, or use --overwrite to discard the files of builds in it"
        )
    if published is None:
        refuse_foreign(output)


def _refuse_other(
    published: DatasetInfo, dead: SavedPlan | None, plan: BuildPlan, manifest: Manifest
) -> None:
    """A dataset that was built with other options or rows is refused, saying what differs."""
    output = plan.config.output
    differences = find_differences(
        published,
        plan.describe(),
        manifest,
        _indexes(output, published),
        lambda: _read_failures(output, published),
    )
    if not differences:
        return
    besides = ""
    if dead and not dead.is_of(published):
        unfinished = UnfinishedBuild(output, dead, frozenset(shard.name for shard in published.shards))
        work, lost = unfinished.work(), _lost_to_overwrite(unfinished, plan, manifest)
        if lost.num_records:
            besides = f"; that also discards {lost} of an unfinished build"
        elif work.num_records:
            besides = f", which continues an unfinished build of {work}"
    raise OutputError(
        f"{output}: holds a dataset that was built with different options or rows:\n  "
        + "\n  ".join(differences)
        + f"\nchoose another OUTPUT, or use --overwrite to replace it{besides}"
    )


def _lost_to_overwrite(unfinished: UnfinishedBuild, plan: BuildPlan, manifest: Manifest) -> Work:
    """The finished records of an unfinished build that a plan would discard with --overwrite."""
    dead, config = unfinished.saved, plan.config
    record = replace(
        config.record,
        format_version=RecordConfig.format_version,
        format_features=RecordConfig.format_features,
    )
    plan = replace(plan, config=replace(config, record=record))  # whatever version the dataset has
    is_kept = _makes_same_records(dead.info, plan.describe()) and dead.from_images
    is_kept = is_kept and dead.info.versions == plan.versions
    return unfinished.unusable(plan, manifest) if is_kept else unfinished.work()


def _indexes(output: str, published: DatasetInfo) -> Iterator[tuple[str, pa.Table]]:
    """Splits of a published dataset, with each of their indexes but for those that are damaged."""
    for name, split in published.splits.items():
        for shard in split.shards:
            try:
                yield name, read_shard_index(output, published, shard)
            except DatasetError as e:
                if isinstance(e.__cause__, OSError) and may_pass(e.__cause__):
                    raise


def _read_failures(output: str, published: DatasetInfo) -> Manifest | None:
    """The list of failures of a published dataset, if it has one that can be read."""
    if published.failures is None:
        return None
    columns = Columns(**published.config["columns"])
    try:
        content = read_failures_list(output, published.failures, published.num_failures)
        path = storage.join(output, published.failures)
        return read_manifest(path, columns, content=content, is_list=True)
    except (BeamNiftiError, OSError):  # which only leaves the difference with less detail
        return None


def read_saved_plan(config: BuildConfig) -> SavedPlan | None:
    """The plan of an unfinished build; with --overwrite one that cannot be read is none."""
    try:
        return SavedPlan.read(config.output)
    except OutputError as e:
        if not config.overwrite:
            raise
        logs.LOGGER.warning("%s", e)
        return None


def _is_continued(
    dead: SavedPlan,
    plan: BuildPlan,
    now: DatasetInfo,
    manifest: Manifest,
    published: DatasetInfo | None,
    *,
    is_dry: bool,
) -> bool:
    """Whether a build continues an unfinished one. `now` is what it makes with the options that were given.

    Raises:
        OutputError: finished records would be lost.
    """
    output, overwrite = plan.config.output, plan.config.overwrite
    makes_same = _makes_same_records(dead.info, now)
    is_same = makes_same and (dead.from_images or not plan.config.makes_all)
    if published and dead.is_of(published):
        return is_same  # it has ended, but for cleaning up
    held = frozenset(shard.name for shard in published.shards) if published else frozenset[str]()
    unfinished = UnfinishedBuild(output, dead, held)
    if is_same and dead.info.versions != plan.versions:
        work = unfinished.work()
        if work.num_records:
            changes = version_changes(dead.info.versions, plan.versions)
            logs.LOGGER.warning(
                "%s %s of an unfinished build, built with other versions: %s",
                "would rebuild" if is_dry else "rebuilding",
                work,
                changes,
            )
        return False
    differences = find_differences(dead.info, now, manifest, unfinished.indexes())
    if is_same and not (differences or _moves_rows(dead, plan)):
        return True
    lost = unfinished.unusable(plan, manifest) if is_same else unfinished.work()
    if lost.num_records and (overwrite or (plan.config.recheck and makes_same and not differences)):
        what, are = "discarded" if overwrite else "rebuilt", "is" if lost.num_records == 1 else "are"
        logs.LOGGER.warning("%s of an unfinished build %s %s", lost, "would be" if is_dry else are, what)
    elif lost.num_records:
        lost = _lost_to_overwrite(unfinished, plan, manifest)
        raise OutputError(_loss(output, lost, differences, dead, plan, published))
    return is_same


def _makes_same_records(was: DatasetInfo, now: DatasetInfo) -> bool:
    """Whether two builds make the same record of the same row."""
    one, other = (
        (
            *(info.config["fingerprint"], image_folder(info), info.num_frames),
            *(info.config["columns"].get(name) for name in ("path", "mask", "target")),
        )
        for info in (was, now)
    )
    return one == other


def _moves_rows(dead: SavedPlan, plan: BuildPlan) -> bool:
    """Whether rows that were appended may move others."""
    is_drawn = plan.config.shuffle_seed is not None or plan.config.splitting is not None
    return is_drawn and plan.num_rows != dead.info.manifest["num_rows"]


def _loss(
    output: str,
    lost: Work,
    differences: Sequence[str],
    dead: SavedPlan,
    plan: BuildPlan,
    published: DatasetInfo | None,
) -> str:
    """Why a build is refused that would lose finished records."""
    reasons = list(differences)
    folder, was = image_folder(plan.describe()), image_folder(dead.info)
    if folder != was:
        reasons.append(f"the manifest was in {was}, now in {folder}, and paths are relative to it")
    if not reasons:
        reasons.append("rows were appended, and --shuffle-seed or --split moves other rows")
    # It may replace the dataset beside it, which only --overwrite may do.
    replaces = published is not None and dead.from_images and not dead.is_like(published)
    give = "its options, its rows and --overwrite" if replaces else "its options and rows"
    remedy = "it, and rebuild every record of the dataset" if published else "it"
    return (
        f"{output}: holds an unfinished build with different options or rows:\n  "
        + "\n  ".join(reasons)
        + f"\n{lost} would be lost; to continue that build, use {give}; otherwise choose another OUTPUT, "
        f"or use --overwrite to discard {remedy}"
    )
