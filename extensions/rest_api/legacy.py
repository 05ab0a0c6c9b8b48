"""The routes of Fooocus-API v1 and v2, on top of the same door as everything else."""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from starlette.datastructures import UploadFile

from extensions.rest_api import legacy_fields, legacy_replies
from extensions.rest_api.api import Api, ApiDep, WireDep
from extensions.rest_api.bodies import json_body, shown_input, validated
from extensions.rest_api.calls import finished, submitted
from extensions.rest_api.forms import form_of
from extensions.rest_api.legacy_fields import Values
from extensions.rest_api.legacy_replies import job_id_of, legacy_json, task_id_of
from extensions.rest_api.routing import route, statuses
from extensions.rest_api.stored import picture
from extensions.rest_api.wire import Json, Wire, as_data_uri
from modules.choices import TaskStatus
from modules.errors import IllegalTransition, NotFound, QueueFull
from modules.files import Kind
from modules.images import file_as, read_image, store_input, stored_file
from modules.jobs import Job
from modules.record import Record
from modules.request import GenerationRequest

router = APIRouter(tags=["legacy"])

Convert = Callable[[Values], Values]
_MASK_FIELDS = ("input_mask",)
_JSON_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}}
_FORM_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {"type": "object"}}}}}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A list of results, a job (`async_process`), or the picture (`Accept: image/png`)",
        "content": {
            "application/json": {"schema": {}},
            "image/png": {"schema": {"type": "string", "format": "binary"}},
        },
    },
    400: {"description": "Picture mode: the job was cancelled"},
    **statuses(409, 422, 500, 507),
}

_GENERATION: tuple[tuple[str, Convert, bool], ...] = (
    ("/v1/generation/text-to-image", legacy_fields.text_to_image, False),
    ("/v2/generation/text-to-image-with-ip", legacy_fields.text_to_image, False),
    ("/v1/generation/image-upscale-vary", legacy_fields.upscale_vary, True),
    ("/v2/generation/image-upscale-vary", legacy_fields.upscale_vary, False),
    ("/v1/generation/image-inpaint-outpaint", legacy_fields.inpaint_outpaint, True),
    ("/v2/generation/image-inpaint-outpaint", legacy_fields.inpaint_outpaint, False),
    ("/v1/generation/image-prompt", legacy_fields.image_prompt, True),
    ("/v2/generation/image-prompt", legacy_fields.image_prompt, False),
    ("/v1/generation/image-enhance", legacy_fields.enhance_form, True),
    ("/v2/generation/image-enhance", legacy_fields.enhance_json, False),
)  # fmt: skip


def _declare(path: str, convert: Convert, is_form: bool) -> None:
    """Register one of the old generation endpoints."""

    async def endpoint(
        request: Request,
        api: ApiDep,
        wire: WireDep,
        accept: Annotated[str | None, Query(description="image/png returns the picture itself.")] = None,
    ) -> Response:
        values = await (_form_values(request, api) if is_form else json_body(request))
        request.state.echo = {key: shown_input(value) for key, value in values.items()}
        return await _generate(request, api, wire, convert(values), accept)

    endpoint.__doc__ = f"Answers as Fooocus-API's `{path}` did."
    route(
        router, "POST", path,
        operation_id="legacy" + path.replace("/", "_").replace("-", "_"),
        summary=path.rsplit("/", 1)[1], responses=_ANSWERS,
        openapi_extra=_FORM_BODY if is_form else _JSON_BODY,
    )(endpoint)  # fmt: skip


for _path, _convert, _is_form in _GENERATION:
    _declare(_path, _convert, _is_form)


async def _form_values(request: Request, api: Api) -> Values:
    """A form as JSON values; files are stored and stand as their paths."""
    async with form_of(request) as form:
        texts = {key: value for key, value in form.multi_items() if isinstance(value, str)}
        files = {key: await value.read() for key, value in form.multi_items() if isinstance(value, UploadFile)}
    root = api.services.settings.paths.outputs
    for key, content in files.items():
        if content:
            texts[key] = await api.in_thread(partial(_stored, key, content, root))
    return legacy_fields.from_form(texts)


