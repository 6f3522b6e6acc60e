"""What Dataflow starts for a Flex Template: its parameters become a `beam-nifti build`.

A template has named parameters only, each a text, so MANIFEST and OUTPUT are `--manifest` and
`--output` here, and flags without a value are `true` or `false`. `metadata.json` lists them all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from beam_nifti.cli import main as cli
from beam_nifti.cli.parser import make_parser

_SWITCHES = {"true": True, "false": False}


def main(argv: Sequence[str] | None = None) -> int:
    """Describe the build as a Dataflow job, and return an exit code."""
    parser = argparse.ArgumentParser(prog="launch.py", allow_abbrev=False)
    parser.add_argument("--manifest", required=True, help="table of images, on gs://")
    parser.add_argument("--output", required=True, help="folder of the dataset, on gs://")
    known, rest = parser.parse_known_args(argv)
    flags = [flag for given in rest for flag in _flag(given, parser)]
    return cli.main(["build", known.manifest, known.output, "--runner=DataflowRunner", *flags])


def _flag(given: str, parser: argparse.ArgumentParser) -> list[str]:
    """A parameter as our command line takes it: none, if it was left empty or is false."""
    name, _, value = given.partition("=")
    if name.replace("_", "-") not in switches():
        return [given] if value or "=" not in given else []
    if value.lower() not in _SWITCHES:
        parser.error(f"{name} is {value!r}; give true or false")
    return [name] if _SWITCHES[value.lower()] else []


def switches() -> set[str]:
    """The flags of `beam-nifti build` that take no value."""
    (action,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    actions = action.choices["build"]._actions
    return {flag for a in actions if a.nargs == 0 and a.dest != "help" for flag in a.option_strings}


if __name__ == "__main__":
    sys.exit(main())
