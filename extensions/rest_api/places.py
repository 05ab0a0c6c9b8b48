"""Tells those who wait for a task when its place in the queue changes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from modules.events import Event, Queued, Started, Stopped
from modules.handlers import Handlers
from modules.jobs import Job, JobQueue


class Places:
    """Wakes waiting followers whenever a task leaves the waiting list."""

    def __init__(self, jobs: JobQueue) -> None:
        """Watch `jobs`."""
        self._jobs = jobs
        self._moved = asyncio.Event()

    def on_event(self, _job: Job, event: Event) -> None:
        """A task started, or was stopped before it did."""
        if isinstance(event, Started | Stopped):
            moved, self._moved = self._moved, asyncio.Event()
            moved.set()

    async def follow(self, handlers: Handlers, job: Job) -> AsyncIterator[Event]:
        """The events of a task; while it waits also a `Queued` for each new place."""
        async with aclosing(handlers.follow(job)) as events:  # type: ignore[type-var]
            async with aclosing(self._while_waiting(events, job)) as early:  # type: ignore[type-var]
                async for event in early:
                    yield event
            async for _number, event in events:
                yield event

    async def _while_waiting(self, events: AsyncIterator[tuple[int, Event]], job: Job) -> AsyncIterator[Event]:
        """Events up to the first that is not about waiting."""
        upcoming = asyncio.ensure_future(anext(events, None))
        place = -1
        try:
            while True:
                moved = asyncio.ensure_future(self._moved.wait())
                await asyncio.wait({upcoming, moved}, return_when=asyncio.FIRST_COMPLETED)
                moved.cancel()
                if upcoming.done():
                    found = upcoming.result()
                    if found is None:
                        return
                    yield found[1]
                    if not isinstance(found[1], Queued):
                        return
                    place = found[1].position
                    upcoming = asyncio.ensure_future(anext(events, None))
                elif 0 < (now := self._jobs.position(job.task_id)) != place:
                    place = now
                    yield Queued(place)
        finally:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)
