"""Plan a build, run it, clean up after it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from beam_nifti import lock, logs, storage
from beam_nifti.config import BuildConfig, Columns, LabelColumn, RecordConfig, Sharding
from beam_nifti.dataset_info import FILE_NAME, DatasetInfo, read_info
from beam_nifti.errors import (
    DatasetError,
    ManifestError,
    OutputError,
    ShardError,
    UsageError,
    VolumeError,
)
from beam_nifti.header import RecordLayout, VolumeHeader, record_layout
from beam_nifti.index import read_index
from beam_nifti.labels import name_classes
from beam_nifti.local_runner import whole_elements
from beam_nifti.manifest import Manifest
from beam_nifti.metrics import Distribution, Metrics
from beam_nifti.parts import BUILD_FOLDER
from beam_nifti.plan import (
    BuildNote,
    BuildPlan,
    choose_unit_rows,
    default_sharding,
    parts_root,
    read_build_manifest,
    record_bytes,
    stored_itemsize,
)
from beam_nifti.prepare import prepare_volume
from beam_nifti.publish import (
    BuildSummary,
    TooManyFailures,
    find_info,
    remove_shards,
    require_writable_output,
    take_summary,
)
from beam_nifti.sharding import ShardName
from beam_nifti.user_function import source_sha256
from beam_nifti.volume import load_header, load_volume

if TYPE_CHECKING:
    from apache_beam.metrics.metric import MetricResult
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.runner import PipelineResult

_IMAGES_TRIED: Final = 20
"""Images that are tried, in order, for the shape of the dataset."""

_VERSION_1: Final = (
    "%s: has format version 1, which is kept: it has the sum of the sizes and the mean of the times of an "
    "example's files, so an exchange of two files may not be noticed. Use --recheck after one; --overwrite, "
    "once, makes a dataset of the present version"
)

_SHOWN_CLASSES: Final = 20
"""Named where the classes of a label are not those of the dataset."""


@dataclass(frozen=True)
class Estimate:
    """What a build would write.

    Attributes:
        num_volumes: records, if no volume fails.
        num_shards: of all splits.
        num_bytes: of the shards, roughly.
        examples_per_shard: volumes of the largest shard.
        shape: (X, Y, Z) or (X, Y, Z, C) of the first image's record.
        splits: volumes of each split.
    """

    num_volumes: int
    num_shards: int
    num_bytes: int
    examples_per_shard: int
    shape: tuple[int, ...]
    splits: Mapping[str, int]


@dataclass(frozen=True)
class _Inputs:
    """What a build reads before it decides anything.

    Attributes:
        config: with absolute paths.
        manifest: checked.
        header: of the first image.
        layout: of it as it is loaded.
        shape: of its record.
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


def plan_build(config: BuildConfig) -> tuple[BuildPlan, Estimate]:
    """Read the manifest and the first header, look at the output, and decide. Writes nothing.

    Raises:
        ManifestError: the manifest cannot be built from.
        OutputError: the output holds something that this build must not touch; or nothing can be written
            to it, or to the temporary folder.
        UsageError: the user's function cannot be imported; or the key of anonymous ids is in the output,
            or too short.
        OSError: a folder cannot be written now, but that may pass.
    """
    plan, _, estimate = _plan(_read_inputs(config))
    return plan, estimate


def _read_inputs(config: BuildConfig) -> _Inputs:
    config = replace(
        config,
        manifest=storage.absolute(config.manifest),
        output=storage.absolute(config.output),
        temp_location=config.temp_location and storage.absolute(config.temp_location),
        anonymous_ids=config.anonymous_ids and storage.absolute(config.anonymous_ids),
    )
    if config.record.preprocess is not None:
        digest = source_sha256(config.record.preprocess)
        config = replace(config, record=replace(config.record, preprocess_sha256=digest))
    key = config.anonymous_ids
    if key and key.startswith(f"{config.output}/"):
        raise UsageError(
            f"--anonymous-ids is {key}, which would be given away with the dataset; keep it out of OUTPUT"
        )
    # To a store they would write, which is for `open_build`.
    if not storage.is_remote(config.output):
        require_writable_output(config.output)
    if config.temp_location and not storage.is_remote(config.temp_location):
        storage.require_writable(config.temp_location, "--temp-location", is_folder=True)
    manifest = read_build_manifest(config.manifest, config)
    manifest.log_warnings()
    if manifest.label_columns:
        config = replace(config, record=replace(config.record, labels=manifest.label_columns))
    return _Inputs(config, manifest, *_first_volume(config, manifest))


