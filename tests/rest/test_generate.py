"""The generate call: choice of mode, and what each of the four modes answers."""

import asyncio
import io
import json

import httpx
import pytest
from PIL import Image

from modules.events import Failed
from tests.fakes import fake_picture, png_base64
from tests.rest.conftest import Running, Serve
from tests.rest.live import live_server


def picture_of(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def messages_of(text: str) -> list[dict]:
    """The JSON of each event of a stream."""
    return [json.loads(line[6:]) for line in text.split("\r\n") if line.startswith("data: {")]


# -- 4.1 choice of mode ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("image/png", "image/png"),
        ("image/jpeg", "image/jpeg"),
        ("image/jpg", "image/jpeg"),
        ("image/webp", "image/webp"),
        ("image/*", "image/png"),
        ("image/avif", "image/png"),
        ("image/webp;q=0.9", "image/webp"),
        ("IMAGE/PNG", "image/png"),
    ],
)
async def test_accept_of_type_image_selects_the_picture_over_every_switch(server: Running, accept, media_type):
    body = {"stream_output": True, "async_process": True, "image_number": 3}
    reply = await server.generate(body, headers={"accept": accept})
    assert (reply.status_code, reply.headers["content-type"]) == (200, media_type)
    assert len(server.engine.runs) == 1
    assert server.engine.runs[0].req_params["image_number"] == 1
    assert picture_of(reply.content).size == (72, 56)


@pytest.mark.parametrize(
    "accept",
    ["*/*", "", "text/html,application/xhtml+xml,image/avif,image/webp,*/*;q=0.8", "application/json", "image"],
)
async def test_other_accept_headers_select_json(server: Running, accept):
    reply = await server.generate(headers={"accept": accept})
    assert (reply.status_code, reply.json()["task_status"]) == (200, "finished")


async def test_no_accept_header_at_all_is_json(server: Running):
    request = server.client.build_request("POST", "/v1/engine/generate/", json={})
    del request.headers["accept"]
    reply = await server.client.send(request)
    assert (reply.status_code, reply.json()["task_status"]) == (200, "finished")


async def test_query_accept_overrides_the_header(server: Running):
    reply = await server.generate(params={"accept": "image/png"}, headers={"accept": "application/json"})
    assert picture_of(reply.content).format == "PNG"


@pytest.mark.parametrize("yes", [True, "true", "1", "yes", "on", 1])
async def test_stream_comes_before_async_and_booleans_may_be_words(server: Running, yes):
    reply = await server.generate({"stream_output": yes, "async_process": yes})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"


@pytest.mark.parametrize("no", [False, "false", "0", "no", "off", 0])
async def test_words_for_no_mean_no(server: Running, no):
    reply = await server.generate({"stream_output": no, "async_process": no})
    assert reply.json()["task_status"] == "finished"


@pytest.mark.parametrize("path", ["/v1/engine/generate/", "/v1/engine/generate"])
async def test_both_forms_of_the_path_answer_without_a_redirect(server: Running, path):
    assert (await server.client.post(path, json={})).status_code == 200


# -- 4.2 picture ----------------------------------------------------------------------------------------------------


async def test_picture_mode_names_task_and_seed_and_sends_the_stored_file_itself(server: Running):
    reply = await server.generate({"image_seed": 7}, headers={"accept": "image/png"})
    record = (await server.client.get(f"/tasks/{reply.headers['x-task-id']}")).json()
    assert reply.headers["x-seed"] == "7" == str(record["seeds"][0])
    stored = next(server.outputs.glob("*/*.png"))
    assert reply.content == stored.read_bytes()


async def test_picture_mode_keeps_the_stored_format_on_disk(server: Running):
    reply = await server.generate({"output_format": "webp", "save_name": "a"}, headers={"accept": "image/png"})
    assert picture_of(reply.content).format == "PNG"
    assert [path.name for path in server.outputs.glob("*/a-0*")] == ["a-0.webp"]


async def test_picture_mode_without_a_picture_is_204_and_empty(server: Running):
    server.engine.hold()
    call = asyncio.create_task(server.generate(headers={"accept": "image/png"}))
    await server.engine.held.wait()
    await server.client.post("/v1/engine/control/", params={"action": "stop"})
    reply = await call
    assert (reply.status_code, reply.content) == (204, b"")


