"""Rows of the wire contract that no other file tests; each test is named after its section and row."""

import asyncio
import base64
import io
import json
import re
from collections.abc import AsyncIterator
from datetime import datetime, timedelta

import httpx
import pytest
from PIL import Image

from extensions.rest_api.extension import RestApi
from modules.assembly import build_services
from modules.events import Event, ImageSaved
from modules.jobs import Job
from modules.presets import FIELD_OF_KEY
from modules.progress import ProgressMeter
from modules.serving import assemble
from modules.settings import Settings
from tests.fakes import png_base64
from tests.rest.conftest import BASE, ROOT, Running
from tests.rest.test_generate import messages_of
from tests.rest.test_legacy import T2I, image, run
from tests.rest.test_tasks import NOON, history_ids, stored

MILLISECONDS = timedelta(milliseconds=1)


async def params(server: Running, body: dict) -> dict:
    """`req_params` of a finished call."""
    reply = await server.generate(body)
    assert reply.status_code == 200, reply.text
    return reply.json()["req_params"]


async def refused_at(server: Running, body: dict) -> list:
    """Where a refused call says that it is wrong; nothing was queued."""
    reply = await server.generate(body)
    assert reply.status_code == 422, reply.text
    assert server.engine.runs == []
    return reply.json()["detail"][0]["loc"]


# -- 1 contradictions, 2.7 errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inpaint_mask_upload_checkbox", "inpaint_advanced_masking_checkbox"])
@pytest.mark.parametrize("flag", [True, False])
async def test_1_14_a_mask_is_used_whatever_the_flag_says(server: Running, name, flag):
    body = {"inpaint_input_image": png_base64(), "inpaint_mask_image_upload": png_base64("white"), name: flag}
    assert (await params(server, body))["inpaint_mask_image_upload"]
    assert (await params(server, {name: flag}))["inpaint_mask_image_upload"] == ""


async def test_2_7_204_when_every_picture_of_a_picture_call_was_skipped(server: Running):
    server.engine.hold()
    call = asyncio.create_task(server.generate(headers={"accept": "image/png"}))
    await server.engine.held.wait()
    await server.client.post("/v1/engine/control/?action=skip")
    assert ((await call).status_code, (await call).content) == (204, b"")


@pytest.mark.parametrize("path", ["/outputs/2026-01-01/none.png", "/inputs/none.png", "/outputs/none", "/inputs/x.txt"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_2_7_404_of_an_unknown_file_has_an_empty_body(server: Running, path, method):
    reply = await server.client.request(method, path)
    assert (reply.status_code, reply.content) == (404, b"")


@pytest.fixture
async def with_real_checks(tmp_path) -> AsyncIterator[httpx.AsyncClient]:
    """A server that looks for every name a request holds; its engine would fail if it were asked."""

    def no_engine() -> None:
        raise AssertionError

    flags = ["--output-path", str(tmp_path / "out"), "--temp-path", str(tmp_path / "t"), "--offline"]
    rest = RestApi()
    settings = Settings.load(flags, env={}, root=ROOT, extra=[rest.add_arguments])
    services = build_services(settings, inline=True, workbench=no_engine)
    application = assemble(services, [rest], api_ports=frozenset({7866}))
    async with application.front._lifespan():
        transport = httpx.ASGITransport(application.asgi)
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
            yield client
    services.history.close()


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        ({"base_model_name": "nope.safetensors"}, ["base_model_name"]),
        ({"refiner_model_name": "nope.safetensors"}, ["refiner_model_name"]),
        ({"loras": [{"enabled": True, "model_name": "nope.safetensors"}]}, ["loras", 0, "model_name"]),
        ({"vae_name": "nope.safetensors"}, ["vae_name"]),
        ({"sampler_name": "nope"}, ["sampler_name"]),
        ({"scheduler_name": "nope"}, ["scheduler_name"]),
        ({"style_selections": ["Fooocus Sharp", "Nope"]}, ["style_selections", 1]),
        ({"preset": "nope"}, ["preset"]),
    ],
)
async def test_2_7_422_of_an_unknown_name_says_where_it_stands_and_queues_nothing(with_real_checks, body, loc):
    reply = await with_real_checks.post("/v1/engine/generate/", json=body)
    assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["body", *loc])
    assert "ope" in str(reply.json()["detail"][0]["input"])
    assert (await with_real_checks.get("/tasks")).json() == {"history": [], "current": [], "pending": []}


# -- 4 generate --------------------------------------------------------------------------------------------------------


