"""Makes a value one time for all who ask for it."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Once(Generic[T]):
    """Keeps the newest few values; whoever asks while one is being made waits for it and makes no second.

    Belongs to one event loop.
    """

    def __init__(self, kept: int) -> None:
        """Keep `kept` values."""
        self._kept = kept
        self._made: OrderedDict[Hashable, asyncio.Task[T]] = OrderedDict()

    async def get(self, key: Hashable, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The value of `key`, made by `make` unless it is there. What `make` raises is raised, and not kept."""
        task = self._made.get(key)
        if task is None:
            task = asyncio.create_task(make())
            self._made[key] = task
            task.add_done_callback(lambda done: self._forget_failure(key, done))
            while len(self._made) > self._kept:
                self._made.popitem(last=False)
        if task.done():
            return task.result()
        return await asyncio.shield(task)  # one who goes away must not take the value from the others

    def _forget_failure(self, key: Hashable, done: asyncio.Task[T]) -> None:
        if (done.cancelled() or done.exception() is not None) and self._made.get(key) is done:
            del self._made[key]
