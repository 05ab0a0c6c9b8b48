"""How routes are declared: with and without a final slash, with every status they can return."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Response

Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Response]])

_DETAIL = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
_TEXT: dict[int, str] = {
    403: "The key is missing or wrong, or a web page of another site asks",
    404: "There is no such thing, or the API is switched off",
    409: "The state of the task does not allow it",
    413: "The request is too large",
    422: "A value cannot be used; `loc` names it",
    429: "The queue is full, or there were too many requests; `Retry-After` says when to try again",
    500: "The engine failed",
    503: "The server is shutting down, or the worker is not available",
    507: "The disk is full or read-only",
}
EVENT_STREAM: dict[str, Any] = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "description": "One event; `data` is JSON.",
            "properties": {"event": {"type": "string"}, "id": {"type": "string"}, "data": {"type": "string"}},
            "required": ["data"],
        }
    }
}
_EMPTY = {404: "There is no such file"}


def statuses(*codes: int, empty_404: bool = False) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route, besides success; every route can also be refused by the gate."""
    declared: dict[int | str, dict[str, Any]] = {}
    for code in sorted({403, 404, 413, 429, 503, *codes}):
        if code == 422:
            schema = {"$ref": "#/components/schemas/HTTPValidationError"}
            declared[code] = {"description": _TEXT[code], "content": {"application/json": {"schema": schema}}}
        elif code == 404 and empty_404:
            declared[code] = {"description": _EMPTY[code]}
        else:
            declared[code] = {"description": _TEXT[code], "content": _DETAIL}
    return declared


def both(
    router: APIRouter,
    method: str,
    path: str,
    **options: Any,  # noqa: ANN401 — passed on to FastAPI
) -> Callable[[Handler], Handler]:
    """Register a handler with and without a final slash; the path as given is the one in the schema."""
    twin = path.rstrip("/") if path.endswith("/") else path + "/"

    def register(handler: Handler) -> Handler:
        router.add_api_route(path, handler, methods=[method], response_model=None, **options)
        router.add_api_route(twin, handler, methods=[method], response_model=None, include_in_schema=False)
        return handler

    return register