async def test_4_3_the_stream_ends_after_its_last_event_without_a_done_line(server: Running):
    text = (await server.generate({"stream_output": True})).text
    assert "[DONE]" not in text
    assert "event:" not in text
    assert "id:" not in text.replace('"task_id":', "")
    assert text.split("\r\n\r\n")[-2].startswith('data: {"progress": 100, "preview": null, "message": "Finished"')


async def test_4_4_the_id_can_be_queried_as_soon_as_the_reply_is_out(server: Running):
    server.engine.hold()
    ids = [await server.accepted() for _ in range(5)]
    replies = await asyncio.gather(*(server.client.get(f"/tasks/{task_id}") for task_id in ids))
    assert {reply.status_code for reply in replies} == {200}
    server.engine.release()


def test_4_6_step_texts_keep_the_shape_that_clients_parse():
    meter = ProgressMeter(images=3)
    meter.plan(30)
    event = meter.sampling(12, image=2)
    assert event.message == "Sampling step 12/30, image 2/3 ..."
    percents = [meter.sampling(step, image=picture).percent for picture in (1, 2, 3) for step in range(1, 31)]
    assert percents == sorted(percents)
    assert 0 < percents[0] <= percents[-1] <= 99


async def test_4_6_a_waiting_stream_says_its_place(server: Running):
    server.engine.hold()
    await server.accepted()
    await server.engine.held.wait()
    call = asyncio.create_task(server.generate({"stream_output": True}))
    while not server.services.jobs.waiting:
        await asyncio.sleep(0)
    server.engine.release()
    assert re.fullmatch(r"Queued, position \d+ \.\.\.", messages_of((await call).text)[0]["message"])


# -- 6 elements and preprocessing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        ({"loras": [{"weight": 2.1}]}, ["loras", 0, "weight"]),
        ({"loras": [{}, {"weight": -2.1}]}, ["loras", 1, "weight"]),
        ({"controlnet_image": [{"cn_stop": 1.1}]}, ["controlnet_image", 0, "cn_stop"]),
        ({"controlnet_image": [{"cn_weight": 2.1}]}, ["controlnet_image", 0, "cn_weight"]),
        ({"controlnet_image": [{"cn_type": "Depth"}]}, ["controlnet_image", 0, "cn_type"]),
        ({"enhance_ctrls": [{"enhance_mask_model": "x"}]}, ["enhance_ctrls", 0, "enhance_mask_model"]),
        (
            {"enhance_ctrls": [{"enhance_mask_cloth_category": "x"}]},
            ["enhance_ctrls", 0, "enhance_mask_cloth_category"],
        ),
        ({"enhance_ctrls": [{"enhance_mask_sam_model": "x"}]}, ["enhance_ctrls", 0, "enhance_mask_sam_model"]),
        ({"enhance_ctrls": [{"enhance_mask_text_threshold": 2}]}, ["enhance_ctrls", 0, "enhance_mask_text_threshold"]),
        ({"enhance_ctrls": [{"enhance_mask_box_threshold": -1}]}, ["enhance_ctrls", 0, "enhance_mask_box_threshold"]),
        (
            {"enhance_ctrls": [{"enhance_mask_sam_max_detections": 11}]},
            ["enhance_ctrls", 0, "enhance_mask_sam_max_detections"],
        ),
        ({"enhance_ctrls": [{"enhance_inpaint_strength": 1.1}]}, ["enhance_ctrls", 0, "enhance_inpaint_strength"]),
        (
            {"enhance_ctrls": [{"enhance_inpaint_respective_field": 1.1}]},
            ["enhance_ctrls", 0, "enhance_inpaint_respective_field"],
        ),
        (
            {"enhance_ctrls": [{"enhance_inpaint_erode_or_dilate": 65}]},
            ["enhance_ctrls", 0, "enhance_inpaint_erode_or_dilate"],
        ),
    ],
)
async def test_6_1_to_6_3_values_out_of_range_are_422_naming_their_element(server: Running, body, loc):
    assert await refused_at(server, body) == ["body", *loc]


@pytest.mark.parametrize("weight", [-2, 0, 2])
async def test_6_1_the_ends_of_the_range_of_a_weight_are_in_it(server: Running, weight):
    assert (await params(server, {"loras": [{"weight": weight}]}))["loras"][0]["weight"] == weight


