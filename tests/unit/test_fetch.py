"""Fetching: off-limits addresses in every spelling, redirects, size, time, and what an operator opens."""

import gzip
import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from modules import fetch as fetch_module
from modules.errors import FetchRefused
from modules.fetch import AddressInfo, FetchPolicy, fetch, fetcher, post, system_resolve
from tests.unit.ssrf_corpus import LOOPBACK, NAMES, NEVER, NOT_HTTP, OPEN, PRIVATE

STRICT = FetchPolicy()
LOCAL = FetchPolicy(allow_private=True)


def resolve(host: str, port: int) -> Sequence[AddressInfo]:
    """Answers for test names; the system's resolver reads numbers in all their spellings."""
    name = host.casefold().rstrip(".")
    if name in NAMES:
        return [info for address in NAMES[name] for info in system_resolve(address, port)]
    if name.endswith(".test"):
        raise socket.gaierror("unknown name")
    return system_resolve(host, port)


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Addresses that were dialled; nothing is really contacted."""
    seen: list[object] = []

    def connect(self: socket.socket, target: object) -> None:
        seen.append(target)
        raise ConnectionRefusedError("not in this test")

    monkeypatch.setattr(fetch_module.socket.socket, "connect", connect)
    return seen


@pytest.mark.parametrize("url", LOOPBACK + PRIVATE + NEVER + NOT_HTTP)
def test_nothing_off_limits_is_dialled(url: str, dialled: list[object]) -> None:
    with pytest.raises(FetchRefused) as caught:
        fetch(url, policy=STRICT, resolve=resolve)
    assert dialled == []
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("url", NEVER + NOT_HTTP)
def test_a_local_server_still_dials_no_metadata_link_local_or_translated_address(
    url: str, dialled: list[object]
) -> None:
    with pytest.raises(FetchRefused):
        fetch(url, policy=LOCAL, resolve=resolve)
    assert dialled == []


@pytest.mark.parametrize("url", OPEN)
def test_public_addresses_are_dialled(url: str, dialled: list[object]) -> None:
    with pytest.raises(FetchRefused, match="could not be reached"):
        fetch(url, policy=STRICT, resolve=resolve)
    assert len(dialled) == 1


def test_the_corpus_is_large_enough() -> None:
    assert len(set(LOOPBACK + PRIVATE + NEVER)) >= 60


@pytest.mark.parametrize(
    ("entry", "url", "opened"),
    [
        ("intranet.test", "http://intranet.test/", True),
        ("INTRANET.test", "http://intranet.TEST./", True),
        ("*.test", "http://intranet.test:81/", True),
        ("*.test", "http://localtest.me/", False),
        ("*.ranet.test", "http://intranet.test/", False),
        ("intranet.test:8080", "http://intranet.test:8080/", True),
        ("intranet.test:8080", "http://intranet.test/", False),
        ("10.1.2.3", "http://intranet.test/", True),
        ("10.0.0.0/8", "http://10.9.9.9/", True),
        ("10.0.0.0/8", "http://192.168.0.1/", False),
        ("127.0.0.1:7000", "http://127.0.0.1:7000/", True),
        ("127.0.0.1:7000", "http://0x7f.1:7000/", True),
        ("127.0.0.1:7000", "http://127.0.0.1:7001/", False),
        ("::1", "http://[::1]/", True),
        ("intranet.test", "http://intranet.test.evil.test/", False),
        ("intranet.test", "http://loopback.test/", False),
    ],
)
def test_the_operator_opens_exactly_what_is_named(entry: str, url: str, opened: bool, dialled: list[object]) -> None:
    with pytest.raises(FetchRefused):
        fetch(url, policy=FetchPolicy(allowed_hosts=(entry,)), resolve=resolve)
    assert bool(dialled) is opened


class Handler(http.server.BaseHTTPRequestHandler):
    """Plays every trick a server can play; `/echo` tells what was asked."""

    protocol_version = "HTTP/1.1"
    requests: list[tuple[str, str, bytes, str]]

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.command, self.path, body, self.headers.get("Host")))  # type: ignore[attr-defined]
        kind, _, rest = self.path[1:].partition("/")
        self.close_connection = True
        if kind == "redirect":
            status, _, target = rest.partition("/")
            self.reply(int(status), Location=target)
        elif kind == "loop":
            self.reply(302, Location=f"/loop/{int(rest) - 1}" if rest != "0" else "/echo")
        elif kind == "status":
            self.reply(int(rest), b"no")
        elif kind == "gzip":
            self.reply(200, gzip.compress(b"x" * int(rest)), Content_Encoding="gzip")
        elif kind == "brotli":
            self.reply(200, b"???", Content_Encoding="br")
        elif kind == "endless":
            self.send_response(200)
            self.end_headers()
            self.drip(b"x" * 65536, 0.0)
        elif kind == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.drip(b"x", 0.05)
        elif kind == "drip-head":
            self.drip(b"HTTP/1.1 200 OK\r\nX-A: ", 0.0, times=1)
            self.drip(b"x", 0.05)
        elif kind == "short":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
        elif kind == "chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
        elif kind == "large":
            self.send_response(200)
            self.send_header("Content-Length", str(10**12))
            self.end_headers()
        else:
            self.reply(200, b"ok")

    do_POST = do_GET

    def drip(self, piece: bytes, pause_s: float, times: int = 10**9) -> None:
        for _ in range(times):
            try:
                self.wfile.write(piece)
                self.wfile.flush()
            except OSError:
                return
            if pause_s and self.server.stopping.wait(pause_s):  # type: ignore[attr-defined]
                return

    def log_message(self, *arguments: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """Records requests; block_on_close waits for its threads."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str, bytes, str]] = []
        self.stopping = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield running
    running.stopping.set()
    running.shutdown()
    running.server_close()
    thread.join()


