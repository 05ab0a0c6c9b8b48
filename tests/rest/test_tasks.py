"""Control, lists, records and their life cycle, deleting, and one task's events."""

import asyncio
import base64
import io
import json
from datetime import UTC, datetime, timedelta, timezone

import httpx
import pytest
from PIL import Image

from modules.choices import Source, TaskStatus
from modules.events import Failed
from modules.record import Record
from modules.request import GenerationRequest, to_params
from tests.fakes import png_base64
from tests.rest.conftest import BASE, Running, running_server
from tests.rest.live import live_server

HOUR_MS = 3_600_000
NOON = datetime(2026, 3, 1, 12, 0, 0)


def stored(server: Running, hours: int, **fields) -> str:
    """A finished record, queued that many hours after noon (local time)."""
    moment = round(NOON.timestamp() * 1000) + hours * HOUR_MS
    record = Record(
        task_id=f"{hours + 100:032x}", req_params=to_params(GenerationRequest()), in_queue_mills=moment,
        start_mills=moment, finish_mills=moment + 5, task_status=TaskStatus.FINISHED, progress=100, **fields,
    )  # fmt: skip
    return server.history.add(record).task_id


async def history_ids(server: Running, **query) -> list[str]:
    reply = await server.client.get("/tasks", params={"query": "history", **query})
    assert reply.status_code == 200, reply.text
    return [record["task_id"] for record in reply.json()["history"]]


# -- 8.1 control ----------------------------------------------------------------------------------------------------


async def test_control_without_action_is_422(server: Running):
    reply = await server.client.post("/v1/engine/control/")
    assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["query", "action"])


async def test_control_with_an_unknown_action_says_so(server: Running):
    reply = await server.client.post("/v1/engine/control/?action=pause")
    assert (reply.status_code, reply.json()) == (200, {"message": "Invalid control action"})


@pytest.mark.parametrize("action", ["stop", "skip"])
async def test_control_with_nothing_running_says_so(server: Running, action):
    reply = await server.client.post("/v1/engine/control/", params={"action": action})
    assert reply.json() == {"message": "No task running"}


@pytest.mark.parametrize("how", ["query", "json", "form"])
async def test_stop_keeps_finished_pictures_and_lets_the_next_task_start(server: Running, how):
    server.engine.hold(at_step=3)
    first, second = await server.accepted({"image_number": 3}), await server.accepted()
    await server.engine.held.wait()
    options = {
        "query": {"params": {"action": "stop"}},
        "json": {"json": {"action": "stop"}},
        "form": {"data": {"action": "stop"}},
    }
    reply = await server.client.post("/v1/engine/control/", **options[how])
    assert reply.json() == {"message": "task stopped"}
    ended = await server.ended(first)
    assert (ended["task_status"], ended["progress"], ended["result"]) == ("stop", 100, [])
    server.engine.release()
    assert (await server.ended(second))["task_status"] == "finished"


async def test_skip_drops_the_picture_in_work_and_goes_on(server: Running):
    server.engine.hold(at_step=2)
    task_id = await server.accepted({"image_number": 2, "image_seed": 5})
    await server.engine.held.wait()
    assert (await server.client.post("/v1/engine/control/?action=skip")).json() == {"message": "task skipped"}
    server.engine.release()
    ended = await server.ended(task_id)
    assert (ended["task_status"], ended["seeds"]) == ("finished", [6])


async def test_control_with_a_task_id_touches_that_task_only(server: Running):
    server.engine.hold()
    running, waiting = await server.accepted(), await server.accepted()
    await server.engine.held.wait()
    await server.client.post("/v1/engine/control/", params={"action": "stop", "task_id": waiting})
    assert (await server.ended(waiting))["task_status"] == "stop"
    assert (await server.client.get(f"/tasks/{running}")).json()["task_status"] == "running"
    unknown = await server.client.post("/v1/engine/control/", params={"action": "stop", "task_id": "x"})
    assert unknown.status_code == 404
    server.engine.release()


async def test_cancel_stops_a_waiting_task(server: Running):
    server.engine.hold()
    await server.accepted()
    waiting = await server.accepted()
    assert (await server.client.post(f"/tasks/{waiting}/cancel")).json() == {"message": "task stopped"}
    ended = await server.ended(waiting)
    assert (ended["task_status"], ended["start_mills"], ended["progress"]) == ("stop", -1, 100)
    server.engine.release()


# -- 8.2 lists ------------------------------------------------------------------------------------------------------


