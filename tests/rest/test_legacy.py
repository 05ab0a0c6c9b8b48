"""Clients of Fooocus-API v1 and v2: their paths, fields and replies."""

import asyncio
import base64
import io
import json
import uuid

import pytest
from PIL import Image

from modules.events import Failed
from tests.fakes import png_base64
from tests.rest.conftest import BASE, Running, Serve

PNG = base64.b64decode(png_base64("red"))
T2I = "/v1/generation/text-to-image"


async def run(server: Running, path: str, **options) -> tuple[list[dict], dict]:
    """Results of an old call, and the request it became."""
    reply = await server.client.post(path, **options)
    assert reply.status_code == 200, reply.text
    return reply.json(), server.engine.runs[-1].req_params


def image(name: str = "x.png") -> tuple[str, bytes]:
    return (name, PNG)


# -- 14.1 endpoints -------------------------------------------------------------------------------------------------


async def test_text_to_image(server: Running):
    results, params = await run(server, T2I, json={"prompt": "apple", "image_number": 2, "image_seed": 7})
    assert [one["seed"] for one in results] == ["7", "8"]
    assert [one["finish_reason"] for one in results] == ["SUCCESS", "SUCCESS"]
    assert results[0]["base64"] is None
    assert (await server.client.get(results[0]["url"])).headers["content-type"] == "image/png"
    job_id = str(uuid.UUID(server.engine.runs[0].task_id))
    assert results[1]["url"].endswith(f"/{job_id}-1.png")
    assert params["prompt"] == "apple"


async def test_text_to_image_with_ip(server: Running):
    prompts = [{"cn_img": png_base64(), "cn_stop": 0, "cn_weight": 0, "cn_type": "FaceSwap"}]
    _results, params = await run(server, "/v2/generation/text-to-image-with-ip", json={"image_prompts": prompts})
    row = params["controlnet_image"][0]
    assert (row["cn_stop"], row["cn_weight"], row["cn_type"]) == (0.9, 0.75, "FaceSwap")
    assert row["cn_img"].startswith("inputs/")


async def test_upscale_vary_as_a_form(server: Running):
    data = {
        "uov_method": "Upscale (Custom)",
        "upscale_value": "1.5",
        "prompt": "x",
        "style_selections": "Fooocus Sharp, SAI Anime",
    }
    _results, params = await run(server, "/v1/generation/image-upscale-vary", data=data, files={"input_image": image()})
    assert (params["uov_method"], params["upscale_multiple"]) == ("Upscale (Custom)", 1.5)
    assert params["uov_input_image"].startswith("inputs/")
    assert params["style_selections"] == ["Fooocus Sharp", "SAI Anime"]
    assert params["save_metadata_to_images"] is False


async def test_upscale_vary_as_json(server: Running):
    body = {"input_image": png_base64()}
    _results, params = await run(server, "/v2/generation/image-upscale-vary", json=body)
    assert params["uov_method"] == "Upscale (2x)"
    assert not params["mixing_image_prompt_and_vary_upscale"]
    body["image_prompts"] = [{"cn_img": png_base64("blue")}]
    _results, params = await run(server, "/v2/generation/image-upscale-vary", json=body)
    assert params["mixing_image_prompt_and_vary_upscale"]


async def test_inpaint_outpaint_as_a_form(server: Running):
    data = {
        "outpaint_selections": "Left,Top", "outpaint_distance_left": "5", "outpaint_distance_top": "-1",
        "inpaint_additional_prompt": "sky", "outpaint_distance_bottom": "7",
    }  # fmt: skip
    files = {"input_image": image(), "input_mask": image()}
    _results, params = await run(server, "/v1/generation/image-inpaint-outpaint", data=data, files=files)
    assert params["outpaint_selections"] == ["Left", "Top"]
    assert params["outpaint_distance"] == [5, 0, 0, 7]
    assert params["inpaint_input_image"].startswith("inputs/")
    with Image.open(server.outputs / params["inpaint_mask_image_upload"]) as mask:
        assert mask.mode == "L"
    assert params["inpaint_additional_prompt"] == "sky"


async def test_inpaint_outpaint_as_json(server: Running):
    body = {"input_image": png_base64(), "input_mask": None, "image_prompts": [{"cn_img": png_base64("blue")}]}
    _results, params = await run(server, "/v2/generation/image-inpaint-outpaint", json=body)
    assert params["mixing_image_prompt_and_inpaint"]
    assert params["inpaint_respective_field"] == 1.0


