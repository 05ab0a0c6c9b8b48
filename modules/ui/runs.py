"""Starts and follows runs for the page: widget values in, views of the run out."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping

from pydantic import ValidationError

from modules.choices import Source
from modules.errors import FocaleError, NotFound
from modules.events import Event, Progress, Started, is_final
from modules.extensions import Services
from modules.jobs import Job
from modules.request import GenerationRequest
from modules.ui.labels import sentence_of
from modules.ui.run_view import RunView, after, view_of_record, waiting, with_estimate

SHORTEST_INTERVAL_S = 0.08
"""Between two progress updates; a browser that draws them slower would fall behind."""


class QueueWatch:
    """Wakes whoever waits for the queue to move."""

    def __init__(self) -> None:
        self._moved = asyncio.Event()

    def on_event(self, _job: Job, event: Event) -> None:
        """Hear of an event of any task."""
        if isinstance(event, Started) or is_final(event):
            moved, self._moved = self._moved, asyncio.Event()
            moved.set()

    @property
    def moved(self) -> asyncio.Event:
        """Set at the next start or end of a task; take it before looking at the queue."""
        return self._moved


class Runs:
    """The page's side of the door to generation."""

    def __init__(self, services: Services, *, clock_s: Callable[[], float] = time.monotonic) -> None:
        """Submit to and follow `services`."""
        self._services = services
        self._clock_s = clock_s
        self._queue = QueueWatch()
        services.jobs.on_event(self._queue.on_event)

    async def generate(self, fields: Mapping[str, object]) -> AsyncIterator[RunView]:
        """Submit a request made of these fields and yield its views; a refusal is a view, too."""
        try:
            request = GenerationRequest.model_validate(dict(fields))
            job = await self._services.handlers.submit(request, source=Source.WEBUI)
        except (FocaleError, ValidationError) as error:
            yield RunView(phase="ended", problem=sentence_of(error))
            return
        async for view in self.follow(job):
            yield view

    async def attach(self, task_id: str) -> AsyncIterator[RunView]:
        """Yield the views of a task that was started before: a reloaded page goes on where it was."""
        job = self._services.jobs.get(task_id) if task_id else None
        if job is not None:
            async for view in self.follow(job):
                yield view
            return
        if task_id:
            with contextlib.suppress(NotFound):
                yield view_of_record(await self._services.handlers.record(task_id))
                return
        yield RunView()

    async def follow(self, job: Job) -> AsyncIterator[RunView]:
        """Yield a view after every event, previews not more often than they can be drawn."""
        request = job.request
        view = RunView(
            task_id=job.task_id,
            images=request.image_number,
            shows_each_picture=not request.disable_intermediate_results,
        )
        last_s = -SHORTEST_INTERVAL_S
        first: tuple[RunView, float] | None = None
        async for event in self._events(job):
            if event is None and job is self._services.jobs.preparing:
                continue  # it waits for its download, which says more than its place
            view = waiting(view, self._services.jobs.position(job.task_id)) if event is None else after(view, event)
            if isinstance(event, Progress):  # newer progress replaces this one in the log while we wait
                await asyncio.sleep(max(0.0, last_s + SHORTEST_INTERVAL_S - self._clock_s()))
                if first is None and event.step:
                    first = (view, self._clock_s())
                if first is not None:
                    view = with_estimate(view, first[0], self._clock_s() - first[1])
            elif isinstance(event, Started):
                first = None
            last_s = self._clock_s()
            yield view

    async def _events(self, job: Job) -> AsyncIterator[Event | None]:
        """The events of a task; None each time the queue moves while it waits."""
        events = self._services.handlers.follow(job)
        upcoming: asyncio.Future[tuple[int, Event]] | None = None
        try:
            moved = self._queue.moved
            while True:
                upcoming = upcoming or asyncio.ensure_future(anext(events))
                if job in self._services.jobs.waiting:
                    moving = asyncio.ensure_future(moved.wait())
                    await asyncio.wait((upcoming, moving), return_when=asyncio.FIRST_COMPLETED)
                    moving.cancel()
                    if not upcoming.done():
                        moved = self._queue.moved
                        yield None
                        continue
                try:
                    _number, event = await upcoming
                except StopAsyncIteration:
                    return
                upcoming = None
                yield event
        finally:
            if upcoming is not None:
                upcoming.cancel()
                with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                    await upcoming
            await events.aclose()  # type: ignore[attr-defined]

    async def stop(self, task_id: str) -> bool:
        """Stop a task; False when there is nothing to stop."""
        return bool(task_id) and await self._services.handlers.control("stop", task_id) is not None

    async def skip(self, task_id: str) -> bool:
        """Skip the image in work of a task; False when there is none."""
        return bool(task_id) and await self._services.handlers.control("skip", task_id) is not None

    async def seed_of(self, task_id: str, index: int) -> int | None:
        """Seed of a result; None when the task has no such result."""
        with contextlib.suppress(NotFound):
            seeds = (await self._services.handlers.record(task_id)).seeds
            return seeds[index] if 0 <= index < len(seeds) else None
        return None
