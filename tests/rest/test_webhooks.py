"""Webhooks: when, where to, what, signed how, and what happens when nobody answers."""

import asyncio
import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from extensions.rest_api.webhook import Outbox, WebhookSender, secret_bytes
from modules.choices import TaskStatus
from modules.errors import FetchRefused
from modules.events import Failed
from modules.record import Record
from tests.rest.conftest import Running, running_server


@dataclass
class Receiver:
    """A web server that keeps what is posted to it."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    loop: asyncio.AbstractEventLoop | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    on_post: Callable[[], None] = lambda: None

    async def wait(self, count: int = 1) -> list[dict]:
        """The bodies, once there are `count`."""
        async with asyncio.timeout(15):
            while len(self.got) < count:
                await self.changed.wait()
                self.changed.clear()
        return [json.loads(body) for _headers, body in self.got]


@pytest.fixture
async def receiver() -> Iterator[Receiver]:
    made = Receiver(loop=asyncio.get_running_loop())

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            made.on_post()
            if self.path == "/moved":
                self.send_response(307)
                self.send_header("Location", "/hook")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            made.got.append(({key.lower(): value for key, value in self.headers.items()}, body))
            self.send_response(made.statuses.pop(0) if made.statuses else 204)
            self.send_header("Content-Length", "0")
            self.end_headers()
            made.loop.call_soon_threadsafe(made.changed.set)

        def log_message(self, format: str, *args: object) -> None:
            pass

    site = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=site.serve_forever, daemon=True)
    thread.start()
    made.url = f"http://127.0.0.1:{site.server_port}/hook"
    yield made
    await asyncio.to_thread(site.shutdown)
    site.server_close()
    thread.join()


MODES = {
    "sync": ({}, {}),
    "async": ({"async_process": True}, {}),
    "stream": ({"stream_output": True}, {}),
    "picture": ({}, {"accept": "image/png"}),
}


@pytest.mark.parametrize("mode", MODES)
async def test_the_record_is_posted_once_in_every_mode(server: Running, receiver: Receiver, mode):
    body, headers = MODES[mode]
    await server.generate({**body, "webhook_url": receiver.url, "prompt": "apple"}, headers=headers)
    (posted,) = await receiver.wait()
    task_id = server.engine.runs[0].task_id
    assert posted == (await server.client.get(f"/tasks/{task_id}")).json()
    assert "preview" not in posted
    assert posted["result"][0].startswith("http://127.0.0.1:7866/outputs/")
    head = receiver.got[0][0]
    assert head["content-type"] == "application/json"
    assert head["user-agent"].startswith("Focale/")
    assert (head["x-task-id"], head["x-task-status"]) == (task_id, "finished")
    assert "webhook-signature" not in head


async def test_a_stopped_and_a_failed_task_are_told_too(server: Running, receiver: Receiver):
    server.engine.hold()
    task_id = await server.accepted({"webhook_url": receiver.url})
    await server.engine.held.wait()
    await server.client.post("/v1/engine/control/?action=stop")
    await server.ended(task_id)
    server.engine.release()
    server.engine.failure = Failed("broken")
    await server.accepted({"webhook_url": receiver.url})
    statuses = {body["task_status"] for body in await receiver.wait(2)}
    assert statuses == {"stop", "error"}


async def test_the_global_webhook_serves_tasks_that_name_none(tmp_path, receiver: Receiver):
    async with running_server(tmp_path, "--webhook-url", receiver.url) as server:
        record = (await server.generate()).json()
        assert (record["webhook_url"], record["req_params"]["webhook_url"]) == (receiver.url, "")
        await server.generate({"webhook_url": receiver.url.replace("/hook", "/own")})
        await receiver.wait(2)


async def test_redirects_are_followed_with_the_same_post(server: Running, receiver: Receiver):
    await server.generate({"webhook_url": receiver.url.replace("/hook", "/moved")})
    assert (await receiver.wait())[0]["task_status"] == "finished"


async def test_a_signature_proves_the_sender(tmp_path, receiver: Receiver):
    secret = base64.b64encode(b"k" * 24).decode()
    async with running_server(tmp_path, "--webhook-secret", f"whsec_{secret}") as server:
        await server.generate({"webhook_url": receiver.url})
        await receiver.wait()
    headers, body = receiver.got[0]
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    right = base64.b64encode(hmac.new(b"k" * 24, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{right}"


def test_the_signature_is_the_published_one():
    """The example of the Standard Webhooks specification."""
    sent: list[dict[str, str]] = []

    def post(url: str, body: bytes, headers: dict[str, str], timeout_s: float) -> int:
        sent.append(headers)
        return 200

    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    sender = WebhookSender(post, secret=secret, clock_s=lambda: 1614265330.5)
    sender("http://x", Record(task_id="msg_p5jXN8AQM9LWM0D4loKWxJek"), b'{"test": 2432232314}')
    assert sent[0]["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert secret_bytes("plain text") == b"plain text"
    assert secret_bytes("") == b""


async def test_a_dead_receiver_delays_neither_the_reply_nor_the_next_task(server: Running, receiver: Receiver):
    blocked = threading.Event()
    receiver.on_post = lambda: blocked.wait(10)  # type: ignore[assignment]
    async with asyncio.timeout(5):
        for _ in range(3):
            assert (await server.generate({"webhook_url": receiver.url})).status_code == 200
    blocked.set()
    await receiver.wait(3)


async def test_a_private_target_is_refused_by_a_public_server(tmp_path, receiver: Receiver, caplog):
    async with running_server(tmp_path, "--listen", "0.0.0.0") as server:
        server.rest._api.outbox._retry_after_s = ()
        await server.generate({"webhook_url": receiver.url})
        await emptied(server)
    assert receiver.got == []
    assert "given up" in caplog.text


async def emptied(server: Running) -> None:
    """Wait until no delivery is in work."""
    outbox = server.rest._api.outbox
    await asyncio.gather(*outbox._deliveries)


@pytest.mark.parametrize("url", ["ftp://x/", "file:///etc/passwd", "example.com/hook", "javascript:alert(1)"])
async def test_only_http_urls_are_taken(server: Running, url):
    reply = await server.generate({"webhook_url": url})
    assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["body", "webhook_url"])
    assert server.engine.runs == []


@pytest.mark.parametrize("word", [None, "", "string", "None"])
async def test_words_for_no_webhook(server: Running, word):
    record = (await server.generate({"webhook_url": word})).json()
    assert (record["task_status"], record["webhook_url"]) == ("finished", "")


# -- the outbox -----------------------------------------------------------------------------------------------------

RECORD = Record(task_id="t" * 32, task_status=TaskStatus.FINISHED)


def outbox_of(tmp_path, send, retry_after_s=(0.0, 0.0), record: Record | None = RECORD) -> Outbox:
    return Outbox(
        tmp_path, send=send, find=lambda _id: record, body=lambda record, _style: {"id": record.task_id},
        retry_after_s=retry_after_s,
    )  # fmt: skip


async def test_a_failed_delivery_is_tried_three_times_in_all_then_given_up(server: Running, receiver: Receiver, caplog):
    server.rest._api.outbox._retry_after_s = (0.0, 0.0)
    receiver.statuses = [500, 503, 404]
    await server.generate({"webhook_url": receiver.url})
    await receiver.wait(3)
    await emptied(server)
    assert len(receiver.got) == 3
    assert "given up after 3 attempts" in caplog.text
    assert list((server.outputs / "webhooks").glob("*.json")) == []


async def test_pauses_between_attempts_are_one_and_five_seconds():
    from extensions.rest_api.webhook import RETRY_AFTER_S, TIMEOUT_S

    assert (RETRY_AFTER_S, TIMEOUT_S) == ((1.0, 5.0), 5.0)


async def test_an_undelivered_webhook_survives_a_restart(tmp_path):
    delivered: list[bytes] = []
    began = asyncio.Event()
    loop = asyncio.get_running_loop()

    def refuse(url: str, record: Record, body: bytes) -> None:
        loop.call_soon_threadsafe(began.set)
        raise FetchRefused("nobody there")

    first = outbox_of(tmp_path, refuse, retry_after_s=(60.0,))
    async with first.expecting(RECORD.task_id, "http://x/"):
        pass
    await first.start()
    await began.wait()
    await first.stop()
    assert len(list(tmp_path.glob("*.json"))) == 1
    later = outbox_of(tmp_path, lambda url, record, body: delivered.append(body))
    await later.start()
    await asyncio.gather(*later._deliveries)
    await later.stop()
    assert delivered == [b'{"id":"' + b"t" * 32 + b'"}']
    assert list(tmp_path.glob("*.json")) == []


async def test_a_webhook_is_noted_before_its_task_is_accepted_and_forgotten_when_it_is_not(tmp_path):
    outbox = outbox_of(tmp_path, lambda *_: None)
    noted: list[str] = []

    async def refused() -> None:
        async with outbox.expecting("x", "http://x/"):
            noted.extend(path.name for path in tmp_path.glob("*.json"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await refused()
    assert noted == ["x.json"]
    assert list(tmp_path.glob("*.json")) == []
    await outbox.stop()


async def test_a_noted_webhook_without_a_task_is_forgotten_at_the_start(tmp_path):
    (tmp_path / "x.json").write_text('{"task_id": "x", "url": "http://x/"}')
    (tmp_path / "broken.json").write_text("{")
    outbox = outbox_of(tmp_path, lambda *_: None, record=None)
    await outbox.start()
    await outbox.stop()
    assert [path.name for path in tmp_path.glob("*.json")] == ["broken.json"]


async def test_a_refused_request_leaves_nothing_in_the_outbox(server: Running, receiver: Receiver):
    from modules.errors import NotSupportedYet

    server.check.refusal = NotSupportedYet("uov_input_image", "not yet")
    assert (await server.generate({"webhook_url": receiver.url})).status_code == 422
    assert list((server.outputs / "webhooks").glob("*.json")) == []