def _plan(inputs: _Inputs) -> tuple[BuildPlan, BuildNote, Estimate]:
    config, manifest, layout = inputs.config, inputs.manifest, inputs.layout
    folder = storage.dirname(config.manifest)
    published = _published(config)
    # Interpolated voxels, and a function's, pack like those of a float32 image.
    made_anew = config.record.spacing is not None or config.record.preprocess is not None
    itemsize, num_voxels = 4 if made_anew else layout.dtype.itemsize, math.prod(inputs.shape)
    frames = inputs.num_frames or 1
    image_bytes = frames * num_voxels * stored_itemsize(config.record.voxel_dtype, itemsize)
    sharding = config.sharding
    if sharding is None and published and not config.overwrite:
        sharding = Sharding(**published.config["sharding"])
    if sharding is None:
        sharding = default_sharding(num_voxels, itemsize, config.record, frames)
    config = replace(config, sharding=sharding, columns=manifest.columns)
    if published and not config.overwrite:
        config = replace(config, record=replace(config.record, format_version=published.format_version))
    if published is None:
        _refuse_foreign(config)
    elif not config.overwrite:
        _refuse_other(published, inputs, config)
        if published.format_version == 1:
            logs.LOGGER.warning(_VERSION_1, config.output)
    dead = BuildNote.read(config.output)
    earlier = dead if dead and dead.is_of(config.record.fingerprint, folder, config.recheck) else None
    plan = BuildPlan(
        config=config,
        num_rows=len(manifest),
        digest=manifest.digest(),
        column_names=tuple(manifest.table.column_names),
        extra_columns=manifest.extra_columns,
        split_sizes=manifest.split_sizes(),
        shape=None if config.allow_mixed_shapes else inputs.shape,
        source_dtype=inputs.header.dtype_name,
        loaded_dtype=layout.dtype.name,
        unit_rows=choose_unit_rows(len(manifest), image_bytes, config.workers),
        has_published=published is not None,
        reuse_published=not (config.overwrite or config.recheck) and _images_folder(published) == folder,
        earlier_totals=earlier.totals if earlier else {},
        revision=published.revision + 1 if published else 1,
        key_check=manifest.key_check,
        num_skipped=manifest.num_skipped,
        num_frames=inputs.num_frames,
    )
    each = record_bytes(num_voxels, itemsize, config.record)
    ranges = [r for split in plan.split_sizes for r in plan.shard_ranges(split)]
    note = BuildNote(
        fingerprint=config.record.fingerprint,
        folder=folder,
        totals={
            split: tuple(sorted({total, *plan.earlier_totals.get(split, ())}))
            for split, total in plan.shard_totals().items()
        },
        identity=plan.identity,
        temp_location=config.temp_location,
        published=tuple(s.name for s in published.shards) if published else (),
        recheck=config.recheck,
    )
    return (
        plan,
        note,
        Estimate(
            num_volumes=plan.num_examples,
            num_shards=len(ranges),
            num_bytes=round(plan.num_examples * each),
            examples_per_shard=max(map(len, ranges)),
            shape=inputs.shape,
            splits={split: frames * size for split, size in plan.split_sizes.items()},
        ),
    )


def _published(config: BuildConfig) -> DatasetInfo | None:
    try:
        return find_info(config.output)
    except DatasetError:
        if config.overwrite:
            return None  # nothing can be read by it, so there is nothing to keep readable
        raise


def _first_volume(
    config: BuildConfig, manifest: Manifest
) -> tuple[VolumeHeader, RecordLayout, tuple[int, ...]]:
    """The header of the first image that can be read, how it is loaded, and the shape of its record."""
    problems = []
    for row in manifest.rows(manifest.kept_rows()[:_IMAGES_TRIED].tolist()):
        try:
            header = load_header(row, manifest.folder, config.record)
            layout = record_layout(row.path, header, config.record)
            shape = layout.stored_shape
            if shape is None:
                of_one = replace(config.record, frames="first") if layout.frame == "each" else config.record
                volume = load_volume(row, manifest.folder, record=of_one)
                shape = prepare_volume(volume, config.record).voxels.shape
            return header, layout, shape
        except VolumeError as e:
            problems.append(f"row {row.row} ({row.example_id}): {e}")
    raise ManifestError(
        manifest.path,
        [*problems, "none of these images can be used: is the manifest's folder right?"],
    )