async def test_picture_mode_tells_a_failure_as_500_with_its_reason(server: Running):
    server.engine.failure = Failed("the model broke")
    reply = await server.generate(headers={"accept": "image/png"})
    assert (reply.status_code, reply.json()) == (500, {"detail": "the model broke"})


# -- 4.3 stream -----------------------------------------------------------------------------------------------------


async def test_stream_frames_are_byte_for_byte_those_old_clients_parse(server: Running):
    reply = await server.generate({"stream_output": True, "disable_preview": True})
    frames = reply.content.split(b"\r\n\r\n")
    assert frames.pop() == b""
    for frame in frames:
        first, second = frame.split(b"\r\n")
        assert first.startswith(b'data: {"progress": ')
        assert second == b"data: "
        assert first == b"data: " + json.dumps(json.loads(first[6:])).encode()
    assert list(json.loads(frames[0].split(b"\r\n")[0][6:]))[:4] == ["progress", "preview", "message", "images"]


async def test_stream_headers(server: Running):
    reply = await server.generate({"stream_output": True})
    assert reply.headers["cache-control"] in ("no-cache", "no-store")
    assert reply.headers["connection"] == "keep-alive"
    assert reply.headers["x-accel-buffering"] == "no"


async def test_stream_progress_never_falls_and_ends_with_the_results(server: Running):
    reply = await server.generate({"stream_output": True, "image_number": 3})
    messages = messages_of(reply.text)
    percents = [message["progress"] for message in messages]
    assert percents == sorted(percents)
    assert all(message["images"] == [] for message in messages[:-1])
    last = messages[-1]
    assert (last["progress"], last["message"], last["preview"]) == (100, "Finished", None)
    record = (await server.client.get(f"/tasks/{last['task_id']}")).json()
    assert last["images"] == record["result"]
    assert len(last["images"]) == 3
    assert last["task_status"] == "finished"


async def test_stream_previews_are_png_data_uris_of_a_quarter_of_the_size(server: Running):
    import base64

    previews = [
        m["preview"] for m in messages_of((await server.generate({"stream_output": True})).text) if m["preview"]
    ]
    assert previews
    picture = picture_of(base64.b64decode(previews[0].removeprefix("data:image/png;base64,")))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (18, 14))


async def test_stream_without_previews_when_they_are_disabled(server: Running):
    reply = await server.generate({"stream_output": True, "disable_preview": True})
    assert {message["preview"] for message in messages_of(reply.text)} == {None}


async def test_stream_tells_a_failure_in_its_last_event(server: Running):
    server.engine.failure = Failed("no memory")
    last = messages_of((await server.generate({"stream_output": True})).text)[-1]
    assert last["message"] == "Error: no memory"
    assert (last["progress"], last["images"], last["task_status"]) == (100, [], "error")


async def test_stream_of_a_stopped_task_ends_with_what_was_made(server: Running):
    server.engine.hold(at_step=2)
    call = asyncio.create_task(server.generate({"stream_output": True}))
    await server.engine.held.wait()
    await server.client.post("/v1/engine/control/?action=stop")
    last = messages_of((await call).text)[-1]
    assert (last["message"], last["images"], last["task_status"]) == ("Finished", [], "stop")


async def test_stream_says_the_place_in_the_queue_while_it_waits(server: Running):
    server.engine.hold()
    await server.accepted()
    await server.engine.held.wait()
    call = asyncio.create_task(server.generate({"stream_output": True}))
    while not server.services.jobs.waiting:
        await asyncio.sleep(0)
    server.engine.release()
    assert messages_of((await call).text)[0]["message"] == "Queued, position 1 ..."


async def test_stream_tells_each_new_place_in_the_queue(server: Running):
    server.engine.hold()
    await server.accepted()
    await server.engine.held.wait()
    await server.accepted()
    call = asyncio.create_task(server.generate({"stream_output": True}))
    while len(server.services.jobs.waiting) < 2:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    server.engine.release()
    texts = [message["message"] for message in messages_of((await call).text)]
    assert texts[:3] == ["Queued, position 2 ...", "Queued, position 1 ...", "Initializing ..."]


# -- 4.4 async, 4.5 sync --------------------------------------------------------------------------------------------


