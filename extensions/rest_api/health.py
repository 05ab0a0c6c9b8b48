"""Health, readiness and metrics, for whoever runs the server."""

from fastapi import APIRouter, Response

from extensions.rest_api.api import ApiDep
from extensions.rest_api.routing import reply, route, statuses
from extensions.rest_api.wire import Json

router = APIRouter(tags=["operation"])


@route(
    router, "GET", "/healthz",
    operation_id="healthz", summary="Is the server alive?", responses={**reply("Health"), **statuses()},
)  # fmt: skip
async def healthz() -> Response:
    """Answers as long as the event loop turns."""
    return Json({"status": "ok"})


@route(
    router, "GET", "/readyz",
    operation_id="readyz", summary="Does the server take tasks?", responses={**reply("Health"), **statuses()},
)  # fmt: skip
async def readyz(api: ApiDep) -> Response:
    """200 while new tasks are accepted and started."""
    if api.services.jobs.is_paused:
        return Json({"status": "paused"}, status_code=503)
    return Json({"status": "ready"})


@router.get(
    "/metrics", operation_id="metrics", summary="Prometheus metrics",
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **statuses()},
    response_model=None,
)  # fmt: skip
async def metrics(api: ApiDep) -> Response:
    """Queue, tasks, step times, memory and requests by route, in the text format of Prometheus."""
    content, media_type = api.metrics.render()
    return Response(content, headers={"Content-Type": media_type})