async def test_6_4_a_fetched_picture_asks_like_a_browser(server: Running):
    asked: list[str] = []
    loop = asyncio.get_running_loop()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode())
        content = base64.b64decode(png_base64("red"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(content) + content)
        await writer.drain()
        writer.close()

    site = await asyncio.start_server(answer, "127.0.0.1", 0)
    assert loop is site.get_loop()
    port = site.sockets[0].getsockname()[1]
    assert (await params(server, {"uov_input_image": f"http://127.0.0.1:{port}/a.png"}))["uov_input_image"]
    site.close()
    await site.wait_closed()
    assert asked[0].startswith("GET /a.png HTTP/1.1")
    assert re.search(r"(?mi)^user-agent: mozilla/5\.0", asked[0])


async def test_6_5_an_inpaint_picture_without_mask_and_direction_is_a_fresh_picture_and_a_warning(server, caplog):
    body = {"inpaint_input_image": png_base64()}
    assert (await params(server, body))["current_tab"] == "inpaint"
    assert "repaints nothing" in caplog.text
    caplog.clear()
    await params(server, {**body, "outpaint_selections": ["Left"]})
    await params(server, {**body, "inpaint_mask_image_upload": png_base64("white")})
    assert "repaints nothing" not in caplog.text


PRESET_VALUES = {
    "default_model": "other.safetensors", "default_refiner": "refiner.safetensors", "default_refiner_switch": 0.7,
    "default_vae": "own.safetensors", "default_loras": [[True, "a.safetensors", 0.3]], "default_cfg_scale": 9.5,
    "default_cfg_tsnr": 5.0, "default_sample_sharpness": 11.0, "default_sampler": "euler",
    "default_scheduler": "simple", "default_clip_skip": 3, "default_performance": "Quality",
    "default_styles": ["SAI Anime"], "default_aspect_ratio": "704*1408", "default_image_number": 3,
    "default_prompt": "a preset's prompt", "default_prompt_negative": "a preset's refusal", "default_overwrite_step": 7,
    "default_overwrite_switch": 4, "default_inpaint_engine_version": "v2.5", "default_save_metadata_to_images": False,
}  # fmt: skip


def test_6_6_every_preset_key_has_a_row_here():
    assert PRESET_VALUES.keys() == FIELD_OF_KEY.keys()


@pytest.mark.parametrize("key", PRESET_VALUES)
async def test_6_6_a_preset_key_changes_its_own_field_and_no_other(server: Running, key):
    presets = server.outputs.parent / "presets"
    presets.unlink()
    presets.mkdir()
    (presets / "own.json").write_text(json.dumps({key: PRESET_VALUES[key]}))
    seed = {"image_seed": 5}
    before, after = await params(server, seed), await params(server, {**seed, "preset": "own"})
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"preset", FIELD_OF_KEY[key]}
    if key not in ("default_loras",):
        assert after[FIELD_OF_KEY[key]] == PRESET_VALUES[key]


# -- 8 tasks -----------------------------------------------------------------------------------------------------------


async def test_8_2_a_fraction_of_a_second_counts(server: Running):
    first, second = stored(server, 0), stored(server, 1)
    hour = NOON + timedelta(hours=1)
    assert await history_ids(server, start_at=hour.isoformat()) == [second]
    assert await history_ids(server, start_at=(hour + MILLISECONDS).isoformat()) == []
    assert await history_ids(server, end_at=(hour - MILLISECONDS).isoformat()) == [first]


async def test_8_2_a_window_without_length_is_empty(server: Running):
    stored(server, 0)
    assert await history_ids(server, start_at=NOON.isoformat(), end_at=NOON.isoformat()) == []


@pytest.mark.parametrize("text", ["yesterday", "2026-13-01T00:00:00", "1e9"])
async def test_8_2_a_bad_end_is_422(server: Running, text):
    reply = await server.client.get("/tasks", params={"end_at": text})
    assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["query", "end_at"])


@pytest.mark.parametrize("query", ["action=", "action=list", "action=remove"])
async def test_8_2_an_action_that_is_not_delete_only_lists(server: Running, query):
    task_id = stored(server, 0)
    reply = await server.client.get(f"/tasks?start_at=2020-01-01&{query}")
    assert [record["task_id"] for record in reply.json()["history"]] == [task_id]
    assert (await server.client.get(f"/tasks/{task_id}")).status_code == 200


async def test_8_4_a_missing_file_is_no_error(server: Running):
    record = (await server.generate({"image_number": 2})).json()
    next(server.outputs.glob("*/*.png")).unlink()
    assert (await server.client.delete(f"/tasks/{record['task_id']}")).status_code == 200
    assert list(server.outputs.glob("*/*.png")) == []


# -- 9 record ----------------------------------------------------------------------------------------------------------


