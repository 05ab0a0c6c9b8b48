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
