"""The events of one task, in order, for any number of followers who may come late."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator

from modules.events import Event, Progress, is_final


class EventLog:
    """An append-only list of events that any number of followers read from any point.

    Every event has a number, starting at 1. `Progress` is kept only in its newest form, and without its preview
    once the task has ended; all else is lossless.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[int, Event]] = []
        self._progress: tuple[int, Progress] | None = None
        self._last = 0
        self._changed = asyncio.Event()

    @property
    def progress(self) -> Progress | None:
        """The newest progress of the task."""
        return self._progress[1] if self._progress else None

    @property
    def is_closed(self) -> bool:
        """True once the final event is in."""
        return bool(self._kept) and is_final(self._kept[-1][1])

    def append(self, event: Event) -> None:
        """Add an event and wake every follower."""
        self._last += 1
        if isinstance(event, Progress):
            self._progress = (self._last, event)
        else:
            self._kept.append((self._last, event))
            if is_final(event) and self._progress:
                number, newest = self._progress
                self._progress = (number, dataclasses.replace(newest, preview=None))
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def follow(self, after_number: int = 0) -> AsyncIterator[tuple[int, Event]]:
        """Yield (number, event) in order, from the first event after `after_number`, up to the final one."""
        seen, position = after_number, 0
        while True:
            changed = self._changed
            while position < len(self._kept) and self._kept[position][0] <= seen:
                position += 1
            upcoming = self._kept[position] if position < len(self._kept) else None
            newest = self._progress if self._progress and self._progress[0] > seen else None
            if newest and (upcoming is None or newest[0] < upcoming[0]):
                upcoming = newest
            if upcoming is None:
                if self.is_closed:
                    return
                await changed.wait()
                continue
            seen = upcoming[0]
            yield upcoming
            if is_final(upcoming[1]):
                return
