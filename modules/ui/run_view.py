"""What the page shows of a run, as one value that each event changes; knows no widgets."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from modules.choices import TaskStatus
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

Phase = Literal["idle", "waiting", "running", "ended"]

LEAST_PERCENT = 10
"""Of the run, from which an estimate of the rest means something."""
WAITING = "Waiting for task to start ..."


@dataclass(frozen=True, slots=True)
class RunView:
    """One run as the page shows it.

    images: pictures asked for. percent: 0–100. text: what happens now.
    left_s: estimate of the time to the end, None while there is nothing to go by.
    preview: JPEG of the step. pictures: results so far, POSIX paths below the output folder; seeds: one for each.
    notes: things to know. problem: why it failed. outcome: how it ended, "" if as it should.
    """

    task_id: str = ""
    images: int = 0
    phase: Phase = "idle"
    percent: int = 0
    text: str = ""
    left_s: int | None = None
    preview: bytes | None = None
    pictures: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    problem: str = ""
    outcome: str = ""
    shows_each_picture: bool = True

    @property
    def is_busy(self) -> bool:
        """True while the run waits or works."""
        return self.phase in ("waiting", "running")


def waiting(view: RunView, position: int) -> RunView:
    """The view of a run that has this many tasks ahead of it."""
    ahead = f"{position} {'task is' if position == 1 else 'tasks are'} ahead" if position > 0 else ""
    return replace(view, phase="waiting", percent=1, text=f"{WAITING} {ahead}".strip(), left_s=None, preview=None)


def after(view: RunView, event: Event) -> RunView:
    """The view once an event has happened."""
    match event:
        case Queued(position):
            return waiting(view, position)
        case Started():
            return replace(view, phase="running", text="Preparing ...")
        case Progress():
            preview = event.preview or view.preview
            return replace(view, phase="running", percent=event.percent, text=event.message, preview=preview)
        case ImageSaved():
            return replace(view, pictures=(*view.pictures, event.path), seeds=(*view.seeds, event.seed))
        case Noticed(message):
            return view if message in view.notes else replace(view, notes=(*view.notes, message))
        case Retrying(reason):
            return replace(view, phase="waiting", percent=1, text=f"Starting again: {reason}")
        case Yielded():
            return waiting(view, 1)
        case ImageSkipped() | Planned():
            return view
        case Finished() | Stopped() | Skipped() | Failed():
            return _ended(view, event)


def with_estimate(view: RunView, since: RunView, elapsed_s: float) -> RunView:
    """The view with the time that is left if the run goes on as it did since an earlier view.

    Args:
        since: of the first step that was seen; what went before, such as loading a model, happens once.
        elapsed_s: from then to now.
    """
    gained = view.percent - since.percent
    if view.phase != "running" or gained < LEAST_PERCENT:
        return replace(view, left_s=None)
    return replace(view, left_s=round(elapsed_s * (100 - view.percent) / gained))


def _ended(view: RunView, event: Finished | Stopped | Skipped | Failed) -> RunView:
    """The view of a run that is over."""
    ended = replace(view, phase="ended", percent=100, text="", left_s=None, preview=None)
    if isinstance(event, Failed):
        return replace(ended, problem=event.error)
    if isinstance(event, Stopped):
        return replace(ended, outcome=_kept("Stopped", view))
    if isinstance(event, Skipped):
        return replace(ended, outcome="Skipped: no picture was made.")
    return ended


def _kept(what: str, view: RunView) -> str:
    """How many pictures a run leaves that did not come to its end."""
    if not view.pictures:
        return f"{what}: no picture was finished."
    return f"{what}: {len(view.pictures)} of {view.images} pictures are kept."


def view_of_record(record: Record) -> RunView:
    """The view of a task that ended before this page looked."""
    image_number = record.req_params.get("image_number", 1)
    view = RunView(
        task_id=record.task_id,
        images=image_number if isinstance(image_number, int) else 1,
        pictures=record.result,
        seeds=record.seeds,
        notes=record.notes,
    )
    return _ended(view, _final_event(record))


def _final_event(record: Record) -> Finished | Stopped | Skipped | Failed:
    """The event that led to the record's state."""
    match record.task_status:
        case TaskStatus.ERROR:
            return Failed(record.error)
        case TaskStatus.STOP:
            return Stopped()
        case TaskStatus.SKIP:
            return Skipped()
        case _:
            return Finished()


def seeds_shown(view: RunView) -> Iterator[tuple[int, int]]:
    """(number of the picture from 1, its seed)."""
    yield from enumerate(view.seeds[: len(view.pictures)], 1)
