"""Lists of what can be named in a request: models, styles, presets, samplers, schedulers, VAEs."""

import asyncio

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from extensions.rest_api.api import ApiDep
from extensions.rest_api.routing import reply, route, statuses
from extensions.rest_api.wire import Json
from modules.choices import DEFAULT_VAE, SamplerName, SchedulerName
from modules.files import Kind
from modules.presets import preset_names

router = APIRouter(tags=["engines"])

_NAMES = {**reply("Names"), **statuses()}


@route(
    router, "GET", "/v1/engines/all-models",
    operation_id="all_models", summary="Model files", responses={**reply("ModelNames"), **statuses()},
)  # fmt: skip
async def all_models(api: ApiDep) -> Response:
    """Checkpoints and LoRAs present now; the folders are read anew."""
    files = api.services.files
    await asyncio.to_thread(files.refresh)
    return Json({"model_filenames": files.names(Kind.CHECKPOINT), "lora_filenames": files.names(Kind.LORA)})


@route(router, "GET", "/v1/engines/styles", operation_id="styles", summary="Style names", responses=_NAMES)
async def styles(api: ApiDep) -> Response:
    """Every name that `style_selections` may hold."""
    return Json(list(api.services.styles.names))


@route(router, "GET", "/v1/engines/presets", operation_id="presets", summary="Preset names", responses=_NAMES)
async def presets(api: ApiDep) -> Response:
    """Every name that `preset` may be."""
    return Json(await asyncio.to_thread(preset_names, api.services.settings.paths.presets))


@route(router, "GET", "/v1/engines/samplers", operation_id="samplers", summary="Samplers", responses=_NAMES)
async def samplers() -> Response:
    """Every name that `sampler_name` may be."""
    return Json([name.value for name in SamplerName])


@route(router, "GET", "/v1/engines/schedulers", operation_id="schedulers", summary="Schedulers", responses=_NAMES)
async def schedulers() -> Response:
    """Every name that `scheduler_name` may be."""
    return Json([name.value for name in SchedulerName])


@route(router, "GET", "/v1/engines/vaes", operation_id="vaes", summary="VAE files", responses=_NAMES)
async def vaes(api: ApiDep) -> Response:
    """Every name that `vae_name` may be."""
    await asyncio.to_thread(api.services.files.refresh)
    return Json([DEFAULT_VAE, *api.services.files.names(Kind.VAE)])


@route(
    router, "GET", "/ping",
    operation_id="ping", summary="Is anybody there?",
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **statuses()},
    response_class=PlainTextResponse,
)  # fmt: skip
async def ping() -> Response:
    """The word `pong`."""
    return PlainTextResponse("pong")
