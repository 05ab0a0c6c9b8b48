"""What a person does on the page, in Chromium, with an engine that draws at once and stops where a test wants."""

import json
import socket
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Browser, Page, expect

from modules.events import Failed
from tests.browser.conftest import OpenPage
from tests.browser.live import Live, live_server

pytestmark = [
    pytest.mark.browser,
    # Gradio counts the events of its queue with arguments that pandas has deprecated.
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated:DeprecationWarning"),
]


def generate(page: Page, prompt: str) -> None:
    """Type a prompt and start."""
    page.locator("#positive_prompt textarea").fill(prompt)
    page.get_by_role("button", name="Generate", exact=True).click()


def generate_forever(page: Page, prompt: str) -> None:
    """Type a prompt, and start one run after the other."""
    page.locator("#positive_prompt textarea").fill(prompt)
    page.locator("#generate_button").click(button="right")
    page.get_by_role("menuitem", name="Generate forever").click()


def gallery(page: Page):
    """The small pictures of the gallery."""
    return page.locator("#final_gallery .thumbnails img")


def task_id(page: Page) -> str:
    """Id of the task this tab shows."""
    return page.evaluate("sessionStorage.getItem('focale_task')")


def open_advanced(page: Page, tab: str = "Settings") -> None:
    """Show the right column."""
    page.locator("#advanced_checkbox input").check()
    page.get_by_role("tab", name=tab, exact=True).first.click()


def test_prompt_leads_over_progress_and_preview_to_pictures(open_page: OpenPage, released: Live) -> None:
    page = open_page()
    released.hold(3)
    generate(page, "a lighthouse")
    expect(page.locator(".focale-step")).to_have_text("Sampling step 2/4, image 1/2 ...")
    expect(page.locator("img.focale-preview")).to_be_visible()
    expect(page.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "25")
    expect(page.locator("#generate_button")).to_be_hidden()
    released.release()
    expect(gallery(page)).to_have_count(2)
    expect(page.locator(".focale-bar")).to_have_count(0)
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_visible()
    assert gallery(page).first.evaluate("image => image.naturalWidth") == 1152 // 16
    assert page.locator(".focale-seeds li span").all_text_contents() == ["1", "2"]


def test_page_and_api_give_the_same_picture_and_share_one_history(open_page: OpenPage, released: Live) -> None:
    page = open_page()
    generate(page, "a shared lighthouse")
    expect(gallery(page)).to_have_count(2)
    with httpx.Client(base_url=released.api_url, timeout=30) as client:
        mine = client.get(f"/tasks/{task_id(page)}").json()
        asked = mine["req_params"]
        again = client.post("/v1/engine/generate/", json=asked | {"async_process": False}).json()
        history = client.get("/tasks", params={"query": "history"}).json()["history"]
        pixels = [client.get(url).content for url in (mine["result"][0], again["result"][0])]
    assert pixels[0] == pixels[1]
    assert [record["source"] for record in history if record["task_id"] in (mine["task_id"], again["task_id"])] == [
        "api",
        "webui",
    ]


def test_stop_says_so_at_once_and_keeps_what_is_done(open_page: OpenPage, released: Live) -> None:
    page = open_page()
    released.hold(3, after_pictures=1)
    generate(page, "a stopped lighthouse")
    expect(page.locator(".focale-step")).to_have_text("Sampling step 2/4, image 2/2 ...")
    expect(page.locator(".focale-strip img")).to_have_count(1)
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator(".focale-message.is-outcome")).to_have_text("Stopped: 1 of 2 pictures are kept.")
    expect(page.locator("#final_gallery img").first).to_be_visible()
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_visible()


