"""beam-nifti: the commands. Beam and the rest are imported only by the command that needs them."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import itertools
import logging
import sys
import webbrowser
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from beam_nifti.cli import parser as command_line
from beam_nifti.cli.build_options import build_config, check_config
from beam_nifti.cli.common_options import choose_workers
from beam_nifti.cli.dataset_options import report_config
from beam_nifti.cli.manifest_options import chosen_entities
from beam_nifti.cli.run_summary import RunSummary, remove_earlier, write_document
from beam_nifti.errors import BeamNiftiError, OutputError, UsageError
from beam_nifti.pipeline.outputs import require_apart
from beam_nifti.storage import paths as storage
from beam_nifti.support import logs
from beam_nifti.support.cells import parse_integer
from beam_nifti.support.outcomes import (
    CUT_SHORT,
    FAILED,
    INTERRUPTED,
    SUCCESS,
    TEMPORARY,
    USAGE,
    engine_outcome,
    exit_code,
    reason_of,
)
from beam_nifti.support.strict_json import dump_json
from beam_nifti.support.terminal import UnwritableError, guarded_streams, write_result
from beam_nifti.support.wording import counted, one_line
from beam_nifti.volume.notes import warnings_of

if TYPE_CHECKING:
    from beam_nifti.config import BuildConfig
    from beam_nifti.pipeline.metrics import Metrics
    from beam_nifti.pipeline.plan import BuildPlan, CheckPlan
    from beam_nifti.pipeline.publish import BuildSummary
    from beam_nifti.pipeline.resume import Reuse
    from beam_nifti.pipeline.runners import Engine

_SHOWN_CLASSES: Final = 10
"""Of a label, in the summary of a build."""

_NOT_LOGGED: Final = {"error", "failure_reasons", "counters", "distributions"}
"""Of a run's summary: errors may name participants."""

_NO_LABELS: Final = "labels   none: the manifest has no column 'label' (see --label-column)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: without the program's name; None takes the process's own.

    Returns:
        The exit code: 0 success, 1 failure, 2 a wrong option, manifest or output,
        75 a failure that may pass, 130 Ctrl-C, 141 a result that nobody read to its end.

    Raises:
        SystemExit: with 1, in the place of an exception that nobody foresaw, whose traceback is printed.
    """
    arguments = sys.argv[1:] if argv is None else argv
    with guarded_streams(), logs.on_stderr(command_line.find_log_format(arguments)):
        try:
            storage.require_text(arguments)
            with _all_read():  # --help and --version
                options, beam_flags = command_line.parse(arguments)
        except SystemExit:
            return SUCCESS
        except UsageError as e:
            return _complain(e, USAGE)
        except UnwritableError as e:
            return _unprinted(e)
        return _run_command(options, beam_flags)


def _run_command(options: argparse.Namespace, beam_flags: list[str]) -> int:
    """Run it, and write how it ended, whatever happens."""
    try:
        _require_reports_writable(options)
    except (BeamNiftiError, OSError) as e:
        return _complain(e if isinstance(e, BeamNiftiError) else reason_of(e), exit_code(e))
    run, code = RunSummary(options.command), None
    try:
        code = _attempt(options, beam_flags, run)
    finally:
        if code is None:
            run.fail(cast(BaseException, sys.exception()))
        run.end(code)
        is_told = _tell_end(run, options)
    return code if is_told else code or FAILED


_OUT_FILES: Final = {
    "out": "--out",
    "summary_json": "--summary-json",
    "metrics_file": "--metrics-file",
}
"""Files that one command may write, by the names of their options."""


def _require_reports_writable(options: argparse.Namespace) -> None:
    """Refuse local files that cannot be written; those of a store need the engine's flags first."""
    named = {flag: path for name, flag in _OUT_FILES.items() if (path := getattr(options, name, None))}
    for (flag, path), (other, same) in itertools.combinations(named.items(), 2):
        if storage.is_same(path, same):
            raise UsageError(f"{flag} and {other} are both {path}; choose another file for one of them")
    for name, flag in (("summary_json", "--summary-json"), ("metrics_file", "--metrics-file")):
        path = getattr(options, name, None)
        if path is not None and not storage.is_remote(path):
            require_apart(path, flag, _inputs(options))
            storage.require_writable(storage.absolute(path), flag)
    if metrics := getattr(options, "metrics_file", None):
        folder = storage.dirname(storage.absolute(metrics))
        if not storage.exists(folder):
            raise UsageError(f"--metrics-file is {metrics}: there is no folder {folder}; create it")