def _stored(key: str, content: bytes, root: FilePath) -> str:
    image = read_image(content, field=key, as_mask=key in _MASK_FIELDS)
    return store_input(image, root) if image else ""


async def _generate(request: Request, api: Api, wire: Wire, values: Values, accept: str | None) -> Response:
    """One old generation call, from its converted fields."""
    wants_picture = (accept or request.headers.get("accept", "")).strip().lower() == "image/png"
    asked: GenerationRequest = validated(api.request_model, values)
    if wants_picture:
        asked = asked.changed(image_number=1)
    try:
        task = await submitted(api, request, asked, style="legacy")
    except QueueFull:
        if asked.async_process and not wants_picture:
            raise
        return _queue_full(wants_picture)
    if asked.async_process and not wants_picture:
        record = task.record if isinstance(task, Job) else task
        return legacy_json(request, await _job(record, task, api, wire, with_preview=False))
    record = await finished(api, request, task)
    if wants_picture:
        return await _picture(record, api)
    base64s = await _base64s(record, api)
    failed = record.task_status is TaskStatus.ERROR
    return legacy_json(request, legacy_replies.results(record, wire, base64s), 500 if failed else 200)


def _queue_full(wants_picture: bool) -> Response:
    if wants_picture:
        return Response("QUEUE_IS_FULL", status_code=409, media_type="text/plain")
    entry = {"base64": None, "url": None, "seed": "", "finish_reason": "QUEUE_IS_FULL"}
    return Json([entry], status_code=429, headers={"Retry-After": "5"})


async def _picture(record: Record, api: Api) -> Response:
    """The first result as PNG, or the word for why there is none."""
    if not record.result:
        reason = legacy_replies.finish_reason(record)
        return Response(reason, status_code=500 if reason == "ERROR" else 400, media_type="text/plain")
    path = stored_file(record.result[0], api.services.settings.paths.outputs)
    return Response(await asyncio.to_thread(file_as, path, "png"), media_type="image/png")


async def _base64s(record: Record, api: Api) -> list[str] | None:
    if record.req_params.get("require_base64") is not True:
        return None
    return await asyncio.to_thread(as_data_uri, record, api.services.settings.paths.outputs)


async def _job(record: Record, task: Job | Record | None, api: Api, wire: Wire, *, with_preview: bool) -> object:
    """A job in the old shape."""
    progress = task.log.progress if isinstance(task, Job) else None
    position = api.services.jobs.position(record.task_id)
    status = progress.message if progress else f"Queued, position {position} ..." if position else None
    preview = await api.previews.png_base64(progress.preview) if with_preview and progress else None
    base64s = await _base64s(record, api) if record.task_status.is_final else None
    return legacy_replies.job(record, wire, status=status, preview=preview or None, base64s=base64s)


# -- jobs -----------------------------------------------------------------------------------------------------------

_PLAIN: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {"schema": {}}}}}


@route(
    router, "POST", "/v1/generation/stop",
    operation_id="legacy_stop", summary="Stop the running job", responses={**_PLAIN, **statuses()},
)  # fmt: skip
async def stop(request: Request, api: ApiDep) -> Response:
    """Stop what runs; nothing running is fine too."""
    await api.services.handlers.control("stop")
    return legacy_json(request, {"msg": "success"})


@route(
    router, "GET", "/v1/generation/query-job",
    operation_id="legacy_query_job", summary="One job",
    responses={**_PLAIN, **statuses(422), 404: {"description": "No such job", **_PLAIN[200]}},
)  # fmt: skip
async def query_job(
    request: Request,
    api: ApiDep,
    wire: WireDep,
    job_id: Annotated[str, Query(description="Id of the job, with or without dashes.")],
    require_step_preview: Annotated[bool, Query(description="Include the newest preview.")] = False,
) -> Response:
    """State, progress and results of a job."""
    task_id = task_id_of(job_id)
    try:
        record = await api.services.handlers.record(task_id)
    except NotFound:
        return legacy_json(request, legacy_replies.NO_JOB, 404)
    task = api.services.jobs.get(task_id)
    return legacy_json(request, await _job(record, task, api, wire, with_preview=require_step_preview))


