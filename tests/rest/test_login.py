"""`--auth`: persons who may use the page, with and without an API key beside them."""

import logging

import httpx
import pytest

import webui
from modules.login_page import LOGIN_PATH
from modules.settings import Settings
from tests.rest.conftest import Running, Serve
from tests.rest.test_serving import page_of

PAGE = "http://127.0.0.1:7865"
ANN, BOB = ("--auth", "ann:apple pie"), ("--auth", "bob:ключ")
KEY = {"X-API-KEY": "sesame"}
PAGE_PATHS = ("/", "/config", "/gradio_api/info", "/gradio_api/cancel", "/assets/x.js", "/theme.css", "/x", "/file=/x")


@pytest.fixture
async def with_persons(serve: Serve) -> Running:
    """A page for two persons, and no key."""
    return await serve(*ANN, *BOB, page=page_of([]))


@pytest.fixture
async def with_both(serve: Serve) -> Running:
    """A page for a person, and a key."""
    return await serve(*ANN, "--apikey", "sesame", page=page_of([]))


async def log_in(server: Running, **form: str) -> httpx.Response:
    return await server.client.post(PAGE + LOGIN_PATH, data=form)


async def test_nothing_of_the_page_is_open_to_strangers(with_persons: Running):
    for path in PAGE_PATHS:
        for method in ("GET", "POST", "PUT", "DELETE"):
            assert (await with_persons.client.request(method, PAGE + path)).status_code == 403


async def test_a_browser_is_led_to_the_login_page_and_a_password_opens_the_page(with_persons: Running):
    there = await with_persons.client.get(PAGE + "/?x=1", headers={"accept": "text/html"})
    assert (there.status_code, there.headers["location"]) == (303, "/-/login?next=/%3Fx%3D1")
    shown = await with_persons.client.get(PAGE + there.headers["location"])
    assert (shown.status_code, 'name="password"' in shown.text, 'name="key"' in shown.text) == (200, True, False)
    back = await with_persons.client.post(
        PAGE + there.headers["location"], data={"username": "bob", "password": "ключ"}
    )
    assert (back.status_code, back.headers["location"]) == (303, "/?x=1")
    assert {"HttpOnly", "SameSite=Strict"} <= {part.strip() for part in back.headers["set-cookie"].split(";")}
    for path in PAGE_PATHS:
        assert (await with_persons.client.get(PAGE + path)).text == f"GET {path}"


@pytest.mark.parametrize(
    "form",
    [
        {"username": "ann", "password": "ключ"},
        {"username": "ann", "password": ""},
        {"username": "", "password": "apple pie"},
        {"username": "ANN", "password": "apple pie"},
        {"username": "eve", "password": "apple pie"},
        {"key": "apple pie"},
        {"key": "person\0ann\0x"},
        {},
    ],
)
async def test_a_wrong_name_or_password_opens_nothing(with_persons: Running, form):
    reply = await log_in(with_persons, **form)
    assert (reply.status_code, "set-cookie" in reply.headers) == (403, False)
    assert "not known" in reply.text
    assert (await with_persons.client.get(PAGE + "/")).status_code == 403


async def test_guessing_passwords_is_slowed_down(with_persons: Running):
    replies = [await log_in(with_persons, username="ann", password=str(number)) for number in range(40)]
    assert {reply.status_code for reply in replies[-5:]} == {429}
    assert int(replies[-1].headers["retry-after"]) >= 1


async def test_the_api_stays_open_to_its_clients_and_says_so_at_the_start(with_persons: Running):
    assert (await with_persons.generate({})).status_code == 200
    assert "--auth guards the page alone" in with_persons.services.settings.exposure


async def test_the_api_port_has_no_page_to_guard(with_persons: Running):
    assert (await with_persons.client.get("/")).headers["location"] == "/docs"
    assert (await with_persons.client.get("/config")).status_code == 404


async def test_without_a_page_there_is_nothing_for_persons_to_guard(serve: Serve):
    server = await serve(*ANN, "--nowebui")
    assert (await server.client.get("/")).headers["location"] == "/docs"
    assert (await server.client.get("/nothing")).status_code == 404


