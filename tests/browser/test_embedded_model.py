"""The page over the embedded model itself: the picture a person gets is the one the API gives."""

import io
from collections.abc import Iterator

import httpx
import pytest
from PIL import Image, ImageChops
from playwright.sync_api import expect

from tests.browser.conftest import OpenPage
from tests.browser.live import Live, live_server

pytestmark = [
    pytest.mark.browser,
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated:DeprecationWarning"),
]
PATIENCE_MS = 120_000


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with the embedded model."""
    with live_server(tmp_path_factory.mktemp("real"), real=True) as running:
        yield running


def pixels(content: bytes) -> Image.Image:
    """A picture, decoded."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def test_page_and_api_draw_the_same_pixels_with_the_same_seed(open_page: OpenPage, live: Live) -> None:
    page = open_page()
    page.locator("#advanced_checkbox input").check()
    page.get_by_role("spinbutton", name="number input for Image Number").fill("1")
    page.get_by_role("spinbutton", name="number input for Image Number").press("Tab")
    page.locator("#positive_prompt textarea").fill("a red apple on a table")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator("img.focale-preview")).to_be_visible(timeout=PATIENCE_MS)
    expect(page.locator(".focale-step")).to_contain_text("Sampling step", timeout=PATIENCE_MS)
    expect(page.locator("#final_gallery img").first).to_be_visible(timeout=PATIENCE_MS)
    expect(page.locator(".focale-message.is-note").first).to_contain_text("demo model")
    task_id = page.evaluate("sessionStorage.getItem('focale_task')")
    shown = httpx.get(page.locator("#final_gallery img").first.get_attribute("src")).content
    with httpx.Client(base_url=live.api_url, timeout=PATIENCE_MS / 1000) as client:
        seed = client.get(f"/tasks/{task_id}").json()["seeds"][0]
        asked = {"prompt": "a red apple on a table", "image_seed": seed, "image_number": 1}
        record = client.post("/v1/engine/generate/", json=asked).json()
        drawn = client.get(record["result"][0]).content
        history = client.get("/tasks", params={"query": "history"}).json()["history"]
    assert ImageChops.difference(pixels(shown), pixels(drawn)).getbbox() is None
    assert {record["task_id"], task_id} <= {one["task_id"] for one in history}
