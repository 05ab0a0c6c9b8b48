"""One test for each row where the published description and the running servers disagreed; named after the row."""

import asyncio
import json
from datetime import datetime, timedelta

import httpx
import pytest

from modules.request import from_params
from tests.fakes import png_base64
from tests.rest.conftest import Running, Serve


async def params(server: Running, body: dict, **options) -> dict:
    """`req_params` of a finished call."""
    reply = await server.generate(body, **options)
    assert reply.status_code == 200, reply.text
    return reply.json()["req_params"]


async def test_row_01_adm_scaler_negative_defaults_to_0_8(server: Running):
    assert (await params(server, {}))["adm_scaler_negative"] == 0.8


async def test_row_02_adm_scaler_end_defaults_to_0_3(server: Running):
    assert (await params(server, {}))["adm_scaler_end"] == 0.3


@pytest.mark.parametrize(
    ("kind", "stop", "weight"),
    [("ImagePrompt", 0.5, 0.6), ("FaceSwap", 0.9, 0.75), ("PyraCanny", 0.5, 1.0), ("CPDS", 0.5, 1.0)],
)
async def test_row_03_cn_weight_is_0_5_when_absent_and_of_its_type_when_null(server: Running, kind, stop, weight):
    rows = (
        await params(
            server,
            {"controlnet_image": [{"cn_type": kind}, {"cn_type": kind, "cn_weight": None, "cn_stop": None}]},
        )
    )["controlnet_image"]
    assert (rows[0]["cn_weight"], rows[0]["cn_stop"]) == (0.5, 0.6)
    assert (rows[1]["cn_weight"], rows[1]["cn_stop"]) == (weight, stop)


async def test_row_04_cn_stop_is_0_6_when_absent(server: Running):
    assert (await params(server, {"controlnet_image": [{}]}))["controlnet_image"][0]["cn_stop"] == 0.6


@pytest.mark.parametrize("sent", ["a111", "a1111", "A1111"])
async def test_row_05_a111_means_a1111(server: Running, sent):
    assert (await params(server, {"metadata_scheme": sent}))["metadata_scheme"] == "a1111"


@pytest.mark.parametrize("sent", ["png", "jpg", "jpeg", "webp"])
async def test_row_06_output_formats_keep_their_suffix(server: Running, sent):
    record = (await server.generate({"output_format": sent})).json()
    assert record["result"][0].endswith(f".{sent}")


async def test_row_06_another_output_format_is_422(server: Running):
    reply = await server.generate({"output_format": "gif"})
    assert reply.status_code == 422
    assert reply.json()["detail"][0]["loc"] == ["body", "output_format"]


IMAGES = {
    "enhance": {"enhance_input_image": png_base64()},
    "ip": {"controlnet_image": [{"cn_img": png_base64()}]},
    "uov": {"uov_input_image": png_base64()},
    "inpaint": {"inpaint_input_image": png_base64()},
}


@pytest.mark.parametrize(
    ("sent", "tab"),
    [
        (("enhance", "ip", "uov", "inpaint"), "enhance"),
        (("ip", "uov", "inpaint"), "ip"),
        (("uov", "inpaint"), "uov"),
        (("inpaint",), "inpaint"),
        ((), "uov"),
    ],
)
async def test_row_07_current_tab_follows_the_images(server: Running, sent, tab):
    body = {key: value for name in sent for key, value in IMAGES[name].items()}
    assert (await params(server, {**body, "current_tab": "uov"}))["current_tab"] == tab


async def test_row_08_outpaint_distance_is_left_top_right_bottom(server: Running):
    stored = await params(server, {"outpaint_distance": [1, 2, 3]})
    assert stored["outpaint_distance"] == [1, 2, 3, 0]


@pytest.mark.parametrize("sent", [-1, 0, 0.5, 12, "7"])
async def test_row_09_overwrite_switch_takes_any_number(server: Running, sent):
    assert (await params(server, {"overwrite_switch": sent}))["overwrite_switch"] == float(sent)


