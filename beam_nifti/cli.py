"""beam-nifti: the commands. Beam and the rest are imported only by the command that needs them."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from beam_nifti import options as command_line
from beam_nifti.errors import (
    BeamNiftiError,
    ManifestError,
    OutputBusyError,
    OutputError,
    UsageError,
)

if TYPE_CHECKING:
    from beam_nifti.config import BuildConfig
    from beam_nifti.engines import Engine
    from beam_nifti.plan import BuildPlan
    from beam_nifti.publish import BuildSummary

SUCCESS: Final = 0
FAILED: Final = 1
USAGE: Final = 2
TEMPORARY: Final = 75
"""EX_TEMPFAIL of sysexits.h: what stood in the way may be gone when a scheduler tries again."""
INTERRUPTED: Final = 130

_SHOWN_CLASSES: Final = 10
"""Of a label, in the summary of a build."""

_NO_LABELS: Final = "labels   none: the manifest has no column 'label' (see --label-column)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: without the program's name; None takes the process's own.

    Returns:
        The exit code: 0 success, 1 failure, 2 a wrong option, manifest or output,
        75 a failure that may pass, 130 Ctrl-C.
    """
    commands = {
        "manifest": _manifest,
        "check": _check,
        "build": _build,
        "verify": _verify,
        "inspect": _inspect,
        "diff": _diff,
        "extract": _extract,
        "report": _make_report,
    }
    try:
        options, beam_flags = command_line.parse(sys.argv[1:] if argv is None else argv)
    except SystemExit as e:  # argparse has already said what it has to say
        return e.code if isinstance(e.code, int) else USAGE
    except UsageError as e:
        return _complain(e, USAGE)
    try:
        return commands[options.command](options, beam_flags)
    except OutputBusyError as e:
        return _complain(e, TEMPORARY)
    except (UsageError, ManifestError, OutputError) as e:
        return _complain(e, USAGE)
    except BeamNiftiError as e:
        return _complain(e, FAILED)
    except OSError as e:
        code = TEMPORARY if isinstance(e, TimeoutError) else USAGE
        return _complain(f"{e.filename}: {e.strerror}" if e.filename and e.strerror else e, code)
    except KeyboardInterrupt:
        print("\nbeam-nifti: stopped; the same command", end=" ", file=sys.stderr)
        print("continues where it was" if options.command == "build" else "starts again", file=sys.stderr)
        return INTERRUPTED


@contextlib.contextmanager
def _while_read() -> Iterator[None]:
    """Let the exit code stand when whoever reads our output has gone."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(error: Exception | str, code: int) -> int:
    print(f"beam-nifti: error: {error}", file=sys.stderr)
    return code


def _refuse_existing(path: str) -> None:
    from beam_nifti import storage

    if storage.exists(storage.absolute(path)):
        raise OutputError(f"{path}: is there already; choose another, or --overwrite to replace it")


def _manifest(options: argparse.Namespace, _: list[str]) -> int:
    from beam_nifti import discovery, storage
    from beam_nifti.tables import format_delimited, write_table

    out = options.out and storage.absolute(options.out)
    if out and not options.overwrite:
        _refuse_existing(options.out)
    folder = storage.dirname(out) if out else ""
    if options.source == "bids":
        found = discovery.find_bids_images(
            options.folder,
            options.suffix,
            folder,
            entities=command_line.chosen_entities(options),
            label=options.label,
            columns=options.column or (),
            all_images=options.all_images,
        )
    else:
        found = discovery.find_matching_images(options.pattern, folder, all_images=options.all_images)
    for note in found.notes:
        print(note, file=sys.stderr)
    if out:
        write_table(out, found.table)
    with _while_read():
        if out:
            print(f"manifest {_count(found.table.num_rows, 'image')}: {options.out}")
        else:
            print(format_delimited(found.table, "\t"), end="")
    return SUCCESS


def _build(options: argparse.Namespace, beam_flags: list[str]) -> int:
    config = command_line.build_config(options)
    if options.dry_run and not beam_flags:
        return _dry_run(config)  # sooner, as it needs no Beam
    from beam_nifti.build import open_build
    from beam_nifti.engines import choose_engine, write_template

    engine = choose_engine(config, beam_flags, options.workers)
    if options.dry_run:
        return _dry_run(engine.config)
    with open_build(engine.config) as plan:
        if engine.is_template:
            write_template(plan, engine.options)
            return SUCCESS
        return _run(plan, engine, quiet=options.quiet)


def _run(plan: BuildPlan, engine: Engine, *, quiet: bool) -> int:
    from beam_nifti.build import run_build
    from beam_nifti.publish import TooManyFailures

    progress = _progress(engine, plan.num_examples, "volume", quiet=quiet)
    noise = io.StringIO()
    try:
        with progress, _set_aside(noise, engine):
            summary, counters = run_build(plan, engine.options)
    except TooManyFailures as e:
        with _while_read():
            _report(plan, e.summary, {})
        return _complain(
            f"{e}; {'the dataset stays as it was' if plan.has_published else 'the dataset is not complete'}. "
            "Repair those images and give the same command again, which loads only them, or leave them "
            "out with --max-bad-fraction",
            FAILED,
        )
    except RuntimeError as e:
        return _stopped(e, "the build stopped", "the same command continues where it was")
    sys.stderr.write(noise.getvalue())
    with _while_read():
        _report(plan, summary, counters)
    return SUCCESS


def _progress(
    engine: Engine, total: int, unit: str, *, quiet: bool
) -> contextlib.AbstractContextManager[None]:
    from beam_nifti.progress import no_progress, show_progress

    # Processes count for themselves, and a cluster's workers too.
    is_counted = engine.is_local and not engine.in_processes
    return show_progress(total, unit) if is_counted and not quiet else no_progress()


@contextlib.contextmanager
def _set_aside(noise: io.StringIO, engine: Engine) -> Iterator[None]:
    """Keep what a local runner writes on standard error from the screen."""
    from beam_nifti.engines import quiet_processes

    with contextlib.ExitStack() as stack:
        if engine.in_processes:
            stack.enter_context(quiet_processes())
        if engine.is_local:
            logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
            stack.enter_context(contextlib.redirect_stderr(noise))
        yield


def _stopped(error: RuntimeError, what: str, remedy: str) -> int:
    """Say why a pipeline failed: by a worker's exception, which the runner brings back as text."""
    traceback.print_exception(error)
    return _complain(f"{what}: {str(error).strip().rpartition(chr(10))[2]}; {remedy}", TEMPORARY)


