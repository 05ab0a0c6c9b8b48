"""Two ports, one server: who answers where, over real sockets; the stream's bytes; shutting down; the API switch."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httpx
import pytest

from modules.errors import ExtensionFailed, PortTaken
from modules.extensions import Extension, Receive, Routes, Scope, Send, Services, load_extensions, owners
from modules.serving import Page, bind
from modules.settings import Settings
from tests.rest.conftest import ROOT
from tests.rest.live import live_server


async def a_page(scope: Scope, receive: Receive, send: Send) -> None:
    """A page that tells what it was asked."""
    if scope["path"] == "/slow":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        await asyncio.Event().wait()
    body = f"{scope['method']} {scope['path']}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
    await send({"type": "http.response.body", "body": body})


def page_of(log: list[str]) -> Page:
    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        log.append("begins")
        yield
        log.append("ends")

    return Page(app=a_page, lifespan=lifespan, end_streams=lambda: log.append("streams end"))


async def raw_exchange(url: str, head: str, body: bytes = b"", *, until: bytes = b"0\r\n\r\n") -> bytes:
    """What comes back over the socket, byte for byte."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    writer.write(f"{head}\r\nHost: {where.netloc}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    try:
        return await asyncio.wait_for(reader.readuntil(until), 10)
    finally:
        writer.close()
        await writer.wait_closed()


async def test_root_is_the_page_on_its_port_and_leads_to_the_docs_on_the_api_port(tmp_path):
    log: list[str] = []
    async with live_server(tmp_path, page=page_of(log)) as live, httpx.AsyncClient() as client:
        assert (await client.get(live.page_url + "/")).text == "GET /"
        assert (await client.post(live.page_url + "/gradio_api/call")).text == "POST /gradio_api/call"
        reply = await client.get(live.api_url + "/")
        assert (reply.status_code, reply.headers["location"]) == (307, "/docs")
        assert (await client.get(live.api_url + "/config")).status_code == 404
        for url in (live.page_url, live.api_url):
            assert (await client.get(url + "/ping")).text == "pong"
            assert (await client.get(url + "/v1/engine/generate/")).status_code == 405
            assert (await client.delete(url + "/tasks")).status_code == 405
            assert (await client.get(url + "/v1/unknown")).json() == {"detail": "Not Found"}
    assert log == ["begins", "streams end", "ends"]


async def test_without_a_page_both_ports_answer_the_api(tmp_path):
    async with live_server(tmp_path) as live, httpx.AsyncClient() as client:
        for url in (live.page_url, live.api_url):
            assert (await client.get(url + "/")).headers["location"] == "/docs"
            assert (await client.get(url + "/ping")).text == "pong"


async def test_the_switch_turns_all_routes_off_at_once_on_both_ports_and_is_remembered(tmp_path):
    async with live_server(tmp_path, page=page_of([])) as live, httpx.AsyncClient() as client:
        live.services.state.api_enabled = False
        for url in (live.page_url, live.api_url):
            for path in ("/docs", "/openapi.json", "/tasks", "/v1/engine/generate/", "/outputs/a/b.png", "/ping"):
                assert (await client.get(url + path)).status_code == 404
            assert (await client.get(url + "/healthz")).status_code == 200
        assert (await client.get(live.page_url + "/")).text == "GET /"
        assert (await client.get(live.api_url + "/")).status_code == 404
    async with live_server(tmp_path) as live, httpx.AsyncClient() as client:
        assert (await client.get(live.api_url + "/ping")).status_code == 404
        live.services.state.api_enabled = True
        assert (await client.get(live.api_url + "/ping")).status_code == 200


async def test_the_stream_on_the_wire_is_one_event_per_chunk_in_the_documented_bytes(tmp_path):
    async with live_server(tmp_path) as live:
        body = b'{"stream_output": true, "disable_preview": true}'
        raw = await raw_exchange(live.api_url, "POST /v1/engine/generate/ HTTP/1.1", body)
    head, _, payload = raw.partition(b"\r\n\r\n")
    assert b"content-type: text/event-stream; charset=utf-8" in head.lower()
    assert b"connection: keep-alive" in head.lower()
    assert b"transfer-encoding: chunked" in head.lower()
    chunks = []
    while payload != b"0\r\n\r\n":
        size, _, payload = payload.partition(b"\r\n")
        chunks.append(payload[: int(size, 16)])
        payload = payload[int(size, 16) + 2 :]
    assert len(chunks) >= 3
    for chunk in chunks:
        line, rest = chunk.split(b"\r\n", 1)
        assert rest == b"data: \r\n\r\n"
        assert line == b"data: " + json.dumps(json.loads(line[6:])).encode()