@pytest.mark.parametrize("sent", ["None", None, ""])
async def test_row_10_inpaint_additional_prompt_none_is_empty(server: Running, sent):
    assert (await params(server, {"inpaint_additional_prompt": sent}))["inpaint_additional_prompt"] == ""


@pytest.mark.parametrize("sent", ["disable", "disabled", "Disabled", "DISABLE"])
async def test_row_11_uov_method_disable_in_any_spelling(server: Running, sent):
    assert (await params(server, {"uov_method": sent}))["uov_method"] == "Disabled"


async def test_row_12_single_objects_are_wrapped_into_lists(server: Running):
    stored = await params(server, {"loras": {"enabled": True}, "controlnet_image": {"cn_stop": 0.1}})
    assert stored["loras"] == [{"enabled": True, "model_name": "None", "weight": 0.5}]
    assert stored["controlnet_image"][0]["cn_stop"] == 0.1


async def test_row_13_lora_keys_are_optional(server: Running):
    stored = await params(server, {"loras": [{}]})
    assert stored["loras"] == [{"enabled": False, "model_name": "None", "weight": 0.5}]


@pytest.mark.parametrize("name", ["inpaint_mask_upload_checkbox", "inpaint_advanced_masking_checkbox"])
async def test_row_14_both_mask_flags_are_known(server: Running, name):
    reply = await server.generate({name: True})
    assert reply.status_code == 200
    assert "x-ignored-fields" not in reply.headers


@pytest.mark.parametrize("path", ["/v1/engine/control/", "/v1/engine/control"])
async def test_row_15_control_answers_with_and_without_slash(server: Running, path):
    reply = await server.client.post(path, params={"action": "stop"})
    assert (reply.status_code, reply.json()) == (200, {"message": "No task running"})


async def test_row_16_describe_takes_multipart_and_json(server: Running):
    server.engine.answers["describe"] = "a red field"
    import base64

    picture = base64.b64decode(png_base64())
    form = await server.client.post("/v1/tools/describe-image?image_type=Anime", files={"image": ("a.png", picture)})
    text = await server.client.post("/v1/tools/describe-image", json={"image": png_base64(), "image_type": "Photo"})
    assert form.json() == text.json() == {"describe": "a red field"}
    assert [payload["kinds"] for _tool, payload in server.engine.calls] == [["Anime"], ["Photo"]]


async def test_row_17_end_at_is_now_at_each_request(server: Running):
    start = (datetime.now() - timedelta(minutes=1)).isoformat()
    first = (await server.generate()).json()["task_id"]
    await server.client.get("/tasks", params={"start_at": start})
    second = (await server.generate()).json()["task_id"]
    shown = (await server.client.get("/tasks", params={"start_at": start})).json()["history"]
    assert [record["task_id"] for record in shown] == [second, first]


async def test_row_18_delete_takes_history_only_and_needs_start_at(server: Running):
    await server.generate()
    server.engine.hold()
    running, waiting = await server.accepted(), await server.accepted()
    await server.engine.held.wait()
    refused = await server.client.get("/tasks", params={"action": "delete"})
    assert refused.status_code == 422
    assert refused.json()["detail"][0]["loc"] == ["query", "start_at"]
    start = (datetime.now() - timedelta(minutes=1)).isoformat()
    await server.client.get("/tasks", params={"action": "Delete", "start_at": start})
    lists = (await server.client.get("/tasks")).json()
    assert lists["history"] == []
    assert [record["task_id"] for record in lists["current"]] == [running]
    assert [record["task_id"] for record in lists["pending"]] == [waiting]
    server.engine.release()


async def test_row_19_save_name_is_supported(server: Running):
    record = (await server.generate({"save_name": "apple", "image_number": 2})).json()
    assert [url.rsplit("/", 1)[1] for url in record["result"]] == ["apple-0.png", "apple-1.png"]


async def test_row_20_the_webhook_body_is_an_object(server: Running):
    posted: list[bytes] = []
    server.rest._api.outbox._send = lambda url, record, body: posted.append(body)
    record = (await server.generate({"webhook_url": "http://127.0.0.1:9/"})).json()
    await asyncio.gather(*server.rest._api.outbox._deliveries)
    assert [json.loads(body) for body in posted] == [record]


