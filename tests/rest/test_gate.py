"""Keys, login, signed URLs, other sites, limits: what the gate lets through and what not."""

import logging
from urllib.parse import urlsplit

import httpx
import pytest

from modules.gate import GateRules, named_keys
from modules.limits import TokenBuckets
from modules.signing import UrlSigner, session_key, sign_session
from tests.fakes import png_base64
from tests.rest.conftest import BASE, Running, Serve

KEY = "s3cret ключ"
PLAIN = {"X-API-KEY": "sesame"}


@pytest.fixture
async def guarded(serve: Serve) -> Running:
    """A server with a key."""
    return await serve("--apikey", "sesame")


async def test_without_a_key_everything_is_open(server: Running):
    for path in ("/tasks", "/docs", "/openapi.json", "/v1/engines/styles", "/metrics"):
        assert (await server.client.get(path)).status_code == 200


@pytest.mark.parametrize("headers", [{}, {"X-API-KEY": "wrong"}, {"X-API-KEY": ""}, {"Authorization": "Bearer no"}])
async def test_a_missing_or_wrong_key_is_403(guarded: Running, headers):
    for method, path in (("GET", "/tasks"), ("POST", "/v1/engine/generate/"), ("GET", "/v1/engines/styles")):
        reply = await guarded.client.request(method, path, headers=headers)
        assert (reply.status_code, reply.content) == (403, b'{"detail":"Forbidden"}')
        assert reply.headers["content-type"] == "application/json"


@pytest.mark.parametrize("headers", [PLAIN, {"Authorization": "Bearer sesame"}, {"authorization": "bearer sesame"}])
async def test_the_key_opens_in_either_header(guarded: Running, headers):
    assert (await guarded.client.get("/tasks", headers=headers)).status_code == 200


async def test_the_key_is_no_query_parameter(guarded: Running):
    assert (await guarded.client.get("/tasks?api_key=sesame&X-API-KEY=sesame")).status_code == 403


async def test_a_key_may_be_any_text(serve: Serve):
    server = await serve("--apikey", KEY)
    assert (await server.client.get("/tasks", headers={"X-API-KEY": KEY.encode()})).status_code == 200
    assert (await server.client.get("/tasks", headers={"X-API-KEY": KEY[:-1].encode()})).status_code == 403


async def test_every_route_but_login_health_and_signed_files_needs_the_key(guarded: Running):
    schema = (await guarded.client.get("/openapi.json", headers=PLAIN)).json()
    paths = [
        *schema["paths"],
        "/",
        "/docs",
        "/docs/swagger-ui.css",
        "/openapi.json",
        "/config",
        "/gradio_api/info",
        "/x",
    ]
    open_paths = {
        path
        for path in paths
        for method in ("GET", "POST", "DELETE", "HEAD", "PUT")
        if (await guarded.client.request(method, path.replace("{", "").replace("}", ""))).status_code != 403
    }
    assert open_paths == {"/healthz", "/readyz"}


async def test_result_and_input_urls_open_without_the_key_because_they_are_signed(guarded: Running):
    body = {"uov_input_image": png_base64()}
    record = (await guarded.generate(body, headers=PLAIN)).json()
    for url in (record["result"][0], record["req_params"]["uov_input_image"]):
        assert (await guarded.client.get(url)).status_code == 200
        assert (await guarded.client.head(url)).status_code == 200
        assert (await guarded.client.get(url.partition("?")[0])).status_code == 403
        assert (await guarded.client.get(url[:-2] + "xx")).status_code == 403
        assert (await guarded.client.get(url.partition("?")[0], headers=PLAIN)).status_code == 200
    first, second = (await guarded.generate({"image_number": 2}, headers=PLAIN)).json()["result"]
    assert (await guarded.client.get(f"{first.partition('?')[0]}?{urlsplit(second).query}")).status_code == 403
    signature = urlsplit(first).query
    assert (await guarded.client.get(f"/tasks?{signature}")).status_code == 403
    again = await guarded.generate(record["req_params"], headers=PLAIN)
    assert again.json()["req_params"]["uov_input_image"] == record["req_params"]["uov_input_image"]


async def test_a_browser_is_sent_to_the_login_page_and_back(guarded: Running):
    client = guarded.client
    browser = {"accept": "text/html,*/*;q=0.8"}
    there = await client.get("/docs?x=1", headers=browser)
    assert (there.status_code, there.headers["location"]) == (303, "/-/login?next=/docs%3Fx%3D1")
    page = await client.get(there.headers["location"])
    assert page.status_code == 200
    assert '<input id="key" name="key" type="password"' in page.text
    wrong = await client.post(there.headers["location"], data={"key": "guess"})
    assert (wrong.status_code, "set-cookie" in wrong.headers) == (403, False)
    back = await client.post(there.headers["location"], data={"key": "sesame"})
    assert (back.status_code, back.headers["location"]) == (303, "/docs?x=1")
    cookie = back.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert "sesame" not in cookie
    assert (await client.get("/docs", headers=browser)).status_code == 200


