"""Element models, pictures and names in a request, and what a preset does under it."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from tests.fakes import png_base64
from tests.rest.conftest import BASE, Running

RED, PNG = (255, 0, 0), base64.b64decode(png_base64("red"))


async def stored_picture(server: Running, value: str) -> Image.Image | None:
    """What the server made of a picture value."""
    reply = await server.generate({"uov_input_image": value})
    assert reply.status_code == 200, reply.text
    url = reply.json()["req_params"]["uov_input_image"]
    return Image.open(io.BytesIO((await server.client.get(url)).content)) if url else None


# -- 6.1 – 6.3 elements ---------------------------------------------------------------------------------------------


async def test_omitted_loras_are_the_configured_rows(server: Running):
    loras = (await server.generate()).json()["req_params"]["loras"]
    assert len(loras) == 5
    assert all(row["enabled"] for row in loras)


async def test_enhance_ctrl_has_its_sixteen_defaults(server: Running):
    rows = (await server.generate({"enhance_ctrls": [{"enhance_prompt": "eye"}]})).json()["req_params"]["enhance_ctrls"]
    assert rows[0] == {
        "enhance_enabled": False, "enhance_mask_dino_prompt": "", "enhance_prompt": "eye",
        "enhance_negative_prompt": "", "enhance_mask_model": "sam", "enhance_mask_cloth_category": "full",
        "enhance_mask_sam_model": "vit_b", "enhance_mask_text_threshold": 0.25, "enhance_mask_box_threshold": 0.3,
        "enhance_mask_sam_max_detections": 0, "enhance_inpaint_disable_initial_latent": False,
        "enhance_inpaint_engine": "v2.6", "enhance_inpaint_strength": 1.0, "enhance_inpaint_respective_field": 0.618,
        "enhance_inpaint_erode_or_dilate": 0, "enhance_mask_invert": False,
    }  # fmt: skip


async def test_surplus_elements_are_cut(server: Running):
    body = {"controlnet_image": [{}] * 7, "enhance_ctrls": [{}] * 5}
    params = (await server.generate(body)).json()["req_params"]
    assert (len(params["controlnet_image"]), len(params["enhance_ctrls"])) == (4, 3)


# -- 6.4 pictures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "", "None", "none", "null", "string", " NONE "])
async def test_every_word_for_no_picture(server: Running, value):
    body = {"uov_input_image": value, "inpaint_input_image": value, "controlnet_image": [{"cn_img": value}]}
    params = (await server.generate(body)).json()["req_params"]
    assert (params["uov_input_image"], params["inpaint_input_image"]) == ("", "")
    assert params["controlnet_image"][0]["cn_img"] == ""
    assert params["current_tab"] == "uov"


@pytest.mark.parametrize(
    "spell",
    [
        lambda text: text,
        lambda text: f"data:image/png;base64,{text}",
        lambda text: "\n".join(text[i : i + 20] for i in range(0, len(text), 20)),
        lambda text: text.rstrip("="),
        lambda text: text.replace("+", "-").replace("/", "_"),
    ],
)
async def test_base64_in_every_spelling(server: Running, spell):
    picture = await stored_picture(server, spell(png_base64("red")))
    assert picture is not None
    assert picture.getpixel((0, 0)) == RED


async def test_own_urls_are_read_from_disk(server: Running):
    """Nothing listens on the port of the URL: only the disk can answer."""
    made = (await server.generate({"prompt": "apple", "uov_input_image": png_base64("red")})).json()
    for url in (made["result"][0], made["req_params"]["uov_input_image"]):
        for base in (BASE, "http://localhost:7866", "http://127.0.0.1:7865"):
            assert await stored_picture(server, url.replace(BASE, base)) is not None
    gone = await server.generate({"uov_input_image": f"{BASE}/inputs/{'0' * 64}.png"})
    assert gone.status_code == 422


async def test_masks_are_read_as_grey(server: Running):
    mask = png_base64("white")
    body = {"inpaint_input_image": png_base64(), "inpaint_mask_image_upload": mask}
    params = (await server.generate(body)).json()["req_params"]
    content = (await server.client.get(params["inpaint_mask_image_upload"])).content
    assert Image.open(io.BytesIO(content)).mode == "L"


@pytest.fixture
def web(request: pytest.FixtureRequest) -> Iterator[str]:
    """A small web server on this machine: /red.png, /redirect (to it), /loop, /text, /404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/redirect":
                self.send_response(302)
                self.send_header("Location", "/red.png")
            elif self.path == "/loop":
                self.send_response(302)
                self.send_header("Location", "/loop")
            else:
                self.send_response(404 if self.path == "/404" else 200)
            self.end_headers()
            self.wfile.write(PNG if self.path == "/red.png" else b"text")

        def log_message(self, format: str, *args: object) -> None:
            pass

    site = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=site.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{site.server_port}"
    site.shutdown()
    site.server_close()
    thread.join()


