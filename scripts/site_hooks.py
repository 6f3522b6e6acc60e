"""What `mkdocs build` does beside the themes and plugins of mkdocs.yml.

The site gets the layout of the repository: README.md is its front page, docs/format.md is docs/format/, and
so on. So a relative link that is right in the repository is right on the site, and none is rewritten. A
comment `<!-- reference: NAME -->` is replaced by the reference of NAME: for beam-nifti, that of the command
line; for a module, class or function, its docstrings.
"""

from __future__ import annotations

import argparse
import html
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from beam_nifti.cli import parser as options

ROOT = Path(__file__).parent.parent
OUTSIDE_OF_DOCS = ("*.md", "LICENSE", "examples/*.py", "examples/*.ipynb", "pipelines/*.py")

_REFERENCE = re.compile(r"^<!-- reference: (\S+) -->$", re.M)
_CELL_OF_CODE = re.compile(r"`[^`]*`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Call every file by its path in the repository, and add those outside of docs/ that pages link to."""
    docs = Path(config.docs_dir)
    paths = [Path(f.abs_src_path) for f in files if f.abs_src_path and docs in Path(f.abs_src_path).parents]
    paths += sorted(path for pattern in OUTSIDE_OF_DOCS for path in ROOT.glob(pattern))
    kept = [f for f in files if f.abs_src_path is None or docs not in Path(f.abs_src_path).parents]
    return Files([*kept, *(_file(path, config) for path in paths)])


def _file(path: Path, config: MkDocsConfig) -> File:
    return File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put references in their places, and remove the escapes that only GitHub's tables need."""
    lines = (_unescape(line) if line.startswith("|") else line for line in markdown.splitlines())
    return _REFERENCE.sub(lambda match: _reference(match[1]), "\n".join(lines))


def _unescape(row: str) -> str:
    """Write a bar within code as itself, as Python-Markdown has it; GitHub wants a backslash before."""
    return _CELL_OF_CODE.sub(lambda code: code[0].replace(r"\|", "|"), row)


def _reference(name: str) -> str:
    return "\n".join(_command_line(options.make_parser())) if name == "beam-nifti" else f"::: {name}"


def _command_line(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The Markdown of a command, and of those below it."""
    for command in commands(parser):
        positional = [action for action in command._actions if not action.option_strings]
        names = " ".join(f"{a.metavar}{'…' if a.nargs == '+' else ''}" for a in positional)
        yield from (f"## {command.prog} {{ #{command.prog.replace(' ', '-')} }}", "")
        yield from (f"{command.description}", "", "```text", f"{command.prog} [OPTION…] {names}", "```", "")
        arguments, flags, *groups = command._action_groups
        yield from _table([*arguments._group_actions, *flags._group_actions])
        for group in groups:
            title = str(group.title)
            yield from (f"**{title[0].upper()}{title[1:]}.** {group.description or ''}", "")
            yield from _table(group._group_actions)
        examples = (command.epilog or "").removesuffix(options.EXIT_CODES).removeprefix("examples:\n")
        code, _, remarks = examples.partition("\n\n")
        if code:
            yield from ("```bash", re.sub("^  ", "", code, flags=re.M), "```", "", remarks, "")
    yield from ("## Exit codes", "", "```text", options.EXIT_CODES.partition("\n")[2].rstrip(), "```")


def commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers below this one that have none below them."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [c for action in below for p in action.choices.values() for c in commands(p)] or [parser]


def _table(actions: list[argparse.Action]) -> Iterator[str]:
    rows = [_row(action) for action in actions if not isinstance(action, argparse._HelpAction)]
    yield from ("<table>", *rows, "</table>", "") if rows else ()


def _row(action: argparse.Action) -> str:
    value = action.metavar or "|".join(map(str, action.choices or ()))
    shown = [f"{flag} {value}" if action.nargs != 0 else flag for flag in action.option_strings] or [value]
    name = html.escape(", ".join(map(str, shown))).replace("|", "|<wbr>")
    here = re.compile(r" \(\d+ here\)")  # cores of the machine that builds this
    text = re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(here.sub("", action.help or "")))
    return f"<tr><td><code>{name}</code></td><td>{text}</td></tr>"
