"""Paths that try to lead out of the output folder, through every door: files, pictures, names, presets."""

import base64
import json
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest

from tests.fakes import png_base64
from tests.rest.conftest import BASE, Running

SECRET_COLOUR = (1, 2, 3)
SECRET = base64.b64decode(png_base64("#010203"))

# What a client may put on the request line.
PATHS = [
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
    "/outputs/2026-01-01/%2e%2e%5c%2e%2e%5cprecious.png",
    "/outputs/2026-01-01/%252e%252e%252f%252e%252e%252fprecious.png",
    "/outputs/%25252e%25252e/precious.png",
    "/outputs/%c0%ae%c0%ae/precious.png",
    "/outputs/%c0%ae%c0%ae%c0%afprecious.png/x",
    "/outputs/..%c0%afprecious.png",
    "/outputs/%e0%80%ae%e0%80%ae/precious.png",
    "/outputs/%f0%80%80%ae%f0%80%80%ae/precious.png",
    "/outputs/..%u2215precious.png",
    "/outputs/%ef%bc%8e%ef%bc%8e/precious.png",
    "/outputs/%e2%80%a5/precious.png",
    "/outputs/..%ef%bc%8fprecious.png",
    "/outputs/..%e2%88%95precious.png",
    "/outputs/%2e%2e;/precious.png",
    "/outputs/..;a=b/precious.png",
    "/outputs/2026-01-01/..;/..;/precious.png",
    "/outputs/%5c%5cserver%5cshare/precious.png",
    "/outputs///server/share/precious.png",
    "/outputs/%5c%5c%3f%5cC:/precious.png",
    "/outputs/C%3a%5cWindows/win.png",
    "/outputs/2026-01-01/precious.png::$DATA",
    "/outputs/2026-01-01/link.png%00.png",
    "/outputs/2026-01-01/link.png%20",
    "/outputs/2026-01-01/link.png.",
    "/outputs/2026-01-01/inner.png",
    "/outputs/file:/precious.png",
    "/outputs/file:%2f%2f%2fetc/passwd.png",
    "/outputs/2026-01-01/%0d%0aprecious.png",
    "/outputs/%09../precious.png",
    "/outputs/..%09/precious.png",
    "/outputs/proc/self.png",
    "/outputs/2026-01-01%2f..%2f..%2fprecious.png",
    "/outputs/2026-01-01/../2026-01-01/../../precious.png",
    "/inputs/%252e%252e%252fprecious.png",
    "/inputs/%c0%ae%c0%ae%c0%afprecious.png",
    "/inputs/C:%5cprecious.png",
    "/inputs/file:%2f%2fprecious.png",
    "/inputs/link.png",
    "/inputs/%5c%5cserver%5cshare%5cprecious.png",
    "/files/link/precious.png",
    "/files/%c0%ae%c0%ae/precious.png",
]

# What a client may send as a picture; `{out}` is the output folder, `{base}` our own URL.
PICTURES = [
    "{out}/../precious.png",
    "{out}/2026-01-01/log.html",
    "../precious.png",
    "..\\precious.png",
    "inputs/../precious.png",
    "inputs/../../precious.png",
    "/inputs/../precious.png",
    "inputs/link.png",
    "inputs/" + "e" * 64 + ".png",
    "outputs/link/precious.png",
    "/etc/passwd",
    "C:\\precious.png",
    "\\\\server\\share\\precious.png",
    "//server/share/precious.png",
    "~/precious.png",
    "file:precious.png",
    "file:///etc/passwd",
    "file://{out}/../precious.png",
    "file:{out}/../precious.png",
    "FILE://localhost{out}/../precious.png",
    "ftp://127.0.0.1/precious.png",
    "gopher://127.0.0.1/1",
    "http:///etc/passwd",
    "http:{out}/../precious.png",
    "{base}/outputs/../precious.png",
    "{base}/outputs/%2e%2e/precious.png",
    "{base}/outputs/..%2fprecious.png",
    "{base}/outputs/%252e%252e/precious.png",
    "{base}/outputs/2026-01-01/..%2f..%2fprecious.png",
    "{base}/outputs/2026-01-01/..%5c..%5cprecious.png",
    "{base}/outputs/link/precious.png",
    "{base}/outputs/2026-01-01/link.png",
    "{base}/outputs/2026-01-01/inner.png",
    "{base}/outputs/2026-01-01/log.html",
    "{base}/outputs/history.log",
    "{base}/outputs//etc/passwd",
    "{base}/outputs/C:/precious.png",
    "{base}/outputs/2026-01-01/%00.png",
    "{base}/outputs/%c0%ae%c0%ae/precious.png",
    "{base}/inputs/..%2fprecious.png",
    "{base}/inputs/link.png",
    "{base}/inputs/../../precious.png",
]

