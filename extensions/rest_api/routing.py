"""How routes are declared: with and without a final slash, with every status they can return."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Response

from modules.extensions import AsgiApp, Receive, Scope, Send

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


def reply(shape: str, **more: Any) -> dict[int | str, dict[str, Any]]:  # noqa: ANN401 — passed on to the schema
    """The success of a route: JSON of a shape in shapes.py, by its name; `more` are further keys of the response."""
    schema = {"schema": {"$ref": f"#/components/schemas/{shape}"}}
    content = {"application/json": schema, **more.pop("content", {})}
    return {200: {"description": "Success", "content": content, **more}}


def route(
    router: APIRouter,
    method: str,
    path: str,
    **options: Any,  # noqa: ANN401 — passed on to FastAPI
) -> Callable[[Handler], Handler]:
    """Register a handler under its path; `OneForm` makes it answer with and without a final slash."""

    def register(handler: Handler) -> Handler:
        router.add_api_route(path, handler, methods=[method], response_model=None, **options)
        return handler

    return register


class OneForm:
    """ASGI middleware that gives each path the form in which its route is registered; no client is redirected."""

    def __init__(self, app: AsgiApp, slashed: frozenset[str]) -> None:
        """Pass on to `app`.

        Args:
            slashed: paths that are registered with a final slash, without it.
        """
        self._app = app
        self._slashed = slashed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        if scope["type"] == "http":
            path: str = scope["path"]
            bare = path.removesuffix("/")
            one = f"{bare}/" if bare in self._slashed else bare
            if one and one != path:
                scope = {**scope, "path": one}
        await self._app(scope, receive, send)
