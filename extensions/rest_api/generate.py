"""`POST /v1/engine/generate/` in its four modes, and `POST /v1/engine/control/`."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any
from urllib.parse import parse_qsl

import orjson
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from sse_starlette import EventSourceResponse, ServerSentEvent

from extensions.rest_api.accept import binary_format
from extensions.rest_api.api import Api, ApiDep, WireDep
from extensions.rest_api.bodies import ignored_header
from extensions.rest_api.calls import finished, parsed, submitted
from extensions.rest_api.routing import EVENT_STREAM, reply, route, statuses
from extensions.rest_api.wire import Json, StreamTranslator, Wire, as_data_uri
from modules.choices import TaskStatus
from modules.errors import NotFound
from modules.images import MEDIA_TYPES, file_as, stored_file
from modules.jobs import Job
from modules.record import Record

router = APIRouter()

SEND_TIMEOUT_S = 30
IDEMPOTENCY_KEY = (
    "The same key with the same request gives the same task, not a second one, as long as its record is kept. "
    "With another request it is refused with 422."
)
_PICTURE = {"schema": {"type": "string", "format": "binary"}}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    **reply(
        "RecordReply",
        content={**EVENT_STREAM, **dict.fromkeys(sorted(set(MEDIA_TYPES.values())), _PICTURE)},
        headers={
            "X-Task-Id": {"description": "Id of the task.", "schema": {"type": "string"}},
            "X-Ignored-Fields": {"description": "Keys of the body that mean nothing.", "schema": {"type": "string"}},
        },
        links={"task": {"operationId": "get_task", "parameters": {"task_id": "$response.body#/task_id"}}},
    ),
    204: {"description": "Picture mode: the task ended without a picture"},
    **statuses(409, 422, 500, 507),
}


@route(
    router, "POST", "/v1/engine/generate/",
    operation_id="generate", summary="Make pictures", tags=["generate"], responses=_ANSWERS,
)  # fmt: skip
async def generate(
    request: Request,
    api: ApiDep,
    wire: WireDep,
    accept: Annotated[str | None, Query(description="Overrides the Accept header, for example image/png.")] = None,
    _key: Annotated[
        str | None,
        Header(alias="Idempotency-Key", description=IDEMPOTENCY_KEY),
    ] = None,
) -> Response:
    """Make pictures; the body may be `{}`. Accept and two switches choose how the answer comes."""
    call = await parsed(api, request)
    asked = call.request
    picture = binary_format(request.headers.get("accept", ""), accept)
    if picture:
        asked = asked.changed(image_number=1)
    task = await submitted(api, request, asked)
    headers = {"X-Task-Id": task.task_id, **ignored_header(call.ignored)}
    if picture:
        return await _as_picture(await finished(api, request, task), picture, api, headers)
    if asked.stream_output:
        return stream(api, wire, task, headers)
    if asked.async_process:
        return Json(wire.accepted(task.task_id), headers=headers)
    return await record_reply(await finished(api, request, task), api, wire, headers)


async def record_reply(record: Record, api: Api, wire: Wire, headers: dict[str, str]) -> Response:
    """The finished record; 500 when the engine failed."""
    failed = record.task_status is TaskStatus.ERROR
    more = await base64_results(record, api)
    return Json(wire.record(record, **more), status_code=500 if failed else 200, headers=headers)


async def base64_results(record: Record, api: Api) -> dict[str, Any]:
    """`result_base64`, if the request asked for it."""
    if record.req_params.get("require_base64") is not True:
        return {}
    return {"result_base64": await asyncio.to_thread(as_data_uri, record, api.services.settings.paths.outputs)}


async def _as_picture(record: Record, wanted: str, api: Api, headers: dict[str, str]) -> Response:
    """The first result in the wanted format; the very file, metadata included, if it has that format."""
    if record.task_status is TaskStatus.ERROR:
        return Json({"detail": record.error}, status_code=500, headers=headers)
    if not record.result:
        return Response(status_code=204, headers=headers)
    path = stored_file(record.result[0], api.services.settings.paths.outputs)
    content = await asyncio.to_thread(file_as, path, wanted)
    seed = {"X-Seed": str(record.seeds[0])} if record.seeds else {}
    return Response(content, media_type=MEDIA_TYPES[wanted], headers={**headers, **seed})


def stream(api: Api, wire: Wire, task: Job | Record, headers: dict[str, str]) -> Response:
    """The server-sent events of a task, from its first one."""
    messages = _messages(api, wire, task) if isinstance(task, Job) else _only_last(wire, task)
    return EventSourceResponse(
        messages, ping=api.services.settings.sse_ping, send_timeout=SEND_TIMEOUT_S, headers=headers
    )


async def _messages(api: Api, wire: Wire, job: Job) -> AsyncIterator[ServerSentEvent]:
    show_previews = not job.request.disable_preview
    translator = StreamTranslator(wire, job.task_id, previews=api.previews if show_previews else None)
    async with (
        aclosing(api.services.handlers.follow(job)) as log,  # type: ignore[type-var]
        aclosing(api.places.follow(log, job)) as events,  # type: ignore[type-var]
    ):
        async for _number, event in events:
            message = await translator.message(event, job.record)
            if message is not None:
                yield _sent(message)


async def _only_last(wire: Wire, record: Record) -> AsyncIterator[ServerSentEvent]:
    yield _sent(StreamTranslator(wire, record.task_id).last(record))


def _sent(message: dict[str, Any]) -> ServerSentEvent:
    """One event: a line of JSON and, as documented clients expect, an empty data line."""
    return ServerSentEvent(data=json.dumps(message) + "\n")


# -- control --------------------------------------------------------------------------------------------------------

_DONE = {"stop": "task stopped", "skip": "task skipped"}


@route(
    router, "POST", "/v1/engine/control/",
    operation_id="control", summary="Stop or skip", tags=["generate"],
    responses={**reply("ControlReply"), **statuses(422)},
)  # fmt: skip
async def control(
    request: Request,
    api: ApiDep,
    action: Annotated[str | None, Query(description="stop ends the task, skip drops the picture in work.")] = None,
    task_id: Annotated[str | None, Query(description="Act on this task; a waiting one is removed by stop.")] = None,
) -> Response:
    """Stop or skip the running task, or the one named. The action may also stand in a JSON or form body."""
    sent = await _small_body(request)
    action = action if action is not None else sent.get("action")
    task_id = task_id or sent.get("task_id")
    if action is None:
        detail = {"type": "missing", "loc": ["query", "action"], "msg": "Field required", "input": None}
        raise RequestValidationError([detail])
    if action not in ("stop", "skip"):
        return Json({"message": "Invalid control action"})
    if task_id:
        await known_record(api, task_id)
    job = await api.services.handlers.control("stop" if action == "stop" else "skip", task_id or None)
    return Json({"message": _DONE[action] if job else "No task running"})


async def known_record(api: Api, task_id: str) -> Record:
    """The record of a task.

    Raises:
        NotFound: in the words of the contract.
    """
    try:
        return await api.services.handlers.record(task_id)
    except NotFound:
        raise NotFound("Task not found") from None


async def _small_body(request: Request) -> dict[str, str]:
    """Text values of a JSON object or a form; anything else counts as no body."""
    raw = await request.body()
    if not raw.strip():
        return {}
    try:
        values: object = orjson.loads(raw)
    except orjson.JSONDecodeError:
        values = dict(parse_qsl(raw.decode("utf-8", "replace"))) if len(raw) < 10_000 else {}
    found = values.items() if isinstance(values, dict) else ()
    return {str(key): value for key, value in found if isinstance(value, str)}
