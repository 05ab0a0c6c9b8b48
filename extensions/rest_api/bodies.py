"""Reads request bodies as old and careless clients send them, and tells exactly what is wrong with the others."""

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args
from urllib.parse import quote

import orjson
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError, create_model

from modules.errors import InvalidRequest
from modules.request import GenerationRequest

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=BaseModel)

SHOWN_INPUT_CHARACTERS = 200
IGNORED_HEADER_CHARACTERS = 1_000
IGNORED_NAMES = 50


def request_model(defaults: Mapping[str, object]) -> type[GenerationRequest]:
    """GenerationRequest with the configured defaults; the name is the one the schema shows.

    Args:
        defaults: request field → value, see `Settings.request_defaults`.
    Raises:
        pydantic.ValidationError: a default does not fit its field.
    """
    validated = GenerationRequest.model_validate(dict(defaults))
    fields: dict[str, Any] = {}
    for name in defaults:
        described = copy.copy(GenerationRequest.model_fields[name])
        described.default = getattr(validated, name)
        fields[name] = (described.annotation, described)
    model: type[GenerationRequest] = create_model(
        "CommonRequest", __base__=GenerationRequest, __doc__=GenerationRequest.__doc__, **fields
    )
    return model


def as_plain(request: GenerationRequest) -> GenerationRequest:
    """The request as a plain GenerationRequest that still knows which fields were sent."""
    values = {name: getattr(request, name) for name in GenerationRequest.model_fields}
    return GenerationRequest.model_construct(_fields_set=set(request.model_fields_set), **values)


async def json_body(request: Request) -> dict[str, Any]:
    """The JSON object in the body, whatever Content-Type it claims; documented clients send none.

    Raises:
        RequestValidationError: no JSON, or no object.
    """
    raw = (await request.body()).removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        raise _refused("missing", ("body",), "Field required", None)
    try:
        value: object = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _refused("json_invalid", ("body", error.pos), "JSON decode error", {}, error=error.msg) from None
    if not isinstance(value, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        raise _refused("model_attributes_type", ("body",), message, value)
    return value


def validated(model: type[Model], values: Mapping[str, Any]) -> Model:
    """The values as `model`.

    Raises:
        RequestValidationError: with the location of each offending value below `body`.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(located(error)) from None


def located(error: ValidationError) -> list[dict[str, Any]]:
    """The details of a validation error in FastAPI's shape, small enough to send back."""
    return [
        {
            "type": detail["type"],
            "loc": ["body", *detail["loc"]],
            "msg": detail["msg"],
            "input": shown_input(detail["input"]),
            **({"ctx": {key: str(value) for key, value in detail["ctx"].items()}} if "ctx" in detail else {}),
        }
        for detail in error.errors(include_url=False)
    ]


def detail_of(error: InvalidRequest) -> dict[str, Any]:
    """One refused value in the same shape."""
    return {
        "type": error.kind,
        "loc": ["body", *error.field],
        "msg": error.message,
        "input": shown_input(error.value),
    }


def ignored_fields(model: type[BaseModel], values: Mapping[str, Any]) -> list[str]:
    """Keys that the model does not have, as paths such as `loras[0].nmae`."""
    found: list[str] = []
    for path in _unknown(model, values, ""):
        found.append(path)
        if len(found) >= IGNORED_NAMES:
            break
    if found:
        logger.info("Ignored unknown request fields: %s", ", ".join(found))
    return found


def ignored_header(names: list[str]) -> dict[str, str]:
    """The response header that lists ignored fields; empty when there are none."""
    if not names:
        return {}
    text = ", ".join(quote(name, safe="._-[]") or '""' for name in names)
    return {"X-Ignored-Fields": text[:IGNORED_HEADER_CHARACTERS].rstrip()}  # HTTP allows no space at the end


def _unknown(model: type[BaseModel], values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in values.items():
        known = model.model_fields.get(key)
        if known is None:
            yield f"{prefix}{key[:100]}"
            continue
        inner = _element_model(known.annotation)
        if inner is None:
            continue
        rows = value if isinstance(value, list) else [value]
        for index, row in enumerate(rows[:IGNORED_NAMES]):
            if isinstance(row, dict):
                yield from _unknown(inner, row, f"{prefix}{key}[{index}].")


def _element_model(annotation: object) -> type[BaseModel] | None:
    """The model of a list's elements, if they are objects."""
    for part in get_args(annotation):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def shown_input(value: object) -> object:
    """A value as an error shows it: JSON, and never a whole picture."""
    if isinstance(value, str):
        return value if len(value) <= SHOWN_INPUT_CHARACTERS else value[:SHOWN_INPUT_CHARACTERS] + "…"
    if value is None or isinstance(value, bool | int | float):
        return value
    try:
        text = orjson.dumps(value, default=str)
    except (TypeError, ValueError):
        text = b""
    if 0 < len(text) <= SHOWN_INPUT_CHARACTERS * 2:
        shown: object = orjson.loads(text)
        return shown
    return f"{type(value).__name__} of {len(text)} bytes"


def _refused(kind: str, loc: tuple[str | int, ...], message: str, value: object, **ctx: str) -> RequestValidationError:
    detail: dict[str, Any] = {"type": kind, "loc": list(loc), "msg": message, "input": shown_input(value)}
    return RequestValidationError([{**detail, "ctx": ctx} if ctx else detail])
