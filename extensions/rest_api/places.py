"""Tells those who wait for a task when its place in the queue changes."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from modules.events import Event, Queued, Started, Stopped
from modules.jobs import Job, JobQueue


class Places:
    """Wakes waiting followers whenever the waiting list changes."""

    def __init__(self, jobs: JobQueue) -> None:
        """Watch `jobs`."""
        self._jobs = jobs
        self._moved = asyncio.Event()

    def on_event(self, _job: Job, event: Event) -> None:
        """A task started, or was stopped before it did."""
        if isinstance(event, Started | Stopped):
            self.changed()

    def changed(self) -> None:
        """Somebody reordered the waiting list."""
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def follow(
        self, events: AsyncIterator[tuple[int, Event]], job: Job, after_number: int = 0
    ) -> AsyncIterator[tuple[int, Event]]:
        """The numbered `events` of a task; while it waits also a `Queued` for each new place.

        Such a `Queued` stands in no log and has the number of the event before it. The caller closes `events`.

        Args:
            after_number: of the last event the follower knows.
        """
        number, place = after_number, -1
        upcoming = asyncio.ensure_future(anext(events, None))
        await asyncio.wait({upcoming}, timeout=0)  # what is in the log already comes first
        try:
            while True:
                now = self._jobs.position(job.task_id)
                if upcoming.done():
                    found = upcoming.result()
                    if found is None:
                        return
                    number, event = found
                    if not isinstance(event, Queued):
                        yield found
                        break
                    place = now or event.position  # the log tells the place of the first moment
                    yield number, Queued(place)
                    upcoming = asyncio.ensure_future(anext(events, None))
                    await asyncio.wait({upcoming}, timeout=0)
                elif 0 < now != place:
                    place = now
                    yield number, Queued(place)
                else:
                    await self._either(upcoming)
        finally:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)
        async for found in events:
            yield found

    async def _either(self, upcoming: asyncio.Future[tuple[int, Event] | None]) -> None:
        """Wait until the next event is there, or the waiting list changes."""
        moved = asyncio.ensure_future(self._moved.wait())
        either: set[asyncio.Future[Any]] = {upcoming, moved}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            moved.cancel()