def _report(plan: BuildPlan, summary: BuildSummary, counters: Mapping[str, int]) -> None:
    output = plan.config.output
    if skipped := counters.get("volumes-skipped", 0):
        print(f"kept     {_count(skipped, 'example')} of an earlier run")
    print(
        f"{'dataset' if summary.complete else 'so far '}  {_count(summary.num_written, 'example')}, "
        f"{_count(summary.num_shards, 'shard')}, {summary.num_bytes / 1e6:.1f} MB: {output}"
    )
    if summary.num_failed:
        print(f"left out {_count(summary.num_failed, 'volume')}, listed in {summary.failures_path}")
    _print_labels(plan)
    if summary.complete:
        print(f"read it  beam_nifti.reader.load_dataset({output!r}, batch_size=8)")


def _print_labels(plan: BuildPlan) -> None:
    from beam_nifti.labels import name_classes

    if plan.config.columns.label is None:
        print(_NO_LABELS)
    for number, column in enumerate(plan.config.record.labels or ()):
        classes = column.classes or ()
        shown = name_classes(classes, _SHOWN_CLASSES)
        which = f", {len(classes)}: {shown}" if column.kind == "class" else ""
        print(f"{'' if number else 'labels':<9}{column.name}: {column.kind}{which}")
    _print_skipped(plan.num_skipped)


def _print_skipped(num_rows: int) -> None:
    if num_rows:
        print(f"skipped  {_count(num_rows, 'row')} without a label")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _dry_run(config: BuildConfig) -> int:
    from beam_nifti.build import plan_build

    plan, estimate = plan_build(config)
    shape = "x".join(map(str, estimate.shape))
    splits = ", ".join(f"{name} {count}" for name, count in estimate.splits.items())
    print(f"would write to {plan.config.output}")
    print(f"  volumes {estimate.num_volumes} of {shape} voxels ({splits})")
    print(f"  shards  {estimate.num_shards} of up to {estimate.examples_per_shard} examples")
    _print_labels(plan)
    print(f"  bytes   about {estimate.num_bytes / 1e6:.1f} MB, judged by the first image's header")
    return SUCCESS


def _check(options: argparse.Namespace, beam_flags: list[str]) -> int:
    from beam_nifti import storage
    from beam_nifti.engines import choose_engine
    from beam_nifti.manifest import read_manifest
    from beam_nifti.survey import format_report

    engine = choose_engine(command_line.check_config(options), beam_flags, options.workers)
    if not engine.is_local and options.out is None:
        raise UsageError(
            "--out is missing: where the workers write the report, such as gs://my-bucket/check.json"
        )
    from beam_nifti.check import check_images  # after the engine, which imports Beam as it should be

    config, manifest = engine.config, storage.absolute(engine.config.manifest)
    rows = read_manifest(manifest, config.columns)
    num_rows, num_skipped = len(rows), rows.num_skipped
    del rows
    progress = _progress(engine, num_rows - num_skipped, "image", quiet=options.quiet)
    try:
        with progress, _set_aside(io.StringIO(), engine):
            report = check_images(manifest, config.columns, config.record, engine.options, options.out)
    except RuntimeError as e:
        return _stopped(e, "the check stopped", "the same command starts again")
    with _while_read():
        print(json.dumps(report, indent=2, ensure_ascii=False) if options.json else format_report(report))
        if not options.json:
            _print_skipped(num_skipped)
    is_mixed = len(report["records"]) > 1 and not config.allow_mixed_shapes
    is_mixed |= len(report["frames"]) > 1  # images of another length than the first one's are left out
    return FAILED if report["num_bad"] or is_mixed else SUCCESS


