"""The named endpoint `/generate`: for Gradio clients what `POST /v1/engine/generate/` is over HTTP."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Mapping
from enum import Enum
from typing import Any

import gradio as gr
from gradio.events import api
from pydantic import ValidationError

from modules.choices import Source
from modules.errors import FocaleError
from modules.events import Failed, Progress
from modules.extensions import Services
from modules.presets import INITIAL, apply_preset, load_preset
from modules.record import Record
from modules.request import GenerationRequest, to_params
from modules.ui.labels import sentence_of

API_NAME = "generate"
DESCRIPTION = (
    "Makes pictures. Parameters are those of POST /v1/engine/generate/ and all have defaults; returns the task's "
    "record and the picture files."
)
SWITCHED_OFF = "The API is switched off on the page of this server (Settings, API)."
LEFT_OUT = frozenset(
    {"stream_output", "async_process", "require_base64", "webhook_url", "input_image_checkbox", "current_tab"}
)
"""Fields about how an HTTP call is answered, or that the server ignores."""

Endpoint = Callable[..., AsyncIterator[tuple[dict[str, Any], list[Any]]]]


def add_endpoint(services: Services, share_results: Callable[[], None]) -> None:
    """Add `/generate` to the page that is being built.

    Args:
        share_results: makes the folders of results readable for clients.
    """
    api(make_endpoint(services, share_results), api_name=API_NAME, api_description=DESCRIPTION, concurrency_limit=None)


def make_endpoint(services: Services, share_results: Callable[[], None]) -> Endpoint:
    """The function behind `/generate`; its signature has one parameter for every field of a request."""
    defaults = endpoint_defaults(services)

    async def generate(*args: object, **named: object) -> AsyncIterator[tuple[dict[str, Any], list[Any]]]:
        if not services.state.api_enabled:
            raise gr.Error(SWITCHED_OFF, print_exception=False)
        values = {**dict(zip(defaults, args, strict=False)), **named}
        try:
            request = await asyncio.to_thread(_request_of, services, {**defaults, **values})
            job = await services.handlers.submit(request, source=Source.API)
        except (FocaleError, ValidationError) as error:
            raise gr.Error(sentence_of(error), print_exception=False) from None
        async for _number, event in services.handlers.follow(job):
            if isinstance(event, Progress):
                yield shown_record(job.record), []
            elif isinstance(event, Failed):
                raise gr.Error(event.error, print_exception=False)
        share_results()
        yield shown_record(job.record), [file_of(services, path) for path in job.record.result]

    signature = inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=value, annotation=type(value))
            for name, value in defaults.items()
        ],
        return_annotation=tuple[dict[str, Any], list[gr.FileData]],
    )
    generate.__signature__ = signature  # type: ignore[attr-defined]
    generate.__annotations__ = {name: one.annotation for name, one in signature.parameters.items()}
    return generate


def endpoint_defaults(services: Services) -> dict[str, Any]:
    """Name → default of every parameter, plain JSON values, as the server is configured."""
    configured = GenerationRequest.model_validate(services.settings.request_defaults())
    return {name: _plain(value) for name, value in to_params(configured).items() if name not in LEFT_OUT}


def _plain(value: object) -> object:
    return value.value if isinstance(value, Enum) else value


def _request_of(services: Services, values: Mapping[str, Any]) -> GenerationRequest:
    """The request with the preset laid under it, as over HTTP."""
    asked = GenerationRequest.model_validate(dict(values))
    if asked.preset == INITIAL:
        return asked
    preset = load_preset(services.settings.paths.presets, asked.preset)
    defaults = GenerationRequest.model_validate(services.settings.request_defaults())
    return apply_preset(asked, preset, defaults=defaults)


def shown_record(record: Record) -> dict[str, Any]:
    """A record as plain values: id, state, seeds, notes and the request after resolution."""
    return record.model_dump(mode="json", exclude={"settled", "webhook_url"})


def file_of(services: Services, path: str) -> dict[str, Any]:
    """A result as a file that Gradio clients download."""
    full = services.settings.paths.outputs / path
    return gr.FileData(path=str(full), orig_name=full.name).model_dump()
