"""`/tasks`: what waits, runs and was done; deleting; and one task's event stream for any client."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import datetime
from itertools import islice
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from sse_starlette import EventSourceResponse

from extensions.rest_api.api import Api, ApiDep, WireDep
from extensions.rest_api.generate import SEND_TIMEOUT_S, base64_results, known_record
from extensions.rest_api.routing import EVENT_STREAM, reply, route, statuses
from extensions.rest_api.wire import Json, Wire
from modules.choices import Source, TaskStatus
from modules.history import FINAL, HistoryFilter
from modules.jobs import Job
from modules.record import Record

router = APIRouter(tags=["tasks"])

DEFAULT_PAGE_SIZE = 10
RECORDS_PER_TURN = 50
_LISTS = ("history", "current", "pending")
MOST = 2**31 - 1
MAX_SEED = 2**63 - 1
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
    words: Annotated[str, Query(description="Beginnings of words, all of which the prompt has; for history.")] = "",
    style: Annotated[str, Query(description="A style that was asked for; for history.")] = "",
    model: Annotated[str, Query(description="The checkpoint asked for or used; for history.")] = "",
    seed: Annotated[int | None, Query(ge=0, le=MAX_SEED, description="Of one of the pictures; for history.")] = None,
    status: Annotated[str, Query(description="Any of finished, stop, skip, error, with commas; for history.")] = "",
    source: Annotated[str, Query(description="api, webui or cli; for history.")] = "",
    action: Annotated[str | None, Query(description="delete removes the finished tasks that would be listed.")] = None,
) -> Response:
    """Tasks by state, newest first. Conditions narrow the history, and all must hold.

    With `action=delete` the finished tasks since `start_at` are deleted that meet the conditions.
    """
    wanted = HistoryFilter(
        words=words, style=style, model=model, seed=seed, statuses=_statuses(status), source=_source(source),
        start_mills=_milliseconds("start_at", start_at), end_mills=_milliseconds("end_at", end_at),
    )  # fmt: skip
    start_ms = wanted.start_mills
    if (action or "").strip().lower() == "delete":
        if start_ms is None:
            raise _refused("start_at", "start_at is required to delete: it says from when on", start_at)
        return _lists(history=await _deleted(api, wire, wanted))
    paging = (page or 0, page_size or DEFAULT_PAGE_SIZE)
    lists: dict[str, list[bytes]] = {}
    if query in ("all", "history"):
        is_paged = start_ms is None or page is not None or page_size is not None
        records = await _history(api, wanted, paging if is_paged else None)
        lists["history"] = await _as_json(records, api, wire)
    if query in ("all", "current"):
        running = api.services.jobs.running
        lists["current"] = [orjson.dumps(await live_record(running, api, wire))] if running else []
    if query in ("all", "pending"):
        first = paging[0] * paging[1]
        waiting = islice(api.eta.queue(), first, first + paging[1])
        lists["pending"] = [orjson.dumps(waiting_record(*task, wire)) for task in waiting]
    return _lists(**lists)


def _lists(**lists: list[bytes]) -> Response:
    """The reply, from the JSON of each record."""
    parts = [b'"%b":[%b]' % (name.encode(), b",".join(lists.get(name, ()))) for name in _LISTS]
    return Response(b"{%b}" % b",".join(parts), media_type="application/json")


async def _as_json(records: list[Record], api: Api, wire: Wire) -> list[bytes]:
    """The JSON of each record; other requests have their turn while a long list is made."""
    made = []
    for number, record in enumerate(records, 1):
        made.append(api.shown.json(record, wire))
        if number % RECORDS_PER_TURN == 0:
            await asyncio.sleep(0)
    return made


async def _history(api: Api, wanted: HistoryFilter, paging: tuple[int, int] | None) -> list[Record]:
    """Finished records that meet the conditions, newest first."""
    start_ms, end_ms = wanted.start_mills, wanted.end_mills
    if start_ms is not None and end_ms is not None and start_ms >= end_ms:
        return []
    page, page_size = paging or (0, None)
    history = api.services.history
    if wanted != HistoryFilter(start_mills=start_ms, end_mills=end_ms):
        return await asyncio.to_thread(history.search, wanted, page=page, page_size=page_size)
    if page_size is not None:
        at_hand = history.page_at_hand(page=page, page_size=page_size, start_mills=start_ms, end_mills=end_ms)
        if at_hand is not None:
            return at_hand
    return await asyncio.to_thread(history.page, page=page, page_size=page_size, start_mills=start_ms, end_mills=end_ms)


async def _deleted(api: Api, wire: Wire, wanted: HistoryFilter) -> list[bytes]:
    records = await _history(api, wanted, None)
    deleted = await api.services.handlers.delete_many([record.task_id for record in records])
    return [orjson.dumps(wire.record(record)) for record in deleted]


async def live_record(job: Job, api: Api, wire: Wire) -> dict[str, Any]:
    """A waiting task with its place, or the running one with its preview; either with its estimated end."""
    left_s = api.eta.seconds_left(job.task_id)
    if job is not api.services.jobs.running:
        return waiting_record(job, api.services.jobs.position(job.task_id), left_s, wire)
    progress = job.log.progress
    preview = await api.previews.png_base64(progress.preview if progress else None)
    return wire.record(job.record, eta_seconds=left_s, preview=preview)


def waiting_record(job: Job, position: int, left_s: float | None, wire: Wire) -> dict[str, Any]:
    """A waiting task with its place and the seconds until it ends."""
    return wire.record(job.record, eta_seconds=left_s, position=position)


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
    more = await base64_results(record, api)
    if more:
        return Json(wire.record(record, **more))
    return Response(api.shown.json(record, wire), media_type="application/json")


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
    after = api.events.number_after(last_event_id or request.query_params.get("last_event_id"))
    frames = _followed(api, job, wire, after) if job else _ended(api, record, wire)
    return EventSourceResponse(frames, ping=api.services.settings.sse_ping, send_timeout=SEND_TIMEOUT_S)


async def _followed(api: Api, job: Job, wire: Wire, after: int) -> AsyncIterator[bytes]:
    """The log itself is followed: who only watches does not keep a task alive, nor stops it by going away."""
    async with (
        aclosing(job.log.follow(after)) as log,  # type: ignore[type-var]
        aclosing(api.places.follow(log, job, after)) as events,  # type: ignore[type-var]
    ):
        async for number, event in events:
            yield await api.events.frame(number, event, job.record, wire)


async def _ended(api: Api, record: Record, wire: Wire) -> AsyncIterator[bytes]:
    yield api.events.last_frame(record, wire)


def _statuses(text: str) -> tuple[TaskStatus, ...]:
    """The final statuses named, all of them for an empty text.

    Raises:
        RequestValidationError: one is no status of an ended task.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    known = {status.value: status for status in FINAL}
    if unknown := [name for name in names if name not in known]:
        raise _refused("status", f"no status of ended tasks; those are {', '.join(known)}", unknown[0])
    return tuple(status for status in FINAL if status.value in names) or FINAL


def _source(text: str) -> Source | None:
    """The source named, None for an empty text.

    Raises:
        RequestValidationError: there is no such source.
    """
    name = text.strip().lower()
    if name and name not in list(Source):
        raise _refused("source", f"not one of {', '.join(Source)}", text)
    return Source(name) if name else None


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