async def test_row_21_every_preset_key_reaches_its_own_field(server: Running):
    presets = server.outputs.parent / "presets"
    presets.unlink()
    presets.mkdir()
    (presets / "own.json").write_text(
        '{"default_cfg_scale": 9.5, "default_loras": [[true, "a.safetensors", 0.3]], "default_sampler": "euler"}'
    )
    stored = await params(server, {"preset": "own"})
    assert stored["guidance_scale"] == 9.5
    assert stored["adaptive_cfg"] == (await params(server, {}))["adaptive_cfg"]
    assert stored["sampler_name"] == "euler"
    assert stored["loras"][0] == {"enabled": True, "model_name": "a.safetensors", "weight": 0.3}


async def test_row_22_status_of_a_waiting_task_is_pending_everywhere(server: Running):
    server.engine.hold()
    await server.accepted()
    reply = await server.generate({"async_process": True})
    assert reply.json()["task_status"] == "pending"
    task_id = reply.json()["task_id"]
    assert (await server.client.get(f"/tasks/{task_id}")).json()["task_status"] == "pending"
    assert (await server.client.get("/tasks")).json()["pending"][0]["task_status"] == "pending"
    server.engine.release()


async def test_row_23_root_leads_to_the_docs_on_the_api_port(server: Running):
    reply = await server.client.get("/")
    assert (reply.status_code, reply.headers["location"]) == (307, "/docs")


async def test_row_24_the_api_answers_on_both_ports(server: Running):
    async with httpx.AsyncClient(transport=server.client._transport, base_url="http://127.0.0.1:7865") as page_port:
        assert (await page_port.get("/ping")).text == (await server.client.get("/ping")).text == "pong"


@pytest.mark.parametrize(("accept", "media_type"), [("image/jpg", "image/jpeg"), ("image/jpeg", "image/jpeg")])
async def test_row_26_image_jpg_is_image_jpeg(server: Running, accept, media_type):
    made = await server.generate(headers={"accept": accept})
    assert (made.status_code, made.headers["content-type"]) == (200, media_type)
    assert made.content.startswith(b"\xff\xd8")
    url = (await server.generate()).json()["result"][0]
    stored = await server.client.get(url, headers={"accept": accept})
    assert stored.headers["content-type"] == media_type
    assert stored.content.startswith(b"\xff\xd8")


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
async def test_row_27_bodies_without_content_type_are_read_as_json(server: Running, content_type):
    headers = {"content-type": content_type} if content_type else {}
    reply = await server.client.post("/v1/engine/generate/", content=b'{"prompt": "apple"}', headers=headers)
    assert reply.status_code == 200
    assert reply.json()["req_params"]["prompt"] == "apple"


async def test_posting_req_params_again_reproduces_the_task(server: Running):
    first = (await server.generate({"prompt": "apple", "preset": "initial", "loras": [{}], "image_number": 2})).json()
    again = (await server.generate(first["req_params"])).json()
    assert again["req_params"] == first["req_params"]
    assert again["seeds"] == first["seeds"]
    pictures = [(await server.client.get(record["result"][1])).content for record in (first, again)]
    assert pictures[0] == pictures[1]
    assert from_params(first["req_params"]).image_seed < 2**53


async def test_row_25_big_upscales_are_no_size_limit(server: Running):
    """A large picture is accepted; what is done with it is the engine's business."""
    stored = await params(server, {"uov_input_image": png_base64(size=(2900, 40)), "uov_method": "Upscale (2x)"})
    assert stored["uov_method"] == "Upscale (2x)"


async def test_an_idle_loop_stays_idle(serve: Serve):
    """Nothing polls: with nothing to do, no task of the loop wakes up by a timer."""
    server = await serve()
    await server.generate()
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    assert [handle for handle in getattr(loop, "_scheduled", []) if not handle.cancelled()] == []