def test_skip_goes_on_with_the_next_picture(open_page: OpenPage, released: Live) -> None:
    page = open_page()
    released.hold(2)
    generate(page, "a skipped lighthouse")
    expect(page.locator(".focale-step")).to_have_text("Sampling step 1/4, image 1/2 ...")
    page.get_by_role("button", name="Skip", exact=True).click()
    expect(page.locator(".focale-step")).to_have_text("Sampling step 1/4, image 2/2 ...")
    released.release()
    expect(page.locator("#final_gallery")).to_be_visible()
    assert len(page.locator(".focale-seeds li span").all()) == 1


def test_reload_goes_on_with_the_running_task_and_shows_its_result(open_page: OpenPage, released: Live) -> None:
    page = open_page()
    released.hold(3)
    generate(page, "a reloaded lighthouse")
    expect(page.locator("img.focale-preview")).to_be_visible()
    running = task_id(page)
    open_page.reload(page)
    expect(page.locator(".focale-step")).to_have_text("Sampling step 2/4, image 1/2 ...")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
    released.release()
    expect(gallery(page)).to_have_count(2)
    open_page.reload(page)
    expect(gallery(page)).to_have_count(2)
    assert task_id(page) == running


def test_second_tab_waits_for_its_turn_and_gets_its_own_pictures(open_page: OpenPage, released: Live) -> None:
    first, second = open_page(), open_page()
    released.hold(2)
    generate(first, "first tab")
    expect(first.locator("img.focale-preview")).to_be_visible()
    generate(second, "second tab")
    expect(second.locator(".focale-step")).to_have_text("Waiting for task to start ... 1 task is ahead")
    released.release()
    expect(gallery(first)).to_have_count(2)
    expect(gallery(second)).to_have_count(2)
    assert task_id(first) != task_id(second)
    assert released.services.jobs.get(task_id(second)).request.prompt == "second tab"


def test_failure_is_a_sentence_on_the_page(open_page: OpenPage, released: Live) -> None:
    page = open_page()
    released.fail(Failed("There is not enough memory for pictures of this size."))
    generate(page, "a failing lighthouse")
    expect(page.get_by_role("alert")).to_have_text("There is not enough memory for pictures of this size.")
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_visible()


def test_api_switch_closes_and_opens_both_ports_at_once(open_page: OpenPage, released: Live) -> None:
    page = open_page()
    open_advanced(page)
    page.locator("#api_panel").get_by_text("API", exact=True).click()
    switch = page.locator("#api_enabled input")
    expect(switch).to_be_checked()

    def answers() -> list[int]:
        return [httpx.get(url + "tasks").status_code for url in (released.page_url, released.api_url)]

    for wanted, status in ((False, 404), (True, 200)):
        with page.expect_response(lambda reply: reply.request.method == "POST"):
            switch.set_checked(wanted)
        assert answers() == [status, status]
        assert json.loads((released.outputs / "settings_state.json").read_text())["api_enabled"] is wanted
        assert httpx.get(released.page_url).status_code == 200


