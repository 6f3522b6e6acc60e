"""Parses the command line. Neither this module nor its imports load Beam or TensorFlow."""

from __future__ import annotations

import argparse
import itertools
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, Final, NoReturn

from beam_nifti import __version__
from beam_nifti.cli import build_options, dataset_options, manifest_options
from beam_nifti.cli.common_options import EXIT_CODES, add_log_format
from beam_nifti.errors import UsageError
from beam_nifti.record.versions import VERSIONED
from beam_nifti.support.arguments import dashed, refuse_swallowed, suggest_flag, underscored
from beam_nifti.support.terminal import write_result

BEAM_COMMANDS = ("analyze", "build", "check", "report")
"""Commands that run a pipeline, and therefore accept Beam's flags."""


_SWITCH_WITH_VALUE: Final = re.compile(r"argument (--[\w-]+)(?:/\S+)?: ignored explicit argument '(.*)'")


class _Parser(argparse.ArgumentParser):
    """Raises errors instead of printing them with the usage, and ignores no value."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_swallowed(self)

    def error(self, message: str) -> NoReturn:
        """Refuse a command line.

        Raises:
            UsageError: always.
        """
        if with_value := _SWITCH_WITH_VALUE.fullmatch(message):
            raise UsageError(f"{with_value[1]} takes no value; drop ={with_value[2]}")
        raise UsageError(f"{message}; see `{self.prog} --help`")


class _Versions(argparse.Action):
    """`--version`; the libraries' versions are looked up only if it is given."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"beam-nifti {__version__}")
        for name in VERSIONED:
            print(f"{name} {metadata.version(name)}")
        print(f"Python {platform.python_version()}")
        parser.exit()


class _Completion(argparse.Action):
    """`--print-completion`; the code that makes the script is loaded only if it is given."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: object, *__: object) -> None:
        from beam_nifti.cli.completion import make_completion

        write_result(make_completion(parser, str(shell)))
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser: argparse.ArgumentParser = _Parser(
        prog="beam-nifti",
        description="Turn NIfTI volumes into sharded TFRecords for training, on one machine or a cluster.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version",
        action=_Versions,
        help="print the versions of beam-nifti and of the libraries that affect the output",
    )
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        choices=("bash", "zsh", "tcsh"),
        help="print a script with which the shell completes commands, flags, values and paths; for bash: "
        'eval "$(beam-nifti --print-completion bash)"',
    )
    add_log_format(parser, "text")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for group in (manifest_options, build_options, dataset_options):
        group.add_commands(commands)
    return parser


def find_log_format(argv: Sequence[str]) -> str:
    """The `--log-format` of a command line, even if its other arguments are invalid."""
    try:
        return _read_log_format(argv)
    except UsageError:
        return "text"


def _read_log_format(argv: Sequence[str]) -> str:
    """The `--log-format` before or after the command; it may be given once."""
    parser = _Parser(prog="beam-nifti", add_help=False, allow_abbrev=False)
    add_log_format(parser, "text")
    return str(parser.parse_known_args([dashed(a) for a in argv])[0].log_format)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command line.

    Args:
        argv: arguments without the program's name. Flags may be written with - or _.

    Returns:
        Our options, and the flags for Beam (only for BEAM_COMMANDS).

    Raises:
        UsageError: an option is malformed, empty or given twice; or an argument is unknown to a command
            that passes no flags to Beam.
        SystemExit: raised by argparse after --help and --version.
    """
    arguments = [dashed(a) for a in argv]
    known, rest = make_parser().parse_known_args(arguments)
    _read_log_format(argv)
    if known.command in BEAM_COMMANDS:
        _refuse_strays(arguments, rest)
    elif rest:
        source = getattr(known, "source", None)
        raise UsageError(explain_unknown(rest[0], f"{known.command} {source}" if source else known.command))
    return known, [underscored(a) for a in rest]


def _refuse_strays(arguments: Sequence[str], rest: Sequence[str]) -> None:
    """Refuse remaining values that do not belong to a flag of Beam's.

    `--flag value MANIFEST OUTPUT` leaves `--flag OUTPUT`: argparse does not know that the flag has a value.
    """
    for before, argument in zip(("", *rest), rest, strict=False):
        follows = any(pair == (before, argument) for pair in itertools.pairwise(arguments))
        if argument.startswith("--") or (before.startswith("--") and "=" not in before and follows):
            continue
        raise UsageError(
            f"unknown argument {argument}; write the values of Apache Beam's flags as --flag=VALUE"
        )


def explain_unknown(argument: str, command: str, further: Iterable[str] = ()) -> str:
    """Explain why a command, such as "manifest bids", refuses an argument; Beam may have further flags."""
    if not argument.startswith("--"):
        return f"unknown argument {argument}; see `beam-nifti {command} --help`"
    flag = dashed(argument.partition("=")[0])
    known = flags_of_commands()
    others = [name for name, flags in known.items() if flag in flags]
    if others:
        *first, last = others
        which = f"{', '.join(first)} and {last}" if first else last
        return f"{flag} is an option of {which}, not of {command}; drop it"
    hint = suggest_flag(flag, [*known[command], *further]) or f"see `beam-nifti {command} --help`"
    return f"unknown flag {flag}; {hint}"


def flags_of_commands() -> Mapping[str, list[str]]:
    """The flags of every command, by its name, such as "manifest bids"."""
    return {
        name: [f for f in parser._option_string_actions if f.startswith("--")] for name, parser in commands()
    }


def commands() -> Iterable[tuple[str, argparse.ArgumentParser]]:
    """Name and parser of every command; a command with subcommands is replaced by these."""
    yield from _commands_of(make_parser(), "")


def _commands_of(parser: argparse.ArgumentParser, name: str) -> Iterable[tuple[str, argparse.ArgumentParser]]:
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        yield name, parser
    for group in groups:
        for word, command in group.choices.items():
            yield from _commands_of(command, f"{name} {word}".strip())
