"""`/outputs` and `/inputs`: as stored, converted, partial, and never anything else."""

import io

import pytest
from PIL import Image

from tests.fakes import png_base64
from tests.rest.conftest import Running


@pytest.fixture
async def path(server: Running) -> str:
    """URL path of one stored result."""
    url: str = (await server.generate({"output_format": "png"})).json()["result"][0]
    return url.removeprefix("http://127.0.0.1:7866")


@pytest.mark.parametrize("accept", ["*/*", "", "image/*", "text/html,image/webp,*/*;q=0.8", "image/avif"])
async def test_the_file_itself_unless_one_known_format_is_asked(server: Running, path, accept):
    reply = await server.client.get(path, headers={"accept": accept})
    assert reply.content == (server.outputs / path.removeprefix("/outputs/")).read_bytes()
    assert reply.headers["content-type"] == "image/png"


async def test_the_file_carries_what_caches_and_downloads_need(server: Running, path):
    reply = await server.client.get(path)
    assert {"etag", "last-modified", "accept-ranges"} <= reply.headers.keys()
    part = await server.client.get(path, headers={"range": "bytes=0-3"})
    assert (part.status_code, part.content) == (206, b"\x89PNG")
    head = await server.client.head(path)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(reply.content)))


@pytest.mark.parametrize(
    ("accept", "media_type", "kind"),
    [
        ("image/png", "image/png", "PNG"),
        ("image/jpeg", "image/jpeg", "JPEG"),
        ("image/jpg", "image/jpeg", "JPEG"),
        ("image/webp", "image/webp", "WEBP"),
    ],
)
@pytest.mark.parametrize("stored_as", ["png", "jpg", "webp"])
async def test_conversion_by_accept(server: Running, accept, media_type, kind, stored_as):
    url = (await server.generate({"output_format": stored_as})).json()["result"][0]
    reply = await server.client.get(url, headers={"accept": accept})
    assert reply.headers["content-type"] == media_type
    assert Image.open(io.BytesIO(reply.content)).format == kind
    original = next(server.outputs.glob("*/*." + stored_as)).read_bytes()
    is_same = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[stored_as] == kind
    assert (reply.content == original) is is_same


async def test_inputs_are_served_by_their_hash(server: Running):
    params = (await server.generate({"uov_input_image": png_base64()})).json()["req_params"]
    reply = await server.client.get(params["uov_input_image"])
    assert reply.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(reply.content)).getpixel((0, 0)) == (255, 0, 0)
    again = (await server.generate({"uov_input_image": png_base64()})).json()["req_params"]
    assert again["uov_input_image"] == params["uov_input_image"], "equal pictures share a file"
    assert (await server.client.head(params["uov_input_image"])).status_code == 200


async def test_a_stored_file_that_is_no_picture_any_more_is_404(server: Running, path):
    (server.outputs / path.removeprefix("/outputs/")).write_bytes(b"broken")
    assert (await server.client.get(path, headers={"accept": "image/webp"})).status_code == 404


TRAVERSALS = [
    "/outputs/../history.log",
    "/outputs/%2e%2e/history.log",
    "/outputs/%2e%2e/config.txt",
    "/outputs/..%2fconfig.txt",
    "/outputs/..%2f..%2fprecious.png",
    "/outputs/%2e%2e/precious.png",
    "/outputs/%252e%252e/precious.png",
    "/outputs/./precious.png",
    "/outputs/%2e/precious.png",
    "/outputs/..\\precious.png",
    "/outputs/..%5cprecious.png",
    "/outputs/%5c..%5cprecious.png",
    "/outputs//precious.png",
    "/outputs/2026-01-01/../../precious.png",
    "/outputs/2026-01-01/..%2f..%2fprecious.png",
    "/outputs/2026-01-01/%2e%2e%2f%2e%2e%2fprecious.png",
    "/outputs/2026-01-01/....//precious.png",
    "/outputs/C:/precious.png",
    "/outputs/c:%5cprecious.png/x.png",
    "/outputs//etc/passwd",
    "/outputs/%2fetc%2fpasswd",
    "/outputs/%2fetc/passwd.png",
    "/outputs/2026-01-01/%00.png",
    "/outputs/%00/x.png",
    "/outputs/link/precious.png",
    "/outputs/2026-01-01/link.png",
    "/outputs/webhooks/secret.json",
    "/outputs/.hidden/x.png",
    "/outputs/2026-01-01/.hidden.png",
    "/outputs/history.log",
    "/outputs/settings_state.json",
    "/outputs/inputs/x.png/",
    "/outputs/2026-01-01/log.html",
    "/outputs/2026-01-01/notes.txt",
    "/outputs/2026-01-01/x.png.txt",
    "/outputs/2026-01-01/",
    "/outputs/2026-01-01",
    "/outputs/",
    "/outputs",
    "/outputs/" + "a" * 5000 + ".png",
    "/outputs/" + "a/" * 300 + "x.png",
    "/outputs/2026-01-01/" + "%F0%9F%8D%8E" * 80 + ".png",
    "/outputs/%ff%fe/x.png",
    "/outputs/~/x.png",
    "/outputs/~root/x.png",
    "/outputs/$HOME/x.png",
    "/outputs/con/nul.png",
    "/inputs/../history.log",
    "/inputs/%2e%2e%2fhistory.log",
    "/inputs/..%2fprecious.png",
    "/inputs/%2e%2e/precious.png",
    "/inputs/..%5cprecious.png",
    "/inputs//etc/passwd",
    "/inputs/%2fetc%2fpasswd",
    "/inputs/x.txt",
    "/inputs/.x.png",
    "/inputs/%00",
    "/inputs/sub/x.png",
    "/inputs/",
    "/inputs",
    "/files/%2e%2e/precious.png",
    "/files/..%2fprecious.png/x",
    "/files/2026-01-01/..%2f..%2fprecious.png",
    "/docs/..%2fextension.py",
    "/docs/%2e%2e%2fapp.py",
    "/docs/__init__.py",
]


@pytest.fixture
def temptation(server: Running) -> bytes:
    """Files that must never be served: outside the folder, behind links, hidden, of other kinds."""
    secret = b"\x89PNG precious"
    outside = server.outputs.parent
    (outside / "precious.png").write_bytes(secret)
    day = server.outputs / "2026-01-01"
    for folder in (day, server.outputs / ".hidden", server.outputs / "webhooks", server.outputs / "inputs"):
        folder.mkdir(exist_ok=True)
    (server.outputs / "link").symlink_to(outside)
    (day / "link.png").symlink_to(outside / "precious.png")
    for name in ("2026-01-01/.hidden.png", ".hidden/x.png", "webhooks/secret.json", "2026-01-01/log.html",
                 "2026-01-01/notes.txt", "inputs/x.txt", "inputs/.x.png"):  # fmt: skip
        (server.outputs / name).write_bytes(secret)
    return secret


@pytest.mark.parametrize("path", TRAVERSALS)
async def test_no_path_leads_out_of_the_folder(server: Running, temptation, path):
    from urllib.parse import unquote_to_bytes

    raw = path.encode("ascii", "replace")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": unquote_to_bytes(raw).decode("utf-8", "replace"), "raw_path": raw, "query_string": b"",
        "headers": [(b"host", b"127.0.0.1:7866")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 7866),
    }  # fmt: skip
    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict) -> None:
        sent.append(message)

    await server.application.asgi(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent)
    assert sent[0]["status"] in (404, 422)
    assert temptation not in body
    assert b"SPDX" not in body
    if path.startswith(("/outputs/", "/inputs/")) and sent[0]["status"] == 404:
        assert body == b""