def _refuse_foreign(config: BuildConfig) -> None:
    """An output that no build of ours left must not hold files that this build would replace."""
    if config.overwrite or BuildNote.read(config.output):
        return
    if storage.list_folders(storage.join(config.output, BUILD_FOLDER)):
        raise OutputError(
            f"{config.output}: holds a folder {BUILD_FOLDER} that no build left; move it, choose another "
            "OUTPUT, or --overwrite to remove it"
        )
    names = storage.list_files(config.output, "*.tfrecord*")
    foreign = next((name for name in names if ShardName.parse(name)), None)
    if foreign is not None:
        raise OutputError(
            f"{config.output}: holds {foreign} but no dataset_info.json; choose another OUTPUT, or "
            "--overwrite to replace it"
        )


def _refuse_other(published: DatasetInfo, inputs: _Inputs, config: BuildConfig) -> None:
    """A dataset of another configuration or of other rows is refused, saying what differs."""
    manifest, layout = inputs.manifest, inputs.layout
    wanted: dict[str, Any] = {
        **config.as_dataset_config(),
        "fingerprint": config.record.fingerprint,
    }
    # A dataset that was built before there was a choice says nothing of it.
    known_columns = {**asdict(Columns()), **published.config["columns"]}
    if not manifest.lacks_labels(published.manifest["num_rows"]):
        # None of its rows was kept or skipped for want of a label, so the option is free to change.
        known_columns["missing_label"] = config.columns.missing_label
    known_config = {**asdict(RecordConfig()), **published.config, "columns": known_columns}
    differences = [
        f"{key.replace('_', '-')} was {known_config.get(key)!r}, now {value!r}"
        for key, value in wanted.items()
        if known_config.get(key) != value and key != "fingerprint"
    ]
    differences += _class_differences(published.labels, config.record.labels or ())
    if not differences and published.config["fingerprint"] != wanted["fingerprint"]:
        differences = [f"fingerprint was {published.config['fingerprint']!r}, now {wanted['fingerprint']!r}"]
    if published.shape not in (None, inputs.shape):
        differences.append(f"the first image had shape {published.shape}, now {inputs.shape}")
    if published.num_frames and inputs.num_frames not in (None, published.num_frames):
        differences.append(f"the first image had {published.num_frames} frames, now {inputs.num_frames}")
    if config.record.voxel_dtype == "native" and published.dtype != layout.dtype.name:
        differences.append(f"the first image had {published.dtype} voxels, now {layout.dtype.name}")
    known = published.manifest
    if len(manifest) < known["num_rows"] or manifest.digest(known["num_rows"]) != known["digest"]:
        differences.append(_row_difference(published, config, manifest))
    if differences:
        raise OutputError(
            f"{config.output}: holds a dataset of another making:\n  "
            + "\n  ".join(differences)
            + "\nchoose another OUTPUT, or --overwrite to replace it"
        )


def _class_differences(was: Sequence[LabelColumn], now: Sequence[LabelColumn]) -> Iterator[str]:
    """Classes of a label that are others than those that the records have the numbers of."""
    known = {column.name: column.classes for column in was}
    for column in now:
        classes, others = known.get(column.name), column.classes
        if classes is not None and others is not None and classes != others:
            changes = [("new", set(others) - set(classes)), ("gone", set(classes) - set(others))]
            named = "; ".join(
                f"{what}: {name_classes(sorted(found), _SHOWN_CLASSES)}" for what, found in changes if found
            )
            yield (
                f"the classes of {column.name} were {name_classes(classes, _SHOWN_CLASSES)}, now "
                f"{name_classes(others, _SHOWN_CLASSES)} ({named}), and records hold their numbers"
            )