async def test_a_silent_stream_sends_a_comment_now_and_then(tmp_path):
    async with live_server(tmp_path, "--sse-ping", "0.05") as live:
        live.engine.hold()
        where = urlsplit(live.api_url)
        body = b'{"stream_output": true}'
        head = f"POST /v1/engine/generate/ HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: {len(body)}\r\n\r\n"
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        writer.write(head.encode() + body)
        ping = await asyncio.wait_for(reader.readuntil(b": ping - "), 10)
        assert b"data: {" in ping
        live.engine.release()
        await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 10)
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("wants", ["continue", "stop"])
async def test_a_client_that_goes_away_leaves_a_finished_or_stopped_record(tmp_path, wants):
    for body in ({"stream_output": True}, {}):
        async with live_server(tmp_path) as live, httpx.AsyncClient() as client:
            live.engine.hold(at_step=2)
            options = {"json": {**body, "on_disconnect": wants}}
            call = asyncio.create_task(client.post(live.api_url + "/v1/engine/generate/", **options))
            await live.engine.held.wait()
            job = live.services.jobs.running
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            while job.followers:
                await asyncio.sleep(0.001)
            if wants == "continue":
                live.engine.release()
            async for _event in job.log.follow():
                pass
            assert job.record.task_status.value == {"continue": "finished", "stop": "stop"}[wants]


@pytest.mark.parametrize("wants", ["continue", "stop"])
async def test_a_client_that_goes_away_while_its_task_waits(tmp_path, wants):
    async with live_server(tmp_path) as live, httpx.AsyncClient() as client:
        live.engine.hold()
        url = live.api_url + "/v1/engine/generate/"
        await client.post(url, json={"async_process": True})
        await live.engine.held.wait()
        body = {"stream_output": True, "on_disconnect": wants}
        async with client.stream("POST", url, json=body) as reply:
            assert b"Queued, position 1" in await anext(reply.aiter_bytes())
            job = live.services.jobs.waiting[0]
        while job.followers:
            await asyncio.sleep(0.001)
        live.engine.release()
        async for _event in job.log.follow():
            pass
        assert job.record.task_status.value == {"continue": "finished", "stop": "stop"}[wants]


async def test_a_connection_outlives_the_pauses_between_polls(tmp_path):
    async with live_server(tmp_path) as live:
        assert live.server.config.timeout_keep_alive >= 60


async def test_shutting_down_ends_streams_cleanly_and_calls_with_503(tmp_path):
    began_s = 0.0
    async with httpx.AsyncClient(timeout=20) as client:
        async with live_server(tmp_path, page=page_of([])) as live:
            live.engine.hold()
            url = live.api_url + "/v1/engine/generate/"
            stream = asyncio.create_task(client.post(url, json={"stream_output": True}))
            await live.engine.held.wait()
            sync = asyncio.create_task(client.post(url, json={}))
            page = asyncio.create_task(client.get(live.page_url + "/slow"))
            while len(live.services.jobs.waiting) < 1:
                await asyncio.sleep(0.001)
            waiting = live.services.jobs.waiting[0].task_id
            await asyncio.sleep(0.05)
            began_s = time.perf_counter()
        assert time.perf_counter() - began_s < 3
        assert (await stream).text.endswith("data: \r\n\r\n")
        assert (await sync).status_code == 503
        assert (await page).text == "begun"
        assert live.engine.closed
    async with live_server(tmp_path) as later, httpx.AsyncClient() as client:
        job = later.services.jobs.get(waiting)
        async for _event in job.log.follow():
            pass
        assert (await client.get(f"{later.api_url}/tasks/{waiting}")).json()["task_status"] == "finished"


async def test_the_first_event_follows_at_once(tmp_path):
    """The budget is 50 ms; the bound here leaves room for a busy machine, the number is printed."""
    async with live_server(tmp_path) as live, httpx.AsyncClient() as client:
        times_ms = []
        for _ in range(5):
            began_s = time.perf_counter()
            url = live.api_url + "/v1/engine/generate/"
            async with client.stream("POST", url, json={"stream_output": True}) as reply:
                await anext(reply.aiter_raw())
                times_ms.append((time.perf_counter() - began_s) * 1000)
                await reply.aread() if not reply.is_stream_consumed else None
    print("first event after", [round(value, 1) for value in times_ms], "ms")
    assert min(times_ms) < 500