def _inputs(options: argparse.Namespace) -> dict[str, str | None]:
    """Files that a command reads, by what they are."""
    names = {"manifest": "the manifest", "anonymous_ids": "the key of --anonymous-ids"}
    return {what: getattr(options, name, None) for name, what in names.items()}


def _tell_end(run: RunSummary, options: argparse.Namespace) -> bool:
    """Write the files that were asked for; False where one could not be written."""
    if options.log_format == "json":
        facts = {k: v for k, v in run.as_document().items() if v is not None and k not in _NOT_LOGGED}
        logs.LOGGER.info("%s ended: %s", run.command, run.status, extra=logs.fields(**facts))
    try:
        if getattr(options, "summary_json", None):
            write_document(options.summary_json, run)
        if getattr(options, "metrics_file", None) and not run.dry_run:
            from beam_nifti.cli.prometheus import write_metrics

            write_metrics(options.metrics_file, run)
    except OSError as e:
        logs.LOGGER.error("could not write the summary or metrics file: %s", reason_of(e))
        return False
    return True


def _attempt(options: argparse.Namespace, beam_flags: list[str], run: RunSummary) -> int:
    commands: dict[str, Callable[[argparse.Namespace, list[str]], int]] = {
        "manifest": _manifest,
        "check": functools.partial(_check, run),
        "build": functools.partial(_build, run),
        "verify": functools.partial(_verify, run),
        "inspect": _inspect,
        "diff": _diff,
        "extract": _extract,
        "report": functools.partial(_make_report, run),
        "view": _view,
        "card": _card,
    }
    try:
        return commands[options.command](options, beam_flags)
    except UnwritableError as e:
        return _unprinted(e)
    except BeamNiftiError as e:
        run.fail(e)
        return _complain(e, exit_code(e))
    except OSError as e:
        run.fail(e, reason_of(e))
        return _complain(reason_of(e), exit_code(e))
    except KeyboardInterrupt as e:
        run.fail(e)
        if sys.stderr.isatty():
            print(file=sys.stderr)  # after ^C
        again = "continues where it stopped" if options.command == "build" else "starts over"
        logs.LOGGER.warning("stopped; the same command %s", again)
        return INTERRUPTED


@contextlib.contextmanager
def _all_read() -> Iterator[None]:
    """Print what a command is for."""
    try:
        yield
    finally:
        sys.stdout.flush()


@contextlib.contextmanager
def _while_read() -> Iterator[None]:
    """Print what a command has done; its exit code stands where that cannot be printed."""
    try:
        with _all_read():
            yield
    except UnwritableError as e:
        if not isinstance(e.__cause__, BrokenPipeError):
            logs.LOGGER.warning("what was done could not be printed: %s", e)


def _print_line(text: str) -> None:
    """Print a line, whatever line breaks its names have."""
    print(one_line(text))


def _unprinted(error: UnwritableError) -> int:
    cause = cast(OSError, error.__cause__)
    if isinstance(cause, BrokenPipeError):  # its reader has seen enough
        return CUT_SHORT
    return _complain(error, exit_code(cause))


def _complain(error: Exception | str, code: int) -> int:
    logs.LOGGER.error("%s", error)
    return code