async def test_9_1_an_error_keeps_what_was_made_and_the_last_progress(server: Running):
    def break_after_first(_job: Job, event: Event) -> None:
        if isinstance(event, ImageSaved):
            server.engine.deaths = 2

    server.services.jobs.on_event(break_after_first)
    reply = await server.generate({"image_number": 2})
    record = reply.json()
    assert (reply.status_code, record["task_status"], len(record["result"])) == (500, "error", 1)
    assert 0 < record["progress"] < 100
    assert record["start_mills"] <= record["finish_mills"]
    assert record["error"]
    assert (await server.client.get(record["result"][0])).status_code == 200


async def test_9_1_a_running_task_shows_the_pictures_already_saved(server: Running):
    server.engine.hold(at_step=99)
    saved = asyncio.Event()

    def hold_second(_job: Job, event: Event) -> None:
        if isinstance(event, ImageSaved):
            server.engine.hold(at_step=1)
            saved.set()

    server.services.jobs.on_event(hold_second)
    task_id = await server.accepted({"image_number": 2})
    await saved.wait()
    await server.engine.held.wait()
    record = (await server.client.get(f"/tasks/{task_id}")).json()
    assert (record["task_status"], len(record["result"]), len(record["seeds"])) == ("running", 1, 1)
    assert (await server.client.get(record["result"][0])).status_code == 200
    server.engine.release()


@pytest.mark.parametrize(
    "sent", ["1152×896", "1152x896", "1152X896", '1152×896 <span style="color: grey;"> ∣ 9:7</span>']
)
async def test_9_2_sizes_and_loras_are_stored_as_they_can_be_sent_again(server: Running, sent):
    stored_params = await params(server, {"aspect_ratios_selection": sent})
    assert stored_params["aspect_ratios_selection"] == "1152*896"
    assert all(row.keys() == {"enabled", "model_name", "weight"} for row in stored_params["loras"])


# -- 10 files, 11 tools ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accept", ["image/jpeg", "image/jpg"])
async def test_10_1_alpha_is_flattened_on_white_for_jpeg(server: Running, accept):
    url = (await server.generate()).json()["result"][0]
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(next(server.outputs.glob("*/*.png")))
    reply = await server.client.get(url, headers={"accept": accept})
    with Image.open(io.BytesIO(reply.content)) as shown:
        assert (shown.format, shown.mode) == ("JPEG", "RGB")
        assert min(shown.getpixel((4, 4))) > 250


async def test_10_3_results_lie_in_a_folder_of_their_day_under_a_dated_name(server: Running):
    before = datetime.now().replace(microsecond=0)
    path = (await server.generate()).json()["result"][0].removeprefix(f"{BASE}/outputs/")
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)/(\1_\d\d-\d\d-\d\d)_([1-9]\d{3})\.png", path)
    assert found
    assert before <= datetime.strptime(found[2], "%Y-%m-%d_%H-%M-%S") <= datetime.now()


async def test_11_all_models_lists_every_suffix_of_models(server: Running):
    folder = server.services.settings.paths.checkpoints[0]
    names = ["a.pth", "b.ckpt", "c.bin", "d.safetensors", "e.fooocus.patch"]
    for name in (*names, "f.txt", "g.part", "h.patch"):
        (folder / name).write_bytes(b"")
    assert (await server.client.get("/v1/engines/all-models")).json()["model_filenames"] == names


async def test_11_1_describing_is_no_task(server: Running):
    server.engine.answers["describe"] = "a dog"
    await server.client.post("/v1/tools/describe-image", json={"image": png_base64()})
    assert (await server.client.get("/tasks")).json() == {"history": [], "current": [], "pending": []}


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask_model": "x"}, {"cloth_category": "x"}, {"sam_model": "x"}, {"box_threshold": 1.1},
        {"text_threshold": -0.1}, {"sam_max_detections": 11}, {"dino_erode_or_dilate": 65}, {"dino_debug": "perhaps"},
        {"image": ""}, {"image": "%%%"},
    ],
)  # fmt: skip
async def test_11_2_mask_values_out_of_range_are_422_naming_their_key(server: Running, wrong):
    reply = await server.client.post("/v1/tools/generate_mask", json={"image": png_base64(), **wrong})
    assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["body", next(iter(wrong))])
    assert server.engine.calls == []


async def test_11_2_the_answer_is_usable_as_a_mask_as_it_is(server: Running, tmp_path):
    Image.new("L", (32, 24), 255).save(tmp_path / "mask.png")
    server.engine.answers["generate_mask"] = str(tmp_path / "mask.png")
    mask = (await server.client.post("/v1/tools/generate_mask", json={"image": png_base64()})).json()
    body = {"inpaint_input_image": png_base64(), "inpaint_mask_image_upload": mask}
    url = (await params(server, body))["inpaint_mask_image_upload"]
    with Image.open(io.BytesIO((await server.client.get(url)).content)) as shown:
        assert (shown.size, shown.getpixel((0, 0))) == ((32, 24), 255)


