"""Plan a build, run it, clean up after it."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from beam_nifti.config import BuildConfig, Columns, RecordConfig, Sharding
from beam_nifti.errors import (
    BeamNiftiError,
    BuildSummary,
    DatasetError,
    ManifestError,
    OutputError,
    UsageError,
    VolumeError,
)
from beam_nifti.manifest.manifest import Manifest, VolumeRow
from beam_nifti.manifest.reading import read_manifest
from beam_nifti.manifest.redaction import redacting
from beam_nifti.pipeline import lock
from beam_nifti.pipeline.differences import find_differences, image_folder
from beam_nifti.pipeline.metrics import Distribution, Metrics
from beam_nifti.pipeline.outputs import refuse_own
from beam_nifti.pipeline.parts import BUILD_FOLDER, parts_root, remove_parts
from beam_nifti.pipeline.plan import (
    BuildPlan,
    CheckPlan,
    choose_unit_rows,
    default_sharding,
    read_build_manifest,
    record_bytes,
    stored_itemsize,
    with_absolute_paths,
)
from beam_nifti.pipeline.publish import (
    ROWS_FILE,
    clean_up,
    files_of,
    find_replaceable,
    forget_summary,
    next_revision,
    refuse_foreign,
    remove_files,
    require_writable_output,
    take_summary,
    too_many_failures,
)
from beam_nifti.pipeline.resume import Reuse, UnfinishedBuild, Work, preview_reuse
from beam_nifti.pipeline.saved_plan import SavedPlan, SavedWrite, require_current
from beam_nifti.record.dataset_files import FILE_NAME, read_failures_list
from beam_nifti.record.dataset_info import DatasetInfo, read_info
from beam_nifti.record.shard_index import read_shard_index
from beam_nifti.record.versions import record_versions, version_changes
from beam_nifti.storage import paths as storage
from beam_nifti.support import logs
from beam_nifti.support.outcomes import may_pass
from beam_nifti.volume.header import RecordLayout, VolumeHeader, record_layout
from beam_nifti.volume.preprocess import prepare_volume
from beam_nifti.volume.user_function import source_sha256
from beam_nifti.volume.volume import load_header, load_volume

if TYPE_CHECKING:
    import pyarrow as pa
    from apache_beam.metrics.metric import MetricResult
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.runner import PipelineResult

_IMAGES_TRIED: Final = 20
"""Images that are tried, in order, for the shape of the dataset."""

_NO_SOURCES: Final = (
    "%s: the dataset %s. Version 1 records only the total size and the mean time of an example's files, so "
    "swapping two files may go unnoticed; if you swap files, build with --recheck. To record every file, "
    "build once with --overwrite"
)


@dataclass(frozen=True)
class Estimate:
    """What a build would write.

    Attributes:
        num_bytes: size of the shards, roughly.
        shape: (X, Y, Z) or (X, Y, Z, C) of the first image's record.
        reuse: what is taken from what the output holds; None if it holds nothing.
    """

    num_bytes: int
    shape: tuple[int, ...]
    reuse: Reuse | None = None


@dataclass(frozen=True)
class _Inputs:
    """What a build reads before it decides anything.

    Attributes:
        config: configuration with absolute paths.
        header: header of the first image.
        layout: how the first image is loaded.
        shape: shape of its record.
    """

    config: BuildConfig
    manifest: Manifest
    header: VolumeHeader
    layout: RecordLayout
    shape: tuple[int, ...]

    @property
    def num_frames(self) -> int | None:
        """`BuildPlan.num_frames`."""
        return self.header.num_frames if self.layout.frame == "each" else None

    @property
    def itemsize(self) -> int:
        """Bytes of a voxel as it is loaded."""
        return self.layout.dtype.itemsize

    def choose_sharding(self) -> Sharding:
        """How the splits are divided into shards, if no dataset is there yet."""
        if self.config.sharding is not None:
            return self.config.sharding
        num_voxels, frames = math.prod(self.shape), self.num_frames or 1
        return default_sharding(num_voxels, self.itemsize, self.config.record, frames)

    def plan(self, config: BuildConfig) -> BuildPlan:
        """The plan of a build into an empty output."""
        manifest = self.manifest
        return BuildPlan(
            config=replace(config, columns=manifest.columns),
            num_rows=len(manifest),
            column_names=tuple(manifest.table.column_names),
            extra_columns=manifest.extra_columns,
            split_sizes=manifest.split_sizes(),
            shape=None if config.allow_mixed_shapes else self.shape,
            source_dtype=self.header.dtype_name,
            loaded_dtype=self.layout.dtype.name,
            key_check=manifest.key_check,
            manifest_name=manifest.name,
            num_skipped=manifest.num_skipped,
            num_unlabelled=manifest.num_unlabelled,
            num_frames=self.num_frames,
        )


def plan_build(config: BuildConfig, rows: bytes | None = None) -> tuple[BuildPlan, Estimate]:
    """Read the manifest and the first header, look at the output, and decide. Writes nothing.

    `rows` are those of a manifest that `config` only names, as a Parquet file; None if it is a file.

    Raises:
        ManifestError: the manifest cannot be built from.
        OutputError: the output holds something that this build must not touch; or nothing can be written
            to it, or to the temporary folder.
        UsageError: the user's function cannot be imported; or the key of anonymous ids is in the output,
            or too short.
        OSError: a folder cannot be written now, but that may pass.
    """
    inputs = _read_inputs(config, rows)
    decision = _decide(inputs, is_dry=True)
    return decision.plan, _estimate(inputs, decision)


def plan_check(config: BuildConfig, rows: bytes | None = None) -> CheckPlan:
    """Read the manifest and the first header as a build does, apart from its output.

    The output of `config` is the report, "" for none.

    Raises:
        ManifestError: the manifest cannot be built from, whatever its images are.
        UsageError: as `plan_build`.
    """
    config, manifest = _read_manifest(with_absolute_paths(config), rows)
    num_skipped = manifest.num_skipped
    plan = CheckPlan(
        config, len(manifest) - num_skipped, num_skipped, None, num_unlabelled=manifest.num_unlabelled
    )
    try:
        inputs = _Inputs(config, manifest, *_first_volume(config, manifest))
    except ManifestError as e:
        return replace(plan, refusal=str(e))
    return replace(plan, build=inputs.plan(replace(config, sharding=inputs.choose_sharding())))


def _read_inputs(config: BuildConfig, rows: bytes | None) -> _Inputs:
    refuse_own(storage.absolute(config.manifest), storage.absolute(config.output))
    config = with_absolute_paths(config)
    _require_output(config)
    config, manifest = _read_manifest(config, rows)
    return _Inputs(config, manifest, *_first_volume(config, manifest))


def _require_output(config: BuildConfig) -> None:
    key = config.anonymous_ids
    if key and storage.is_within(key, config.output):
        raise UsageError(
            f"--anonymous-ids is {key}, inside OUTPUT, where it would be shared with the dataset; move it"
        )
    storage.refuse_read_only(config.output, "OUTPUT")
    if not storage.is_remote(config.output):  # to a store it would write, which is for `open_build`
        require_writable_output(config.output)


def _read_manifest(config: BuildConfig, rows: bytes | None) -> tuple[BuildConfig, Manifest]:
    """The configuration, completed with the labels of the manifest; and the manifest."""
    digests = tuple(source_sha256(step) for step, _ in config.record.steps)
    config = replace(config, record=replace(config.record, preprocess_sha256=digests))
    storage.refuse_read_only(config.temp_location or "", "--temp-location")
    if config.temp_location and not storage.is_remote(config.temp_location):
        storage.require_writable(config.temp_location, "--temp-location", is_folder=True)
    manifest = read_build_manifest(config.manifest, config, rows)
    manifest.log_warnings()
    if manifest.label_columns:
        config = replace(config, record=replace(config.record, labels=manifest.label_columns))
    return config, manifest


@dataclass(frozen=True)
class _Decision:
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


def _decide(inputs: _Inputs, *, is_dry: bool = False) -> _Decision:
    config, manifest = inputs.config, inputs.manifest
    published = find_replaceable(config.output, overwrite=config.overwrite)
    keeps_published = published is not None and not config.overwrite
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
    dead = _read_saved_plan(config)
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
    return _Decision(plan, published, dead, write, continued is not None)


def _estimate(inputs: _Inputs, decision: _Decision) -> Estimate:
    plan = decision.plan
    each = record_bytes(math.prod(inputs.shape), inputs.itemsize, plan.config.record)
    holds_something = decision.published or decision.is_continued
    return Estimate(
        num_bytes=round(plan.num_examples * each),
        shape=inputs.shape,
        reuse=preview_reuse(plan, inputs.manifest, decision.published) if holds_something else None,
    )


def _first_volume(
    config: BuildConfig, manifest: Manifest
) -> tuple[VolumeHeader, RecordLayout, tuple[int, ...]]:
    """The header of the first image that can be read, how it is loaded, and the shape of its record."""
    problems, are_missing = list[str](), False
    for row in manifest.rows(manifest.kept_rows()[:_IMAGES_TRIED].tolist()):
        try:
            with redacting(row, manifest.folder):
                header = load_header(row, manifest.folder, config.record)
                layout = record_layout(row.path, header, config.record)
                return header, layout, layout.stored_shape or _prepared_shape(row, layout, manifest, config)
        except VolumeError as e:
            problems.append(f"row {row.row} ({row.example_id}): {e}")
            are_missing |= isinstance(e.__cause__, FileNotFoundError)
    if are_missing:
        problems.append("relative paths start at the manifest's folder")
    what = "none of the first images can be used with these options"
    raise ManifestError(manifest.path, problems, what)


def _prepared_shape(
    row: VolumeRow, layout: RecordLayout, manifest: Manifest, config: BuildConfig
) -> tuple[int, ...]:
    """The shape of a record that the header does not determine."""
    of_one = replace(config.record, frames="first") if layout.frame == "each" else config.record
    volume = load_volume(row, manifest.folder, record=of_one)
    return prepare_volume(volume, config.record, release=True).voxels.shape


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


def _read_saved_plan(config: BuildConfig) -> SavedPlan | None:
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
            *(info.config["columns"][name] for name in ("path", "mask")),
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


@contextlib.contextmanager
def open_build(
    config: BuildConfig, rows: bytes | None = None, *, is_local: bool = True
) -> Iterator[BuildPlan]:
    """Plan a build and prepare its output, which no other build can write to during the block.

    Workers reach the `rows` of `plan_build` during the block; `is_local` is whether they reach this disk.

    Raises:
        ManifestError: as `plan_build`.
        UsageError: as `plan_build`.
        OutputError: as `plan_build`; or another build is writing there.
    """
    inputs = _read_inputs(config, rows)  # a manifest that cannot be built from leaves no trace of the build
    with lock.hold(inputs.config.output):
        temp_location = inputs.config.temp_location
        if temp_location and storage.is_remote(temp_location):
            storage.require_writable(temp_location, "--temp-location", is_folder=True)
        decision = _decide(inputs)
        del inputs  # hundreds of megabytes of rows, in a large cohort, for as long as the build runs
        _prepare(decision)
        config = decision.plan.config
        folder = None if is_local else decision.plan.parts_root
        with rows_for_workers(config, rows, folder) as config:
            yield replace(decision.plan, config=config)


@contextlib.contextmanager
def rows_for_workers(config: BuildConfig, rows: bytes | None, folder: str | None) -> Iterator[BuildConfig]:
    """The configuration of a build whose workers can read the `rows` of `plan_build` during the block.

    They are in the folder, or in a temporary one of this machine.

    Raises:
        UsageError: they would be in the output, with names that pseudonyms must replace there.
    """
    if rows is None:
        yield config
    elif folder is None:
        with (
            tempfile.TemporaryDirectory(prefix="beam-nifti-") as here,
            rows_for_workers(config, rows, storage.join(here, "rows")) as config,
        ):
            yield config
    else:
        if config.anonymous_ids and config.output and storage.is_within(folder, config.output):
            raise UsageError(
                "a table in memory is written to a file for the workers, and it has the names that "
                "--anonymous-ids keeps out of OUTPUT; give --temp-location, or a manifest that is a file"
            )
        path, below = storage.join(folder, ROWS_FILE), storage.dirname(folder)
        storage.write(path, rows, below)
        try:
            yield replace(config, rows=path)
        finally:
            storage.delete(path, below)
            storage.delete_folder(folder, below)


def _prepare(decision: _Decision) -> None:
    """Remove what this build cannot use of unfinished ones, and save its plan."""
    plan, dead, saved = decision.plan, decision.dead, decision.to_save()
    output, published = plan.config.output, decision.published
    unfinished = [found for found in (dead, decision.write) if found]
    roots = {*plan.parts_roots, parts_root(output, None)}.union(*(u.parts_roots(output) for u in unfinished))
    for root in roots:
        remove_parts(root, keep=saved.fingerprint if decision.is_continued else None)
    has_ended = dead is not None and published is not None and dead.is_of(published)
    if has_ended or not decision.is_continued:
        written = set[str]().union(*(found.written for found in unfinished))
        remove_files(output, written, keep=saved.published)
    if not plan.has_published:  # a damaged one, which --overwrite was given for
        storage.delete(storage.join(output, FILE_NAME), output)
    forget_summary(output)
    saved.write(output)


def run_build(
    plan: BuildPlan, options: PipelineOptions, on_end: Callable[[BuildSummary, Metrics], None] | None = None
) -> tuple[BuildSummary, Metrics]:
    """Run the pipeline and remove what only the build needed.

    `on_end` gets what is returned, also if too many volumes failed.

    Raises:
        TooManyFailures: the dataset is not published; the next run loads only what failed.
        OutputBusyError: another build has taken the output.
    """
    import apache_beam as beam

    from beam_nifti.pipeline.transforms import BuildDataset

    pipeline = beam.Pipeline(options=options)
    pipeline | "BuildDataset" >> BuildDataset(plan)
    result = pipeline.run()
    result.wait_until_finish()
    lock.require_held(plan.config.output)  # or what is removed now may be another build's
    summary, metrics = take_summary(plan.config.output), _metrics(result)
    assert summary is not None
    if on_end:
        on_end(summary, metrics)
    if not summary.complete:
        raise too_many_failures(summary, plan.config)
    output = plan.config.output
    clean_up(output, require_current(output, plan.identity), read_info(output))
    return summary, metrics


def _metrics(result: PipelineResult) -> Metrics:
    """What our steps have counted; runners count more, under names of their own."""
    counters: dict[str, int] = {}
    distributions: dict[str, Distribution] = {}
    found = result.metrics().query()
    for counter in filter(_is_ours, found["counters"]):
        name = counter.key.metric.name
        counters[name] = counters.get(name, 0) + (counter.result or 0)
    for distribution in filter(_is_ours, found["distributions"]):
        name, of_step = distribution.key.metric.name, distribution.result
        if of_step is not None and of_step.count:
            values = Distribution(of_step.count, of_step.sum, of_step.min, of_step.max)
            distributions[name] = values.plus(distributions[name]) if name in distributions else values
    return Metrics(counters, distributions)


def _is_ours(found: MetricResult) -> bool:
    namespace = found.key.metric.namespace
    return namespace is not None and namespace.startswith("beam_nifti.")