@pytest.mark.parametrize("path", ["/red.png", "/redirect"])
async def test_a_url_is_fetched_and_redirects_are_followed(server: Running, web, path):
    picture = await stored_picture(server, web + path)
    assert picture is not None
    assert picture.getpixel((0, 0)) == RED


@pytest.mark.parametrize("path", ["/404", "/text", "/loop"])
async def test_a_url_without_a_picture_is_422_and_queues_nothing(server: Running, web, path):
    reply = await server.generate({"uov_input_image": web + path})
    assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["body", "uov_input_image"])
    assert server.engine.runs == []


async def test_a_public_server_does_not_fetch_from_its_own_machine(serve, web):
    server = await serve("--listen", "0.0.0.0")
    reply = await server.generate({"uov_input_image": web + "/red.png"})
    assert reply.status_code == 422
    assert "--allow-url-hosts" in reply.json()["detail"][0]["msg"]


async def test_an_allowed_host_is_fetched_by_a_public_server(serve, web):
    server = await serve("--listen", "0.0.0.0", "--allow-url-hosts", "127.0.0.1")
    assert await stored_picture(server, web + "/red.png") is not None


# -- 6.5 current_tab ------------------------------------------------------------------------------------------------


async def test_an_image_prompt_in_the_third_slot_alone_is_ip(server: Running):
    params = (await server.generate({"controlnet_image": [{}, {}, {"cn_img": png_base64()}]})).json()["req_params"]
    assert params["current_tab"] == "ip"


async def test_mixing_flags_are_never_set_by_the_server(server: Running):
    body = {"controlnet_image": [{"cn_img": png_base64()}], "uov_input_image": png_base64()}
    params = (await server.generate(body)).json()["req_params"]
    assert not params["mixing_image_prompt_and_vary_upscale"]
    assert not params["mixing_image_prompt_and_inpaint"]


# -- 6.6 presets ----------------------------------------------------------------------------------------------------


@pytest.fixture
def preset(server: Running) -> None:
    presets = server.outputs.parent / "presets"
    presets.unlink()
    presets.mkdir()
    (presets / "own.json").write_text(json.dumps({"default_cfg_scale": 9.5, "default_prompt": "from preset"}))


async def params_with(server: Running, **body) -> dict:
    return (await server.generate({"preset": "own", **body})).json()["req_params"]


async def test_a_preset_lies_above_the_defaults(server: Running, preset):
    params = await params_with(server)
    assert (params["guidance_scale"], params["prompt"], params["preset"]) == (9.5, "from preset", "own")


async def test_a_sent_value_lies_above_the_preset(server: Running, preset):
    params = await params_with(server, guidance_scale=3.0, prompt="mine")
    assert (params["guidance_scale"], params["prompt"]) == (3.0, "mine")


async def test_a_sent_value_that_equals_the_default_gives_way_to_the_preset(server: Running, preset):
    default = (await server.generate()).json()["req_params"]["guidance_scale"]
    assert (await params_with(server, guidance_scale=default))["guidance_scale"] == 9.5


async def test_initial_is_no_preset(server: Running, preset):
    assert (await params_with(server, preset="initial"))["prompt"] == ""


async def test_a_key_the_preset_lacks_leaves_its_field_alone(server: Running, preset):
    default = (await server.generate()).json()["req_params"]
    assert (await params_with(server))["sharpness"] == default["sharpness"]


# -- 6.8 save_name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "", "none", "None"])
async def test_no_save_name_is_a_dated_name(server: Running, name):
    import re

    file = (await server.generate({"save_name": name})).json()["result"][0].rsplit("/", 1)[1]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d{4}\.png", file)


async def test_a_taken_save_name_gets_a_number(server: Running):
    names = [(await server.generate({"save_name": "a"})).json()["result"][0].rsplit("/", 1)[1] for _ in range(3)]
    assert names == ["a-0.png", "a-0_1.png", "a-0_2.png"]
