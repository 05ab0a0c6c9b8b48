"""Puts the routes of the API into one application."""

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.requests import ClientDisconnect

from extensions.rest_api import catalogue, docs, generate, health, legacy, queue, stored, tasks, tools
from extensions.rest_api.api import Api
from extensions.rest_api.calls import ClientGone
from extensions.rest_api.errors import install_error_handlers
from extensions.rest_api.metrics import CountRequests
from extensions.rest_api.routing import OneForm
from modules.version import VERSION

LINKABLE = frozenset({"docs", "outputs", "inputs", "files"})
SIGNED = frozenset({"outputs", "inputs", "files"})
PUBLIC = frozenset({"/healthz", "/readyz"})
CLIENT_CLOSED_REQUEST = 499


def routers(api: Api) -> list[APIRouter]:
    """Every router, in the order of the documentation."""
    own = [generate.router, tasks.router, queue.router, stored.router, catalogue.router, tools.router, health.router]
    old = [legacy.router] if api.services.settings.legacy_api else []
    return [*own, *old, docs.router]


def build_app(api: Api) -> FastAPI:
    """The application; `api` is what its routes share."""
    app = FastAPI(title="Focale", version=VERSION, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.api = api
    app.state.routers = routers(api)
    for router in app.state.routers:
        app.include_router(router)
    docs.install_schema(app, api.request_model)
    install_error_handlers(app)
    app.add_exception_handler(ClientGone, _nobody_left)
    app.add_exception_handler(ClientDisconnect, _nobody_left)
    app.add_middleware(CountRequests, metrics=api.metrics)
    app.add_middleware(OneForm, slashed=slashed_paths(app))
    app.router.redirect_slashes = False
    app.state.segments = frozenset(
        segment for router in app.state.routers for route in router.routes if (segment := _first_segment(route))
    )
    return app


def slashed_paths(app: FastAPI) -> frozenset[str]:
    """Paths that are registered with a final slash, without it."""
    paths = [getattr(route, "path", "") for router in app.state.routers for route in router.routes]
    return frozenset(path.removesuffix("/") for path in paths if path.endswith("/"))


def segments_of(app: FastAPI) -> frozenset[str]:
    """First path segments of all routes."""
    segments: frozenset[str] = app.state.segments
    return segments


def _first_segment(route: object) -> str:
    path: str = getattr(route, "path", "")
    return path.strip("/").split("/", 1)[0]


async def _nobody_left(_request: Request, _error: Exception) -> Response:
    """An answer that nobody reads."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)
