"""Events of a task under their names, with ids that a client can resume from."""

import secrets
from typing import Any

from extensions.rest_api.eta import EtaMeter
from extensions.rest_api.wire import Wire, preview_base64
from modules.choices import TaskStatus
from modules.events import (
    Event,
    ImageSaved,
    ImageSkipped,
    Noticed,
    Planned,
    Progress,
    Queued,
    Retrying,
    Started,
    is_final,
)
from modules.record import Record

# Numbers of events start anew with the server; an id of an earlier one resumes from the beginning.
_RUN = secrets.token_hex(4)
_ENDINGS = {
    TaskStatus.FINISHED: "finished",
    TaskStatus.STOP: "stopped",
    TaskStatus.SKIP: "skipped",
    TaskStatus.ERROR: "failed",
}


class TaskEvents:
    """Names and data of the events of one task, for one follower."""

    def __init__(self, wire: Wire, eta: EtaMeter) -> None:
        """Speak to the caller of `wire`."""
        self._wire = wire
        self._eta = eta

    @staticmethod
    def event_id(number: int) -> str:
        """The id of an event."""
        return f"{_RUN}-{number}"

    @staticmethod
    def number_after(event_id: str | None) -> int:
        """Number of the event with that id; 0, the beginning, for an unknown one."""
        run, _dash, number = (event_id or "").partition("-")
        return int(number) if run == _RUN and number.isascii() and number.isdecimal() and len(number) < 16 else 0

    async def named(self, event: Event, record: Record) -> tuple[str, dict[str, Any]]:
        """Name and data of an event."""
        if is_final(event):
            return self.ending(record)
        if isinstance(event, Progress):
            return "progress", await self._progress(event, record)
        if isinstance(event, ImageSaved):
            saved = {"url": self._wire.result_url(event.path), "index": event.index, "seed": event.seed}
            return "image", {**saved, "width": event.width, "height": event.height}
        return _plain(event)

    def ending(self, record: Record) -> tuple[str, dict[str, Any]]:
        """Name and data of the last event: the whole record."""
        return _ENDINGS.get(record.task_status, "finished"), self._wire.record(record)

    async def _progress(self, event: Progress, record: Record) -> dict[str, Any]:
        preview = await preview_base64(event.preview)
        return {
            "percent": event.percent,
            "message": event.message,
            "step": event.step,
            "steps": event.steps,
            "image": event.image,
            "images": event.images,
            "eta_seconds": self._eta.seconds_left(record.task_id),
            "preview": f"data:image/png;base64,{preview}" if preview else None,
        }


def _plain(event: Event) -> tuple[str, dict[str, Any]]:
    """Events whose fields are their data."""
    match event:
        case Queued(position=position):
            return "queued", {"position": position}
        case Started(attempt=attempt):
            return "started", {"attempt": attempt}
        case Planned(model=model, width=width, height=height, steps=steps, images=images):
            return "planned", {"model": model, "width": width, "height": height, "steps": steps, "images": images}
        case Noticed(message=message):
            return "notice", {"message": message}
        case ImageSkipped(index=index):
            return "image_skipped", {"index": index}
        case Retrying(reason=reason):
            return "retrying", {"reason": reason}
        case _:
            return type(event).__name__.lower(), {}
