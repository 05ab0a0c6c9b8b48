"""Chromium, and servers for it to look at."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser.live import Live, live_server

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE_MS = 30_000


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
        if is_fault:
            self.faults.append(text)


def _leaves(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1:", "data:", "blob:", "about:"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests."""
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


OpenPage = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, live: Live) -> Iterator[OpenPage]:
    """Open the page in a fresh profile; nothing may have gone wrong on it at the end."""
    with ExitStack() as stack:
        opened: list[Watched] = []

        def open_it(*, width: int = 1280, height: int = 900, url: str = "", dark: bool = False) -> Page:
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
            )
            stack.callback(context.close)
            watched = Watched(context.new_page())
            opened.append(watched)
            watched.watch()
            watched.page.set_default_timeout(PATIENCE_MS)
            watched.page.goto(url or live.page_url)
            watched.page.get_by_role("button", name="Generate", exact=True).wait_for()
            return watched.page

        yield open_it
        assert [fault for watched in opened for fault in watched.faults] == []


@pytest.fixture
def pictures_folder(live: Live) -> Path:
    """Where the server writes pictures."""
    return live.services.settings.paths.outputs