# -- ports ----------------------------------------------------------------------------------------------------------


def settings_for(tmp_path, *flags: str, **env: str) -> Settings:
    return Settings.load(["--temp-path", str(tmp_path / "t"), *flags], env=env, root=tmp_path)


@pytest.fixture
def taken() -> int:
    """A port that someone else listens on."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_taken_page_port_is_one_clear_line(tmp_path, taken):
    with pytest.raises(PortTaken) as caught:
        bind(settings_for(tmp_path, "--port", str(taken), API_PORT="0"))
    text = str(caught.value)
    assert str(taken) in text
    assert "--port" in text
    assert "\n" not in text


def test_a_taken_api_port_leaves_the_api_on_the_page_port(tmp_path, taken, caplog):
    settings, listeners = bind(settings_for(tmp_path, "--port", "0", API_PORT=str(taken)))
    with listeners.page:
        assert listeners.api == ()
        assert settings.api_port == settings.webui_port
        assert str(taken) in caplog.text


def test_one_more_port_for_old_clients(tmp_path):
    settings, listeners = bind(settings_for(tmp_path, "--port", "0", "--legacy-port", "0"))
    ports = {one.getsockname()[1] for one in listeners.sockets}
    for one in listeners.sockets:
        one.close()
    assert len(ports) == 3
    assert {settings.webui_port, settings.api_port} < ports


# -- extensions -----------------------------------------------------------------------------------------------------


class Guest(Extension):
    """An extension as a stranger would write it."""

    name = "guest"

    def __init__(self) -> None:
        self.log: list[str] = []

    def mount(self, services: Services) -> Routes:
        return Routes(app=a_page, segments=frozenset({"guest"}))

    async def start(self, services: Services) -> None:
        self.log.append("start")

    def on_event(self, job, event) -> None:
        self.log.append(type(event).__name__)
        if len(self.log) == 3:
            raise RuntimeError("a guest's mistake")

    async def stop(self) -> None:
        self.log.append("stop")
        raise RuntimeError("another one")


async def test_a_guest_extension_serves_hears_and_cannot_hurt(tmp_path):
    guest = Guest()
    async with live_server(tmp_path, more=[guest]) as live, httpx.AsyncClient() as client:
        assert (await client.get(live.api_url + "/guest/x")).text == "GET /guest/x"
        record = (await client.post(live.api_url + "/v1/engine/generate/", json={})).json()
        assert record["task_status"] == "finished"
    assert guest.log[0] == "start"
    assert guest.log[-1] == "stop"
    assert {"Started", "Progress", "ImageSaved", "Finished"} <= set(guest.log)


def test_two_extensions_may_not_claim_one_path():
    routes = Routes(app=a_page, segments=frozenset({"tasks"}))
    with pytest.raises(ExtensionFailed, match="'a' and 'b' both claim /tasks"):
        owners({"a": routes, "b": routes})
    for segment in ("", "a/b"):
        with pytest.raises(ExtensionFailed):
            owners({"a": Routes(app=a_page, segments=frozenset({segment}))})


def test_a_broken_extension_is_left_out_and_reported(tmp_path, monkeypatch):
    package = tmp_path / "guests"
    for name, text in {
        "good": "from modules.extensions import Extension\ndef extension(): return Extension()\n",
        "broken": "raise RuntimeError('at import')\n",
        "empty": "",
    }.items():
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = load_extensions(package, "guests")
    assert [one.name for one in loaded.extensions] == ["good"]
    assert len(loaded.problems) == 2
    assert "at import" in loaded.problems[0]


def test_the_rest_api_is_found_like_any_other():
    assert [one.name for one in load_extensions().extensions] == ["rest_api"]


def test_answers_do_not_wait_for_acknowledgements(tmp_path):
    """asyncio turns Nagle's algorithm off only for sockets that name their protocol; else a call takes 40 ms more."""
    _settings, listeners = bind(settings_for(tmp_path, "--port", "0"))
    protocols = [one.proto for one in listeners.sockets]
    for one in listeners.sockets:
        one.close()
    assert protocols == [socket.IPPROTO_TCP] * 2


def test_a_signal_ends_the_process_in_order_and_without_a_trace():
    command = [sys.executable, "-m", "tests.fake_server", "--port", "0"]
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
            assert server.stdout.readline().startswith("ready ")
            server.send_signal(signal_number)
            _rest, problems = server.communicate(timeout=20)
        assert (server.returncode, problems) == (0, "")