async def test_lists_have_one_shape_whatever_is_asked(server: Running):
    for query in ("all", "history", "current", "pending", "something else"):
        assert (await server.client.get("/tasks", params={"query": query})).json() == {
            "history": [], "current": [], "pending": [],
        }  # fmt: skip


async def test_each_task_is_in_exactly_one_list(server: Running):
    done = (await server.generate()).json()["task_id"]
    server.engine.hold(at_step=3)
    running, waiting = await server.accepted(), await server.accepted()
    await server.engine.held.wait()
    lists = (await server.client.get("/tasks/")).json()
    assert {name: [record["task_id"] for record in records] for name, records in lists.items()} == {
        "history": [done], "current": [running], "pending": [waiting],
    }  # fmt: skip
    assert "preview" not in lists["history"][0]
    assert "preview" not in lists["pending"][0]
    picture = Image.open(io.BytesIO(base64.b64decode(lists["current"][0]["preview"])))
    assert picture.format == "PNG"
    assert lists["pending"][0]["position"] == 1
    only = (await server.client.get("/tasks?query=pending")).json()
    assert (only["history"], only["current"], len(only["pending"])) == ([], [], 1)
    server.engine.release()


async def test_history_is_newest_first_in_pages_from_zero(server: Running):
    ids = [stored(server, hours) for hours in range(12)][::-1]
    assert await history_ids(server) == ids[:10]
    assert await history_ids(server, page=1) == ids[10:]
    assert await history_ids(server, page=1, page_size=5) == ids[5:10]
    assert await history_ids(server, page=99) == []


@pytest.mark.parametrize("query", [{"page_size": 0}, {"page": -1}, {"page_size": "x"}, {"page": 2**40}])
async def test_impossible_pages_are_422(server: Running, query):
    assert (await server.client.get("/tasks", params=query)).status_code == 422


async def test_a_window_holds_both_its_ends_and_is_not_paged(server: Running):
    ids = [stored(server, hours) for hours in range(15)]
    window = {"start_at": "2026-03-01T13:00:00", "end_at": "2026-03-02T01:00:00"}
    assert await history_ids(server, **window) == ids[1:14][::-1]
    assert await history_ids(server, **window, page_size=2, page=1) == ids[10:12][::-1]


async def test_only_end_at_is_applied(server: Running):
    ids = [stored(server, hours) for hours in range(3)]
    assert await history_ids(server, end_at="2026-03-01T13:00:00") == ids[:2][::-1]


@pytest.mark.parametrize(
    "text",
    [
        "2026-03-01T13:00:00", "2026-03-01 13:00:00", "2026-03-01T13:00:00.000", "2026-03-01T13:00",
        (NOON + timedelta(hours=1)).astimezone(UTC).isoformat(),
        (NOON + timedelta(hours=1)).astimezone(timezone(timedelta(hours=2))).isoformat(),
        (NOON + timedelta(hours=1)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    ],
)  # fmt: skip
async def test_dates_may_have_a_zone_a_fraction_or_neither(server: Running, text):
    ids = [stored(server, hours) for hours in range(3)]
    assert await history_ids(server, start_at=text) == ids[1:][::-1]
    raw = await server.client.get(f"/tasks?query=history&start_at={text}")  # a "+" that nobody escaped
    assert [record["task_id"] for record in raw.json()["history"]] == ids[1:][::-1]


@pytest.mark.parametrize("text", ["yesterday", "2026-13-01T00:00:00", "0000-01-01", "9999-99-99", "1e9"])
async def test_a_bad_date_is_422(server: Running, text):
    reply = await server.client.get("/tasks", params={"start_at": text})
    assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["query", "start_at"])


async def test_an_upside_down_window_is_empty(server: Running):
    stored(server, 0)
    assert await history_ids(server, start_at="2026-03-02T00:00:00", end_at="2026-03-01T00:00:00") == []


async def test_tasks_of_the_page_are_listed_and_can_be_stopped(server: Running):
    server.engine.hold()
    job = await server.services.handlers.submit(GenerationRequest(), source=Source.WEBUI)
    await server.engine.held.wait()
    current = (await server.client.get("/tasks")).json()["current"]
    assert [(record["task_id"], record["source"]) for record in current] == [(job.task_id, "webui")]
    await server.client.post("/v1/engine/control/?action=stop")
    assert (await server.ended(job.task_id))["task_status"] == "stop"


# -- 8.4 delete -----------------------------------------------------------------------------------------------------