def _verify(options: argparse.Namespace, _: list[str]) -> int:
    from beam_nifti.progress import METER, no_progress, show_progress
    from beam_nifti.publish import read_info
    from beam_nifti.verify import ALL, verify_dataset

    deep = None
    if options.deep is not None:
        try:
            deep = ALL if options.deep == "all" else int(options.deep)
        except ValueError:
            raise UsageError(f"--deep is {options.deep!r}; give a number of records, or all") from None
    total = read_info(options.output).num_examples
    with no_progress() if options.quiet else show_progress(total, unit="record"):
        report = verify_dataset(
            options.output,
            manifest=options.manifest,
            anonymous_ids=options.anonymous_ids,
            deep=deep,
            workers=options.workers,
            on_progress=METER.add,
        )
    for problem in report.problems:
        print(problem, file=sys.stderr)
    made_again = f", {report.num_deep} made again from their images" if report.num_deep else ""
    print(
        f"{'right' if report.ok else 'WRONG'}    {_count(report.num_examples, 'example')}, "
        f"{_count(report.num_shards, 'shard')}, {report.num_bytes / 1e6:.1f} MB{made_again}: {options.output}"
    )
    return SUCCESS if report.ok else FAILED


def _inspect(options: argparse.Namespace, _: list[str]) -> int:
    from beam_nifti.inspection import describe_dataset, describe_record, format_description

    if options.record is not None:
        description = describe_record(options.output, options.record)
    else:
        description = describe_dataset(options.output)
    with _while_read():
        print(json.dumps(description, indent=2) if options.json else format_description(description))
    return SUCCESS


def _diff(options: argparse.Namespace, _: list[str]) -> int:
    from beam_nifti.diff import compare_datasets, diff_as_json, format_diff

    diff = compare_datasets(options.before, options.after)
    with _while_read():
        print(json.dumps(diff_as_json(diff), indent=2) if options.json else format_diff(diff))
    return SUCCESS if diff.is_empty else FAILED


def _extract(options: argparse.Namespace, _: list[str]) -> int:
    from beam_nifti import storage
    from beam_nifti.extract import choose_paths, read_volumes

    ids = list(dict.fromkeys(options.id))
    paths = choose_paths(ids, options.out, "_mask" if options.mask else "")
    if not options.overwrite:
        for path in paths:
            _refuse_existing(path)
    for volume, path in zip(read_volumes(options.output, ids), paths, strict=True):
        written = volume.of_mask() if options.mask else volume
        written.save(storage.absolute(path))
        with _while_read():
            shape = "x".join(map(str, written.voxels.shape))
            print(f"image    {shape} {written.voxels.dtype}: {path}")
    return SUCCESS


def _make_report(options: argparse.Namespace, beam_flags: list[str]) -> int:
    from beam_nifti.engines import choose_engine
    from beam_nifti.publish import read_info

    _require_extra("report", "jinja2", "matplotlib", "PIL")
    engine = choose_engine(command_line.report_config(options), beam_flags, options.workers)
    if engine.is_template:
        raise UsageError("--template-location is for build only: a report is made when its job has ended")
    if not engine.is_local and options.out is None:
        raise UsageError("--out is missing: where the workers write too, such as gs://my-bucket/report.html")
    out = options.out or "report.html"
    from beam_nifti.report import write_report  # after the engine, which imports Beam as it should be

    progress = _progress(engine, read_info(options.output).num_examples, "record", quiet=options.quiet)
    try:
        with progress, _set_aside(io.StringIO(), engine):
            summary = write_report(options.output, out, engine.options, num_pictures=options.pictures)
    except RuntimeError as e:
        return _stopped(e, "the report stopped", "the same command starts again")
    for problem in summary.problems:
        print(problem, file=sys.stderr)
    with _while_read():
        print(
            f"report   {_count(summary.num_examples, 'example')}, {_count(summary.num_outliers, 'outlier')}, "
            f"{_count(summary.num_failures, 'volume')} left out, {summary.num_bytes / 1e6:.1f} MB: {out}"
        )
    return FAILED if summary.problems else SUCCESS


def _require_extra(extra: str, *modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{', '.join(missing)}: not installed, and `beam-nifti {extra}` needs it; "
            f"pip install 'beam-nifti[{extra}]'"
        )


if __name__ == "__main__":
    sys.exit(main())