@route(
    router, "GET", "/v1/generation/job-queue",
    operation_id="legacy_job_queue", summary="Length of the queue", responses={**_PLAIN, **statuses()},
)  # fmt: skip
async def job_queue(request: Request, api: ApiDep) -> Response:
    """How many jobs wait or run, how many ended, and the newest."""
    jobs, history = api.services.jobs, api.services.history
    newest = await asyncio.to_thread(lambda: history.page(page_size=1, statuses=list(TaskStatus)))
    counts = await asyncio.to_thread(history.counts)
    content = {
        "running_size": len(jobs.waiting) + (1 if jobs.running else 0),
        "finished_size": sum(number for status, number in counts.items() if status.is_final),
        "last_job_id": job_id_of(newest[0].task_id) if newest else None,
    }
    return legacy_json(request, content)


@route(
    router, "GET", "/v1/generation/job-history",
    operation_id="legacy_job_history", summary="Jobs", responses={**_PLAIN, **statuses(409, 422)},
)  # fmt: skip
async def job_history(
    request: Request,
    api: ApiDep,
    job_id: Annotated[str | None, Query(description="Only this job.")] = None,
    page: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
    page_size: Annotated[int, Query(ge=1, le=2**31 - 1)] = 20,
    delete: Annotated[bool, Query(description="Delete the job named.")] = False,
) -> Response:
    """Waiting and ended jobs; or deletes one."""
    if delete:
        return legacy_json(request, {"message": await _delete(api, task_id_of(job_id or ""))})
    jobs = api.services.jobs
    active = [*([jobs.running] if jobs.running else []), *jobs.waiting]
    if job_id:
        wanted = task_id_of(job_id)
        found = await asyncio.to_thread(api.services.history.get, wanted)
        ended = [found] if found and found.task_status.is_final else []
        active = [job for job in active if job.task_id == wanted]
    else:
        ended = await asyncio.to_thread(lambda: api.services.history.page(page=page, page_size=page_size))
    content = {
        "queue": [legacy_replies.history_item(job.record) for job in active],
        "history": [legacy_replies.history_item(record) for record in ended],
    }
    return legacy_json(request, content)


async def _delete(api: Api, task_id: str) -> str:
    try:
        await api.services.handlers.delete(task_id)
    except (NotFound, IllegalTransition):
        return "Not found"
    return "Deleted"


# -- the rest -------------------------------------------------------------------------------------------------------


@route(
    router, "POST", "/v1/engines/refresh-models",
    operation_id="legacy_refresh_models", summary="Model files", responses={**_PLAIN, **statuses()},
)  # fmt: skip
async def refresh_models(request: Request, api: ApiDep) -> Response:
    """The model files present now."""
    files = api.services.files
    await asyncio.to_thread(files.refresh)
    names = {"model_filenames": files.names(Kind.CHECKPOINT), "lora_filenames": files.names(Kind.LORA)}
    return legacy_json(request, names)


@route(
    router, "GET", "/v1/engines/clean_vram",
    operation_id="legacy_clean_vram", summary="Unload models", responses={**_PLAIN, **statuses(500)},
)  # fmt: skip
async def clean_vram(request: Request, api: ApiDep) -> Response:
    """Free the memory that models take, after the task in work."""
    await api.services.handlers.unload_models()
    return legacy_json(request, {"message": "ok"})


@router.get("/files/{date}/{file}", operation_id="legacy_file", summary="A result", responses={
    200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}},
    **statuses(empty_404=True),
})  # fmt: skip
async def legacy_file(
    request: Request, api: ApiDep, date: Annotated[str, Path()], file: Annotated[str, Path()]
) -> Response:
    """A result under its old address."""
    return await picture(f"outputs/{date}/{file}", request, api)
