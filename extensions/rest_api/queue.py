"""`/v1/engine/queue/`: pausing and resuming the queue, and putting waiting tasks into another order."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from extensions.rest_api.api import Api, ApiDep
from extensions.rest_api.bodies import json_body, validated
from extensions.rest_api.generate import known_record
from extensions.rest_api.routing import reply, route, statuses
from extensions.rest_api.wire import Json
from modules.errors import IllegalTransition, InvalidRequest, NotFound
from modules.params import ParamGroup

router = APIRouter(tags=["tasks"])

MOST = 2**31 - 1


class QueueRequest(ParamGroup, label="Queue"):
    """What is to happen to the queue."""

    action: Literal["pause", "resume", "move"] = Field(
        description="pause: start no further task; resume: go on; move: put a waiting task elsewhere."
    )
    task_id: str = Field("", description="The task to move.")
    position: int = Field(0, ge=0, le=MOST, description="Waiting tasks that stay before the moved one; 0 is next.")


@route(
    router, "GET", "/v1/engine/queue/",
    operation_id="get_queue", summary="The queue", responses={**reply("QueueReply"), **statuses()},
)  # fmt: skip
async def get_queue(api: ApiDep) -> Response:
    """Whether it is paused, what runs, and what waits, next one first."""
    return Json(_state(api))


@route(
    router, "POST", "/v1/engine/queue/",
    operation_id="change_queue", summary="Pause, resume or reorder the queue",
    responses={**reply("QueueReply"), **statuses(404, 409, 422, 507)},
    openapi_extra={"requestBody": {"required": False, "content": {
        "application/json": {"schema": {"$ref": "#/components/schemas/QueueRequest"}}}}},
)  # fmt: skip
async def change_queue(
    request: Request,
    api: ApiDep,
    action: Annotated[str | None, Query(description="pause, resume or move; here or in the body.")] = None,
    task_id: Annotated[str | None, Query(description="The task to move.")] = None,
    position: Annotated[str | None, Query(description="Waiting tasks that stay before it; 0 is next.")] = None,
) -> Response:
    """Pause, resume or reorder. The running task goes on. A restart changes neither a pause nor the order."""
    in_query = {"action": action, "task_id": task_id, "position": position}
    sent: dict[str, Any] = {name: value for name, value in in_query.items() if value is not None}
    if (await request.body()).strip():
        sent = {**await json_body(request), **sent}
    asked = validated(QueueRequest, sent)
    if asked.action == "move":
        await _move(api, asked)
    else:
        _set_paused(api, asked.action == "pause")
    return Json(_state(api))


def _set_paused(api: Api, paused: bool) -> None:
    """Remember it first: what was promised must hold if the server ends now."""
    api.services.state.queue_paused = paused
    if paused:
        api.services.jobs.pause()
    else:
        api.services.jobs.resume()


async def _move(api: Api, asked: QueueRequest) -> None:
    """Put a waiting task elsewhere.

    Raises:
        InvalidRequest: no task is named. NotFound: there is none. IllegalTransition: it does not wait.
    """
    if not asked.task_id:
        raise InvalidRequest("task_id", "names the task to move", asked.task_id)
    record = await known_record(api, asked.task_id)
    try:
        await api.services.jobs.move(asked.task_id, asked.position)
    except NotFound:
        status = record.task_status.value
        raise IllegalTransition(f"Task {asked.task_id} is {status}; only a waiting task can be moved.") from None
    api.places.changed()


def _state(api: Api) -> dict[str, Any]:
    jobs = api.services.jobs
    return {
        "paused": jobs.is_paused,
        "running": jobs.running.task_id if jobs.running else None,
        "waiting": [job.task_id for job in jobs.waiting],
    }
