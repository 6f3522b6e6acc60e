"""beam-nifti: the commands. Beam and the rest are imported only by the command that needs them."""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from beam_nifti import local_runner
from beam_nifti import options as command_line
from beam_nifti.errors import (
    BeamNiftiError,
    ManifestError,
    OutputError,
    UsageError,
)

if TYPE_CHECKING:
    from apache_beam.options.pipeline_options import PipelineOptions

    from beam_nifti.config import BuildConfig
    from beam_nifti.plan import BuildPlan
    from beam_nifti.publish import BuildSummary

SUCCESS: Final = 0
FAILED: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130

_NO_LABELS: Final = "labels   none: the manifest has no column 'label' (see --label-column)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: without the program's name; None takes the process's own.

    Returns:
        The exit code: 0 success, 1 failure, 2 a wrong option, manifest or output.
    """
    commands = {"build": _build, "verify": _verify, "inspect": _inspect}
    try:
        options, beam_flags = command_line.parse(sys.argv[1:] if argv is None else argv)
    except SystemExit as e:  # argparse has already said what it has to say
        return e.code if isinstance(e.code, int) else USAGE
    except UsageError as e:
        return _complain(e, USAGE)
    try:
        return commands[options.command](options, beam_flags)
    except (UsageError, ManifestError, OutputError) as e:
        return _complain(e, USAGE)
    except BeamNiftiError as e:
        return _complain(e, FAILED)
    except OSError as e:
        return _complain(f"{e.filename}: {e.strerror}" if e.filename and e.strerror else e, USAGE)
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


def _build(options: argparse.Namespace, beam_flags: list[str]) -> int:
    config = command_line.build_config(options)
    if options.dry_run:
        return _dry_run(config)
    from beam_nifti.build import open_build

    beam_options, is_local = _beam_options(config, beam_flags)
    with open_build(config) as plan:
        return _run(plan, beam_options, is_local=is_local, quiet=options.quiet)


def _run(plan: BuildPlan, beam_options: PipelineOptions, *, is_local: bool, quiet: bool) -> int:
    from beam_nifti.build import run_build
    from beam_nifti.progress import no_progress, show_progress
    from beam_nifti.publish import TooManyFailures

    progress = show_progress(plan.num_rows) if is_local and not quiet else no_progress()
    noise = io.StringIO()
    if is_local:
        logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    try:
        with progress, contextlib.redirect_stderr(noise) if is_local else contextlib.nullcontext():
            summary, counters = run_build(plan, beam_options)
    except TooManyFailures as e:  # the runner's own account of it, many screens long, says no more
        with _while_read():
            _report(plan, e.summary, {})
        return _complain(
            f"{e}; {'the dataset stays as it was' if plan.published else 'the dataset is not complete'}. "
            "Repair those images and give the same command again, which loads only them, or leave them "
            "out with --max-bad-fraction",
            FAILED,
        )
    except RuntimeError as e:  # a worker's exception, which the runner brings back as text
        traceback.print_exception(e)
        reason = str(e).strip().rpartition("\n")[2]
        return _complain(f"the build stopped: {reason}; the same command continues where it was", FAILED)
    sys.stderr.write(noise.getvalue())
    with _while_read():
        _report(plan, summary, counters)
    return SUCCESS


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
    if plan.config.columns.label is None:
        print(_NO_LABELS)
    if summary.complete:
        print(f"read it  beam_nifti.reader.load_dataset({output!r}, batch_size=8)")


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
    if plan.config.columns.label is None:
        print(_NO_LABELS)
    print(f"  bytes   about {estimate.num_bytes / 1e6:.1f} MB, judged by the first image's header")
    return SUCCESS


def _beam_options(config: BuildConfig, flags: list[str]) -> tuple[PipelineOptions, bool]:
    """Beam's options, and whether the pipeline runs in this process."""
    # numpy's linear algebra is not used: its threads would only start, spin and take memory.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Beam says at import which of its optional packages are absent; none is needed here.
    logging.disable(logging.WARNING)
    # What is imported stays: collecting garbage among it would cost a third of the start.
    gc.disable()
    import apache_beam as beam
    from apache_beam.options import pipeline_options

    from beam_nifti import transforms  # noqa: F401

    gc.freeze()
    gc.enable()
    logging.disable(logging.NOTSET)
    parser = pipeline_options._BeamArgumentParser(allow_abbrev=False, add_help=False)
    for view in pipeline_options.PipelineOptions.__subclasses__():
        view._add_argparse_args(parser)
    known, unknown = parser.parse_known_args(flags)
    is_local = (known.runner or "") in local_runner.NAMES
    command_line.refuse_misspelled(unknown, strict=is_local)
    flags = list(flags)
    if is_local:
        flags.append(f"--runner={local_runner.RUNNER}")
        if not known.direct_num_workers or known.direct_num_workers == 1:
            flags.append(f"--direct_num_workers={config.workers}")
        if known.direct_running_mode == "in_memory" and "direct_running_mode" not in " ".join(flags):
            flags.append("--direct_running_mode=multi_threading")
    if config.temp_location is not None:
        flags.append(f"--temp_location={config.temp_location}")
    try:
        options = pipeline_options.PipelineOptions(flags)
        beam.Pipeline(options=options)
    except (ValueError, ImportError, AttributeError) as e:
        raise UsageError(f"Apache Beam does not accept these options: {e}") from e
    return options, is_local


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


if __name__ == "__main__":
    sys.exit(main())