def _require_out(path: str, *, overwrite: bool, inputs: Mapping[str, str | None] | None = None) -> None:
    """Refuse, before any work, a file that is there already, is in use otherwise, or cannot be written."""
    require_apart(path, "--out", inputs)
    storage.require_writable(storage.absolute(path), "--out")
    if not overwrite and storage.exists(storage.absolute(path)):
        raise OutputError(f"{path}: is there already; choose another, or --overwrite to replace it")


def _manifest(options: argparse.Namespace, _: list[str]) -> int:
    from beam_nifti.manifest import discovery
    from beam_nifti.manifest.tables import format_delimited, write_table

    out = options.out and storage.absolute(options.out)
    if out:
        is_table = options.source == "bids" and _is_study_table(out, options.folder)
        inputs = {"a table of the study": out if is_table else None}
        _require_out(options.out, overwrite=options.overwrite, inputs=inputs)
    folder = storage.dirname(out) if out else ""
    if options.source == "bids":
        found = discovery.find_bids_images(
            options.folder,
            options.suffix,
            folder,
            entities=chosen_entities(options),
            label=options.label,
            columns=options.column or (),
            all_images=options.all_images,
        )
    else:
        found = discovery.find_matching_images(options.pattern, folder, all_images=options.all_images)
    for note in found.notes:
        logs.LOGGER.warning("%s", note)
    if out:
        write_table(out, found.table)
        with _while_read():
            _print_line(f"manifest {counted(found.table.num_rows, 'image')}: {options.out}")
        return SUCCESS
    with _all_read():
        write_result(format_delimited(found.table, "\t"))
    return SUCCESS


def _is_study_table(path: str, study: str) -> bool:
    name = path.rpartition("/")[2]
    return storage.is_within(path, study) and (name == "participants.tsv" or name.endswith("_sessions.tsv"))


def _build(run: RunSummary, options: argparse.Namespace, beam_flags: list[str]) -> int:
    manifest, output = storage.absolute(options.manifest), storage.absolute(options.output)
    run.know(dry_run=options.dry_run, manifest=manifest, output=output)
    config = build_config(options)
    if options.dry_run and not beam_flags:
        return _dry_run(run, config)  # sooner, as it needs no Beam
    from beam_nifti.cli.beam_flags import choose_engine
    from beam_nifti.pipeline.build import open_build
    from beam_nifti.pipeline.runners import write_template

    engine = choose_engine(config, beam_flags, options.workers)
    run.runner = engine.runner
    if options.dry_run:
        return _dry_run(run, engine.config)
    _remove_earlier(options)
    with open_build(engine.config) as plan:
        _note_plan(run, plan)
        if engine.is_template:
            run.dry_run = True
            try:
                write_template(plan, engine.options)
            except Exception as e:
                return _stopped(run, e, "the template was not written", "starts again")
            return SUCCESS
        return _run(run, plan, engine, quiet=options.quiet)


def _remove_earlier(options: argparse.Namespace) -> None:
    """Forget how an earlier run ended; once Beam knows its flags, as some are for the storage."""
    if options.summary_json is not None:
        if storage.is_remote(options.summary_json):
            require_apart(options.summary_json, "--summary-json", _inputs(options))
            storage.require_writable(storage.absolute(options.summary_json), "--summary-json")
        remove_earlier(options.summary_json)


def _note_plan(run: RunSummary, plan: BuildPlan) -> None:
    splits = {split: size * (plan.num_frames or 1) for split, size in plan.split_sizes.items()}
    run.know(fingerprint=plan.config.record.fingerprint, num_volumes=plan.num_examples, splits=splits)


def _note_end(run: RunSummary, summary: BuildSummary, metrics: Metrics) -> None:
    run.know(
        num_examples=summary.num_written,
        num_kept=metrics.counters.get("volumes-skipped", 0),
        num_failed=summary.num_failed,
        failures=summary.failures,
        failure_reasons=[asdict(group) for group in summary.reasons],
        failures_path=summary.failures_path or None,
        num_shards=summary.num_shards,
        num_bytes=summary.num_bytes,
        counters=metrics.counters,
        distributions=metrics.distributions,
    )
    for warning in warnings_of(metrics.counters):
        logs.LOGGER.warning("%s", warning)


