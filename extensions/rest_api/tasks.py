"""`/tasks`: what waits, runs and was done; deleting; and one task's event stream for any client."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import datetime
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from sse_starlette import EventSourceResponse, ServerSentEvent

from extensions.rest_api.api import Api, ApiDep, WireDep
from extensions.rest_api.generate import SEND_TIMEOUT_S, base64_results, known_record
from extensions.rest_api.live import TaskEvents
from extensions.rest_api.routing import EVENT_STREAM, reply, route, statuses
from extensions.rest_api.wire import Json, Wire, preview_base64
from modules.choices import TaskStatus
from modules.jobs import Job
from modules.record import Record

router = APIRouter(tags=["tasks"])

DEFAULT_PAGE_SIZE = 10
MOST = 2**31 - 1
_SPACE_FOR_PLUS = re.compile(r"(?<=\d) (?=\d\d:?\d\d$)")

TaskId = Annotated[str, Path(description="Id of the task.", examples=["0ff078640d894bc5a59242c05657a994"])]


@route(
    router, "GET", "/tasks",
    operation_id="list_tasks", summary="List or delete tasks", responses={**reply("TaskLists"), **statuses(422)},
)  # fmt: skip
async def list_tasks(
    api: ApiDep,
    wire: WireDep,
    query: Annotated[str, Query(description="all, history, current or pending.")] = "all",
    page: Annotated[int | None, Query(ge=0, le=MOST, description="Zero-based; for history and pending.")] = None,
    page_size: Annotated[int | None, Query(ge=1, le=MOST, description="10 unless given.")] = None,
    start_at: Annotated[str | None, Query(description="Queued at or after, ISO 8601; for history.")] = None,
    end_at: Annotated[str | None, Query(description="Queued at or before, ISO 8601; now unless given.")] = None,
    action: Annotated[str | None, Query(description="delete removes the finished tasks of the window.")] = None,
) -> Response:
    """Tasks by state, newest first; with `action=delete` the finished ones since `start_at` are deleted."""
    start_ms, end_ms = _milliseconds("start_at", start_at), _milliseconds("end_at", end_at)
    if (action or "").strip().lower() == "delete":
        if start_ms is None:
            raise _refused("start_at", "start_at is required to delete: it says from when on", start_at)
        return Json(_lists(history=await _deleted(api, wire, start_ms, end_ms)))
    paging = (page or 0, page_size or DEFAULT_PAGE_SIZE)
    lists: dict[str, list[dict[str, Any]]] = {}
    if query in ("all", "history"):
        is_paged = start_ms is None or page is not None or page_size is not None
        records = await _history(api, start_ms, end_ms, paging if is_paged else None)
        lists["history"] = [wire.record(record) for record in records]
    if query in ("all", "current"):
        running = api.services.jobs.running
        lists["current"] = [await live_record(running, api, wire)] if running else []
    if query in ("all", "pending"):
        first = paging[0] * paging[1]
        waiting = api.services.jobs.waiting[first : first + paging[1]]
        lists["pending"] = [await live_record(job, api, wire) for job in waiting]
    return Json(_lists(**lists))


def _lists(**lists: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {name: lists.get(name, []) for name in ("history", "current", "pending")}


async def _history(api: Api, start_ms: int | None, end_ms: int | None, paging: tuple[int, int] | None) -> list[Record]:
    """Finished records of the window, newest first."""
    if start_ms is not None and end_ms is not None and start_ms >= end_ms:
        return []
    page, page_size = paging or (0, None)
    return await asyncio.to_thread(
        api.services.history.page, page=page, page_size=page_size, start_mills=start_ms, end_mills=end_ms
    )


async def _deleted(api: Api, wire: Wire, start_ms: int, end_ms: int | None) -> list[dict[str, Any]]:
    records = await _history(api, start_ms, end_ms, None)
    deleted = await api.services.handlers.delete_many([record.task_id for record in records])
    return [wire.record(record) for record in deleted]


async def live_record(job: Job, api: Api, wire: Wire) -> dict[str, Any]:
    """A waiting task with its place, or the running one with its preview; either with its estimated end."""
    more: dict[str, object] = {"eta_seconds": api.eta.seconds_left(job.task_id)}
    if job.record.task_status is TaskStatus.RUNNING:
        progress = job.log.progress
        more["preview"] = await preview_base64(progress.preview if progress else None)
    else:
        more["position"] = api.services.jobs.position(job.task_id)
    return wire.record(job.record, **more)


@route(
    router, "GET", "/tasks/{task_id}",
    operation_id="get_task", summary="One task", responses={**reply("RecordReply"), **statuses(404)},
)  # fmt: skip
async def get_task(task_id: TaskId, api: ApiDep, wire: WireDep) -> Response:
    """The record of a task; while it runs with the newest preview."""
    job = api.services.jobs.get(task_id)
    if job is not None and not job.record.task_status.is_final:
        return Json(await live_record(job, api, wire))
    record = await known_record(api, task_id)
    return Json(wire.record(record, **await base64_results(record, api)))


@route(
    router, "DELETE", "/tasks/{task_id}",
    operation_id="delete_task", summary="Delete a finished task",
    responses={**reply("RecordReply"), **statuses(404, 409)},
)  # fmt: skip
async def delete_task(task_id: TaskId, api: ApiDep, wire: WireDep) -> Response:
    """Delete a finished task and its pictures; the deleted record comes back. A waiting or running one is 409."""
    await known_record(api, task_id)
    return Json(wire.record(await api.services.handlers.delete(task_id)))


@route(
    router, "POST", "/tasks/{task_id}/cancel",
    operation_id="cancel_task", summary="Stop a waiting or running task",
    responses={**reply("ControlReply"), **statuses(404)},
)  # fmt: skip
async def cancel_task(task_id: TaskId, api: ApiDep) -> Response:
    """Stop a task wherever it stands; pictures made before are kept."""
    await known_record(api, task_id)
    job = await api.services.handlers.control("stop", task_id)
    return Json({"message": "task stopped" if job else "No task running"})


@route(
    router, "GET", "/tasks/{task_id}/events",
    operation_id="follow_task", summary="Follow a task",
    responses={
        200: {"description": "Named server-sent events", "content": EVENT_STREAM},
        **statuses(404),
    },
)  # fmt: skip
async def follow_task(
    task_id: TaskId,
    request: Request,
    api: ApiDep,
    wire: WireDep,
    last_event_id: Annotated[str | None, Header(description="Id of the last event that arrived.")] = None,
) -> Response:
    """Every event of a task from its first one, or after `Last-Event-ID`; previews only in their newest form."""
    job = api.services.jobs.get(task_id)
    record = job.record if job else await known_record(api, task_id)
    translator = TaskEvents(wire, api.eta)
    after = translator.number_after(last_event_id or request.query_params.get("last_event_id"))
    events = _followed(api, job, translator, after) if job else _ended(translator, record)
    return EventSourceResponse(events, ping=api.services.settings.sse_ping, send_timeout=SEND_TIMEOUT_S)


async def _followed(api: Api, job: Job, translator: TaskEvents, after: int) -> AsyncIterator[ServerSentEvent]:
    """The log itself is followed: who only watches does not keep a task alive, nor stops it by going away."""
    async with aclosing(job.log.follow(after)) as events:  # type: ignore[type-var]
        async for number, event in events:
            name, data = await translator.named(event, job.record)
            yield ServerSentEvent(data=orjson.dumps(data).decode(), event=name, id=translator.event_id(number))


async def _ended(translator: TaskEvents, record: Record) -> AsyncIterator[ServerSentEvent]:
    name, data = translator.ending(record)
    yield ServerSentEvent(data=orjson.dumps(data).decode(), event=name)


def _milliseconds(name: str, text: str | None) -> int | None:
    """Unix time in milliseconds of an ISO 8601 date; without a zone it is local time.

    Raises:
        RequestValidationError: it is no date.
    """
    if text is None or not text.strip():
        return None
    try:
        moment = datetime.fromisoformat(_SPACE_FOR_PLUS.sub("+", text.strip()))
        return round(moment.timestamp() * 1000)
    except (ValueError, OverflowError, OSError):
        raise _refused(name, "not a date such as 2026-01-31T18:00:00", text) from None


def _refused(name: str, message: str, value: str | None) -> RequestValidationError:
    return RequestValidationError([{"type": "value_error", "loc": ["query", name], "msg": message, "input": value}])