NAMES = [
    "../precious",
    "../../evil",
    "a/b",
    "/etc/evil",
    "..",
    ".",
    "...",
    ".hidden",
    "c:evil",
    "C:\\evil",
    "..\\..\\evil",
    "\\\\server\\share\\evil",
    "file:///tmp/evil",
    "%2e%2e%2fevil",
    "%252e%252e%252fevil",
    "\u2025/evil",
    "\uff0e\uff0e\uff0fevil",
    "..\u2215evil",
    "a\x00b",
    "\x00",
    "a\nb",
    "a\rb",
    "\u202egnp.exe",
    "con",
    "NUL",
    "evil::$DATA",
    "link/evil",
    "~/evil",
    "$HOME/evil",
    "x" * 500,
    "\U0001f34e" * 200,
    "apfel \U0001f34e",
    " ",
    "evil. ",
]

PRESETS = [
    "../default",
    "../../presets/default",
    "..\\default",
    "presets/default",
    "./default",
    "/etc/passwd",
    "{presets}/default",
    "default.json",
    "default\x00",
    "\x00",
    "..",
    ".",
    "C:\\default",
    "\\\\server\\share\\default",
    "file:///etc/passwd",
    "file:default",
    "%2e%2e%2fdefault",
    "%252e%252e%252fdefault",
    "\uff0e\uff0e\uff0fdefault",
    "..\u2215default",
    "default/../default",
    "default\n",
    ".hidden",
    "_hidden",
    "x" * 500,
]


def test_the_corpus_is_large():
    assert all(len(set(corpus)) == len(corpus) for corpus in (PATHS, PICTURES, NAMES, PRESETS))
    assert len(PATHS) >= 100
    assert len(PICTURES) >= 40
    assert len(NAMES) + len(PRESETS) >= 55


@pytest.fixture
def temptation(server: Running) -> Path:
    """Files that must never be served or read: outside the folder, behind links, hidden, of other kinds."""
    outside = server.outputs.parent
    (outside / "precious.png").write_bytes(SECRET)
    day, inputs = server.outputs / "2026-01-01", server.outputs / "inputs"
    for folder in (day, inputs, server.outputs / ".hidden", server.outputs / "webhooks"):
        folder.mkdir(exist_ok=True)
    (server.outputs / "link").symlink_to(outside)
    for link in (day / "link.png", inputs / "link.png", inputs / f"{'e' * 64}.png"):
        link.symlink_to(outside / "precious.png")
    (day / "inner.png").symlink_to(day / "log.html")
    for name in ("2026-01-01/.hidden.png", ".hidden/x.png", "webhooks/secret.json", "2026-01-01/log.html",
                 "2026-01-01/notes.txt", "inputs/x.txt", "inputs/.x.png"):  # fmt: skip
        (server.outputs / name).write_bytes(SECRET)
    return outside


def files_below(folder: Path) -> set[Path]:
    """Every regular file, links not followed."""
    return {path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


@pytest.mark.parametrize("path", PATHS)
async def test_no_path_leads_out_of_the_folder(server: Running, temptation, path):
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
    assert SECRET not in body
    assert b"SPDX" not in body
    if path.startswith(("/outputs/", "/inputs/")) and sent[0]["status"] == 404:
        assert body == b""


@pytest.mark.parametrize("value", PICTURES)
async def test_no_picture_value_reads_another_file(server: Running, temptation, value):
    sent = value.replace("{out}", str(server.outputs)).replace("{base}", BASE)
    before = files_below(temptation)
    for body, loc in (
        ({"uov_input_image": sent}, ["body", "uov_input_image"]),
        ({"controlnet_image": [{"cn_img": sent}]}, ["body", "controlnet_image", 0, "cn_img"]),
    ):
        reply = await server.generate(body)
        assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, loc)
    assert server.engine.runs == []
    assert files_below(temptation) == before, "nothing was stored"


@pytest.mark.parametrize("name", NAMES)
async def test_no_save_name_leaves_its_folder(server: Running, temptation, name):
    before = files_below(temptation)
    record = (await server.generate({"save_name": name})).json()
    assert record["task_status"] == "finished"
    assert (await server.client.get(record["result"][0])).status_code == 200
    pictures = {path for path in files_below(temptation) - before if path.suffix == ".png"}
    assert [path.parent.parent for path in pictures] == [server.outputs]
    assert not any(path.name.startswith(".") for path in pictures)
    assert (temptation / "precious.png").read_bytes() == SECRET


@pytest.mark.parametrize("name", PRESETS)
async def test_no_preset_name_is_a_path(server: Running, tmp_path, name):
    outside = {"default_prompt": "from outside"}
    for path in (tmp_path / "default.json", tmp_path / "passwd.json"):
        path.write_text(json.dumps(outside))
    reply = await server.generate({"preset": name.replace("{presets}", str(tmp_path / "presets"))})
    assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["body", "preset"])
    assert server.engine.runs == []


@pytest.mark.parametrize("base", [BASE, "http://localhost:7866", "http://127.0.0.1:7865"])
async def test_own_result_and_input_urls_are_accepted(server: Running, temptation, base):
    made = (await server.generate({"save_name": "my cat", "uov_input_image": png_base64("red")})).json()
    for url in (made["result"][0], made["req_params"]["uov_input_image"]):
        reply = await server.generate({"uov_input_image": url.replace(BASE, base)})
        assert reply.status_code == 200, reply.text
        assert reply.json()["req_params"]["uov_input_image"].startswith(f"{BASE}/inputs/")