async def test_image_prompt_as_a_form(server: Running):
    data = {"cn_stop1": "0.7", "cn_weight1": "0", "cn_type1": "PyraCanny", "cn_type2": "CPDS", "loras": "[]"}
    files = {"cn_img1": image(), "cn_img2": image()}
    _results, params = await run(server, "/v1/generation/image-prompt", data=data, files=files)
    first, second = params["controlnet_image"][:2]
    assert (first["cn_stop"], first["cn_weight"], first["cn_type"]) == (0.7, 1.0, "PyraCanny")
    assert (second["cn_stop"], second["cn_weight"], second["cn_type"]) == (0.5, 1.0, "CPDS")
    assert second["cn_img"].startswith("inputs/")
    assert params["loras"] == []


async def test_image_prompt_as_json(server: Running):
    body = {"image_prompts": [{"cn_img": png_base64()}], "input_image": png_base64("blue")}
    _results, params = await run(server, "/v2/generation/image-prompt", json=body)
    assert params["inpaint_input_image"].startswith("inputs/")
    assert params["mixing_image_prompt_and_inpaint"]


async def test_image_enhance_as_a_form(server: Running):
    data = {
        "enhance_checkbox": "true", "enhance_uov_method": "Vary (Subtle)", "enhance_enabled_1": "true",
        "enhance_mask_dino_prompt_1": "face", "enhance_enabled_2": "false", "enhance_prompt_2": "hand",
    }  # fmt: skip
    _results, params = await run(
        server, "/v1/generation/image-enhance", data=data, files={"enhance_input_image": image()}
    )
    assert params["enhance_checkbox"]
    assert [row["enhance_enabled"] for row in params["enhance_ctrls"]] == [True, False, False]
    assert params["enhance_ctrls"][0]["enhance_mask_dino_prompt"] == "face"
    assert params["enhance_ctrls"][1]["enhance_prompt"] == "hand"
    assert params["enhance_input_image"].startswith("inputs/")


async def test_image_enhance_as_json(server: Running):
    body = {"enhance_input_image": png_base64(), "enhance_ctrlnets": [{"enhance_enabled": True}]}
    _results, params = await run(server, "/v2/generation/image-enhance", json=body)
    assert params["enhance_uov_method"] == "Vary (Strong)"
    assert params["save_final_enhanced_image_only"]
    assert params["enhance_ctrls"][0]["enhance_mask_dino_prompt"] == "face"


async def test_stop(server: Running):
    assert (await server.client.post("/v1/generation/stop")).json() == {"msg": "success"}
    server.engine.hold()
    task_id = await server.accepted()
    await server.engine.held.wait()
    assert (await server.client.post("/v1/generation/stop")).json() == {"msg": "success"}
    assert (await server.ended(task_id))["task_status"] == "stop"


async def test_query_job_through_its_life(server: Running):
    server.engine.hold(at_step=2)
    reply = (await server.client.post(T2I, json={"async_process": True, "image_seed": 3})).json()
    assert (reply["job_type"], reply["job_stage"], reply["job_result"]) == ("Text to Image", "WAITING", None)
    assert reply["job_progress"] == 0
    await server.engine.held.wait()
    query = {"job_id": reply["job_id"], "require_step_preview": "true"}
    running = (await server.client.get("/v1/generation/query-job", params=query)).json()
    assert (running["job_stage"], running["job_status"]) == ("RUNNING", "Sampling step 1/4, image 1/1 ...")
    assert Image.open(io.BytesIO(base64.b64decode(running["job_step_preview"]))).format == "PNG"
    plain = (await server.client.get("/v1/generation/query-job", params={"job_id": reply["job_id"]})).json()
    assert plain["job_step_preview"] is None
    server.engine.release()
    await server.ended(reply["job_id"].replace("-", ""))
    done = (await server.client.get("/v1/generation/query-job", params=query)).json()
    assert (done["job_stage"], done["job_progress"], done["job_status"]) == ("SUCCESS", 100, "Finished")
    assert done["job_result"][0]["seed"] == "3"
    assert done["job_step_preview"] is None