def _run(run: RunSummary, plan: BuildPlan, engine: Engine, *, quiet: bool) -> int:
    from beam_nifti.pipeline.build import run_build
    from beam_nifti.pipeline.publish import TooManyFailures

    progress = _progress(engine, plan.num_examples, "volume", quiet=quiet, plan=plan)
    noise = io.StringIO()
    try:
        with progress, _set_aside(noise, engine):
            summary, metrics = run_build(plan, engine.options)
    except TooManyFailures as e:
        _note_end(run, e.summary, e.metrics)
        run.fail(e)
        with _while_read():
            _report(plan, e.summary, e.metrics.counters)
        return _complain(
            f"{e}\n{'the dataset is unchanged' if plan.has_published else 'the dataset is not complete'}; "
            "repair the failed images and run the same command again, which loads only those, or accept the "
            "failures by adding that --max-bad-fraction",
            FAILED,
        )
    except Exception as e:
        return _stopped(run, e, "the build stopped", "continues where it stopped")
    sys.stderr.write(noise.getvalue())
    _note_end(run, summary, metrics)
    with _while_read():
        _report(plan, summary, metrics.counters)
    return SUCCESS


def _progress(
    engine: Engine, total: int, unit: str, *, quiet: bool, plan: BuildPlan | None = None
) -> contextlib.AbstractContextManager[None]:
    from beam_nifti.pipeline.progress import no_progress, show_progress

    if not quiet and engine.is_local and not engine.in_processes:
        return show_progress(total, unit)
    if not quiet and not engine.is_local and plan is not None:
        from beam_nifti.pipeline.follow import follow_build

        return follow_build(plan)
    return no_progress()


@contextlib.contextmanager
def _set_aside(noise: io.StringIO, engine: Engine) -> Iterator[None]:
    """Keep what a local runner writes on standard error from the screen."""
    from beam_nifti.pipeline.runners import quiet_processes

    with contextlib.ExitStack() as stack:
        if engine.in_processes:
            stack.enter_context(quiet_processes())
        if engine.is_local:
            beam = logging.getLogger("apache_beam")
            stack.callback(beam.setLevel, beam.level)
            beam.setLevel(logging.CRITICAL)
            stack.enter_context(contextlib.redirect_stderr(noise))
        yield


def _stopped(run: RunSummary, error: Exception, what: str, again: str) -> int:
    """Report why a pipeline failed: by its engine, or by a worker's exception."""
    outcome = engine_outcome(error)
    if outcome is None:
        raise error
    run.fail(error, outcome.reason)
    fix = "" if outcome.code == TEMPORARY else "fix this and "
    same = f"{fix}run the same command again, which"
    trace = None if outcome.is_explained else error
    logs.LOGGER.error("%s: %s; %s %s", what, outcome.reason, same, again, exc_info=trace)
    return outcome.code


def _report(plan: BuildPlan, summary: BuildSummary, counters: Mapping[str, int]) -> None:
    from beam_nifti.record.dataset_info import read_info

    output = plan.config.output
    if skipped := counters.get("volumes-skipped", 0):
        _print_line(f"kept     {counted(skipped, 'example')} of an earlier run")
    if plan.config.recheck and (num_compared := counters.get("examples-compared", 0)):
        num = counters.get("examples-differing", 0)
        found = f"{num:,} {'differs' if num == 1 else 'differ'}" if num else "none differs"
        found += ", rebuilt" if num and summary.complete else ""
        _print_line(f"compared {counted(num_compared, 'example')} with their images: {found}")
    _print_line(
        f"{'dataset' if summary.complete else 'so far '}  {counted(summary.num_written, 'example')}, "
        f"{counted(summary.num_shards, 'shard')}, {summary.num_bytes / 1e6:.1f} MB: {output}"
    )
    if summary.num_failed:
        _print_line(f"failed   {counted(summary.num_failed, 'volume')}, listed in {summary.failures_path}")
        if summary.complete:  # else the error has them
            from beam_nifti.pipeline.failures import format_groups

            for line in format_groups(summary.reasons, summary.num_failed):
                _print_line(f"         {line}")
    _print_labels(plan)
    if summary.complete:
        call = read_info(output).loading_call(output, batch_size=8)
        _print_line(f"read it  from beam_nifti.reader import load_dataset; dataset = {call}")


