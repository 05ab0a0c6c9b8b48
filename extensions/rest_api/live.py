"""Events of a task under their names, with ids that a client can resume from."""

import secrets
import time
from collections.abc import Callable
from typing import Any

import orjson
from sse_starlette import ServerSentEvent

from extensions.rest_api.eta import EtaMeter
from extensions.rest_api.once import Once
from extensions.rest_api.wire import Previews, Wire
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

KEPT_FRAMES = 32  # one with a preview takes a few hundred kilobytes
# Numbers of events start anew with the server; an id of an earlier one resumes from the beginning.
_RUN = secrets.token_hex(4)
_ENDINGS = {
    TaskStatus.FINISHED: "finished",
    TaskStatus.STOP: "stopped",
    TaskStatus.SKIP: "skipped",
    TaskStatus.ERROR: "failed",
}


class TaskEvents:
    """Names and data of the events of tasks; a frame that many followers get is made once."""

    def __init__(self, eta: EtaMeter, previews: Previews, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._eta = eta
        self._previews = previews
        self._frames: Once[bytes] = Once(KEPT_FRAMES)

    @staticmethod
    def event_id(number: int) -> str:
        """The id of an event."""
        return f"{_RUN}-{number}"

    @staticmethod
    def number_after(event_id: str | None) -> int:
        """Number of the event with that id; 0, the beginning, for an unknown one."""
        run, _dash, number = (event_id or "").partition("-")
        return int(number) if run == _RUN and number.isascii() and number.isdecimal() and len(number) < 16 else 0

    async def frame(self, number: int, event: Event, record: Record, wire: Wire) -> bytes:
        """The bytes of an event, for a follower whose URLs `wire` makes.

        Args:
            record: of the task, at or after the event.
        """
        # A place is told again with each new one, and to whoever comes later with what is left by then.
        place = (event.position, int(self._clock_s())) if isinstance(event, Queued) else None

        async def make() -> bytes:
            name, data = await self.named(event, record, wire)
            return _frame(name, data, self.event_id(number))

        return await self._frames.get((record.task_id, number, place, wire.base), make)

    def last_frame(self, record: Record, wire: Wire) -> bytes:
        """The one event of a task that ended so long ago that only its record is left."""
        return _frame(*self.ending(record, wire), None)

    async def named(self, event: Event, record: Record, wire: Wire) -> tuple[str, dict[str, Any]]:
        """Name and data of an event."""
        if is_final(event):
            return self.ending(record, wire)
        if isinstance(event, Progress):
            return "progress", await self._progress(event, record)
        if isinstance(event, Queued):
            return "queued", {"position": event.position, "eta_seconds": self._eta.seconds_left(record.task_id)}
        if isinstance(event, ImageSaved):
            saved = {"url": wire.result_url(event.path), "index": event.index, "seed": event.seed}
            return "image", {**saved, "width": event.width, "height": event.height}
        return _plain(event)

    def ending(self, record: Record, wire: Wire) -> tuple[str, dict[str, Any]]:
        """Name and data of the last event: the whole record."""
        return _ENDINGS.get(record.task_status, "finished"), wire.record(record)

    async def _progress(self, event: Progress, record: Record) -> dict[str, Any]:
        return {
            "percent": event.percent,
            "message": event.message,
            "step": event.step,
            "steps": event.steps,
            "image": event.image,
            "images": event.images,
            "eta_seconds": self._eta.seconds_left(record.task_id),
            "preview": await self._previews.data_uri(event.preview),
        }


def _frame(name: str, data: dict[str, Any], event_id: str | None) -> bytes:
    return ServerSentEvent(data=orjson.dumps(data).decode(), event=name, id=event_id).encode()


def _plain(event: Event) -> tuple[str, dict[str, Any]]:
    """Events whose fields are their data."""
    match event:
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