async def test_query_job_of_an_unknown_job(server: Running):
    reply = await server.client.get("/v1/generation/query-job", params={"job_id": str(uuid.uuid4())})
    assert reply.status_code == 404
    assert (reply.json()["job_type"], reply.json()["job_stage"]) == ("Not Found", "ERROR")
    assert reply.json()["job_status"] == "Job not found"


async def test_job_types_follow_the_request(server: Running):
    types = []
    for path, body in (
        ("/v2/generation/image-upscale-vary", {"input_image": png_base64()}),
        ("/v2/generation/image-inpaint-outpaint", {"input_image": png_base64()}),
        ("/v2/generation/image-prompt", {"image_prompts": [{"cn_img": png_base64()}]}),
        ("/v2/generation/image-enhance", {"enhance_input_image": png_base64()}),
    ):
        types.append((await server.client.post(path, json={**body, "async_process": True})).json()["job_type"])
    assert types == ["Image Upscale or Variation", "Image Inpaint or Outpaint", "Image Prompt", "Image Enhancement"]


async def test_job_queue_and_history(server: Running):
    assert (await server.client.get("/v1/generation/job-queue")).json() == {
        "running_size": 0, "finished_size": 0, "last_job_id": None,
    }  # fmt: skip
    await server.client.post(T2I, json={})
    server.engine.hold()
    job_id = (await server.client.post(T2I, json={"async_process": True})).json()["job_id"]
    await server.engine.held.wait()
    assert (await server.client.get("/v1/generation/job-queue")).json() == {
        "running_size": 1, "finished_size": 1, "last_job_id": job_id,
    }  # fmt: skip
    lists = (await server.client.get("/v1/generation/job-history")).json()
    assert [one["job_id"] for one in lists["queue"]] == [job_id]
    assert [one["is_finished"] for one in lists["history"]] == [True]
    assert lists["history"][0].keys() == {"job_id", "in_queue_mills", "start_mills", "finish_mills", "is_finished"}
    server.engine.release()
    await server.ended(job_id.replace("-", ""))
    one = (await server.client.get("/v1/generation/job-history", params={"job_id": job_id})).json()
    assert (len(one["history"]), one["queue"]) == (1, [])
    delete = {"job_id": job_id, "delete": "true"}
    assert (await server.client.get("/v1/generation/job-history", params=delete)).json() == {"message": "Deleted"}
    assert (await server.client.get("/v1/generation/job-history", params=delete)).json() == {"message": "Not found"}


async def test_models_and_files_and_memory(server: Running):
    names = (await server.client.post("/v1/engines/refresh-models")).json()
    assert names.keys() == {"model_filenames", "lora_filenames"}
    url = (await server.generate()).json()["result"][0]
    old = url.replace(f"{BASE}/outputs/", "/files/")
    assert (await server.client.get(old)).content == (await server.client.get(url)).content
    server.engine.answers["unload_models"] = None
    assert (await server.client.get("/v1/engines/clean_vram")).json() == {"message": "ok"}
    assert server.engine.calls[-1][0] == "unload_models"


# -- 14.2 fields ----------------------------------------------------------------------------------------------------


async def test_advanced_params_move_up(server: Running):
    body = {"advanced_params": {"adaptive_cfg": 3, "sampler_name": "euler", "inpaint_mask_upload_checkbox": True}}
    _results, params = await run(server, T2I, json=body)
    assert (params["adaptive_cfg"], params["sampler_name"]) == (3, "euler")
    text = {"advanced_params": json.dumps({"adaptive_cfg": 4}), "uov_method": "Disabled"}
    _results, params = await run(server, "/v1/generation/image-upscale-vary", data=text, files={"input_image": image()})
    assert params["adaptive_cfg"] == 4
    broken = {"advanced_params": "{", "loras": "[", "uov_method": "Disabled"}
    _results, params = await run(
        server, "/v1/generation/image-upscale-vary", data=broken, files={"input_image": image()}
    )
    assert params["adaptive_cfg"] == 7.0


async def test_old_names_of_saving(server: Running):
    body = {"save_meta": False, "meta_scheme": "a111", "save_extension": "jpg", "save_name": "own"}
    results, params = await run(server, T2I, json=body)
    assert (params["save_metadata_to_images"], params["metadata_scheme"], params["output_format"]) == (
        False,
        "a1111",
        "jpg",
    )
    assert results[0]["url"].endswith("/own-0.jpg")