def test_content_is_fetched_and_the_host_header_is_the_name(server: Server) -> None:
    port = server.server_address[1]
    answered: list[str] = []

    def to_loopback(host: str, port: int) -> Sequence[AddressInfo]:
        answered.append(host)
        return system_resolve("127.0.0.1", port)

    assert fetch(f"http://img.test:{port}/echo", policy=LOCAL, resolve=to_loopback) == b"ok"
    assert server.seen == [("GET", "/echo", b"", f"img.test:{port}")]
    assert answered == ["img.test"]
    assert fetcher(LOCAL)(f"{server.url}/chunked") == b"abcde"


def test_rebinding_finds_no_second_look_up(server: Server) -> None:
    answers = iter(["93.184.215.14", "127.0.0.1"])
    asked: list[str] = []

    def rebinding(host: str, port: int) -> Sequence[AddressInfo]:
        asked.append(host)
        return system_resolve(next(answers), port)

    checked = FetchPolicy()
    with pytest.MonkeyPatch.context() as patch:
        targets: list[object] = []

        def connect(self: socket.socket, target: object) -> None:
            targets.append(target)
            raise ConnectionRefusedError("not in this test")

        patch.setattr(fetch_module.socket.socket, "connect", connect)
        with pytest.raises(FetchRefused):
            fetch(f"http://rebind.test:{server.server_address[1]}/", policy=checked, resolve=rebinding)
    assert asked == ["rebind.test"]
    assert targets == [("93.184.215.14", server.server_address[1])]
    assert server.seen == []


@pytest.mark.parametrize(
    "target", ["http://10.0.0.1/", "http://169.254.169.254/", "file:///etc/passwd", "//0/", "http://["]
)
def test_redirects_are_checked_like_first_requests(server: Server, target: str) -> None:
    opened = FetchPolicy(allowed_hosts=(f"127.0.0.1:{server.server_address[1]}",))
    with pytest.raises(FetchRefused):
        fetch(f"{server.url}/redirect/302/{target}", policy=opened, timeout_s=3)
    assert len(server.seen) == 1