async def test_async_answers_at_once_in_the_documented_shape(server: Running):
    server.engine.hold()
    reply = await server.generate({"async_process": True})
    task_id = reply.json()["task_id"]
    assert reply.json() == {
        "id": -1, "task_id": task_id, "req_params": {}, "in_queue_mills": -1, "start_mills": -1, "finish_mills": -1,
        "task_status": "pending", "progress": -1, "preview": "", "webhook_url": "", "result": [],
    }  # fmt: skip
    assert (await server.client.get(f"/tasks/{task_id}")).status_code == 200
    server.engine.release()


async def test_sync_answers_with_the_finished_record_without_preview(server: Running):
    reply = await server.generate({"image_number": 2, "image_seed": 5, "prompt": "apple"})
    record = reply.json()
    assert record["task_status"] == "finished"
    assert "preview" not in record
    assert record["seeds"] == [5, 6]
    for url, seed in zip(record["result"], record["seeds"], strict=True):
        shown = picture_of((await server.client.get(url)).content)
        assert shown.tobytes() == fake_picture("apple", seed, (72, 56)).tobytes()


async def test_sync_answers_a_failure_with_500_and_the_record(server: Running):
    server.engine.failure = Failed("broken")
    reply = await server.generate()
    assert (reply.status_code, reply.json()["task_status"], reply.json()["error"]) == (500, "error", "broken")


async def test_a_lost_worker_costs_one_retry_and_nothing_else(server: Running):
    server.engine.deaths = 1
    record = (await server.generate({"image_number": 2})).json()
    assert (record["task_status"], len(record["result"])) == ("finished", 2)
    assert "Started again" in record["notes"][0]


# -- idempotency, ignored fields ------------------------------------------------------------------------------------


async def test_the_same_idempotency_key_gives_the_same_task(server: Running):
    headers = {"Idempotency-Key": "order 17"}
    first, second = [await server.generate({"prompt": "apple"}, headers=headers) for _ in range(2)]
    assert first.json() == second.json()
    assert len(server.engine.runs) == 1
    other = await server.generate({"prompt": "apple"}, headers={"Idempotency-Key": "order 18"})
    assert other.json()["task_id"] != first.json()["task_id"]


async def test_two_calls_at_once_with_one_idempotency_key_make_one_task(server: Running):
    headers = {"Idempotency-Key": "twice"}
    replies = await asyncio.gather(*(server.generate({}, headers=headers) for _ in range(5)))
    assert len({reply.json()["task_id"] for reply in replies}) == 1
    assert {reply.json()["task_status"] for reply in replies} == {"finished"}
    assert len(server.engine.runs) == 1


async def test_two_different_calls_at_once_with_one_idempotency_key_are_one_task_and_one_refusal(server: Running):
    headers = {"Idempotency-Key": "twice"}
    replies = await asyncio.gather(*(server.generate({"prompt": str(n % 2)}, headers=headers) for n in range(6)))
    assert sorted(reply.status_code for reply in replies) == [200] * 3 + [422] * 3
    assert len({reply.json()["task_id"] for reply in replies if reply.status_code == 200}) == 1
    assert len(server.engine.runs) == 1


def assert_refused(reply: httpx.Response, task_id: str) -> None:
    assert reply.status_code == 422
    (detail,) = reply.json()["detail"]
    assert (detail["type"], detail["loc"]) == ("idempotency_key", ["header", "Idempotency-Key"])
    assert task_id in detail["msg"]
    assert "new key" in detail["msg"]


@pytest.mark.parametrize("moment", ["waiting", "running", "ended", "long ago"])
async def test_an_idempotency_key_with_another_request_is_422_whatever_its_task_does(server: Running, moment):
    headers = {"Idempotency-Key": "order 17"}
    if moment != "ended":
        server.engine.hold()
    if moment == "waiting":
        await server.accepted()
        await server.engine.held.wait()
    body = {"prompt": "apple", "async_process": True}
    task_id = (await server.generate(body, headers=headers)).json()["task_id"]
    if moment == "running":
        await server.engine.held.wait()
    if moment == "long ago":
        server.engine.release()
        await server.ended(task_id)
        server.services.jobs.forget(task_id)
    assert_refused(await server.generate({**body, "prompt": "pear"}, headers=headers), task_id)
    again = await server.generate({**body, "prompt": "apple"}, headers=headers)
    assert (again.status_code, again.json()["task_id"]) == (200, task_id)
    server.engine.release()
    await server.ended(task_id)


