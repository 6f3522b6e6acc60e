"""Every code block of README.md and docs/ is run, or says why it is not."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests import pages
from tests.pages import PAGES, ROOT


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _cases() -> list[object]:
    marks = {"tensorflow": pytest.mark.tf}
    marks |= dict.fromkeys(("torch", "monai", "torchio", "lightning"), pytest.mark.torch)
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
    if absent := [x for x in sorted(pages.libraries_of(page)) if not importlib.util.find_spec(x)]:
        pytest.skip(f"all blocks but those that need {' and '.join(absent)} did")


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_what_a_page_does_not_run_is_in_order(page: Path) -> None:
    for block in pages.read_blocks(page):
        pages.check_block(block)


@pytest.mark.parametrize(
    "block",
    [
        "```console\n$ beam-nifti inspect cohort/dataset\ndataset  elsewhere\n```",
        "```bash\nbeam-nifti inspect nowhere\n```",
        "<!-- exit code: 1 -->\n```bash\nbeam-nifti inspect cohort/dataset\n```",
        "```python\nprint(1)\n```\n\n<!-- output -->\n```\n2\n```",
        "```bash\nfalse | cat\n```",
    ],
)
def test_a_page_that_shows_something_else_is_found_out(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages.STARTS["dataset"](tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text(f"# Page\n\n{block}\n")
    with pytest.raises(AssertionError, match=r"page\.md:\d"):
        pages.run_page(tmp_path / "page.md")


@pytest.mark.parametrize(
    "block",
    [
        "<!-- not run: no images -->\n```bash\nbeam-nifti build a.csv b --rescale=what\n```",
        "<!-- not run: no images -->\n```bash\nbeam-nifti verify b --no-such-thing\n```",
        "<!-- not run: it takes long -->\n```bash\npython benchmarks/no_such_thing.py\n```",
        "<!-- not run -->\n```bash\ntrue\n```",
        "<!-- no_such_library -->\n```python\nimport no_such_library\n```",
        "```perl\n1\n```",
        "```\n$ true\n```",
    ],
)
def test_a_block_that_cannot_be_right_is_found_out(block: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"# Page\n\n{block}\n")
    (found,) = pages.read_blocks(tmp_path / "page.md")
    with pytest.raises(AssertionError, match=r"page\.md:\d"):
        pages.check_block(found)