def _print_labels(plan: BuildPlan) -> None:
    from beam_nifti.manifest.labels import name_classes

    if plan.config.columns.label is None:
        _print_line(_NO_LABELS)
    for number, column in enumerate(plan.config.record.labels or ()):
        classes = column.classes or ()
        shown = name_classes(classes, _SHOWN_CLASSES)
        which = f", {len(classes)}: {shown}" if column.kind == "class" else ""
        _print_line(f"{'' if number else 'labels':<9}{column.name}: {column.kind}{which}")
    _print_unlabelled(plan)


def _print_unlabelled(plan: BuildPlan | CheckPlan) -> None:
    if plan.num_skipped:
        _print_line(f"skipped  {counted(plan.num_skipped, 'row')} without a label")
    if plan.num_unlabelled:
        _print_line(f"kept     {counted(plan.num_unlabelled, 'row')} without a label")


def _dry_run(run: RunSummary, config: BuildConfig) -> int:
    from beam_nifti.pipeline.build import plan_build

    plan, estimate = plan_build(config)
    _note_plan(run, plan)
    run.know(num_shards=estimate.num_shards, num_bytes=estimate.num_bytes)
    shape = "×".join(map(str, estimate.shape))
    splits = ", ".join(f"{name} {count}" for name, count in estimate.splits.items())
    with _while_read():
        _print_line(f"would write to {plan.config.output}")
        _print_line(f"volumes  {estimate.num_volumes} of {shape} voxels ({splits})")
        _print_line(
            f"shards   {estimate.num_shards} of up to {counted(estimate.examples_per_shard, 'example')}"
        )
        _print_line(
            f"bytes    about {estimate.num_bytes / 1e6:.1f} MB, estimated from the first image's header"
        )
        if estimate.reuse:
            _print_reuse(estimate.reuse)
        _print_labels(plan)
    return SUCCESS


def _print_reuse(reuse: Reuse) -> None:
    for number, what in ((reuse.num_published, "the dataset"), (reuse.num_unfinished, "an unfinished build")):
        if number:
            unless = "" if reuse.is_checked else ", unless their images have changed"
            _print_line(f"keep     {counted(number, 'example')} from {what}{unless}")
    _print_line(f"rebuild  {counted(reuse.num_rebuilt, 'example')}")
    if reuse.replaced:
        size = sum(shard.num_bytes for shard in reuse.replaced) / 1e6
        shards = counted(len(reuse.replaced), "shard")
        _print_line(
            f"delete   {shards} of revision {reuse.revision} ({size:.1f} MB), once the new ones are complete"
        )


