"""Pausing, resuming and reordering the queue over REST, and what of it survives a restart."""

import asyncio
from typing import Any

import pytest

from tests.rest.conftest import Running, running_server
from tests.rest.test_tasks import events_of

PATH = "/v1/engine/queue/"


async def change(server: Running, status: int = 200, **body: Any) -> dict[str, Any]:
    reply = await server.client.post(PATH, json=body)
    assert reply.status_code == status, reply.text
    shown: dict[str, Any] = reply.json()
    return shown


async def queue_of(server: Running) -> dict[str, Any]:
    shown: dict[str, Any] = (await server.client.get(PATH)).json()
    return shown


async def three_waiting(server: Running) -> list[str]:
    """Ids of three tasks that wait behind a held one."""
    server.engine.hold()
    await server.accepted()
    await server.engine.held.wait()
    return [await server.accepted() for _ in range(3)]


async def test_an_empty_queue(server: Running):
    for path in (PATH, PATH.rstrip("/")):
        assert (await server.client.get(path)).json() == {"paused": False, "running": None, "waiting": []}


async def test_a_paused_queue_accepts_tasks_and_starts_none_until_it_is_resumed(server: Running):
    assert (await change(server, action="pause"))["paused"] is True
    task_id = await server.accepted()
    for _ in range(50):
        await asyncio.sleep(0)
    assert await queue_of(server) == {"paused": True, "running": None, "waiting": [task_id]}
    assert (await server.client.get("/readyz")).json() == {"status": "paused"}
    assert server.engine.runs == []
    assert (await change(server, action="resume"))["paused"] is False
    assert (await server.ended(task_id))["task_status"] == "finished"
    assert (await server.client.get("/readyz")).status_code == 200


async def test_pausing_lets_the_running_task_go_on(server: Running):
    server.engine.hold()
    running = await server.accepted()
    await server.engine.held.wait()
    waiting = await server.accepted()
    await change(server, action="pause")
    server.engine.release()
    assert (await server.ended(running))["task_status"] == "finished"
    assert (await queue_of(server))["waiting"] == [waiting]
    await change(server, action="resume")
    await server.ended(waiting)


async def test_a_paused_queue_is_still_paused_after_a_restart(tmp_path, caplog):
    async with running_server(tmp_path) as before:
        await change(before, action="pause")
        task_id = await before.accepted()
    async with running_server(tmp_path) as later:
        assert "The queue was paused before this start" in caplog.text
        assert await queue_of(later) == {"paused": True, "running": None, "waiting": [task_id]}
        await change(later, action="resume")
        assert (await later.ended(task_id))["task_status"] == "finished"
    async with running_server(tmp_path) as last:
        assert (await queue_of(last))["paused"] is False


@pytest.mark.parametrize(
    ("moved", "position", "order"),
    [(2, 0, [2, 0, 1]), (0, 1, [1, 0, 2]), (0, 2, [1, 2, 0]), (0, 99, [1, 2, 0]), (1, 1, [0, 1, 2]), (2, 1, [0, 2, 1])],
)
async def test_a_waiting_task_moves_where_it_is_put_and_stays_there_over_a_restart(tmp_path, moved, position, order):
    async with running_server(tmp_path) as before:
        ids = await three_waiting(before)
        wanted = [ids[index] for index in order]
        shown = await change(before, action="move", task_id=ids[moved], position=position)
        assert shown["waiting"] == wanted
        pending = (await before.client.get("/tasks?query=pending")).json()["pending"]
        assert [record["task_id"] for record in pending] == wanted
        assert [record["position"] for record in pending] == [1, 2, 3]
        newest = await before.accepted()
        assert (await queue_of(before))["waiting"] == [*wanted, newest]
    async with running_server(tmp_path) as later:
        for task_id in (*wanted, newest):
            await later.ended(task_id)
        assert [record.task_id for record in later.engine.runs][1:] == [*wanted, newest]


async def test_many_moves_keep_one_order_in_memory_and_on_disk(tmp_path):
    """Each move puts the last one first or in the middle; a batch task may go before an interactive one."""
    async with running_server(tmp_path) as before:
        server = before
        await three_waiting(server)
        await server.accepted({"priority": "batch"})
        await server.accepted({"priority": "batch"})
        for turn in range(30):
            waiting = (await queue_of(server))["waiting"]
            where = (0, 2, 4, 1)[turn % 4]
            expected = waiting[:-1]
            expected.insert(where, waiting[-1])
            shown = await change(server, action="move", task_id=waiting[-1], position=where)
            assert shown["waiting"] == expected
    async with running_server(tmp_path) as later:
        for task_id in expected:
            await later.ended(task_id)
        assert [record.task_id for record in later.engine.runs][1:] == expected


async def test_followers_hear_of_a_new_place_at_once(server: Running):
    ids = await three_waiting(server)
    follower = asyncio.create_task(server.client.get(f"/tasks/{ids[0]}/events"))
    while not server.application.front._in_work:
        await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    await change(server, action="move", task_id=ids[2], position=0)
    for _ in range(20):
        await asyncio.sleep(0)
    server.engine.release()
    places = [data["position"] for _id, name, data in events_of((await follower).text) if name == "queued"]
    assert places == [1, 2, 1]


async def test_moving_what_does_not_wait_is_refused_with_its_state(server: Running):
    done = (await server.generate()).json()["task_id"]
    await three_waiting(server)
    running = (await queue_of(server))["running"]
    for task_id, state in ((done, "finished"), (running, "running")):
        refused = await change(server, 409, action="move", task_id=task_id)
        assert state in refused["detail"]
    assert await change(server, 404, action="move", task_id="unknown") == {"detail": "Task not found"}
    server.engine.release()


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        ({}, ["body", "action"]),
        ({"action": "stop"}, ["body", "action"]),
        ({"action": "move"}, ["body", "task_id"]),
        ({"action": "move", "task_id": "x", "position": -1}, ["body", "position"]),
        ({"action": "move", "task_id": "x", "position": "first"}, ["body", "position"]),
    ],
)
async def test_a_change_that_makes_no_sense_is_422(server: Running, body, loc):
    refused = await change(server, 422, **body)
    assert refused["detail"][0]["loc"] == loc


async def test_the_change_may_stand_in_the_query(server: Running):
    assert (await server.client.post(PATH, params={"action": "pause"})).json()["paused"] is True
    ids = [await server.accepted() for _ in range(2)]
    query = {"action": "move", "task_id": ids[1], "position": 0}
    assert (await server.client.post(PATH, params=query)).json()["waiting"] == ids[::-1]
    assert (await server.client.post(PATH, content=b"[")).status_code == 422


async def test_a_key_guards_the_queue(serve):
    server = await serve("--apikey", "sesame")
    assert (await server.client.get(PATH)).status_code == 403
    assert (await server.client.post(PATH, json={"action": "pause"})).status_code == 403
    assert not server.services.jobs.is_paused
