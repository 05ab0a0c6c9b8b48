"""A server of model files on this machine that misbehaves exactly as a test wants it to."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def model_bytes(size: int = 300_000, fill: int = 1) -> bytes:
    """A whole safetensors file of about `size` bytes; `fill` tells versions apart."""
    body = bytes((index * 7 + fill) % 251 for index in range(1000)) * (size // 1000)
    header = json.dumps({"weight": {"dtype": "U8", "shape": [len(body)], "data_offsets": [0, len(body)]}}).encode()
    return len(header).to_bytes(8, "little") + header + body


@dataclass
class Served:
    """One file and how it is served.

    cuts: after how many bytes further answers break off, one each. ranges: whether parts are sent at all.
    ignores_if_range: send parts of a new version to those who have an old one.
    tagged: whether answers have an ETag. statuses: what further answers are instead. length: the Content-Length told.
    linked_sha256, linked_size: what the hub says of large files. pause: called before each chunk. chunked: no length.
    unsized: no length and no chunks, the end is where the connection ends. shift: how far parts begin from where they
    should. content_type: of answers. redirect: where the file really is.
    """

    content: bytes
    cuts: list[int] = field(default_factory=list)
    ranges: bool = True
    ignores_if_range: bool = False
    tagged: bool = True
    statuses: list[int] = field(default_factory=list)
    length: int | None = None
    linked_sha256: str = ""
    linked_size: int | None = None
    pause: Callable[[int], None] = lambda sent: None
    chunk: int = 16_384
    chunked: bool = False
    unsized: bool = False
    shift: int = 0
    content_type: str = "application/octet-stream"
    redirect: str = ""

    @property
    def etag(self) -> str:
        """Of this version of the content."""
        return f'"{hashlib.md5(self.content).hexdigest()}"'


@dataclass
class ModelServer:
    """The server: files by path, and the requests it got as (method, path, headers)."""

    url: str
    files: dict[str, Served] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def add(self, name: str, content: bytes | None = None, **behaviour: object) -> Served:
        """Serve a file; returns it, to be changed while it is served."""
        served = Served(model_bytes() if content is None else content, **behaviour)  # type: ignore[arg-type]
        self.files[f"/{name}"] = served
        return served

    def url_of(self, name: str) -> str:
        """Where a file is."""
        return f"{self.url}/{name}"

    @property
    def ranges_asked(self) -> list[str]:
        """The Range header of each GET, "" where there was none."""
        return [headers.get("range", "") for method, _path, headers in self.asked if method == "GET"]


@contextmanager
def model_server() -> Iterator[ModelServer]:
    """Serve on a free port of this machine until the block ends."""
    made = ModelServer("")
    handler = type("Handler", (_Handler,), {"server_of": made})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.daemon_threads = True
    made.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: ModelServer

    def do_HEAD(self) -> None:
        """Answer as to GET, without content."""
        self._answer(with_content=False)

    def do_GET(self) -> None:
        """Answer with a file, or as the test wants."""
        self._answer(with_content=True)

    def _answer(self, *, with_content: bool) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server_of.asked.append((self.command, self.path, headers))
        served = self.server_of.files.get(self.path)
        if served is None or served.statuses:
            self._plain(404 if served is None else served.statuses.pop(0))
            return
        if served.redirect:
            self.send_response(302)
            self.send_header("Location", served.redirect)
            self._link(served)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        first = self._first(served, headers)
        if first > 0 and first >= len(served.content):
            self._plain(416)
            return
        self._file(served, first, with_content=with_content)

    def _first(self, served: Served, headers: dict[str, str]) -> int:
        """Number of the first byte to send; 0 for the whole file."""
        if not served.ranges or not headers.get("range"):
            return 0
        if headers.get("if-range") != served.etag and not served.ignores_if_range:
            return 0
        return int(headers["range"].removeprefix("bytes=").removesuffix("-")) + served.shift

    def _file(self, served: Served, first: int, *, with_content: bool) -> None:
        content = served.content[first:]
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(served.content) - 1}/{len(served.content)}")
        if served.unsized:
            self.send_header("Connection", "close")
        elif served.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            length = len(content) if served.length is None else served.length
            self.send_header("Content-Length", str(length))
        self.send_header("Content-Type", served.content_type)
        if served.tagged:
            self.send_header("ETag", served.etag)
        self._link(served)
        self.end_headers()
        if with_content:
            self._send(served, content)

    def _link(self, served: Served) -> None:
        if served.linked_sha256:
            self.send_header("X-Linked-Etag", f'"{served.linked_sha256}"')
        if served.linked_size is not None:
            self.send_header("X-Linked-Size", str(served.linked_size))

    def _send(self, served: Served, content: bytes) -> None:
        cut = served.cuts.pop(0) if served.cuts else None
        try:
            for start in range(0, len(content), served.chunk):
                served.pause(start)
                piece = content[start : start + served.chunk]
                if cut is not None and start + len(piece) > cut:
                    self.wfile.write(piece[: cut - start])
                    break
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if served.chunked else piece)
            else:
                if served.chunked:
                    self.wfile.write(b"0\r\n\r\n")
                if served.length is None and not served.unsized:
                    return
            self.close_connection = True
        except OSError:  # the client went away
            self.close_connection = True

    def _plain(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        """Say nothing."""
