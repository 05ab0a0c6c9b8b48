"""Every error status: when it comes, and in which shape."""

import asyncio

import pytest

from modules.errors import UnknownName
from tests.fakes import png_base64
from tests.rest.conftest import Running, Serve


def assert_422(reply, *loc: str | int) -> dict:
    assert reply.status_code == 422, reply.text
    details = reply.json()["detail"]
    assert {"type", "loc", "msg", "input"} <= details[0].keys()
    assert loc in [tuple(detail["loc"]) for detail in details], details
    return details[0]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": 5}, "prompt"),
        ({"image_number": 0}, "image_number"),
        ({"image_number": 33}, "image_number"),
        ({"image_number": 1.5}, "image_number"),
        ({"guidance_scale": 31}, "guidance_scale"),
        ({"sharpness": "sharp"}, "sharpness"),
        ({"aspect_ratios_selection": "wide"}, "aspect_ratios_selection"),
        ({"performance_selection": "Fast"}, "performance_selection"),
        ({"sampler_name": "nope"}, "sampler_name"),
        ({"refiner_switch": 0}, "refiner_switch"),
        ({"stream_output": "perhaps"}, "stream_output"),
    ],
)
async def test_a_value_that_does_not_fit_is_422_and_queues_nothing(server: Running, body, field):
    assert_422(await server.generate(body), "body", field)
    assert server.engine.runs == []
    assert (await server.client.get("/tasks")).json() == {"history": [], "current": [], "pending": []}


@pytest.mark.parametrize(
    "content",
    [b"{", b"", b"\xff\xfe", b'"text"', b"[1]", b"null", b"prompt=apple", b'{"a": "\\ud800"}', b"[" * 100_000],
)
async def test_a_body_that_is_no_json_object_is_422_in_the_usual_shape(server: Running, content):
    reply = await server.client.post("/v1/engine/generate/", content=content)
    assert reply.status_code == 422, reply.text
    assert reply.json()["detail"][0]["loc"][0] == "body"


async def test_an_unknown_name_is_422_with_near_matches(server: Running):
    server.check.refusal = UnknownName(
        ("loras", 0, "model_name"), "apple.safetensors", ["apples.safetensors"], what="LoRA"
    )
    detail = assert_422(await server.generate(), "body", "loras", 0, "model_name")
    assert "apples.safetensors" in detail["msg"]
    assert detail["input"] == "apple.safetensors"


@pytest.mark.parametrize("value", ["%%%", "aGVsbG8=", "data:image/png;base64,AAAA", "http://127.0.0.1:9/x.png"])
async def test_a_picture_that_cannot_be_had_is_422_naming_its_field(server: Running, value):
    assert_422(await server.generate({"uov_input_image": value}), "body", "uov_input_image")
    body = {"controlnet_image": [{}, {"cn_img": value}]}
    assert_422(await server.generate(body), "body", "controlnet_image", 1, "cn_img")
    assert server.engine.runs == []


async def test_an_error_never_sends_a_whole_picture_back(server: Running):
    reply = await server.generate({"uov_input_image": 5, "loras": png_base64(size=(400, 400)) * 20})
    assert reply.status_code == 422
    assert len(reply.content) < 3_000


async def test_an_unknown_preset_is_422(server: Running):
    detail = assert_422(await server.generate({"preset": "defualt"}), "body", "preset")
    assert "default" in detail["msg"]


@pytest.mark.parametrize("name", ["../default", "presets/default", "/etc/passwd", "default.json", "..", "\x00"])
async def test_a_preset_is_never_a_path(server: Running, name):
    assert_422(await server.generate({"preset": name}), "body", "preset")


async def test_an_unknown_task_is_404(server: Running):
    for method, path in (
        ("GET", "/tasks/x"),
        ("DELETE", "/tasks/x"),
        ("POST", "/tasks/x/cancel"),
        ("GET", "/tasks/x/events"),
    ):
        reply = await server.client.request(method, path)
        assert (reply.status_code, reply.json()) == (404, {"detail": "Task not found"})


async def test_a_full_queue_is_429_with_retry_after(serve: Serve):
    server = await serve("--queue-limit", "1")
    server.engine.hold()
    await server.accepted()
    await server.engine.held.wait()
    await server.accepted()
    reply = await server.generate()
    assert (reply.status_code, reply.json()["detail"]) == (429, "Queue is full")
    assert int(reply.headers["retry-after"]) >= 1
    server.engine.release()


async def test_an_unknown_path_is_404_and_a_wrong_method_405(server: Running):
    assert (await server.client.get("/v1/nothing")).json() == {"detail": "Not Found"}
    assert (await server.client.get("/nothing/at/all")).status_code == 404
    reply = await server.client.get("/v1/engine/generate/")
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
    assert (await server.client.delete("/tasks")).status_code == 405
    assert (await server.client.request("OPTIONS", "/tasks")).status_code == 405


async def test_a_body_over_the_limit_is_413_before_it_is_parsed(serve: Serve):
    server = await serve("--web-upload-size", "1")

    async def chunks():
        for _ in range(40):
            yield b" " * 65_536

    declared = await server.client.post("/v1/engine/generate/", content=b" " * (2**20 + 1))
    chunked = await server.client.post("/v1/engine/generate/", content=chunks())
    for reply in (declared, chunked):
        assert reply.status_code == 413
        assert "--web-upload-size" in reply.json()["detail"]


async def test_deleting_a_task_that_runs_or_waits_is_409(server: Running):
    server.engine.hold()
    running, waiting = await server.accepted(), await server.accepted()
    await server.engine.held.wait()
    for task_id in (running, waiting):
        assert (await server.client.delete(f"/tasks/{task_id}")).status_code == 409
    server.engine.release()
    assert (await server.ended(waiting))["task_status"] == "finished"


async def test_an_unforeseen_error_of_a_task_is_its_record_not_the_servers_end(server: Running):
    server.engine.failure = RuntimeError("surprise")
    reply = await server.generate()
    assert (reply.status_code, reply.json()["task_status"]) == (500, "error")
    server.engine.failure = None
    assert (await server.generate()).status_code == 200


async def test_many_calls_at_once_all_finish(server: Running):
    replies = await asyncio.gather(*(server.generate({"prompt": str(number)}) for number in range(12)))
    assert {reply.json()["task_status"] for reply in replies} == {"finished"}
    ids = [record.id for record in server.engine.runs]
    assert ids == sorted(ids), "the first accepted runs first"
    assert len(ids) == 12
