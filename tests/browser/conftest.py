"""Chromium, and servers for it to look at."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser.live import Live, live_server

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE_MS = 30_000
NOISE = frozenset({"console: Method not implemented."})  # Gradio, when it closes the stream of an upload
CUT_OFF = re.compile(r"AbortError: signal is aborted|Connection errored out|network error", re.IGNORECASE)


@dataclass
class Watched:
    """A page, and everything that went wrong on it."""

    page: Page
    faults: list[str] = field(default_factory=list)

    def watch(self) -> None:
        """Note errors of scripts and requests, and requests that leave this machine."""
        self.page.on("console", lambda said: self._note(said.type in ("error", "warning"), f"console: {said.text}"))
        self.page.on("pageerror", lambda error: self._note(True, f"script: {error}"))
        self.page.on("response", lambda reply: self._note(reply.status >= 400, f"{reply.status} {reply.url}"))
        self.page.on("request", lambda asked: self._note(_leaves(asked.url), f"leaves this machine: {asked.url}"))
        # A stream of events that Gradio closes itself counts as aborted.
        self.page.on(
            "requestfailed",
            lambda asked: self._note("ERR_ABORTED" not in str(asked.failure), f"failed: {asked.url} {asked.failure}"),
        )

    def _note(self, is_fault: bool, text: str) -> None:
        if is_fault and text not in NOISE:
            self.faults.append(text)

    def reload(self) -> None:
        """Reload the page; what its streams say when they are cut off is no fault."""
        before = len(self.faults)
        self.page.reload()
        self.faults[before:] = [fault for fault in self.faults[before:] if not CUT_OFF.search(fault)]


def _leaves(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1:", "data:", "blob:", "about:"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for a file's tests; while it lives its own event loop runs, and no other test may have one."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with the fake engine, for all tests of a file."""
    with live_server(tmp_path_factory.mktemp("live")) as running:
        yield running


@pytest.fixture
def released(live: Live) -> Iterator[Live]:
    """The server, with an engine that runs on at the end of the test."""
    yield live
    live.settle()


class OpenPage:
    """Opens the page in a fresh profile, and watches it."""

    def __init__(self, browser: Browser, live: Live) -> None:
        self._browser = browser
        self._live = live
        self._watched: dict[Page, Watched] = {}

    def __call__(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """The page, ready for use."""
        context = self._browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        page = context.new_page()
        self._watched[page] = Watched(page)
        self._watched[page].watch()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(self._live.page_url)
        page.get_by_role("button", name="Generate", exact=True).wait_for()
        return page

    def reload(self, page: Page) -> None:
        """Load it anew, as a person would."""
        self._watched[page].reload()

    def close(self) -> list[str]:
        """Close all pages; returns what went wrong on them."""
        for page in self._watched:
            page.context.close()
        return [fault for watched in self._watched.values() for fault in watched.faults]


@pytest.fixture
def open_page(browser: Browser, live: Live) -> Iterator[OpenPage]:
    """Open pages; nothing may have gone wrong on them at the end."""
    opener = OpenPage(browser, live)
    yield opener
    assert opener.close() == []