@pytest.mark.parametrize("dark", [False, True])
def test_narrow_screen_has_no_horizontal_scroll(open_page: OpenPage, released: Live, dark: bool) -> None:
    page = open_page(width=390, height=844, dark=dark)
    open_advanced(page)
    page.locator("#advanced_checkbox input").check()
    for tab in ("Settings", "Styles", "Models", "Advanced"):
        page.get_by_role("tab", name=tab, exact=True).first.click()
        if tab == "Advanced":
            page.locator("#developer_debug_mode input").check()
            expect(page.locator("#debug_panel")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 390, tab


def test_fast_performance_locks_what_it_forces(open_page: OpenPage, released: Live) -> None:
    page = open_page()
    open_advanced(page)
    page.get_by_role("radio", name="Lightning").check()
    expect(page.locator("#negative_prompt")).to_have_count(0)
    page.get_by_role("tab", name="Advanced", exact=True).first.click()
    scale = page.get_by_role("slider", name="Guidance Scale")
    expect(scale).to_be_disabled()
    page.get_by_role("tab", name="Settings", exact=True).first.click()
    page.get_by_role("radio", name="Speed", exact=True).check()
    expect(page.locator("#negative_prompt")).to_be_visible()
    page.get_by_role("tab", name="Advanced", exact=True).first.click()
    expect(scale).to_be_enabled()


def test_preset_sets_the_page_and_initial_sets_it_back(open_page: OpenPage, released: Live) -> None:
    page = open_page()
    open_advanced(page)
    page.locator("#positive_prompt textarea").fill("kept words")
    page.locator("#preset_selection input").click()
    page.get_by_role("option", name="anime").click()
    expect(page.locator("#aspect_ratios_accordion")).to_contain_text("896×1152")
    expect(page.locator("#positive_prompt textarea")).to_have_value("kept words")
    page.locator("#preset_selection input").click()
    page.get_by_role("option", name="initial").click()
    expect(page.locator("#aspect_ratios_accordion")).to_contain_text("1152×896")


def test_style_search_moves_matches_to_the_top(open_page: OpenPage, released: Live) -> None:
    page = open_page()
    open_advanced(page, "Styles")
    styles = page.locator("#style_selections label")
    expect(styles.first).to_have_text("Fooocus V2")
    search = page.locator("#style_search textarea, #style_search input")
    search.press_sequentially("sai anime")
    expect(styles.first).to_have_text("SAI Anime")
    styles.first.click()
    for _letter in "sai anime":
        search.press("Backspace")
    expect(styles.nth(3)).to_have_text("Fooocus Sharp")
    assert set(styles.all_text_contents()[:4]) == {" Fooocus V2", " Fooocus Enhance", " Fooocus Sharp", " SAI Anime"}
    expect(styles).to_have_count(279)


def test_pasted_parameters_are_loaded_into_the_page(open_page: OpenPage, released: Live) -> None:
    page = open_page()
    pasted = {"prompt": "märchenhafter Wald 森", "seed": "77", "performance": "Quality", "resolution": "(1024, 1024)"}
    page.locator("#positive_prompt textarea").fill(json.dumps(pasted))
    page.get_by_role("button", name="Load Parameters").click()
    expect(page.locator("#positive_prompt textarea")).to_have_value("märchenhafter Wald 森")
    expect(page.get_by_role("radio", name="Quality")).to_be_checked()
    expect(page.locator("#aspect_ratios_accordion")).to_contain_text("1024×1024")
    expect(page.locator("#image_seed textarea, #image_seed input")).to_have_value("77")
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_visible()


def test_parameters_in_a_picture_are_applied(open_page: OpenPage, released: Live, tmp_path: Path) -> None:
    page = open_page()
    chunks = PngInfo()
    chunks.add_text("parameters", json.dumps({"prompt": "a remembered owl", "seed": "5"}))
    Image.new("RGB", (16, 16)).save(tmp_path / "owl.png", pnginfo=chunks)
    page.get_by_label("Input Image").check()
    page.locator("#metadata_picture input[type=file]").set_input_files(tmp_path / "owl.png")
    expect(page.locator("#metadata_json")).to_contain_text("a remembered owl")
    page.get_by_role("button", name="Apply Metadata").click()
    expect(page.locator("#positive_prompt textarea")).to_have_value("a remembered owl")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # Gradio looks at the mode and lets go of the file
def test_words_for_a_picture_go_into_the_prompt(open_page: OpenPage, released: Live, tmp_path: Path) -> None:
    page = open_page()
    released.engine.answers["describe"] = "two colours"
    Image.new("RGB", (300, 200), "red").save(tmp_path / "red.png")
    page.get_by_label("Input Image").check()
    page.get_by_role("tab", name="Describe").click()
    page.locator("#describe_picture input[type=file]").set_input_files(tmp_path / "red.png")
    expect(page.locator("#describe_size")).to_contain_text("300 × 200, 1.50, 3:2")
    page.get_by_role("button", name="Describe this Image").click()
    expect(page.locator("#positive_prompt textarea")).to_have_value("two colours")
    expect(page.get_by_role("button", name="Describe this Image")).to_be_enabled()


def test_seed_of_the_picture_in_front_can_be_used_again(open_page: OpenPage, released: Live) -> None:
    page = open_page()
    generate(page, "a seeded lighthouse")
    expect(gallery(page)).to_have_count(2)
    gallery(page).nth(1).click()
    page.get_by_role("button", name="Reuse seed").click()
    open_advanced(page)
    second = released.services.jobs.get(task_id(page)).record.seeds[1]
    expect(page.locator("#image_seed textarea, #image_seed input")).to_have_value(str(second))


@pytest.mark.parametrize(
    ("typed", "cursor", "key", "expected"),
    [
        ("a red apple", 4, "ArrowUp", "a (red:1.1) apple"),
        ("a (red:1.1) apple", 4, "ArrowDown", "a red apple"),
        ("<lora:x:0.5>", 4, "ArrowUp", "<lora:x:0.55>"),
    ],
)
def test_arrows_change_the_weight_at_the_cursor(
    open_page: OpenPage, released: Live, typed: str, cursor: int, key: str, expected: str
) -> None:
    page = open_page()
    box = page.locator("#positive_prompt textarea")
    box.fill(typed)
    box.evaluate("(box, at) => box.setSelectionRange(at, at)", cursor)
    box.press(f"Control+{key}")
    expect(box).to_have_value(expected)


def test_ctrl_enter_generates(open_page: OpenPage, released: Live) -> None:
    page = open_page()
    page.locator("#positive_prompt textarea").fill("from the keyboard")
    page.locator("#positive_prompt textarea").press("Control+Enter")
    expect(gallery(page)).to_have_count(2)


def test_generate_forever_goes_on_until_stop(open_page: OpenPage, released: Live) -> None:
    page = open_page()
    generate_forever(page, "again and again")
    first = page.wait_for_function("sessionStorage.getItem('focale_task')").json_value()
    page.wait_for_function("first => sessionStorage.getItem('focale_task') !== first", arg=first)
    released.hold(2)
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_visible()
    assert not page.evaluate("document.body.classList.contains('is-forever')")


def test_run_that_ended_loads_nothing_anew_though_its_bar_is_still_drawn(open_page: OpenPage, released: Live) -> None:
    page = open_page()
    page.evaluate("document.body.append(Object.assign(document.createElement('i'), { className: 'focale-bar' }))")
    generate(page, "a lighthouse drawn late")
    expect(gallery(page)).to_have_count(2)
    page.wait_for_timeout(1500)  # longer than the script waits after the end of a stream
    assert page.evaluate("!!document.querySelector('i.focale-bar')")


@pytest.fixture
def port() -> str:
    """A port that nobody listens on."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_page_goes_on_by_itself_when_the_server_was_restarted(browser: Browser, tmp_path: Path, port: str) -> None:
    page = browser.new_page()
    with live_server(tmp_path, "--port", port) as first:
        page.goto(first.page_url)
        first.hold(2)
        generate(page, "an interrupted lighthouse")
        expect(page.locator("img.focale-preview")).to_be_visible()
        interrupted = task_id(page)
    with live_server(tmp_path, "--port", port):
        expect(gallery(page)).to_have_count(2, timeout=30_000)
    assert task_id(page) == interrupted
    page.close()


def test_generate_forever_goes_on_when_the_server_was_restarted(browser: Browser, tmp_path: Path, port: str) -> None:
    page = browser.new_page()
    with live_server(tmp_path, "--port", port) as first:
        page.goto(first.page_url)
        first.hold(2)
        generate_forever(page, "again after a restart")
        expect(page.locator("img.focale-preview")).to_be_visible()
        interrupted = task_id(page)
    with live_server(tmp_path, "--port", port):
        page.wait_for_function("first => sessionStorage.getItem('focale_task') !== first", arg=interrupted)
        assert page.evaluate("document.body.classList.contains('is-forever')")
    page.close()
