"""The commands as functions, which `import beam_nifti` gives. Nothing heavy is loaded until one is called.

Functions print nothing but a progress bar, and log to the logger "beam_nifti". They may be called from any
thread.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, Literal, SupportsIndex

from beam_nifti.errors import UsageError
from beam_nifti.pipeline.python_calls import (
    BeamOptions,
    ManifestTable,
    Path,
    callable_from_python,
    configure,
    dataset_path,
    engine_for,
    flags_for,
    path_of,
    rows_of,
    text_of,
    watcher_of,
)
from beam_nifti.pipeline.watcher import Watcher
from beam_nifti.storage import paths as storage
from beam_nifti.support.process import count_cores, require_modules

if TYPE_CHECKING:
    from typing import Unpack

    from beam_nifti.inspection.description import Description
    from beam_nifti.inspection.diff import Difference
    from beam_nifti.inspection.extract import StoredVolume
    from beam_nifti.inspection.verify import Verification
    from beam_nifti.pipeline.options import BuildOptions, Preprocess
    from beam_nifti.pipeline.statistics_file import Analysis
    from beam_nifti.pipeline.survey import Survey
    from beam_nifti.record.dataset_info import DatasetInfo
    from beam_nifti.reporting.report import ReportSummary

_KEY: Final = "the key of --anonymous-ids"
_NO_OUT: Final = "--out is missing; give a path that the workers can write to, such as gs://my-bucket/{}"


@callable_from_python
def build(
    manifest: ManifestTable,
    output: Path,
    *,
    runner: str | None = None,
    pipeline_options: BeamOptions = None,
    like: Path | None = None,
    config: Path | None = None,
    dry_run: bool = False,
    progress: bool | Watcher = True,
    **options: Unpack[BuildOptions],
) -> DatasetInfo:
    """Build the dataset that a manifest describes, or the missing part of it.

    The same call continues an interrupted build, adds appended rows, and tries failed volumes again.

    Args:
        manifest: path or URL of a .csv, .tsv, .jsonl or .parquet file; or a pandas DataFrame (its index
            becomes a column if it has a name), an Arrow table, or an iterable of dicts, one per row. Image
            paths in a file are relative to its folder, those in a table to the working directory.
        output: folder or URL of the dataset.
        runner: runner of Apache Beam, such as "FlinkRunner". Default: threads of this process.
        pipeline_options: Beam's options for the runner: a `PipelineOptions`, a dict, or a list of flags.
            Options without effect on the runner are refused.
        like: folder or URL of a dataset whose options are used unless they are given here. A function for
            `preprocess` and the key of `anonymous_ids` are never taken from the dataset: give them again.
            Another key is refused, and so is a function of the same name whose file has changed. Another
            function replaces the dataset's, with a warning.
        config: path or URL of a TOML file of options, by their names. They take precedence over `like`.
        dry_run: whether to plan only, and write nothing.
        progress: whether to show progress: a bar on a terminal and in a notebook, otherwise a line in the
            log from time to time.
        **options: see `beam_nifti.BuildOptions`, which lists all of them. The most used are:
            label_column: column of labels, or several; default: "label".
            mask_column: column of label maps; default: none.
            target_column: column of images to predict, such as dose maps; default: none.
            split: share of the participants by split, such as {"train": 0.8, "test": 0.2}.
            rescale: "minmax" (default), "zscore", "none", or a tuple such as ("percentile", 1, 99).
            orientation: axis codes, such as "RAS".
            spacing: voxel size in mm, such as (1, 1, 1).
            shape: (x, y, z) in voxels, to crop and pad to.
            allow_mixed_shapes: whether volumes may have other shapes than the first one.
            preprocess: your own function from Volume to Volume.
            voxel_dtype: "float32" (default), "float16", "bfloat16", "uint8", "native".
            max_bad_fraction: fraction of volumes that may fail; default: 0.
            workers: number of threads; default: all cores.
            overwrite: whether to replace a dataset that was built with different options or rows.

    Returns:
        The dataset. For a dry run or a Dataflow template: what is known before the shards are made. It has
        no `splits` then, so `num_examples` is 0; `check` returns the number of examples in each split.

    Raises:
        UsageError: an option is invalid.
        ManifestError: the manifest cannot be used; `problems` has every reason.
        OutputError: the output holds something else, cannot be written, or is being written.
        TooManyFailures: more volumes failed than `max_bad_fraction` allows; `failures` has all of them.
        EngineError: the runner or a worker failed.
        OSError: a disk or a store failed.
    """
    from beam_nifti.pipeline.configure import make_config
    from beam_nifti.pipeline.launch import run_build_on, run_dry
    from beam_nifti.pipeline.options import read_switch

    watcher, is_dry = watcher_of(progress), read_switch("dry_run", dry_run)
    flags = flags_for(runner, pipeline_options, watcher)
    target = storage.path_text("output", output)
    making = functools.partial(make_config, output=target)
    wanted, rows = configure(manifest, making, options, config, like, flags, watcher)
    if is_dry and not flags:  # sooner, as it needs no Beam
        return run_dry(wanted, rows, watcher)
    engine = engine_for(wanted, flags, watcher)
    return run_dry(engine.config, rows, watcher) if is_dry else run_build_on(engine, rows, watcher)


@callable_from_python
def check(
    manifest: ManifestTable,
    *,
    voxels: bool = False,
    out: Path | None = None,
    runner: str | None = None,
    pipeline_options: BeamOptions = None,
    like: Path | None = None,
    config: Path | None = None,
    progress: bool | Watcher = True,
    **options: Unpack[BuildOptions],
) -> Survey:
    """Read the headers of a manifest's images, and report how a build would handle them.

    Args:
        manifest: same as for `build`.
        voxels: whether to read and prepare the images, too, as the build would. Finds damaged images; volumes
            that differ strongly from the others in mean intensity, field of view or voxel size; constant
            volumes; and masks that are empty or have rare labels. The item `notes` lists them.
        out: also write the report to this .json file. Required on a cluster, whose workers must be able to
            write it.
        runner: same as for `build`.
        pipeline_options: same as for `build`.
        like: same as for `build`.
        config: same as for `build`.
        progress: same as for `build`.
        **options: see `beam_nifti.BuildOptions`.

    Returns:
        The findings. Falsy if the build would not be complete, as far as headers show, or voxels if they
            are read. What differs from the rest of the cohort is a warning.

    Raises:
        UsageError: an option is invalid.
        ManifestError: the manifest cannot be used, whatever its images contain.
        EngineError: the runner or a worker failed.
        OSError: a disk or a store failed.
    """
    from beam_nifti.pipeline.configure import make_config
    from beam_nifti.pipeline.options import read_switch
    from beam_nifti.pipeline.outputs import require_ending, require_out

    reads_voxels = read_switch("voxels", voxels)
    report, watcher = text_of("out", out), watcher_of(progress)
    require_ending(report, ".json")
    flags = flags_for(runner, pipeline_options, watcher)
    making = functools.partial(make_config, output=report or "")
    wanted, rows = configure(manifest, making, options, config, like, flags, watcher)
    engine = engine_for(wanted, flags, watcher)
    if not engine.is_local and report is None:
        raise UsageError(_NO_OUT.format("check.json"))
    if report is not None:
        inputs = {"the manifest": wanted.manifest if rows is None else None, _KEY: wanted.anonymous_ids}
        require_out(report, overwrite=True, inputs=inputs)
    from beam_nifti.pipeline.launch import run_check_on

    return run_check_on(engine, rows, report, watcher, voxels=reads_voxels)


@callable_from_python
def analyze(
    manifest: ManifestTable,
    *,
    out: Path | None = None,
    runner: str | None = None,
    pipeline_options: BeamOptions = None,
    like: Path | None = None,
    config: Path | None = None,
    progress: bool | Watcher = True,
    **options: Unpack[BuildOptions],
) -> Analysis:
    """Measure the volumes of a cohort: intensities, sizes and labels, prepared as a build prepares them.

    The result is the same on every runner, with any number of workers. `build(rescale_stats=…)` uses it.

    Args:
        manifest: same as for `build`.
        out: also write the statistics to this .json file, which is replaced if it exists. Required on a
            cluster, whose workers must be able to write it.
        runner: same as for `build`.
        pipeline_options: same as for `build`.
        like: same as for `build`; options that only concern how records are written are ignored.
        config: same as for `build`; options that only concern how records are written are ignored.
        progress: same as for `build`.
        **options: those of `beam_nifti.BuildOptions` that concern what is measured: columns, splits,
            `rescale_within`, `rescale_split`, `frames`, `complex`, preparation, `max_bad_fraction`,
            `workers`. `rescale=("cohort:percentile", low, high)` adds two percentiles.

    Returns:
        The statistics.

    Raises:
        UsageError: an option is invalid, or has no effect on an analysis.
        ManifestError: the manifest cannot be used.
        TooManyFailures: more volumes failed than `max_bad_fraction` allows; `failures` has all of them.
        VolumeError: no voxel is selected in any volume.
        EngineError: the runner or a worker failed.
        OSError: a disk or a store failed.
    """
    from beam_nifti.pipeline.configure import make_analysis_config
    from beam_nifti.pipeline.outputs import require_ending, require_out

    path, watcher = text_of("out", out), watcher_of(progress)
    require_ending(path, ".json")
    flags = flags_for(runner, pipeline_options, watcher)
    wanted, rows = configure(manifest, make_analysis_config, options, config, like, flags, watcher)
    engine = engine_for(wanted, flags, watcher)
    if engine.is_template:
        raise UsageError("--template-location is for build only: statistics are read when a job has ended")
    if not engine.is_local and path is None:
        raise UsageError(_NO_OUT.format("statistics.json"))
    if path is not None:
        inputs = {"the manifest": wanted.manifest if rows is None else None, _KEY: wanted.anonymous_ids}
        require_out(path, overwrite=True, inputs=inputs)
    from beam_nifti.pipeline.launch import run_analysis_on

    return run_analysis_on(engine, rows, path, watcher)


@callable_from_python
def verify(
    dataset: Path,
    *,
    manifest: ManifestTable | None = None,
    deep: SupportsIndex | Literal["all"] = 0,
    preprocess: Preprocess | Sequence[Preprocess] | None = None,
    anonymous_ids: Path | None = None,
    workers: SupportsIndex | None = None,
    progress: bool | Watcher = True,
) -> Verification:
    """Read a dataset back and check every byte of it.

    Args:
        dataset: folder or URL of the dataset.
        manifest: same as for `build`. Ids, labels, splits, paths and extra columns are compared with it.
        deep: number of records to rebuild from their images and compare bit for bit, or "all". Requires
            `manifest`, which names the images that are opened.
        preprocess: function of the dataset, as for `build`. `deep` requires it if the dataset was built with
            one, because a function that only the dataset names is never run.
        anonymous_ids: file of the key that the dataset was built with. With `manifest`, a dataset with
            anonymous ids requires it.
        workers: number of threads. Default: all cores.
        progress: same as for `build`.

    Returns:
        What was checked. Falsy if something is wrong; `problems` lists it.

    Raises:
        UsageError: the records cannot be rebuilt with these arguments.
        DatasetError: there is no complete dataset.
        ManifestError: the manifest cannot be read.
        OSError: a disk or a store failed.
    """
    from beam_nifti.inspection.verify import verify_dataset
    from beam_nifti.pipeline.options import read_integer, read_steps
    from beam_nifti.pipeline.progress import current_progress, no_progress, show_progress
    from beam_nifti.record.dataset_info import read_info

    watcher = watcher_of(progress)
    num_workers = count_cores() if workers is None else read_integer("--workers", workers)
    output, key = dataset_path(dataset), text_of("anonymous_ids", anonymous_ids)
    path, rows = (None, None) if manifest is None else (path_of(manifest), rows_of(manifest, key))
    info = read_info(output)
    watcher.on_dataset(info)
    with show_progress(info.num_examples, unit="record") if watcher.has_progress else no_progress():
        return verify_dataset(
            output,
            manifest=path,
            rows=rows,
            anonymous_ids=key,
            deep=deep,
            preprocess=None if preprocess is None else read_steps(preprocess),
            workers=num_workers,
            on_progress=current_progress().add,
        )


@callable_from_python
def convert(
    old: Path,
    output: Path,
    *,
    workers: SupportsIndex | None = None,
    progress: bool | Watcher = True,
) -> DatasetInfo:
    """Convert a dataset of an earlier format to the current one, without its images.

    Records keep their bytes, their order and their shards. They are cut so that patches can be read without
    the rest, and every byte is checked. The same call continues an interrupted conversion.

    Args:
        old: folder or URL of the dataset, which is not changed.
        output: folder or URL of the converted dataset.
        workers: number of threads, each of which converts one shard at a time. Default: all cores.
        progress: same as for `build`.

    Returns:
        The converted dataset.

    Raises:
        UsageError: the dataset has the current format, or one folder is in the other.
        DatasetError: there is no complete dataset, or it is damaged.
        OutputError: the output holds something else, cannot be written, or is being written.
        OSError: a disk or a store failed.
    """
    from beam_nifti.inspection.convert import convert_dataset
    from beam_nifti.pipeline.conversion import Conversion
    from beam_nifti.pipeline.options import read_integer
    from beam_nifti.pipeline.progress import no_progress, show_progress

    watcher = watcher_of(progress)
    num_workers = count_cores() if workers is None else read_integer("--workers", workers)
    conversion = Conversion.of(dataset_path(old, "old"), dataset_path(output, "output"))
    total = conversion.source.num_examples
    watcher.on_dataset(conversion.source)
    with show_progress(total, unit="record") if watcher.has_progress else no_progress():
        info, num_kept = convert_dataset(conversion, num_workers)
    watcher.on_kept(num_kept)
    return info


@callable_from_python
def withdraw(
    dataset: Path,
    participants: str | Iterable[str],
    *,
    manifest: ManifestTable,
    anonymous_ids: Path | None = None,
    overwrite: bool = False,
    workers: SupportsIndex | None = None,
    progress: bool | Watcher = True,
) -> DatasetInfo:
    """Remove participants from a dataset. No images are needed.

    The dataset becomes the one that a build of the manifest without their rows gives. Everything that it has
    of them is removed: records, rows of indexes, failures, and files of earlier revisions. Later builds into
    its folder refuse rows of theirs. The same call continues an interrupted withdrawal.

    Args:
        dataset: folder or URL of the dataset.
        participants: their ids, as in the manifest; ids of examples if it has no column participant_id. With
            anonymous ids also pseudonyms.
        manifest: manifest that the dataset was built from, with the rows of the participants.
        anonymous_ids: file of the key that the dataset was built with, if its ids are anonymous.
        overwrite: whether to discard an unfinished build in the folder, which may hold records of theirs.
        workers: number of threads, each of which writes one shard at a time. Default: all cores.
        progress: same as for `build`.

    Returns:
        The dataset without them. Its last `withdrawals` states what was removed.

    Raises:
        UsageError: a participant is not in the manifest, or is the only one; or the manifest is not that of
            the dataset; or the dataset has no manifest.
        ManifestError: the manifest cannot be read, or its other rows cannot be built from.
        DatasetError: there is no complete dataset, or it is damaged.
        OutputError: it holds an unfinished build or files of unknown origin, or cannot be written.
        OSError: a disk or a store failed.
    """
    from beam_nifti.pipeline.options import read_integer
    from beam_nifti.pipeline.progress import no_progress, show_progress
    from beam_nifti.pipeline.withdrawal import withdraw_people
    from beam_nifti.record.dataset_info import read_info

    watcher = watcher_of(progress)
    num_workers = count_cores() if workers is None else read_integer("--workers", workers)
    output, key = dataset_path(dataset), text_of("anonymous_ids", anonymous_ids)
    names = [participants] if isinstance(participants, str) else [*participants]
    path, rows = path_of(manifest), rows_of(manifest, key)
    info = read_info(output)
    watcher.on_dataset(info)
    with show_progress(info.num_examples, unit="record") if watcher.has_progress else no_progress():
        return withdraw_people(
            output, names, path, rows=rows, anonymous_ids=key, overwrite=overwrite, workers=num_workers
        )


@callable_from_python
def relabel(
    dataset: Path,
    manifest: ManifestTable,
    *,
    label_column: str | Sequence[str] | None = None,
    missing_label: str | None = None,
    anonymous_ids: Path | None = None,
    overwrite: bool = False,
    workers: SupportsIndex | None = None,
    progress: bool | Watcher = True,
) -> DatasetInfo:
    """Give the records of a dataset the labels, splits and further columns of a changed manifest.

    The images are not needed. The dataset becomes the one that a build of the manifest gives. The same call
    continues an interrupted one.

    Args:
        dataset: folder or URL of the dataset.
        manifest: same as for `build`: rows with the ids and images of the dataset, in any order.
        label_column: column of labels, or several, as for `build`. Default: those of the dataset.
        missing_label: what to do with rows without a label, as for `build`. Default: as in the dataset.
        anonymous_ids: file of the key that the dataset was built with, if its ids are anonymous.
        overwrite: whether to discard an unfinished build in the folder.
        workers: number of threads, each of which writes one shard at a time. Default: all cores.
        progress: same as for `build`.

    Returns:
        The dataset as it is now.

    Raises:
        UsageError: rows have other images than the dataset, or it has records of no row.
        ManifestError: the manifest cannot be used.
        DatasetError: there is no complete dataset, it is damaged, or it has no record of a row.
        OutputError: it holds an unfinished build, or cannot be written.
        OSError: a disk or a store failed.
    """
    from beam_nifti.pipeline.options import read_integer
    from beam_nifti.pipeline.progress import no_progress, show_progress
    from beam_nifti.pipeline.relabeling import relabel_dataset
    from beam_nifti.record.dataset_info import read_info

    watcher = watcher_of(progress)
    num_workers = count_cores() if workers is None else read_integer("--workers", workers)
    output, key = dataset_path(dataset), text_of("anonymous_ids", anonymous_ids)
    path, rows = path_of(manifest), rows_of(manifest, key)
    labels = label_column if label_column is None or isinstance(label_column, str) else ",".join(label_column)
    info = read_info(output)
    watcher.on_dataset(info)
    with show_progress(info.num_examples, unit="record") if watcher.has_progress else no_progress():
        return relabel_dataset(
            output,
            path,
            rows=rows,
            label_column=labels,
            missing_label=missing_label,
            anonymous_ids=key,
            overwrite=overwrite,
            workers=num_workers,
        )


@callable_from_python
def inspect(dataset: Path, record: str | None = None) -> Description:
    """Describe a dataset or one of its records, from dataset_info.json and the indexes.

    Args:
        dataset: folder or URL of the dataset.
        record: example id of the record; None for the whole dataset.

    Returns:
        The items of `beam-nifti inspect --json`, which `print` shows as a table.

    Raises:
        DatasetError: there is no complete dataset, or it has no such record.
    """
    from beam_nifti.inspection.description import Description, describe_dataset, describe_record

    path = dataset_path(dataset)
    return Description(describe_dataset(path) if record is None else describe_record(path, record))


@callable_from_python
def diff(before: Path, after: Path) -> Difference:
    """Compare two datasets by dataset_info.json and the indexes.

    Args:
        before: folder or URL of the first dataset.
        after: folder or URL of the second dataset.

    Returns:
        The differences in records and options. Falsy if there are none.

    Raises:
        DatasetError: one of the datasets is not complete.
    """
    from beam_nifti.inspection.diff import compare_datasets

    return compare_datasets(dataset_path(before, "before"), dataset_path(after, "after"))


@callable_from_python
def extract(dataset: Path, example_id: str) -> StoredVolume:
    """Read the volume of one record, in the image's units.

    Args:
        dataset: folder or URL of the dataset.
        example_id: id of the record.

    Returns:
        The volume. Its method `to_nibabel` makes an image of it.

    Raises:
        DatasetError: there is no complete dataset, it has no such record, or the record is damaged.
    """
    from beam_nifti.inspection.extract import read_volume

    return read_volume(dataset_path(dataset), example_id)


@callable_from_python
def report(
    dataset: Path,
    out: Path | None = None,
    *,
    pictures: SupportsIndex = 1000,
    by: str | None = None,
    workers: SupportsIndex | None = None,
    runner: str | None = None,
    pipeline_options: BeamOptions = None,
    progress: bool | Watcher = True,
) -> ReportSummary:
    """Make a page of pictures and distributions of a dataset; requires the extra `report`.

    Args:
        dataset: folder or URL of the dataset.
        out: path or URL of the page, an .html file that is not a file of a dataset. An existing file is
            replaced. Default: report.html in the working directory; required on a cluster, whose workers
            must be able to write it.
        pictures: number of volumes to show besides the outliers, evenly spread.
        by: column of the index, such as a site or a scanner, by which to compare intensities.
        workers: number of threads. Default: all cores.
        runner: same as for `build`.
        pipeline_options: same as for `build`.
        progress: same as for `build`.

    Returns:
        A summary of the page; `problems` lists what is damaged, `copies` the records with the same image.

    Raises:
        UsageError: an option is invalid, or the index has no column `by`.
        DatasetError: there is no complete dataset.
        OutputError: the page cannot be written.
        EngineError: the runner or a worker failed.
        OSError: a disk or a store failed.
    """
    from beam_nifti.config import BuildConfig
    from beam_nifti.pipeline.options import read_integer
    from beam_nifti.pipeline.outputs import require_ending
    from beam_nifti.record.dataset_info import read_info

    page = text_of("out", out) or "report.html"
    require_ending(page, ".html")
    require_modules("jinja2", "matplotlib", "PIL")
    watcher = watcher_of(progress)
    flags = flags_for(runner, pipeline_options, watcher)
    if (num_pictures := read_integer("--pictures", pictures)) < 0:
        raise UsageError(f"--pictures is {num_pictures}; it must be at least 0")
    if by is not None and not isinstance(by, str):
        raise UsageError(f"--by is {by!r}; give the name of a column of the index")
    # As engines know it: without a manifest, and with an output that workers must reach.
    threads = None if workers is None else read_integer("--workers", workers)
    config = BuildConfig(manifest="", output=dataset_path(dataset), workers=threads)
    engine = engine_for(config, flags, watcher)
    if engine.is_template:
        raise UsageError("--template-location is for build only: a report is made when its job has ended")
    if not engine.is_local and out is None:
        raise UsageError(_NO_OUT.format("report.html"))
    # After the engine: they load Beam.
    from beam_nifti.pipeline.launch import running
    from beam_nifti.reporting.report import write_report

    info = read_info(config.output)
    with running(engine, watcher, info.num_examples, "record", "the report stopped"):
        return write_report(config.output, info, page, engine.options, num_pictures=num_pictures, by=by)