async def test_deleting_removes_record_and_pictures_and_nothing_else(server: Running):
    body = {"controlnet_image": [{"cn_img": png_base64()}], "image_number": 2}
    record = (await server.generate(body)).json()
    other = (await server.generate()).json()
    reply = await server.client.delete(f"/tasks/{record['task_id']}")
    assert reply.json()["task_id"] == record["task_id"]
    assert (await server.client.get(f"/tasks/{record['task_id']}")).status_code == 404
    assert [(await server.client.get(url)).status_code for url in record["result"]] == [404, 404]
    assert (await server.client.get(other["result"][0])).status_code == 200
    assert (await server.client.get(record["req_params"]["controlnet_image"][0]["cn_img"])).status_code == 200


async def test_deleting_a_window_answers_with_the_deleted_records(server: Running):
    ids = [stored(server, hours) for hours in range(4)]
    params = {
        "action": "DELETE",
        "start_at": "2026-03-01T13:00:00",
        "end_at": "2026-03-01T14:00:00",
        "query": "pending",
    }
    reply = (await server.client.get("/tasks", params=params)).json()
    assert sorted(record["task_id"] for record in reply["history"]) == ids[1:3]
    assert (reply["current"], reply["pending"]) == ([], [])
    assert await history_ids(server) == [ids[3], ids[0]]


async def test_deleting_never_leaves_the_output_folder(server: Running):
    outside = server.outputs.parent / "precious.png"
    outside.write_bytes(b"x")
    task_id = stored(server, 1, result=("../precious.png", "missing/file.png"))
    assert (await server.client.delete(f"/tasks/{task_id}")).status_code == 200
    assert outside.exists()


# -- 9 record -------------------------------------------------------------------------------------------------------


async def test_record_has_every_key_with_its_unset_value(server: Running):
    server.engine.hold()
    await server.accepted()
    waiting = (await server.client.get(f"/tasks/{await server.accepted()}")).json()
    assert isinstance(waiting["id"], int)
    assert len(waiting["task_id"]) == 32
    unset = {
        "start_mills": -1,
        "finish_mills": -1,
        "task_status": "pending",
        "progress": -1,
        "webhook_url": "",
        "result": [],
    }
    assert {key: waiting[key] for key in unset} == unset
    assert waiting["in_queue_mills"] > 0
    assert None not in [waiting[key] for key in unset]
    server.engine.release()


async def test_life_cycle_of_a_finished_task(server: Running):
    server.engine.hold(at_step=3)
    task_id = await server.accepted()
    await server.engine.held.wait()
    running = (await server.client.get(f"/tasks/{task_id}")).json()
    assert (running["task_status"], running["finish_mills"], running["result"]) == ("running", -1, [])
    assert 0 < running["progress"] < 100
    assert running["id"] > 0
    server.engine.release()
    ended = await server.ended(task_id)
    assert (ended["task_status"], ended["progress"], len(ended["result"])) == ("finished", 100, 1)
    assert ended["in_queue_mills"] <= ended["start_mills"] <= ended["finish_mills"]
    assert "error" not in ended


async def test_a_task_whose_every_picture_was_skipped_is_skip(server: Running):
    server.engine.hold()
    task_id = await server.accepted()
    await server.engine.held.wait()
    await server.client.post("/v1/engine/control/?action=skip")
    ended = await server.ended(task_id)
    assert (ended["task_status"], ended["progress"], ended["result"]) == ("skip", 100, [])


async def test_a_failed_task_is_error_with_a_reason(server: Running):
    server.engine.failure = Failed("too little memory")
    task_id = await server.accepted()
    ended = await server.ended(task_id)
    assert (ended["task_status"], ended["error"]) == ("error", "too little memory")


async def test_urls_are_built_when_a_record_is_read(server: Running, tmp_path):
    record = (await server.generate()).json()
    assert record["result"][0].startswith(f"{BASE}/outputs/")
    elsewhere = await server.client.get(f"/tasks/{record['task_id']}", headers={"host": "127.0.0.1:7865"})
    assert elsewhere.json()["result"][0].startswith("http://127.0.0.1:7865/outputs/")


