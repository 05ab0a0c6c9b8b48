"""`/docs` without the network, and the schema of our own routes."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse
from pydantic import BaseModel

from extensions.rest_api.queue import QueueRequest
from extensions.rest_api.tools import DescribeRequest, MaskRequest
from extensions.rest_api.wire import Json
from modules.request import GenerationRequest
from modules.version import VERSION

router = APIRouter(include_in_schema=False)

STATIC = Path(__file__).parent / "static"
ASSETS = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
    "favicon-32x32.png": "image/png",
    "LICENSE": "text/plain; charset=utf-8",
    "NOTICE": "text/plain; charset=utf-8",
    "swagger-ui-bundle.js.LICENSE.txt": "text/plain; charset=utf-8",
}
DESCRIPTION = """Images from prompts. The same server answers on the API port and on the page's port.

Every key of a generate call is optional; `{}` is a valid request. Four modes, the first that fits:
`Accept: image/png` returns the picture, `"stream_output": true` a stream, `"async_process": true` the task id at once,
and anything else the finished record.
"""
EXAMPLE = {"prompt": "a red apple on a wooden table", "performance_selection": "Speed", "image_number": 1}


@router.get("/docs")
async def docs() -> Response:
    """The interactive documentation."""
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="Focale API",
        swagger_js_url="/docs/swagger-ui-bundle.js",
        swagger_css_url="/docs/swagger-ui.css",
        swagger_favicon_url="/docs/favicon-32x32.png",
        swagger_ui_parameters={"persistAuthorization": True, "tryItOutEnabled": True, "docExpansion": "list"},
    )
    page.headers["Content-Security-Policy"] = (
        "default-src 'self'; script-src 'self' 'unsafe-inline'; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:"
    )
    return page


@router.get("/docs/{name}")
async def asset(name: str) -> Response:
    """A file of the documentation page."""
    if name not in ASSETS:
        return Response(status_code=404)
    headers = {"Cache-Control": "public, max-age=86400"}
    return FileResponse(STATIC / name, media_type=ASSETS[name], headers=headers)


@router.get("/openapi.json")
async def schema(request: Request) -> Response:
    """The schema."""
    return Json(request.app.openapi())


def install_schema(app: FastAPI, request_model: type[GenerationRequest]) -> None:
    """Make `app.openapi()` tell the truth: our request models, both ways to show a key, and every status."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _schema(app, request_model)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _schema(app: FastAPI, request_model: type[GenerationRequest]) -> dict[str, Any]:
    from extensions.rest_api.shapes import SHAPES  # only the schema needs them, and the start should be quick

    made = get_openapi(
        title="Focale", version=VERSION, description=DESCRIPTION, routes=app.routes, license_info=_LICENSE
    )
    components = made.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    models: tuple[type[BaseModel], ...] = (request_model, DescribeRequest, MaskRequest, QueueRequest, *SHAPES)
    for model in models:
        schemas.update(_definitions(model))
    schemas.setdefault("HTTPValidationError", _VALIDATION_ERROR)
    components["securitySchemes"] = {
        "ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-KEY"},
        "Bearer": {"type": "http", "scheme": "bearer"},
    }
    made["security"] = [{}, {"ApiKey": []}, {"Bearer": []}]
    made["paths"]["/v1/engine/control/"]["post"]["parameters"][0]["required"] = True  # unless a body has it
    made["paths"]["/v1/engine/generate/"]["post"]["requestBody"] = {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": f"#/components/schemas/{request_model.__name__}"},
                "example": EXAMPLE,
            }
        },
    }
    return made


def _definitions(model: type[BaseModel]) -> dict[str, Any]:
    """The model's schema and those it needs, by name."""
    made = model.model_json_schema(ref_template="#/components/schemas/{model}", mode="validation")
    inner: dict[str, Any] = made.pop("$defs", {})
    return {**inner, model.__name__: made}


_LICENSE = {"name": "Apache-2.0", "identifier": "Apache-2.0"}
_VALIDATION_ERROR = {
    "type": "object",
    "title": "HTTPValidationError",
    "properties": {
        "detail": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "type": {"type": "string"},
                    "loc": {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
                    "msg": {"type": "string"},
                    "input": {},
                    "ctx": {"type": "object"},
                },
                "required": ["type", "loc", "msg"],
            },
        }
    },
    "required": ["detail"],
}