@pytest.mark.parametrize("target", ["https://evil.example/", "//evil.example/", "/\\evil.example", "/a\r\nX-Evil: 1"])
async def test_login_never_leads_to_another_site(guarded: Running, target):
    reply = await guarded.client.post("/-/login", params={"next": target}, data={"key": "sesame"})
    assert reply.headers["location"] == "/"


async def test_a_login_cookie_is_no_use_to_a_page_of_another_port(guarded: Running):
    await guarded.client.post("/-/login", data={"key": "sesame"})
    assert (await guarded.client.post("/v1/engine/generate/", json={})).status_code == 200
    other = {"origin": "http://127.0.0.1:3000", "sec-fetch-site": "same-site"}
    assert (await guarded.client.post("/v1/engine/generate/", json={}, headers=other)).status_code == 403
    hidden = {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}
    assert (await guarded.client.get("/tasks?action=delete&start_at=2020-01-01", headers=hidden)).status_code == 403


async def test_named_keys_come_from_a_file(serve: Serve, tmp_path):
    (tmp_path / "keys").write_text("# people\nalpha Ann Example\nbeta\n")
    server = await serve("--api-keys-file", str(tmp_path / "keys"))
    for key in ("alpha", "beta"):
        assert (await server.client.get("/tasks", headers={"X-API-KEY": key})).status_code == 200
    assert (await server.client.get("/tasks", headers={"X-API-KEY": "alpha Ann Example"})).status_code == 403
    assert named_keys(("alpha Ann", "a b"), "a b") == {"alpha": "Ann", "a b": "apikey"}


async def test_the_access_log_names_the_key_and_never_shows_it(serve: Serve, tmp_path, caplog):
    (tmp_path / "keys").write_text("alpha-secret Ann\n")
    server = await serve("--api-keys-file", str(tmp_path / "keys"))
    with caplog.at_level(logging.DEBUG, "focale.access"):
        reply = await server.client.get("/tasks?secret=value", headers={"X-API-KEY": "alpha-secret"})
    line = caplog.messages[-1]
    assert f"request={reply.headers['x-request-id']}" in line
    assert "key=Ann GET /tasks status=200" in line
    assert "secret" not in line


async def test_answers_carry_security_headers(server: Running):
    for path in ("/tasks", "/docs", "/nothing"):
        headers = (await server.client.get(path)).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "SAMEORIGIN"
        assert headers["x-request-id"]


# -- limits ---------------------------------------------------------------------------------------------------------


async def test_a_key_that_asks_too_often_is_429_and_others_are_not(serve: Serve, tmp_path):
    (tmp_path / "keys").write_text("alpha\nbeta\n")
    server = await serve("--api-keys-file", str(tmp_path / "keys"), "--rate-limit", "3")
    replies = [
        await server.client.post("/v1/engine/control/?action=stop", headers={"X-API-KEY": "alpha"}) for _ in range(4)
    ]
    assert [reply.status_code for reply in replies] == [200, 200, 200, 429]
    assert int(replies[-1].headers["retry-after"]) >= 1
    assert (await server.client.get("/tasks", headers={"X-API-KEY": "alpha"})).status_code == 200
    assert (
        await server.client.post("/v1/engine/control/?action=stop", headers={"X-API-KEY": "beta"})
    ).status_code == 200


async def test_a_key_may_not_fill_the_queue(serve: Serve, tmp_path):
    (tmp_path / "keys").write_text("alpha\nbeta\n")
    server = await serve("--api-keys-file", str(tmp_path / "keys"), "--key-queue-limit", "1")
    server.engine.hold()

    async def ask(key: str) -> httpx.Response:
        return await server.generate({"async_process": True}, headers={"X-API-KEY": key})

    assert (await ask("alpha")).status_code == 200
    await server.engine.held.wait()
    assert (await ask("alpha")).status_code == 200
    full = await ask("alpha")
    assert (full.status_code, "retry-after" in full.headers) == (429, True)
    assert (await ask("beta")).status_code == 200
    server.engine.release()


async def test_guessing_keys_is_slowed_down(guarded: Running):
    replies = [await guarded.client.get("/tasks", headers={"X-API-KEY": str(number)}) for number in range(40)]
    assert {reply.status_code for reply in replies[-5:]} == {429}
    assert (await guarded.client.get("/tasks", headers=PLAIN)).status_code == 200


def test_a_bucket_fills_up_evenly():
    now = [0.0]
    buckets = TokenBuckets(60, lambda: now[0])
    assert [buckets.take("a") for _ in range(61)] == [0] * 60 + [1]
    now[0] = 2.0
    assert [buckets.take("a") for _ in range(3)] == [0, 0, 1]
    assert buckets.take("b") == 0


# -- other sites ----------------------------------------------------------------------------------------------------