@pytest.mark.parametrize(
    ("flag", "base"),
    [
        ("img.example", "http://img.example:7866"),
        ("127.0.0.1:80", "http://127.0.0.1:80"),
        ("localhost:7866", "http://localhost:7866"),
        ("https://img.example/x/", "https://img.example/x"),
        ("https://img.example/x", "https://img.example/x"),
    ],
)
async def test_base_url_flag_starts_every_url(tmp_path, flag, base):
    async with running_server(tmp_path, "--base-url", flag) as server:
        record = (await server.generate({"uov_input_image": png_base64()})).json()
        assert record["result"][0].startswith(f"{base}/outputs/")
        assert record["req_params"]["uov_input_image"].startswith(f"{base}/inputs/")
        own = await server.generate({"uov_input_image": record["req_params"]["uov_input_image"]})
        assert own.json()["req_params"]["uov_input_image"] == record["req_params"]["uov_input_image"]


async def test_a_host_header_that_is_no_host_does_not_reach_a_url(server: Running):
    record = (await server.generate(headers={"host": "127.0.0.1/<script>"})).json()
    assert record["result"][0].startswith("http://127.0.0.1:7866/outputs/")


async def test_req_params_are_padded_and_hold_urls_or_nothing(server: Running):
    params = (await server.generate({"controlnet_image": [{}, {"cn_img": png_base64()}]})).json()["req_params"]
    images = [row["cn_img"] for row in params["controlnet_image"]]
    assert [bool(image) for image in images] == [False, True, False, False]
    assert images[1].startswith(f"{BASE}/inputs/")
    assert images[1].endswith(".png")
    assert len(params["enhance_ctrls"]) == 3
    assert params["image_seed"] >= 0
    assert (params["input_image_checkbox"], params["invert_mask_checkbox"]) == (True, False)


async def test_base64_results_are_data_uris_parallel_to_result(server: Running):
    record = (await server.generate({"require_base64": True, "image_number": 2, "output_format": "webp"})).json()
    pictures = [base64.b64decode(uri.removeprefix("data:image/webp;base64,")) for uri in record["result_base64"]]
    assert pictures == [(await server.client.get(url)).content for url in record["result"]]
    assert "result_base64" in (await server.client.get(f"/tasks/{record['task_id']}")).json()
    assert "result_base64" not in (await server.client.get("/tasks")).json()["history"][0]


async def test_after_a_restart_no_task_stays_running(tmp_path):
    async with running_server(tmp_path) as before:
        before.engine.hold()
        running, waiting = await before.accepted(), await before.accepted()
        await before.engine.held.wait()
    async with running_server(tmp_path) as later:
        records = [await later.ended(task_id) for task_id in (running, waiting)]
    assert [record["task_status"] for record in records] == ["finished", "finished"]
    assert "Started again" in records[0]["notes"][0]


# -- one task's events ----------------------------------------------------------------------------------------------


def events_of(text: str) -> list[tuple[str, str, dict]]:
    """(id, name, data) of every event."""
    found = []
    for frame in text.split("\r\n\r\n"):
        fields = dict(line.split(": ", 1) for line in frame.split("\r\n") if ": " in line)
        if "data" in fields:
            found.append((fields.get("id", ""), fields.get("event", ""), json.loads(fields["data"])))
    return found


async def test_events_of_a_task_are_named_and_complete_for_late_followers(server: Running):
    task_id = (await server.generate({"image_number": 2})).json()["task_id"]
    events = events_of((await server.client.get(f"/tasks/{task_id}/events")).text)
    names = [name for _id, name, _data in events]
    assert [name for name in names if name != "progress"] == ["queued", "started", "image", "image", "finished"]
    assert events[-1][2]["task_id"] == task_id
    assert [data["url"] for _id, name, data in events if name == "image"] == events[-1][2]["result"]


async def test_events_resume_after_the_last_one_that_arrived(server: Running):
    task_id = (await server.generate({"image_number": 2})).json()["task_id"]
    everything = events_of((await server.client.get(f"/tasks/{task_id}/events")).text)
    first_image = next(index for index, event in enumerate(everything) if event[1] == "image")
    resumed = await server.client.get(f"/tasks/{task_id}/events", headers={"Last-Event-ID": everything[first_image][0]})
    rest = [event for event in everything[first_image + 1 :] if event[1] != "progress"]
    assert [event for event in events_of(resumed.text) if event[1] != "progress"] == rest


async def test_an_event_id_of_another_server_starts_from_the_beginning(server: Running):
    task_id = (await server.generate()).json()["task_id"]
    reply = await server.client.get(f"/tasks/{task_id}/events", headers={"Last-Event-ID": "0badcafe-900"})
    assert events_of(reply.text)[0][1] == "queued"


