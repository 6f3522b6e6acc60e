"""The command line: from arguments to options. Neither this nor what it imports loads Beam or TensorFlow."""

from __future__ import annotations

import argparse
import difflib
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import NoReturn

from beam_nifti import __version__, options_build, options_dataset, options_manifest, storage
from beam_nifti.config import VERSIONED
from beam_nifti.errors import UsageError
from beam_nifti.options_common import EXIT_CODES, add_log_format
from beam_nifti.terminal import write_result

_PATHS = {
    "manifest": "MANIFEST",
    "output": "OUTPUT",
    "folder": "DIR",
    "out": "--out",
    "before": "BEFORE",
    "after": "AFTER",
    "anonymous_ids": "--anonymous-ids",
    "summary_json": "--summary-json",
    "metrics_file": "--metrics-file",
}
"""Arguments that no command takes empty, and how its help calls them."""


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print beside the usage of every flag."""

    def error(self, message: str) -> NoReturn:
        """Refuse a command line.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{message}; see `{self.prog} --help`")


class _Versions(argparse.Action):
    """`--version`; the libraries are looked up only when it is given."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"beam-nifti {__version__}")
        for name in VERSIONED:
            print(f"{name} {metadata.version(name)}")
        print(f"Python {platform.python_version()}")
        parser.exit()


class _Completion(argparse.Action):
    """`--print-completion`; what makes it is loaded only when it is given."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: object, *__: object) -> None:
        from beam_nifti.completion import make_completion

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
        "--version", action=_Versions, help="show the version, and those of the libraries that decide bytes"
    )
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        choices=("bash", "zsh", "tcsh"),
        help="print what makes a shell complete commands, flags, their values and paths; for bash: "
        'eval "$(beam-nifti --print-completion bash)"',
    )
    add_log_format(parser, "text")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for group in (options_manifest, options_build, options_dataset):
        group.add_commands(commands)
    return parser


def find_log_format(argv: Sequence[str]) -> str:
    """The `--log-format` of a command line that may be wrong elsewhere."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_log_format(parser, "text")
    try:
        return str(parser.parse_known_args([_dashed(a) for a in argv])[0].log_format)
    except argparse.ArgumentError:
        return "text"


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command line.

    Args:
        argv: without the program's name. Flags may be written with - or _.

    Returns:
        Our options, and the flags that are for Beam (none but for `build`, `check` and `report`).

    Raises:
        UsageError: a malformed option, or a flag that no command of ours knows, where Beam gets none.
        SystemExit: argparse's own, after --help and --version.
    """
    parser = make_parser()
    known, rest = parser.parse_known_args([_dashed(a) for a in argv])
    for name, shown in _PATHS.items():
        if getattr(known, name, None) == "":
            raise UsageError(f"{shown} is empty; was a variable not set?")
    _check_monitoring(known)
    if rest and (
        known.command not in ("build", "check", "report") or not all(a.startswith("--") for a in rest[:1])
    ):
        raise UsageError(f"unknown argument {rest[0]}; see `beam-nifti {known.command} --help`")
    return known, [_underscored(a) for a in rest]


def _check_monitoring(options: argparse.Namespace) -> None:
    """Refuse what would overwrite something else, or what nobody would find."""
    output = getattr(options, "output", None)
    for name, ending in (("summary_json", ".json"), ("metrics_file", ".prom")):
        path, flag = getattr(options, name, None), _PATHS[name]
        if path is None:
            continue
        if not path.endswith(ending):
            raise UsageError(f"{flag} is {path}; give a name that ends in {ending}")
        if output and storage.absolute(path).startswith(f"{storage.absolute(output)}/"):
            raise UsageError(f"{flag} is {path}; keep it out of OUTPUT, which holds the dataset alone")
        if name == "metrics_file" and storage.is_remote(path):
            raise UsageError(f"{flag} is {path}; node_exporter reads files of its own machine: give a path")


def _dashed(argument: str) -> str:
    return _renamed(argument, "_", "-")


def _underscored(argument: str) -> str:
    return _renamed(argument, "-", "_")


def _renamed(argument: str, old: str, new: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace(old, new)}{equals}{value}"


def refuse_misspelled(unknown: Sequence[str], *, strict: bool) -> None:
    """Refuse flags that are nobody's.

    Args:
        unknown: flags that neither we nor Beam's Python SDK know.
        strict: whether there is nobody else who could know them; a cluster's job service may.

    Raises:
        UsageError: naming the flag that was probably meant.
    """
    ours = [o for o in _build_flags() if o.startswith("--")]
    for argument in unknown:
        if not argument.startswith("--"):
            continue
        flag = _dashed(argument.partition("=")[0])
        close = difflib.get_close_matches(flag, ours, n=1, cutoff=0.75)
        if close or strict:
            hint = f"; did you mean {close[0]}?" if close else "; see `beam-nifti build --help`"
            raise UsageError(f"unknown flag {flag}{hint}")


def _build_flags() -> list[str]:
    parser = argparse.ArgumentParser()
    options_build.add_commands(parser.add_subparsers())
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return list(action.choices["build"]._option_string_actions)
