"""The one place that turns records, events and pictures into what goes over the wire."""

import asyncio
import base64
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson
from fastapi import Request, Response
from PIL import Image

from extensions.rest_api.once import Once
from modules.choices import TaskStatus
from modules.errors import FocaleError
from modules.events import Event, Failed, Finished, Progress, Queued, Retrying, Skipped, Started, Stopped
from modules.images import INPUT_FOLDER, MEDIA_TYPES, file_as, preview_png, stored_file
from modules.record import Record
from modules.signing import UrlSigner

IMAGE_FIELDS = ("uov_input_image", "inpaint_input_image", "inpaint_mask_image_upload", "enhance_input_image")
KEPT_PREVIEWS = 16
FORMATS = frozenset(MEDIA_TYPES)
_HOST = re.compile(r"[A-Za-z0-9._\-]+(:\d{1,5})?|\[[0-9A-Fa-f:.]+\](:\d{1,5})?")
_HIDDEN = frozenset(
    {"result", "req_params", "settled", "attempts", "width", "height", "error", "request_hash", "place"}
)


def base_of(request: Request, *, trust_forwarded: bool) -> str | None:
    """Scheme and host the caller used, or None when its Host header is none."""
    forwarded = request.headers.get("x-forwarded-host", "").split(",")[0].strip() if trust_forwarded else ""
    host = forwarded or request.headers.get("host", "")
    return f"{request.url.scheme}://{host}" if _HOST.fullmatch(host) else None


@dataclass(frozen=True, slots=True)
class Wire:
    """Replies for one caller.

    base: start of the URLs it gets, without a final slash.
    """

    base: str
    signer: UrlSigner

    def result_url(self, path: str) -> str:
        """URL of a result, from its path below the output folder."""
        return self._url(f"/outputs/{path}")

    def input_value(self, value: str) -> str:
        """A stored input as its URL; any other value as it is."""
        return self._url(f"/{value}") if value.startswith(f"{INPUT_FOLDER}/") else value

    def _url(self, path: str) -> str:
        return f"{self.base}{quote(path)}{self.signer.query(path)}"

    def req_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """A record's request with URLs in place of stored inputs; posting it again reproduces the task."""
        shown = dict(params)
        for name in IMAGE_FIELDS:
            if isinstance(value := shown.get(name), str):
                shown[name] = self.input_value(value)
        prompts = shown.get("controlnet_image")
        if isinstance(prompts, list):
            shown["controlnet_image"] = [
                {**prompt, "cn_img": self.input_value(str(prompt.get("cn_img") or ""))}
                for prompt in prompts
                if isinstance(prompt, dict)
            ]
        return shown

    def record(self, record: Record, **more: object) -> dict[str, Any]:
        """A record as every endpoint shows it; `more` are keys of this reply, such as `preview`."""
        stored = record.model_dump(mode="json", exclude=set(_HIDDEN))
        shown: dict[str, Any] = {"id": stored.pop("id"), "task_id": stored.pop("task_id")}
        shown["req_params"] = self.req_params(record.req_params)
        shown |= stored
        shown["progress"] = _number(record.progress)
        shown["result"] = [self.result_url(path) for path in record.result]
        if record.task_status is TaskStatus.ERROR:
            shown["error"] = record.error
        return {**shown, **more}

    def accepted(self, task_id: str) -> dict[str, Any]:
        """The immediate reply of an asynchronous call."""
        return {
            "id": -1,
            "task_id": task_id,
            "req_params": {},
            "in_queue_mills": -1,
            "start_mills": -1,
            "finish_mills": -1,
            "task_status": TaskStatus.PENDING.value,
            "progress": -1,
            "preview": "",
            "webhook_url": "",
            "result": [],
        }


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else round(value, 2)


# -- pictures -------------------------------------------------------------------------------------------------------


class Previews:
    """Previews as the wire wants them; each is converted once, however many followers there are."""

    def __init__(self) -> None:
        self._made: Once[str] = Once(KEPT_PREVIEWS)

    async def png_base64(self, jpeg: bytes | None) -> str:
        """A preview as bare base64 PNG, "" for none."""
        return await self._made.get(jpeg, lambda: asyncio.to_thread(_png_of, jpeg)) if jpeg else ""

    async def data_uri(self, jpeg: bytes | None) -> str | None:
        """A preview as a data URI, None for none."""
        return f"data:image/png;base64,{await self.png_base64(jpeg)}" if jpeg else None


def _png_of(jpeg: bytes) -> str:
    with Image.open(io.BytesIO(jpeg), formats=["JPEG", "PNG"]) as image:
        return base64.b64encode(preview_png(image.convert("RGB"))).decode()


def as_data_uri(record: Record, output_root: Path) -> list[str]:
    """The results as data URIs, in order; a file that is gone is an empty text."""
    uris = []
    for path in record.result:
        suffix = path.rpartition(".")[2].lower()
        try:
            content = file_as(stored_file(path, output_root), suffix)
        except FocaleError:
            uris.append("")
            continue
        uris.append(f"data:{MEDIA_TYPES[suffix]};base64,{base64.b64encode(content).decode()}")
    return uris


# -- the stream -----------------------------------------------------------------------------------------------------


class StreamTranslator:
    """Turns the events of one task into the messages of the stream; percentages never fall."""

    def __init__(self, wire: Wire, task_id: str, *, previews: Previews | None = None) -> None:
        """Translate for one follower; without `previews` it gets none."""
        self._wire = wire
        self._task_id = task_id
        self._previews = previews
        self._percent = 0

    async def message(self, event: Event, record: Record) -> dict[str, Any] | None:
        """The message for an event, None when the event says nothing new to the stream.

        Args:
            record: the task's record after the event.
        """
        if isinstance(event, Finished | Stopped | Skipped | Failed):
            return self.last(record)
        text = _step_text(event)
        if text is None:
            return None
        preview = None
        if isinstance(event, Progress):
            self._percent = max(self._percent, event.percent)
            preview = await self._previews.data_uri(event.preview) if self._previews else None
        return self._shaped(self._percent, preview, text, [])

    def last(self, record: Record) -> dict[str, Any]:
        """The message that ends the stream."""
        failed = record.task_status is TaskStatus.ERROR
        text = f"Error: {record.error}" if failed else "Finished"
        images = [] if failed else [self._wire.result_url(path) for path in record.result]
        return {**self._shaped(100, None, text, images), "task_status": record.task_status.value}

    def _shaped(self, percent: int, preview: str | None, text: str, images: list[str]) -> dict[str, Any]:
        return {
            "progress": percent,
            "preview": preview,
            "message": text,
            "images": images,
            "task_id": self._task_id,
        }


def _step_text(event: Event) -> str | None:
    """What a client reads while it waits."""
    match event:
        case Progress(message=message):
            return message
        case Queued(position=position) if position > 0:
            return f"Queued, position {position} ..."
        case Started():
            return "Initializing ..."
        case Retrying(reason=reason):
            return f"Starting again: {reason} ..."
        case _:
            return None


# -- JSON -----------------------------------------------------------------------------------------------------------


class Json(Response):
    """A JSON reply; integers beyond 2^53 stay exact."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """Encode as UTF-8."""
        return orjson.dumps(content)