def _check(run: RunSummary, options: argparse.Namespace, beam_flags: list[str]) -> int:
    from beam_nifti.cli.beam_flags import choose_engine

    engine = choose_engine(check_config(options), beam_flags, options.workers, "check")
    if not engine.is_local and options.out is None:
        raise UsageError(
            "--out is missing; give a path that the workers can write to, such as gs://my-bucket/check.json"
        )
    # After the engine, which imports Beam as it should be.
    from beam_nifti.pipeline.build import plan_check
    from beam_nifti.pipeline.check import check_images
    from beam_nifti.pipeline.survey import format_report

    _remove_earlier(options)
    if options.out is not None:
        _require_out(options.out, overwrite=True, inputs=_inputs(options))
    plan = plan_check(engine.config)
    config = plan.config
    run.know(runner=engine.runner, manifest=config.manifest, fingerprint=config.record.fingerprint)
    progress = _progress(engine, plan.num_rows, "image", quiet=options.quiet)
    try:
        with progress, _set_aside(io.StringIO(), engine):
            report = check_images(plan, engine.options, options.out)
    except Exception as e:
        return _stopped(run, e, "the check stopped", "starts over")
    num_bad, num_images = report["num_bad"], report["num_images"]
    run.know(num_volumes=num_images, num_failed=num_bad)
    with _while_read():
        if options.json:
            print(dump_json(report, indent=2))
        else:
            print(format_report(report))
            _print_unlabelled(plan)
    if across := report["twins_across_splits"]:
        logs.LOGGER.warning("%s", _leak_warning(across))
    if plan.refusal:
        raise UsageError(f"a build with these flags would write nothing: {plan.refusal}")
    return SUCCESS if config.allows_failures(num_bad, num_images) else FAILED


def _leak_warning(across: Sequence[Mapping[str, str]]) -> str:
    named = " and ".join(f"{name} ({split})" for name, split in across[0].items())
    return (
        f"{counted(len(across), 'image')} probably in several splits, such as {named}: their sizes and "
        "first 64 KB are equal. Keep one of them, or give them one split"
    )


def _verify(run: RunSummary, options: argparse.Namespace, _: list[str]) -> int:
    from beam_nifti.inspection.verify import ALL, verify_dataset
    from beam_nifti.pipeline.progress import METER, no_progress, show_progress
    from beam_nifti.record.dataset_info import read_info

    deep = None
    if options.deep is not None:
        try:
            deep = ALL if options.deep == "all" else parse_integer(options.deep)
        except ValueError:
            raise UsageError(f"--deep is {options.deep!r}; give a number of records, or all") from None
    if options.preprocess is not None and deep is None:
        raise UsageError("--preprocess is for --deep, which makes records again; add --deep, or drop it")
    _remove_earlier(options)
    run.output = storage.absolute(options.output)
    info = read_info(options.output)
    total = info.num_examples
    run.know(fingerprint=info.config.get("fingerprint"), num_volumes=total)
    with no_progress() if options.quiet else show_progress(total, unit="record"):
        report = verify_dataset(
            options.output,
            manifest=options.manifest,
            anonymous_ids=options.anonymous_ids,
            deep=deep,
            preprocess=options.preprocess,
            workers=choose_workers(options),
            on_progress=METER.add,
        )
    run.know(
        num_examples=report.num_examples,
        num_shards=report.num_shards,
        num_bytes=report.num_bytes,
        num_deep=report.num_deep,
        num_problems=len(report.problems),
    )
    for problem in report.problems:
        logs.LOGGER.warning("%s", problem)
    for note in report.notes:
        logs.LOGGER.info("%s", note)
    made_again = f", {report.num_deep} made again from their images" if report.num_deep else ""
    with _while_read():
        _print_line(
            f"{'right' if report.ok else 'WRONG'}    {counted(report.num_examples, 'example')}, "
            f"{counted(report.num_shards, 'shard')}, {report.num_bytes / 1e6:.1f} MB{made_again}: "
            f"{options.output}"
        )
    return SUCCESS if report.ok else FAILED


def _inspect(options: argparse.Namespace, _: list[str]) -> int:
    from beam_nifti.inspection.description import describe_dataset, describe_record, format_description

    if options.record is not None:
        description = describe_record(options.output, options.record)
    else:
        description = describe_dataset(options.output)
    with _all_read():
        print(dump_json(description, indent=2) if options.json else format_description(description))
    return SUCCESS


def _diff(options: argparse.Namespace, _: list[str]) -> int:
    from beam_nifti.inspection.diff import compare_datasets, diff_as_json, format_diff

    diff = compare_datasets(options.before, options.after)
    with _all_read():
        print(dump_json(diff_as_json(diff), indent=2) if options.json else format_diff(diff))
    return SUCCESS if diff.is_empty else FAILED


