"""The life of a task: which event leads from which state to which, as one pure function.

                    Retrying, Yielded
               ┌───────────────────────┐
               ▼                       │
    Queued  pending ──── Started ───▶ running ── Finished ──▶ finished
               │                       │  ├───── Skipped ───▶ skip
               │                       │  ├───── Stopped ───▶ stop
               │                       │  └───── Failed ────▶ error
               ├──── Stopped ─────────────────────────────────▶ stop
               └──── Failed ──────────────────────────────────▶ error

Planned, Progress, ImageSaved, ImageSkipped and Noticed leave a running task running; Progress and Noticed leave a
pending one pending, while what it lacks is fetched.
No event leads out of a final state.
"""

from collections.abc import Callable
from types import MappingProxyType

from modules.choices import TaskStatus
from modules.errors import IllegalTransition
from modules.events import (
    Event,
    Failed,
    Finished,
    ImageSaved,
    ImageSkipped,
    Noticed,
    Planned,
    Progress,
    Queued,
    Retrying,
    Skipped,
    Started,
    Stopped,
    Yielded,
)
from modules.record import Record

MAX_ATTEMPTS = 2

_PENDING, _RUNNING = TaskStatus.PENDING, TaskStatus.RUNNING

_ALLOWED: dict[type, frozenset[TaskStatus]] = {
    Queued: frozenset({_PENDING}),
    Started: frozenset({_PENDING}),
    Noticed: frozenset({_PENDING, _RUNNING}),
    Planned: frozenset({_RUNNING}),
    Progress: frozenset({_PENDING, _RUNNING}),
    ImageSaved: frozenset({_RUNNING}),
    ImageSkipped: frozenset({_RUNNING}),
    Retrying: frozenset({_RUNNING}),
    Yielded: frozenset({_RUNNING}),
    Finished: frozenset({_RUNNING}),
    Skipped: frozenset({_RUNNING}),
    Stopped: frozenset({_PENDING, _RUNNING}),
    Failed: frozenset({_PENDING, _RUNNING}),
}


def after(record: Record, event: Event, now_ms: int) -> Record:
    """The record once `event` has happened to it.

    Args:
        now_ms: milliseconds since the Unix epoch; a clock that jumps back never makes a task end before it began.
    Raises:
        IllegalTransition: the event cannot happen in the record's state.
    """
    if record.task_status not in _ALLOWED[type(event)]:
        raise IllegalTransition(
            f"Task {record.task_id} is {record.task_status.value}; "
            f"{type(event).__name__} can only happen while it is "
            + " or ".join(sorted(status.value for status in _ALLOWED[type(event)]))
            + "."
        )
    changes = _CHANGES[type(event)](record, event, now_ms)
    return record.model_copy(update=changes)


def may_happen(record: Record, event: Event) -> bool:
    """True when `event` is legal in the record's state."""
    return record.task_status in _ALLOWED[type(event)]


def _started(record: Record, event: Started, now_ms: int) -> dict[str, object]:
    return {
        "task_status": _RUNNING,
        "start_mills": max(now_ms, record.in_queue_mills),
        "attempts": event.attempt,
        "progress": max(0, record.progress) if event.attempt == 1 else 0,
    }


def _planned(_record: Record, event: Planned, _now_ms: int) -> dict[str, object]:
    return {"model": event.model, "width": event.width, "height": event.height}


def _progress(record: Record, event: Progress, _now_ms: int) -> dict[str, object]:
    return {"progress": max(record.progress, min(100, max(0, event.percent)))}


def _image_saved(record: Record, event: ImageSaved, _now_ms: int) -> dict[str, object]:
    settled = record.settled if event.index < 0 else (*record.settled, event.index)
    return {
        "result": (*record.result, event.path),
        "seeds": (*record.seeds, event.seed),
        "settled": settled,
        "width": record.width or event.width,
        "height": record.height or event.height,
    }


def _image_skipped(record: Record, event: ImageSkipped, _now_ms: int) -> dict[str, object]:
    return {"settled": (*record.settled, event.index)}


def _noticed(record: Record, event: Noticed, _now_ms: int) -> dict[str, object]:
    return {} if event.message in record.notes else {"notes": (*record.notes, event.message)}


def _back_to_pending(record: Record, event: Retrying | Yielded, _now_ms: int) -> dict[str, object]:
    notes = (*record.notes, f"Started again: {event.reason}") if isinstance(event, Retrying) else record.notes
    attempts = record.attempts if isinstance(event, Retrying) else record.attempts - 1
    return {"task_status": _PENDING, "notes": notes, "attempts": attempts}


def _ended(status: TaskStatus) -> Callable[[Record, Event, int], dict[str, object]]:
    def changes(record: Record, event: Event, now_ms: int) -> dict[str, object]:
        ended: dict[str, object] = {
            "task_status": status,
            "finish_mills": max(now_ms, record.start_mills, record.in_queue_mills),
            "progress": max(0, record.progress) if status is TaskStatus.ERROR else 100,
        }
        if isinstance(event, Failed):
            ended["error"] = event.error
        return ended

    return changes


_CHANGES: MappingProxyType[type, Callable[..., dict[str, object]]] = MappingProxyType(
    {
        Queued: lambda _record, _event, _now_ms: {},
        Started: _started,
        Noticed: _noticed,
        Planned: _planned,
        Progress: _progress,
        ImageSaved: _image_saved,
        ImageSkipped: _image_skipped,
        Retrying: _back_to_pending,
        Yielded: _back_to_pending,
        Finished: _ended(TaskStatus.FINISHED),
        Skipped: _ended(TaskStatus.SKIP),
        Stopped: _ended(TaskStatus.STOP),
        Failed: _ended(TaskStatus.ERROR),
    }
)