# -- 14 Fooocus-API ----------------------------------------------------------------------------------------------------


async def test_14_1_the_ping_and_the_lists_are_the_same(server: Running):
    assert (await server.client.get("/ping")).text == "pong"
    for path in ("/v1/engines/all-models", "/v1/engines/styles"):
        assert (await server.client.get(path)).status_code == 200


async def test_14_1_job_history_has_pages(server: Running):
    for _ in range(5):
        await server.client.post(T2I, json={})
    pages = [
        (await server.client.get("/v1/generation/job-history", params={"page": page, "page_size": 2})).json()["history"]
        for page in range(4)
    ]
    assert [len(page) for page in pages] == [2, 2, 1, 0]
    assert len({one["job_id"] for page in pages for one in page}) == 5


async def test_14_2_json_saves_metadata_unless_told_not_to(server: Running):
    _results, stored_params = await run(server, T2I, json={})
    assert stored_params["save_metadata_to_images"] is True
    path, files = "/v1/generation/image-upscale-vary", {"input_image": image()}
    _results, stored_params = await run(server, path, data={"uov_method": "Disabled"}, files=files)
    assert stored_params["save_metadata_to_images"] is False
    data = {"uov_method": "Disabled", "save_meta": "true"}
    _results, stored_params = await run(server, path, data=data, files={"input_image": image()})
    assert stored_params["save_metadata_to_images"] is True


async def test_14_2_distances_keep_their_sides(server: Running):
    sides = {"left": "1", "right": "2", "top": "3", "bottom": "4"}
    data = {"outpaint_selections": "Left,Right,Top,Bottom"}
    data |= {f"outpaint_distance_{side}": value for side, value in sides.items()}
    path = "/v1/generation/image-inpaint-outpaint"
    _results, stored_params = await run(server, path, data=data, files={"input_image": image()})
    assert stored_params["outpaint_distance"] == [1, 3, 2, 4]
    body = {**data, "outpaint_selections": ["Left"], "input_image": png_base64()}
    _results, stored_params = await run(server, "/v2/generation/image-inpaint-outpaint", json=body)
    assert stored_params["outpaint_distance"] == [1, 3, 2, 4]


async def test_14_2_loras_of_a_form_are_json_text(server: Running):
    rows = [{"enabled": True, "model_name": "a.safetensors", "weight": 0.3}]
    data = {"uov_method": "Disabled", "loras": json.dumps(rows)}
    path = "/v1/generation/image-upscale-vary"
    _results, stored_params = await run(server, path, data=data, files={"input_image": image()})
    assert stored_params["loras"] == rows


@pytest.mark.parametrize("share", [-1, 0.4, 1])
async def test_14_2_overwrite_switch_takes_the_old_share_of_the_steps(server: Running, share):
    _results, stored_params = await run(server, T2I, json={"advanced_params": {"overwrite_switch": share}})
    assert stored_params["overwrite_switch"] == share


async def test_14_2_new_fields_work_on_old_routes(server: Running):
    _results, stored_params = await run(server, T2I, json={"preset": "initial", "generate_image_grid": True})
    assert (stored_params["preset"], stored_params["generate_image_grid"]) == ("initial", True)


async def test_14_3_a_cancelled_call_says_so_in_its_list(server: Running):
    server.engine.hold()
    call = asyncio.create_task(server.client.post(T2I, json={}))
    await server.engine.held.wait()
    await server.client.post("/v1/generation/stop")
    reply = await call
    assert (reply.status_code, [one["finish_reason"] for one in reply.json()]) == (200, ["USER_CANCEL"])


@pytest.mark.parametrize(("how", "stage"), [("stop", "SUCCESS"), ("skip", "SUCCESS"), ("fail", "ERROR")])
async def test_14_3_stages_of_ended_jobs(server: Running, how, stage):
    server.engine.hold()
    job_id = (await server.client.post(T2I, json={"async_process": True})).json()["job_id"]
    await server.engine.held.wait()
    if how == "fail":
        server.engine.deaths = 2
        server.engine.release()
    else:
        await server.client.post(f"/v1/engine/control/?action={how}")
    await server.ended(job_id.replace("-", ""))
    job = (await server.client.get("/v1/generation/query-job", params={"job_id": job_id})).json()
    assert job["job_stage"] == stage
    assert job.keys() == {
        "job_id", "job_type", "job_stage", "job_progress", "job_status", "job_step_preview", "job_result",
    }  # fmt: skip
