"""Missing model files on the page: offered with their size, fetched as part of the run, stopped, switched off."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import OpenPage
from tests.browser.live import ROOT, Live, live_server
from tests.browser.test_page import gallery, generate, open_advanced
from tests.model_server import ModelServer, model_bytes, model_server

pytestmark = [
    pytest.mark.browser,
    # Gradio counts the events of its queue with arguments that pandas has deprecated.
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated:DeprecationWarning"),
]

ANIME = "animaPencilXL_v500.safetensors"
DEFAULT = "juggernautXL_v8Rundiffusion.safetensors"
LIGHTNING = "sdxl_lightning_4step_lora.safetensors"


@pytest.fixture(scope="module")
def models() -> Iterator[ModelServer]:
    """The mirror that stands in for the hub."""
    with model_server() as running:
        yield running


def program_folder(root: Path) -> Path:
    """A folder with the shipped models and room for more."""
    (root / "models").mkdir()
    (root / "models" / "embedded").symlink_to(ROOT / "models" / "embedded")
    return root


@pytest.fixture(scope="module")
def live(models: ModelServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server that downloads from the mirror."""
    with live_server(program_folder(tmp_path_factory.mktemp("live")), "--hf-mirror", models.url) as running:
        yield running


@pytest.fixture(autouse=True)
def no_models(live: Live) -> None:
    """Every test begins without downloaded files."""
    live.settle()
    for folder in ("checkpoints", "loras"):
        for file in (live.outputs.parent / "models" / folder).iterdir():
            file.unlink()


def choose_preset(page: Page, name: str) -> None:
    """Choose a preset in its list."""
    open_advanced(page)
    page.get_by_label("Preset").click()
    page.get_by_role("option", name=name, exact=True).click()


def box(page: Page):
    """The box that has missing files downloaded."""
    return page.locator("#download_missing input")


def test_a_preset_offers_its_files_with_size_and_the_run_fetches_them(
    open_page: OpenPage, live: Live, models: ModelServer
) -> None:
    go_on = threading.Event()
    models.add(
        f"mashb1t/fav_models/resolve/main/fav/{ANIME}", model_bytes(6_000_000),
        pause=lambda sent: sent < 5_000_000 or go_on.wait(30),
    )  # fmt: skip
    page = open_page()
    expect(page.locator("#missing_note")).to_contain_text(DEFAULT)
    expect(box(page)).not_to_be_checked()
    choose_preset(page, "anime")
    expect(page.locator("#missing_note")).to_contain_text(f"{ANIME} (6.0 MB) is not on this machine yet.")
    expect(box(page)).to_be_checked()
    expect(page.get_by_label("Speed", exact=True)).to_be_checked()
    generate(page, "a fox")
    expect(page.locator(".focale-step")).to_contain_text(f"Downloading {ANIME}")
    expect(page.locator(".focale-step")).to_contain_text("of 6.0 MB ...")
    go_on.set()
    expect(gallery(page)).to_have_count(2)
    expect(page.locator("#messages")).to_contain_text(f"Downloaded {ANIME}, 6.0 MB.")
    expect(page.locator("#missing_files")).to_be_hidden()
    assert live.engine.runs[-1].req_params["base_model_name"] == ANIME
    assert (live.outputs.parent / "models" / "checkpoints" / ANIME).stat().st_size == len(model_bytes(6_000_000))
    open_advanced(page, "Models")
    expect(page.get_by_label("Base Model")).to_have_value(ANIME)


def test_without_the_tick_nothing_is_fetched(open_page: OpenPage, live: Live, models: ModelServer) -> None:
    models.asked.clear()
    page = open_page()
    expect(page.locator("#missing_files")).to_be_visible()
    generate(page, "a fox")
    expect(gallery(page)).to_have_count(2)
    assert models.asked == []
    request = live.engine.runs[-1].req_params
    assert request["download_missing"] is False
    assert not request["loras"][0]["enabled"]


def test_stop_ends_a_download(open_page: OpenPage, live: Live, models: ModelServer) -> None:
    go_on = threading.Event()
    models.add(
        f"mashb1t/fav_models/resolve/main/fav/{ANIME}", model_bytes(6_000_000),
        pause=lambda sent: sent < 5_000_000 or go_on.wait(30),
    )  # fmt: skip
    page = open_page()
    choose_preset(page, "anime")
    expect(box(page)).to_be_checked()
    runs = len(live.engine.runs)
    generate(page, "a fox")
    expect(page.locator(".focale-step")).to_contain_text("of 6.0 MB ...")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#messages")).to_contain_text("Stopped: no picture was finished.")
    go_on.set()
    assert len(live.engine.runs) == runs
    assert not (live.outputs.parent / "models" / "checkpoints" / ANIME).exists()


def test_a_download_that_fails_says_why(open_page: OpenPage, models: ModelServer) -> None:
    models.files.clear()
    page = open_page()
    choose_preset(page, "anime")
    expect(page.locator("#missing_note")).to_contain_text(ANIME)
    generate(page, "a fox")
    expect(page.get_by_role("alert")).to_contain_text(f"{ANIME} could not be downloaded from {models.url}")
    expect(page.get_by_role("alert")).to_contain_text("there is no such file")
    expect(page.locator("#missing_files")).to_be_visible()


def test_a_mode_that_needs_a_lora_says_that_it_is_fetched(open_page: OpenPage, live: Live, models: ModelServer) -> None:
    models.add(f"mashb1t/misc/resolve/main/{LIGHTNING}", model_bytes())
    for folder, name in (("checkpoints", DEFAULT), ("loras", "sd_xl_offset_example-lora_1.0.safetensors")):
        (live.outputs.parent / "models" / folder / name).write_bytes(model_bytes(1000))
    page = open_page()
    expect(page.locator("#missing_files")).to_be_hidden()
    open_advanced(page)
    page.get_by_label("Lightning").check()
    expect(page.locator("#missing_note")).to_contain_text("Generate downloads it first.")
    expect(page.locator("#download_missing")).to_be_hidden()
    generate(page, "a fox")
    expect(gallery(page)).to_have_count(2)
    expect(page.locator("#missing_files")).to_be_hidden()
    assert (live.outputs.parent / "models" / "loras" / LIGHTNING).read_bytes() == model_bytes()


def test_refresh_finds_new_styles_presets_and_models(open_page: OpenPage, live: Live, tmp_path: Path) -> None:
    page = open_page()
    open_advanced(page, "Models")
    root = live.outputs.parent
    presets = root / "presets"
    presets.unlink()  # the link to the shipped ones
    try:
        (presets / "styles").mkdir(parents=True)
        (presets / "mine.json").write_text("{}")
        (presets / "styles" / "mine.json").write_text('[{"name": "Quite New", "prompt": "{prompt}, new"}]')
        (root / "models" / "checkpoints" / "new.safetensors").write_bytes(model_bytes(1000))
        page.get_by_role("button", name="Refresh All Files").click()
        page.get_by_label("Base Model").click()
        expect(page.get_by_role("option", name="new.safetensors")).to_be_visible()
        page.keyboard.press("Escape")
        page.get_by_role("tab", name="Styles", exact=True).click()
        expect(page.get_by_label("Quite New")).to_be_visible()
        page.get_by_role("tab", name="Settings", exact=True).click()
        page.get_by_label("Preset").click()
        expect(page.get_by_role("option", name="mine")).to_be_visible()
    finally:
        for file in sorted(presets.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        presets.rmdir()
        presets.symlink_to(ROOT / "presets")
