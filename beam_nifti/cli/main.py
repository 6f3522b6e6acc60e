"""beam-nifti: the commands. Beam and the rest are imported only by the command that needs them."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NoReturn, cast

from beam_nifti.cli import build_commands, dataset_commands, init_command, manifest_command
from beam_nifti.cli import parser as command_line
from beam_nifti.cli.printing import all_read, complain, report_unprinted
from beam_nifti.cli.run_summary import RunSummary, require_reports_writable, write_document
from beam_nifti.errors import BeamNiftiError, EngineError, UsageError
from beam_nifti.storage import paths as storage
from beam_nifti.support import logs
from beam_nifti.support.outcomes import (
    FAILED,
    INTERRUPTED,
    SUCCESS,
    TEMPORARY,
    TERMINATED,
    USAGE,
    exit_code,
    reason_of,
)
from beam_nifti.support.terminal import UnwritableError, guarded_streams

_NOT_LOGGED: Final = {"error", "failure_reasons", "counters", "distributions"}
"""Fields of a run's summary that are not logged. Errors may name participants."""

_AGAIN: Final = {
    "the build stopped": "continues where it stopped",
    "the template was not written": "starts again",
}
"""What the same command does, by what was stopped."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit code: 0 success, 1 failure, 2 a wrong option, manifest or output,
        75 a failure that may pass, 130 Ctrl-C, 141 a result that nobody read to its end, 143 SIGTERM.

    Raises:
        SystemExit: with 1, in the place of an exception that nobody foresaw, whose traceback is printed.
    """
    arguments = sys.argv[1:] if argv is None else argv
    with guarded_streams(), logs.on_stderr(command_line.find_log_format(arguments)):
        try:
            storage.require_text(arguments)
            with all_read():  # --help and --version
                options, beam_flags = command_line.parse(arguments)
        except SystemExit:
            return SUCCESS
        except UsageError as e:
            return complain(e, USAGE)
        except UnwritableError as e:
            return report_unprinted(e)
        return _run_command(options, beam_flags)


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which a scheduler stops a command, as a person does by Ctrl-C."""


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
    raise Terminated("SIGTERM")


@contextlib.contextmanager
def _heeding_sigterm() -> Iterator[None]:
    """Raise Terminated at a SIGTERM during the block, unless somebody else handles or ignores it."""
    is_main = threading.current_thread() is threading.main_thread()
    is_ours = is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if is_ours:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run_command(options: argparse.Namespace, beam_flags: list[str]) -> int:
    """Run it, and write how it ended, whatever happens."""
    try:
        require_reports_writable(options)
    except (BeamNiftiError, OSError) as e:
        return complain(e if isinstance(e, BeamNiftiError) else reason_of(e), exit_code(e))
    run, code = RunSummary(options.command), None
    try:
        code = _attempt(options, beam_flags, run)
    finally:
        if code is None:
            run.fail(cast(BaseException, sys.exception()))
        run.end(code)
        is_told = _tell_end(run, options)
    return code if is_told else code or FAILED


def _tell_end(run: RunSummary, options: argparse.Namespace) -> bool:
    """Write the files that were asked for; False where one could not be written."""
    if options.log_format == "json":
        facts = {k: v for k, v in run.as_document().items() if v is not None and k not in _NOT_LOGGED}
        logs.LOGGER.info("%s ended: %s", run.command, run.status, extra=logs.fields(**facts))
    try:
        if getattr(options, "summary_json", None):
            write_document(options.summary_json, run)
        if run.command == "build" and options.metrics_file and not run.dry_run:
            from beam_nifti.cli.prometheus import write_metrics

            write_metrics(options.metrics_file, run)
    except OSError as e:
        logs.LOGGER.error("could not write the summary or metrics file: %s", reason_of(e))
        return False
    return True


def _attempt(options: argparse.Namespace, beam_flags: list[str], run: RunSummary) -> int:
    commands: dict[str, Callable[[RunSummary, argparse.Namespace, list[str]], int]] = {
        "init": init_command.init,
        "manifest": manifest_command.write_manifest,
        "check": build_commands.check,
        "analyze": build_commands.analyze,
        "build": build_commands.build,
        "verify": dataset_commands.verify,
        "convert": dataset_commands.convert,
        "relabel": dataset_commands.relabel,
        "withdraw": dataset_commands.withdraw,
        "inspect": dataset_commands.inspect,
        "diff": dataset_commands.diff,
        "extract": dataset_commands.extract,
        "report": dataset_commands.report,
        "view": dataset_commands.view,
        "card": dataset_commands.card,
    }
    try:
        with _heeding_sigterm():
            return commands[options.command](run, options, beam_flags)
    except UnwritableError as e:
        return report_unprinted(e)
    except EngineError as e:
        run.fail(cast(BaseException, e.__cause__), e.reason)
        return _report_engine(e)
    except BeamNiftiError as e:
        run.fail(e)
        return complain(e, exit_code(e))
    except OSError as e:
        run.fail(e, reason_of(e))
        return complain(reason_of(e), exit_code(e))
    except KeyboardInterrupt as e:
        run.fail(e)
        if sys.stderr.isatty():
            print(file=sys.stderr)  # after ^C
        again = (
            "continues where it stopped"
            if options.command in ("build", "convert", "relabel", "withdraw")
            else "starts over"
        )
        logs.LOGGER.warning("stopped; the same command %s", again)
        return TERMINATED if isinstance(e, Terminated) else INTERRUPTED


def _report_engine(error: EngineError) -> int:
    """Report why a pipeline failed; the exit code."""
    fix = "" if error.exit_code == TEMPORARY else "fix this and "
    again = _AGAIN.get(error.what, "starts over")
    trace = None if error.is_explained else error.__cause__
    logs.LOGGER.error("%s; %srun the same command again, which %s", error, fix, again, exc_info=trace)
    return error.exit_code