EVIL = "https://evil.example"


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": EVIL},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
        {"origin": "http://127.0.0.1.evil.example"},
        {"origin": "http://[::1"},
    ],
)
async def test_pages_of_other_sites_are_refused_and_told_the_flag(server: Running, headers):
    for method, path in (("POST", "/v1/engine/generate/"), ("GET", "/tasks"), ("OPTIONS", "/v1/engine/generate/")):
        reply = await server.client.request(method, path, headers={**headers, "access-control-request-method": "POST"})
        assert reply.status_code == 403
        assert "--cors-origins" in reply.json()["detail"]
        assert "access-control-allow-origin" not in reply.headers
    assert server.engine.runs == []


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1:5500", BASE, "http://[::1]:80"])
async def test_pages_of_this_machine_may_call(server: Running, origin):
    preflight = await server.client.options(
        "/v1/engine/generate/",
        headers={"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": "x-a, b"},
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == origin
    assert preflight.headers["access-control-allow-headers"] == "x-a, b"
    assert preflight.headers["access-control-max-age"] == "600"
    reply = await server.generate(headers={"origin": origin})
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, origin)


async def test_a_page_from_disk_may_call_when_null_is_allowed_and_read_the_stream(serve: Serve):
    server = await serve("--cors-origins", "null,https://good.example")
    for origin in ("null", "https://good.example"):
        reply = await server.generate({"stream_output": True}, headers={"origin": origin})
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, origin)
    assert (await server.generate(headers={"origin": EVIL})).status_code == 403


async def test_with_a_key_any_origin_may_call_without_cookies(guarded: Running):
    preflight = await guarded.client.options(
        "/v1/engine/generate/", headers={"origin": EVIL, "access-control-request-method": "POST"}
    )
    assert preflight.status_code == 200
    reply = await guarded.generate(headers={**PLAIN, "origin": EVIL})
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, EVIL)
    assert "access-control-allow-credentials" not in reply.headers
    record = reply.json()
    picture = await guarded.client.get(record["result"][0], headers={"sec-fetch-site": "cross-site"})
    assert picture.status_code == 200


async def test_another_site_may_link_to_page_and_pictures_but_not_to_actions(server: Running):
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    url = (await server.generate()).json()["result"][0]
    assert (await server.client.get("/docs", headers=link)).status_code == 200
    assert (await server.client.get(url, headers=link)).status_code == 200
    assert (await server.client.get("/", headers=link)).status_code == 307
    assert (await server.client.get("/tasks?action=delete&start_at=2020-01-01", headers=link)).status_code == 403


async def test_a_rebound_name_is_refused_on_loopback(server: Running):
    reply = await server.client.get("/tasks", headers={"host": "evil.example:7866"})
    assert reply.status_code == 403
    assert "--base-url" in reply.json()["detail"]
    for host in ("localhost:7866", "127.0.0.1", "[::1]:7866"):
        assert (await server.client.get("/tasks", headers={"host": host})).status_code == 200


async def test_a_named_host_is_accepted(serve: Serve):
    server = await serve("--base-url", "https://img.example/x")
    assert (await server.client.get("/tasks", headers={"host": "img.example"})).status_code == 200


async def test_urls_follow_a_trusted_proxy(serve: Serve):
    server = await serve("--trusted-proxies", "127.0.0.1")
    record = (await server.generate(headers={"x-forwarded-host": "img.example"})).json()
    assert record["result"][0].startswith("http://img.example/outputs/")


async def test_urls_do_not_follow_a_proxy_that_nobody_trusts(server: Running):
    record = (await server.generate(headers={"x-forwarded-host": "img.example"})).json()
    assert record["result"][0].startswith(BASE)


# -- signatures -----------------------------------------------------------------------------------------------------


def test_signatures_hold_for_their_path_and_secret_only():
    signer = UrlSigner(b"a" * 32, enabled=True)
    query = signer.query("/outputs/a/b c.png").removeprefix("?").encode()
    assert signer.accepts("/outputs/a/b c.png", query)
    assert not signer.accepts("/outputs/a/b.png", query)
    assert not UrlSigner(b"b" * 32, enabled=True).accepts("/outputs/a/b c.png", query)
    assert not signer.accepts("/outputs/a/b c.png", b"sig=")
    assert not signer.accepts("/outputs/a/b c.png", b"&" * 500 + query)
    assert UrlSigner(b"a" * 32, enabled=False).query("/x") == ""


def test_a_session_ends_with_its_time_and_with_its_key():
    cookie = sign_session(b"s", "key", 1000)
    assert session_key(b"s", cookie, ["other", "key"], now_s=999) == "key"
    assert session_key(b"s", cookie, ["other", "key"], now_s=1001) is None
    assert session_key(b"s", cookie, ["other"], now_s=999) is None
    for broken in ("", ".", "1000", "x.y", "9" * 30 + ".x", cookie[:-1]):
        assert session_key(b"s", broken, ["key"], now_s=1) is None


def test_rules_never_show_keys():
    assert "sesame" not in repr(GateRules(keys={"sesame": "a"}, secret=b"sesame"))
