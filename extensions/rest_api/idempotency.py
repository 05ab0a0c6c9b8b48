"""Idempotency-Key: the same request again finds its task, another request under the same key is refused.

As draft-ietf-httpapi-idempotency-key-header-06 has it, but for a repetition while the task is in work: it gets that
task rather than 409, for a task is there to be followed. A key holds as long as the record of its task.
"""

import asyncio
import hashlib
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import Request
from fastapi.exceptions import RequestValidationError

from extensions.rest_api.api import Api, key_name_of
from modules.jobs import Job
from modules.record import Record
from modules.request import GenerationRequest, to_params

MAX_KEY = 200
ACCEPTING_CHECKS, ACCEPTING_CHECK_S = 100, 0.01


@dataclass(frozen=True, slots=True)
class Claim:
    """What an Idempotency-Key stands for.

    task_id: follows from the key, so that it holds across restarts. request_hash: of what was asked.
    """

    task_id: str
    request_hash: str


async def claim_of(api: Api, request: Request, asked: GenerationRequest) -> Claim | None:
    """The claim of a call, None without a key.

    Raises:
        RequestValidationError: the key is too long.
    """
    given = request.headers.get("idempotency-key", "").strip()
    key = given[1:-1] if len(given) > 1 and given[0] == given[-1] == '"' else given  # the draft wants quotes
    if not key:
        return None
    if len(key) > MAX_KEY:
        raise _refused(f"The key is longer than {MAX_KEY} characters.", key)
    digest = hashlib.sha256(f"{key_name_of(request)}\0{key}".encode()).hexdigest()[:32]
    return Claim(digest, await api.in_thread(lambda: _hash_of(asked)))


async def claimed(api: Api, claim: Claim) -> Job | Record | None:
    """The task that already has the key; one that is stored but not queued yet, being accepted now, is waited for.

    Raises:
        RequestValidationError: it was asked for something else.
    """
    record = None
    for _ in range(ACCEPTING_CHECKS):
        job = api.services.jobs.get(claim.task_id)
        if job is not None:
            _check(job.record, claim)
            return job
        record = await asyncio.to_thread(api.services.history.get, claim.task_id)
        if record is None:
            return None
        _check(record, claim)
        if record.task_status.is_final:
            return record
        await asyncio.sleep(ACCEPTING_CHECK_S)
    return record


def _check(record: Record, claim: Claim) -> None:
    if record.request_hash != claim.request_hash:
        raise _refused(
            f"This key belongs to task {record.task_id}, which was asked for something else; "
            "send the same request again, or a new key with a new request. See /docs.",
            None,
        )


def _hash_of(asked: GenerationRequest) -> str:
    """SHA-256 of what the request says, however it was spelled; blocks, for there may be pictures in it."""
    return hashlib.sha256(orjson.dumps(to_params(asked), option=orjson.OPT_SORT_KEYS)).hexdigest()


def _refused(message: str, value: str | None) -> RequestValidationError:
    detail: dict[str, Any] = {
        "type": "idempotency_key",
        "loc": ["header", "Idempotency-Key"],
        "msg": message,
        "input": value,
    }
    return RequestValidationError([detail])