async def test_base64_replies_are_data_uris(server: Running):
    results, _params = await run(server, T2I, json={"require_base64": True})
    assert results[0]["base64"].startswith("data:image/png;base64,")


# -- 14.3 replies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"headers": {"accept": "image/png"}}, {"params": {"accept": "image/png"}}])
async def test_picture_mode_for_exactly_image_png(server: Running, options):
    reply = await server.client.post(T2I, json={"image_number": 4}, **options)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "image/png")
    assert server.engine.runs[0].req_params["image_number"] == 1
    other = await server.client.post(T2I, json={}, headers={"accept": "image/jpeg"})
    assert other.headers["content-type"] == "application/json"


async def test_picture_mode_errors_are_words(serve: Serve):
    server = await serve("--queue-limit", "1")
    server.engine.failure = Failed("broken")
    failed = await server.client.post(T2I, json={}, headers={"accept": "image/png"})
    assert (failed.status_code, failed.text) == (500, "ERROR")
    server.engine.failure = None
    server.engine.hold()
    call = asyncio.create_task(server.client.post(T2I, json={}, headers={"accept": "image/png"}))
    await server.engine.held.wait()
    await server.accepted()
    full = await server.client.post(T2I, json={}, headers={"accept": "image/png"})
    assert (full.status_code, full.text) == (409, "QUEUE_IS_FULL")
    listed = await server.client.post(T2I, json={})
    assert (listed.status_code, listed.json()[0]["finish_reason"]) == (429, "QUEUE_IS_FULL")
    await server.client.post("/v1/generation/stop")
    cancelled = await call
    assert (cancelled.status_code, cancelled.text) == (400, "USER_CANCEL")
    server.engine.release()


async def test_a_failed_call_answers_a_result_that_says_so(server: Running):
    server.engine.failure = Failed("broken")
    reply = await server.client.post(T2I, json={})
    assert reply.status_code == 500
    assert reply.json() == [{"base64": None, "url": None, "seed": "", "finish_reason": "ERROR"}]


async def test_422_echoes_the_request(server: Running):
    reply = await server.client.post(T2I, json={"image_number": 99, "prompt": "apple"})
    assert reply.status_code == 422
    assert reply.json()["body"] == {"image_number": 99, "prompt": "apple"}
    assert reply.json()["detail"][0]["loc"] == ["body", "image_number"]
    assert "body" not in (await server.generate({"image_number": 99})).json()


async def test_long_replies_are_packed_when_the_client_allows(server: Running):
    for encoding, packed in (("gzip", True), ("identity", False)):
        body = {"require_base64": True, "image_number": 4}
        reply = await server.client.post(T2I, json=body, headers={"accept-encoding": encoding})
        assert (reply.headers.get("content-encoding") == "gzip") is packed
        assert len(reply.json()) == 4


async def test_the_old_webhook_body(server: Running):
    posted: list[bytes] = []
    server.rest._api.outbox._send = lambda url, record, body: posted.append(body)
    await run(server, T2I, json={"webhook_url": "http://127.0.0.1:9/x", "image_seed": 5})
    await asyncio.gather(*server.rest._api.outbox._deliveries)
    body = json.loads(posted[0])
    assert body["job_id"] == str(uuid.UUID(server.engine.runs[0].task_id))
    assert [one["seed"] for one in body["job_result"]] == ["5"]
    assert body["job_result"][0]["url"].startswith("http://")


async def test_an_idempotency_key_works_on_old_routes_too(server: Running):
    headers = {"Idempotency-Key": "k"}
    first, again = [(await server.client.post(T2I, json={"prompt": "apple"}, headers=headers)).json() for _ in range(2)]
    assert first == again
    (record,) = server.engine.runs
    assert first[0]["url"].endswith(f"/{uuid.UUID(record.task_id)}-0.png")
    other = await server.client.post(T2I, json={"prompt": "pear"}, headers=headers)
    assert (other.status_code, other.json()["body"]) == (422, {"prompt": "pear"})


async def test_the_old_routes_can_be_left_out(serve: Serve):
    server = await serve("--no-legacy-api")
    for path in (T2I, "/v2/generation/image-prompt", "/v1/generation/stop"):
        assert (await server.client.post(path, json={})).status_code == 404
    assert (await server.generate()).status_code == 200
