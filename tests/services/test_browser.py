"""The pages of `beam-nifti report` and `view` in Chromium: work, load nothing, run nothing foreign."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from tests.reporting.test_report import NASTY, UPSIDE_DOWN, write_heads, write_study
from tests.services.conftest import LOCAL, run_cli, run_script

SCRIPT = Path(__file__).parents[2] / "scripts" / "browser"
PHONE, DESKTOP = 375, 1280
VOLUMES = 60
"""More than the wall shows at first."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, without a sandbox, as root has none."""
    program = run_script(SCRIPT, "install").splitlines()[-1]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of heads, one of them upside down and one with a name that wants to be markup."""
    folder = tmp_path_factory.mktemp("report")
    manifest = write_heads(folder / "images", VOLUMES)
    flags = ["--label-column=age:float,sex:class", "--allow-mixed-shapes", "--max-bad-fraction=0.5"]
    run_cli(["build", str(manifest), str(folder / "dataset"), *flags, "--workers=1", *LOCAL])
    run_cli(["report", str(folder / "dataset"), "--out", str(folder / "report.html"), *LOCAL])
    return folder / "report.html"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of heads with masks, of two sites, some of them copies."""
    folder = tmp_path_factory.mktemp("study")
    flags = ["--mask-column=mask", "--label-column=sex:class", "--rescale=none", "--workers=1", *LOCAL]
    run_cli(["build", str(write_study(folder / "images")), str(folder / "dataset"), *flags])
    run_cli(["report", str(folder / "dataset"), "--by=site", "--out", str(folder / "report.html"), *LOCAL])
    return folder / "report.html"


@pytest.fixture(scope="module")
def view(report: Path) -> Path:
    """The view of the volume whose name wants to be markup."""
    page = report.with_name("view.html")
    run_cli(["view", str(report.with_name("dataset")), "--id", NASTY, "--out", str(page)])
    return page


@dataclass
class Opened:
    """A page, and what happened while it was open.

    Attributes:
        page: Playwright's.
        errors: of the console, exceptions and dialogs.
        requests: URLs that are no data.
    """

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def ids(self) -> list[str]:
        """Those of the volumes on the wall."""
        return self.page.locator("#wall h3").all_text_contents()


def open_page(browser: Browser, path: Path, width: int = DESKTOP, theme: Any = "light") -> Opened:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=theme)
    opened = Opened(page)

    def dismiss(dialog: Any) -> None:
        opened.errors.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.set_default_timeout(5000)
    page.on("dialog", dismiss)
    page.on("console", lambda m: opened.errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: opened.errors.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith("data:") else opened.requests.append(r.url))
    page.goto(path.as_uri())
    return opened


@pytest.fixture
def opened(browser: Browser, report: Path) -> Iterator[Opened]:
    """The report on a desktop. Whatever a test does, nothing is loaded, and nothing goes wrong."""
    opened = open_page(browser, report)
    yield opened
    opened.page.close()
    assert opened.errors == []
    assert opened.requests == [report.as_uri()]


def test_it_renders_and_the_upside_down_head_is_first(opened: Opened) -> None:
    assert opened.ids()[0] == f"sub-{UPSIDE_DOWN:02}"
    assert opened.page.locator("section h3").first.text_content() == f"sub-{UPSIDE_DOWN:02}"
    images = opened.page.locator("img")
    images.last.scroll_into_view_if_needed()
    undecoded = "images => images.filter(i => i.complete && !i.naturalWidth).length"
    assert images.evaluate_all(undecoded) == 0
    assert opened.page.locator("img").first.evaluate("image => image.naturalWidth") > 0


def test_search_finds_ids_labels_and_shapes(opened: Opened) -> None:
    search = opened.page.get_by_label("Search")
    search.fill("sub-1 PIR")
    assert opened.ids()
    assert all(name.startswith("sub-1") for name in opened.ids())
    search.fill("nothing like it")
    assert opened.ids() == []
    assert opened.page.get_by_role("status").text_content() == f"0 of {VOLUMES} pictures"


def test_filters(opened: Opened) -> None:
    split = opened.page.locator("select[name=split]")
    split.select_option("test")
    assert len(opened.ids()) == VOLUMES / 4
    split.select_option("")
    opened.page.get_by_label("outliers only").check()
    outliers = opened.ids()
    assert f"sub-{UPSIDE_DOWN:02}" in outliers
    assert len(outliers) < 10