def _row_difference(published: DatasetInfo, config: BuildConfig, manifest: Manifest) -> str:
    known = published.manifest
    key_check = known.get("key_check")
    if key_check != manifest.key_check:
        if key_check is None:
            return "its ids are not anonymous, and now there is --anonymous-ids"
        other = "another key" if manifest.key_check else "no key"
        return f"its ids are anonymous, and {other} was given with --anonymous-ids"
    if list(known["columns"]) != manifest.table.column_names:
        return f"the manifest's columns were {known['columns']}, now {manifest.table.column_names}"
    if len(manifest) < known["num_rows"]:
        return f"the manifest had {known['num_rows']} rows, now {len(manifest)}"
    for shard in published.shards:
        try:
            table, _ = read_index(storage.join(config.output, shard.index))
        except (FileNotFoundError, ShardError):
            continue
        frame = ["frame"] if published.num_frames else []
        then = table.select(["row", "example_id", "source", "label", *frame]).to_pylist()
        now = manifest.rows([found["row"] - 1 for found in then])
        for found, image in zip(then, now, strict=True):
            row = image.of_frame(found["frame"]) if frame else image
            was = (found["example_id"], found["source"], found["label"])
            if was != (row.example_id, row.source, row.label):
                return f"row {row.row} was {was}, now {(row.example_id, row.source, row.label)}"
    return f"among the manifest's first {known['num_rows']} rows some were changed"


def _images_folder(published: DatasetInfo | None) -> str | None:
    """What relative paths of the published dataset's manifest are relative to."""
    return storage.dirname(published.manifest["path"]) if published else None


@contextlib.contextmanager
def open_build(config: BuildConfig) -> Iterator[BuildPlan]:
    """Plan a build and prepare its output, which no other build can write to during the block.

    Raises:
        ManifestError: as `plan_build`.
        UsageError: as `plan_build`.
        OutputError: as `plan_build`; or another build is writing there.
    """
    inputs = _read_inputs(config)  # a manifest that cannot be built from leaves no trace of the build
    with lock.hold(inputs.config.output):
        temp_location = inputs.config.temp_location
        if temp_location and storage.is_remote(temp_location):
            storage.require_writable(temp_location, "--temp-location", is_folder=True)
        plan, note, _ = _plan(inputs)
        del inputs  # hundreds of megabytes of rows, in a large cohort, for as long as the build runs
        _prepare(plan, note)
        yield plan


def _prepare(plan: BuildPlan, note: BuildNote) -> None:
    """Remove what dead builds of another making left, and say what this one is."""
    output = plan.config.output
    dead = BuildNote.read(output)
    usable = dead is not None and dead.is_of(note.fingerprint, note.folder, note.recheck)
    for root in {parts_root(output, None), parts_root(output, dead.temp_location if dead else None)}:
        for folder in storage.list_folders(root):
            if not usable or folder != note.fingerprint or root != plan.parts_root:
                storage.delete_tree(storage.join(root, folder))
    if not usable:
        remove_shards(output, keep=set(note.published))
    if not plan.has_published:  # a damaged one, which --overwrite was given for
        storage.delete(storage.join(output, FILE_NAME))
    take_summary(output)
    note.write(output)


def run_build(plan: BuildPlan, options: PipelineOptions) -> tuple[BuildSummary, Metrics]:
    """Run the pipeline and remove what only the build needed.

    Returns:
        How it ended, and what its steps counted.

    Raises:
        TooManyFailures: the dataset is not published; the next run loads only what failed.
        OutputBusyError: another build has taken the output.
    """
    import apache_beam as beam

    from beam_nifti.transforms import BuildDataset

    pipeline = beam.Pipeline(options=options)
    pipeline | "BuildDataset" >> BuildDataset(plan)
    with whole_elements():
        result = pipeline.run()
        result.wait_until_finish()
    lock.require_held(plan.config.output)  # or what is removed now may be another build's
    summary, metrics = take_summary(plan.config.output), _metrics(result)
    assert summary is not None
    if not summary.complete:
        raise TooManyFailures(summary, metrics)
    _clean_up(plan)
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


def _clean_up(plan: BuildPlan) -> None:
    """Remove the parts, and the shards of the dataset that this one replaces."""
    output = plan.config.output
    remove_shards(output, keep={s.name for s in read_info(output).shards})
    storage.delete_tree(plan.parts_root)
    storage.delete_tree(storage.join(output, BUILD_FOLDER))