async def test_an_idempotency_key_knows_the_request_by_what_it_says(server: Running):
    first = (await server.generate({"prompt": "apple", "image_seed": 5}, headers={"Idempotency-Key": '"a"'})).json()
    spellings = [{"image_seed": "5", "prompt": "apple"}, {"prompt": "apple", "image_seed": 5, "nonsense": 1}]
    for body in spellings:
        again = await server.generate(body, headers={"Idempotency-Key": "a"})
        assert again.json() == first
    picture = {"prompt": "apple", "image_seed": 5, "uov_input_image": png_base64()}
    assert_refused(await server.generate(picture, headers={"Idempotency-Key": "a"}), first["task_id"])
    other = {"image_seed": 5, "prompt": "apple", "image_number": 2}
    assert_refused(await server.generate(other, headers={"Idempotency-Key": "a"}), first["task_id"])


async def test_a_key_that_is_too_long_is_422_naming_the_header(server: Running):
    reply = await server.generate({}, headers={"Idempotency-Key": "x" * 201})
    assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["header", "Idempotency-Key"])


async def test_a_deleted_task_gives_its_idempotency_key_free(server: Running):
    headers = {"Idempotency-Key": "k"}
    first = (await server.generate({"prompt": "apple"}, headers=headers)).json()
    await server.client.delete(f"/tasks/{first['task_id']}")
    assert (await server.generate({"prompt": "pear"}, headers=headers)).status_code == 200
    assert len(server.engine.runs) == 2


async def test_an_idempotency_key_holds_across_a_restart(serve: Serve, tmp_path):
    from tests.rest.conftest import running_server

    headers = {"Idempotency-Key": "k"}
    async with running_server(tmp_path) as before:
        first = (await before.generate(headers=headers)).json()
    async with running_server(tmp_path) as later:
        again = (await later.generate(headers=headers)).json()
        assert_refused(await later.generate({"prompt": "pear"}, headers=headers), first["task_id"])
        assert later.engine.runs == []
    assert again["task_id"] == first["task_id"]


async def test_unknown_keys_are_ignored_and_listed(server: Running):
    reply = await server.generate({"promt": "typo", "loras": [{"wight": 1}], "prompt": "x"})
    assert reply.status_code == 200
    assert reply.headers["x-ignored-fields"] == "promt, loras[0].wight"


async def test_a_key_that_is_no_header_text_is_still_listed(server: Running):
    reply = await server.generate({"größe\r\nX-Evil: 1": 1})
    assert reply.status_code == 200
    assert "x-evil" not in reply.headers
    assert reply.headers["x-ignored-fields"].startswith("gr%C3%B6")


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        (["0", ""], '0, ""'),
        ([""], '""'),
        ([" a "], "%20a%20"),
        (["\t", "\x00", "\x7f"], "%09, %00, %7F"),
        (["a b", "c,d"], "a%20b, c%2Cd"),
        (["x" * 99] * 1 + [f"{number:098}" for number in range(30)], None),
    ],
)
async def test_whatever_keys_a_request_has_the_reply_is_valid_http(tmp_path, keys, shown):
    """Over a socket: only there a header is looked at."""
    body = {"disable_preview": True, **dict.fromkeys(keys)}
    async with live_server(tmp_path) as live, httpx.AsyncClient() as client:
        reply = await client.post(live.api_url + "/v1/engine/generate/", json=body)
    assert reply.status_code == 200
    assert reply.headers["x-ignored-fields"] == shown or shown is None
    assert len(reply.headers["x-ignored-fields"]) <= 1000


# -- configured defaults --------------------------------------------------------------------------------------------


async def test_configured_defaults_are_used_and_shown(tmp_path, serve: Serve):
    (tmp_path / "config.txt").write_text('{"default_prompt": "from config", "default_cfg_scale": 5.5}')
    server = await serve()
    stored = (await server.generate()).json()["req_params"]
    assert (stored["prompt"], stored["guidance_scale"]) == ("from config", 5.5)
    schema = (await server.client.get("/openapi.json")).json()["components"]["schemas"]["CommonRequest"]
    assert schema["properties"]["guidance_scale"]["default"] == 5.5


async def test_the_wire_is_plain_http(server: Running):
    """A client that knows nothing but HTTP gets its picture: post, follow the URL, done."""
    record = (await server.generate({"prompt": "apple"})).json()
    async with httpx.AsyncClient(transport=server.client._transport) as stranger:
        reply = await stranger.get(record["result"][0])
    assert reply.headers["content-type"] == "image/png"
