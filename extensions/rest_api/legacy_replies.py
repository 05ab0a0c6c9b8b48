"""Replies in the shapes of Fooocus-API v1 and v2."""

import gzip
import uuid
from typing import Any

from fastapi import Request, Response

from extensions.rest_api.wire import Json, Wire
from modules.choices import ImageTab, TaskStatus
from modules.record import Record

GZIP_ABOVE_BYTES = 1000

_STAGES = {
    TaskStatus.PENDING: "WAITING",
    TaskStatus.RUNNING: "RUNNING",
    TaskStatus.ERROR: "ERROR",
}
_TYPES = {
    ImageTab.ENHANCE: "Image Enhancement",
    ImageTab.IMAGE_PROMPT: "Image Prompt",
    ImageTab.UOV: "Image Upscale or Variation",
    ImageTab.INPAINT: "Image Inpaint or Outpaint",
    ImageTab.OUTPAINT: "Image Inpaint or Outpaint",
}


def job_id_of(task_id: str) -> str:
    """The id with dashes that old clients know."""
    try:
        return str(uuid.UUID(task_id))
    except ValueError:
        return task_id


def task_id_of(job_id: str) -> str:
    """Our id of an old client's job id."""
    return job_id.strip().replace("-", "").lower()


def job_type(record: Record) -> str:
    """What kind of work it was."""
    params = record.req_params
    tab = params.get("current_tab", "")
    if params.get("mixing_image_prompt_and_vary_upscale") and params.get("uov_input_image"):
        return _TYPES[ImageTab.UOV]
    if params.get("mixing_image_prompt_and_inpaint") and params.get("inpaint_input_image"):
        return _TYPES[ImageTab.INPAINT]
    if tab == ImageTab.UOV and not params.get("uov_input_image"):
        return "Text to Image"
    return _TYPES.get(tab, "Text to Image")


def results(record: Record, wire: Wire, base64s: list[str] | None = None) -> list[dict[str, Any]]:
    """One entry per picture; one without a picture that says why there is none."""
    if not record.result:
        return [{"base64": None, "url": None, "seed": "", "finish_reason": finish_reason(record)}]
    return [
        {
            "base64": base64s[index] if base64s else None,
            "url": wire.result_url(path),
            "seed": str(record.seeds[index]) if index < len(record.seeds) else "",
            "finish_reason": "SUCCESS",
        }
        for index, path in enumerate(record.result)
    ]


def finish_reason(record: Record) -> str:
    """Why a task without pictures ended."""
    return "ERROR" if record.task_status is TaskStatus.ERROR else "USER_CANCEL"


def job(
    record: Record, wire: Wire, *, status: str | None, preview: str | None, base64s: list[str] | None = None
) -> dict[str, Any]:
    """A job as `query-job` and asynchronous calls show it."""
    has_ended = record.task_status.is_final
    return {
        "job_id": job_id_of(record.task_id),
        "job_type": job_type(record),
        "job_stage": _STAGES.get(record.task_status, "SUCCESS"),
        "job_progress": max(0, int(record.progress)),
        "job_status": (record.error or "Finished") if has_ended else status,
        "job_step_preview": None if has_ended else preview,
        "job_result": results(record, wire, base64s) if has_ended else None,
    }


NO_JOB: dict[str, Any] = {
    "job_id": "",
    "job_type": "Not Found",
    "job_stage": "ERROR",
    "job_progress": 0,
    "job_status": "Job not found",
    "job_step_preview": None,
    "job_result": None,
}


def history_item(record: Record) -> dict[str, Any]:
    """A job in lists."""
    return {
        "job_id": job_id_of(record.task_id),
        "in_queue_mills": record.in_queue_mills,
        "start_mills": max(0, record.start_mills),
        "finish_mills": max(0, record.finish_mills),
        "is_finished": record.task_status.is_final,
    }


def webhook_body(record: Record, wire: Wire) -> dict[str, Any]:
    """What old receivers expect."""
    pictures = [{"url": one["url"], "seed": one["seed"]} for one in results(record, wire) if one["url"]]
    return {"job_id": job_id_of(record.task_id), "job_result": pictures}


def legacy_json(request: Request, content: object, status: int = 200) -> Response:
    """A JSON reply, compressed when it is long and the client allows it."""
    reply = Json(content, status_code=status)
    accepts = "gzip" in request.headers.get("accept-encoding", "").lower()
    if accepts and len(reply.body) > GZIP_ABOVE_BYTES:
        packed = gzip.compress(bytes(reply.body), compresslevel=5)
        headers = {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
        return Response(packed, status_code=status, headers=headers, media_type="application/json")
    return reply