async def test_events_of_a_task_that_left_memory_are_its_end(tmp_path):
    async with running_server(tmp_path) as before:
        task_id = (await before.generate()).json()["task_id"]
    async with running_server(tmp_path) as later:
        events = events_of((await later.client.get(f"/tasks/{task_id}/events")).text)
    assert [name for _id, name, _data in events] == ["finished"]


async def test_watching_a_task_and_going_away_does_not_stop_it(tmp_path):
    async with live_server(tmp_path, "--on-disconnect", "stop") as live, httpx.AsyncClient() as client:
        live.engine.hold()
        reply = await client.post(live.api_url + "/v1/engine/generate/", json={"async_process": True})
        task_id = reply.json()["task_id"]
        await live.engine.held.wait()
        async with client.stream("GET", f"{live.api_url}/tasks/{task_id}/events") as events:
            await anext(events.aiter_bytes())
        while live.server.server_state.tasks:
            await asyncio.sleep(0.001)
        live.engine.release()
        job = live.services.jobs.get(task_id)
        async for _event in job.log.follow():
            pass
        assert job.record.task_status is TaskStatus.FINISHED


async def test_events_tell_each_new_place_in_the_queue_with_resumable_ids(server: Running):
    server.engine.hold()
    tasks = [await server.accepted() for _ in range(4)]
    await server.engine.held.wait()
    last = f"/tasks/{tasks[3]}/events"
    early = asyncio.create_task(server.client.get(last))
    while not server.application.front._in_work:
        await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    await server.client.post(f"/tasks/{tasks[1]}/cancel")
    for _ in range(20):
        await asyncio.sleep(0)
    late = asyncio.create_task(server.client.get(last))
    while len(server.application.front._in_work) < 2:
        await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    server.engine.release()
    told = [events_of((await reply).text) for reply in (early, late)]
    places = [[data["position"] for _id, name, data in events if name == "queued"] for events in told]
    assert places == [[3, 2, 1], [2, 1]], "who comes late hears the place of that moment first"
    assert all("eta_seconds" in data for _id, name, data in told[0] if name == "queued")
    resumed = await server.client.get(last, headers={"Last-Event-ID": told[0][2][0]})
    assert events_of(resumed.text)[0][1] == "started"


async def test_eta_appears_once_something_is_measured(server: Running):
    await server.generate()
    server.engine.hold(at_step=3)
    running, waiting = await server.accepted(), await server.accepted()
    await server.engine.held.wait()
    for task_id in (running, waiting):
        assert (await server.client.get(f"/tasks/{task_id}")).json()["eta_seconds"] >= 0
    server.engine.release()
    assert "eta_seconds" not in await server.ended(waiting)


async def test_two_hundred_followers_all_get_every_result_and_the_end(server: Running):
    server.engine.hold()
    task_id = await server.accepted({"image_number": 3})
    await server.engine.held.wait()
    followers = [asyncio.create_task(server.client.get(f"/tasks/{task_id}/events")) for _ in range(200)]
    while len(server.application.front._in_work) < 200:
        await asyncio.sleep(0)
    server.engine.release()
    for reply in await asyncio.gather(*followers):
        names = [name for _id, name, _data in events_of(reply.text)]
        assert [name for name in names if name in ("image", "finished")] == ["image"] * 3 + ["finished"]


async def test_what_was_read_before_is_answered_without_a_thread(server: Running, monkeypatch):
    """On a busy machine each change of threads costs more than the answer."""
    import anyio.to_thread

    task_id = (await server.generate({"disable_preview": True})).json()["task_id"]
    paths = ("/tasks", "/tasks?query=history&page_size=1", f"/tasks/{task_id}", "/ping")
    server.services.jobs.forget(task_id)  # from now on the history alone knows it
    before = [(await server.client.get(path)).content for path in paths]
    hops: list[object] = []

    async def counted(work, *args, **options):
        hops.append(work)
        return work(*args)

    monkeypatch.setattr(asyncio, "to_thread", counted)
    monkeypatch.setattr(anyio.to_thread, "run_sync", counted)
    assert [(await server.client.get(path)).content for path in paths] == before
    assert hops == []
    await server.client.get("/tasks?page_size=60")
    assert hops, "a long list is read by a thread"


