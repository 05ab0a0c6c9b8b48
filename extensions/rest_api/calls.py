"""From an HTTP request to a task: parse, lay the preset under it, store its pictures, submit, wait."""

import asyncio
import logging
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from extensions.rest_api import legacy_replies
from extensions.rest_api.api import Api, key_name_of
from extensions.rest_api.bodies import as_plain, ignored_fields, json_body, located, validated
from extensions.rest_api.idempotency import claim_of, claimed
from extensions.rest_api.inputs import with_stored_inputs
from extensions.rest_api.webhook import WebhookStyle
from modules.choices import Source
from modules.errors import IllegalTransition, InvalidRequest
from modules.jobs import Job
from modules.params import is_no_image
from modules.presets import INITIAL, apply_preset, load_preset
from modules.record import Record
from modules.request import GenerationRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection before its answer was ready."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """A generate call, read.

    request: validated, preset not applied yet. ignored: keys that mean nothing here.
    """

    request: GenerationRequest
    ignored: list[str]


async def parsed(api: Api, request: Request) -> Parsed:
    """Read the body of a generate call.

    Raises:
        RequestValidationError: the body does not fit.
    """
    values = await json_body(request)
    return Parsed(validated(api.request_model, values), ignored_fields(api.request_model, values))


async def submitted(
    api: Api, request: Request, asked: GenerationRequest, *, style: WebhookStyle = "record"
) -> Job | Record:
    """Submit a parsed request; with an Idempotency-Key that was used before, the task of that time.

    Args:
        style: what is told at its end; files of legacy calls are named after their job.
    Returns:
        A `Record` only for a known task that ended so long ago that it is no longer in memory.

    Raises:
        RequestValidationError: the key belongs to another request.
        InvalidRequest: a value cannot be used; nothing was queued.
        QueueFull: the queue, or this key's share of it, is full.
    """
    claim = await claim_of(api, request, asked)
    if claim and (known := await claimed(api, claim)) is not None:
        return known
    task_id = claim.task_id if claim else uuid.uuid4().hex
    if style == "legacy" and (asked.save_name or "none").lower() == "none":
        asked = asked.changed(save_name=legacy_replies.job_id_of(task_id))
    key_name = key_name_of(request)
    api.quota.check(key_name)
    ready = await api.in_thread(partial(_resolved, api, request, asked))
    if ready.inpaint_input_image and not (ready.inpaint_mask_image_upload or ready.outpaint_selections):
        logger.warning("Task %s repaints nothing: its inpaint picture has neither mask nor direction", task_id)
    webhook_url = _webhook_of(ready) or api.services.settings.webhook_url
    async with api.outbox.expecting(task_id, webhook_url, style):
        try:
            job = await api.services.handlers.submit(
                ready,
                source=Source.API,
                webhook_url=webhook_url,
                task_id=task_id,
                request_hash=claim.request_hash if claim else "",
            )
        except IllegalTransition:  # the same Idempotency-Key, at the same moment
            found = await claimed(api, claim) if claim else None
            if found is None:
                raise
            return found
    api.quota.own(job.task_id, key_name)
    return job


def _webhook_of(request: GenerationRequest) -> str:
    """The URL to tell, "" for none.

    Raises:
        InvalidRequest: it is no http or https URL.
    """
    url = request.webhook_url.strip()
    if is_no_image(url):  # the same words mean no URL
        return ""
    if not url.lower().startswith(("http://", "https://")):
        raise InvalidRequest("webhook_url", "must begin with http:// or https://", url)
    return url


def _resolved(api: Api, request: Request, asked: GenerationRequest) -> GenerationRequest:
    """The request with preset and stored pictures; blocks."""
    ready = asked
    if asked.preset != INITIAL:
        preset = load_preset(api.services.settings.paths.presets, asked.preset)
        try:
            ready = apply_preset(asked, preset, defaults=api.request_model())
        except ValidationError as error:
            raise RequestValidationError(located(error)) from None
    return as_plain(with_stored_inputs(ready, api.sources(request)))


async def finished(api: Api, request: Request, task: Job | Record) -> Record:
    """Wait for the end of a task.

    Raises:
        ClientGone: the client did not wait; the task runs on or stops, as its request says.
    """
    if isinstance(task, Record):
        return task
    return await unless_gone(request, api.services.handlers.finished_record(task))


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away.

    Raises:
        ClientGone: it went away.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, watching):
            if not task.done():
                task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