def test_a_redirect_to_another_port_of_an_opened_host_is_refused(server: Server) -> None:
    opened = FetchPolicy(allowed_hosts=(f"127.0.0.1:{server.server_address[1]}",))
    other = Server()
    try:
        with pytest.raises(FetchRefused, match="--allow-url-hosts"):
            fetch(f"{server.url}/redirect/302/{other.url}/echo", policy=opened)
    finally:
        other.server_close()
    assert other.seen == []


def test_five_redirects_are_followed_and_six_are_not(server: Server) -> None:
    assert fetch(f"{server.url}/loop/4", policy=LOCAL) == b"ok"
    assert len(server.seen) == 6
    with pytest.raises(FetchRefused, match="more than 5"):
        fetch(f"{server.url}/loop/5", policy=LOCAL)


@pytest.mark.parametrize("status", [204, 400, 404, 500])
def test_only_success_is_content(server: Server, status: int) -> None:
    if status == 204:
        assert fetch(f"{server.url}/status/200", policy=LOCAL) == b"no"
    else:
        with pytest.raises(FetchRefused, match=str(status)):
            fetch(f"{server.url}/status/{status}", policy=LOCAL)


@pytest.mark.parametrize("path", ["endless", "large", "gzip/5000000"])
def test_too_much_content_is_refused(server: Server, path: str) -> None:
    with pytest.raises(FetchRefused, match="larger than the 1 MiB"):
        fetch(f"{server.url}/{path}", policy=LOCAL, max_bytes=2**20)


def test_compressed_content_within_the_limit_is_decompressed(server: Server) -> None:
    assert fetch(f"{server.url}/gzip/100000", policy=LOCAL) == b"x" * 100_000
    with pytest.raises(FetchRefused, match="'br'"):
        fetch(f"{server.url}/brotli/", policy=LOCAL)


def test_content_that_breaks_off_is_refused(server: Server) -> None:
    with pytest.raises(FetchRefused):
        fetch(f"{server.url}/short", policy=LOCAL)


@pytest.mark.parametrize("path", ["drip", "drip-head"])
def test_a_server_that_drips_is_cut_off_in_time(server: Server, path: str) -> None:
    begin = time.monotonic()
    with pytest.raises(FetchRefused, match="too long"):
        fetch(f"{server.url}/{path}", policy=LOCAL, timeout_s=0.4)
    assert time.monotonic() - begin < 2.5


def test_proxies_of_the_environment_are_not_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetch(f"{server.url}/echo", policy=LOCAL) == b"ok"


def test_webhook_posts_its_body_and_tells_the_status(server: Server) -> None:
    headers = {"Content-Type": "application/json", "User-Agent": "Focale/1"}
    assert post(f"{server.url}/hook", b'{"a": 1}', headers=headers, policy=LOCAL) == 200
    assert post(f"{server.url}/status/503", b"{}", headers=headers, policy=LOCAL) == 503
    assert [entry[:3] for entry in server.seen] == [("POST", "/hook", b'{"a": 1}'), ("POST", "/status/503", b"{}")]


@pytest.mark.parametrize(("status", "method", "body"), [(302, "POST", b"{}"), (307, "POST", b"{}"), (303, "GET", b"")])
def test_webhook_redirects_keep_the_body_but_for_303(server: Server, status: int, method: str, body: bytes) -> None:
    assert post(f"{server.url}/redirect/{status}//echo", b"{}", headers={}, policy=LOCAL) == 200
    assert server.seen[1][:3] == (method, "/echo", body)


@pytest.mark.parametrize("url", [*LOOPBACK[:5], *NEVER[:8]])
def test_webhooks_go_through_the_same_check(url: str, dialled: list[object]) -> None:
    with pytest.raises(FetchRefused):
        post(url, b"{}", headers={}, policy=STRICT, resolve=resolve)
    assert dialled == []


def test_every_thread_ends_with_its_fetch(server: Server) -> None:
    names: Callable[[], set[str]] = lambda: {thread.name for thread in threading.enumerate() if "Timer" in thread.name}  # noqa: E731
    before = names()
    fetch(f"{server.url}/echo", policy=LOCAL)
    assert names() == before
