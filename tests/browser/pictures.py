"""Takes the pictures of the page that README and docs show: `python -m tests.browser.pictures [PROMPT] [SEED]`."""

import logging
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from tests.browser.conftest import ARGUMENTS, CHROMIUM
from tests.browser.live import ROOT, live_server

FOLDER = ROOT / "docs" / "images"
PATIENCE_MS = 120_000
DEFAULTS = ("a red apple", "7")


def take(prompt: str, seed: str) -> None:
    """Make a picture on the page, and photograph the page while and after."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        live_server(Path(folder), real=True) as live,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.set_default_timeout(PATIENCE_MS)
        page.goto(live.page_url)
        page.locator("#advanced_checkbox input").check()
        page.get_by_role("checkbox", name="Random").uncheck()
        page.locator("#image_seed textarea, #image_seed input").fill(seed)
        page.locator("#positive_prompt textarea").fill(prompt)
        page.get_by_role("button", name="Generate", exact=True).click()
        page.wait_for_function("+document.querySelector('[role=progressbar]')?.ariaValueNow > 70")
        page.screenshot(path=FOLDER / "page-running.png")
        page.locator("#final_gallery .thumbnails img").first.wait_for()
        page.get_by_role("checkbox", name="Random").check()
        page.mouse.move(0, 0)
        _shoot(page, "page.png", dark=False)
        _shoot(page, "page-dark.png", dark=True)
        page.set_viewport_size({"width": 390, "height": 844})
        _shoot(page, "page-phone.png", dark=True)
        browser.close()


def _shoot(page: Page, name: str, *, dark: bool) -> None:
    page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(700)  # transitions of colours and sizes
    page.screenshot(path=FOLDER / name)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    take(*(*sys.argv[1:3], *DEFAULTS[len(sys.argv[1:3]) :]))