async def test_clients_of_gradio_log_in_where_they_always_did(with_persons: Running):
    reply = await with_persons.client.post(PAGE + "/login", data={"username": "ann", "password": "apple pie"})
    assert (reply.status_code, reply.json()) == (200, {"success": True})
    assert (await with_persons.client.get(PAGE + "/config")).status_code == 200
    assert (await with_persons.client.post(PAGE + "/login", data={"username": "ann"})).status_code == 403


async def test_with_a_key_a_person_opens_the_page_and_the_key_everything(with_both: Running):
    assert (await log_in(with_both, username="ann", password="apple pie")).status_code == 303
    assert (await with_both.client.get(PAGE + "/config")).status_code == 200
    for path in ("/tasks", "/docs", "/metrics"):
        assert (await with_both.client.get(PAGE + path)).status_code == 403
    with_both.client.cookies.clear()
    for path in ("/config", "/tasks"):
        assert (await with_both.client.get(PAGE + path, headers=KEY)).status_code == 200
        assert (await with_both.client.get(PAGE + path)).status_code == 403
    assert (await log_in(with_both, key="sesame")).status_code == 303
    for path in ("/config", "/tasks"):
        assert (await with_both.client.get(PAGE + path)).status_code == 200


async def test_a_session_ends_with_its_password(tmp_path):
    from tests.rest.conftest import running_server

    async with running_server(tmp_path, *ANN, page=page_of([])) as before:
        await log_in(before, username="ann", password="apple pie")
        cookies = before.client.cookies
        assert (await before.client.get(PAGE + "/")).status_code == 200
    for flags, status in ((ANN, 200), (("--auth", "ann:other"), 403), (BOB, 403)):
        async with running_server(tmp_path, *flags, page=page_of([])) as later:
            later.client.cookies = cookies
            assert (await later.client.get(PAGE + "/")).status_code == status


async def test_the_page_of_another_site_cannot_use_a_persons_session(with_persons: Running):
    await log_in(with_persons, username="ann", password="apple pie")
    for headers in ({"origin": "http://127.0.0.1:3000"}, {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}):
        reply = await with_persons.client.post(PAGE + "/gradio_api/queue/join", headers=headers)
        assert reply.status_code == 403


async def test_persons_are_in_the_access_log_and_passwords_are_not(with_persons: Running, caplog):
    with caplog.at_level(logging.DEBUG):
        await log_in(with_persons, username="ann", password="apple pie")
        await with_persons.client.get(PAGE + "/")
    assert "key=ann GET / status=200" in caplog.text
    assert "apple pie" not in caplog.text
    assert "apple+pie" not in caplog.text


# -- what is said at the start --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), ""),
        (("--listen", "127.0.0.1"), ""),
        (("--listen", "localhost"), ""),
        (("--apikey", "k"), ""),
        (("--listen", "--apikey", "k"), ""),
        (("--listen", "--apikey", "k", *ANN), ""),
        (("--listen",), "Everyone who can reach 0.0.0.0 can use this server; start it with --apikey or --auth"),
        (("--listen", "192.168.1.7"), "Everyone who can reach 192.168.1.7 can use this server"),
        (("--listen", *ANN), "Everyone who can reach 0.0.0.0 can use the API: --auth guards the page alone"),
        (ANN, "Everyone on this machine can use the API: --auth guards the page alone"),
        (("--nowebui", *ANN), ""),
        (("--nowebui", "--listen", *ANN), "Everyone who can reach 0.0.0.0 can use the API; start it with --apikey"),
    ],
)
def test_an_open_server_says_so_in_one_sentence_at_the_start(tmp_path, caplog, monkeypatch, flags, words):
    monkeypatch.setattr(webui.gc, "freeze", lambda: None)  # the garbage of this test process stays collectable
    flags = ("--temp-path", str(tmp_path / "t"), "--disable-in-browser", *flags)
    settings = Settings.load(flags, env={}, root=tmp_path)
    with caplog.at_level(logging.INFO):
        webui._announce(settings, notes=list)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == bool(words)
    assert all(warning.startswith(words) for warning in warnings)
    assert warnings == ([settings.exposure] if words else [])