def _extract(options: argparse.Namespace, _: list[str]) -> int:
    from beam_nifti.inspection.extract import choose_paths, read_volumes

    ids = list(dict.fromkeys(options.id))
    paths = choose_paths(ids, options.out, "_mask" if options.mask else "")
    for path in paths:
        _require_out(path, overwrite=options.overwrite)
    for volume, path in zip(read_volumes(options.output, ids), paths, strict=True):
        written = volume.of_mask() if options.mask else volume
        written.save(storage.absolute(path))
        with _while_read():
            shape = "×".join(map(str, written.voxels.shape))
            _print_line(f"image    {shape} {written.voxels.dtype}: {path}")
    return SUCCESS


def _make_report(run: RunSummary, options: argparse.Namespace, beam_flags: list[str]) -> int:
    from beam_nifti.cli.beam_flags import choose_engine
    from beam_nifti.record.dataset_info import read_info

    _require_report_extra("jinja2", "matplotlib", "PIL")
    engine = choose_engine(report_config(options), beam_flags, options.workers, "report")
    if engine.is_template:
        raise UsageError("--template-location is for build only: a report is made when its job has ended")
    if not engine.is_local and options.out is None:
        raise UsageError(
            "--out is missing; give a path that the workers can write to, such as gs://my-bucket/report.html"
        )
    out = options.out or "report.html"
    # After the engine, which imports Beam as it should be.
    from beam_nifti.reporting.report import write_report

    info = read_info(options.output)
    progress = _progress(engine, info.num_examples, "record", quiet=options.quiet)
    try:
        with progress, _set_aside(io.StringIO(), engine):
            summary = write_report(options.output, info, out, engine.options, num_pictures=options.pictures)
    except Exception as e:
        return _stopped(run, e, "the report stopped", "starts over")
    for problem in summary.problems:
        logs.LOGGER.warning("%s", problem)
    with _while_read():
        examples = counted(summary.num_examples, "example")
        outliers = counted(summary.num_outliers, "outlier")
        failed, skipped = counted(summary.num_failures, "volume"), counted(summary.num_skipped, "row")
        _print_line(
            f"report   {examples}, {outliers}, {failed} failed, {skipped} skipped, "
            f"{summary.num_bytes / 1e6:.1f} MB: {out}"
        )
    return FAILED if summary.problems else SUCCESS


def _view(options: argparse.Namespace, _: list[str]) -> int:
    from beam_nifti.inspection.extract import file_name, read_volume
    from beam_nifti.reporting.view import make_view

    _require_report_extra("jinja2", "nilearn")
    out = options.out or file_name(options.id, ".html")
    path = storage.absolute(out)
    if options.open and storage.is_remote(path):
        raise UsageError(f"--open is for a file of this machine, and --out is {out}; leave one of them out")
    _require_out(out, overwrite=options.overwrite)
    volume = read_volume(options.output, options.id)
    page = make_view(volume, channel=options.channel, with_mask=options.mask).encode()
    storage.write(path, page)
    with _while_read():
        _print_line(f"view     {len(page) / 1e6:.1f} MB: {out}")
    if options.open:
        webbrowser.open(Path(path).as_uri())
    return SUCCESS


def _card(options: argparse.Namespace, _: list[str]) -> int:
    from beam_nifti.inspection.card import write_card

    words = {
        "name": options.name,
        "description": options.description,
        "license": options.license,
        "url": options.url,
        "citeAs": options.citation,
    }
    about = {key: text for key, text in words.items() if text is not None}
    for path in write_card(options.output, about, overwrite=options.overwrite):
        with _while_read():
            _print_line(f"card     {path}")
    return SUCCESS


def _require_report_extra(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"not installed: {', '.join(missing)}; pip install 'beam-nifti[report]'")
