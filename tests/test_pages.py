"""Every code block of README.md and docs/ is run, or says why it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import pages
from tests.pages import PAGES, ROOT


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _cases() -> list[object]:
    marks = {"tensorflow": pytest.mark.tf, "torch": pytest.mark.torch}
    return [
        pytest.param(page, id=_name(page), marks=[marks[x] for x in pages.libraries_of(page) if x in marks])
        for page in PAGES
        if any(block.is_run for block in pages.read_blocks(page))
    ]


@pytest.mark.parametrize("page", _cases())
def test_a_page_does_what_it_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages.STARTS[pages.start_of(page)](tmp_path)
    monkeypatch.chdir(tmp_path)
    pages.run_page(page)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_what_a_page_does_not_run_is_in_order(page: Path) -> None:
    for block in pages.read_blocks(page):
        pages.check_block(block)
