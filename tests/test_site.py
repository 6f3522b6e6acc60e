"""The documents as a site, in an environment that has MkDocs: `scripts/check` makes .venv-docs."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

from beam_nifti.cli import parser as options

pytest.importorskip("mkdocs", reason="MkDocs is not installed; scripts/check has an environment for it")

from scripts import site_hooks

ROOT = Path(__file__).parent.parent


def build(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """`mkdocs build --strict` into a folder."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


def text_of(page: Path) -> str:
    """What a page shows."""
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text().replace("</td>", " ")))


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loaded = re.compile(
        r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"((?:https?:)?//[^\"]+)|url\((https?:[^)]+)"
    )
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert files
    assert {m[0] for file in files for m in loaded.finditer(file.read_text())} == set()


def test_the_page_of_the_command_line_has_every_command_and_flag(site: Path) -> None:
    text = text_of(site / "docs/cli/index.html")
    shown = set(re.findall(r"--[\w-]+", text))
    for command in site_hooks.commands(options.make_parser()):
        assert f"{command.prog} [OPTION…]" in text
        assert set(command._option_string_actions) - {"-h", "--help"} <= shown
    assert "75   another command is writing to OUTPUT" in text


def test_every_reference_is_there(site: Path) -> None:
    names = re.findall(r"^<!-- reference: (beam_nifti\S+) -->$", (ROOT / "docs/api.md").read_text(), re.M)
    page = (site / "docs/api/index.html").read_text()
    assert [name for name in names if f'id="{name}"' not in page] == []
    assert "Parameters:" in text_of(site / "docs/api/index.html")


def test_code_in_tables_and_lists_is_what_github_shows(site: Path) -> None:
    assert "… | head -1" in text_of(site / "docs/cli/index.html")
    pages = list(site.rglob("*.html"))
    assert [str(page) for page in pages if re.search(r"\\\||```|\|---", text_of(page))] == []


def test_a_page_that_the_navigation_forgets_is_an_error(tmp_path: Path) -> None:
    config = (ROOT / "mkdocs.yml").read_text().replace("docs_dir: docs", f"docs_dir: {ROOT}/docs")
    config = config.replace("[scripts/site_hooks.py]", f"[{ROOT}/scripts/site_hooks.py]").replace(
        "watch:", "# watch:"
    )
    forgetful = tmp_path / "mkdocs.yml"
    forgetful.write_text(config.replace("      - Reading: docs/reading.md\n", ""))
    done = build(tmp_path / "site", "--config-file", str(forgetful))
    assert done.returncode == 1
    assert re.search(
        r"WARNING.*not included in the \"nav\" configuration:\n\s+- docs/reading.md\n", done.stderr
    )
