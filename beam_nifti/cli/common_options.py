"""Options that several commands share."""

from __future__ import annotations

import argparse
from typing import TypeAlias

from beam_nifti.support.logs import FORMATS as LOG_FORMATS
from beam_nifti.support.process import count_cores

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""The subparsers that commands are added to."""

EXIT_CODES = """\
exit codes:
  0    success
  1    more volumes failed than allowed, the dataset is missing, damaged or incomplete or has no record with
       that id, or two datasets differ
  2    an option, the manifest, OUTPUT or a path is wrong: fix it before running the command again
  75   another command is writing to OUTPUT, an engine or a store failed, or a disk is full: run the same
       command again later; it continues where it stopped
  130  stopped by Ctrl-C
  141  standard output was closed before the result was read
  143  stopped by SIGTERM
"""


def add_command(commands: Commands, name: str, summary: str, examples: str = "") -> argparse.ArgumentParser:
    """Add a command, with the options and the exit codes that all commands share.

    Args:
        commands: parsers to which the command is added.
        name: name of the command.
        summary: what it does, for the list of commands and for its own help.
        examples: shown at the end of its help.
    """
    command = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_log_format(command, argparse.SUPPRESS)  # keeps a value given before the command
    return command


def add_log_format(parser: argparse.ArgumentParser, default: str) -> None:
    """Add `--log-format`."""
    parser.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        default=default,
        help="format of messages on standard error: text (default), or json, one object per line, for log "
        "collectors",
    )


def add_output(command: argparse.ArgumentParser, note: str = "") -> None:
    """Add OUTPUT; its help ends with the note."""
    command.add_argument("output", metavar="OUTPUT", help=f"folder or URL of the dataset{note}")


def add_overwrite(group: argparse._ActionsContainer, what: str = "FILE") -> None:
    """Add `--overwrite`, which replaces existing files."""
    group.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def add_workers(group: argparse._ActionsContainer, note: str = "") -> None:
    """Add `--workers`; its help ends with the note. The value is None if it is not given."""
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help=f"number of threads; default: all cores ({count_cores()} here){note}",
    )


def add_beam(command: argparse.ArgumentParser) -> None:
    """Document that Beam's flags may be given."""
    command.add_argument_group(
        "Apache Beam",
        "Flags of Apache Beam are passed on. Write them in full, with their values after =, such as\n"
        "--runner=FlinkRunner --flink_master=HOST:8081. Flags that have no effect on the runner are refused.",
    )


def add_quiet(group: argparse._ActionsContainer) -> None:
    """Add `--quiet`."""
    group.add_argument("--quiet", action="store_true", help="print only results and errors, no progress")


def add_summary(group: argparse._ActionsContainer) -> None:
    """Add `--summary-json`."""
    group.add_argument(
        "--summary-json",
        metavar="FILE",
        help="write the status, counts, times and error to this file at the end, even if the command fails: "
        "a .json file or URL outside the dataset; docs/monitoring.md describes the fields; default: none",
    )