def test_sorting(opened: Opened) -> None:
    def sort(name: str) -> list[str]:
        opened.page.get_by_label("Sort by").select_option(label=name)
        return opened.ids()

    assert sort("correlation, lowest")[0] == f"sub-{UPSIDE_DOWN:02}"
    named = [name for name in sort("id") if name != NASTY]
    assert named == sorted(named)
    assert sort("age")[:3] == ["sub-00", "sub-01", "sub-02"]
    lowest, highest = sort("mean, lowest"), sort("mean, highest")
    assert lowest[:10] != highest[:10]


def test_the_rest_of_the_wall_comes_by_keyboard(opened: Opened) -> None:
    shown = len(opened.ids())
    assert shown < VOLUMES
    opened.page.get_by_role("button", name="Show more").focus()
    opened.page.keyboard.press("Enter")
    assert len(opened.ids()) == VOLUMES
    assert opened.page.get_by_role("button", name="Show more").is_hidden()
    assert opened.page.evaluate("document.activeElement.className") == "card"


def test_all_controls_are_reached_by_tab(opened: Opened) -> None:
    reached = set()
    for _ in range(20):
        opened.page.keyboard.press("Tab")
        reached.add(opened.page.evaluate("document.activeElement.name || document.activeElement.id"))
    assert {"search", "split", "sort", "outliers", "more"} <= reached


def test_a_name_that_wants_to_be_markup_is_text(opened: Opened) -> None:
    opened.page.get_by_label("Search").fill("alert(1)")
    assert opened.ids() == [NASTY]
    assert opened.page.locator("script").count() == 2
    assert opened.page.locator("[onerror], b:has-text('lost')").count() == 0
    assert "<b>lost</b>" in (opened.page.locator("#failures ~ div").text_content() or "")


def test_the_policy_forbids_other_scripts_and_images(browser: Browser, report: Path) -> None:
    opened = open_page(browser, report)
    ran = opened.page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
            const image = document.createElement("img");
            image.src = "https://example.org/a.png";
            document.body.append(image);
            return window.ran === true;
        }"""
    )
    assert not ran
    opened.page.wait_for_timeout(100)
    assert sum("Content Security Policy" in error for error in opened.errors) == 2
    opened.page.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_it_fits_and_axe_finds_nothing(browser: Browser, report: Path, width: int, theme: str) -> None:
    opened = open_page(browser, report, width, theme)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    opened.page.locator("details").evaluate_all("all => all.forEach(details => { details.open = true })")
    found = Axe().run(opened.page).response["violations"]
    assert [(v["id"], [node["html"] for node in v["nodes"]]) for v in found] == []
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    opened.page.close()
    assert opened.errors == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_masks_are_switched_off_and_axe_finds_nothing(
    browser: Browser, study: Path, width: int, theme: str
) -> None:
    opened = open_page(browser, study, width, theme)
    overlay = opened.page.locator("#wall .overlay").first
    assert overlay.evaluate("image => image.naturalWidth") > 0
    slices = opened.page.locator("#wall .view img").first
    assert overlay.bounding_box() == slices.bounding_box()
    opened.page.get_by_label("Masks", exact=True).focus()
    opened.page.keyboard.press("Space")
    assert not opened.page.locator(".overlay").evaluate_all(
        "all => all.some(image => image.checkVisibility())"
    )
    opened.page.get_by_label("Masks", exact=True).check()
    assert overlay.is_visible()
    found = Axe().run(opened.page).response["violations"]
    assert [(v["id"], [node["html"] for node in v["nodes"]]) for v in found] == []
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    opened.page.close()
    assert opened.errors == []
    assert opened.requests == [study.as_uri()]


def test_the_view_of_a_record_is_walked_through_and_loads_nothing(browser: Browser, view: Path) -> None:
    opened = open_page(browser, view)
    assert opened.page.get_by_role("heading").text_content() == NASTY
    canvas = opened.page.frame_locator("iframe").locator("canvas")
    canvas.wait_for(state="visible")
    before = canvas.screenshot()
    canvas.click(position={"x": 100, "y": 120})
    assert canvas.screenshot() != before
    opened.page.close()
    assert opened.requests == [view.as_uri()]
    # What the viewer asks for besides is an icon, which the policy refuses.
    assert [error for error in opened.errors if "favicon" not in error] == []


def test_the_view_of_a_record_is_read_on_a_phone(browser: Browser, view: Path) -> None:
    opened = open_page(browser, view, PHONE)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= PHONE
    opened.page.close()
