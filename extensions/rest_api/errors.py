"""The one place that turns errors into HTTP statuses and bodies."""

import logging

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from extensions.rest_api.bodies import detail_of
from extensions.rest_api.wire import Json
from modules.errors import (
    EngineFailed,
    FetchRefused,
    FocaleError,
    IllegalTransition,
    InvalidRequest,
    ModelFileMissing,
    ModelFileUnusable,
    NotFound,
    QueueFull,
    StorageFull,
    WorkerDied,
)

logger = logging.getLogger(__name__)

STATUS_OF: tuple[tuple[type[FocaleError], int], ...] = (
    (NotFound, 404),
    (IllegalTransition, 409),
    (QueueFull, 429),
    (EngineFailed, 500),
    (WorkerDied, 503),
    (StorageFull, 507),
    (FocaleError, 500),
)


def install_error_handlers(app: FastAPI) -> None:
    """Make `app` answer every error of ours in one shape."""
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(FocaleError, _on_focale)
    app.add_exception_handler(HTTPException, _on_http)


def unprocessable(details: list[dict[str, object]], request: Request) -> Response:
    """422 in FastAPI's shape, with a line in the log that a user can read out."""
    for detail in details[:5]:
        where = ".".join(str(part) for part in detail["loc"]) if isinstance(detail["loc"], list | tuple) else ""
        logger.info("422 on %s: %s: %s", request.url.path, where, detail["msg"])
    echo = getattr(request.state, "echo", None)  # the routes of Fooocus-API repeat the request
    body = {"detail": details} if echo is None else {"detail": details, "body": echo}
    return Json(body, status_code=422)


async def _on_validation(request: Request, error: Exception) -> Response:
    details = list(error.errors()) if isinstance(error, RequestValidationError) else []
    return unprocessable([_plain(detail) for detail in details], request)


async def _on_focale(request: Request, error: Exception) -> Response:
    if isinstance(error, InvalidRequest):
        return unprocessable([detail_of(error)], request)
    if isinstance(error, FetchRefused | ModelFileMissing | ModelFileUnusable):
        kind = "model_file" if not isinstance(error, FetchRefused) else "fetch"
        return unprocessable([{"type": kind, "loc": ["body"], "msg": str(error), "input": None}], request)
    status = next((status for kind, status in STATUS_OF if isinstance(error, kind)), 500)
    if isinstance(error, QueueFull):
        headers = {"Retry-After": str(error.retry_after_s)}
        return Json({"detail": "Queue is full", "reason": str(error)}, status_code=429, headers=headers)
    if status >= 500:
        logger.error("%s on %s: %s", type(error).__name__, request.url.path, error)
    return Json({"detail": str(error)}, status_code=status)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(allowed_methods(request)))
    return Json({"detail": error.detail}, status_code=error.status_code, headers=headers)


def allowed_methods(request: Request) -> set[str]:
    """Methods of every route that has the path; the framework tells those of the first one only."""
    return {
        method
        for router in request.app.state.routers
        for route in router.routes
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
        for method in route.methods or ()
    }


def _plain(detail: dict[str, object]) -> dict[str, object]:
    """A detail of FastAPI's own, as JSON values."""
    shown = {key: value for key, value in detail.items() if key not in ("ctx", "url")}
    if isinstance(ctx := detail.get("ctx"), dict):
        shown["ctx"] = {key: str(value) for key, value in ctx.items()}
    shown["loc"] = list(detail["loc"]) if isinstance(detail["loc"], list | tuple) else []
    value = shown.get("input")
    if not (value is None or isinstance(value, str | int | float | bool | dict | list)):
        shown["input"] = str(value)
    return shown