async def test_a_list_shows_what_changed_since_it_was_shown(server: Running):
    first, second = [(await server.generate()).json() for _ in range(2)]
    shown = (await server.client.get("/tasks")).json()["history"]
    assert shown == [second, first]
    elsewhere = await server.client.get("/tasks", headers={"host": "localhost:7866"})
    assert elsewhere.json()["history"][0]["result"][0].startswith("http://localhost:7866/")
    await server.client.delete(f"/tasks/{first['task_id']}")
    third = (await server.generate()).json()
    assert (await server.client.get("/tasks")).json()["history"] == [third, second]


# -- searching --------------------------------------------------------------------------------------------------------


def told(server: Running, hours: int, prompt: str, **fields) -> str:
    """A finished record of a prompt."""
    params = {
        "style_selections": fields.pop("styles", ()),
        "base_model_name": fields.pop("asked_model", "a.safetensors"),
    }
    request = GenerationRequest(prompt=prompt, **params)
    moment = round(NOON.timestamp() * 1000) + hours * HOUR_MS
    values = {"task_status": TaskStatus.FINISHED, "in_queue_mills": moment, **fields}
    return server.history.add(Record(task_id=f"{hours:032x}", req_params=to_params(request), **values)).task_id


@pytest.fixture
def searched(server: Running) -> list[str]:
    """Ids of four tasks, oldest first."""
    return [
        told(server, 1, "a red apple", styles=["SAI Anime"], seeds=(7, 8), source=Source.API),
        told(server, 2, "two Red apples", model="b.safetensors", seeds=(9,), source=Source.WEBUI),
        told(server, 3, "a green pear", styles=["sai anime"], asked_model="b.safetensors", task_status=TaskStatus.STOP),
        told(server, 4, "ein roter Apfel", seeds=(7,), task_status=TaskStatus.ERROR, source=Source.CLI),
    ]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({"words": "red"}, [2, 1]),
        ({"words": "APPLE re"}, [2, 1]),
        ({"words": "apples"}, [2]),
        ({"words": "ap"}, [4, 2, 1]),
        ({"words": "red pear"}, []),
        ({"words": "  "}, [4, 3, 2, 1]),
        ({"style": "SAI Anime"}, [3, 1]),
        ({"model": "B.safetensors"}, [3, 2]),
        ({"seed": 7}, [4, 1]),
        ({"seed": "8"}, [1]),
        ({"status": "finished"}, [2, 1]),
        ({"status": "stop, ERROR"}, [4, 3]),
        ({"source": "webui"}, [2]),
        ({"source": "CLI"}, [4]),
        ({"words": "a", "model": "a.safetensors", "status": "finished", "source": "api", "seed": 8}, [1]),
        ({"words": "a", "start_at": "2026-03-01T14:00:00"}, [4, 3, 2]),
        ({"words": "a", "end_at": "2026-03-01T14:00:00"}, [2, 1]),
        ({"words": "a", "page_size": 2, "page": 1}, [2, 1]),
    ],
)
async def test_history_is_searched_by_words_style_model_seed_status_source_and_date(server, searched, query, found):
    assert await history_ids(server, **query) == [searched[number - 1] for number in found]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"status": "running"}, "status"),
        ({"status": "finished,done"}, "status"),
        ({"source": "phone"}, "source"),
    ],
)
async def test_a_condition_that_makes_no_sense_is_422_naming_it(server: Running, query, field):
    reply = await server.client.get("/tasks", params=query)
    assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["query", field])


async def test_conditions_narrow_the_history_alone(server: Running, searched):
    server.engine.hold()
    running, waiting = await server.accepted({"prompt": "pear"}), await server.accepted()
    await server.engine.held.wait()
    lists = (await server.client.get("/tasks", params={"words": "pear"})).json()
    assert {name: [record["task_id"] for record in records] for name, records in lists.items()} == {
        "history": [searched[2]], "current": [running], "pending": [waiting],
    }  # fmt: skip
    server.engine.release()


async def test_deleting_spares_what_the_conditions_leave_out(server: Running, searched):
    query = {"action": "delete", "start_at": "2026-03-01T00:00:00", "words": "apple", "status": "finished"}
    deleted = (await server.client.get("/tasks", params=query)).json()["history"]
    assert [record["task_id"] for record in deleted] == [searched[1], searched[0]]
    assert await history_ids(server) == [searched[3], searched[2]]


async def test_a_new_task_is_found_by_its_words_at_once(server: Running, searched):
    assert await history_ids(server, words="quince") == []
    task_id = (await server.generate({"prompt": "a quince"})).json()["task_id"]
    assert await history_ids(server, words="quince") == [task_id]
